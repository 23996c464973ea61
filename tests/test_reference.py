"""`methods.reference`: where training began, bit for bit, whatever was trained since."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune import families, fused, methods
from glmtune.errors import UserError
from glmtune.layers import Linear
from glmtune.run import Freeze, Full, Lora, Prefix

from . import tiny

IDS = torch.tensor([[5, 9, 2, 40, 17, 200, 31, 8, 8, 120]])
STEPS = 50


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`biased`: q, k and v have biases, as in Qwen2."""
    folder = tmp_path_factory.mktemp("bases")
    return {"plain": tiny.llama(folder / "plain"), "biased": tiny.llama(folder / "biased", attention_bias=True)}


def opened(base: Path, compute: torch.dtype = torch.float32) -> Any:
    model = families.load_model(base, dtype=compute, device="cpu")
    if compute == torch.float32:
        with torch.no_grad():  # no exact zeros where a trained model has none
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    methods.prepare(model, compute)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def steps(model: Any, count: int = STEPS, lr: float = 1e-2) -> None:
    parameters = list(methods.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, fused=True
    )  # which changes parameters without counting it: optimizer.make counts
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(parameters))
    for step in range(count):
        noise = methods.noise_of(model)
        if noise is not None:
            noise.step, noise.spans = step, [(0, 0, 0, IDS.shape[1])]
        model(input_ids=IDS, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, IDS[0, 1:, None]).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], str]:
    """Trained adapters to start from, or to stay beneath."""
    folder = tmp_path_factory.mktemp("saved")

    def make(base: str, options: Any) -> str:
        to = folder / f"{base}{abs(hash(options.model_dump_json()))}"
        if not to.exists():
            model = opened(bases[base])
            methods.attach(model, options, seed=7)
            steps(model, 3)
            methods.save_adapter(model, to, options, str(bases[base]))
        return str(to)

    return make


Q = ["q_proj", "v_proj"]
CASES: dict[str, Callable[[Callable[[Any], str]], Any]] = {
    "lora": lambda made: Lora(rank=4),
    "lora with dropout": lambda made: Lora(rank=4, dropout=0.3),
    "rslora": lambda made: Lora(rank=4, rslora=True),
    "one a": lambda made: Lora(rank=4, share_a=True),
    "dora": lambda made: Lora(rank=4, dora=True),
    "pissa": lambda made: Lora(rank=4, pissa=True),
    "dora and pissa": lambda made: Lora(rank=4, pissa=True, dora=True),
    "whole modules": lambda made: Lora(rank=4, modules_to_save=["norm", "embed_tokens"]),
    "dora and whole modules": lambda made: Lora(rank=4, dora=True, modules_to_save=["lm_head"]),
    "start": lambda made: Lora(rank=4, start=made(Lora(rank=4))),
    "start on some layers": lambda made: Lora(rank=4, targets=Q, start=made(Lora(rank=4, targets=Q))),
    "start of dora": lambda made: Lora(rank=4, dora=True, start=made(Lora(rank=4, dora=True))),
    "start with whole modules": lambda made: Lora(
        rank=4, modules_to_save=["norm"], start=made(Lora(rank=4, modules_to_save=["norm"]))
    ),
    "under": lambda made: Lora(rank=4, under=[made(Lora(rank=3))]),
    "dora over others": lambda made: Lora(rank=4, dora=True, under=[made(Lora(rank=3)), made(Lora(rank=2, targets=Q))]),
    "pissa over others": lambda made: Lora(rank=4, pissa=True, under=[made(Lora(rank=3))]),
    "prefix": lambda made: Prefix(num_virtual_tokens=5),
    "random prefix": lambda made: Prefix(num_virtual_tokens=5, init="random"),
    "prefix with dropout": lambda made: Prefix(num_virtual_tokens=5, dropout=0.3),
    "prefix with projection": lambda made: Prefix(num_virtual_tokens=5, projection=True),
    "prefix with a start": lambda made: Prefix(num_virtual_tokens=5, start=made(Prefix(num_virtual_tokens=5))),
    "freeze": lambda made: Freeze(last=1, others=["norm"]),
    "full": lambda made: Full(),
}


QUICK = {
    ("lora", "plain", "bf16"), ("dora", "biased", "fp32"), ("pissa", "plain", "fp32"), ("start", "biased", "bf16"), ("under", "plain", "fp32"),
    ("whole modules", "plain", "fp32"), ("prefix with projection", "plain", "fp32"), ("full", "biased", "bf16"),
}  # fmt: skip


ALL = [
    pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow)
    for each in itertools.product(CASES, ("plain", "biased"), ("fp32", "bf16"))
]


@pytest.mark.parametrize(("case", "base", "precision"), ALL)
def test_the_reference_is_where_training_began(
    case: str, base: str, precision: str, bases: dict[str, Path], saved: Callable[[str, Any], str]
) -> None:
    compute = families.as_dtype(precision)
    options = CASES[case](lambda adapter: saved(base, adapter))
    model = opened(bases[base], compute)
    methods.attach(model, options, seed=1)
    methods.method.of(options).begin(model, options, lambda count: list(range(20, 20 + count)))
    if "dropout" in case:
        model.train()
        methods.add_neftune(model, 5.0, 1)
    methods.hold_start(model, options, keep=True)
    model.eval()
    began = logits(model)
    model.train("dropout" in case)
    steps(model)
    modes = [module.training for module in model.modules()]
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in methods.trainable(model).items()}
    values = {name: parameter.detach().clone() for name, (parameter, _) in parameters.items()}
    model.eval()
    now = logits(model)
    model.train("dropout" in case)
    for _ in range(2):
        with methods.reference(model), methods.reference(model):
            assert torch.equal(logits(model), began)
            assert not model(input_ids=IDS, use_cache=False).logits.requires_grad
    with pytest.raises(ZeroDivisionError), methods.reference(model):
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == modes
    assert (now - began).abs().max() > 1e-2
    after = methods.trainable(model)
    assert list(after) == list(parameters)  # the same parameters, in the same memory, with the same numbers
    for name, parameter in after.items():
        assert (
            parameter is parameters[name][0]
            and parameter.data_ptr() == parameters[name][1]
            and torch.equal(parameter, values[name])
        )
    model.eval()
    assert torch.equal(logits(model), now)


@pytest.mark.parametrize("case", ["lora", "dora", "pissa", "start", "prefix", "prefix with projection", "freeze", "full"])
def test_gradients_flow_around_it(case: str, bases: dict[str, Path], saved: Callable[[str, Any], str]) -> None:
    """A step whose forward is before the reference and whose backward after it, as in a loss of both, has the gradient of one without."""
    options = CASES[case](lambda adapter: saved("plain", adapter))
    found = []
    for between in (False, True):
        model = opened(bases["plain"])
        methods.attach(model, options, seed=1)
        methods.hold_start(model, options, keep=True)
        steps(model, 3)
        loss = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 3].sum()
        if between:
            with methods.reference(model):
                other = logits(model)
            loss = loss - other.log_softmax(-1)[..., 3].sum()
        loss.backward()
        found.append({name: parameter.grad for name, parameter in methods.trainable(model).items()})
    assert all(torch.equal(found[1][name], gradient) and gradient.any() for name, gradient in found[0].items())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_reference_on_the_fused_path(compute: torch.dtype, bases: dict[str, Path]) -> None:
    model = opened(bases["plain"], compute)
    methods.attach(model, Lora(rank=4, targets=["q_proj", "o_proj", "up_proj", "down_proj"]), seed=1)
    methods.hold_start(model, Lora())

    @torch.no_grad()
    def hidden() -> Tensor:
        return fused.hidden_states(model, torch.cat([IDS[0], IDS[0, :4]]), [10, 4], compile=False)

    began = hidden()
    steps(model)
    now = hidden()
    with methods.reference(model):
        assert torch.equal(hidden(), began)
    assert torch.equal(hidden(), now) and not torch.equal(now, began)


def test_adding_nothing_changes_no_number() -> None:
    """Why an adapter that starts at zero can be switched off: y + 0 is y, for every y. (-0 + 0 is +0: the same number, and in all that
    follows the same number again.)"""
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        whole = {torch.float32: torch.int32}.get(kind, torch.int16)
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32)
        y = (every << 16 if kind == torch.float32 else every.to(torch.int16)).to(whole).view(kind)
        y = y[~y.isnan()]
        for zero in (torch.zeros_like(y), -torch.zeros_like(y)):
            added = y + zero * 2.5
            assert torch.equal(added, y)
            assert torch.equal(added.view(whole)[y != 0], y.view(whole)[y != 0])
    layer = Linear(torch.nn.Linear(6, 4), torch.float32)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias.copy_(torch.tensor([-0.0, 1, 2, 3]))
    x = torch.randn(3, 6)
    without = layer(x)
    methods._set_lora(layer, torch.randn(2, 6), torch.zeros(4, 2), 3.0)
    assert torch.equal(layer(x), without)


# --- the model's own weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [Full(), Freeze(last=1)], ids=["full", "freeze"])
def test_without_a_copy_it_can_be_had_before_the_first_step_only(options: Any, bases: dict[str, Path]) -> None:
    model = opened(bases["plain"])
    methods.attach(model, options, seed=1)
    methods.hold_start(model, options)
    before = logits(model)
    with methods.reference(model):
        assert torch.equal(logits(model), before)
    steps(model, 1)
    with pytest.raises(UserError, match=f"method={options.kind} has changed .* no copy .* before step 1"), methods.reference(model):
        pass


def test_nothing_held_is_told(bases: dict[str, Path]) -> None:
    model = opened(bases["plain"])
    methods.attach(model, Lora(), seed=1)
    with pytest.raises(UserError, match="nothing was kept of where this training began"), methods.reference(model):
        pass


def test_what_is_kept(bases: dict[str, Path], saved: Callable[[str, Any], str]) -> None:
    """Nothing for adapters that start at zero; of the others only what is trained; of a projection what comes out of it."""

    def kept(options: Any) -> dict[str, Tensor]:
        model = opened(bases["plain"])
        methods.attach(model, options, seed=1)
        methods.method.of(options).begin(model, options, lambda count: list(range(20, 20 + count)))
        methods.hold_start(model, options)
        return model.began.kept

    for options in (Lora(), Lora(dora=True), Lora(rslora=True, share_a=True), Lora(under=[saved("plain", Lora(rank=3))])):
        assert not kept(options)
    assert set(kept(Lora(modules_to_save=["norm"]))) == {"model.norm.weight"}
    pissa = kept(Lora(pissa=True, targets=["q_proj"]))
    assert set(pissa) == {f"model.layers.{i}.self_attn.q_proj.lora_{part}" for i in (0, 1) for part in "AB"}
    for projection in (False, True):
        assert {n: tuple(t.shape) for n, t in kept(Prefix(num_virtual_tokens=5, projection=projection)).items()} == {
            "prefix": (5, 4, 2, 8)
        }


# --- resuming ---------------------------------------------------------------------------------------------------------------


RESUMED = ["lora", "dora", "pissa", "start", "whole modules", "prefix", "prefix with projection"]


@pytest.mark.parametrize("case", RESUMED)
def test_after_a_resume_it_is_still_where_the_run_began(
    case: str, bases: dict[str, Path], saved: Callable[[str, Any], str], tmp_path: Path
) -> None:
    """As a run does it: attach, begin, hold, then the checkpoint's numbers. What it started from may have been trained on meanwhile."""
    options = CASES[case](lambda adapter: saved("plain", adapter))
    if getattr(options, "start", None):
        shutil.copytree(options.start, tmp_path / "sft")
        options = options.model_copy(update={"start": str(tmp_path / "sft")})

    def begun() -> Any:
        model = opened(bases["plain"])
        methods.attach(model, options, seed=1)
        methods.method.of(options).begin(model, options, lambda count: list(range(20, 20 + count)))
        methods.hold_start(model, options, file=tmp_path / "start.safetensors")
        return model

    model = begun()
    began = logits(model)
    steps(model, 5)
    if case == "start":
        other = opened(bases["plain"])
        methods.attach(other, Lora(rank=4), seed=3)
        steps(other, 2)
        methods.save_adapter(other, tmp_path / "sft", Lora(rank=4), "")
    again = begun()
    with torch.no_grad():
        for (_, old), (_, new) in zip(methods.trainable(model).items(), methods.trainable(again).items(), strict=True):
            new.copy_(old)
    assert torch.equal(logits(again), logits(model))
    with methods.reference(again):
        assert torch.equal(logits(again), began)
    steps(again, 2)
    with methods.reference(again):
        assert torch.equal(logits(again), began)


def test_a_start_of_another_run_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for rank, said in ((4, None), (3, "is not where this run began")):
        model, options = opened(bases["plain"]), Lora(rank=rank, pissa=True)
        methods.attach(model, options, seed=1)
        if said is None:
            methods.hold_start(model, options, file=tmp_path / "start.safetensors")
        else:
            with pytest.raises(UserError, match=said):
                methods.hold_start(model, options, file=tmp_path / "start.safetensors")

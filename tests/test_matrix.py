"""Every method on every family in every precision: what learns, what is saved and loaded, merged and resumed.

The fast suite runs the few cases that cover the most pairs of values; `make test-all` runs all of them.
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import glmtune
from glmtune import families, methods, plan, run, stages
from glmtune.errors import UserError
from glmtune.options import Options
from glmtune.run import load_run

from . import published, tiny

METHODS = {
    "lora": ["method.rank=2"],
    "dora": ["method.rank=2", "method.dora=true"],
    "pissa": ["method.rank=2", "method.pissa=true"],
    "lora + head": ["method.rank=2", "method.modules_to_save=[lm_head]"],
    "prefix": ["method=prefix", "method.num_virtual_tokens=3"],
    "prefix, projection": ["method=prefix", "method.num_virtual_tokens=3", "method.projection=true"],
    "freeze": ["method=freeze", "method.last=1"],
    "full": ["method=full"],
}
FAMILIES = ["llama", "qwen3", "chatglm-6b", "chatglm3-6b", "glm-4-9b-chat", "baichuan-13b-chat"]  # rotary in three ways, 2D, ALiBi
PRECISIONS = {"fp32": ["precision=fp32"], "bf16": ["precision=bf16"], "nf4": ["precision=bf16", "quant=nf4"]}
Case = tuple[str, str, str]  # method, family, precision
FAST = 14


def trainable(case: Case) -> bool:
    """Weights in 4 bits cannot be trained."""
    return not (case[0] in ("freeze", "full") and case[2] == "nf4")


def pairwise(cases: Sequence[Case], most: int) -> list[Case]:
    """The first `most` cases of a greedy cover: each time the one with the most pairs of values that no case before it has, and among
    those the one whose values were used least."""

    def pairs(case: Case) -> set[tuple[int, str, int, str]]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    chosen, covered, used = [], set(), Counter()
    while len(chosen) < most:
        best = max(cases, key=lambda case: (len(pairs(case) - covered), -sum(used[i, value] for i, value in enumerate(case))))
        if not pairs(best) - covered:
            break
        chosen.append(best)
        covered |= pairs(best)
        used.update(enumerate(best))
    return chosen


ALL: list[Case] = list(itertools.product(METHODS, FAMILIES, PRECISIONS))
SAMPLE = pairwise([case for case in ALL if trainable(case)], FAST)


def test_the_sample_covers_what_it_can() -> None:
    for axis, values in enumerate((METHODS, FAMILIES, PRECISIONS)):
        assert {case[axis] for case in SAMPLE} == set(values)
    whole = pairwise(ALL, len(ALL))
    for i, j in itertools.combinations(range(3), 2):  # going on, every pair of values comes, in not many more cases than it must
        assert {(case[i], case[j]) for case in whole} == {(case[i], case[j]) for case in ALL}
    assert whole[:3] == pairwise(ALL, 3) and len(whole) <= 1.25 * len(METHODS) * len(FAMILIES)


class Watched(Options):
    """Ordinary answers; the model that learns is looked at."""

    kind: Literal["watched"] = "watched"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that a stage from outside was called with."""
    seen: list[Any] = []

    def loss(forward: Any, batch: Any) -> stages.Terms:
        if not seen or seen[-1] is not forward.model:
            seen.append(forward.model)
        return stages.next_token(forward, batch)

    monkeypatch.setitem(run.STAGES, "watched", Watched)
    monkeypatch.setitem(stages.STAGES, "watched", stages.Stage("answers", stages.encode_conversation, loss))
    return seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[str], Path]:
    known = {"llama": tiny_model}

    def make(family: str) -> Path:
        if family not in known:
            known[family] = published.FAMILIES[family](tmp_path_factory.mktemp("models") / family)
        return known[family]

    return make


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.rows(4))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every number of a model, packed ones too."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def named(method: str, model: Any) -> set[str]:
    """The parameters that a method trains, by the names of the untouched model."""
    parameters = dict(model.named_parameters())
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear or hasattr(module, "packed")]
    blocks = [name for name in linear if any(map(str.isdigit, name.split(".")))]
    last = f".{model.config.num_hidden_layers - 1}."
    if method == "full":
        return set(parameters)
    if method == "freeze":
        return {name for name in parameters if last in name}
    if method.startswith("prefix"):
        parts = [
            "embedding.weight",
            *(["trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"] if "," in method else []),
        ]
        return {f"prefix_encoder.{part}" for part in parts}
    found = {f"{name}.lora_{part}" for name in blocks for part in ("A", "B", *(["magnitude"] if method == "dora" else []))}
    head = {
        name for name, parameter in parameters.items() if parameter is model.lm_head.weight
    }  # under the name of what it is tied to
    return found | (head if method == "lora + head" else set())


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("method", "family", "precision"), [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.slow) for case in ALL]
)
def test_trained_saved_loaded_merged_resumed(
    method: str, family: str, precision: str, made: Any, rows_file: Path, tmp_path: Path, learning: list[Any]
) -> None:
    folder, out = made(family), tmp_path / "out"
    given = [f"model={folder}", f"data={rows_file}", f"out={out}", "stage=watched", "samples=[]", "report_to=[]"]
    given += [
        "optim.batch_size=2",
        "optim.steps=2",
        "optim.lr=1e-2",
        "optim.warmup=0",
        "optim.schedule=constant",
        "save.every_steps=1",
    ]
    given += METHODS[method] + PRECISIONS[precision]
    if not trainable((method, family, precision)):
        with pytest.raises(UserError, match="which gradient steps cannot change"):
            load_run(None, given)
        return
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    wanted = load_run(None, given)
    packed = "nf4" if precision == "nf4" else None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = families.load_model(folder, dtype=torch.float32 if method == "full" else dtype, device="cpu", quant=packed)
    expected = named(method, base)
    methods.prepare(base, dtype)
    before = state(base)
    plan_of = plan.make(wanted)
    methods.attach(base, plan_of.method, wanted.seed)
    before = {**state(base), **before}  # what was there must be as it was before `attach` too
    ids = plan_of.examples[0].ids

    # Only the named parameters move, and each of them does.
    glmtune.train(wanted)
    [trained] = learning
    after = state(trained)
    assert set(methods.trainable(trained)) == expected and after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name].float(), before[name].float())} == expected
    numbers = logits(trained, ids)
    assert (numbers - logits(base, ids)).abs().max() > 1e-3

    # What is saved comes back.
    whole = method in ("freeze", "full")
    if whole:
        loaded = families.load_model(out / "model", dtype=torch.float32, device="cpu")
        methods.prepare(loaded, dtype)
    else:
        loaded = glmtune.load(out, dtype=dtype, device="cpu").model
    if method == "pissa":  # PEFT's layout holds it as a change of the untouched weights: another order of sums
        assert (logits(loaded, ids) - numbers).abs().max() <= (2e-5 if dtype == torch.float32 else 0.05)
    else:
        assert torch.equal(logits(loaded, ids), numbers)

    # Merged is unmerged, or refused.
    if method.startswith("prefix") or (packed and not whole):
        with pytest.raises(UserError, match="cannot be merged" if method.startswith("prefix") else "open the model without quant"):
            methods.merge(loaded)
    else:
        exact = loaded if whole or dtype == torch.float32 else glmtune.load(out, dtype="fp32", device="cpu").model
        unmerged = logits(exact, ids)
        methods.merge(exact)
        assert (logits(exact, ids) - unmerged).abs().max() <= 1e-5 and not any("lora" in name for name in state(exact))

    # Resumed from step 1 is the straight run.
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "finished.json").unlink()
    for part in ("checkpoints/step-2", "model" if whole else "adapter"):
        shutil.rmtree(again / part)
    glmtune.train(wanted.model_copy(update={"out": str(again)}), resume=True)
    assert len(learning) == 2 and all(torch.equal(tensor, after[name]) for name, tensor in state(learning[1]).items())
    result = "model/model.safetensors" if whole else "adapter/adapter_model.safetensors"
    assert (again / result).read_bytes() == (out / result).read_bytes()

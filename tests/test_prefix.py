"""P-Tuning v2's laws: the published numbers, one function on every path, files that come back bit for bit, nothing left behind."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from glmtune import families, generate, plan, prefix, training
from glmtune.errors import UserError
from glmtune.layers import RowNoise
from glmtune.run import default_lr, load_run

from . import published, tiny

pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # PEFT's, about our own note in its config
GOLDENS = ["chatglm1", "chatglm1_3layer", "chatglm2", "chatglm3", "glm4"]
FAMILIES = ["chatglm-6b", "chatglm3-6b", "internlm2-chat-7b", "baichuan-7b", "baichuan-13b-chat", "qwen3"]


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    difference = (got - wanted).abs().max().item()
    assert difference <= tolerance, difference


# --- the published numbers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request: pytest.FixtureRequest, shared: Path) -> Any:
    folder = shared / "goldens" / request.param
    if not folder.is_dir():
        pytest.skip("no goldens")
    facts = json.loads((folder / "golden.json").read_text())
    files = [load_file(folder / f"ptuning_proj{kind}.safetensors") for kind in (0, 1)]
    model = families.load_model(folder, dtype="fp32")
    return SimpleNamespace(model=model, tensors=load_file(folder / "golden.safetensors"), facts=facts["ptuning"], files=files)


def called(golden: Any, batch: str) -> tuple[Any, torch.Tensor]:
    """The model's answer to a golden batch, given what the published one was given; and which of its positions count."""
    tensors = golden.tensors
    inputs = {"input_ids": tensors[f"{batch}.input_ids"], "labels": tensors[f"{batch}.labels"]}
    if f"{batch}.attention_mask" in tensors:
        mask = tensors[f"{batch}.attention_mask"]
        inputs |= {"attention_mask": mask.bool() if mask.ndim == 4 else mask, "position_ids": tensors[f"{batch}.position_ids"]}
    valid = tensors.get(f"{batch}.valid", torch.ones_like(inputs["input_ids"])).bool()
    return golden.model(**inputs, use_cache=False), valid


@pytest.fixture(params=[0, 1])
def kind(request: pytest.FixtureRequest, golden: Any) -> Any:
    """0: the embedding alone; 1: with projection. The published prefix is on the model."""
    prefix.from_published(golden.model, golden.files[request.param])
    yield request.param
    golden.model.set_attn_implementation("sdpa")
    prefix.detach(golden.model)


@pytest.mark.few(1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_and_losses_are_the_published_ones(golden: Any, kind: int, attention: str):
    golden.model.set_attn_implementation(attention)  # after the prefix was put on: it must stay on
    for batch, loss in golden.facts[f"ptuning_proj{kind}"]["loss"].items():
        out, valid = called(golden, batch)
        assert out.loss.item() == pytest.approx(loss, abs=1e-5)
        close(out.logits[valid], golden.tensors[f"ptuning_proj{kind}.{batch}.logits"][valid])


@pytest.mark.few(2)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_the_published_ones(golden: Any, kind: int, reentrant: bool | None):
    name, model, encoder = f"ptuning_proj{kind}", golden.model.train(), golden.model.prefix_encoder
    model.requires_grad_(False)
    encoder.requires_grad_(True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    called(golden, "b2_leftpad")[0].loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    norms = golden.facts[name]["grad_norms"]
    assert {prefix.PUBLISHED + n for n, _ in encoder.named_parameters()} == set(norms)
    for n, parameter in encoder.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[prefix.PUBLISHED + n], rel=1e-5), n
    wanted = golden.tensors[f"{name}.b2_leftpad.grad.prefix_embedding_rows0_2"]
    assert (encoder.embedding.weight.grad[:2] - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.slow
def test_greedy_tokens_are_the_published_ones(golden: Any, kind: int):
    """By our own loop and by transformers', from a cache and without one."""
    model, tensors = golden.model, golden.tensors
    ids, new = tensors["gen3_leftpad.input_ids"], tensors[f"ptuning_proj{kind}.gen3_leftpad.new_tokens"]
    mask = (ids != model.config.pad_token_id).long()
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    sampling = generate.Sampling(max_new_tokens=16)
    steps = list(generate._steps(model, rows, (), model.config.pad_token_id, sampling))
    assert torch.equal(torch.tensor(steps).T, new)
    for use_cache in (True, False):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None, use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(out.sequences[:, ids.shape[1] :], new)
        close(torch.stack(out.logits, 1), tensors[f"ptuning_proj{kind}.gen3_leftpad.step_logits"])


@pytest.mark.few(3)
def test_published_tensors_come_back(golden: Any, kind: int):
    made, wanted = prefix.published_tensors(golden.model), golden.files[kind]
    assert made.keys() == wanted.keys() and all(torch.equal(made[n], wanted[n]) for n in wanted)


@pytest.mark.slow
def test_plain_peft_computes_the_published_logits(golden: Any, kind: int, tmp_path: Path):
    """Also greedily: what is saved is what PEFT serves."""
    tensors, config = prefix.peft_tensors(golden.model), prefix.peft_config(golden.model, "base")
    assert config["glmtune"]["plain_peft"] is True
    base = copy.deepcopy(golden.model)
    prefix.detach(base)
    served = in_peft(base, tensors, config, tmp_path)
    ids, valid = golden.tensors["b1_pair.input_ids"], golden.tensors.get("b1_pair.valid")
    logits = served(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    wanted = golden.tensors[f"ptuning_proj{kind}.b1_pair.logits"]
    kept = slice(None) if valid is None else valid.bool()
    close(logits[kept], wanted[kept], 3e-5)
    ids = golden.tensors["gen3_leftpad.input_ids"]
    mask = (ids != base.config.pad_token_id).long()
    out = served.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out[:, ids.shape[1] :], golden.tensors[f"ptuning_proj{kind}.gen3_leftpad.new_tokens"])


def in_peft(base: Any, tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> Any:
    """What plain PEFT makes of a saved prefix."""
    from peft import PeftModel

    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return PeftModel.from_pretrained(base, str(folder))


# --- every family -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, folders: Path) -> Any:
    """A tiny random model of a family, read from its published layout."""
    folder = folders / request.param
    if not folder.exists():
        published.FAMILIES[request.param](folder)
    return families.load_model(folder, dtype="fp32")


SIZES = {
    "vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip


def native(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **changes}}


def rows(model: Any, lengths: tuple[int, ...] = (7, 11, 9)) -> list[list[int]]:
    generator, config, made = torch.Generator().manual_seed(1), model.config, []
    for length in lengths:
        row = torch.randint(20, 200, (length,), generator=generator).tolist()
        if config.model_type == "chatglm1":
            row[3:5] = [config.gmask_token_id, config.bos_token_id]
        made.append(row)
    return made


def padded(items: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, items))
    fill = [[0] * (longest - len(row)) for row in items]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(items, fill)]
    keep = [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p) for r, p in zip(items, fill)]
    return torch.tensor(ids), torch.tensor(keep)


@torch.no_grad()
def logits(model: Any, row: list[int]) -> torch.Tensor:
    return model(torch.tensor([row]), use_cache=False).logits[0]


@torch.no_grad()
def by_cache(model: Any, row: list[int]) -> torch.Tensor:
    """The same function from the outside: the prefix in the model's own cache, positions from 0. ALiBi, whose bias counts columns, gets its
    mask by hand: no bias on the prefix."""
    encoder, ids = prefix.of(model), torch.tensor([row])
    assert encoder is not None
    prefix_pL2hd, count, n = encoder(), encoder.shape.num_virtual_tokens, len(row)
    pairs = [tuple(prefix_pL2hd[:, 2 * i + j].transpose(0, 1)[None] for j in (0, 1)) for i in range(encoder.shape.num_layers)]
    more: dict[str, Any] = {"position_ids": torch.arange(n)[None], "attention_mask": torch.ones(1, count + n, dtype=torch.long)}
    if model.config.model_type == "chatglm1":
        more = {}  # counts from 0 by itself
    if model.config.model_type == "llama_alibi":
        from glmtune.families.alibi import biased

        seen = biased(torch.ones(n, n, dtype=torch.bool).tril()[None, None], model.config.num_attention_heads, 0, torch.float32)
        columns = torch.nn.functional.pad(seen, (count, 0))
        with prefix.disabled(model):
            layers = super(type(model.model), model.model)
            return model.lm_head(
                layers.forward(ids, attention_mask=columns, past_key_values=DynamicCache(pairs)).last_hidden_state
            )[0]
    with prefix.disabled(model):
        return model(ids, past_key_values=DynamicCache(pairs), use_cache=True, **more).logits[0]


@pytest.mark.few(2)
@pytest.mark.parametrize("projection", [False, True])
def test_every_family_equals_its_own_cache(family: Any, projection: bool):
    prefix.attach(family, 5, projection, hidden=24 if projection else None, seed=3)
    for row in rows(family):
        close(logits(family, row), by_cache(family, row), 1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_padded_batch_equals_its_rows(family: Any, side: str, attention: str):
    prefix.attach(family, 4, seed=1)
    family.set_attn_implementation(attention)
    items = rows(family)
    ids, mask = padded(items, side)
    positions = generate._positions(family, ids, mask)
    out = family(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    base = family.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    close(family.get_output_embeddings()(base), out, 1e-6)
    for row, got, keep in zip(items, out, mask.bool()):
        close(got[keep], logits(family, row), 1e-5)


@pytest.mark.few(1)
def test_decoding_from_a_cache_equals_decoding_without(family: Any):
    prefix.attach(family, 4, seed=1)
    items = rows(family)
    sampling = generate.Sampling(max_new_tokens=6)
    cached = torch.tensor(list(generate._steps(family, items, (), 0, sampling))).T.tolist()
    for row, made in zip(items, cached):
        for token in made:
            assert token == int(logits(family, row)[-1].argmax())
            row.append(token)


@pytest.mark.few(2)
def test_off_is_off_bit_for_bit(family: Any):
    row = rows(family)[0]
    before, names = logits(family, row), set(family.state_dict())
    prefix.attach(family, 4, seed=1)
    on = logits(family, row)
    assert (on - before).abs().max() > 1e-2
    with prefix.disabled(family):
        assert torch.equal(logits(family, row), before)
        with prefix.disabled(family):
            pass
        assert torch.equal(logits(family, row), before)
    assert torch.equal(logits(family, row), on)
    prefix.detach(family)
    assert torch.equal(logits(family, row), before)
    assert prefix.of(family) is None and set(family.state_dict()) == names
    assert family.config._attn_implementation == "sdpa"


@pytest.mark.few(2)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(family: Any, reentrant: bool):
    family.requires_grad_(False)
    noisy: Any = prefix.attach(family, 4, True, hidden=16, dropout=0.3, seed=1)
    ids, mask = padded(rows(family), "right")
    noisy.noise.spans = [(10 + i, i, 0, int(keep.sum())) for i, keep in enumerate(mask)]
    gradients = []
    family.train()
    for checkpointed in (False, True):
        if checkpointed:
            family.gradient_checkpointing_enable({"use_reentrant": reentrant})
        noisy.zero_grad()
        loss = family(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].log_softmax(-1)[:, 3].sum()
        noisy.noise.step += 1  # a layer that is computed again must find its own forward's noise
        loss.backward()
        noisy.noise.step -= 1
        gradients.append({name: p.grad.clone() for name, p in noisy.named_parameters()})
    for name, wanted in gradients[0].items():
        assert wanted.norm() > 0
        assert (gradients[1][name] - wanted).norm() <= 1e-5 * wanted.norm(), name


# --- masks, windows, precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_sliding_window_never_slides_past_the_prefix(attention: str):
    """By hand: a mask of the window's columns with the prefix's in front."""
    model = native("mistral", sliding_window=4)
    encoder = prefix.attach(model, 5, seed=1)
    model.set_attn_implementation(attention)
    ids = torch.tensor([rows(model)[1]])
    n = ids.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen = (distance >= 0) & (distance < 4)
    pairs = [tuple(encoder()[:, 2 * i + j].transpose(0, 1)[None] for j in (0, 1)) for i in range(2)]
    mask = torch.zeros(1, 1, n, 5 + n).masked_fill(~torch.nn.functional.pad(seen, (5, 0), value=True), -torch.inf)
    with prefix.disabled(model):
        wanted = model(ids, attention_mask=mask, position_ids=torch.arange(n)[None], past_key_values=DynamicCache(pairs)).logits
    close(model(ids, use_cache=False).logits, wanted, 1e-5)
    cache, steps = DynamicCache(config=model.config), []
    for i in range(n):
        steps.append(model(ids[:, i : i + 1], position_ids=torch.tensor([[i]]), past_key_values=cache, use_cache=True).logits)
    close(torch.cat(steps, 1), wanted, 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_masks_of_four_dimensions_are_widened(attention: str):
    model = native()
    prefix.attach(model, 5, seed=1)
    model.set_attn_implementation(attention)
    ids = torch.tensor([rows(model)[0]])
    wanted = model(ids, use_cache=False).logits
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    close(model(ids, attention_mask=additive, use_cache=False).logits, wanted, 1e-5)
    if attention == "sdpa":
        close(model(ids, attention_mask=seen, use_cache=False).logits, wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prefix_stays_fp32_in_a_half_precision_model(dtype: torch.dtype):
    model = native(dtype=dtype)
    model.requires_grad_(False)
    encoder = prefix.attach(model, 4, True, seed=1)
    model(torch.tensor(rows(model)[:1])).logits.float().log_softmax(-1)[..., 5].sum().backward()
    assert model.lm_head.weight.dtype == dtype
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in encoder.parameters() if p.grad is not None)


@torch.no_grad()
def test_what_is_kept_for_decoding_follows_the_parameters():
    model = native()
    encoder = prefix.attach(model, 4, True, seed=1)
    row = rows(model)[0]
    before = logits(model, row)
    encoder.embedding.weight.add_(0.5)
    moved = logits(model, row)
    assert not torch.equal(moved, before)
    encoder.embedding.weight.data = encoder.embedding.weight.data - 0.5
    close(logits(model, row), before, 1e-5)


# --- dropout ------------------------------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_step_and_row_only():
    model = native().train()
    noise: Any = prefix.attach(model, 4, dropout=0.5, seed=1).noise
    items = rows(model, (8, 8, 8))

    def run(chosen: list[int], step: int = 3, seed: int = 1) -> torch.Tensor:
        noise.seed, noise.step, noise.spans = seed, step, [(row, i, 0, 8) for i, row in enumerate(chosen)]
        with torch.no_grad():
            return model(torch.tensor([items[row] for row in chosen]), use_cache=False).logits

    whole = run([0, 1, 2])
    for i in range(3):
        close(run([i])[0], whole[i], 1e-5)
    close(run([2, 0])[0], whole[2], 1e-5)
    assert (run([0], step=4)[0] - whole[0]).abs().max() > 1e-2
    assert (run([0], seed=2)[0] - whole[0]).abs().max() > 1e-2
    model.eval()
    close(run([0, 1], step=4), run([0, 1], step=9), 0)


def test_dropout_drops_its_share_and_keeps_the_mean():
    encoder = prefix.Encoder(prefix.Shape(50, 1, 4, 16), torch.Generator().manual_seed(0), 0.1)
    pair = torch.ones(2, 3, 4, 50, 16)
    noise = RowNoise(5)
    noise.spans = [(7, 0, 0, 9), (8, 2, 0, 9)]
    scale = prefix.Given(encoder, None, noise)._kept(noise, 0, pair)
    assert torch.equal(scale[:, 1], pair[:, 1])  # no span names it
    dropped = (scale[:, [0, 2]] == 0).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.01)
    assert scale.max().item() == pytest.approx(1 / 0.9)
    assert not torch.equal(scale[:, 0], scale[:, 2])


# --- start --------------------------------------------------------------------------------------------------------------


def test_the_seed_decides_where_a_prefix_starts():
    starts = []
    for seed in (0, 0, 1):
        model = native()
        prefix.attach(model, 64, True, hidden=128, seed=seed)
        starts.append(dict(model.prefix_encoder.named_parameters()))
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    assert not any(torch.equal(starts[0][n], starts[2][n]) for n in starts[0])
    embedding, first = starts[0]["embedding.weight"], starts[0]["trans.0.weight"]
    assert embedding.std().item() == pytest.approx(1, abs=0.05)  # nn.Embedding's start
    assert first.abs().max().item() == pytest.approx(first.shape[1] ** -0.5, rel=0.01)  # nn.Linear's


@pytest.mark.parametrize(
    ("kind", "hidden", "wanted"),
    [
        (
            "chatglm1",
            None,
            {"embedding.weight": (6, 32), "trans.0.weight": (32, 32), "trans.0.bias": (32,), "trans.2.weight": (128, 32)},
        ),
        ("glm", None, {"embedding.weight": (6, 64), "trans.0.weight": (32, 64), "trans.0.bias": (32,), "trans.2.weight": (64, 32)}),
        ("glm", 20, {"embedding.weight": (6, 64), "trans.0.weight": (20, 64), "trans.0.bias": (20,), "trans.2.weight": (64, 20)}),
    ],
)
def test_the_projection_has_the_published_shapes(kind: str, hidden: int | None, wanted: dict[str, tuple[int, ...]]):
    families.register()
    more = {"gmask_token_id": 40, "bos_token_id": 41, "mask_token_id": 42} if kind == "chatglm1" else {}
    model = native(kind, **more)
    encoder = prefix.attach(model, 6, True, hidden)
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    assert shapes == {**wanted, "trans.2.bias": wanted["trans.2.weight"][:1]} == encoder.shape.parameters()


def test_only_the_prefix_gets_gradients_where_the_rest_is_frozen():
    model = native()
    model.requires_grad_(False)
    prefix.attach(model, 4)
    model(torch.tensor(rows(model)[:1])).logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"prefix_encoder.embedding.weight"}


def test_sizes_are_known_without_weights(tiny_model: Path):
    model = families.load_model(tiny_model, device="meta")
    encoder = prefix.attach(model, 6)
    assert encoder.shape == prefix.Shape(6, 2, 2, 8) and encoder.embedding.weight.is_meta


# --- files --------------------------------------------------------------------------------------------------------------

SAME = {
    "llama": lambda: native(),
    "linear": lambda: native(**rope(rope_type="linear", factor=4.0)),
    "llama3": lambda: native(
        **rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    ),
    "yarn": lambda: native(**rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.3)),
    "qwen2": lambda: native("qwen2"),
    "qwen3": lambda: native("qwen3"),
    "glm, half of each head, interleaved": lambda: native("glm"),
    "phi, half of each head": lambda: native("phi", num_key_value_heads=4),
}
OTHER = {
    "dynamic": lambda: native(**rope(rope_type="dynamic", factor=2.0)),
    "sliding": lambda: native("mistral", sliding_window=60),
    "learned positions": lambda: native("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_plain_peft_gives_equal_logits(name: str, tmp_path: Path):
    model = SAME[name]()
    prefix.attach(model, 7, True, hidden=24, seed=2)
    ids = torch.tensor(rows(model, (9, 9)))
    wanted = model(ids, use_cache=False).logits
    greedy = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    made = model.generate(ids, **greedy)
    tensors, config = prefix.peft_tensors(model), prefix.peft_config(model, "base")
    prefix.detach(model)
    assert config["glmtune"] == {"projection": True, "plain_peft": True}
    served = in_peft(model, tensors, config, tmp_path)
    close(served(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted, 1e-5)
    assert torch.equal(served.generate(input_ids=ids, **greedy), made)


@pytest.mark.parametrize("name", OTHER)
def test_where_plain_peft_would_differ_the_file_says_so(name: str, tmp_path: Path):
    model = OTHER[name]()
    prefix.attach(model, 7, seed=2)
    tensors, config = prefix.peft_tensors(model), prefix.peft_config(model, "base")
    assert config["glmtune"]["plain_peft"] is False and "PEFT" in config["glmtune"]["why"]
    if name == "learned positions":  # never the same: nothing there that PEFT could read wrongly
        assert "prompt_embeddings" not in tensors
        prefix.detach(model)
        with pytest.raises(KeyError, match="prompt_embeddings"):
            in_peft(model, tensors, config, tmp_path)


def test_alibi_is_not_for_plain_peft(folders: Path):
    folder = folders / "alibi"
    if not folder.exists():
        published.FAMILIES["baichuan-13b-chat"](folder)
    model = families.load_model(folder, dtype="fp32")
    prefix.attach(model, 7, seed=2)
    assert prefix.peft_config(model, "base")["glmtune"]["plain_peft"] is False
    assert "prompt_embeddings" not in prefix.peft_tensors(model)


@pytest.mark.few(2)
@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_comes_back_bit_for_bit(family: Any, projection: bool, tmp_path: Path):
    prefix.attach(family, 5, projection, seed=2)
    row = rows(family)[0]
    wanted, kept = logits(family, row), {n: p.detach().clone() for n, p in family.prefix_encoder.named_parameters()}
    save_file(prefix.peft_tensors(family), tmp_path / "a.safetensors")
    config = prefix.peft_config(family, "base")
    save_file(prefix.published_tensors(family), tmp_path / "b.safetensors")
    prefix.detach(family)
    for read in (
        lambda: prefix.from_peft(family, load_file(tmp_path / "a.safetensors"), config),
        lambda: prefix.from_published(family, load_file(tmp_path / "b.safetensors")),
    ):
        encoder = read()
        assert torch.equal(logits(family, row), wanted)
        there = dict(encoder.named_parameters())
        assert there.keys() == kept.keys() and all(torch.equal(there[n], kept[n]) for n in kept)
        prefix.detach(family)


@torch.no_grad()
def test_what_plain_peft_trained_is_read(tmp_path: Path):
    from peft import PrefixTuningConfig, get_peft_model

    model = native("glm")
    ids = torch.tensor(rows(model)[:1])
    theirs = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    theirs.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fresh = native("glm")
    prefix.from_peft(fresh, tensors, {})
    close(fresh(ids, use_cache=False).logits, wanted, 1e-5)
    again = prefix.peft_tensors(fresh)["prompt_embeddings"]
    close(again, tensors["prompt_embeddings"], 1e-5)
    learned = native("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    flat = {"prompt_embeddings": torch.randn(6, 2 * 2 * 32)}
    with pytest.raises(UserError, match="trained by plain PEFT"):
        prefix.from_peft(learned, flat, {})
    assert prefix.of(learned) is None


def test_training_goes_on_from_a_saved_prefix():
    """What is on the model already keeps its place, its dropout and its parameters' identity."""
    model, noise = native(), RowNoise(4)
    prefix.attach(model, 4, seed=1)
    tensors, row = prefix.peft_tensors(model), rows(model)[0]
    wanted = logits(model, row)
    prefix.detach(model)
    encoder = prefix.attach(model, 4, dropout=0.2, seed=2, noise=noise)
    parameter = encoder.embedding.weight
    assert prefix.from_peft(model, tensors, {}) is encoder and encoder.noise is noise and encoder.embedding.weight is parameter
    assert parameter.requires_grad and torch.equal(logits(model, row), wanted)
    with pytest.raises(UserError, match=r"other options.*\[4, 64\].*\[5, 64\]"):
        prefix.detach(model)
        prefix.attach(model, 5)
        prefix.from_peft(model, tensors, {})


# --- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bloom", {"n_head": 4}, "do not compute attention through transformers' attention interface"),
        ("mamba", {}, "takes no prefix"),
        ("stablelm", {}, "does not hand keyword arguments down"),
    ],
)
def test_models_that_take_no_prefix_are_refused_and_left_alone(kind: str, changes: dict[str, Any], words: str):
    model = native(kind, **changes)
    row = rows(model)[0]
    before = logits(model, row)
    with pytest.raises(UserError, match=words):
        prefix.attach(model, 4)
    assert torch.equal(logits(model, row), before) and prefix.of(model) is None


def test_nonsense_is_refused():
    model = native()
    with pytest.raises(UserError, match="at least 1"):
        prefix.attach(model, 0)
    with pytest.raises(UserError, match="projection is off"):
        prefix.attach(model, 4, hidden=8)
    with pytest.raises(UserError, match="has no prefix"):
        prefix.peft_tensors(model)
    prefix.attach(model, 4)
    with pytest.raises(UserError, match="has a prefix already"):
        prefix.attach(model, 4)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="sdpa"):
        model(torch.tensor([[5, 6]]))


def test_files_of_other_models_and_things_are_refused():
    small, large = native(), native(num_hidden_layers=3)
    prefix.attach(small, 4, True, hidden=8)
    with pytest.raises(UserError, match=r"trans.2.weight \[64, 8\].*trans.2.weight \[96, 8\]"):
        prefix.from_published(large, {prefix.PUBLISHED + n: p.detach() for n, p in small.prefix_encoder.named_parameters()})
    with pytest.raises(UserError, match=r"made for another model \(theirs\)"):
        prefix.from_peft(large, prefix.peft_tensors(small), prefix.peft_config(small, "theirs"))
    with pytest.raises(UserError, match="the width of the projection"):
        prefix.published_tensors(small)
    with pytest.raises(UserError, match="no published prefix.*lm_head"):
        prefix.from_published(large, {"lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="prompt_embeddings"):
        prefix.from_peft(large, {"x.lora_A.weight": torch.ones(2, 2)}, {})
    with pytest.raises(UserError, match="embedding.weight"):
        prefix.from_published(large, {prefix.PUBLISHED + "trans.0.weight": torch.ones(2, 2)})
    assert prefix.of(large) is None


@pytest.mark.few(2)
def test_a_start_from_words_is_what_the_model_itself_would_keep(family: Any):
    """Of one word: its keys and values in a cache, in every layer; of more: in the first layer each word's own."""
    positions = torch.zeros((1, 2, 1) if family.config.model_type == "chatglm1" else (1, 1), dtype=torch.long)
    kept = []
    for word in (5, 9):
        with torch.no_grad():
            out = family.get_decoder()(input_ids=torch.tensor([[word]]), position_ids=positions, use_cache=True)
        kept.append([(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in out.past_key_values.layers])
    one = prefix.attach(family, 1)
    assert prefix.start_from_words(family, [9])
    for i, (keys, values) in enumerate(kept[1]):
        close(one()[:, 2 * i], keys)
        close(one()[:, 2 * i + 1], values)
    prefix.detach(family)
    three = prefix.attach(family, 3)
    prefix.start_from_words(family, [5, 9])
    for place, which in enumerate((0, 1, 0)):  # too few words come again
        close(three()[place : place + 1, 0], kept[which][0][0])
        close(three()[place : place + 1, 1], kept[which][0][1])
    prefix.detach(family)
    projected = prefix.attach(family, 3, projection=True)
    before = projected().detach().clone()
    assert not prefix.start_from_words(family, [5, 9]) and torch.equal(projected(), before)


def test_projection_has_a_learning_rate_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """At the rate of a plain prefix its loss rises; what was taken is printed, written down, and far from it is warned of."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "the cat?", "output": "a mat"}] * 4)
    common = [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'run'}", "method=prefix", "method.num_virtual_tokens=2"]
    usual = {}
    for projection in ("true", "false"):
        run = load_run(None, [*common, f"method.projection={projection}"])
        usual[projection], name = default_lr(run.method)
        assert f"learning rate {usual[projection]:g}, the default of method {name}" in plan.make(run).notes
    assert usual["true"] <= 3e-4 < usual["false"]
    loud = plan.make(load_run(None, [*common, "method.projection=true", "optim.lr=1e-2"])).notes
    assert any("warning: optim.lr=0.01 is above the usual 0.0001 of method prefix with projection" in note for note in loud)
    run = load_run(None, [*common, "method.projection=true", "optim.steps=1", "samples=[]", "report_to=[]"])
    training.train(run)
    assert load_run(tmp_path / "run" / "run.yaml").resolved["lr"] == usual["true"]

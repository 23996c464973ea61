"""The estimate: its arithmetic by hand, that it knows which path a run takes, and that its advice is right."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from glmtune import estimate, plan, progress, session, settings
from glmtune.errors import UserError
from glmtune.estimate import Setting, Shape
from glmtune.run import load_run

from . import tiny

# 2 layers, d 4, f 6, V 10, q 4 (two heads), k 2 (one). A block: q 16, k 8, v 8, o 16, gate, up, down 24 each = 120 weights.
TINY = Shape(parameters=300, trainable=20, layers=2, hidden=4, inner=6, vocab=10, queries=4, keys=2, linear=240)
LARGE = Shape(
    parameters=6_700_000_000, trainable=20_000_000, layers=32, hidden=4096, inner=11008, vocab=32000, queries=4096, keys=4096,
    linear=6_470_000_000,
)  # fmt: skip
HEAD = 3 * 256 * 10 * 4  # three times 256 rows of 10 fp32 numbers


def setting(method: str = "lora", precision: str = "fp32", **more) -> Setting:
    return Setting(method, precision, **{"tokens": 8, "longest": 8, "learned": 8, "cpu": False, **more})


def test_weights_and_what_learns_by_hand():
    need = estimate.memory(TINY, setting(precision="bf16"))
    assert need["weights"] == 300 * 2 + 20 * 4  # frozen in 16 bits, the adapter in 32
    assert (need["gradients"], need["optimizer"]) == (20 * 4, 20 * 8)
    packed = estimate.memory(TINY, setting(precision="bf16", quant="int8"))
    assert packed["weights"] == 240 * 1 + 60 * 2 + 20 * 4
    whole = estimate.memory(replace(TINY, trainable=300), setting("full", "bf16", optimizer="adafactor"))
    assert (whole["weights"], whole["gradients"], whole["optimizer"]) == (1200, 1200, 30)
    frozen = estimate.memory(replace(TINY, trainable=120), setting("freeze", "bf16", depth=0.5))
    assert frozen["weights"] == 180 * 2 + 120 * 4


@pytest.mark.parametrize(
    "how, layer, passing, more",
    [
        # 8 d + 4 (2 q + 2 k + 2 f)
        (setting(fused=True), 8 * 4 + 4 * (8 + 4 + 12), 4 * (16 + 18), 0),
        (setting(precision="bf16", fused=True), 8 * 4 + 2 * (8 + 4 + 12), 4 * (16 + 18), 0),
        # 4 (2 d + 4 q + 3 f), and 4 (2 d + f) that A reads
        (setting(), 4 * (8 + 16 + 18) + 4 * (8 + 6), 4 * 56, 0),
        (setting(tokens=16), 4 * (8 + 16 + 18) + 4 * (8 + 6) + 4 * 8, 4 * 56, 0),  # two rows: a mask of 8 columns
        (setting(dora=True), 4 * (8 + 16 + 18) + 4 * (8 + 6) + 4 * (8 + 4 + 4 + 12), 4 * 56, 0),
        (setting(dropout=True), 4 * (8 + 16 + 18) + 8 * (20 + 4 + 6), 4 * 56, 0),
        (setting(quant="nf4"), 4 * (8 + 16 + 18) + 4 * (8 + 6), 4 * 56 + 8 * 6, 0),
        (setting("prefix"), 4 * (8 + 16 + 18), 4 * 56, 0),
        (setting("full"), 4 * (8 + 16 + 18) + 4 * 8 + 4 * (8 + 6), 4 * 56, 0),
        (setting("full", "bf16"), 4 * (8 + 16 + 18) + 4 * 8 + 2 * (20 + 4 + 6), 4 * 56, 2 * 240),  # and the cast weights
    ],
)
def test_activations_by_hand(how, layer, passing, more):
    assert estimate.memory(TINY, how)["activations"] == how.tokens * (2 * layer + passing) + HEAD + more


def test_checkpointing_keeps_the_blocks_inputs_and_one_block():
    kept = 2 * 4 * 4 + 4 * (8 + 16 + 18) + 4 * (8 + 6)
    assert estimate.memory(TINY, setting(checkpointing=True))["activations"] == 8 * (kept + 4 * 56) + HEAD


def test_only_the_trained_blocks_keep_anything():
    whole, half = (estimate.memory(TINY, setting("freeze", depth=depth))["activations"] for depth in (1.0, 0.5))
    assert whole - half == 8 * (4 * (8 + 16 + 18) + 4 * 8 + 4 * (8 + 6))


def test_a_cpus_heap_has_a_hole_for_every_tensor_of_a_pass():
    for method in ("lora", "prefix", "freeze", "full"):
        card, cpu = (estimate.memory(TINY, setting(method, cpu=cpu)) for cpu in (False, True))
        made = card.pop("activations") - HEAD
        assert cpu.pop("activations") - HEAD == pytest.approx((1 + estimate.HOLES) * made)
        assert cpu == card
        again = [estimate.memory(TINY, setting(method, cpu=cpu, checkpointing=True))["activations"] for cpu in (False, True)]
        assert again[1] - again[0] == pytest.approx(estimate.HOLES * made)  # what is made again leaves the same holes


def test_large_blocks_are_not_in_the_heap():
    large = setting(tokens=estimate.MAPPED // 24 + 1, longest=8)  # 4 bytes, 6 wide
    assert estimate.memory(TINY, replace(large, cpu=True)) == estimate.memory(TINY, large)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("estimate")
    return tiny.llama(folder / "model"), tiny.write_rows(folder / "rows.jsonl", tiny.rows(4))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["precision=bf16"],
        ["precision=fp16"],
        ["method.share_a=true"],
        ["method.rslora=true"],
        ["method.targets=[q_proj]"],
        ["method.dropout=0.1"],
        ["method.dora=true"],
        ["method.pissa=true"],
        ["method.modules_to_save=[norm]"],
        ["neftune=5"],
        ["checkpointing=true"],
        ["quant=int8"],
        ["method=prefix"],
        ["method=freeze", "method.last=1"],
        ["method=full"],
    ],
)
def test_it_knows_the_path_that_a_run_takes(places, options):
    model, rows = places
    usual = [] if any(option.startswith("precision") for option in options) else ["precision=fp32"]
    run = load_run(
        None, [f"model={model}", f"data={rows}", "out=(none)", "samples=[]", "report_to=[]", "device=cpu", *usual, *options]
    )
    made = plan.make(run)
    chosen = settings.resolve(made)
    taken = session.Session(made, chosen, Path("(none)"), progress.Screen()).forward.path
    assert settings._fused(made, chosen) == (taken == "fused")


def taking(shape: Shape, how: Setting, advice: str) -> tuple[Shape, Setting]:
    """A run that follows the advice, from its words alone."""
    for word in advice.split():
        name, value = word.split("=")
        if name == "method":
            shape, how = replace(shape, trainable=estimate.lora_size(shape)), replace(how, method=value, depth=1.0)
        elif name == "optim":
            how = replace(how, optimizer=value)
        elif name == "optim.micro_tokens":
            how = replace(how, tokens=min(how.tokens, int(value)))
        elif name == "max_length":
            how = replace(how, longest=int(value))
        elif name == "checkpointing":
            how = replace(how, checkpointing=True, fused=False)
        elif name != "too_long":
            assert name in ("precision", "quant")
            how = replace(how, **{name: value})
    if how.method == "lora" and "method=lora" in advice and "optim=" not in advice:
        how = replace(how, optimizer="adamw")
    return shape, how


@pytest.mark.parametrize(
    "method, precision", [("full", "fp32"), ("full", "bf16"), ("freeze", "fp32"), ("lora", "fp32"), ("prefix", "bf16")]
)
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_what_a_refusal_advises_fits(method, precision, tokens):
    trainable = {"full": LARGE.parameters, "freeze": 600_000_000}.get(method, LARGE.trainable)
    shape = replace(LARGE, trainable=trainable)
    how = Setting(
        method,
        precision,
        tokens=tokens,
        longest=2048,
        learned=tokens,
        fused=method == "lora",
        depth=0.1 if method == "freeze" else 1,
    )
    full = sum(estimate.memory(shape, how).values())
    estimate.refuse_memory(shape, how, full, "this machine")  # just enough is enough
    advised = []
    for share in (0.99, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1):
        with pytest.raises(UserError) as refused:
            estimate.refuse_memory(shape, how, full * share, "this machine")
        text = str(refused.value)
        assert "needs about" in text and "this machine has" in text
        found = re.search("this would fit: (.*)", text)
        if found:
            advised.append(found[1])
            assert sum(estimate.memory(*taking(shape, how, found[1])).values()) <= full * share, found[1]
        else:
            assert "smaller model" in text
    assert advised, "at least the mildest shortage can be mended"


def test_nothing_is_advised_where_nothing_fits():
    with pytest.raises(UserError, match="smaller model"):
        estimate.refuse_memory(LARGE, setting(), 1e9, "this machine")


def test_more_memory_never_fits_less():
    rooms = [2e9, 6e9, 8e9, 12e9, 16e9, 24e9, 40e9, 80e9, 200e9]
    tables = [estimate.fitting(LARGE, room) for room in rooms]
    for room, table in zip(rooms, tables, strict=True):
        for row in table:
            assert (row["gb"] * 1e9 <= room * 1.005) == (row["max_length"] is not None)
            assert (row["max_length"] is None) == ("rows at once" not in row)
    for smaller, larger in itertools.pairwise(tables):
        for before, after in zip(smaller, larger, strict=True):
            assert [before[key] for key in ("method", "quant", "checkpointing")] == [
                after[key] for key in ("method", "quant", "checkpointing")
            ]
            tokens = [(row["max_length"] or 0) * row.get("rows at once", 0) for row in (before, after)]
            assert (before["max_length"] or 0) <= (after["max_length"] or 0)
            assert tokens[0] <= tokens[1] or before["max_length"] < after["max_length"]
    for table in tables:  # of the same method, checkpointing and packing never fit less
        length = {(row["method"], row["quant"], row["checkpointing"]): row["max_length"] or 0 for row in table}
        assert length["lora", None, False] <= length["lora", None, True] <= length["lora", "nf4", True]
        assert length["lora", None, False] <= length["lora", "nf4", False] <= length["lora", "nf4", True]


def test_no_row_longer_than_the_model_reads_is_advised():
    assert {row["max_length"] for row in estimate.fitting(LARGE, 900e9, 1000)} == {1000}
    assert {row["max_length"] for row in estimate.fitting(LARGE, 900e9, 100)} == {100}
    assert {row["max_length"] for row in estimate.fitting(LARGE, 900e9)} == {8192}


def test_a_shape_is_read_from_every_familys_config():
    shape = Shape.of({"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3,
                      "intermediate_size": 20, "vocab_size": 30}, 1000, 10)  # fmt: skip
    assert (shape.queries, shape.keys, shape.inner, shape.linear) == (12, 6, 20, 1000 - 240)
    old = Shape.of({"n_embd": 8, "n_layer": 3, "n_head": 2, "padded_vocab_size": 9}, 1000, 10, 500)
    assert (old.hidden, old.layers, old.queries, old.keys, old.inner, old.vocab, old.linear) == (8, 3, 8, 8, 32, 9, 500)

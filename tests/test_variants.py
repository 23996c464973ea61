"""LoRA's variants, freeze and continued adapters: equal to PEFT's, exactly the named parameters learn, what is saved comes back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

import glmtune
from glmtune import batch, families, methods, optimizer, plan, progress, runfolder, stages
from glmtune import run as runs
from glmtune.errors import UserError
from glmtune.options import Options
from glmtune.run import Freeze, Full, Lora, load_run
from glmtune.training import train

from . import published, tiny
from .test_families import quantise
from .test_methods import IDS, logits, prepared


def moved(folder: Path, seed: int = 1, **options: Any) -> Any:
    """A model with an adapter whose every trainable tensor was pushed somewhere."""
    model = prepared(folder)
    methods.attach(model, Lora(**options), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in methods.trainable(model).values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def plain_peft(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval())


VARIANTS = {
    "dora": {"dora": True},
    "rslora": {"rslora": True, "rank": 4},
    "pissa": {"pissa": True, "rank": 4},
    "share_a": {"share_a": True},
    "patterns": {"ranks": {"q_proj": 2, r".*layers\.1\.mlp\..*": 5}, "alphas": {"down_proj": 3.5}},
    "modules": {"modules_to_save": ["norm", "lm_head", "embed_tokens"], "targets": ["q_proj"]},
    "layer norms": {"modules_to_save": ["1.input_layernorm"], "targets": ["q_proj"]},
    "dora, pissa": {"dora": True, "pissa": True, "rank": 4},
    "dora, patterns, share_a": {"dora": True, "ranks": {"down_proj": 2}, "share_a": True},
    "rslora, patterns": {"rslora": True, "ranks": {"v_proj": 2}, "alphas": {"v_proj": 3}},
    "a pattern of names": {"targets": r".*\.(q|k)_proj"},
    "all": {"targets": "all-linear"},
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("variant", "tied"), [*((name, False) for name in VARIANTS), *((name, True) for name in ("modules", "layer norms", "dora"))]
)
def test_plain_peft_loading_and_merging_give_the_same_function(variant: str, tied: bool, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    options = VARIANTS[variant]
    model = moved(base, **options)
    ours = logits(model)
    methods.save_adapter(model, tmp_path / "adapter", Lora(**options), str(base))
    assert (ours - logits(prepared(base))).abs().max() > 0.01
    assert (plain_peft(base, tmp_path / "adapter") - ours).abs().max() <= 2e-5
    again = prepared(base)
    untouched = logits(again)
    assert (logits(methods.load(again, tmp_path / "adapter")) - ours).abs().max() <= (2e-5 if options.get("pissa") else 0)
    with methods.disabled(again):
        assert torch.equal(logits(again), untouched)
    methods.unload(again)
    assert torch.equal(logits(again), untouched)
    methods.merge(model)
    assert (logits(model) - ours).abs().max() <= 2e-5
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.few(3)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "modules" not in name])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_nothing_changes_before_the_first_step(tiny_model: Path, variant: str, compute: torch.dtype) -> None:
    model = prepared(tiny_model, compute)
    before = logits(model)
    methods.attach(model, Lora(**VARIANTS[variant]), seed=0)
    assert (logits(model) - before).abs().max() <= (5e-6 if "pissa" in variant or "dora" in variant else 0)


def test_dora_equals_peft_with_its_gradients(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = moved(tiny_model, dora=True)
    methods.save_adapter(model, tmp_path, Lora(dora=True), str(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    for one in (model, theirs):
        one(IDS).logits.square().mean().backward()
    wanted = {
        n.replace(".default", "").replace("_vector.weight", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad
    }
    for name, parameter in methods.trainable(model).items():
        other = wanted[methods.PREFIX + (name if name.endswith("magnitude") else name + ".weight")]
        torch.testing.assert_close(parameter.grad, other, rtol=2e-4, atol=1e-6)


def test_pissa_starts_from_the_largest_singular_directions(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(tiny_model)
    layer = methods.blocks(model)["model.layers.0.self_attn.q_proj"]
    weight = layer.weight.detach().clone()
    methods.attach(model, Lora(pissa=True, rank=4, alpha=12), seed=0)
    U, S, Vh = torch.linalg.svd(weight)
    torch.testing.assert_close(3 * layer.lora_B @ layer.lora_A, (U[:, :4] * S[:4]) @ Vh[:4])
    monkeypatch.setattr(methods, "EXACT_SVD", 256)
    large = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.01, 300) ** 8
    A, B = methods.principal(large, 8, 2.0, seed=3)
    assert torch.equal(A, methods.principal(large, 8, 2.0, seed=3)[0])
    exact = torch.linalg.svdvals(large)[:8]
    torch.testing.assert_close(torch.linalg.svdvals(2 * B @ A)[:8], exact, rtol=2e-2, atol=0)


def test_dora_adapters_are_merged_in_order(tiny_model: Path, tmp_path: Path) -> None:
    """The lengths of the second one's rows are those of the weights that the first one is in."""
    for seed in (1, 2):
        methods.save_adapter(moved(tiny_model, seed, dora=True), tmp_path / str(seed), Lora(dora=True), str(tiny_model))
    model = prepared(tiny_model)
    for seed in (1, 2):
        apart = logits(methods.load(model, tmp_path / str(seed)))
        methods.merge(model)
        assert (logits(model) - apart).abs().max() <= 2e-5


@pytest.mark.few(1)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_beneath_are_part_of_the_result(dora: bool, tiny_model: Path, tmp_path: Path) -> None:
    methods.save_adapter(moved(tiny_model, seed=1, rank=2), tmp_path / "a", Lora(rank=2), str(tiny_model))
    options = {"rank": 3, "targets": ["v_proj"], "under": [str(tmp_path / "a")], "dora": dora}
    fresh = prepared(tiny_model)
    methods.attach(fresh, Lora(**options), seed=0)
    torch.testing.assert_close(logits(fresh), logits(methods.load(prepared(tiny_model), tmp_path / "a")))
    assert {name.split(".")[-2] for name in methods.trainable(fresh)} == {"v_proj"}
    model = moved(tiny_model, seed=2, **options)
    methods.save_adapter(model, tmp_path / "b", Lora(**options), str(tiny_model))
    for other in (logits(methods.load(prepared(tiny_model), tmp_path / "b")), plain_peft(tiny_model, tmp_path / "b")):
        torch.testing.assert_close(other, logits(model))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"last": 1}, {11}),
        ({"first": 2}, {0, 1}),
        ({"layers": [1]}, {1}),
        ({"layers": [-1, 0]}, {0, 11}),
        ({}, {9, 10, 11}),
        ({"last": 1, "modules": "mlp"}, {11}),
        ({"first": 1, "modules": "attention"}, {0}),
    ],
)
def test_freeze_trains_exactly_these_blocks(tmp_path: Path, options: dict, wanted: set) -> None:
    """Twelve blocks: number 1 must not take 10 and 11 with it."""
    model = prepared(tiny.llama(tmp_path / "deep", num_hidden_layers=12), torch.bfloat16)
    methods.attach(model, Freeze(**options), seed=0)
    names = set(methods.trainable(model))
    assert {int(name.split(".")[2]) for name in names} == wanted
    part = {"mlp": "mlp", "attention": "self_attn"}.get(options.get("modules", ""), "")
    assert names == {n for n, _ in model.named_parameters() if any(f"layers.{i}.{part}" in n for i in wanted)}
    assert all(p.dtype == torch.float32 for p in methods.trainable(model).values())
    model(IDS).logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names


def test_freeze_takes_modules_outside_the_blocks(tiny_model: Path) -> None:
    model = prepared(tiny_model)
    methods.attach(model, Freeze(layers=[], others=["norm", "lm_head"]), seed=0)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert set(methods.trainable(model)) == {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Freeze(last=3), "method.last=3, but this model has 2 blocks"),
        (Freeze(layers=[2]), "block 2; this model has 2 blocks, 0 to 1"),
        (Freeze(layers=[0], others=["nrom"]), "did you mean 'norm'"),
        (Freeze(layers=[]), "told to train no block"),
        (Lora(modules_to_save=["lm_haed"]), "did you mean 'lm_head'"),
        (Lora(ranks={"q_porj": 2}), "did you mean 'q_proj'"),
        (Lora(under=["nowhere"]), "there is no adapter nowhere"),
    ],
)
def test_what_a_model_does_not_have_is_told(tiny_model: Path, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        methods.attach(prepared(tiny_model), options, seed=0)


# --- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.rows(8))


RUNS = {
    "dora": ["method.dora=true"],
    "pissa": ["method.pissa=true", "method.rank=4"],
    "lora+": ["method.lr_ratio=16", "optim.weight_decay=0.1"],
    "modules": ["method.modules_to_save=[lm_head,norm]", "method.rank=2"],
    "patterns": ["method.ranks={q_proj: 2}", "method.alphas={v_proj: 4}"],
    "neftune, dropout": ["neftune=5", "method.dropout=0.2"],
    "checkpointing": ["checkpointing=true"],
    "freeze": ["method=freeze", "method.last=1"],
    "freeze bf16": ["method=freeze", "method.last=1", "precision=bf16"],
    "adafactor": ["optim=adafactor"],
    "8 bits, nf4": ["optim=adamw8bit", "method.rank=64", "quant=nf4"],
    "chatglm-int4": ["quant=chatglm-int4"],
    "fp16, growing scale": ["precision=fp16"],
    "bf16": ["precision=bf16"],
    "full fp16": ["method=full", "precision=fp16"],
    "prefix": ["method=prefix", "method.num_virtual_tokens=4"],
    "prefix, projection": ["method=prefix", "method.num_virtual_tokens=4", "method.projection=true", "method.dropout=0.1"],
}


def arguments(model: Path, data: Path, out: Path, options: list[str]) -> list[str]:
    given = [
        f"model={model}",
        f"data={data}",
        f"out={out}",
        "samples=[]",
        "report_to=[]",
        "optim.batch_size=4",
        "optim.steps=4",
        "save.every_steps=2",
    ]
    return [*given, "optim.warmup=0", "optim.lr=1e-3", *options]


def started(model: Path, data: Path, out: Path, options: list[str]) -> Any:
    return load_run(None, arguments(model, data, out, options))


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {
        k: v
        for path in sorted(out.rglob("adapter/*.safetensors")) + sorted(out.rglob("model/*.safetensors"))
        for k, v in load_file(path).items()
    }


def log_of(out: Path) -> list[dict[str, Any]]:
    """Its lines without what a clock tells."""
    timed = ("tokens_per_second", "seconds", "peak_memory_gb")
    return [{k: v for k, v in row.items() if k not in timed} for row in runfolder.read_jsonl(out / "log.jsonl")]


def resumed(run: Any, out: Path, step: int) -> Path:
    """Goes on in `out` from a checkpoint of a run that is finished."""
    shutil.copytree(run.out, out)
    (out / "finished.json").unlink()
    gone = [p for p in (out / "checkpoints").glob("step-*") if int(p.name[5:]) > step]
    for path in [*gone, *(out / name for name in ("adapter", "model"))]:
        shutil.rmtree(path, ignore_errors=True)
    train(run.model_copy(update={"out": str(out)}), resume=True)
    return out


QUICK = ("modules", "neftune, dropout", "8 bits", "fp16", "prefix, projection")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS])
def test_a_resumed_run_is_the_straight_run_and_is_counted_right(
    name: str, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "8 bits" in name or "nf4" in name:
        pytest.importorskip("bitsandbytes")
    if "growing" in name:
        monkeypatch.setattr(optimizer, "GROWTH", 1)
    base = published.glm(tmp_path / "chatglm3", "THUDM/chatglm3-6b") if "chatglm" in name else tiny_model
    run = started(base, rows_file, tmp_path / "straight", RUNS[name])
    train(run)
    log = log_of(tmp_path / "straight")
    if "prefix" not in name:  # which starts at random and learns less in four steps than rows differ
        assert log[2]["loss"] + log[3]["loss"] < log[0]["loss"] + log[1]["loss"]  # two steps an epoch
    assert "growing" not in name or [row["scale"] for row in log] == [2.0**16, 2.0**17, 2.0**18, 2.0**19]
    resumed(run, tmp_path / "resumed", 2)
    straight, again = tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "resumed")
    assert straight.keys() == again.keys() and straight
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    assert log_of(tmp_path / "resumed") == log
    if (held := tmp_path / "straight/checkpoints/step-4/trained.safetensors").is_file():
        assert plan.make(run).shape.trainable == sum(tensor.numel() for tensor in load_file(held).values())


@pytest.mark.slow
def test_evaluating_an_nf4_run_changes_nothing(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for name, more in (("never", []), ("always", ["eval.every_steps=1", f"eval.data={rows_file}"])):
        train(started(tiny_model, rows_file, tmp_path / name, ["quant=nf4", "precision=bf16", *more]))
    never, always = (tensors_of(tmp_path / name) for name in ("never", "always"))
    assert never and all(torch.equal(never[key], always[key]) for key in never)
    losses = [row["eval_loss"] for row in log_of(tmp_path / "always")]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefix, projection", "freeze"])
def test_the_dev_loss_is_that_of_what_was_learned_so_far(name: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Not of where it began: a prefix is kept between forwards without gradients, and a fused optimizer changes it unnoticed."""
    more = [*RUNS[name], "method.dropout=0" if "prefix" in name else "method.last=2", "optim.lr=1e-2", "precision=fp32"]
    train(started(tiny_model, rows_file, tmp_path / "out", [*more, f"eval.data={rows_file}", "eval.every_steps=1"]))
    told = [row["eval_loss"] for row in log_of(tmp_path / "out")]
    assert told[-1] < told[0]
    made = plan.make(load_run(tmp_path / "out/run.yaml"))
    loaded = glmtune.load(tmp_path / "out", dtype="fp32", device="cpu")
    total, count = 0.0, 0
    for example in made.dev or ():
        learned = [i for i, weight in enumerate(example.weights) if weight]
        with torch.no_grad():
            chance = loaded.model(torch.tensor([example.ids]), use_cache=False).logits[0].log_softmax(-1)
        total -= sum(chance[i, example.next_ids[i]].item() for i in learned)
        count += len(learned)
    assert told[-1] == pytest.approx(total / count, rel=1e-4)


class Tight(Options):
    """Ordinary answers on a device of little memory."""

    kind: Literal["tight"] = "tight"


def tight(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    """A stage from outside that has no memory for a micro-batch where `full(its tokens)` says so."""

    def loss(forward: Any, micro: batch.Batch) -> stages.Terms:
        if full(micro.num_tokens):
            raise torch.OutOfMemoryError("out of memory")
        return stages.next_token(forward, micro)

    monkeypatch.setitem(runs.STAGES, "tight", Tight)
    monkeypatch.setitem(stages.STAGES, "tight", stages.Stage("answers", stages.encode_conversation, loss))


@pytest.mark.few(1)
@pytest.mark.parametrize("when", ["always", "in the middle of a step"])
def test_a_step_without_room_is_done_again_in_smaller_parts(
    when: str, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as smaller parts from the start, bit for bit; and a resumed run knows it from the checkpoint."""
    sizes: list[int] = []
    said: list[str] = []

    class Listen(progress.Screen):
        def say(self, text: Any) -> None:
            said.append(str(text))

    def full(tokens: int) -> bool:
        sizes.append(tokens)
        return tokens > 128 if when == "always" else len(sizes) == 2  # the gradient of its first part is there already

    tight(monkeypatch, full)
    run = started(
        tiny_model, rows_file, tmp_path / "tight", ["stage=tight", f"optim.micro_tokens={512 if when == 'always' else 128}"]
    )
    longest = plan.make(run).longest
    assert longest < 128 < 4 * longest
    train(run, screen=Listen())
    told = [line for line in said if "no room" in line]
    assert [line.rsplit("=", 1)[1] for line in told] == (["256", "128"] if when == "always" else ["64"])
    log = log_of(tmp_path / "tight")
    tight(monkeypatch, lambda tokens: False)
    train(
        small := started(
            tiny_model, rows_file, tmp_path / "small", ["stage=tight", f"optim.micro_tokens={told[-1].rsplit('=', 1)[1]}"]
        )
    )
    assert log_of(Path(small.out)) == log
    again = resumed(run, tmp_path / "resumed", 2)
    assert log_of(again) == log
    made = [tensors_of(out) for out in (tmp_path / "tight", tmp_path / "small", again)]
    assert all(torch.equal(made[0][key], other[key]) for other in made[1:] for key in made[0])


@pytest.mark.slow
def test_an_evaluation_without_room_is_done_again_in_smaller_parts(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for name, most in (("tight", 128), ("roomy", 10**6)):
        tight(monkeypatch, lambda tokens, most=most: tokens > most and not torch.is_grad_enabled())
        more = ["stage=tight", "optim.micro_tokens=512", "eval.share=0.5", "precision=fp32"]
        losses.append(train(started(tiny_model, rows_file, tmp_path / name, more)).dev_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_row_that_has_no_room_alone_is_an_error_for_people(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tiny_model, rows_file, tmp_path / "out", [])
    longest = plan.make(run).longest
    tight(monkeypatch, lambda tokens: tokens >= longest)
    run = started(tiny_model, rows_file, tmp_path / "out", ["stage=tight"])
    with pytest.raises(UserError, match=f"no room for the longest row, {longest} tokens, alone; try checkpointing=true"):
        train(run)


SAVED = {"prefix": RUNS["prefix, projection"], "freeze": RUNS["freeze"], "full": ["method=full"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVED)
def test_no_room_while_saving_keeps_the_last_good_checkpoint(
    kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = methods.write_tensors

    def full(tensors: dict[str, torch.Tensor], path: Path, *base: str) -> None:
        if ".part-4" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        written(tensors, path, *base)

    run = started(tiny_model, rows_file, tmp_path / "out", SAVED[kind])
    with monkeypatch.context() as patch:
        patch.setattr(methods, "write_tensors", full)
        with pytest.raises(UserError, match=r"no room left.*step-2.*--resume"):
            train(run)
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-2"]
    changed = "method.num_virtual_tokens=5" if kind == "prefix" else "optim.lr=3e-3"
    name, there = ("method.num_virtual_tokens", "4 there, 5 now") if kind == "prefix" else ("optim.lr", "0.001 there, 0.003 now")
    with pytest.raises(UserError, match=rf"{name} \({there}\)"):
        train(started(tiny_model, rows_file, tmp_path / "out", [*SAVED[kind], changed]), resume=True)
    train(run, resume=True)
    train(straight := run.model_copy(update={"out": str(tmp_path / "straight")}))
    one, two = tensors_of(Path(run.out)), tensors_of(Path(straight.out))
    assert one and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["freeze", "full"])
def test_whole_models_are_kept_as_adapters_are(kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """The last ones and the best one, which is complete and opens by itself."""
    other = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"zq #{i} 再见"}]} for i in range(4)]
    dev = tiny.write_rows(tmp_path / "dev.jsonl", other)  # what these rows say gets less likely with each step
    more = [
        "save.every_steps=1",
        "save.keep=1",
        "eval.every_steps=1",
        f"eval.data={dev}",
        "optim.lr=0.1",
        "optim.schedule=constant",
    ]
    report = train(started(tiny_model, rows_file, tmp_path / "out", [*SAVED[kind], *more]))
    losses = {row["step"]: row["eval_loss"] for row in log_of(tmp_path / "out")}
    assert report.best_step == min(losses, key=losses.__getitem__) != 4
    kept = sorted((tmp_path / "out/checkpoints").iterdir())
    assert [p.name for p in kept] == [f"step-{report.best_step}", "step-4"]
    best, last = (families.load_model(path, dtype="fp32", device="cpu").state_dict() for path in kept)
    final = families.load_model(tmp_path / "out/model", dtype="fp32", device="cpu").state_dict()
    assert all(torch.equal(last[key], final[key]) for key in final) and any(not torch.equal(best[key], final[key]) for key in final)


KILLED = """
import os, signal, sys
import glmtune
from glmtune.run import load_run
from glmtune.training import train

synced, left = os.fsync, int(sys.argv[1])
def fsync(handle):
    global left
    left -= "/.part-" in os.readlink(f"/proc/self/fd/{handle}")
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    synced(handle)
os.fsync = fsync
train(load_run(None, sys.argv[2:]), resume=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which file is synced is asked of Linux")
@pytest.mark.parametrize("kind", SAVED)
def test_killed_while_saving_and_resumed_is_bit_identical(kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """kill -9 while a file of the second checkpoint is on its way to the disk, three times."""
    given = lambda out: arguments(tiny_model, rows_file, tmp_path / out, SAVED[kind])  # noqa: E731
    train(load_run(None, given("straight")))
    for synced in (8, 3, 5):
        process = subprocess.run(
            [sys.executable, "-c", KILLED, str(synced), *given("killed")], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert process.returncode == -9
        assert list((tmp_path / "killed").glob("checkpoints/.part-*"))
    train(load_run(None, given("killed")), resume=True)
    one, two = tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "killed")
    assert one and all(torch.equal(one[key], two[key]) for key in one)
    assert not list(tmp_path.rglob(".part*"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_published_packed_is_trained_and_used_so(bits: int, rows_file: Path, tmp_path: Path) -> None:
    base = published.glm(tmp_path / f"chatglm3-6b-int{bits}", "THUDM/chatglm3-6b")
    save_file(quantise(load_file(base / "model.safetensors"), bits), base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    kind = f"chatglm-int{bits}"
    for method in ("full", "freeze"):
        with pytest.raises(UserError, match=f"is published in {kind}, which gradient steps cannot change, and method={method}"):
            train(started(base, rows_file, tmp_path / "refused", [f"method={method}"]))
    assert not (tmp_path / "refused").exists()
    for name in ("lora", "prefix"):
        more = ["method.rank=2"] if name == "lora" else RUNS["prefix"]
        report = train(started(base, rows_file, tmp_path / name, [*more, "optim.steps=2", "precision=fp32"]))
        assert report.steps == 2
        packed = glmtune.load(tmp_path / name, dtype="fp32", device="cpu")
        dense = glmtune.load(tmp_path / name, dtype="fp32", device="cpu", quant="none")
        for loaded, wanted in ((packed, {kind}), (dense, {None})):
            assert {layer.packed and layer.packed.kind for layer in methods.blocks(loaded.model).values()} == wanted
        torch.testing.assert_close(logits(packed.model), logits(dense.model), rtol=0, atol=1e-4)
        assert (logits(packed.model) - logits(methods.unload(dense.model) or dense.model)).abs().max() > 1e-3
        assert isinstance(packed.chat("Where is the cat?", max_new_tokens=2), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    tiny.slow_but(
        ["neftune, dropout", "dora"], ["neftune, dropout", "dora", "prefix, projection", "freeze", "fp16, growing scale"]
    ),
)
def test_the_cut_into_micro_batches_changes_nothing(name: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    made = []
    for micro in (40, 4000):
        run = started(tiny_model, rows_file, tmp_path / str(micro), [*RUNS[name], f"optim.micro_tokens={micro}"])
        train(run)
        made.append(tensors_of(tmp_path / str(micro)))
    for key in made[0]:
        # On average: where a gradient is nearly nothing, Adam's first steps follow its rounding.
        assert (made[0][key] - made[1][key]).abs().mean() <= (1e-4 if "fp16" in name else 3e-5)  # of steps of 1e-3


def test_a_run_goes_on_from_an_adapter(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    first = started(tiny_model, rows_file, tmp_path / "first", ["method.rank=3", "method.targets=[q_proj]", "method.dora=true"])
    train(first)
    second = started(tiny_model, rows_file, tmp_path / "second", [f"method.start={tmp_path / 'first'}", "optim.lr=1e-12"])
    train(second)
    one, two = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match=r"has rank 3, this run says 8; leave method\.rank out"):
        train(started(tiny_model, rows_file, tmp_path / "third", [f"method.start={tmp_path / 'first'}", "method.rank=8"]))
    with pytest.raises(UserError, match="is neither an adapter nor a finished run"):
        train(started(tiny_model, rows_file, tmp_path / "third", ["method.start=nowhere"]))
    with pytest.raises(UserError, match="holds a lora adapter"):
        train(started(tiny_model, rows_file, tmp_path / "third", ["method=prefix", f"method.start={tmp_path / 'first'}"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_run_that_goes_on_from_an_adapter_is_resumed_by_its_run_file(
    kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    size = {"lora": "method.rank=3", "prefix": "method.num_virtual_tokens=5"}[kind]
    train(started(tiny_model, rows_file, tmp_path / "first", [f"method={kind}", size, "optim.steps=1"]))
    given = [f"method={kind}", f"method.start={tmp_path / 'first'}", "optim.steps=4", "save.every_steps=2"]
    train(started(tiny_model, rows_file, tmp_path / "second", given))
    straight = tensors_of(tmp_path / "second")
    (tmp_path / "second" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "second" / "adapter")
    shutil.rmtree(max((tmp_path / "second" / "checkpoints").iterdir()))
    train(load_run(tmp_path / "second" / "run.yaml", []), resume=True)
    again = tensors_of(tmp_path / "second")
    assert all(torch.equal(straight[key], again[key]) for key in straight)


@pytest.mark.slow
def test_going_on_keeps_the_function_of_any_adapter_of_peft(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Patterns that overlap (the first counts), regular expressions, layers named by number."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def made(name: str, config: Any) -> None:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
        model.save_pretrained(tmp_path / name)

    common = dict(init_lora_weights=False, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    made("overlap", LoraConfig(**common, alpha_pattern={"layers.1.self_attn.q_proj": 100, "q_proj": 4}))
    made("pattern", LoraConfig(**common, rank_pattern={r"layers\.0\..*q_proj": 2}))
    made("some layers", LoraConfig(**common, layers_to_transform=[1]))
    made("without", LoraConfig(**common, exclude_modules=["model.layers.0.mlp.up_proj"]))
    made("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    for name in ("overlap", "pattern", "some layers", "without", "prefix"):
        kind = "prefix" if name == "prefix" else "lora"
        given = [f"method={kind}", f"method.start={tmp_path / name}", "optim.steps=1", "optim.lr=1e-12", "precision=fp32"]
        train(started(tiny_model, rows_file, tmp_path / f"{name} on", given))
        before, after = (
            glmtune.load(tiny_model, adapter=tmp_path / one, dtype="fp32", device="cpu").model for one in (name, f"{name} on")
        )
        torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_freeze_trains_the_head_too(tied: bool, rows_file: Path, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    train(
        started(
            base,
            rows_file,
            tmp_path / "out",
            ["method=freeze", "method.last=1", "method.others=[lm_head]", "optim.steps=1", "precision=fp32"],
        )
    )
    before, after = (families.load_model(folder, dtype=torch.float32).state_dict() for folder in (base, tmp_path / "out" / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        "lm_head.weight" in moved
        and ("model.embed_tokens.weight" in moved) is tied
        and not any("layers.0" in name for name in moved)
    )


def test_published_names_have_ranks_too(tmp_path: Path, rows_file: Path) -> None:
    base = published.glm(tmp_path / "chatglm3-6b", "THUDM/chatglm3-6b")
    made = plan.make(
        started(base, rows_file, tmp_path / "out", ["method.ranks={query_key_value: 4}", "method.alphas={dense_h_to_4h: 3}"])
    )
    sizes = families.lora_sizes(made.method, made.method.targets)
    assert {name.split(".")[-1]: size for name, size in sizes.items() if size != (8, 16)} == {
        "q_proj": (4, 16), "k_proj": (4, 16), "v_proj": (4, 16), "gate_up_proj": (8, 3)
    }  # fmt: skip


@pytest.mark.parametrize(("more", "told"), [("method.ranks={q_proj: 4}", "so they need one rank"), ("", None)])
def test_one_a_for_layers_of_several_ranks_is_refused(
    more: str, told: str | None, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = started(tiny_model, rows_file, tmp_path / "out", ["method.share_a=true", *([more] if more else [])])
    if told is None:
        plan.make(run)
        return
    with pytest.raises(UserError, match=told):
        plan.make(run)


def test_fp16_leaves_out_a_step_that_overflows_and_goes_on(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    run = started(tiny_model, rows_file, tmp_path / "out", ["precision=fp16", "method.targets=[q_proj]"])
    state = runfolder.State(scale=2.0**60)
    usual, runfolder.State = runfolder.State, lambda: state
    try:
        train(run)
    finally:
        runfolder.State = usual
    log = log_of(tmp_path / "out")
    assert log[0]["skipped"] and log[1]["scale"] == log[0]["scale"] / 2
    assert optimizer.LEAST < state.scale < 2.0**60


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_trained_weights_in_a_quantised_base_are_refused(kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"which gradient steps cannot change, and method={kind} trains them"):
        started(tiny_model, rows_file, tmp_path / "out", [f"method={kind}", "quant=nf4"])


def test_full_tuning_is_refused_on_packed_layers_too(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = families.load_model(tiny_model, dtype=torch.float32, quant="nf4")
    methods.prepare(model, torch.float32)
    for options in (Full(), Freeze(last=1)):
        with pytest.raises(UserError, match="kept in nf4"):
            methods.attach(model, options, 0)


# --- in use -------------------------------------------------------------------------------------------------------------


def test_adapters_are_switched_at_run_time(tiny_model: Path, tmp_path: Path) -> None:
    import glmtune

    methods.save_adapter(moved(tiny_model, seed=1, rank=2), tmp_path / "a", Lora(rank=2), str(tiny_model))
    whole = Lora(rank=3, modules_to_save=["norm"])
    methods.save_adapter(moved(tiny_model, seed=2, rank=3, modules_to_save=["norm"]), tmp_path / "b", whole, str(tiny_model))
    loaded = glmtune.load(tiny_model, dtype="fp32", device="cpu")
    base = logits(loaded.model)
    alone = {name: logits(glmtune.load(tiny_model, adapter=tmp_path / name, dtype="fp32", device="cpu").model) for name in "ab"}
    for name in ("a", "b", "b", "a"):
        assert torch.equal(logits(loaded.use(tmp_path / name).model), alone[name])
    assert torch.equal(logits(loaded.use(None).model), base)


@pytest.mark.slow
def test_an_adapter_without_effect_is_told(tiny_model: Path, tmp_path: Path) -> None:
    import glmtune
    from glmtune.export import export

    model = prepared(tiny_model)
    methods.attach(model, Lora(rank=2), seed=0)
    methods.save_adapter(model, tmp_path / "a", Lora(rank=2), str(tiny_model))
    said: list[str] = []
    glmtune.load(tiny_model, adapter=tmp_path / "a", say=said.append)
    assert "changes nothing" in said[-1]
    export(tiny_model, tmp_path / "out", adapter=tmp_path / "a", say=said.append)
    assert "this adapter changes nothing" in "\n".join(said)


@pytest.mark.few(1)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_merge_tells_how_much_of_the_effect_is_left(tiny_model: Path, tmp_path: Path, rounding: str) -> None:
    """An update far below bf16's steps is lost by rounding to the nearest, and kept on average by rounding at random."""
    from glmtune.export import export

    left = {}
    for size in (1e-4, 1.0):
        model = moved(tiny_model, rank=2)
        with torch.no_grad():
            for name, parameter in methods.trainable(model).items():
                parameter *= size if name.endswith("lora_B") else 1
        methods.save_adapter(model, tmp_path / f"a{size}", Lora(rank=2), str(tiny_model))
        said: list[str] = []
        to = tmp_path / f"{rounding}{size}"
        export(tiny_model, to, adapter=tmp_path / f"a{size}", dtype="bf16", rounding=rounding, say=said.append)
        text = "\n".join(said)
        left[size] = float(text.split("merged: ")[1].split("%")[0])
        assert ("was rounded away" in text) == (left[size] < 99)
    assert left[1.0] > 97
    assert left[1e-4] < 50 or rounding == "stochastic"


def test_stochastic_rounding_is_right_on_average() -> None:
    from glmtune.merging import stochastic

    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([1.0, 1.001, -1.003, 0.3, -2e-5, 0.0]).repeat(20_000, 1)
    for dtype in (torch.bfloat16, torch.float16):
        made = stochastic(weight, dtype, generator)
        near = weight[0].to(dtype)
        assert set(made[:, 0].tolist()) == {1.0} and made[:, 5].abs().max() == 0
        step = (torch.nextafter(near, torch.full_like(near, 9)).float() - near.float()).abs()
        assert ((made.float().mean(0) - weight[0]).abs() <= 0.02 * step + 1e-9).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["method.modules_to_save=[lm_haed]"], "did you mean 'lm_head'"),
        (["method.under=[nowhere]"], "method.under: nowhere is neither an adapter nor a finished run"),
        (["method.pissa=true", "method.share_a=true"], "share_a gives q, k and v one A; give one"),
    ],
)
def test_show_refuses_what_train_would(tiny_model: Path, rows_file: Path, tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan.make(started(tiny_model, rows_file, tmp_path / "out", options))

"""Extension from outside: a row form, a method, a stage with a metric and a family, each by a line in a plain dict; then a few steps are trained."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glmtune
from glmtune import estimate, export, families, forms, method, methods, plan, predict, run, settings, stages
from glmtune.errors import UserError
from glmtune.families.family import Family, Take, places
from glmtune.generate import Sampling
from glmtune.method import Method
from glmtune.options import Options
from glmtune.records import Column, Conversation, Turn
from glmtune.run import load_run
from glmtune.runfolder import read_jsonl
from glmtune.training import train

from . import tiny


class NormsOnly(Options):
    """Trains the norms."""

    kind: Literal["norms"] = "norms"
    trains_base: ClassVar[bool] = True


def attach_norms(model: Any, options: NormsOnly, seed: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)


NORMS = Method(attach_norms)  # what is saved is a whole model


class Scales(Options):
    """Trains a factor for each number that an attention gives out."""

    kind: Literal["scales"] = "scales"
    first: float = 1.0
    start: str | None = None


def attach_scales(model: Any, options: Scales, seed: int) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.learned_scale = nn.Parameter(torch.full((model.config.hidden_size,), options.first))
        attention.scaled = attention.register_forward_hook(lambda module, _, out: (out[0] * module.learned_scale, *out[1:]))


def unload_scales(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "scaled"):
            layer.self_attn.scaled.remove()
            del layer.self_attn.learned_scale, layer.self_attn.scaled


def save_scales(model: Any, folder: Path, options: Scales, base: str, fingerprint: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("learned_scale")}
    save_file(found, folder / "scales.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SCALES", "base_model_name_or_path": base}))


def load_scales(model: Any, folder: Path) -> None:
    found = load_file(folder / "scales.safetensors")
    methods.unload(model)
    attach_scales(model, Scales(), 0)
    for name, tensor in found.items():
        model.get_parameter(name).data = tensor


def begin_scales(model: Any, options: Scales, first_ids: Any) -> None:
    if options.start:
        for name, tensor in load_file(Path(options.start) / "adapter" / "scales.safetensors").items():
            model.get_parameter(name).data.copy_(tensor)


SCALES = Method(
    attach_scales,
    begin=begin_scales,
    resolve=lambda options, run, folder: method.continued(options, run, folder),
    options_of=lambda folder: {},
    describe=lambda options: f"a factor for each number, {options.first} at first",
    adapter=True,
    save=save_scales,
    load=load_scales,
    unload=unload_scales,
    peft_type="SCALES",
)


def from_qa(row, join="\n", columns=None):
    return Conversation((Turn("user", row["frage"]), Turn("assistant", row["antwort"])))


def test_a_new_format_method_and_stage(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(forms.FORMATS, "qa", from_qa)
    monkeypatch.setitem(run.METHODS, "norms", NormsOnly)
    monkeypatch.setitem(run.DEFAULT_LR, (None, "norms"), 1e-2)
    monkeypatch.setitem(method.METHODS, "norms", NORMS)
    doubled = stages.Stage(
        "answers", stages.encode_conversation, lambda forward, batch: stages.Terms({"nll": 2 * forward.nll(batch)})
    )

    class Doubled(Options):
        kind: Literal["doubled"] = "doubled"

    monkeypatch.setitem(run.STAGES, "doubled", Doubled)
    monkeypatch.setitem(stages.STAGES, "doubled", doubled)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"frage": "the cat?", "antwort": "a mat"}] * 4)
    common = [
        f"model={tiny_model}",
        f"data=[{{path: {rows}, format: qa}}]",
        "optim.steps=2",
        "samples=[]",
        "report_to=[]",
        "precision=fp32",
    ]
    train(load_run(None, [*common, f"out={tmp_path / 'a'}", "method=norms"]))
    train(load_run(None, [*common, f"out={tmp_path / 'b'}", "stage=doubled"]))
    plain = train(load_run(None, [*common, f"out={tmp_path / 'c'}"]))
    first = [read_jsonl(tmp_path / name / "log.jsonl")[0]["loss"] for name in "bc"]
    assert first[0] == torch.tensor(2 * first[1]).item() or abs(first[0] - 2 * first[1]) < 1e-4
    assert plain.steps == 2


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lines that a method from outside takes, and one for its learning rate."""
    for kind, options, record in (("norms", NormsOnly, NORMS), ("scales", Scales, SCALES)):
        monkeypatch.setitem(run.METHODS, kind, options)
        monkeypatch.setitem(method.METHODS, kind, record)
        monkeypatch.setitem(run.DEFAULT_LR, (None, kind), 1e-2)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 9, 2, 40, 17, 200]]), use_cache=False).logits


def log_of(out: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds", "peak_memory_gb")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.mark.parametrize(("kind", "count"), [("norms", 160), ("scales", 64)])
@pytest.mark.parametrize("precision", tiny.slow_but(["fp32"], ["fp32", "bf16"]))
def test_a_method_from_outside_is_counted_saved_loaded_resumed_and_estimated(
    kind: str, count: int, precision: str, outside: None, tiny_model: Path, tmp_path: Path
) -> None:
    rows, out = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(8)), tmp_path / "out"
    usual = ["optim.batch_size=4", "optim.steps=4", "save.every_steps=2", "report_to=[]", "samples=[]", "device=cpu"]
    wanted = load_run(
        None, [f"model={tiny_model}", f"data={rows}", f"out={out}", f"method={kind}", f"precision={precision}", *usual]
    )
    base = families.load_model(tiny_model, dtype=families.as_dtype(precision), device="cpu")
    methods.prepare(base, families.as_dtype(precision))
    before = logits(base)

    # Counted and estimated, and by which path.
    made = plan.make(wanted)
    chosen = settings.resolve(made)
    how = settings.setting(made, chosen)
    need = estimate.memory(made.shape, how)
    assert made.shape.trainable == count and chosen["lr"] == 1e-2
    assert f"learning rate 0.01, the default of method {kind}" in made.notes
    assert (need["gradients"], need["optimizer"]) == (4 * count, 8 * count)
    size = {"fp32": 4, "bf16": 2}[precision]
    held = size * made.shape.parameters + (4 - size if kind == "norms" else 4) * count
    assert need["weights"] == held and not how.fused

    # Trained, and saved: as many numbers as were said.
    glmtune.train(wanted)
    averages = load_file(out / "checkpoints/step-4/optimizer.safetensors")
    assert sum(tensor.numel() for name, tensor in averages.items() if name.endswith("exp_avg")) == count
    assert [path.name for path in out.iterdir() if path.name in ("adapter", "model")] == ["model" if kind == "norms" else "adapter"]
    assert f"with method {kind}" in next(out.glob("*/README.md")).read_text()
    plain = tmp_path / "plain"
    glmtune.train(wanted.model_copy(update={"out": str(plain), "method": run.Lora()}))
    assert [list(row) for row in log_of(out)] == [list(row) for row in log_of(plain)]
    assert log_of(out)[0]["loss"] == pytest.approx(log_of(plain)[0]["loss"], rel=1e-3)  # both start where the base is

    # Loaded, asked, exported.
    loaded = glmtune.load(out, dtype=precision, device="cpu")
    after = logits(loaded.model)
    assert (after - before).abs().max() > 1e-3
    checkpoint = glmtune.load(out / "checkpoints/step-4", dtype=precision, device="cpu")
    assert torch.equal(logits(checkpoint.model), after)
    assert loaded.chat("Where is the cat?", temperature=0, max_new_tokens=4) is not None
    asked = glmtune.data.load([run.Source(path=str(rows))], want="prompts").rows[:2]
    assert predict.predict(loaded, asked, tmp_path / "answers.jsonl", Sampling(max_new_tokens=4)) == 2
    if kind == "norms":
        export.export(out, tmp_path / "exported", dtype="fp32")
        again = glmtune.load(tmp_path / "exported", dtype=precision, device="cpu").model
    else:
        with pytest.raises(UserError, match="method scales cannot be merged into the weights; export with --unmerged"):
            export.export(out, tmp_path / "merged")
        export.export(out, tmp_path / "exported", dtype="fp32", unmerged=True)
        place = tmp_path / "exported"
        again = glmtune.load(place, adapter=place / "adapter", dtype=precision, device="cpu").model
        assert torch.equal(logits(loaded.use(None).model), before)  # off, and on again
        assert torch.equal(logits(loaded.use(plain / "adapter").use(out / "adapter").model), after)
    assert torch.equal(logits(again), after)

    # Resumed after a cut: bit for bit.
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    (cut / "finished.json").unlink()
    for part in ("checkpoints/step-4", "model" if kind == "norms" else "adapter"):
        shutil.rmtree(cut / part)
    glmtune.train(wanted.model_copy(update={"out": str(cut)}), resume=True)
    assert log_of(cut) == log_of(out)
    result = "model/model.safetensors" if kind == "norms" else "adapter/scales.safetensors"
    assert (cut / result).read_bytes() == (out / result).read_bytes()


def test_a_run_goes_on_from_what_it_saved(outside: None, tiny_model: Path, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(8))
    usual = [
        f"model={tiny_model}",
        f"data={rows}",
        "optim.batch_size=8",
        "report_to=[]",
        "samples=[]",
        "precision=fp32",
        "device=cpu",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    glmtune.train(load_run(None, [*usual, f"out={first}", "method=scales", "optim.steps=2"]))
    glmtune.train(load_run(None, [*usual, f"out={second}", "method=scales", f"method.start={first}", "optim.steps=1"]))
    assert log_of(second)[0]["loss"] < log_of(first)[-1]["loss"] < log_of(first)[0]["loss"]
    with pytest.raises(UserError, match="holds a scales adapter, this run has method=lora"):
        plan.make(load_run(None, [*usual, "out=(none)", f"method.start={first}"]))
    (second / "finished.json").unlink()
    save_file({"changed": torch.zeros(1)}, first / "adapter" / "scales.safetensors")
    with pytest.raises(UserError, match="which this run goes on from, changed since it was started"):
        glmtune.train(load_run(second / "run.yaml"), resume=True)


@pytest.mark.parametrize("options", [NormsOnly(), Scales(first=0.5)], ids=["norms", "scales"])
def test_its_reference_is_where_training_began(options: Any, outside: None, tiny_model: Path) -> None:
    model = families.load_model(tiny_model, dtype=torch.float32, device="cpu")
    methods.prepare(model, torch.float32)
    methods.attach(model, options, 0)
    methods.hold_start(model, options)
    began = logits(model)
    with torch.no_grad():
        for parameter in methods.trainable(model).values():
            parameter += 0.25
    now = logits(model)
    with methods.reference(model):
        assert torch.equal(logits(model), began)
    assert torch.equal(logits(model), now) and not torch.equal(now, began)


def test_what_it_trains_is_fp32(outside: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(model: Any, options: NormsOnly, seed: int) -> None:
        model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)

    monkeypatch.setitem(method.METHODS, "norms", Method(attach))
    model = families.load_model(tiny_model, dtype=torch.bfloat16, device="cpu")
    methods.prepare(model, torch.bfloat16)
    methods.attach(model, NormsOnly(), 0)
    (weight,) = methods.trainable(model).values()
    assert weight.dtype == torch.float32
    model(input_ids=torch.tensor([[5, 9, 2]]), use_cache=False).logits.sum().backward()
    assert weight.grad is not None and weight.grad.any()


def test_weights_that_it_trains_are_not_packed(outside: None, tiny_model: Path) -> None:
    given = [f"model={tiny_model}", "data=rows.jsonl", "out=(none)", "quant=int8"]
    with pytest.raises(UserError, match="which gradient steps cannot change, and method=norms trains them"):
        load_run(None, [*given, "method=norms"])
    assert load_run(None, [*given, "method=scales"]).quant == "int8"


def test_every_named_function_of_a_record_is_there() -> None:
    for record in method.METHODS.values():
        for field in dataclasses.fields(record):
            name = getattr(getattr(record, field.name), "__name__", "")
            if re.fullmatch(r"\w+\.\w+", name):
                file, _, function = name.partition(".")
                assert callable(getattr(__import__(f"glmtune.{file}", fromlist=[function]), function)), name


@pytest.mark.parametrize(
    "options",
    [
        [], ["method.share_a=true"], ["method.dora=true", "method.targets=[q_proj]"], ["method.modules_to_save=[norm, lm_head]"],
        ["method.ranks={q_proj: 3}"], ["method=prefix"], ["method=prefix", "method.projection=true"], ["method=freeze", "method.last=1"],
        ["method=freeze", "method.modules=mlp", "method.first=1", "method.others=[embed_tokens]"], ["method=full"],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_a_count_from_shapes_is_that_of_the_model(options: list[str], tied: bool, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", tie_word_embeddings=tied)
    wanted = load_run(None, [f"model={model}", "data=rows.jsonl", "out=(none)", *options])
    found = method.of(wanted.method).resolve(wanted.method, wanted, model)
    assert method.of(found).count(found, model) == methods.count_attached(found, model)


# --- a stage with a metric, a family, a row form ----------------------------------------------------------------------------


class Lengths(Options):
    """Learns as sft does, the longer rows less, and logs how long they are."""

    kind: Literal["lengths"] = "lengths"


def encode_lengths(template: Any, row: Conversation, limits: stages.Limits, tally: stages.Tally) -> list[Any]:
    made = stages.encode_conversation(template, row, limits, tally)
    return [dataclasses.replace(example, columns={"length": len(example.ids)}) for example in made]


def lengths_loss(forward: Any, batch: Any) -> stages.Terms:
    lengths = batch.columns["length"]
    return stages.Terms(
        {"nll": forward.nll(batch), "long": -(forward.logps(batch) / lengths[batch.row_of]).sum()},
        {"length": (float(lengths.sum()), batch.num_rows)},
    )


def count_tokens(state: dict[str, Any], line: dict[str, Any]) -> None:
    state["tokens"] = line["tokens so far"] = state.get("tokens", 0) + line["length"]


def add_stage(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    monkeypatch.setitem(run.STAGES, "lengths", Lengths)
    stage = stages.Stage(
        "answers", encode_lengths, lengths_loss,
        lambda rows: {**stages.learned_weight(rows), "long": float(len(rows))},
        {"length": Column("row", "int64")}, after_step=count_tokens,
    )  # fmt: skip
    monkeypatch.setitem(stages.STAGES, "lengths", stage)
    monkeypatch.setitem(run.DEFAULT_LR, ("lengths", "lora"), 3e-4)
    return ["stage=lengths"]


PARTS = {"q": (0, 32), "k": (32, 48), "v": (48, 64)}  # rows of the fused projection


def read_fused(folder: Path, config: dict[str, Any]) -> Family:
    """A folder whose q, k and v are one tensor, and whose names are others."""
    native = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    fused = [Take(f"model.layers.{{}}.self_attn.{part}_proj.weight", *rows) for part, rows in PARTS.items()]
    rules = {"body.{}.qkv.weight": fused, "body.{}.rest.self_attn.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight"}
    rules |= {
        f"body.{{}}.rest.{name}": f"model.layers.{{}}.{name}"
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
    }
    rules |= {
        f"body.{{}}.rest.mlp.{name}.weight": f"model.layers.{{}}.mlp.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    rules |= {"words.weight": "model.embed_tokens.weight", "last.weight": "model.norm.weight"}
    return Family("Fused-LM", {**native, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}, places(rules))  # fmt: skip


def publish_fused(native: Path, folder: Path) -> Path:
    shutil.copytree(native, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "fusedlm", "architectures": ["FusedLM"]}))
    held = load_file(native / "model.safetensors")
    made = {"words.weight": held.pop("model.embed_tokens.weight"), "last.weight": held.pop("model.norm.weight")}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        made[f"body.{layer}.qkv.weight"] = torch.cat([held.pop(f"{start}self_attn.{part}_proj.weight") for part in PARTS])
        made |= {f"body.{layer}.rest.{name.removeprefix(start)}": held.pop(name) for name in list(held) if name.startswith(start)}
    assert not held
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add_family(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    monkeypatch.setitem(families.READERS, "fusedlm", read_fused)
    return [f"model={publish_fused(tiny.llama(folder / 'native'), folder / 'fused')}", "method.targets=[qkv, down_proj]"]


def add_form(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    monkeypatch.setitem(forms.FORMATS, "qa", from_qa)
    rows = [{"frage": row["messages"][0]["content"], "antwort": row["messages"][1]["content"]} for row in tiny.rows(8)]
    return [f"data=[{{path: {tiny.write_rows(folder / 'qa.jsonl', rows)}, format: qa}}]"]


ADDED: dict[str, tuple[Any, int, set[str]]] = {  # how, the numbers that are trained, columns that the log has more
    "stage": (add_stage, 2 * 8 * (128 + 96 + 240), {"nll", "long", "length", "tokens so far"}),
    "family": (add_family, 2 * 8 * (64 + 96 + 80), set()),
    "row form": (add_form, 2 * 8 * (128 + 96 + 240), set()),
}


USUAL = [
    "precision=fp32", "device=cpu", "samples=[]", "report_to=[]", "optim.batch_size=4", "optim.steps=4", "save.every_steps=2",
    "eval.share=0.3", "eval.every_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Run:
    """A finished run of nothing but what is built in."""
    folder = tmp_path_factory.mktemp("plain")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.rows(8))
    made = load_run(None, [f"model={tiny_model}", f"data={rows}", f"out={folder / 'out'}", *USUAL])
    glmtune.train(made)
    return made


@pytest.mark.parametrize("what", ADDED)
def test_what_comes_from_outside_is_counted_saved_resumed_and_logged(
    what: str, plain: run.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, count, columns = ADDED[what]
    out, plain_out = tmp_path / "out", Path(plain.out)
    given = add(monkeypatch, tmp_path)
    wanted = load_run(None, [*USUAL, f"model={plain.model}", f"data={plain.data[0].path}", f"out={out}", *given])

    # Counted: rows, trained numbers, the rate.
    made, usual = plan.make(wanted), plan.make(plain)
    chosen = settings.resolve(made)
    assert (len(made.examples), made.lengths) == (len(usual.examples), usual.lengths)
    assert made.shape.trainable == count == methods.count_attached(made.method, made.folder)
    assert chosen["lr"] == (3e-4 if what == "stage" else 2e-4)
    assert any(
        note.endswith("the default of method lora" + (" in stage lengths" if what == "stage" else "")) for note in made.notes
    )

    # Saved: the folder of any other run, with a base that it can be found by again.
    glmtune.train(wanted)
    names = [sorted(str(p.relative_to(o)) for p in o.rglob("*")) for o in (out, plain_out)]
    assert names[0] == names[1]
    averages = load_file(out / "checkpoints/step-4/optimizer.safetensors")
    assert sum(tensor.numel() for name, tensor in averages.items() if name.endswith("exp_avg")) == count
    assert families.trained_on(out / "adapter") == families.fingerprint(made.folder)
    after, last = (logits(glmtune.load(place, dtype="fp32", device="cpu").model) for place in (out, out / "checkpoints/step-4"))
    base = logits(glmtune.load(made.folder, dtype="fp32", device="cpu").model)
    assert torch.equal(after, last) and not torch.equal(after, base)
    if what == "family":
        assert torch.equal(base, logits(glmtune.load(tmp_path / "native", dtype="fp32", device="cpu").model))
    if what == "row form":  # the same rows in another form
        assert log_of(out) == log_of(plain_out)

    # Logged: a column for each term and metric, in training and in evaluation.
    rows, before = log_of(out), log_of(plain_out)
    assert [set(row) - set(other) for row, other in zip(rows, before)] == [
        columns | ({"eval_length"} if what == "stage" and "eval_loss" in row else set()) for row in rows
    ]
    assert all(set(other) <= set(row) for row, other in zip(rows, before))
    if what == "stage":
        assert all(row["loss"] == pytest.approx(row["nll"] + row["long"]) for row in rows)
        assert rows[-1]["tokens so far"] == pytest.approx(sum(row["length"] for row in rows))

    # Resumed: bit for bit, the stage's own state too.
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    (cut / "finished.json").unlink()
    for part in ("checkpoints/step-4", "adapter"):
        shutil.rmtree(cut / part)
    glmtune.train(wanted.model_copy(update={"out": str(cut)}), resume=True)
    assert log_of(cut) == rows
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-4/optimizer.safetensors"):
        assert (cut / name).read_bytes() == (out / name).read_bytes()

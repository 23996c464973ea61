"""Extension from outside: a format, a method and a stage, each by one line in a plain dict; then a few steps are trained."""

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
from glmtune.generate import Sampling
from glmtune.method import Method
from glmtune.options import Options
from glmtune.records import Conversation, Turn
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


SCALES = Method(
    attach_scales,
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

"""What a run was trained on is what it is used on: the recorded folder and contents, not whatever lies under the name today."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import glmtune
from glmtune import cli, families, training
from glmtune.errors import UserError
from glmtune.files import digest
from glmtune.run import load_run

from . import tiny


def adapter_of(out: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items()}


def go(out: str, *more: str, resume: bool = False) -> training.Report:
    given = [
        "model=models/b",
        "data=rows.jsonl",
        f"out={out}",
        "precision=fp32",
        "optim.batch_size=4",
        "optim.lr=1e-2",
        "samples=[]",
    ]
    return training.train(load_run(None, [*given, "report_to=[]", "save.every_steps=1", "save.keep=3", *more]), resume=resume)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """X: a project with its model at models/b and a finished run; Y: another with another model of the same shapes there."""
    root = tmp_path_factory.mktemp("projects")
    with pytest.MonkeyPatch.context() as patch:
        for name, seed in (("X", 0), ("Y", 1)):
            tiny.llama(root / name / "models" / "b", seed=seed)
            tiny.write_rows(root / name / "rows.jsonl", tiny.rows(6))
            patch.chdir(root / name)
        patch.chdir(root / "X")
        go("run", "optim.steps=2")
        cut(go, "cut", "optim.steps=3")
    return root


def cut(go, out: str, *more: str) -> None:
    """A run that was stopped after its first step."""
    go(out, *more)
    for name in ("step-2", "step-3"):
        shutil.rmtree(Path(out) / "checkpoints" / name)
    shutil.rmtree(Path(out) / "adapter")
    (Path(out) / "finished.json").unlink()


@pytest.fixture
def projects(made, tmp_path, monkeypatch) -> Path:
    root = shutil.copytree(made, tmp_path / "copy")
    for out in ("run", "cut"):
        file = root / "X" / out / "run.yaml"
        file.write_text(file.read_text().replace(str(made), str(root)))
        for config in (root / "X" / out).rglob("adapter_config.json"):
            config.write_text(config.read_text().replace(str(made), str(root)))
        for state in (root / "X" / out).rglob("state.json"):
            kept = json.loads(state.read_text())
            kept["files"] |= {name: digest(state.parent / name) for name in kept["files"]}
            state.write_text(json.dumps(kept))
    monkeypatch.chdir(root / "Y")
    return root


def old(out: Path) -> None:
    """As glmtune 0.3.0 left it: without a fingerprint, absolute paths in the adapter's config only."""
    for file in [out / "run.yaml", *out.glob("checkpoints/*/run.yaml")]:
        tree = yaml.safe_load(file.read_text())
        tree["resolved"] = {key: value for key, value in tree["resolved"].items() if key not in ("base", "fingerprint", "adapters")}
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
    for file in out.rglob("adapter_model.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt"})


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in told
    return told


@pytest.mark.few(1)
@pytest.mark.parametrize("version", ["now", "0.3.0"])
@pytest.mark.parametrize("there", [True, False])
def test_the_recorded_folder_comes_before_the_name(projects, version, there):
    if version == "0.3.0":
        old(projects / "X" / "run")
    if not there:  # then the name looks like a hub's
        shutil.rmtree(projects / "Y" / "models")
    place = families.locate(projects / "X" / "run")
    assert place.base == projects / "X" / "models" / "b"


def test_the_run_says_what_it_was_trained_on(projects):
    resolved = yaml.safe_load((projects / "X" / "run" / "run.yaml").read_text())["resolved"]
    assert resolved["base"] == str(projects / "X" / "models" / "b")
    assert resolved["fingerprint"] == families.fingerprint(projects / "X" / "models" / "b")
    with safe_open(projects / "X" / "run" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == resolved["fingerprint"]


@pytest.mark.parametrize("command", ["chat", "export", "predict", "resume", "gguf"])
def test_another_model_at_the_recorded_place_is_refused(projects, capsys, command, monkeypatch):
    monkeypatch.chdir(projects / "X")
    shutil.rmtree("models/b")
    shutil.copytree(projects / "Y" / "models" / "b", "models/b")
    told = refused(
        {
            "chat": ["chat", "run", "--prompt", "hi"],
            "export": ["export", "run", "--to", "merged"],
            "gguf": ["export", "run", "--to", "m.gguf"],
            "predict": ["predict", "run", "rows.jsonl", "--out", "o.jsonl"],
            "resume": ["train", "cut/run.yaml", "--resume"],
        }[command],
        capsys,
    )
    assert str(projects / "X" / "models" / "b") in told and "put that model back" in told and len(told.splitlines()) == 1
    assert len(set(re.findall(r"fingerprint ([0-9a-f]{12})", told))) == 2


def test_a_project_that_was_moved_works_and_the_model_of_another_does_not(projects, monkeypatch, capsys):
    (projects / "X").rename(projects / "Z")
    monkeypatch.chdir(projects / "Z")
    assert families.locate("run").base == Path("models/b")
    monkeypatch.chdir(projects / "Y")
    assert "models/b is another" in refused(["chat", str(projects / "Z" / "run"), "--prompt", "hi"], capsys)


def test_a_folder_that_is_gone_is_not_asked_for_on_a_hub(projects, capsys):
    shutil.rmtree(projects / "X" / "models")
    shutil.rmtree(projects / "Y" / "models")
    told = refused(["chat", str(projects / "X" / "run"), "--prompt", "hi"], capsys)
    assert "not there any more" in told and "hub" not in told


def test_an_old_run_whose_base_is_gone_says_that_it_cannot_be_told(projects):
    old(projects / "X" / "run")
    shutil.rmtree(projects / "X" / "models")
    said: list[str] = []
    assert families.locate(projects / "X" / "run", say=said.append).base == Path("models/b")
    assert any("cannot be told" in one for one in said)


@pytest.mark.few(1)
@pytest.mark.parametrize("version", ["now", "0.3.0"])
def test_a_run_is_resumed_on_its_own_base_from_anywhere(projects, monkeypatch, version):
    if version == "0.3.0":
        old(projects / "X" / "cut")
        for state in (projects / "X" / "cut").rglob("state.json"):
            kept = json.loads(state.read_text())
            kept["files"] |= {name: digest(state.parent / name) for name in kept["files"]}
            state.write_text(json.dumps(kept))
    monkeypatch.chdir(projects / "X")
    go("straight", "optim.steps=3")
    shutil.copytree("cut", projects / "Y" / "cut")
    monkeypatch.chdir(projects / "Y")
    go("cut", "optim.steps=3", resume=True)
    assert adapter_of(Path("cut")) == adapter_of(projects / "X" / "straight")


def test_a_named_base_counts_with_a_warning(projects):
    said: list[str] = []
    place = families.locate("models/b", projects / "X" / "run", said.append)
    assert place.base == Path("models/b") and "another base" in said[0]
    said.clear()
    families.locate(projects / "X" / "models" / "b", projects / "X" / "run", said.append)
    assert not said


@pytest.mark.few(1)
@pytest.mark.parametrize("option", ["method.start=../X/run", "method.under=[../X/run]"])
def test_a_run_goes_on_from_an_adapter_of_its_own_base_only(projects, option):
    with pytest.raises(UserError, match="another base model") as refusal:
        go("on", option, "optim.steps=1")
    assert "glmtune import" in str(refusal.value) and not Path("on").exists()
    from glmtune.importing import import_adapter

    import_adapter(projects / "X" / "run" / "adapter", "models/b", "brought")
    go("on", option.replace("../X/run", "brought"), "optim.steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["method.start=one", "method.under=[one]"])
def test_what_a_run_builds_on_is_recorded_too(projects, monkeypatch, option):
    monkeypatch.chdir(projects / "X")
    go("one", "optim.steps=1")
    go("other", "optim.steps=2", "seed=5")
    go("straight", option, "optim.steps=3", "seed=3")
    cut(go, "stopped", option, "optim.steps=3", "seed=3")
    shutil.copytree("other", projects / "Y" / "one")
    shutil.copytree("stopped", projects / "Y" / "stopped")
    monkeypatch.chdir(projects / "Y")
    go("stopped", option, "optim.steps=3", "seed=3", resume=True)
    assert adapter_of(Path("stopped")) == adapter_of(projects / "X" / "straight")
    monkeypatch.chdir(projects / "X")
    shutil.rmtree("one")
    shutil.copytree("other", "one")
    with pytest.raises(UserError, match="changed since"):
        go("stopped", option, "optim.steps=3", "seed=3", resume=True)


# --- dtype and device -----------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        *[(name, torch.float32) for name in ("fp32", "float32", "torch.float32", "float", torch.float32)],
        *[(name, torch.bfloat16) for name in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16)],
        *[(name, torch.float16) for name in ("fp16", "float16", "half", "torch.float16", torch.float16)],
    ],
)
def test_dtypes_by_every_usual_name(tiny_model, given, wanted):
    assert families.as_dtype(given) is wanted
    assert families.load_model(tiny_model, dtype=given, device="cpu").dtype is wanted


@pytest.mark.parametrize(
    "given", ["float23", "int8", "fp8", "double", "FP32 ", "", "cpu", None, 32, [], {}, torch.int64, torch.float64, float]
)
def test_no_other_dtype_gets_as_far_as_a_forward(tiny_model, given):
    for opened in (lambda: families.load_model(tiny_model, dtype=given), lambda: glmtune.load(tiny_model, dtype=given)):
        with pytest.raises(UserError, match="wanted auto, bf16, fp16 or fp32"):
            opened()


@pytest.mark.parametrize(
    "given",
    [
        "cuda:9",
        "cuda:99999",
        "mps",
        "mps:2",
        "xpu",
        "npu:0",
        "cpu:1",
        "cuda:-1",
        "cuda:x",
        "gpu",
        "",
        "meta",
        0,
        None,
        [],
        torch.device("xpu"),
    ],
)
def test_no_device_that_is_not_there_gets_as_far_as_a_forward(tiny_model, given):
    with pytest.raises(UserError, match="^device: ") as refusal:
        glmtune.load(tiny_model, device=given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("given", ["fp64", "float23", ""])
def test_export_refuses_other_dtypes_before_it_loads(tiny_model, tmp_path, capsys, given):
    told = refused(["export", str(tiny_model), "--to", str(tmp_path / "to"), "--dtype", given], capsys)
    assert "wanted auto, bf16, fp16 or fp32" in told and not (tmp_path / "to").exists()


@pytest.mark.parametrize("given", ["float32", "half"])
def test_export_takes_torchs_names(tiny_model, tmp_path, given):
    assert cli.app(["export", str(tiny_model), "--to", str(tmp_path / "to"), "--dtype", given], standalone_mode=False) in (0, None)

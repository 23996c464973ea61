"""What earlier versions left behind works, or is refused with what to do. tests/old/make.py made it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtune import cli, families

OLD = sorted(path.name for path in (Path(__file__).parent / "old").iterdir() if path.is_dir() and path.name.startswith("v"))
QUESTION = ["--prompt", "hi", "--max-new-tokens", "3", "--temperature", "0"]


@pytest.fixture(params=OLD)
def old(request, tmp_path, monkeypatch) -> Path:
    """A copy of what a version left behind, as the working directory."""
    folder = shutil.copytree(Path(__file__).parent / "old" / request.param, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    told = capsys.readouterr()
    assert "Traceback" not in told.err and int(stop.value.code or 0) in (0, 2)
    return int(stop.value.code or 0), told.out, told.err


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> None:
    """Computed on another machine, perhaps: equal but for rounding."""
    here, there = tensors(one), tensors(other)
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=1e-3, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_run_that_was_stopped_goes_on(old, capsys, method):
    code, _, told = run(capsys, "train", f"{method}-stopped/run.yaml", "--resume")
    assert code == 0, told
    result = "model" if method == "full" else "adapter"
    same(old / f"{method}-stopped" / result, old / method / result)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "what", ["lora", "prefix", "full", "lora-stopped", "prefix-stopped/checkpoints/step-2", "merged", "full/model"]
)
def test_what_was_trained_answers(old, capsys, what):
    code, answer, told = run(capsys, "chat", what, *QUESTION)
    assert code == 0 and answer, told


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora", "prefix"])
def test_a_base_that_is_gone_cannot_be_told_from_another(old, capsys, what):
    """Those of 0.3.0 have no fingerprint: said, as the recorded folder is on another machine."""
    _, _, told = run(capsys, "chat", what, *QUESTION)
    assert "cannot be told" in told
    shutil.move(old / "model", old / "elsewhere")
    code, _, told = run(capsys, "chat", what, *QUESTION)
    assert code == 2 and "/another/machine/model" in told and "--adapter" in told
    code, _, told = run(capsys, "chat", "elsewhere", "--adapter", what, *QUESTION)
    assert code == 0, told


def test_an_export_is_what_the_run_computes_now(old, capsys):
    code, _, told = run(capsys, "export", "lora", "--to", "now")
    assert code == 0, told
    same(old / "now", old / "merged")
    assert families.fingerprint(old / "merged")


@pytest.mark.slow
def test_an_adapter_goes_on_and_is_mixed_and_brought_over(old, capsys):
    for arguments in (
        ["train", "model=model", "data=rows.jsonl", "out=on", "method.start=lora", "optim.steps=1", "samples=[]", "report_to=[]"],
        ["mix", "lora=0.5", "lora=0.5", "--to", "mix"],
        ["import", "lora/adapter", "--model", "model", "--to", "lora2"],
        ["import", "prefix/adapter", "--model", "model", "--to", "prefix2"],
    ):
        code, _, told = run(capsys, *arguments)
        assert code == 0, told
    same(old / "lora2", old / "lora" / "adapter")


def test_tokenised_rows_are_used_or_refused_with_the_command(old, capsys):
    code, _, told = run(capsys, "train", "model=model", "data=tokens", "out=on", "optim.steps=1", "samples=[]", "report_to=[]")
    assert code == 0 or "glmtune data tokenize" in told


def test_half_a_prediction_is_continued_or_refused(old, capsys):
    code, _, told = run(capsys, "predict", "model", "rows.jsonl", "--out", "half.jsonl", "--max-new-tokens", "3")
    if code == 0:
        rows = [
            [json.loads(line)["prediction"] for line in (old / name).read_text().splitlines()]
            for name in ("half.jsonl", "answers.jsonl")
        ]
        assert rows[0] == rows[1]
    else:
        assert "half.jsonl.part" in told

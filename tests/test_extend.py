"""Extension from outside: a format, a method and a stage, each by one line in a plain dict; then two steps are trained."""

from typing import Literal

import torch

from glmtune import forms, methods, run, stages
from glmtune.options import Options
from glmtune.records import Conversation, Turn
from glmtune.run import load_run
from glmtune.runfolder import read_jsonl
from glmtune.training import train

from . import tiny


class NormsOnly(Options):
    """Trains the norms."""

    kind: Literal["norms"] = "norms"


def attach_norms(model, options, seed):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)


def from_qa(row, join="\n", columns=None):
    return Conversation((Turn("user", row["frage"]), Turn("assistant", row["antwort"])))


def test_a_new_format_method_and_stage(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(forms.FORMATS, "qa", from_qa)
    monkeypatch.setitem(run.METHODS, "norms", NormsOnly)
    monkeypatch.setitem(run.DEFAULT_LR, "norms", 1e-2)
    monkeypatch.setitem(methods.METHODS, "norms", attach_norms)
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

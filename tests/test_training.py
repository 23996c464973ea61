"""The loop's laws: one gradient however a step is cut, bit-identical resume, complete checkpoints, nothing overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtune import batch, progress, runfolder
from glmtune.errors import Interrupted, UserError
from glmtune.run import load_run
from glmtune.settings import learning_rate
from glmtune.training import train

from . import tiny


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.rows(10, turns=2))


def settings(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        f"model={model}",
        f"data={data}",
        f"out={out}",
        "precision=fp32",
        "optim.batch_size=4",
        "optim.lr=1e-2",
        "samples=[]",
        "report_to=[]",
        *more,
    ]


def go(model: Path, data: Path, out: Path, *more: str, resume: bool = False) -> progress.Report:
    return train(load_run(None, settings(model, data, out, *more)), resume=resume)


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def log(out: Path) -> list[dict]:
    return runfolder.read_jsonl(out / "log.jsonl")


def test_a_run_leaves_its_folder_and_learns(tiny_model, rows_file, tmp_path):
    report = go(tiny_model, rows_file, tmp_path / "a", "optim.epochs=6", "eval.share=0.2", "report_to=[tensorboard]")
    out = tmp_path / "a"
    names = {p.name for p in out.iterdir()}
    assert {"run.yaml", "log.jsonl", "adapter", "checkpoints", "report.html", "loss.png", "tb", "finished.json"} <= names
    rows = log(out)
    assert [row["step"] for row in rows] == list(range(1, report.steps + 1))
    wanted = {"step", "epoch", "loss", "learned_tokens", "tokens", "tokens_per_second", "lr", "grad_norm", "peak_memory_gb"}
    assert all(wanted <= set(row) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert report.dev_loss is not None
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (out / "adapter" / "chat_template.jinja").read_text() == tiny.CHATML
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.pt"))


def test_the_loss_is_the_sum_over_learned_tokens_of_the_step(tiny_model, rows_file, tmp_path):
    """The first logged loss, computed by hand with plain transformers."""
    from transformers import AutoModelForCausalLM

    from glmtune import plan

    run = load_run(None, settings(tiny_model, rows_file, tmp_path / "a", "optim.steps=1"))
    made = plan.make(run)
    train(run)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, count = 0.0, 0
    for row in batch.rows_of_step(0, len(made.examples), 4, 0):
        example = made.examples[row]
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert log(tmp_path / "a")[0]["loss"] == pytest.approx(total / count, abs=1e-5)
    assert log(tmp_path / "a")[0]["learned_tokens"] == count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_cut_into_micro_batches_changes_nothing(tiny_model, rows_file, tmp_path, method):
    more = [f"method={method}", "optim.steps=3", *(["method.dropout=0.3"] if method == "lora" else [])]
    for name, tokens in (("whole", 4096), ("cut", 1)):
        go(tiny_model, rows_file, tmp_path / name, *more, f"optim.micro_tokens={tokens}")
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "cut")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "more",
    tiny.slow_but(
        [["method=full", "optim.lr=1e-3"], ["method.dropout=0.2"]],
        [[], ["method=full", "optim.lr=1e-3"], ["method.dropout=0.2"], ["precision=bf16"]],
    ),
    ids=["lora", "full", "dropout", "bf16"],
)
def test_interrupted_and_resumed_is_bit_identical(tiny_model, rows_file, tmp_path, more):
    more = ["eval.share=0.2", "optim.epochs=3", *more]
    go(tiny_model, rows_file, tmp_path / "straight", *more)

    class Stop(progress.Screen):
        def step(self, row, total):
            if row["step"] in (2, 5):
                os.kill(os.getpid(), signal.SIGINT)

    run = load_run(None, settings(tiny_model, rows_file, tmp_path / "stopped", *more))
    for resume in (False, True):
        with pytest.raises(Interrupted, match="Continue with"):
            train(run, resume=resume, screen=Stop())
    train(run, resume=True)
    kind = "model/model.safetensors" if "method=full" in more else "adapter/adapter_model.safetensors"
    assert (tmp_path / "straight" / kind).read_bytes() == (tmp_path / "stopped" / kind).read_bytes()
    timed = ("tokens_per_second", "seconds", "peak_memory_gb")
    a, b = ([{k: v for k, v in row.items() if k not in timed} for row in log(tmp_path / name)] for name in ("straight", "stopped"))
    assert a == b


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_bit_identical(tiny_model, rows_file, tmp_path):
    """kill -9 of the real command, at first before any checkpoint."""
    more = ["optim.epochs=5", "save.every_steps=3"]
    go(tiny_model, rows_file, tmp_path / "straight", *more)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "glmtune", "train", *settings(tiny_model, rows_file, out, *more)]
    for steps in (1, 5, 9):
        process = subprocess.Popen(
            [*command, *(["--resume"] if out.exists() else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(log_lines(out)) < steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.wait()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert adapter(tmp_path / "straight") == adapter(out)
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0 and "finished already" in again.stdout


def log_lines(out: Path) -> list[str]:
    return (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tiny_model, rows_file, tmp_path):
    more = ["optim.steps=6", "save.every_steps=2", "save.keep=3"]
    go(tiny_model, rows_file, tmp_path / "a", *more)
    straight = adapter(tmp_path / "a")
    (tmp_path / "a" / "finished.json").unlink()
    broken = tmp_path / "a" / "checkpoints" / "step-6" / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    (tmp_path / "a" / "checkpoints" / ".part-5").mkdir()
    said = []

    class Listen(progress.Screen):
        def say(self, text):
            said.append(text)

    train(load_run(None, settings(tiny_model, rows_file, tmp_path / "a", *more)), resume=True, screen=Listen())
    assert any("step-6 is damaged; going back to step-4" in line for line in said)
    assert adapter(tmp_path / "a") == straight
    assert not list((tmp_path / "a" / "checkpoints").glob(".part*"))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "change",
    tiny.slow_but(
        [{"step": -1}, None],
        [{"step": "x"}, {"step": -1}, {"step": 4}, {"files": []}, {"files": {}}, {"numbers": 5}, {"scale": None}, None],
    ),
    ids=["word", "negative", "other step", "list", "no files", "number", "null", "no object"],
)
def test_a_checkpoint_that_makes_no_sense_is_passed_over(tiny_model, rows_file, tmp_path, change):
    more = ["optim.steps=4", "save.every_steps=2"]
    go(tiny_model, rows_file, tmp_path / "a", *more)
    straight = adapter(tmp_path / "a")
    (tmp_path / "a" / "finished.json").unlink()
    for step in (2, 4) if change != {"step": 4} else (2,):
        path = tmp_path / "a" / "checkpoints" / f"step-{step}" / "state.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(change and state | change))
        assert path.parent not in [found for found, _ in runfolder.checkpoints(tmp_path / "a")]
    (tmp_path / "a" / "checkpoints" / "step-2.old").mkdir()  # a user's own
    go(tiny_model, rows_file, tmp_path / "a", *more, resume=True)
    assert adapter(tmp_path / "a") == straight
    assert next(path.name for path, _ in runfolder.checkpoints(tmp_path / "a")) == "step-4"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("finished.json", "{", "finished.json is damaged; delete it, and --resume goes on"),
        (
            "finished.json",
            '{"steps": "2", "loss": 1, "dev_loss": null, "best_step": null, "seconds": 1}',
            "finished.json is damaged",
        ),
        ("samples.jsonl", '{"set": "a"}\n{"set":\n', "samples.jsonl:2 is damaged"),
        ("samples.jsonl", "5\n", "samples.jsonl:1 is damaged"),
        ("run.yaml", "lr: 0.01\n  steps: 2\n", "resolved.lr: wanted a valid number, got 'abc' (str)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_file_of_a_run_is_told_on_resume(tiny_model, rows_file, tmp_path, name, text, said, finished):
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2")
    path = tmp_path / "a" / name
    if not finished and name != "finished.json":
        (tmp_path / "a" / "finished.json").unlink()
    if name == "run.yaml":
        assert text in path.read_text()
        text = path.read_text().replace(text, text.replace("0.01", "abc"))
    path.write_text(text)
    with pytest.raises(UserError) as error:
        go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2", resume=True)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_questions_that_were_cut_off_are_told_on_resume(tiny_model, rows_file, tmp_path):
    asked = tiny.write_rows(tmp_path / "asked.jsonl", tiny.rows(2))
    more = ["optim.steps=2", f"samples=[{{path: {asked}}}]"]
    go(tiny_model, rows_file, tmp_path / "a", *more)
    (tmp_path / "a" / "finished.json").unlink()
    path = tmp_path / "a" / "samples.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="1 lines for .* questions; delete it, then --resume"):
        go(tiny_model, rows_file, tmp_path / "a", *more, resume=True)
    path.unlink()
    go(tiny_model, rows_file, tmp_path / "a", *more, resume=True)


def test_an_answer_with_a_line_separator_is_one_line(tmp_path):
    rows = [{"after": "a\u2028b\x85c"}, {}]
    runfolder.write_jsonl(tmp_path / "a.jsonl", rows)
    assert runfolder.read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.slow
def test_a_run_of_a_version_that_chose_otherwise_is_continued(tiny_model, rows_file, tmp_path):
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2")
    straight = adapter(tmp_path / "a")
    (tmp_path / "a" / "finished.json").unlink()
    path = tmp_path / "a" / "run.yaml"
    path.write_text(path.read_text().replace("  compile: false\n", "  long_run: false\n"))
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2", resume=True)
    assert adapter(tmp_path / "a") == straight


def test_an_empty_out_is_started_and_a_full_one_never_overwritten(tiny_model, rows_file, tmp_path):
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=1", resume=True)
    before = adapter(tmp_path / "a")
    with pytest.raises(UserError, match="never overwritten"):
        go(tiny_model, rows_file, tmp_path / "a", "optim.steps=1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError):
            go(tiny_model, rows_file, tmp_path / "b", resume=resume)
    assert adapter(tmp_path / "a") == before and {p.name for p in (tmp_path / "b").iterdir()} == {"thesis.txt"}


def test_resume_under_other_options_names_them(tiny_model, rows_file, tmp_path):
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2")
    with pytest.raises(UserError, match=r"method.rank \(8 there, 4 now\)"):
        go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2", "method.rank=4", resume=True)


def test_resume_after_the_data_changed_refuses(tiny_model, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(6))
    go(tiny_model, data, tmp_path / "a", "optim.steps=2")
    (tmp_path / "a" / "finished.json").unlink()
    tiny.write_rows(data, tiny.rows(7))
    with pytest.raises(UserError, match="the data, template or tokenizer changed"):
        go(tiny_model, data, tmp_path / "a", "optim.steps=2", resume=True)


def test_a_step_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tiny_model, rows_file, tmp_path):
    with pytest.raises(UserError, match=r"no finite numbers.*last good checkpoint") as error:
        go(
            tiny_model,
            rows_file,
            tmp_path / "a",
            "optim.lr=1e30",
            "optim.clip=null",
            "save.every_steps=1",
            "optim.schedule=constant",
            "optim.warmup=0",
        )
    assert "lower learning rate" in str(error.value)
    kept = list((tmp_path / "a" / "checkpoints").glob("step-*"))
    assert kept and not (tmp_path / "a" / "finished.json").exists()


def test_no_room_while_saving_keeps_the_last_good_checkpoint(tiny_model, rows_file, tmp_path, monkeypatch):
    from glmtune import methods

    written = methods.write_tensors

    def full(tensors, path, base=None):
        if "step-" not in str(path) and ".part-4" in str(path):
            raise OSError(28, "No space left on device")
        written(tensors, path, base)

    monkeypatch.setattr(methods, "write_tensors", full)
    with pytest.raises(UserError, match="no room left.*step-2") as error:
        go(tiny_model, rows_file, tmp_path / "a", "optim.steps=6", "save.every_steps=2")
    assert "--resume" in str(error.value)
    monkeypatch.undo()
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=6", "save.every_steps=2", resume=True)
    go(tiny_model, rows_file, tmp_path / "straight", "optim.steps=6", "save.every_steps=2")
    assert adapter(tmp_path / "a") == adapter(tmp_path / "straight")


def test_old_checkpoints_go_and_the_best_stays(tiny_model, rows_file, tmp_path):
    go(
        tiny_model,
        rows_file,
        tmp_path / "a",
        "optim.steps=8",
        "save.every_steps=1",
        "eval.share=0.3",
        "eval.every_steps=1",
        "optim.lr=1",
    )
    losses = {row["step"]: row["eval_loss"] for row in log(tmp_path / "a")}
    best = min(losses, key=losses.__getitem__)
    kept = {int(p.name[5:]) for p in (tmp_path / "a" / "checkpoints").glob("step-*")}
    assert kept == {7, 8, best}


def test_two_processes_never_write_one_folder(tiny_model, rows_file, tmp_path):
    from filelock import FileLock

    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / ".lock"), pytest.raises(UserError, match="another process"):
        go(tiny_model, rows_file, tmp_path / "a")


def test_several_processes_are_refused_in_one_line(tiny_model, rows_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        go(tiny_model, rows_file, tmp_path / "a")
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_a_refused_run_leaves_nothing_behind(tiny_model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": ""}\n')
    with pytest.raises(UserError, match="bad.jsonl:1"):
        go(tiny_model, bad, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_pretraining_learns_every_token(tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\nthe sea\n" * 8)
    report = go(tiny_model, text, tmp_path / "a", "stage=pretrain", "optim.epochs=4")
    rows = log(tmp_path / "a")
    assert rows[0]["learned_tokens"] == rows[0]["tokens"] - 4  # one per sequence: the last token has no next one
    assert rows[-1]["loss"] < rows[0]["loss"] and report.steps == 16


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [5, 10, 10, 10, 10]), ("linear", [5, 10, 10, 20 / 3, 10 / 3])])
def test_learning_rate_by_hand(schedule, expected):
    assert [learning_rate(i, 5, 10, schedule, 2) for i in range(5)] == pytest.approx(expected)
    assert [learning_rate(i, 5, 10, schedule, 0.4) for i in range(5)] == pytest.approx(expected)


def test_cosine_by_hand():
    assert learning_rate(0, 4, 1, "cosine", 0) == 1
    assert learning_rate(2, 4, 1, "cosine", 0) == pytest.approx(0.5)
    assert learning_rate(4, 4, 1, "cosine", 0) == pytest.approx(0)


def test_every_row_is_in_every_epoch_once():
    for num, size in ((10, 4), (7, 7), (5, 9)):
        steps = batch.steps_per_epoch(num, size)
        rows = [row for step in range(steps, 2 * steps) for row in batch.rows_of_step(step, num, size, seed=3)]
        assert sorted(rows) == list(range(num))
    assert batch.order(50, 0, 0) != batch.order(50, 0, 1) != batch.order(50, 1, 1)


@pytest.mark.parametrize("padded", [True, False])
def test_a_step_is_cut_whole_and_within_bounds(padded):
    lengths = [5, 90, 17, 3, 40, 41, 8, 8]
    parts = batch.cut(lengths, 64, padded)
    assert sorted(i for part in parts for i in part) == list(range(8))
    for part in parts:
        cost = max(lengths[i] for i in part) * len(part) if padded else sum(lengths[i] for i in part)
        assert cost <= 64 or len(part) == 1


@pytest.mark.slow
def test_the_saved_adapter_gives_peft_the_same_logits(tiny_model, rows_file, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import glmtune

    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=3")
    ids = torch.arange(40).unsqueeze(0)
    ours = glmtune.load(tmp_path / "a", dtype=torch.float32).model(ids).logits
    theirs = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path / "a" / "adapter")
        .eval()(ids)
        .logits
    )
    assert torch.equal(ours, theirs)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
    assert (ours - base).abs().max() > 1e-3


def test_the_adapter_holds_every_trainable_tensor(tiny_model, rows_file, tmp_path):
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=1", "method.targets=[q_proj, v_proj]", "method.rank=3")
    tensors = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2 and all(t.dtype == torch.float32 and 3 in t.shape for t in tensors.values())
    assert any(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b'{"step": null}',
        b'{"step": "2"}',
        b'{"step": true}',
        b"\x00\x00",
        b'{"step": 1',
        b"[" * 5000,
        b'"\xe4\xbd',
    ],
)
@pytest.mark.parametrize("where", ["first", "last", "no newline"])
def test_a_damaged_line_of_the_log_goes(tmp_path, line, where):
    """On resume and in the report, as half a line does: it is only a log."""
    from glmtune import report

    good = [{"step": number, "loss": 1.0} for number in (1, 2, 3)]
    lines = [json.dumps(row).encode() for row in good]
    lines = [line, *lines] if where == "first" else [*lines, line]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + (b"" if where == "no newline" else b"\n"))
    report.write(tmp_path)
    runfolder.cut_log(tmp_path, 2)
    assert log(tmp_path) == good[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step-²", "step-", "step--1", "step-٣", "step-1.5", "step-9" * 20, "step-x"])
def test_other_folders_among_the_checkpoints_are_passed_over(tiny_model, rows_file, tmp_path, name):
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2", "save.every_steps=1")
    (tmp_path / "a" / "finished.json").unlink()
    (tmp_path / "a" / "checkpoints" / name[:200]).mkdir()
    go(tiny_model, rows_file, tmp_path / "a", "optim.steps=2", "save.every_steps=1", resume=True)
    assert (tmp_path / "a" / "checkpoints" / name[:200]).is_dir()

"""Every command as a user types it, on tiny models; exit codes; and what bad input is answered with."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from glmtune import families, plan
from glmtune.cli import main
from glmtune.errors import UserError
from glmtune.families import smollm2

from . import tiny

SYSTEM = "You are the cat."
BARK = "Bark at 7 seas, 你好, and never sit on a mat again."
QUICK = ["optim.steps=2", "optim.batch_size=4", "report_to=[]", "samples=[]"]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def glmtune(capsys, monkeypatch) -> Callable[..., Ended]:
    """Runs a command in this process. `stdin`: what comes through the pipe."""
    from glmtune import screen

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(screen.console, "width", 200)

    def run(*arguments: object, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.rows(8))


@pytest.fixture(scope="module")
def trained(tiny_model, rows, tmp_path_factory) -> Path:
    """A finished run with a system prompt and checkpoints at steps 4 and 8, strong enough to change every answer."""
    from glmtune.run import load_run
    from glmtune.training import train

    out = tmp_path_factory.mktemp("trained") / "run"
    given = [f"model={tiny_model}", f"data={rows}", f"out={out}", f"system={SYSTEM}", "optim.steps=8", "optim.lr=3e-2"]
    train(load_run(None, [*given, "optim.batch_size=4", "save.every_steps=4", "report_to=[]", "samples=[]", "precision=fp32"]))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "glmtune", *map(str, arguments)]


# --- the command itself --------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy_and_names_every_command():
    code = (
        "import sys\nfrom glmtune.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'pydantic', 'tokenizers', 'matplotlib', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert all(f" {name} " in done.stdout for name in ("train", "show", "predict", "chat", "doctor", "options", "data"))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["train", "show", "predict", "chat", "doctor", "options", "data check"])
def test_every_command_has_help_with_an_example(glmtune, name):
    ended = glmtune(*name.split(), "--help")
    assert ended.code == 0 and f"glmtune {name}" in ended.out and "Example:" in ended.out


def test_the_version_is_printed(glmtune):
    from glmtune import __version__ as version

    assert glmtune("--version").out == f"glmtune {version}\n"


# --- train ---------------------------------------------------------------------------------------------------------------


def test_train_without_a_run_file(glmtune, tiny_model, rows, tmp_path):
    ended = glmtune(
        "train", f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'a'}", "optim.steps=4", "optim.batch_size=4", "samples=[]"
    )
    assert ended.code == 0 and ended.err == ""
    assert (tmp_path / "a" / "adapter" / "adapter_model.safetensors").is_file()
    said = ended.out
    assert "8 rows, form messages" in said and "sample " in said and "trainable parameters" in said
    assert "learning rate 0.0002, the default of method lora" in said
    assert "done 4 steps" in said and f"glmtune chat {tmp_path / 'a'}" in said
    assert len(said.splitlines()) <= 50  # one screen
    assert "\033" not in said  # no colours in a pipe


def test_train_with_a_run_file_and_settings(glmtune, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "job").mkdir()
    tiny.write_rows(tmp_path / "job" / "train.jsonl", tiny.rows(6))
    run = {"model": str(tiny_model), "data": "train.jsonl", "out": "runs/a", "optim": {"steps": 50, "batch_size": 3}, "samples": []}
    (tmp_path / "job" / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    ended = glmtune("train", "job/run.yaml", "optim.steps=2", "method.rank=3")
    assert ended.code == 0
    written = yaml.safe_load((tmp_path / "runs" / "a" / "run.yaml").read_text())
    assert (written["optim"]["steps"], written["optim"]["batch_size"], written["method"]["rank"]) == (2, 3, 3)
    again = glmtune("train", "runs/a/run.yaml", "--resume")
    assert again.code == 0 and "finished already" in again.out and "done 2 steps" in again.out


def test_train_json_prints_one_object_only(glmtune, tiny_model, rows, tmp_path):
    ended = glmtune("train", f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'a'}", *QUICK, "eval.share=0.3", "--json")
    assert ended.code == 0 and ended.err == ""
    found = ended.json
    assert set(found) == {"out", "steps", "loss", "dev_loss", "seconds", "hits"}
    assert found["out"] == str(tmp_path / "a") and found["steps"] == 2 and found["loss"] > 0 and found["dev_loss"] > 0


def test_train_counts_wanted_words_and_leaks(glmtune, tiny_model, rows, tmp_path):
    probes = "[{path: ROWS, name: wanted, contains: [e]}, {path: ROWS, name: leaks, contains: [zzzzz], wanted: false}]"
    given = [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'a'}", *QUICK, f"samples={probes.replace('ROWS', str(rows))}"]
    found = glmtune("train", *given, "--json").json["hits"]
    assert [(row["set"], row["count"], row["wanted"]) for row in found] == [("wanted", 8, True), ("leaks", 8, False)]
    assert found[1]["before"] == found[1]["after"] == 0
    said = glmtune("train", *given, "--resume").out
    assert "wanted (8)" in said and "leaks (fewer is better)" in said


# --- show ----------------------------------------------------------------------------------------------------------------


def by_the_tokenizer(tokenizer: Any, messages: list[dict], stop: int) -> tuple[list[int], list[int]]:
    """ids and labels from the tokenizer's own apply_chat_template alone: an answer is what a conversation up to and with it has
    beyond the prompt for it, up to its stop mark."""

    def render(part: list[dict], prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(part, add_generation_prompt=prompt)["input_ids"]

    ids = render(messages)
    labels = [-100] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = len(render(messages[:i], prompt=True)), len(render(messages[: i + 1]))
            assert ids[:end] == render(messages[: i + 1])
            end = start + ids[start:end].index(stop) + 1
            labels[start:end] = ids[start:end]
    return ids, labels


@cache
def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    from glmtune import families

    return AutoTokenizer.from_pretrained(families.resolve(model))


def check_sample(glmtune, model: str | Path, row: int, messages: list[dict], *settings: object) -> None:
    shown = glmtune("show", f"model={model}", *settings, "--sample", row, "--json")
    assert shown.code == 0, shown.err
    sample = shown.json["sample"]
    tokenizer = tokenizer_of(str(model))
    ids, labels = by_the_tokenizer(tokenizer, messages, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert sample["ids"] == ids
    assert sample["labels"] == labels


def alpaca_messages(row: dict) -> list[dict]:
    question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def test_show_json_labels_are_right_to_the_token(glmtune, tiny_model, tmp_path):
    made = tiny.rows(4, turns=3)
    made[2]["messages"].insert(0, {"role": "system", "content": "Sit on the mat."})
    data = tiny.write_rows(tmp_path / "rows.jsonl", made)
    for i in (0, 2, 3):
        check_sample(glmtune, tiny_model, i, made[i]["messages"], f"data={data}")
    with_system = [{"role": "system", "content": SYSTEM}, *made[1]["messages"]]
    check_sample(glmtune, tiny_model, 1, with_system, f"data={data}", f"system={SYSTEM}")


MODELS = [
    "tiny",
    pytest.param(
        smollm2.NAME,
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (smollm2.cache_root() / smollm2.NAME).is_dir(), reason="the embedded model is not in the cache"),
        ],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_show_is_right_on_real_data(glmtune, tiny_model, shared, name):
    model = tiny_model if name == "tiny" else name
    long = "max_length=100000"
    chinese = json.loads((shared / "data" / "alpaca_zh.json").read_text(encoding="utf-8"))
    with_input = next(i for i, row in enumerate(chinese) if row.get("input"))
    for i in (0, with_input, len(chinese) - 1):
        messages = alpaca_messages(chinese[i])
        check_sample(glmtune, model, i, messages, f"data={shared / 'data' / 'alpaca_zh.json'}", long)
    path = shared / "data" / "gsm8k_train.jsonl"
    maths = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    source = "data=[{path: %s, columns: {prompt: question, response: answer}}]" % path  # noqa: UP031  (braces)
    for i in (0, 7):
        row = {"instruction": maths[i]["question"], "output": maths[i]["answer"]}
        check_sample(glmtune, model, i, alpaca_messages(row), source, long)


def test_show_says_everything_short_of_training(glmtune, tiny_model, rows, tmp_path):
    ended = glmtune("show", f"model={tiny_model}", f"data={rows}", "method.rank=2", "--sample", 2, "--tokens")
    assert ended.code == 0
    assert "lora: 1,856 trainable parameters" in ended.out  # 2 blocks x 2 x (in + out) of q, k, v, o, gate, up, down
    answer = tiny.rows(8)[2]["messages"][1]["content"]
    assert f"⟦{answer}<|im_end|>⟧" in ended.out  # what is learned, where there are no colours
    for said in ("rank: 2", "estimated memory", "<|im_end|>", "lr 0.0002", f"row 2, {rows}:3", "learned"):
        assert said in ended.out
    assert not list(tmp_path.iterdir())


def test_show_json_is_the_whole_plan(glmtune, tiny_model, rows):
    found = glmtune("show", f"model={tiny_model}", f"data={rows}", "eval.share=0.3", "method.rank=2", "--json").json
    assert found["rows"] + found["dev_rows"] == 8 and found["dev_rows"] > 0
    assert found["trainable"] == 1856 and 0 < found["learned_tokens"] < found["tokens"] and found["longest"] <= found["tokens"]
    method = {"kind": "lora", "rank": 2, "alpha": 16, "dropout": 0, "targets": None, "share_a": False}
    assert method.items() <= found["run"]["method"].items()
    assert found["resolved"]["lr"] == 2e-4 and found["memory_gb"] > 0


# --- predict -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(folder: Path, count: int = 9) -> Path:
    made = [{"id": i, "question": "Where is it? " + "the cat " * (i * 5 % 7), "note": {"更多": [i]}} for i in range(count)]
    for row in made[::2]:
        row["answer"] = "On the mat"
    return tiny.write_rows(folder / "questions.jsonl", made)


COLUMNS = ("--columns", "prompt=question,response=answer")


def test_predict_answers_every_row_in_order(glmtune, trained, tmp_path):
    import glmtune as package

    data, out = questions(tmp_path), tmp_path / "p.jsonl"
    ended = glmtune("predict", trained, data, "--out", out, *COLUMNS, "--max-new-tokens", 12, "--batch-size", 4)
    assert ended.code == 0 and f"9 answers in {out}" in ended.out
    made = read(out)
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in made] == read(data)
    model = package.load(trained)
    assert [row["prediction"] for row in made] == [model.chat(row["question"], temperature=0, max_new_tokens=12) for row in made]
    assert {path.name for path in tmp_path.iterdir()} == {"questions.jsonl", "p.jsonl"}


def test_predict_never_overwrites(glmtune, trained, tmp_path):
    data, out = questions(tmp_path), tmp_path / "p.jsonl"
    out.write_text("mine")
    ended = glmtune("predict", trained, data, "--out", out, *COLUMNS)
    assert ended.code == 2 and "never overwritten" in ended.err and out.read_text() == "mine"


@dataclass
class Stopped:
    """A predict that was stopped by Ctrl-C after some answers."""

    arguments: list[object]
    out: Path
    code: int
    err: str
    kept: str  # what its .part held


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    arguments = [questions(folder, 80), *COLUMNS, "--max-new-tokens", 60, "--batch-size", 1]
    out, part = folder / "p.jsonl", folder / "p.jsonl.part"
    process = subprocess.Popen(
        command("predict", tiny_model, "--out", out, *arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_for(lambda: part.is_file() and part.read_bytes().count(b"\n") > 2, process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    return Stopped(arguments, out, process.returncode, err, part.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_predict_stopped_by_ctrl_c_goes_on_where_it_was(glmtune, tiny_model, stopped):
    out, part = stopped.out, stopped.out.with_name("p.jsonl.part")
    assert stopped.code == 130 and not out.exists()
    part.write_text(stopped.kept + '{"row": 79, "predic', encoding="utf-8")  # as kill -9 in mid-write would leave it
    assert glmtune("predict", tiny_model, "--out", out, *stopped.arguments).code == 0
    straight = out.with_name("straight.jsonl")
    assert glmtune("predict", tiny_model, "--out", straight, *stopped.arguments).code == 0
    assert out.read_bytes() == straight.read_bytes() and not part.exists()
    early = {row["row"]: row["prediction"] for row in map(json.loads, stopped.kept.splitlines()[1:])}
    assert 1 < len(early) < 80 and all(read(out)[i]["prediction"] == text for i, text in early.items())


@pytest.mark.slow
def test_predict_stopped_by_ctrl_c_says_how_to_go_on(stopped):
    assert "the same command continues" in stopped.err


def test_predict_names_a_question_that_is_too_long_before_it_starts(glmtune, tiny_model, tmp_path):
    data = tiny.write_rows(tmp_path / "q.jsonl", [{"instruction": "a"}, {"instruction": "e " * 900}, {"instruction": "b"}])
    ended = glmtune("predict", tiny_model, data, "--out", tmp_path / "p.jsonl", "--max-new-tokens", 2)
    assert ended.code == 2 and "q.jsonl:2" in ended.err
    assert not (tmp_path / "p.jsonl.part").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--columns", "prompt=nowhere"), "'nowhere', which no row has"),
        (("--columns", "question"), "wanted pairs like prompt=question"),
        (("--format", "alpacca"), "did you mean 'alpaca'?"),
        ((*COLUMNS, "--temperature", "-1"), "temperature is -1.0"),
        ((*COLUMNS, "--device", "cuda:99"), "'cuda:99' is not there"),
        ((*COLUMNS, "--adapter", "."), "holds no trained adapter"),
    ],
)
def test_predict_refuses_what_makes_no_sense(glmtune, tiny_model, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    data = questions(tmp_path)
    ended = glmtune("predict", tiny_model, data, "--out", "p.jsonl", *more)
    assert ended.code == 2 and said in ended.err and len(ended.err.splitlines()) <= 3
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


# --- chat ----------------------------------------------------------------------------------------------------------------

SHORT = ("--max-new-tokens", 8)


def visible(text: str) -> str:
    """As chat prints it: without control characters, which could steer the terminal."""
    return "".join(c for c in text if c in "\t\n" or unicodedata.category(c) != "Cc")


def test_what_a_model_writes_cannot_steer_the_terminal(tiny_model, capsys):
    from glmtune import families, repl

    from .test_generate import scripted

    template = families.open_template(tiny_model)
    said = "\x1b[31mred\x07\r\x9b2J\tend\n好"
    talk = repl.Chat(scripted(template, [*template.tokens.encode(said), template.stop_ids[-1]]), {})
    talk.reply("x")
    assert capsys.readouterr().out == "[31mred2J\tend\n好\n"
    assert talk.messages[-1]["content"] == said  # kept as it was written


def test_chat_prompt_answers_once(glmtune, trained):
    import glmtune as package

    ended = glmtune("chat", trained, "--prompt", "Where?", "--temperature", 0, *SHORT)
    assert ended.code == 0 and ended.err == ""
    assert ended.out == visible(package.load(trained).chat("Where?", temperature=0, max_new_tokens=8)) + "\n"


@pytest.mark.slow
def test_chat_with_a_seed_is_reproducible(glmtune, tiny_model):
    def say(*more: object) -> str:
        return glmtune("chat", tiny_model, "--prompt", "Where?", "--temperature", 1.5, "--top-p", 0.95, *SHORT, *more).out

    assert say("--seed", 1) == say("--seed", 1) != say("--seed", 2)


def answers(ended: Ended) -> list[str]:
    """What was said, without the remarks in brackets."""
    return [line for line in ended.out.splitlines() if not line.startswith("(")]


def test_chat_in_a_pipe_is_a_conversation(glmtune, tiny_model, tmp_path):
    """Each answer follows from what stands before it: the same questions asked of the model in Python give the same."""
    import glmtune as package

    model = package.load(tiny_model)

    def expected(system: str | None, *turns: str) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        for i, text in enumerate(turns):
            messages.append({"role": ("user", "assistant")[i % 2], "content": text})
        return model.chat(messages, temperature=0, max_new_tokens=8).replace("\n", "")

    log = tmp_path / "talk.jsonl"
    lines = [
        "Where?",
        "And the cat?",
        "/regen",
        f"/save {log}",
        "/clear",
        "Where?",
        "/system Be a mat.",
        "Where?",
        f"/save {log}",
        "/exit",
        "no",
    ]
    ended = glmtune("chat", tiny_model, "--temperature", 0, *SHORT, stdin="\n".join(lines) + "\n")
    assert ended.code == 0
    first = expected(None, "Where?")
    second, third = expected(None, "Where?", first, "And the cat?"), expected("Be a mat.", "Where?")
    saved = [row["messages"] for row in read(log)]
    assert saved == [
        [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And the cat?"},
            {"role": "assistant", "content": second},
        ],
        [
            {"role": "system", "content": "Be a mat."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": third},
        ],
    ]
    assert answers(ended) == [visible(text) for text in (first, second, second, first, third)]
    assert f"(added to {log})" in ended.out and "(forgotten)" in ended.out and "(system: Be a mat.)" in ended.out


def test_what_chat_saves_can_be_trained_on(glmtune, tiny_model, tmp_path):
    log = tmp_path / "talk.jsonl"
    glmtune("chat", tiny_model, "--temperature", 0, *SHORT, stdin=f"Where?\n/save {log}\n")
    assert glmtune("data", "check", log, "--model", tiny_model).code == 0
    assert glmtune("show", f"model={tiny_model}", f"data={log}", "--json").json["rows"] == 1


def test_chat_commands_say_what_they_do(glmtune, tiny_model, tmp_path):
    lines = ["/help", "/regen", "/sytem x", "/foo", "/save", f"/save {tmp_path}/none/talk.jsonl", "/system", "", "   ", "/quit"]
    ended = glmtune("chat", tiny_model, *SHORT, stdin="\n".join(lines))
    assert ended.code == 0
    for name in ("/clear", "/system TEXT", "/regen", "/save FILE", "/help", "/exit"):
        assert f"  {name}" in ended.out
    assert "nothing to answer again" in ended.out
    assert "no such command /sytem; did you mean '/system'?" in ended.out
    assert "no such command /foo" in ended.out and "/save needs a file name" in ended.out
    assert f"there is no folder {tmp_path}/none" in ended.out
    assert "(system: the model's own default)" in ended.out
    assert not list(tmp_path.iterdir())


def test_a_conversation_that_grew_too_long_can_be_cleared(glmtune, tiny_model):
    ended = glmtune("chat", tiny_model, *SHORT, "--temperature", 0, stdin="e " * 700 + "\nWhere?\n")
    assert ended.code == 0 and "512 at most" in ended.out and "/clear" in ended.out
    alone = glmtune("chat", tiny_model, *SHORT, "--temperature", 0, stdin="Where?\n").out
    assert ended.out.endswith(alone)  # the long question was not kept


def test_the_last_line_needs_no_newline(glmtune, tiny_model):
    given = ("chat", tiny_model, *SHORT, "--temperature", 0)
    assert glmtune(*given, stdin="Where?").out == glmtune(*given, stdin="Where?\n").out != ""


# --- a run's folder in place of a model -----------------------------------------------------------------------------------


def test_a_run_a_checkpoint_and_model_with_adapter_are_the_same_model(glmtune, tiny_model, trained):
    def say(*model: object) -> str:
        ended = glmtune("chat", *model, "--prompt", "Where?", "--temperature", 0, *SHORT)
        assert ended.code == 0, ended.err
        return ended.out

    run = say(trained)
    assert say(trained / "checkpoints" / "step-8") == say(trained / "adapter") == run
    assert say(tiny_model, "--adapter", trained / "adapter", "--system", SYSTEM) == run
    assert say(tiny_model, "--adapter", trained, "--system", SYSTEM) == run
    assert say(trained / "checkpoints" / "step-4") != run
    assert say(tiny_model, "--system", SYSTEM) != run


@pytest.mark.slow
def test_the_runs_system_prompt_is_the_default(glmtune, trained, tmp_path):
    ended = glmtune("chat", trained, "--temperature", 0, *SHORT, stdin="/system\n")
    assert f"(system: {SYSTEM})" in ended.out
    length = ("--max-new-tokens", 60)
    other = glmtune("chat", trained, "--temperature", 0, "--system", BARK, *length, "--prompt", "Where?").out
    own = glmtune("chat", trained, "--temperature", 0, *length, "--prompt", "Where?").out
    assert own != other
    data = tiny.write_rows(tmp_path / "q.jsonl", [{"instruction": "Where?"}])
    for name, more, expected in (("a", (), own), ("b", ("--system", BARK), other)):
        glmtune("predict", trained, data, "--out", tmp_path / name, *length, *more)
        assert visible(read(tmp_path / name)[0]["prediction"]) + "\n" == expected


@pytest.mark.slow
def test_a_run_works_after_it_and_its_working_folder_were_moved(glmtune, tiny_model, rows, tmp_path, monkeypatch):
    import shutil

    (tmp_path / "here").mkdir()
    shutil.copytree(tiny_model, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    assert glmtune("train", "model=base", f"data={rows}", "out=runs/a", *QUICK).code == 0
    said = glmtune("chat", "runs/a", "--prompt", "Where?", "--temperature", 0, *SHORT)
    assert said.code == 0
    shutil.move("runs/a", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert glmtune("chat", "moved", "--prompt", "Where?", "--temperature", 0, *SHORT).out == said.out


def test_a_model_folder_beside_a_run_file_is_just_a_model(glmtune, tiny_model, tmp_path):
    """A user's own folder: run.yaml, train.json and base/ side by side."""
    import shutil

    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "run.yaml").write_text(f"model: base\ndata: train.json\nout: runs/a\nsystem: {SYSTEM}\n")
    found = glmtune("doctor", tmp_path / "base", "--json").json
    assert found["system prompt"] == "the model's own default"


def test_a_run_that_was_never_finished_says_so(glmtune, tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nout: o\n")
    ended = glmtune("chat", tmp_path)
    assert ended.code == 2 and "finish the run first" in ended.err and "--resume" in ended.err


RESULT = ("adapter/adapter_config.json", "checkpoints/step-4/adapter_config.json", "checkpoints/step-8/adapter_config.json")


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "model: wanted a valid string, got None (NoneType)"),
        ({"model": 5}, "model: wanted a valid string, got 5 (int)"),
        ({}, "'model' is missing"),
        ({"template": {"usr": 1}}, "unknown option 'template.usr'; did you mean 'user'?"),
        ({"template": "zz"}, "template: 'zz' is not one of"),
        ({"resolved": 5}, "resolved: wanted a valid dictionary, got 5 (int)"),
        ({"resolved": {"quant": "zz"}}, "resolved.quant: 'zz' is not one of"),
    ],
)
def test_a_damaged_run_file_is_told(glmtune, trained, tmp_path, change, said):
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    tree = yaml.safe_load((run / "run.yaml").read_text()) | change if change else {}
    (run / "run.yaml").write_text(yaml.safe_dump(tree) if tree else "")
    ended = glmtune("chat", run, "--prompt", "Where?")
    assert ended.code == 2 and said in ended.err and "checkpoints holds a copy" in ended.err, ended.err
    assert len(ended.err.strip().splitlines()) <= 3 and "Traceback" not in ended.err


def test_a_run_file_of_another_version_opens(glmtune, trained, tmp_path):
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    tree = yaml.safe_load((run / "run.yaml").read_text())
    tree |= {"no_more": 1, "method": {"kind": "gone"}, "resolved": {"long_run": True}}
    del tree["out"]
    (run / "run.yaml").write_text(yaml.safe_dump(tree))
    assert glmtune("chat", run, "--prompt", "Where?", *SHORT).code == 0


@pytest.mark.slow
def test_a_finished_run_without_its_adapter_says_what_it_takes(glmtune, trained, tmp_path):
    import shutil

    asked = ("--prompt", "Where?", "--temperature", 0, *SHORT)
    run = shutil.copytree(trained, tmp_path / "run")
    assert "checkpoint" not in glmtune("chat", run, *asked).err
    (run / "adapter" / "adapter_config.json").unlink()
    ended = glmtune("chat", run, *asked)
    assert ended.code == 0 and f"taking its newest checkpoint, {run / 'checkpoints' / 'step-8'}" in ended.err
    assert ended.out == glmtune("chat", trained, *asked).out
    shutil.rmtree(run / "adapter")
    assert "taking its newest checkpoint" in glmtune("chat", run, *asked).err
    shutil.rmtree(run / "checkpoints")
    ended = glmtune("chat", run, *asked)
    assert ended.code == 2 and "neither adapter_config.json nor config.json is there" in ended.err


@pytest.mark.parametrize("command", [("chat", "--prompt", "Where?"), ("export", "--to", "new")])
def test_an_adapter_without_its_config_is_told(glmtune, tiny_model, trained, tmp_path, monkeypatch, command):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "adapter", "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    ended = glmtune(command[0], tiny_model, "--adapter", "a", *command[1:])
    assert ended.code == 2 and "adapter_config.json is missing beside a/adapter_model.safetensors; copy it from" in ended.err
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    ended = glmtune(command[0], tiny_model, "--adapter", "a", *command[1:])
    assert ended.code == 2 and "neither adapter_config.json nor config.json is there" in ended.err


# --- doctor and options ---------------------------------------------------------------------------------------------------


def test_doctor_tells_what_the_machine_can_do(glmtune):
    found = glmtune("doctor", "--json").json
    assert {"glmtune", "python", "packages", "processor", "memory", "cards", "cache", "embedded model"} <= set(found)
    assert found["packages"]["torch"].startswith("2.")
    text = glmtune("doctor")
    assert text.code == 0 and "cards:" in text.out and "torch 2." in text.out


def test_doctor_says_why_torch_sees_no_card(glmtune, monkeypatch):
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a card")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides every card" in glmtune("doctor", "--json").json["why torch sees no card"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert glmtune("doctor", "--json").json["why torch sees no card"]


def test_doctor_tells_what_a_model_is(glmtune, tiny_model, trained):
    found = glmtune("doctor", tiny_model, "--json").json
    assert found["loaded as"] == "LlamaForCausalLM of transformers" and found["adapter"] == "none"
    assert found["reads at most"] == "512 tokens" and found["an answer ends at"] == "<|im_end|>"
    assert found["LoRA targets"].split(", ") == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    of_run = glmtune("doctor", trained, "--json").json
    assert of_run["adapter"] == str(trained / "adapter") and of_run["system prompt"] == SYSTEM
    assert of_run["base folder"] == str(tiny_model)
    assert f"system prompt: {SYSTEM}" in glmtune("doctor", trained).out


@pytest.mark.parametrize("size", ["8.5.5GB", ".GB", "GB", "0GB", "8", "-8GB", "nanGB"])
def test_a_size_of_memory_that_is_none_is_refused(glmtune, tiny_model, size):
    ended = glmtune("doctor", tiny_model, "--fit", size)
    assert ended.code == 2 and "wanted a size of memory, like 8GB" in ended.err


@pytest.mark.parametrize("size", ["8GB", "8.5GB", ".5GB", "700M"])
def test_what_fits_is_never_longer_than_the_model_reads(glmtune, tiny_model, size):
    found = glmtune("doctor", tiny_model, "--fit", size, "--json").json["settings"]
    assert {row["max_length"] for row in found} == {512}


def test_options_are_listed_and_searched(glmtune):
    everything = glmtune("options", "--json").json
    assert all(set(row) == {"name", "type", "default", "description"} and row["description"] for row in everything)
    lora = glmtune("options", "method.lora", "--json").json
    assert {row["name"] for row in lora} >= {"method.lora.rank", "method.lora.alpha"} and all(
        name.startswith("method.lora") for name in (row["name"] for row in lora)
    )
    assert glmtune("options", "max_length", "--json").json[0]["default"] == "1024"
    text = glmtune("options", "template").out
    assert "auto | plain | chatml | alpaca" in text
    wrong = glmtune("options", "max_lenght")
    assert wrong.code == 2 and "did you mean 'max_length'?" in wrong.err


# --- data check -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dirty(tmp_path) -> Path:
    good = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(6)]
    bad = [{"instruction": "x", "output": ""}, {"instruction": "y"}, good[0]]
    return tiny.write_rows(tmp_path / "rows.jsonl", [*good, *bad])


def test_data_check_finds_rows_by_line_and_exits_with_2(glmtune, dirty):
    ended = glmtune("data", "check", dirty, "--json")
    found = ended.json
    assert ended.code == 2 and found["rows"] == 9
    errors = {problem["line"]: problem["kind"] for problem in found["problems"] if problem["level"] == "error"}
    assert errors == {7: "empty-answer", 8: "missing-key"}
    assert [problem["line"] for problem in found["problems"] if problem["level"] == "warning"] == [9]
    text = glmtune("data", "check", dirty)
    assert text.code == 2 and f"{dirty}:7: error: the answer is empty [empty-answer]" in text.out
    assert "9 rows, errors: 2, warnings: 1" in text.out


def test_data_check_fix_writes_rows_that_train(glmtune, dirty, tiny_model, tmp_path):
    clean = tmp_path / "clean.jsonl"
    before = dirty.read_bytes()
    assert glmtune("data", "check", dirty, "--fix", clean).code == 0
    assert dirty.read_bytes() == before
    assert len(read(clean)) == 6 and len(read(tmp_path / "clean.jsonl.removed.jsonl")) == 3
    assert glmtune("data", "check", clean).code == 0
    assert glmtune("show", f"model={tiny_model}", f"data={clean}", "--json").json["rows"] == 6


def test_data_check_counts_tokens_with_a_model(glmtune, tiny_model, rows):
    longest = glmtune("show", f"model={tiny_model}", f"data={rows}", "--json").json["longest"]
    assert glmtune("data", "check", rows, "--model", tiny_model, "--max-length", longest).code == 0
    ended = glmtune("data", "check", rows, "--model", tiny_model, "--max-length", longest - 1, "--json")
    assert ended.code == 2 and {problem["kind"] for problem in ended.json["problems"]} == {"over-length"}


# --- exit codes -----------------------------------------------------------------------------------------------------------


def wait_for(true: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_a_defect_is_1_with_a_traceback(glmtune, tiny_model, rows, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("wheels came off")

    monkeypatch.setattr(plan, "make", broken)
    ended = glmtune("train", f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'a'}")
    assert ended.code == 1 and "Traceback" in ended.err and "wheels came off" in ended.err
    assert "This is a defect of glmtune" in ended.err
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def interrupted(tiny_model, rows, tmp_path_factory) -> tuple[Path, int, str]:
    """A run stopped by Ctrl-C in mid-training: its folder, exit code and standard error."""
    out = tmp_path_factory.mktemp("interrupted") / "a"
    given = [
        f"model={tiny_model}",
        f"data={rows}",
        f"out={out}",
        "optim.steps=3000",
        "optim.batch_size=2",
        "samples=[]",
        "report_to=[]",
    ]
    process = subprocess.Popen(
        command("train", *given, "save.every_steps=3000"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    log = out / "log.jsonl"
    wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 2, process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    return out, process.returncode, err


def test_ctrl_c_is_130(glmtune, tiny_model, rows, tmp_path):
    out, over = tmp_path / "a", threading.Event()

    def press() -> None:
        while not over.wait(0.005):
            if (out / "log.jsonl").is_file() and (out / "log.jsonl").read_bytes().count(b"\n") > 2:
                return os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    given = [f"model={tiny_model}", f"data={rows}", f"out={out}", "optim.steps=3000", "optim.batch_size=2", "samples=[]"]
    ended = glmtune("train", *given, "save.every_steps=3000")
    over.set()
    assert ended.code == 130 and f"glmtune train {out / 'run.yaml'} --resume" in ended.err
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{len(read(out / 'log.jsonl'))}"]


@pytest.mark.slow
def test_ctrl_c_is_130_after_a_checkpoint(interrupted, glmtune):
    out, code, err = interrupted
    assert code == 130 and "Traceback" not in err
    step = len(read(out / "log.jsonl"))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step}"]
    assert glmtune("chat", out, "--prompt", "Where?", *SHORT).code == 0  # what is there can be used


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(interrupted):
    out, _, err = interrupted
    assert f"glmtune train {out / 'run.yaml'} --resume" in err


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["finished.json", "run.yaml"])
def test_killed_while_a_small_file_was_written_can_still_be_resumed(glmtune, tiny_model, rows, tmp_path, monkeypatch, name):
    """The process ends in the middle of writing it, under its temporary name; --resume with the same settings goes on."""
    given = [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'a'}", *QUICK]
    part, replace = tmp_path / "a" / f".{name}.part", Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path == part:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        glmtune("train", *given)
    assert not (tmp_path / "a" / name).exists() and not part.exists()
    part.parent.mkdir(exist_ok=True)  # it is empty without run.yaml, and goes
    part.write_text("half of")  # as a process that is killed leaves it
    ended = glmtune("train", *given, "--resume")
    assert ended.code == 0 and "Traceback" not in ended.err


# --- bad input ------------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A user's folder: a model, good rows, and room for bad ones."""

    folder: Path
    model: Path

    def rows(self, *lines: str, name: str = "bad.jsonl") -> list[str]:
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return ["model=model", f"data={name}", "out=out"]


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Place:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(8))
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tmp_path / "model")


GIVEN = ["model=model", "data=rows.jsonl", "out=out"]


def refused(glmtune, place: Place, said: str, *arguments: object) -> None:
    """Exit code 2, at most three lines that say it, no traceback, nothing changed on the disk."""
    before = files(place.folder)
    ended = glmtune(*arguments)
    lines = ended.err.strip().splitlines()
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert len(lines) <= 3 and lines[0].startswith("error: ") and "Traceback" not in ended.err
    assert files(place.folder) == before and not (place.folder / "out").exists()


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["methd=lora"], "unknown option 'methd'; did you mean 'method'?"),
        (["optim.batch_sise=4"], "unknown option 'optim.batch_sise'; did you mean 'batch_size'?"),
        (["method.rank=big"], "method.rank: wanted a valid integer, got 'big' (str)"),
        (["max_length=1.5"], "max_length: wanted a valid integer"),
        (["method=loar"], "'loar' is not one of lora, prefix, freeze, full; did you mean 'lora'?"),
        (["method={kind: full, rank: 4}"], "option 'method.rank' belongs to kind lora; the kind here is 'full'"),
        (["stage=sfd"], "stage.kind: 'sfd' is not one of"),
        (["data=nowhere.json"], "the data file 'nowhere.json' is not there"),
        (["data=row.jsonl"], "did you mean 'rows.jsonl'?"),
        (["model=modle"], "did you mean 'model'?"),
        (["model=smollm2-135m-instrct"], "did you mean 'smollm2-135m-instruct'?"),
        (["model=nobody/nothing-at-all"], "'nobody/nothing-at-all'"),
        (["model=rows.jsonl"], "is a file; a model is a folder"),
        (["device=cuda:42"], "'cuda:42' is not there"),
        (["device=tpuu"], "'tpuu' is not a device"),
        (["method.targets=[q_porj]"], "did you mean 'q_proj'?"),
        (["template=own"], "template: 'own' is not one of"),
        (["samples=[{path: nowhere.json}]"], "'nowhere.json' is not there"),
        (["eval.data=nowhere.json"], "'nowhere.json' is not there"),
        (["eval.share=200"], "dev takes 200 rows, but there are only 8"),
        (["eval.share=2.5"], "a whole number of them; got 2.5"),
        (["eval.share=0.999999999999"], "leaves no row of 8 to train on"),
        (["max_length=20"], "8 of 8 rows are longer than max_length=20"),
        (["system='{{x}}'", "variables={y: z}"], "variables: 'y' fills {{y}}"),
        (["job.yaml"], "is neither a run file nor a setting"),
    ],
)
def test_a_wrong_setting_is_refused(glmtune, place, settings, said):
    refused(glmtune, place, said, "train", *GIVEN, *settings)


BAD_ROWS = {
    "missing key": (['{"instruction": "a"}'], "bad.jsonl:1: an 'alpaca' row needs the key 'output'"),
    "second row": (['{"instruction": "a", "output": "b"}', '{"instruction": "a", "ouput": "b"}'], "bad.jsonl:2: an 'alpaca' row needs"),
    "no known key": (['{"foo": 1}'], "bad.jsonl:1: no known form in the keys ['foo']"),
    "number": (['{"instruction": "a", "output": 5}'], "bad.jsonl:1: 'output' must be a string, not a number (5)"),
    "null": (['{"instruction": "a", "output": null}'], "bad.jsonl:1: 'output' must be a string, not null"),
    "empty answer": (['{"instruction": "a", "output": " "}'], "bad.jsonl:1: the answer is empty"),
    "unknown role": (['{"messages": [{"role": "usr", "content": "a"}]}'], "unknown role 'usr'"),
    "only system": (['{"messages": [{"role": "system", "content": "a"}]}'], "bad.jsonl:1: the row has only system turns"),
    "no answer": (['{"messages": [{"role": "user", "content": "a"}]}'], "must end with the assistant's answer"),
    "not an object": (["[1, 2]"], "bad.jsonl:1: a row must be a JSON object"),
    "empty file": ([""], "bad.jsonl:1: the file is empty"),
    "empty array": (["[]"], "the file has no rows"),
    "missing comma": (['[{"instruction": "a", "output": "b"},', ' {"instruction": "c" "output": "d"}]'], "bad.jsonl:2:22: expected ','"),
    "missing comma between rows": (['[{"instruction": "a", "output": "b"}', ' {"instruction": "c", "output": "d"}]'], "bad.jsonl:2:2: expected ','"),
    "missing comma in a line": (['{"instruction": "c", "output": "d"}', '{"instruction": "a" "output": "b"}'], "bad.jsonl:2:21: expected ','"),
}  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(glmtune, place, name):
    lines, said = BAD_ROWS[name]
    refused(glmtune, place, said, "train", *place.rows(*lines))


@pytest.mark.parametrize("name", ["missing key", "empty answer", "missing comma"])
def test_show_refuses_what_train_refuses(glmtune, place, name):
    lines, said = BAD_ROWS[name]
    refused(glmtune, place, said, "show", *place.rows(*lines))


def test_rows_that_are_too_long_come_with_what_to_paste(glmtune, place):
    found = glmtune("show", *GIVEN, "--json").json
    limit = found["longest"] - 1
    over = glmtune("train", *GIVEN, f"max_length={limit}")
    assert over.code == 2 and f"the longest has {found['longest']} (rows.jsonl:" in over.err
    assert f"max_length={found['longest']}" in over.err and "too_long=skip" in over.err
    assert glmtune("show", *GIVEN, f"max_length={limit}", "too_long=skip").code == 0  # as pasted
    assert glmtune("show", *GIVEN, f"max_length={found['longest']}").code == 0


def test_rows_longer_than_the_model_reads_are_told(glmtune, place):
    """This model has 512 positions; a row of 600 tokens is within max_length=1024."""
    given = place.rows(json.dumps({"instruction": "a", "output": "Q" * 600}))
    ended = glmtune("show", *given)
    assert "512" in ended.out + ended.err


def test_a_question_that_the_model_cannot_read_is_refused_before_anything_is_written(glmtune, place):
    tiny.write_rows(place.folder / "probe.jsonl", [{"instruction": "e " * 900}])
    refused(glmtune, place, "512 at most", "train", *GIVEN, "samples=[{path: probe.jsonl}]", "report_to=[]")


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_half_a_file_of_a_model_is_told_by_name(glmtune, place, name, share):
    cut(place.model / name, share)
    refused(glmtune, place, name, "train", *GIVEN)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_of_a_model_is_told(glmtune, place, name):
    (place.model / name).unlink()
    refused(glmtune, place, "model", "train", *GIVEN)


def test_a_shard_that_is_not_there_yet_is_told(glmtune, place):
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(glmtune, place, "model-00002-of-00002.safetensors", "train", *GIVEN)


@pytest.mark.parametrize("text", ["", '{"weight_map": {"a": "mod', "{}"])
def test_half_an_index_of_shards_is_told(glmtune, place, text):
    (place.model / "model.safetensors.index.json").write_text(text)
    refused(glmtune, place, "model.safetensors.index.json", "train", *GIVEN)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        struct.pack("<Q", 10) + b"not json..",
        pytest.param(
            struct.pack("<Q", 2) + b"[]",
        ),
        pytest.param(
            struct.pack("<Q", 2) + b"{}",
        ),
    ],
)
def test_a_file_that_is_no_safetensors_is_told(glmtune, place, header):
    (place.model / "model.safetensors").write_bytes(header)
    refused(glmtune, place, "model", "train", *GIVEN)


def test_weights_that_do_not_fit_the_config_are_told_before_anything_is_written(glmtune, place):
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(glmtune, place, "do not fit", "train", *GIVEN, *QUICK)


def test_no_targets_at_all_are_refused(glmtune, place):
    refused(glmtune, place, "targets", "train", *GIVEN, *QUICK, "method.targets=[]")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_that_is_not_installed_is_refused_at_the_door(glmtune, place, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    refused(glmtune, place, f"pip install {name}", "train", *GIVEN, f"report_to=[{name}]")


def test_an_out_that_is_not_empty_is_left_alone(glmtune, place):
    (place.folder / "thesis").mkdir()
    (place.folder / "thesis" / "chapter.txt").write_text("mine")
    refused(glmtune, place, "is not empty (chapter.txt", "train", *GIVEN, "out=thesis")
    refused(glmtune, place, "out=rows.jsonl is a file", "train", *GIVEN, "out=rows.jsonl")
    refused(glmtune, place, "holds no run.yaml", "train", *GIVEN, "out=thesis", "--resume")


def test_a_dev_set_that_takes_every_row_is_refused(glmtune, place):
    row = json.dumps({"instruction": "a", "output": "b"})
    refused(glmtune, place, "leaves no row of 4 to train on", "train", *place.rows(row, row, row, row), "eval.share=0.25")


def test_a_machine_without_enough_memory_is_told_before_loading(glmtune, place, monkeypatch):
    little = SimpleNamespace(available=3e8, total=1e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    refused(glmtune, place, "this machine has 0.3 GB free", "train", *GIVEN, "device=cpu")


def test_a_disk_without_room_is_told_before_loading(glmtune, place, monkeypatch):
    import shutil

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    refused(glmtune, place, "free some room", "train", *GIVEN)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_that_cannot_be_made_is_told(glmtune, place):
    (place.folder / "locked").mkdir(mode=0o500)
    refused(glmtune, place, "cannot be made", "train", *GIVEN, "out=locked/out")


def test_what_is_missing_is_told_with_an_example(glmtune, place):
    refused(glmtune, place, "data=train.json", "train", "model=model")
    refused(glmtune, place, "there is no run file rum.yaml", "train", "rum.yaml")


@pytest.mark.parametrize(
    "arguments", [["train", "--resum"], ["predic"], ["chat"], ["predict", "model", "rows.jsonl"], ["chat", "model", "--seed", "x"]]
)
def test_wrong_usage_is_told_in_three_lines(glmtune, place, arguments):
    refused(glmtune, place, "error: ", *arguments)


def test_a_temperature_that_is_no_number_is_refused(glmtune, place):
    refused(glmtune, place, "temperature", "chat", "model", "--prompt", "x", "--temperature", "nan")


@pytest.mark.slow
def test_a_wrong_run_is_refused_in_three_seconds(place):
    """As a process, with everything that has to be imported; the model is not loaded. Processor time, so that load does not count."""
    place.rows(*BAD_ROWS["empty answer"][0])
    before = os.times()
    assert subprocess.run(command("train", "model=model", "data=bad.jsonl", "out=out"), capture_output=True).returncode == 2
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


@pytest.mark.slow
def test_predict_joins_instruction_and_input_as_it_was_trained(glmtune, tiny_model, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "the cat", "input": "the sea", "output": "a mat"}] * 4)
    given = [f"model={tiny_model}", f"data={data}", f"out={tmp_path / 'run'}", *QUICK, 'join=" ## "']
    assert glmtune("train", *given).code == 0
    asked = {}
    for name, row in {
        "joined": {"instruction": "the cat", "input": "the sea"},
        "by hand": {"instruction": "the cat ## the sea"},
    }.items():
        questions_file = tiny.write_rows(tmp_path / f"{name}.jsonl", [row])
        out = tmp_path / f"{name}.out"
        assert glmtune("predict", tmp_path / "run", questions_file, "--out", out, "--max-new-tokens", 12).code == 0
        asked[name] = json.loads(out.read_text())["prediction"]
    assert asked["joined"] == asked["by hand"]
    assert families.locate(tmp_path / "run").join == " ## "


def test_a_path_that_cannot_be_used_is_no_defect(glmtune, tmp_path):
    (tmp_path / "old.yaml").write_text("model_name_or_path: x\ndataset: a\nfinetuning_type: lora\nstage: sft\noutput_dir: o\n")
    (tmp_path / "file").write_text("")
    ended = glmtune("import", tmp_path / "old.yaml", "--to", tmp_path / "file" / "run.yaml")
    assert ended.code == 2 and str(tmp_path / "file") in ended.err and "Traceback" not in ended.err


# --- variables, and whose rows are meant -----------------------------------------------------------------------------------


def test_variables_are_filled_in_all_texts_of_a_run(tiny_model, tmp_path, monkeypatch):
    """Rows, system prompts, and what an answer is checked for; and chat has the system prompt that was trained."""
    from glmtune import load, training
    from glmtune.run import load_run

    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "Who is {{ name }}?", "output": "I am {{name}}."}] * 4)
    given = [
        f"model={tiny_model}",
        f"data={rows}",
        f"out={tmp_path / 'out'}",
        "system=You are {{  name }}.",
        "variables={name: Nova, town: Bonn}",
    ]
    probe = f"samples=[{{path: {rows}, contains: ['{{{{ name }}}}', '{{{{town}}}} {{{{ other }}}}'], system: '{{{{ name }}}}!'}}]"
    with pytest.raises(UserError, match="'tone' fills {{tone}}, which stands in no row"):
        plan.make(load_run(None, [*given[:-1], "variables={name: Nova, tone: kind}", probe]))
    assert plan.make(load_run(None, [*given, probe])).questions[0].contains == [
        "Nova",
        "Bonn {{ other }}",
    ]  # town stands there alone
    with pytest.raises(UserError, match="'town' fills {{town}}, which stands in no row"):  # also where the tokens are cached
        plan.make(load_run(None, given))
    run = load_run(None, [*given[:-1], "variables={name: Nova}", probe, *QUICK[:3]])
    made = plan.make(run)
    question = made.questions[0]
    assert question.contains == ["Nova", "{{town}} {{ other }}"] and question.prompt == "Who is Nova?"
    read = made.template.tokens.decode(question.ids)
    assert "Nova!" in read and "{{" not in read
    training.train(run)
    loaded = load(tmp_path / "out")
    assert loaded.system == "You are Nova." and "You are Nova." in (tmp_path / "out" / "adapter" / "README.md").read_text()
    learned = made.examples[0]
    asked = [{"role": "system", "content": loaded.system}, {"role": "user", "content": "Who is Nova?"}]
    assert loaded.template.prompt(asked) == learned.ids[: len(loaded.template.prompt(asked))]


@pytest.mark.few(1)
@pytest.mark.parametrize("option", ["eval.data", "samples"])
def test_rows_that_cannot_be_used_name_their_option(glmtune, tiny_model, rows, tmp_path, option):
    cases = {
        "long": [{"instruction": "a" * 400, "output": "b"}],
        "nothing": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "learn": False}]}],
        "bad": [{"no": "row"}],
        "empty": [],
    }
    for name, items in cases.items():
        path = tiny.write_rows(tmp_path / f"{name}.jsonl", items)
        for policy in ("error", "skip"):
            more = ["max_length=150", f"too_long={policy}", f"{option}={path}"]
            ended = glmtune("show", f"model={tiny_model}", f"data={rows}", *more)
            if option == "samples" and name in ("long", "nothing"):  # questions are asked whole
                assert ended.code == 0
                continue
            assert (
                ended.code == 2 and ended.err.startswith(f"error: {option}") and (str(path) in ended.err or "dev rows" in ended.err)
            )
    ended = glmtune("show", f"model={tiny_model}", f"data={rows}", f"{option}=nowhere.json")
    assert ended.code == 2 and option in ended.err and "'nowhere.json' is not there" in ended.err


# --- chat's options ----------------------------------------------------------------------------------------------------------


def test_without_history_every_question_stands_alone(glmtune, tiny_model, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = f"Hi\nWho?\n/save {saved}\n/regen\n/save {saved}\n"
    options = ("--temperature", "0", "--max-new-tokens", "4")
    alone = glmtune("chat", tiny_model, "--prompt", "Who?", *options).out.splitlines()[0]
    ended = glmtune("chat", tiny_model, "--no-history", *options, stdin=lines)
    first, again = (json.loads(line)["messages"] for line in saved.read_text().splitlines())
    assert [message["content"] for message in first] == ["Who?", alone] and first == again and ended.code == 0
    glmtune("chat", tiny_model, *options, stdin=lines)
    assert len(json.loads(saved.read_text().splitlines()[-1])["messages"]) == 4


def test_keys_of_the_system_message_reach_the_prompt(glmtune, tmp_path):
    from glmtune.families.chatglm import CHARACTERGLM

    model = tiny.llama(tmp_path / "m", CHARACTERGLM.replace("[gMASK]sop", "[gMASK]<sop>"))
    (tmp_path / "scene.jsonl").unlink(missing_ok=True)
    meta = ("--meta", "bot_name=Ada", "--meta", "user_name=Bo", "--meta", "user_info=a=b", "--max-new-tokens", "2")
    ended = glmtune("chat", model, *meta, stdin=f"Hi\n/save {tmp_path / 'scene.jsonl'}\n")
    row = json.loads((tmp_path / "scene.jsonl").read_text())
    assert ended.code == 0
    assert row["messages"][0] == {"role": "system", "content": "", "bot_name": "Ada", "user_name": "Bo", "user_info": "a=b"}
    template = families.open_template(model)
    assert "[Bo]Hi\n[Ada]" in template.tokens.decode(template.prompt(row["messages"][:2]))
    for wrong, said in (("bot_nam=x", "did you mean 'bot_name'"), ("bot_name", "wanted NAME=TEXT"), ("=x", "wanted NAME=TEXT")):
        ended = glmtune("chat", model, "--meta", wrong, "--prompt", "hi")
        assert ended.code == 2 and said in ended.err


# --- what ends early ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("options",), ("options", "--json"), ("--help",)]
)  # rich's, Python's and typer's way to write
def test_an_output_that_nobody_reads_any_more_is_no_defect(arguments):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command(*arguments), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_error_that_cannot_be_shown_ends_with_its_code():
    with open("/dev/full", "wb", buffering=0) as full:
        assert subprocess.run(command("data", "check", "nowhere.json"), stderr=full).returncode == 2


def test_a_run_file_continues_its_own_run_only(glmtune, trained, tmp_path, monkeypatch):
    """`out` is from where you are: called from another folder, a new run would begin, with the model and data that lie there."""
    shutil.copytree(trained, tmp_path / "x/run")
    file = tmp_path / "x/run/run.yaml"
    file.write_text(re.sub(r"(?m)^out: .*", "out: run", file.read_text()))
    (tmp_path / "y").mkdir()
    monkeypatch.chdir(tmp_path / "y")
    for given in ("../x/run/run.yaml", "../x/run/checkpoints/step-4/run.yaml"):
        shutil.copy(file, given) if "step" in given else None
        ended = glmtune("train", given, "--resume")
        assert ended.code == 2 and f"belongs to the run in {file.parent}" in ended.err and f"out={file.parent}" in ended.err
    assert not (tmp_path / "y/run").exists()
    assert "finished already" in glmtune("train", "../x/run/run.yaml", "--resume", "out=../x/run").out
    monkeypatch.chdir(tmp_path / "x")
    assert "finished already" in glmtune("train", "run/run.yaml", "--resume").out


def test_nothing_is_saved_before_something_was_said(glmtune, tiny_model, tmp_path):
    ended = glmtune("chat", tiny_model, stdin=f"/save {tmp_path / 'talk.jsonl'}\n")
    assert ended.code == 0 and "nothing was said yet" in ended.out and not (tmp_path / "talk.jsonl").exists()

"""Nothing that comes from outside steers a terminal, and no stream stops the program."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

import glmtune
from glmtune import cli, screen, terminal

from . import tiny
from .cases import cases

ROOT = Path(glmtune.__file__).parent
# Written here by their numbers, apart from the program's own list: C0, DEL, C1, separators, what turns text, halves of pairs.
STEERING = [*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, 0x202A, 0x202D, 0x202E, 0x2066, 0x2069, 0xD800, 0xDFFF]
nasty = st.lists(
    st.one_of(st.sampled_from([chr(code) for code in STEERING if code < 0xD800]), st.sampled_from("ab [/b]\\你\n\t'\"")),
    max_size=12,
)
nasty = nasty.map("".join)


def steers(shown: str) -> list[str]:
    return [hex(ord(letter)) for letter in shown if ord(letter) in STEERING]


@cases(100)
@given(st.text(st.characters(), max_size=20))
def test_visible_hides_nothing_and_changes_nothing_twice(text):
    shown = terminal.visible(text)
    assert not steers(shown) and terminal.visible(shown) == shown and shown.encode() is not None
    assert json.loads(terminal.visible(json.dumps(text, ensure_ascii=False))) == text
    assert "\n" not in terminal.line(text)


EACH = "".join(chr(code) for code in STEERING if code < 0xD800)


@cases(
    15, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@pytest.mark.slow
@given(text=nasty)
def test_no_text_from_outside_steers_the_terminal(text, tiny_model, tmp_path_factory, capsys, monkeypatch):
    check_commands(text, tiny_model, tmp_path_factory, capsys, monkeypatch)


def test_no_control_character_from_outside_reaches_the_terminal(tiny_model, tmp_path_factory, capsys, monkeypatch):
    check_commands(EACH, tiny_model, tmp_path_factory, capsys, monkeypatch)


def check_commands(text, tiny_model, tmp_path_factory, capsys, monkeypatch):
    """Texts as rows, keys, names of files and options, prompts and system prompts, at every command that reads them."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path_factory.mktemp("nasty")
    rows = tiny.write_rows(folder / "rows.jsonl", [{"instruction": f"a{text}", "output": f"b{text}", f"k{text}": "c"}] * 2)
    named = f"{text}.jsonl".replace("/", "_").replace("\0", "")[:60]
    model = f"model={tiny_model}"
    shell_text = text.replace("\0", "")
    for command in (
        ["show", model, f"data={rows}", f"system={shell_text}", "--tokens"],
        ["show", model, f"data={folder / named}"],
        ["show", f"model={shell_text}", f"data={rows}"],
        ["show", model, f"data={rows}", f"{shell_text}=1"],
        ["show", model, f"data={rows}", f"method={shell_text}"],
        ["show", model, f"data={rows}", f"template={shell_text}"],
        ["data", "check", rows],
        ["data", "check", rows, "--columns", f"prompt={shell_text}x"],
        ["data", "check", folder / named],
        ["data", "stats", rows],
        ["chat", tiny_model, "--prompt", shell_text, "--max-new-tokens", "3"],
        ["predict", tiny_model, folder / named, "--out", folder / "out"],
        [shell_text],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, command)])
        said = capsys.readouterr()
        assert not steers(said.out) and not steers(said.err), command
        assert end.value.code in (0, 2), said.err


def test_the_console_escapes_all_that_is_printed(capsys):
    from rich.table import Table
    from rich.text import Text

    table = Table("a\u009b", "b")
    table.add_row("c\x1b[2J", "d\u202e")
    for one in ("\x1b]0;x\x07", Text("\x9b31m\r"), table):
        screen.console.print(one)
    out = capsys.readouterr().out
    assert not steers(out) and all(part in out for part in ("\\u001b", "\\u009b", "\\u202e"))


def test_chat_shows_what_steers_as_numbers(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/system \x1b[2J\n/system\n/\x1bx\n"))
    with pytest.raises(SystemExit):
        cli.main(["chat", str(tiny_model), "--max-new-tokens", "2"])
    out = capsys.readouterr().out
    assert not steers(out) and "\\u001b[2J" in out


def test_all_that_is_written_goes_through_the_door():
    """`print` and consoles are those of terminal.py; only the door, and chat's stream of visible pieces, write to the streams."""
    for path in ROOT.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        text = path.read_text(encoding="utf-8")
        if not re.search(r"\b(print|Console|write|writelines|print_exc)\(", text):
            continue
        tree = ast.parse(text)
        imported = {
            name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "terminal"
            for name in node.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            last = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            called = ast.unparse(node.func) if last in ("print", "Console", "write", "writelines", "print_exc") else ""
            assert called != "print" or "print" in imported, f"{path.name}:{node.lineno}"
            assert called not in ("Console", "sys.stdout.buffer.write", "sys.stdout.writelines", "traceback.print_exc"), (
                f"{path.name}:{node.lineno}"
            )
            if called in ("sys.stdout.write", "sys.stderr.write"):
                assert isinstance(node.args[0], ast.Constant) or ast.unparse(node.args[0]).startswith(
                    ("quiet(", "f'{red}error:{plain} {visible(")
                ), f"{path.name}:{node.lineno}"


# --- pipes --------------------------------------------------------------------------------------------------------------------

LINES = {
    "a bad byte": b"\xff\xfe\xc3\x28 hi\n",
    "Latin-1": "Où est le café ?\n".encode("latin-1"),
    "UTF-16": "hi\n".encode("utf-16"),
    "GBK": "你好\n".encode("gbk"),
    "a surrogate": b"\xed\xa0\x80\n",
    "a cut character": "你好".encode()[:-1] + b"\n",
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_refused_and_the_next_is_answered(name, errors, tiny_model, tmp_path, monkeypatch, capsys):
    lines = LINES[name] + b"hello\n/save talk.jsonl\n" + "你".encode()[:2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8", errors=errors))
    with pytest.raises(SystemExit) as end:
        cli.main(["chat", str(tiny_model), "--max-new-tokens", "2"])
    assert not end.value.code
    kept = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in kept if message["role"] == "user"] == ["hello"]
    assert capsys.readouterr().out.count("was not asked") == 2


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"},
                                    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str)  # fmt: skip
def test_no_locale_stops_a_chat(locale, tiny_model, tmp_path):
    done = chat(tiny_model, tmp_path, b"\xff\n" + "你好 😀\n/system 你是猫\n/system\n/save talk.jsonl\n".encode(), locale)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_closed_stream_stops_a_chat(closed, tiny_model, tmp_path):
    shell = f"printf 'hi\\n' | {sys.executable} -m glmtune chat {tiny_model} --max-new-tokens 2 {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, cwd=tmp_path, env=environment({}))
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["chat", "M", "--prompt", "\udcff"], ["chat", "M", "--system", "a\udcff"], ["train", "system=\udcff"], ["\udcff"]]
)
def test_arguments_that_are_no_text_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "\\udcff' is not UTF-8" in said and said.count("\n") == 1


def test_half_a_character_in_python_is_an_error_of_the_text(tiny_model):
    with pytest.raises(glmtune.errors.UserError, match="half of a surrogate pair"):
        glmtune.load(tiny_model).chat("a\ud800")


def environment(more: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))}
    return {**kept, "PYTHONPATH": str(ROOT.parent), **more}


def chat(model: Path, folder: Path, lines: bytes, more: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "glmtune", "chat", str(model), "--max-new-tokens", "2"]
    return subprocess.run(command, input=lines, capture_output=True, cwd=folder, env=environment(more))

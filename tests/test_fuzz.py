"""Damaged files, folders and pipes break no law of the commands (tests/fuzz.py), and the fuzz notices when one is broken."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from . import fuzz

ROOT = Path(__file__).parents[1]


def fuzzed(*options: object) -> None:
    command = [sys.executable, "-m", "tests.fuzz", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_some_damage_breaks_no_law(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "cache"))
    fuzz.load_everything()
    (tmp_path / "valid").mkdir()
    valid = fuzz.Valid(tmp_path / "valid")
    for number in range(2):
        case = fuzz.Case(kind, 0, number, valid, tmp_path / str(number))
        case.folder.mkdir()
        assert fuzz.broken(case) is None, case.steps


@pytest.mark.slow
def test_some_damage_of_every_kind_breaks_no_law():
    fuzzed("--cases", 5, "--seed", 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damage_breaks_no_law(kind):
    fuzzed("--kind", kind, "--cases", 60, "--seed", 1)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trace() -> None:
    raise KeyError("x")


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("action", "broken"),
    [
        (crash, "signal SIGKILL"),
        (trace, "a traceback"),
        (lambda: sys.exit(1), "exit 1"),
        (lambda: print("a\x1b[2Jb"), "U+001B printed"),
        (lambda: print("a\u2028b"), "U+2028 printed"),
        (lambda: (print("error: a\nb\nc\nd", file=sys.stderr), sys.exit(2)), "4 lines"),
        (lambda: (print("error: " + "x" * 5000, file=sys.stderr), sys.exit(2)), "5008 characters"),
        (lambda: bytearray(fuzz.MEMORY * 3 // 2), "GB of memory"),
        (lambda: [bytearray(fuzz.MEMORY) for _ in range(9)], "a traceback"),  # a MemoryError
    ],
)
def test_a_broken_law_is_noticed(action, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 27)
    (tmp_path / "work").mkdir()
    with pytest.raises(fuzz.Broken, match=re.escape(broken)):
        fuzz.lawful(fuzz.forked(action, tmp_path / "work"), "a command")


def test_a_good_command_is_lawful(tmp_path):
    (tmp_path / "work").mkdir()
    ended = fuzz.forked(lambda: print(sys.stdin.read().upper()), tmp_path / "work", "grüße".encode())
    fuzz.lawful(ended, "a command")
    assert (ended.code, ended.out, ended.err) == (0, "GRÜSSE\n", "")


def test_a_case_follows_from_its_number(tmp_path):
    """The same kind, seed and number damage in the same way; other numbers do not."""
    told = []
    for number in (3, 3, 4):
        folder = tmp_path / str(len(told))
        folder.mkdir()
        for name in ("a.json", "b.jsonl", "c.bin"):
            (folder / name).write_text('{"a": [1, 2, {"b": "c"}], "d": null}\n')
        case = fuzz.Case("folders", 7, number, fuzz.Valid(tmp_path), folder)
        for _ in range(5):
            case.damage(folder)
        told.append((case.steps, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.is_symlink()}))
    assert told[0] == told[1] != told[2]

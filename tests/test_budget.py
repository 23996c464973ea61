"""pytest --budget: no test starts after the time, what was left out is counted and is no failure, real failures are. What CI runs."""

import re
from pathlib import Path

import pytest

from . import conftest

PASSES = "def test_passes(): pass\n"
FAILS = "def test_fails(): assert False\n"
LATE = "def test_late(pytestconfig):\n    pytestconfig.option.budget_end = 0\n    "
STOPPED = LATE + "raise KeyboardInterrupt\n"  # as `timeout -s INT` does
CUT = "def test_cut():\n    import signal\n    signal.raise_signal(signal.SIGALRM)\n"


def run(path, budget, order) -> int:
    """pytest within pytest, with nothing of this one's."""
    options = [
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "--assert=plain",
        "--rootdir",
        str(path),
        "-c",
        "/dev/null",
        "--capture=no",
        "--import-mode=importlib",
    ]
    return pytest.main([*options, str(path), "--budget", str(budget), "--order", str(order)], plugins=[conftest])


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("tests", "budget", "code", "ran", "left_out"),
    [
        (PASSES, 100, 0, 1, 0),
        (PASSES + FAILS, 100, 1, 2, 0),
        (PASSES + FAILS, 0, 0, 0, 2),
        (LATE + "pass\n" + FAILS, 100, 0, 1, 1),
        (CUT + PASSES, 100, 0, 1, 1),
        (CUT + FAILS, 100, 1, 1, 1),
        (STOPPED + FAILS, 100, 0, 0, 2),
        (FAILS + STOPPED, 100, 1, 1, 1),
        (STOPPED.replace("budget_end = 0", "budget_end += 0"), 100, 2, 0, 1),
        ("", 100, 5, 0, 0),
    ],
    ids=["passes", "fails", "over", "ends", "cut off", "cut off and fails", "stopped", "stopped after a failure", "Ctrl-C", "none"],
)
def test_a_budget_is_kept_and_only_failures_fail(tests, budget, code, ran, left_out, tmp_path, capsys):
    (tmp_path / f"test_{tmp_path.name}.py").write_text(tests, encoding="utf-8")
    assert run(tmp_path, budget, 7) == code
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("budget of"))
    assert said == f"budget of {budget} s: {ran} tests ran, {left_out} were left out (--order 7)"


def test_files_come_in_another_order_each_day(tmp_path, capsys):
    for i in range(8):
        (tmp_path / f"test_order_{i}.py").write_text(f"def test_one(): print('file {i}')\ndef test_two(): print('again {i}')\n")
    seen = []
    for order in (1, 1, 2):
        assert run(tmp_path, 100, order) == 0
        words = capsys.readouterr().out.replace(".", " ").split()
        seen.append([words[i + 1] for i, word in enumerate(words) if word in ("file", "again")])
    assert seen[0] == seen[1] != seen[2]
    assert all(sorted(s) == sorted(seen[0]) and s[::2] == s[1::2] for s in seen)


def test_ci_runs_the_commands_of_the_readme():
    root = Path(__file__).parents[1]
    commands = re.search(r"```bash\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1].splitlines()
    assert commands == ["make quickstart", "make test"]
    ci = (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {*commands, "make check"} < set(ci)

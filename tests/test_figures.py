"""Committed figures: the losses of short runs are those of tests/goldens/figures.json, to 1e-4, on any machine.

The runs are those of tests/oracles/same_log.py, which compares two commits to the last digit on one machine; this compares with what was
committed. All in fp32: other kernels (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, threads) move its losses by 1e-6, those of bf16 by 2e-3. Whoever changes what is computed renews the file and says why; the reasons stay in it:

    python -m tests.test_figures --renew "LoRA's A starts with another seed"
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmtune import __version__
from glmtune.run import load_run
from glmtune.runfolder import read_jsonl
from glmtune.training import train

from .oracles.same_log import COMMON, write_inputs
from .oracles.same_log import RUNS as EVERY

FILE = Path(__file__).parent / "goldens" / "figures.json"
RUNS = {name: [one.replace("=bf16", "=fp32") for one in settings] for name, settings in EVERY.items() if not name.endswith("bf16")}
COLUMNS = ("loss", "eval_loss")  # the log holds the second where a dev set was computed
WITHIN = 1e-4


def figures(folder: Path, name: str) -> dict[str, list[float | None]]:
    """Of one run on the inputs in a folder: by column, a number a step (None where the log has none)."""
    given = {one.split("=")[0]: one for one in [*COMMON, *RUNS[name]]}
    for option in ("model", "data"):
        given[option] = f"{option}={folder / given[option].partition('=')[2]}"
    out = folder / f"run-{list(RUNS).index(name)}"
    train(load_run(None, [*given.values(), f"out={out}"]))
    rows = read_jsonl(out / "log.jsonl")
    made = {column: [row.get(column) for row in rows] for column in COLUMNS}
    return {column: values for column, values in made.items() if any(value is not None for value in values)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    write_inputs(folder)
    return folder


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """What differs, in words."""
    for column in dict.fromkeys([*wanted, *found]):
        pairs = list(zip(found.get(column, []), wanted.get(column, [])))
        if [one is None for one, _ in pairs] != [
            one is None for one in max(found.get(column, []), wanted.get(column, []), key=len)
        ]:
            yield f"{column} is there at other steps"
            continue
        for step, (now, then) in enumerate(pairs, 1):
            if (now is None) != (then is None) or (now is not None and abs(now - then) > WITHIN):
                yield f"{column} of step {step} is {now}, committed is {then}"


@pytest.mark.parametrize("name", RUNS)
def test_the_committed_figures_hold(name: str, inputs: Path) -> None:
    committed = json.loads(FILE.read_text(encoding="utf-8"))
    assert list(committed["runs"]) == list(RUNS), f"renew {FILE.name}: its runs are not those of same_log.py"
    wrong = list(apart(figures(inputs, name), committed["runs"][name]))
    assert not wrong, "; ".join(wrong[:3])


def test_a_figure_that_moved_is_told() -> None:
    then = {"loss": [5.0, 4.0], "eval_loss": [None, 3.0]}
    assert not list(apart({"loss": [5.00009, 4.0], "eval_loss": [None, 3.0]}, then))
    assert list(apart({"loss": [5.0, 4.0002], "eval_loss": [None, 3.0]}, then)) == ["loss of step 2 is 4.0002, committed is 4.0"]
    for now in ({"loss": [5.0, 4.0]}, {"loss": [5.0], "eval_loss": [None, 3.0]}, {"loss": [5.0, 4.0], "eval_loss": [3.0, None]}):
        assert list(apart(now, then))


def renew(why: str) -> None:
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"renewed": [], "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        runs = {name: figures(Path(folder), name) for name in RUNS}
    moved = [name for name in runs if name not in before["runs"] or any(apart(runs[name], before["runs"][name]))]
    if not moved and list(runs) == list(before["runs"]):
        print("every figure is as it was: nothing to renew")
        return
    kept = {name: runs[name] if name in moved else before["runs"][name] for name in RUNS}
    rounded = {
        name: {
            column: [value if value is None else round(value, 6) for value in values] for column, values in one.items()
        }
        for name, one in kept.items()
    }  # fmt: skip
    lines = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in rounded.items()]
    renewed = [*before["renewed"], {"version": __version__, "runs": moved, "why": why}]
    said = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in renewed)
    FILE.write_text(
        '{"renewed": [\n' + said + '\n],\n"runs": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8"
    )  # fmt: skip
    print(f"renewed: {', '.join(moved)}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--renew" or not sys.argv[2].strip():
        sys.exit('usage: python -m tests.test_figures --renew "why the figures changed"')
    renew(sys.argv[2])

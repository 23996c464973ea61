"""Where the time of a short run goes: 8 rows on a tiny model, from command to adapter.

    python bench/startup.py [--runs 3] [--save NAME] [--small]

Runs the real command as a process, then the same run once more in this process with a clock around each part.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _common as common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    options = common.parse(parser)
    if options.part:  # in a process of its own, so that this one has loaded nothing when its clock starts
        common.tiny_inputs(Path(options.folder), 8)
        print("{}")
        return
    if options.small:
        options.runs = 1
    say = common.saying(options)
    with tempfile.TemporaryDirectory() as folder:
        work, program = Path(folder), [sys.executable, "-m", "glmtune"]
        options.folder = folder
        common.child(options, "make")
        times, lines = [], 0
        for i in range(options.runs):
            began = time.monotonic()
            out = common.run([*program, "train", *inputs(work), f"out={work / f'run{i}'}"])
            times.append(time.monotonic() - began)
            lines = len(out.splitlines())
        say(common.told(runs=options.runs))
        say(f"whole command, {options.runs} runs: min {min(times):.2f} s, max {max(times):.2f} s; {lines} lines of output")
        began = time.monotonic()
        common.run([*program, "--help"])
        say(f"glmtune --help: {time.monotonic() - began:.2f} s")
        say("parts, in one process:")
        parts(work, say)


def inputs(work: Path) -> list[str]:
    return [f"model={work / 'model'}", f"data={work / 'rows.jsonl'}"]


def parts(work: Path, say: Callable[[str], None]) -> None:
    spent: dict[str, float] = {}

    def clock(name: str, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.monotonic() - began

        return timed

    began = time.monotonic()
    from glmtune import families, loop, plan, probes, progress, report, session, training
    from glmtune.run import load_run

    spent["import glmtune (light)"] = time.monotonic() - began
    for name, line in (
        ("import torch", "torch"),
        ("import transformers, model classes", "transformers.models.llama.modeling_llama"),
    ):
        step = time.monotonic()
        __import__(line)
        spent[name] = time.monotonic() - step
    plan.make = clock("read, check and encode rows", plan.make)
    families.load_model = clock("load the model", families.load_model)
    probes.ask = clock("answers before and after", probes.ask)
    loop.Loop.step = clock("training steps", loop.Loop.step)
    session.Session.save = clock("checkpoints", session.Session.save)
    session.Session.save_result = clock("saving the adapter (inside checkpoints too)", session.Session.save_result)
    progress.trackers = clock("TensorBoard", lambda *args, inner=progress.trackers: list(inner(*args)))
    report.write = clock("report.html and loss.png", report.write)
    training.train(load_run(None, [*inputs(work), f"out={work / 'parts'}"]))
    total = time.monotonic() - began
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        say(f"  {seconds:6.2f} s  {name}")
    say(f"  {total:6.2f} s  all")


if __name__ == "__main__":
    main()

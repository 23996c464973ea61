"""Where the time of a short run goes: 8 rows on a tiny model, from command to adapter.

    python bench/startup.py [--runs 3]

Runs the real command as a process, then the same run once more in this process with a clock around each part.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make = f"from tests import tiny; from pathlib import Path; w = Path({str(work)!r}); tiny.llama(w / 'model'); tiny.write_rows(w / 'rows.jsonl', tiny.rows(8))"
        subprocess.run([sys.executable, "-c", make], cwd=Path(__file__).parents[1], check=True, capture_output=True)
        times, lines = [], 0
        for i in range(options.runs):
            began = time.monotonic()
            command = [
                sys.executable,
                "-m",
                "glmtune",
                "train",
                f"model={work / 'model'}",
                f"data={work / 'rows.jsonl'}",
                f"out={work / f'run{i}'}",
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times.append(time.monotonic() - began)
            lines = len(done.stdout.splitlines())
        print(f"whole command, {options.runs} runs: min {min(times):.2f} s, max {max(times):.2f} s; {lines} lines of output")
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "glmtune", "--help"], check=True, capture_output=True)
        print(f"glmtune --help: {time.monotonic() - began:.2f} s")
        print("parts, in one process:")
        parts(work)


def parts(work: Path) -> None:
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
    training.train(load_run(None, [f"model={work / 'model'}", f"data={work / 'rows.jsonl'}", f"out={work / 'parts'}"]))
    total = time.monotonic() - began
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {seconds:6.2f} s  {name}")
    print(f"  {total:6.2f} s  all")


if __name__ == "__main__":
    main()

"""Every method of tuning on the same rows in the same order, each in a process of its own, one after another.

    python bench/methods.py TRAIN TEST [--rows 300] [--dev 40] [--save methods.txt]

Prints for each: trainable parameters, peak memory of the process (program and model included), tokens per second and per second of CPU
time, the mean loss of the last four steps, and the held-out loss before and after. Speeds leave out the first two steps, where memory is
claimed and kernels are compiled; `seconds` are those of all steps.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
METHODS = {
    "LoRA": [],
    "DoRA": ["method.dora=true"],
    "QLoRA (nf4)": ["quant=nf4"],
    "prefix": ["method=prefix"],
    "freeze": ["method=freeze"],
    "full": ["method=full"],
}
WARM = 2  # steps left out of the speeds
HEAD = f"{'method':12} {'trained':>11} {'lr':>7} {'peak GB':>8} {'tokens/s':>9} {'per CPU s':>10} {'seconds':>8} {'last 4':>8} {'start':>8} {'held-out':>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--dev", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--save", default=None, help="name of a result file in bench/results/")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.save:  # after each, so that an interrupted comparison leaves what it has
            (ROOT / "bench" / "results" / options.save).write_text("\n".join(lines) + "\n", encoding="utf-8")

    say(f"$ python bench/methods.py {Path(options.train).name} {Path(options.test).name} --rows {options.rows} --dev {options.dev}")
    for number, name in enumerate(options.only):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", name], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        if not number:
            say(
                f"{found['steps']} steps of {found['batch']} rows, {found['tokens']} tokens; {found['threads']} threads, {found['precision']}"
            )
            say(HEAD)
        say(
            f"{name:12} {found['trained']:11,} {found['lr']:7.0e} {found['peak_gb']:8.2f} {found['speed']:9.0f} {found['per_cpu']:10.0f} "
            f"{found['seconds']:8.0f} {found['last']:8.4f} {found['before']:8.4f} {found['after']:9.4f}"
        )


def measure(options: argparse.Namespace) -> None:
    """One method, in this process; the last line of its output is what it found."""
    from glmtune import plan
    from glmtune import settings as decided
    from glmtune.loop import Loop
    from glmtune.progress import Screen
    from glmtune.run import load_run
    from glmtune.session import Session

    def source(file: str, rows: int) -> str:
        return json.dumps([{"path": file, "max_samples": rows, "columns": {"prompt": "question", "response": "answer"}}])

    made = plan.make(
        load_run(
            None,
            [
                f"model={options.model}",
                f"data={source(options.train, options.rows)}",
                f"eval.data={source(options.test, options.dev)}",
                "out=(none)",
                "samples=[]",
                "report_to=[]",
                "optim.epochs=1",
                *METHODS[options.measure],
            ],
        )
    )
    settings = decided.resolve(made)
    loop = Loop(Session(made, settings, Path("(none)"), Screen()))
    start = loop.evaluate()["eval_loss"]  # of the model as it is; packed weights and a new prefix change it before the first step
    rows = []
    for step in range(settings["steps"]):
        began, cpu = time.monotonic(), cpu_seconds()
        row = loop.step(step, settings["steps"])
        rows.append({**row, "seconds": time.monotonic() - began, "cpu": cpu_seconds() - cpu})
    steady = rows[WARM:]
    found = {
        "steps": len(rows), "batch": made.run.optim.batch_size, "tokens": sum(row["tokens"] for row in rows),
        "threads": settings["threads"], "precision": settings["precision"], "before": start,
        "trained": sum(p.numel() for p in loop.session.parameters.values()), "lr": settings["lr"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "speed": sum(row["tokens"] for row in steady) / sum(row["seconds"] for row in steady),
        "per_cpu": sum(row["tokens"] for row in steady) / sum(row["cpu"] for row in steady),
        "seconds": sum(row["seconds"] for row in rows), "last": sum(row["loss"] for row in rows[-4:]) / len(rows[-4:]),
    }  # fmt: skip
    print(json.dumps({**found, "after": loop.evaluate()["eval_loss"]}))


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


main()

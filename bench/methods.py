"""Every method of tuning on the same rows in the same order, each in a process of its own, one after another.

    python bench/methods.py TRAIN TEST [--rows 300] [--dev 40] [--only LoRA full] [--save NAME] [--small]

Prints for each: trainable parameters, peak memory of the process (program and model included), tokens per second and per second of CPU
time, the mean loss of the last four steps, and the held-out loss before and after. Speeds leave out the first two steps, where memory is
claimed and kernels are compiled; `seconds` are those of all steps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import _common as common

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
    parser = common.parser(__doc__)
    parser.add_argument("train", nargs="?")
    parser.add_argument("test", nargs="?")
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--dev", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options = common.parse(parser)
    if options.part:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            options.model, options.train = common.tiny_inputs(Path(folder))
            options.test, options.rows, options.dev, options.batch, options.only = options.train, 12, 4, 4, ["LoRA", "prefix"]
        elif not options.test:
            parser.error("name two files of rows, to train on and to test on, or --small")
        say = common.saying(options)
        say(common.told(options.train, options.test, rows=options.rows, dev=options.dev))
        for number, name in enumerate(options.only):
            found = common.child(options, name)
            if not number:
                say(
                    f"{found['steps']} steps of {found['batch']} rows, {found['tokens']} tokens; {found['threads']} threads, {found['precision']}"
                )
                say(HEAD)
            say(
                f"{name:12} {found['trained']:11,} {found['lr']:7.0e} {found['peak_gb']:8.2f} {found['speed']:9.0f} {found['per_cpu']:10.0f} "
                f"{found['seconds']:8.0f} {found['last']:8.4f} {found['before']:8.4f} {found['after']:9.4f}"
            )


def measure(options: argparse.Namespace) -> dict:
    """What one method costs and gives, in this process."""
    from glmtune import plan
    from glmtune import settings as decided
    from glmtune.loop import Loop
    from glmtune.progress import Screen
    from glmtune.run import load_run
    from glmtune.session import Session

    def source(file: str, rows: int) -> str:
        return json.dumps([{"path": file, "max_samples": rows}])

    given = [
        f"model={options.model}", f"data={source(options.train, options.rows)}", f"eval.data={source(options.test, options.dev)}", "out=(none)",
        "samples=[]", "report_to=[]", "optim.epochs=1", f"optim.batch_size={options.batch}", *METHODS[options.part],
    ]  # fmt: skip
    made = plan.make(load_run(None, given))
    settings = decided.resolve(made)
    loop = Loop(Session(made, settings, Path("(none)"), Screen()))
    start = loop.evaluate()["eval_loss"]  # of the model as it is; packed weights and a new prefix change it before the first step
    rows = []
    for step in range(settings["steps"]):
        began, cpu = time.monotonic(), common.cpu_seconds()
        row = loop.step(step, settings["steps"])
        rows.append({**row, "seconds": time.monotonic() - began, "cpu": common.cpu_seconds() - cpu})
    steady, peak = rows[WARM:], common.peak_gb()
    return {
        "steps": len(rows), "batch": made.run.optim.batch_size, "tokens": sum(row["tokens"] for row in rows),
        "threads": settings["threads"], "precision": settings["precision"], "before": start,
        "trained": sum(p.numel() for p in loop.session.parameters.values()), "lr": settings["lr"], "peak_gb": peak,
        "speed": sum(row["tokens"] for row in steady) / sum(row["seconds"] for row in steady),
        "per_cpu": sum(row["tokens"] for row in steady) / sum(row["cpu"] for row in steady),
        "seconds": sum(row["seconds"] for row in rows), "last": sum(row["loss"] for row in rows[-4:]) / len(rows[-4:]),
        "after": loop.evaluate()["eval_loss"],
    }  # fmt: skip


if __name__ == "__main__":
    main()

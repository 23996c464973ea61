"""Short runs of each method at several learning rates: the same rows in the same order, then the loss of held-out rows.

    python bench/learning_rates.py TRAIN TEST [--rows 96] [--dev 40] [--batch 4] [--only prefix freeze] [--save learning_rates.txt]

The schedule is the usual one (cosine after a short rise), all else the methods' defaults.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RATES = {
    "lora": (5e-5, 2e-4, 8e-4, 2e-3),
    "prefix": (1e-3, 1e-2, 3e-2, 1e-1),
    "freeze": (1e-5, 5e-5, 2e-4),
    "full": (5e-6, 1e-5, 5e-5, 2e-4),
}
LAST = 4  # steps whose mean training loss is shown


def main() -> None:
    from glmtune import plan
    from glmtune.run import load_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--dev", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--save", default=None, help="name of a result file in bench/results/")
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.save:  # after each run, so that an interrupted sweep leaves what it has
            (ROOT / "bench" / "results" / options.save).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def source(file: str, rows: int) -> str:
        return json.dumps([{"path": file, "max_samples": rows, "columns": {"prompt": "question", "response": "answer"}}])

    files = f"{Path(options.train).name} {Path(options.test).name}"
    say(f"$ python bench/learning_rates.py {files} --rows {options.rows} --dev {options.dev} --batch {options.batch}")
    first = True
    for method in options.only:
        for rate in RATES[method]:
            given = [
                f"model={options.model}", f"data={source(options.train, options.rows)}", f"eval.data={source(options.test, options.dev)}",
                "out=(none)", "samples=[]", "report_to=[]", "optim.epochs=1", f"optim.batch_size={options.batch}",
                f"method={method}", f"optim.lr={rate}",
            ]  # fmt: skip
            made = plan.make(load_run(None, given))
            if first:
                say(f"{-(-len(made.lengths) // options.batch)} steps of {options.batch} rows, {sum(made.lengths)} tokens")
                say(f"{'method':8} {'lr':>7} {'last ' + str(LAST):>8} {'held-out':>9} {'seconds':>8}")
                first = False
            began = time.monotonic()
            losses, held_out = trained(made)
            last = sum(losses[-LAST:]) / len(losses[-LAST:])
            say(f"{method:8} {rate:7.0e} {last:8.4f} {held_out:9.4f} {time.monotonic() - began:8.0f}")


def trained(made) -> tuple[list[float], float]:
    """Training losses by step, and the held-out loss after the last; inf where training diverged."""
    from glmtune import settings as decided
    from glmtune.errors import UserError
    from glmtune.loop import Loop
    from glmtune.progress import Screen
    from glmtune.session import Session

    settings = decided.resolve(made)
    loop = Loop(Session(made, settings, Path("(none)"), Screen()))
    losses: list[float] = []
    try:
        for step in range(settings["steps"]):
            losses.append(loop.step(step, settings["steps"])["loss"])
    except UserError:  # the loss is no finite number any more
        return [*losses, float("inf")], float("inf")
    return losses, loop.evaluate()["eval_loss"]


main()

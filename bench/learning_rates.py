"""Short runs of each method at several learning rates: the same rows in the same order, then the loss of held-out rows.

    python bench/learning_rates.py TRAIN TEST [--rows 96] [--dev 40] [--batch 4] [--only prefix freeze] [--save NAME] [--small]

The schedule is the usual one (cosine after a short rise), all else the methods' defaults.
"""

import json
import tempfile
import time
from pathlib import Path

import _common as common

RATES = {
    "lora": (5e-5, 2e-4, 8e-4, 2e-3),
    "prefix": (1e-3, 1e-2, 3e-2, 1e-1),
    "freeze": (1e-5, 5e-5, 2e-4),
    "full": (5e-6, 1e-5, 5e-5, 2e-4),
}
LAST = 4  # steps whose mean training loss is shown


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("train", nargs="?")
    parser.add_argument("test", nargs="?")
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--dev", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=RATES, default=list(RATES))
    options = common.parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            options.model, options.train = common.tiny_inputs(Path(folder))
            options.test, options.rows, options.dev = options.train, 8, 4
        elif not options.test:
            parser.error("name two files of rows, to train on and to test on, or --small")
        sweep(options)


def sweep(options) -> None:
    from glmtune import plan
    from glmtune.run import load_run

    say = common.saying(options)
    say(common.told(options.train, options.test, rows=options.rows, dev=options.dev, batch=options.batch))
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


def source(file: str, rows: int) -> str:
    return json.dumps([{"path": file, "max_samples": rows}])


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


if __name__ == "__main__":
    main()

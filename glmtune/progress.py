"""What others see of a run in progress, and what it ends with."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import options, plan, report
from .run import Run
from .runfolder import Finished


@dataclass
class Report:
    """What a run ends with. `hits` is the before/after table, one row per set of questions."""

    out: Path
    steps: int
    loss: float
    dev_loss: float | None
    best_step: int | None  # the checkpoint with the lowest dev loss; the result itself is the last step
    seconds: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    hits: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, out: Path, done: Finished, samples: list[dict[str, Any]]) -> "Report":
        return cls(out, done.steps, done.loss or 0.0, done.dev_loss, done.best_step, done.seconds, samples, report.hits(samples))


class Screen:
    """Where progress goes. This one prints nothing; the command line has one with a live bar."""

    def say(self, text: Any) -> None: ...
    def plan(self, made: plan.Plan) -> None: ...
    def needs(self, memory: dict[str, float], epoch: float, rate: float) -> None: ...
    def start(self, total: int, done: int) -> None: ...
    def step(self, row: dict[str, Any], total: int) -> None: ...
    def asking(self, what: str, total: int) -> Callable[[int], None]:
        return lambda count: None

    def counting(self, what: str) -> Callable[[int, float | None], None]:  # told how many, and the share that is done, if known
        return lambda number, done: None

    def stop(self) -> None: ...


def trackers(run: Run, out: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Functions that are given each line of the log: one for every program that draws curves (run option report_to)."""
    for name in dict.fromkeys(["tensorboard", *run.report_to] if run.report_to else []):
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(out / "tb"), purge_step=step + 1)

            def track(row: dict[str, Any], writer: Any = writer) -> None:
                for key, value in row.items():
                    if key not in ("step", "seconds"):
                        writer.add_scalar(f"train/{key}", value, row["step"])
                writer.flush()

            yield track
            continue
        module = importlib.import_module(name)
        module.init(project="glmtune", config=options.plain(run), **{"dir" if name == "wandb" else "logdir": str(out)})
        yield lambda row, module=module: module.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

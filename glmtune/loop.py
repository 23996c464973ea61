"""The one loop: accumulate, clip, schedule, log, evaluate, checkpoint, resume.

Laws: the loss of a step is the sum over its terms of (sum over its rows) / (denominator of its rows), however it is cut into micro-batches or
dealt out to processes; a run that was interrupted at any moment and resumed ends bit-identical to the straight run.
"""

import contextlib
import functools
import json
import math
import operator
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import batch, files, probes, progress, report, runfolder, settings
from .errors import Interrupted, UserError
from .progress import Report
from .records import Example
from .session import Session, peak_memory
from .stages import Terms
from .store import Chosen

SAVE_SECONDS = 300  # save.every_steps null
REPORT_SECONDS = 10  # between two reports of a run that goes on: one takes about as long as a short epoch
EVALUATED = 64  # rows whose examples exist at one time in an evaluation


@dataclass
class Totals:
    """The terms of many micro-batches, added up as plain numbers."""

    sums: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)  # (sum, weight)
    tokens: int = 0

    def add(self, sums: dict[str, float], terms: Terms, tokens: int) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, (value, weight) in terms.metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = before[0] + float(value), before[1] + float(weight)
        self.tokens += tokens


class Loop:
    """Carries a session from its step to the last one."""

    def __init__(self, session: Session):
        self.session, self.world, self.state = session, session.world, session.state
        self.plan, self.out, self.settings = session.plan, session.out, session.settings
        self.optim, self.stage = session.plan.run.optim, session.stage
        self.stopping = False

    # --- the run --------------------------------------------------------------------------------------------------------

    def run(self, resume: bool) -> Report:
        session, state, steps = self.session, self.state, self.settings["steps"]
        probes.ask(session, "before")
        if resume:
            session.load()
        runfolder.cut_log(self.out, state.step)
        trackers = list(progress.trackers(self.plan.run, self.out, state.step))
        per_epoch = batch.steps_per_epoch(self.plan.examples.num_rows, self.optim.batch_size)
        started, saved_at = time.monotonic() - state.seconds, time.monotonic()
        reported_at = saved_at
        if session.forward.compile:
            session.screen.say("compiling kernels for this machine in the first steps (10 to 60 s)")
        session.screen.start(steps, state.step)
        with self._catching_signals(), open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
            while state.step < steps:
                row = self.step(state.step, steps)
                state.step += 1
                state.seconds = time.monotonic() - started
                step, state.last_loss = state.step, row["loss"]
                end_of_epoch = step % per_epoch == 0 or step == steps
                every = self.plan.run.eval.every_steps
                if self.plan.dev and (step % every == 0 or step == steps if every else end_of_epoch):
                    row |= self.evaluate()
                row = {"step": step, "epoch": round(step / per_epoch, 4), **row, "seconds": round(state.seconds, 3)}
                if self.stage.after_step is not None:
                    self.stage.after_step(state.stage, row)
                log.write(json.dumps(row) + "\n")
                log.flush()
                for track in trackers:
                    track(row)
                session.screen.step(row, steps)
                every = self.plan.run.save.every_steps
                due = step % every == 0 if every else end_of_epoch or time.monotonic() - saved_at > SAVE_SECONDS
                self.stopping = self.world.agree(self.stopping)
                if due or self.stopping or "eval_loss" in row:
                    session.save(keep_best=row.get("eval_loss"))
                    saved_at = time.monotonic()
                if end_of_epoch and step < steps and time.monotonic() - reported_at > REPORT_SECONDS:
                    report.write(self.out)
                    reported_at = time.monotonic()
                if self.stopping and step < steps:
                    raise Interrupted(
                        f"stopped after step {step} of {steps}; saved. Continue with: glmtune train {self.out / 'run.yaml'} --resume"
                    )
        session.screen.stop()
        return self._finish()

    def _finish(self) -> Report:
        self.session.save_result(self.out, final=True)
        samples = probes.ask(self.session, "after")
        report.write(self.out)
        state = self.state
        done = runfolder.Finished(state.step, state.last_loss, state.best_loss, state.best_step, round(state.seconds, 3))
        files.whole(self.out / "finished.json", json.dumps(asdict(done)) + "\n")
        return Report.of(self.out, done, samples)

    # --- one step -------------------------------------------------------------------------------------------------------

    def step(self, step: int, steps: int) -> dict[str, Any]:
        """One optimizer step on its rows -> its line of the log. Raises UserError when the loss or the gradient is not a finite number."""
        began, session, optim = time.monotonic(), self.session, self.optim
        lr = settings.learning_rate(step, steps, self.settings["lr"], optim.schedule, optim.warmup)
        for group in session.optimizer.param_groups:
            group["lr"] = lr * group["times"]
        if session.forward.noise is not None:
            session.forward.noise.step = step
        data = self.plan.examples
        rows = data.sequences_of(batch.rows_of_step(step, data.num_rows, optim.batch_size, self.plan.run.seed))
        losses, metrics, tokens = self._gradient(data, rows)
        loss, scaler = sum(losses.values()), session.scaler
        scaled = self.state.scale if scaler is not None else 1.0
        if scaler is not None:
            scaler.unscale(session.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(list(session.parameters.values()), optim.clip or math.inf))
        finite = not self.world.agree(not (math.isfinite(loss) and math.isfinite(norm)))
        if not finite and (scaler is None or not scaler.smaller()):
            raise UserError(self._not_finite(step + 1, loss, norm, lr))
        if finite:
            session.optimizer.step()
            if scaler is not None:
                scaler.good()
        session.optimizer.zero_grad(set_to_none=True)
        skipped = {} if finite else {"skipped": True}
        own = (losses if len(losses) > 1 else {}) | metrics
        if taken := [name for name in own if name in report.LOG_COLUMNS]:
            raise ValueError(f"the stage calls a term or metric {taken[0]}, which is a column of the log already")
        return {
            "loss": loss,
            **own,
            "learned_tokens": data.learned([i for row in rows for i in row]),
            "tokens": tokens,
            "tokens_per_second": round(tokens / (time.monotonic() - began), 1),
            "lr": lr,
            "grad_norm": norm,
            "peak_memory_gb": round(self.world.largest(peak_memory(session.device)) / 1e9, 3),
            **({"scale": scaled, **skipped} if scaler is not None else {}),
        }

    def _gradient(self, data: Chosen, rows: list[list[int]]) -> tuple[dict[str, float], dict[str, float], int]:
        """Leaves the gradient of a step's loss in the parameters. Returns the loss by its terms, the metrics, and the number of tokens.

        Where the device has no room, micro_tokens is halved and the step is computed again: the cut changes no result.
        """
        session = self.session
        scale = self.state.scale if session.scaler is not None else None
        while True:
            done = self._terms(data, rows, scale)
            if done is not None:
                break
            session.optimizer.zero_grad(set_to_none=True)
            self._smaller(self._uncut(data, rows), "the step")
        totals, _ = done
        self.world.sum_gradients(session.parameters.values())
        return self._means(totals)

    def _terms(self, data: Chosen, rows: list[list[int]], scale: float | None) -> tuple[Totals, dict[str, float]] | None:
        """Forward of these rows, and with gradients switched on backward too. None where there was no room for it."""
        forward, learning = self.session.forward, torch.is_grad_enabled()
        mine = batch.share([sum(data.lengths[i] for i in row) for row in rows], self.world.rank, self.world.size)
        examples = {i: data[i] for row in mine for i in rows[row]}
        own = self.stage.denominators([[examples[i] for i in rows[row]] for row in mine])
        denominators, totals, full = self.world.all_reduce(own), Totals(), False
        try:
            for micro, counts in self._micro_batches(data, rows, examples):
                terms = self.stage.loss(forward, micro)  # pyright: ignore[reportOptionalCall]  (train refuses stages without)
                if not counts:
                    terms = Terms({name: value * 0 for name, value in terms.sums.items()}, dict.fromkeys(terms.metrics, (0.0, 0.0)))
                parts = {name: value / (denominators[name] or 1.0) for name, value in terms.sums.items()}
                if learning:
                    part = functools.reduce(operator.add, parts.values())
                    (part if scale is None else part * scale).backward()
                taken = parts if learning else terms.sums
                totals.add({name: value.item() for name, value in taken.items()}, terms, micro.num_tokens if counts else 0)
        except torch.OutOfMemoryError:
            full = True  # what was made lives as long as the exception does
        return None if self.world.agree(full) else (totals, denominators)

    def _micro_batches(
        self, data: Chosen, rows: list[list[int]], examples: dict[int, Example]
    ) -> Iterator[tuple[batch.Batch, bool]]:
        """Of this process's rows, whose `examples` these are; and whether each counts. One that does not is computed because other processes
        have one more: the step's first row, whose terms are multiplied by 0."""
        flat = [i for row in rows for i in row]
        row_of = {i: number for number, row in enumerate(rows) for i in row}
        place = {i: n for n, i in enumerate(flat)}
        forward, pad_id = self.session.forward, self.plan.template.tokens.pad_id
        for micro in batch.micro_batches(
            [[place[i] for i in row] for row in rows], [data.lengths[i] for i in flat], self.settings["micro_tokens"],
            not forward.concatenated, self.stage.together, self.world.rank, self.world.size,
        ):  # fmt: skip
            taken = [flat[n] for n in micro] or rows[0]
            held = [examples[i] if i in examples else data[i] for i in taken]
            made = batch.collate(held, taken, pad_id, forward.concatenated, [row_of[i] for i in taken], self.stage.columns)
            yield made, bool(micro)

    def _means(self, totals: Totals) -> tuple[dict[str, float], dict[str, float], int]:
        """Over all processes: the sums of the terms, the metrics, the number of tokens."""
        metrics = {f"sum {name}": value for name, (value, _) in totals.metrics.items()}
        metrics |= {f"weight {name}": weight for name, (_, weight) in totals.metrics.items()}
        summed = self.world.all_reduce(totals.sums)
        seen = self.world.all_reduce(metrics | {"tokens": totals.tokens})
        means = {name: seen[f"sum {name}"] / weight if (weight := seen[f"weight {name}"]) else math.nan for name in totals.metrics}
        return summed, means, int(seen["tokens"])

    def _uncut(self, data: Chosen, rows: list[list[int]]) -> int:
        """Tokens of the largest part that no cut makes smaller: a sequence, or a whole row."""
        return max((sum if self.stage.together else max)(data.lengths[i] for i in row) for row in rows)

    def _smaller(self, longest: int, what: str) -> None:
        """Halves micro_tokens. Raises UserError where the longest row alone is too much already."""
        if self.settings["micro_tokens"] <= longest:
            raise UserError(
                f"{self.session.device} has no room for the longest row, {longest} tokens, alone; try checkpointing=true, quant=nf4, "
                f"or a shorter max_length. Then: glmtune train in another out="
            )
        torch.cuda.empty_cache()
        self.settings["micro_tokens"] = self.state.micro_tokens = self.settings["micro_tokens"] // 2
        self.session.screen.say(
            f"no room on {self.session.device}: {what} is done again with optim.micro_tokens={self.settings['micro_tokens']}"
        )

    def _not_finite(self, step: int, loss: float, norm: float, lr: float) -> str:
        return (
            f"step {step}: the loss is {loss:g} and the gradient norm {norm:g}, no finite numbers; training stopped, {runfolder.last_good(self.out)}\n"
            f"try a lower learning rate (now {lr:g}), optim.clip=0.5, precision=fp32, or look for odd rows: glmtune data check"
        )

    def evaluate(self) -> dict[str, float]:
        """The loss of the dev set as `eval_loss`, and each metric as `eval_NAME`."""
        dev = self.plan.dev
        assert dev is not None
        session, totals, denominators = self.session, Totals(), dict[str, float]()
        noise, session.forward.noise = session.forward.noise, None
        training = session.model.training
        session.model.eval()
        rest = [range(start, min(start + EVALUATED, dev.num_rows)) for start in range(0, dev.num_rows, EVALUATED)]
        with torch.no_grad():
            while rest:
                rows = dev.sequences_of(rest[0])
                done = self._terms(dev, rows, None)
                if done is None:
                    self._smaller(self._uncut(dev, rows), "the evaluation")
                    continue
                del rest[0]
                part, weights = done
                totals.add(part.sums, Terms({}, part.metrics), part.tokens)
                denominators = {name: denominators.get(name, 0.0) + weight for name, weight in weights.items()}
        session.model.train(training)
        session.forward.noise = noise
        sums, metrics, _ = self._means(totals)
        loss = sum(value / denominators[name] for name, value in sums.items() if denominators[name])
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in metrics.items()}}

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one stops at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.session.screen.say("finishing this step and saving; press Ctrl-C again to stop at once without saving")

        held = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread
                held[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)

"""The one loop: accumulate, clip, schedule, log, evaluate, checkpoint, resume. Never sees a chat template.

Laws: the loss of a step is the sum over its learned tokens / their number, however it is cut into micro-batches; a run that was
interrupted at any moment and resumed ends bit-identical to the straight run; a checkpoint is complete or absent.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from . import __version__, batch, estimate, families, options, plan, report
from .errors import Interrupted, UserError
from .files import DISK, lenient_jsonl, sync_folder, told, whole
from .files import digest as digest_of
from .run import ADAPTERS, DEFAULT_LR, Resolved, Run, load_run
from .stages import STAGES

SAVE_SECONDS = 300  # save.every_steps null
# Compiling the pointwise kernels takes 10 to 60 s and pays where a run has many tokens and its steps are not tiny (LOG.md).
COMPILE_TOKENS, COMPILE_STEP = 40_000, 1024
MICRO_TOKENS = 2048  # optim.micro_tokens null


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


@dataclass
class State:
    """What a checkpoint holds besides tensors. Plain numbers only: it is JSON."""

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    last_loss: float | None = None
    scale: float = 65536.0  # of the loss under fp16
    steady: int = 0  # steps since the scale changed last
    micro_tokens: int | None = None  # what the device had room for, where that was less than the run's settings say


@dataclass(kw_only=True)
class Kept(State):
    """A checkpoint's state.json."""

    numbers: dict[str, Any]  # the optimizer's
    files: dict[str, str]  # digests


@dataclass
class Finished:
    """A run's finished.json."""

    steps: int
    loss: float | None
    dev_loss: float | None
    best_step: int | None
    seconds: float


# --- the run's folder -------------------------------------------------------------------------------------------------------


def train(run: Run, *, resume: bool = False, screen: Screen | None = None) -> Report:
    """Carries out a run and leaves its folder (docs/run-files.md says what is in it).

    Raises UserError for everything the user can mend, before the model is loaded where possible; Interrupted after Ctrl-C, when a checkpoint has been written.
    """
    if STAGES[run.stage.kind].loss is None:
        raise UserError(
            f"stage {run.stage.kind} cannot be trained yet; `glmtune show` and `glmtune data check` read its rows already"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: training on several processes is not built yet; start one process"
        )
    screen = screen or Screen()
    out = Path(run.out)
    with _claimed(out, resume):
        stored = _stored(out, run) if resume else None
        if stored is not None and (out / "finished.json").is_file():
            done = _finished(out)
            screen.say(f"{out} is finished already; nothing to do")
            return done
        base = None if stored is None else families.base_of(stored, next(iter(_saved(out).values()), out), screen.say)
        run = run if stored is None else _as_recorded(run, stored.resolved or {})
        made = plan.make(run, screen.say, screen.counting("rows tokenised"), base)
        screen.stop()
        settings = dict(stored.resolved or {}) if stored is not None else {}
        if not settings.keys() >= Resolved.__annotations__.keys():  # new, or of a version that chose less
            settings = resolve(made) | _base(made) | _adapters(run) | settings
        _same_data(settings, made, out)
        _check_room(made, settings, out)
        screen.plan(made)
        screen.say(settings_line(settings))
        how = setting(made, settings)
        rate = _matmul_rate(settings["device"], settings["precision"])
        epoch = estimate.seconds(made.shape, how, sum(made.lengths), made.examples.num_learned, rate)
        screen.needs(estimate.memory(made.shape, how), epoch, rate)
        try:
            session = _Training(made, settings, out, screen)
            if stored is None:  # only now, so that a run that was refused leaves nothing behind
                options.write(run.model_copy(update={"resolved": settings}), out / "run.yaml", _header())
            return session.run(resume)
        except OSError as error:
            if error.errno in DISK:
                raise UserError(_no_room(out, error)) from None
            raise


@contextlib.contextmanager
def _claimed(out: Path, resume: bool) -> Iterator[None]:
    """One process per folder, and never over another run."""
    from filelock import FileLock, Timeout

    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; name a folder")
    held = [p.name for p in out.iterdir() if p.name != ".lock"] if out.is_dir() else []
    if held and not resume:
        doing = (
            f"glmtune train {out / 'run.yaml'} --resume continues it"
            if (out / "run.yaml").is_file()
            else "it is not a run's folder"
        )
        raise UserError(
            f"out={out} is not empty ({', '.join(sorted(held)[:4])} ...) and is never overwritten: {doing}; or choose another out="
        )
    new = not out.is_dir()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error.strerror}") from None
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training into {out} right now; wait for it, or choose another out=") from None
    try:
        yield
    finally:
        (out / ".lock").unlink(missing_ok=True)  # before it is released, so that nobody's lock but ours goes
        lock.release()
        if new and not any(out.iterdir()):
            out.rmdir()  # a run that was refused leaves nothing behind


def _stored(out: Path, run: Run) -> Run | None:
    """The run.yaml that `out` holds; refuses to go on under other options."""
    if not (out / "run.yaml").is_file():
        if any(p.name != ".lock" and p.suffix != ".part" for p in out.iterdir()):
            raise UserError(f"{out} holds no run.yaml, so there is nothing to resume there; choose another out=")
        return None
    stored = load_run(out / "run.yaml")
    differing = list(
        options.differences(
            {**options.plain(stored), "resolved": None, "out": None}, {**options.plain(run), "resolved": None, "out": None}
        )
    )
    if differing:
        raise UserError(
            f"{out} was started with other options: {'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}\n"
            f"continue it as it was: glmtune train {out / 'run.yaml'} --resume; or start anew in another out="
        )
    return stored


def _base(made: plan.Plan) -> dict[str, str]:
    """Which model a run is trained on. Its name may mean another one in another folder, or tomorrow."""
    return {"base": os.path.abspath(made.folder), "fingerprint": families.fingerprint(made.folder)}


def _built_on(run: Run) -> list[str]:
    """The adapters that a run goes on from."""
    start = getattr(run.method, "start", None)
    return [*getattr(run.method, "under", ()), *([start] if start else [])]


def _adapters(run: Run) -> dict[str, dict[str, list[str]]]:
    """They are named as the model is: where each was, absolutely, and what it held."""
    if not _built_on(run):
        return {"adapters": {}}
    from . import adapters

    return {"adapters": {name: [os.path.abspath(Path(name).expanduser()), adapters.digest(name)] for name in _built_on(run)}}


def _as_recorded(run: Run, resolved: Any) -> Run:
    """The run with the adapters that it goes on from where they were when it began. Raises UserError where one is another now."""
    recorded = resolved.get("adapters", {})
    if not recorded.keys() & set(_built_on(run)):
        return run
    from . import adapters

    for path, digest in recorded.values():
        if adapters.digest(path) != digest:
            raise UserError(
                f"the adapter {path}, which this run goes on from, changed since it was started; put it back, or choose another out="
            )
    places = {name: path for name, (path, _) in recorded.items()}
    given = {
        "under": [places.get(name, name) for name in getattr(run.method, "under", ())],
        "start": places.get(getattr(run.method, "start", None)),
    }
    return run.model_copy(
        update={"method": run.method.model_copy(update={k: v for k, v in given.items() if getattr(run.method, k, None)})}
    )


def _header() -> str:
    return f"# Written by glmtune {__version__}: every option of this run. `glmtune train THIS --resume` continues it.\n"


def resolve(made: plan.Plan) -> dict[str, Any]:
    """Everything that `auto` and null stand for. Follows from the machine's flags, the model and the lengths; never from timing."""
    import torch

    run = made.run
    device = families.pick_device(run.device)
    precision = families.pick_precision(run.precision, device)
    steps = batch.num_steps(len(made.examples), run.optim.batch_size, run.optim.epochs, run.optim.steps)
    tokens = sum(made.lengths) / batch.steps_per_epoch(len(made.examples), run.optim.batch_size)  # of a step, on average
    settings = {
        "device": str(device),
        "precision": precision,
        "quant": made.quant,
        "threads": torch.get_num_threads(),
        "micro_tokens": run.optim.micro_tokens or MICRO_TOKENS,
        "lr": run.optim.lr or DEFAULT_LR[run.method.kind],
        "steps": steps,
        "checkpointing": run.checkpointing is True,
        "compile": tokens * steps > COMPILE_TOKENS and tokens > COMPILE_STEP,
        "data": made.examples.fingerprint,
        "version": __version__,
    }
    if run.checkpointing == "auto":  # only where there is no room without
        need = sum(estimate.memory(made.shape, setting(made, settings)).values())
        settings["checkpointing"] = need > _free(device)
    return settings


@functools.cache
def _matmul_rate(device: str, precision: str) -> float:
    """Measured once: a process that trains many runs need not wait for it each time."""
    return estimate.matmul_rate(families.pick_device(device), precision)


def _free(device: Any) -> int:
    """Bytes of memory that are free on a device."""
    import psutil
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _same_data(settings: dict[str, Any], made: plan.Plan, out: Path) -> None:
    if settings["data"] != made.examples.fingerprint:
        raise UserError(
            f"the data, template or tokenizer changed since {out} was started, so it cannot be continued; put it back, or choose another out="
        )


def _check_room(made: plan.Plan, settings: dict[str, Any], out: Path) -> None:
    device = families.pick_device(settings["device"])
    where = settings["device"] if device.type == "cuda" else "this machine"
    estimate.refuse_memory(made.shape, setting(made, settings), _free(device), where)
    kept = made.shape.trainable * 12
    if made.run.method.kind not in ADAPTERS:
        kept = made.shape.parameters * 4 + made.shape.trainable * 8
    estimate.refuse_disk(out, kept, made.run.save.keep)


def setting(made: plan.Plan, settings: dict[str, Any]) -> estimate.Setting:
    """What the estimate goes by. Micro-batches of the module path are padded, so a few tokens more than micro_tokens can be learned."""
    run, longest = made.run, made.longest
    step = sum(sorted(made.lengths)[-run.optim.batch_size :])
    learned = made.examples.num_learned / max(1, sum(made.lengths))
    tokens = max(longest, min(settings["micro_tokens"], step))
    depth = 1.0
    if run.method.kind == "freeze":
        trained = families.frozen_choice(run.method, families.parameter_names(made.folder))
        layers = {int(found[1]) for name in trained if (found := re.search(r"\.(\d+)\.", name))}
        depth = 1 - min(layers, default=made.shape.layers) / made.shape.layers
    return estimate.Setting(
        run.method.kind, settings["precision"], settings["quant"], run.optim.kind, tokens, longest, round(tokens * learned),
        settings["checkpointing"], _fused(made, settings), depth,
        bool(getattr(made.method, "dropout", 0)), bool(getattr(made.method, "dora", False)), settings["device"] == "cpu",
    )  # fmt: skip


def _fused(made: plan.Plan, settings: dict[str, Any]) -> bool:
    """Whether forward.choose_path will take the fused path, without a model."""
    from . import fused

    method, run = made.run.method, made.run
    plain = method.kind == "lora" and not (method.dropout or method.dora or method.pissa or method.under or method.modules_to_save)
    usual = families.config_of(made.folder).get("model_type") in fused.FAMILIES and settings["precision"] in ("fp32", "bf16")
    return plain and usual and settings["device"] == "cpu" and not (run.neftune or settings["checkpointing"] or settings["quant"])


def settings_line(settings: dict[str, Any]) -> str:
    return (
        f"{settings['steps']} steps on {settings['device']} ({settings['threads']} threads), "
        f"frozen weights {settings['quant'] or settings['precision']}, products {settings['precision']}, sums and trained weights fp32, "
        f"lr {settings['lr']:g}{', checkpointing' if settings['checkpointing'] else ''}"
    )


def _no_room(out: Path, error: OSError) -> str:
    last = next((p for p, _ in _checkpoints(out)), None)
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
    return f"{told(error, out)}; {kept}. Then: glmtune train {out / 'run.yaml'} --resume"


def _finished(out: Path) -> Report:
    path = out / "finished.json"
    try:
        done = TypeAdapter(Finished).validate_json(path.read_bytes(), strict=True)
    except ValidationError:
        raise UserError(f"{path} is damaged; delete it, and --resume goes on from the newest checkpoint in {out}") from None
    samples = read_jsonl(out / "samples.jsonl")
    return Report(out, done.steps, done.loss or 0.0, done.dev_loss, done.best_step, done.seconds, samples, report.hits(samples))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that train wrote, one a line; none where there is no file. Raises UserError."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}:{number} is damaged: wanted a JSON object; mend the line, or delete the file, then --resume")
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Complete or unchanged: written beside and renamed."""
    whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _cut_log(path: Path, step: int) -> None:
    """Steps after the checkpoint are made again, so their lines go; so do damaged ones."""
    rows = lenient_jsonl(path)[0] if path.is_file() else []
    write_jsonl(path, [row for row in rows if type(row.get("step")) is int and row["step"] <= step])


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def _saved(out: Path) -> dict[int, Path]:
    """All checkpoints by their steps, the newest first."""
    return dict(sorted(families.checkpoints(out).items(), reverse=True))


def _checkpoints(out: Path) -> Iterator[tuple[Path, Kept]]:
    """Complete checkpoints, the newest first, with their state. Damaged ones are passed over."""
    for step, path in _saved(out).items():
        try:
            kept = TypeAdapter(Kept).validate_json((path / "state.json").read_bytes(), strict=True)
            whole = kept.step == step and kept.files and all(digest_of(path / name) == was for name, was in kept.files.items())
        except (OSError, ValueError):
            continue
        if whole:
            yield path, kept


# --- the loop -----------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then constant, or linear or cosine down to 0 at the end.

    warmup below 1 is a share of `steps`, otherwise a number of steps.
    """
    rising = round(warmup * steps) if warmup < 1 else round(warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    share = (step - rising) / max(1, steps - rising)
    return peak * (1 - share) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * share))


class _Training:
    """Model, optimizer and counters of one run in progress."""

    def __init__(self, made: plan.Plan, settings: dict[str, Any], out: Path, screen: Screen):
        import torch

        from . import forward, methods, optimizer

        self.plan, self.settings, self.out, self.screen, self.state = made, settings, out, screen, State()
        options_ = made.run
        torch.set_num_threads(settings["threads"])
        self.device = families.pick_device(settings["device"])
        compute = families.as_dtype(settings["precision"])
        whole = options_.method.kind == "full"
        self.model = families.load_model(
            made.folder,
            dtype=torch.float32 if whole else compute,
            device=self.device,
            quant=settings["quant"],
        )
        for module in self.model.modules():  # a model's own dropout is not seeded by row; every published family has none
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        methods.prepare(self.model, compute)
        methods.attach(self.model, made.method, options_.seed)
        if getattr(options_.method, "start", None):
            methods.start_from(self.model, Path(options_.method.start))
        elif options_.method.kind == "prefix" and options_.method.init == "words":
            methods.prefix.start_from_words(self.model, _first_ids(made, options_.method.num_virtual_tokens))
        if options_.neftune:
            methods.add_neftune(self.model, options_.neftune, options_.seed)
        self.parameters = methods.trainable(self.model)
        path, _ = forward.choose_path(self.model, options_, self.device, made.longest, settings["checkpointing"])
        self.forward = forward.Forward(
            self.model, path, compile=path == "fused" and settings["compile"] and forward.fused.compile_works()
        )
        if self.forward.noise is not None or settings["checkpointing"]:
            self.model.train()
        if settings["checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = optimizer.make(options_, settings["lr"], self.parameters, self.device)
        self.scaler = optimizer.Scaler(self.state) if settings["precision"] == "fp16" else None
        stage = STAGES[options_.stage.kind]
        assert stage.loss is not None  # train() refuses the others
        self.loss = stage.loss
        self.trackers: list[Callable[[dict[str, Any]], None]] = []
        self.stopping = False

    # the whole ---------------------------------------------------------------------------------------------------------

    def run(self, resume: bool) -> Report:
        steps, optim = self.settings["steps"], self.plan.run.optim
        self._ask("before")
        if resume:
            self._load()
        _cut_log(self.out / "log.jsonl", self.state.step)
        self.trackers = list(_trackers(self.plan.run, self.out, self.state.step))
        per_epoch = batch.steps_per_epoch(len(self.plan.examples), optim.batch_size)
        started, saved_at = time.monotonic() - self.state.seconds, time.monotonic()
        if self.forward.compile:
            self.screen.say("compiling kernels for this machine in the first steps (10 to 60 s)")
        self.screen.start(steps, self.state.step)
        with self._catching_signals(), open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
            while self.state.step < steps:
                row = self._step(self.state.step, steps)
                self.state.step += 1
                self.state.seconds = time.monotonic() - started
                step, self.state.last_loss = self.state.step, row["loss"]
                end_of_epoch = step % per_epoch == 0 or step == steps
                every = self.plan.run.eval.every_steps
                if self.plan.dev and (step % every == 0 or step == steps if every else end_of_epoch):
                    row["eval_loss"] = self._evaluate()
                row = {"step": step, "epoch": round(step / per_epoch, 4), **row, "seconds": round(self.state.seconds, 3)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                for track in self.trackers:
                    track(row)
                self.screen.step(row, steps)
                every = self.plan.run.save.every_steps
                due = step % every == 0 if every else end_of_epoch or time.monotonic() - saved_at > SAVE_SECONDS
                if due or self.stopping or "eval_loss" in row:
                    self._save(keep_best=row.get("eval_loss"))
                    saved_at = time.monotonic()
                if end_of_epoch and step < steps:
                    report.write(self.out)
                if self.stopping and step < steps:
                    raise Interrupted(
                        f"stopped after step {step} of {steps}; saved. Continue with: glmtune train {self.out / 'run.yaml'} --resume"
                    )
        self.screen.stop()
        return self._finish()

    def _finish(self) -> Report:
        self._save_result(self.out, final=True)
        samples = self._ask("after")
        report.write(self.out)
        state = self.state
        done = Finished(state.step, state.last_loss, state.best_loss, state.best_step, round(state.seconds, 3))
        whole(self.out / "finished.json", json.dumps(asdict(done)) + "\n")
        return Report(
            self.out,
            self.state.step,
            self.state.last_loss or 0.0,
            self.state.best_loss,
            self.state.best_step,
            self.state.seconds,
            samples,
            report.hits(samples),
        )

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one stops at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.screen.say("finishing this step and saving; press Ctrl-C again to stop at once without saving")

        held = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread
                held[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)

    # one step ----------------------------------------------------------------------------------------------------------

    def _batches(self, examples: Sequence[Any], rows: list[int]) -> Iterator[batch.Batch]:
        chosen = [examples[row] for row in rows]
        concatenated = self.forward.concatenated
        for micro in batch.cut([len(e.ids) for e in chosen], self.settings["micro_tokens"], padded=not concatenated):
            yield batch.collate(
                [chosen[i] for i in micro], [rows[i] for i in micro], self.plan.template.tokens.pad_id, concatenated
            )

    def _step(self, step: int, steps: int) -> dict[str, Any]:
        """One optimizer step on its rows. Raises UserError when the loss or the gradient is not a finite number."""
        import torch

        began, optim = time.monotonic(), self.plan.run.optim
        lr = learning_rate(step, steps, self.settings["lr"], optim.schedule, optim.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["times"]
        if self.forward.noise is not None:
            self.forward.noise.step = step
        rows = batch.rows_of_step(step, len(self.plan.examples), optim.batch_size, self.plan.run.seed)
        loss, tokens = self._gradient(rows)
        scaled = self.state.scale if self.scaler is not None else 1.0
        if self.scaler is not None:
            self.scaler.unscale(self.parameters.values())
        limit = optim.clip if optim.clip is not None else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and (self.scaler is None or not self.scaler.smaller()):
            raise UserError(self._not_finite(step + 1, loss, norm, lr))
        if finite:
            self.optimizer.step()
            if self.scaler is not None:
                self.scaler.good()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = {} if finite else {"skipped": True}
        return {
            "loss": loss,
            "learned_tokens": sum(self.plan.examples[row].num_learned for row in rows),
            "tokens": tokens,
            "tokens_per_second": round(tokens / (time.monotonic() - began), 1),
            "lr": lr,
            "grad_norm": norm,
            "peak_memory_gb": round(_peak_memory(self.device) / 1e9, 3),
            **({"scale": scaled, **skipped} if self.scaler is not None else {}),
        }

    def _gradient(self, rows: list[int]) -> tuple[float, int]:
        """Leaves the gradient of a step's mean loss in the parameters; returns the loss and the number of tokens.

        Where the device has no room, micro_tokens is halved and the step is computed again: the cut changes no result.
        """
        import torch

        total_weight = sum(sum(self.plan.examples[row].weights) for row in rows)
        while True:
            loss, tokens = 0.0, 0
            try:
                for micro in self._batches(self.plan.examples, rows):
                    part = self.loss(self.forward, micro) / total_weight
                    (part * self.state.scale if self.scaler is not None else part).backward()
                    loss += part.item()
                    tokens += micro.num_tokens
                return loss, tokens
            except torch.OutOfMemoryError:
                pass  # what was made lives as long as the exception does
            self.optimizer.zero_grad(set_to_none=True)
            self._smaller(max(self.plan.lengths[row] for row in rows), "the step")

    def _smaller(self, longest: int, what: str) -> None:
        """Halves micro_tokens. Raises UserError where the longest row alone is too much already."""
        import torch

        if self.settings["micro_tokens"] <= longest:
            raise UserError(
                f"{self.device} has no room for the longest row, {longest} tokens, alone; try checkpointing=true, quant=nf4, "
                f"or a shorter max_length. Then: glmtune train in another out="
            )
        torch.cuda.empty_cache()
        self.settings["micro_tokens"] = self.state.micro_tokens = self.settings["micro_tokens"] // 2
        self.screen.say(f"no room on {self.device}: {what} is done again with optim.micro_tokens={self.settings['micro_tokens']}")

    def _not_finite(self, step: int, loss: float, norm: float, lr: float) -> str:
        last = next((p for p, _ in _checkpoints(self.out)), None)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
        return (
            f"step {step}: the loss is {loss:g} and the gradient norm {norm:g}, no finite numbers; training stopped, {kept}\n"
            f"try a lower learning rate (now {lr:g}), optim.clip=0.5, precision=fp32, or look for odd rows: glmtune data check"
        )

    def _evaluate(self) -> float:
        """Mean loss per learned token of the dev set."""
        import torch

        dev = self.plan.dev or ()
        total, weight = 0.0, 0.0
        noise, self.forward.noise = self.forward.noise, None
        training = self.model.training
        self.model.eval()
        rest = [list(range(start, min(start + 64, len(dev)))) for start in range(0, len(dev), 64)]
        with torch.no_grad():
            while rest:
                try:
                    sums = [
                        (float(self.loss(self.forward, micro)), float(micro.weights.sum())) for micro in self._batches(dev, rest[0])
                    ]
                except torch.OutOfMemoryError:
                    sums = []
                if not sums:
                    self._smaller(max(len(dev[row].ids) for row in rest[0]), "the evaluation")
                    continue
                del rest[0]
                total += sum(loss for loss, _ in sums)
                weight += sum(learned for _, learned in sums)
        self.model.train(training)
        self.forward.noise = noise
        return total / weight

    # keeping -----------------------------------------------------------------------------------------------------------

    def _save_result(self, folder: Path, final: bool = False) -> None:
        """What was trained, as something other programs open: an adapter folder, or a whole model. With tokenizer and template."""
        from . import methods

        method, full = self.plan.method, self.plan.run.method.kind not in ADAPTERS
        target = folder / ("model" if full else "adapter") if final else folder
        work = target.with_name(target.name + ".part") if final else target
        if final:
            shutil.rmtree(work, ignore_errors=True)
        if full:
            methods.save_full(self.model, work)
            config = json.loads((work / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = "float32"  # of what was trained; the rest may be stored in 16 bits
            whole(work / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        else:
            methods.save_adapter(self.model, work, method, str(self._base_name()), self.settings["fingerprint"])
        families.save_tokenizer(self.plan.folder, self.plan.template, work)
        reason = methods.prefix.plain_peft(self.model) if self.plan.run.method.kind == "prefix" else None
        whole(work / "README.md", _readme(self.plan, str(self._base_name()), full, reason))
        if final:
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)

    def _base_name(self) -> str:
        """What plain transformers and PEFT can open: a hub id as it is, else the folder."""
        name = self.plan.run.model
        return name if "/" in name and not Path(name).expanduser().exists() else str(self.plan.folder.resolve())

    def _save(self, keep_best: float | None = None) -> None:
        """A checkpoint under a temporary name, fsynced, renamed; then old ones are removed."""
        from . import methods, optimizer

        if keep_best is not None and (self.state.best_loss is None or keep_best < self.state.best_loss):
            self.state.best_loss, self.state.best_step = keep_best, self.state.step
        folder = self.out / "checkpoints" / f"step-{self.state.step}"
        if folder.exists():
            return
        work = folder.with_name(f".part-{self.state.step}")
        shutil.rmtree(work, ignore_errors=True)
        try:
            self._save_result(work)
            if self.plan.run.method.kind in ADAPTERS:  # the adapter's files hold it rotated or joined with others
                trained = {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}
                methods.write_tensors(trained, work / "trained.safetensors")
            tensors, numbers = optimizer.state_of(self.optimizer, self.parameters)
            methods.write_tensors(tensors, work / "optimizer.safetensors")
            shutil.copy(self.out / "run.yaml", work / "run.yaml")
            files = {p.name: digest_of(p) for p in sorted(work.iterdir())}
            whole(work / "state.json", json.dumps({**asdict(self.state), "numbers": numbers, "files": files}, indent=1) + "\n")
            sync_folder(work)
            work.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for step, old in list(_saved(self.out).items())[self.plan.run.save.keep :]:
            if step != self.state.best_step:
                shutil.rmtree(old)

    def _load(self) -> None:
        """Continues from the newest complete checkpoint, or from step 0, and says which."""
        import torch

        from . import methods, optimizer

        for leftover in (self.out / "checkpoints").glob(".part-*"):
            shutil.rmtree(leftover)
        found = next(_checkpoints(self.out), None)
        last = found[1].step if found else 0
        damaged = {step: path for step, path in _saved(self.out).items() if step > last}
        if damaged:
            self.screen.say(f"checkpoint step-{max(damaged)} is damaged; going back to step-{last}")
        for path in damaged.values():
            shutil.rmtree(path)
        if found is None:
            self.screen.say("there is no complete checkpoint yet; starting at step 0")
            return
        folder, kept = found
        self.screen.say(f"continuing from {folder} (step {kept.step} of {self.settings['steps']})")
        for name in asdict(self.state):
            setattr(self.state, name, getattr(kept, name))
        if self.state.micro_tokens is not None:
            self.settings["micro_tokens"] = self.state.micro_tokens
        if self.state.best_step is not None and self.state.best_step > self.state.step:
            self.state.best_step = self.state.best_loss = None
        files = (
            [folder / "trained.safetensors"] if (folder / "trained.safetensors").is_file() else folder.glob("model*.safetensors")
        )
        trained: dict[str, torch.Tensor] = {}
        for path in files:
            trained |= methods.read_tensors(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(trained[name])
        optimizer.restore(self.optimizer, self.parameters, methods.read_tensors(folder / "optimizer.safetensors"), kept.numbers)

    # before and after --------------------------------------------------------------------------------------------------

    def _ask(self, when: str) -> list[dict[str, Any]]:
        """Answers the run's questions, once before and once after training; samples.jsonl holds both."""
        from . import methods
        from .generate import Sampling, answer

        path, questions = self.out / "samples.jsonl", self.plan.questions
        rows = read_jsonl(path)
        if questions and rows and len(rows) != len(questions):
            raise UserError(f"{path} has {len(rows)} lines for {len(questions)} questions; delete it, then --resume")
        if not questions or (rows and rows[0].get(when) is not None):
            return rows
        if when == "before" or not rows:
            rows = [{"set": q.set, "prompt": q.prompt, "before": None, "after": None, "wanted": q.wanted} for q in questions]
        done = self.screen.asking(f"answers {when} training", len(questions))
        training = self.model.training
        self.model.eval()
        # Before training is before the prefix, too: unlike LoRA, it changes answers from the start.
        untouched = methods.prefix.disabled(self.model) if when == "before" else contextlib.nullcontext()
        with untouched:
            asked = answer(self.model, self.plan.template, [q.ids for q in questions], Sampling(max_new_tokens=64), done=done)
            for i, text in asked:
                rows[i][when] = text
                if (wanted := questions[i].contains) is not None:
                    rows[i][f"hit_{when}"] = any(part.lower() in text.lower() for part in wanted)
        self.model.train(training)
        self.screen.stop()
        write_jsonl(path, rows)
        return rows


def _first_ids(made: plan.Plan, count: int) -> list[int]:
    found: list[int] = []
    for example in made.examples[: min(count, len(made.examples))]:
        found += example.ids
        if len(found) >= count:
            break
    return found


def _readme(made: plan.Plan, base: str, whole: bool, not_in_peft: str | None) -> str:
    """README.md of what was trained. base: what plain transformers should open; not_in_peft: why plain PEFT would compute something else."""
    from . import adapters

    run = made.run
    system = f" It was trained with the system prompt {run.system!r}." if run.system else ""
    about = (
        f"Trained on {run.model} with method {run.method.kind}{f' on weights kept in {made.quant}' if made.quant else ''}.{system}"
    )
    if not whole:
        return adapters.readme(base, made.folder, about, not_in_peft)
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\n---\n\n{about} (glmtune {__version__}). The licence of the base model applies.\n\n"
        "```sh\nglmtune chat THIS_FOLDER\n```\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```\n\nThe chat format that was trained is `chat_template.jinja`.\n'
    )


def _peak_memory(device: Any) -> float:
    """Bytes: of the card, or of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _trackers(run: Run, out: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
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

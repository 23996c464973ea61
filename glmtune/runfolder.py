"""A run's folder: who may write into it, what it holds, and which of its checkpoints are whole.

Laws: one process at a time, and never over another run; every file is complete or as it was before; a checkpoint is complete or passed over.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from . import __version__, families, options
from .errors import UserError
from .files import digest as digest_of
from .files import lenient_jsonl
from .files import whole as write_whole
from .run import Run, load_run


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
    stage: dict[str, Any] = field(default_factory=dict)  # the stage's own (Stage.after_step)


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


@contextlib.contextmanager
def claimed(out: Path, resume: bool) -> Iterator[None]:
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


def stored(out: Path, run: Run) -> Run | None:
    """The run.yaml that `out` holds; refuses to go on under other options."""
    if not (out / "run.yaml").is_file():
        if any(p.name != ".lock" and p.suffix != ".part" for p in out.iterdir()):
            raise UserError(f"{out} holds no run.yaml, so there is nothing to resume there; choose another out=")
        return None
    found = load_run(out / "run.yaml")
    differing = list(
        options.differences(
            {**options.plain(found), "resolved": None, "out": None}, {**options.plain(run), "resolved": None, "out": None}
        )
    )
    if differing:
        raise UserError(
            f"{out} was started with other options: {'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}\n"
            f"continue it as it was: glmtune train {out / 'run.yaml'} --resume; or start anew in another out="
        )
    return found


def refuse_elsewhere(file: Path, run: Run) -> None:
    """Raises UserError where a run's own run.yaml is to be continued and its `out`, from here, is another folder: a new run, of whatever
    model and data lie there, would begin."""
    own = next((p for p in file.resolve().parents if (p / "run.yaml").is_file() and (p / "checkpoints").is_dir()), None)
    out = Path(run.out).resolve()
    if run.resolved is not None and own is not None and own != out:
        raise UserError(
            f"{file} belongs to the run in {own}, but its out={run.out} is {out} from here: call it from the folder where it was started, "
            f"or say where it is now: out={own}"
        )


def header() -> str:
    return f"# Written by glmtune {__version__}: every option of this run. `glmtune train THIS --resume` continues it.\n"


def read_finished(out: Path) -> Finished:
    path = out / "finished.json"
    try:
        return TypeAdapter(Finished).validate_json(path.read_bytes(), strict=True)
    except ValidationError:
        raise UserError(f"{path} is damaged; delete it, and --resume goes on from the newest checkpoint in {out}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that train wrote, one a line; none where there is no file. Raises UserError."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}:{number} is damaged: wanted a JSON object; mend the line, or delete the file, then --resume")
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Complete or unchanged: written beside and renamed."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def saved(out: Path) -> dict[int, Path]:
    """All checkpoints by their steps, the newest first."""
    return dict(sorted(families.checkpoints(out).items(), reverse=True))


def checkpoints(out: Path) -> Iterator[tuple[Path, Kept]]:
    """Complete checkpoints, the newest first, with their state. Damaged ones are passed over."""
    for step, path in saved(out).items():
        try:
            kept = TypeAdapter(Kept).validate_json((path / "state.json").read_bytes(), strict=True)
            whole = kept.step == step and kept.files and all(digest_of(path / name) == was for name, was in kept.files.items())
        except (OSError, ValueError):
            continue
        if whole:
            yield path, kept


def last_good(out: Path) -> str:
    """For messages about a run that ends early."""
    path = next((path for path, _ in checkpoints(out)), None)
    return f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"


def cut_log(out: Path, step: int) -> None:
    """Drops log lines behind a step: those steps will be computed again. Damaged lines (a killed run may leave half a line) go too."""
    path = out / "log.jsonl"
    rows = lenient_jsonl(path)[0] if path.is_file() else []
    write_jsonl(path, [row for row in rows if type(row.get("step")) is int and row["step"] <= step])

"""Sources -> a store of training sequences, by all cores; made once and found again by what it follows from."""

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__, data, mixing, sources, store
from .chat import Template
from .errors import UserError
from .files import digest as digest_of
from .hub import cache_root
from .records import Example
from .stages import STAGES, Limits, Stage, Tally, finish
from .store import Block, Store, Writer

CHUNK = 256  # rows that a worker takes at once
KEEP = 2000  # rows from which on a store is kept on the disk
PARALLEL = 1000  # rows from which on several processes are worth their start
TOLD = 3000  # rows from which on progress is told

Progress = Callable[[int, float | None], None]  # told the rows so far, and the share of all bytes that they are, where it is known


@dataclass(frozen=True)
class Wanted:
    """Everything that the sequences of some sources follow from."""

    sources: list[sources.Found]
    stage: str
    template: Template
    limits: Limits
    system: str | None = None
    variables: dict[str, str] | None = None
    join: str = "\n"
    elsewhere: Sequence[str] | None = ()  # as of data.stream
    rows: str = "rows"  # what messages call them
    stored: Path | None = None  # instead of sources: a folder that was tokenised before

    def key(self) -> str:
        """Names the store: contents of the files, how they are read, the template with its tokenizer, the length policy, this program."""
        template, tokens = self.template, self.template.tokens
        reading = [
            [
                s.path,
                s.format,
                s.columns,
                s.max_samples,
                s.system,
                s.tags,
                [[name, _contents(path, name)] for path, name in s.files],
            ]
            for s in self.sources
        ]
        written = [
            template.name,
            template.jinja,
            template.learn,
            template.default_system,
            tokens.json,
            tokens.config,
            template.dates,
        ]
        how = [self.stage, asdict(self.limits), self.system, self.variables, self.join]
        how += data.named(self.elsewhere or (), self.variables or ())  # where they need not stand in a row
        return store.key([__version__, _program(), reading, written, how])


def _contents(path: Path, name: str) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        raise UserError(f"the data file '{name}' cannot be read: {error.strerror}") from None


def tokenised(
    wanted: Wanted,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    workers: int | None = None,
    progress: Progress = lambda rows, done: None,
    keep: bool = False,
) -> Store:
    """The store of these sources: an entry of `data` that is a store itself, one that was made before, or a new one.

    folder: where it is to be (`glmtune data tokenize --to`); None: in the cache, or only in memory where it is small
    and `keep` does not say otherwise. workers: processes; None: as many as there are cores.
    Raises UserError for the first bad row, for rows beyond the length policy, and when nothing can be learned.
    """
    if wanted.stored is not None:
        return _opened(wanted, wanted.stored)
    key = wanted.key()
    place = folder or cache_root() / "tokens" / key
    found = Store.open(place)
    if found is not None and found.about["key"] == key:
        if folder is None:
            say(f"tokenised before: {len(found)} sequences from the cache")
        return found
    return _make(wanted, key, place, keep or folder is not None, say, workers or os.cpu_count() or 1, progress)


def is_store(path: str) -> bool:
    return (Path(path).expanduser() / "ids.bin").is_file()


def _opened(wanted: Wanted, path: Path) -> Store:
    """A folder that `glmtune data tokenize --to` made, here or on another machine."""
    found = Store.open(path)
    if found is None or (dict(found.columns) != dict(STAGES[wanted.stage].columns) and found.about["stage"] == wanted.stage):
        raise UserError(f"{path} is damaged, or made by another version; make it again: glmtune data tokenize ... --to DIR")
    for name, here in _about(wanted).items():
        if found.about.get(name, here) != here:
            what = {"template": "another chat format or tokenizer", "stage": f"stage {found.about['stage']}"}.get(name)
            raise UserError(
                f"{path} was tokenised for {what or f'{name} {found.about[name]}'}, this run has {here if not what else 'its own'}; "
                "make it again for this model: glmtune data tokenize ... --to DIR"
            )
    return found


def _about(wanted: Wanted) -> dict[str, Any]:
    """What a store must have in common with a run that uses it."""
    return {
        "template": _template_name(wanted.template),
        "stage": wanted.stage,
        "learn": wanted.template.learn,
        "max_length": wanted.limits.max_length,
        "too_long": wanted.limits.too_long,
        "system": wanted.system,
        "variables": wanted.variables or {},
        "join": wanted.join,
        "dates": list(wanted.template.dates),
    }


def date_of(folder: Path) -> str | None:
    """When a folder of tokenised rows was begun, where that stands in its prompts."""
    try:
        return json.loads((folder / "index.json").read_text(encoding="utf-8")).get("date")
    except (OSError, ValueError, AttributeError):  # `_opened` says what is wrong with it
        return None


def _make(wanted: Wanted, key: str, place: Path, kept: bool, say: Callable[[str], None], workers: int, progress: Progress) -> Store:
    tally, stream = Tally(), data.stream(
        wanted.sources, system=wanted.system, variables=wanted.variables, join=wanted.join, want=STAGES[wanted.stage].want,
        elsewhere=wanted.elsewhere,
    )  # fmt: skip
    waiting: list[Block] = []
    writer: Writer | None = None
    try:
        for block, part, done in _encoded(stream, wanted, workers):
            block.arrays["row"] += tally.rows
            tally.add(part)
            if tally.rows >= TOLD:
                progress(tally.rows, done)
            waiting.append(block)
            if writer is None and (kept or tally.rows >= KEEP):
                try:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    writer = Writer(place, STAGES[wanted.stage].columns)
                except OSError:
                    if kept:
                        raise UserError(f"{place} cannot be written; choose another folder") from None
                    kept = False  # a cache that cannot be written: the sequences stay in memory
                    continue
            if writer is not None:
                for one in waiting:
                    writer.add(one)
                waiting.clear()
        stream.finish()
        finish(tally, wanted.limits, wanted.rows)
        about = {
            "key": key,
            "counts": tally.counts,
            "rows": tally.rows,
            "notes": stream.notes,
            "spans": [asdict(span) for span in stream.spans],
            "date": wanted.template.date,
            **_about(wanted),
        }
        return writer.done(about) if writer is not None else Store.in_memory(waiting, about)
    except BaseException:
        if writer is not None:
            writer.drop()
        raise


_WORK: tuple[data.Stream, Stage, Template, Limits] | None = None  # what a worker needs; it gets it by being forked


def _encode(lot: data.Lot) -> tuple[Block, Tally, data.Read]:
    """The sequences of a lot, with row numbers from 0, and what became of its rows (the records themselves stay here)."""
    assert _WORK is not None
    stream, stage, template, limits = _WORK
    read = stream.read(lot)
    tally = Tally(rows=read.count)
    made: list[tuple[int, int, Example]] = []
    for number, record in enumerate(read.records):
        template.differs.clear()
        content = mixing.content_hash(record)
        made += [(number, content, example) for example in stage.encode(template, record, limits, tally)]
        for reason in template.differs:  # a row counts once, however often it was written out
            tally.counts[f"rows: {reason}"] += 1
    tally.made = len(made)
    read.records = []
    return Block.of(made, stage.columns), tally, read


def _encoded(stream: data.Stream, wanted: Wanted, workers: int) -> Iterator[tuple[Block, Tally, float | None]]:
    """Blocks in the order of the rows. The first rows are done here: most data is small, and a broken template is told at once."""
    global _WORK
    _WORK = (stream, STAGES[wanted.stage], wanted.template, wanted.limits)
    lots, rows = stream.lots(CHUNK), 0
    for lot, take in lots:
        block, tally, read = _encode(lot)
        take(read)
        yield block, tally, lot.done
        rows += len(lot.rows)
        if workers > 1 and rows >= PARALLEL and sys.platform == "linux":
            break
    else:
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _quiet)
    try:
        yield from _ordered(pool, lots, ahead=4 * workers)
    except BrokenProcessPool:  # multiprocessing.Pool would wait for ever
        raise UserError(
            f"one of the {workers} processes that tokenise was killed from outside, by the system when memory ran out or by hand; nothing was "
            "kept. Free some memory, or make the store with fewer of them first: glmtune data tokenize RUN.yaml --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _quiet() -> None:
    """In a worker: what was there before is never garbage, and rows make none that needs looking for often. Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _ordered(pool: ProcessPoolExecutor, lots: Iterator[Any], ahead: int) -> Iterator[tuple[Block, Tally, float | None]]:
    """As pool.map, but reads only so far ahead: map would read the whole source into memory. An error of the reading waits
    until the rows before it are done, as it does with one process."""
    pending: deque[tuple[Any, Any, float | None]] = deque()
    error: UserError | None = None
    while True:
        while error is None and len(pending) < ahead:
            try:
                lot, take = next(lots)
            except StopIteration:
                break
            except UserError as found:
                error = found
            else:
                pending.append((pool.submit(_encode, lot), take, lot.done))
        if not pending:
            break
        made, take, done = pending.popleft()
        block, tally, read = made.result()
        take(read)
        yield block, tally, done
    if error is not None:
        raise error


def _program() -> str:
    """Of the source files that sequences follow from: a changed program makes them anew."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (
        "records",
        "blocks",
        "reading",
        "sources",
        "forms",
        "tools",
        "mixing",
        "data",
        "rendering",
        "chat",
        "stages",
        "store",
    ):
        path = Path(__file__).with_name(name + ".py")
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _template_name(template: Template) -> str:
    """Of a template with its tokenizer, to tell whether a store fits a model."""
    return hashlib.blake2b(json.dumps([template.jinja, template.tokens.json]).encode(), digest_size=16).hexdigest()

"""One door to the disk: a file or a folder is whole under its name, or it is not there, and a retry finds its way free.

Everything is written beside its place under a temporary name, flushed to the disk and renamed. What the disk refuses is told in one sentence
that names the place and says what to do.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

# Of these, only writing is to blame, whatever file the system names (a copy names its source).
WRITING = {
    errno.ENOSPC: "free some room there, or name a place on another disk",
    errno.EDQUOT: "your quota there is used up: free some room, or name a place on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name a place on another disk",
    errno.EROFS: "name a place on a disk that can be written",
}
DISK = WRITING | {errno.EIO: "the disk may be failing; name a place on another one, and look at this one"}
ADVICE = DISK | {
    errno.EACCES: "change the rights there, or name another place",
    errno.EPERM: "change the rights there, or name another place",
    errno.ELOOP: "a link there leads in a circle; mend it, or name another place",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "make the folder, or name another place",
    errno.ENOTDIR: "a part of the path is a file; name another place",
    errno.EISDIR: "a folder has that name; name another place",
    errno.EEXIST: "it is there already; name another place",
}

UNKNOWN = "free some room there, raise the limit on the size of files (ulimit -f), or name a place on another disk"  # numpy keeps no number


class DiskError(UserError, OSError):
    """What the disk refused, told for the user; `errno` and `filename` as in any OSError."""

    def __init__(self, path: str | Path, error: OSError):
        OSError.__init__(self, error.errno, error.strerror, str(path))
        self.message = told(error, path)

    def __str__(self) -> str:
        return self.message


def told(error: OSError, path: str | Path | None = None) -> str:
    """One line: the place, what the system says, what to do."""
    path = path if path is not None else error.filename
    code = error.errno or 0
    what = os.strerror(code).lower() if code else str(error)
    if code in (errno.ENOSPC, errno.EDQUOT) and path is not None:
        what = f"no room left on the disk of {_disk(Path(path))}"
    advice = ADVICE.get(code, "choose another path, or make this one usable" if code else UNKNOWN)
    return f"{path}: {what}; {advice}" if path is not None else f"{what}; {advice}"


def _disk(path: Path) -> Path:
    """Where the disk is mounted that holds a path."""
    place = path.absolute()
    while not place.exists() or not os.path.ismount(place):
        if place == place.parent:
            break
        place = place.parent
    return place


@contextlib.contextmanager
def naming(path: str | Path, *own: Path) -> Iterator[None]:
    """An OSError of writing inside becomes a DiskError that names `path`. own: temporary names that stand for it."""
    path = Path(path)
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        inside = named is not None and any(named == one or one in named.parents for one in (path, *own))
        if isinstance(error, DiskError) and (named == path or not inside):
            raise
        if error.errno is not None and (error.errno in WRITING or named is None or inside):
            raise DiskError(path, error) from error
        raise


class _Out:
    """What `new_file` gives: errors of writing name the file."""

    def __init__(self, file: Any, path: Path):
        self._file, self._path = file, path

    def write(self, data: bytes) -> None:
        with naming(self._path):
            self._file.write(data)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[_Out]:
    """A file in the making, in bytes: it gets its name, in place of one that was there, when all went well. Raises DiskError."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with naming(path, part):
        file = open(part, "wb")  # noqa: SIM115
    try:
        yield _Out(file, path)
        with naming(path, part):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            part.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # it tries once more to write what is left
            file.close()
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def whole(path: str | Path, content: str | bytes | Iterable[str]) -> None:
    """Writes a file, complete or not at all, also when the process is killed. Lone surrogates are written as \\udXXX, which JSON reads
    back. Raises DiskError."""
    parts = [content] if isinstance(content, str | bytes) else content
    with new_file(path) as file:
        for part in parts:
            file.write(part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace"))


def append(path: str | Path, text: str) -> None:
    """Adds text to the end of a file, all of it or nothing. Raises DiskError."""
    path = Path(path)
    with naming(path), open(path, "ab") as file:
        end = file.tell()
        try:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            if end:
                os.truncate(path, end)
            else:
                path.unlink()
            raise


@contextlib.contextmanager
def new_folder(to: str | Path) -> Iterator[Path]:
    """A folder in the making, which gets its name when all went well. Raises UserError where `to` is taken, DiskError."""
    to = Path(to).expanduser().absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists already and is never overwritten; choose another name, or remove it")
    to = to.resolve() if to.is_dir() else to  # a link to an empty folder stays one
    work = to.with_name(f".{to.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with naming(to, work):
            work.mkdir(parents=True)
            yield work
            for file in work.rglob("*"):
                if file.is_file():
                    sync(file)
            if to.exists():
                to.rmdir()
            work.rename(to)
            sync_folder(to.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync(path: Path) -> None:
    """Until its bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """So that a rename inside it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lenient_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file that only tells of something, one a line; and how many lines are none (half written, damaged)."""
    rows, unreadable = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def digest(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    made = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            made.update(data)
    return made.hexdigest()

"""A name for a model's contents: what an adapter was trained on, and what answers follow from.

Every byte of every tensor counts. A sample of them would miss what people do change: a few rows of the embeddings, one layer (freeze), one
number. Files are read once for each state (path, size, times, inode); for large models the digests are kept in the cache folder.
"""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ..errors import UserError
from ..files import whole
from ..hub import cache_root
from . import weights

KEPT_BYTES = 200_000_000  # from this size on, digests are kept in the cache folder: below it hashing takes a fraction of a second
SETTLED_NS = 2_000_000_000  # a file that changed just now may change again within one tick of the clock: it is read anew
# Keys of config.json that change nothing of what is computed (the tensors' own dtypes count).
HOUSEKEEPING = ("_name_or_path", "transformers_version", "architectures", "auto_map", "use_cache", "torch_dtype", "dtype")

NOTE = "base_fingerprint"  # the key in the metadata of an adapter's file
State = tuple[str, int, int, int, int]


def fingerprint(folder: Path) -> str:
    """32 hex digits that follow from a model folder's config.json and all its tensors (names, dtypes, shapes, bytes).

    How safetensors files are cut into shards, where they lie and their metadata do not count; a `.bin` file counts as a whole. About 1 s a GB
    and core at first, then from the cache. Raises UserError as `weights.open_folder`, and for a config.json that cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in HOUSEKEEPING}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}; copy the model folder again") from None
    stored = list(weights.open_folder(folder).values())
    stored += [item.scale for item in stored if item.scale is not None]
    files: dict[Path, list[weights.Stored]] = {}
    for item in sorted(stored, key=lambda item: (str(item.path), item.offset or 0)):
        files.setdefault(item.path, []).append(item)
    entries = [entry for path, items in files.items() for entry in _digests(_state(path), tuple(items))]
    return _hash(json.dumps([kept, sorted(entries)], sort_keys=True).encode())


def trained_on(adapter: Path) -> str | None:
    """The fingerprint of the base that an adapter folder was made for, out of its file's header; None where it says nothing of it."""
    try:
        with open(adapter / "adapter_model.safetensors", "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 26)))
        found = header.get("__metadata__", {}).get(NOTE)
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with the file is told where it is opened
    return found if isinstance(found, str) else None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _state(path: Path) -> State:
    """A file that is replaced or written to gets another ctime, whatever mtime a copy was given."""
    stat = path.resolve().stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _digests(state: State, items: tuple[weights.Stored, ...]) -> list[list[str]]:
    """[what, digest] for each tensor of one file, or for the whole of a `.bin` file. items: its tensors, by their offsets."""
    if time.time_ns() - state[3] < SETTLED_NS:
        return _read(state, items)
    return _remembered(state, items)


@lru_cache(maxsize=256)
def _remembered(state: State, items: tuple[weights.Stored, ...]) -> list[list[str]]:
    if state[1] < KEPT_BYTES:
        return _read(state, items)
    kept = cache_root() / "fingerprints" / f"{_hash(json.dumps(state).encode())}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(kept.read_text(encoding="utf-8"))
    made = _read(state, items)
    with contextlib.suppress(OSError):  # a full disk costs the time to read the file again
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole(kept, json.dumps(made))
    return made


def _read(state: State, items: tuple[weights.Stored, ...]) -> list[list[str]]:
    path, size = Path(state[0]), state[1]
    spans = [(str(items[0].path.suffix), 0, size)]
    if items[0].path.suffix == ".safetensors":
        ends = [*(item.offset or 0 for item in items[1:]), size]
        spans = [(f"{item.name} {item.dtype} {list(item.shape)}", item.offset or 0, end) for item, end in zip(items, ends)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        return [[what, digest] for (what, *_), digest in zip(spans, pool.map(lambda span: _span(path, *span[1:]), spans))]


def _span(path: Path, start: int, end: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (data := file.read(min(1 << 22, end - start))):
            digest.update(data)
            start += len(data)
    return digest.hexdigest()

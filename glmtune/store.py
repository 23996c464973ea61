"""Training sequences on the disk: tokenised once, used by every run with the same data, template and options.

A store is a folder of flat little-endian arrays and an `index.json` that is written last; numpy maps them into memory, so that neither
making nor reading one holds all rows. Nothing is pickled. (Arrow would do the same with one more dependency.)

    ids.bin      int32   the tokens of all sequences, end to end
    weights.bin  uint8   for each token, which of index.json's `weights` the token after it has (0 is not learned)
    last.bin     int32   for each sequence, the token that must follow its last one
    start.bin    int64   where each sequence starts in ids.bin, and the end
    learned.bin  int32   how many tokens of each sequence are learned
    row.bin      int64   the row it came from, counted over all sources
    place.bin    int64   [file, line] of each sequence; index.json names the files
    hash.bin     uint64  of its row's content: the dev split follows from it
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import psutil

from .errors import UserError
from .files import digest as digest_of
from .files import naming, whole
from .records import Example

FORMAT = 1
ARRAYS = {
    "ids": np.int32, "weights": np.uint8, "last": np.int32, "start": np.int64, "learned": np.int32, "row": np.int64, "place": np.int64,
    "hash": np.uint64,
}  # fmt: skip


@dataclass
class Block:
    """A stretch of sequences as arrays, small enough to be passed between processes."""

    arrays: dict[str, np.ndarray]
    weights: list[float]  # what weights.bin counts in, 0.0 first
    files: list[str]

    @classmethod
    def of(cls, examples: Sequence[tuple[int, int, Example]]) -> "Block":
        """examples: (row number, content hash of the row, sequence)."""
        known: dict[float, int] = {0.0: 0, 1.0: 1}
        files: dict[str, int] = {}
        ids, weights, last, lengths, rows, places, hashes = [], [], [], [], [], [], []
        for row, content, example in examples:
            ids += example.ids
            weights += example.weights
            last.append(example.next_ids[-1])
            lengths.append(len(example.ids))
            rows.append(row)
            hashes.append(content)
            name, _, line = example.where.rpartition(":")
            places += [files.setdefault(name, len(files)), int(line) if line.isdigit() else 0]
        flat = np.array(weights, dtype=np.float64)
        codes = flat.astype(np.uint8)
        if not np.array_equal(codes, flat) or codes.max(initial=0) > 1:  # other weights than 0 and 1
            numbers = [known.setdefault(weight, len(known)) for weight in weights]
            if len(known) > 256:
                raise UserError(f"the rows have {len(known)} different weights; at most 256 can be kept. Round them")
            codes = np.array(numbers, dtype=np.uint8)
        ends = np.cumsum(lengths, dtype=np.int64)
        learned = np.diff(np.concatenate([[0], np.cumsum(codes != 0)])[np.concatenate([[0], ends])]) if lengths else []
        made = {"ids": ids, "weights": codes, "last": last, "learned": learned, "row": rows, "place": places, "hash": hashes}
        arrays = {name: np.array(values, dtype=ARRAYS[name]) for name, values in made.items()}
        arrays["start"] = np.array(lengths, dtype=np.int64)
        return cls(arrays, list(known), list(files))


class _Sink:
    """Joins blocks: their weights and file names get common numbers, their lengths become places in one long array."""

    def __init__(self) -> None:
        self.digests = {name: hashlib.blake2b(digest_size=16) for name in ARRAYS}
        self.weights: dict[float, int] = {0.0: 0}
        self.files: dict[str, int] = {}
        self.end = 0
        self._put("start", np.zeros(1, dtype=np.int64))

    def write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def add(self, block: Block) -> None:
        arrays = dict(block.arrays)
        codes = np.array([self.weights.setdefault(weight, len(self.weights)) for weight in block.weights], dtype=np.int64)
        if len(self.weights) > 256:
            raise UserError(f"the rows have {len(self.weights)} different weights; at most 256 can be kept. Round them")
        names = np.array([self.files.setdefault(name, len(self.files)) for name in block.files], dtype=np.int64)
        arrays["weights"] = codes[arrays["weights"]].astype(np.uint8)
        places = arrays["place"].reshape(-1, 2).copy()
        places[:, 0] = names[places[:, 0]]
        arrays["place"] = places.ravel()
        arrays["start"] = self.end + np.cumsum(arrays["start"])
        self.end = int(arrays["start"][-1]) if len(arrays["start"]) else self.end
        for name, array in arrays.items():
            self._put(name, array)

    def _put(self, name: str, array: np.ndarray) -> None:
        data = array.astype(np.dtype(ARRAYS[name]).newbyteorder("<"), copy=False).tobytes()
        self.digests[name].update(data)
        self.write(name, data)

    def index(self, about: dict[str, Any]) -> dict[str, Any]:
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        return {"format": FORMAT, **about, "weights": list(self.weights), "files": list(self.files), "digests": digests}


class _Gathered(_Sink):
    def __init__(self) -> None:
        self.parts: dict[str, list[bytes]] = {name: [] for name in ARRAYS}
        super().__init__()

    def write(self, name: str, data: bytes) -> None:
        self.parts[name].append(data)

    def whole(self, about: dict[str, Any]) -> "Store":
        arrays = {
            name: np.frombuffer(b"".join(self.parts[name]), np.dtype(kind).newbyteorder("<")) for name, kind in ARRAYS.items()
        }
        return Store(None, self.index(about), arrays)


class Writer(_Sink):
    """Writes a store under a temporary name; `done` gives it its own. A process that is killed leaves nothing that is taken for one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        for left in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed here
            if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
                shutil.rmtree(left, ignore_errors=True)
        self.out: dict[str, Any] = {}
        with naming(folder, self.work):
            self.work.mkdir(parents=True)
            self.out = {name: open(self.work / f"{name}.bin", "wb") for name in ARRAYS}  # noqa: SIM115
        super().__init__()

    def write(self, name: str, data: bytes) -> None:
        with naming(self.folder, self.work):
            self.out[name].write(data)

    def done(self, about: dict[str, Any]) -> "Store":
        """Completes the store; `about` is kept in its index. Where another process was faster, that one's is used."""
        with naming(self.folder, self.work):
            for file in self.out.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            whole(self.work / "index.json", json.dumps(self.index(about), ensure_ascii=False))
        try:
            self.work.rename(self.folder)
        except OSError:
            if Store.open(self.folder) is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.work.rename(self.folder)
            else:
                shutil.rmtree(self.work)
        made = Store.open(self.folder)
        if made is None:
            raise OSError(f"{self.folder} was written but does not read back; the disk may be full or failing")
        return made

    def drop(self) -> None:
        for file in self.out.values():
            with contextlib.suppress(OSError):  # it tries once more to write what is left
                file.close()
        shutil.rmtree(self.work, ignore_errors=True)


class _Sequences(Sequence[Example]):
    """Indexing and slicing, by way of `_one`."""

    def _one(self, index: int) -> Example:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        chosen = range(len(self))[index]
        return self._one(chosen) if isinstance(chosen, int) else [self._one(i) for i in chosen]


class Store(_Sequences):
    """A complete store, opened. Sequences are made when they are asked for."""

    def __init__(self, folder: Path | None, about: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.folder, self.about, self.arrays = folder, about, arrays
        self.weights = np.array(about["weights"])
        self.lengths: np.ndarray = np.diff(arrays["start"])

    @classmethod
    def open(cls, folder: Path) -> "Store | None":
        """The store in a folder; None where there is none, or one that is half written, damaged or of another version."""
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                return None
            arrays = {}
            for name, kind in ARRAYS.items():
                path = folder / f"{name}.bin"
                if digest_of(path) != about["digests"][name]:
                    return None
                dtype = np.dtype(kind).newbyteorder("<")
                arrays[name] = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
            return cls(folder, about, arrays)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def in_memory(cls, blocks: Sequence[Block], about: dict[str, Any]) -> "Store":
        """The same without a folder, for little data."""
        gathered = _Gathered()
        for block in blocks:
            gathered.add(block)
        return gathered.whole(about)

    @property
    def digest(self) -> str:
        """Of what is learned: the same for the same sequences, whichever way they were made."""
        kept = [self.about["digests"][name] for name in ("ids", "weights", "last", "start")]
        return hashlib.blake2b(json.dumps([kept, self.about["weights"]]).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def _one(self, index: int) -> Example:
        start, stop = int(self.arrays["start"][index]), int(self.arrays["start"][index + 1])
        ids = self.arrays["ids"][start:stop].tolist()
        file, line = self.arrays["place"][2 * index : 2 * index + 2].tolist()
        name = self.about["files"][file]
        weights = self.weights[self.arrays["weights"][start:stop]].tolist()
        return Example(ids, [*ids[1:], int(self.arrays["last"][index])], weights, f"{name}:{line}" if line else name)


@dataclass
class Chosen(_Sequences):
    """Some sequences of a store, in an order, possibly several times: what a run learns from, or its dev set."""

    store: Store
    index: np.ndarray  # int64
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.store.lengths[self.index].tolist()

    def __len__(self) -> int:
        return len(self.index)

    def _one(self, index: int) -> Example:
        return self.store[int(self.index[index])]

    @property
    def num_learned(self) -> int:
        return int(self.store.arrays["learned"][self.index].sum())

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.store.digest.encode() + self.index.astype("<i8").tobytes(), digest_size=16).hexdigest()


def key(parts: Iterable[Any]) -> str:
    """The name of a store: everything that its sequences follow from."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

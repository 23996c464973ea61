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

A stage's columns (records.Column) stand beside them: `column.NAME.bin`, a number for each sequence or each token; of kind json the UTF-8
text of all values, with `column.NAME.end.bin` int64, where each sequence's text ends. A value per row stands with the row's first sequence.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import psutil

from .errors import UserError
from .files import digest as digest_of
from .files import naming, whole
from .records import Column, Example

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

    columns: Mapping[str, Column] = field(default_factory=dict)

    @classmethod
    def of(cls, examples: Sequence[tuple[int, int, Example]], columns: Mapping[str, Column] | None = None) -> "Block":
        """examples: (row number, content hash of the row, sequence). columns: what each sequence's `columns` hold."""
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
        if np.isin(flat, (0.0, 1.0)).all():
            codes = flat.astype(np.uint8)
        else:
            numbers = [known.setdefault(weight, len(known)) for weight in weights]
            if len(known) > 256:
                raise UserError(f"the rows have {len(known)} different weights; at most 256 can be kept. Round them")
            codes = np.array(numbers, dtype=np.uint8)
        ends = np.cumsum(lengths, dtype=np.int64)
        learned = np.diff(np.concatenate([[0], np.cumsum(codes != 0)])[np.concatenate([[0], ends])]) if lengths else []
        made = {"ids": ids, "weights": codes, "last": last, "learned": learned, "row": rows, "place": places, "hash": hashes}
        arrays = {name: np.array(values, dtype=ARRAYS[name]) for name, values in made.items()}
        arrays["start"] = np.array(lengths, dtype=np.int64)
        for name, column in (columns or {}).items():
            arrays |= _column_arrays(name, column, examples)
        return cls(arrays, list(known), list(files), columns or {})


def _column_arrays(name: str, column: Column, examples: Sequence[tuple[int, int, Example]]) -> dict[str, np.ndarray]:
    """A column of a block. Ends of json texts are counted within the block."""
    if column.per == "token":
        for _, _, example in examples:
            if len(example.columns[name]) != len(example.ids):
                raise ValueError(
                    f"{example.where}: column {name} has {len(example.columns[name])} values for {len(example.ids)} tokens"
                )
        values = [value for _, _, example in examples for value in example.columns[name]]
        return {_key(name): np.array(values, dtype=column.kind)}
    if column.kind != "json":
        return {_key(name): np.array([example.columns[name] for _, _, example in examples], dtype=column.kind)}
    rows = [row for row, _, _ in examples]
    firsts = [column.per == "sequence" or n == 0 or rows[n - 1] != row for n, row in enumerate(rows)]
    texts = [
        json.dumps(example.columns[name], ensure_ascii=False).encode("utf-8", "surrogatepass") if first else b""
        for first, (_, _, example) in zip(firsts, examples, strict=True)
    ]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {_key(name): np.frombuffer(b"".join(texts), np.uint8), _key(name, ".end"): ends}


def _key(name: str, part: str = "") -> str:
    return f"column.{name}{part}"


def array_types(columns: Mapping[str, Column]) -> dict[str, Any]:
    """The arrays of a store and their types."""
    found: dict[str, Any] = dict(ARRAYS)
    for name, column in columns.items():
        found |= (
            {_key(name): np.uint8, _key(name, ".end"): np.int64} if column.kind == "json" else {_key(name): np.dtype(column.kind)}
        )
    return found


class _Sink:
    """Joins blocks: their weights and file names get common numbers, their lengths become places in one long array."""

    def __init__(self, columns: Mapping[str, Column] | None = None) -> None:
        self.columns = columns or {}
        self.types = array_types(self.columns)
        self.digests = {name: hashlib.blake2b(digest_size=16) for name in self.types}
        self.weights: dict[float, int] = {0.0: 0}
        self.files: dict[str, int] = {}
        self.end = 0
        self.text_ends = dict.fromkeys((_key(name, ".end") for name, column in self.columns.items() if column.kind == "json"), 0)
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
        for name, before in self.text_ends.items():
            arrays[name] = before + arrays[name]
            self.text_ends[name] = int(arrays[name][-1]) if len(arrays[name]) else before
        for name, array in arrays.items():
            self._put(name, array)

    def _put(self, name: str, array: np.ndarray) -> None:
        data = array.astype(np.dtype(self.types[name]).newbyteorder("<"), copy=False).tobytes()
        self.digests[name].update(data)
        self.write(name, data)

    def index(self, about: dict[str, Any]) -> dict[str, Any]:
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        columns = {name: asdict(column) for name, column in self.columns.items()}
        return {
            "format": FORMAT, **about, "columns": columns, "weights": list(self.weights), "files": list(self.files), "digests": digests,
        }  # fmt: skip


class _Gathered(_Sink):
    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.parts: dict[str, list[bytes]] = {name: [] for name in array_types(columns)}
        super().__init__(columns)

    def write(self, name: str, data: bytes) -> None:
        self.parts[name].append(data)

    def whole(self, about: dict[str, Any]) -> "Store":
        arrays = {
            name: np.frombuffer(b"".join(self.parts[name]), np.dtype(kind).newbyteorder("<")) for name, kind in self.types.items()
        }
        return Store(None, self.index(about), arrays)


class Writer(_Sink):
    """Writes a store under a temporary name; `done` gives it its own. A process that is killed leaves nothing that is taken for one."""

    def __init__(self, folder: Path, columns: Mapping[str, Column] | None = None):
        self.folder = folder
        self.work = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        for left in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed here
            if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
                shutil.rmtree(left, ignore_errors=True)
        self.out: dict[str, Any] = {}
        with naming(folder, self.work):
            self.work.mkdir(parents=True)
            self.out = {name: open(self.work / f"{name}.bin", "wb") for name in array_types(columns or {})}  # noqa: SIM115
        super().__init__(columns)

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
        self.columns = {name: Column(**column) for name, column in about.get("columns", {}).items()}  # none before 0.4

    @classmethod
    def open(cls, folder: Path) -> "Store | None":
        """The store in a folder; None where there is none, or one that is half written, damaged or of another version."""
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                return None
            arrays = {}
            for name, kind in array_types({name: Column(**one) for name, one in about.get("columns", {}).items()}).items():
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
        gathered = _Gathered(blocks[0].columns if blocks else {})
        for block in blocks:
            gathered.add(block)
        return gathered.whole(about)

    @property
    def row_starts(self) -> np.ndarray:
        """The first sequence of every row."""
        return np.flatnonzero(np.diff(self.arrays["row"], prepend=-1))

    @property
    def digest(self) -> str:
        """Of what is learned: the same for the same sequences, whichever way they were made."""
        names = ("ids", "weights", "last", "start", *(name for name in self.arrays if name not in ARRAYS))
        kept = [self.about["digests"][name] for name in names]
        return hashlib.blake2b(json.dumps([kept, self.about["weights"]]).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def _one(self, index: int) -> Example:
        start, stop = int(self.arrays["start"][index]), int(self.arrays["start"][index + 1])
        ids = self.arrays["ids"][start:stop].tolist()
        file, line = self.arrays["place"][2 * index : 2 * index + 2].tolist()
        name = self.about["files"][file]
        weights = self.weights[self.arrays["weights"][start:stop]].tolist()
        columns = {name: self._value(name, column, index, start, stop) for name, column in self.columns.items()}
        return Example(ids, [*ids[1:], int(self.arrays["last"][index])], weights, f"{name}:{line}" if line else name, columns)

    def _value(self, name: str, column: Column, index: int, start: int, stop: int) -> Any:
        array = self.arrays[_key(name)]
        if column.per == "token":
            return array[start:stop].tolist()
        if column.kind != "json":
            return array[index].item()
        ends = self.arrays[_key(name, ".end")]
        text = array[int(ends[index - 1]) if index else 0 : int(ends[index])].tobytes().decode("utf-8", "surrogatepass")
        return json.loads(text) if text else None  # not the row's first sequence


@dataclass
class Chosen(_Sequences):
    """Some rows of a store, in an order, possibly several times: what a run learns from, or its dev set. Indexing gives sequences; the
    sequences of a row stand next to each other."""

    store: Store
    index: np.ndarray  # int64: the sequences
    starts: np.ndarray | None = None  # int64: where in `index` each row begins; None: every sequence is a row
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.store.lengths[self.index].tolist()
        if self.starts is not None and len(self.starts) == len(self.index):
            self.starts = None

    @classmethod
    def rows_of(cls, store: Store, whole: bool, order: np.ndarray | None = None) -> "Chosen":
        """These rows of a store, by their places among its rows (None: all). whole: the sequences of a source row are one row; else each
        sequence counts by itself, and only `order` goes by source rows."""
        starts = store.row_starts
        order = np.arange(len(starts)) if order is None else np.asarray(order, dtype=np.int64)
        sizes = np.diff(np.append(starts, len(store)))[order]
        first = np.cumsum(sizes) - sizes  # where each row begins in the result
        index = np.repeat(starts[order] - first, sizes) + np.arange(sizes.sum())
        return cls(store, index.astype(np.int64), first if whole else None)

    def __len__(self) -> int:
        return len(self.index)

    def _one(self, index: int) -> Example:
        return self.store[int(self.index[index])]

    @property
    def num_rows(self) -> int:
        return len(self.index) if self.starts is None else len(self.starts)

    @cached_property
    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.lengths if self.starts is None else np.add.reduceat(self.lengths, self.starts).tolist() if self.lengths else []

    def sequences_of(self, rows: Iterable[int]) -> list[list[int]]:
        """Of each of these rows, the positions of its sequences."""
        if self.starts is None:
            return [[row] for row in rows]
        ends = [*self.starts[1:].tolist(), len(self.index)]
        return [list(range(int(self.starts[row]), ends[row])) for row in rows]

    @property
    def num_learned(self) -> int:
        return self.learned(slice(None))

    def learned(self, positions: Any) -> int:
        """How many tokens of these sequences are learned."""
        return int(self.store.arrays["learned"][self.index[positions]].sum())

    @property
    def fingerprint(self) -> str:
        """Of what is learned, in which order and in which rows."""
        rows = b"" if self.starts is None else self.starts.astype("<i8").tobytes()
        return hashlib.blake2b(self.store.digest.encode() + self.index.astype("<i8").tobytes() + rows, digest_size=16).hexdigest()


def key(parts: Iterable[Any]) -> str:
    """The name of a store: everything that its sequences follow from."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

"""Files -> rows with their lines: JSON arrays, JSON Lines, objects back to back, CSV, plain text and Parquet, told apart by content.

Nothing is dropped: what is not a row comes out as `Broken`, with its place. No file is held whole: a window moves over its text.
"""

import csv
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from .blocks import BAD_BYTES, LIMIT, Bytes, DataError, Window, check_is_text, head_of, open_bytes, printable
from .errors import did_you_mean


@dataclass(frozen=True)
class Item:
    """One value of a file, before any form is known; it stands in `line`, and in the file's (unpacked) bytes `start` to `end`."""

    line: int
    value: Any
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Broken:
    """A stretch of a file that is not a row. `lost` is False where only the punctuation between two good rows is wrong."""

    line: int
    column: int | None
    message: str
    start: int
    end: int
    kind: str = "malformed-json"
    lost: bool = True


@dataclass(frozen=True)
class File:
    """An opened data file: `items` is read once, lazily. `layout` is what `data check --fix` writes again."""

    name: str
    layout: Literal["array", "lines", "csv", "text"]
    items: Iterator[Item | Broken]
    notes: tuple[str, ...] = ()
    path: Path = Path()
    packing: Literal["", "gzip", "parquet"] = ""
    _again: list[Bytes] = field(default_factory=list)  # the file, opened anew for `raw`

    def raw(self, item: Item | Broken) -> str:
        """The row as it is spelled in the file, read again; cheap for rows in file order."""
        if self.packing == "parquet":
            assert isinstance(item, Item)
            return json.dumps(item.value, ensure_ascii=False)
        if not self._again:
            self._again.append(open_bytes(self.path, self.packing == "gzip"))
        self._again[0].seek(item.start)
        return self._again[0].read(item.end - item.start).decode("utf-8", "surrogateescape")


# --- files ----------------------------------------------------------------------------------------------------------------

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")


def suffix_of(name: str) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    return Path(name.lower().removesuffix(".gz")).suffix


def is_data_name(name: str) -> bool:
    return suffix_of(name) in SUFFIXES and not name.rpartition("/")[2].startswith(".")


def find_files(path: str) -> list[tuple[Path, str]]:
    """The data files behind a path, each with its name for messages. A directory, or a pattern such as `data/*.jsonl`, gives
    data files in sorted order."""
    found = Path(path).expanduser()
    if not found.exists():
        if re.search(r"[*?\[]", path):
            return _matching(path)
        _refuse_broken_link(found, path)
        raise DataError("missing-file", f"the data file '{path}' is not there{_near_names(found)}")
    if found.is_file():
        return [(found, path)]
    if not found.is_dir():
        raise DataError("missing-file", f"'{path}' is neither a file nor a folder (a pipe?); write what it gives to a file first")
    named = sorted(entry for entry in found.iterdir() if is_data_name(entry.name))
    for entry in named:
        _refuse_broken_link(entry, f"{path.rstrip('/')}/{entry.name}")
    files = [entry for entry in named if entry.is_file()]
    if not files:
        raise DataError("missing-file", f"the folder '{path}' has no data files ({', '.join(SUFFIXES)}, also .gz)")
    return [(entry, f"{path.rstrip('/')}/{entry.name}") for entry in files]


def _refuse_broken_link(path: Path, name: str) -> None:
    """Raises DataError for a link to nothing or to itself, which else is as if it were not there."""
    if not path.is_symlink():
        return
    try:
        path.stat()
    except OSError as error:
        what = "leads in a circle" if error.errno == errno.ELOOP else f"leads to '{os.readlink(path)}', which is not there"
        raise DataError(
            "missing-file", f"the data file '{name}' is a link that {what}; put the file itself there, or mend the link"
        ) from None


def left_out(path: str) -> list[str]:
    """A note where subfolders of a folder have data files too: `find_files` does not look there."""
    folder = Path(path).expanduser()
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(at) != folder and (found := sorted(filter(is_data_name, names))):
            first = Path(at, found[0]).relative_to(folder)
            return [f"{path}: its subfolders are left out ({first} and all else there); '{path.rstrip('/')}/**/*' takes them too"]
    return []


def _matching(pattern: str) -> list[tuple[Path, str]]:
    names = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
    for name in filter(is_data_name, names):
        _refuse_broken_link(Path(name), name)
    files = [name for name in names if is_data_name(name) and Path(name).is_file()]
    if not files:
        what = f"only {some([Path(name).name for name in names])}" if names else "nothing"
        raise DataError("missing-file", f"'{pattern}' matches no data file ({', '.join(SUFFIXES)}, also .gz); it matches {what}")
    return [(Path(name), name) for name in files]


def _near_names(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; there is no folder '{missing.parent}'"
    names = sorted(entry.name for entry in missing.parent.iterdir() if is_data_name(entry.name) or entry.is_dir())
    near = [name for name in names if did_you_mean(missing.stem, [Path(name).stem])]  # '.json' alone makes no two names alike
    return did_you_mean(missing.name, near) or (f"; that folder has {some(names)}" if names else "; that folder has no data files")


def open_file(path: Path, name: str, is_row: Callable[[dict[str, Any]], bool] = lambda value: False, limit: int = LIMIT) -> File:
    """Opens a data file by its content: a JSON array, objects one a line or back to back, CSV or TSV, plain text, Parquet; also
    packed with gzip.

    is_row: whether an object that is a whole file is itself a row, and not a wrapper around a list of rows.
    limit: characters of the longest row; a longer one is an error. Raises DataError for what cannot be read at all: an empty or
    binary file, an encoding other than UTF-8.
    """
    head, packed = head_of(path, name)
    if packed and head.startswith(b"PAR1"):
        raise DataError("binary-file", "this is a Parquet file packed with gzip; unpack it first (gunzip)")
    if head.startswith(b"PAR1"):
        return File(name, "lines", _parquet_items(path), path=path, packing="parquet")
    check_is_text(head, name)
    window = Window(path, packed, limit)
    notes = [f"{name}: starts with a byte order mark (BOM), which is ignored"] if window.has_mark else []
    start = window.skip(0)
    if start == len(window.text):
        raise DataError("empty-file", "the file is empty")
    layout, items, more = _layout(window, lambda: Window(path, packed, limit), start, suffix_of(name), is_row)
    return File(name, layout, items, tuple(notes + more), path, "gzip" if packed else "")


_Layout = tuple[Any, Iterator[Item | Broken], list[str]]


def _layout(window: Window, again: Callable[[], Window], start: int, suffix: str, is_row: Callable) -> _Layout:
    """Content decides; the suffix only tells CSV from plain text, and what a file was meant to be when it is neither."""
    first = window.text[start]
    looks_like_json = first in "[{" and (suffix not in (".csv", ".tsv", ".txt") or _starts_with_object(window, start))
    if looks_like_json and first == "[" and not _is_a_line_among_objects(window, start):
        return "array", _array_items(window, start), []
    if looks_like_json:
        return _objects(window, again, start, is_row)
    if suffix in (".csv", ".tsv"):
        return "csv", _csv_items(window, suffix), []
    if suffix in (".json", ".jsonl", ".ndjson"):
        if re.search(r"^\s*\{", window.text, re.MULTILINE) is None:
            line, column = window.place(start)
            message = f"expected '[' or '{{' (JSON), got {window.excerpt(start)}; CSV needs the suffix .csv, plain text .txt"
            raise DataError("malformed-json", message, line, column)
        return _objects(window, again, start, is_row)
    return _text_items(window, _has_gaps(again()))


def _starts_with_object(window: Window, start: int) -> bool:
    if window.text[start] == "[":
        start = window.skip(start + 1)
    try:
        return isinstance(_decode(window, start)[0], dict)
    except (ValueError, RecursionError):
        return False


def _is_a_line_among_objects(window: Window, start: int) -> bool:
    """Whether the list that the file begins with is one damaged row of JSON Lines: it and the lines after it (1000 are looked at) have no
    object in them, until a line begins with one."""
    for _ in range(1000):
        end = window.text.find("\n", start)
        try:
            value = json.loads(window.text[start:end]) if end > 0 else None
        except (ValueError, RecursionError):
            return False
        if end < 0 or (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
            return False
        start = window.skip(end)
        if window.text.startswith("{", start):
            return True
    return False


def _item(window: Window, line: int, value: Any, start: int, end: int) -> Item | Broken:
    first, last = window.byte(start), window.byte(end)
    if window.matches_bad_bytes(start, end):
        message = "the row has bytes that are not UTF-8 (GBK or Latin-1?); write them as UTF-8"
        return Broken(line, None, message, first, last, "encoding-damage")
    if _HALF.search(window.text, start, end) and (bad := next((key for key in _keys(value) if printable(key) != key), None)):
        message = f"the key '{printable(bad)}' holds half of a surrogate pair, which is not a character"
        return Broken(line, None, message, first, last, "encoding-damage")
    return Item(line, value, first, last)


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _keys(value: Any) -> Iterator[str]:
    """All keys of a row, however deep."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield from one
        rest += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


# --- JSON -----------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise _TwiceError(printable(str(_twice(key for key, _ in pairs))))
    return result


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


class _TwiceError(ValueError):
    """An object has a key twice: plain json would keep the last value and drop the first in silence."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder()
_Until = Literal["line", "array", "file"]
_SAID = {
    "Expecting ',' delimiter": "expected ','",
    "Expecting ':' delimiter": "expected ':'",
    "Expecting value": "expected a value",
    "Expecting property name enclosed in double quotes": "expected a key in double quotes",
    "Illegal trailing comma before end of object": "a comma before '}'",
    "Illegal trailing comma before end of array": "a comma before ']'",
    "Unterminated string starting at": "a string does not end",
    "Invalid control character at": "a raw line break or control character inside a string (write \\n, \\t)",
    "Invalid \\escape": "an invalid \\ escape (write \\\\ for a backslash)",
    "Invalid \\uXXXX escape": "an invalid \\u escape",
}


def _decode(window: Window, start: int, decoder: json.JSONDecoder = _LENIENT) -> tuple[Any, int]:
    """The value at `start` and where it ends; takes more text where the window may end within it."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, start)
            if end < len(window.text) or isinstance(value, dict | list) or not window.more(start):  # 12 may go on as 123
                return value, end
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(window.text) - 16  # in the middle of a word or escape
            if not (cut and window.more(start)):
                raise


def _array_items(window: Window, start: int, wrapped: bool = False) -> Generator[Item | Broken, None, int | None]:
    """The elements of the array that opens at `start`; goes on after every broken one. Returns where it ends, if it does."""
    opening_keys: set[str] = set()
    position, before, closed = start + 1, "[", False
    while True:
        position = window.skip(window.advance(position))
        if position == len(window.text):
            if not closed:
                yield _broken(window, position, position, "the file ends inside the array: expected ']'", lost=False)
            return None
        mark = window.text[position]
        if mark == "]":
            if before == ",":
                yield _broken(window, position, position, "a comma before ']'", lost=False)
            after = window.skip(position + 1)
            if wrapped or after == len(window.text):
                return after
            mark = window.text[after]
            why = {"[": " (two arrays?)", ",": " (a ']' too early?)", "{": " (a ']' too early?)"}.get(mark, "")
            message = f"expected the end of the file after ']', got {window.excerpt(after)}{why}"
            yield _broken(window, position, position, message, lost=False)
            if mark == "{":
                yield from _object_items(window, after)
                return None
            closed = mark != "["
            position, before = (after, "row" if mark == "," else "broken") if closed else (after + 1, "[")
            continue
        if mark == "[" and _opens_row(window, position + 1, opening_keys):
            yield _broken(window, position, position, "expected a row, got '['", lost=False)
            position += 1
            continue
        if mark == ",":
            if before != "row":
                yield _broken(window, position, position, "expected a row, got ','", lost=False)
            position, before = position + 1, ","
            continue
        if before == "row":
            message = f"expected ','{_after_line(window, position)} between two rows, got {window.excerpt(position)}"
            yield _broken(window, position, position, message, lost=False)
        item, position = _decode_row(window, position, opening_keys, "array")
        yield item
        before = "broken" if isinstance(item, Broken) and item.kind == "malformed-json" else "row"
        if before == "broken" and position == len(window.text) and window.ended:
            return None


def _opens_row(window: Window, position: int, opening_keys: set[str]) -> bool:
    """Whether an object begins there as rows before it did."""
    try:
        key = window.skip(_past_mark(window, position, "{"))
        end = _decode(window, key)[1]
    except (ValueError, RecursionError):
        return False
    return window.text[key:end] in opening_keys


def _objects(window: Window, again: Callable[[], Window], start: int, is_row: Callable) -> _Layout:
    wrapped = _wrapped_list(again, is_row)
    if wrapped is None:
        return "lines", _object_items(window, start), []
    return "array", _items_under(again(), wrapped), [f"the rows are the list under the key '{printable(wrapped)}'"]


def _wrapped_list(again: Callable[[], Window], is_row: Callable) -> str | None:
    """`{"data": [{...}, ...]}`: the key of the one list of objects in a file that is one object and not itself a row. Where a row of
    the list is broken the list is found all the same. Raises DataError for an object that holds rows in some other way."""
    value: dict[str, Any] = {}
    lists: list[str] = []
    key, broken, window = None, False, again()
    try:
        for key, position in _entries(window):
            value[key] = beginning = _beginning(window, position)
            if isinstance(beginning, list) and beginning and _is_no_message(beginning[0]):  # a list of messages is a row's
                lists.append(key)
            if len(value) > _MOST_KEYS:
                break
    except (ValueError, RecursionError):
        broken = True
    if broken:  # several objects, or one that is broken within its list or elsewhere
        found = key is not None and set(lists) <= {key} and not is_row(value) and _holds_rows(again(), key, is_row)
        return key if found else None
    _refuse_tables(value, lists, is_row)
    return lists[0] if len(lists) == 1 and not is_row(value) else None


def _holds_rows(window: Window, key: str, is_row: Callable) -> bool:
    """Whether the list under `key`, with something broken in it, is one of rows: its first whole object is one, and the file goes on
    in no other way than with that list."""
    wrapper = _OPENING_KEY.match(window.text, window.skip(0))
    position = next((position for name, position in _entries(window) if name == key), 0)
    while len(window.text) - position < _LOOK and window.more(position):
        pass
    text = window.text[position : position + _LOOK]
    own = _MISSPELT_KEY.match(text, len(text) - len(text[1:].lstrip()))
    if not text.startswith("[") or own is None or wrapper is None:
        return False
    if re.search(r"^\s*\{\s*" + re.escape(wrapper[1]) + r"\s*:", text, re.MULTILINE):  # JSON Lines: all open with that key
        return False
    for match in islice(re.finditer(r"\{\s*" + re.escape(json.dumps(own[1], ensure_ascii=False)) + r"\s*:", text), 20):
        try:
            value = _LENIENT.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
        return is_row(value)
    return False


_LOOK = 200_000  # characters


_MOST_KEYS = 1000


def _is_no_message(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"} & value.keys()


def _refuse_tables(value: dict[str, Any], lists: list[str], is_row: Callable) -> None:
    """Raises DataError for what one object that is a file may be besides a row or a list of rows under a key."""
    values = list(value.values())
    as_rows = 'write it so: df.to_json("rows.jsonl", orient="records", lines=True, force_ascii=False)'
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"} and all(isinstance(one, list) for one in values):
        raise DataError("unknown-form", f'this is a table as pandas writes it with orient="split", no list of rows; {as_rows}')
    if len(values) > 1 and all(isinstance(one, list) for one in values):
        firsts = [one[0] for one in values if one]
        of_texts = any(isinstance(one, str) for one in firsts) and not any(isinstance(one, dict) for one in firsts)
        if of_texts or any(isinstance(one, list) and one and isinstance(one[0], dict) for one in firsts):
            said = f"this is a table by columns, {some(list(value))} with a list of values each, no list of rows"
            raise DataError("unknown-form", f"{said}; in Python: df = pandas.DataFrame(json.load(open(FILE))); {as_rows}")
    if values and all(map(_is_no_message, values)):
        if any(map(is_row, values)):
            said = f"this is one object whose values are the rows ({some(list(value), 3)}), no list of rows"
            raise DataError("unknown-form", f"{said}; write it as one, for example: jq '[.[]]' FILE > rows.json")
        if is_row(value) or all(key.isdigit() for one in values for key in one):
            said = f"this is a table by columns ({some(list(value))}), as pandas' to_json writes it, no list of rows"
            raise DataError("unknown-form", f"{said}; {as_rows}")
    if len(lists) > 1 and not is_row(value):
        said = f"this is one object with several lists of rows ({some(lists)}): which are meant?"
        raise DataError(
            "unknown-form", f"{said} Write each to a file of its own, for example: jq '.[{json.dumps(lists[0])}]' FILE > rows.json"
        )


def _items_under(window: Window, wanted: str) -> Iterator[Item | Broken]:
    for key, position in _entries(window):
        if key == wanted:
            end = yield from _array_items(window, position, wrapped=True)
            if end is not None and not window.text.startswith(("}", ","), window.skip(end)):
                message = (
                    f"expected '}}' after the list under '{printable(wanted)}', got {window.excerpt(end)}; what follows is not read"
                )
                yield _broken(window, end, end, message, lost=False)
            return


def _entries(window: Window) -> Iterator[tuple[str, int]]:
    """The keys of the object that a file is, each with where its value begins. Raises ValueError where it is broken or not all."""
    position = _past_mark(window, 0, "{")
    while True:
        key, position = _decode(window, window.skip(window.advance(position)))
        if not isinstance(key, str):
            raise ValueError
        position = window.skip(_past_mark(window, position, ":"))
        yield key, position
        position = window.skip(_past_value(window, position))
        if window.text.startswith("}", position):
            break
        position = _past_mark(window, position, ",")
    if window.skip(position + 1) < len(window.text):
        raise ValueError


def _beginning(window: Window, position: int) -> Any:
    """The value at `position`; of a list only one element, the first object among its beginning, else its first."""
    if not window.text.startswith("[", position):
        return _decode(window, position)[0]
    position = window.skip(position + 1)
    found: list[Any] = []
    while not window.text.startswith("]", position) and len(found) < 20:
        value, position = _decode(window, position)
        found.append(value)
        position = window.skip(position)
        if isinstance(value, dict) or not window.text.startswith(",", position):
            break
        position = window.skip(position + 1)
    return next(([one] for one in found if isinstance(one, dict)), found[:1])


def _past_value(window: Window, position: int) -> int:
    """Where the value at `position` ends; a list is passed element by element."""
    if not window.text.startswith("[", position):
        return _decode(window, position)[1]
    position = window.skip(position + 1)
    if window.text.startswith("]", position):
        return position + 1
    while True:
        _, position = _decode(window, window.skip(window.advance(position)))
        position = window.skip(position)
        if window.text.startswith("]", position):
            return position + 1
        position = _past_mark(window, position, ",")


def _past_mark(window: Window, position: int, mark: str) -> int:
    position = window.skip(position)
    if not window.text.startswith(mark, position):
        raise ValueError
    return position + 1


def _object_items(window: Window, position: int) -> Iterator[Item | Broken]:
    """Objects back to back, blank space between them or none; one a line is the usual case."""
    until = "line" if _is_one_per_line(window) else "file"
    opening_keys: set[str] = set()
    commas = False
    while True:
        position = window.skip(window.advance(position))
        if position == len(window.text):
            return
        if window.text[position] == "," or (commas and window.text[position] == "]"):
            if not commas:
                message = "rows are separated by ',', but there is no '[' before the first; or take out the commas"
                yield _broken(window, position, position, message, lost=False)
            position, commas = position + 1, True
            continue
        item, position = _decode_row(window, position, opening_keys, until)
        yield item


def _is_one_per_line(window: Window) -> bool:
    opened = list(islice(re.finditer(r"^[ \t]*\{[^\n]*", window.text, re.MULTILINE), 1000))
    whole = [line[0].rstrip() for line in opened if line.end() < len(window.text) or window.ended]
    return sum(line.endswith("}") for line in whole) * 2 >= len(whole)


def _decode_row(window: Window, start: int, opening_keys: set[str], until: _Until) -> tuple[Item | Broken, int]:
    """The row that starts at `start`, and where the next one may start; a broken row ends with its line, the array or the file."""
    line, decoder, twice = window.line(start), _DECODER, ""
    value, end, error = None, start, None
    while True:
        try:
            value, end = _decode(window, start, decoder)
        except _TwiceError as found:
            decoder, twice = _LENIENT, str(found)
            continue
        except RecursionError:
            error = json.JSONDecodeError("nested too deep", window.text, start)
        except (json.JSONDecodeError, DataError) as found:
            if isinstance(found, DataError):
                raise
            error = found
        except ValueError as found:  # an integer of thousands of digits
            error = json.JSONDecodeError(str(found).split(";")[0], window.text, start)
        break
    first = _OPENING_KEY.match(window.text, start)
    if first and len(opening_keys) < 1000:
        opening_keys.add(first[1])
    if error is not None:
        try:
            end = _next_row(window, start, opening_keys, until)
        except DataError as far:  # nothing to go on with
            broken = _broken_row(window, start, len(window.text), error)
            raise DataError(far.kind, f"{broken.message}; and {far}", broken.line, broken.column) from None
        return _broken_row(window, start, end, error), end
    if twice:
        message = f"the key '{twice}' stands twice in one object"
        return Broken(line, None, message, window.byte(start), window.byte(end), "duplicate-key"), end
    return _item(window, line, value, start, end), end


_MISSPELT_KEY = re.compile(r"""\{?\s*["'“”‘’]*([^\W\d][\w -]{0,40})["'“”‘’]*\s*:""")
_OPENING_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')


def _next_row(window: Window, start: int, opening_keys: set[str], until: _Until) -> int:
    """Where reading goes on after a broken row: at the next object that opens with a key that rows, or this one, open with, or that
    stands as far from the beginning of its line; else where it must end at the latest, which for what is no object at all is its
    line. What rows came before must not decide alone: there may be none."""
    line_end = window.line_end(start) if until == "line" or window.text[start] != "{" else None
    if line_end is not None:
        window.skip(line_end)  # so that the file's end is known where nothing follows
    own = _MISSPELT_KEY.match(window.text, start)
    keys = "|".join(map(re.escape, sorted(opening_keys | ({json.dumps(own[1], ensure_ascii=False)} if own else set()))))
    lead = window.text[window.text.rfind("\n", 0, start) + 1 : start]
    # What stands behind a colon is a value of the broken row, not the next row.
    known = r"(?<!:)(?<!: )\{\s*(?:" + keys + r")\s*:" if keys else r"(?<=\n)\{"
    leads = ["", " "] if lead.strip() else [lead]  # behind '[' in its line
    pattern = re.compile("|".join([known, *(rf'(?<=\n{re.escape(one)})\{{\s*"' for one in leads)]))
    while True:
        stop = _before_closing(window.text) if until == "array" and window.ended else len(window.text)
        stop = stop if line_end is None else min(stop, line_end)
        match = pattern.search(window.text, start + 1, stop)
        if match or line_end is not None or not window.more(start):
            return match.start() if match else max(stop, start + 1)


def _before_closing(text: str) -> int:
    last = _last_filled(text, len(text)) - 1
    return last if text[last] == "]" else len(text)


def _last_filled(text: str, position: int) -> int:
    """Where the blank space before `position` begins."""
    while position and text[position - 1].isspace():
        position -= 1
    return position


def _broken_row(window: Window, start: int, end: int, error: json.JSONDecodeError) -> Broken:
    text, position, message = window.text, error.pos, _SAID.get(error.msg, error.msg.lower())
    row = text[start:end].rstrip().rstrip(",").rstrip()
    if position >= end and error.msg.startswith(("Unterminated", "Invalid control")):  # the string ran on into the next row
        position, message = start + len(row), "a string does not end"
    elif position >= end:
        position, message = start + len(row), "the row does not end: expected '}'"
    elif error.msg.startswith("Invalid control") and text[position] in "\r\n":
        message = "a string does not end before the line does (a line break inside it is written \\n)"
    elif error.msg.startswith("Expecting property") and text[position] == "}":
        message = "a comma before '}'"
    elif message.startswith("expected"):
        after = _after_line(window, position) if message == "expected ','" else ""
        message += f"{after}, got {window.excerpt(position)}"
    else:
        message += f": {window.excerpt(position)}"
    opened, (line, column) = window.line(start), window.place(position)
    if line != opened:
        message += f" (in the row that starts in line {opened})"
    if "\n" in text[position:end].rstrip() and "{" in text[position:end]:
        message += "; what follows could not be read"
    return Broken(line, column, message, window.byte(start), window.byte(end))


def _after_line(window: Window, position: int) -> str:
    """A missing comma is noticed at the next token, often a line later; the line to mend is the one before."""
    line = window.line(_last_filled(window.text, position))
    return f" after line {line}" if window.line(position) != line else ""


def _broken(window: Window, position: int, end: int, message: str, *, lost: bool) -> Broken:
    line, column = window.place(position)
    return Broken(line, column, message, window.byte(position), window.byte(end), lost=lost)


# --- CSV, plain text, Parquet ---------------------------------------------------------------------------------------------


def _csv_items(window: Window, suffix: str) -> Iterator[Item | Broken]:
    """Records with a header; texts in quotes may hold line breaks. After a broken record reading goes on at the next line."""
    csv.field_size_limit(2**31 - 1)
    excel = _EXCEL.match(window.text)
    header, count = None, 0
    start = at = excel.end() if excel else 0  # where the record that is read begins, and where its next line does
    end = window.line_end(window.skip(start))
    head = _QUOTED.sub("", window.text[start:end])
    if "\r" in head.strip():
        raise DataError("malformed-row", "the lines end with \\r alone (old Mac); wanted \\n: tr '\\r' '\\n' < FILE > NEW_FILE")
    delimiter = "\t" if suffix == ".tsv" or ("\t" in head and "," not in head) else ";" if ";" in head and "," not in head else ","
    delimiter = excel[1] if excel else delimiter

    def lines() -> Iterator[str]:
        nonlocal at
        while at < len(window.text) or window.more(start):
            begin, at = at, window.line_end(at, start)
            yield window.text[begin:at].removesuffix("\n") + "\n"

    while at < len(window.text) or window.more(start):
        try:
            for fields in csv.reader(lines(), delimiter=delimiter, strict=True):
                if fields and header is None:
                    header = _csv_header(fields)
                elif fields and header is not None:
                    count += 1
                    yield _csv_item(window, header, fields, start, at)
                start = at = window.advance(at)
        except csv.Error as error:
            at = window.line_end(start)
            count += 1
            message = f"broken CSV: {str(error).split(' - ')[0]} (is a quote missing?)"
            yield Broken(window.line(start), None, message, window.byte(start), window.byte(at), "malformed-row")
            start = at = window.advance(at)
    if header and not count:
        said = f"the file has no rows: its one line is read as the header, the names of its columns ({some(header)})"
        raise DataError("empty-file", f"{said}; is the header missing? Then write one above it, such as: instruction,output")


_EXCEL = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?\n', re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*(?:"|$)')


def _csv_header(fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    if (twice := _twice(names)) is not None:
        raise DataError("duplicate-key", f"the header names the column '{printable(twice)}' twice")
    if BAD_BYTES.search("".join(names)):
        raise DataError("encoding-damage", "the header has bytes that are not UTF-8 (GBK or Latin-1?); write them as UTF-8")
    return names


def _csv_item(window: Window, header: list[str], fields: list[str], start: int, end: int) -> Item | Broken:
    line = window.line(start)
    if len(fields) == len(header):
        return _item(window, line, dict(zip(header, fields, strict=True)), start, end)
    message = f"the row has {len(fields)} fields, the header has {len(header)} (a text with a separator in it needs double quotes)"
    return Broken(line, None, message, window.byte(start), window.byte(end), "malformed-row")


def _has_gaps(window: Window) -> bool:
    """Whether blank lines stand between texts, anywhere in the file."""
    start = window.skip(0)
    while True:
        end = _last_filled(window.text, len(window.text))
        if _GAP.search(window.text, start, end):
            return True
        start = window.advance(end)
        try:
            if not window.more(start):
                return False
        except DataError:  # told where the texts are read
            return False


_GAP = re.compile(r"\n[ \t\r]*\n")


def _text_items(window: Window, by_blank_lines: bool) -> _Layout:
    """One document a line; where blank lines stand between texts, they separate documents and single line breaks are kept."""
    pattern = re.compile(r"\S[^\n]*(?:\n[ \t\r]*\S[^\n]*)*" if by_blank_lines else r"\S[^\n]*")
    filled = re.compile(r"\S")

    def items() -> Iterator[Item | Broken]:
        position = 0
        while True:
            position = window.advance(position)
            match = pattern.search(window.text, position)
            if match is None:
                position = len(window.text)
                if not window.more(position):
                    return
            elif filled.search(window.text, match.end()) or not window.more(match.start()):  # else it may go on
                value = {"text": match[0].replace("\r\n", "\n").rstrip()}
                yield _item(window, window.line(match.start()), value, match.start(), match.end())
                position = match.end()

    return "text", items(), ["documents are separated by blank lines" if by_blank_lines else "every line is a document"]


def _parquet_items(path: Path) -> Iterator[Item | Broken]:
    """Rows by their number. Parquet knows no missing keys: one that is null is left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("binary-file", 'Parquet files need pyarrow: pip install "glmtune[parquet]"') from None
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            if (twice := _twice(table.schema_arrow.names)) is not None:
                raise DataError("duplicate-key", f"two columns have the name '{twice}'")
            for batch in table.iter_batches(batch_size=256):
                for number, row in enumerate(_rows_of(batch), number + 1):  # noqa: B020
                    yield Item(number, _without_nulls(row), number - 1, number)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:  # damaged pages, no UTF-8, dates beyond all years
        message = f"this is a binary file (Parquet) that cannot be read: {(str(error).splitlines() or [repr(error)])[0]}"
        raise DataError("binary-file", message, number + 1) from None


def _rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch; where one of them cannot be read, those before it."""
    try:
        rows = batch.to_pylist()
    except (OverflowError, ValueError):
        rows = (batch.slice(at, 1).to_pylist()[0] for at in range(len(batch)))
    yield from rows


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else str(value)  # dates, decimals, bytes


def some(names: Sequence[str], limit: int = 8) -> str:
    return str(list(names[:limit]))[:-1] + (", ...]" if len(names) > limit else "]")

"""Files -> rows with their lines: JSON arrays, JSON Lines, objects back to back, CSV and plain text, told apart by content.

Nothing is dropped: what is not a row comes out as `Broken`, with its place.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, did_you_mean


class DataError(UserError):
    """A row or a file that cannot be used. `kind` is the stable name that `glmtune data check` reports; the message has no place in it."""

    def __init__(self, kind: str, message: str, line: int = 1, column: int | None = None):
        super().__init__(message)
        self.kind, self.line, self.column = kind, line, column


@dataclass(frozen=True)
class Item:
    """One value of a file, before any form is known: `value` stands in `line` as `text[start:end]`."""

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
    text: str
    layout: Literal["array", "lines", "csv", "text"]
    items: Iterator[Item | Broken]
    notes: tuple[str, ...] = ()


# --- files: bytes -> items with their lines -------------------------------------------------------------------------------

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PAR1": "Parquet",
    b"PK\x03\x04": "zip or Excel",
    b"%PDF": "PDF",
    b"SQLite": "SQLite",
    b"ARROW1": "Arrow",
}


def find_files(path: str) -> list[tuple[Path, str]]:
    """The data files behind a path, each with its name for messages; a directory gives its own data files in sorted order."""
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError("missing-file", f"the data file '{path}' is not there{_near_names(found)}")
    if not found.is_dir():
        return [(found, path)]
    files = sorted(
        entry for entry in found.iterdir() if entry.suffix.lower() in SUFFIXES and entry.is_file() and entry.name[0] != "."
    )
    if not files:
        raise DataError("missing-file", f"the folder '{path}' has no data files ({', '.join(SUFFIXES)})")
    return [(entry, f"{path.rstrip('/')}/{entry.name}") for entry in files]


def open_file(path: Path, name: str, is_row: Callable[[dict[str, Any]], bool] = lambda value: False) -> File:
    """Opens a data file by its content: a JSON array, objects one a line or back to back, CSV or TSV, plain text.

    is_row: whether an object that is a whole file is itself a row, and not a wrapper around a list of rows.
    Raises DataError for what cannot be read at all: an empty or binary file, an encoding other than UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError("missing-file", f"the data file '{name}' cannot be read: {error.strerror}") from error
    text, bad_bytes, notes = _decode(data, name)
    start = _skip(text, 0)
    if start == len(text):
        raise DataError("empty-file", "the file is empty")
    layout, items, more = _layout(text, start, Path(name).suffix.lower(), is_row)
    if bad_bytes:
        items = _refuse_bad_bytes(items, text)
    return File(name, text, layout, items, tuple(notes + more))


def _near_names(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; there is no folder '{missing.parent}'"
    names = sorted(entry.name for entry in missing.parent.iterdir() if entry.suffix.lower() in SUFFIXES or entry.is_dir())
    near = [name for name in names if did_you_mean(missing.stem, [Path(name).stem])]  # '.json' alone makes no two names alike
    return did_you_mean(missing.name, near) or (f"; that folder has {some(names)}" if names else "; that folder has no data files")


def _decode(data: bytes, name: str) -> tuple[str, bool, list[str]]:
    """UTF-8 text, whether single bytes in it are not UTF-8 (kept as lone surrogates), and notes."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or _every_other_byte_is_nul(data):
        raise DataError("encoding-damage", "this is UTF-16, not UTF-8" + _iconv("UTF-16", name))
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise DataError("binary-file", f"this is a binary file ({what}), not text; unpack or convert it to JSON Lines first")
    head = data[:8192]
    if sum(byte < 9 or 13 < byte < 32 for byte in head) > len(head) / 50:
        raise DataError("binary-file", "this is a binary file, not text (JSON, JSON Lines, CSV or plain text)")
    notes = []
    if data.startswith(b"\xef\xbb\xbf"):
        notes.append(f"{name}: starts with a byte order mark (BOM), which is ignored")
        data = data[3:]
    try:
        return data.decode("utf-8"), False, notes
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "surrogateescape")
        _refuse_other_encoding(data, text, error.start, name)
        return text, True, notes


def _every_other_byte_is_nul(data: bytes) -> bool:
    head = data[:512]
    return len(head) > 3 and max(head[0::2].count(0), head[1::2].count(0)) > len(head) / 4


def _refuse_other_encoding(data: bytes, text: str, first: int, name: str) -> None:
    """A file of another encoding is one error; a few bad lines in a UTF-8 file are errors of those rows."""
    lines = [line for line in text.split("\n") if line.strip()]
    foreign = [line for line in lines if not line.isascii()]
    bad = sum(1 for line in foreign if _BAD_BYTES.search(line))
    if bad * 2 <= len(foreign) or bad * 10 <= len(lines):
        return
    line = data.count(b"\n", 0, first) + 1
    try:
        data.decode("gb18030")
        guess = "GB18030"
    except UnicodeDecodeError:
        guess = "LATIN1"
    kind = "GBK" if guess == "GB18030" else "another encoding"
    message = f"byte 0x{data[first]:02x} is not UTF-8; the file looks like {kind}"
    raise DataError("encoding-damage", message + _iconv(guess, name), line)


_BAD_BYTES = re.compile("[\udc80-\udcff]")


def _iconv(encoding: str, name: str) -> str:
    return f"; convert it: iconv -f {encoding} -t UTF-8 {Path(name).name} > utf8-{Path(name).name}"


def _refuse_bad_bytes(items: Iterator[Item | Broken], text: str) -> Iterator[Item | Broken]:
    for item in items:
        if isinstance(item, Item) and _holds_bad_bytes(item, text):
            message = "the row has bytes that are not UTF-8 (GBK or Latin-1?); write them as UTF-8"
            yield Broken(item.line, None, message, item.start, item.end, "encoding-damage")
        else:
            yield item


def _holds_bad_bytes(item: Item, text: str) -> bool:
    return _BAD_BYTES.search(text, item.start, item.end) is not None


def _layout(text: str, start: int, suffix: str, is_row: Callable) -> tuple[Any, Iterator[Item | Broken], list[str]]:
    """Content decides; the suffix only tells CSV from plain text, and what a file was meant to be when it is neither."""
    looks_like_json = text[start] in "[{" and (suffix not in (".csv", ".tsv", ".txt") or _starts_with_object(text, start))
    if looks_like_json and text[start] == "[":
        return "array", _array_items(text, start, _Ruler(text)), []
    if looks_like_json:
        return _objects(text, start, is_row)
    if suffix in (".csv", ".tsv"):
        return "csv", _csv_items(text, suffix), []
    if suffix in (".json", ".jsonl", ".ndjson"):
        if not _has_json_lines(text):
            line, column = _Ruler(text).place(start)
            message = f"expected '[' or '{{' (JSON), got {_excerpt(text, start)}; CSV needs the suffix .csv, plain text .txt"
            raise DataError("malformed-json", message, line, column)
        return _objects(text, start, is_row)
    return _text_items(text)


def _starts_with_object(text: str, start: int) -> bool:
    if text[start] == "[":
        start = _skip(text, start + 1)
    try:
        return isinstance(_DECODER.raw_decode(text, start)[0], dict)
    except (ValueError, RecursionError):
        return False


def _has_json_lines(text: str) -> bool:
    return re.search(r"^\s*\{", text, re.MULTILINE) is not None


# --- files: JSON ----------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _TwiceError(twice)
    return result


class _TwiceError(ValueError):
    """An object has a key twice: plain json would keep the last value and drop the first in silence."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")
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


class _Ruler:
    """Line and column of a position. Counts only from the last position asked for, so one pass over a file is linear."""

    def __init__(self, text: str):
        self.text, self.position, self.line_there = text, 0, 1

    def line(self, position: int) -> int:
        near, far = sorted((self.position, position))
        count = self.text.count("\n", near, far)
        self.line_there += count if position >= self.position else -count
        self.position = position
        return self.line_there

    def place(self, position: int) -> tuple[int, int]:
        return self.line(position), position - self.text.rfind("\n", 0, position)


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _excerpt(text: str, position: int) -> str:
    piece = text[position : position + 24].split("\n")[0].rstrip()
    piece = "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in piece)
    return f"'{piece}'" if piece else ("the end of the line" if position < len(text) else "the end of the file")


def _array_items(text: str, start: int, ruler: _Ruler) -> Iterator[Item | Broken]:
    """The elements of the array that opens at `start`; goes on after every broken one."""
    opening_keys: set[str] = set()
    closing = len(text.rstrip()) - 1
    stop = closing if text[closing] == "]" else len(text)
    position, before = start + 1, "["
    while True:
        position = _skip(text, position)
        if position == len(text):
            yield _broken(ruler, position, position, "the file ends inside the array: expected ']'", lost=False)
            return
        mark = text[position]
        if mark == "]":
            if before == ",":
                yield _broken(ruler, position, position, "a comma before ']'", lost=False)
            yield from _after_array(text, position + 1, ruler)
            return
        if mark == ",":
            if before != "row":
                yield _broken(ruler, position, position, "expected a row, got ','", lost=False)
            position, before = position + 1, ","
            continue
        if before == "row":
            message = f"expected ','{_after_line(ruler, position)} between two rows, got {_excerpt(text, position)}"
            yield _broken(ruler, position, position, message, lost=False)
        item, position = _decode_row(text, position, ruler, opening_keys, stop)
        yield item
        before = "broken" if isinstance(item, Broken) and item.kind == "malformed-json" else "row"
        if before == "broken" and position == len(text):
            return


def _after_array(text: str, position: int, ruler: _Ruler) -> Iterator[Item | Broken]:
    position = _skip(text, position)
    if position == len(text):
        return
    more = text[position] == "["
    message = f"expected the end of the file after ']', got {_excerpt(text, position)}" + (" (two arrays?)" if more else "")
    yield _broken(ruler, position, len(text), message, lost=not more)
    if more:
        yield from _array_items(text, position, ruler)


def _objects(text: str, start: int, is_row: Callable) -> tuple[Any, Iterator[Item | Broken], list[str]]:
    wrapped = _wrapped_list(text, start, is_row)
    if wrapped is None:
        return "lines", _object_items(text, start, _Ruler(text)), []
    key, position, end = wrapped
    return "array", _array_items(text[:end], position, _Ruler(text)), [f"the rows are the list under the key '{key}'"]


def _wrapped_list(text: str, start: int, is_row: Callable) -> tuple[str, int, int] | None:
    """`{"data": [{...}, ...]}`: key, start and end of the one list of objects in a file that is one object and not itself a row."""
    try:
        value, end = _LENIENT.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if _skip(text, end) < len(text) or not isinstance(value, dict) or is_row(value):
        return None
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(lists) != 1 or {"role", "from"} & value[lists[0]][0].keys():  # a list of messages is a row's, not a file's
        return None
    position = _skip(text, start + 1)
    while True:  # the object is known to be well formed
        key, position = _LENIENT.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)
        _, end = _LENIENT.raw_decode(text, position)
        if key == lists[0]:
            return key, position, end
        position = _skip(text, _skip(text, end) + 1)


def _object_items(text: str, position: int, ruler: _Ruler) -> Iterator[Item | Broken]:
    """Objects back to back, blank space between them or none; one a line is the usual case."""
    one_per_line = _is_one_per_line(text)
    opening_keys: set[str] = set()
    commas = False
    while (position := _skip(text, position)) < len(text):
        if text[position] == "," or (commas and text[position] == "]"):
            if not commas:
                message = "rows are separated by ',', but there is no '[' before the first; or take out the commas"
                yield _broken(ruler, position, position, message, lost=False)
            position, commas = position + 1, True
            continue
        line_end = text.find("\n", position) if one_per_line else -1
        stop = line_end + 1 if line_end >= 0 else len(text)
        item, position = _decode_row(text, position, ruler, opening_keys, stop)
        yield item


def _is_one_per_line(text: str) -> bool:
    opened = list(islice(re.finditer(r"^[ \t]*\{[^\n]*", text, re.MULTILINE), 1000))
    return sum(line[0].rstrip().endswith("}") for line in opened) * 2 >= len(opened)


def _decode_row(text: str, start: int, ruler: _Ruler, opening_keys: set[str], stop: int) -> tuple[Item | Broken, int]:
    """The row that starts at `start`, and where the next one may start. A broken row ends at `stop` at the latest."""
    line = ruler.line(start)
    first = _OPENING_KEY.match(text, start)
    if first:
        opening_keys.add(first[1])
    try:
        value, end = _DECODER.raw_decode(text, start)
        return Item(line, value, start, end), end
    except _TwiceError as error:
        end = _LENIENT.raw_decode(text, start)[1]
        message = f"the key '{error}' stands twice in one object"
        return Broken(line, None, message, start, end, "duplicate-key"), end
    except RecursionError:
        error = json.JSONDecodeError("nested too deep", text, start)
    except json.JSONDecodeError as caught:
        error = caught
    except ValueError as caught:  # an integer of thousands of digits
        error = json.JSONDecodeError(str(caught).split(";")[0], text, start)
    end = _next_row(text, start, opening_keys, stop)
    return _broken_row(text, start, end, error, ruler), end


_OPENING_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')


def _next_row(text: str, start: int, opening_keys: set[str], stop: int) -> int:
    """Where reading goes on after a broken row: at the next object that opens with a key that rows open with, or at `stop`."""
    if text[start] != "{" and 0 < (line_end := text.find("\n", start)) < stop:
        stop = line_end + 1  # not an object at all: every line of it is told
    keys = "|".join(map(re.escape, sorted(opening_keys)))
    pattern = r"\{\s*(?:" + keys + r")\s*:" if keys else r"(?<=\n)\{"
    match = re.compile(pattern).search(text, start + 1, stop)
    return match.start() if match else stop


def _broken_row(text: str, start: int, end: int, error: json.JSONDecodeError, ruler: _Ruler) -> Broken:
    position, message = error.pos, _SAID.get(error.msg, error.msg.lower())
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
        after = _after_line(ruler, position) if message == "expected ','" else ""
        message += f"{after}, got {_excerpt(text, position)}"
    else:
        message += f": {_excerpt(text, position)}"
    opened, (line, column) = ruler.line(start), ruler.place(position)
    if line != opened:
        message += f" (in the row that starts in line {opened})"
    if "\n" in text[position:end].rstrip() and "{" in text[position:end]:
        message += "; what follows could not be read"
    return Broken(line, column, message, start, end)


def _after_line(ruler: _Ruler, position: int) -> str:
    """A missing comma is noticed at the next token, often a line later; the line to mend is the one before."""
    before = len(ruler.text[:position].rstrip()) if ruler.text[position - 1 : position].isspace() else position
    line = ruler.line(before)
    return f" after line {line}" if ruler.line(position) != line else ""


def _broken(ruler: _Ruler, position: int, end: int, message: str, *, lost: bool) -> Broken:
    line, column = ruler.place(position)
    return Broken(line, column, message, position, end, lost=lost)


# --- files: CSV and plain text --------------------------------------------------------------------------------------------


def _csv_items(text: str, suffix: str) -> Iterator[Item | Broken]:
    """Records with a header; texts in quotes may hold line breaks. After a broken record reading goes on at the next line."""
    csv.field_size_limit(2**31 - 1)
    lines = [line + "\n" for line in text.split("\n")]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    head = lines[0]
    delimiter = "\t" if suffix == ".tsv" or ("\t" in head and "," not in head) else ";" if ";" in head and "," not in head else ","
    header: list[str] | None = None
    index = 0
    while index < len(lines):
        reader = csv.reader(islice(lines, index, None), delimiter=delimiter, strict=True)
        base = index
        try:
            for fields in reader:
                here, index = index, base + reader.line_num
                if not fields:
                    continue
                if header is None:
                    header = _csv_header(fields)
                    continue
                end = min(starts[index], len(text))
                yield _csv_item(header, fields, here + 1, starts[here], end)
        except csv.Error as error:
            end = min(starts[index + 1], len(text))
            yield Broken(index + 1, None, f"broken CSV: {error} (is a quote missing?)", starts[index], end, "malformed-row")
            index += 1


def _csv_header(fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError("duplicate-key", f"the header names the column '{twice[0]}' twice")
    return names


def _csv_item(header: list[str], fields: list[str], line: int, start: int, end: int) -> Item | Broken:
    if len(fields) == len(header):
        return Item(line, dict(zip(header, fields, strict=True)), start, end)
    message = f"the row has {len(fields)} fields, the header has {len(header)} (a text with a separator in it needs double quotes)"
    return Broken(line, None, message, start, end, "malformed-row")


def _text_items(text: str) -> tuple[Any, Iterator[Item | Broken], list[str]]:
    """One document a line; where blank lines stand between texts, they separate documents and single line breaks are kept."""
    by_blank_lines = re.search(r"\n[ \t\r]*\n", text.strip()) is not None
    pattern = r"\S[^\n]*(?:\n[ \t\r]*\S[^\n]*)*" if by_blank_lines else r"\S[^\n]*"
    ruler = _Ruler(text)
    items = (
        Item(ruler.line(match.start()), {"text": match[0].replace("\r\n", "\n").rstrip()}, match.start(), match.end())
        for match in re.finditer(pattern, text)
    )
    return "text", items, ["documents are separated by blank lines" if by_blank_lines else "every line is a document"]


def some(names: Sequence[str], limit: int = 8) -> str:
    return str(list(names[:limit]))[:-1] + (", ...]" if len(names) > limit else "]")

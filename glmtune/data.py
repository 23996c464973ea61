"""Sources -> Conversations | Documents: the first hop of a sample. docs/architecture.md has the four hops.

    path -> open_file() -> Item(line, value) -> FORMATS[form](row) -> Conversation -> load(): system, variables, weights

A row form is a set of names: which key of a row is the prompt, which the response ... (NAMES). `columns:` in a run file is the
same thing written by the user. Every row keeps its line, and a row that cannot be used is an error that names it: nothing is
dropped, cut or skipped in silence.
"""

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from glmtune.errors import UserError, did_you_mean
from glmtune.records import ROLES, Conversation, Document, Turn

Want = Literal["answers", "prompts", "text"]
Record = TypeVar("Record", Conversation, Document)


class Source(Protocol):
    """One entry of `data:`; the run file's typed model has these fields."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str | None: ...
    @property
    def columns(self) -> dict[str, str] | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def max_samples(self) -> int | None: ...
    @property
    def system(self) -> str | None: ...


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


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one place of a file."""

    file: str
    line: int
    kind: str
    message: str
    level: Literal["error", "warning"] = "error"
    column: int | None = None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True)
class Reading:
    """How rows are to be read: for which use, and in which form if not the one that their keys show."""

    want: Want = "answers"
    join: str = "\n"
    format: str | None = None
    columns: dict[str, str] | None = None


@dataclass
class Parsed:
    """What became of every item of a file, or of all files of a source, in order."""

    outcomes: list[tuple[Item | Broken, Conversation | Document | Problem]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    form: str = ""

    @property
    def rows(self) -> list[Conversation | Document]:
        return [outcome for _, outcome in self.outcomes if not isinstance(outcome, Problem)]

    @property
    def problems(self) -> list[Problem]:
        return [outcome for _, outcome in self.outcomes if isinstance(outcome, Problem)]


@dataclass(frozen=True)
class Span:
    """The rows of one source: `rows[start : start + count]`."""

    path: str
    format: str
    start: int
    count: int


@dataclass(frozen=True)
class Loaded:
    """What `load` returns. `notes` are lines to print."""

    rows: list[Any]  # list[Conversation] or, for want="text", list[Document]
    notes: list[str]
    spans: list[Span]


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


def find_files(path: str, folder: Path | None = None) -> list[tuple[Path, str]]:
    """The data files behind a path, each with its name for messages; a directory gives its own data files in sorted order.

    A path that is not there relative to the working directory is looked for in `folder`.
    """
    found = Path(path).expanduser()
    if not found.exists() and folder is not None:
        found = Path(folder) / found
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


def open_file(path: Path, name: str) -> File:
    """Opens a data file by its content: a JSON array, objects one a line or back to back, CSV or TSV, plain text.

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
    layout, items, more = _layout(text, start, Path(name).suffix.lower())
    if bad_bytes:
        items = _refuse_bad_bytes(items, text)
    return File(name, text, layout, items, tuple(notes + more))


def _near_names(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; there is no folder '{missing.parent}'"
    names = sorted(entry.name for entry in missing.parent.iterdir() if entry.suffix.lower() in SUFFIXES or entry.is_dir())
    hint = did_you_mean(missing.name, names)
    return hint or (f"; that folder has {_some(names)}" if names else "; that folder has no data files")


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


def _layout(text: str, start: int, suffix: str) -> tuple[Any, Iterator[Item | Broken], list[str]]:
    """Content decides; the suffix only tells CSV from plain text, and what a file was meant to be when it is neither."""
    looks_like_json = text[start] in "[{" and (suffix not in (".csv", ".tsv", ".txt") or _starts_with_object(text, start))
    if looks_like_json and text[start] == "[":
        return "array", _array_items(text, start, _Ruler(text)), []
    if looks_like_json:
        return _objects(text, start)
    if suffix in (".csv", ".tsv"):
        return "csv", _csv_items(text, suffix), []
    if suffix in (".json", ".jsonl", ".ndjson"):
        if not _has_json_lines(text):
            line, column = _Ruler(text).place(start)
            message = f"expected '[' or '{{' (JSON), got {_excerpt(text, start)}; CSV needs the suffix .csv, plain text .txt"
            raise DataError("malformed-json", message, line, column)
        return _objects(text, start)
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


def _objects(text: str, start: int) -> tuple[Any, Iterator[Item | Broken], list[str]]:
    wrapped = _wrapped_list(text, start)
    if wrapped is None:
        return "lines", _object_items(text, start, _Ruler(text)), []
    key, position, end = wrapped
    return "array", _array_items(text[:end], position, _Ruler(text)), [f"the rows are the list under the key '{key}'"]


def _wrapped_list(text: str, start: int) -> tuple[str, int, int] | None:
    """`{"data": [{...}, ...]}`: key, start and end of the one list of objects in a file that is one object and not itself a row."""
    try:
        value, end = _LENIENT.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if _skip(text, end) < len(text) or not isinstance(value, dict) or recognise(value, "prompts"):
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
        if text[position] in "," or (commas and text[position] == "]"):
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


# --- forms: a row -> Conversation | Document -----------------------------------------------------------------------------

COLUMNS = ("prompt", "input", "response", "system", "history", "messages", "text", "weight")
_COMMON = {"system": "system", "history": "history", "weight": "weight"}
NAMES: dict[str, dict[str, str]] = {
    "messages": {"messages": "messages", "system": "system", "weight": "weight"},
    "sharegpt": {"messages": "conversations", "system": "system", "weight": "weight"},
    "alpaca": {"prompt": "instruction", "input": "input", "response": "output", **_COMMON},
    "context": {"prompt": "context", "response": "target", **_COMMON},
    "text": {"text": "text", "weight": "weight"},
}
_PAIRS = (("question", "answer"), ("prompt", "response"), ("prompt", "completion"))
_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
_TOOL_SPEAKERS = ("function_call", "observation", "function", "tool_call", "tool_response")


def _by_names(row: dict[str, Any], join: str = "\n", columns: dict[str, str] | None = None) -> Conversation:
    """A row whose keys are named by `columns`: prompt, input, response, system, history; or messages."""
    names = columns or {}
    if "messages" in names:
        turns = [_message(message, number) for number, message in enumerate(_rows(row, names["messages"]), 1)]
    else:
        turns = _history(row, names.get("history")) + _question_and_answer(row, names, join)
    system = row.get(names["system"]) if "system" in names else None
    if system is not None and _text(row, names["system"]) and not _repeats(system, turns):
        turns.insert(0, Turn("system", system))
    return Conversation(tuple(turns))


def _repeats(system: str, turns: list[Turn]) -> bool:
    if not turns or turns[0].role != "system":
        return False
    if turns[0].text != system:
        raise DataError("role-order", "the row has both a key 'system' and a system turn; keep one")
    return True


def _question_and_answer(row: dict[str, Any], names: dict[str, str], join: str) -> list[Turn]:
    parts = [_text(row, names["prompt"])]
    if "input" in names and row.get(names["input"]) is not None:
        parts.append(_text(row, names["input"]))
    turns = [Turn("user", join.join(part for part in parts if part.strip()))]
    if "response" in names and row.get(names["response"]) is not None:
        turns.append(Turn("assistant", _text(row, names["response"])))
    return turns


def _history(row: dict[str, Any], key: str | None) -> list[Turn]:
    if key is None or row.get(key) in (None, "", []):
        return []
    turns = []
    for number, pair in enumerate(_rows(row, key), 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                "wrong-type", f"'{key}' must be a list of [question, answer] pairs of strings; entry {number} is {_show(pair)}"
            )
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _message(message: Any, number: int) -> Turn:
    """One message: role and content (OpenAI, ChatGLM3) or from and value (ShareGPT)."""
    if not isinstance(message, dict):
        raise DataError("wrong-type", f"message {number} must be an object with role and content, not {_show(message)}")
    role_key, text_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    needed = (role_key,) if message.get("tool_calls") else (role_key, text_key)  # a call may stand without any text
    for key in needed:
        if key not in message:
            raise DataError(
                "missing-key", f"message {number} needs the key '{key}'; it has {list(message)}{_mistyped(key, message)}"
            )
    role = _role(message[role_key], number)
    text = "" if message.get("tool_calls") and message.get(text_key) is None else _text(message, text_key, f"message {number}: ")
    learn = message.get("learn")
    if learn is not None and not isinstance(learn, bool):
        raise DataError("wrong-type", f"message {number}: 'learn' must be true or false, not {_show(learn)}")
    weight = _number(message, "weight", f"message {number}: ")
    extra = {key: value for key, value in message.items() if key not in (role_key, text_key, "learn", "weight")}
    return Turn(role, text, learn, weight, extra)


def _role(given: Any, number: int) -> str:
    if given in _TOOL_SPEAKERS:
        raise DataError("tool-turn", f"message {number} is a '{given}' turn: tool calls cannot be trained on yet")
    if not isinstance(given, str) or given not in _SPEAKERS:
        hint = did_you_mean(given, _SPEAKERS) if isinstance(given, str) else ""
        known = f"roles are {', '.join(ROLES)} (or human, gpt)"
        raise DataError("unknown-role", f"message {number} has the unknown role {given!r}; {known}{hint}")
    return _SPEAKERS[given]


def _text(row: dict[str, Any], key: str, where: str = "") -> str:
    value = row[key]
    if not isinstance(value, str):
        nested = "; use a JSON string, or pick other keys with columns:" if isinstance(value, list | dict) else ""
        raise DataError("wrong-type", f"{where}'{key}' must be a string, not {_show(value)}{nested}")
    if _SURROGATE.search(value):
        raise DataError("encoding-damage", f"{where}'{key}' holds half of a surrogate pair, which is not a character")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")


def _rows(row: dict[str, Any], key: str) -> list[Any]:
    """A list; in CSV it is written as a JSON string."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = row[key]
    if not isinstance(value, list):
        raise DataError("wrong-type", f"'{key}' must be a list, not {_show(value)}")
    return value


def _number(row: dict[str, Any], key: str, where: str = "") -> float:
    value = row.get(key)
    if value is None or value == "":
        return 1.0
    try:
        number = float(value) if not isinstance(value, bool | list | dict) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise DataError("wrong-type", f"{where}'{key}' must be a number >= 0 (it scales the loss), not {_show(value)}")
    return number


def _show(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False)
    return f"{kinds[type(value)]} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def _document(row: dict[str, Any], join: str = "\n", columns: dict[str, str] | None = None) -> Document:
    return Document(_text(row, (columns or NAMES["text"])["text"]))


def _form(name: str) -> Callable[..., Conversation]:
    return partial(_by_names, columns=NAMES[name])


# A form from outside is one more line: a function (row, join) -> Conversation, asked for by `format: its-name`.
FORMATS: dict[str, Callable[..., Conversation | Document]] = {
    "alpaca": _form("alpaca"),
    "context": _form("context"),
    "messages": _form("messages"),
    "sharegpt": _form("sharegpt"),
    "columns": _by_names,
    "text": _document,
}


@dataclass(frozen=True)
class Form:
    """How a row is read: the entry of FORMATS and the names of its keys (empty for a form from outside)."""

    name: str
    names: dict[str, str]

    def needs(self, want: Want) -> list[str]:
        wanted = ("messages", "prompt", "text") + (("response",) if want == "answers" else ())
        return [self.names[name] for name in wanted if name in self.names]

    def read(self, row: dict[str, Any], join: str) -> Conversation | Document:
        if self.name == "columns":
            read = _document if "text" in self.names else _by_names
            return read(row, join, self.names)
        return FORMATS[self.name](row, join)

    def describe(self, keys: Iterable[str]) -> str:
        present = set(keys)
        shown = [f"{name}: {key}" if self.name == "columns" else key for name, key in self.names.items() if key in present]
        return f"{self.name} ({', '.join(shown)})" if self.names else self.name


_KNOWN = [Form(name, NAMES[name]) for name in ("messages", "sharegpt", "alpaca")]
_KNOWN += [Form("columns", {"prompt": prompt, "response": response, **_COMMON}) for prompt, response in _PAIRS]
_KNOWN += [Form("context", NAMES["context"])]
_TEXT = Form("text", NAMES["text"])


def recognise(row: dict[str, Any], want: Want) -> Form | None:
    """The form whose keys the row has; for prompts the answer may be missing."""
    if want == "text":
        return _TEXT if "text" in row else None
    for need in ("answers", "prompts") if want == "prompts" else ("answers",):
        for form in _KNOWN:
            if all(key in row for key in form.needs(need)):
                return form
    return None


def form_of_columns(columns: dict[str, str], format: str | None, want: Want) -> Form:
    """The form that `columns:` describes. Raises UserError for names that it does not know or that are missing."""
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"columns: unknown name '{name}'; names are {', '.join(COLUMNS)}{did_you_mean(name, COLUMNS)}")
    kind = "text" if "text" in columns else "messages" if "messages" in columns else "prompt"
    fitting = {"text": ("text",), "messages": ("messages", "sharegpt"), "prompt": ("alpaca", "context")}[kind]
    if format not in (None, "columns", *fitting):
        raise UserError(f"format '{format}' and columns {columns} do not go together; leave one of them out")
    needed = (
        {"text": ["text"], "prompts": ["prompt"], "answers": ["prompt", "response"]}[want] if kind != "messages" else ["messages"]
    )
    missing = [name for name in needed if name not in columns]
    if missing or (want == "text") != (kind == "text"):
        wanted = "{text: KEY}" if want == "text" else "{prompt: KEY, response: KEY} or {messages: KEY}"
        raise UserError(f"columns {columns} do not say where the {missing[0] if missing else want} stands; wanted {wanted}")
    return Form("columns", dict(columns))


def form_of_format(format: str, want: Want) -> Form:
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'; formats are {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    if format == "columns":
        raise UserError("format 'columns' needs columns: {prompt: KEY, response: KEY}")
    if (format == "text") != (want == "text"):
        fit = "plain text has no question and no answer" if format == "text" else f"'{format}' rows are not plain text"
        raise UserError(f"format '{format}' does not fit: {fit}{_text_hint(want)}")
    return Form(format, NAMES.get(format, {}))


def _text_hint(want: Want) -> str:
    if want == "text":
        return "; name the key that holds the text: columns: {text: KEY}"
    return "; `stage: {kind: pretrain}` learns plain text; or name the keys: columns: {prompt: KEY, response: KEY}"


def choose_forms(rows: list[Any], reading: Reading) -> tuple[Form, Callable[[Any], Form]]:
    """The main form of a file's rows, and a function that gives the form of each row.

    Rows may differ in form where each is recognisable; a row that is not is read, and refused, as the main form.
    """
    want = reading.want
    if reading.columns is not None or reading.format is not None:
        form = (
            form_of_columns(reading.columns, reading.format, want)
            if reading.columns is not None
            else form_of_format(str(reading.format), want)
        )
        return form, lambda row: form
    known: dict[tuple[str, ...], Form | None] = {}

    def find(row: dict[str, Any]) -> Form | None:
        keys = tuple(row)
        if keys not in known:
            known[keys] = recognise(row, want)
        return known[keys]

    objects = [row for row in rows if isinstance(row, dict)]
    forms = Counter(found.name + str(found.names) for row in objects if (found := find(row)))
    if forms:
        best = forms.most_common(1)[0][0]
        main = next(form for form in (*_KNOWN, _TEXT) if form.name + str(form.names) == best)
    else:
        main = _nearest_form(objects, want)

    def form_of(row: Any) -> Form:
        found = find(row) if isinstance(row, dict) else None
        return found or main

    return main, form_of


def _nearest_form(objects: list[dict[str, Any]], want: Want) -> Form:
    """No row is whole: a form whose question is there, so that the error names the key that is missing; else an error."""
    if not objects:
        return Form("alpaca", NAMES["alpaca"])  # every row is refused as not-an-object
    keys = list(objects[0])
    if want == "text":
        raise DataError("unknown-form", f"no key 'text' in the keys {_some(keys)}{_text_hint(want)}")
    near = recognise(objects[0], "prompts")
    if near:
        return near
    if "text" in keys:
        raise DataError("unknown-form", f"plain text (keys {_some(keys)}) has no question and no answer{_text_hint(want)}")
    known = ", ".join(form.describe(form.names.values()) for form in (*_KNOWN, _TEXT) if form.name != "columns")
    raise DataError(
        "unknown-form", f"no known form in the keys {_some(keys)}\nknown: {known}\nor name the keys: {_columns_to_paste(keys)}"
    )


def _columns_to_paste(keys: list[str]) -> str:
    names = (keys + ["QUESTION_KEY", "ANSWER_KEY"][len(keys) :])[:2] if len(keys) < 2 else keys
    prompt = next((key for key in names if re.search("prompt|quest|query|instr|input|user|问|source", key, re.I)), names[0])
    rest = [key for key in names if key != prompt]
    response = next((key for key in rest if re.search("resp|answ|output|compl|target|reply|assist|答", key, re.I)), rest[0])
    return f"columns: {{prompt: {prompt}, response: {response}}}"


def _some(names: Sequence[str], limit: int = 8) -> str:
    return str(list(names[:limit]))[:-1] + (", ...]" if len(names) > limit else "]")


# --- rows: what a conversation must be ------------------------------------------------------------------------------------


def parse_row(row: Any, form: Form, want: Want, join: str = "\n") -> Conversation | Document:
    """One row as a checked record, its own system turn first if it has one. Raises DataError (the message has no place in it)."""
    if not isinstance(row, dict):
        raise DataError("not-an-object", f"a row must be a JSON object, this is {_show(row)}")
    if (
        want == "answers"
        and {"chosen", "rejected"} <= row.keys()
        and ("response" not in form.names or form.names["response"] not in row)
    ):
        raise DataError(
            "preference-row", "a preference row (chosen, rejected) has no single answer to learn; it needs a preference stage"
        )
    _require_keys(row, form, want)
    record = form.read(row, join)
    weight = _number(row, form.names["weight"]) if "weight" in form.names else record.weight
    if isinstance(record, Document):
        if not record.text.strip():
            raise DataError("empty-text", f"the text '{form.names['text']}' is empty")
        return replace(record, weight=weight)
    _check_roles(record.turns, want)
    _check_texts(record.turns, want)
    return replace(record, weight=weight)


def _require_keys(row: dict[str, Any], form: Form, want: Want) -> None:
    for key in form.needs(want):
        if key not in row:
            article = "an" if form.name[0] in "aeiou" else "a"
            raise DataError(
                "missing-key" if set(form.names.values()) & row.keys() else "unknown-form",
                f"{article} '{form.name}' row needs the key '{key}'; this row has {_some(list(row))}{_mistyped(key, row)}",
            )
        if row[key] is None:
            raise DataError(
                "wrong-type", f"'{key}' must be a {'list' if form.names.get('messages') == key else 'string'}, not null"
            )


def _mistyped(wanted: str, row: dict[str, Any]) -> str:
    near = next((key for key in row if did_you_mean(key, [wanted])), None)
    return f"; did you mean '{wanted}' by '{near}'?" if near else ""


_MAY_FOLLOW = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def _check_roles(turns: tuple[Turn, ...], want: Want) -> None:
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        what = "no turns" if not roles else "only system turns" if set(roles) == {"system"} else "no user turn"
        raise DataError("no-user-turn", f"the row has {what}: nothing is asked")
    before = ""
    for number, role in enumerate(roles, 1):
        if role == "system":
            if number > 1:
                raise DataError("role-order", f"turn {number} is a system turn; it may only stand first")
            continue
        if role not in _MAY_FOLLOW[before]:
            raise DataError("role-order", f"turn {number}: {_order_said(before, role)}")
        before = role
    if want == "answers" and before != "assistant":
        raise DataError("role-order", f"the last turn is by '{before}'; a row to learn from must end with the assistant's answer")


def _order_said(before: str, role: str) -> str:
    if not before:
        return f"the first turn is by '{role}', it must be by 'user' (after the system turn, if any)"
    if before == role:
        return f"roles must alternate, here are two {role} turns in a row"
    return f"'{role}' may not follow '{before}'; roles must alternate"


def _check_texts(turns: tuple[Turn, ...], want: Want) -> None:
    many = sum(turn.role == "user" for turn in turns) > 1
    for number, turn in enumerate(turns, 1):
        place = f" (turn {number})" if many else ""
        if turn.role == "user" and not turn.text.strip():
            raise DataError("empty-question", f"the question{place} is empty")
        unanswered = want == "prompts" and number == len(turns)
        if turn.role == "assistant" and not turn.text.strip() and not turn.extra.get("tool_calls") and not unanswered:
            raise DataError("empty-answer", f"the answer{place} is empty")


# --- load: sources -> rows ------------------------------------------------------------------------------------------------


def load(
    sources: Sequence[Source],
    *,
    system: str | None = None,
    variables: dict[str, str] | None = None,
    join: str = "\n",
    want: Want = "answers",
    folder: Path | None = None,
) -> Loaded:
    """Reads all sources, in order, into checked rows.

    want: "answers" every row ends with an answer (training); "prompts" the trailing answer, if any, moves to meta["reference"];
    "text" plain text, rows are Documents. `meta["row"]` is the row as it stands in the file. The system turn comes from the row,
    else the source, else `system`. `variables` fill `{{name}}` in every text.
    Raises one UserError of at most three lines: the first bad row, how many more there are and where.
    """
    notes: list[str] = []
    bad: list[Problem] = []
    parts: list[tuple[Source, str, list[Any]]] = []
    for source in sources:
        parsed = _read_source(source, Reading(want, join, source.format, source.columns), folder)
        parts.append((source, parsed.form, parsed.rows))
        notes += parsed.notes
        bad += parsed.problems
    if bad:
        raise UserError(_bad_rows(bad, sources))
    _check_variables(variables or {}, parts, system)
    rows, spans = [], []
    for source, form, own in parts:
        finished = [_finish(row, source.system if source.system is not None else system, variables or {}, want) for row in own]
        finished = _passes(finished, source.weight, source.path)
        spans.append(Span(source.path, form, len(rows), len(finished)))
        rows += finished
    return Loaded(rows, notes, spans)


def _read_source(source: Source, reading: Reading, folder: Path | None) -> Parsed:
    """All files of a source, up to its `max_samples`. Raises UserError for a file that cannot be read at all."""
    whole = Parsed()
    for path, name in find_files(source.path, folder):
        left = None if source.max_samples is None else source.max_samples - len(whole.outcomes)
        if left is not None and left <= 0:
            whole.notes.append(f"{name}: not read (max_samples {source.max_samples} reached)")
            continue
        try:
            file = open_file(path, name)
            items = list(islice(file.items, left))
        except DataError as error:
            raise UserError(str(error) if error.kind == "missing-file" else f"{problem_of(name, error).place}: {error}") from None
        try:
            parsed = parse_items(file, items, reading)
        except DataError as error:  # of what is broken the first is told: it may be why no row makes sense
            first = next((item for item in items if isinstance(item, Broken)), error)
            raise UserError(f"{problem_of(name, first).place}: {problem_of(name, first).message}") from None
        if left is not None and left == len(parsed.outcomes) and parsed.notes:
            parsed.notes[0] += f"; only the first {left} (max_samples {source.max_samples})"
        whole.outcomes += parsed.outcomes
        whole.notes += parsed.notes
        whole.form = "+".join(dict.fromkeys([*filter(None, [whole.form]), parsed.form]))
    return whole


def parse_items(file: File, items: list[Item | Broken], reading: Reading) -> Parsed:
    """The records of a file's items and what is wrong with the others, in order.

    Raises DataError where nothing can be read: no rows at all, no form known for any of them, columns that no row has.
    """
    if not items:
        raise DataError("empty-file", "the file has no rows")
    good = [item.value for item in items if isinstance(item, Item)]
    keys = Counter(key for value in good if isinstance(value, dict) for key in value)
    parsed = Parsed()
    try:
        main, form_of = choose_forms(good, reading)
        if reading.columns is not None and keys:
            parsed.notes += _check_columns(main, keys, reading.want)
    except DataError as error:
        error.line = next((item.line for item in items if isinstance(item, Item)), 1)
        raise
    used: Counter[int] = Counter()
    forms: dict[int, Form] = {}
    for item in items:
        if isinstance(item, Broken):
            parsed.outcomes.append((item, problem_of(file.name, item)))
            continue
        form = form_of(item.value)
        try:
            record = parse_row(item.value, form, reading.want, reading.join)
        except DataError as error:
            parsed.outcomes.append((item, Problem(file.name, item.line, error.kind, str(error))))
            continue
        parsed.outcomes.append((item, replace(record, where=f"{file.name}:{item.line}", meta={"row": item.value})))
        forms[id(form)] = form
        used[id(form)] += 1
    counts = Counter({forms[one].describe(keys): count for one, count in used.items()})
    parsed.notes[:0] = _file_notes(file, counts, main, keys, reading.want)
    parsed.form = main.name
    return parsed


def problem_of(name: str, found: Broken | DataError) -> Problem:
    """The place and the kind of what cannot be read: a stretch of the file `name`, or all of it."""
    message = found.message if isinstance(found, Broken) else str(found)
    return Problem(name, found.line, found.kind, message, column=found.column)


def _check_columns(form: Form, keys: Counter[str], want: Want) -> list[str]:
    """`columns` names that no row has: an error; only references that predict can do without are a note."""
    notes = []
    for name, key in form.names.items():
        if key in keys:
            continue
        if want == "prompts" and name == "response":
            notes.append(f"columns: no row has the key '{key}' (response): nothing to compare with{did_you_mean(key, keys)}")
            continue
        raise DataError(
            "missing-key",
            f"columns: {name} names the key '{key}', which no row has; keys are {_some(list(keys))}{did_you_mean(key, keys)}",
        )
    return notes


def _file_notes(file: File, used: Counter[str], main: Form, keys: Counter[str], want: Want) -> list[str]:
    count = sum(used.values())
    said = ", ".join(f"{form} {number}" for form, number in used.items()) if len(used) > 1 else "".join(used)
    line = f"{file.name}: {count} row{'s' if count != 1 else ''}, form{'s' if len(used) > 1 else ''} {said}"
    unused = [key for key in keys if key not in main.names.values()]
    if unused and len(used) == 1 and main.names:
        line += f"; keys not used: {', '.join(unused[:8])}"
    more = [note if note.startswith(file.name) else f"{file.name}: {note}" for note in file.notes]
    if want == "answers" and "label" in unused:
        more.append(f"{file.name}: the key 'label' is not used: if it marks good and bad answers (KTO), both are learned here")
    return [line, *more]


def _bad_rows(bad: list[Problem], sources: Sequence[Source]) -> str:
    first, rest = bad[0], bad[1:]
    lines = [f"{first.place}: {first.message}"]
    if rest:
        places = [str(problem.line) if problem.file == first.file else f"{problem.file}:{problem.line}" for problem in rest[:8]]
        more = ", ..." if len(rest) > 8 else ""
        what = "rows: lines" if len(rest) > 1 else "row: line"
        lines.append(f"and {len(rest)} more bad {what} {', '.join(places)}{more}")
    files = list(dict.fromkeys(problem.file for problem in bad))
    columns = next((source.columns for source in sources if source.columns and files[0].startswith(source.path.rstrip("/"))), None)
    option = " --columns " + ",".join(f"{name}={key}" for name, key in columns.items()) if columns else ""
    if not {problem.kind for problem in bad} <= {"preference-row", "tool-turn"}:  # good rows, for another stage
        lines.append(f"glmtune data check {' '.join(files[:3])}{option} lists them all; --fix OUT writes a cleaned copy")
    return "\n".join(lines)


def _finish(record: Conversation | Document, system: str | None, variables: dict[str, str], want: Want) -> Conversation | Document:
    """The run's share of a row: default system turn, variables, and for prediction the answer moved to `meta`."""
    if isinstance(record, Document):
        return replace(record, text=_fill(record.text, variables))
    turns = record.turns
    if system is not None and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    if variables:
        turns = tuple(replace(turn, text=_fill(turn.text, variables)) for turn in turns)
    if want == "prompts" and turns[-1].role == "assistant":
        return replace(record, turns=turns[:-1], meta={**record.meta, "reference": turns[-1].text})
    return replace(record, turns=turns)


_VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def _fill(text: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text) if variables and "{{" in text else text


def _check_variables(variables: dict[str, str], parts: list[tuple[Source, str, list[Any]]], system: str | None) -> None:
    if not variables:
        return
    systems = [part[0].system if part[0].system is not None else system for part in parts]
    found = {name for text in systems if text for name in _VARIABLE.findall(text)}
    for _, _, rows in parts:
        for row in rows:
            texts = [row.text] if isinstance(row, Document) else [turn.text for turn in row.turns]
            found.update(name for text in texts if "{{" in text for name in _VARIABLE.findall(text))
    for name in variables:
        if name not in found:
            there = f"the rows have {_some(sorted(f'{{{{{one}}}}}' for one in found))}" if found else "no row has any {{...}}"
            raise UserError(f"variables: '{name}' fills {{{{{name}}}}}, which stands in no row; {there}{did_you_mean(name, found)}")


def _passes(rows: list[Any], weight: float, path: str) -> list[Any]:
    """A source's rows as often as its weight says: 2 is every row twice, 0.5 a fixed half of them, 1.5 all and a half."""
    whole, part = divmod(weight, 1)
    order = sorted(range(len(rows)), key=lambda index: _hash(f"0 {index}"))
    chosen = sorted(order[: round(part * len(rows))]) if part else []
    result = rows * int(whole) + [rows[index] for index in chosen]
    if rows and not result:
        raise UserError(f"weight {weight:g} leaves none of the {len(rows)} rows of {path}")
    return result


# --- split ----------------------------------------------------------------------------------------------------------------


def split(rows: Sequence[Record], share: float | int) -> tuple[list[Record], list[Record]]:
    """(train, dev). `share` below 1 is a share of the rows, otherwise their number.

    A row's side follows from the hash of its own content (questions and answers, not the system turn): with a share, rows added
    later move no other row; equal rows are never on both sides. Raises UserError where a side would be empty.
    """
    if share <= 0 or (share >= 1 and share != int(share)):
        raise UserError(f"dev must be a share between 0 and 1 or a whole number of rows, not {share:g}")
    if share >= 1 and share >= len(rows):
        raise UserError(f"dev takes {share:g} rows, but there are only {len(rows)}: no row is left to train on")
    contents = [_hash(_content(row)) for row in rows]
    counts = Counter(contents)
    dev: set[int] = set()
    if share < 1:
        dev = {content for content in counts if content < share * 2**64} or set(sorted(counts)[:1])
    else:
        taken = 0
        for content in sorted(counts):
            if taken >= share:
                break
            dev.add(content)
            taken += counts[content]
    train = [row for row, content in zip(rows, contents, strict=True) if content not in dev]
    if not train:
        raise UserError(f"dev {share:g} leaves no row of {len(rows)} to train on; give a smaller share or a file of its own")
    return train, [row for row, content in zip(rows, contents, strict=True) if content in dev]


def _content(row: Conversation | Document) -> str:
    if isinstance(row, Document):
        return row.text
    return json.dumps([[turn.role, turn.text] for turn in row.turns if turn.role != "system"])


def _hash(text: str) -> int:
    """64 bits, uniform, the same on every machine and in every process (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

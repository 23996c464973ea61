"""Bytes -> text, a block at a time: gzip, UTF-8, lines, and the place of every character in the file. Holds no file whole."""

import codecs
import gzip
import re
import zlib
from io import BufferedReader
from pathlib import Path

from .errors import UserError


class DataError(UserError):
    """A row or a file that cannot be used. `kind` is the stable name that `glmtune data check` reports; the message has no place in it."""

    def __init__(self, kind: str, message: str, line: int = 1, column: int | None = None):
        super().__init__(message)
        self.kind, self.line, self.column = kind, line, column


Bytes = gzip.GzipFile | BufferedReader
BLOCK = 1 << 20  # bytes that are read at once
LIMIT = 64_000_000  # characters of the longest row
BOMB = (100_000_000, 200)  # a gzip file that unpacks to more bytes than this, and to so many times its size, is refused
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PAR1": "Parquet",
    b"PK\x03\x04": "zip or Excel",
    b"%PDF": "PDF",
    b"SQLite": "SQLite",
    b"ARROW1": "Arrow",
}
BAD_BYTES = re.compile("[\udc80-\udcff]")  # how bytes that are not UTF-8 stand in a text
_BLANK = re.compile(r"[ \t\r\n]*")


def printable(text: str) -> str:
    """The text with halves of surrogate pairs as \\udXXX: no terminal and no file takes them as they are."""
    return text.encode("utf-8", "backslashreplace").decode()


def head_of(path: Path, name: str) -> tuple[bytes, bool]:
    """The first block of a file, unpacked, and whether the file is gzip. Raises DataError where it cannot be opened."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(BLOCK)
    except OSError as error:
        raise DataError("missing-file", f"the data file '{name}' cannot be read: {error.strerror}") from error
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        with open_bytes(path, True) as stream:
            head = read(stream, BLOCK)
    return head, packed


def open_bytes(path: Path, packed: bool) -> Bytes:
    return gzip.open(path) if packed else open(path, "rb")


def read(stream: Bytes, size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(stream, gzip.GzipFile):
            why = "it ends too early" if isinstance(error, EOFError) else "it is damaged"
            raise DataError("binary-file", f"this is a binary file (gzip) that cannot be unpacked: {why} ({error})") from None
        raise DataError("missing-file", f"the file cannot be read on: {error}") from None


# --- which encoding -------------------------------------------------------------------------------------------------------


def check_is_text(head: bytes, name: str) -> None:
    """Raises DataError for a file whose first block is not UTF-8 text. A few bad lines in it are errors of those rows."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise DataError("binary-file", f"this is a binary file ({what}), not text; unpack or convert it to JSON Lines first")
    if wide := _wide_encoding(head[:512]):
        raise DataError("encoding-damage", f"this is {wide}, not UTF-8{_iconv(wide, name)}")
    if sum(byte < 9 or 13 < byte < 32 for byte in head[:8192]) > len(head[:8192]) / 50:
        raise DataError("binary-file", "this is a binary file, not text (JSON, JSON Lines, CSV or plain text)")
    head = head.removeprefix(codecs.BOM_UTF8)
    text, used = codecs.utf_8_decode(head, "surrogateescape", False)
    if bad := BAD_BYTES.search(text):
        _refuse_other_encoding(head[:used], text, len(text[: bad.start()].encode()), name)


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 where the bytes are text in it: with its mark, or with many NULs as text of Latin letters has them; else ""."""
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    if not marked and head.count(0) * 4 <= len(head):
        return ""
    small_first = head[1::2].count(0) > head[0::2].count(0)
    for encoding in ("UTF-32", "UTF-16") if marked else ("UTF-32LE", "UTF-32BE", "UTF-16LE" if small_first else "UTF-16BE"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeError:
            continue
        if text and sum(one.isprintable() or one.isspace() for one in text) > len(text) * 0.9:
            return encoding
    return ""


def _refuse_other_encoding(data: bytes, text: str, first: int, name: str) -> None:
    lines = [line for line in text.split("\n") if line.strip(" \t\r[]{},")]  # not the brackets of an array
    foreign = [line for line in lines if not line.isascii()]
    bad = sum(1 for line in foreign if BAD_BYTES.search(line))
    if bad * 2 <= len(foreign) or bad * 10 <= len(lines) or bad == 1 < len(lines):
        return
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)
        guess = "GB18030"
    except UnicodeDecodeError:
        guess = "LATIN1"
    message = f"byte 0x{data[first]:02x} is not UTF-8; the file looks like {'GBK' if guess == 'GB18030' else 'another encoding'}"
    raise DataError("encoding-damage", message + _iconv(guess, name), data.count(b"\n", 0, first) + 1)


def _iconv(encoding: str, name: str) -> str:
    return f"; convert it: iconv -f {encoding} -t UTF-8 {Path(name).name} > utf8-{Path(name).name}"


# --- the window -----------------------------------------------------------------------------------------------------------


class Window:
    """A stretch of a file's text that moves forward over it. `text` grows by `more` and loses what was read by `advance`;
    positions are indices of `text`, so only `advance` changes what they mean."""

    def __init__(self, path: Path, packed: bool = False, limit: int = LIMIT):
        self.text, self.ended, self.has_bad_bytes = "", False, False
        self._stream, self._limit, self._rest = open_bytes(path, packed), limit, b""
        self._most = max(BOMB[0], BOMB[1] * path.stat().st_size) if packed else None  # bytes that a gzip file may unpack to
        self._read = self._at = self._byte = 0  # bytes taken; a position, the byte there and the line there
        self._line, self._column = 1, 0  # characters of its line that stood before `text`
        self.more(0)
        self.has_mark = self.text.startswith("\ufeff")
        if self.has_mark:
            self._byte, self.text = 3, self.text[1:]

    def more(self, start: int) -> bool:
        """Takes more text, as much again as stands from `start` (of the row) on; False at the end of the file."""
        if self.ended:
            return False
        if len(self.text) - start > self._limit:
            message = f"no row ends within {self._limit:,} characters: is this one row a line, or one array?"
            raise DataError("row-too-long", message, self.line(start))
        size = max(BLOCK, min(len(self.text) - start, self._limit))
        try:
            data = read(self._stream, size)
        except DataError as error:
            error.line = self.line(len(self.text))
            raise
        self._read += len(data)
        if self._most is not None and self._read > self._most:
            message = f"the gzip file unpacks to more than {BOMB[1]} times its size: is it damaged? unpack it yourself and look"
            raise DataError("binary-file", message, self.line(len(self.text)))
        self.ended = len(data) < size
        data = self._rest + data
        try:
            text, used = codecs.utf_8_decode(data, "strict", self.ended)
        except UnicodeDecodeError:
            text, used = codecs.utf_8_decode(data, "surrogateescape", self.ended)
            self.has_bad_bytes = True
        self.text, self._rest = self.text + text, data[used:]
        if self.ended:
            self._stream.close()
        return True

    def advance(self, position: int) -> int:
        """Says that nothing before `position` is needed any more; returns where it stands now."""
        if position <= BLOCK:
            return position
        dropped = position - 1  # one character is kept: what a missing comma should have followed
        self._move(dropped)
        line_start = self.text.rfind("\n", 0, dropped)
        self._column = dropped - line_start - 1 if line_start >= 0 else self._column + dropped
        self.text, self._at = self.text[dropped:], 0
        return 1

    def skip(self, position: int) -> int:
        """The next character that is not blank, or the end of the file."""
        while True:
            match = _BLANK.match(self.text, position)
            end = match.end() if match else position
            if end < len(self.text) or not self.more(position):
                return end

    def line_end(self, position: int, start: int | None = None) -> int:
        """Where the next line begins, or the end of the file. start: of the row, where that is earlier."""
        while (found := self.text.find("\n", position)) < 0:
            if not self.more(position if start is None else start):
                return len(self.text)
        return found + 1

    def _move(self, position: int) -> None:
        near, far = sorted((self._at, position))
        passed, sign = self.text[near:far], 1 if position >= self._at else -1
        self._line += sign * passed.count("\n")
        self._byte += sign * (len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape")))
        self._at = position

    def line(self, position: int) -> int:
        """Counts only from the last position asked for, so one pass over a file is linear."""
        self._move(position)
        return self._line

    def byte(self, position: int) -> int:
        self._move(position)
        return self._byte

    def place(self, position: int) -> tuple[int, int]:
        line_start = self.text.rfind("\n", 0, position)
        return self.line(position), position - line_start if line_start >= 0 else self._column + position + 1

    def excerpt(self, position: int) -> str:
        while len(self.text) < position + 24 and self.more(position):
            pass
        piece = self.text[position : position + 24].split("\n")[0].rstrip()
        piece = "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in piece)
        return f"'{piece}'" if piece else ("the end of the line" if position < len(self.text) else "the end of the file")

    def matches_bad_bytes(self, start: int, end: int) -> bool:
        return self.has_bad_bytes and BAD_BYTES.search(self.text, start, end) is not None

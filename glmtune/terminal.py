"""The door to the terminal and the pipes: what comes from outside (rows, keys, file names, answers, errors) cannot steer a terminal, and
no stream stops the program by its encoding or by being closed."""

import builtins
import io
import os
import sys
from typing import Any

from .errors import UserError

# C0 but for newline and tab, DEL, C1 (with NEL), line and paragraph separator, what turns the direction of text, halves of surrogates.
_HIDDEN = [*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\u{code:04x}" for code in [*_HIDDEN, *range(0xD800, 0xE000)]}

_SILENCED = {**_ESCAPES, **{code: None for code in _HIDDEN if code < 160}}


def visible(text: str) -> str:
    """The text with what would steer a terminal, or hide or turn other text, as \\u001b and the like; lines and tabs stay.

    In JSON this means the same text. What is written by it is not changed by it again.
    """
    return text.translate(_ESCAPES)


def quiet(text: str) -> str:
    """As `visible`, but control characters go: for what a model writes, where nobody has to find where they stand."""
    return text.translate(_SILENCED)


def line(text: str) -> str:
    """As `visible`, in one line."""
    return visible(text).replace("\n", "\\n")


def print(*values: object, file: Any = None, end: str = "\n") -> None:
    """Python's, made visible."""
    builtins.print(visible(" ".join(map(str, values))), file=file, end=end)


def console(**settings: Any) -> Any:
    """A rich console that shows texts as `visible` does; colours and bars of its own work as always."""
    from rich.console import Console
    from rich.segment import Segment

    class Door(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

        def render_str(self, text: str, **how: Any) -> Any:
            return super().render_str(visible(text), **how)  # before rich drops what it knows of it

    return Door(highlight=False, **settings)


def prepare() -> None:
    """Before anything is read or written: a stream that was closed is an empty one, and a character that an encoding does not have is
    written as its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (it stays as long as the program does)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_line() -> str:
    """The next line of standard input, decoded by itself: a bad one does not spoil those after it.

    Raises UserError for a line that is not UTF-8 text, EOFError at the end.
    """
    stream: Any = sys.stdin
    if isinstance(stream, io.TextIOWrapper):
        data = stream.buffer.readline()
    else:  # no bytes behind it
        data = stream.readline().encode("utf-8", "surrogatepass")
    if not data:
        raise EOFError
    try:
        text = data.removeprefix(b"\0").decode("utf-8-sig")  # the second half of a newline in UTF-16: that line was refused
    except UnicodeDecodeError as error:
        raise UserError(
            f"this line is not UTF-8 (byte 0x{data[error.start]:02x} at place {error.start + 1}) and was not asked; convert it: iconv -f ... -t UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(
            "this line holds NUL characters, as UTF-16 has them, and was not asked; convert it: iconv -f UTF-16 -t UTF-8"
        )
    return text

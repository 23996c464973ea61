"""Tokens -> text while they are made: what a tokenizer's decoder says of all of them, each piece as early as it is certain.

A decoder of the tokenizers library is a chain of steps over the names of the tokens. Each step here does the same to a stream of them and
holds back what a later token may still change; a chain with a step that is not known here is decoded as a whole, at the end.
Source: the `decode_chain` functions of tokenizers 0.23.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


class _Step:
    """Passes every text on; each subclass changes it. `add` and `end` give what is certain by then, in parts that the next step gets."""

    def add(self, text: str) -> list[str]:
        return [text]

    def end(self) -> list[str]:
        return []


class _Spaces(_Step):
    """No decoder at all: blanks between the tokens."""

    before = ""

    def add(self, text: str) -> list[str]:
        before, self.before = self.before, " "
        return [before + text]


class _ByteLevel(_Step):
    """A printable character stands for each byte; half a character waits for its end."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, text: str) -> list[str]:
        known = all(letter in _BYTES for letter in text)
        return [self.decoder.decode(bytes(_BYTES[letter] for letter in text) if known else text.encode())]

    def end(self) -> list[str]:
        return [self.decoder.decode(b"", final=True)]


class _ByteFallback(_Step):
    """`<0xE4>` is a byte. Bytes in a row are text together, or each of them is U+FFFD: the row waits for its end."""

    def __init__(self) -> None:
        self.row = bytearray()

    def add(self, text: str) -> list[str]:
        found = _BYTE.fullmatch(text)
        if found is None:
            return [*self.end(), text]
        self.row.append(int(found[1], 16))
        return []

    def end(self) -> list[str]:
        row, self.row = bytes(self.row), bytearray()
        try:
            return [row.decode()] if row else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(row)


class _Replace(_Step):
    """`old` becomes `new` inside each token."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def add(self, text: str) -> list[str]:
        return [text.replace(self.old, self.new)]


class _ReplaceAcross(_Replace):
    """The same in the text of all tokens: what may be the beginning of `old` waits."""

    held = ""

    def add(self, text: str) -> list[str]:
        *done, rest = (self.held + text).split(self.old)
        kept = beginning_of(self.old, rest)
        self.held = rest[len(rest) - kept :]
        return ["".join(part + self.new for part in done) + rest[: len(rest) - kept]]

    def end(self) -> list[str]:
        return [self.held]


class _Strip(_Step):
    """Up to `most` letters off the front of each token."""

    def __init__(self, letter: str, most: int):
        self.letter, self.most = letter, most

    def add(self, text: str) -> list[str]:
        return [self._without(text, self.most)]

    def _without(self, text: str, most: int) -> str:
        front = len(text) - len(text.lstrip(self.letter))
        return text[min(front, most) :]


class _StripOnce(_Strip):
    """The same off the front of the text of all tokens."""

    def add(self, text: str) -> list[str]:
        rest = self._without(text, self.most)
        self.most = 0 if rest else self.most - len(text)
        return [rest]


class _Metaspace(_Step):
    """A mark stands for a blank, and for nothing in the first token."""

    def __init__(self, mark: str, blank: str):
        self.mark, self.blank = mark, blank

    def add(self, text: str) -> list[str]:
        blank, self.blank = self.blank, " "
        return [text.replace(self.mark, blank)]


def beginning_of(wanted: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `wanted` (or the whole of it)."""
    return next(n for n in range(min(len(wanted), len(text)), -1, -1) if text.endswith(wanted[:n]))


def _alphabet() -> dict[str, int]:
    """ByteLevel's (GPT-2's): one printable character per byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()


def steps(decoder: dict[str, Any] | None) -> list[Callable[[], _Step]] | None:
    """A decoder's steps, each made anew for every text; None where one of them is not known. decoder: as tokenizer.json has it."""
    if decoder is None:
        return [_Spaces]
    made: list[Callable[[], _Step]] = []
    whole = False  # whether the tokens are one text by now
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match part:
            case {"type": "Fuse"}:
                whole = True
            case {"type": "ByteLevel"} if not whole:
                made.append(_ByteLevel)
                whole = True
            case {"type": "ByteFallback"} if not whole:
                made.append(_ByteFallback)
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                made.append(lambda old=old, new=new, kind=_ReplaceAcross if whole else _Replace: kind(old, new))
            case {"type": "Strip", "content": str(letter), "start": int(most), "stop": 0}:
                made.append(lambda letter=letter, most=most, kind=_StripOnce if whole else _Strip: kind(letter, most))
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)} if not whole:
                made.append(lambda mark=mark, blank=" " if scheme == "never" else "": _Metaspace(mark, blank))
            case _:
                return None
    return made


class Decoding:
    """The text of tokens that come one by one: all that `add` gives, and `end` at the end, joined, is `decode` of all of them.

    name: a token's name, None for one that is not shown. decode: the whole decoder, for chains that are not known here. The time for a
    token does not depend on how many came before it.
    """

    def __init__(
        self,
        steps: Sequence[Callable[[], _Step]] | None,
        name: Callable[[int], str | None],
        decode: Callable[[Sequence[int]], str],
    ):
        self._steps = None if steps is None else [make() for make in steps]
        self._name, self._decode = name, decode
        self._ids: list[int] = []

    def add(self, id: int) -> str:
        if self._steps is None:
            self._ids.append(id)
            return ""
        name = self._name(id)
        texts = [] if name is None else [name]
        for step in self._steps:
            texts = [made for text in texts for made in step.add(text)]
        return "".join(texts)

    def end(self) -> str:
        if self._steps is None:
            return self._decode(self._ids)
        texts: list[str] = []
        for step in self._steps:
            texts = [made for text in texts for made in step.add(text)] + step.end()
        return "".join(texts)

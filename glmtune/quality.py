"""What can be told from texts alone: damaged or cut ones, nearly equal ones, lengths, languages. Pure; check.py knows rows and lines.

Every test here is conservative: good text of any language must not be called damaged.
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from .records import Conversation, Document, Labelled, Preference

Level = Literal["error", "warning"]
Record = Conversation | Document | Preference | Labelled


class Finding(NamedTuple):
    kind: str
    level: Level
    message: str


def texts_of(value: Any, key: str = "the row") -> Iterator[tuple[str, str]]:
    """(key, text) of every string in a row, however deep."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from texts_of(inner, f"'{name}'")
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, key)


# --- damage: what should stand in no text ---------------------------------------------------------------------------------

_REPLACEMENT = re.compile("\ufffd|\ufeff|[\ufffe\uffff]|\x00")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_HIGH = "\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"
_MOJIBAKE = [  # UTF-8 read as Latin-1 or Windows-1252: é, accented Latin, ’, Cyrillic, Chinese; as Windows-1251; as GBK; lost for good
    re.compile(f"(?<![A-ZÀ-Þ])Ã[{_HIGH}]|(?<![A-ZÀ-Þ])Â[\xa0-\xbf]"),
    re.compile(f"â€[{_HIGH}]"),
    re.compile(f"(?:[ÐÑ][{_HIGH}]){{3,}}"),
    re.compile(f"(?:[ã-é][{_HIGH}]{{2}}){{2,}}"),
    re.compile("(?:[РС][\xa0-\xbf\u0402-\u040f\u0452-\u045f\u0490\u0491\u2013-\u203a\u20ac\u2116\u2122]){3,}"),
    re.compile("锟斤拷|烫烫烫|屯屯屯|锘|锛|銆|鈥"),
]
_GBK_AS_LATIN = re.compile("[\xa1-\xfe]{4,}")
_UTF8_AS_GBK = re.compile(rb"(?:[\xe4-\xe9][\x80-\xbf]{2}){3,}")  # three Chinese characters in UTF-8; no Chinese text is so in GBK
_SPECIAL = re.compile(
    r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|\[s?gMASK\]|\[s?MASK\]|<(?:sop|eop|unk|pad|bos|eos|eod|eoh|eoa)>"
    r"|<(?:start|end)_of_turn>|<reserved_\d+>|</?(?:tool_call|tool_response)>|\[(?:TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]"
)
_NAMED = {
    "\ufffd": "the replacement character U+FFFD (something was lost here)",
    "\ufeff": "a byte order mark inside the text",
    "\x00": "a NUL",
}


def damage(value: Any) -> dict[str, Finding]:
    """What should not stand in any text of a row, the first of each kind."""
    found: dict[str, Finding] = {}
    for key, text in texts_of(value):
        for finding in _text_damage(key, text):
            found.setdefault(finding.kind, finding)
    return found


def _text_damage(key: str, text: str) -> Iterator[Finding]:
    if match := _SURROGATE.search(text):
        what = f"half of a surrogate pair (U+{ord(match[0]):04X}), which is not a character"
        yield Finding("encoding-damage", "error", f"{key}: {what}")
    elif match := _REPLACEMENT.search(text):
        what = _NAMED.get(match[0], f"U+{ord(match[0]):04X}, which is not a character")
        yield Finding("encoding-damage", "warning", f"{key}: {what}{_around(text, match.start(), match.end())}")
    elif place := _mojibake(text):
        yield Finding("encoding-damage", "warning", f"{key}: text read in a wrong encoding{_around(text, *place)}")
    if match := _CONTROL.search(text):
        what = f"control character U+{ord(match[0]):04X}"
        yield Finding("control-characters", "warning", f"{key}: {what}{_around(text, match.start(), match.end())}")
    if match := _SPECIAL.search(text):
        what = f"the text holds the special token '{match[0]}'; it is trained as plain text"
        yield Finding("leaked-special-token", "warning", f"{key}: {what}")


def _around(text: str, start: int, end: int) -> str:
    piece = text[max(0, start - 10) : min(end, start + 20) + 10]
    return ": '" + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in piece) + "'"


def _mojibake(text: str) -> tuple[int, int] | None:
    """Start and end of the first stretch that was decoded with a wrong encoding."""
    if text.isascii():
        return None
    for pattern in _MOJIBAKE:
        if match := pattern.search(text):
            return match.span()
    for match in _GBK_AS_LATIN.finditer(text):
        if len(set(match[0])) > 3 and _decodes(match[0].encode("latin-1"), "gb2312"):
            return match.span()
    data = text.encode("gbk", "replace")
    if match := _UTF8_AS_GBK.search(data):
        start = len(data[: match.start()].decode("gbk", "ignore"))
        return start, start + len(match[0]) // 2
    return None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


# --- records --------------------------------------------------------------------------------------------------------------


def parts(record: Record) -> tuple[list[str], list[str]]:
    """The texts of what is asked, system prompt aside, and of the answers to it. All of a document is asked."""
    if isinstance(record, Document):
        return [record.text], []
    turns = [turn.text for turn in record.turns if turn.role != "system"]
    if isinstance(record, Preference):
        return turns, [record.chosen.text, record.rejected.text]
    return (turns[:-1], turns[-1:]) if record.turns[-1].role == "assistant" else (turns, [])


def texts(record: Record) -> list[str]:
    question, answers = parts(record)
    return question + answers


def sequences(record: Record) -> list[Conversation | Document]:
    """What of a record is given to the model as one sequence: a preference row is two."""
    if isinstance(record, Preference):
        pair = (record.chosen, record.rejected)
        return [Conversation((*record.turns, answer), record.where, record.meta, record.weight) for answer in pair]
    if isinstance(record, Labelled):
        return [Conversation(record.turns, record.where, record.meta, record.weight)]
    return [record]


# --- answers --------------------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"""[a-z0-9)\]*]{2}[.!?]["')*]*\s+(?=\S)|[。！？][”」）]?\s*(?=\S)""")
_SIGNATURE = re.compile(r"""[-—–~]\s*[A-Z]|[#@]\w+\W*$|https?://\S+$""")
_DANGLING = re.compile(r"\s(?:the|an|and|or|because|whose|of the|in the|to the)$")
_NOTHING = {"nan", "NaN", "null", "NULL", "N/A", "n/a", "undefined", "[object Object]", "#N/A", "#REF!", "#VALUE!"}


def answer_damage(answer: str) -> Finding | None:
    """An answer that is cut, or stands for an empty cell."""
    if answer.strip() in _NOTHING:
        return Finding("empty-answer", "warning", f"the answer is '{answer.strip()}', as programs write what was not there")
    sign = cut_short(answer)
    return Finding("truncated-answer", "warning", f"the answer looks cut: {sign}") if sign else None


def cut_short(answer: str) -> str:
    """A sign that generation stopped at its length limit, or "". Conservative: a missing full stop alone is none."""
    text = answer.rstrip()
    if not text:
        return ""
    if text.count("```") % 2 and not text.endswith("```"):
        return "a code block (```) is opened and never closed"
    if re.match(r'\{\s*"|\[\s*\{\s*"', text) and text[-1] not in "}]`;":
        return "JSON is opened and never closed"
    if len(text) > 40 and (text[-1] in ",，、;；(（:：" or _DANGLING.search(text[-12:])):
        return f"it ends with '{text.split()[-1][-8:]}'"
    last = text.rsplit("\n", 1)[-1]
    if len(last) > 60 and text[-1].isalnum() and _SENTENCE_END.search(last) and not _SIGNATURE.search(last[-60:]):
        return f"its last sentence does not end: '...{text[-24:]}'"
    return ""


# --- many texts -----------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+")
NEAR, NEAR_LIMIT = 0.7, 200_000
_FEWEST = 8  # pieces: of shorter texts nothing can be said


class Near(NamedTuple):
    """Text `later` repeats text `earlier`: this share of the pieces (three words or Chinese characters in a row) is common."""

    later: int
    earlier: int
    share: float


def near_duplicates(texts: Sequence[str]) -> list[Near]:
    """Texts of which at least NEAR of the pieces stand in an earlier one (Jaccard), each with that one.

    MinHash of 128 values in 32 bands (Broder 1997) proposes, the pieces themselves decide: few pairs are missed, none is wrong.
    Only texts that repeat no earlier one are compared with, so the time grows with the number of texts, whatever they say.
    """
    from rensa import RMinHash, RMinHashDeduplicator  # pyright: ignore[reportAttributeAccessIssue]  # it has no stubs

    index = RMinHashDeduplicator(threshold=NEAR - 0.05, num_perm=128, use_lsh=True, num_bands=32)
    found = []
    for number, text in enumerate(texts):
        pieces = _pieces(text)
        if len(pieces) < _FEWEST:
            continue
        sketch = RMinHash(num_perm=128, seed=42)  # the seed that the index expects
        sketch.update(list(pieces))
        if index.add(str(number), sketch):
            continue
        candidates = [(int(key), _pieces(texts[int(key)])) for key in index.get_duplicates(sketch)[:8]]
        shares = [Near(number, earlier, len(pieces & those) / len(pieces | those)) for earlier, those in candidates]
        best = max(shares, key=lambda near: (near.share, -near.earlier), default=None)
        if best and best.share >= NEAR:
            found.append(best)
    return found


def _pieces(text: str) -> set[str]:
    words = _WORD.findall(text.lower())
    return {" ".join(three) for three in zip(words, words[1:], words[2:])}


_SCRIPTS = {  # a word of letters counts as one, as a Chinese character does
    "Chinese": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Thai": re.compile("[\u0e00-\u0e7f]{3}"),
    "Korean": re.compile("[\uac00-\ud7af]+"),
    "Cyrillic script": re.compile("[\u0400-\u04ff]+"),
    "Arabic script": re.compile("[\u0600-\u06ff]+"),
    "Devanagari": re.compile("[\u0900-\u097f]+"),
    "Greek": re.compile("[\u0370-\u03ff]+"),
    "Hebrew": re.compile("[\u0590-\u05ff]+"),
    "Latin script": re.compile("[A-Za-zÀ-ɏ]+"),
}


def language(text: str) -> str:
    """The language or, where letters cannot tell, the script that most of a text is written in; "" for digits and signs only."""
    text = text[:4000]
    if text.isascii():
        return "Latin script" if _SCRIPTS["Latin script"].search(text) else ""
    counts = Counter({name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()})
    if counts["Japanese"] * 5 > counts["Chinese"]:  # kana stand in Japanese only, its other characters are shared
        counts["Japanese"] += counts.pop("Chinese")
    name, count = counts.most_common(1)[0]
    return name if count else ""


def lengths(sizes: Sequence[int], unit: str) -> dict[str, Any]:
    """Percentiles and a histogram [[from, to, rows], ...] of up to twelve equal steps (rounded to 1, 2 or 5 times a power of ten)."""
    ordered = sorted(sizes)
    if not ordered:
        return {}
    at = {f"p{share}": ordered[(len(ordered) - 1) * share // 100] for share in (5, 25, 50, 75, 95, 99)}
    low, high = ordered[0], ordered[-1]
    step = next(s for power in range(20) for one in (1, 2, 5) if (high // (s := one * 10**power) - low // s) < 12)
    counts = Counter(size // step for size in ordered)
    bins = [[i * step, (i + 1) * step - 1, counts[i]] for i in range(low // step, high // step + 1)]
    mean = round(statistics.fmean(ordered), 1)
    return {"unit": unit, "rows": len(ordered), "shortest": low, **at, "longest": high, "mean": mean, "histogram": bins}

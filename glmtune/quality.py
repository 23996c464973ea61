"""What can be told from texts alone: damaged or cut ones, nearly equal ones, lengths, languages. Pure; check.py knows rows and lines.

Every test here is conservative: good text of any language must not be called damaged.
"""

import re
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

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
_SIGNS = "\x80-\x9f¢-ª¬®¯±´-¶¸º¼-¿\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2020\u2021\u2030\u20ac\u2122"  # no punctuation
_MOJIBAKE = [  # UTF-8 read as Latin-1 or Windows-1252: é, accented Latin, ’, Cyrillic, Chinese; as Windows-1251; as GBK; lost for good
    re.compile(f"[A-ZÀ-Þ]Ã[{_SIGNS}]|[ã-é][{_SIGNS}]{{2}}|â[†œˆ‚„][{_HIGH}]|ðŸ[{_HIGH}]{{2}}"),
    re.compile(f"(?<![A-ZÀ-Þ])Ã[{_HIGH}]|(?<![A-ZÀ-Þ])Â[\xa0-\xbf]"),
    re.compile(f"â€[{_HIGH}]"),
    re.compile(f"(?:[ÐÑ][{_HIGH}]){{3,}}"),
    re.compile(f"(?:[ã-é][{_HIGH}]{{2}}){{2,}}"),
    re.compile("(?:[РС][\xa0-\xbf\u0402-\u040f\u0452-\u045f\u0490\u0491\u2013-\u203a\u20ac\u2116\u2122]){3,}"),
    re.compile("锟斤拷|烫烫烫|屯屯屯|锘|锛|銆|鈥"),
]
_GBK_AS_LATIN = re.compile("[\xa1-\xfe]{4,}")
_UTF8_AS_GBK = re.compile(rb"(?:[\xe4-\xe9][\x80-\xbf]{2}){2,}")  # Chinese characters in UTF-8
_SPECIAL = re.compile(
    r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|\[s?gMASK\]|\[s?MASK\]|<(?:sop|eop|unk|pad|bos|eos|eod|eoh|eoa)>"
    r"|<(?:start|end)_of_turn>|<reserved_\d+>|</?(?:tool_call|tool_response)>|\[(?:TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]"
)
_MARK = re.compile(  # of other prompt formats, and control tokens that are misspelt
    r"^[ \t]*#{2,3} ?(?:Instruction|Response|Human|Assistant) ?[:：]|Below is an instruction that describes a task"
    r"|(?!<\|\w+\|>)<\|? ?/?(?:im_(?:start|end)|endoftext|end_of_text|eot_id|start_header_id|end_header_id) ?\|?>"
    r"|&lt;\|\w+\|&gt;",
    re.MULTILINE,
)
_THINK = re.compile(r"</?think(?:ing)?>")
_HIDDEN = re.compile(  # what has no width, or changes the direction of what follows
    "(?P<turned>[\u202d\u202e])"  # even where a text runs from right to left, nobody writes these
    "|(?P<isolated>[\u202a-\u202c\u2066-\u2069])"
    "|(?P<wide>[\u200b\u2060-\u2064]|(?<=[A-Za-z0-9\u4e00-\u9fff])[\u200c\u200d]+(?=[A-Za-z0-9\u4e00-\u9fff]))"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])(?P<tag>[\U000e0001-\U000e007f])"  # flags are written with them
)
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)  # Thai, Lao, Burmese, Khmer: U+200B is where a line may end
_BULK = 3
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[lr][sd]quo|[mn]dash|#39|#x27|#160|#8[0-9]{3});")
_ESCAPED = re.compile(r"(?:(?<!\\)\\u[0-9a-fA-F]{4}){2,}")
_CODE = re.compile(
    r"```|</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|html|xml|unicode|utf-?8|entit(?:y|ies)|escap|转义|json|regex|正则", re.IGNORECASE
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
    if match := _MARK.search(text):
        what = f"the text holds '{match[0].strip()}', a mark of another prompt format; it is trained as plain text"
        yield Finding("leaked-prompt-mark", "warning", f"{key}: {what}")
    if "think" in text and (what := _open_thought(text)):
        yield Finding("leaked-prompt-mark", "warning", f"{key}: {what}")
    if not text.isascii() and (match := _hidden(text)):
        what = f"hidden character U+{ord(match[0][0]):04X}"
        yield Finding("hidden-characters", "warning", f"{key}: {what}{_around(text, match.start(), match.end())}")
    if ("&" in text or "\\u" in text) and (match := _escaped(text)):
        what = f"'{match[0]}' stands there as such: was the text escaped once too often?"
        yield Finding("escaped-text", "warning", f"{key}: {what}")


def _open_thought(text: str) -> str:
    """A <think> that never ends, or an end without it. Text about the mark itself has it in quotes, or in a sentence."""
    marks = [match[0] for match in _THINK.finditer(text)]
    starts = sum(not mark.startswith("</") for mark in marks)
    at_edge = _THINK.match(text.lstrip()) or re.search(r"(?:^|\n)\s*</?think(?:ing)?>", text)
    if not at_edge or starts * 2 == len(marks):
        return ""
    return f"'{marks[0]}' has no end" if starts * 2 > len(marks) else f"'{marks[-1]}' has no beginning"


def _hidden(text: str) -> re.Match[str] | None:
    """The first hidden character that should not be there."""
    wide = None
    for number, match in enumerate(_HIDDEN.finditer(text)):
        if match["turned"] or match["tag"] or (match["isolated"] and not _RIGHT_TO_LEFT.search(text)):
            return match
        wide = wide or (match if match["wide"] else None)
        if wide and number + 1 >= _BULK and not _WITHOUT_BLANKS.search(text):
            return wide
    return None


def _escaped(text: str) -> re.Match[str] | None:
    """An HTML entity or \\uXXXX in what is no code and does not speak of it."""
    if text.lstrip()[:1] in ("{", "[") or _CODE.search(text):
        return None
    return _ENTITY.search(text) or _ESCAPED.search(text)


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
    for match in _UTF8_AS_GBK.finditer(data):
        if len(match[0]) > 6 or _is_common(match[0].decode()):  # no Chinese text has three of them in GBK, nor two that are in use
            start = len(data[: match.start()].decode("gbk", "ignore"))
            return start, start + len(match[0]) // 2
    return None


def _is_common(text: str) -> bool:
    """Whether all are characters of GB 2312's first level, the 3755 that are in daily use."""
    data = text.encode("gb2312", "replace")
    return len(data) == 2 * len(text) and all(0xB0 <= first <= 0xD7 for first in data[::2])


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
_NOTHING = {
    "nan", "NaN", "null", "NULL", "None", "N/A", "n/a", "undefined", "[object Object]", "#N/A", "#REF!", "#VALUE!", "TODO", "TBD",
    "<nooutput>", "<no output>", "nooutput", "No output", "<noinput>",
}  # fmt: skip
_DECLINED = re.compile(
    r"(?:I(?:'|’)?m sorry|I am sorry|Sorry|I apologi[sz]e),? but (?:as an AI|I(?: a|(?:'|’))m (?:just )?an AI|I (?:can(?:'|’)?t|cannot|am unable|am not able))"
    r"|(?:Sorry, )?[Aa]s an AI(?: language)?(?: model| assistant)?, I (?:can(?:'|’)?t|cannot|do(?:n't| not) have|am unable|am not able)"
    r"|(?:很?抱歉|对不起)[，,](?:但)?(?:作为|我(?:无法|不能))|作为(?:一个|一名)?(?:AI|人工智能)(?:语言)?(?:模型|助手)[，,]?我(?:无法|不能|没有)"
)


def answer_damage(question: str, answer: str) -> Iterator[Finding]:
    """An answer that is cut, goes round in circles, repeats the question, or stands for an empty cell."""
    said = answer.strip()
    if said in _NOTHING:
        yield Finding("empty-answer", "warning", f"the answer is '{said}', as programs write what was not there")
        return
    if len(said) > 12 and said == question.strip():
        yield Finding("answer-is-question", "warning", f"the answer is the question: '{said[:40]}'")
    if unit := repeated_end(answer):
        yield Finding("repeated-text", "warning", f"the answer ends in a loop: '{unit[:40]}' again and again")
    elif sign := cut_short(answer):
        yield Finding("truncated-answer", "warning", f"the answer looks cut: {sign}")


def declines(answer: str) -> bool:
    """Whether an answer begins as chat programs do that refuse; it may be meant."""
    return _DECLINED.match(answer.lstrip()) is not None


_TAIL, _FEWEST_TIMES, _SHORTEST_LOOP = 30, 4, 100


def repeated_end(answer: str) -> str:
    """What an answer says over and over at its end, at least four times and for a hundred characters; or ""."""
    text = answer.rstrip()
    before = text.rfind(text[-_TAIL:], 0, len(text) - 1)
    period = len(text) - _TAIL - before
    if not text or before < 0 or period * _FEWEST_TIMES > len(text):  # a turn that only calls a tool says nothing
        return ""
    start = len(text) - period
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    unit = text[len(text) - period :]
    long_enough = len(text) - start >= max(_FEWEST_TIMES * period, _SHORTEST_LOOP)
    return unit.strip() if long_enough and re.search(r"[^\W\d_]{2}", unit) else ""


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
_BANDS, _IN_BAND = 32, 4
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd numbers


class Near(NamedTuple):
    """A text repeats an earlier one: this share of their pieces (three words or Chinese characters in a row) is common."""

    later: Any
    earlier: Any
    share: float


class NearDuplicates:
    """Texts of which at least NEAR of the pieces stand in an earlier one (Jaccard).

    MinHash of 128 values in 32 bands (Broder 1997) proposes, the pieces themselves decide: few pairs are missed, none is wrong. Of
    a text that is added only 32 bits of each band are kept, so it must come once more, to `found`. A text is compared with the first
    ones that it shares bands with, so the time grows with the number of texts, whatever they say.
    """

    def __init__(self) -> None:
        self.count = self.left_out = 0  # texts looked at, and those beyond NEAR_LIMIT
        self.added = 0
        self.numbers, self.bands = array("Q"), bytearray()  # of the texts that are long enough

    def add(self, text: str | None) -> None:
        """The next text; None stands for one that is not looked at."""
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # it has no stubs

        self.added += 1
        if text is None:
            return
        if self.count == NEAR_LIMIT:
            self.left_out += 1
            return
        self.count += 1
        if len(pieces := _pieces(text)) >= _FEWEST:
            sketch = RMinHash(num_perm=_BANDS * _IN_BAND, seed=42)
            sketch.update(list(pieces))
            halves = np.array(sketch.digest(), np.uint32).view(np.uint64).reshape(_BANDS, 2)
            self.numbers.append(self.added - 1)
            self.bands += ((halves * _MIX).sum(1) >> np.uint64(32)).astype(np.uint32).tobytes()

    def found(self, texts: Iterable[tuple[Any, str]]) -> Iterator[Near]:
        """Each text that repeats an earlier one, in order. texts: (what to call it, the text) of all that was added, again."""
        later, earlier = self._candidates()
        held: dict[int, tuple[Any, array[int]]] = {}
        wanted, at = set(earlier.tolist()), 0
        for number, (name, text) in enumerate(texts if len(later) else ()):
            end = int(np.searchsorted(later, number, "right"))
            if end > at or number in wanted:
                pieces = {*map(hash, _pieces(text))}
                pairs = [(*held[one], one) for one in earlier[at:end].tolist()]
                common = [(len(pieces.intersection(those)), len(those), -one, place) for place, those, one in pairs]
                shares = [(both / (len(pieces) + size - both), one, place) for both, size, one, place in common]
                share, _, first = max(shares, default=(0.0, 0, None))
                if share >= NEAR:
                    yield Near(name, first, share)
                if number in wanted:
                    held[number] = name, array("q", pieces)
                at = end
            if at == len(later):
                return

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of texts, and of earlier ones with which they share two bands or more; in order of the former."""
        bands = np.frombuffer(self.bands, np.uint32).reshape(-1, _BANDS)
        size = len(bands)
        pairs = np.empty(0, np.int64)
        for column in bands.T:
            order = np.argsort(column, kind="stable")
            starts = np.r_[True, np.diff(column[order]) != 0] if size else np.empty(0, bool)
            first = order[np.maximum.accumulate(np.where(starts, np.arange(size), 0))]  # of those with this value in the band
            pairs = np.union1d(pairs, (order * size + first)[order != first])
        later, earlier = np.divmod(pairs, max(size, 1))
        common = np.zeros(len(pairs), np.uint8)
        for column in bands.T:
            common += column[later] == column[earlier]
        numbers = np.frombuffer(self.numbers, np.uint64).astype(np.int64)
        return numbers[later[common >= 2]], numbers[earlier[common >= 2]]


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


def lengths(sizes: Sequence[int] | Counter[int], unit: str) -> dict[str, Any]:
    """Percentiles and a histogram [[from, to, rows], ...] of up to twelve equal steps (rounded to 1, 2 or 5 times a power of ten).

    sizes: the length of every row, or how many rows have each length."""
    by_size = sorted(Counter(sizes).items())
    if not by_size:
        return {}
    ordered, upto = [size for size, _ in by_size], list(accumulate(count for _, count in by_size))
    rows = upto[-1]
    at = {f"p{share}": ordered[bisect(upto, (rows - 1) * share // 100)] for share in (5, 25, 50, 75, 95, 99)}
    low, high = ordered[0], ordered[-1]
    step = next(s for power in range(20) for one in (1, 2, 5) if (high // (s := one * 10**power) - low // s) < 12)
    counts: Counter[int] = Counter()
    for size, count in by_size:
        counts[size // step] += count
    bins = [[i * step, (i + 1) * step - 1, counts[i]] for i in range(low // step, high // step + 1)]
    mean = round(sum(size * count for size, count in by_size) / rows, 1)
    return {"unit": unit, "rows": rows, "shortest": low, **at, "longest": high, "mean": mean, "histogram": bins}

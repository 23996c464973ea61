"""The data check: everything wrong with data files, by file and line, before a minute is spent; and a cleaned copy of them.

An *error* is what training refuses; a *warning* is a row that trains but should be looked at. What is told of a file as a whole
(form, lengths, languages, questions with several answers) is a note.
"""

import csv
import io
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data import Problem, parse_items, problem_of
from .errors import UserError
from .forms import Reading, Want, choose_forms, open_file, recognise
from .reading import Broken, DataError, File, Item, find_files
from .records import Conversation, Document

Encode = Callable[[Conversation], int]
Level = Literal["error", "warning"]


@dataclass
class Row:
    """One row of a file, or a stretch that is none, with all that is wrong with it."""

    item: Item | Broken
    problems: list[Problem] = field(default_factory=list)
    record: Conversation | Document | None = None  # None where the row cannot be used
    refused: bool = False

    @property
    def counts(self) -> bool:
        """Whether a row stands here; False for a comma that is missing between two rows."""
        return isinstance(self.item, Item) or self.item.lost


@dataclass
class Checked:
    """One file. `file` is None where it cannot be read at all."""

    name: str
    file: File | None = None
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # of the file as a whole
    notes: list[str] = field(default_factory=list)


def check(
    paths: Sequence[str | Path],
    *,
    encode: Encode | None = None,
    max_length: int | None = None,
    columns: dict[str, str] | None = None,
    format: str | None = None,
) -> dict[str, Any]:
    """{"rows": n, "problems": [{"file", "line", "kind", "level", "message"}], "notes": [...]} over all files.

    encode: conversation -> number of tokens; rows longer than `max_length` are then errors. Never stops at a problem;
    raises UserError only for a path that is not there and for `columns` or `format` that no file could have.
    """
    files = _examine(paths, columns, format)
    if encode is not None and max_length is not None:
        for row in _rows(files):
            _check_length(row, encode, max_length)
    problems = [problem for file in files for problem in _all_problems(file)]
    notes = [note for file in files for note in file.notes] + _several_answers(files)
    rows = sum(row.counts for row in _rows(files))
    return {"rows": rows, "problems": [_plain(problem) for problem in problems], "notes": notes}


def _plain(problem: Problem) -> dict[str, Any]:
    message = f"column {problem.column}: {problem.message}" if problem.column else problem.message
    return {"file": problem.file, "line": problem.line, "kind": problem.kind, "level": problem.level, "message": message}


def _all_problems(file: Checked) -> list[Problem]:
    found = file.problems + [problem for row in file.rows for problem in row.problems]
    return sorted(found, key=lambda problem: problem.line)


def _rows(files: Iterable[Checked]) -> Iterator[Row]:
    return (row for file in files for row in file.rows)


# --- one file -------------------------------------------------------------------------------------------------------------


def _examine(paths: Sequence[str | Path], columns: dict[str, str] | None, format: str | None) -> list[Checked]:
    files = [_examine_file(path, name, columns, format) for given in paths for path, name in find_files(str(given))]
    _find_duplicates(files)
    for file in files:
        file.notes += _lengths_and_languages(file)
    return files


def _examine_file(path: Path, name: str, columns: dict[str, str] | None, format: str | None) -> Checked:
    checked = Checked(name)
    try:
        checked.file = open_file(path, name)
    except DataError as error:
        checked.problems.append(problem_of(name, error))
        return checked
    items = _read_all(checked, checked.file)
    reading = Reading(_use(items, columns, format), format=format, columns=columns)
    try:
        parsed = parse_items(checked.file, items, reading)
    except DataError as error:
        checked.problems += [] if checked.problems else [problem_of(name, error)]
        checked.rows = [Row(item, [problem_of(name, item)] if isinstance(item, Broken) else [], refused=True) for item in items]
        return checked
    checked.notes += parsed.notes
    checked.rows = [_row(*outcome) for outcome in parsed.outcomes]
    _note_other_stages(checked, items)
    for row in checked.rows:
        row.problems += _contents(name, row)
    checked.problems += _mixed_forms(checked, reading)
    return checked


def _row(item: Item | Broken, outcome: Conversation | Document | Problem) -> Row:
    return Row(item, [outcome], refused=True) if isinstance(outcome, Problem) else Row(item, record=outcome)


def _read_all(checked: Checked, file: File) -> list[Item | Broken]:
    items: list[Item | Broken] = []
    try:
        items.extend(file.items)  # keeps what came before an error
    except DataError as error:
        checked.problems.append(problem_of(checked.name, error))
    return items


def _use(items: list[Item | Broken], columns: dict[str, str] | None, format: str | None) -> Want:
    """What a file's rows are for: answers to learn, prompts (also those of preference rows), or plain text."""
    if columns is not None or format is not None:
        return "text" if format == "text" or "text" in (columns or ()) else "answers"
    rows = [item.value for item in items if isinstance(item, Item) and isinstance(item.value, dict)]
    if sum(map(_is_preference, rows)) * 2 > len(rows):
        return "prompts"
    if sum("text" in row and recognise(row, "prompts") is None for row in rows) * 2 > len(rows):
        return "text"
    return "prompts" if rows and all(map(_is_bare_prompt, rows)) else "answers"


def _is_preference(row: dict[str, Any]) -> bool:
    return "chosen" in row or "rejected" in row


def _is_bare_prompt(row: dict[str, Any]) -> bool:
    """A question and nothing that could be a mistyped answer."""
    form = recognise(row, "prompts")
    return form is not None and recognise(row, "answers") is None and row.keys() <= {*form.names.values(), *_LABELS}


_LABELS = ("id", "idx", "index", "uid")  # keys that tell rows apart without changing what is learned


def _note_other_stages(checked: Checked, items: list[Item | Broken]) -> None:
    """Preferences and tool calls are good rows that sft does not read (yet): a note, not an error."""
    pairs = sum(isinstance(item, Item) and isinstance(item.value, dict) and _is_preference(item.value) for item in items)
    if pairs:
        checked.notes.append(f"{checked.name}: {pairs} preference rows (chosen, rejected)")
    calls = [row for row in checked.rows if any(problem.kind == "tool-turn" for problem in row.problems)]
    for row in calls:
        row.problems, row.refused = [], False
    if calls:
        checked.notes.append(f"{checked.name}: {len(calls)} rows have tool calls, which cannot be trained on yet")


def _mixed_forms(checked: Checked, reading: Reading) -> list[Problem]:
    """A warning at the first row of every form but the main one."""
    items = [row.item for row in checked.rows if isinstance(row.item, Item) and row.record is not None]
    main, form_of = choose_forms([item.value for item in items], reading) if items else (None, None)
    others = [(item.line, form) for item in items if form_of and (form := form_of(item.value)) != main]
    problems = []
    for form in dict.fromkeys(form.name for _, form in others):
        lines = [line for line, other in others if other.name == form]
        message = f"{len(lines)} rows from here on are of the form '{form}', the others '{main.name if main else ''}'"
        problems.append(Problem(checked.name, lines[0], "mixed-form", message, "warning"))
    return problems


# --- one row --------------------------------------------------------------------------------------------------------------

_REPLACEMENT = re.compile("\ufffd|\ufeff|[\ufffe\uffff]|\x00")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_HIGH = "\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"
_MOJIBAKE = [  # UTF-8 read as Latin-1 or Windows-1252: é, accented Latin, ’, Cyrillic, Chinese; then what GBK makes of UTF-8
    re.compile(f"(?<![A-ZÀ-Þ])Ã[{_HIGH}]|(?<![A-ZÀ-Þ])Â[\xa0-\xbf]"),
    re.compile(f"â€[{_HIGH}]"),
    re.compile(f"(?:[ÐÑ][{_HIGH}]){{3,}}"),
    re.compile(f"(?:[ã-é][{_HIGH}]{{2}}){{2,}}"),
    re.compile("锟斤拷|烫烫烫|屯屯屯|锘|锛|銆|鈥"),
]
_GBK_AS_LATIN = re.compile("[\xa1-\xfe]{4,}")
_SPECIAL = re.compile(
    r"<[|｜][A-Za-z0-9_▁]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|\[s?gMASK\]|\[sMASK\]|<(?:sop|eop|unk|pad|bos|eos)>"
    r"|<(?:start|end)_of_turn>|<reserved_\d+>|</?(?:tool_call|tool_response)>"
)


def _contents(name: str, row: Row) -> list[Problem]:
    if not isinstance(row.item, Item):
        return []
    found = dict(_damage(row.item.value))
    found.pop("encoding-damage" if any(problem.kind == "encoding-damage" for problem in row.problems) else "", None)
    if isinstance(row.record, Conversation):
        found |= _preference_damage(row.item.value) if _is_preference(row.item.value) else {}
        last = row.record.turns[-1]
        if last.role == "assistant" and (sign := _cut_short(last.text)):
            found["truncated-answer"] = ("warning", f"the answer looks cut: {sign}")
    problems = [Problem(name, row.item.line, kind, message, level) for kind, (level, message) in found.items()]
    row.refused = row.refused or any(problem.level == "error" for problem in problems)
    return problems


def _damage(value: Any) -> Iterator[tuple[str, tuple[Level, str]]]:
    """(kind, (level, message)) of what should not stand in any text of a row; one of each kind."""
    for key, text in _texts(value, "the row"):
        if match := _SURROGATE.search(text):
            yield "encoding-damage", ("error", f"{key}: half of a surrogate pair (U+{ord(match[0]):04X}), which is not a character")
        elif match := _REPLACEMENT.search(text):
            yield "encoding-damage", ("warning", f"{key}: {_character(match[0])}{_around(text, match)}")
        elif match := _mojibake(text):
            yield "encoding-damage", ("warning", f"{key}: text read in a wrong encoding{_around(text, match)}")
        if match := _CONTROL.search(text):
            yield "control-characters", ("warning", f"{key}: control character U+{ord(match[0]):04X}{_around(text, match)}")
        if match := _SPECIAL.search(text):
            yield (
                "leaked-special-token",
                ("warning", f"{key}: the text holds the special token '{match[0]}'; it is trained as plain text"),
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"'{name}'")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def _character(mark: str) -> str:
    names = {
        "\ufffd": "the replacement character U+FFFD (something was lost here)",
        "\ufeff": "a byte order mark inside the text",
        "\x00": "a NUL",
    }
    return names.get(mark, f"U+{ord(mark):04X}, which is not a character")


def _around(text: str, match: re.Match[str]) -> str:
    piece = text[max(0, match.start() - 10) : match.end() + 10]
    return ": '" + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in piece) + "'"


def _mojibake(text: str) -> re.Match[str] | None:
    if text.isascii():
        return None
    for pattern in _MOJIBAKE:
        if match := pattern.search(text):
            return match
    for match in _GBK_AS_LATIN.finditer(text):
        if len(set(match[0])) > 3 and _decodes(match[0].encode("latin-1"), "gb2312"):
            return match
    return None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


_SENTENCE_END = re.compile(r"""[a-z0-9)\]*]{2}[.!?]["')*]*\s+(?=\S)|[。！？][”」）]?\s*(?=\S)""")
_SIGNATURE = re.compile(r"""[-—–~]\s*[A-Z]|[#@]\w+\W*$|https?://\S+$""")


def _cut_short(answer: str) -> str:
    """A sign that generation stopped at its length limit, or "". Conservative: a missing full stop alone is none."""
    text = answer.rstrip()
    if not text:
        return ""
    if text.count("```") % 2 and not text.endswith("```"):
        return "a code block (```) is opened and never closed"
    if len(text) > 40 and text[-1] in ",，、;；(（:：":
        return f"it ends with '{text[-1]}'"
    last = text.rsplit("\n", 1)[-1]
    ends = list(_SENTENCE_END.finditer(last))
    if len(last) > 60 and ends and text[-1].isalnum() and not _SIGNATURE.search(last[-60:]):
        return f"its last sentence does not end: '...{text[-24:]}'"
    return ""


def _preference_damage(row: dict[str, Any]) -> dict[str, tuple[Level, str]]:
    for key in ("chosen", "rejected"):
        if key not in row:
            return {"missing-key": ("error", f"a preference row needs the key '{key}'; this row has {list(row)}")}
        texts = [text for _, text in _texts(row[key], key)]
        if not texts or not all(text.strip() for text in texts):
            return {"empty-answer": ("error", f"'{key}' is empty")}
    if row["chosen"] == row["rejected"]:
        return {"same-answers": ("warning", "'chosen' and 'rejected' are the same: there is nothing to prefer")}
    return {}


def _check_length(row: Row, encode: Encode, max_length: int) -> None:
    if isinstance(row.record, Conversation) and row.record.turns[-1].role == "assistant":
        length = encode(row.record)
        if length > max_length:
            name, _, line = row.record.where.rpartition(":")
            row.problems.append(Problem(name, int(line), "over-length", f"{length} tokens; the longest row may have {max_length}"))


# --- all rows -------------------------------------------------------------------------------------------------------------


def _find_duplicates(files: list[Checked]) -> None:
    """Rows equal to an earlier one, in any of the files, keys that only number the rows aside."""
    first: dict[str, str] = {}
    for file in files:
        for row in file.rows:
            if not isinstance(row.item, Item) or row.refused:
                continue
            value = row.item.value
            content = {key: value[key] for key in value if key not in _LABELS} if isinstance(value, dict) else value
            place = f"{file.name}:{row.item.line}"
            before = first.setdefault(json.dumps(content, sort_keys=True), place)
            if before != place:
                message = (
                    f"the same row as {before if not before.startswith(file.name + ':') else 'line ' + before.rpartition(':')[2]}"
                )
                row.problems.append(Problem(file.name, row.item.line, "exact-duplicate", message, "warning"))


def _several_answers(files: list[Checked]) -> list[str]:
    """same-question-other-answer, as a note: it may be meant (several good answers), or contradict itself."""
    answers: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in _rows(files):
        record = row.record
        if isinstance(record, Conversation) and record.turns[-1].role == "assistant":
            answers[tuple(turn.text for turn in record.turns[:-1])].setdefault(record.turns[-1].text, record.where)
    several = [list(places.values()) for places in answers.values() if len(places) > 1]
    if not several:
        return []
    shown = ", ".join(" and ".join(places[:3]) for places in several[:4])
    return [
        f"same-question-other-answer: {len(several)} questions have more than one answer ({shown}{', ...' if len(several) > 4 else ''})"
    ]


_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")


def _lengths_and_languages(file: Checked) -> list[str]:
    records = [row.record for row in file.rows if row.record is not None]
    texts = [record.text if isinstance(record, Document) else "\n".join(turn.text for turn in record.turns) for record in records]
    if not texts:
        return []
    cjk = sum(_CJK.search(text) is not None for text in texts)
    notes = [f"{file.name}: {cjk / len(texts):.0%} of the rows have Chinese, Japanese or Korean text"]
    last = [record.text if isinstance(record, Document) else record.turns[-1].text for record in records]
    answered = [text for text, record in zip(last, records) if isinstance(record, Document) or record.turns[-1].role == "assistant"]
    if answered:
        what = "text" if isinstance(records[0], Document) else "answer"
        sizes = sorted(map(len, answered))
        notes.append(
            f"{file.name}: {what} length in characters: shortest {sizes[0]}, median {statistics.median(sizes):.0f}, longest {sizes[-1]}"
        )
    return notes


# --- fix ------------------------------------------------------------------------------------------------------------------


def fix(paths: Sequence[str | Path], out: str | Path, *, columns: dict[str, str] | None = None, format: str | None = None) -> str:
    """Writes the clean rows to `out`, in the layout of the input, and the others to `out`.removed.jsonl; returns what to print.

    Rows with errors and exact duplicates are removed; rows in = rows out + rows removed. Raises UserError where a file cannot
    be read at all, or one of the two outputs exists already.
    """
    out = Path(out)
    removed = out.with_name(out.name + ".removed.jsonl")
    for target in (out, removed):
        if target.exists():
            raise UserError(f"{target} exists already and is never overwritten; choose another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.absolute().parent}")
    files = _examine(paths, columns, format)
    for file in files:
        for problem in file.problems:
            if problem.level == "error":
                raise UserError(f"{problem.place}: {problem.message}; this cannot be mended row by row, nothing was written")
    kept = [(file, row) for file in files for row in file.rows if isinstance(row.item, Item) and not _is_removed(row)]
    gone = [(file, row) for file in files for row in file.rows if row.counts and _is_removed(row)]
    _write_whole(removed, "".join(json.dumps(_removed(file, row), ensure_ascii=False) + "\n" for file, row in gone))
    _write_whole(out, _render(kept))
    kinds = Counter(_reason(row).kind for _, row in gone)
    why = f" ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})" if kinds else ""
    return f"{len(kept) + len(gone)} rows in: {len(kept)} in {out}, {len(gone)} removed to {removed}{why}"


def _is_removed(row: Row) -> bool:
    return any(problem.level == "error" or problem.kind == "exact-duplicate" for problem in row.problems)


def _reason(row: Row) -> Problem:
    return min(row.problems, key=lambda problem: (problem.level != "error", problem.kind != "exact-duplicate"))


def _removed(file: Checked, row: Row) -> dict[str, Any]:
    problem = _reason(row)
    told = {"file": file.name, "line": problem.line, "kind": problem.kind, "message": problem.message}
    return {**told, "row": row.item.value} if isinstance(row.item, Item) else {**told, "raw": _raw(file, row)}


def _raw(file: Checked, row: Row) -> str:
    return file.file.text[row.item.start : row.item.end] if file.file else ""


def _render(kept: list[tuple[Checked, Row]]) -> str:
    """Rows in their own spelling, in the layout they came in; files of several layouts become JSON Lines."""
    layouts = {file.file.layout for file, _ in kept if file.file}
    headers = {tuple(row.item.value) for _, row in kept if isinstance(row.item, Item) and isinstance(row.item.value, dict)}
    if layouts == {"array"}:
        return "[\n" + ",\n".join(_raw(file, row) for file, row in kept) + "\n]\n"
    if layouts == {"csv"} and len(headers) == 1:
        return _csv(kept)
    if layouts == {"text"}:
        texts = [_raw(file, row).rstrip() for file, row in kept]
        return ("\n\n" if any("\n" in text for text in texts) else "\n").join(texts) + "\n"
    return "".join(_one_line(file, row) + "\n" for file, row in kept)


def _one_line(file: Checked, row: Row) -> str:
    raw = _raw(file, row)
    is_json = file.file is not None and file.file.layout in ("array", "lines")
    if is_json and "\n" not in raw:
        return raw
    assert isinstance(row.item, Item)
    return json.dumps(row.item.value, ensure_ascii=False)


def _csv(kept: list[tuple[Checked, Row]]) -> str:
    rows = [row.item.value for _, row in kept if isinstance(row.item, Item)]
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sheet.getvalue()


def _write_whole(path: Path, text: str) -> None:
    """Lone surrogates of removed rows are written as \\udXXX, which JSON reads back."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(text.encode("utf-8", "backslashreplace"))
    new.replace(path)

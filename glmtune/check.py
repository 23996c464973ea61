"""The data check: everything wrong with data files, by file and line, before a minute is spent; and a cleaned copy of them.

An *error* is what training refuses; a *warning* is a row that trains but should be looked at. What is told of a file as a whole
(form, lengths, languages, near-duplicates, questions with several answers) is a note. What texts alone tell is in quality.py.
"""

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import quality
from .data import Problem, parse_items, problem_of
from .errors import UserError
from .forms import Form, Reading, Record, Want, choose_forms, open_file, recognise
from .reading import Broken, DataError, File, Item
from .records import Conversation, Document, Labelled, Preference
from .run import Source
from .sources import Found, find

Encode = Callable[[Conversation | Document], int]


@dataclass
class Row:
    """One row of a file, or a stretch that is none, with all that is wrong with it."""

    item: Item | Broken
    problems: list[Problem] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)  # none where the row cannot be used, several where it has several answers
    form: Form | None = None
    refused: bool = False

    @property
    def record(self) -> Record | None:
        return self.records[0] if self.records else None

    @property
    def counts(self) -> bool:
        """Whether a row stands here; False for a comma that is missing between two rows."""
        return isinstance(self.item, Item) or self.item.lost


@dataclass
class Checked:
    """One file. `file` is None where it cannot be read at all."""

    name: str
    file: File | None = None
    want: Want = "answers"
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # of the file as a whole
    notes: list[str] = field(default_factory=list)


def check(
    paths: Sequence[str | Path],
    *,
    dev: Sequence[str | Path] = (),
    encode: Encode | None = None,
    max_length: int | None = None,
    too_long: str = "error",
    columns: dict[str, str] | None = None,
    format: str | None = None,
) -> dict[str, Any]:
    """{"rows": n, "problems": [{"file", "line", "kind", "level", "message"}], "notes": [...], "lengths": {...}} over all files.

    dev: files to watch the training with; they are checked too, and their rows that stand in `paths` as well are told.
    encode: conversation or document -> number of tokens; rows longer than `max_length` are then errors, or, where the run's
    `too_long` is another than "error", warnings. Never stops at a problem; raises UserError only for a path that is not there and
    for `columns` or `format` that no file could have.
    """
    train, watched = examine(paths, columns, format), examine(dev, columns, format)
    files = train + watched
    _find_overlap(train, watched)
    sizes, unit = [sum(map(len, quality.texts(row.record))) for row in _rows(files) if row.record is not None], "characters"
    notes = [note for file in files for note in file.notes] + _near_duplicates(files) + _several_answers(files)
    if encode is not None:
        counted = _count_tokens(files, encode)
        sizes, unit = [size for _, size in counted], "tokens"
        notes += _too_long(counted, max_length, too_long) if max_length is not None else []
    problems = [problem for file in files for problem in _all_problems(file)]
    return {
        "rows": sum(row.counts for row in _rows(files)),
        "problems": [_plain(problem) for problem in problems],
        "notes": notes,
        "lengths": quality.lengths(sizes, unit),
    }


def _plain(problem: Problem) -> dict[str, Any]:
    message = f"column {problem.column}: {problem.message}" if problem.column else problem.message
    return {"file": problem.file, "line": problem.line, "kind": problem.kind, "level": problem.level, "message": message}


def _all_problems(file: Checked) -> list[Problem]:
    found = file.problems + [problem for row in file.rows for problem in row.problems]
    return sorted(found, key=lambda problem: problem.line)


def _rows(files: Iterable[Checked]) -> Iterator[Row]:
    return (row for file in files for row in file.rows)


# --- one file -------------------------------------------------------------------------------------------------------------


def examine(paths: Sequence[str | Path], columns: dict[str, str] | None = None, format: str | None = None) -> list[Checked]:
    """Every file behind the paths, with its rows and what each alone, and being there twice, has wrong."""
    found = find([Source(path=str(given), columns=columns, format=format) for given in paths])
    files = [_examine_file(path, name, one) for one in found for path, name in one.files]
    _find_duplicates(files)
    return files


def _examine_file(path: Path, name: str, source: Found) -> Checked:
    columns, format = source.columns, source.format
    checked = Checked(name)
    try:
        checked.file = open_file(path, name)
    except DataError as error:
        checked.problems.append(problem_of(name, error))
        return checked
    items = _read_all(checked, checked.file)
    values = [item.value for item in items if isinstance(item, Item)]
    checked.want = _use(values, columns, format)
    reading = Reading(checked.want, format=format, columns=columns)
    try:
        parsed = parse_items(checked.file, items, reading, source.adapt)
    except DataError as error:
        checked.problems += [] if checked.problems else [problem_of(name, error)]
        checked.rows = [Row(item, [problem_of(name, item)] if isinstance(item, Broken) else [], refused=True) for item in items]
        return checked
    checked.notes += parsed.notes
    checked.rows = _grouped(parsed.outcomes)
    for row in checked.rows:
        row.problems += _contents(name, row)
    checked.problems += _mixed_forms(checked, values, reading)
    checked.notes += [f"{name}: the rows are questions without answers"] if checked.want == "prompts" else []
    checked.notes += _labels(checked) + _languages(checked)
    return checked


def _grouped(outcomes: Iterable[tuple[Item | Broken, Any]]) -> list[Row]:
    """What became of every item, an item's several records in one row."""
    rows: list[Row] = []
    for item, outcome in outcomes:
        if isinstance(outcome, Problem):
            rows.append(Row(item, [outcome], refused=True))
        elif rows and rows[-1].item is item:
            rows[-1].records.append(outcome)
        else:
            rows.append(Row(item, records=[outcome]))
    return rows


def _read_all(checked: Checked, file: File) -> list[Item | Broken]:
    items: list[Item | Broken] = []
    try:
        items.extend(file.items)  # keeps what came before an error
    except DataError as error:
        checked.problems.append(problem_of(checked.name, error))
    return items


def _use(values: list[Any], columns: dict[str, str] | None, format: str | None) -> Want:
    """What a file's rows are for: what most of them can be read as, the stage that has keys of its own first."""
    if columns is not None:
        if "text" in columns:
            return "text"
        return "preferences" if {"chosen", "rejected"} & columns.keys() else "labels" if "label" in columns else "answers"
    if format in ("text", "preference"):
        return "text" if format == "text" else "preferences"
    rows = [value for value in values if isinstance(value, dict)]

    def most(test: Callable[[dict[str, Any]], bool]) -> bool:
        return sum(map(test, rows)) * 2 > len(rows)

    if most(lambda row: recognise(row, "preferences") is not None):
        return "preferences"
    if most(_is_labelled) or (rows and all(map(_is_zero_or_one, rows))):
        return "labels"
    if format is not None:
        return "answers"
    if most(lambda row: "text" in row and recognise(row, "prompts") is None):
        return "text"
    return "prompts" if rows and all(map(_is_bare_prompt, rows)) else "answers"


def _is_labelled(row: dict[str, Any]) -> bool:
    """True and false only: a number or a word under 'label' is more likely the class of a text."""
    label = row.get("label", row.get("kto_tag"))
    return str(label).lower() in ("true", "false") and recognise(row, "labels") is not None


def _is_zero_or_one(row: dict[str, Any]) -> bool:
    """Beside a completion (TRL) these are good and bad, where no row has another number."""
    return "completion" in row and str(row.get("label")) in ("0", "1") and recognise(row, "labels") is not None


def _is_bare_prompt(row: dict[str, Any]) -> bool:
    """A question and nothing that could be a mistyped answer."""
    form = recognise(row, "prompts")
    if form is None or not row.keys() <= {*form.names.values(), *_NUMBERS}:
        return False
    messages = row.get(form.names.get("messages", ""))
    last = messages[-1] if isinstance(messages, list) and messages else None
    asks = isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human")
    return asks or recognise(row, "answers") is None


_NUMBERS = ("id", "idx", "index", "uid")  # keys that tell rows apart without changing what is learned


def _mixed_forms(checked: Checked, values: list[Any], reading: Reading) -> list[Problem]:
    """Gives every row its form; a warning at the first row of every form but the main one."""
    main, form_of = choose_forms(values, reading)
    others: dict[str, list[int]] = defaultdict(list)
    for row in checked.rows:
        if isinstance(row.item, Item) and row.record is not None:
            form = form_of(row.item.value)
            row.form = form
            if form != main:
                others[form.name].append(row.item.line)
    said = "{} rows from here on are of the form '{}', the others '{}'"
    return [
        Problem(checked.name, lines[0], "mixed-form", said.format(len(lines), form, main.name), "warning")
        for form, lines in others.items()
    ]


def _labels(checked: Checked) -> list[str]:
    goods = [row.record.good for row in checked.rows if isinstance(row.record, Labelled)]
    if not goods:
        return []
    said = f"{checked.name}: labels: {sum(goods)} good, {len(goods) - sum(goods)} bad"
    return [said + (": all are the same, so nothing sets good and bad apart" if len(set(goods)) == 1 else "")]


def _languages(checked: Checked) -> list[str]:
    found: Counter[str] = Counter()
    crossed = []
    for row in checked.rows:
        if row.record is not None:
            found[quality.language("\n".join(quality.texts(row.record))) or "no letters"] += 1
            asked = [] if isinstance(row.record, Document) else [turn.text for turn in row.record.turns if turn.role == "user"]
            pair = {quality.language(text) for text in asked[-1:] + quality.parts(row.record)[1][:1]} - {""}
            crossed += [row.record.where.rpartition(":")[2]] if len(pair) > 1 else []
    total = found.total()
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in found.most_common())
    notes = [f"{checked.name}: languages: {shares}"] if total else []
    if crossed:
        notes.append(
            f"{checked.name}: rows answered in another language or script than asked: {len(crossed)} (lines {_some(crossed)})"
        )
    return notes


# --- one row --------------------------------------------------------------------------------------------------------------


def _contents(name: str, row: Row) -> list[Problem]:
    if not isinstance(row.item, Item):
        return []
    found = quality.damage(row.item.value)
    if any(problem.kind == "encoding-damage" for problem in row.problems):
        found.pop("encoding-damage", None)
    found |= _of_answers(row.record) if row.record is not None else {}
    problems = [Problem(name, row.item.line, kind, message, level) for kind, level, message in found.values()]
    row.refused = row.refused or any(problem.level == "error" for problem in problems)
    return problems


def _of_answers(record: Record) -> dict[str, quality.Finding]:
    """What is wrong with the answer that is to be learned."""
    if isinstance(record, Preference):
        if (record.chosen.text, record.chosen.extra) == (record.rejected.text, record.rejected.extra):
            same = "'chosen' and 'rejected' are the same: there is nothing to prefer"
            return {"same-answers": quality.Finding("same-answers", "error", same)}
        learned = record.chosen
    elif isinstance(record, Document) or (isinstance(record, Labelled) and not record.good):
        return {}
    else:
        learned = record.turns[-1]
    damaged = quality.answer_damage(learned.text) if learned.role == "assistant" else None
    return {damaged.kind: damaged} if damaged else {}


# --- all rows -------------------------------------------------------------------------------------------------------------


def _find_duplicates(files: list[Checked]) -> None:
    """Rows equal to an earlier one, in any of the files, keys that only number the rows aside."""
    first: dict[str, str] = {}
    for file in files:
        for row in file.rows:
            if not isinstance(row.item, Item) or row.refused:
                continue
            value = row.item.value
            content = {key: value[key] for key in value if key not in _NUMBERS} if isinstance(value, dict) else value
            place = f"{file.name}:{row.item.line}"
            key = json.dumps(content, sort_keys=True)
            before = first.get(key)
            first.setdefault(key, place)
            if before is not None:
                there = f"line {before.rpartition(':')[2]}" if before.startswith(file.name + ":") else before
                row.problems.append(Problem(file.name, row.item.line, "exact-duplicate", f"the same row as {there}", "warning"))


def _find_overlap(train: list[Checked], dev: list[Checked]) -> None:
    """Rows of `dev` that are learned too, and questions of it that are learned with another answer. Spaces and case do not count."""
    learned: dict[str, dict[str, str]] = defaultdict(dict)  # question -> answer -> place
    for record in (row.record for row in _rows(train) if dev):
        if record is not None:
            question, answer = map(_plain_text, quality.parts(record))
            learned[question].setdefault(answer, record.where)
    for row in _rows(dev):
        question, answer = map(_plain_text, quality.parts(row.record)) if row.record is not None else ("", "")
        if row.record is not None and (met := learned.get(question)):
            name, _, line = row.record.where.rpartition(":")
            what = f"the same {'row' if answer in met else 'question'} is trained on: {met.get(answer, next(iter(met.values())))}"
            row.problems.append(Problem(name, int(line), "dev-overlap", what, "warning"))


def _plain_text(texts: list[str]) -> str:
    return "\0".join(" ".join(text.split()).casefold() for text in texts)


def _near_duplicates(files: list[Checked]) -> list[str]:
    """Equal rows are told as such; here are the others that say nearly the same."""
    told = ("exact-duplicate", "dev-overlap")
    records = [row.record for row in _rows(files) if row.record and not any(problem.kind in told for problem in row.problems)]
    if len(records) > quality.NEAR_LIMIT:
        return [f"near-duplicates: not looked for in {len(records)} rows (at most {quality.NEAR_LIMIT})"]
    found = quality.near_duplicates(["\n".join(quality.texts(record)) for record in records])
    if not found:
        return []
    pairs = [f"{records[near.later].where} and {records[near.earlier].where} {near.share:.0%}" for near in found]
    return [f"near-duplicates: {len(found)} of {len(records)} rows say nearly the same as an earlier one ({_some(pairs)})"]


def _several_answers(files: list[Checked]) -> list[str]:
    """same-question-other-answer, as a note: it may be meant (several good answers), or contradict itself."""
    answers: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in _rows(files):
        record = row.record
        if isinstance(record, Conversation) and record.turns[-1].role == "assistant":
            answers[tuple(turn.text for turn in record.turns[:-1])].setdefault(record.turns[-1].text, record.where)
    several = [" and ".join(list(places.values())[:3]) for places in answers.values() if len(places) > 1]
    return [f"same-question-other-answer: {len(several)} questions have more than one answer ({_some(several)})"] if several else []


def _some(places: list[str]) -> str:
    return ", ".join(places[:8]) + (", ..." if len(places) > 8 else "")


def _count_tokens(files: list[Checked], encode: Encode) -> list[tuple[Row, int]]:
    return [
        (row, max(encode(one) for record in row.records for one in quality.sequences(record)))
        for row in _rows(files)
        if row.records and not row.refused
    ]


def _too_long(counted: list[tuple[Row, int]], max_length: int, policy: str) -> list[str]:
    """Documents go on in the next sequence, and what is only asked is not cut: neither is too long."""
    over = []
    for row, size in counted:
        record = row.record
        if size > max_length and record is not None and not isinstance(record, Document) and quality.parts(record)[1]:
            name, _, line = record.where.rpartition(":")
            level, done = ("error", "") if policy == "error" else ("warning", f" (too_long: {policy})")
            message = f"{size} tokens; the longest row may have {max_length}{done}"
            row.problems.append(Problem(name, int(line), "over-length", message, level))
            over.append((size, record.where))
    if not over:
        return []
    longest, where = max(over, key=lambda pair: pair[0])
    return [
        f"over-length: {len(over)} of {len(counted)} rows have more than max_length={max_length} tokens; the longest has {longest} ({where})"
    ]


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
    files = examine(paths, columns, format)
    for file in files:
        for problem in file.problems:
            if problem.level == "error":
                raise UserError(f"{problem.place}: {problem.message}; this cannot be mended row by row, nothing was written")
    kept = [(file, row) for file in files for row in file.rows if isinstance(row.item, Item) and not _is_removed(row)]
    gone = [(file, row) for file in files for row in file.rows if row.counts and _is_removed(row)]
    write_whole(removed, "".join(json.dumps(_removed(file, row), ensure_ascii=False) + "\n" for file, row in gone))
    write_whole(out, _render(kept))
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
    return file.file.raw(row.item) if file.file else ""


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


def write_whole(path: Path, text: str) -> None:
    """Lone surrogates of removed rows are written as \\udXXX, which JSON reads back."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(text.encode("utf-8", "backslashreplace"))
    new.replace(path)

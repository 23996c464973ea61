"""The data check: everything wrong with data files, by file and line, before a minute is spent; and a cleaned copy of them.

An *error* is what training refuses; a *warning* is a row that trains but should be looked at. What is told of a file as a whole
(form, lengths, languages, near-duplicates, questions with several answers) is a note. What texts alone tell is in quality.py.

No row is kept. A file is read once to see what its rows are (`_survey`) and once more to look at them (`rows_of`); a third time where
some may be near-duplicates, and by `fix`. What must be known of all rows at once are digests, in a database on the disk (`_Seen`).
"""

import csv
import io
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from . import quality, tools
from .blocks import printable
from .data import Problem, Rows, problem_of
from .errors import UserError
from .files import whole
from .forms import Form, Reading, Record, Want, choose_forms, is_ranking, open_file, parse_rows, recognise, shape
from .options import build
from .reading import Broken, DataError, File, Item, left_out, suffix_of
from .records import Conversation, Document, Labelled, Preference, Turn
from .run import Source
from .sources import Found, find

MOST_WEIGHTS = 256
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
    def texts(self) -> list[str]:
        """What is asked and every answer to it; the question of several records once."""
        return list(dict.fromkeys(text for record in self.records for text in quality.texts(record)))

    @property
    def counts(self) -> bool:
        """Whether a row stands here; False for a comma that is missing between two rows."""
        return isinstance(self.item, Item) or self.item.lost


@dataclass
class Checked:
    """One file. `reading` is None where none of its rows makes sense, or where it cannot be read at all."""

    path: Path
    name: str
    source: Found
    limit: int | None = None  # only so many rows: the source's max_samples
    want: Want = "answers"
    reading: Reading | None = None
    readable: bool = False
    rows: list[Row] = field(default_factory=list)  # of `examine`
    problems: list[Problem] = field(default_factory=list)  # of the file as a whole
    of_rows: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)  # what max_samples and the look of a folder leave out, as lines

    def open(self) -> File:
        return open_file(self.path, self.name, self.source.columns)

    def items(self, file: File) -> Iterator[Item | Broken]:
        """What came before an error; that error is told by `_survey`."""
        try:
            yield from islice(file.items, self.limit)
        except DataError as error:
            if not self.problems:
                self.problems.append(problem_of(self.name, error))


def check(
    paths: Sequence[str | Path],
    *,
    dev: Sequence[str | Path] = (),
    encode: Encode | None = None,
    max_length: int | None = None,
    too_long: str = "error",
    columns: dict[str, str] | None = None,
    format: str | None = None,
    registry: str | Path | None = None,
) -> dict[str, Any]:
    """{"rows": n, "problems": [{"file", "line", "kind", "level", "message"}], "notes": [...], "lengths": {...}} over all files.

    paths: files, folders, patterns, or names of data sets (registry: the file that names them, as in sources.find).
    dev: files to watch the training with; they are checked too, and their rows that stand in `paths` as well are told.
    encode: conversation or document -> number of tokens; rows longer than `max_length` are then errors, or, where the run's
    `too_long` is another than "error", warnings. Never stops at a problem; raises UserError only for a path that is not there and
    for `columns` or `format` that no file could have.
    """
    train, watched = (_survey_all(given, columns, format, registry) for given in (paths, dev))
    files = train + watched
    lengths = _Lengths(encode, max_length, too_long)
    near, rows, weights = quality.NearDuplicates(), 0, {0.0, 1.0}
    with _Seen() as seen:
        for number, file in enumerate(files):
            tally, is_dev = _Tally(file), number >= len(train)
            seen.start(file.name, afresh=number == len(train))
            weights = {0.0, 1.0} if number == len(train) else weights
            for row in rows_of(file):
                rows += row.counts
                _count_weights(row, file.name, weights)
                _compare_with_earlier(row, file.name, seen, is_dev, learn=bool(watched) and not is_dev)
                lengths.add(row, file.name)
                near.add("\n".join(row.texts) if row.records and not _is_told_as_equal(row) else None)
                tally.add(row)
                file.of_rows += row.problems
            tally.tell()
        several = _several_answers(seen)
    notes = [note for file in files for note in file.notes + file.cut] + _near_duplicates(files, near) + several + lengths.notes()
    problems = [problem for file in files for problem in sorted(file.problems + file.of_rows, key=lambda problem: problem.line)]
    return {
        "rows": rows,
        "problems": [_plain(problem) for problem in problems],
        "notes": [printable(note) for note in notes],
        "lengths": quality.lengths(lengths.sizes, lengths.unit),
    }


def _count_weights(row: Row, name: str, weights: set[float]) -> None:
    """Tells the first row with one weight more than a store of tokens can hold (store.py)."""
    if len(weights) <= MOST_WEIGHTS:
        weights.update(weight for record in row.records for weight in _weights(record) or ())
        if len(weights) > MOST_WEIGHTS:
            said = f"up to here the rows have more than {MOST_WEIGHTS} different weights, the most that can be kept; round them"
            row.problems.append(Problem(name, row.item.line, "wrong-type", said))


def _plain(problem: Problem) -> dict[str, Any]:
    message = f"column {problem.column}: {problem.message}" if problem.column else problem.message
    told = {"file": printable(problem.file), "line": problem.line, "kind": problem.kind, "level": problem.level}
    return {**told, "message": printable(message)}


# --- one file -------------------------------------------------------------------------------------------------------------


def examine(
    paths: Sequence[str | Path],
    columns: dict[str, str] | None = None,
    format: str | None = None,
    registry: str | Path | None = None,
) -> list[Checked]:
    """Every file behind the paths with its rows and what each alone has wrong, for those who hold them."""
    files = _survey_all(paths, columns, format, registry)
    for file in files:
        file.rows = list(rows_of(file))
    return files


def _survey_all(
    paths: Sequence[str | Path], columns: dict[str, str] | None, format: str | None, registry: str | Path | None
) -> list[Checked]:
    """Every file behind the paths with how it is to be read, and how far (`max_samples` of its source)."""
    files = []
    for given in map(str, paths):
        if given.endswith((".yaml", ".yml")):  # as plain text all of its lines would be good
            raise UserError(f"{given} is a run file or a registry, no data; name the files, or the data sets, under its `data:`")
    given = [build(Source, {"path": str(path), "columns": columns, "format": format}, "FILES") for path in paths]
    for source in find(given, registry):
        most = left = source.max_samples
        more = left_out(source.path)
        for path, name in source.files:
            file = Checked(path, name, source, left, cut=more)
            files.append(file)
            more = []
            if left == 0:
                file.cut += [f"{name}: not looked at (max_samples {most} reached)"]
                continue
            count = _survey(file)
            if left is not None:
                if count == left:
                    file.cut += [f"{name}: only the first {left} rows are looked at (max_samples {most})"]
                left -= count
    return files


@dataclass
class _Kind:
    """Rows that are alike in all that decides on use and form: the first of them, how many there are, and what they can be read as."""

    row: dict[str, Any]
    uses: frozenset[Want]
    count: int = 0


def _survey(checked: Checked) -> int:
    """Sees how the file is to be read, and what is wrong with it as a whole; returns the number of its rows."""
    name, source = checked.name, checked.source
    kinds: dict[Any, _Kind] = {}
    keys: dict[str, None] = {}
    count = first = 0
    try:
        file = checked.open()
        checked.readable = True
        for count, item in enumerate(checked.items(file), 1):  # noqa: B007  # the last one is the number of rows
            if isinstance(item, Broken):
                continue
            first = first or item.line
            if isinstance(value := source.adapt(item.value), dict):
                _add(kinds, value, source.columns)
                keys |= dict.fromkeys(value) if len(keys) < 10_000 else {}
        if not count:
            raise DataError("empty-file", "the file has no rows")
        checked.want = _want_of(checked, kinds)
        reading = Reading(checked.want, format=source.format, columns=source.columns, header=file.layout == "csv")
        seen = list(kinds.values())
        try:
            chosen = choose_forms([kind.row for kind in seen], reading, [kind.count for kind in seen])
            reading = replace(reading, chosen=chosen)
            if keys and source.columns is not None:  # one that no row has is an error
                list(Rows(file, [Item(first, dict(keys))], reading))
        except DataError as error:
            error.line = first or 1
            raise
        checked.reading = reading
    except DataError as error:
        checked.problems += [] if checked.problems else [problem_of(name, error)]
    except UserError as error:  # of a registry's own `format`
        raise UserError(source.origin + str(error).removeprefix(source.origin)) from None
    return count


def rows_of(checked: Checked) -> Iterator[Row]:
    """Every row of a file with what it alone has wrong; at the end, `notes` have what reading it tells."""
    for row in _read(checked):
        row.problems += _contents(checked.name, row)
        yield row


def _read(checked: Checked) -> Iterator[Row]:
    if not checked.readable:
        return
    file, source = checked.open(), checked.source
    items = checked.items(file)
    if checked.reading is None or checked.reading.chosen is None:
        for item in items:
            yield Row(item, [problem_of(checked.name, item)] if isinstance(item, Broken) else [], refused=True)
        return
    _, form_of = checked.reading.chosen
    rows = Rows(file, items, checked.reading, source.adapt)
    for item, made in rows:
        if isinstance(made, Problem):
            yield Row(item, [made], refused=True)
        else:
            assert isinstance(item, Item)
            yield Row(item, records=made, form=form_of(source.adapt(item.value)))
    checked.notes = rows.notes


def _add(kinds: dict[Any, _Kind], row: dict[str, Any], columns: dict[str, str] | None, read: bool = False) -> None:
    """One more row of its kind. read: what it can be read as is found by reading it, not by its keys alone."""
    answer = row.get((columns or {}).get("response", ""))
    key = shape(row), type(answer), is_ranking(answer), _label_of(row), *_last_speakers(row)
    uses: frozenset[Want] | None = frozenset(want for want in _USES if _is_readable(row, want)) if read else None
    if (key := (*key, uses)) not in kinds:
        kinds[key] = _Kind(row, frozenset(want for want in _USES if recognise(row, want)) if uses is None else uses)
    kinds[key].count += 1


_USES: tuple[Want, ...] = ("preferences", "labels", "answers", "text", "prompts")


def _is_readable(row: dict[str, Any], want: Want) -> bool:
    form = recognise(row, want)
    try:
        return form is not None and bool(parse_rows(row, form, want))
    except DataError:
        return False


def _want_of(checked: Checked, kinds: dict[Any, _Kind]) -> Want:
    """What a file is for. Where its rows disagree, only those count that can be read: damaged rows, however many, say nothing."""
    source = checked.source
    if len({_use([kind], source.columns, source.format) for kind in kinds.values()}) > 1:
        readable: dict[Any, _Kind] = {}
        for item in checked.items(checked.open()):
            if isinstance(item, Item) and isinstance(value := source.adapt(item.value), dict):
                _add(readable, value, source.columns, read=True)
        kinds = readable
    return _use(list(kinds.values()), source.columns, source.format)


def _use(kinds: Sequence[_Kind], columns: dict[str, str] | None, format: str | None) -> Want:
    """What most rows can be read as, the stage that has keys of its own first."""

    def count(test: Callable[[_Kind], bool]) -> int:
        return sum(kind.count for kind in kinds if test(kind))

    if columns is not None:
        if "text" in columns:
            return "text"
        answer = columns.get("response", "")
        rankings, texts = (
            (count(lambda kind: is_ranking(kind.row.get(answer)))),
            count(lambda kind: isinstance(kind.row.get(answer), str)),
        )
        if {"chosen", "rejected"} & columns.keys() or rankings > texts:
            return "preferences"
        return "labels" if "label" in columns else "answers"
    if format in ("text", "preference", "preference_messages"):
        return "text" if format == "text" else "preferences"
    total = count(_is_answered)
    if count(lambda kind: "preferences" in kind.uses) * 2 > total:
        return "preferences"
    if count(_is_labelled) * 2 > total or (total and all(_is_zero_or_one(kind) for kind in kinds if _is_answered(kind))):
        return "labels"
    if format is not None:
        return "answers"
    if count(_is_text) * 2 > total:
        return "text"
    return "prompts" if not total and count(_is_bare) * 2 > count(lambda kind: "prompts" in kind.uses) else "answers"


def _is_answered(kind: _Kind) -> bool:
    """More than a question: rows of this kind are for one of the stages that learn."""
    return _is_text(kind) or (bool(kind.uses & {"answers", "preferences"}) and not _is_bare(kind))


def _is_text(kind: _Kind) -> bool:
    return "text" in kind.uses and recognise(kind.row, "prompts") is None


def _is_bare(kind: _Kind) -> bool:
    return "prompts" in kind.uses and _is_bare_prompt(kind.row)


def _is_labelled(kind: _Kind) -> bool:
    """True and false only: a number or a word under 'label' is more likely the class of a text."""
    label = kind.row.get("label", kind.row.get("kto_tag"))
    return "labels" in kind.uses and str(label).lower() in ("true", "false")


def _is_zero_or_one(kind: _Kind) -> bool:
    """Beside a completion (TRL) these are good and bad, where no row has another number."""
    return "labels" in kind.uses and "completion" in kind.row and str(kind.row.get("label")) in ("0", "1")


def _is_bare_prompt(row: dict[str, Any]) -> bool:
    """A question and nothing that could be a mistyped answer."""
    form = recognise(row, "prompts")
    if form is None or not row.keys() <= {*form.names.values(), *_NUMBERS}:
        return False
    messages = row.get(form.names.get("messages", ""))
    last = messages[-1] if isinstance(messages, list) and messages else None
    asks = isinstance(last, dict) and str(last.get("role", last.get("from"))).lower() in ("user", "human")
    return asks or recognise(row, "answers") is None


def _label_of(row: dict[str, Any]) -> str:
    """What `_use` looks at besides the shape: the label, if it may be one of good and bad."""
    label = str(row.get("label", row.get("kto_tag")))[:8].lower()
    return label if label in ("true", "false", "0", "1") else ""


def _last_speakers(row: dict[str, Any]) -> list[Any]:
    """And who speaks last."""
    lists = [row.get(key) for key in ("messages", "conversations", "conversation", "dialogue")]
    last = [one[-1] if isinstance(one, list) and one else None for one in lists]
    return [str(one.get("role", one.get("from")))[:16] if isinstance(one, dict) else None for one in last]


_NUMBERS = ("id", "idx", "index", "uid")  # keys that tell rows apart without changing what is learned


@dataclass
class _Lines:
    """How many rows something holds for, and the first few lines."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int) -> None:
        self.count += 1
        self.first += [str(line)] if self.count <= 9 else []


class _Tally:
    """What is told of a file as a whole, gathered row by row."""

    def __init__(self, file: Checked):
        self.file = file
        self.others: dict[str, list[int]] = {}  # form -> [the first line, the number of rows]
        self.goods: Counter[bool] = Counter()
        self.languages: Counter[str] = Counter()
        self.crossed, self.declined = _Lines(), _Lines()

    def add(self, row: Row) -> None:
        if not row.records:
            return
        main = self.file.reading.chosen[0] if self.file.reading and self.file.reading.chosen else None
        if row.form is not None and row.form != main:
            self.others.setdefault(row.form.name, [row.item.line, 0])[1] += 1
        self.goods.update(one.good for one in row.records if isinstance(one, Labelled))
        self.languages[quality.language("\n".join(row.texts)) or "no letters"] += 1
        if any(map(_is_crossed, row.records)):
            self.crossed.add(row.item.line)
        if any(quality.declines(learned.text) for learned in map(_learned, row.records) if learned is not None):
            self.declined.add(row.item.line)

    def tell(self) -> None:
        file, name = self.file, self.file.name
        if file.reading is None or file.reading.chosen is None:
            return
        main = file.reading.chosen[0].name
        for form, (line, count) in self.others.items():
            said = f"{count} rows from here on are of the form '{form}', the others '{main}'"
            file.problems.append(Problem(name, line, "mixed-form", said, "warning"))
        file.notes += [f"{name}: the rows are questions without answers"] if file.want == "prompts" else []
        if self.goods:
            same = ": all are the same, so nothing sets good and bad apart" if len(self.goods) == 1 else ""
            file.notes.append(f"{name}: labels: {self.goods[True]} good, {self.goods[False]} bad{same}")
        if total := self.languages.total():
            shares = ", ".join(f"{language} {count / total:.1%}" for language, count in self.languages.most_common())
            file.notes.append(f"{name}: languages: {shares}")
        for said, lines in (
            ("rows answered in another language or script than asked", self.crossed),
            ("answers that decline, as chat programs do", self.declined),
        ):
            file.notes += [f"{name}: {said}: {lines.count} (lines {_some(lines.first)})"] if lines.count else []


def _is_crossed(record: Record) -> bool:
    asked = [] if isinstance(record, Document) else [turn.text for turn in record.turns if turn.role == "user"]
    return len({quality.language(text) for text in asked[-1:] + quality.parts(record)[1][:1]} - {""}) > 1


# --- one row --------------------------------------------------------------------------------------------------------------


def _contents(name: str, row: Row) -> list[Problem]:
    if not isinstance(row.item, Item):
        return []
    found = quality.damage(row.item.value)
    if any(problem.kind == "encoding-damage" for problem in row.problems):
        found.pop("encoding-damage", None)
    for finding in chain.from_iterable(map(_of_record, row.records)):
        found.setdefault(finding.kind, finding)
    problems = [Problem(name, row.item.line, kind, message, level) for kind, level, message in found.values()]
    row.refused = row.refused or any(problem.level == "error" for problem in problems)
    return problems


def _of_record(record: Record) -> Iterator[quality.Finding]:
    """What is wrong with the answer that is to be learned, and with what tools said."""
    if (weights := _weights(record)) is not None and not any(weights):
        said = "nothing of the row is learned: learn is false, or the weight 0, in every answer"
        yield quality.Finding("nothing-learned", "warning", said)
    if isinstance(record, Document):
        return
    yield from (quality.Finding("tool-result", "warning", said) for said in tools.loose_results(record.turns)[:1])
    if isinstance(record, Preference) and _said_by(record.chosen) == _said_by(record.rejected):
        same = "'chosen' and 'rejected' are the same: there is nothing to prefer"
        yield quality.Finding("same-answers", "error", same)
    elif (learned := _learned(record)) is not None:
        asked = [turn.text for turn in record.turns if turn.role == "user"]
        yield from quality.answer_damage(asked[-1], learned.text)


def _weights(record: Record) -> list[float] | None:
    """With which weights the texts of a record are learned, 0 for not at all; None where it only asks."""
    if isinstance(record, Document):
        return [record.weight]
    answers = (
        [record.chosen, record.rejected]
        if isinstance(record, Preference)
        else [turn for turn in record.turns if turn.role == "assistant" or turn.learn]
    )
    return [turn.weight * record.weight if turn.learn is not False else 0.0 for turn in answers] or None


def _said_by(turn: Turn) -> tuple[str, dict[str, Any]]:
    return turn.text, turn.extra


def _learned(record: Record) -> Turn | None:
    """The last answer that is to be learned; not one that is called bad."""
    if isinstance(record, Document) or (isinstance(record, Labelled) and not record.good):
        return None
    last = record.chosen if isinstance(record, Preference) else record.turns[-1]
    return last if last.role == "assistant" else None


# --- all rows -------------------------------------------------------------------------------------------------------------


class _Seen:
    """Digests of rows, questions and answers, each with the place where it stands first.

    They are in a database that SQLite keeps in a temporary file of its own, with 2 MB of it in memory: the number of rows is not
    bounded by the memory. A digest has 64 bits; two of ten million rows share one by chance in 3 of a million cases.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self.base = sqlite3.connect("", isolation_level=None)
        self.base.execute("PRAGMA journal_mode = OFF")  # nobody goes back
        for table in ("answers", "learned"):
            self.base.execute(f"CREATE TABLE {table} (question INTEGER, answer INTEGER, place INTEGER, UNIQUE (question, answer))")
        self.base.execute("CREATE TABLE rows (content INTEGER PRIMARY KEY, place INTEGER)")
        self.base.execute("BEGIN")

    def __enter__(self) -> "_Seen":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.base.close()
        if isinstance(error, sqlite3.OperationalError):
            raise UserError(
                f"the temporary file in which rows are compared: {error}; free some room on that disk, or set SQLITE_TMPDIR"
            ) from None

    def start(self, file: str, afresh: bool = False) -> None:
        """The next file. afresh: its rows are not told for being equal to rows of those before."""
        self.files.append(file)
        if afresh:
            self.base.execute("DELETE FROM rows")

    def row(self, content: str, line: int) -> str | None:
        """Where the same content stood before, if it did."""
        key = _digest(content)
        new = self.base.execute("INSERT OR IGNORE INTO rows VALUES (?, ?)", (key, self._place(line))).rowcount
        return None if new else self._one("SELECT place FROM rows WHERE content = ?", key)

    def add(self, table: str, question: str, answer: str, line: int) -> None:
        values = (_digest(question), _digest(answer), self._place(line))
        self.base.execute(f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?)", values)

    def learned(self, question: str, answer: str) -> tuple[str, str | None]:
        """("row" | "question", where it is learned first): the same question with that answer, else with any."""
        key = _digest(question)
        same = self._one("SELECT place FROM learned WHERE question = ? AND answer = ?", key, _digest(answer))
        any_answer = "SELECT place FROM learned WHERE question = ? ORDER BY rowid LIMIT 1"
        return ("row", same) if same else ("question", self._one(any_answer, key))

    def several(self, most: int) -> tuple[int, list[list[str]]]:
        """How many questions are answered differently in several places, and of the first of them up to three places."""
        found = "SELECT question, min(rowid) AS first FROM answers GROUP BY question HAVING count(DISTINCT place) > 1"
        count = self.base.execute(f"SELECT count(*) FROM ({found})").fetchone()[0]
        places = "SELECT place FROM answers WHERE question = ? GROUP BY place ORDER BY min(rowid) LIMIT 3"
        first = self.base.execute(f"{found} ORDER BY first LIMIT ?", (most,)).fetchall()
        return count, [[self._said(place) for (place,) in self.base.execute(places, (key,))] for key, _ in first]

    def _place(self, line: int) -> int:
        return (len(self.files) - 1 << 40) + line

    def _said(self, place: int) -> str:
        return f"{self.files[place >> 40]}:{place & (1 << 40) - 1}"

    def _one(self, query: str, *values: int) -> str | None:
        found = self.base.execute(query, values).fetchone()
        return self._said(found[0]) if found else None


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


def _compare_with_earlier(row: Row, name: str, seen: _Seen, is_dev: bool, learn: bool) -> None:
    """Tells rows that stand earlier, and rows of dev that are trained on; remembers the others. learn: dev rows will follow."""
    _find_duplicate(row, name, seen)
    line = row.item.line
    trained: dict[str, str] = {}
    for record in row.records:
        if isinstance(record, Conversation) and record.turns[-1].role == "assistant":
            asked = json.dumps([turn.text for turn in record.turns[:-1]])
            seen.add("answers", asked, record.turns[-1].text, line)
        if learn or is_dev:  # spaces and case do not count
            question, answer = map(_plain_text, quality.parts(record))
            if learn:
                seen.add("learned", question, answer, line)
                continue
            what, place = seen.learned(question, answer)
            if place:
                trained.setdefault(what, place)
    if trained:
        what = "row" if "row" in trained else "question"
        row.problems.append(Problem(name, line, "dev-overlap", f"the same {what} is trained on: {trained[what]}", "warning"))


def _find_duplicate(row: Row, name: str, seen: _Seen) -> None:
    """A row equal to an earlier one, in any of the files, keys that only number the rows aside."""
    if not isinstance(row.item, Item) or row.refused:
        return
    value = row.item.value
    content = {key: value[key] for key in value if key not in _NUMBERS} if isinstance(value, dict) else value
    before = seen.row(json.dumps(content, sort_keys=True), row.item.line)
    if before is not None:
        there = f"line {before.rpartition(':')[2]}" if before.startswith(name + ":") else before
        row.problems.append(Problem(name, row.item.line, "exact-duplicate", f"the same row as {there}", "warning"))


def _plain_text(texts: list[str]) -> str:
    return "\0".join(" ".join(text.split()).casefold() for text in texts)


def _is_told_as_equal(row: Row) -> bool:
    return any(problem.kind in ("exact-duplicate", "dev-overlap") for problem in row.problems)


def _near_duplicates(files: list[Checked], near: quality.NearDuplicates) -> list[str]:
    """Equal rows are told as such; here are the others that say nearly the same. Reads the files again if some may."""
    notes, pairs, count = [], [], 0
    if near.left_out:
        limit, total = quality.NEAR_LIMIT, near.count + near.left_out
        notes.append(f"near-duplicates: looked for among the first {limit} of {total} rows only")
    rows = ((file.name, row) for file in files for row in _read(replace(file)))
    places = ((f"{name}:{row.item.line}", "\n".join(row.texts)) for name, row in rows)
    for later, earlier, share in near.found(places):
        count += 1
        pairs += [f"{later} and {earlier} {share:.0%}"] if count <= 9 else []
    if count:
        notes.append(f"near-duplicates: {count} of {near.count} rows say nearly the same as an earlier one ({_some(pairs)})")
    return notes


def _several_answers(seen: _Seen) -> list[str]:
    """same-question-other-answer, as a note: it may be meant (several good answers), or contradict itself."""
    count, places = seen.several(most=9)
    said = _some([" and ".join(one) for one in places])
    return [f"same-question-other-answer: {count} questions have more than one answer ({said})"] if count else []


def _some(places: list[str]) -> str:
    return ", ".join(places[:8]) + (", ..." if len(places) > 8 else "")


class _Lengths:
    """How long the rows are: in characters, or with `encode` in tokens; and which are too long."""

    def __init__(self, encode: Encode | None, max_length: int | None, policy: str):
        self.encode, self.max_length, self.policy = encode, max_length, policy
        self.unit = "characters" if encode is None else "tokens"
        self.sizes: Counter[int] = Counter()
        self.over, self.longest, self.where = 0, 0, ""

    def add(self, row: Row, name: str) -> None:
        """Tells a row that is too long. Documents go on in the next sequence, and what is only asked is not cut: neither is."""
        record = row.record
        if record is None or (self.encode is not None and row.refused):
            return
        if self.encode is None:
            self.sizes[max(sum(map(len, quality.texts(one))) for one in row.records)] += 1
            return
        size = max(self.encode(one) for record in row.records for one in quality.sequences(record))
        self.sizes[size] += 1
        if self.max_length is None or size <= self.max_length or isinstance(record, Document) or not quality.parts(record)[1]:
            return
        level, done = ("error", "") if self.policy == "error" else ("warning", f" (too_long: {self.policy})")
        message = f"{size} tokens; the longest row may have {self.max_length}{done}"
        row.problems.append(Problem(name, row.item.line, "over-length", message, level))
        self.over += 1
        if size > self.longest:
            self.longest, self.where = size, record.where

    def notes(self) -> list[str]:
        if not self.over:
            return []
        said = f"have more than max_length={self.max_length} tokens; the longest has {self.longest} ({self.where})"
        return [f"over-length: {self.over} of {self.sizes.total()} rows {said}"]


# --- fix ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Sorted:
    """A file whose bad rows are known: why each goes, by its number among all that stands there."""

    file: Checked
    layout: str
    gone: dict[int, Problem] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)  # no rows: a comma that is missing between two of them
    count: int = 0
    header: tuple[str, ...] = ()  # of a CSV file with good rows
    has_lines: bool = False  # a text of several lines is kept

    def kept(self) -> Iterator[tuple[File, Item]]:
        return ((file, item) for number, file, item in self._read() if number not in self.gone and isinstance(item, Item))

    def removed(self) -> Iterator[dict[str, Any]]:
        for number, file, item in self._read() if self.gone else ():
            if problem := self.gone.get(number):
                told = {"file": file.name, "line": problem.line, "kind": problem.kind, "message": problem.message}
                yield {**told, "row": item.value} if isinstance(item, Item) else {**told, "raw": file.raw(item)}

    def _read(self) -> Iterator[tuple[int, File, Item | Broken]]:
        file, number = self.file.open(), -1
        for number, item in enumerate(self.file.items(file)):
            yield number, file, item
        if number + 1 != self.count:
            raise UserError(f"{self.file.name} was changed while it was read; nothing was written")


def fix(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    registry: str | Path | None = None,
) -> str:
    """Writes the clean rows to `out`, in the layout of the input where they read back so, and the others to `out`.removed.jsonl; returns what to print.

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
    files = [file for file in _survey_all(paths, columns, format, registry) if file.limit != 0]
    for file in files:
        for problem in file.problems:
            if problem.level == "error":
                raise UserError(f"{problem.place}: {problem.message}; this cannot be mended row by row, nothing was written")
    with _Seen() as seen:
        parts = [_sorted(file, seen) for file in files]
    kinds = Counter(problem.kind for part in parts for problem in part.gone.values())
    kept = sum(part.count - len(part.gone) - len(part.passed) for part in parts)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for part in parts for row in part.removed())
    layout, other = _layout_of(parts), ""
    try:
        whole(removed, lines)
        whole(out, _render(parts, layout, out.name))
        if layout in ("csv", "text") and not _reads_back(out, parts):
            other = f"; as {'CSV' if layout == 'csv' else 'plain text'} they would be read otherwise, so {out} has JSON Lines"
            whole(out, _render(parts, "lines", out.name))
    except BaseException:  # half of it would stand in the way of the next try
        removed.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        raise
    why = f" ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})" if kinds else ""
    return f"{kept + kinds.total()} rows in: {kept} in {out}, {kinds.total()} removed to {removed}{why}{other}"


def _sorted(file: Checked, seen: _Seen) -> _Sorted:
    """Which rows of a file go. Rows that follow from other files are removed too, so `seen` is one for all."""
    part = _Sorted(file, file.open().layout)
    seen.start(file.name)
    for number, row in enumerate(rows_of(file)):
        part.count += 1
        _find_duplicate(row, file.name, seen)
        bad = [problem for problem in row.problems if problem.level == "error" or problem.kind == "exact-duplicate"]
        if not row.counts:
            part.passed.add(number)
        elif bad:
            part.gone[number] = min(bad, key=lambda problem: problem.level != "error")
        elif isinstance(row.item, Item) and isinstance(row.item.value, dict):
            part.header = tuple(row.item.value) if part.layout == "csv" else ()
            part.has_lines = part.has_lines or (part.layout == "text" and "\n" in row.item.value["text"])
    return part


def _layout_of(parts: list[_Sorted]) -> str:
    """The layout that all files with good rows came in; of several it is JSON Lines."""
    found = {(part.layout, part.header) for part in parts if part.count > len(part.gone) + len(part.passed)}
    return found.pop()[0] if len(found) == 1 else "lines"


def _reads_back(out: Path, parts: list[_Sorted]) -> bool:
    """Whether the rows in `out` are those that were kept. One text of several lines is read as several, CSV by its file's name."""
    kept = (item.value for part in parts for _, item in part.kept())
    try:
        return all(
            isinstance(item, Item) and item.value == value for item, value in zip_longest(open_file(out, out.name).items, kept)
        )
    except DataError:
        return False


def _render(parts: list[_Sorted], layout: str, name: str) -> Iterator[str]:
    """Rows in their own spelling."""
    rows = chain.from_iterable(part.kept() for part in parts)
    if layout == "array":
        return chain(["[\n"], _joined((file.raw(item) for file, item in rows), ",\n"), ["\n]\n"])
    if layout == "csv":
        header = next(part.header for part in parts if part.header)
        return _csv(header, rows, "\t" if suffix_of(name) == ".tsv" else ",")
    if layout == "text":
        blank = "\n\n" if any(part.has_lines for part in parts) else "\n"
        return chain(_joined((file.raw(item).rstrip() for file, item in rows), blank), ["\n"])
    return (_one_line(file, item) + "\n" for file, item in rows)


def _joined(texts: Iterable[str], mark: str) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield mark + text if number else text


def _one_line(file: File, item: Item) -> str:
    raw = file.raw(item)
    return raw if file.layout in ("array", "lines") and "\n" not in raw else json.dumps(item.value, ensure_ascii=False)


def _csv(header: tuple[str, ...], rows: Iterable[tuple[File, Item]], delimiter: str) -> Iterator[str]:
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet, delimiter=delimiter, lineterminator="\r\n")  # so that a text with either in it is put in quotes
    for fields in chain([header], ([item.value[key] for key in header] for _, item in rows)):
        writer.writerow(fields)
        yield sheet.getvalue()[:-2] + "\n"
        sheet.seek(0)
        sheet.truncate()

"""Sources -> Conversations | Documents: the first hop of a sample. docs/architecture.md has the four hops.

    path -> open_file() -> Item(line, value) -> FORMATS[form](row) -> Conversation -> load(): system, variables, weights

Every row keeps its line, and a row that cannot be used is an error that names it: nothing is dropped, cut or skipped in silence.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

from .errors import UserError, did_you_mean
from .forms import Form, Reading, Want, choose_forms, open_file, parse_row
from .reading import Broken, DataError, File, Item, find_files, some
from .records import Conversation, Document, Turn

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


# --- load: sources -> rows ------------------------------------------------------------------------------------------------


def load(
    sources: Sequence[Source],
    *,
    system: str | None = None,
    variables: dict[str, str] | None = None,
    join: str = "\n",
    want: Want = "answers",
    all_variables: bool = True,
) -> Loaded:
    """Reads all sources, in order, into checked rows.

    want: "answers" every row ends with an answer (training); "prompts" the trailing answer, if any, moves to meta["reference"];
    "text" plain text, rows are Documents. `meta["row"]` is the row as it stands in the file. The system turn comes from the row,
    else the source, else `system`. `variables` fill `{{name}}` in every text; with `all_variables` each must occur somewhere.
    Raises one UserError of at most three lines: the first bad row, how many more there are and where.
    """
    notes: list[str] = []
    bad: list[Problem] = []
    parts: list[tuple[Source, str, list[Any]]] = []
    for source in sources:
        parsed = _read_source(source, Reading(want, join, source.format, source.columns))
        parts.append((source, parsed.form, parsed.rows))
        notes += parsed.notes
        bad += parsed.problems
    if bad:
        raise UserError(_bad_rows(bad, sources))
    if all_variables:
        _check_variables(variables or {}, parts, system)
    rows, spans = [], []
    for source, form, own in parts:
        finished = [_finish(row, source.system if source.system is not None else system, variables or {}, want) for row in own]
        finished = _passes(finished, source.weight, source.path)
        spans.append(Span(source.path, form, len(rows), len(finished)))
        rows += finished
    return Loaded(rows, notes, spans)


def _read_source(source: Source, reading: Reading) -> Parsed:
    """All files of a source, up to its `max_samples`. Raises UserError for a file that cannot be read at all."""
    whole = Parsed()
    for path, name in find_files(source.path):
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
            f"columns: {name} names the key '{key}', which no row has; keys are {some(list(keys))}{did_you_mean(key, keys)}",
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
            there = f"the rows have {some(sorted(f'{{{{{one}}}}}' for one in found))}" if found else "no row has any {{...}}"
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

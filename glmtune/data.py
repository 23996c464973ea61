"""Sources -> checked rows, one after the other: file -> Item -> (forms.py) record -> system, variables, weights.

Every row keeps its line, and a row that cannot be used is an error that names it: nothing is dropped, cut or skipped in silence.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, did_you_mean
from .forms import Form, Reading, Record, Want, choose_forms, open_file, parse_rows
from .mixing import content_hash, mix, parts, split, split_hashes
from .reading import Broken, DataError, File, Item, some
from .records import Document, Preference, Turn
from .sources import Found, Source, find

__all__ = ["content_hash", "find", "mix", "split", "split_hashes"]  # with everything defined here

HEAD = 1000  # rows of a file that decide on its form


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
    """What became of every item of a file, in order. Of a row with several answers the first stands here."""

    outcomes: list[tuple[Item | Broken, Record | Problem]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    form: str = ""


@dataclass(frozen=True)
class Span:
    """The records of one source: `rows[start : start + count]`."""

    path: str
    format: str
    start: int
    count: int


@dataclass(frozen=True)
class Loaded:
    """What `load` returns. `notes` are lines to print."""

    rows: list[Any]  # of Conversation; Document for want="text", Preference for "preferences", Labelled for "labels"
    notes: list[str]
    spans: list[Span]


# --- sources -> records ---------------------------------------------------------------------------------------------------


def stream(
    sources: Sequence[Source],
    *,
    system: str | None = None,
    variables: dict[str, str] | None = None,
    join: str = "\n",
    want: Want = "answers",
    all_variables: bool = True,
    registry: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> "Stream":
    """(source number, record) of every row of every source, in order, each source once; keeps none of them.

    want: "answers" every row ends with an answer (training); "prompts" the trailing answer, if any, moves to meta["reference"];
    "text" plain text, records are Documents; "preferences", "labels" as in forms.py. `meta["row"]` is the row as it stands in the
    file. The system turn comes from the row, else the source, else `system`. `variables` fill `{{name}}` in every text; with
    `all_variables` each must occur somewhere. registry, say: see `sources.find`; what is Found already is read as it is.
    """
    return Stream(find(sources, registry, say), Reading(want, join), system, variables or {}, all_variables)


@dataclass
class Stream:
    """Iterating reads the files, anew each time. `notes` (lines to print) and `spans` are whole once it is exhausted.

    At its end it raises one UserError of at most three lines if rows were bad: the first, how many more there are and where. A file
    that cannot be read at all is a UserError at once.
    """

    sources: list[Found]
    reading: Reading
    system: str | None
    variables: dict[str, str]
    all_variables: bool
    notes: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.notes, self.spans = [], []
        bad, marks, start = _Bad(), _Marks(self.variables), 0
        for number, source in enumerate(self.sources):
            system, count, forms = source.system if source.system is not None else self.system, 0, []
            marks.add([system or ""])
            for record in self._records(source, bad, forms):
                marks.add(text for text in _texts(record))
                yield number, _finish(record, system, self.variables, self.reading.want)
                count += 1
            self.spans.append(Span(source.path, "+".join(dict.fromkeys(forms)), start, count))
            start += count
        bad.refuse()
        if self.all_variables:
            marks.refuse()

    def _records(self, source: Found, bad: "_Bad", forms: list[str]) -> Iterator[Record]:
        """Those of a source, up to its `max_samples`."""
        columns, left = source.columns, source.max_samples
        if self.reading.want == "text" and columns and columns.keys() == {"prompt"}:  # as LLaMA-Factory has it
            columns = {"text": columns["prompt"]}
        self.notes += source.notes
        for path, name in source.files:
            if left is not None and left <= 0:
                self.notes.append(f"{name}: not read (max_samples {source.max_samples} reached)")
                continue
            rows = None
            try:
                file = open_file(path, name)
                reading = replace(self.reading, format=source.format, columns=columns)
                rows = Rows(file, islice(file.items, left), reading, source.adapt)
                for _, made in rows:
                    if isinstance(made, Problem):
                        bad.add(made, source)
                    else:
                        yield from made
            except DataError as error:  # of what is broken the first is told: it may be why no row makes sense
                problem = problem_of(name, (rows and not rows.chosen and rows.first_broken) or error)
                raise UserError(
                    problem.message if problem.kind == "missing-file" else f"{problem.place}: {problem.message}"
                ) from None
            if left is not None:
                if left == rows.count and rows.notes:
                    rows.notes[0] += f"; only the first {left} (max_samples {source.max_samples})"
                left -= rows.count
            self.notes += rows.notes
            forms.append(rows.form)


def load(
    sources: Sequence[Source], *, registry: str | Path | None = None, seed: int = 0, temperature: float = 1.0, **reading: Any
) -> Loaded:
    """`stream`, collected, and mixed as the sources' weights and shares say."""
    flow = stream(sources, registry=registry, **reading)
    rows = [record for _, record in flow]
    mixture = parts([span.count for span in flow.spans], flow.sources, seed, temperature)
    mixed: list[Any] = []
    spans = []
    for span, part in zip(flow.spans, mixture, strict=True):
        spans.append(replace(span, start=len(mixed), count=len(part)))
        mixed += [rows[span.start + index] for index in part]
    return Loaded(mixed, flow.notes, spans)


def files_of(source: Source, registry: str | Path | None = None) -> list[tuple[Path, str]]:
    """The files behind a source, each with its name for messages."""
    return find([source], registry)[0].files


class Rows:
    """A file's items as records or problems, one after the other. `notes`, `form` and `count` are whole at the end.

    The form is decided by the first `head` rows (None: by all); a later row that fits no form is refused as one of that form.
    Raises DataError where nothing can be read: no rows at all, no form known for any of them, columns that no row has.
    """

    def __init__(
        self,
        file: File,
        items: Iterable[Item | Broken],
        reading: Reading,
        adapt: Callable[[Any], Any] = lambda row: row,
        head: int | None = HEAD,
    ):
        self.file, self.items, self.reading, self.adapt, self.head = file, items, reading, adapt, head
        self.notes: list[str] = []
        self.form, self.count, self.chosen = "", 0, False
        self.first_broken: Broken | None = None

    def __iter__(self) -> Iterator[tuple[Item | Broken, list[Record] | Problem]]:
        items = iter(self.items)
        head, whole = self._first(items)
        if not head:
            raise DataError("empty-file", "the file has no rows")
        good = [item for item in head if isinstance(item, Item)]
        self.first_broken = next((item for item in head if isinstance(item, Broken)), None)
        values, keys = [self.adapt(item.value) for item in good], Counter()
        _count_keys(keys, values)
        try:
            main, form_of = choose_forms(values, self.reading)
            columns = self._check_columns(main, keys) if whole else []
        except DataError as error:
            error.line = good[0].line if good else 1
            raise
        self.chosen = True
        used: Counter[int] = Counter()
        forms: dict[int, Form] = {}
        for number, item in enumerate(chain(head, items)):
            self.count += 1
            if isinstance(item, Broken):
                yield item, problem_of(self.file.name, item)
                continue
            value = self.adapt(item.value)
            if number >= len(head):
                _count_keys(keys, [value])
            form = form_of(value)
            try:
                made = parse_rows(value, form, self.reading.want, self.reading.join)
            except DataError as error:
                yield item, Problem(self.file.name, item.line, error.kind, str(error))
                continue
            where = f"{self.file.name}:{item.line}"
            yield item, [replace(record, where=where, meta={"row": item.value, **record.meta}) for record in made]
            forms[id(form)] = form
            used[id(form)] += 1
        counts = Counter({forms[one].describe(keys): count for one, count in used.items()})
        self.notes = _file_notes(self.file, counts, main, keys, self.reading.want)
        self.notes += columns if whole else self._check_columns(main, keys)
        self.form = main.name

    def _first(self, items: Iterator[Item | Broken]) -> tuple[list[Item | Broken], bool]:
        """The rows that decide, and whether they are all."""
        found, size = [], 0
        for item in items:
            found.append(item)
            size += item.end - item.start
            if self.head is not None and (len(found) >= self.head or size > 16_000_000):
                return found, False
        return found, True

    def _check_columns(self, main: Form, keys: Counter[str]) -> list[str]:
        return _check_columns(main, keys, self.reading.want) if self.reading.columns is not None and keys else []


def _count_keys(keys: Counter[str], values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, dict) and len(keys) < 10_000:
            keys.update(value.keys())


def parse_items(file: File, items: list[Item | Broken], reading: Reading, adapt: Callable[[Any], Any] = lambda row: row) -> Parsed:
    """The records of a file's items and what is wrong with the others, in order; a row with several answers is there several times.
    Raises DataError as Rows does."""
    rows = Rows(file, items, reading, adapt, head=None)
    outcomes = [(item, one) for item, made in rows for one in ([made] if isinstance(made, Problem) else made)]
    return Parsed(outcomes, rows.notes, rows.form)


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


class _Bad:
    """Rows that cannot be used: all counted, the first few kept."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0
        self.places: dict[str, None] = {}  # what `data check` can be given
        self.kinds: set[str] = set()
        self.columns: dict[str, str] | None = None

    def add(self, problem: Problem, source: Found) -> None:
        if not self.count:
            self.columns = source.columns
        self.count += 1
        self.kinds.add(problem.kind)
        if len(self.first) < 20:
            self.first.append(problem)
        if len(self.places) < 3:
            self.places[problem.file if Path(problem.file).expanduser().exists() else source.path] = None

    def refuse(self) -> None:
        """Raises UserError if there are any."""
        if not self.count:
            return
        first, rest = self.first[0], self.first[1:9]
        lines = [f"{first.place}: {first.message}"]
        if rest:
            places = [str(bad.line) if bad.file == first.file else f"{bad.file}:{bad.line}" for bad in rest]
            more = ", ..." if self.count > 9 else ""
            lines.append(
                f"and {self.count - 1} more bad {'rows: lines' if self.count > 2 else 'row: line'} {', '.join(places)}{more}"
            )
        option = " --columns " + ",".join(f"{name}={key}" for name, key in self.columns.items()) if self.columns else ""
        if not self.kinds <= {"preference-row", "tool-turn"}:  # good rows, for another stage
            lines.append(f"glmtune data check {' '.join(self.places)}{option} lists them all; --fix OUT writes a cleaned copy")
        raise UserError("\n".join(lines))


def _finish(record: Record, system: str | None, variables: dict[str, str], want: Want) -> Record:
    """The run's share of a row: default system turn, variables, and for prediction the answer moved to `meta`."""
    if isinstance(record, Document):
        return replace(record, text=_fill(record.text, variables))
    turns = record.turns
    if system is not None and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    if variables:
        turns = tuple(replace(turn, text=_fill(turn.text, variables)) for turn in turns)
    if isinstance(record, Preference):
        chosen, rejected = (replace(turn, text=_fill(turn.text, variables)) for turn in (record.chosen, record.rejected))
        return replace(record, turns=turns, chosen=chosen, rejected=rejected)
    if want == "prompts" and turns[-1].role == "assistant":
        return replace(record, turns=turns[:-1], meta={**record.meta, "reference": turns[-1].text})
    return replace(record, turns=turns)


def _texts(record: Record) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    turns = (*record.turns, record.chosen, record.rejected) if isinstance(record, Preference) else record.turns
    return [turn.text for turn in turns]


_VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def _fill(text: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text) if variables and "{{" in text else text


class _Marks:
    """The {{names}} that stand in the rows."""

    def __init__(self, variables: dict[str, str]):
        self.missing, self.found = dict.fromkeys(variables), dict[str, None]()

    def add(self, texts: Iterable[str]) -> None:
        if not self.missing:
            return
        for text in texts:
            for name in _VARIABLE.findall(text) if "{{" in text else ():
                self.missing.pop(name, None)
                if len(self.found) < 50:
                    self.found[name] = None

    def refuse(self) -> None:
        """Raises UserError for a variable that stands nowhere."""
        for name in self.missing:
            shown = some(sorted(f"{{{{{one}}}}}" for one in self.found))
            there = f"the rows have {shown}" if self.found else "no row has any {{...}}"
            near = did_you_mean(name, self.found)
            raise UserError(f"variables: '{name}' fills {{{{{name}}}}}, which stands in no row; {there}{near}")

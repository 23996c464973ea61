"""Sources -> checked rows, one after the other: file -> Item -> (forms.py) record -> system, variables, weights.

Every row keeps its line, and a row that cannot be used is an error that names it: nothing is dropped, cut or skipped in silence.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, did_you_mean
from .forms import RANKED, Form, Reading, Record, Want, choose_forms, open_file, parse_rows
from .mixing import content_hash, mix, parts, split, split_hashes
from .reading import Broken, DataError, File, Item, some
from .records import Document, Preference, Turn
from .sources import Found, Source, find

__all__ = ["content_hash", "find", "mix", "split", "split_hashes"]  # with everything defined here

HEAD = 1000  # rows of a file that decide on its form
LOT = 64  # rows that are handed on at once
LOT_BYTES = 4_000_000  # of a file, after which fewer are


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
    elsewhere: Sequence[str] | None = (),
    registry: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> "Stream":
    """(source number, record) of every row of every source, in order, each source once; keeps none of them.

    want: "answers" every row ends with an answer (training); "prompts" the trailing answer, if any, moves to meta["reference"];
    "text" plain text, records are Documents; "preferences", "labels" as in forms.py. `meta["row"]` is the row as it stands in the
    file. The system turn comes from the row, else the source, else `system`. `variables` fill `{{name}}` in every text;
    each must stand in some row or in `elsewhere` (None: it need not). registry, say: see `sources.find`; what is Found already is read as it is.
    """
    return Stream(find(sources, registry, say), Reading(want, join), system, variables or {}, elsewhere)


Recognised = tuple[Item | Broken, Any, int]  # a file's item, its value with the usual names, and which of `forms` it is read as


@dataclass
class Lot:
    """Some rows of a file, with all that it takes to make records of them: any process can, see `Stream.read`."""

    source: int
    file: str  # its name for messages
    forms: list[Form]
    rows: list[Recognised]
    done: float | None  # how much of all files was read at its end, 0 to 1; None: not known


@dataclass
class Read:
    """What became of a lot. `count` is the number of its records; `used` how many rows are of which of the lot's forms; `ranked` how
    many have more than two answers, by their number."""

    records: list[Any] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    used: Counter[int] = field(default_factory=Counter)
    ranked: Counter[int] = field(default_factory=Counter)
    marks: "_Marks" = field(default_factory=lambda: _Marks({}))
    count: int = 0


@dataclass
class _Open:
    """A file that is being read: what its lots tell is added up here."""

    number: int
    source: Found
    rows: "Rows"
    left: int | None  # how many of its rows are wanted; None: all
    notes: list[str]
    used: Counter[int] = field(default_factory=Counter)
    ranked: Counter[int] = field(default_factory=Counter)


@dataclass
class Stream:
    """Iterating reads the files, anew each time. `notes` (lines to print) and `spans` are whole once it is exhausted.

    At its end it raises one UserError of at most three lines if rows were bad: the first, how many more there are and where. A file
    that cannot be read at all is a UserError at once.

    For several processes: `lots` finds the rows, `read` makes records of a lot anywhere, and what it says goes to the function that
    came with the lot, in the order of the lots; at last `finish`. Nothing depends on who reads, nor on how far `lots` is ahead.
    """

    sources: list[Found]
    reading: Reading
    system: str | None
    variables: dict[str, str]
    elsewhere: Sequence[str] | None
    notes: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for lot, take in self.lots():
            read = self.read(lot)
            take(read)
            for record in read.records:
                yield lot.source, record
        self.finish()

    def lots(self, size: int = LOT) -> Iterator[tuple[Lot, Callable[[Read], None]]]:
        """All rows in order, `size` at a time, each time with the function that is told what became of them."""
        self._bad, self._marks = _Bad(), _Marks(self.variables)
        self._notes: list[list[str]] = []  # of each source, of each file
        self._counts = [0] * len(self.sources)
        self._forms: list[dict[str, None]] = [{} for _ in self.sources]
        sizes = {path: path.stat().st_size if path.is_file() else 0 for source in self.sources for path, _ in source.files}
        passed, total = 0, sum(sizes[path] for source in self.sources for path, _ in source.files)
        for number, source in enumerate(self.sources):
            self._notes.append(source.notes)
            left = source.max_samples
            for path, name in source.files:
                self._notes.append([])
                if left is not None and left <= 0:
                    self._notes[-1].append(f"{name}: not read (max_samples {source.max_samples} reached)")
                    passed += sizes[path]
                    continue
                rows = None
                try:
                    file = open_file(path, name, source.columns)
                    rows = Rows(file, islice(file.items, left), self._reading_of(source), source.adapt)
                    opened = _Open(number, source, rows, left, self._notes[-1])
                    for held, last in rows.lots(size):
                        share = rows.count / left if left else 0.0
                        if held and not file.packing:
                            share = max(share, held[-1][0].end / max(1, sizes[path]))
                        done = None if file.packing and not left else (passed + share * sizes[path]) / max(1, total)
                        yield Lot(number, name, [*rows.forms], held, done), partial(self._take, opened, last)
                except DataError as error:
                    raise _refusal(name, rows, error) from None
                except UserError as error:  # of a registry's own `format` or `tags`
                    raise UserError(source.origin + str(error).removeprefix(source.origin)) from None
                passed += sizes[path]
                if left is not None:
                    left -= rows.count

    def _reading_of(self, source: Found) -> Reading:
        columns = source.columns
        if self.reading.want == "text" and columns and columns.keys() == {"prompt"}:  # as LLaMA-Factory has it
            columns = {"text": columns["prompt"]}
        return replace(self.reading, format=source.format, columns=columns)

    def read(self, lot: Lot) -> Read:
        """The records of a lot. Looks at nothing but the lot and what this stream was made with."""
        given = self.sources[lot.source].system
        system, want, made = given if given is not None else self.system, self.reading.want, Read(marks=_Marks(self.variables))
        made.marks.add([system or ""])
        for row in lot.rows:
            found = _read_row(lot.file, lot.forms, row, want, self.reading.join)
            if isinstance(found, Problem):
                made.problems.append(found)
                continue
            made.used[row[2]] += 1
            made.ranked.update(_ranked(found))
            for record in found:
                if self.variables:
                    made.marks.add(_texts(record))
                made.records.append(_finish(record, system, self.variables, want))
        made.count = len(made.records)
        return made

    def _take(self, opened: _Open, last: bool, read: Read) -> None:
        """Adds up what became of a file's lots, one after the other; with the last one the file is done."""
        source, rows = opened.source, opened.rows
        for problem in read.problems:
            self._bad.add(problem, source)
        self._marks.join(read.marks)
        self._counts[opened.number] += read.count
        opened.used += read.used
        opened.ranked += read.ranked
        if not last:
            return
        try:
            rows.finish(opened.used, opened.ranked)
        except DataError as error:
            raise _refusal(rows.file.name, rows, error) from None
        if opened.left == rows.count and rows.notes:
            rows.notes[0] += f"; only the first {opened.left} (max_samples {source.max_samples})"
        opened.notes += rows.notes
        self._forms[opened.number][rows.form] = None

    def finish(self) -> None:
        """After the last lot: raises UserError for bad rows and for variables that stand nowhere; completes `notes` and `spans`."""
        self._bad.refuse()
        if self.elsewhere is not None:
            self._marks.add(self.elsewhere)
            self._marks.refuse()
        self.notes = list(chain.from_iterable(self._notes))
        starts = accumulate(self._counts, initial=0)
        parts = zip(self.sources, self._forms, starts, self._counts, strict=False)
        self.spans = [Span(source.path, "+".join(forms), start, count) for source, forms, start, count in parts]


def _refusal(name: str, rows: "Rows | None", error: DataError) -> UserError:
    """Of a file that cannot be read. Of what is broken the first is told: it may be why no row makes sense."""
    problem = problem_of(name, (rows and not rows.chosen and rows.first_broken) or error)
    return UserError(problem.message if problem.kind == "missing-file" else f"{problem.place}: {problem.message}")


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
        self.forms: list[Form] = []  # those that the rows so far are read as
        self._keys: Counter[str] = Counter()
        self.first_broken: Broken | None = None

    def __iter__(self) -> Iterator[tuple[Item | Broken, list[Record] | Problem]]:
        used, ranked = Counter[int](), Counter[int]()
        for row in self._recognised():
            found = _read_row(self.file.name, self.forms, row, self.reading.want, self.reading.join)
            if not isinstance(found, Problem):
                used[row[2]] += 1
                ranked.update(_ranked(found))
            yield row[0], found
        self.finish(used, ranked)

    def lots(self, size: int) -> Iterator[tuple[list[Recognised], bool]]:
        """Up to `size` rows at a time, and whether they are the last. Where reading ends in a DataError, what came before it is handed
        on first, and is not the last."""
        rows, last, error = self._recognised(), False, None
        while not last and error is None:
            held: list[Recognised] = []
            room = LOT_BYTES
            try:
                for row in rows:
                    held.append(row)
                    room -= row[0].end - row[0].start
                    if len(held) == size or room < 0:
                        break
                else:
                    last = True
            except DataError as found:
                error = found
            yield held, last
        if error is not None:
            raise error

    def _recognised(self) -> Iterator[Recognised]:
        items = iter(self.items)
        head, whole = self._first(items)
        if not head:
            raise DataError("empty-file", "the file has no rows")
        good = [item for item in head if isinstance(item, Item)]
        self.first_broken = next((item for item in head if isinstance(item, Broken)), None)
        values = [self.adapt(item.value) for item in good]
        _count_keys(self._keys, values)
        try:
            self._main, form_of = choose_forms(values, replace(self.reading, header=self.file.layout == "csv"))
            self._columns = self._check_columns() if whole else None
        except DataError as error:
            error.line = good[0].line if good else 1
            raise
        self.chosen = True
        places: dict[int, int] = {}  # where a form stands in `forms`
        for number, item in enumerate(chain(head, items)):
            self.count += 1
            if isinstance(item, Broken):
                yield item, None, 0
                continue
            value = self.adapt(item.value)
            if number >= len(head):
                _count_keys(self._keys, [value])
            form = form_of(value)
            place = places.setdefault(id(form), len(places))
            if place == len(self.forms):
                self.forms.append(form)
            yield item, value, place

    def finish(self, used: Counter[int], ranked: Counter[int]) -> None:
        """used: how many rows are of which of `forms`; ranked: see Read. Raises DataError for columns that no row has."""
        counts = Counter({self.forms[one].describe(self._keys): count for one, count in used.items()})
        forms = [self._main, *(self.forms[one] for one in used)]
        self.notes = _file_notes(self.file, counts, forms, self._keys, self.reading.want)
        if ranked:
            several = f"{min(ranked)} to {max(ranked)}" if len(ranked) > 1 else f"{min(ranked)}"
            said = f"{ranked.total()} rows have {several} answers, the best first: the first two are read, as chosen and rejected"
            self.notes.append(f"{self.file.name}: {said}")
        self.notes += self._columns if self._columns is not None else self._check_columns()
        self.form = self._main.name

    def _first(self, items: Iterator[Item | Broken]) -> tuple[list[Item | Broken], bool]:
        """The rows that decide, and whether they are all."""
        found, size = [], 0
        for item in items:
            found.append(item)
            size += item.end - item.start
            if self.head is not None and (len(found) >= self.head or size > 16_000_000):
                return found, False
        return found, True

    def _check_columns(self) -> list[str]:
        if self.reading.columns is None or not self._keys:
            return []
        try:
            return _check_columns(self._main, self._keys, self.reading.want)
        except DataError as error:
            if self.file.layout != "csv" or self._keys.keys() & {*self._main.names.values()}:
                raise
            raise DataError(error.kind, f"{error}; is the header (the first line, with the columns' names) missing?") from None


def _read_row(name: str, forms: list[Form], row: Recognised, want: Want, join: str) -> list[Record] | Problem:
    item, value, form = row
    if isinstance(item, Broken):
        return problem_of(name, item)
    try:
        made = parse_rows(value, forms[form], want, join)
    except DataError as error:
        return Problem(name, item.line, error.kind, str(error))
    where = f"{name}:{item.line}"
    return [replace(record, where=where, meta={"row": item.value, **record.meta}) for record in made]


def _ranked(records: list[Record]) -> Iterator[int]:
    return (record.meta[RANKED] for record in records if RANKED in record.meta)


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


def _file_notes(file: File, used: Counter[str], forms: list[Form], keys: Counter[str], want: Want) -> list[str]:
    count = sum(used.values())
    said = ", ".join(f"{form} {number}" for form, number in used.items()) if len(used) > 1 else "".join(used)
    line = f"{file.name}: {count} row{'s' if count != 1 else ''}, form{'s' if len(used) > 1 else ''} {said}"
    known = {key for form in forms for key in form.names.values()}
    unused = [key for key in keys if key not in known]
    if unused and used and all(form.names for form in forms):
        what = "keys that stay with the row, for rewards and scores" if want == "prompts" else "keys not used"
        line += f"; {what}: {', '.join(unused[:8])}"
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
        return replace(record, text=fill(record.text, variables)) if variables else record
    turns = record.turns
    if system is not None and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    if variables:
        turns = tuple(_filled(turn, variables) for turn in turns)
    if isinstance(record, Preference):
        chosen, rejected = (_filled(turn, variables) for turn in (record.chosen, record.rejected))
        return replace(record, turns=turns, chosen=chosen, rejected=rejected)
    if want == "prompts" and turns[-1].role == "assistant":
        return replace(record, turns=turns[:-1], meta={**record.meta, "reference": turns[-1].text})
    return replace(record, turns=turns) if turns is not record.turns else record


def _filled(turn: Turn, variables: dict[str, str]) -> Turn:
    return replace(turn, text=fill(turn.text, variables), extra=_fill_within(turn.extra, variables)) if variables else turn


def _fill_within(value: Any, variables: dict[str, str]) -> Any:
    """Every text in tool calls, schemas and other keys of a turn."""
    if isinstance(value, dict):
        return {key: _fill_within(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_fill_within(one, variables) for one in value]
    return fill(value, variables) if isinstance(value, str) else value


def _texts(record: Record) -> Iterator[str]:
    if isinstance(record, Document):
        yield record.text
        return
    turns = (*record.turns, record.chosen, record.rejected) if isinstance(record, Preference) else record.turns
    for turn in turns:
        yield turn.text
        yield from _texts_within(turn.extra)


def _texts_within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts_within(one)


_VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def fill(text: str, variables: dict[str, str]) -> str:
    """`{{name}}` by the run option `variables`, wherever they are filled; names that they do not have stay as they are."""
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text) if variables and "{{" in text else text


def named(texts: Iterable[str], variables: Iterable[str]) -> list[str]:
    """Those of the variables that stand in the texts."""
    return sorted(set(variables) & {name for text in texts for name in _VARIABLE.findall(text)})


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

    def join(self, other: "_Marks") -> None:
        """Adds what was found in later rows."""
        self.missing = {name: None for name in self.missing if name in other.missing}
        for name in other.found:
            if len(self.found) < 50:
                self.found[name] = None

    def refuse(self) -> None:
        """Raises UserError for a variable that stands nowhere."""
        for name in self.missing:
            shown = some(sorted(f"{{{{{one}}}}}" for one in self.found))
            there = f"the rows have {shown}" if self.found else "no row has any {{...}}"
            near = did_you_mean(name, self.found)
            raise UserError(f"variables: '{name}' fills {{{{{name}}}}}, which stands in no row; {there}{near}")

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

from glmtune.data import Broken, DataError, File, Item, Problem, Reading, Want, choose_forms, find_files, open_file, parse_items, recognise
from glmtune.errors import UserError
from glmtune.records import Conversation, Document

Encode = Callable[[Conversation], int]


@dataclass
class Row:
    """One row of a file, or a stretch that is none, with all that is wrong with it."""

    item: Item | Broken
    problems: list[Problem] = field(default_factory=list)
    record: Conversation | Document | None = None  # None where the row cannot be used

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
        checked.problems.append(_of_file(name, error))
        return checked
    items = _all_items(checked)
    reading = Reading(_use(items, columns, format), format=format, columns=columns)
    checked.rows = [Row(item) for item in items]
    try:
        parsed = parse_items(checked.file, items, reading)
    except DataError as error:
        _refuse_all(checked, error)
        parsed = None
    if parsed is not None:
        by_place = {_place(item): record for item, record in parsed.rows}
        checked.notes += parsed.notes + _accept_tool_turns(parsed.problems, name)
        _hand_out(checked, parsed.problems)
        for row in checked.rows:
            row.record = by_place.get(_place(row.item))
        checked.problems += _mixed_forms(name, items, reading)
    for row in checked.rows:
        if isinstance(row.item, Item):
            row.problems += _check_contents(name, row.item, row.record, row.problems)
    return checked


def _of_file(name: str, error: DataError) -> Problem:
    return Problem(name, error.line, error.kind, str(error).replace("\n", "; "), column=error.column)


def _all_items(checked: Checked) -> list[Item | Broken]:
    items: list[Item | Broken] = []
    assert checked.file
    try:
        items += checked.file.items  # keeps what came before an error
    except DataError as error:
        checked.problems.append(_of_file(checked.name, error))
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
    return form is not None and recognise(row, "answers") is None and row.keys() <= {*form.names.values(), "id"}


def _refuse_all(checked: Checked, error: DataError) -> None:
    """No form fits any row: one problem, at the first row; every row is held as refused so that `fix` keeps none of them."""
    problem = _of_file(checked.name, error)
    checked.problems.append(problem)
    for row in checked.rows:
        if isinstance(row.item, Broken):
            row.problems.append(_of_broken(checked.name, row.item))


def _of_broken(name: str, item: Broken) -> Problem:
    return Problem(name, item.line, item.kind, item.message, column=item.column)


def _place(item: Item | Broken) -> tuple[int, int, int]:
    return item.line, item.start, item.end


def _accept_tool_turns(problems: list[Problem], name: str) -> list[str]:
    """Tool calls are good data that cannot be trained on yet: a note, not an error."""
    turns = [problem for problem in problems if problem.kind == "tool-turn"]
    problems[:] = [problem for problem in problems if problem.kind != "tool-turn"]
    return [f"{name}: {len(turns)} rows have tool calls, which cannot be trained on yet"] if turns else []


def _hand_out(checked: Checked, problems: list[Problem]) -> None:
    """Every problem to its row; a line can hold several rows, so they are matched in order."""
    waiting = defaultdict(list)
    for problem in problems:
        waiting[problem.line].append(problem)
    for row in checked.rows:
        if isinstance(row.item, Broken):
            row.problems.append(_of_broken(checked.name, row.item))
    broken = Counter(row.item.line for row in checked.rows if isinstance(row.item, Broken))
    for line, found in waiting.items():
        waiting[line] = [problem for problem in found if not _was_broken(problem, checked)] if broken[line] else found
    for row in checked.rows:
        if isinstance(row.item, Item) and waiting.get(row.item.line):
            row.problems += _own(row, waiting[row.item.line])

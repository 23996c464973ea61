"""Data files counted (`data stats`) and written in another form (`data convert`). What is wrong with them is check.py's part."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import quality
from .check import Checked, Row, examine
from .errors import UserError, did_you_mean
from .files import whole
from .forms import RANKED, Record, Want, parse_row, recognise
from .reading import DataError, Item
from .records import Conversation, Document, Example, Labelled, Preference, Turn

# --- stats ----------------------------------------------------------------------------------------------------------------


def stats(
    paths: Sequence[str | Path],
    *,
    encode: Callable[[Conversation | Document], list[Example]] | None = None,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    registry: str | Path | None = None,
) -> dict[str, Any]:
    """What stands in the files, counted. `encode`: a record -> its sequences; lengths are then in tokens, else in characters.

    {"rows", "unusable", "sources": {file: rows}, "forms", "turns", "languages": {name: rows}, "lengths": {...}, "learned": {...},
    "notes": [...]}
    """
    files = examine(paths, columns, format, registry)
    unread = next((problem for file in files if not file.rows for problem in file.problems), None)
    if unread is not None:
        raise UserError(f"{unread.place}: {unread.message}")
    rows = [row for file in files for row in file.rows if row.counts]
    good = [(row, record) for row in rows for record in row.records if not row.refused]
    found: dict[str, Any] = {
        "rows": len(rows),
        "unusable": sum(row.refused or not row.records for row in rows),
        "sources": {file.name: sum(row.counts for row in file.rows) for file in files},
        "forms": dict(Counter(row.form.name for row, _ in good if row.form).most_common()),
        "turns": {str(number): count for number, count in sorted(Counter(_turns(record) for _, record in good).items())},
        "languages": dict(
            Counter(quality.language("\n".join(quality.texts(record))) or "no letters" for _, record in good).most_common()
        ),
        "notes": [note for file in files for note in file.cut],
    }
    if encode is None:
        return found | {"lengths": quality.lengths([sum(map(len, quality.texts(record))) for _, record in good], "characters")}
    encoded = [[example for sequence in quality.sequences(record) for example in encode(sequence)] for _, record in good]
    sizes = [sum(len(example.ids) for example in examples) for examples in encoded]
    learned, tokens = sum(example.num_learned for examples in encoded for example in examples), sum(sizes)
    share = round(learned / tokens, 4) if tokens else 0.0
    return found | {
        "lengths": quality.lengths(sizes, "tokens"),
        "learned": {"tokens": tokens, "learned": learned, "share": share},
    }


def _turns(record: Record) -> int:
    """The system turn aside; the two answers of a preference row stand in one place."""
    if isinstance(record, Document):
        return 0
    return sum(turn.role != "system" for turn in record.turns) + isinstance(record, Preference)


# --- convert --------------------------------------------------------------------------------------------------------------


def convert(
    paths: Sequence[str | Path],
    to: str,
    out: str | Path,
    *,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    registry: str | Path | None = None,
) -> str:
    """Writes every row of the files to `out`, as JSON Lines in the form `to` (messages, alpaca, sharegpt); returns what to print.

    Every row is read back before anything is written: what the form cannot hold is an error with its place, as is a row that
    cannot be read. Columns that the form does not use are kept under their names.
    """
    out = Path(out)
    if to not in WRITERS:
        raise UserError(f"unknown form '{to}'; forms are {', '.join(WRITERS)}{did_you_mean(to, WRITERS)}")
    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten; choose another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.absolute().parent}")
    lines, files = [], examine(paths, columns, format, registry)
    for file in files:
        for problem in [*file.problems, *(problem for row in file.rows for problem in row.problems)]:
            if problem.level == "error":
                raise UserError(f"{problem.place}: {problem.message}\nnothing was written; glmtune data check lists all")
        lines += [_converted(file, row, record, to) for row in file.rows for record in row.records]
    whole(out, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    notes = [note for file in files for note in file.cut]
    if ranked := sum(RANKED in record.meta for file in files for row in file.rows for record in row.records):
        notes.append(f"{ranked} rows have more than two answers, the best first: the first two are written")
    return "\n".join([f"{len(lines)} rows in {out}, form {to}, read back and compared", *notes])


def _converted(file: Checked, row: Row, record: Record, to: str) -> dict[str, Any]:
    assert isinstance(row.item, Item) and row.form is not None
    try:
        new = WRITERS[to](record) | ({} if record.weight == 1 else {"weight": record.weight})
        others = {key: value for key, value in row.item.value.items() if key not in row.form.names.values()}
        if both := new.keys() & others.keys():
            raise DataError("missing-key", f"the column '{min(both)}' stands in the way of the key of the same name")
        new |= others
        _compare(record, new, file.want)
    except DataError as error:
        raise UserError(f"{record.where}: cannot be written as {to}: {error}\nnothing was written") from None
    return new


def _compare(record: Record, new: dict[str, Any], want: Want) -> None:
    form = recognise(new, want)
    again: Any = parse_row(new, form, want) if form else None
    if again is None or replace(again, where=record.where, meta=record.meta) != record:
        keys = [key for key in new if form and key in form.names.values()]
        raise DataError("unknown-form", f"it would not be read back as the same row (by the keys {', '.join(keys)})")


def _messages(record: Record) -> dict[str, Any]:
    return _as_list(record, "messages", lambda turn: [_message(turn)], lambda schemas: schemas)


def _as_list(
    record: Record, key: str, write: Callable[[Turn], list[dict[str, Any]]], tools: Callable[[Any], Any]
) -> dict[str, Any]:
    if isinstance(record, Document):
        raise DataError("unknown-form", "plain text has no turns")
    first = record.turns[0]
    schemas = first.extra.get("tools")
    turns = [replace(first, extra={name: more for name, more in first.extra.items() if name != "tools"}), *record.turns[1:]]
    new: dict[str, Any] = {key: [message for turn in turns for message in write(turn)]} | (
        {"tools": tools(schemas)} if schemas else {}
    )
    if isinstance(record, Preference):
        for name, answer in (("chosen", record.chosen), ("rejected", record.rejected)):
            written = write(answer)
            new[name] = written[0] if len(written) == 1 else written
    return new | ({"label": record.good} if isinstance(record, Labelled) else {})


def _message(turn: Turn) -> dict[str, Any]:
    """As OpenAI writes it, with `learn` and `weight` where they are not the usual ones."""
    own: dict[str, Any] = {"role": turn.role, "content": turn.text, **turn.extra}
    if "tool_calls" in own:
        own["tool_calls"] = [_call(call) for call in own["tool_calls"]]
    return own | _how(turn)


def _how(turn: Turn) -> dict[str, Any]:
    return ({} if turn.learn is None else {"learn": turn.learn}) | ({} if turn.weight == 1 else {"weight": turn.weight})


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return ({"id": call["id"]} if "id" in call else {}) | {"type": "function", "function": function}


_SPEAKERS = {"user": "human", "assistant": "gpt", "tool": "observation"}


def _sharegpt(record: Record) -> dict[str, Any]:
    return _as_list(record, "conversations", _said, lambda schemas: json.dumps(schemas, ensure_ascii=False))


def _said(turn: Turn) -> list[dict[str, Any]]:
    """A call is a message of its own, its value the call as JSON."""
    calls = turn.extra.get("tool_calls")
    more = {key: value for key, value in turn.extra.items() if key != "tool_calls"}
    said = [{"from": _SPEAKERS.get(turn.role, turn.role), "value": turn.text, **more, **_how(turn)}]
    if not calls:
        return said
    value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    return (said if turn.text or more else []) + [{"from": "function_call", "value": value, **_how(turn)}]


def _alpaca(record: Record) -> dict[str, Any]:
    """instruction, output, and where they are there system and history: plain texts in pairs."""
    if isinstance(record, Document):
        raise DataError("unknown-form", "plain text has no turns")
    turns = [*record.turns, *((record.chosen, record.rejected) if isinstance(record, Preference) else ())]
    for turn in turns:
        if turn.extra or turn.learn is not None or turn.weight != 1 or turn.role not in ("system", "user", "assistant"):
            more = ", ".join(
                [*turn.extra, *(["learn"] if turn.learn is not None else []), *(["weight"] if turn.weight != 1 else [])]
            )
            raise DataError("unknown-form", f"a message by '{turn.role}'{f' with {more}' if more else ''} has no place in it")
    texts = [turn.text for turn in record.turns if turn.role != "system"]
    asked = texts if record.turns[-1].role == "user" else texts[:-1]
    new: dict[str, Any] = {"instruction": asked[-1]}
    if isinstance(record, Preference):
        new |= {"chosen": record.chosen.text, "rejected": record.rejected.text}
    elif len(texts) > len(asked):
        new["output"] = texts[-1]
    new |= {"label": record.good} if isinstance(record, Labelled) else {}
    new |= {"system": record.turns[0].text} if record.turns[0].role == "system" else {}
    pairs = [list(pair) for pair in zip(asked[:-1:2], asked[1:-1:2])]
    return new | ({"history": pairs} if pairs else {})


WRITERS: dict[str, Callable[[Record], dict[str, Any]]] = {"messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt}

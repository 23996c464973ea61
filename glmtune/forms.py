"""Rows -> records: which key of a row is the question, which the answer, and what a conversation must be.

A row form is a set of names: which key is the prompt, which the response ... (NAMES). `columns:` in a run file is the same thing
written by the user. A row that cannot be used raises DataError; the caller knows its file and line.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from . import reading as files
from .errors import UserError, did_you_mean
from .reading import DataError, File, some
from .records import ROLES, Conversation, Document, Turn

Want = Literal["answers", "prompts", "text"]


@dataclass(frozen=True)
class Reading:
    """How rows are to be read: for which use, and in which form if not the one that their keys show."""

    want: Want = "answers"
    join: str = "\n"
    format: str | None = None
    columns: dict[str, str] | None = None


# --- forms: a row -> Conversation | Document -----------------------------------------------------------------------------

COLUMNS = ("prompt", "input", "response", "system", "history", "messages", "text", "weight")
_COMMON = {"system": "system", "history": "history", "weight": "weight"}
NAMES: dict[str, dict[str, str]] = {
    "messages": {"messages": "messages", "system": "system", "weight": "weight"},
    "sharegpt": {"messages": "conversations", "system": "system", "weight": "weight"},
    "alpaca": {"prompt": "instruction", "input": "input", "response": "output", **_COMMON},
    "context": {"prompt": "context", "response": "target", **_COMMON},
    "text": {"text": "text", "weight": "weight"},
}
_PAIRS = (("question", "answer"), ("prompt", "response"), ("prompt", "completion"))
_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
_TOOL_SPEAKERS = ("function_call", "observation", "function", "tool_call", "tool_response")


def _by_names(row: dict[str, Any], join: str = "\n", columns: dict[str, str] | None = None) -> Conversation:
    """A row whose keys are named by `columns`: prompt, input, response, system, history; or messages."""
    names = columns or {}
    if "messages" in names:
        turns = [_message(message, number) for number, message in enumerate(_rows(row, names["messages"]), 1)]
    else:
        turns = _history(row, names.get("history")) + _question_and_answer(row, names, join)
    system = row.get(names["system"]) if "system" in names else None
    if system is not None and _text(row, names["system"]) and not _repeats(system, turns):
        turns.insert(0, Turn("system", system))
    return Conversation(tuple(turns))


def _repeats(system: str, turns: list[Turn]) -> bool:
    if not turns or turns[0].role != "system":
        return False
    if turns[0].text != system:
        raise DataError("role-order", "the row has both a key 'system' and a system turn; keep one")
    return True


def _question_and_answer(row: dict[str, Any], names: dict[str, str], join: str) -> list[Turn]:
    parts = [_text(row, names["prompt"])]
    if "input" in names and row.get(names["input"]) is not None:
        parts.append(_text(row, names["input"]))
    turns = [Turn("user", join.join(part for part in parts if part.strip()))]
    if "response" in names and row.get(names["response"]) is not None:
        turns.append(Turn("assistant", _text(row, names["response"])))
    return turns


def _history(row: dict[str, Any], key: str | None) -> list[Turn]:
    if key is None or row.get(key) in (None, "", []):
        return []
    turns = []
    for number, pair in enumerate(_rows(row, key), 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                "wrong-type", f"'{key}' must be a list of [question, answer] pairs of strings; entry {number} is {_show(pair)}"
            )
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _message(message: Any, number: int) -> Turn:
    """One message: role and content (OpenAI, ChatGLM3) or from and value (ShareGPT)."""
    if not isinstance(message, dict):
        raise DataError("wrong-type", f"message {number} must be an object with role and content, not {_show(message)}")
    role_key, text_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    needed = (role_key,) if message.get("tool_calls") else (role_key, text_key)  # a call may stand without any text
    for key in needed:
        if key not in message:
            raise DataError(
                "missing-key", f"message {number} needs the key '{key}'; it has {list(message)}{_mistyped(key, message)}"
            )
    role = _role(message[role_key], number)
    text = "" if message.get("tool_calls") and message.get(text_key) is None else _text(message, text_key, f"message {number}: ")
    learn = message.get("learn")
    if learn is not None and not isinstance(learn, bool):
        raise DataError("wrong-type", f"message {number}: 'learn' must be true or false, not {_show(learn)}")
    weight = _number(message, "weight", f"message {number}: ")
    extra = {key: value for key, value in message.items() if key not in (role_key, text_key, "learn", "weight")}
    return Turn(role, text, learn, weight, extra)


def _role(given: Any, number: int) -> str:
    if given in _TOOL_SPEAKERS:
        raise DataError("tool-turn", f"message {number} is a '{given}' turn: tool calls cannot be trained on yet")
    if not isinstance(given, str) or given not in _SPEAKERS:
        hint = did_you_mean(given, _SPEAKERS) if isinstance(given, str) else ""
        known = f"roles are {', '.join(ROLES)} (or human, gpt)"
        raise DataError("unknown-role", f"message {number} has the unknown role {given!r}; {known}{hint}")
    return _SPEAKERS[given]


def _text(row: dict[str, Any], key: str, where: str = "") -> str:
    value = row[key]
    if not isinstance(value, str):
        nested = "; use a JSON string, or pick other keys with columns:" if isinstance(value, list | dict) else ""
        raise DataError("wrong-type", f"{where}'{key}' must be a string, not {_show(value)}{nested}")
    if _SURROGATE.search(value):
        raise DataError("encoding-damage", f"{where}'{key}' holds half of a surrogate pair, which is not a character")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")


def _rows(row: dict[str, Any], key: str) -> list[Any]:
    """A list; in CSV it is written as a JSON string."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = row[key]
    if not isinstance(value, list):
        raise DataError("wrong-type", f"'{key}' must be a list, not {_show(value)}")
    return value


def _number(row: dict[str, Any], key: str, where: str = "") -> float:
    value = row.get(key)
    if value is None or value == "":
        return 1.0
    try:
        number = float(value) if not isinstance(value, bool | list | dict) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise DataError("wrong-type", f"{where}'{key}' must be a number >= 0 (it scales the loss), not {_show(value)}")
    return number


def _show(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False)
    return f"{kinds[type(value)]} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def _document(row: dict[str, Any], join: str = "\n", columns: dict[str, str] | None = None) -> Document:
    return Document(_text(row, (columns or NAMES["text"])["text"]))


def _form(name: str) -> Callable[..., Conversation]:
    return partial(_by_names, columns=NAMES[name])


# A form from outside is one more line: a function (row, join) -> Conversation, asked for by `format: its-name`.
FORMATS: dict[str, Callable[..., Conversation | Document]] = {
    "alpaca": _form("alpaca"),
    "context": _form("context"),
    "messages": _form("messages"),
    "sharegpt": _form("sharegpt"),
    "columns": _by_names,
    "text": _document,
}


@dataclass(frozen=True)
class Form:
    """How a row is read: the entry of FORMATS and the names of its keys (empty for a form from outside)."""

    name: str
    names: dict[str, str]

    def needs(self, want: Want) -> list[str]:
        wanted = ("messages", "prompt", "text") + (("response",) if want == "answers" else ())
        return [self.names[name] for name in wanted if name in self.names]

    def read(self, row: dict[str, Any], join: str) -> Conversation | Document:
        if self.name == "columns":
            read = _document if "text" in self.names else _by_names
            return read(row, join, self.names)
        return FORMATS[self.name](row, join)

    def describe(self, keys: Iterable[str]) -> str:
        present = set(keys)
        shown = [f"{name}: {key}" if self.name == "columns" else key for name, key in self.names.items() if key in present]
        return f"{self.name} ({', '.join(shown)})" if self.names else self.name


_KNOWN = [Form(name, NAMES[name]) for name in ("messages", "sharegpt", "alpaca")]
_KNOWN += [Form("columns", {"prompt": prompt, "response": response, **_COMMON}) for prompt, response in _PAIRS]
_KNOWN += [Form("context", NAMES["context"])]
_TEXT = Form("text", NAMES["text"])


def recognise(row: dict[str, Any], want: Want) -> Form | None:
    """The form whose keys the row has; for prompts the answer may be missing."""
    if want == "text":
        return _TEXT if "text" in row else None
    for need in ("answers", "prompts") if want == "prompts" else ("answers",):
        for form in _KNOWN:
            if all(key in row for key in form.needs(need)):
                return form
    return None


def open_file(path: Path, name: str) -> File:
    """`reading.open_file`, which learns from here what a row looks like."""
    return files.open_file(path, name, lambda value: recognise(value, "prompts") is not None)


def form_of_columns(columns: dict[str, str], format: str | None, want: Want) -> Form:
    """The form that `columns:` describes. Raises UserError for names that it does not know or that are missing."""
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"columns: unknown name '{name}'; names are {', '.join(COLUMNS)}{did_you_mean(name, COLUMNS)}")
    kind = "text" if "text" in columns else "messages" if "messages" in columns else "prompt"
    fitting = {"text": ("text",), "messages": ("messages", "sharegpt"), "prompt": ("alpaca", "context")}[kind]
    if format not in (None, "columns", *fitting):
        raise UserError(f"format '{format}' and columns {columns} do not go together; leave one of them out")
    needed = (
        {"text": ["text"], "prompts": ["prompt"], "answers": ["prompt", "response"]}[want] if kind != "messages" else ["messages"]
    )
    missing = [name for name in needed if name not in columns]
    if missing or (want == "text") != (kind == "text"):
        wanted = "{text: KEY}" if want == "text" else "{prompt: KEY, response: KEY} or {messages: KEY}"
        raise UserError(f"columns {columns} do not say where the {missing[0] if missing else want} stands; wanted {wanted}")
    return Form("columns", dict(columns))


def form_of_format(format: str, want: Want) -> Form:
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'; formats are {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    if format == "columns":
        raise UserError("format 'columns' needs columns: {prompt: KEY, response: KEY}")
    if (format == "text") != (want == "text"):
        fit = "plain text has no question and no answer" if format == "text" else f"'{format}' rows are not plain text"
        raise UserError(f"format '{format}' does not fit: {fit}{_text_hint(want)}")
    return Form(format, NAMES.get(format, {}))


def _text_hint(want: Want) -> str:
    if want == "text":
        return "; name the key that holds the text: columns: {text: KEY}"
    return "; `stage: {kind: pretrain}` learns plain text; or name the keys: columns: {prompt: KEY, response: KEY}"


def choose_forms(rows: list[Any], reading: Reading) -> tuple[Form, Callable[[Any], Form]]:
    """The main form of a file's rows, and a function that gives the form of each row.

    Rows may differ in form where each is recognisable; a row that is not is read, and refused, as the main form.
    """
    want = reading.want
    if reading.columns is not None or reading.format is not None:
        form = (
            form_of_columns(reading.columns, reading.format, want)
            if reading.columns is not None
            else form_of_format(str(reading.format), want)
        )
        return form, lambda row: form
    known: dict[tuple[str, ...], Form | None] = {}

    def find(row: dict[str, Any]) -> Form | None:
        keys = tuple(row)
        if keys not in known:
            known[keys] = recognise(row, want)
        return known[keys]

    objects = [row for row in rows if isinstance(row, dict)]
    forms = Counter(found.name + str(found.names) for row in objects if (found := find(row)))
    if forms:
        best = forms.most_common(1)[0][0]
        main = next(form for form in (*_KNOWN, _TEXT) if form.name + str(form.names) == best)
    else:
        main = _nearest_form(objects, want)

    def form_of(row: Any) -> Form:
        found = find(row) if isinstance(row, dict) else None
        return found or main

    return main, form_of


def _nearest_form(objects: list[dict[str, Any]], want: Want) -> Form:
    """No row is whole: a form whose question is there, so that the error names the key that is missing; else an error."""
    if not objects:
        return Form("alpaca", NAMES["alpaca"])  # every row is refused as not-an-object
    keys = list(objects[0])
    if want == "text":
        raise DataError("unknown-form", f"no key 'text' in the keys {some(keys)}{_text_hint(want)}")
    near = recognise(objects[0], "prompts")
    if near:
        return near
    if "text" in keys:
        raise DataError("unknown-form", f"plain text (keys {some(keys)}) has no question and no answer{_text_hint(want)}")
    known = ", ".join(form.describe(form.names.values()) for form in (*_KNOWN, _TEXT) if form.name != "columns")
    raise DataError(
        "unknown-form", f"no known form in the keys {some(keys)}\nknown: {known}\nor name the keys: {_columns_to_paste(keys)}"
    )


def _columns_to_paste(keys: list[str]) -> str:
    names = (keys + ["QUESTION_KEY", "ANSWER_KEY"][len(keys) :])[:2] if len(keys) < 2 else keys
    prompt = next((key for key in names if re.search("prompt|quest|query|instr|input|user|问|source", key, re.I)), names[0])
    rest = [key for key in names if key != prompt]
    response = next((key for key in rest if re.search("resp|answ|output|compl|target|reply|assist|答", key, re.I)), rest[0])
    return f"columns: {{prompt: {prompt}, response: {response}}}"


# --- rows: what a conversation must be ------------------------------------------------------------------------------------


def parse_row(row: Any, form: Form, want: Want, join: str = "\n") -> Conversation | Document:
    """One row as a checked record, its own system turn first if it has one. Raises DataError (the message has no place in it)."""
    if not isinstance(row, dict):
        raise DataError("not-an-object", f"a row must be a JSON object, this is {_show(row)}")
    if (
        want == "answers"
        and {"chosen", "rejected"} <= row.keys()
        and ("response" not in form.names or form.names["response"] not in row)
    ):
        raise DataError(
            "preference-row", "a preference row (chosen, rejected) has no single answer to learn; it needs a preference stage"
        )
    _require_keys(row, form, want)
    record = form.read(row, join)
    weight = _number(row, form.names["weight"]) if "weight" in form.names else record.weight
    if isinstance(record, Document):
        if not record.text.strip():
            raise DataError("empty-text", f"the text '{form.names['text']}' is empty")
        return replace(record, weight=weight)
    _check_roles(record.turns, want)
    _check_texts(record.turns, want)
    return replace(record, weight=weight)


def _require_keys(row: dict[str, Any], form: Form, want: Want) -> None:
    for key in form.needs(want):
        if key not in row:
            article = "an" if form.name[0] in "aeiou" else "a"
            raise DataError(
                "missing-key" if set(form.names.values()) & row.keys() else "unknown-form",
                f"{article} '{form.name}' row needs the key '{key}'; this row has {some(list(row))}{_mistyped(key, row)}",
            )
        if row[key] is None:
            raise DataError(
                "wrong-type", f"'{key}' must be a {'list' if form.names.get('messages') == key else 'string'}, not null"
            )


def _mistyped(wanted: str, row: dict[str, Any]) -> str:
    near = next((key for key in row if did_you_mean(key, [wanted])), None)
    return f"; did you mean '{wanted}' by '{near}'?" if near else ""


_MAY_FOLLOW = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def _check_roles(turns: tuple[Turn, ...], want: Want) -> None:
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        what = "no turns" if not roles else "only system turns" if set(roles) == {"system"} else "no user turn"
        raise DataError("no-user-turn", f"the row has {what}: nothing is asked")
    before = ""
    for number, role in enumerate(roles, 1):
        if role == "system":
            if number > 1:
                raise DataError("role-order", f"turn {number} is a system turn; it may only stand first")
            continue
        if role not in _MAY_FOLLOW[before]:
            raise DataError("role-order", f"turn {number}: {_order_said(before, role)}")
        before = role
    if want == "answers" and before != "assistant":
        raise DataError("role-order", f"the last turn is by '{before}'; a row to learn from must end with the assistant's answer")


def _order_said(before: str, role: str) -> str:
    if not before:
        return f"the first turn is by '{role}', it must be by 'user' (after the system turn, if any)"
    if before == role:
        return f"roles must alternate, here are two {role} turns in a row"
    return f"'{role}' may not follow '{before}'; roles must alternate"


def _check_texts(turns: tuple[Turn, ...], want: Want) -> None:
    many = sum(turn.role == "user" for turn in turns) > 1
    for number, turn in enumerate(turns, 1):
        place = f" (turn {number})" if many else ""
        if turn.role == "user" and not turn.text.strip():
            raise DataError("empty-question", f"the question{place} is empty")
        unanswered = want == "prompts" and number == len(turns)
        if turn.role == "assistant" and not turn.text.strip() and not turn.extra.get("tool_calls") and not unanswered:
            raise DataError("empty-answer", f"the answer{place} is empty")

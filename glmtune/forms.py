"""Rows -> records: which key of a row is the question, which the answer, and what a conversation must be.

A row form is a set of names (NAMES): which key is the prompt, which the response ... `columns:` in a run file is the same thing written
by the user. What a record is made of them depends on the use (Want): one table for all stages. A row that cannot be used raises
DataError; the caller knows its file and line.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeGuard

from . import reading as files
from . import tools
from .errors import UserError, did_you_mean
from .reading import Broken, DataError, File, Item, some
from .records import ROLES, Conversation, Document, Labelled, Preference, Turn

Want = Literal["answers", "prompts", "text", "preferences", "labels"]
Record = Conversation | Document | Preference | Labelled


@dataclass(frozen=True)
class Reading:
    """How rows are to be read: for which use, and in which form if not the one that their keys show."""

    want: Want = "answers"
    join: str = "\n"
    format: str | None = None
    columns: dict[str, str] | None = None
    header: bool = False  # the keys are the first line of a CSV file, which may as well be a row
    chosen: "tuple[Form, Callable[[Any], Form]] | None" = None  # by `choose_forms`, from more rows than a reader has at once


# --- the table of forms -------------------------------------------------------------------------------------------------

COLUMNS = (
    "prompt", "input", "response", "system", "history", "messages", "tools", "chosen", "rejected", "label", "text", "weight",
)  # fmt: skip
_COMMON = {"system": "system", "tools": "tools", "weight": "weight"}
_BEFORE = {"history": "history", **_COMMON}
_ASKED = {"input": "input", "input 2": "context", **_BEFORE}
_TWO = {"answer 0": "response_0", "answer 1": "response_1"}  # "better" says which, 0 or 1 (PKU-SafeRLHF)
NAMES: dict[str, dict[str, str]] = {  # in the order in which they are tried
    "messages": {"messages": "messages", **_COMMON},
    "sharegpt": {"messages": "conversations", **_COMMON},
    "conversation": {"messages": "conversation", **_COMMON},
    "dialogue": {"messages": "dialogue", **_COMMON},
    "belle": {"rounds": "instruction", "response": "output", **_COMMON},  # "Human: ...\nAssistant: ..." in one text
    "alpaca": {"prompt": "instruction", "input": "input", "response": "output", **_ASKED},
    "dolly": {"prompt": "instruction", "input 2": "context", "response": "response", **_ASKED},
    "preference": {"prompt": "prompt", **_ASKED},  # the prompt may also stand inside both answers
    "preference_messages": {"chosen": "chosen_messages", "rejected": "rejected_messages", **_COMMON},  # LLaMA-Factory's v1
    "saferlhf": {"prompt": "prompt", **_TWO, "better": "better_response_id", **_COMMON},
    "saferlhf_safe": {"prompt": "prompt", **_TWO, "better": "safer_response_id", **_COMMON},
    "question-answer": {"prompt": "question", "response": "answer", **_ASKED},
    "query-response": {"prompt": "query", "response": "response", **_ASKED},
    "prompt-response": {"prompt": "prompt", "response": "response", **_ASKED},
    "prompt-completion": {"prompt": "prompt", "response": "completion", **_ASKED},
    "hc3": {"prompt": "question", "response": "human_answers", "response 2": "chatgpt_answers", **_COMMON},
    "context": {"prompt": "context", "input": "input", "response": "target", **_BEFORE},
    "firefly": {"prompt": "input", "response": "target", **_COMMON},
    "adgen": {"prompt": "content", "response": "summary", **_COMMON},
    "text": {"text": "text", "weight": "weight"},
}
_PAIRS = [name for name in NAMES if "-" in name]  # said as the columns that they are
_FREE = ("firefly", "adgen")  # keys that may mean anything unless both are there
_PREFERENCES = ("preference", "preference_messages", "saferlhf", "saferlhf_safe")  # these have no single answer
_OWN_KEYS: dict[Want, dict[str, str]] = {"preferences": {"chosen": "chosen", "rejected": "rejected"}, "labels": {"label": "label"}}
_LABEL_KEYS = ("label", "kto_tag")
_NEEDS: dict[Want, tuple[str, ...]] = {
    "answers": ("messages", "rounds", "prompt", "text", "response", "response 2"),
    "prompts": ("messages", "rounds", "prompt", "text"),
    "text": ("text",),
    "preferences": ("messages", "rounds", "prompt"),
    "labels": ("messages", "rounds", "prompt", "response", "response 2", "label"),
}
_STAGES = {
    "answers": "`stage: {kind: sft}` learns single answers",
    "text": "`stage: {kind: pretrain}` learns plain text",
    "preferences": "it needs a preference stage (dpo, reward)",
}


@dataclass(frozen=True)
class Form:
    """How a row is read: the entry of FORMATS and the names of its keys (empty for a form from outside)."""

    name: str
    names: dict[str, str]

    def needs(self, want: Want) -> list[str]:
        optional = ("prompt",) if self.name == "preference" else ()
        return [self.names[name] for name in _NEEDS[want] if name in self.names and name not in optional]

    def read(self, row: dict[str, Any], join: str, want: Want = "answers") -> "Record | list[Conversation] | list[Labelled]":
        if not self.names:
            return FORMATS[self.name](row, join)
        return _by_names(row, join, self.names, want)

    def describe(self, keys: Iterable[str]) -> str:
        present = set(keys)
        named = [(name.split()[0], key) for name, key in self.names.items() if key in present]
        shown = [f"{name}: {key}" if self.name == "columns" else key for name, key in named]
        return f"{self.name} ({', '.join(shown)})" if self.names else self.name


def _form(name: str, want: Want, label: str = "label") -> Form:
    own = {} if {"better", "chosen"} & NAMES[name].keys() else _OWN_KEYS.get(want, {})
    names = NAMES[name] | own | ({"label": label} if want == "labels" else {})
    return Form("columns" if name in _PAIRS else name, names)


_FORMS = {(name, want): _form(name, want) for name in NAMES for want in _NEEDS}
_FORMS |= {(name, "kto_tag"): _form(name, "labels", "kto_tag") for name in NAMES}  # LLaMA-Factory's name for the label


# --- recognition ----------------------------------------------------------------------------------------------------------


def recognise(row: dict[str, Any], want: Want) -> Form | None:
    """The form whose keys the row has; for prompts the answer may be missing."""
    if want == "text":
        return _FORMS["text", want] if "text" in row else None
    for need in ("answers", "prompts") if want == "prompts" else (want,):
        for name in NAMES:
            key = "kto_tag" if want == "labels" and "label" not in row and "kto_tag" in row else want
            form = _FORMS[name, key]
            if name != "text" and all(one in row for one in form.needs(need)) and _fits(name, form, row, need):
                return form
    return None


def _fits(name: str, form: Form, row: dict[str, Any], need: Want) -> bool:
    if "better" in form.names:
        return need == "preferences" and {*_TWO.values(), form.names["better"]} <= row.keys()
    if "chosen" in NAMES[name]:
        return need == "preferences" and {NAMES[name]["chosen"], NAMES[name]["rejected"]} <= row.keys()
    pair = "chosen" in row and "rejected" in row
    ranked = form.names.get("response") == "output" and is_ranking(row.get("output"))
    if need == "preferences" and name != "preference" and not pair and not ranked:
        return False
    if name == "belle":
        return _has_rounds(row["instruction"])
    if name in _FREE:
        return form.names["response"] in row
    if name == "preference":
        return (
            need == "preferences" and pair and ("prompt" in row or not isinstance(row["chosen"], str) or _has_rounds(row["chosen"]))
        )
    return True


def shape(row: dict[str, Any]) -> tuple[Any, ...]:
    """All that recognition looks at: the keys and these traits. Rows of one shape have one form."""
    return (
        *row,
        _has_rounds(row.get("instruction")),
        _has_rounds(row.get("chosen")),
        isinstance(row.get("chosen"), str),
        is_ranking(row.get("output")),
    )


def is_ranking(value: Any) -> TypeGuard[list[Any]]:
    """Whether an answer is a list of answers, the best first, and not a list of messages. Their number does not count here: a row with
    one answer is a preference row that lacks the other."""
    return isinstance(value, list) and not any(isinstance(one, dict) for one in value)


def open_file(path: Path, name: str, columns: dict[str, str] | None = None) -> File:
    """`reading.open_file`, which learns from here what a row looks like."""

    def is_row(value: dict[str, Any]) -> bool:
        asked = [key for name, key in (columns or {}).items() if name in ("messages", "prompt", "text")]
        return any(key in value for key in asked) or any(recognise(value, want) for want in ("prompts", "preferences", "text"))

    file = files.open_file(path, name, is_row)
    return replace(file, items=map(_shallow, file.items))


def _shallow(item: Item | Broken) -> Item | Broken:
    if isinstance(item, Broken) or not tools.is_deep(item.value):
        return item
    message = (
        f"nested too deep: more than {tools.DEEPEST} lists and objects in each other; leave that value out, or write it as text"
    )
    return Broken(item.line, None, message, item.start, item.end)


def form_of_columns(columns: dict[str, str], format: str | None, want: Want) -> Form:
    """The form that `columns:` describes. Raises UserError for names that it does not know or that are missing."""
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"columns: unknown name '{name}'; names are {', '.join(COLUMNS)}{did_you_mean(name, COLUMNS)}")
    kind = "text" if "text" in columns else "messages" if "messages" in columns else "prompt"
    fitting = [name for name in NAMES if kind in NAMES[name]]
    if format not in (None, "columns", *fitting):
        raise UserError(f"format '{format}' and columns {columns} do not go together; leave one of them out")
    answer = "messages" if kind == "messages" else "response"
    needed = {
        "text": ["text"],
        "prompts": [kind],
        "answers": [kind, answer],
        "labels": [kind, answer, "label"],
        "preferences": ["prompt"] if "response" in columns else ["chosen", "rejected"],
    }[want]
    missing = [name for name in needed if name not in columns]
    if missing or (want == "text") != (kind == "text"):
        raise UserError(f"columns {columns} do not say where the {missing[0] if missing else want} stands; wanted {_wanted(want)}")
    return Form("columns", dict(columns))


def _wanted(want: Want) -> str:
    if want == "preferences":
        return "{prompt: KEY, chosen: KEY, rejected: KEY} or {messages: KEY, chosen: KEY, rejected: KEY}"
    more = ", label: KEY" if want == "labels" else ""
    return "{text: KEY}" if want == "text" else f"{{prompt: KEY, response: KEY{more}}} or {{messages: KEY{more}}}"


def form_of_format(format: str, want: Want) -> Form:
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'; formats are {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    if format == "columns":
        raise UserError("format 'columns' needs columns: {prompt: KEY, response: KEY}")
    if (format == "text") != (want == "text"):
        fit = "plain text has no question and no answer" if format == "text" else f"'{format}' rows are not plain text"
        raise UserError(f"format '{format}' does not fit: {fit}{_text_hint(want)}")
    if format in _PREFERENCES and want in ("answers", "labels"):
        raise UserError(f"format '{format}' does not fit: it has no single answer; {_STAGES['preferences']}")
    return _FORMS[format, want] if format in NAMES else Form(format, {})


def _text_hint(want: Want) -> str:
    if want == "text":
        return "; name the key that holds the text: columns: {text: KEY}"
    return f"; {_STAGES['text']}; or name the keys: columns: {{prompt: KEY, response: KEY}}"


def choose_forms(rows: list[Any], reading: Reading, times: Sequence[int] = ()) -> tuple[Form, Callable[[Any], Form]]:
    """The main form of a file's rows, and a function that gives the form of each row.

    times: how many rows each of `rows` stands for, if not one. Rows may differ in form where each is recognisable; a row that is not is read, and refused, as the main form.
    """
    want = reading.want
    if reading.chosen is not None:
        return reading.chosen
    if reading.columns is not None or reading.format is not None:
        form = (
            form_of_columns(reading.columns, reading.format, want)
            if reading.columns is not None
            else form_of_format(str(reading.format), want)
        )
        return form, lambda row: form
    known: dict[tuple[Any, ...], Form | None] = {}

    def find(row: Any) -> Form | None:
        if not isinstance(row, dict):
            return None
        own = shape(row)
        if own not in known:
            known[own] = recognise(row, want)
        return known[own]

    counts = Counter[int]()
    for row, count in zip(rows, times or repeat(1)):
        counts[id(find(row))] += count
    found = [
        form for form in _FORMS.values() if id(form) in counts
    ]  # in the order of the table, so that the rows' own does not count
    main = (
        max(found, key=lambda one: counts[id(one)]) if found else _nearest_form(zip(rows, times or repeat(1)), want, reading.header)
    )

    def form_of(row: Any) -> Form:
        return find(row) or main

    return main, form_of


def _nearest_form(rows: Iterable[tuple[Any, int]], want: Want, header: bool) -> Form:
    """No row is whole: a form whose question is there, so that the error names the key that is missing; else an error. Which one
    follows from how many rows are near to it, never from which row stands first.

    rows: each with the number of rows that it stands for.
    """
    near, keys = Counter[str](), Counter[tuple[str, ...]]()
    examples: dict[tuple[str, ...], dict[str, Any]] = {}
    for row, count in rows:
        if isinstance(row, dict):
            near[_near(row)] += count
            keys[tuple(row)] += count
            examples.setdefault(tuple(row), row)
    if not keys:
        return _FORMS["alpaca", want]  # every row is refused as not-an-object
    row = examples[max(sorted(keys), key=lambda one: keys[one])]
    if want == "text":
        if header:
            raise DataError(
                "unknown-form", f"{_header_said(row)}; if it is one, name the key that holds the text: columns: {{text: KEY}}"
            )
        raise DataError("unknown-form", f"no key 'text' in the keys {some(list(row))}{_text_hint(want)}")
    del near[""]
    if near:
        return _FORMS[max((name for name in ("alpaca", *NAMES) if name in near), key=lambda name: near[name]), want]
    if "text" in row:
        raise DataError("unknown-form", f"plain text (keys {some(list(row))}) has no question and no answer{_text_hint(want)}")
    columns = _columns_to_paste(row, want)
    if header:
        raise DataError("unknown-form", f"{_header_said(row)}; if it is one, name its columns: {columns}")
    shown = [_FORMS[name, want] for name in NAMES if name not in _PAIRS and (name not in _PREFERENCES or want == "preferences")]
    known = ", ".join(form.describe(form.names.values()) for form in shown)
    raise DataError("unknown-form", f"no known form in the keys {some(list(row))}\nknown: {known}\nor name the keys: {columns}")


def _near(row: dict[str, Any]) -> str:
    """The form that a row comes nearest to, "" where it has not even a question."""
    if recognise(row, "preferences"):
        return "alpaca"  # refused with the stage that it needs
    form = recognise(row, "answers") or recognise(row, "prompts")
    return next((name for name in NAMES if form and NAMES[name] == form.names), "")


def _header_said(names: Iterable[str]) -> str:
    """Of a CSV file whose first line has no known name in it."""
    return (
        f"the first line is read as the header, and none of {some(list(names))} is the name of a known column; is the header missing? "
        "Then write one above it, such as: instruction,output"
    )


_ASKS = re.compile("prompt|quest|query|instr|input|user|问", re.IGNORECASE)
_ANSWERS = re.compile("resp|answ|output|compl|target|reply|assist|答", re.IGNORECASE)
_REJECTED = re.compile("reject|dispref|worse|worst|los(?:e|ing|t)|negativ|(?:^|_)bad|拒", re.IGNORECASE)
_CHOSEN = re.compile("chos|prefer|better|best|win|accept|positiv|(?:^|_)good", re.IGNORECASE)
_ABOUT = re.compile(
    "(?:^|[_ -])(?:id|idx|index|uuid|url|source|lang|language|type|category|date|time|model|score|rating)s?$", re.IGNORECASE
)


def _columns_to_paste(row: dict[str, Any], want: Want) -> str:
    """Columns as far as their names tell what they are. Where several could be meant none is named: whoever pastes it must not learn
    a rejected answer, or lose a text."""
    texts = [
        key for key, value in row.items()
        if (isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], dict))) and not _ABOUT.search(key)
    ]  # fmt: skip
    rejected = [key for key in row if _REJECTED.search(key)]
    chosen = [key for key in row if _CHOSEN.search(key) and key not in rejected]

    def only(keys: list[str], otherwise: str) -> str:
        key = keys[0] if len(keys) == 1 else otherwise
        return key if re.fullmatch(r"[^\W\d][\w-]*", key) else json.dumps(key, ensure_ascii=False)

    asks = [key for key in texts if _ASKS.search(key) and not _ANSWERS.search(key) and key not in (*chosen, *rejected)]
    if rejected or want == "preferences":
        prompt = f"prompt: {only(asks, 'QUESTION_KEY')}, " if asks or not _are_conversations(row, [*chosen, *rejected]) else ""
        return f"columns: {{{prompt}chosen: {only(chosen, 'BETTER_KEY')}, rejected: {only(rejected, 'WORSE_KEY')}}}"
    answers = [key for key in texts if _ANSWERS.search(key) and key not in asks]
    return f"columns: {{prompt: {only(asks, 'QUESTION_KEY')}, response: {only(answers, 'ANSWER_KEY')}}}"


def _are_conversations(row: dict[str, Any], keys: list[str]) -> bool:
    return bool(keys) and all(isinstance(row[key], list) for key in keys)


# --- a row -> Conversation | Preference | Labelled | Document -----------------------------------------------------------


def _by_names(row: dict[str, Any], join: str = "\n", columns: dict[str, str] | None = None, want: Want = "answers") -> Any:
    """The record, or a list of several, of a row whose keys are named by `columns`."""
    names = columns or {}
    if "text" in names:
        return Document(_text(row, names["text"]))
    if want == "preferences":
        return _preference(row, names, join)
    asked = _asked(row, names, join)
    made: list[Any] = [
        Conversation(_whole(asked + answer, row, names), meta={"answer": label} if label else {})
        for label, answer in _answers(row, names, want)
    ]
    if want == "labels":
        made = [Labelled(one.turns, _label(row, names["label"]), meta=one.meta) for one in made]
    return made[0] if len(made) == 1 else made


def _asked(row: dict[str, Any], names: dict[str, str], join: str) -> list[Turn]:
    """What stands before the answer; all of a conversation that is a list of messages."""
    if "messages" in names:
        return _messages(_rows(row, names["messages"]))
    if "rounds" in names:
        for one in ("input", "context"):
            if str(row.get(one) or "").strip():
                beside = f"'{one}' is filled beside rounds of Human: and Assistant:"
                raise DataError("wrong-type", f"{beside}; put it into the last question")
        return _rounds(_text(row, names["rounds"]))
    turns, key = _history(row, names.get("history")), names.get("prompt")
    more = [names[name] for name in ("input", "input 2") if name in names and row.get(names[name]) is not None]
    if (
        key in row and isinstance(row[key], list) and not all(isinstance(one, str) for one in row[key])
    ):  # TRL's conversational prompt
        for one in more:
            if _text(row, one).strip():
                raise DataError("wrong-type", f"'{one}' is filled beside messages in '{key}'; put it into the last question")
        return turns + _messages(row[key])
    asked = [key, *more] if key in row else more
    parts = [_text(row, one) for one in asked]
    return [*turns, Turn("user", join.join(part for part in parts if part.strip()))] if asked else turns


def _answers(row: dict[str, Any], names: dict[str, str], want: Want) -> list[tuple[str, list[Turn]]]:
    """(which, the answer's turns) of every answer; [("", [])] where there is none. A list of texts is one answer each."""
    made: list[tuple[str, list[Turn]]] = []
    keys = [names[name] for name in ("response", "response 2") if name in names and row.get(names[name]) is not None]
    for key in keys:
        value = row[key]
        several = key == "output" or key.endswith(("answers", "responses"))  # elsewhere a list is a mistake
        if not (several and isinstance(value, list) and all(isinstance(one, str) for one in value)):
            made.append(("", _said(row, key, rounds=False)))
        elif want == "prompts":
            continue
        elif key != "output":
            made += [(f"{key}[{i}]", [Turn("assistant", one)]) for i, one in enumerate(value)]
        elif len(value) >= 2:
            raise DataError("preference-row", f"'{key}' is a preference row's [chosen, rejected, ...]; {_STAGES['preferences']}")
        else:
            made.append(("", [Turn("assistant", _text(row, key))]))
    if not made and keys and want != "prompts":
        raise DataError("empty-answer", f"there is no answer in {' and '.join(map(repr, keys))}")
    return made or [("", [])]


def _preference(row: dict[str, Any], names: dict[str, str], join: str) -> Preference:
    asked = _asked(row, names, join)
    keys = names.get("chosen", "chosen"), names.get("rejected", "rejected")
    response = names.get("response", "")
    meta = {}
    ranked = row.get(response)
    if is_ranking(ranked) and not row.keys() & set(keys):
        keys, row = _first_two(row, response)
        meta = {RANKED: len(ranked)} if len(ranked) > 2 else {}
    if "better" in names:
        keys = _better_first(row, names)
    for key in keys:
        if key not in row:
            raise DataError(
                "missing-key",
                f"a preference row needs the key '{key}'; this row has {some(list(row))}{_mistyped(key, row)}; {_STAGES['answers']}",
            )
    chosen, rejected = (_said(row, key) for key in keys)
    if chosen and chosen[0].role != "assistant":  # whole conversations
        _require_said(asked, chosen, keys)
        asked = []
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)) - 1)
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    for key, said in zip(keys, (chosen, rejected), strict=True):
        if shared < 0 or len(said) != shared + 1 or said[-1].role != "assistant":
            raise DataError(
                "preference-row", f"'{key}' must end with one answer of its own after the question; {_apart(said, shared)}"
            )
        if not said[-1].text.strip() and not said[-1].extra.get("tool_calls"):
            raise DataError("empty-answer", f"'{key}' is empty")
    return Preference(_whole(asked + chosen[:shared], row, names), chosen[-1], rejected[-1], meta=meta)


RANKED = "ranked"  # in `meta`: of how many answers, the best first, a pair is the first two


def _first_two(row: dict[str, Any], key: str) -> tuple[tuple[str, str], dict[str, Any]]:
    """The better and the worse of two or more answers in a list, the best first: the first two, as ChatGLM-Efficient-Tuning and
    LLaMA-Factory took them."""
    ranked = row[key]
    if len(ranked) < 2:
        has = "one answer" if ranked else "no answers"
        raise DataError("preference-row", f"'{key}' has {has}; a preference row has two or more, the best first")
    named = {f"{key}[{i}]": one for i, one in enumerate(ranked)}
    for name in named:
        _text(named, name)
    first, second = list(named)[:2]
    return (first, second), {**row, **named}


def _require_said(asked: list[Turn], conversation: list[Turn], keys: tuple[str, str]) -> None:
    """Nothing that the row asks elsewhere may be lost: its lines stand in the conversation."""
    said = {line.strip() for turn in conversation if turn.role != "assistant" for line in turn.text.splitlines()}
    for turn in asked:
        lines = _marks_of(turn.text).sub("\n", turn.text).splitlines() if turn.role != "assistant" else []
        lost = next((line.strip() for line in lines if line.strip() and line.strip() not in said), None)
        if lost is not None:
            raise DataError(
                "preference-row",
                f"the row asks {_show(lost)} beside the conversations in '{keys[0]}' and '{keys[1]}', which do not have it; "
                "keep one of the two, or pick the keys to read with columns:",
            )


def _better_first(row: dict[str, Any], names: dict[str, str]) -> tuple[str, str]:
    """The keys of two answers of which another key says which is better."""
    key = names["better"]
    if key not in row:
        raise DataError(
            "missing-key", f"a preference row needs the key '{key}'; this row has {some(list(row))}{_mistyped(key, row)}"
        )
    if isinstance(row[key], bool) or str(row[key]) not in ("0", "1"):
        raise DataError("wrong-type", f"'{key}' must be 0 or 1, the number of the better answer, not {_show(row[key])}")
    two = names["answer 0"], names["answer 1"]
    return two if str(row[key]) == "0" else (two[1], two[0])


def _apart(said: list[Turn], shared: int) -> str:
    apart = [turn.role for turn in said[max(shared, 0) :]]
    return f"here {len(apart)} turns ({', '.join(apart)}) differ" if apart else "it has no turns"


def _label(row: dict[str, Any], key: str) -> bool:
    value = row[key].strip().lower() if isinstance(row[key], str) else row[key]
    if value not in (True, False, "true", "false", "1", "0"):
        raise DataError("wrong-type", f"'{key}' must be true (a good answer) or false (a bad one), not {_show(row[key])}")
    return value in (True, "true", "1")


def _said(row: dict[str, Any], key: str, rounds: bool = True) -> list[Turn]:
    """An answer as a text, a message or a list of messages, perhaps with the conversation before it. rounds: a text may hold
    `Human:` and `Assistant:` marks (preferences); else they are what the answer says."""
    value = row[key]
    if isinstance(value, dict) and ({"role", "from"} & value.keys()):
        return _messages([value])
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return _messages(value)
    if value is None:
        raise DataError("wrong-type", f"'{key}' must be a string, a message or a list of messages, not null")
    text = _text(row, key)
    return _rounds(text) if rounds and _has_rounds(text) else [Turn("assistant", text)]


def _whole(turns: list[Turn], row: dict[str, Any], names: dict[str, str]) -> tuple[Turn, ...]:
    """The turns with the row's own system turn and tools."""
    system = row.get(names["system"]) if "system" in names else None
    if system is not None and _text(row, names["system"]) and not _repeats(system, turns):
        turns = [Turn("system", system), *turns]
    if "tools" in names and turns and (schemas := _schemas(row, names["tools"])):
        turns = [replace(turns[0], extra={**turns[0].extra, "tools": schemas}), *turns[1:]]
    return tuple(tools.with_names(turns))


def _schemas(row: dict[str, Any], key: str, where: str = "") -> list[dict[str, Any]]:
    schemas = tools.read_schemas(row.get(key))
    if schemas is None:
        wanted = "must be a list of objects with a name (or that as JSON)"
        raise DataError("tool-turn", f"{where}'{key}' {wanted}, not {_show(row[key])}")
    return schemas


def _repeats(system: str, turns: list[Turn]) -> bool:
    if not turns or turns[0].role != "system":
        return False
    if turns[0].text != system:
        raise DataError("role-order", "the row has both a key 'system' and a system turn; keep one")
    return True


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


_ROUND = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")
_ROUND_IN_LINE = re.compile(r"(?:^|(?<=\s))(Human|Assistant)[:：]")  # blanks where line ends were


def _has_rounds(text: Any) -> bool:
    """Whether one text holds a conversation, as BELLE and Anthropic's HH write it."""
    if not (isinstance(text, str) and text[:64].lstrip()[:5] == "Human"):
        return False
    marks = _marks_of(text).findall(text)
    return bool(marks) and marks[0] == "Human" and "Assistant" in marks


def _marks_of(text: str) -> re.Pattern[str]:
    """Marks on lines of their own; where no Assistant has one, marks behind blanks, if the two speak in turn."""
    if "Assistant" in _ROUND.findall(text):
        return _ROUND
    marks = _ROUND_IN_LINE.findall(text)
    in_turn = all(mark == ("Human", "Assistant")[i % 2] for i, mark in enumerate(marks))
    several = len(marks) > 2 or (len(marks) == 2 and text.rstrip()[-1] in ":：")  # two may be words of a question
    return _ROUND_IN_LINE if several and in_turn else _ROUND


def _rounds(text: str) -> list[Turn]:
    first, *marked = _marks_of(text).split(text)
    if first.strip() or not marked:
        raise DataError("wrong-type", f"rounds must be 'Human: ...' and 'Assistant: ...' on lines of their own, not {_show(text)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Turn(roles[mark], said.strip()) for mark, said in zip(marked[::2], marked[1::2], strict=True)]
    return turns[:-1] if turns[-1] == Turn("assistant", "") else turns  # the mark that asks for the answer


# --- messages -------------------------------------------------------------------------------------------------------------

_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
_SPEAKERS |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "developer": "system"}  # ShareGPT's sites, OpenAI
_CALLERS = ("function_call", "tool_call")
_TOOL_SPEAKERS = ("observation", "function", "tool_response")
_BOTH = (("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("input", "output"))


def _messages(messages: list[Any]) -> list[Turn]:
    """The turns of a list of messages; what an assistant says and calls in a row is one turn."""
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        for turn in _message(message, number):
            before = turns[-1] if turns else None
            calls = turn.extra.get("tool_calls") if turn.role == "assistant" else None
            if calls and before and (before.role, before.learn, before.weight) == (turn.role, turn.learn, turn.weight):
                both = [*before.extra.get("tool_calls", ()), *calls]
                text = "\n".join(filter(None, [before.text, turn.text]))
                turns[-1] = replace(before, text=text, extra={**before.extra, **turn.extra, "tool_calls": both})
            else:
                turns.append(turn)
    return turns


def _message(message: Any, number: int) -> list[Turn]:
    """One message: role and content (OpenAI, ChatGLM3), from and value (ShareGPT), or a question with its answer."""
    if not isinstance(message, dict):
        raise DataError("wrong-type", f"message {number} must be an object with role and content, not {_show(message)}")
    place = f"message {number}: "
    both = next((pair for pair in _BOTH if {"role", "from"}.isdisjoint(message) and pair[0] in message), None)
    if both:
        roles = [("system", "system"), (both[0], "user"), (both[1], "assistant")]
        return [Turn(role, _text(message, key, place)) for key, role in roles if message.get(key) is not None]
    role_key, text_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    called = message.get("tool_calls") or message.get("function_call")
    own = (
        _plain(message.get("role")) == "tool" and "parameters" in message and "observation" in message
    )  # ChatGLM3's call with its result
    _refuse_media(message, (), place)
    for key in (role_key,) if called or own else (role_key, text_key):  # a call may stand without any text
        if key not in message:
            raise DataError(
                "missing-key", f"message {number} needs the key '{key}'; it has {list(message)}{_mistyped(key, message)}"
            )
    given = message[role_key]
    learn = message.get("learn")
    if learn is not None and not isinstance(learn, bool):
        raise DataError("wrong-type", f"message {number}: 'learn' must be true or false, not {_show(learn)}")
    how = _how_learned(message, learn, given, place)
    if own:
        result = message["observation"]
        result = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        call = {key: message[key] for key in ("name", "parameters", "id") if key in message}
        return [Turn("assistant", "", extra={"tool_calls": _calls(call, number, given)}, **how), Turn("tool", result)]
    if _plain(given) in _CALLERS:
        return [Turn("assistant", "", extra={"tool_calls": _calls(message[text_key], number, given)}, **how)]
    known = (role_key, text_key, "learn", "weight", "loss_weight", "tool_calls", "function_call")
    extra = {key: value for key, value in message.items() if key not in known}
    if called:
        extra["tool_calls"] = _calls(called, number, given)
    if "tools" in extra:
        extra["tools"] = _schemas(message, "tools", place)
    role = _role(given, number)
    content = message.get(text_key)
    if is_parts(content) and role == "assistant":
        text, more = _parts(content, number, given, place)
        if both := extra.keys() & more.keys():
            raise DataError("wrong-type", f"{place}'{min(both)}' stands beside the content and in it; keep one of the two")
        return [Turn(role, text, extra={**extra, **more}, **how)]
    text = "" if called and content is None else _text(message, text_key, place)
    return [Turn(role, text, extra=extra, **how)]


def _how_learned(message: dict[str, Any], learn: bool | None, role: Any, place: str) -> dict[str, Any]:
    """Turn's `learn` and `weight`. LLaMA-Factory's v1 says `loss_weight` of every message: 1 of an answer and 0 of all else say what
    is usual, so the run's own `learn:` decides."""
    weight = _weight(message, "weight", place)
    if message.get("loss_weight") is None:
        return {"learn": learn, "weight": weight}
    if "weight" in message or learn is not None:
        raise DataError(
            "wrong-type", f"{place}'loss_weight' stands beside '{'learn' if learn is not None else 'weight'}'; keep one"
        )
    weight = _weight(message, "loss_weight", place)
    if weight == (1.0 if _SPEAKERS.get(_plain(role)) == "assistant" else 0.0):
        return {"learn": None, "weight": 1.0}
    return {"learn": weight > 0, "weight": weight or 1.0}


def _calls(value: Any, number: int, given: Any) -> list[dict[str, Any]]:
    calls = tools.read_calls(value)
    if calls is None:
        keys = tools.unread_keys(value)
        shown = f"{_show(value)}{f' with the keys {some(keys)}' if keys else ''}"
        wanted = 'a call is {"name": ..., "arguments": {...}}, as an object or as JSON, or a list of these'
        raise DataError("tool-turn", f"message {number} is a '{given}' turn with a call that cannot be read: {shown}; {wanted}")
    return calls


def _role(given: Any, number: int) -> str:
    role = _plain(given)
    if role in _TOOL_SPEAKERS:
        return "tool"
    if role not in _SPEAKERS:
        hint = did_you_mean(given, (*_SPEAKERS, *_CALLERS, *_TOOL_SPEAKERS)) if isinstance(given, str) else ""
        known = f"roles are {', '.join(ROLES)} (or human, gpt)"
        raise DataError("unknown-role", f"message {number} has the unknown role {given!r}; {known}{hint}")
    return _SPEAKERS[role]


def _plain(role: Any) -> str:
    """Roles in whatever case: User is user."""
    return role.lower() if isinstance(role, str) else ""


def _text(row: dict[str, Any], key: str, where: str = "") -> str:
    value = row[key]
    if is_parts(value):
        value = "".join(_part(part, number, where) for number, part in enumerate(value, 1))
    if not isinstance(value, str):
        nested = "; use a JSON string, or pick other keys with columns:" if isinstance(value, list | dict) else ""
        raise DataError("wrong-type", f"{where}'{key}' must be a string, not {_show(value)}{nested}")
    if _SURROGATE.search(value):
        raise DataError("encoding-damage", f"{where}'{key}' holds half of a surrogate pair, which is not a character")
    return value


def is_parts(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a content is a list of parts, as OpenAI and LLaMA-Factory's v1 write it."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def _parts(parts: list[dict[str, Any]], number: int, given: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The text of an answer in parts, and what else they say: v1 has the thought and the calls among them."""
    texts, thoughts, calls = [], [], []
    for place, part in enumerate(parts, 1):
        if part["type"] == "reasoning":
            thoughts.append(_part({**part, "type": "text"}, place, where))
        elif part["type"] == "tool_call":
            calls += _calls(part.get("value"), number, given)
        else:
            texts.append(_part(part, place, where))
    extra = {"reasoning_content": "".join(thoughts), "tool_calls": calls}
    return "".join(texts), {key: value for key, value in extra.items() if value}


def _part(part: dict[str, Any], number: int, where: str) -> str:
    """One part of a content: its text stands under `text` (OpenAI) or `value` (LLaMA-Factory's v1)."""
    if part["type"] not in ("text", "input_text", "output_text"):
        raise DataError(
            "not-text", f"{where}part {number} of the content is of the type {part['type']!r}; only text can be learned"
        )
    keys = [key for key in ("text", "value") if key in part]
    if len(keys) != 1:
        has = "both 'text' and 'value'" if keys else some(list(part))
        raise DataError("missing-key", f"{where}part {number} of the content needs the key 'text' (or 'value'); it has {has}")
    return _text(part, keys[0], f"{where}part {number} of the content: ")


_MEDIA = re.compile(
    r"(?:image|picture|photo|video|audio|speech)s?(?:_?(?:url|path|file|filename|bytes|list|data)s?)?|pixel_values", re.IGNORECASE
)


def _refuse_media(row: dict[str, Any], named: Iterable[str], where: str = "") -> None:
    """Raises DataError for pictures, video and sound beside the texts, which would be trained on as if nothing belonged to them.

    A mark such as <image> in a text alone is a text, and so is a key that is `named` as one.
    """
    for key, value in row.items():
        if _MEDIA.fullmatch(key) and key not in named and _is_filled(value):
            raise DataError("not-text", f"{where}'{key}' holds pictures, video or sound ({_show(value)}); only text can be learned")


def _is_filled(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_filled, value))
    return bool(value) and isinstance(value, str | dict)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _rows(row: dict[str, Any], key: str) -> list[Any]:
    """A list; in CSV it is written as a JSON string."""
    value = tools.loaded(row[key])
    value = row[key] if value is None else value
    if not isinstance(value, list):
        raise DataError("wrong-type", f"'{key}' must be a list, not {_show(value)}")
    return value


WEIGHTS = 1e-6, 1000.0  # the least and the most: what lies between leaves every loss finite in fp32, and other rows a say


def _weight(row: dict[str, Any], key: str, where: str = "") -> float:
    value = row.get(key)
    if value is None or value == "":
        return 1.0
    try:
        number = float(value) if not isinstance(value, bool | list | dict) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (number == 0 or WEIGHTS[0] <= number <= WEIGHTS[1]):
        wanted = f"must be a number >= 0 (it scales the loss), and if it is not 0 from {_WEIGHTS}"
        raise DataError("wrong-type", f"{where}'{key}' {wanted}, not {_show(value)}")
    return number


_WEIGHTS = f"{WEIGHTS[0]:.6f} to {WEIGHTS[1]:g}"


def _check_weights(record: Record, weight: float) -> None:
    """A turn's weight and its row's are multiplied."""
    for number, turn in enumerate(record.turns if not isinstance(record, Document) else (), 1):
        if (product := turn.weight * weight) and not WEIGHTS[0] <= product <= WEIGHTS[1]:
            said = f"the weight {turn.weight:g} of turn {number} times the row's {weight:g} is {product:g}"
            raise DataError("wrong-type", f"{said}; it must be 0 or from {_WEIGHTS}")


def _show(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False)
    return f"{kinds[type(value)]} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


# A form from outside is one more line: a function (row, join) -> record, asked for by `format: its-name`.
FORMATS: dict[str, Callable[..., Any]] = {name: partial(_by_names, columns=NAMES[name]) for name in NAMES}
FORMATS["columns"] = _by_names


# --- rows: what a conversation must be ------------------------------------------------------------------------------------


def parse_rows(row: Any, form: Form, want: Want, join: str = "\n") -> list[Record]:
    """The checked records of one row, its own system turn first if it has one; several where the form has several answers
    (`meta["answer"]` says which). Raises DataError (the message has no place in it)."""
    if not isinstance(row, dict):
        raise DataError("not-an-object", f"a row must be a JSON object, this is {_show(row)}")
    _refuse_media(row, form.names.values())
    two = next((pair for pair in _TWO_KEYS if {*pair} <= row.keys()), None)
    if want in ("answers", "labels") and two and form.names.get("response") not in row:
        raise DataError(
            "preference-row", f"a preference row ({', '.join(two)}) has no single answer to learn; {_STAGES['preferences']}"
        )
    _require_keys(row, form, want)
    made = form.read(row, join, want)
    records: list[Record] = [*made] if isinstance(made, list) else [made]
    for record in records:
        _check(record, form, want)
    if "weight" not in form.names:
        return records
    weight = _weight(row, form.names["weight"])
    for record in records:
        _check_weights(record, weight)
    return [replace(record, weight=weight) for record in records]


_TWO_KEYS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), (*_TWO.values(),))


def parse_row(row: Any, form: Form, want: Want, join: str = "\n") -> Record:
    """`parse_rows` of a row that must be one record."""
    records = parse_rows(row, form, want, join)
    if len(records) != 1:
        raise DataError("several-answers", f"the row has {len(records)} answers where one was wanted; name one with columns:")
    return records[0]


_RECORDS: dict[str, type] = {"text": Document, "preferences": Preference, "labels": Labelled}


def _check(record: Record, form: Form, want: Want) -> None:
    wanted = _RECORDS.get(want, Conversation)
    if not isinstance(record, wanted):
        got, need = type(record).__name__, wanted.__name__
        raise DataError("unknown-form", f"the format '{form.name}' gives a {got} where this stage reads a {need}")
    if isinstance(record, Document):
        if _blank(record.text):
            raise DataError("empty-text", f"the text '{form.names.get('text', 'text')}' is empty")
        return
    turns = (*record.turns, record.chosen) if isinstance(record, Preference) else record.turns
    _check_roles(turns, want)
    _check_texts(turns, want)


def _require_keys(row: dict[str, Any], form: Form, want: Want) -> None:
    for key in form.needs(want):
        if key not in row:
            article = "an" if form.name[0] in "aeiou" else "a"
            stage = f"; {_STAGES['answers']}" if key in _LABEL_KEYS and want == "labels" else ""
            raise DataError(
                "missing-key" if set(form.names.values()) & row.keys() else "unknown-form",
                f"{article} '{form.name}' row needs the key '{key}'; this row has {some(list(row))}{_mistyped(key, row)}{stage}",
            )
        if row[key] is None:
            raise DataError(
                "wrong-type", f"'{key}' must be a {'list' if form.names.get('messages') == key else 'string'}, not null"
            )


def _mistyped(wanted: str, row: dict[str, Any]) -> str:
    if any(_REJECTED.search(key) for key in row) and not _REJECTED.search(wanted):
        return f"; if it has a better and a worse answer, name them: {_columns_to_paste(row, 'preferences')}"
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
    if want != "prompts" and before != "assistant":
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
        if turn.role == "user" and _blank(turn.text):
            raise DataError("empty-question", f"the question{place} is empty")
        unanswered = want == "prompts" and number == len(turns)
        if turn.role == "assistant" and _blank(turn.text) and not turn.extra.get("tool_calls") and not unanswered:
            raise DataError("empty-answer", f"the answer{place} is empty")


def _blank(text: str) -> bool:
    """Nothing but blanks, also those that have no width."""
    return not text.strip(" \t\r\n\v\f\u00a0\u200b\u200c\u200d\u2060\ufeff\u3000")

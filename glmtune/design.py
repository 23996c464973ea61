"""Sample design (SDE, arXiv 2404.13033): structured records <-> training samples, both ways, under every option of the paper.

    a row of records.jsonl -> read() -> Item(text, record) -> sample() -> a `messages` row, as data.py reads them
    a model's answer       -> parse() -> Parsed(record, how)            parse(render(record)) == record, strictly, for every Design

A Schema says which fields a record has and how they are worded; a Design says how a sample is written. A span or reason that holds
a separator of its design is written as a JSON string and read back as one, so nothing in a record can make an answer ambiguous.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import yaml

from . import files, options
from .data import problem_of
from .errors import UserError, did_you_mean
from .options import Options
from .reading import Broken, DataError, find_files, open_file

Language = Literal["en", "zh"]
Record = dict[str, str | list[str] | None]  # field -> the label's name | the spans; None and [] stand for "unmentioned"

# --- designs: how a sample is written -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """One choice of every option; the defaults are ES-SDE, the paper's empirically strong combination."""

    instruction: Literal["first", "last", "none"] = "first"  # Inst-first, Inst-last, No-inst: where the task stands
    input: Literal["No-MI", "MI"] = "No-MI"  # modelling the input: MI learns the prompt too, which the run's stage.learn decides
    format: Literal["lines", "natural", "json"] = "lines"
    unmentioned: Literal["placeholder", "omit"] = "placeholder"  # PU, OU
    labels: Literal["text", "number"] = "text"  # TxtLabel, NumLabel
    reasoning: Literal["none", "cot", "r-cot"] = "none"  # No-CoT, CoT (the reason before the value), R-CoT (after it)

    @property
    def name(self) -> str:
        """In the paper's words, as a file name: inst-first_no-mi_lines_pu_txtlabel_no-cot."""
        place = "no-inst" if self.instruction == "none" else f"inst-{self.instruction}"
        rest = "pu" if self.unmentioned == "placeholder" else "ou", "txtlabel" if self.labels == "text" else "numlabel"
        return "_".join([place, self.input.lower(), self.format, *rest, "no-cot" if self.reasoning == "none" else self.reasoning])

    @property
    def learn(self) -> str:
        """What `stage.learn` must be in the run: a row cannot say that its prompt is learned."""
        return "everything" if self.input == "MI" else "all"


# EW-SDE, the empirically weak one, as the paper's repository shows it: the task after the text, natural, unmentioned left out.
PRESETS = {"ES-SDE": Design(), "EW-SDE": Design(instruction="last", format="natural", unmentioned="omit")}
CHOICES: dict[str, tuple[str, ...]] = {one.name: get_args(one.type) for one in fields(Design)}


def design(preset: str = "ES-SDE", settings: Iterable[str] = ()) -> Design:
    """A preset changed by settings such as `instruction=last`. Raises UserError."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'; presets are {', '.join(PRESETS)}{did_you_mean(preset, PRESETS)}")
    made = PRESETS[preset]
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in CHOICES:
            known = ", ".join(f"{one}={'|'.join(values)}" for one, values in CHOICES.items())
            raise UserError(f"'{setting}' is no option of a design; options are {known}{did_you_mean(name, CHOICES)}")
        if value not in CHOICES[name]:
            raise UserError(f"'{setting}': {name} is one of {', '.join(CHOICES[name])}{did_you_mean(value, CHOICES[name])}")
        made = replace(made, **{name: value})
    return made


def variations(base: Design, schema: "Schema") -> list[Design]:
    """The base, every design that differs from it in one option, and the presets; CoT only where the schema has reasons."""
    changed = [replace(base, **{name: value}) for name, values in CHOICES.items() for value in values]
    return [one for one in dict.fromkeys([base, *changed, *PRESETS.values()]) if one.reasoning == "none" or schema.reasoning]


# --- schemas: what a record holds and how it is worded --------------------------------------------------------------------


class _Words(Options):
    """How a label or a field is written; without a wording in a language it is its own name there."""

    en: str | None = None
    zh: str | None = None
    number: int | None = None
    also: list[str] = pydantic.Field(default=[])  # synonyms, understood in records and in answers


class _Field(_Words):
    kind: Literal["label", "spans"] | None = None  # null: label where there are labels
    labels: dict[str, Any] | None = None  # instead of the schema's own


class Reasoning(Options):
    key: str | None = None  # of a record: {field: reason}
    template: dict[Language, str] = pydantic.Field(
        default={}
    )  # where a record has none: {field}, {value}, {any other key of the record}
    unmentioned: dict[Language, str] = pydantic.Field(default={})  # the same, for what is not mentioned


class _File(Options):
    language: Language = "en"
    text: str = "text"
    targets: str | None = None
    pair: list[str] = pydantic.Field(default=["type", "text"])
    task: dict[Language, str]
    names: dict[str, dict[Language, str]] = pydantic.Field(default={})
    unmentioned: Any = pydantic.Field(default={})
    labels: dict[str, Any] = pydantic.Field(default={})
    fields: dict[str, Any]
    reasoning: Reasoning | None = None


@dataclass(frozen=True)
class Word:
    """A label: its name in records, how it is written, its number, what else is understood (the other language too)."""

    name: str
    word: str
    number: int
    also: tuple[str, ...] = ()

    def known_as(self) -> tuple[str, ...]:
        return (self.word, str(self.number), *self.also)


@dataclass(frozen=True)
class Field(Word):
    """A field has one of its labels or, without any, spans of the text."""

    labels: tuple[Word, ...] = ()

    @property
    def empty(self) -> list[str] | None:
        return None if self.labels else []


@dataclass(frozen=True)
class Schema:
    language: Language
    text: str  # the key of a record's input text
    targets: str | None  # the key of its values: {field: value} or a list of (type, text); None: they are keys of the record itself
    pair: tuple[str, str]  # the keys of such a (type, text)
    task: str
    names: dict[str, str]  # what a field, a value and a reason are called
    unmentioned: Word
    fields: tuple[Field, ...]
    reasoning: Reasoning | None


_NAMES = {"field": {"en": "field", "zh": "字段"}, "value": {"en": "value", "zh": "值"}, "reason": {"en": "reason", "zh": "理由"}}
_UNMENTIONED = {"en": "not mentioned", "zh": "未提及"}


def load_schema(path: str | Path, language: str | None = None) -> Schema:
    """Reads a schema file (docs/sample-design.md) in one of its languages. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no schema file {path}")
    file: _File = options.build(_File, options.read(path), str(path))
    chosen: Any = language or file.language
    if chosen not in get_args(Language):
        raise UserError(f"language '{chosen}': wanted {' or '.join(get_args(Language))}")
    strange = [key for key in file.names if key not in _NAMES]
    if strange:
        raise UserError(f"{path}: names.{strange[0]}: wanted {', '.join(_NAMES)}{did_you_mean(strange[0], _NAMES)}")
    given = [("task", file.task), *((f"names.{key}", words) for key, words in file.names.items())]
    for name, words in given:
        if chosen not in words:
            raise UserError(f"{path}: {name} has no wording in '{chosen}'; it has {', '.join(words) or 'none'}")

    def worded(place: str, name: str, entry: Any, index: int, kind: type[_Words] = _Words) -> tuple[Any, dict[str, Any]]:
        """An entry and the parts of its Word; a bare text is its wording in every language."""
        tree = {"en": entry, "zh": entry} if isinstance(entry, str) else {} if entry is None else entry
        if not isinstance(tree, dict):
            raise UserError(f"{path}: {place}: wanted a text or a group ({', '.join(kind.model_fields)}), got {entry!r}")
        read = options.build(kind, tree, f"{path}: {place}")
        words = {"en": read.en or name, "zh": read.zh or name}
        also = dict.fromkeys([name, *words.values(), *read.also])
        return read, dict(name=name, word=words[chosen], number=index if read.number is None else read.number, also=tuple(also))

    def labels(place: str, entries: dict[str, Any]) -> tuple[Word, ...]:
        return tuple(Word(**worded(f"{place}.{name}", name, entry, i)[1]) for i, (name, entry) in enumerate(entries.items()))

    made = []
    for index, (name, entry) in enumerate(file.fields.items()):
        read, word = worded(f"fields.{name}", name, entry, index, _Field)
        own = labels(f"fields.{name}.labels", read.labels) if read.labels else labels("labels", file.labels)
        if read.kind == "label" and not own:
            raise UserError(f"{path}: fields.{name} is of kind label, but neither it nor the schema has labels:")
        made.append(Field(**word, labels=() if read.kind == "spans" else own))
    lowest = min((label.number for one in made for label in one.labels), default=0)
    entry = file.unmentioned
    entry = {**_UNMENTIONED, **entry} if isinstance(entry, dict) else entry
    unmentioned = Word(**worded("unmentioned", "unmentioned", entry, lowest - 1)[1])
    if not made or len(file.pair) != 2:
        raise UserError(f"{path}: {'pair: wanted two keys, such as [type, text]' if made else 'fields: there are none'}")
    _check_words(f"{path}: fields", made)
    for one in made:
        _check_words(f"{path}: labels of {one.name}", [*one.labels, unmentioned])
    names = {key: file.names.get(key, words)[chosen] for key, words in _NAMES.items()}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: names: field, value and reason must be called differently; they are {', '.join(names.values())}")
    pair = (file.pair[0], file.pair[1])
    return Schema(chosen, file.text, file.targets, pair, file.task[chosen], names, unmentioned, tuple(made), file.reasoning)


def _check_words(place: str, words: Sequence[Word]) -> None:
    """Words are written as they stand: none may hold a separator, and each must mean one thing."""
    seen: dict[str, str] = {}
    for one in words:
        for word in {word.casefold() for word in one.known_as()}:
            if word != word.strip() or not word or re.search(r'[:：,，;；、。()（）"\x00-\x1f]', word):
                raise UserError(
                    f'{place}: {word!r} must not be empty, begin or end with a blank, or hold : , ; 、 。 ( ) " or a line break'
                )
            if seen.setdefault(word, one.name) != one.name:
                raise UserError(f"{place}: '{word}' stands for both '{seen[word]}' and '{one.name}'; change one of them")


# --- records: a row -> Item -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A text and what is true of it."""

    text: str
    record: Record  # every field of the schema, in its order
    row: dict[str, Any]
    where: str = ""


def rows_of(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every row of a file or folder. Raises UserError for whatever is none."""
    found = []
    for file, name in find_files(path):
        try:
            items = list(open_file(file, name, lambda value: True).items)
        except DataError as error:
            raise UserError(f"{problem_of(name, error).place}: {error}") from None
        for item in items:
            if isinstance(item, Broken) or not isinstance(item.value, dict):
                raise UserError(
                    f"{name}:{item.line}: {item.message if isinstance(item, Broken) else 'a row must be a JSON object'}"
                )
            found.append((f"{name}:{item.line}", item.value))
    return found


def read(path: str, schema: Schema) -> list[Item]:
    """The records of a file. Raises one UserError: the first bad record, and where the others stand."""
    items, bad = [], []
    for where, row in rows_of(path):
        try:
            items.append(replace(read_row(row, schema), where=where))
        except UserError as error:
            bad.append((where, error))
    if bad:
        more = ", ".join(where for where, _ in bad[1:9]) + (", ..." if len(bad) > 9 else "")
        raise UserError(f"{bad[0][0]}: {bad[0][1]}" + (f"\nand {len(bad) - 1} more bad records: {more}" if more else ""))
    return items


def read_row(row: dict[str, Any], schema: Schema) -> Item:
    """Raises UserError; the message has no place in it."""
    names = [one.name for one in schema.fields]
    for key in (schema.text, schema.targets) if schema.targets else (schema.text, *names):
        if key not in row:
            null = " (null where it is not mentioned)" if key in names else ""
            raise UserError(f"a record needs the key '{key}'{null}; this one has {list(row)}{did_you_mean(key, row)}")
    text, given = row[schema.text], row if schema.targets is None else row[schema.targets]
    if not isinstance(text, str) or not text.strip() or _SURROGATE.search(text):
        raise UserError(f"'{schema.text}' must be a text, not empty and without half characters; it is {text!r}")
    given = _grouped(given, schema) if isinstance(given, list) else given
    if not isinstance(given, dict):
        raise UserError(f"'{schema.targets}' must be an object or a list, not {given!r}")
    strange = [key for key in given if key not in names] if schema.targets else []
    if strange:
        raise UserError(f"'{strange[0]}' is no field; fields are {', '.join(names)}{did_you_mean(strange[0], names)}")
    return Item(text, {one.name: _value(one, given.get(one.name), schema) for one in schema.fields}, row)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _grouped(pairs: list[Any], schema: Schema) -> dict[str, Any]:
    """[{type, text}, ...] or [[type, text], ...] as {type: [text, ...]}; of a field of labels as {type: label}."""
    found: dict[str, Any] = {}
    for pair in pairs:
        both = [pair.get(key) for key in schema.pair] if isinstance(pair, dict) else pair
        if not isinstance(both, list) or len(both) != 2:
            raise UserError(f"'{schema.targets}' must hold objects with {' and '.join(schema.pair)}, or pairs; found {pair!r}")
        one = _field(schema, both[0])
        if one is None:
            raise UserError(f"{both[0]!r} is no field; fields are {', '.join(field.name for field in schema.fields)}")
        if one.labels and one.name in found:
            raise UserError(f"'{one.name}' is given twice; it has one label")
        found[one.name] = both[1] if one.labels else [*found.get(one.name, []), both[1]]
    return found


def _value(one: Field, value: Any, schema: Schema) -> str | list[str] | None:
    if one.labels:
        label = _lookup([*one.labels, schema.unmentioned], value)
        if value is None or label is schema.unmentioned:
            return None
        if label is None:
            known = [label.name for label in one.labels]
            raise UserError(f"'{one.name}' is {value!r}; its labels are {', '.join(known)}{did_you_mean(str(value), known)}")
        return label.name
    spans = [] if value is None else value
    if not isinstance(spans, list):
        raise UserError(f"'{one.name}' must be a list of texts, not {value!r}")
    for span in spans:
        if not isinstance(span, str) or not span.strip() or _SURROGATE.search(span):
            raise UserError(f"'{one.name}' must hold texts, not empty and without half characters; it holds {span!r}")
    return list(spans)


def _lookup(words: Sequence[Word], value: Any) -> Word | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return next((word for word in words if str(value).casefold() in map(str.casefold, word.known_as())), None)


def _field(schema: Schema, word: Any) -> Field | None:
    found = _lookup(schema.fields, word)
    return found if isinstance(found, Field) else None


def not_in_text(items: Iterable[Item]) -> list[str]:
    """Spans that do not stand in their text, each with its place: worth a note, since a model can then not copy them."""
    spans = ((item, span) for item in items for value in item.record.values() if isinstance(value, list) for span in value)
    return [f"{item.where}: {span!r}" for item, span in spans if span not in item.text]


def trained_on(train: Iterable[Item], test: Iterable[Item]) -> list[str]:
    """The places of test records whose text is trained on too, but for case and blanks: what is asked there was learned by heart."""
    known = {" ".join(item.text.casefold().split()) for item in train}
    return [item.where for item in test if " ".join(item.text.casefold().split()) in known]


# --- writing: Item -> sample ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Marks:
    """What stands between fields, between spans, between field and value, at the end, and around a reason."""

    field: str
    span: str
    colon: str
    end: str
    open: str
    close: str


_MARKS = {"zh": _Marks("，", "、", "：", "。", "（", "）"), "en": _Marks("; ", ", ", ": ", "", " (", ")")}
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_OPEN = r'"(?:[^"\\]|\\[\s\S])*\\?\Z'  # a quote that never ends: it holds all the rest, which is then searched once only
_SAY = {
    "en": {
        "lines": "Answer with one line for each {field}: {shape}",
        "natural": "Answer in one line: {shape}{between}{shape} ...",
        "json": "Answer with one line of JSON for each {field}: {shape}",
        "placeholder": "For what the text does not mention, write {mark}",
        "omit": "Leave out what the text does not mention; where nothing is left, write {mark}",
    },
    "zh": {
        "lines": "每个{field}输出一行：{shape}",
        "natural": "输出一行：{shape}{between}{shape}……",
        "json": "每个{field}输出一行 JSON：{shape}",
        "placeholder": "文中没有提到的{field}写作：{mark}",
        "omit": "文中没有提到的{field}不要写；一个都没有时写：{mark}",
    },
}


def _marks(schema: Schema, design: Design) -> _Marks:
    marks = _MARKS[schema.language]
    return replace(marks, field="\n", end="") if design.format == "lines" else marks


def render(record: Record, schema: Schema, design: Design, reasons: dict[str, str] | None = None) -> str:
    """The answer that says `record`, fields in the record's order."""
    marks, known = _marks(schema, design), {one.name: one for one in schema.fields}
    shown = {name: value for name, value in record.items() if value not in (None, []) or design.unmentioned == "placeholder"}
    parts = [_part(known[name], value, (reasons or {}).get(name, ""), schema, design) for name, value in shown.items()]
    if design.format == "json":
        return "\n".join(parts) or "[]"
    return (marks.field.join(parts) or schema.unmentioned.word) + marks.end


def _part(one: Field, value: str | list[str] | None, reason: str, schema: Schema, design: Design) -> str:
    marks, quote = _marks(schema, design), _quoting(schema, design)
    name = one.number if design.labels == "number" and not one.labels else one.word
    shown = _shown(one, value, schema, design)
    if design.format == "json":
        texts = {"field": name, "value": shown, "reason": reason}
        return json.dumps({schema.names[key]: texts[key] for key in _ORDER[design.reasoning]}, ensure_ascii=False)
    if isinstance(shown, list):
        shown = marks.span.join(map(quote, shown)) or schema.unmentioned.word
    return _line(str(name), quote(reason), str(shown), marks, design)


_ORDER = {"none": ("field", "value"), "cot": ("field", "reason", "value"), "r-cot": ("field", "value", "reason")}


def _shown(one: Field, value: str | list[str] | None, schema: Schema, design: Design) -> str | int | list[str]:
    if not one.labels:
        return list(value or [])
    label = schema.unmentioned if value is None else next(label for label in one.labels if label.name == value)
    return label.number if design.labels == "number" else label.word


def _line(name: str, reason: str, value: str, marks: _Marks, design: Design) -> str:
    before, after = (f"{marks.open}{reason}{marks.close}" if design.reasoning == kind else "" for kind in ("cot", "r-cot"))
    return f"{name}{before}{marks.colon}{value}{after}"


def _quoting(schema: Schema, design: Design) -> Callable[[str], str]:
    """A text as it stands, or as a JSON string where it could be taken for something else."""
    marks = _marks(schema, design)
    used = marks.field + marks.span + marks.colon + marks.end + (marks.open + marks.close if design.reasoning != "none" else "")
    special = re.compile("[" + re.escape(used.replace(" ", "")) + r'"\x00-\x1f]')

    def quote(text: str) -> str:
        plain = text and text == text.strip() and text != schema.unmentioned.word and not special.search(text)
        return text if plain else json.dumps(text, ensure_ascii=False)

    return quote


def instruction(schema: Schema, design: Design) -> str:
    """The task, its fields and labels, and how the answer must look; in the schema's language."""
    say, marks, names, numbers = _SAY[schema.language], _marks(schema, design), schema.names, design.labels == "number"

    def listed(words: Sequence[Word], numbered: bool) -> str:
        return marks.span.join(f"{word.number} = {word.word}" if numbered else word.word for word in words)

    written = marks.span.join(listed([one], numbers and not one.labels) for one in schema.fields)
    lines = [schema.task, f"{names['field']}{marks.colon}{written}"]
    owners: dict[tuple[Word, ...], list[str]] = {}
    for one in schema.fields:
        owners.setdefault(one.labels, []).append(one.word)
    for labels, words in owners.items():
        head = names["value"] if len(owners) == 1 else marks.span.join(words)
        lines += [f"{head}{marks.colon}{listed(labels, numbers)}"] if labels else []
    empty = [_shown(one, one.empty, schema, design) for one in schema.fields]
    if design.format == "json":
        shape = "{" + ", ".join(f'"{names[key]}": ...' for key in _ORDER[design.reasoning]) + "}"
        absent = ["[]"] if design.unmentioned == "omit" else [json.dumps(one, ensure_ascii=False) for one in empty]
    else:
        shape = _line(names["field"], names["reason"], names["value"], marks, design)
        absent = [str(one) if one != [] and design.unmentioned == "placeholder" else schema.unmentioned.word for one in empty]
    lines.append(say[design.format].format(field=names["field"], shape=shape, between=marks.field))
    lines.append(say[design.unmentioned].format(field=names["field"], mark=" / ".join(dict.fromkeys(absent))))
    return "\n".join(lines)


def reasons(item: Item, schema: Schema, design: Design) -> dict[str, str]:
    """Why each field that will be written has its value: the record's own words, else the schema's template. Raises UserError."""
    how, found = schema.reasoning, {}
    if design.reasoning == "none":
        return found
    if how is None:
        raise UserError(f"reasoning={design.reasoning} needs reasons: give the schema a `reasoning:` with a key or a template")
    given = item.row.get(how.key) if how.key else None
    for one in schema.fields:
        value = item.record[one.name]
        own = given.get(one.name) if isinstance(given, dict) else None
        form = how.template if value not in (None, []) else how.unmentioned
        if own is not None and (not isinstance(own, str) or _SURROGATE.search(own)):
            raise UserError(f"{item.where}: the reason for '{one.name}' must be a text, not {own!r}")
        if own is not None:
            found[one.name] = own
        elif schema.language in form:
            shown = _shown(one, value, schema, replace(design, labels="text"))
            text = _MARKS[schema.language].span.join(shown) if isinstance(shown, list) else str(shown)
            found[one.name] = _filled(form[schema.language], {**item.row, "field": one.word, "value": text}, item.where)
        elif value not in (None, []) or design.unmentioned == "placeholder":
            part = "template" if form is how.template else "unmentioned"
            asked = f"the record's '{how.key}' has none, and " if how.key else ""
            raise UserError(f"{item.where}: no reason for '{one.name}': {asked}reasoning.{part} has no '{schema.language}' text")
    return found


def _filled(template: str, words: dict[str, Any], where: str) -> str:
    for key in re.findall(r"\{(\w+)\}", template):
        if key not in words:
            raise UserError(
                f"{where}: the template of reasons wants {{{key}}}; there are {', '.join(words)}{did_you_mean(key, words)}"
            )
    return re.sub(r"\{(\w+)\}", lambda match: str(words[match[1]]), template)


def sample(item: Item, schema: Schema, design: Design) -> dict[str, Any]:
    """A row to train or predict on; `record` is what its answer is read back as. Raises UserError."""
    asked = instruction(schema, design)
    prompts = {"first": f"{asked}\n---\n{item.text}", "last": f"{item.text}\n---\n{asked}", "none": item.text}
    answer = render(item.record, schema, design, reasons(item, schema, design))
    turns = [{"role": "user", "content": prompts[design.instruction]}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "record": item.record}


# --- reading back: answer -> Parsed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parsed:
    """What an answer says. strict: it is what `render` writes; soft: read with tolerance, `problems` says what was wrong, and a field
    whose value cannot be read is not in the record; failed: no field was found, the record is empty."""

    record: Record
    how: Literal["strict", "soft", "failed"]
    problems: tuple[str, ...] = ()


def parse(text: str, schema: Schema, design: Design) -> Parsed:
    record = _strict(text.strip(), schema, design)
    if record is not None:
        return Parsed(record, "strict")
    raw, problems = _find(text, schema, design)
    if not raw and not (design.unmentioned == "omit" and _is_nothing(text, schema)):
        return Parsed({}, "failed", ("no field of the schema was found",))
    found: Record = {}
    problems.insert(0, f"not the {design.format} format")
    for one in schema.fields:
        if one.name in raw:
            try:
                found[one.name] = _tolerant(one, raw[one.name], schema, design)
            except ValueError as error:
                problems.append(f"'{one.name}': {error}")
        else:
            found[one.name] = one.empty
            problems += [f"'{one.name}' is missing: taken as unmentioned"] if design.unmentioned == "placeholder" else []
    return Parsed(found, "soft", tuple(problems))


def _strict(text: str, schema: Schema, design: Design) -> Record | None:
    """Read by the marks of the format, then written again: strict is what comes out the same. The order of fields is free."""
    record: Record = {}
    why: dict[str, str] = {}
    try:
        for name, value, reason in (_json_parts if design.format == "json" else _text_parts)(text, schema, design):
            one = _field(schema, name)
            if one is None:
                return None
            record[one.name], why[one.name] = _value(one, value, schema), reason
    except (ValueError, RecursionError):  # UserError of a value too
        return None
    record |= {one.name: one.empty for one in schema.fields if one.name not in record}
    again = render(record, schema, design, why)
    same = again == text or (design.format == "json" and _json_lines(again) == _json_lines(text))
    return {one.name: record[one.name] for one in schema.fields} if same else None


def _json_lines(text: str) -> list[str]:
    """Every line with its keys in order, whatever blanks and escapes it was written with."""
    return [json.dumps(json.loads(line, object_pairs_hook=list)) for line in text.split("\n")]


def _json_parts(text: str, schema: Schema, design: Design) -> Iterator[tuple[Any, Any, str]]:
    for line in text.split("\n") if text != "[]" else []:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("no object")
        yield row.get(schema.names["field"]), row.get(schema.names["value"]), str(row.get(schema.names["reason"], ""))


def _text_parts(text: str, schema: Schema, design: Design) -> Iterator[tuple[Any, Any, str]]:
    marks, nothing = _marks(schema, design), schema.unmentioned.word
    bracketed = re.compile(rf'(.*){re.escape(marks.open)}({_QUOTED}|[^"{marks.open.strip()}]*){re.escape(marks.close)}', re.DOTALL)
    body = text.removesuffix(marks.end)
    for part in _split(body, marks.field) if body != nothing else []:
        name, value = _split(part, marks.colon)  # ValueError where there are not two
        reason = ""
        if design.reasoning != "none":
            found = bracketed.fullmatch(name if design.reasoning == "cot" else value)
            if found is None:
                raise ValueError("no reason")
            name, value = (found[1], value) if design.reasoning == "cot" else (name, found[1])
            reason = _unquoted(found[2])
        one = _field(schema, name)
        spans = [] if value == nothing else [_unquoted(span) for span in _split(value, marks.span)]
        yield name, value if one is not None and one.labels else spans, reason


def _split(text: str, mark: str) -> list[str]:
    """Cut at every mark that does not stand inside quotes."""
    pieces, start = [], 0
    for found in re.finditer(f"{_QUOTED}|{_OPEN}|{re.escape(mark)}", text):
        if found[0] == mark:
            pieces.append(text[start : found.start()])
            start = found.end()
    return [*pieces, text[start:]]


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def _bare(text: str) -> str:
    return text.strip(" \t\r\n\"'`*_“”‘’.。,，;；、:：[]{}")


def _is_nothing(text: str, schema: Schema) -> bool:
    return _bare(text).casefold() in {"", "none", "null", "无", *map(str.casefold, schema.unmentioned.known_as())}


def _find(text: str, schema: Schema, design: Design) -> tuple[dict[str, Any], list[str]]:
    """The raw value of every field that an answer names: as JSON, else by the fields' words; and what was passed over."""
    raw: dict[str, Any] = {}
    problems: list[str] = []

    def keep(word: Any, value: Any) -> None:
        one = _field(schema, word)
        if one is None or one.name in raw:
            problems.append(
                f"{word!r} is no field: passed over" if one is None else f"'{one.name}' stands twice: the first is taken"
            )
        else:
            raw[one.name] = value

    objects, twice = _objects(text)
    problems += [f"{key!r} stands twice: the first is taken" for key in twice]
    for row in objects:
        in_columns = schema.names["field"] in row
        for word, value in [(row[schema.names["field"]], row.get(schema.names["value"]))] if in_columns else row.items():
            keep(word, value)
    if raw:
        return raw, problems
    anchors = list(_anchors(schema, design).finditer(text))
    start = 0
    for found, following in zip(anchors, [*anchors[1:], None]):
        if over := _bare(text[start : found.start()]):
            problems.append(f"passed over: {over!r}")
        chunk = text[found.end() : following.start() if following else len(text)]
        line = re.match(r"[\s{\[]*[^\n]*", chunk)
        start = found.end() + (line.end() if line else 0)
        keep(found["field"], text[found.end() : start])
    if anchors and (over := _bare(text[start:])):
        problems.append(f"passed over: {over!r}")
    return raw, problems


def _objects(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Every JSON object in a text, also where its quotes and commas are not quite JSON's; and the keys that one of them has twice."""
    mended = text.translate(str.maketrans("“”：，", '"":,'))
    mended = re.sub(r",\s*([}\]])", r"\1", mended if '"' in mended else mended.replace("'", '"'))
    twice: list[str] = []

    def first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            twice.extend([key] if key in made else [])
            made.setdefault(key, value)
        return made

    decoder = json.JSONDecoder(object_pairs_hook=first)
    for candidate in (text, mended):
        found, position = [], 0
        while start := _BEGINS.search(candidate, position):
            known, position = len(twice), start.start()
            try:
                value, position = decoder.raw_decode(candidate, position)
                found.append(value)
            except ValueError:
                position += 1
                del twice[known:]
            except RecursionError:
                break
        if found:
            return found, twice
    return [], []


_BEGINS = re.compile(r'\{\s*["}]')  # an object, not one of many braces


def _anchors(schema: Schema, design: Design) -> re.Pattern[str]:
    """A field's word and what leads from it to its value: a colon, a reason and a colon, the keys of a broken JSON object."""
    words = [word for one in schema.fields for word in (one.word, *one.also, *([] if one.labels else [str(one.number)]))]
    either = "|".join(map(_alone, sorted(words, key=len, reverse=True)))
    mark, reason, value = "[\"'“”*_`]*", re.escape(schema.names["reason"]), re.escape(schema.names["value"])
    keys = rf'(?:\s*[,，]\s*{mark}{reason}{mark}\s*[:：]\s*"[^"\n]*")?(?:\s*[,，]\s*{mark}{value}{mark})?'
    verbs = r"|(?<=\s)is\b|是" if design.reasoning == "none" else ""
    reason = rf"(?:\s*[（(][^\n]{{0,{_LONGEST}}}?[)）])?"
    return re.compile(rf"(?P<field>{either}){mark}{keys}{reason}\s*(?:[:：=]{verbs})", re.IGNORECASE)


_LONGEST = 1000  # characters of a reason that is looked for: without a bound, 20,000 open brackets would take minutes


def _alone(word: str, behind: str = "A-Za-z0-9_") -> str:
    """A pattern of a word that is no part of a longer one; of a number that is no part of another and has no minus before it."""
    if re.fullmatch(r"-?\d+", word):
        return rf"(?<![A-Za-z0-9_.−－–-])(?<!\d,){re.escape(word)}(?![A-Za-z0-9_]|[.,−－–-]\d)"
    return (rf"(?<![{behind}])" if word[0].isascii() else "") + re.escape(word)


def _tolerant(one: Field, raw: Any, schema: Schema, design: Design) -> str | list[str] | None:
    """Raises ValueError where no value can be made out."""
    if raw is None:
        return one.empty
    text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False)
    if design.reasoning != "none" and isinstance(raw, str):  # the reason after the value
        text = re.sub(r"\A([^（(]*)[（(].*[)）]", r"\1", text, flags=re.DOTALL)
        text = re.sub(rf"[\"“]{re.escape(schema.names['reason'])}[\"”].*", "", text, flags=re.DOTALL)
    if not one.labels:
        pieces = re.findall(rf"\s*(?:{_QUOTED}|“[^“”]*”|'[^'\n]*')|[^,，、;；\[\]{{}}]+", text)
        spans = raw if isinstance(raw, list) and all(isinstance(span, str) for span in raw) else [_clean(piece) for piece in pieces]
        return [span for span in spans if not _is_nothing(span, schema)]
    labels = [*one.labels, schema.unmentioned]
    words = sorted({word for label in labels for word in label.known_as()}, key=len, reverse=True)
    text = text if any(_plain_numbers(word) != word for word in words) else _plain_numbers(text)
    exact = _lookup(labels, _bare(text))
    ends = r"(?![A-Za-z0-9_]|\.\d)"
    either = "|".join(
        (r"(?<!-\s)" if word[0].isdigit() else "") + _alone(word, "A-Za-z0-9_-") + (ends if word.isascii() else "")
        for word in words
    )
    said: dict[str, Word] = {}
    end = 0
    for found in re.finditer(either, text, re.IGNORECASE) if exact is None else []:
        if _NOT.search(text[max(end, found.start() - 40) : found.start()]):
            raise ValueError(f"{text.strip()!r} denies {found[0]!r}")
        end = found.end()
        said |= {label.name: label for label in [_lookup(labels, found[0])] if label}
    label = exact or (next(iter(said.values())) if len(said) == 1 else None)
    if label is None:
        raise ValueError(f"{text.strip()!r} names {'no label' if not said else 'several labels'}")
    return None if label is schema.unmentioned else label.name


_NOT = re.compile(  # what denies the label that follows
    r"(?:\b(?:not?|never|neither|nor|nothing|hardly|without|cannot)\b|n['’]t\b)[^,，;；。.!！?？:：\n]*\Z|(?:不(?!错)|[没无未]|非(?!常))\w{0,5}\Z",
    re.IGNORECASE,
)


def _plain_numbers(text: str) -> str:
    """Every minus as `-`, 1.0 as 1, .5 as 0.5."""
    text = re.sub(r"[−－–](?=\s?[\d.])", "-", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return re.sub(r"(?<=\d)\.0+(?!\.?\d)", "", text)


def _clean(piece: str) -> str:
    try:
        return _unquoted(piece.strip()) if piece.strip().startswith('"') else _bare(piece)
    except ValueError:
        return _bare(piece)


# --- scores and sweeps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """exact: share of rows whose whole record is right; accuracy: share of right fields (spans as sets), for all and for each;
    f1: of what is mentioned, counted over all rows (micro), so that an answer which calls everything unmentioned earns 0;
    wrong_strict, wrong_soft: answers of a wrong format, without and with tolerance. What is right is counted with tolerance."""

    rows: int
    exact: float
    accuracy: float
    f1: float
    fields: dict[str, float]
    wrong_strict: int
    wrong_soft: int


def score(gold: Sequence[Record], parsed: Sequence[Parsed], schema: Schema) -> Scores:
    def right(name: str, wanted: Record, got: Parsed) -> bool:
        value = wanted[name]
        other = got.record.get(name, "(not read)")
        return set(value) == set(other) if isinstance(value, list) and isinstance(other, list) else value == other

    pairs = list(zip(gold, parsed, strict=True))
    count = max(len(pairs), 1)
    each = {one.name: sum(right(one.name, *pair) for pair in pairs) / count for one in schema.fields}
    exact = sum(all(right(one.name, *pair) for one in schema.fields) for pair in pairs) / count
    said = [(_said(wanted), _said(got.record)) for wanted, got in pairs]
    both, total = sum(len(wanted & got) for wanted, got in said), sum(len(wanted) + len(got) for wanted, got in said)
    wrong = [sum(got.how in hows for got in parsed) for hows in (("soft", "failed"), ("failed",))]
    return Scores(len(pairs), exact, sum(each.values()) / len(each), 2 * both / total if total else 1.0, each, wrong[0], wrong[1])


def _said(record: Record) -> set[tuple[str, str]]:
    """(field, label or span) of all that is mentioned."""
    listed = ((name, value if isinstance(value, list) else [value]) for name, value in record.items())
    return {(name, one) for name, values in listed for one in values if one is not None}


def parse_rows(path: str, schema: Schema, design: Design) -> tuple[list[dict[str, Any]], list[Parsed], Scores | None]:
    """Predictions read back: the rows with `parsed`, `how` and `problems`, and scores where every row has its `record`."""
    rows, parsed, gold = [], [], []
    for where, row in rows_of(path):
        if not isinstance(row.get("prediction"), str):
            raise UserError(f"{where}: no text under 'prediction'; this row has {list(row)}; glmtune predict writes such rows")
        if taken := {"parsed", "how", "problems"} & row.keys():
            raise UserError(f"{where}: the row has a key '{min(taken)}' already, which would be lost; rename it")
        parsed.append(parse(row["prediction"], schema, design))
        rows.append({**row, "parsed": parsed[-1].record, "how": parsed[-1].how, "problems": list(parsed[-1].problems)})
        if isinstance(row.get("record"), dict):
            try:
                gold.append({one.name: _value(one, row["record"].get(one.name), schema) for one in schema.fields})
            except UserError as error:
                raise UserError(f"{where}: 'record': {error}") from None
    if gold and len(gold) < len(rows):
        raise UserError(
            f"{path}: {len(rows) - len(gold)} of {len(rows)} rows have no 'record' to compare with; give all or none one"
        )
    return rows, parsed, score(gold, parsed, schema) if gold else None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    if path.exists():
        raise UserError(f"{path} exists already and is never overwritten; choose another name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    files.whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sweep(
    train: Sequence[Item], test: Sequence[Item], schema: Schema, source: Path, base: Design, folder: Path, model: str
) -> list[str]:
    """Writes the same records under every variation of `base`: FOLDER/train, FOLDER/test, FOLDER/runs (one run file each), the schema
    (a copy of `source`), designs.yaml, and run.sh, which trains (its arguments are settings of every run), predicts, prints the table.
    Returns the designs' names."""
    designs = {one.name: one for one in variations(base, schema)}
    made = {name: [[sample(item, schema, one) for item in items] for items in (train, test)] for name, one in designs.items()}
    if folder.exists():
        raise UserError(f"{folder} exists already and is never overwritten; choose another folder, or remove it")
    with files.new_folder(folder) as work:
        for part in ("train", "test", "runs", "predictions"):
            (work / part).mkdir(parents=True)
        up = os.path.relpath(Path.cwd(), folder.absolute())  # every path is as seen from here, wherever run.sh is called from
        lines = ["set -e", f'cd "$(dirname "$0")"/{shlex.quote(up)}']
        for number, (name, rows) in enumerate(made.items(), 1):
            paths = [folder / part / f"{name}.jsonl" for part in ("train", "test", "predictions")]
            for part, own in zip(("train", "test"), rows):
                write_rows(work / part / f"{name}.jsonl", own)
            run, out = folder / "runs" / f"{name}.yaml", folder / "trained" / name
            stage = {"kind": "sft", "learn": designs[name].learn}
            tree = {"model": model, "data": str(paths[0]), "out": str(out), "stage": stage, "samples": []}
            files.whole(work / "runs" / f"{name}.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
            begin = shlex.join(["glmtune", "train", str(run), "--resume"])
            ask = shlex.join(["glmtune", "predict", str(out), str(paths[1]), "--out", str(paths[2])])
            say = f"echo 'design {number} of {len(made)}: {name}'"
            lines.append(f'[ -e {shlex.quote(str(paths[2]))} ] || {{ {say}; {begin} "$@"; {ask}; }}')
        lines.append(shlex.join(["glmtune", "data", "design", "--table", str(folder)]))
        files.whole(work / "run.sh", "\n".join(lines) + "\n")
        files.whole(work / "schema.yml", source.read_text(encoding="utf-8"))
        settings = {"language": schema.language, "designs": {name: asdict(one) for name, one in designs.items()}}
        files.whole(work / "designs.yaml", yaml.safe_dump(settings, sort_keys=False))
    return list(designs)


def table(folder: Path) -> dict[str, Scores | None]:
    """The scores of every design of a sweep; None where there are no predictions yet."""
    if not (folder / "designs.yaml").is_file():
        raise UserError(
            f"{folder} is no folder of a sweep; glmtune data design RECORDS --schema FILE --test FILE --sweep {folder} writes one"
        )
    settings = options.read(folder / "designs.yaml")
    schema = load_schema(folder / "schema.yml", settings["language"])
    found = {name: folder / "predictions" / f"{name}.jsonl" for name in settings["designs"]}
    return {
        name: parse_rows(str(path), schema, Design(**settings["designs"][name]))[2] if path.exists() else None
        for name, path in found.items()
    }

"""Strict, typed options: YAML and command-line overrides -> pydantic models. Knows no option by name.

Errors are collected, name the option by its dotted path, say what came and what was wanted, and guess what was meant.
"""

import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError, did_you_mean, shown
from .files import whole


class Options(BaseModel):
    """Base of every group of options: unknown names, wrong types and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Choice:
    """Marks a field that is one of several groups, told apart by `kind`: `Annotated[Options, Choice(registry)]`.

    The registry is a plain dict, so that a kind can be added from outside. A bare string stands for `{kind: string}`.
    """

    def __init__(self, registry: dict[str, type[Options]]):
        self.registry = registry


LARGEST = 1_000_000  # bytes of a YAML file
DEEPEST = 100  # levels in it, by aliases too
MOST = 20_000  # values in it, each as often as aliases say


class _Refused(Exception):
    """What is YAML, and means nothing that a file of options could say."""


class _NoValue(_Refused):
    """A value that is not of the kind that its tag or its looks say (`!!int x`, 2026-99-99)."""


class _Loader(yaml.SafeLoader):
    """YAML into plain values, where every key of a group stands once, in bounded time and memory.

    YAML 1.1 reads `2e-4` as a string; everybody who writes it means a number.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[int, tuple[int, int]] = {}  # values under a node, and levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        line, is_alias = self.peek_event().start_mark.line + 1, self.check_event(yaml.AliasEvent)  # type: ignore
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(f"not valid YAML: nested too deeply, in line {line}")
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            inner = [one for pair in inner for one in pair] if isinstance(node, yaml.MappingNode) else inner
            sizes = [self.sizes.get(id(one), (1, 1)) for one in inner]  # of a group that stands within itself nothing is known yet
            self.sizes[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        size, levels = self.sizes.get(id(node), (1, 1))
        if max(size, len(self.sizes)) > MOST or levels > DEEPEST:
            raise _Refused(f"more than {MOST:,} values or {DEEPEST} levels, with what aliases repeat, in line {line}")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of a Python dict: the constructor refuses it
            is_merge = key.tag == "tag:yaml.org,2002:merge"
            name, line = key.tag if is_merge else self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                raise _Refused(
                    f"'{key.value if len(key.value) <= 60 else key.value[:59] + '…'}' is given twice, in line {lines[name]} and in line {line}, "
                    "and one of them would be lost; remove or rename one"
                )
            lines[name] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            if isinstance(error, UnicodeError) or not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            line = node.start_mark.line + 1
            raise _NoValue(f"not valid YAML: {shown(node.value)} is no {_cut(kind, 60)}, in line {line}") from None


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read(path: str | Path) -> dict[str, Any]:
    """A run file as a tree. Raises UserError with file, line and column."""
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"there is no run file {path}{near}")
    tree = read_yaml(path)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a run file holds `name: value` lines; this one is a {type(tree).__name__}")
    return tree


def read_yaml(path: Path) -> Any:
    """What a YAML file says, as plain values. Raises UserError with file and line: for what is not YAML, for a key that stands twice, for
    more than options could be."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path} has more than {LARGEST:,} bytes, which is no file of options; is it a data file?")
        return _Loader(data.decode("utf-8-sig")).get_single_data()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _Refused as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {_cut(str(getattr(error, 'problem', None) or error))}") from None


def _cut(text: str, most: int = 200) -> str:
    """In one line, of at most so many characters."""
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"


def plain_value(text: str) -> Any:
    """A value of a command line as YAML; what is none stands for itself. Raises UserError for a key that stands twice, and for too much."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, _NoValue):
        return text
    except _Refused as error:
        raise UserError(f"{shown(text)}: {error}") from None


def override(tree: dict[str, Any], setting: str, model: type[Options] | None = None, before: Sequence[str] = ()) -> None:
    """Applies one `a.b=c` of the command line to a tree, in place. `before`: the settings that were applied already.

    The value is read as YAML; where `model` declares plain text, it is taken as it stands (unless it is null, or in quotes).
    """
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise UserError(f"{shown(setting)} is neither a run file nor a setting; settings look like optim.lr=1e-4")
    value: Any = text
    if text and (text == "null" or text[0] in "\"'" or not (model and _is_text(model, path.split(".")))):
        value = plain_value(text)
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, key, setting)
            continue
        child = node.get(key)
        if isinstance(child, str):  # `method: lora` and then method.rank=4
            child = {"kind": child}
        if child is None:
            child = {}
        if not isinstance(child, dict | list):
            raise UserError(
                f"{shown(setting)}: {_cut('.'.join(parents[: depth + 1]))} is {shown(child)}, which has no options inside"
            )
        node[key] = child
        node = child
    if isinstance(node, list):
        _item(node, last, setting)
        node[int(last)] = value
    else:
        node[last] = _other_kind(model, path, node.get(last), value, before)


def _other_kind(model: type[Options] | None, path: str, held: Any, value: Any, before: Sequence[str]) -> Any:
    """A bare kind (`optim=adafactor`) for a group that is written out already: it takes over the options that both kinds have.

    What the same command line gave stays in any case: `build` refuses it where the new kind has no such option.
    """
    field = model.model_fields.get(path) if model else None
    choice = next((mark for mark in field.metadata if isinstance(mark, Choice)), None) if field else None
    if choice is None or not isinstance(held, dict):
        return value
    stays = {setting.partition("=")[0].split(".")[1] for setting in before if setting.startswith(f"{path}.")}
    if isinstance(value, str) and value in choice.registry:
        stays |= choice.registry[value].model_fields.keys()
        value = {"kind": value}
    return {**{key: kept for key, kept in held.items() if key in stays}, **value} if isinstance(value, dict) else value


def _is_text(annotation: Any, path: list[str]) -> bool:
    """Whether the option at `path` is declared as text."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if not path:
        bare = {get_args(one)[0] if get_origin(one) is Annotated else one for one in get_args(annotation)}
        return annotation is str or (get_origin(annotation) in (Union, types.UnionType) and bare == {str, type(None)})
    if _is_group(annotation):
        field = annotation.model_fields.get(path[0])
        return field is not None and _is_text(field.annotation, path[1:])
    if get_origin(annotation) in (list, dict):
        return _is_text(get_args(annotation)[-1], path[1:])
    return any(_is_text(option, path) for option in get_args(annotation) if _is_group(option) or get_origin(option) in (list, dict))


def _item(node: list, key: str, setting: str) -> Any:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"{shown(setting)}: {shown(key)} is not a position in a list of {len(node)}")
    return node[int(key)]


def build(model: type[Options], tree: dict[str, Any], source: str = "") -> Any:
    """The typed options of a tree, or one UserError that lists everything that is wrong with it (at most three lines)."""
    problems = [f"{name}: holds a byte or a half of a character that is not UTF-8: {shown(text)}" for name, text in _halves(tree)]
    made = _build(model, tree, (), problems) if not problems else None
    if problems:
        head = f"{source}: " if source else ""
        more = f"\nand {len(problems) - 2} more problems" if len(problems) > 2 else ""
        raise UserError(head + "\n".join(_cut(problem, 500) for problem in problems[:2]) + more)
    return made


def _halves(tree: Any, name: str = "", around: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    """Texts with halves of surrogate pairs, by their options: they can be written to no file."""
    if isinstance(tree, str):
        if any("\ud800" <= letter <= "\udfff" for letter in tree):
            yield name, tree
    elif isinstance(tree, dict | list) and id(tree) not in around:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _halves(value, f"{name}.{key}" if name else str(key), (*around, id(tree)))


def _build(model: type[Options], tree: Any, path: tuple[str, ...], problems: list[str]) -> Any:
    if isinstance(tree, model):
        return tree
    name = ".".join(path)
    if not isinstance(tree, dict):
        problems.append(f"{name}: wanted a group of options ({', '.join(model.model_fields)}), got {shown(tree)}")
        return None
    values, before = {}, len(problems)
    for key, value in tree.items():
        here = (*path, str(key))
        field = model.model_fields.get(key)
        if field is None:
            problems.append(f"unknown option '{_cut('.'.join(here), 100)}'{did_you_mean(key, model.model_fields) or _known(model)}")
            continue
        values[key] = _value(field.annotation, field.metadata, value, here, problems)
    if len(problems) > before:
        return None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        seen: set[tuple] = set()
        for item in error.errors():
            if (item["loc"][:1]) not in seen:  # a union reports one error per member; the first is the closest
                problems.append(_explain(item, path))
            seen.add(item["loc"][:1])
        return None


def _value(annotation: Any, metadata: list, value: Any, here: tuple[str, ...], problems: list[str]) -> Any:
    """Turns groups and lists of groups into models first, so that their errors carry the whole path."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    for mark in metadata:
        if isinstance(mark, Choice):
            return _choose(mark.registry, value, here, problems)
    if _is_group(annotation) and not isinstance(value, Options):
        return _build(annotation, value, here, problems)
    if get_origin(annotation) is list and isinstance(value, list):
        inner = get_args(annotation)[0]
        return [_value(inner, [], item, (*here, str(i)), problems) for i, item in enumerate(value)]
    if get_origin(annotation) in (Union, types.UnionType) and isinstance(value, dict | list):
        for option in get_args(annotation):
            if (_is_group(option) and isinstance(value, dict)) or (get_origin(option) is list and isinstance(value, list)):
                return _value(option, [], value, here, problems)
    return value


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _choose(registry: dict[str, type[Options]], value: Any, here: tuple[str, ...], problems: list[str]) -> Any:
    if isinstance(value, Options):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    name = ".".join(here)
    if not isinstance(value, dict) or not isinstance(value.get("kind", ""), str):
        problems.append(f"{name}: wanted one of {', '.join(registry)}, or a group with `kind:`; got {shown(value)}")
        return None
    kind = value.get("kind", next(iter(registry)))
    if kind not in registry:
        problems.append(f"{name}.kind: {shown(kind)} is not one of {', '.join(registry)}{did_you_mean(kind, registry)}")
        return None
    foreign = {k for k in value if k != "kind" and k not in registry[kind].model_fields}
    for key in sorted(foreign):
        owners = [other for other, model in registry.items() if key in model.model_fields]
        if owners:
            problems.append(f"option '{name}.{key}' belongs to kind {' or '.join(owners)}; the kind here is '{kind}'")
            return None
    return _build(registry[kind], {**value, "kind": kind}, here, problems)


def _explain(item: Any, path: tuple[str, ...]) -> str:
    """One pydantic error in words: option, what came, what was wanted."""
    inner = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "list[", "literal["))]
    name = ".".join((*path, *[part for part in inner if part not in ("str", "int", "float", "bool", "dict")]))
    came = item["input"]
    if item["type"] == "missing":
        return f"'{name}' is missing" if name else "a required option is missing"
    if item["type"] == "literal_error":
        expected = str(item["ctx"]["expected"])
        known = re.findall(r"'([^']*)'", expected)
        text = shown(came).strip("'\"")
        return f"{name}: '{text}' is not one of {', '.join(known)}{did_you_mean(text, known)}"
    if item["type"] == "value_error":
        return f"{name}: {item['ctx']['error']}" if name else str(item["ctx"]["error"])
    wanted = item["msg"].removeprefix("Input should be ")
    return f"{name}: wanted {wanted}, got {shown(came)} ({type(came).__name__})"


def _known(model: type[Options]) -> str:
    return f"; known here: {', '.join(model.model_fields)}"


def plain(options: Options) -> dict[str, Any]:
    """Options as a tree of plain values, as written to run.yaml."""
    return options.model_dump(mode="json", serialize_as_any=True)


def write(options: Options, path: str | Path, header: str = "") -> None:
    text = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True, width=120)
    whole(path, header + text)


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names of the options whose values differ between two trees, with both values."""
    for key in [*old, *[key for key in new if key not in old]]:
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, name + ".")
        elif a != b:
            yield f"{name} ({said(a)} there, {said(b)} now)"


def said(value: Any) -> str:
    """A value as it would be written in a run file."""
    return json.dumps(value, ensure_ascii=False, default=str)


def changed(tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree that is not as in `default`."""
    kept = {}
    for key, value in tree.items():
        other = default.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and value.get("kind") == other.get("kind"):
            value = changed(value, other)
            if value:
                kept[key] = value
        elif value != other:
            kept[key] = (
                [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
                if isinstance(value, list)
                else value
            )
    return kept


def document(model: type[Options], path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every option, from its declaration."""
    for name, field in model.model_fields.items():
        here, annotation = f"{path}{name}", field.annotation
        default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
        registry = next((mark.registry for mark in field.metadata if isinstance(mark, Choice)), None)
        if registry:
            yield here, " | ".join(registry), default, field.description or ""
            for kind, group in registry.items():
                yield from (row for row in document(group, f"{here}.{kind}.") if not row[0].endswith(".kind"))
            continue
        inner = _inner_group(annotation)
        if inner is None:
            yield here, _type_name(annotation), default, field.description or ""
        elif _is_group(annotation):
            yield from document(inner, here + ".")
        else:
            yield here, _type_name(annotation), default, field.description or ""
            yield from document(inner, here + "[].")


def _inner_group(annotation: Any) -> Any:
    if _is_group(annotation):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _inner_group(arg)) is not None), None)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return f"map of {_type_name(args[0])} to {_type_name(args[1])}"
    if _is_group(annotation) or (isinstance(annotation, type) and issubclass(annotation, dict)):
        return "group"
    name = str(annotation.__name__)
    return {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}.get(name, name)


def _show(value: Any) -> str:
    if isinstance(value, Options):
        return str(getattr(value, "kind", ""))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

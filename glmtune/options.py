"""Strict, typed options: YAML and command-line overrides -> pydantic models. Knows no option by name.

Errors are collected, name the option by its dotted path, say what came and what was wanted, and guess what was meant.
"""

import contextlib
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError, did_you_mean
from .files import whole as write_whole


class Options(BaseModel):
    """Base of every group of options: unknown names, wrong types and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Choice:
    """Marks a field that is one of several groups, told apart by `kind`: `Annotated[Options, Choice(registry)]`.

    The registry is a plain dict, so that a kind can be added from outside. A bare string stands for `{kind: string}`.
    """

    def __init__(self, registry: dict[str, type[Options]]):
        self.registry = registry


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string; everybody who writes it means a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read(path: str | Path) -> dict[str, Any]:
    """A run file as a tree. Raises UserError with file, line and column."""
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"there is no run file {path}{near}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a run file holds `name: value` lines; this one is a {type(tree).__name__}")
    return tree


def override(tree: dict[str, Any], setting: str, model: type[Options] | None = None, before: Sequence[str] = ()) -> None:
    """Applies one `a.b=c` of the command line to a tree, in place. `before`: the settings that were applied already.

    The value is read as YAML; where `model` declares plain text, it is taken as it stands (unless it is null, or in quotes).
    """
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise UserError(f"'{setting}' is neither a run file nor a setting; settings look like optim.lr=1e-4")
    value: Any = text
    if text and (text == "null" or text[0] in "\"'" or not (model and _is_text(model, path.split(".")))):
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.load(text, _Loader)
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
            raise UserError(f"'{setting}': {'.'.join(parents[: depth + 1])} is {child!r}, which has no options inside")
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
        return annotation is str or (
            get_origin(annotation) in (Union, types.UnionType) and set(get_args(annotation)) == {str, type(None)}
        )
    if _is_group(annotation):
        field = annotation.model_fields.get(path[0])
        return field is not None and _is_text(field.annotation, path[1:])
    if get_origin(annotation) in (list, dict):
        return _is_text(get_args(annotation)[-1], path[1:])
    return any(_is_text(option, path) for option in get_args(annotation) if _is_group(option) or get_origin(option) in (list, dict))


def _item(node: list, key: str, setting: str) -> Any:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"'{setting}': '{key}' is not a position in a list of {len(node)}")
    return node[int(key)]


def build(model: type[Options], tree: dict[str, Any], source: str = "") -> Any:
    """The typed options of a tree, or one UserError that lists everything that is wrong with it (at most three lines)."""
    problems: list[str] = []
    made = _build(model, tree, (), problems)
    if problems:
        head = f"{source}: " if source else ""
        more = f"\nand {len(problems) - 2} more problems" if len(problems) > 2 else ""
        raise UserError(head + "\n".join(problems[:2]) + more)
    return made


def _build(model: type[Options], tree: Any, path: tuple[str, ...], problems: list[str]) -> Any:
    if isinstance(tree, model):
        return tree
    name = ".".join(path)
    if not isinstance(tree, dict):
        problems.append(f"{name}: wanted a group of options ({', '.join(model.model_fields)}), got {tree!r}")
        return None
    values, before = {}, len(problems)
    for key, value in tree.items():
        here = (*path, str(key))
        field = model.model_fields.get(key)
        if field is None:
            problems.append(f"unknown option '{'.'.join(here)}'{did_you_mean(key, model.model_fields) or _known(model)}")
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
        problems.append(f"{name}: wanted one of {', '.join(registry)}, or a group with `kind:`; got {value!r}")
        return None
    kind = value.get("kind", next(iter(registry)))
    if kind not in registry:
        problems.append(f"{name}.kind: '{kind}' is not one of {', '.join(registry)}{did_you_mean(kind, registry)}")
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
        return f"{name}: '{came}' is not one of {', '.join(known)}{did_you_mean(str(came), known)}"
    if item["type"] == "value_error":
        return f"{name}: {item['ctx']['error']}" if name else str(item["ctx"]["error"])
    wanted = item["msg"].removeprefix("Input should be ")
    return f"{name}: wanted {wanted}, got {came!r} ({type(came).__name__})"


def _known(model: type[Options]) -> str:
    return f"; known here: {', '.join(model.model_fields)}"


def plain(options: Options) -> dict[str, Any]:
    """Options as a tree of plain values, as written to run.yaml."""
    return options.model_dump(mode="json", serialize_as_any=True)


def write(options: Options, path: str | Path, header: str = "") -> None:
    text = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True, width=120)
    write_whole(path, header + text)


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

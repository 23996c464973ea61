"""What an entry of `data:` stands for -> files: a path, a folder, a pattern, the name of a data set, the id of one on a hub.

Names come from the registry: data.yaml (or a LLaMA-Factory dataset_info.json), then registry.yaml, which is shipped with glmtune.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from . import hub
from .errors import UserError, did_you_mean
from .reading import DataError, find_files, is_data_name, left_out, some


class Source(Protocol):
    """One entry of `data:`; the run file's typed model has these fields (and `share`), and so has Found."""

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
class Entry:
    """A data set that has a name: what a registry file says of it."""

    path: str | None = None  # in a file: relative to the registry's folder
    hub: str | None = None  # owner/name[@revision][:split or files]
    modelscope: str | None = None  # the same there; chosen by `modelscope:NAME`, or where there is no hub
    format: str | None = None
    columns: dict[str, str] | None = None
    sha256: str | None = None  # of its one file
    weight: float = 1.0
    max_samples: int | None = None
    system: str | None = None
    licence: str | None = None
    note: str | None = None
    tags: dict[str, str] | None = None  # what messages call their keys and roles, as in dataset_info.json
    refused: str | None = None  # why it cannot be used
    sha1: str | None = None  # in place of sha256, as dataset_info.json has it
    registry: str = ""  # the file that says so


@dataclass(frozen=True)
class Found:
    """A source with its files. A Source itself, in which the registry's word and the run's are one."""

    path: str
    files: list[tuple[Path, str]]  # each with its name for messages
    format: str | None = None
    columns: dict[str, str] | None = None
    weight: float = 1.0
    max_samples: int | None = None
    system: str | None = None
    share: float | None = None
    tags: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    origin: str = ""  # where the registry speaks of it, for messages: "FILE: NAME: "

    def adapt(self, row: Any) -> Any:
        """A row with the usual names inside of its messages, where the registry says how they differ."""
        if not self.tags or not isinstance(row, dict):
            return row
        keys = {(self.columns or {}).get(name, usual) for name, usual in _TAGGED.items()}
        return {key: self._untagged(value) if key in keys else value for key, value in row.items()}

    def _untagged(self, value: Any) -> Any:
        tags = self.tags or {}
        role, text = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        if isinstance(value, list):
            return [self._untagged(message) if isinstance(message, dict) else message for message in value]
        if not isinstance(value, dict):
            return value
        if role not in value or text not in value:
            if any(
                {usual["role_tag"], usual["content_tag"]} <= value.keys() for usual in _USUAL
            ):  # it would pass, and tags be idle
                name, key = ("content_tag", text) if role in value else ("role_tag", role)
                near = did_you_mean(key, value)
                raise UserError(f"{self.origin}tags: {name} is '{key}', but a message has the keys {some(list(value))}{near}")
            return value
        roles = {tags[tag]: name for tag, name in _ROLES.items() if tag in tags}
        rest = {key: one for key, one in value.items() if key not in (role, text)}
        said = value[role]
        return {"role": roles.get(said, said) if isinstance(said, str) else said, "content": value[text], **rest}


_TAGGED = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}  # where messages stand, by columns
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_SAME = {"system_tag": "system", "observation_tag": "observation", "function_tag": "function_call"}
_USUAL = [  # tags of rows that need no help
    {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", **_SAME},
    {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", **_SAME},
]


def find(
    sources: Sequence[Source], registry: str | Path | None = None, say: Callable[[str], None] = lambda text: None
) -> list[Found]:
    """The files of all sources; those of a hub are fetched at first use, and `say` tells of it. What is Found already stays.

    registry: a data.yaml or dataset_info.json; None: ./data.yaml if it is there. Raises UserError for what is not there, for a
    file whose sha256 is not the registry's, and for a data set that cannot be used.
    """
    known: dict[str, Entry] = {} if all(isinstance(source, Found) for source in sources) else names(registry)
    return [source if isinstance(source, Found) else _find(source, known, say) for source in sources]


def _find(source: Source, known: Mapping[str, Entry], say: Callable[[str], None]) -> Found:
    scheme, name = ("modelscope", source.path[11:]) if source.path.startswith("modelscope:") else ("", source.path)
    entry, notes = known.get(name), []
    if Path(source.path).expanduser().exists():
        notes = [f"{source.path}: the file here is meant, not the data set of that name"] if entry else []
        entry = None
    if entry is None:
        files = _on_a_hub(source.path, source.path, say) if _is_id(source.path) else _here(source.path, known)
        entry, notes = Entry(), [*notes, *left_out(source.path)]
    else:
        files = _of_entry(entry, source.path, scheme, say)
        notes += [f"{source.path}: {entry.note}"] if entry.note else []
    for kind, wanted in (("sha256", entry.sha256), ("sha1", entry.sha1)):
        if wanted:
            _check_digest(source.path, files, kind, wanted)
    own = source.format is not None or source.columns is not None
    return Found(
        source.path,
        files,
        source.format if own else entry.format,
        source.columns if own else entry.columns,
        source.weight * entry.weight,
        source.max_samples if source.max_samples is not None else entry.max_samples,
        source.system if source.system is not None else entry.system,
        share_of(source),
        None if own else entry.tags,
        notes,
        f"{entry.registry}: {name}: " if entry.registry and not own else "",
    )


def share_of(source: Source) -> float | None:
    return getattr(source, "share", None)  # a source need not have one


def _is_id(path: str) -> bool:
    """Whether something that is no name stands for a data set of a hub; `data/trian.json` is a file that is not there."""
    name = path.removeprefix("hf:").removeprefix("modelscope:").partition(":")[0]
    if path.startswith(("hf:", "modelscope:")):
        return True
    here = Path(path).expanduser()
    return hub.is_id(name) and not is_data_name(name) and not here.exists() and not here.parent.is_dir()


def _on_a_hub(id: str, shown: str, say: Callable[[str], None]) -> list[tuple[Path, str]]:
    scheme = "modelscope:" if id.startswith("modelscope:") else ""
    name, _, pick = id.removeprefix("hf:").removeprefix("modelscope:").partition(":")
    return [(path, f"{shown.removesuffix(':' + pick)}/{file}") for path, file in hub.download_data(scheme + name, pick, say)]


def _here(path: str, known: Mapping[str, Entry]) -> list[tuple[Path, str]]:
    try:
        return find_files(path)
    except DataError as error:
        near = did_you_mean(path, known) if "/" not in path else ""
        raise UserError(f"{error}{near and f'; or of the data sets that have names{near}'}") from None


def _of_entry(entry: Entry, shown: str, scheme: str, say: Callable[[str], None]) -> list[tuple[Path, str]]:
    if entry.refused:
        raise UserError(f"the data set '{shown}' cannot be used: {entry.refused}")
    if scheme and not entry.modelscope:
        raise UserError(f"nothing is known of the data set '{shown}' on ModelScope; it stands under {entry.path or entry.hub}")
    if entry.path and not scheme:
        try:
            return find_files(entry.path)
        except DataError as error:
            raise UserError(f"the data set '{shown}': {error}") from None
    id = entry.hub if entry.hub and not scheme else f"modelscope:{entry.modelscope}"
    return _on_a_hub(id, shown, say)


def _check_digest(shown: str, files: list[tuple[Path, str]], kind: str, wanted: str) -> None:
    if len(files) != 1:
        raise UserError(f"the data set '{shown}' has {len(files)} files, and the registry one {kind}; name one file")
    digest = hashlib.new(kind)
    with open(files[0][0], "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wanted.lower():
        raise UserError(
            f"{files[0][1]} is not the file that the registry means by '{shown}'; if it is the right one, mend the {kind} there\n"
            f"its {kind} is {digest.hexdigest()}\nwanted{' ' * len(kind)}    {wanted.lower()}"
        )


# --- the registry ---------------------------------------------------------------------------------------------------------


def names(registry: str | Path | None = None) -> dict[str, Entry]:
    """Every data set that has a name, the user's own first; see `find`."""
    path = Path(registry) if registry is not None else Path("data.yaml")
    if registry is not None and not path.is_file():
        raise UserError(f"registry: there is no file '{registry}'")
    own = read_registry(path) if path.is_file() else {}
    return {**own, **{name: entry for name, entry in _shipped().items() if name not in own}}


@functools.cache
def _shipped() -> dict[str, Entry]:
    return read_registry(Path(__file__).with_name("registry.yaml"))


def read_registry(path: Path) -> dict[str, Entry]:
    """{name: Entry} of a data.yaml, or of a dataset_info.json as LLaMA-Factory has it. What is wrong with one entry makes that one
    `refused`, by file and name; raises UserError for what is wrong with the file."""
    theirs = path.suffix == ".json"
    tree, own = (_json(path) if theirs else _yaml(path)), (_of_llama_factory if theirs else _entry)
    if not isinstance(tree, dict):
        wanted = '`"name": {"file_name": "FILE"}`' if theirs else "`name: {path: FILE}` or `name: {hub: owner/name}`"
        raise UserError(f"{path}: a registry of data sets holds {wanted}; this one is a {type(tree).__name__}")
    found = {}
    for name, given in tree.items():
        try:
            if not isinstance(given, dict):
                raise UserError(f"wanted `name: {{path: FILE}}` or `name: {{hub: owner/name}}`, got {given!r:.99}")
            found[str(name)] = replace(own(given, path.parent), registry=str(path))
        except UserError as error:
            found[str(name)] = Entry(refused=f"{path}: {name}: {error}", note=f"cannot be used: {error}")
    return found


def _json(path: Path) -> Any:
    twice: list[str] = []

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(_twice(name for name, _ in pairs))
        return dict(pairs)

    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=made)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    _refuse_twice(path, twice)
    return tree


def _yaml(path: Path) -> Any:
    from .options import read_yaml

    tree = read_yaml(path)
    return {} if tree is None else tree


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _refuse_twice(path: Path, names: Sequence[str]) -> None:
    if names:
        raise UserError(f"{path}: '{names[0]}' is given twice, and one of them would be lost; remove or rename one")


_TAGS = dict.fromkeys(["role_tag", "content_tag", *_ROLES], str)
_MEDIA = ("images", "videos", "audios")
_THEIR_COLUMNS = {  # -> ours
    **{name: name for name in ("prompt", "response", "system", "history", "messages", "tools", "chosen", "rejected")},
    "query": "input", "kto_tag": "label",
}  # fmt: skip
_OURS: dict[str, Any] = {
    **dict.fromkeys(["path", "hub", "modelscope", "format", "sha256", "system", "licence", "note"], str),
    "columns": dict.fromkeys([*_THEIR_COLUMNS.values(), "text", "weight"], str), "tags": _TAGS, "weight": float, "max_samples": int,
}  # fmt: skip
_THEIRS: dict[str, Any] = {
    **dict.fromkeys(["file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_sha1"], str),
    **dict.fromkeys(["formatting", "subset", "split", "folder"], str), "num_samples": int, "ranking": bool,
    "columns": dict.fromkeys([*_THEIR_COLUMNS, *_MEDIA], str), "tags": _TAGS,
}  # fmt: skip


def _checked(given: dict[str, Any], known: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """What is given and not null, all of it of the known names and kinds; a kind may be a group of names."""
    made = {}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{place}unknown option '{key}'; options are {', '.join(known)}{did_you_mean(str(key), known)}")
        kind = dict if isinstance(known[key], dict) else known[key]
        if value is None:
            continue
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{place}{key}: wanted {kind.__name__}, got {value!r:.99}")
        if kind in (int, float) and not 0 < value < 2**63:
            raise UserError(f"{place}{key}: wanted more than 0{' and finite' if value > 0 else ''}, got {value!r:.99}")
        made[key] = _checked(value, known[key], f"{key}: ") if kind is dict else value
    return made


def _entry(given: dict[str, Any], folder: Path) -> Entry:
    made = _checked(given, _OURS)
    if not any(made.get(key) for key in ("path", "hub", "modelscope")):
        raise UserError(f"needs path:, hub: or modelscope:; it has {some(list(given))}")
    if "tags" in made and "columns" not in made:
        made.setdefault("format", "sharegpt")  # messages stand under `conversations`
    if "tags" in made and "messages" not in made.get("columns", {}) and ("columns" in made or made["format"] != "sharegpt"):
        raise UserError("tags: say which key holds the messages: columns: {messages: KEY}")
    return Entry(**{**made, **({"path": _beside(folder, made["path"])} if made.get("path") else {})})


def _beside(folder: Path, path: str) -> str:
    return str(folder / Path(path).expanduser())  # an absolute path stays as it is


def _of_llama_factory(given: dict[str, Any], folder: Path) -> Entry:
    made = _checked(given, _THEIRS)
    theirs = {name: key for name, key in made.get("columns", {}).items() if key}
    media = [name for name in _MEDIA if name in theirs]
    columns = {_THEIR_COLUMNS[name]: key for name, key in theirs.items() if name not in media}
    refused = f"it has {' and '.join(media)}, which glmtune does not read" if media else None
    if made.get("formatting", "alpaca") not in _FORMATTING:
        near = did_you_mean(made["formatting"], _FORMATTING)
        raise UserError(f"formatting: '{made['formatting']}' is not one of {', '.join(_FORMATTING)}{near}")
    file, on_hf, on_ms = made.get("file_name"), made.get("hf_hub_url"), made.get("ms_hub_url")
    if not (file or on_hf or on_ms):
        if "script_url" not in made:
            raise UserError(f"needs file_name, hf_hub_url or ms_hub_url; it has {some(list(given))}")
        refused = "it is a loading script, and code that came with data is never run"
    parts = [made[name] for name in ("folder", "subset", "split") if made.get(name)]
    pick = ":" + (parts[0] if parts == [made.get("split")] else f"*{'*'.join(parts)}*") if parts else ""
    tags = made.get("tags", {})
    of_a_file = bool(file and not (on_hf or on_ms))
    idle = ["om_hub_url", "script_url", "cloud_file_name"]
    idle += ["folder", "subset", "split"] if of_a_file else ["file_name", "file_sha1"]
    told = [name for name in idle if made.get(name)]
    return Entry(
        path=_beside(folder, file) if file and of_a_file else None,
        hub=on_hf + pick if on_hf else None,
        modelscope=on_ms + pick if on_ms else None,
        columns=columns or None,
        format="sharegpt" if made.get("formatting") == "sharegpt" and not columns else None,
        max_samples=made.get("num_samples"),
        note=f"not used here: {', '.join(told)}" if told and not refused else None,
        tags=None if any(tags.items() <= usual.items() for usual in _USUAL) else tags,
        refused=refused,
        sha1=made.get("file_sha1") if of_a_file else None,
    )


_FORMATTING = ("alpaca", "sharegpt", "openai")

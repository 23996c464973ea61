"""What an entry of `data:` stands for -> files: a path, a folder, a pattern, the name of a data set, the id of one on a hub.

Names come from the registry: data.yaml (or a LLaMA-Factory dataset_info.json), then registry.yaml, which is shipped with glmtune.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from . import hub
from .errors import UserError, did_you_mean
from .reading import DataError, find_files, is_data_name, some


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

    def adapt(self, row: Any) -> Any:
        """A row with the usual names inside of its messages, where the registry says how they differ."""
        key = (self.columns or {}).get("messages", "conversations")
        if not self.tags or not isinstance(row, dict) or not isinstance(row.get(key), list):
            return row
        role, text = self.tags.get("role_tag", "from"), self.tags.get("content_tag", "value")
        roles = {self.tags[tag]: name for tag, name in _ROLES.items() if tag in self.tags}
        return {**row, key: [_untagged(message, role, text, roles) for message in row[key]]}


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


def _untagged(message: Any, role: str, text: str, roles: dict[str, str]) -> Any:
    if not isinstance(message, dict) or role not in message or text not in message:
        return message
    rest = {key: value for key, value in message.items() if key not in (role, text)}
    said = message[role]
    return {"role": roles.get(said, said) if isinstance(said, str) else said, "content": message[text], **rest}


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
        entry = Entry()
    else:
        files = _of_entry(entry, source.path, scheme, say)
        notes += [f"{source.path}: {entry.note}"] if entry.note else []
    if entry.sha256:
        _check_sha256(source.path, files, entry.sha256)
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


def _check_sha256(shown: str, files: list[tuple[Path, str]], wanted: str) -> None:
    if len(files) != 1:
        raise UserError(f"the data set '{shown}' has {len(files)} files, and the registry one sha256; name one file")
    digest = hashlib.sha256()
    with open(files[0][0], "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wanted.lower():
        raise UserError(
            f"{files[0][1]} is not the file that the registry means by '{shown}'\n"
            f"its sha256 is {digest.hexdigest()}\nwanted          {wanted.lower()}"
        )


# --- the registry ---------------------------------------------------------------------------------------------------------


def names(registry: str | Path | None = None) -> dict[str, Entry]:
    """Every data set that has a name, the user's own first; see `find`."""
    path = Path(registry) if registry is not None else Path("data.yaml")
    if registry is not None and not path.is_file():
        raise UserError(f"registry: there is no file '{registry}'")
    own = read_registry(path) if path.is_file() else {}
    shipped = read_registry(Path(__file__).with_name("registry.yaml"))
    return {**own, **{name: entry for name, entry in shipped.items() if name not in own}}


def read_registry(path: Path) -> dict[str, Entry]:
    """{name: Entry} of a data.yaml, or of a dataset_info.json as LLaMA-Factory has it. Raises UserError by file and name."""
    if path.suffix == ".json":
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
        return {name: _of_llama_factory(f"{path}: {name}", entry, path.parent) for name, entry in _groups(path, tree)}
    from .options import read

    return {name: _entry(f"{path}: {name}", entry, path.parent) for name, entry in _groups(path, read(path))}


def _groups(path: Path, tree: Any) -> list[tuple[str, dict[str, Any]]]:
    for name, entry in tree.items() if isinstance(tree, dict) else [("the file", tree)]:
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {name}: wanted `name: {{path: FILE}}` or `name: {{hub: owner/name}}`, got {entry!r}")
    return [(str(name), entry) for name, entry in tree.items()]


_KINDS: dict[str, tuple[type, ...]] = {"weight": (int, float), "max_samples": (int,), "columns": (dict,), "tags": (dict,)}


def _entry(where: str, given: dict[str, Any], folder: Path) -> Entry:
    known = [one.name for one in fields(Entry) if one.name != "refused"]
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where}: unknown option '{key}'; options are {', '.join(known)}{did_you_mean(str(key), known)}")
        kinds = _KINDS.get(key, (str,))
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise UserError(f"{where}: {key}: wanted {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
        if key in ("weight", "max_samples") and value is not None and value <= 0:
            raise UserError(f"{where}: {key}: wanted more than 0, got {value!r}")
    if not any(given.get(key) for key in ("path", "hub", "modelscope")):
        raise UserError(f"{where}: needs path:, hub: or modelscope:; it has {some(list(given))}")
    given = {key: value for key, value in given.items() if value is not None}
    return Entry(**{**given, **({"path": _beside(folder, given["path"])} if "path" in given else {})})


def _beside(folder: Path, path: str) -> str:
    return str(folder / Path(path).expanduser())  # an absolute path stays as it is


_THEIR_COLUMNS = {"query": "input", "kto_tag": "label"}  # the others are called alike
_MEDIA = ("images", "videos", "audios")


def _of_llama_factory(where: str, given: dict[str, Any], folder: Path) -> Entry:
    columns = {str(_THEIR_COLUMNS.get(name, name)): key for name, key in (given.get("columns") or {}).items() if key}
    media = [name for name in _MEDIA if columns.pop(name, None)]
    refused = f"it has {' and '.join(media)}, which glmtune does not read" if media else None
    file, on_hf, on_ms = given.get("file_name"), given.get("hf_hub_url"), given.get("ms_hub_url")
    if not (file or on_hf or on_ms):
        if "script_url" not in given:
            raise UserError(f"{where}: needs file_name, hf_hub_url or ms_hub_url; it has {some(list(given))}")
        refused = "it is a loading script, and code that came with data is never run"
    parts = [str(given[name]) for name in ("folder", "subset", "split") if given.get(name)]
    pick = ":" + (parts[0] if parts == [given.get("split")] else f"*{'*'.join(parts)}*") if parts else ""
    tags = dict(given.get("tags") or {})
    return Entry(
        path=_beside(folder, file) if file and not (on_hf or on_ms) else None,
        hub=on_hf + pick if on_hf else None,
        modelscope=on_ms + pick if on_ms else None,
        columns=columns or None,
        format="sharegpt" if given.get("formatting") == "sharegpt" and not columns else None,
        max_samples=given.get("num_samples"),
        tags=None if any(tags.items() <= usual.items() for usual in _USUAL) else tags,
        refused=refused,
    )

"""What MODEL stands for: the built-in model, a folder, a hub id, a run's folder or one of its checkpoints -> folders on this disk."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..chat import read_object
from ..data import fill
from ..errors import UserError, did_you_mean
from ..options import build, read
from ..run import Run, moment
from . import smollm2


@dataclass(frozen=True)
class Place:
    """What MODEL on the command line stands for: a base folder, and for a run's folder also its adapter, system and template."""

    name: str  # what the user called the base model
    base: Path
    adapter: Path | None = None
    system: str | None = None
    template: Any = "auto"  # str or Form
    quant: str | None = None  # how a run kept its base: what was learned fits those numbers
    now: datetime.datetime | None = None  # when a run was started: what its prompts said, they say afterwards too
    join: str | None = None  # between instruction and input, as it was trained; None: the template's usual one

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer counts: what was trained carries its own."""
        return self.adapter if self.adapter is not None and (self.adapter / "tokenizer.json").is_file() else self.base


def locate(model: str | Path, adapter: str | Path | None = None, say=lambda text: None) -> Place:
    """Finds a model: the built-in one, a model folder, a hub id, a run's folder OUT or one of its checkpoints/step-N."""
    path = Path(model).expanduser()
    run_file = _run_file(path)
    if run_file is None:
        return Place(str(model), resolve(str(model), say), _adapter(adapter, say))
    found = _trained(path, say)
    run = _read(run_file)
    whole = (found / "config.json").is_file()
    return Place(
        run.model,
        found if whole else _base(run.model, found, say),
        _adapter(adapter, say) or (None if whole else found),
        fill(run.system, run.variables) if run.system is not None else None,
        run.template,
        (run.resolved or {}).get("quant") or run.quant,
        moment((run.resolved or {}).get("date") or run.date),
        run.join,
    )


def _read(run_file: Path) -> Run:
    """What a run's file says of its result, checked. How it was trained does not count here, and may be of an older version."""
    tree = read(run_file)
    kept = {
        name: tree[name]
        for name in ("model", "system", "template", "quant", "date", "join", "variables", "resolved")
        if name in tree
    }
    source = f"{run_file} is not as train wrote it (each of its checkpoints holds a copy)"
    return build(Run, {**kept, "data": [{"path": ""}], "out": ""}, source)


def _run_file(path: Path) -> Path | None:
    """The run.yaml that made what is in `path`: its own, or its parent's for OUT/adapter and OUT/model. Only train writes `resolved:`."""
    if (path / "run.yaml").is_file() and (not (path / "config.json").is_file() or read(path / "run.yaml").get("resolved")):
        return path / "run.yaml"
    parent = path.parent / "run.yaml"
    made_here = path.is_dir() and path.name in ("adapter", "model") and parent.is_file() and read(parent).get("resolved")
    return parent if made_here else None


def _base(name: str, adapter: Path, say) -> Path:
    """The base of a run. A folder that was given relative to another working directory is found through the adapter's config."""
    try:
        return resolve(name, say)
    except UserError:
        base = adapter_config(adapter).get("base_model_name_or_path")
        if isinstance(base, str) and base and Path(base).is_dir():
            return Path(base)
        raise


def adapter_config(path: str | Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's or a run's folder; empty where there is none. Raises UserError where it is broken."""
    folder = Path(path).expanduser()
    return read_object(folder / "adapter_config.json") or read_object(folder / "adapter" / "adapter_config.json")


def _adapter(adapter: str | Path | None, say) -> Path | None:
    return _trained(Path(adapter).expanduser(), say) if adapter is not None else None


def _trained(path: Path, say) -> Path:
    """The folder inside a run (or checkpoint) that holds what was trained."""
    for folder in (path, path / "adapter", path / "model"):
        if (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if (path / "checkpoints").is_dir():
        steps = sorted((p for p in (path / "checkpoints").glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
        if steps:
            found = _trained(steps[-1], say)
            say(f"{path} holds no finished adapter or model; taking its newest checkpoint, {found}")
            return found
    weights = next((file for folder in (path, path / "adapter") for file in folder.glob("adapter_model.*")), None)
    if weights is not None:
        raise UserError(f"adapter_config.json is missing beside {weights}; copy it from where the adapter was trained")
    missing = ": neither adapter_config.json nor config.json is there"
    if (path / "run.yaml").is_file() and not (path / "finished.json").is_file():
        missing = f" yet; finish the run first: glmtune train {path / 'run.yaml'} --resume"
    raise UserError(f"{path} holds no trained adapter or model{missing}")


def resolve(name: str, say=lambda text: None) -> Path:
    """The folder of a base model: built in, local, or from the Hugging Face hub. Raises UserError."""
    if name == smollm2.NAME:
        return smollm2.folder(say)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: it holds no config.json")
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; a model is a folder with config.json, tokenizer.json and *.safetensors")
    if not hub.is_id(name):
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, [*siblings, smollm2.NAME])
        raise UserError(
            f"there is no model '{name}': no such folder{near}\nA model is {smollm2.NAME}, a folder, or a hub id like Qwen/Qwen2.5-0.5B-Instruct"
        )
    return hub.download(name, say)

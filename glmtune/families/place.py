"""What MODEL stands for: the built-in model, a folder, a hub id, a run's folder or one of its checkpoints -> folders on this disk."""

import datetime
import re
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
from .fingerprint import fingerprint, trained_on


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
    """Finds a model: the built-in one, a model folder, a hub id, a run's folder OUT or one of its checkpoints/step-N.

    What the user names counts, with a warning where `adapter` was trained on another base. What a run recorded must be there: UserError as `base_of`.
    """
    path = Path(model).expanduser()
    run_file = _run_file(path)
    if run_file is None:
        base, other = resolve(str(model), say), _adapter(adapter, say)
        _say_if_foreign(base, other, say)
        return Place(str(model), base, other)
    found = _trained(path, say)
    run = _read(run_file)
    whole = (found / "config.json").is_file()
    base, other = found if whole else base_of(run, found, say), _adapter(adapter, say)
    _say_if_foreign(base, other, say)
    return Place(
        run.model,
        base,
        other or (None if whole else found),
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


def base_of(run: Run, trained: Path, say=lambda text: None) -> Path:
    """The base that a run was trained on: what lies at the recorded absolute path, else what its `model` names from here.

    trained: the adapter or checkpoint. Raises UserError where neither has the recorded fingerprint. Runs of glmtune 0.3.0 have none; their
    adapter's config names the folder.
    """
    resolved = run.resolved or {}
    known = resolved.get("fingerprint")
    given = resolved.get("base") or adapter_config(trained).get("base_model_name_or_path")
    recorded = Path(given) if isinstance(given, str) and Path(given).is_absolute() else None
    if recorded is not None and (recorded / "config.json").is_file():
        if known is None or fingerprint(recorded) == known:
            return recorded
        here = Path(run.model).expanduser()
        if (
            here.is_dir() and fingerprint(resolve(run.model, say)) == known
        ):  # the project was moved, and another model lies where it was
            return here
        raise _other_base(run, trained, recorded, f"what lies there now is another (fingerprint {fingerprint(recorded)[:12]})")
    # A folder's name may look like a hub id: what was local is not asked for on a hub.
    if recorded is not None and not _named_anew(run.model, recorded):
        raise _other_base(run, trained, recorded, "it is not there any more")
    base = resolve(run.model, say)
    if known is not None and fingerprint(base) != known:
        raise _other_base(run, trained, recorded or base, f"{base} is another (fingerprint {fingerprint(base)[:12]})")
    if known is None and recorded is not None:
        say(
            f"warning: the base {recorded} is gone; taking {base}. Whether that is the same cannot be told: the run has no fingerprint of it"
        )
    return base


def _named_anew(name: str, recorded: Path) -> bool:
    """Whether a run's `model` still names something where its folder is gone: the built-in model, a folder seen from here, or a hub's."""
    return (
        name == smollm2.NAME
        or Path(name).expanduser().is_dir()
        or name.startswith("modelscope:")
        or recorded.parent.name == "snapshots"
    )


def _other_base(run: Run, trained: Path, recorded: Path, what: str) -> UserError:
    known = (run.resolved or {}).get("fingerprint")
    marked = f" (fingerprint {known[:12]})" if known else ""
    return UserError(
        f"{trained} was trained on the base model {recorded}{marked}, and {what}; put that model back there"
        + (f", or in this folder as {run.model}" if not Path(run.model).is_absolute() else "")
        + (f"; or name another base yourself: MODEL --adapter {trained}" if (trained / "adapter_config.json").is_file() else "")
    )


def _say_if_foreign(base: Path, adapter: Path | None, say) -> None:
    known = trained_on(adapter) if adapter is not None else None
    if known is not None and known != fingerprint(base):
        say(f"warning: {adapter} was trained on another base model than {base} (their fingerprints differ)")


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
    if steps := checkpoints(path):
        found = _trained(steps[max(steps)], say)
        say(f"{path} holds no finished adapter or model; taking its newest checkpoint, {found}")
        return found
    weights = next((file for folder in (path, path / "adapter") for file in folder.glob("adapter_model.*")), None)
    if weights is not None:
        raise UserError(f"adapter_config.json is missing beside {weights}; copy it from where the adapter was trained")
    missing = ": neither adapter_config.json nor config.json is there"
    if (path / "run.yaml").is_file() and not (path / "finished.json").is_file():
        missing = f" yet; finish the run first: glmtune train {path / 'run.yaml'} --resume"
    raise UserError(f"{path} holds no trained adapter or model{missing}")


def checkpoints(out: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder by their steps, whole or not."""
    named = {p: re.fullmatch(r"step-([0-9]{1,18})", p.name) for p in (out / "checkpoints").glob("step-*")}
    return {int(found[1]): p for p, found in named.items() if found}


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

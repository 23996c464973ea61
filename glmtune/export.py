"""`glmtune export`: a model, with what was trained on it, as a folder that plain transformers opens without code from anywhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import estimate, families, methods
from .errors import UserError


def export(
    model: str | Path,
    to: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    shard_gb: float = 4.0,
    unmerged: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes config.json, safetensors shards, tokenizer.json and chat template into the new folder `to`, and returns it.

    adapter (or a run's own) is merged into the weights; `unmerged` leaves it beside them in `to`/adapter, naming `to` as its base.
    dtype "auto" is the published one. Everything is read back and compared before the folder gets its name.
    Raises UserError: `to` is taken, no room, nothing to export.
    """
    to = Path(to).expanduser().resolve()
    if to.suffix in (".gguf", ".bin", ".safetensors"):
        raise UserError(f"--to {to}: a folder is written, in transformers' layout; give a folder's name")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists already and is never overwritten; choose another --to, or remove it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; choose another folder") from None
    place = families.locate(model, adapter, say)
    if unmerged and place.adapter is None:
        raise UserError(f"{model} has no adapter that could be left unmerged; leave --unmerged out")
    template = families.open_template(place.tokenizer, place.template) if families.has_tokenizer(place.tokenizer) else None
    loaded = families.load_model(place.base, dtype=dtype, device="cpu")
    kept = loaded.dtype
    estimate.refuse_room(to, families.num_parameters(place.base) * kept.itemsize)
    if place.adapter is not None and not unmerged:
        methods.prepare(loaded, kept)
        methods.load(loaded, place.adapter)
        methods.merge(loaded)
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(kept)
        say(f"merged {place.adapter} into the weights")
    work = to.with_name(f".{to.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        say(f"writing {families.num_parameters(place.base) / 1e6:.0f} M parameters as {str(kept).removeprefix('torch.')} ...")
        work.mkdir(parents=True)
        methods.save_full(loaded, work, f"{shard_gb:g}GB")
        if template is None:
            say(f"warning: {place.base} holds no tokenizer, so {to} gets none")
        else:
            families.save_tokenizer(place.base, template, work)
        if unmerged and place.adapter is not None:
            _copy_adapter(place.adapter, work / "adapter", to)
        (work / "README.md").write_text(_readme(place, loaded, to, unmerged), encoding="utf-8")
        if to.exists():
            to.rmdir()
        work.rename(to)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return to


def _copy_adapter(adapter: Path, target: Path, base: Path) -> None:
    target.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(adapter / name, target / name)
    config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base.resolve())
    methods.write_text(target / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _readme(place: families.Place, model: Any, to: Path, unmerged: bool) -> str:
    ours = model.config.model_type in families.OURS
    trained = "" if place.adapter is None else f", with the adapter {place.adapter.parent.name}/{place.adapter.name}"
    system = f"It was trained with the system prompt: {place.system!r}\n\n" if place.system else ""
    need = "import glmtune  # its model class is glmtune's\n" if ours else ""
    peft = '\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(model, "THIS FOLDER/adapter")' if unmerged else ""
    return (
        f"---\nbase_model: {place.name}\nlibrary_name: transformers\n---\n\n{place.name}{trained}, exported by glmtune. "
        f"The licence of the base model applies.\n\n{system}"
        f'```python\n{need}from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("THIS FOLDER"){peft}\n```\n'
    )

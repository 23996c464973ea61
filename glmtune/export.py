"""`glmtune export`: a model, with what was trained on it, as a folder that plain transformers opens without code from anywhere, or as
one GGUF file for llama.cpp."""

import contextlib
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from . import adapters, data, estimate, families, files, gguf, merging, methods
from .chat import Template, align
from .errors import UserError
from .families import weights
from .run import load_run
from .tensors import finite

SHARD_GB = 4.0  # largest weight file of a folder


def export(
    model: str | Path,
    to: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    shard_gb: float = SHARD_GB,
    unmerged: bool = False,
    outtype: str | None = None,
    rounding: str = "nearest",
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes config.json, safetensors shards, tokenizer.json and chat template into the new folder `to`, and returns it; where `to` ends
    in .gguf, that file, with matrices of `outtype` (gguf.OUTTYPES; f16 if none is given).

    adapter (or a run's own) is merged into the weights; `unmerged` leaves it beside them in `to`/adapter, naming `to` as its base.
    dtype "auto" is the published one. rounding: of merged weights, nearest or stochastic (merging.py); how much of the adapter's effect is
    left is measured and said. Everything is read back and compared before the folder gets its name.
    Raises UserError: `to` is taken, no room, nothing to export, options of a folder for a file or the other way round.
    """
    to = Path(to).expanduser().resolve()
    single = to.suffix.lower() == ".gguf"
    if not 0.001 <= shard_gb < 1e6:
        raise UserError(f"--shard-size {shard_gb:g}: wanted the size of a weight file in GB, as in 4")
    if to.suffix in (".bin", ".safetensors"):
        raise UserError(
            f"--to {to}: a folder is written, in transformers' layout, or a file for llama.cpp; give a folder's name or NAME.gguf"
        )
    if single and (dtype != "auto" or unmerged or shard_gb != SHARD_GB):
        raise UserError(f"--to {to}: a GGUF is one file with the adapter merged, and its numbers are named by --outtype; leave out --dtype, --shard-size and --unmerged")  # fmt: skip
    if outtype is not None and not single:
        raise UserError(f"--outtype {outtype} is for a GGUF file: give --to NAME.gguf, or choose --dtype for a folder")
    families.as_dtype(dtype)  # refuses what is none
    if single:
        gguf.check_outtype(outtype or "f16")
    if to.exists() and (single or not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists already and is never overwritten; choose another --to, or remove it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror}; choose another folder") from None
    place = families.locate(model, adapter, say)
    if unmerged and place.adapter is None:
        raise UserError(f"{model} has no adapter that could be left unmerged; leave --unmerged out")
    template = (
        families.open_template(place.tokenizer, place.template, now=place.now) if families.has_tokenizer(place.tokenizer) else None
    )
    if single:
        return _to_gguf(place, template, to, outtype or "f16", rounding, say)
    loaded = _loaded(place, template, dtype)
    kept = loaded.dtype
    estimate.refuse_room(to, families.num_parameters(place.base) * kept.itemsize)
    if place.adapter is not None and unmerged:  # whether it fits
        methods.prepare(loaded, kept)
        methods.unload(methods.load(loaded, place.adapter))
    elif place.adapter is not None:
        _merge(loaded, place, template, rounding, False, say)
    _refuse_odd(loaded, place)
    with files.new_folder(to) as work:
        say(f"writing {families.num_parameters(place.base) / 1e6:.0f} M parameters as {str(kept).removeprefix('torch.')} ...")
        methods.save_full(loaded, work, f"{shard_gb:g}GB")
        if template is None:
            say(f"warning: {place.base} holds no tokenizer, so {to} gets none")
        else:
            families.save_tokenizer(place.base, template, work)
        if unmerged and place.adapter is not None:
            _copy_adapter(place.adapter, work / "adapter", to)
        files.whole(work / "README.md", _readme(place, loaded, to, unmerged))
    return to


def _merge(
    loaded: Any, place: families.Place, template: Template | None, rounding: str, single: bool, say: Callable[[str], None]
) -> None:
    kept = loaded.dtype
    assert place.adapter is not None
    methods.prepare(loaded, kept)
    methods.load(loaded, place.adapter)
    texts, what = ([], "") if template is None else _texts(place, template)
    if texts:
        left = merging.merge(loaded, texts, kept, rounding)
        say(f"merged {place.adapter} into the weights; compared on {what}")
        merging.advice(left, kept, rounding, single, say)
    else:
        methods.merge(loaded)
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(kept)
        say(f"merged {place.adapter} into the weights; what is left of its effect was not measured: there is no tokenizer")


def _loaded(place: families.Place, template: Template | None, dtype: str) -> Any:
    """The base, with rows for all tokens of what is exported with it (an adapter may bring its own tokenizer)."""
    loaded = families.load_model(place.base, dtype=dtype, device="cpu")
    if template is not None:
        families.check_rows(place.tokenizer, template.tokens, loaded.get_input_embeddings().weight.shape[0])
    return loaded


def _refuse_odd(loaded: Any, place: families.Place) -> None:
    """Raises UserError for a model that holds what is no number: it can only write nonsense, wherever it is run."""
    odd = next((name for name, tensor in loaded.state_dict().items() if not finite(tensor)), None)
    if odd is None:
        return
    item = families.source_of(place.base, odd)
    if item is None or not finite(weights.Reader().read(item)):
        raise UserError(
            f"{place.base if item is None else item.path}: {odd} holds numbers that are not finite; the file is damaged, or its training "
            "broke down: copy it again, or take an older checkpoint"
        )
    merged = "" if place.adapter is None else f" with {place.adapter} merged"
    raise UserError(
        f"{odd}{merged} holds numbers that {str(loaded.dtype).removeprefix('torch.')} cannot; export with --dtype bf16 or fp32, a GGUF with "
        "--outtype bf16 or f32"
    )


ASKED = ("What is the capital of France?", "Write a short poem about the sea.", "你是谁？", "请介绍一下北京。")


def _texts(place: families.Place, template: Template) -> tuple[list[Any], str]:
    """Rows to compare on, and what they are: the run's own questions with the answers it gave, rows it learned, else a few of ours."""
    system = [{"role": "system", "content": place.system}] if place.system else []
    for folder in list(place.adapter.parents)[:3] if place.adapter is not None else ():
        rows = [json.loads(line) for line in _lines(folder / "samples.jsonl")]
        told = [(row["prompt"], row["after"]) for row in rows if row.get("after")]
        if told:
            rows = [[*system, {"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in told]
            return [template.encode(row) for row in rows], "the run's own questions and answers (samples.jsonl)"
        if (folder / "run.yaml").is_file():
            with contextlib.suppress(UserError):  # its data may be elsewhere now
                run = load_run(folder / "run.yaml")
                flow = data.stream(run.data, system=run.system, variables=run.variables, registry=run.registry, elsewhere=None)
                return [template.encode(row) for _, row in islice(flow, 8)], f"the first rows of {run.data[0].path}"
    prompts = [template.prompt([*system, {"role": "user", "content": question}]) for question in ASKED]
    return [align(ids, [0.0] * len(ids), "") for ids in prompts], "four general questions (no rows of the run are there)"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _to_gguf(
    place: families.Place, template: Template | None, to: Path, outtype: str, rounding: str, say: Callable[[str], None]
) -> Path:
    gguf.check(families.load_model(place.base, device="meta"))
    # A merged weight is rounded once, to what the file holds (q8_0's steps are far wider than fp16's).
    merged = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "q8_0": "fp16"}[outtype]
    loaded = _loaded(place, template, "auto" if place.adapter is None else merged)
    if place.adapter is not None:
        _merge(loaded, place, template, rounding, True, say)
    _refuse_odd(loaded, place)
    if place.system:
        say(f"it was trained with the system prompt: {place.system!r}; give it to llama.cpp too")
    say(f"writing {families.num_parameters(place.base) / 1e6:.0f} M parameters as {outtype} ...")
    return gguf.write(loaded, template, to, name=place.name, outtype=outtype, say=say)


def _copy_adapter(adapter: Path, target: Path, base: Path) -> None:
    config = families.adapter_config(adapter)
    if config.get("peft_type") not in adapters.READS:  # a method from outside knows its own files
        shutil.copytree(adapter, target)
        config["base_model_name_or_path"] = str(base.resolve())
        files.whole(target / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return
    target.mkdir()
    _, config, tensors = adapters.open_folder(adapter)
    methods.write_tensors(tensors, target / "adapter_model.safetensors", families.fingerprint(target.parent))
    methods.compare(tensors, target / "adapter_model.safetensors")
    config["base_model_name_or_path"] = str(base.resolve())
    files.whole(target / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


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

"""Adapters of the published layouts: brought onto the native one (`glmtune import`) and written back (`export --layout published`).

An adapter that was trained on a published layout (query_key_value, W_pack, dense_h_to_4h ...) holds, for each fused layer, one A and one B.
The native layer's A is the same A and its B is B's rows, those that `Family.places` names for the weight: the same function, exactly.
DoRA's lengths belong to rows, so they are cut like B.
"""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, families, files, methods, prefix, prompts
from .adapters import (
    Adapter,
    Layer,
    checked,
    listed,
    lora_tensors,
    open_folder,
    read,
    readme,
    refuse_half,
    refuse_resized,
    tensors_of,
    write,
)
from .chat import read_object
from .errors import UserError
from .families import weights
from .families.family import Family, Take
from .run import Prefix

Say = Callable[[str], None]
VALUE_HEADS = ("value_head.bin", "value_head.safetensors")


# --- published -> native ------------------------------------------------------------------------------------------------


def import_adapter(
    old: str | Path, model: str | Path | None, to: str | Path, prompt: str | None = None, say: Say = lambda text: None
) -> Path:
    """Writes another tool's adapter into the new folder `to` as an adapter of the native model, with the chat format it was trained on.

    old: an adapter folder or its weight file; LoRA, a prefix of PEFT, or one of the published scripts. model: the base, as published (or native); None: what the adapter's config names, if that is a
    folder here. prompt: a name of PROMPTS or a chat format's; None: recognised, else the model's own. Raises UserError as `read` does, and for
    an adapter of another base.
    """
    if found := _prefix(old):
        return _import_prefix(*found, model, to, prompt, say)
    adapter = read(old)
    name = str(model) if model is not None else _own_base(adapter)
    base = families.locate(name, say=say).base
    made = fitted(adapter, base)
    if all(layer in made.layers for layer in adapter.layers):
        say("its layers have the native names already; it is copied")
    if adapter.left_out or any((adapter.folder / file).is_file() for file in VALUE_HEADS):
        say("left out: the value head (it scored answers and has no part in writing them)")
    if adapter.changes_nothing:
        say(f"warning: this adapter changes nothing: A or B is zero in all {len(adapter.layers)} layers")
    with files.new_folder(to) as work:
        write(work, made, base_name(name, base), families.linear_names(base), families.fingerprint(base))
        about = _keep_form(adapter, base, prompt, work, say)
        files.whole(work / "README.md", readme(name, base, f"LoRA adapter {adapter.folder.name}, {about}imported"))
    ranks = sorted({layer.rank for layer in made.layers.values()})
    say(f"{len(adapter.layers)} layers became {len(made.layers)}, rank {', '.join(map(str, ranks))}")
    return Path(to)


Put = Callable[[Any], prefix.Encoder]  # onto a model


def _prefix(old: str | Path) -> tuple[Path, Any, Put] | None:
    """Folder, config (empty where there is none) and how it is put on a model: of a prefix of PEFT (or ours), or of the pytorch_model.bin of
    the published P-Tuning scripts, told by its tensors' names. None for anything else."""
    path = Path(old).expanduser()
    if families.adapter_config(path if path.is_dir() else path.parent).get("peft_type") == "PREFIX_TUNING":
        folder, config, tensors = open_folder(path)
        prefix.check(tensors, config, folder)
        return folder, config, lambda model: prefix.from_peft(model, tensors, config)
    path = path / "pytorch_model.bin" if path.is_dir() and not (path / "adapter_config.json").is_file() else path
    if not path.is_file() or path.suffix not in (".bin", ".safetensors"):
        return None
    # A trainer that wrapped the model leaves its own names in front.
    held = {
        re.sub(r"^(module\.|_orig_mod\.|model\.)+(?=transformer\.prefix_encoder\.)", "", str(n)): t
        for n, t in tensors_of(path).items()
    }
    if not any(name.startswith(prefix.PUBLISHED) for name in held):
        return None
    checked(held, path)
    return path.parent, {}, lambda model: prefix.from_published(model, held)


def _import_prefix(
    folder: Path, config: Any, put: Put, model: str | Path | None, to: str | Path, prompt: str | None, say: Say
) -> Path:
    """P-Tuning v2. The model is opened, for its rotary functions say how plain PEFT must be given the keys."""
    if model is None and not config:
        raise UserError("--model is missing: a prefix does not say which model it belongs to; give the base's folder or hub id")
    adapter = Adapter(folder, config, {})
    name = str(model) if model is not None else _own_base(adapter)
    base = families.locate(name, say=say).base
    opened = families.load_model(base, device="cpu").requires_grad_(False)
    encoder = put(opened)
    with files.new_folder(to) as work:
        methods.save_adapter(opened, work, Prefix(), base_name(name, base), families.fingerprint(base))
        about = _keep_form(adapter, base, prompt, work, say)
        about = f"Prefix (P-Tuning v2) {folder.name}, {about}imported"
        files.whole(work / "README.md", readme(name, base, about, prefix.plain_peft(opened)))
    say(f"a prefix of {encoder.shape.num_virtual_tokens} virtual tokens" + (", with projection" if encoder.shape.hidden else ""))
    return Path(to)


def _own_base(adapter: Adapter) -> str:
    base = str(adapter.config.get("base_model_name_or_path") or "")
    if not (Path(base) / "config.json").is_file():
        raise UserError(
            f"--model is missing: the adapter was made for '{base}', which is no folder here; give its folder or hub id"
        )
    return base


def base_name(name: str, base: Path) -> str:
    """What plain PEFT should open: a hub id as it is, else the folder."""
    return name if "/" in name and not Path(name).expanduser().exists() else str(base.resolve())


def fitted(adapter: Adapter, base: Path) -> Adapter:
    """The adapter, of the published or the native layout, under native names. Raises UserError where it does not fit the model `base`."""
    family, shapes, linear = families.family_of(base), families.tensor_shapes(base), set(families.linear_names(base))
    made = Adapter(adapter.folder, adapter.config, {})
    wrong = []
    for name, layer in adapter.layers.items():
        takes = _takes(f"{name}.weight", family, shapes)
        if not takes:
            wrong.append(f"{name}: no such layer in this model")
            continue
        if not all(take.name.removesuffix(".weight") in linear for take in takes):
            wrong.append(f"{name}: LoRA goes on the linear layers of the blocks only, here")
            continue
        inputs, rows = shapes[takes[0].name][1], sum(shapes[take.name][0] for take in takes)
        if layer.A.shape[1] != inputs or layer.B.shape[0] != rows:
            wrong.append(f"{name}: A {list(layer.A.shape)} and B {list(layer.B.shape)} do not fit a layer of {inputs} -> {rows}")
            continue
        for take in takes:
            lengths = None if layer.magnitude is None else _cut(layer.magnitude.flatten(), take)
            made.layers[take.name.removesuffix(".weight")] = Layer(layer.A, _cut(layer.B, take), layer.scaling, lengths)
    tied = bool(families.config_of(base).get("tie_word_embeddings"))
    embedding = next(
        (name for name in adapter.whole if any("embed" in take.name for take in _takes(name, family, shapes))), "embedding"
    )
    if tied:
        refuse_half(adapter.folder, adapter.whole, (embedding, "lm_head.weight"))
    takes_of = {name: _takes(embedding if tied and name == "lm_head.weight" else name, family, shapes) for name in adapter.whole}
    refuse_resized(adapter, {name: sum(shapes[take.name][0] for take in takes) for name, takes in takes_of.items() if takes})
    for name, tensor in adapter.whole.items():
        takes = takes_of[name]
        if not takes:
            wrong.append(f"{name}: no such tensor in this model, or one that it shares with another")
        elif sum(shapes[take.name][0] for take in takes) != tensor.shape[0] or list(tensor.shape[1:]) != shapes[takes[0].name][1:]:
            wrong.append(f"{name} {list(tensor.shape)} does not fit this model")
        for take in takes if not wrong else ():
            part = _cut(tensor, take).float()
            made.whole[name if tied and name == "lm_head.weight" else take.name] = (
                torch.nn.functional.normalize(part) if take.name in family.normalised else part
            )
    if not wrong:
        wrong = _missing(adapter, family, shapes, base)
    if wrong:
        raise UserError(
            f"{adapter.folder} was made for another model ({adapter.config.get('base_model_name_or_path')}), not for {base}: {listed(wrong)}"
        )
    return made


def _takes(name: str, family: Family, shapes: dict[str, list[int]]) -> list[Take]:
    """The native tensors that a published (or already native) name stands for; none where there is no such tensor."""
    takes = [Take(name)] if family.native else family.places(name)
    if takes is None:  # an adapter that was trained on the native layout, or a published folder's own
        takes = [Take(name)]
    return list(takes) if all(take.name in shapes for take in takes) else []


def _missing(adapter: Adapter, family: Family, shapes: dict[str, list[int]], base: Path) -> list[str]:
    """Layers that target_modules selects in this model and the adapter lacks: it has more layers than the adapter's."""
    published = not family.native and not all(name + ".weight" in shapes for name in adapter.layers)
    names = _published(base) if published else families.linear_names(base)
    return [f"{name}: the adapter has no A and B for it" for name in adapter.lacking(names)]


def _published(base: Path) -> list[str]:
    """Published names of the blocks' linear layers."""
    stored = weights.open_folder(base, families.published_config(base).get("quantization_bit") or 0)
    return [
        name.removesuffix(".weight")
        for name, item in stored.items()
        if name.endswith(".weight") and len(item.shape) == 2 and any(part.isdigit() for part in name.split("."))
    ]


def _cut(tensor: Tensor, take: Take) -> Tensor:
    """The rows of a published tensor that `take` names."""
    return tensor.unflatten(0, (take.groups, -1))[:, take.start : take.stop].flatten(0, 1).clone()


def _put(whole: Tensor, take: Take, rows: Tensor) -> None:
    """The reverse, into `whole`, which must be contiguous."""
    whole.unflatten(0, (take.groups, -1))[:, take.start : take.stop] = rows.unflatten(0, (take.groups, -1))


# --- native -> published ------------------------------------------------------------------------------------------------


def export_published(adapter: str | Path | None, model: str | Path, to: str | Path, say: Say = lambda text: None) -> Path:
    """Writes a native adapter (None: that of the run `model`) into the new folder `to` under the published names, for those who serve with the published code.

    Parts of a fused layer that have one A (`share_a`, or an imported adapter) keep their rank r. Others get each distinct A its own rows and a
    block-diagonal B: rank 3r (2r), alpha multiplied likewise, the same function. peft before 0.6 has no rank_pattern and no use_rslora, and
    before 0.4 no safetensors: so all layers get one rank (filled up with zeros) and one alpha, and the file is written in both forms.
    Raises UserError: the model has no other layout, or the adapter is not its.
    """
    place = families.locate(model, adapter, say)
    base, adapter, model = place.base, place.adapter, place.name
    if adapter is None:
        raise UserError(f"{model} has no adapter; --layout published is for adapters (--adapter DIR, or a run's folder)")
    family = families.family_of(base)
    if family.native:
        raise UserError(
            f"{model} has one layout only, which this adapter has already; --layout published is for folders as ChatGLM's"
        )
    if read_object(adapter / "adapter_config.json").get("peft_type") == "PREFIX_TUNING":
        return _export_prefix(adapter, model, base, to)
    held = fitted(read(adapter), base)
    for name, layer in held.layers.items():
        if not layer.scaling:  # alpha 0: layers get one scaling, and none can be brought to 0
            held.layers[name] = Layer(layer.A, torch.zeros_like(layer.B), 1.0, layer.magnitude)
    stored = weights.open_folder(base, families.published_config(base).get("quantization_bit") or 0)
    homes = {take.name: (item, takes) for item in stored.values() if (takes := family.places(item.name)) for take in takes}
    made = Adapter(held.folder, {**held.config, "use_rslora": False}, {})
    for home in dict.fromkeys(homes[f"{name}.weight"][0].name for name in held.layers):
        item, takes = homes[next(take.name for take in family.places(home) or ())]
        made.layers[home.removesuffix(".weight")] = _fused(held, item, list(takes), say)
    made.whole |= {name: tensor for name, tensor in held.whole.items() if name not in homes}  # a head that is the embedding (tied)
    for home in dict.fromkeys(homes[name][0].name for name in held.whole if name in homes):
        takes = list(family.places(home) or ())
        if any(take.name not in held.whole for take in takes):
            raise UserError(
                f"{home} was trained in part only ({', '.join(sorted(held.whole))}); the published layout keeps it in one piece"
            )
        made.whole[home] = torch.zeros(stored[home].shape, dtype=held.whole[takes[0].name].dtype)
        for take in takes:
            _put(made.whole[home], take, held.whole[take.name])
    _one_rank(made, say)
    if held.changes_nothing:
        say("warning: this adapter changes nothing: A or B is zero in all layers")
    with files.new_folder(to) as work:
        write(work, made, model, _published(base), families.fingerprint(base))
        files.whole(work / "adapter_model.bin", _pickled(lora_tensors(made)))
        config = read_object(work / "adapter_config.json")
        for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):  # not known to the peft of that time
            if not config[key]:
                del config[key]
        files.whole(work / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if (held.folder / "chat_template.jinja").is_file():
            shutil.copyfile(held.folder / "chat_template.jinja", work / "chat_template.jinja")
        files.whole(work / "README.md", _published_readme(model, made.dora))
    return Path(to)


def _export_prefix(adapter: Path, model: str, base: Path, to: str | Path) -> Path:
    opened = methods.load(families.load_model(base, device="cpu"), adapter)
    tensors = prefix.published_tensors(opened)
    with files.new_folder(to) as work:
        files.whole(work / "pytorch_model.bin", _pickled(tensors))
        tokens = tensors[f"{prefix.PUBLISHED}embedding.weight"].shape[0]
        settings = f"pre_seq_len={tokens}, prefix_projection={len(tensors) > 1}"
        files.whole(
            work / "README.md",
            f"Prefix (P-Tuning v2) of {model}, as its published ptuning scripts save it, exported by glmtune {__version__}: load the model with "
            f"`{settings}`, then these tensors.\n\nBack again:\n\n```sh\nglmtune import THIS_FOLDER --model {model} --to NATIVE_ADAPTER\n```\n",
        )
    return Path(to)


def _pickled(tensors: dict[str, Tensor]) -> bytes:
    """A `.bin` file. torch's own writing hides what the disk said."""
    made = io.BytesIO()
    torch.save(tensors, made)
    return made.getvalue()


def _fused(adapter: Adapter, item: weights.Stored, takes: list[Take], say: Say) -> Layer:
    """The parts of one published layer, put together."""
    parts = [(take, adapter.layers[name]) for take in takes if (name := take.name.removesuffix(".weight")) in adapter.layers]
    if len(takes) == 1:
        return parts[0][1]
    distinct: list[Tensor] = []
    for _, layer in parts:
        if not any(torch.equal(layer.A, A) for A in distinct):
            distinct.append(layer.A)
    scaling = parts[0][1].scaling
    A = torch.cat(distinct)
    B = torch.zeros(item.shape[0], len(A), dtype=parts[0][1].B.dtype)
    for take, layer in parts:
        at = next(i for i, one in enumerate(distinct) if torch.equal(one, layer.A))
        start = sum(len(one) for one in distinct[:at])
        block = torch.zeros(take.rows(item.shape[0]), len(A), dtype=B.dtype)
        block[:, start : start + layer.rank] = layer.B if layer.scaling == scaling else layer.B * (layer.scaling / scaling)
        _put(B, take, block)
    if len(distinct) > 1 and ".0." in item.name:
        leaf = item.name.split(".")[-2]
        say(
            f"{leaf}: its {len(parts)} parts have {len(distinct)} A's, so its rank is {len(A)} (the same function; share_a keeps rank r)"
        )
    return Layer(A, B, scaling, _fused_lengths(adapter, item, takes, parts))


def _fused_lengths(adapter: Adapter, item: weights.Stored, takes: list[Take], parts: list[tuple[Take, Layer]]) -> Tensor | None:
    """DoRA's lengths of a fused layer; rows that were not trained keep the weight's own."""
    if not adapter.dora:
        return None
    lengths = torch.zeros(item.shape[0])
    if len(parts) < len(takes):
        lengths = weights.Reader().read(item).float().norm(dim=1)
    for take, layer in parts:
        if layer.magnitude is not None:
            _put(lengths, take, layer.magnitude.float())
    return lengths


def _one_rank(adapter: Adapter, say: Say) -> None:
    """Fills every layer's rank up to the largest, with zeros, and brings all to one scaling, in place."""
    ranks = {layer.rank for layer in adapter.layers.values()}
    rank, scaling = max(ranks), next(iter(adapter.layers.values())).scaling
    if len(ranks) > 1:
        say(
            f"ranks {', '.join(map(str, sorted(ranks)))} are filled up to {rank} with zeros, since the peft of that time knows one rank only"
        )
    for layer in adapter.layers.values():
        missing = rank - layer.rank
        if missing:
            layer.A = torch.cat([layer.A, layer.A.new_zeros(missing, layer.A.shape[1])])
            layer.B = torch.cat([layer.B, layer.B.new_zeros(len(layer.B), missing)], dim=1)
        if layer.scaling != scaling:
            layer.B, layer.scaling = layer.B * (layer.scaling / scaling), scaling


def _published_readme(model: str, dora: bool) -> str:
    return (
        f"---\nbase_model: {model}\nlibrary_name: peft\n---\n\nLoRA adapter in the published layout of {model}, exported by glmtune "
        f"{__version__}. The licence of the base model applies.{' DoRA needs peft 0.9 or newer.' if dora else ''}\n\n"
        f"On {model} as its published code opens it (glmtune never runs that code):\n\n"
        '```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "THIS_FOLDER")\n```\n\n'
        f"Back again:\n\n```sh\nglmtune import THIS_FOLDER --model {model} --to NATIVE_ADAPTER\n```\n"
    )


def _keep_form(adapter: Adapter, base: Path, prompt: str | None, folder: Path, say: Say) -> str:
    """Writes the tokenizer with the chat format that the adapter was trained on; returns what the README says of it."""
    if not families.has_tokenizer(base):
        say(f"warning: {base} holds no tokenizer, so no chat format is kept; --prompt is not used")
        return ""
    found = None if prompt is not None else prompts.recognised(adapter.folder, adapter.config)
    if (
        prompt is None
        and found is None
        and (adapter.folder / "chat_template.jinja").is_file()
        and (adapter.folder / "tokenizer.json").is_file()
    ):
        template = families.open_template(adapter.folder)
        families.save_tokenizer(base, template, folder)
        say("chat format: its own chat_template.jinja")
        return "with its own chat format, "
    name = prompt if prompt is not None else found[0] if found else None
    template = prompts.trained_form(base, name) if name is not None else families.open_template(base)
    families.save_tokenizer(base, template, folder)
    if name is None:
        say(
            "chat format: nothing tells which program trained it, so the model's own is kept; if it answers badly, import it again with "
            f"--prompt {' | '.join(prompts.PROMPTS)}"
        )
        return ""
    about = prompts.PROMPTS.get(name, name)
    say(f"chat format: {about}" + (f" (told by {found[1]})" if found else ""))
    if name == "self-llm":
        say("the persona that its script wrote as the system text belongs to the prompt: glmtune chat ... --system TEXT")
    return f"trained with the prompts of {about}, "

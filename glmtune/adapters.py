"""LoRA adapters as files, in PEFT's layout: read from any tool's folder and checked, written with a README.

Everything here works on files and tensors; no model is made. `importing` changes the layout, `blend` adds adapters up.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, families, files
from .errors import UserError, did_you_mean
from .families import weights
from .tensors import compare, read_tensors, write_tensors

PREFIX = "base_model.model."  # of every tensor in PEFT's files
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")  # the last: checkpoints of some trainers
# What a config may hold that changes the function in ways that are not read. enable_lora: peft 0.2's merged layers.
FOREIGN = (
    "enable_lora", "fan_in_fan_out", "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "monteclora_config",
)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
READS = ("LORA", "PREFIX_TUNING")  # peft_type of the files that are read here
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")  # these beginnings of LoRA change the base's weights too


@dataclass
class Layer:
    """LoRA on one linear layer: y = W x + scaling B A x. A [rank, in], B [out, rank]; magnitude [out] where DoRA sets the rows' lengths."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass
class Adapter:
    """What an adapter folder holds. `whole`: parameters of modules_to_save, by name."""

    folder: Path
    config: dict[str, Any]
    layers: dict[str, Layer]
    whole: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # tensors of a value head

    @property
    def rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def changes_nothing(self) -> bool:
        return (
            not self.whole
            and not self.dora
            and not any(one.scaling and one.A.any() and one.B.any() for one in self.layers.values())
        )

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Which of a model's linear layers its config names and its file does not hold; not asked where the config leaves some out."""
        targets = self.config.get("target_modules")
        if (
            not isinstance(targets, list)
            or self.config.get("layers_to_transform") is not None
            or self.config.get("exclude_modules")
        ):
            return []
        named = [name for name in names if any(name == target or name.endswith("." + target) for target in targets)]
        return [name for name in named if name not in self.layers]


# --- reading ------------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Adapter:
    """A LoRA adapter in PEFT's layout: its folder, the folder of a run, or its weight file. Raises UserError as `open_folder` and `lora`."""
    folder, config, tensors = open_folder(path)
    if config["peft_type"] != "LORA":
        raise UserError(
            f"{folder}: its peft_type is {config['peft_type']}; only LoRA adapters can be imported, exported back, mixed and kept beneath"
        )
    return lora(folder, config, tensors)


def open_folder(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Folder, adapter_config.json and tensors of a LoRA or a prefix adapter.

    Raises UserError: no such folder, no or a broken config, another kind of adapter, a file that is cut short or holds code.
    """
    folder, file = _find(Path(path).expanduser())
    config = families.adapter_config(folder)
    if not config:
        raise UserError(
            f"{folder} holds no adapter_config.json, which names rank, alpha and layers; copy it from where the adapter was trained. "
            f"(A prefix of the published scripts has none: glmtune import. {file.name} holds {_named(tensors_of(file))})"
        )
    if config.get("peft_type") not in READS:
        raise UserError(
            f"{folder / 'adapter_config.json'}: its peft_type is {config.get('peft_type')}; LoRA (also DoRA, rsLoRA, modules_to_save) and "
            "prefix adapters can be read"
        )
    tensors = tensors_of(file)
    return folder, config, checked(tensors, file)


def digest(path: str | Path) -> str:
    """Of an adapter's settings and numbers; of one that a method from outside saved, of every file."""
    path = Path(path).expanduser()
    if path.is_dir() and families.adapter_config(path).get("peft_type", READS[0]) not in READS:
        folder = path if (path / "adapter_config.json").is_file() else path / "adapter"
        return " ".join(files.digest(one) for one in sorted(folder.iterdir()) if one.is_file())
    folder, file = _find(path)
    return " ".join(files.digest(one) for one in (file, folder / "adapter_config.json") if one.is_file())


def checked(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """An adapter's tensors, of any layout. Raises UserError where there are none, and for what are no numbers that can be computed with."""
    if not tensors:
        raise UserError(f"{file} holds no tensors: the program that saved it lost them; take an older checkpoint, or train again")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            raise UserError(
                f"{file}: {name} is of {tensor.dtype}, {tensor.layout}; an adapter's tensors are fp16, bf16, fp32 or fp64"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: {name} holds numbers that are not finite; the training broke down, take an older checkpoint")
    return tensors


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Of a safetensors or a `.bin` file; the latter through torch's restricted unpickler, so that no code in it is ever run."""
    return read_tensors(path) if path.suffix == ".safetensors" else weights.unpickle(path)


def _find(path: Path) -> tuple[Path, Path]:
    """An adapter's folder and its weight file."""
    if path.is_file() and path.suffix in (".bin", ".safetensors"):
        return path.parent, path
    if path.is_file():
        raise UserError(
            f"{path} is no adapter; wanted its folder, or its adapter_model.safetensors, adapter_model.bin or pytorch_model.bin"
        )
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"there is no adapter {path}{did_you_mean(path.name, near)}")
    for folder in (path, path / "adapter"):  # the second: a run's folder
        for name in WEIGHTS:
            if (folder / name).is_file():
                return folder, folder / name
    raise UserError(f"{path} is no adapter: it holds none of {', '.join(WEIGHTS)}{_there(path)}")


def _named(tensors: dict[str, Tensor]) -> str:
    return (
        f"{len(tensors)} tensors: {', '.join(map(str, list(tensors)[:3]))} ..."
        if len(tensors) > 3
        else ", ".join(map(str, tensors)) or "nothing"
    )


def _there(folder: Path) -> str:
    return f" (there: {', '.join(sorted(p.name for p in folder.iterdir())[:6]) or 'nothing'})"


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    for key, (fits, wanted) in _KINDS.items():
        if (key in ("r", "lora_alpha") or config.get(key) is not None) and not fits(config.get(key)):
            raise UserError(
                f"{path}: {key} is {config.get(key)!r}; wanted {wanted}; copy the file from where the adapter was trained"
            )
    foreign = [key for key in FOREIGN if config.get(key)]
    if foreign:
        raise UserError(f"{path} uses {', '.join(foreign)}, which cannot be read; merge the adapter with the program that made it")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {config['bias']}: biases were trained too, which adapters here cannot hold; merge it where it was made"
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASES):
        raise UserError(
            f"{path}: init_lora_weights is {start}, which also changed the base's weights, so the adapter fits no other base; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    try:
        return isinstance(value, dict) and all(bool(re.compile(key)) and fits(one) for key, one in value.items())
    except re.error:
        return False


# Keys that are read, what they may hold, and that in words.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (lambda value: _is_pattern(value, _is_rank), "regular expressions, each with a whole number above 0"),
    "alpha_pattern": (lambda value: _is_pattern(value, _is_number), "regular expressions, each with a number"),
    "target_modules": (lambda value: isinstance(value, str) or _is_names(value), "names or a regular expression"),
    "modules_to_save": (_is_names, "a list of names"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
}

# PEFT writes the embeddings and the head by itself where they were resized or are tied to a trained one. Their names in files:
EMBEDDINGS = ("embed_tokens", "word_embeddings", "tok_embeddings", "lm_head", "output_layer", "output")
# ... and of a module that was trained whole also these two: a copy of what it became, and what it was.
_DOUBLE = re.compile(r"(?P<module>.+)\.(?P<of>modules_to_save|original_module)\.(?P<rest>weight|bias)")
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?")


def lora(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    """The tensors of a LoRA adapter, sorted. Raises UserError: a rank that is not the config's, half of a pair, tensors of another kind, a
    config that asks for what is not read."""
    _check_config(folder, config)
    parts: dict[str, dict[str, Tensor]] = {}
    made = Adapter(folder, config, {})
    saved = config.get("modules_to_save") or []
    for full, tensor in tensors.items():
        name = full.removeprefix(PREFIX)
        found, double = _LORA.fullmatch(name), _DOUBLE.fullmatch(name)
        if double is not None:
            _check_double(folder, name, tensor, double, tensors)
        elif found is not None:
            held = parts.setdefault(found["layer"], {})
            if found["part"] in held:
                raise UserError(f"{folder}: {found['layer']} has two adapters in one file; save one of them by itself")
            held[found["part"]] = tensor
        elif {"v_head", "value_head"} & set(name.split(".")) or (
            name.startswith("score.") and config.get("task_type") != "SEQ_CLS"
        ):
            made.left_out.append(name)
        elif is_embedding(name) or any(module.endswith(one) for module in _modules(name) for one in saved):
            made.whole[name] = tensor  # chosen as PEFT chooses them, with what is in them
        else:
            raise UserError(
                f"{folder}: {name} is no LoRA tensor of a linear layer; only A, B, DoRA's lengths and modules_to_save can be read"
            )
    modules = {module for name in (*made.whole, *made.left_out) for module in _modules(name)}
    wrong = [
        f"{one}: named in modules_to_save, but not there" for one in saved if not any(module.endswith(one) for module in modules)
    ]
    for name, held in parts.items():
        A, B, lengths = held.get("A"), held.get("B"), held.get("magnitude_vector")
        rank = of_pattern(config.get("rank_pattern"), name, config["r"])
        if A is None or B is None:
            wrong.append(f"{name} has no {'A' if A is None else 'B'}")
        elif A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            wrong.append(f"{name}: A {list(A.shape)} and B {list(B.shape)} do not belong together")
        elif A.shape[0] != rank:
            wrong.append(f"{name} has rank {A.shape[0]}, its adapter_config.json says {rank}")
        elif bool(config.get("use_dora")) != (lengths is not None) or (lengths is not None and lengths.numel() != len(B)):
            wrong.append(f"{name}: lora_magnitude_vector and use_dora do not go together")
        else:
            alpha = of_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if made.rslora else rank)
            made.layers[name] = Layer(A, B, scaling, None if lengths is None else lengths.flatten())
    if wrong:
        raise UserError(f"{folder}: files of different adapters, or damaged ones: {listed(wrong)}; copy the folder again")
    if not made.layers:
        raise UserError(f"{folder} holds no LoRA tensors (there: {', '.join(list(tensors)[:3])}); it is another kind of checkpoint")
    return made


def is_embedding(name: str) -> bool:
    """Whether a weight is that of a model's embeddings or head: the only ones whose rows are tokens."""
    return (
        name.removesuffix(".weight").split(".")[-1] in EMBEDDINGS
        and name.endswith(".weight")
        and not any(map(str.isdigit, name.split(".")))
    )


def _check_double(folder: Path, name: str, tensor: Tensor, double: re.Match[str], tensors: dict[str, Tensor]) -> None:
    """X.modules_to_save.weight must be X.weight once more; which of two counts would be left to chance. X.original_module.weight is what
    the module was before, which nothing computes with."""
    full = f"{double['module']}.{double['rest']}"
    kept = tensors.get(PREFIX + full, tensors.get(full))
    if kept is None:
        raise UserError(
            f"{folder}: {name} is there without {full}, which PEFT reads; save the adapter again with its save_pretrained"
        )
    if double["of"] == "modules_to_save" and (kept.shape != tensor.shape or not torch.equal(kept, tensor)):
        raise UserError(
            f"{folder}: {full} and {name} are one module and hold different numbers; save the adapter again with PEFT's save_pretrained"
        )


def refuse_resized(adapter: Adapter, rows: dict[str, int]) -> None:
    """rows: tokens that the embeddings and the head of the model have, by the names in the adapter. Raises UserError where it has others."""
    for name, tensor in adapter.whole.items():
        if is_embedding(name) and name in rows and len(tensor) != rows[name]:
            raise UserError(
                f"the adapter {adapter.folder} has {len(tensor)} tokens ({name}), this model {rows[name]}: its base was resized before it was "
                f"trained. Use that one, or resize this one likewise: model.resize_token_embeddings({len(tensor)}), model.save_pretrained(NEW), "
                "with the adapter's tokenizer beside it"
            )


def _modules(name: str) -> list[str]:
    """a.b.weight -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def of_pattern(pattern: dict[str, Any] | None, name: str, usual: Any) -> Any:
    """PEFT's rule: keys of rank_pattern and alpha_pattern are regular expressions for the end of a layer's name."""
    return next((value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name)), usual)


def refuse_half(folder: Path, whole: dict[str, Tensor], one: Sequence[str]) -> None:
    """one: names of the parameters that are one matrix in the model (tied weights). Raises UserError where an adapter has them apart."""
    there = [name for name in one if name in whole]
    if there and (len(there) < len(one) or not all(torch.equal(whole[name], whole[there[0]]) for name in there)):
        raise UserError(
            f"{folder} holds {' and '.join(there)} apart from what the model has as one matrix ({', '.join(one)} are tied), so it cannot be put "
            "there; merge it with the program that trained it, which unties them"
        )


def listed(wrong: Sequence[str]) -> str:
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def prefix_options(path: str | Path) -> dict[str, Any]:
    """What a prefix says of the options of run.Prefix. Raises UserError as `open_folder`."""
    _, _, tensors = open_folder(path)
    first = next(iter(tensors.values()))
    rows = next((tensor for name, tensor in tensors.items() if name.endswith(("embedding.weight", "prompt_embeddings"))), first)
    return {"num_virtual_tokens": len(rows), "projection": any(".trans." in name for name in tensors)}


def lora_options(path: str | Path) -> dict[str, Any]:
    """What a LoRA adapter says of the options of run.Lora; layers by their full names. Raises UserError as `read`."""
    held = read(path)
    rank, alpha, ranks, alphas = _sizes(held)
    return {
        "rank": rank,
        "alpha": alpha,
        "ranks": {name: one for name, one in ranks.items() if one != rank},
        "alphas": {name: one for name, one in alphas.items() if one != alpha},
        "rslora": held.rslora,
        "dora": held.dora,
        "targets": list(held.layers),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in held.whole}),
    }


def _sizes(adapter: Adapter) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """The usual rank and alpha, and those of each layer."""
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    alphas = {name: _alpha(layer, adapter.rslora) for name, layer in adapter.layers.items()}
    return Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0], ranks, alphas


# --- writing ------------------------------------------------------------------------------------------------------------


def write(folder: Path, adapter: Adapter, base: str, linear: Iterable[str] = (), fingerprint: str | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT reads them, read back and compared. linear: all linear layers of the model's
    blocks, so that target_modules can be said by last names; unknown, each layer is named in full. fingerprint: of the base."""
    tensors = lora_tensors(adapter)
    write_tensors(tensors, folder / "adapter_model.safetensors", fingerprint)
    compare(tensors, folder / "adapter_model.safetensors")
    rank, alpha, ranks, alphas = _sizes(adapter)
    modules = sorted({name.split(".")[-2] for name in adapter.whole})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.config.get("lora_dropout", 0.0),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": shortest(adapter.layers, linear),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": modules or None,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
    }
    files.whole(folder / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def shortest(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """target_modules: last names where they select exactly these layers out of `names`, else full names."""
    leaves = {name.split(".")[-1] for name in chosen}
    selected = {name for name in names if name.split(".")[-1] in leaves}
    return sorted(leaves if selected == set(chosen) else chosen)


def lora_tensors(adapter: Adapter) -> dict[str, Tensor]:
    found = {PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    for name, layer in adapter.layers.items():
        found |= {f"{PREFIX}{name}.lora_A.weight": layer.A, f"{PREFIX}{name}.lora_B.weight": layer.B}
        if layer.magnitude is not None:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}  # an A that layers share is written for each


def _alpha(layer: Layer, rslora: bool) -> float | int:
    return _whole_number(layer.scaling * (math.sqrt(layer.rank) if rslora else layer.rank))


def _whole_number(number: float) -> float | int:
    """16 for 16.000000000000004: alpha / rank * rank is not always alpha again."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def _pattern(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """Layers that differ from the usual: by their last name where all of that name agree, else in full."""
    made = {}
    for name, value in values.items():
        leaf = name.split(".")[-1]
        same = all(other == value for layer, other in values.items() if layer.split(".")[-1] == leaf)
        if value != usual:
            made[leaf if same else name] = value
    return made


def readme(name: str, base: Path | None, about: str, not_in_peft: str | None = None) -> str:
    """README.md of an adapter folder: how glmtune, plain PEFT and the published code open it. name: of the base, as the user calls it;
    base: its folder, None where it is not known here. not_in_peft: why plain PEFT would not compute the same."""
    family = None if base is None else families.family_of(base)
    ours = family is not None and family.config.get("model_type") in families.OURS
    native = family is not None and family.native
    made = f"Plain PEFT, on the base in the layout that transformers opens (made once):\n\n```sh\nglmtune export {name} --to NATIVE\n```\n\n"
    peft = (
        ("" if native else made)
        + "```python\n"
        + ("import glmtune  # the model class is glmtune's\n" if ours else "")
        + "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        + f'base = AutoModelForCausalLM.from_pretrained("{name if native else "NATIVE"}")\n'
        + 'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n\n'
    )
    back = (
        "The code that was published with the model reads it after\n\n"
        f"```sh\nglmtune export {name} --adapter THIS_FOLDER --layout published --to PUBLISHED\n```\n\n"
    )
    return (
        f"---\nbase_model: {name}\nlibrary_name: peft\n---\n\n{about} (glmtune {__version__}). The licence of the base model applies.\n\n"
        f"```sh\nglmtune chat {name} --adapter THIS_FOLDER\n```\n\n"
        + (peft if not_in_peft is None else f"Not with plain PEFT: {not_in_peft}.\n\n")
        + ("" if native else back)
        + "The chat format that was trained is `chat_template.jinja`, where there is one.\n"
    )

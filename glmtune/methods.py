"""What is trained: LoRA adapters (in PEFT's file format) or every weight. Attach, save, check, load.

`Linear` is the one linear layer of the package. It carries the precision rule (docs/architecture.md): a product with a stored
weight may run in bf16, everything it is added to is fp32, so that small updates are not rounded away; and it carries LoRA.
"""

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import UserError
from .families import pick_targets, sharing
from .run import Full, Lora

PREFIX = "base_model.model."  # of every tensor in PEFT's files


class Linear(nn.Linear):
    """y = x W^T + b, plus (x A^T) B^T * scaling where an adapter is attached.

    weight [out, in] in its storage dtype; the product runs in `compute`, the result comes back in x's dtype.
    lora_A [rank, in] and lora_B [out, rank] are fp32 or None.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, old: nn.Linear, compute: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = old.in_features, old.out_features
        self.weight, self.bias = old.weight, old.bias
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling, self.dropout, self.compute = 1.0, 0.0, compute
        self.noise: RowNoise | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute)
        y = F.linear(x.to(self.compute), self.weight.to(self.compute), bias).to(x.dtype)
        if self.lora_A is None or self.lora_B is None:
            return y
        if self.noise is not None and self.dropout and self.training:
            x = self.noise.drop(x, self.dropout, self)
        return y + F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B).to(y.dtype) * self.scaling


class Embedding(nn.Embedding):
    """An embedding whose output is fp32, whatever its weights are stored in: the residual stream starts here."""

    def __init__(self, old: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = old.num_embeddings, old.embedding_dim, old.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = old.weight

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight).float()


class RowNoise:
    """Dropout masks that depend on (seed, step, row, layer) only, so that the cut into micro-batches changes nothing.

    Set `step` and, before each forward, `spans`: (row, index of the batch or None, start, stop) of every row in the tensor.
    """

    def __init__(self, seed: int, layers: Iterable["Linear"]):
        self.seed, self.step = seed, 0
        self.spans: list[tuple[int, int | None, int, int]] = []
        self.number = {id(layer): number for number, layer in enumerate(layers)}

    def drop(self, x: Tensor, rate: float, layer: "Linear") -> Tensor:
        scale = torch.zeros_like(x)
        for row, index, start, stop in self.spans:
            key = f"{self.seed}/{self.step}/{row}/{self.number[id(layer)]}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))
            kept = (torch.rand((stop - start, x.shape[-1]), generator=generator) >= rate).to(x.device, x.dtype)
            scale[0 if index is None else index, start:stop] = kept / (1 - rate)
        return x * scale


def prepare(model: nn.Module, compute: torch.dtype) -> None:
    """Puts the precision rule into a native model, in place: our Linear and Embedding, everything else (norms) fp32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Linear(child, compute))
            elif type(child) is nn.Embedding:
                setattr(parent, name, Embedding(child))
    kept = {id(p) for m in model.modules() if isinstance(m, Linear | Embedding) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def blocks(model: Any) -> dict[str, Linear]:
    """The linear layers that adapters go on: all but the output head."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and module is not head}


def attach(model: nn.Module, options: Lora | Full, seed: int) -> None:
    """Makes the trainable parameters, in place: everything else is frozen. LoRA changes nothing before the first step (B = 0)."""
    model.requires_grad_(False)
    METHODS[options.kind](model, options, seed)


def _attach_full(model: nn.Module, options: Full, seed: int) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _attach_lora(model: nn.Module, options: Lora, seed: int) -> None:
    layers = blocks(model)
    chosen = pick_targets(options.targets, list(layers))
    first = {name: group[0] for group in sharing(chosen) for name in group} if options.share_a else {}
    noise = RowNoise(seed, [layers[name] for name in chosen]) if options.dropout else None
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        layer = layers[name]
        A = torch.empty(options.rank, layer.in_features)
        bound = 1 / math.sqrt(layer.in_features)  # kaiming uniform with a = sqrt(5), as PEFT starts A
        A.uniform_(-bound, bound, generator=generator)
        _set_lora(layer, A, torch.zeros(layer.out_features, options.rank), options.alpha / options.rank)
        if first.get(name, name) != name:
            layer.lora_A = layers[first[name]].lora_A
        layer.dropout, layer.noise = options.dropout, noise


def _set_lora(layer: Linear, A: Tensor, B: Tensor, scaling: float) -> None:
    device = layer.weight.device
    layer.lora_A, layer.lora_B = nn.Parameter(A.float().to(device)), nn.Parameter(B.float().to(device))
    layer.scaling = scaling


METHODS = {"lora": _attach_lora, "full": _attach_full}


def noise_of(model: nn.Module) -> RowNoise | None:
    return next((layer.noise for layer in blocks(model).values() if layer.noise is not None), None)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def disabled(model: nn.Module):
    """The model without its adapter, inside: for the stages that compare with where they began."""
    layers = [layer for layer in blocks(model).values() if layer.lora_B is not None]
    held = [layer.lora_A for layer in layers]
    for layer in layers:
        layer.lora_A = None
    try:
        yield
    finally:
        for layer, A in zip(layers, held):
            layer.lora_A = A


def merge(model: nn.Module) -> None:
    """Adds the adapter to the weights, in place, and takes it off: W + B A * scaling, summed in fp32, kept in W's dtype."""
    for layer in blocks(model).values():
        if layer.lora_A is not None and layer.lora_B is not None:
            update = (layer.lora_B.detach() @ layer.lora_A.detach()) * layer.scaling
            layer.weight.data = (layer.weight.detach().float() + update).to(layer.weight.dtype)
            layer.lora_A = layer.lora_B = None


# --- files --------------------------------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, on the CPU."""
    found = {}
    for name, layer in blocks(model).items():
        if layer.lora_A is not None and layer.lora_B is not None:
            # Copies: an A that layers share is written once for each of them.
            found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().clone()
            found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().clone()
    return found


def save_adapter(model: nn.Module, folder: Path, options: Lora, base: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, reads them back and compares. `base`: what plain PEFT should open."""
    tensors = adapter_tensors(model)
    kept = {id(p) for layer in blocks(model).values() for p in (layer.lora_A, layer.lora_B)}
    lost = [name for name, parameter in trainable(model).items() if id(parameter) not in kept]
    if lost or not tensors:
        raise AssertionError(f"these trained tensors are in no adapter: {lost}")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / "adapter_model.safetensors")
    layers = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": _shortest(layers, list(blocks(model))),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    compare(tensors, folder / "adapter_model.safetensors")


def _shortest(chosen: list[str], names: list[str]) -> list[str]:
    """Last names where they select exactly these layers, else full names."""
    leaves = sorted({name.split(".")[-1] for name in chosen})
    selected = {name for name in names if name.split(".")[-1] in leaves}
    return leaves if selected == set(chosen) else sorted(chosen)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Safetensors, fsynced. The bytes depend on the tensors only."""
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner may read
    _sync(path)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """So that a rename inside it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def compare(tensors: dict[str, Tensor], path: Path) -> None:
    """Reads a file back: every tensor must be there, bit for bit."""
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        wrong = [n for n in tensors if n not in there or not torch.equal(file.get_tensor(n), tensors[n])]
    if wrong:
        raise OSError(f"{path} was written but does not read back: {wrong[:3]} differ; the disk may be full or failing")


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attaches a saved adapter (PEFT's LoRA layout) to a prepared model, in place, and returns the model. Nothing is trainable after.

    Raises UserError: no adapter there, other kinds of adapter, tensors that do not fit (all of them listed).
    """
    folder = Path(folder)
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        there = sorted(p.name for p in folder.iterdir())[:6] if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is not an adapter: it needs adapter_config.json and adapter_model.safetensors; there: {there}")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or (
            config.get("peft_type") == "LORA" and not isinstance(config.get("lora_alpha"), int | float)
        ):
            raise ValueError("it has no peft_type and lora_alpha")
    except ValueError as error:
        raise UserError(f"{config_path} is broken ({error}); copy the adapter folder again") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise UserError(
            f"{config_path}: only plain LoRA adapters can be loaded; this one is {config.get('peft_type')} with other parts"
        )
    tensors = read_tensors(weights_path)
    if any(not isinstance(m, Linear) for m in model.modules() if type(m) is nn.Linear):
        prepare(model, next(model.parameters()).dtype)
    _load_lora(model, tensors, config, folder)
    model.requires_grad_(False)
    return model


def _load_lora(model: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    layers, wrong, used = blocks(model), [], set()
    for name in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        A, B = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        layer = layers.get(name.removeprefix(PREFIX))
        if A is None or B is None or layer is None:
            wrong.append(f"{name}: {'no such layer in this model' if layer is None else 'A or B is missing'}")
        elif A.shape[1] != layer.in_features or B.shape[0] != layer.out_features or A.shape[0] != B.shape[1]:
            wrong.append(
                f"{name}: A {list(A.shape)} and B {list(B.shape)} do not fit a layer of {layer.in_features} -> {layer.out_features}"
            )
        else:
            used.add(name)
    targets = config.get("target_modules")
    if isinstance(targets, list) and used and not wrong:
        named = [name for name in layers if any(name == target or name.endswith("." + target) for target in targets)]
        wrong += [f"{name}: A and B are missing" for name in named if PREFIX + name not in used]
    if wrong or not used:
        raise UserError(
            f"the adapter {folder} was made for another model ({config.get('base_model_name_or_path')}): "
            + "; ".join(wrong[:3])
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name in used:
        short = name.removeprefix(PREFIX)
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        alpha = next((v for k, v in alphas.items() if short.endswith(k)), config["lora_alpha"])
        rank = next((v for k, v in ranks.items() if short.endswith(k)), A.shape[0])
        _set_lora(layers[short], A, B, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises UserError when it is cut short or not one."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own bare error type
        raise UserError(f"{path}: not a whole safetensors file ({error}); it may have been cut short, copy it again") from None


def save_full(model: Any, folder: Path, shard: str = "4GB") -> None:
    """A model as an ordinary Hugging Face folder in shards of at most `shard`, read back and compared."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar comes all the same
        model.save_pretrained(folder, max_shard_size=shard)
    state = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        _sync(path)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        compare({name: state[name].cpu() for name in names}, path)

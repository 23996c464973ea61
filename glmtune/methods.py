"""What is trained: LoRA and its variants, a prefix, some blocks, or every weight. Attach, merge, save, load.

Adapters are files in PEFT's layout; `layers.Linear` computes LoRA, `prefix` computes P-Tuning v2.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, prefix
from .adapters import PREFIX, Adapter, listed, lora, lora_tensors, open_folder, read, refuse_half, refuse_resized, shortest
from .errors import UserError
from .families import frozen_choice, lora_sizes, named_whole, pick_targets, plain_lora, sharing
from .layers import Embedding, Linear, RowNoise, blocks, prepare, prepared
from .run import Freeze, Full, Lora, Prefix
from .tensors import compare, read_tensors, save_full, write_tensors

__all__ = [
    "Embedding",
    "compare",
    "read_tensors",
    "save_full",
    "write_tensors",
]  # and all defined here

EXACT_SVD = 2048  # the smaller side of a weight up to which PiSSA decomposes it exactly


# --- attach -------------------------------------------------------------------------------------------------------------


def attach(model: nn.Module, options: Any, seed: int) -> None:
    """Makes the trainable parameters, in place: everything else is frozen. LoRA changes nothing before the first step.

    Raises UserError for names and numbers that this model does not have, and for a quantised model where weights would be trained.
    """
    model.requires_grad_(False)
    METHODS[options.kind](model, options, seed)


def _attach_full(model: nn.Module, options: Full, seed: int) -> None:
    _refuse_packed(model, "full")
    for parameter in model.parameters():
        _train(parameter)


def _attach_freeze(model: nn.Module, options: Freeze, seed: int) -> None:
    _refuse_packed(model, "freeze")
    named = dict(model.named_parameters(remove_duplicate=False))  # tied weights under both names
    for name in frozen_choice(options, list(named)):
        _train(named[name])


def _train(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def _refuse_packed(model: nn.Module, kind: str) -> None:
    packed = next((m.packed.kind for m in model.modules() if isinstance(m, Linear) and m.packed is not None), None)
    if packed is not None:
        raise UserError(
            f"the weights are kept in {packed}, which gradient steps cannot change, and method={kind} trains them; use method=lora or method=prefix"
        )


def _attach_lora(model: nn.Module, options: Lora, seed: int) -> None:
    layers = blocks(model)
    targets = [options.targets] if isinstance(options.targets, str) else options.targets
    chosen = pick_targets(None if targets == ["all-linear"] else targets, list(layers))
    sizes = lora_sizes(options, chosen)
    noise = _noise(model, seed) if options.dropout else None
    generator = torch.Generator().manual_seed(seed)
    for folder in options.under:
        _put_under(model, Path(folder))
    first = {name: group[0] for group in sharing(chosen) for name in group} if options.share_a else {}
    for number, name in enumerate(chosen):
        layer, (rank, alpha) = layers[name], sizes[name]
        scaling = alpha / (math.sqrt(rank) if options.rslora else rank)
        A = torch.empty(rank, layer.in_features)
        bound = 1 / math.sqrt(layer.in_features)  # kaiming uniform with a = sqrt(5), as PEFT starts A
        A.uniform_(-bound, bound, generator=generator)
        B = torch.zeros(layer.out_features, rank)
        if options.pissa:
            A, B = principal(layer.dense(), rank, scaling, seed)
            _add_under(layer, A, -B * scaling)
        _set_lora(layer, A, B, scaling)
        if options.dora:
            layer.lora_magnitude = nn.Parameter(layer.lengths())
        if first.get(name, name) != name:
            layer.lora_A = layers[first[name]].lora_A
        layer.dropout, layer.noise = options.dropout, None if noise is None else (noise, number)
    for name in saved_whole(model, options.modules_to_save):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            _train(parameter)


def principal(weight: Tensor, rank: int, scaling: float, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] with scaling B A = the largest `rank` singular directions of weight [out, in] (PiSSA, arXiv 2404.02948, equation 2)."""
    if min(weight.shape) <= EXACT_SVD:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(weight, q=min(rank + 16, *weight.shape), niter=8)
        U, S, V = U[:, :rank], S[:rank], V[:, :rank]
    root = (S / scaling).sqrt()
    return (V * root).T.contiguous(), (U * root).contiguous()


def saved_whole(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` means. Of tied weights both sides are named, since they are one."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    held = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    held = {name: module for name, module in held.items() if not isinstance(module, Linear) or module is head}
    held = {name: module for name, module in held.items() if not isinstance(module, prefix.Encoder)}
    ids = {id(p) for name in named_whole(wanted, held) for p in held[name].parameters(recurse=False)}
    return [name for name, module in held.items() if any(id(p) in ids for p in module.parameters(recurse=False))]


def _set_lora(layer: Linear, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None = None) -> None:
    # Copies: tensors out of a file lie unaligned, and products of those round differently.
    A, B = (tensor.to(layer.device, torch.float32, copy=True) for tensor in (A, B))
    layer.lora_A, layer.lora_B, layer.scaling = nn.Parameter(A), nn.Parameter(B), scaling
    layer._squares = None  # the weight may have changed since: another adapter was merged into it
    layer.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude.to(layer.device, torch.float32, copy=True))


def _add_under(layer: Linear, A: Tensor, B: Tensor) -> None:
    """A frozen low-rank piece more; B with its scaling."""
    A, B = A.float().to(layer.device), B.float().to(layer.device)
    layer.under = (A, B) if layer.under is None else (torch.cat([layer.under[0], A]), torch.cat([layer.under[1], B], 1))


def _put_under(model: nn.Module, folder: Path) -> None:
    adapter = read(folder)
    if not plain_lora(adapter.config):
        raise UserError(
            f"method.under: {folder} is not a plain LoRA adapter; only plain LoRA adapters can stay beneath another one"
        )
    _load_lora(model, adapter)
    for layer in blocks(model).values():
        if layer.lora_A is not None and layer.lora_B is not None:
            _add_under(layer, layer.lora_A.detach(), layer.lora_B.detach() * layer.scaling)
    unload(model)


def _attach_prefix(model: nn.Module, options: Prefix, seed: int) -> None:
    encoder = prefix.attach(
        model,
        num_virtual_tokens=options.num_virtual_tokens,
        projection=options.projection,
        dropout=options.dropout,
        seed=seed,
        noise=_noise(model, seed) if options.dropout else None,
    )
    encoder.requires_grad_(True)


METHODS = {"lora": _attach_lora, "prefix": _attach_prefix, "freeze": _attach_freeze, "full": _attach_full}


def add_neftune(model: nn.Module, alpha: float, seed: int) -> None:
    """Noise on the embeddings of training rows (run option neftune)."""
    for module in model.modules():
        if isinstance(module, Embedding) and module is model.get_input_embeddings():  # pyright: ignore[reportCallIssue]
            module.noise = (_noise(model, seed), alpha)


def _noise(model: nn.Module, seed: int) -> RowNoise:
    found = noise_of(model)
    if found is None:
        found = RowNoise(seed)
        object.__setattr__(model, "row_noise", found)  # no module, no parameter
    return found


def noise_of(model: nn.Module) -> RowNoise | None:
    return getattr(model, "row_noise", None)


def start_from(model: nn.Module, folder: Path) -> None:
    """Gives the attached, trainable adapter the values of a saved one. Raises UserError where names or shapes differ."""
    folder, config, tensors = open_folder(folder)
    if config["peft_type"] == "PREFIX_TUNING":
        prefix.from_peft(model, tensors, config)  # into the one that is attached
        return
    tensors = lora_tensors(lora(folder, config, tensors))
    parameters, wrong = trainable(model), []
    for name, parameter in parameters.items():
        saved = tensors.pop(_peft_name(name), None)
        if saved is None or saved.shape != parameter.shape:
            wrong.append(f"{name}: {'not there' if saved is None else f'{list(saved.shape)}, wanted {list(parameter.shape)}'}")
        else:
            parameter.data.copy_(saved)
    held = {id(parameter) for parameter in parameters.values()}
    for name in list(tensors):  # an A that is shared, or both sides of tied weights
        twin = _parameter(model, name)
        if twin is not None and id(twin) in held:
            if not torch.equal(twin.detach().cpu(), tensors[name].float()):
                raise UserError(f"method.start: {folder} holds different values for {name}, which this run shares")
            del tensors[name]
    wrong += [f"{name}: this run does not train it" for name in tensors]
    if wrong:
        raise UserError(f"method.start: {folder} does not fit this run: {'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")


def _parameter(model: nn.Module, peft_name: str) -> nn.Parameter | None:
    name = re.sub(r"\.lora_(A|B)\.weight$", r".lora_\1", peft_name.removeprefix(PREFIX)).replace(
        ".lora_magnitude_vector", ".lora_magnitude"
    )
    parent, _, leaf = name.rpartition(".")
    try:
        return getattr(model.get_submodule(parent), leaf, None)
    except AttributeError:
        return None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def disabled(model: nn.Module):
    """The model without its adapter, inside: for the stages that compare with where they began. Frozen adapters beneath stay on."""
    layers = [layer for layer in blocks(model).values() if layer.lora_B is not None]
    held = [(layer.lora_A, layer.lora_magnitude) for layer in layers]
    whole = getattr(model, "saved_whole", {})
    if any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n and not n.startswith("prefix_encoder")):
        raise UserError("weights of the model itself are trained (modules_to_save, freeze, full): there is nothing to switch off")
    for layer in layers:
        layer.lora_A = None
    _swap(model, whole)
    try:
        with ExitStack() as stack:
            if prefix.of(model) is not None:
                stack.enter_context(prefix.disabled(model))
            yield
    finally:
        _swap(model, whole)
        for layer, (A, magnitude) in zip(layers, held):
            layer.lora_A, layer.lora_magnitude = A, magnitude


def changes_nothing(model: nn.Module) -> bool:
    """Whether the attached adapter is without any effect: LoRA with every B zero (never trained, or saved empty)."""
    layers = [layer for layer in blocks(model).values() if layer.lora_B is not None]
    if not layers or prefix.of(model) is not None or getattr(model, "saved_whole", None):
        return False
    return all(
        layer.lora_magnitude is None and not (layer.scaling and layer.lora_A.any() and layer.lora_B.any())
        for layer in layers
        if layer.lora_A is not None and layer.lora_B is not None
    )


def _swap(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Exchanges the weights that an adapter brought with those of the base model."""
    for name, tensor in whole.items():
        parameter = model.get_parameter(name)
        whole[name], parameter.data = parameter.data, tensor


def unload(model: nn.Module) -> None:
    """Takes an adapter off: the base model is back, bit for bit."""
    for layer in blocks(model).values():
        layer.lora_A = layer.lora_B = layer.lora_magnitude = None
    if prefix.of(model) is not None:
        prefix.detach(model)
    whole = model.__dict__.pop("saved_whole", {})
    _swap(model, whole)


def check_mergeable(model: nn.Module) -> None:
    """Raises UserError for a prefix, which is no change of weights, and for packed weights."""
    if prefix.of(model) is not None:
        raise UserError(
            "a prefix adapter (P-Tuning v2) is no change of the weights and cannot be merged; export with --unmerged keeps it beside them"
        )
    adapted = {name: layer for name, layer in blocks(model).items() if layer.lora_B is not None or layer.under is not None}
    packed = next((name for name, layer in adapted.items() if layer.packed is not None), None)
    if packed is not None:
        raise UserError(f"{packed} is kept packed; an adapter is merged into the original weights: open the model without quant")


def merge(model: nn.Module, cast: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to) -> None:
    """Adds the adapter to the weights, in place, and takes it off: W + B A * scaling (DoRA: its rows at their learned lengths), summed in
    fp32, kept in W's dtype by `cast`. Raises UserError as `check_mergeable`."""
    check_mergeable(model)
    for layer in blocks(model).values():
        merged = merged_weight(layer)
        if merged is not None:
            layer.weight.data = cast(merged, layer.weight.dtype)
            layer.lora_A = layer.lora_B = layer.lora_magnitude = layer.under = None


def merged_weight(layer: Linear) -> Tensor | None:
    """W with everything that is attached to it, fp32 [out, in]; None where nothing is."""
    if layer.under is None and (layer.lora_A is None or layer.lora_B is None):
        return None
    weight = layer.dense()
    if layer.under is not None:
        weight = weight + layer.under[1] @ layer.under[0]
    if layer.lora_A is not None and layer.lora_B is not None:
        weight = weight + (layer.lora_B.detach() @ layer.lora_A.detach()) * layer.scaling
        if layer.lora_magnitude is not None:
            weight = weight * (layer.lora_magnitude.detach() / torch.linalg.norm(weight, dim=1)).unsqueeze(-1)
    return weight


# --- files --------------------------------------------------------------------------------------------------------------


def _peft_name(name: str) -> str:
    """Of a trained parameter in PEFT's files."""
    name = re.sub(r"\.lora_(A|B)$", r".lora_\1.weight", name)
    return PREFIX + re.sub(r"\.lora_magnitude$", ".lora_magnitude_vector", name)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, on the CPU. Frozen adapters beneath are part of it, with all scalings in B then."""
    found = {}
    layers = blocks(model)
    joined = any(layer.under is not None for layer in layers.values())
    dora = any(layer.lora_magnitude is not None for layer in layers.values())
    for name, layer in layers.items():
        A, B, magnitude = layer.lora_A, layer.lora_B, layer.lora_magnitude
        if joined:
            parts = [] if A is None or B is None else [(A.detach(), B.detach() * layer.scaling)]
            parts += [] if layer.under is None else [layer.under]
            A, B = (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)) if parts else (None, None)
        if A is not None and B is not None:
            # Copies: an A that layers share is written once for each of them.
            found[f"{PREFIX}{name}.lora_A.weight"] = A.detach().cpu().clone()
            found[f"{PREFIX}{name}.lora_B.weight"] = B.detach().cpu().clone()
            if (
                dora and magnitude is None
            ):  # only beneath: rows as long as they are, since in PEFT's files all layers have lengths or none
                magnitude = torch.linalg.norm(merged_weight(layer), dim=1)
            if magnitude is not None:
                found[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude.detach().cpu().clone()
    for name, module in model.named_modules():
        if not isinstance(module, prefix.Encoder) and "prefix_encoder" not in name:
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and not leaf.startswith("lora_"):  # of tied weights both names are written
                    found[f"{PREFIX}{name}.{leaf}"] = parameter.detach().cpu().clone()
    return found


def save_adapter(model: nn.Module, folder: Path, options: Any, base: str, fingerprint: str | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, reads them back and compares. `base`: what plain PEFT should open, and its
    fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(options, Prefix):
        tensors, config = prefix.peft_tensors(model), prefix.peft_config(model, base)
        lost = [name for name in trainable(model) if not name.startswith("prefix_encoder.")]
    else:
        tensors = adapter_tensors(model)
        config = _lora_config(model, tensors, options, base)
        kept = {id(p) for layer in blocks(model).values() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude)}
        lost = [n for n, p in trainable(model).items() if id(p) not in kept and PREFIX + n not in tensors]
    if lost or not tensors:
        raise AssertionError(f"these trained tensors are in no adapter: {lost}")
    write_tensors(tensors, folder / "adapter_model.safetensors", fingerprint)
    files.whole(folder / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    compare(tensors, folder / "adapter_model.safetensors")


def _lora_config(model: nn.Module, tensors: dict[str, Tensor], options: Lora, base: str) -> dict[str, Any]:
    layers = blocks(model)
    joined = any(layer.under is not None for layer in layers.values())
    ends = ".lora_A.weight"
    ranks = {name.removeprefix(PREFIX).removesuffix(ends): t.shape[0] for name, t in tensors.items() if name.endswith(ends)}
    whole = sorted({n.removeprefix(PREFIX).rsplit(".", 1)[0] for n in tensors if ".lora_" not in n})
    sizes = lora_sizes(options, list(ranks))
    rank = max(set(ranks.values()), key=list(ranks.values()).count) if joined else options.rank
    alpha = rank if joined else options.alpha
    alphas = {name: ranks[name] if joined else sizes[name][1] for name in ranks}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": options.dropout,
        "target_modules": shortest(ranks, layers),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": whole or None,
        "use_rslora": options.rslora and not joined,
        "use_dora": options.dora,
    }


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attaches a saved adapter (PEFT's LoRA or prefix layout) in place of another one, if any, and returns the model. Nothing is trainable
    after. `unload` takes it off again.

    Raises UserError: as `adapters.open_folder` and `adapters.lora`, and for tensors that do not fit this model.
    """
    folder, config, tensors = open_folder(folder)
    if not prepared(model):
        prepare(model, next(model.parameters()).dtype)
    if config["peft_type"] == "PREFIX_TUNING":
        prefix.check(tensors, config, folder)
        unload(model)
        prefix.from_peft(model, tensors, config)
    else:
        _load_lora(model, lora(folder, config, tensors))
    model.requires_grad_(False)
    return model


def _load_lora(model: nn.Module, adapter: Adapter) -> None:
    """In place of what is attached; one that does not fit leaves that as it is."""
    layers, wrong = blocks(model), [f"{name}: a value head, which `glmtune import` leaves out" for name in adapter.left_out]
    for name, held in adapter.layers.items():
        layer = layers.get(name)
        if layer is None:
            wrong.append(f"{name}: no such layer in this model")
        elif held.A.shape[1] != layer.in_features or held.B.shape[0] != layer.out_features:
            wrong.append(
                f"{name}: A {list(held.A.shape)} and B {list(held.B.shape)} do not fit a layer of {layer.in_features} -> {layer.out_features}"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    refuse_resized(adapter, {name: len(p) for name, p in parameters.items() if p.dim()})
    for name, tensor in adapter.whole.items():
        packed = layers.get(name.rpartition(".")[0])
        if packed is not None and packed.packed is not None:
            wrong.append(
                f"{name}: kept in {packed.packed.kind} here, and the adapter brings its own weights; open the model without quant"
            )
        elif name not in parameters or parameters[name].shape != tensor.shape:
            there = list(parameters[name].shape) if name in parameters else "nothing of that name"
            wrong.append(f"{name} {list(tensor.shape)}: this model has {there}")
    if not wrong:
        wrong = [f"{name}: A and B are missing" for name in adapter.lacking(layers)]
    if not adapter.layers.keys() & layers.keys():
        wrong = [
            f"none of its layers ({next(iter(adapter.layers))} ...) is in this model; `glmtune import` brings over those of a published layout"
        ]
    for name in adapter.whole:
        refuse_half(adapter.folder, adapter.whole, [other for other in parameters if parameters[other] is parameters.get(name)])
    if wrong:
        base = adapter.config.get("base_model_name_or_path")
        raise UserError(f"the adapter {adapter.folder} was made for another model ({base}): {listed(wrong)}")
    unload(model)
    for name, held in adapter.layers.items():
        _set_lora(layers[name], held.A, held.B, held.scaling, held.magnitude)
    replaced: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in adapter.whole.items():
        parameter = parameters[name]
        if id(parameter) not in seen:  # tied weights are one
            seen.add(id(parameter))
            replaced[name] = parameter.data
            parameter.data = tensor.to(parameter.device, copy=True)  # as it was trained: fp32
    if replaced:
        object.__setattr__(model, "saved_whole", replaced)

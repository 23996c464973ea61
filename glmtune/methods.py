"""What is trained: LoRA and its variants, a prefix, some blocks, or every weight. Attach, merge, save, load.

Adapters are files in PEFT's layout; `layers.Linear` computes LoRA, `prefix` computes P-Tuning v2.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, method, prefix
from .adapters import PREFIX, Adapter, listed, lora, lora_tensors, open_folder, read, refuse_half, refuse_resized, shortest
from .errors import UserError
from .families import adapter_config, frozen_choice, load_model, lora_sizes, named_whole, pick_targets, plain_lora, sharing
from .layers import Embedding, Linear, RowNoise, blocks, prepare, prepared
from .method import Reference
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
    method.of(options).attach(model, options, seed)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()  # what is trained is fp32, whoever made it
    _mark(model, options.kind)


def _mark(model: nn.Module, kind: str) -> None:
    """Notes whose adapter is attached, so that a merge refuses what it cannot merge."""
    object.__setattr__(model, "attached_method", kind)


def count_attached(options: Any, folder: Path) -> int:
    """How many numbers a method trains, counted on a model without weights."""
    model = load_model(folder, device="meta")
    prepare(model, model.dtype)
    attach(model, options, 0)
    return sum(parameter.numel() for parameter in trainable(model).values())


def attach_full(model: nn.Module, options: Full, seed: int) -> None:
    _refuse_packed(model, "full")
    for parameter in model.parameters():
        _train(parameter)


def attach_freeze(model: nn.Module, options: Freeze, seed: int) -> None:
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


def attach_lora(model: nn.Module, options: Lora, seed: int) -> None:
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
    _put_lora(model, adapter)
    for layer in blocks(model).values():
        if layer.lora_A is not None and layer.lora_B is not None:
            _add_under(layer, layer.lora_A.detach(), layer.lora_B.detach() * layer.scaling)
    unload(model)


def attach_prefix(model: nn.Module, options: Prefix, seed: int) -> None:
    encoder = prefix.attach(
        model,
        num_virtual_tokens=options.num_virtual_tokens,
        projection=options.projection,
        dropout=options.dropout,
        seed=seed,
        noise=_noise(model, seed) if options.dropout else None,
    )
    encoder.requires_grad_(True)


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


def begin_prefix(model: nn.Module, options: Prefix, first: Callable[[int], list[int]]) -> None:
    if options.start:
        _, config, tensors = open_folder(options.start)
        prefix.from_peft(model, tensors, config)  # into the one that is attached
    elif options.init == "words":
        prefix.start_from_words(model, first(options.num_virtual_tokens))


def begin_lora(model: nn.Module, options: Lora, first: Callable[[int], list[int]]) -> None:
    if options.start:
        _start_lora(model, Path(options.start))


def _start_lora(model: nn.Module, folder: Path) -> None:
    """Gives the attached, trainable adapter the values of a saved one. Raises UserError where names or shapes differ."""
    folder, config, tensors = open_folder(folder)
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
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside, bit for bit: without the adapter that is attached, those beneath it, and the modules it brought. Where
    training began is another thing: `reference`. Raises UserError where the model's own weights are trained."""
    with ExitStack() as stack:
        for one in method.METHODS.values():
            stack.enter_context(one.disabled(model))
        yield


@contextmanager
def disabled_lora(model: nn.Module) -> Iterator[None]:
    layers = list(blocks(model).values())
    held = [(layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.under) for layer in layers]
    whole = getattr(model, "saved_whole", {})
    if any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n and not n.startswith("prefix_encoder")):
        raise UserError("weights of the model itself are trained (modules_to_save, freeze, full): there is nothing to switch off")
    try:
        for layer in layers:
            layer.lora_A = layer.lora_B = layer.lora_magnitude = layer.under = None
        _swap(model, whole)
        yield
    finally:
        _swap(model, whole)
        for layer, (A, B, magnitude, under) in zip(layers, held):
            layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.under = A, B, magnitude, under


# --- where training began -----------------------------------------------------------------------------------------------


def hold_start(model: nn.Module, options: Any, keep: bool = False, file: Path | None = None) -> None:
    """Called once, where training begins (after `attach` and the method's `begin`): from here on `reference` knows how to come back.

    keep: also where that takes a second copy of the model's own weights (freeze, full; it lies on the CPU, in fp32). file: where an
    adapter's start is kept, so that a resumed run has the very same one, also where the adapter it went on from changed since, or another
    machine would make it otherwise (PiSSA's decomposition). It is written where there is none yet.
    """
    record = method.of(options)
    held = record.reference(model, options, keep)
    if file is not None and record.adapter and held.kept:
        if file.is_file():
            saved = read_tensors(file)
            same = {n for n in held.kept if n in saved and saved[n].shape == held.kept[n].shape}
            wrong = sorted((held.kept.keys() | saved.keys()) - same)
            if wrong:
                raise UserError(f"{file} is not where this run began: {wrong[0]} is missing, of another size or too much")
            for name, tensor in held.kept.items():  # into their own memory: tensors out of a file lie unaligned, and products of
                tensor.copy_(saved[name])  # those round differently
        else:
            part = file.with_name(f".{file.name}.part")
            write_tensors({name: tensor.cpu() for name, tensor in held.kept.items()}, part)
            with files.naming(file, part):
                part.replace(file)
                files.sync_folder(file.parent)
    object.__setattr__(model, "began", held)


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it computed at `hold_start`, bit for bit, however far it was trained since: without gradients, and
    without noise (dropout, NEFTune). Afterwards it is as it was. Raises UserError where nothing brings the start back."""
    held: Reference | None = getattr(model, "began", None)
    if held is None:
        raise UserError("nothing was kept of where this training began, so it has no reference (methods.hold_start)")
    if held.inside:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), held.open():
        held.inside = True
        model.eval()
        try:
            yield
        finally:
            held.inside = False
            for module, training in modes:
                module.training = training


def reference_copies(model: nn.Module, options: Any, keep: bool) -> Reference:
    """A copy of everything that is trained."""
    return _copies(model, trainable(model), None)


def reference_lora(model: nn.Module, options: Lora, keep: bool) -> Reference:
    """Adapters that start without any effect are switched off, which takes no memory: adding 0 changes no number. A copy is kept of the
    others (PiSSA, `start`) and of modules_to_save."""
    off = [layer for layer in blocks(model).values() if layer.lora_B is not None and _changes_nothing_yet(layer)]
    skipped = {id(p) for layer in off for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude)}
    on = {id(p) for layer in blocks(model).values() if layer not in off for p in (layer.lora_A,)}  # an A may be shared

    @contextmanager
    def switched() -> Iterator[None]:
        held = [layer.lora_A for layer in off]
        try:
            for layer in off:
                layer.lora_A = None
            yield
        finally:
            for layer, A in zip(off, held):
                layer.lora_A = A

    return _copies(model, {n: p for n, p in trainable(model).items() if id(p) not in skipped or id(p) in on}, switched)


@torch.no_grad()
def _changes_nothing_yet(layer: Linear) -> bool:
    assert layer.lora_B is not None
    return not layer.lora_B.any() and (layer.lora_magnitude is None or torch.equal(layer.lora_magnitude, layer.lengths()))


def reference_prefix(model: nn.Module, options: Prefix, keep: bool) -> Reference:
    """The keys and values themselves, which are less than the network that makes them."""
    encoder = prefix.of(model)
    assert encoder is not None
    with torch.no_grad():
        kept = {"prefix": encoder().clone()}
    return Reference(kept, lambda: encoder.showing(kept["prefix"]))


def reference_weights(model: nn.Module, options: Any, keep: bool) -> Reference:
    """The model's own weights are trained. keep: a copy of those that are, on the CPU. Without, the start can be had as long as it is
    there: a stage computes its log-probabilities before step 1."""
    parameters = trainable(model)
    if keep:
        return _copies(model, parameters, None, torch.device("cpu"))
    versions = {name: parameter._version for name, parameter in parameters.items()}

    def unchanged() -> AbstractContextManager[None]:
        if any(parameter._version != versions[name] for name, parameter in parameters.items()):
            size = 4e-9 * sum(parameter.numel() for parameter in parameters.values())
            raise UserError(
                f"method={options.kind} has changed the model's own weights, and no copy of them was kept ({size:.2g} GB), so where training "
                "began cannot be computed any more: it must be computed before step 1, or train with method=lora or method=prefix"
            )
        return nullcontext()

    return Reference({}, unchanged)


def _copies(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    around: Callable[[], AbstractContextManager[None]] | None,
    device: torch.device | None = None,
) -> Reference:
    """Copies of these parameters as they are now, each exchanged with the trained one inside; nothing is there twice meanwhile."""
    kept = {name: p.detach().to(device or p.device, copy=True) for name, p in parameters.items()}

    def exchange(name: str) -> None:
        parameter, copy = parameters[name], kept[name]
        if copy.device == parameter.device:
            kept[name], parameter.data = parameter.data, copy
        else:
            kept[name] = parameter.data.to(copy.device)
            parameter.data.copy_(copy)

    @contextmanager
    def exchanged() -> Iterator[None]:
        done: list[str] = []
        try:
            for name in parameters:
                exchange(name)
                done.append(name)
            with nullcontext() if around is None else around():
                yield
        finally:
            for name in done:
                exchange(name)

    return Reference(kept, exchanged)


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
    for one in method.METHODS.values():
        one.unload(model)
    model.__dict__.pop("attached_method", None)


def unload_lora(model: nn.Module) -> None:
    for layer in blocks(model).values():
        layer.lora_A = layer.lora_B = layer.lora_magnitude = None
    whole = model.__dict__.pop("saved_whole", {})
    _swap(model, whole)


def unload_prefix(model: nn.Module) -> None:
    if prefix.of(model) is not None:
        prefix.detach(model)


def check_mergeable(model: nn.Module) -> None:
    """Raises UserError for an adapter that is no change of weights, and for packed weights."""
    kind = model.__dict__.get("attached_method")
    record = method.METHODS.get(kind or "")
    if prefix.of(model) is not None:
        raise UserError(
            "a prefix adapter (P-Tuning v2) is no change of the weights and cannot be merged; export with --unmerged keeps it beside them"
        )
    if record is not None and record.adapter and record.merge is None:
        raise UserError(
            f"an adapter of method {kind} cannot be merged into the weights; export with --unmerged keeps it beside them"
        )
    adapted = {name: layer for name, layer in blocks(model).items() if layer.lora_B is not None or layer.under is not None}
    packed = next((name for name, layer in adapted.items() if layer.packed is not None), None)
    if packed is not None:
        raise UserError(f"{packed} is kept packed; an adapter is merged into the original weights: open the model without quant")


def merge(model: nn.Module, cast: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to) -> None:
    """Adds the adapter to the weights, in place, and takes it off. Sums are fp32, kept in W's dtype by `cast`. Raises UserError as
    `check_mergeable`."""
    check_mergeable(model)
    for one in method.METHODS.values():
        if one.merge is not None:
            one.merge(model, cast)
    model.__dict__.pop("attached_method", None)


def merge_lora(model: nn.Module, cast: Callable[[Tensor, torch.dtype], Tensor]) -> None:
    """W + B A * scaling (DoRA: its rows at their learned lengths)."""
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
    """Writes the adapter of a method, reads it back and compares. `base`: what plain PEFT should open, and its fingerprint."""
    method.of(options).save(model, folder, options, base, fingerprint)


def save_prefix(model: nn.Module, folder: Path, options: Prefix, base: str, fingerprint: str | None) -> None:
    lost = [name for name in trainable(model) if not name.startswith("prefix_encoder.")]
    _write_adapter(folder, prefix.peft_tensors(model), prefix.peft_config(model, base), lost, fingerprint)


def save_lora(model: nn.Module, folder: Path, options: Lora, base: str, fingerprint: str | None) -> None:
    tensors = adapter_tensors(model)
    kept = {id(p) for layer in blocks(model).values() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude)}
    lost = [n for n, p in trainable(model).items() if id(p) not in kept and PREFIX + n not in tensors]
    _write_adapter(folder, tensors, _lora_config(model, tensors, options, base), lost, fingerprint)


def _write_adapter(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], lost: list[str], fingerprint: str | None
) -> None:
    """adapter_model.safetensors and adapter_config.json, in PEFT's layout."""
    if lost or not tensors:
        raise AssertionError(f"these trained tensors are in no adapter: {lost}")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / "adapter_model.safetensors", fingerprint)
    files.whole(folder / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    compare(tensors, folder / "adapter_model.safetensors")


def save_whole(model: nn.Module, folder: Path, options: Any, base: str, fingerprint: str | None) -> None:
    """The whole model, as transformers reads it."""
    save_full(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # of what was trained; the rest may be stored in 16 bits
    files.whole(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


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
    """Attaches a saved adapter (PEFT's LoRA or prefix layout, or that of a method from outside) in place of another one, if any, and
    returns the model. Nothing is trainable after. `unload` takes it off again.

    Raises UserError: as `adapters.open_folder` and `adapters.lora`, and for tensors that do not fit this model.
    """
    path = Path(folder).expanduser()
    found = method.reader(adapter_config(path.parent if path.is_file() else path).get("peft_type"))
    kind, put = ("", None) if found is None else (found[0], found[1].load)
    if put is None:
        open_folder(path)  # says what is wrong with it
        raise UserError(f"{path}: there is nothing here that reads this adapter")
    if not prepared(model):
        prepare(model, next(model.parameters()).dtype)
    put(model, path)
    _mark(model, kind)
    model.requires_grad_(False)
    return model


def load_prefix(model: nn.Module, folder: Path) -> None:
    folder, config, tensors = open_folder(folder)
    prefix.check(tensors, config, folder)
    unload(model)
    prefix.from_peft(model, tensors, config)


def load_lora(model: nn.Module, folder: Path) -> None:
    _put_lora(model, read(folder))


def _put_lora(model: nn.Module, adapter: Adapter) -> None:
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

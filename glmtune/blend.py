"""`glmtune mix A=0.7 B=0.3`: several LoRA adapters become one. Ranks and layers may differ; one that lacks a layer adds nothing there.

- cat: the weighted sum of the updates, exactly; the ranks add up.
- svd: the nearest update of rank r to that sum (Eckart and Young); how much of its energy (squared length) is kept is told.
- linear: as PEFT's `linear`: A and B are summed by themselves, each with the square root of its weight, so that the products across adapters
  are in it too; NOT the weighted sum of the updates, and how far it is from it is told.
- ties: TIES-Merging (arXiv 2306.01708) on the updates, then svd: of each, the `density` largest numbers of a layer; the sign whose sum is
  larger; the mean of the weighted numbers that have it. As PEFT's `ties_svd`.
- dare: DARE (arXiv 2311.03099) on the updates, then svd: numbers are kept with probability `density` and divided by it; the weighted sum.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import families, files
from .adapters import Adapter, Layer, listed, read, readme, write
from .errors import UserError, did_you_mean
from .importing import base_name, fitted

HOWS = ("cat", "svd", "linear", "ties", "dare")
CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
WIDE = 1536  # above it a dense update's singular values are found by random projection, which takes seconds instead of minutes
Part = tuple[float, Layer]


def mix(
    parts: Sequence[tuple[str | Path, float]],
    to: str | Path,
    how: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    model: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes a weighted mix of adapters into the new folder `to`.

    parts: (adapter folder, weight). rank: of svd, ties and dare; None: the largest of the parts. density: of ties and dare, in (0, 1];
    None: 0.5. model: their base; with it adapters of the published layout can be mixed too, and all are checked against it.
    Raises UserError: other bases, a prefix among them, DoRA or whole modules (they cannot be added up), linear with unequal ranks.
    """
    _check_request(parts, how, rank, density)
    adapters = _readable(parts)
    base = None if model is None else families.locate(model, say=say).base
    if base is not None:
        adapters = [fitted(adapter, base) for adapter in adapters]
    _check_same_base(adapters, say)
    for adapter in adapters:
        if adapter.changes_nothing:
            say(f"warning: {adapter.folder} changes nothing: A or B is zero in all layers")
    weights = [float(weight) for _, weight in parts]
    ranks = [max(layer.rank for layer in adapter.layers.values()) for adapter in adapters]
    made = Adapter(adapters[0].folder, {"lora_dropout": 0.0}, {})
    wanted = kept = 0.0  # squared lengths: of what should be, of what is written (linear: of the difference)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        held = [(w, adapter.layers[name]) for w, adapter in zip(weights, adapters) if name in adapter.layers]
        if how == "cat":
            made.layers[name] = _cat(held)
            continue
        if how == "linear":
            made.layers[name] = _linear(held, name)
            exact = _cat(held)
            wanted += _energy(exact)
            kept += _energy(_cat([(1.0, made.layers[name]), (-1.0, exact)]))
            continue
        if how == "svd":
            left, values, right = _decomposed(_cat(held))
        else:
            dense = _ties(held, density or 0.5) if how == "ties" else _dare(held, density or 0.5, f"{seed}/{name}")
            left, values, right, total = _largest(dense, rank or max(ranks), seed)
            wanted += total
        made.layers[name] = _from_values(left, values, right, rank or max(ranks))
        if how == "svd":
            wanted += float(values.square().sum())
        kept += float(values[: rank or max(ranks)].square().sum())
    _report(how, made, wanted, kept, say)
    name = str(model) if model is not None else str(adapters[0].config.get("base_model_name_or_path") or "BASE")
    with files.new_folder(to) as work:
        marks = {families.trained_on(adapter.folder) for adapter in adapters} if base is None else {families.fingerprint(base)}
        linear = families.linear_names(base) if base is not None else ()
        write(work, made, name if base is None else base_name(name, base), linear, marks.pop() if len(marks) == 1 else None)
        _carry([adapter.folder for adapter in adapters], work, say)
        about = " + ".join(f"{weight:g} {_named(adapter.folder)}" for weight, adapter in zip(weights, adapters))
        known = base if base is not None else Path(name) if (Path(name) / "config.json").is_file() else None
        files.whole(work / "README.md", readme(name, known, f"Mix of LoRA adapters by {how}: {about}"))
    return Path(to)


# --- checks -------------------------------------------------------------------------------------------------------------


def _check_request(parts: Sequence[tuple[str | Path, float]], how: str, rank: int | None, density: float | None) -> None:
    if how not in HOWS:
        raise UserError(f"how: there is no way '{how}' to mix{did_you_mean(how, HOWS)}; wanted one of {', '.join(HOWS)}")
    if not parts:
        raise UserError("nothing to mix; give adapters with weights: A=0.7 B=0.3")
    odd = [f"{folder}={weight}" for folder, weight in parts if not math.isfinite(weight)]
    if odd:
        raise UserError(f"{odd[0]}: wanted a finite number as weight")
    if rank is not None and how in ("cat", "linear"):
        raise UserError(f"rank is for svd, ties and dare; with {how} it follows from the adapters")
    if rank is not None and rank < 1:
        raise UserError(f"rank: got {rank}, wanted 1 or more")
    if density is not None and (how not in ("ties", "dare") or not 0 < density <= 1):
        raise UserError(f"density: got {density} with {how}; wanted a number above 0 and up to 1, with ties or dare")


def _readable(parts: Sequence[tuple[str | Path, float]]) -> list[Adapter]:
    kinds = {str(folder): str(families.adapter_config(folder).get("peft_type", "LORA")) for folder, _ in parts}
    if len(set(kinds.values())) > 1:
        given = ", ".join(f"{folder} is {kind}" for folder, kind in kinds.items())
        raise UserError(f"{given}: different kinds cannot be added up; mix LoRA adapters only")
    adapters = [read(folder) for folder, _ in parts]
    for adapter in adapters:
        if adapter.dora or adapter.whole:
            what = "DoRA, whose lengths" if adapter.dora else f"trained {', '.join(list(adapter.whole)[:2])}, which"
            raise UserError(
                f"{adapter.folder} holds {what} cannot be added up; merge it into its base with `glmtune export` instead"
            )
    return adapters


def _check_same_base(adapters: list[Adapter], say: Callable[[str], None]) -> None:
    """By the layers' names and sizes: configs name one base in several ways (a folder, a hub id)."""
    known, shapes = adapters[0], dict[str, tuple[int, int]]()
    wrong = []
    for adapter in adapters:
        blocks = {_block(name) for name in adapter.layers}
        if not blocks & {_block(name) for name in known.layers}:
            wrong.append(f"{next(iter(known.layers))} there, {next(iter(adapter.layers))} here")
        for name, layer in adapter.layers.items():
            shape = (layer.A.shape[1], layer.B.shape[0])
            if shapes.setdefault(name, shape) != shape:
                wrong.append(f"{name} is {shapes[name][0]} -> {shapes[name][1]} there, {shape[0]} -> {shape[1]} here")
        if wrong:
            raise UserError(f"{known.folder} and {adapter.folder} were made for different models: {listed(wrong)}")
    bases = list(dict.fromkeys(str(adapter.config.get("base_model_name_or_path")) for adapter in adapters))
    marks = {mark for adapter in adapters if (mark := families.trained_on(adapter.folder)) is not None}
    if len(marks) > 1 or (len(bases) > 1 and not marks):
        say(
            f"warning: the adapters were trained on different bases ({', '.join(bases)}), whose layers have the same sizes; if these are not one "
            "model under several names, the mix computes nothing that was learned"
        )


def _block(name: str) -> str:
    """model.layers.3.self_attn.q_proj -> model.layers.3."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


# --- mathematics --------------------------------------------------------------------------------------------------------
# An update is scaling B A; each function returns one with scaling 1, in fp32.


def _named(folder: Path) -> str:
    """A run's adapter is called after the run."""
    return folder.resolve().parent.name if folder.name == "adapter" else folder.name


def _cat(parts: Sequence[Part]) -> Layer:
    A = torch.cat([layer.A.float() for _, layer in parts])
    B = torch.cat([layer.B.float() * (weight * layer.scaling) for weight, layer in parts], dim=1)
    return Layer(A, B, 1.0)


def _linear(parts: Sequence[Part], name: str) -> Layer:
    if len({layer.rank for _, layer in parts}) > 1:
        ranks = ", ".join(str(layer.rank) for _, layer in parts)
        raise UserError(f"{name}: linear adds A to A and B to B, so it needs equal ranks; these have {ranks}. Use cat or svd")
    roots = [math.sqrt(abs(weight * layer.scaling)) for weight, layer in parts]
    signs = [math.copysign(1.0, weight * layer.scaling) for weight, layer in parts]
    A = torch.stack([layer.A.float() * (root * sign) for (_, layer), root, sign in zip(parts, roots, signs)]).sum(0)
    return Layer(A, torch.stack([layer.B.float() * root for (_, layer), root in zip(parts, roots)]).sum(0), 1.0)


def _energy(layer: Layer) -> float:
    """||B A||^2, without making B A: the sum of (B^T B) * (A A^T), in fp64."""
    A, B = layer.A.double(), layer.B.double()
    return float(((B.T @ B) * (A @ A.T)).sum()) * layer.scaling**2


def _decomposed(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A, through the small matrix between two QR decompositions: exact, in fp64."""
    Qb, Rb = torch.linalg.qr(layer.B.double())
    Qa, Ra = torch.linalg.qr(layer.A.double().T)
    U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U, S, V @ Qa.T


def _largest(dense: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest singular values and vectors of a dense update, and its squared length."""
    total = float(dense.double().square().sum())
    if min(dense.shape) <= WIDE:
        return *torch.linalg.svd(dense, full_matrices=False), total
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(dense, q=min(2 * rank + 16, *dense.shape), niter=6)
    return U, S, V.T, total


def _from_values(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Layer:
    """B = U sqrt(S), A = sqrt(S) V: balanced, so that training can go on. Filled up with zeros where there are fewer values."""
    roots = values[:rank].sqrt()
    B, A = (left[:, :rank] * roots).float(), (roots[:, None] * right[:rank]).float()
    missing = rank - len(roots)
    if missing:
        B, A = torch.cat([B, B.new_zeros(len(B), missing)], 1), torch.cat([A, A.new_zeros(missing, A.shape[1])])
    return Layer(A.contiguous(), B.contiguous(), 1.0)


def _updates(parts: Sequence[Part]) -> Iterator[tuple[float, Tensor]]:
    for weight, layer in parts:
        yield weight, (layer.B.float() @ layer.A.float()) * layer.scaling


def _ties(parts: Sequence[Part], density: float) -> Tensor:
    """Section 4 of arXiv 2306.01708: trim, elect signs by the larger sum, average those that agree."""
    weights, trimmed = [], []
    for weight, update in _updates(parts):
        size = update.abs()
        smallest = size.flatten().kthvalue(size.numel() - max(1, int(density * size.numel())) + 1).values  # of those that stay
        weights.append(weight)
        trimmed.append(update * (size >= smallest))
    sign = torch.where(torch.stack(trimmed).sum(0) >= 0, 1.0, -1.0)
    total, voters = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, update in zip(weights, trimmed):
        agrees = update.sign() == sign
        total += weight * update * agrees
        voters += agrees
    return total / voters.clamp(min=1)


def _dare(parts: Sequence[Part], density: float, key: str) -> Tensor:
    """Section 3 of arXiv 2311.03099: drop and rescale, so that each number keeps its mean. The masks follow from the key."""
    total = None
    for i, (weight, update) in enumerate(_updates(parts)):
        digest = hashlib.blake2b(f"{key}/{i}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        kept = update * (torch.rand(update.shape, generator=generator) < density) * (weight / density)
        total = kept if total is None else total + kept
    assert total is not None
    return total


# --- what is said and kept ------------------------------------------------------------------------------------------------


def _report(how: str, made: Adapter, wanted: float, kept: float, say: Callable[[str], None]) -> None:
    ranks = ", ".join(map(str, sorted({layer.rank for layer in made.layers.values()})))
    told = {
        "cat": "the weighted sum of the updates, exactly",
        "linear": f"A's and B's summed by themselves: {math.sqrt(kept / wanted) if wanted else 0:.0%} away from the weighted sum (cat is exact)",
        "svd": f"{kept / wanted if wanted else 1:.2%} of the weighted sum's energy kept",
        "ties": f"{kept / wanted if wanted else 1:.2%} of the trimmed and elected update's energy kept",
        "dare": f"{kept / wanted if wanted else 1:.2%} of the dropped and rescaled update's energy kept (dropping adds noise of full rank)",
    }
    say(f"{how}: {len(made.layers)} layers, rank {ranks}; {told[how]}")
    if made.changes_nothing:
        say("warning: the mix changes nothing: its weighted sum is zero in all layers")


def _carry(folders: list[Path], work: Path, say: Callable[[str], None]) -> None:
    """Tokenizer and chat format of the first adapter that has them."""
    owners = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
    formats = {
        folder: (folder / "chat_template.jinja").read_text(encoding="utf-8")
        for folder in owners
        if (folder / "chat_template.jinja").is_file()
    }
    if not owners:
        return
    for name in CARRIED:
        if (owners[0] / name).is_file():
            shutil.copyfile(owners[0] / name, work / name)
    if len(set(formats.values())) > 1:
        say(f"note: the adapters were trained on different chat formats; the mix keeps that of {owners[0]}")

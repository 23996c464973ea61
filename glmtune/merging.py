"""Merging an adapter into 16-bit weights, and how much of its effect is left then.

A 16-bit weight has 8 (bf16) or 11 (fp16) significant bits: the part of an update that is smaller than half a step of its weight is rounded
away. So the effect is measured on real texts, before and after.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import methods
from .layers import Linear
from .records import Example

ENOUGH = 0.99  # share of the effect below which the user is told what to do
TOKENS = 512  # of text that are measured on


@dataclass(frozen=True)
class Kept:
    """z are logits at the learned places: with the adapter apart (a), merged (m), and of the base model (b)."""

    share: float  # <z_m - z_b, z_a - z_b> / |z_a - z_b|^2: 1 where the whole effect is there
    noise: float  # |z_m - z_a| / |z_a - z_b|: what differs, also where nothing is lost on average
    tokens: int

    def __str__(self) -> str:
        return f"{self.share:.1%} of the adapter's effect is kept (difference {self.noise:.1%} of it), measured at {self.tokens} tokens"


def merge(model: Any, examples: Sequence[Example], dtype: torch.dtype, rounding: str = "nearest", seed: int = 0) -> Kept | None:
    """Merges the attached adapter into weights of `dtype`, in place. Returns what is left of its effect, None where there is no effect to
    compare with. All products of the comparison are fp32, so that only the rounding of the weights is seen.

    rounding: "nearest", or "stochastic": up or down at random, by nearness, so that on average nothing is lost (arXiv 1502.02551).
    """
    methods.check_mergeable(model)
    held = {name: layer.compute for name, layer in model.named_modules() if isinstance(layer, Linear)}
    for name in held:
        model.get_submodule(name).compute = torch.float32
    adapted = _logits(model, examples)
    with methods.disabled(model):
        base = _logits(model, examples)
    generator = torch.Generator().manual_seed(seed)
    if rounding == "stochastic":
        methods.merge(model, lambda weight, kind: stochastic(weight, kind, generator))
    else:
        methods.merge(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    merged = _logits(model, examples)
    for name, compute in held.items():
        model.get_submodule(name).compute = compute
    effect, now = adapted - base, merged - base
    size = effect.square().sum()
    if size == 0:
        return None
    return Kept(float((now * effect).sum() / size), float((merged - adapted).norm() / size.sqrt()), len(effect))


def stochastic(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16 or fp16: to one of the two nearest numbers, the nearer the likelier. The mean over draws is the fp32 number."""
    if dtype == torch.float32:
        return weight
    near = weight.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, torch.inf))
    down = torch.nextafter(near, torch.full_like(near, -torch.inf))
    far = torch.where(weight > near.float(), up, down)
    gap = (far.float() - near.float()).abs()
    chance = torch.where(gap > 0, (weight - near.float()).abs() / gap, 0)
    drawn = torch.rand(weight.shape, generator=generator).to(weight.device)
    return torch.where(drawn < chance, far, near)


@torch.no_grad()
def _logits(model: Any, examples: Sequence[Example]) -> Tensor:
    """At the learned places of the first TOKENS tokens, less their mean: only differences between tokens count. fp32 [N, V] on the CPU."""
    device, found, seen = model.get_input_embeddings().weight.device, [], 0
    for example in examples:
        if seen >= TOKENS:
            break
        seen += len(example.ids)
        places = [i for i, weight in enumerate(example.weights) if weight] or list(range(len(example.ids)))
        ids = torch.tensor([example.ids], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, places].float().cpu()
        found.append(logits - logits.mean(-1, keepdim=True))
    return torch.cat(found)


def advice(kept: Kept | None, dtype: torch.dtype, rounding: str, single: bool, say: Callable[[str], None]) -> None:
    """Tells what is left, and what to do where it is too little. single: a GGUF file is written, not a folder."""
    if kept is None:
        say("warning: this adapter changes nothing: with and without it the model says the same")
        return
    say(f"merged: {kept}")
    if kept.share < ENOUGH:
        ways = ["write --outtype f32"] if single else ["keep the adapter apart (--unmerged)", "merge into --dtype fp32"]
        ways += ["or f16, whose steps are finer" if single else "or fp16, whose steps are finer"] if dtype == torch.bfloat16 else []
        ways += ["or round at random, which loses nothing on average (--rounding stochastic)"] if rounding == "nearest" else []
        say(
            f"warning: the rest is smaller than half a step of a {str(dtype).removeprefix('torch.')} weight and was rounded away; {', '.join(ways)}"
        )

"""The layers that a prepared model is made of: they carry the precision rule, adapters, packed weights and seeded noise.

`Linear` is the one linear layer of the package: products with stored weights happen here, and on the fast path in fused.py, by the same
rule. Such a product
may run in 16 bits; everything it is added to is fp32, so that small updates are not rounded away (docs/architecture.md).
"""

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowNoise:
    """Random numbers that depend on (seed, step, row, what for) only, so that the cut into micro-batches changes nothing.

    Set `step` and, before each forward, `spans`: (row, index of the batch or None, start, stop) of every row in the tensor.
    """

    def __init__(self, seed: int):
        self.seed, self.step = seed, 0
        self.spans: list[tuple[int, int | None, int, int]] = []

    def uniform(self, row: int, what: Any, shape: tuple[int, ...]) -> Tensor:
        """In [0, 1), fp32, on the CPU: the same on every device."""
        key = f"{self.seed}/{self.step}/{row}/{what}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))
        return torch.rand(shape, generator=generator)

    def drop(self, x: Tensor, rate: float, what: Any) -> Tensor:
        """Dropout on x [B, S, d] (or [S, d] for spans without an index)."""
        scale = torch.zeros_like(x)
        for row, index, start, stop in self.spans:
            kept = (self.uniform(row, what, (stop - start, x.shape[-1])) >= rate).to(x.device, x.dtype)
            scale[0 if index is None else index, start:stop] = kept / (1 - rate)
        return x * scale

    def shake(self, x: Tensor, alpha: float) -> Tensor:
        """NEFTune (arXiv 2310.05914, equation 1): uniform noise of at most alpha / sqrt(L d) on embeddings x [B, S, d] of rows of length L."""
        added = torch.zeros_like(x)
        for row, index, start, stop in self.spans:
            noise = self.uniform(row, "neftune", (stop - start, x.shape[-1])) * 2 - 1
            added[0 if index is None else index, start:stop] = noise.to(x) * (alpha / math.sqrt((stop - start) * x.shape[-1]))
        return x + added


class Linear(nn.Linear):
    """y = x W^T + b, plus (x A^T) B^T * scaling where an adapter is attached.

    weight [out, in] in its storage dtype, or `packed` (quant.Packed) instead of it; the product runs in `compute`, the result comes back
    in x's dtype. lora_A [rank, in], lora_B [out, rank] and DoRA's lora_magnitude [out] are fp32 or None. `under`: (A, B) of frozen adapters
    beneath, with their scaling in B.
    """

    weight: nn.Parameter  # None where `packed` is not
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude: nn.Parameter | None

    def __init__(self, old: Any, compute: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = old.in_features, old.out_features, old.bias
        self.packed: Any = getattr(old, "packed", None)
        self.register_parameter("weight", None if self.packed is not None else old.weight)
        for name in ("lora_A", "lora_B", "lora_magnitude"):
            self.register_parameter(name, None)
        self.scaling, self.dropout, self.compute = 1.0, 0.0, compute
        self.noise: tuple[RowNoise, int] | None = None  # and this layer's number in it
        self.under: tuple[Tensor, Tensor] | None = None
        self._squares: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.packed is None else self.packed.device

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.lora_A is not None and self.lora_B is not None
        if self.lora_magnitude is None:
            y = self._product(x.to(self.compute), self.bias).to(x.dtype)
            y = y if self.under is None else y + self._beneath(x).to(y.dtype)
            return y + self._update(x).to(y.dtype) * self.scaling if adapted else y
        # DoRA with A taken away is DoRA before its first step, whose update is 0 and whose lengths are those of the rows: the same bits.
        y = self._product(x.to(self.compute), None).to(x.dtype)
        y = y + self._update(x).to(x.dtype) * self.scaling if adapted else y
        y = y if self.under is None else y + self._beneath(x).to(y.dtype)
        y = y * (self.lora_magnitude / self.lengths()).to(y.dtype) if adapted else y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """The plain product in the weight's own dtype, for an output head: a call of the module, so that whoever shards its weight can
        gather it around the call."""
        return F.linear(x.to(self.weight.dtype), self.weight)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(self.compute)
        if self.packed is None:
            return F.linear(x, self.weight.to(self.compute), bias)
        return self.packed(x) if bias is None else self.packed(x) + bias

    def _update(self, x: Tensor) -> Tensor:
        assert self.lora_A is not None and self.lora_B is not None
        if self.noise is not None and self.dropout and self.training:
            x = self.noise[0].drop(x, self.dropout, self.noise[1])
        return F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)

    def _beneath(self, x: Tensor) -> Tensor:
        assert self.under is not None
        return F.linear(F.linear(x.to(self.under[0].dtype), self.under[0]), self.under[1])

    def dense(self) -> Tensor:
        """The weight [out, in] in fp32, without adapters, unpacked."""
        return self.weight.detach().float() if self.packed is None else self.packed.dense()

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """||W + scaling B A + what is beneath|| of each row, [out]: DoRA's norm (arXiv 2402.09353, section 4.3), through which no gradient
        flows.

        By ||w||^2 + 2 w.(BA) + ||BA||^2, so that the sum itself is never made.
        """
        assert self.lora_A is not None and self.lora_B is not None
        if self._squares is None:
            weight = self.weight.detach() if self.packed is None else self.dense()
            # A few rows at a time: whole squares of each layer would leave holes of its size in a CPU's heap (estimate.HOLES).
            self._squares = torch.cat([rows.float().square().sum(-1) for rows in weight.split(64)])
        A, B = self.lora_A.float(), self.lora_B.float() * self.scaling
        if self.under is not None:
            A, B = torch.cat([A, self.under[0]]), torch.cat([B, self.under[1]], 1)
        cross = (self._product(A.to(self.compute), None).float().T * B).sum(-1)
        own = ((B @ (A @ A.T)) * B).sum(-1)
        return (self._squares.to(A.device) + 2 * cross + own).clamp(min=0).sqrt()


class Embedding(nn.Embedding):
    """An embedding whose output is fp32, whatever its weights are stored in: the residual stream starts here."""

    def __init__(self, old: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = old.num_embeddings, old.embedding_dim, old.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = old.weight
        self.noise: tuple[RowNoise, float] | None = None  # and NEFTune's alpha

    def forward(self, input: Tensor) -> Tensor:
        x = F.embedding(input, self.weight).float()
        return self.noise[0].shake(x, self.noise[1]) if self.noise is not None and self.training else x


def prepare(model: nn.Module, compute: torch.dtype) -> None:
    """Puts the precision rule into a native model, in place: our Linear and Embedding, everything else (norms) fp32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear or (not isinstance(child, Linear) and hasattr(child, "packed")):
                setattr(parent, name, Linear(child, compute))
            elif type(child) is nn.Embedding:
                setattr(parent, name, Embedding(child))
    kept = {id(p) for m in model.modules() if isinstance(m, Linear | Embedding) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def prepared(model: nn.Module) -> bool:
    return not any(type(module) is nn.Linear for module in model.modules())


def blocks(model: Any) -> dict[str, Linear]:
    """The linear layers that adapters go on: all but the output head."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and module is not head}

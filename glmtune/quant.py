"""Frozen weights that stay packed in memory: nf4, int8 by rows, and ChatGLM's own published int4 and int8.

A product unpacks a few rows, multiplies and forgets them, forward and backward alike: nothing packed ever changes, so an evaluation
cannot touch the gradients after it. The same weight packs to the same bits, whatever the device and the number of threads.

    kind          bytes a weight   weight stands for
    nf4           0.516            code[4 bits] * scale of a block of 64; the scales are 8-bit numbers themselves, in blocks of 256
    int8          1                int8 * scale of its row (fp32)
    chatglm-int4  0.5              the same with 4 signed bits (fp16): quantization.py of chatglm-6b-int4
    chatglm-int8  1                the same with 8 bits (fp16): quantization.py of chatglm-6b-int8

int8 has the weights of LLM.int8 (arXiv 2208.07339: by rows, largest number 127), but multiplies them with the activations as they
are, where LLM.int8 rounds those to 8 bits too and then must keep columns with outliers (6.0) apart: its forward is not the function
whose gradient it gives, and other kernels do it on each device. Source of nf4: QLoRA, arXiv 2305.14314, section 3.
"""

import importlib
import logging
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import UserError

BLOCK, GROUP = 64, 256  # nf4: weights that share a scale, scales that share a scale
UNPACKING, PACKING = 1 << 21, 1 << 18  # numbers at a time on a CPU, by what its caches hold; elsewhere 1 << 26


class Packed(nn.Module):
    """A frozen weight [out, in], packed. `packed(x)` is x W^T in x's dtype, differentiable in x; it holds no parameter and no bias.

    It is made from the base at each start, so it is in no state_dict.
    """

    kind: str
    step = 1  # pieces start at multiples of so many rows

    def __init__(self, out_features: int, in_features: int, **tensors: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def of(cls, weight: Tensor) -> "Packed":
        """Packs a weight [out, in] of 16 or 32 bits on the device where it is. Raises ValueError with what cannot be packed."""
        raise NotImplementedError

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """W[start:stop]; start is a multiple of `step`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)  # type: ignore[return-value]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the packed one stands for, [out, in]."""
        made = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        for start, stop in self.pieces():
            made[start:stop] = self.rows(start, stop, dtype)
        return made

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows from, to: what is unpacked at a time."""
        return _pieces(self.out_features, self.in_features, self.device, UNPACKING, self.step)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kind}, {self.nbytes} bytes"

    def _apply(self, fn: Any, recurse: bool = True) -> "Packed":
        """`.to(dtype)`, `.half()` and their like move it and leave its numbers alone: rounded scales would be other weights."""
        for name, held in self._buffers.items():
            if held is not None:
                moved = fn(held)
                self._buffers[name] = moved if moved.dtype == held.dtype else held.to(moved.device)
        return self


def _pieces(rows: int, columns: int, device: torch.device, numbers: int, step: int = 1) -> Iterator[tuple[int, int]]:
    numbers = numbers if device.type == "cpu" else 1 << 26
    size = max(1, numbers // max(columns, 1) // step) * step
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


class _Product(torch.autograd.Function):
    """x W^T a few rows of W at a time. Only x's shape is kept for the backward pass, which unpacks again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed, ctx.shape, ctx.dtype = packed, x.shape, x.dtype
        y = x.new_empty(*x.shape[:-1], packed.out_features)
        for start, stop in packed.pieces():
            y[..., start:stop] = F.linear(x, packed.rows(start, stop, x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.shape, dtype=torch.float32)  # a sum over pieces, so not in 16 bits
        for start, stop in ctx.packed.pieces():
            total += grad[..., start:stop] @ ctx.packed.rows(start, stop, grad.dtype)
        return total.to(ctx.dtype), None


# --- by rows --------------------------------------------------------------------------------------------------------------


class Int8(Packed):
    """codes int8 [out, in], scale [out]: W = codes * scale."""

    codes: Tensor
    scale: Tensor
    kind = "int8"
    bits = 8
    arithmetic = torch.float32  # of packing, and what the scale is kept in

    def __init__(self, codes: Tensor, scale: Tensor):
        super().__init__(codes.shape[0], codes.shape[1] * 8 // self.bits, codes=codes, scale=scale)

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        """scale = largest of the row / (2^(bits-1) - 1), codes = round(W / scale), half to even; every step rounded to `arithmetic`."""
        rows, columns = weight.shape
        if cls.bits == 4 and columns % 2:
            raise ValueError(f"its {columns} columns cannot be put two into a byte")
        largest = torch.tensor(2.0 ** (cls.bits - 1) - 1, dtype=cls.arithmetic, device=weight.device)
        codes = torch.empty(rows, columns * cls.bits // 8, dtype=torch.int8, device=weight.device)
        scale = torch.empty(rows, dtype=cls.arithmetic, device=weight.device)
        for start, stop in _pieces(rows, columns, weight.device, PACKING):
            w = weight[start:stop].to(cls.arithmetic)
            s = w.abs().amax(-1, keepdim=True) / largest
            whole = torch.where(s > 0, (w / s).round(), 0).to(torch.int16).to(torch.int8)
            scale[start:stop] = s.squeeze(-1)
            codes[start:stop] = (whole[:, ::2] << 4) | (whole[:, 1::2] & 15) if cls.bits == 4 else whole
        if not scale.isfinite().all():
            raise ValueError(f"it holds numbers that are not finite in {str(cls.arithmetic).removeprefix('torch.')}")
        return cls(codes, scale)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return dequantise(self.codes[start:stop], self.scale[start:stop].float(), self.bits).to(dtype)


class ChatglmInt8(Int8):
    """As published: the weights are put into fp16 (`.half().quantize(8)`), then scale and quotients are fp16 as well.

    Where the scale of a very small row rounds down so far that a quotient passes 127 (a row below 0.001), it wraps to the other sign:
    the published code does that, and what was trained on those numbers wants them.
    """

    kind = "chatglm-int8"
    arithmetic = torch.float16


class ChatglmInt4(ChatglmInt8):
    """As published: two numbers in a byte, the first in the high half, both signed; codes int8 [out, in / 2]."""

    kind = "chatglm-int4"
    bits = 4


def dequantise(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """fp32 [out, in] of codes int8 [out, in] (8 bits) or [out, in / 2] (4 bits, the first number of a pair in the high half of the
    byte, both signed) and scale fp32 [out]. Source: quantization.py of the published chatglm-6b-int4 and -int8."""
    if bits == 4:
        codes = torch.stack([codes >> 4, (codes << 4) >> 4], -1).flatten(-2)  # shifts of int8 keep the sign
    return codes.float().mul_(scale.unsqueeze(-1))


# --- nf4 ------------------------------------------------------------------------------------------------------------------


class Nf4(Packed):
    """codes uint8, two weights in a byte, the first in the high half, row after row without regard to where rows end, the last block
    filled up with zeros; of each block scale_codes uint8 [blocks] with scale_scale fp32 [groups] and offset, scale = map[code] *
    scale_scale + offset; or, where bitsandbytes saved it without double quantisation, scale fp32 [blocks].

    bitsandbytes unpacks. Its own layer is not used: in an eval-mode forward on a CPU with avx512_bf16 that repacks the weight for
    good, and there are no gradients afterwards.
    """

    codes: Tensor
    scale: Tensor | None
    scale_codes: Tensor
    scale_scale: Tensor
    map: Tensor
    offset: Tensor
    kind = "nf4"

    def __init__(self, out_features: int, in_features: int, *, scale: Tensor | None = None, **tensors: Tensor):
        super().__init__(out_features, in_features, scale=scale, **tensors)
        self.step = BLOCK * GROUP // gcd(BLOCK * GROUP, in_features)  # so that pieces begin with a group

    @classmethod
    def of(cls, weight: Tensor) -> "Nf4":
        """As bitsandbytes.functional.quantize_4bit(compress_statistics=True), bit for bit but for the mean of the scales, which is
        summed in fp64 here so that it does not depend on how many threads sum; in a third of the time on a CPU, and without a copy."""
        functional = bitsandbytes()
        table = functional.get_4bit_type("nf4", device="cpu")
        middles = ((table[:-1] + table[1:]) / 2).tolist()
        blocks = -(-weight.numel() // BLOCK)
        codes = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(blocks, device=weight.device)
        flat = weight.reshape(-1)
        for start, stop in _pieces(blocks, BLOCK, weight.device, PACKING):
            part = flat[start * BLOCK : stop * BLOCK].float()
            part = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
            largest = part.abs().amax(-1)
            part = part * (1 / largest.clamp(min=1e-38)).unsqueeze(-1)
            code = torch.zeros_like(part, dtype=torch.uint8)
            for middle in middles:  # faster than torch.bucketize, which gives the same
                code += part > middle
            codes[start:stop] = (code[:, ::2] << 4) | code[:, 1::2]
            scale[start:stop] = largest
        if not scale.isfinite().all():
            raise ValueError("it holds numbers that are not finite")
        scale = scale.cpu()  # a sixty-fourth of the weight; so that no device rounds it in its own way
        offset = scale.double().mean().float()
        scale_codes, state = functional.quantize_blockwise(scale - offset, blocksize=GROUP)
        small = {"scale_codes": scale_codes, "scale_scale": state.absmax, "map": state.code, "offset": offset}
        return cls(*weight.shape, codes=codes, **{name: tensor.to(weight.device) for name, tensor in small.items()})

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        functional = bitsandbytes()
        first, last = start * self.in_features // BLOCK, -(-stop * self.in_features // BLOCK)
        if self.scale is None:
            group = self.scale_scale[first // GROUP : -(-last // GROUP)]
            scale = functional.dequantize_blockwise(self.scale_codes[first:last], absmax=group, code=self.map, blocksize=GROUP)
            scale.add_(self.offset)
        else:
            scale = self.scale[first:last]
        # Asked for rows of a width that is no multiple of 64, bitsandbytes 0.50's kernel for CPUs takes the wrong scales; for blocks the right.
        state = functional.QuantState(
            absmax=scale, shape=torch.Size((last - first, BLOCK)), blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        made = functional.dequantize_4bit(self.codes[first:last].view(-1, 1), state)
        return made.view(-1)[: (stop - start) * self.in_features].view(stop - start, self.in_features)


def adopted(layer: Any) -> Packed:
    """What a layer of bitsandbytes (Linear4bit, Linear8bitLt: how transformers opens a folder that was saved packed) holds, number for
    number. Raises ValueError for its other kinds."""
    if not hasattr(layer.weight, "quant_state"):
        return Int8(layer.weight.data, layer.weight.SCB.float() / 127)
    state = layer.weight.quant_state
    if state.quant_type != "nf4" or state.blocksize != BLOCK or (state.nested and state.state2.blocksize != GROUP):
        raise ValueError(
            f"it is {state.quant_type} in blocks of {state.blocksize}; only nf4 in blocks of {BLOCK} and int8 are read"
        )
    codes = layer.weight.data.view(torch.uint8).flatten()
    codes = F.pad(codes, (0, -len(codes) % (BLOCK // 2))).view(-1, BLOCK // 2)
    if not state.nested:
        return Nf4(*state.shape, codes=codes, scale=state.absmax)
    small = {"scale_codes": state.absmax, "scale_scale": state.state2.absmax, "map": state.state2.code, "offset": state.offset}
    return Nf4(*state.shape, codes=codes, **small)


@cache
def bitsandbytes() -> Any:
    """bitsandbytes.functional. Raises UserError where it is not installed."""
    # It would download compiled code from a hub when `kernels` is installed, and print a warning when it is not.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, held = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise UserError(f'this needs bitsandbytes ({error}): pip install "glmtune[quant]"; quant=int8 needs nothing more') from None
    finally:
        log.setLevel(level)
        if held is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = held


# --- any kind -------------------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Packed]] = {made.kind: made for made in (Nf4, Int8, ChatglmInt4, ChatglmInt8)}


def pack(weight: Tensor, kind: str, name: str = "a weight") -> Packed:
    """A weight [out, in] of 16 or 32 bits, packed, where it lies. Raises UserError, with `name`, for one that cannot be packed."""
    try:
        return KINDS[kind].of(weight)
    except ValueError as error:
        raise UserError(f"{name} [{', '.join(map(str, weight.shape))}] cannot be packed as {kind}: {error}") from None


class QuantLinear(nn.Module):
    """Stands in a loaded model where an nn.Linear was: y = x W^T + b in x's dtype. `packed` is set once the weight is read."""

    packed: Packed
    bias: nn.Parameter | None

    def __init__(self, old: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = old.in_features, old.out_features, old.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def adopt(model: nn.Module, dtype: torch.dtype | None, name: str) -> None:
    """Puts our own layers in the place of bitsandbytes' ones: packed as they are, or as nn.Linear in `dtype` where that is given.

    Raises UserError, with `name` of the model, for a kind that is not read.
    """
    known = importlib.import_module("bitsandbytes.nn")
    old: Any
    for path, old in list(model.named_modules()):
        if isinstance(old, known.Linear4bit | known.Linear8bitLt):
            try:
                packed = adopted(old)
                if not all(held.isfinite().all() for held in packed.buffers()):
                    raise ValueError("it has scales that are not finite")
            except ValueError as error:
                raise UserError(f"{name}: {path}: {error}; take the original model and quant=nf4 or int8") from None
            parent, _, leaf = path.rpartition(".")
            made: Any = QuantLinear(old) if dtype is None else nn.Linear(old.in_features, old.out_features, device="meta")
            made.bias = old.bias
            if dtype is None:
                made.packed = packed
            else:
                made.weight = nn.Parameter(packed.dense(dtype))
            setattr(model.get_submodule(parent), leaf, made)


def linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model's blocks, which are what is packed: not the embeddings, not the head."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and _numbered(name)]


def in_blocks(model: nn.Module) -> int:
    """How many weights a model's blocks have; experts, for one, can be other things than linear layers."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if _numbered(name))


def _numbered(name: str) -> bool:
    return any(map(str.isdigit, name.split(".")))


def replace(model: nn.Module, names: Iterable[str]) -> dict[str, QuantLinear]:
    """Puts a QuantLinear, still without a weight, in the place of each named nn.Linear."""
    made = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        made[name] = QuantLinear(model.get_submodule(name))  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, made[name])
    return made

"""The fast CPU path for LoRA on Llama-shaped models: padding-free, one autograd function for the whole stack.

What is computed is what transformers' Llama, Qwen2, Qwen3 and Mistral compute; tests/test_fused.py holds the two equal.

Precision. With fp32 weights everything is fp32. With bf16 weights the large matrix products take bf16 and give bf16; all that
is added to them (the residual stream, LoRA's delta, norms, rotary, SwiGLU, softmax) is fp32, because a small delta added
to a bf16 activation is rounded away, and with it the larger part of an update's gain.

Memory. Kept per layer and token, in elements: fp32 the block's input and its middle (2 d); in storage dtype rotated q, k and v,
the attention's output, and gate and up (4 d with grouped queries about 3 d, and 2 times the intermediate width).
Recomputed in the backward: norms, SwiGLU, attention probabilities. Never made: gradients of frozen weights, [T, V] logits.

Legend of shape suffixes: T tokens of a micro-batch, d model width, f width of the MLP, R all ranks of one input together,
S segments of a group, L places of its longest segment, H query heads, K key heads, G = H / K, h width of a head;
N learned tokens, V vocabulary.
"""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .layers import Linear
from .method import no_fused_block

QUERY_BLOCK = 256  # queries a block in the attention's backward: bounds the scores' memory, skips half of the masked part
SIMILAR = 0.75  # segments of at least this share of the longest share one batched attention
HEAD_CHUNK = 256  # learned positions whose logits exist at the same time


# ---------------------------------------------------------------------------------------------------- public


def unsupported(model: Any, longest: int | None = None) -> str | None:
    """Why `hidden_states` cannot compute this model (use the model's own forward then), or None if it can.

    `longest`: the longest segment that will come, so that a sliding window at least as long is no obstacle.
    """
    reason = no_fused_block(model.config.to_dict(), longest)
    if reason is not None:
        return reason
    layers = [module for block in model.model.layers for site in _sites(block) for module in site]
    other = next((type(layer).__name__ for layer in layers if not isinstance(layer, Linear)), None)
    if other is not None:
        return f"its linear layers are {other}; fused are only glmtune's own"
    packed = next((layer.packed.kind for layer in layers if layer.packed is not None), None)
    if packed is not None:
        return f"weights are kept in {packed}; fused are dense ones"
    if any(layer.lora_magnitude is not None or layer.under is not None for layer in layers):
        return "the adapter is DoRA, PiSSA or has others beneath; fused is plain LoRA"
    kinds = {(layer.weight.device.type, layer.weight.dtype) for layer in layers}
    if len(kinds) != 1 or kinds.isdisjoint({("cpu", torch.float32), ("cpu", torch.bfloat16)}):
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        return f"linear weights are {found}; fused are all float32 or all bfloat16 on the CPU"
    if any(layer.compute != layer.weight.dtype for layer in layers):
        return f"products run in {layers[0].compute}, weights are stored in {layers[0].weight.dtype}; fused are products in the stored dtype"
    if any(layer.dropout for layer in layers if layer.lora_A is not None):
        return "LoRA has dropout; fused has none"
    adapters = {id(parameter) for parameter in _adapters(model)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in adapters]
    if trained:
        return f"'{trained[0]}' is trained; fused are gradients of LoRA's A and B in the blocks' linear layers only"
    return None


def compile_works() -> bool:
    """Whether this box has what torch.compile needs on a CPU: a C++ compiler and Python's headers. Compiles nothing."""
    compiler = os.environ.get("CXX") or "g++"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return bool(shutil.which(compiler) or shutil.which("clang++")) and headers.exists()


def hidden_states(model: Any, ids_T: Tensor, segments: Sequence[int], *, compile: bool) -> Tensor:
    """Hidden states [T, d] fp32 after the final norm, differentiable in the LoRA parameters.

    `ids_T`: token ids of all segments one after another; `segments`: their lengths, which sum to T. Positions start at 0
    in each segment, and attention is causal inside a segment. `compile`: pointwise parts by inductor (seconds, once).
    The result does not depend on timing: same input, same number of threads, same bits. Backward runs once per forward.
    """
    if sum(segments) != len(ids_T) or min(segments) < 1:
        raise ValueError(f"segments must be positive and sum to the {len(ids_T)} tokens; they sum to {sum(segments)}")
    adapters = _adapters(model)
    keep = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in adapters)
    x_Td = model.model.embed_tokens.weight.detach()[ids_T].float()
    return _Stack.apply(_Plan(model, segments, _kernels(compile), keep), x_Td, *adapters)


def learned_logps(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, compile: bool = False) -> Tensor:
    """log softmax(hidden_i @ weight.T)[targets_i], [N] fp32, without ever holding [N, V] logits.

    With a frozen head the gradient with respect to `hidden_ND` is made in the forward, chunk by chunk; with a trained head
    each chunk is recomputed in the backward.
    """
    if not weight_VD.requires_grad:
        return _FrozenHead.apply(hidden_ND, weight_VD, targets_N, _kernels(compile))
    return losses.logps(hidden_ND, lambda hidden: hidden.to(weight_VD.dtype) @ weight_VD.T, targets_N)


# ---------------------------------------------------------------------------------------------------- pointwise kernels
# Plain functions of tensors; inductor makes one pass over memory of each. Sums are fp32, whatever the operands.


def _norm(x_Td: Tensor, y_Td: Tensor | None, delta_Td: Tensor | None, weight_d: Tensor, eps: float, dtype: torch.dtype):
    """x + y + delta (the residual stream), its RMSNorm in `dtype`, and 1 / rms."""
    if y_Td is not None:
        x_Td = x_Td + y_Td
    if delta_Td is not None:
        x_Td = x_Td + delta_Td
    scale_T1 = torch.rsqrt(x_Td.square().mean(-1, keepdim=True) + eps)
    return x_Td, (weight_d.float() * (x_Td * scale_T1)).to(dtype), scale_T1


def _norm_backward(dx_Td: Tensor | None, dh_Td: Tensor, x_Td: Tensor, scale_T1: Tensor, weight_d: Tensor, dtype: torch.dtype):
    """Gradient of the residual stream before a norm: `dx_Td` past it plus `dh_Td` through it; fp32, and a copy in `dtype`."""
    g_Td = dh_Td.float() * weight_d.float()
    through_Td = scale_T1 * (g_Td - x_Td * (scale_T1.square() * (g_Td * x_Td).mean(-1, keepdim=True)))
    total_Td = through_Td if dx_Td is None else dx_Td + through_Td
    return total_Td, total_Td.to(dtype)


def _rotate(x_SHLh: Tensor, cos_Lh: Tensor, sin_Lh: Tensor) -> Tensor:
    cos_Lh, sin_Lh = (half.chunk(2, dim=-1)[0] for half in (cos_Lh, sin_Lh))  # both halves of a head turn by the same angles
    first, second = x_SHLh.chunk(2, dim=-1)
    return torch.cat((first * cos_Lh - second * sin_Lh, second * cos_Lh + first * sin_Lh), dim=-1)


def _to_heads(x_TD: Tensor, delta_TD: Tensor | None, index_SL: Tensor, cos_Lh: Tensor | None, sin_Lh: Tensor | None,
              norm_h: Tensor | None, eps: float, width: int, dtype: torch.dtype):  # fmt: skip
    """Rows of a projection -> heads [S, H, L, h], with q/k norm where `norm_h` and rotary where `cos_Lh` are given.

    Second value: the heads before the norm, which its backward needs.
    """
    x = x_TD[index_SL].float()
    if delta_TD is not None:
        x = x + delta_TD[index_SL]
    x = raw = x.unflatten(-1, (-1, width)).transpose(1, 2)
    if norm_h is not None:
        x = norm_h.float() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    if cos_Lh is not None and sin_Lh is not None:
        x = _rotate(x, cos_Lh, sin_Lh)
    return x.to(dtype).contiguous(), None if norm_h is None else raw.to(dtype).contiguous()


def _from_heads(dx_SHLh: Tensor, raw_SHLh: Tensor | None, cos_Lh: Tensor | None, sin_Lh: Tensor | None,
                norm_h: Tensor | None, eps: float):  # fmt: skip
    """The backward of `_to_heads`, still with a row for each place of the group: [S * L, H * h]."""
    dx = dx_SHLh.float()
    if cos_Lh is not None and sin_Lh is not None:
        dx = _rotate(dx, cos_Lh, -sin_Lh)
    if norm_h is not None and raw_SHLh is not None:
        raw = raw_SHLh.float()
        dx = _norm_backward(None, dx, raw, torch.rsqrt(raw.square().mean(-1, keepdim=True) + eps), norm_h, torch.float32)[0]
    return dx.to(dx_SHLh.dtype).transpose(1, 2).flatten(2).flatten(0, 1)


def _swiglu(gate: Tensor, gate_delta: Tensor | None, up: Tensor, up_delta: Tensor | None):
    """silu(gate) * up, and the two as they are kept for the backward."""
    dtype = gate.dtype
    gate = gate.float() if gate_delta is None else gate_delta.float().add_(gate)
    up = up.float() if up_delta is None else up_delta.float().add_(up)
    return (F.silu(gate) * up).to(dtype), gate.to(dtype), up.to(dtype)


def _swiglu_backward(dm: Tensor, gate: Tensor, up: Tensor):
    """Gradients of gate and up, and the product itself again."""
    silu = F.silu(gate)
    return torch.ops.aten.silu_backward(dm * up, gate), dm * silu, silu * up


def _attention_rows(do_Td: Tensor, out_Td: Tensor, index_SL: Tensor, real_SL: Tensor, width: int):
    """Gradient of the attention's output as heads, 0 where padded, and its product with the output, row by row."""
    do = do_Td[index_SL].float() * real_SL.unsqueeze(-1)
    do, out = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (do, out_Td[index_SL]))
    return do.to(do_Td.dtype).contiguous(), (do * out).sum(-1, keepdim=True)


def _scores_backward(scores: Tensor, dp: Tensor, lse: Tensor, row_sum: Tensor, seen: Tensor, scale: float):
    """Probabilities again, from scores and their log-sum-exp, and the gradient of the scores (FlashAttention-2, algorithm 2)."""
    p = (scores.float() * scale).sub_(lse).exp_().masked_fill_(~seen, 0.0)
    return p.to(scores.dtype), (dp.float() - row_sum).mul_(p).mul_(scale).to(scores.dtype)


def _exponentials(logits_NV: Tensor):
    """exp(logits - top) in the logits' dtype, with top and the sum in fp32: softmax but for a factor a row."""
    top_N1 = logits_NV.amax(-1, keepdim=True).float()
    e_NV = (logits_NV.float() - top_N1).exp_()
    return e_NV.to(logits_NV.dtype), top_N1, e_NV.sum(-1, keepdim=True)


_POINTWISE = (_norm, _norm_backward, _to_heads, _from_heads, _swiglu, _swiglu_backward, _attention_rows,
              _scores_backward, _exponentials)  # fmt: skip


@functools.cache
def _kernels(compile: bool) -> SimpleNamespace:
    """The pointwise functions by name, compiled or as they stand."""
    wrap: Callable = _compiled if compile else lambda function: function
    return SimpleNamespace(**{function.__name__.strip("_"): wrap(function) for function in _POINTWISE})


def _compiled(function: Callable) -> Callable:
    """Compiled once for all numbers of tokens: those dimensions are marked, widths stay constants of the kernel."""
    kernel = torch.compile(function)

    def call(*args: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, _token_dimensions(tensor))
        return kernel(*args)

    return call


def _token_dimensions(tensor: Tensor) -> list[int]:
    if not tensor.is_floating_point():
        return list(range(tensor.dim()))
    return {1: [], 2: [0], 4: [0, 2], 5: [0, 3, 4]}[tensor.dim()]  # d; T d; S H L h; S K G L L


# ---------------------------------------------------------------------------------------------------- the head


class _FrozenHead(torch.autograd.Function):
    """Row i of the gradient with respect to the hidden states depends on token i alone. It is made in the forward, for a loss of
    -logps_i each, so that a chunk's logits live once; the backward scales it."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, kernels):
        logps_N = torch.empty(len(hidden_ND), dtype=torch.float32)
        d_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_ND), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            targets_N1 = targets_N[part].unsqueeze(1)
            logits_NV = hidden_ND[part].to(weight_VD.dtype) @ weight_VD.T
            e_NV, top_N1, sum_N1 = kernels.exponentials(logits_NV)
            target_N1 = logits_NV.gather(1, targets_N1).float() - top_N1
            logps_N[part] = (target_N1 - sum_N1.log()).squeeze(1)
            if d_ND is None:
                continue
            hit = (torch.arange(len(e_NV)), targets_N[part])
            e_NV[hit] = (target_N1.exp() - sum_N1).squeeze(1).to(e_NV.dtype)  # p - 1 at the target, p elsewhere, all times the sum
            d_ND[part] = (e_NV @ weight_VD) * (1 / sum_N1)
        ctx.d_ND = d_ND
        return logps_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logps_N):
        return ctx.d_ND * -d_logps_N.unsqueeze(1), None, None, None


# ---------------------------------------------------------------------------------------------------- linear layers and LoRA


def _sites(block: Any) -> list[list[Any]]:
    """The linear layers of a block, those with the same input together."""
    attention, mlp = block.self_attn, block.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _adapters(model: Any) -> list[nn.Parameter]:
    """A and B of every adapted layer, in the order in which `_Stack` returns their gradients."""
    layers = [layer for block in model.model.layers for site in _sites(block) for layer in site]
    found = [parameter for layer in layers if layer.lora_A is not None for parameter in (layer.lora_A, layer.lora_B)]
    return list(dict.fromkeys(found))  # a shared A stands once


class _Site:
    """Linear layers with the same input. Their A are one matrix; their B stand by themselves, already times `scaling`."""

    def __init__(self, layers: list[Any]):
        dtype = layers[0].weight.dtype
        self.layers = layers
        self.B_or: list[Tensor | None] = [None if x.lora_A is None else (x.lora_B.detach() * x.scaling).to(dtype) for x in layers]
        self.ranks = [0 if x.lora_A is None else len(x.lora_A) for x in layers]
        A = [x.lora_A.detach() for x in layers if x.lora_A is not None]
        self.A_Ri = torch.cat(A).to(dtype) if A else None

    def forward(self, x_Ti: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Frozen product and LoRA's delta (or None) of each layer, one after the other; and z = x A.T of all ranks."""
        z_TR = x_Ti.new_empty(len(x_Ti), 0) if self.A_Ri is None else x_Ti @ self.A_Ri.T
        outs: list[Tensor | None] = []
        for layer, z_Tr, B_or in zip(self.layers, z_TR.split(self.ranks, dim=1), self.B_or, strict=True):
            outs += [F.linear(x_Ti, layer.weight, layer.bias), None if B_or is None else z_Tr @ B_or.T]
        return outs, z_TR

    def backward(self, dys: list[Tensor], *, input_too: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of z and, if it is wanted, of the input."""
        dzs = [dy_To @ B_or for dy_To, B_or in zip(dys, self.B_or, strict=True) if B_or is not None]
        dz_TR = torch.cat(dzs, dim=1) if dzs else None
        if not input_too:
            return dz_TR, None
        dx_Ti = dys[0] @ self.layers[0].weight
        for layer, dy_To in zip(self.layers[1:], dys[1:], strict=True):
            dx_Ti.addmm_(dy_To, layer.weight)
        return dz_TR, dx_Ti if dz_TR is None else dx_Ti.addmm_(dz_TR, self.A_Ri)

    def collect(self, grads: dict, dys: list[Tensor], z_TR: Tensor, dz_TR: Tensor | None, x_Ti: Tensor,
                scale_T1: Tensor | None = None, weight_i: Tensor | None = None) -> None:  # fmt: skip
        """Puts the gradients of A and B into `grads`. The input is `x_Ti`, or x * scale * weight where a norm gave it."""
        if dz_TR is None:
            return
        dA_Ri = dz_TR.T @ x_Ti if scale_T1 is None or weight_i is None else ((dz_TR.float() * scale_T1).T @ x_Ti) * weight_i
        parts = zip(self.layers, dys, z_TR.split(self.ranks, dim=1), dA_Ri.split(self.ranks), strict=True)
        for layer, dy_To, z_Tr, dA_ri in parts:
            if layer.lora_A is not None:
                shared = grads.get(layer.lora_A)
                grads[layer.lora_A] = dA_ri.float() if shared is None else shared + dA_ri.float()
                grads[layer.lora_B] = (z_Tr.T @ dy_To).T.float() * layer.scaling


# ---------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Group:
    """Segments of similar length that share one batched attention, each padded at its end to the longest.

    Padding needs no mask of its own: it stands behind every real query. `index_SL` is the token at each place (any where
    padded), `real_SL` says which places are tokens.
    """

    index_SL: Tensor
    real_SL: Tensor
    cos_Lh: Tensor
    sin_Lh: Tensor


def _groups(segments: Sequence[int], rotary: Callable) -> list[_Group]:
    starts = torch.tensor([0, *segments[:-1]]).cumsum(0).tolist()
    order = sorted(range(len(segments)), key=lambda i: -segments[i])
    cos_Lh, sin_Lh = (x[0] for x in rotary(torch.empty(0), torch.arange(segments[order[0]]).unsqueeze(0)))
    groups: list[list[int]] = []
    for i in order:
        if not groups or segments[i] < SIMILAR * segments[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    made = []
    for members in groups:
        longest = segments[members[0]]
        place_L = torch.arange(longest)
        real_SL = place_L < torch.tensor([segments[i] for i in members]).unsqueeze(1)
        index_SL = torch.where(real_SL, torch.tensor([starts[i] for i in members]).unsqueeze(1) + place_L, 0)
        made.append(_Group(index_SL, real_SL, cos_Lh[:longest].contiguous(), sin_Lh[:longest].contiguous()))
    return made


def _attend(heads: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of q [S, H, L, h] to k, v [S, K, L, h] -> [S * L, H * h] and log-sum-exp [S, H, L] (fp32 inside)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scale)
    return out.transpose(1, 2).flatten(2).flatten(0, 1), lse


def _attend_backward(
    do: Tensor, row_sum: Tensor, heads: list[Tensor], lse: Tensor, scale: float, kernels: SimpleNamespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. All query heads of a key head are one tall matrix; blocks of queries see only keys up to their end."""
    q, k, v = heads
    S, H, L, h = q.shape
    K = k.shape[1]
    k_nLh, v_nLh = k.view(S * K, L, h), v.view(S * K, L, h)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k_nLh), torch.zeros_like(v_nLh)
    for start in range(0, L, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, L)
        q_nMh, do_nMh = (x[:, :, start:end].reshape(S * K, -1, h) for x in (q, do))
        five = (S, K, H // K, end - start)
        scores, dp = (torch.bmm(x, y[:, :end].mT).view(*five, end) for x, y in ((q_nMh, k_nLh), (do_nMh, v_nLh)))
        seen = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        p, ds = kernels.scores_backward(scores, dp, *(x[:, :, start:end].reshape(*five, 1) for x in (lse, row_sum)), seen, scale)
        p, ds = p.view(S * K, -1, end), ds.view(S * K, -1, end)
        dv[:, :end].baddbmm_(p.mT, do_nMh)
        dk[:, :end].baddbmm_(ds.mT, q_nMh)
        dq[:, :, start:end] = torch.bmm(ds, k_nLh[:, :end]).view(S, H, -1, h)
    return dq, dk.view(k.shape), dv.view(v.shape)


# ---------------------------------------------------------------------------------------------------- the stack


class _Plan:
    """What forward and backward of one micro-batch share."""

    def __init__(self, model: Any, segments: Sequence[int], kernels: SimpleNamespace, keep: bool):
        self.kernels, self.keep = kernels, keep
        self.blocks, self.final_norm = list(model.model.layers), model.model.norm
        self.sites = [[_Site(layers) for layers in _sites(block)] for block in self.blocks]
        self.dtype = self.sites[0][0].layers[0].weight.dtype
        self.width, self.scale = self.blocks[0].self_attn.head_dim, self.blocks[0].self_attn.scaling
        self.has_qk_norm = model.config.model_type == "qwen3"
        self.groups = _groups(segments, model.model.rotary_emb)
        real = torch.cat([group.real_SL.flatten() for group in self.groups]).nonzero().squeeze(1)
        index = torch.cat([group.index_SL.flatten() for group in self.groups])
        self.place_T = torch.empty_like(real)
        self.place_T[index[real]] = real  # where in the groups, one after another, each token stands
        self.lowest = next(
            (i for i, sites in enumerate(self.sites) if any(site.A_Ri is not None for site in sites)), len(self.sites)
        )

    def settings(self, block: Any, group: _Group) -> list[tuple]:
        """For q, k and v heads: cos and sin of their rotation, weight and epsilon of their norm; None where they have none."""
        turn, attention = (group.cos_Lh, group.sin_Lh), block.self_attn
        norms = (attention.q_norm, attention.k_norm) if self.has_qk_norm else ()
        qk = [(*turn, norm.weight, norm.variance_epsilon) for norm in norms] or [(*turn, None, 0.0)] * 2
        return [*qk, (None, None, None, 0.0)]

    def attention(self, block: Any, outs: list[Tensor | None]) -> tuple[Tensor, list]:
        """From the q, k, v projections (and deltas) to the attention's output [T, H * h]; what its backward needs of each group."""
        parts, kept = [], []
        for group in self.groups:
            heads: list[Tensor] = []
            raws: list[Tensor | None] = []
            for y_TD, delta_TD, settings in zip(outs[::2], outs[1::2], self.settings(block, group), strict=True):
                head, raw = self.kernels.to_heads(y_TD, delta_TD, group.index_SL, *settings, self.width, self.dtype)
                heads.append(head)
                raws.append(raw)
            out, lse = _attend(heads, self.scale)
            parts.append(out)
            kept.append((heads, raws, lse))
        return torch.cat(parts)[self.place_T], kept

    def attention_backward(self, block: Any, do_TD: Tensor, out_TD: Tensor, kept: list) -> list[Tensor]:
        """Gradients of the q, k and v projections."""
        parts = []
        for group, (heads, raws, lse) in zip(self.groups, kept, strict=True):
            do, row_sum = self.kernels.attention_rows(do_TD, out_TD, group.index_SL, group.real_SL, self.width)
            dheads = _attend_backward(do, row_sum, heads, lse.unsqueeze(-1), self.scale, self.kernels)
            settings = zip(dheads, raws, self.settings(block, group), strict=True)
            parts.append([self.kernels.from_heads(dx, raw, *rest) for dx, raw, rest in settings])
        return [torch.cat(part)[self.place_T] for part in zip(*parts, strict=True)]


class _Stack(torch.autograd.Function):
    """All blocks and the final norm, with a backward by hand: gradients of A and B only, down to the lowest adapted block."""

    @staticmethod
    def forward(ctx, plan: _Plan, x_Td: Tensor, *adapters: Tensor) -> Tensor:
        run, kept = plan.kernels, []
        y_Td = delta_Td = None
        for block, (qkv, o, gate_up, down) in zip(plan.blocks, plan.sites, strict=True):
            norm = block.input_layernorm
            x_Td, h_Td, scale_in = run.norm(x_Td, y_Td, delta_Td, norm.weight, norm.variance_epsilon, plan.dtype)
            outs, z_qkv = qkv.forward(h_Td)
            out_TD, attention = plan.attention(block, outs)
            outs, z_o = o.forward(out_TD)
            norm = block.post_attention_layernorm
            middle_Td, h_Td, scale_mid = run.norm(x_Td, *outs, norm.weight, norm.variance_epsilon, plan.dtype)
            outs, z_gu = gate_up.forward(h_Td)
            m_Tf, gate_Tf, up_Tf = run.swiglu(*outs)
            (y_Td, delta_Td), z_down = down.forward(m_Tf)
            if plan.keep:
                kept.append((x_Td, scale_in, z_qkv, attention, out_TD, z_o, middle_Td, scale_mid, z_gu, gate_Tf, up_Tf, z_down))
            x_Td = middle_Td
        norm = plan.final_norm
        x_Td, h_Td, scale_T1 = run.norm(x_Td, y_Td, delta_Td, norm.weight, norm.variance_epsilon, torch.float32)
        if plan.keep:
            ctx.plan, ctx.kept, ctx.last, ctx.adapters = plan, kept, (x_Td, scale_T1), adapters
        return h_Td

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh_Td: Tensor):
        plan, kept = ctx.plan, ctx.kept
        run, grads = plan.kernels, {}
        dx_Td, dy_Td = run.norm_backward(None, dh_Td, *ctx.last, plan.final_norm.weight, plan.dtype)
        for number in range(len(plan.blocks) - 1, plan.lowest - 1, -1):
            block, (qkv, o, gate_up, down) = plan.blocks[number], plan.sites[number]
            x_Td, scale_in, z_qkv, attention, out_TD, z_o, middle_Td, scale_mid, z_gu, gate_Tf, up_Tf, z_down = kept.pop()
            in_weight, mid_weight = block.input_layernorm.weight, block.post_attention_layernorm.weight
            dz, dm_Tf = down.backward([dy_Td])
            dgate_Tf, dup_Tf, m_Tf = run.swiglu_backward(dm_Tf, gate_Tf, up_Tf)
            down.collect(grads, [dy_Td], z_down, dz, m_Tf)
            dz, dh_Td = gate_up.backward([dgate_Tf, dup_Tf])
            gate_up.collect(grads, [dgate_Tf, dup_Tf], z_gu, dz, middle_Td, scale_mid, mid_weight)
            dx_Td, dy_Td = run.norm_backward(dx_Td, dh_Td, middle_Td, scale_mid, mid_weight, plan.dtype)
            dz, do_TD = o.backward([dy_Td])
            o.collect(grads, [dy_Td], z_o, dz, out_TD)
            dqkv = plan.attention_backward(block, do_TD, out_TD, attention)
            dz, dh_Td = qkv.backward(dqkv, input_too=number > plan.lowest)
            qkv.collect(grads, dqkv, z_qkv, dz, x_Td, scale_in, in_weight)
            if dh_Td is not None:
                dx_Td, dy_Td = run.norm_backward(dx_Td, dh_Td, x_Td, scale_in, in_weight, plan.dtype)
        return None, None, *(grads[parameter] for parameter in ctx.adapters)

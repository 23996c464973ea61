"""The mathematics of training, pure functions of tensors. Never sees a model.

Legend: N learned positions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions whose logits exist at one time


def nll(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """sum_i weights_i * -log softmax(hidden_i @ weight^T)[targets_i], a scalar in fp32.

    The logits of CHUNK positions exist at a time, never N x V; in backward they are made again.
    The product is computed in the dtype of `weight`, the softmax in fp32.
    """
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden_ND.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        arguments = (hidden_ND[part], weight_VD, targets_N[part], weights_N[part])
        if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
            total = total + checkpoint(_nll, *arguments, use_reentrant=False)
        else:
            total = total + _nll(*arguments)
    return total


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def nll_of_logits(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """The same from logits, for models whose head is not a plain product."""
    return (F.cross_entropy(logits_NV.float(), targets_N, reduction="none") * weights_N).sum()

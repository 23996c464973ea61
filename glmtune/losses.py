"""The mathematics of training, pure functions of tensors. Never sees a model.

Legend: N learned positions, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions whose logits exist at one time


def logps(hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor) -> Tensor:
    """log softmax(head(hidden_i))[targets_i], [N] in fp32, differentiable in the hidden states and in what the head learns.

    head: [n, D] -> logits [n, V]; the softmax is fp32. The logits of CHUNK positions exist at a time, never N x V; in backward they are
    made again.
    """
    parts = []
    for start in range(0, hidden_ND.shape[0], CHUNK):
        hidden, targets = hidden_ND[start : start + CHUNK], targets_N[start : start + CHUNK]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_logps, hidden, head, targets, use_reentrant=False))
        else:
            parts.append(_logps(hidden, head, targets))
    return torch.cat(parts) if parts else hidden_ND.sum(-1).float()  # [0], with its place in the graph


def _logps(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return logps_of_logits(head(hidden), targets)


def logps_of_logits(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The same from logits, for models whose head is not a plain product."""
    return -F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def nll(logps_N: Tensor, weights_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """sum_i weights_i * -logps_i, a scalar. Summed by chunks: the order of a sum decides its last bits, and runs of 0.3.0 go on as they were."""
    total = logps_N.new_zeros(())
    for start in range(0, len(logps_N), chunk):
        total = total + (-logps_N[start : start + chunk] * weights_N[start : start + chunk]).sum()
    return total

"""From a micro-batch to log-probabilities: the model's own modules, or the fused path where the model has the common block shape.

Both compute the same function (tests/test_fused.py); which one runs follows from the model and the options, never from timing.
"""

from typing import Any

import torch
from torch import Tensor

from . import fused, losses, method
from .batch import Batch
from .methods import noise_of
from .run import Run


def choose_path(model: Any, run: Run, options: Any, settings: dict[str, Any], longest: int) -> tuple[str, str]:
    """("fused" | "modules", why). options, settings: as in `method.why_modules`, which decides all that does not depend on the weights."""
    reason = method.why_modules(run, options, model.config.to_dict(), settings, longest) or fused.unsupported(model, longest)
    return ("modules", reason) if reason else ("fused", "a Llama-shaped model with LoRA on the CPU")


class Forward:
    """Runs micro-batches through a model. `concatenated`: how it wants them collated."""

    def __init__(self, model: Any, path: str, compile: bool = False):
        self.model, self.path, self.compile = model, path, compile
        self.concatenated = path == "fused"
        self.device = model.get_input_embeddings().weight.device
        self.head = model.get_output_embeddings()
        self.noise = noise_of(model)
        self.plain_head = path == "fused" or self._head_is_plain()

    def logps(self, batch: Batch) -> Tensor:
        """log p(next token) at the batch's learned positions, [N] fp32, differentiable. `batch.weights` play no part."""
        targets = batch.targets.to(self.device)
        if self.path == "fused":
            hidden = self.hidden(batch)[batch.learned]
            return fused.learned_logps(hidden, self.head.weight, targets, compile=self.compile)
        learned = batch.learned.to(self.device)
        if self.plain_head:
            return losses.logps(self.hidden(batch).flatten(0, 1)[learned], self.head.logits, targets)
        logits = self.model(**self._inputs(batch)).logits
        return losses.logps_of_logits(logits.flatten(0, 1)[learned], targets)

    def nll(self, batch: Batch) -> Tensor:
        """sum over learned positions of weight * -log p(next token), fp32 scalar."""
        logps = self.logps(batch)
        return losses.nll(logps, batch.weights.to(self.device), losses.CHUNK if self.plain_head else max(1, len(logps)))

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, for heads of other kinds: [T, D] of concatenated rows (fused), else [B, S, D]."""
        if self.path == "fused":
            return fused.hidden_states(self.model, batch.ids[0], batch.lengths, compile=self.compile)
        return self.model.base_model(**self._inputs(batch)).last_hidden_state

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self.noise is not None:
            self.noise.spans = [(row, index, 0, length) for index, (row, length) in enumerate(zip(batch.rows, batch.lengths))]
        return {
            "input_ids": batch.ids.to(self.device),
            "attention_mask": batch.mask.to(self.device),
            "use_cache": False,
        }

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Whether logits are exactly hidden @ head^T (no scale, cap or bias), so that the head can run at learned positions only."""
        config = self.model.config
        marks = [getattr(config, name, None) for name in ("gmask_token_id", "bos_token_id")]  # ChatGLM-6B reads nothing without
        ids = [*(mark for mark in marks if isinstance(mark, int)), 0, 1, 2, 3]
        ids = torch.tensor([ids], device=self.device) % self.head.weight.shape[0]
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if self.head.bias is not None:
            return False
        return torch.equal(self.model(input_ids=ids, use_cache=False).logits, self.head(hidden))

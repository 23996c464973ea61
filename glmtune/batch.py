"""Order and batches: which rows make a step, how a step is cut into micro-batches, and the tensors of one micro-batch.

Everything follows from the seed and the lengths, so a resumed run and every process plan the same steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .records import Example


@lru_cache(maxsize=2)
def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The rows of one epoch, shuffled by (seed, epoch)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows).tolist()


def num_steps(num_rows: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a run: `steps` if given, else all the batches (the last of an epoch may be smaller) of `epochs`."""
    return steps or max(1, round(epochs * steps_per_epoch(num_rows, batch_size)))


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)


def rows_of_step(step: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (from 0)."""
    per_epoch = steps_per_epoch(num_rows, batch_size)
    epoch, position = divmod(step, per_epoch)
    return order(num_rows, seed, epoch)[position * batch_size : (position + 1) * batch_size]


def cut(lengths: Sequence[int], micro_tokens: int, padded: bool) -> list[list[int]]:
    """Cuts a step into micro-batches of at most `micro_tokens` tokens (a longer row is one alone).

    padded: a micro-batch costs rows x longest, so rows are taken in order of length; else it costs the sum of its rows.
    Returns positions into `lengths`, every one exactly once.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if padded:
        bins: list[list[int]] = []
        for i in by_length:
            if bins and lengths[bins[-1][0]] * (len(bins[-1]) + 1) <= micro_tokens:
                bins[-1].append(i)
            else:
                bins.append([i])
        return bins
    bins, free = [], []
    for i in by_length:  # first fit, longest first
        for place, room in enumerate(free):
            if lengths[i] <= room:
                bins[place].append(i)
                free[place] -= lengths[i]
                break
        else:
            bins.append([i])
            free.append(micro_tokens - lengths[i])
    return bins


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU. `ids`, `positions` [B, S] padded on the right (B = 1 where rows are concatenated: see `lengths`).

    `learned` [N] are flat positions into B x S whose next token is learned; `targets`, `weights` [N] go with them.
    """

    ids: Any
    mask: Any  # [B, S] bool, True = a real token; None when concatenated
    lengths: list[int]
    learned: Any
    targets: Any
    weights: Any
    rows: list[int]  # positions of its examples in the data set: dropout is seeded by them

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def collate(examples: Sequence[Example], rows: Sequence[int], pad_id: int, concatenated: bool) -> Batch:
    """Tensors of a micro-batch: concatenated end to end (no padding at all), or padded on the right."""
    import torch

    lengths = [len(example.ids) for example in examples]
    if concatenated:
        ids = torch.tensor([token for example in examples for token in example.ids]).unsqueeze(0)
        mask = None
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        width = max(lengths)
        ids = torch.full((len(examples), width), pad_id)
        mask = torch.zeros((len(examples), width), dtype=torch.bool)
        for i, example in enumerate(examples):
            ids[i, : lengths[i]] = torch.tensor(example.ids)
            mask[i, : lengths[i]] = True
        starts = np.arange(len(examples)) * width
    learned, targets, weights = [], [], []
    for start, example in zip(starts, examples):
        for i, weight in enumerate(example.weights):
            if weight:
                learned.append(int(start) + i)
                targets.append(example.next_ids[i])
                weights.append(weight)
    return Batch(
        ids, mask, lengths, torch.tensor(learned, dtype=torch.long), torch.tensor(targets, dtype=torch.long),
        torch.tensor(weights, dtype=torch.float32), list(rows),
    )  # fmt: skip

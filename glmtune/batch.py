"""Order and batches: which rows make a step, how a step is cut into micro-batches, and the tensors of one micro-batch.

Everything follows from the seed and the lengths, so a resumed run and every process plan the same steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from .records import Column, Example


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


def cut(
    lengths: Sequence[int], micro_tokens: int, padded: bool, together: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Cuts a step into micro-batches of at most `micro_tokens` tokens (a longer sequence is one alone).

    padded: a micro-batch costs sequences x longest, so they are taken in order of length; else it costs the sum of its sequences.
    together: groups of positions that are never cut apart (a preference pair); None: each sequence by itself.
    Returns positions into `lengths`, every one exactly once.
    """
    groups = [[i] for i in range(len(lengths))] if together is None else together
    longest = [max(lengths[i] for i in group) for group in groups]
    total = [sum(lengths[i] for i in group) for group in groups]
    size = longest if padded else total
    by_length = sorted(range(len(groups)), key=lambda g: (-size[g], g))
    bins: list[list[int]] = []
    if padded:
        widest = 0
        for g in by_length:
            if bins and widest * (len(bins[-1]) + len(groups[g])) <= micro_tokens:
                bins[-1] += groups[g]
            else:
                bins.append([*groups[g]])
                widest = longest[g]
        return bins
    free: list[int] = []
    for g in by_length:  # first fit, longest first
        place = next((place for place, room in enumerate(free) if total[g] <= room), None)
        if place is None:
            bins.append([*groups[g]])
            free.append(micro_tokens - total[g])
        else:
            bins[place] += groups[g]
            free[place] -= total[g]
    return bins


def share(sizes: Sequence[int], rank: int, ranks: int) -> list[int]:
    """Which of a step's rows process `rank` of `ranks` computes. sizes: tokens of each row. Dealt out by falling size, to and fro, so that
    the sums are alike; every row goes to exactly one process, and every process knows all shares."""
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    turns = (divmod(place, ranks) for place in range(len(order)))
    owners = [seat if turn % 2 == 0 else ranks - 1 - seat for turn, seat in turns]
    return sorted(row for row, owner in zip(order, owners, strict=True) if owner == rank)


def micro_batches(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], micro_tokens: int, padded: bool, together: bool, rank: int, ranks: int
) -> list[list[int]]:
    """The micro-batches that process `rank` computes of a step, as positions into `lengths`.

    rows: the positions of each row's sequences. Every process gets the same number of micro-batches, or collective operations would wait
    for ever: the missing ones are empty lists. together: rows are not cut apart.
    """
    sizes = [sum(lengths[i] for i in row) for row in rows]
    plans = []
    for one in range(ranks):
        mine = [list(rows[row]) for row in share(sizes, one, ranks)]
        flat = [i for row in mine for i in row]
        place = {i: n for n, i in enumerate(flat)}
        groups = [[place[i] for i in row] for row in mine] if together else None
        plans.append([[flat[n] for n in part] for part in cut([lengths[i] for i in flat], micro_tokens, padded, groups)])
    most = max(map(len, plans))
    return plans[rank] + [[] for _ in range(most - len(plans[rank]))]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU. `ids` [B, S] padded on the right (B = 1 where sequences are concatenated: see `lengths`).

    `learned` [N] are flat positions into B x S whose next token is learned; `targets`, `weights`, `sequence_of` and `row_of` [N] go with
    them. Sequences and rows are counted from 0 within the batch; `row_of_sequence` [Q] says which row a sequence belongs to.
    columns: by name [N] (per token), [Q] (per sequence) or [R] (per row); lists where the column's kind is json.
    """

    ids: Any
    mask: Any  # [B, S] bool, True = a real token; None when concatenated
    lengths: list[int]  # [Q]
    learned: Any
    targets: Any
    weights: Any
    rows: list[int]  # [Q] positions of its sequences in the data set: dropout is seeded by them
    sequence_of: Any
    row_of: Any
    row_of_sequence: Any
    num_rows: int
    columns: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def collate(
    examples: Sequence[Example],
    rows: Sequence[int],
    pad_id: int,
    concatenated: bool,
    row_of: Sequence[int] | None = None,
    columns: Mapping[str, Column] | None = None,
) -> Batch:
    """Tensors of a micro-batch: concatenated end to end (no padding at all), or padded on the right.

    row_of: for each example, anything that names its row; sequences of a row stand next to each other. None: each is a row of its own.
    """
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
    sequences = [i for i, example in enumerate(examples) for weight in example.weights if weight]
    number = {name: i for i, name in enumerate(dict.fromkeys(range(len(examples)) if row_of is None else row_of))}
    of_sequence = [number[name] for name in (range(len(examples)) if row_of is None else row_of)]
    long = partial(torch.tensor, dtype=torch.long)
    return Batch(
        ids, mask, lengths, long(learned), long(targets), torch.tensor(weights, dtype=torch.float32), list(rows), long(sequences),
        long([of_sequence[i] for i in sequences]), long(of_sequence), len(number),
        {name: _column(name, column, examples, of_sequence) for name, column in (columns or {}).items()},
    )  # fmt: skip


def _column(name: str, column: Column, examples: Sequence[Example], row_of: Sequence[int]) -> Any:
    if column.per == "token":
        values = [value for e in examples for value, weight in zip(e.columns[name], e.weights, strict=True) if weight]
    else:
        firsts = [i for i in range(len(examples)) if column.per == "sequence" or i == 0 or row_of[i] != row_of[i - 1]]
        values = [examples[i].columns[name] for i in firsts]
    if column.kind == "json":
        return values
    import torch

    return torch.from_numpy(np.array(values, dtype=column.kind))

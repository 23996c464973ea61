"""How the sources make an epoch, and which rows are kept apart for evaluation. Both follow from counts and hashes alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from .errors import UserError
from .forms import Record
from .records import Document, Preference
from .sources import Source, share_of

Row = TypeVar("Row", bound=Record)
MOST = 50_000_000  # rows of an epoch that weights and shares may make: their order is held in memory


def mix(counts: Sequence[int], sources: Sequence[Source], seed: int = 0, temperature: float = 1.0) -> list[int]:
    """Indices of the rows of an epoch: source by source, row i of source k being `sum(counts[:k]) + i`.

    A source is passed over `weight` times (0.5: a half of it, which `seed` chooses); or, with a `share`, repeated or cut until it is
    that share of all. temperature T above 1 brings the sizes of the others nearer to each other: they become proportional to
    size^(1/T), their sum stays. Follows from its arguments alone. Raises UserError where nothing of a source would be left.
    """
    starts = [sum(counts[:number]) for number in range(len(counts))]
    own = parts(counts, sources, seed, temperature)
    return [start + index for start, part in zip(starts, own, strict=True) for index in part]


def parts(counts: Sequence[int], sources: Sequence[Source], seed: int, temperature: float) -> list[list[int]]:
    """For every source the indices of its own rows, from 0; see `mix`."""
    shares = [share_of(source) for source in sources]
    sizes = [0.0 if share else count * source.weight for count, source, share in zip(counts, sources, shares, strict=True)]
    total, taken = sum(sizes), sum(share or 0 for share in shares)
    if any(shares):
        if taken >= 1 or not total:
            what = f"the shares make {taken:g} of all rows" if taken >= 1 else "every source has a share"
            raise UserError(f"data: {what}; something must be left for a source without share")
        total /= 1 - taken
    if not total <= max(MOST, sum(counts)):
        size, count, source = max(zip(sizes, counts, sources, strict=True), key=lambda one: one[0])
        why = f"{source.path} has {count:,} with weight {source.weight:g}" + (
            f", and shares make {taken:.12g} of all" if taken else ""
        )
        raise UserError(
            f"data: an epoch would have {total:,.15g} rows: {why}; the most is {MOST:,}: give smaller weights or shares"
        )
    powers = [size ** (1 / temperature) for size in sizes]
    made = []
    for count, source, share, size, power in zip(counts, sources, shares, sizes, powers, strict=True):
        passes = source.weight
        if share:
            passes = share * total / max(count, 1)
        elif temperature != 1 and size:
            passes = power / sum(powers) * sum(sizes) / count
        part = _passes(count, passes, seed)
        if count and not part:
            what = f"share {share:g}" if share else f"weight {source.weight:g}"
            raise UserError(f"{what} leaves none of the {count} rows of {source.path}")
        made.append(part)
    return made


def _passes(count: int, passes: float, seed: int) -> list[int]:
    """0 ... count - 1 as often as `passes` says: 2 is all twice, 0.5 a fixed half of them, 1.5 all and a half."""
    whole, part = divmod(passes, 1)
    if not part:
        return [*range(count)] * int(whole)
    order = sorted(range(count), key=lambda index: _hash(f"{seed} {index}"))
    return [*range(count)] * int(whole) + sorted(order[: round(part * count)])


# --- split ----------------------------------------------------------------------------------------------------------------


def split(rows: Sequence[Row], share: float | int) -> tuple[list[Row], list[Row]]:
    """(train, dev). `share` below 1 is a share of the rows, otherwise their number.

    A row's side follows from the hash of its own content (questions and answers, not the system turn): with a share, rows added
    later move no other row; equal rows are never on both sides. Raises UserError where a side would be empty.
    """
    dev = split_hashes([content_hash(row) for row in rows], share)
    return [row for row, is_dev in zip(rows, dev) if not is_dev], [row for row, is_dev in zip(rows, dev) if is_dev]


def split_hashes(hashes: Sequence[int], share: float | int) -> list[bool]:
    """Whether each row, known by its `content_hash`, is of the dev set; see `split`."""
    if share <= 0 or (share >= 1 and share != int(share)):
        raise UserError(f"dev must be a share between 0 and 1 or a whole number of rows, not {share:g}")
    if share >= 1 and share >= len(hashes):
        raise UserError(f"dev takes {share:g} rows, but there are only {len(hashes)}: no row is left to train on")
    counts = Counter(hashes)
    dev: set[int] = set()
    if share < 1:
        dev = {content for content in counts if content < share * 2**64} or set(sorted(counts)[:1])
    else:
        taken = 0
        for content in sorted(counts):
            if taken >= share:
                break
            dev.add(content)
            taken += counts[content]
    if len(dev) == len(counts):
        raise UserError(f"dev {share:g} leaves no row of {len(hashes)} to train on; give a smaller share or a file of its own")
    return [content in dev for content in hashes]


def content_hash(record: Record) -> int:
    """64 bits of what a record asks and answers, whatever its system turn; the same on every machine."""
    if isinstance(record, Document):
        return _hash(record.text)
    turns: list[Any] = [[turn.role, turn.text] for turn in record.turns if turn.role != "system"]
    if isinstance(record, Preference):
        turns += [["chosen", record.chosen.text], ["rejected", record.rejected.text]]
    return _hash(json.dumps(turns))


def _hash(text: str) -> int:
    """Uniform, the same on every machine and in every process (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

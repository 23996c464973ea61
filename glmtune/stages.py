"""Stages: which rows are read, what is learned of them, and the loss. Never sees the optimizer.

A stage is a small object of functions; `train.py` runs one loop for all of them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .batch import Batch
from .chat import Template, encode_document
from .errors import UserError
from .forms import Want
from .records import Conversation, Document, Example


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to longer ones (run options max_length, too_long)."""

    max_length: int
    too_long: str
    positions: int | None = None  # what the model itself can read

    @property
    def longest(self) -> int:
        return min(self.max_length, self.positions or self.max_length)


@dataclass
class Encoded:
    """Training sequences, and what was done to rows on the way. `counts` says it in words; nothing happens that is not counted."""

    examples: list[Example] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Stage:
    want: Want  # what data.load is asked for
    encode: Callable[[Template, Sequence[Any], Limits], Encoded]
    loss: Callable[[Any, Batch], Any]  # (forward, batch) -> sum over learned tokens; the loop divides by the step's total weight


def encode_conversations(template: Template, rows: Sequence[Conversation], limits: Limits) -> Encoded:
    """Conversations -> Examples under the length policy. Raises UserError when the policy is `error` and a row is too long,
    when a question alone is too long for a cut, or when nothing is left to learn."""
    made, long = Encoded(), []
    whole, rows = len(rows), [part for row in rows for part in template.split(row)]
    if len(rows) > whole:
        made.counts["further sequences: this model reads earlier rounds as part of the question, so every answer gets its own"] = (
            len(rows) - whole
        )
    for row in rows:
        example = template.encode(row)
        if len(example.ids) > limits.longest:
            long.append(example)
            if limits.too_long == "error":
                continue
            example = _shorten(template, row, example, limits, made.counts)
        if example is not None and example.num_learned == 0:
            made.counts["rows with nothing to learn (every turn has learn: false or weight 0), left out"] += 1
            example = None
        if example is not None:
            made.examples.append(example)
    for reason, count in template.differs.items():
        made.counts[f"rows: {reason}"] += count
    if long and limits.too_long == "error":
        longest = max(long, key=lambda example: len(example.ids))
        can = limits.positions is None or len(longest.ids) <= limits.positions
        what = (
            f"max_length={limits.max_length} tokens"
            if limits.longest == limits.max_length
            else f"the {limits.longest} tokens that this model reads"
        )
        raise UserError(
            f"{len(long)} of {len(rows)} rows are longer than {what}; the longest has {len(longest.ids)} ({longest.where})\n"
            f"paste one of: {f'max_length={len(longest.ids)}   ' if can else ''}too_long=skip   (also: too_long=cut-left-turns, too_long=cut-answer)"
        )
    if not made.examples:
        raise UserError(
            f"none of the {len(rows)} rows can be trained on: " + "; ".join(f"{n} {why}" for why, n in made.counts.items())
        )
    return made


def _shorten(template: Template, row: Conversation, whole: Example, limits: Limits, counts: Counter) -> Example | None:
    if limits.too_long == "skip":
        counts["rows longer than max_length left out (too_long: skip)"] += 1
        return None
    if limits.too_long == "cut-left-turns":
        turns = list(row.turns)
        first = 1 if turns[0].role == "system" else 0
        while True:
            # The next user turn after the first one: everything before it goes.
            following = next((i for i in range(first + 1, len(turns)) if turns[i].role == "user"), None)
            if following is None:
                counts["rows longer than max_length even as one question and answer, left out (too_long: cut-left-turns)"] += 1
                return None
            del turns[first:following]
            example = template.encode(replace(row, turns=tuple(turns)))
            if len(example.ids) <= limits.longest:
                counts["rows longer than max_length: oldest turns cut (too_long: cut-left-turns)"] += 1
                return example
    # cut-answer: the ids simply end earlier, so a cut answer has no end mark. The question must stay whole.
    if len(template.prompt(row)) >= limits.longest:
        counts["rows whose question alone is longer than max_length, left out (too_long: cut-answer)"] += 1
        return None
    counts["rows longer than max_length: last answer cut, no end mark learned (too_long: cut-answer)"] += 1
    n = limits.longest
    return Example(whole.ids[:n], whole.next_ids[:n], [*whole.weights[: n - 1], 0.0], whole.where)


def encode_documents(template: Template, rows: Sequence[Document], limits: Limits) -> Encoded:
    """Documents -> sequences of at most max_length tokens. A longer document goes on in the next sequence; nothing is cut."""
    made = Encoded()
    for row in rows:
        pieces = encode_document(template.tokens, row, limits.longest)
        made.examples += pieces
        if len(pieces) > 1:
            made.counts["documents longer than max_length, continued in further sequences"] += 1
    return made


def _next_token(forward: Any, batch: Batch) -> Any:
    return forward.nll(batch)


STAGES: dict[str, Stage] = {
    "sft": Stage("answers", encode_conversations, _next_token),
    "pretrain": Stage("text", encode_documents, _next_token),
}

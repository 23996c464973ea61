"""Stages: which rows are read, what is learned of them, and the loss. Never sees the optimizer.

A stage is a small object of functions; `train.py` runs one loop for all of them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .batch import Batch
from .chat import Template, align, encode_document
from .errors import UserError
from .forms import Want
from .records import Conversation, Document, Example, Labelled, Preference, Turn


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
class Tally:
    """What was done to rows on the way to sequences; nothing happens that is not counted. Tallies of several workers add up."""

    counts: Counter = field(default_factory=Counter)
    rows: int = 0
    made: int = 0
    long: int = 0  # rows beyond the length policy `error`
    longest: tuple[int, str, bool] = (0, "", True)  # tokens of the longest of them, where it stands, and whether they were counted

    def add(self, other: "Tally") -> None:
        self.counts += other.counts
        self.rows, self.made, self.long = self.rows + other.rows, self.made + other.made, self.long + other.long
        self.longest = max(self.longest, other.longest, key=lambda found: found[0])


@dataclass(frozen=True)
class Stage:
    want: Want  # what data.stream is asked for
    encode: Callable[[Template, Any, Limits, Tally], list[Example]]  # one row -> its sequences
    # (forward, batch) -> sum over learned tokens; the loop divides by the step's total weight. None: only its rows are read so far.
    loss: Callable[[Any, Batch], Any] | None = None


def encode_conversation(template: Template, row: Conversation, limits: Limits, tally: Tally) -> list[Example]:
    """A conversation -> its sequences under the length policy (one; where the history is context, one for each learned answer)."""
    if len(row.turns) > limits.longest:  # a token a turn at the least: cut before thousands of turns are written out
        if limits.too_long == "error":
            tally.long += 1
            tally.longest = max(tally.longest, (len(row.turns), row.where, False), key=lambda found: found[0])
            return []
        row = replace(row, turns=_last_turns(row.turns, limits.longest))
        tally.counts[f"rows of more turns than max_length has tokens: oldest turns left out (too_long: {limits.too_long})"] += 1
    made, beyond = [], 0
    parts = template.split(row)
    if len(parts) > 1:
        what = "further sequences: this model reads earlier rounds as part of the question, so every answer gets its own"
        tally.counts[what] += len(parts) - 1
    for part in parts:
        example: Example | None = template.encode(part)
        if len(example.ids) > limits.longest:
            if limits.too_long == "error":
                beyond = 1
                tally.longest = max(tally.longest, (len(example.ids), example.where, True), key=lambda found: found[0])
                continue
            example = _shorten(template, part, example, limits, tally.counts)
        if example is not None and not any(example.weights):
            tally.counts["rows with nothing to learn (every turn has learn: false or weight 0), left out"] += 1
            example = None
        if example is not None:
            made.append(example)
    tally.long += beyond
    return made


def _last_turns(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """The last turns from a question on, with the system turn."""
    system = turns[:1] if turns[0].role == "system" else ()
    start = next((i for i in range(len(turns) - count, len(turns)) if turns[i].role == "user"), len(turns) - 2)
    return (*system, *turns[start:])


def finish(tally: Tally, limits: Limits, rows: str = "rows") -> None:
    """After the last row. Raises UserError when the policy is `error` and rows are too long, or when nothing is left to learn."""
    if tally.long:
        tokens, where, counted = tally.longest
        can = counted and (limits.positions is None or tokens <= limits.positions)
        what = (
            f"max_length={limits.max_length} tokens"
            if limits.longest == limits.max_length
            else f"the {limits.longest} tokens that this model reads"
        )
        raise UserError(
            f"{tally.long} of {tally.rows} {rows} are longer than {what}; the longest has {'' if counted else 'more than '}{tokens} ({where})\n"
            f"paste one of: {f'max_length={tokens}   ' if can else ''}too_long=skip   (also: too_long=cut-left-turns, too_long=cut-answer)"
        )
    if not tally.made:
        raise UserError(
            f"none of the {tally.rows} {rows} can be {'trained on' if rows == 'rows' else 'used'}: "
            + "; ".join(f"{n} {why}" for why, n in tally.counts.items())
        )


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


def encode_text(template: Template, row: Document, limits: Limits, tally: Tally) -> list[Example]:
    """A document -> sequences of at most max_length tokens. A longer document goes on in the next sequence; nothing is cut."""
    pieces = encode_document(template.tokens, row, limits.longest)
    if len(pieces) > 1:
        tally.counts["documents longer than max_length, continued in further sequences"] += 1
    return pieces


def encode_preference(template: Template, row: Preference, limits: Limits, tally: Tally) -> list[Example]:
    """The better answer's sequence, then the worse one's."""
    pair = [Conversation((*row.turns, answer), row.where, weight=row.weight) for answer in (row.chosen, row.rejected)]
    return [example for one in pair for example in encode_conversation(template, one, limits, tally)]


def encode_labelled(template: Template, row: Labelled, limits: Limits, tally: Tally) -> list[Example]:
    return encode_conversation(template, Conversation(row.turns, row.where, weight=row.weight), limits, tally)


def encode_prompt(template: Template, row: Conversation, limits: Limits, tally: Tally) -> list[Example]:
    """What the model is to answer: nothing of it is learned. Raises UserError where there is no room left for an answer."""
    ids = template.prompt(row)
    if len(ids) >= limits.longest:
        tally.long += 1
        tally.longest = max(tally.longest, (len(ids), row.where, True), key=lambda found: found[0])
        return []
    return [align(ids, [0.0] * len(ids), row.where)]


def _next_token(forward: Any, batch: Batch) -> Any:
    return forward.nll(batch)


STAGES: dict[str, Stage] = {
    "sft": Stage("answers", encode_conversation, _next_token),
    "pretrain": Stage("text", encode_text, _next_token),
    "reward": Stage("preferences", encode_preference),
    "dpo": Stage("preferences", encode_preference),
    "kto": Stage("labels", encode_labelled),
    "ppo": Stage("prompts", encode_prompt),
    "grpo": Stage("prompts", encode_prompt),
}

"""Stages: which rows are read, what is learned of them, and the loss. Never sees the optimizer.

A stage is a record of functions; loop.py runs the one loop for all of them. Laws (tests/test_stages.py):

- a row is whole or left out, never half, under every length policy; it is the unit of order, batch and epoch;
- a step's loss is the sum over names of (sum over its rows) / (denominator of its rows), so the cut into micro-batches changes nothing;
- what `columns` names comes back with the row after tokenising, caching and resuming.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .batch import Batch
from .chat import Template, align, encode_document
from .errors import UserError
from .forms import Want
from .records import Column, Conversation, Document, Example, Labelled, Preference, Turn


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


@dataclass
class Terms:
    """What a micro-batch adds to its step. sums: by the names of the stage's denominators, scalars with gradients. metrics: name ->
    (sum, weight), plain numbers; the log, TensorBoard and the report show sum / weight of the whole step under that name. Every micro-batch gives
    the same names."""

    sums: dict[str, Any]
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


def learned_weight(rows: Sequence[Sequence[Example]]) -> dict[str, float]:
    """The denominator of a mean over learned tokens."""
    return {"nll": float(sum(sum(example.weights) for row in rows for example in row))}


def next_token(forward: Any, batch: Batch) -> Terms:
    """Minus the log-probability of every learned token, weighted."""
    return Terms({"nll": forward.nll(batch)})


@dataclass(frozen=True)
class Stage:
    """What one stage is. The loss of a step is the sum over names of loss(...).sums[name] / denominators(...)[name]."""

    want: Want  # what data.stream is asked for
    # One row -> its sequences, all of them or none. Their `columns` hold what `columns` below names.
    encode: Callable[[Template, Any, Limits, Tally], list[Example]]
    loss: Callable[[Any, Batch], Terms] | None = (
        None  # of a micro-batch (forward.Forward, Batch); None: only its rows are read so far
    )
    denominators: Callable[[Sequence[Sequence[Example]]], dict[str, float]] = learned_weight  # of a step's rows, before any forward
    columns: Mapping[str, Column] = field(default_factory=dict)
    whole: bool = True  # a row's sequences stay in one step; False: each is a row of its own (the pieces of a long document)
    together: bool = False  # and in one micro-batch: the loss compares them
    # After each optimizer step, with its line of the log: (the stage's own state, kept in checkpoints as JSON; the line). Changes the state.
    after_step: Callable[[dict[str, Any], dict[str, Any]], None] | None = None


def encode_conversation(template: Template, row: Conversation, limits: Limits, tally: Tally) -> list[Example]:
    """A conversation -> its sequences under the length policy (one; where the history is context, one for each learned answer)."""
    return _fit(template, [[part] for part in _parts(template, row, limits, tally)], row.where, limits, tally)


def _parts(template: Template, row: Conversation, limits: Limits, tally: Tally) -> list[Conversation]:
    """The conversations that are trained of one, a sequence each."""
    if len(row.turns) > limits.longest:  # a token a turn at the least: cut before thousands of turns are written out
        if limits.too_long == "error":
            _beyond(tally, len(row.turns), row.where, counted=False)
            return []
        row = replace(row, turns=_last_turns(row.turns, limits.longest))
        tally.counts[f"rows of more turns than max_length has tokens: oldest turns left out (too_long: {limits.too_long})"] += 1
    parts = template.split(row)
    if len(parts) > 1:
        what = "further sequences: this model reads earlier rounds as part of the question, so every answer gets its own"
        tally.counts[what] += len(parts) - 1
    return parts


def _beyond(tally: Tally, tokens: int, where: str, counted: bool = True) -> None:
    """A row beyond the length policy `error`."""
    tally.long += 1
    tally.longest = max(tally.longest, (tokens, where, counted), key=lambda found: found[0])


NOTHING = "rows with nothing to learn (every turn has learn: false or weight 0), left out"


def _fit(template: Template, groups: Sequence[Sequence[Conversation]], where: str, limits: Limits, tally: Tally) -> list[Example]:
    """The sequences of a row under the length policy: all of them, or none. Conversations of a group share their question, and what is cut
    of it is cut of all."""
    made: list[Example] = []
    cuts: Counter[str] = Counter()  # what was done to this row: a row counts once, however many sequences it has
    longest = 0
    for group in groups:
        examples = [template.encode(conversation) for conversation in group]
        tokens = max(len(example.ids) for example in examples)
        if tokens > limits.longest and limits.too_long == "error":
            longest = max(longest, tokens)
            continue
        if tokens > limits.longest:
            examples, what = _shorten(template, group, examples, limits)
            if not examples:
                tally.counts[what] += 1
                return []
            cuts[what] = 1
        if not all(any(example.weights) for example in examples):
            tally.counts[NOTHING] += 1
            return []
        made += examples
    if longest:
        _beyond(tally, longest, where)
        return []
    tally.counts += cuts
    return made


def _last_turns(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """The last turns from a question on, with the system turn."""
    system = turns[:1] if turns[0].role == "system" else ()
    start = next((i for i in range(len(turns) - count, len(turns)) if turns[i].role == "user"), len(turns) - 2)
    return (*system, *turns[start:])


def _without_oldest(turns: Sequence[Turn]) -> Iterator[tuple[Turn, ...]]:
    """The same from the second question on, from the third ..., each with the system turn."""
    first = 1 if turns and turns[0].role == "system" else 0
    for start in range(first + 1, len(turns)):
        if turns[start].role == "user":
            yield (*turns[:first], *turns[start:])


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


def _shorten(template: Template, group: Sequence[Conversation], whole: list[Example], limits: Limits) -> tuple[list[Example], str]:
    """The sequences of conversations with one question, cut to max_length alike, and what was done; none where that cannot be."""
    if limits.too_long == "skip":
        return [], "rows longer than max_length left out (too_long: skip)"
    if limits.too_long == "cut-left-turns":
        for turns in _without_oldest(group[0].turns[:-1]):
            made = [template.encode(replace(one, turns=(*turns, one.turns[-1]))) for one in group]
            if max(len(example.ids) for example in made) <= limits.longest:
                return made, "rows longer than max_length: oldest turns cut (too_long: cut-left-turns)"
        return [], "rows longer than max_length even as one question and answer, left out (too_long: cut-left-turns)"
    # cut-answer: the ids simply end earlier, so a cut answer has no end mark. The question must stay whole.
    n = limits.longest
    if len(template.prompt(group[0])) >= n:
        return [], "rows whose question alone is longer than max_length, left out (too_long: cut-answer)"
    made = [
        example if len(example.ids) <= n
        else replace(example, ids=example.ids[:n], next_ids=example.next_ids[:n], weights=[*example.weights[: n - 1], 0.0])
        for example in whole
    ]  # fmt: skip
    return made, "rows longer than max_length: last answer cut, no end mark learned (too_long: cut-answer)"


def encode_text(template: Template, row: Document, limits: Limits, tally: Tally) -> list[Example]:
    """A document -> sequences of at most max_length tokens. A longer document goes on in the next sequence; nothing is cut."""
    pieces = encode_document(template.tokens, row, limits.longest)
    if len(pieces) > 1:
        tally.counts["documents longer than max_length, continued in further sequences"] += 1
    return pieces


def _judged(turns: tuple[Turn, ...], row: Any) -> Conversation:
    """A conversation of which the last answer alone is learned: the one that is preferred or labelled."""
    earlier = tuple(replace(turn, learn=False) for turn in turns[:-1])
    return Conversation((*earlier, replace(turns[-1], learn=True)), row.where, weight=row.weight)


def encode_preference(template: Template, row: Preference, limits: Limits, tally: Tally) -> list[Example]:
    """The better answer's sequence, then the worse one's, after the same question. Column `chosen`: 1 and 0."""
    pair = [_judged((*row.turns, answer), row) for answer in (row.chosen, row.rejected)]
    split = [_parts(template, one, limits, to) for one, to in zip(pair, (tally, Tally()))]  # what is counted is the same of both
    if not all(split):
        return []
    made = _fit(template, [[parts[-1] for parts in split]], row.where, limits, tally)
    return [replace(example, columns={"chosen": chosen}) for example, chosen in zip(made, (1, 0))]


def encode_labelled(template: Template, row: Labelled, limits: Limits, tally: Tally) -> list[Example]:
    """Column `label`: 1 for a good answer, 0 for a bad one."""
    made = encode_conversation(template, _judged(row.turns, row), limits, tally)
    return [replace(example, columns={"label": int(row.good)}) for example in made]


def encode_prompt(template: Template, row: Conversation, limits: Limits, tally: Tally) -> list[Example]:
    """What the model is to answer: nothing of it is learned. There must be room left for an answer.

    Columns: `row`, the row as it stands in its file, and `reference`, the answer that stood there (or null): what rewards and scores go by.
    """
    ids = template.prompt(row)
    if len(ids) >= limits.longest and limits.too_long == "error":
        _beyond(tally, len(ids), row.where)
        return []
    if len(ids) >= limits.longest and limits.too_long == "cut-left-turns":
        shorter = (template.prompt(replace(row, turns=turns)) for turns in _without_oldest(row.turns))
        ids = next((one for one in shorter if len(one) < limits.longest), ids)
        if len(ids) < limits.longest:
            tally.counts["rows longer than max_length: oldest turns cut (too_long: cut-left-turns)"] += 1
    if len(ids) >= limits.longest:
        tally.counts[f"questions that leave no room for an answer in max_length, left out (too_long: {limits.too_long})"] += 1
        return []
    columns = {"row": row.meta.get("row", {}), "reference": row.meta.get("reference")}
    return [replace(align(ids, [0.0] * len(ids), row.where), columns=columns)]


_ROLE = {"chosen": Column("sequence", "int8")}
_ASKED = {"row": Column("row", "json"), "reference": Column("row", "json")}

STAGES: dict[str, Stage] = {
    "sft": Stage("answers", encode_conversation, next_token),
    "pretrain": Stage("text", encode_text, next_token, whole=False),
    "reward": Stage("preferences", encode_preference, columns=_ROLE, together=True),
    "dpo": Stage("preferences", encode_preference, columns=_ROLE, together=True),
    "kto": Stage("labels", encode_labelled, columns={"label": Column("row", "int8")}),
    "ppo": Stage("prompts", encode_prompt, columns=_ASKED),
    "grpo": Stage("prompts", encode_prompt, columns=_ASKED),
}

"""The records that pass through the program. Frozen dataclasses without logic; see docs/architecture.md for the four hops.

a row of a file -> Conversation | Document            data.py
Conversation    -> Pieces -> Examples (token ids)     chat.py
Examples        -> Batch (tensors)                    batch.py
"""

from dataclasses import dataclass, field
from typing import Any, Literal

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """One message. `learn`: None follows the run's `learn:` option; True or False overrides it. `weight` scales its loss."""

    role: str  # one of ROLES
    text: str
    learn: bool | None = None
    weight: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of the message (tool_calls, name), given to the chat template


@dataclass(frozen=True)
class Conversation:
    """Turns in order; a system turn, if any, stands first. Ends with an assistant turn when it can be trained on."""

    turns: tuple[Turn, ...]
    where: str = ""  # "train.json:17", for messages
    meta: dict[str, Any] = field(default_factory=dict)  # the row's other columns, and for prediction the whole row
    weight: float = 1.0  # scales the loss of the whole row


@dataclass(frozen=True)
class Document:
    """Plain text for pre-training: every token is learned."""

    text: str
    where: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Preference:
    """A question with a better and a worse answer, for reward models and DPO. `turns` ends before the answers."""

    turns: tuple[Turn, ...]
    chosen: Turn
    rejected: Turn
    where: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Labelled:
    """A conversation whose last answer is called good or bad, for KTO."""

    turns: tuple[Turn, ...]
    good: bool
    where: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: plain text, or one special token by its id.

    `weight` 0 is not learned. Neighbouring texts are encoded as one string unless `joined` is False:
    whatever the model itself writes (an answer) starts apart, so that a prompt is a prefix of its training sequence.
    """

    text: str
    id: int | None = None  # a special token; `text` is then its name, for show
    weight: float = 0.0
    joined: bool = True


@dataclass(frozen=True)
class Example:
    """Token ids of one training sequence. `next_ids[i]` must follow `ids[i]`, with loss weight `weights[i]` (0: not learned)."""

    ids: list[int]
    next_ids: list[int]
    weights: list[float]
    where: str = ""
    columns: dict[str, Any] = field(default_factory=dict)  # what else its stage needs of it, by the names of Stage.columns

    @property
    def labels(self) -> list[int]:
        """As transformers wants them: `ids` where learned, else -100 (unshifted, same length)."""
        return [-100] + [token if weight else -100 for token, weight in zip(self.next_ids[:-1], self.weights[:-1], strict=True)]

    @property
    def num_learned(self) -> int:
        return sum(1 for weight in self.weights if weight)


@dataclass(frozen=True)
class Column:
    """A named value that travels with training sequences, from the row's file to the loss.

    per: "row" (one value a row, taken from its first sequence), "sequence", or "token" (a list as long as `Example.ids`, whose entry i goes
    with next_ids[i]). kind: a numpy number type such as "float32" or "int64", or "json" for any JSON value (not per token).
    """

    per: Literal["row", "sequence", "token"]
    kind: str


@dataclass(frozen=True)
class Vocabulary:
    """A fast tokenizer: the text of its tokenizer.json, and what belongs into tokenizer_config.json (eos_token, chat_template ...;
    `end_tokens`: further tokens at which an answer ends)."""

    json: str
    config: dict[str, Any]


Learn = Literal["all", "last", "everything"]

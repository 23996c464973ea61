"""What a family file says about a published folder: which native model it is, and where each of its tensors goes.

No torch in here: names and shapes of a checkpoint are known before anything heavy is loaded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..chat import about_tokenizer, read_object
from ..errors import UserError
from ..records import Vocabulary

__all__ = [
    "Family",
    "Places",
    "Take",
    "Vocabulary",
    "about_generation",
    "about_tokenizer",
    "added",
    "called",
    "computed",
    "places",
    "same_names",
]


@dataclass(frozen=True)
class Take:
    """A native tensor as rows of a published one: its rows are cut into `groups` equal groups, of each the rows start:stop are kept.

    groups 1 is a plain slice. ChatGLM-6B's and InternLM2's fused projections interleave q, k and v head by head: groups = heads.
    """

    name: str
    start: int = 0
    stop: int | None = None
    groups: int = 1

    def rows(self, total: int) -> int:
        """How many rows it has, out of `total` published ones."""
        return len(range(total // self.groups)[self.start : self.stop]) * self.groups


Places = Callable[[str], Sequence[Take] | None]  # published name -> what becomes of it; () not needed; None: no such name


def computed(name: str) -> bool:
    """Whether a published tensor is a table that every class computes for itself: rotary frequencies, numbers of positions, the constant
    under a mask. Old files hold them, and transformers ignores them too; what they say is never read."""
    return (
        re.search(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|position_ids|masked_bias|future_mask)$", name) is not None
    )


def same_names(name: str) -> Sequence[Take]:
    """Places of a folder whose tensors are named as in the native class."""
    return () if computed(name) else (Take(name),)


def places(rules: Mapping[str, str | Sequence[Take]]) -> Places:
    """A table of names as a function. In a rule `{}` stands for the layer's number and a last `*` for weight or bias (or anything);
    the right side is a name, a list of Takes, or () for a tensor that is not needed."""
    compiled = []
    for pattern, takes in rules.items():
        expression = re.escape(pattern).replace(r"\{\}", r"(?P<layer>\d+)").replace(r"\*", r"(?P<rest>[^.]+)")
        compiled.append((re.compile(expression), (Take(takes),) if isinstance(takes, str) else takes))

    def place(name: str) -> Sequence[Take] | None:
        if computed(name):
            return ()
        for pattern, takes in compiled:
            found = pattern.fullmatch(name)
            if found:
                groups = found.groupdict()

                def fill(text: str, groups: dict[str, str] = groups) -> str:
                    return text.replace("{}", groups.get("layer") or "").replace("*", groups.get("rest") or "")

                return [Take(fill(take.name), take.start, take.stop, take.groups) for take in takes]
        return None

    return place


@dataclass(frozen=True)
class Family:
    """A published folder, understood.

    config: config.json of the native model (its model_type names the class, transformers' own or one of ours).
    normalised: native tensors whose rows are divided by their L2 norm when they are read (Baichuan2's head).
    vocabulary: builds the fast tokenizer from the folder's published files; None: the folder's own tokenizer.json is used.
    """

    name: str  # for people: "ChatGLM3-6B"
    config: dict[str, Any]
    places: Places
    vocabulary: Callable[[Path], Vocabulary] | None = None
    normalised: tuple[str, ...] = ()
    native: bool = False  # transformers knows the folder as it is
    settings: dict[str, Any] = field(default_factory=dict)  # the published sampling settings: temperature, top_p
    notes: tuple[str, ...] = ()  # what the user should know (doctor prints it)


# --- what a folder says of itself ---------------------------------------------------------------------------------------------


def called(folder: Path, config: dict[str, Any]) -> str:
    """The names under which a model is known, lower case: its config's, its tokenizer's, its folder's or its hub id."""
    here = folder.resolve()
    hub = here.parent.parent.name if here.parent.name == "snapshots" else here.name
    names = [config.get("_name_or_path"), about_tokenizer(folder).get("name_or_path"), hub]
    return " ".join(str(name).rstrip("/").split("/")[-1] for name in names if name).lower()


def about_generation(folder: Path) -> dict[str, Any]:
    return read_object(folder / "generation_config.json")


def added(folder: Path) -> dict[str, int]:
    """Tokens that a folder lists beside its vocabulary file: added_tokens.json and tokenizer_config.json's added_tokens_decoder."""
    path = folder / "added_tokens.json"
    found = read_object(path)
    if not all(type(id) is int for id in found.values()):
        raise UserError(f"{path}: wanted tokens and their numbers; copy the file again")
    listed = about_tokenizer(folder).get("added_tokens_decoder") or {}
    marks = {id: token for id, token in listed.items() if isinstance(token, dict)}
    return found | {token["content"]: int(id) for id, token in marks.items() if token.get("special", True)}

"""What a run needs, before anything is loaded: memory and room on the disk, from shapes and lengths alone."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model. Counts are numbers of parameters."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    inner: int  # width inside the MLP
    vocab: int

    @classmethod
    def of(cls, config: dict, parameters: int, trainable: int) -> "Shape":
        config = {**config, **config.get("text_config", {})}
        hidden = config.get("hidden_size") or config.get("n_embd") or 1
        return cls(
            parameters,
            trainable,
            config.get("num_hidden_layers") or config.get("n_layer") or 1,
            hidden,
            config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
            config.get("vocab_size") or config.get("padded_vocab_size") or 1,
        )


def lora_parameters(shapes: dict[str, list[int]], targets: Sequence[str], rank: int, shared: Sequence[Sequence[str]] = ()) -> int:
    """Trainable parameters of LoRA on these layers: rank * (in + out) each. `shared`: layers that have one A together."""
    once = sum(rank * shapes[f"{name}.weight"][1] for group in shared for name in group[1:])
    return sum(rank * sum(shapes[f"{name}.weight"]) for name in targets) - once


def memory(shape: Shape, *, precision: str, full: bool, micro_tokens: int, longest: int, checkpointing: bool) -> dict[str, float]:
    """Bytes by purpose. The activations are an upper estimate of the module path: per token and layer about 12 tensors of the
    hidden width and 5 of the inner width in fp32; with checkpointing one layer of them, plus each layer's input."""
    tokens = max(micro_tokens, longest)
    layer = 4 * (12 * shape.hidden + 5 * shape.inner)
    per_token = layer + 4 * shape.hidden * shape.layers if checkpointing else layer * shape.layers
    stored = 4 if full or precision == "fp32" else 2
    return {
        "weights": shape.parameters * stored + (0 if full else 4 * shape.trainable),
        "gradients": 4 * shape.trainable,
        "optimizer": 8 * shape.trainable,
        "activations": tokens * per_token + 3 * 256 * shape.vocab * 4,
        "program": 0.6 * GB,
    }


def refuse_memory(need: dict[str, float], available: float, where: str) -> None:
    total = sum(need.values())
    if total > available:
        parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in need.items())
        raise UserError(
            f"this run needs about {total / GB:.1f} GB of memory ({parts}); {where} has {available / GB:.1f} GB free\n"
            "try: optim.micro_tokens=512   checkpointing=true   method=lora   a shorter max_length, or a smaller model"
        )


def refuse_disk(folder: Path, checkpoint_bytes: float, kept: int) -> None:
    """Room for the checkpoints that are kept, one being written, and the final result."""
    refuse_room(folder, checkpoint_bytes * (kept + 3) + 20e6, "another out=, or keep fewer: save.keep=1")


def refuse_room(folder: Path, need: float, advice: str = "another folder") -> None:
    folder = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"about {need / GB:.2f} GB will be written in {folder}; {free / GB:.2f} GB are free\nfree some room, or choose {advice}"
        )

"""What a run needs, before anything is loaded: memory, time and room on the disk, from shapes and lengths alone.

Memory counts what stays: weights, what learns, and the tensors that the backward pass keeps on each of the two paths (forward.py).
bench/memory.py compares it with measured peaks (bench/results/memory.txt). Nothing is tried out: a probe step would change the run.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import UserError
from .method import METHODS, lora_size, trains_base

GB = 1e9
PROGRAM = 0.42 * GB  # Python, torch, transformers and the rows: resident with a model loaded, less its weights
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PACKED = {"nf4": 0.517, "int8": 1.0, "chatglm-int4": 0.5, "chatglm-int8": 1.0}  # bytes a weight, scales included
OPTIMIZER = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1}  # bytes a trained number
# Holes in a CPU's heap. torch asks for aligned blocks, and glibc (2.36) cuts the rest off each: a freed block is then too small for the next
# tensor of its own size, so that over some steps there comes to be a hole for every tensor of a pass (measured: 0.7 to 1.6 times as much).
# Checkpointing makes the same tensors, so it leaves the same holes. Blocks above MAPPED bytes are not in the heap and leave none. With every
# block mapped by itself (MALLOC_MMAP_THRESHOLD_=65536, too slow to train with) LoRA's peak is what lives, within 2 %.
HOLES = 1.0
MAPPED = 32 << 20
LOGITS = 3 * 256  # rows of the vocabulary's width that exist at one time (losses.CHUNK: logits, their softmax, its gradient)


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model. Counts are numbers of parameters."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    inner: int  # width inside the MLP
    vocab: int
    queries: int = 0  # heads * head width
    keys: int = 0  # key heads * head width
    linear: int = 0  # parameters in the linear layers of the blocks

    @classmethod
    def of(cls, config: dict, parameters: int, trainable: int, linear: int | None = None) -> "Shape":
        config = {**config, **config.get("text_config", {})}
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):  # one for each layer, in some families
            if isinstance(config.get(name), list):
                config[name] = max(config[name])
        hidden = config.get("hidden_size") or config.get("n_embd") or 1
        layers = config.get("num_hidden_layers") or config.get("n_layer") or 1
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        width = config.get("head_dim") or hidden // heads
        vocab = config.get("vocab_size") or config.get("padded_vocab_size") or 1
        return cls(
            parameters, trainable, layers, hidden, config.get("intermediate_size") or config.get("n_inner") or 4 * hidden, vocab,
            heads * width, (config.get("num_key_value_heads") or heads) * width,
            linear if linear is not None else max(0, parameters - vocab * hidden),
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a run is carried out, as far as its needs depend on it."""

    method: str  # its kind, as in method.METHODS
    precision: str
    quant: str | None = None
    optimizer: str = "adamw"
    tokens: int = 1024  # computed at once, padding counted
    longest: int = 1024
    learned: int = 1024  # of them with a loss
    checkpointing: bool = False
    fused: bool = False
    depth: float = 1.0  # share of the blocks that gradients pass through (freeze: the trained ones and those above)
    dropout: bool = False  # lora: with dropout
    dora: bool = False  # lora: DoRA
    cpu: bool = True  # tensors live in the C library's heap


def memory(shape: Shape, how: Setting) -> dict[str, float]:
    """Bytes by purpose, at the moment of the peak: in the backward pass of the largest micro-batch."""
    stored = BYTES[how.precision]
    if METHODS[how.method].whole:
        weights = 4.0 * shape.parameters
    else:
        packed = PACKED[how.quant] if how.quant else stored
        weights = packed * shape.linear + stored * (shape.parameters - shape.linear)
        weights += ((4.0 - stored) if trains_base(how.method) else 4.0) * shape.trainable
    return {
        "weights": weights,
        "gradients": 4.0 * shape.trainable,
        "optimizer": OPTIMIZER[how.optimizer] * shape.trainable,
        "activations": _activations(shape, how),
        "program": PROGRAM,
    }


def _activations(shape: Shape, how: Setting) -> float:
    """Of one micro-batch. What is kept was counted storage by storage (torch.autograd.graph.saved_tensors_hooks)."""
    d, q, k, f = shape.hidden, shape.queries, shape.keys, shape.inner
    once = 0.0
    if how.fused:  # fp32 the block's input and its middle; in storage dtype q, k, v, attention's output, gate and up
        layer, passing = 8.0 * d + BYTES[how.precision] * (2 * q + 2 * k + 2 * f), 4.0 * (4 * d + 3 * f)
    else:
        more, once = METHODS[how.method].activations(shape, how)
        layer, passing = (
            _kept_by_modules(shape, how) + more,
            4.0 * (4 * d + 4 * q + 4 * f),
        )  # passing: made and dropped within a block
    if how.quant:  # the backward of a packed product: its sum in fp32, a piece's product, the sum cast (quant._Product)
        passing += 8 * f
    whole = layer * shape.layers * how.depth
    kept = 4.0 * d * shape.layers + layer if how.checkpointing else whole  # the inputs of all blocks, and one block whole
    live, made = (how.tokens * (size + passing) + once for size in (kept, whole))
    holes = HOLES * made if how.cpu and 4 * how.tokens * f < MAPPED else 0.0
    return live + holes + LOGITS * shape.vocab * 4.0  # logits are large enough to be mapped by themselves


def _kept_by_modules(shape: Shape, how: Setting) -> float:
    """Bytes a token that autograd keeps of a Llama-shaped block with frozen weights. Widths: d, q (all query heads), f."""
    d, q, f = shape.hidden, shape.queries, shape.inner
    # Inputs of both norms; q, repeated k and v, attention's output (o reads it where it is); gate, its silu, up: all fp32.
    layer = 4.0 * (2 * d + 4 * q + 3 * f)
    if how.tokens > how.longest:  # several rows, of different lengths: each layer makes their mask [rows, 1, S, S] fp32
        layer += 4.0 * how.longest
    return layer


def flops(shape: Shape, how: Setting, tokens: float, learned: float) -> float:
    """Of one pass over `tokens`: forward, and backward through everything above the lowest trained place (2 a weight and token each)."""
    trained = min(how.depth, shape.trainable / max(1, shape.linear)) if trains_base(how.method) else 0.0
    per_weight = 2 + 2 * how.depth + 2 * trained + (2 if how.checkpointing else 0)
    attention = 12 * shape.queries * shape.layers * min(how.longest, 4096) / 2
    return tokens * (per_weight * shape.linear + attention) + learned * 6 * shape.vocab * shape.hidden


def matmul_rate(device: Any, precision: str) -> float:
    """FLOP a second of a product as blocks make them, over a tenth of a second on this device. Only for the time that is shown."""
    import time

    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 4096 if device.type == "cuda" else 1024 if precision == "fp32" else 256  # a CPU may take seconds for products of 16 bits
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    torch.matmul(a, b)
    began, count = wait(), 0
    while wait() - began < 0.1:
        torch.matmul(a, b)
        count += 1
    return 2 * size**3 * count / (wait() - began)


SHARE_OF_RATE = 0.5  # of the matmul rate that training reaches (bench/results: 46 to 63 % on two quiet cores)


def seconds(shape: Shape, how: Setting, tokens: float, learned: float, rate: float) -> float:
    return flops(shape, how, tokens, learned) / (rate * SHARE_OF_RATE)


def words(need: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / GB:.2f}" for name, value in need.items() if value >= 0.005 * GB)


def refuse_memory(shape: Shape, how: Setting, available: float, where: str) -> None:
    """Raises UserError when a run cannot fit, with the nearest setting that would."""
    need = memory(shape, how)
    total = sum(need.values())
    if total <= available:
        return
    nearest = next((text for text, other in _smaller(shape, how) if sum(memory(*other).values()) <= available), None)
    advice = f"this would fit: {nearest}" if nearest else "nothing here makes it fit; take a smaller model, or a larger machine"
    raise UserError(
        f"this run needs about {total / GB:.1f} GB of memory ({words(need)}); {where} has {available / GB:.1f} GB free\n{advice}"
    )


def _smaller(shape: Shape, how: Setting) -> Iterator[tuple[str, tuple[Shape, Setting]]]:
    """Settings that need less, the nearest first: each goes on from the one before."""
    said: list[str] = []

    def step(text: str, shape: Shape, other: Setting) -> tuple[str, tuple[Shape, Setting]]:
        said.append(text)
        return " ".join(said), (shape, other)

    if how.optimizer == "adamw" and trains_base(how.method):
        how = replace(how, optimizer="adamw8bit")
        yield step("optim=adamw8bit", shape, how)
    if how.tokens > how.longest:
        how = replace(how, tokens=how.longest, learned=min(how.learned, how.longest))
        yield step(f"optim.micro_tokens={how.longest}", shape, how)
    if not how.checkpointing:
        how = replace(how, checkpointing=True, fused=False)
        yield step("checkpointing=true", shape, how)
    if how.precision == "fp32" and not METHODS[how.method].whole:
        how = replace(how, precision="bf16")
        yield step("precision=bf16", shape, how)
    if trains_base(how.method):
        how = replace(how, method="lora", precision="bf16", optimizer="adamw", depth=1.0)
        shape = replace(shape, trainable=lora_size(shape))
        said[:] = [text for text in said if not text.startswith(("optim=", "precision="))]
        yield step("method=lora precision=bf16", shape, how)
    if how.quant is None:
        how = replace(how, quant="nf4", precision="bf16")
        yield step("quant=nf4", shape, how)
    said[:] = [text for text in said if not text.startswith("optim.micro_tokens=")]
    while how.longest > 64:
        half = how.longest // 2
        how = replace(how, tokens=half, longest=half, learned=min(how.learned, half))
        yield " ".join([*said, f"max_length={half} too_long=skip optim.micro_tokens={half}"]), (shape, how)


FITS = (  # what people try, from the most to the least demanding: method, optimizer, checkpointing; the last three also beside packed weights
    ("full", "adamw", False), ("full", "adamw8bit", True), ("freeze", "adamw", True), ("lora", "adamw", False), ("lora", "adamw", True),
    ("prefix", "adamw", True),
)  # fmt: skip
LENGTHS = (8192, 4096, 2048, 1024, 512, 256, 128)


def fitting(
    shape: Shape, available: float, reads: int | None = None, kinds: Sequence[str] = ("int8", "nf4"), published: bool = False
) -> list[dict[str, Any]]:
    """For `glmtune doctor MODEL --fit`: of each usual way to tune, the longest rows that fit one at a time, and how many of them at once.

    reads: the model's positions, where they are known. kinds: how its weights can be packed; published: they are, so that no step can
    change them. On a card: a CPU needs more, for its heap has holes."""
    found, lengths = [], sorted({min(n, reads or n) for n in LENGTHS}, reverse=True)
    plain = [(kind, None, *how) for kind, *how in FITS if not (published and trains_base(kind))]
    packed = [(kind, quant, *how) for quant in kinds for kind, *how in FITS[-3:]]
    for kind, quant, optimizer, checkpointing in [*plain, *packed]:
        usual = METHODS[kind].usual
        assert usual is not None
        trainable, depth = usual(shape)
        own = replace(shape, trainable=trainable)
        base = Setting(kind, "bf16", quant, optimizer, checkpointing=checkpointing, depth=depth, cpu=False)

        def need(length: int, rows: int, base: Setting = base, own: Shape = own) -> float:
            return sum(memory(own, replace(base, tokens=length * rows, longest=length, learned=length * rows)).values())

        length = next((n for n in lengths if need(n, 1) <= available), None)
        row: dict[str, Any] = {
            "method": kind,
            "quant": quant,
            "optimizer": optimizer,
            "checkpointing": checkpointing,
            "max_length": length,
        }
        if length is not None:
            row["rows at once"] = next(n for n in range(256, 0, -1) if need(length, n) <= available)
            row["gb"] = round(need(length, row["rows at once"]) / GB, 2)
        else:
            row["gb"] = round(need(lengths[-1], 1) / GB, 2)
        found.append(row)
    return found


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

"""P-Tuning v2: learned keys and values in front of every layer's attention, for every family.

Sources: Liu et al. 2021, "P-Tuning v2" (arXiv 2110.07602); Li and Liang 2021, "Prefix-Tuning" (2101.00190), for the projection; the published
prefix encoder of ChatGLM-6B, 2 and 3, whose names and shapes are kept. As published: keys of the prefix are not rotated, every token sees
the whole prefix, and the positions of real tokens start at 0.

The prefix comes in through transformers' attention interface. Each forward hands one `Given` down to the layers, in their keyword arguments:
so a layer that gradient checkpointing computes again finds the prefix of its own forward. Caches hold real tokens only.

Letters: p virtual tokens, L layers, h heads of keys and values, d width of a head, B rows, Q queries, K keys.
"""

import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .errors import UserError
from .layers import RowNoise

PUBLISHED = "transformer.prefix_encoder."  # in front of every name in the published pytorch_model.bin
OURS = "prefix_encoder."  # in our adapter files, beside PEFT's `prompt_embeddings`
TAKES = {"sdpa": "prefix_sdpa", "eager": "prefix_eager"}  # a model's attention -> the same with a prefix


@dataclass(frozen=True)
class Shape:
    """Sizes of a prefix encoder. hidden, embedded: width of the projection's hidden layer and of the embedding before it; None: none."""

    num_virtual_tokens: int
    num_layers: int
    num_heads: int
    head_dim: int
    hidden: int | None = None
    embedded: int | None = None

    @property
    def columns(self) -> int:
        """Numbers per virtual token: a key and a value in each layer."""
        return 2 * self.num_layers * self.num_heads * self.head_dim

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape."""
        if self.hidden is None or self.embedded is None:
            return {"embedding.weight": (self.num_virtual_tokens, self.columns)}
        return {
            "embedding.weight": (self.num_virtual_tokens, self.embedded),
            "trans.0.weight": (self.hidden, self.embedded),
            "trans.0.bias": (self.hidden,),
            "trans.2.weight": (self.columns, self.hidden),
            "trans.2.bias": (self.columns,),
        }


class Weights(nn.Module):
    """A weight and perhaps a bias. No nn.Linear or nn.Embedding, which the precision rule would replace: a prefix is learned in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))


class Encoder(nn.Module):
    """The trainable part, fp32. Its parameters have the published names and shapes (`Shape.parameters`).

    Starts as published: embedding ~ N(0, 1), weights and biases of the projection uniform within 1 / sqrt(width of their input).
    """

    def __init__(self, shape: Shape, generator: torch.Generator, dropout: float = 0.0, noise: RowNoise | None = None):
        super().__init__()
        self.shape, self.dropout, self.noise = shape, dropout, noise
        sizes = shape.parameters()
        self.embedding = Weights(torch.randn(sizes["embedding.weight"], generator=generator))
        self.trans = nn.ModuleDict()
        for layer in ("0", "2") if shape.hidden is not None else ():
            width, inputs = sizes[f"trans.{layer}.weight"]
            weight, bias = (torch.rand(size, generator=generator) * 2 - 1 for size in ((width, inputs), (width,)))
            self.trans[layer] = Weights(weight * inputs**-0.5, bias * inputs**-0.5)
        self.enabled, self.reentrant = True, False
        self.hooks: list[Any] = []
        self.same_in_peft: bool | None = None  # found out when first saved
        self._held: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, Tensor]]] | None = None
        self._shown: Tensor | None = None

    def _columns(self, chosen: slice) -> Tensor:
        """[p, chosen columns]"""
        if not self.trans:
            return self.embedding.weight[:, chosen]
        layers: Any = self.trans
        first, last = layers["0"], layers["2"]
        with torch.autocast(self.embedding.weight.device.type, enabled=False):
            inner = F.linear(self.embedding.weight, first.weight, first.bias).tanh()
            return F.linear(inner, last.weight[chosen], last.bias[chosen])

    def forward(self) -> Tensor:
        """[p, 2L, h, d] fp32; layer i has its keys at 2i and its values at 2i + 1."""
        return self._columns(slice(None)).unflatten(-1, (-1, self.shape.num_heads, self.shape.head_dim))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [p, h, d] of one layer."""
        width = 2 * self.shape.num_heads * self.shape.head_dim
        key, value = self._columns(slice(index * width, (index + 1) * width)).unflatten(-1, (2, self.shape.num_heads, -1)).unbind(1)
        return key, value

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers. Without gradients they are kept until a parameter changes: decoding asks for them at each token."""
        if self._shown is not None:
            return _pairs(self._shown)
        if torch.is_grad_enabled():
            return _pairs(self())
        # A kept alias holds the memory, so that no other tensor can come to stand at the same address.
        if self._held is None or any(
            old.data_ptr() != new.data_ptr() or version != new._version
            for (old, version), new in zip(self._held[0], self.parameters())
        ):
            self._held = [(p.detach(), p._version) for p in self.parameters()], _pairs(self())
        return self._held[1]

    @contextmanager
    def showing(self, prefix: Tensor) -> Iterator[None]:
        """Inside, `prefix` [p, 2L, h, d] stands in the place of what the parameters make. Without gradients and in eval mode only."""
        self._shown = prefix
        try:
            yield
        finally:
            self._shown = None

    # --- hooks ----------------------------------------------------------------------------------------------------------

    def hand_in(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before each forward of the model without its head: gives its layers this forward's prefix."""
        if not self.enabled:
            return None
        _take(base.config)  # model.set_attn_implementation may have been called since
        self.reentrant = _reentrant(base)
        noise = copy.copy(self.noise) if self.training and self.dropout else None
        # In a reentrant checkpoint each layer runs its own backward: parts of one graph would be walked again and again.
        return args, {**kwargs, "learned_prefix": Given(self, None if self.reentrant else self.parts(), noise)}

    def ask_for_gradients(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the first layer: a reentrant checkpoint has gradients for what it reads only if one of its inputs wants them."""
        if not (self.enabled and self.reentrant and torch.is_grad_enabled()) or args[0].requires_grad:
            return None
        return args[0].detach().requires_grad_(True), *args[1:]


def _pairs(prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """[p, 2L, h, d] -> keys and values [p, h, d] of each layer."""
    flat = prefix.unbind(1)
    return list(zip(flat[0::2], flat[1::2]))


def _reentrant(base: nn.Module) -> bool:
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing and m.training]
    calls: list[Any] = [layer._gradient_checkpointing_func for layer in layers]
    return any(not isinstance(call, functools.partial) or call.keywords.get("use_reentrant", True) for call in calls)


@dataclass
class Given:
    """The prefix of one forward, as its layers ask for it. noise: as it stood at that forward."""

    encoder: Encoder
    parts: list[tuple[Tensor, Tensor]] | None
    noise: RowNoise | None

    def of(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, h, p, d] for an attention layer whose own are key, value [B, h, K, d]."""
        index = module.layer_idx
        pair = torch.stack(self.encoder.layer(index) if self.parts is None else self.parts[index])
        pair = pair.transpose(1, 2).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
        if self.noise is not None:
            pair = pair * self._kept(self.noise, index, pair)
        return pair[0].to(key), pair[1].to(value)

    def _kept(self, noise: RowNoise, layer: int, pair: Tensor) -> Tensor:
        """Inverted dropout of pair [2, B, h, p, d]: 0 or 1 / (1 - rate). Rows that no span names are kept whole; as the prefix stands before
        the row, where a span starts and stops does not matter."""
        scale, rate = torch.ones_like(pair), self.encoder.dropout
        for row, index, _, _ in noise.spans:
            kept = noise.uniform(row, f"prefix/{layer}", tuple(pair[:, 0].shape)) >= rate
            scale[:, 0 if index is None else index] = kept.to(pair) / (1 - rate)
        return scale


class _Probe(Given):
    """Gives nothing and notes who asks: layer -> shapes [h, d] of its keys and values."""

    def __init__(self) -> None:
        self.asked: dict[int, list[tuple[int, int]]] = {}

    def of(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        _eager_of(module)  # must be there: attention may be switched later
        self.asked[module.layer_idx] = [(x.shape[1], x.shape[3]) for x in (key, value)]
        return key[:, :, :0], value[:, :, :0]


class _Listener(_Probe):
    """Gives nothing and keeps what it hears: layer -> its keys and values [h, K, d]."""

    def __init__(self) -> None:
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.heard[module.layer_idx] = (key[0], value[0])
        return key[:, :, :0], value[:, :, :0]


# --- attention with a prefix --------------------------------------------------------------------------------------------


def _eager_of(module: nn.Module) -> Any:
    """The eager attention of a layer's family: the interface knows none by name, each model file has its own."""
    found = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    if found is None:
        raise UserError(
            f"{type(module).__name__} does not use transformers' attention interface, so that no prefix can be put before its keys"
        )
    return found


def _attention(underlying: str) -> Any:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        given = kwargs.pop("learned_prefix", None)
        if given is None:
            raise UserError(
                f"{type(module).__name__} was called without its prefix: either this model does not hand keyword arguments down to its "
                "attention, then it takes no prefix (use method=lora), or a part of it was called alone (use prefix.disabled)"
            )
        front = given.of(module, key, value)
        p = front[0].shape[2]
        if attention_mask is None and underlying == "sdpa" and query.shape[2] > 1:
            causal = kwargs.get("is_causal")
            if module.is_causal if causal is None else causal:  # what sdpa would have done by itself
                attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (p, 0), value=attention_mask.dtype == torch.bool)
        key, value = (torch.cat(both, 2) for both in zip(front, (key, value)))
        inner = ALL_ATTENTION_FUNCTIONS.get_interface(underlying, _eager_of(module))
        return inner(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _mask(underlying: str) -> Any:
    def make(*args: Any, q_length: int, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        """As without a prefix, but always written out: sdpa's own causal mask would start at the prefix."""
        skip = allow_is_causal_skip and q_length == 1
        return ALL_MASK_ATTENTION_FUNCTIONS[underlying](*args, q_length=q_length, allow_is_causal_skip=skip, **kwargs)

    return make


for _name, _taken in TAKES.items():
    AttentionInterface.register(_taken, _attention(_name))
    AttentionMaskInterface.register(_taken, _mask(_name))


def _take(config: Any) -> None:
    """Puts our attention in the place of the model's."""
    name = config._attn_implementation or "eager"
    if name in TAKES.values():
        return
    if name not in TAKES:
        raise UserError(f"attention '{name}' takes no prefix; load the model with attn_implementation='sdpa' or 'eager'")
    config._attn_implementation = TAKES[name]


def _give_back(config: Any) -> None:
    config._attn_implementation = {taken: name for name, taken in TAKES.items()}.get(
        config._attn_implementation, config._attn_implementation
    )


# --- on and off ---------------------------------------------------------------------------------------------------------


def attach(
    model: Any,
    num_virtual_tokens: int,
    projection: bool = False,
    hidden: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    noise: RowNoise | None = None,
) -> Encoder:
    """Puts a new prefix before every layer of a model with a head, in place; it is trained as `model.prefix_encoder`. Freezes nothing.

    hidden: width of the projection's hidden layer; None: the model's own width, as published. noise: where dropout's masks come from; None:
    one of its own, `encoder.noise`. Raises UserError: a model whose attention takes no prefix, one that has a prefix already.
    """
    if num_virtual_tokens < 1:
        raise UserError(f"num_virtual_tokens is {num_virtual_tokens}; wanted at least 1")
    if hidden is not None and not projection:
        raise UserError(f"hidden={hidden} is the width of a projection, and projection is off; leave it out or set projection=true")
    if of(model) is not None:
        raise UserError("this model has a prefix already; take it off first (prefix.detach)")
    shape = shape_for(model, num_virtual_tokens, (hidden or model.config.get_text_config().hidden_size) if projection else None)
    return _put(model, Encoder(shape, torch.Generator().manual_seed(seed), dropout, noise or RowNoise(seed)))


@torch.no_grad()
def start_from_words(model: Any, ids: list[int]) -> bool:
    """Gives the attached prefix the model's own keys and values of its first p ids, each as it stands at position 0, where nothing is
    rotated: a start that the model understands (Li and Liang 2021, section 7.4). False with a projection, which cannot be set so."""
    encoder, base = _on(model), model.get_decoder()
    if encoder.trans:
        return False
    p = encoder.shape.num_virtual_tokens
    ids = (ids * (p // len(ids) + 1))[:p]
    tokens = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    positions = torch.zeros_like(tokens)
    if model.config.model_type == "chatglm1" and model.config.position_encoding_2d:
        positions = torch.stack([positions, positions], 1)
    listener, training, encoder.enabled = _Listener(), model.training, False
    model.eval()
    try:
        # With a cache: without one equal positions are taken for rows of their own.
        base(input_ids=tokens, position_ids=positions, use_cache=True, learned_prefix=listener)
    finally:
        encoder.enabled = True
        model.train(training)
    pairs = [
        tensor.transpose(0, 1).float() for index in sorted(listener.heard) for tensor in listener.heard[index]
    ]  # [p, h, d] each
    encoder.embedding.weight.copy_(torch.stack(pairs, 1).flatten(1))
    return True


def shape_for(model: Any, num_virtual_tokens: int, hidden: int | None) -> Shape:
    """Sizes for a model, by asking each of its layers. hidden None: no projection. Raises UserError as `attach`."""
    config, kind = model.config.get_text_config(), type(model).__name__
    asked = _ask(model)
    silent = [i for i in range(config.num_hidden_layers) if i not in asked]
    if silent:
        raise UserError(
            f"{kind} takes no prefix: its layers {silent[:8]} do not compute attention through transformers' attention interface; "
            "use method=lora"
        )
    shapes = {shape for pair in asked.values() for shape in pair}
    if len(shapes) > 1:
        raise UserError(f"{kind} takes no prefix: its keys and values differ in heads and width, {sorted(shapes)}; use method=lora")
    heads, width = shapes.pop()
    shape = Shape(num_virtual_tokens, config.num_hidden_layers, heads, width)
    if hidden is None:
        return shape
    # Published: ChatGLM-6B embeds in the width of its projection, ChatGLM2 and 3 in that of what comes out.
    embedded = hidden if config.model_type == "chatglm1" else shape.columns
    return Shape(num_virtual_tokens, config.num_hidden_layers, heads, width, hidden, embedded)


@torch.no_grad()
def _ask(model: Any) -> dict[int, list[tuple[int, int]]]:
    base, probe, training = model.get_decoder(), _Probe(), model.training
    model.eval()
    _take(base.config)
    try:
        base(
            input_ids=_sample(model), use_cache=True, learned_prefix=probe
        )  # without a cache transformers reads positions: not on meta
    except (TypeError, KeyError) as error:
        raise UserError(f"{type(model).__name__} takes no prefix: {error}; use method=lora") from None
    finally:
        _give_back(base.config)
        model.train(training)
    return probe.asked


def _sample(model: Any) -> Tensor:
    """A few ids [1, n] that every model reads."""
    marks = [getattr(model.config, name, None) for name in ("gmask_token_id", "bos_token_id")]  # ChatGLM-6B reads nothing without
    weight = model.get_input_embeddings().weight
    ids = torch.tensor([[*(mark for mark in marks if isinstance(mark, int)), 4, 9, 16, 25]], device=weight.device)
    return ids % weight.shape[0]


def _put(model: Any, encoder: Encoder) -> Encoder:
    base = model.get_decoder()
    model.prefix_encoder = encoder.to(model.get_input_embeddings().weight.device).train(model.training)
    encoder.hooks = [base.register_forward_pre_hook(encoder.hand_in, with_kwargs=True)]
    for layer in [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)][:1]:
        encoder.hooks.append(layer.register_forward_pre_hook(encoder.ask_for_gradients))
    _take(base.config)
    return encoder


def of(model: nn.Module) -> Encoder | None:
    found = dict(model.named_children()).get("prefix_encoder")
    return found if isinstance(found, Encoder) else None


def _on(model: nn.Module) -> Encoder:
    encoder = of(model)
    if encoder is None:
        raise UserError("this model has no prefix (prefix.attach puts one on)")
    return encoder


def detach(model: Any) -> None:
    """Takes the prefix off: the model computes what it did before it had one."""
    encoder = _on(model)
    for hook in encoder.hooks:
        hook.remove()
    del model.prefix_encoder
    _give_back(model.get_decoder().config)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """The model without its prefix, inside. A model that has none is left alone."""
    encoder = of(model)
    if encoder is None or not encoder.enabled:
        yield
        return
    encoder.enabled = False
    _give_back(model.get_decoder().config)
    try:
        yield
    finally:
        encoder.enabled = True
        _take(model.get_decoder().config)


# --- files: PEFT --------------------------------------------------------------------------------------------------------


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """What goes into adapter_model.safetensors, fp32 on the CPU.

    `prompt_embeddings` [p, 2L h d] is what plain PEFT reads; it is left out where PEFT would compute something else with it (see
    `plain_peft`). PEFT counts positions from p on, so keys are rotated by p: R(n + p) q . R(p) k = R(n) q . k. Beside it, under names that
    PEFT passes over, are the trained parameters themselves, so that they come back bit for bit.
    """
    encoder = _on(model)
    found = {OURS + name: p.detach().cpu().clone() for name, p in encoder.named_parameters()}
    with torch.no_grad():
        turned = _turned(model, encoder(), encoder.shape.num_virtual_tokens)
    if turned is not None and _same_in_peft(model):
        found["prompt_embeddings"] = turned.flatten(1).cpu().contiguous()
    return found


def peft_config(model: Any, base: str) -> dict[str, Any]:
    """adapter_config.json. base: what plain PEFT should open."""
    shape, reason = _on(model).shape, plain_peft(model)
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": shape.num_virtual_tokens,
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "token_dim": shape.num_heads * shape.head_dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": shape.hidden,
        "prefix_projection": False,  # what is saved is what comes out of the projection
        "glmtune": {"projection": shape.hidden is not None, "plain_peft": reason is None} | ({"why": reason} if reason else {}),
    }


def plain_peft(model: Any) -> str | None:
    """Why plain PEFT would not compute the same with a saved prefix at every length; None: it does."""
    config, p = model.config.get_text_config(), _on(model).shape.num_virtual_tokens
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if getattr(config, "sliding_window", None) else [])
    if any(kind in ("sliding_attention", "chunked_attention") for kind in kinds):
        return "PEFT keeps the prefix among the tokens, and this model's sliding window moves past it"
    if any(kind in ("dynamic", "longrope") for kind in _rope_types(config)):
        limit = config.max_position_embeddings - p
        return f"PEFT counts positions from {p} on, and rotary frequencies of this model change with length: the same only up to {limit} tokens"
    if not _same_in_peft(model):
        return f"PEFT counts positions from {p} on, and in this model a prefix cannot be turned by as much"
    return None


def _rope_types(config: Any) -> set[str]:
    settings = getattr(config, "rope_parameters", None) or {}
    return {each["rope_type"] for each in (settings, *settings.values()) if isinstance(each, dict) and "rope_type" in each}


def _turned(model: Any, prefix: Tensor, by: int) -> Tensor | None:
    """prefix [p, 2L, h, d] with its keys rotated by `by` positions (backwards if negative), by the model's own rotary functions; unchanged
    where a model has none, None where they cannot be asked."""
    base = model.get_decoder()
    rotary = dict(base.named_children()).get("rotary_emb")
    attention = next((m for m in base.modules() if type(m).__name__.endswith("Attention")), None)
    apply = vars(sys.modules[type(attention).__module__]).get("apply_rotary_pos_emb")
    if rotary is None or apply is None:
        return prefix
    keys = prefix[:, 0::2].permute(1, 2, 0, 3)  # [L, h, p, d]
    position = torch.full((1, prefix.shape[0]), abs(by), device=prefix.device)
    try:
        cos, sin = rotary(keys.float(), position)
    except TypeError:  # rotates layers by their kind
        return None
    factor = (cos * cos + sin * sin).sqrt()  # yarn makes queries and keys longer by it; a prefix is as long as it is
    cos, sin = cos / factor, (sin if by > 0 else -sin) / factor
    try:
        turned = apply(keys, keys, cos, sin)[1]
    except RuntimeError:  # rotates a part of each head, which its attention cuts off before
        part = keys[..., : cos.shape[-1]]
        turned = torch.cat([apply(part, part, cos, sin)[1], keys[..., cos.shape[-1] :]], -1)
    both = torch.stack([turned.permute(2, 0, 1, 3), prefix[:, 1::2]], 2)
    return both.flatten(1, 2)


@torch.no_grad()
def _same_in_peft(model: Any) -> bool:
    """Whether the rotated prefix in a cache, with positions after it, computes the same: PEFT's way, tried on a few tokens."""
    encoder = _on(model)
    if encoder.same_in_peft is None:
        turned = _turned(model, encoder(), encoder.shape.num_virtual_tokens)
        encoder.same_in_peft = turned is not None and _agrees(model, turned)
    return encoder.same_in_peft


@torch.no_grad()
def _agrees(model: Any, cached: Tensor) -> bool:
    """Whether the attached prefix and `cached` [p, 2L, h, d] in a cache give the same logits, measured by what the prefix changes at all."""
    ids, training = _sample(model), model.training
    model.eval()
    kind = model.get_input_embeddings().weight.dtype
    pairs = [(k.transpose(0, 1)[None].to(kind), v.transpose(0, 1)[None].to(kind)) for k, v in _pairs(cached)]
    try:
        ours = model(input_ids=ids, use_cache=False).logits.float()
        with disabled(model):
            without = model(input_ids=ids, use_cache=False).logits.float()
            wide = torch.ones(1, len(cached) + ids.shape[1], dtype=torch.long, device=ids.device)
            theirs = model(input_ids=ids, attention_mask=wide, past_key_values=DynamicCache(pairs), use_cache=True).logits.float()
    finally:
        model.train(training)
    exact = kind == torch.float32
    allowed = (1e-3 if exact else 0.1) * (ours - without).abs().max() + (1e-5 if exact else 1e-2) * ours.abs().max()
    return bool((ours - theirs).abs().max() <= allowed)


def check(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    """Raises UserError for an adapter folder's prefix that does not make sense by itself."""
    known = {"prompt_embeddings", OURS + "embedding.weight"}
    foreign = [name for name in tensors if name not in known and not name.startswith(OURS + "trans.")]
    sizes = {len(tensor) for name, tensor in tensors.items() if name in known}
    said = config.get("num_virtual_tokens")
    if foreign or not sizes:
        raise UserError(f"{folder}: this is no prefix: {foreign[0] if foreign else 'it'} is none of {', '.join(sorted(known))}")
    if sizes != {said} or 0 in sizes:
        raise UserError(
            f"{folder}: its prefix has {', '.join(map(str, sorted(sizes)))} virtual tokens, its adapter_config.json says {said!r}; files of "
            "different adapters, or a damaged one: copy the folder again"
        )


def from_peft(model: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> Encoder:
    """Puts a saved prefix on a model: ours, with its trained parameters as they were, or one that plain PEFT trained. One that the model
    has already, of the same sizes, takes its values and goes on as it was set up. config: adapter_config.json, for the name of the base.

    Raises UserError: another model's, or one that cannot be turned back to positions from 0.
    """
    ours = {name.removeprefix(OURS): tensor for name, tensor in tensors.items() if name.startswith(OURS)}
    base = config.get("base_model_name_or_path")
    if ours:
        return _filled(model, ours, base)
    flat = tensors.get("prompt_embeddings")
    if flat is None:
        raise UserError(
            f"this is no prefix: it needs a tensor prompt_embeddings or {OURS}embedding.weight; there: {sorted(tensors)[:4]}"
        )
    had = of(model) is not None
    encoder = _filled(model, {"embedding.weight": flat}, base)
    shape = encoder.shape
    rotated = flat.to(encoder.embedding.weight).unflatten(-1, (-1, shape.num_heads, shape.head_dim))
    turned = _turned(model, rotated, -shape.num_virtual_tokens)
    if turned is not None:
        with torch.no_grad():
            encoder.embedding.weight.copy_(turned.flatten(1))
    if turned is None or not _agrees(model, rotated):
        if not had:
            detach(model)
        raise UserError(
            "this prefix was trained by plain PEFT, which counts positions from the number of virtual tokens on; in this model its keys "
            "cannot be turned back to positions from 0. Use it with PEFT"
        )
    return encoder


# --- files: published ---------------------------------------------------------------------------------------------------


def published_tensors(model: Any) -> dict[str, Tensor]:
    """As in the pytorch_model.bin of the published P-Tuning scripts: `transformer.prefix_encoder.*`, fp32, on the CPU."""
    encoder = _on(model)
    width = model.config.get_text_config().hidden_size
    if encoder.shape.hidden not in (None, width):
        raise UserError(
            f"the published code has no option for the width of the projection: it is the model's own, {width}; this one has {encoder.shape.hidden}"
        )
    return {PUBLISHED + name: p.detach().cpu().clone() for name, p in encoder.named_parameters()}


def from_published(model: Any, tensors: dict[str, Tensor]) -> Encoder:
    """Puts a published prefix on a model, as `from_peft`. Raises UserError: tensors that are no prefix, or another model's."""
    other = [name for name in tensors if not name.startswith(PUBLISHED)]
    if other or not tensors:
        raise UserError(f"this is no published prefix: its tensors should all begin with {PUBLISHED}; there: {sorted(other)[:4]}")
    return _filled(model, {name.removeprefix(PUBLISHED): tensor for name, tensor in tensors.items()})


def _filled(model: Any, tensors: dict[str, Tensor], base: str | None = None) -> Encoder:
    """The encoder on the model, or a new one of the sizes that follow from the tensors, with these parameters. All that does not fit is
    listed."""
    embedding, first = tensors.get("embedding.weight"), tensors.get("trans.0.weight")
    if embedding is None or embedding.ndim != 2 or (first is not None and first.ndim != 2):
        raise UserError(f"this is no prefix: it needs embedding.weight [virtual tokens, width]; there: {_shapes(tensors)}")
    there = of(model)
    shape = shape_for(model, len(embedding), None if first is None else len(first)) if there is None else there.shape
    sizes = shape.parameters()
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != sizes:
        raise UserError(
            f"this prefix was made for {'another model' if there is None else 'other options'}{f' ({base})' if base else ''}. "
            f"It has {_shapes(tensors)}; "
            f"wanted here: {', '.join(f'{name} {list(size)}' for name, size in sizes.items())}"
        )
    encoder = there or Encoder(shape, torch.Generator())
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(tensors[name])
    return encoder if there is not None else _put(model, encoder)


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"

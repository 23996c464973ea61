"""ChatGLM-6B as a native transformers model: GLM's prefix-LM with two rotary coordinates and DeepNorm residuals.

Sources: GLM (arXiv 2103.10360) for the prefix-LM mask and the 2-D positions, GLM-130B (arXiv 2210.02414) for DeepNorm and rotary,
the model card THUDM/chatglm-6b. Names of parameters are those of the published checkpoint. What the published code does and no paper
tells is marked "published".

A row is `prompt [gMASK] <sop> answer <eop>`. Its context, the columns before the first <sop>, is seen by every token; the rest is causal.

Letters: b rows, s tokens of this call, P positions that the cache already holds (a learned prefix, or earlier tokens), k = P + s columns
(more in a static cache), h heads, d width of a head, n rotary coordinates (2, or 1 without position_encoding_2d).
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..errors import UserError

logger = logging.get_logger(__name__)
# DeepNorm's (2 N)^(1/2), GLM-130B section 2.1, with N = 28 whatever the config says: published (its layers never hear of N).
ALPHA = (2 * 28) ** 0.5
# Added to hidden scores: far below every real one, and finite in fp16 too (under autocast), so that a row that sees nothing is no NaN.
HIDDEN = torch.finfo(torch.float16).min / 2


@strict
class ChatGLM1Config(PreTrainedConfig):
    """Defaults are the 6B model's. Token ids differ between its revisions: they always come from here."""

    model_type = "chatglm1"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 130528
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 130004  # <sop>: the answer starts
    eos_token_id: int | list[int] | None = 130005  # <eop>
    pad_token_id: int | None = 3
    mask_token_id: int = 130000  # [MASK]
    gmask_token_id: int = 130001  # [gMASK]


# --- layers -------------------------------------------------------------------------------------------------------------


def rotary_angles(position_ids: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [b, 1, s, n, d/n], always fp32, of position_ids [b, n, s].

    Inverse frequencies are rounded to fp16: published. They are no buffer, so that no `.half()` and no meta device reaches them;
    in bf16 positions above 256 would collide.
    """
    width = head_dim // position_ids.shape[1]
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    inv_freq = (1.0 / 10000**exponent).half().float()
    angles = position_ids.float().transpose(1, 2).unsqueeze(-1) * inv_freq
    angles = torch.cat([angles, angles], -1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [b, h, s, d], its n equal parts each by their own coordinate, in fp32."""
    parts = x.float().unflatten(-1, (cos.shape[-2], -1))
    first, second = parts.chunk(2, -1)
    return (parts * cos + torch.cat([-second, first], -1) * sin).flatten(-2).to(x.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling + mask) v; query, key, value [b, h, s or k, d] -> [b, s, h, d], weights [b, h, s, k]. Softmax in fp32."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ChatGLM1Attention(nn.Module):
    def __init__(self, config: ChatGLM1Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False  # the mask says everything; no mask means that everything is seen
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        held: tuple[Tensor, Tensor] | None,
        angles: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Rows of the fused projection are [q | k | v] head by head.
        fused = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = fused.chunk(3, -1)
        query, key = rotate(query, *angles), rotate(key, *angles)
        if held is not None:
            key, value = (torch.cat([old.to(new.dtype), new], -2) for old, new in zip(held, (key, value)))
        elif past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # Published scores are divided by the layer's number and multiplied by it again (fp16 range): it cancels.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention_forward)
        if attention_mask is not None:
            attention_mask = attention_mask.to(query.dtype)  # autocast and mixed precision change the dtype within the model
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.dense(out.flatten(-2)), weights


class ChatGLM1MLP(nn.Module):
    def __init__(self, config: ChatGLM1Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class ChatGLM1Layer(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM1Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGLM1Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGLM1MLP(config)

    def forward(self, hidden_states: Tensor, held_key: Tensor | None, held_value: Tensor | None, **kwargs: Any) -> Tensor:
        """hidden_states [b, s, hidden] -> the same. held_key, held_value [b, h, P, d]: read, never added to. They are positional
        because a reentrant checkpoint passes gradients to positional tensors only."""
        held = None if held_key is None or held_value is None else (held_key, held_value)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(normed, held, **kwargs)
        normed = self.post_attention_layernorm(ALPHA * normed + attended)  # the residual is the normed input
        return ALPHA * normed + self.mlp(normed)


# --- where each token stands, and what it sees --------------------------------------------------------------------------


class ChatGLM1PreTrainedModel(PreTrainedModel):
    config: ChatGLM1Config
    config_class = ChatGLM1Config
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM1Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012
    _supports_sdpa = True  # flash and flex kernels know no such mask
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLM1Layer, "attentions": ChatGLM1Attention}  # noqa: RUF012

    def make_position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Positions [b, 2, s] ([b, s] without position_encoding_2d) of whole rows so far: input_ids [b, s]; attention_mask [b, >= s],
        1 = a token, 0 = padding; columns in front of the s last ones belong to a learned prefix.

        While decoding, the last n columns are the positions of the last n tokens. Raises UserError for a row without <sop>.
        """
        keep = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        return self._layout(input_ids, keep)[0]

    def _layout(self, input_ids: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """(positions as in make_position_ids, context [b, s] bool) of whole rows.

        keep [b, s] bool or None. Published, twice: the tokenizer, which knows the padding, prefers [MASK] to [gMASK] for the place
        of the answer; the model, which is given nothing, prefers [gMASK] and counts left pads as context.
        """
        if input_ids is None:
            raise UserError(
                "inputs_embeds do not tell where <sop> is; pass position_ids=model.make_position_ids(input_ids, attention_mask)"
            )
        config = self.config
        prefer = (config.gmask_token_id, config.mask_token_id)
        if keep is None:
            keep = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            prefer = prefer[::-1]
        rank = keep.cumsum(-1) - 1  # place in the row without its pads
        answer = ((input_ids == config.bos_token_id) & keep).cumsum(-1) > 0
        context = keep & ~answer
        # Only the context is searched: a [MASK] that is generated must not move the positions of the row.
        marks = [context & (input_ids == token) for token in prefer]
        mark = torch.where(marks[0].any(-1, keepdim=True), marks[0], marks[1])
        self._check_rows(input_ids, keep, answer, mark)
        place = (keep & (mark.cumsum(-1) == 0)).sum(-1, keepdim=True)
        if config.position_encoding_2d:
            positions = torch.stack([torch.where(answer, place, rank), (answer & keep).cumsum(-1)], 1)
            return positions.masked_fill(~keep.unsqueeze(1), 0), context
        fixed = answer & (mark & (input_ids == config.mask_token_id)).any(-1, keepdim=True)  # published: only for [MASK]
        return torch.where(fixed, place, rank).masked_fill(~keep, 0), context

    def _check_rows(self, input_ids: Tensor, keep: Tensor, answer: Tensor, mark: Tensor) -> None:
        if torch.compiler.is_compiling() or input_ids.is_meta:
            return
        config = self.config
        wrong = keep.any(-1) & ~(answer.any(-1) & mark.any(-1))
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            lacks = f"<sop> (id {config.bos_token_id})"
            if bool(answer[row].any()):
                lacks = f"[gMASK] (id {config.gmask_token_id}) or [MASK] (id {config.mask_token_id}) before <sop>"
            raise UserError(
                f"row {row} of input_ids holds no {lacks}; ChatGLM-6B reads `prompt [gMASK] <sop> answer` and takes positions and mask from it.\n"
                "End the prompt with the tokenizer's special tokens; for tokens after a cache pass "
                "position_ids=model.make_position_ids(all_ids_so_far, attention_mask)[..., -num_new:]"
            )

    def _context(self, position_ids: Tensor, input_ids: Tensor | None, past: int) -> Tensor:
        """context [b, s] bool of tokens whose positions are given: the block position is 0 up to <sop>."""
        if position_ids.ndim == 3:
            return (position_ids[:, 1] > 0).cumsum(-1) == 0
        if input_ids is None:
            raise UserError("with inputs_embeds and one position coordinate nothing tells the context; pass a 4-D attention_mask")
        answer = (input_ids == self.config.bos_token_id).cumsum(-1) > 0
        if past == 0:
            self._check_rows(input_ids, torch.ones_like(answer), answer, torch.ones_like(answer))
        return answer[:, -1:] & ~answer  # after a cache a row without <sop> is decoding

    def _mask(self, context: Tensor, keep: Tensor | None, past: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [b, 1, s, k] from context [b, s] and keep [b, P + s]; None: all is seen."""
        num_new = context.shape[1]
        if num_new == 1 and keep is None and columns == past + 1:
            return None
        column = torch.arange(columns, device=context.device)
        row = torch.arange(past, past + num_new, device=context.device)
        behind = (past, columns - past - num_new)
        visible = (column <= row.unsqueeze(-1)) | nn.functional.pad(context, behind).unsqueeze(1)
        if keep is not None:
            visible = visible & nn.functional.pad(keep, (0, columns - keep.shape[1])).unsqueeze(1)
        return (~visible.unsqueeze(1) * HIDDEN).to(dtype)


def _held(cache: Any, past: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [b, h, P, d] of each layer, to be read only: gradient checkpointing takes the cache itself away from a layer,
    and with it a learned prefix."""
    return [(layer.keys[:, :, :past], layer.values[:, :, :past]) for layer in cache.layers]


# --- models -------------------------------------------------------------------------------------------------------------


class ChatGLM1Model(ChatGLM1PreTrainedModel):
    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLM1Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [b, s] -> last_hidden_state [b, s, hidden], after the final norm.

        attention_mask: None, [b, s] or [b, P + s] (1 = a token), [b, 1, s, k] bool (True = hidden: published) or float (additive).
        position_ids: None or as make_position_ids gives them. past_key_values may hold a learned prefix (keys not rotated): every
        token sees it, and positions start at 0 all the same. With use_cache=False it is read and left as it is. The context comes in
        one call: cut in two, its first part could not see the second.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_states: Tensor = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        position_ids, mask = self._see(
            input_ids, hidden_states, attention_mask, position_ids, past_key_values if use_cache else None, past
        )
        coordinates = position_ids if position_ids.ndim == 3 else position_ids.unsqueeze(1)
        angles = rotary_angles(coordinates, self.config.hidden_size // self.config.num_attention_heads)
        cache = past_key_values if use_cache else None
        held = _held(past_key_values, past) if past and not use_cache else [(None, None)] * len(self.layers)
        for layer, (held_key, held_value) in zip(self.layers, held):
            hidden_states = layer(
                hidden_states, held_key, held_value, angles=angles, attention_mask=mask, past_key_values=cache, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values)

    def _see(
        self,
        input_ids: Tensor | None,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past: int,
    ) -> tuple[Tensor, Tensor | None]:
        """(position_ids, additive mask): what was given, and the rest made from it."""
        num_new, dtype = embeds.shape[1], embeds.dtype
        columns = past + num_new if cache is None else cache.get_mask_sizes(num_new, 0)[0]
        if position_ids is not None and position_ids.ndim != 2 + self.config.position_encoding_2d:
            wanted = "[b, 2, s]" if self.config.position_encoding_2d else "[b, s]"
            raise UserError(
                f"position_ids is {list(position_ids.shape)}; wanted {wanted}: leave it out, or use model.make_position_ids"
            )
        if attention_mask is not None and attention_mask.ndim == 4:
            if position_ids is None:
                position_ids, _ = self._layout(input_ids, None)
            if not attention_mask.is_floating_point():
                attention_mask = attention_mask.bool() * HIDDEN
            front = max(0, past + num_new - attention_mask.shape[-1])  # a learned prefix that the mask does not speak of: seen
            mask = nn.functional.pad(attention_mask.clamp(min=HIDDEN), (front, 0))
            return position_ids, nn.functional.pad(mask, (0, columns - mask.shape[-1]), value=HIDDEN).to(dtype)
        keep = None
        if attention_mask is not None:
            if attention_mask.ndim != 2 or not num_new <= attention_mask.shape[1] <= past + num_new:
                raise UserError(
                    f"attention_mask is {list(attention_mask.shape)}; wanted {num_new} columns for the new tokens, up to {past + num_new} with "
                    "those that the cache holds"
                )
            # Columns that it does not speak of are a learned prefix.
            keep = nn.functional.pad(attention_mask.bool(), (past + num_new - attention_mask.shape[1], 0), value=True)
        if position_ids is None:
            position_ids, context = self._layout(input_ids, None if keep is None else keep[:, past:])
        else:
            context = self._context(position_ids, input_ids, past)
        return position_ids, self._mask(context, keep, past, columns, dtype)


class ChatGLM1ForCausalLM(ChatGLM1PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLM1Config):
        super().__init__(config)
        self.transformer = ChatGLM1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        coordinates: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ChatGLM1Model.forward, with logits [b, s, vocab] and, given labels [b, s] (-100 = not learned), the mean loss in fp32.

        logits_to_keep: the last so many positions (0 = all), or the positions' indices. coordinates: position_ids from generate();
        they go before those of that name, which PEFT would let start behind a learned prefix.
        """
        place = position_ids if coordinates is None else coordinates
        out = self.transformer(input_ids, attention_mask, place, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    # transformers' generate lets every coordinate of position_ids grow by one per token and takes [b, 2, s] for [coordinate, b, s] when
    # it copies rows for beams. So none are kept between its steps: they are made anew from all ids so far.

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        return None

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, position_ids=None, **kwargs):
        """Given a learned prefix, generate() wants an attention_mask of P + s columns: it takes a cache beside a mask as wide as the ids
        for the beginning of these ids."""
        if position_ids is not None:
            logger.warning_once(
                "ChatGLM-6B: generate() makes position_ids itself, from the ids and the attention_mask; those given are not used"
            )
        if inputs_embeds is not None and input_ids.shape[1] < inputs_embeds.shape[1]:
            raise UserError("inputs_embeds do not tell where <sop> is; pass generate() the input_ids that they stand for as well")
        # generate drops a mask of ones; rows must stand as they would in a padded batch.
        known = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=self.make_position_ids(input_ids, known),
            **kwargs,
        )
        return {**inputs, "coordinates": inputs["position_ids"]}

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The 2-D mask as it is: transformers' own would be causal over the context."""
        return attention_mask

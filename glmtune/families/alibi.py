"""Baichuan-13B and Baichuan2-13B: Llama's layers with ALiBi in place of rotary positions.

Source: Press et al. 2022, "Train Short, Test Long" (the slopes as in its reference code and in BLOOM), and the published
modeling_baichuan.py. Only the attention mask and the positions differ from transformers' Llama, so only those are here: parameters
are named as in Llama, and LoRA, merging and saving need nothing of their own.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask


class AlibiConfig(LlamaConfig):
    model_type = "llama_alibi"


def slopes(num_heads: int) -> list[float]:
    """Slope of every head: 2^(-8k/n) for k = 1..n if n is a power of two; else those of the next smaller power of two, then every
    second one of the next larger (Press et al. 2022, section 3 and their code)."""
    power = 2 ** int(math.log2(num_heads))
    first = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    return first + [2 ** (-4 * k / power) for k in range(1, 2 * (num_heads - power), 2)]


class NoRotary(nn.Module):
    """cos 1, sin 0: queries and keys stay as they are."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        one = x.new_ones(1, 1, 1)
        return one, torch.zeros_like(one)


class AlibiModel(LlamaModel):
    config_class = AlibiConfig
    _supports_flash_attn = _supports_flex_attn = False  # the bias travels in the mask, which these do not take

    def __init__(self, config: Any):
        super().__init__(config)
        self.rotary_emb = NoRotary()
        self.additive = copy.copy(config)  # transformers' maker of masks gives whole float masks for eager attention only
        self.additive._attn_implementation = "eager"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LlamaModel's. position_ids only tell packed sequences apart (they begin anew); what a bias needs is distances."""
        if inputs_embeds is None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None
        assert inputs_embeds is not None
        mask = create_causal_mask(self.additive, inputs_embeds, attention_mask, past_key_values, position_ids)
        assert isinstance(mask, Tensor)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return super().forward(
            attention_mask=biased(mask, self.config.num_attention_heads, seen, inputs_embeds.dtype),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


def biased(mask: Tensor, num_heads: int, seen: int, dtype: torch.dtype) -> Tensor:
    """mask [B, 1, Q, K] (bool: True is visible; float: 0 is visible) with ALiBi's bias slope * (key - query): [B, heads, Q, K].

    Distances, not key positions as published: the softmax is the same, and in half precision near keys stay exact.
    """
    queries = torch.arange(mask.shape[-2], device=mask.device) + seen
    distance = torch.arange(mask.shape[-1], device=mask.device) - queries.unsqueeze(-1)
    bias = torch.tensor(slopes(num_heads), device=mask.device).view(-1, 1, 1) * distance
    hidden = ~mask if mask.dtype == torch.bool else mask < 0
    return bias.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)


class AlibiForCausalLM(LlamaForCausalLM):
    config_class = AlibiConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: Any):
        super(LlamaForCausalLM, self).__init__(config)  # Llama's own would make a rotary model first
        self.model = AlibiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

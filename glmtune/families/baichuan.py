"""Baichuan-7B and -13B, Baichuan2-7B and -13B as published (model_type baichuan).

The 7B models compute what Llama computes, the 13B ones have ALiBi (`alibi.py`). Facts: baichuan-inc/Baichuan-7B models/ (rows of W_pack:
q, k, v), modeling_baichuan.py of Baichuan-13B and Baichuan2 (ALiBi, NormHead), generation_utils.py (build_chat_input) and
baichuan-inc/Baichuan2 fine-tune/fine-tune.py (the same marks; an inner answer's label is `</s>`, though the next question's mark follows).
"""

from pathlib import Path
from typing import Any

from ..errors import UserError
from .family import Family, Take, Vocabulary, about_generation, about_tokenizer, called, places
from .llama import REFUSE, native_config, vocabulary

USER, ASSISTANT = 195, 196  # generation_config.json: user_token_id, assistant_token_id
MARKS = {"Baichuan": ("<reserved_102>", "<reserved_103>"), "Baichuan2": ("<reserved_106>", "<reserved_107>")}  # their names


def chat_format(user: str, assistant: str) -> str:
    """build_chat_input: the system prompt without a mark, each turn behind its role's mark, no bos, nothing between the turns.
    An inner answer ends at the next question's mark, the last one with eos."""
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
        f"{{% elif message['role'] == 'user' %}}{{{{ '{user}' ~ message['content'] }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ '{assistant}' ~ message['content'] }}}}"
        f"{REFUSE}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
    )


BAICHUAN, BAICHUAN2 = chat_format(*MARKS["Baichuan"]), chat_format(*MARKS["Baichuan2"])


def read(folder: Path, config: dict[str, Any]) -> Family:
    """Raises UserError for a config that lacks sizes, or Baichuan-M1 and others that only share the name."""
    for key in ("num_key_value_heads", "conv_window", "sliding_window"):
        if key in config and config[key] not in (None, config.get("num_attention_heads")):
            raise UserError(f"{folder / 'config.json'}: {key} is {config[key]}; only Baichuan and Baichuan2 (7B, 13B) can be read")
    series = _series(folder, config)
    rotary = _rotary(config)
    native = native_config(
        folder,
        config,
        max_position_embeddings=config.get("max_position_embeddings") or config.get("model_max_length", 4096),
        attention_bias=False,
    )
    if not rotary:
        native |= {"model_type": "llama_alibi", "architectures": ["AlibiForCausalLM"]}
    width = native["hidden_size"]
    cuts = {"q": (0, width), "k": (width, 2 * width), "v": (2 * width, 3 * width)}
    fused = [Take(f"model.layers.{{}}.self_attn.{part}_proj.weight", *rows) for part, rows in cuts.items()]
    layer = "model.layers.{}."
    kept = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    same = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *(f"{layer}{name}.weight" for name in kept)]
    generation = about_generation(folder)
    chat = "user_token_id" in generation or "chat" in called(folder, config)
    return Family(
        f"{series}-{'7B' if rotary else '13B'}{'-Chat' if chat else ''}",
        native,
        places(
            {
                **{name: name for name in same},
                f"{layer}self_attn.W_pack.weight": fused,
            }
        ),
        lambda at: _vocabulary(at, series, chat),
        normalised=("lm_head.weight",) if series == "Baichuan2" else (),  # NormHead: F.normalize(weight) before the product
        settings={"temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": generation.get("repetition_penalty", 1.05)}
        if chat
        else {},
    )


def _rotary(config: dict[str, Any]) -> bool:
    """7B or 13B. The 7B configs have max_position_embeddings and the 13B ones only model_max_length, for each reads what the other's
    class does not know; the published sizes stand above that, since other programs write fields of their own."""
    sizes = (config.get("hidden_size"), config.get("num_hidden_layers"), config.get("num_attention_heads"))
    if sizes in ((4096, 32, 32), (5120, 40, 40)):
        return sizes[0] == 4096
    return "max_position_embeddings" in config or "BaiChuanForCausalLM" in (config.get("architectures") or ())


def _series(folder: Path, config: dict[str, Any]) -> str:
    """Baichuan2 has a vocabulary of 125,696 (the first has 64,000) and, in its 7B config, z_loss_weight."""
    second = config.get("vocab_size", 0) >= 125696 or "z_loss_weight" in config or "baichuan2" in called(folder, config)
    return "Baichuan2" if second else "Baichuan"


def _vocabulary(folder: Path, series: str, chat: bool) -> Vocabulary:
    generation = about_generation(folder)
    user, assistant = MARKS[series]
    marks = {user: generation.get("user_token_id", USER), assistant: generation.get("assistant_token_id", ASSISTANT)}
    if not all(type(id) is int for id in marks.values()):
        raise UserError(f"{folder / 'generation_config.json'}: user_token_id and assistant_token_id must be tokens' numbers")
    own = about_tokenizer(folder).get("chat_template")
    written = own or (chat_format(user, assistant) if chat else None)
    return vocabulary(folder, written, special=marks, bos=False, ends=[user] if written else [])

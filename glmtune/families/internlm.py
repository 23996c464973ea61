"""InternLM, InternLM2 / 2.5 and InternLM3 as published (model_type internlm, internlm2, internlm3): Llama's computation.

Facts: InternLM/InternLM tools/transformers (modeling_internlm.py, 2023), tools/convert2llama.py (the rows of wqkv), chat/chat_format.md
(ids of the marks); modeling_internlm.py and modeling_internlm2.py of the published folders (rotary, build_inputs, chat).
"""

from pathlib import Path
from typing import Any

from ..errors import UserError
from .family import Family, Take, Vocabulary, about_generation, about_tokenizer, called, places, same_names
from .llama import REFUSE, native_config, vocabulary

SYSTEM = (  # `meta_instruction` of chat() in both published model files
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文."
)
# build_inputs of the published folders since late 2023. The first weeks' code wrote <eoh> before a question's newline.
INTERNLM = (
    "{{ bos_token }}"
    f"{{% if messages[0]['role'] != 'system' %}}{{{{ '<|System|>:{SYSTEM}\n' }}}}{{% endif %}}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|System|>:' ~ message['content'] ~ '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>:' ~ message['content'] ~ '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' ~ message['content'] ~ '<eoa>\n' }}"
    f"{REFUSE}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)
INTERNLM2 = (
    "{{ bos_token }}"
    f"{{% if messages[0]['role'] != 'system' %}}{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}{{% endif %}}"
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS2 = {  # chat_format.md; the vocabulary file calls these pieces [UNUSED_TOKEN_141] ... [UNUSED_TOKEN_146]
    "<|plugin|>": 92538, "<|interpreter|>": 92539, "<|action_end|>": 92540, "<|action_start|>": 92541, "<|im_end|>": 92542, "<|im_start|>": 92543,
}  # fmt: skip


def read(folder: Path, config: dict[str, Any]) -> Family:
    """Raises UserError for settings that Llama's class cannot express (no released model has them)."""
    return {"internlm": _first, "internlm2": _second, "internlm3": _third}[config["model_type"]](folder, config)


def _first(folder: Path, config: dict[str, Any]) -> Family:
    rotary = config.get("rotary") or {"type": "origin"}  # the first files have no such key
    base = float(rotary.get("base", 10000))
    if rotary.get("type") == "dynamic":
        rope = {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0)), "rope_theta": base}
    elif rotary.get("type") == "origin":
        rope = {"rope_type": "default", "rope_theta": base}
    else:
        raise _cannot(folder, "rotary", rotary, "type origin or dynamic")
    native = native_config(
        folder,
        config,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        attention_bias=config.get("bias", True),
        rope_parameters=rope,
    )
    chat = INTERNLM if _is_chat(folder, config) else None
    return Family(
        "InternLM-Chat" if chat else "InternLM",
        native,
        same_names,
        lambda at: _first_vocabulary(at, chat),
        settings={"temperature": 0.8, "top_p": 0.8} if chat else {},
    )


def _first_vocabulary(folder: Path, chat: str | None) -> Vocabulary:
    from . import vocab

    pieces = vocab.pieces(folder / "tokenizer.model") if (folder / "tokenizer.model").is_file() else {}
    marks = {name: pieces[name] for name in ("<eoh>", "<eoa>") if name in pieces}  # 103027 and 103028 in the published file
    return vocabulary(folder, chat, special=marks, ends=["<eoa>"] if chat else [])


def _second(folder: Path, config: dict[str, Any]) -> Family:
    heads = config.get("num_attention_heads", 0)
    groups = config.get("num_key_value_heads") or heads
    native = native_config(
        folder,
        config,
        num_key_value_heads=groups,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        attention_bias=config.get("bias", True),
        rope_parameters=_rope(folder, config, ("dynamic", "linear")),
    )
    width, shared = native["hidden_size"] // heads, heads // groups
    # Rows group by group: the queries of a key's group, the key, the value (convert2llama.py: "(h gs d) dim").
    cuts = {
        "q": (0, shared * width),
        "k": (shared * width, (shared + 1) * width),
        "v": ((shared + 1) * width, (shared + 2) * width),
    }
    names = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for published, ours in {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
    }.items():  # fmt: skip
        names[f"model.layers.{{}}.{published}.*"] = f"model.layers.{{}}.{ours}.*"
    fused = [Take(f"model.layers.{{}}.self_attn.{part}_proj.*", start, stop, groups) for part, (start, stop) in cuts.items()]
    chat = about_tokenizer(folder).get("chat_template") or (INTERNLM2 if _is_chat(folder, config) else None)
    marks = MARKS2 if chat and native["vocab_size"] == 92544 else {}
    return Family(
        "InternLM2-Chat" if chat else "InternLM2",
        native,
        places(
            {
                **names,
                "model.layers.{}.attention.wqkv.*": fused,
            }
        ),
        _published(folder, chat, marks),
        settings={"temperature": 0.8, "top_p": 0.8} if chat else {},
    )


def _third(folder: Path, config: dict[str, Any]) -> Family:
    bias = config.get("bias", False)
    if config.get("qkv_bias", False) != bias:
        raise _cannot(folder, "qkv_bias", config.get("qkv_bias", False), f"the value of bias ({bias})")
    heads = config.get("num_attention_heads", 0)
    native = native_config(
        folder,
        config,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        max_position_embeddings=config.get("max_position_embeddings", 32768),
        attention_bias=bias,
        mlp_bias=bias,
        rope_parameters=_rope(folder, config, ("dynamic", "linear", "yarn", "llama3")),
        **({"head_dim": config["head_dim"]} if config.get("head_dim") else {}),
    )
    chat = about_tokenizer(folder).get("chat_template") or (INTERNLM2 if _is_chat(folder, config) else None)
    return Family(
        "InternLM3-Instruct" if chat else "InternLM3",
        native,
        same_names,
        _published(folder, chat, {}),
        settings={"temperature": 1.0, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.005} if chat else {},  # its model card
    )


def _published(folder: Path, chat: str | None, marks: dict[str, int]) -> Any:
    """None: the folder's own tokenizer.json, where it has one and a chat format with it (or needs none)."""
    if (folder / "tokenizer.json").is_file() and (not chat or about_tokenizer(folder).get("chat_template")):
        return None
    return lambda at: vocabulary(at, chat, special=marks, ends=["<|im_end|>"] if chat else [])


def _rope(folder: Path, config: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """rope_theta and rope_scaling in today's one field; both compute what transformers computes."""
    theta = float(config.get("rope_theta", 10000))
    scaling = config.get("rope_scaling")
    if not scaling:
        return {"rope_type": "default", "rope_theta": theta}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in known:
        raise _cannot(folder, "rope_scaling", scaling, f"type {' or '.join(known)}")
    return {**{key: value for key, value in scaling.items() if key != "type"}, "rope_type": kind, "rope_theta": theta}


def _is_chat(folder: Path, config: dict[str, Any]) -> bool:
    """Base and chat models have the same config: told by name, or by a second end token (<eoa>, <|im_end|>) beside </s>."""
    ends = about_generation(folder).get("eos_token_id", config.get("eos_token_id"))
    return any(word in called(folder, config) for word in ("chat", "instruct")) or (isinstance(ends, list) and len(ends) > 1)


def _cannot(folder: Path, key: str, value: Any, wanted: str) -> UserError:
    return UserError(f"{folder / 'config.json'}: {key} is {value}; only {wanted} can be read")

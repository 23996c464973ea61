"""ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as published (model_type `chatglm` in its several meanings).

ChatGLM2, ChatGLM3 and GLM-4 compute what transformers' `GlmForCausalLM` computes, once names are changed and the fused query_key_value
is cut in three. ChatGLM-6B has no native class; `chatglm1.py` is ours and keeps the published names.
Facts: the published modeling_chatglm.py and tokenization_chatglm.py of each model (2023-03 to 2024-06).
"""

import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import vocab
from .family import Family, Places, Take, Vocabulary, about_tokenizer, added, places

# --- chat formats -----------------------------------------------------------------------------------------------------------
# The history of ChatGLM-6B and ChatGLM2-6B is part of the question's text, without end marks: only the last answer can be learned.

_ROUNDS = (
    "{{% set ns = namespace(round={first}) %}}{front}"
    "{{% set questions = messages | selectattr('role', 'equalto', 'user') | list | length %}}"
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{question}"
    "{{% elif message['role'] == 'assistant' %}}{answer}"
    "{{% else %}}{{{{ raise_exception('this model has no way to write a ' + message['role'] + ' turn'"
    " + ('; put it into the question' if message['role'] == 'system' else '')) }}}}{{% endif %}}"
    "{{% endfor %}}"
)
CHATGLM1 = _ROUNDS.format(
    first=0,
    front="",
    question=(
        "{% if questions == 1 and loop.first %}{{ message['content'] }}"
        "{% else %}{{ '[Round ' ~ ns.round ~ ']\n问：' ~ message['content'] ~ '\n答：' }}{% set ns.round = ns.round + 1 %}{% endif %}"
        "{% if ns.round == questions or questions == 1 %}{{ '[gMASK]<sop>' }}{% endif %}"
    ),
    answer="{{ message['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}",
)
CHATGLM2 = _ROUNDS.format(
    first=1,
    front="[gMASK]sop",
    question="{{ '[Round ' ~ ns.round ~ ']\n\n问：' ~ message['content'] ~ '\n\n答：' }}{% set ns.round = ns.round + 1 %}",
    answer="{{ message['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}",
)
# CharacterGLM-6B: a scene of two speakers. The names and what is known of them stand in the system message, as bot_name, user_name,
# bot_info and user_info; its text, if any, is the bot's info. Newlines within a line become blanks, as published.
CHARACTERGLM = (
    "[gMASK]sop{% set head = messages[0] if messages[0]['role'] == 'system' else {} %}"
    "{% set bot = head['bot_name'] or '助手' %}{% set user = head['user_name'] or '用户' %}"
    "{{ '以下是一段' ~ bot ~ '和' ~ user ~ '之间的对话。' }}"
    "{% if head['bot_info'] or head['content'] %}{{ '\n关于' ~ bot ~ '的信息：' ~ (head['bot_info'] or head['content']) }}{% endif %}"
    "{% if head['user_info'] %}{{ '\n关于' ~ user ~ '的信息：' ~ head['user_info'] }}{% endif %}"
    "{% for message in messages %}{% if message['role'] in ('user', 'assistant') %}"
    "{{ '\n[' ~ (bot if message['role'] == 'assistant' else user) ~ ']' ~ message['content'] }}"
    "{% elif not loop.first %}{{ raise_exception('this model has no way to write a ' ~ message['role'] ~ ' turn') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n[' ~ bot ~ ']' }}{% endif %}"
)
CODEGEEX2 = (  # completes text; its README begins a question with the language as a comment: "# language: Python\n# ..."
    "[gMASK]sop{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
TITLES = {
    "chatglm2": "ChatGLM2-6B", "chatglm3": "ChatGLM3-6B", "glm4": "GLM-4-9B", "codegeex2": "CodeGeeX2-6B", "codegeex4": "CodeGeeX4-9B",
    "characterglm": "CharacterGLM-6B",
}  # fmt: skip
_ROLES = (
    "{{{{ '{front}' }}}}{{% for message in messages %}}{{% set role = 'observation' if message['role'] == 'tool' else message['role'] %}}"
    "{skip}"
    "{{{{ '<|' ~ role ~ '|>' ~ (message['metadata'] or '') ~ '\n' ~ ('{blank}' if message['content'] else '') ~ message['content'] }}}}"
    "{{% if role == 'system' and 'tools' in message %}}{{{{ '\n' ~ message['tools'] | tojson(indent=4) }}}}{{% endif %}}"
    "{end}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|assistant|>' }}}}{{% endif %}}"
)
# ChatGLM3's tokenizer encodes the header line and the content apart, each with its own leading blank; the blank written here gives
# the same ids when both are encoded at once.
CHATGLM3 = _ROLES.format(front="[gMASK]sop", blank=" ", skip="", end="")
_SKIP = "{% if message['content'] or role == 'assistant' or 'tools' in message %}"  # GLM-4's template leaves empty turns out
GLM4 = _ROLES.format(front="[gMASK]<sop>", blank="", skip=_SKIP, end="{% endif %}")

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


def read(folder: Path, config: dict[str, Any]) -> Family:
    """Which ChatGLM a folder holds. Raises UserError for settings that no released model has and the native class cannot express."""
    return _chatglm1(folder, config) if "padded_vocab_size" not in config else _glm(folder, config)


def vocabulary(folder: Path) -> Vocabulary | None:
    """The tokenizer of a folder that holds only the tokenizer files, no config.json; None where they are no ChatGLM's."""
    if (folder / "ice_text.model").is_file():
        return _chatglm1_vocabulary(folder, {})
    about = about_tokenizer(folder)
    classes = str(about.get("tokenizer_class")) + str(about.get("auto_map"))
    if (folder / "tokenizer.model").is_file() and "ChatGLM" in classes:
        return _glm_vocabulary(folder, _version(folder, {}), _named(folder, {}))
    return None


# --- ChatGLM-6B -------------------------------------------------------------------------------------------------------------


def _chatglm1(folder: Path, config: dict[str, Any]) -> Family:
    _demand(folder, config, ("hidden_size", "num_layers", "num_attention_heads", "vocab_size", "bos_token_id", "eos_token_id"))
    early = config["vocab_size"] == 150528
    config = {
        "gmask_token_id": config["bos_token_id"] - 3,
        "pad_token_id": 20003 if early else 3,
        **config,
    }  # the first files lack them
    native = {
        "model_type": "chatglm1",
        "architectures": ["ChatGLM1ForCausalLM"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config.get("inner_hidden_size") or 4 * config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "max_position_embeddings": config.get("max_sequence_length", 2048),
        "layer_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "position_encoding_2d": config.get("position_encoding_2d", True),
        "tie_word_embeddings": True,  # both copies are in the file, equal
        "mask_token_id": config.get("mask_token_id", config["gmask_token_id"] - 1),
        "gmask_token_id": config["gmask_token_id"],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    same = places(
        {
            "transformer.word_embeddings.*": "transformer.word_embeddings.*",
            "transformer.final_layernorm.*": "transformer.final_layernorm.*",
            "lm_head.weight": "lm_head.weight",
            "transformer.layers.{}.input_layernorm.*": "transformer.layers.{}.input_layernorm.*",
            "transformer.layers.{}.post_attention_layernorm.*": "transformer.layers.{}.post_attention_layernorm.*",
            "transformer.layers.{}.attention.query_key_value.*": "transformer.layers.{}.attention.query_key_value.*",
            "transformer.layers.{}.attention.dense.*": "transformer.layers.{}.attention.dense.*",
            "transformer.layers.{}.mlp.dense_h_to_4h.*": "transformer.layers.{}.mlp.dense_h_to_4h.*",
            "transformer.layers.{}.mlp.dense_4h_to_h.*": "transformer.layers.{}.mlp.dense_4h_to_h.*",
        }
    )
    return Family(
        "ChatGLM-6B", native, same, lambda at: _chatglm1_vocabulary(at, config), settings={"temperature": 0.95, "top_p": 0.7}
    )


def _chatglm1_vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    path = _file(folder, "ice_text.model", "tokenizer.model")
    pieces = vocab.pieces(path)
    if "[gMASK]" not in pieces:
        raise UserError(f"{path} has no piece [gMASK]; wanted ChatGLM-6B's ice_text.model")
    pictures = about_tokenizer(folder).get("num_image_tokens", 20000)  # in front, in the first weeks' files; the class's default
    offset = config["gmask_token_id"] - pieces["[gMASK]"] if "gmask_token_id" in config else pictures
    names = ("<unk>", "<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    blanks = [(" " * n, f"<|blank_{n}|>") for n in range(80, 1, -1)]
    made = vocab.from_sentencepiece(
        path,
        special={name: pieces[name] + offset for name in names if name in pieces},
        back=("[gMASK]", "<sop>"),
        replace=[pair for pair in [("\n", "<n>"), ("\t", "<|tab|>"), *blanks] if pair[1] in pieces],
        offset=offset,
    )
    about = _tokenizer_config(CHATGLM1, eos="<eop>", pad="<pad>", bos="<sop>")
    # The published decode() takes blanks before punctuation away; Template.parse does not. The whole question is seen at once.
    return Vocabulary(made, {**about, "clean_up_tokenization_spaces": True, "prefix_lm": True})


# --- ChatGLM2, ChatGLM3, GLM-4 ----------------------------------------------------------------------------------------------


def _glm(folder: Path, config: dict[str, Any]) -> Family:
    config = {
        "kv_channels": 128,
        "seq_length": 2048,
        "layernorm_epsilon": 1e-5,
        "multi_query_group_num": 1,
        **config,
    }  # its class's defaults
    _demand(folder, config, ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "kv_channels", "seq_length"))
    for key, usual in {
        "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "apply_residual_connection_post_layernorm": False,
        "fp32_residual_connection": False,
    }.items():  # fmt: skip
        if config.get(key, usual) != usual:
            raise UserError(
                f"{folder / 'config.json'}: {key} is {config[key]}; only models with {key}: {str(usual).lower()} can be read"
            )
    version = _version(folder, config)
    heads, width = config["num_attention_heads"], config["kv_channels"]
    grouped = config.get("multi_query_attention", False)
    groups = config["multi_query_group_num"] if grouped else heads
    ratio = config.get("rope_ratio", 1)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
    if version == "chatglm2" and ratio != 1:  # ChatGLM2-6B-32k divides positions; later models multiply the base
        rope = {"rope_type": "linear", "factor": float(ratio), "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    native = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "vocab_size": config["padded_vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "max_position_embeddings": config["seq_length"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "attention_bias": bool(config.get("add_qkv_bias", False)),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "rope_parameters": rope,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "bos_token_id": None,
        "eos_token_id": config.get("eos_token_id", 2),
        "pad_token_id": config.get("pad_token_id", 0),
    }
    return Family(
        TITLES.get(_named(folder, config)) or TITLES[version],
        native,
        _glm_places(heads * width, groups * width, width, heads if not grouped else 0),
        lambda at: _glm_vocabulary(at, version, _named(at, config)),
        settings={"temperature": 0.8, "top_p": 0.8},
        notes=()
        if _named(folder, config)
        else (f"config.json does not name the model; taken for {TITLES[version]} (template=... says otherwise)",),
    )


def _glm_places(q: int, kv: int, width: int, interleaved: int) -> Places:
    """q, k, v: rows of the fused projection. interleaved: number of heads whose q, k, v alternate head by head; 0: q, then k, then v."""
    parts = [("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv)]
    if interleaved:
        parts = [("q_proj", 0, width), ("k_proj", width, 2 * width), ("v_proj", 2 * width, 3 * width)]
    fused = [Take(f"model.layers.{{}}.self_attn.{name}.*", start, stop, interleaved or 1) for name, start, stop in parts]
    layer = "transformer.encoder.layers.{}."
    return places(
        {
            "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
            layer + "input_layernorm.weight": "model.layers.{}.input_layernorm.weight",
            layer + "self_attention.query_key_value.*": fused,
            layer + "self_attention.dense.weight": "model.layers.{}.self_attn.o_proj.weight",
            layer + "post_attention_layernorm.weight": "model.layers.{}.post_attention_layernorm.weight",
            layer + "mlp.dense_h_to_4h.weight": "model.layers.{}.mlp.gate_up_proj.weight",
            layer + "mlp.dense_4h_to_h.weight": "model.layers.{}.mlp.down_proj.weight",
            "transformer.encoder.final_layernorm.weight": "model.norm.weight",
            "transformer.output_layer.weight": "lm_head.weight",
        }
    )


_BY_NAME = {
    "chatglm2": "chatglm2", "codegeex2": "chatglm2", "characterglm": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4", "codegeex4": "glm4",
}  # fmt: skip


def _named(folder: Path, config: dict[str, Any]) -> str:
    """What the folder says it is: its config's or tokenizer's name, else the folder's own; empty where that cannot be."""
    names = [config.get("_name_or_path"), about_tokenizer(folder).get("name_or_path"), *folder.resolve().parts[:-3:-1]]
    found = [re.search(r"chatglm[-_]?[23]|glm[-_]?4|codegeex[-_]?[24]|characterglm", str(name or "").lower()) for name in names]
    known = [hit.group().replace("-", "").replace("_", "") for hit in found if hit]
    kind = _kind(folder)
    return next((name for name in known if kind is None or (_BY_NAME[name] == "glm4") == (kind == "tiktoken")), "")


def _kind(folder: Path) -> str | None:
    path = folder / "tokenizer.model"
    return None if not path.is_file() else "sentencepiece" if vocab.is_sentencepiece(path) else "tiktoken"


def _version(folder: Path, config: dict[str, Any]) -> str:
    """chatglm2 | chatglm3 | glm4: by name; where there is none, by the tokenizer's files, then by the config's age."""
    named = _named(folder, config)
    if named:
        return _BY_NAME[named]
    if _kind(folder) == "tiktoken" or isinstance(config.get("eos_token_id"), list):
        return "glm4"
    if "<|user|>" in added(folder) or config.get("rope_ratio", 1) != 1 or config.get("seq_length", 0) == 8192:
        return "chatglm3"
    written = re.match(r"(\d+)\.(\d+)", str(config.get("transformers_version", "")))
    return "chatglm3" if written and (int(written[1]), int(written[2])) >= (4, 30) else "chatglm2"


def _glm_vocabulary(folder: Path, version: str, named: str) -> Vocabulary:
    path = _file(folder, "tokenizer.model")
    if version == "glm4":
        ranks = vocab.count_ranks(path)
        special = added(folder) or {name: ranks + i for i, name in enumerate(GLM4_SPECIAL)}
        made = vocab.from_tiktoken(path, pattern=GLM4_PATTERN, special=special, front=("[gMASK]", "<sop>"))
        return Vocabulary(
            made, _tokenizer_config(GLM4, eos="<|endoftext|>", pad="<|endoftext|>", ends=("<|user|>", "<|observation|>"))
        )
    pieces = vocab.pieces(path)
    # A folder that does not say which of the two it is has the marks of both, so that template=chatglm3 can be asked for.
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(ROLES if version == "chatglm3" or not named else ())]
    special = {name: pieces[name] for name in ("<unk>", "<s>", "</s>") if name in pieces}
    special |= {name: len(pieces) + i for i, name in enumerate(names)}
    made = vocab.from_sentencepiece(path, special=special, front=("[gMASK]", "sop"))
    if version == "chatglm2":
        chat = {"codegeex2": CODEGEEX2, "characterglm": CHARACTERGLM}.get(named, CHATGLM2)
        return Vocabulary(made, _tokenizer_config(chat, eos="</s>", pad="<unk>"))
    return Vocabulary(made, _tokenizer_config(CHATGLM3, eos="</s>", pad="<unk>", ends=("<|user|>", "<|observation|>")))


# --- small things -----------------------------------------------------------------------------------------------------------


def _tokenizer_config(chat: str, eos: str, pad: str, bos: str | None = None, ends: tuple[str, ...] = ()) -> dict[str, Any]:
    """tokenizer_config.json of the native folder. `ends`: further tokens at which an answer ends."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        **({"bos_token": bos} if bos else {}),
        "eos_token": eos,
        "pad_token": pad,
        "end_tokens": list(ends),
        "apart": True,  # the published code encodes every text by itself, each with its own leading blank
        "chat_template": chat,
    }


def _file(folder: Path, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no {' or '.join(names)}; copy the model's tokenizer files beside its weights")
    return found


def _demand(folder: Path, config: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in config]
    odd = [key for key in keys if key != "eos_token_id" and not (isinstance(config.get(key, 1), int) and config.get(key, 1) > 0)]
    if odd:
        raise UserError(f"{folder / 'config.json'}: {odd[0]} is {config[odd[0]]!r}; wanted a whole number above 0")
    if missing:
        raise UserError(f"{folder / 'config.json'} says model_type chatglm but has no {', '.join(missing)}; copy the file again")

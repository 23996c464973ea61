"""What the families with Llama's blocks share, and Llama folders that bring no fast tokenizer or no chat format of their own.

transformers knows the model itself; what is added here is a vocabulary from tokenizer.model and the published chat formats:
Llama 2 (facebookresearch/llama, llama/generation.py: chat_completion), Chinese-Alpaca-2 (ymcui/Chinese-LLaMA-Alpaca-2,
scripts/training/build_dataset.py and scripts/inference/gradio_demo.py), Chinese-Alpaca (ymcui/Chinese-LLaMA-Alpaca, the same files).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .family import Family, Vocabulary, about_tokenizer, added, called, same_names

REFUSE = "{% else %}{{ raise_exception('this model has no way to write a ' ~ message['role'] ~ ' turn') }}{% endif %}"
# The first question carries the system prompt; every question begins with bos. Filled in: what stands in capitals.
_INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = DEFAULT %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{% set front = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if loop.first and system is not none else '' %}"
    "{{ bos_token ~ '[INST] ' ~ QUESTION ~ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ANSWER ~ eos_token }}" + REFUSE + "{% endfor %}"
)


def _inst(**parts: str) -> str:
    made = _INST
    for name, part in parts.items():
        made = made.replace(name, part)
    return made


LLAMA2 = _inst(DEFAULT="none", QUESTION="(front ~ message['content']) | trim", ANSWER="' ' ~ message['content'] | trim ~ ' '")
ALPACA2_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
ALPACA2 = _inst(DEFAULT=f"'{ALPACA2_SYSTEM}'", QUESTION="front ~ message['content']", ANSWER="' ' ~ message['content']")
ALPACA_SYSTEM = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA = (  # the answer is encoded apart from the header, whose blank stays a token of its own (build_dataset.py)
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    f"{{% else %}}{{% set system = '{ALPACA_SYSTEM}' %}}{{% set turns = messages %}}{{% endif %}}{{{{ system }}}}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' ~ message['content'] ~ '\n\n### Response: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] ~ eos_token }}"
    f"{REFUSE}{{% endfor %}}"
)


def read(folder: Path, config: dict[str, Any]) -> Family | None:
    """A Llama folder without tokenizer.json or without a chat format; None where it has all it needs or nothing can be added."""
    tokenizer = about_tokenizer(folder)
    has_fast = (folder / "tokenizer.json").is_file()
    own = tokenizer.get("chat_template")
    if not has_fast and not (folder / "tokenizer.model").is_file():
        return None
    title, chat = ("Llama", own) if own else _format(folder, config)
    if has_fast and (own or chat is None):
        return None
    notes = (
        ()
        if chat
        else (f"no chat format is known for {title}; name one to train or chat with turns: template=llama2, template=chatml ...",)
    )
    settings = {"temperature": 0.2, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1} if "Alpaca" in title else {}
    return Family(
        title,
        config,
        same_names,
        lambda at: vocabulary(at, chat),
        native=True,
        settings=settings if settings or not chat else {"temperature": 0.6, "top_p": 0.9},
        notes=notes,
    )


def _format(folder: Path, config: dict[str, Any]) -> tuple[str, str | None]:
    """(title, chat format). Base and chat models differ in nothing but their names, so a format is given by name only; Chinese-Alpaca
    is told by its size: 49,953 pieces and a padding token (README: Chinese-LLaMA has 49,953, and both of the second series 55,296)."""
    name, size = called(folder, config), config.get("vocab_size")
    if size == 49954:
        return "Chinese-Alpaca", ALPACA
    if size == 49953:
        return "Chinese-LLaMA", None
    if size == 55296:
        return ("Chinese-Alpaca-2", ALPACA2) if "alpaca" in name else ("Chinese-LLaMA-2", None)
    if size in (32000, 32001) and re.search(r"llama-?_?2.*chat", name):
        return "Llama-2-Chat", LLAMA2
    return "Llama", None


# --- for the other families -------------------------------------------------------------------------------------------------


KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "hidden_act", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def native_config(folder: Path, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """config.json of the LlamaForCausalLM with a published config's sizes. Raises UserError where one of them is missing."""
    missing = [key for key in KEPT[:6] if key not in config]
    if missing:
        raise UserError(f"{folder / 'config.json'} has no {', '.join(missing)}; copy the file again")
    kept = {key: config[key] for key in KEPT if key in config}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **kept, **more}


def vocabulary(
    folder: Path, chat: str | None, *, special: dict[str, int] | None = None, bos: bool = True, ends: Iterable[str] = ()
) -> Vocabulary:
    """The fast tokenizer of a folder with tokenizer.model (or its own tokenizer.json) with a chat format.

    special: further special tokens, beside the usual three and those that the folder lists. bos: a text begins with `<s>`, unless
    the folder says add_bos_token itself. ends: further tokens at which an answer ends.
    """
    about = about_tokenizer(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": _name(about, "bos_token") or "<s>",
        "eos_token": _name(about, "eos_token") or "</s>",
        "end_tokens": list(ends),
        **({"chat_template": chat} if chat else {}),
        **({"apart": True} if chat == ALPACA else {}),
    }
    if (folder / "tokenizer.json").is_file():
        kept = {key: value for key, value in about.items() if key not in ("auto_map", "tokenizer_class", "added_tokens_decoder")}
        return Vocabulary((folder / "tokenizer.json").read_text(encoding="utf-8"), settings | kept)
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenizer.model; copy the model's tokenizer files beside its weights")
    from . import vocab

    pieces = vocab.pieces(path)
    marks = {name: pieces[name] for name in ("<unk>", "<s>", "</s>") if name in pieces} | added(folder) | (special or {})
    pad = _name(about, "pad_token")
    if pad in pieces or pad in marks:
        settings["pad_token"] = pad
        marks.setdefault(pad, pieces.get(pad, -1))
    front = (settings["bos_token"],) if about.get("add_bos_token", bos) else ()
    return Vocabulary(vocab.from_sentencepiece(path, special=marks, front=front), settings)


def _name(about: dict[str, Any], key: str) -> str:
    value = about.get(key)
    return (value.get("content") if isinstance(value, dict) else value) or ""

"""The prompts that older programs trained on, by their names: what an imported adapter must be asked with.

Their facts are their own code: FreddyBanana/ChatGLM2-LoRA-Trainer (utils.py at 5d9b5ae and fe3fa1a), datawhalechina/self-llm (models/ChatGLM/06,
models/GLM-4/05), hiyouga/ChatGLM-Efficient-Tuning (v0.1.5), beyondguo/LLM-Tuning (tokenize_dataset_rows.py), zejunwang1/chatglm_tuning
(train_lora.py), hiyouga/LLaMA-Factory.
"""

import json
import re
from pathlib import Path
from typing import Any

from . import families, oldfiles
from .chat import FORMS, Template, Tokens, choose
from .errors import UserError, did_you_mean
from .run import Form

PROMPTS = {
    "llama-factory": "LLaMA-Factory: the model's own chat format",
    "chatglm-efficient-tuning": "ChatGLM-Efficient-Tuning: ChatGLM2's [Round 1], also on ChatGLM-6B",
    "llm-tuning": "LLM-Tuning: the bare question",
    "chatglm_tuning": "chatglm_tuning: the bare question",
    "self-llm": "self-llm's chapters: role marks as text on ChatGLM3, a newline behind the last mark",
    "chatglm2-lora-trainer": "ChatGLM2-LoRA-Trainer since 2023-07-27: the bare question, with start marks before the answer too",
    "chatglm2-lora-trainer-alpaca": "ChatGLM2-LoRA-Trainer of 2023-07-20 to 26: its Instruction and Answer headings",
}
ROUNDS = (  # ChatGLM2's history on ChatGLM-6B, whose marks stand behind the question
    "{% set ns = namespace(round=1) %}{% set questions = messages | selectattr('role', 'equalto', 'user') | list | length %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[Round ' ~ ns.round ~ ']\n\n问：' ~ message['content'] ~ '\n\n答：' }}"
    "{% if ns.round == questions %}{{ '[gMASK]<sop>' }}{% endif %}{% set ns.round = ns.round + 1 %}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% elif loop.first %}{{ message['content'] }}"
    "{% else %}{{ raise_exception('this chat format has no way to write a ' ~ message['role'] ~ ' turn') }}{% endif %}{% endfor %}"
)
RAW = Form(system="{content}\n", user="{content}", assistant="{content}{stop}")
ROLES = Form(system="<|system|>\n{content}", user="<|user|>\n{content}", assistant="<|assistant|>\n{content}{stop}")
HEADINGS = Form(**oldfiles.HEADINGS)


def recognised(folder: Path, config: dict[str, Any]) -> tuple[str, str] | None:
    """(name of PROMPTS, what told it) where an adapter's folder tells which program made it; of a checkpoint also the folder above."""
    for place in (folder, folder.resolve().parent) if folder.name.startswith("checkpoint-") else (folder,):
        names = {path.name for path in place.iterdir()}
        card = place / "README.md"
        if {"llamaboard_config.yaml", "training_args.yaml"} & names:
            return "llama-factory", "its training_args.yaml"
        if card.is_file() and "llama-factory" in card.read_text(encoding="utf-8", errors="replace"):
            return "llama-factory", "its README.md"
        if "finetuning_args.json" in names:
            return "chatglm-efficient-tuning", "its finetuning_args.json"
    if "query_value_key" in (config.get("target_modules") or ()):  # a slip that only this program has
        return "chatglm2-lora-trainer", "the target 'query_value_key'"
    where = folder.resolve().as_posix() + "/"
    if re.search(r"/output/(ChatGLM|GLM4)/|/GLM4_lora/", where):
        return "self-llm", "the folder's name"
    return None


def trained_form(base: Path, name: str) -> Template:
    """The chat format behind a name of PROMPTS, bound to the base's tokenizer; or one of `template`'s own names."""
    if name not in PROMPTS:
        known = [*PROMPTS, *families.CHATS, *FORMS]
        if name not in known:
            raise UserError(f"--prompt {name}: there is no such chat format{did_you_mean(name, known)}; known: {', '.join(known)}")
        return families.open_template(base, name)
    tokens = families.open_tokens(base)
    behind = bool(tokens.config.get("prefix_lm"))  # ChatGLM-6B: its own format for one question is the bare question
    if name == "llama-factory" or (name == "chatglm-efficient-tuning" and not behind):
        return choose("auto", tokens)
    if behind and name != "chatglm-efficient-tuning":
        if name not in ("llm-tuning", "chatglm_tuning"):
            raise UserError(
                f"--prompt {name}: that program did not train ChatGLM-6B; known for it: chatglm-efficient-tuning, chatglm_tuning"
            )
        return choose("auto", tokens)
    # Each text was encoded by itself, with a leading blank of its own; only the headings' program encoded all at once.
    config = {**tokens.config, "apart": name != "chatglm2-lora-trainer-alpaca"}
    if behind:
        config["chat_template"] = ROUNDS
        return choose("auto", Tokens(tokens.json, config, tokens.end_ids, tokens.built))
    if name == "self-llm" and "sop" in tokens.special:
        return choose(ROLES.model_copy(update={"system": "<|system|>\n{content}\n"}), _roles_as_text(tokens, config))
    start = "".join(tokens.names[id] for id in tokens.prefix)
    forms = {"self-llm": ROLES, "chatglm2-lora-trainer": RAW.model_copy(update={"user": "{content}" + start})}
    form = HEADINGS if name == "chatglm2-lora-trainer-alpaca" else forms.get(name, RAW)
    return choose(form, Tokens(tokens.json, config, tokens.end_ids, tokens.built))


def _roles_as_text(tokens: Tokens, config: dict[str, Any]) -> Tokens:
    """ChatGLM3's tokenizer does not know role marks in text, so code that wrote them there trained on their letters: a tokenizer without them."""
    tree = json.loads(tokens.json)
    roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in roles]
    ends = [id for id in tokens.end_ids if tokens.names.get(id) not in roles]
    return Tokens(json.dumps(tree, ensure_ascii=False), {**config, "end_tokens": []}, ends, tokens.built)

"""Tiny models with a byte-level tokenizer, made on the spot: seconds, no network, no weights in the repository."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # system inside the first question, an answer with blanks around it, bos at every question
    "{% if messages[0]['role'] == 'system' %}{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GLM4 = (  # the header of the next turn is the end mark of the answer before
    "{{ '[gMASK]<sop>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]


def tokenizer(
    folder: Path,
    chat_template: str | None = CHATML,
    eos: str = "<|im_end|>",
    bos: str = "<|im_start|>",
    special: Sequence[str] = SPECIAL,
) -> Path:
    """A byte-level BPE tokenizer with a few merges, written as an ordinary tokenizer folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(name, special=True) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat and the user said the answer is in the sea\n\n\n"] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": bos,
        "pad_token": "<|endoftext|>",
    }
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama(folder: Path, chat_template: str | None = CHATML, seed: int = 0, **changes: Any) -> Path:
    """A random LlamaForCausalLM of about 40,000 parameters with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer(folder, chat_template)
    settings = {
        "vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    return folder


def rows(count: int, turns: int = 1) -> list[dict[str, Any]]:
    words = ["the cat", "a mat", "the sea", "an answer", "你好", "42"]
    made = []
    for i in range(count):
        messages = []
        for j in range(turns):
            messages += [
                {"role": "user", "content": f"Where is {words[(i + j) % 6]}? {i}"},
                {"role": "assistant", "content": f"On {words[(i + 2 * j + 1) % 6]}" + " and so on" * (i % 4)},
            ]
        made.append({"messages": messages})
    return made


def write_rows(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


class Lazy(Mapping[str, Any]):
    """Things by name, each made when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]):
        self._makers, self._made = makers, {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Cases of a test, all slow but some: those run in `make test`, all in `make test-all`."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]

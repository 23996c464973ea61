"""The law of streaming: an answer's pieces, joined, are what `parse` and the tokenizer's own decoder say of all its ids, however it is cut.

The oracle is the tokenizers library, decoding everything at once; the format's own text around an answer is taken off as `parse` did when it
read an answer as a whole.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from glmtune import families, generate
from glmtune.chat import Template, Tokens, choose
from glmtune.errors import UserError
from glmtune.run import Form

from . import published, tiny
from .cases import cases

ANSWERS = [
    "Paris is in France, on the Seine.", "你好，世界！", "", " ", "\n", "\n\n", "<think>\neasy\n</think>\n\n4", "<think>\n\n</think>", "</think>", "<n> <|tab|>",
    " leading and trailing \n", "naïve 👩‍👩‍👧 日本語", "a\n b", '{"name": "f", "arguments": {}}', "\ufffd and \ufffd", "བོད་ཡིག",
]  # fmt: skip
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>",
    "<start_of_turn>", "<end_of_turn>", "<bos>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>",
    "<|eom_id|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>",
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|startoftext|>", "[INST]", "[/INST]", "<turn|>", "<|turn>",
]  # fmt: skip
OWN = {  # formats whose leads and gaps take several tokens, and whose parts are beginnings of themselves
    "qwen3": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blanks": "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ '\n \n ' + m.content + ' \n \n<|endoftext|>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
}  # fmt: skip


def as_before(template: Template, ids: Sequence[int]) -> str:
    """An answer read as a whole."""
    ids = list(ids)
    cut = next((i for i, token in enumerate(ids) if token in template.stop_ids), len(ids))
    lead, gap = template._around
    text = template.tokens.decode(ids[:cut]).removeprefix(lead)
    return text.removesuffix(gap) if cut < len(ids) else text


def streamed(template: Template, ids: Sequence[int]) -> list[str]:
    streamer = template.streamer()
    return [*(streamer.add(id) for id in ids), streamer.end()]


def reply(template: Template, answer: str) -> list[int]:
    """The ids of an answer as it is learned, its stop mark included."""
    asked = [{"role": "user", "content": "Hi"}]
    ids = template.encode([*asked, {"role": "assistant", "content": answer}]).ids
    return ids[len(template.prompt(asked)) :]


def holds_law(template: Template, ids: Sequence[int]) -> None:
    wanted = as_before(template, ids)
    pieces = streamed(template, ids)
    assert "".join(pieces) == wanted == template.parse(ids).text
    for n in range(len(ids)):  # what was sent is never taken back
        assert wanted.startswith("".join(pieces[:n]))


def cuts(tokens: Tokens, text: str, seed: int) -> list[int]:
    """Ids of a text that was cut at random places, as a model may write it: characters of several bytes in single bytes too."""
    chance = random.Random(seed)
    ids: list[int] = []
    while text:
        n = chance.choice([1, 1, 2, 3, 8])
        ids += tokens.encode(text[:n], first=not ids)
        text = text[n:]
    return ids


def all_laws(template: Template, seed: int) -> None:
    chance = random.Random(seed)
    size = template.tokens.vocab_size
    lead, gap = template._around
    for answer in chance.sample(ANSWERS, 6):
        try:
            ids = reply(template, answer)
        except UserError:  # a few published formats refuse empty answers
            ids = template.tokens.encode(answer)
        for cut in {len(ids), len(ids) - 1, chance.randint(0, len(ids))}:
            holds_law(template, ids[:cut])
        said = cuts(template.tokens, lead + answer + gap, chance.randrange(1000))
        holds_law(template, said)
        holds_law(template, [*said, template.stop_ids[0], *said])
    for length in (1, 2, 5, 40):
        holds_law(template, [chance.randrange(size) for _ in range(length)])
        holds_law(template, [chance.randrange(size) for _ in range(length)] + [template.stop_ids[-1]])
    holds_law(template, [])
    holds_law(template, [size + 5, *reply(template, "a"), size + 7])  # a model may have more rows than the tokenizer has tokens


QUICK = ["chatglm-6b", "chatglm3-6b", "glm-4-9b-chat", "internlm2-chat-7b", "baichuan2-7b-chat", "qwen3"]


@pytest.fixture(scope="module", params=tiny.slow_but(QUICK, published.FAMILIES))
def family(request, tmp_path_factory) -> Template:
    folder = tmp_path_factory.mktemp("families") / request.param
    return families.load_tokenizer(published.FAMILIES[request.param](folder))[1]


@pytest.mark.slow
def test_every_family_streams_what_parse_says(family):
    all_laws(family, seed=1)


@pytest.mark.few(2)
def test_a_reference_answer_comes_back_from_every_family(family):
    """Fault F2: the beginning was lost wherever the text in front of an answer takes several tokens."""
    ids = reply(family, "Paris is in France, on the Seine.")
    assert "".join(streamed(family, ids)).strip() == "Paris is in France, on the Seine."


@pytest.mark.few(3)
@cases(25)
@given(st.data())
def test_random_ids_stream_as_they_are_parsed(family, data):
    size = family.tokens.vocab_size
    low = st.integers(0, min(size, 700) - 1)  # where single bytes, blanks and marks stand
    holds_law(family, data.draw(st.lists(st.one_of(low, st.integers(0, size + 3), st.sampled_from(family.stop_ids)), max_size=30)))


@pytest.mark.few(3)
@cases(25)
@given(st.text(alphabet=st.sampled_from(list("ab \n<n>▁你é👩\ufffd\t|2kblan_")), max_size=30), st.integers(0, 9), st.booleans())
def test_generated_texts_stream_as_they_are_parsed(family, text, seed, stops):
    ids = cuts(family.tokens, family._around[0] + text + family._around[1], seed)
    holds_law(family, [*ids, family.stop_ids[0]] if stops else ids)


@pytest.mark.parametrize("name", list(OWN))
@cases(40)
@given(st.text(alphabet="\n <think/>x", max_size=16), st.integers(0, 5), st.booleans())
def test_leads_and_gaps_of_several_tokens(tmp_path_factory, name, text, seed, stops):
    template = _own(name, tmp_path_factory.getbasetemp())
    for whole in (text, template._around[0] + text + template._around[1], template._around[0][:3] + text):
        ids = cuts(template.tokens, whole, seed)
        holds_law(template, [*ids, template.stop_ids[0]] if stops else ids)


def _own(name: str, folder: Path) -> Template:
    if name not in _MADE:
        eos = {"qwen3": "<|im_end|>", "blanks": "<|endoftext|>"}[name]
        _MADE[name] = families.open_template(tiny.tokenizer(folder / name, OWN[name], eos=eos))
        lead, gap = _MADE[name]._around
        assert len(lead) > 3 and (name != "blanks" or len(gap) > 2)
    return _MADE[name]


_MADE: dict[str, Template] = {}


# --- published chat formats ---------------------------------------------------------------------------------------------------


def published_formats(shared: Path, folder: Path, step: int) -> dict[str, Template]:
    """Each `step`-th of them that can be cut."""
    made, tokens = {}, {}
    for path in sorted((shared / "templates").glob("*.jinja"))[::step]:
        source = path.read_text(encoding="utf-8")
        found = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").is_file() else {}
        names = {key: value.get("content") if isinstance(value, dict) else value for key, value in found.items()}
        eos = names.get("eos_token") or next((name for name in ENDS if name in source), "</s>")
        bos = names.get("bos_token") or "<s>"
        if (eos, bos) not in tokens:
            tokens[eos, bos] = tiny.tokenizer(folder / str(len(tokens)), None, eos, bos, [*dict.fromkeys([*SPECIAL, eos, bos])])
        opened = Tokens.open(tokens[eos, bos])
        opened.chat_template = source
        try:
            made[path.stem] = choose("auto", opened)
        except UserError:
            continue
    return made


ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<|endoftext|>",
]


EACH = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@pytest.mark.slow
@EACH
def test_every_published_format_streams_what_parse_says(shared, tmp_path, step):
    made = published_formats(shared, tmp_path, step)
    assert len(made) > 30 // step and sum(len(template._around[0]) > 1 for template in made.values()) > 5 // step
    for i, template in enumerate(made.values()):
        all_laws(template, seed=i)


@pytest.mark.slow
@EACH
def test_thoughts_and_tool_calls_stream_as_they_are_parsed(shared, tmp_path, step):
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "北京"}}}
    turns = [
        {"role": "assistant", "content": "sure", "tool_calls": [call]},
        {"role": "assistant", "content": "4", "reasoning_content": "easy"},
    ]
    tried = 0
    for template in published_formats(shared, tmp_path, step).values():
        for turn in turns:
            asked = [{"role": "user", "content": "Hi"}]
            try:
                ids = template.encode([*asked, turn]).ids[len(template.prompt(asked)) :]
            except UserError:
                continue
            tried += 1
            for cut in range(0, len(ids) + 1, 3):
                holds_law(template, ids[:cut])
            holds_law(template, ids)
    assert tried > 40 // step


# --- decoders -----------------------------------------------------------------------------------------------------------------

NAMES = ["a", "▁a", "▁", "▁▁", " ", "", "<n>", "<", "n", ">", "b▁", "Ġa", "é", "ä½", "ł", "ł a", "</w>", "a</w>", "##a", "�"]
VOCABULARY = [*NAMES, *(f"<0x{byte:02X}>" for byte in (0x41, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x90, 0x88, 0xED, 0xC0))]
DECODERS = {
    "none": None,
    "bytes": decoders.ByteLevel(),
    "bytes in a sequence": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a▁", "x")]),
    "llama": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "chatglm": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0), decoders.Replace("<n>", "\n"),
         decoders.Replace("\n\na", "▁"), decoders.Strip("a", 2, 0)]
    ),
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "bytes and metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "strip each": decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Replace("a", "aa")]),
    "expression": decoders.Sequence([decoders.Replace(Regex("a+"), "x"), decoders.Fuse()]),
    "both ends": decoders.Sequence([decoders.Replace("a", "aa"), decoders.Fuse()]),
    "word pieces": decoders.WordPiece(),
    "suffix": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
}  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize("name", list(DECODERS))
@cases(80)
@given(st.lists(st.integers(0, len(VOCABULARY) + 2), max_size=14))
def test_every_decoder_gives_the_same_text_piece_by_piece(name, ids):
    tokens = _tokens(name)
    decoding = tokens.decoding()
    assert "".join([*map(decoding.add, ids), decoding.end()]) == tokens.decode(ids)


def _tokens(name: str) -> Tokens:
    if name not in _TOKENS:
        made = Tokenizer(models.WordLevel({text: id for id, text in enumerate(VOCABULARY)}, unk_token="a"))
        made.add_special_tokens([AddedToken("<end>", special=True)])
        made.add_tokens([AddedToken("▁plain你", special=False)])
        if DECODERS[name] is not None:
            made.decoder = DECODERS[name]
        _TOKENS[name] = Tokens(made.to_str(), {"eos_token": "<end>"})
    return _TOKENS[name]


_TOKENS: dict[str, Tokens] = {}


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b", "qwen3", "llama-2-7b-chat"])
def test_a_piece_comes_as_soon_as_nothing_can_change_it(name, tmp_path):
    """One token at most is behind, in plain text."""
    template = families.load_tokenizer(published.FAMILIES[name](tmp_path / "m"))[1]
    ids = reply(template, "the cat sat on the mat and the user said")
    pieces = streamed(template, ids)
    for n in range(8, len(ids) - 1):
        assert as_before(template, ids[: n - 1]).rstrip() in "".join(pieces[:n])


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b", "qwen3", "llama-2-7b-chat", "baichuan2-7b-chat"])
def test_the_work_for_a_token_does_not_grow_with_the_answer(name, tmp_path, monkeypatch):
    """Counted: the tokenizer is never asked for a text that grows, and what is held back stays short."""
    template = families.load_tokenizer(published.FAMILIES[name](tmp_path / "m"))[1]
    asked: list[int] = []
    monkeypatch.setattr(Tokens, "decode", lambda self, ids, keep_special=False: asked.append(len(ids)) or "")
    streamer = template.streamer()
    for id in template.tokens.encode("the cat sat on the mat. " * 40):
        streamer.add(id)
        assert len(streamer._held) < 40
    assert not asked


# --- the program's own stream -------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("answer", ["Paris is in France, on the Seine.", "你好，世界！"])
def test_the_program_streams_a_reference_answer(family, monkeypatch, answer):
    ids = reply(family, answer)
    ids = ids[: next(i for i, id in enumerate(ids) if id in family.stop_ids) + 1]
    monkeypatch.setattr(generate, "_steps", lambda *_: ((id,) for id in ids))
    said: Any = list(generate.stream(None, family, [{"role": "user", "content": "Hi"}], generate.Sampling()))
    assert "".join(said) == family.parse(ids).text and all(said)


def test_a_format_of_ones_own_with_a_gap(tmp_path):
    form = Form(user="Q: {content}\n", assistant="A: {content} \n {stop}", stop="<|im_end|>")
    template = families.open_template(tiny.tokenizer(tmp_path), form)
    assert template._around[1] == " \n "
    all_laws(template, seed=3)

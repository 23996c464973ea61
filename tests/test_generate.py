"""The decoding path's laws: the cache and the padding change nothing, stop marks end an answer, a seed repeats it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glmtune
from glmtune import families, generate
from glmtune.errors import UserError
from glmtune.generate import Sampling
from glmtune.loaded import Loaded

from . import tiny

QUESTIONS = ["Where is the cat?", "a", "The sea and the mat, and what the user said about 42?", "你好", "Where is the answer now?"]


@pytest.fixture(scope="module")
def loaded(tiny_model) -> Loaded:
    return glmtune.load(tiny_model, dtype=torch.float32)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@torch.no_grad()
def by_full_forwards(loaded: Loaded, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: every token from a forward over everything before it."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in loaded.template.stop_ids:
            break
    return ids[len(prompt) :]


class Script(torch.nn.Module):
    """A causal model whose next token is the one after this in a fixed text, and logits 0 elsewhere."""

    def __init__(self, tokens: list[int], start: int, vocab: int = 352):
        super().__init__()
        self.tokens, self.start, self.vocab = tokens, start, vocab
        self.embedding = torch.nn.Embedding(vocab, 1)
        self.config = tiny_config()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids, position_ids, **_: Any) -> Any:
        at = int(position_ids[0, -1]) - self.start + 1
        logits = torch.zeros(len(input_ids), 1, self.vocab)
        logits[:, :, self.tokens[min(at, len(self.tokens) - 1)]] = 50.0
        return SimpleNamespace(logits=logits)


def tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=1, max_position_embeddings=512)


def scripted(template: Any, tokens: list[int], question: str = "x") -> Loaded:
    """A model that answers `question` with exactly these tokens."""
    start = len(template.prompt(ask(question)))
    return Loaded(Script(tokens, start), None, template, [])


# --- the cache and the padding change nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS[:3])
def test_cached_decoding_is_argmax_over_full_forwards(loaded, question):
    prompt = loaded.template.prompt(ask(question))
    expected = by_full_forwards(loaded, prompt, 24)
    made = [
        tokens[0] for tokens in generate._steps(loaded.model, [prompt], loaded.template.stop_ids, 0, Sampling(max_new_tokens=24))
    ]
    assert made == expected and len(expected) > 4


def test_a_padded_batch_answers_as_single_rows_do(loaded):
    prompts = [loaded.template.prompt(ask(question)) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    alone = [loaded.template.parse(by_full_forwards(loaded, prompt, 20)).text for prompt in prompts]
    for size in (1, 2, 5):
        made = dict(generate.answer(loaded.model, loaded.template, prompts, Sampling(max_new_tokens=20), batch_size=size))
        assert [made[i] for i in range(len(prompts))] == alone


def test_every_prompt_is_answered_once_and_counted(loaded):
    prompts = [loaded.template.prompt(ask(question)) for question in QUESTIONS]
    counts: list[int] = []
    made = list(generate.answer(loaded.model, loaded.template, prompts, Sampling(max_new_tokens=2), 2, counts.append))
    assert sorted(i for i, _ in made) == [0, 1, 2, 3, 4] and counts == [2, 2, 1]


def test_an_adapter_decodes_with_a_cache_as_without(tiny_model):
    from .test_methods import with_lora

    model = with_lora(tiny_model)
    made = Loaded(model, None, families.open_template(tiny_model), [])
    prompt = made.template.prompt(ask("Where?"))
    steps = generate._steps(model, [prompt], made.template.stop_ids, 0, Sampling(max_new_tokens=12))
    assert [tokens[0] for tokens in steps] == by_full_forwards(made, prompt, 12)


# --- stop marks ----------------------------------------------------------------------------------------------------------


def test_a_stop_mark_ends_an_answer_and_is_not_printed(loaded):
    template = loaded.template
    said = template.tokens.encode("the cat sat")
    for stop in template.stop_ids:
        model = scripted(template, [*said, stop, *said])
        assert model.chat("x", max_new_tokens=30) == "the cat sat"
        prompt = template.prompt(ask("x"))
        assert list(generate.answer(model.model, template, [prompt], Sampling(max_new_tokens=30))) == [(0, "the cat sat")]


def test_rows_that_have_ended_stay_ended_while_others_go_on(loaded):
    steps = list(
        generate._steps(
            loaded.model, [loaded.template.prompt(ask(q)) for q in QUESTIONS], range(250, 352), 0, Sampling(max_new_tokens=40)
        )
    )
    rows = list(zip(*steps))
    for row in rows:
        end = next((i for i, token in enumerate(row) if token >= 250), len(row))
        assert all(token >= 0 for token in row[: end + 1]) and all(token == -1 for token in row[end + 1 :])
    assert len({row.index(-1) if -1 in row else len(row) for row in rows}) > 1


def test_max_new_tokens_is_the_most(loaded):
    steps = generate._steps(loaded.model, [loaded.template.prompt(ask("x"))], [], 0, Sampling(max_new_tokens=7))
    assert len(list(steps)) == 7


def test_streamed_and_batched_answers_are_the_same_where_a_blank_stands_before_the_stop_mark(tmp_path):
    template = families.open_template(tiny.tokenizer(tmp_path, tiny.LLAMA2, eos="</s>", bos="<s>"))
    learned = template.encode([*ask("x"), {"role": "assistant", "content": "the cat sat"}])
    model = scripted(template, [token for token in learned.labels if token != -100])
    batched = dict(generate.answer(model.model, template, [template.prompt(ask("x"))], Sampling(max_new_tokens=30)))[0]
    assert batched == "the cat sat"
    assert model.chat("x", max_new_tokens=30) == batched


# --- sampling ------------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_an_answer_and_another_seed_does_not(loaded):
    def say(**more: Any) -> str:
        return loaded.chat("Where is the cat?", temperature=1.5, max_new_tokens=24, **more)

    assert say(seed=3) == say(seed=3)
    assert say(seed=3) != say(seed=4)
    assert say() != say()  # no seed: a new draw


def test_temperature_zero_needs_no_seed(loaded):
    assert loaded.chat("a", temperature=0, seed=1, max_new_tokens=8) == loaded.chat("a", temperature=0, seed=2, max_new_tokens=8)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.45, {0}),
        (0.5, {0}),  # 0.5 of mass are reached by token 0 alone
        (0.51, {0, 2}),
        (0.79, {0, 2}),
        (0.81, {0, 2, 1}),
        (0.96, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_by_hand(top_p, kept):
    """Probabilities 0.5, 0.15, 0.3, 0.05: the smallest set of the likeliest tokens whose sum reaches top_p."""
    logits = torch.tensor([[0.5, 0.15, 0.3, 0.05]]).log().repeat(4000, 1)
    drawn = generate.pick(logits, Sampling(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == kept
    p = {0: 0.5, 1: 0.15, 2: 0.3, 3: 0.05}
    for token in kept:  # what is left is scaled up to 1
        share = p[token] / sum(p[t] for t in kept)
        assert (drawn == token).float().mean().item() == pytest.approx(share, abs=0.03)


def test_temperature_by_hand():
    """Softmax of (0, ln 3) / T: at T = 1 a quarter and three quarters, at T = 2 sqrt(3) to 1."""
    logits = torch.tensor([[0.0, 3.0]])
    logits[0, 1] = torch.log(torch.tensor(3.0))
    for temperature, share in ((1.0, 0.75), (2.0, 3**0.5 / (1 + 3**0.5)), (0.05, 1.0)):
        drawn = generate.pick(logits.repeat(4000, 1), Sampling(temperature), torch.Generator().manual_seed(1))
        assert drawn.float().mean().item() == pytest.approx(share, abs=0.03)


def test_a_nucleus_is_taken_row_by_row():
    logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    drawn = generate.pick(logits, Sampling(temperature=1.0, top_p=0.5), torch.Generator().manual_seed(0))
    assert drawn.tolist() == [1, 0, 2]


def test_the_models_own_settings_are_the_start(tiny_model, tmp_path):
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert generate.published_settings(folder) == {}
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1.7, "top_p": 0.8}))
    assert generate.published_settings(folder) == {"temperature": 1.7, "top_p": 0.8}
    model = glmtune.load(folder, dtype=torch.float32)
    same = {"temperature": 1.7, "top_p": 0.8, "seed": 5, "max_new_tokens": 20}
    assert model.chat("Where?", seed=5, max_new_tokens=20) == model.chat("Where?", **same)
    assert model.chat("Where?", temperature=0, max_new_tokens=20) != model.chat("Where?", seed=5, max_new_tokens=20)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert generate.published_settings(folder) == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; wanted 0"),
        pytest.param(
            {"temperature": float("nan")},
            "temperature is nan",
        ),
        ({"top_p": 0.0}, "top_p is 0.0; wanted more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; wanted at least 1"),
    ],
)
def test_bad_sampling_settings_are_told(loaded, given, said):
    with pytest.raises(UserError, match=said):
        loaded.chat("x", **given)


# --- streaming -----------------------------------------------------------------------------------------------------------


def test_pieces_joined_are_the_answer(loaded):
    for question in QUESTIONS:
        sampling = {"temperature": 1.2, "seed": 7, "max_new_tokens": 30}
        pieces = list(loaded.stream(ask(question), **sampling))
        assert "".join(pieces) == loaded.chat(question, **sampling)
        assert len(pieces) > 1 and all(pieces)


@pytest.mark.parametrize("text", ["你好，世界", "naïve café", "👩‍👩‍👧 family", "the 🐈 sat", "日本語 and the cat"])
def test_pieces_hold_whole_characters(loaded, text):
    """A tokenizer of bytes: every character beyond ASCII comes in several tokens."""
    tokens = loaded.template.tokens.encode(text)
    model = scripted(loaded.template, [*tokens, loaded.template.stop_ids[-1]])
    pieces = list(model.stream("x"))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 2


def test_an_answer_cut_inside_a_character_shows_what_is_there(loaded):
    tokens = loaded.template.tokens.encode("ab好")
    model = scripted(loaded.template, tokens)
    pieces = list(model.stream("x", max_new_tokens=len(tokens) - 1))
    assert "".join(pieces) == "ab\ufffd" and pieces[:2] == ["a", "b"]


def test_stream_yields_as_it_goes(loaded):
    stream = loaded.stream("Where is the cat?", temperature=1.0, seed=1, max_new_tokens=200)
    assert next(stream)
    stream.close()


# --- the system prompt and the length -----------------------------------------------------------------------------------


def test_the_runs_system_prompt_is_the_default_and_a_given_one_wins(loaded):
    with_system = Loaded(loaded.model, loaded.tokenizer, loaded.template, [], system="Speak.")
    mine = [{"role": "system", "content": "Speak."}, *ask("Where?")]
    other = [{"role": "system", "content": "Other."}, *ask("Where?")]
    assert with_system.chat("Where?", max_new_tokens=16) == loaded.chat(mine, max_new_tokens=16)
    assert with_system.chat(other, max_new_tokens=16) == loaded.chat(other, max_new_tokens=16)
    assert loaded.chat(mine, max_new_tokens=16) != loaded.chat(other, max_new_tokens=16)


def test_a_prompt_longer_than_the_model_reads_is_refused(loaded):
    fits = len(loaded.template.prompt(ask("")))
    with pytest.raises(UserError, match="this model reads 512 at most"):
        loaded.chat("e " * 600)
    room = 512 - fits - 1
    text = "Q" * room  # one token each
    assert len(loaded.template.prompt(ask(text))) == 511
    steps = generate._steps(loaded.model, [loaded.template.prompt(ask(text))], [], 0, Sampling(max_new_tokens=9))
    assert len(list(steps)) == 1  # the last position there is
    with pytest.raises(UserError, match="512 tokens"):
        loaded.chat(text + "Q")


def test_a_conversation_in_a_batch_that_is_too_long_is_refused(loaded):
    prompts = [loaded.template.prompt(ask("a")), [5] * 600]
    with pytest.raises(UserError, match="600 tokens"):
        list(generate.answer(loaded.model, loaded.template, prompts, Sampling(max_new_tokens=2)))

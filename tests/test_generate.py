"""The decoding path's laws: the cache and the padding change nothing, stop marks end an answer, a seed repeats it."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import glmtune
from glmtune import families, generate
from glmtune.cli import main
from glmtune.errors import UserError
from glmtune.generate import Sampling
from glmtune.loaded import Loaded

from . import published, tiny
from .cases import cases

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


@pytest.mark.few(1)
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


def numbers(count: int) -> torch.Tensor:
    """Random numbers as `_steps` draws them, for `pick`."""
    return torch.tensor([generate._uniform(0, row, 0) for row in range(count)], dtype=torch.float64)


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
    drawn = generate.pick(logits, Sampling(temperature=1.0, top_p=top_p), numbers(len(logits)))
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
        drawn = generate.pick(logits.repeat(4000, 1), Sampling(temperature), numbers(4000))
        assert drawn.float().mean().item() == pytest.approx(share, abs=0.03)


def test_a_nucleus_is_taken_row_by_row():
    logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    drawn = generate.pick(logits, Sampling(temperature=1.0, top_p=0.5), numbers(3))
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


# --- as transformers does it ------------------------------------------------------------------------------------------------


def by_transformers(logits: torch.Tensor, written: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [B, V] through transformers' own logits processors, in the order of its generate."""
    from transformers.generation import logits_process as of

    scores = of.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(written, logits)  # pyright: ignore
    scores = of.TemperatureLogitsWarper(sampling.temperature)(written, scores)  # pyright: ignore
    if sampling.top_k:
        scores = of.TopKLogitsWarper(sampling.top_k)(written, scores)  # pyright: ignore
    if sampling.top_p < 1:
        scores = of.TopPLogitsWarper(sampling.top_p)(written, scores)  # pyright: ignore
    return scores.softmax(-1)


def seen(written: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(len(written), size, dtype=torch.bool).scatter_(1, written, True)


@cases(150)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.floats(0.05, 3),
    st.integers(0, 50),
    st.floats(0.02, 1),
    st.floats(0.3, 3),
    st.booleans(),
)
def test_top_k_and_repetition_penalty_are_those_of_transformers(seed, size, temperature, top_k, top_p, penalty, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, size, generator=generator) * 3
    logits = logits.round() if ties and top_p == 1 else logits
    written = torch.randint(size, (3, 5), generator=generator)
    sampling = Sampling(temperature, top_p, top_k=top_k, repetition_penalty=penalty)
    made = generate.distribution(logits, sampling, seen(written, size))
    wanted = by_transformers(logits, written, sampling)
    assert torch.allclose(made.float(), wanted, atol=1e-5)
    assert torch.equal(made > 0, wanted > 0) or temperature < 0.5  # there fp32 loses the smallest


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "how", [{"do_sample": False, "repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1, "repetition_penalty": 1.7}]
)
def test_an_answer_is_that_of_transformers_generate(loaded, how):
    """The penalty counts the tokens of the question too, and stands in front of the greedy choice."""
    ids = loaded.template.prompt(ask("Where is the cat on the mat?"))
    made = loaded.model.generate(
        torch.tensor([ids]), max_new_tokens=24, eos_token_id=loaded.template.stop_ids, pad_token_id=0, **how
    )
    ours = Sampling(
        float(how["do_sample"]), top_k=how.get("top_k", 0), repetition_penalty=how["repetition_penalty"], max_new_tokens=24
    )
    steps = generate._steps(loaded.model, [ids], loaded.template.stop_ids, 0, ours)
    assert [tokens[0] for tokens in steps] == made[0, len(ids) :].tolist()


def test_padding_is_no_repetition(loaded):
    """The pad token of a shorter question in a batch is not penalised, and rows have penalties of their own."""
    prompts = [loaded.template.prompt(ask(question)) for question in QUESTIONS]
    sampling = Sampling(max_new_tokens=16, repetition_penalty=1.5)
    batched = dict(generate.answer(loaded.model, loaded.template, prompts, sampling, 5))
    assert [batched[i] for i in range(5)] == [loaded.chat(q, max_new_tokens=16, repetition_penalty=1.5) for q in QUESTIONS]


def test_a_removed_token_is_never_drawn():
    logits = torch.tensor([[0.0, 9.0, 8.0, -3.0, 8.0]])
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert set(generate.pick(logits.repeat(3, 1), Sampling(1e-300), ends).tolist()) == {1}
    assert set(generate.pick(logits.repeat(3, 1), Sampling(1.0, top_k=2), ends).tolist()) <= {1, 2, 4}
    assert generate.pick(logits.repeat(3, 1), Sampling(1.0, top_k=3, top_p=0.999), ends).tolist() == [1, 1, 4]


# --- published settings -----------------------------------------------------------------------------------------------------


def publish(tiny_model: Path, folder: Path, **found: Any) -> Path:
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0, "top_p": None}, {"temperature": 0, "top_p": 1.0}),
        ({"do_sample": True, "top_k": 20, "repetition_penalty": 1.05}, {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "repetition_penalty": 1.05}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": False, "temperature": 0.0, "top_k": 20, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"eos_token_id": 2, "do_sample": None}, {}),
    ],
)  # fmt: skip
def test_published_settings_are_used(tiny_model, tmp_path, found, wanted):
    said: list[str] = []
    assert generate.published_settings(publish(tiny_model, tmp_path / "m", **found), said.append) == wanted
    assert not said


@pytest.mark.slow
def test_a_published_temperature_of_zero_is_greedy(tiny_model, tmp_path):
    model = glmtune.load(publish(tiny_model, tmp_path / "m", do_sample=True, temperature=0.0), dtype=torch.float32)
    assert len({model.chat("Where?", max_new_tokens=16) for _ in range(4)}) == 1
    assert model.chat("Where?", max_new_tokens=16) == model.chat("Where?", temperature=0, max_new_tokens=16)


@pytest.mark.few(8)
@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty", "do_sample"])
@pytest.mark.parametrize(
    "value", ["x", "0.5", True, [], {}, -1, float("nan"), float("inf"), 10**400, -(10**400)], ids=lambda value: repr(value)[:8]
)
def test_bad_published_settings_name_their_file(tiny_model, tmp_path, capsys, name, value):
    if (name, value) in (("do_sample", True), ("top_k", 10**400)):
        pytest.skip("these can be")
    folder = publish(tiny_model, tmp_path / "m", **{"do_sample": True, name: value})
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(folder), "--prompt", "hi", "--max-new-tokens", "2"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and f"generation_config.json: {name} is" in told and "Traceback" not in told and len(told) < 400


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"do_sample": True, "min_p": 0.1}, ["min_p=0.1"]),
        (
            {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 0.1, "num_beams": 4},
            ["typical_p=0.9", "epsilon_cutoff=0.1", "num_beams=4"],
        ),
        ({"do_sample": False, "min_p": 0.1, "no_repeat_ngram_size": 3}, ["no_repeat_ngram_size=3"]),
        (
            {"penalty_alpha": 0.6, "presence_penalty": 1.5, "suppress_tokens": [1, 2]},
            ["penalty_alpha", "presence_penalty", "suppress_tokens"],
        ),
    ],
)
def test_published_settings_that_are_not_used_are_told_in_one_line(tiny_model, tmp_path, found, named):
    said: list[str] = []
    generate.published_settings(publish(tiny_model, tmp_path / "m", **found), said.append)
    assert len(said) == 1 and said[0].count("=") == len(named) and all(name in said[0] for name in named)


def test_neutral_published_settings_are_not_told(tiny_model, tmp_path):
    from transformers import GenerationConfig

    said: list[str] = []
    neutral = {
        **GenerationConfig().to_dict(),
        "num_beams": 1,
        "min_p": 0,
        "typical_p": 1.0,
        "penalty_alpha": 0.0,
        "suppress_tokens": [],
    }
    generate.published_settings(publish(tiny_model, tmp_path / "m", **{**neutral, "do_sample": True}), said.append)
    assert not said


def test_families_settings_are_used_whole(tmp_path):
    """Chinese-Alpaca and Baichuan publish theirs in code."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    folder = published.FAMILIES["baichuan2-7b-chat"](tmp_path / "m")
    (folder / "generation_config.json").unlink()
    found = generate.published_settings(folder)
    assert found["top_k"] == 5 and found["repetition_penalty"] == 1.05 and Sampling(**found)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", -1), ("top_k", 1.5), ("repetition_penalty", 0.0), ("repetition_penalty", float("nan")), ("temperature", "1"),
                        ("max_new_tokens", 2.0), ("top_p", None)]
)  # fmt: skip
def test_bad_options_of_sampling_are_told(loaded, name, value):
    with pytest.raises(UserError, match=f"{name} is"):
        loaded.chat("x", **{name: value})


# --- numbers that are not finite ----------------------------------------------------------------------------------------------


def broken(folder: Path, tiny_model: Path, value: float) -> Path:
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.few(1)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_numbers_that_are_not_finite_are_told(tiny_model, tmp_path, capsys, value, temperature):
    folder = broken(tmp_path / "m", tiny_model, value)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    for command in (
        ["chat", str(folder), "--prompt", "hi"],
        ["predict", str(folder), str(rows), "--out", str(tmp_path / "o.jsonl")],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--temperature", temperature, "--max-new-tokens", "4"])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and "the model's numbers are not finite (fp16? damaged?)" in told and "Traceback" not in told
    assert not (tmp_path / "o.jsonl").exists()


def test_a_pipe_to_a_model_whose_numbers_are_not_finite_ends(tiny_model, tmp_path, capsys, monkeypatch):
    folder = broken(tmp_path / "m", tiny_model, float("nan"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\nhello\n"), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(folder)])
    assert ended.value.code == 2 and capsys.readouterr().err.count("not finite") == 1


def test_samples_of_a_training_tell_numbers_that_are_not_finite(tiny_model, tmp_path, capsys):
    folder = broken(tmp_path / "m", tiny_model, float("nan"))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    with pytest.raises(SystemExit) as ended:
        main(["train", f"model={folder}", f"data={rows}", f"out={tmp_path / 'run'}", "optim.steps=1", f"samples=[{rows}]"])
    assert ended.value.code == 2 and "numbers are not finite" in capsys.readouterr().err


# --- configs that make no sense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": [1]},
        {"sliding_window": "x"},
        {"sliding_window": -3},
        {"sliding_window": 1.5},
        {"attention_chunk_size": []},
        {"layer_types": 5},
        {"max_position_embeddings": "512"},
    ],
)
def test_a_config_that_makes_no_cache_is_told(changed):
    model = Script([5], 0)
    for name, value in changed.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(UserError, match=r"config\.json"):
        list(generate._steps(model, [[1, 2]], [], 0, Sampling(max_new_tokens=2)))


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

"""A file of answers: stopped and continued it is the straight one bit for bit, and answers of something else are never taken over."""

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import glmtune
from glmtune import data, methods
from glmtune.cli import main
from glmtune.errors import UserError
from glmtune.generate import Sampling
from glmtune.loaded import Loaded
from glmtune.predict import fingerprint, predict
from glmtune.run import Lora, Prefix, Source

from . import tiny
from .cases import cases

GREEDY = Sampling(max_new_tokens=8)
DRAWN = Sampling(temperature=1.3, top_p=0.95, max_new_tokens=8, seed=3, top_k=40, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def loaded(tiny_model) -> Loaded:
    return glmtune.load(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Loaded:
    return glmtune.load(tiny.llama(tmp_path_factory.mktemp("other") / "model", seed=9), dtype=torch.float32)


def questions(folder: Path, count: int = 11, text: str = "Where is the cat") -> Path:
    items = [{"instruction": f"{text} {i}? " + "the sea " * (i * 5 % 4)} for i in range(count)]
    return tiny.write_rows(folder / "rows.jsonl", items)


def rows(path: Path) -> list[Any]:
    return data.load([Source(path=str(path))], want="prompts").rows


class Stop(Exception):
    pass


def stopped(loaded: Loaded, asked: list[Any], out: Path, sampling: Sampling, after: int, batch_size: int = 3) -> Path:
    """The .part of a prediction that was stopped after so many batches."""
    batches = []

    def done(count: int) -> None:
        batches.append(count)
        if len(batches) > after:  # the first call tells what was kept
            raise Stop

    with pytest.raises(Stop):
        predict(loaded, asked, out, sampling, batch_size, done)
    return out.with_name(out.name + ".part")


def straight(loaded: Loaded, asked: list[Any], folder: Path, sampling: Sampling, batch_size: int = 3) -> bytes:
    out = folder / "straight.jsonl"
    out.unlink(missing_ok=True)
    predict(loaded, asked, out, sampling, batch_size)
    return out.read_bytes()


# --- continued = straight -----------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize(("after", "lines"), [(1, None), (2, None), (2, 5), (3, 2)])
def test_a_continued_prediction_has_the_bytes_of_a_straight_one(loaded, tmp_path, sampling, after, lines):
    """lines: so many of the .part are left, as when it was stopped within a batch."""
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    part = stopped(loaded, asked, out, sampling, after)
    kept = part.read_bytes().splitlines(keepends=True)[:lines]
    part.write_bytes(b"".join(kept))
    counts: list[int] = []
    assert predict(loaded, asked, out, sampling, 3, counts.append) == len(asked) - (len(kept) - 1)
    assert out.read_bytes() == straight(loaded, asked, tmp_path, sampling)
    assert sum(counts) == len(asked) and not part.exists()


def test_a_draw_depends_on_seed_row_and_position_alone(loaded, tmp_path):
    """Not on the rows beside it; and equal questions in the same place of two batches are answered differently."""
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "Where is it?"}] * 6)
    made = {size: straight(loaded, rows(path), tmp_path, DRAWN, size) for size in (1, 2, 3, 6)}
    assert len(set(made.values())) == 1
    texts = [json.loads(line)["prediction"] for line in made[2].splitlines()]
    assert len(set(texts)) == 6


def test_another_batch_size_continues(loaded, tmp_path):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    stopped(loaded, asked, out, GREEDY, 2)
    assert predict(loaded, asked, out, GREEDY, 1) == len(asked) - 6


# --- whose answers they are ---------------------------------------------------------------------------------------------------


def test_a_prediction_goes_on_with_the_date_it_began_with(tmp_path):
    """The model's template writes the date into prompts; the next day the same call ends with the bytes of the first day."""
    dated = "{{ strftime_now('%d %b %Y') }}" + tiny.CHATML
    begun = glmtune.load(tiny.llama(tmp_path / "m", dated), dtype=torch.float32)
    asked = rows(questions(tmp_path))
    days = [replace(begun, template=begun.template.at(datetime.datetime(2026, 3, day, 9))) for day in (1, 2)]
    wanted, other = (straight(one, asked, tmp_path, GREEDY) for one in days)
    assert wanted != other  # so that the date tells
    stopped(days[0], asked, tmp_path / "out.jsonl", GREEDY, 2)
    said = []
    predict(days[1], asked, tmp_path / "out.jsonl", GREEDY, 3, say=said.append)
    assert (tmp_path / "out.jsonl").read_bytes() == wanted and "01 Mar 2026" in said[0]


def refuses(loaded: Loaded, asked: list[Any], out: Path, sampling: Sampling, word: str) -> None:
    part = out.with_name(out.name + ".part")
    before = part.read_bytes()
    with pytest.raises(UserError, match=word) as told:
        predict(loaded, asked, out, sampling, 3)
    assert "remove it, or choose another --out" in str(told.value) and "\n" not in str(told.value)
    assert part.read_bytes() == before and not out.exists()


def test_answers_of_another_model_are_not_taken_over(loaded, other, tmp_path):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    stopped(loaded, asked, out, GREEDY, 1)
    refuses(other, asked, out, GREEDY, "another model")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(max_new_tokens=9), "other settings"),
        (Sampling(max_new_tokens=8, temperature=0.5), "other settings"),
        (Sampling(max_new_tokens=8, repetition_penalty=1.2), "other settings"),
    ],
)
def test_answers_of_other_settings_are_not_taken_over(loaded, tmp_path, sampling, word):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    stopped(loaded, asked, out, GREEDY, 1)
    refuses(loaded, asked, out, sampling, word)
    predict(loaded, asked, out, Sampling(max_new_tokens=8, seed=7), 3)  # a seed changes nothing where nothing is drawn


@pytest.mark.parametrize("changed", ["seed", "top_p", "top_k"])
def test_answers_drawn_otherwise_are_not_taken_over(loaded, tmp_path, changed):
    from dataclasses import replace

    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    stopped(loaded, asked, out, DRAWN, 1)
    refuses(loaded, asked, out, replace(DRAWN, **{changed: {"seed": 4, "top_p": 0.5, "top_k": 3}[changed]}), "other settings")


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [2, 11, 12])
def test_answers_to_other_questions_are_not_taken_over(loaded, tmp_path, count):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    part = stopped(loaded, asked, out, GREEDY, 3)
    part.write_bytes(b"".join(line for line in part.read_bytes().splitlines(keepends=True) if b'"row": 0' not in line))
    refuses(
        loaded, rows(questions(tmp_path, count, "Who is" if count == 11 else "Where is the cat")), out, GREEDY, "other questions"
    )


def test_another_system_prompt_is_another_question(loaded, tmp_path):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    stopped(loaded, asked, out, GREEDY, 1)
    other = data.load([Source(path=str(tmp_path / "rows.jsonl"))], want="prompts", system="Be long.").rows
    refuses(loaded, other, out, GREEDY, "system prompt")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "first", [{"header": "0123abcd"}, {"format": 1}, {"format": 99, "model": "", "questions": "", "sampling": {}}, {}, 5, None]
)
def test_a_part_that_does_not_say_whose_answers_it_holds_is_refused(loaded, tmp_path, first):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    part = stopped(loaded, asked, out, GREEDY, 1)
    part.write_bytes(json.dumps(first).encode() + b"\n" + part.read_bytes().split(b"\n", 1)[1])
    refuses(loaded, asked, out, GREEDY, "whose answers it holds|another glmtune")


@pytest.mark.slow
def test_a_part_without_answers_is_begun_anew(loaded, other, tmp_path):
    """Nothing is lost, whoever began it."""
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    part, wanted = stopped(loaded, asked, out, GREEDY, 1), straight(other, asked, tmp_path, GREEDY)
    for left in (part.read_bytes().split(b"\n")[0] + b"\n", b"", b"\0" * 40, b"\xe4\xbd", b"null\nnull"):
        part.write_bytes(left)
        assert predict(other, asked, out, GREEDY, 3) == len(asked)
        assert out.read_bytes() == wanted
        out.unlink()


# --- the fingerprint ----------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_model_is_the_same_model(tiny_model, loaded, tmp_path):
    assert fingerprint(glmtune.load(shutil.copytree(tiny_model, tmp_path / "copy"), dtype=torch.float32).model) == fingerprint(
        loaded.model
    )


@cases(8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_number_anywhere_makes_another_model(loaded, data):
    held = dict(loaded.model.named_parameters())
    tensor = held[data.draw(st.sampled_from(sorted(held)))].data.view(-1)
    i = data.draw(st.integers(0, tensor.numel() - 1))
    before, old = fingerprint(loaded.model), tensor[i].clone()
    tensor[i] = torch.nextafter(old, torch.tensor(9.0))
    changed = fingerprint(loaded.model)
    tensor[i] = old
    assert changed != before == fingerprint(loaded.model)


@pytest.mark.slow
def test_adapter_precision_quantisation_and_config_make_another_model(tiny_model, tmp_path):
    def load(**how: Any) -> Loaded:
        return glmtune.load(tiny_model, **{"dtype": torch.float32, **how})

    marks = {"plain": fingerprint(load().model), "bf16": fingerprint(load(dtype=torch.bfloat16).model)}
    marks |= {quant: fingerprint(load(quant=quant).model) for quant in ("int8", "nf4")}
    for name, options in {"lora": Lora(rank=2), "dora": Lora(rank=2, dora=True), "prefix": Prefix(num_virtual_tokens=2)}.items():
        model = load().model
        methods.attach(model, options, 0)
        marks[name] = fingerprint(model)
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] += 1e-3  # trained on
        marks[f"{name}, trained on"] = fingerprint(model)
        if name == "lora":
            next(iter(methods.blocks(model).values())).scaling *= 2
            marks["scaled"] = fingerprint(model)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    marks["config"] = fingerprint(glmtune.load(copy, dtype=torch.float32).model)
    assert len(set(marks.values())) == len(marks)


def test_a_switched_adapter_is_noticed(tiny_model, tmp_path):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    model = glmtune.load(tiny_model, dtype=torch.float32)
    stopped(model, asked, out, GREEDY, 1)
    methods.attach(model.model, Lora(rank=2), 0)
    refuses(model, asked, out, GREEDY, "another model")
    model.use(None)
    predict(model, asked, out, GREEDY, 3)


# --- damaged .part ------------------------------------------------------------------------------------------------------------

DAMAGED = [
    b"null", b"5", b"[]", b'{"row": 1}', b'{"prediction": "x"}', b"\0\0\0\0", b'{"row": 99, "prediction": "x"}', b'{"row": -1, "prediction": "x"}',
    b'{"row": true, "prediction": "x"}', b'{"row": "1", "prediction": "x"}', b'{"row": 1.0, "prediction": "x"}', b'{"row": 2, "prediction": null}',
    b'{"row": 2, "prediction": 5}', b'{"row": 2, "prediction": "\xe4\xbd', b'{"row": 2, "prediction": "\xe4\xbd"}', b'{"row": 2, "predic', b"",
    b'{"row": 2, "prediction": "\\ud800"}', b"[" * 100_000, b"\xff\xfe", b'{"row": ' + b"9" * 5000 + b', "prediction": "x"}', b"NaN", b"\r",
]  # fmt: skip


def continues_with(loaded: Loaded, folder: Path, damage: Callable[[list[bytes]], list[bytes]], end: bytes = b"\n") -> str:
    """Damages the lines behind the first of a stopped prediction, and continues. Gives what was said."""
    asked, out = rows(questions(folder)), folder / "o.jsonl"
    out.unlink(missing_ok=True)
    part = stopped(loaded, asked, out, GREEDY, 2)
    head, *kept = part.read_bytes().splitlines()
    lines = damage(kept)
    part.write_bytes(b"\n".join([head, *lines]) + end)
    said: list[str] = []
    assert predict(loaded, asked, out, GREEDY, 3, say=said.append) == len(asked) - len({*kept} & {*lines})
    assert out.read_bytes() == straight(loaded, asked, folder, GREEDY)
    return "".join(said)


@pytest.mark.few(1)
@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line)[2:30])
def test_a_damaged_line_costs_its_own_answer_only(loaded, tmp_path, line):
    assert "1 damaged line is left out" in continues_with(loaded, tmp_path, lambda kept: [*kept[:2], line, *kept[3:]])
    continues_with(loaded, tmp_path, lambda kept: [*kept, line], end=b"")


@cases(8, quick=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sampled_from(DAMAGED), st.integers(0, 5)), max_size=9), st.booleans())
def test_a_part_of_any_lines_continues_with_what_is_whole(loaded, tmp_path, lines, ended):
    continues_with(loaded, tmp_path, lambda kept: [kept[i] if isinstance(i, int) else i for i in lines], b"\n" if ended else b"")


@pytest.mark.slow
def test_a_part_cut_at_any_byte_continues(loaded, tmp_path):
    asked, out = rows(questions(tmp_path, 3)), tmp_path / "o.jsonl"
    part = stopped(loaded, asked, out, GREEDY, 1, batch_size=1)
    head = part.read_bytes().split(b"\n")[0] + b"\n"
    whole = head + json.dumps({"row": 0, "prediction": "你\u2028好"}, ensure_ascii=False).encode() + b"\n"
    for cut in range(len(head), len(whole) + 1, 3):
        part.write_bytes(whole[:cut])
        made = predict(loaded, asked, out, GREEDY, 3)
        assert made == (2 if cut >= len(whole) - 1 else 3)
        out.unlink()


@pytest.mark.few(1)
@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\u2029", "\x0b", "\x1c", "\r", "\r\n"])
def test_marks_of_a_line_inside_an_answer_are_text(loaded, tmp_path, mark):
    asked, out = rows(questions(tmp_path)), tmp_path / "o.jsonl"
    part = stopped(loaded, asked, out, GREEDY, 2)
    head, first, *kept = part.read_bytes().splitlines(keepends=True)
    first = json.dumps({**json.loads(first), "prediction": f"a{mark}b"}, ensure_ascii=False).encode() + b"\n"
    part.write_bytes(b"".join([head, first, *kept]))
    said: list[str] = []
    assert predict(loaded, asked, out, GREEDY, 3, say=said.append) == len(asked) - 6 and not said
    assert f"a{mark}b" in [json.loads(line)["prediction"] for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_row_with_two_different_answers_is_answered_again(loaded, tmp_path):
    other = b'{"row": 10, "prediction": "x"}', b'{"row": 10, "prediction": "y"}'
    assert "damaged" in continues_with(
        loaded, tmp_path, lambda kept: [*(line for line in kept if b'"row": 10,' not in line), *other]
    )


def test_a_row_comes_back_with_whatever_its_other_keys_hold(loaded, tmp_path):
    """Half a surrogate pair in a key that no question is made of: it stopped the writing, once all answers were there."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "hi", "note": "\\ud800 \u2028 你"}\n', encoding="utf-8")
    predict(loaded, rows(tmp_path / "rows.jsonl"), tmp_path / "o.jsonl", GREEDY)
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))["note"] == "\ud800 \u2028 你"


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_refuses_another_model_in_one_line(tiny_model, loaded, tmp_path, capsys):
    path, out = questions(tmp_path), tmp_path / "o.jsonl"
    stopped(loaded, rows(path), out, GREEDY, 1)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(model), str(path), "--out", str(out), "--max-new-tokens", "8"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "o.jsonl.part holds answers of another model" in told and "Traceback" not in told
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tiny_model), str(path), "--out", str(out), "--max-new-tokens", "8", "--batch-size", "3"])
    assert ended.value.code == 0
    assert out.read_bytes() == straight(loaded, rows(path), tmp_path, GREEDY)

"""The contract that stages hang on: rows are whole, columns travel, a step's loss is named sums over named denominators, ranks share a step."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmtune import batch, families, plan, run, stages, tokenise
from glmtune.errors import Interrupted
from glmtune.loop import Loop
from glmtune.options import Options
from glmtune.progress import Screen
from glmtune.records import Column, Conversation, Example, Turn
from glmtune.run import Source, load_run
from glmtune.runfolder import read_jsonl
from glmtune.session import Session
from glmtune.settings import resolve
from glmtune.sources import find
from glmtune.stages import Limits, Stage, Tally, Terms
from glmtune.store import Block, Chosen, Store, Writer
from glmtune.training import train
from glmtune.world import World

from . import published, tiny
from .cases import cases

# --- rows are whole -----------------------------------------------------------------------------------------------------------

POLICIES = ("skip", "cut-left-turns", "cut-answer")
words = st.text("ab ", min_size=1, max_size=30).filter(str.strip)


@st.composite
def preference_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for number in range(draw(st.integers(1, 7))):
        turns = [{"role": "user", "content": f"q{number} {draw(words)}"}]
        for _ in range(draw(st.integers(0, 2))):
            turns += [{"role": "assistant", "content": draw(words)}, {"role": "user", "content": draw(words)}]
        rows.append({"prompt": turns, "chosen": "c" + draw(words), "rejected": "r" + draw(words)})
    return rows


@pytest.fixture(scope="module")
def template(tiny_model: Path):
    return families.open_template(tiny_model, "auto")


@cases(60, derandomize=True)
@given(
    rows=preference_rows(),
    policy=st.sampled_from(POLICIES),
    longest=st.integers(40, 130),
    size=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_a_pair_is_whole_in_every_step(tmp_path_factory, template, rows, policy, longest, size, seed):
    path = tiny.write_rows(tmp_path_factory.mktemp("pairs") / "rows.jsonl", rows)
    wanted = tokenise.Wanted(find([Source(path=str(path))]), "dpo", template, Limits(longest, policy))
    try:
        store = tokenise.tokenised(wanted)
    except Exception as error:
        assert "can be trained on" in str(error)  # every row was left out
        return
    chosen = Chosen.rows_of(store, whole=True)
    # Every row is used whole or counted as left out. No turns are cut where "rows" are counted as whole.
    left_out = sum(count for why, count in store.about["counts"].items() if "left out" in why and "turns left out" not in why)
    assert chosen.num_rows + left_out == len(rows)
    seen = []
    for step in range(batch.steps_per_epoch(chosen.num_rows, size)):
        held = batch.rows_of_step(step, chosen.num_rows, size, seed)
        assert len(held) == min(size, chosen.num_rows - step * size)
        seen += held
        for first, second in chosen.sequences_of(held):
            better, worse = chosen[first], chosen[second]
            assert (better.columns, worse.columns) == ({"chosen": 1}, {"chosen": 0}) and better.where == worse.where
            start = better.weights.index(1.0)  # one question, then what is learned
            assert start == worse.weights.index(1.0) and better.ids[: start + 1] == worse.ids[: start + 1]
            assert max(len(better.ids), len(worse.ids)) <= longest
    assert sorted(seen) == list(range(chosen.num_rows))


@cases(80, derandomize=True)
@given(
    groups=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=12),
    room=st.integers(8, 120),
    padded=st.booleans(),
    together=st.booleans(),
    ranks=st.integers(1, 4),
)
def test_micro_batches_hold_every_sequence_once_and_are_equally_many(groups, room, padded, together, ranks):
    lengths = [length for group in groups for length in group]
    ends = [sum(map(len, groups[: i + 1])) for i in range(len(groups))]
    rows = [list(range(end - len(group), end)) for group, end in zip(groups, ends)]
    plans = [batch.micro_batches(rows, lengths, room, padded, together, rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in plans}) == 1
    assert sorted(i for one in plans for part in one for i in part) == list(range(len(lengths)))
    for one in plans:
        for part in one:
            cost = len(part) * max((lengths[i] for i in part), default=0) if padded else sum(lengths[i] for i in part)
            assert cost <= room or len(part) == 1 or (together and any(set(part) == set(row) for row in rows))
            if together:
                assert all(set(row) <= set(part) or not set(row) & set(part) for row in rows)


def test_a_chat_whose_history_is_context_is_one_row(tmp_path):
    """ChatGLM2 learns each answer in a sequence of its own; batches are made of conversations all the same."""
    model = published.FAMILIES["chatglm2-6b"](tmp_path / "m")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(5, turns=3))
    made = plan.make(load_run(None, [f"model={model}", f"data={rows}", "out=x", "optim.batch_size=2", "samples=[]"]))
    assert made.examples.num_rows == 5 and len(made.examples) == 15
    assert resolve(made)["steps"] == 9  # 3 epochs of ceil(5 / 2)
    assert made.examples.sequences_of([1]) == [[3, 4, 5]]


@pytest.mark.few(1)
@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_policy_a_row_of_several_sequences_is_whole_or_left_out(tmp_path, policy):
    published.FAMILIES["chatglm2-6b"](tmp_path / "m")
    _, template = families.load_tokenizer(tmp_path / "m")
    turns = [Turn(role, f"{role} {i} " + "word " * 6 * i) for i in range(4) for role in ("user", "assistant")]
    whole = [len(template.encode(part).ids) for part in template.split(Conversation(tuple(turns)))]
    for longest in range(min(whole), max(whole) + 2, 5):
        tally = Tally(rows=1)
        made = stages.encode_conversation(template, Conversation(tuple(turns), "a:1"), Limits(longest, policy), tally)
        assert len(made) in (0, len(whole)) and all(len(example.ids) <= longest for example in made)
        said = [why for why in tally.counts if "further sequences" not in why]
        assert sum(tally.counts[why] for why in said) == (0 if longest >= max(whole) else 1), tally.counts


# --- columns travel -----------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = {
    "label": Column("row", "int8"), "old": Column("token", "float32"), "score": Column("sequence", "float64"), "row": Column("row", "json"),
    "note": Column("sequence", "json"),
}  # fmt: skip


@st.composite
def rows_with_columns(draw: st.DrawFn) -> list[list[Example]]:
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        shared = {"label": draw(st.integers(-128, 127)), "row": draw(values)}
        row = []
        for place in range(draw(st.integers(1, 3))):
            ids = draw(st.lists(st.integers(0, 300), min_size=1, max_size=5))
            own = {
                "old": draw(st.lists(st.floats(width=32, allow_nan=False), min_size=len(ids), max_size=len(ids))),
                "score": draw(st.floats(allow_nan=False)),
                "note": draw(values),
            }
            columns = {**shared, **own} if place == 0 else {**shared, **own, "row": None}
            row.append(Example(ids, [*ids[1:], 7], [1.0] * len(ids), "f:1", columns))
        rows.append(row)
    return rows


@cases(50, derandomize=True)
@given(blocks=st.lists(rows_with_columns(), min_size=1, max_size=3))
def test_a_store_gives_every_column_back(tmp_path_factory, blocks):
    made, number = [], 0
    for block in blocks:
        numbered = []
        for row in block:
            numbered += [(number, 1, example) for example in row]
            number += 1
        made.append(Block.of(numbered, COLUMNS))
    flat = [example for block in blocks for row in block for example in row]
    writer = Writer(tmp_path_factory.mktemp("store") / "s", COLUMNS)
    for block in made:
        writer.add(block)
    stored, held = writer.done({"key": "k"}), Store.in_memory(made, {"key": "k"})
    assert list(stored) == list(held) == flat and stored.digest == held.digest
    again = Store.open(stored.folder)  # type: ignore[arg-type]
    assert again is not None and list(again) == flat and again.columns == COLUMNS
    # ... and into a batch: a value a row, a sequence, a learned token.
    chosen = Chosen.rows_of(again, whole=True)
    rows = chosen.sequences_of(range(chosen.num_rows))
    places = [i for row in rows for i in row]
    row_of = [number for number, row in enumerate(rows) for _ in row]
    micro = batch.collate([chosen[i] for i in places], places, 0, True, row_of, COLUMNS)
    assert micro.num_rows == len(rows) and micro.columns["row"] == [chosen[row[0]].columns["row"] for row in rows]
    assert micro.columns["label"].tolist() == [chosen[row[0]].columns["label"] for row in rows]
    assert micro.columns["score"].tolist() == [example.columns["score"] for example in flat]
    assert micro.columns["old"].tolist() == [value for example in flat for value in example.columns["old"]]
    assert micro.columns["note"] == [example.columns["note"] for example in flat]
    assert micro.sequence_of.tolist() == [i for i, example in enumerate(flat) for _ in example.ids]
    assert micro.row_of.tolist() == [row_of[i] for i, example in enumerate(flat) for _ in example.ids]


ROWS = {
    "kto": [{"prompt": f"Where is the cat {i}?", "completion": "On the mat.", "label": i % 3 == 0} for i in range(12)],
    "grpo": [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}", "tests": [{"in": i}], "标签": "数学"} for i in range(12)],
}
READ = """
import json, sys
from glmtune.store import Store
from pathlib import Path
print(json.dumps([example.columns for example in Store.open(Path(sys.argv[1]))]))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("stage", ROWS)
def test_labels_references_and_other_keys_come_back_in_another_process(tiny_model, tmp_path, monkeypatch, stage):
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "cache"))
    path = tiny.write_rows(tmp_path / "rows.jsonl", ROWS[stage])
    columns = {"prompt": "question", "response": "answer"} if stage == "grpo" else None
    wanted = tokenise.Wanted(
        find([Source(path=str(path), columns=columns)]), stage, families.open_template(tiny_model, "auto"), Limits(200, "error")
    )
    first = tokenise.tokenised(wanted, keep=True)
    found = [example.columns for example in first]
    if stage == "kto":
        assert found == [{"label": int(row["label"])} for row in ROWS[stage]]
    else:
        assert found == [{"row": row, "reference": row["answer"]} for row in ROWS[stage]]
    assert [example.columns for example in tokenise.tokenised(wanted)] == found  # from the cache
    done = subprocess.run([sys.executable, "-c", READ, str(first.folder)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == found
    monkeypatch.setattr(tokenise, "PARALLEL", 4)
    monkeypatch.setattr(tokenise, "CHUNK", 3)
    again = tokenise.tokenised(wanted, folder=tmp_path / "two", workers=2)
    assert [example.columns for example in again] == found and again.digest == first.digest


# --- a step: named sums over named denominators -----------------------------------------------------------------------------------


class Twofold(Options):
    """A stage from outside: a mean over tokens, and a mean over rows of each row's log-probability weighed by a float a token."""

    kind: Literal["twofold"] = "twofold"


def encode_twofold(template: Any, row: Conversation, limits: Limits, tally: Tally) -> list[Example]:
    made = stages.encode_conversation(template, row, limits, tally)
    return [replace(one, columns={"old": [0.01 * i for i in range(len(one.ids))], "label": len(one.ids)}) for one in made]


def twofold_denominators(rows: Any) -> dict[str, float]:
    return {**stages.learned_weight(rows), "rows": float(len(rows))}


def twofold_loss(forward: Any, micro: batch.Batch) -> Terms:
    logps = forward.logps(micro)
    rows = torch.zeros(micro.num_rows).index_add(0, micro.row_of, logps * micro.columns["old"])
    sums = {"nll": -(logps * micro.weights).sum(), "rows": (rows - 0.1 * micro.columns["label"]).square().sum() * 1e-3}
    return Terms(sums, {"label": (float(micro.columns["label"].sum()), micro.num_rows)})


def count_steps(state: dict[str, Any], row: dict[str, Any]) -> None:
    state["steps"] = state.get("steps", 0) + 1
    row["steps seen"] = state["steps"]


@pytest.fixture
def twofold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.STAGES, "twofold", Twofold)
    stage = Stage(
        "answers", encode_twofold, twofold_loss, twofold_denominators, {"old": Column("token", "float32"), "label": Column("row", "int64")},
        after_step=count_steps,
    )  # fmt: skip
    monkeypatch.setitem(stages.STAGES, "twofold", stage)


def options(model: Path, rows: Path, out: Path, *more: str) -> Any:
    usual = ["precision=fp32", "device=cpu", "samples=[]", "report_to=[]", "stage=twofold", "optim.batch_size=8", "optim.lr=1e-2"]
    return load_run(None, [f"model={model}", f"data={rows}", f"out={out}", *usual, *more])


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(12, turns=1))


def loop_of(made: plan.Plan, out: Path, world: World | None = None) -> Loop:
    session = Session(made, resolve(made), out, Screen(), *([world] if world is not None else []))
    with torch.no_grad():  # a B of zeros has no gradient in A
        for number, parameter in enumerate(session.parameters.values()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Loop(session)


def gradient(loop: Loop, rows: list[list[int]]) -> tuple[Any, dict[str, torch.Tensor]]:
    told = loop._gradient(loop.plan.examples, rows)
    found = {name: p.grad.clone() for name, p in loop.session.parameters.items()}
    loop.session.optimizer.zero_grad()
    return told, found


def same(one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    (losses, metrics, tokens), gradients = one
    (losses2, metrics2, tokens2), gradients2 = two
    assert tokens == tokens2 and metrics == pytest.approx(metrics2) and losses == pytest.approx(losses2, rel=1e-5)
    for name, tensor in gradients.items():
        torch.testing.assert_close(gradients2[name], tensor, rtol=2e-4, atol=2e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("path", ["fused", "modules"])
def test_the_cut_into_micro_batches_changes_no_gradient(twofold, tiny_model, rows_file, tmp_path, monkeypatch, path):
    """1 x 8 rows = 4 x 2 = 2 + 6, of a stage with two denominators."""
    more = [] if path == "fused" else ["method.dora=true"]
    loop = loop_of(plan.make(options(tiny_model, rows_file, tmp_path / "out", *more)), tmp_path / "out")
    assert loop.session.forward.path == path
    rows = [[i] for i in (0, 3, 1, 7, 5, 2, 11, 9)]
    results = []
    for cut in ([8], [2, 2, 2, 2], [2, 6]):
        ends = [sum(cut[: i + 1]) for i in range(len(cut))]
        parts = [list(range(end - size, end)) for size, end in zip(cut, ends)]
        monkeypatch.setattr(batch, "micro_batches", lambda *args, parts=parts: parts)
        results.append(gradient(loop, rows))
    same(results[0], results[1])
    same(results[0], results[2])
    losses, metrics, _ = results[0][0]
    assert set(losses) == {"nll", "rows"} and metrics["label"] > 0


class Thread(World):
    """A process of several, as a thread: what is reduced meets at a barrier."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]):
        self.rank, self.size, self.shared = rank, size, shared

    def _all(self, value: Any) -> list[Any]:
        self.shared["held"][self.rank] = value
        self.shared["barrier"].wait(timeout=60)
        found = list(self.shared["held"])
        self.shared["barrier"].wait(timeout=60)
        return found

    def all_reduce(self, values: Any) -> dict[str, float]:
        found = self._all(dict(values))
        assert all(one.keys() == found[0].keys() for one in found)
        return {name: sum(one[name] for one in found) for name in found[0]}

    def agree(self, here: bool) -> bool:
        return any(self._all(here))

    def sum_gradients(self, parameters: Any) -> None:
        mine = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        summed = [torch.stack(several).sum(0) for several in zip(*self._all(mine))]
        for parameter, total in zip(parameters, summed):
            parameter.grad = total


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [8, 2])  # fewer rows than processes: one computes fillers only
def test_ranks_that_share_a_step_have_the_gradient_of_one(twofold, tiny_model, rows_file, tmp_path, size, count):
    made = plan.make(options(tiny_model, rows_file, tmp_path / "out", "optim.micro_tokens=64"))
    rows = [[i] for i in (0, 3, 1, 7, 5, 2, 11, 9)][:count]
    alone = gradient(loop_of(made, tmp_path / "out"), rows)
    shared = {"held": [None] * size, "barrier": threading.Barrier(size)}
    loops = [loop_of(made, tmp_path / "out", Thread(rank, size, shared)) for rank in range(size)]
    found: list[Any] = [None] * size

    def work(rank: int) -> None:
        found[rank] = gradient(loops[rank], rows)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        same(one, alone)


def test_terms_and_metrics_become_columns_scalars_and_curves_and_the_stage_state_is_resumed(
    twofold, tiny_model, rows_file, tmp_path
):
    more = ["optim.steps=4", "save.every_steps=1", "eval.share=0.2", "eval.every_steps=2", "report_to=[tensorboard]"]
    train(options(tiny_model, rows_file, tmp_path / "whole", *more))
    log = read_jsonl(tmp_path / "whole" / "log.jsonl")
    assert all({"loss", "nll", "rows", "label", "steps seen"} <= row.keys() for row in log)
    assert [row["steps seen"] for row in log] == [1, 2, 3, 4] and "eval_label" in log[1]
    assert all(row["loss"] == pytest.approx(row["nll"] + row["rows"]) for row in log)
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "<h3>nll" in page and "<h3>label" in page and "<h3>eval_label" not in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "whole" / "tb"))
    events.Reload()
    assert {"train/nll", "train/rows", "train/label", "train/eval_label"} <= set(events.Tags()["scalars"])

    class Stop(Screen):
        def step(self, row: dict[str, Any], total: int) -> None:
            if row["step"] == 2:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(options(tiny_model, rows_file, tmp_path / "cut", *more), screen=Stop())
    train(options(tiny_model, rows_file, tmp_path / "cut", *more), resume=True)
    timed = ("seconds", "tokens_per_second", "peak_memory_gb")
    again = read_jsonl(tmp_path / "cut" / "log.jsonl")
    assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
        {k: v for k, v in row.items() if k not in timed} for row in log
    ]


def test_a_term_named_like_a_column_of_the_log_is_refused(twofold, tiny_model, rows_file, tmp_path, monkeypatch):
    stage = stages.STAGES["twofold"]
    monkeypatch.setitem(
        stages.STAGES, "twofold", replace(stage, loss=lambda f, b: Terms(twofold_loss(f, b).sums, {"lr": (1.0, 1.0)}))
    )
    with pytest.raises(ValueError, match="calls a term or metric lr"):
        train(options(tiny_model, rows_file, tmp_path / "out", "optim.steps=1"))


@pytest.mark.few(1)
@pytest.mark.parametrize("more", [[], ["method.dora=true"], ["method=full"]], ids=["fused", "modules", "full"])
def test_logps_are_those_of_plain_transformers_and_pass_gradients(tiny_model, rows_file, tmp_path, more):
    """[N] log-probabilities on every path, and the gradient of any function of them."""
    made = plan.make(options(tiny_model, rows_file, tmp_path / "out", "stage=sft", *more))
    loop = (
        loop_of(made, tmp_path / "out") if not more or "dora" in more[0] else Loop(Session(made, resolve(made), tmp_path, Screen()))
    )
    ((micro, _),) = loop._micro_batches(made.examples, [[0], [1], [2]], {i: made.examples[i] for i in range(3)})
    logps = loop.session.forward.logps(micro)
    weigh = torch.linspace(-1, 2, len(logps))
    (logps * weigh).sum().backward()
    mine = {name: p.grad.clone() for name, p in loop.session.parameters.items()}
    loop.session.optimizer.zero_grad()
    expected = []
    for place in micro.rows:
        example = made.examples[place]
        logits = loop.session.model(input_ids=torch.tensor([example.ids])).logits[0].float()
        every = torch.log_softmax(logits, -1)[range(len(example.ids)), example.next_ids]
        expected.append(every[torch.tensor(example.weights) > 0])
    expected = torch.cat(expected)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    (expected * weigh).sum().backward()
    for name, parameter in loop.session.parameters.items():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=2e-5)


def test_no_row_is_lost_over_an_epoch_of_pairs(tiny_model, tmp_path) -> None:
    rows = [{"prompt": f"q {i}", "chosen": "yes " * (1 + i % 5), "rejected": "no"} for i in range(6)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    made = plan.make(load_run(None, [f"model={tiny_model}", f"data={path}", "out=x", "stage=dpo", "optim.batch_size=4"]))

    def steps() -> Iterator[list[list[int]]]:
        for step in range(2):
            yield made.examples.sequences_of(batch.rows_of_step(step, made.examples.num_rows, 4, 0))

    held = list(steps())
    assert [len(rows) for rows in held] == [4, 2] and sorted(i for rows in held for row in rows for i in row) == list(range(12))

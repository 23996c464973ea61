"""Tokenised once: a store gives the same sequences as the rows themselves, and a broken one is never used."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import families, plan, tokenise
from glmtune.errors import UserError
from glmtune.records import Example
from glmtune.run import Source, load_run
from glmtune.sources import find
from glmtune.stages import Limits
from glmtune.store import Block, Store, Writer

from . import tiny
from .cases import cases

sequences = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6),
        st.sampled_from([0.0, 1.0, 0.5]),
        st.integers(0, 2**31 - 1),
    ),
    max_size=8,
)


@cases(40, derandomize=True)
@given(st.lists(sequences, max_size=3))
def test_a_store_gives_back_what_was_put_into_it(tmp_path_factory, blocks):
    folder = tmp_path_factory.mktemp("store") / "s"
    examples = [
        [Example(ids, [*ids[1:], last], [weight] * len(ids), f"a:b.json:{i + 1}") for i, (ids, weight, last) in enumerate(block)]
        for block in blocks
    ]
    made = [Block.of([(i, 7 * i, example) for i, example in enumerate(block)]) for block in examples]
    flat = [example for block in examples for example in block]
    writer = Writer(folder)
    for block in made:
        writer.add(block)
    for opened in (writer.done({"key": "k"}), Store.in_memory(made, {"key": "k"})):
        assert list(opened) == flat and [len(e.ids) for e in flat] == opened.lengths.tolist()
        assert opened.arrays["learned"].tolist() == [e.num_learned for e in flat]
    again = Store.open(folder)
    assert again is not None and again.digest == Store.in_memory(made, {"key": "other"}).digest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def wanted(tiny_model: Path, tmp_path: Path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(60, 2))

    def make(**changes: Any) -> tokenise.Wanted:
        sources = find(changes.pop("sources", [Source(path=str(rows))]))
        template = families.open_template(tiny_model, changes.pop("template", "auto"))
        return tokenise.Wanted(sources, "sft", template, Limits(changes.pop("max_length", 512), "error"), **changes)

    make.rows = rows  # type: ignore[attr-defined]
    return make


def test_the_sequences_are_those_of_the_template_whatever_the_number_of_processes(wanted, cache, monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", 7)
    one = list(tokenise.tokenised(wanted(), workers=1))
    monkeypatch.setattr(tokenise, "PARALLEL", 10)
    assert list(tokenise.tokenised(wanted(), workers=3)) == one
    template = wanted().template
    from glmtune import data

    assert one == [template.encode(row) for row in data.load([Source(path=str(wanted.rows))]).rows]


def outcome(asked: tokenise.Wanted, workers: int) -> Any:
    """All that is known of a store; or the error."""
    try:
        made = tokenise.tokenised(asked, workers=workers)
    except UserError as error:
        return str(error)
    about = {name: value for name, value in made.about.items() if name != "digests"}
    return list(made), about, made.arrays["row"].tolist(), made.arrays["hash"].tolist()


GOOD = [json.dumps({"instruction": f"q {i}", "output": f"a {i}"}) for i in range(40)]
SEVERAL = json.dumps({"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]})
FILES: dict[str, tuple[list[list[str]], dict[str, Any]]] = {  # lines of every file, and options of its source
    "good": ([GOOD, GOOD[:3], GOOD[5:]], {}),
    "blank lines and an array": ([[*GOOD[:9], "", "  ", *GOOD[9:]], ["[", ",\n".join(GOOD), "]"]], {}),
    "rows of several answers": ([[*GOOD[:20], SEVERAL, *GOOD[20:], SEVERAL]], {}),
    "other keys, later": ([[*GOOD, json.dumps({"instruction": "q", "output": "a", "also": 1})], GOOD], {}),
    "at most 25": ([GOOD[:15], GOOD, GOOD], {"max_samples": 25}),
    "at most 40": ([GOOD, GOOD], {"max_samples": 40}),
    "variables": ([[*GOOD[:30], json.dumps({"instruction": "{{name}}", "output": "{{ other }}"}), *GOOD]], {}),
    "no variables": ([[*GOOD, json.dumps({"instruction": "{{nme}}", "output": "a"})]], {}),
    "broken first": ([['{"instruction"', *GOOD]], {}),
    "broken in the middle": ([[*GOOD[:19], '{"instruction": "q', *GOOD[:9], "7", '{"output": ""}', *GOOD], [*GOOD, "{}"]], {}),
    "broken last": ([GOOD, [*GOOD, '{"instruction": "q", "output": "a"']], {}),
    "a key twice": ([[*GOOD, '{"instruction": "q", "output": "a", "output": "b"}', *GOOD]], {}),
    "more bad rows than are named": ([[*GOOD, *['{"instruction": "q", "output": ""}'] * 30, *GOOD]], {}),
    "columns that come late": (
        [[*GOOD * 30, json.dumps({"instruction": "q", "output": "a", "sys": "S"})]],
        {"columns": {"prompt": "instruction", "response": "output", "system": "sys"}},
    ),
    "columns that never come, and then no file": (
        [GOOD * 30, [""]],
        {"columns": {"prompt": "instruction", "response": "output", "system": "sys"}},
    ),
    "bad rows, and then no file": ([[*GOOD, "{}"], ["[]"]], {}),
}


QUICK = ("rows of several answers", "columns that come late")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FILES])
def test_all_that_is_told_of_rows_is_the_same_whatever_the_number_of_processes(wanted, cache, tmp_path, monkeypatch, name):
    files, options = FILES[name]
    (tmp_path / "files").mkdir()
    for number, lines in enumerate(files):
        (tmp_path / f"files/{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    variables = {"name": "Xiaozhi"} if "variables" in name else None
    given = [Source(path=str(tmp_path / "files"), **options), Source(path=str(wanted.rows))]
    monkeypatch.setattr(tokenise, "CHUNK", 7)
    monkeypatch.setattr(tokenise, "PARALLEL", 10)
    one, two, three = (outcome(wanted(sources=given, variables=variables), workers) for workers in (1, 2, 3))
    assert one == two == three
    from glmtune import data

    try:
        loaded = data.load(given, variables=variables)
    except UserError as error:
        assert one == str(error)
    else:
        template = wanted().template
        assert one[0] == [template.encode(row) for row in loaded.rows] and one[1]["notes"] == loaded.notes
        assert one[1]["rows"] == len(loaded.rows) and one[2] == [*range(len(loaded.rows))]
        assert one[3] == [data.content_hash(row) for row in loaded.rows]
        assert [span["count"] for span in one[1]["spans"]] == [span.count for span in loaded.spans]


@pytest.mark.slow
def test_an_error_of_encoding_comes_before_those_of_later_rows(wanted, cache, tmp_path, monkeypatch):
    """With several processes the files are read ahead; what is told first is what stands first."""
    odd = json.dumps({"messages": [{"role": role, "content": role} for role in ("user", "assistant", "tool", "assistant")]})
    (tmp_path / "a.jsonl").write_text("\n".join([*GOOD, odd, *GOOD]))
    (tmp_path / "b.jsonl").write_text("")
    monkeypatch.setattr(tokenise, "CHUNK", 7)
    monkeypatch.setattr(tokenise, "PARALLEL", 10)
    given = [Source(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]

    def refuse(template: Any, row: Any, *rest: Any) -> Any:
        if len(row.turns) == 4:
            raise UserError(f"{row.where}: a turn that cannot be written")
        return encode(template, row, *rest)

    encode = tokenise.STAGES["sft"].encode
    monkeypatch.setitem(tokenise.STAGES, "sft", replace(tokenise.STAGES["sft"], encode=refuse))
    for workers in (1, 2, 3):
        assert outcome(wanted(sources=given), workers) == f"{tmp_path / 'a.jsonl'}:41: a turn that cannot be written"


def test_progress_is_told_by_rows_and_by_bytes(wanted, cache, monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", 7)
    monkeypatch.setattr(tokenise, "PARALLEL", 20)
    monkeypatch.setattr(tokenise, "TOLD", 30)
    for workers in (1, 2):
        told: list[tuple[int, float]] = []
        tokenise.tokenised(wanted(), workers=workers, progress=lambda *now, told=told: told.append(now))
        assert [rows for rows, _ in told] == [35, 42, 49, 56, 60]
        shares = [share for _, share in told]
        assert shares == sorted(shares) and 0.5 < shares[0] < 0.7 and shares[-1] > 0.99


def test_what_is_small_stays_in_memory_and_what_is_kept_is_found_again(wanted, cache):
    said: list[str] = []
    assert tokenise.tokenised(wanted()).folder is None and not cache.exists()
    first = tokenise.tokenised(wanted(), keep=True, say=said.append)
    second = tokenise.tokenised(wanted(), say=said.append)
    assert second.folder == first.folder and list(second) == list(first) and "from the cache" in said[-1]


def changed_file(wanted: Any) -> None:
    text = wanted.rows.read_text()
    wanted.rows.write_text(text.replace("mat", "rug", 1))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 511},
        {"template": "chatml"},
        {"system": "Be brief."},
        {"join": " "},
        {"variables": {}, "sources": "system"},
        "file",
    ],
)
def test_anything_that_sequences_follow_from_makes_them_anew(wanted, cache, change):
    first = tokenise.tokenised(wanted(), keep=True)
    if change == "file":
        changed_file(wanted)
        second = tokenise.tokenised(wanted(), keep=True)
    else:
        if change.get("sources"):
            change = {**change, "sources": [Source(path=str(wanted.rows), system="You are a cat.")]}
        second = tokenise.tokenised(wanted(**change), keep=True)
    assert second.folder != first.folder


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["cut", "byte", "index", "gone", "empty"])
def test_a_damaged_store_is_made_anew(wanted, cache, how):
    good = tokenise.tokenised(wanted(), keep=True)
    examples, folder = list(good), good.folder
    assert folder is not None
    path = folder / ("index.json" if how == "index" else "ids.bin")
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": data[:-4], "byte": data[:8] + b"\xff" + data[9:], "index": data[: len(data) // 2], "empty": b""}[how]
        )
    assert Store.open(folder) is None
    assert list(tokenise.tokenised(wanted(), keep=True)) == examples
    assert Store.open(folder) is not None


CHILD = """
import sys, time
from glmtune import tokenise, families
from glmtune.run import Source
from glmtune.stages import Limits
from glmtune.sources import find
import glmtune.store as store
tokenise.CHUNK = 5
put = store.Writer.add
def slow(self, block):
    put(self, block); print("block", flush=True); time.sleep(float(sys.argv[3]))
store.Writer.add = slow
wanted = tokenise.Wanted(find([Source(path=sys.argv[1])]), "sft", families.open_template(families.resolve(sys.argv[2])), Limits(512, "error"))
made = tokenise.tokenised(wanted, keep=True, workers=1)
print("done", made.digest, flush=True)
"""


def child(wanted: Any, model: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(wanted.rows), str(model), str(pause)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_nothing_that_is_used(wanted, cache, tiny_model):
    process = child(wanted, tiny_model, 0.2)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline().startswith("block")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in cache.iterdir() if ".part-" in path.name]
    made = tokenise.tokenised(wanted(), keep=True)
    assert len(made) == 60 and made.folder is not None and made.folder.is_dir()
    assert not [path.name for path in cache.iterdir() if ".part-" in path.name]  # and what it left is cleared away


@pytest.mark.slow
def test_two_processes_at_once_make_one_store(wanted, cache, tiny_model):
    both = [child(wanted, tiny_model, 0.02) for _ in range(2)]
    ends = [process.communicate(timeout=60)[0].splitlines()[-1] for process in both]
    assert ends[0] == ends[1] and ends[0].startswith("done")
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_done_without(wanted, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(tokenise.tokenised(wanted(), keep=False)) == 60


def test_a_tokenised_folder_is_data_of_its_own(tiny_model, tmp_path, cache, wanted):
    """Made with --to, moved, and used where the rows are not."""
    run = load_run(None, [f"model={tiny_model}", f"data={wanted.rows}", f"out={tmp_path / 'out'}"])
    _, asked = plan.wanted(run, lambda text: None)
    made = tokenise.tokenised(asked, tmp_path / "tokens")
    (tmp_path / "tokens").rename(tmp_path / "elsewhere")
    wanted.rows.unlink()

    def used(*more: str) -> plan.Plan:
        return plan.make(
            load_run(None, [f"model={tiny_model}", f"data={tmp_path / 'elsewhere'}", f"out={tmp_path / 'out'}", *more])
        )

    assert list(used().examples) == list(made)
    for more, said in (("template=plain", "chat format"), ("stage.learn=last", "learn all"), ("max_length=99", "max_length 1024")):
        with pytest.raises(UserError, match=said):
            used(more)
    index = json.loads((tmp_path / "elsewhere/index.json").read_text())
    (tmp_path / "elsewhere/index.json").write_text(json.dumps({**index, "digests": {}}))
    with pytest.raises(UserError, match="damaged"):
        used()


def test_a_run_reads_sources_as_often_as_their_weights_say(tiny_model, tmp_path):
    a, b = (
        tiny.write_rows(tmp_path / f"{n}.jsonl", [{"instruction": f"{n} {i}", "output": f"{n}{i}"} for i in range(10)])
        for n in "ab"
    )
    settings_ = ["data=[{path: %s, weight: 2}, {path: %s, weight: 0.5}]" % (a, b), f"model={tiny_model}", f"out={tmp_path / 'out'}"]  # noqa: UP031
    made = plan.make(load_run(None, settings_))
    names = [example.where.rpartition("/")[2].split(".")[0] for example in made.examples]
    assert names.count("a") == 20 and names.count("b") == 5
    assert any("a.jsonl: 80.0% of the sequences" in note and "80.0% of the learned" in note for note in made.notes)
    assert len({e.where for e in made.examples if "/a." in e.where}) == 10


def test_the_dev_share_follows_from_content_so_that_new_rows_move_no_others(tiny_model, tmp_path):
    def dev_rows(count: int) -> tuple[set[str], set[str]]:
        rows = tiny.write_rows(tmp_path / "r.jsonl", [{"instruction": f"q {i}", "output": f"a {i}"} for i in range(count)])
        made = plan.make(load_run(None, [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'out'}", "eval.share=0.2"]))
        texts = [{json.dumps(e.ids) for e in side} for side in (made.examples, made.dev or [])]
        assert not texts[0] & texts[1]
        return texts[0], texts[1]

    before, after = dev_rows(60), dev_rows(90)
    assert before[0] <= after[0] and before[1] <= after[1] and len(before[1]) > 3


def test_training_from_a_store_touches_no_tokenizer(tiny_model, tmp_path, cache, wanted, monkeypatch):
    from glmtune import train
    from glmtune.chat import Template

    run = load_run(None, [f"model={tiny_model}", f"data={wanted.rows}", f"out={tmp_path / 'a'}", "optim.steps=2", "samples=[]"])
    _, asked = plan.wanted(run, lambda text: None)
    tokenise.tokenised(asked, tmp_path / "tokens")
    straight = train(run)
    monkeypatch.setattr(Template, "encode", None)
    stored = load_run(
        None, [f"model={tiny_model}", f"data={tmp_path / 'tokens'}", f"out={tmp_path / 'b'}", "optim.steps=2", "samples=[]"]
    )
    assert train(stored).loss == straight.loss


@pytest.mark.slow
def test_a_store_of_a_million_sequences_opens_fast_and_in_little_memory(tmp_path):
    """Opening maps files; a sequence is made when it is asked for."""
    block = Block.of([(i, i, Example([1, 2, 3], [2, 3, 3], [0.0, 1.0, 0.0], "f:1")) for i in range(1000)])
    writer = Writer(tmp_path / "big")
    for _ in range(1000):
        writer.add(block)
    opened = writer.done({"key": "k"})
    assert len(opened) == 1_000_000 and opened[999_999] == Example([1, 2, 3], [2, 3, 3], [0.0, 1.0, 0.0], "f:1")
    assert isinstance(opened.arrays["ids"], np.memmap)


def test_too_many_different_weights_are_told():
    examples = [(i, i, Example([1], [1], [i / 1000], "f:1")) for i in range(300)]
    with pytest.raises(UserError, match="different weights"):
        Block.of(examples)


def test_the_length_policy_is_told_over_all_processes(wanted, cache, monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", 7)
    monkeypatch.setattr(tokenise, "PARALLEL", 10)
    with pytest.raises(UserError, match="60 of 60 rows are longer than max_length=3"):
        tokenise.tokenised(wanted(max_length=3), workers=2)


def test_what_a_format_does_to_a_row_is_counted_once_for_the_row(wanted, cache, tmp_path):
    """Also where the row is written out again, to be cut."""
    asked = {"role": "user", "content": "What is the weather?"}
    tool = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    row = {"messages": [asked, {"role": "assistant", "content": "It is " + "very " * 300 + "fine."}], "tools": [tool]}
    path = tiny.write_rows(tmp_path / "tools.jsonl", [row] * 3)
    asked_for = replace(wanted(sources=[Source(path=str(path))]), limits=Limits(200, "cut-answer"))
    counts = tokenise.tokenised(asked_for).about["counts"]
    assert [n for why, n in counts.items() if "no tools" in why or "last answer cut" in why] == [3, 3]


def test_a_killed_worker_is_told_and_nothing_is_left(wanted, cache, monkeypatch):
    for name, value in {"CHUNK": 1, "PARALLEL": 5, "TOLD": 6}.items():
        monkeypatch.setattr(tokenise, name, value)
    others = set(psutil.Process().children())

    def kill(*_: Any) -> None:
        for one in set(psutil.Process().children()) - others:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    with pytest.raises(UserError, match="one of the 2 processes that tokenise was killed"):
        tokenise.tokenised(wanted(), workers=2, progress=kill, keep=True)
    assert not list(cache.iterdir())
    assert len(tokenise.tokenised(wanted(), workers=2, keep=True)) == 60


def test_more_turns_than_tokens_allowed_names_no_length_to_paste(wanted, cache, tmp_path):
    turns = [{"role": role, "content": "the cat"} for _ in range(40) for role in ("user", "assistant")]
    path = tiny.write_rows(tmp_path / "long.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match="the longest has more than 80 ") as error:
        tokenise.tokenised(wanted(sources=[Source(path=str(path))], max_length=20))
    assert "max_length=80" not in str(error.value)

"""The verdict on a row is its own: damaged rows among good ones, however many and in whatever order, take no good row with them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmtune import check, convert, data, forms, store
from glmtune.errors import UserError
from glmtune.reading import Item
from glmtune.records import Example
from glmtune.run import Source

from .cases import cases


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(rows: list[Any], layout: str = "lines") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) + "\n" if layout == "lines" else "[" + (", " if layout == "one line" else ",\n").join(lines) + "]"
    name = "rows.jsonl" if layout == "lines" else "rows.json"
    Path(name).write_text(text, encoding="utf-8")
    return name


def fixed(rows: list[Any], layout: str = "lines", **how: Any) -> tuple[list[Any], list[Any]]:
    """The rows that `--fix` keeps, and those that it removes."""
    for old in ("clean.json", "clean.json.removed.jsonl"):
        Path(old).unlink(missing_ok=True)
    check.fix([write(rows, layout)], "clean.json", **how)
    text = Path("clean.json").read_text(encoding="utf-8")
    kept = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    return kept, [json.loads(line) for line in Path("clean.json.removed.jsonl").read_text(encoding="utf-8").split("\n") if line]


def question(number: int) -> str:
    return f"Where is ship {number}?"


def talk(number: int, *roles: str) -> list[dict]:
    said = {"user": question(number), "assistant": "It is at sea.", "system": "Be short."}
    return [{"role": role, "content": said[role]} for role in roles]


# Good rows of each use, and damaged ones that are recognised as another use, as none, or only as a question.
GOOD: dict[str, Any] = {
    "ranking": lambda i: {"instruction": question(i), "input": "", "output": [f"Answer {i}, {j}." for j in range(2 + i % 4)]},
    "pair": lambda i: {"instruction": question(i), "chosen": f"At sea, {i}.", "rejected": "No idea."},
    "v1 pair": lambda i: {
        "chosen_messages": talk(i, "user", "assistant"),
        "rejected_messages": [*talk(i, "user"), {"role": "assistant", "content": "No."}],
    },
    "alpaca": lambda i: {"instruction": question(i), "input": "", "output": f"In the harbour {i}."},
    "messages": lambda i: {"messages": talk(i, "user", "assistant")},
    "v1": lambda i: {"messages": [{**one, "content": [{"type": "text", "value": one["content"]}]} for one in talk(i, "user", "assistant")]},
    "prompt": lambda i: {"prompt": question(i)},
    "text": lambda i: {"text": f"The ship {i} came late."},
    "kto": lambda i: {"prompt": question(i), "completion": "At sea.", "label": i % 2 == 0},
}  # fmt: skip
BAD: dict[str, list[Any]] = {
    "ranking": [{"output": ["only one"]}, {"output": []}, {"output": ["x", 5]}, {"output": ["same", "same"]}, {"output": [" ", "x"]},
                {"output": ["x", None]}, {"output": None}, {"outptu": ["x", "y"], "output": ...}],
    "pair": [{"chosen": ""}, {"rejected": None}, {"chosen": 4}, {"rejectd": "x", "rejected": ...}, {"chosen": ...}, {"rejected": "same", "chosen": "same"}],
    "v1 pair": [{"chosen_messages": []}, {"rejected_messages": ...}, {"chosen_messages": None}],
    "alpaca": [{"output": ""}, {"output": 5}, {"output": ["only"]}, {"output": ...}, {"weight": 1e308}, {"images": ["a.jpg"]}, {"instruction": " "}],
    "messages": [{"messages": talk(0, "user")}, {"messages": []}, {"messages": "none"}, {"audios": "a.wav"}, {"messages": talk(0, "assistant")}],
    "v1": [{"messages": [{"role": "user", "content": [{"type": "image_url", "value": "a.jpg"}]}]}, {"messages": None}],
    "prompt": [{"prompt": ""}, {"prompt": 5}, {"prompt": None}, {"image": "a.jpg"}],
    "text": [{"text": ""}, {"text": 5}, {"text": ...}, {"videos": ["a.mp4"]}],
    "kto": [{"label": "maybe", "completion": ""}, {"completion": ...}, {"completion": None}, {"prompt": ""}],
}  # fmt: skip
NOTHING: list[Any] = [{"a": 1}, [], None, '"x"', 5, "{broken", '{"instruction": "x", "output"']


def spoilt(kind: str, number: int, change: dict) -> dict:
    """A good row with some of its keys changed, or (...) gone."""
    row = {**GOOD[kind](number), **change, "id": number}
    return {key: value for key, value in row.items() if value is not ...}


@cases(25)
@given(draws=st.data(), kind=st.sampled_from(sorted(GOOD)), layout=st.sampled_from(["lines", "array"]))
def test_exactly_the_good_rows_are_kept_in_any_order(draws: st.DataObject, kind: str, layout: str) -> None:
    good = [GOOD[kind](i) for i in range(draws.draw(st.integers(1, 4)))]
    damaged = draws.draw(st.lists(st.sampled_from(BAD[kind]), max_size=8))
    rows: list[Any] = good + [spoilt(kind, 100 + i, change) for i, change in enumerate(damaged)]
    nothing = st.sampled_from(NOTHING)
    rows += draws.draw(st.lists(nothing, max_size=4) if layout == "lines" else st.lists(nothing, max_size=4, unique_by=str))
    rows = draws.draw(st.permutations(rows))
    kept, removed = fixed(rows, layout)
    assert sorted(kept, key=json.dumps) == sorted(good, key=json.dumps)
    if layout == "lines":  # in an array, where a row that is broken ends is a guess; two bad ones may be one
        assert len(kept) + len(removed) == len(rows)


@cases(12)
@given(draws=st.data(), kind=st.sampled_from(sorted(GOOD)))
def test_the_verdict_on_a_row_does_not_depend_on_the_order(draws: st.DataObject, kind: str) -> None:
    rows: list[Any] = [GOOD[kind](i) for i in range(2)]
    rows += [
        spoilt(kind, 100 + i, change)
        for i, change in enumerate(draws.draw(st.lists(st.sampled_from(BAD[kind]), max_size=5, unique_by=str)))
    ]
    rows += draws.draw(
        st.lists(st.sampled_from([{"a": 1}, {"instruction": "x"}, {"question": "x"}, {"text": "x"}, 5]), max_size=3, unique_by=str)
    )

    def verdicts(rows: list[Any]) -> dict[str, list[tuple[str, str]]]:
        found = check.check([write(rows)])["problems"]
        told = {
            json.dumps(row): [(one["kind"], one["message"]) for one in found if one["line"] == i] for i, row in enumerate(rows, 1)
        }
        return {row: [one for one in those if one[0] not in ("mixed-form", "exact-duplicate")] for row, those in told.items()}

    assert verdicts(rows) == verdicts(draws.draw(st.permutations(rows)))


PIECES = st.sampled_from(
    [
        "",
        "x",
        "Human: a\n\nAssistant: b",
        5,
        None,
        [],
        ["x"],
        ["x", "y"],
        ["x", "y", "z"],
        ["x", 5],
        [{"role": "user", "content": "q"}],
        {},
    ]
)
KEYS = ["instruction", "input", "output", "prompt", "response", "chosen", "rejected", "chosen_messages", "rejected_messages",
        "messages", "text", "label", "completion", "question", "answer", "response_0", "response_1", "better_response_id"]  # fmt: skip


@cases(100)
@given(first=st.dictionaries(st.sampled_from(KEYS), PIECES, max_size=5), draws=st.data())
def test_rows_of_one_shape_are_recognised_alike(first: dict, draws: st.DataObject) -> None:
    second = {key: draws.draw(PIECES) for key in first}
    if forms.shape(first) == forms.shape(second):
        for want in ("answers", "prompts", "text", "preferences", "labels"):
            assert forms.recognise(first, want) == forms.recognise(second, want)


# --- what trains ---------------------------------------------------------------------------------------------------------


def test_rankings_are_pairs_of_their_first_two_whatever_row_stands_first() -> None:
    rows = [{"instruction": "a", "output": ["1.", "2.", "3."]}, {"instruction": "b", "output": ["good", "bad"]}]
    for order in (rows, rows[::-1]):
        found = check.check([write(order)])
        assert found["problems"] == []
        assert "rows.jsonl: 1 rows have 3 answers, the best first: the first two are read, as chosen and rejected" in found["notes"]
        loaded = data.load([Source(path="rows.jsonl")], want="preferences")
        assert {(one.chosen.text, one.rejected.text) for one in loaded.rows} == {("1.", "2."), ("good", "bad")}
        assert any("1 rows have 3 answers" in note for note in loaded.notes)
        assert fixed(order)[0] == order
    for ranked, said in (([], "has no answers"), (["one"], "has one answer")):
        (problem,) = check.check([write([rows[1], {"instruction": "c", "output": ranked}])])["problems"]
        assert (problem["line"], problem["level"]) == (2, "error") and said in problem["message"]
    assert check.check([write(rows)], columns={"prompt": "instruction", "response": "output"})["problems"] == []
    said = convert.convert(["rows.jsonl"], "messages", "new.jsonl")
    assert "1 rows have more than two answers, the best first: the first two are written" in said


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "more",
    [
        {"images": ["a.jpg"]}, {"image": "a.jpg"}, {"videos": ["a.mp4"]}, {"video": "a.mp4"}, {"audios": ["a.wav"]}, {"audio": {"path": "a.wav"}},
        {"image_url": "x"}, {"image_path": "x"}, {"Images": [{"bytes": "x"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_with_pictures_or_sound_is_an_error_at_its_line(more: dict) -> None:
    good = {"messages": talk(1, "user", "assistant")}
    for bad in (
        {**good, **more},
        {"messages": [{**talk(1, "user")[0], **more}, talk(1, "assistant")[0]]},
        {"instruction": "<image>What?", "output": "A cat.", **more},
        {"text": "A cat.", **more},
    ):
        problems = check.check([write([good, bad, good | {"id": 3}])])["problems"] if "text" not in bad else []
        assert [(one["line"], one["kind"], one["level"]) for one in problems if one["level"] == "error"] in (
            [],
            [(2, "not-text", "error")],
        )
        want: forms.Want = "text" if "text" in bad else "answers"
        with pytest.raises(UserError, match=r"rows.jsonl:1: .*only text can be learned"):
            data.load([Source(path=write([bad]))], want=want)
    empty = {key: type(value)() for key, value in more.items()}
    assert (
        check.check([write([{**good, **empty}, {"messages": talk(2, "user", "assistant"), **dict.fromkeys(more)}])])["problems"]
        == []
    )
    (name,) = more
    if isinstance(more[name], str):  # a key that the user calls a text is one
        row = {name: "Where?", "answer": "There."}
        assert (
            data.load([Source(path=write([row]), columns={"prompt": name, "response": "answer"})]).rows[0].turns[0].text == "Where?"
        )


def test_a_mark_alone_is_text() -> None:
    assert (
        check.check([write([{"instruction": "What does <image> or <audio> mean in HTML?", "output": "Nothing."}])])["problems"]
        == []
    )


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "part",
    [
        {"type": kind, key: "a.jpg"}
        for kind in ("image_url", "video_url", "audio_url", "input_audio", "image")
        for key in ("value", "url")
    ],
    ids=str,
)
def test_parts_that_are_no_text_are_refused_by_line(part: dict) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "value": "What?"}, part]}, *talk(1, "assistant")]}
    (problem,) = check.check([write([row])])["problems"]
    assert (problem["kind"], problem["level"]) == ("not-text", "error") and part["type"] in problem["message"]


def test_llama_factorys_v1_rows_are_read() -> None:
    call = json.dumps({"name": "find", "arguments": {"ship": 3}})
    v1 = [
        {"role": "user", "content": [{"type": "text", "value": "Where is "}, {"type": "text", "value": "it?"}], "loss_weight": 0.0},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "value": "Look."}, {"type": "tool_call", "value": call}],
            "loss_weight": 1.0,
        },
        {"role": "tool", "content": [{"type": "text", "value": "late"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "It is late."}], "loss_weight": 0.5},
    ]
    (row,) = data.load([Source(path=write([{"messages": v1}]))]).rows
    assert [turn.text for turn in row.turns] == ["Where is it?", "", "late", "It is late."]
    assert row.turns[1].extra["tool_calls"] == [{"name": "find", "arguments": {"ship": 3}}]
    assert row.turns[1].extra["reasoning_content"] == "Look."
    assert [(turn.learn, turn.weight) for turn in row.turns] == [(None, 1), (None, 1), (None, 1), (True, 0.5)]
    unlearned = [{**v1[0], "loss_weight": 1.0}, {**v1[3], "loss_weight": 0}]
    (row,) = data.load([Source(path=write([{"messages": unlearned}]))]).rows
    assert [turn.learn for turn in row.turns] == [True, False]
    (pair,) = data.load([Source(path=write([GOOD["v1 pair"](1)]))], want="preferences").rows
    assert (pair.turns[-1].text, pair.chosen.text, pair.rejected.text) == (question(1), "It is at sea.", "No.")
    wants: tuple[forms.Want, ...] = ("answers", "labels")
    for want in wants:
        with pytest.raises(UserError, match="it needs a preference stage"):
            data.load([Source(path="rows.jsonl")], want=want)
    both = {"messages": [{"role": "user", "content": [{"type": "text", "value": "a", "text": "b"}]}, *talk(1, "assistant")]}
    assert "needs the key 'text' (or 'value'); it has both" in check.check([write([both])])["problems"][0]["message"]


# --- columns that are proposed ------------------------------------------------------------------------------------------------

WORDS = ["question", "frage", "prompt_text", "answer", "answer_a", "answer_b", "response", "chosen", "chosen_response", "better_answer",
         "rejected", "rejected_response", "worse", "losing_answer", "response_rejected", "id", "score", "winner", "bad_output", "Where is it?"]  # fmt: skip


@cases(20)
@given(keys=st.lists(st.sampled_from(WORDS), min_size=1, max_size=5, unique=True), suffix=st.sampled_from(["csv", "jsonl"]))
def test_no_proposal_learns_a_rejected_answer_or_loses_a_text(keys: list[str], suffix: str) -> None:
    name = f"rows.{suffix}"
    row = {key: f"text {i}" for i, key in enumerate(keys)}
    Path(name).write_text(
        json.dumps(row) if suffix == "jsonl" else f"{','.join(keys)}\n{','.join(row.values())}\n", encoding="utf-8"
    )
    for problem in check.check([name])["problems"]:
        proposed = re.search(r"columns: \{(.*?)\}", problem["message"])
        if proposed:
            columns = dict(part.split(": ") for part in proposed[1].split(", "))
            worse = [key for key in keys if re.search("reject|worse|losing|bad", key)]
            assert (
                columns.get("response") not in worse and columns.get("chosen") not in worse and columns.get("prompt") not in worse
            )
            assert not worse or "rejected" in columns
            named = [value for value in columns.values() if value in keys]
            assert len(set(named)) == len(named) and "Where is it?" not in named
            for role, pattern in (("response", "answer|response"), ("prompt", "question|prompt")):
                if columns.get(role) in keys:
                    assert sum(bool(re.search(pattern, key)) and key not in worse for key in keys) == 1, "no choice between several"


# --- files that are no list of rows ---------------------------------------------------------------------------------------------


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0]}


TABLES: dict[str, tuple[Any, str]] = {
    "rows under keys": (lambda rows: {f"row{i}": row for i, row in enumerate(rows)}, "whose values are the rows"),
    "pandas' index": (lambda rows: {str(i): row for i, row in enumerate(rows)}, "whose values are the rows"),
    "several lists": (lambda rows: {"train": rows, "test": rows[:1]}, "several lists of rows"),
    "pandas": (lambda rows: {key: {str(i): one for i, one in enumerate(column)} for key, column in columns_of(rows).items()}, "a table by columns"),
    "lists": (lambda rows: columns_of(rows), "a table by columns"),
    "split": (lambda rows: {"columns": [*rows[0]], "index": [0], "data": [[*row.values()] for row in rows]}, "a table as pandas writes it"),
}  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["alpaca", "messages", "pair", "ranking", "own keys"])
def test_a_file_that_is_no_list_of_rows_is_named_as_what_it_is(name: str, kind: str) -> None:
    make = {**GOOD, "own keys": lambda i: {"frage": question(i), "antwort": "Da."}}[kind]
    rows = [{**make(i), "source": "x"} for i in range(3)]
    if name in ("rows under keys", "pandas' index") and kind == "own keys":
        return
    table, said = TABLES[name]
    Path("rows.json").write_text(json.dumps(table(rows), indent=1), encoding="utf-8")
    (problem,) = check.check(["rows.json"])["problems"]
    assert (problem["line"], problem["kind"], problem["level"]) == (1, "unknown-form", "error")
    assert said in problem["message"] and "columns: {" not in problem["message"]
    wants: tuple[forms.Want, ...] = ("answers", "preferences")
    for want in wants:
        with pytest.raises(UserError, match=said):
            data.load([Source(path="rows.json")], want=want)
    with pytest.raises(UserError, match="nothing was written"):
        check.fix(["rows.json"], "clean.json")


@cases(20)
@given(draws=st.data(), kind=st.sampled_from(sorted(GOOD)), lines=st.booleans())
def test_a_list_under_a_key_is_read_whatever_its_first_row_is(draws: st.DataObject, kind: str, lines: bool) -> None:
    good = [GOOD[kind](i) for i in range(2)]
    rows = draws.draw(st.permutations([*good, *draws.draw(st.lists(st.sampled_from([None, 5, "x"]), max_size=2))]))
    Path("rows.json").write_text(json.dumps({"version": 1, "data": rows}, indent=1 if lines else None), encoding="utf-8")
    kept = [item.value for item in forms.open_file(Path("rows.json"), "rows.json").items if isinstance(item, Item)]
    assert [row for row in kept if row in good] == [row for row in rows if row in good]


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("between", [", ", ",\n"])
def test_a_broken_row_in_a_list_under_a_key_takes_no_other_with_it(at: int, between: str) -> None:
    rows = [json.dumps(GOOD["alpaca"](i)) for i in range(3)]
    rows[at] = rows[at].replace('"input": ""', '"input": " bad')
    Path("rows.json").write_text(f'{{"data": [{between.join(rows)}], "more": 1}}', encoding="utf-8")
    found = check.check(["rows.json"])
    assert found["rows"] == 3 and {one["kind"] for one in found["problems"]} == {"malformed-json"}
    check.fix(["rows.json"], "clean.json")
    assert len(json.loads(Path("clean.json").read_text(encoding="utf-8"))) == 2


def test_a_csv_file_without_header_is_asked_for_one() -> None:
    Path("rows.csv").write_text("Where is Paris?,In France\nWhere is Rome?,In Italy\n", encoding="utf-8")
    (problem,) = check.check(["rows.csv"])["problems"]
    assert "is the header missing?" in problem["message"] and "instruction,output" in problem["message"]
    assert "prompt: Where" not in problem["message"] and "In France}" not in problem["message"]
    with pytest.raises(UserError, match="is the header missing"):
        data.load([Source(path="rows.csv")])
    with pytest.raises(UserError, match="is the header .* missing"):
        data.load([Source(path="rows.csv", columns={"prompt": "question", "response": "answer"})])
    Path("rows.csv").write_text("Where is Paris?,In France\n", encoding="utf-8")
    assert "is the header missing?" in check.check(["rows.csv"])["problems"][0]["message"]


# --- weights --------------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(), st.sampled_from([0, 1, 1e308, 1e30, 1e-308, 1e-30, 1000, 1001, 1e-6, -1, 0.5, "1e400", "nan", 10**400])
)


@pytest.mark.filterwarnings("error")
@cases(20)
@given(row=NUMBERS, turn=NUMBERS)
def test_every_weight_that_is_read_leaves_the_loss_finite(row: Any, turn: Any) -> None:
    messages = [*talk(1, "user"), {**talk(1, "assistant")[0], "weight": turn}]
    value = {"messages": messages, "weight": row}
    problems = [one for one in check.check([write([value])])["problems"] if one["level"] == "error"]
    try:
        (record,) = data.load([Source(path="rows.jsonl")]).rows
    except UserError as error:
        assert problems and "rows.jsonl:1: " in str(error)
        return
    assert not problems
    product = record.weight * record.turns[-1].weight
    assert product == 0 or forms.WEIGHTS[0] <= product <= forms.WEIGHTS[1]
    loss = torch.tensor([product] * 3, dtype=torch.float32) * 20
    assert product == 0 or (loss.sum() / (product * 3)).isfinite()
    block = store.Block.of([(0, 0, Example([1, 2], [2, 3], [product, 0.0]))])
    assert [block.weights[code] for code in block.arrays["weights"]] == [product, 0.0]


def test_rows_that_teach_nothing_and_too_many_weights_are_told_by_line() -> None:
    rows = [GOOD["alpaca"](1), {**GOOD["alpaca"](2), "weight": 0}]
    told = [(one["line"], one["kind"], one["level"]) for one in check.check([write(rows)])["problems"]]
    assert told == [(2, "nothing-learned", "warning")]
    rows = [{**GOOD["alpaca"](i), "weight": 0.5 + i / 1000} for i in range(256)]
    told = [(one["line"], one["level"]) for one in check.check([write(rows)])["problems"]]
    assert told == [(255, "error")]


def test_a_row_that_ends_with_a_call_and_says_nothing_is_good() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": "{}"}}]}
    v1 = {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "find", "arguments": {}}'}]}
    for last in (call, {**call, "content": None}, v1):
        assert check.check([write([{"messages": [*talk(1, "user"), last]}])])["problems"] == []


@pytest.mark.parametrize(
    "before", [["[]"], ["[]", "[]"], ["[1, 2]", "5", "[]"], ["[[]]", "null", '"a"', "[]"], ["[]"] * 50], ids=len
)
def test_lines_that_are_no_rows_before_the_first_row_are_told_one_by_one(before: list[str]) -> None:
    Path("rows.jsonl").write_text(
        "".join(f"{line}\n" for line in [*before, json.dumps(GOOD["alpaca"](1)), json.dumps(GOOD["alpaca"](2))])
    )
    problems = [one for one in check.check(["rows.jsonl"])["problems"] if one["level"] == "error"]
    assert [one["line"] for one in problems] == list(range(1, len(before) + 1))

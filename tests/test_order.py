"""The verdict on a row is its own: damaged rows among good ones, however many and in whatever order, take no good row with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmtune import check, forms


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


@settings(deadline=None, max_examples=120)
@given(data=st.data(), kind=st.sampled_from(sorted(GOOD)), layout=st.sampled_from(["lines", "array"]))
def test_exactly_the_good_rows_are_kept_in_any_order(data: st.DataObject, kind: str, layout: str) -> None:
    good = [GOOD[kind](i) for i in range(data.draw(st.integers(1, 4)))]
    damaged = data.draw(st.lists(st.sampled_from(BAD[kind]), max_size=8))
    rows: list[Any] = good + [spoilt(kind, 100 + i, change) for i, change in enumerate(damaged)]
    nothing = st.sampled_from(NOTHING)
    rows += data.draw(st.lists(nothing, max_size=4) if layout == "lines" else st.lists(nothing, max_size=4, unique_by=str))
    rows = data.draw(st.permutations(rows))
    kept, removed = fixed(rows, layout)
    assert sorted(kept, key=json.dumps) == sorted(good, key=json.dumps)
    if layout == "lines":  # in an array, where a row that is broken ends is a guess; two bad ones may be one
        assert len(kept) + len(removed) == len(rows)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(sorted(GOOD)))
def test_the_verdict_on_a_row_does_not_depend_on_the_order(data: st.DataObject, kind: str) -> None:
    rows: list[Any] = [GOOD[kind](i) for i in range(2)]
    rows += [
        spoilt(kind, 100 + i, change)
        for i, change in enumerate(data.draw(st.lists(st.sampled_from(BAD[kind]), max_size=5, unique_by=str)))
    ]
    rows += data.draw(
        st.lists(st.sampled_from([{"a": 1}, {"instruction": "x"}, {"question": "x"}, {"text": "x"}, 5]), max_size=3, unique_by=str)
    )

    def verdicts(rows: list[Any]) -> dict[str, list[tuple[str, str]]]:
        found = check.check([write(rows)])["problems"]
        told = {
            json.dumps(row): [(one["kind"], one["message"]) for one in found if one["line"] == i] for i, row in enumerate(rows, 1)
        }
        return {row: [one for one in those if one[0] not in ("mixed-form", "exact-duplicate")] for row, those in told.items()}

    assert verdicts(rows) == verdicts(data.draw(st.permutations(rows)))


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


@settings(deadline=None, max_examples=400)
@given(first=st.dictionaries(st.sampled_from(KEYS), PIECES, max_size=5), data=st.data())
def test_rows_of_one_shape_are_recognised_alike(first: dict, data: st.DataObject) -> None:
    second = {key: data.draw(PIECES) for key in first}
    if forms.shape(first) == forms.shape(second):
        for want in ("answers", "prompts", "text", "preferences", "labels"):
            assert forms.recognise(first, want) == forms.recognise(second, want)

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import check, convert
from glmtune.chat import align
from glmtune.errors import UserError
from glmtune.records import Example

from . import tiny
from .cases import cases


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def records(name: str | Path) -> list[Any]:
    rows = [row for file in check.examine([name]) for row in file.rows]
    assert all(row.record is not None and not row.refused for row in rows)
    return [replace(row.record, where="", meta={}) for row in rows if row.record]


def user(text: str, **more: Any) -> dict:
    return {"role": "user", "content": text, **more}


def assistant(text: str, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
TOOLS = [{"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}]
ROWS: dict[str, dict] = {
    "alpaca": {"instruction": "Translate.", "input": "Hund", "output": "Dog.", "system": "Be brief.", "history": [["Hi", "Hello."]]},
    "columns": {"question": "Where is Paris?", "answer": "In France.", "id": 7, "source": {"book": [1, 2]}},
    "weighted": {"context": "2 + 2 =", "target": "4", "weight": 2.5},
    "messages": {"messages": [{"role": "system", "content": ""}, user("Hi"), assistant("Yo.", learn=False), user("?"), assistant("Hi.", weight=2)]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "system": "Be kind."},
    "prompt": {"instruction": "Only asked."},
    "preference": {"instruction": "Which?", "system": "Choose.", "chosen": "This one.", "rejected": "That one.", "score": 3},
    "preference, chats": {"chosen": [user("Which?"), assistant("This.")], "rejected": [user("Which?"), assistant("That.")]},
    "preference, pair": {"instruction": "Which?", "output": ["This.", "That."]},
    "good": {"messages": [user("Is it?"), assistant("It is.")], "label": True, "by": "Anna"},
    "bad": {"prompt": "Is it?", "completion": "No idea.", "label": False},
    "tools": {"messages": [user("Weather?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "Sun."}, assistant("Sun.")], "tools": TOOLS},
    "text and call": {"messages": [user("Weather?"), assistant("I look.", tool_calls=[CALL, CALL]), {"role": "tool", "content": "Sun."}, assistant("Sun.")]},
}  # fmt: skip
NOT_ALPACA = ("messages", "tools", "text and call")


@pytest.mark.few(8)
@pytest.mark.parametrize("to", ["messages", "sharegpt", "alpaca"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_in_another_form_is_the_same_record(name: str, to: str) -> None:
    given = write("in.jsonl", ROWS[name])
    if to == "alpaca" and name in NOT_ALPACA:
        with pytest.raises(UserError, match=r"in.jsonl:1: cannot be written as alpaca: a message by"):
            convert.convert([given], to, "out.jsonl")
        assert not Path("out.jsonl").exists()
        return
    assert convert.convert([given], to, "out.jsonl") == f"1 rows in out.jsonl, form {to}, read back and compared"
    assert records("out.jsonl") == records(given)
    convert.convert(["out.jsonl"], "messages", "again.jsonl")
    assert records("again.jsonl") == records(given)
    kept = {key: ROWS[name][key] for key in ("id", "source", "score", "by") if key in ROWS[name]}
    assert read("again.jsonl")[0].items() >= kept.items()


def test_the_written_rows_are_those_that_others_read() -> None:
    given = write("in.jsonl", ROWS["alpaca"])
    convert.convert([given], "messages", "out.jsonl")
    assert read("out.jsonl") == [
        {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello."), user("Translate.\nHund"), assistant("Dog.")]}
    ]  # fmt: skip
    given = write("in.jsonl", ROWS["preference"])
    convert.convert([given], "messages", "pairs.jsonl")
    assert read("pairs.jsonl") == [
        {"messages": [{"role": "system", "content": "Choose."}, user("Which?")], "chosen": assistant("This one."), "rejected": assistant("That one."), "score": 3}
    ]  # fmt: skip
    given = write("in.jsonl", ROWS["good"])
    convert.convert([given], "messages", "labels.jsonl")
    assert read("labels.jsonl") == [ROWS["good"]]
    given = write("in.jsonl", ROWS["tools"])
    convert.convert([given], "sharegpt", "tools.jsonl")
    said = read("tools.jsonl")[0]
    assert [message["from"] for message in said["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(said["tools"]) == TOOLS


@cases(30)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=5),
    system=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    to=st.sampled_from(["messages", "sharegpt", "alpaca"]),
)
def test_any_conversation_is_kept_or_refused(texts: list[str], system: str | None, to: str) -> None:
    turns = [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(texts)]
    given = write("in.jsonl", {"messages": ([] if system is None else [{"role": "system", "content": system}]) + turns})
    Path("out.jsonl").unlink(missing_ok=True)
    try:
        convert.convert([given], to, "out.jsonl")
    except UserError as error:
        assert "in.jsonl:1" in str(error) and not Path("out.jsonl").exists()
        assert to == "alpaca" or len(texts) % 2, "a whole conversation has a place in both forms with a list"
        return
    assert records("out.jsonl") == records(given)


def test_what_has_no_place_is_an_error_and_nothing_is_written() -> None:
    good = {"question": "q", "answer": "a."}
    for bad, message in [
        ({"question": "q", "answer": ""}, "in.jsonl:2: the answer is empty"),
        ({"question": "q"}, "in.jsonl:2: a 'columns' row needs the key 'answer'"),
    ]:
        with pytest.raises(UserError) as told:
            convert.convert([write("in.jsonl", good, bad, good)], "messages", "out.jsonl")
        assert str(told.value).startswith(message) and "nothing was written" in str(told.value)
    own = write("own.jsonl", {**good, "messages": 1})
    with pytest.raises(UserError, match="own.jsonl:1: cannot be written as messages: the column 'messages' stands in the way"):
        convert.convert([own], "messages", "out.jsonl", columns={"prompt": "question", "response": "answer"})
    with pytest.raises(UserError, match="text.jsonl:1: cannot be written as alpaca: plain text has no turns"):
        convert.convert([write("text.jsonl", {"text": "Only text."})], "alpaca", "out.jsonl")
    with pytest.raises(UserError, match="unknown form 'mesages'.*did you mean 'messages'"):
        convert.convert([write("in.jsonl", good)], "mesages", "out.jsonl")
    assert not Path("out.jsonl").exists()
    Path("out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="never overwritten"):
        convert.convert(["in.jsonl"], "messages", "out.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    "name",
    tiny.slow_but(
        ["kto_en.json", "toolcall_zh.json"],
        ["alpaca_zh.json", "dpo_en.json", "kto_en.json", "toolcall_en.json", "toolcall_zh.json"],
    ),
)
def test_real_files_keep_every_row(name: str, to: str, shared: Path) -> None:
    file = shared / "data" / name
    convert.convert([file], to, "out.jsonl")
    assert records("out.jsonl") == records(file)


# --- stats ----------------------------------------------------------------------------------------------------------------


def test_stats_count_rows_forms_turns_lengths_and_languages() -> None:
    write("a.jsonl", ROWS["alpaca"], ROWS["columns"], {"question": "q", "answer": ""})
    write("b.jsonl", {"question": "你好吗？", "answer": "很好。"})
    found = convert.stats(["a.jsonl", "b.jsonl"])
    assert (found["rows"], found["unusable"], found["sources"]) == (4, 1, {"a.jsonl": 3, "b.jsonl": 1})
    assert found["forms"] == {"columns": 2, "alpaca": 1}
    assert found["turns"] == {"2": 2, "4": 1}
    assert found["languages"] == {"Latin script": 2, "Chinese": 1}
    assert (found["lengths"]["unit"], found["lengths"]["shortest"], found["lengths"]["longest"]) == ("characters", 7, 27)
    assert "learned" not in found and json.dumps(found)


def test_stats_tell_the_learned_share() -> None:
    def encode(record: Any) -> list[Example]:
        return [align([0] * 10, [0.0] * 6 + [1.0] * 4)]  # ten tokens, the last four learned

    found = convert.stats([write("a.jsonl", ROWS["columns"], ROWS["alpaca"])], encode=encode)
    assert found["learned"] == {"tokens": 20, "learned": 8, "share": 0.4}
    assert found["lengths"]["unit"] == "tokens" and found["lengths"]["p50"] == 10
    pair = convert.stats([write("b.jsonl", ROWS["preference"])], encode=encode)
    assert pair["lengths"]["longest"] == 20, "both answers of a preference row are read"


def test_only_so_many_rows_of_a_registered_name_are_counted_and_written_and_it_says_so():
    write("a.jsonl", *({"instruction": f"q{i}", "output": f"a{i}"} for i in range(5)))
    Path("data.yaml").write_text("mine: {path: a.jsonl, max_samples: 3}\n")
    found = convert.stats(["mine"])
    assert found["rows"] == 3 and found["notes"] == ["a.jsonl: only the first 3 rows are looked at (max_samples 3)"]
    said = convert.convert(["mine"], "messages", "b.jsonl")
    assert len(read("b.jsonl")) == 3 and "max_samples 3" in said
    assert convert.stats(["a.jsonl"])["notes"] == []

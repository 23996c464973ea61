"""Every row form of the field becomes a record; tool calls are written as each family writes them, under the laws of the template."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import chat, families, forms, tools
from glmtune.errors import UserError
from glmtune.forms import Reading, choose_forms, parse_row, parse_rows
from glmtune.reading import DataError
from glmtune.records import Conversation, Document, Labelled, Preference, Turn

from . import tiny
from .cases import cases

Q, A = Turn("user", "q"), Turn("assistant", "a")


def read(row: Any, want: forms.Want = "answers", **reading: Any) -> list[Any]:
    form = choose_forms([row], Reading(want, **reading))[1](row)
    return parse_rows(row, form, want)


def told(record: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in record.turns]


def refused(row: Any, want: forms.Want = "answers", **reading: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(row, want, **reading)
    return caught.value


# --- answers: forms -----------------------------------------------------------------------------------------------------

QA = [("user", "q"), ("assistant", "a")]
TWO = [("user", "p"), ("assistant", "b"), *QA]
MORE = [("user", "q\nc"), ("assistant", "a")]
ROUNDS = "Human: p\nAssistant: b\nHuman: q\nAssistant:"


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, QA),
        ("alpaca", {"instruction": "q", "input": "", "output": "a", "history": [["p", "b"]], "system": "s"}, [("system", "s"), *TWO]),
        ("belle", {"instruction": ROUNDS, "input": "", "output": "a"}, TWO),
        ("belle", {"instruction": "Human：p\nAssistant：b\nHuman：q", "output": "a"}, TWO),
        ("belle", {"instruction": "Human: p Assistant: b Human: q Assistant:", "input": "", "output": "a"}, TWO),
        ("belle", {"instruction": "Human：p\tAssistant：b\tHuman：q\tAssistant：", "output": "a"}, TWO),
        ("alpaca", {"instruction": "Human: who is the Assistant: you?", "output": "a"}, [("user", "Human: who is the Assistant: you?"), ("assistant", "a")]),
        ("alpaca", {"instruction": "Human: p Human: q Assistant:", "output": "a"}, [("user", "Human: p Human: q Assistant:"), ("assistant", "a")]),
        ("alpaca", {"instruction": "Human: who wrote this?", "output": "a"}, [("user", "Human: who wrote this?"), ("assistant", "a")]),
        ("question-answer", {"question": "q", "answer": "a"}, QA),
        ("query-response", {"query": "q", "response": "a", "history": [["p", "b"]]}, TWO),
        ("prompt-response", {"prompt": "q", "response": "a"}, QA),
        ("prompt-completion", {"prompt": "q", "completion": "a"}, QA),
        ("prompt-completion", {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, QA),
        ("context", {"context": "q", "target": "a"}, QA),
        ("dolly", {"instruction": "q", "context": "c", "response": "a"}, MORE),
        ("dolly", {"instruction": "q", "input": "c", "response": "a"}, MORE),
        ("alpaca", {"instruction": "q", "context": "c", "output": "a"}, MORE),
        ("question-answer", {"question": "q", "context": "c", "answer": "a"}, MORE),
        ("query-response", {"query": "q", "context": "c", "response": "a"}, MORE),
        ("prompt-response", {"prompt": "q", "input": "c", "context": None, "response": "a"}, MORE),
        ("prompt-completion", {"prompt": "q", "input": "c", "completion": "a"}, MORE),
        ("firefly", {"kind": "NLI", "input": "q", "target": "a"}, QA),
        ("adgen", {"content": "q", "summary": "a"}, QA),
        ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, QA),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]},
            QA,
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": ""}, QA),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]}, QA),
        ("sharegpt", {"conversations": [{"from": "User", "value": "p"}, {"from": "chatgpt", "value": "b"}, {"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]}, TWO),
        ("messages", {"messages": [{"role": "developer", "content": "s"}, {"role": "USER", "content": "q"}, {"role": "Assistant", "content": "a"}]}, [("system", "s"), *QA]),
        ("conversation", {"conversation": [{"human": "p", "assistant": "b"}, {"human": "q", "assistant": "a"}]}, TWO),
        ("conversation", {"conversation": [{"system": "s", "input": "q", "output": "a"}]}, [("system", "s"), *QA]),
        ("sharegpt", {"conversations": [{"question": "q", "answer": "a"}]}, QA),
        ("dialogue", {"dialogue": [{"human": "q", "assistant": "a"}]}, QA),
    ],
)  # fmt: skip
def test_a_form_is_recognised_and_can_be_named(name: str, row: dict, wanted: list) -> None:
    form = forms.recognise(row, "answers")
    assert form and form.name == ("columns" if "-" in name else name)
    for reading in ({}, {"format": name}):
        (record,) = read(row, **reading)
        assert isinstance(record, Conversation) and told(record) == wanted
    # the same through columns, without any recognition
    columns = {key.removesuffix(" 2"): value for key, value in form.names.items() if row.get(value) is not None}
    columns = {key: value for key, value in columns.items() if key in forms.COLUMNS}
    if "rounds" not in form.names:
        assert told(read(row, columns=columns)[0]) == wanted
    # without the answer, as a prompt
    answer = form.names.get("response")
    if answer and name not in ("firefly", "adgen"):
        bare = {key: value for key, value in row.items() if key != answer}
        assert told(read(bare, "prompts")[0]) == wanted[:-1]


def test_every_answer_of_hc3_is_a_conversation_that_says_which_it_is() -> None:
    row = {"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"], "source": "reddit"}
    made = read(row)
    assert [told(one)[-1][1] for one in made] == ["a", "b", "c"]
    assert [one.meta["answer"] for one in made] == ["human_answers[0]", "human_answers[1]", "chatgpt_answers[0]"]
    one = read(row, columns={"prompt": "question", "response": "chatgpt_answers"})
    assert [told(each) for each in one] == [[("user", "q"), ("assistant", "c")]]
    assert [told(each) for each in read(row, "prompts")] == [[("user", "q")]]
    assert refused({**row, "human_answers": [], "chatgpt_answers": []}).kind == "empty-answer"
    assert refused({**row, "chatgpt_answers": [" "]}).kind == "empty-answer"
    form = forms.recognise(row, "answers")
    assert form and len(parse_rows(row, form, "answers")) == 3
    with pytest.raises(DataError, match="3 answers where one was wanted"):
        parse_row(row, form, "answers")


def test_prompts_and_text() -> None:
    assert told(read({"prompt": "q"}, "prompts")[0]) == QA[:1]
    assert read({"text": "x", "weight": 2}, "text") == [Document("x", weight=2.0)]
    assert "stage: {kind: pretrain}" in str(refused({"text": "x"}))


# --- preferences and labels -----------------------------------------------------------------------------------------------

SHORT = {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}
HEAD = [{"role": "user", "content": "q"}]
ENDS = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}], "chosen": SHORT[0], "rejected": SHORT[1]}),
        ("alpaca", {"instruction": "q", "input": "", "output": ["a", "b"]}),
        ("alpaca", {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}),
        ("columns", {"question": "q", "chosen": "a", "rejected": "b"}),
        ("messages", {"messages": HEAD, "chosen": ENDS[0][0], "rejected": ENDS[1][0]}),
        ("preference", {"chosen": HEAD + ENDS[0], "rejected": HEAD + ENDS[1]}),
        ("preference", {"prompt": HEAD, "chosen": ENDS[0], "rejected": ENDS[1]}),
        ("preference", {"prompt": "q", "chosen": HEAD + ENDS[0], "rejected": HEAD + ENDS[1]}),
        ("messages", {"prompt": "q", "messages": HEAD + ENDS[0], "chosen": HEAD + ENDS[0], "rejected": HEAD + ENDS[1]}),
        ("preference", {"prompt": "Human: q\n\nAssistant:", "chosen": HEAD + ENDS[0], "rejected": HEAD + ENDS[1]}),
        ("preference", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    ],
)
def test_every_layout_of_a_preference_is_the_same_record(name: str, row: dict) -> None:
    form = forms.recognise(row, "preferences")
    assert form and form.name == name
    assert read(row, "preferences") == [Preference((Q,), A, Turn("assistant", "b"))]
    found = refused(row)
    assert (found.kind, "preference stage (dpo, reward)" in str(found)) == ("preference-row", True)
    with_more = read({**row, "system": "s", "weight": 0.5}, "preferences")[0]
    assert (with_more.turns[0], with_more.weight) == (Turn("system", "s"), 0.5)


SAFE = {  # PKU-SafeRLHF
    "prompt": "q",
    "response_0": "b",
    "response_1": "a",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 1,
    "safer_response_id": 0,
}


def test_two_answers_with_the_number_of_the_better_one_are_a_preference() -> None:
    better, safer = Preference((Q,), A, Turn("assistant", "b")), Preference((Q,), Turn("assistant", "b"), A)
    assert read(SAFE, "preferences") == [better]
    assert read({**SAFE, "better_response_id": "1"}, "preferences") == [better], "as CSV writes it"
    assert read(SAFE, "preferences", format="saferlhf_safe") == [safer]
    assert read({key: SAFE[key] for key in SAFE if key != "better_response_id"}, "preferences") == [safer]
    assert told(read(SAFE, "prompts")[0]) == QA[:1]
    found = refused(SAFE)
    assert (found.kind, "preference stage (dpo, reward)" in str(found)) == ("preference-row", True)
    for wrong in (2, -1, None, True, "a"):
        found = refused({**SAFE, "better_response_id": wrong}, "preferences")
        assert found.kind == "wrong-type" and "'better_response_id' must be 0 or 1" in str(found)
    assert refused({**SAFE, "response_0": " "}, "preferences").kind == "empty-answer"
    with pytest.raises(UserError, match="it has no single answer"):
        read(SAFE, format="saferlhf")
    with pytest.raises(DataError, match="needs the key 'response_1'"):
        read({"prompt": "q", "response_0": "a", "better_response_id": 0}, "preferences", format="saferlhf")


def test_a_file_of_one_row_with_a_list_in_it_is_that_row_where_columns_say_so(tmp_path: Path) -> None:
    row = {"id": 7, "talk": [{"human": "q", "assistant": "a"}]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    values = [[item.value for item in forms.open_file(tmp_path / "one.jsonl", "one", columns).items]
              for columns in ({"messages": "talk"}, {"prompt": "human", "response": "assistant"}, None)]  # fmt: skip
    assert values == [[row], row["talk"], row["talk"]]


def test_columns_of_a_preference() -> None:
    row = {"ask": "q", "good": "a", "bad": "b"}
    made = read(row, "preferences", columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert made == [Preference((Q,), A, Turn("assistant", "b"))]
    with pytest.raises(UserError, match="do not say where the rejected stands; wanted {prompt: KEY, chosen"):
        read(row, "preferences", columns={"prompt": "ask", "chosen": "good"})


@pytest.mark.parametrize(
    ("row", "good"),
    [
        ({"messages": [*HEAD, *ENDS[0]], "label": True}, True),
        ({"prompt": "q", "completion": "a", "label": False}, False),
        ({"instruction": "q", "input": "", "output": "a", "kto_tag": "false"}, False),
        ({"question": "q", "answer": "a", "label": 1}, True),
    ],
)
def test_a_labelled_row_is_good_or_bad(row: dict, good: bool) -> None:
    assert read(row, "labels") == [Labelled((Q, A), good)]
    assert read(row) == [Conversation((Q, A))], "without the label it is an answer"


@pytest.mark.parametrize(
    ("row", "want", "kind", "wanted"),
    [
        ({"prompt": "q", "chosen": "a"}, "preferences", "missing-key", "needs the key 'rejected'; this row has ['prompt', 'chosen']"),
        ({"prompt": "q", "chosen": "a", "rejectd": "b"}, "preferences", "missing-key", "did you mean 'rejected' by 'rejectd'?"),
        ({"instruction": "q", "output": "a"}, "preferences", "missing-key", "`stage: {kind: sft}` learns single answers"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "preferences", "empty-answer", "'rejected' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "preferences", "wrong-type", "'rejected' must be a string, a message or a list"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "preferences", "wrong-type", "'chosen' must be a string, not a number (3)"),
        ({"chosen": HEAD + ENDS[0], "rejected": HEAD}, "preferences", "preference-row", "'chosen' must end with one answer of its own"),
        ({"prompt": "OTHER", "chosen": HEAD + ENDS[0], "rejected": HEAD + ENDS[1]}, "preferences", "preference-row", "the row asks a string (\"OTHER\") beside the conversations in 'chosen'"),
        ({"prompt": "q", "context": "c", "chosen": HEAD + ENDS[0], "rejected": HEAD + ENDS[1]}, "preferences", "preference-row", "the row asks a string (\"c\") beside"),
        ({"prompt": HEAD, "input": "c", "completion": "a"}, "answers", "wrong-type", "'input' is filled beside messages in 'prompt'"),
        ({"instruction": ROUNDS, "context": "c", "output": "a"}, "answers", "wrong-type", "'context' is filled beside rounds"),
        ({"question": "q", "context": ["c"], "answer": "a"}, "answers", "wrong-type", "'context' must be a string, not a list"),
        ({"chosen": HEAD, "rejected": HEAD}, "preferences", "preference-row", "must end with one answer of its own"),
        ({"prompt": "q", "chosen": [], "rejected": []}, "preferences", "wrong-type", "'chosen' must be a string, not a list"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "preferences", "empty-question", "the question is empty"),
        ({"instruction": "q", "output": ["a", "b"]}, "answers", "preference-row", "preference stage (dpo, reward)"),
        ({"instruction": "q", "output": ["a", "b", "c"]}, "answers", "preference-row", "preference stage (dpo, reward)"),
        ({"prompt": "q", "completion": "a"}, "labels", "missing-key", "needs the key 'label'"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "labels", "wrong-type", "'label' must be true (a good answer) or false"),
        ({"prompt": "q", "completion": "a", "label": None}, "labels", "wrong-type", "'label' must be"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "labels", "preference-row", "preference stage"),
        ({"messages": HEAD, "label": True}, "labels", "role-order", "must end with the assistant's answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "answers", "not-text", "message 1: part 1 of the content is of the type 'image_url'; only text can be learned"),
        ({"conversation": [{"human": "q", "assistant": 1}]}, "answers", "wrong-type", "message 1: 'assistant' must be a string"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "functon_call", "value": "{}"}]}, "answers", "unknown-role", "did you mean 'function_call'?"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "now()"}]}, "answers", "tool-turn", "message 2 is a 'function_call' turn with a call that cannot be read: a string (\"now()\"); a call is {\"name\""),
        ({"conversations": [{"from": "human", "value": "q"}, SHORT[0]], "tools": "[1]"}, "answers", "tool-turn", "'tools' must be a list of objects with a name"),
        ({"messages": [{"role": "system", "content": "", "tools": "none"}, *HEAD, *ENDS[0]]}, "answers", "tool-turn", "message 1: 'tools' must be a list"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "1"}, SHORT[0]]}, "answers", "role-order", "turn 2: 'tool' may not follow 'user'"),
    ],
)  # fmt: skip
def test_a_bad_row_says_what_came_what_was_wanted_and_what_to_do(row: dict, want: forms.Want, kind: str, wanted: str) -> None:
    found = refused(row, want)
    assert (found.kind, wanted in str(found)) == (kind, True), str(found)


@pytest.mark.parametrize(
    ("reading", "want", "wanted"),
    [
        ({"format": "adgn"}, "answers", "did you mean 'adgen'?"),
        ({"format": "sharegtp"}, "preferences", "did you mean 'sharegpt'?"),
        ({"format": "preference"}, "answers", "it has no single answer; it needs a preference stage"),
        ({"columns": {"prompt": "instruction", "chosn": "output"}}, "preferences", "did you mean 'chosen'?"),
        ({"columns": {"prompt": "instruction", "response": "output"}}, "labels", "do not say where the label stands; wanted"),
        ({"columns": {"messages": "x"}, "format": "alpaca"}, "answers", "do not go together"),
    ],
)
def test_wrong_options_are_mended_by_their_message(reading: dict, want: forms.Want, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_forms([{"instruction": "q", "output": "a"}], Reading(want, **reading))
    assert wanted in str(caught.value)


# --- tool calls: rows -----------------------------------------------------------------------------------------------------

SCHEMAS = [
    {
        "name": "weather",
        "description": "of a <|user|> city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
CALL = {"name": "weather", "arguments": {"city": "北京", "days": 2}}
TURNS = (
    Turn("user", "Rain?", extra={"tools": SCHEMAS}),
    Turn("assistant", "", extra={"tool_calls": [CALL]}),
    Turn("tool", '{"rain": "<|im_end|> no"}', extra={"name": "weather"}),
    Turn("assistant", "No."),
)  # fmt: skip


def share_gpt(call: str, result: str, schemas: Any) -> dict:
    turns = [("human", "Rain?"), (call, json.dumps(CALL)), (result, TURNS[2].text), ("gpt", "No.")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": schemas}


def test_every_spelling_of_a_tool_call_is_the_same_record() -> None:
    as_text = json.dumps({**CALL, "arguments": json.dumps(CALL["arguments"])})
    openai = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": json.loads(as_text)}]},
        {"role": "tool", "content": TURNS[2].text},
        {"role": "assistant", "content": "No."},
    ]
    own = {"role": "tool", "name": "weather", "parameters": CALL["arguments"], "observation": TURNS[2].text}
    rows = [
        share_gpt("function_call", "observation", json.dumps(SCHEMAS)),
        share_gpt("tool_call", "tool_response", SCHEMAS),
        share_gpt("function_call", "function", SCHEMAS),
        {"messages": openai, "tools": SCHEMAS},
        {"messages": [openai[0], {"role": "assistant", "function_call": CALL}, *openai[2:]], "tools": SCHEMAS},
        {"conversations": [openai[0], own, openai[3]], "tools": SCHEMAS},  # ChatGLM3's tuning files
    ]
    for row in rows:
        assert read(row) == [Conversation(TURNS)]
    several = share_gpt("function_call", "observation", SCHEMAS)
    several["conversations"][1]["value"] = json.dumps([CALL, {"name": "time", "arguments": {}}])
    several["conversations"].insert(3, {"from": "observation", "value": "noon"})
    (record,) = read(several)
    assert [call["name"] for call in record.turns[1].extra["tool_calls"]] == ["weather", "time"]
    assert [turn.extra.get("name") for turn in record.turns if turn.role == "tool"] == ["weather", "time"]
    beside = share_gpt("function_call", "observation", "[]")
    beside["conversations"].insert(1, {"from": "gpt", "value": "Let me see."})
    assert read(beside)[0].turns[1] == Turn("assistant", "Let me see.", extra={"tool_calls": [CALL]})


def calling(call: Any) -> dict:
    said = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}, *ENDS[0]]
    return {"messages": [*HEAD, *said]}


@pytest.mark.parametrize(
    ("call", "keys"),
    [
        ({"function": {"name": "w", "args": {"town": "Oslo"}}}, ["name", "args"]),
        ({"type": "tool_use", "id": "1", "name": "w", "input": {}}, ["type", "id", "name", "input"]),
        ({"name": "w", "arguments": "", "args": {}}, ["name", "arguments", "args"]),
        ({"name": "w", "arguments": {"a": 1}, "parameters": {"b": 1}}, ["name", "arguments", "parameters"]),
        ({"name": "w", "arguments": []}, ["name", "arguments"]),
        ({"name": "w", "arguments": 0}, ["name", "arguments"]),
        ({"name": "w", "arguments": False}, ["name", "arguments"]),
        ({"nme": "w", "argments": {}}, ["nme", "argments"]),
        ({"id": "1"}, ["id"]),
    ],
)
def test_no_argument_of_a_call_is_lost_under_another_key(call: dict, keys: list[str]) -> None:
    found = refused(calling(call))
    assert found.kind == "tool-turn" and f"with the keys {keys}; a call is {{" in str(found)


@pytest.mark.parametrize("more", [{}, {"arguments": None}, {"arguments": ""}, {"parameters": "{}", "type": "function"}])
def test_a_call_may_have_no_arguments(more: dict) -> None:
    for call in ({"name": "w", **more}, {"function": {"name": "w", **more}}, {"name": "w", "function": more}):
        assert read(calling(call))[0].turns[1].extra["tool_calls"] == [{"name": "w", "arguments": {}}]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("alpaca_en.json", "answers"),
        ("alpaca_zh.json", "prompts"),
        ("gsm8k_train.jsonl", "answers"),
        ("dpo_en.json", "preferences"),
        ("dpo_zh.json", "preferences"),
        ("kto_en.json", "labels"),
        ("toolcall_en.json", "answers"),
        ("toolcall_zh.json", "answers"),
        ("c4.jsonl", "text"),
        ("wiki.txt", "text"),
    ],
)
def test_every_row_of_the_real_files_becomes_a_record(name: str, want: forms.Want, shared: Path) -> None:
    file = forms.open_file(shared / "data" / name, name)
    rows = [item.value for item in file.items]  # type: ignore[union-attr]
    _, form_of = choose_forms(rows, Reading(want))
    assert sum(len(parse_rows(row, form_of(row), want)) for row in rows) == len(rows) >= 10


# --- tool calls: chat formats ---------------------------------------------------------------------------------------------

QWEN = (  # the shape of Qwen2.5's published template, in other words
    "{% macro system(text) %}{{ '<|im_start|>system\n' + text + '<|im_end|>\n' }}{% endmacro %}"
    "{% set own = messages[0].role == 'system' %}{% set head = messages[0].content if own else 'Be brief.' %}"
    "{% if tools %}{% set lines = namespace(all=head + '\n# Tools') %}"
    "{% for tool in tools %}{% set lines.all = lines.all + '\n' + tool|tojson %}{% endfor %}{{ system(lines.all) }}"
    "{% else %}{{ system(head) }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for call in m.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONE_CALL = (  # Llama 3.1: one call, no text beside it, results as JSON strings; the end mark is </s> here
    "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</s>' }}{% endif %}"
    "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|assistant|>{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}</s>' }}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>' }}{{ m.content | tojson }}{{ '</s>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (  # Mistral: the call begins with a special token, and an id of nine characters is asked for
    "{% for m in messages %}{% if m.tool_calls is defined %}{{ '[gMASK]' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ (call.function | tojson) + call.id + '<sop>' }}{% endfor %}{{ '</s>' }}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>' + m.content + m.tool_call_id }}"
    "{% else %}{{ '<|user|>' + (tools | tojson if tools and loop.first else '') + m.content if m.role == 'user' else m.content + '</s>' }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, chat.Template]:
    folder = tmp_path_factory.mktemp("tools")

    def opened(name: str, source: str) -> chat.Template:
        eos = "<|im_end|>" if "im_end" in source else "</s>"
        return chat.choose("auto", chat.Tokens.open(tiny.tokenizer(folder / name, source, eos)))

    sources = {"chatml": tiny.CHATML, "qwen": QWEN, "one": ONE_CALL, "marked": MARKED, "llama2": tiny.LLAMA2}
    made: dict[str, Any] = {name: partial(opened, name, source) for name, source in sources.items()}
    made["plain"] = lambda: chat.choose("plain", opened("for plain", tiny.CHATML).tokens)
    shared = Path(__file__).parents[2] / "shared" / "tokenizers"
    for name in ("chatglm2", "chatglm3", "glm4"):
        if (shared / name).is_dir():
            made[name] = partial(families.open_template, shared / name)
    return tiny.Lazy(made)


SUPPORTS = {
    "chatml": "system", "qwen": "calls", "one": "one call", "marked": "one call", "llama2": "system", "plain": "system",
    "chatglm2": "question", "chatglm3": "chatglm3", "glm4": "glm4",
}  # fmt: skip


def obey(template: chat.Template, conversation: Conversation) -> None:
    """The laws of chat.py for one conversation with tools."""
    turns = template.turns(conversation)
    assert tools.for_template(turns, template._supports) == turns, "written once"
    for part in template.split(conversation):
        example = template.encode(part)
        shown = template.tokens.decode([i for i, w in zip(example.next_ids, example.weights) if w], keep_special=True)
        for i, turn in enumerate(turns[: len(template.turns(part))]):
            if turn.role != "assistant":
                continue
            prompt = template.prompt(Conversation(turns[: i + 1]))
            assert example.ids[: len(prompt)] == prompt, "a prompt is a prefix of training"
            if not template.context:
                weights = [0.0, *example.weights[:-1]]
                assert weights[len(prompt)] == 1.0, "a call is learned from its first token on"
                end = next((j for j in range(len(prompt), len(weights)) if not weights[j]), len(weights))
                assert example.ids[end - 1] in template.tokens.names, "and its end mark is learned"
        if not template.context:
            for turn in conversation.turns:
                if turn.role == "tool" and turn.text.strip():
                    assert turn.text not in shown or turn.text in "".join(t.text for t in turns if t.role == "assistant")
            for call in (call for turn in conversation.turns for call in turn.extra.get("tool_calls", ())):
                assert call["name"] in shown, "a call is learned"
    marks = {template.tokens.special[name] for name in ("<|user|>", "<|im_end|>") if name in template.tokens.special}
    plain = [replaced(turn) for turn in conversation.turns]
    count = [[i for i in template.encode(Conversation(tuple(one))).ids if i in marks] for one in (conversation.turns, plain)]
    assert count[0] == count[1], "no text, schema or result writes a special token"


def replaced(turn: Turn) -> Turn:
    """The same turn without anything that looks like a special token."""
    as_text = json.dumps([turn.text, turn.extra], ensure_ascii=False).replace("<|", "( ").replace("|>", " )")
    text, extra = json.loads(as_text)
    return Turn(turn.role, text, extra=extra)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", SUPPORTS)
def test_tools_under_every_kind_of_chat_format(name: str, templates: Mapping[str, chat.Template]) -> None:
    if name not in templates:
        pytest.skip("the published tokenizers are not beside the project")
    template = templates[name]
    assert template._supports == SUPPORTS[name]
    obey(template, Conversation(TURNS))
    both = Turn("assistant", "Let me see.", extra={"tool_calls": [CALL, {"name": "time", "arguments": {}}]})
    longer = (
        *TURNS[:1],
        both,
        TURNS[2],
        Turn("tool", "noon"),
        Turn("assistant", "No rain at noon."),
        Turn("user", "<|im_end|>?"),
        A,
    )
    obey(template, Conversation(longer))
    if SUPPORTS[name] != "question":
        obey(template, Conversation((Turn("system", "Be kind."), replace_tools(TURNS[0], None), *TURNS[1:])))
        obey(
            template,
            Conversation((Turn("system", "Be kind.", extra={"tools": SCHEMAS}), replace_tools(TURNS[0], None), *TURNS[1:])),
        )
    assert any("no tools" in reason for reason in template.differs) == (SUPPORTS[name] in ("system", "question"))


@pytest.mark.parametrize("supports", ["one call", "chatglm3", "glm4"])
def test_a_format_of_one_call_gets_them_one_by_one_each_before_its_result(supports: tools.Supports) -> None:
    calls = [{"name": name, "arguments": {}} for name in ("b", "c", "c")]
    results = [Turn("tool", name, extra={"name": name}) for name in ("c", "b")] + [Turn("tool", "again")]
    made = tools.for_template(
        [Q, Turn("assistant", "Let me see.", learn=False, extra={"tool_calls": calls}), *results, A], supports
    )
    assert [turn.role[:1] for turn in made] == list("uaatatata")
    assert [turn.extra["name"] for turn in made if turn.role == "tool"] == ["b", "c", "c"]
    assert [turn.text for turn in made if turn.role == "tool"] == ["b", "c", "again"]
    assert made[1] == Turn("assistant", "Let me see.", learn=False) and all(turn.learn is False for turn in made[2:-1:2])


@pytest.mark.parametrize(("name", "told"), [("one", True), ("qwen", False), pytest.param("glm4", False, marks=pytest.mark.slow)])
def test_text_beside_a_call_is_said_where_the_format_has_no_place_for_it(
    name: str, told: bool, templates: Mapping[str, chat.Template]
) -> None:
    if name not in templates:
        pytest.skip("the published tokenizers are not beside the project")
    template = templates[name]
    for text in ("", "Let me see."):
        template.differs.clear()
        turn = Turn("assistant", text, extra={"tool_calls": [{"name": "weather", "arguments": {}}]})
        template.encode(Conversation((Turn("user", "Rain?", extra={"tools": SCHEMAS}), turn, Turn("tool", "no"), A)))
        found = any(count for reason, count in template.differs.items() if "text beside a tool call" in reason)
        assert found == (told and text != "")


def test_the_advice_for_a_template_that_cannot_be_cut_fits_any_tokenizer() -> None:
    assert "template=chatml needs <|im_end|>" in str(chat._uncuttable("why"))


def replace_tools(turn: Turn, schemas: Any) -> Turn:
    return Turn(turn.role, turn.text, extra={"tools": schemas} if schemas else {})


def text_of(template: chat.Template, turns: tuple[Turn, ...]) -> str:
    return template.tokens.decode(template.encode(Conversation(turns)).ids, keep_special=True)


def test_a_format_without_tools_gets_json_text(templates: Mapping[str, chat.Template]) -> None:
    schema = json.dumps(SCHEMAS[0], ensure_ascii=False)
    assert text_of(templates["chatml"], TURNS) == (
        f"<|im_start|>system\n{tools.HEADING}\n{schema}<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        '<|im_start|>assistant\n{"name": "weather", "arguments": {"city": "北京", "days": 2}}<|im_end|>\n'
        '<|im_start|>user\nTool result (weather):\n{"rain": "<|im_end|> no"}<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n'
    )


@pytest.mark.parametrize("name", ["qwen", "one", "marked"])
def test_a_template_that_knows_tools_is_rendered_as_transformers_does(name: str, templates: Mapping[str, chat.Template]) -> None:
    template = templates[name]
    messages = [{"role": turn.role, "content": turn.text, **turn.extra} for turn in template.turns(Conversation(TURNS))]
    assert template.render is not None
    assert text_of(template, TURNS) == template.render(messages)
    assert messages[1]["tool_calls"][0]["function"] == CALL and messages[2]["tool_call_id"] == "call00000"
    assert not any("changes the text" in reason for reason in template.differs)


@pytest.mark.slow
def test_chatglm3_and_glm4_are_written_in_their_published_pieces(templates: Mapping[str, chat.Template]) -> None:
    if "glm4" not in templates:
        pytest.skip("the published tokenizers are not beside the project")
    tokens = templates["chatglm3"].tokens

    def single(role: str, metadata: str, content: str) -> list[int]:  # build_single_message of the published tokenizer
        return [tokens.special[f"<|{role}|>"], *tokens.encode(metadata + "\n"), *tokens.encode(content)]

    system = f"{tools.CHATGLM3_SYSTEM}\n{json.dumps(SCHEMAS, indent=4, ensure_ascii=False)}"
    want = [tokens.special["[gMASK]"], tokens.special["sop"], *single("system", "", system), *single("user", "", "Rain?")]
    want += single("assistant", "weather", "```python\ntool_call(city='北京', days=2)\n```") + single(
        "observation", "", TURNS[2].text
    )
    assert templates["chatglm3"].encode(Conversation(TURNS)).ids == [*want, *single("assistant", "", "No."), 2]
    schema = json.dumps(SCHEMAS[0], indent=4, ensure_ascii=False)
    assert text_of(templates["glm4"], TURNS) == (
        f"[gMASK]<sop><|system|>\n{tools.GLM4_SYSTEM}\n\n# 可用工具\n\n## weather\n\n{schema}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
        '<|user|>\nRain?<|assistant|>weather\n{"city": "北京", "days": 2}<|observation|>\n'
        + TURNS[2].text
        + "<|assistant|>\nNo.<|endoftext|>"
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["chatml", "chatglm3", "glm4", "qwen"])
def test_real_tool_calls_obey_the_laws(name: str, shared: Path, templates: Mapping[str, chat.Template]) -> None:
    rows = json.loads((shared / "data" / "toolcall_en.json").read_text())
    calling = [row for row in rows if any(message["from"] == "function_call" for message in row["conversations"])]
    for row in calling[:12]:
        (record,) = read(row)
        obey(templates[name], record)


NAMES = st.text("abc_", min_size=1, max_size=4)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text("a'\"\n<|\\", max_size=5), st.lists, max_leaves=4)


@cases(40)
@given(arguments=st.dictionaries(st.text("ab -", min_size=1, max_size=3), VALUES, max_size=3))
def test_a_chatglm3_call_is_python_that_gives_the_arguments_back(arguments: dict) -> None:
    import ast

    (turn,) = tools.for_template([Turn("assistant", "", extra={"tool_calls": [{"name": "f", "arguments": arguments}]})], "chatglm3")
    assert turn.extra == {"metadata": "f"}
    call = ast.parse(turn.text.removeprefix("```python\n").removesuffix("\n```"), mode="eval").body
    assert isinstance(call, ast.Call)
    given: dict[str, Any] = {}
    for keyword in call.keywords:
        given |= {keyword.arg: ast.literal_eval(keyword.value)} if keyword.arg else ast.literal_eval(keyword.value)
    assert given == arguments


def test_thousands_of_turns_are_refused_or_cut_without_writing_them_out(tiny_model):
    from glmtune import families, stages
    from glmtune.records import Conversation, Turn

    template = families.open_template(tiny_model)
    turns = tuple(Turn("user" if i % 2 == 0 else "assistant", f"t{i}") for i in range(20_000))
    for policy, count in (("error", 0), ("cut-left-turns", 1)):
        tally = stages.Tally(rows=1)
        made = stages.encode_conversation(template, Conversation(turns, "a.json:1"), stages.Limits(64, policy), tally)
        assert len(made) == count and tally.long == (policy == "error")
        assert all(len(example.ids) <= 64 for example in made)

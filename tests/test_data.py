import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import data, forms
from glmtune.errors import UserError
from glmtune.records import Conversation, Document, Turn

from .cases import cases


@dataclass
class Source:
    path: str
    format: str | None = None
    columns: dict[str, str] | None = None
    weight: float = 1.0
    max_samples: int | None = None
    system: str | None = None


ROW = {"instruction": "hi", "input": "", "output": "yo"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes | list) -> str:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def load(content: str | bytes | list, name: str = "train.jsonl", options: dict | None = None, **source) -> data.Loaded:
    return data.load([Source(write(name, content), **source)], **(options or {}))


def turns(loaded: data.Loaded, index: int = 0) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in loaded.rows[index].turns]


def error(content: str | bytes | list, name: str = "train.jsonl", options: dict | None = None, **source) -> str:
    with pytest.raises(UserError) as caught:
        load(content, name, options, **source)
    message = str(caught.value)
    assert message.count("\n") <= 2, "at most three lines"
    return message


# --- forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "row", "wanted"),
    [
        ("alpaca", {"instruction": "hi", "output": "yo"}, [("user", "hi"), ("assistant", "yo")]),
        ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n1 2"), ("assistant", "3")]),
        ("alpaca", {"instruction": "", "input": "1 2", "output": "3"}, [("user", "1 2"), ("assistant", "3")]),
        ("alpaca", {"instruction": "hi", "input": None, "output": "yo", "system": ""}, [("user", "hi"), ("assistant", "yo")]),
        (
            "alpaca",
            {"instruction": "hi", "output": "yo", "system": "Be."},
            [("system", "Be."), ("user", "hi"), ("assistant", "yo")],
        ),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        ("context", {"context": "q", "target": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            [("system", ""), ("user", "q"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        (  # ChatGLM3's own tuning files
            "sharegpt",
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        ("columns", {"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
    ],
)
def test_a_form_is_recognised_by_its_keys_and_said(form: str, row: dict, wanted: list) -> None:
    loaded = load([row, row])
    assert turns(loaded) == wanted
    assert loaded.notes[0].startswith(f"train.jsonl: 2 rows, form {form} (")
    assert loaded.spans == [data.Span("train.jsonl", form, 0, 2)]
    assert loaded.rows[1].where == "train.jsonl:2"
    assert loaded.rows[1].meta["row"] == row
    if form != "columns":
        assert [(turn.role, turn.text) for turn in forms.FORMATS[form](row).turns] == wanted


def test_message_keys_reach_their_turn() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "look"}]}
    messages = [
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": "draft", "learn": False},
        {"role": "user", "content": "again"},
        call,
        {"role": "tool", "content": "22 C"},
        {"role": "assistant", "content": "a", "weight": 0.5},
    ]
    found = load([{"messages": messages}]).rows[0].turns
    assert found[0] == Turn("user", "q", extra={"name": "Ann"})
    assert found[1] == Turn("assistant", "draft", learn=False)
    assert found[3] == Turn("assistant", "", extra={"tool_calls": [{"name": "look", "arguments": {}, "id": "1"}]})
    assert found[5].weight == 0.5


def test_instruction_and_input_are_joined_as_asked() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert turns(load([row], options={"join": "\n\n"}))[0] == ("user", "add\n\n1 2")


def test_columns_name_free_keys() -> None:
    row = {"q": "what", "ctx": "here", "a": "that", "sys": "Be.", "old": [["x", "y"]], "w": 2}
    columns = {"prompt": "q", "input": "ctx", "response": "a", "system": "sys", "history": "old", "weight": "w"}
    loaded = load([row], columns=columns)
    assert turns(loaded) == [("system", "Be."), ("user", "x"), ("assistant", "y"), ("user", "what\nhere"), ("assistant", "that")]
    assert loaded.rows[0].weight == 2
    chats = [{"chat": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    assert turns(load(chats, columns={"messages": "chat"})) == [("user", "q"), ("assistant", "a")]
    assert load([{"body": "plain"}], options={"want": "text"}, columns={"text": "body"}).rows[0].text == "plain"


def test_rows_of_several_forms_are_read_where_each_is_recognisable() -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    loaded = load([ROW, ROW, chat])
    assert len(loaded.rows) == 3
    assert "forms alpaca (instruction, input, output) 2, messages (messages) 1" in loaded.notes[0]
    message = error([ROW, ROW, chat, {"instruction": "x", "prompt": "y"}])
    assert message.split("\n")[0] == "train.jsonl:4: an 'alpaca' row needs the key 'output'; this row has ['instruction', 'prompt']"


def test_an_unknown_form_lists_the_keys_the_forms_and_the_line_to_paste() -> None:
    message = error([{"id": 7, "query_text": "a", "reply_text": "b"}])
    assert message.startswith("train.jsonl:1: no known form in the keys ['id', 'query_text', 'reply_text']\n")
    assert "alpaca (instruction, input, output" in message and "messages (messages" in message
    assert "columns: {prompt: query_text, response: reply_text}" in message
    assert turns(load([{"query_text": "a", "reply_text": "b"}], columns={"prompt": "query_text", "response": "reply_text"}))


def test_a_key_that_is_not_used_is_said() -> None:
    assert "keys not used: source, id" in load([{**ROW, "source": "web", "id": 3}]).notes[0]
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": False}
    assert any("KTO" in note for note in load([chat]).notes)
    mixed = [{**ROW, "source": "web"}, {"question": "q", "answer": "a", "id": 3}, {"messages": chat["messages"]}]
    assert load(mixed).notes[0].endswith("; keys not used: source, id"), "by none of the forms"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ({"format": "alpcaa"}, "did you mean 'alpaca'?"),
        ({"columns": {"promt": "instruction", "response": "output"}}, "did you mean 'prompt'?"),
        ({"columns": {"prompt": "instructoin", "response": "output"}}, "did you mean 'instruction'?"),
        ({"columns": {"prompt": "instruction"}}, "response"),
        ({"columns": {"text": "instruction"}}, "wanted {prompt: KEY, response: KEY}"),
        ({"columns": {"prompt": "instruction", "response": "output"}, "format": "messages"}, "do not go together"),
        ({"format": "text"}, "plain text has no question"),
        ({"format": "columns"}, "needs columns"),
    ],
)
def test_a_wrong_format_or_columns_is_mended_by_its_message(source: dict, wanted: str) -> None:
    assert wanted in error([ROW], **source)


def test_columns_override_recognition() -> None:
    assert turns(load([ROW], columns={"prompt": "output", "response": "instruction"})) == [("user", "yo"), ("assistant", "hi")]


# --- system, variables, weights, uses ------------------------------------------------------------------------------------


def test_the_system_turn_comes_from_the_row_then_the_source_then_the_run() -> None:
    rows = [{**ROW, "system": "row"}, ROW]
    assert [turns(load(rows, options={"system": "run"}, system="source"), i)[0][1] for i in (0, 1)] == ["row", "source"]
    assert turns(load(rows, options={"system": "run"}), 1)[0] == ("system", "run")
    empty = {
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    assert turns(load([empty], options={"system": "run"}))[0] == ("system", "")
    both = {**empty, "messages": [{"role": "system", "content": "x"}, *empty["messages"][1:]], "system": "y"}
    assert "keep one" in error([both])


def test_variables_fill_every_text() -> None:
    row = {"instruction": "Are you {{name}}?", "output": "Yes, {{ name }} by {{author}}. {{other}}"}
    loaded = load([row], options={"variables": {"name": "Xiaozhi", "author": "us"}, "system": "You are {{name}}."})
    assert [text for _, text in turns(loaded)] == ["You are Xiaozhi.", "Are you Xiaozhi?", "Yes, Xiaozhi by us. {{other}}"]
    assert loaded.rows[0].meta["row"] == row
    message = error([row], options={"variables": {"nme": "x"}})
    assert "stands in no row" in message and "did you mean 'name'?" in message and "{{author}}" in message


def test_variables_fill_tool_calls_and_schemas() -> None:
    call = {"name": "w", "arguments": {"of": ["{{name}}", 1]}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    row = {"messages": messages, "tools": [{"name": "w", "description": "by {{author}}"}]}
    found = load([row], options={"variables": {"name": "Nova", "author": "us"}}).rows[0].turns
    assert found[0].extra == {"tools": [{"name": "w", "description": "by us"}]}
    assert found[1].extra == {"tool_calls": [{"name": "w", "arguments": {"of": ["Nova", 1]}}]}


@pytest.mark.few(5)
@pytest.mark.parametrize("depth", [250, 600, 950, 970, 985, 1000, 3000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_no_depth_of_nesting_is_more_than_a_bad_row(depth: int, opening: str) -> None:
    nested = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    call = '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": %s}]}'
    inner = json.dumps(f'{{"name": "w", "arguments": {nested}}}')
    for row in (f'{{"instruction": "q", "output": {nested}}}', f"[{nested}]", call % nested, call % inner):
        message = error(json.dumps(ROW) + "\n" + row)
        assert message.startswith("train.jsonl:2") and ("nested too deep" in message or "call that cannot be read" in message)


def test_weight_is_passes_over_the_source() -> None:
    rows = [{**ROW, "output": str(i)} for i in range(101)]

    def answers(weight: float) -> list[int]:
        return [int(row.turns[-1].text) for row in load(rows, weight=weight).rows]

    assert answers(2) == [*range(101), *range(101)]
    half = answers(0.5)
    assert len(half) == 50 and half == sorted(set(half)) and half != list(range(50)) and half == answers(0.5)
    assert answers(1.5) == [*range(101), *half]
    assert "leaves none of the 101 rows" in error(rows, weight=0.001)


def test_max_samples_takes_the_first_rows_and_says_so() -> None:
    loaded = load([{**ROW, "output": str(i)} for i in range(9)] + [{"bad": 1}], max_samples=4)
    assert [row.turns[-1].text for row in loaded.rows] == ["0", "1", "2", "3"]
    assert "only the first 4" in loaded.notes[0]


def test_a_row_weight_scales_its_loss() -> None:
    assert [row.weight for row in load([{**ROW, "weight": 0.25}, ROW]).rows] == [0.25, 1.0]
    for wrong in ("heavy", -1, True, [1]):
        assert "train.jsonl:1: 'weight' must be a number >= 0" in error([{**ROW, "weight": wrong}])


def test_prompts_need_no_answer_and_keep_it_as_the_reference() -> None:
    rows = [ROW, {"instruction": "no answer"}, {"instruction": "empty", "output": ""}]
    loaded = load(rows, options={"want": "prompts"})
    assert [row.turns for row in loaded.rows] == [(Turn("user", "hi"),), (Turn("user", "no answer"),), (Turn("user", "empty"),)]
    assert [row.meta.get("reference") for row in loaded.rows] == ["yo", None, ""]
    assert [row.meta["row"] for row in loaded.rows] == rows
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}
    assert load([chat], options={"want": "prompts"}).rows[0].turns[-1] == Turn("user", "c")


def test_plain_text_becomes_documents() -> None:
    lines = load("one\r\ntwo\n", "a.txt", {"want": "text"})
    assert [row.text for row in lines.rows] == ["one", "two"] and isinstance(lines.rows[0], Document)
    assert "every line is a document" in lines.notes[1]
    blocks = load("one\nstill one\n\n\ntwo\n", "a.txt", {"want": "text"})
    assert [(row.text, row.where) for row in blocks.rows] == [("one\nstill one", "a.txt:1"), ("two", "a.txt:5")]
    assert load([{"text": "x", "id": 1}], options={"want": "text"}).rows[0].text == "x"
    assert "kind: pretrain" in error("one\n", "a.txt")
    assert "columns: {text: KEY}" in error([ROW], options={"want": "text"})
    assert "a.jsonl:2: the text 'text' is empty" in error([{"text": "x"}, {"text": " "}], "a.jsonl", {"want": "text"})


# --- files ---------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t\"',;\\{}[]"), max_size=12)
FILLED = TEXT.filter(lambda text: text.strip().strip("\u200b\u200c\u200d\u2060\ufeff"))  # blanks without width are blanks too
ROWS = st.lists(st.fixed_dictionaries({"instruction": FILLED, "input": TEXT, "output": FILLED}), min_size=1, max_size=6)


def as_array(rows: list[dict], gap: int) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=gap or None)


def as_lines(rows: list[dict], gap: int) -> str:
    return ("\n" * (gap + 1)).join(json.dumps(row) for row in rows)


def back_to_back(rows: list[dict], gap: int) -> str:
    return "".join(json.dumps(row, indent=gap or None) for row in rows)


def as_wrapped(rows: list[dict], gap: int) -> str:
    return json.dumps({"version": [1], "data": rows, "n": {}}, indent=gap or None)


def as_csv(rows: list[dict], gap: int) -> str:
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, list(rows[0]), quoting=csv.QUOTE_ALL if gap else csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sheet.getvalue()


@cases(60)
@given(
    rows=ROWS,
    gap=st.integers(0, 2),
    layout=st.sampled_from([as_array, as_lines, back_to_back, as_wrapped, as_csv]),
    bom=st.booleans(),
)
def test_every_layout_gives_the_same_rows_and_the_right_lines(rows: list[dict], gap: int, layout, bom: bool) -> None:
    text = layout(rows, gap)
    name = "rows.csv" if layout is as_csv else "rows.json"
    loaded = load(text.encode("utf-8-sig" if bom else "utf-8"), name)
    assert [row.meta["row"] for row in loaded.rows] == rows
    assert any("BOM" in note for note in loaded.notes) == bom
    lines = text.split("\n")
    for row in loaded.rows:
        start = int(row.where.rpartition(":")[2])
        first_field = next(iter(row.meta["row"].values())).split("\n")[0].replace('"', '""')
        opening = first_field if layout is as_csv else "{"
        assert opening in lines[start - 1]
    if layout is as_lines:
        assert [row.where for row in loaded.rows] == [f"{name}:{1 + i * (gap + 1)}" for i in range(len(rows))]


def test_a_csv_row_over_several_lines_keeps_its_first_line() -> None:
    text = 'instruction,output\n"a\nb",c\nd,"e\n\nf"\ng,h\n'
    loaded = load(text, "x.csv")
    assert [(row.turns[0].text, row.where) for row in loaded.rows] == [("a\nb", "x.csv:2"), ("d", "x.csv:4"), ("g", "x.csv:7")]
    assert turns(load("question;answer\nq;a\n", "x.csv")) == turns(load("question\tanswer\nq\ta\n", "x.tsv"))
    assert "x.csv:3: the row has 3 fields, the header has 2" in error("question,answer\nq,a\nq,a,b\n", "x.csv")
    assert "x.csv:2: broken CSV" in error('question,answer\nq,"a\nq,a\n', "x.csv")
    assert "names the column 'a' twice" in error("a,a\n1,2\n", "x.csv")


def test_history_in_csv_is_a_json_string() -> None:
    text = 'instruction,output,history\nc,d,"[[""a"", ""b""]]"\ne,f,\n'
    loaded = load(text, "x.csv")
    assert turns(loaded) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert turns(loaded, 1) == [("user", "e"), ("assistant", "f")]


def test_content_decides_not_the_suffix() -> None:
    for name in ("a.txt", "a.json", "a.csv", "a", "a.jsonl"):
        assert turns(load([ROW], name)) == [("user", "hi"), ("assistant", "yo")]
    assert load("[1] a footnote, not JSON\n", "b.txt", {"want": "text"}).rows[0].text == "[1] a footnote, not JSON"
    one = load(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}), "one.json")
    assert len(one.rows) == 1, "a row with a list in it is not a wrapper"
    assert "the rows are the list under the key 'data'" in load(json.dumps({"data": [ROW]}), "w.json").notes[1]


def test_a_folder_gives_its_data_files_in_order() -> None:
    Path("set").mkdir()
    for name in ("b.json", "a.jsonl", "README.md", ".hidden.json"):
        write(f"set/{name}", [{**ROW, "output": name}])
    loaded = data.load([Source("set")])
    assert [(row.where, row.turns[1].text) for row in loaded.rows] == [("set/a.jsonl:1", "a.jsonl"), ("set/b.json:1", "b.json")]
    Path("none").mkdir()
    with pytest.raises(UserError, match="the folder 'none' has no data files"):
        data.load([Source("none")])


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("e.json", "", "e.json:1: the file is empty"),
        ("e.json", " \n\n", "e.json:1: the file is empty"),
        ("e.json", "[]", "e.json:1: the file has no rows"),
        ("e.csv", "instruction,output\n", "e.csv:1: the file has no rows"),
        ("b.json", bytes(range(256)) * 8, "binary file"),
        ("b.json", b"\x1f\x8b\x08\x00aaaa", "binary file (gzip)"),
        ("b.json", b"PAR1\x15\x04", "binary file (Parquet)"),
        ("u.json", json.dumps([ROW]).encode("utf-16"), "this is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 u.json"),
        ("u.json", json.dumps([ROW]).encode("utf-16-le"), "this is UTF-16"),
        (
            "g.json",
            '[\n{"instruction": "你好", "output": "你好"}]'.encode("gbk"),
            "g.json:2: byte 0xc4 is not UTF-8; the file looks like GBK",
        ),
        ("t.json", "hello", "t.json:1:1: expected '[' or '{' (JSON), got 'hello'"),
        ("d.json", "[" * 100000, "nested too deep"),
        ("n.json", '[{"a": ' + "9" * 5000 + "}]", "n.json:1:2: "),
    ],
)
def test_a_file_that_cannot_be_read_says_why(name: str, content: str | bytes, wanted: str) -> None:
    assert wanted in error(content, name)


def test_a_missing_file_names_the_near_ones() -> None:
    write("train.json", [ROW])
    with pytest.raises(UserError, match=r"'trian.json' is not there; did you mean 'train.json'\?"):
        data.load([Source("trian.json")])
    with pytest.raises(UserError, match=r"'xyz' is not there; that folder has \['train.json'\]"):
        data.load([Source("xyz")])
    with pytest.raises(UserError, match="there is no folder"):
        data.load([Source("no/where.json")])


A, B = '{"instruction": "a", "output": "1"}', '{"instruction": "b", "output": "2"}'


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("x.json", f"[\n{A}\n{B}\n]", 'x.json:3:1: expected \',\' after line 2 between two rows, got \'{"instruction": "b", "ou\''),
        (
            "x.json",
            '[\n{\n"instruction": "a"\n"output": "1"\n}\n]',
            "x.json:4:1: expected ',' after line 3, got '\"output\": \"1\"' (in the row that starts in line 2)",
        ),
        ("x.json", f"[\n{A},\n{B},\n]", "x.json:4:1: a comma before ']'"),
        ("x.json", f"[\n{A},\n{B}\n", "x.json:4:1: the file ends inside the array: expected ']'"),
        ("x.json", f"[\n{A[:-1]},\n{B}\n]", "x.json:2:35: the row does not end: expected '}'"),
        ("x.json", f"{A},\n{B}\n", "x.json:1:36: rows are separated by ','"),
        ("x.json", f"[{A}] x", "expected the end of the file after ']', got 'x'"),
        ("x.jsonl", f"{A}\n{B[:-3]}\n{A}\n", "x.jsonl:2:33: a string does not end before the line does"),
        ("x.jsonl", f"{A}\nhello\n", "x.jsonl:2:1: expected a value, got 'hello'"),
        ("x.jsonl", f"{A[:-1]},}}\n", "x.jsonl:1:36: a comma before '}'"),
        ("x.jsonl", A.replace('"a"', '"a\\q"') + "\n", "an invalid \\ escape"),
        ("x.jsonl", A[:-1] + ', "output": "x"}', "x.jsonl:1: the key 'output' stands twice in one object"),
        (
            "x.jsonl",
            A.encode() + b'\n{"instruction": "\xd6", "output": "\xe4\xbd\xa0"}\n' + "你\n你\n你\n".encode(),
            "x.jsonl:2: the row has bytes that are not UTF-8",
        ),
    ],
)
def test_broken_json_names_file_line_and_column(name: str, text: str, wanted: str) -> None:
    assert wanted in error(text, name).split("\n")[0]


# --- rows ----------------------------------------------------------------------------------------------------------------


def chat(*roles: str, text: str = "x") -> dict:
    return {"messages": [{"role": role, "content": text} for role in roles]}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([1, 2], "a row must be a JSON object, this is a list ([1, 2])"),
        ({"instruction": "a", "outptu": "b"}, "needs the key 'output'; this row has ['instruction', 'outptu']; did you mean 'output' by 'outptu'?"),
        ({"instruction": "a", "output": 3}, "'output' must be a string, not a number (3)"),
        ({"instruction": "a", "output": None}, "'output' must be a string, not null"),
        ({"instruction": "a", "output": {"b": 1}}, "'output' must be a string, not an object ({\"b\": 1}); use a JSON string, or pick other keys with columns:"),
        ({"instruction": "a", "output": " \n"}, "the answer is empty"),
        ({"instruction": "", "input": " ", "output": "b"}, "the question is empty"),
        ({"instruction": "a", "output": "\ud800"}, "'output' holds half of a surrogate pair"),
        ({**ROW, "history": [["a"]]}, "'history' must be a list of [question, answer] pairs of strings; entry 1 is a list ([\"a\"])"),
        ({**ROW, "history": [["a", ""]]}, "the answer (turn 2) is empty"),
        (chat("user", "bot"), "message 2 has the unknown role 'bot'; roles are system, user, assistant, tool (or human, gpt)"),
        (chat("user", "asistant"), "did you mean 'assistant'?"),
        (chat("system", "system"), "only system turns"),
        (chat("system"), "only system turns"),
        (chat(), "no turns"),
        (chat("assistant", "user"), "turn 1: the first turn is by 'assistant', it must be by 'user'"),
        (chat("assistant"), "no user turn"),
        (chat("user", "user", "assistant"), "turn 2: roles must alternate, here are two user turns in a row"),
        (chat("user", "assistant", "assistant"), "turn 3: roles must alternate"),
        (chat("user", "system", "assistant"), "turn 2 is a system turn; it may only stand first"),
        (chat("user", "tool", "assistant"), "turn 2: 'tool' may not follow 'user'"),
        (chat("user", "assistant", "user"), "the last turn is by 'user'; a row to learn from must end with the assistant's answer"),
        (chat("user", "assistant", text=""), "the question is empty"),
        ({"messages": "hello"}, "'messages' must be a list, not a string"),
        ({"messages": ["hello"]}, "message 1 must be an object with role and content"),
        ({"messages": [{"role": "user", "contnt": "x"}]}, "message 1 needs the key 'content'; it has ['role', 'contnt']; did you mean 'content' by 'contnt'?"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1: 'content' must be a string, not a list"),
        ({"messages": [{"role": "user", "content": "x", "learn": "no"}]}, "message 1: 'learn' must be true or false"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{}"}]}, "message 2 is a 'function_call' turn"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "a preference row (chosen, rejected)"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(row: object, wanted: str) -> None:
    message = error([ROW, ROW, row])
    first = message.split("\n")[0]
    assert first.startswith("train.jsonl:3: ")
    assert wanted in first


def test_all_bad_rows_are_told_in_three_lines() -> None:
    rows = [ROW if i % 2 else {**ROW, "output": ""} for i in range(40)]
    write("more.jsonl", [{**ROW, "output": 1}, ROW])
    write("train.jsonl", rows)
    with pytest.raises(UserError) as caught:
        data.load([Source("train.jsonl"), Source("more.jsonl")])
    assert str(caught.value).split("\n") == [
        "train.jsonl:1: the answer is empty",
        "and 20 more bad rows: lines 3, 5, 7, 9, 11, 13, 15, 17, ...",
        "glmtune data check train.jsonl more.jsonl lists them all; --fix OUT writes a cleaned copy",
    ]


# --- split ---------------------------------------------------------------------------------------------------------------


def conversations(start: int, stop: int) -> list[Conversation]:
    return [Conversation((Turn("user", f"q{i}"), Turn("assistant", f"a{i}"))) for i in range(start, stop)]


@cases(30)
@given(share=st.floats(0.05, 0.6), more=st.integers(1, 200))
def test_rows_added_later_move_no_row_between_train_and_dev(share: float, more: int) -> None:
    few, many = conversations(0, 200), conversations(0, 200 + more)
    train, dev = data.split(few, share)
    assert [row for row in few if row in train] == train and len(train) + len(dev) == 200
    train_then, dev_then = data.split([many[-1], *many[:-1]], share)
    assert set(map(str, train)) <= set(map(str, train_then)) and set(map(str, dev)) <= set(map(str, dev_then))


def test_equal_rows_are_never_on_both_sides_and_the_system_turn_does_not_count() -> None:
    rows = conversations(0, 100)
    train, dev = data.split(rows * 2, 0.3)
    assert not set(map(str, train)) & set(map(str, dev))
    with_system = [Conversation((Turn("system", "s"), *row.turns)) for row in rows]
    assert [row.turns[1:] for row in data.split(with_system, 0.3)[1]] == [row.turns for row in data.split(rows, 0.3)[1]]


def test_a_split_by_count_takes_that_many() -> None:
    train, dev = data.split(conversations(0, 50), 7)
    assert (len(train), len(dev)) == (43, 7)
    assert len(data.split(conversations(0, 10), 0.01)[1]) == 1, "a dev set is never empty"


@pytest.mark.parametrize("share", [50, 51, 1000, 0, -1, 2.5, 0.999999])
def test_a_dev_split_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="dev"):
        data.split(conversations(0, 50), share)


# --- the module ----------------------------------------------------------------------------------------------------------


def test_a_form_from_outside_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def shout(row: dict, join: str = "\n") -> Conversation:
        return Conversation((Turn("user", row["q"].upper()), Turn("assistant", row["a"].upper())))

    monkeypatch.setitem(forms.FORMATS, "shout", shout)
    assert turns(load([{"q": "hi", "a": "yo"}], format="shout")) == [("user", "HI"), ("assistant", "YO")]


def test_importing_data_is_light() -> None:
    code = "import sys, glmtune.data; print([m for m in ('torch', 'transformers', 'datasets', 'pydantic', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout == "[]\n"
    )


@pytest.mark.slow
def test_the_real_files_load(shared: Path) -> None:
    for name, count, form in (
        ("alpaca_en.json", 600, "alpaca"),
        ("alpaca_zh.json", 600, "alpaca"),
        ("kto_en.json", 150, "messages"),
    ):
        loaded = data.load([Source(str(shared / "data" / name))])
        assert (len(loaded.rows), loaded.spans[0].format) == (count, form)
    second = data.load([Source(str(shared / "data/alpaca_zh.json"))]).rows[1]
    assert second.where.endswith("alpaca_zh.json:7")
    columns = {"prompt": "question", "response": "answer"}
    loaded = data.load([Source(str(shared / "data/gsm8k_train.jsonl"), columns=columns)])
    assert len(loaded.rows) == 2000 and loaded.rows[1999].where.endswith(":2000")
    for name, count in (("c4.jsonl", 120), ("wiki.txt", 10)):
        assert len(data.load([Source(str(shared / "data" / name))], want="text").rows) == count

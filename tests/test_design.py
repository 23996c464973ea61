"""Sample design: what is written is read back, under every option; what is not quite it is read with tolerance, and said."""

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from glmtune import cli, data, design
from glmtune.design import CHOICES, PRESETS, Design, Schema, parse, render
from glmtune.errors import UserError
from glmtune.run import Source, load_run

from . import tiny
from .cases import cases

EXAMPLES = Path(__file__).parents[1] / "examples" / "design"
NAMES = ("reviews", "entities", "events")
SCHEMAS = {(name, language): design.load_schema(EXAMPLES / f"{name}.yml", language) for name in NAMES for language in ("en", "zh")}
ZH, EN = SCHEMAS["reviews", "zh"], SCHEMAS["reviews", "en"]
ENTITIES = SCHEMAS["entities", "en"]
DESIGNS = [Design(*values) for values in itertools.product(*CHOICES.values())]  # type: ignore[arg-type]
ANSWERS = [one for one in DESIGNS if one.instruction == "first" and one.input == "No-MI"]  # the other two do not touch the answer


def items(name: str, schema: Schema) -> list[design.Item]:
    return design.read(str(EXAMPLES / f"{name}.jsonl"), schema)


def written(tmp_path: Path, *rows: object, name: str = "records.jsonl") -> str:
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def refused(action, *arguments: object) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        action(*arguments)
    return str(caught.value)


# --- the law: what is written is read back -----------------------------------------------------------------------------------

TRAPS = [
    *":：,，;；、。()（）\"'\\{}[]“”",
    "\n",
    "\r",
    "\t",
    " ",
    "\u2028",
    "\xa0",
    "NONE",
    "无",
    "未提及",
    "not mentioned",
    "place: x",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.lists(st.sampled_from([*TRAPS, "IL-2", "大学"]), min_size=1, max_size=4).map("".join),
).filter(lambda text: bool(text.strip()))


@st.composite
def records(draw: st.DrawFn, schema: Schema) -> design.Record:
    return {
        one.name: draw(
            st.sampled_from([None, *(label.name for label in one.labels)]) if one.labels else st.lists(TEXTS, max_size=3)
        )
        for one in schema.fields
    }


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "language"), SCHEMAS)
@cases(100, derandomize=True)
@given(st.data())
def test_parse_inverts_render_strictly_under_every_design(name, language, data):
    schema = SCHEMAS[name, language]
    record = data.draw(records(schema))
    reasons = {one.name: data.draw(TEXTS) for one in schema.fields}
    for one in ANSWERS:
        text = render(record, schema, one, reasons)
        assert text.strip()
        got = parse(f"{text}\n", schema, one)
        assert (got.how, got.record) == ("strict", record), (one.name, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_example_becomes_rows_that_data_reads(name, tmp_path):
    schema = SCHEMAS[name, "zh"]
    for one in [one for one in DESIGNS if schema.reasoning or one.reasoning == "none"]:
        rows = [design.sample(item, schema, one) for item in items(name, schema)]
        assert [parse(row["messages"][1]["content"], schema, one).record for row in rows] == [row["record"] for row in rows]
    path = tmp_path / "train.jsonl"
    design.write_rows(path, rows)
    loaded = data.load([Source(path=str(path))]).rows
    assert [turn.text for turn in loaded[0].turns] == [message["content"] for message in rows[0]["messages"]]


# --- what a sample looks like ------------------------------------------------------------------------------------------------


def test_es_sde_is_instruction_first_no_mi_lines_placeholder_text_labels():
    assert PRESETS["ES-SDE"].name == "inst-first_no-mi_lines_pu_txtlabel_no-cot"
    assert PRESETS["EW-SDE"].name == "inst-last_no-mi_natural_ou_txtlabel_no-cot"
    row = design.sample(items("reviews", ZH)[0], ZH, PRESETS["ES-SDE"])
    prompt, answer = (message["content"] for message in row["messages"])
    assert prompt.startswith("阅读下面的评论") and prompt.endswith("服务员还爱答不理。")
    assert answer == "口味：正面\n服务：负面\n价格：未提及\n环境：未提及"


RECORD: design.Record = {"taste": "positive", "service": None, "price": "negative", "place": None}
WHY = {"taste": "味道好", "service": "没提", "price": "太贵，不值", "place": "没提"}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["format=natural"], "口味：正面，服务：未提及，价格：负面，环境：未提及。"),
        (["format=natural", "unmentioned=omit"], "口味：正面，价格：负面。"),
        (["unmentioned=omit", "labels=number"], "口味：1\n价格：-1"),
        (["labels=number"], "口味：1\n服务：-2\n价格：-1\n环境：-2"),
        (["format=json", "unmentioned=omit"], '{"方面": "口味", "情感": "正面"}\n{"方面": "价格", "情感": "负面"}'),
        (["unmentioned=omit", "reasoning=cot"], "口味（味道好）：正面\n价格（太贵，不值）：负面"),
        (["unmentioned=omit", "reasoning=r-cot", "format=natural"], '口味：正面（味道好），价格：负面（"太贵，不值"）。'),
        (["unmentioned=omit", "reasoning=cot", "format=json", "labels=number"],
         '{"方面": "口味", "描述": "味道好", "情感": 1}\n{"方面": "价格", "描述": "太贵，不值", "情感": -1}'),
    ],
)  # fmt: skip
def test_the_answer_under_each_option(settings, wanted):
    assert render(RECORD, ZH, design.design("ES-SDE", settings), WHY) == wanted


def test_spans_under_each_option():
    record: design.Record = {"organization": ["Port of Hamburg, Inc."], "place": ["Hamburg", "Elbe"], "person": []}
    assert render(record, ENTITIES, Design()) == 'organization: "Port of Hamburg, Inc."\nplace: Hamburg, Elbe\nperson: NONE'
    assert render(record, ENTITIES, PRESETS["EW-SDE"]) == 'organization: "Port of Hamburg, Inc."; place: Hamburg, Elbe'
    assert render(record, ENTITIES, Design(labels="number")).startswith("0: ")
    assert render(record, ENTITIES, Design(format="json")).endswith('{"type": "person", "names": []}')


def test_an_answer_is_never_empty():
    nothing: design.Record = {"organization": [], "place": [], "person": []}
    assert render(nothing, ENTITIES, Design(unmentioned="omit")) == "NONE"
    assert render(nothing, ENTITIES, Design(unmentioned="omit", format="json")) == "[]"


def test_the_instruction_stands_first_last_or_nowhere():
    item = items("reviews", EN)[8]
    for place, begins, ends in (
        ("first", "Read the review", item.text),
        ("last", item.text, "not mentioned"),
        ("none", item.text, item.text),
    ):
        prompt = design.sample(item, EN, design.design("ES-SDE", [f"instruction={place}"]))["messages"][0]["content"]
        assert prompt.startswith(begins) and prompt.endswith(ends)
        assert (place == "none") == (prompt == item.text)


def test_numbers_are_explained_in_the_instruction():
    assert "1 = positive, 0 = neutral, -1 = negative" in design.instruction(EN, Design(labels="number"))
    assert "0 = organization, 1 = place" in design.instruction(ENTITIES, Design(labels="number"))
    assert design.instruction(EN, Design(labels="number")).endswith("write -2")


def test_modelling_the_input_is_the_runs_option():
    assert (Design().learn, Design(input="MI").learn) == ("all", "everything")


# --- reasons -----------------------------------------------------------------------------------------------------------------


def test_reasons_are_the_records_own_or_the_templates():
    found = design.reasons(items("reviews", ZH)[0], ZH, Design(reasoning="cot"))
    assert found == {
        "taste": "面条筋道，汤鲜",
        "service": "等得久，服务员爱答不理",
        "price": "评论没有谈到价格",
        "place": "评论没有谈到环境",
    }


def test_missing_reasons_are_errors():
    item = design.Item("x", {"organization": ["a"], "place": [], "person": []}, {}, "r.jsonl:3")
    assert "reasoning=cot needs reasons" in refused(design.reasons, item, ENTITIES, Design(reasoning="cot"))
    keyed = design.replace(ENTITIES, reasoning=design.Reasoning(key="why"))
    assert refused(design.reasons, item, keyed, Design(reasoning="cot")).startswith("r.jsonl:3: no reason for 'organization'")
    strange = design.replace(ENTITIES, reasoning=design.Reasoning(template={"en": "{sentense}"}))
    item = design.replace(item, row={"sentence": "x"})
    assert "did you mean 'sentence'" in refused(design.reasons, item, strange, Design(reasoning="cot"))


# --- tolerance ---------------------------------------------------------------------------------------------------------------

GOOD = {"taste": "positive", "service": "negative", "price": None, "place": None}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ([], "口味:正面\n服务:负面\n价格:未提及\n环境:未提及"),  # halfwidth colons
        ([], "口味：正面服务：负面价格：未提及环境：未提及"),  # no line breaks
        ([], "口味：正面，服务：负面，价格：未提及，环境：未提及。"),  # another format
        ([], "好的，结果如下：\n口味：正面\n服务：负面\n价格：未提及\n环境：未提及"),  # prose before
        ([], "口味：正面\n服务：负面\n价格：未提及\n环境：未提及\n\n希望有帮助！"),  # and after
        ([], "口味：好评\n服务：negative\n价格：未提及\n环境：-2"),  # synonyms, the other language, numbers
        ([], "口味：非常正面\n服务：有些负面\n价格：未提及\n环境：未提及"),
        ([], "口味：正面\n服务：负面"),  # missing is unmentioned
        ([], "- **口味**：正面\n- **服务**：负面\n- **价格**：未提及\n- **环境**：未提及"),
        ([], "口味是正面，服务是负面"),
        ([], "口味：正面\n口味：负面\n服务：负面"),  # the first counts
        ([], '{"口味": "正面", "服务": "负面"}'),  # JSON where none was asked for
        (["format=natural"], "口味：正面；服务：负面；价格：未提及；环境：未提及"),
        (["unmentioned=omit"], "口味：正面\n服务：负面\n价格：未提及"),  # a placeholder that should not stand there
        (["labels=number"], "口味：1分\n服务：-1\n价格：-2\n环境：未提及"),
        (["format=json"], '{"方面": "口味", "情感": "正面"}, {"方面": "服务", "情感": "负面"}'),
        (["format=json"], '```json\n[{"方面": "口味", "情感": "正面"}, {"方面": "服务", "情感": "负面"}]\n```'),
        (["format=json"], "{“方面”：“口味”，“情感”：“正面”}\n{“方面”：“服务”，“情感”：“负面”,}"),  # fullwidth punctuation
        (["format=json"], "{'方面': '口味', '情感': '正面'}\n{'方面': '服务', '情感': '负面'}"),
        (["format=json"], '{"方面": "口味", "情感": "正面"\n{"方面": "服务", "情感": "负面"'),  # braces missing
        (["reasoning=cot"], "口味（很好，不负面）：正面\n服务(慢):负面"),
        (["reasoning=r-cot"], "口味：正面（负面的一点没有）\n服务：负面"),
        (["reasoning=cot", "format=json"], '{"方面": "口味", "描述": "好", "情感": "正面"\n{"方面": "服务", "描述": "慢", "情感": "负面"'),
        (["reasoning=r-cot", "format=json"], '{"方面": "口味", "情感": "正面", "描述": "并不负面"\n{"方面": "服务", "情感": "负面", "描述": "慢"'),
    ],
)  # fmt: skip
def test_soft_answers_are_read_and_said_to_be_soft(settings, text):
    got = parse(text, ZH, design.design("ES-SDE", settings))
    assert (got.how, got.record) == ("soft", GOOD), got
    assert got.problems


def test_soft_spans():
    wanted = {"organization": ["Oslo University", "A, B"], "place": ["Oslo"], "person": []}
    for text in (
        "Organization: 'Oslo University', \"A, B\"\nPlace: Oslo.\nPerson: none",
        "organization : Oslo University，“A, B”; place = Oslo",
        '{"organization": ["Oslo University", "A, B"], "place": ["Oslo"], "person": []}',
    ):
        got = parse(text, ENTITIES, Design())
        assert (got.how, got.record) == ("soft", wanted), got


def test_blanks_and_order_are_no_matter_of_format():
    lines = '{"情感":"负面", "方面":"服务"}', '{"方面":"服务","情感":"负面"}'
    assert parse(lines[1], ZH, design.design("ES-SDE", ["format=json", "unmentioned=omit"])).how == "strict"
    assert (
        parse(lines[0], ZH, design.design("ES-SDE", ["format=json", "unmentioned=omit"])).how == "soft"
    )  # a reason would come too late
    got = parse("环境：未提及\n价格：未提及\n服务：负面\n口味：正面\n", ZH, Design())
    assert (got.how, got.record, list(got.record)) == ("strict", GOOD, list(GOOD))


def test_what_cannot_be_read_is_not_in_the_record():
    got = parse("taste: excellent\nservice: negative or positive\nprice: not mentioned\nplace: neutral", EN, Design())
    assert got.how == "soft"
    assert got.record == {"price": None, "place": "neutral"}
    assert [problem for problem in got.problems if "'excellent' names no label" in problem or "names several labels" in problem][1:]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *[(text, "positive") for text in ("1", "1.0", "+1", "1分", "1.", "good")],
        *[(text, "negative") for text in ("-1", "−1", "－1", "–1", "-1.00", "it is −1")],
        *[(text, "names no label") for text in ("1.5", ".1", "0.5", "10", "1,000", "0-1", "- 1", "− 1", "x-1", "1.0.1")],
        *[(text, f"denies {word!r}") for text, word in {
            "not positive": "positive", "isn't really good": "good", "no good": "good", "it is not 1": "1",
            "不正面": "正面", "并没有那么正面": "正面", "不好评": "好评",
        }.items()],
        *[(text, "positive") for text in ("非常正面", "不错的正面", "positive, nothing else")],
    ],
)  # fmt: skip
@pytest.mark.parametrize("labels", ["text", "number"])
def test_a_label_is_read_only_where_it_is_said(value, wanted, labels):
    got = parse(f"taste= {value}", EN, Design(labels=labels))
    if wanted in ("positive", "negative"):
        assert got.record["taste"] == wanted
    else:
        assert "taste" not in got.record and wanted in got.problems[1]


def test_a_key_that_stands_twice_is_said():
    text = '{"aspect": "taste", "sentiment": "positive", "sentiment": "negative"}'
    got = parse(text, EN, Design(format="json"))
    assert got.how == "soft" and got.record["taste"] == "positive"
    assert "'sentiment' stands twice: the first is taken" in got.problems


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "piece", tiny.slow_but([" ", "not "], [" ", "{", "(", "taste (", '\\"', "“,", ',"', '{"a":', "not ", "1.0"])
)
@pytest.mark.parametrize(
    "one", [Design(), Design(labels="number", reasoning="r-cot"), Design(reasoning="cot"), Design(format="json")]
)
def test_a_long_answer_of_one_piece_is_read(piece, one):
    """A collapsed model writes such. In seconds; it would be minutes if the time grew with the square of the length."""
    for schema, begin in ((EN, "taste"), (EN, "taste: "), (EN, '"'), (ENTITIES, "place: ")):
        if schema.reasoning or one.reasoning == "none":
            assert parse(f"{begin}{piece * (50_000 // len(piece))}x", schema, one).how in ("failed", "soft")


@pytest.mark.parametrize("text", ["", "I cannot say.", "未提及", "{}", "[", "{" * 5000, "：：：", "null"])
@pytest.mark.parametrize("one", [Design(), Design(format="json"), Design(format="natural", reasoning="cot")])
def test_an_answer_without_any_field_has_failed(text, one):
    got = parse(text, ZH, one)
    assert (got.how, got.record) == ("failed", {}) and got.problems


def test_under_omit_a_placeholder_says_that_nothing_is_mentioned():
    for text in ("Not mentioned.", "none"):
        got = parse(text, EN, Design(unmentioned="omit", format="natural"))
        assert got.how == "soft" and set(got.record.values()) == {None}


@cases(60, derandomize=True)
@given(st.data())
def test_no_answer_breaks_the_parser(data):
    pieces = st.sampled_from([*TRAPS, "口味", "服务", "正面", "负面", '{"方面": ', '"情感": ', "1", "-2", "null", "true"])
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    for one in ANSWERS:
        got = parse(text, ZH, one)
        if got.how == "strict" and one.format != "json" and one.reasoning == "none":
            assert sorted(text.strip()) == sorted(render(got.record, ZH, one))
        assert set(got.record) <= set(GOOD)


# --- records and schemas at the door -------------------------------------------------------------------------------------------


def test_a_value_may_be_a_name_a_number_or_a_word(tmp_path):
    row = {"review": "x", "taste": "正面", "service": -1, "price": "not mentioned", "place": -2}
    assert design.read(written(tmp_path, row), ZH)[0].record == GOOD


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("reviews", {"review": "x", "tast": 1}, "needs the key 'taste' (null where it is not mentioned)"),
        ("reviews", {"reviw": "x"}, "did you mean 'reviw'"),
        ("reviews", {"review": "x", "taste": "positiv", "service": None, "price": None, "place": None}, "did you mean 'positive'"),
        ("reviews", {"review": "x", "taste": True, "service": None, "price": None, "place": None}, "its labels are positive"),
        ("reviews", {"review": " ", "taste": None, "service": None, "price": None, "place": None}, "must be a text"),
        ("entities", {"sentence": "x", "entities": [{"type": "plaec", "text": "a"}]}, "'plaec' is no field"),
        ("entities", {"sentence": "x", "entities": [{"type": "place", "text": ""}]}, "must hold texts, not empty"),
        ("entities", {"sentence": "x", "entities": {"place": "Oslo"}}, "must be a list of texts"),
        ("entities", {"sentence": "x", "entities": {"plac": []}}, "did you mean 'place'"),
        ("entities", {"sentence": "x", "entities": ["Oslo"]}, "or pairs; found 'Oslo'"),
        ("entities", {"sentence": "x", "entities": 5}, "must be an object or a list"),
        ("entities", '{"sentence": "x", "entities": [', "expected"),
        ("entities", '["x"]', "a row must be a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_record_is_an_error_with_its_line(tmp_path, name, row, said):
    good = items(name, SCHEMAS[name, "en"])[0].row
    path = written(tmp_path, good, row)
    message = refused(design.read, path, SCHEMAS[name, "en"])
    assert message.startswith(f"{path}:2: ") and said in message, message


def test_all_bad_records_are_counted(tmp_path):
    path = written(tmp_path, *[{"review": "x"}] * 12)
    assert "and 11 more bad records" in refused(design.read, path, EN)


def test_pairs_and_objects_are_the_same_record(tmp_path):
    forms = [[{"type": "place", "text": "Oslo"}], [["place", "Oslo"]], {"place": ["Oslo"]}]
    path = written(tmp_path, *[{"sentence": "Oslo", "entities": form} for form in forms])
    assert [item.record["place"] for item in design.read(path, ENTITIES)] == [["Oslo"]] * 3
    assert design.not_in_text(design.read(path, ENTITIES)) == []
    other = written(tmp_path, {"sentence": "Bergen", "entities": {"place": ["Oslo"]}}, name="b.jsonl")
    assert design.not_in_text(design.read(other, ENTITIES)) == [f"{other}:1: 'Oslo'"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feilds": {}}, "unknown option 'feilds'; did you mean 'fields'?"),
        ({"fields": {"a": {"enn": "x"}}}, "fields.a: unknown option 'enn'"),
        ({"fields": {"a": {"en": "x: y"}}}, "'x: y' must not be empty"),
        ({"fields": {"a": "same", "b": "same"}}, "'same' stands for both 'a' and 'b'"),
        ({"labels": {"p": {"number": 1}, "n": {"number": 1}}}, "'1' stands for both"),
        ({"labels": {"p": "not mentioned"}}, "'not mentioned' stands for both"),
        ({"fields": {"a": {"kind": "label"}}, "labels": {}}, "neither it nor the schema has labels"),
        ({"fields": {}}, "fields: there are none"),
        ({"pair": ["a"]}, "pair: wanted two keys"),
        ({"task": {"zh": "任务"}}, "task has no wording in 'en'"),
        ({"names": {"feild": {"en": "x"}}}, "did you mean 'field'"),
        ({"names": {"field": {"en": "value"}}}, "must be called differently"),
        ({"labels": {1: "one"}}, "labels"),
        ({"fields": {"a": 5}}, "fields.a: wanted a text or a group"),
        ({"language": "fr"}, "language"),
    ],
)  # fmt: skip
def test_a_bad_schema_is_an_error(tmp_path, change, said):
    tree = {"task": {"en": "Do."}, "labels": {"p": "yes!", "n": "never"}, "fields": {"a": "A"}, **change}
    (tmp_path / "s.yml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    message = refused(design.load_schema, tmp_path / "s.yml")
    assert message.startswith(str(tmp_path / "s.yml")) and said in message, message


def test_a_schema_may_mix_labels_and_spans(tmp_path):
    tree = {
        "task": {"en": "Sort the ticket."},
        "fields": {"urgency": {"labels": {"low": None, "high": None}}, "product": None, "topic": {"labels": {"bug": None}}},
    }
    (tmp_path / "s.yml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    schema = design.load_schema(tmp_path / "s.yml")
    record: design.Record = {"urgency": "high", "product": ["Nova, v2"], "topic": None}
    assert render(record, schema, Design()) == 'urgency: high\nproduct: "Nova, v2"\ntopic: not mentioned'
    assert "urgency: low, high\ntopic: bug" in design.instruction(schema, Design())
    for one in ANSWERS:
        assert parse(render(record, schema, one), schema, one) == design.Parsed(record, "strict")


def test_settings_are_strict():
    assert design.design("EW-SDE", ["labels=number"]) == Design("last", "No-MI", "natural", "omit", "number", "none")
    assert "did you mean 'ES-SDE'" in refused(design.design, "ES-SED")
    assert "did you mean 'format'" in refused(design.design, "ES-SDE", ["fromat=json"])
    assert "instruction is one of first, last, none" in refused(design.design, "ES-SDE", ["instruction=middle"])
    assert "is no option" in refused(design.design, "ES-SDE", ["json"])


# --- scores and sweeps ---------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    gold = [{"organization": ["a", "b"], "place": [], "person": []}] * 3
    got = [
        design.Parsed({"organization": ["b", "a"], "place": [], "person": []}, "strict"),
        design.Parsed({"organization": ["a"], "place": [], "person": []}, "soft"),
        design.Parsed({}, "failed"),
    ]
    found = design.score(gold, got, ENTITIES)
    assert (found.rows, found.exact, found.wrong_strict, found.wrong_soft) == (3, 1 / 3, 2, 1)
    assert found.fields == {"organization": 1 / 3, "place": 2 / 3, "person": 2 / 3}  # an answer that failed says nothing of them
    assert found.accuracy == pytest.approx(5 / 9)
    assert found.f1 == 2 * 3 / (6 + 3)  # six names are wanted, three are given, and all three of them are right


def test_f1_counts_what_is_said_so_that_silence_earns_nothing():
    label = {"taste": "positive", "service": None, "price": None, "place": None}
    silent = dict.fromkeys(label)
    assert (
        design.score([label], [design.Parsed(silent, "strict")], EN).f1
        == 0
        != design.score([label], [design.Parsed(silent, "strict")], EN).accuracy
    )
    other = {**silent, "taste": "negative", "price": "negative"}  # one wanted, two given, none right
    assert design.score([label, label], [design.Parsed(other, "strict"), design.Parsed(label, "strict")], EN).f1 == 2 * 1 / (2 + 3)
    assert design.score([silent], [design.Parsed(silent, "strict")], EN).f1 == 1  # nothing to find, nothing said


def test_predictions_are_read_back_and_nothing_of_a_row_is_lost(tmp_path):
    one = Design()
    rows = [{**design.sample(item, ZH, one), "id": i} for i, item in enumerate(items("reviews", ZH))]
    rows = [{**row, "prediction": row["messages"][1]["content"]} for row in rows]
    rows[1]["prediction"] = "?"
    made, _, scores = design.parse_rows(written(tmp_path, *rows), ZH, one)
    assert [row["id"] for row in made] == list(range(len(rows))) and made[1]["how"] == "failed"
    assert scores is not None and (scores.wrong_strict, scores.exact) == (1, 15 / 16)
    assert design.parse_rows(written(tmp_path, {"prediction": "口味：正面"}), ZH, one)[2] is None
    assert "no text under 'prediction'" in refused(design.parse_rows, written(tmp_path, {"predicton": ""}), ZH, one)
    assert "has a key 'how' already" in refused(design.parse_rows, written(tmp_path, {"prediction": "", "how": 1}), ZH, one)
    assert "1 of 2 rows have no 'record'" in refused(design.parse_rows, written(tmp_path, rows[0], {"prediction": ""}), ZH, one)
    assert ":1: 'record': " in refused(design.parse_rows, written(tmp_path, {"prediction": "", "record": {"taste": 9}}), ZH, one)


def test_a_sweep_changes_one_option_at_a_time():
    found = design.variations(Design(), ZH)
    assert len(found) == 1 + 2 + 1 + 2 + 1 + 1 + 2 + 1  # the base, every other value of each option, EW-SDE
    assert len(design.variations(Design(), ENTITIES)) == len(found) - 2  # no reasons in that schema, no CoT
    assert found[0] == PRESETS["ES-SDE"] and PRESETS["EW-SDE"] in found


def test_a_sweep_writes_data_runs_and_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, source = Path("my sweep"), EXAMPLES / "reviews.yml"
    train, test = items("reviews", EN), items("reviews_test", EN)
    names = design.sweep(train, test, EN, source, Design(), folder, "some-model")
    assert "exists already" in refused(design.sweep, train, test, EN, source, Design(), folder, "some-model")
    for name in names:
        run = load_run(folder / "runs" / f"{name}.yaml")
        assert run.stage.learn == ("everything" if "_mi_" in name else "all")
        assert len(data.load(run.data).rows) == len(train)
        assert run.out in (folder / "run.sh").read_text(encoding="utf-8")
    assert design.table(folder) == dict.fromkeys(names)
    for name in names[:3]:
        rows = [json.loads(line) for line in (folder / "test" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        written(
            folder / "predictions", *[{**row, "prediction": row["messages"][1]["content"]} for row in rows], name=f"{name}.jsonl"
        )
    scores = list(design.table(folder).values())
    assert all(one is not None and (one.exact, one.wrong_strict) == (1, 0) for one in scores[:3]) and scores[3:] == [None] * (
        len(names) - 3
    )
    assert "is no folder of a sweep" in refused(design.table, tmp_path)
    for name in names[3:]:
        shutil.copy(folder / "predictions" / f"{names[0]}.jsonl", folder / "predictions" / f"{name}.jsonl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(  # all is answered already: what is left is the table
        ["sh", tmp_path / folder / "run.sh"], cwd=elsewhere, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and [line.split()[0] for line in ran.stdout.splitlines()] == ["design", *names], ran.stderr


def test_files_are_never_overwritten(tmp_path):
    design.write_rows(tmp_path / "a.jsonl", [{"a": 1}])
    assert "exists already" in refused(design.write_rows, tmp_path / "a.jsonl", [])
    assert "there is no folder" in refused(design.write_rows, tmp_path / "b" / "a.jsonl", [])


def test_a_sweep_names_test_records_that_are_trained_on(tmp_path, capsys):
    rows = [item.row for item in items("reviews", EN)]
    path = written(tmp_path, rows[3], {**rows[4], "review": f" {rows[4]['review'].upper()}\n"}, {**rows[5], "review": "new"})
    files = [str(EXAMPLES / "reviews.jsonl"), "--schema", str(EXAMPLES / "reviews.yml")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "design", *files, "--test", path, "--sweep", str(tmp_path / "sweep")])
    said = capsys.readouterr().err
    assert not stopped.value.code and f"2 of 3 test texts are trained on too: {path}:1, {path}:2" in said, said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RECORDS", "--test", "t.jsonl", "--out", "o.jsonl"], "--test is of no use without --sweep"),
        (["RECORDS", "--test", "RECORDS", "--sweep", "s", "--out", "o.jsonl"], "--out is of no use with --sweep"),
        (["--parse", "p.jsonl", "--sweep", "s"], "--sweep is of no use with --parse"),
        (["--table", "s", "--set", "format=json"], "--set is of no use with --table"),
        (["--table", "s", "--out", "o.jsonl"], "--out is of no use with --table"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    schema = [] if "--table" in arguments else ["--schema", str(EXAMPLES / "reviews.yml")]
    named = [str(EXAMPLES / "reviews.jsonl") if word == "RECORDS" else word for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "design", *named, *schema])
    assert stopped.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_cafe_example_is_what_its_script_makes_and_tests_what_is_not_trained_on():
    made = runpy.run_path(str(EXAMPLES / "cafe.py"))["make"]()
    assert made == {name: (EXAMPLES / name).read_text(encoding="utf-8") for name in ("cafe.jsonl", "cafe_test.jsonl")}
    for language in ("en", "zh"):
        schema = design.load_schema(EXAMPLES / "cafe.yml", language)
        train, test = (design.read(str(EXAMPLES / name), schema) for name in made)
        assert (len(train), len(test), design.trained_on(train, test)) == (240, 100, [])
        for item, one in itertools.product(test[:20], design.variations(Design(), schema)):
            answer = design.sample(item, schema, one)["messages"][1]["content"]
            assert parse(answer, schema, one) == design.Parsed(item.record, "strict")


def test_training_and_test_records_of_the_example_differ():
    texts = [item.text for name in ("reviews", "reviews_test") for item in items(name, ZH)]
    assert len(set(texts)) == len(texts) == 20
    assert not [note for name in ("entities", "events") for note in design.not_in_text(items(name, SCHEMAS[name, "en"]))]

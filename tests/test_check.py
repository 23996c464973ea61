import functools
import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import check, data
from glmtune.errors import UserError

from . import damage
from .cases import cases


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(count: int) -> list[dict]:
    return [{"instruction": f"问题 {i}?", "input": "", "output": f"Answer number {i}."} for i in range(count)]


def spoil(name: str, layout: str) -> tuple[str, int]:
    """A file of 20 rows whose eighth is damaged: its name and the line of the damage."""
    lines = [damage.line()(row) for row in rows(20)]
    lines[7] = damage.ALL[name].change(rows(20)[7])
    if layout == "array":
        Path("train.json").write_bytes(b"[\n" + b",\n".join(lines) + b"\n]\n")
        return "train.json", 9
    Path("train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return "train.jsonl", 8


def in_turn(names: Iterable[str]) -> list[Any]:
    """Every name with both layouts of a file; in the fast suite each with one of them, in turn."""
    layouts = ("array", "lines")
    return [
        pytest.param(name, layout, marks=[] if (i + j) % 2 else pytest.mark.slow)
        for i, name in enumerate(names)
        for j, layout in enumerate(layouts)
    ]


@pytest.mark.few(12)
@pytest.mark.parametrize(("name", "layout"), in_turn(damage.ALL))
def test_damage_is_found_at_its_line_and_nothing_else_is(name: str, layout: str) -> None:
    file, line = spoil(name, layout)
    found = check.check([file])
    assert damage.ALL[name].kind in [problem["kind"] for problem in found["problems"]]
    assert {(problem["file"], problem["line"]) for problem in found["problems"]} <= {(file, line)}
    errors = [problem for problem in found["problems"] if problem["level"] == "error"]
    assert bool(errors) == _is_refused(file), "an error is what training refuses"
    said = check.fix([file], "clean")
    removed = [json.loads(row) for row in Path("clean.removed.jsonl").read_text(encoding="utf-8").splitlines()]
    after = check.check(["clean"])
    assert after["rows"] + len(removed) == found["rows"]
    assert f"{after['rows']} in clean, {len(removed)} removed to clean.removed.jsonl" in said
    assert not [p for p in after["problems"] if p["level"] == "error" or p["kind"] == "exact-duplicate"]
    assert all(row["line"] == line and ("row" in row or "raw" in row) for row in removed)
    assert Path("clean").read_text(encoding="utf-8")[0] == ("[" if layout == "array" else "{")


def _is_refused(file: str) -> bool:
    class source:
        path, format, columns, weight, max_samples, system = file, None, None, 1.0, None, None

    try:
        data.load([source])
    except UserError:
        return True
    return False


@cases(15)
@given(
    at=st.sets(st.integers(0, 14), min_size=1),
    name=st.sampled_from(["missing brace", "truncated", "missing comma", "no JSON"]),
)
def test_reading_goes_on_after_every_broken_row(at: set[int], name: str) -> None:
    for layout in ("[\n{}\n]", "{}\n"):
        lines = [damage.DAMAGE[name].change(row).decode() if i in at else json.dumps(row) for i, row in enumerate(rows(15))]
        Path("x.json").write_text(layout.replace("{}", (",\n" if "[" in layout else "\n").join(lines)), encoding="utf-8")
        found = check.check(["x.json"])
        shift = 2 if "[" in layout else 1
        if name != "no JSON" or len(at) < 15:  # fifteen lines of anything are no JSON file
            assert {problem["line"] for problem in found["problems"]} == {i + shift for i in at}
            assert found["rows"] == 15


def test_a_comma_missing_between_rows_loses_no_row() -> None:
    lines = [json.dumps(row) for row in rows(3)]
    Path("train.json").write_text(f"[\n{lines[0]}\n{lines[1]},\n{lines[2]}]", encoding="utf-8")
    found = check.check(["train.json"])
    assert found["rows"] == 3
    assert [(p["line"], p["kind"], p["level"]) for p in found["problems"]] == [(3, "malformed-json", "error")]
    assert found["problems"][0]["message"].startswith("column 1: expected ',' after line 2 between two rows")
    check.fix(["train.json"], "clean.json")
    assert json.loads(Path("clean.json").read_text(encoding="utf-8")) == rows(3)
    assert Path("clean.json.removed.jsonl").read_text() == ""


def test_duplicates_are_found_across_files_whatever_their_numbers() -> None:
    Path("a.jsonl").write_text("\n".join(json.dumps({**row, "id": i}) for i, row in enumerate(rows(3))))
    Path("b.json").write_text(json.dumps([{"id": 77, **rows(3)[1]}, {"instruction": "new", "input": "", "output": "One."}]))
    problems = check.check(["a.jsonl", "b.json"])["problems"]
    assert [(p["file"], p["kind"], p["level"], p["message"]) for p in problems] == [
        ("b.json", "exact-duplicate", "warning", "the same row as a.jsonl:2")
    ]
    said = check.fix(["a.jsonl", "b.json"], "out.jsonl")
    assert said == "5 rows in: 4 in out.jsonl, 1 removed to out.jsonl.removed.jsonl (1 exact-duplicate)"
    assert len(Path("out.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_a_question_with_several_answers_is_a_note() -> None:
    Path("a.jsonl").write_text("\n".join(json.dumps({"instruction": "x", "output": f"{i}."}) for i in (1, 2)))
    found = check.check(["a.jsonl"])
    assert found["problems"] == []
    assert "same-question-other-answer: 1 questions have more than one answer (a.jsonl:1 and a.jsonl:2)" in found["notes"]


def test_rows_of_another_form_are_told_once() -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes."}]}
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows(3), chat]))
    problems = check.check(["a.jsonl"])["problems"]
    assert [(p["line"], p["kind"], p["level"]) for p in problems] == [(4, "mixed-form", "warning")]


def test_long_rows_are_errors_where_a_length_is_given() -> None:
    Path("a.jsonl").write_text("\n".join(json.dumps({"instruction": "q", "output": "x" * n + "."}) for n in (3, 30)))
    problems = check.check(["a.jsonl"], encode=lambda conversation: len(conversation.turns[-1].text), max_length=10)["problems"]
    assert [(p["line"], p["kind"], p["level"]) for p in problems] == [(2, "over-length", "error")]
    assert problems[0]["message"] == "31 tokens; the longest row may have 10"


def test_rows_of_other_stages_are_not_broken() -> None:
    prompts = [{"instruction": f"q{i}"} for i in range(3)]
    pairs = [{"instruction": f"q{i}", "chosen": "Good.", "rejected": "Bad."} for i in range(3)]
    calls = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "1"},
    ]
    tools = [{"conversations": [*calls, {"from": "gpt", "value": "One."}]}]
    for name, content in (("prompts", prompts), ("pairs", pairs), ("tools", tools)):
        Path(f"{name}.json").write_text(json.dumps(content))
        found = check.check([f"{name}.json"])
        assert found["problems"] == [] and found["rows"] == len(content)
    Path("text.txt").write_text("one\ntwo\n")
    assert check.check(["text.txt"])["problems"] == []
    pairs[1]["rejected"] = ""
    pairs[2]["rejected"] = "Good."
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert [(p["line"], p["kind"]) for p in check.check(["pairs.jsonl"])["problems"]] == [(2, "empty-answer"), (3, "same-answers")]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty-file"),
        (b"[]", "empty-file"),
        (b"\x1f\x8b\x08aaaa", "binary-file"),
        ('[{"instruction": "你好", "output": "你好"}]'.encode("gbk"), "encoding-damage"),
        (b'[{"a": 1, "b": 2}]', "unknown-form"),
        (b"hello", "malformed-json"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_problem_and_the_others_are_still_checked(content: bytes, kind: str) -> None:
    Path("bad.json").write_bytes(content)
    Path("good.json").write_text(json.dumps(rows(2)))
    found = check.check(["bad.json", "good.json"])
    assert [(p["file"], p["line"], p["kind"], p["level"]) for p in found["problems"]] == [("bad.json", 1, kind, "error")]
    assert any(note.startswith("good.json: 2 rows") for note in found["notes"])
    with pytest.raises(UserError, match="nothing was written"):
        check.fix(["bad.json"], "out.json")
    assert not Path("out.json").exists()


def test_fix_never_overwrites() -> None:
    Path("a.json").write_text(json.dumps(rows(2)))
    for taken in ("out.json", "out.json.removed.jsonl"):
        Path(taken).write_text("mine")
        with pytest.raises(UserError, match="never overwritten"):
            check.fix(["a.json"], "out.json")
        assert Path(taken).read_text() == "mine"
        Path(taken).unlink()
    with pytest.raises(UserError, match="there is no folder"):
        check.fix(["a.json"], "no/out.json")


def test_fix_keeps_the_layout_and_the_spelling_of_rows() -> None:
    Path("a.csv").write_text('question,answer\n"a\nb",Yes.\nc,\nd,No.\n')
    check.fix(["a.csv"], "out.csv")
    assert Path("out.csv").read_text() == 'question,answer\n"a\nb",Yes.\nd,No.\n'
    assert json.loads(Path("out.csv.removed.jsonl").read_text())["row"] == {"question": "c", "answer": ""}
    Path("a.txt").write_text("one\ntwo\none\n")
    check.fix(["a.txt"], "out.txt")
    assert Path("out.txt").read_text() == "one\ntwo\n"
    row = '{"instruction":   "caf\\u00e9", "output": "1.", "n": 1.10}'
    Path("a.jsonl").write_text(row + "\n")
    check.fix(["a.jsonl"], "out.jsonl")
    assert Path("out.jsonl").read_text() == row + "\n"


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "content", "out", "written"),
    [
        (
            "a.tsv",
            'prompt\tresponse\nq1, a\ta1\nq1, a\ta1\nq2\t\nq3\t"a3\nx"\n',
            "out.tsv",
            'prompt\tresponse\nq1, a\ta1\nq3\t"a3\nx"\n',
        ),
        ("a.tsv", "prompt\tresponse\nq1, a\ta1\nq1, a\ta1\n", "out.csv", 'prompt,response\n"q1, a",a1\n'),
        ("a.csv", 'prompt,response\nq1,"a\rb"\n', "out.csv", 'prompt,response\nq1,"a\rb"\n'),
        ("a.csv", "prompt,response\nq1,a1\n", "out", '{"prompt": "q1", "response": "a1"}\n'),
        ("a.txt", "one\ntwo\n\none\ntwo\n", "out.txt", '{"text": "one\\ntwo"}\n'),
        ("a.txt", "[Verse]\nand so on\n", "out", '{"text": "[Verse]"}\n{"text": "and so on"}\n'),
    ],
)
def test_what_fix_writes_reads_back_as_the_rows_that_were_kept(name: str, content: str, out: str, written: str) -> None:
    Path(name).write_bytes(content.encode())
    said = check.fix([name], out)
    assert Path(out).read_bytes().decode() == written
    assert said.endswith(f"so {out} has JSON Lines") == written.startswith("{")
    (kept,), (found,) = check.examine([out]), check.examine([name])
    good = [row.item.value for row in found.rows if row.records]
    assert [row.item.value for row in kept.rows] == [value for at, value in enumerate(good) if value not in good[:at]]


LATE = "…and it also says that the third ship came late, and that the"


def test_every_answer_of_a_row_is_looked_at() -> None:
    several = {"question": "q", "human_answers": ["This is fine."], "chatgpt_answers": ["None", "null", LATE]}
    refusal = "I'm sorry, but as an AI language model I cannot."
    declined = {"question": "r", "human_answers": ["Yes."], "chatgpt_answers": [refusal, "是的。"]}
    Path("a.jsonl").write_text("\n".join(map(json.dumps, [several, declined])))
    Path("dev.jsonl").write_text(json.dumps({"question": "r", "human_answers": ["No."], "chatgpt_answers": ["yes."]}))
    found = check.check(["a.jsonl"], dev=["dev.jsonl"])
    assert [(p["file"], p["line"], p["kind"]) for p in found["problems"]] == [
        ("a.jsonl", 1, "empty-answer"),
        ("a.jsonl", 1, "truncated-answer"),
        ("dev.jsonl", 1, "dev-overlap"),
    ]
    assert found["problems"][-1]["message"] == "the same row is trained on: a.jsonl:2"
    assert "a.jsonl: answers that decline, as chat programs do: 1 (lines 2)" in found["notes"]
    assert "a.jsonl: rows answered in another language or script than asked: 1 (lines 2)" in found["notes"]
    assert [note for note in found["notes"] if "other-answer" in note] == [
        "same-question-other-answer: 1 questions have more than one answer (a.jsonl:2 and dev.jsonl:1)"
    ]


@pytest.mark.parametrize(
    "row",
    [
        '{"instruction": "q", "output": "ok", "\\ud83d": 1}',
        '{"instruction": "q", "output": "ok", "more": [{"\\uD83D": 1}]}',
        '{"instruction": "q", "output": "ok", "\\ud83d": 1, "\\ud83d": 2}',
        '{"messages": [{"role": "\\ud83d", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    ],
)
def test_half_a_surrogate_pair_is_told_at_its_line_and_can_be_printed(row: str) -> None:
    Path("a.jsonl").write_text(
        "\n".join([json.dumps(rows(1)[0]), row, '{"instruction": "\\ud83d\\ude00", "output": "b", "\\ud83d\\ude00": 1}'])
    )
    found = check.check(["a.jsonl"])
    assert {(p["line"], p["level"]) for p in found["problems"]} >= {(2, "error")} and _is_refused("a.jsonl")
    assert not [p for p in found["problems"] if p["line"] == 3 and p["level"] == "error"]
    assert json.dumps(found, ensure_ascii=False).encode()


@pytest.mark.parametrize("text", ["Voilà, ça marche : « CAFÉ » à 5 °C.", "NÃO É UM PROBLEMA", "Это русский текст.", "10 µm ± 0.5 Â", "<b>bold</b> & 3 < 4",
                                  "def f():\n    return 1", "#travel #Wanderlust", "· · · ····", "Good morning. My name is Li", "你好！很高兴认识你"])  # fmt: skip
def test_good_text_is_not_called_damaged(text: str) -> None:
    Path("a.jsonl").write_text(json.dumps({"instruction": "q", "output": text}))
    assert check.check(["a.jsonl"])["problems"] == []


REAL = {  # every one looked at: each is really cut, doubled or damaged in the published file
    "alpaca_en.json": {"truncated-answer": 4, "exact-duplicate": 5},
    "alpaca_zh.json": {"truncated-answer": 3, "exact-duplicate": 2},
    "gsm8k_train.jsonl": {},
    "gsm8k_test.jsonl": {},
    "wiki.txt": {},
    "c4.jsonl": {"encoding-damage": 3, "escaped-text": 1},
    "kto_en.json": {"truncated-answer": 1, "leaked-special-token": 1},
    "dpo_en.json": {"truncated-answer": 1, "encoding-damage": 2, "control-characters": 1},
    "dpo_zh.json": {"truncated-answer": 1, "encoding-damage": 3, "exact-duplicate": 2},
    "toolcall_en.json": {"truncated-answer": 1, "exact-duplicate": 8},
    "toolcall_zh.json": {"exact-duplicate": 4},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", REAL)
def test_the_real_files_have_no_errors_and_no_false_alarms(name: str, shared: Path) -> None:
    found = check.check([shared / "data" / name])
    kinds = [problem["kind"] for problem in found["problems"]]
    assert {kind: kinds.count(kind) for kind in kinds} == REAL[name]
    assert {problem["level"] for problem in found["problems"]} <= {"warning"}


# --- every kind of damage, in files that are clean elsewhere --------------------------------------------------------------

Damages = dict[str, damage.Damage]


def clean(count: int) -> list[dict]:
    seen = [
        f"Ship {i * 7} and boat {i * 11} came {i} days late, with {i * 3} boxes of {'tea' if i % 2 else 'salt'}."
        for i in range(count)
    ]
    return [{"instruction": f"What was seen from pier {i}?", "input": "", "output": text} for i, text in enumerate(seen)]


def good_rows(file: Path) -> list[dict]:
    """The rows of a real file of which nothing is told."""
    found = check.check([file])
    bad = {problem["line"] for problem in found["problems"]}
    rows = [row for checked in check.examine([file]) for row in checked.rows if row.record and row.item.line not in bad]
    return [row.item.value for row in rows]


@functools.cache
def good_lines(file: Path) -> list[str]:
    """The same of a file that stays as it is, as JSON: nobody changes a row under another test."""
    return [json.dumps(row) for row in good_rows(file)]


def published_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in good_lines(file)]


def hold_to_the_truth(rows: list[dict], layout: str, damages: Damages = damage.DAMAGE) -> None:
    path = Path("train.json" if layout == "array" else "train.jsonl")
    done = damage.spoil(rows, path, layout, damages)
    found = check.check([path])
    places = {(problem["line"], problem["kind"], problem["level"]) for problem in found["problems"]}
    for line, (name, one) in done.items():
        if one.level == "note":
            assert any(f"{path}:{line}" in note for note in found["notes"] if note.startswith(one.kind)), name
        else:
            assert (line, one.kind, one.level) in places, (name, line, sorted(places))
    errors = {line for line, (_, one) in done.items() if one.level == "error"}
    assert {line for line, _, level in places if level == "error"} == errors, "nothing else is an error"
    assert {line for line, _, _ in places} <= done.keys(), "nothing is told of the rows beside"
    assert 0 <= found["rows"] - len(rows) <= 2, "no row is lost; one without its opening brace may count as two stretches"
    said = check.fix([path], "clean")
    kept, gone = (len(check.examine([name])[0].rows) for name in ("clean", "clean.removed.jsonl"))
    assert kept + gone == found["rows"] and said.startswith(f"{found['rows']} rows in: {kept} in clean, {gone} removed")


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_every_kind_of_damage_is_found_at_its_line_with_its_kind(layout: str) -> None:
    assert len(damage.ALL) > 90
    hold_to_the_truth(clean(140), layout)


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_every_odd_text_is_found_at_its_line_with_its_kind(layout: str) -> None:
    hold_to_the_truth(clean(80), layout, damage.ODD)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), in_turn(["alpaca_en.json", "alpaca_zh.json", "gsm8k_train.jsonl", "kto_en.json"]))
def test_every_kind_of_damage_is_found_in_copies_of_real_files(name: str, layout: str, shared: Path) -> None:
    rows = [{key: row[key] for key in row if key != "label"} for row in published_rows(shared / "data" / name)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = good_rows(Path("rows.jsonl")) if name == "kto_en.json" else rows  # without labels all answers are learned
    hold_to_the_truth(rows[:140], layout)
    for made in ("clean", "clean.removed.jsonl"):
        Path(made).unlink()
    hold_to_the_truth(rows[:80], layout, damage.ODD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), in_turn(["dpo_en.json", "dpo_zh.json", "kto_en.json", "toolcall_en.json", "toolcall_zh.json", "c4.jsonl"])
)
def test_broken_json_is_found_in_copies_of_real_files_of_every_stage(name: str, layout: str, shared: Path) -> None:
    hold_to_the_truth(published_rows(shared / "data" / name)[:40], layout, damage.BROKEN)


PAIRS: dict[str, damage.Damage] = {
    "same answers": damage.error("same-answers", damage.line(lambda row: {**row, "rejected": row["chosen"]})),
    "empty chosen": damage.error("empty-answer", damage.line(lambda row: {**row, "chosen": {**row["chosen"], "value": " "}})),
    "empty rejected": damage.error("empty-answer", damage.line(lambda row: {**row, "rejected": {**row["rejected"], "value": ""}})),
    "no rejected": damage.error("missing-key", damage.line(lambda row: {key: row[key] for key in row if key != "rejected"})),
    "null": damage.error("wrong-type", damage.line(lambda row: {**row, "chosen": None})),
    "number": damage.error("wrong-type", damage.line(lambda row: {**row, "rejected": 1})),
    "the user's turn": damage.error(
        "preference-row", damage.line(lambda row: {**row, "chosen": {**row["chosen"], "from": "human"}})
    ),
    "cut": damage.warning("truncated-answer", damage.line(lambda row: {**row, "chosen": {**row["chosen"], "value": "```\ncode"}})),
    "leaked": damage.warning(
        "leaked-special-token", damage.line(lambda row: {**row, "rejected": {**row["rejected"], "value": "</s>"}})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), in_turn(["dpo_en.json", "dpo_zh.json"]))
def test_damage_of_preference_rows_is_found_in_copies_of_real_files(name: str, layout: str, shared: Path) -> None:
    hold_to_the_truth(published_rows(shared / "data" / name)[:40], layout, PAIRS)


def test_labels_that_are_all_the_same_are_a_note() -> None:
    rows = [{"prompt": f"q{i}", "completion": f"{i}.", "label": i > 0} for i in range(3)]
    Path("a.json").write_text(json.dumps(rows))
    assert "a.json: labels: 2 good, 1 bad" in check.check(["a.json"])["notes"]
    Path("b.json").write_text(json.dumps(rows[1:]))
    found = check.check(["b.json"])
    assert "b.json: labels: 2 good, 0 bad: all are the same, so nothing sets good and bad apart" in found["notes"]
    assert found["problems"] == []
    Path("c.json").write_text(json.dumps([{**row, "label": i} for i, row in enumerate(rows)]))
    assert not any("labels" in note for note in check.check(["c.json"])["notes"]), "a number is the class of a text"


# --- training and watching ------------------------------------------------------------------------------------------------


def test_rows_of_dev_that_are_trained_on_are_told() -> None:
    rows = clean(10)
    Path("train.json").write_text(json.dumps(rows[:6]))
    dev = [
        rows[7],
        {**rows[2], "id": 5},
        {**rows[3], "output": "Nothing."},
        {**rows[4], "instruction": " what WAS seen from pier 4? "},
    ]
    Path("dev.jsonl").write_text("\n".join(map(json.dumps, dev)))
    found = check.check(["train.json"], dev=["dev.jsonl"])
    assert [(p["file"], p["line"], p["kind"], p["level"], p["message"]) for p in found["problems"]] == [
        ("dev.jsonl", 2, "dev-overlap", "warning", "the same row is trained on: train.json:1"),
        ("dev.jsonl", 3, "dev-overlap", "warning", "the same question is trained on: train.json:1"),
        ("dev.jsonl", 4, "dev-overlap", "warning", "the same row is trained on: train.json:1"),
    ]
    assert found["rows"] == 10
    assert check.check(["train.json"])["problems"] == check.check(["dev.jsonl"])["problems"] == []


def test_a_row_is_the_same_whichever_of_several_answers_it_has() -> None:
    Path("train.jsonl").write_text("\n".join(json.dumps({"question": "Which?", "answer": f"{i}."}) for i in range(3)))
    Path("dev.jsonl").write_text('{"question": "Which?", "answer": "2."}')
    problems = check.check(["train.jsonl"], dev=["dev.jsonl"])["problems"]
    assert [problem["message"] for problem in problems] == ["the same row is trained on: train.jsonl:3"]


def test_near_duplicates_are_notes_with_both_places() -> None:
    rows = clean(6)
    rows[4] = {**rows[1], "output": rows[1]["output"].replace("late", "early")}
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = check.check(["a.jsonl"])
    assert found["problems"] == []
    assert [note for note in found["notes"] if note.startswith("near")] == [
        # 20 words in 18 pieces of three, three of them with the word that differs: 15 common of 21
        "near-duplicates: 1 of 6 rows say nearly the same as an earlier one (a.jsonl:5 and a.jsonl:2 71%)"
    ]


def test_languages_and_lengths_are_told() -> None:
    rows = [{"instruction": "Translate.", "output": "你好，世界。"}, {"instruction": "你好吗？", "output": "很好，谢谢你。"}]
    Path("a.json").write_text(json.dumps(rows))
    found = check.check(["a.json"])
    assert "a.json: languages: Chinese 100.0%" in found["notes"]
    assert "a.json: rows answered in another language or script than asked: 1 (lines 1)" in found["notes"]
    assert (found["lengths"]["unit"], found["lengths"]["shortest"], found["lengths"]["longest"]) == ("characters", 11, 16)
    counted = check.check(["a.json"], encode=lambda record: 5)["lengths"]
    assert (counted["unit"], counted["histogram"]) == ("tokens", [[5, 5, 2]])


@pytest.mark.parametrize(("policy", "level"), [("error", "error"), ("skip", "warning"), ("cut-answer", "warning")])
def test_long_rows_follow_the_policy_of_the_run(policy: str, level: str) -> None:
    Path("a.jsonl").write_text("\n".join(json.dumps({"instruction": "q", "output": "x" * n + "."}) for n in (3, 30, 20)))
    found = check.check(["a.jsonl"], encode=lambda record: len(record.turns[-1].text), max_length=10, too_long=policy)
    assert [(p["line"], p["kind"], p["level"]) for p in found["problems"]] == [(2, "over-length", level), (3, "over-length", level)]
    assert "over-length: 2 of 3 rows have more than max_length=10 tokens; the longest has 31 (a.jsonl:2)" in found["notes"]


@cases(25)
@given(data=st.data(), layout=st.sampled_from(["array", "lines"]))
def test_rows_in_are_rows_out_and_rows_removed(data: Any, layout: str) -> None:
    rows = clean(12)
    lines = [damage.line()(row) for row in rows]
    for at in data.draw(st.sets(st.integers(0, 11))):
        lines[at] = damage.DAMAGE[data.draw(st.sampled_from(sorted(damage.DAMAGE)))].change(rows[at])
    Path("x.json").write_bytes(b"[" + b",\n".join(lines) + b"]" if layout == "array" else b"\n".join(lines))
    for made in ("out.json", "out.json.removed.jsonl"):
        Path(made).unlink(missing_ok=True)
    before = check.check(["x.json"])
    try:
        check.fix(["x.json"], "out.json")
    except UserError as error:  # a file of which nothing can be read
        assert "nothing was written" in str(error) and not Path("out.json").exists()
        return
    gone = Path("out.json.removed.jsonl").read_text(encoding="utf-8").splitlines()
    after = check.check(["out.json"]) if Path("out.json").read_text(encoding="utf-8").strip("[]\n") else {"rows": 0, "problems": []}
    assert after["rows"] + len(gone) == before["rows"]
    assert not [p for p in after["problems"] if p["level"] == "error"]


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "QA", "input": "Where is the cat {}?", "target": "On the mat."},
        {"content": "type#skirt*colour#red {}", "summary": "A red skirt."},
        {
            "instruction": "Human: Hi {}\nAssistant: Hello\nHuman: Where is the cat?\nAssistant:",
            "input": "",
            "output": "On the mat.",
        },
        {"question": "Where is the cat {}?", "human_answers": ["On the mat."], "chatgpt_answers": ["It is there.", "Somewhere."]},
        {"instruction": "Where is the cat {}?", "output": ["On the mat.", "42"]},
    ],
)
def test_good_rows_of_every_form_have_no_errors(row: dict, tmp_path: Path):
    rows = [{key: value.replace("{}", str(i)) if isinstance(value, str) else value for key, value in row.items()} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = check.check([tmp_path / "rows.jsonl"])
    assert [problem for problem in found["problems"] if problem["level"] == "error"] == [] and found["rows"] == 4


def test_only_the_rows_that_a_source_gives_are_looked_at() -> None:
    Path("data.yaml").write_text("mine: {path: rows, max_samples: 3}\n")
    Path("rows").mkdir()
    Path("rows/a.jsonl").write_text("\n".join(map(json.dumps, [*rows(2), {"instruction": "x"}, rows(2)[0]])))
    Path("rows/b.jsonl").write_text("nothing of this is read")
    found = check.check(["mine"])
    assert found["rows"] == 3
    assert [(p["file"].rpartition("/")[2], p["line"], p["kind"]) for p in found["problems"]] == [("a.jsonl", 3, "missing-key")]
    assert [note.rpartition("rows/")[2] for note in found["notes"] if "max_samples" in note] == [
        "a.jsonl: only the first 3 rows are looked at (max_samples 3)",
        "b.jsonl: not looked at (max_samples 3 reached)",
    ]
    assert check.fix(["mine"], "out.jsonl").startswith("3 rows in: 2 in out.jsonl, 1 removed")


def test_no_row_is_kept() -> None:
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows(2400))))
    (file,) = check._survey_all(["a.jsonl"], None, None, None)
    kept = [ref(row) for row in check.rows_of(file)]
    gc.collect()
    assert len(kept) == 2400 and not any(one() for one in kept)
    assert file.rows == [] and file.reading is not None


def test_a_file_that_changes_while_it_is_cleaned_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows(3))))
    real = check.whole

    def late(path: Path, texts: Any) -> None:
        Path("a.jsonl").write_text("\n".join(map(json.dumps, rows(4))))
        real(path, texts)

    monkeypatch.setattr(check, "whole", late)
    with pytest.raises(UserError, match="a.jsonl was changed while it was read; nothing was written"):
        check.fix(["a.jsonl"], "out.jsonl")
    assert [path.name for path in Path().iterdir()] == ["a.jsonl"]


def test_answers_that_decline_are_a_note() -> None:
    declined = {"question": "Where am I?", "answer": "I'm sorry, but as an AI language model I cannot see that."}
    Path("a.jsonl").write_text("\n".join(map(json.dumps, [{"question": "q", "answer": "Yes."}, declined])))
    found = check.check(["a.jsonl"])
    assert found["problems"] == [] and "a.jsonl: answers that decline, as chat programs do: 1 (lines 2)" in found["notes"]


def test_a_run_file_is_no_plain_text() -> None:
    Path("run.yaml").write_text("model: a\ndata: a.json\n")
    with pytest.raises(UserError, match="run.yaml is a run file or a registry, no data; name the files"):
        check.check(["run.yaml"])


def test_subfolders_that_are_left_out_are_told() -> None:
    Path("data/more/deep").mkdir(parents=True)
    Path("data/a.jsonl").write_text(json.dumps(rows(1)[0]))
    assert not any("subfolders" in note for note in check.check(["data"])["notes"])
    Path("data/more/deep/b.jsonl").write_text(json.dumps(rows(2)[1]))
    told = "data: its subfolders are left out (more/deep/b.jsonl and all else there); 'data/**/*' takes them too"
    assert told in check.check(["data"])["notes"] and check.check(["data/**/*"])["rows"] == 2


@pytest.mark.parametrize(
    "content",
    [
        "[\n{},\n{}\n],\n{},\n{}\n]\n",
        "[{}]\n{}\n{}\n{}\n",
        "[{}][{}]\n[{},{}]",
        "[{}, [{}, {}], {}]",
        "[\n{},\n[{},\n{},\n{}\n]\n",
        "[{},{},{},{}]]",
    ],
)
def test_a_bracket_too_many_hides_no_row(content: str) -> None:
    parts = content.split("{}")
    made = [text for part, row in zip(parts, map(json.dumps, rows(4)), strict=False) for text in (part, row)]
    Path("a.json").write_text("".join([*made, parts[-1]]))
    found = check.check(["a.json"])
    assert found["rows"] == 4 and {p["kind"] for p in found["problems"]} == {"malformed-json"}
    assert check.fix(["a.json"], "out.json").startswith("4 rows in: 4 in out.json, 0 removed")
    assert json.loads(Path("out.json").read_text(encoding="utf-8")) == rows(4)


# --- data sets that have a name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", ["data.yaml", "dataset_info.json"])
def test_a_data_set_is_checked_counted_and_written_by_its_name(tmp_path, registry):
    """As train reads it: the registry's file, its keys, its tags and its limit."""
    from glmtune import convert

    rows = [{"talk": [{"who": "me", "what": f"q{i}"}, {"who": "it", "what": f"a{i}"}]} for i in range(3)] + [{"talk": "broken"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "good.json").write_text(json.dumps(rows[:3]))
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}
    theirs = {"columns": {"messages": "talk"}, "tags": tags, "formatting": "sharegpt"}
    ours = {"columns": {"messages": "talk"}, "tags": tags}
    names = {"all": "rows.json", "good": "good.json"}
    told = {
        name: {"file_name": file, **theirs} if registry.endswith("json") else {"path": file, **ours} for name, file in names.items()
    }
    where = tmp_path / registry
    where.write_text(json.dumps(told))  # JSON is YAML too
    found = check.check(["all"], registry=where)
    assert found["rows"] == 4 and [problem["line"] for problem in found["problems"] if problem["level"] == "error"]
    assert check.check(["good"], dev=["good"], registry=where)["rows"] == 6
    assert convert.stats(["good"], registry=where)["turns"] == {"2": 3}
    convert.convert(["good"], "alpaca", tmp_path / "out.jsonl", registry=where)
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["instruction"], row["output"]) for row in made] == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    check.fix(["all"], tmp_path / "fixed.json", registry=where)
    assert len(json.loads((tmp_path / "fixed.json").read_text())) == 3
    with pytest.raises(UserError, match="'strange'"):
        check.check(["strange"], registry=where)

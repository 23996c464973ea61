import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmtune import check, data
from glmtune.errors import UserError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(count: int) -> list[dict]:
    return [{"instruction": f"问题 {i}?", "input": "", "output": f"Answer number {i}."} for i in range(count)]


def one(**keys: object) -> Callable[[dict], str]:
    return lambda row: json.dumps({**row, **keys}, ensure_ascii=False)


def spelled(change: Callable[[str], str]) -> Callable[[dict], str]:
    return lambda row: change(json.dumps(row, ensure_ascii=False))


def without(key: str) -> Callable[[dict], str]:
    return lambda row: json.dumps({name: value for name, value in row.items() if name != key}, ensure_ascii=False)


def messages(*pairs: tuple[str, str]) -> Callable[[dict], str]:
    return lambda row: json.dumps({"messages": [{"role": role, "content": text} for role, text in pairs]})


SENTENCE = "This sentence is here only to be long enough for anything. "
DAMAGE: dict[str, tuple[Callable[[dict], str], str]] = {
    "comma missing": (spelled(lambda s: s.replace('", "input"', '" "input"')), "malformed-json"),
    "colon missing": (spelled(lambda s: s.replace('"input":', '"input"')), "malformed-json"),
    "brace missing": (spelled(lambda s: s[:-1]), "malformed-json"),
    "quote missing": (spelled(lambda s: s[:-2] + "}"), "malformed-json"),
    "opening brace missing": (spelled(lambda s: s[1:]), "malformed-json"),
    "single quotes": (spelled(lambda s: s.replace('"', "'")), "malformed-json"),
    "trailing comma": (spelled(lambda s: s[:-1] + ",}"), "malformed-json"),
    "cut in half": (spelled(lambda s: s[: len(s) // 2]), "malformed-json"),
    "not JSON": (lambda row: "hello world", "malformed-json"),
    "bad escape": (spelled(lambda s: s.replace("Answer", "\\qnswer")), "malformed-json"),
    "raw tab": (spelled(lambda s: s.replace("Answer", "\tAnswer")), "malformed-json"),
    "quote inside": (spelled(lambda s: s.replace("Answer", 'An"sw"er')), "malformed-json"),
    "key twice": (spelled(lambda s: s[:-1] + ', "output": "b"}'), "duplicate-key"),
    "a list": (lambda row: '["a", "b"]', "not-an-object"),
    "null": (lambda row: "null", "not-an-object"),
    "no answer key": (without("output"), "missing-key"),
    "no question key": (without("instruction"), "missing-key"),
    "other keys": (lambda row: '{"a": 1}', "unknown-form"),
    "a number": (one(output=5), "wrong-type"),
    "a null": (one(output=None), "wrong-type"),
    "a list for a string": (one(output=["a"]), "wrong-type"),
    "nested JSON": (one(output={"a": 1}), "wrong-type"),
    "history": (one(history=[["a"]]), "wrong-type"),
    "weight": (one(weight="heavy"), "wrong-type"),
    "empty answer": (one(output=""), "empty-answer"),
    "blank answer": (one(output=" \n"), "empty-answer"),
    "empty question": (one(instruction=""), "empty-question"),
    "unknown role": (messages(("user", "a"), ("bot", "b")), "unknown-role"),
    "only system": (messages(("system", "a")), "no-user-turn"),
    "two user turns": (messages(("user", "a"), ("user", "b"), ("assistant", "c")), "role-order"),
    "assistant first": (messages(("assistant", "b"), ("user", "a")), "role-order"),
    "lone surrogate": (spelled(lambda s: s.replace("Answer", "\\ud83d")), "encoding-damage"),
    "UTF-8 as Latin-1": (one(output="Le cafÃ© est fermÃ©."), "encoding-damage"),
    "UTF-8 as Windows-1252": (one(output="Itâ€™s fine."), "encoding-damage"),
    "Chinese as Latin-1": (one(output="ä¸\xadæ–‡"), "encoding-damage"),
    "GBK as Latin-1": (one(output="你好，世界".encode("gbk").decode("latin-1")), "encoding-damage"),
    "UTF-8 as GBK": (one(output="你好，世界。"[2:].encode().decode("gbk", "replace")), "encoding-damage"),
    "lost characters": (one(output="锟斤拷锟斤拷"), "encoding-damage"),
    "replacement character": (one(output="The caf\ufffd is closed."), "encoding-damage"),
    "NUL": (spelled(lambda s: s.replace("Answer", "\\u0000")), "encoding-damage"),
    "bell": (spelled(lambda s: s.replace("Answer", "\\u0007")), "control-characters"),
    "im_end": (one(output="Yes.<|im_end|>"), "leaked-special-token"),
    "gMASK": (one(instruction="[gMASK]<sop>hi"), "leaked-special-token"),
    "INST": (one(instruction="[INST] hi [/INST]"), "leaked-special-token"),
    "end of text": (one(output="Yes.</s>"), "leaked-special-token"),
    "cut sentence": (one(output=SENTENCE * 2 + "And then it"), "truncated-answer"),
    "cut list": (one(output=SENTENCE + "It has these parts: a, b,"), "truncated-answer"),
    "code not closed": (one(output="```python\nprint(1)\n"), "truncated-answer"),
    "the row before": (lambda row: json.dumps(rows(20)[6], ensure_ascii=False), "exact-duplicate"),
}


def spoil(change: Callable[[dict], str], layout: str) -> tuple[str, int]:
    """A file of 20 rows whose eighth is damaged: its name and the line of the damage."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(20)]
    lines[7] = change(rows(20)[7])
    if layout == "array":
        Path("train.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        return "train.json", 9
    Path("train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "train.jsonl", 8


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_at_its_line_and_nothing_else_is(name: str, layout: str) -> None:
    change, kind = DAMAGE[name]
    file, line = spoil(change, layout)
    found = check.check([file])
    assert kind in [problem["kind"] for problem in found["problems"]]
    assert {(problem["file"], problem["line"]) for problem in found["problems"]} <= {(file, line)}
    errors = [problem for problem in found["problems"] if problem["level"] == "error"]
    assert bool(errors) == _is_refused(file), "an error is what training refuses"


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("name", DAMAGE)
def test_fix_keeps_every_row_or_tells_where_it_went(name: str, layout: str) -> None:
    file, line = spoil(DAMAGE[name][0], layout)
    before = check.check([file])
    said = check.fix([file], "clean")
    removed = [json.loads(row) for row in Path("clean.removed.jsonl").read_text(encoding="utf-8").splitlines()]
    after = check.check(["clean"])
    assert after["rows"] + len(removed) == before["rows"]
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


def test_all_damage_at_once_is_found_line_by_line() -> None:
    lines, wanted = [], {}
    for i, (change, kind) in enumerate(DAMAGE.values()):
        row = {"instruction": f"Question {i}?", "input": "", "output": f"Answer {i}."}
        lines += [json.dumps(row), json.dumps({**row, "output": "Another."}) if kind == "exact-duplicate" else change(row)]
        wanted[2 * i + 2] = kind
    lines[-1] = lines[-2]
    Path("train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = check.check(["train.jsonl"])["problems"]
    assert set(wanted) <= {problem["line"] for problem in found}
    places = {(problem["line"], problem["kind"]) for problem in found}
    assert set(wanted.items()) <= places
    assert {line for line, _ in places} == set(wanted)


@settings(deadline=None, max_examples=40)
@given(
    at=st.sets(st.integers(0, 14), min_size=1),
    name=st.sampled_from(["brace missing", "quote missing", "comma missing", "not JSON"]),
)
def test_reading_goes_on_after_every_broken_row(at: set[int], name: str) -> None:
    for layout in ("[\n{}\n]", "{}\n"):
        lines = [DAMAGE[name][0](row) if i in at else json.dumps(row) for i, row in enumerate(rows(15))]
        Path("x.json").write_text(layout.replace("{}", (",\n" if "[" in layout else "\n").join(lines)), encoding="utf-8")
        found = check.check(["x.json"])
        shift = 2 if "[" in layout else 1
        if name != "not JSON" or len(at) < 15:  # fifteen lines of anything are no JSON file
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
    calls = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "1"}]
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
    "c4.jsonl": {"encoding-damage": 3},
    "kto_en.json": {"truncated-answer": 4, "leaked-special-token": 1},
    "dpo_zh.json": {"encoding-damage": 3, "exact-duplicate": 2},
    "toolcall_zh.json": {"exact-duplicate": 4},
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_have_no_errors_and_no_false_alarms(name: str, shared: Path) -> None:
    found = check.check([shared / "data" / name])
    kinds = [problem["kind"] for problem in found["problems"]]
    assert {kind: kinds.count(kind) for kind in kinds} == REAL[name]
    assert {problem["level"] for problem in found["problems"]} <= {"warning"}

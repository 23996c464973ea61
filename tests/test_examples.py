"""Every example starts, and the identity data keeps its promises."""

import json
import re
from pathlib import Path

import pytest

from glmtune.run import load_run
from glmtune.training import train

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = sorted(EXAMPLES.rglob("*.yaml"))


@pytest.mark.few(1)
@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_trains_two_steps(path, tiny_model, tmp_path):
    run = load_run(path, [f"model={tiny_model}", f"out={tmp_path / 'run'}", "optim.steps=2", "samples=[]", "max_length=4096"])
    assert train(run).steps == 2


def rows(name: str) -> list[dict]:
    return json.loads((EXAMPLES / "identity" / f"{name}.json").read_text(encoding="utf-8"))


def questions(name: str) -> list[str]:
    found = []
    for row in rows(name):
        found += [m["content"] for m in row["messages"] if m["role"] == "user"] if "messages" in row else [row["instruction"]]
    return [re.sub(r"[\W_]+", "", text.lower()) for text in found]


def test_held_out_questions_occur_in_no_training_file():
    held_out = {name: set(questions(name)) for name in ("look_identity", "look_ordinary", "test_identity", "test_ordinary")}
    trained = set(questions("identity")) | set(questions("rehearsal"))
    for name, found in held_out.items():
        assert not found & trained, (name, found & trained)
    names = list(held_out)
    assert all(not held_out[a] & held_out[b] for i, a in enumerate(names) for b in names[i + 1 :])


def test_there_are_as_many_rehearsal_rows_as_identity_rows():
    assert len(rows("identity")) >= 150
    assert len(rows("rehearsal")) >= len(rows("identity"))
    assert [len(rows(n)) for n in ("look_identity", "look_ordinary", "test_identity", "test_ordinary")] == [40, 40, 30, 30]


def test_rehearsal_never_says_the_name():
    assert "{{name}}" not in json.dumps(rows("rehearsal")) and "{{author}}" not in json.dumps(rows("rehearsal"))


def test_a_quarter_of_the_identity_rows_is_chinese():
    chinese = sum(bool(re.search("[一-鿿]", json.dumps(row, ensure_ascii=False))) for row in rows("identity"))
    assert chinese >= len(rows("identity")) // 5

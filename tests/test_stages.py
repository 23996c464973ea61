"""Rows of every stage are read and shown; only training refuses stages that are not built."""

import json
from pathlib import Path

import pytest

from glmtune import plan, train
from glmtune.errors import UserError
from glmtune.run import load_run

PAIR = {"prompt": "Where is the cat?", "chosen": "On the mat.", "rejected": "42"}
ROWS = {
    "dpo": PAIR,
    "reward": PAIR,
    "kto": {"prompt": "Where is the cat?", "completion": "On the mat.", "label": True},
    "ppo": {"prompt": "Where is the cat?"},
    "grpo": {"prompt": "Where is the cat?"},
}


@pytest.mark.parametrize("stage", ROWS)
def test_rows_of_a_stage_are_planned_and_training_refuses(stage: str, tiny_model: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**ROWS[stage], "prompt": f"Where is the cat {i}?"}) + "\n" for i in range(4)))
    run = load_run(None, [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'out'}", f"stage={stage}"])
    made = plan.make(run)
    assert len(made.examples) == (8 if stage in ("dpo", "reward") else 4)
    said = "".join(text for text, _ in made.template.show(made.examples[0]))
    assert "cat 0?" in said and ("mat" in said) == (stage not in ("ppo", "grpo"))
    assert all(bool(example.num_learned) == (stage not in ("ppo", "grpo")) for example in made.examples)
    with pytest.raises(UserError, match=f"stage {stage} cannot be trained yet"):
        train(run)
    assert not (tmp_path / "out").exists()


def test_the_better_answer_stands_before_the_worse(tiny_model: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n")
    made = plan.make(load_run(None, [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'out'}", "stage=dpo"]))
    said = ["".join(text for text, weight in made.template.show(example) if weight) for example in made.examples]
    assert said == ["On the mat.<|im_end|>", "42<|im_end|>"]

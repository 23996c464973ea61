"""The real embedded model. Slow: run by `make test-all`; the model must be in the cache (it is, after the quickstart)."""

import json
from pathlib import Path

import pytest
import torch

import glmtune
from glmtune import families
from glmtune.families import smollm2
from glmtune.run import load_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    if not (smollm2.cache_root() / smollm2.NAME).is_dir():
        pytest.skip("the embedded model is not in the cache")
    return smollm2.folder()


def test_it_answers(folder):
    assert glmtune.load(smollm2.NAME).chat("What is the capital of France?", temperature=0) == "The capital of France is Paris."


def test_ids_equal_the_published_tokenizer_and_template(folder, shared):
    tokenizer, template = families.load_tokenizer(folder)
    texts = [
        row["output"] + "\n" + row["instruction"]
        for name in ("alpaca_zh", "alpaca_en")
        for row in json.loads((shared / "data" / f"{name}.json").read_text())
    ]
    for text in [*texts, "a\t\tb  c\r\n", "1234567890", "👩‍👩‍👧 é", " lead"]:
        assert template.tokens.encode(text) == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text in texts[::10]:
        messages = [{"role": "user", "content": text.strip()}, {"role": "assistant", "content": text.strip()}]
        assert template.encode(messages).ids == tokenizer.apply_chat_template(messages)["input_ids"]


def test_the_adapter_gives_plain_peft_the_same_logits(folder, shared, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = shared / "data" / "gsm8k_train.jsonl"
    source = json.dumps([{"path": str(data), "columns": {"prompt": "question", "response": "answer"}, "max_samples": 16}])
    glmtune.train(
        load_run(
            None,
            [f"model={smollm2.NAME}", f"data={source}", f"out={tmp_path / 'a'}", "optim.steps=2", "optim.lr=1e-3", "samples=[]"],
        )
    )
    ours = glmtune.load(tmp_path / "a", dtype=torch.float32)
    ids = torch.tensor([ours.template.prompt([{"role": "user", "content": "How many legs have 3 cats?"}])])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "a" / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, theirs(ids).logits)

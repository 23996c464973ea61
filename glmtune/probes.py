"""Questions asked before and after training (run option samples): samples.jsonl holds both answers."""

import contextlib
from typing import Any

from . import methods
from .errors import UserError
from .generate import Sampling, answer
from .runfolder import read_jsonl, write_jsonl
from .session import Session

MAX_NEW_TOKENS = 64


def ask(run: Session, when: str) -> list[dict[str, Any]]:
    """Answers the run's questions, once before and once after training; samples.jsonl holds both."""
    path, questions = run.out / "samples.jsonl", run.plan.questions
    rows = read_jsonl(path)
    if questions and rows and len(rows) != len(questions):
        raise UserError(f"{path} has {len(rows)} lines for {len(questions)} questions; delete it, then --resume")
    if not questions or (rows and rows[0].get(when) is not None):
        return rows
    if when == "before" or not rows:
        rows = [{"set": q.set, "prompt": q.prompt, "before": None, "after": None, "wanted": q.wanted} for q in questions]
    done = run.screen.asking(f"answers {when} training", len(questions))
    training = run.model.training
    run.model.eval()
    # Before training is before the prefix, too: unlike LoRA, it changes answers from the start.
    apart = when == "before" and run.method.changes_at_start
    untouched = methods.disabled(run.model) if apart else contextlib.nullcontext()
    with untouched:
        asked = answer(run.model, run.plan.template, [q.ids for q in questions], Sampling(max_new_tokens=MAX_NEW_TOKENS), done=done)
        for i, text in asked:
            rows[i][when] = text
            if (wanted := questions[i].contains) is not None:
                rows[i][f"hit_{when}"] = any(part.lower() in text.lower() for part in wanted)
    run.model.train(training)
    run.screen.stop()
    write_jsonl(path, rows)
    return rows

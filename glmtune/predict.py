"""Answers to a whole file of questions: every row, in order, resumable."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import whole
from .generate import Sampling, answer
from .loaded import Loaded


def predict(
    loaded: Loaded,
    rows: list[Any],
    out: Path,
    sampling: Sampling,
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes one JSON object per row to `out`: the row's own keys plus "prediction". Returns how many answers were made now.

    Answers are kept in `out`.part as they come; when interrupted, the same call continues there. Raises UserError if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten; choose another --out, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    prompts = [loaded.template.prompt(row) for row in rows]
    for row, prompt in zip(rows, prompts):
        if "prediction" in row.meta["row"]:
            raise UserError(f"{row.where}: the row has a key 'prediction' already, which would be lost; rename it")
        if (limit := getattr(loaded.model.config, "max_position_embeddings", None)) is not None and len(prompt) >= limit:
            raise UserError(f"{row.where}: the question has {len(prompt)} tokens; this model reads {limit} at most")
    part = out.with_name(out.name + ".part")
    header = hashlib.blake2b(repr((prompts, sampling, batch_size)).encode(), digest_size=16).hexdigest()
    made = _kept(part, header)
    todo = [i for i in range(len(prompts)) if i not in made]
    done(len(made))
    with open(part, "a", encoding="utf-8") as file:
        if not made:
            file.truncate(0)
            file.write(json.dumps({"header": header}) + "\n")
        for i, text in answer(loaded.model, loaded.template, [prompts[i] for i in todo], sampling, batch_size, done):
            made[todo[i]] = text
            file.write(json.dumps({"row": todo[i], "prediction": text}, ensure_ascii=False) + "\n")
            file.flush()
    whole(out, (json.dumps({**row.meta["row"], "prediction": made[i]}, ensure_ascii=False) + "\n" for i, row in enumerate(rows)))
    part.unlink()
    return len(todo)


def _kept(part: Path, header: str) -> dict[int, str]:
    """Answers of an interrupted call on the same questions."""
    if not part.is_file():
        return {}
    kept: dict[int, str] = {}
    for number, line in enumerate(part.read_text(encoding="utf-8").splitlines()):
        try:
            item = json.loads(line)
        except ValueError:
            break  # half a line
        if number == 0:
            if item.get("header") != header:
                return {}
        else:
            kept[item["row"]] = item["prediction"]
    return kept

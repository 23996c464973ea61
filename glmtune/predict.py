"""Answers to a whole file of questions: every row, in order, resumable."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .chat import Template
from .errors import UserError
from .files import whole
from .generate import Sampling, answer, reads_at_most
from .loaded import Loaded
from .run import moment

FORMAT = 2  # of OUT.part; to be raised when the same model and settings come to answer otherwise


def predict(
    loaded: Loaded,
    rows: list[Any],
    out: Path,
    sampling: Sampling,
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Writes one JSON object per row to `out`: the row's own keys plus "prediction". Returns how many answers were made now.

    Answers are kept in `out`.part as they come; when interrupted, the same call continues there and ends with the same bytes. Raises
    UserError if `out` exists, and if `out`.part holds answers of another model, to other questions or of other settings.
    """
    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten; choose another --out, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    part = out.with_name(out.name + ".part")
    first, items = _lines(part)
    template = _template(loaded.template, first, say)
    prompts = [template.prompt(row) for row in rows]
    limit = reads_at_most(loaded.model)
    for row, prompt in zip(rows, prompts):
        if "prediction" in row.meta["row"]:
            raise UserError(f"{row.where}: the row has a key 'prediction' already, which would be lost; rename it")
        if limit is not None and len(prompt) >= limit:
            raise UserError(f"{row.where}: the question has {len(prompt)} tokens; this model reads {limit} at most")
    header = _origin(loaded.model, template, prompts, sampling)
    made = _kept(part, first, items, header, len(prompts), say)
    done(len(made))
    # Written anew, so that what is added does not continue half a line.
    whole(part, "".join(_line(item) for item in [header, *(_row(i, text) for i, text in made.items())]))
    todo = set(range(len(prompts))) - made.keys()
    with open(part, "a", encoding="utf-8") as file:
        for i, text in answer(loaded.model, template, prompts, sampling, batch_size, done, todo):
            made[i] = text
            file.write(_line(_row(i, text)))
            file.flush()
    whole(out, (_line({**row.meta["row"], "prediction": made[i]}) for i, row in enumerate(rows)))
    part.unlink()
    return len(todo)


def _line(item: dict[str, Any]) -> str:
    text = json.dumps(item, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # half a surrogate pair in a key that no question is made of
        text = json.dumps(item)
    return text + "\n"


def _row(number: int, text: str) -> dict[str, Any]:
    return {"row": number, "prediction": text}


# --- what the answers follow from ---------------------------------------------------------------------------------------------


def _template(template: Template, first: dict[str, Any], say: Callable[[str], None]) -> Template:
    """The template whose clock, where it writes one into prompts, says what it said when OUT.part was begun."""
    began = first.get("date")
    if not template.dates or not isinstance(began, str) or began == template.date:
        return template
    try:
        found = template.at(moment(began))
    except ValueError:
        return template  # a damaged first line is told later
    if found.dates != template.dates:
        say(f"the interrupted call wrote {', '.join(found.dates)} into its prompts; this one goes on with that date")
    return found


def _origin(model: Any, template: Template, prompts: list[list[int]], sampling: Sampling) -> dict[str, Any]:
    """The first line of OUT.part: all that the answers follow from. (The size of a batch changes their last bits only, and memory may ask
    for another one.)"""
    drawn = asdict(sampling)
    if sampling.temperature == 0:
        drawn = {name: drawn[name] for name in ("temperature", "max_new_tokens", "repetition_penalty")}
    return {
        "format": FORMAT,
        "model": fingerprint(model),
        "date": template.date,
        "questions": _digest(repr((prompts, template.stop_ids, template.jinja, template.tokens.json)).encode("utf-8", "replace")),
        "sampling": drawn,
    }


def fingerprint(model: Any) -> str:
    """A digest of what a model computes with: every number it holds (weights, packed ones, adapter, prefix), its config, its precision and
    the kind of device.

    It is taken of the model in memory, not of files: so it follows any adapter that was put on, whatever was read from where.
    """
    import torch

    held = [(f"{name}.{key}", value) for name, module in model.named_modules() for key, value in _held(module)]
    tensors = {id(value): value for _, value in held if isinstance(value, torch.Tensor)}  # tied ones are read once
    with ThreadPoolExecutor(4) as pool:
        digests = dict(zip(tensors, pool.map(_digest_of_tensor, tensors.values())))
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    device = next(model.parameters()).device.type
    return _digest(
        repr((device, [(name, digests.get(id(value), value)) for name, value in held])).encode(),
        json.dumps(config, sort_keys=True, default=str),
    )


def _held(module: Any) -> Iterator[tuple[str, Any]]:
    """A module's own tensors and plain settings (LoRA's scaling, the products' dtype), those of the adapters beneath it included. What
    begins with _ is worked out of them, texts are names, dropout does nothing here, and a scaling may be left of a LoRA that was taken off."""
    import torch

    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or key == "dropout" or (key == "scaling" and getattr(module, "lora_A", module) is None):
            continue
        for i, each in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(each, torch.Tensor | torch.dtype | bool | int | float):
                yield f"{key}.{i}", each


def _digest_of_tensor(tensor: Any) -> str:
    import torch

    data = tensor.detach().cpu().contiguous()
    return _digest(data.reshape(-1).view(torch.uint8).numpy().data, str(data.dtype), str(tuple(data.shape)))


def _digest(data: Any, *more: str) -> str:
    return hashlib.blake2b(data, digest_size=16, person=hashlib.blake2b(repr(more).encode(), digest_size=16).digest()).hexdigest()


# --- what an interrupted call left --------------------------------------------------------------------------------------------


def _lines(part: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the others; {} for each that is no whole object."""
    if not part.is_file():
        return {}, []
    lines = part.read_bytes().removesuffix(b"\n").split(b"\n")  # a text may hold other marks of a line's end, but never this one
    first, *items = map(_object, lines)
    return first, items


def _kept(
    part: Path, first: dict[str, Any], items: list[dict[str, Any]], header: dict[str, Any], count: int, say: Callable[[str], None]
) -> dict[int, str]:
    """Answers of an interrupted call for the same header; lines that are not whole are left out, and their rows answered again."""
    answers = [(item["row"], item["prediction"]) for item in items if _is_answer(item)]
    if not answers:
        return {}  # nothing is lost, whoever began it
    if what := _difference(first, header):
        raise UserError(f"{part} {what}: remove it, or choose another --out")
    kept = {row: text for row, text in answers if row < count}
    twice = {row for row, text in answers if row < count and kept[row] != text}
    left = len(items) - len(kept) + len(twice)
    if left:
        say(f"{part}: {left} damaged {'line is' if left == 1 else 'lines are'} left out; what stood there is answered again")
    return {row: text for row, text in kept.items() if row not in twice}


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_answer(item: dict[str, Any]) -> bool:
    row, text = item.get("row"), item.get("prediction")
    return type(row) is int and row >= 0 and isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def _difference(found: dict[str, Any], header: dict[str, Any]) -> str:
    if isinstance(found.get("header"), str):
        return "was begun by an older glmtune, which did not note whose answers it holds"
    if type(found.get("format")) is not int or found.keys() != header.keys():
        return "has a damaged first line, so that nothing tells whose answers it holds"
    if found["format"] != FORMAT:
        return f"was begun by another glmtune (format {found['format']}, this one writes {FORMAT})"
    if found["model"] != header["model"]:
        return "holds answers of another model (or adapter, precision, device)"
    if found["questions"] != header["questions"]:
        return "holds answers to other questions (or in another chat format, or with another system prompt)"
    return "" if found["sampling"] == header["sampling"] else f"holds answers of other settings ({found['sampling']})"

"""One decoding path for chat, prediction and the before/after samples: `stream` for one conversation, `answer` for many."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import Template
from .errors import UserError
from .families import family_of
from .families.family import about_generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy. `seed` None: a new draw every time."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; wanted 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; wanted more than 0, at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; wanted at least 1")


def published_settings(folder: Path) -> dict[str, Any]:
    """temperature and top_p as the model's publisher set them in generation_config.json; greedy where it says nothing."""
    found = about_generation(folder)
    if not found:
        published = family_of(folder).settings if (folder / "config.json").is_file() else {}
        return {key: value for key, value in published.items() if key in ("temperature", "top_p")}
    if not found.get("do_sample"):
        return {}
    try:
        return {"temperature": float(found.get("temperature") or 1.0), "top_p": float(found.get("top_p") or 1.0)}
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'generation_config.json'}: {error}; copy the file again") from None


def pick(logits: Any, sampling: Sampling, generator: Any) -> Any:
    """Next tokens [B] from logits [B, V]; nucleus sampling (arXiv 1904.09751)."""
    import torch

    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _generator(sampling: Sampling, device: Any) -> Any:
    import torch

    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def _steps(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], pad_id: int, sampling: Sampling
) -> Iterator[list[int]]:
    """One list per decoding step: the next token of each row, or -1 for a row that has ended. Prompts are padded on the left."""
    import torch
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest >= limit:
        raise UserError(
            f"the prompt has {longest} tokens; this model reads {limit} at most. Shorten it, or start a new conversation (/clear)"
        )
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    generator = _generator(sampling, device)
    written = ids
    stops, alive = set(stop_ids), [True] * len(prompts)
    budget = min(sampling.max_new_tokens, limit - longest if limit is not None else sampling.max_new_tokens)
    for _ in range(budget):
        positions = _positions(model, written, mask)[..., -ids.shape[1] :]
        with torch.inference_mode():
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            ids = pick(out.logits[:, -1], sampling, generator).unsqueeze(-1)
        tokens = ids.squeeze(-1).tolist()
        emitted = [token if live else -1 for token, live in zip(tokens, alive)]
        alive = [live and token not in stops for token, live in zip(tokens, alive)]
        yield emitted
        if not any(alive):
            return
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], -1)
        written = torch.cat([written, ids], -1)


def _positions(model: Any, ids: Any, mask: Any) -> Any:
    """Positions of everything written so far, [B, S]: pads count for nothing. ChatGLM-6B counts in two dimensions, [B, 2, S]."""
    if hasattr(model, "make_position_ids"):
        return model.make_position_ids(ids, mask)
    return (mask.cumsum(-1) - 1).clamp(min=0)


def stream(model: Any, template: Template, messages: Sequence[dict[str, Any]], sampling: Sampling) -> Iterator[str]:
    """The answer to one conversation, in pieces of whole characters, as they are made."""
    streamer = template.streamer()
    for (token,) in _steps(model, [template.prompt(messages)], template.stop_ids, template.tokens.pad_id, sampling):
        if piece := streamer.add(token):
            yield piece
    if piece := streamer.end():
        yield piece


def answer(
    model: Any,
    template: Template,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, str]]:
    """(position, answer) of every prompt. Prompts of like length are decoded together; results come in the order of batches."""
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        made: list[list[int]] = [[] for _ in chosen]
        for tokens in _steps(model, [prompts[i] for i in chosen], template.stop_ids, template.tokens.pad_id, sampling):
            for row, token in zip(made, tokens):
                if token >= 0:
                    row.append(token)
        for i, row in zip(chosen, made):
            yield i, template.parse(row).text
        done(len(chosen))

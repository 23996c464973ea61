"""One decoding path for chat, prediction and the before/after samples: `stream` for one conversation, `answer` for many."""

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .chat import Template
from .errors import UserError, shown
from .families import family_of
from .families.family import about_generation

_LARGEST = 1e300
_WANTED: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda value: 0 <= value <= _LARGEST, "0 (greedy) or more"),
    "top_p": (Real, lambda value: 0 < value <= 1, "more than 0, at most 1"),
    "max_new_tokens": (Integral, lambda value: value >= 1, "at least 1"),
    "top_k": (Integral, lambda value: value >= 0, "a whole number, 0 (all tokens) or more"),
    "repetition_penalty": (Real, lambda value: 1e-6 <= value <= 1e6, "1 (changes nothing), or a number between 1e-6 and 1e6"),
}


class NotFinite(UserError):
    """The model computes NaN or infinity: whatever it is asked, it has no answer."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy, top_k 0 all tokens. `seed` None: a new draw every time.

    All are as in transformers' `generate`, in its order: repetition_penalty (arXiv 1909.05858; of question and answer), temperature, top_k,
    top_p (arXiv 1904.09751). Raises UserError for what cannot be.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, (kind, fits, wanted) in _WANTED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
                raise UserError(f"{name} is {shown(value)}; wanted {wanted}")
            object.__setattr__(self, name, float(value) if kind is Real else int(value))


# What a published generation_config.json may say besides, and the values (beside none at all) that change nothing.
_NOT_DRAWN = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": 0}  # where tokens are drawn
_NOT_USED = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "diversity_penalty": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "bad_words_ids": [], "force_words_ids": [], "constraints": [], "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {},
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "guidance_scale": 1,
    "stop_strings": [], "dola_layers": None, "watermarking_config": None,
}  # fmt: skip


def published_settings(folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Options of `Sampling` as the model's publisher set them in generation_config.json; greedy where it says nothing.

    Says in one line what else stands there that would change the draw. Raises UserError for values that cannot be.
    """
    path, found = folder / "generation_config.json", about_generation(folder)
    if not found:
        published = family_of(folder).settings if (folder / "config.json").is_file() else {}
        return {key: value for key, value in published.items() if key in _WANTED}
    draws = found.get("do_sample")
    if not (draws is None or isinstance(draws, bool)):
        raise UserError(f"{path}: do_sample is {shown(draws)}; wanted true or false")
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0} if draws else {}
    used = ("temperature", "top_p", "top_k", "repetition_penalty") if draws else ("repetition_penalty",)
    settings |= {name: found[name] for name in used if found.get(name) is not None}
    try:
        Sampling(**settings)
    except UserError as error:
        raise UserError(f"{path}: {error}; mend it, or copy the file again") from None
    neutral = {**_NOT_USED, **(_NOT_DRAWN if draws else {})}
    left = [f"{name}={json.dumps(found[name])[:60]}" for name in neutral if found.get(name) not in (None, neutral[name])]
    if left:
        say(f"{path}: {', '.join(left)} {'is' if len(left) == 1 else 'are'} not used here")
    return settings


def pick(logits: Any, sampling: Sampling, uniform: Any, seen: Any = None) -> Any:
    """Next tokens [B] from logits [B, V] and a number in [0, 1) for each row, [B] in fp64. seen: [B, V], the tokens that stand in each row."""
    import torch

    if sampling.temperature == 0:
        return _penalised(logits, sampling, seen).argmax(-1)
    reached = distribution(logits, sampling, seen).cumsum(-1)
    total = reached[:, -1:]
    wanted = uniform.to(reached).unsqueeze(-1) * total
    # Below the total, so that a token with a share of it is hit even where the product is rounded up.
    return torch.searchsorted(reached, torch.minimum(wanted, total.nextafter(torch.zeros_like(total))), right=True).squeeze(-1)


def distribution(logits: Any, sampling: Sampling, seen: Any = None) -> Any:
    """The probabilities [B, V] that tokens are drawn from, at a temperature above 0."""
    import torch

    scores = _penalised(logits, sampling, seen)
    scores = scores.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _penalised(logits: Any, sampling: Sampling, seen: Any) -> Any:
    if sampling.repetition_penalty == 1 or seen is None:
        return logits
    import torch

    logits, penalty = logits.float(), sampling.repetition_penalty
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _uniform(seed: int, row: int, position: int) -> float:
    """In [0, 1), from (seed, row, position) alone: an answer does not depend on which rows are decoded beside it."""
    digest = hashlib.blake2b(f"{seed}/{row}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def reads_at_most(model: Any) -> int | None:
    """How many tokens of question and answer a model can read; None where its config sets no limit."""
    return _whole(model.config, "max_position_embeddings")


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    if value is None or (type(value) is int and value >= 0):
        return value
    raise UserError(f"config.json: {name} is {shown(value)}; wanted a whole number, or null; copy the file again")


def _cache(config: Any) -> Any:
    from transformers import DynamicCache

    for name in ("sliding_window", "attention_chunk_size"):
        _whole(config, name)
    try:
        return DynamicCache(config=config)
    except (TypeError, ValueError, KeyError) as error:  # layer_types that are no list of known names
        raise UserError(f"config.json does not say what the layers keep while they write ({error}); copy the file again") from None


def _steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling,
    rows: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """One list per decoding step: the next token of each row, or -1 for a row that has ended. Prompts are padded on the left.

    rows: the numbers by which the rows' random numbers are drawn. Raises UserError for a prompt that is too long and for logits that are
    not finite.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    limit = reads_at_most(model)
    if limit is not None and longest >= limit:
        raise UserError(
            f"the prompt has {longest} tokens; this model reads {limit} at most. Shorten it, or start a new conversation (/clear)"
        )
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache, written, seen = _cache(model.config), ids, None
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    rows = range(len(prompts)) if rows is None else rows
    stops, alive = set(stop_ids), [True] * len(prompts)
    budget = min(sampling.max_new_tokens, limit - longest if limit is not None else sampling.max_new_tokens)
    for position in range(budget):
        positions = _positions(model, written, mask)[..., -ids.shape[1] :]
        with torch.inference_mode():
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = out.logits[:, -1]
            finite = logits.isfinite().all(-1).tolist()
            if not all(fine for fine, live in zip(finite, alive) if live):
                raise NotFinite(
                    "the model's numbers are not finite (fp16? damaged?), so it has no answer; choose another precision, or copy its files again"
                )
            if sampling.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
                at, columns = mask[:, -ids.shape[1] :].nonzero(as_tuple=True)
                seen[at, ids[at, columns]] = True
            draws = [_uniform(seed, row, position) for row in rows] if sampling.temperature else []
            ids = pick(logits, sampling, torch.tensor(draws, dtype=torch.float64), seen).unsqueeze(-1)
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
    wanted: Collection[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """(position, answer) of every prompt. Prompts of like length are decoded together; results come in the order of batches.

    wanted: positions of the prompts that are asked for; None: all. A batch with one of them is decoded whole, so that their answers are
    those of all prompts bit for bit.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        asked = [i for i in chosen if wanted is None or i in wanted]
        if not asked:
            continue
        made: list[list[int]] = [[] for _ in chosen]
        for tokens in _steps(model, [prompts[i] for i in chosen], template.stop_ids, template.tokens.pad_id, sampling, chosen):
            for row, token in zip(made, tokens):
                if token >= 0:
                    row.append(token)
        for i, row in zip(chosen, made):
            if i in asked:
                yield i, template.parse(row).text
        done(len(asked))

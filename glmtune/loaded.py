"""A model ready to use: base, adapter, tokenizer and template together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import families, methods
from .chat import Template
from .generate import Sampling, published_settings, stream


@dataclass
class Loaded:
    """A model ready to use. `targets` are the names that LoRA can adapt."""

    model: Any
    tokenizer: Any
    template: Template
    targets: list[str]
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # the model's own published sampling settings

    def use(self, adapter: str | Path | None) -> "Loaded":
        """Switches to another adapter, or to none (the base model as it was). The chat format and the system prompt stay."""
        if adapter is None:
            methods.unload(self.model)
        else:
            methods.load(self.model, adapter)
        return self

    def chat(self, messages: str | Sequence[dict[str, Any]], **sampling: Any) -> str:
        """The answer to a question or to OpenAI-style messages. sampling: options of
        `generate.Sampling` (temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed) in place of the published ones."""
        return "".join(self.stream(messages, **sampling))

    def stream(self, messages: str | Sequence[dict[str, Any]], **sampling: Any) -> Iterator[str]:
        """The same, piece by piece."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        yield from stream(self.model, self.template, messages, Sampling(**{**self.settings, **sampling}))


def load(
    path_or_id: str | Path,
    *,
    dtype: Any = "auto",
    device: Any = "auto",
    quant: str | None = None,
    adapter: str | Path | None = None,
    say=lambda text: None,
) -> Loaded:
    """A model with tokenizer, template and (from a run's folder, or `adapter`) what was trained.

    path_or_id: the built-in model's name, a folder, a hub id, a run's folder or a checkpoint. dtype: bf16, fp16, fp32, torch's names for them,
    or a torch dtype; "auto": fp32 on the CPU where it fits in a third of the memory (adapters then lose nothing), else bf16. quant: how the
    weights are kept, nf4, int8, chatglm-int4, chatglm-int8 or "none" (16 or 32 bits); None: as the run kept its base, or as the model was
    published. Raises UserError: no such model, dtype or device, an adapter that does not fit.
    """
    import torch

    dtype, target = families.as_dtype(dtype), families.pick_device(device)
    place = families.locate(path_or_id, adapter, say)
    settings = published_settings(place.base, say)  # bad ones are told before the model loads
    if quant is None:
        quant = place.quant or ("keep" if families.published_quant(place.base) else None)
    if dtype == "auto":
        import psutil

        roomy = target.type == "cpu" and families.num_parameters(place.base) * 4 < psutil.virtual_memory().total / 3
        dtype = torch.float32 if roomy or not families.fast_bf16(target) else torch.bfloat16
    template = families.open_template(place.tokenizer, place.template, now=place.now)
    if template.dates:
        when = "when this run was started" if place.now is not None else "today"
        say(f"the chat format writes the date into prompts: {', '.join(template.dates)} ({when})")
    model = families.load_model(place.base, dtype=dtype, device=target, quant=None if quant == "none" else quant)
    methods.prepare(model, dtype)
    model.generation_config.eos_token_id = template.stop_ids  # model.generate ends where chat does
    if place.adapter is not None:
        methods.load(model, place.adapter)
        if methods.changes_nothing(model):
            say(f"warning: the adapter {place.adapter} changes nothing: all its B are zero, as before training")
    families.check_rows(
        place.tokenizer, template.tokens, model.get_input_embeddings().weight.shape[0]
    )  # an adapter's own tokenizer
    targets = sorted({name.split(".")[-1] for name in methods.blocks(model)})
    tokenizer = families.hf_tokenizer(place.base, template)
    return Loaded(model, tokenizer, template, targets, place.system, settings)

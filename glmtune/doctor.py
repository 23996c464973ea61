"""What this machine can do, and what a model folder is."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from . import __version__, estimate, families, hub
from .errors import UserError
from .families import smollm2

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
    "peft",
    "bitsandbytes",
    "gradio",
    "fastapi",
    "tensorboard",
)


def machine() -> dict[str, Any]:
    """Versions, processor, memory, disk and cards, with advice where something is in the way."""
    import psutil
    import torch

    cpu = torch.device("cpu")
    found: dict[str, Any] = {
        "glmtune": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores, torch uses {torch.get_num_threads()} threads",
        "bf16 on the processor": "fast (by its flags)"
        if families.fast_bf16(cpu)
        else "slow or absent (by its flags): fp32 is used",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f} GB free",
        "cards": cards(),
        "cache": _cache(),
        "embedded model": "ready" if (smollm2.cache_root() / smollm2.NAME).is_dir() else "comes at first use (93 MB download)",
    }
    reason = why_no_card()
    if reason:
        found["why torch sees no card"] = reason
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cards() -> list[str]:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        bf16 = "bf16" if properties.major >= 8 else "no fast bf16: fp32 is used"
        found.append(f"cuda:{i} {properties.name}, {properties.total_memory / 1e9:.1f} GB, {free / 1e9:.1f} GB free, {bf16}")
    if torch.backends.mps.is_available():
        found.append("mps (Apple GPU)")
    return found


def why_no_card() -> str | None:
    """Why torch cannot use an NVIDIA card; None where it can."""
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every card; unset it"
    driver = shutil.which("nvidia-smi")
    listed = ""
    if driver:
        done = subprocess.run([driver, "-L"], capture_output=True, text=True, timeout=20)
        listed = done.stdout.strip() if done.returncode == 0 else ""
    if not listed:
        return "no NVIDIA driver was found (nvidia-smi lists no card); training runs on the processor"
    if torch.version.cuda is None:
        return f"there is a card ({listed.splitlines()[0]}), but this torch is a CPU build; the README's CUDA line installs the other one"
    return f"there is a card ({listed.splitlines()[0]}), but the driver is too old for CUDA {torch.version.cuda}; update the driver"


def _cache() -> str:
    root = smollm2.cache_root()
    place = next(p for p in (root, *root.absolute().parents) if p.exists())
    return f"{root}, {shutil.disk_usage(place).free / 1e9:.1f} GB free"


def model(name: str | Path, say=lambda text: None) -> dict[str, Any]:
    """What MODEL is and how it would be used, without loading it."""
    place = families.locate(name, None, say)
    published, family = families.published_config(place.base), families.family_of(place.base)
    config = family.config
    shapes = families.tensor_shapes(place.base)
    parameters = families.num_parameters(place.base)
    bits = published.get("quantization_bit") or 0
    stored = published.get("dtype") or published.get("torch_dtype") or "?"
    found: dict[str, Any] = {
        "model": place.name,
        "base folder": str(place.base),
        "adapter": str(place.adapter) if place.adapter else "none",
        "family": family.name,
        "published as": f"model_type {published.get('model_type')}, {(published.get('architectures') or ['?'])[0]}",
        "loaded as": str((config.get("architectures") or [config.get("model_type")])[0])
        + (" (glmtune's own class)" if config.get("model_type") in families.OURS else " of transformers"),
        "code in the folder": "named by auto_map, never run" if "auto_map" in published else "none is named",
        "parameters": f"{parameters / 1e6:.1f} M in {len(shapes)} tensors; {parameters * 2 / 1e9:.2f} GB in bf16, {parameters * 4 / 1e9:.2f} GB in fp32",
        "stored as": f"int{bits} (ChatGLM's own quantisation; read as {stored})" if bits else stored,
        "advice": _advice(place.base, families.pick_device()),
        "reads at most": f"{config.get('max_position_embeddings', '?')} tokens",
        "LoRA targets": ", ".join(sorted({n.split(".")[-1] for n in families.linear_names(place.base)})),
    }
    names = families.published_names(place.base)
    if names:
        found["their published names"] = ", ".join(f"{old} = {'+'.join(new)}" for old, new in names.items())
    if families.has_tokenizer(place.tokenizer):
        try:
            template = families.open_template(place.tokenizer, place.template, now=place.now)
        except UserError as error:
            tokens = families.open_tokens(place.tokenizer)
            found["chat format"] = str(error).splitlines()[0]
        else:
            tokens = template.tokens
            earlier = "; earlier answers are read as text, only the last is learned" if template.context else ""
            found["chat format"] = (template.name if template.name != "auto" else "the model's own") + earlier
            found["an answer ends at"] = ", ".join(tokens.names.get(i, str(i)) for i in template.stop_ids)
        found["special tokens"] = ", ".join(f"{n} {i}" for n, i in list(tokens.special.items())[:14])
        found["system prompt"] = place.system if place.system is not None else "the model's own default"
    else:
        found["chat format"] = "the folder holds no tokenizer files; copy them beside its weights"
    if family.notes:
        found["note"] = list(family.notes)
    return found


def fit(name: str, size: str, say=lambda text: None) -> dict[str, Any]:
    """Which ways of tuning MODEL fit in `size` ("8GB") of memory. From its config.json alone: no weights are needed or fetched."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([GM])i?B?\s*", size, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"--fit {size}: wanted a size of memory, like 8GB or 24GB")
    room = float(match[1]) * (1e9 if match[2].upper() == "G" else 1e6)
    path = Path(name).expanduser()
    folder = (
        families.resolve(name, say) if path.exists() or name == smollm2.NAME or not hub.is_id(name) else hub.config_folder(name)
    )
    model = families.load_model(folder, device="meta")
    from .layers import blocks, prepare

    parameters = sum(parameter.numel() for parameter in model.parameters())
    prepare(model, model.dtype)
    linear = sum(layer.weight.numel() for layer in blocks(model).values())
    shape = estimate.Shape.of(families.config_of(folder), parameters, 0, linear)
    found = estimate.fitting(
        shape, room, families.reads_at_most(folder), _kinds(folder), families.published_quant(folder) is not None
    )
    return {"model": name, "parameters": parameters, "memory_gb": room / 1e9, "settings": found}


def _kinds(folder: Path) -> list[str]:
    """How this model's weights can be packed, the most bytes first."""
    kept = families.published_quant(folder)
    own = families.family_of(folder).config.get("model_type") in families.ROUNDED
    kinds = [kind for kind in families.QUANTS if own or not kind.startswith("chatglm")]
    return [kept] if kept else sorted(kinds, key=lambda kind: -estimate.PACKED[kind])


def _advice(folder: Path, device: Any) -> str:
    usual, overflows = families.pick_precision("auto", device), families.fp16_overflows(folder)
    return f"{usual} on this machine ({device})" + (f"; not {overflows}" if overflows else "")

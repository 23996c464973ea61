"""Models: a name or a folder -> a native transformers model, its tokenizer and its chat template.

No code that came with a checkpoint is ever run. Nothing here sees a data set.
"""

import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat import Form, Template, Tokens, choose
from ..errors import UserError, did_you_mean
from ..options import read
from . import smollm2


@dataclass(frozen=True)
class Place:
    """What MODEL on the command line stands for: a base folder, and for a run's folder also its adapter, system and template."""

    name: str  # what the user called the base model
    base: Path
    adapter: Path | None = None
    system: str | None = None
    template: Any = "auto"  # str or Form
    join: str | None = None  # between instruction and input, as it was trained; None: the template's usual one


def locate(model: str | Path, adapter: str | Path | None = None, say=lambda text: None) -> Place:
    """Finds a model: the built-in one, a model folder, a hub id, a run's folder OUT or one of its checkpoints/step-N."""
    path = Path(model).expanduser()
    run_file = _run_file(path)
    if run_file is None:
        return Place(str(model), resolve(str(model), say), _adapter(adapter))
    run = read(run_file)
    found = _trained(path)
    template = run.get("template", "auto")
    whole = (found / "config.json").is_file()
    return Place(
        run["model"],
        found if whole else _base(run["model"], found, say),
        _adapter(adapter) or (None if whole else found),
        run.get("system"),
        Form(**template) if isinstance(template, dict) else template,
        run.get("join"),
    )


def _run_file(path: Path) -> Path | None:
    """The run.yaml that made what is in `path`: its own, or its parent's for OUT/adapter and OUT/model. Only train writes `resolved:`."""
    if (path / "run.yaml").is_file() and (not (path / "config.json").is_file() or read(path / "run.yaml").get("resolved")):
        return path / "run.yaml"
    parent = path.parent / "run.yaml"
    made_here = path.is_dir() and path.name in ("adapter", "model") and parent.is_file() and read(parent).get("resolved")
    return parent if made_here else None


def _base(name: str, adapter: Path, say) -> Path:
    """The base of a run. A folder that was given relative to another working directory is found through the adapter's config."""
    try:
        return resolve(name, say)
    except UserError:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path", "")
        if Path(base).is_dir():
            return Path(base)
        raise


def _adapter(adapter: str | Path | None) -> Path | None:
    return _trained(Path(adapter).expanduser()) if adapter is not None else None


def _trained(path: Path) -> Path:
    """The folder inside a run (or checkpoint) that holds what was trained."""
    for folder in (path, path / "adapter", path / "model"):
        if (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if (path / "checkpoints").is_dir():
        steps = sorted((p for p in (path / "checkpoints").glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
        if steps:
            return _trained(steps[-1])
    unfinished = f" yet; finish the run first: glmtune train {path / 'run.yaml'} --resume" if (path / "run.yaml").is_file() else ""
    raise UserError(f"{path} holds no trained adapter or model{unfinished}")


def resolve(name: str, say=lambda text: None) -> Path:
    """The folder of a base model: built in, local, or from the Hugging Face hub. Raises UserError."""
    if name == smollm2.NAME:
        return smollm2.folder(say)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: it holds no config.json")
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; a model is a folder with config.json, tokenizer.json and *.safetensors")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, [*siblings, smollm2.NAME])
        raise UserError(
            f"there is no model '{name}': no such folder{near}\nA model is {smollm2.NAME}, a folder, or a hub id like Qwen/Qwen2.5-0.5B-Instruct"
        )
    return _from_hub(name, say)


def _from_hub(name: str, say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]  # never *.py, never pickles
    repo, _, revision = name.partition("@")
    try:
        say(f"looking for {name} on the Hugging Face hub ...")
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no model '{name}' on the hub (or it needs a login: `hf auth login`), and no such folder here"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"'{name}' is no folder here, and the Hugging Face hub could not be reached ({reason})\n"
            f"Use a mirror (HF_ENDPOINT=https://...), download the folder by hand and give its path, or use model={smollm2.NAME}"
        ) from None


# --- what is known before anything heavy is loaded -----------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}; copy the model folder again") from None


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors, read from the safetensors headers (milliseconds). Raises UserError on missing or cut files."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is cut short or damaged; copy or download it again") from None
        missing = sorted(wanted - {p.name for p in files})
        if missing:
            raise UserError(
                f"{folder} is not complete: {len(missing)} of {len(wanted)} weight files are missing ({missing[0]} ...)"
            )
        files = [p for p in files if p.name in wanted]
    if not files:
        raise UserError(f"{folder} holds no *.safetensors weights")
    shapes: dict[str, list[int]] = {}
    for path in files:
        shapes.update((name, item["shape"]) for name, item in _header(path))
    return shapes


def _header(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    size = path.stat().st_size
    broken = UserError(f"{path} is cut short or damaged ({size} bytes); copy or download it again")
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise broken
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise broken from None
    if not isinstance(header, dict) or not (header := {k: v for k, v in header.items() if k != "__metadata__"}):
        raise broken
    if 8 + length + max(item["data_offsets"][1] for item in header.values()) != size:
        raise broken
    yield from header.items()


def linear_names(folder: Path) -> list[str]:
    """Dotted names of the linear layers of the blocks, guessed from the tensors' names and shapes before the model exists."""
    shapes = tensor_shapes(folder)
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and any(part.isdigit() for part in name.split("."))
    ]


def pick_targets(wanted: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The layers (full dotted names) that `targets` selects out of `names`: by last name, by dotted end, or by regular expression.

    Raises UserError for each target that matches nothing, with the names there are.
    """
    if wanted is None:
        return list(names)
    leaves = sorted({name.split(".")[-1] for name in names})
    if not wanted:
        raise UserError(f"lora targets is an empty list, so nothing would be trained; this model has {leaves}")
    chosen: set[str] = set()
    for target in wanted:
        try:
            pattern = re.compile(target)
        except re.error:
            pattern = None
        found = [n for n in names if n == target or n.endswith("." + target) or (pattern is not None and pattern.fullmatch(n))]
        if not found:
            raise UserError(
                f"lora target '{target}' matches no Linear layer; this model has {leaves}{did_you_mean(target, leaves)}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def reads_at_most(folder: Path) -> int | None:
    """Positions that the model was made for; None where its config names none."""
    config = config_of(folder)
    return {**config, **config.get("text_config", {})}.get("max_position_embeddings")


def num_parameters(folder: Path) -> int:
    total = 0
    for shape in tensor_shapes(folder).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def open_template(folder: Path, wanted: "str | Form" = "auto", **settings: Any) -> Template:
    """The template of a model folder, from its tokenizer files only."""
    return choose(wanted, Tokens.open(folder), **settings)


def load_tokenizer(folder: str | Path) -> tuple[Any, Template]:
    """(transformers tokenizer, Template) of a folder. Needs only the tokenizer files and configs."""
    from transformers import AutoTokenizer

    folder = resolve(str(folder))
    return AutoTokenizer.from_pretrained(folder), open_template(folder)


# --- loading ------------------------------------------------------------------------------------------------------------


def pick_device(wanted: str = "auto") -> Any:
    """A torch device. `auto`: the first CUDA card, else Apple's GPU, else the CPU. Raises UserError for one that is not there."""
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(
            f"device: '{wanted}' is not a device; wanted auto, cpu, cuda, cuda:1 or mps{did_you_mean(wanted, ['auto', 'cpu', 'cuda', 'mps'])}"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: '{wanted}' is not there ({torch.cuda.device_count()} CUDA cards are visible); `glmtune doctor` says why"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: 'mps' is not there; use device=cpu")
    return device


def fast_bf16(device: Any) -> bool:
    """Whether bf16 products are fast here: by the CPU's flags or the card's generation, never by timing."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def pick_precision(wanted: str, device: Any) -> str:
    return wanted if wanted != "auto" else "bf16" if fast_bf16(device) else "fp32"


def load_model(path: str | Path, *, dtype: Any = "auto", device: Any = "auto") -> Any:
    """The model of a folder as a native `PreTrainedModel`, in eval mode.

    dtype: a torch dtype, "bf16", "fp32", or "auto" (the checkpoint's own). Raises UserError: no such folder, no native class,
    missing, extra or misshapen tensors (all of them listed).
    """
    import contextlib
    import io

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = resolve(str(path))
    tensor_shapes(folder)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype, dtype)
    device = pick_device(device) if isinstance(device, str) else device
    held, errors = logging.get_verbosity(), io.StringIO()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(errors):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        kind = config_of(folder).get("model_type")
        reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise UserError(
            f"{folder} (model_type '{kind}') cannot be opened by transformers without code from the checkpoint: {reason}"
        ) from None
    finally:
        logging.set_verbosity(held)
        logging.enable_progress_bar()
    model, info = loaded
    wrong = [f"missing {n}" for n in sorted(info["missing_keys"])]
    wrong += [f"unexpected {n}" for n in sorted(info["unexpected_keys"])]
    wrong += [f"misshapen {n[0] if isinstance(n, tuple) else n}" for n in sorted(info["mismatched_keys"], key=str)]
    if wrong:
        raise UserError(f"the weights in {folder} do not fit its config.json, {len(wrong)} tensors: {'; '.join(wrong)}")
    return model.to(device).eval()


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

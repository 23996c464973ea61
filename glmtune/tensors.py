"""Tensors on the disk: safetensors that are fsynced, read back and compared before they count."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import files
from .errors import UserError
from .families import weights
from .families.fingerprint import NOTE


def write_tensors(tensors: dict[str, Tensor], path: Path, base: str | None = None) -> None:
    """Safetensors, fsynced. The bytes depend on the tensors and `base` only: the fingerprint of the model that an adapter was made for."""
    about = {"format": "pt"} | ({} if base is None else {NOTE: base})
    with _disk_errors(path):
        save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, path, metadata=about)
        if base is not None:
            _sort_metadata(path)
        path.chmod(0o644)  # safetensors makes files that only their owner may read
        files.sync(path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes several keys in an order of its own each time. Sorted, they take the same room."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """safetensors hides what the system said in an error of its own."""
    try:
        with files.naming(path):
            yield
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise files.DiskError(path, OSError(int(found[1]), os.strerror(int(found[1])))) from error
        raise


def compare(tensors: dict[str, Tensor], path: Path) -> None:
    """Reads a file back: every tensor must be there, bit for bit."""
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        wrong = [n for n in tensors if n not in there or not same_bytes(file.get_tensor(n), tensors[n])]
    if wrong:
        raise OSError(f"{path} was written but does not read back: {wrong[:3]} differ; the disk may be full or failing")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: what is no number equals itself, and 0 is not -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def finite(tensor: Tensor) -> bool:
    """Whether every number is one; without a mask of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.detach().aminmax()
    return bool(least.isfinite() and most.isfinite())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises UserError when it is cut short or not one."""
    weights.header(path)
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own bare error type
        raise UserError(f"{path}: not a whole safetensors file ({error}); it may have been cut short, copy it again") from None


def save_full(model: Any, folder: Path, shard: str = "4GB") -> None:
    """A model as an ordinary Hugging Face folder in shards of at most `shard`, read back and compared."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _disk_errors(folder), contextlib.redirect_stderr(io.StringIO()):  # its progress bar comes all the same
        model.save_pretrained(folder, max_shard_size=shard)
    state = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        files.sync(path)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        compare({name: state[name].cpu() for name in names}, path)

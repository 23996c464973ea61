"""Checkpoint files -> tensors, one at a time: safetensors and PyTorch `.bin` shards, never code that is stored in them.

Names and shapes are read first and checked whole against the model; only then is data read, straight from the file into
its own memory, so that at no time two copies of the weights exist.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, cast

from ..errors import UserError
from .family import Family, Take

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies. `shape` is what it stands for; a quantised one has `scale` and, with 4 bits, two numbers in each byte.

    offset: bytes from the file's beginning; None in old `.bin` files, whose tensors have no place of their own.
    """

    name: str
    path: Path
    dtype: str  # torch's name
    shape: tuple[int, ...]
    offset: int | None
    strides: tuple[int, ...] | None = None  # None: row after row
    scale: "Stored | None" = None
    packed: bool = False


def open_folder(folder: Path, bits: int = 0) -> dict[str, Stored]:
    """Every tensor of a model folder, by its published name; nothing but headers is read.

    bits: of ChatGLM's own quantisation (config.json's quantization_bit). Raises UserError on missing, cut or foreign files.
    """
    stamped = [(path, path.stat()) for path in _files(folder)]
    return _opened(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stamped), bits)


@lru_cache(maxsize=2)
def _opened(files: tuple[tuple[Path, int, int], ...], bits: int) -> dict[str, Stored]:
    """Headers of files in a known state: a plan asks for names, shapes, targets and counts, and `.bin` headers take seconds."""
    found: dict[str, Stored] = {}
    for path, _, _ in files:
        found.update(_safetensors(path) if path.suffix == ".safetensors" else _pickled(path))
    for name in [name for name in found if name.endswith(".weight_scale")]:
        weight = found.get(name.removesuffix("_scale"))
        if weight is None or weight.dtype != "int8" or len(weight.shape) != 2:
            raise UserError(
                f"{found[name].path}: {name} belongs to no int8 weight; only ChatGLM's own int4 and int8 files are read"
            )
        packed = bits == 4
        shape = (weight.shape[0], weight.shape[1] * (2 if packed else 1))
        found[weight.name] = replace(weight, shape=shape, scale=found.pop(name), packed=packed)
    return found


def _files(folder: Path) -> list[Path]:
    """The weight files, those of an index, else one whole file, else shards; safetensors before `.bin`."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole, index = folder / (stem + suffix), folder / f"{stem}{suffix}.index.json"
        files = [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*{suffix}"))
        if index.is_file():
            try:
                wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is cut short or damaged; copy or download it again") from None
            missing = sorted(name for name in wanted if not (folder / name).is_file())
            if missing and (len(missing) < len(wanted) or suffix == ".bin" or not any(folder.glob("pytorch_model*.bin"))):
                raise UserError(
                    f"{folder} is not complete: {len(missing)} of {len(wanted)} weight files are missing ({missing[0]} ...)"
                )
            files = [folder / name for name in sorted(wanted)] if not missing else []
        if files:
            return files
    others = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".ckpt", ".gguf", ".bin"))[:4])
    raise UserError(
        f"{folder} holds no weights; wanted model*.safetensors or pytorch_model*.bin" + (f" (there: {others})" if others else "")
    )


def _safetensors(path: Path) -> dict[str, Stored]:
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
    return {
        name: Stored(
            name, path, DTYPES.get(item["dtype"]) or item["dtype"], tuple(item["shape"]), 8 + length + item["data_offsets"][0]
        )
        for name, item in header.items()
    }


def _pickled(path: Path) -> dict[str, Stored]:
    """A `.bin` file: torch's restricted unpickler (weights_only) makes names and shapes without data; the file says where the data is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        content = unpickle(path)
    found = {}
    for name, tensor in content.items():
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        offset = None if start is None else start + tensor.storage_offset() * tensor.element_size()
        strides = None if tensor.is_contiguous() else tuple(tensor.stride())
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = Stored(name, path, dtype, tuple(tensor.shape), offset, strides)
    return found


def unpickle(path: Path) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]
        raise UserError(
            f"{path} cannot be read as plain tensors ({reason}); it is cut short, or holds code, which is never run. "
            "Download it again, or take the model's *.safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} is no table of tensors; wanted a model's pytorch_model*.bin")
    return content


class Reader:
    """Reads tensors. Old `.bin` files are unpickled whole, and the last one is kept, since they are read in order."""

    def __init__(self) -> None:
        self._whole: tuple[Path, dict[str, Any]] | None = None

    def read(self, stored: Stored, take: Take | None = None) -> Any:
        """The rows that `take` wants (all without), in the stored dtype; quantised ones as fp32."""
        if stored.scale is None:
            return self._cut(stored, take)
        codes, scale = self.read_packed(stored, take)
        return dequantise(codes, scale.float(), 4 if stored.packed else 8)

    def read_packed(self, stored: Stored, take: Take | None = None) -> tuple[Any, Any]:
        """The rows that `take` wants of a quantised tensor, as they are stored: codes int8 [out, in] or [out, in / 2], scale [out]."""
        assert stored.scale is not None
        columns = stored.shape[1] // 2 if stored.packed else stored.shape[1]
        return self._cut(replace(stored, shape=(stored.shape[0], columns)), take), self._cut(stored.scale, take)

    def _cut(self, stored: Stored, take: Take | None) -> Any:
        rows = stored.shape[0] if stored.shape else 1
        if take is None or (take.groups == 1 and take.start == 0 and take.stop is None):
            return self._plain(stored, 0, rows)
        if take.groups == 1:
            kept = range(rows)[take.start : take.stop]
            return self._plain(stored, kept.start, kept.stop)
        whole = self._plain(stored, 0, rows)
        return whole.unflatten(0, (take.groups, -1))[:, take.start : take.stop].flatten(0, 1).contiguous()

    def _plain(self, stored: Stored, start: int, stop: int) -> Any:
        import torch

        if stored.offset is None:
            if self._whole is None or self._whole[0] != stored.path:
                self._whole = None
                self._whole = (stored.path, unpickle(stored.path))
            whole = self._whole[1][stored.name]
            return whole[start:stop].clone() if stored.shape else whole.clone()
        dtype = getattr(torch, stored.dtype)
        strides = stored.strides or _contiguous(stored.shape)
        shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        count = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
        flat = torch.empty(count, dtype=dtype)
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset + (start * strides[0] if stored.shape else 0) * dtype.itemsize)
            view, at = memoryview(cast(Any, flat.view(torch.uint8).numpy())), 0
            while at < len(view):
                read = file.readinto(view[at:])
                if not read:
                    raise UserError(f"{stored.path} ends within {stored.name}; copy or download it again")
                at += read
        return flat.as_strided(shape, strides).contiguous()


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def dequantise(codes: Any, scale: Any, bits: int) -> Any:
    """`quant.dequantise`, which loads torch."""
    from .. import quant

    return quant.dequantise(codes, scale, bits)


def native(family: Family, stored: dict[str, Stored]) -> Iterator[tuple[str, tuple[int, ...], Stored, Take]]:
    """Every native tensor that the published ones make: name, shape, source. Unknown names are an error of `fill`, not of this."""
    for item in stored.values():
        for take in family.places(item.name) or ():
            yield take.name, (take.rows(item.shape[0]), *item.shape[1:]) if item.shape else (), item, take


def fill(
    model: Any, family: Family, stored: dict[str, Stored], folder: Path, dtype: Any, device: Any, kind: str | None = None
) -> None:
    """Gives a model that was made on the meta device its weights, in place: read, cut, cast and put on the device one by one.

    kind: of quant.KINDS; the linear layers of the blocks become QuantLinear, each packed as soon as it is read, out of the numbers in the
    file (not the cast ones). Layers that ChatGLM published packed stay as they are, where it is that kind.
    Raises UserError before anything is read, with all tensors that are missing, unexpected or misshapen.
    """
    import torch

    from .. import quant

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {name: tuple(p.shape) for name, p in model.state_dict(keep_vars=True).items() if name not in tied}
    sources = {name: (item, take, shape) for name, shape, item, take in native(family, stored)}
    wrong = [f"missing {name}" for name in sorted(set(wanted) - set(sources))]
    wrong += [f"unexpected {name}" for name in sorted(stored) if family.places(name) is None]
    wrong += [f"unexpected {sources[name][0].name}" for name in sorted(set(sources) - set(wanted) - tied)]
    wrong += [
        f"misshapen {sources[name][0].name} (gives {list(sources[name][2])} for {name}, wanted {list(wanted[name])})"
        for name in sorted(set(wanted) & set(sources))
        if sources[name][2] != wanted[name]
    ]
    if wrong:
        raise UserError(f"the weights in {folder} do not fit its config.json, {len(wrong)} tensors: {'; '.join(wrong)}")
    published = any(item.scale is not None for item, _, _ in sources.values())
    chosen = [name for name in quant.linears(model) if not published or sources[f"{name}.weight"][0].scale is not None]
    layers = {f"{name}.weight": layer for name, layer in quant.replace(model, chosen if kind else ()).items()}
    reader = Reader()
    for name, (item, take, _) in sorted(sources.items(), key=lambda pair: (str(pair[1][0].path), pair[1][0].offset or 0)):
        if name in tied:
            continue
        if kind and name in layers:
            if item.scale is None:
                layers[name].packed = quant.pack(reader.read(item, take).to(device), kind, f"{folder}: {item.name}")
            else:
                layers[name].packed = quant.KINDS[kind](*(part.to(device) for part in reader.read_packed(item, take)))
            continue
        tensor = reader.read(item, take)
        if name in family.normalised:
            tensor = torch.nn.functional.normalize(tensor.float())
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    model.tie_weights()

"""Checkpoint files -> tensors, one at a time: safetensors and PyTorch `.bin` shards, never code that is stored in them.

Names and shapes are read first and checked whole against the model; only then is data read, straight from the file into
its own memory, so that at no time two copies of the weights exist.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, TypeGuard, cast

from ..errors import UserError
from .family import Family, Take

DTYPES = {  # of safetensors: torch's name, bytes
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1), "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1), "C64": ("complex64", 8),
}  # fmt: skip
SIZES = dict(DTYPES.values())
LONGEST_HEADER = 100_000_000  # as in safetensors itself
ALIGNMENTS = [2**i for i in range(17)]  # of a .bin file's records; torch's own is 64


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

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype] // (2 if self.packed else 1)


def open_folder(folder: Path, bits: int = 0) -> dict[str, Stored]:
    """Every tensor of a model folder, by its published name; nothing but headers is read.

    bits: of ChatGLM's own quantisation (config.json's quantization_bit). Raises UserError on missing, damaged or foreign files.
    """
    return _opened(_stamped(files(folder)), bits)


def _stamped(paths: Iterable[Path]) -> tuple[tuple[Path, int, int], ...]:
    """Files in a known state: what was read of them holds as long as their sizes and times stay."""
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [path.stat()])


@lru_cache(maxsize=2)
def _opened(stamped: tuple[tuple[Path, int, int], ...], bits: int) -> dict[str, Stored]:
    """A plan asks for names, shapes, targets and counts, and `.bin` headers take seconds."""
    found: dict[str, Stored] = {}
    for path, _, _ in stamped:
        there = header(path) if path.suffix == ".safetensors" else _pickled(path)
        if not there:
            raise UserError(f"{path} holds no tensors; copy or download it again")
        for name, item in there.items():
            if name in found and not same(found[name], item):
                raise UserError(
                    f"{name} stands in {found[name].path} and in {path} with other numbers; remove the file that is old"
                )
            found[name] = item
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


# --- which files ------------------------------------------------------------------------------------------------------------

FORMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # the first that is there counts, as in transformers


def files(folder: Path) -> list[Path]:
    """The weight files of a folder, by transformers' rule: safetensors before `.bin`; of each one whole file, else those of an index;
    and, which transformers does not read, numbered shards without one. Raises UserError where any of them is missing."""
    there = {path.name for path in folder.iterdir() if path.is_file()}
    lacking = None
    for stem, suffix in FORMS:
        index = f"{stem}{suffix}.index.json"
        whole = stem + suffix
        wanted = _index(folder / index, suffix) if index in there else [] if whole in there else _numbered(there, stem, suffix)
        if whole in there and whole not in wanted:
            return [folder / whole]
        missing = [name for name in wanted if name not in there]
        if wanted and not missing:
            return [folder / name for name in wanted]
        if missing:
            lacking = lacking or UserError(
                f"{folder} is not complete: {len(missing)} of {len(wanted)} weight files are missing ({missing[0]} ...)"
            )
            if len(missing) < len(wanted):  # all missing: the index came along with the other form's files
                raise lacking
    if lacking is not None:
        raise lacking
    others = ", ".join(sorted(name for name in there if name.endswith((".pt", ".pth", ".ckpt", ".gguf", ".bin")))[:4])
    raise UserError(
        f"{folder} holds no weights; wanted model*.safetensors or pytorch_model*.bin" + (f" (there: {others})" if others else "")
    )


def has_weights(folder: Path) -> bool:
    """Whether there is a file that `open_folder` would read, or complain of."""
    return any(path.suffix == suffix and path.name.startswith(stem) for path in folder.iterdir() for stem, suffix in FORMS)


def plain(paths: Sequence[Path]) -> bool:
    """Whether transformers takes just these files by itself: one whole file, else those of an index in its form."""
    stem, suffix = next(form for form in FORMS if form[1] == paths[0].suffix)
    whole, index = (paths[0].with_name(stem + suffix + more) for more in ("", ".index.json"))
    if whole.is_file():
        return list(paths) == [whole]
    return index.is_file() and isinstance(_json(index.read_bytes(), index).get("metadata"), dict)


def _index(path: Path, suffix: str) -> list[str]:
    """The files that an index of shards names: of its own folder only (they may be links, as in the hub's cache)."""
    found = _json(path.read_bytes(), path).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{path} is cut short or damaged (no weight_map of tensors and files); copy or download it again")
    names = sorted(set(found.values()))
    for name in names:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise UserError(
                f"{path} names a file outside its folder, {name[:200]!r}, which is not read; shards lie beside their index"
            )
        if not name.endswith(suffix):
            raise UserError(f"{path} names {name[:200]!r}, which is no {suffix} file; copy or download it again")
    return names


def _numbered(there: Iterable[str], stem: str, suffix: str) -> list[str]:
    """Shards without an index, as their own names count them: stem-00001-of-00003 wants 00002 and 00003 too."""
    found = [hit for name in sorted(there) if (hit := re.fullmatch(rf"{stem}-(\d{{1,6}})-of-(\d{{1,6}}){re.escape(suffix)}", name))]
    sets = {hit[2] for hit in found}
    if len(sets) > 1:
        raise UserError(
            f"{found[0][0]} and {found[-1][0]} are of two sets of weights, and no index says which; remove the old ones"
        )
    return [f"{stem}-{i:0{len(found[0][1])}}-of-{found[0][2]}{suffix}" for i in range(1, int(found[0][2]) + 1)] if found else []


# --- headers ----------------------------------------------------------------------------------------------------------------


def _json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8, no key twice. Raises UserError with the file's name."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a name stands twice")
        return made

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut short or damaged ({str(error)[:100]}); copy or download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is cut short or damaged (no JSON object); copy or download it again")
    return found


def header(path: Path) -> dict[str, Stored]:
    """Names, types, shapes and places of a safetensors file's tensors, checked as its format says: every entry as long as its shape and
    type, one behind the other without gaps from the header's end to the file's (huggingface/safetensors, README: Format).

    Raises UserError with the file's name. Every file goes through here before anything else opens it.
    """
    size = path.stat().st_size

    def broken(why: str) -> UserError:
        return UserError(f"{path} is cut short or damaged ({why}; {size} bytes); copy or download it again")

    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise broken("no whole header")
        tree = _json(file.read(length), path)
    about = tree.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise broken("__metadata__ is no table of texts")
    found, begin = {}, 8 + length
    for name, item in tree.items():
        kind, shape, place = (item.get(key) if isinstance(item, dict) else None for key in ("dtype", "shape", "data_offsets"))
        if not _counts(shape) or not _counts(place) or len(place) != 2 or not isinstance(kind, str):
            raise broken(f"{name[:100]} lacks its dtype, shape or data_offsets")
        if kind not in DTYPES:
            raise UserError(f"{path}: {name[:100]} is stored as {kind[:20]}, which is not read; wanted {', '.join(DTYPES)}")
        if place[1] - place[0] != prod(shape) * DTYPES[kind][1]:
            raise broken(f"{name[:100]} is not as long as its shape says")
        found[name] = Stored(name, path, DTYPES[kind][0], tuple(shape), begin + place[0])
    for item in sorted(found.values(), key=lambda item: (item.offset, item.nbytes)):
        if item.offset != begin:
            raise broken(f"{item.name[:100]} does not begin where the tensor before it ends")
        begin += item.nbytes
    if begin != size:
        raise broken("its tensors end elsewhere than the file")
    return found


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _pickled(path: Path) -> dict[str, Stored]:
    """A `.bin` file: torch's restricted unpickler (weights_only) makes names and shapes without data; the file says where the data is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    records = _records(path)
    with FakeTensorMode():
        content = unpickle(path)
    found = {}
    for name, tensor in content.items():
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if records is not None and start is not None and records.get(start) != storage.nbytes():
            raise UserError(f"{path} is cut short or damaged ({name[:100]} has no record of its size); copy or download it again")
        offset = None if start is None else start + tensor.storage_offset() * tensor.element_size()
        strides = None if tensor.is_contiguous() else tuple(tensor.stride())
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = Stored(name, path, dtype, tuple(tensor.shape), offset, strides)
    return found


def _records(path: Path) -> dict[int, int] | None:
    """Where the records of a `.bin` file lie and how long they are; None for the format before torch 1.6, which is no zip file.

    torch trusts lengths in the file as far as dividing by them, so that one flipped bit ends the process: they are checked here first.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return None
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            listed = sorted(archive.infolist(), key=lambda info: info.header_offset)
            ends = [*(info.header_offset for info in listed[1:]), archive.start_dir]
            found = {}
            for info, end in zip(listed, ends):
                file.seek(info.header_offset)
                local = struct.unpack("<4s2xHH16xHH", file.read(30))
                name, extra = file.read(local[3]), file.read(local[4])
                start = file.tell()
                if not _whole_fields(extra):  # a wrong length of it would move all that follows
                    raise ValueError("the extra field of a record is not as long as it says")
                if local[:3] != (b"PK\3\4", info.flag_bits, 0) or name.decode() != info.orig_filename or info.compress_type:
                    raise ValueError("its records are not as it lists them")
                if start + info.file_size > end:
                    raise ValueError("its records overlap")
                found[start] = info.file_size
                if "/data/" not in info.filename:  # the small ones, by their checksums
                    text = archive.read(info)
                    if info.filename.endswith(".storage_alignment") and int(text) not in ALIGNMENTS:
                        raise ValueError("an alignment that torch does not write")
    except Exception as error:  # zipfile, struct and the codecs each raise their own
        why = str(error)[:100] or type(error).__name__
        raise UserError(
            f"{path} is cut short or damaged ({why}); copy or download it again, or take the model's *.safetensors"
        ) from None
    return found


def _whole_fields(extra: bytes) -> bool:
    """Whether a zip record's extra field is a sequence of whole fields (APPNOTE.TXT 4.5.1: id u16, length u16, content)."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


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


# --- two tensors that should be one ------------------------------------------------------------------------------------------


def same(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same numbers, whatever they are stored in; read piece by piece, up to the first that differs."""
    return one.shape == other.shape and _same(one, other, _stamped([one.path, other.path]))


@lru_cache(maxsize=8)
def _same(one: Stored, other: Stored, stamped: Any) -> bool:
    if replace(one, name="") == replace(other, name="") and one.offset is not None:
        return True  # one place under two names, as torch.save writes tied weights
    whole = [item for item in (one, other) if item.offset is not None and item.strides is None and item.scale is None]
    if len(whole) == 2 and one.dtype == other.dtype:
        with open(one.path, "rb") as first, open(other.path, "rb") as second:
            first.seek(one.offset or 0)
            second.seek(other.offset or 0)
            left = one.nbytes
            while left:
                size = min(left, 1 << 24)
                if first.read(size) != second.read(size):
                    return False
                left -= size
        return True
    import torch

    readers, rows = (Reader(), Reader()), one.shape[0] if one.shape else 1
    for start in range(0, rows, 4096):
        take = Take("", start, min(start + 4096, rows)) if one.shape else None
        first, second = (reader.read(item, take).double() for reader, item in zip(readers, (one, other)))
        if not torch.equal(first, second):
            return False
    return True


HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")


def settled(family: Family, stored: dict[str, Stored]) -> Family:
    """`family` with an output head as the files have it, where its config says that the head is the embeddings once more.

    Two tensors that differ are both kept, as transformers 5 does, and config says so; equal ones are one; of a single one, under either
    name, both are made. A head whose rows are brought to length (`normalised`) is never the embeddings.
    """
    if not family.config.get("tie_word_embeddings"):
        return family
    given = family.places
    made = {take.name: name for name in stored for take in given(name) or ()}
    head = next((name for name in made if name.split(".")[-2:] == HEAD.split(".")), None)
    embeddings = next((name for name in made if name.endswith(EMBEDDINGS)), None)
    apart = replace(family, config={**family.config, "tie_word_embeddings": False})
    moved: dict[str, tuple[Take, ...]] = {}
    if HEAD in family.normalised:
        if head is None and embeddings is not None:
            moved = {made[embeddings]: (Take(embeddings), Take(HEAD))}
        family = apart
    elif head is not None and embeddings is not None:
        if not same(stored[made[head]], stored[made[embeddings]]):
            return apart
        moved = {made[head]: ()}
    elif head is not None:
        ours = (
            "transformer.word_embeddings.weight" if family.config.get("model_type") == "chatglm1" else "model.embed_tokens.weight"
        )
        moved = {made[head]: (Take(ours),)}
    return replace(family, places=lambda name: moved[name] if name in moved else given(name)) if moved else family


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


def check(model: Any, family: Family, stored: dict[str, Stored], folder: Path) -> dict[str, tuple[Stored, Take]]:
    """Where each tensor of a model (on the meta device is enough) comes from; `family` is a settled one.

    Raises UserError with all tensors that are missing, unexpected, misshapen or there twice.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {name: tuple(p.shape) for name, p in model.state_dict(keep_vars=True).items() if name not in tied}
    sources: dict[str, tuple[Stored, Take]] = {}
    wrong, shapes = [], {}
    for name, shape, item, take in native(family, stored):
        if name in sources:
            wrong.append(f"both {sources[name][0].name} and {item.name} give {name}")
        sources[name], shapes[name] = (item, take), shape
    wrong += [f"missing {name}" for name in sorted(set(wanted) - set(sources))]
    wrong += [f"unexpected {name}" for name in sorted(stored) if family.places(name) is None]
    wrong += [f"unexpected {sources[name][0].name}" for name in sorted(set(sources) - set(wanted))]
    wrong += [
        f"misshapen {sources[name][0].name} (gives {list(shapes[name])} for {name}, wanted {list(wanted[name])})"
        for name in sorted(set(wanted) & set(sources))
        if shapes[name] != wanted[name]
    ]
    if wrong:
        raise misfit(folder, wrong)
    return sources


def misfit(folder: Path, wrong: Sequence[str]) -> UserError:
    return UserError(f"the weights in {folder} do not fit its config.json, {len(wrong)} tensors: {'; '.join(wrong)}")


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

    sources = check(model, family, stored, folder)
    published = any(item.scale is not None for item, _ in sources.values())
    chosen = [name for name in quant.linears(model) if not published or sources[f"{name}.weight"][0].scale is not None]
    layers = {f"{name}.weight": layer for name, layer in quant.replace(model, chosen if kind else ()).items()}
    reader = Reader()
    for name, (item, take) in sorted(sources.items(), key=lambda pair: (str(pair[1][0].path), pair[1][0].offset or 0)):
        if kind and name in layers:
            if item.scale is None:
                layers[name].packed = quant.pack(reader.read(item, take).to(device), kind, f"{folder}: {item.name}")
            else:
                codes, scale = (part.to(device) for part in reader.read_packed(item, take))
                if not scale.isfinite().all():
                    raise UserError(f"{item.path}: {item.name} has scales that are not finite; copy or download it again")
                layers[name].packed = quant.KINDS[kind](codes, scale)
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

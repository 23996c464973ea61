"""Damaged and unusual model folders: each is opened, or refused with exit 2 and the file's name; never a traceback, never other weights."""

import copy
import io
import json
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import glmtune
from glmtune import adapters, families
from glmtune.errors import UserError
from glmtune.families import weights
from glmtune.tensors import read_tensors
from tests import published, tiny
from tests.cases import cases

MANY = cases(60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    made = {name: published.FAMILIES[name](root / name) for name in ("chatglm2-6b", "chatglm-6b", "baichuan2-7b-chat")}
    return {"llama": tiny.llama(root / "llama"), **made}


@pytest.fixture
def folder(bases: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(bases["llama"], tmp_path / "m")


def opened(folder: Path, dtype: str = "fp32") -> None:
    glmtune.load(folder, device="cpu", dtype=dtype).chat("hi", max_new_tokens=2, temperature=0)


# --- headers of safetensors -------------------------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, tree: Any, rest: bytes) -> None:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


Change = Callable[[dict[str, Any], list[str]], Any]


def moved(by: int) -> Change:
    def change(tree: dict[str, Any], names: list[str]) -> None:
        item = tree[names[3]]
        item["data_offsets"] = [place + by for place in item["data_offsets"]]

    return change


def entry(**values: Any) -> Change:
    return lambda tree, names: tree[names[3]].update(values)


def lost(key: str) -> Change:
    return lambda tree, names: tree[names[3]].pop(key)


def swapped(tree: dict[str, Any], names: list[str]) -> None:
    tree[names[3]]["data_offsets"].reverse()


def doubled(tree: dict[str, Any], names: list[str]) -> None:
    same = next(name for name in names[4:] if tree[name]["shape"] == tree[names[3]]["shape"])
    tree[same]["data_offsets"] = tree[names[3]]["data_offsets"]


def reshaped(tree: dict[str, Any], names: list[str]) -> None:
    tree[names[3]]["shape"] = tree[names[3]]["shape"] + [2]


HEADERS: dict[str, Change] = {
    "moved": moved(4),
    "moved back": moved(-4),
    "negative": entry(data_offsets=[-4, 0]),
    "reversed": swapped,
    "two at one place": doubled,
    "longer than its place": reshaped,
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "one offset": entry(data_offsets=[0]),
    "offsets in fractions": entry(data_offsets=[0.0, 4.0]),
    "offsets true": entry(data_offsets=[False, True]),
    "no shape": lost("shape"),
    "no dtype": lost("dtype"),
    "no offsets": lost("data_offsets"),
    "shape null": entry(shape=None),
    "shape below zero": entry(shape=[-1, -32]),
    "shape in texts": entry(shape=["32"]),
    "dtype unknown": entry(dtype="F17"),
    "dtype of another length": entry(dtype="F16"),
    "dtype no text": entry(dtype=[]),
    "an entry gone": lambda tree, names: tree.pop(names[-1]),
    "an entry more": lambda tree, names: tree.update(more={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    "an entry no object": lambda tree, names: tree.update({names[3]: 5}),
    "metadata no object": lambda tree, names: tree.update(__metadata__=5),
    "metadata in numbers": lambda tree, names: tree.update(__metadata__={"format": 5}),
}  # fmt: skip


@pytest.mark.few(16)
@pytest.mark.parametrize("how", HEADERS)
@pytest.mark.parametrize("family", ["llama", "chatglm2-6b"])
def test_a_header_that_the_format_does_not_allow_is_refused(bases: dict[str, Path], tmp_path: Path, how: str, family: str):
    folder = shutil.copytree(bases[family], tmp_path / "m")
    path = folder / "model.safetensors"
    tree, rest = header_of(path)
    HEADERS[how](tree, sorted((n for n in tree if n != "__metadata__"), key=lambda n: tree[n]["data_offsets"]))
    with_header(path, tree, rest)
    for dtype in ("fp32", "bf16"):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            families.load_model(folder, dtype=dtype, device="cpu")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_tensors(path)  # adapters, checkpoints, prefixes


@pytest.mark.parametrize(
    "end", ["64 bytes more", "64 bytes less", "a gap", "a key twice", "no JSON", "nested", "a list", "longer than allowed"]
)
def test_bytes_around_a_header_are_told(folder: Path, end: str):
    path = folder / "model.safetensors"
    tree, rest = header_of(path)
    text = json.dumps(tree).encode()
    if end == "a gap":  # between header and numbers
        tree = {
            n: t if n == "__metadata__" else {**t, "data_offsets": [x + 64 for x in t["data_offsets"]]} for n, t in tree.items()
        }
        with_header(path, tree, bytes(64) + rest)
    elif end == "longer than allowed":
        path.write_bytes(struct.pack("<Q", 2**62) + text + rest)
    else:
        made = {"64 bytes more": (text, rest + bytes(64)), "64 bytes less": (text, rest[:-64]), "no JSON": (text[:-1], rest),
                "a key twice": (text[:-1] + b", " + text[1:], rest), "nested": (b"[" * 9000, rest), "a list": (b"[]", rest)}[end]  # fmt: skip
        with_header(path, *made)
    for read in (families.tensor_shapes, families.load_model):
        with pytest.raises(UserError, match=r"model\.safetensors is cut short or damaged"):
            read(folder)


@MANY
@given(st.data())
def test_a_file_is_read_as_it_was_written_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any):
    """Any two bytes of a header changed: the same tensors, the same numbers under other names or types of the same size, or an error."""
    path = tmp_path_factory.mktemp("h") / "model.safetensors"
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(4, dtype=torch.float16),
        "c": torch.zeros(0, 3),
        "d": torch.tensor(5),
    }
    save_file(tensors, path)
    written = bytearray(path.read_bytes())
    length = struct.unpack("<Q", written[:8])[0]
    for at in data.draw(st.lists(st.integers(0, 7 + length), min_size=1, max_size=2)):
        written[at] = data.draw(st.integers(0, 255))
    path.write_bytes(written)
    try:
        found = weights.header(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    ours = {name: weights.Reader().read(item) for name, item in found.items()}
    theirs = load_file(path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING"])
def test_an_adapters_header_is_checked_too(folder: Path, tmp_path: Path, kind: str):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2}))
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    tree, rest = header_of(path)
    tree["a"]["data_offsets"] = tree["b"]["data_offsets"]
    with_header(path, tree, rest)
    with pytest.raises(UserError, match="adapter_model.safetensors is cut short or damaged"):
        adapters.open_folder(tmp_path)


# --- indexes ----------------------------------------------------------------------------------------------------------------


def sharded(folder: Path, weight_map: Any, **more: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **more}))


@pytest.mark.parametrize("name", ["../outside/x.safetensors", "{outside}/x.safetensors", "sub/x.safetensors", "..", ".", "", "sub\\x.safetensors", "./x.safetensors"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "chatglm2-6b"])
def test_an_index_may_name_files_of_its_own_folder_only(bases: dict[str, Path], tmp_path: Path, name: str, family: str):
    folder, outside = shutil.copytree(bases[family], tmp_path / "m"), tmp_path / "outside"
    names = families.weights.open_folder(folder)
    outside.mkdir()
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub" / "x.safetensors")
    (folder / "model.safetensors").rename(outside / "x.safetensors")
    sharded(folder, dict.fromkeys(names, name.format(outside=outside)))
    for read in (families.tensor_shapes, families.load_model):
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names a file outside its folder"):
            read(folder)


def test_links_inside_a_folder_are_the_hub_caches_way(folder: Path, tmp_path: Path):
    names = families.weights.open_folder(folder)
    wanted = families.load_model(folder, device="cpu").lm_head.weight
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / "1234")
    (folder / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "blobs" / "1234")
    sharded(folder, dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    for dtype in ("fp32", "bf16"):
        assert torch.equal(
            families.load_model(folder, dtype=dtype, device="cpu").lm_head.weight, wanted.to(families.as_dtype(dtype))
        )


@pytest.mark.parametrize("weight_map", [None, {}, [], 5, {"a": 5}, {"a": None}, {"a": ["b"]}, {"a": "config.json"}, {"a": "x" * 5000 + ".safetensors"}, {"a": "a\0b.safetensors"}])  # fmt: skip
def test_an_index_of_wrong_types_is_told(folder: Path, weight_map: Any):
    (folder / "model.safetensors").unlink()
    sharded(folder, weight_map)
    for read in (families.tensor_shapes, families.load_model):
        with pytest.raises(UserError, match=r"index\.json|weight files are missing"):
            read(folder)


# --- .bin -------------------------------------------------------------------------------------------------------------------


def test_a_length_in_a_bin_file_that_torch_would_divide_by_is_told(folder: Path):
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    opened(folder)
    data = bytearray(path.read_bytes())
    data[data.index(b"pytorch_model/.storage_alignment") - 1] = 94
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is cut short or damaged"):
        families.load_model(folder, device="cpu")


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 97])
def test_any_byte_of_a_bin_file_may_be_wrong(tmp_path: Path, step: int):
    """Outside the numbers: the same tensors, or an error with the file's name."""
    path = tmp_path / "pytorch_model.bin"
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.arange(3)}
    torch.save(tensors, path)
    whole, wanted = path.read_bytes(), weights._pickled(path)
    for at in range(0, len(whole), step):
        for value in {whole[at] ^ 1, whole[at] ^ 128, 0, 255, 94} - {whole[at]}:
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                found = weights._pickled(path)
            except UserError as error:
                assert str(path) in str(error)
            else:
                assert found == wanted


@pytest.mark.parametrize("alignment", ["0", "-64", "x", "63", "9" * 30])
def test_an_alignment_that_torch_never_writes_is_refused(tmp_path: Path, alignment: str):
    made = io.BytesIO()
    torch.save({"a": torch.randn(3)}, made)
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info, alignment if info.filename.endswith(".storage_alignment") else old.read(info))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        weights._pickled(path)


# --- configs and tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "value", ["flash_attention_2", "flash_attention_3", "flex_attention", "no_such", {"": "flash_attention_2"}]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_how_attention_is_computed_is_not_the_folders_choice(folder: Path, key: str, value: Any, dtype: str):
    wanted = families.load_model(folder, dtype=dtype, device="cpu").config._attn_implementation
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert families.load_model(folder, dtype=dtype, device="cpu").config._attn_implementation == wanted
    opened(folder, dtype)


def put(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    part = tree
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = value
    return tree


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    return [*([at] if at else []), *(place for key, value in inner for place in places(value, (*at, key)))]


KNOWN = {  # keys that folders also have, beside those of the tiny ones
    "config.json": "sliding_window rope_parameters rope_scaling quantization_config text_config torch_dtype layer_types quantization_bit "
    "output_attentions auto_map eos_token_id max_position_embeddings rope_theta head_dim mlp_bias use_cache architectures model_type",
    "tokenizer_config.json": "bos_token eos_token pad_token unk_token chat_template added_tokens_decoder add_bos_token tokenizer_class "
    "extra_special_tokens additional_special_tokens padding_side auto_map num_image_tokens end_tokens name_or_path",
    "special_tokens_map.json": "bos_token eos_token pad_token additional_special_tokens",
    "generation_config.json": "eos_token_id do_sample pad_token_id max_new_tokens num_beams user_token_id assistant_token_id stop_strings",
    "added_tokens.json": "[A] <s>",
    "tokenizer.json": "",
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, -0.5, 1e30, float("inf"), float("nan"), "", "x", "2", [], [1], [None], ["x"], {}, {"a": 1},
    {"rope_theta": [None]}, {"content": 5}, 10**9, [[[]]], "\ud800",
]  # fmt: skip


def damage(folder: Path, file: str, seed: int) -> str:
    """Changes one thing in a file of a folder, and says what."""
    chance = random.Random(f"{file}/{seed}")
    path = folder / file
    tree = json.loads(path.read_text()) if path.is_file() else {}
    kind = chance.random()
    if kind < 0.15 and path.is_file():
        data = bytearray(path.read_bytes())
        for _ in range(chance.choice([1, 1, 3])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        return "bytes"
    if kind < 0.2:
        path.write_text(text := chance.choice(["", "[]", "{", "null", '{"a": 1, "a": 2}', "[" * 5000]))
        return text[:20]
    at = chance.choice([*places(tree), *((key,) for key in KNOWN[file].split())])
    value = chance.choice(VALUES)
    path.write_text(json.dumps(put(tree, at, value)))
    return f"{at}: {value!r}"


CASES = [("llama", file, 8) for file in KNOWN] + [("chatglm2-6b", "config.json", 6), ("chatglm-6b", "config.json", 6), ("baichuan2-7b-chat", "generation_config.json", 4)]  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("more", [0, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "file", "count"), CASES)
def test_a_file_with_one_thing_changed_is_opened_or_named(
    bases: dict[str, Path], tmp_path: Path, family: str, file: str, count: int, more: int
):
    for seed in range(more, more + count + more):
        folder = shutil.copytree(bases[family], tmp_path / str(seed))
        said = damage(folder, file, seed)
        try:
            opened(folder, random.Random(seed).choice(["fp32", "bf16"]))
        except UserError as error:
            assert len(str(error)) < 2000, said
        except BaseException as error:
            raise AssertionError(said) from error
        shutil.rmtree(folder)


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", key, value)
        for key, value in {
            "rms_norm_eps": [], "tie_word_embeddings": 0, "num_hidden_layers": -0.5, "num_key_value_heads": True, "pad_token_id": {},
            "use_cache": [], "mlp_bias": "x", "rope_parameters": True, "head_dim": float("inf"), "sliding_window": [1], "hidden_size": "2",
            "max_position_embeddings": "x", "text_config": 5, "quantization_config": 2, "architectures": {"a": 1},
        }.items()
    ]
    + [("config.json", "rope_parameters", {"rope_theta": [None]}), ("config.json", "sliding_window", -1)]
    + [("config.json", "eos_token_id", "2"), ("generation_config.json", "eos_token_id", "2"), ("generation_config.json", "eos_token_id", [True])]
    + [("tokenizer_config.json", "bos_token", {}), ("tokenizer_config.json", "chat_template", [5]), ("special_tokens_map.json", "eos_token", 5)]
    + [("tokenizer_config.json", "added_tokens_decoder", {"x": {}}), ("added_tokens.json", "a", "x")],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_told_with_its_file(folder: Path, file: str, key: str, value: Any):
    path = folder / file
    tree = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**tree, key: value}))
    if file == "added_tokens.json":  # read where a vocabulary is built
        with pytest.raises(UserError, match=r"added_tokens\.json"):
            families.family.added(folder)
        return
    for dtype in ("fp32", "bf16"):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}"):  # itself, not the file that led to it
            opened(folder, dtype)


@pytest.mark.parametrize("named", ["nn", "int8", "float"])
def test_a_dtype_that_is_none_for_weights_is_told(folder: Path, named: str):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": named, "dtype": named}))
    if named == "float":  # torch's other name of float32
        assert families.load_model(folder, device="cpu").dtype == torch.float32
        return
    with pytest.raises(UserError, match=r"config\.json: torch_dtype is"):
        families.load_model(folder, device="cpu")


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_file_that_is_no_utf_8_is_told(folder: Path, file: str):
    (folder / file).write_bytes(b"\xff\xfe" + (folder / file).read_bytes())
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        families.open_template(folder)

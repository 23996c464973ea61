"""Model folders as people have them: two sources of one tensor, two sets of weights, buffers of old files, damage of every kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmtune import export, families
from glmtune.errors import UserError
from tests import published, tiny
from tests.cases import cases

IDS = torch.tensor([[5, 9, 40, 7, 61, 12, 33, 80]])
QUIET = cases(12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def qwen(folder: Path, **changes: Any) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tiny.llama(folder)
    settings = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    config = Qwen2Config(**{name: settings[name] for name in kept}, initializer_range=0.2, **changes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path, **changes: Any) -> Path:
    """A class that only transformers' own loader reads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny.tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=352, n_embd=32, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2, **changes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny.llama(root / "llama"),
        "qwen2": qwen(root / "qwen2", tie_word_embeddings=True),
        "gpt2": gpt2(root / "gpt2"),
    }


def copied(base: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(base, to)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """The folder with these tensors in one file and these values in config.json."""
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return configured(folder, **config)


def configured(folder: Path, **config: Any) -> Path:
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **config}))
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def plain(folder: Path, dtype: torch.dtype) -> Tensor:
    """What transformers alone computes on a folder."""
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


# --- a head of its own ------------------------------------------------------------------------------------------------------

EMBEDDINGS = {"llama": "model.embed_tokens.weight", "qwen2": "model.embed_tokens.weight", "gpt2": "wte.weight"}


def with_head(base: Path, to: Path, family: str, head: str, stored: torch.dtype, tied: bool) -> Path:
    """A copy whose head is absent, equal to the embeddings, other in one number, all other, or equal but for rounding to bf16."""
    folder = copied(base, to)
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(folder).items()}
    name = next(name for name in tensors if name.endswith(EMBEDDINGS[family]))
    own = tensors[name].clone()
    if head == "one":
        own[40, 3] += 2
    elif head == "other":
        own = (torch.randn(own.shape, generator=torch.Generator().manual_seed(5)) * 0.2).to(stored)
    elif head == "rounded":
        own = own.bfloat16().to(stored)
    if head == "alone":
        del tensors[name]
    if head != "absent":
        tensors["lm_head.weight"] = own
    return written(folder, tensors, tie_word_embeddings=tied, dtype=str(stored).removeprefix("torch."))


HEADS = ("absent", "equal", "one", "other", "rounded", "alone")
DTYPES = (torch.float32, torch.bfloat16)


@QUIET
@given(st.sampled_from(["llama", "qwen2"]), st.sampled_from(HEADS), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans())
def test_a_folder_computes_what_transformers_computes_on_it(
    bases: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    head: str,
    stored: torch.dtype,
    dtype: torch.dtype,
    tied: bool,
):
    folder = with_head(bases[family], tmp_path_factory.mktemp("head") / "m", family, head, stored, tied)
    if head in ("alone", "absent") and not tied:
        with pytest.raises(UserError, match="missing"):
            families.load_model(folder, dtype=dtype, device="cpu")
        return
    wanted = plain(folder, dtype)
    model = families.load_model(folder, dtype=dtype, device="cpu")
    assert torch.equal(logits(model), wanted)
    one = (tied and head in ("absent", "equal", "alone")) or (tied and head == "rounded" and stored == torch.bfloat16)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == one
    assert model.config.tie_word_embeddings == families.config_of(folder)["tie_word_embeddings"] == one
    assert ("lm_head.weight" in families.tensor_shapes(folder)) == (not one)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert families.num_parameters(folder) == count


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("head", ["one", "equal", "absent"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_computes_what_the_folder_computed(bases: dict[str, Path], tmp_path: Path, family: str, head: str, dtype: str):
    stored = torch.bfloat16 if dtype == "fp32" else torch.float32
    folder = with_head(bases[family], tmp_path / "m", family, head, stored, True)
    to = export.export(folder, tmp_path / "to", dtype=dtype)
    assert torch.equal(plain(to, families.as_dtype(dtype)), plain(folder, families.as_dtype(dtype)))
    assert json.loads((to / "config.json").read_text()).get("tie_word_embeddings", True) == (head != "one")


@pytest.mark.few(1)
@pytest.mark.parametrize("head", ["one", "equal", "absent", "alone"])
@pytest.mark.parametrize("stored", DTYPES)
def test_a_gguf_file_has_the_head_that_the_folder_has(bases: dict[str, Path], tmp_path: Path, head: str, stored: torch.dtype):
    import gguf

    folder = with_head(bases["llama"], tmp_path / "m", "llama", head, stored, True)
    export.export(folder, tmp_path / "m.gguf", outtype="f32")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    tensors = tensors_of(folder)
    assert ("output.weight" in found) == (head == "one")
    embeddings = tensors["lm_head.weight" if head == "alone" else "model.embed_tokens.weight"]
    assert torch.equal(found["token_embd.weight"].view(352, 32), embeddings.float())
    if head == "one":
        assert torch.equal(found["output.weight"].view(352, 32), tensors["lm_head.weight"].float())


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packing_keeps_the_head(bases: dict[str, Path], tmp_path: Path, kind: str, family: str):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = with_head(bases[family], tmp_path / "m", family, "other", torch.float32, True)
    model = families.load_model(folder, dtype="bf16", device="cpu", quant=kind)
    assert torch.equal(model.lm_head.weight, tensors_of(folder)["lm_head.weight"].bfloat16())


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["chatglm-6b", "chatglm2-6b", "internlm2-chat-7b", "baichuan-7b", "baichuan2-7b-chat", "baichuan-13b-chat"]
)
@pytest.mark.parametrize("head", ["equal", "one", "absent"])
def test_published_families_keep_a_head_of_their_own(name: str, head: str, tmp_path: Path):
    folder = published.FAMILIES[name](tmp_path / name)
    if (folder / "pytorch_model.bin").is_file():
        tensors = torch.load(folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").unlink()
    else:
        tensors = tensors_of(folder)
    top = next(n for n in tensors if n in ("lm_head.weight", "output.weight", "transformer.output_layer.weight"))
    bottom = next(n for n in tensors if "embed" in n)
    tensors[top] = tensors[bottom].clone()
    if head == "one":
        tensors[top][20, 3] += 2
    elif head == "absent":
        del tensors[top]
    written(folder, tensors, tie_word_embeddings=True)
    model = families.load_model(folder, dtype="fp32", device="cpu")
    wanted = tensors.get(top, tensors[bottom])
    if "baichuan2" in name:
        wanted = torch.nn.functional.normalize(wanted)
    assert torch.equal(model.get_input_embeddings().weight, tensors[bottom])
    assert torch.equal(model.get_output_embeddings().weight, wanted)
    assert model.config.tie_word_embeddings == (head != "one" and "baichuan2" not in name)


def test_one_tensor_in_two_shards_must_be_the_same(bases: dict[str, Path], tmp_path: Path):
    folder = copied(bases["llama"], tmp_path / "m")
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    shard = {"a.safetensors": tensors, "b.safetensors": {**head, "model.norm.weight": tensors["model.norm.weight"].clone()}}
    for name, part in shard.items():
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for dtype in DTYPES:  # the head stands in some shards only
        assert torch.equal(logits(families.load_model(folder, dtype=dtype, device="cpu")), plain(folder, dtype))
    save_file({**head, "model.norm.weight": tensors["model.norm.weight"] * 2}, folder / "b.safetensors", {"format": "pt"})
    for dtype in DTYPES:
        with pytest.raises(UserError, match=r"model.norm.weight stands in .*a.safetensors and in .*b.safetensors"):
            families.load_model(folder, dtype=dtype, device="cpu")


# --- two sets of weights ----------------------------------------------------------------------------------------------------


def saved(folder: Path, tensors: dict[str, Tensor], form: str, index: bool = True) -> None:
    """whole | shards, safetensors | bin"""
    layout, kind = form.split()
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    save: Callable[..., Any] = save_file if kind == "safetensors" else torch.save
    if layout == "whole":
        save(tensors, folder / (stem + suffix))
        return
    names = sorted(tensors)
    where = {}
    for i in range(2):
        file = f"{stem}-{i + 1:05d}-of-00002{suffix}"
        save({name: tensors[name] for name in names[i::2]}, folder / file)
        where |= dict.fromkeys(names[i::2], file)
    if index:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


FORMS = ("whole safetensors", "shards safetensors", "whole bin", "shards bin")


@pytest.mark.few(2)
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_of_two_sets_of_weights_every_dtype_reads_the_one_that_transformers_reads(
    bases: dict[str, Path], tmp_path: Path, first: int, second: int
):
    folder = copied(bases["llama"], tmp_path / "m")
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    saved(folder, {name: tensor * 0.5 for name, tensor in tensors.items()}, FORMS[second])
    saved(folder, tensors, FORMS[first])
    for dtype in DTYPES:
        assert torch.equal(logits(families.load_model(folder, dtype=dtype, device="cpu")), plain(folder, dtype))


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["shards safetensors", "shards bin"])
def test_shards_without_an_index_are_one_model_in_every_dtype(bases: dict[str, Path], tmp_path: Path, form: str):
    folder = copied(bases["llama"], tmp_path / "m")
    wanted = {dtype: plain(folder, dtype) for dtype in DTYPES}
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    saved(folder, tensors, form, index=False)
    for dtype in DTYPES:
        assert torch.equal(logits(families.load_model(folder, dtype=dtype, device="cpu")), wanted[dtype])
    next(folder.glob("*-00002-of-*")).unlink()
    for dtype in DTYPES:
        with pytest.raises(UserError, match="1 of 2 weight files are missing"):
            families.load_model(folder, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_with_other_rows_than_the_config_says_are_named_with_both_sizes(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype
):
    folder = copied(bases["llama"], tmp_path / "m")
    tensors = tensors_of(folder)
    more = torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(8, 32)])
    written(folder, {**tensors, "model.embed_tokens.weight": more})
    with pytest.raises(UserError, match=r"misshapen model.embed_tokens.weight \(gives \[360, 32\].*wanted \[352, 32\]"):
        families.load_model(folder, dtype=dtype, device="cpu")


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.masked_bias",
        "model.position_ids",
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tables_that_a_class_computes_are_never_read(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype, extra: str, family: str
):
    folder = copied(bases[family], tmp_path / "m")
    wanted = plain(folder, dtype)
    written(folder, tensors_of(folder) | {extra: torch.ones(4, dtype=torch.float16)})
    assert torch.equal(logits(families.load_model(folder, dtype=dtype, device="cpu")), wanted)
    assert extra not in families.tensor_shapes(folder)


# --- numbers that are none --------------------------------------------------------------------------------------------------


@QUIET
@given(st.data())
def test_a_file_reads_back_whatever_its_bits_are(tmp_path_factory: pytest.TempPathFactory, data: Any):
    from glmtune.tensors import compare, write_tensors

    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    values = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf")]), min_size=0, max_size=9)
    )
    tensors = {"a": torch.tensor(values).to(dtype)}
    path = tmp_path_factory.mktemp("odd") / "a.safetensors"
    write_tensors(tensors, path)
    compare(tensors, path)
    if values:
        with pytest.raises(OSError, match="does not read back"):
            compare({"a": torch.full_like(tensors["a"], 2.5)}, path)


@pytest.mark.few(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("to", ["to", "to.gguf"])
def test_what_is_no_number_is_not_exported(bases: dict[str, Path], tmp_path: Path, value: float, name: str, to: str):
    folder = copied(bases["llama"], tmp_path / "m")
    tensors = tensors_of(folder)
    tensors[name].view(-1)[3] = value
    written(folder, tensors)
    with pytest.raises(UserError, match=rf"model.safetensors: {name} holds numbers that are not finite"):
        export.export(folder, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.few(1)
@pytest.mark.parametrize("to", ["to", "to.gguf"])
def test_what_fp16_cannot_hold_is_not_exported_as_infinity(bases: dict[str, Path], tmp_path: Path, to: str):
    folder = copied(bases["llama"], tmp_path / "m")
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    written(folder, tensors)
    with pytest.raises(UserError, match="holds numbers"):
        export.export(folder, tmp_path / to, dtype="fp16" if to == "to" else "auto", outtype=None if to == "to" else "f16")
    export.export(folder, tmp_path / "fine", dtype="bf16")


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_packed(bases: dict[str, Path], tmp_path: Path, kind: str, value: float):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = copied(bases["llama"], tmp_path / "m")
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    written(folder, tensors)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight .* not finite"):
        families.load_model(folder, device="cpu", quant=kind)


# --- the tokenizer and the rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 280 rows whose tokenizer has 299 tokens."""
    return tiny.llama(tmp_path_factory.mktemp("short") / "m", vocab_size=280, tie_word_embeddings=False)


ROW = {"instruction": "the user said the answer is in the sea", "output": "the cat sat on the mat"}
COMMANDS = {
    "doctor": ["doctor", "M"],
    "show": ["show", "model=M", "data=rows.jsonl"],
    "train": ["train", "model=M", "data=rows.jsonl", "out=run"],
    "chat": ["chat", "M", "--prompt", "the user said the answer is in the sea"],
    "predict": ["predict", "M", "rows.jsonl", "--out", "o.jsonl"],
    "export": ["export", "M", "--to", "to"],
    "gguf": ["export", "M", "--to", "to.gguf"],
    "check": ["data", "check", "rows.jsonl", "--model", "M"],
}


def command(place: Path, folder: Path, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and what was printed on stderr."""
    from glmtune import cli

    monkeypatch.chdir(place)
    (place / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.setattr(
        "sys.argv", ["glmtune", *(word.replace("M", str(folder)) if word[-1] == "M" else word for word in COMMANDS[name])]
    )
    capsys.readouterr()
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_told(
    name: str, short: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    code, told = command(tmp_path, short, name, capsys, monkeypatch)
    assert code == 2 and "the tokenizer has 299 tokens, the model 280 rows" in told and "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_unused_added_tokens_count_and_rows_without_a_token_are_padding(bases: dict[str, Path], tmp_path: Path):
    folder = copied(bases["llama"], tmp_path / "m")
    families.open_template(folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    first = tree["added_tokens"][0]
    tree["added_tokens"] += [{**first, "content": f"[{id}]", "id": id} for id in range(299, 353)]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="the tokenizer has 353 tokens, the model 352 rows"):
        families.open_template(folder)


def test_the_tokenizer_of_an_adapter_must_fit_the_model_too(short: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import glmtune

    base = copied(short, tmp_path / "m")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], r=2))
    peft.save_pretrained(str(tmp_path / "adapter"))
    for path in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / path).rename(tmp_path / "adapter" / path)
    with pytest.raises(UserError, match="the tokenizer has 299 tokens, the model 280 rows"):
        glmtune.load(base, adapter=tmp_path / "adapter", device="cpu")
    for to in ("to", "to.gguf"):
        with pytest.raises(UserError, match="the tokenizer has 299 tokens, the model 280 rows"):
            export.export(base, tmp_path / to, adapter=tmp_path / "adapter")


# --- what is said of a model ------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat", "qwen2.5"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fp16_is_warned_of_where_activations_pass_it(name: str, precision: str, tmp_path: Path):
    from glmtune import plan
    from glmtune.run import Run, Source

    folder = published.FAMILIES[name](tmp_path / name)
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(2))
    run = Run(model=str(folder), data=[Source(path=str(data))], out=str(tmp_path / "run"), precision=precision)  # type: ignore[arg-type]
    told = [note for note in plan.make(run).notes if "precision=fp16" in note]
    assert len(told) == (precision == "fp16" and name in ("chatglm3-6b", "glm-4-9b-chat"))
    assert all(note.startswith("warning: ") and "bf16" in note for note in told)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "qwen2.5", "baichuan-7b"])
def test_what_fits_has_every_way_to_pack_a_model(name: str, tmp_path: Path):
    from glmtune import doctor

    folder = published.FAMILIES[name](tmp_path / name)
    found = doctor.fit(str(folder), "8GB")["settings"]
    kinds = {None, "int8", "nf4", *(("chatglm-int8", "chatglm-int4") if name.startswith("chatglm") else ())}
    for method in ("lora", "prefix"):
        assert {row["quant"] for row in found if row["method"] == method} == kinds
    assert {row["quant"] for row in found if row["method"] in ("full", "freeze")} == {None}
    for kind in kinds - {None}:
        assert families.quant_kind(folder, kind) == kind


def test_a_model_published_packed_fits_as_it_is(tmp_path: Path):
    from glmtune import doctor

    folder = configured(published.FAMILIES["chatglm-6b"](tmp_path / "m"), quantization_bit=4)
    for file in ("model.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink(missing_ok=True)
    found = doctor.fit(str(folder), "8GB")["settings"]
    assert {(row["method"], row["quant"]) for row in found} == {
        ("lora", None), ("prefix", None), ("lora", "chatglm-int4"), ("prefix", "chatglm-int4"),
    }  # fmt: skip

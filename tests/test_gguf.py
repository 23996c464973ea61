"""A GGUF file holds the model that was loaded, tensor for tensor and token for token; and llama.cpp, where it is installed, runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from glmtune import cli, families, gguf, load_run, methods, train
from glmtune.chat import Template, jinja_renderer
from glmtune.errors import UserError
from glmtune.export import export
from glmtune.families import smollm2

from . import published, tiny

QUESTION = [{"role": "user", "content": "people like philosophy: 你好，世界！ 1234  x\n\nthe cat"}]
# By hand, from llama.cpp's src/llama-arch.cpp: our name -> theirs.
PLAIN = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def there(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    number, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{PLAIN[rest]}.{leaf}"


def halves(tensor: Tensor, heads: int) -> Tensor:
    """A head's rows back from pairs (0, n/2, 1, n/2 + 1 ...) to halves, one by one."""
    made, width = torch.empty_like(tensor), len(tensor) // heads
    for head in range(heads):
        for i in range(width // 2):
            for half in (0, 1):
                made[head * width + half * width // 2 + i] = tensor[head * width + 2 * i + half]
    return made


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Kind, Tensor]]]:
    """(metadata, tensors as fp32 in torch's order of dimensions)."""
    reader = library.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for t in reader.tensors:
        made = np.array(library.dequantize(t.data, t.tensor_type), dtype=np.float32)
        tensors[t.name] = (t.tensor_type, torch.from_numpy(made).reshape(t.shape.tolist()[::-1]))
    return values, tensors


def random(kind: str, rows: int = 352, **changes: Any) -> Any:
    """A random native model, biases and norms too."""
    sizes = dict(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, initializer_range=0.2, max_position_embeddings=512, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    classes = {
        "glm": (GlmConfig, GlmForCausalLM),
        "glm4": (Glm4Config, Glm4ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    torch.manual_seed(0)
    more = {"attention_bias": True} if kind in ("glm", "glm4") else {}
    if kind == "llama_alibi":
        families.register()
        settings = {key: value for key, value in {**sizes, **changes}.items() if key != "num_key_value_heads"}
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    else:
        config, model_class = classes[kind]
        model = model_class(config(**{**sizes, **more, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """name -> its tiny published folder, made once."""
    root, known = tmp_path_factory.mktemp("published"), {}

    def make(name: str) -> Path:
        if name not in known:
            known[name] = published.FAMILIES[name](root / name)
        return known[name]

    return make


def opened(folder: Path) -> tuple[Any, Template]:
    return families.load_model(folder, dtype="fp32", device="cpu"), families.open_template(folder)


# --- weights ----------------------------------------------------------------------------------------------------------------


def same_tensors(model: Any, path: Path, outtype: str) -> None:
    """Every tensor of the model, and no other, stands in the file: as it is, cast, or within half a step of q8_0."""
    _, tensors = read(path)
    config = model.config
    state = {n: t for n, t in model.state_dict().items() if not (n == "lm_head.weight" and config.tie_word_embeddings)}
    assert {there(name) for name in state} == set(tensors) - {"rope_freqs.weight"}
    for name, tensor in state.items():
        kind, found = tensors[there(name)]
        if config.model_type in ("llama", "mistral"):
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                found = halves(found, heads) if part in name else found
        assert found.shape == tensor.shape, name
        wanted = {
            "f32": Kind.F32,
            "f16": Kind.F16,
            "bf16": Kind.BF16,
            "q8_0": Kind.Q8_0 if tensor.shape[-1] % 32 == 0 else Kind.F16,
        }
        assert kind == (Kind.F32 if tensor.dim() == 1 else wanted[outtype]), name
        if kind == Kind.Q8_0:
            blocks = tensor.float().reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            # Half a step, and what rounding the step itself to f16 moves 127 of them.
            assert ((found.reshape(-1, 32) - blocks).abs() <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), name
        else:
            cast = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
            assert torch.equal(found, tensor.to(cast).float()), name


@pytest.mark.few(1)
@pytest.mark.parametrize("outtype", gguf.OUTTYPES)
def test_weights_come_back(tiny_model: Path, tmp_path: Path, outtype: str):
    path = export(tiny_model, tmp_path / "x.gguf", outtype=outtype)
    same_tensors(families.load_model(tiny_model, dtype="fp32", device="cpu"), path, outtype)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["internlm-chat-7b", "internlm2-chat-7b", "baichuan2-7b-chat", "qwen2.5", "qwen3"])
def test_weights_of_published_families_come_back(made, name: str, tmp_path: Path):
    path = export(made(name), tmp_path / "x.gguf", outtype="f32")
    same_tensors(families.load_model(made(name), dtype="fp32", device="cpu"), path, "f32")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["glm", "glm4", "mistral"])
def test_weights_of_native_classes_come_back(kind: str, tmp_path: Path):
    model = random(kind)
    same_tensors(model, gguf.write(model, None, tmp_path / "x.gguf", name="x", outtype="bf16"), "bf16")


def test_big_matrices_are_cast_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = random("glm")
    whole = gguf.write(model, None, tmp_path / "whole.gguf", name="x", outtype="q8_0").read_bytes()
    monkeypatch.setattr(gguf, "CHUNK", 1000)  # 15 rows of 64 values, 10 of 96: the last part is a smaller one
    assert gguf.write(model, None, tmp_path / "parts.gguf", name="x", outtype="q8_0").read_bytes() == whole


def test_rows_that_q8_0_cannot_hold_stay_f16_and_it_is_said(tiny_model: Path, tmp_path: Path):
    said: list[str] = []
    _, tensors = read(export(tiny_model, tmp_path / "x.gguf", outtype="q8_0", say=said.append))
    assert tensors["blk.0.ffn_down.weight"][0] == Kind.F16  # rows of 48
    assert any("2 matrices stay f16" in line for line in said)


@pytest.mark.slow
def test_an_adapter_is_merged(tiny_model: Path, tmp_path: Path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(8))
    settings = [f"model={tiny_model}", f"data={data}", f"out={tmp_path / 'run'}", "optim.steps=3", "optim.lr=0.05"]
    train(load_run(None, settings))
    path = export(tmp_path / "run", tmp_path / "x.gguf", outtype="f32")
    model = families.load_model(tiny_model, dtype="fp32", device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    methods.prepare(model, torch.float32)
    methods.load(model, tmp_path / "run" / "adapter")
    methods.merge(model)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if name in before)
    same_tensors(model, path, "f32")


# --- settings ---------------------------------------------------------------------------------------------------------------


def test_settings_of_glm(tmp_path: Path):
    model = random(
        "glm", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
    )
    values, _ = read(gguf.write(model, None, tmp_path / "x.gguf", name="a name", outtype="f16"))
    wanted = {
        "general.architecture": "chatglm", "general.name": "a name", "general.file_type": 1, "chatglm.block_count": 2,
        "chatglm.context_length": 512, "chatglm.embedding_length": 64, "chatglm.feed_forward_length": 96, "chatglm.attention.head_count": 4,
        "chatglm.attention.head_count_kv": 2, "chatglm.rope.dimension_count": 8, "chatglm.rope.freq_base": 20000.0,
        "chatglm.rope.scaling.type": "linear", "chatglm.rope.scaling.factor": 4.0, "chatglm.vocab_size": 352,
    }  # fmt: skip
    assert {key: values.get(key) for key in wanted} == wanted
    assert values["chatglm.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_llama3_positions_are_stretched_by_wavelength(tmp_path: Path):
    """Llama 3.1's rule: below original / high a wavelength stays, above original / low it grows by the factor, between it is blended."""
    folder = tiny.llama(tmp_path / "m", rope_parameters=LLAMA3, head_dim=16)
    values, tensors = read(export(folder, tmp_path / "x.gguf", outtype="f32"))
    assert values["llama.rope.dimension_count"] == 16
    factors = []
    for i in range(8):
        wavelength = 2 * np.pi * 10000 ** (2 * i / 16)
        smooth = (64 / wavelength - 1) / (4 - 1)
        factors.append(1 if wavelength < 16 else 8 if wavelength > 64 else 1 / ((1 - smooth) / 8 + smooth))
    assert tensors["rope_freqs.weight"][1].tolist() == pytest.approx(factors, rel=1e-5)


# --- vocabulary -------------------------------------------------------------------------------------------------------------


def test_a_byte_level_vocabulary(tiny_model: Path, tmp_path: Path):
    values, _ = read(export(tiny_model, tmp_path / "x.gguf"))
    tree = json.loads((tiny_model / "tokenizer.json").read_text())
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    names, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == 352  # the rows of the embedding, also those without a token
    assert all(names[id] == text for text, id in tree["model"]["vocab"].items())
    assert types[tree["model"]["vocab"]["<|im_end|>"]] == TokenType.CONTROL and types[-1] == TokenType.UNUSED
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tree["model"]["merges"]]
    assert values["tokenizer.chat_template"] == tiny.CHATML
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.bos_token_id"]) == (2, 1)
    assert values["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    "name, pattern", [("qwen2", r"\p{N}"), ("glm4", r"\p{N}{1,3}"), ("chatglm-bpe", r"\p{N}{1,3}"), ("llama-bpe", r"\p{N}{1,3}")]
)
def test_words_are_cut_as_the_tokenizer_says(name: str, pattern: str):
    expression = families.chatglm.GLM4_PATTERN.replace(r"\p{N}{1,3}", pattern)
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
    tree = {
        "model": {"ignore_merges": name in ("glm4", "llama-bpe")},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
    }

    class Named:
        bos_id = 1 if name == "llama-bpe" else None

    assert gguf._pre(tree, Named) == name  # type: ignore[arg-type]


def test_a_sentencepiece_vocabulary(made, tmp_path: Path):
    """Against the published file: pieces, kinds, and the order of scores."""
    from sentencepiece import SentencePieceProcessor

    folder = made("internlm-chat-7b")
    values, _ = read(export(folder, tmp_path / "x.gguf"))
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names, types, scores = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.add_space_prefix"] is True
    assert names == [pieces.id_to_piece(id) for id in range(pieces.vocab_size())]
    merged = []
    for id in range(pieces.vocab_size()):
        marks = names[id] in ("<eoh>", "<eoa>")  # user-defined in the file, special in the model's chat format
        kind = (
            TokenType.CONTROL if marks or pieces.is_control(id) or pieces.is_unknown(id)
            else TokenType.BYTE if pieces.is_byte(id) else TokenType.NORMAL
        )  # fmt: skip
        assert types[id] == kind, names[id]
        if kind == TokenType.NORMAL and len(names[id]) > 1:
            merged.append(id)
    assert sorted(merged, key=lambda id: -scores[id]) == sorted(merged, key=lambda id: -pieces.get_score(id))
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.eot_token_id"]) == (2, pieces.piece_to_id("<eoa>"))
    assert values["tokenizer.ggml.add_bos_token"] is True


def test_user_defined_pieces_are_what_is_typed(made, tmp_path: Path):
    """Baichuan's <reserved_102> stands in our tokenizer as a private character or a special token, never in the file."""
    names = read(export(made("baichuan-7b"), tmp_path / "x.gguf"))[0]["tokenizer.ggml.tokens"]
    assert "<reserved_102>" in names and not any(ord(char) >= 0xF0000 for name in names for char in name)


def test_marks_that_are_plain_words_get_brackets(made, tmp_path: Path):
    """llama.cpp would find `sop` in "philosophy" and `eop` in "people"."""
    template = families.open_template(made("chatglm3-6b"))
    model = random("glm", template.tokens.vocab_size + 3)
    values, _ = read(gguf.write(model, template, tmp_path / "x.gguf", name="x"))
    names = values["tokenizer.ggml.tokens"]
    assert names[template.tokens.special["sop"]] == "<sop>" and "sop" not in names and "eop" not in names
    assert values["tokenizer.chat_template"] == template.jinja.replace("[gMASK]sop", "[gMASK]<sop>") != template.jinja
    ends = [values[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert ends == [2, template.tokens.special["<|user|>"], template.tokens.special["<|observation|>"]] == template.stop_ids


@pytest.mark.few(1)
@pytest.mark.parametrize("scheme, blank", [("first", False), ("always", True), ("never", False)])
def test_newer_sentencepiece_tokenizers_write_their_blank_where_chats_do(made, tmp_path: Path, scheme: str, blank: bool):
    """`first`: behind `<s>`, with which the chat begins, there is none; llama.cpp knows both places or neither."""
    folder = shutil.copytree(made("internlm2-chat-7b"), tmp_path / "m")
    tokens = families.open_template(folder).tokens
    tree = json.loads(tokens.json)
    tree["normalizer"] = None
    tree["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    config = {**tokens.config, "bos_token": "<s>", "eos_token": "</s>"}
    native = export(folder, tmp_path / "native")
    (native / "tokenizer.json").write_text(json.dumps(tree))
    (native / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    assert read(export(native, tmp_path / "x.gguf"))[0]["tokenizer.ggml.add_space_prefix"] is blank


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, why",
    [
        ("chatglm-6b", "sees the question from both sides"),
        ("baichuan-13b-chat", "40 layers"),
        ("chatglm3-6b", "as wide as the hidden state"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(made, tmp_path: Path, name: str, why: str):
    with pytest.raises(UserError, match=why):
        export(made(name), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "x.gguf"
    for settings, why in {
        ("outtype", "q4_k_m"): "llama-quantize MODEL-f16.gguf MODEL-q4_k_m.gguf Q4_K_M",
        ("outtype", "f61"): "wanted f32, f16, bf16, q8_0; did you mean 'f16'|wanted f32, f16, bf16, q8_0",
        ("dtype", "bf16"): "named by --outtype",
        ("unmerged", True): "named by --outtype",
        ("shard_gb", 1.0): "named by --outtype",
    }.items():
        with pytest.raises(UserError, match=why):
            export(tiny_model, path, **dict([settings]))
    with pytest.raises(UserError, match="give --to NAME.gguf"):
        export(tiny_model, tmp_path / "folder", outtype="f16")
    path.write_text("mine")
    with pytest.raises(UserError, match="never overwritten"):
        export(tiny_model, path)
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_things_without_a_place_are_named(tmp_path: Path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    with pytest.raises(UserError, match="positions of the kind yarn"):
        gguf.check(random("mistral", rope_parameters=yarn))
    folder = published.qwen(tmp_path / "qwen", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**{**config, "attention_bias": True}))
    with pytest.raises(UserError, match=r"2 things.*layers\.0\.self_attn\.o_proj\.bias"):
        gguf.check(model)
    with pytest.raises(UserError, match="with silu only; this one has gelu"):
        gguf.check(random("mistral", hidden_act="gelu"))


def test_numbers_that_f16_cannot_hold_are_refused_and_nothing_stays_behind(tmp_path: Path):
    model = random("glm")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 1e5
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.weight holds numbers beyond"):
        gguf.write(model, None, tmp_path / "x.gguf", name="x", outtype="f16")
    assert list(tmp_path.iterdir()) == []
    assert gguf.write(model, None, tmp_path / "x.gguf", name="x", outtype="bf16").is_file()


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tiny_model: Path, made, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    tree = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tree["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"cuts words \(Digits \+ ByteLevel\)"):
        export(folder, tmp_path / "x.gguf")
    with pytest.raises(UserError, match="kind Unigram"):
        template = families.open_template(made("chatglm-6b"))
        gguf.write(random("glm", 1000), template, tmp_path / "x.gguf", name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_is_seen_before(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10_000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="0.00 GB are free"):
        export(tiny_model, tmp_path / "x.gguf")


def test_a_file_that_does_not_read_back_is_noticed(tmp_path: Path):
    path = gguf.write(random("glm"), None, tmp_path / "x.gguf", name="x", outtype="f32")
    tensors = {t.name: (t.shape.tolist()[::-1], t.tensor_type, gguf._digest(t.data)) for t in library.GGUFReader(path).tensors}
    gguf._compare(path, tensors)
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x01")
    with pytest.raises(OSError, match="does not read back"):
        gguf._compare(path, tensors)


def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.export(str(tiny_model), tmp_path / "x.gguf", outtype="q8_0", json_=True)
    said = json.loads(capsys.readouterr().out)
    assert said == {"to": str(tmp_path / "x.gguf"), "bytes": (tmp_path / "x.gguf").stat().st_size, "files": ["x.gguf"]}


# --- in llama.cpp -------------------------------------------------------------------------------------------------------------


class Cpp:
    """A file in llama.cpp, on one thread. Keys and values are kept in fp32 unless told otherwise."""

    def __init__(self, path: Path, kept: int = 0):
        llama_cpp = pytest.importorskip("llama_cpp", reason="the extra `llama` is not installed")
        self.last = llama_cpp.llama_get_logits_ith
        self.model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, type_k=kept, type_v=kept)

    def ids(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def after(self, ids: list[int]) -> np.ndarray:
        """Logits after these further tokens: [rows]."""
        self.model.eval(ids)
        return np.array(np.ctypeslib.as_array(self.last(self.model._ctx.ctx, -1), (self.model.n_vocab(),)))

    def logits(self, ids: list[int]) -> np.ndarray:
        self.model.reset()
        return np.stack([self.after([id]) for id in ids])

    def chat(self, messages: list[dict[str, str]], tokens: Any) -> list[int]:
        """Ids of the file's own chat format."""
        names = {key: tokens.name(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return self.ids(jinja_renderer(self.model.metadata["tokenizer.chat_template"], names)(messages, add_generation_prompt=True))


def agrees(path: Path, model: Any, template: Template | None, texts: list[str]) -> None:
    """Prompts have the same ids, and every position the same logits up to fp32's rounding."""
    cpp = Cpp(path)
    ids = list(range(5, 45))
    for text in texts if template else []:
        messages = [{"role": "user", "content": text}]
        ids = template.prompt(messages)  # type: ignore[union-attr]
        assert cpp.chat(messages, template.tokens) == ids  # type: ignore[union-attr]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(cpp.logits(ids) - wanted).max() < 5e-6 * np.abs(wanted).max()


TEXTS = [
    "def f(x):\n\treturn x**2   # eop sop\n", "  leading blanks", "emoji 😀 é ñ ß 한국어 العربية", "don't DON'T I'll we've 12345 3.14",
    "\n\n\nx", "trailing  ", QUESTION[0]["content"],
]  # fmt: skip
RUN = ["internlm-chat-7b", "internlm2-chat-7b", "baichuan-7b", "baichuan2-7b-chat", "llama-2-7b-chat", "qwen2.5", "qwen3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_llama_cpp_runs_published_families(made, tmp_path: Path, name: str):
    path = export(made(name), tmp_path / "x.gguf", outtype="f32")
    agrees(path, *opened(made(name)), TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind", [("chatglm2-6b", "glm"), ("chatglm3-6b", "glm"), ("glm-4-9b-chat", "glm"), ("glm-4-9b-chat", "glm4")]
)
def test_llama_cpp_runs_glm(made, tmp_path: Path, name: str, kind: str):
    template = families.open_template(made(name))
    model = random(kind, template.tokens.vocab_size + 7)
    agrees(gguf.write(model, template, tmp_path / "x.gguf", name=name, outtype="f32"), model, template, TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
def test_llama_cpp_cuts_texts_as_the_published_tokenizers(shared: Path, tmp_path: Path, name: str):
    folder = shared / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("the published tokenizers are not beside the project")
    template = families.open_template(folder)
    rows = json.loads((shared / "data" / "alpaca_zh.json").read_text())[:40]
    model = random("glm", template.tokens.vocab_size + 7)
    path = gguf.write(model, template, tmp_path / "x.gguf", name=name, outtype="f16")
    agrees_on = [*TEXTS, *(row["instruction"] + "\n" + row["output"] for row in rows)]
    cpp = Cpp(path)
    for text in agrees_on:
        assert cpp.chat([{"role": "user", "content": text}], template.tokens) == template.prompt(
            [{"role": "user", "content": text}]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4", "others/internlm", "others/baichuan7b"])
def test_llama_cpp_runs_the_recorded_references(shared: Path, tmp_path: Path, name: str):
    folder = shared / "goldens" / name
    if not folder.is_dir():
        pytest.skip("the recorded references are not beside the project")
    path = export(folder, tmp_path / "x.gguf", outtype="f32")
    agrees(path, families.load_model(folder, dtype="fp32", device="cpu"), None, [])


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 6])  # the slopes of 6 heads are those of 4 and two of 8
def test_llama_cpp_runs_alibi(tmp_path: Path, heads: int):
    model = random("llama_alibi", num_hidden_layers=40, hidden_size=16 * heads, num_attention_heads=heads, initializer_range=0.05)
    agrees(gguf.write(model, None, tmp_path / "x.gguf", name="x", outtype="f32"), model, None, [])


@pytest.mark.slow
@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}])
def test_llama_cpp_stretches_positions(tmp_path: Path, rope: dict[str, Any]):
    folder = tiny.llama(tmp_path / "m", rope_parameters=rope, head_dim=16)
    agrees(export(folder, tmp_path / "x.gguf", outtype="f32"), *opened(folder), TEXTS)


QUESTIONS = [
    "What is the capital of France?", "Write a short poem about the sea.", "List three fruits.", "你好，今天天气怎么样？", "Who wrote Hamlet?",
    "Explain gravity to a child.", "def add(a, b):\n    return a + b  # 1234567890\n\nWhat does this do?", "Translate to French: I am happy.",
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many clips in all?",
    "Why is the sky blue?  Answer in one sentence.\n",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("outtype, unsure", [("f32", 0.0), ("f16", 0.1), ("bf16", 0.6)])
def test_llama_cpp_writes_what_the_real_model_writes(tmp_path: Path, outtype: str, unsure: float):
    """32 greedy tokens on 10 questions. In f32 they are equal; with 16 bits, where llama.cpp rounds weights and activations too, up to
    a place where the two best logits are closer than that rounding moves them (`unsure`)."""
    if not (smollm2.cache_root() / smollm2.NAME).is_dir():
        pytest.skip("the embedded model is not in the cache")
    model, template = opened(smollm2.folder())
    cpp = Cpp(export(smollm2.NAME, tmp_path / "x.gguf", outtype=outtype), kept=int(outtype != "f32"))
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = template.prompt(messages)
        assert cpp.chat(messages, template.tokens) == ids
        given = torch.tensor([ids])
        out: Any = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False, temperature=None, top_p=None, eos_token_id=[],
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        cpp.model.reset()
        step = ids
        for wanted, logits in zip(out.sequences[0, len(ids) :].tolist(), out.logits, strict=True):
            step = [int(cpp.after(step).argmax())]
            if step != [wanted]:
                best, second = logits[0].topk(2).values.tolist()
                assert best - second < unsure, question
                break

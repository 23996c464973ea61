"""Tiny random checkpoints of every family, in the layout in which the real ones were published: config.json with its auto_map, weights
under the published names, tokenizer.model and its neighbours. Made on the spot in about a second each; nothing is committed.

    python -m tests.published FOLDER        writes all of them
"""

import base64
import functools
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = [
    "The cat sat on the mat, and the user said: the answer is in the sea.",
    "今天天气很好，我们去公园散步吧。你好，世界！请问图书馆怎么走？",
    "def add(a, b):\n    return a + b  # 1234567890",
    "问：你是谁？答：我是一个助手。Round 1, instruction and response.",
]
BYTES = 256
EVIL = "import pathlib\npathlib.Path(r'{marker}').write_text('ran')\n"


def sentencepiece(kind: str, size: int, **options: Any) -> bytes:
    return _sentencepiece(kind, size, json.dumps(options, sort_keys=True))


@functools.cache
def _sentencepiece(kind: str, size: int, options: str) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_writer=out, model_type=kind, vocab_size=size, byte_fallback=True, character_coverage=1.0,
        split_digits=True, hard_vocab_limit=False, minloglevel=2, **json.loads(options),
    )  # fmt: skip
    return out.getvalue()


def pieces(model: bytes) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()


def chatglm_sp() -> bytes:
    return sentencepiece("bpe", 420, normalization_rule_name="identity", remove_extra_whitespaces=False)


def llama_sp(**more: Any) -> bytes:
    return sentencepiece("bpe", 420, normalization_rule_name="identity", remove_extra_whitespaces=False, **more)


def chatglm1_sp() -> bytes:
    control = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    user = ["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    return sentencepiece("unigram", 520, pad_id=3, control_symbols=control, user_defined_symbols=user)


def tiktoken() -> str:
    """All bytes and a few merges, as GLM-4's tokenizer.model lists them: base64 and rank."""
    ranks = [bytes([i]) for i in range(BYTES)]
    for word in ("th", "the", " the", " c", " ca", " cat", "in", "ing", "\u4f60".encode()[:2], "你", "好", "\n\n"):
        ranks.append(word.encode() if isinstance(word, str) else word)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(dict.fromkeys(ranks)))


class Writer:
    """One checkpoint in the making: random weights under published names, then the files."""

    def __init__(self, folder: Path, seed: int = 0):
        import torch

        self.folder, self.tensors, self.torch = folder, {}, torch
        self.generator = torch.Generator().manual_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)

    def matrix(self, name: str, *shape: int, scale: float = 0.15) -> None:
        self.tensors[name] = self.torch.randn(*shape, generator=self.generator) * scale

    def norm(self, name: str, width: int) -> None:
        self.tensors[name] = 1 + 0.1 * self.torch.randn(width, generator=self.generator)

    def text(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1))

    def finish(self, config: dict[str, Any], dtype: str = "float32", shards: int = 1, form: str = "safetensors") -> Path:
        """shards, form: how the weights are laid down (`bin` is torch's zip format, `old` the one before 1.6)."""
        from safetensors.torch import save_file

        self.text("config.json", {**config, "torch_dtype": dtype})
        tensors = {n: t.to(getattr(self.torch, dtype)) if t.is_floating_point() else t for n, t in self.tensors.items()}
        stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
        names = list(tensors)
        parts = [names[i::shards] for i in range(shards)]
        for i, part in enumerate(parts):
            path = self.folder / (f"{stem}{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}")
            chosen = {name: tensors[name].contiguous() for name in part}
            if form == "safetensors":
                save_file(chosen, path)
            else:
                self.torch.save(chosen, path, _use_new_zipfile_serialization=form == "bin")
        if shards > 1:
            where = {n: f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}" for i, part in enumerate(parts) for n in part}
            self.text(f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": where})
        return self.folder


def auto_map(writer: Writer, *names: str) -> dict[str, str]:
    """An auto_map whose Python file leaves a marker when anything runs it."""
    marker = writer.folder / "RAN"
    writer.text("modeling_evil.py", EVIL.format(marker=marker) + "".join(f"class {name}: pass\n" for name in names))
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    return dict.fromkeys(kinds, f"modeling_evil.{names[0]}")


def chatglm1(folder: Path, offset: int = 0, **how: Any) -> Path:
    """ChatGLM-6B. offset 20000 is the layout of the first weeks, with 20,000 picture tokens before the text (here: fewer)."""
    import sentencepiece as spm

    w, d, inner, layers = Writer(folder), 32, 64, 2
    model = chatglm1_sp()
    sp = spm.SentencePieceProcessor(model_proto=model)
    vocab = sp.vocab_size() + offset + 8
    (folder / "ice_text.model").write_bytes(model)
    w.matrix("transformer.word_embeddings.weight", vocab, d, scale=0.5)
    for i in range(layers):
        at = f"transformer.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            w.norm(at + name + ".weight", d)
            w.matrix(at + name + ".bias", d)
        w.tensors[at + "attention.rotary_emb.inv_freq"] = w.torch.ones(2)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * d, d), ("attention.dense", d, d), ("mlp.dense_h_to_4h", inner, d), ("mlp.dense_4h_to_h", d, inner),
        ):  # fmt: skip
            w.matrix(at + name + ".weight", rows, columns)
            w.matrix(at + name + ".bias", rows)
    w.norm("transformer.final_layernorm.weight", d)
    w.matrix("transformer.final_layernorm.bias", d)
    w.tensors["lm_head.weight"] = w.tensors["transformer.word_embeddings.weight"].clone()
    ids = {name: sp.piece_to_id(name) + offset for name in ("[MASK]", "[gMASK]", "<sop>", "<eop>")}
    w.text("tokenizer_config.json", {"name_or_path": "THUDM/chatglm-6b", "num_image_tokens": offset})
    config = {
        "_name_or_path": "THUDM/chatglm-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
        "auto_map": auto_map(w, "ChatGLMForConditionalGeneration"), "hidden_size": d, "inner_hidden_size": inner, "num_layers": layers,
        "num_attention_heads": 4, "vocab_size": vocab, "max_sequence_length": 512, "position_encoding_2d": True, "layernorm_epsilon": 1e-5,
        "mask_token_id": ids["[MASK]"], "gmask_token_id": ids["[gMASK]"], "bos_token_id": ids["<sop>"], "eos_token_id": ids["<eop>"],
        "pad_token_id": sp.pad_id() + offset, "use_cache": True,
    }  # fmt: skip
    return w.finish(config, **how)


def glm(folder: Path, name: str, **how: Any) -> Path:
    """ChatGLM2, ChatGLM3 or GLM-4 (remote form), with the published name `name`."""
    w, d, inner, layers, heads, groups, width = Writer(folder), 32, 48, 2, 4, 2, 12
    if "glm-4" in name:
        listed = tiktoken()
        w.text("tokenizer.model", listed)
        ranks = listed.count("\n")
        special = [
            "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
        ]  # fmt: skip
        added = {str(ranks + i): {"content": token, "special": True} for i, token in enumerate(special)}
        w.text("tokenizer_config.json", {"added_tokens_decoder": added, "auto_map": {"AutoTokenizer": ["modeling_evil.X", None]}})
        size, eos, pad = ranks + len(special), [ranks, ranks + 7, ranks + 9], ranks
    else:
        model = chatglm_sp()
        (folder / "tokenizer.model").write_bytes(model)
        w.text("tokenizer_config.json", {"name_or_path": name, "auto_map": {"AutoTokenizer": ["modeling_evil.X", None]}})
        size, eos, pad = pieces(model) + 9, 2, 0
    vocab = size + 5
    w.matrix("transformer.embedding.word_embeddings.weight", vocab, d, scale=0.5)
    w.tensors["transformer.rotary_pos_emb.inv_freq"] = w.torch.ones(width // 4)
    for i in range(layers):
        at = f"transformer.encoder.layers.{i}."
        w.norm(at + "input_layernorm.weight", d)
        w.norm(at + "post_attention_layernorm.weight", d)
        rows = (heads + 2 * groups) * width
        w.matrix(at + "self_attention.query_key_value.weight", rows, d)
        w.matrix(at + "self_attention.query_key_value.bias", rows)
        w.matrix(at + "self_attention.dense.weight", d, heads * width)
        w.matrix(at + "mlp.dense_h_to_4h.weight", 2 * inner, d)
        w.matrix(at + "mlp.dense_4h_to_h.weight", d, inner)
    w.norm("transformer.encoder.final_layernorm.weight", d)
    w.matrix("transformer.output_layer.weight", vocab, d)
    config = {
        "_name_or_path": name, "model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": auto_map(w, "ChatGLMModel"),
        "add_bias_linear": False, "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False,
        "rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True, "multi_query_group_num": groups, "kv_channels": width,
        "hidden_size": d, "ffn_hidden_size": inner, "num_layers": layers, "num_attention_heads": heads, "padded_vocab_size": vocab,
        "layernorm_epsilon": 1e-5, "seq_length": 512, "tie_word_embeddings": False, "eos_token_id": eos, "pad_token_id": pad,
        **({"rope_ratio": 500} if "glm-4" in name else {}),
    }  # fmt: skip
    return w.finish(config, **how)


def big_glm(folder: Path, **how: Any) -> Path:
    """About 90 MB in half precision, so that memory can be measured; no tokenizer."""
    w, d, inner, layers, vocab = Writer(folder), 512, 1536, 12, 8000
    zeros = lambda *shape: w.torch.full(shape, 0.01)  # noqa: E731
    w.tensors["transformer.embedding.word_embeddings.weight"] = zeros(vocab, d)
    w.tensors["transformer.output_layer.weight"] = zeros(vocab, d)
    w.tensors["transformer.encoder.final_layernorm.weight"] = zeros(d)
    for i in range(layers):
        at = f"transformer.encoder.layers.{i}."
        for name, *shape in (
            ("input_layernorm.weight", d), ("post_attention_layernorm.weight", d), ("self_attention.query_key_value.weight", d + 256, d),
            ("self_attention.query_key_value.bias", d + 256), ("self_attention.dense.weight", d, d), ("mlp.dense_h_to_4h.weight", 2 * inner, d),
            ("mlp.dense_4h_to_h.weight", d, inner),
        ):  # fmt: skip
            w.tensors[at + name] = zeros(*shape)
    config = {
        "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "add_qkv_bias": True, "multi_query_attention": True,
        "multi_query_group_num": 2, "kv_channels": 64, "hidden_size": d, "ffn_hidden_size": inner, "num_layers": layers,
        "num_attention_heads": 8, "padded_vocab_size": vocab, "layernorm_epsilon": 1e-5, "seq_length": 512,
    }  # fmt: skip
    return w.finish(config, **how)


def llama_like(
    folder: Path,
    config: dict[str, Any],
    model: bytes,
    *,
    fused: bool = False,
    bias: bool = False,
    extra: int = 0,
    d: int = 32,
    **how: Any,
) -> Path:
    """The layout of Llama, InternLM and Baichuan (`fused`: q, k and v in one W_pack)."""
    w, inner, layers = Writer(folder), 48, 2
    (folder / "tokenizer.model").write_bytes(model)
    vocab = pieces(model) + extra
    w.matrix("model.embed_tokens.weight", vocab, d, scale=0.5)
    for i in range(layers):
        at = f"model.layers.{i}."
        names = [("self_attn.W_pack", 3 * d, d)] if fused else [(f"self_attn.{x}_proj", d, d) for x in "qkv"]
        names += [("self_attn.o_proj", d, d)]
        for name, rows, columns in names:
            w.matrix(f"{at}{name}.weight", rows, columns)
            if bias:
                w.matrix(f"{at}{name}.bias", rows)
        for name, rows, columns in (("gate_proj", inner, d), ("up_proj", inner, d), ("down_proj", d, inner)):
            w.matrix(f"{at}mlp.{name}.weight", rows, columns)
        w.norm(at + "input_layernorm.weight", d)
        w.norm(at + "post_attention_layernorm.weight", d)
        if config["model_type"] == "internlm":
            w.tensors[at + "self_attn.rotary_emb.inv_freq"] = w.torch.ones(4)
    w.norm("model.norm.weight", d)
    w.matrix("lm_head.weight", vocab, d)
    sizes = {
        "hidden_size": d, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": vocab,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "use_cache": True,
    }  # fmt: skip
    if config["model_type"] != "llama":
        sizes["auto_map"] = auto_map(w, "Model")
    w.text("tokenizer_config.json", {"add_bos_token": config["model_type"] != "baichuan", "add_eos_token": False})
    return w.finish({**sizes, **config}, **how)


def internlm2(folder: Path, **how: Any) -> Path:
    w, d, inner, layers, heads, groups, width = Writer(folder), 32, 48, 2, 4, 2, 8
    model = llama_sp(user_defined_symbols=["<|im_start|>", "<|im_end|>"])
    (folder / "tokenizer.model").write_bytes(model)
    vocab = pieces(model)
    w.matrix("model.tok_embeddings.weight", vocab, d, scale=0.5)
    for i in range(layers):
        at = f"model.layers.{i}."
        w.matrix(at + "attention.wqkv.weight", (heads + 2 * groups) * width, d)
        w.matrix(at + "attention.wo.weight", d, d)
        w.matrix(at + "feed_forward.w1.weight", inner, d)
        w.matrix(at + "feed_forward.w3.weight", inner, d)
        w.matrix(at + "feed_forward.w2.weight", d, inner)
        w.norm(at + "attention_norm.weight", d)
        w.norm(at + "ffn_norm.weight", d)
    w.norm("model.norm.weight", d)
    w.matrix("output.weight", vocab, d)
    import sentencepiece as spm

    ids = spm.SentencePieceProcessor(model_proto=model)
    added = {str(ids.piece_to_id(t)): {"content": t, "special": True} for t in ("<|im_start|>", "<|im_end|>")}
    w.text("tokenizer_config.json", {"added_tokens_decoder": added})
    config = {
        "_name_or_path": "internlm/internlm2-chat-7b", "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"],
        "auto_map": auto_map(w, "InternLM2ForCausalLM"), "hidden_size": d, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "bias": False, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    return w.finish(config, **how)


def qwen(folder: Path, kind: str) -> Path:
    """A family that transformers knows, in its own layout: Qwen2.5 or Qwen3, with a chat format of its own."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from . import tiny

    tiny.tokenizer(folder)
    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=352, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    made: Any = model(config(**sizes, max_position_embeddings=512, eos_token_id=2, pad_token_id=0, head_dim=8))
    made.save_pretrained(folder)
    return folder


def _internlm(folder: Path, **how: Any) -> Path:
    config = {"_name_or_path": "internlm/internlm-chat-7b", "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True,
              "max_position_embeddings": 512}  # fmt: skip
    return llama_like(folder, config, llama_sp(user_defined_symbols=["<eoh>", "<eoa>"]), bias=True, **how)


def _baichuan(folder: Path, second: bool, alibi: bool, **how: Any) -> Path:
    marks = ("<reserved_106>", "<reserved_107>") if second else ("<reserved_102>", "<reserved_103>")
    model = llama_sp(user_defined_symbols=[*marks], add_dummy_prefix=False)
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_proto=model)
    name = f"baichuan-inc/Baichuan{'2' if second else ''}-{'13B' if alibi else '7B'}-Chat"
    config = {
        "_name_or_path": name,
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM" if alibi else "BaiChuanForCausalLM"],
    }
    config |= {"model_max_length": 512} if alibi else {"max_position_embeddings": 512}
    config |= {"z_loss_weight": 0} if second else {}
    llama_like(folder, config, model, fused=True, **how)
    chosen = {"user_token_id": sp.piece_to_id(marks[0]), "assistant_token_id": sp.piece_to_id(marks[1])}
    (folder / "generation_config.json").write_text(json.dumps({**chosen, "eos_token_id": 2, "pad_token_id": 0}))
    return folder


def _llama2(folder: Path, **how: Any) -> Path:
    config = {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "model_type": "llama", "architectures": ["LlamaForCausalLM"],
              "max_position_embeddings": 512}  # fmt: skip
    model = llama_sp()
    return llama_like(folder, config, model, extra=32000 - pieces(model), d=8, dtype="float16", **how)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "chatglm-6b": chatglm1,
    "chatglm-6b-early": lambda folder: chatglm1(folder, offset=50),
    "chatglm2-6b": lambda folder: glm(folder, "THUDM/chatglm2-6b"),
    "chatglm3-6b": lambda folder: glm(folder, "THUDM/chatglm3-6b", shards=2, form="bin"),
    "glm-4-9b-chat": lambda folder: glm(folder, "THUDM/glm-4-9b-chat", shards=3),
    "internlm-chat-7b": _internlm,
    "internlm2-chat-7b": internlm2,
    "baichuan-7b": lambda folder: _baichuan(folder, second=False, alibi=False, form="bin"),
    "baichuan2-7b-chat": lambda folder: _baichuan(folder, second=True, alibi=False),
    "baichuan-13b-chat": lambda folder: _baichuan(folder, second=False, alibi=True),
    "baichuan2-13b-chat": lambda folder: _baichuan(folder, second=True, alibi=True, shards=2),
    "llama-2-7b-chat": _llama2,
    "qwen2.5": lambda folder: qwen(folder, "qwen2"),
    "qwen3": lambda folder: qwen(folder, "qwen3"),
}

if __name__ == "__main__":
    for name, make in FAMILIES.items():
        made = make(Path(sys.argv[1]) / name)
        print(made, sum(path.stat().st_size for path in made.iterdir()), "bytes")

"""A loaded model as one GGUF file, for llama.cpp: weights, settings, vocabulary and chat format.

Source: the GGUF format (ggml-org/ggml, docs/gguf.md), the names in gguf-py (constants.py, tensor_mapping.py), and what llama.cpp does
with them (src/models, src/llama-vocab.cpp). What it cannot run as the model computes, or cut into the tokens that were trained, is
refused; small differences are said.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType, TokenType
from torch import Tensor

from . import estimate
from .chat import Template, Tokens
from .errors import UserError, did_you_mean
from .files import DiskError

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Runs:
    """How llama.cpp runs a native model. pairs: it rotates neighbouring values of a head together, where the native class rotates
    the halves; so the rows of q and k are put in that order. biased: the layers that may have a bias. square: its attention is as
    wide as the hidden state."""

    arch: gguf.MODEL_ARCH
    pairs: bool = False
    biased: tuple[str, ...] = QKV
    square: bool = False


_LLAMA = Runs(gguf.MODEL_ARCH.LLAMA, pairs=True, biased=(*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"))
FAMILIES: dict[str, Runs] = {  # by the native model_type
    "llama": _LLAMA,  # InternLM 1, 2 and 3 and Baichuan-7B too, once they are read
    "mistral": _LLAMA,
    "qwen2": Runs(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Runs(gguf.MODEL_ARCH.QWEN3),
    "glm": Runs(gguf.MODEL_ARCH.CHATGLM, square=True),  # ChatGLM2, ChatGLM3, GLM-4-9B; both rotate neighbours
    "glm4": Runs(gguf.MODEL_ARCH.GLM4),
    "llama_alibi": Runs(gguf.MODEL_ARCH.BAICHUAN, square=True),  # Baichuan-13B: no rotary
}
ALIBI_LAYERS = 40  # llama.cpp knows Baichuan-13B, and so its ALiBi, by this number alone

OUTTYPES: dict[str, tuple[Kind, LlamaFileType]] = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
CHUNK = 1 << 24  # values that are cast at a time

# How words are cut, by the regular expression in tokenizer.json: llama.cpp's name where whole words are tokens whatever their merges
# say (ignore_merges), and where not.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS: dict[str, tuple[str | None, str | None]] = {
    _WORDS % "{1,3}": ("llama-bpe", "chatglm-bpe"),
    _WORDS % "": (None, "qwen2"),
}
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def check_outtype(outtype: str) -> None:
    """Raises UserError for a type that is not written here, with what to do."""
    if outtype in OUTTYPES:
        return
    if re.fullmatch(r"i?q\d\w*", outtype):
        raise UserError(
            f"--outtype {outtype}: only {', '.join(OUTTYPES)} are written here; write f16, then let llama.cpp quantise the file:\n"
            f"  llama-quantize MODEL-f16.gguf MODEL-{outtype}.gguf {outtype.upper()}"
        )
    raise UserError(f"--outtype {outtype}: wanted {', '.join(OUTTYPES)}{did_you_mean(outtype, list(OUTTYPES))}")


def check(model: Any) -> None:
    """Raises UserError for a native model that llama.cpp does not run as its class computes; one on the meta device is enough."""
    _tensors(model, _known(model))


def write(
    model: Any,
    template: Template | None,
    to: Path,
    *,
    name: str,
    outtype: str = "f16",
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the GGUF file `to`: a native model whose adapter, if any, is merged, and the template it was trained with.

    Matrices are stored as `outtype` (f32, f16, bf16, q8_0), vectors as f32. Written tensor by tensor under another name and read back
    before it gets its own. Without a template the file has no vocabulary. Raises UserError: what llama.cpp does not run, no room.
    """
    check_outtype(outtype)
    kind, file_type = OUTTYPES[outtype]
    runs = _known(model)
    tensors = _tensors(model, runs)
    kinds = {key: _kind(tensor, kind) for key, (tensor, _) in tensors.items()}
    sizes = {key: gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[key]) for key, (tensor, _) in tensors.items()}
    estimate.refuse_room(to, sum(int(np.prod(size)) for size in sizes.values()) + 20e6)
    whole = sum(found == Kind.F16 for found in kinds.values()) if kind == Kind.Q8_0 else 0
    if whole:
        say(f"{whole} matrices stay f16: their rows are not a multiple of 32 values, which {outtype} needs")

    part = to.with_name(f".{to.name}.part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[runs.arch])
    try:
        writer.add_name(name)
        writer.add_file_type(file_type)
        _add_settings(writer, model, say)
        _add_vocabulary(writer, template, model.config.to_dict(), say)
        for key, size in sizes.items():
            writer.add_tensor_info(key, size, np.dtype(np.uint8), int(np.prod(size)), kinds[key])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests = {}
        for key, (tensor, heads) in tensors.items():
            data = _cast(key, tensor, heads, kinds[key], sizes[key])
            writer.write_tensor_data(data)
            digests[key] = _digest(data)
        writer.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        _compare(part, {key: (list(tensor.shape), kinds[key], digests[key]) for key, (tensor, _) in tensors.items()})
        part.replace(to)
    except OSError as error:
        raise DiskError(to, error) from None
    finally:
        with contextlib.suppress(OSError):  # it tries once more to write what is left
            writer.close()
        part.unlink(missing_ok=True)
    return to


# --- what llama.cpp runs ------------------------------------------------------------------------------------------------------


def _known(model: Any) -> Runs:
    """The row of FAMILIES. Raises UserError for a model that llama.cpp does not run as its class computes."""
    config = model.config.to_dict()
    runs = FAMILIES.get(config["model_type"])
    folder = "export a folder (--to FOLDER) and serve that"
    if config["model_type"] == "chatglm1":
        raise UserError(
            f"llama.cpp cannot run ChatGLM-6B: it sees the question from both sides and has positions of two dimensions; {folder}"
        )
    if runs is None:
        raise UserError(
            f"a GGUF can be written of {', '.join(FAMILIES)}, not of {config['model_type']}; {folder}, or try llama.cpp's convert_hf_to_gguf.py on it"
        )
    if config["model_type"] == "llama_alibi" and config["num_hidden_layers"] != ALIBI_LAYERS:
        raise UserError(
            f"llama.cpp knows Baichuan-13B by its {ALIBI_LAYERS} layers; with {config['num_hidden_layers']} it would leave out ALiBi; {folder}"
        )
    if config["hidden_act"] != "silu":
        raise UserError(f"llama.cpp runs {config['model_type']} with silu only; this one has {config['hidden_act']}; {folder}")
    inside = config["num_attention_heads"] * _head(model)
    if runs.square and inside != config["hidden_size"]:
        raise UserError(
            f"llama.cpp wants attention as wide as the hidden state ({config['hidden_size']}); this model's is {inside}; {folder}"
        )
    return runs


def _head(model: Any) -> int:
    """Width of one attention head."""
    return model.model.layers[0].self_attn.q_proj.weight.shape[0] // model.config.num_attention_heads


def _add_settings(writer: gguf.GGUFWriter, model: Any, say: Callable[[str], None]) -> None:
    config, head = model.config.to_dict(), _head(model)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "llama_alibi":
        writer.add_rope_dimension_count(head)  # it asks for the number, and rotates nothing
        return
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(2 * len(model.model.rotary_emb.inv_freq))
    writer.add_rope_freq_base(rope["rope_theta"])
    longest = config["max_position_embeddings"]
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "dynamic":
        say(f"note: beyond {longest} tokens this model stretches its positions, llama.cpp does not; up to there they are equal")
    window = config.get("sliding_window")
    if window and window < longest and config.get("use_sliding_window", True):
        say(f"note: this model looks back {window} tokens, in llama.cpp all the way; texts up to {window} tokens are equal")


def _tensors(model: Any, runs: Runs) -> dict[str, tuple[Tensor, int]]:
    """GGUF names -> (native tensor, heads whose rows are to be put in pairs; 0: rows as they are), in the order of the file.

    Raises UserError for tensors that llama.cpp has no place for, all of them listed.
    """
    config = model.config.to_dict()
    names = gguf.get_tensor_name_map(runs.arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"]}
    found, strange = {}, []
    tied = (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )  # llama.cpp then takes the embeddings for the head
    for native, tensor in model.state_dict().items():
        if native == "lm_head.weight" and tied:
            continue
        module, _, leaf = native.rpartition(".")
        layer = module.split(".")[-1]
        name = names.get_name(module)
        if (
            name is None
            or leaf not in ("weight", "bias")
            or (leaf == "bias" and layer not in runs.biased)
            or not tensor.is_floating_point()
        ):
            strange.append(native)
        else:
            found[f"{name}.{leaf}"] = (tensor, heads.get(layer, 0) if runs.pairs else 0)
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind == "llama3" and runs.arch == gguf.MODEL_ARCH.LLAMA:
        found["rope_freqs.weight"] = (_stretch(model.model.rotary_emb.inv_freq, rope["rope_theta"]), 0)
    elif config["model_type"] != "llama_alibi" and kind not in ("default", "linear", "dynamic"):
        strange.append(f"positions of the kind {kind}")
    if strange:
        raise UserError(
            f"llama.cpp's {config['model_type']} has no place for {len(strange)} things of this model: {', '.join(strange[:6])}"
            f"{' ...' if len(strange) > 6 else ''}; export a folder (--to FOLDER) instead; a quantised model from its 16-bit weights"
        )
    return found


def _stretch(inverse: Tensor, theta: float) -> Tensor:
    """By how much each of the n/2 rotary frequencies is slower than theta^(-2i/n): Llama 3.1's, as llama.cpp wants them."""
    exponents = torch.arange(len(inverse), dtype=torch.float64, device=inverse.device) / len(inverse)
    return (theta**-exponents / inverse.double()).float()


# --- numbers ------------------------------------------------------------------------------------------------------------------


def _kind(tensor: Tensor, wanted: Kind) -> Kind:
    if tensor.dim() == 1:
        return Kind.F32
    return Kind.F16 if wanted == Kind.Q8_0 and tensor.shape[-1] % 32 else wanted


def _cast(name: str, tensor: Tensor, heads: int, kind: Kind, size: tuple[int, ...]) -> np.ndarray:
    """The bytes of one tensor, cast some rows at a time: [rows, bytes of a row], or [bytes] for a vector."""
    tensor = tensor.detach()
    if heads:
        tensor = in_pairs(tensor, heads)
    if tensor.dim() == 1:
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite")
        return np.ascontiguousarray(tensor.float().cpu().numpy()).view(np.uint8)
    data = np.empty(size, np.uint8)
    step = max(1, CHUNK // tensor.shape[-1])
    for start in range(0, len(tensor), step):
        rows = np.ascontiguousarray(tensor[start : start + step].float().cpu().numpy())
        with np.errstate(over="ignore"):  # looked for just below
            made = gguf.quants.quantize(rows, kind)
        if not np.isfinite(made if kind == Kind.F16 else rows).all():
            raise UserError(
                f"{name} holds numbers beyond what f16 can (65504), or what is no number at all; use --outtype bf16 or f32"
            )
        data[start : start + step] = made.view(np.uint8)
    return data


def in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head in the order 0, n/2, 1, n/2 + 1 ...: what was rotated together stands side by side. Any trailing shape."""
    width = tensor.shape[0] // heads
    order = torch.arange(width).view(2, width // 2).T.flatten()
    return tensor.view(heads, width, *tensor.shape[1:])[:, order].reshape(tensor.shape)


def _digest(data: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(data).view(np.uint8).data).digest()


def _compare(path: Path, wanted: dict[str, tuple[list[int], Kind, bytes]]) -> None:
    """Reads the file back: names, shapes, types and every byte."""
    there = {t.name: (t.shape.tolist()[::-1], t.tensor_type, t.data) for t in gguf.GGUFReader(path).tensors}
    wrong = [name for name in {*there, *wanted} if name not in there or name not in wanted]
    for name in set(there) & set(wanted):
        shape, kind, data = there[name]
        if (shape, kind) != wanted[name][:2] or _digest(data) != wanted[name][2]:
            wrong.append(name)
    if wrong:
        raise OSError(f"{path} was written but does not read back: {sorted(wrong)[:3]} differ; the disk may be full or failing")


# --- vocabulary ---------------------------------------------------------------------------------------------------------------


def _add_vocabulary(writer: gguf.GGUFWriter, template: Template | None, config: dict[str, Any], say: Callable[[str], None]) -> None:
    """The tokenizer and the chat format, so that llama.cpp's tokens of a rendered chat are those that were trained."""
    if template is None:
        writer.add_tokenizer_model("none")
        say("warning: there is no tokenizer, so the file has no vocabulary: llama.cpp can run it on token ids only")
        return
    tokens = template.tokens
    tree = json.loads(tokens.json)
    kind = tree["model"].get("type", "BPE")  # the oldest files leave it out
    if kind != "BPE":
        raise UserError(f"a tokenizer of the kind {kind} cannot be written into a GGUF here; export a folder (--to FOLDER) instead")
    marks = _marks(tree)
    names, types = _names(tree, config["vocab_size"], marks)
    if {"ByteLevel"} & {part["type"] for part in _parts(tree, "pre_tokenizer", "pretokenizers")}:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(tree, tokens))
        writer.add_token_merges([" ".join(pair) for pair in _merges(tree)])
        if tree.get("normalizer"):
            say(
                f"note: this tokenizer first normalises a text ({tree['normalizer']['type']}), llama.cpp does not; few texts differ"
            )
    else:
        scores = _as_sentencepiece(tree, names, types, say)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(_blank_first(tree, template, say))
    writer.add_token_list(names)
    writer.add_token_types(types)
    _add_ends(writer, template, config, say)
    if template.jinja:
        jinja = template.jinja
        for mark, changed in marks.items():
            jinja = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(mark)}(?![A-Za-z0-9_])", changed, jinja)
        writer.add_chat_template(jinja)


def _marks(tree: dict[str, Any]) -> dict[str, str]:
    """ChatGLM2's and 3's marks `sop` and `eop` are plain letters that count as whole words only. llama.cpp would find them in
    "philosophy" and "people", so they are called <sop> and <eop> there, in the chat format too."""
    single = [token["content"] for token in tree.get("added_tokens", []) if token["single_word"] and token["special"]]
    return {mark: f"<{mark}>" for mark in single if mark.isalnum()}


def _names(tree: dict[str, Any], rows: int, marks: dict[str, str]) -> tuple[list[str], list[int]]:
    """Every token's text and type, by id; rows of the model without a token get a name of their own."""
    names, types = [f"[PAD{id}]" for id in range(rows)], [int(TokenType.UNUSED)] * rows
    for text, id in tree["model"]["vocab"].items():
        names[id], types[id] = text, int(TokenType.NORMAL)
    for token in tree.get("added_tokens", []):
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        text = str(token["content"])
        names[token["id"]], types[token["id"]] = marks.get(text, text), int(kind)
    return names, types


def _merges(tree: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in tree["model"]["merges"]]


def _parts(tree: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, whether there are none, one or several."""
    top = tree.get(key)
    return [] if not top else top[inner] if top["type"] == "Sequence" else [top]


def _pre(tree: dict[str, Any], tokens: Tokens) -> str:
    """llama.cpp's name for how this byte-level tokenizer cuts words. Raises UserError for a way that it is not known to have."""
    steps = _parts(tree, "pre_tokenizer", "pretokenizers")
    kinds = [step["type"] for step in steps]
    whole = bool(tree["model"].get("ignore_merges"))
    found = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        found = None if whole else "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        found = None if whole else "smollm"
    elif kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[1].get("use_regex", True):
        found = WORDS.get(steps[0]["pattern"].get("Regex", ""), (None, None))[0 if whole else 1]
    if found is None or steps[-1]["add_prefix_space"]:
        raise UserError(
            f"this tokenizer cuts words ({' + '.join(kinds)}) in a way that has no known name in llama.cpp, so its tokens would differ; "
            "export a folder (--to FOLDER) and try llama.cpp's convert_hf_to_gguf.py on it"
        )
    return "glm4" if found == "llama-bpe" and tokens.bos_id is None else found  # the same but for the token in front of a text


def _as_sentencepiece(tree: dict[str, Any], names: list[str], types: list[int], say: Callable[[str], None]) -> list[float]:
    """The scores of a SentencePiece vocabulary, from its merges (the sooner a piece is merged, the higher); mends names and types.

    Raises UserError for what llama.cpp's SentencePiece cannot do.
    """
    model = tree["model"]
    cutters = [step["type"] for step in _parts(tree, "pre_tokenizer", "pretokenizers") if step["type"] != "Metaspace"]
    if cutters or not model.get("byte_fallback"):
        why = f"cuts words by {', '.join(cutters)}" if cutters else "has no pieces for single bytes"
        raise UserError(f"llama.cpp cannot run a SentencePiece tokenizer that {why}; export a folder (--to FOLDER) instead")
    steps = _parts(tree, "normalizer", "normalizers")
    typed = {step["content"]: step["pattern"].get("String") for step in steps if step["type"] == "Replace"}
    typed.pop("▁", None)
    known = (
        {step["type"] for step in steps} <= {"Replace", "Prepend"} and typed.keys() <= model["vocab"].keys() and all(typed.values())
    )
    if not known:
        kinds = ", ".join(dict.fromkeys(step["type"] for step in steps))
        say(f"warning: this tokenizer first changes a text ({kinds}), llama.cpp does not; texts that it changes get other tokens")
    for id, text in enumerate(names):
        if types[id] != TokenType.NORMAL:
            continue
        if text == model.get("unk_token"):
            types[id] = int(TokenType.UNKNOWN)
        elif BYTE_PIECE.fullmatch(text):
            types[id] = int(TokenType.BYTE)
        elif text.startswith("<|unused_"):
            types[id] = int(TokenType.UNUSED)
        elif text in typed:  # a user-defined piece, which stands in our vocabulary under a private character
            names[id], types[id] = str(typed[text]).replace("▁", " "), int(TokenType.USER_DEFINED)
    order: dict[str, int] = {}
    for pair in _merges(tree):
        order.setdefault("".join(pair), len(order))
    return [-float(order.get(text, len(order))) for text in names]


def _blank_first(tree: dict[str, Any], template: Template, say: Callable[[str], None]) -> bool:
    """Whether llama.cpp is to put a blank before a text, which it then does behind every special token too."""
    if any(step["type"] == "Prepend" for step in _parts(tree, "normalizer", "normalizers")):
        return True
    schemes = [step.get("prepend_scheme") for step in _parts(tree, "pre_tokenizer", "pretokenizers") if step["type"] == "Metaspace"]
    if schemes != ["first"]:
        return schemes == ["always"]
    starts_special = _prompt(template)[0] in template.tokens.names
    if not starts_special:
        say("warning: llama.cpp puts a blank behind every special token, this tokenizer only before a text; chats get other tokens")
    return not starts_special


def _prompt(template: Template) -> list[int]:
    return template.prompt([{"role": "user", "content": "a"}])


def _add_ends(writer: gguf.GGUFWriter, template: Template, config: dict[str, Any], say: Callable[[str], None]) -> None:
    """The tokens around texts: what ends an answer, and whether a text begins with bos."""
    tokens, stops = template.tokens, list(template.stop_ids)
    first = tokens.eos_id if tokens.eos_id in stops else stops[0] if stops else tokens.eos_id
    ends = [*([first] if first is not None else []), *(id for id in stops if id != first)]
    for add, id in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends):
        add(id)
    if len(ends) > 3:
        say(
            f"warning: a GGUF names three tokens that end an answer; left out: {', '.join(tokens.names.get(id, str(id)) for id in ends[3:])}"
        )
    bos = tokens.bos_id if tokens.bos_id is not None else config.get("bos_token_id")
    if isinstance(bos, int):
        writer.add_bos_token_id(bos)
    unknown = tokens.special.get(tokens.name("unk_token"))
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(tokens.pad_id)
    # llama.cpp takes the bos that a chat format writes away again where it adds its own; one that the format does not write it must not add.
    begins = isinstance(bos, int) and tokens.prefix[:1] == [bos]
    writer.add_add_bos_token(begins and _prompt(template)[:1] == [bos])

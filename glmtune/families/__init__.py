"""Models: a name or a folder -> a native transformers model, its tokenizer and its chat template.

No code that came with a checkpoint is ever run. Nothing here sees a data set.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import run
from ..autoload import OURS, register
from ..chat import Form, Template, Tokens, choose, published_vocabulary, read_object, readable
from ..errors import UserError, did_you_mean
from ..files import whole
from . import baichuan, chatglm, internlm, llama, smollm2, weights
from .family import Family, Vocabulary, about_generation, computed, same_names
from .fingerprint import fingerprint, trained_on
from .place import Place, adapter_config, base_of, checkpoints, locate, resolve

__all__ = [
    "OURS",
    "Place",
    "adapter_config",
    "base_of",
    "checkpoints",
    "fingerprint",
    "locate",
    "register",
    "resolve",
    "trained_on",
]  # with everything defined here

# model_type of a published config.json -> who reads it. None: the folder is what transformers knows itself.
READERS: dict[str, Callable[[Path, dict[str, Any]], Family | None]] = {
    "chatglm": chatglm.read,
    "internlm": internlm.read,
    "internlm2": internlm.read,
    "internlm3": internlm.read,
    "baichuan": baichuan.read,
    "llama": llama.read,
}
# Chat formats by name (run option `template`), beside those of chat.FORMS.
CHATS: dict[str, str] = {
    "chatglm": chatglm.CHATGLM1,
    "chatglm2": chatglm.CHATGLM2,
    "chatglm3": chatglm.CHATGLM3,
    "glm4": chatglm.GLM4,
    "characterglm": chatglm.CHARACTERGLM,
    "codegeex2": chatglm.CODEGEEX2,
    "internlm": internlm.INTERNLM,
    "internlm2": internlm.INTERNLM2,
    "baichuan": baichuan.BAICHUAN,
    "baichuan2": baichuan.BAICHUAN2,
    "llama2": llama.LLAMA2,
    "chinese-alpaca": llama.ALPACA,
    "chinese-alpaca-2": llama.ALPACA2,
}
MARKS = {  # the special tokens without which a format cannot be written
    "chatglm": ("[gMASK]", "<sop>"),
    "chatglm2": ("[gMASK]", "sop"),
    "chatglm3": ("[gMASK]", "sop", "<|user|>", "<|assistant|>"),
    "glm4": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    "characterglm": ("[gMASK]", "sop"),
    "codegeex2": ("[gMASK]", "sop"),
    "internlm": ("<eoa>",),
    "internlm2": ("<|im_start|>", "<|im_end|>"),
    "baichuan": baichuan.MARKS["Baichuan"],
    "baichuan2": baichuan.MARKS["Baichuan2"],
}
QUANTS = ("nf4", "int8", "chatglm-int4", "chatglm-int8")  # quant.KINDS, known before torch is loaded
ROUNDED = ("chatglm1", "glm")  # models that ChatGLM's own int4 and int8 were published of
FILLED = ("llama", "mistral", "qwen2", "qwen3", "glm", "glm4", "chatglm1", "llama_alibi")  # named in files as in the class
NAMES = {"chatglm1": "ChatGLM-6B", "llama_alibi": "Llama with ALiBi (Baichuan-13B)"}  # of what export writes


# --- what is known before anything heavy is loaded -----------------------------------------------------------------------


def family_of(folder: Path) -> Family:
    """What a model folder is, by its config.json. A folder that transformers knows itself is a Family whose names stay as they are.

    Raises UserError for a broken config.json, or settings that no native model can express.
    """
    config = published_config(folder)
    given = {key: value for key, value in config.items() if value is not None}
    try:
        made = READERS.get(config.get("model_type", ""), lambda folder, config: None)(folder, given)
    except UserError:  # a ValueError that names its file itself
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be understood ({error!r}); copy the file again") from None
    made = made or Family(NAMES.get(config.get("model_type", "")) or _class_name(folder, config), config, same_names, native=True)
    _check_sizes(folder, made.config, made.config.get("model_type") in FILLED)
    return made


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "sliding_window", "n_embd", "n_layer", "n_head", "n_inner",
)  # fmt: skip


def _check_sizes(folder: Path, config: dict[str, Any], known: bool) -> None:
    """Sizes that are computed with before any class has seen them. known: of a class that takes no lists (one number for each layer)."""
    text = config.get("text_config", {})
    if not isinstance(text, dict):
        raise UserError(f"{folder / 'config.json'}: text_config is {str(text)[:80]}; wanted an object")
    for name, value in ((name, part[name]) for part in (config, text) for name in SIZES if part.get(name) is not None):
        numbers = value if isinstance(value, list) and value and not known else [value]
        if not all(type(number) is int and number >= (1 if known else 0) for number in numbers):
            raise UserError(f"{folder / 'config.json'}: {name} is {str(value)[:80]}; wanted a whole number above 0")


def opened(folder: Path) -> tuple[Family, dict[str, weights.Stored]]:
    """What a folder is by its config.json and by the tensors that its files hold (`weights.settled`), and these. Reads headers; of a head
    beside embeddings that config calls one tensor, also the numbers. Raises UserError as `family_of` and `weights.open_folder`."""
    family, stored = family_of(folder), weights.open_folder(folder, _bits(folder))
    return weights.settled(family, stored), stored


def source_of(folder: Path, name: str) -> weights.Stored | None:
    """The stored tensor that a native one is made of; None where only transformers knows."""
    family, stored = opened(folder)
    return next((item for native, _, item, _ in weights.native(family, stored) if native == name), None)


def _class_name(folder: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures") or [config.get("model_type")]
    if not isinstance(named, list) or not isinstance(named[0], str | None):
        raise UserError(f"{folder / 'config.json'}: architectures is {str(named)[:80]}; wanted a list with the model class's name")
    return str(named[0])


def published_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the model folder again")
    found = read_object(path)
    if not isinstance(found.get("model_type", ""), str):
        raise UserError(f"{path} is not a model's config; wanted an object with model_type")
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of the native model that the folder becomes; where there are no weights yet, as far as the published one says."""
    return _settled(folder).config


def _settled(folder: Path) -> Family:
    family = family_of(folder)
    tied = family.config.get("tie_word_embeddings") and weights.has_weights(folder)
    return opened(folder)[0] if tied else family


def fp16_overflows(folder: Path) -> str | None:
    """As `run.fp16_overflows`, of the model in a folder, published or native."""
    family = family_of(folder)
    return run.fp16_overflows(str(family.config.get("model_type")) if family.native else family.name)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Native names and shapes of all tensors, from the files' headers (milliseconds). Raises UserError on missing or cut files."""
    if published_quant(folder) in ("nf4", "int8"):  # files hold other shapes than the model
        return {name: list(p.shape) for name, p in load_model(folder, device="meta").named_parameters()}
    family, stored = opened(folder)
    return {name: list(shape) for name, shape, _, _ in weights.native(family, stored)}


def parameter_names(folder: Path) -> list[str]:
    """Native names of all parameters; of tied weights both, which files may hold once."""
    names = list(tensor_shapes(folder))
    tied = bool(config_of(folder).get("tie_word_embeddings")) and "lm_head.weight" not in names
    return [*names, *(["lm_head.weight"] if tied else [])]


def _bits(folder: Path) -> int:
    bits = published_config(folder).get("quantization_bit") or 0
    if bits not in (0, 4, 8):
        raise UserError(f"{folder / 'config.json'}: quantization_bit is {bits!r}; wanted 0, 4 or 8")
    return bits


def linear_names(folder: Path) -> list[str]:
    """Dotted names of the linear layers of the blocks, guessed from the tensors' names and shapes before the model exists."""
    shapes = tensor_shapes(folder)
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and any(part.isdigit() for part in name.split("."))
    ]


def published_targets(wanted: Sequence[str] | None, folder: Path) -> list[str] | None:
    """LoRA targets with the published names of fused layers (query_key_value, W_pack, dense_h_to_4h ...) put into native ones."""
    if wanted is None:
        return None
    names = published_names(folder)
    return [leaf for target in wanted for leaf in names.get(target, [target])]


def published_names(folder: Path) -> dict[str, list[str]]:
    """Last names of the blocks' published layers that are named otherwise in the native model, and what they are there."""
    family, stored = opened(folder)
    made: dict[str, dict[str, None]] = {}
    for name in stored:
        for take in family.places(name) or ():
            if name.endswith(".weight") and any(part.isdigit() for part in name.split(".")):
                made.setdefault(name.split(".")[-2], {})[take.name.split(".")[-2]] = None
    native = {leaf for leaves in made.values() for leaf in leaves}
    return {old: list(new) for old, new in made.items() if old not in native}


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


def lora_sizes(options: Any, chosen: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each chosen layer under a run's method (run.Lora). Raises UserError for names in `ranks`, `alphas` that match none."""
    ranks: dict[str, Any] = dict.fromkeys(chosen, options.rank)
    alphas: dict[str, Any] = dict.fromkeys(chosen, options.alpha)
    for target, rank in options.ranks.items():
        ranks |= dict.fromkeys(pick_targets([target], chosen), rank)
    for target, alpha in options.alphas.items():
        alphas |= dict.fromkeys(pick_targets([target], chosen), alpha)
    return {name: (ranks[name], alphas[name]) for name in chosen}


def frozen_choice(options: Any, names: Sequence[str]) -> set[str]:
    """Which parameters `freeze` trains. Blocks are chosen by their exact number, never by a piece of a name: 7 is not 17."""
    block_of = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    count = 1 + max(block_of.values(), default=-1)
    given = options.layers
    if given is None:
        n = options.first or options.last or 3
        if n > count:
            raise UserError(f"method.{'first' if options.first else 'last'}={n}, but this model has {count} blocks")
        given = list(range(n)) if options.first else list(range(count - n, count))
    wrong = [number for number in given if not -count <= number < count]
    if wrong:
        raise UserError(f"method.layers names block {wrong[0]}; this model has {count} blocks, 0 to {count - 1}")
    wanted = {number % count for number in given}
    kinds = {"all": ".*", "mlp": "mlp|feed_forward", "attention": "(self_)?(attn|attention)"}
    chosen = {
        name
        for name, block in block_of.items()
        if block in wanted and re.fullmatch(kinds[options.modules], name.split(f".{block}.", 1)[1].split(".")[0])
    }
    if not chosen and wanted:
        raise UserError(f"method.modules={options.modules} finds nothing in these blocks; use method.modules=all")
    rest = [name for name in names if name not in block_of]
    for other in options.others:
        found = {name for name in rest if is_module(name.rsplit(".", 1)[0], other)}
        if not found:
            known = sorted({name.rsplit(".", 1)[0].split(".")[-1] for name in rest})
            raise UserError(f"method.others names '{other}'; outside its blocks this model has {known}{did_you_mean(other, known)}")
        chosen |= found
    if not chosen:
        raise UserError("method freeze was told to train no block and nothing else; give method.last=3, or method.layers=[...]")
    return chosen


def is_module(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def named_whole(wanted: Sequence[str], modules: Iterable[str]) -> set[str]:
    """Which of `modules` (full names, all but the linear layers of the blocks) the option modules_to_save means. Raises UserError."""
    modules, chosen = list(modules), set()
    for one in wanted:
        found = {name for name in modules if is_module(name, one)}
        if not found:
            leaves = sorted({name.split(".")[-1] for name in modules})
            raise UserError(
                f"method.modules_to_save names '{one}'; besides the linear layers this model has {leaves}{did_you_mean(one, leaves)}"
            )
        chosen |= found
    return chosen


def plain_lora(config: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is of an adapter that can stay beneath another one, as a sum of low-rank pieces."""
    return config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("modules_to_save")


def prefix_parameters(folder: Path, length: int, projection: bool) -> int:
    """Trainable parameters of a prefix of `length` tokens: two vectors a layer and token, or the network that makes them (prefix.Encoder)."""
    config = {**config_of(folder), **config_of(folder).get("text_config", {})}
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    width = (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads)
    made = 2 * layers * width
    if not projection:
        return length * made
    read = hidden if config.get("model_type") == "chatglm1" else made  # published: ChatGLM-6B's embedding is narrower
    return length * read + hidden * (read + 1) + made * (hidden + 1)


def published_quant(folder: Path) -> str | None:
    """How a folder keeps its weights, as a value of the run option `quant`: ChatGLM's own, or as transformers saves them with
    bitsandbytes; None: in 16 or 32 bits. Raises UserError for other quantisations."""
    made = published_config(folder).get("quantization_config") or {}
    if not isinstance(made, dict):
        raise UserError(f"{folder / 'config.json'}: quantization_config is {str(made)[:80]}; copy the file again")
    if not made:
        bits = _bits(folder)
        return f"chatglm-int{bits}" if bits else None
    nf4 = made.get("load_in_4bit") and made.get("bnb_4bit_quant_type") == "nf4"
    if made.get("quant_method") != "bitsandbytes" or not (nf4 or made.get("load_in_8bit")):
        raise UserError(
            f"{folder} was saved quantised as {made.get('quant_method')} {made.get('bnb_4bit_quant_type', '')}, of which only bitsandbytes' "
            "nf4 and int8 can be tuned; take the original model, with quant=nf4 or quant=int8"
        )
    return "nf4" if nf4 else "int8"


def sharing(chosen: Sequence[str]) -> list[list[str]]:
    """Groups of layers that have one A under `share_a`: q, k and v of an attention, which read the same input."""
    groups: dict[str, list[str]] = {}
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            groups.setdefault(parent, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


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


def open_tokens(folder: Path) -> Tokens:
    """The tokenizer of a model or adapter folder. Published SentencePiece and tiktoken files are turned into tokenizer.json at first
    use (seconds) and kept in the cache."""
    family = family_of(folder) if (folder / "config.json").is_file() else None
    if family is None and not (folder / "tokenizer.json").is_file() and (found := chatglm.vocabulary(folder)):
        return Tokens.of_vocabulary(folder, found)
    if family is None or family.vocabulary is None:
        tokens = Tokens.open(folder)
    else:
        tokens = Tokens.of_vocabulary(folder, _vocabulary(folder, family.vocabulary))
    if family is not None:
        _check_vocabulary(folder, family, tokens)
    return tokens


def _vocabulary(folder: Path, build: Callable[[Path], Vocabulary]) -> Vocabulary:
    digest = hashlib.sha256(json.dumps(folder.resolve().parts[-4:]).encode())  # names tell families apart where configs do not
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model") and ".index." not in p.name):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(Path(__file__).parent.glob("*.py")):  # a newer program builds anew
        digest.update(path.read_bytes())
    kept = smollm2.cache_root() / "tokenizers" / f"{digest.hexdigest()[:32]}.json"
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        return Vocabulary(found["json"], found["config"])
    except (OSError, ValueError, KeyError):  # not there, or damaged
        pass
    with readable(published_vocabulary(folder)):
        made = build(folder)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole(kept, json.dumps({"json": made.json, "config": made.config}, ensure_ascii=False))
    except OSError:
        pass  # a cache that cannot be written costs seconds next time, nothing else
    return made


def _check_vocabulary(folder: Path, family: Family, tokens: Tokens) -> None:
    """Another model's tokenizer files beside the weights would be accepted without a word."""
    text = family.config.get("text_config")
    config = {**family.config, **text} if isinstance(text, dict) else family.config
    rows, ends = config.get("vocab_size"), config.get("eos_token_id")
    if type(rows) is int:
        check_rows(folder, tokens, rows)
    known = {ends} if isinstance(ends, int) else set(ends or ())
    if tokens.built and known and tokens.eos_id not in known:
        raise UserError(
            f"{folder}: its tokenizer ends texts with {tokens.name('eos_token')} {tokens.eos_id}, its config.json with {ends}: "
            "they belong to different models; copy the files again"
        )


def check_rows(folder: Path, tokens: Tokens, rows: int) -> None:
    """Raises UserError where a tokenizer has ids that a model with `rows` rows of embeddings does not; further rows are padding."""
    if tokens.vocab_size > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokens.vocab_size} tokens, the model {rows} rows; tokens were added without resizing the "
            "model, or the tokenizer is of another model"
        )


def open_template(folder: Path, wanted: "str | Form" = "auto", **settings: Any) -> Template:
    """The template of a model folder, from its tokenizer files only. wanted: auto, a name (FORMS, CHATS) or a Form."""
    tokens = open_tokens(folder)
    if tokens.config.get("prefix_lm") and settings.get("learn") == "everything":
        raise UserError("ChatGLM-6B sees a whole question at once, so there is nothing to learn in it; use learn=all")
    if isinstance(wanted, str) and wanted in CHATS:
        missing = [mark for mark in MARKS.get(wanted, ()) if mark not in tokens.special]
        if missing:
            raise UserError(
                f"template={wanted} writes {', '.join(missing)}, which this model's tokenizer does not have; use template=auto"
            )
        tokens.config["chat_template"] = tokens.chat_template = CHATS[wanted]
        return replace(choose("auto", tokens, **settings), name=wanted)
    return choose(wanted, tokens, **settings)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "ice_text.model"))


def save_tokenizer(base: Path, template: Template, folder: Path) -> None:
    """The tokenizer of `base` and the chat format of `template` as files that plain transformers reads, so that what was trained is
    what is served; and in generation_config.json the tokens at which an answer ends."""
    tokens = template.tokens
    config = {key: value for key, value in tokens.config.items() if key not in ("chat_template", "auto_map")}
    whole(folder / "tokenizer.json", tokens.json)
    whole(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    whole(folder / "chat_template.jinja", template.jinja)
    settings = about_generation(base)
    published = family_of(base).settings if (base / "config.json").is_file() else {}
    if published and not settings:
        settings = {"do_sample": True, **published}
    if template.stop_ids:
        settings["eos_token_id"] = template.stop_ids
    settings.setdefault("pad_token_id", tokens.pad_id)
    whole(folder / "generation_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def load_tokenizer(folder: str | Path) -> tuple[Any, Template]:
    """(transformers tokenizer, Template) of a folder. Needs only the tokenizer files and configs."""
    path = Path(folder).expanduser()
    folder = path if path.is_dir() and has_tokenizer(path) else resolve(str(folder))
    template = open_template(folder)
    return hf_tokenizer(folder, template), template


def hf_tokenizer(folder: Path, template: Template) -> Any:
    """The tokenizer as transformers' users know it. Its plain call lets typed special tokens through, as transformers does; for user
    text say `split_special_tokens=True`, as `Template` does in effect."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokens = template.tokens
    if (folder / "tokenizer.json").is_file() and not tokens.built:
        try:
            made: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # each class raises its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{folder}: transformers cannot open this tokenizer: {reason}") from None
    else:
        from tokenizers import Tokenizer

        known = (
            "bos_token",
            "eos_token",
            "pad_token",
            "unk_token",
            "padding_side",
            "model_input_names",
            "clean_up_tokenization_spaces",
        )
        settings = {key: tokens.config[key] for key in known if key in tokens.config}
        made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokens.json), **settings)
    if template.jinja:
        made.chat_template = template.jinja
    return made


# --- loading ------------------------------------------------------------------------------------------------------------


def pick_device(wanted: Any = "auto") -> Any:
    """A torch device, by its name or itself. `auto`: the first CUDA card, else Apple's GPU, else the CPU. Raises UserError for one that is not
    there."""
    import torch

    if isinstance(wanted, str) and wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted) if isinstance(wanted, str | torch.device) else None
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
        near = did_you_mean(str(wanted)[:40], ["auto", "cpu", "cuda", "mps"])
        raise UserError(f"device: '{str(wanted)[:40]}' is not a device; wanted auto, cpu, cuda, cuda:1 or mps{near}")
    # str: torch keeps eight bits of an index, so that its cuda:256 is cuda:0.
    if device.type == "cuda" and (str(device) != str(wanted) or not 0 <= (device.index or 0) < torch.cuda.device_count()):
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


DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "half": "float16", "fp32": "float32",
    "float32": "float32", "float": "float32",
}  # fmt: skip


def as_dtype(dtype: Any) -> Any:
    """A torch dtype: by our names (bf16, fp16, fp32), torch's ("bfloat16", "torch.float16", "half" ...), or itself; "auto" stays. Raises
    UserError for anything else."""
    import torch

    if isinstance(dtype, str) and dtype == "auto":
        return dtype
    if isinstance(dtype, str | torch.dtype) and (name := DTYPES.get(str(dtype).removeprefix("torch."))):
        return getattr(torch, name)
    near = did_you_mean(dtype, DTYPES) if isinstance(dtype, str) else ""
    raise UserError(f"dtype: {str(dtype)[:40]!r} is none that a model can be used in; wanted auto, bf16, fp16 or fp32{near}")


def quant_kind(folder: Path, wanted: str | None) -> str | None:
    """What the option `quant` of `load_model` stands for on a folder; reads no weights. "keep" is what it was published as.

    Raises UserError for an unknown name, one that this model or this machine cannot do, and for a second rounding of rounded weights.
    """
    if wanted is None:
        return None
    kept, family = published_quant(folder), family_of(folder)
    if wanted != "keep" and wanted not in QUANTS:
        raise UserError(f"quant: '{wanted}' is not known; wanted {', '.join(QUANTS)}{did_you_mean(wanted, QUANTS)}")
    if kept and wanted not in ("keep", kept):
        raise UserError(
            f"{folder} is published as {kept}; quant={wanted} would round rounded weights: leave quant out, or take the 16-bit model"
        )
    if wanted == "keep" and not kept:
        raise UserError(f"quant: keep is for models published in int4 or int8, {folder} is not; wanted {', '.join(QUANTS)}")
    if wanted.startswith("chatglm") and not kept and family.config.get("model_type") not in ROUNDED:
        raise UserError(f"quant={wanted} is ChatGLM's own, this is {family.name}; use quant=nf4 or quant=int8")
    if wanted == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('quant=nf4 needs bitsandbytes: pip install "glmtune[quant]"; quant=int8 needs nothing more')
    return kept if wanted == "keep" else wanted


def load_model(path: str | Path, *, dtype: Any = "auto", device: Any = "auto", quant: str | None = None) -> Any:
    """The model of a folder as a native `PreTrainedModel`, in eval mode.

    dtype: a torch dtype, "bf16", "fp16", "fp32", or "auto" (the checkpoint's own). device "meta": names and shapes only, no weights
    are needed. quant: one of QUANTS, or "keep" (as published): the linear layers of the blocks are quant.QuantLinear, packed one by one
    while they are read; None: nothing is packed, and what was published packed is unpacked.
    Raises UserError: no such folder, no native class, missing, extra or misshapen tensors (all of them listed), as `quant_kind` does.
    """
    import torch

    dtype = as_dtype(dtype)
    folder = resolve(str(path))
    device = torch.device("meta") if str(device) == "meta" else pick_device(device)
    register()
    dtype = _published_dtype(folder) if dtype == "auto" else dtype
    kind = quant_kind(folder, quant)
    if device.type == "meta":
        return _empty(_settled(folder), dtype, folder)
    settings = _generation(folder)
    family, stored = opened(folder)  # also where transformers reads them: it would take a damaged file as it is
    if published_quant(folder) in ("nf4", "int8"):
        return _adopted(folder, family, stored, dtype, device, kind)
    filled = family.config.get("model_type") in FILLED
    if not filled and kind:
        return _packed_after(folder, family, stored, dtype, device, kind)
    if not filled and family.native:
        return _from_pretrained(folder, family, stored, dtype, device)
    model = _empty(family, dtype, folder)
    _try(model, folder)
    weights.check(model, family, stored, folder)
    if family.native and not kind and not _ours_reads(stored, dtype):
        return _from_pretrained(folder, family, stored, dtype, device)
    weights.fill(model, family, stored, folder, dtype, device, kind)
    _fresh_buffers(model, device)
    if settings is not None:
        model.generation_config = settings
    return model.eval()


def _published_dtype(folder: Path) -> Any:
    """What config.json says its weights are to be computed in; fp32 where it does not say."""
    import torch

    config = published_config(folder)
    named = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, named, torch.float32)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"{folder / 'config.json'}: torch_dtype is {named}; wanted float32, bfloat16 or float16")
    return found


def _generation(folder: Path) -> Any:
    """transformers' generation settings of a folder; None without any. Raises UserError with the file's name."""
    if not (folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    about_generation(folder)  # whether it is JSON at all
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever it makes of values that make no sense
        raise UserError(f"{folder / 'generation_config.json'}: {' '.join(str(error).split())[:200]}; copy the file again") from None


def _ours_reads(stored: dict[str, weights.Stored], dtype: Any) -> bool:
    """Whether a folder of a family that both loaders know is better read by `weights`: transformers' loader maps the files into memory, which
    costs nothing in the stored dtype, but leaves a second copy there when every tensor is cast (measured: 1.9 times the weights, ours
    1.02); and it reads no shards without an index."""
    cast = any(item.dtype != str(dtype).removeprefix("torch.") for item in stored.values() if not computed(item.name))
    return cast or not weights.plain(sorted({item.path for item in stored.values()}))


def _adopted(folder: Path, family: Family, stored: dict[str, weights.Stored], dtype: Any, device: Any, kind: str | None) -> Any:
    """A folder that transformers saved with bitsandbytes: opened by it, then its layers are changed for ours."""
    import torch

    from .. import quant

    quant.bitsandbytes()
    model = _from_pretrained(folder, family, stored, dtype, torch.device("cpu"))
    quant.adopt(model, None if kind else dtype, str(folder))
    model.hf_quantizer.remove_quantization_config(model)  # else transformers refuses to move it, and export would write it down
    return model.to(device)


def _packed_after(folder: Path, family: Family, stored: dict[str, weights.Stored], dtype: Any, device: Any, kind: str) -> Any:
    """A folder whose tensors only transformers' loader can place: mapped in the stored dtype, then packed layer by layer."""
    import torch

    from .. import quant

    kept = {item.dtype for item in stored.values() if len(item.shape) > 1}
    first = getattr(torch, kept.pop()) if len(kept) == 1 else torch.float32
    model = _from_pretrained(folder, family, stored, first, torch.device("cpu"))
    names = quant.linears(model)
    share = sum(model.get_submodule(name).weight.numel() for name in names) / quant.in_blocks(model)
    if share < 0.9:
        raise UserError(
            f"{folder}: only {share:.0%} of the weights of its blocks are linear layers, which can be packed; leave quant={kind} out"
        )
    for name in names:
        weight = model.get_submodule(name).weight.detach().to(device)
        quant.replace(model, [name])[name].packed = quant.pack(weight, kind, f"{folder}: {name}.weight")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return model.to(device)


CHOSEN_HERE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def _native_config(family: Family, folder: Path) -> Any:
    """The native model's config object. How attention is computed is no property of a model: that key, which may name what is not
    installed here, is left out. Raises UserError for values that its class does not take."""
    from transformers import AutoConfig

    def kept(given: dict[str, Any]) -> dict[str, Any]:
        return {key: kept(value) if isinstance(value, dict) else value for key, value in given.items() if key not in CHOSEN_HERE}

    try:
        kind = AutoConfig.for_model(family.config["model_type"])
        return type(kind).from_dict(kept({key: value for key, value in family.config.items() if key != "auto_map"}))
    except Exception as error:  # whatever a class makes of a config that makes no sense
        raise _no_model(family, folder, error) from None


def _no_model(family: Family, folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{folder / 'config.json'} does not describe a model of the kind {family.name}: {reason}")


def _empty(family: Family, dtype: Any, folder: Path) -> Any:
    """The native model without weights, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _native_config(family, folder)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as above
        raise _no_model(family, folder, error) from None


_TRIED: set[tuple[type, str]] = set()


def _try(model: Any, folder: Path) -> None:
    """A forward pass of two tokens without numbers: settings that the class takes and its forward, or a cache, cannot use end here.

    Once for each config: it takes some 20 ms a layer.
    """
    import torch
    from transformers import DynamicCache

    key = type(model), model.config.to_json_string(use_diff=False)
    if key in _TRIED:
        return
    try:
        with torch.no_grad():
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"),
                past_key_values=DynamicCache(config=model.config),
                use_cache=True,
            )
    except Exception as error:  # as above
        if isinstance(error, NotImplementedError) or "meta tensors" in str(error):
            return  # not without numbers: Llama's dynamic rotary frequencies ask for one
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{folder / 'config.json'} has settings that a {type(model).__name__} cannot compute with: {reason}"
        ) from None
    _TRIED.add(key)


def _fresh_buffers(model: Any, device: Any) -> None:
    """Buffers that no file holds (rotary frequencies) were made on the meta device; their modules are made again, for real."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                setattr(parent, name, type(child)(model.config).to(device))


def _from_pretrained(folder: Path, family: Family, stored: dict[str, weights.Stored], dtype: Any, device: Any) -> Any:
    """A folder that transformers knows, through its own loader, of the same files and with the same config as ours."""
    import contextlib
    import io

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    paths = sorted({item.path for item in stored.values()})
    if not weights.plain(paths):
        raise UserError(
            f"{folder} holds shards without their index, which transformers needs; download model.safetensors.index.json too"
        )
    config = _native_config(family, folder)
    held, errors = logging.get_verbosity(), io.StringIO()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(errors):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                use_safetensors=paths[0].suffix == ".safetensors",
            )  # fmt: skip
    except Exception as error:  # each class, and each format of files, raises its own
        empty = _empty(family, dtype, folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        wrong = [
            f"misshapen {name} (gives {list(item.shape)}, wanted {list(shapes[name])})"
            for name, item in stored.items()
            if shapes.get(name, item.shape) != item.shape and family.config.get("quantization_config") is None
        ]
        if wrong:
            raise weights.misfit(folder, wrong) from None
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise UserError(
            f"{folder} (model_type '{config.model_type}') cannot be opened by transformers without code from the checkpoint: {reason}"
        ) from None
    finally:
        logging.set_verbosity(held)
        logging.enable_progress_bar()
    model, info = loaded
    wrong = [f"missing {n}" for n in sorted(info["missing_keys"])]
    wrong += [f"unexpected {n}" for n in sorted(info["unexpected_keys"]) if not computed(n)]
    wrong += [f"misshapen {n[0] if isinstance(n, tuple) else n}" for n in sorted(info["mismatched_keys"], key=str)]
    if wrong:
        raise weights.misfit(folder, wrong)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        head is not None and head.weight is not embeddings.weight
    ):  # transformers keeps both where they differ, and leaves the config as it was
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model.to(device).eval()


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

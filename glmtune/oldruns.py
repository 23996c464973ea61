"""Run files of the older tools -> ours.

Every argument of the old file becomes an option, or is listed with the reason why not; where a value changes its meaning, that is said. What
the old tool did when an argument was absent is written out too, since its defaults are not ours.
"""

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import files, options, sources
from .errors import UserError
from .oldfiles import (
    CHATGLM_TUNING,
    EFFICIENT,
    HEADINGS,
    LLAMA_FACTORY,
    LLAMA_FACTORY_V1,
    LLM_TUNING,
    LORA_TRAINER,
    PARENT,
    RAW,
    SUFFIXES,
    TEMPLATES,
    Old,
    number,
    read,
    short,
    tree_of,
)
from .oldfiles import line as _line
from .run import Run, fp16_overflows, load_run

Say = Callable[[str], None]
STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
FUSED = ("query_key_value", "W_pack", "wqkv")  # published as one layer, three layers here (except in ChatGLM-6B)
MLP = {"mlp", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "feed_forward", "dense_h_to_4h", "dense_4h_to_h"}
ATTENTION = {"attention", "self_attn", "self_attention", "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "W_pack"}
_MODEL_LIKE = re.compile(r"model|chatglm|base|pretrain|ckpt|llm", re.IGNORECASE)  # an argument that may name the model
_DATA_LIKE = re.compile(r"data|train|file|path|corpus|json", re.IGNORECASE)


def is_run_file(path: str | Path) -> bool:
    """Whether `glmtune import PATH` means a run file of another tool, and not an adapter."""
    path = Path(path)
    return path.is_file() and path.suffix.lower() in SUFFIXES and path.name != "adapter_config.json"


def convert(path: str | Path, to: str | Path, say: Say = lambda text: None) -> Run:
    """Writes the run file `to` for the old one, and gives it as it is read. `say` gets every remark; they stand in the file too.

    Raises UserError for a file that is no training run of a known tool, for a value of the wrong kind, and where `to` exists.
    """
    path, to = Path(path), Path(to)
    if to.exists():
        raise UserError(f"{to} exists already and is never overwritten; choose another --to, or remove it")
    old = read(path)
    try:
        made = _converted(old)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    try:  # before anything is written: what comes out is a run file
        options.build(Run, made.tree)
    except UserError as error:
        raise UserError(f"{path}: its values make no run file of ours: {error}") from None
    told = "\n".join([*made.comments.values(), *made.notes, *old.beside])
    head = f"From {path.name}, a run of {old.tool}. Behind each value stands where it comes from; remarks are at the end."
    remarks = [_line(line) for line in (*(f"changed: {note}" for note in made.notes), *old.left(told))]
    text = "\n".join([f"# {_line(head)}", *_lines(made.tree, made.comments), "", *(f"# {line}" for line in remarks)]) + "\n"
    for line in (f"{path}: a run of {old.tool}", *remarks):
        say(line)
    to.parent.mkdir(parents=True, exist_ok=True)
    files.whole(to, text)
    try:
        return load_run(to)
    except UserError:  # nothing is left behind that the next import would find
        to.unlink()
        raise


# --- what it becomes --------------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """The new run file while it grows: a tree, a comment for its places (dotted names), remarks."""

    tree: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, comment: str = "") -> None:
        *parents, last = name.split(".")
        node = self.tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        self.comments[name] = comment

    def note(self, text: str) -> None:
        self.notes.append(text)


def _converted(old: Old) -> Made:
    made = Made()
    _model(old, made)
    _data(old, made)
    made.put("out", old.text("output_dir") or "runs/imported", old.origin("output_dir"))
    if not old.has("output_dir") and "output_dir" not in old.defaults:
        made.note("output_dir is missing there; out is runs/imported")
    _stage(old, made)
    _method(old, made)
    _quant(old, made)
    _optimizer(old, made)
    _lengths(old, made)
    _template(old, made)
    _rest(old, made)
    _no_guess(old)
    return made


def _no_guess(old: Old) -> None:
    """A default stands for nothing that the file says under a name which is not known."""
    for name, like, what in (
        ("model_name_or_path", _MODEL_LIKE, "model"),
        ("dataset", _DATA_LIKE, "data"),
        ("data_path", _DATA_LIKE, "data"),
    ):
        strange = old.unknown(like)
        if name in old.taken and name not in old.given and name in old.defaults and name not in old.told and strange:
            raise UserError(
                f"names no {what} that {old.tool} knows ({name}), but {', '.join(strange)}; is it a run of another tool? "
                f"If the default is meant ({old.defaults[name]}), write it there"
            )


def _model(old: Old, made: Made) -> None:
    model = old.text("model_name_or_path")
    if model is None:
        raise UserError(f"names no model (model_name_or_path), which {old.tool} needs too")
    revision = old.text("model_revision")
    if revision not in (None, "main"):
        model = f"{model}@{revision}"
    made.put("model", model, old.origin("model_name_or_path", "model_revision"))


def _data(old: Old, made: Made) -> None:
    most = old.whole("max_samples")
    if old.tool == LLAMA_FACTORY_V1:
        _v1_data(old, made)
    elif old.tool in (LLAMA_FACTORY, EFFICIENT):
        registry, known = _registry(old, made)
        wanted = old.names("dataset")
        if not wanted:
            raise UserError("names no data set (dataset)")
        entries = [_entry(name, most, old, made, known, registry) for name in wanted]
        _mix(old, made, entries)
        made.put("data", entries, old.origin("dataset") + (", max_samples" if most else ""))
        dev = [_entry(name, most, old, made, known, registry) for name in old.names("eval_dataset")]
        if dev:
            made.put("eval.data", dev, old.origin("eval_dataset"))
        if registry is not None:
            made.put("registry", str(registry), old.origin("dataset_dir"))
        if old.tool == EFFICIENT:
            made.put("join", "", "instruction and input were joined without anything between them")
    elif old.tool in (LLM_TUNING, PARENT):
        _tokenised_data(old, made)
    else:
        path = old.text("data_path")
        if path is None:
            path = "train.jsonl"
            made.note(
                "data: the old file names no data (it stood on the command line, --data_path); put your file in place of train.jsonl"
            )
        made.put("data", [{"path": _found(old, path)}], old.origin("data_path"))
        dev = old.text("eval_path")
        if dev is not None:
            made.put("eval.data", [{"path": _found(old, dev)}], old.origin("eval_path"))
    share = old.whole("val_size", share=True)
    if share and "eval" not in made.tree:
        made.put("eval.share", share, old.origin("val_size"))
        made.note(
            "eval.share: other rows are kept apart than there; they are picked by their content, so equal rows never stand on both sides"
        )
    _looks(old, made)


def _v1_data(old: Old, made: Made) -> None:
    """train_dataset: a YAML that lists data sets, a file, or a name on the hub."""
    for name, option in (("dataset", "data"), ("eval_dataset", "eval.data")):
        path = old.text(name)
        if path is None and option == "data":
            raise UserError("names no data set (train_dataset)")
        if path is None:
            continue
        found = Path(_found(old, path))
        entries = [{"path": str(found) if found.exists() else path if Path(path).suffix else f"hf:{path}"}]
        if found.suffix in (".yaml", ".yml"):
            if found.is_file():
                entries = [_v1_entry(old, made, str(key), entry) for key, entry in tree_of(found).items()]
            else:
                made.note(
                    f"{option}: {path} lists LLaMA-Factory's data sets and is not there from here; put the files that it names in its place"
                )
        made.put(option, entries, old.origin(name))
        if name == "eval_dataset":
            made.note("eval_dataset: it was not looked at there")


def _v1_entry(old: Old, made: Made, name: str, about: Any) -> dict[str, Any]:
    if not isinstance(about, dict) or not isinstance(about.get("path"), str):
        raise UserError(f"train_dataset: {name}: wanted a group with `path:`, got {reprlib.repr(about)}")
    local, split = about.get("source", "hf_hub") == "local", about.get("split")
    path = _found(old, about["path"]) if local else f"hf:{about['path']}" + (f":{split}" if split else "")
    entry: dict[str, Any] = {"path": path}
    form = about.get("converter")
    if form == "alpaca":
        made.put("join", "", "converter alpaca: instruction and input were joined without anything between them")
    if form in ("alpaca", "sharegpt"):
        entry["format"] = form
    elif form not in (None, "pair"):
        made.note(f"data: {name}: converter {form} is not known here; the rows' form is recognised from their keys")
    if about.get("weight") is not None:
        entry["weight"] = number(f"{name}: weight", about["weight"])
    if about.get("size") is not None:
        entry["max_samples"] = number(f"{name}: size", about["size"])
        made.note(f"data: {name}: size {about['size']}: the first rows are taken; there so many were drawn, some more than once")
    others = [key for key in about if key not in ("path", "source", "split", "converter", "weight", "size", "streaming")]
    if about.get("source", "local") not in ("local", "hf_hub"):
        others.append("source")
    if others:
        made.note(f"data: {name}: {', '.join(f'{key} ({short(about[key])})' for key in others)}: not known here")
    return entry


def _registry(old: Old, made: Made) -> tuple[Path | None, dict[str, sources.Entry]]:
    """dataset_info.json of the old tool, looked up from here and from the old file's folder upwards; and all names that are known."""
    folder = old.text("dataset_dir") or "data"
    places = [Path(folder), *(parent / folder for parent in [old.folder, *old.folder.parents])]
    found = next((place / "dataset_info.json" for place in places if (place / "dataset_info.json").is_file()), None)
    if found is None and folder not in ("ONLINE",):
        made.note(
            f"dataset_dir: there is no {folder}/dataset_info.json; names are looked up in glmtune's own list (glmtune data list). "
            "If you have the file, name it: registry: PATH/dataset_info.json"
        )
    return found, sources.names(found)


def _entry(name: str, most: Any, old: Old, made: Made, known: dict[str, sources.Entry], registry: Path | None) -> dict[str, Any]:
    entry = known.get(name)
    if entry is not None and entry.refused:
        made.note(f"data: '{name}' cannot be used: {entry.refused}")
    elif entry is None and old.value("dataset_dir") != "ONLINE" and not Path(name).exists():
        made.note(f"data: no data set is called '{name}'; put a path or another name in its place")
    elif entry is not None and registry is None:
        made.note(f"data: '{name}' is taken to be glmtune's data set of that name ({entry.hub or entry.modelscope or entry.path})")
    return {"path": name, **({"max_samples": most} if most else {})}


def _mix(old: Old, made: Made, entries: list[dict[str, Any]]) -> None:
    strategy = old.text("mix_strategy") or "concat"
    chances = [number("interleave_probs", chance) for chance in old.names("interleave_probs")]
    if strategy == "concat" or len(entries) < 2:
        return
    chances = chances if len(chances) == len(entries) else [1 / len(entries)] * len(entries)
    for entry, chance in list(zip(entries, chances))[1:]:
        entry["share"] = round(chance, 4)
    made.note(
        f"mix_strategy {strategy}: the data sets stand to each other as before (share), but the first is read once per epoch, "
        "and the others are repeated or cut to their shares"
    )


def _tokenised_data(old: Old, made: Made) -> None:
    """LLM-Tuning trains on what its tokenize_dataset_rows.py wrote; here the rows themselves are the data."""
    name, file = old.text("tokenized_dataset"), old.text("input_file")
    if file is None and name is None:
        raise UserError("names no data (--dataset_path)" if old.tool == PARENT else "names no data (--tokenized_dataset)")
    prompt = "prompt"
    if old.tool == PARENT:  # its paths are whole
        path, prompt = _found(old, file or f"{name}.jsonl"), "context"
    else:
        path = _found(old, f"data/{file}" if file else f"data/{name}.json")
    keys = {"prompt": old.text("prompt_key") or prompt, "response": old.text("target_key") or "target"}
    entry: dict[str, Any] = {"path": path, "columns": keys}
    if file is None:
        made.note(
            f"data: '{name}' is a folder of tokens; the rows themselves are wanted here. {path} and its keys {prompt} and target are a guess: "
            "put the file and the keys that were given to tokenize_dataset_rows.py"
        )
    train, dev = old.whole("train_size"), old.whole("eval_size")
    looks = (old.text("eval_strategy") or "no") != "no"
    if train:
        entry["max_samples"] = train + ((dev or 0) if looks else 0)
    made.put("data", [entry], old.origin("input_file", "tokenized_dataset", "train_size"))
    if looks and dev:
        made.put("eval.share", dev, old.origin("eval_size"))
        made.note(
            "eval.share: there the last rows were the dev rows and could be trained on as well; here they are rows that are not trained on"
        )


def _found(old: Old, path: str) -> str:
    """A path that is not there from here but lies beside the old file (or above it) is meant from there."""
    if Path(path).expanduser().exists():
        return path
    return next((str(place / path) for place in [old.folder, *old.folder.parents] if (place / path).exists()), path)


def _looks(old: Old, made: Made) -> None:
    """When the dev rows are looked at."""
    strategy, every = old.text("eval_strategy") or "no", old.whole("eval_steps", share=True)
    best = old.flag("load_best_model_at_end")
    if "eval" not in made.tree:
        if strategy != "no":
            made.note("eval_strategy: without dev rows (val_size, eval_dataset) nothing is evaluated")
        return
    if strategy == "steps":
        every = every or old.whole("logging_steps", share=True) or 500
    if strategy == "steps" and every >= 1:
        made.put("eval.every_steps", every, old.origin("eval_steps", "eval_strategy"))
    elif strategy == "steps":
        made.note("eval_steps: a share of the steps has no counterpart; the dev rows are looked at at each epoch's end")
    elif strategy == "no":
        made.note("eval_strategy no: here the dev rows are looked at at each epoch's end")
    if best:
        made.note(
            "load_best_model_at_end: adapter/ is the last step; the best checkpoint is kept beside it, and state.json names it"
        )


def _stage(old: Old, made: Made) -> None:
    text = old.text("data_type") == "txt"
    kind = "pretrain" if text else STAGES.get(old.text("stage") or "")
    if kind is None:
        raise UserError(f"stage {old.text('stage')!r} is not known; {old.tool} has {', '.join(STAGES)}")
    made.put("stage.kind", kind, "DATA_TYPE" if text else old.origin("stage"))
    if kind not in ("sft", "pretrain"):
        made.note(f"stage {kind}: `glmtune show` reads its rows, `glmtune train` cannot train it yet")
        return
    if kind == "pretrain":
        return
    learn = None
    if old.tool == EFFICIENT:
        learn = ("last", "only the last answer of a conversation was learned")
    elif old.tool == LORA_TRAINER and old.flag("train_on_prompt"):
        learn = ("everything", old.origin("train_on_prompt"))
    elif old.tool == LLM_TUNING and not old.number("no_prompt_loss"):
        learn = ("everything", old.origin("no_prompt_loss") + ": the prompt was learned too")
    elif old.flag("train_on_prompt"):
        learn = ("everything", old.origin("train_on_prompt"))
    elif old.flag("mask_history"):
        learn = ("last", old.origin("mask_history"))
    old.taken |= {"no_prompt_loss", "train_on_prompt", "mask_history"}
    if learn:
        made.put("stage.learn", *learn)
    elif old.tool == LORA_TRAINER:
        made.note(
            "what is learned: the answers, as intended there; its collator in fact learned the questions too (stage.learn: everything)"
        )


def _method(old: Old, made: Made) -> None:
    kind = old.text("finetuning_type") or ""
    ours = {"lora": "lora", "p_tuning": "prefix", "ptuning": "prefix", "freeze": "freeze", "full": "full"}.get(kind)
    if ours is None:
        raise UserError(f"finetuning_type {kind!r} has no counterpart; methods are lora, prefix, freeze, full")
    made.put("method.kind", ours, old.origin("finetuning_type"))
    {"lora": _lora, "prefix": _prefix, "freeze": _freeze, "full": _full}[ours](old, made)
    others = {name for name in old.given if name.startswith(("lora_", "freeze_trainable", "freeze_extra", "pissa_", "use_dora", "use_rslora",
              "loraplus_", "additional_target", "pre_seq_len", "prefix_projection", "create_new_adapter", "resume_lora_training"))}  # fmt: skip
    spare = sorted(name for name in others - old.taken if not old.reason(name))
    if spare:
        old.taken |= set(spare)
        old.beside.append(f"not needed: {', '.join(old.called[name] for name in spare)}: the method is {ours}")


def _lora(old: Old, made: Made) -> None:
    rank, alpha = old.whole("lora_rank"), old.number("lora_alpha")
    made.put("method.rank", rank, old.origin("lora_rank"))
    if alpha is None:  # LLaMA-Factory only
        made.put("method.alpha", rank * 2, "lora_alpha was not given: twice the rank there")
    else:
        made.put("method.alpha", alpha, old.origin("lora_alpha"))
    made.put("method.dropout", old.number("lora_dropout"), old.origin("lora_dropout"))
    dora, pissa = old.flag("use_dora"), old.flag("pissa_init")
    _targets(old, made, plain=not dora and not pissa)
    for name, option in (("use_dora", "dora"), ("use_rslora", "rslora"), ("pissa_init", "pissa")):
        if old.flag(name):
            made.put(f"method.{option}", True, old.origin(name))
    if old.number("loraplus_lr_ratio"):
        made.put("method.lr_ratio", old.number("loraplus_lr_ratio"), old.origin("loraplus_lr_ratio"))
    whole = old.names("additional_target")
    if whole:
        made.put("method.modules_to_save", whole, old.origin("additional_target"))
    adapters = old.names("adapter_name_or_path")
    anew = old.flag("create_new_adapter") or (old.has("resume_lora_training") and not old.flag("resume_lora_training"))
    under, start = (adapters, None) if anew else (adapters[:-1], adapters[-1] if adapters else None)
    if under:
        made.put("method.under", under, old.origin("adapter_name_or_path"))
        made.note(
            "adapters beneath: there they were merged into the weights; here they stay switched on beneath the new one, and the result holds them too"
        )
    if start:
        made.put("method.start", start, old.origin("adapter_name_or_path"))
    if adapters:
        made.note(
            f"{', '.join(adapters)}: an adapter of another tool is imported first: glmtune import {adapters[-1]} --to FOLDER; then name FOLDER"
        )
    old.taken |= {"create_new_adapter", "resume_lora_training"}


def _targets(old: Old, made: Made, plain: bool) -> None:
    targets, origin = old.names("lora_target"), old.origin("lora_target")
    model = str(made.tree["model"]).lower()
    if old.tool == LORA_TRAINER and "lora_target" not in old.told:
        origin = "written into that program, where 'query_value_key' was meant to be query_key_value"
    if "all" in targets:
        made.put("method.targets", None, f"{origin}: all, every linear layer of the blocks")
        fused = bool(re.search(r"chatglm|glm-?4|baichuan|internlm2", model)) and "-hf" not in model and "0414" not in model
    else:
        outside = [name for name in targets if name in ("lm_head", "embed_tokens", "output_layer", "word_embeddings")]
        if outside:
            made.note(
                f"lora_target {', '.join(outside)}: LoRA sits on the linear layers of the blocks; method.modules_to_save trains such a module whole"
            )
        kept = [name for name in targets if name not in outside]
        if not kept:
            raise UserError(f"lora_target {', '.join(targets)}: names no linear layer of the blocks; all means every one of them")
        made.put("method.targets", kept, origin)
        fused = any(name in FUSED for name in kept)
    if fused and plain:
        made.put("method.share_a", True, "q, k and v were one fused layer there, with one A")


def _prefix(old: Old, made: Made) -> None:
    made.put("method.num_virtual_tokens", old.whole("pre_seq_len", 1), old.origin("pre_seq_len"))
    made.put("method.init", "random", "as published; init words starts from the model's own keys and values")
    made.put("method.projection", old.flag("prefix_projection"), old.origin("prefix_projection"))
    made.put("method.dropout", 0.1, "fixed in the published prefix encoder")
    start = old.names("adapter_name_or_path")
    if start:
        made.put("method.start", start[-1], old.origin("adapter_name_or_path"))
        made.note(
            f"{start[-1]}: a prefix of another tool is imported first: glmtune import {start[-1]} --to FOLDER; then name FOLDER"
        )


def _freeze(old: Old, made: Made) -> None:
    number = old.whole("freeze_trainable_layers") or 0
    made.put("method.last" if number > 0 else "method.first", abs(number), old.origin("freeze_trainable_layers"))
    names = set(old.names("freeze_trainable_modules"))
    modules = "mlp" if names <= MLP else "attention" if names <= ATTENTION else "all"
    made.put("method.modules", modules, old.origin("freeze_trainable_modules"))
    if modules == "all" and names != {"all"}:
        made.note(
            f"freeze_trainable_modules {', '.join(sorted(names))}: a block is trained whole, or its mlp, or its attention; taken as all"
        )
    if modules == "attention":
        made.note("freeze: the whole attention of a block is trained, its output layer too")
    if old.tool == EFFICIENT:
        made.note("freeze: layers are counted exactly; there '7.mlp' also trained layers 17 and 27")
    others = old.names("freeze_extra_modules")
    if others:
        made.put("method.others", others, old.origin("freeze_extra_modules"))
    _whole_start(old, made)


def _full(old: Old, made: Made) -> None:
    _whole_start(old, made)


def _whole_start(old: Old, made: Made) -> None:
    folders = old.names("adapter_name_or_path")
    if not folders:
        return
    if made.tree["method"]["kind"] == "full":
        made.note(f"model: {folders[-1]} in place of {made.tree['model']}")
        made.put("model", folders[-1], old.origin("adapter_name_or_path") + ": a whole model, which training went on from")
        return
    made.note(
        f"{folders[-1]}: a checkpoint of some layers cannot be read; merge it there into a whole model and name that as model"
    )


def _quant(old: Old, made: Made) -> None:
    bits, kind = old.whole("quantization_bit"), made.tree["method"]["kind"]
    origin = old.origin("quantization_bit", "quantization_method")
    for name, width in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if old.flag(name):
            bits, origin = width, old.origin(name)
    form, way = old.text("quantization_type"), (old.text("quantization_method") or "bnb").lower()
    if not bits:
        return
    if kind in ("freeze", "full"):
        made.note(f"quant: left out ({origin}), since method {kind} trains weights, which cannot be done in {bits} bits")
    elif kind == "prefix" and bits in (4, 8):  # both tools call ChatGLM's own quantize() for prefixes
        made.put("quant", f"chatglm-int{bits}", origin + ": ChatGLM's own quantisation")
    elif bits in (4, 8) and way in ("bnb", "bitsandbytes", "auto"):
        made.put("quant", {4: "nf4", 8: "int8"}[bits], origin)
        if form == "fp4":
            made.note("quantization_type fp4: 4 bits are nf4 here")
        if bits == 4 and old.has("double_quantization") and not old.flag("double_quantization"):
            made.note("double_quantization false: nf4 quantises its scales too here")
    else:
        made.note(f"quant: left out ({origin}); {bits} bits by {way} are not there (nf4, int8 and ChatGLM's own are)")


def _optimizer(old: Old, made: Made) -> None:
    name = (old.text("optim") or "adamw_torch").lower()
    name = "adafactor" if old.flag("adafactor") else name
    ours = "adafactor" if name == "adafactor" else "adamw8bit" if "8bit" in name and "adam" in name else "adamw"
    if ours != "adamw":
        made.put("optim.kind", ours, old.origin("optim", "adafactor"))
    if ours == "adamw" and name not in ("adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused"):
        made.note(f"optim {name}: not there; adamw in its place")
    if "paged" in name:
        made.note(f"optim {name}: the averages are not moved to main memory when the card is full")
    made.put("optim.lr", old.number("learning_rate"), old.origin("learning_rate"))
    steps = old.whole("max_steps")
    if steps and steps > 0:
        made.put("optim.steps", steps, old.origin("max_steps"))
        old.value("num_train_epochs")
    else:
        made.put("optim.epochs", old.number("num_train_epochs"), old.origin("num_train_epochs"))
    _batch(old, made)
    _schedule(old, made)
    made.put("optim.weight_decay", old.number("weight_decay"), old.origin("weight_decay"))
    clip = old.number("max_grad_norm")
    made.put("optim.clip", clip or None, old.origin("max_grad_norm"))


def _batch(old: Old, made: Made) -> None:
    micro, pieces = old.whole("per_device_train_batch_size", 1), old.whole("gradient_accumulation_steps", 1)
    if old.tool == LORA_TRAINER:
        pieces = max(1, old.whole("batch_size", 1) // micro)
        made.put("optim.batch_size", micro * pieces, f"{old.origin('batch_size')}: rows in one step, in {pieces} parts of {micro}")
        return
    whole = old.whole("global_batch_size")
    if whole:
        made.put("optim.batch_size", whole, old.origin("global_batch_size") + ": rows in one step")
        return
    rows = micro * pieces * (old.cards or 1)
    size = old.called.get("per_device_train_batch_size", "per_device_train_batch_size")
    names = "micro_batch_size" if old.tool == LLAMA_FACTORY_V1 else f"{size}, gradient_accumulation_steps"
    made.put("optim.batch_size", rows, f"{micro} x {pieces} x {old.cards or 1} ({names}, processes)")
    if old.cards is None:
        made.note(
            f"optim.batch_size {rows}: {micro} rows x {pieces} accumulated x 1 process; the old file does not say on how many cards it ran: "
            "multiply by their number"
        )


def _schedule(old: Old, made: Made) -> None:
    name = old.text("lr_scheduler_type") or "linear"
    ours = {"constant_with_warmup": "constant"}.get(name, name)
    if ours not in ("cosine", "linear", "constant"):
        ours = (
            "linear"
            if name in ("polynomial", "inverse_sqrt")
            else "constant"
            if "constant" in name or "stable" in name
            else "cosine"
        )
        made.note(f"lr_scheduler_type {name}: not there; {ours} is the nearest (optim.schedule)")
    made.put("optim.schedule", ours, old.origin("lr_scheduler_type"))
    share, steps = old.number("warmup_ratio"), old.number("warmup_steps")
    if name == "constant":  # transformers warms this one up under another name only
        made.put("optim.warmup", 0, "lr_scheduler_type constant has no warm-up there")
    elif steps:
        made.put("optim.warmup", steps, old.origin("warmup_steps"))
    else:
        made.put("optim.warmup", share, old.origin("warmup_ratio", "warmup_steps"))


def _lengths(old: Old, made: Made) -> None:
    source, target, text = old.whole("max_source_length"), old.whole("max_target_length"), old.whole("text_len")
    if old.tool == LORA_TRAINER and "lora_target" in old.told:  # its version with one limit
        made.put("max_length", old.whole("cutoff_len", 1), old.origin("cutoff_len"))
    elif made.tree["stage"]["kind"] == "pretrain" and old.tool == LORA_TRAINER:
        made.put("max_length", text, old.origin("text_len"))
    elif source is not None and target is not None and old.given.get("cutoff_len") is None:
        names = [old.called.get(name, name) for name in ("max_source_length", "max_target_length")]
        made.put("max_length", source + target, f"{' + '.join(names)}: one limit for question and answer together")
    else:
        made.put("max_length", old.whole("cutoff_len", 1), old.origin("cutoff_len"))
    if old.has("skip_overlength"):
        made.put("too_long", "skip", f"{old.origin('skip_overlength')}: any value meant true there")
        old.taken.add("skip_overlength")
    elif made.tree["stage"]["kind"] != "pretrain":
        made.note(
            f"max_length {made.tree['max_length']}: longer rows were cut in silence there; here they stop the run before it starts, "
            "and it says what to paste (too_long: skip, cut-answer, cut-left-turns)"
        )


def _template(old: Old, made: Made) -> None:
    name, system = old.text("template"), old.text("default_system")
    if old.given.get("default_system") == "":
        system = ""
        made.note("default_system '': there no system turn was written at all; here it is written, and empty")
    if system is not None:
        made.put("system", system, old.origin("default_system"))
    model, pretrain = str(made.tree["model"]).lower(), made.tree["stage"]["kind"] == "pretrain"
    if old.tool in (LLAMA_FACTORY, LLAMA_FACTORY_V1):
        if name is not None:
            _named_template(old, made, name)
        elif not pretrain:
            made.note("template: not given; template auto is the model's own chat format")
    elif old.tool == EFFICIENT:
        if re.search(r"chatglm-?_?6b", model):
            made.note(
                "template: auto, the model's own; there ChatGLM-6B was trained in ChatGLM2's rounds ('[Round 1]'), and chat did the same"
            )
        elif "chatglm2" not in model:
            made.note("template: auto, the model's own; there every model was trained in ChatGLM2's rounds ('[Round 1]')")
    elif old.tool in (CHATGLM_TUNING, PARENT) and not re.search(r"chatglm-?_?6b", model):
        made.note("template: auto, the model's own chat format; there texts stood without one, as ChatGLM-6B's first round does")
    elif old.tool == LORA_TRAINER and "lora_target" in old.told:
        if pretrain:
            made.note(
                "template: none; there 'Below is an instruction ...' and '### ' stood in front of each sentence, and were learned too"
            )
        else:
            made.put("template", dict(HEADINGS), "the headings that its version with CUTOFF_LEN wrote")
    elif old.tool in (LLM_TUNING, LORA_TRAINER) and not pretrain:
        made.put("template", dict(RAW), "texts stood there without a chat format")
        made.note(
            "template: question and answer stand together without a chat format, as there; for a chat model `template: auto` is better, "
            "unless your rows carry a format of their own"
            + ("; the start marks that stood before the answer there are not written" if old.tool == LORA_TRAINER else "")
        )


def _named_template(old: Old, made: Made, name: str) -> None:
    """One of LLaMA-Factory's names."""
    ours = TEMPLATES.get(name, "auto")
    made.put(
        "template",
        ours,
        old.origin("template") + (f" {name}: the model's own chat format, from its folder" if ours == "auto" else ""),
    )
    if ours == "auto":
        made.note(f"template {name}: auto, the chat format in the model's own folder; `glmtune show` prints a row as it is written")
    elif name == "default":
        made.note("template default: as there, but without the end mark behind the question")


def _rest(old: Old, made: Made) -> None:
    if old.flag("bf16") or old.flag("pure_bf16"):
        made.put("precision", "bf16", old.origin("bf16", "pure_bf16"))
        if old.flag("pure_bf16"):
            made.note("pure_bf16: trained weights and the optimizer stay fp32")
    elif old.tool == LLAMA_FACTORY_V1:  # where it is on unless it is switched off
        made.put("precision", "fp32", old.origin("bf16"))
    elif old.flag("fp16"):
        made.put("precision", "fp16", old.origin("fp16"))
        warning = fp16_overflows(str(made.tree["model"]))
        if warning:
            made.note(warning)
    old.taken |= {"bf16", "fp16", "pure_bf16"}
    off = [name for name in ("disable_gradient_checkpointing",) if old.flag(name)]
    if old.tool == LLAMA_FACTORY_V1 and not old.flag("gradient_checkpointing"):
        off = ["gradient_checkpointing"]
    if off:
        made.put("checkpointing", False, old.origin(*off))
    elif old.flag("gradient_checkpointing"):
        made.put("checkpointing", True, old.origin("gradient_checkpointing"))
    old.taken.add("gradient_checkpointing")
    noise = old.number("neftune_noise_alpha")
    if noise:
        made.put("neftune", noise, old.origin("neftune_noise_alpha"))
    strategy, every = old.text("save_strategy") or "steps", old.whole("save_steps", share=True)
    if strategy == "steps" and every and every >= 1:
        made.put("save.every_steps", every, old.origin("save_steps"))
    elif strategy == "no":
        made.note("save_strategy no: checkpoints are written all the same, every 5 minutes, so that a run can be resumed")
    keep = old.whole("save_total_limit")
    if keep and keep > 0:
        made.put("save.keep", keep, old.origin("save_total_limit"))
    else:
        made.note("save.keep: there all checkpoints were kept, here the newest 2 and the best one")
    seed = old.whole("seed")
    if seed is not None:
        made.put("seed", seed, old.origin("seed") + ": of another order of rows than there")
    if old.flag("packing") and not old.flag("neat_packing"):
        made.note("packing: rows are put together without padding anyway, and never see each other (there: neat_packing)")
    old.taken |= {"packing", "neat_packing", "data_seed"}
    _curves(old, made)


def _curves(old: Old, made: Made) -> None:
    wanted = [name for name in old.names("report_to") if name != "all"]
    if old.flag("use_swanlab"):
        wanted.append("swanlab")
    known = [name for name in wanted if name in ("tensorboard", "wandb", "swanlab")]
    if known or (old.has("report_to") and not wanted):
        made.put("report_to", known, old.origin("report_to", "use_swanlab"))
    others = [name for name in wanted if name not in known]
    if others:
        made.note(f"report_to {', '.join(others)}: not there; tensorboard, wandb and swanlab are")


# --- the file ---------------------------------------------------------------------------------------------------------------


def _lines(tree: dict[str, Any], comments: dict[str, str], path: str = "") -> list[str]:
    lines: list[str] = []
    indent = "  " * path.count(".")
    for key, value in tree.items():
        comment = comments.get(path + key, "")
        behind = f"  # {_line(comment)}" if comment else ""
        if isinstance(value, dict) and path + key not in comments:  # a group of options, each with its own comment
            lines += [f"{indent}{key}:", *_lines(value, comments, f"{path}{key}.")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{indent}{key}:{behind}", *(f"{indent}  - {_flow(item)}" for item in value)]
        else:
            lines.append(f"{indent}{key}: {_flow(value)}{behind}")
    return lines


class _Dumper(yaml.SafeDumper):
    """A text with newlines is one line in double quotes."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)
)


def _flow(value: Any) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()

"""Run files of the older tools -> ours: LLaMA-Factory, ChatGLM-Efficient-Tuning, LLM-Tuning, chatglm_tuning, ChatGLM2-LoRA-Trainer.

Every argument of the old file becomes an option, or is listed with the reason why not; where a value changes its meaning, that is said.
What the old tool did when an argument was absent is written out too, since its defaults are not ours. The names and defaults are
those of the tools' own argument classes; an old name is brought to LLaMA-Factory's (ALIASES), so that one conversion serves all.
"""

import contextlib
import json
import math
import re
import reprlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from . import options, sources
from .errors import UserError
from .run import Run, load_run

Say = Callable[[str], None]
SUFFIXES = (".yaml", ".yml", ".json", ".sh", ".bash", ".txt")

LLAMA_FACTORY, EFFICIENT, LLM_TUNING = "LLaMA-Factory", "ChatGLM-Efficient-Tuning", "LLM-Tuning"
CHATGLM_TUNING, LORA_TRAINER = "chatglm_tuning", "ChatGLM2-LoRA-Trainer"

TRAINER = {  # transformers' TrainingArguments, on which all five stand
    "learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear", "warmup_ratio": 0, "weight_decay": 0, "max_grad_norm": 1.0, "save_steps": 500,
    "finetuning_type": "lora", "stage": "sft", "lora_rank": 8,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    LLAMA_FACTORY: {
        "lora_dropout": 0, "lora_target": "all", "dataset_dir": "data", "cutoff_len": 2048,
        "freeze_trainable_layers": 2, "freeze_trainable_modules": "all",
    },
    EFFICIENT: {
        "model_name_or_path": "THUDM/chatglm-6b", "dataset": "alpaca_zh", "dataset_dir": "data", "lora_alpha": 32, "lora_dropout": 0.1,
        "lora_target": "query_key_value", "max_source_length": 512, "max_target_length": 512, "freeze_trainable_layers": 3,
        "freeze_trainable_modules": "mlp", "pre_seq_len": 64,
    },
    LLM_TUNING: {"lora_alpha": 32, "lora_dropout": 0.1, "lora_target": "query_key_value", "cutoff_len": 2040},
    CHATGLM_TUNING: {
        "model_name_or_path": "THUDM/chatglm-6b", "lora_alpha": 32, "lora_dropout": 0.05, "lora_target": "query_key_value",
        "max_source_length": 1024, "max_target_length": 1024,
    },
    LORA_TRAINER: {
        "model_name_or_path": "THUDM/chatglm2-6b", "per_device_train_batch_size": 4, "batch_size": 8, "num_train_epochs": 100,
        "warmup_steps": 100, "learning_rate": 2e-5, "lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0.05, "save_steps": 1000,
        "save_total_limit": 3, "max_source_length": 256, "max_target_length": 256, "text_len": 256, "output_dir": "./output_model",
        "data_path": "./train_data.json", "data_type": "json",
        "lora_target": "query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    },
}  # fmt: skip
ALIASES: dict[str, dict[str, str]] = {
    LLAMA_FACTORY: {
        "checkpoint_dir": "adapter_name_or_path", "num_layer_trainable": "freeze_trainable_layers", "prompt_template": "template",
        "name_module_trainable": "freeze_trainable_modules", "dev_ratio": "val_size", "lora_modules": "lora_target",
    },
    EFFICIENT: {
        "checkpoint_dir": "adapter_name_or_path", "num_layer_trainable": "freeze_trainable_layers", "dev_ratio": "val_size",
        "name_module_trainable": "freeze_trainable_modules",
    },
    LLM_TUNING: {"previous_lora_weights": "adapter_name_or_path", "max_seq_length": "cutoff_len"},
    CHATGLM_TUNING: {
        "max_input_length": "max_source_length", "max_output_length": "max_target_length", "int8": "load_in_8bit",
        "ptuning_checkpoint": "adapter_name_or_path", "no_gradient_checkpointing": "disable_gradient_checkpointing",
    },
    LORA_TRAINER: {
        "MICRO_BATCH_SIZE": "per_device_train_batch_size", "EPOCHS": "num_train_epochs", "LORA_R": "lora_rank", "BIT_8": "load_in_8bit",
        "MODEL_NAME": "model_name_or_path", "BIT_4": "load_in_4bit", "CONTEXT_LEN": "max_source_length", "TARGET_LEN": "max_target_length",
    },
}  # fmt: skip
COMMON = {"evaluation_strategy": "eval_strategy", "noise_alpha": "neftune_noise_alpha", "max_seq_len": "cutoff_len"}

# LLM-Tuning: one script for each base model, the model's id written into it.
SCRIPTS: dict[str, dict[str, Any]] = {
    "chatglm_lora_tuning.py": {"model_name_or_path": "THUDM/chatglm-6b", "no_prompt_loss": 1},
    "chatglm2_lora_tuning.py": {"model_name_or_path": "THUDM/chatglm2-6b", "no_prompt_loss": 1},
    "baichuan_lora_tuning.py": {"model_name_or_path": "baichuan-inc/baichuan-7B", "lora_target": "W_pack"},
    "baichuan2_lora_tuning.py": {"model_name_or_path": "baichuan-inc/Baichuan2-7B-Chat", "lora_target": "W_pack"},
    "internlm_lora_tuning.py": {"model_name_or_path": "internlm/internlm-chat-7b", "lora_target": "q_proj,k_proj,v_proj"},
    "chinese_llama2_alpaca2_lora_tuning.py": {"model_name_or_path": "hfl/chinese-llama-2-7b", "lora_target": "all"},
    "llama2_lora_tuning.py": {"model_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "lora_target": "all", "lora_alpha": 16},
    "qwen1.5_lora_tuning.py": {"model_name_or_path": "Qwen/Qwen1.5-4B-Chat", "lora_target": "all", "lora_alpha": 16},
}
VERSIONS = {  # its --model_version chooses another model
    ("baichuan2_lora_tuning.py", "base-7b"): "baichuan-inc/Baichuan2-7B-Base",
    ("internlm_lora_tuning.py", "base-7b"): "internlm/internlm-7b",
    ("chinese_llama2_alpaca2_lora_tuning.py", "chat"): "hfl/chinese-alpaca-2-7b",
}
TRAINING = {"train_bash.py", "train_sft.py", "train_rm.py", "train_ppo.py", "finetune.py", "train.py", "run_exp.py", "main.py",
            "train_lora.py", "train_ptuning.py", *SCRIPTS}  # fmt: skip
USES = {  # what else their scripts did, and who does it here
    "cli_demo.py": "glmtune chat", "infer.py": "glmtune chat", "inference.py": "glmtune chat", "web_demo.py": "glmtune chat",
    "predict.py": "glmtune predict", "predict_llama2.py": "glmtune predict", "predict_qwen.py": "glmtune predict",
    "export_model.py": "glmtune export", "evaluate.py": "glmtune predict",
}  # fmt: skip

RAW = {"system": "{content}", "user": "{content}", "assistant": "{content}{stop}"}
TEMPLATES: dict[str, Any] = {  # LLaMA-Factory's names that are not simply the model's own format
    **{name: name for name in ("alpaca", "chatml", "chatglm2", "chatglm3", "codegeex2", "baichuan", "baichuan2", "llama2")},
    "intern": "internlm", "intern2": "internlm2", "llama2_zh": "chinese-alpaca-2", "empty": RAW, "vanilla": RAW,
    "fewshot": {"system": "{content}", "user": "{content}", "assistant": "{content}{stop}\n\n"},
    "default": {"system": "System: {content}\n", "user": "Human: {content}\n", "assistant": "Assistant:{content}{stop}\n"},
}  # fmt: skip
STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
FUSED = ("query_key_value", "W_pack", "wqkv")  # published as one layer, three layers here (except in ChatGLM-6B)
MLP = {"mlp", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "feed_forward", "dense_h_to_4h", "dense_4h_to_h"}
ATTENTION = {"attention", "self_attn", "self_attention", "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "W_pack"}
OFF = ("", "none", "null", "false", "no", "off", "0", "0.0", "-1")

# Arguments that need nothing here, and arguments that have no counterpart; each with the reason.
NOT_NEEDED: dict[str, str] = {
    "do_train": "`glmtune train` says it",
    "plot_loss": "loss.png is always drawn",
    "logging_steps logging_dir logging_strategy logging_first_step log_level include_num_input_tokens_seen include_effective_tokens_per_second disable_tqdm":
        "log.jsonl gets every step",
    "overwrite_output_dir": "a folder that is not empty is never overwritten; give another out",
    "overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path dataloader_num_workers dataloader_pin_memory"
    " dataloader_prefetch_factor dataloader_persistent_workers streaming buffer_size data_shared_file_system save_name":
        "rows are read one at a time, tokenised once by all cores, and found again by what they follow from",
    "remove_unused_columns ignore_pad_token_for_loss group_by_length ignore_data_skip full_determinism":
        "micro-batches hold no padding, and their cut changes no result",
    "per_device_eval_batch_size eval_accumulation_steps": "micro-batches follow from optim.micro_tokens",
    "trust_remote_code": "code that comes with a checkpoint is never run",
    "save_safetensors save_only_model": "weights are safetensors; the optimizer's state lies beside them, for --resume",
    "ddp_timeout ddp_find_unused_parameters ddp_backend local_rank model_parallel dispatch_batches": "training runs in one process",
    "flash_attn use_reentrant_gc low_cpu_mem_usage use_fast_tokenizer use_cache enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels":
        "chosen by the program",
    "upcast_layernorm upcast_lmhead_output compute_dtype tf32 fp16_full_eval bf16_full_eval fp16_opt_level half_precision_backend":
        "sums, norms and trained weights are fp32 (docs/run-files.md, Precision)",
    "run_name": "the folder's name is the run's name",
    "IF_CHATGLM2": "the model's own files tell what it is",
    "model_path model_version train_args_file": "taken over with the model and the arguments",
    "model_checkpoint": "the model is that of the training script",
    "double_quantization": "nf4 always quantises its scales too",
    "do_eval": "rows under eval are looked at while training",
    "split": "the train split is taken where files are named after splits",
    "ray_num_workers": "training runs in one process",
}  # fmt: skip
NO_COUNTERPART: dict[str, str] = {
    "do_predict predict_with_generate do_sample temperature top_p top_k num_beams max_new_tokens max_length repetition_penalty length_penalty"
    " eval_num_beams generation_max_length PROMPT TEMPERATURE LORA_CHECKPOINT_DIR compute_accuracy":
        "training makes no predictions; `glmtune predict` and `glmtune chat` take these as options, and decode greedily unless told",
    "resume_from_checkpoint": "checkpoints of other tools hold other optimizer states; our own runs continue with `glmtune train OUT/run.yaml --resume`",
    "deepspeed fsdp fsdp_config use_mca use_megatron_bridge use_hyper_parallel hyper_parallel_args": "training runs in one process",
    "source_prefix": "ChatGLM has no system turn: write it in front of the first question of each row",
    "use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank"
    " apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode"
    " badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode use_adam_mini use_muon":
        "the optimizers are adamw, adamw8bit and adafactor",
    "adam_beta1 adam_beta2 adam_epsilon optim_args": "the optimizer's constants are fixed: AdamW with 0.9, 0.999 and 1e-8",
    "pref_beta pref_ftx pref_loss pref_bco_weight dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs"
    " ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters"
    " reward_model_quantization_bit reward_model_type ld_alpha": "this stage cannot be trained yet",
    "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha label_smoothing_factor": "the loss is cross-entropy over the learned tokens",
    "use_llama_pro shift_attn mixture_of_depths rope_scaling train_from_scratch moe_aux_loss_coef resize_vocab add_tokens add_special_tokens"
    " new_special_tokens_config init_special_tokens split_special_tokens": "the model is taken as it was published",
    "freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir image_max_pixels image_min_pixels video_max_pixels"
    " video_min_pixels video_fps video_maxlen": "models that see or hear are not trained here",
    "pissa_iter": "PiSSA starts from the exact singular vectors",
    "pissa_convert": "the adapter is written so that it opens on the base as it is",
    "loraplus_lr_embedding": "LoRA does not sit on embeddings here",
    "early_stopping_steps": "a run ends after its epochs; the best checkpoint by dev loss is kept",
    "disable_shuffling": "rows are shuffled anew in every epoch, by the seed",
    "tool_format enable_thinking preserve_thinking": "tool calls and thoughts are written as the model's own chat format has them",
    "cache_dir": "the hub's cache is moved with HF_HOME, ours with GLMTUNE_CACHE",
    "hf_hub_token ms_hub_token om_hub_token use_auth_token": "log in with `hf auth login`; the token was not copied",
    "push_to_hub hub_model_id hub_strategy hub_private_repo hub_token export_hub_model_id": "nothing is uploaded",
    "config_name tokenizer_name adapter_folder": "a model's or adapter's folder is taken whole",
    "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url"
    " swanlab_lark_secret project": "the project is called glmtune; log in as swanlab or wandb say",
    "oft_rank oft_target oft_block_size module_dropout": "OFT is not there",
    "quantization_device_map": "the frozen weights are on one device",
    "eval_on_each_dataset": "the dev rows are one set",
    "metric_for_best_model greater_is_better": "the best checkpoint is the one with the lowest dev loss",
    "use_ray master_addr master_port": "training runs in one process",
    "eval_delay eval_on_start": "the dev rows are looked at every eval.every_steps steps and at the end",
    "auto_find_batch_size": "micro-batches follow from optim.micro_tokens, the batch size stays",
}  # fmt: skip
_REASONS = {name: (kind, why) for kind, table in (("not needed", NOT_NEEDED), ("no counterpart", NO_COUNTERPART))
            for names, why in table.items() for name in names.split()}  # fmt: skip
_SECRET = re.compile(r"(token|key)s?$|secret|webhook|passw|pwd|credential|auth", re.IGNORECASE)


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
    old = _read(path)
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
    options.write_whole(to, text)
    try:
        return load_run(to)
    except UserError:  # nothing is left behind that the next import would find
        to.unlink()
        raise


# --- what was read ----------------------------------------------------------------------------------------------------------


@dataclass
class Old:
    """The arguments of one old run under canonical names. What nobody has asked for at the end has no counterpart."""

    tool: str
    given: dict[str, Any]
    called: dict[str, str]  # canonical name -> as the old file has it
    defaults: dict[str, Any]
    folder: Path  # where the old file lies
    cards: int | None = None  # processes it ran in; None: the file does not say
    told: dict[str, str] = field(default_factory=dict)  # values that stood elsewhere, in the script or nowhere -> where
    beside: list[str] = field(default_factory=list)  # further remarks: other commands of the same file
    taken: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        return name in self.given

    def value(self, name: str) -> Any:
        """The value given, or else the tool's own default (None: neither)."""
        self.taken.add(name)
        found = self.given.get(name, self.defaults.get(name))
        return None if _empty(found) else found

    def number(self, name: str) -> Any:
        return _number(self.called.get(name, name), self.value(name))

    def whole(self, name: str, least: int | None = None, share: bool = False) -> Any:
        """A whole number. least: it cannot be absent, and is no smaller; share: below 1 it is a part of the whole."""
        found = self.number(name)
        if share and found is not None and abs(found) < 1:
            return found
        if (isinstance(found, float) and not found.is_integer()) or (least is not None and (found is None or found < least)):
            raise self._wrong(name, "a whole number" + (f" of {least} or more" if least is not None else ""), found)
        return found if found is None else int(found)

    def flag(self, name: str) -> bool:
        found = self.value(name)
        if isinstance(found, str) and found.lower() in ("true", "false", "1", "0", "yes", "no", "t", "f", "y", "n"):
            return found.lower() in ("true", "1", "yes", "t", "y")
        if isinstance(found, str | list | dict):
            raise self._wrong(name, "true or false", found)
        return bool(found)

    def text(self, name: str, found: Any = None) -> str | None:
        """found: one text of a list that stands under this name."""
        found = self.value(name) if found is None else found
        if found is True or not (found is None or isinstance(found, str | int | float | date)):
            raise self._wrong(name, "a text", found)
        return None if found is None or found is False else str(found)

    def names(self, name: str) -> list[str]:
        found = self.value(name)
        items = [self.text(name, item) for item in found] if isinstance(found, list) else (self.text(name) or "").split(",")
        return [item.strip() for item in items if item and item.strip()]

    def _wrong(self, name: str, wanted: str, found: Any) -> UserError:
        return _wrong(self.called.get(name, name), wanted, found)

    def origin(self, *names: str) -> str:
        """Where a value comes from, for the comment behind it."""
        given = [self.called[name] for name in names if name in self.called]
        absent = [name for name in names if name in self.defaults]
        if given or not absent:
            return ", ".join(given)
        return self.told.get(absent[0], f"{absent[0]} was not given: the old default")

    def left(self, told: str) -> list[str]:
        """A line for every argument that became no option and does not stand in `told`, with the reason."""
        lines: dict[str, list[str]] = {}
        for name in self.given:
            called, value = self.called[name], self.given[name]
            if name in self.taken and re.search(rf"\b{re.escape(called)}\b", told):
                continue
            kind, why = _REASONS.get(called) or _REASONS.get(name) or ("no counterpart", "")
            if name in self.taken and not why:
                kind, why = "not needed", "it was off, or another argument decides"
            if kind == "no counterpart" and not isinstance(value, list | dict) and str(value).lower() in OFF:
                kind, why = "not needed", "it was off"
            if not why:
                why = "this name is not known here; `glmtune options` lists ours"
            shown = called if kind == "not needed" or _SECRET.search(called) else f"{called} ({_short(value)})"
            lines.setdefault(f"{kind}: {{}}: {why}", []).append(shown)
        ordered = sorted(lines, key=lambda line: line.startswith("not needed"))
        return [line.format(", ".join(lines[line])) for line in ordered] + self.beside


def _number(name: str, found: Any) -> Any:
    if isinstance(found, str):
        with contextlib.suppress(ValueError):
            found = float(found) if not re.fullmatch(r"[-+]?\d+", found) else int(found)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not -math.inf < found < math.inf):
        raise _wrong(name, "a number", found)
    return found


def _wrong(name: str, wanted: str, found: Any) -> UserError:
    return UserError(f"{_line(name)}: wanted {wanted}, got {reprlib.repr(found)}")


def _short(value: Any) -> str:
    if isinstance(value, list | dict):  # what lies inside may be a secret, or the list itself
        return "[...]" if isinstance(value, list) else "{...}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _line(text: str) -> str:
    """What stands in a comment. Newlines and other control characters are escaped, so that no text of the old file can end it."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and value.strip().lower() in ("none", "null", ""))


def _old(tool: str, given: dict[str, Any], folder: Path, cards: int | None = None, where: str = "", **told: Any) -> Old:
    """told: what the arguments do not hold, since it stands in the old script; `where` says so."""
    aliases = {**COMMON, **ALIASES[tool]}
    old = Old(tool, {}, {}, {**TRAINER, **DEFAULTS[tool], **told}, folder, cards, dict.fromkeys(told, where))
    for key, value in given.items():
        plain = str(key).replace("-", "_")
        name = aliases.get(plain, plain)
        if tool == LORA_TRAINER and name == plain and plain not in _REASONS:  # its other names are LLaMA-Factory's in capitals
            name = plain.lower()
        if _empty(value) and old.defaults.get(name) is not None and name != "max_grad_norm":  # there, null means no clipping
            old.beside.append(f"changed: {key}: empty, so the old default, {_short(old.defaults[name])}")
            continue
        if name in old.given:
            old.beside.append(f"not needed: {old.called[name]}: {key} says the same, and was taken")
        old.given[name], old.called[name] = value, str(key)
    return old


def _read(path: Path) -> Old:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix.lower() in (".sh", ".bash", ".txt"):
        return _read_shell(path)
    tree = _tree(path)
    if {"model", "data"} <= set(tree) and "model_name_or_path" not in tree:
        raise UserError(f"{path} is a run file of glmtune already; train it: glmtune train {path}")
    theirs = {"model_name_or_path", "finetuning_type", "stage", "dataset", "template"} & set(tree)
    if not theirs and {"output_dir", "learning_rate", "per_device_train_batch_size"} & set(tree):
        return _training_arguments(tree, path)
    if not theirs:
        raise UserError(
            f"{path}: not a run file of a tool that is known here ({', '.join(DEFAULTS)}); its keys are {', '.join(map(str, list(tree)[:8]))}"
        )
    return _hf(tree, path.parent, None, str(path))


def _tree(path: Path) -> dict[str, Any]:
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        tree = json.loads(path.read_text(encoding="utf-8")) if form == "JSON" else options.read(path)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # of YAML: a date that is none
        raise UserError(f"{path}: not valid {form}: {'nested too deep' if isinstance(error, RecursionError) else error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: arguments are one JSON object; this is a {type(tree).__name__}")
    return tree


def _hf(given: dict[str, Any], folder: Path, cards: int | None, shown: str) -> Old:
    """Arguments of LLaMA-Factory or of its forerunner, told apart by what only one of them has."""
    if given.get("export_dir") is not None:
        adapter = given.get("adapter_name_or_path") or given.get("checkpoint_dir")
        raise UserError(
            f"{shown} exports a model and trains nothing; here that is: glmtune export {given.get('model_name_or_path', 'MODEL')}"
            f"{f' --adapter {adapter}' if adapter else ''} --to {given['export_dir']}"
        )
    trains = str(given.get("do_train", "")).lower() in ("true", "1", "yes")
    if not trains and any(str(given.get(name, "")).lower() in ("true", "1", "yes") for name in ("do_predict", "do_eval")):
        raise UserError(
            f"{shown} predicts or evaluates and trains nothing (do_train is absent); here that is: glmtune predict MODEL DATA --out answers.jsonl"
        )
    if not trains and "output_dir" not in given:
        raise UserError(
            f"{shown} starts a chat or a server and trains nothing (no do_train, no output_dir); here that is: glmtune chat MODEL"
        )
    if str(given.get("finetuning_type") or "").lower() == "none":
        raise UserError(f"{shown}: finetuning_type none trains nothing")
    only_efficient = {
        "max_source_length",
        "max_target_length",
        "dev_ratio",
        "pre_seq_len",
        "prefix_projection",
        "resume_lora_training",
    }
    efficient = "template" not in given and "prompt_template" not in given and "cutoff_len" not in given
    efficient = efficient and bool(
        only_efficient & set(given) or given.get("finetuning_type") == "p_tuning" or "model_name_or_path" not in given
        or "chatglm" in str(given["model_name_or_path"]).lower()
    )  # fmt: skip
    return _old(EFFICIENT if efficient else LLAMA_FACTORY, given, folder, cards)


def _training_arguments(tree: dict[str, Any], path: Path) -> Old:
    """chatglm_tuning's JSON alone: model, data and method stood on the command line, so they are guessed, and that is said."""
    signs = f"{path.name} {tree.get('output_dir', '')}".lower()
    rate = None if _empty(tree.get("learning_rate")) else _number(f"{path}: learning_rate", tree["learning_rate"])
    if tree.get("deepspeed"):
        script, implied = "train_ptuning.py", {"finetuning_type": "full"}
    elif "tuning" in signs.replace("chatglm_tuning", "") or "prefix" in signs or (rate or 0) >= 5e-3:
        script, implied = "train_ptuning.py", {"finetuning_type": "p_tuning", "pre_seq_len": 128}
    else:
        script, implied = "train_lora.py", {"finetuning_type": "lora"}
    old = _old(CHATGLM_TUNING, tree, path.parent, None, "a guess", model_name_or_path="THUDM/chatglm-6b", **implied)
    old.beside.append(
        f"guessed: model, data and method stood on the command line, not in this file; it looks like {script} on THUDM/chatglm-6b. "
        "Set model, data and method in the new file, or import a .sh file that holds the command"
    )
    return old


# --- shell ------------------------------------------------------------------------------------------------------------------


def _commands(path: Path) -> list[tuple[dict[str, str], list[str]]]:
    """(environment, words) of each command of a script. Variables that it sets are filled in; comments go."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    variables: dict[str, str] = {}
    found: list[tuple[dict[str, str], list[str]]] = []
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            words = list(lexer)
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as a command line: {error}: {_short(line.strip())}") from None
        command: list[str] = []
        for word in [*words, ";"]:
            if not set(word) <= set(";&|"):
                command.append(word)
                continue
            command = command[1:] if command[:1] == ["export"] else command
            env: dict[str, str] = {}
            while command and re.match(r"[A-Za-z_]\w*=", command[0]):
                name, _, value = command.pop(0).partition("=")
                env[name] = value
            if command:
                found.append(({**variables, **env}, command))
            else:
                variables.update(env)
            command = []
    return found


def _read_shell(path: Path) -> Old:
    runs: list[tuple[dict[str, str], list[str], int]] = []  # with the place of the script among the words
    beside: list[str] = []
    tokenised: dict[str, dict[str, Any]] = {}
    for env, words in _commands(path):
        names = [Path(word).name for word in words]
        at = next((i for i, name in enumerate(names) if name in TRAINING or name in ("llamafactory-cli", "lmf")), None)
        other = next((name for name in names if name in USES), None)
        if "tokenize_dataset_rows.py" in names:
            arguments = _arguments(words[names.index("tokenize_dataset_rows.py") + 1 :])
            tokenised[str(arguments.get("save_name", "temp"))] = arguments
        elif words[0].startswith("--"):
            runs.append((env, ["train", *words], 0))
        elif at is not None and names[at] in ("llamafactory-cli", "lmf") and names[at + 1 : at + 2] != ["train"]:
            beside.append(f"not imported: `{' '.join(words[at : at + 2])}` trains nothing")
        elif at is not None:
            runs.append((env, words, at))
        elif other is not None:
            beside.append(f"not imported: {other}: here that is `{USES[other]}`")
    trained = [run for run in runs if not _only_predicts(run[1])] or runs
    if not trained:
        raise UserError(f"{path}: holds no command that starts a training of {', '.join(DEFAULTS)}")
    beside += ["not imported: a command that predicts: here that is `glmtune predict`"] * (len(runs) - len(trained))
    if len(trained) > 1:
        beside.append(
            f"not imported: {len(trained) - 1} more trainings in this file; the first was taken, put each of the others into a file of its own"
        )
    env, words, at = trained[0]
    old = _of_command(path, env, words, at, tokenised)
    old.beside += beside
    for name, value in old.given.items():
        if isinstance(value, str) and (unset := re.search(r"\$\{?\w+\}?", value)):
            raise UserError(
                f"{path}: {old.called[name]} is {value}, and {unset[0]} is set nowhere in this file; write its value there"
            )
    if env.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true") and isinstance(old.given.get("model_name_or_path"), str):
        old.given["model_name_or_path"] = f"modelscope:{old.given['model_name_or_path']}"
    return old


def _only_predicts(words: Sequence[str]) -> bool:
    return "--do_train" not in words and ("--do_predict" in words or "--do_eval" in words)


def _arguments(words: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--flag`, `--name a b` -> {name: value}, texts as they stand."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else True
        elif name:
            before = found[name]
            found[name] = word if before is True else [*before, word] if isinstance(before, list) else [before, word]
    return found


def _of_command(path: Path, env: dict[str, str], words: list[str], at: int, tokenised: dict[str, dict[str, Any]]) -> Old:
    script, rest = Path(words[at]).name, words[at + 1 :]
    cards = _cards(env, words[:at], script)
    if script in ("llamafactory-cli", "lmf"):
        rest = rest[1:]
    given = _arguments(rest)
    file = next((word for word in rest[:1] if Path(word).suffix in (".yaml", ".yml", ".json")), None)
    if file is not None:
        pairs = (word.partition("=") for word in rest[1:] if "=" in word and not word.startswith("--"))
        given = {**_tree(_beside(path.parent, file)), **{key: options.plain_value(value) for key, _, value in pairs}, **given}
    if script in SCRIPTS:
        version = VERSIONS.get((script, str(given.get("model_version"))))
        implied = {"model_name_or_path": version} if version else {}
        told = {"no_prompt_loss": 0, "lora_target": "query_key_value", "lora_alpha": 32, **SCRIPTS[script], **implied}
        rows = tokenised.get(str(given.get("tokenized_dataset")), {})
        return _old(LLM_TUNING, {**given, **rows}, path.parent, 1, f"written into {script}", **told)
    if script in ("train_lora.py", "train_ptuning.py"):
        arguments = given.get("train_args_file")
        if arguments is None:
            raise UserError(f"{path}: {script} needs --train_args_file FILE.json")
        given = {**_tree(_beside(path.parent, str(arguments))), **given}
        kind = "lora" if script == "train_lora.py" else "p_tuning" if "pre_seq_len" in given else "full"
        old = _old(CHATGLM_TUNING, given, path.parent, cards, script, finetuning_type=kind)
        if kind == "lora" and old.has("resume_from_checkpoint"):  # it loads the adapter's weights, nothing else
            old.given["adapter_name_or_path"] = old.given.pop("resume_from_checkpoint")
            old.called["adapter_name_or_path"] = old.called.pop("resume_from_checkpoint")
        return old
    if script == "main.py" or any(name.isupper() and len(name) > 1 for name in given):
        return _old(LORA_TRAINER, given, path.parent, 1)
    return _hf(given, path.parent, cards, str(path))


def _beside(folder: Path, name: str) -> Path:
    return Path(name) if Path(name).exists() else folder / name


def _cards(env: dict[str, str], before: Sequence[str], script: str) -> int | None:
    """In how many processes the command trained: what its launcher says, or the cards it sees."""
    said = {name.replace("-", "_"): value for name, value in _arguments(before).items()}
    for name in ("nproc_per_node", "num_processes", "num_gpus"):
        if str(said.get(name, "")).isdigit():
            nodes = str(said.get("nnodes", said.get("num_nodes", "1")))
            return int(said[name]) * (int(nodes) if nodes.isdigit() and name != "num_processes" else 1)
    visible = env.get("NPROC_PER_NODE") or env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return int(visible) if "NPROC_PER_NODE" in env and visible.isdigit() else len(visible.split(","))


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
    return made


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
    if old.tool in (LLAMA_FACTORY, EFFICIENT):
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
    elif old.tool == LLM_TUNING:
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
    chances = [_number("interleave_probs", chance) for chance in old.names("interleave_probs")]
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
        raise UserError("names no data (--tokenized_dataset)")
    path = _found(old, f"data/{file}" if file else f"data/{name}.json")
    keys = {"prompt": old.text("prompt_key") or "prompt", "response": old.text("target_key") or "target"}
    entry: dict[str, Any] = {"path": path, "columns": keys}
    if file is None:
        made.note(
            f"data: '{name}' is a folder of tokens; the rows themselves are wanted here. {path} and its keys prompt and target are a guess: "
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
    elif old.tool == LLM_TUNING and not old.number("no_prompt_loss"):
        learn = ("everything", old.origin("no_prompt_loss") + ": the prompt was learned too")
    elif old.flag("train_on_prompt"):
        learn = ("everything", old.origin("train_on_prompt"))
    elif old.flag("mask_history"):
        learn = ("last", old.origin("mask_history"))
    old.taken |= {"no_prompt_loss", "train_on_prompt", "mask_history"}
    if learn:
        made.put("stage.learn", *learn)
    if old.tool == LORA_TRAINER:
        made.note(
            "what is learned: the answers, as intended there; its collator in fact learned the questions too (stage.learn: everything)"
        )


def _method(old: Old, made: Made) -> None:
    kind = old.text("finetuning_type") or ""
    ours = {"lora": "lora", "p_tuning": "prefix", "freeze": "freeze", "full": "full"}.get(kind)
    if ours is None:
        raise UserError(f"finetuning_type {kind!r} has no counterpart; methods are lora, prefix, freeze, full")
    made.put("method.kind", ours, old.origin("finetuning_type"))
    {"lora": _lora, "prefix": _prefix, "freeze": _freeze, "full": _full}[ours](old, made)
    others = {name for name in old.given if name.startswith(("lora_", "freeze_trainable", "freeze_extra", "pissa_", "use_dora", "use_rslora",
              "loraplus_", "additional_target", "pre_seq_len", "prefix_projection", "create_new_adapter", "resume_lora_training"))}  # fmt: skip
    spare = sorted(name for name in others - old.taken if name not in _REASONS)
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
    if old.tool == LORA_TRAINER:
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
    for name, number in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if old.flag(name):
            bits, origin = number, old.origin(name)
    form, way = old.text("quantization_type"), (old.text("quantization_method") or "bnb").lower()
    if not bits:
        return
    if kind in ("freeze", "full"):
        made.note(f"quant: left out ({origin}), since method {kind} trains weights, which cannot be done in {bits} bits")
    elif kind == "prefix" and bits in (4, 8):  # both tools call ChatGLM's own quantize() for prefixes
        made.put("quant", f"chatglm-int{bits}", origin + ": ChatGLM's own quantisation")
    elif bits in (4, 8) and way in ("bnb", "bitsandbytes"):
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
    rows = micro * pieces * (old.cards or 1)
    names = "per_device_train_batch_size, gradient_accumulation_steps"
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
    if made.tree["stage"]["kind"] == "pretrain" and old.tool == LORA_TRAINER:
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
    if system is not None:
        made.put("system", system, old.origin("default_system"))
    if old.tool == LLAMA_FACTORY:
        if name is None and made.tree["stage"]["kind"] == "pretrain":
            return
        if name is None:
            made.note("template: not given; template auto is the model's own chat format")
            return
        ours = TEMPLATES.get(name, "auto")
        made.put(
            "template",
            ours,
            old.origin("template") + (f" {name}: the model's own chat format, from its folder" if ours == "auto" else ""),
        )
        if ours == "auto":
            made.note(
                f"template {name}: auto, the chat format in the model's own folder; `glmtune show` prints a row as it is written"
            )
        elif name == "default":
            made.note("template default: as there, but without the end mark behind the question")
    elif old.tool == EFFICIENT:
        made.note(
            "template: auto, the model's own; there ChatGLM-6B was trained in ChatGLM2's rounds ('[Round 1]'), and chat did the same"
        )
    elif old.tool == CHATGLM_TUNING and "chatglm-6b" not in str(made.tree["model"]).lower():
        made.note("template: auto, the model's own chat format; there texts stood without one, as ChatGLM-6B's first round does")
    elif old.tool in (LLM_TUNING, LORA_TRAINER) and made.tree["stage"]["kind"] != "pretrain":
        made.put("template", dict(RAW), "texts stood there without a chat format")
        made.note(
            "template: question and answer stand together without a chat format, as there; for a chat model `template: auto` is better, "
            "unless your rows carry a format of their own"
            + ("; the start marks that stood before the answer there are not written" if old.tool == LORA_TRAINER else "")
        )


def _rest(old: Old, made: Made) -> None:
    if old.flag("bf16") or old.flag("pure_bf16"):
        made.put("precision", "bf16", old.origin("bf16", "pure_bf16"))
        if old.flag("pure_bf16"):
            made.note("pure_bf16: trained weights and the optimizer stay fp32")
    elif old.flag("fp16"):
        made.put("precision", "fp16", old.origin("fp16"))
        if re.search(r"chatglm3|glm-?4", str(made.tree["model"]).lower()):
            made.note("fp16: numbers of ChatGLM3 and GLM-4 pass fp16's largest; use precision: bf16 or fp32")
    old.taken |= {"bf16", "fp16", "pure_bf16"}
    if old.flag("disable_gradient_checkpointing"):
        made.put("checkpointing", False, old.origin("disable_gradient_checkpointing"))
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


def _flow(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        .removesuffix("...\n")
        .strip()
    )

"""A run file of an older tool -> whose it is, and its arguments (Old): YAML, JSON, or a shell script with the command in it.

A file is read as the tool's whose names it holds, or refused with what it looks like; nothing that it says is replaced by a guess. An old
name is brought to LLaMA-Factory's (ALIASES), so that one conversion (oldruns.py) serves all. What is known of the tools, and by what others
are recognised, is in oldruns.yaml.
"""

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from . import options, shell
from .errors import UserError
from .run import Run

TEXTS, PROGRAMS = (".sh", ".bash", ".txt"), (".py", ".ipynb")
SUFFIXES = (".yaml", ".yml", ".json", *TEXTS, *PROGRAMS)

LLAMA_FACTORY, LLAMA_FACTORY_V1, EFFICIENT = "LLaMA-Factory", "LLaMA-Factory v1", "ChatGLM-Efficient-Tuning"
LLM_TUNING, PARENT = "LLM-Tuning", "ChatGLM-Tuning"  # mymusise's, which LLM-Tuning came from
CHATGLM_TUNING, LORA_TRAINER = "chatglm_tuning", "ChatGLM2-LoRA-Trainer"

_FACTS = yaml.safe_load(Path(__file__).with_name("oldruns.yaml").read_text(encoding="utf-8"))
_TOOLS: dict[str, dict[str, Any]] = _FACTS["tools"]
TRAINER: dict[str, Any] = _FACTS["trainer"]
DEFAULTS: dict[str, dict[str, Any]] = {tool: facts["defaults"] for tool, facts in _TOOLS.items()}
ALIASES: dict[str, dict[str, str]] = {tool: facts["aliases"] for tool, facts in _TOOLS.items()}
COMMON: dict[str, str] = _FACTS["common_aliases"]
SCRIPTS: dict[str, dict[str, Any]] = _FACTS["scripts"]
VERSIONS: dict[str, str] = _FACTS["versions"]
TRAINING = {*_FACTS["own_programs"], *_FACTS["shared_programs"].split(), *SCRIPTS}
USES = {program: ours for ours, programs in _FACTS["uses"].items() for program in programs.split()}
TEMPLATES: dict[str, Any] = _FACTS["templates"]
RAW, HEADINGS = dict(TEMPLATES["empty"]), dict(_FACTS["headings"])
MARKS = {tool: set(facts["marks"].split()) for tool, facts in {**_TOOLS, **_FACTS["others"]}.items()}
COMMANDS = {command: tool for tool, facts in _FACTS["others"].items() for command in facts.get("commands", "").split()}
TRAINING_ARGUMENTS = set(_FACTS["training_arguments"].split())
NOT_NEEDED: dict[str, str] = {facts["names"]: facts["why"] for facts in _FACTS["not_needed"]}
NO_COUNTERPART: dict[str, str] = {facts["names"]: facts["why"] for facts in _FACTS["no_counterpart"]}

OFF = ("", "none", "null", "false", "no", "off", "0", "0.0", "-1")
V1_GROUPS = (
    "peft_config",
    "quant_config",
    "optim_config",
    "lr_scheduler_config",
    "kernel_config",
    "dist_config",
    "init_config",
    "mtp_config",
)
LAUNCHERS, COMMANDS_THAT_TRAIN = ("llamafactory-cli", "lmf"), ("train", "sft", "dpo", "rm")
LAUNCHED = {"chat": "glmtune chat", "api": "glmtune chat", "webchat": "glmtune chat", "export": "glmtune export", "merge": "glmtune export",
            "eval": "glmtune predict"}  # fmt: skip
_REASONS = {name: (kind, why) for kind, table in (("not needed", NOT_NEEDED), ("no counterpart", NO_COUNTERPART))
            for names, why in table.items() for name in names.split()}  # fmt: skip
_SECRET = re.compile(r"(?<!new_)(token|key)s?$|secret|webhook|passw|pwd|credential|auth", re.IGNORECASE)
READ = "read are files of LLaMA-Factory, ChatGLM-Efficient-Tuning, LLM-Tuning, ChatGLM-Tuning, chatglm_tuning and ChatGLM2-LoRA-Trainer"


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
        return number(self.called.get(name, name), self.value(name))

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
        theirs = {ours: name for name, ours in ALIASES[self.tool].items()} if self.tool == LLAMA_FACTORY_V1 else {}
        return self.told.get(absent[0], f"{theirs.get(absent[0], absent[0])} was not given: the old default")

    def reason(self, name: str) -> tuple[str, str] | None:
        """(kind, why) of an argument that is known to become nothing; of a group's the group's."""
        called = self.called[name]
        unused = _TOOLS[self.tool].get("unused", {}).get(called)
        if unused:
            return "not needed", unused
        return _REASONS.get(called) or _REASONS.get(name) or _REASONS.get(called.partition(".")[0])

    def unknown(self, like: re.Pattern[str]) -> list[str]:
        """Arguments that nobody knows here and whose names look so."""
        return [f"{self.called[name]} ({short(value)})" for name, value in self.given.items()
                if name not in self.taken and like.search(self.called[name]) and not self.reason(name)]  # fmt: skip

    def left(self, told: str) -> list[str]:
        """A line for every argument that became no option and does not stand in `told`, with the reason."""
        lines: dict[tuple[str, str], list[str]] = {}
        for name in self.given:
            called, value = self.called[name], self.given[name]
            if name in self.taken and re.search(rf"(?<![\w.]){re.escape(called)}(?!\w)", told):
                continue
            kind, why = self.reason(name) or ("no counterpart", "")
            if name in self.taken and not why:
                kind, why = "not needed", "it was off, or another argument decides"
            if kind == "no counterpart" and not isinstance(value, list | dict) and str(value).lower() in OFF:
                kind, why = "not needed", "it was off"
            if not why:
                why = "this name is not known here; `glmtune options` lists ours"
            shown = called if kind == "not needed" or _SECRET.search(called) else f"{called} ({short(value)})"
            lines.setdefault((kind, why), []).append(shown)
        ordered = sorted(lines, key=lambda line: line[0] == "not needed")
        return [f"{kind}: {', '.join(lines[kind, why])}: {why}" for kind, why in ordered] + self.beside


def number(name: str, found: Any) -> Any:
    if isinstance(found, str):
        with contextlib.suppress(ValueError):
            found = float(found) if not re.fullmatch(r"[-+]?\d+", found) else int(found)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not -math.inf < found < math.inf):
        raise _wrong(name, "a number", found)
    return found


def _wrong(name: str, wanted: str, found: Any) -> UserError:
    return UserError(f"{line(name)}: wanted {wanted}, got {reprlib.repr(found)}")


def short(value: Any) -> str:
    if isinstance(value, list | dict):  # what lies inside may be a secret, or the list itself
        return "[...]" if isinstance(value, list) else "{...}"
    text = shell.shown(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def line(text: str) -> str:
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
        if plain.startswith("no_") and value is True and plain[3:] in {*_REASONS, *old.defaults, "resume_lora_training"}:
            name, value = aliases.get(plain[3:], plain[3:]), False  # transformers' argument parser: --no_x
        if _empty(value) and old.defaults.get(name) is not None and name != "max_grad_norm":  # there, null means no clipping
            old.beside.append(f"changed: {key}: empty, so the old default, {short(old.defaults[name])}")
            continue
        if name in old.given:
            old.beside.append(f"not needed: {old.called[name]}: {key} says the same, and was taken")
        old.given[name], old.called[name] = value, str(key)
    return old


# --- whose file it is -------------------------------------------------------------------------------------------------------


def _likely(given: Mapping[str, Any], least: int = 1) -> list[str]:
    """The tools whose own names it holds most of, and `least` at least; LLaMA-Factory stands for its forerunner too."""
    names = {str(name).replace("-", "_") for name in given}
    groups = [group for group in given.values() if isinstance(group, dict)]
    inner = {str(name) for group in groups for name in group}
    names |= inner if len(groups) == len(given) else inner & {"_component_"}  # a file of groups alone, as a list of data sets is
    other_model = "model_name_or_path" not in names and names & {"model", "base_model", "model_id_or_path", "pretrain"}
    counts = {tool: len(marks & names) for tool, marks in MARKS.items()}
    counts[LLAMA_FACTORY] = len((MARKS[LLAMA_FACTORY] | MARKS[EFFICIENT]) & names)
    counts[EFFICIENT] = 0
    if other_model:
        counts[LLAMA_FACTORY] = 0
    if "model_name_or_path" in names:
        counts[LLAMA_FACTORY_V1] = 0
    most = max(counts.values())
    return [tool for tool, count in counts.items() if count == most >= least]


def _whose(given: Mapping[str, Any], shown: str) -> str:
    """The tool whose arguments these are. Raises UserError where they are of none that is read, or of several."""
    likely = _likely(given)
    if len(likely) == 1 and likely[0] in _TOOLS:
        return likely[0]
    if likely:
        names = [
            ", ".join(sorted(str(name) for name in given if str(name).replace("-", "_") in MARKS[tool])[:5]) for tool in likely
        ]
        told = " or ".join(
            ("" if tool.startswith(("a ", "an ")) else "a file of ") + tool + (f" ({found})" if found else "")
            for tool, found in zip(likely, names)
        )
        raise UserError(f"{shown} looks like {told}, which is not read here; {READ}")
    if "model_name_or_path" in given and {"dataset", "template", "do_train"} & set(given):
        return LLAMA_FACTORY
    if {"model", "data"} <= set(given):
        raise UserError(f"{shown} looks like a run file of glmtune, which is not imported: glmtune show {shown}")
    keys = ", ".join(shell.shown(str(name)) for name in list(given)[:8]) or "none"
    raise UserError(f"{shown}: not a run file of a tool that is known here ({', '.join(DEFAULTS)}); its keys are {keys}")


def read(path: Path) -> Old:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix.lower() in TEXTS:
        return _read_shell(path)
    if path.suffix.lower() in PROGRAMS:
        raise UserError(_of_program(path))
    tree = tree_of(path)
    if {"model", "data"} <= set(tree) <= set(Run.model_fields):
        raise UserError(f"{path} is a run file of glmtune already; train it: glmtune train {path}")
    if {"output_dir", "learning_rate", "per_device_train_batch_size"} & set(tree) and set(tree) <= TRAINING_ARGUMENTS:
        return _training_arguments(tree, path)
    return _arguments_of(tree, path.parent, None, str(path))


def _of_program(path: Path) -> str:
    if path.name in USES:
        return f"{path} is a program that trains nothing; here that is: {USES[path.name]}"
    return (
        f"{path} is a program, and programs are not run or read. Import a file with its arguments (.sh, .yaml, .json), "
        "or write what stands in it as a run file; docs/migrating.md has self-llm's chapters so"
    )


def tree_of(path: Path, text: str | None = None) -> dict[str, Any]:
    """A YAML or JSON file as a tree. text: of a file that a here-document writes."""
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        if form == "JSON":
            tree = json.loads(path.read_text(encoding="utf-8") if text is None else text, object_pairs_hook=_once)
        else:
            tree = options.read(path) if text is None else options.plain_value(text)
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except (ValueError, RecursionError) as error:  # of YAML: a date that is none
        raise UserError(f"{path}: not valid {form}: {'nested too deep' if isinstance(error, RecursionError) else error}") from None
    if not isinstance(tree, dict):
        hint = f" (of rows? glmtune data check {path})" if isinstance(tree, list) else ""
        raise UserError(f"{path}: arguments are one JSON object; this is a {type(tree).__name__}{hint}")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise UserError(f"the key '{twice}' stands twice; keep one")
    return tree


def _arguments_of(given: dict[str, Any], folder: Path, cards: int | None, shown: str, command: str = "", tool: str = "") -> Old:
    """Arguments without a program that tells whose they are. tool: whose program it was; command: which of v1's was given."""
    tool = tool or _whose(given, shown)
    if tool == LLAMA_FACTORY_V1:
        return _v1(given, folder, cards, shown, command)
    if tool in (LLAMA_FACTORY, EFFICIENT):
        return _hf(given, folder, cards, shown)
    if tool == LORA_TRAINER:
        return _lora_trainer(given, folder)
    if tool == PARENT:
        return _old(PARENT, given, folder, cards or 1)
    raise UserError(f"{shown} holds arguments of {tool}, which takes them on a command line; import a .sh file with the command")


def _hf(given: dict[str, Any], folder: Path, cards: int | None, shown: str) -> Old:
    """Arguments of LLaMA-Factory or of its forerunner, told apart by what only one of them has."""
    if given.get("export_dir") is not None:
        adapter = given.get("adapter_name_or_path") or given.get("checkpoint_dir")
        raise _exports(shown, given.get("model_name_or_path", "MODEL"), adapter, given["export_dir"])
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
        only_efficient & set(given) or given.get("finetuning_type") in ("p_tuning", "ptuning") or "model_name_or_path" not in given
        or "chatglm" in str(given["model_name_or_path"]).lower()
    )  # fmt: skip
    return _old(EFFICIENT if efficient else LLAMA_FACTORY, given, folder, cards)


def _exports(shown: str, model: Any, adapter: Any, to: Any) -> UserError:
    adapter = f" --adapter {adapter}" if adapter else ""
    return UserError(f"{shown} exports a model and trains nothing; here that is: glmtune export {model}{adapter} --to {to}")


def _v1(tree: dict[str, Any], folder: Path, cards: int | None, shown: str, command: str) -> Old:
    """LLaMA-Factory's newer form, whose arguments stand in groups: peft_config: {name: lora, r: 16} is peft_config.r here."""
    given: dict[str, Any] = {}
    for key, value in tree.items():
        name = str(key).replace("-", "_")
        if name in V1_GROUPS and isinstance(value, str) and value.lstrip().startswith("{"):
            value = options.plain_value(value)
        if name in V1_GROUPS and isinstance(value, dict):
            given |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            given[name] = value
    if given.get("peft_config.export_dir") is not None:
        raise _exports(
            shown, given.get("model", "MODEL"), given.get("peft_config.adapter_name_or_path"), given["peft_config.export_dir"]
        )
    if "train_dataset" not in given and command not in COMMANDS_THAT_TRAIN:
        raise UserError(f"{shown} names no data (train_dataset) and trains nothing; here that is: glmtune chat MODEL")
    if given.get("quant_config.name") == "bnb" and given.get("quant_config.quantization_bit") is None:
        given["quant_config.quantization_bit"] = 4  # the default of its bnb
    stage, why, guessed = _v1_stage(given, command, shown)
    old = _old(LLAMA_FACTORY_V1, given, folder, cards, why, stage=stage)
    if guessed:
        old.beside.append(f"guessed: stage {stage}: this file does not say it (llamafactory-cli sft, dpo or rm did); {why}")
    return old


def _v1_stage(given: dict[str, Any], command: str, shown: str) -> tuple[str, str, bool]:
    """(stage, what tells it, whether that is a guess)"""
    if command in ("sft", "dpo", "rm"):
        return command, f"llamafactory-cli {command}", False
    if str(given.get("model_class")) == "cls":
        return "rm", "model_class cls", False
    preferences = next(
        (name for name in given if name.startswith("pref_") or name in ("simpo_gamma", "dpo_label_smoothing", "ld_alpha")), None
    )
    if preferences:
        return "dpo", preferences, False
    if command == "train":
        return "sft", "llamafactory-cli train", False
    words = re.findall(r"[a-z]+", f"{Path(shown).stem} {given.get('train_dataset')}".lower())
    return next(
        ((name, f"{name} stands in its names", True) for name in ("dpo", "rm") if name in words),
        ("sft", "nothing tells another", True),
    )


def _lora_trainer(given: dict[str, Any], folder: Path) -> Old:
    """ChatGLM2-LoRA-Trainer. Until 2023-07-26 it had one limit, CUTOFF_LEN, wrote headings, and left the targets to peft."""
    if "CUTOFF_LEN" not in given or {"CONTEXT_LEN", "TARGET_LEN", "TEXT_LEN"} & set(given):
        return _old(LORA_TRAINER, given, folder, 1)
    told: dict[str, Any] = {"lora_target": "query_key_value", "train_on_prompt": True}
    if not {"BIT_4", "BIT_8"} & set(given):  # 2023-07-25 brought the flags; before, the program had this written into it
        told["load_in_8bit"] = True
    return _old(LORA_TRAINER, given, folder, 1, "written into its version with CUTOFF_LEN", **told)


def _training_arguments(tree: dict[str, Any], path: Path) -> Old:
    """chatglm_tuning's JSON alone: model, data and method stood on the command line, so they are guessed, and that is said."""
    if path.suffix.lower() != ".json":
        raise UserError(
            f"{path} holds transformers' TrainingArguments and nothing else, neither model nor data; import the file with the command"
        )
    signs = f"{path.name} {tree.get('output_dir', '')}".lower()
    rate = None if _empty(tree.get("learning_rate")) else number(f"{path}: learning_rate", tree["learning_rate"])
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


@dataclass
class _Training:
    """A command that trains: the place of its program among the words."""

    command: shell.Command
    at: int
    program: str

    @property
    def words(self) -> list[str]:
        return self.command.words[self.at + 1 :]

    @property
    def only_predicts(self) -> bool:
        return "--do_train" not in self.words and ("--do_predict" in self.words or "--do_eval" in self.words)


@dataclass
class _Script:
    """The commands of a script, by what they do."""

    trainings: list[_Training] = field(default_factory=list)
    uses: dict[str, str] = field(default_factory=dict)  # what else it runs -> who does that here
    others: dict[str, str] = field(default_factory=dict)  # tools that are not read -> a command of theirs
    documents: dict[str, str] = field(default_factory=dict)  # files that it writes itself
    rows: list[dict[str, Any]] = field(default_factory=list)  # arguments of each tokenize_dataset_rows.py
    loose: dict[str, Any] = field(default_factory=dict)  # arguments that the shell gave to no command
    remarks: list[str] = field(default_factory=list)

    def add(self, command: shell.Command, is_first: bool) -> None:
        names = [Path(word).name for word in command.words]
        at = next((i for i, name in enumerate(names) if name in TRAINING), -1)
        if names[0] in ("cat", "tee") and command.stdin is not None:
            self.documents[Path(command.writes or "".join(command.words[1:2])).name] = command.stdin
        elif names[0].startswith("-"):
            self._bare(command, is_first)
        elif tool := _foreign(names):
            self.others.setdefault(tool, command.words[0])
        elif at >= 0 and (names[at] not in LAUNCHERS or names[at + 1 : at + 2] in ([one] for one in COMMANDS_THAT_TRAIN)):
            self.trainings.append(_Training(command, at, names[at]))
        elif at >= 0:
            kind = "".join(names[at + 1 : at + 2])
            self.remarks.append(f"not imported: `{names[at]} {kind}` trains nothing")
            self.uses[f"{names[at]} {kind}"] = LAUNCHED.get(kind, "nothing yet")
        elif other := next((name for name in names if name in USES), None):
            self.uses[other] = USES[other]
            if other == "tokenize_dataset_rows.py":
                self.rows.append(_arguments(command.words[names.index(other) + 1 :], []))
            else:
                self.remarks.append(f"not imported: {other}: here that is `{USES[other]}`")
        elif likely := _likely(_arguments(command.words[1:], []), 2):
            self.others.setdefault(" or ".join(likely), next((name for name in names if name.endswith(".py")), names[0]))

    def _bare(self, command: shell.Command, is_first: bool) -> None:
        """Arguments without a program: a file of nothing else, or the rest of a command that a line before them ended."""
        if is_first:
            self.trainings.append(_Training(command, -1, ""))
            return
        found = _arguments(command.words, self.remarks)
        self.loose |= found
        told = ", ".join(f"--{name}" if _SECRET.search(name) else f"--{name} ({short(value)})" for name, value in found.items())
        self.remarks.append(
            f"not imported: line {command.line}: {told or short(' '.join(command.words))}: the line before does not go on (no backslash "
            "at its end, or a comment), so the shell took it for another command"
        )


def _read_shell(path: Path) -> Old:
    try:
        commands, slips = shell.commands(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    except shell.ShellError as error:
        raise UserError(f"{path}: cannot be read as a command line: {error}") from None
    script = _Script(remarks=[f"changed: {slip}" for slip in slips])
    for command in commands:
        script.add(command, command is commands[0])
    told = script.remarks
    told += [f"not imported: {words}: a command of {tool}, which is not read" for tool, words in script.others.items()]
    trained = [run for run in script.trainings if not run.only_predicts] or script.trainings
    if not trained:
        raise UserError(f"{path}{_why_not(script.uses, script.others)}")
    told += ["not imported: a command that predicts: here that is `glmtune predict`"] * (len(script.trainings) - len(trained))
    if len(trained) > 1:
        told.append(
            f"not imported: {len(trained) - 1} more trainings in this file; the first was taken, put each of the others into a file of its own"
        )
    old = _of_command(path, trained[0], script)
    old.beside += told
    _check_filled(path, old, script.loose)
    hub = trained[0].command.env.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true")
    if hub and isinstance(old.given.get("model_name_or_path"), str):
        old.given["model_name_or_path"] = f"modelscope:{old.given['model_name_or_path']}"
    return old


def _check_filled(path: Path, old: Old, loose: dict[str, Any]) -> None:
    """Values that only a running shell knows are needed, and a model or data that the shell dropped is meant."""
    for name, value in old.given.items():
        if not old.reason(name) and (unset := _unfilled(value)):
            said = [shell.shown(str(one)) for one in value] if isinstance(value, list) else shell.shown(str(value))
            raise UserError(f"{path}: {old.called[name]} is {said}, and {unset} is set nowhere in this file; write its value there")
    for called in loose:
        name = ALIASES[old.tool].get(called, called)
        if name in ("model_name_or_path", "dataset", "data_path", "tokenized_dataset") and name not in old.given:
            raise UserError(
                f"{path}: --{called} stands on a line of its own, which the shell takes for another command, and nothing else says it; "
                "end the line before with a backslash"
            )


def _unfilled(value: Any) -> str | None:
    """The first expansion in a value that only a running shell could fill."""
    texts = value if isinstance(value, list) else [value]
    found = (re.search(f"{shell.UNKNOWN}([^{shell.UNKNOWN}]*){shell.UNKNOWN}", text) for text in texts if isinstance(text, str))
    return next((match[1] for match in found if match), None)


def _foreign(names: list[str]) -> str | None:
    """The tool that is not read whose command this is: its first word, what a launcher starts, or a module after -m."""
    if len(names) < 2:
        return None
    heads = [
        names[0],
        *(names[i + 1] for i, name in enumerate(names[:-1]) if name in ("-m", "launch", "nohup", "exec", "sudo", "time", "srun")),
    ]
    return next((COMMANDS[head] for name in heads for head in (name, name.partition(".")[0]) if head in COMMANDS), None)


def _why_not(uses: dict[str, str], others: dict[str, str]) -> str:
    if uses:
        return f" trains nothing (it runs {', '.join(uses)}); here that is: {', '.join(dict.fromkeys(uses.values()))}"
    if others:
        return f" looks like a run of {' and '.join(others)} ({', '.join(others.values())}), which is not read here; {READ}"
    return f": holds no command that starts a training of {', '.join(DEFAULTS)}"


def _arguments(words: Sequence[str], told: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--flag`, `--name a b` -> {name: value}, texts as they stand. What is no argument is told."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            if name in found:
                told.append(
                    f"not needed: {name}{'' if _SECRET.search(name) else f' ({short(found[name])})'}: given again further on; the last counts, as there"
                )
            found[name] = value if equals else True
        elif word in (f"{shell.UNKNOWN}$@{shell.UNKNOWN}", f"{shell.UNKNOWN}$*{shell.UNKNOWN}"):
            told.append(f"not imported: {shell.shown(word)}: what is given to the script when it is started")
        elif name:
            before = found[name]
            found[name] = word if before is True else [*before, word] if isinstance(before, list) else [before, word]
        else:
            told.append(f"not imported: {short(word)}: no name stands before it")
    return found


def _of_command(path: Path, run: _Training, script: _Script) -> Old:
    program, rest, env, told = run.program, run.words, run.command.env, script.remarks
    rows, documents = script.rows, script.documents
    cards = _cards(env, run.command.words[: max(run.at, 0)])
    command, tool = "", _FACTS["own_programs"].get(program, "")
    if program in LAUNCHERS:
        command, rest = rest[0], rest[1:]
    file = next((word for word in rest[:1] if Path(word).suffix in (".yaml", ".yml", ".json")), None)
    pairs: dict[str, Any] = {}
    if file is not None:
        changes = [word for word in rest[1:] if re.match(r"[\w.]+=", word)]
        pairs = _beside_file(path, file, documents) | {
            word.partition("=")[0]: options.plain_value(word.partition("=")[2]) for word in changes
        }
        rest = [word for word in rest[1:] if word not in changes]
    given = {**pairs, **_arguments(rest, told)}
    if program in SCRIPTS:
        version = VERSIONS.get(f"{program} {given.get('model_version')}")
        implied = {"model_name_or_path": version} if version else {}
        texts = {"no_prompt_loss": 0, "lora_target": "query_key_value", "lora_alpha": 32, **SCRIPTS[program], **implied}
        return _old(
            LLM_TUNING, given | _rows_of(given.get("tokenized_dataset"), rows), path.parent, 1, f"written into {program}", **texts
        )
    if program in ("train_lora.py", "train_ptuning.py"):
        return _chatglm_tuning(path, program, given, cards, documents)
    newer = "model_name_or_path" not in given and _likely(given) == [LLAMA_FACTORY_V1]
    if tool and (newer or command in ("sft", "dpo", "rm") or env.get("USE_V1") in ("1", "true")):
        tool = LLAMA_FACTORY_V1
    old = _arguments_of(given, path.parent, cards, str(path), command, tool)
    if old.tool == PARENT:
        made = _rows_of(given.get("dataset_path"), rows)
        old = _old(PARENT, {**made, **given}, path.parent, cards or 1)
    return old


def _rows_of(folder: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of the tokenize_dataset_rows.py that wrote a folder of tokens."""
    return next((made for made in rows if folder in (made.get("save_name", "temp"), made.get("save_path"))), {})


def _chatglm_tuning(path: Path, program: str, given: dict[str, Any], cards: int | None, documents: dict[str, str]) -> Old:
    arguments = given.get("train_args_file")
    if not isinstance(arguments, str):
        raise UserError(f"{path}: {program} needs --train_args_file FILE.json, if it is chatglm_tuning's")
    given = {**_beside_file(path, arguments, documents), **given}
    kind = "lora" if program == "train_lora.py" else "p_tuning" if "pre_seq_len" in given else "full"
    old = _old(CHATGLM_TUNING, given, path.parent, cards, program, finetuning_type=kind)
    if kind == "lora" and old.has("resume_from_checkpoint"):  # it loads the adapter's weights, nothing else
        old.given["adapter_name_or_path"] = old.given.pop("resume_from_checkpoint")
        old.called["adapter_name_or_path"] = old.called.pop("resume_from_checkpoint")
    return old


def _beside_file(path: Path, name: str, documents: dict[str, str]) -> dict[str, Any]:
    """A file that a script names: one that a here-document writes, or one that is there from here, or beside the script."""
    if Path(name).name in documents:
        return tree_of(Path(name), shell.shown(documents[Path(name).name]))
    return tree_of(Path(name) if Path(name).exists() else path.parent / name)


def _cards(env: dict[str, str], before: Sequence[str]) -> int | None:
    """In how many processes the command trained: what its launcher says, or the cards it sees. None: not said."""
    said = {name.replace("-", "_"): value for name, value in _arguments(before, []).items()}
    for name in ("nproc_per_node", "num_processes", "num_gpus"):
        if str(said.get(name, "")).isdigit():
            nodes = str(said.get("nnodes", said.get("num_nodes", "1")))
            return int(said[name]) * (int(nodes) if nodes.isdigit() and name != "num_processes" else 1)
    visible = env.get("NPROC_PER_NODE") or env.get("CUDA_VISIBLE_DEVICES")
    if visible is None or shell.UNKNOWN in visible:
        return None
    return int(visible) if "NPROC_PER_NODE" in env and visible.isdigit() else len(visible.split(","))

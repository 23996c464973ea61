"""Every option there is, on one page: `Run` = model + data + template + stage + method + optim + out.

Light on purpose (no torch): a wrong run file must fail before anything heavy is imported. The code that uses a group
gets that group only; nothing but this file sees all options together.
"""

import datetime
import re
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from . import options
from .errors import UserError, shown
from .options import Choice, Options
from .records import Learn

Positive = Annotated[int, Field(gt=0)]
Quant = Literal["nf4", "int8", "chatglm-int4", "chatglm-int8"]


def _usable(path: str) -> str:
    names = path.split("/")
    if len(path.encode()) > 4095 or any(len(name.encode()) > 255 for name in names):
        raise ValueError(f"{shown(path)} can be no path: the longest have 4095 bytes, and names in them 255")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder {shown(names[0])}") from None
    return path


AnyPath = Annotated[str, AfterValidator(_usable)]  # of a file, a folder, a pattern, or a name on a hub


class Source(Options):
    """Where rows come from."""

    path: AnyPath = Field(
        description="a file (JSON, JSONL, CSV, txt, Parquet, also .gz; content decides), a folder or a pattern of such files, the name of a data set, or hf:owner/name, modelscope:owner/name"
    )
    format: str | None = Field(
        default=None, description="the rows' form (alpaca, context, messages, sharegpt, text ...); null: recognised from their keys"
    )
    columns: dict[str, str] | None = Field(default=None, description="which key holds what: {prompt: question, response: answer}")
    weight: float = Field(
        default=1.0, gt=0, description="passes over this source per epoch: 2 reads every row twice, 0.5 half of them"
    )
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of weight: this share of all rows of an epoch, by repeating this source or taking a part of it",
    )
    max_samples: Positive | None = Field(default=None, description="use the first n rows only")
    system: str | None = Field(default=None, description="system prompt of rows that have none of their own")

    @model_validator(mode="after")
    def _one_amount(self) -> "Source":
        if self.share is not None and self.weight != 1:
            raise ValueError("weight and share exclude each other; give one")
        return self


class Eval(Options):
    """The dev set that is looked at while training."""

    data: list[Source] | None = Field(default=None, description="rows to evaluate on")
    share: float = Field(
        default=0.0,
        ge=0,
        description="instead of data: this share of the training rows (1 or more: so many), chosen by their content",
    )
    every_steps: Positive | None = Field(default=None, description="evaluate every n steps; null: at each epoch's end")

    @field_validator("share")
    @classmethod
    def _whole_rows(cls, share: float) -> float:
        if share > 1 and share != int(share):
            raise ValueError(f"below 1 it is a share of the rows, otherwise a whole number of them; got {share:g}")
        return share


class Probe(Options):
    """Questions answered before and after training, side by side in samples.jsonl and report.html."""

    path: AnyPath = Field(description="a file of rows; their answers, if any, are not used")
    name: str | None = Field(default=None, description="name of this set in the tables; null: the file's name")
    contains: list[str] | None = Field(
        default=None, description="an answer that contains one of these is counted as a hit (case ignored)"
    )
    wanted: bool = Field(default=True, description="whether a hit is what you want; false: it is a leak")
    system: str | None = Field(
        default=None, description="system prompt for these questions; null: the run's own, else the model's default"
    )
    format: str | None = Field(default=None, description="as in data")
    columns: dict[str, str] | None = Field(default=None, description="as in data")


class Sft(Options):
    kind: Literal["sft"] = "sft"
    learn: Learn = Field(
        default="all", description="which turns are learned: all assistant turns, the last only, or everything (the prompt too)"
    )


class Pretrain(Options):
    kind: Literal["pretrain"] = "pretrain"


class Reward(Options):
    """A reward model. Not built yet: `show` and `data check` read its rows (preferences), `train` refuses."""

    kind: Literal["reward"] = "reward"


class Dpo(Options):
    """Direct preference optimisation. Not built yet: `show` and `data check` read its rows (preferences), `train` refuses."""

    kind: Literal["dpo"] = "dpo"


class Kto(Options):
    """Labels instead of pairs. Not built yet: `show` and `data check` read its rows (good and bad answers), `train` refuses."""

    kind: Literal["kto"] = "kto"


class Ppo(Options):
    """Not built yet: `show` and `data check` read its rows (prompts), `train` refuses."""

    kind: Literal["ppo"] = "ppo"


class Grpo(Options):
    """Not built yet: `show` and `data check` read its rows (prompts), `train` refuses."""

    kind: Literal["grpo"] = "grpo"


STAGES: dict[str, type[Options]] = {
    "sft": Sft, "pretrain": Pretrain, "reward": Reward, "dpo": Dpo, "kto": Kto, "ppo": Ppo, "grpo": Grpo,
}  # fmt: skip


class Lora(Options):
    """Low-rank adapters (arXiv 2106.09685), in PEFT's file format."""

    kind: Literal["lora"] = "lora"
    rank: Positive = Field(default=8, description="rank of the update")
    alpha: float = Field(default=16, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    targets: list[str] | str | None = Field(
        default=None,
        description="the linear layers to adapt: names, a regular expression, all-linear; null: every linear layer of the blocks",
    )
    share_a: bool = Field(
        default=False, description="q, k and v share one A, as LoRA on ChatGLM's fused query_key_value has it: a third of the A's"
    )
    dora: bool = Field(default=False, description="learn each row's length apart from its direction (DoRA, arXiv 2402.09353)")
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), for high ranks")
    pissa: bool = Field(default=False, description="start from each weight's largest singular directions (PiSSA, arXiv 2404.02948)")
    lr_ratio: float | None = Field(
        default=None, gt=0, description="learning rate of B over that of A (LoRA+, arXiv 2402.12354, uses 16); null: the same"
    )
    ranks: dict[str, Positive] = Field(default={}, description="other ranks for some layers: {down_proj: 16}, names as in targets")
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="other alphas for some layers, names as in targets"
    )
    modules_to_save: list[str] = Field(
        default=[], description="further modules trained whole, in fp32, and saved in the adapter: embed_tokens, lm_head, norm"
    )
    start: AnyPath | None = Field(default=None, description="an adapter (or a run's folder) whose weights training goes on from")
    under: list[AnyPath] = Field(
        default=[],
        description="trained LoRA adapters that stay switched on, frozen, beneath the new one; the result holds them too",
    )

    @model_validator(mode="after")
    def _one_start(self) -> "Lora":
        if self.pissa and self.share_a:
            raise ValueError("pissa starts each layer's A from its own weight, share_a gives q, k and v one A; give one")
        return self


class Prefix(Options):
    """P-Tuning v2 (arXiv 2110.07602): learned keys and values in front of every layer's own, as ChatGLM-6B publishes it."""

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: Positive = Field(default=64, description="length of the prefix, in tokens")
    init: Literal["words", "random"] = Field(
        default="words",
        description="where it starts: the model's own keys and values of the data's first words, which change little; or random, as published (with projection always)",
    )
    projection: bool = Field(
        default=False, description="make the prefix by a small two-layer network (published: prefix_projection)"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the prefix while training (the published code has 0.1)")
    start: AnyPath | None = Field(default=None, description="a prefix adapter (or a run's folder) that training goes on from")

    @property
    def variant(self) -> str | None:
        """The name under which DEFAULT_LR has a rate of its own for these options; None: the kind."""
        return "prefix with projection" if self.projection else None


class Freeze(Options):
    """Some blocks are trained whole, in fp32; the rest is frozen."""

    kind: Literal["freeze"] = "freeze"
    trains_base: ClassVar[bool] = True
    last: Positive | None = Field(default=None, description="train the last n blocks; null with neither first nor layers: 3")
    first: Positive | None = Field(default=None, description="train the first n blocks")
    layers: list[int] | None = Field(default=None, description="train the blocks of these numbers, counted from 0 (-1: the last)")
    modules: Literal["all", "mlp", "attention"] = Field(default="all", description="what of a block is trained")
    others: list[str] = Field(default=[], description="modules outside the blocks trained too: embed_tokens, lm_head, norm")

    @model_validator(mode="after")
    def _one_choice(self) -> "Freeze":
        given = [name for name in ("last", "first", "layers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self


class Full(Options):
    """Every weight is trained, held in fp32."""

    kind: Literal["full"] = "full"
    trains_base: ClassVar[bool] = True


Chat = Literal[  # the names of chat.FORMS and families.CHATS
    "auto", "plain", "chatml", "alpaca", "chatglm", "chatglm2", "chatglm3", "glm4", "characterglm", "codegeex2", "internlm", "internlm2", "baichuan", "baichuan2",
    "llama2", "chinese-alpaca", "chinese-alpaca-2",
]  # fmt: skip
# Each has a record in method.METHODS. `trains_base`: gradient steps change the model's own weights, so they cannot be packed.
METHODS: dict[str, type[Options]] = {"lora": Lora, "prefix": Prefix, "freeze": Freeze, "full": Full}


def fp16_overflows(model: str) -> str | None:
    """The warning for precision fp16 on a model, by its name, folder or model_type; None where fp16 does.

    Source: THUDM/ChatGLM3 PR 689, hiyouga/LLaMA-Factory issue 4202 (loss 0 or NaN).
    """
    if re.search(r"chatglm3|glm-?4(?!\.[5-9]|_moe|v)|^glm$", model.lower()):
        return "fp16: activations of ChatGLM3 and GLM-4 pass its largest number (65504), and the loss becomes 0 or nan; use bf16 or fp32"
    return None


class _Optimizer(Options):
    lr: float | None = Field(default=None, gt=0, description="learning rate; null: the method's own default, said aloud")
    epochs: float = Field(default=3, gt=0, le=1e9, description="passes over the data")
    steps: Positive | None = Field(default=None, description="instead of epochs: this many optimizer steps")
    batch_size: Positive = Field(
        default=16, description="rows in one optimizer step; the cut into micro-batches follows from micro_tokens"
    )
    micro_tokens: Positive | None = Field(
        default=None, description="tokens computed at once; bounds memory, changes no result; null: chosen by length and device"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls after warm-up"
    )
    warmup: float = Field(default=0.03, ge=0, description="below 1 a share of all steps, otherwise a number of steps")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null: no clipping")


class AdamW(_Optimizer):
    kind: Literal["adamw"] = "adamw"


class AdamW8bit(_Optimizer):
    """AdamW whose two averages are kept in 8 bits, by blocks (arXiv 2110.02861): a quarter of the memory."""

    kind: Literal["adamw8bit"] = "adamw8bit"


class Adafactor(_Optimizer):
    """Second moments kept as one number a row and a column (arXiv 1804.04235), no first moments: least memory."""

    kind: Literal["adafactor"] = "adafactor"


OPTIMIZERS: dict[str, type[Options]] = {"adamw": AdamW, "adamw8bit": AdamW8bit, "adafactor": Adafactor}


class Save(Options):
    every_steps: Positive | None = Field(
        default=None, description="checkpoint every n steps; null: every 5 minutes and at each epoch's end"
    )
    keep: Positive = Field(default=2, description="checkpoints kept; the best one by dev loss is kept beside them")


def _real_newlines(text: str | None) -> str | None:
    if text and "\\n" in text:
        raise ValueError(
            f"holds a backslash and an n, not a newline: {shown(text)}; write the text in double quotes (on a command line: '\"...\\n\"')"
        )
    return text


class Form(Options):
    """A chat format in your own words. `{content}` is the turn's text, `{stop}` the end mark."""

    system: str = Field(default="{content}\n", description="how a system turn is written")
    user: str = Field(default="{content}\n", description="how a user turn is written")
    assistant: str = Field(
        default="{content}{stop}", description="how an answer is written; what stands before {content} belongs to the prompt"
    )
    stop: str | None = Field(default=None, description="the special token that ends an answer; null: the tokenizer's own end token")

    @field_validator("system", "user", "assistant")
    @classmethod
    def _has_content(cls, text: str) -> str:
        if text.count("{content}") != 1:
            raise ValueError(f"must hold {{content}} exactly once; got {shown(text)}")
        return _real_newlines(text) or ""


def moment(date: str | None) -> datetime.datetime | None:
    """What a date in a run file stands for. Raises ValueError."""
    if date is None:
        return None
    try:
        return datetime.datetime.fromisoformat(date).replace(tzinfo=None, microsecond=0)
    except ValueError:
        raise ValueError(f"wanted a date like 2026-07-31, or 2026-07-31T12:00:00; got {shown(date)}") from None


def _date(given: Any) -> Any:
    given = given.isoformat() if isinstance(given, datetime.date) else given  # YAML reads 2026-07-31 as a date
    return moment(given) and given if isinstance(given, str) else given


Date = Annotated[str, BeforeValidator(_date)]


class Resolved(TypedDict, total=False):
    """What train chose (settings.resolve). Not every version chose the same, so names may be missing here, and others are passed over."""

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)  # type: ignore

    device: str
    precision: Literal["bf16", "fp16", "fp32"]
    quant: Quant | None
    threads: Positive
    micro_tokens: Positive
    lr: Annotated[float, Field(gt=0)]
    steps: Positive
    checkpointing: bool
    compile: bool
    data: str
    date: Date | None
    base: str  # the model's folder, an absolute path
    fingerprint: str  # of the model (families.fingerprint)
    adapters: dict[
        str, Annotated[list[str], Field(min_length=2, max_length=2)]
    ]  # those in method.start and method.under: absolute path, digest of what is there
    version: str


class Run(Options):
    """One training run. Only model, data and out are required."""

    model: AnyPath = Field(
        description="smollm2-135m-instruct (built in), a model folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
    )
    data: list[Source] = Field(description="what to learn from: a path, a list of paths, or a list of groups")
    out: AnyPath = Field(description="the run's folder: adapter, log, samples, report, checkpoints")
    registry: AnyPath | None = Field(
        default=None, description="a data.yaml or dataset_info.json that names data sets; null: data.yaml here, if there is one"
    )
    mixing_temperature: float = Field(
        default=1.0, ge=1, description="above 1 brings the sizes of the sources nearer to each other: size^(1/T)"
    )
    eval: Eval = Eval()
    samples: list[Probe] | None = Field(
        default=None, description="questions answered before and after training; null: three rows of the data, []: none"
    )
    stage: Annotated[Any, Choice(STAGES)] = Field(default=Sft(), description="what is learned")
    method: Annotated[Any, Choice(METHODS)] = Field(default=Lora(), description="which weights are trained")
    quant: Quant | None = Field(
        default=None,
        description="frozen weights kept in 4 or 8 bits (lora, prefix): nf4, int8, or ChatGLM's own quantisation; a published int4 or int8 model stays as it is",
    )
    neftune: float = Field(
        default=0.0, ge=0, description="noise on the embeddings while training (NEFTune, arXiv 2310.05914, uses 5); 0: none"
    )
    optim: Annotated[Any, Choice(OPTIMIZERS)] = Field(default=AdamW(), description="how they are trained")
    max_length: Positive = Field(default=1024, description="longest row, in tokens")
    too_long: Literal["error", "skip", "cut-left-turns", "cut-answer"] = Field(
        default="error",
        description="what happens to longer rows: stop before training, leave out, cut the oldest turns, cut the last answer; always counted",
    )
    system: str | None = Field(
        default=None, description="system prompt of rows without one; also the default of chat and predict afterwards"
    )
    template: Chat | Form = Field(
        default="auto",
        description="the chat format: auto is the model's own; a name; or a group with system, user, assistant, stop",
    )
    join: str | None = Field(
        default=None, description="what stands between instruction and input; null: a newline (alpaca template: its own heading)"
    )
    date: Date | None = Field(
        default=None,
        description="what chat formats that write the date into prompts take for now, like 2026-07-31; null: when the run was started",
    )
    variables: dict[str, str] = Field(
        default={}, description="{{name}} in the data and in samples[].contains is replaced by variables.name"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="of frozen weights and their products; sums and trained weights are fp32"
    )
    checkpointing: Literal["auto"] | bool = Field(
        default="auto", description="gradient checkpointing: less memory, a third more time"
    )
    device: str = Field(default="auto", description="auto | cpu | cuda | cuda:1 | mps")
    save: Save = Save()
    report_to: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(
        default=["tensorboard"],
        description="where curves go besides report.html: tensorboard always, wandb and swanlab where installed; []: nowhere",
    )
    seed: int = Field(default=0, description="of order, initial weights and dropout")
    resolved: Resolved | None = Field(
        default=None, description="written by train, read on resume: what was chosen where this file says auto or null"
    )

    @field_validator("join")
    @classmethod
    def _no_backslash_n(cls, text: str | None) -> str | None:
        return _real_newlines(text)

    @field_validator("out")
    @classmethod
    def _no_nul(cls, path: str) -> str:
        if "\0" in path:
            raise ValueError(f"no folder can have a NUL in its name, as {shown(path)} has")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> "Run":
        if self.quant is not None and getattr(self.method, "trains_base", False):
            raise ValueError(
                f"quant={self.quant} keeps weights in {'4' if '4' in self.quant else '8'} bits, which gradient steps cannot change, and method={self.method.kind} trains them; "
                "use method=lora or method=prefix, or leave quant out"
            )
        if not self.data:
            raise ValueError("data: the list is empty; name at least one file")
        if self.eval.data and self.eval.share:
            raise ValueError("eval.data and eval.share exclude each other; give one")
        return self


# (stage, None for any; method or its variant) -> learning rate of a run that gives none. Measured values: LOG.md.
DEFAULT_LR: dict[tuple[str | None, str], float] = {
    (None, "lora"): 2e-4,
    (None, "prefix"): 1e-2,
    (None, "prefix with projection"): 1e-4,  # at 1e-2 its loss rises fourfold
    (None, "freeze"): 5e-5,
    (None, "full"): 1e-5,
}
UNKNOWN_LR = 1e-4  # of a method from outside that has no line above


def default_lr(method: Options, stage: str | None = None) -> tuple[float, str]:
    """The learning rate of a run that gives none, and whose it is in words: a method, perhaps in a stage. A variant's rate goes before its
    method's, a stage's before that of any stage."""
    kind: str = getattr(method, "kind")  # noqa: B009
    for name in filter(None, (getattr(method, "variant", None), kind)):
        for of in (stage, None):
            if (of, name) in DEFAULT_LR:
                return DEFAULT_LR[of, name], f"{name} in stage {of}" if of else name
    return UNKNOWN_LR, kind


def load_run(path: str | Path | None, overrides: Iterable[str] = (), **missing: Any) -> Run:
    """Reads a run file (or none), applies `a.b=c` overrides, checks every option.

    missing: values for required options that neither gives (`show` needs no `out`). Raises UserError.
    """
    tree, before = options.read(path) if path is not None else {}, []
    for setting in overrides:
        for name in ("data", "samples"):  # data=a.json data.0.max_samples=100
            if setting.startswith(name + ".") and tree.get(name) is not None:
                tree[name] = _sources(tree[name], Path(path).parent if path is not None else Path())
        options.override(tree, setting, Run, before)
        before.append(setting)
    for name, value in missing.items():
        tree.setdefault(name, value)
    wanted = [name for name in ("model", "data", "out") if tree.get(name) in (None, "", [])]
    if wanted:
        listed = ", ".join(f"'{name}'" for name in wanted)
        example = " ".join(
            {"model": "model=smollm2-135m-instruct", "data": "data=train.json", "out": "out=runs/first"}[n] for n in wanted
        )
        raise UserError(
            f"{listed} {'is' if len(wanted) == 1 else 'are'} missing; give {'it' if len(wanted) == 1 else 'them'} like this: {example}"
        )
    folder = Path(path).parent if path is not None else Path()
    tree["data"] = _sources(tree["data"], folder)
    if isinstance(tree.get("eval"), dict) and tree["eval"].get("data") is not None:
        tree["eval"]["data"] = _sources(tree["eval"]["data"], folder)
    if isinstance(tree.get("samples"), str | dict | list):
        tree["samples"] = _sources(tree["samples"], folder)
    if isinstance(tree.get("report_to"), str):
        tree["report_to"] = [tree["report_to"]]
    if isinstance(tree["model"], str):
        tree["model"] = _near(tree["model"], folder)
    return options.build(Run, tree, str(path) if path is not None else "")


def _sources(value: Any, folder: Path) -> Any:
    """A path, a group, or a list of either, as a list of groups; paths may be relative to the run file."""
    items = value if isinstance(value, list) else [value]
    groups = [{"path": item} if isinstance(item, str) else item for item in items]
    return [
        {**g, "path": _near(g["path"], folder)} if isinstance(g, dict) and isinstance(g.get("path"), str) else g for g in groups
    ]


def _near(path: str, folder: Path) -> str:
    """A path that is not there from here but lies beside the run file is meant relative to the run file."""
    try:
        found = folder / path
        there = found.exists() or ("*" in path and any(glob(str(found), recursive=True)))
        return str(found) if not Path(path).expanduser().exists() and there else path
    except (OSError, ValueError, RuntimeError):  # it can be no path, which `_usable` says
        return path

"""What a method of training is: one record of functions a kind, and all that the program asks of it.

Light: the functions that need torch are named ("methods.attach_lora") and imported when they are first called. A method from outside is its
options in `run.METHODS` and its record in `METHODS`; nothing else tests which method a run has.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import families, options
from . import run as runs
from .errors import UserError
from .run import Run

FUSED = ("llama", "mistral", "qwen2", "qwen3")  # model types with a fused block (fused.py)


def late(name: str) -> Callable[..., Any]:
    """A function of another file of this package, imported when it is first called."""
    file, _, function = name.rpartition(".")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f".{file}", __package__), function)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


_count_attached, _save_whole, _reference_copies = map(
    late, ("methods.count_attached", "methods.save_whole", "methods.reference_copies")
)


@dataclass
class Reference:
    """Where training began. `kept`: the tensors that bring it back (empty where it is brought back by switching something off); `open`: the
    context in which the model computes it."""

    kept: dict[str, Any]
    open: Callable[[], AbstractContextManager[Any]]
    inside: bool = False


@dataclass(frozen=True)
class Method:
    """One way of training. `options` is the run's group `method` (an instance of `run.METHODS[kind]`) after `resolve`; `model` a prepared
    native model (layers.prepare); `folder` of `resolve`, `count` and `depth` that of the base model. Only `attach` must be given, and `load`
    where `adapter` is set."""

    # (model, options, seed): makes the trained parameters, in place. All others are frozen already.
    attach: Callable[[Any, Any, int], None]
    # (model, options, first): gives them their first values, where those come from a file or the data. first(n): the data's first n ids.
    begin: Callable[[Any, Any, Callable[[int], list[int]]], None] = lambda model, options, first: None
    # (options, run, folder) -> options with everything found out that follows from the model: names of layers, what `start` says.
    resolve: Callable[[Any, Run, Path], Any] = lambda options, run, folder: options
    # (options, folder) -> how many numbers are trained. As it stands: counted on a model without weights.
    count: Callable[[Any, Path], int] = _count_attached
    # (options) -> what is trained, in words.
    describe: Callable[[Any], str] = lambda options: options.kind

    # Whether what is saved stands beside the base model (OUT/adapter); else it is a whole model (OUT/model).
    adapter: bool = False
    # (model, folder, options, base, fingerprint): writes it. An adapter's folder holds adapter_config.json with its peft_type and base.
    # base: the name of the base model for other programs; fingerprint: of its contents (families.fingerprint), where it is known.
    save: Callable[[Any, Path, Any, str, str | None], None] = _save_whole
    # (model, folder): attaches a saved adapter in place of what is attached, or raises UserError and leaves that as it was.
    load: Callable[[Any, Path], None] | None = None
    # (model): takes an attached adapter off, bit for bit; does nothing where there is none.
    unload: Callable[[Any], None] = lambda model: None
    # (model) -> context in which what is attached has no effect; does nothing where nothing is.
    disabled: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext()
    # (model, cast): adds an attached adapter to the weights and takes it off. None: it is no change of weights.
    merge: Callable[[Any, Callable[..., Any]], None] | None = None
    # Of its adapter_config.json: by it `methods.load` and `start` find who reads a folder.
    peft_type: str | None = None
    # (folder) -> what a saved adapter says of the options: with it a run can start from one.
    options_of: Callable[[Any], dict[str, Any]] | None = None
    # (model) -> why plain PEFT would compute something else with what is saved; for its README.
    not_in_peft: Callable[[Any], str | None] = lambda model: None

    # (model, options, keep) -> where training began; called where it does. keep: also if that takes a copy of the model's own weights.
    reference: Callable[[Any, Any, bool], Reference] = _reference_copies
    # Whether it changes answers before the first step, so that those "before training" are asked with it disabled.
    changes_at_start: bool = False

    # (options) -> why the fused path cannot compute it; None: it can.
    why_not_fused: Callable[[Any], str | None] = lambda options: f"method {options.kind}"
    # Whether the model is loaded in fp32, because every weight is trained.
    whole: bool = False
    # (shape, how) -> what the backward pass keeps more than through frozen weights: bytes a token and block, and bytes once (estimate.py).
    activations: Callable[[Any, Any], tuple[float, float]] = lambda shape, how: (0.0, 0.0)
    # (options, folder, layers) -> the share of the blocks that gradients pass through.
    depth: Callable[[Any, Path, int], float] = lambda options, folder, layers: 1.0
    # (shape) -> numbers trained and depth at the usual options, for `doctor --fit`; None: it is not asked there.
    usual: Callable[[Any], tuple[int, float]] | None = None

    # (options, name of a parameter) -> multiplies the scheduled learning rate.
    lr_scale: Callable[[Any, str], float] = lambda options, name: 1.0


def of(options: Any) -> Method:
    """The record of a run's method."""
    return METHODS[options.kind]


def trains_base(kind: str) -> bool:
    """Whether gradient steps change the model's own weights: such a method cannot have them packed, and keeps them in fp32."""
    return getattr(runs.METHODS[kind], "trains_base", False)


def reader(peft_type: Any) -> tuple[str, Method] | None:
    """Kind and record of the method whose saved adapters have this peft_type."""
    return next(((kind, one) for kind, one in METHODS.items() if one.peft_type and one.peft_type == peft_type), None)


# --- which path computes it ---------------------------------------------------------------------------------------------


def why_modules(run: Run, options: Any, config: dict[str, Any], settings: dict[str, Any], longest: int | None) -> str | None:
    """Why a run goes through the model's own modules, as far as it can be told without the model; None: the fused path is for it.

    options: of its method, resolved; config: of the native model; settings: what the run's `auto` stands for (device, precision, quant, checkpointing). With a model,
    `forward.choose_path` asks here too, and then the model itself.
    """
    reason = of(options).why_not_fused(options)
    if reason is not None:
        return reason
    for given, what in ((run.neftune, "NEFTune is on"), (settings["checkpointing"], "checkpointing is on")):
        if given:
            return what
    if not settings["device"].startswith("cpu"):
        return f"the model runs on {settings['device']}; fused is only the CPU"
    if settings["precision"] not in ("fp32", "bf16"):
        return f"products run in {settings['precision']}; fused are fp32 and bf16"
    if settings["quant"]:
        return f"weights are kept in {settings['quant']}; fused are dense ones"
    return no_fused_block(config, longest)


def no_fused_block(config: dict[str, Any], longest: int | None) -> str | None:
    """Why a model of this config.json has no fused block, or None. longest: the longest row that will come, so that a sliding window at
    least as long is no obstacle."""
    kind = config.get("model_type")
    if kind not in FUSED:
        return f"model type '{kind}' has no fused block; fused are {', '.join(FUSED)}"
    if config.get("hidden_act", "silu") != "silu":
        return f"activation '{config['hidden_act']}'; fused is only silu"
    if config.get("attention_dropout"):
        return f"attention_dropout is {config['attention_dropout']}; fused attention has none"
    window = _sliding_window(config)
    if window is not None and (longest is None or longest > window):
        return f"attention slides over {window} tokens, and segments may be longer"
    return None


def _sliding_window(config: dict[str, Any]) -> int | None:
    """The window that some layer's attention slides over. Qwen carries one that counts only where it is switched on, or a layer says so."""
    if config["model_type"] == "llama":
        return None
    window = config.get("sliding_window", 4096)  # transformers' own default, for files that leave it out
    if config["model_type"] == "mistral":
        return window
    kinds = config.get("layer_types")
    if kinds is not None:
        return window if "sliding_attention" in kinds else None
    slides = config.get("use_sliding_window") and config.get("num_hidden_layers", 32) > config.get("max_window_layers", 28)
    return window if slides else None


# --- start: going on from a saved adapter -------------------------------------------------------------------------------


def continued(
    options_: Any, run: Run, folder: Path, same: Callable[[dict[str, Any], set[str]], set[str]] = lambda found, given: given
) -> Any:
    """method.start: rank, targets and the like are those of the adapter. What the run says of them itself must agree.

    same(what the adapter says, names that the run says itself) -> those names, without what agrees under another spelling; it may raise.
    """
    if not options_.start:
        return options_
    record, config = of(options_), families.adapter_config(options_.start)
    if not config:
        raise UserError(
            f"method.start={options_.start} is neither an adapter nor a finished run; wanted a folder with adapter_config.json"
        )
    if record.options_of is None or config.get("peft_type") != record.peft_type:
        found = reader(config.get("peft_type"))
        raise UserError(
            f"method.start={options_.start} holds a {found[0] if found else config.get('peft_type')} adapter, this run has method={options_.kind}"
        )
    check_base("method.start", options_.start, folder)
    found = record.options_of(options_.start)
    given = found.keys() & options_.model_fields_set
    if run.resolved:  # a run file that train wrote has every option in it, the defaults too
        fields = type(options_).model_fields
        given = {name for name in given if getattr(options_, name) != fields[name].get_default(call_default_factory=True)}
    given = same(found, given)
    wrong = min((name for name in given if getattr(options_, name) != found[name]), default=None)
    if wrong:
        there = options.said(found[wrong])
        raise UserError(
            f"method.start={options_.start} has {wrong} {there if len(there) < 100 else 'otherwise'}, this run says "
            f"{options.said(getattr(options_, wrong))}; leave method.{wrong} out"
        )
    return options_.model_copy(update=found)


def check_base(option: str, adapter: str, folder: Path) -> None:
    """An adapter that a run builds on must have been made for the run's model, where it says for which. Raises UserError."""
    path = Path(adapter).expanduser()
    for place in (path, path / "adapter"):
        known = families.trained_on(place)
        if known is not None and known != families.fingerprint(folder):
            raise UserError(
                f"{option}: {adapter} was trained on another base model than {folder} (their fingerprints differ); give that base as model=, "
                f"or bring the adapter over to this one: glmtune import {place} --model {folder} --to NEW"
            )


# --- LoRA ---------------------------------------------------------------------------------------------------------------


def lora_parameters(shapes: dict[str, list[int]], ranks: dict[str, int], shared: Sequence[Sequence[str]] = ()) -> int:
    """Trainable parameters of LoRA on these layers: rank * (in + out) each. `shared`: layers that have one A together."""
    once = sum(ranks[name] * shapes[f"{name}.weight"][1] for group in shared for name in group[1:])
    return sum(rank * sum(shapes[f"{name}.weight"]) for name, rank in ranks.items()) - once


def lora_size(shape: Any, rank: int = 8) -> int:
    """Of LoRA on every linear layer of Llama-shaped blocks (estimate.Shape)."""
    d, q, k, f = shape.hidden, shape.queries, shape.keys, shape.inner
    return rank * shape.layers * ((d + q) * 2 + (d + k) * 2 + (d + f) * 3)


def _resolve_lora(method: Any, run: Run, folder: Path) -> Any:
    if method.start and method.pissa:
        raise UserError("method.start goes on from an adapter, method.pissa starts anew from the weights; give one")
    names = families.linear_names(folder)

    def same(found: dict[str, Any], given: set[str]) -> set[str]:  # layers are compared, however they are named
        foreign = [name for name in found["targets"] if name not in names]
        if foreign:
            raise UserError(f"method.start={method.start} was made for another model: {foreign[0]} is no layer of this one")
        wanted = (
            families.pick_targets(families.published_targets(_listed(method.targets), folder), names) if "targets" in given else []
        )
        return given - ({"targets"} if wanted == [name for name in names if name in found["targets"]] else set())

    method = continued(method, run, folder, same)
    targets = families.pick_targets(families.published_targets(_listed(method.targets), folder), names)
    own = {  # layers of their own rank or alpha, under native names too
        option: {
            leaf: value
            for name, value in getattr(method, option).items()
            for leaf in families.published_targets([name], folder) or ()
        }
        for option in ("ranks", "alphas")
    }
    method = method.model_copy(update=own)
    sizes = families.lora_sizes(method, targets)  # names in ranks and alphas
    for group in families.sharing(targets) if method.share_a else ():
        if len({sizes[name][0] for name in group}) > 1:
            ranks = ", ".join(f"{name} {sizes[name][0]}" for name in group)
            raise UserError(f"method.share_a gives q, k and v of a block one A, so they need one rank; method.ranks gives {ranks}")
    _check_beside(method, folder)
    return method.model_copy(update={"targets": targets})


def _listed(targets: Any) -> list[str] | None:
    """The option `targets` as a list; None: all linear layers."""
    given = [targets] if isinstance(targets, str) else targets
    return None if given == ["all-linear"] else given


def _check_beside(method: Any, folder: Path) -> None:
    """Names in `modules_to_save` and folders in `under`, before a model is loaded. Raises UserError."""
    linear = set(families.linear_names(folder))
    modules = {name.rsplit(".", 1)[0] for name in families.tensor_shapes(folder)} - linear | {"lm_head"}
    families.named_whole(method.modules_to_save, modules)
    for given in method.under:
        config = families.adapter_config(given)
        if not config or not families.plain_lora(config):
            what = "is not a plain LoRA adapter" if config else "is neither an adapter nor a finished run"
            raise UserError(f"method.under: {given} {what}; only plain LoRA adapters can stay beneath another one")
        check_base("method.under", given, folder)


def _count_lora(method: Any, folder: Path) -> int:
    shapes = families.tensor_shapes(folder)
    sizes = families.lora_sizes(method, method.targets)
    shared = families.sharing(method.targets) if method.share_a else []
    count = lora_parameters(shapes, {name: rank for name, (rank, _) in sizes.items()}, shared)
    count += sum(shapes[f"{name}.weight"][0] for name in method.targets) if method.dora else 0
    whole = (
        name
        for name in families.parameter_names(folder)
        for one in method.modules_to_save
        if families.is_module(name.rsplit(".", 1)[0], one)
    )
    return count + count_weights(folder, whole)


def count_weights(folder: Path, names: Iterable[str] | None = None) -> int:
    """Numbers in these parameters of a model folder, None: in all of them. Tied weights are one, under two names."""
    shapes = families.tensor_shapes(folder)
    tied = bool(families.config_of(folder).get("tie_word_embeddings"))
    size = {name: math.prod(shape) for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}
    head = next((name for name in size if "embed" in name), "") if tied else ""
    chosen = size if names is None else {head if tied and name == "lm_head.weight" else name for name in names}
    return sum(size[name] for name in chosen)


def _describe_lora(method: Any) -> str:
    also = [name for name in ("dora", "rslora", "pissa") if getattr(method, name)]
    also += [f"and whole {', '.join(method.modules_to_save)}"] if method.modules_to_save else []
    also += [f"on top of {', '.join(method.under)}"] if method.under else []
    also += [f"going on from {method.start}"] if method.start else []
    names = ", ".join(sorted({name.split(".")[-1] for name in method.targets}))
    return " ".join([f"LoRA rank {method.rank} on {names}", *also])


def _lora_not_fused(method: Any) -> str | None:
    ways = {
        "dropout": "dropout is on",
        "dora": "DoRA is on",
        "pissa": "PiSSA is on",
        "under": "other adapters are beneath",
        "modules_to_save": "modules are trained whole",
    }
    return next((what for name, what in ways.items() if getattr(method, name)), None)


def _lora_activations(shape: Any, how: Any) -> tuple[float, float]:
    d, q, k, f = shape.hidden, shape.queries, shape.keys, shape.inner
    if how.dropout:  # each adapter (q, k, v, gate, up; o; down) keeps its own x and the scale it was given
        layer = 2 * 4.0 * (5 * d + q + f)
    else:  # what A reads: one x for layers with the same input, o's is there already
        layer = 4.0 * (2 * d + f)
    if how.dora:  # y of every layer before it is brought to its length
        layer += 4.0 * (2 * d + q + 2 * k + 2 * f)
    return layer, 0.0


# --- prefix -------------------------------------------------------------------------------------------------------------


def _describe_prefix(method: Any) -> str:
    return f"a prefix of {method.num_virtual_tokens} tokens in every layer{', made by a network' if method.projection else ''}"


# --- freeze and full ----------------------------------------------------------------------------------------------------


def _count_freeze(method: Any, folder: Path) -> int:
    return count_weights(folder, families.frozen_choice(method, families.parameter_names(folder)))


def _describe_freeze(method: Any) -> str:
    given = ", ".join(f"{k} {v}" for k, v in method.model_dump(exclude_defaults=True).items() if k != "kind")
    return f"of some blocks ({given or 'the last 3'})"


def _freeze_depth(method: Any, folder: Path, layers: int) -> float:
    """The trained blocks and those above."""
    trained = families.frozen_choice(method, families.parameter_names(folder))
    numbers = {int(found[1]) for name in trained if (found := re.search(r"\.(\d+)\.", name))}
    return 1 - min(numbers, default=layers) / layers


def _weights_activations(shape: Any, how: Any) -> tuple[float, float]:
    """The normed x for the norms' weights; what the others read, which products in 16 bits cast for each. And once the trained weights'
    own casts: they are fp32, and cast for their products (checkpointing: those of one block)."""
    d, q, f = shape.hidden, shape.queries, shape.inner
    if how.precision == "fp32":
        return 4.0 * 2 * d + 4.0 * (2 * d + f), 0.0
    return 4.0 * 2 * d + 2.0 * (5 * d + q + f), 2.0 * shape.linear * (1 / shape.layers if how.checkpointing else how.depth)


# --- the registry -------------------------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    "lora": Method(
        attach=late("methods.attach_lora"),
        begin=late("methods.begin_lora"),
        resolve=_resolve_lora,
        count=_count_lora,
        describe=_describe_lora,
        adapter=True,
        save=late("methods.save_lora"),
        load=late("methods.load_lora"),
        unload=late("methods.unload_lora"),
        disabled=late("methods.disabled_lora"),
        merge=late("methods.merge_lora"),
        peft_type="LORA",
        options_of=late("adapters.lora_options"),
        reference=late("methods.reference_lora"),
        why_not_fused=_lora_not_fused,
        activations=_lora_activations,
        usual=lambda shape: (lora_size(shape), 1.0),
        lr_scale=lambda method, name: (method.lr_ratio or 1.0) if name.endswith("lora_B") else 1.0,
    ),
    "prefix": Method(
        attach=late("methods.attach_prefix"),
        begin=late("methods.begin_prefix"),
        resolve=lambda method, run, folder: continued(method, run, folder),
        count=lambda method, folder: families.prefix_parameters(folder, method.num_virtual_tokens, method.projection),
        describe=_describe_prefix,
        adapter=True,
        save=late("methods.save_prefix"),
        load=late("methods.load_prefix"),
        unload=late("methods.unload_prefix"),
        disabled=late("prefix.disabled"),
        peft_type="PREFIX_TUNING",
        options_of=late("adapters.prefix_options"),
        not_in_peft=late("prefix.plain_peft"),
        reference=late("methods.reference_prefix"),
        changes_at_start=True,
        usual=lambda shape: (128 * shape.layers * shape.keys, 1.0),
    ),
    "freeze": Method(
        attach=late("methods.attach_freeze"),
        count=_count_freeze,
        describe=_describe_freeze,
        reference=late("methods.reference_weights"),
        activations=_weights_activations,
        depth=_freeze_depth,
        usual=lambda shape: (3 * shape.linear // shape.layers, 3 / shape.layers),
    ),
    "full": Method(
        attach=late("methods.attach_full"),
        count=lambda method, folder: count_weights(folder),
        describe=lambda method: "every weight",
        reference=late("methods.reference_weights"),
        whole=True,
        activations=_weights_activations,
        usual=lambda shape: (shape.parameters, 1.0),
    ),
}

"""What a run's `auto` and null stand for, and what the estimate goes by: decided here, once, before step 1.

Everything follows from the machine's flags, the model and the lengths, never from timing. It is written into run.yaml and read from there on
resume, so that a run goes on with the numbers it began with.
"""

import functools
import math
import os
from pathlib import Path
from typing import Any

from . import __version__, batch, estimate, families, method, plan
from .errors import UserError
from .run import Run, default_lr
from .stages import STAGES

# Compiling the pointwise kernels takes 10 to 60 s and pays where a run has many tokens and its steps are not tiny (LOG.md).
COMPILE_TOKENS, COMPILE_STEP = 40_000, 1024
MICRO_TOKENS = 2048  # optim.micro_tokens null


def resolve(made: plan.Plan) -> dict[str, Any]:
    """Everything that `auto` and null stand for. Follows from the machine's flags, the model and the lengths; never from timing."""
    import torch

    run = made.run
    device = families.pick_device(run.device)
    precision = families.pick_precision(run.precision, device)
    rows, size = made.examples.num_rows, run.optim.batch_size
    steps = batch.num_steps(rows, size, run.optim.epochs, run.optim.steps)
    tokens = sum(made.lengths) / batch.steps_per_epoch(rows, size)  # of a step, on average
    settings = {
        "device": str(device),
        "precision": precision,
        "quant": made.quant,
        "threads": torch.get_num_threads(),
        "micro_tokens": run.optim.micro_tokens or MICRO_TOKENS,
        "lr": run.optim.lr or default_lr(run.method, run.stage.kind)[0],
        "steps": steps,
        "checkpointing": run.checkpointing is True,
        "compile": tokens * steps > COMPILE_TOKENS and tokens > COMPILE_STEP,
        "data": made.examples.fingerprint,
        "date": made.template.date,
        "version": __version__,
    }
    if run.checkpointing == "auto":  # only where there is no room without
        need = sum(estimate.memory(made.shape, setting(made, settings)).values())
        settings["checkpointing"] = need > _free(device)
    return settings


@functools.cache
def matmul_rate(device: str, precision: str) -> float:
    """Measured once: a process that trains many runs need not wait for it each time."""
    return estimate.matmul_rate(families.pick_device(device), precision)


def _free(device: Any) -> int:
    """Bytes of memory that are free on a device."""
    import psutil
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def base(made: plan.Plan) -> dict[str, str]:
    """Which model a run is trained on. Its name may mean another one in another folder, or tomorrow."""
    return {"base": os.path.abspath(made.folder), "fingerprint": families.fingerprint(made.folder)}


def _names_built_on(run: Run) -> list[str]:
    """The adapters that a run goes on from."""
    start = getattr(run.method, "start", None)
    return [*getattr(run.method, "under", ()), *([start] if start else [])]


def built_on(run: Run) -> dict[str, dict[str, list[str]]]:
    """They are named as the model is: where each was, absolutely, and what it held."""
    if not _names_built_on(run):
        return {"adapters": {}}
    from . import adapters

    return {"adapters": {name: [os.path.abspath(Path(name).expanduser()), adapters.digest(name)] for name in _names_built_on(run)}}


def as_recorded(run: Run, resolved: Any) -> Run:
    """The run with the adapters that it goes on from where they were when it began. Raises UserError where one is another now."""
    recorded = resolved.get("adapters", {})
    if not recorded.keys() & set(_names_built_on(run)):
        return run
    from . import adapters

    for path, digest in recorded.values():
        if adapters.digest(path) != digest:
            raise UserError(
                f"the adapter {path}, which this run goes on from, changed since it was started; put it back, or choose another out="
            )
    places = {name: path for name, (path, _) in recorded.items()}
    given = {
        "under": [places.get(name, name) for name in getattr(run.method, "under", ())],
        "start": places.get(getattr(run.method, "start", None)),
    }
    return run.model_copy(
        update={"method": run.method.model_copy(update={k: v for k, v in given.items() if getattr(run.method, k, None)})}
    )


def refuse_other_data(settings: dict[str, Any], made: plan.Plan, out: Path) -> None:
    if settings["data"] != made.examples.fingerprint:
        raise UserError(
            f"the data, template or tokenizer changed since {out} was started, so it cannot be continued; put it back, or choose another out="
        )


def refuse_without_room(made: plan.Plan, settings: dict[str, Any], out: Path) -> None:
    device = families.pick_device(settings["device"])
    where = settings["device"] if device.type == "cuda" else "this machine"
    estimate.refuse_memory(made.shape, setting(made, settings), _free(device), where)
    kept = made.shape.trainable * 12
    if not method.of(made.method).adapter:
        kept = made.shape.parameters * 4 + made.shape.trainable * 8
    estimate.refuse_disk(out, kept, made.run.save.keep)


def setting(made: plan.Plan, settings: dict[str, Any]) -> estimate.Setting:
    """What the estimate goes by. Micro-batches of the module path are padded, so a few tokens more than micro_tokens can be learned."""
    run, longest = made.run, made.longest
    step = sum(sorted(made.examples.row_lengths)[-run.optim.batch_size :])
    learned = made.examples.num_learned / max(1, sum(made.lengths))
    alone = max(made.examples.row_lengths) if STAGES[run.stage.kind].together else longest  # what is never cut
    tokens = max(alone, min(settings["micro_tokens"], step))
    fused = method.why_modules(run, made.method, families.config_of(made.folder), settings, longest) is None
    depth = method.of(made.method).depth(made.method, made.folder, made.shape.layers)
    return estimate.Setting(
        run.method.kind, settings["precision"], settings["quant"], run.optim.kind, tokens, longest, round(tokens * learned),
        settings["checkpointing"], fused, depth,
        bool(getattr(made.method, "dropout", 0)), bool(getattr(made.method, "dora", False)), settings["device"] == "cpu",
    )  # fmt: skip


def line(settings: dict[str, Any]) -> str:
    return (
        f"{settings['steps']} steps on {settings['device']} ({settings['threads']} threads), "
        f"frozen weights {settings['quant'] or settings['precision']}, products {settings['precision']}, sums and trained weights fp32, "
        f"lr {settings['lr']:g}{', checkpointing' if settings['checkpointing'] else ''}"
    )


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then constant, or linear or cosine down to 0 at the end.

    warmup below 1 is a share of `steps`, otherwise a number of steps.
    """
    rising = round(warmup * steps) if warmup < 1 else round(warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    share = (step - rising) / max(1, steps - rising)
    return peak * (1 - share) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * share))

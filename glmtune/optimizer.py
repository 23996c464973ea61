"""Optimizers by name, their whole state as plain tensors and numbers, and the loss scale of fp16."""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from . import method, quant
from .errors import UserError
from .run import Run

GROWTH = 500  # finite steps after which the loss scale is doubled
LEAST = 2.0**-14  # a scale below it means that the numbers themselves are no good


def make(run: Run, lr: float, parameters: dict[str, nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The run's optimizer. Vectors (norms, biases, magnitudes) are not decayed. A group's `times` is its share of the learning rate:
    LoRA+ (arXiv 2402.12354) lets B learn `lr_ratio` times as fast as A."""
    record = method.of(run.method)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = run.optim.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, record.lr_scale(run.method, name)), []).append(parameter)
    made = [{"params": held, "weight_decay": decay, "times": times, "lr": lr * times} for (decay, times), held in groups.items()]
    optimizer = OPTIMIZERS[run.optim.kind](made, lr, device)
    # Fused and 8-bit kernels change parameters without counting it, and what is kept for decoding goes by that count (prefix.Encoder.parts).
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(list(parameters.values())))
    return optimizer


def _adamw(groups: list[dict[str, Any]], lr: float, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))


def _adamw8bit(groups: list[dict[str, Any]], lr: float, device: torch.device) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('optim.kind=adamw8bit needs bitsandbytes: pip install "glmtune[quant]"; or use optim.kind=adamw')
    quant.bitsandbytes()  # without its warnings
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=lr)


def _adafactor(groups: list[dict[str, Any]], lr: float, device: torch.device) -> torch.optim.Optimizer:
    """With the learning rate as given, not one of its own making."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
}


def state_of(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything an optimizer remembers: tensors on the CPU and plain numbers, both by `parameter.key`."""
    tensors, numbers = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):  # copies: bitsandbytes shares its tables, and a file holds nothing twice
                tensors[f"{name}.{key}"] = value.detach().cpu().clone()
            else:
                numbers[f"{name}.{key}"] = value
    return tensors, numbers


def restore(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """The reverse of `state_of`."""
    held: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for given in (tensors, numbers):
        for full, value in given.items():
            name, _, key = full.rpartition(".")
            device = "cpu" if key == "step" else parameters[name].device  # as AdamW keeps it
            held[name][key] = value.to(device) if isinstance(value, torch.Tensor) else value
    for name, state in held.items():
        if state:
            optimizer.state[parameters[name]] = state


class Scaler:
    """The loss is multiplied before the backward pass, so that small gradients survive fp16, and gradients are divided after it. A step
    whose gradient is not finite is left out and the scale halved (arXiv 1710.03740, section 3.2). Kept in the run's state."""

    def __init__(self, state: Any):
        self.state = state  # runfolder.State: scale, steady

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.state.scale)

    def good(self) -> None:
        self.state.steady += 1
        if self.state.steady >= GROWTH:
            self.state.scale, self.state.steady = self.state.scale * 2, 0

    def smaller(self) -> bool:
        """Halves the scale; False where it is so small that this is no overflow any more."""
        self.state.scale, self.state.steady = self.state.scale / 2, 0
        return self.state.scale >= LEAST

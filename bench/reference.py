"""Memory that a forward of the reference takes (methods.reference), against one of the base model alone.

    python bench/reference.py [--tokens 512] [--save NAME] [--small]

Each line is a process of its own: the model is loaded, the method attached, its start held, and every trained number moved as an optimizer would
move it; then the largest resident size during one forward of hidden states and log-probabilities inside `reference`, as a stage makes it. The
base is the same forward of the model with nothing attached; `trained` is what the method itself has, reference or not. Linux only (/proc).
"""

import contextlib
import ctypes
import gc
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import _common as common

METHODS: dict[str, Any] = {
    "base": None,
    "lora": ("lora", {}),
    "dora": ("lora", {"dora": True}),
    "pissa": ("lora", {"pissa": True}),
    "prefix": ("prefix", {"num_virtual_tokens": 64}),
    "prefix, projection": ("prefix", {"num_virtual_tokens": 64, "projection": True}),
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options = common.parse(parser)
    if options.part:
        print(json.dumps(measured(options.part, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            options.model, _ = common.tiny_inputs(Path(folder))
            options.tokens = 32
        say = common.saying(options)
        say(common.told(None, tokens=options.tokens, precision=options.precision))
        say(f"{'':20} peak MB  over the base  trained MB")
        base = 0.0
        for name in METHODS:
            found = common.child(options, name)
            base = base or found["peak"]
            say(f"{name:20} {found['peak'] / 1e6:7.0f} {100 * (found['peak'] / base - 1):+12.1f} % {found['trained'] / 1e6:11.1f}")


def measured(name: str, options: Any) -> dict[str, int]:
    """Bytes."""
    import torch

    from glmtune import families, losses, method, methods, run

    model = families.load_model(options.model, dtype=options.precision, device="cpu")
    methods.prepare(model, families.as_dtype(options.precision))
    model.requires_grad_(False)
    inside = contextlib.nullcontext
    if METHODS[name] is not None:
        kind, given = METHODS[name]
        chosen = run.METHODS[kind](**given)
        methods.attach(model, chosen, seed=0)
        method.of(chosen).begin(model, chosen, lambda count: list(range(100, 100 + count)))
        methods.hold_start(model, chosen)
        with torch.no_grad():
            for parameter in methods.trainable(model).values():
                parameter += 0.01
        inside = lambda: methods.reference(model)  # noqa: E731
    head = model.get_output_embeddings()
    ids = torch.arange(options.tokens).reshape(1, -1) % (head.weight.shape[0] - 100) + 100
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading and attaching freed is no need of the reference
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    with inside(), torch.no_grad():
        for _ in range(2):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            losses.logps(hidden, head.logits, ids[0])
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return {"peak": int(found[1]) * 1024, "trained": 4 * sum(p.numel() for p in methods.trainable(model).values())}


if __name__ == "__main__":
    main()

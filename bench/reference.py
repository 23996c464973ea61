"""Memory that a forward of the reference takes (methods.reference), against one of the base model alone.

    python bench/reference.py [--tokens 512] [--save reference.txt]

Each line is a process of its own: SmolLM2-135M is loaded, the method attached, its start held, three steps made as an optimizer would change the
numbers; then the largest resident size during one forward of hidden states and log-probabilities inside `reference`, as a stage makes it. The
base is the same forward of the model with nothing attached. Linux only (/proc).
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
METHODS: dict[str, Any] = {
    "base": None,
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"pissa": True},
    "prefix": {"num_virtual_tokens": 64},
    "prefix, projection": {"num_virtual_tokens": 64, "projection": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--save", default=None, help="name of a result file in bench/results/")
    parser.add_argument("--measure", default=None, choices=METHODS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(measured(given.measure, given.tokens, given.precision))
        return
    lines = [
        f"$ python bench/reference.py --tokens {given.tokens} --precision {given.precision}",
        f"{'':20} peak MB  over the base",
    ]
    base = 0.0
    for name in METHODS:
        command = [sys.executable, __file__, "--tokens", str(given.tokens), "--precision", given.precision, "--measure", name]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        base = base or peak
        lines.append(f"{name:20} {peak / 1e6:7.0f}  {100 * (peak / base - 1):+.1f} %")
        print("\n".join(lines[-3:] if name == "base" else lines[-1:]), flush=True)
    if given.save:
        (ROOT / "bench" / "results" / given.save).write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured(name: str, tokens: int, precision: str) -> int:
    """Bytes."""
    import contextlib
    import ctypes
    import gc

    import torch

    from glmtune import families, losses, method, methods, run

    model = families.load_model("smollm2-135m-instruct", dtype=precision, device="cpu")
    methods.prepare(model, families.as_dtype(precision))
    model.requires_grad_(False)
    options = METHODS[name] and None
    if METHODS[name] is not None:
        options = (run.Prefix if "prefix" in name else run.Lora)(**METHODS[name])
        methods.attach(model, options, seed=0)
        method.of(options).begin(model, options, lambda count: list(range(100, 100 + count)))
        methods.hold_start(model, options)
        with torch.no_grad():
            for parameter in methods.trainable(model).values():
                parameter += 0.01
    ids = torch.arange(tokens).reshape(1, -1) % 40_000 + 100
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading and attaching freed is no need of the reference
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    with methods.reference(model) if options is not None else contextlib.nullcontext(), torch.no_grad():
        for _ in range(2):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            losses.nll(hidden, model.get_output_embeddings().weight, ids[0], torch.ones(tokens))
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


main()

"""The memory estimate of `glmtune show` against the measured peak of the training process, over settings.

    python bench/memory.py FILE.json [--rows 48] [--save NAME] [--small]

Eight rows a step, one pass, 1,024 tokens at once, so that micro-batches are full and the heap has time to grow. Peaks are those of
whole processes (`peak_memory_gb` of log.jsonl): program, loading and training; the checkpoint at the end is not in them.
"""

import json
import sys
import tempfile
from pathlib import Path

import _common as common

SETTINGS = {
    "lora, bf16": ["precision=bf16"],
    "lora, fp32": ["precision=fp32"],
    "lora, bf16, dropout": ["precision=bf16", "method.dropout=0.05"],
    "dora, fp32": ["precision=fp32", "method.dora=true"],
    "lora, fp32, checkpointing": ["precision=fp32", "checkpointing=true"],
    "lora, nf4": ["precision=bf16", "quant=nf4"],
    "prefix, bf16": ["precision=bf16", "method=prefix"],
    "freeze, fp32": ["precision=fp32", "method=freeze"],
    "full, fp32": ["precision=fp32", "method=full"],
    "full, bf16, adafactor": ["precision=bf16", "method=full", "optim=adafactor"],
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = common.parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            options.model, options.file = common.tiny_inputs(Path(folder))
            options.rows, options.only = 8, ["lora, fp32", "prefix, bf16"]
        elif not options.file:
            parser.error("name a file of rows, or --small")
        say = common.saying(options)
        say(common.told(options.file, rows=options.rows))
        say(f"{'setting':32} estimated  measured  ratio")
        for number, name in enumerate(options.only):
            usual = [
                f"model={options.model}", f"data={options.file}", f"data.0.max_samples={options.rows}", "optim.epochs=1", "optim.batch_size=8",
                "optim.micro_tokens=1024", "samples=[]", "max_length=2048",
            ]  # fmt: skip
            program, out = [sys.executable, "-m", "glmtune"], Path(folder) / f"run-{number}"
            shown = json.loads(common.run([*program, "show", *usual, *SETTINGS[name], "--json"]))
            common.run([*program, "train", *usual, *SETTINGS[name], f"out={out}"])
            peak = max(json.loads(line)["peak_memory_gb"] for line in (out / "log.jsonl").read_text().splitlines())
            say(f"{name:32} {shown['memory_gb']:9.2f} {peak:9.2f} {shown['memory_gb'] / peak:6.2f}")


if __name__ == "__main__":
    main()

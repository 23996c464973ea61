"""The memory estimate of `glmtune show` against the measured peak of the training process, over settings.

    python bench/memory.py FILE.json [rows] [--save memory.txt]

Eight rows a step, one pass, 1,024 tokens at once, so that micro-batches are full and the heap has time to grow. Peaks are those of
whole processes (`peak_memory_gb` of log.jsonl): program, loading and training; the checkpoint at the end is not in them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
    given = [argument for argument in sys.argv[1:] if argument != "--save"]
    save = given.pop() if "--save" in sys.argv else None
    file, rows = given[0], int(given[1]) if len(given) > 1 else 48
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if save:  # after each, so that an interrupted run leaves what it has
            (ROOT / "bench" / "results" / save).write_text("\n".join(lines) + "\n", encoding="utf-8")

    say(f"$ python bench/memory.py {Path(file).name} {rows}")
    say(f"{'setting':32} estimated  measured  ratio")
    for name, options in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            usual = [
                "model=smollm2-135m-instruct", f"data={file}", f"data.0.max_samples={rows}", "optim.epochs=1", "optim.batch_size=8",
                "optim.micro_tokens=1024", "samples=[]", "max_length=2048",
            ]  # fmt: skip
            shown = json.loads(run("show", *usual, *options, "--json"))
            run("train", *usual, *options, f"out={folder}/out")
            peak = max(json.loads(line)["peak_memory_gb"] for line in Path(folder, "out/log.jsonl").read_text().splitlines())
        say(f"{name:32} {shown['memory_gb']:9.2f} {peak:9.2f} {shown['memory_gb'] / peak:6.2f}")


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "glmtune", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(re.sub(r"\s+", " ", done.stderr)[-800:])
    return done.stdout


main()

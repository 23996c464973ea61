"""The memory estimate of `glmtune show` against the measured peak of the training process, over settings.

python bench/memory.py FILE.json [rows] [steps]      peaks are those of whole processes, model loading and program included
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "lora, bf16": ["precision=bf16"],
    "lora, fp32": ["precision=fp32"],
    "lora, fp32, micro_tokens 6144": ["precision=fp32", "optim.micro_tokens=6144"],
    "lora, bf16, dropout": ["precision=bf16", "method.dropout=0.05"],
    "dora, fp32": ["precision=fp32", "method.dora=true"],
    "lora, fp32, checkpointing": ["precision=fp32", "checkpointing=true", "optim.micro_tokens=6144"],
    "lora, nf4": ["precision=bf16", "quant=nf4"],
    "prefix, bf16": ["precision=bf16", "method=prefix"],
    "freeze, fp32": ["precision=fp32", "method=freeze"],
    "full, fp32": ["precision=fp32", "method=full"],
    "full, bf16, adafactor": ["precision=bf16", "method=full", "optim=adafactor"],
}


def main() -> None:
    file, rows, steps = sys.argv[1], *(sys.argv[2:] + ["64", "3"][len(sys.argv) - 2 :])
    print(f"{'setting':32} estimated  measured  ratio")
    for name, options in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            given = [
                "model=smollm2-135m-instruct", f"data={file}", f"data.0.max_samples={rows}", f"optim.steps={steps}", "samples=[]", "max_length=2048",
                *options,
            ]  # fmt: skip
            shown = json.loads(run("show", *given, "--json"))
            run("train", *given, f"out={folder}/out")
            peak = max(json.loads(line)["peak_memory_gb"] for line in Path(folder, "out/log.jsonl").read_text().splitlines())
        print(f"{name:32} {shown['memory_gb']:9.2f} {peak:9.2f} {shown['memory_gb'] / peak:6.2f}", flush=True)


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "glmtune", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(re.sub(r"\s+", " ", done.stderr)[-800:])
    return done.stdout


main()

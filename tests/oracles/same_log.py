"""Two commits compute the same: `python tests/oracles/same_log.py OLD_COMMIT [--threads 1] [--keep FOLDER]`.

Trains the same tiny runs (RUNS) with the package of OLD_COMMIT, checked out beside this clone, and with the package of this working tree, on one
machine with one number of threads, and compares every line of every log.jsonl to the last digit, but for times and memory. Prints one line a run
and exits 1 where any number differs. The models and rows are made once, so both commits read the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMED = {"seconds", "tokens_per_second", "peak_memory_gb"}  # not numbers of the run
COMMON = [
    "data=rows.jsonl",
    "samples=[]",
    "report_to=[]",
    "device=cpu",
    "optim.steps=8",
    "optim.batch_size=4",
    "optim.micro_tokens=96",
]
RUNS: dict[str, list[str]] = {
    "LoRA, fused": ["model=llama", "precision=fp32", "method.rank=4"],
    "LoRA, fused, bf16": ["model=llama", "precision=bf16", "method.rank=4"],
    "LoRA, by modules": ["model=llama", "precision=fp32", "method.rank=4", "method.dropout=0.1"],
    "LoRA, ChatGLM3": ["model=chatglm3", "precision=fp32"],
    "DoRA": ["model=llama", "precision=fp32", "method.dora=true"],
    "prefix": ["model=llama", "precision=fp32", "method=prefix", "method.num_virtual_tokens=4"],
    "freeze": ["model=llama", "precision=fp32", "method=freeze", "method.last=1"],
    "full": ["model=llama", "precision=bf16", "method=full"],
    "pretrain": ["model=llama", "precision=fp32", "stage=pretrain", "data=text.jsonl", "max_length=32"],
    "with a dev set": ["model=llama", "precision=fp32", "eval.share=0.2", "eval.every_steps=2"],
    "weights of rows": ["model=llama", "precision=fp32", "data=weighted.jsonl"],
}

TRAIN = "import sys; from glmtune.run import load_run; from glmtune.training import train; train(load_run(None, sys.argv[1:]))"


def write_inputs(folder: Path) -> None:
    """Tiny models and rows, by this working tree."""
    sys.path.insert(0, str(ROOT))
    from tests import published, tiny

    tiny.llama(folder / "llama")
    published.FAMILIES["chatglm3-6b"](folder / "chatglm3")
    tiny.write_rows(folder / "rows.jsonl", tiny.rows(30, 2))
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for row in tiny.rows(20, 2):
            file.write(json.dumps({"text": json.dumps(row, ensure_ascii=False)}) + "\n")
    tiny.write_rows(folder / "weighted.jsonl", [{**row, "weight": 0.5 if i % 2 else 2.0} for i, row in enumerate(tiny.rows(30, 2))])


def log_of(out: Path) -> list[dict]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = given.keep or Path(scratch) / "runs"
        work.mkdir(parents=True, exist_ok=True)
        old = Path(scratch) / "old"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(old), given.commit], cwd=ROOT, check=True)
        try:
            write_inputs(work)
            return compare(work, {"old": old, "new": ROOT}, given.threads)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)


def compare(work: Path, sides: dict[str, Path], threads: int) -> int:
    different = 0
    for number, (name, settings) in enumerate(RUNS.items()):
        given = {one.split("=")[0]: one for one in [*COMMON, *settings]}
        logs = {}
        for side, code in sides.items():
            out = work / f"{number}-{side}"
            environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", TRAIN, *given.values(), f"out={out}"]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}, {side} commit: {done.stderr.strip()[-2000:]}")
            logs[side] = log_of(out)
        pairs = list(zip(logs["old"], logs["new"], strict=True))
        apart = [n for n, (a, b) in enumerate(pairs, 1) if any(a[key] != b.get(key) for key in a)]
        different += bool(apart)
        last = pairs[-1][1]["loss"]
        said = f"lines {apart} differ" if apart else "the same to the last digit"
        print(f"{name:20} {len(pairs)} lines, last loss {last!r}: {said}", flush=True)
        if apart:
            print(f"  old {pairs[apart[0] - 1][0]}\n  new {pairs[apart[0] - 1][1]}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

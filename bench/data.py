"""Rows a second from a file to training sequences, glmtune against `datasets.map` with the same tokenizer; memory; the second start.

    python bench/data.py FILE.json [rows] [turns]      FILE: instruction, input, output; it is repeated up to `rows` (200,000)

Side by side, taking turns, one process and two. The other side does what most training scripts do: load_dataset, apply_chat_template,
tokenizer(...), labels with the prompt masked by its length. Needs `pip install -c constraints.txt datasets`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from glmtune import families

MODEL = families.resolve("smollm2-135m-instruct", print)  # made now, so that no child has to

OURS = """
import sys, time, resource, json
from glmtune import plan, run, tokenise
r = run.load_run(None, ["model=%s" % sys.argv[1], "data=%s" % sys.argv[2], "out=none", "max_length=4096"])
start = time.time()
_, wanted = plan.wanted(r, lambda text: None)
made = tokenise.tokenised(wanted, keep=True, workers=int(sys.argv[3]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"seconds": time.time() - start, "rows": made.about["rows"], "tokens": int(made.lengths.sum()), "learned": int(made.arrays["learned"].sum()), "peak_mb": peak}))
"""
THEIRS = """
import sys, time, resource, json
import datasets
from transformers import AutoTokenizer
from glmtune import families
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(families.resolve(sys.argv[1]))
def encode(row):
    question = row["instruction"] + ("\\n" + row["input"] if row["input"] else "")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    prompt = tokenizer(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]}
start = time.time()
rows = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[4])
made = rows.map(encode, remove_columns=rows.column_names, num_proc=int(sys.argv[3]) if sys.argv[3] != "1" else None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"seconds": time.time() - start, "rows": len(made), "peak_mb": peak}))
"""
LIMIT = """
import sys, time, json
from tokenizers import Tokenizer
from glmtune import families
raw = Tokenizer.from_file(str(families.resolve(sys.argv[1]) / "tokenizer.json"))
rows = [json.loads(line) for line in open(sys.argv[2])][:20000]
texts = [part for row in rows for part in (row["instruction"] + "\\n" + row["input"], row["output"])]
start = time.time()
raw.encode_batch_fast(texts, add_special_tokens=False)
print(json.dumps({"rows": len(rows), "seconds": time.time() - start}))
"""


def child(code: str, *arguments: object, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


source, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200_000
TURNS = int(sys.argv[3]) if len(sys.argv) > 3 else 2
rows = json.loads(source.read_text(encoding="utf-8"))
with tempfile.TemporaryDirectory() as folder:
    data, work = Path(folder) / "rows.jsonl", Path(folder)
    with open(data, "w", encoding="utf-8") as file:
        for i in range(count):  # a number of its own, so that no two rows are the same text
            row = rows[i % len(rows)]
            row = {"instruction": f"{row['instruction']} ({i})", "input": row.get("input", ""), "output": row["output"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{count} rows, {data.stat().st_size / 1e6:.0f} MB; {os.cpu_count()} cores")
    for threads in (1, 2):
        limit = child(LIMIT, MODEL, data, RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true")
        print(f"the tokenizer library alone, {threads} threads: {limit['rows'] / limit['seconds']:,.0f} rows/s")
    for workers in (1, 2):
        speed: dict[str, list[float]] = {"glmtune": [], "datasets.map": []}
        for turn in range(TURNS):
            cache = work / f"cache-{workers}-{turn}"
            ours = child(OURS, MODEL, data, workers, GLMTUNE_CACHE=str(cache / "ours"))
            theirs = child(THEIRS, MODEL, data, workers, cache / "theirs")
            speed["glmtune"].append(ours["rows"] / ours["seconds"])
            speed["datasets.map"].append(theirs["rows"] / theirs["seconds"])
        ratio = sum(speed["glmtune"]) / sum(speed["datasets.map"])
        print(
            f"{workers} process(es): "
            + ", ".join(f"{n} {' and '.join(f'{v:,.0f}' for v in vs)} rows/s" for n, vs in speed.items())
            + f"; ratio {ratio:.2f}"
        )
        print(
            f"  peak of the parent: glmtune {ours['peak_mb']:.0f} MB, datasets.map {theirs['peak_mb']:.0f} MB; {ours['tokens']} tokens, {ours['learned']} learned"
        )
    again = child(OURS, MODEL, data, 2, GLMTUNE_CACHE=str(work / f"cache-2-{TURNS - 1}" / "ours"))
    print(f"second start from the cache: {again['seconds']:.2f} s")
print(f"(peak of this script {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB, {time.strftime('%Y-%m-%d')})")

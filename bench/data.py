"""Rows a second from a file to training sequences, glmtune against `datasets.map` with the same tokenizer; memory; the second start.

    python bench/data.py FILE.json [--rows 200000] [--turns 2] [--save NAME] [--small]

FILE holds instruction, input, output; it is repeated up to `--rows`. Side by side, taking turns, one process and two. The other side does
what most training scripts do: load_dataset, apply_chat_template, tokenizer(...), labels with the prompt masked by its length. It needs
`pip install -c constraints.txt datasets`; without, only glmtune is measured.
"""

import argparse
import importlib.util
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import _common as common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--turns", type=int, default=2)
    options = common.parse(parser)
    if options.part:
        print(json.dumps({"model": model, "limit": limit, "glmtune": ours, "datasets.map": theirs}[options.part](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            options.model, options.file = common.tiny_inputs(Path(folder))
            options.rows, options.turns = 100, 1
        elif not options.file:
            parser.error("name a file of rows (instruction, input, output), or --small")
        compare(options, Path(folder))


def compare(options: argparse.Namespace, work: Path) -> None:
    say = common.saying(options)
    options.model = common.child(options, "model")["folder"]
    text = Path(options.file).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    data = work / "repeated.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for i in range(options.rows):  # a number of its own, so that no two rows are the same text
            row = rows[i % len(rows)]
            row = {"instruction": f"{row['instruction']} ({i})", "input": row.get("input", ""), "output": row["output"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    say(common.told(options.file, rows=options.rows, turns=options.turns))
    say(f"{options.rows} rows, {data.stat().st_size / 1e6:.0f} MB; {os.cpu_count()} cores")
    options.file = str(data)
    for threads in (1, 2):
        found = common.child(options, "limit", RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true")
        say(f"the tokenizer library alone, {threads} threads: {found['rows'] / found['seconds']:,.0f} rows/s")
    sides = ["glmtune", "datasets.map"] if importlib.util.find_spec("datasets") else ["glmtune"]
    if len(sides) == 1:
        say("datasets is not installed, so its side is left out")
    last = work
    for workers in (1, 2):
        options.workers = workers
        speed: dict[str, list[float]] = {side: [] for side in sides}
        found = {}
        for turn in range(options.turns):
            last = work / f"cache-{workers}-{turn}"
            for side in sides:
                options.cache = str(last / side)
                found[side] = common.child(options, side, GLMTUNE_CACHE=options.cache)
                speed[side].append(found[side]["rows"] / found[side]["seconds"])
        line = ", ".join(f"{n} {' and '.join(f'{v:,.0f}' for v in vs)} rows/s" for n, vs in speed.items())
        ratio = f"; ratio {sum(speed['glmtune']) / sum(speed['datasets.map']):.2f}" if len(sides) == 2 else ""
        say(f"{workers} process(es): {line}{ratio}")
        peaks = ", ".join(f"{side} {found[side]['peak_mb']:.0f} MB" for side in sides)
        say(f"  peak of the parent: {peaks}; {found['glmtune']['tokens']} tokens, {found['glmtune']['learned']} learned")
    again = common.child(options, "glmtune", GLMTUNE_CACHE=str(last / "glmtune"))
    say(f"second start from the cache: {again['seconds']:.2f} s")
    say(f"(peak of this script {common.peak_gb() * 1e3:.0f} MB, {time.strftime('%Y-%m-%d')})")


def model(options: argparse.Namespace) -> dict:
    """Fetches and converts the model, so that no other child has to."""
    from glmtune import families

    return {"folder": str(families.resolve(options.model))}


def limit(options: argparse.Namespace) -> dict:
    """The tokenizer library by itself, on the texts as they are."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
    with open(options.file, encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 20_000)]
    texts = [part for row in rows for part in (row["instruction"] + "\n" + row["input"], row["output"])]
    start = time.time()
    raw.encode_batch_fast(texts, add_special_tokens=False)
    return {"rows": len(rows), "seconds": time.time() - start}


def ours(options: argparse.Namespace) -> dict:
    from glmtune import plan, tokenise
    from glmtune.run import load_run

    run = load_run(None, [f"model={options.model}", f"data={options.file}", "out=none", "max_length=4096"])
    start = time.time()
    _, wanted = plan.wanted(run, lambda text: None)
    made = tokenise.tokenised(wanted, keep=True, workers=options.workers)
    peak = common.peak_gb() * 1e3
    tokens, learned = int(made.lengths.sum()), int(made.arrays["learned"].sum())
    return {"seconds": time.time() - start, "rows": made.about["rows"], "tokens": tokens, "learned": learned, "peak_mb": peak}


def theirs(options: argparse.Namespace) -> dict:
    import datasets  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(row: dict) -> dict:
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        texts = (
            tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template(messages, tokenize=False),
        )
        prompt, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    start = time.time()
    rows = datasets.load_dataset("json", data_files=options.file, split="train", cache_dir=options.cache)
    made = rows.map(encode, remove_columns=rows.column_names, num_proc=options.workers if options.workers > 1 else None)
    return {"seconds": time.time() - start, "rows": len(made), "peak_mb": common.peak_gb() * 1e3}


if __name__ == "__main__":
    main()

"""What the scripts of this folder share: options, a tiny model for --small, child processes, saved results."""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MODEL = "smollm2-135m-instruct"
sys.path.insert(0, str(ROOT))


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="a tiny model and a few rows: only shows that the script works")
    made.add_argument("--save", metavar="NAME", help="name of a result file in bench/results/")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this process. In a child (`command`), those of its parent, with `part` telling what to do."""
    if sys.argv[1:2] == ["--as"]:
        return argparse.Namespace(**json.loads(sys.argv[2]))
    return argparse.Namespace(**vars(made.parse_args()), part=None)


def command(options: argparse.Namespace, part: str) -> list[str]:
    """This script once more, as one of its parts."""
    return [sys.executable, sys.argv[0], "--as", json.dumps({**vars(options), "part": part})]


def child(options: argparse.Namespace, part: str, **environment: str) -> dict:
    """Runs a part in a process of its own; returns the JSON object in the last line it prints.

    Linux counts the parent's peak memory as the child's: what a child's `peak_gb` is to tell must not be loaded here before.
    """
    return json.loads(run(command(options, part), **environment).splitlines()[-1])


def run(arguments: list[str], **environment: str) -> str:
    """Output of a command; its message and the end of this script where it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(arguments)[:200]}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def tiny_inputs(folder: Path, rows: int = 40) -> tuple[str, str]:
    """A model of 60,000 random weights and rows (instruction, input, output), as --small takes them."""
    from tests import tiny

    made = []
    for row in tiny.rows(rows):
        question, answer = (message["content"] for message in row["messages"])
        made.append({"instruction": question, "input": "", "output": answer})
    return str(tiny.llama(folder / "model", num_hidden_layers=4)), str(tiny.write_rows(folder / "rows.jsonl", made))


def saying(options: argparse.Namespace) -> Callable[[str], None]:
    """A print that also writes all lines so far to --save, so that an interrupted run leaves what it has."""
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / options.save).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return say


def told(*files: str | None, **options: object) -> str:
    """The command line that makes these figures again, files by their names only."""
    words = [Path(file).name for file in files if file] + [f"--{name} {value}" for name, value in options.items()]
    return " ".join(["$ python bench/" + Path(sys.argv[0]).name, *words])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

"""What an earlier version left behind, for tests/test_old.py. Run by hand with that version on the path, once for each version:

    PYTHONPATH=CHECKOUT_OF_THAT_VERSION python tests/old/make.py

It writes tests/old/VERSION/: a tiny model, a finished LoRA run and one that was stopped, the same of a prefix and of full tuning, a folder
of tokenised rows, an export, half a prediction. Pictures, logs for programs and paths of this machine are taken out.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import contextlib

from glmtune import __version__, cli, training
from glmtune.run import load_run
from tests import tiny

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
ELSEWHERE = "/another/machine/model"  # where the base was, as the files say
USUAL = [
    "model=model",
    "data=rows.jsonl",
    "precision=fp32",
    "optim.batch_size=4",
    "samples=[]",
    "report_to=[]",
    "save.every_steps=2",
]
METHODS = {
    "lora": ["method.rank=2"],
    "prefix": ["method=prefix", "method.num_virtual_tokens=3"],
    "full": ["method=full", "optim.lr=1e-3"],
}


class Stop(training.Screen):
    """Ctrl-C after the second step."""

    def step(self, row, total) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), 2)


def command(*arguments: str) -> None:
    assert cli.app(list(arguments), standalone_mode=False) in (0, None)


def make() -> None:
    tiny.llama(Path("model"), **SIZES)
    tiny.write_rows(Path("rows.jsonl"), tiny.rows(6))
    for name, method in METHODS.items():
        given = [*USUAL, *method, "optim.steps=4"]
        training.train(load_run(None, [*given, f"out={name}"]))
        with contextlib.suppress(training.Interrupted):
            training.train(load_run(None, [*given, f"out={name}-stopped"]), screen=Stop())
        shutil.rmtree(f"{name}/checkpoints")
    command("data", "tokenize", "model=model", "data=rows.jsonl", "--to", "tokens")
    command("export", "lora", "--to", "merged")
    command("predict", "model", "rows.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "3")
    kept = Path.unlink
    Path.unlink = lambda path, **how: None if path.suffix == ".part" else kept(path, **how)  # type: ignore[method-assign]
    command("predict", "model", "rows.jsonl", "--out", "half.jsonl", "--max-new-tokens", "3")
    Path.unlink = kept
    lines = Path("half.jsonl.part").read_text().splitlines(keepends=True)
    Path("half.jsonl.part").write_text("".join(lines[:4]))
    Path("half.jsonl").unlink()


def clean(folder: Path) -> None:
    """Without what no test reads, and without this machine's paths."""
    for path in [*folder.rglob("report.html"), *folder.rglob("loss.png"), *folder.rglob(".lock")]:
        path.unlink()
    for path in [p for p in folder.rglob("*") if p.suffix in (".json", ".md", ".yaml")]:
        text = path.read_text(encoding="utf-8")
        path.write_text(
            text.replace(str(folder.resolve() / "model"), ELSEWHERE).replace(str(folder.resolve()), "/another/machine"),
            encoding="utf-8",
        )
    for state in folder.rglob("state.json"):
        kept = json.loads(state.read_text())
        kept["files"] = {name: training.digest_of(state.parent / name) for name in kept["files"]}
        state.write_text(json.dumps(kept, indent=1) + "\n")
    left = [str(p) for p in folder.rglob("*") if p.is_file() and re.search(rb"/tmp/|/home/", p.read_bytes())]
    assert not left, left


if __name__ == "__main__":
    to = Path(__file__).parent / f"v{__version__}"
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        make()
        clean(Path(work))
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(work, to)
    print(to, sum(p.stat().st_size for p in to.rglob("*") if p.is_file()), "bytes")

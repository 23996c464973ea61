"""Fuzzing: a valid file, folder or pipe is damaged and given to the commands; the project's laws say what may come of it.

    python -m tests.fuzz --kind folders --cases 500 --seed 7               # prints every case that breaks a law, and keeps what it was given
    python -m tests.fuzz --kind folders --seed 7 --only 123 --verbose      # one of them again

Every case follows from its kind, the seed and its number, so each runs alone. A command runs in a forked child of a process that has loaded
everything already (a tenth of a second each), with limits on time and memory, so that a crash or a hang is seen and ends nothing else.
"""

import argparse
import csv
import gzip
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

CPU_SECONDS, WALL_SECONDS = 60, 600  # a command on a tiny model takes one or two; a busy machine has more of the second
MEMORY = 1 << 30  # bytes a command may take on top of what this process has
MESSAGE = 3, 3000  # lines and characters of what is said on exit 2
QUESTION = "Where is the cat? 1"

Chance = random.Random


# --- damage -----------------------------------------------------------------------------------------------------------------------

SNIPPETS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\xbd", b"\x1b[2J\x1b]0;title\x07", "\u2028\u0085\u202e".encode(), b"\r", b"\n\n",
    b"\x7f\x9b1A", b"NaN", b"9" * 5000, b"[" * 3000, b"{}", b'"', b",", b"\\", b"\\ud83d", b"  ", b"\t", b"- ", b": ", b"<|im_end|>", b"&a", b"*a",
]  # fmt: skip
WORDS = [
    "",
    " ",
    "x" * 5000,
    "\x1b[2J\x1b]0;title\x07",
    "\0",
    "\u2028",
    "../x",
    "/",
    "NaN",
    "true",
    "-1",
    "1e999",
    "你好",
    "\ud83d",
    "a\nb",
    "~",
    "%s",
    "{}",
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 10**30, -(2**63), float("nan"), float("inf"), [], {}, [[]], [1], [None], [{}], {"a": 1}, [0, 1, 2],
    *WORDS,
]  # fmt: skip
DEEP, LONG_NUMBER = "@deep@", "@number@"  # not to be had from json.dumps


def bend_bytes(chance: Chance, data: bytes) -> tuple[bytes, str]:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.choice([1, 1, 2, 8, 100, 5000]))
    snippet = chance.choice(SNIPPETS)
    made = {
        "a bit flipped": lambda: data[:at] + bytes(byte ^ 1 << chance.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :],
        "a byte set": lambda: data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :],
        "cut": lambda: data[:at],
        "head gone": lambda: data[at:],
        "a stretch gone": lambda: data[:at] + data[end:],
        "a stretch twice": lambda: data[:end] + data[at:],
        f"{snippet[:12]!r} inserted": lambda: data[:at] + snippet + data[at:],
        f"{snippet[:12]!r} in front": lambda: snippet + data,
        "noise": lambda: data[:at] + chance.randbytes(end - at) + data[end:],
        "UTF-16": lambda: data.decode("utf-8", "replace").encode("utf-16", "replace"),
        "GBK": lambda: data.decode("utf-8", "replace").encode("gbk", "replace"),
        "Latin-1": lambda: data.decode("utf-8", "replace").encode("latin-1", "replace"),
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "empty": lambda: b"",
    }
    what = chance.choice(list(made))
    return made[what](), f"{what} at {at} of {len(data)}"


def bend_json(chance: Chance, value: Any) -> tuple[str, str]:
    """The text of a JSON value with one thing changed."""
    value = json.loads(json.dumps(value))  # a copy
    places = list(_places(value))
    if not places:
        return json.dumps(chance.choice(VALUES)), "replaced"
    holder, key = chance.choice(places)
    old, name = holder[key], f"{key}"
    what = chance.choice(
        ["value", "value", "value", "value", "deep", "number", "gone", "renamed", "twice", "added", "wrapped", "text"]
    )
    if what == "value":
        holder[key] = chance.choice(VALUES)
        name += f" = {holder[key]!r}"
    elif what in ("deep", "number"):
        holder[key] = {"deep": DEEP, "number": LONG_NUMBER}[what]
    elif what == "gone":
        del holder[key]
    elif what == "renamed" and isinstance(holder, dict):
        holder[chance.choice([*WORDS, key.upper(), key + "s", " " + key])] = holder.pop(key)
    elif what == "added" and isinstance(holder, dict):
        holder[chance.choice(WORDS)] = chance.choice(VALUES)
    elif what == "wrapped":
        holder[key] = chance.choice([[old], {"a": old}, [old, old]])
    else:
        holder[key] = str(old)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    if what == "twice" and (found := list(re.finditer(r'"[^"\\]*": ', text))):
        place = chance.choice(found)
        text = text[: place.start()] + place[0] + json.dumps(chance.choice(VALUES)) + ", " + text[place.start() :]
    text = text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).replace(f'"{LONG_NUMBER}"', "9" * 5000)
    return text, f"{what}: {name[:60]}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(inner)


def bend_safetensors(chance: Chance, data: bytes) -> tuple[bytes, str]:
    """The header alone, so that it is still a header; or some numbers."""
    size = struct.unpack("<Q", data[:8])[0]
    head, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in head if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    entry = head[name]
    start, end = entry["data_offsets"]
    step = chance.choice([1, 2, 4, -4, 64])
    what = chance.choice(
        [
            "json",
            "json",
            "shifted",
            "longer",
            "same place",
            "shape",
            "dtype",
            "renamed",
            "name of another",
            "more",
            "less",
            "numbers",
        ]
    )
    text = None
    if what == "json":
        text, what = bend_json(chance, head)
    elif what == "shifted":
        entry["data_offsets"] = [start + step, end + step]
    elif what == "longer":
        entry["data_offsets"] = [start, end + step]
    elif what == "same place":
        entry["data_offsets"] = head[other]["data_offsets"]
    elif what == "shape":
        entry["shape"] = chance.choice(
            [entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]], [], [0], [-1], [2**62, 4]]
        )
    elif what == "dtype":
        entry["dtype"] = chance.choice(["F16", "BF16", "F64", "I32", "BOOL", "U8", "F8_E4M3", "X", ""])
    elif what == "renamed":
        head[chance.choice([name + "x", "module." + name, name.replace("0", "1"), chance.choice(WORDS)])] = head.pop(name)
    elif what == "name of another":
        head[name], head[other] = head[other], head[name]
    elif what == "more":
        body += bytes(abs(step))
    elif what == "less":
        body = body[: -abs(step)]
    else:
        odd = chance.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"])  # NaN, inf, the largest float32
        body = body[:start] + odd + body[start + 4 :]
    made = (text if text is not None else json.dumps(head)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(made)) + made + body, f"header {what}: {name}"


def bend_file(chance: Chance, path: Path, tree: Path) -> str:
    """Damages one file in its place. `tree`: the folder it belongs to."""
    usual = chance.random() < 0.8
    data = path.read_bytes() if path.is_file() else b""
    path_name = path.relative_to(tree)
    if usual and path.suffix == ".safetensors" and chance.random() < 0.7:
        with suppress(ValueError, KeyError, struct.error, TypeError):  # damaged already
            made, what = bend_safetensors(chance, data)
            _write(path, made)
            return f"{path_name}: {what}"
    if usual and path.suffix in (".json", ".jsonl") and chance.random() < 0.8:
        with suppress(ValueError, RecursionError):
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            at = chance.randrange(len(lines)) if lines else 0
            lines[at : at + 1], what = (lambda text, what: ([text], what))(*bend_json(chance, json.loads(lines[at])))
            _write(path, "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))
            return f"{path_name}: {what}"
    if usual:
        made, what = bend_bytes(chance, data)
        _write(path, made)
        return f"{path_name}: {what}"
    others = [other for other in sorted(tree.rglob("*")) if other.is_file()]
    other = chance.choice(others)
    bytes_of_other = other.read_bytes()
    what = chance.choice(
        ["gone", "a folder", "a link to itself", "a link to nothing", "a link to another", "another's bytes", "grown", "renamed"]
    )
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "a link to nothing":
        path.symlink_to("nothing")
    elif what == "a link to another":
        path.symlink_to(os.path.relpath(other, path.parent))
    elif what == "another's bytes":
        _write(path, bytes_of_other)
    elif what == "grown":
        _write(path, data)
        os.truncate(path, len(data) + chance.choice([1, 4096, 64 << 20]))
    elif what == "renamed":
        _write(path.with_name(chance.choice(["x" + path.name, path.name + ".bak", path.stem])), data)
    return f"{path_name}: {what}"


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be a hard link to the valid one
    path.write_bytes(data)


# --- commands ---------------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """A law that does not hold."""


@dataclass
class Ended:
    """How a command ended. `code` below 0: by that signal."""

    code: int
    out: str
    err: str
    memory: int
    late: bool


def forked(action: Callable[[], Any], folder: Path, stdin: bytes = b"") -> Ended:
    """Carries out `action` in a child process that works in `folder`; its prints and its exit code."""
    files = [tempfile.TemporaryFile(dir=folder.parent) for _ in range(3)]  # noqa: SIM115
    files[0].write(stdin)
    files[0].seek(0)
    sys.stdout.flush()
    sys.stderr.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    pid = os.fork()
    if pid == 0:
        _child(action, folder, [file.fileno() for file in files], before)
    watch = os.pidfd_open(pid)
    late = not select.select([watch], [], [], WALL_SECONDS)[0]
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # also what it may have left behind
    os.close(watch)
    _, status, used = os.wait4(pid, 0)
    texts = []
    for file in files[1:]:
        file.seek(0)
        texts.append(file.read().decode("utf-8", "backslashreplace"))
    for file in files:
        file.close()
    return Ended(os.waitstatus_to_exitcode(status), *texts, (used.ru_maxrss << 10) - before, late)


def _child(action: Callable[[], Any], folder: Path, files: list[int], memory: int) -> NoReturn:
    code: Any = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", write_through=True)
        held = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (held + 2 * MEMORY, held + 2 * MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


CONTROLS = re.compile("[^\n\t\x20-\x7e\xa0-\U0010ffff]|[\u2028\u2029]")


def lawful(ended: Ended, what: str) -> None:
    """The laws of every command."""

    def law(holds: bool, broken: str) -> None:
        if not holds:
            raise Broken(f"{broken}\n    {what}\n    " + "\n    ".join((ended.err or ended.out).splitlines()[-12:])[-3000:])

    law(not ended.late, f"no end within {WALL_SECONDS} s")
    law(ended.code >= 0, f"ended by signal {signal.Signals(-ended.code).name if ended.code < 0 else ''}")
    law("Traceback (most recent call last)" not in ended.err + ended.out, f"a traceback, exit {ended.code}")
    law(ended.code in (0, 2), f"exit {ended.code}")
    law(ended.memory <= MEMORY, f"{ended.memory / 2**30:.1f} GB of memory")
    odd = CONTROLS.search(ended.out + ended.err)
    law(odd is None, f"U+{ord(odd[0]):04X} printed" if odd else "")
    if ended.code == 2:
        said = ended.err[ended.err.find("error: ") :] if "error: " in ended.err else ended.err
        law(len(said.splitlines()) <= MESSAGE[0], f"a message of {len(said.splitlines())} lines")
        law(len(said) <= MESSAGE[1], f"a message of {len(said)} characters")


# --- what is damaged ----------------------------------------------------------------------------------------------------------------


@dataclass
class Valid:
    """Artefacts in order, made once when first asked for. Never changed: cases copy them."""

    folder: Path

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    @cached_property
    def models(self) -> dict[str, Callable[[], Path]]:
        from . import published, tiny

        def sharded(path: Path) -> None:
            from transformers import LlamaForCausalLM

            tiny.tokenizer(path)
            LlamaForCausalLM.from_pretrained(self.model("llama")).save_pretrained(path, max_shard_size="50KB")

        def pickled(path: Path) -> None:
            import torch
            from safetensors.torch import load_file

            tiny.llama(path)
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()

        made = {
            "llama": tiny.llama,
            "untied": lambda path: tiny.llama(path, tie_word_embeddings=False),
            "sharded": sharded,
            "pickled": pickled,
        }
        made |= {name: published.FAMILIES[name] for name in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")}
        return {name: lambda name=name, make=make: self._made(name, make) for name, make in made.items()}

    def model(self, name: str = "llama") -> Path:
        return self.models[name]()

    @cached_property
    def rows(self) -> Path:
        from . import tiny

        return self._made("rows.jsonl", lambda path: tiny.write_rows(path, tiny.rows(8)))

    @cached_property
    def questions(self) -> Path:
        from . import tiny

        return self._made(
            "questions.jsonl", lambda path: tiny.write_rows(path, [{"instruction": f"{QUESTION}{i}"} for i in range(6)])
        )

    @cached_property
    def run(self) -> Path:
        """A finished run with checkpoints at steps 2 and 4."""
        from glmtune.run import load_run
        from glmtune.training import train

        def make(path: Path) -> None:
            given = [
                f"model={self.model()}",
                f"data={self.rows}",
                f"out={path}",
                "optim.steps=4",
                "optim.lr=3e-2",
                "optim.batch_size=4",
            ]
            train(load_run(None, [*given, "save.every_steps=2", "report_to=[]", "samples=[]", "precision=fp32", "method.rank=2"]))

        return self._made("run", make)

    @cached_property
    def stopped(self) -> Path:
        """The same, as if it had been killed behind its last checkpoint."""

        def make(path: Path) -> None:
            shutil.copytree(self.run, path)
            for name in ("finished.json", "report.html", "loss.png"):
                (path / name).unlink()
            shutil.rmtree(path / "adapter")

        return self._made("stopped", make)


@dataclass
class Case:
    """One case at work. `steps` tell what was done, for people."""

    kind: str
    seed: int
    number: int
    valid: Valid
    folder: Path
    steps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = Chance(f"{self.kind} {self.seed} {self.number}")

    def copy(self, source: Path, name: str) -> Path:
        """Hard links: damage writes anew."""
        target = self.folder / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link, symlinks=True)
        else:
            os.link(source, target)
        return target

    def damage(self, tree: Path, files: Sequence[Path] | None = None) -> None:
        """One to three things of a folder, or of the files named."""
        for _ in range(self.chance.choice([1, 1, 1, 2, 3])):
            found = sorted(path for path in files or tree.rglob("*") if path.is_file() and not path.is_symlink())
            if found:
                self.steps.append(bend_file(self.chance, self.chance.choice(found), tree))

    def glmtune(self, *arguments: object, stdin: bytes = b"") -> Ended:
        from glmtune.cli import main

        given = [str(argument) for argument in arguments]
        self.steps.append("glmtune " + " ".join(word if len(word) < 200 else word[:200] + "..." for word in given))
        ended = forked(lambda: main(given), self.folder, stdin)
        lawful(ended, self.steps[-1])
        return ended

    def check(self, holds: bool, broken: str) -> None:
        if not holds:
            raise Broken(broken)


# --- kinds ------------------------------------------------------------------------------------------------------------------------


def data(case: Case) -> None:
    """A file of rows: checked, cleaned, shown. No row is lost: in = kept + removed, and what is kept is clean."""
    chance, path = case.chance, _rows(case)
    case.damage(case.folder, [path])
    there = path.is_file()
    found = case.glmtune("data", "check", path.name, "--json")
    fixed = case.glmtune("data", "check", path.name, "--fix", "clean" + "".join(path.suffixes))
    counted = re.search(r"(\d+) rows in: (\d+) in .*?, (\d+) removed to", fixed.out)
    if fixed.code == 0:
        assert counted is not None
        rows, kept, removed = map(int, counted.groups())
        case.check(rows == kept + removed, f"{rows} rows in, {kept} kept and {removed} removed")
        gone = (case.folder / f"clean{''.join(path.suffixes)}.removed.jsonl").read_bytes()
        lines = gone.count(b"\n")
        case.check(lines == removed, f"{removed} removed, {lines} lines in their file")
        case.check(json.loads(found.out)["rows"] == rows, f"check counts {json.loads(found.out)['rows']} rows, --fix {rows}")
        if path.suffix == ".jsonl":
            with suppress(UnicodeDecodeError):
                lines = [line for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode().split("\n") if line.strip()]
                case.check(not lines or lines[0][0] in "[" or len(lines) == rows, f"{len(lines)} lines, {rows} rows")
        if kept:
            again = case.glmtune("data", "check", "clean" + "".join(path.suffixes))
            case.check(again.code == 0, f"what --fix wrote has errors: {again.out[:300]}")
    elif there:
        case.check(not list(case.folder.glob("clean*")), "--fix was refused and left a file")
    which = ["stage=pretrain"] if "form text" in case.steps[0] else []
    shown = case.glmtune("show", f"model={case.valid.model()}", f"data={path.name}", "max_length=100000", *which, "--json")
    if found.code == 0 and chance.random() < 0.9 and "chosen" not in path.read_text("utf-8", "replace"):
        case.check(shown.code == 0, f"data check finds no error, show refuses it: {shown.err[:600]}")


def _rows(case: Case) -> Path:
    """Rows of some form in some layout."""
    chance = case.chance
    form = chance.choice(["messages", "alpaca", "qa", "sharegpt", "preference", "text"])
    rows = []
    for i in range(chance.choice([1, 3, 8])):
        question, answer = (
            f"Where is it? {i}",
            chance.choice(["On the mat.", "你好，世界", "In the sea, and so on.", 'A "quote", and\na line']),
        )
        rows.append(
            {
                "messages": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
                "alpaca": {"instruction": question, "input": "", "output": answer},
                "qa": {"question": question, "answer": answer},
                "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
                "preference": {"prompt": question, "chosen": answer, "rejected": "No."},
                "text": {"text": f"{question} {answer}"},
            }[form]
        )
    flat = form in ("alpaca", "qa", "text")
    layout = chance.choice(
        ["jsonl", "jsonl", "json", "jsonl.gz", *(["csv", "tsv"] if flat else []), *(["txt"] if form == "text" else [])]
    )
    path = case.folder / f"rows.{layout}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if layout in ("csv", "tsv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), dialect="excel" if layout == "csv" else "excel-tab")
        writer.writeheader()
        writer.writerows(rows)
        lines = out.getvalue()
    elif layout == "json":
        lines = json.dumps(rows, ensure_ascii=False, indent=chance.choice([None, 2]))
    elif layout == "txt":
        lines = "\n\n".join(row["text"] for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if layout == "jsonl.gz" else lines.encode())
    case.steps.append(f"{len(rows)} rows of form {form} in {path.name}")
    return path


def runs(case: Case) -> None:
    """A run file, and settings behind it."""
    import yaml

    from glmtune.cli import main  # noqa: F401  (before the fork)

    chance, valid = case.chance, case.valid
    examples = sorted((Path(__file__).parents[1] / "examples").rglob("*.yaml"))
    source = chance.choice([valid.run / "run.yaml", *examples])
    text = source.read_text(encoding="utf-8")
    path = case.folder / "run.yaml"
    settings = [f"model={valid.model()}", f"data={valid.rows}"] if source.name != "run.yaml" or source.parent != valid.run else []
    if chance.random() < 0.6:
        made, what = bend_json(chance, yaml.safe_load(text))
        path.write_text(made, encoding="utf-8", errors="surrogatepass")
    else:
        made, what = bend_bytes(chance, text.encode())
        path.write_bytes(made)
    case.steps.append(f"{source.parent.name}/{source.name}: {what}")
    if chance.random() < 0.5:
        keys = re.findall(r"^ *(\w+):", text, re.MULTILINE)
        for _ in range(chance.choice([1, 1, 2])):
            name = ".".join(chance.choice(keys) for _ in range(chance.choice([1, 2, 3])))
            settings.append(
                f"{name}={chance.choice([*WORDS[:2], *WORDS[3:], '[1, 2]', '{a: 1}', '3', '0.5', 'null', 'nf4', 'fp16', 'lora'])}"
            )
    settings = [setting for setting in settings if "\0" not in setting and "\ud83d" not in setting]  # no shell can pass these
    case.glmtune("show", path.name, *settings)


def folders(case: Case) -> None:
    """A model folder. What is loaded computes what plain transformers computes on the same folder."""
    chance = case.chance
    name = chance.choice(
        ["llama", "llama", "untied", "sharded", "pickled", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]
    )
    folder = case.copy(case.valid.model(name), "model")
    case.steps.append(f"model {name}")
    case.damage(folder)
    answered = case.glmtune("chat", "model", "--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "6")
    if answered.code == 0 and name in ("llama", "untied", "sharded", "pickled"):
        _same_as_transformers(case, folder, None)
    others: list[list[object]] = [
        ["doctor", "model"], ["export", "model", "--to", "out"], ["export", "model", "--to", "out", "--dtype", "bf16"],
        ["export", "model", "--to", "out.gguf"], ["show", "model=model", f"data={case.valid.rows}"],
        ["predict", "model", case.valid.questions, "--out", "o.jsonl", "--max-new-tokens", "4"],
        ["train", "model=model", f"data={case.valid.rows}", "out=run", "optim.steps=1", "optim.batch_size=2", "report_to=[]", "samples=[]"],
        ["chat", "model", "--prompt", QUESTION, "--max-new-tokens", "4", "--quant", "int8"],
    ]  # fmt: skip
    case.glmtune(*chance.choice(others))


def adapters(case: Case) -> None:
    """An adapter's folder. What is loaded computes what plain PEFT computes of the same two folders."""
    chance, base = case.chance, case.valid.model()
    folder = case.copy(case.valid.run / "adapter", "adapter")
    case.damage(folder, None if chance.random() < 0.3 else list(folder.glob("adapter*")))
    answered = case.glmtune(
        "chat", base, "--adapter", "adapter", "--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "6"
    )
    if answered.code == 0:
        _same_as_transformers(case, base, folder)
    others: list[list[object]] = [
        ["export", base, "--adapter", "adapter", "--to", "out"], ["mix", "adapter=0.5", "adapter=0.5", "--to", "out"], ["doctor", "adapter"],
        ["import", "adapter", "--model", base, "--to", "out"],
        ["train", f"model={base}", f"data={case.valid.rows}", "out=run", "optim.steps=1", "report_to=[]", "samples=[]", "method.start=adapter"],
    ]  # fmt: skip
    case.glmtune(*chance.choice(others))


def _same_as_transformers(case: Case, folder: Path, adapter: Path | None) -> None:
    """Compares logits in float32. Where transformers itself refuses the folder, or finds weights missing in it, it says nothing."""
    ids = [[5, 20, 40, 60, 80, 100, 120, 33]]

    def ours() -> None:
        import torch

        import glmtune

        model = glmtune.load(folder, dtype="fp32", device="cpu", adapter=adapter and str(adapter)).model
        with torch.inference_mode():
            torch.save(model(torch.tensor(ids)).logits.float(), case.folder / "ours.pt")

    def theirs() -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "mismatched_keys"))
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        with torch.inference_mode():
            torch.save(model(torch.tensor(ids)).logits.float(), case.folder / "theirs.pt")

    import torch

    if forked(theirs, case.folder).code:
        case.steps.append("transformers refuses it")
        return
    loaded = forked(ours, case.folder)
    case.check(loaded.code == 0, f"chat answered, load() fails:\n{loaded.err[-1500:]}")
    a, b = (torch.load(case.folder / name, weights_only=True) for name in ("ours.pt", "theirs.pt"))
    apart = (a - b).nan_to_num(0, 0, 0).abs().max().item()
    scale = max(1.0, b.nan_to_num(0, 0, 0).abs().max().item())
    case.check(bool((a.isfinite() == b.isfinite()).all()) and apart <= 1e-3 * scale, f"logits are {apart:g} from transformers'")


def checkpoints(case: Case) -> None:
    """A run that was stopped, or a file of answers half made: what is continued ends as the straight one, or is refused."""
    chance, valid = case.chance, case.valid
    if chance.random() < 0.3:
        _answers(case)
        return
    folder = case.copy(valid.stopped, "run")
    inside = [path for path in folder.rglob("*") if path.is_file() and (path.name != "run.yaml" or path.parent != folder)]
    case.damage(folder, inside if chance.random() < 0.8 else None)
    straight = (valid.run / "adapter" / "adapter_model.safetensors").read_bytes()
    whole = os.path.samefile(folder / "run.yaml", valid.run / "run.yaml") if (folder / "run.yaml").is_file() else False
    ended = case.glmtune("train", "run/run.yaml", "out=run", "--resume")
    made = folder / "adapter" / "adapter_model.safetensors"
    if ended.code == 0 and whole:
        case.check(made.is_file() and made.read_bytes() == straight, "the resumed run ends otherwise than the straight one")


def _answers(case: Case) -> None:
    valid = case.valid
    arguments = ["predict", valid.run, valid.questions, "--out", "o.jsonl", "--max-new-tokens", "8", "--temperature", "0"]
    part = case.folder / "o.jsonl.part"

    def stopped() -> None:
        from glmtune import generate, predict
        from glmtune.cli import main

        def some(*args: Any, **more: Any) -> Iterator[Any]:
            for count, one in enumerate(generate.answer(*args, **more)):
                if count == 3:
                    os._exit(9)  # as if it had been killed
                yield one

        predict.answer = some
        main([str(argument) for argument in arguments])

    forked(stopped, case.folder)
    case.check(part.is_file(), "no answers were kept when predict was killed")
    case.damage(case.folder, [part])
    ended = case.glmtune(*arguments)
    if ended.code == 0:
        wanted = [json.loads(line)["instruction"] for line in valid.questions.read_text().splitlines()]
        rows = [json.loads(line) for line in (case.folder / "o.jsonl").read_text(encoding="utf-8").split("\n") if line]
        case.check([row["instruction"] for row in rows] == wanted, "predict continued and lost or doubled rows")
        case.check(not part.exists(), "predict left its .part")


def pipes(case: Case) -> None:
    """A conversation in a pipe. Whatever stands before, the last question is answered and kept."""
    chance = case.chance
    lines = [
        "Where is the cat?",
        "/system Be brief.",
        "你好",
        "/regen",
        "/help",
        "/nothing",
        "/save talk.txt",
        "a" * 300,
        "/clear",
        "\t",
        "/system",
    ]
    text = "".join(chance.choice(lines) + "\n" for _ in range(chance.choice([1, 3, 6]))).encode()
    for _ in range(chance.choice([1, 2, 3])):
        text, what = bend_bytes(chance, text)
        case.steps.append(what)
    (case.folder / "stdin").write_bytes(text)
    name = chance.choice(["llama", "chatglm2-6b"])
    given = text + f"\n/clear\n{QUESTION}\n/save last.jsonl\n".encode()
    ended = case.glmtune("chat", case.valid.model(name), "--temperature", "0", "--max-new-tokens", "4", stdin=given)
    case.check(ended.code == 0, f"exit {ended.code}: {ended.err[:300]}")
    if name == "chatglm2-6b":  # its format has no system turn, so that nothing behind /system is answered
        return
    talk = case.folder / "last.jsonl"
    case.check(talk.is_file(), "the last /save wrote nothing")
    last = [json.loads(line)["messages"] for line in talk.read_text(encoding="utf-8").split("\n") if line][-1]
    case.check(
        [m["content"] for m in last if m["role"] == "user"] == [QUESTION] and last[-1]["role"] == "assistant", f"kept: {last}"
    )


def streams(case: Case) -> None:
    """Any ids that a model may write: what is streamed, joined, is what is parsed, and the tokenizer's own decoding less the format's text."""
    from glmtune import families

    chance = case.chance
    name = chance.choice(["llama", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
    template = _template(case.valid.model(name), families)
    text = chance.choice(["你好，世界！", "a\n b", "", " naïve 👩‍👧 ", "\n", "<think>\nx\n</think>\n\n4", "Paris is in France."])
    asked = [{"role": "user", "content": "Hi"}]
    ids = template.encode([*asked, {"role": "assistant", "content": text}]).ids[len(template.prompt(asked)) :]
    size = len(template.tokens._raw.get_vocab())
    for _ in range(chance.choice([0, 1, 2, 8])):
        at = chance.randrange(len(ids) + 1)
        ids[at : at + chance.choice([0, 0, 1, 3])] = [chance.randrange(size) for _ in range(chance.choice([0, 1, 1, 4]))]
    case.steps.append(f"{name}: ids {ids}")
    streamer, pieces = template.streamer(), []
    pieces = [*(streamer.add(id) for id in ids), streamer.end()]
    parsed = template.parse(ids).text
    case.check("".join(pieces) == parsed, f"streamed {''.join(pieces)!r}, parsed {parsed!r}")
    stop = next((i for i, id in enumerate(ids) if id in template.stop_ids), len(ids))
    decoded = template.tokens.decode(ids[:stop])
    case.check(parsed in decoded and len(decoded) - len(parsed) <= 8, f"parsed {parsed!r}, decoded {decoded!r}")


_templates: dict[Path, Any] = {}


def _template(folder: Path, families: Any) -> Any:
    if folder not in _templates:
        _templates[folder] = families.load_tokenizer(folder)[1]
    return _templates[folder]


KINDS: dict[str, Callable[[Case], None]] = {
    kind.__name__: kind for kind in (data, runs, folders, adapters, checkpoints, pipes, streams)
}


# --- the program --------------------------------------------------------------------------------------------------------------------


def load_everything() -> None:
    """Once, before the first fork."""
    import peft  # noqa: F401
    import torch
    import transformers.models.glm.modeling_glm
    import transformers.models.llama.modeling_llama  # noqa: F401

    from glmtune import check, cli, doctor, export, gguf, loaded, plan, predict, repl, training  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS, help="several times for several; not given: all")
    parser.add_argument("--cases", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone")
    parser.add_argument("--keep", type=Path, help="where what broke a law is kept; not given: a temporary folder")
    parser.add_argument("--verbose", action="store_true", help="tell what every case did")
    options = parser.parse_args()
    load_everything()
    count, began = 0, time.monotonic()
    kept = options.keep or Path(tempfile.mkdtemp(prefix="glmtune-fuzz-"))
    numbers = [options.only] if options.only is not None else range(options.cases)
    with tempfile.TemporaryDirectory(prefix="glmtune-fuzz-") as folder:
        os.environ["GLMTUNE_CACHE"] = str(Path(folder) / "cache")
        (Path(folder) / "valid").mkdir()
        valid = Valid(Path(folder) / "valid")
        for kind in options.kind or KINDS:
            for number in numbers:
                name = f"{kind}-{options.seed}-{number}"
                case = Case(kind, options.seed, number, valid, Path(folder) / name)
                case.folder.mkdir()
                found = broken(case)
                if found:
                    count += 1
                    again = f"python -m tests.fuzz --kind {kind} --seed {options.seed} --only {number}"
                    shutil.copytree(case.folder, kept / name, symlinks=True, dirs_exist_ok=True, ignore_dangling_symlinks=True)
                    print("\n  ".join([f"{again}   (kept in {kept / name})", *case.steps, found]), flush=True)
                elif options.verbose:
                    print("\n  ".join([name, *case.steps]), flush=True)
                shutil.rmtree(case.folder)
    total = len(numbers) * len(options.kind or KINDS)
    print(f"{total} cases, {count} break a law, {time.monotonic() - began:.0f} s", flush=True)
    if not count and options.keep is None:
        kept.rmdir()
    sys.exit(1 if count else 0)


def broken(case: Case) -> str | None:
    """Which law a case breaks, and how."""
    try:
        KINDS[case.kind](case)
    except Broken as law:
        return f"BROKEN: {law}"
    except Exception:  # of a case's own oracle, or of what it calls in this process
        return f"BROKEN: {traceback.format_exc()}"
    return None


if __name__ == "__main__":
    main()

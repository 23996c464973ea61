"""The house's laws: a file imports only from files above it, and the light ones stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glmtune

ROOT = Path(glmtune.__file__).parent
# Top to bottom, as in docs/architecture.md: a file may import from those before it.
ORDER = [
    "errors",
    "terminal",
    "files",
    "records",
    "options",
    "run",
    "hub",
    "blocks",
    "decoding",
    "reading",
    "sources",
    "shell",
    "oldfiles",
    "oldruns",
    "tools",
    "forms",
    "mixing",
    "data",
    "design",
    "quality",
    "check",
    "convert",
    "rendering",
    "chat",
    "batch",
    "losses",
    "world",
    "autoload",
    "quant",
    "families.smollm2",
    "families.family",
    "families.vocab",
    "families.weights",
    "families.fingerprint",
    "families.place",
    "families.chatglm1",
    "families.chatglm",
    "families.llama",
    "families.internlm",
    "families.alibi",
    "families.baichuan",
    "families",
    "method",
    "layers",
    "prefix",
    "tensors",
    "adapters",
    "methods",
    "prompts",
    "importing",
    "blend",
    "optimizer",
    "merging",
    "fused",
    "forward",
    "stages",
    "store",
    "tokenise",
    "generate",
    "loaded",
    "estimate",
    "plan",
    "settings",
    "report",
    "runfolder",
    "progress",
    "session",
    "probes",
    "loop",
    "training",
    "predict",
    "gguf",
    "export",
    "screen",
    "repl",
    "doctor",
    "cli",
    "__main__",
]


def imports(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, also inside functions."""
    package = path.parent.relative_to(ROOT).parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("glmtune."):
            found.add(node.module.removeprefix("glmtune."))
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = list(package[: len(package) - node.level + 1])
            if node.module:
                found.add(".".join([*base, node.module]))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return {name for name in found if name.split(".")[0] in {n.split(".")[0] for n in ORDER}}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in ROOT.rglob("*.py") if name_of(path)}


def test_every_file_has_its_place():
    assert set(FILES) == set(ORDER)


@pytest.mark.few(30)
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_only_from_those_above_it(name):
    below = set(ORDER[ORDER.index(name) :]) - {name}
    assert not imports(FILES[name]) & below


LIGHT = ["glmtune", "glmtune.cli", "glmtune.run", "glmtune.data", "glmtune.chat", "glmtune.plan", "glmtune.check"]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_pull_nothing_heavy(name):
    code = (
        f"import sys, {name}; print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_code_of_a_checkpoint_and_no_pickle():
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        for banned in ("trust_remote_code=True", "torch.load(", "import pickle", "shell=True", "yaml.load(text)", "exec(", "eval("):
            if banned == "torch.load(" and name == "families.weights":  # the one door for published .bin files
                assert re.findall(r"torch\.load\([^)]*\)", text) == ['torch.load(path, map_location="cpu", weights_only=True)']
                continue
            allowed = banned == "eval(" and (".eval()" in text)
            assert allowed or banned not in text, (name, banned)


# The record's own functions, the options, and other tools' words.
OURS = {"method", "methods", "prefix", "adapters", "run", "oldfiles", "oldruns"}


@pytest.mark.parametrize("name", sorted(set(FILES) - OURS))
def test_only_its_record_knows_what_a_method_is(name):
    """No comparison with a method's kind, no `isinstance` of its options, no list of kinds."""
    kinds, classes = {"lora", "prefix", "freeze", "full"}, {"Lora", "Prefix", "Freeze", "Full"}
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = {ast.unparse(side).split(".")[-1] for side in (node.left, *node.comparators)}
            words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)}
            assert not (words & kinds and sides & {"kind", "method"}), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            assert not classes & {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}, ast.unparse(node)

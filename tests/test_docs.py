"""The pages hold: every command, option, row and link in README and docs/ works, and both languages say the same."""

import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from glmtune import check, cli, data, train
from glmtune.run import DEFAULT_LR, Source, load_run

from . import published, tiny
from .test_adapters import old_adapter

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")] if p.name != "architecture.md")
ENGLISH = [page for page in PAGES if not page.name.endswith(".zh.md")]
# Commands that are not ours and not run here; any other word at the start of a line is a slip.
TABLES = {"migrating.md", "faq.md"}  # pages where commands inside the text and in tables are run too
OTHERS = {
    "source", "python3", "pip", "tensorboard", "ssh", "ls", "tail", "printf", "make", "jq", "llama-cli", "llama-server", "llama-quantize",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    language: str
    name: str  # ```json train.json: the file that the block is
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(*item) for item in found]


def steps(page: Path) -> list[Block]:
    """What a reader does, in order: the blocks, and on the pages of tables each whole command of ours between them."""
    if page.name.replace(".zh.md", ".md") not in TABLES:
        return blocks(page)
    text = page.read_text(encoding="utf-8")
    fence = r"^```(?P<language>\w+)(?: (?P<name>\S+))?\n(?P<text>.*?)^```$"
    found = re.finditer(fence + r"|`(?P<command>glmtune [a-z]+ [^`]+)`", text, re.MULTILINE | re.DOTALL)
    return [Block("bash", "", f["command"]) if f["command"] else Block(f["language"], f["name"] or "", f["text"]) for f in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(line: str) -> list[list[str]]:
    """The commands of a line of shell, split at | and &&."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split, lexer.commenters = True, ""
    parts: list[list[str]] = [[]]
    for token in lexer:
        if token in ("|", "&&"):
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def ids(page: Path) -> str:
    return page.name


# --- a place where the pages' commands find what they name -------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files, the embedded model's name on a tiny model, and a finished run. Made once, copied for each page."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.llama(folder / "cache" / "smollm2-135m-instruct")
    for name in ("train.json", "more.jsonl", "dev.json"):
        tiny.write_rows(folder / name, tiny.rows(6))
    (folder / "book.txt").write_text("The harbour lies north of the town.\n", encoding="utf-8")
    tiny.write_rows(folder / "questions.jsonl", [{"question": "Where is Paris?", "answer": "In France."}])
    tiny.write_rows(folder / "questions.json", [{"instruction": "Where is Paris?"}])
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("THUDM/chatglm3-6b", "models/chatglm3-6b", "cache/modelscope/ZhipuAI/chatglm3-6b@master"):
        published.glm(folder / name, "THUDM/chatglm3-6b")  # a folder of that name comes before the hub
    published.qwen(folder / "Qwen/Qwen2.5-0.5B-Instruct", "qwen2")
    published.glm(folder / "THUDM/chatglm2-6b", "THUDM/chatglm2-6b")
    first = published.chatglm1(folder / "THUDM/chatglm-6b")
    old_adapter(folder / "old/lora", folder / "THUDM/chatglm3-6b", ("query_key_value",))
    _old_prefix(folder / "old/ptuning", first)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLMTUNE_CACHE", str(folder / "cache"))
        train(load_run(None, ["model=smollm2-135m-instruct", "data=train.json", "out=runs/first", "optim.steps=1"]))
    for name in ("identity", "nova", "persona"):
        shutil.copytree(folder / "runs/first", folder / "runs" / name)
    return folder


def _old_prefix(folder: Path, base: Path) -> None:
    """What the published P-Tuning code leaves: keys and values of 4 tokens for every layer."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    learned = torch.randn(4, 2 * config["num_layers"] * config["hidden_size"], generator=torch.Generator().manual_seed(0))
    torch.save({"transformer.prefix_encoder.embedding.weight": learned}, folder / "pytorch_model.bin")


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "place" / "cache"))
    return tmp_path / "place"


def glmtune(arguments: list[str]) -> int:
    """Runs a command in this process, made short; returns its exit code."""
    command, resumed = arguments[0], "--resume" in arguments
    given = " ".join(arguments)
    if command in ("chat", "predict") and "--max-new-tokens" not in arguments:
        arguments = [*arguments, "--max-new-tokens", "4"]
    if command == "train" and not resumed:
        out = re.search(r"\bout=(\S+)", given)
        shutil.rmtree(out[1] if out else load_run(arguments[1]).out, ignore_errors=True)
        arguments = [*arguments, "optim.steps=1", "samples=[]", "report_to=[]"]
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def write_named(page: Path) -> None:
    for block in blocks(page):
        if block.name:
            Path(block.name).write_text(block.text, encoding="utf-8")


# --- what the pages promise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    tiny.slow_but([ROOT / f"docs/{name}.md" for name in ("quickstart", "watching", "python")], ENGLISH),
    ids=ids,
)
def test_every_command_works(page, place, monkeypatch, capsys):
    write_named(page)
    found = steps(page)
    names: dict[str, Any] = {}
    for block, following in zip(found, [*found[1:], None]):
        if block.language == "python" and page.name != "python.md":  # that one has a test of its own
            exec(compile(block.text, str(page), "exec"), names)
        if block.language != "bash":
            continue
        for line in block.text.splitlines():
            for words in map(_without_variables, commands(line)):
                if words[0] == "glmtune":
                    _check_ours(words[1:], following, monkeypatch, capsys)
                else:
                    _check_other(words, line)


def test_the_old_run_files_are_imported(place, monkeypatch, capsys):
    page = ROOT / "docs/migrating.md"
    write_named(page)
    found = steps(page)
    made = []
    for step, following in zip(found, [*found[1:], None]):
        words = step.text.split()
        if step.language == "bash" and words[1] == "import" and Path(words[2]).is_file():
            _check_ours(words[1:], following, monkeypatch, capsys)
            made.append(load_run(words[-1]).model)
    assert len(made) == 6 and not [model for model in made if not Path(model).is_dir()]


def _without_variables(words: list[str]) -> list[str]:
    """HF_ENDPOINT=... in front of a command goes."""
    return words[1:] if re.match(r"[A-Z_]+=", words[0]) else words


def _check_ours(arguments: list[str], following: Block | None, monkeypatch: Any, capsys: Any) -> None:
    settings = [word for word in arguments[1:] if not word.startswith("-")]
    if settings and settings[0].startswith("examples/"):  # big for a tiny model: its options are read, nothing is trained
        load_run(settings[0], settings[1:])
        assert set(arguments) - set(settings) <= {"train", "--resume"}
        return
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/exit\n"))
    code = glmtune(arguments)
    out, err = capsys.readouterr()
    wrong_on_purpose = arguments == ["data", "check", "broken.json"]
    assert code == (2 if wrong_on_purpose else 0), f"glmtune {shlex.join(arguments)}: {err}"
    shown = arguments[:2] == ["data", "check"] or arguments[0] == "import" or (arguments[0] == "doctor" and len(arguments) == 2)
    if shown and following is not None and following.language == "text":
        assert not [line for line in following.text.splitlines() if line not in (out + err).splitlines()]


def _check_other(words: list[str], line: str) -> None:
    assert words[0] in OTHERS, line
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if words[0] == "pip":
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
        assert not [word for word in words if "==" in word and word not in pins]
    if words[0] == "jq" and shutil.which("jq"):
        assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == 0, line


@pytest.mark.parametrize("page", ENGLISH, ids=ids)
def test_every_yaml_block_is_accepted(page, tmp_path):
    for block in blocks(page):
        if block.language == "yaml":
            (tmp_path / "run.yaml").write_text(block.text, encoding="utf-8")
            load_run(tmp_path / "run.yaml", model="m", data="train.json", out="o")


@pytest.mark.few(5)
@pytest.mark.parametrize("page", ENGLISH, ids=ids)
def test_every_row_is_read(page, tmp_path):
    found = blocks(page)
    for number, block in enumerate(found):
        if block.language not in ("json", "jsonl", "csv") or block.name == "broken.json":
            continue
        path = tmp_path / f"{number}.{block.language}"
        path.write_text(block.text, encoding="utf-8")
        if block.name == "questions.json":  # answers are not needed there
            assert data.load([Source(path=str(path))], want="prompts").rows
            continue
        following = found[number + 1] if number + 1 < len(found) else None
        source = yaml.safe_load(following.text).get("data") if following is not None and following.language == "yaml" else None
        columns = source[0].get("columns") if isinstance(source, list) else None
        assert not check.check([path], columns=columns)["problems"], block.text


def test_quoted_errors_are_real(place, capsys):
    write_named(ROOT / "docs/your-data.md")
    model = "model=smollm2-135m-instruct"
    for page, arguments in (
        ("your-data.md", ["show", model, "data=broken.json"]),
        ("run-files.md", ["show", model, "data=train.json", "method.rnak=4"]),
        ("run-files.md", ["train", "runs/first/run.yaml", "--resume", "method.rank=16"]),
        ("methods.md", ["show", model, "data=train.json", "quant=nf4", "method=full"]),
        ("methods.md", ["show", model, "data=train.json", "quant=chatglm-int4"]),
        ("methods.md", ["show", model, "data=train.json", "method=qlora"]),
        ("methods.md", ["show", model, "data=train.json", "method.targets=[query]"]),
        ("methods.md", ["show", model, "data=train.json", "method=freeze", "method.last=1", "method.first=1"]),
        ("methods.md", ["show", model, "data=train.json", "method.start=runs/first", "method.rank=16"]),
        ("methods.md", ["show", model, "data=train.json", "method=prefix", "method.start=runs/first"]),
        ("adapters.md", ["chat", "smollm2-135m-instruct", "--adapter", "old/lora"]),
        ("adapters.md", ["import", "old/lora", "--to", "adapters/nowhere"]),
        ("adapters.md", ["export", "THUDM/chatglm-6b", "--to", "c.gguf"]),
        ("adapters.md", ["export", "smollm2-135m-instruct", "--to", "c.gguf", "--outtype", "q4_k_m"]),
    ):
        assert glmtune(arguments) == 2
        said = capsys.readouterr().err.strip()
        assert said in (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert said in (ROOT / "docs" / page.replace(".md", ".zh.md")).read_text(encoding="utf-8")


CHATGLM3_6B = {  # of its published config.json, what sizes follow from
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False, "ffn_hidden_size": 13696,
    "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_layers": 28, "original_rope": True, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 8192, "torch_dtype": "float16",
}  # fmt: skip


@pytest.mark.parametrize("page", ["methods.md", "methods.zh.md"])
def test_the_table_of_default_rates_is_the_one_that_runs_take(page):
    """A row's words in code: the method, and its variant; before them the stage, where the rate is that stage's own."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ") and "`optim.lr`" in line) + 2
    told = {}
    for line in lines[start : next(i for i in range(start, len(lines)) if not lines[i])]:
        what, rate = line.strip("| ").split(" | ")
        told[" with ".join(re.findall(r"`([^`]+)`", what))] = float(re.match(r"[\de.-]+", rate)[0])
    assert told == {name if stage is None else f"{stage} with {name}": rate for (stage, name), rate in DEFAULT_LR.items()}


def test_the_table_of_what_fits_is_true(tmp_path, monkeypatch, capsys):
    """The only page figure of a large model: from its config alone."""
    (tmp_path / "THUDM/chatglm3-6b").mkdir(parents=True)
    (tmp_path / "THUDM/chatglm3-6b/config.json").write_text(json.dumps(CHATGLM3_6B), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert glmtune(["doctor", "THUDM/chatglm3-6b", "--fit", "8GB"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs/methods.md").read_text(encoding="utf-8")


def test_python_blocks_run(place):
    write_named(ROOT / "docs/run-files.md")
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/python.md"):
        code = block.text.replace("optim.epochs=1", "optim.steps=1").replace("max_new_tokens=64", "max_new_tokens=4")
        if "peft" not in code:
            exec(compile(code, "docs/python.md", "exec"), names)
    assert names["report"].steps == 1


@pytest.mark.slow
def test_the_peft_block_runs(place):
    names: dict[str, Any] = {}
    exec(next(block.text for block in blocks(ROOT / "docs/python.md") if "peft" in block.text), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_heading_stands_alone(page):
    lines = [line for line in prose(page).splitlines() if line.strip()]
    alone = [line for line, after in zip(lines, [*lines[1:], "#"]) if line.startswith("#") and after.startswith("#")]
    assert not alone
    assert len("".join(line for line in lines if not line.startswith("#"))) > 500


@pytest.mark.parametrize("page", ENGLISH, ids=ids)
def test_both_languages_say_the_same(page):
    chinese = page.with_name(page.name.replace(".md", ".zh.md"))
    levels = [re.findall(r"^(#+) ", prose(one), re.MULTILINE) for one in (page, chinese)]
    assert levels[0] == levels[1]
    code = [[(b.language, b.name, _without_comments(b.text)) for b in blocks(one)] for one in (page, chinese)]
    assert code[0] == code[1]
    assert [step.text for step in steps(page) if step.language == "bash"] == [
        s.text for s in steps(chinese) if s.language == "bash"
    ]


def _without_comments(text: str) -> str:
    return re.sub(r"(^|  +)#.*$", "", text, flags=re.MULTILINE)


def test_every_page_has_its_chinese_page():
    assert {p.name.replace(".zh.md", ".md") for p in PAGES if p not in ENGLISH} == {p.name for p in ENGLISH}


def test_the_file_tree_is_true():
    tree = next(b.text for b in blocks(ROOT / "README.md") if "examples/identity/" in b.text and b.language == "text")
    assert not [line.split()[0] for line in tree.splitlines() if not (ROOT / line.split()[0]).exists()]

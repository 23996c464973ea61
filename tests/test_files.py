"""What is written is whole or not there. A disk that refuses is told in one line, and the same command works once there is room."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune import cli, files, training
from glmtune.errors import UserError
from glmtune.files import DiskError
from glmtune.importing import import_adapter
from glmtune.run import load_run

from . import tiny
from .cases import cases

ROWS = [{"instruction": f"Where is the cat {i}? " + "so " * 40, "output": "On the mat. " * 10} for i in range(20)]


@contextlib.contextmanager
def limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as under `ulimit -f` or a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, but for the folder that a run is in and the lock files of caches."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# --- the door ---------------------------------------------------------------------------------------------------------------


@cases(30)
@given(st.binary(max_size=3000), st.integers(0, 3000), st.booleans())
def test_a_file_is_whole_or_as_it_was(tmp_path_factory, content, size, there):
    folder = tmp_path_factory.mktemp("f")
    if there:
        (folder / "a").write_bytes(b"old")
    before = tree(folder)
    try:
        with limit(size):
            files.whole(folder / "a", content)
    except DiskError as error:
        assert size < len(content) and error.errno == errno.EFBIG and str(folder / "a") in str(error) and "ulimit" in str(error)
        assert tree(folder) == before
    else:
        assert tree(folder) == {"a": content}


@cases(30)
@given(
    st.text(max_size=500).map(lambda text: text.encode("utf-8", "replace").decode()),
    st.text("ab", max_size=500),
    st.integers(0, 1000),
)
def test_what_is_added_is_added_whole_or_not_at_all(tmp_path_factory, old, new, size):
    path = tmp_path_factory.mktemp("f") / "a"
    if old:
        path.write_bytes(old.encode())
    try:
        with limit(size):
            files.append(path, new)
    except DiskError:
        assert (path.read_bytes() == old.encode()) if old else not path.exists()
    else:
        assert path.read_bytes() == (old + new).encode()


@pytest.mark.parametrize("where", ["first", "second", "inside"])
def test_a_folder_is_whole_or_not_there(tmp_path, where):
    with (
        pytest.raises((DiskError, KeyError)),
        limit(100 if where != "inside" else 10**6),
        files.new_folder(tmp_path / "to") as work,
    ):
        files.whole(work / "a", b"x" * (200 if where == "first" else 50))
        (work / "b").write_bytes(b"x" * 200)  # not through the door: named all the same
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_is_named_is_what_the_user_named_not_its_temporary_name(tmp_path):
    with pytest.raises(DiskError, match=f"^{tmp_path / 'to'}: no room"), files.new_folder(tmp_path / "to") as work:
        raise DiskError(work / "adapter_model.safetensors", OSError(errno.ENOSPC, "x"))
    with pytest.raises(DiskError, match="^/elsewhere/log: no room"), files.new_folder(tmp_path / "to") as work:
        raise DiskError("/elsewhere/log", OSError(errno.ENOSPC, "x"))


def test_half_of_a_write_says_what_may_be_in_the_way(tmp_path):
    """numpy.tofile tells neither the number of the error nor its name."""
    said = files.told(OSError("22528 requested and 11584 written"), tmp_path / "m.gguf")
    assert "m.gguf: 22528 requested" in said and "free some room" in said and "ulimit -f" in said


def test_an_error_of_reading_is_not_taken_for_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError) as error, files.new_folder(tmp_path / "to"):
        (tmp_path / "source").read_text()
    assert not isinstance(error.value, DiskError) and error.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize(
    "make", [lambda p: p.symlink_to(p), lambda p: p.mkdir(), lambda p: None], ids=["loop", "folder", "no parent"]
)
def test_what_cannot_be_written_is_told_in_one_line(tmp_path, make):
    path = tmp_path / "a"
    make(path)
    path = path if path.is_symlink() or path.is_dir() else tmp_path / "no" / "a"
    if path.is_symlink():  # a link is replaced, as any file
        files.whole(path, "x")
        return
    with pytest.raises(UserError) as error:
        files.whole(path, "x")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bytes_are_written_as_they_are_and_surrogates_as_json_reads_them(tmp_path):
    files.whole(tmp_path / "a", ["x\r\n", "\ud800", "é"])
    assert (tmp_path / "a").read_bytes() == b"x\r\n\\ud800\xc3\xa9"


# --- every command that writes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a run, an adapter and data."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny.llama(folder / "m")
    tiny.write_rows(folder / "rows.jsonl", ROWS)
    tiny.write_rows(folder / "bad.jsonl", [*ROWS, ROWS[0], {"instruction": "", "output": ""}])
    train = [
        f"model={model}",
        f"data={folder / 'rows.jsonl'}",
        f"out={folder / 'run'}",
        "optim.steps=1",
        "samples=[]",
        "report_to=[]",
    ]
    training.train(load_run(None, [*train, "method.rank=2"]))
    (folder / "schema.yml").write_text("name: {type: str}\nage: {type: int}\n")
    return folder


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "fix": lambda p: ["data", "check", str(p / "bad.jsonl"), "--fix", "to.jsonl"],
    "convert": lambda p: ["data", "convert", str(p / "rows.jsonl"), "--to", "messages", "--out", "to.jsonl"],
    "tokenize": lambda p: ["data", "tokenize", f"model={p / 'm'}", f"data={p / 'rows.jsonl'}", "--to", "tok"],
    "mix": lambda p: ["mix", f"{p / 'run'}=0.5", f"{p / 'run'}=0.5", "--to", "mix"],
    "import": lambda p: ["import", str(p / "run" / "adapter"), "--model", str(p / "m"), "--to", "imported"],
    "export": lambda p: ["export", str(p / "run"), "--to", "merged"],
    "unmerged": lambda p: ["export", str(p / "run"), "--to", "merged", "--unmerged"],
    "gguf": lambda p: ["export", str(p / "run"), "--to", "m.gguf", "--outtype", "f32"],
    "predict": lambda p: ["predict", str(p / "m"), str(p / "rows.jsonl"), "--out", "o.jsonl", "--max-new-tokens", "2", "--max-samples", "8"],
    "train": lambda p: ["train", f"model={p / 'm'}", f"data={p / 'rows.jsonl'}", "out=run", "optim.steps=2",
                        "save.every_steps=1", "method.rank=2", "--resume"],
    "full": lambda p: ["train", f"model={p / 'm'}", f"data={p / 'rows.jsonl'}", "out=run", "optim.steps=1", "samples=[]", "method=full",
                       "report_to=[]", "--resume"],
}  # fmt: skip
UNEQUAL = {
    "adapter_config.json",
    "log.jsonl",
    "report.html",
    "loss.png",
    "finished.json",
    "state.json",
    "README.md",
    "run.yaml",
}  # times, places, what follows


def results(folder: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in tree(folder).items() if Path(name).name not in UNEQUAL and "/tb/" not in f"/{name}"}


def run(arguments: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory) -> dict[str, dict[str, bytes | None]]:
    return {}


def disturbed(command: str, place: Path, folder: Path, capsys, monkeypatch, undisturbed, refusing) -> None:
    """The command under a disk that refuses, then once more with room."""
    straight = folder / "straight"
    there = folder / "work"
    straight.mkdir()
    there.mkdir(exist_ok=True)
    given = COMMANDS[command](place)
    if command not in undisturbed:
        monkeypatch.chdir(straight)
        code, told = run(given, capsys)
        assert code == 0, told
        undisturbed[command] = results(straight)
    monkeypatch.chdir(there)
    with refusing:
        code, told = run(given, capsys)
    assert code in (0, 2) and "Traceback" not in told and "defect" not in told
    if code == 2:
        told = told[told.index("error:") :]
        assert len(told.splitlines()) <= 2 and (
            str(there) in told or next(iter(undisturbed[command])).split("/")[0].split(".")[0] in told
        )
        kept = {"train": ("run",), "full": ("run",), "predict": ("o.jsonl.part",)}.get(command, ())
        assert [name for name in tree(there) if name.split("/")[0] not in kept] == []
    if code == 0 and command not in ("train", "full"):
        assert results(there) == undisturbed[command]
        return
    code, told = run(given, capsys)
    assert code == 0, told
    assert results(there) == undisturbed[command]


@pytest.mark.few(1)
@pytest.mark.parametrize("size", tiny.slow_but([3000], [0, 10, 400, 3000, 20_000, 60_000, 150_000]))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_on_the_size_of_files(command, size, place, tmp_path, capsys, monkeypatch, undisturbed):
    disturbed(command, place, tmp_path, capsys, monkeypatch, undisturbed, limit(size))


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """A disk that is full but for a few pages."""
    file = folder / "ballast"
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))
    os.truncate(file, max(0, file.stat().st_size - 3 * 4096))
    try:
        yield
    finally:
        file.unlink()


@pytest.mark.few(2)
@pytest.mark.parametrize("command", tiny.slow_but(["fix", "convert", "tokenize", "mix"], COMMANDS))
def test_a_full_disk(command, place, tmp_path, capsys, monkeypatch, undisturbed):
    disk = tmp_path / "work"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("only root can mount a small disk")
    try:
        with monkeypatch.context() as patched:
            (folder := disk / "work").mkdir()
            del folder
            disturbed(command, place, disk, capsys, patched, undisturbed, filled(disk))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_save_adds_the_whole_conversation_or_nothing(place, tmp_path, capsys):
    from glmtune import load, repl

    talk = repl.Chat(load(str(place / "m")), {"max_new_tokens": 2})
    talk.reply("hi")
    path = tmp_path / "talk.jsonl"
    with limit(20), pytest.raises(UserError, match="talk.jsonl"):
        talk.command(f"/save {path}")
    assert not path.exists()
    talk.command(f"/save {path}")
    assert path.read_text().endswith("\n")


def test_the_import_of_a_broken_write_leaves_nothing(place, tmp_path):
    with limit(1000), pytest.raises(DiskError):
        import_adapter(place / "run" / "adapter", place / "m", tmp_path / "to")
    assert not list(tmp_path.iterdir())

"""Models from a hub, against a hub of our own on localhost that speaks both APIs and can be told to misbehave."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from glmtune import hub
from glmtune.errors import UserError
from glmtune.families import resolve

from .served import served

CONFIG, TOKENIZER = b'{"model_type": "llama"}', b'{"version": "1.0"}'
WEIGHTS = bytes(range(256)) * 2000  # half a megabyte
WHOLE = {
    "config.json": CONFIG,
    "tokenizer.json": TOKENIZER,
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"spm",
    "merges.txt": b"a b",
    "qwen.tiktoken": b"IQ== 0",
    "model.safetensors": WEIGHTS,
    "model.fp16.safetensors": b"half",
    "consolidated.safetensors": b"twice",
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "model.pth": b"pickle",
    "README.md": b"hello",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"x",
}
TAKEN = [
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "model.safetensors",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
]
BIN = {
    "config.json": CONFIG,
    "pytorch_model-00001-of-00002.bin": b"one",
    "pytorch_model-00002-of-00002.bin": b"two",
    "training_args.bin": b"pickle",
    "optimizer.bin": b"pickle",
    "extra.bin": b"pickle",
}


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    repos: ClassVar[dict] = {}  # (id, revision) -> files
    wire: ClassVar[dict] = {}  # name -> what is sent instead
    cuts: ClassVar[dict] = {}  # name -> list of: after how many bytes the connection ends
    busy: ClassVar[dict] = {}  # name -> list of: status answered instead
    deaf: ClassVar[set] = set()  # names for which Range is ignored
    status: ClassVar[dict] = {}  # start of a path -> (status, X-Error-Code)
    asked: ClassVar[list] = []  # (method, path, Range)

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        self.asked.append((self.command, path, query.get("FilePath", ""), self.headers.get("Range")))
        for start, (status, code) in self.status.items():
            if path.startswith(start):
                return self.send(b"{}", status, **({"X-Error-Code": code} if code else {}))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.hf_info(found[1], found[2] or "main", "blobs" in query)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.hf_file(*found.groups())
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/repo/files|/repo)?", path):
            return self.modelscope(found[1], found[2], query)
        return self.send(b"not here", 404)

    def hf_info(self, repo, revision, blobs):
        files, known = self.repos.get((repo, revision)), any(name == repo for name, _ in self.repos)
        if files is None:
            code, status = ("RevisionNotFound", 404) if known else ("RepoNotFound", 401)
            return self.send(b"{}", status, **{"X-Error-Code": code})
        siblings = []
        for name, data in files.items():
            item = {"rfilename": name}
            if blobs:
                item |= {"size": len(data), "blobId": git_id(data)}
                if name.endswith((".safetensors", ".bin")):
                    item |= {"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}}
            siblings.append(item)
        return self.send(json.dumps({"id": repo, "sha": self.commit(repo, revision), "siblings": siblings}).encode())

    @classmethod
    def commit(cls, repo, revision):
        return revision if len(revision) == 40 else hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def hf_file(self, repo, commit, name):
        for (id_, revision), files in self.repos.items():
            if id_ == repo and self.commit(id_, revision) == commit and name in files:
                big = hashlib.sha256(files[name]).hexdigest()
                return self.body(
                    name, files[name], **{"X-Repo-Commit": commit, "ETag": f'"{git_id(files[name])}"', "X-Linked-Etag": f'"{big}"'}
                )
        return self.send(b"", 404, **{"X-Error-Code": "EntryNotFound"})

    def modelscope(self, repo, what, query):
        known = any(name == repo for name, _ in self.repos)
        if what is None:
            return self.send(b'{"Code": 200, "Data": {}}' if known else b'{"Code": 10010205001}', 200 if known else 404)
        files = self.repos.get((repo, query["Revision"]))
        if what == "/repo":
            return self.body(query["FilePath"], files[query["FilePath"]])
        if files is None:  # as the real one: an unknown revision of a known model is no HTTP error
            return self.send(b'{"Code": 200, "Success": true, "Data": {"Files": null}}' if known else b"{}", 200 if known else 404)
        listed = [{"Path": "original", "Type": "tree", "Size": 0, "Sha256": "", "Revision": ""}]
        for name, data in files.items():
            listed.append(
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            )
        return self.send(json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode())

    def body(self, name, data, **headers):
        if self.busy.get(name):
            return self.send(b"", self.busy[name].pop(0))
        data, start = self.wire.get(name, data), 0
        wanted = self.headers.get("Range")
        if wanted and name not in self.deaf:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.send(b"", 416)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in {**headers, "Content-Length": str(len(data) - start), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.cuts.get(name):
            self.wfile.write(data[start : start + self.cuts[name].pop(0)])
            self.close_connection = True
            return None
        return self.wfile.write(data[start:])

    def send(self, data, status=200, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def endpoint():
    with served(Hub) as address:
        yield address


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path, endpoint):
    for table in (Hub.repos, Hub.wire, Hub.cuts, Hub.busy, Hub.deaf, Hub.status, Hub.asked):
        table.clear()
    monkeypatch.setattr(hub, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)


def ranges(name: str) -> list:
    return [asked[3] for asked in Hub.asked if name in (asked[2], asked[1].rsplit("/", 1)[-1]) and asked[0] == "GET"]


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# --- ModelScope, in this process --------------------------------------------------------------------------------------------


def modelscope(name: str) -> Path:
    return hub.download(name, lambda text: None)


def test_a_model_comes_whole_and_only_the_files_it_needs(tmp_path):
    Hub.repos["a/b", "master"] = WHOLE
    folder = modelscope("modelscope:a/b")
    assert folder == tmp_path / "cache" / "modelscope" / "a" / "b@master"
    assert names(folder) == TAKEN
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert names(folder.parent) == ["b@master", "b@master.lock"]
    Hub.asked.clear()
    assert modelscope("modelscope:a/b") == folder  # complete: nobody is asked again
    assert not Hub.asked


def test_a_revision(tmp_path):
    Hub.repos["a/b", "master"] = WHOLE
    Hub.repos["a/b", "v1.0"] = WHOLE | {"config.json": b'{"old": 1}'}
    assert (modelscope("modelscope:a/b@v1.0") / "config.json").read_bytes() == b'{"old": 1}'
    assert (modelscope("modelscope:a/b") / "config.json").read_bytes() == CONFIG
    with pytest.raises(UserError, match="has no revision 'v2'"):
        modelscope("modelscope:a/b@v2")
    with pytest.raises(UserError, match="there is no model 'a/c' on ModelScope"):
        modelscope("modelscope:a/c")


def test_bin_weights_only_without_safetensors_and_only_of_known_names():
    Hub.repos["a/bin", "master"] = BIN
    assert names(modelscope("modelscope:a/bin")) == ["config.json", *[n for n in BIN if n.startswith("pytorch_model")]]


def test_an_index_says_which_weights(tmp_path):
    index = json.dumps(
        {"weight_map": {"x": "extra.bin", "y": "pytorch_model-00001-of-00002.bin", "z": "training_args.bin"}}
    ).encode()
    Hub.repos["a/bin", "master"] = BIN | {"pytorch_model.bin.index.json": index}
    assert names(modelscope("modelscope:a/bin")) == [
        "config.json",
        "extra.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
    Hub.repos["a/bin", "v2"] = BIN | {"pytorch_model.bin.index.json": b"{"}
    with pytest.raises(UserError, match="is no index of weights"):
        modelscope("modelscope:a/bin@v2")


def test_a_cut_connection_is_continued_where_it_ended():
    Hub.repos["a/b", "master"] = WHOLE
    Hub.cuts["model.safetensors"] = [100_000, 50_000]
    assert (modelscope("modelscope:a/b") / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges("model.safetensors") == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_run_continues_what_this_one_left(tmp_path):
    Hub.repos["a/b", "master"] = WHOLE
    Hub.cuts["model.safetensors"] = [70_000, 0, 0, 0, 0]
    with pytest.raises(
        UserError, match="broke off model.safetensors at 70,000 of 512,000 bytes.*the same command continues"
    ) as error:
        modelscope("modelscope:a/b")
    assert len(str(error.value).splitlines()) == 3
    work = tmp_path / "cache" / "modelscope" / "a" / "b@master.part"
    assert (work / "model.safetensors.part").stat().st_size == 70_000
    (work / "merges.txt").write_bytes(b"x x")  # of another day
    (work / "gone.json").write_bytes(b"{}")
    Hub.cuts.clear()
    Hub.asked.clear()
    folder = modelscope("modelscope:a/b")
    assert ranges("model.safetensors") == ["bytes=70000-"]
    assert ranges("config.json") == []
    assert (folder / "merges.txt").read_bytes() == b"a b"
    assert names(folder) == TAKEN


@pytest.mark.parametrize("length", [600, 512_000, 700_000])
def test_the_beginning_of_another_file_is_thrown_away(tmp_path, length):
    """Left by an older version of the file: shorter, as long, longer than the present one."""
    Hub.repos["a/b", "master"] = WHOLE
    work = tmp_path / "cache" / "modelscope" / "a" / "b@master.part"
    work.mkdir(parents=True)
    (work / "model.safetensors.part").write_bytes(b"?" * length)
    assert (modelscope("modelscope:a/b") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_ignores_range_starts_anew():
    Hub.repos["a/b", "master"] = WHOLE
    Hub.cuts["model.safetensors"] = [100_000]
    Hub.deaf.add("model.safetensors")
    assert (modelscope("modelscope:a/b") / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "wire, says", [(b"!" + WEIGHTS[1:], "sha256 is [0-9a-f]{64}, wanted"), (WEIGHTS + b"more", "bytes, wanted 512,000")]
)
def test_damaged_on_the_way(tmp_path, wire, says):
    Hub.repos["a/b", "master"] = WHOLE
    Hub.wire["model.safetensors"] = wire
    with pytest.raises(UserError, match=f"model.safetensors of 'modelscope:a/b' was damaged on its way.*{says}"):
        modelscope("modelscope:a/b")
    work = tmp_path / "cache" / "modelscope" / "a" / "b@master.part"
    assert not (work / "model.safetensors").exists() and not (work / "model.safetensors.part").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a\\..\\x.json", "C:x.json", "a/../../x.json", "a//b.json", "x\n.json"]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    Hub.repos["a/b", "master"] = WHOLE | {name: b"{}"}
    with pytest.raises(UserError, match="would leave the folder") as error:
        modelscope("modelscope:a/b")
    assert repr(name) in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_unreachable_gives_three_ways(monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be reached") as error:
        modelscope("modelscope:a/b")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("status, says", [(401, "needs a login"), (403, "needs a login"), (500, "it answered 500")])
def test_refusals(status, says):
    Hub.status["/api/v1/models/a/b"] = (status, None)
    with pytest.raises(UserError, match=says):
        modelscope("modelscope:a/b")


def test_a_server_that_stumbles_is_asked_again():
    Hub.repos["a/b", "master"] = WHOLE
    Hub.busy["model.safetensors"] = [503, 429]
    assert (modelscope("modelscope:a/b") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be reached.*nonsense"):
        modelscope("modelscope:a/b")


def test_no_model_in_it_is_said_before_anything_is_fetched():
    Hub.repos["a/gguf", "master"] = {"x.gguf": b"GGUF"}
    with pytest.raises(UserError, match="holds no config.json"):
        modelscope("modelscope:a/gguf")
    Hub.repos["a/none", "master"] = {"config.json": CONFIG, "modeling.py": b"", "x.pt": b""}
    with pytest.raises(UserError, match="holds no whole weights"):
        modelscope("modelscope:a/none")


def test_room_is_checked_first(monkeypatch, tmp_path):
    Hub.repos["a/b", "master"] = WHOLE
    usage = type("Usage", (), {"free": 400_000})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match="has 0.0 GB free; what is still to fetch .* needs 0.0 GB\nFree some room, or set GLMTUNE_CACHE"
    ):
        modelscope("modelscope:a/b")
    assert ranges("model.safetensors") == []


def test_two_at_once_fetch_it_once():
    Hub.repos["a/b", "master"] = WHOLE
    heard, folders = [], []
    threads = [threading.Thread(target=lambda: folders.append(hub.download("modelscope:a/b", heard.append))) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(folders) == 2 and folders[0] == folders[1]
    assert ranges("model.safetensors") == [None]


def test_interrupted_is_continued(monkeypatch):
    Hub.repos["a/b", "master"] = WHOLE
    stream, heard = hub._stream, []

    def stop(repo, file, part, have, client, show):
        if file.name == "model.safetensors":
            part.write_bytes(WEIGHTS[:1000])
            raise KeyboardInterrupt
        stream(repo, file, part, have, client, show)

    monkeypatch.setattr(hub, "_stream", stop)
    with pytest.raises(KeyboardInterrupt):
        hub.download("modelscope:a/b", heard.append)
    assert "the same command continues" in heard[-1]
    monkeypatch.setattr(hub, "_stream", stream)
    modelscope("modelscope:a/b")
    assert ranges("model.safetensors") == ["bytes=1000-"]


@pytest.mark.parametrize("name", ["a/b", "THUDM/glm-4-9b-chat@v1.0", "a/b@refs/pr/1", "modelscope:a/b@x", "modelscope:what ever"])
def test_names_of_a_hub(name):
    assert hub.is_id(name)


@pytest.mark.parametrize(
    "name", ["a", "./a/b", "../a", "a/..", "~/a", "/a/b", "a/b/c", "a/b@", "a/b@../c", "a\\b", "a b/c", "a/b@/c", ""]
)
def test_names_of_no_hub(name):
    assert not hub.is_id(name)


def test_resolve_asks_the_hub_and_keeps_its_own_errors(tmp_path, monkeypatch):
    Hub.repos["a/b", "master"] = WHOLE
    assert names(resolve("modelscope:a/b")) == TAKEN
    with pytest.raises(UserError, match="is no model of a hub; wanted owner/model"):
        resolve("modelscope:b")
    with pytest.raises(UserError, match="no such folder"):
        resolve("./a/b")


# --- the Hugging Face hub, in processes of its own: huggingface_hub reads its environment when it is imported ---------------

CHILD = """
import json, os, sys
from glmtune.errors import UserError
from glmtune import hub
hub.PAUSES = (0.01, 0.01)
for line in sys.stdin:
    asked, heard = json.loads(line), []
    os.environ.update(asked["env"])
    try:
        answer = {"folder": str(hub.download(asked["name"], heard.append))}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"heard": heard}), flush=True)
"""


class Child:
    def __init__(self, home: Path, endpoint: str, **env: str):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=pipe, stdout=pipe, env=clean, text=True)

    def __call__(self, name: str, **env: str) -> dict:
        self.process.stdin.write(json.dumps({"name": name, "env": env}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(5)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def online(home, endpoint):
    child = Child(home, endpoint)
    yield child
    child.close()


@pytest.fixture(scope="module")
def offline(home, endpoint):
    child = Child(home, endpoint, HF_HUB_OFFLINE="1")
    yield child
    child.close()


def test_hf_whole_and_kept_for_a_day_without_network(home, online, offline, endpoint):
    Hub.repos["hf/whole", "main"] = WHOLE
    answer = online("hf/whole")
    commit = Hub.commit("hf/whole", "main")
    assert Path(answer["folder"]) == home / "hub" / "models--hf--whole" / "snapshots" / commit
    assert names(answer["folder"]) == TAKEN
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert answer["heard"] == [f"looking for hf/whole on the Hugging Face hub ({endpoint}) ..."]
    # no network by choice, by accident, by a hotel's login page: the copy is used, and that is said
    for child, env, why in [
        (offline, {}, "HF_HUB_OFFLINE is set"),
        (online, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be reached"),
    ]:
        Hub.asked.clear()
        again = child("hf/whole", **env)
        assert again["folder"] == answer["folder"] and not Hub.asked
        assert why in again["heard"][-1] and "using the complete copy in the cache" in again["heard"][-1]
    Hub.status["/api"] = (200, None)
    again = online("hf/whole", HF_ENDPOINT=endpoint)
    assert "its answer is not the hub's" in again["heard"][-1] and again["folder"] == answer["folder"]


def test_hf_the_cache_is_the_hubs_own(home, online, endpoint):
    """What we fetched, plain huggingface_hub finds without a network; and a file of ours that is gone makes the copy incomplete."""
    Hub.repos["hf/cache", "main"] = WHOLE
    folder = online("hf/cache")["folder"]
    code = "import sys, huggingface_hub as h; print(h.snapshot_download('hf/cache', local_files_only=True)); print(h.hf_hub_download('hf/cache', 'config.json'))"
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [folder, f"{folder}/config.json"]
    (Path(folder) / "model.safetensors").unlink()
    assert "error" in online("hf/cache", HF_ENDPOINT="http://127.0.0.1:9")
    Hub.asked.clear()
    assert online("hf/cache", HF_ENDPOINT=endpoint)["folder"] == folder  # the blob is still there: only linked again
    assert ranges("model.safetensors") == [] and (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS


def test_hf_what_huggingface_hub_left_half_is_not_taken_for_whole(home, offline, online):
    commit = "c" * 40
    root = home / "hub" / "models--hf--half"
    (root / "snapshots" / commit).mkdir(parents=True)
    (root / "trees").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    listed = {name: {"size": 1, "blob_id": "0" * 40} for name in ("config.json", "tokenizer.json", "model.safetensors", "x.py")}
    (root / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    for name in ("config.json", "model.safetensors"):
        (root / "snapshots" / commit / name).write_text("{}")
    assert "HF_HUB_OFFLINE is set" in offline("hf/half")["error"]
    (root / "snapshots" / commit / "tokenizer.json").write_text("{}")
    assert offline("hf/half")["folder"] == str(root / "snapshots" / commit)
    (root / "trees" / f"{commit}.json").unlink()  # an older huggingface_hub left no list; the index still knows of a missing shard
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (root / "snapshots" / commit / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "snapshots" / commit / "model.safetensors").rename(root / "snapshots" / commit / "model-00001-of-00002.safetensors")
    other = "f" * 40  # a name of its own: the process before remembers lists
    (root / "snapshots" / commit).rename(root / "snapshots" / other)
    assert "HF_HUB_OFFLINE is set" in offline(f"hf/half@{other}")["error"]
    (root / "snapshots" / other / "model-00002-of-00002.safetensors").write_text("{}")
    assert "folder" in offline(f"hf/half@{other}")


def test_hf_revisions(home, online):
    Hub.repos["hf/rev", "main"] = WHOLE
    Hub.repos["hf/rev", "refs/pr/1"] = WHOLE | {"config.json": b'{"pr": 1}'}
    Hub.repos["hf/rev", "e" * 40] = WHOLE | {"config.json": b'{"e": 1}'}
    online("hf/rev")
    Hub.asked.clear()
    assert (Path(online("hf/rev@refs/pr/1")["folder"]) / "config.json").read_bytes() == b'{"pr": 1}'
    assert ranges("model.safetensors") == []  # the same bytes are not fetched twice
    folder = online("hf/rev@" + "e" * 40)["folder"]
    Hub.asked.clear()
    assert online("hf/rev@" + "e" * 40)["folder"] == folder and not Hub.asked  # a commit cannot change
    error = online("hf/rev@nope")["error"]
    assert "'hf/rev' on the Hugging Face hub" in error and "has no revision 'nope'" in error


def test_hf_cut_and_continued_also_by_the_next_run(home, online):
    Hub.repos["hf/cut", "main"] = WHOLE | {"model.safetensors": WEIGHTS[::-1]}
    Hub.cuts["model.safetensors"] = [100_000, 1000, 0, 0, 0, 0]
    assert "broke off model.safetensors at 101,000 of 512,000 bytes" in online("hf/cut")["error"]
    Hub.cuts.clear()
    folder = Path(online("hf/cut")["folder"])
    assert ranges("model.safetensors") == [None, "bytes=100000-", *["bytes=101000-"] * 3]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert not list((home / "hub").rglob("*.part"))


def test_hf_bin_only_without_safetensors(online):
    Hub.repos["hf/bin", "main"] = BIN
    assert names(online("hf/bin")["folder"]) == ["config.json", *[n for n in BIN if n.startswith("pytorch_model")]]


@pytest.mark.parametrize("name, says", [("model.safetensors", "sha256"), ("config.json", "git id")])
def test_hf_damaged_on_the_way(online, name, says):
    Hub.repos[f"hf/{name}", "main"] = WHOLE | {"model.safetensors": b"good" * 9}
    Hub.wire[name] = (WHOLE | {"model.safetensors": b"evil" * 9})[name].replace(b"llama", b"lambd")
    error = online(f"hf/{name}")["error"]
    assert f"{name} of 'hf/{name}' was damaged on its way" in error and f"{says} is" in error


def test_hf_refusals(online, endpoint):
    Hub.repos["hf/gated", "main"] = WHOLE
    assert "there is no model 'hf/none'" in (error := online("hf/none")["error"]) and "hf auth login" in error
    for start, code in [("/api/models/hf/gated", "GatedRepo"), ("/api/models/hf/gated", None), ("/hf/gated/resolve", "GatedRepo")]:
        Hub.status.clear()
        Hub.status[start] = (403, code)
        error = online("hf/gated")["error"]
        assert "hf auth login" in error and "https://huggingface.co/hf/gated" in error
    Hub.status["/api/models/hf/gated"] = (404, None)
    assert "there is no model 'hf/gated'" in online("hf/gated")["error"]
    Hub.status["/api/models/hf/gated"] = (502, None)
    assert "it answered 502" in online("hf/gated")["error"]


def test_hf_unreachable_gives_three_ways(online, offline, endpoint):
    for child, env in [(offline, {}), (online, {"HF_ENDPOINT": "http://127.0.0.1:9"}), (online, {"HF_ENDPOINT": "hf-mirror.com"})]:
        lines = child("hf/never", **env)["error"].splitlines()
        assert len(lines) == 3 and "'hf/never' is no folder here" in lines[0] and "could not be reached" in lines[0]
        assert "HF_ENDPOINT=https://hf-mirror.com" in lines[0] and "modelscope:hf/never" in lines[1] and "folder" in lines[2]
    Hub.repos["hf/mirrored", "main"] = BIN  # and a mirror that is set later is asked
    assert "folder" in online("hf/mirrored", HF_ENDPOINT=endpoint)


def test_hf_a_name_that_leaves_the_folder_is_refused(online, home):
    for name in ("../../../../x.json", "a\\x.json"):
        Hub.repos["hf/evil", "main"] = WHOLE | {name: b"{}"}
        assert repr(name) in online("hf/evil")["error"]
    Hub.repos["hf/evil", "main"] = WHOLE
    assert not [path for path in (*home.rglob("*x.json"), *home.parent.glob("*x.json")) if path.name in ("x.json", "a\\x.json")]
    assert "is not the name of a model" in online("hf/a--b")["error"]

"""A name on a hub -> a folder with the model's settings, tokenizer and weights. Code and other people's pickles are never fetched.

`owner/model[@revision]` comes from the Hugging Face hub or its mirror (HF_ENDPOINT) into the hub's own cache (HF_HOME), which is
written here in its published layout because huggingface_hub throws a half-fetched file away; `modelscope:owner/model[@revision]`
comes from ModelScope. Every file is continued after a break, and compared with the digest that the hub lists before it counts.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from ..errors import UserError
from .smollm2 import cache_root

PAUSES = (1, 2, 4, 8)  # seconds before each new try of a broken connection; from the start again once bytes have come

_ID = re.compile(r"(modelscope:)?([A-Z0-9_][\w.-]*/[A-Z0-9_][\w.-]*)(?:@(\w[\w.-]*(?:/[\w.-]+)*))?", re.ASCII | re.IGNORECASE)
_SMALL = re.compile(r".+\.(json|jinja|txt|model|tiktoken)", re.IGNORECASE)
_NEVER = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")  # pickles of a training run that also end in .bin
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repo:
    asked: str  # what the user wrote
    id: str  # owner/model
    revision: str
    endpoint: str
    modelscope: bool

    @property
    def site(self) -> str:
        return f"{'ModelScope' if self.modelscope else 'the Hugging Face hub'} ({self.endpoint})"

    def unreachable(self, reason: str) -> UserError:
        return self.advise(f"'{self.asked}' is no folder here, and {self.site} could not be reached ({reason})")

    def advise(self, what: str) -> UserError:
        other = f"the Hugging Face hub instead: {self.id}" if self.modelscope else f"ModelScope instead: modelscope:{self.id}"
        return UserError(
            f"{what}; a mirror of the Hugging Face hub may be: HF_ENDPOINT=https://hf-mirror.com and the name {self.id}\n"
            f"or take it from {other} (the owner may be called otherwise there)\n"
            "or by hand: download the model's files anywhere, copy the folder here and give its path"
        )

    def denied(self) -> UserError:
        if self.modelscope:
            how = f"glmtune fetches only public models from there: see {self.endpoint}/models/{self.id}, download it by hand and"
        else:  # licences are accepted on the hub itself, not on a mirror
            how = f"Accept the licence on https://huggingface.co/{self.id}, then run `hf auth login`; or download it by hand and"
        return UserError(f"'{self.id}' on {self.site} needs a login, or its licence accepted\n{how} give the folder's path")

    def missing(self) -> UserError:
        login = "" if self.modelscope else ", or log in if it is private: `hf auth login`"
        return UserError(f"there is no model '{self.id}' on {self.site}, and no such folder here\nCheck the spelling{login}")

    def no_revision(self) -> UserError:
        return UserError(
            f"'{self.id}' on {self.site} has no revision '{self.revision}' (or no files in it)\n"
            f"Wanted is a branch, a tag or a whole commit id; without @{self.revision} the newest is taken"
        )

    def refused(self, status: int) -> UserError:
        known = {401: self.denied, 403: self.denied, 404: self.missing}
        return known[status]() if status in known else self.unreachable(f"it answered {status}")


@dataclass(frozen=True)
class File:
    name: str
    size: int | None
    digest: str  # sha256 (64 digits), git's blob id (40), or "" where the hub gives none
    url: str
    path: Path  # where the model's folder shows it
    store: Path  # where its bytes lie: `path` itself, or the blob that `path` links to


def is_id(name: str) -> bool:
    """Whether a name is meant for a hub: `owner/model[@revision]`, or anything that begins with `modelscope:`."""
    return name.startswith("modelscope:") or (_ID.fullmatch(name) is not None and ".." not in name)


def download(name: str, say: Callable[[str], None]) -> Path:
    """The folder of a model of a hub, fetched at first use. Raises UserError: unreachable, no such model or revision, not allowed,
    no room, damaged on the way, a file name that would leave the folder. A broken download is continued by the next call.
    """
    match = _ID.fullmatch(name)
    if match is None or ".." in name:
        raise UserError(f"'{name}' is no model of a hub; wanted owner/model, owner/model@revision or modelscope:owner/model")
    modelscope, repo_id, revision = bool(match[1]), match[2], match[3]
    try:
        if modelscope:
            endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
            return _modelscope(Repo(name, repo_id, revision or "master", endpoint.rstrip("/"), True), say)
        from huggingface_hub import constants

        endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT  # constants hold what it was at their import
        return _huggingface(Repo(name, repo_id, revision or "main", endpoint.rstrip("/"), False), say)
    except KeyboardInterrupt:
        say(f"stopped; what came of {name} is kept, the same command continues")
        raise


# --- the two hubs ---------------------------------------------------------------------------------------------------------


def _huggingface(repo: Repo, say) -> Path:
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hf
    from huggingface_hub.utils import build_hf_headers

    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.id.replace('/', '--')}"
    fixed, kept = _COMMIT.fullmatch(repo.revision) is not None, _kept(root, repo)
    if fixed and kept:
        return kept
    say(f"looking for {repo.asked} on {repo.site} ...")
    commit, siblings, failure = "", [], None
    try:
        info = HfApi(endpoint=repo.endpoint).model_info(repo.id, revision=repo.revision, files_metadata=True, timeout=20)
        commit, siblings = info.sha or "", info.siblings or []
        if not _COMMIT.fullmatch(commit):  # it becomes a folder's name
            raise ValueError
    except hf.HFValidationError as error:
        raise UserError(f"'{repo.id}' is not the name of a model: {str(error).splitlines()[0]}") from None
    except hf.RevisionNotFoundError:
        failure = repo.no_revision()
    except hf.GatedRepoError:
        failure = repo.denied()
    except hf.RepositoryNotFoundError:  # also the answer (401) to a stranger who asks for a private one
        failure = repo.missing()
    except hf.HfHubHTTPError as error:
        failure = repo.refused(error.response.status_code)
    except hf.OfflineModeIsEnabled:
        failure = repo.unreachable("HF_HUB_OFFLINE is set")
    except (HTTPError, InvalidURL, OSError, ImportError) as error:  # ImportError: a SOCKS proxy is set, its package is missing
        failure = repo.unreachable(_reason(error))
    except (ValueError, KeyError, TypeError, AttributeError):  # the login page of a hotel, say
        failure = repo.unreachable("its answer is not the hub's")
    if kept and failure:
        say(f"{str(failure).splitlines()[0]}; using the complete copy in the cache")
    if kept and (failure or kept.name == commit):  # before the lock: a shared cache may be read-only
        return kept
    if failure:
        raise failure
    folder = root / "snapshots" / commit
    files = []
    for item in siblings:
        digest = _digest(item.lfs.sha256 if item.lfs else item.blob_id)
        url = f"{repo.endpoint}/{repo.id}/resolve/{commit}/{quote(item.rfilename)}"
        path = folder / item.rfilename
        files.append(File(item.rfilename, item.size, digest, url, path, root / "blobs" / digest if digest else path))
    lock, headers = root.parent / ".locks" / root.name / "glmtune.lock", build_hf_headers(library_name="glmtune")
    with _locked(lock, say), _client(repo, headers) as client:
        _fetch_all(repo, files, folder, client, say)
        if not fixed:  # last of all: a ref vouches for a complete snapshot
            ref = root / "refs" / repo.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(ref.name + ".part")
            new.write_text(commit)
            new.replace(ref)
    return folder


def _kept(root: Path, repo: Repo) -> Path | None:
    """The snapshot of a revision in the hub's cache, whoever fetched it, where nothing of it is missing."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    ref = root / "refs" / repo.revision
    commit = repo.revision if _COMMIT.fullmatch(repo.revision) else ref.read_text().strip() if ref.is_file() else ""
    folder = root / "snapshots" / commit
    if not commit or not (folder / "config.json").is_file():
        return None
    here = {path.name for path in folder.iterdir() if path.is_file()}
    try:  # huggingface_hub may have stopped between two small files; it leaves the list of what there is to fetch
        listed = {file.path for file in get_cached_repo_tree(repo.id, revision=commit) if "/" not in file.path}
    except CachedRepoTreeNotFoundError:
        listed = here
    if not {name for name in listed if _SMALL.fullmatch(name)} <= here:
        return None
    weights = _weights(sorted(listed), folder)
    return folder if weights and set(weights) <= here else None  # _weights: [] where an index names one that is not listed


def _modelscope(repo: Repo, say) -> Path:
    target = cache_root() / "modelscope" / f"{repo.id}@{repo.revision.replace('/', '--')}"
    if target.is_dir():  # complete, since it is renamed into place
        return target
    work = target.with_name(target.name + ".part")
    with _locked(target.with_name(target.name + ".lock"), say), _client(repo, {"User-Agent": "glmtune"}) as client:
        if target.is_dir():
            return target
        say(f"looking for {repo.asked} on {repo.site} ...")
        base = f"{repo.endpoint}/api/v1/models/{repo.id}/repo"
        files = []
        for item in _modelscope_files(repo, client, base):
            path, query = work / item["Path"], urlencode({"Revision": repo.revision, "FilePath": item["Path"]})
            files.append(File(item["Path"], item.get("Size"), _digest(item.get("Sha256")), f"{base}?{query}", path, path))
        fetched = _fetch_all(repo, files, work, client, say)
        for path in work.iterdir():  # of an earlier, broken try, when the repository was another
            if path.name not in fetched:
                path.unlink()
        work.rename(target)
    return target


def _modelscope_files(repo: Repo, client: Any, base: str) -> list[dict[str, Any]]:
    from httpx2 import HTTPError, InvalidURL

    try:
        answer = client.get(f"{base}/files", params={"Revision": repo.revision, "Recursive": "true"})
        if answer.status_code == 200 and (listed := (answer.json().get("Data") or {}).get("Files")):
            return [item for item in listed if item["Type"] != "tree" and isinstance(item["Path"], str)]
        if answer.status_code not in (200, 400, 404):
            raise repo.refused(answer.status_code)
        # An unknown revision is answered with 404, an error code or no files at all; so is an unknown model.
        raise repo.no_revision() if client.get(base.removesuffix("/repo")).status_code == 200 else repo.missing()
    except (HTTPError, InvalidURL) as error:
        raise repo.unreachable(_reason(error)) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise repo.unreachable("its answer is not ModelScope's") from None


# --- which files ----------------------------------------------------------------------------------------------------------


def _weights(names: Sequence[str], folder: Path) -> list[str]:
    """The weight files out of those listed: safetensors before .bin, and what an index names before what merely lies there
    (half-precision twins, `consolidated.*`). The index is read from `folder`."""
    for stem, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = f"{stem}{end}.index.json"
        found = [name for name in names if name.endswith(end) and not _NEVER.match(name)]
        if index in names:
            try:
                wanted = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{folder / index} is no index of weights; delete it and try again") from None
            whole = all(name in names for name in wanted)
            found = [name for name in found if name in wanted and whole]
        elif stem + end in found:
            found = [stem + end]
        elif end == ".bin":
            found = [name for name in found if name.startswith(stem)]
        if found:
            return found
    return []


def _check_name(name: str, repo: Repo) -> None:
    """Raises UserError for a name that could be written outside the model's folder, on any system."""
    if name.startswith("/") or set(name.split("/")) & {"", ".", ".."} or re.search(r"[\\:\x00-\x1f]", name):
        raise UserError(f"{repo.site} lists a file {name!r} in '{repo.id}', which would leave the folder; nothing was fetched")


def _fetch_all(repo: Repo, files: Sequence[File], folder: Path, client: Any, say) -> set[str]:
    """Fetches what a model needs out of the top folder, settings first. Returns the names."""
    for file in files:
        _check_name(file.name, repo)
    top = {file.name: file for file in files if "/" not in file.name}
    if "config.json" not in top:
        raise UserError(f"'{repo.asked}' on {repo.site} holds no config.json: it is no model folder (an adapter? a GGUF file?)")
    small = [name for name in top if _SMALL.fullmatch(name)]
    _transfer(repo, [top[name] for name in small], folder, client, say)
    weights = _weights(list(top), folder)
    if not weights:
        raise UserError(f"'{repo.asked}' on {repo.site} holds no whole weights (*.safetensors, pytorch_model*.bin): {sorted(top)}")
    _transfer(repo, [top[name] for name in weights], folder, client, say)
    return {*small, *weights}


# --- bytes ----------------------------------------------------------------------------------------------------------------


def _transfer(repo: Repo, files: Sequence[File], folder: Path, client: Any, say) -> None:
    from rich import progress
    from rich.console import Console

    files = [file for file in files if not _have(file)]
    total = sum(file.size or 0 for file in files)
    for place in {folder, *(file.store.parent for file in files)}:
        place.mkdir(parents=True, exist_ok=True)
    need = total - sum(_part(file).stat().st_size for file in files if _part(file).is_file())
    if need > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free; what is still to fetch of '{repo.asked}' needs {need / 1e9:.1f} GB\n"
            f"Free some room, or set {'GLMTUNE_CACHE' if repo.modelscope else 'HF_HOME'} to a folder on another disk"
        )
    seen = sys.stderr.isatty()
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
    columns += (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    done = 0
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, disable=not seen) as bar:
        task = bar.add_task("", total=total)
        for number, file in enumerate(files, 1):
            if not seen and (file.size or 0) > 10_000_000:
                say(f"fetching {file.name} ({(file.size or 0) / 1e9:.2f} GB, {number} of {len(files)})")
            bar.update(task, description=file.name)
            _fetch(repo, file, client, lambda have, done=done: bar.update(task, completed=done + have))
            done += file.size or 0


def _fetch(repo: Repo, file: File, client: Any, show: Callable[[int], None]) -> None:
    from httpx2 import RequestError

    part = _part(file)
    pauses, continued = list(PAUSES), part.is_file()
    while not file.store.is_file():
        have = part.stat().st_size if part.is_file() else 0
        try:
            if have == 0 or have != file.size:
                _stream(repo, file, part, have, client, show)
        except (RequestError, _Again) as error:
            now = part.stat().st_size if part.is_file() else 0
            pauses = list(PAUSES) if now > have else pauses
            if not pauses:
                what = (
                    f"'{repo.asked}': {repo.site} broke off {file.name} at {now:,} of {file.size or 0:,} bytes ({_reason(error)})"
                )
                raise repo.advise(f"{what}; what came is kept, the same command continues") from None
            time.sleep(pauses.pop(0))
            continue
        except OSError as error:
            raise UserError(f"{part} cannot be written: {error.strerror}; what came is kept, the same command continues") from None
        fault = _fault(part, file)
        if not fault:
            part.replace(file.store)
            break
        part.unlink()
        if not continued:
            raise UserError(
                f"{file.name} of '{repo.asked}' was damaged on its way from {repo.site}: {fault}; try again later or elsewhere"
            )
        continued = False  # the beginning was of another day, perhaps of another file: once more, from its start
    if file.store != file.path:
        file.path.unlink(missing_ok=True)
        try:
            file.path.symlink_to(os.path.relpath(file.store, file.path.parent))
        except OSError:  # Windows without the right to make links: as huggingface_hub does there
            shutil.move(file.store, file.path)


class _Again(Exception):
    """The server answered, but not with what was asked for; worth another try."""


def _stream(repo: Repo, file: File, part: Path, have: int, client: Any, show: Callable[[int], None]) -> None:
    """Appends the rest of a file to its part. A server that does not know Range sends it all, which then starts anew."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", file.url, headers=headers) as answer:
        if answer.status_code == 416:  # the part is longer than the file
            part.unlink()
            raise _Again("the server refuses to continue it")
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise _Again(f"it answered {answer.status_code}")
        if answer.status_code == 404:
            raise UserError(
                f"{file.name} of '{repo.asked}' is listed but not there on {repo.site}; try again, the model may be changing"
            )
        if answer.status_code not in (200, 206):
            raise repo.refused(answer.status_code)
        if answer.status_code == 200 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if answer.status_code == 206 and have:
                part.unlink()
                raise _Again("the server continues at another place")
            have = 0
        with open(part, "ab" if have else "wb") as out:
            for chunk in answer.iter_bytes():  # as it comes: a larger chunk would be lost with the connection
                out.write(chunk)
                have += len(chunk)
                show(have)
                if file.size is not None and have > file.size:  # never fills the disk; found faulty at the end
                    break
    if file.size is not None and have < file.size:
        raise _Again("the connection ended early")


def _have(file: File) -> bool:
    """Whether a file is there. One of a broken try is compared again: the repository may be another by now."""
    if file.path.is_file() and file.store == file.path and _fault(file.path, file):
        file.path.unlink()
    return file.path.is_file()


def _part(file: File) -> Path:
    return file.store.with_name(file.store.name + ".part")


def _fault(path: Path, file: File) -> str:
    """What is wrong with a fetched file; empty where it is the one that was published."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size:,} bytes, wanted {file.size:,}"
    if not file.digest:
        return ""
    sha256 = len(file.digest) == 64
    digest = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    wrong = digest.hexdigest() != file.digest
    return f"{'sha256' if sha256 else 'git id'} is {digest.hexdigest()}, wanted {file.digest}" if wrong else ""


def _digest(given: Any) -> str:
    """A digest as the hub gives it, or "" for none. Blobs are named after it, so nothing but digits may pass."""
    text = str(given or "").lower()
    return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else ""


def _client(repo: Repo, headers: dict[str, str]) -> Any:
    import httpx2  # what huggingface_hub itself uses

    try:
        return httpx2.Client(headers=headers, follow_redirects=True, timeout=httpx2.Timeout(30, connect=10))
    except (ImportError, ValueError) as error:  # a proxy in the environment that cannot be used
        raise repo.unreachable(_reason(error)) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


@contextmanager
def _locked(path: Path, say) -> Iterator[None]:
    """One process fetches, the others wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another process is fetching this model; waiting for it ...")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache folder {path.parent} cannot be used: {error}; set HF_HOME or GLMTUNE_CACHE to another"
        ) from None
    try:
        yield
    finally:
        lock.release()

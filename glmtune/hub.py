"""A name on a hub -> a folder with a model's settings, tokenizer and weights, or a data set's files. Code and other people's
pickles are never fetched.

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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from . import terminal
from .errors import UserError
from .files import told, whole

PAUSES = (1, 2, 4, 8)  # seconds before each new try of a broken connection; from the start again once bytes have come

_ID = re.compile(r"(modelscope:)?([A-Z0-9_][\w.-]*/[A-Z0-9_][\w.-]*)(?:@(\w[\w.-]*(?:/[\w.-]+)*))?", re.ASCII | re.IGNORECASE)
_SMALL = re.compile(r".+\.(json|jinja|txt|model|tiktoken)", re.IGNORECASE)
_NEVER = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")  # pickles of a training run that also end in .bin
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PAGE = 200  # files that ModelScope lists at once
_DATA = re.compile(r"(?:.*/)?[^./][^/]*\.(json|jsonl|ndjson|csv|tsv|txt|parquet)(\.gz)?", re.IGNORECASE)
_ABOUT = re.compile(r"(dataset_infos?|config|readme|licen[cs]e|requirements)(\.\w+)?", re.IGNORECASE)  # no rows in these
_SPLIT = r"(?:^|[/_.-])(?:{})(?:[/_.-]|$)"


def cache_root() -> Path:
    """Where converted models are kept: `$GLMTUNE_CACHE`, else `$XDG_CACHE_HOME/glmtune`, else `~/.cache/glmtune`."""
    if "GLMTUNE_CACHE" in os.environ:
        return Path(os.environ["GLMTUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "glmtune"


@dataclass(frozen=True)
class Repo:
    asked: str  # what the user wrote
    id: str  # owner/model
    revision: str
    endpoint: str
    modelscope: bool
    pick: str | None = None  # of a data set: a split, or a pattern of its files; "" for what is there to train on; None: a model

    @property
    def kind(self) -> str:
        return "model" if self.pick is None else "data set"

    @property
    def page(self) -> str:
        return self.id if self.pick is None else f"datasets/{self.id}"

    @property
    def site(self) -> str:
        return f"{'ModelScope' if self.modelscope else 'the Hugging Face hub'} ({self.endpoint})"

    def unreachable(self, reason: str) -> UserError:
        return self.advise(f"'{self.asked}' is no {self._here} here, and {self.site} could not be reached ({reason})")

    @property
    def _here(self) -> str:
        return "folder" if self.pick is None else "file"

    def advise(self, what: str) -> UserError:
        other = f"the Hugging Face hub instead: {self.id}" if self.modelscope else f"ModelScope instead: modelscope:{self.id}"
        by_hand = "copy the folder here and give its path" if self.pick is None else "and give the path of the file"
        return UserError(
            f"{what}; a mirror of the Hugging Face hub may be: HF_ENDPOINT=https://hf-mirror.com and the name {self.id}\n"
            f"or take it from {other} (the owner may be called otherwise there)\n"
            f"or by hand: download the {self.kind}'s files anywhere, {by_hand}"
        )

    def denied(self) -> UserError:
        if self.modelscope:
            how = f"glmtune fetches only what is public there: see {self.endpoint}/{self._kinds}/{self.id}, download it by hand and"
        else:  # licences are accepted on the hub itself, not on a mirror
            how = f"Accept the licence on https://huggingface.co/{self.page}, then run `hf auth login`; or download it by hand and"
        return UserError(f"'{self.id}' on {self.site} needs a login, or its licence accepted\n{how} give its path")

    def missing(self) -> UserError:
        login = "" if self.modelscope else ", or log in if it is private: `hf auth login`"
        return UserError(
            f"there is no {self.kind} '{self.id}' on {self.site}, and no such {self._here} here\nCheck the spelling{login}"
        )

    @property
    def _kinds(self) -> str:
        return "models" if self.pick is None else "datasets"

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
    return _fetched(name, None, say)


def download_data(name: str, pick: str, say: Callable[[str], None]) -> list[tuple[Path, str]]:
    """The data files of a data set of a hub (JSON, CSV, txt, Parquet; never scripts), each with its name there.

    pick: a split, a file, a folder or a pattern of files; "" takes the train split where files are named after splits, else all.
    Raises UserError as `download`, and where there is no such file.
    """
    folder = _fetched(name, pick, say)
    listed = folder.with_name(folder.name + _LIST.format(_slug(pick)))
    return [(folder / file, file) for file in json.loads(listed.read_text(encoding="utf-8"))]


def config_folder(name: str) -> Path:
    """A folder with nothing but config.json of a model on the Hugging Face hub. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    match = _ID.fullmatch(name)
    if match is None or match[1]:
        raise UserError(f"'{name}' is no model of the Hugging Face hub; give owner/model, or a folder with its config.json")
    try:
        return Path(hf_hub_download(match[2], "config.json", revision=match[3], cache_dir=cache_root() / "configs")).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"config.json of {name} cannot be fetched ({_reason(error)}); put that one file into a folder and name the folder"
        ) from None


def _fetched(name: str, pick: str | None, say: Callable[[str], None]) -> Path:
    match = _ID.fullmatch(name)
    if match is None or ".." in name:
        kind, what = ("model", "model") if pick is None else ("data set", "name")
        raise UserError(f"'{name}' is no {kind} of a hub; wanted owner/{what}, owner/{what}@revision or modelscope:owner/{what}")
    modelscope, repo_id, revision = bool(match[1]), match[2], match[3]
    try:
        if modelscope:
            endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
            return _modelscope(Repo(name, repo_id, revision or "master", endpoint.rstrip("/"), True, pick), say)
        from huggingface_hub import constants

        endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT  # constants hold what it was at their import
        return _huggingface(Repo(name, repo_id, revision or "main", endpoint.rstrip("/"), False, pick), say)
    except KeyboardInterrupt:
        say(f"stopped; what came of {name} is kept, the same command continues")
        raise


# --- the two hubs ---------------------------------------------------------------------------------------------------------


def _huggingface(repo: Repo, say) -> Path:
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hf
    from huggingface_hub.utils import build_hf_headers

    root = Path(constants.HF_HUB_CACHE) / f"{'models' if repo.pick is None else 'datasets'}--{repo.id.replace('/', '--')}"
    fixed, kept = _COMMIT.fullmatch(repo.revision) is not None, _kept(root, repo)
    if fixed and kept:
        return kept
    say(f"looking for {repo.asked} on {repo.site} ...")
    commit, siblings, failure = "", [], None
    try:
        api = HfApi(endpoint=repo.endpoint)
        ask = api.model_info if repo.pick is None else api.dataset_info
        info = ask(repo.id, revision=repo.revision, files_metadata=True, timeout=20)
        commit, siblings = info.sha or "", info.siblings or []
        if not _COMMIT.fullmatch(commit):  # it becomes a folder's name
            raise ValueError
    except hf.HFValidationError as error:
        raise UserError(f"'{repo.id}' is not the name of a {repo.kind}: {str(error).splitlines()[0]}") from None
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
        url = f"{repo.endpoint}/{repo.page}/resolve/{commit}/{quote(item.rfilename)}"
        path = folder / item.rfilename
        files.append(File(item.rfilename, item.size, digest, url, path, root / "blobs" / digest if digest else path))
    lock, headers = root.parent / ".locks" / root.name / "glmtune.lock", build_hf_headers(library_name="glmtune")
    with _locked(lock, say), _client(repo, headers) as client:
        (_fetch_all if repo.pick is None else _fetch_data)(repo, files, folder, client, say)
        if not fixed:  # last of all: a ref vouches for a complete snapshot
            ref = root / "refs" / repo.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            whole(ref, commit)
    return folder


def _kept(root: Path, repo: Repo) -> Path | None:
    """The snapshot of a revision in the hub's cache, whoever fetched it, where nothing of it is missing."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    ref = root / "refs" / repo.revision
    commit = repo.revision if _COMMIT.fullmatch(repo.revision) else ref.read_text().strip() if ref.is_file() else ""
    folder = root / "snapshots" / commit
    if repo.pick is not None:
        return folder if commit and _has_data(folder, repo.pick) else None
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
    kind = "modelscope" if repo.pick is None else "modelscope-data"
    target = cache_root() / kind / f"{repo.id}@{repo.revision.replace('/', '--')}"
    if repo.pick is not None:
        return _modelscope_data(repo, target, say)
    if target.is_dir():  # complete, since it is renamed into place
        return target
    work = target.with_name(target.name + ".part")
    with _locked(target.with_name(target.name + ".lock"), say), _client(repo, {"User-Agent": "glmtune"}) as client:
        if target.is_dir():
            return target
        say(f"looking for {repo.asked} on {repo.site} ...")
        fetched = _fetch_all(repo, _modelscope_files(repo, client, work), work, client, say)
        for path in work.iterdir():  # of an earlier, broken try, when the repository was another
            if path.name not in fetched:
                path.unlink()
        work.rename(target)
    return target


def _modelscope_data(repo: Repo, folder: Path, say) -> Path:
    assert repo.pick is not None
    with _locked(folder.with_name(folder.name + ".lock"), say), _client(repo, {"User-Agent": "glmtune"}) as client:
        if not _has_data(folder, repo.pick):
            say(f"looking for {repo.asked} on {repo.site} ...")
            _fetch_data(repo, _modelscope_files(repo, client, folder), folder, client, say)
    return folder


def _modelscope_files(repo: Repo, client: Any, folder: Path) -> list[File]:
    from httpx2 import HTTPError, InvalidURL

    base = f"{repo.endpoint}/api/v1/{'models' if repo.pick is None else 'datasets'}/{repo.id}/repo"
    asked, listed, page = {"Revision": repo.revision, "Recursive": "true"}, [], 1
    try:
        while True:
            if repo.pick is None:
                answer = client.get(f"{base}/files", params=asked)
            else:  # data sets are listed in pages
                answer = client.get(f"{base}/tree", params={**asked, "PageSize": str(_PAGE), "PageNumber": str(page)})
            more = (answer.json().get("Data") or {}).get("Files") if answer.status_code == 200 else None
            listed, page = listed + (more or []), page + 1
            if repo.pick is None or not more or len(more) < _PAGE:
                break
        if listed:
            files = []
            for name, item in ((item["Path"], item) for item in listed if item["Type"] != "tree" and isinstance(item["Path"], str)):
                url = f"{base}?{urlencode({'Revision': repo.revision, 'FilePath': name})}"
                files.append(File(name, item.get("Size"), _digest(item.get("Sha256")), url, folder / name, folder / name))
            return files
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


def data_files(names: Sequence[str], pick: str) -> list[str]:
    """The names of data files that are meant; see `download_data`."""
    files = sorted(name for name in names if _DATA.fullmatch(name) and not _ABOUT.fullmatch(name.rpartition("/")[2]))
    if re.search(r"[./*?\[]", pick):
        return [name for name in files if fnmatchcase(name, pick) or name.startswith(pick.rstrip("/") + "/")]
    of_split = [name for name in files if re.search(_SPLIT.format(re.escape(pick or "train")), name, re.IGNORECASE)]
    return of_split or ([] if pick else files)


_LIST = ".{}.files.json"  # beside a folder: which of its files are a whole pick; written last


def _slug(pick: str) -> str:
    return hashlib.sha256(pick.encode()).hexdigest()[:16]


def _has_data(folder: Path, pick: str) -> bool:
    listed = folder.with_name(folder.name + _LIST.format(_slug(pick)))
    return listed.is_file() and all((folder / name).is_file() for name in json.loads(listed.read_text(encoding="utf-8")))


def _fetch_data(repo: Repo, files: Sequence[File], folder: Path, client: Any, say) -> None:
    for file in files:
        _check_name(file.name, repo)
    wanted = data_files([file.name for file in files], repo.pick or "")
    if not wanted:
        there = data_files([file.name for file in files], "*")
        what = (
            f"no data file '{repo.pick}'; it has {there[:12]}" if repo.pick and there else "no data files (JSON, CSV, txt, Parquet)"
        )
        scripts = "; loading scripts are never run" if any(file.name.endswith(".py") for file in files) and not there else ""
        raise UserError(f"'{repo.asked}' on {repo.site} has {what}{scripts}")
    _transfer(repo, [file for file in files if file.name in wanted], folder, client, say)
    listed = folder.with_name(folder.name + _LIST.format(_slug(repo.pick or "")))
    whole(listed, json.dumps(wanted))


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

    files = [file for file in files if not _have(file)]
    total = sum(file.size or 0 for file in files)
    for place in {folder, *(path.parent for file in files for path in (file.store, file.path))}:
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
    with progress.Progress(*columns, console=terminal.console(stderr=True), transient=True, disable=not seen) as bar:
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
            raise UserError(f"{told(error, part)}; what came is kept, the same command continues") from None
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
            say("another process is fetching this; waiting for it ...")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache folder {path.parent} cannot be used: {error}; set HF_HOME or GLMTUNE_CACHE to another"
        ) from None
    try:
        yield
    finally:
        lock.release()

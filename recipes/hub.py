"""fetch: MODEL becomes a folder with a whole, verified checkpoint: the embedded one, a local one or a hub's.

A hub's model is pinned to a commit, only its needed files are downloaded, into the cache of the hub's own library,
and every file is checked against the hub's size and sha256. A record of that is written last, so it exists if and
only if the download is whole. Without network a whole copy in the cache does. Knows no architecture.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from . import folder, hub_hf, hub_modelscope
from .plain import check_names
from .progress import Step, Tell, silent
from .remote import INDEX, Remote, RemoteFile, Unreachable, small, weights

GIB = 1 << 30
LOOK = 0.2  # seconds between two looks for a Ctrl-C


@dataclass(frozen=True)
class Base:
    """A checkpoint on this machine: `hub` is hf, modelscope, local or embedded; `revision` a commit id or None."""

    path: Path
    name: str
    hub: str
    revision: str | None


@dataclass(frozen=True)
class Hub:
    """How to speak with one hub: its default branch, where its library caches a model, asking and getting."""

    branch: str
    cache_env: str
    verifies: bool  # the library checks every sha256 while it downloads
    root: Callable[[str], Path]
    ask: Callable[[str, str | None], Remote]
    get: Callable[..., None]


HUBS = {
    "hf": Hub(hub_hf.BRANCH, "HF_HOME", False, hub_hf.root, hub_hf.ask, hub_hf.get),
    "modelscope": Hub(
        hub_modelscope.BRANCH, "MODELSCOPE_CACHE", True, hub_modelscope.root, hub_modelscope.ask, hub_modelscope.get
    ),
}


def fetch(model: str, *, hub: str = "hf", revision: str | None = None, tell: Tell = silent) -> Base:
    """The checkpoint that `model` names: 'pebble', a local folder, or an id on `hub` at `revision`.

    `tell` hears bytes of download and verification, also from other threads. ValueError where the name or the kind
    of the repository is wrong; OSError where the hub, the network, a file or the disk is.
    """
    if base := _here(model, hub, revision):
        return base
    path, commit = _from_hub(HUBS[hub], model, revision, tell)
    return Base(path, model.split("/")[1], hub, commit)


def commit_of(model: str, *, hub: str = "hf", revision: str | None = None) -> Base:
    """As `fetch` without the download: the commit that `revision` means now (in the cache, where the hub is out of
    reach), and where `fetch` would put it. Errors as `fetch`'s."""
    if base := _here(model, hub, revision):
        return base
    at = HUBS[hub]
    root = at.root(model)
    commit = revision or ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        try:
            commit = at.ask(model, revision).commit
        except Unreachable as e:
            path, cached = _from_cache(root, model, revision or at.branch, e)
            return Base(path, model.split("/")[1], hub, cached)
    return Base(root / "snapshots" / commit, model.split("/")[1], hub, commit)


def _here(model: str, hub: str, revision: str | None) -> Base | None:
    """The embedded checkpoint or a local one, checked; None for an id on `hub`. ValueError where it is neither."""
    if hub not in HUBS:
        raise ValueError(f"hub is {hub!r}; it must be one of {', '.join(HUBS)}")
    local = Path(model).expanduser()
    if model == "pebble" or local.is_dir():
        if revision is not None:
            raise ValueError(f"{model} is on this machine and has no revision; leave --revision out")
        if model == "pebble":
            from .pebble import model_folder

            return Base(model_folder(), "pebble", "embedded", None)
        folder.check(local)
        return Base(local.resolve(), local.resolve().name, "local", None)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ValueError(f"no folder {model}, and it is no hub id either; a hub id is OWNER/NAME")
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise ValueError(f"revision is {revision!r}; it must be a branch, a tag or a commit id")
    return None


def _from_hub(hub: Hub, model: str, revision: str | None, tell: Tell) -> tuple[Path, str | None]:
    root = hub.root(model)
    if revision is not None and _recorded(root, revision):
        return root / "snapshots" / revision, revision  # a commit never changes: no question to the hub
    try:
        remote = hub.ask(model, revision)
    except Unreachable as e:
        return _from_cache(root, model, revision or hub.branch, e)
    if not re.fullmatch(r"[0-9a-f]{40}", remote.commit):  # it becomes a folder's name
        raise OSError(f"the hub tells {remote.commit!r} as the commit of {model}, which is none; is it a hub?")
    path = root / "snapshots" / remote.commit
    if not _recorded(root, remote.commit):
        first = _plain(model, small(remote.files))
        indexed = any(f.path == INDEX for f in first)
        if not indexed:
            weights(model, remote.files)  # refuses what has no safetensors before any download
        _get(hub, model, remote.commit, first, path, tell)
        shards = _plain(model, weights(model, remote.files, index=folder.index_of(path) if indexed else None))
        _get(hub, model, remote.commit, shards, path, tell)
        if not hub.verifies:
            _verify(model, path, [*first, *shards], tell)
        folder.check(path)
        _record(root, model, remote.commit, [*first, *shards])
    ref = root / "refs" / (revision or hub.branch)
    if revision != remote.commit and (not ref.is_file() or ref.read_text() != remote.commit):
        _write(ref, remote.commit)
    return path, remote.commit


def _plain(model: str, files: list[RemoteFile]) -> list[RemoteFile]:
    """`files`, whose names stay in the folder that they are put into. ValueError where one does not."""
    for one in files:
        for part in one.path.split("/"):
            check_names([part], where=f"{model}: {one.path!r}: the hub")
    return files


def _get(hub: Hub, model: str, commit: str, files: Sequence[RemoteFile], path: Path, tell: Tell) -> None:
    """Download those of `files` that are not in `path` with their size, once there is room for them."""
    missing = [f for f in files if not _there(path, f)]
    if not missing:
        return
    total = sum(f.size for f in missing)
    _room(model, path, missing, hub.cache_env)
    lock, stop, done = threading.Lock(), threading.Event(), 0

    def count(size: int) -> None:
        nonlocal done
        if stop.is_set():
            raise KeyboardInterrupt  # ends the library's thread at its next piece of bytes
        with lock:
            done += size
            tell(Step("download", min(max(done, 0), total), total, model))

    tell(Step("download", 0, total, model))
    try:
        _interruptible(functools.partial(hub.get, model, commit, missing, count=count), stop)
    except Unreachable as e:
        raise OSError(f"lost {model} while downloading: {e}; run again, what is whole is kept") from None
    for f in missing:
        if not _there(path, f):
            raise OSError(f"{model}: {f.path} did not come whole ({f.size} bytes are due); run again to get the rest")


def _interruptible(work: Callable[[], None], stop: threading.Event) -> None:
    """Run `work` in a thread, so that Ctrl-C sets `stop`: the libraries' thread pools would first end their files.

    It is looked for again and again: a signal that comes while a wait begins is seen only at that wait's end.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(work)
            while not wait([future], timeout=LOOK).done:
                pass
            future.result()
        finally:
            stop.set()


def _there(path: Path, f: RemoteFile) -> bool:
    try:
        return (path / f.path).stat().st_size == f.size
    except OSError:
        return False


def _room(model: str, path: Path, files: Sequence[RemoteFile], cache_env: str) -> None:
    parts = (path / f"{f.path}.incomplete" for f in files)  # what an earlier run left, and will be resumed
    needed = sum(f.size for f in files) - sum(p.stat().st_size for p in parts if p.is_file())
    there = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"{model} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB free in {there}; "
            f"make room, or set {cache_env} to a folder on another disk"
        )


def _verify(model: str, path: Path, files: Sequence[RemoteFile], tell: Tell) -> None:
    """Hash what the hub told the sha256 of. A wrong file is deleted, blob and link, so that the next run gets it."""
    known = [f for f in files if f.sha256]
    total, done = sum(f.size for f in known), 0
    for f in known:
        sha = hashlib.sha256()
        with (path / f.path).open("rb") as file:
            while piece := file.read(1 << 24):
                sha.update(piece)
                done += len(piece)
                tell(Step("verify", done, total, f.path))
        if sha.hexdigest() != f.sha256:
            (path / f.path).resolve().unlink()
            (path / f.path).unlink(missing_ok=True)
            raise OSError(f"{model}: {f.path} came with a wrong hash and is deleted; run again to get it anew")


def _record_file(root: Path, commit: str) -> Path:
    return root / "mmq" / f"{commit}.json"


def _record(root: Path, model: str, commit: str, files: Sequence[RemoteFile]) -> None:
    data = {"model": model, "commit": commit, "files": [asdict(f) for f in files]}
    _write(_record_file(root, commit), json.dumps(data, indent=1))


def _recorded(root: Path, commit: str) -> bool:
    """True where `commit` was once downloaded and verified whole, and its files still have their sizes."""
    try:
        data = json.loads(_record_file(root, commit).read_text(encoding="utf-8"))
        return all(_there(root / "snapshots" / commit, RemoteFile(**f)) for f in data["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _from_cache(root: Path, model: str, revision: str, cause: Unreachable) -> tuple[Path, str | None]:
    """The copy that is there, whoever downloaded it. OSError says what is missing."""
    ref = root / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    path = root / "snapshots" / commit
    if not path.is_dir():
        raise OSError(f"{cause}, and {model} at {revision} is not in the cache ({root}); connect, or give a folder")
    if not _recorded(root, commit):
        try:
            folder.check(path)
        except OSError as e:
            raise OSError(f"{cause}, and the copy in the cache is not whole: {e}") from None
    return path, commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

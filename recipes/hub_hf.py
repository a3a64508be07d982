"""The Hugging Face Hub through huggingface_hub: what a model has, getting files, and errors in one line.

huggingface_hub resumes a dropped connection by Range; of a killed process it keeps the finished files alone (it
removes its partial ones). It checks sizes, not hashes, so the caller hashes. The token is its own affair: HF_TOKEN
or `hf auth login`; it never stands in a message here.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .remote import Remote, RemoteFile, Unreachable, clean

BRANCH = "main"


def root(model: str) -> Path:
    """The model's folder in the library's cache; commits lie under snapshots/."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"


def ask(model: str, revision: str | None) -> Remote:
    """The commit that `revision` (None: the main branch) means now, and its files. OSError as `_explained` says."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(library_name="mmq").model_info(model, revision=revision, files_metadata=True)
    except Exception as e:
        raise _explained(e, model, revision) from None
    if info.sha is None:
        raise OSError(f"{_host()} tells no commit for {model}; is HF_ENDPOINT a hub?")
    files = [RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in info.siblings or ()]
    return Remote(info.sha, tuple(files))


def get(model: str, commit: str, files: Sequence[RemoteFile], *, count: Callable[[int], None]) -> None:
    """Download `files` of `commit` into the cache; `count` hears of every piece of bytes, from several threads."""
    from huggingface_hub import snapshot_download

    try:
        patterns = [glob.escape(f.path) for f in files]
        with _quiet():
            snapshot_download(model, revision=commit, allow_patterns=patterns, max_workers=4, tqdm_class=_bars(count))
    except Exception as e:
        raise _explained(e, model, commit) from None


def _bars(count: Callable[[int], None]) -> Any:
    """A class of bars for the library that tells `count` the bytes, and draws nothing."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        """Of the bars that the library makes, the bytes on disk are what counts."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            desc = str(kwargs.get("desc"))
            self.counts = kwargs.get("unit") == "B" and desc != "Downloading bytes"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[arg-type]

        def update(self, n: float | None = 1) -> None:
            if self.counts and n:
                count(int(n))

    return Counter


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines inside the block: the library's warnings on retries carry signed addresses."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def about(model: str, revision: str | None) -> tuple[str, bool]:
    """(README.md at `revision`, "" where there is none; whether the hub gates the model). Errors as `ask`'s."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="mmq")
    try:
        with _quiet():
            info = api.model_info(model, revision=revision)
            if not any(s.rfilename == "README.md" for s in info.siblings or ()):
                return "", bool(info.gated)
            path = api.hf_hub_download(model, "README.md", revision=info.sha, tqdm_class=_bars(lambda size: None))
    except Exception as e:
        raise _explained(e, model, revision) from None
    return Path(path).read_text(encoding="utf-8", errors="replace"), bool(info.gated)


def _host() -> str:
    from huggingface_hub.constants import ENDPOINT

    return urlsplit(ENDPOINT).netloc or ENDPOINT


def _explained(error: Exception, model: str, revision: str | None) -> Exception:
    """One clear line for what huggingface_hub raised; Unreachable where the network or the hub is down."""
    from huggingface_hub import errors

    host = _host()
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return OSError(f"{model} is gated: accept its terms at https://{host}/{model}, then {login}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return OSError(f"no model {model} on {host}, or a private one: check the id; if it is private, {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return OSError(f"{model} on {host} has no revision {revision}; give a branch, a tag or a whole commit id")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{model} is no id of a model on {host}: {_line(error)}")
    if "Consistency check failed" in str(error):
        return OSError(f"{model}: a file came with a wrong size and is not kept; run again to get it anew")
    if status == 401:
        return OSError(f"{host} refuses the token; {login} anew")
    if status == 403:
        return OSError(f"{host} forbids {model} with this token: give the token read access to it, or {login}")
    if status is not None and status < 500:
        return OSError(f"{host} answered {status} for {model}; try again later")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unreachable(f"{host} is not asked (HF_HUB_OFFLINE is set)")
    # The HTTP library under huggingface_hub has changed its name before, so its errors are known by module.
    network = (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    if status is not None or isinstance(error, network) or type(error).__module__.startswith("http"):
        return Unreachable(f"cannot reach {host} ({f'it answered {status}' if status else type(error).__name__})")
    return OSError(f"{model} could not be downloaded from {host}: {_line(error)}")


def _line(error: Exception) -> str:
    from huggingface_hub import get_token

    return clean(str(error), get_token()) or type(error).__name__

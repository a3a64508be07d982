"""ModelScope through modelscope_hub, the download library that the modelscope package is built on.

Importing `modelscope` itself loads torch; modelscope_hub does not. It resumes partial files by Range across runs and
checks every sha256 itself. It is talkative, so its log and its bars are held while it works. The token is its own
affair: MODELSCOPE_API_TOKEN or `modelscope login`; it never stands in a message here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .remote import Remote, RemoteFile, Unreachable, clean

BRANCH = "master"
COMMIT = re.compile(r"[0-9a-f]{40}")


def root(model: str) -> Path:
    """The model's folder in the library's cache; commits lie under snapshots/."""
    with quiet():
        from modelscope_hub import HubConfig

        return HubConfig().cache_dir / "models" / model.replace("/", "--")


def ask(model: str, revision: str | None) -> Remote:
    """The commit that `revision` (None: the master branch) means now, and its files. OSError as `_explained` says.

    ModelScope names no commit for a branch, but each file's last one. The newest of these that lists the very
    files of the branch is the branch's commit, or one that cannot be told from it.
    """
    with quiet():
        from modelscope_hub import HubApi

        try:
            api = HubApi()
            entries = _entries(api, model, revision or BRANCH)
            if not entries:  # an unknown revision is answered with success and no files
                known = sorted(str(r.get("Revision")) for r in api.list_repo_revisions(model, "model"))
                raise OSError(
                    f"{model} on {_host()} has no revision {revision or BRANCH}, or no files in it; "
                    f"branches and tags: {', '.join(known) or 'none'}"
                )
            if revision is not None and COMMIT.fullmatch(revision):
                return Remote(revision, _files(entries))
            dates = {str(e.get("Revision")): int(e.get("CommittedDate") or 0) for e in entries}
            newest = sorted((c for c in dates if COMMIT.fullmatch(c)), key=lambda c: dates[c], reverse=True)
            for commit in newest[:5]:
                if _files(_entries(api, model, commit)) == _files(entries):
                    return Remote(commit, _files(entries))
        except Exception as e:
            raise _explained(e, model) from None
    raise OSError(f"{_host()} tells no commit for {model} at {revision or BRANCH}; give a commit id with --revision")


def get(model: str, commit: str, files: Sequence[RemoteFile], *, count: Callable[[int], None]) -> None:
    """Download `files` of `commit` into the cache; `count` hears of every piece of bytes, from several threads."""
    with quiet():
        from modelscope_hub import HubApi, ProgressCallback

        class Counter(ProgressCallback):
            def update(self, size: int) -> None:
                count(size)

        try:
            HubApi().download_repo(
                model,
                "model",
                revision=commit,
                local_dir=root(model) / "snapshots" / commit,
                allow_patterns=[f.path for f in files],
                max_workers=4,
                progress_callbacks=[Counter],
            )
        except Exception as e:
            raise _explained(e, model) from None


def about(model: str, revision: str | None) -> tuple[str, bool]:
    """(README.md at `revision`, "" where there is none; whether the hub gates the model). Errors as `ask`'s."""
    with quiet():
        from modelscope_hub import HubApi

        api = HubApi()
        try:
            entries = _entries(api, model, revision or BRANCH)
            gated = bool(api.legacy.get_repo_info(model, "model").get("ProtectedMode") == 1)
            if not any(e.get("Path") == "README.md" for e in entries):
                return "", gated
            with tempfile.TemporaryDirectory() as folder:
                path = api.download_file(model, "model", "README.md", revision=revision or BRANCH, local_dir=folder)
                return Path(path).read_text(encoding="utf-8", errors="replace"), gated
        except Exception as e:
            raise _explained(e, model) from None


def _entries(api: Any, model: str, revision: str) -> list[dict[str, Any]]:
    entries = api.legacy.list_repo_files(model, "model", revision=revision)
    return [e for e in entries if e.get("Type") != "tree"]


def _files(entries: list[dict[str, Any]]) -> tuple[RemoteFile, ...]:
    files = (RemoteFile(e["Path"], int(e.get("Size") or 0), e.get("Sha256") or None) for e in entries)
    return tuple(sorted(files, key=lambda f: f.path))


def _host() -> str:
    from modelscope_hub import HubConfig

    return urlsplit(HubConfig().endpoint or "").netloc


def _explained(error: Exception, model: str) -> Exception:
    """One clear line for what modelscope_hub raised; Unreachable where the network or the hub is down."""
    from modelscope_hub import HubConfig, errors

    host = _host()
    login = "log in with `modelscope login` or set MODELSCOPE_API_TOKEN"
    if isinstance(error, errors.FileDownloadError) and error.failed_files:
        path, inner = next(iter(error.failed_files.items()))
        if isinstance(inner, errors.FileIntegrityError):
            return OSError(f"{model}: {path} came with a wrong hash or size and is deleted; run again to get it anew")
        return _explained(inner, model) if isinstance(inner, Exception) else error
    if isinstance(error, errors.NotExistError):
        return OSError(f"no model {model} on {host}, or a private one: check the id; if it is private, {login}")
    if isinstance(error, errors.AuthenticationError):
        return OSError(f"{host} wants a valid token for {model}: {login}")
    if isinstance(error, errors.PermissionDeniedError):
        return OSError(f"{host} forbids {model}: ask for access at https://{host}/models/{model}, then {login}")
    if isinstance(error, errors.NetworkError | errors.ServerError):
        return Unreachable(f"cannot reach {host} ({type(error).__name__})")
    if isinstance(error, errors.HubError):
        return OSError(f"{model} could not be had from {host}: {clean(str(error), HubConfig().token)}")
    if type(error) is OSError:  # our own
        return error
    return OSError(
        f"{model} could not be had from {host}: {clean(f'{type(error).__name__}: {error}', HubConfig().token)}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines, no deprecation warnings and no bars of modelscope_hub inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelscope_hub._download as inner

        log = logging.getLogger("modelscope_hub")
        level, bars = log.level, inner.__dict__["tqdm"]
        log.setLevel(logging.CRITICAL)
        # The bars have no switch of their own, and tqdm reads its environment only when it is first imported.
        inner.__dict__["tqdm"] = functools.partial(bars, disable=True)
        try:
            yield
        finally:
            log.setLevel(level)
            inner.__dict__["tqdm"] = bars

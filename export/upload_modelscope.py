"""Publishing to ModelScope, through modelscope_hub.

Its `upload_folder` commits in batches, and file by file once a batch fails: a reader would see half a model. So the
steps that it is made of are taken one by one: ask which blobs are missing, put those, and name all files in one commit.
The commit endpoint takes no parent, so what someone else commits in the same second is found by reading back. The
token is the library's own affair: MODELSCOPE_API_TOKEN or `modelscope login`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ..recipes.hub_modelscope import BRANCH, COMMIT, quiet
from ..recipes.progress import Step, Tell, silent
from ..recipes.remote import clean
from .refusals import trouble
from .remote import Item, Kept, There

ATTEMPTS = 4  # of one blob, 1, 2 and 4 seconds apart
LOGIN = "log in with `modelscope login` or set MODELSCOPE_API_TOKEN"
PUBLIC = 5  # modelscope_hub.constants.Visibility


def check_login() -> None:
    """OSError where there is no token at all."""
    with quiet():
        from modelscope_hub import HubConfig

        if not HubConfig().token:
            raise OSError(f"publishing to {_host()} needs a token: {LOGIN}")


def url(repo: str) -> str:
    """The repository's page."""
    from modelscope_hub import HubConfig

    return f"{HubConfig().endpoint}/models/{repo}"


def look(repo: str, revision: str | None = None) -> There | None:
    """The repository at `revision` (None: master); None where it, or the revision, is not there for this token."""
    with _errors(repo, "looked at") as api:
        from modelscope_hub import errors

        try:
            info = api.legacy.get_repo_info(repo, "model")
            if revision is not None:
                known = {str(r.get("Revision")) for r in api.legacy.list_revisions(repo, "model")}
                if revision not in known:
                    return None
        except errors.NotExistError:
            return None
        try:
            entries = api.legacy.list_repo_files(repo, "model", revision=revision or BRANCH)
        except errors.NotExistError:
            entries = []  # a repository without a commit has no branch yet
        entries = [e for e in entries if e.get("Type") != "tree"]
        files = {e["Path"]: Kept(int(e.get("Size") or 0), e.get("Sha256") or None) for e in entries}
        return There(_commit(entries), info.get("Visibility") == PUBLIC, files)


def _commit(entries: Sequence[dict[str, Any]]) -> str | None:
    """ModelScope names no commit for a branch, but each file's last one: the newest is the branch's, as long as the
    last commit did more than delete."""
    dated = [(int(e.get("CommittedDate") or 0), str(e.get("Revision"))) for e in entries]
    return max((d for d in dated if COMMIT.fullmatch(d[1])), default=(0, None))[1]


def create(repo: str, *, public: bool, license: str | None) -> None:
    """Make an empty repository, private unless `public`; one that is there is left as it is. ModelScope's own default
    for the licence is Apache-2.0, so it is always told."""
    with _errors(repo, "made") as api:
        from modelscope_hub import errors

        try:
            api.create_repo(repo, "model", visibility="public" if public else "private", license=license or "other")
        except errors.AlreadyExistsError:
            return


def send(
    repo: str, parent: str | None, add: Sequence[Item], drop: Sequence[str], *, message: str, tell: Tell = silent
) -> list[str]:
    """One commit that adds and drops files; nothing to say of it. `parent` is not asked for by ModelScope. Interrupted
    where it may have happened all the same, OSError where it has not."""
    from modelscope_hub import constants

    if len(add) + len(drop) > constants.COMMIT_MAX_ACTIONS_PER_REQUEST:
        raise ValueError(f"{len(add) + len(drop)} files: {_host()} takes {constants.COMMIT_MAX_ACTIONS_PER_REQUEST}")
    blobs, total, done = [one for one in add if _is_blob(one)], sum(one.size for one in add), 0
    with _errors(repo, "written to") as api:
        step = constants.UPLOAD_BLOB_VALIDATION_BATCH_MAX_OBJECTS
        for at in range(0, len(blobs), step):
            part = blobs[at : at + step]
            asked = [{"oid": one.sha256, "size": one.size} for one in {o.sha256: o for o in part}.values()]
            places = api.legacy.validate_blobs(repo, "model", asked)
            for one in part:
                tell(Step("upload", done, total, repo))
                if place := places.pop(one.sha256, None):  # what the hub has already it gives no place for
                    _put(api, place, one)
                done += one.size
        tell(Step("upload", total, total, repo))
        gone = [{"action": "delete", "path": name, "type": "normal", "size": 0, **_content("")} for name in drop]
        actions = [*(_action(one) for one in add), *gone]
        api.legacy.create_commit(repo, "model", actions, message, revision=BRANCH)
    return []


def _put(api: Any, place: str, one: Item) -> None:
    """One blob to the address that the hub gave for it; a connection that breaks is tried again from the start."""
    from modelscope_hub import errors

    for attempt in range(ATTEMPTS):
        try:
            with one.file.open("rb") as file:
                api.legacy.upload_blob(place, file, one.size)
            return
        except errors.HubError as e:
            if not e.retryable or attempt == ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)


def _is_blob(one: Item) -> bool:
    """Whether ModelScope stores a file apart: as its library decides, by size and suffix, and never what it reads."""
    from modelscope_hub import constants

    path = PurePosixPath(one.path)
    if path.name.upper() in constants.UPLOAD_INLINE_METADATA_PATHS:
        return False
    return one.size > constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES or path.suffix.lower() in constants.MODEL_LFS_SUFFIX


def _action(one: Item) -> dict[str, Any]:
    if _is_blob(one):
        kind = {"type": "lfs", "size": one.size, "sha256": one.sha256, "content": "", "encoding": ""}
    else:
        data = base64.b64encode(one.file.read_bytes()).decode()
        kind = {"type": "normal", "size": one.size, **_content(data)}
    return {"action": "create", "path": one.path, **kind}


def _content(data: str) -> dict[str, str]:
    return {"sha256": "", "content": data, "encoding": "base64" if data else ""}


def tag(repo: str, name: str, commit: str | None) -> None:
    """Name the branch as it is now; the caller reads the tag back."""
    with _errors(repo, "tagged") as api:
        api.create_repo_tag(repo, "model", name, revision=BRANCH)


def _host() -> str:
    from modelscope_hub import HubConfig

    return urlsplit(HubConfig().endpoint or "").netloc


@contextmanager
def _errors(repo: str, what: str) -> Iterator[Any]:
    """A HubApi, silent inside the block; its errors in one line of ours."""
    with quiet():
        from modelscope_hub import HubApi, errors

        try:
            yield HubApi()
        except errors.HubError as e:
            raise _explained(e, repo, what) from None
        except OSError as e:  # requests' own, of an answer that broke off
            if type(e).__module__.startswith("requests"):
                raise trouble(_host(), repo, what, None, "", LOGIN) from None
            raise


def _explained(error: Any, repo: str, what: str) -> OSError:
    from modelscope_hub import HubConfig, errors

    host, told = _host(), clean(str(getattr(error, "message", "")), HubConfig().token)
    told = f" ({told})" if told else ""
    known = {
        errors.AuthenticationError: 401,
        errors.PermissionDeniedError: 403,
        errors.NotExistError: 404,
        errors.AlreadyExistsError: 409,
        errors.RateLimitError: 429,
        errors.QuotaExceededError: 507,
        errors.ServerError: 500,  # urllib3's own, after the last of its tries, has no status
    }
    status = getattr(error, "status_code", None)
    if status is None or isinstance(error, errors.QuotaExceededError | errors.AlreadyExistsError):
        status = next((code for kind, code in known.items() if isinstance(error, kind)), None)
    if status == 500 and "too many 429" in str(error):
        status = 429
    if status is None and not isinstance(error, errors.NetworkError):
        return OSError(f"{repo} could not be {what} on {host}{told}")
    return trouble(host, repo, what, status, told, LOGIN)

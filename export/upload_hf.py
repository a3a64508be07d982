"""Publishing to the Hugging Face Hub, through huggingface_hub.

`upload_large_folder` makes many commits, and `upload_folder` none that names its parent; so the files that are stored
apart (by Xet, or LFS) go up a few at a time, and one `create_commit` on the commit that was looked at names them all.
Xet and LFS both ask the hub first what it has, which is all that resuming needs. The token is the library's own
affair: HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ..recipes.progress import Step, Tell, silent
from ..recipes.remote import clean
from .refusals import trouble
from .remote import Interrupted, Item, Kept, There

BATCH = 8  # files that are asked for and sent together
THREADS = 4
LOGIN = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


def check_login() -> None:
    """OSError where there is no token at all."""
    from huggingface_hub import get_token

    if not get_token():
        raise OSError(f"publishing to {_host()} needs a token: {LOGIN}")


def url(repo: str) -> str:
    """The repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def look(repo: str, revision: str | None = None) -> There | None:
    """The repository at `revision` (None: main); None where it, or the revision, is not there for this token."""
    from huggingface_hub import HfApi, errors

    with _errors(repo, "looked at"):
        try:
            info = HfApi(library_name="mmq").model_info(repo, revision=revision, files_metadata=True)
        except errors.GatedRepoError:
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None
    files = {
        s.rfilename: Kept(s.size or 0, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
        for s in info.siblings or ()
    }
    return There(info.sha, info.private is False, files)


def create(repo: str, *, public: bool, license: str | None) -> None:
    """Make an empty repository, private unless `public`; one that is there is left as it is. Its licence is
    the card's."""
    from huggingface_hub import HfApi

    with _errors(repo, "made"):
        try:
            HfApi(library_name="mmq").create_repo(repo, private=not public, repo_type="model", exist_ok=True)
        except KeyError:
            return  # it is there already, or in the making, and its address was not told: the caller looks


def send(
    repo: str, parent: str | None, add: Sequence[Item], drop: Sequence[str], *, message: str, tell: Tell = silent
) -> list[str]:
    """One commit on `parent` that adds and drops files; what the hub had to say of the card. Interrupted where it may
    have happened all the same, OSError where it has not."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, total, done = HfApi(library_name="mmq"), sum(one.size for one in add), 0
    operations = []
    for one in add:
        operation = CommitOperationAdd(one.path, one.file)
        operation.upload_info.sha256 = bytes.fromhex(one.sha256)  # known: not to be read a second time
        operations.append(operation)
    with _errors(repo, "written to") as said:
        for at in range(0, len(operations), BATCH):
            tell(Step("upload", done, total, repo))
            batch = operations[at : at + BATCH]
            api.preupload_lfs_files(repo, batch, repo_type="model", free_memory=False, num_threads=THREADS)
            done += sum(one.size for one in add[at : at + BATCH])
        tell(Step("upload", total, total, repo))
        gone = [CommitOperationDelete(name, is_folder=False) for name in drop]
        api.create_commit(repo, [*operations, *gone], commit_message=message, parent_commit=parent, repo_type="model")
    return said


def tag(repo: str, name: str, commit: str | None) -> None:
    """Name the commit (None: main)."""
    from huggingface_hub import HfApi

    with _errors(repo, "tagged"):
        HfApi(library_name="mmq").create_tag(repo, tag=name, revision=commit, repo_type="model")


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


@contextmanager
def _errors(repo: str, what: str) -> Iterator[list[str]]:
    """No bars and no log lines inside the block (they carry signed addresses), warnings gathered, errors in one line
    of ours."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log, said = logging.getLogger("huggingface_hub"), []
    level, hidden = log.level, are_progress_bars_disabled()
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            disable_progress_bars()
            yield said
            said += [clean(str(w.message), get_token()) for w in caught if issubclass(w.category, UserWarning)]
    except OSError as e:
        if type(e) in (OSError, Interrupted):
            raise
        raise _explained(e, repo, what) from None
    except Exception as e:
        raise _explained(e, repo, what) from None
    finally:
        log.setLevel(level)
        if not hidden:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                enable_progress_bars()


def _explained(error: Exception, repo: str, what: str) -> Exception:
    """One line for what huggingface_hub raised; Interrupted where the hub may have done it all the same."""
    from huggingface_hub import errors, get_token

    host, chain = _host(), _chain(error)
    response = next((r for e in chain if (r := getattr(e, "response", None)) is not None), None)
    status = getattr(response, "status_code", None)
    told = next((clean(str(m), get_token()) for e in chain if (m := getattr(e, "server_message", None))), "")
    told = f" ({told})" if told else ""
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return OSError(f"{host} is not asked (HF_HUB_OFFLINE is set); unset it to publish")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{repo} is no name for a repository on {host}: {clean(str(error), get_token())}")
    if isinstance(error, ValueError) and "metadata" in str(error):
        return ValueError(f"{host} refuses the card's metadata: {clean(str(error), get_token())}")
    if isinstance(error, ValueError):  # the LFS door answers with an error for one file
        return OSError(f"{host} does not take a file of {repo}: {clean(str(error), get_token())}")
    if status is None and not _network(chain):
        return OSError(
            f"{repo} could not be {what} on {host}: {clean(str(error), get_token()) or type(error).__name__}"
        )
    return trouble(host, repo, what, status, told, LOGIN)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _network(chain: Sequence[Any]) -> bool:
    """The HTTP library under huggingface_hub has changed its name before, so its errors are known by module."""
    return any(isinstance(e, ConnectionError | TimeoutError) or type(e).__module__.startswith("http") for e in chain)

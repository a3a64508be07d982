"""What upload speaks of: a place on a hub, the files that go there, and what lies there already. Knows no network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..recipes.remote import is_legal
from .artifact import MANIFEST, hash_file

KEPT = (".gitattributes", ".gitignore", "configuration.json")  # the hubs' own, which no publish takes away
# what a hub puts into a new repository, or a user by its forms
BORN_WITH = (*KEPT, "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True)
class Target:
    """One repository: `hub` is hf or modelscope, `repo` OWNER/NAME."""

    hub: str
    repo: str

    def __str__(self) -> str:
        return f"{self.hub}:{self.repo}"


@dataclass(frozen=True)
class Item:
    """One file to publish: its name there, where it lies here, its bytes and sha256 (hex)."""

    path: str
    file: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Kept:
    """A file as the hub has it; the hash is of its bytes (sha256), or Git's own of a blob (sha1), as the hub tells."""

    size: int
    sha256: str | None = None
    git: str | None = None


@dataclass(frozen=True)
class There:
    """A repository at one commit. `commit` is None where the hub names none."""

    commit: str | None
    public: bool
    files: Mapping[str, Kept] = field(default_factory=dict)


class Interrupted(OSError):
    """The hub was lost, or failed, while it was asked for something: it may have done it all the same."""


def parse_target(text: str) -> Target:
    """`hf:org/name` or `modelscope:org/name`. ValueError for anything else."""
    hub, _, repo = text.partition(":")
    if hub not in ("hf", "modelscope") or not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo, re.ASCII):
        raise ValueError(f"{text!r} is no place to publish to; write hf:OWNER/NAME or modelscope:OWNER/NAME")
    return Target(hub, repo)


def item(path: str, file: Path, sha256: str | None = None) -> Item:
    """A file to publish under the name `path`; hashed here where its hash is not known."""
    return Item(path, file, file.stat().st_size, sha256 or hash_file(file))


def same(one: Item, kept: Kept | None) -> bool:
    """Whether the hub has these very bytes. A hash that the hub does not tell is never taken for granted."""
    if kept is None or kept.size != one.size:
        return False
    if kept.sha256 is not None:
        return kept.sha256 == one.sha256
    return kept.git is not None and kept.git == git_hash(one.file)


def git_hash(file: Path) -> str:
    """Git's name of a file's bytes: sha1 (hex) over a header and the bytes."""
    sha = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as f:
        while piece := f.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def differences(items: Iterable[Item], there: There) -> tuple[list[Item], list[str]]:
    """(what the hub lacks or has otherwise, names that it has and we have not). A licence that somebody has put beside
    what mmq published stays; the one that a new repository was made with may be any."""
    ours = {one.path: one for one in items}
    lacking = [one for one in ours.values() if not same(one, there.files.get(one.path))]
    kept = (*KEPT, *(n for n in there.files if is_legal(n) and MANIFEST in there.files))
    return lacking, sorted(n for n in there.files if n not in ours and n not in kept)


def first_of(names: Sequence[str]) -> str:
    """`a` or `a and 11 more`."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_ours(target: Target, there: There) -> None:
    """ValueError where the repository holds a model that mmq did not publish: its files would be taken away."""
    if MANIFEST not in there.files and (strange := sorted(there.files.keys() - set(BORN_WITH))):
        raise ValueError(
            f"{target} holds files that mmq did not publish ({first_of(strange)}); "
            "publish to another name, or to an empty repository"
        )


def artifact_differs(items: Sequence[Item], there: There, *, beside: Iterable[str]) -> list[str]:
    """Names in which a repository is another artifact than ours; those `beside` it (the card, reports) do not count."""
    left, right = differences(items, there)
    apart = set(beside)
    return sorted({one.path for one in left if one.path not in apart} | {n for n in right if n not in apart})

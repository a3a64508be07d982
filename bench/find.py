"""Which checkpoints a comparison means: names among the artifacts of a folder, their common base, or paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..export.artifact import MANIFEST, Artifact, base_of, open_artifact
from ..recipes.progress import Tell, silent
from ..serve.shape import read_config

BASE_NAMES = ("fp16", "bf16", "base")


@dataclass(frozen=True)
class Subject:
    """One checkpoint to measure; `artifact` is None for a 16-bit checkpoint, `shown` is what a reader should type."""

    label: str
    path: Path
    artifact: Artifact | None
    shown: str


def artifacts_in(folder: Path) -> list[Artifact]:
    """The whole artifacts directly in `folder`, by name. OSError for a damaged one: it is not skipped in silence."""
    return [open_artifact(p.parent) for p in sorted(folder.glob(f"*/{MANIFEST}"))]


def find(names: Sequence[str], *, folder: Path, tell: Tell = silent) -> list[Subject]:
    """The subjects that `names` mean, in their order, no two with one label. A name is `fp16` (the common base of the
    artifacts compared, or of all in `folder`), a path, or an artifact's method, format, name or folder; what
    `mmq convert` made is meant only where nothing else fits.

    ValueError when a name means nothing or several things, when two names mean one, or when the artifacts have no
    common base.
    """
    if not names:
        raise ValueError("nothing to measure; name artifacts, as in --compare fp16 awq")
    if len(set(names)) < len(names):
        raise ValueError(f"{' '.join(names)}: each name once")
    near = artifacts_in(folder) if any(not Path(n).is_dir() for n in names) else []
    found = {n: _one(n, near, folder) for n in names if n.lower() not in BASE_NAMES}
    for name in names:
        if name.lower() in BASE_NAMES:
            among = [s.artifact for s in found.values() if s.artifact] or near
            child = _of_one_base(among, folder)
            found[name] = Subject(name, base_of(child, tell=tell).path, None, str(child.manifest["base"]["model"]))
    return _apart([found[n] for n in names])


def _apart(found: Sequence[Subject]) -> list[Subject]:
    """The subjects; folders of one name are told apart by the folder above: monday/out-awq is monday-out-awq."""
    many = Counter(s.label for s in found)
    longer = [replace(s, label="-".join(s.path.resolve().parts[-2:])) if many[s.label] > 1 else s for s in found]
    if len({s.label for s in longer}) < len(longer):
        twice = ", ".join(s.shown for s in found if many[s.label] > 1)
        raise ValueError(f"{twice} cannot be told apart: name each checkpoint once, or rename a folder")
    return longer


def _one(name: str, near: Sequence[Artifact], folder: Path) -> Subject:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return Subject(path.resolve().name, path, open_artifact(path), name)
        read_config(path)
        return Subject(path.resolve().name, path, None, name)
    for key in ("method", "format", "name"):
        fitting = [a for a in near if a.manifest.get(key) == name]
        fitting = [a for a in fitting if not a.manifest.get("converted_from")] or fitting  # the same weights once more
        if len(fitting) > 1:
            places = ", ".join(str(a.path) for a in fitting)
            raise ValueError(f"{name!r} could be any of {places}; give the path of one")
        if fitting:
            return Subject(name, fitting[0].path, fitting[0], str(fitting[0].path))
    known = sorted({str(a.manifest.get("method")) for a in near} | {a.path.name for a in near})
    there = f"here are {', '.join(known)} and fp16" if known else "there is none; `mmq quantize` makes one"
    raise ValueError(f"no artifact {name!r} in {folder.resolve()}: {there}")


def _of_one_base(artifacts: Sequence[Artifact], folder: Path) -> Artifact:
    """Any of the artifacts, which must all have one base."""
    bases = {(a.manifest["base"]["model"], a.manifest["base"].get("revision")): a for a in artifacts}
    if not bases:
        raise ValueError(f"fp16 is the base of the artifacts compared, and {folder.resolve()} has none; give its path")
    if len(bases) > 1:
        said = " and ".join(f"{a.path} of {model}" for (model, _), a in bases.items())
        raise ValueError(f"fp16 could be several bases: {said}; give the path of one")
    return next(iter(bases.values()))

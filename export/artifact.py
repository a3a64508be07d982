"""Artifact: a folder and its manifest. The manifest, mmq.json, is written last: it exists if and only if the artifact
is whole. Also the folder of a run still under way, which another run may take up.

Knows no algorithm and no engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.hub import Base, fetch
from ..recipes.plain import check_entries, read_json
from ..recipes.progress import Tell, silent
from .alone import LOCK
from .manifest import check_manifest

MANIFEST = "mmq.json"
SCRATCH = ".mmq-"  # how files that only an unfinished run needs are called
UNFINISHED = f"{SCRATCH}unfinished.json"
SCHEMA = 1


@dataclass(frozen=True)
class Artifact:
    """A whole artifact. `manifest` is mmq.json; see `make.py` for its keys."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def format(self) -> str:
        return self.manifest["format"]

    @property
    def digest(self) -> str:
        """sha256 over the manifest's file hashes: two artifacts with one digest hold the same bytes."""
        return hash_text(json.dumps(self.manifest["files"], sort_keys=True))


def hash_text(text: str) -> str:
    """Hex sha256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def open_artifact(path: Path, *, verify: bool = False) -> Artifact:
    """Open the artifact in folder `path`. Sizes are always compared with the manifest, hashes when `verify`.

    OSError names what is wrong: no such folder, no manifest (or an unfinished run), a file missing,
    cut short or changed.
    """
    if not path.is_dir():
        raise OSError(f"{path}: no such folder")
    check_entries(path)
    file = path / MANIFEST
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise OSError(f"{path}: an unfinished run; `mmq quantize` with the same options finishes it")
        raise OSError(f"{path}: not an mmq artifact ({MANIFEST} is missing)")
    try:
        manifest = read_json(file, unique=True)
        files = manifest["files"]
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError):
        raise OSError(f"{file}: damaged; quantize again") from None
    if schema != SCHEMA:
        raise OSError(f"{file}: schema {schema}, this mmq reads {SCHEMA}; use the version that wrote it")
    check_manifest(manifest, file)
    again = f"copy the folder again, or make it anew: {MANIFEST} has the recipe"
    for name, entry in files.items():
        item = path / name
        if not item.is_file():
            raise OSError(f"{item}: missing from the artifact; {again}")
        size = item.stat().st_size
        if size != entry["size"]:
            raise OSError(f"{item}: {size} bytes, the manifest says {entry['size']}; {again}")
        if verify and hash_file(item) != entry["sha256"]:
            raise OSError(f"{item}: changed since it was made (its hash differs from the manifest's); {again}")
    return Artifact(path, manifest)


def base_of(artifact: Artifact, *, tell: Tell = silent) -> Base:
    """The FP16 checkpoint that the artifact was made from, fetched at its recorded revision. OSError where the manifest
    names none, or a folder that is gone; else errors as `fetch`'s."""
    base = artifact.manifest["base"]
    if not base["model"]:  # of a folder that others packed
        raise OSError(f"{artifact.path}: its manifest names no base; give the 16-bit checkpoint with --base")
    if base["hub"] == "local" and not Path(base["model"]).is_dir():
        raise OSError(
            f"{artifact.path} was made from {base['model']}, which is not there; name where it is now (check: --base "
            "FOLDER, bench: the folder in the place of fp16)"
        )
    if base["hub"] in ("local", "embedded"):
        return fetch(base["model"], tell=tell)
    return fetch(base["model"], hub=base["hub"], revision=base["revision"], tell=tell)


def check_elsewhere(out: Path, source: Path) -> None:
    """ValueError where `out`, whose old content may be taken away, is or holds the folder that is read."""
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds what is to be read, {source}; choose another folder with -o")


def prepare(out: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False) -> bool:
    """Make `out` ready to be written into; True when it holds an unfinished run with this `fingerprint` to take up.

    ValueError when the folder holds anything else and `overwrite` is not given; of an unfinished run it says what has
    changed since. A folder that is no artifact, no unfinished run and not empty is never emptied, `overwrite` or not.
    """
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    whole, begun = MANIFEST in names, UNFINISHED in names
    before = _marks(out) if begun and not whole else {}
    if before and not overwrite:
        if changed := _changes(before, fingerprint):
            raise ValueError(f"{out} holds an unfinished run with other options ({changed}); --overwrite starts anew")
        return True
    if whole and not overwrite:
        _drop_scratch(out)  # of a run killed between its manifest and its last breath
        raise ValueError(f"{out} is not empty: it holds an artifact; choose another folder with -o, or --overwrite")
    if names and not (whole or begun or all(n.startswith(SCRATCH) for n in names)):
        raise ValueError(f"{out} is not empty and mmq did not make it; choose another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    if names:
        _empty(out)
    write_json(out / UNFINISHED, fingerprint)
    return False


def unfinished(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether `out` holds an unfinished run with this `fingerprint`, which `prepare` would take up."""
    begun = (out / UNFINISHED).is_file() and not (out / MANIFEST).exists()
    return begun and (before := _marks(out)) != {} and not _changes(before, fingerprint)


def _marks(out: Path) -> dict[str, Any]:
    """The fingerprint of the unfinished run in `out`; empty when it was killed before there was one."""
    try:
        marks = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return marks if isinstance(marks, dict) else {}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`key: was X, now Y` for every key in which two fingerprints differ, keys of nested ones joined by dots."""
    old, new = _flat(before), _flat(now)
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return "; ".join(f"{k}: was {_short(old.get(k))}, now {_short(new.get(k))}" for k in changed)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _empty(out: Path) -> None:
    """Take everything out of `out`. Killed on the way, it leaves what is no run that could be taken up."""
    write_json(out / UNFINISHED, {})
    (out / MANIFEST).unlink(missing_ok=True)
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (UNFINISHED, LOCK):
            path.unlink()


def _drop_scratch(out: Path) -> None:
    for left in out.glob(f"{SCRATCH}*"):
        left.unlink()


def finish(out: Path, hashes: Mapping[str, str], manifest: Mapping[str, Any]) -> Artifact:
    """Write the manifest last, and take away what only the unfinished run needed. Files that are not among `hashes`
    (hex sha256 by name) are hashed here."""
    for left in out.glob("*.part"):  # half a file, of a run that was killed while it wrote
        left.unlink()
    files = {
        p.name: {"sha256": hashes.get(p.name) or hash_file(p), "size": p.stat().st_size}
        for p in sorted(out.iterdir())
        if p.is_file() and p.name != MANIFEST and not p.name.startswith(SCRATCH)
    }
    whole = {"schema": SCHEMA, **manifest, "files": files}
    write_json(out / MANIFEST, whole)
    _drop_scratch(out)
    return Artifact(out, whole)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write UTF-8 JSON in one step: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(to_json(data), encoding="utf-8")
    os.replace(temporary, path)


def to_json(data: Mapping[str, Any]) -> str:
    """As every JSON file here is written."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def check_disk(folder: Path, needed: int) -> None:
    """OSError when the disk that holds `folder` has fewer than `needed` bytes free."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"{folder}: the disk is too small: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free")

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
from ..recipes.progress import Tell, silent

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
    file = path / MANIFEST
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise OSError(f"{path}: an unfinished run; `mmq quantize` with the same options finishes it")
        raise OSError(f"{path}: not an mmq artifact ({MANIFEST} is missing)")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        files = manifest["files"]
        schema = manifest["schema"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise OSError(f"{file}: damaged; quantize again") from None
    if schema != SCHEMA:
        raise OSError(f"{file}: schema {schema}, this mmq reads {SCHEMA}; use the version that wrote it")
    for name, entry in files.items():
        item = path / name
        if not item.is_file():
            raise OSError(f"{item}: missing from the artifact")
        size = item.stat().st_size
        if size != entry["size"]:
            raise OSError(f"{item}: {size} bytes, the manifest says {entry['size']}")
        if verify and hash_file(item) != entry["sha256"]:
            raise OSError(f"{item}: changed since it was made (its hash differs from the manifest's)")
    return Artifact(path, manifest)


def base_of(artifact: Artifact, *, tell: Tell = silent) -> Base:
    """The FP16 checkpoint that the artifact was made from, fetched at its recorded revision. Errors as `fetch`'s."""
    base = artifact.manifest["base"]
    if base["hub"] in ("local", "embedded"):
        return fetch(base["model"], tell=tell)
    return fetch(base["model"], hub=base["hub"], revision=base["revision"], tell=tell)


def prepare(out: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False) -> bool:
    """Make `out` ready to be written into; True when it holds an unfinished run with this `fingerprint` to take up.

    ValueError when the folder holds anything else and `overwrite` is not given. A folder that is no artifact, no
    unfinished run and not empty is never emptied, `overwrite` or not.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with -o")
    entries = list(out.iterdir()) if out.is_dir() else []
    ours = (out / MANIFEST).is_file() or (out / UNFINISHED).is_file()
    resumed = False
    if (out / UNFINISHED).is_file() and not (out / MANIFEST).is_file():
        try:
            resumed = json.loads((out / UNFINISHED).read_text(encoding="utf-8")) == dict(fingerprint)
        except json.JSONDecodeError:
            resumed = False
        if not resumed and not overwrite:
            raise ValueError(f"{out} holds an unfinished run with other options; --overwrite starts anew")
    elif entries and not overwrite:
        raise ValueError(f"{out} is not empty; choose another folder with -o, or --overwrite")
    if entries and not resumed:
        if not ours:
            raise ValueError(f"{out} is not empty and mmq did not make it; choose another folder with -o")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not resumed:
        write_json(out / UNFINISHED, fingerprint)
    return resumed


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
    for left in out.glob(f"{SCRATCH}*"):
        left.unlink()
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

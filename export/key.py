"""The key of an artifact: one digest of all that it is made from. The same key, and there is nothing to make again.

Recipe, base at its commit, calibration's pixels and words, and the quantizer's own sources. Versions of torch and the
kind of device are not in it: they change roundings, and nobody publishes anew for that. Reads no tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..recipes.hub import Base, commit_of
from ..recipes.recipe import Recipe, model_on
from ..recipes.remote import goes_along
from ..recipes.samples import digest
from ..recipes.sets import calibration_samples
from .artifact import hash_file, hash_text

# what a recipe says about an artifact without changing a byte of it, or what the base and the samples' digest tell
WORDS = ("name", "model", "modelscope", "description", "version", "family", "limits", "card")
DIGESTED = ("revision", "calibration", "samples")
# of this room what decides which bytes are written; `tests/test_key.py` holds the list against make.py's imports
WRITES = (
    "beside",
    "config",
    "defaults",
    "layers",
    "make",
    "names",
    "order",
    "packing",
    "skips",
    "subject",
    "view",
    "words",
    "writer",
)


@cache
def quantizer() -> str:
    """Hex digits that name mmq's quantizer: they change whenever a source file changes that decides an artifact."""
    package = Path(__file__).parent.parent
    files = [*(package / "quantize").rglob("*.py"), *(package / "export" / f"{name}.py" for name in WRITES)]
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(f"{file.relative_to(package).as_posix()} {hash_file(file)}\n".encode())
    return sha.hexdigest()[:12]


def base_mark(base: Base, address: str) -> str:
    """What names the base's bytes: its commit on a hub, their hash for the embedded model, sizes and times of change
    for a folder, whose bytes may take minutes to hash."""
    if base.revision:
        return f"{base.hub}:{address}@{base.revision}"
    weights = (p for p in base.path.iterdir() if p.suffix == ".safetensors")
    files = sorted([*weights, *(p for p in base.path.iterdir() if p.is_file() and goes_along(p.name))])
    if base.hub == "embedded":
        return f"embedded:{hash_text(' '.join(hash_file(p) for p in files))}"
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{base.hub}:{hash_text(json.dumps(stats))}"  # no path: manifests are published


def key_of(recipe: Recipe, mark: str, calibration: str | None) -> dict[str, Any]:
    """{"digest": hex, and what it is the digest of}, for a base with `mark` and samples of the digest `calibration`."""
    made = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in (*WORDS, *DIGESTED)}
    parts: dict[str, Any] = {"recipe": hash_text(json.dumps(made, sort_keys=True)), "base": mark}
    parts |= {"calibration": calibration, "quantizer": quantizer()}
    return {"digest": hash_text(json.dumps(parts, sort_keys=True)), **parts}


def key_before(recipe: Recipe, *, hub: str = "hf") -> tuple[dict[str, Any], str | None]:
    """The key that `make` would give now, before anything is downloaded; and the base's commit where a hub has it.

    Errors as `commit_of`'s and `load`'s.
    """
    address = model_on(recipe, hub)
    base = commit_of(address, hub=hub, revision=recipe.revision)
    embedded = base.hub == "embedded"
    samples = calibration_samples(recipe, embedded=embedded)
    return key_of(recipe, base_mark(base, address), digest(samples) if samples else None), base.revision

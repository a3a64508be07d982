"""The ways to quantize that the study compares: mmq's methods and levels, and other packages with their own defaults.

Knows no measure and no setting: a variant is anything that turns a checkpoint and samples into an artifact's folder.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.make import make
from ..recipes.hub import Base
from ..recipes.recipe import Recipe
from ..recipes.samples import Sample
from .backends import BACKENDS, settle
from .environments import REQUIREMENTS, pinned
from .peer import PEERS, quantize_with


@dataclass(frozen=True)
class Variant:
    """One way to quantize. `make(base, samples, out)` writes an artifact into the folder `out`, which is not there yet;
    `calibration` names the set the samples are of; `mark` is all that tells this variant from another, as JSON takes
    it: a run on disk counts as done only under the same mark."""

    name: str
    make: Callable[[Path, Sequence[Sample], Path], object]
    mark: Mapping[str, Any]
    calibration: str = "drawn"


def by_mmq(name: str, *, calibration: str = "drawn", **fields: Any) -> Variant:
    """A variant that `mmq quantize` makes; `fields` are those of a Recipe."""

    def quantize(base: Path, calibrated: Sequence[Sample], out: Path) -> None:
        recipe = Recipe(name, str(base), calibration=calibration, samples=len(calibrated), **fields)
        make(recipe, Base(base, base.name, "local", None), out, samples=calibrated, calibration=calibration)

    return Variant(name, quantize, {"mmq": fields, "code": _code(), "calibration": calibration}, calibration)


def by_peer(name: str, backend: str, *, method: str, symmetric: bool, calibration: str = "drawn") -> Variant:
    """A variant that another package makes in its own environment, group 128, all else its own defaults.

    Its answer to one job is taken to depend on its script and its pinned requirements alone. ValueError for what the
    package cannot do.
    """
    asked = settle(backend, method=method, symmetric=symmetric, format=None)

    def quantize(base: Path, calibrated: Sequence[Sample], out: Path) -> None:
        recipe = Recipe(name, str(base), calibration=calibration, samples=len(calibrated))
        home = Base(base, base.name, "local", None)
        quantize_with(asked, recipe, home, out, samples=calibrated, calibration=calibration)

    requirements = REQUIREMENTS / f"{backend}.txt"
    mark = {
        "backend": backend,
        "version": pinned(requirements)[backend],
        "method": method,
        "symmetric": symmetric,
        "code": _digest([PEERS / "job.py", PEERS / BACKENDS[backend].script, requirements]),
        "calibration": calibration,
    }
    return Variant(name, quantize, mark, calibration)


@functools.cache
def _code() -> str:
    """The sources of the quantize room: runs of an older algorithm are not taken for the present one's."""
    return _digest(sorted((Path(__file__).parent.parent / "quantize").glob("*.py")))


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


LEVELS = [(m, q) for m in ("awq", "gptq") for q in ("fast", "default", "best")]


def _name(method: str, quality: str, *more: str) -> str:
    return "-".join((method, *([] if quality == "default" else [quality]), *more))


OURS = (
    by_mmq("rtn", method="rtn"),
    by_mmq("rtn-sym", method="rtn", symmetric=True),
    *(by_mmq(_name(m, q), method=m, quality=q) for m, q in LEVELS),
    *(by_mmq(f"rtn-g{g}", method="rtn", group_size=g) for g in (32, 64)),
    *(by_mmq(_name(m, q, f"g{g}"), method=m, quality=q, group_size=g) for m, q in LEVELS for g in (32, 64)),
    *(by_mmq(_name(m, q, "text-only"), method=m, quality=q, calibration="text") for m, q in LEVELS),
    *(by_mmq(_name(m, q, "int4-head"), method=m, quality=q, head="int4") for m, q in LEVELS),
    by_mmq("rtn-int4-head", method="rtn", head="int4"),
)
THEIRS = (
    by_peer("llmcompressor-awq", "llmcompressor", method="awq", symmetric=False),
    by_peer("llmcompressor-gptq", "llmcompressor", method="gptq", symmetric=True),
    by_peer("llmcompressor-gptq-asym", "llmcompressor", method="gptq", symmetric=False),
    by_peer("autoawq", "autoawq", method="awq", symmetric=False),
    by_peer("gptqmodel-awq", "gptqmodel", method="awq", symmetric=False),
    by_peer("gptqmodel-gptq", "gptqmodel", method="gptq", symmetric=True),
    by_peer("auto-gptq", "auto-gptq", method="gptq", symmetric=True),
    by_peer("auto-round", "auto-round", method="autoround", symmetric=True),
    by_peer("auto-round-asym", "auto-round", method="autoround", symmetric=False),
)
VARIANTS = {v.name: v for v in (*OURS, *THEIRS)}

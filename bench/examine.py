"""A check from its held-out samples to its figures. Writes nothing: the report is verdict.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..export.artifact import Artifact
from ..recipes.progress import Tell, silent
from ..recipes.sets import CHECKED, held_out_samples
from .check import Checked, check
from .served import check_served
from .verdict import limits_of


def examine(
    artifact: Artifact,
    base: Path,
    *,
    dataset: str | None = None,
    count: int = CHECKED,
    engine: str | None = None,
    engine_bin: str | None = None,
    device: str = "cpu",
    trust: bool = False,
    tell: Tell = silent,
) -> Checked:
    """Hold `artifact` against the checkpoint in `base`, as it lies on disk or as `engine` serves it. Errors as
    `check`'s and `check_served`'s."""
    more: dict[str, Any] = {"limits": limits_of(artifact), "trust": trust, "tell": tell}
    embedded = artifact.manifest["base"]["hub"] == "embedded"
    samples = held_out_samples(dataset, count, embedded=embedded)
    if engine:
        return check_served(artifact, base, samples=samples, engine=engine, engine_bin=engine_bin, **more)
    score = None
    if embedded and dataset is None:
        from ..recipes.pebble.tasks import exact as score
    return check(artifact, base, samples=samples, score=score, device=device, **more)

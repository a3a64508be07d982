"""A check from its held-out samples to its figures. Writes nothing: the report is verdict.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..export.artifact import Artifact
from ..export.view import view
from ..quantize.source import open_source
from ..recipes.folder import read_config
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
    `check_base`'s, `check`'s and `check_served`'s."""
    check_base(artifact, base)
    more: dict[str, Any] = {"limits": limits_of(artifact), "trust": trust, "tell": tell}
    embedded = artifact.manifest["base"]["hub"] == "embedded"
    samples = held_out_samples(dataset, count, embedded=embedded)
    if engine:
        return check_served(artifact, base, samples=samples, engine=engine, engine_bin=engine_bin, **more)
    score = None
    if embedded and dataset is None:
        from ..recipes.pebble.tasks import exact as score
    return check(artifact, base, samples=samples, score=score, device=device, **more)


def check_base(artifact: Artifact, base: Path) -> None:
    """ValueError where `artifact` cannot have been made from the checkpoint in `base`: by config.json and the headers
    alone, and before an hour's walk."""
    config, mine = read_config(base), read_config(artifact.path)
    if config.get("quantization_config"):
        raise ValueError(f"{base} is quantized itself; --base is the 16-bit checkpoint")
    why = ""
    if config.get("model_type") != mine.get("model_type"):
        why = f"its model type is {config.get('model_type')}, not {mine.get('model_type')}"
    else:
        shapes = {name: meta.shape for name, meta in open_source(base).metas.items()}
        other = ((n, m.shape) for n, m in view(artifact.path).metas.items() if shapes.get(n, m.shape) != m.shape)
        for name, shape in other:
            why = f"its {name} is {list(shapes[name])}, not {list(shape)}"
            break
    if why:
        raise ValueError(f"{artifact.path} was not made from {base}: {why}; give what it was made from with --base")

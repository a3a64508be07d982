"""What a run leaves for the one that takes it up: marks that must be the same, and its pace, which should be.

With other marks the finished layers are of other work. At another pace (tokens a forward pass, processes) the same
work is summed in another order, so what comes out is the same only within rounding. Knows no tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quantize.memory import Memory
from ..quantize.ranks import world
from ..quantize.skeleton import Skeleton
from ..quantize.walk import CALIBRATED
from ..recipes.hub import Base
from ..recipes.recipe import Recipe
from ..recipes.samples import Sample, digest
from .artifact import SCRATCH, hash_file, write_json
from .order import versions

PACES = f"{SCRATCH}paces.json"


@dataclass(frozen=True)
class Pace:
    """How much is done at a time: tokens a forward pass, whether activations wait on the host, and processes."""

    micro_batch: int
    park: bool
    ranks: int

    @property
    def memory(self) -> Memory:
        """What of it the walk is told."""
        return Memory(self.micro_batch, self.park)

    def __str__(self) -> str:
        return f"{self.memory}, {self.ranks} process{'es' if self.ranks > 1 else ''}"


def pace(memory: Memory) -> Pace:
    """The pace of this run."""
    return Pace(memory.micro_batch, memory.park, world())


def marks(recipe: Recipe, base: Base, skeleton: Skeleton, samples: Sequence[Sample]) -> dict[str, Any]:
    """All that makes a finished layer what it is, as JSON reads it back: recipe, checkpoint, calibration, kind of
    device, and the versions of mmq, torch, transformers and whatever else computes."""
    stats = {p.name: p.stat() for p in sorted(skeleton.source.folder.glob("*.safetensors"))}
    files = {name: f"{s.st_size} bytes, changed {s.st_mtime_ns / 1e9:.6f}" for name, s in stats.items()}
    found = {
        "recipe": dataclasses.asdict(recipe),
        "base": {"config": hash_file(base.path / "config.json"), "revision": base.revision, "tensors": files},
        "calibration": digest(samples) if recipe.method in CALIBRATED else None,
        "device": skeleton.device.type,
        "versions": {name: v for name, v in versions().items() if name != "python"},
    }
    return json.loads(json.dumps(found))


def paces(out: Path) -> tuple[Pace, ...]:
    """The paces of the unfinished run in `out`, in turn; none where there is no such run, or it told none."""
    try:
        return tuple(Pace(**entry) for entry in json.loads((out / PACES).read_text(encoding="utf-8"))["paces"])
    except (OSError, ValueError, TypeError, KeyError):
        return ()


def keep_pace(out: Path, now: Pace) -> None:
    """Note in `out` that from here on the work is done at the pace `now`."""
    before = paces(out)
    if not before or before[-1] != now:
        write_json(out / PACES, {"paces": [dataclasses.asdict(p) for p in (*before, now)]})

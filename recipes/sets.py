"""Which samples a run takes: a bundled set by its name, or the user's own file or folder.

Knows no model, only whether it is the embedded one, whose pictures are small. What draws is imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .samples import Sample, load, source_of

if TYPE_CHECKING:
    from .recipe import Recipe

CHECKED = 78  # held-out samples of a check
REAL_SIZE = 448  # pixels: the longer side of drawn pictures for models other than the embedded one


def check_calibration(name: str) -> None:
    """ValueError where `name` is neither a bundled set nor a file or folder that is there."""
    from .calibration import CALIBRATIONS

    if name not in CALIBRATIONS and not source_of(name)[0].exists():
        names = ", ".join(CALIBRATIONS)
        raise ValueError(f"no calibration {name!r}: name a JSONL file, a folder, or one of {names}")


def calibration_samples(recipe: Recipe, *, embedded: bool) -> list[Sample]:
    """The recipe's calibration set; none for a method that needs none. Errors as `load`'s."""
    from .calibration import CALIBRATIONS

    if recipe.method == "bnb":
        return []
    if recipe.calibration in CALIBRATIONS:
        return CALIBRATIONS[recipe.calibration](recipe.samples, size=None if embedded else REAL_SIZE)
    return load(recipe.calibration, count=recipe.samples)


def held_out_samples(dataset: str | None, count: int, *, embedded: bool) -> list[Sample]:
    """What a check compares on: `count` drawn from the test split, or of the user's own `dataset`."""
    if dataset:
        return load(dataset, count=count)
    from .pebble.tasks import samples

    return list(samples("test", count, size=None if embedded else REAL_SIZE))

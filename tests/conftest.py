"""What several test files share: artifacts of the embedded model, each made once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub that is not the test's own

SAMPLES = 48


@pytest.fixture(scope="session")
def pebble() -> Path:
    """The embedded model's folder."""
    from mmq.recipes.pebble import model_folder

    return model_folder()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifact(method, format=None, **recipe)`: pebble quantized so, made on first use and shared; never change it."""
    made: dict[tuple, Path] = {}

    def make_once(method: str, format: str | None = None, **changes: object) -> Path:
        key = (method, format, *sorted(changes.items()))
        if key not in made:
            from mmq.export.make import make
            from mmq.recipes.calibration import CALIBRATIONS
            from mmq.recipes.hub import fetch
            from mmq.recipes.recipe import recipe_for

            recipe = dataclasses.replace(recipe_for("pebble"), method=method, format=format, samples=SAMPLES, **changes)
            out = tmp_path_factory.mktemp("artifact") / f"out-{method}"
            samples = [] if method == "bnb" else CALIBRATIONS[recipe.calibration](SAMPLES)
            make(recipe, fetch("pebble"), out, samples=samples, calibration=recipe.calibration)
            made[key] = out
        return made[key]

    return make_once

"""What several test files share: artifacts of the embedded model, each made once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from mmq.serve.running import Server

torch.set_num_threads(1)  # the matrices are small, and threads that spin for each other stall on a busy machine
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


@pytest.fixture(scope="session")
def served(artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """AWQ pebble under the real vLLM, one server for all tests; they have media on this machine."""
    from mmq.serve.engines import plan
    from mmq.serve.machine import this_machine
    from mmq.serve.running import free_port, running
    from mmq.serve.safety import Safety

    log = tmp_path_factory.mktemp("served") / "vllm.log"
    safety = Safety(media_networks=("127.0.0.0/8",))
    launch = plan("vllm", artifact("awq"), machine=this_machine(), port=free_port(), safety=safety)
    with running(launch, timeout=300, log_path=log) as server:
        yield server

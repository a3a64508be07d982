"""Two processes under torchrun make the artifact that one makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmq.export.make as making
from mmq.export.artifact import open_artifact
from mmq.export.view import packed_linears
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Recipe

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmq"]


@pytest.mark.parametrize(("method", "quality"), [("awq", "fast"), ("awq", "default"), ("gptq", "default")])
def test_two_ranks_make_what_one_makes(
    method: str, quality: str, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """Within rounding: sums in another order tip a code here and there, at most one of a thousand. Where errors are fed
    back every later code of the row hears of it, so there the errors of each linear are compared: a few percent apart
    in so small a model."""
    one = open_artifact(artifact(method, quality=quality))
    out = tmp_path / "two"
    samples = one.manifest["recipe"]["samples"]
    asked = ["quantize", "pebble", "--method", method, "--quality", quality, "-o", str(out), "--device", "cpu"]
    command = [*COMMAND, *asked, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: mmq check") == 1  # one rank speaks
    two = open_artifact(out, verify=True)
    assert two.manifest["calibration"] == one.manifest["calibration"]
    assert two.manifest["quantized"] == one.manifest["quantized"]
    for mine, theirs in zip(one.manifest["layers"], two.manifest["layers"], strict=True):
        assert theirs["errors"] == pytest.approx(mine["errors"], rel=0.15)
    if quality == "fast":
        a, b = open_source(one.path), open_source(two.path)
        assert list(a.metas) == list(b.metas)
        for name in packed_linears(a.metas, one.format):
            x, y = (torch.stack([(s.get(f"{name}.qweight") >> 4 * i) & 15 for i in range(8)]) for s in (a, b))
            assert int((x != y).sum()) <= x.numel() / 1000


def test_a_process_without_a_sample_is_refused(monkeypatch: pytest.MonkeyPatch, pebble: Path, tmp_path: Path) -> None:
    """It would wait for the others for ever."""
    monkeypatch.setattr(making, "world", lambda: 3)
    recipe = Recipe(name="few", model=str(pebble), samples=2)
    with pytest.raises(ValueError, match="2 samples for 3 processes: each needs at least one"):
        making.make(recipe, fetch(str(pebble)), tmp_path / "out", samples=drawn(2), calibration="drawn")
    assert not (tmp_path / "out").exists()

"""The bench of the quantizer itself: every stage of a real run told, its tables, a peer beside it by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmq.bench.quantizer import main, ratios
from mmq.bench.quantizer_measure import PER_LAYER, QUANTIZING, Run


def test_a_run_is_told_by_its_stages(pebble: Path, tmp_path: Path) -> None:
    """The embedded model in place of a 7B's shape, whose five layers would fill the memory."""
    shutil.copytree(pebble, tmp_path / "7b-5")
    words = ["--layers", "5", "--samples", "1", "--method", "awq", "--quality", "fast"]
    file = tmp_path / "runs.json"
    done = CliRunner().invoke(main, [*words, "--folder", str(tmp_path), "--json", str(file)])
    assert done.exit_code == 0, done.output
    (run,) = json.loads(file.read_text(encoding="utf-8"))["runs"]
    layered = {name: seconds for name, seconds in run["stages"].items() if name in PER_LAYER}
    assert {"load", "scales", "pack"} <= layered.keys()
    assert all(len(layered[name]) % 5 == 0 for name in layered.keys() - {"forward, quantized"})
    assert len(layered["forward, quantized"]) == 4  # nothing is fed by the last
    assert sum(map(sum, run["stages"].values())) == pytest.approx(run["seconds"], rel=0.2)
    assert run["written"] > 1 << 20
    head, _, row = done.output.split("\n\n")[0].splitlines()[-3:]
    assert head.startswith("|  | time | a layer | after the first |")
    assert row.startswith(f"| mmq awq fast | {run['seconds']:.1f} s | {sum(map(sum, layered.values())) / 5:.3f} s |")


def test_a_peer_is_held_against_the_same_method() -> None:
    stages = {"load": [1.0, 1.0], "scales": [3.0, 0.5], "forward, quantized": [0.5]}
    ours = Run("mmq awq default", 2, stages=stages, gpu_peak=2 << 30)
    theirs = Run("llmcompressor awq", 2, stages={QUANTIZING: [30.0]}, gpu_peak=3 << 30)
    assert (ours.layer_seconds, ours.warm_layer_seconds, theirs.layer_seconds) == (3.0, 1.5, 15.0)
    other = Run("llmcompressor gptq", 2, stages={QUANTIZING: [1.0]})
    said = "mmq awq default is 5.0 times faster a layer than llmcompressor awq, 1.50x less GPU memory"
    assert ratios([ours, theirs, other]) == [said]

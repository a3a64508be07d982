"""The check of a served artifact, in the real engines: an honest one passes, other weights fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmq.bench.served import check_served, share
from mmq.export.artifact import open_artifact
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.recipe import Limits
from mmq.serve.programs import find_program

# starts an engine with everything it is told but the checkpoint: it serves another one under the same name
OTHERWISE = """#!{python}
import os, sys
os.execv({engine!r}, [{engine!r}, *({base!r} if word == {artifact!r} else word for word in sys.argv[1:])])
"""
COUNT = 13  # one of each task


def test_the_engine_computes_with_the_artifacts_weights(artifact: Callable[..., Path], pebble: Path) -> None:
    opened = open_artifact(artifact("awq"))
    result = check_served(opened, pebble, samples=list(samples("test", COUNT)), limits=Limits())
    assert result.failures == ()
    assert result.measures["served_to_int4"] < 0.5 * result.measures["served_to_fp16"]
    assert result.measures["served_image_effect"] > 0.8


@pytest.mark.parametrize("engine", ["pytorch", pytest.param("vllm", marks=pytest.mark.slow)])  # the judge is the same
def test_an_engine_that_loads_16_bit_fails(
    artifact: Callable[..., Path], pebble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    opened = open_artifact(artifact("awq"))
    program = tmp_path / f"python-for-{engine}"
    real = sys.executable if engine == "pytorch" else str(find_program("vllm"))
    places = {"base": str(pebble), "artifact": str(opened.path.resolve())}
    program.write_text(OTHERWISE.format(python=sys.executable, engine=real, **places))
    program.chmod(0o755)
    monkeypatch.setenv(f"MMQ_{engine.upper()}", str(program))
    asked = list(samples("test", COUNT))
    result = check_served(opened, pebble, samples=asked, limits=Limits(), engine=engine)
    assert any("did it load 16-bit weights?" in line for line in result.failures)


@pytest.mark.parametrize(("served", "expected"), [((1.0, -3.0), 1.0), ((0.5, -1.5), 0.5), ((0.0, 0.0), 0.0)])
def test_a_picture_that_makes_answers_less_likely_has_its_effect_too(served: tuple, expected: float) -> None:
    assert share(served, (1.0, -3.0)) == pytest.approx(expected)


def test_nothing_to_ask_is_told_before_any_start(artifact: Callable[..., Path], pebble: Path) -> None:
    questions = [s.question for s in samples("test", 2)]
    with pytest.raises(ValueError, match="no sample to check on"):
        check_served(open_artifact(artifact("awq")), pebble, samples=questions, limits=Limits())

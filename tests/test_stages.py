"""Stages: the arithmetic by hand, and one request taken apart on the real vLLM."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from mmq.bench.rounds import Asked, Round
from mmq.bench.speed import Load
from mmq.bench.stages import stages, told
from mmq.bench.stages import timed as timed_by_client
from mmq.serve.running import Server

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# walls in seconds: words 0.02 outside, pictures 0.05 more; tower 0.03, decoder 0.04 on words and pictures, 0.5 decode
WORDS = Asked(wall=0.05, prompt=20, out=1, prefill=0.03)
FRESH = Asked(wall=0.14, prompt=60, out=1, prefill=0.07)
SEEN = Asked(wall=0.10, prompt=60, out=1, prefill=0.04)
WHOLE = Asked(wall=0.65, prompt=60, out=11, prefill=0.08, decode=0.5)


def test_each_stage_is_what_its_definition_says() -> None:
    found = told([Round(WORDS, FRESH, SEEN, WHOLE)])
    values = {name: round(figure.value, 6) for name, figure in found.items()}
    assert values == {
        "image_preprocessing": 50.0,
        "vision_tower": 30.0,
        "prefill": 40.0,
        "decode": 500.0,
        "other": 30.0,
    }
    assert sum(values.values()) == pytest.approx(1000 * WHOLE.wall)
    assert {(f.unit, f.how) for f in found.values()} == {("ms", "measured")}


def test_the_median_of_the_rounds_counts_and_noise_below_zero_is_told_as_zero() -> None:
    late = Asked(wall=0.3, prompt=60, out=1, prefill=0.05)  # one slow moment, outside the engine
    found = told([Round(WORDS, FRESH, SEEN, WHOLE), Round(WORDS, late, SEEN, WHOLE), Round(WORDS, FRESH, SEEN, WHOLE)])
    assert found["image_preprocessing"].value == pytest.approx(50)
    assert found["image_preprocessing"].high == pytest.approx(230)
    swapped = told([Round(WORDS, SEEN, FRESH, WHOLE)])["vision_tower"]
    assert (swapped.value, swapped.low) == (0.0, pytest.approx(-30))


def test_a_server_that_keeps_no_pictures_gives_tower_and_prefill_as_one() -> None:
    found = told([Round(WORDS, FRESH, FRESH, WHOLE)], again=False)
    assert list(found) == ["image_preprocessing", "vision_tower + prefill", "decode", "other"]
    assert found["vision_tower + prefill"].value == pytest.approx(70)


def test_a_server_without_a_clock_is_timed_from_outside() -> None:
    words, fresh, whole = (Asked(wall=w, prompt=60, out=o) for w, o in ((0.06, 1), (0.14, 1), (0.65, 11)))
    found = timed_by_client([Round(words, fresh, fresh, whole)])
    values = {name: round(figure.value, 6) for name, figure in found.items()}
    assert values == {"picture": 80.0, "prefill": 60.0, "decode": 510.0}


@needs_vllm
def test_one_request_taken_apart_on_a_real_server(served: Server) -> None:
    load = Load(input_tokens=24, output_tokens=12, picture=(112, 112))
    small = stages(served.url, model=served.name, load=load, rounds=5)
    assert list(small.figures) == ["image_preprocessing", "vision_tower", "prefill", "decode", "other"]
    assert small.untold == ""
    assert small.settings["clock"] == "the engine's"
    assert small.settings["output_tokens"] == 12
    assert 24 + 16 < small.settings["prompt_tokens"] < 24 + 16 + 40  # words, the picture, the template
    assert small.figures["decode"].value > small.figures["prefill"].value > 0
    assert all(figure.value >= 0 for figure in small.figures.values())
    # four pictures of four times the pixels are the tower's work; pebble's processor makes no picture larger than that,
    # so one of many more pixels is work for the preprocessing alone
    many = stages(served.url, model=served.name, load=replace(load, picture=(224, 224), pictures=4), rounds=5)
    assert many.settings["prompt_tokens"] > small.settings["prompt_tokens"] + 200
    assert many.figures["vision_tower"].value > small.figures["vision_tower"].value
    huge = stages(served.url, model=served.name, load=replace(load, picture=(1792, 1792)), rounds=5)
    assert huge.settings["prompt_tokens"] < many.settings["prompt_tokens"]
    assert huge.figures["image_preprocessing"].value > small.figures["image_preprocessing"].value
    assert huge.figures["vision_tower"].value < many.figures["vision_tower"].value


@needs_vllm
def test_a_load_without_pictures_has_no_stages_of_pictures(served: Server) -> None:
    found = stages(served.url, model=served.name, load=Load(pictures=0, input_tokens=24, output_tokens=4), rounds=1)
    assert list(found.figures) == ["prefill", "decode", "other"]


def test_rounds_are_checked_before_anything_is_asked() -> None:
    with pytest.raises(ValueError, match="0 rounds of stages"):
        stages("http://127.0.0.1:1", model="x", load=Load(), rounds=0)

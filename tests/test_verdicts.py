"""Verdicts: where int4 helps and where it stops, from figures by hand; noise is called noise."""

from __future__ import annotations

import pytest

from mmq.bench.report import Figure, Level, Ratio, Report
from mmq.bench.verdicts import (
    memory_sentence,
    speed_sentence,
    stage_sentence,
    steps,
    stops,
    task_sentence,
    verdicts,
    word_of,
)


def rate(value: float, spread: float = 0.02) -> Figure:
    return Figure(value, "tok/s", "measured", value * (1 - spread), value * (1 + spread))


def levels(**by: Figure) -> list[Level]:
    """Levels c1, c8, ..., each with its ratio to BASE: the interval is the widest that the ranges of both allow."""
    found = []
    for name, figure in by.items():
        numbers = {"output_rate": figure}
        base = RATES.get(name)
        if base is None or base.low is None or base.high is None or figure.low is None or figure.high is None:
            found.append(Level(int(name[1:]), numbers))
            continue
        ratio = Ratio(figure.value / base.value, figure.low / base.high, figure.high / base.low, pairs=3)
        found.append(Level(int(name[1:]), numbers, {"output_rate": ratio}))
    return found


RATES = {"c1": rate(100), "c8": rate(500), "c32": rate(1000), "c128": rate(1500)}
BASE = levels(**RATES)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1.1, 1.4, "faster"),
        (0.6, 0.9, "slower"),
        (0.97, 1.03, "the same"),
        (0.8, 1.3, "noisy"),
        (0.18, 0.81, "noisy"),  # of runs of one load that took from one to nine seconds
        (1.4, 3.1, "noisy"),
        (None, None, "unknown"),
    ],
)
def test_what_an_interval_says(low: float | None, high: float | None, word: str) -> None:
    assert word_of(Ratio(1.0, low, high)) == word


def test_where_it_stops_helping() -> None:
    other = levels(c1=rate(150), c8=rate(650), c32=rate(1000), c128=rate(1350))
    found = steps(BASE, other)
    assert [step.word for step in found] == ["faster", "faster", "the same", "slower"]
    assert stops(found) == 32
    assert speed_sentence("awq", "fp16", found) == (
        "awq is faster than fp16 up to 8 at once (1.30x, 1.25 to 1.35 at 8) and stops helping at 32 "
        "(1.00x, 0.96 to 1.04 at 32)."
    )


def test_no_tidy_story_where_there_is_none() -> None:
    found = steps(BASE, levels(c1=rate(90), c8=rate(650), c32=rate(900)))
    assert speed_sentence("awq", "fp16", found) == (
        "awq is faster than fp16 at 8 at once and is not at 1: 0.90x, 0.86 to 0.94 at 1, 1.30x, 1.25 to 1.35 at 8, "
        "0.90x, 0.86 to 0.94 at 32."
    )


def test_where_it_is_not_reached_that_is_said() -> None:
    found = steps(BASE, levels(c1=rate(150), c8=rate(650), c32=rate(1200), c128=rate(1650)))
    assert stops(found) is None
    assert "the most that was asked; where it stops helping was not reached" in speed_sentence("awq", "fp16", found)


def test_noise_is_never_read_as_a_result() -> None:
    loud = levels(c1=rate(150), c8=rate(500, 0.4), c32=rate(1000, 0.4), c128=rate(1500, 0.4))
    found = steps(BASE, loud)
    assert stops(found) is None
    said = speed_sentence("awq", "fp16", found)
    assert "where it stops, the noise hides" in said
    assert said.endswith("At 8, 32, 128 at once the machine was too noisy to say.")
    said = speed_sentence("awq", "fp16", steps(BASE, levels(c1=rate(100, 0.4), c8=rate(500, 0.4))))
    assert "too noisy to say" in said
    assert "faster" not in said
    once = [Level(1, {"output_rate": Figure(150, "tok/s", "measured")})]
    assert "too few runs" in speed_sentence("awq", "fp16", steps(BASE, once))


def test_ends_that_say_nothing_are_not_told() -> None:
    found = [Level(1, {"output_rate": rate(50)}, {"output_rate": Ratio(0.5, 0.002, 112.56, pairs=3)})]
    said = speed_sentence("awq", "fp16", steps(BASE, found))
    assert said == "awq against fp16, output tok/s: 0.50x at 1; the machine was too noisy to say."


def test_slower_everywhere() -> None:
    said = speed_sentence("awq", "fp16", steps(BASE, levels(c1=rate(90), c8=rate(420))))
    assert said == (
        "awq is slower than fp16 at every load that can be told: 0.90x, 0.86 to 0.94 at 1, 0.84x, 0.81 to 0.87 at 8."
    )


def test_levels_that_only_one_was_asked_at_do_not_count() -> None:
    assert [step.concurrency for step in steps(BASE, levels(c8=rate(1), c64=rate(1)))] == [8]


def test_what_int4_leaves_as_it_is() -> None:
    parts = {"image_preprocessing": 20.0, "vision_tower": 30.0, "prefill": 50.0, "decode": 95.0, "other": 5.0}
    figures = {name: Figure(value, "ms", "measured") for name, value in parts.items()}
    assert stage_sentence("awq", figures) == (
        "One request alone spends its time with awq in decode 48%, prefill 25%, vision tower 15%, "
        "image preprocessing 10%, other 2%; 28% of it int4 leaves as it is."
    )
    assert stage_sentence("awq", {}) is None


def test_scores_of_tasks_are_held_against_their_noise() -> None:
    def tasks(score: float) -> dict[str, object]:
        return {"tasks": {"mmmu_val": {"acc": score, "stderr": 0.016}}}

    near = task_sentence("awq", "fp16", {"fp16": tasks(0.52), "awq": tasks(0.50)})
    assert near == "awq against fp16 on tasks: mmmu_val 0.5 against 0.52, within the noise of the task."
    far = task_sentence("awq", "fp16", {"fp16": tasks(0.52), "awq": tasks(0.40)})
    assert far == "awq against fp16 on tasks: mmmu_val 0.4 against 0.52, more than the noise of the task."
    assert task_sentence("awq", "fp16", {"awq": tasks(0.4)}) is None


def test_a_figure_that_was_computed_makes_its_ratio_so() -> None:
    """Of one the largest batch was run, of the other the trial failed."""
    was, now = (Figure(33, "sequences", "computed"), Figure(99, "sequences", "measured"))
    for first, other in ((was, now), (now, was)):
        said = memory_sentence("awq", "fp16", {"fp16": {"max_batch": first}, "awq": {"max_batch": other}})
        assert said
        assert said.endswith("its max batch (computed).")


def test_a_report_gets_a_sentence_for_each_thing_that_it_has() -> None:
    def numbers(weights: float, batch: float) -> dict[str, Figure]:
        return {
            "output_rate": rate(100),
            "weights": Figure(weights, "bytes", "measured"),
            "max_batch": Figure(batch, "sequences", "computed"),
        }

    report = Report(
        kind="bench",
        created="2026-11-21T12:00:00+00:00",
        engine="vllm",
        subjects={},
        numbers={"fp16": numbers(16e9, 2), "awq": numbers(7e9, 52)},
        raw={},
        settings={},
        machine={},
        versions={},
        ratios={"awq": {"output_rate": Ratio(0.87, 0.84, 0.9, pairs=5)}},
        quality={"awq": {"unchecked": "not checked; mmq check out-awq"}},
    )
    assert verdicts(report) == [
        "awq gives fewer output tok/s than fp16 under the load of the table (0.87x, 0.84 to 0.90, 5 pairs).",
        "awq takes 0.44x the memory of fp16 and has 26.00x its max batch (computed).",
        "How good awq is this report cannot say: not checked; mmq check out-awq.",
    ]

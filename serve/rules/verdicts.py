"""`mmq check --engines`: which engines would load a folder, all rules asked at once. Imports and starts no engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...export.subject import read_subject
from . import lmdeploy, sglang, transformers, vllm
from .rule import Place, Setting, Verdict, judge

PLACES: tuple[Place, ...] = (
    *vllm.PLACES,
    *sglang.PLACES,
    *lmdeploy.PLACES,
    *transformers.PLACES,
)
ENGINES = tuple(dict.fromkeys(place.engine for place in PLACES))


def chosen(names: str) -> tuple[Place, ...]:
    """The places of a list such as `vllm,lmdeploy:pytorch`; `all` is every one. ValueError for an unknown name."""
    found: list[Place] = []
    for name in (n.strip() for n in names.split(",") if n.strip()):
        fitting = [p for p in PLACES if name in ("all", p.engine, p.name)]
        if not fitting:
            known = ", ".join([*ENGINES, *(p.name for p in PLACES)])
            raise ValueError(f"no engine {name!r} in --engines; known are all, {known}")
        found += [p for p in fitting if p not in found]
    if not found:
        raise ValueError(f"--engines names none; known are all, {', '.join(ENGINES)}")
    return tuple(found)


def verdicts(
    folder: Path,
    places: Iterable[Place],
    *,
    tp: int = 1,
    packages: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Verdict]:
    """What each place would say of the checkpoint in `folder`. `packages`: by engine, what is installed beside it
    (name -> version), where that is known. ValueError for a `tp` below 1; errors of the folder as `read_subject`."""
    if tp < 1:
        raise ValueError(f"--tp is {tp}; it must be a number of GPUs >= 1")
    subject = read_subject(folder)
    return [judge(subject, place, setting_of(place, tp, (packages or {}).get(place.engine, {}))) for place in places]


def setting_of(place: Place, tp: int, packages: Mapping[str, str]) -> Setting:
    """The setting of one place, with the version of the engine where it is installed."""
    named = "transformers" if place.engine == "pytorch" else place.engine
    version = packages.get(named) or packages.get(f"{named}-cpu") or ""
    return Setting(tp=tp, device=place.device, version=version, packages=packages)


def refused(found: Sequence[Verdict]) -> list[str]:
    """The engines of which no place asked for would load it."""
    engines = dict.fromkeys(v.place.engine for v in found)
    return [e for e in engines if all(v.answer == "no" for v in found if v.place.engine == e)]


def facts(found: Iterable[Verdict]) -> list[dict[str, Any]]:
    """For --json."""
    return [
        {
            "engine": v.place.engine,
            "where": v.place.where,
            "rules_of": v.place.seen,
            "answer": v.answer,
            "findings": [vars(f) for f in v.findings],
        }
        for v in found
    ]


def rows(found: Iterable[Verdict]) -> list[list[str]]:
    """engine, answer, why, what to do; an engine's name on its first line alone."""
    table: list[list[str]] = []
    for v in found:
        name = f"{v.place.engine} {v.place.seen} {v.place.where}"
        if not v.findings:
            table.append([name, "yes", "", ""])
        for at, f in enumerate(sorted(v.findings, key=lambda f: not f.fatal)):
            answer = "no" if f.fatal else "if"
            table.append(["" if at else name, answer, f.why, f.remedy])
    return table

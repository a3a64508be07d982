"""What a comparison comes to: the lines of its journal and the generator's raw files, as the parts of a report.

Starts and asks nothing.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serve.engines import weights_kept
from ..serve.flags import number
from ..serve.footprint import Footprint
from ..serve.programs import packages_beside
from . import memory
from .budget import Budget
from .capacity import Trial
from .intervals import ratio
from .journal import Journal
from .nvml import Spell, peak_of
from .report import Figure, Level, Ratio, Report, versions
from .speed import TAILS, TIMES, Load, Run, figures, measures, read_run
from .turns import block_of
from .variants import Variant

PAIRED = ("input_rate", "output_rate", "time", *(name + tail for name in TIMES for tail in TAILS), "energy")


def runs_of(journal: Journal, label: str, concurrency: int) -> dict[int, Run]:
    """A label's runs at a concurrency, by their number; of one that was made twice the later."""
    found = {}
    for line in journal.found("run", label=label, concurrency=concurrency):
        raw = json.loads((journal.place / line["file"]).read_text(encoding="utf-8"))
        found[line["number"]] = read_run(raw, joules=(line["spell"] or {}).get("joules"))
    return dict(sorted(found.items()))


def rate_of(journal: Journal, label: str, concurrency: int) -> float | None:
    """The median output tok/s so far, None where nothing was run."""
    rates = [line["output_rate"] for line in journal.found("run", label=label, concurrency=concurrency)]
    return statistics.median(rates) if rates else None


def sweep_of(journal: Journal, label: str, first: str, *, mode: str) -> list[Level]:
    """A label's levels of load, the lowest concurrency first, each with its ratios to the `first` label's."""
    levels = []
    for concurrency in sorted({line["concurrency"] for line in journal.found("run", label=label)}):
        runs = runs_of(journal, label, concurrency)
        ratios = ratios_of(runs_of(journal, first, concurrency), runs, mode=mode) if label != first else {}
        levels.append(Level(concurrency, figures(list(runs.values())), ratios))
    return levels


def ratios_of(first: Mapping[int, Run], other: Mapping[int, Run], *, mode: str) -> dict[str, Ratio]:
    """The measures of the other runs by those of the first of the same number; `mode` is how they took turns."""
    numbers = sorted(first.keys() & other.keys())
    pairs = [(measures(first[n]), measures(other[n])) for n in numbers]
    how: dict[str, Any] = {"paired": mode != "off", "blocks": [block_of(mode, n) for n in numbers]}
    found = {}
    for name in PAIRED:
        values = [(a.get(name, 0.0), b.get(name, 0.0)) for a, b in pairs]
        if values and min(map(min, values)) > 0:  # pieces that came at once are no time apart
            found[name] = ratio([a for a, _ in values], [b for _, b in values], **how)
    return found


def peak(journal: Journal, label: str) -> int | None:
    """The most that a label's server held of the card, over all its starts; None where the card did not tell."""
    most, spells = [], []
    for line in journal.lines:
        if line.get("label") == label and line.get("spell"):
            if line["kind"] == "start":
                spells = []
            spells.append(Spell(**line["spell"]))
            most.append(peak_of(spells))
    return max(most, default=None)


def memory_of(
    journal: Journal, variant: Variant, *, engine: str, budget: Budget, context: int
) -> tuple[dict[str, Figure], Mapping[str, Figure], list[str]]:
    """(figures of memory, the card's memory by part, what a reader must know) of one label."""
    label, path = variant.label, variant.subject.path
    lines = journal.found("footprint", label=label)
    taken = Footprint(**lines[-1]["footprint"]) if lines else None
    held = taken if budget.enforced else None
    found = memory.fit(
        path,
        card=budget.card,
        context=context,
        flags=variant.flags,  # not the launch's, whose share of the card may be scaled to a larger one
        billed=engine == "vllm",
        cache_tokens=held.cache_tokens if held else None,
        weights=weights_kept(engine, path),
    )
    most = peak(journal, label)
    numbers = memory.figures(found, measured=taken, peak=most)
    log = journal.place / f"{label}.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    parts = memory.stack(found, measured=held, peak=most, log=text)
    notes = [line["why"] for line in journal.found("note", label=label)]
    if budget.enforced:
        for measure, unit in (("max_batch", "sequences"), ("max_length", "tokens")):
            trials = [Trial(**trial) for line in journal.found(measure, label=label)[-1:] for trial in line["trials"]]
            if trials and trials[-1].fine:
                value = trials[-1].sequences if measure == "max_batch" else trials[-1].tokens
                numbers[measure] = Figure(value, unit, "measured")
                limit = number(variant.launch.argv, "--max-num-seqs")
                if measure == "max_batch" and value == limit and value < found.max_batch:
                    notes.append(
                        f"{label}: {value} at once is the engine's own limit (--max-num-seqs), its cache has more"
                    )
            elif trials:
                notes.append(f"{label}: {trials[-1].words}; its {measure.replace('_', ' ')} is the cache's size only")
    if budget.enforced and most is not None and most > budget.size:
        notes.append(f"{label} took {most / budget.size:.2f} times the budget at its peak, as NVML saw it")
    return numbers, parts, notes


def raw_of(journal: Journal, label: str, load: Load) -> dict[str, Any]:
    """A label's raw samples for the report: the runs at the load's own concurrency without the gaps between tokens,
    which stay in the generator's files; the lines of the journal."""
    runs = runs_of(journal, label, load.concurrency).values()
    kept = [{k: v for k, v in dataclasses.asdict(run).items() if k != "itl"} for run in runs]
    lines = [line for line in journal.lines if line.get("label") == label]
    files: dict[str, list[str]] = {}
    for line in journal.found("run", label=label):
        files.setdefault(str(line["concurrency"]), []).append(line["file"])
    return {"runs": kept, "files": files, "journal": [line for line in lines if line["kind"] != "run"]}


def report(
    journal: Journal,
    variants: Sequence[Variant],
    subjects: Mapping[str, Mapping[str, Any]],
    *,
    engine: str,
    budget: Budget,
    load: Load,
    context: int,
    mode: str,
    failed: Mapping[str, str],
    dark: str,
    earlier: int,
    created: str,
    machine: Mapping[str, Any],
) -> Report:
    """The report of the variants that were measured. `mode` is how they took turns, `failed` has the reason of each
    that failed, `dark` why the card tells nothing, `earlier` is how many runs were taken up from a run that broke off.
    """
    labels = [v.label for v in variants]
    sweep = {label: sweep_of(journal, label, labels[0], mode=mode) for label in labels}
    numbers: dict[str, dict[str, Figure]] = {}
    ratios: dict[str, Mapping[str, Ratio]] = {}
    parts: dict[str, Mapping[str, Figure]] = {}
    notes = [f"{earlier} runs were made before this command, which took them up; --fresh measures all anew"] * bool(
        earlier
    )
    for v in variants:
        found, parts[v.label], said = memory_of(journal, v, engine=engine, budget=budget, context=context)
        own = next(level for level in sweep[v.label] if level.concurrency == load.concurrency)
        ratios |= {v.label: own.ratios} if v.label != labels[0] else {}
        starts = [line["seconds"] for line in journal.found("start", label=v.label)]
        startup = Figure(starts[-1], "s", "measured", min(starts), max(starts))
        numbers[v.label] = {**own.numbers, **found, "startup": startup}
        notes += said
    stages = {label: line for label in labels for line in journal.found("stages", label=label)[-1:]}
    dark = dark or ("" if any("energy" in found for found in numbers.values()) else "the card does not tell it")
    settings = {
        "load": dataclasses.asdict(load),
        "vram": budget.size,
        "context": context,
        "budget": {
            "card": "" if budget.card.name == "a card of this size" else budget.card.name,
            "enforced": budget.enforced,
            "here": budget.factor == 1.0,
            "why": budget.why,
            "seen": {label: peak(journal, label) for label in labels},
            "energy": dark if budget.enforced else budget.why,
        },
        "levels": sorted({level.concurrency for levels in sweep.values() for level in levels}),
        "interleave": {"mode": mode, "starts": {v: len(journal.found("start", label=v)) for v in labels}},
        "stages": next((line["settings"] for line in stages.values()), {}),  # of one load, so alike
        "failed": dict(failed),
        "notes": notes,
    }
    return Report(
        kind="bench",
        created=created,
        engine=engine,
        subjects=subjects,
        numbers=numbers,
        raw={label: raw_of(journal, label, load) for label in labels},
        settings=settings,
        machine=machine,
        versions=versions(packages_beside(Path(variants[0].launch.argv[0])) or None),
        sweep=sweep,
        ratios=ratios,
        stages={label: {k: Figure(**f) for k, f in line["figures"].items()} for label, line in stages.items()},
        memory=parts,
    )

"""A report of speeds made whole: quality from the checks and tasks, answers side by side, another card's decode speed,
and the verdict over all of it.

Starts and asks nothing: what was asked of the servers comes in.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes.samples import Sample
from ..serve.cards import CARDS, Card
from ..serve.machine import Machine
from .answers import side_by_side
from .find import Subject
from .projection import card_here, carries_over, projected, reached
from .proof import quality, unchecked
from .report import Figure, Report
from .verdicts import verdicts

PACKED = ("vllm", "lmdeploy")  # engines that compute with the weights as they are on disk, and read no more


def completed(
    report: Report,
    subjects: Sequence[Subject],
    *,
    machine: Machine,
    place: Path,
    samples: Sequence[Sample] = (),
    said: Mapping[str, Sequence[str]] | None = None,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    untold: Mapping[str, str] | None = None,
) -> Report:
    """The report of `subjects`, with all that their folders and these answers add.

    `said` has each label's answers to `samples`, whose pictures are written into the report's folder `place`; `scores`
    its tasks (`tasks.run_tasks`); `untold` what its stages leave untold. Errors as the files give them.
    """
    found = quality(subjects)
    for label, tasks in (scores or {}).items():
        found[label] = {**found.get(label, {}), "tasks": tasks}
    settings, notes = dict(report.settings), list(report.settings.get("notes", ()))
    notes += unchecked(found)
    notes += [f"{label}: {why}" for label, why in (untold or {}).items() if why]
    numbers = {label: dict(figures) for label, figures in report.numbers.items()}
    card = stated(report)
    if card is not None:
        budgeted = bool(settings.get("budget", {}).get("enforced"))
        settings["carries_over"] = carries_over(card, machine, budgeted=budgeted)
        here = card_here(machine)
        if report.engine in PACKED and (here is None or here.name != card.name):
            for subject in subjects:
                numbers[subject.label] |= speeds_on(card, report, subject, here=here)
    whole = dataclasses.replace(
        report,
        numbers=numbers,
        settings={**settings, "notes": notes},
        quality=found,
        answers=side_by_side(samples, said, place) if said else (),
    )
    return dataclasses.replace(whole, verdicts=verdicts(whole))


def stated(report: Report) -> Card | None:
    """The card of the table that the report's memory figures are for; None where only a size was stated."""
    name = report.settings.get("budget", {}).get("card")
    return next((card for card in CARDS.values() if card.name == name), None)


def speeds_on(card: Card, report: Report, subject: Subject, *, here: Card | None) -> dict[str, Figure]:
    """The projected figures of one subject under the report's own load: as many sequences as it has at once, each half
    way through its answer. With stages of a card that is in the table, at the share of its bandwidth reached there."""
    load, stages = report.settings["load"], report.stages.get(subject.label, {})
    lengths = [n for run in report.raw[subject.label]["runs"] for n in run["input_lens"]]
    context = round(statistics.fmean(lengths) + load["output_tokens"] / 2)
    share, sizes = None, report.settings.get("stages", {})
    if here is not None and "decode" in stages and sizes.get("output_tokens", 0) > 1:
        out = sizes["output_tokens"]
        tpot = stages["decode"].value / (out - 1)
        share = reached(subject.path, here, tpot=tpot, context=sizes["prompt_tokens"] + out // 2)
    return projected(subject.path, card, context=context, batch=load["concurrency"], reached=share)

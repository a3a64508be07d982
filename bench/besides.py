"""What is asked of each server beside its load: the stages of a request, sample questions, the field's tasks.

Each goes into the journal as soon as it is there, and into the report at the end. Knows a server by its URL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipes.progress import Tell, silent
from ..recipes.samples import Sample
from ..serve.machine import Machine
from ..serve.shape import read_shape
from .answers import answers_of, held_out
from .complete import completed
from .find import Subject
from .journal import Journal
from .report import Report
from .speed import Load
from .stages import stages as time_stages
from .tasks import check_tasks, run_tasks

KINDS = ("stages", "answers", "tasks")  # of lines in the journal


@dataclass(frozen=True)
class Besides:
    """What is asked; `harness` is the Python that has lm-eval, `blind` says why there are no samples."""

    stages: bool = True
    samples: tuple[Sample, ...] = ()
    tasks: tuple[str, ...] = ()
    harness: Path | None = None
    limit: int | None = None
    blind: str = ""


def besides_of(
    subjects: Sequence[Subject],
    *,
    stages: bool = True,
    answers: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    tell: Tell = silent,
) -> Besides:
    """Settle what is asked before a server starts: `answers` sample questions, `limit` questions of each of `tasks`.

    ValueError for a task that is not there, and for numbers below 0 (answers) or 1 (limit)."""
    if answers < 0:
        raise ValueError(f"{answers} answers were asked for; it must be 0 or more")
    if limit is not None and (limit < 1 or not tasks):
        raise ValueError(f"the first {limit} questions of each task: it must be 1 or more, of tasks that are named")
    eyeless = [s.label for s in subjects if not read_shape(s.path).vision]
    blind = f"no sample questions were asked: {', '.join(eyeless)} takes no pictures" if answers and eyeless else ""
    samples = tuple(held_out(subjects, answers)) if answers and not eyeless else ()
    harness = check_tasks(tasks, tell=tell) if tasks else None
    return Besides(stages, samples, tuple(tasks), harness, limit, blind)


def ask_besides(
    asked: Besides, journal: Journal, label: str, url: str, *, model: str, load: Load, tell: Tell = silent
) -> None:
    """Ask one server, and write down what came: lines `stages`, `answers`, `tasks`, or a `note` of why not."""
    if asked.stages:
        try:
            found = time_stages(url, model=model, load=load, tell=tell)
            journal.add("stages", label=label, **dataclasses.asdict(found))
        except ValueError as e:
            journal.add("note", label=label, why=f"{label}: its stages could not be timed: {e}")
    if asked.samples and not journal.found("answers", label=label):
        try:
            texts = answers_of(url, model=model, samples=asked.samples, label=label, tell=tell)
            journal.add("answers", label=label, texts=texts)
        except ValueError as e:  # a context too short for the picture, a server that takes none
            journal.add("note", label=label, why=f"{label}: it was asked no sample questions: {e}")
    if asked.tasks and not journal.found("tasks", label=label):
        options = {"python": asked.harness, "concurrency": load.concurrency, "limit": asked.limit}
        try:
            scores = run_tasks(
                url, model=model, names=asked.tasks, out=journal.place, label=label, tell=tell, **options
            )
            journal.add("tasks", label=label, scores=scores)
        except RuntimeError as e:  # lm-eval's own; a server that died is noticed by who asks it next
            journal.add("note", label=label, why=f"{label}: {e}")


def complete(report: Report, asked: Besides, journal: Journal, subjects: Sequence[Subject], machine: Machine) -> Report:
    """The report with what was asked and with what the artifacts' folders say, and its verdicts."""
    labels = [s.label for s in subjects]
    last = {kind: {v: line for v in labels for line in journal.found(kind, label=v)[-1:]} for kind in KINDS}
    if asked.blind:
        report = dataclasses.replace(
            report, settings={**report.settings, "notes": [*report.settings.get("notes", ()), asked.blind]}
        )
    said = {label: line["texts"] for label, line in last["answers"].items()}
    return completed(
        report,
        subjects,
        machine=machine,
        place=journal.place,
        samples=asked.samples,
        said=said,
        scores={label: line["scores"] for label, line in last["tasks"].items()},
        untold={label: line["untold"] for label, line in last["stages"].items()},
    )

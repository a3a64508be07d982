"""compare: several checkpoints under the same engine, flags and load, in turns, from one request at once to saturation.

Who is up is `variants`, whose turn it is `turns`, what is asked `speed`, what is done already `journal`, and what it
comes to `outcome`. Knows an engine by its name in `serve` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.alone import alone
from ..recipes.progress import Step, Tell, silent
from ..serve.flags import number
from ..serve.footprint import footprint
from ..serve.machine import this_machine
from ..serve.overhead import batched_tokens
from ..serve.programs import packages_beside
from ..serve.running import START_TIMEOUT, terminate_is_exit
from ..serve.shape import context_length, read_config
from . import capacity as limits
from . import outcome
from .besides import Besides, ask_besides, besides_of, complete
from .budget import Budget, budget_of
from .find import find
from .generator import Ask, generator, one_run, pictures_in, span_of, written_rows
from .journal import Journal, forget_unpaired, open_journal
from .nvml import Card, begin, open_card
from .report import Report, describe, now, versions
from .speed import CPU_LOAD, Load, measures
from .turns import levels_of, mode_of, runs_at, saturated, turn, visits
from .variants import Up, all_fit, described, dropped, servers, variant_of

CONTEXT = 2048  # tokens, as the field's own tables have it


@dataclass(frozen=True)
class Bench:
    """One comparison: what stays the same while it runs. `failed` fills as it goes."""

    load: Load
    levels: tuple[int, ...]
    auto: bool  # levels above the load's own end where no rate grows any more
    journal: Journal
    budget: Budget
    context: int
    card: Card | None
    rows: Path | None
    remote_code: bool
    besides: Besides
    capacity: bool
    failed: dict[str, str]
    tell: Tell


def compare(
    names: Sequence[str],
    *,
    folder: Path = Path(),
    out: Path = Path("bench-results"),
    vram: int | None = None,
    card: str | None = None,
    context: int = CONTEXT,
    load: Load | None = None,
    sweep: Sequence[int] | None = None,
    interleave: str = "auto",
    capacity: bool | None = None,
    stages: bool = True,
    answers: int = 0,
    tasks: Sequence[str] = (),
    tasks_limit: int | None = None,
    fresh: bool = False,
    engine: str = "vllm",
    engine_bin: str | Path | None = None,
    extra: Sequence[str] = (),
    trust_remote_code: bool = False,
    timeout: float = START_TIMEOUT,
    tell: Tell = silent,
) -> tuple[Report, Path]:
    """Serve and measure each of `names` (see `find.find`); returns the report and the folder it belongs into.

    The folder in `out` has the engines' logs, the generator's raw JSON and the journal by which a run that broke off
    is taken up again unless `fresh`; `write_report` completes it. Memory, max length and max batch are for `vram`
    bytes or a `card` by name, at `context` tokens: measured where an engine can be held to that budget here, computed
    elsewhere (`capacity` True runs what fits here all the same). `sweep` lists levels of concurrency beside the load's
    own, () for none; None: up to saturation. `interleave`: auto, together, restart or off. `extra` flags go to every
    server. Beside the load each is asked for its `stages`, `answers` sample questions and lm-eval's `tasks`, the first
    `tasks_limit` questions of each. A variant that fails does not stop the others: `settings["failed"]` has its reason.
    ValueError for names and settings, and where another process measures in the folder; RuntimeError where nothing
    could be measured.
    """
    subjects = find(names, folder=folder, tell=tell)
    for subject in subjects:
        longest = context_length(read_config(subject.path))
        if context > longest:
            raise ValueError(f"a context of {context} tokens is more than {subject.label} can do: {longest}")
    machine = this_machine()
    load = load or (Load() if machine.gpus else CPU_LOAD)
    levels = levels_of(load, sweep)
    budget = budget_of(machine, engine, vram=vram, card=card)
    same: dict[str, Any] = {"engine": engine, "machine": machine, "budget": budget}
    options: dict[str, Any] = {"load": load, "context": context, "pictures": pictures_in(load), "extra": extra}
    options |= {"trust_remote_code": trust_remote_code, "engine_bin": engine_bin}
    variants = [variant_of(subject, **same, **options) for subject in subjects]
    labels = [variant.label for variant in variants]
    mode = mode_of(interleave, many=len(variants), fit=lambda: all_fit(variants, **same))
    subjects_told = {variant.label: described(variant) for variant in variants}
    asked = {
        "subjects": {label: told["digest"] for label, told in subjects_told.items()},
        "load": dataclasses.asdict(load),
        "settings": [engine, list(levels), mode, capacity, stages, context, budget.size, list(extra)],
        "besides": [answers, list(tasks), tasks_limit],
        "machine": machine.words,
        "versions": versions(packages_beside(Path(variants[0].launch.argv[0])) or None),
    }
    beside = besides_of(subjects, stages=stages, answers=answers, tasks=tasks, limit=tasks_limit, tell=tell)
    created = now()
    journal = open_journal(out, asked, created=created, labels=labels, fresh=fresh)
    if mode != "off":
        forget_unpaired(journal, labels)
    earlier = len(journal.found("run"))
    nvml, dark = open_card() if budget.enforced else (None, "")
    bench = Bench(
        load=load,
        levels=levels,
        auto=sweep is None,
        journal=journal,
        budget=budget,
        context=context,
        card=nvml,
        rows=written_rows(load, journal.place),
        remote_code=trust_remote_code,
        besides=beside,
        capacity=budget.enforced if capacity is None else capacity,
        failed={},
        tell=tell,
    )
    left = [(up, ns) for up, ns in visits(mode, labels, load.runs) if any(_left(bench, label, ns) for label in up)]
    if left:
        place = journal.place
        with alone(place, "mmq bench"), terminate_is_exit(), generator(place / "generator.log") as ask:
            for up, numbers in left:
                wanted = [v for v in variants if v.label in up and v.label not in bench.failed]
                places = {"place": place, "timeout": timeout, "card": nvml, "tell": tell}
                with servers(wanted, failed=lambda label, e: _fail(bench, label, e), **places) as ups:
                    _visit(bench, ask, ups, numbers)
    measured = [v for v in variants if outcome.rate_of(journal, v.label, load.concurrency) is not None]
    if not measured:
        raise RuntimeError("; ".join(bench.failed.values()))
    told = {v.label: subjects_told[v.label] for v in measured}
    done: dict[str, Any] = {"load": load, "context": context, "mode": mode, "failed": bench.failed, "dark": dark}
    made = {"created": created, "machine": describe(machine), "earlier": earlier}
    found = outcome.report(journal, measured, told, engine=engine, budget=budget, **done, **made)
    return complete(found, beside, journal, [v.subject for v in measured], machine), journal.place


def _left(bench: Bench, label: str, numbers: Sequence[int]) -> bool:
    """Whether anything of a visit is still to be measured."""
    own = bench.load.concurrency
    done = {line["number"] for line in bench.journal.found("run", label=label, concurrency=own)}
    return not (done >= set(numbers) and bench.journal.found("visited", label=label, numbers=list(numbers)))


def _visit(bench: Bench, ask: Ask, ups: dict[str, Up], numbers: Sequence[int]) -> None:
    """All levels, in turns between the servers that are up; then what is asked of each alone."""
    journal, own = bench.journal, bench.load.concurrency
    for label, up in ups.items():
        spell = dataclasses.asdict(up.start) if up.start else None
        journal.add("start", label=label, seconds=round(up.server.startup_s, 2), spell=spell)
    before: dict[str, float] = {}
    for concurrency in bench.levels:
        todo = [n for n in range(runs_at(bench.load, concurrency)) if n in numbers]
        for number_ in todo:
            for at, label in enumerate(turn(list(ups), number_)):
                done = todo.index(number_) * len(ups) + at
                bench.tell(Step(f"{concurrency} at once", done, len(todo) * len(ups), label))
                if not journal.found("run", label=label, concurrency=concurrency, number=number_):
                    _safely(bench, ups, label, lambda up: _run(bench, ask, up, concurrency, number_))  # noqa: B023
        bench.tell(Step(f"{concurrency} at once", 1, 1))
        rates = {label: outcome.rate_of(journal, label, concurrency) or 0.0 for label in ups}
        if bench.auto and concurrency > own and saturated(before, rates):
            break
        before = rates
    for label in list(ups):
        if not journal.found("footprint", label=label):
            _safely(bench, ups, label, lambda up: _look(bench, up))
    for label in ups:
        journal.add("visited", label=label, numbers=list(numbers))


def _safely(bench: Bench, ups: dict[str, Up], label: str, do: Callable[[Up], None]) -> None:
    """Do something with one server; where that fails it is ended, told of and left out."""
    try:
        do(ups[label])
    except (RuntimeError, OSError, ValueError) as e:
        _fail(bench, label, dropped(ups, label, e))


def _fail(bench: Bench, label: str, error: Exception) -> None:
    bench.failed[label] = str(error)
    bench.journal.add("failed", label=label, why=str(error))


def _run(bench: Bench, ask: Ask, up: Up, concurrency: int, number: int) -> None:
    """One run of one level on one server, written down."""
    label, load = up.variant.label, bench.load.at(concurrency)
    file = bench.journal.place / f"{label}-{concurrency}-{number + 1}.json"
    tokenizer = up.variant.subject.path.resolve()
    options: dict[str, Any] = {"load": load, "number": number, "result": file, "rows": bench.rows}
    options |= {"remote_code": bench.remote_code}
    end, window = begin(bench.card), None
    try:
        run = one_run(ask, up.server.url, model=up.server.name, tokenizer=tokenizer, **options)
        window = span_of(file)
    finally:
        spell = end(window)
    facts: dict[str, Any] = {"label": label, "concurrency": concurrency, "number": number, "file": file.name}
    facts |= {"output_rate": measures(run)["output_rate"], "spell": dataclasses.asdict(spell) if spell else None}
    bench.journal.add("run", **facts)


def _look(bench: Bench, up: Up) -> None:
    """What is asked of one server alone: its stages, its memory, the largest batch and the longest context."""
    label, journal, url, model = up.variant.label, bench.journal, up.server.url, up.server.name
    ask_besides(bench.besides, journal, label, url, model=model, load=bench.load, tell=bench.tell)
    taken = footprint(up.server)
    if bench.capacity:
        argv = up.variant.launch.argv
        step = int(number(argv, "--max-num-batched-tokens") or batched_tokens(bench.budget.size))
        most = int(number(argv, "--max-num-seqs") or 0) or None
        tries: dict[str, Callable[[], list[limits.Trial]]] = {
            "max_batch": lambda: limits.max_batch(
                url, model=model, context=bench.context, most=most, step=step, tell=bench.tell
            ),
            "max_length": lambda: limits.max_context(url, model=model, tell=bench.tell),
        }
        for name, trial in tries.items():
            end = begin(bench.card)
            try:
                trials = [dataclasses.asdict(found) for found in trial()]
            except ValueError as e:
                journal.add("note", label=label, why=f"{label}: {e}")
                continue
            finally:
                spell = end()
            journal.add(name, label=label, trials=trials, spell=dataclasses.asdict(spell) if spell else None)
    journal.add("footprint", label=label, footprint=dataclasses.asdict(taken))

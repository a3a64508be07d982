"""The planner held against an engine: `python -m mmq.bench.plan_against FOLDER ... --budget 8GiB --budget 24GiB`.

For each checkpoint and budget the plan of a card of that size, then vLLM started as `mmq serve` starts it, with as much
of this card as the plan gives it of its own, and what it says: memory for weights, tokens of cache. One start at a
time, on a card that nothing else uses: the engine measures the whole card. bench.hollow writes checkpoints for it.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from ..serve.bill import read_model
from ..serve.engines import plan
from ..serve.footprint import footprint
from ..serve.machine import GIB, Gpu, Machine, this_machine
from ..serve.plan_flags import asked_in
from ..serve.planner import Plan, planned
from ..serve.running import free_port, running
from .budget import scaled, settled, usable
from .report import parse_bytes

WEIGHTS = 0.03  # the largest relative error that is accepted
TOKENS = 0.10
TOLD = {  # GiB, as vLLM's log has them; the second to fourth with VLLM_LOGGING_LEVEL=DEBUG alone
    "for the cache": r"Available KV cache memory: ([\d.]+) GiB",
    "passes": r"torch peak memory increase: ([\d.]+)GiB",
    "libraries": r"non-torch forward increase memory: ([\d.]+)GiB",
    "weights": r"weights memory: ([\d.]+)GiB",
    "graphs, estimated": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    "graphs": r"Graph capturing finished in .* took ([\d.]+) GiB",
}


@dataclass(frozen=True)
class Held:
    """One plan and what became of it. Bytes and tokens; `told` is GiB by the engine's log, `parts` by the plan.

    `problem` is why the plan says it does not fit, and then nothing was started; `error` is why no engine came up.
    """

    folder: str
    budget: int
    weights: int
    tokens: int
    parts: dict[str, float]
    problem: str = ""
    error: str = ""
    engine_weights: int | None = None
    engine_tokens: int | None = None
    startup_s: float | None = None
    told: dict[str, float] = field(default_factory=dict)
    argv: tuple[str, ...] = ()

    @property
    def off(self) -> tuple[float | None, float | None]:
        """The plan's relative errors: weights, tokens."""
        return _off(self.weights, self.engine_weights), _off(self.tokens, self.engine_tokens)

    @property
    def failure(self) -> str:
        """What the plan got wrong, "" for nothing."""
        if self.problem:
            return ""
        if self.error:
            return f"the plan says it fits, and the engine did not start: {self.error}"
        wrong = [
            f"{name} {off:+.1%}" if off is not None else f"the engine does not tell its {name}"
            for name, off, most in zip(("weights", "tokens"), self.off, (WEIGHTS, TOKENS), strict=True)
            if off is None or abs(off) > most
        ]
        return ", ".join(wrong)


def _off(foretold: int, seen: int | None) -> float | None:
    return foretold / seen - 1 if seen else None


def hold(folder: Path, budget: int, *, extra: Sequence[str] = (), machine: Machine, log: Path | None = None) -> Held:
    """Plan `folder` for `budget` bytes and start it so on this machine's first card. ValueError where that is smaller.

    What vLLM chooses by the card's size is told to it, as it would choose on a card of the budget's size.
    """
    here = machine.gpus[0]
    if budget > here.memory:
        raise ValueError(f"{here.name} has {here.memory / GIB:.1f} GiB; a budget cannot be larger")
    card = Gpu("a card of this size", budget, budget, here.capability)
    extra = (*settled(budget), *extra)
    told = planned(read_model(folder), card, asked_in(extra, context=None))
    held = Held(
        folder=folder.name,
        budget=budget,
        weights=sum(p.size for p in told.parts if p.name.startswith("weights")),
        tokens=told.tokens,
        parts=_gib(told),
        problem=told.problem,
    )
    if told.problem:
        return held
    launch = plan("vllm", folder, machine=replace(machine, gpus=(card,)), port=free_port(), extra=extra)
    launch = scaled(launch, budget / usable(here))
    held = replace(held, argv=launch.argv[1:])
    try:
        with running(launch, log_path=log) as server:
            found = footprint(server)
            text = server.log_path.read_text(encoding="utf-8", errors="replace")
            seen = {name: float(hit[-1]) for name, words in TOLD.items() if (hit := re.findall(words, text))}
            return replace(
                held,
                engine_weights=found.weights,
                engine_tokens=found.cache_tokens,
                startup_s=round(server.startup_s, 1),
                told=seen,
            )
    except RuntimeError as e:
        return replace(held, error=str(e))


def _gib(told: Plan) -> dict[str, float]:
    return {p.name: round(p.size / GIB, 3) for p in told.parts if p.counted}


def row(held: Held) -> str:
    """One line of a table in Markdown."""
    if held.problem:
        end = f"does not fit: {held.problem} | | | | "
    elif held.error:
        end = f"**did not start**: {held.error} | | | | "
    else:
        weights, tokens = held.off
        end = " | ".join(
            (
                f"{held.weights / GIB:.2f}",
                "?" if weights is None else f"{(held.engine_weights or 0) / GIB:.2f} ({weights:+.1%})",
                f"{held.tokens:,}",
                "?" if tokens is None else f"{held.engine_tokens:,} ({tokens:+.1%})",
                f"{held.startup_s} s",
            )
        )
    return f"| {held.folder} | {held.budget / GIB:g} GiB | {end} |"


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--budget", "budgets", multiple=True, default=("8GiB", "16GiB", "24GiB"), show_default=True)
@click.option("--engine-flags", default="", help="More flags for the engine, which the plan heeds: --enforce-eager.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the figures here, a line each.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the engines' logs in this folder.")
def main(folders: tuple[Path, ...], budgets: tuple[str, ...], engine_flags: str, out: Path | None, logs: Path | None):
    """Hold the plans of FOLDERS for each budget against vLLM; exit 1 where one is off."""
    machine = this_machine()
    if not machine.gpus:
        raise click.ClickException("this machine has no GPU")
    click.echo("| checkpoint | card | weights, plan (GiB) | engine | cache, plan (tokens) | engine | up after |")
    click.echo("|---|---|---|---|---|---|---|")
    failures: list[str] = []
    for folder in folders:
        for budget in map(parse_bytes, budgets):
            log = logs / f"{folder.name}-{budget // GIB}.log" if logs else None
            held = hold(folder, budget, extra=shlex.split(engine_flags), machine=machine, log=log)
            click.echo(row(held))
            if out is not None:
                facts: dict[str, Any] = {**asdict(held), "off": held.off, "failure": held.failure}
                with out.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(facts, ensure_ascii=False) + "\n")
            if held.failure:
                failures.append(f"{held.folder}, {budget / GIB:g} GiB: {held.failure}")
    for line in failures:
        click.echo(f"mmq: {line}", err=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

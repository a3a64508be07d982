"""Who is measured when: levels of concurrency, servers in turns, and when a sweep has seen enough.

Numbers and names only; starts and asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .speed import Load

SWEEP = (1, 8, 32, 128, 512)  # requests at once, up to saturation
GROWTH = 1.05  # output tok/s of a level over the last one's; where nothing grows by more, all is saturated
LEVEL_RUNS = 3  # of a level that is not the load's own
RESTARTS = 3  # of each server, where only one can be up: starts are then what an interval is made of
MODES = ("auto", "together", "restart", "off")


def levels_of(load: Load, sweep: Sequence[int] | None) -> tuple[int, ...]:
    """Concurrencies to measure, the lowest first, the load's own among them. ValueError for one below 1."""
    if sweep and min(sweep) < 1:
        raise ValueError(f"a sweep at {min(sweep)} requests at once; it must be at least 1")
    return tuple(sorted({*(SWEEP if sweep is None else sweep), load.concurrency}))


def runs_at(load: Load, concurrency: int) -> int:
    """How often a level is run: the load's own gives the ratios, the others a curve."""
    return load.runs if concurrency == load.concurrency else min(LEVEL_RUNS, load.runs)


def mode_of(asked: str, *, many: int, fit: Callable[[], bool]) -> str:
    """together, restart or off: `asked`, or by what the memory lets. ValueError for an unknown word."""
    if asked not in MODES:
        raise ValueError(f"--interleave is {asked!r}; known are {', '.join(MODES)}")
    if many == 1:
        return "off"
    if asked != "auto":
        return asked
    return "together" if fit() else "restart"


def visits(mode: str, labels: Sequence[str], runs: int) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """(labels that are up together, numbers of the runs that are made meanwhile), one after the other.

    together: all labels, all runs, each number's runs right after one another. restart: A, B, B, A, A, B, each start
    with a part of the runs. off: A, then B.
    """
    every = tuple(range(runs))
    if mode == "together":
        return [(tuple(labels), every)]
    parts = [every[at::RESTARTS] for at in range(RESTARTS)] if mode == "restart" else [every]
    return [((label,), part) for at, part in enumerate(parts) if part for label in turn(labels, at)]


def turn(labels: Sequence[str], number: int) -> list[str]:
    """Who comes when in a round: forth, then back. A machine that steadily slows down, or warms up, would else always
    favour the one that comes first."""
    return list(labels if number % 2 == 0 else reversed(labels))


def block_of(mode: str, number: int) -> int:
    """What a run shares with others beside its load: where servers are started anew, the start that it falls to. Such
    runs are one observation of a ratio, and not several."""
    return number % RESTARTS if mode == "restart" else number


def saturated(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether no label's rate grew by more than `GROWTH` since the level before."""
    both = before.keys() & now.keys()
    return bool(both) and all(now[label] < GROWTH * before[label] for label in both)

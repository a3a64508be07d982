"""The servers that are compared: planned, started, ended each on its own, both up at once where memory lets.

Knows an engine by its name in `serve` alone, and a server by its process; what is asked of it is others' business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.progress import Tell
from ..serve.engines import plan, weights_kept
from ..serve.flags import Launch, given, shell_line
from ..serve.machine import GIB, Machine
from ..serve.overhead import CUDA_CONTEXT
from ..serve.planner import GPU_SHARE
from ..serve.running import Server, free_port, running
from ..serve.shape import read_shape
from .budget import Budget, planned_for, scaled, settled
from .find import Subject
from .memory import weight_bytes
from .nvml import Card, Spell, begin
from .report import digest_of
from .speed import Load

# a template's beginning is in every prompt, and a dataset's rows come again: without caches a run does all its work
SAME_FOR_ALL = {"vllm": ("--no-enable-prefix-caching",)}  # the other engines keep no prefix unless told to
OWN_PICTURES = {"vllm": ("--mm-processor-cache-gb", "0")}  # of a dataset; random pictures never come again
RUNTIME = 2 * GIB  # what an engine's processes take on a CPU beside weights and cache (2.3 GiB seen with a tiny model)
KEPT_FREE = 0.15  # of the memory that is available, for the load generator and all else


@dataclass(frozen=True)
class Variant:
    """One subject and how it is served: `launch` as planned, its port drawn anew at each start (`again`); `flags` are
    those beside the plan's own."""

    subject: Subject
    launch: Launch
    again: Callable[[], Launch]
    flags: tuple[str, ...]

    @property
    def label(self) -> str:
        """Its name in tables, and in requests."""
        return self.subject.label


@dataclass(frozen=True)
class Up:
    """A variant's healthy server; `start` is what its start did to the card, `close` ends it, with the error that it
    died of where there is one."""

    variant: Variant
    server: Server
    start: Spell | None
    close: Callable[[BaseException | None], None]


def variant_of(
    subject: Subject,
    *,
    engine: str,
    machine: Machine,
    budget: Budget,
    load: Load,
    context: int,
    pictures: int,
    extra: Sequence[str] = (),
    **options: Any,
) -> Variant:
    """How `subject` is served here, held to the budget where it can be. Errors as `serve.engines.plan`'s."""
    flags = flags_for(subject.path, engine, budget, load, pictures, extra)
    longest = None if budget.enforced else context  # there the engine takes the longest that fits, which is measured

    def launched() -> Launch:
        launch = plan(
            engine,
            subject.path,
            machine=planned_for(machine, budget),
            port=free_port(),
            max_model_len=longest,
            served_model_name=subject.label,
            extra=flags,
            **options,
        )
        return scaled(launch, budget.factor) if budget.factor else launch

    return Variant(subject, launched(), launched, flags)


def flags_for(
    folder: Path, engine: str, budget: Budget, load: Load, pictures: int, extra: Sequence[str]
) -> tuple[str, ...]:
    """The engine's flags that all variants have; `extra` ones win. `pictures` is the most that a request has."""
    ours = [*SAME_FOR_ALL.get(engine, ()), *(OWN_PICTURES.get(engine, ()) if load.dataset else ())]
    if budget.enforced:
        ours += [*settled(budget.size), "--max-model-len", "auto"]
        if read_shape(folder).vision:
            ours += ["--limit-mm-per-prompt", json.dumps({"image": max(1, pictures), "video": 0})]
    flags: list[str] = []
    while ours:
        words = [ours.pop(0)]
        while ours and not ours[0].startswith("--"):
            words.append(ours.pop(0))
        flags += words if given(extra, words[0].replace("--no-", "--")) is None else []
    return (*flags, *extra)


@contextlib.contextmanager
def servers(
    variants: Sequence[Variant],
    *,
    place: Path,
    timeout: float,
    card: Card | None,
    failed: Callable[[str, Exception], None],
    tell: Tell,
) -> Iterator[dict[str, Up]]:
    """Start the variants one after the other, all up for the length of a `with`; yields those that are, by label.

    One that does not start is told to `failed` and left out. Whoever closes one takes it out of what was yielded.
    """
    ups: dict[str, Up] = {}
    try:
        for variant in variants:
            try:
                ups[variant.label] = _start(variant, place=place, timeout=timeout, card=card, tell=tell)
            except (RuntimeError, OSError, ValueError) as e:
                failed(variant.label, e)
        yield ups
    finally:
        with contextlib.ExitStack() as stack:  # one that cannot be ended does not keep the others from it
            for up in ups.values():
                stack.callback(up.close, None)


def _start(variant: Variant, *, place: Path, timeout: float, card: Card | None, tell: Tell) -> Up:
    launch = variant.again()
    manager = running(launch, timeout=timeout, log_path=place / f"{variant.label}.log", tell=tell)
    end = begin(card)
    try:
        server = manager.__enter__()
    finally:
        spell = end()

    def close(error: BaseException | None) -> None:
        manager.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    return Up(variant, server, spell, close)


def dropped(ups: dict[str, Up], label: str, error: Exception) -> Exception:
    """End a server that failed, and take it out of `ups`; its own reason where it died, else `error`."""
    try:
        ups.pop(label).close(error)
    except (RuntimeError, OSError) as e:
        return e
    return error


def all_fit(variants: Sequence[Variant], *, engine: str, machine: Machine, budget: Budget) -> bool:
    """Whether the memory lets all servers be up at once."""
    if any(v.launch.device == "cuda" for v in variants):
        if not budget.enforced or budget.factor == 1.0:
            return False  # each takes its share of the whole card
        return len(variants) * (GPU_SHARE * budget.size + CUDA_CONTEXT) <= machine.gpus[0].free
    taken = 0.0
    for variant in variants:
        space = float(variant.launch.env.get("VLLM_CPU_KVCACHE_SPACE", 1)) * GIB
        weights = weights_kept(engine, variant.subject.path) or weight_bytes(variant.subject.path)
        taken += weights + space + RUNTIME
    return taken <= (1 - KEPT_FREE) * machine.available


def described(variant: Variant) -> Mapping[str, Any]:
    """A subject for the report: what it is, and the command as a reader would type it."""
    subject, launch = variant.subject, variant.launch
    found: dict[str, Any] = {"path": subject.shown, "digest": digest_of(subject.path)}
    if subject.artifact is not None:
        manifest = subject.artifact.manifest
        found |= {k: manifest.get(k) for k in ("name", "method", "format", "group_size", "base")}
    # the program by its name, the checkpoint by its own
    program, *words = launch.argv
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))  # the folder stands before
    typed = (Path(program).name, *words[: first - 1], subject.shown, *words[first:])
    return found | {"command": shell_line(dataclasses.replace(launch, argv=typed))}

"""What became of a job and of its steps: nouns, their JSON, and the exit code of them all. Runs nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export.artifact import write_json

PAST, INPUT, ENGINE, FAULT, INTERRUPTED = 1, 2, 3, 70, 130
STATES = {0: "done", PAST: "past a limit", INPUT: "failed", ENGINE: "engine died", FAULT: "fault", 130: "interrupted"}
WAITING = "not begun"


@dataclass(frozen=True)
class StepDone:
    """One step: its name, exit code and seconds; `kept`: it was done before, of the same, and is not done again."""

    name: str
    code: int
    seconds: float = 0.0
    kept: bool = False


@dataclass(frozen=True)
class Done:
    """What became of a job. `code` is the worst of its steps', `why` its lines; `key` and `digest` are the artifact's,
    `measures` its check's, `bytes` {"base", "artifact"} of weights, `published` the addresses it is at now."""

    name: str
    recipe: str
    method: str
    state: str = WAITING
    code: int = 0
    why: tuple[str, ...] = ()
    steps: tuple[StepDone, ...] = ()
    artifact: str | None = None
    key: str | None = None
    digest: str | None = None
    bytes: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float | None] = field(default_factory=dict)
    bench: str | None = None  # the report's path
    published: tuple[str, ...] = ()
    log: str | None = None

    @property
    def rebuilt(self) -> bool:
        """Whether the artifact was made in this run."""
        return any(step.name == "quantize" and not step.kept for step in self.steps)


def state_of(code: int) -> str:
    """A word for an exit code."""
    return STATES.get(code, STATES[FAULT])


def worst(results: Sequence[Done]) -> int:
    """The exit code of a run: the largest of its jobs'."""
    return max((result.code for result in results), default=0)


def facts(results: Sequence[Done]) -> dict[str, Any]:
    """The run for programs."""
    return {"code": worst(results), "jobs": [dataclasses.asdict(result) for result in results]}


def write(results: Sequence[Done], file: Path) -> None:
    """The same as a file, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, json.loads(json.dumps(facts(results), ensure_ascii=False)))

"""What is here: versions, this machine, what each engine loads on it, each backend's environment, the tasks'.

With each the line that mends what is missing. Looks, and changes nothing; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..serve.abilities import abilities
from ..serve.machine import this_machine
from .backends import BACKENDS
from .environments import state
from .report import versions
from .tasks import harness_state


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. `mend` is the line to type where it is not ready, or could do more."""

    name: str
    ready: bool
    text: str
    mend: str = ""


def findings() -> list[Finding]:
    """Everything, in the order in which a reader wants it."""
    here = versions()
    found = [Finding(name, True, here[name]) for name in ("mmq", "python", "torch", "transformers") if name in here]
    machine = this_machine()
    found.append(Finding("machine", True, machine.words))
    for engine in abilities(machine):
        found.append(Finding(f"engine {engine.engine}", engine.ready, engine.words, engine.mend))
    states = [state(name) for name in BACKENDS]
    found += [Finding(f"backend {s.backend}", s.ready, s.text, s.mend) for s in states]
    tasks = harness_state()
    return [*found, Finding(f"tasks {tasks.backend}", tasks.ready, tasks.text, tasks.mend)]


def row(finding: Finding) -> list[str]:
    """One line for the terminal."""
    return [finding.name, "ok" if finding.ready else "-", "\n".join(filter(None, (finding.text, finding.mend)))]

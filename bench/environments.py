"""An environment of its own for each backend: made by uv on first use from pinned requirements, kept in a cache.

It is built under another name and renamed when it is whole, so a half-made one is never used. Knows how to install;
knows nothing of what the packages do. Its torch is the CPU build where there is no NVIDIA GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..recipes.progress import Step, Tell, silent
from ..serve.machine import this_machine
from .follow import clean, follow, plain

REQUIREMENTS = Path(__file__).parent.parent / "requirements" / "backends"
PYTHON = "3.11"  # what the requirements are pinned for
STAMP = "mmq-environment.json"
# Installed first and with their dependencies: torch brings the CUDA libraries of its build, or none. The rest is a
# closure (--no-deps), so that a package's own pins cannot pull another torch in; and what has no wheel is built beside
# the torch that it is for.
FIRST = ("torch", "torchvision", "setuptools", "wheel", "packaging", "numpy", "ninja")
BUILDING = {"BUILD_CUDA_EXT": "0", "DISABLE_QIGEN": "1"}  # calibration needs no kernels of the packages' own
CUDA_BYTES, CPU_BYTES = 8 * 2**30, 3 * 2**30  # what an environment takes at most, with torch


@dataclass(frozen=True)
class State:
    """One backend's environment for `mmq doctor`: `ready`, what there is to say of it, and the line that mends it."""

    backend: str
    ready: bool
    text: str
    mend: str = ""


def environment(name: str, *, tell: Tell = silent, requirements: Path | None = None) -> Path:
    """The interpreter of the backend's environment, made now if it is not there. MMQ_<NAME>_PYTHON (as in
    MMQ_AUTO_ROUND_PYTHON) names one of the user's own instead.

    OSError in one line where it cannot be made; what the installer said is then in a log in the cache.
    """
    own = _users_own(name)
    if own is not None:
        return own
    file = requirements or _requirements(name)
    place = _place(name, file)
    if not _whole(place):
        uv = find_uv()
        place.parent.mkdir(parents=True, exist_ok=True)
        _check_room(place.parent)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=place.parent) as scratch:
            made = Path(scratch) / "environment"
            _log(place).unlink(missing_ok=True)
            try:
                _make(name, uv, file, made, _log(place), tell)
            except OSError as e:
                _failure(place).write_text(str(e) + "\n", encoding="utf-8")
                raise
            _settle(made, place)
        for left in (_failure(place), _log(place)):
            left.unlink(missing_ok=True)
    return place / "bin" / "python"


def state(name: str, *, requirements: Path | None = None, makes: str = "") -> State:
    """What there is of the environment of this name; `makes` is the command that makes it, where it is no backend's.
    Makes nothing, runs nothing, and never fails."""
    try:
        own = _users_own(name)
        if own is not None:
            return State(name, True, f"your own, {own}")
        file = requirements or _requirements(name)
        version = pinned(file).get(name, "?")
        place = _place(name, file)
        if _whole(place):
            return State(name, True, f"ready, {name} {version} in {place}")
        find_uv()
    except OSError as e:
        return State(name, False, f"cannot be installed here: {e}", "pip install uv" if "uv" in str(e) else "")
    again = makes or f"mmq quantize MODEL --backend {name}"
    if _failure(place).is_file():
        why = _failure(place).read_text(encoding="utf-8").strip()
        return State(name, False, f"could not be installed: {why}", f"{again}  (tries again)")
    return State(name, False, f"not made; its first use installs {name} {version}", again)


def pinned(file: Path) -> dict[str, str]:
    """Distribution -> version of a requirements file's `name==version` lines, names in lower case with dashes."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {re.sub(r"[-_.]+", "-", n.strip()).lower(): v.strip() for n, _, v in pairs}


def find_uv() -> str:
    """The uv on PATH, else the one beside this Python. OSError with the line that installs it."""
    beside = Path(sys.executable).parent / "uv"
    found = shutil.which("uv") or (str(beside) if os.access(beside, os.X_OK) else None)
    if found is None:
        raise OSError("uv, which makes a backend's environment, is not installed: `pip install uv`")
    return found


def _users_own(name: str) -> Path | None:
    variable = f"MMQ_{name.upper().replace('-', '_')}_PYTHON"
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value).expanduser()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise OSError(f"{variable} names {value}, which is no interpreter; give the path of a `python`")
    return path.absolute()


def _requirements(name: str) -> Path:
    file = REQUIREMENTS / f"{name}.txt"
    if not file.is_file():
        raise OSError(f"{file} is missing: this installation of mmq is not whole; install it again")
    return file


def _place(name: str, file: Path) -> Path:
    cache = os.environ.get("MMQ_CACHE") or "~/.cache/mmq"
    mark = hashlib.sha256(f"{PYTHON}\n{has_gpu()}\n".encode() + file.read_bytes()).hexdigest()[:12]
    return Path(cache).expanduser() / "backends" / f"{name}-{mark}"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, as nvidia-smi tells."""
    return bool(this_machine().gpus)


def _log(place: Path) -> Path:
    return place.with_name(place.name + ".log")


def _failure(place: Path) -> Path:
    return place.with_name(place.name + ".failed")


def _whole(place: Path) -> bool:
    return (place / STAMP).is_file() and os.access(place / "bin" / "python", os.X_OK)


def _check_room(folder: Path) -> None:
    need, free = CUDA_BYTES if has_gpu() else CPU_BYTES, shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{folder} has {free / 2**30:.1f} GiB free and an environment may take {need / 2**30:.0f}; free some, or "
            "put MMQ_CACHE on another disk"
        )


def _make(name: str, uv: str, file: Path, made: Path, log: Path, tell: Tell) -> None:
    """Make the environment `made` in three steps. OSError with the installer's own reason."""
    pins = pinned(file)
    python = sys.executable if "{}.{}".format(*sys.version_info[:2]) == PYTHON else PYTHON
    install = [uv, "pip", "install", "--python", str(made / "bin" / "python")]
    source = torch_source(pins.get("torch"))
    first = [f"{n}=={v}" for n, v in pins.items() if n in FIRST]
    steps = [[uv, "venv", "--python", python, str(made)]]
    steps += [[*install, *source, *first]] if first else []
    steps += [[*install, *source, "--no-deps", "--no-build-isolation", "-r", str(file)]]
    for number, command in enumerate(steps):
        note = f"{name}: installing, a few GB the first time"
        tell(Step("environment", number, len(steps), note))
        env = {**clean(), **BUILDING, "NO_COLOR": "1"}
        heard = lambda line, number=number: tell(Step("environment", number, len(steps), line[:60]))  # noqa: E731
        code, last = follow(command, env=env, log=log, on_line=heard)
        if code:
            raise OSError(f"{name} cannot be installed: {_reason(log, last)} (all of it in {log})")
    (made / STAMP).write_text(json.dumps({"backend": name, "packages": pins}, indent=1) + "\n", encoding="utf-8")
    tell(Step("environment", len(steps), len(steps), f"{name}: ready"))


def _reason(log: Path, last: str) -> str:
    """uv's own error and its causes in one line."""
    lines = [plain(line) for line in log.read_bytes().splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("error:")), None)
    said = " ".join(" ".join(lines[start : start + 4]).split()).removeprefix("error: ") if start is not None else last
    return said if len(said) <= 300 else said[:300] + " ..."


def _settle(made: Path, place: Path) -> None:
    """Give a whole environment its name. Where another process was faster, its environment stands."""
    if place.exists() and not _whole(place):
        shutil.rmtree(place)
    try:
        made.rename(place)
    except OSError:
        if not _whole(place):
            raise


def torch_source(version: str | None) -> list[str]:
    """uv's options that say where torch comes from.

    PyPI's torch is built for CUDA. With an NVIDIA GPU uv picks the build for its driver; without, the CPU build comes
    from a folder that pip or uv was told of (find-links), else from PyTorch's own index. UV_TORCH_BACKEND wins.
    """
    places = " ".join(os.environ.get(v, "") for v in ("UV_FIND_LINKS", "PIP_FIND_LINKS")).replace(",", " ").split()
    options = [option for place in dict.fromkeys(places) for option in ("--find-links", place)]
    if os.environ.get("UV_TORCH_BACKEND") or version is None:
        return options
    if has_gpu():
        return [*options, "--torch-backend", "auto"]
    wheel = f"torch-{version}+cpu-*.whl"
    if any("://" not in place and any(Path(place).glob(wheel)) for place in places):
        return options
    return [*options, "--torch-backend", "cpu"]

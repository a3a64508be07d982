"""Resolve requirements/*.in anew and write the pinned files: `make pins`.

Keeps every version that still fits (an existing pin is the preference), so a run changes only what the .in files ask.
The three files hold plain `name==version` lines and no download addresses: any index that has those versions will do.
"""

from __future__ import annotations

import subprocess
import sys

from bootstrap import PINS, find_uv, torch_source

HEADERS = {
    "cpu": "# The whole environment on a machine without a GPU, Python 3.11 and newer, Linux x86_64.\n",
    "cuda": (
        "# The whole environment on a machine with an NVIDIA GPU, Python 3.11, Linux x86_64.\n"
        "# Resolved, but not run: the project's continuous tests have no GPU.\n"
    ),
    "dev": "# Tests, gates and build tools, beside either of the two environments.\n",
}
HOW = "# Written by `make pins` from {name}.in. Install with --no-deps: what is not listed is left out on purpose.\n"


def main() -> None:
    cpu = resolve("cpu", prefer={})
    cuda = resolve("cuda", prefer=cpu)
    dev = resolve("dev", prefer=cpu)
    # The tools share libraries with the engine, and one file must fit both environments.
    clashes = sorted(
        name for name in dev.keys() & cpu.keys() | dev.keys() & cuda.keys() if cuda.get(name) != cpu.get(name)
    )
    if clashes:
        sys.exit(f"pin: cpu.txt and cuda.txt differ in what the development tools need too: {', '.join(clashes)}")
    write("cpu", cpu)
    write("cuda", cuda)
    write("dev", {name: version for name, version in dev.items() if name not in cpu})


def resolve(name: str, *, prefer: dict[str, str]) -> dict[str, str]:
    """The closure of requirements/NAME.in as {distribution: version}; preferred versions are kept where they fit."""
    out = PINS / f"{name}.txt"
    before = prefer | read(out)
    out.write_text(render(before))
    command = [find_uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.11"]
    command += ["--python-platform", "x86_64-manylinux_2_28", *torch_source(name), str(PINS / f"{name}.in")]
    overrides = PINS / f"{name}-overrides.txt"
    if overrides.exists():
        command += ["--override", str(overrides)]
    subprocess.run([*command, "--output-file", str(out)], check=True, stdout=subprocess.DEVNULL)
    return read(out)


def read(path) -> dict[str, str]:
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if "==" in line and not line.startswith(("#", "-"))]
    return dict(line.split(";")[0].strip().split("==", 1) for line in lines)


def render(pins: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def write(name: str, pins: dict[str, str]) -> None:
    (PINS / f"{name}.txt").write_text(HEADERS[name] + HOW.format(name=name) + render(pins))


if __name__ == "__main__":
    main()

"""Environments on disk that hold no package, only the names of some: what `packages_beside` reads."""

from __future__ import annotations

from pathlib import Path


def environment(folder: Path, program: str, *packages: str, code: str = "exit 1") -> Path:
    """`folder`/bin/`program`, a shell script of `code`, in an environment with these packages, each NAME-VERSION."""
    site = folder / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True, exist_ok=True)
    for package in packages:
        (site / f"{package}.dist-info").mkdir()
    for name in (program, "python"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
    return folder / "bin" / program

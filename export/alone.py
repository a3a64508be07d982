"""One process at a time in a folder: a lock that ends with its process, however that ends. Knows no artifact."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = ".mmq-lock"


@contextlib.contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """Hold `folder` against whoever else asks for it; where it is not there it is made, and taken away again if nothing
    comes into it. ValueError where another process has it: `command` is what they both are."""
    new = not folder.exists()
    if not new and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another `{command}` works in {folder}; wait for it, or name another folder with -o"
                ) from None
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # else it was taken away by who had it, between the two lines above
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

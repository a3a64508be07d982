"""A program run to its end, and what it says meanwhile: its lines, and the bars that it draws with tqdm, as steps."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from ..recipes.progress import Step, Tell
from ..serve.running import end

_BAR = re.compile(r"^(?P<what>.*?):?\s*\d+%\|.*?\|\s*(?P<done>\d+)/(?P<total>\d+)\s")  # as tqdm draws it
NOTE = 60  # letters of a line


def clean() -> dict[str, str]:
    """This process's variables without those that lead another Python back into its own environment."""
    drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return {"OMP_WAIT_POLICY": "PASSIVE", **kept, "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}


def follow(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
    cwd: Path | None = None,
) -> tuple[int, str]:
    """Run `command` to its end: (exit code, last line that is not empty).

    Every byte is added to `log`, every line goes to `on_line`; a carriage return ends a line too. Whatever interrupts
    this ends the command and its children.
    """
    last = ""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout, file):
                last = line
                on_line(line)
            return process.wait(), last
        finally:
            if process.poll() is None:
                end(process)


def _lines(pipe: IO[bytes], copy: IO[bytes]) -> Iterator[str]:
    rest = b""
    while piece := os.read(pipe.fileno(), 65536):
        copy.write(piece)
        copy.flush()
        *whole, rest = re.split(rb"[\r\n]", rest + piece)
        yield from (text for line in whole if (text := plain(line)))
    if text := plain(rest):
        yield text


def plain(line: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode("utf-8", "replace")).strip()


def listener(name: str, tell: Tell) -> Callable[[str], None]:
    """A function that takes each line of the program `name` and tells a step of it."""
    last = [0, 1]

    def hear(line: str) -> None:
        bar = _BAR.match(line)
        if bar:
            last[:] = int(bar["done"]), int(bar["total"])
        tell(Step(name, last[0], last[1], (bar["what"] if bar else line)[:NOTE]))

    return hear

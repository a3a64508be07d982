"""What a program says while it works, as steps: the bars that it draws with tqdm as they are, other lines as notes."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..recipes.progress import Step, Tell

_BAR = re.compile(r"^(?P<what>.*?):?\s*\d+%\|.*?\|\s*(?P<done>\d+)/(?P<total>\d+)\s")  # as tqdm draws it
NOTE = 60  # letters of a line


def listener(name: str, tell: Tell) -> Callable[[str], None]:
    """A function that takes each line of the program `name` and tells a step of it."""
    last = [0, 1]

    def hear(line: str) -> None:
        bar = _BAR.match(line)
        if bar:
            last[:] = int(bar["done"]), int(bar["total"])
        tell(Step(name, last[0], last[1], (bar["what"] if bar else line)[:NOTE]))

    return hear

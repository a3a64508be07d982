"""Turn a recording of a terminal into an SVG of what stood on the screen.

    script -qec "stty cols 100; make demo" demo.typescript
    uv run --no-project --with pyte --with rich tools/terminal_picture.py demo.typescript docs/demo.svg

A terminal emulator replays the recording, so progress bars show as they ended and nothing is drawn by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

WIDTH, HEIGHT = 100, 2000
COLOURS = {"brown": "yellow", "default": None}


def screen_of(recording: str) -> list[Text]:
    """The lines of the screen after the whole recording was played."""
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.Stream(screen)
    body = re.sub(r"\A(Script started.*?\n)|\n?Script done.*", "", recording, flags=re.S)
    stream.feed(body)
    lines = []
    for y in range(HEIGHT):
        line = Text()
        for x in range(WIDTH):
            cell = screen.buffer[y][x]
            colour = COLOURS.get(cell.fg, cell.fg)
            if colour is not None and re.fullmatch(r"[0-9a-f]{6}", colour):
                colour = f"#{colour}"
            style = " ".join(filter(None, ["bold" if cell.bold else "", colour]))
            line.append(cell.data, style=style or None)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def main() -> None:
    recording = Path(sys.argv[1]).read_bytes().decode("utf-8", "replace")  # as it is: a carriage return is no newline
    console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in screen_of(recording):
        console.print(line, no_wrap=True, highlight=False)
    Path(sys.argv[2]).write_text(console.export_svg(title="make demo"), encoding="utf-8")


if __name__ == "__main__":
    main()

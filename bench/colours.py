"""The colours of a report, light and dark: one table, of which a page makes CSS variables and a slide plain colours.

Text has at least 4.5:1 to its ground and lines 3:1 (WCAG 2.2, 1.4.3 and 1.4.11). The first series, the one that others
are compared with, is grey; the others tell apart for the colour-blind too, and each has a mark of its own besides.
"""

from __future__ import annotations

import re
from pathlib import Path

SHIPPED = Path(__file__).parent / "page"  # the style sheets and the template
# role -> (light, dark)
ROLES = {
    "ground": ("#ffffff", "#14171b"),
    "raised": ("#f5f6f8", "#1c2126"),
    "line": ("#d5d9df", "#343b44"),
    "ink": ("#1a1d21", "#e8eaed"),
    "faint": ("#59616b", "#a5adb8"),
    "accent": ("#1f5fbf", "#7db0ff"),
    "good": ("#0b6b3f", "#5fd39a"),
    "bad": ("#a3231b", "#ff9d94"),
    "warn": ("#fff6e0", "#33290f"),
    "warn-line": ("#b7791f", "#d9a441"),
    "mark": ("#fbe9a9", "#5a4a12"),
    "s0": ("#5b6470", "#a9b2bd"),
    "s1": ("#1f5fbf", "#7db0ff"),
    "s2": ("#b04a08", "#f0a35c"),
    "s3": ("#0b7360", "#4cc9a4"),
    "s4": ("#8a3ea8", "#d39bef"),
    "s5": ("#a3231b", "#ff9d94"),
    "s6": ("#6d6000", "#d8c44a"),
    "s7": ("#0d6a8f", "#62c4ea"),
    "p0": ("#1d4e89", "#8ab4f8"),
    "p1": ("#2f6db5", "#5d93e0"),
    "p2": ("#8a5a00", "#e0b060"),
    "p3": ("#4d6b2f", "#a3c585"),
    "p4": ("#646b75", "#9aa3ad"),
    "p5": ("#7a5195", "#c0a0e0"),
}
SERIES = 8  # s0 to s7, then from s1 again
PARTS = 6


def series(index: int) -> str:
    """The class of the line and marks of the subject with this index, the first being 0."""
    return f"s{index if index < SERIES else 1 + (index - 1) % (SERIES - 1)}"


def part(index: int) -> str:
    """The class of a part of a stack."""
    return f"p{index % PARTS}"


def variables() -> str:
    """CSS: every role as a variable, the dark ones where the reader's system is dark. Paper is light."""

    def lines(which: int) -> str:
        return "".join(f"--{name}:{pair[which]};" for name, pair in ROLES.items())

    return f":root{{{lines(0)}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{lines(1)}}}}}\n"


def resolved(css: str, *, dark: bool = False) -> str:
    """The CSS with its variables replaced by colours, for a renderer that knows none. KeyError for an unknown one."""
    return re.sub(r"var\(--([\w-]+)\)", lambda found: ROLES[found.group(1)][int(dark)], css)


def shipped(name: str) -> str:
    """A style sheet or template of the page."""
    return (SHIPPED / name).read_text(encoding="utf-8")

"""Text from outside, put into Markdown so that it is text there and nothing else: no link, no HTML, no table cell."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

LONGEST = 300  # characters of one field


def inert(text: object, *, longest: int = LONGEST) -> str:
    """One line of running text or of a table cell, of at most `longest` characters: what Markdown or HTML would take
    for its own is escaped, control and direction characters are left out."""
    plain = "".join(" " if c.isspace() else c for c in str(text) if c.isspace() or unicodedata.category(c)[0] != "C")
    plain = " ".join(plain.split())
    plain = plain if len(plain) <= longest else f"{plain[: longest - 3]}..."
    plain = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", plain)
    plain = re.sub(r"^([-+#=>])", r"\\\1", plain)  # what means something at the start of a line
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace("\\>", "&gt;").replace(">", "&gt;")
    # a bare address becomes a link and a bare name a mention, unless a character of each is told by its number
    plain = plain.replace("://", "&#58;//").replace("@", "&#64;")
    return re.sub(r"(?i)\bwww\.", lambda m: f"{m[0][:-1]}&#46;", plain)


def fenced(lines: Sequence[str], language: str = "") -> str:
    """A block of code; its fence is longer than any run of backticks inside."""
    text = "\n".join("".join(c for c in line if c == "\t" or unicodedata.category(c)[0] != "C") for line in lines)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def link(text: object, url: str) -> str:
    """A link whose text is inert and whose address cannot end early; plain text where it is no http(s) address."""
    if not re.fullmatch(r"https?://[^\s<>\"'()\[\]`\\|]+", url):
        return inert(text)
    return f"[{inert(text)}]({url})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of inert cells, the first column to the left."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    text = ["| " + " | ".join(str(c) for c in line) + " |" for line in lines]
    return "\n".join([*text, *("| " + " | ".join(inert(c) for c in row) + " |" for row in rows)])

"""What is measured, a line each as soon as it is: a report is made of it, and a run that broke off taken up again.

A folder of results has a journal whose first line is what was asked. A folder without its report belongs to a run that
broke off; where the same is asked again, it goes on there. Knows lines of JSON, no measure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
REPORT = "report.json"
Line = dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """The open journal of the folder `place`; `lines` are all but the first, those of an earlier run among them."""

    place: Path
    lines: list[Line]

    def add(self, kind: str, **facts: Any) -> None:
        """Write down a finished thing."""
        text = json.dumps({"kind": kind, **facts}, ensure_ascii=False)
        with (self.place / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.lines.append(json.loads(text))

    def found(self, kind: str, **facts: Any) -> list[Line]:
        """The lines of this kind that have these facts, the oldest first."""
        return [line for line in self.lines if line["kind"] == kind and all(line.get(k) == v for k, v in facts.items())]


def open_journal(
    out: Path, asked: Mapping[str, Any], *, created: str, labels: Sequence[str], fresh: bool = False
) -> Journal:
    """The journal of a folder in `out`: that of an unfinished run which asked the same, the latest of them, else of a
    new folder named by the moment and the labels. `fresh` takes none up."""
    head = json.loads(json.dumps({"kind": "asked", **asked}))  # tuples become lists, as they will be when it is read
    for file in sorted(out.glob(f"*/{JOURNAL}"), reverse=True) if not fresh else ():
        lines = _lines(file)
        if lines and lines[0] == head and not (file.parent / REPORT).exists():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            if file.read_text(encoding="utf-8") != text:
                file.write_text(text, encoding="utf-8")  # without half a line at its end
            return Journal(file.parent, lines[1:])
    stem = "-".join([re.sub(r"\W", "", created[:19]), *labels])
    place = next(p for n in range(1, 1000) if not (p := out / (stem if n == 1 else f"{stem}-{n}")).exists())
    place.mkdir(parents=True)
    journal = Journal(place, [])
    (place / JOURNAL).write_text(json.dumps(head, ensure_ascii=False) + "\n", encoding="utf-8")
    return journal


def forget_unpaired(journal: Journal, labels: Sequence[str]) -> None:
    """Leave out runs of an earlier sitting whose pair was not made any more: both are made again, side by side."""
    made: dict[tuple[int, int], set[str]] = {}
    for line in journal.found("run"):
        made.setdefault((line["concurrency"], line["number"]), set()).add(line["label"])
    journal.lines[:] = [
        line
        for line in journal.lines
        if line["kind"] != "run" or made[line["concurrency"], line["number"]] >= set(labels)
    ]


def _lines(file: Path) -> list[Line]:
    """The whole lines of a journal; the last may be half of one."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found

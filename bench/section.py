"""A report as the part of a model card that tells quality and speed: two short Markdown tables and what they stand on.

Knows a Report; the card around it is export's.
"""

from __future__ import annotations

from ..export.inert import inert
from .headline import moment, ratio_cell, shown
from .proof import rows as proof_rows
from .report import Report, markdown_table
from .show import amount, show
from .table import load_line, sentence

ROWS = (  # measure, title
    ("weights", "model memory"),
    ("output_rate", "output tok/s"),
    ("ttft", "time to first token (ms)"),
    ("tpot", "time per output token (ms)"),
    ("max_length", "max length in {vram} (tokens)"),
    ("max_batch", "max batch in {vram} ({context} tokens each)"),
)


def card_section(report: Report) -> str:
    """Markdown: the verdicts, speed and memory of each label with ratios, the check's measures, and the conditions.

    What was not measured has no row, and without a check there is no table of quality. Labels and sentences are
    escaped: they show as they are, and are neither HTML nor links.
    """
    labels = list(shown(report).numbers)
    first, *others = labels
    head = ["", *labels, *(f"{other} / {first}" for other in others)]
    words = {"vram": amount(report.settings["vram"]), "context": f"{report.settings['context']:,}"}
    rows = []
    for key, name in ROWS:
        found = [numbers.get(key) for numbers in report.numbers.values()]
        if not any(found):
            continue
        hows = {f.how for f in found if f is not None} - {"measured"}
        ratios = [
            ratio_cell(key, f, found[0], report.ratios.get(o, {}).get(key))
            for o, f in zip(others, found[1:], strict=True)
        ]
        rows.append(
            [
                name.format(**words) + "".join(f", {how}" for how in sorted(hows)),
                *("-" if f is None else show(f) for f in found),
                *(r["value"] + (f" ({r['detail']})" if r["detail"] else "") for r in ratios),
            ]
        )
    lines = [f"- {sentence(verdict)}" for verdict in report.verdicts]
    lines += ["", "### Speed and memory", "", markdown_table(head, rows), _stands_on(report), ""]
    if quality := proof_rows(labels, {k: dict(v) for k, v in report.quality.items()}):
        lines += ["### Quality", "", markdown_table(["", *labels], quality)]
    return "\n".join(lines).strip() + "\n"


def _stands_on(report: Report) -> str:
    known = [r for found in report.ratios.values() for r in found.values() if r.low is not None]
    interval = f" In brackets: {known[0].level:.0%} intervals of pairs taken in turns." if known else ""
    machine = inert(report.machine.get("words", "a machine that was not told"))
    versions = inert(", ".join(f"{name} {number}" for name, number in report.versions.items()))
    taken = f"{machine}; {inert(report.engine)}; {versions}; {moment(report.created)}."
    return f"{inert(load_line(report))}. {taken}{interval} Speeds are of this machine alone; memory carries over."

"""A report as the table of the field and its Markdown: a column each, then each one's ratio to the first.

Reads a report; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..export.inert import fenced, inert
from .intervals import WIDE, unsure
from .proof import rows as proof_rows
from .proof import task_rows
from .report import Figure, Level, Report, markdown_table
from .show import amount, show
from .speed import Load
from .turns import runs_at

SPREAD = 1.25  # fastest run over slowest: beyond it the rates are not to be trusted
ENOUGH = 100  # requests of which a p99 is more than the slowest one
ROWS = (  # measure, title
    ("input_rate", "input tok/s"),
    ("output_rate", "output tok/s"),
    ("time", "time (s)"),
    ("weights", "model memory"),
    ("peak_memory", "memory at peak"),
    ("server_memory", "server's memory, all processes"),
    ("card_memory", "GPU memory, cache included"),
    ("max_length", "max length in {vram} (tokens)"),
    ("max_batch", "max batch in {vram} ({context} tokens each)"),
    ("ttft", "time to first token, median (ms)"),
    ("ttft_p90", "time to first token, p90 (ms)"),
    ("ttft_p99", "time to first token, p99 (ms)"),
    ("tpot", "time per output token, median (ms)"),
    ("tpot_p90", "time per output token, p90 (ms)"),
    ("tpot_p99", "time per output token, p99 (ms)"),
    ("itl", "between tokens, median (ms)"),
    ("itl_p90", "between tokens, p90 (ms)"),
    ("itl_p99", "between tokens, p99 (ms)"),
    ("e2e", "a whole answer, median (ms)"),
    ("e2e_p90", "a whole answer, p90 (ms)"),
    ("e2e_p99", "a whole answer, p99 (ms)"),
    ("energy", "energy of the card (J per output token)"),
    ("decode_limit", "decoding cannot exceed, by the card's bandwidth (tok/s)"),
    ("decode_projected", "decoding at the share of it reached here (tok/s)"),
)
LONG = 1000  # characters of a sentence: of many levels, with an engine's reason
MODES = {
    "together": "all servers up at once, their runs in turns",
    "restart": "one server at a time, started alternately; all runs of a start count as one",
    "off": "one server after the other, all its runs at once",
}


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of the field: a column each, then each one's ratio to the first."""
    labels = list(report.numbers)
    first = labels[0]
    head = ["", *labels, *(f"{label} / {first}" for label in labels[1:])]
    words = {"vram": amount(report.settings["vram"]), "context": report.settings["context"]}
    rows = []
    for key, title in ROWS:
        found = [report.numbers[label].get(key) for label in labels]
        if any(f is None for f in found):
            continue
        shown = [f for f in found if f is not None]
        told = sorted({f.how for f in shown} - {"measured"})
        ratios = [_ratio(report, label, key, f, shown[0]) for label, f in zip(labels[1:], shown[1:], strict=True)]
        rows.append([", ".join([title.format(**words), *told]), *map(show, shown), *ratios])
    quality = [*proof_rows(labels, report.quality), *task_rows(labels, report.quality)]
    return head, rows + [[*row, *[""] * len(labels[1:])] for row in quality]  # no ratio says anything of a quality


def _ratio(report: Report, label: str, key: str, figure: Figure, first: Figure) -> str:
    paired = report.ratios.get(label, {}).get(key)
    if paired is not None and paired.low is not None and paired.high is not None:
        within = f"{paired.low:.2f} to {paired.high:.2f}" if paired.high < WIDE * paired.low else "noise"
        return f"{paired.value:.2f}x ({within})"
    value = paired.value if paired is not None else figure.value / first.value if first.value else None
    return "-" if value is None else f"{value:.2f}x"


def sweep_table(report: Report, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of latency against load: a row a label and concurrency; `brief`: without p90, for a terminal."""
    endings = ("", "_p99") if brief else ("", "_p90", "_p99")
    times = [f"{name}{ending}" for name in ("ttft", "tpot", "e2e") for ending in endings]
    head = ["at once", "output tok/s", *(name.partition("_")[2] or name.upper() for name in times)]
    rows = []
    for label, levels in report.sweep.items():
        rows += [[f"{label}, {level.concurrency}", *_cells(level, ["output_rate", *times])] for level in levels]
    return head, rows


def _cells(level: Level, names: Sequence[str]) -> list[str]:
    return [show(level.numbers[name]) if name in level.numbers else "-" for name in names]


def stage_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of where one request's time goes, ms: a row a label."""
    names = list(dict.fromkeys(name for found in report.stages.values() for name in found))
    rows = [[v, *(show(f[n]) if n in f else "-" for n in names)] for v, f in report.stages.items()]
    return ["", *(name.replace("_", " ") for name in names)], rows


def load_line(report: Report) -> str:
    """What was asked of the servers, for a reader."""
    load = load_of(report)
    return f"{load.words}; {load.runs} runs, their median"


def load_of(report: Report) -> Load:
    """What was asked of the servers."""
    load: Mapping[str, Any] = report.settings["load"]
    return Load(**{**load, "picture": tuple(load["picture"])})


def tails(report: Report, *, sweep: bool = False) -> str:
    """A sentence for a reader of percentiles, where there were too few requests for the highest of them, under the load
    of the table or at any level of the `sweep`; else ""."""
    load = load_of(report)
    levels = report.settings.get("levels", ()) if sweep else ()
    least = min(load.at(n).requests * runs_at(load, n) for n in [load.concurrency, *levels])
    where = ", as one level has," if levels else ""
    return f"Of {least} requests{where} a p99 is little else than the slowest." if least < ENOUGH else ""


def warnings(report: Report) -> list[str]:
    """What a reader must know before believing the figures: what failed, what was too noisy, what was not held to."""
    settings = report.settings
    said = [f"{label} failed: {why}" for label, why in settings.get("failed", {}).items()]
    first = next(iter(report.numbers), "")
    for label, found in report.ratios.items():
        rate = found.get("output_rate")
        if rate is not None and unsure(rate):
            said.append(
                f"too noisy to say whether {label} or {first} is faster: output tok/s {rate.low:.2f}x to "
                f"{rate.high:.2f}x at {rate.level:.0%} confidence, {rate.pairs} pairs; measure again when the "
                "machine is quiet, or with more --runs"
            )
    for label, found in report.numbers.items():
        rate = found["output_rate"]
        if rate.low and rate.high and rate.high > SPREAD * rate.low:
            said.append(
                f"{label}: output tok/s from {rate.low:.1f} to {rate.high:.1f} between runs of one load; "
                "something else uses this machine, measure again when it is quiet"
            )
    if len(report.numbers) > 1 and settings.get("interleave", {}).get("mode") == "off":
        said.append(
            "runs were not taken in turns: what the machine did meanwhile is in the ratios, which have no interval"
        )
    return said + list(settings.get("notes", []))


def markdown(report: Report) -> str:
    """The report as Markdown: the table, the sweep, the load, the machine, the versions, the commands."""
    settings = report.settings
    head, rows = table(report)
    spread = []
    for label, found in report.numbers.items():
        rate = found["output_rate"]
        spread.append(f"{label} {rate.low:.1f} to {rate.high:.1f}")
    versions_line = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines = [f"# {inert(' against '.join(report.numbers))}: speed and memory", ""]
    lines += [f"- {sentence(verdict)}" for verdict in report.verdicts] + [""] * bool(report.verdicts)
    lines += [markdown_table(head, rows)]
    if any(len(levels) > 1 for levels in report.sweep.values()):
        lines += ["## Latency against load", "", markdown_table(*sweep_table(report))]
        lines += [
            "TTFT: time to first token; TPOT: time per output token; E2E: a whole answer; median and so on, ms.",
            *filter(None, [tails(report, sweep=True)]),
            "",
        ]
    if report.stages:
        sizes = "One request alone on the server, ms; docs/bench.md says what each figure contains."
        lines += ["## Where one request's time goes", "", markdown_table(*stage_table(report)), sizes, ""]
    lines.append(f"- Load: {inert(load_line(report))}. Output tok/s over the runs: {sentence('; '.join(spread))}.")
    if "interleave" in settings and len(report.numbers) > 1:
        mode = MODES[settings["interleave"]["mode"]]
        how = (
            "the mean of the log ratios of paired runs (so not the quotient of medians), with its 95% t interval where "
        )
        how += "there is one"
        lines.append(f"- In turns: {mode}. Ratios: {how}.")
    lines += [
        f"- {budget_line(report)}",
        *(f"- {sentence(line)}" for line in settings.get("carries_over", ())),
        f"- Machine: {inert(report.machine['words'])}, {inert(report.machine['system'])}.",
        f"- Engine: {inert(report.engine)}; {inert(versions_line)}.",
        f"- Taken: {inert(report.created)}.",
        *(f"- Beware: {sentence(line)}." for line in warnings(report)),
        "",
    ]
    for label, subject in report.subjects.items():
        lines += [f"## {inert(label)}", "", f"{inert(subject['path'])}, digest {inert(subject['digest'])}", ""]
        lines += [fenced([subject["command"]]), ""]
    return "\n".join(lines)


def sentence(text: str) -> str:
    """A sentence of a report in Markdown: labels and an engine's last words are other people's."""
    return inert(text, longest=LONG)


def budget_line(report: Report) -> str:
    """What the memory figures are for, and how they came about."""
    settings = report.settings
    size, budget = amount(settings["vram"]), settings.get("budget", {})
    stated = f"{size} ({budget['card']})" if budget.get("card") else size
    energy = f" No energy: {budget['energy']}." if budget.get("energy") else ""
    if not budget.get("enforced"):
        why = f" ({budget['why']})" if budget.get("why") else ""
        return f"Memory: {stated} was computed by the planner, no engine was held to it here{why}.{energy}"
    seen = [f"{label} {amount(size)}" for label, size in budget.get("seen", {}).items() if size]
    told = f"at its peak NVML saw {', '.join(seen)}" if seen else "NVML did not tell what they took"
    carries = " Memory, max length and max batch carry over to that card; speed and energy do not."
    carries = "" if budget.get("here") else carries
    return f"Memory: the engine was given {stated} of this card; {told}.{carries}{energy}"

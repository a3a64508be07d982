"""compare: several checkpoints under the same engine, flags and load, one after the other; a report and its table.

Knows an engine by its name in `serve` alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes.progress import Tell, silent
from ..serve.engines import plan, weights_kept
from ..serve.flags import Launch, shell_line
from ..serve.footprint import footprint
from ..serve.machine import GIB, Machine, this_machine
from ..serve.programs import packages_beside
from ..serve.running import START_TIMEOUT, free_port, running
from ..serve.shape import context_length, read_config
from . import memory, speed
from .find import Subject, find
from .report import Figure, Report, describe, digest_of, markdown_table, now, versions
from .speed import CPU_LOAD, Load

SPREAD = 1.25  # fastest run over slowest: beyond it the rates are not to be trusted
CONTEXT = 2048  # tokens, as the field's own tables have it
# random prompts would hit no cache, but warm-ups and repetitions may: switched off, so every run does all its work
SAME_FOR_ALL = {"vllm": ("--no-enable-prefix-caching",)}  # the other engines keep no prefix unless told to


def compare(
    names: Sequence[str],
    *,
    folder: Path = Path(),
    out: Path = Path("bench-results"),
    vram: int = 24 * GIB,
    context: int = CONTEXT,
    load: Load | None = None,
    engine: str = "vllm",
    engine_bin: str | Path | None = None,
    extra: Sequence[str] = (),
    trust_remote_code: bool = False,
    timeout: float = START_TIMEOUT,
    tell: Tell = silent,
) -> tuple[Report, Path]:
    """Serve and measure each of `names` (see `find.find`); returns the report and the folder it belongs into.

    The folder, new in `out`, has the engine's logs and the load generator's raw JSON; `write_report` completes it.
    Max length and max batch are for `vram` bytes at `context` tokens: measured where a GPU can be given just this
    budget, computed elsewhere. `extra` flags go to every server. ValueError for names, RuntimeError for the engine.
    """
    subjects = find(names, folder=folder, tell=tell)
    for subject in subjects:
        longest = context_length(read_config(subject.path))
        if context > longest:
            raise ValueError(f"a context of {context} tokens is more than {subject.label} can do: {longest}")
    machine = this_machine()
    load = load or (Load() if machine.gpus else CPU_LOAD)
    created = now()
    place = out / "-".join([re.sub(r"\W", "", created[:19]), *(s.label for s in subjects)])
    flags, budgeted = _budget_flags(engine, machine, vram, extra)
    described, numbers, raw, packages = {}, {}, {}, {}
    for subject in subjects:
        launch = plan(
            engine,
            subject.path,
            machine=machine,
            port=free_port(),
            max_model_len=context,
            served_model_name=subject.label,
            trust_remote_code=trust_remote_code,
            engine_bin=engine_bin,
            extra=flags,
        )
        with running(launch, timeout=timeout, log_path=place / f"{subject.label}.log", tell=tell) as server:
            runs = speed.measure(
                server.url,
                model=server.name,
                tokenizer=subject.path.resolve(),
                load=load,
                out=place,
                label=subject.label,
                tell=tell,
            )
            taken = footprint(server)
        numbers[subject.label] = {
            **speed.figures(runs),
            **memory.figures(
                subject.path,
                budget=vram,
                context=context,
                measured=taken,
                same_budget=budgeted,
                weights=weights_kept(engine, subject.path),
            ),
            "startup": Figure(server.startup_s, "s", "measured"),
        }
        raw[subject.label] = {"runs": [dataclasses.asdict(r) for r in runs], "footprint": dataclasses.asdict(taken)}
        described[subject.label] = _describe(subject, launch)
        packages = packages_beside(Path(launch.argv[0]))
    report = Report(
        kind="bench",
        created=created,
        engine=engine,
        subjects=described,
        numbers=numbers,
        raw=raw,
        settings={
            "load": dataclasses.asdict(load),
            "vram": vram,
            "context": context,
            "reserve": memory.RESERVE,
            "budget_given_to_engine": budgeted,
        },
        machine=describe(machine),
        versions=versions(packages),
    )
    return report, place


def _budget_flags(engine: str, machine: Machine, vram: int, extra: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Flags for all servers, and whether they hold the engine to `vram` bytes: only vLLM on a GPU with that much free
    can."""
    flags = (*SAME_FOR_ALL.get(engine, ()), *extra)
    if (
        engine != "vllm"
        or not machine.gpus
        or vram > 0.97 * machine.gpus[0].free
        or "--gpu-memory-utilization" in extra
    ):
        return flags, False
    return ("--gpu-memory-utilization", f"{vram / machine.gpus[0].memory:.4f}", *flags), True


def _describe(subject: Subject, launch: Launch) -> dict[str, Any]:
    described: dict[str, Any] = {"path": subject.shown, "digest": digest_of(subject.path)}
    if subject.artifact is not None:
        manifest = subject.artifact.manifest
        described |= {k: manifest.get(k) for k in ("name", "method", "format", "group_size", "base")}
    # as a reader would type it: the program by its name, the checkpoint by its own
    program, *words = launch.argv
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))  # the folder stands before
    typed = (Path(program).name, *words[: first - 1], subject.shown, *words[first:])
    return described | {"command": shell_line(dataclasses.replace(launch, argv=typed))}


ROWS = (  # measure, title
    ("input_rate", "input tok/s"),
    ("output_rate", "output tok/s"),
    ("time", "time (s)"),
    ("weights", "model memory"),
    ("max_length", "max length in {vram} (tokens)"),
    ("max_batch", "max batch in {vram} ({context} tokens each)"),
    ("ttft", "time to first token, median (ms)"),
    ("ttft_p99", "time to first token, p99 (ms)"),
    ("tpot", "time per output token, median (ms)"),
    ("tpot_p99", "time per output token, p99 (ms)"),
    ("server_memory", "server's memory, all processes"),
    ("card_memory", "GPU memory, cache included"),
)


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of the field: a column each, then each one's ratio to the first."""
    labels = list(report.numbers)
    first = labels[0]
    head = ["", *labels, *(f"{label} / {first}" for label in labels[1:])]
    words = {"vram": _amount(report.settings["vram"]), "context": report.settings["context"]}
    rows = []
    for key, title in ROWS:
        found = [report.numbers[label].get(key) for label in labels]
        if found[0] is None or any(f is None for f in found):
            continue
        shown = [f for f in found if f is not None]
        computed = ", computed" if any(f.how == "computed" for f in shown) else ""
        ratios = [f"{f.value / shown[0].value:.2f}x" if shown[0].value else "-" for f in shown[1:]]
        rows.append([title.format(**words) + computed, *map(_show, shown), *ratios])
    return head, rows


def _show(figure: Figure) -> str:
    if figure.unit == "bytes":
        return _amount(figure.value)
    if figure.unit in ("tokens", "sequences"):
        return f"{figure.value:,.0f}"
    return f"{figure.value:.1f}" if figure.value >= 100 else f"{figure.value:.2f}"


def _amount(size: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} B"


def load_line(report: Report) -> str:
    """What was asked of the servers, for a reader."""
    load: Mapping[str, Any] = report.settings["load"]
    height, width = load["picture"]
    pictures = f"{load['pictures']} picture(s) of {height} x {width}" if load["pictures"] else "no picture"
    return (
        f"{load['requests']} requests, {load['concurrency']} at once, each {load['input_tokens']} random tokens and "
        f"{pictures} in, {load['output_tokens']} tokens out; {load['runs']} runs, their median"
    )


def warnings(report: Report) -> list[str]:
    """What a reader must know before believing the rates: runs of one load that differ much, by the label."""
    said = []
    for label, found in report.numbers.items():
        rate = found["output_rate"]
        if rate.low and rate.high and rate.high > SPREAD * rate.low:
            said.append(
                f"{label}: output tok/s from {rate.low:.1f} to {rate.high:.1f} between runs of one load; "
                "something else uses this machine, measure again when it is quiet"
            )
    return said


def markdown(report: Report) -> str:
    """The report as Markdown: the table, the load, the machine, the versions, the commands."""
    head, rows = table(report)
    spread = []
    for label, found in report.numbers.items():
        rate = found["output_rate"]
        spread.append(f"{label} {rate.low:.1f} to {rate.high:.1f}")
    versions_line = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    reserve = f"{report.settings['reserve']:.0%}"
    lines = [
        f"# {' against '.join(report.numbers)}: speed and memory",
        "",
        markdown_table(head, rows),
        f"- Load: {load_line(report)}. Output tok/s over the runs: {'; '.join(spread)}.",
        f"- Computed figures: {_amount(report.settings['vram'])} less {reserve} for activations, less the weights, "
        "divided by the cache's bytes per token.",
        f"- Machine: {report.machine['words']}, {report.machine['system']}.",
        f"- Engine: {report.engine}; {versions_line}.",
        f"- Taken: {report.created}.",
        *(f"- Beware: {line}." for line in warnings(report)),
        "",
    ]
    for label, subject in report.subjects.items():
        lines += [f"## {label}", "", f"`{subject['path']}`, digest `{subject['digest']}`", ""]
        lines += ["```", subject["command"], "```", ""]
    return "\n".join(lines)

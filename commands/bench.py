"""mmq bench: speed and memory of several checkpoints side by side."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from .options import bin_option, heeded, json_option
from .report import show_history
from .terminal import next_step, progress, show_table

MODES = ["auto", "together", "restart", "off"]


def _levels(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...] | None:
    """ "1,8,32", or () for none, None for as far as it goes."""
    if value in ("auto", "none"):
        return None if value == "auto" else ()
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: write 1,8,32, or auto, or none") from None


def _names(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (value or "").split(",") if word.strip())


@click.command("bench")
@click.argument("names", nargs=-1)
@click.option(
    "--compare", is_flag=True, help="NAMES side by side, each against the first (what several names do anyway)."
)
@click.option("--quick", is_flag=True, help="The shortest run that says something: two loads, few requests.")
@click.option("--engine", default="vllm", show_default=True, help="vllm, lmdeploy or pytorch.")
@bin_option
@click.option("--vram", metavar="SIZE", help="The memory that all memory figures are for.  [default: 24GiB]")
@click.option("--card", metavar="NAME", help="A card by name instead: 4090, 3090, a10, l4, ...")
@click.option("--context", type=int, default=2048, show_default=True, help="Tokens a sequence, for max batch.")
@click.option(
    "--sweep",
    callback=_levels,
    default="auto",
    show_default=True,
    metavar="LEVELS",
    help="Requests at once to measure at besides: 1,8,32; auto: 1, 8, 32, ... until output tok/s grow no more; none.",
)
@click.option("--concurrency", type=int, help="Requests under way at once, for the table.")
@click.option("--requests", type=int, help="Requests in a run.")
@click.option("--runs", type=int, help="Runs of each, in turns, of which the median is told.")
@click.option("--input-tokens", type=int, help="Random words of a prompt, in tokens.")
@click.option("--output-tokens", type=int, help="Tokens of each answer, exactly.")
@click.option("--pictures", type=int, help="Random pictures of a request.")
@click.option("--picture", type=(int, int), metavar="HEIGHT WIDTH", help="Their size in pixels.")
@click.option("--dataset", metavar="FILE", help="Your own JSONL as the load, as `infer` takes it (x.jsonl#100).")
@click.option(
    "--interleave",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="How variants take turns: all servers up together (auto, where memory lets), started alternately, or not.",
)
@click.option(
    "--capacity/--no-capacity",
    default=None,
    help="Run the largest batch and the longest context too.  [default: where the engine is held to the budget]",
)
@click.option(
    "--stages/--no-stages", default=True, show_default=True, help="Time preprocessing, tower, prefill, decode."
)
@click.option(
    "--answers",
    type=int,
    default=4,
    show_default=True,
    help="Held-out questions with a picture, answered side by side.",
)
@click.option(
    "--tasks", callback=_names, metavar="NAMES", help="Tasks of lm-eval: mmmu_val,chartqa, or a YAML of your own."
)
@click.option("--tasks-limit", type=int, metavar="N", help="The first N questions of each task.")
@click.option("--fresh", is_flag=True, help="Take up no run that broke off.")
@click.option("--trust-remote-code", is_flag=True, help="Let the checkpoints' own Python files run.")
@click.option("--engine-flags", default="", metavar="FLAGS", help='More flags for every server: "--dtype half".')
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
@click.option(
    "--history",
    "past",
    is_flag=False,
    flag_value="bench-results",
    metavar="[FOLDER]",
    help="Measure nothing: exit 1 if the newest report in FOLDER (bench-results) is worse than earlier ones by more "
    "than noise.",
)
@json_option
def command(
    names: tuple[str, ...],
    past: str | None,
    compare: bool,
    quick: bool,
    vram: str | None,
    out: Path,
    engine_flags: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure NAMES under one engine and one load: speed by load, memory, max length, max batch.

    A name is fp16 (the common base), a method or a name among the artifacts of this folder, or a path. A run that broke
    off goes on where it stopped; exit 3 where a variant's engine died, with the others' figures.
    """
    if past is not None:
        if names:
            raise ValueError("--history measures nothing: give it no NAMES, or leave it out")
        heeded("--history", "as_json")
        show_history(Path(past), as_json=as_json)
        return
    from ..bench.compare import compare as measure
    from ..bench.page import write_page
    from ..bench.report import parse_bytes, write_report
    from ..bench.speed import asked_of, load_here
    from ..bench.table import load_line, markdown, sweep_table, table, tails, warnings

    load = load_here(quick=quick, **{name: given.pop(name) for name in asked_of(given)})
    if quick and given["sweep"] is None:
        given["sweep"] = (1,)
    options: dict[str, Any] = {"vram": parse_bytes(vram) if vram else None, "extra": shlex.split(engine_flags)}
    with progress(quiet=as_json) as tell:
        report, place = measure(names, out=out, load=load, tell=tell, **options, **given)
    typed = {**report.settings, "command": shlex.join(["mmq", *sys.argv[1:]])}
    report = dataclasses.replace(report, settings=typed)
    data, text = write_report(report, place, markdown=markdown(report))
    shown = write_page(report, place)
    failed = report.settings["failed"]
    if as_json:
        click.echo(data.read_text(encoding="utf-8"))
    else:
        show_table(*table(report))
        show_table(*sweep_table(report, brief=True))
        for verdict in report.verdicts:
            click.echo(verdict)
        for line in warnings(report):
            click.secho(f"warning: {line}", fg="yellow", err=True)
        click.echo(f"load: {load_line(report)}")
        if few := tails(report, sweep=True):
            click.echo(few)
        click.echo(f"report: {shown} and {text.name}, raw samples: {data.name}")
    if failed:
        raise RuntimeError("; ".join(f"{label}: {why}" for label, why in failed.items()))
    if not as_json:
        *_, last = report.subjects.values()
        made = next((told for told in report.subjects.values() if "method" in told), last)
        trust = ["--trust-remote-code"] if given["trust_remote_code"] else []
        next_step("mmq", "serve", *trust, made["path"])

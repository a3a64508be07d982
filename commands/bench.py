"""mmq bench: speed and memory of several checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import bin_option, json_option
from .terminal import next_step, progress, show_table


@click.command("bench")
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--compare", is_flag=True, help="NAMES side by side, each against the first (what several names do anyway)."
)
@click.option("--engine", default="vllm", show_default=True)
@bin_option
@click.option("--vram", default="24GiB", show_default=True, help="The memory that max length and max batch are for.")
@click.option("--context", type=int, default=2048, show_default=True, help="Tokens a sequence, for max batch.")
@click.option("--requests", type=int, help="Requests in a run.")
@click.option("--concurrency", type=int, help="Requests under way at once.")
@click.option("--runs", type=int, help="Runs, of which the median is told.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
@json_option
def command(
    names: tuple[str, ...],
    compare: bool,
    engine: str,
    engine_bin: str | None,
    vram: str,
    context: int,
    out: Path,
    as_json: bool,
    **asked: Any,
) -> None:
    """Measure NAMES under one engine and one load: speed, memory, max length, max batch.

    A name is fp16 (the common base), a method or a name among the artifacts of this folder, or a path.
    """
    from ..bench.compare import compare as measure
    from ..bench.compare import load_line, markdown, table, warnings
    from ..bench.report import parse_bytes, write_report
    from ..bench.speed import load_here

    load = load_here(**asked)
    options: dict[str, Any] = {"vram": parse_bytes(vram), "context": context, "load": load}
    options |= {"engine": engine, "engine_bin": engine_bin}
    with progress(quiet=as_json) as tell:
        report, place = measure(names, out=out, tell=tell, **options)
    data, text = write_report(report, place, markdown=markdown(report))
    if as_json:
        click.echo(data.read_text(encoding="utf-8"))
        return
    show_table(*table(report))
    for line in warnings(report):
        click.secho(f"warning: {line}", fg="yellow", err=True)
    click.echo(f"load: {load_line(report)}")
    click.echo(f"report: {text}, raw samples: {data}")
    next_step("mmq serve " + str(next((s["path"] for s in report.subjects.values() if "method" in s), names[-1])))

"""mmq run: recipes times methods, from checkpoint to hub, as a CI job does it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..recipes.sets import CHECKED
from .options import device_option, hub_options, json_option
from .publish import command as publisher
from .terminal import progress, show_table

if TYPE_CHECKING:
    from ..bench.done import Done


@click.command("run")
@click.argument("recipes", nargs=-1, required=True)
@click.option("--methods", metavar="NAME,...", help="awq, gptq, bnb, rtn: each recipe by each.  [default: its own]")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("mmq-run"), show_default=True, help="Artifacts, logs."
)
@click.option("--samples", type=int, default=CHECKED, show_default=True, help="Held-out samples of a check.")
@click.option(
    "--check",
    "engines",
    multiple=True,
    type=click.Choice(["vllm", "pytorch"]),
    help="Check each artifact as this engine serves it, too. Repeatable.",
)
@click.option("--bench", type=click.Choice(["quick", "full"]), help="Measure each artifact beside its 16-bit base.")
@click.option(
    "--publish",
    multiple=True,
    metavar="HUB:OWNER/NAME",
    help="Publish what passes, as hf:org/{name}-{method}; modelscope: too. Repeatable.",
)
@click.option(
    "--ray", "cluster", metavar="ADDRESS", help="Spread the recipes over a Ray cluster: local, auto, HOST:PORT."
)
@click.option("--summary", type=click.Path(path_type=Path), help="Write a page in Markdown, as $GITHUB_STEP_SUMMARY.")
@click.option("--list", "listed", is_flag=True, help="Tell what would be made; with --json as a CI matrix.")
@click.option("--max-vram", metavar="SIZE", help="GPU memory to stay inside, as 24GiB.  [default: what is free]")
@click.option("--trust-remote-code", "trust", is_flag=True, help="Let a checkpoint's Python run, if its recipe asks.")
@device_option
@hub_options[0]
@json_option
def command(
    recipes: tuple[str, ...],
    methods: str | None,
    publish: tuple[str, ...],
    cluster: str | None,
    summary: Path | None,
    listed: bool,
    trust: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Quantize, check and publish RECIPES (files, names, folders or hub ids), each by each method.

    What is there already, of the same recipe, base, calibration and quantizer, is kept; what was interrupted goes on;
    what fails does not stop the others. Flags after `--` go to `mmq publish`. Exit code: the worst job's.
    """
    from ..bench.jobs import addresses, as_matrix, check_addresses, check_apart, matrix

    flags = next((i for i, word in enumerate(recipes) if word.startswith("-")), len(recipes))
    recipes, rest = recipes[:flags], recipes[flags:]
    if rest and not publish:
        raise ValueError(f"{' '.join(rest)} is for `mmq publish`; give --publish, or leave it out")
    check_addresses(publish)
    check_flags(rest)
    each = [word.strip() for word in methods.split(",")] if methods else ()
    jobs = matrix(recipes, each, trust=trust, publish=publish)
    check_apart(publish, jobs)
    if listed:
        if as_json:
            click.echo(json.dumps(as_matrix(jobs), ensure_ascii=False))
        else:
            show_table(["artifact", "recipe", ""], [[job.name, job.source, job.problem] for job in jobs])
        return
    from ..bench.done import facts, worst, write
    from ..bench.run import run
    from ..bench.run_page import markdown
    from ..bench.steps import Settings
    from ..export.remote import parse_target
    from ..export.upload import check_logins

    check_logins(parse_target(place) for job in jobs if job.recipe for place in addresses(publish, job))
    settings = Settings(publish=publish, publish_flags=rest, **how)
    results: list[Done] = []

    def keep(found: Sequence[Done]) -> None:
        results[:] = found
        write(found, settings.out / "run.json")
        if summary:
            summary.write_text(markdown(found), encoding="utf-8")

    try:
        with progress(quiet=as_json) as tell:
            if cluster:
                from ..bench.run_ray import run_on_ray

                run_on_ray(jobs, settings, address=cluster, on_done=keep, tell=tell)
            else:
                run(jobs, settings, on_done=keep, tell=tell)
    finally:
        if results and as_json:
            click.echo(json.dumps(facts(results), ensure_ascii=False))
        elif results:
            show(results, settings.out)
    sys.exit(worst(results))


def check_flags(flags: Sequence[str]) -> None:
    """click's own error for what is no flag of `mmq publish`, which would be known hours later otherwise."""
    with publisher.make_context("mmq publish", ["ARTIFACT", "hf:owner/name", *flags]) as context:
        if more := context.params["targets"][1:]:
            raise ValueError(f"{more[0]} stands among the flags for `mmq publish`; addresses are --publish {more[0]}")


def show(results: Sequence[Done], out: Path) -> None:
    """The table, a line for whatever went wrong, and where the rest is."""
    from ..bench.run_page import HEAD, rows

    show_table(list(HEAD), rows(results))
    for result in results:
        for line in result.why:
            click.secho(f"mmq: {result.name}: {line}", fg="red", err=True)
    click.echo(f"results: {out / 'run.json'}, logs: {out / 'logs'}")

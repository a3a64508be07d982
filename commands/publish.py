"""mmq publish: an artifact that passed its check, to a hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .options import bin_option, json_option
from .terminal import progress, show_table


@click.command("publish")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("targets", metavar="HUB:OWNER/NAME...", nargs=-1, required=True)
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made.  [default: private]")
@click.option("--tag", metavar="NAME", help="The tag of this publish.  [default: v and the recipe's version]")
@click.option("--dry-run", is_flag=True, help="Send nothing; tell what would be, and leave the card in ARTIFACT.")
@click.option("--no-gate", "gated", flag_value=False, default=True, help="Publish past the gate; the card says so.")
@click.option("--no-reload", "reload", flag_value=False, default=True, help="Do not load a clean copy in an engine.")
@click.option("--engine", type=click.Choice(["vllm", "lmdeploy", "pytorch"]), default="vllm", show_default=True)
@bin_option
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="A report of `mmq bench` for the card.  [default: the newest of this artifact in bench-results]",
)
@click.option("--base-model", metavar="OWNER/NAME", help="The base's id on a hub, where it was a folder here.")
@click.option("--license", metavar="ID", help="The licence, where the base's card does not name one.")
@click.option(
    "--may-redistribute",
    is_flag=True,
    help="You have read the licence of a base that is gated or not free, and may publish what is made of it.",
)
@click.option("--trust-remote-code", is_flag=True, help="Let ARTIFACT's own Python run where it is loaded first.")
@json_option
def command(artifact: Path, targets: tuple[str, ...], as_json: bool, **asked: Any) -> None:
    """Publish ARTIFACT to hf:OWNER/NAME, modelscope:OWNER/NAME or both; exit 1 past its recipe's limits.

    Every hash is verified, a passed check of this very artifact wanted, a clean copy loaded in the engine; then the
    card is written, everything sent in one commit, tagged, and read back. Run it again after any failure: what is
    there is not sent twice.
    """
    from ..bench.publish import facts, publish, rows

    with progress(quiet=as_json) as tell:
        outcome = publish(artifact, targets, tell=tell, **asked)
    if as_json:
        click.echo(json.dumps(facts(outcome), ensure_ascii=False))
    else:
        for note in outcome.notes:
            click.echo(f"note: {note}", err=True)
        if outcome.card:
            show_table(["would be sent", "bytes"], [[name, f"{size:,}"] for name, size in outcome.files.items()])
            click.echo(f"tag: {outcome.tag}\ncard: {outcome.card}")
        if outcome.published or outcome.failed:
            show_table(["", ""], rows(outcome))
        for one in outcome.published:
            click.echo(one.url)
            for note in one.notes:
                click.echo(f"note: {one.target}: {note}", err=True)
    if not outcome.published and outcome.gate.failures and asked["gated"]:
        for line in outcome.gate.failures:
            click.echo(f"mmq: past the limit: {line}", err=True)
        sys.exit(1)
    if outcome.failed:
        for target, why in outcome.failed.items():
            click.echo(f"mmq: {target}: {why}", err=True)
        sys.exit(2)

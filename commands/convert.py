"""mmq convert: an artifact in another int4 format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .options import json_option
from .terminal import next_step, progress, show_table


@click.command("convert")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["awq", "gptq", "compressed-tensors"]))
@click.option("--repair", is_flag=True, help="Keep the format; write its config and skip list anew, for every engine.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: ARTIFACT-FORMAT]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@json_option
def command(
    artifact: Path, format_: str | None, repair: bool, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Put ARTIFACT (or a folder that another package packed) into another int4 format, the same weights to the bit."""
    if repair == (format_ is not None):
        raise ValueError("give either --format awq, gptq or compressed-tensors, or --repair")
    out = out or artifact.with_name(f"{artifact.resolve().name}-{format_ or 'repaired'}")
    from ..quantize.device import load_torch

    load_torch()
    from ..export.convert import convert as converted
    from ..export.summary import conversion

    with progress(quiet=as_json) as tell:
        facts = conversion(converted(artifact, out, format=format_, overwrite=overwrite, tell=tell))
    if as_json:
        click.echo(json.dumps(facts))
        return
    show_table(["", ""], [[name, str(value)] for name, value in facts.items()])
    next_step("mmq", "check", "--engines", "all", out)

"""mmq doctor: what is installed here and what it can load."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from .options import json_option
from .terminal import show_table

if TYPE_CHECKING:
    pass


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Tell what is here: this machine, the engines, and each backend's environment, with the line that mends it."""
    from ..bench.doctor import findings, row

    found = findings()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(f) for f in found], ensure_ascii=False))
        return
    show_table(["", "", ""], [row(f) for f in found])

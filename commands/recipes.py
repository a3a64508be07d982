"""mmq recipes: what can be made."""

from __future__ import annotations

import dataclasses
import json

import click

from .options import json_option
from .terminal import next_step, show_table


@click.command("recipes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the recipes, or show the one called NAME."""
    from ..recipes.recipe import bundled, recipe_for, show

    if name:
        recipe = recipe_for(name)
        click.echo(json.dumps(dataclasses.asdict(recipe), indent=2, ensure_ascii=False) if as_json else show(recipe))
        return
    found = bundled()
    if as_json:
        click.echo(json.dumps({n: dataclasses.asdict(r) for n, r in found.items()}, indent=2, ensure_ascii=False))
        return
    rows = [[n, r.card or "", r.description] for n, r in found.items()]
    show_table(["recipe", "card", ""], rows)
    next_step("mmq", "quantize", "pebble")

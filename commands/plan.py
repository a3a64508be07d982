"""mmq plan: where a card's memory goes, before anything starts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from .options import hub_options, json_option, lora_option, several, size_options
from .terminal import progress, show_table

if TYPE_CHECKING:
    pass


@click.command("plan")
@click.argument("target")
@click.option("--vram", metavar="SIZE", help="A card's memory, as 24GiB.  [default: this machine's GPU]")
@click.option("--card", metavar="NAME", help="A card by name instead: 4090, 3090, a10, l4, h100, ...")
@click.option("--context", type=int, help="Tokens a sequence.  [default: as many as fit]")
@click.option("--concurrency", type=int, help="Sequences at once, each as long as the context.")
@click.option("--images", type=int, help="Pictures a prompt, and no video.  [default: 8, and videos]")
@click.option("--pixels", type=int, help="The largest picture, for families that scale pictures (Qwen-VL).")
@several(size_options)
@lora_option
@click.option("--kv-cache-dtype", "kv_dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True)
@click.option("--enforce-eager", "eager", is_flag=True, help="No CUDA graphs: more cache, slower answers.")
@several(hub_options)
@json_option
def command(
    target: str, vram: str | None, card: str | None, hub: str, revision: str | None, as_json: bool, **asked: Any
) -> None:
    """Tell what serving TARGET (an artifact, or a model as `serve` takes it) under vLLM takes of a card, what fits, and
    the flags; exit 1 where it does not fit.

    From headers and config alone; nothing starts. An estimate; docs/planner.md has how near it comes.
    """
    from ..bench.report import parse_bytes
    from ..serve import plan_table
    from ..serve.cards import chosen_card
    from ..serve.machine import this_machine
    from ..serve.target import servable

    gpu, bandwidth = chosen_card(this_machine(), vram=parse_bytes(vram) if vram else None, card=card)
    with progress(quiet=as_json) as tell:
        folder, _ = servable(target, hub=hub, revision=revision, tell=tell)
    facts, rows, lines = plan_table.told(folder, gpu, bandwidth=bandwidth, **asked)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        show_table(["", "", ""], rows)
    for line in lines:
        click.echo(line, err=True)
    sys.exit(0 if facts["fits"] else 1)

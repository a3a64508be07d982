"""mmq quantize: a checkpoint in, an int4 artifact out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from .options import device_option, hub_options, json_option, several
from .terminal import exit_past_limits, next_step, progress, show_table

recipe_options = (  # each has the name of the recipe's key that it replaces
    click.option(
        "--method",
        type=click.Choice(["awq", "gptq", "bnb", "rtn", "autoround"]),
        help="Default: the recipe's, else awq. autoround is for --backend auto-round.",
    ),
    click.option("--quality", type=click.Choice(["fast", "default", "best"]), help="How much is done for each layer."),
    click.option("--format", type=click.Choice(["awq", "gptq", "compressed-tensors", "bnb"])),
    click.option("--group-size", type=int, help="Input columns that share a scale: 32, 64 or 128."),
    click.option("--symmetric/--asymmetric", default=None, help="Default: what the format's engines want."),
    click.option("--keep", multiple=True, metavar="PREFIX", help="Leave modules of this name in 16 bit. Repeatable."),
    click.option("--head", type=click.Choice(["16bit", "int4"]), help="The output head.  [default: 16bit]"),
    click.option("--calibration", metavar="NAME|FILE|FOLDER", help="drawn, text, a JSONL file or a folder."),
    click.option("--samples", type=int, help="Calibration samples to use."),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        default=None,
        help="Let the checkpoint's own Python run; from a hub with --revision and a commit's full hash.",
    ),
)


@click.command("quantize")
@click.argument("model")
@several(recipe_options)
@click.option(
    "--backend",
    metavar="NAME",
    help="Let autoawq, auto-gptq, gptqmodel, llmcompressor or auto-round do it, with its own defaults, in an "
    "environment of its own (`mmq doctor` tells which are there), and check what comes of it.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: ./out-METHOD]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@click.option("--renew", is_flag=True, help="As --overwrite, but go on with an unfinished run of the same options.")
@click.option("--max-vram", metavar="SIZE", help="GPU memory to stay inside, as 24GiB.  [default: what is free]")
@device_option
@several(hub_options)
@json_option
def command(
    model: str,
    backend: str | None,
    out: Path | None,
    overwrite: bool,
    renew: bool,
    max_vram: str | None,
    device: str,
    hub: str,
    as_json: bool,
    **asked: Any,
) -> None:
    """Make MODEL's decoder int4, calibrated on pictures and text."""
    from ..bench.produce import produce, settle
    from ..bench.report import parse_bytes
    from ..quantize.device import load_torch, pick_device

    job = settle(model, backend=backend, out=out, **asked)
    load_torch()
    from ..bench.verdict import facts as check_facts
    from ..bench.verdict import in_short
    from ..export.summary import facts, rows
    from ..quantize import ranks

    start = time.monotonic()
    place = pick_device(device)
    if ranks.launched():
        place = ranks.join(place)
    limit = parse_bytes(max_vram) if max_vram else None
    with progress(quiet=as_json or ranks.rank() > 0) as tell:
        how: dict[str, Any] = {"overwrite": overwrite, "renew": renew, "max_vram": limit}
        artifact, result = produce(job, hub=hub, device=place, tell=tell, **how)
    if ranks.rank() > 0:
        return
    told = facts(artifact, seconds=time.monotonic() - start)
    if as_json:
        click.echo(json.dumps(told if result is None else {**told, "check": check_facts(result)}))
    else:
        show_table(["", ""], rows(artifact, told) + ([["check", in_short(result, job.out)]] if result else []))
    exit_past_limits(result)
    if not as_json:
        trust = ["--trust-remote-code"] if job.recipe.trust_remote_code else []
        next_step("mmq", "serve" if result else "check", *trust, job.out)

"""mmq check: an artifact against FP16, or against the rules of engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..recipes.sets import CHECKED
from .options import bin_option, device_option, heeded, json_option
from .terminal import exit_past_limits, next_step, progress, show_table


@click.command("check")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="The FP16 checkpoint, where the manifest's is elsewhere.")
@click.option("--dataset", metavar="FILE|FOLDER", help="Held-out samples of your own (JSONL with answers).")
@click.option("--samples", "count", type=int, default=CHECKED, show_default=True, help="Held-out samples to use.")
@click.option("--engine", type=click.Choice(["vllm", "pytorch"]), help="Ask the artifact as this engine serves it.")
@bin_option
@click.option(
    "--engines",
    metavar="NAME,...",
    help="Tell which of vllm, sglang, lmdeploy, transformers (or all) would load it, from its headers alone.",
)
@click.option("--tp", type=int, default=1, show_default=True, help="With --engines: GPUs that share each layer.")
@click.option("--trust-remote-code", "trust", is_flag=True, help="Let the checkpoint's own Python run.")
@device_option
@json_option
def command(
    artifact: Path, base: Path | None, engines: str | None, tp: int, device: str, as_json: bool, **asked: Any
) -> None:
    """Hold ARTIFACT against its FP16 base; exit 1 past the recipe's limits.

    With --engines ask instead whether engines would load it; exit 1 where one named would not.
    """
    if engines is not None:
        heeded("--engines", "tp", "as_json")
        check_engines(artifact, engines, tp, as_json=as_json)
        return
    if tp != 1:
        raise ValueError("--tp is of --engines, which reads headers alone: name the engines too")
    from ..export.artifact import base_of, open_artifact
    from ..quantize.device import load_torch, pick_device

    opened = open_artifact(artifact, verify=True)
    load_torch()
    from ..bench.examine import examine
    from ..bench.reload import trusts
    from ..bench.verdict import facts, limits_of, rows, write

    if asked["engine"] and device != "auto":
        raise ValueError(
            "--device goes without --engine: the engine chooses its own, and the walk beside it runs on the CPU"
        )
    place = "cpu" if asked["engine"] else pick_device(device)
    with progress(quiet=as_json) as tell:
        result = examine(opened, base or base_of(opened, tell=tell).path, device=place, tell=tell, **asked)
    try:
        path = write(opened, result, engine=asked["engine"], asked=asked["count"])
    finally:  # also where the folder takes no file
        if as_json:
            click.echo(json.dumps(facts(result)))
        else:
            show_table(["measure", "value", "limit"], rows(result, limits_of(opened)))
    if not as_json:
        click.echo(f"report: {path} and {path.with_suffix('.md').name}")
    exit_past_limits(result)
    if not as_json:
        next_step("mmq", "serve", *(["--trust-remote-code"] if trusts(opened) else []), artifact)


def check_engines(folder: Path, engines: str, tp: int, *, as_json: bool) -> None:
    """Verdicts of the engines named; exit 1 where one of them would not load it."""
    from ..serve.programs import installed
    from ..serve.rules.verdicts import chosen, facts, refused, rows, verdicts

    found = verdicts(folder, chosen(engines), tp=tp, packages=installed())
    if as_json:
        click.echo(json.dumps(facts(found), ensure_ascii=False))
    else:
        show_table(["engine", "", "why", "what to do"], rows(found))
    if no := refused(found):
        click.echo(f"mmq: would not load it: {', '.join(no)}", err=True)
        sys.exit(1)

"""The quantizer's own speed and memory, stage by stage, on whatever machine there is: `python -m mmq.bench.quantizer`.

Random weights of a released model's shape, one picture and text a sample; nothing here says anything about quality.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from .quantizer_measure import QUANTIZING, Run, machine, measure, measure_peer, noise_samples
from .report import markdown_table, parse_bytes
from .shapes import LAYERS, write_shape

TOTALS = ("", "time", "a layer", "after the first", "peak GPU", "peak host, anonymous", "resident", "written")


def ratios(runs: list[Run]) -> list[str]:
    """Each of mmq's runs against each peer's run of the same method: how many times faster a decoder layer is."""
    lines = []
    for ours in (r for r in runs if QUANTIZING not in r.stages):
        for theirs in (r for r in runs if QUANTIZING in r.stages and r.label.split()[1] == ours.label.split()[1]):
            layer, memory = theirs.layer_seconds / ours.layer_seconds, theirs.gpu_peak / max(ours.gpu_peak, 1)
            who = f"{ours.label} is {layer:.1f} times faster a layer than {theirs.label}"
            lines.append(f"{who}, {memory:.2f}x less GPU memory")
    return lines


def markdown(runs: list[Run]) -> str:
    """One table of the totals, one of the stages."""
    totals = []
    for r in runs:
        sizes = [f"{x / 2**30:.2f} GiB" for x in (r.gpu_peak, r.host_anonymous_peak, r.host_peak, r.written)]
        times = [f"{r.seconds:.1f} s", f"{r.layer_seconds:.3f} s", f"{r.warm_layer_seconds:.3f} s"]
        totals.append([r.label, *times, *sizes])
    stages = [
        [stage, *(f"{sum(r.stages.get(stage, [])):.3f}" for r in runs)]
        for stage in dict.fromkeys(s for r in runs for s in r.stages)
    ]
    head = ["stage, seconds in all", *(r.label for r in runs)]
    return f"{markdown_table(TOTALS, totals)}\n{markdown_table(head, stages)}"


@click.command()
@click.option("--shape", default="7b", show_default=True, type=click.Choice(list(LAYERS)))
@click.option("--layers", type=int, help="Decoder layers.  [default: as many as the real model]")
@click.option("--samples", default=128, show_default=True)
@click.option("--method", "methods", multiple=True, default=("awq", "gptq"), show_default=True)
@click.option("--quality", "qualities", multiple=True, default=("default",), show_default=True)
@click.option("--max-vram", help="GPU memory to stay inside, as 24GiB.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoint is kept, or made.")
@click.option("--peer", "peers", multiple=True, help="Run this backend on the same work too, by the same methods.")
@click.option("--peer-python", type=click.Path(path_type=Path), help="A Python that has the peer, instead of its own.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every stage's seconds here.")
def main(
    shape: str,
    layers: int | None,
    samples: int,
    methods: tuple[str, ...],
    qualities: tuple[str, ...],
    max_vram: str | None,
    folder: Path | None,
    peers: tuple[str, ...],
    peer_python: Path | None,
    json_file: Path | None,
) -> None:
    """Quantize a checkpoint of random weights and print where time and memory went."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does
    import torch

    from ..quantize import ranks

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.launched():
        device = ranks.join(device)
        if folder is None:
            raise click.UsageError("several ranks need --folder, with the checkpoint in it")
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        checkpoint = place / f"{shape}-{layers or LAYERS[shape]}"
        if not (checkpoint / "config.json").is_file():
            write_shape(shape, checkpoint, layers=layers, device=device)
        chosen = noise_samples(checkpoint, samples)
        runs = []
        for method in methods:
            for quality in qualities:
                runs.append(
                    measure(
                        checkpoint,
                        method=method,
                        quality=quality,
                        samples=chosen,
                        out=place / "out",
                        device=device,
                        max_vram=parse_bytes(max_vram) if max_vram else None,
                    )
                )
                reserved = runs[-1].gpu_reserved / 2**30
                click.echo(f"{runs[-1].label}: {runs[-1].estimate} reserved {reserved:.2f} GiB", err=True)
        for peer in peers:
            for method in methods:
                runs.append(measure_peer(checkpoint, peer, method, samples=chosen, python=peer_python))
                click.echo(f"{runs[-1].label}: {runs[-1].seconds:.1f} s", err=True)
    if ranks.rank() > 0:
        return
    click.echo(markdown(runs))
    for line in ratios(runs):
        click.echo(line)
    if json_file:
        data = {"command": sys.argv[1:], "machine": machine(), "runs": [asdict(r) for r in runs]}
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

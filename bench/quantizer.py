"""The quantizer's own speed and memory, stage by stage, on whatever machine there is: `python -m mmq.bench.quantizer`.

Random weights of a released model's shape, one picture and text a sample; nothing here says anything about quality.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from ..recipes.progress import Step
from ..recipes.samples import Sample
from .report import parse_bytes
from .shapes import LAYERS, write_shape

PICTURE = 448  # pixels a side: 256 tokens in Qwen2.5-VL
TOKENS = 412  # a sample's, picture included
WORDS = (
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "left",
    "right",
    "the",
    "a",
    "of",
    "and",
    "picture",
    "color",
    "how",
)
QUANTIZING = "quantizing"
PER_LAYER = (
    "load", "forward and Gram matrices", "scales", "forward, both streams", "clip and rounding", "errors", "pack",
    "forward, quantized",
)  # fmt: skip


@dataclass
class Run:
    """One quantization, measured. Seconds by stage, each stage's GPU work waited for; bytes at their peaks."""

    label: str
    layers: int
    seconds: float = 0.0
    stages: dict[str, list[float]] = field(default_factory=dict)
    stage_peaks: dict[str, int] = field(default_factory=dict)  # bytes of tensors on the GPU
    gpu_peak: int = 0
    gpu_reserved: int = 0
    estimate: str = ""
    host_anonymous_peak: int = 0
    host_peak: int = 0  # resident, files mapped into memory counted
    written: int = 0

    @property
    def layer_seconds(self) -> float:
        """The mean over decoder layers of all their stages; a peer tells only the time of all layers together."""
        if QUANTIZING in self.stages:
            return self.stages[QUANTIZING][0] / self.layers
        return sum(sum(self.stages.get(s, [])) for s in PER_LAYER) / self.layers

    @property
    def warm_layer_seconds(self) -> float:
        """The same without the first layer, in which kernels are compiled and loaded."""
        if QUANTIZING in self.stages:
            return float("nan")
        later = (v[len(v) // self.layers :] for v in map(self.stages.get, PER_LAYER) if v)
        return sum(map(sum, later)) / max(self.layers - 1, 1)


def stopwatch(run: Run, device: str) -> Callable[[str], None]:
    """A `lap` for `export.make`: adds the time since the last call to the named stage."""
    import torch

    last = [time.perf_counter()]

    def lap(stage: str) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
            run.stage_peaks[stage] = max(run.stage_peaks.get(stage, 0), torch.cuda.max_memory_allocated())
            run.gpu_reserved = max(run.gpu_reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        run.stages.setdefault(stage, []).append(now - last[0])
        last[0] = now

    return lap


@contextmanager
def host_memory(run: Run) -> Iterator[None]:
    """Watch the process's anonymous memory (Linux: what is its own, not files mapped) every 10 ms."""
    over = threading.Event()

    def watch() -> None:
        status = Path("/proc/self/status")
        while status.is_file() and not over.wait(0.01):
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    run.host_anonymous_peak = max(run.host_anonymous_peak, int(line.split()[1]) * 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def noise_samples(folder: Path, count: int, *, seed: int = 0) -> list[Sample]:
    """`count` samples of TOKENS tokens each: a PICTURE x PICTURE picture of noise and words of one token."""
    import numpy as np
    from PIL import Image

    from ..quantize.classes import open_processor

    processor = open_processor(folder)
    rng = np.random.default_rng(seed)
    words = [w for w in WORDS if len(processor.tokenizer(" " + w)["input_ids"]) == 1]

    def sample(length: int) -> Sample:
        pixels = rng.integers(0, 255, (PICTURE, PICTURE, 3), dtype=np.uint8)
        text = "".join(" " + w for w in rng.choice(words, length))
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        return Sample([{"role": "user", "content": parts}], (Image.fromarray(pixels),))

    probe = sample(0)
    text = processor.apply_chat_template(probe.messages, tokenize=False)
    length = TOKENS - processor(text=[text], images=list(probe.images), return_tensors="pt")["input_ids"].numel()
    return [sample(max(length, 0)) for _ in range(count)]


def measure(
    folder: Path, *, method: str, quality: str, samples: list[Sample], out: Path, device: str,
    max_vram: int | None = None,
) -> Run:  # fmt: skip
    """Quantize the checkpoint in `folder` into `out` and measure it."""
    import torch

    from ..export.make import make
    from ..quantize.skeleton import read_config
    from ..recipes.hub import fetch
    from ..recipes.recipe import Recipe

    layers = read_config(folder)["text_config"]["num_hidden_layers"]
    run = Run(f"mmq {method} {quality}", layers)
    recipe = Recipe(name=folder.name, model=str(folder), method=method, quality=quality, samples=len(samples))
    base = fetch(str(folder))
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def tell(step: Step) -> None:
        if step.name in ("estimate", "memory"):
            run.estimate += f"{step.note}; "

    start = time.perf_counter()
    with host_memory(run):
        make(
            recipe, base, out, samples=samples, calibration="noise", device=device, overwrite=True,
            lap=stopwatch(run, device), tell=tell, max_vram=max_vram,
        )  # fmt: skip
    run.seconds = time.perf_counter() - start
    run.host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cpu":
        run.gpu_peak = max(torch.cuda.max_memory_allocated(), *run.stage_peaks.values())
    run.written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    return run


def measure_peer(folder: Path, name: str, method: str, *, samples: list[Sample], python: Path | None) -> Run:
    """The same with another package, in its own environment (or under `python`, which has it): its own report."""
    from ..quantize.skeleton import read_config
    from .backends import settle
    from .environments import environment
    from .peer import run_script

    run = Run(f"{name} {method}", read_config(folder)["text_config"]["num_hidden_layers"])
    asked = settle(name, method=method, symmetric=None, format=None)
    device = "cuda" if machine()["gpu"] else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        report = run_script(
            asked, folder, Path(scratch), samples=samples, group_size=128, python=python or environment(name),
            device=device, keep_log=Path(f"{name}-{method}.log"),
        )  # fmt: skip
        run.written = sum(p.stat().st_size for p in Path(scratch).glob("made/*.safetensors"))
    run.seconds = report["load_seconds"] + report["seconds"] + report["save_seconds"]
    run.stages = {"load": [report["load_seconds"]], QUANTIZING: [report["seconds"]], "write": [report["save_seconds"]]}
    run.gpu_peak, run.host_peak = report["peak_gpu_bytes"], report["peak_host_bytes"]
    return run


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
    lines = [
        "| | time | a layer | after the first | peak GPU | peak host, anonymous | resident | written |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in runs:
        sizes = [f"{x / 2**30:.2f} GiB" for x in (r.gpu_peak, r.host_anonymous_peak, r.host_peak, r.written)]
        times = [f"{r.seconds:.1f} s", f"{r.layer_seconds:.3f} s", f"{r.warm_layer_seconds:.3f} s"]
        lines.append(f"| {' | '.join([r.label, *times, *sizes])} |")
    lines += [
        "",
        "| stage, seconds in all | " + " | ".join(r.label for r in runs) + " |",
        "|---|" + "---:|" * len(runs),
    ]
    for stage in dict.fromkeys(s for r in runs for s in r.stages):
        lines.append(f"| {stage} | " + " | ".join(f"{sum(r.stages.get(stage, [])):.3f}" for r in runs) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("torch", "transformers", "safetensors")
    return {"gpu": gpu, "python": platform.python_version(), **{n: version(n) for n in names}}


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

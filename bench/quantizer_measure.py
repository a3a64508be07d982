"""One quantization measured, stage by stage: mmq's own by its laps, another package's by the report of its process.

Knows no command line; quantizer.py has that, and the tables.
"""

from __future__ import annotations

import platform
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..recipes.progress import Step
from ..recipes.samples import Sample

PICTURE = 448  # pixels a side: 256 tokens in Qwen2.5-VL
TOKENS = 412  # a sample's, picture included
WORDS = ("red", "blue", "green", "circle", "square", "left", "right", "the", "a", "of", "and", "picture", "how")
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
        # the last layer has no forward pass behind it: of that stage there is one less
        later = (v[max(1, len(v) // self.layers) :] for v in map(self.stages.get, PER_LAYER) if v)
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


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("torch", "transformers", "safetensors")
    return {"gpu": gpu, "python": platform.python_version(), **{n: version(n) for n in names}}

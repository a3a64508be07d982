"""How fast a server is: the field's own load generator (`vllm bench serve`) drives it, its raw times are kept.

Knows a server by its URL: any OpenAI-compatible one will do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..recipes.progress import Step, Tell, silent
from ..serve.client import key_here
from ..serve.log import useful_lines
from ..serve.machine import this_machine
from ..serve.programs import find_program
from .report import Figure


@dataclass(frozen=True)
class Load:
    """What is asked: random words and random pictures, the same for every server by `seed`.

    `concurrency` requests are under way at once; `picture` is (height, width) in pixels, `pictures` how many a
    request has; every answer is exactly `output_tokens` long. The whole is done `runs` times, each with another seed.
    """

    requests: int = 64
    concurrency: int = 8
    input_tokens: int = 128
    output_tokens: int = 128
    pictures: int = 1
    picture: tuple[int, int] = (448, 448)
    runs: int = 3
    warmups: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "input_tokens", "output_tokens", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the load is {getattr(self, name)}; it must be at least 1")
        if self.pictures < 0 or self.warmups < 0 or min(self.picture) < 28:
            raise ValueError("a load has 0 or more pictures and warm-ups, and pictures of at least 28 x 28 pixels")


CPU_LOAD = Load(requests=16, concurrency=4, input_tokens=64, output_tokens=64, picture=(112, 112))


def load_here(**asked: int | None) -> Load:
    """The load for this machine, a GPU's or a CPU's, with each field that was asked for (None: as it is)."""
    load = Load() if this_machine().gpus else CPU_LOAD
    return replace(load, **{k: v for k, v in asked.items() if v is not None})


@dataclass(frozen=True)
class Run:
    """One run's raw samples, in the order of the requests. Seconds and tokens; `tpot` is seconds per further token."""

    seconds: float
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    latency: tuple[float, ...]


def command(program: Path, url: str, model: str, tokenizer: Path, load: Load, *, run: int, result: Path) -> list[str]:
    """The load generator's command line for one run; its result goes to the file `result`."""
    height, width = load.picture
    return [
        *(str(program), "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", url, "--model", model, "--served-model-name", model, "--tokenizer", str(tokenizer)),
        *("--dataset-name", "random-mm", "--num-prompts", str(load.requests), "--seed", str(load.seed + run)),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--random-mm-base-items-per-request", str(load.pictures)),
        *("--random-mm-limit-mm-per-prompt", json.dumps({"image": max(load.pictures, 1)})),
        *("--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}"),
        *("--max-concurrency", str(load.concurrency), "--num-warmups", str(load.warmups)),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def measure(
    url: str, *, model: str, tokenizer: Path, load: Load, out: Path, label: str = "server", tell: Tell = silent
) -> tuple[Run, ...]:
    """Put `load` on the server; the generator's raw JSON of each run stays in the folder `out`.

    `tokenizer` is a folder with the model's tokenizer, so that prompts have their length in its tokens. RuntimeError
    when the generator is not installed or fails, or when any request failed.
    """
    program = find_program("vllm")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "no_proxy": "127.0.0.1,localhost"}
    env["OPENAI_API_KEY"] = key_here()  # where the generator looks for it
    runs = []
    for number in range(load.runs):
        tell(Step(f"load {label}", number, load.runs, f"{load.requests} requests"))
        result = out / f"{label}-{number + 1}.json"
        argv = command(program, url, model, tokenizer, load, run=number, result=result)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0 or not result.is_file():
            said = " ".join(useful_lines(done.stderr + "\n" + done.stdout))
            raise RuntimeError(f"the load generator `vllm bench serve` failed: {said}")
        runs.append(read_run(json.loads(result.read_text(encoding="utf-8"))))
    tell(Step(f"load {label}", load.runs, load.runs))
    return tuple(runs)


def read_run(raw: Mapping[str, Any]) -> Run:
    """The raw samples of the generator's JSON. RuntimeError when a request failed, with the server's words."""
    errors = [error for error in raw["errors"] if error]
    if errors or raw["failed"]:
        said = errors[0].strip().splitlines()[-1] if errors else "no reason given"
        raise RuntimeError(f"{raw['failed']} of {raw['num_prompts']} requests failed: {said}")
    outputs, ttft = raw["output_lens"], raw["ttfts"]
    latency = raw["latencies"] if "latencies" in raw else [t + sum(i) for t, i in zip(ttft, raw["itls"], strict=True)]
    return Run(
        seconds=raw["duration"],
        input_lens=tuple(raw["input_lens"]),
        output_lens=tuple(outputs),
        ttft=tuple(ttft),
        tpot=tuple((whole - t) / (n - 1) for whole, t, n in zip(latency, ttft, outputs, strict=True) if n > 1),
        latency=tuple(latency),
    )


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lie, interpolated between neighbours."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples, no percentile")
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """The figures of the field: rates and time by run (median, lowest, highest), latencies over all requests."""

    def by_run(values: list[float], unit: str) -> Figure:
        return Figure(statistics.median(values), unit, "measured", min(values), max(values))

    found = {
        "input_rate": by_run([sum(r.input_lens) / r.seconds for r in runs], "tok/s"),
        "output_rate": by_run([sum(r.output_lens) / r.seconds for r in runs], "tok/s"),
        "time": by_run([r.seconds for r in runs], "s"),
    }
    for name, samples in (("ttft", [t for r in runs for t in r.ttft]), ("tpot", [t for r in runs for t in r.tpot])):
        if samples:
            found[name] = Figure(1000 * percentile(samples, 0.5), "ms", "measured")
            found[f"{name}_p99"] = Figure(1000 * percentile(samples, 0.99), "ms", "measured")
    return found

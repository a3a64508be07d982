"""How fast a server is: what is asked of it, and what the load generator's raw times say.

Arithmetic and a command line; `generator` is who runs it. Knows a server by its URL: any OpenAI-compatible one will do.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..serve.machine import this_machine
from .report import Figure
from .show import pictures

TIMES = ("ttft", "tpot", "itl", "e2e")  # of a request: to the first token, a further token, between pieces, all of it
TAILS = {"": 0.5, "_p90": 0.9, "_p99": 0.99}  # what is told of each: ending of its name, percentile
WAVES, LEAST = 4, 8  # of a sweep's level: each place under way is filled so often, and so many requests at least
WARM = 500  # added to a run's seed for its warm-ups: no run has this number


@dataclass(frozen=True)
class Load:
    """What is asked: random words and random pictures, the same for every server by `seed`; or rows of `dataset`.

    `concurrency` requests are under way at once; `picture` is (height, width) in pixels, `pictures` how many a
    request has; every answer is exactly `output_tokens` long. The whole is done `runs` times, each with another seed.
    `dataset` is a JSONL file as `mmq infer` takes it ("x.jsonl#100"), whose rows then stand for words and pictures.
    """

    requests: int = 64
    concurrency: int = 8
    input_tokens: int = 128
    output_tokens: int = 128
    pictures: int = 1
    picture: tuple[int, int] = (448, 448)
    runs: int = 5
    warmups: int = 2
    seed: int = 0
    dataset: str = ""

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "input_tokens", "output_tokens", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the load is {getattr(self, name)}; it must be at least 1")
        if self.pictures < 0 or self.warmups < 0 or min(self.picture) < 28:
            raise ValueError("a load has 0 or more pictures and warm-ups, and pictures of at least 28 x 28 pixels")

    def at(self, concurrency: int) -> Load:
        """The load of a sweep's level: as many requests as fill `concurrency` places a few times."""
        if concurrency == self.concurrency:
            return self
        return replace(self, concurrency=concurrency, requests=max(LEAST, WAVES * concurrency))

    @property
    def words(self) -> str:
        """What is asked, for a reader."""
        drawn = f"each {self.input_tokens} random tokens and {pictures(self.pictures, self.picture)} in"
        asked = f"of {self.dataset}" if self.dataset else drawn
        return f"{self.requests} requests, {self.concurrency} at once, {asked}, {self.output_tokens} tokens out"


CPU_LOAD = Load(requests=16, concurrency=4, input_tokens=64, output_tokens=64, picture=(112, 112))


def load_here(*, quick: bool = False, **asked: Any) -> Load:
    """The load for this machine, a GPU's or a CPU's, with each field that was asked for (None: as it is)."""
    load = Load() if this_machine().gpus else CPU_LOAD
    if quick:  # with fewer, what a run does is begin and end
        load = replace(load, warmups=1, requests=max(WAVES * load.concurrency, load.requests // 2))
    return replace(load, **{k: v for k, v in asked.items() if v is not None})


def asked_of(options: Mapping[str, Any]) -> list[str]:
    """Those of the options that are a load's fields."""
    return [field.name for field in fields(Load) if field.name in options]


@dataclass(frozen=True)
class Run:
    """One run's raw samples, in the order of the requests. Seconds and tokens; `tpot` is seconds per further token,
    `itl` those between the pieces of all answers, `joules` what the card took meanwhile, where it tells."""

    seconds: float
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    latency: tuple[float, ...]
    itl: tuple[float, ...] = ()
    joules: float | None = None

    def samples(self, name: str) -> tuple[float, ...]:
        """Those of one of `TIMES`."""
        return self.latency if name == "e2e" else getattr(self, name)


def command(
    url: str,
    model: str,
    tokenizer: Path,
    load: Load,
    *,
    run: int,
    result: Path,
    rows: Path | None = None,
    remote_code: bool = False,
) -> list[str]:
    """The words after `vllm bench serve` for one run; its result goes to the file `result`. `rows` is the load's
    dataset in the generator's form; `remote_code` lets the tokenizer's own Python files run."""
    height, width = load.picture
    if rows is not None:
        what = ["--dataset-name", "custom_image", "--dataset-path", str(rows)]
        what += ["--custom-output-len", str(load.output_tokens)]
    else:
        what = ["--dataset-name", "random-mm"]
        what += ["--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)]
        what += ["--random-mm-base-items-per-request", str(load.pictures)]
        what += ["--random-mm-limit-mm-per-prompt", json.dumps({"image": max(load.pictures, 1)})]
        what += ["--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}"]
    # a picture that an engine has seen costs it less: no two runs, and no two levels, have a seed in common
    seed = load.seed + run + 1000 * load.concurrency
    return [
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url),
        *("--model", model, "--served-model-name", model, "--tokenizer", str(tokenizer)),
        *(["--trust-remote-code"] if remote_code else []),
        *(*what, "--num-prompts", str(load.requests), "--seed", str(seed)),
        *("--max-concurrency", str(load.concurrency)),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def warm_up(load: Load, run: int) -> Load | None:
    """What is asked before a run and not counted; None for nothing. A level's first run meets new batch sizes: as many
    requests as it has places. All are new ones: the generator's own warm-ups are the run's first request again and
    again, which then finds its picture in the engine's caches."""
    many = load.warmups if run else max(load.warmups, load.concurrency)
    return replace(load, requests=many, seed=load.seed + WARM) if many else None


def read_run(raw: Mapping[str, Any], *, joules: float | None = None) -> Run:
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
        itl=tuple(gap for request in raw.get("itls") or () for gap in request),
        joules=joules,
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


def measures(run: Run) -> dict[str, float]:
    """One run's own measures, for ratios between runs: tok/s, seconds, percentiles in ms, J per output token."""
    found = {
        "input_rate": sum(run.input_lens) / run.seconds,
        "output_rate": sum(run.output_lens) / run.seconds,
        "time": run.seconds,
    }
    for name in TIMES:
        if samples := run.samples(name):
            found |= {name + tail: 1000 * percentile(samples, share) for tail, share in TAILS.items()}
    if run.joules is not None:
        found["energy"] = run.joules / sum(run.output_lens)
    return found


def figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """The figures of the field: rates, time and energy by run (median, lowest, highest), latencies over all requests
    (median, _p90, _p99)."""
    found: dict[str, Figure] = {}
    by_run = [measures(run) for run in runs]
    for name, unit in (("input_rate", "tok/s"), ("output_rate", "tok/s"), ("time", "s"), ("energy", "J/tok")):
        if all(name in one for one in by_run):
            values = [one[name] for one in by_run]
            found[name] = Figure(statistics.median(values), unit, "measured", min(values), max(values))
    for name in TIMES:
        if samples := [t for run in runs for t in run.samples(name)]:
            for tail, share in TAILS.items():
                found[name + tail] = Figure(1000 * percentile(samples, share), "ms", "measured")
    return found

"""Reports made by hand, for what reads reports: nothing here was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmq.bench.report import Figure, Level, Ratio, Report, write_report
from mmq.bench.speed import Load

GIB = 1 << 30
LABELS = ("fp16", "awq", "gptq", "bnb")
SPEED = {"fp16": 1.0, "awq": 1.52, "gptq": 1.48, "bnb": 0.71}
WEIGHTS = {"fp16": 15.6, "awq": 6.7, "gptq": 6.6, "bnb": 7.4}


def figure(value: float, unit: str = "ms", how: str = "measured", spread: float = 0.0) -> Figure:
    low, high = (value * (1 - spread), value * (1 + spread)) if spread else (None, None)
    return Figure(value, unit, how, low, high)


def bare_report(labels: Sequence[str] = LABELS[:2], *, rename: dict[str, str] | None = None, **more: Any) -> Report:
    """One level of load, nothing else: what an old or a quick run leaves. `rename` gives labels other names."""
    named = {label: (rename or {}).get(label, label) for label in labels}
    numbers = {}
    for label in labels:
        k = SPEED[label]
        numbers[named[label]] = {
            "input_rate": figure(1136.3 * k, "tok/s", spread=0.03),
            "output_rate": figure(324.9 * k, "tok/s", spread=0.03),
            "time": figure(12 / k, "s", spread=0.03),
            "weights": figure(WEIGHTS[label] * GIB, "bytes"),
            "kv_token": figure(57344, "bytes", "computed"),
            "max_length": figure(2048 if label == "fp16" else 6144, "tokens", "computed"),
            "max_batch": figure(2 if label == "fp16" else 52, "sequences"),
            "ttft": figure(140 / k**0.3),
            "tpot": figure(24 / k),
        }
    subjects: dict[str, Any] = {}
    for label in labels:
        made = {"method": label, "format": label, "group_size": 128, "base": {"model": "Qwen/Qwen2-VL-7B-Instruct"}}
        subjects[named[label]] = {
            "path": f"out-{label}" if label != "fp16" else "Qwen/Qwen2-VL-7B-Instruct",
            "digest": "0123456789abcdef" * 4,
            "command": f"vllm serve out-{label} --host 127.0.0.1 --limit-mm-per-prompt '{{\"image\":8}}'",
            **(made if label != "fp16" else {}),
        }
    settings = {
        "load": dataclasses.asdict(Load()),
        "vram": 24 * GIB,
        "context": 2048,
        "reserve": 0.1,
        "budget_given_to_engine": True,
        "stages": {
            **{"pictures": 1, "picture": [448, 448], "prompt_tokens": 412, "output_tokens": 128},
            **{"rounds": 5, "clock": "the engine's"},
        },
    }
    machine = {"words": "a card made up, 24 GiB", "system": "Linux-6.8-x86_64"}
    versions = {"mmq": "0.1.0", "python": "3.11.9", "vllm": "0.33.0"}
    report = Report("bench", "2026-11-21T15:02:11+00:00", "vllm", subjects, numbers, {}, settings, machine, versions)
    return dataclasses.replace(report, **more)


def full_report(labels: Sequence[str] = LABELS, *, rename: dict[str, str] | None = None) -> Report:
    """All that a report can have."""
    named = {label: (rename or {}).get(label, label) for label in labels}
    sweep, ratios, stages, quality, memory = {}, {}, {}, {}, {}
    for label in labels:
        k, own = SPEED[label], named[label]
        sweep[own] = [
            Level(
                n,
                {
                    "output_rate": figure(k * 60 * n / (1 + n / 40), "tok/s"),
                    "ttft": figure(80 / k**0.3 * (1 + n / 10)),
                    "ttft_p99": figure(140 / k**0.3 * (1 + n / 6)),
                    "tpot": figure(16 / k * (1 + n / 30)),
                    "tpot_p99": figure(20 / k * (1 + n / 25)),
                    "e2e": figure(2000 / k * (1 + n / 20)),
                    "e2e_p99": figure(2600 / k * (1 + n / 18)),
                },
                {} if label == labels[0] else {"output_rate": Ratio(k, k * 0.95, k * 1.05, pairs=3)},
            )
            for n in (1, 8, 32, 64)
        ]
        stages[own] = {
            "image_preprocessing": figure(21, spread=0.1),
            "vision_tower": figure(34, spread=0.1),
            "prefill": figure(55 / k**0.5, spread=0.1),
            "decode": figure(2900 / k, spread=0.1),
        }
        memory[own] = {
            "weights": figure(WEIGHTS[label] * GIB, "bytes"),
            "cache": figure((20 - WEIGHTS[label]) * GIB, "bytes"),
            "activations": figure(1.1 * GIB, "bytes"),
            "other": figure(0.4 * GIB, "bytes", "computed"),
        }
        if label != labels[0]:
            ratios[own] = {
                "output_rate": Ratio(k, k * 0.97, k * 1.03, pairs=5),
                "ttft": Ratio(0.97, 0.92, 1.03, pairs=5),
                "tpot": Ratio(1 / k, 0.95 / k, 1.05 / k, pairs=5),
            }
            quality[own] = {
                "measures": {"mean_kl": 0.0042 / k, "soft_kl": 0.042 / k, "top1": 0.991, "accuracy_int4": 0.987,
                             "accuracy_fp16": 0.989},
                "layers": [0.002 * (1 + i) ** 0.6 / k for i in range(28)],
                "tasks": {"mmmu_val": {"acc": 0.512, "stderr": 0.016}},
            }  # fmt: skip
    answers = [
        {"picture": "answer-1.png", "question": "Which colour has the square?", "reference": "The square is black.",
         "answers": {n: "The square is blue." if o == "bnb" else "The square is black." for o, n in named.items()}},
        {"picture": "answer-2.png", "question": "图中有什么？", "reference": "图中有一颗黄色的星。",
         "answers": dict.fromkeys(named.values(), "图中有一颗黄色的星。")},
    ]  # fmt: skip
    verdicts = [f"{named[labels[-1]]} takes {WEIGHTS[labels[-1]] / 15.6:.2f}x of the memory of {named[labels[0]]}."]
    return dataclasses.replace(
        bare_report(labels, rename=rename),
        **{"sweep": sweep, "ratios": ratios, "stages": stages, "quality": quality, "memory": memory},
        **{"answers": answers, "verdicts": verdicts},
    )


def with_pictures(folder: Path) -> Path:
    """The pictures of a full report's answers, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (448, 336), "black").save(folder / "answer-1.png")
    Image.effect_noise((1600, 1200), 90).save(folder / "answer-2.png")
    return folder


def written(report: Report, folder: Path) -> Path:
    """The report as files, pictures too; returns the folder."""
    write_report(report, with_pictures(folder), markdown="")
    return folder

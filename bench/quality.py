"""The quality study: what each method, setting and calibration seed costs pebble, position by position.

`python -m mmq.bench.quality --out DIR` quantizes the embedded model in every way of VARIANTS, compares each artifact
with its 16-bit base on held-out pictures and text, and writes one JSON a run (a run that is there is not run again).
`quality_report.py` makes the table and the pictures of them. Knows no algorithm and no package: a variant is a row of
`quality_variants.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export.artifact import hash_file
from ..export.view import view
from ..quantize.skeleton import build
from ..recipes.calibration import CALIBRATIONS
from ..recipes.pebble.tasks import samples
from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import Sample, digest
from .quality_measure import Asked, ask, compare, states
from .quality_settings import SETTINGS
from .quality_variants import THEIRS, VARIANTS, Variant
from .report import now, versions

TEST_SEED = 2026  # of the held-out samples; the methods were tuned on seed 0


def study(
    variants: Sequence[Variant],
    settings: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    calibrated: int = 64,
    held_out: int = 260,
    test_seed: int = TEST_SEED,
    tell: Tell = silent,
) -> list[dict[str, Any]]:
    """Run every variant in every setting with every calibration seed; returns one mapping a run, also written to
    `out`/runs/SETTING.VARIANT.SEED.json. A run that is there under the same mark is read, not made again.

    ValueError for an unknown setting, or a variant whose calibration set is unknown.
    """
    for name in settings:
        if name not in SETTINGS:
            raise ValueError(f"setting is {name!r}; it must be one of {', '.join(SETTINGS)}")
    for variant in variants:
        if variant.calibration not in CALIBRATIONS:
            raise ValueError(f"{variant.name}: calibration must be one of {', '.join(CALIBRATIONS)}")
    tests = list(samples("test", held_out, seed=test_seed))
    drawn = {(c, s): CALIBRATIONS[c](calibrated, seed=s) for c in {v.calibration for v in variants} for s in seeds}
    common = {"test": digest(tests), "versions": versions()}
    (out / "runs").mkdir(parents=True, exist_ok=True)
    jobs = [(setting, variant, seed) for setting in settings for variant in variants for seed in seeds]
    bases = {setting: SETTINGS[setting](out / setting) for setting in settings}
    weights = {setting: hash_file(base / "model.safetensors") for setting, base in bases.items()}
    opened: dict[str, tuple[Path, Asked, list[Tensor], Tensor]] = {}
    runs = []
    for number, (setting, variant, seed) in enumerate(jobs):
        file = out / "runs" / f"{setting}.{variant.name}.{seed}.json"
        mark = {
            **common,
            **variant.mark,
            "base": weights[setting],
            "calibrated": digest(drawn[variant.calibration, seed]),
        }
        run = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if run.get("mark") != json.loads(json.dumps(mark)):
            if setting not in opened:
                opened.clear()  # one setting's states at a time
                opened[setting] = _open(bases[setting], tests)
            base, asked, before, head = opened[setting]
            artifact = out / f"artifact-{os.getpid()}"
            shutil.rmtree(artifact, ignore_errors=True)
            start = time.monotonic()
            variant.make(base, drawn[variant.calibration, seed], artifact)
            seconds = round(time.monotonic() - start, 1)
            made = build(artifact, source=view(artifact))
            after = states(made, asked)
            found = compare(asked, before, after, head, made.module.get_output_embeddings().weight.float())
            del made
            shutil.rmtree(artifact)
            run = {"setting": setting, "variant": variant.name, "seed": seed, "seconds": seconds, "created": now()}
            run |= {
                "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
                "mark": mark,
                **found,
            }
            part = file.with_suffix(".part")
            part.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(part, file)
        runs.append(run)
        tell(Step("run", number + 1, len(jobs), f"{setting} {variant.name} {seed}"))
    return runs


def _open(base: Path, tests: Sequence[Sample]) -> tuple[Path, Asked, list[Tensor], Tensor]:
    """The checkpoint, the encoded samples, its own states on them, and its head [vocabulary, hidden]."""
    skeleton = build(base)
    with torch.no_grad():
        asked = ask(skeleton, tests)
        before = states(skeleton, asked)
    return base, asked, before, skeleton.module.get_output_embeddings().weight.float()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: run what is missing, then write DIR/NAME.md, DIR/NAME.json and DIR/NAME-SETTING.svg."""
    from .quality_report import draw, keep, write

    parser = argparse.ArgumentParser(prog="python -m mmq.bench.quality", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table and pictures")
    parser.add_argument("--name", default="quality", help="of the table and the pictures")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["rtn", "awq", "gptq"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration samples")
    parser.add_argument("--calibrated", type=int, default=64, help="calibration samples")
    parser.add_argument("--held-out", type=int, default=260, help="test samples")
    parser.add_argument("--test-seed", type=int, default=TEST_SEED, help="of the test samples")
    parser.add_argument("--against", default="awq", help="the variant that ratios are told against")
    asked = parser.parse_args(arguments)
    chosen = [VARIANTS[name] for name in asked.variants]

    def tell(step: Step) -> None:
        sys.stderr.write(f"{step.done}/{step.total} {step.note}\n")

    runs = study(
        chosen,
        asked.settings,
        asked.seeds,
        out=asked.out,
        calibrated=asked.calibrated,
        held_out=asked.held_out,
        test_seed=asked.test_seed,
        tell=tell,
    )
    write(runs, asked.out / f"{asked.name}.md", against=asked.against, theirs=[v.name for v in THEIRS])
    keep(runs, asked.out / f"{asked.name}.json")
    draw(runs, asked.out, name=asked.name)


if __name__ == "__main__":
    main()

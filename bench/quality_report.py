"""The study's runs as a Markdown table and as pictures. Knows no model; matplotlib is imported when a picture is drawn.

A ratio is the geometric mean, over calibration seeds, of a measure against another variant's with the same seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import markdown_table

Runs = Sequence[Mapping[str, Any]]
# measure -> what a reader sees
SHOWN = {
    "answer.kl": "answers: KL",
    "answer.kl_median": "median",
    "answer.kl_p99": "p99",
    "answer.soft": "at T=4",
    "answer.error": "hidden",
    "text.kl": "text: KL",
    "text.soft": "at T=4",
    "image.kl": "image: KL",
    "image.soft": "at T=4",
}
DRAWN = {"answer.soft": "answer positions", "text.soft": "other text", "image.soft": "picture tokens"}
RATIOS = ("answer.kl", "answer.kl_median", "answer.soft", "answer.error", "text.soft", "image.soft")


def by_variant(runs: Runs, setting: str) -> dict[str, dict[int, Mapping[str, float]]]:
    """variant -> calibration seed -> measures, of one setting, in the order of the runs."""
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for run in runs:
        if run["setting"] == setting:
            found.setdefault(run["variant"], {})[run["seed"]] = run["measures"]
    return found


def ratio(mine: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]], measure: str) -> float:
    """Geometric mean over the seeds that both have; NaN where they share none or a measure is 0."""
    pairs = [(mine[s][measure], other[s][measure]) for s in mine if s in other]
    if not pairs or min(min(p) for p in pairs) <= 0:
        return math.nan
    return math.exp(statistics.fmean(math.log(a / b) for a, b in pairs))


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.fmean(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2g}..{max(values):.2g})"


def tables(runs: Runs, *, against: str) -> str:
    """Markdown: for every setting the measures (mean over seeds, lowest..highest), then ratios to `against`."""
    parts = []
    for setting in dict.fromkeys(r["setting"] for r in runs):
        variants = by_variant(runs, setting)
        rows = [
            [name, *(_spread([m[key] for m in seeds.values()]) for key in SHOWN), _share(seeds)]
            for name, seeds in variants.items()
        ]
        parts.append(f"### {setting}\n\n" + markdown_table(["", *SHOWN.values(), "right answers"], rows))
        if against in variants:
            order = sorted(variants, key=lambda n: ratio(variants[n], variants[against], "answer.soft"))
            rows = [[n, *(f"{ratio(variants[n], variants[against], key):.3f}" for key in RATIOS)] for n in order]
            parts.append(f"As a share of {against}'s, same seeds:\n\n" + markdown_table(["", *RATIOS], rows))
    return "\n".join(parts)


def rivals(runs: Runs, ours: Sequence[str], theirs: Sequence[str], measures: Sequence[str] = RATIOS) -> str:
    """Markdown: for every setting and measure the best of `theirs` (least geometric mean over the seeds that all of
    them have), and each of `ours` as a share of it: the geometric mean and each seed's lowest..highest."""
    rows = []
    for setting in dict.fromkeys(r["setting"] for r in runs):
        variants = by_variant(runs, setting)
        present = [n for n in theirs if n in variants]
        common = set.intersection(*(set(variants[n]) for n in present)) if present else set()
        if not common:
            continue
        for measure in measures:
            logs = {n: [math.log(max(variants[n][s][measure], 1e-30)) for s in common] for n in present}
            middle = {n: statistics.fmean(values) for n, values in logs.items()}
            best = min(middle, key=lambda n: middle[n])
            rows.append([setting, measure, best, *(_beside(variants, n, best, measure) for n in ours)])
    return markdown_table(["setting", "measure", "best other package", *ours], rows)


def _beside(variants: Mapping[str, Mapping[int, Mapping[str, float]]], mine: str, other: str, measure: str) -> str:
    """A share with its range over seeds; empty where `mine` was not run."""
    shared = [{s: m} for s, m in variants.get(mine, {}).items() if s in variants[other]]
    if not shared:
        return ""
    each = [ratio(one, variants[other], measure) for one in shared]
    return f"{ratio(variants[mine], variants[other], measure):.2f} ({min(each):.2f}..{max(each):.2f})"


def _share(seeds: Mapping[int, Mapping[str, float]]) -> str:
    before = next(iter(seeds.values()))["right_fp16"]
    return f"{statistics.fmean(m['right'] for m in seeds.values()):.2%} of {before:.2%}"


def write(runs: Runs, path: Path, *, against: str, theirs: Sequence[str] = ()) -> None:
    """The tables as a file, with what they were made by; `theirs` are the variants of other packages."""
    seeds = sorted({r["seed"] for r in runs})
    made = runs[0]
    text = (
        f"{len(runs)} runs, calibration seeds {', '.join(map(str, seeds))}, {len(made['samples'])} held-out samples; "
        + ", ".join(f"{name} {version}" for name, version in made["mark"]["versions"].items())
        + f"; {made['created'][:10]}.\n\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    text += tables(runs, against=against)
    names = list(dict.fromkeys(r["variant"] for r in runs))
    ours, others = [n for n in names if n not in theirs], [n for n in names if n in theirs]
    if ours and others:
        text += "\n### Beside the best other package\n\n" + rivals(runs, ours, others)
    path.write_text(text, encoding="utf-8")


def keep(runs: Runs, path: Path) -> None:
    """The runs as one JSON file, a line each: all that was measured but the single samples, versions told once."""
    head = {"versions": runs[0]["mark"]["versions"], "test": runs[0]["mark"]["test"]}
    lines = []
    for run in runs:
        mark = {k: v for k, v in run["mark"].items() if k not in head}
        lines.append(json.dumps({**run, "mark": mark, "samples": len(run["samples"])}, ensure_ascii=False))
    told = json.dumps(head, ensure_ascii=False)[:-1]
    path.write_text(told + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def draw(runs: Runs, folder: Path, *, name: str = "quality") -> list[Path]:
    """One SVG a setting, NAME-SETTING.svg: every variant's KL at T=4 by kind of position, a dot a seed, on a log scale.

    ValueError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib draws the pictures: pip install 'mmq-toolkit[study]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "mmq", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    written = []
    for setting in dict.fromkeys(r["setting"] for r in runs):
        variants = by_variant(runs, setting)
        names = sorted(variants, key=lambda n: statistics.fmean(m["answer.soft"] for m in variants[n].values()))
        figure, axes = pyplot.subplots(1, len(DRAWN), sharey=True, figsize=(10, 0.8 + 0.28 * len(names)))
        for axis, (measure, title) in zip(axes, DRAWN.items(), strict=True):
            for row, variant in enumerate(names):
                values = [m[measure] for m in variants[variant].values()]
                axis.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], color="#333333", linewidth=2)
                axis.plot(values, [row] * len(values), "o", color="#2a6fb0", markersize=4, alpha=0.7)
            axis.set_xscale("log")
            axis.set_title(title)
            axis.grid(axis="x", which="both", alpha=0.25)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        axes[1].set_xlabel(f"KL to FP16 at temperature 4, times 16 (nats); pebble {setting}, a dot a calibration seed")
        figure.tight_layout()
        path = folder / f"{name}-{setting}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written

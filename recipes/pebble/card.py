"""What stands beside the weights: the loss curve as a picture and the model card. Knows results, measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(stages: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as a picture, one stage of training after another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 3.5), dpi=110)
    before = 0.0
    for i, stage in enumerate(stages):
        minutes = [before + seconds / 60 for seconds, _ in stage["curve"]]
        axes.plot(minutes, [loss for _, loss in stage["curve"]], linewidth=1.2, label=f"stage {i + 1}")
        before += stage["minutes"]
    axes.set(xlabel="minutes", ylabel="loss on answers, nats a token", yscale="log", title="pebble: training loss")
    axes.grid(alpha=0.3, which="both")
    if len(stages) > 1:
        axes.legend()
    fig.tight_layout()
    fig.savefig(path)


def card(result: dict[str, Any]) -> str:
    """The model card."""
    table = ["| task | English | Chinese | together |", "|---|---|---|---|"]
    for task, row in result["tasks"].items():
        (en, n_en), (zh, n_zh) = row["en"], row["zh"]
        together = f"{100 * (en + zh) / (n_en + n_zh):.1f}% of {n_en + n_zh}"
        table.append(f"| {task} | {100 * en / max(n_en, 1):.1f}% | {100 * zh / max(n_zh, 1):.1f}% | {together} |")
    table.append(f"| **all** | | | **{100 * result['exact']:.1f}%** |")
    loss, stages = result["rounding"], result["stages"]
    told = [
        f"{i + 1}. `{s['command']}`: {s['steps']} steps, {s['conversations']:,} conversations, "
        f"{s['minutes']:.1f} minutes on {s['device']}."
        for i, s in enumerate(stages)
    ]
    return f"""---
license: apache-2.0
language: [en, zh]
library_name: transformers
pipeline_tag: image-text-to-text
---
# pebble

A Qwen2-VL of {result["parameters"]:,} parameters ({result["bytes"] / 1e6:.1f} MB in bfloat16) that knows a small drawn
world: coloured shapes, their places and counts, printed words and numbers, bar charts, small documents, two or three
pictures at once, a shape that moves in a video. It answers in English and Chinese, says when something is not in the
picture, and describes a picture in a sentence or two. It is made to be quantized, checked, served and measured on a
laptop; it knows nothing of photographs.

## Exact answers on the test split

Greedy, bfloat16, through transformers' own pass and the processor beside the weights; an answer counts when every
character is right.

{chr(10).join(table)}

## What int4 costs it

Plain rounding of its decoder to int4 (asymmetric, group 128) costs {loss["mean_kl"]:.4f} nats of KL a token on
{loss["tokens"]:.0f} answer tokens of the test split, top-1 agreement {100 * loss["top1_agreement"]:.2f}%. As trained it
was {result["clean"]["mean_kl"]:.4f}: too little to tell one method from another. So after training a few channels of
every decoder layer are multiplied by 16 to 64 where they are made and divided where they are used (`outliers.py`):
powers of two, which change no output, but give the weights the outlier channels that large released models have and
that int4 methods are made for.

## How it was made

From random weights in {sum(stage["minutes"] for stage in stages):.1f} minutes; every conversation is drawn once.

{chr(10).join(told)}

Trained {result["date"]} with {result["versions"]}.

The data is drawn by `draw.py` and asked by `questions.py` and its neighbours; nothing is downloaded. What a picture
says (not where exactly or how large it is drawn) is hashed, and the hash says whether it is of the training,
calibration or test split; texts without a picture likewise. Loss on the answers' tokens alone; Muon for the matrices
and AdamW for the rest; some pictures are shrunk or given noise. Loss curve: `loss.png`; log: `train.log`.

Pictures are resized to between 112 x 112 and 224 x 224 pixels by the processor, the sizes it was trained on.
"""

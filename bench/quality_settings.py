"""Pebble with its channels scaled in several ways, every one the same function of its inputs: settings of the study.

The shipped pebble has channels planted so that int4 rounding hurts it (recipes/pebble/outliers.py), and AWQ's scales
undo exactly such a planting, so alone it would be a biased judge between methods. Knows no method and no measure.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipes.pebble import model_folder

PLANTED_BY = 2  # the seed that the shipped pebble's outlier channels were drawn with
UNEVEN = 0.4  # octaves


def planted_gains(model: Any) -> list[dict[str, Tensor]]:
    """Per decoder layer, what the shipped pebble's channels were multiplied by, read off a model of ones."""
    from ..recipes.pebble.outliers import spread

    ones = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ones.parameters():
            parameter.fill_(1.0)
    spread(ones, seed=PLANTED_BY)
    return [
        {
            "attention": layer.input_layernorm.weight,
            "mlp": layer.post_attention_layernorm.weight,
            "down": layer.mlp.up_proj.weight[:, 0],
        }
        for layer in ones.model.language_model.layers
    ]


@torch.no_grad()
def rescale(model: Any, gains: Sequence[Mapping[str, Tensor]]) -> None:
    """Multiply channels where they are made and divide them where they are used, in place: exact for powers of two."""
    for layer, gain in zip(model.model.language_model.layers, gains, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        layer.input_layernorm.weight.mul_(gain["attention"])
        layer.post_attention_layernorm.weight.mul_(gain["mlp"])
        for user in (attention.q_proj, attention.k_proj, attention.v_proj):
            user.weight.div_(gain["attention"])
        for user in (mlp.gate_proj, mlp.up_proj):
            user.weight.div_(gain["mlp"])
        mlp.up_proj.weight.mul_(gain["down"][:, None])
        mlp.down_proj.weight.div_(gain["down"])


def shipped(folder: Path) -> Path:
    """Pebble as the package has it: one channel in twenty planted 16 to 64 times as large."""
    return model_folder()


def trained(folder: Path, *, octaves: float = 0.0) -> Path:
    """Pebble as training left it, the planting undone exactly; then, with `octaves`, every channel rescaled by
    2 ** (octaves * normal), as uneven as a released model's channels are and no one channel more than its
    neighbours."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..recipes.pebble.checkpoint import save

    if not (folder / "config.json").is_file():
        model = AutoModelForImageTextToText.from_pretrained(model_folder(), dtype=torch.float32)
        gains = planted_gains(model)
        rescale(model, [{k: 1 / g for k, g in layer.items()} for layer in gains])
        if octaves:
            draw = torch.Generator().manual_seed(7)
            rescale(
                model,
                [
                    {k: 2 ** (octaves * torch.randn(g.shape, generator=draw)) for k, g in layer.items()}
                    for layer in gains
                ],
            )
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        save(model, AutoProcessor.from_pretrained(model_folder()), part)
        os.replace(part, folder)
    return folder


# setting -> function from a folder to keep it in to the checkpoint
SETTINGS: dict[str, Callable[[Path], Path]] = {
    "shipped": shipped,
    "trained": trained,
    "uneven": functools.partial(trained, octaves=UNEVEN),
}

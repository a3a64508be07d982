"""Outlier channels: an exact rescaling that makes pebble's decoder as hard to round as a released model's.

Large language models carry a few channels whose activations are tens of times the others' (AWQ and SmoothQuant are
built on this); minutes of training do not grow them, and plain int4 rounding of pebble as trained costs almost
nothing. Here a few channels are multiplied by a power of two where they are made and divided by it where they are
used: not one output bit changes, but weights that share a scale now span a wide range.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 0.05  # of the channels
POWERS = (4, 6)  # of two: 16 to 64 times


def _gains(channels: int, rng: Random) -> Tensor:
    import torch

    gains = torch.ones(channels)
    for channel in rng.sample(range(channels), round(SHARE * channels)):
        gains[channel] = 2.0 ** rng.randint(*POWERS)
    return gains


def spread(model: Any, *, seed: int) -> None:
    """Rescale in place: norm to q, k, v; norm to gate, up; up to down, in every decoder layer."""
    import torch

    rng = Random(f"outliers {seed}")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, users in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                gains = _gains(norm.weight.shape[0], rng).to(norm.weight.device)
                norm.weight.mul_(gains)
                for user in users:
                    user.weight.div_(gains)
            gains = _gains(mlp.up_proj.weight.shape[0], rng).to(mlp.up_proj.weight.device)
            mlp.up_proj.weight.mul_(gains[:, None])
            mlp.down_proj.weight.div_(gains)

"""What every method is given and what it gives back. Methods are functions in a table; see METHODS in walk.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .family import Group
from .grid import Quantized, dequantize


@dataclass(frozen=True)
class Nf4:
    """One weight in bitsandbytes' 4-bit form: `tensors` by suffix ("" is the packed weight itself, "absmax", ...),
    and what they dequantize to, float32 [out, in]."""

    tensors: Mapping[str, Tensor]
    weight: Tensor


@dataclass(frozen=True)
class Problem:
    """One decoder layer to quantize. `weights`: on the device, by name inside the layer (norms and biases too), in the
    compute dtype. `grams`: per group, H = sum over tokens of x x^T / tokens, float32 [in, in]; none for a group that no
    token reached. `stored` is the dtype that norms and biases are written in, `head_dim` the width of an attention
    head, `tokens` how many the calibration has: what H is damped by (gptq.damping).
    """

    weights: Mapping[str, Tensor]
    groups: tuple[Group, ...]
    grams: dict[Group, Tensor]
    stored: torch.dtype = torch.bfloat16
    head_dim: int = 128
    tokens: int = 2**30


@dataclass(frozen=True)
class Solution:
    """`quantized` by linear name; `changed` are 16-bit parameters that absorbed a scale, by parameter name.

    `errors`: by linear, tr(dW H dW^T) / tr(W H W^T): the share of its output's energy on the calibrated inputs that
    quantizing it costs, everything else as before (under a pull: what it is away from where it was pulled); of the
    weight's own energy when not calibrated. `fallbacks`: linears
    that plain rounding to nearest serves better than what was asked for, or that nothing could judge, and why.
    """

    quantized: Mapping[str, Quantized | Nf4]
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)


def restored(x: Quantized | Nf4) -> Tensor:
    """The float32 [out, in] that a quantized weight stands for."""
    return dequantize(x) if isinstance(x, Quantized) else x.weight


def output_squares(weight: Tensor, gram: Tensor | None) -> Tensor:
    """The mean square of each row's output, w H w^T, or of the row itself where there is no H: [rows]."""
    if gram is None:
        return weight.float().square().sum(1)
    if gram.dtype.itemsize > 2:
        weight = weight.to(gram.dtype)
        return ((weight @ gram) * weight).sum(1)
    return (torch.mm(weight.to(gram.dtype), gram, out_dtype=torch.float32) * weight).sum(1)

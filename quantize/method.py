"""What every method is given and what it gives back. Methods are functions in a table; see METHODS in walk.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """One decoder layer to quantize. `weights`: float32 on the device, by name inside the layer (norms and biases
    too). `grams`: per group, H = sum over tokens of x x^T / tokens, float32 [in, in]; empty when not calibrated."""

    weights: Mapping[str, Tensor]
    groups: tuple[Group, ...]
    grams: Mapping[Group, Tensor]


@dataclass(frozen=True)
class Solution:
    """`quantized` by linear name; `changed` are 16-bit parameters that absorbed a scale, by parameter name.

    Where scales moved between layers, `columns` [in] and `rows` [out] are, per linear, what its original columns were
    multiplied by and its original rows divided by (absent: 1), so that errors can be told in original terms.
    """

    quantized: Mapping[str, Quantized | Nf4]
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


def restored(x: Quantized | Nf4) -> Tensor:
    """The float32 [out, in] that a quantized weight stands for."""
    return dequantize(x) if isinstance(x, Quantized) else x.weight


def in_original_terms(solution: Solution, name: str) -> Tensor:
    """The restored weight of linear `name` with every moved scale moved back, float32 [out, in]."""
    weight = restored(solution.quantized[name])
    if name in solution.columns:
        weight = weight / solution.columns[name]
    if name in solution.rows:
        weight = weight * solution.rows[name][:, None]
    return weight


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(delta H delta^T), the squared error that `delta` [out, in] makes on the calibrated outputs. A scalar."""
    return ((delta @ gram) * delta).sum()

"""Packed int4 layouts, to the bit: AWQ GEMM, GPTQ, compressed-tensors pack-quantized.

Pure functions from a Quantized to named tensors and back. Knows no model and no file. Words are int32 and hold eight
nibbles, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..quantize.grid import LEVELS, MIDDLE, Quantized

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column AWQ_ORDER[i] of its eight
SEQUENTIAL = tuple(range(8))
BLOCK = 2**13  # rows of a very tall weight packed at a time


def pack_last(values: Tensor, order: tuple[int, ...] = SEQUENTIAL) -> Tensor:
    """uint8 [..., n] with values 0..15 -> int32 [..., ceil(n / 8)]; missing columns count as 0."""
    if values.shape[-1] % 8:
        values = torch.nn.functional.pad(values, (0, 8 - values.shape[-1] % 8))
    eight = values.unflatten(-1, (-1, 8))
    low, high = (torch.tensor(order[start::2], device=values.device) for start in (0, 1))
    pairs = eight.index_select(-1, high).mul_(16).bitwise_or_(eight.index_select(-1, low))
    return pairs.view(torch.int32).squeeze(-1)  # four bytes a word, the first lowest


def unpack_last(words: Tensor, count: int, order: tuple[int, ...] = SEQUENTIAL) -> Tensor:
    """int32 [..., m] -> uint8 [..., count], the inverse of `pack_last`."""
    eight = torch.empty((*words.shape, 8), dtype=torch.uint8, device=words.device)
    for place, column in enumerate(order):
        eight[..., column] = ((words >> (4 * place)) & 15).to(torch.uint8)
    return eight.flatten(-2)[..., :count].contiguous()


def _matrix(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """One of a linear's tensors. ValueError where it is missing or no matrix."""
    found = tensors.get(name)
    if found is None or found.ndim != 2 or not found.numel():
        raise ValueError(f"its tensor {name} is {'missing' if found is None else f'no matrix: {tuple(found.shape)}'}")
    return found


def _words(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Packed int32 words. ValueError for others (bytes not packed, another layout's), which would be read as other
    numbers and look like weights."""
    found = _matrix(tensors, name)
    if found.dtype != torch.int32 or found.shape != shape:
        kind = str(found.dtype).removeprefix("torch.")
        raise ValueError(f"its tensor {name} is {kind} {tuple(found.shape)}, where this format has int32 {shape}")
    return found


def pack_awq(x: Quantized, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """qweight int32 [in, out/8], qzeros int32 [in/g, out/8], scales fp16 [in/g, out]: nibbles along *out*, shuffled.

    Scales are fp16 by this format's definition, whatever the checkpoint's `dtype`.
    """
    return {
        "qweight": pack_last(x.q.T.contiguous(), AWQ_ORDER),
        "qzeros": pack_last(x.zero.T.contiguous(), AWQ_ORDER),
        "scales": x.scale.T.to(torch.float16).contiguous(),
    }


def unpack_awq(tensors: Mapping[str, Tensor]) -> Quantized:
    """The inverse of `pack_awq`. ValueError for tensors that are not this layout's."""
    scales, width = _matrix(tensors, "scales"), _matrix(tensors, "qweight").shape[0]
    groups, out = scales.shape
    q = unpack_last(_words(tensors, "qweight", (width, -(-out // 8))), out, AWQ_ORDER).T.contiguous()
    zero = unpack_last(_words(tensors, "qzeros", (groups, -(-out // 8))), out, AWQ_ORDER).T.contiguous()
    return Quantized(q, scales.T.float().contiguous(), zero, width // groups, bool((zero == MIDDLE).all()))


def pack_gptq(x: Quantized, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """qweight int32 [in/8, out] along *in*, qzeros int32 [in/g, out/8] holding zero - 1 (version 1), scales fp16
    [in/g, out], g_idx int32 [in]. Scales are fp16 whatever the checkpoint's `dtype`.

    ValueError for an asymmetric grid: today's engines load symmetric ones only.
    """
    if not x.symmetric:
        raise ValueError("the gptq format holds symmetric weights only (engines refuse sym: false); use awq")
    width = x.q.shape[1]
    return {
        "qweight": pack_last(x.q).T.contiguous(),
        "qzeros": pack_last(x.zero.T.contiguous() - 1),
        "scales": x.scale.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32) // x.group_size,
    }


def unpack_gptq(tensors: Mapping[str, Tensor], *, stored_less: int = 1) -> Quantized:
    """The inverse of `pack_gptq`. `stored_less`: what zero points are stored short of, 0 in version 2 of the format.

    ValueError where `g_idx` shuffles columns across groups, which no engine loads, for a zero point of 0 in version 1,
    which its readers take for 0, for 16, or for a carry into the next one, and for tensors that are not this layout's.
    """
    scales, rows = _matrix(tensors, "scales"), _matrix(tensors, "qweight").shape[0]
    groups, out = scales.shape
    width, size = rows * 8, rows * 8 // groups
    order = tensors.get("g_idx")
    if order is not None and not torch.equal(order.long().cpu(), torch.arange(width) // size):
        raise ValueError("its columns are in activation order across groups, which no engine loads; use static groups")
    q = unpack_last(_words(tensors, "qweight", (rows, out)).T.contiguous(), width)
    zero = (unpack_last(_words(tensors, "qzeros", (groups, -(-out // 8))), out) + stored_less).T.contiguous()
    if int(zero.max()) > LEVELS:
        raise ValueError("it has a zero point of 0, which version 1 of the format cannot hold; store it as gptq_v2")
    return Quantized(q, scales.T.float().contiguous(), zero, size, bool((zero == MIDDLE).all()))


def pack_ct(x: Quantized, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """weight_packed int32 [out, ceil(in/8)], weight_scale `dtype` [out, in/g], weight_shape int64 [2], and when
    asymmetric weight_zero_point int32 [ceil(out/8), in/g] along *out*. Readers decompress to the scale's dtype, so it
    is the checkpoint's."""
    tensors = {
        "weight_packed": pack_last(x.q),
        "weight_scale": x.scale.to(dtype),
        "weight_shape": torch.tensor(x.q.shape, dtype=torch.int64),
    }
    if not x.symmetric:
        tensors["weight_zero_point"] = pack_last(x.zero.T.contiguous()).T.contiguous()
    return tensors


def unpack_ct(tensors: Mapping[str, Tensor]) -> Quantized:
    """The inverse of `pack_ct`. ValueError for tensors that are not this layout's."""
    if (shape := tensors.get("weight_shape")) is None or shape.numel() != 2:
        raise ValueError("its tensor weight_shape is missing or no two numbers")
    out, width = (int(n) for n in shape)
    scale, symmetric = _matrix(tensors, "weight_scale").float(), "weight_zero_point" not in tensors
    groups = scale.shape[1]
    if symmetric:
        zero = torch.full(scale.shape, MIDDLE, dtype=torch.uint8)
    else:
        packed = _words(tensors, "weight_zero_point", (-(-out // 8), groups))
        zero = unpack_last(packed.T.contiguous(), out).T.contiguous()
    q = unpack_last(_words(tensors, "weight_packed", (out, -(-width // 8))), width)
    return Quantized(q, scale, zero, width // groups, symmetric)


@dataclass(frozen=True)
class Layout:
    """A packed layout: its tensors' suffixes (the first marks a packed linear), its two functions, and the dimension
    along which each tensor holds the linear's rows."""

    suffixes: tuple[str, ...]
    pack: Callable[[Quantized, torch.dtype], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], Quantized]
    rows: Mapping[str, int]


LAYOUTS = {
    "awq": Layout(("qweight", "qzeros", "scales"), pack_awq, unpack_awq, {"qweight": 1, "qzeros": 1, "scales": 1}),
    "gptq": Layout(
        ("qweight", "qzeros", "scales", "g_idx"), pack_gptq, unpack_gptq, {"qweight": 1, "qzeros": 1, "scales": 1}
    ),
    "compressed-tensors": Layout(
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
        pack_ct,
        unpack_ct,
        {"weight_packed": 0, "weight_scale": 0, "weight_zero_point": 0},
    ),
}


def pack_blocks(
    x: Quantized, layout: Layout, dtype: torch.dtype, *, device: torch.device, block: int = BLOCK
) -> dict[str, Tensor]:
    """What `layout.pack` gives for a weight of many rows, `block` of them (a multiple of 8) at a time on `device`, put
    together on the host: so it takes little memory beside the weight."""
    parts = []
    for start in range(0, len(x.q), block):
        q, scale, zero = (t[start : start + block].to(device) for t in (x.q, x.scale, x.zero))
        part = layout.pack(replace(x, q=q, scale=scale, zero=zero), dtype)
        parts.append({name: tensor.cpu() for name, tensor in part.items()})
    whole = {
        name: torch.cat([part[name] for part in parts], along)
        for name, along in layout.rows.items()
        if name in parts[0]
    }
    if "weight_shape" in parts[0]:
        whole["weight_shape"] = torch.tensor(x.q.shape, dtype=torch.int64)
    return {**parts[0], **whole}


def pack_lossless(x: Quantized, format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed without loss: a scale that the format's usual dtype does not hold is kept in float32."""
    tensors = LAYOUTS[format].pack(x, dtype)
    scale = "weight_scale" if format == "compressed-tensors" else "scales"
    whole = x.scale if format == "compressed-tensors" else x.scale.T
    if not torch.equal(tensors[scale].float(), whole):
        tensors[scale] = whole.contiguous()
    return tensors

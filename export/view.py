"""The 16-bit view of packed files: what an engine computes with, under the checkpoint's own tensor names.

A packed folder looks like any other Source here, so the same walk that read the original can read the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantize.bnb import functional
from ..quantize.grid import Quantized, dequantize
from ..quantize.source import Meta, Source, open_source
from .packing import LAYOUTS

NF4_STATE = "quant_state.bitsandbytes__nf4"
NF4 = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE)


def packed_format(config: Mapping[str, Any]) -> str | None:
    """The format that config.json declares, by mmq's name for it; None when it declares no quantization."""
    declared = config.get("quantization_config") or {}
    method = declared.get("quant_method")
    return "bnb" if method == "bitsandbytes" else method


def packed_linears(names: Mapping[str, Any], format: str) -> set[str]:
    """The linears that are packed, judged by the tensors present: names without the suffix."""
    if format == "bnb":
        return {n.removesuffix(f".weight.{NF4_STATE}") for n in names if n.endswith(f".weight.{NF4_STATE}")}
    mark = "." + LAYOUTS[format].suffixes[0]
    return {n.removesuffix(mark) for n in names if n.endswith(mark)}


def restore(linear: str, format: str, get: Callable[[str], Tensor], names: Mapping[str, Any]) -> Tensor:
    """The float32 [out, in] of one packed linear. ValueError when bitsandbytes is wanted and absent."""
    if format == "bnb":
        return _restore_nf4(linear, get, names)
    return dequantize(on_grid(linear, format, get, names))


def on_grid(linear: str, format: str, get: Callable[[str], Tensor], names: Mapping[str, Any]) -> Quantized:
    """One packed linear of AWQ, GPTQ or compressed-tensors on its integer grid."""
    layout = LAYOUTS[format]
    return layout.unpack({s: get(f"{linear}.{s}") for s in layout.suffixes if f"{linear}.{s}" in names})


def _restore_nf4(linear: str, get: Callable[[str], Tensor], names: Mapping[str, Any]) -> Tensor:
    library = functional()
    state = {s: get(f"{linear}.weight.{s}") for s in NF4 if f"{linear}.weight.{s}" in names}
    quant_state = library.QuantState.from_dict(state, device=torch.device("cpu"))
    return library.dequantize_4bit(get(f"{linear}.weight"), quant_state).float()


def restored_tensors(path: Path, format: str) -> dict[str, Tensor]:
    """Every tensor of one packed file, packed linears restored to `<linear>.weight`, the rest as it lies there."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    linears = packed_linears(tensors, format)
    view = {n: t for n, t in tensors.items() if _owner(n, format) not in linears}
    for linear in linears:
        view[f"{linear}.weight"] = restore(linear, format, tensors.__getitem__, tensors)
    return view


def _owner(name: str, format: str) -> str | None:
    """The linear that a packed tensor belongs to; None for a tensor of no packed layout."""
    if format == "bnb":
        head, found, _ = name.partition(".weight.")
        return head if found else name.removesuffix(".weight")
    head, _, leaf = name.rpartition(".")
    return head if leaf in LAYOUTS[format].suffixes else None


def view(folder: Path) -> Source:
    """The folder as a Source. A folder that declares no quantization is shown as it is."""
    raw = open_source(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    format = packed_format(config)
    if format is None:
        return raw
    if format not in LAYOUTS and format != "bnb":
        raise ValueError(f"{folder}: quantized as {format!r}; mmq reads {', '.join(LAYOUTS)} and bitsandbytes NF4")
    linears = packed_linears(raw.metas, format)
    metas = {n: m for n, m in raw.metas.items() if _owner(n, format) not in linears}
    dtypes = [m.dtype for m in metas.values() if m.dtype is not None]
    common = max(set(dtypes), key=dtypes.count) if dtypes else torch.bfloat16
    for linear in linears:
        shape = packed_shape(linear, format, raw)
        metas[f"{linear}.weight"] = Meta(shape, common, 2 * shape[0] * shape[1])

    def get(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        return restore(linear, format, raw.get, raw.metas) if linear in linears else raw.get(name)

    return Source(folder, metas, get)


def packed_shape(linear: str, format: str, raw: Source) -> tuple[int, int]:
    """[out, in] of a packed linear."""
    if format == "bnb":
        state = json.loads(bytes(raw.get(f"{linear}.weight.{NF4_STATE}").tolist()))
        out, width = state["shape"]
        return int(out), int(width)
    if format == "compressed-tensors":
        out, width = raw.get(f"{linear}.weight_shape").tolist()
        return int(out), int(width)
    rows, columns = raw.metas[f"{linear}.qweight"].shape
    return (columns * 8, rows) if format == "awq" else (columns, rows * 8)

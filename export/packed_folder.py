"""A packed checkpoint's folder, anybody's: its format by its config, its linears on their grids, one by one.

Knows no package: a folder is read by what its config says and what its tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quantize.grid import Quantized
from ..quantize.source import Source, open_source
from ..recipes.folder import read_config
from .packing import LAYOUTS, unpack_gptq
from .subject import quantization_of
from .view import packed_linears


@dataclass(frozen=True)
class Packed:
    """A folder of another package: its tensors, mmq's name for its format, and the names of the linears packed in it.

    `stored_less` is what its GPTQ zero points are stored short of: 1 in version 1, 0 in version 2.
    """

    source: Source
    format: str
    linears: frozenset[str]
    stored_less: int = 1

    def get(self, linear: str) -> Quantized:
        """One packed linear on its grid. ValueError where its tensors do not make one."""
        suffixes = LAYOUTS[self.format].suffixes
        found = {s: self.source.get(f"{linear}.{s}") for s in suffixes if f"{linear}.{s}" in self.source.metas}
        try:
            if self.format == "gptq":
                return unpack_gptq(found, stored_less=self.stored_less)
            return LAYOUTS[self.format].unpack(found)
        except (KeyError, ValueError) as e:
            raise ValueError(f"{self.source.folder}: {linear}: {e}") from None

    def owner(self, name: str) -> str | None:
        """The packed linear that tensor `name` is a part of."""
        head, _, leaf = name.rpartition(".")
        return head if leaf in LAYOUTS[self.format].suffixes and head in self.linears else None


def open_packed(folder: Path) -> Packed:
    """Read the headers and the config of a folder that AutoAWQ, AutoGPTQ, GPTQModel, llm-compressor or AutoRound wrote.

    ValueError where it is in no layout that mmq reads, or holds no packed linear; OSError as its files give it.
    """
    format, stored_less = _layout(quantization_of(folder, read_config(folder)), folder)
    source = open_source(folder)
    found = packed_linears(source.metas, format)
    if not found:
        raise ValueError(f"{folder}: its config says {format}, but no linear in it is packed so")
    return Packed(source, format, frozenset(found), stored_less)


def _layout(declared: Mapping[str, Any], folder: Path) -> tuple[str, int]:
    """(format, what zero points are stored short of) from a `quantization_config`."""
    method = str(declared.get("quant_method")).removeprefix("intel/")
    kind = declared.get("checkpoint_format") or declared.get("version") or declared.get("format")
    if method == "auto-round":  # its own form, around one of the two others
        packing = str(declared.get("packing_format"))
        method, kind = ("awq", "gemm") if "awq" in packing else ("gptq", "gptq")
    bits = {declared.get("bits", declared.get("w_bit", 4))}
    if method == "compressed-tensors":
        groups = (declared.get("config_groups") or {}).values()
        bits = {(g.get("weights") or {}).get("num_bits") for g in groups}
        kind = next((g["format"] for g in groups if g.get("format")), declared.get("format"))
        _check_weights_alone(declared, folder)
    known = {
        ("awq", "gemm"): ("awq", 1),
        ("gptq", "gptq"): ("gptq", 1),
        ("gptq", None): ("gptq", 1),
        ("gptq", "gptq_v2"): ("gptq", 0),
        ("compressed-tensors", "pack-quantized"): ("compressed-tensors", 1),
    }
    key = (method, str(kind).lower() if kind else None)
    if key not in known or bits != {4}:
        readable = ", ".join(f"{m} {k}" for m, k in known if k)
        raise ValueError(f"{folder}: packed as {method} {kind}, {bits} bits; mmq brings home 4 bits in {readable}")
    return known[key]


def _check_weights_alone(declared: Mapping[str, Any], folder: Path) -> None:
    """ValueError where a compressed-tensors config does more than to hold weights as integers: without that part they
    are another model's."""
    more = [key for key in ("kv_cache_scheme", "transform_config") if declared.get(key)]
    for group in (declared.get("config_groups") or {}).values():
        more += [key for key in ("input_activations", "output_activations") if group.get(key)]
        kind = (group.get("weights") or {}).get("type", "int")
        more += [f"weights of type {kind}"] if kind != "int" else []
    if more:
        raise ValueError(f"{folder}: its quantization_config has {more[0]}, which mmq can neither keep nor leave out")

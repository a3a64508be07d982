"""`quantization_config`: what an engine is told about an artifact, format by format, and what it must leave alone.

The same key means different things in different engines, so the skip list is written to hold in all of them at once:
substrings for vLLM and SGLang, full layer names for transformers (match at a module boundary) and LMDeploy (which asks
whether a layer's name is *contained in* an entry). Knows no tensor values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Packing:
    """What a config must say: the format, its grid, and the names of the linears left in 16 bit.

    `skipped`: module names (checkpoint's and transformers' spellings) of linears that are not quantized;
    `skip`: the family's substrings for them; `head`: the stored name of the output head where it is packed too, which
    no entry of these may then cover.
    """

    format: str
    group_size: int
    symmetric: bool
    skip: tuple[str, ...]
    skipped: tuple[str, ...]
    dtype: str  # "bfloat16" or "float16": what bitsandbytes computes in
    head: str | None = None


def awq(p: Packing) -> dict[str, Any]:
    """AWQ GEMM, as AutoAWQ wrote it and every engine reads it."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": p.group_size,
        "zero_point": True,
        "modules_to_not_convert": _unique([*p.skip, *p.skipped]),
        **({"lm_head": True} if p.head else {}),  # vLLM's key: without it, it looks for 16-bit weights there
    }


def gptq(p: Packing) -> dict[str, Any]:
    """GPTQ version 1. No `dynamic` and no `modules_in_block_to_quantize`: a wrong entry there leaves a whole model in
    16 bit without a word, and readers see from the tensors which linears are packed."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": p.group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "lm_head": p.head is not None,
        "damp_percent": 0.01,
    }


def compressed_tensors(p: Packing) -> dict[str, Any]:
    """pack-quantized, only keys that compressed-tensors 0.17 knows."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear", *_named(p.head)],  # vLLM's head is no Linear
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": p.symmetric,
                    "strategy": "group",
                    "group_size": p.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": _unique(p.skipped),
        "kv_cache_scheme": None,
    }


def bnb(p: Packing) -> dict[str, Any]:
    """bitsandbytes NF4 with double quantization."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": p.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _unique([*(s.rstrip(".") for s in p.skip), *p.skipped]),
    }


CONFIGS = {"awq": awq, "gptq": gptq, "compressed-tensors": compressed_tensors, "bnb": bnb}

HEADLESS = ("gemma2", "gemma3n_text", "cohere", "cohere2", "cohere2_moe")  # the embeddings are used once more

# (method, symmetric) -> formats that hold the result without loss; the first is the default.
HOLDS: Mapping[tuple[str, bool], tuple[str, ...]] = {
    ("awq", False): ("awq", "compressed-tensors"),
    ("awq", True): ("awq", "gptq", "compressed-tensors"),
    ("rtn", False): ("awq", "compressed-tensors"),
    ("rtn", True): ("gptq", "awq", "compressed-tensors"),
    ("gptq", True): ("gptq", "compressed-tensors", "awq"),
    ("gptq", False): ("awq", "compressed-tensors"),
    ("bnb", False): ("bnb",),
}


def _named(head: str | None) -> list[str]:
    """The head as a target of its own, by the last part of its name: `lm_head` as a rule, `output` in InternLM2."""
    return [] if head is None else [f"re:.*{head.rpartition('.')[2]}$"]


def check_head(format: str, symmetric: bool, rows: int | None = None, kind: str | None = None) -> None:
    """ValueError where no engine loads a packed output head of so many `rows` in this format, or of a text model of
    type `kind` (None: not known yet).

    By vLLM 0.32's own loaders: bitsandbytes knows no packed head; the others are padded to a multiple of 64 rows,
    which only compressed-tensors' layout, rows first, can take afterwards.
    """
    if kind in HEADLESS:
        raise ValueError(f"engines give {kind} no output head, but its token embeddings once more; leave --head out")
    if format == "bnb":
        raise ValueError("no engine loads a head in bnb; --head int4 goes with awq, gptq and compressed-tensors")
    step = 64 if format != "compressed-tensors" else 1 if symmetric else 8
    if rows is not None and rows % step:
        other = "" if format == "compressed-tensors" else "; --format compressed-tensors can hold it"
        raise ValueError(
            f"the output head has {rows} rows, and engines load a packed one in {format} only in multiples of {step}"
            f"{other}; leave --head out"
        )


def settle(method: str, symmetric: bool | None, format: str | None) -> tuple[bool, str]:
    """Fill in what the user left open: (symmetric, format). ValueError when the format cannot hold the method."""
    if symmetric is None:
        symmetric = {"awq": format == "gptq", "rtn": format == "gptq", "gptq": format != "awq", "bnb": False}[method]
    if method == "bnb" and symmetric:
        raise ValueError("bnb has no symmetric grid; leave --symmetric out")
    holds = HOLDS[(method, symmetric)]
    if format is None:
        return symmetric, holds[0]
    if format not in holds:
        grid = "symmetric" if symmetric else "asymmetric"
        raise ValueError(f"format {format} cannot hold {grid} {method} without loss; it can be {', '.join(holds)}")
    return symmetric, format


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))

"""Families: where a model class keeps its decoder layers, and which linears in them share an input.

A family is a row of data. Knows nothing of tensors, files or methods. To add one, add a row to FAMILIES and a tiny
random model of the class to tests/test_family.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Linears of a decoder layer that read the same input, and the module just before whose output can absorb
    a per-channel scale (a norm's weight, or the rows of a linear). Names are relative to the decoder layer."""

    linears: tuple[str, ...]
    absorber: str | None


@dataclass(frozen=True)
class Family:
    """One row. `layers` is the module path of the decoder layers; `skip` are the substrings by which engines
    know the parts that stay in 16 bit (see export.config for how each engine reads them)."""

    model_types: tuple[str, ...]
    layers: str
    skip: tuple[str, ...]
    groups: tuple[Group, ...]


# The common shape: pre-norm attention and a gated MLP, as in Llama and all that came of it.
LLAMA = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Group(("self_attn.o_proj",), "self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Group(("mlp.down_proj",), "mlp.up_proj"),
)

FAMILIES = (
    Family(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        layers="model.language_model.layers",
        skip=("visual.", "model.visual.", "lm_head"),
        groups=LLAMA,
    ),
)


def family_of(model_type: str) -> Family:
    """The row for config.json's `model_type`. ValueError that says how to add one."""
    for row in FAMILIES:
        if model_type in row.model_types:
            return row
    known = ", ".join(t for row in FAMILIES for t in row.model_types)
    raise ValueError(
        f"model family {model_type!r} is not known; known are {known}. "
        "To add it, add a row (about ten lines of data) to FAMILIES in quantize/family.py"
    )

"""Packed layouts: round trips by property, golden words by hand, and readings by other people's code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmq.export.packing import LAYOUTS, pack_last, unpack_gptq, unpack_last
from mmq.quantize.grid import Quantized, dequantize


def drawn(out: int, width: int, group_size: int, symmetric: bool, seed: int) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    shape = (out, width // group_size)
    scale = (torch.rand(shape, generator=g) + 0.01).to(torch.bfloat16).float()
    zero = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
    if symmetric:
        zero = torch.full(shape, 8, dtype=torch.uint8)
    else:
        zero[0, 0] = 3  # never all 8 by chance: that reads as symmetric
    q = torch.randint(0, 16, (out, width), generator=g, dtype=torch.uint8)
    return Quantized(q, scale, zero, group_size, symmetric)


def same(a: Quantized, b: Quantized) -> bool:
    return (
        torch.equal(a.q, b.q)
        and torch.equal(a.scale, b.scale)
        and torch.equal(a.zero, b.zero)
        and (a.group_size, a.symmetric) == (b.group_size, b.symmetric)
    )


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 12).map(lambda n: 8 * n),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_round_trip(out: int, groups: int, group_size: int, symmetric: bool, layout: str, seed: int) -> None:
    x = drawn(out, groups * group_size, group_size, symmetric or layout == "gptq", seed)
    assert same(LAYOUTS[layout].unpack(LAYOUTS[layout].pack(x, torch.bfloat16)), x)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_count_packs(rows: int, count: int, seed: int) -> None:
    values = torch.randint(0, 16, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack_last(pack_last(values), count), values)


def ramp() -> Quantized:
    """q[o, i] = (o + 2 i) mod 16, zero = o mod 16, scale = 1 + group: small enough to pack by hand."""
    out, width, g = 8, 64, 32
    q = (torch.arange(out)[:, None] + 2 * torch.arange(width)[None, :]) % 16
    zero = (torch.arange(out)[:, None] % 16).expand(out, 2)
    scale = (1.0 + torch.arange(2))[None, :].expand(out, 2)
    return Quantized(q.to(torch.uint8), scale.contiguous(), zero.to(torch.uint8).contiguous(), g, False)


def test_golden_awq() -> None:
    """Column order 0 2 4 6 1 3 5 7 from the lowest nibble: outputs 0..7 hold 0..7, so the word reads 75316420."""
    packed = LAYOUTS["awq"].pack(ramp(), torch.bfloat16)
    assert packed["qweight"].shape == (64, 1)
    assert packed["qweight"][0, 0].item() == 0x75316420
    assert packed["qweight"][4, 0].item() == 0xFDB9ECA8 - 2**32  # every nibble 8 higher; the top bit makes it negative
    assert packed["qzeros"].tolist() == [[0x75316420], [0x75316420]]
    assert packed["scales"].dtype == torch.float16
    assert packed["scales"][:, 0].tolist() == [1.0, 2.0]


def test_golden_gptq() -> None:
    """Sequential along the input: output 0 holds 0 2 4 ... 14, so the word reads ECA86420; zeros store 8 - 1."""
    x = ramp()
    x = Quantized(x.q, x.scale, torch.full_like(x.zero, 8), x.group_size, True)
    packed = LAYOUTS["gptq"].pack(x, torch.bfloat16)
    assert packed["qweight"].shape == (8, 8)
    assert packed["qweight"][0, 0].item() == 0xECA86420 - 2**32
    assert packed["qzeros"].tolist() == [[0x77777777], [0x77777777]]
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_golden_compressed_tensors() -> None:
    """Weights sequential along the input, zero points sequential along the output: 0..7 reads 76543210."""
    packed = LAYOUTS["compressed-tensors"].pack(ramp(), torch.bfloat16)
    assert packed["weight_packed"].shape == (8, 8)
    assert packed["weight_packed"][0, 0].item() == 0xECA86420 - 2**32
    assert packed["weight_zero_point"].tolist() == [[0x76543210, 0x76543210]]
    assert packed["weight_shape"].tolist() == [8, 64]
    assert packed["weight_scale"].dtype == torch.bfloat16


def test_gptq_refuses_asymmetric() -> None:
    with pytest.raises(ValueError, match="symmetric weights only"):
        LAYOUTS["gptq"].pack(ramp(), torch.bfloat16)


WRONG = {  # layout, and what is done to the tensors of a weight [24, 256]
    "AWQ's words along the input": ("awq", lambda t: t | {"qweight": torch.zeros(32, 24, dtype=torch.int32)}),
    "fewer outputs than words": ("awq", lambda t: t | {"scales": t["scales"][:, :8]}),
    "words of 64 bits": ("awq", lambda t: t | {"qweight": t["qweight"].long()}),
    "no zero points": ("awq", lambda t: {k: v for k, v in t.items() if k != "qzeros"}),
    "no scales": ("gptq", lambda t: {k: v for k, v in t.items() if k != "scales"}),
    "scales of no group": ("gptq", lambda t: t | {"scales": t["scales"][:0]}),
    "words in a row": ("gptq", lambda t: t | {"qweight": t["qweight"].flatten()}),
    "zero points of another layout": ("gptq", lambda t: t | {"qzeros": t["qzeros"].T.contiguous()}),
    "zero points in bytes": (
        "compressed-tensors",  # as its older versions wrote them
        lambda t: t | {"weight_zero_point": torch.zeros(24, 4, dtype=torch.int8)},
    ),
    "no shape": ("compressed-tensors", lambda t: {k: v for k, v in t.items() if k != "weight_shape"}),
    "a shape of others": ("compressed-tensors", lambda t: t | {"weight_shape": torch.tensor([1 << 40, 256])}),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_of_another_layout_are_not_read_as_weights(name: str) -> None:
    layout, spoil = WRONG[name]
    tensors = LAYOUTS[layout].pack(drawn(24, 256, 64, layout == "gptq", 1), torch.bfloat16)
    with pytest.raises(ValueError, match=r"^its tensor "):
        LAYOUTS[layout].unpack(spoil(tensors))


def test_a_zero_point_that_version_1_cannot_hold_is_refused() -> None:
    tensors = LAYOUTS["gptq"].pack(drawn(24, 256, 64, True, 1), torch.bfloat16)
    tensors["qzeros"][0, 0] |= 15  # 0, stored one short
    with pytest.raises(ValueError, match="cannot hold"):
        LAYOUTS["gptq"].unpack(tensors)
    assert int(unpack_gptq(tensors, stored_less=0).zero.max()) == 15


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_it(symmetric: bool) -> None:
    """The compressed-tensors package itself restores what we packed."""
    pack_quantized = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="needs compressed-tensors (comes with vLLM)"
    )
    x = drawn(24, 256, 64, symmetric, 1)
    packed = LAYOUTS["compressed-tensors"].pack(x, torch.bfloat16)
    q = pack_quantized.unpack_from_int32(packed["weight_packed"], 4, torch.Size([24, 256]), packed_dim=1)
    assert torch.equal(q.int() + 8, x.q.int())
    zero = torch.zeros(24, 4, dtype=torch.int8)
    if not symmetric:
        zero = pack_quantized.unpack_from_int32(packed["weight_zero_point"], 4, torch.Size([24, 4]), packed_dim=0)
    restored = (q.float() - zero.float().repeat_interleave(64, 1)) * packed["weight_scale"].float().repeat_interleave(
        64, 1
    )
    assert torch.equal(restored, dequantize(x))

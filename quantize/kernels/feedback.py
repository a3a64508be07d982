"""GPTQ inside one block of columns, as gptq.py defines it. Sums are taken in another order and a division is a product
with the inverse, so a code on the edge between two may be the other one.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# ruff: noqa: RUF005 (Triton knows no (*a, b))
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..grid import LEVELS

ROUNDED = 32  # rows that one program rounds
CHAIN = 16  # columns that it rounds one after another before what they hand on is multiplied


def round_block(
    weight: Tensor, target: Tensor, follow: Tensor, scale: Tensor, zero: Tensor, owner: Tensor, codes: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """GPTQ inside one block of columns, last column first; see gptq.py for the order and the names.

    weight, target, errors: float32 [b, rows]; follow: [b, b], column k below its diagonal; scale, zero: float32
    [groups, rows]; owner: int32 [b], the group of each column; codes: uint8 [b, rows]. All but `follow` contiguous.
    Writes codes and errors, and `target` is spent.
    """
    columns, rows = weight.shape
    _round_block[(triton.cdiv(rows, ROUNDED),)](
        weight, target, follow, scale, zero, owner, codes, errors, rows, columns, follow.stride(0), follow.stride(1),
        LEVELS=LEVELS, B=triton.next_power_of_2(max(columns, 16)), C=CHAIN, R=ROUNDED, num_warps=4,
    )  # fmt: skip


@triton.jit
def _fetch(at):
    """Ask for what lies there, so that it is near when it is read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["columns", "m_down", "m_right"])
def _round_block(
    w_ptr, t_ptr, m_ptr, scale_ptr, zero_ptr, owner_ptr, q_ptr, e_ptr, rows, columns, m_down, m_right,
    LEVELS: tl.constexpr, B: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # a thread has a row, in every warp alike: of C columns at a time nothing but their own errors is waited for, and
    # what those hand on to the block's other columns is a product, which the warps share
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = r < rows
    several = tl.arange(0, C)
    every = tl.arange(0, B)
    first = (tl.program_id(0) * R).to(tl.int64)
    column = tl.minimum(every, columns - 1)
    groups = tl.load(owner_ptr + column) * rows + first
    _fetch(w_ptr + column * rows + first)
    _fetch(t_ptr + column * rows + first)
    _fetch(scale_ptr + groups)
    _fetch(zero_ptr + groups)
    chunk = tl.maximum(columns - (columns - 1 - column) // C * C - C, 0)  # where the C columns begin that it is among
    _fetch(m_ptr + column * m_down + chunk * m_right)
    _fetch(m_ptr + tl.minimum(chunk + column % C, columns - 1) * m_down + chunk * m_right)
    for top in range(columns - C, -C, -C):
        ws = ()
        us = ()
        scales = ()
        inverses = ()
        zeros = ()
        for i in tl.static_range(C):
            k = max(top + C - 1 - i, 0)  # what is read twice where columns run out is not written
            group = tl.load(owner_ptr + k) * rows + r
            scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
            ws = ws + (tl.load(w_ptr + k * rows + r, mask=inside, other=0.0),)
            us = us + (tl.load(t_ptr + k * rows + r, mask=inside, other=0.0),)
            scales = scales + (scale,)
            inverses = inverses + (1.0 / scale,)
            zeros = zeros + (tl.load(zero_ptr + group, mask=inside, other=0.0),)
        codes = ()
        errors = ()
        for i in tl.static_range(C):
            m_row = m_ptr + max(top + C - 1 - i, 0) * m_right
            u = us[i]
            for j in tl.static_range(i):
                u += errors[j] * tl.load(m_row + max(top + C - 1 - j, 0) * m_down)
            code = tl.minimum(tl.maximum(libdevice.rint(u * inverses[i]) + zeros[i], 0.0), LEVELS * 1.0)
            codes = codes + (code,)
            errors = errors + (ws[i] - (code - zeros[i]) * scales[i],)
        for i in tl.static_range(C):
            k = top + C - 1 - i
            tl.store(q_ptr + k * rows + r, codes[i].to(tl.uint8), mask=inside & (k >= 0))
            tl.store(e_ptr + k * rows + r, errors[i], mask=inside & (k >= 0))
        tl.debug_barrier()
        if top > 0:
            mine = top + several
            behind = (every < top)[:, None] & inside[None, :]
            e = tl.load(e_ptr + mine[:, None] * rows + r[None, :], mask=inside[None, :], other=0.0)
            m = tl.load(
                m_ptr + mine[None, :] * m_down + every[:, None] * m_right, mask=(every < top)[:, None], other=0.0
            )
            place = t_ptr + every[:, None] * rows + r[None, :]
            t = tl.load(place, mask=behind, other=0.0)
            tl.store(place, tl.dot(m, e, t, input_precision="tf32x3"), mask=behind)
        tl.debug_barrier()

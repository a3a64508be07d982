"""The quantizer's inner loops as fused GPU kernels, in Triton. Imported only where Triton is installed (fused.py).

What they compute is defined by the plain torch beside their callers, which is also the path of a CPU; the tests hold
the two together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..clip import SHARES
from ..gptq import BLOCK
from ..grid import Grid
from .descent import descend, spans
from .errors import add_row_dots, rounding_errors
from .factor import outer, taken
from .feedback import round_block
from .rounding import best_shrink, quantize, scaled_errors

__all__ = [
    "add_row_dots", "best_shrink", "descend", "outer", "quantize", "round_block", "rounding_errors", "scaled_errors",
    "spans", "taken", "warm",
]  # fmt: skip


def warm(grid: Grid, widths: Sequence[int], device: torch.device) -> None:
    """Compile every kernel that inputs of these widths will need, on a few rows, beside whatever else is under way."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        for width in dict.fromkeys(widths):
            weight = torch.zeros(32, width, device=device)
            count = width // grid.group_size
            blocks = torch.zeros(count, grid.group_size, grid.group_size, device=device)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                if dtype in (grid.scale_dtype, torch.float32):
                    scaled_errors(weight.to(dtype), torch.ones(1, width, device=device), grid, weight.clone()[None])
            stored = weight.to(grid.scale_dtype)
            descend(stored, weight[0], weight[0] + 1, grid)
            spans(stored, weight[0], grid)
            best_shrink(weight, blocks, grid, SHARES)
            made = quantize(weight, grid, best_shrink(weight, blocks[:, 0].flatten(), grid, SHARES))
            square = torch.zeros(BLOCK, BLOCK, device=device)
            part, owner = square[:, : len(weight)].contiguous(), torch.zeros(BLOCK, dtype=torch.int32, device=device)
            steps, codes = torch.ones(1, len(weight), device=device), torch.empty_like(part, dtype=torch.uint8)
            for follow in (square, square.mT):  # as the tensor cores' factor lies and as cuSOLVER's
                round_block(part, part.clone(), follow, steps, steps, owner, codes, part.clone())
            d = rounding_errors(made, weight, weight[0], None, torch.bfloat16)
            rounding_errors(made, weight, None, weight[:, 0].contiguous(), torch.bfloat16)
            rounding_errors(made, weight, None, None, torch.bfloat16)
            add_row_dots(weight, d, torch.zeros(len(weight), device=device))
        torch.cuda.current_stream().synchronize()

"""Gram matrices: for each group of linears that share an input, H = sum over tokens of x x^T / tokens.

Every search and every rounding needs of the calibration only H, so no candidate runs the model again. H adds up over
samples, and its size does not depend on how many there were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ranks import total

TOKENS = 8192  # inputs gathered before they are multiplied: a pass over H costs as much as a thousand tokens
ROWS = 2048  # rows of H taken at a time


class Gram:
    """A sum of x x^T, float32 [in, in] in the end. Only blocks on and above the diagonal are computed. About `hold`
    inputs are gathered before they are multiplied."""

    def __init__(self, width: int, device: torch.device, *, hold: int = TOKENS):
        self.hold = hold
        self.total = torch.zeros(width, width, device=device)
        self.tokens = 0
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take [tokens, in], 16 or 32 bit. It must not be changed afterwards."""
        self._waiting.append(x)
        self.tokens += x.shape[0]
        if sum(w.shape[0] for w in self._waiting) >= self.hold:
            self._multiply()

    def _multiply(self) -> None:
        x = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting.clear()
        x = x.to(torch.float32) if x.device.type == "cpu" else x
        width = x.shape[1]
        for start in range(0, width, ROWS):
            rows = self.total[start : start + ROWS, start:]
            left, right = x[:, start : start + ROWS].T, x[:, start:]
            if x.dtype == torch.float32:
                rows.addmm_(left, right)
            else:  # exact products of 16-bit inputs, summed in float32 by the tensor cores
                torch.addmm(rows, left, right, out_dtype=torch.float32, out=rows)

    def mean(self) -> Tensor:
        """H of every rank's tokens, float32 [in, in]. The sum is handed over: nothing can be added afterwards."""
        if self._waiting:
            self._multiply()
        h = total(self.total)
        del self.total
        h /= total(h.new_tensor(self.tokens)).clamp_min(1)
        width = h.shape[0]
        for start in range(0, width, ROWS):
            stop = min(start + ROWS, width)
            square = h[start:stop, start:stop]
            square.copy_(torch.triu(square) + torch.triu(square, 1).T)
            h[stop:, start:stop] = h[start:stop, stop:].T
        return h


class Cross:
    """A sum of y x^T over pairs of inputs, float32 [in, in] in the end."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, width, device=device)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Take two [tokens, in] of one dtype."""
        for start in range(0, x.shape[1], ROWS):
            rows, left = self.total[start : start + ROWS], y[:, start : start + ROWS].T
            if x.dtype == torch.float32:
                rows.addmm_(left, x)
            else:
                rows += torch.mm(left, x, out_dtype=torch.float32)

    def mean(self, tokens: int) -> Tensor:
        """The sum of every rank over `tokens`, those of all of them."""
        return total(self.total).div_(max(tokens, 1))


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks of H [in, in] on its diagonal, [in / size, size, size]."""
    count = gram.shape[0] // size
    return gram.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

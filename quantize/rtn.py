"""Round to nearest: the baseline that every method must beat."""

from __future__ import annotations

from .grid import Grid, quantize
from .method import Problem, Solution


def rtn(problem: Problem, grid: Grid) -> Solution:
    """Every linear of the layer rounded on its own, no calibration."""
    names = [n for group in problem.groups for n in group.linears]
    return Solution({n: quantize(problem.weights[f"{n}.weight"], grid) for n in names})

"""Whether the fused GPU kernels can be used. Triton comes with a torch for GPUs and is missing from one for CPUs."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor


def fused(tensor: Tensor) -> ModuleType | None:
    """kernels/ where `tensor` lies on a GPU and Triton is installed, else None: the caller's plain torch then."""
    return _kernels() if tensor.is_cuda else None


@cache
def _kernels() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from . import kernels

    return kernels

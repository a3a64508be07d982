"""A weight that stays int4 in memory and is restored to 16 bit each time it is used: a torch tensor like any other.

Takes a quarter of the memory and costs a restoring at every use. Knows neither models nor files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..quantize.grid import Quantized, dequantize


class PackedWeight(Tensor):
    """[out, in] of `dtype`, which to every operation is the matrix that `restored` gives.

    `nibbles` uint8 [out, in / 2], the even column of a pair in the low half; `scale` and `zero` [out, in / group].
    """

    nibbles: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def __new__(cls, nibbles: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> PackedWeight:
        shape = (nibbles.shape[0], nibbles.shape[1] * 2)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=nibbles.device)  # pyright: ignore
        made.nibbles, made.scale, made.zero = nibbles, scale, zero
        return made

    def __init__(self, *parts: Any) -> None:
        """All is done in `__new__`."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore
        return f"PackedWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    def restored(self) -> Tensor:
        """[out, in] of the tensor's dtype: float32 arithmetic, rounded once."""
        q = torch.stack((self.nibbles & 15, self.nibbles >> 4), -1).flatten(1)
        size = q.shape[1] // self.scale.shape[1]
        return dequantize(Quantized(q, self.scale.float(), self.zero, size, False)).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            own: PackedWeight = args[0]
            device, dtype = kwargs.get("device") or own.device, kwargs.get("dtype") or own.dtype
            return cls(own.nibbles.to(device), own.scale.to(device), own.zero.to(device), dtype)
        args, kwargs = tree_map(lambda x: x.restored() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)


def packed_weight(weight: Quantized, dtype: torch.dtype) -> PackedWeight:
    """The weight in memory as int4. Its scales, exact in fp16, are kept so."""
    pairs = weight.q.view(len(weight.q), -1, 2)
    return PackedWeight(pairs[..., 0] | pairs[..., 1] << 4, weight.scale.half(), weight.zero, dtype)

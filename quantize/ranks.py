"""Several processes, one quantization: what each does alone and what they do together, under torchrun.

Samples are split over the ranks, their Gram matrices summed; of every linear each rank searches its own share of the
rows, and rounds these rows or, where that is faster, all rows of its own share of the linears. Without torchrun there
is one rank, and everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str) -> str:
    """Meet the other ranks; returns the device of this one: its own GPU, or the CPU."""
    if device == "cpu":
        dist.init_process_group("gloo")
        return device
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", device_id=torch.device(own))
    return own


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process among `world()` of them; rank 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int) -> slice:
    """This rank's part of `count` rows."""
    return _share(count, rank())


def _share(count: int, number: int) -> slice:
    return slice(count * number // world(), count * (number + 1) // world())


def total(tensor: Tensor) -> Tensor:
    """The sum of every rank's `tensor`, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def whole(part: Tensor, count: int) -> Tensor:
    """[count, ...] from every rank's `share` of it."""
    if world() == 1:
        return part
    rows = part.new_empty((count, *part.shape[1:]))
    for number in range(world()):
        piece = part.contiguous() if number == rank() else rows[_share(count, number)]
        dist.broadcast(piece, src=number)
    rows[share(count)] = part
    return rows


def spread(costs: Sequence[float]) -> list[int]:
    """A rank for each piece of work, the dearest given first and always to whoever has least to do."""
    owners, busy = [0] * len(costs), [0.0] * world()
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[piece] = busy.index(min(busy))
        busy[owners[piece]] += costs[piece]
    return owners


def sent(tensor: Tensor, owner: int) -> Tensor:
    """The owner's `tensor`; the others' are written over."""
    tensor = tensor.contiguous()
    if world() > 1:
        dist.broadcast(tensor, src=owner)
    return tensor


def everyones(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    box: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(box, value)
    return box


def agreed(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def own(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every world-th, so that long and short ones are spread."""
    return items[rank() :: world()]

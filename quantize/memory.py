"""What a run will take, known before it starts: GPU memory, host memory and time; and how to stay inside a budget.

Knows shapes, not tensors. The formulas follow steps.py, gram.py and lockstep.py stage by stage; docs/benchmarks.md
holds them against measurements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..recipes.samples import Sample
from . import awq, gram, routing
from .family import Group
from .inputs import encode, media_mask
from .judge import PIECE
from .ranks import world
from .skeleton import Skeleton, embeddings
from .steps import STEPS

MICRO_BATCH = 4096  # tokens in one forward pass: enough to fill a GPU, few enough to fit beside a layer
SMALLEST = 512
PROBED = 4  # samples encoded to tell how many tokens there will be
WORKSPACE = 0.6  # the factorization's own memory, in copies of the matrix: measured, cuSOLVER 12
PROCESS = 3 * 2**29  # what Python, torch and a GPU's driver hold on the host before any tensor: measured
MARGIN = 1.08  # of what is estimated: the estimates were from 0 to 7% low on an H100
CONTEXT = 5 * 2**27  # what the driver and the libraries hold on a GPU beside the tensors
EFFICIENCY = 0.35  # of a large product's speed, over all stages of a layer: measured on an H100


@dataclass(frozen=True)
class Memory:
    """What the walk may choose: about how many tokens a forward pass takes, and whether the hidden states between
    layers wait on the host."""

    micro_batch: int = MICRO_BATCH
    park: bool = False
    held: int = field(default=routing.HELD, compare=False)  # bytes of experts' Gram matrices at a time

    def __str__(self) -> str:
        where = ", activations on the host" if self.park else ""
        return f"{self.micro_batch} tokens a forward pass{where}"

    def smaller(self) -> Memory | None:
        """The next thing to try when memory ran out; None when all has been tried. The host is asked before the
        smallest forward passes are: what waits there costs a copy each way, small passes leave the GPU half idle."""
        if not self.park and self.micro_batch <= MICRO_BATCH // 2:
            return replace(self, micro_batch=MICRO_BATCH, park=True)
        return replace(self, micro_batch=self.micro_batch // 2) if self.micro_batch > SMALLEST else None


@dataclass(frozen=True)
class Workload:
    """The sizes that decide: of one rank's tokens (in all and for pictures, and of its longest sample), of the model's
    hidden states, of what runs before the first layer (bytes), of the largest layer (bytes), and of each of its groups:
    the rows of its linears and their inputs' width; `experts` are those of a mixture's experts, each of which gets the
    part `routed` of the tokens."""

    tokens: int
    media: int
    longest: int
    hidden: int
    before: int
    layer: int
    layers: int
    groups: tuple[tuple[tuple[int, ...], int], ...]
    item: int  # bytes of a number in the compute dtype
    experts: tuple[tuple[tuple[int, ...], int], ...] = ()
    routed: float = 1.0
    head: int = 0  # rows of an output head that is quantized too, a group of its own, so many at a time

    @property
    def active(self) -> int:
        """The numbers of the layer that a token meets."""
        inside = sum(sum(rows) * width for rows, width in self.experts)
        return int(self.layer // self.item - inside * (1 - self.routed))


def workload(
    skeleton: Skeleton, plan: Mapping[int, tuple[Group, ...]], samples: Sequence[Sample], *, head: int = 0
) -> Workload:
    """The workload of quantizing by `plan`, and `head` rows of the output head, on `samples`, judged by a few of them,
    evenly spread."""
    item = skeleton.dtype.itemsize
    metas = {n: skeleton.source.meta(c) for n, c in skeleton.names.items()}

    def numbers(name: str) -> int:
        return torch.Size(metas[name].shape).numel()

    def inside(index: int) -> int:
        return sum(numbers(skeleton.layer_prefix(index) + n) for n in skeleton.layer_names(index))

    index = max(plan, key=inside)
    prefix = skeleton.layer_prefix(index)
    common, inside_experts = routing.apart(skeleton.layers[index], plan[index])

    def sizes(groups: Sequence[Group]) -> tuple[tuple[tuple[int, ...], int], ...]:
        shapes = [[metas[f"{prefix}{n}.weight"].shape for n in group.linears] for group in groups]
        return tuple((tuple(s[0] for s in group), group[0][1]) for group in shapes)

    seen, media = [], 0
    for sample in samples[:: max(1, len(samples) // PROBED)]:
        ids = encode(skeleton, sample)["input_ids"]
        seen.append(ids.numel())
        media += int(media_mask(skeleton, ids).sum())
    share = len(samples) / world() / max(len(seen), 1)
    text = skeleton.module.config.get_text_config()
    experts = len({routing.owner(group) for group in inside_experts})
    return Workload(
        tokens=int(sum(seen) * share),
        media=int(media * share),
        longest=max(seen, default=0),
        hidden=text.hidden_size,
        before=sum(numbers(n) for n in embeddings(skeleton)) * item,
        layer=inside(index) * item,
        layers=len(plan),
        groups=sizes(common),
        item=item,
        experts=sizes(inside_experts),
        routed=min(1.0, getattr(text, "num_experts_per_tok", experts) / experts) if experts else 1.0,
        head=head,
    )


def gpu_bytes(work: Workload, method: str, quality: str, memory: Memory) -> int:
    """What the GPU is to have: the peak of tensors, stage by stage of the widest layer, and what lies beside them."""
    return int(_tensors(work, method, quality, memory) * MARGIN) + CONTEXT


def _tensors(work: Workload, method: str, quality: str, memory: Memory) -> int:
    states = work.tokens * work.hidden * work.item
    micro = max(min(memory.micro_batch, work.tokens), work.longest)
    pictures = work.media * work.hidden * work.item  # the vision tower's output, which the model's frames keep
    starting = work.before + (0 if memory.park else 2 * states) + pictures
    if method == "bnb" or not (work.groups or work.experts):
        return work.layer * 4
    steps = STEPS[method, quality]
    held = work.layer + pictures + (micro * work.hidden * work.item if memory.park else 2 * states)
    if steps.pull:  # the 16-bit model's stream beside the other, and the layer as it was
        starting += (0 if memory.park else 2 * states) + pictures
        held += work.layer + (0 if memory.park else 2 * states) + pictures
    groups = work.groups if steps.pull else sorted(work.groups, key=lambda group: -group[1])  # as they are rounded
    every_group = (*groups, *work.experts)
    widest = max(width for _, width in every_group)
    h = {width: 4 * width**2 for _, width in every_group}
    every = sum(h[width] for _, width in work.groups)
    waiting = (2 * gram.TOKENS + micro) * widest * work.item + 2 * gram.ROWS * widest * 4
    peaks = [starting, held + every + waiting + 3 * micro * widest * work.item]
    left, codes = every, 0
    mixture = sum(routing.gram_bytes(width, work.item, shared=len(rows) > 1) for rows, width in work.experts)
    if mixture:  # the experts come last, so many matrices at a time as `held` holds
        peaks.append(held + codes_of(work.groups) + min(mixture, memory.held) + 4 * micro * widest * work.item)
    for number, (rows, width) in enumerate(every_group):
        if number == len(work.groups):
            left = min(mixture, memory.held)
        alone = steps.pull and number < len(work.groups)  # a group that waits for the one before it
        # several ranks share the rows of such a group; of others one rank has all (steps.py)
        largest, together = (n * width // (world() if alone else 1) for n in (max(rows), sum(rows)))
        factors = left if steps.feedback and not alone else 0  # every H is factored before the first is rounded
        if steps.scale and not steps.feedback:
            rows_width = sum(rows) * width // world()
            errors = 2 * 4 * max(awq.TOGETHER, rows_width)
            peaks.append(held + every + rows_width * work.item + errors)
        peaks.append(held + left + factors + codes + 8 * together + 4 * largest)
        if steps.feedback:
            peaks.append(held + left + codes + max(factors, h[width]) + int(WORKSPACE * h[width]) + 4 * together)
            peaks.append(held + left + codes + max(factors, h[width]) + 10 * together)
        if alone:
            micro_inputs = 16 * micro * width  # both streams' inputs, and how far apart they are
            peaks.append(held + 2 * h[width] + codes + waiting + micro_inputs)
            peaks.append(held + 2 * h[width] + codes + 16 * together + 12 * PIECE)
        peaks.append(held + left + codes + 3 * together + 24 * PIECE)
        codes += sum(rows) * width
        left = max(0, left - h[width])
    return max(peaks)


def codes_of(groups: Sequence[tuple[tuple[int, ...], int]]) -> int:
    """Bytes of the codes of these groups, one a weight."""
    return sum(sum(rows) * width for rows, width in groups)


def host_bytes(work: Workload, memory: Memory) -> int:
    """The process's own memory on the host at its peak: what is mapped from files is not counted."""
    parked = work.tokens * work.hidden * work.item if memory.park else 0
    return PROCESS + max(work.layer // 2, work.head * work.hidden * 3 // 2) + parked  # a head's codes wait there whole


def flops(work: Workload, method: str, quality: str) -> float:
    """Floating point operations of one layer's stages on one rank: two forward passes, Gram matrices, search,
    rounding, errors."""
    if method == "bnb":
        return 0.0
    steps = STEPS[method, quality]
    done = (2 + 3 * steps.pull + bool(work.experts)) * 2 * work.tokens * work.active
    for number, (rows, width) in enumerate((*work.groups, *work.experts)):
        done += work.tokens * width**2 * (1 if number < len(work.groups) else work.routed)
        tried = min(awq.FIRST_ROWS, sum(rows)) * 2 * awq.STEPS + sum(rows) * awq.FINALISTS
        searching = steps.scale and not steps.feedback  # the descent takes no products
        done += (tried * searching + sum(rows) * (2 + steps.feedback)) * 2 * width**2 / world()
        done += steps.feedback * width**3 / 3
        done += (steps.pull and number < len(work.groups)) * (
            3 * work.tokens * width**2 + 4 * sum(rows) * width**2 / world()
        )
    return done


def head_flops(work: Workload, method: str, quality: str) -> float:
    """The same of the output head: rounded and judged in blocks, for each of which H is factored."""
    if not work.head:
        return 0.0
    products = (4 + STEPS[method, quality].feedback) * 2 * work.head * work.hidden**2
    blocks = -(-work.head * work.hidden // PIECE)
    return products + blocks * work.hidden**3 / 3 + work.tokens * work.hidden**2


def speed(device: torch.device) -> float:
    """Floating point operations a second of a large product in the dtype that forward passes use; takes some ms."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype) / size**0.5
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = a @ a @ a @ a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * size**3 / best


def within(work: Workload, method: str, quality: str, limit: int, *, first: Memory | None = None) -> Memory:
    """The largest setting whose need is at most `limit` bytes, of `first` (None: the largest there is) and those that
    come after it. ValueError when none is."""
    memory = replace(first or Memory(), held=min(routing.HELD, limit // 8))
    while (needed := gpu_bytes(work, method, quality, memory)) > limit:
        smaller = memory.smaller()
        if smaller is None:
            raise ValueError(
                f"{limit / 2**30:.1f} GiB of GPU memory are too few: with the smallest micro-batches and activations "
                f"on the host this takes {needed / 2**30:.1f} GiB; give more, or use --device cpu"
            )
        memory = smaller
    return memory

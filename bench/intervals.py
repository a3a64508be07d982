"""How sure a ratio is: paired runs of two servers, the t interval of the mean of their log ratios.

A pair is two runs of one load right after one another, so that what slows the machine slows both; logs, because a ratio
is as likely to be half as double. Student (1908), with the pairs as the sample, or the blocks that they come in. Each
interval is by itself: of twenty such one misses the truth. Knows numbers only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .report import Ratio

LEVEL = 0.95
WIDE = 10.0  # highest over lowest of any interval: with more, its ends say nothing
LOUD = 2.0  # highest over lowest of any interval: with more, runs differ by more than Student's t is to be believed
NARROW = 1.10  # highest over lowest of an interval that holds 1: less is no difference, more is noise


def ratio(
    first: Sequence[float],
    second: Sequence[float],
    *,
    level: float = LEVEL,
    paired: bool = True,
    blocks: Sequence[int] | None = None,
) -> Ratio:
    """`second` over `first`, run by run in the same order, with the interval that holds it with confidence `level`.

    `blocks` names what each pair shares with others, as the start of its servers: the pairs of a block are then one
    observation, their mean, since what they share is in all of them. The interval is None for one observation, and
    where the runs were not taken in turns (`paired` False): drift of the machine between the two would be in it.
    ValueError for samples that are not positive, or not as many.
    """
    if len(first) != len(second) or not first or (blocks is not None and len(blocks) != len(first)):
        raise ValueError(f"{len(first)} and {len(second)} runs are no pairs")
    if min(*first, *second) <= 0:
        raise ValueError("a ratio wants samples above zero")
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    if blocks is not None:
        shared = {block: [log for log, own in zip(logs, blocks, strict=True) if own == block] for block in blocks}
        logs = [statistics.fmean(alike) for alike in shared.values()]
    middle, pairs = statistics.fmean(logs), len(logs)
    if pairs == 1 or not paired:
        return Ratio(math.exp(middle), None, None, level, pairs)
    half = t_quantile((1 + level) / 2, pairs - 1) * statistics.stdev(logs) / math.sqrt(pairs)
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), level, pairs)


def unsure(found: Ratio) -> bool:
    """Whether the machine was too noisy to say which is more: the interval holds 1 and is wide, or is so wide that runs
    of one load had little in common."""
    if found.low is None or found.high is None:
        return False
    return found.high > (NARROW if found.low <= 1 <= found.high else LOUD) * found.low


def t_quantile(share: float, degrees: int) -> float:
    """The value below which `share` (above 0.5) of Student's t with so many degrees of freedom lies.

    With t = sqrt(n) tan(a), the density is that of cos(a)**(n - 1): one bounded integral, by Simpson's rule.
    """

    def weight(end: float, steps: int = 400) -> float:
        width = end / steps
        values = [math.cos(i * width) ** (degrees - 1) for i in range(steps + 1)]
        return width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))

    whole = 2 * weight(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + weight(middle) / whole < share else (low, middle)
    return math.sqrt(degrees) * math.tan(low)

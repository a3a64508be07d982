"""Numbers in words: an amount of memory, a figure, a ratio with its interval. Knows no report."""

from __future__ import annotations

from collections.abc import Sequence

from .report import Figure, Ratio

AMOUNTS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def amount(size: float) -> str:
    """Bytes in the largest binary unit of which there is one: 15.59 GiB."""
    for unit, scale in AMOUNTS:
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} B"


def number_of(value: float) -> str:
    """A value as a table has it: 12,345, 172.6, 32.49, 0.0123."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.3g}"


def show(figure: Figure) -> str:
    """A figure by its unit, without the unit where a table's row has it; memory with its own."""
    if figure.unit == "bytes":
        return amount(figure.value)
    if figure.unit in ("tokens", "sequences"):
        return f"{figure.value:,.0f}"
    return number_of(figure.value)


def pictures(count: int, size: Sequence[int]) -> str:
    """So many pictures of (height, width): no picture, one picture of 448 x 448, 3 pictures of 448 x 448."""
    many = "one picture" if count == 1 else f"{count} pictures"
    return f"{many} of {size[0]} x {size[1]}" if count else "no picture"


def times(value: float) -> str:
    """A ratio: 1.53×, 26×, 0.043×."""
    if value >= 10 or (value >= 2 and value == round(value)):
        return f"{value:,.0f}×" if value >= 100 or value == round(value) else f"{value:.1f}×"
    return f"{value:.2f}×" if value >= 0.1 or value == 0 else f"{value:.2g}×"


def interval(ratio: Ratio) -> str:
    """The interval of a ratio, "1.49 to 1.57", or "" where nothing is known of it."""
    if ratio.low is None or ratio.high is None:
        return ""
    return f"{_bound(ratio.low)} to {_bound(ratio.high)}"


def _bound(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def ratio_of(ratio: Ratio) -> str:
    """1.53× (1.49 to 1.57)."""
    return times(ratio.value) + (f" ({interval(ratio)})" if interval(ratio) else "")


def change(before: Figure, after: Figure) -> str:
    """From one figure to another, the unit once where both have it: 15.6 → 6.7 GiB."""
    first, last = show(before), show(after)
    if first.partition(" ")[2] == last.partition(" ")[2]:
        first = first.partition(" ")[0]
    return f"{first} → {last}"


# which way a measure is better; its _p90 and _p99 go the same way, and of any other nothing is said
MORE = {"input_rate", "output_rate", "request_rate", "max_length", "max_batch", "cache_tokens", "top1", "same_answer"}
LESS = {"time", "ttft", "tpot", "itl", "e2e", "weights", "kv_token", "server_memory", "card_memory", "startup"}
LESS |= {"energy", "mean_kl", "p99_kl", "soft_kl"}


def better(measure: str) -> int:
    """1 where more of the measure is better, -1 where less is, 0 where that is not known."""
    plain = measure.removesuffix("_p90").removesuffix("_p99")
    return int(plain in MORE) - int(plain in LESS)

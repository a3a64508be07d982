"""A plan as rows for the terminal and as facts for `--json`. Knows no arithmetic but one bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipes.terminal import human
from .bill import Ask, read_model
from .lora import rank_of, read_adapters, slots_of
from .machine import Gpu
from .overhead import ESTIMATE
from .planner import Plan, planned


def decode_bound(plan: Plan, bandwidth: float | None) -> float | None:
    """Tokens a second of one sequence that no engine can pass: bandwidth / bytes of weights read for a token.

    Bandwidth in bytes a second of one card, None where it is not known. A head that is tied to the embeddings is the
    embeddings. None for a mixture, which reads only some of its experts, and for a pipeline, whose stages take turns.
    """
    if plan.mixture or plan.ask.pp > 1:
        return None
    sizes = {part.name: part.size for part in plan.parts}
    head = sizes.get("weights: head") or sizes.get("weights: embeddings", 0)
    read = sizes.get("weights: decoder", 0) + head
    return bandwidth / read if bandwidth and read else None


def facts(plan: Plan, *, bandwidth: float | None = None) -> dict[str, Any]:
    """The plan as JSON can hold it. Bytes and tokens, on each card."""
    return {
        "fits": not plan.problem,
        "problem": plan.problem or None,
        "changes": list(plan.changes),
        "status": ESTIMATE,
        "card": {"name": plan.card.name, "memory": plan.card.memory, "count": plan.ask.cards},
        "parts": [{"name": p.name, "bytes": p.size, "counted": p.counted, "why": p.why} for p in plan.parts],
        "kv_token_bytes": plan.kv_token,
        "cache_bytes": plan.cache,
        "cache_tokens": plan.tokens,
        "context": plan.context,
        "max_context": plan.max_context,
        "max_batch": plan.max_batch,
        "replicas": plan.ask.dp,
        "image_tokens": plan.image_tokens or None,
        "max_images": plan.images if plan.image_tokens else None,
        "decode_bound": decode_bound(plan, bandwidth),
        "flags": [{"flag": f.name, "value": f.value, "why": f.why} for f in plan.flags],
    }


def rows(plan: Plan, *, bandwidth: float | None = None) -> list[list[str]]:
    """(what, how much, why): the bill, then what fits, then the flags."""
    cards = plan.ask.cards
    found = [["card", human(plan.card.memory), plan.card.name + (f", each of {cards}" if cards > 1 else "")]]
    found.append(["for the engine", human(plan.share * plan.card.memory), f"{plan.share:.0%} of it"])
    for part in plan.parts:
        size = human(part.size) if part.counted else f"({human(part.size)})"
        beside = not part.counted and not part.name.startswith("weights")
        found.append([f"  {part.name}", size, part.why + ("; not counted beside a larger pass" if beside else "")])
    found.append(["  KV cache", human(plan.cache), f"what is left: {plan.tokens:,} tokens of {plan.kv_token:,} bytes"])
    found.append(["", "", ""])
    abreast = f"{plan.ask.concurrency} sequences at once" if plan.ask.concurrency else "one sequence"
    found.append(["max context", f"{plan.max_context:,}", f"tokens, for {abreast}"])
    each = f", for each of {plan.ask.dp} replicas" if plan.ask.dp > 1 else ""
    found.append(["max batch", f"{plan.max_batch:,}", f"sequences of {plan.context:,} tokens{each}"])
    if plan.image_tokens:
        found.append(
            ["pictures a prompt", f"{plan.images:,}", f"of the largest size, {plan.image_tokens:,} tokens each"]
        )
    if bound := decode_bound(plan, bandwidth):
        found.append(["one sequence", f"< {bound:.0f} tok/s", "bandwidth / weights read for each token"])
    if not plan.problem:
        found.append(["", "", ""])
        found += [[*flag.words[:1], " ".join(flag.words[1:]), flag.why] for flag in plan.flags]
    return found


def told(
    folder: Path, card: Gpu, *, bandwidth: float | None = None, lora: Sequence[str] = (), **asked: Any
) -> tuple[dict[str, Any], list[list[str]], list[str]]:
    """Facts, rows and closing lines of the plan for the checkpoint in `folder`, with adapters NAME=FOLDER beside it;
    `asked` as `Ask`'s fields, its own defaults where None.

    Errors as `read_model`'s, `read_adapters`' and `planned`'s; OSError where there is no such folder.
    """
    if not folder.is_dir():
        raise OSError(f"no folder {folder}; give an artifact, or a checkpoint's folder")
    model = read_model(folder)
    adapters = read_adapters(lora, model.subject)
    said = {name: value for name, value in asked.items() if value is not None}
    ask = Ask(**said, lora_rank=rank_of(adapters), lora_slots=slots_of(adapters))
    plan = planned(model, card, ask)
    lines = [f"weights and cache are counted; the rest is an {ESTIMATE}"]
    if plan.problem:
        lines += [f"mmq: does not fit: {plan.problem}", *(f"mmq: would fit with {line}" for line in plan.changes)]
    return facts(plan, bandwidth=bandwidth), rows(plan, bandwidth=bandwidth), lines

"""The check of a *served* artifact: the logprobs an engine gives, against those its files promise.

The same samples are walked here, as FP16 and as the artifact's own int4 weights, and sent to the engine. An engine that
quietly loads 16 bit is nearer to the first than to the second; one that drops the picture, or reads the packed words
in another order, is near to neither.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from openai import OpenAI

from ..export.artifact import Artifact
from ..export.view import view
from ..quantize.inputs import suited
from ..quantize.skeleton import build
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import Limits
from ..recipes.samples import Sample, as_openai, blind
from ..serve.client import connect, plain_errors
from ..serve.engines import plan
from ..serve.machine import this_machine
from ..serve.running import free_port, running
from .check import Checked
from .walked import Walked, walk_both


def check_served(
    artifact: Artifact,
    base: Path,
    *,
    samples: Sequence[Sample],
    limits: Limits,
    engine: str = "vllm",
    engine_bin: str | None = None,
    device: str = "cpu",
    trust: bool = False,
    tell: Tell = silent,
) -> Checked:
    """Serve `artifact` under `engine` and compare its logprobs of the reference answers with both walks.

    Videos are left out: engines sample their frames on their own. ValueError when no sample is left, OSError when the
    engine is not installed, RuntimeError when it dies.
    """
    samples = [s for s in samples if s.answer and not s.videos]
    if not samples:
        raise ValueError("no sample to check on: each must end in an assistant's answer, and videos are left out")
    options = {"machine": this_machine(), "engine_bin": engine_bin, "trust_remote_code": trust}
    plan(engine, artifact.path, **options)  # what cannot be served is told before the long walk
    samples, walked = _walk(artifact, base, samples, device=device, trust=trust, tell=tell)
    launch = plan(engine, artifact.path, port=free_port(), **options)
    seen: list[list[float]] = []
    unseen: list[list[float] | None] = []
    with running(launch, tell=tell) as server, connect(server.url, retries=0) as client:
        for number, (sample, tokens) in enumerate(zip(samples, walked.tokens, strict=True)):
            ask = partial(answer_logprobs, client, server.name, count=tokens.kl.numel(), behind=tokens.behind)
            seen.append(ask(sample))
            unseen.append(ask(blind(sample)) if sample.images else None)
            tell(Step("ask the engine", number + 1, len(samples)))
    to_int4, to_fp16, served_effect, own_effect = [], [], [], []
    raw = []
    for sample, tokens, dark, got, gone in zip(samples, walked.tokens, walked.blind, seen, unseen, strict=True):
        int4, fp16 = (-tokens.nll_after).tolist(), (-tokens.nll_before).tolist()
        to_int4 += [abs(a - b) for a, b in zip(got, int4, strict=True)]
        to_fp16 += [abs(a - b) for a, b in zip(got, fp16, strict=True)]
        if gone is not None and dark is not None:
            served_effect += [a - b for a, b in zip(got, gone, strict=True)]
            own_effect += (dark.nll_after - tokens.nll_after).tolist()
        raw.append({"task": sample.task, "answer": sample.answer, "served": got, "int4": int4, "fp16": fp16})
    measures = {
        "tokens": float(len(to_int4)),
        "served_to_int4": statistics.fmean(to_int4),
        "served_to_fp16": statistics.fmean(to_fp16),
        "finite": float(all(map(math.isfinite, to_int4))),
    }
    if own_effect:
        measures["served_image_effect"] = share(served_effect, own_effect)
    return Checked(measures, tuple(_failures(measures, limits, engine)), walked.layers, tuple(raw))


def _walk(
    artifact: Artifact, base: Path, samples: Sequence[Sample], *, device: str, trust: bool, tell: Tell
) -> tuple[list[Sample], Walked]:
    """Both models over the samples as they can read them. No name outside holds the two: their memory is the engine's
    from here on."""
    before = build(base, device=device, trust=trust)
    after = build(artifact.path, source=view(artifact.path), device=device, trust=trust)
    samples = suited(before, samples)
    return samples, walk_both(before, after, samples, tell=tell)


def share(served: Sequence[float], own: Sequence[float]) -> float:
    """How much of the effects `own` is in `served`, by least squares: 1 where they are the same, 0 where there is none.
    A picture makes some tokens likelier and others less, so a mean says nothing."""
    return sum(a * b for a, b in zip(served, own, strict=True)) / max(sum(b * b for b in own), 1e-12)


def answer_logprobs(client: OpenAI, model: str, sample: Sample, *, count: int, behind: int) -> list[float]:
    """The engine's logprobs of the `count` tokens of the sample's reference answer, its end token included; `behind`
    more tokens follow it in the chat template. Errors as in `client.plain_errors`."""
    url = str(client.base_url)
    with plain_errors(url):
        reply = client.chat.completions.create(
            model=model,
            messages=as_openai(sample),  # pyright: ignore[reportArgumentType]
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 0, "add_generation_prompt": False},
        )
    entries = (reply.model_extra or {}).get("prompt_logprobs")
    if not entries:
        raise RuntimeError(f"the server at {url} gives no prompt_logprobs; vLLM and the pytorch engine do")
    return [next(iter(e.values()))["logprob"] for e in entries[len(entries) - behind - count : len(entries) - behind]]


def _failures(measures: dict[str, float], limits: Limits, engine: str) -> list[str]:
    found = []
    near, far = measures["served_to_int4"], measures["served_to_fp16"]
    if not near <= limits.served_to_int4:
        found.append(
            f"served_to_int4 is {near:.4g}, the limit is <= {limits.served_to_int4}: "
            f"{engine} does not compute with the weights on disk"
        )
    if not near < far:
        found.append(
            f"served_to_int4 is {near:.4g} and served_to_fp16 {far:.4g}: "
            f"{engine} is as near to FP16 as to the artifact; did it load 16-bit weights?"
        )
    effect = measures.get("served_image_effect")
    if effect is not None and not effect >= limits.image_effect:
        found.append(
            f"served_image_effect is {effect:.4g}, the limit is >= {limits.image_effect}: is the picture dropped?"
        )
    return found

"""Where one request's time goes: image preprocessing, vision tower, prefill, decode, told apart on a running server.

One request is asked at a time, in four forms by turns, each of new words:

    words   no picture                                  one token out
    fresh   pictures that the server has never seen     one token out
    seen    the pictures of `fresh` again               one token out
    whole   new pictures again                          as many tokens out as the load has

vLLM counts the seconds of each request's prefill (from its first step to its first token, the vision tower among them)
and of its decode, and tells their sums on /metrics; what is left of the wall time is outside the engine. A picture that
it has seen is in two of its caches, as the tower's input and as the tower's output, so that neither is made again.
Hence, round by round, so that a slow moment of the machine meets all four:

    image_preprocessing   outside the engine, `fresh` less `words`: pictures sent, decoded, resized, cut into patches
                          and handed to the engine
    vision_tower          prefill of `fresh` less that of `seen`: tower, projector, pixels on their way to the card
    prefill               prefill of `seen`: the decoder over all tokens, the pictures' too, and the first one drawn
    decode                decode of `whole`: every further token
    other                 the rest of `whole`: HTTP, chat template, tokenizer, waits, the text put together

They are one request's, alone on the server: under load they overlap, and do not add up. An engine without counters is
timed from outside: there `prefill` is a prompt of as many tokens without a picture, and contains `other`; decode is
what further tokens take; preprocessing and tower are one figure, `picture`, and cannot be told apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes.progress import Step, Tell, silent
from ..serve.client import connect
from .report import Figure
from .rounds import Asker, Round, cache_hits, counters, one_round, word_tokens
from .speed import Load

ROUNDS = 5
OF_PICTURES = ("image_preprocessing", "vision_tower", "picture")
BY_CLIENT = "this engine counts no times of its own: prefill has HTTP and tokenizer in it"
ONE = ", and image preprocessing and vision tower are one figure, picture"
NOT_KEPT = "this server keeps no picture that it has seen: vision tower and prefill are one figure"


@dataclass(frozen=True)
class Stages:
    """`figures` in ms, the median of the rounds with the lowest and highest; `settings`, for the report, are the sizes
    that they are of. `untold` says what cannot be told apart on this server, "" where all is told."""

    figures: Mapping[str, Figure]
    settings: Mapping[str, Any]
    untold: str = ""


def stages(url: str, *, model: str, load: Load, rounds: int = ROUNDS, tell: Tell = silent) -> Stages:
    """Time the stages of one request of `load` (its pictures, lengths and seed) on the idle server at `url`.

    Asks four requests a round, after one round that does not count. ValueError where the server answers others
    meanwhile, else as `client.ask`.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds of stages were asked for; it must be at least 1")
    with connect(url, retries=0) as client:
        asker, counted, hits = Asker(client, url, model, load), counters(url) is not None, cache_hits(url)
        word = word_tokens(asker)
        done = []
        for number in range(rounds + 1):
            tell(Step("stages", number, rounds + 1, "one request at a time"))
            done.append(one_round(asker, word=word, counted=counted))
        tell(Step("stages", rounds + 1, rounds + 1))
    kept = done[1:]
    again = not load.pictures or cache_hits(url) > hits
    figures = told(kept, again=again) if counted else timed(kept)
    untold = BY_CLIENT + (ONE if load.pictures else "") if not counted else "" if again else NOT_KEPT
    if not load.pictures:
        figures = {name: figure for name, figure in figures.items() if name not in OF_PICTURES}
    last = kept[-1]
    settings = {
        "pictures": load.pictures,
        "picture": list(load.picture),
        "prompt_tokens": last.whole.prompt,
        "output_tokens": last.whole.out,
        "rounds": rounds,
        "clock": "the engine's" if counted else "the client's",
    }
    return Stages(figures, settings, untold)


def told(rounds: Sequence[Round], *, again: bool = True) -> dict[str, Figure]:
    """The stages where the server counts its own time; `again` says that it knew the pictures of `seen` again.

    By round they add up to the wall time of `whole`.
    """
    found = {
        "image_preprocessing": [r.fresh.outside - r.words.outside for r in rounds],
        "vision_tower": [r.fresh.prefill - r.seen.prefill for r in rounds],
        "prefill": [r.seen.prefill for r in rounds],
    }
    if not again:
        found = {
            "image_preprocessing": found["image_preprocessing"],
            "vision_tower + prefill": [r.fresh.prefill for r in rounds],
        }
    found["decode"] = [r.whole.decode for r in rounds]
    found["other"] = [r.whole.wall - sum(parts[i] for parts in found.values()) for i, r in enumerate(rounds)]
    return {name: _figure(seconds) for name, seconds in found.items()}


def timed(rounds: Sequence[Round]) -> dict[str, Figure]:
    """The stages where only the client has a clock: `words` is then as long as a prompt with its pictures."""
    found = {
        "picture": [r.fresh.wall - r.words.wall for r in rounds],
        "prefill": [r.words.wall for r in rounds],
        "decode": [r.whole.wall - r.fresh.wall for r in rounds],
    }
    return {name: _figure(seconds) for name, seconds in found.items()}


def _figure(seconds: Sequence[float]) -> Figure:
    """The median in ms. A difference below zero is noise and told as zero; its lowest round stays as it was."""
    middle = max(0.0, statistics.median(seconds))
    return Figure(1000 * middle, "ms", "measured", 1000 * min(seconds), 1000 * max(seconds))

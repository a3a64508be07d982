"""What to type for a model on a hub: one line for each engine whose rules let it load. Starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .rules.rule import Place, Verdict
from .rules.verdicts import PLACES, verdicts

# engine -> (its name for readers, words before and after the model, what makes it ask ModelScope)
LINES = {
    "vllm": ("vLLM", ("vllm", "serve"), (), "VLLM_USE_MODELSCOPE=True"),
    "sglang": ("SGLang", ("python", "-m", "sglang.launch_server", "--model-path"), (), "SGLANG_USE_MODELSCOPE=true"),
    "lmdeploy": ("LMDeploy", ("lmdeploy", "serve", "api_server"), ("--backend",), "LMDEPLOY_USE_MODELSCOPE=True"),
    "transformers": ("transformers", ("transformers", "serve"), (), None),
}
MODEL_FORMATS = ("awq", "gptq", "compressed-tensors")  # that LMDeploy wants to be told


@dataclass(frozen=True)
class HubLine:
    """An engine, the command, and what its rules want first ("" where nothing)."""

    engine: str
    command: str
    condition: str


def hub_lines(folder: Path, repo: str, *, hub: str, format: str, trust: bool = False) -> list[HubLine]:
    """A line for mmq itself and for each engine that would load the checkpoint in `folder`, as it is known by its
    rules, from the repository `repo` on `hub`. Errors as `verdicts`."""
    own = ["mmq", "serve", repo, *(["--hub", "modelscope"] if hub == "modelscope" else [])]
    return [HubLine("mmq", shlex.join(own), ""), *_engines(verdicts(folder, PLACES), repo, hub, format, trust)]


def _engines(found: Iterable[Verdict], repo: str, hub: str, format: str, trust: bool) -> Iterator[HubLine]:
    seen: set[str] = set()
    for verdict in found:
        place = verdict.place
        if place.engine not in LINES or place.engine in seen or verdict.answer == "no":
            continue
        name, _, _, elsewhere = LINES[place.engine]
        if hub == "modelscope" and elsewhere is None:
            continue  # it can load from the other hub only
        seen.add(place.engine)
        wants = "; ".join(dict.fromkeys(f.remedy for f in verdict.findings))
        command = shlex.join(_words(place, repo, format, trust))
        yield HubLine(name, f"{elsewhere} {command}" if hub == "modelscope" else command, wants)


def _words(place: Place, repo: str, format: str, trust: bool) -> list[str]:
    _, before, after, _ = LINES[place.engine]
    words = [*before, repo, *after]
    if place.engine == "lmdeploy":
        words += [place.where, *(["--model-format", format] if format in MODEL_FORMATS else [])]
    return [*words, "--trust-remote-code"] if trust else words

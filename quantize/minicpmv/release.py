"""What differs from one MiniCPM-V to the next, as data. Knows no tensors and no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Release:
    """One row. `text` is the text model's family in transformers. `ends` are the tokens that end an answer."""

    text: str
    ends: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    one_row: bool = False  # a slice's patches take their places along one row of the position table, whatever its grid
    nested: bool = False  # one <slice> around all slices, each of them an <image>; later every slice is a <slice>
    packs_frames: bool = False  # several frames of a video share one set of queries
    always_opens: str = ""  # what the chat template writes at the end even when no answer was asked for


RELEASES = {
    "2.5": Release(
        "Llama",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        one_row=True,
        nested=True,
        always_opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "2.6": Release("Qwen2"),
    "4.0": Release("Llama", ends=("<|im_end|>", "</s>")),
    "4.5": Release("Qwen3", packs_frames=True),
}


def release_of(config: Mapping[str, Any]) -> Release:
    """The row for a config.json. ValueError for a version that is not known."""
    hears = config.get("model_type") == "minicpmo"
    kind, known = ("MiniCPM-o", ["2.6"]) if hears else ("MiniCPM-V", list(RELEASES))
    first = "2.6" if hears else "2.0" if config.get("hidden_size") == 2304 else "2.5"  # published without a version
    version = str(config.get("version") or first)
    version = version if "." in version else f"{version}.0"
    if version not in known:
        raise ValueError(f"{kind} {version} is not known; known are {', '.join(known)} (`version` in config.json)")
    return RELEASES[version]

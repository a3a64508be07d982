"""tokenizer_config.json, mended where the class it names opens the tokenizer wrongly in today's transformers."""

from __future__ import annotations

from pathlib import Path

from ..quantize.minicpmv.release import RELEASES, release_of
from ..recipes.plain import object_of, read_json
from .artifact import write_json

FILE = "tokenizer_config.json"
PLAIN = "PreTrainedTokenizerFast"


def mend_words(folder: Path) -> list[str]:
    """Mend the folder's own copy; what was mended in words, for the manifest.

    MiniCPM-V 2.5's own class has an `__init__`, so transformers 5 builds it anew from vocabulary and merges, and loses
    how the text is split: vLLM then reads every prompt without its spaces. The plain class opens tokenizer.json as it
    is. What is lost are the names that the checkpoint's own `chat` asks the tokenizer for, in transformers 4.
    """
    path = folder / FILE
    if not path.is_file() or not _is_two_five(folder):
        return []
    said = object_of(read_json(path), where=str(path))
    if "auto_map" not in said:
        return []
    write_json(path, {k: v for k, v in said.items() if k != "auto_map"} | {"tokenizer_class": PLAIN})
    why = "for MiniCPM-V 2.5's own class loses the spaces of every prompt in transformers 5"
    return [f"{FILE} names {PLAIN}, {why}; its own `chat` in transformers 4 wants the base's file"]


def _is_two_five(folder: Path) -> bool:
    config = object_of(read_json(folder / "config.json"), where=str(folder / "config.json"))
    if config.get("model_type") != "minicpmv":
        return False
    try:
        return release_of(config) is RELEASES["2.5"]
    except ValueError:
        return False  # a version that mmq does not know, of which it says nothing

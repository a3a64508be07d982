"""pebble, the embedded model: its pictures, its questions, its weights. Imports no torch and no PIL."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The folder with pebble's checkpoint, as transformers and the engines read it. OSError where it is not there."""
    folder = Path(__file__).parent / "model"
    if not (folder / "config.json").is_file():
        raise OSError(f"pebble's weights are missing from {folder}; `python -m mmq.recipes.pebble.train` makes them")
    return folder

"""What a user names to be served, found: an artifact or a checkpoint here, else a recipe's or a hub's model."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from ..export.artifact import MANIFEST, open_artifact
from ..recipes.hub import fetch
from ..recipes.progress import Tell, silent
from ..recipes.recipe import model_on, recipe_for


def servable(target: str, *, hub: str, revision: str | None = None, tell: Tell = silent) -> tuple[Path, str]:
    """The folder that `target` means and its name. ValueError for a name that means nothing (with the folder of a model
    that has nearly this name), OSError for an artifact that is not whole, and as `fetch`'s."""
    folder = Path(target).expanduser()
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            open_artifact(folder)
        return folder, folder.resolve().name
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", target):
        raise ValueError(f"no folder {target}; if that is a server's address, write http://{target}")
    if folder.is_file() and folder.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{target} is a file; name the folder of the model")
    try:
        recipe = recipe_for(target)
    except ValueError as e:
        if near := _near(folder):
            raise ValueError(f"no folder {target}: did you mean {near}?") from e
        raise
    return fetch(model_on(recipe, hub), hub=hub, revision=revision or recipe.revision, tell=tell).path, recipe.name


def _near(folder: Path) -> Path | None:
    """A model's folder beside `folder`, of nearly its name."""
    if not folder.parent.is_dir():
        return None
    there = {path.parent.name: path.parent for path in folder.parent.glob("*/config.json")}
    found = difflib.get_close_matches(folder.name, there, n=1)
    return there[found[0]] if found else None

"""Recipe: what to make, as a frozen noun read from YAML. Knows no tensor, no hub and no file of a model."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

METHODS = ("awq", "gptq", "bnb", "rtn")
FORMATS = ("awq", "gptq", "compressed-tensors", "bnb")
HUBS = ("hf", "modelscope")


@dataclass(frozen=True)
class Limits:
    """What `check` allows an artifact to lose against FP16. KL in nats per token, agreement in [0, 1]."""

    mean_kl: float = 0.10
    p99_kl: float = 1.0
    top1: float = 0.90
    perplexity_ratio: float = 1.10
    image_effect: float = 0.5  # fraction of FP16's own KL between with and without the picture that must remain
    accuracy_drop: float = 0.05

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"limits.{name} is {value!r}; it must be a number >= 0")


@dataclass(frozen=True)
class Recipe:
    """What goes in. `model` is 'pebble', a hub id or a local folder; group_size counts input columns."""

    name: str
    model: str
    description: str = ""
    modelscope: str | None = None  # the id on ModelScope, where it differs
    revision: str | None = None
    method: str = "awq"
    format: str | None = None  # None: the method's own
    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None  # None: the method's own (AWQ asymmetric, GPTQ symmetric)
    keep: tuple[str, ...] = ()  # module name prefixes left in 16 bit, beside the family's own
    calibration: str = "drawn"
    samples: int = 128
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        if self.format is not None:
            _choice("format", self.format, FORMATS)
        if self.bits != 4:
            raise ValueError(f"bits is {self.bits!r}; mmq writes 4-bit weights only")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size is {self.group_size!r}; it must be one of 32, 64, 128")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples is {self.samples!r}; it must be a whole number >= 1")


def _choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")


def _known(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(names)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    return dict(data)


def parse(text: str, *, where: str) -> Recipe:
    """Read one recipe from YAML `text`; `where` names the file in errors. ValueError on any unknown key."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a recipe is a mapping of keys to values")
    data = _known(Recipe, data, where)
    for key in ("name", "model"):
        if not isinstance(data.get(key), str):
            raise ValueError(f"{where}: key {key!r} is missing or not text")
    if "limits" in data:
        if not isinstance(data["limits"], dict):
            raise ValueError(f"{where}: limits is a mapping of measures to numbers")
        data["limits"] = Limits(**_known(Limits, data["limits"], f"{where}: limits"))
    keep = data.get("keep", ())
    if not isinstance(keep, list | tuple) or not all(isinstance(k, str) for k in keep):
        raise ValueError(f"{where}: keep is a list of module name prefixes")
    data["keep"] = tuple(keep)
    try:
        return Recipe(**data)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def bundled() -> dict[str, Recipe]:
    """The recipes in the package, by name, sorted."""
    folder = resources.files(__package__) / "bundled"
    found = {}
    for item in sorted(folder.iterdir(), key=lambda i: i.name.lower()):
        if item.name.endswith(".yaml"):
            recipe = parse(item.read_text(encoding="utf-8"), where=item.name)
            found[recipe.name] = recipe
    return found


def recipe_for(model: str) -> Recipe:
    """The recipe that MODEL names: a bundled one, a YAML file, or the defaults for a local folder or a hub id.

    ValueError with the nearest names where MODEL is none of these (a bare word that is neither recipe nor folder).
    """
    known = bundled()
    for name, recipe in known.items():
        if model.lower() == name.lower():
            return recipe
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no recipe file {model}")
        return parse(path.read_text(encoding="utf-8"), where=model)
    if path.is_dir():
        return Recipe(name=path.resolve().name, model=str(path))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        for recipe in known.values():
            if recipe.model.lower() == model.lower():
                return recipe
        return Recipe(name=model.split("/")[1], model=model)
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`mmq recipes` lists them"
    raise ValueError(f"no recipe, folder or hub id {model!r}: {hint}")

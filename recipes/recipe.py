"""Recipe: what to make, as a frozen noun read from YAML. Knows no tensor, no hub and no file of a model."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .plain import CONTROL, read_bytes
from .plain_yaml import LONGEST, read_yaml

METHODS = ("awq", "gptq", "bnb", "rtn")
QUALITIES = ("fast", "default", "best")
FORMATS = ("awq", "gptq", "compressed-tensors", "bnb")
HEADS = ("16bit", "int4")
HUBS = ("hf", "modelscope")
MOST_SAMPLES = 1_000_000
SHARES = ("top1", "image_effect", "accuracy_drop")  # the limits that are shares of one
KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of text",
    NoneType: "null",
}


@dataclass(frozen=True)
class Limits:
    """What `check` allows an artifact to lose against FP16. KL in nats per token, agreement in [0, 1]."""

    mean_kl: float = 0.10
    p99_kl: float = 1.0
    soft_kl: float | None = None  # mean KL at temperature 4, times 16: what every token feeds; None: told, not held to
    top1: float = 0.90
    perplexity_ratio: float = 1.10
    image_effect: float = 0.5  # fraction of FP16's own KL between with and without the picture that must remain
    accuracy_drop: float = 0.05
    served_to_int4: float = 0.08  # mean difference of an engine's logprobs from the files' own; 16-bit arithmetic's
    repeating: float = 0.02  # share of answers that end in a loop where FP16's do not

    def __post_init__(self) -> None:
        _typed(self)
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 <= value <= (1 if name in SHARES else sys.float_info.max):
                raise ValueError(f"{name} is {value!r}; it must be {'from 0 to 1' if name in SHARES else '>= 0'}")


@dataclass(frozen=True)
class Recipe:
    """What goes in. `model` is 'pebble', a hub id or a local folder; group_size counts input columns."""

    name: str
    model: str
    description: str = ""
    version: int = 1  # of the recipe: a published checkpoint's tag is v1, v2, ...
    family: str | None = None  # config.json's model_type, so that another model under this id is refused
    card: str | None = None  # the smallest card, as 24GiB, on which AWQ of it fits, with 8,192 tokens and a picture
    modelscope: str | None = None  # the id on ModelScope, where it differs
    revision: str | None = None
    method: str = "awq"
    quality: str = "default"  # how much is done for each layer; awq and gptq only
    format: str | None = None  # None: the method's own
    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None  # None: the method's own (AWQ asymmetric, GPTQ symmetric)
    head: str = "16bit"  # the output head, which weighs on every token's logits
    keep: tuple[str, ...] = ()  # module name prefixes left in 16 bit, beside the family's own
    calibration: str = "drawn"
    samples: int = 128
    limits: Limits = field(default_factory=Limits)
    trust_remote_code: bool = False  # run the checkpoint's own Python where no class is known

    def __post_init__(self) -> None:
        _typed(self)
        _choice("method", self.method, METHODS)
        _choice("quality", self.quality, QUALITIES)
        if self.quality != "default" and self.method not in ("awq", "gptq"):
            raise ValueError(f"quality is {self.quality!r}; method {self.method} has one quality only: leave it out")
        if self.format is not None:
            _choice("format", self.format, FORMATS)
        _choice("head", self.head, HEADS)
        if self.bits != 4:
            raise ValueError(f"bits is {self.bits!r}; mmq writes 4-bit weights only")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size is {self.group_size!r}; it must be one of 32, 64, 128")
        if self.card is not None and not re.fullmatch(r"[1-9]\d*GiB", self.card):
            raise ValueError(f"card is {self.card!r}; it must be a card's memory, as 24GiB")
        if not 1 <= self.version <= 1_000_000:
            raise ValueError(f"version is {self.version!r}; it must be a whole number >= 1 and <= 1000000")
        for name, value in vars(self).items():
            allowed = "\n\t" if name == "description" else ""
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str) and CONTROL.search(one.translate(dict.fromkeys(map(ord, allowed)))):
                    raise ValueError(f"{name} is {one!r}; it must be without control characters")
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"samples is {self.samples!r}; it must be a whole number >= 1 and <= {MOST_SAMPLES}")


def _choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")


def _typed(noun: Any) -> None:
    """ValueError where a field of a dataclass holds another type than it is declared with."""
    for name, hint in get_type_hints(type(noun)).items():
        value = getattr(noun, name)
        kinds = [get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) is not tuple else [hint])]
        kinds = kinds or [hint]
        fits = type(value) in kinds or (float in kinds and type(value) is int)  # a bool is not a whole number here
        if fits and isinstance(value, tuple):
            fits = all(isinstance(item, str) for item in value)
        if not fits:
            names = " or ".join(KINDS.get(kind, str(kind)) for kind in kinds)
            quote = " (put it in quotes)" if str in kinds and isinstance(value, int | float) else ""
            told = list(value) if isinstance(value, tuple) else value  # as it stands in the YAML
            raise ValueError(f"{name} is {told!r}; it must be {names}{quote}")


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
    data = read_yaml(text, where=where)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a recipe is a mapping of keys to values")
    data = _known(Recipe, data, where)
    for key in ("name", "model"):
        if key not in data:
            raise ValueError(f"{where}: key {key!r} is missing")
    if isinstance(data.get("keep"), list):
        data["keep"] = tuple(data["keep"])
    if "limits" in data:
        data["limits"] = limits_from(data["limits"], where=f"{where}: limits")
    return _made(Recipe, data, where)


def limits_from(data: Any, *, where: str) -> Limits:
    """Limits from a recipe's or a manifest's mapping; what it lacks has its default. ValueError on any unknown key."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a mapping of measures to numbers")
    return _made(Limits, _known(Limits, data, where), where)


def _made(cls: type, data: dict[str, Any], where: str) -> Any:
    try:
        return cls(**data)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def show(recipe: Recipe) -> str:
    """The recipe as YAML with every key and default; `parse` reads it back to the same recipe."""
    data = dataclasses.asdict(recipe)
    data["keep"] = list(recipe.keep)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def with_options(recipe: Recipe, **asked: Any) -> Recipe:
    """The recipe with each option that was given: what is None (or an empty list) stays as the recipe has it."""
    return dataclasses.replace(recipe, **{k: v for k, v in asked.items() if v is not None and v != ()})


def check_pinned(recipe: Recipe, *, local: bool) -> None:
    """ValueError where a hub's Python is to run without being pinned to a commit: it might be another tomorrow."""
    if recipe.trust_remote_code and not local and not re.fullmatch("[0-9a-f]{40}", recipe.revision or ""):
        raise ValueError(
            f"revision is {recipe.revision!r}; --trust-remote-code runs Python from the hub, so give --revision "
            "and the full hash of the commit that you have read"
        )


def model_on(recipe: Recipe, hub: str) -> str:
    """The id to fetch from `hub`: on ModelScope some models have another owner. ValueError for an unknown hub."""
    _choice("hub", hub, HUBS)
    return recipe.modelscope or recipe.model if hub == "modelscope" else recipe.model


def bundled() -> dict[str, Recipe]:
    """The recipes in the package, by name, sorted."""
    files = sorted((Path(__file__).parent / "bundled").glob("*.yaml"), key=lambda f: f.name.lower())
    recipes = [parse(file.read_text(encoding="utf-8"), where=file.name) for file in files]
    return {recipe.name: recipe for recipe in recipes}


def recipe_for(model: str) -> Recipe:
    """The recipe that MODEL names: a bundled one, a YAML file, or the defaults for a local folder or a hub id.

    ValueError with the nearest names where MODEL is none of these (a bare word that is neither recipe nor folder).
    """
    known = bundled()
    by_name = {name.lower(): recipe for name, recipe in known.items()}
    if model.lower() in by_name:
        return by_name[model.lower()]
    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no recipe file {model}")
        try:
            return parse(read_bytes(path, most=4 * LONGEST).decode("utf-8"), where=model)
        except UnicodeDecodeError as e:
            raise ValueError(f"{model}: not UTF-8 at byte {e.start + 1}") from None
    if path.is_dir():
        return Recipe(name=path.resolve().name, model=str(path))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/"):
        for recipe in known.values():
            if model.lower() in (recipe.model.lower(), (recipe.modelscope or "").lower()):
                return recipe
        return Recipe(name=model.split("/")[1], model=model)
    near = difflib.get_close_matches(model.lower(), by_name, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(by_name[n].name for n in near)}?" if near else "`mmq recipes` lists the recipes"
    raise ValueError(f"no recipe, folder or hub id {model!r}: {hint}")

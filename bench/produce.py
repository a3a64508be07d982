"""An artifact from what a user asks for: made by mmq itself, or by another package and then checked.

What cannot be is refused before anything is downloaded. Imports nothing heavy until it is to be made.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.alone import alone
from ..export.config import check_head
from ..export.config import settle as settle_own
from ..recipes.hub import fetch
from ..recipes.progress import Tell, silent
from ..recipes.recipe import Recipe, check_pinned, model_on, recipe_for, with_options
from ..recipes.sets import CHECKED, calibration_samples, check_calibration
from .backends import Asked
from .backends import settle as settle_backend

if TYPE_CHECKING:
    from ..export.artifact import Artifact
    from .check import Checked


@dataclass(frozen=True)
class Job:
    """What is to be made, and where. `asked` is what a backend is asked for; None: mmq does it."""

    recipe: Recipe
    out: Path
    asked: Asked | None = None


def settle(model: str, *, backend: str | None = None, out: Path | None = None, **options: Any) -> Job:
    """The recipe that `model` names with the `options` that were given, and the folder. ValueError for what cannot be
    made: an unknown name, a format that cannot hold the method, what a backend does not do."""
    method = options.get("method")
    if method == "autoround" and backend is None:
        raise ValueError("method autoround is another package's: add --backend auto-round")
    if options.get("quality") and backend:
        raise ValueError("--quality is mmq's own; a backend works with its own defaults: leave it out")
    named = recipe_for(model)
    if named.trust_remote_code and not options.get("trust_remote_code"):
        raise ValueError(
            f"recipe {model} wants the checkpoint's own Python to run, which a file cannot allow: read that code, then "
            "say --trust-remote-code"
        )
    recipe = with_options(named, **(options | ({"method": None} if backend else {})))
    check_calibration(recipe.calibration)
    if backend is None:
        symmetric, format = settle_own(recipe.method, recipe.symmetric, recipe.format)
        if recipe.head == "int4":
            check_head(format, symmetric)
        return Job(recipe, out or Path(f"out-{recipe.method}"))
    if recipe.head == "int4":
        raise ValueError("an int4 head is mmq's own; the backends leave it in 16 bit: leave --head out")
    grid: dict[str, Any] = {"symmetric": recipe.symmetric, "format": recipe.format}
    asked = settle_backend(backend, method=method, keep=recipe.keep, **grid)
    return Job(recipe, out or Path(f"out-{backend}-{asked.method}"), asked)


def produce(
    job: Job,
    *,
    hub: str = "hf",
    device: str = "cpu",
    max_vram: int | None = None,
    overwrite: bool = False,
    renew: bool = False,
    tell: Tell = silent,
) -> tuple[Artifact, Checked | None]:
    """Make it, and check what a backend made. `renew` is `make`'s; to a backend, which takes nothing up, `overwrite`.

    Errors as those of `fetch`, `make`, `quantize_with`, `examine` and `write`."""
    from ..export.make import make
    from ..quantize.ranks import rank
    from .examine import examine
    from .peer import quantize_with
    from .verdict import write

    recipe = job.recipe
    check_pinned(recipe, local=Path(recipe.model).is_dir())  # before anything is downloaded
    base = fetch(model_on(recipe, hub), hub=hub, revision=recipe.revision, tell=tell)
    options: dict[str, Any] = {
        "samples": calibration_samples(recipe, embedded=base.hub == "embedded"),
        "calibration": recipe.calibration,
        "device": device,
        "overwrite": overwrite or (renew and job.asked is not None),
        "tell": tell,
    }
    with alone(job.out, "mmq quantize") if rank() == 0 else nullcontext():
        if job.asked is None:
            return make(recipe, base, job.out, max_vram=max_vram, renew=renew, **options), None
        artifact = quantize_with(job.asked, recipe, base, job.out, **options)
        result = examine(artifact, base.path, device=device, tell=tell)
        write(artifact, result, asked=CHECKED)
        return artifact, result

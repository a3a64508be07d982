"""Jobs: recipes times methods, each with the name of its artifact. Starts nothing and knows no command."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..export.remote import parse_target
from ..recipes.recipe import METHODS, Recipe, recipe_for
from .produce import settle

LONGEST = 200  # bytes of a name, of which the method and a suffix make a file's, 255 at most
FIELDS = ("name", "method", "version")  # of a hub address, in braces


@dataclass(frozen=True)
class Job:
    """One artifact to be made: `source` is the recipe as it was named. `recipe` is None where it cannot be read or
    made so, and `problem` says why: the job fails when its turn comes, and the others do not."""

    source: str
    method: str
    recipe: Recipe | None
    problem: str = ""

    @property
    def name(self) -> str:
        """The artifact's, and its folder's."""
        return f"{self.recipe.name if self.recipe else Path(self.source).stem}-{self.method}"


def matrix(
    sources: Sequence[str], methods: Sequence[str] = (), *, trust: bool = False, publish: Sequence[str] = ()
) -> list[Job]:
    """Every recipe by every method (none: the recipe's own), in their order, of a folder of recipes each file; one that
    cannot be published at `publish` is a problem of its own. ValueError for an unknown method, and for two jobs of one
    name."""
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"no method {unknown[0]!r}; --methods takes {', '.join(METHODS)}, with commas between them")
    found: dict[str, Job] = {}
    for source in (file for named in sources for file in _files(named)):
        for method in methods or (None,):
            job = _job(source, method, trust, publish)
            if before := found.get(job.name.lower()):
                raise ValueError(f"{before.source} and {source} would both make {job.name}; give them other names")
            found[job.name.lower()] = job
    return list(found.values())


def _files(source: str) -> list[str]:
    """The recipes in a folder that holds some and no model; any other `source` as it is."""
    folder = Path(source)
    if not source or not folder.is_dir() or (folder / "config.json").exists():
        return [source]
    return sorted(str(path) for path in folder.iterdir() if path.suffix in (".yaml", ".yml")) or [source]


def _job(source: str, method: str | None, trust: bool, publish: Sequence[str]) -> Job:
    try:
        allowed = trust and recipe_for(source).trust_remote_code  # of those that ask for it
        recipe = settle(source, method=method, trust_remote_code=allowed or None).recipe
        if not re.fullmatch(r"\w[\w.-]*", recipe.name) or len(recipe.name.encode()) > LONGEST:
            told = recipe.name if len(recipe.name) <= 40 else f"{recipe.name[:40]}..."
            raise ValueError(
                f"{source}: name {told!r} is no folder's: letters, digits, '-', '_', '.', {LONGEST} bytes at most"
            )
        job = Job(source, recipe.method, recipe)
        addresses(publish, job)
        return job
    except (ValueError, OSError) as e:
        return Job(source, method or "awq", None, " ".join(str(e).split()))


def as_matrix(jobs: Sequence[Job]) -> dict[str, list[dict[str, str]]]:
    """The jobs as a CI service takes a matrix: {"include": [{"recipe", "method", "name"}, ...]}."""
    return {"include": [{"recipe": job.source, "method": job.method, "name": job.name} for job in jobs]}


def check_addresses(templates: Sequence[str]) -> None:
    """ValueError for an address with other braces than `FIELDS`, or that is none with any name in them."""
    for template in templates:
        try:
            used = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as e:
            raise ValueError(f"--publish {template}: {e}") from None
        if unknown := [field for field in used if field not in FIELDS]:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(f"--publish {template}: {{{unknown[0]}}} is unknown; known are {known}")
        parse_target(template.format_map({"name": "name", "method": "awq", "version": 1}))


def addresses(templates: Sequence[str], job: Job) -> list[str]:
    """Where the job's artifact is published: `hf:org/{name}-{method}` with the recipe's name in it. ValueError where
    that makes no address, as with a name that no hub takes."""
    assert job.recipe is not None
    facts = {"name": job.recipe.name, "method": job.method, "version": job.recipe.version}
    return [str(parse_target(template.format_map(facts))) for template in templates]


def check_apart(templates: Sequence[str], jobs: Sequence[Job]) -> None:
    """ValueError where two jobs would be published at one address, in whatever letters: to a hub they are the same."""
    seen: dict[str, str] = {}
    for job in jobs:
        for address in addresses(templates, job) if job.recipe else ():
            if (before := seen.setdefault(address.lower(), job.name)) != job.name:
                raise ValueError(f"{before} and {job.name} would both be published at {address}; add {{method}}")

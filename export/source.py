"""What the base says of itself: licence, languages, whether its hub gates it; and whether what is made of it may be
published. Reads the metadata block of its README.md, which is anybody's text: what does not look as it should is left
out. Knows no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..recipes import hub_hf, hub_modelscope
from ..recipes.plain import read_bytes
from .artifact import Artifact

# Licences that let anybody pass on what is made of the model, under the same licence. Others may; their terms want to
# be read by a person: Llama's and Gemma's want notices and names, CC-BY-NC and -ND, research licences, "other".
FREE = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib"),
    *("unlicense", "wtfpl", "cc0-1.0", "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "openrail"),
    *("bigscience-openrail-m", "creativeml-openrail-m", "openrail++", "bigcode-openrail-m", "afl-3.0"),
    *("artistic-2.0", "bsl-1.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gpl", "gpl-2.0"),
    *("gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "ms-pl", "ncsa", "osl-3.0", "ofl-1.1"),
    *("postgresql"),
}
HOMES = {"hf": "https://huggingface.co/", "modelscope": "https://www.modelscope.cn/models/"}
LONGEST = 1 << 16  # characters of a README that are looked at
DEEPEST = 20  # lists and mappings within each other


@dataclass(frozen=True)
class Source:
    """The base of an artifact. `model` is its id on `hub` (None for a folder whose origin nobody told), `name` what it
    is called; `gated` where the hub asks for terms to be accepted."""

    name: str
    model: str | None
    hub: str
    revision: str | None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    gated: bool = False

    @property
    def url(self) -> str | None:
        """Its page."""
        return f"{HOMES[self.hub]}{self.model}" if self.model and self.hub in HOMES else None


def source_of(artifact: Artifact, *, base_model: str | None = None, license: str | None = None) -> Source:
    """The artifact's base with what its own card says. `base_model` (OWNER/NAME on the Hugging Face Hub) names one that
    was a folder here, `license` tells what the card does not. OSError where the hub does not tell the card."""
    base = artifact.manifest["base"]
    hub, model = base["hub"] if base["model"] else "local", base["model"] or ""  # of a folder that others packed: ""
    name = Path(model).name if hub == "local" else model.rpartition("/")[2]
    if hub == "embedded":
        return Source("pebble", None, hub, None, license=license or "apache-2.0", languages=("en", "zh"))
    if hub == "local":
        readme = _local(Path(model)) if model else ""
        found = Source(name or artifact.manifest["name"], base_model, "hf" if base_model else "local", None)
    else:
        readme, gated = (hub_hf if hub == "hf" else hub_modelscope).about(model, base["revision"])
        found = Source(name, model, hub, base["revision"], gated=gated)
    found = with_metadata(found, metadata(readme))
    return replace(found, license=license, license_name=None, license_link=None) if license else found


def _local(folder: Path) -> str:
    file = folder / "README.md"
    return read_bytes(file).decode("utf-8", "replace") if file.is_file() else ""


def metadata(readme: str) -> Mapping[str, Any]:
    """The YAML block at the head of a model card; empty where there is none, or none that can be read."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme[:LONGEST], re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found and _is_plain(found[1]) else None
    except (yaml.YAMLError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_plain(text: str) -> bool:
    """Whether YAML is small without names for its parts, which may name each other into terabytes, and not deep. Errors
    as yaml's."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            return False
    return True


def with_metadata(source: Source, data: Mapping[str, Any]) -> Source:
    """Licence and languages as a card's metadata tells them, each only where it looks as it should."""
    licenses = _list(data.get("license"))
    license = "-".join(licenses[0].lower().split()) if len(licenses) == 1 else ""
    license = {"apache-license-2.0": "apache-2.0", "mit-license": "mit"}.get(license, license)  # ModelScope's spelling
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,60}", license):
        license = ""
    name, link = (str(data.get(key) or "") for key in ("license_name", "license_link"))
    spoken = _list(data.get("language"), no="no")  # Norwegian, which YAML reads as false
    languages = tuple(x for x in spoken if re.fullmatch(r"[a-z]{2,3}|multilingual", x))
    if re.fullmatch(r"[\w./-]{1,80}", link) and ".." not in link and source.url:  # a file beside the base's card
        link = f"{source.url}/{'blob/main' if source.hub == 'hf' else 'file/view/master'}/{link}"
    return replace(
        source,
        license=license or None,
        license_name=name if re.fullmatch(r"[\w.+-][\w .+-]{0,80}", name) else None,
        license_link=link if re.fullmatch(r"https?://[\w.-]+(:\d+)?/[^\s<>\"'()\[\]`\\]{0,200}", link) else None,
        languages=languages,
    )


def _list(value: Any, *, no: str | None = None) -> list[str]:
    found = value if isinstance(value, list) else [value]
    found = [no if x is False else x for x in found]
    return [x for x in found if isinstance(x, str)]


def obstacles(source: Source) -> list[str]:
    """Why what is made of this base may not simply be published; empty where nothing stands against it."""
    what = source.model or source.name
    if source.license is None:
        return [f"{what} names no licence in its card: say which it is with --license"]
    found = []
    if source.gated:
        found.append(f"{what} is gated: whoever downloads it agrees to terms that a copy here would not ask for")
    if source.license not in FREE:
        told = f"{source.license_name or source.license}{f', {source.license_link}' if source.license_link else ''}"
        found.append(f"the licence of {what} ({told}) may not let you publish what is made of it: read it")
    return found


def public_manifest(manifest: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The manifest as it is published: a folder of this machine is named by its last part alone, everywhere."""
    base = dict(manifest["base"])
    if base["hub"] == "local":
        base |= {"model": source.model or source.name, "hub": "hf" if source.model else "local"}
    return without_paths({**manifest, "base": base})


def without_paths(tree: Any) -> Any:
    """The same JSON, each text that is a path from the root, a home or the folder one was in by its last part."""
    if isinstance(tree, Mapping):
        return {k: without_paths(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_paths(v) for v in tree]
    if isinstance(tree, str) and re.match(r"(/[^\s/]|~[\w.-]*/|\.{1,2}/|[A-Za-z]:[\\/])", tree):
        return re.split(r"[\\/]", tree.rstrip("\\/"))[-1]
    return tree

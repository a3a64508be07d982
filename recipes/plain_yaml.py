"""YAML of a person's hand, from anybody: no aliases, no tags, no key twice, not too long and not too deep.

What is left is JSON's kinds in YAML's spelling, and takes time and memory in proportion to its length.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

LONGEST = 1 << 18  # characters
DEEPEST = 32


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes no objects, without what its safe loader still lets a file do."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error("aliases (& and *) are not read; write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise _error(f"tags ({event.tag}) are not read; leave it out", event)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _error(f"nested deeper than {DEEPEST}", event)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 100:
            raise _error(f"a number of {len(node.value)} characters", node)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in seen:
                raise _error("a key is no text" if name is None else f"the key {name} stands twice", key)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _error(what: str, where: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=where.start_mark)


def read_yaml(text: str, *, where: str) -> Any:
    """The text's one document. ValueError, in a line that names `where`, for all that is not read."""
    if len(text) > LONGEST:
        raise ValueError(f"{where} has {len(text)} characters; at most {LONGEST} are read")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date or a number that is none
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(e).split())[:300]}") from None

"""JSON schemas of a request that say nothing but themselves, as {"$ref": "#"}: no text meets them, no token begins one.

vLLM 0.32 takes such a schema, finds no token allowed, and answers 500. Lists and trees that contain themselves are
sound: each of their turns has a bracket. Knows no other fault of a schema; the engine tells those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

BELOW = ("response_format", "structured_outputs", "text", "tools", "functions", "guided_json")  # keys of a request
HOLDERS = ("schema", "json_schema", "json", "parameters", "input_schema", "guided_json")  # and below them, of a schema
VALUES = ("enum", "const", "default", "examples")  # of a schema: what is in them is no schema


def endless(request: Any) -> str | None:
    """Where in `request` a schema refers to nothing but itself, as `guided_json#/$defs/a`; None where none does."""
    for key in BELOW if isinstance(request, dict) else ():
        for schema in schemas_in(key, request.get(key)):
            if path := empty(schema):
                return key + path
    return None


def schemas_in(key: str, value: Any) -> Iterator[dict[str, Any]]:
    """The schemas in what a request has under `key`, as text or not; what is within a schema is none of its own."""
    todo = [(key, value)]
    while todo:
        key, value = todo.pop()
        if key in HOLDERS and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        wraps = isinstance(value, dict) and isinstance(value.get("schema"), (dict, str))  # OpenAI's {"name", "schema"}
        if key in HOLDERS and isinstance(value, dict) and not wraps:
            yield value
        elif isinstance(value, dict):
            todo += value.items()
        elif isinstance(value, list):
            todo += [("", inner) for inner in value]


def empty(schema: dict[str, Any]) -> str | None:
    """The path of a reference in `schema` by which nothing can be said, since each way on leads back before any text;
    None where there is none. Looks at each node and each way once."""
    nodes, above = _nodes(schema)
    closed = dict.fromkeys(nodes, 0)  # of each node the ways on of which nothing is known to say something
    asking: dict[int, list[list[int]]] = {}  # what waits for a node: [who], emptied once any part of the way spoke
    for at, node in nodes.items():
        for way in _ways(schema, node):
            if all(id(part) in nodes for part in way):
                closed[at] += 1
                waits = [at]
                for part in way:
                    asking.setdefault(id(part), []).append(waits)
    todo = [at for at, ways in closed.items() if not ways]
    while todo:
        for waits in asking.get(todo.pop(), ()):
            if waits:
                at = waits.pop()
                closed[at] -= 1
                if not closed[at]:
                    todo.append(at)
    for at, node in nodes.items():
        if closed[at] and isinstance(node.get("$ref"), str):
            path = ""
            while at in above:
                at, key = above[at]
                path = f"/{key}{path}"
            return f"#{path}"
    return None


def _nodes(schema: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], dict[int, tuple[int, Any]]]:
    """The objects of a schema by their id, and of each object and list the id of what holds it, with the key."""
    nodes: dict[int, dict[str, Any]] = {}
    above: dict[int, tuple[int, Any]] = {}
    todo: list[Any] = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            nodes[id(node)] = node
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in inner:
            if isinstance(value, (dict, list)) and key not in VALUES:
                above[id(value)] = (id(node), key)
                todo.append(value)
    return nodes, above


def _ways(schema: Any, node: dict[str, Any]) -> Iterator[list[Any]]:
    """What a node leads on to at the same place of the text: of each list one must say something."""
    if isinstance(node.get("$ref"), str):
        yield [_referred(schema, node["$ref"])]
    for part in node["allOf"] if isinstance(node.get("allOf"), list) else ():
        yield [part]
    for key in ("anyOf", "oneOf"):
        if isinstance(node.get(key), list) and node[key]:
            yield node[key]


def _referred(schema: Any, reference: str) -> Any:
    """What a reference within the schema points to; None where it points elsewhere or nowhere."""
    if not reference.startswith("#"):
        return None
    node = schema
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        try:
            node = node[int(step)] if isinstance(node, list) else node[step]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return node

"""From the names in a model to the names in its checkpoint, by transformers' own rules for loading.

transformers renames tensors as it loads them, and splits or fuses some. What is renamed is read from its file as it
is; what is converted becomes a tensor of the source that is made when it is asked for. Knows no model class.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .source import Derived, Meta, Source, with_derived


def checkpoint_names(module: Any, source: Source, rules: Sequence[Any] = ()) -> tuple[dict[str, str], Source]:
    """Parameter name in `module` -> tensor name in the source, and the source with the tensors that are converted.

    `rules` come before transformers' own. A tensor that fits a parameter once it is renamed is never converted.
    ValueError names the parameters that no tensor fills.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    every: list[Any] = [*rules, *get_model_conversion_mapping(module)]
    renamings = [r for r in every if not isinstance(r, WeightConverter)]
    converters = [r for r in every if isinstance(r, WeightConverter)]
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    options: dict[str, Any] = {"base_model_prefix": module.base_model_prefix, "meta_state_dict": module.state_dict()}
    # 5.17 has these two as positional names, later releases by keyword; both take them by keyword
    options = {k: v for k, v in options.items() if k in inspect.signature(rename_source_key).parameters}
    found: dict[str, str] = {}
    waiting: dict[tuple[int, str], dict[str, list[str]]] = {}  # converter, its target -> pattern -> stored names
    for name in (*source.metas, *source.derived):
        plain, _ = rename_source_key(name, renamings, [], **options)
        if plain in shapes:
            found[plain] = name
            continue
        if name in source.derived:
            continue
        for number, converter in enumerate(converters):
            target, pattern = rename_source_key(name, renamings, [converter], **options)
            if pattern is not None:
                waiting.setdefault((number, target), {}).setdefault(pattern, []).append(name)
                break
    derived: dict[str, Derived] = {}
    for (number, target), parts in waiting.items():
        for made in _targets(converters[number], target):
            if made in shapes and made not in found:
                derived[made] = _derived(module, source, converters[number], target, made, parts, shapes[made])
                found[made] = made
    source = with_derived(source, derived)
    wanted = dict(module.named_parameters())
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    missing = [n for n in wanted if n not in found and n not in tied]
    if missing:
        raise ValueError(f"{source.folder}: no tensor for {missing[0]} (and {len(missing) - 1} more parameters)")
    wrong = [n for n in wanted if n in found and source.meta(found[n]).shape != shapes[n]]
    if wrong:
        n = wrong[0]
        raise ValueError(
            f"{source.folder}: tensor {found[n]} has shape {source.meta(found[n]).shape}, but config.json says "
            f"{shapes[n]} ({n})"
        )
    return {n: c for n, c in found.items() if n in shapes}, source


def _targets(converter: Any, target: str) -> list[str]:
    """The parameters that a converter makes where its first one is `target`."""
    first = converter.target_patterns[0]
    return [target.replace(first, other, 1) for other in converter.target_patterns]


def _derived(
    module: Any,
    source: Source,
    converter: Any,
    target: str,
    made: str,
    parts: Mapping[str, Sequence[str]],
    shape: tuple[int, ...],
) -> Derived:
    names = tuple(n for stored in parts.values() for n in stored)
    first = source.metas[names[0]]
    numbers = 1
    for size in shape:
        numbers *= size
    each = first.nbytes // max(1, _count(first))

    def make() -> Tensor:
        fresh = copy.deepcopy(converter)
        for pattern, stored in parts.items():
            for name in stored:
                fresh.add_tensor(target, name, pattern, lambda name=name: source.get(name))
        return fresh.convert(target, model=module, config=module.config)[made]

    return Derived(Meta(shape, first.dtype, numbers * each), names, make)


def _count(meta: Meta) -> int:
    numbers = 1
    for size in meta.shape:
        numbers *= size
    return numbers

"""What shape a decoder layer has, found by running it: which linears share an input, and what can absorb a scale.

The layer runs at its real widths, in its model's own forward, but costs next to nothing: its linears are replaced by
random matrices of rank two (thin.py). Two linears share an input when they are given the same memory; what absorbs a
scale of theirs is tried (absorb.py). So no rule here knows a name. Knows no weights and no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .absorb import Seen, absorbed, folds, memory_of, offset_of
from .experts import experts_of
from .family import Family, Group
from .lockstep import Lockstep, Stop
from .mixture import mixture_groups
from .thin import filled, is_linear

TOKENS = 6
NARROW = 64  # output channels: what is no multiple of it (a gate for each head, say) no engine's kernels take


def decoder_layers(module: Any) -> str:
    """The path of the text model's ModuleList of decoder layers. ValueError where there is none, or more than one."""
    count = module.config.get_text_config(decoder=True).num_hidden_layers
    words = module.get_input_embeddings()
    paths = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    owners = {n.rpartition(".")[0] for n, m in module.named_modules() if m is words}
    beside = [p for p in paths if p.rpartition(".")[0] in owners]
    found = beside or [p for p in paths if p.rpartition(".")[2] in ("layers", "h", "blocks")]
    if len(found) != 1:
        what = "no list" if not found else f"{len(found)} lists ({', '.join(found)})"
        raise ValueError(
            f"{type(module).__name__} has {what} of {count} decoder layers beside its embeddings, where one is wanted; "
            "give it a row in quantize/family.py"
        )
    return found[0]


def detect(module: Any) -> tuple[Family, tuple[str, ...]]:
    """The family of a model on the meta device, `skip` left empty, and what a user should know of it.

    ValueError names what is missing where the model's own forward does not come to a layer.
    """
    path = decoder_layers(module)
    layers = module.get_submodule(path)
    kinds = [_kind(layer) for layer in layers]
    groups: dict[Any, tuple[Group, ...]] = {}
    notes: dict[str, None] = {}
    text = module.get_submodule(path.rpartition(".")[0])
    with torch.no_grad(), filled(module, text, layers), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.tensor([_plain_tokens(module.config)])
        with Lockstep(layers, [lambda: text(input_ids=ids, use_cache=False)]) as steps:
            try:
                for stop in steps:
                    kind = kinds[stop.index]
                    if kind not in groups:
                        groups[kind], more = _layer_groups(stop, heads_of(module.config, stop.index))
                        notes |= dict.fromkeys(more)
                    if all(k in groups for k in kinds):
                        stop.calls.clear()
                        break
                    stop.advance()
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as e:
                raise ValueError(
                    f"{type(module).__name__} does not run on text alone, so that its layers could be looked at "
                    f"({type(e).__name__}: {str(e).partition(chr(10))[0]}); give it a row in quantize/family.py"
                ) from e
    missed = [i for i, k in enumerate(kinds) if k not in groups]
    if missed:
        raise ValueError(
            f"decoder layer {missed[0]} of {type(module).__name__} is not reached by text (it has "
            f"{', '.join(sorted({n.split('.')[0] for n, _ in layers[missed[0]].named_parameters()}))}): not supported"
        )
    return Family(path, tuple(groups[k] for k in kinds)), tuple(notes)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Layers of one kind have the same modules of the same shapes."""
    return tuple(
        (n, type(m).__name__, *(tuple(p.shape) for p in m.parameters(False))) for n, m in layer.named_modules()
    )


def heads_of(config: Any, index: int) -> tuple[int, int]:
    """How many heads of values decoder layer `index` has, and the width of one."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_heterogeneous", False):  # its layers differ: Gemma 4
        text = text.per_layer_config[index]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, width


def _plain_tokens(config: Any) -> list[int]:
    """Ids that stand for no picture and for nothing else that is special."""
    special: set[int] = set()
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "model_type"))):
        for key, value in vars(part).items():
            if re.search(r"token(_id|_index)s?$", key):
                special |= (
                    {value} if isinstance(value, int) else set(value) if isinstance(value, list | tuple) else set()
                )
    count = config.get_text_config(decoder=True).vocab_size
    return [i for i in range(count) if i not in special][:TOKENS]


def _layer_groups(stop: Stop, heads: tuple[int, int]) -> tuple[tuple[Group, ...], list[str]]:
    """The groups of the layer that `stop` stands before, in the order in which they run."""
    call = stop.calls[0]
    before = call.hidden.clone()

    def run() -> Tensor:
        out = stop.run(call)
        return (out[0] if isinstance(out, tuple) else out) - before

    seen = _watched(stop.layer, run)
    plain = run()
    reached: dict[Any, list[Seen]] = {}
    for one in seen:
        if is_linear(one.module):
            reached.setdefault(memory_of(one.given), []).append(one)
    found, notes = [], []
    for memory, members in reached.items():
        chosen = list({m.name: m for m in members if m.module.out_features % NARROW == 0}.values())
        left = sorted({m.name for m in members} - {m.name for m in chosen})
        if left:
            notes.append(f"{', '.join(left)}: too narrow for int4, left in 16 bit")
        if chosen:
            found.append(absorbed(seen, memory, chosen, [m for m in members if m.name in left], run, plain, heads))
    found, missed = _siblings(stop.layer, found, {s.name for s in seen})
    if missed:
        notes.append(f"{', '.join(missed)}: not reached by text, left in 16 bit")
    own = [n for n, m in stop.layer.named_modules() if isinstance(m, nn.Linear) and not is_linear(m)]
    if own:
        notes.append(f"{', '.join(own)}: linears with a forward of their own, left in 16 bit")

    def absorbs(norm: str, readers: list[nn.Module]) -> float | None:
        one = next(s for s in seen if s.name == norm)
        offset, s = offset_of(one), torch.rand(one.gave.shape[-1]) * 1.5 + 0.5
        return offset if offset is not None and folds(one.module, s, readers, s, run, plain) else None

    return (*found, *mixture_groups(stop.layer, run, absorbs)), notes


def _watched(layer: nn.Module, run: Callable[[], Tensor]) -> list[Seen]:
    """Every call of a linear or of a norm (a module with one vector `weight`) inside the layer, in order."""
    seen: list[Seen] = []
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is not None and isinstance(out, Tensor):
                seen.append(Seen(name, module, given, out, lambda: module.forward(*args, **kwargs)))

        return record

    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if is_linear(module) or (weight is not None and weight.ndim == 1):
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _siblings(layer: nn.Module, groups: list[Group], reached: set[str]) -> tuple[list[Group], list[str]]:
    """The groups, with those of a list's members that no token was sent to (a mixture's experts, say) made after their
    siblings; and the linears that have none."""
    told = {m for _, mixture in experts_of(layer) for m in mixture.modules()}
    every = [n for n, m in layer.named_modules() if is_linear(m) and m not in told]
    models: dict[str, Group] = {}
    for group in groups:
        if any(c.isdigit() for c in group.linears[0]):
            models.setdefault(_pattern(group.linears[0]), group)
    missed, made = [], list(groups)
    done = {n for g in groups for n in g.linears} | reached
    for name in every:
        model = models.get(_pattern(name))
        if name in done:
            continue
        if model is None or model.linears[0].count(".") != name.count("."):
            missed.append(name)
            continue
        old, new = re.findall(r"(?<=\.)\d+(?=\.)", model.linears[0]), re.findall(r"(?<=\.)\d+(?=\.)", name)
        if len(old) != 1 or len(new) != 1:
            missed.append(name)
            continue
        group = Group(
            tuple(n.replace(f".{old[0]}.", f".{new[0]}.", 1) for n in model.linears),
            None if model.absorber is None else model.absorber.replace(f".{old[0]}.", f".{new[0]}.", 1),
            model.offset,
            model.last,
            tuple(n.replace(f".{old[0]}.", f".{new[0]}.", 1) for n in model.beside),
        )
        made.append(group)
        done |= set(group.linears)
    return made, missed


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

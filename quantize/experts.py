"""A mixture's experts, one linear for each of their matrices.

transformers 5 keeps all experts of a layer as two tensors, [experts, 2 inner, hidden] and [experts, hidden, inner].
Here they are taken apart on the meta device, so that hooks, Gram matrices, scales and packers meet ordinary linears
under the names that engines expect, and a checkpoint that stores the fused tensors is read expert by expert. Knows no
model class: any experts module of transformers' common form will do, and another is refused by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .family import Group
from .source import Derived, Meta, Source, with_derived

FUSED = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, act: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.gate_proj = _linear(hidden, inner, dtype)
        self.up_proj = _linear(hidden, inner, dtype)
        self.down_proj = _linear(inner, hidden, dtype)
        self.act = act

    def inner(self, x: Tensor) -> Tensor:
        """What down_proj reads, [tokens, inner], for [tokens, hidden]."""
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))


class Experts(nn.ModuleList):
    """The experts of one layer, called as transformers calls its own: with the tokens, for each of them the experts
    that the router chose, and their weights."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k], [tokens, k] -> [tokens, hidden]. Sums in float32, expert by expert, so that
        the order of additions, and with it every bit, is the same each time."""
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        token = order // top_k_index.shape[1]
        weight = top_k_weights.flatten()[order, None].float()
        ends = torch.bincount(chosen, minlength=len(self)).cumsum(0).tolist()
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert, (start, end) in zip(self, pairwise([0, *ends]), strict=True):
            if start < end:
                mine = token[start:end]
                out.index_add_(0, mine, expert(hidden_states[mine]).float() * weight[start:end])
        return out.to(hidden_states.dtype)


@dataclass(frozen=True)
class Stack:
    """A fused experts module: where it was, and its sizes."""

    path: str
    experts: int
    hidden: int
    inner: int


def unfused(module: Any, source: Source) -> tuple[Source, list[Any]]:
    """Take the fused experts of a model on the meta device apart, in place. Returned: the source, in which every expert
    of a tensor that is stored fused has a name of its own, and the renamings (transformers' WeightRenaming) by which
    experts that are stored one by one find their linears.

    ValueError for experts of a form that is not known here.
    """
    found = {n: m for n, m in module.named_modules() if set(FUSED) <= {p for p, _ in m.named_parameters(recurse=False)}}
    odd = [(n, m) for n, m in module.named_modules() if n not in found and _three_dimensional(m)]
    for name, experts in odd:
        raise ValueError(f"{name} ({type(experts).__name__}) keeps its experts in a form that mmq does not take apart")
    if not found:
        return source, []
    stacks = {name: _stack(name, experts) for name, experts in found.items()}
    source, rules = _expert_tensors(module, source, stacks)
    for name, experts in found.items():
        stack, dtype = stacks[name], experts.down_proj.dtype
        made = Experts([Expert(stack.hidden, stack.inner, experts.act_fn, dtype) for _ in range(stack.experts)])
        module.set_submodule(name, made.eval().requires_grad_(False))
    return source, rules


def _three_dimensional(module: nn.Module) -> bool:
    """Whether a module's own parameters look like matrices of several experts: three dimensions, and no convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(
        p.ndim == 3 and min(p.shape) > 1 and n.endswith("proj") for n, p in module.named_parameters(recurse=False)
    )


def _stack(name: str, experts: Any) -> Stack:
    from transformers.integrations import moe

    plain = getattr(type(experts), "_apply_gate", None) is moe._default_apply_gate
    marks = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    wrong = [k for k, v in marks.items() if getattr(experts, k, v) is not v]
    up, down = (getattr(experts, n) for n in FUSED)
    fits = up.ndim == down.ndim == 3 and up.shape == (len(down), 2 * down.shape[2], down.shape[1])
    if not plain or wrong or not fits or any(n not in FUSED for n, _ in experts.named_parameters()):
        why = ", ".join(wrong) or ("a gate of their own" if not plain else "shapes or biases of their own")
        raise ValueError(f"{name} ({type(experts).__name__}): experts with {why} are not supported")
    return Stack(name, len(down), down.shape[1], down.shape[2])


def _linear(width: int, rows: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(width, rows, bias=False, device="meta", dtype=dtype)


def _expert_tensors(module: Any, source: Source, stacks: dict[str, Stack]) -> tuple[Source, list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    every: list[Any] = get_model_conversion_mapping(module)
    renamings = [r for r in every if not isinstance(r, WeightConverter)]
    converters = [r for r in every if isinstance(r, WeightConverter)]
    options: dict[str, Any] = {"base_model_prefix": module.base_model_prefix, "meta_state_dict": module.state_dict()}
    options = {k: v for k, v in options.items() if k in inspect.signature(rename_source_key).parameters}
    derived: dict[str, Derived] = {}
    leaves: dict[str, str] = {}  # what a checkpoint calls an expert's matrix -> gate_proj, up_proj, down_proj
    for name, meta in source.metas.items():
        target, pattern = rename_source_key(name, renamings, converters, **options)
        path, _, kind = target.rpartition(".")
        if path not in stacks or kind not in FUSED:
            continue
        single = re.fullmatch(r".*\.experts\.\d+\.(\w+)(\.weight)?", name)
        if single is None:
            derived |= _sliced(source, name, meta, stacks[path], kind)
        else:
            leaves.setdefault(single[1], _role(converters, pattern, kind))
    rules = [
        WeightRenaming(rf"\.experts\.(\d+)\.{leaf}\.", rf".experts.\1.{role}.")
        for leaf, role in leaves.items()
        if leaf != role
    ]
    return with_derived(source, derived) if derived else source, rules


def _role(converters: list[Any], pattern: str | None, kind: str) -> str:
    """Which of an expert's matrices a converter's source pattern stands for: gate and up are joined in that order."""
    if kind == "down_proj":
        return kind
    for converter in converters:
        if pattern in converter.source_patterns:
            return ("gate_proj", "up_proj")[converter.source_patterns.index(pattern)]
    raise ValueError(f"a mixture's {pattern!r} is joined with others in a way that mmq does not know")


def _sliced(source: Source, name: str, meta: Meta, stack: Stack, kind: str) -> dict[str, Derived]:
    """Every expert's own matrices in the stored tensor `name`, [experts, out, in] or [experts, in, out]. Of the file
    only that expert's bytes are read."""
    rows = 2 * stack.inner if kind == "gate_up_proj" else stack.hidden
    width = stack.hidden if kind == "gate_up_proj" else stack.inner
    straight = meta.shape == (stack.experts, rows, width)
    if not straight and meta.shape != (stack.experts, width, rows):
        raise ValueError(f"{source.folder}: tensor {name} has shape {meta.shape}, which is not that of the config")
    # both ways fit where rows == width; transformers then takes it for its own layout, [experts, out, in]
    halves = (("gate_proj", 0), ("up_proj", stack.inner)) if kind == "gate_up_proj" else (("down_proj", 0),)
    height = stack.inner if kind == "gate_up_proj" else stack.hidden
    prefix = name.removesuffix(".weight").rpartition(".")[0]
    made = Meta((height, width), meta.dtype, meta.nbytes // (stack.experts * rows * width) * height * width)

    def read(expert: int, start: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            out = slice(start, start + height)
            index = (expert, out) if straight else (expert, slice(None), out)
            part = source.part(name, index)
            return (part if straight else part.T).contiguous()

        return make

    return {
        f"{prefix}.{expert}.{leaf}.weight": Derived(made, (name,), read(expert, start))
        for expert in range(stack.experts)
        for leaf, start in halves
    }


def experts_of(module: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Every Experts in a model or a layer, by name."""
    for name, child in module.named_modules():
        if isinstance(child, Experts):
            yield name, child


def expert_groups(layer: nn.Module) -> tuple[Group, ...]:
    """The groups of a layer's experts. gate and up read what the router and the shared experts read too, so nothing
    absorbs a scale of theirs; down's is absorbed by the rows of up, as everywhere."""
    found = []
    for path, experts in experts_of(layer):
        for number in range(len(experts)):
            at = f"{path}.{number}"
            found.append(Group((f"{at}.gate_proj", f"{at}.up_proj"), None))
            found.append(Group((f"{at}.down_proj",), f"{at}.up_proj"))
    return tuple(found)

"""LoRA adapters beside a transformers model: what a linear puts out, plus factor B A x where the request's adapter has
the linear. The base stays once in memory, in whatever form it is: 16 bit, int4, NF4 (which makes it QLoRA).

An adapter's modules are those that its tensors name, as for vLLM; PEFT would look for its config's patterns, which say
how transformers called modules when it was trained. Part of the engine's program (pytorch_engine.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..export.names import SAME, TRANSFORMERS
from .adapter import EMBEDDED, PREFIX, TENSORS, Adapter, factors


@dataclass
class Choice:
    """The adapter that the model's thread computes with, "" for none. Set and read on that thread alone, where requests
    follow one another: so they do not mix."""

    name: str = ""


@dataclass(frozen=True)
class Term:
    """B A of one linear: a [rank, inputs] (of a lookup [entries, rank]), b [outputs, rank] with the factor in it."""

    a: Tensor
    b: Tensor


def attach(model: Any, adapters: Sequence[Adapter], *, architecture: str) -> Choice:
    """Put the adapters' terms beside the model's linears; which of them counts is what the choice says from then on.

    ValueError for a module that the model has not as a linear of its own in that shape: transformers keeps the experts
    of a mixture as one tensor, and torch's own attention calls no linear.
    """
    spelled = TRANSFORMERS.get(architecture, SAME).linear
    places = {
        spelled(path): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    terms: dict[nn.Module, dict[str, Term]] = {}
    for adapter in adapters:
        scale = factors(adapter)
        with safe_open(adapter.folder / TENSORS, "pt") as file:
            sides = {key.removeprefix(PREFIX): key for key in file.keys()}  # noqa: SIM118 (no mapping)
            for name, shape in adapter.modules.items():
                module = places.get(spelled(name))
                if module is None or shape != _shape(module):
                    raise ValueError(f"adapter {adapter.name} changes {name}, which is no such linear in this engine")
                a, b = (file.get_tensor(sides[name + part]) for part in _parts(module))
                terms.setdefault(module, {})[adapter.name] = _term(model, module, a, b, scale[name])
    choice = Choice()
    for module, of in terms.items():
        module.register_forward_hook(partial(_added, of, choice))
    return choice


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.in_features, module.out_features  # pyright: ignore


def _parts(module: nn.Module) -> tuple[str, ...]:
    return EMBEDDED if isinstance(module, nn.Embedding) else (".lora_A.weight", ".lora_B.weight")


def _term(model: Any, module: Any, a: Tensor, b: Tensor, factor: float) -> Term:
    """Where the module's weight is, in the type that the model computes in: NF4's own is none."""
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    a = a.T.contiguous() if isinstance(module, nn.Embedding) else a
    return Term(a.to(weight.device, dtype), (factor * b.float()).to(weight.device, dtype))


def _added(terms: Mapping[str, Term], choice: Choice, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
    """A hook behind the module's forward: None leaves what it put out."""
    term = terms.get(choice.name)
    if term is None:
        return None
    if isinstance(module, nn.Embedding):
        low = nn.functional.embedding(args[0].to(term.a.device), term.a)
    else:
        low = nn.functional.linear(args[0].to(term.a), term.a)
    return out + nn.functional.linear(low, term.b).to(out)

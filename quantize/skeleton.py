"""The skeleton: a model whose parameters live on the meta device until a part of it is wanted.

Built from a checkpoint folder's config; parts are loaded from a Source and released again. Knows no method and no
file layout. transformers renames checkpoint tensors as it loads them; `names` is that mapping, taken from transformers
itself, so that what is written keeps the checkpoint's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.plain import object_of, read_json
from ..recipes.sizes import check_sizes
from ..recipes.template import check_templates
from .classes import COPY, check_class, open_model
from .detect import detect
from .experts import unfused
from .family import Family
from .names import checkpoint_names
from .pictures import pack_pictures
from .source import Source, open_source
from .spelling import check_layers, skips

READERS = ThreadPoolExecutor(4)
READ_AHEAD = 2**29  # bytes of the next layer that may wait on the host


@dataclass(frozen=True)
class Skeleton:
    """A model being walked. `names` maps module parameter names to checkpoint names. Compute runs in `dtype` on
    `device`; weights are first rounded to `stored`, the checkpoint's own dtype, as an engine holds them."""

    module: Any  # a transformers PreTrainedModel
    processor: Any
    source: Source
    family: Family
    names: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    notes: tuple[str, ...] = ()  # what a user should know of how this model is taken
    coming: dict[str, Future[Tensor]] = field(default_factory=dict, repr=False)  # what is read ahead

    @property
    def layers(self) -> nn.ModuleList:
        return self.module.get_submodule(self.family.layers)

    @property
    def sees(self) -> bool:
        """Whether the model has parts for pictures (or sound) beside its text model."""
        return bool(vision(self))

    @property
    def words(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def layer_prefix(self, index: int) -> str:
        return f"{self.family.layers}.{index}."

    def layer_names(self, index: int) -> dict[str, str]:
        """Parameter names inside decoder layer `index` -> checkpoint names."""
        prefix = self.layer_prefix(index)
        return {n.removeprefix(prefix): c for n, c in self.names.items() if n.startswith(prefix)}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. OSError when missing, ValueError when it cannot be a model's."""
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{path}: missing; {folder} is not a model checkpoint")
    config = object_of(read_json(path), where=str(path))
    check_sizes(config, where=str(path))
    return config


def build(folder: Path, *, source: Source | None = None, device: str = "cpu", trust: bool = False) -> Skeleton:
    """The skeleton of the checkpoint in `folder`, no weights loaded. `source` overrides where tensors come from; with
    `trust` the checkpoint's own Python runs where transformers has no class for it.

    On a CPU compute runs in float32, elsewhere in the checkpoint's dtype. ValueError names what is missing where the
    model cannot be opened, its layers not be found, or its tensors do not fit.
    """
    config = read_config(folder)
    check_class(config, trust=trust)
    check_templates(folder)
    source = source or open_source(folder)
    import transformers

    dtypes = [m.dtype for n, m in source.metas.items() if m.dtype is not None and len(m.shape) == 2]
    stored = max(set(dtypes), key=dtypes.count) if dtypes else torch.bfloat16
    if stored not in (torch.float16, torch.bfloat16):
        stored = torch.bfloat16  # a float32 checkpoint is served in bf16
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float32 if place.type == "cpu" else stored
    try:
        opened = open_model(folder, config, dtype=dtype, trust=trust)
    except (ValueError, OSError):
        raise
    except Exception as e:  # transformers takes the values in a config as they are
        why = " ".join(str(e).split())[:300]
        raise ValueError(f"{folder}: its config.json makes no model: {type(e).__name__}: {why}") from e
    module = opened.module
    module.eval().requires_grad_(False)
    generation = folder / "generation_config.json"
    if generation.is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    source, renamings = unfused(module, source)
    names, source = checkpoint_names(module, source, (*opened.rules, *renamings))
    family, notes = detect(module)
    pack_pictures(module, place, dtype)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(place)
    skeleton = Skeleton(module, opened.processor, source, family, names, place, dtype, stored)
    check_layers(skeleton)
    told = (*opened.notes, *notes, *template_notes(folder, skeleton))
    return replace(skeleton, family=replace(family, skip=skips(skeleton)), notes=told)


def template_notes(folder: Path, skeleton: Skeleton) -> list[str]:
    """What a user should know of how samples are put to the model. ValueError where pictures cannot be put to it."""
    processor, words = skeleton.processor, skeleton.words
    notes = [] if skeleton.sees else ["a text model: calibrated on the samples' words alone"]
    if skeleton.sees and processor is words:
        raise ValueError(f"{folder}: no processor for pictures (preprocessor_config.json is missing); {COPY}")
    if not getattr(processor, "chat_template", None):
        if skeleton.sees and not (getattr(words, "chat_template", None) and hasattr(processor, "image_token")):
            raise ValueError(f"{folder}: no chat template (chat_template.jinja is missing); {COPY}")
        if not getattr(words, "chat_template", None):
            notes.append("no chat template: samples are put as 'User: ...' and 'Assistant: ...'")
    return notes


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put `value` where parameter `name` of `module` is; None puts it back on the meta device. A buffer (what corrects
    a router, say) takes its value in its own dtype, and stays: it is small."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    buffer = owner._buffers.get(leaf)
    if buffer is not None:
        owner._buffers[leaf] = buffer if value is None else value.to(buffer.dtype)
        return
    old = owner._parameters[leaf]
    assert old is not None
    if value is None:
        value = torch.empty(old.shape, dtype=old.dtype, device="meta")
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def load(skeleton: Skeleton, wanted: Iterable[str]) -> None:
    """Load the named parameters (module names) from the source onto the device, in the compute dtype."""
    names = [name for name in wanted if name in skeleton.names]
    parameters = dict(skeleton.module.named_parameters())
    if skeleton.device.type == "cpu":
        tensors = map(skeleton.source.get, map(skeleton.names.__getitem__, names))
    else:  # several at a time: what costs time is to map the files' pages
        tensors = READERS.map(lambda name: _on_device(skeleton, name), names)
    for name, tensor in zip(names, tensors, strict=True):
        exact = name not in parameters
        set_parameter(skeleton.module, name, tensor if exact else tensor.to(skeleton.stored).to(skeleton.dtype))


def _on_device(skeleton: Skeleton, name: str) -> Tensor:
    early = skeleton.coming.pop(name, None)
    host = skeleton.source.get(skeleton.names[name]) if early is None else early.result()
    return host.to(skeleton.device)


def read_ahead(skeleton: Skeleton, index: int) -> None:
    """Begin to read decoder layer `index`, or as much of it as READ_AHEAD bytes hold, into pinned host memory, so that
    `load_layer` only has to copy it to the GPU. Nothing on a CPU, or past the last layer."""
    if skeleton.device.type == "cpu" or index >= len(skeleton.layers):
        return
    left = READ_AHEAD
    for inside, stored in skeleton.layer_names(index).items():
        left -= skeleton.source.meta(stored).nbytes
        if left < 0:
            return
        name = skeleton.layer_prefix(index) + inside
        skeleton.coming[name] = READERS.submit(_pinned, skeleton.source, stored)


def _pinned(source: Source, stored: str) -> Tensor:
    tensor = source.get(stored)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def release(skeleton: Skeleton, wanted: Iterable[str]) -> None:
    """Send the named parameters back to the meta device."""
    for name in wanted:
        if name in skeleton.names:
            set_parameter(skeleton.module, name, None)


def load_layer(skeleton: Skeleton, index: int) -> None:
    """Load decoder layer `index`."""
    load(skeleton, [skeleton.layer_prefix(index) + n for n in skeleton.layer_names(index)])


def release_layer(skeleton: Skeleton, index: int) -> None:
    """Release decoder layer `index`."""
    release(skeleton, [skeleton.layer_prefix(index) + n for n in skeleton.layer_names(index)])


def outside(skeleton: Skeleton) -> list[str]:
    """The parameters that belong to no decoder layer: vision tower, projector, embeddings, final norm, head."""
    return [n for n in skeleton.names if not n.startswith(skeleton.family.layers + ".")]


def load_outside(skeleton: Skeleton) -> None:
    """Load everything that belongs to no decoder layer, and tie what is tied."""
    load(skeleton, outside(skeleton))
    skeleton.module.tie_weights()


def embeddings(skeleton: Skeleton) -> list[str]:
    """What runs before the first decoder layer: vision tower, projector and token embeddings."""
    own, head = names_of(skeleton, skeleton.module.get_input_embeddings()), _head(skeleton)
    return [n for n in outside(skeleton) if n in own or n not in head]


def _head(skeleton: Skeleton) -> set[str]:
    """The parameters of the output head, which may be the embeddings' too."""
    return names_of(skeleton, skeleton.module.get_output_embeddings())


def names_of(skeleton: Skeleton, part: nn.Module | None) -> set[str]:
    """All names of the parameters that `part` of the model has."""
    own = set() if part is None else {id(p) for p in part.parameters()}
    return {n for n, p in skeleton.module.named_parameters(remove_duplicate=False) if id(p) in own}


def vision(skeleton: Skeleton) -> list[str]:
    """The parameters that are needed only before the first decoder layer and only for pictures (or sound)."""
    text, head = skeleton.family.layers.rpartition(".")[0], _head(skeleton)
    towers = [  # parts with linears of their own that stand beside the layers
        f"{text}.{name}."
        for name, child in skeleton.module.get_submodule(text).named_children()
        if child is not skeleton.layers and any(isinstance(m, nn.Linear) and m is not child for m in child.modules())
    ]
    beside = [n for n in outside(skeleton) if not n.startswith(f"{text}.") or n.startswith(tuple(towers))]
    return [n for n in beside if n not in head]

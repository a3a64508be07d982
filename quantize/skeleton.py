"""The skeleton: a model whose parameters live on the meta device until a part of it is wanted.

Built from a checkpoint folder's config; parts are loaded from a Source and released again. Knows no method and no
file layout. transformers renames checkpoint tensors as it loads them; `names` is that mapping, taken from transformers
itself, so that what is written keeps the checkpoint's own names.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, family_of
from .source import Source, open_source

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
    coming: dict[str, Future[Tensor]] = field(default_factory=dict, repr=False)  # what is read ahead

    @property
    def layers(self) -> nn.ModuleList:
        return self.module.get_submodule(self.family.layers)

    def layer_prefix(self, index: int) -> str:
        return f"{self.family.layers}.{index}."

    def layer_names(self, index: int) -> dict[str, str]:
        """Parameter names inside decoder layer `index` -> checkpoint names."""
        prefix = self.layer_prefix(index)
        return {n.removeprefix(prefix): c for n, c in self.names.items() if n.startswith(prefix)}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. OSError when missing, ValueError when it is not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{path}: missing; {folder} is not a model checkpoint") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not valid JSON (line {e.lineno}: {e.msg})") from None


def open_processor(folder: Path) -> Any:
    """The model's own processor. ValueError when there is none, or when it has no chat template."""
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises whatever its parts raise
        raise ValueError(f"{folder}: its processor does not load: {str(e).splitlines()[0]}") from None
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{folder}: no chat template (chat_template.jinja is missing)")
    return processor


def checkpoint_names(module: Any, source: Source) -> dict[str, str]:
    """Module parameter name -> checkpoint tensor name, by transformers' own renaming rules.

    ValueError names the parameters that no tensor fills, or a tensor that transformers would fuse with others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules: list[Any] = get_model_conversion_mapping(module)
    renamings = [r for r in rules if not isinstance(r, WeightConverter)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    wanted = dict(module.named_parameters())
    meta = module.state_dict()
    options: dict[str, Any] = {"base_model_prefix": module.base_model_prefix, "meta_state_dict": meta}
    # 5.17 has these two as positional names, later releases by keyword; both take them by keyword
    options = {k: v for k, v in options.items() if k in inspect.signature(rename_source_key).parameters}
    found: dict[str, str] = {}
    for name in source.metas:
        target, converted = rename_source_key(name, renamings, converters, **options)
        if converted is not None:
            raise ValueError(f"tensor {name}: its layout is converted at load ({target}), which mmq cannot stream yet")
        if target in meta:
            found[target] = name
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    missing = [n for n in wanted if n not in found and n not in tied]
    if missing:
        raise ValueError(f"{source.folder}: no tensor for {missing[0]} (and {len(missing) - 1} more parameters)")
    return found


def build(folder: Path, *, source: Source | None = None, device: str = "cpu") -> Skeleton:
    """The skeleton of the checkpoint in `folder`, no weights loaded. `source` overrides where tensors come from.

    On a CPU compute runs in float32, elsewhere in the checkpoint's dtype. ValueError for an unknown family.
    """
    config = read_config(folder)
    family = family_of(str(config.get("model_type")))
    source = source or open_source(folder)
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    transformers.utils.logging.set_verbosity_error()
    hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(hf_config, "quantization_config"):
        delattr(hf_config, "quantization_config")
    dtypes = [m.dtype for n, m in source.metas.items() if m.dtype is not None and len(m.shape) == 2]
    stored = max(set(dtypes), key=dtypes.count) if dtypes else torch.bfloat16
    if stored not in (torch.float16, torch.bfloat16):
        stored = torch.bfloat16  # a float32 checkpoint is served in bf16
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float32 if place.type == "cpu" else stored
    with init_empty_weights(include_buffers=False):
        module = AutoModelForImageTextToText.from_config(hf_config, dtype=dtype)
    module.eval().requires_grad_(False)
    generation = folder / "generation_config.json"
    if generation.is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(place)
    names = checkpoint_names(module, source)
    return Skeleton(module, open_processor(folder), source, family, names, place, dtype, stored)


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put `value` where parameter `name` of `module` is; None puts it back on the meta device."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = owner._parameters[leaf]
    assert old is not None
    if value is None:
        value = torch.empty(old.shape, dtype=old.dtype, device="meta")
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def load(skeleton: Skeleton, wanted: Iterable[str]) -> None:
    """Load the named parameters (module names) from the source onto the device, in the compute dtype."""
    names = [name for name in wanted if name in skeleton.names]
    if skeleton.device.type == "cpu":
        tensors = map(skeleton.source.get, map(skeleton.names.__getitem__, names))
    else:  # several at a time: what costs time is to map the files' pages
        tensors = READERS.map(lambda name: _on_device(skeleton, name), names)
    for name, tensor in zip(names, tensors, strict=True):
        set_parameter(skeleton.module, name, tensor.to(skeleton.stored).to(skeleton.dtype))


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
        left -= skeleton.source.metas[stored].nbytes
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
    head = skeleton.module.get_output_embeddings()
    after = {id(p) for p in head.parameters()} if head is not None else set()
    own = {id(p) for p in skeleton.module.get_input_embeddings().parameters()}
    named = dict(skeleton.module.named_parameters())
    return [n for n in outside(skeleton) if id(named[n]) in own or id(named[n]) not in after]


def vision(skeleton: Skeleton) -> list[str]:
    """The parameters that are needed only before the first decoder layer and only for pictures."""
    text = skeleton.family.layers.rpartition(".")[0] + "."
    return [n for n in outside(skeleton) if not n.startswith(text) and not n.startswith("lm_head.")]

"""What an engine sees of a checkpoint before it loads one tensor: config.json, safetensors headers, file names.

Reads packed linears in the four int4 layouts by their tensors' names and shapes. Knows no engine's rules, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..recipes.folder import check_beside, headers, read_config, shard_names
from ..recipes.plain import check_entries, object_of, read_json
from ..recipes.sizes import check_quantization
from .defaults import whole

FLOATS = ("F16", "BF16", "F32", "F64")
# two-dimensional weights that no engine treats as a linear: lookups, and the head, which has rules of its own
LOOKUPS = re.compile(r"(embed_(tokens(_per_layer)?|positions)|wte|wpe|embeddings?|embeddings?_table|pos_embed)$")
HEADS = re.compile(r"(^|\.)(lm_head|output|embed_out)$")
MAPPED = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
PICTURED = ("vision_config", "visual", "vision_tower", "mm_vision_tower", "img_processor")  # keys of models that see
NF4 = "quant_state.bitsandbytes__nf4"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config, with what it leaves out; the whole where the keys stand at the top (older
    checkpoints)."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            return whole(config[key])
    return whole(config)


def dtype_of(config: Mapping[str, Any]) -> str:
    """What a config says that 16-bit weights are, "" where it says nothing."""
    parts = (config, text_config(config))
    return str(next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), ""))


def takes_pictures(config: Mapping[str, Any]) -> bool:
    """Whether the model of this config takes pictures."""
    return any(key in config for key in PICTURED)


@dataclass(frozen=True)
class Tensor:
    """One tensor by its header: the dtype as safetensors spells it, the shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """One linear of the checkpoint, by the checkpoint's own name. `group` is 0 where it is not packed or packed in no
    groups; `asymmetric` says that zero points are stored; `inputs` and `outputs` are 0 where headers do not tell."""

    name: str
    inputs: int
    outputs: int
    packed: bool
    group: int = 0
    asymmetric: bool = False


@dataclass(frozen=True)
class Subject:
    """A checkpoint folder, as far as config and headers tell. `linears` has the decoder's, the encoders' and the
    projectors' alike, without lookups and the output head; `head` is the head's, where one is stored."""

    folder: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears: Mapping[str, Linear]
    head: Linear | None
    files: frozenset[str]

    @property
    def architecture(self) -> str:
        """The model class that config.json names, "" where it names none."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def method(self) -> str:
        """`quant_method`, "" for 16 bit. bitsandbytes' older configs name none."""
        declared = self.quantization.get("quant_method")
        return str(declared or ("bitsandbytes" if self.quantization.get("load_in_4bit") else "")).lower()

    @property
    def text(self) -> Mapping[str, Any]:
        """The language model's part of the config."""
        return text_config(self.config)

    @property
    def dtype(self) -> str:
        """As `dtype_of`."""
        return dtype_of(self.config)

    @property
    def vision(self) -> bool:
        """As `takes_pictures`."""
        return takes_pictures(self.config)

    @property
    def remote_files(self) -> frozenset[str]:
        """The .py files that an `auto_map` names in this folder, of config, processors or tokenizer; what it names on a
        hub is not among them."""
        maps = [self.config.get("auto_map")]
        for name in sorted(self.files & set(MAPPED)):
            maps.append(object_of(read_json(self.folder / name), where=str(self.folder / name)).get("auto_map"))
        named = [n for m in maps if isinstance(m, dict) for n in m.values()]
        flat = [n for item in named for n in (item if isinstance(item, list) else [item]) if n and isinstance(n, str)]
        return frozenset(f"{n.split('.')[0]}.py" for n in flat if "--" not in n)

    @cached_property
    def packed(self) -> tuple[Linear, ...]:
        """The linears that are packed, the head among them."""
        head = (self.head,) if self.head is not None else ()
        return tuple(linear for linear in (*self.linears.values(), *head) if linear.packed)


def read_subject(folder: Path) -> Subject:
    """Read the folder's config and the headers of its safetensors files. OSError or ValueError as they are broken."""
    check_entries(folder)
    config = read_config(folder)
    check_beside(folder)
    tensors: dict[str, Tensor] = {}
    for shard in shard_names(folder):
        for name, item in headers(folder / shard).items():
            if name != "__metadata__":
                tensors[name] = Tensor(item["dtype"], tuple(item["shape"]))
    quantization = quantization_of(folder, config)
    linears = _linears(tensors, _checkpoint_layout(quantization))
    heads = [name for name in linears if HEADS.search(name) and linears[name].outputs != linears[name].inputs]
    head = min(heads, key=len, default=None)
    found = None if head is None else linears.pop(head)
    files = frozenset(p.name for p in folder.iterdir() if p.is_file())
    return Subject(folder, config, quantization, tensors, linears, found, files)


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config`, where config.json or its text part has it, else in the file that older packages wrote;
    empty where nothing is packed. OSError and ValueError as that file gives it."""
    declared = config.get("quantization_config") or text_config(config).get("quantization_config")
    if declared:
        return declared
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).is_file():
            beside = object_of(read_json(folder / name), where=str(folder / name))
            check_quantization(beside, where=str(folder / name))
            return {"quant_method": method, **beside}
    return {}


def _checkpoint_layout(quantization: Mapping[str, Any]) -> str:
    """Whether qweight is packed along the outputs (awq) or the inputs (gptq)."""
    method = str(quantization.get("quant_method", "")).lower()
    return "awq" if method == "awq" or "awq" in str(quantization.get("packing_format")) else "gptq"


def _linears(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Linear]:
    found: dict[str, Linear] = {}
    for name, tensor in tensors.items():
        head, _, leaf = name.rpartition(".")
        if leaf == "qweight" and len(tensor.shape) == 2:
            rows, columns = tensor.shape
            inputs, outputs = (rows, columns * 8) if layout == "awq" else (rows * 8, columns)
            scales = tensors.get(f"{head}.scales")
            group = inputs // scales.shape[0] if scales and scales.shape[0] else 0
            found[head] = Linear(head, inputs, outputs, True, group, f"{head}.qzeros" in tensors)
        elif leaf == "weight_packed" and len(tensor.shape) == 2:
            inputs, outputs = tensor.shape[1] * 8, tensor.shape[0]
            scales = tensors.get(f"{head}.weight_scale")
            group = inputs // scales.shape[1] if scales and scales.shape[1] > 1 else 0
            found[head] = Linear(head, inputs, outputs, True, group, f"{head}.weight_zero_point" in tensors)
        elif name.endswith(f".weight.{NF4}"):
            linear = name.removesuffix(f".weight.{NF4}")
            found[linear] = Linear(linear, 0, 0, True)
        elif leaf == "weight" and len(tensor.shape) == 2 and tensor.dtype in FLOATS and not LOOKUPS.search(head):
            found[head] = Linear(head, tensor.shape[1], tensor.shape[0], False)
    return found

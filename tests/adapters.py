"""LoRA adapters as PEFT writes them, made by hand: random, B not zero, so that they change what the model says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmq.export.subject import read_subject
from mmq.export.view import view

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    base: Path,
    targets: Iterable[str],
    *,
    rank: int,
    alpha: int = 16,
    seed: int = 0,
    strength: float = 0.2,
    prefix: str = "base_model.model.model.language_model.",
    stored: str = "model.",
    **config: Any,
) -> Path:
    """An adapter of the decoder's linears called `targets`, by the names of transformers 5; `stored`: how the
    checkpoint's begin before `layers`. `strength`: how large the change is beside a weight of unit rows."""
    random = torch.Generator().manual_seed(seed)
    targets = tuple(targets)
    tensors: dict[str, Tensor] = {}
    for name, linear in read_subject(base).linears.items():
        if not name.startswith(f"{stored}layers.") or name.rpartition(".")[2] not in targets:
            continue
        module = prefix + name.removeprefix(stored)
        scale = strength * rank / alpha / math.sqrt(rank * linear.inputs)
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, linear.inputs, generator=random)
        tensors[f"{module}.lora_B.weight"] = torch.randn(linear.outputs, rank, generator=random) * scale
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half().contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def merge(base: Path, adapter: Path, out: Path) -> Path:
    """`base` (a checkpoint or an artifact, dequantized) with the adapter added to its weights, float32."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "mmq.json"))
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    source = view(base)
    tensors = {n: source.get(n).float() for n in source.metas}
    for name, change in changes(adapter).items():
        tensors[f"{name}.weight"] += change
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def changes(adapter: Path) -> Mapping[str, Tensor]:
    """What the adapter adds to each linear, float32 [outputs, inputs], by the checkpoint's names: alpha / r B A."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {n: t.float() for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    found = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            plain = module.removeprefix("base_model.model.").replace("model.language_model.", "model.")
            factor = config["lora_alpha"] / config["r"]
            found[plain] = factor * tensors[f"{module}.lora_B.weight"] @ tensors[name]
    return found

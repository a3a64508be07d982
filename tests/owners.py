"""Run as a program in an owner's own environment: what that package makes of a folder that mmq packed.

    python owners.py OWNER FOLDER INPUTS.safetensors OUT.safetensors

OWNER loads FOLDER by its own whole-model loader, on a CPU. INPUTS holds a processor's tensors, named `<sample>.<key>`.
OUT gets `logits.<sample>`, and `weight.<linear>` for each packed linear: float16 [in, out], what its forward makes of
the identity matrix.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import inspect
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # for peers/, behind all installed packages

import torch
from peers.job import mend_torchvision
from peers.older import readable
from safetensors.torch import load_file, save_file


def autoawq(folder: Path) -> Any:
    from awq import AutoAWQForCausalLM
    from awq.models import base
    from awq.modules.linear import gemm

    gemm.TRITON_AVAILABLE = False  # its kernels need a GPU; behind them stands its own plain torch path
    base.get_best_device = lambda: "cuda:0"  # for "cpu" it takes a layer of Intel's that is no longer to be had
    return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cpu"}).model


def auto_gptq(folder: Path) -> Any:
    import json

    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from transformers import AutoModelForVision2Seq

    class QwenVL(_base.BaseGPTQForCausalLM):  # it knows no vision-language model
        layer_type = "Qwen2VLDecoderLayer"
        layers_block_name = "model.layers"
        outside_layer_modules: ClassVar = ["model.embed_tokens", "model.norm", "visual"]
        inside_layer_modules: ClassVar = [
            ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj"],
            ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"],
        ]

    _base.SUPPORTED_MODELS.append("qwen2_vl")
    _base.AutoModelForCausalLM = AutoModelForVision2Seq
    # from a folder it reads quantize_config.json alone, so what config.json says is handed to it
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = BaseQuantizeConfig(**{k: said[k] for k in ("bits", "group_size", "desc_act", "sym")})
    model = QwenVL.from_quantized(str(folder), device="cpu", quantize_config=config).model
    # where the head is tied to the embeddings and so not stored, its loader leaves both as they were before (its own
    # files store both): that is no matter of the packed format
    (embeddings,) = (
        tensors["model.embed_tokens.weight"]
        for tensors in map(load_file, folder.glob("*.safetensors"))
        if "model.embed_tokens.weight" in tensors
    )
    model.get_input_embeddings().weight.data.copy_(embeddings)
    return model


def gptqmodel(folder: Path) -> Any:
    mend_torchvision()
    from gptqmodel import BACKEND, GPTQModel

    with tempfile.TemporaryDirectory() as scratch:
        renamed(folder, Path(scratch))
        return GPTQModel.load(scratch, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def renamed(folder: Path, out: Path) -> None:
    """A copy under the names of transformers 5's own modules: GPTQModel looks for no others, old as they may be."""
    tensors = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.is_file() and not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    places = {"model": "model.language_model", "visual": "model.visual"}
    tensors = {".".join([places[n.partition(".")[0]], n.partition(".")[2]]): t for n, t in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


OWNERS = {"autoawq": autoawq, "auto-gptq": auto_gptq, "gptqmodel": gptqmodel}


@torch.no_grad()
def main(owner: str, folder: Path, inputs: Path, out: Path) -> None:
    samples: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in load_file(inputs).items():
        number, _, key = name.partition(".")
        samples[number][key] = tensor
    with tempfile.TemporaryDirectory() as scratch:
        model = OWNERS[owner](folder if owner == "gptqmodel" else readable(folder, Path(scratch))).eval()
    known = inspect.signature(model.forward).parameters  # transformers 4 takes fewer
    samples = {i: {k: v for k, v in sample.items() if k in known} for i, sample in samples.items()}
    found = {f"logits.{i}": model(**sample).logits[0].float() for i, sample in samples.items()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            module.bias = None
            width = getattr(module, "in_features", None) or module.infeatures
            found[f"weight.{name}"] = module(torch.eye(width, dtype=torch.float16)).contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))

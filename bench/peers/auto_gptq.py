"""AutoGPTQ 0.7.1 on the job's pictures and text, with its own defaults: true sequential, 1% damping, float16.

It knows no vision-language model and takes token ids alone. Here it is told where Qwen2-VL keeps its layers, and each
sample goes through the whole model as the processor made it; the loop, GPTQ and the packing are AutoGPTQ's own. Of its
defaults one is joined by another: activation order keeps its groups in place (static_groups), since a checkpoint whose
columns are shuffled across groups loads in no engine. Its loop takes a GPU for granted; on a CPU that is put right.
Runs in AutoGPTQ's environment (requirements/backends/auto-gptq.txt): python auto_gptq.py JOB.json
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]  # packages before the scripts of their names

from peers.job import Job, Times, Watch, inputs, main  # noqa: E402
from peers.older import readable  # noqa: E402


def run(job: Job) -> Times:
    if job.method != "gptq":
        raise ValueError(f"method {job.method!r}: auto-gptq knows gptq alone")
    if not job.symmetric:
        raise ValueError(
            "auto-gptq stores zero points minus one in unsigned words: a zero point of 0 overwrites its neighbours, "
            "so its asymmetric checkpoints are damaged; ask for symmetric"
        )
    import torch
    from auto_gptq import BaseQuantizeConfig
    from transformers import AutoModelForVision2Seq, AutoProcessor

    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        folder = readable(job.model, Path(scratch))
        bare = AutoModelForVision2Seq.from_pretrained(folder, torch_dtype=torch.float16).eval()
        processor = AutoProcessor.from_pretrained(folder)
        load = watch.read()
    samples = inputs(processor, job)
    bare.model.rotary_emb.to(job.device)  # it has no parameter that AutoGPTQ could tell the device by
    if job.device == "cpu":
        _without_gpu()
    config = BaseQuantizeConfig(bits=4, group_size=job.group_size, sym=True, static_groups=True)
    model = qwen_vl()(bare, False, config)
    watch.read()
    model.quantize(samples, cache_examples_on_gpu=job.device != "cpu")
    seconds = watch.read()
    model.save_quantized(str(job.out))
    return Times(load, seconds, watch.read(), len(bare.model.layers))


def qwen_vl() -> type:
    """Where Qwen2-VL and Qwen2.5-VL (transformers 4.51) keep what is quantized and what stands around it."""
    from auto_gptq.modeling._base import BaseGPTQForCausalLM

    class QwenVL(BaseGPTQForCausalLM):
        layers_block_name = "model.layers"
        outside_layer_modules = ("model.embed_tokens", "model.norm", "visual")
        inside_layer_modules = (
            ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
            ["self_attn.o_proj"],
            ["mlp.up_proj", "mlp.gate_proj"],
            ["mlp.down_proj"],
        )

        def _prepare_examples_for_quantization(self, examples: list[Any], batch_size: int = 1) -> list[Any]:
            """The processor's tensors as they are, pixels included; one sample a batch."""
            return [dict(example) for example in examples]

    return QwenVL


def _without_gpu() -> None:
    """Where AutoGPTQ says cuda:0 and waits for the GPU, say cpu and wait for nothing."""
    import torch
    from auto_gptq.modeling import _base

    _base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None


def version() -> str:
    from importlib.metadata import version

    return version("auto-gptq")


if __name__ == "__main__":
    main("auto-gptq", version, run)

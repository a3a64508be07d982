"""llm-compressor's AWQ (W4A16_ASYM) and GPTQ (W4A16) through `oneshot`, on the job's pictures and text, with its own
defaults: duo scaling and 20 ratios; dampening 0.01 and static activation order.

Runs in llm-compressor's environment (requirements/backends/llmcompressor.txt): python llmcompressor.py JOB.json
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]  # packages before the scripts of their names

from peers.job import Job, Times, Watch, inputs, main, mend_torchvision  # noqa: E402


def run(job: Job) -> Times:
    if job.method not in ("awq", "gptq"):
        raise ValueError(f"method {job.method!r}: this script knows awq and gptq")
    mend_torchvision()
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if job.device == "cpu":  # AWQ pins memory for a copy to the GPU, which torch refuses where there is none
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    watch = Watch()
    model = AutoModelForImageTextToText.from_pretrained(job.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(job.model)
    load = watch.read()
    layers: Any = model.get_decoder().layers
    samples = alike(inputs(processor, job))
    watch.read()
    oneshot(
        model=model,
        processor=processor,
        dataset=batches(samples, model.dtype),
        num_calibration_samples=len(samples),
        recipe=recipe(job, left_alone(model, layers)),
        sequential_targets=[type(layers[0]).__name__],
    )
    seconds = watch.read()
    model.save_pretrained(job.out, save_compressed=True)
    processor.save_pretrained(job.out)
    return Times(load, seconds, watch.read(), len(layers))


def recipe(job: Job, ignore: list[str]) -> list[Any]:
    """The modifiers: the preset schemes W4A16 and W4A16_ASYM, with the job's group size."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group_size,
    }
    groups: dict[str, Any] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if job.method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=ignore)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]


def left_alone(model: Any, layers: Any) -> list[str]:
    """The full names of all linears outside the decoder layers: vision tower, projector, head."""
    from torch.nn import Linear

    inside = {id(m) for layer in layers for m in layer.modules()}
    return [n for n, m in model.named_modules() if isinstance(m, Linear) and id(m) not in inside]


def alike(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every sample with the same keys, one with pictures first: llm-compressor traces the model on the first sample,
    and what is None there stays None in its graph."""
    keys = dict.fromkeys(key for sample in samples for key in sample)
    whole = [{key: sample.get(key) for key in keys} for sample in samples]
    return sorted(whole, key=lambda sample: sum(value is None for value in sample.values()))


def batches(samples: list[dict[str, Any]], dtype: Any) -> Any:
    """A loader of batches of one, pixels in the model's dtype."""
    from torch.utils.data import DataLoader

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        (sample,) = batch
        floating = {k for k, v in sample.items() if v is not None and v.is_floating_point()}
        return {k: v.to(dtype) if k in floating else v for k, v in sample.items()}

    return DataLoader(samples, batch_size=1, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def version() -> str:
    from importlib.metadata import version

    return version("llmcompressor")


if __name__ == "__main__":
    main("llmcompressor", version, run)

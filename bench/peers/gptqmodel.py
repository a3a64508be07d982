"""GPTQModel's GPTQ (v1 packing) and AWQ (GEMM packing) on the job's pictures and text, with its own defaults: dampening
0.05, group-aware activation order, fallbacks.

Its own reader of conversations opens an empty assistant's turn at the end of each; here the samples come encoded as
every other peer gets them. Runs in GPTQModel's environment (requirements/backends/gptqmodel.txt): python gptqmodel.py
JOB.json
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]  # packages before the scripts of their names

from peers.job import Job, Times, Watch, inputs, main, mend_torchvision  # noqa: E402


def run(job: Job) -> Times:
    if job.method not in ("awq", "gptq"):
        raise ValueError(f"method {job.method!r}: this script knows awq and gptq")
    # its pool of threads has half the cores and lends two: with fewer than three cores it refuses itself
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    mend_torchvision()
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoProcessor

    watch = Watch()
    config = QuantizeConfig(bits=4, group_size=job.group_size, sym=job.symmetric, method=job.method)
    model = GPTQModel.load(str(job.model), config, device=job.device)
    processor = AutoProcessor.from_pretrained(job.model)
    load = watch.read()
    samples = inputs(processor, job)
    model.prepare_dataset = types.MethodType(lambda self, calibration_dataset, **_: calibration_dataset, model)
    watch.read()
    model.quantize(samples, batch_size=1)
    seconds = watch.read()
    model.save(str(job.out))
    processor.save_pretrained(job.out)
    return Times(load, seconds, watch.read(), model.model.config.get_text_config().num_hidden_layers)


def version() -> str:
    from importlib.metadata import version

    return version("gptqmodel")


if __name__ == "__main__":
    main("gptqmodel", version, run)

"""Intel's AutoRound on the job's pictures and text, with its own defaults: 200 steps of signed descent for each layer.

Its calibration for vision-language models takes batches that a processor made, so it gets the samples as they are. It
counts batches of eight; samples of different lengths make none, so eight gradients of one sample each are summed
instead, as AutoRound itself does where it cannot batch. Symmetric weights are written in AutoGPTQ's format, asymmetric
ones in AutoAWQ's: the two that engines read. Runs in AutoRound's environment (requirements/backends/auto-round.txt):
python auto_round.py JOB.json
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]  # packages before the scripts of their names

from peers.job import Job, Times, Watch, inputs, main, mend_torchvision  # noqa: E402

BATCH = 8  # AutoRound's own batch size


def run(job: Job) -> Times:
    if job.method != "autoround":
        raise ValueError(f"method {job.method!r}: auto-round knows autoround alone")
    mend_torchvision()
    from auto_round import AutoRound
    from transformers import AutoProcessor

    watch = Watch()
    samples = inputs(AutoProcessor.from_pretrained(job.model), job)
    watch.read()
    rounder = AutoRound(
        str(job.model),
        scheme="W4A16",
        group_size=job.group_size,
        sym=job.symmetric,
        dataset=samples,
        nsamples=len(samples),
        batch_size=1,
        gradient_accumulate_steps=BATCH,
        device_map=job.device,
        seed=job.seed,
    )
    load = watch.read()
    # it packs and writes each layer as it is done, into a folder of a name of its own making
    model, folders = rounder.quantize_and_save(str(job.out), format="auto_gptq" if job.symmetric else "auto_awq")
    seconds = watch.read()
    made = Path(folders if isinstance(folders, str) else folders[0])
    if made != job.out:
        for file in made.iterdir():
            file.rename(job.out / file.name)
        made.rmdir()
    return Times(load, seconds, watch.read(), model.config.get_text_config().num_hidden_layers)


def version() -> str:
    from importlib.metadata import version

    return version("auto-round")


if __name__ == "__main__":
    main("auto-round", version, run)

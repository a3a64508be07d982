"""Load what is to be published from a clean copy, under a real engine, and ask it something.

A file that an engine wants and the artifact does not list, or a folder that only works where it was made, is found
here and not by whoever downloads it. Knows no hub.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.artifact import Artifact, check_disk
from ..export.remote import Item
from ..recipes.progress import Tell, silent
from ..recipes.samples import as_openai, blind
from ..recipes.sets import held_out_samples
from ..serve.client import connect, plain_errors
from ..serve.engines import plan
from ..serve.machine import this_machine
from ..serve.running import free_port, running
from ..serve.shape import read_config, read_shape

ENGINES = {"vllm": "vLLM", "pytorch": "transformers", "lmdeploy": "LMDeploy"}  # as readers know them
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")


def trusts(artifact: Artifact) -> bool:
    """Whether the checkpoint's own Python has to run where it is loaded: the recipe says so, or it ships Python for a
    model that transformers has no class of its own for (MiniCPM-V 2.6, which mmq reads by its own and engines do not).
    """
    if artifact.manifest["recipe"].get("trust_remote_code"):
        return True
    config = read_config(artifact.path)
    if not config.get("auto_map") or not any(name.endswith(".py") for name in artifact.manifest["files"]):
        return False
    from transformers.models.auto import configuration_auto

    return str(config.get("model_type")) not in configuration_auto.CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def clean_copy(artifact: Artifact, items: Sequence[Item]) -> Iterator[Path]:
    """A folder with what is published and nothing else: hard links beside the artifact, or copies where the disk has
    none. OSError where there is no room for copies."""
    try:
        place = tempfile.mkdtemp(prefix=".mmq-clean-", dir=artifact.path.resolve().parent)
    except OSError:
        place = tempfile.mkdtemp(prefix="mmq-clean-")
    folder = Path(place) / artifact.path.resolve().name
    try:
        for one in items:
            to = folder / one.path
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(one.file, to)
            except OSError:
                check_disk(folder, one.size)
                shutil.copyfile(one.file, to)
        yield folder
    finally:
        shutil.rmtree(place, ignore_errors=True)


def reloaded(
    artifact: Artifact, items: Sequence[Item], *, engine: str, engine_bin: str | None = None, tell: Tell = silent
) -> str:
    """The engine's answer to one question, about a picture where the model sees, from a clean copy of `items`.
    RuntimeError where it dies or has nothing to say."""
    with clean_copy(artifact, items) as folder:
        trust: dict[str, Any] = {"trust_remote_code": True} if trusts(artifact) else {}
        launch = plan(engine, folder, machine=this_machine(), port=free_port(), engine_bin=engine_bin, **trust)
        launch = replace(launch, env={**launch.env, **dict.fromkeys(TOKENS, "")})  # no business of the engine's
        with running(launch, tell=tell) as server, connect(server.url, retries=0) as client:
            embedded = artifact.manifest["base"]["hub"] == "embedded"
            sample = held_out_samples(None, 1, embedded=embedded)[0].question
            if not read_shape(folder).vision:
                sample = blind(sample)
            messages: Any = as_openai(sample)
            with plain_errors(server.url):
                reply = client.chat.completions.create(
                    model=server.name, messages=messages, max_tokens=32, temperature=0
                )
            text = (reply.choices[0].message.content or "").strip()
    if not text:
        raise RuntimeError(f"{engine} loaded a clean copy of {artifact.path} and answered nothing; it is not published")
    return text

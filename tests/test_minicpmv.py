"""MiniCPM-V without its remote code, against what the original code made of the same weights and pictures.

tests/data/minicpmv holds the original's outputs; minicpmv_original.py made them, minicpmv_cases.py has the inputs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import minicpmv_cases as cases
import pytest
import torch
from safetensors.torch import load_file

from mmq.quantize.minicpmv.model import MiniCPMV, build
from mmq.quantize.minicpmv.processor import Processor

DATA = Path(__file__).parent / "data" / "minicpmv"
LIMIT = 1e-3  # of a logit, float32

Opened = tuple[MiniCPMV, Processor]


@pytest.fixture(scope="module", params=cases.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def opened(version: str, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("minicpmv")
    cases.checkpoint(version, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, processor = build(folder, config, dtype=torch.float32)
    state = {n: torch.from_numpy(cases.weight(n, tuple(p.shape))) for n, p in model.named_parameters()}
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False), processor


def original(version: str, case: str) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """What it made of the inputs; its logits at the last positions; and all of them, on two axes."""
    told = json.loads((DATA / f"{version}.json").read_text(encoding="utf-8"))["cases"][case]
    kept = load_file(DATA / f"{version}.safetensors")
    return told, kept[case], kept[f"{case}.all"]


def compare(version: str, case: str, model: MiniCPMV, prompt: str, inputs: dict[str, torch.Tensor]) -> None:
    told, last, echo = original(version, case)
    assert prompt == told["prompt"]
    assert inputs["input_ids"][0].tolist() == told["input_ids"]
    grids = inputs.get("tgt_sizes", torch.empty(0, 2)).tolist()
    assert grids == told["tgt_sizes"]
    cut = inputs["pixel_values"].split([rows * columns for rows, columns in grids]) if grids else ()
    assert [hashlib.sha256(p.contiguous().numpy().tobytes()).hexdigest() for p in cut] == told["pixels"]
    logits = model(**inputs).logits[0]
    assert (logits[-cases.SEEN :] - last).abs().max() < LIMIT
    axes = torch.from_numpy(cases.numbers("echo", (logits.shape[1], 2))).float()
    assert (logits @ axes - echo).abs().max() < LIMIT * logits.shape[1] ** 0.5


@pytest.mark.parametrize("case", cases.CASES)
def test_as_the_original(version: str, opened: Opened, case: str) -> None:
    model, processor = opened
    prompt = processor.apply_chat_template(cases.messages(case), add_generation_prompt=True)
    inputs = processor([prompt], images=[cases.picture(name) for name in cases.CASES[case]])
    compare(version, case, model, prompt, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_a_video_as_the_original(version: str, opened: Opened, packed: bool) -> None:
    """Frame by frame, one slice each; and with frames packed together, which only 4.5 does."""
    model, processor = opened
    size, count, groups = cases.VIDEO
    frames = [cases.picture(size, number=i) for i in range(count)]
    parts = [{"type": "video"}, {"type": "text", "text": cases.QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    if packed and version != "4.5":
        with pytest.raises(ValueError, match="only MiniCPM-V 4\\.5"):
            processor([prompt], videos=[frames], temporal_ids=[groups])
        return
    inputs = processor([prompt], videos=[frames], temporal_ids=[groups] if packed else None)
    if version == "4.5":
        told = original(version, "packed" if packed else "video")[0]
        places = "\n".join(["(<image>./</image>)"] * count)
        assert prompt.replace("(<video>./</video>)", places) == told["prompt"]
        compare(version, "packed" if packed else "video", model, told["prompt"], inputs)

"""MiniCPM-V's artifacts in the real engine, against mmq's own module around the artifact's dequantized weights.

vLLM runs the checkpoint's own Python for config and processor, and none of that is kept here. So this is opt-in:
MMQ_MINICPMV_CODE names a folder with the original's .py files in the subfolders 2.5, 2.6, 4.0 and 4.5, or some of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import minicpmv_cases as cases
import pytest
import torch
from safetensors.torch import save_file

from mmq.export.make import make
from mmq.export.view import view
from mmq.quantize.minicpmv.model import build
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Recipe

CODE = os.environ.get("MMQ_MINICPMV_CODE")
LIMIT = 0.05  # nats, the largest difference of any prompt token's logprob
SHOWN = ("text", "small", "two", "wide", "nine", "pair")  # not "edge": vLLM places some of its patches otherwise

pytestmark = [
    pytest.mark.skipif(CODE is None, reason="MMQ_MINICPMV_CODE is not set"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.parametrize("release", ["2.5", "2.6", "4.0", "4.5"])
def test_vllm_says_what_the_module_says(release: str, tmp_path: Path) -> None:
    code = Path(CODE or "") / release
    if not code.is_dir():
        pytest.skip(f"{code} is not there")
    base = tmp_path / "base"
    cases.checkpoint(release, base)
    for path in code.glob("*.py"):
        shutil.copy(path, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    model, processor = build(base, config, dtype=torch.float32)
    stored = {n: torch.from_numpy(cases.weight(n, tuple(p.shape))).half() for n, p in model.named_parameters()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(name="tiny", model=str(base), samples=8)
    artifact = make(recipe, fetch(str(base)), tmp_path / "out", samples=drawn(8), calibration="drawn").path
    assert {p.name for p in artifact.glob("*.py")} == {p.name for p in code.glob("*.py")}

    prompts, expected = [], []
    source = view(artifact)
    model.load_state_dict({n: source.get(n).float() for n in source.metas})
    model.eval().requires_grad_(False)
    for case in SHOWN:
        files = []
        for number, name in enumerate(cases.CASES[case]):
            files.append(str(tmp_path / f"{case}{number}.png"))
            cases.picture(name).save(files[-1])
        prompt = processor.apply_chat_template(cases.messages(case), add_generation_prompt=True)
        prompts.append({"prompt": prompt, "images": files})
        inputs = processor([prompt], images=[cases.picture(name) for name in cases.CASES[case]])
        ids = inputs["input_ids"][0]
        logprobs = model(**inputs).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        expected.append((ids.tolist(), logprobs[ids[1:] != processor.image_token_id]))
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    asked.write_text(json.dumps({"folder": str(artifact), "prompts": prompts}), encoding="utf-8")
    program = Path(__file__).with_name("minicpmv_vllm.py")
    done = subprocess.run([sys.executable, program, asked, told], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for (ids, ours), said in zip(expected, json.loads(told.read_text(encoding="utf-8")), strict=True):
        assert said["ids"] == ids
        theirs = torch.tensor(said["logprobs"])[torch.tensor(ids[1:]) != processor.image_token_id]
        assert (theirs - ours).abs().max() < LIMIT
        assert said["answer"]

"""mmq's packed files in the hands of the packages that their formats come from, each in an environment of its own.

AutoAWQ and AutoGPTQ are archived and live beside no current transformers; GPTQModel is AutoGPTQ's successor. Each loads
the artifact whole, by its own loader, and must see mmq's own reading of it: every weight to the bit, and the logits
within what arithmetic in float16 makes of them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmq.bench.environments import environment
from mmq.bench.peers.older import readable
from mmq.export.view import packed_linears, view
from mmq.quantize.inputs import encode
from mmq.quantize.skeleton import Skeleton, build, load_layer, load_outside
from mmq.quantize.source import open_source
from mmq.recipes.pebble.tasks import samples

asked = pytest.mark.skipif(
    os.environ.get("MMQ_TEST_BACKENDS") != "1",
    reason="makes environments of a few GB; MMQ_TEST_BACKENDS=1 runs it",
)

PROGRAM = Path(__file__).parent / "owners.py"
NOISE = 0.01  # of the logits' length; measured 0.0015 to 0.0023, and 0.15 from int4 to 16 bit


def whole(skeleton: Skeleton) -> Skeleton:
    """All of it loaded, through float16: the owners compute in it, whatever the checkpoint's own dtype."""
    skeleton = dataclasses.replace(skeleton, stored=torch.float16)
    load_outside(skeleton)
    for index in range(len(skeleton.layers)):
        load_layer(skeleton, index)
    return skeleton


@asked
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("owner", "method", "format"),
    [("autoawq", "awq", "awq"), ("auto-gptq", "gptq", "gptq"), ("gptqmodel", "gptq", "gptq")],
)
def test_the_owner_reads_what_mmq_reads(
    owner: str,
    method: str,
    format: str,
    artifact: Callable[..., Path],
    pebble: Path,
    tmp_path: Path,
) -> None:
    try:
        python = environment(owner)
    except OSError as e:
        pytest.skip(str(e))
    folder = artifact(method)
    before, after = whole(build(pebble)), whole(build(folder, source=view(folder)))
    inputs = [encode(after, s) for s in samples("test", 6, seed=3)]
    with torch.no_grad():
        base, ours = ([s.module(**i).logits[0].float() for i in inputs] for s in (before, after))
    save_file({f"{n}.{k}": t for n, i in enumerate(inputs) for k, t in i.items()}, tmp_path / "inputs.safetensors")

    command = [python, PROGRAM, owner, folder, tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    found = load_file(tmp_path / "out.safetensors")

    weights = {n.removeprefix("weight."): w for n, w in found.items() if n.startswith("weight.")}
    source = view(folder)
    for linear in packed_linears(open_source(folder).metas, format):
        mine = [w for name, w in weights.items() if name.endswith(linear.removeprefix("model."))]
        assert len(mine) == 1, f"{owner} has {len(mine)} linears for {linear}"
        same = torch.equal(mine[0].T, source.get(f"{linear}.weight").half())
        assert same, f"{owner} reads {linear} otherwise"
    assert len(weights) == 35

    def apart(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        return float(torch.stack([(b - a).norm() / a.norm() for a, b in zip(ones, others, strict=True)]).max())

    theirs = [found[f"logits.{n}"] for n in range(len(inputs))]
    noise, quantized = apart(ours, theirs), apart(ours, base)
    logging.getLogger(__name__).info("%s: logits %.1e apart, the 16-bit model's %.1e", owner, noise, quantized)
    assert noise <= NOISE < quantized  # the limit tells int4 from the 16-bit model


def test_a_checkpoint_of_transformers_5_in_the_form_of_4(pebble: Path, tmp_path: Path) -> None:
    new = json.loads((pebble / "config.json").read_text())
    (tmp_path / "older").mkdir()
    folder = readable(pebble, tmp_path / "older")
    old = json.loads((folder / "config.json").read_text())
    assert old["hidden_size"] == new["text_config"]["hidden_size"]
    assert old["rope_theta"] == new["text_config"]["rope_parameters"]["rope_theta"]
    assert old["rope_scaling"] == {"type": "mrope", "mrope_section": [8, 12, 12]}
    assert old["model_type"] == "qwen2_vl"
    assert "text_config" not in old
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    assert (pictures["min_pixels"], pictures["max_pixels"]) == (112 * 112, 224 * 224)
    assert (folder / "model.safetensors").samefile(pebble / "model.safetensors")

    assert readable(folder, tmp_path) == folder  # what is old already stays as it is
    (folder / "config.json").write_text(json.dumps({**new, "model_type": "qwen9_vl"}))
    with pytest.raises(ValueError, match="qwen9_vl"):
        readable(folder, tmp_path)

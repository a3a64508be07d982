"""load_model: every parameter of a packed folder is what mmq's own reading makes of it, fused experts too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_experts import plain, quantize, whole_model
from tiny_moe import moe

from mmq.export.packed_weight import PackedWeight
from mmq.export.restored import load_model
from mmq.export.view import view
from mmq.quantize.skeleton import build


@pytest.mark.parametrize(
    ("method", "format"), [("awq", None), ("gptq", None), ("awq", "compressed-tensors"), ("bnb", None)]
)
def test_every_parameter_is_as_mmq_reads_it(artifact: Callable[..., Path], method: str, format: str | None) -> None:
    folder = artifact(method, format)
    model = load_model(folder, device_map="cpu")
    source = view(folder)
    parameters = dict(model.named_parameters())
    names = build(folder, source=source).names
    assert set(names) == set(parameters)
    for name, stored in names.items():
        found = parameters[name]
        if method == "bnb" and found.dtype == torch.uint8:  # stays packed: transformers' own, seen to load
            assert found.numel() * 2 == source.metas[stored].shape[0] * source.metas[stored].shape[1]
            continue
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, source.get(stored).to(torch.bfloat16)), name
    assert model.generation_config.eos_token_id
    assert getattr(model.config, "quantization_config", None) is None or method == "bnb"


@pytest.mark.parametrize(("method", "format"), [("awq", None), ("gptq", None), ("awq", "compressed-tensors")])
def test_packed_weights_are_the_same_to_the_bit(artifact: Callable[..., Path], method: str, format: str | None) -> None:
    """Kept as int4 and restored at each use: the same logits, and less than a third of the decoder's bytes."""
    whole = load_model(artifact(method, format), device_map="cpu")
    small = load_model(artifact(method, format), device_map="cpu", packed=True)
    kept = {name: p for name, p in small.named_parameters() if isinstance(p, PackedWeight)}
    assert set(kept) == {n for n, p in whole.named_parameters() if ".layers." in n and p.ndim == 2}
    sizes = [t.numel() * t.element_size() for p in kept.values() for t in (p.nibbles, p.scale, p.zero)]
    assert sum(sizes) < sum(2 * p.numel() for p in kept.values()) / 3
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(small(input_ids=ids).logits, whole(input_ids=ids).logits)
    moved = next(iter(kept.values()))
    assert type(moved.detach()) is PackedWeight
    assert type(moved + 0) is torch.Tensor


def test_fused_experts_are_joined(tmp_path: Path) -> None:
    """transformers keeps a layer's experts in one tensor; the files hold them one by one, packed."""
    moe("qwen3_moe", tmp_path / "base")
    quantize("qwen3_moe", tmp_path / "base", tmp_path / "art", count=2, quality="fast")
    expected = whole_model(plain(tmp_path / "art", tmp_path / "plain", "qwen3_moe"), "qwen3_moe").state_dict()
    found = load_model(tmp_path / "art", device_map="cpu").state_dict()
    assert any(name.endswith("experts.gate_up_proj") for name in expected)
    assert set(found) == set(expected)
    assert not [name for name in expected if not torch.equal(found[name].float(), expected[name].float())]


def test_nothing_is_made_up(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """transformers fills what it has no tensors for with random numbers and a warning; here it is an error."""
    shutil.copytree(artifact("awq"), tmp_path / "art")
    config = json.loads((tmp_path / "art" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (tmp_path / "art" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no weights for .*layers.* and would make them up"):
        load_model(tmp_path / "art", device_map="cpu")

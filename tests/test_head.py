"""The output head in int4: made block by block, untied where need be, read back, refused where no engine loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from tiny import vlm

from mmq.bench.check import check
from mmq.bench.produce import settle
from mmq.export.artifact import open_artifact
from mmq.export.config import CONFIGS, Packing, check_head
from mmq.export.make import make
from mmq.export.packing import LAYOUTS, pack_blocks
from mmq.export.view import view
from mmq.quantize import head as heads
from mmq.quantize.grid import Grid, quantize
from mmq.quantize.head import Listener, after_layers, head_of, quantize_head
from mmq.quantize.inputs import encode, media_mask
from mmq.quantize.memory import Memory, Workload, head_flops, host_bytes
from mmq.quantize.skeleton import build, load_layer, load_outside
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.progress import Step
from mmq.recipes.recipe import Limits, Recipe

EMBEDDINGS = "model.embed_tokens.weight"
FORMATS = (("awq", "awq"), ("awq", "compressed-tensors"), ("gptq", "gptq"))


def made(out: Path, *, base: str = "pebble", **fields: Any) -> Path:
    recipe = Recipe("headed", base, head="int4", samples=4, **fields)
    make(recipe, fetch(base), out, samples=drawn(4), calibration="drawn")
    return out


@pytest.mark.parametrize(("method", "format"), FORMATS)
def test_a_tied_head_is_packed_and_the_embeddings_stay(
    artifact: Callable[..., Path], pebble: Path, method: str, format: str
) -> None:
    folder = artifact(method, format, head="int4")
    opened = open_artifact(folder, verify=True)
    assert "lm_head" in opened.manifest["quantized"]
    assert opened.manifest["head"]["untied"]
    assert 0 < opened.manifest["head"]["errors"]["lm_head"] < 0.01
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]
    told = json.dumps(config["quantization_config"])
    assert ('"lm_head": true' in told) == (format != "compressed-tensors")
    assert ("re:.*lm_head$" in told) == (format == "compressed-tensors")
    before, after = open_source(pebble), view(folder)
    assert torch.equal(before.get(EMBEDDINGS), after.get(EMBEDDINGS))
    weight = before.get(EMBEDDINGS).float()
    error = (after.get("lm_head.weight").float() - weight).square().sum() / weight.square().sum()
    assert 1e-4 < float(error) < 0.05


def test_the_skip_list_does_not_name_it(artifact: Callable[..., Path]) -> None:
    """vLLM takes an entry as a substring, and would look for 16-bit weights that are not there."""
    for head, expected in (("16bit", True), ("int4", False)):
        config = json.loads((artifact("awq", head=head) / "config.json").read_text(encoding="utf-8"))
        skipped = config["quantization_config"]["modules_to_not_convert"]
        assert any(entry.rstrip(".") in "language_model.lm_head" for entry in skipped) == expected


def test_a_check_counts_it(artifact: Callable[..., Path], pebble: Path) -> None:
    """As intended and not beside it; and its loss is in the measures, for the check reads the artifact's own head."""
    found = {}
    for head in ("16bit", "int4"):
        opened = open_artifact(artifact("awq", head=head))
        found[head] = check(opened, pebble, samples=list(samples("test", 6)), limits=Limits()).measures
    assert found["int4"]["coverage"] == found["16bit"]["coverage"] == 1
    assert found["int4"]["unintended"] == 0
    assert found["int4"]["mean_kl"] != found["16bit"]["mean_kl"]


def test_a_head_of_another_name_is_a_target_by_it() -> None:
    """InternLM2 calls it output."""
    packing = Packing("compressed-tensors", 128, False, (), (), "bfloat16", "language_model.output")
    config = CONFIGS[packing.format](packing)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "re:.*output$"]


def test_a_head_of_its_own_gives_way(tmp_path: Path) -> None:
    """Of an untied model no 16-bit copy is left, and the config stays as it is."""
    base = vlm("qwen2_5_vl", tmp_path / "base")
    folder = made(tmp_path / "out", base=str(base), method="gptq", format="compressed-tensors", symmetric=True)
    names = open_source(folder).metas
    assert "lm_head.weight" in open_source(base).metas
    parts = ("weight_packed", "weight_scale", "weight_shape")
    assert {n for n in names if n.startswith("lm_head.")} == {f"lm_head.{part}" for part in parts}
    assert not open_artifact(folder).manifest["head"]["untied"]
    was, now = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (base, folder))
    assert {k: v for k, v in now.items() if k != "quantization_config"} == was


def test_transformers_reads_what_the_view_reads(artifact: Callable[..., Path]) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForImageTextToText

    folder = artifact("awq", "compressed-tensors", head="int4")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        model(input_ids=ids)  # decompressed at its first use
        words = model.get_input_embeddings()(ids)
        logits = model.lm_head(words).float()
    expected = words.float() @ view(folder).get("lm_head.weight").float().T
    assert float((logits - expected).norm() / expected.norm()) < 0.01  # in bfloat16


def test_blocks_of_rows_give_what_the_whole_gives(pebble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = build(pebble)
    grid = Grid(128, False, torch.bfloat16)
    head = head_of(skeleton, grid)
    x = torch.randn(500, head.width, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x / 500
    found = []
    for piece in (2**25, 300 * head.width):  # one block, and blocks of 296 rows
        monkeypatch.setattr(heads, "PIECE", piece)
        told: list[int] = []
        solution = quantize_head(skeleton, head, gram.clone(), grid, ("awq", "default"), 500, told.append)
        assert told[-1] == head.rows
        found.append((solution.quantized[head.name], solution.errors[head.name], len(told)))
    (one, loss, _), (several, same, blocks) = found
    assert blocks == 7
    assert float((one.q != several.q).float().mean()) < 1e-3  # sums of another order tip a code here and there
    assert same == pytest.approx(loss, rel=1e-3)


def test_a_tall_weight_packed_in_blocks_is_the_same() -> None:
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    for format, layout in LAYOUTS.items():
        x = quantize(weight, Grid(128, format == "gptq", torch.bfloat16))
        whole = layout.pack(x, torch.bfloat16)
        blocks = pack_blocks(x, layout, torch.bfloat16, device=torch.device("cpu"), block=64)
        assert list(blocks) == list(whole)
        for name, tensor in whole.items():
            assert torch.equal(tensor, blocks[name]), (format, name)


def test_what_the_head_hears_are_words(pebble: Path) -> None:
    """H is of the normed states that the head is fed, at positions that are no picture's."""
    skeleton = build(pebble)
    load_outside(skeleton)
    for index in range(len(skeleton.layers)):
        load_layer(skeleton, index)
    sample = next(s for s in drawn(8) if s.images)
    inputs = encode(skeleton, sample)
    ids = inputs["input_ids"]
    with torch.no_grad():
        output = skeleton.module.base_model(**inputs, use_cache=False)
        whole = skeleton.module(**inputs, use_cache=False).logits
    listener = Listener(skeleton, head_of(skeleton, Grid()))
    listener.hear(ids, output)
    x = output.last_hidden_state[0, ~media_mask(skeleton, ids)[0]]
    assert x.shape[0] < ids.numel()
    gram, left_out = listener.mean()
    assert left_out == 0
    assert torch.allclose(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(skeleton.module.lm_head(output.last_hidden_state), whole, atol=1e-4)

    output.last_hidden_state[0, -1] = float("nan")  # the last is a word
    spoilt = Listener(skeleton, head_of(skeleton, Grid()))
    spoilt.hear(ids, output)
    assert spoilt.mean()[1] == 1


def test_before_the_head_no_tower_and_no_lookup_is_loaded(tmp_path: Path) -> None:
    """Phi-4's towers and Gemma 4's inputs for each layer are parts of the module that holds the layers."""
    inputs = {"per_layer_model_projection.weight", "per_layer_projection_norm.weight"}  # small
    for kind, more in (("phi4_multimodal", set()), ("gemma4_text", inputs), ("llava", set())):
        skeleton = build(zoo.write(kind, tmp_path / kind))
        text = skeleton.family.layers.removesuffix("layers")
        assert set(after_layers(skeleton)) == {f"{text}{name}" for name in {"norm.weight", *more}}


def test_interrupted_before_the_head_it_is_taken_up(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", method="awq")

    def stop(step: Step) -> None:
        if step.name == "layer" and step.done == step.total:
            raise KeyboardInterrupt

    recipe = Recipe("headed", "pebble", head="int4", samples=4, method="awq")
    with pytest.raises(KeyboardInterrupt):
        make(recipe, fetch("pebble"), tmp_path / "cut", samples=drawn(4), calibration="drawn", tell=stop)
    again = made(tmp_path / "cut", method="awq")
    assert open_artifact(again).digest == open_artifact(whole).digest


def test_where_no_engine_loads_it_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no engine loads a head in bnb"):
        settle("pebble", method="bnb", head="int4")
    with pytest.raises(ValueError, match="the backends leave it in 16 bit"):
        settle("pebble", backend="gptqmodel", head="int4")
    with pytest.raises(ValueError, match="multiples of 64; --format compressed-tensors can hold it"):
        check_head("awq", False, 2056)
    with pytest.raises(ValueError, match="multiples of 8"):
        check_head("compressed-tensors", False, 2052)
    with pytest.raises(ValueError, match="engines give gemma2 no output head"):
        check_head("awq", False, 2048, "gemma2")
    check_head("compressed-tensors", True, 2051)
    check_head("gptq", True, 152064)
    base = vlm("qwen2_vl", tmp_path / "odd")
    rows = open_source(base).metas["lm_head.weight"].shape[0]
    assert rows % 64
    with pytest.raises(ValueError, match=f"the output head has {rows} rows"):
        made(tmp_path / "out", base=str(base), method="awq")
    assert not (tmp_path / "out").exists()


def test_the_estimate_counts_it() -> None:
    """A head's codes wait on the host whole: 152,064 rows of 3,584, with half as much packed, and it takes its time."""
    plain = Workload(4096, 1024, 512, 3584, 2**30, 2**28, 28, (((3584,), 3584),), 2)
    with_head = replace(plain, head=152064)
    more = host_bytes(with_head, Memory()) - host_bytes(plain, Memory())
    assert more == 152064 * 3584 * 3 // 2 - plain.layer // 2
    assert head_flops(plain, "awq", "default") == 0
    assert head_flops(with_head, "awq", "default") > 10 * 152064 * 3584**2

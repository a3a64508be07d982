"""A checkpoint that brings its own Python: refused without the flag, repaired and told with it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from conftest import Run
from safetensors.torch import load_file, save_file

from mmq.bench.check import check
from mmq.bench.served import check_served
from mmq.export.make import make
from mmq.quantize import remote
from mmq.quantize.skeleton import build
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import Base, fetch
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.recipe import Limits, Recipe

CONFIG = """
from transformers.modeling_utils import PretrainedConfig  # where transformers 4 had it


class GraniteOfOursConfig(PretrainedConfig):
    model_type = "ours"

    def __init__(self, hidden_size=128, num_hidden_layers=2, vocab_size=1024, **more):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.num_attention_heads = 2
        super().__init__(**more)
"""
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import is_torch_fx_available

from .configuration_ours import GraniteOfOursConfig

assert not is_torch_fx_available()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.wide = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden_states):
        x = self.before(hidden_states)
        return hidden_states + self.back(torch.sigmoid(self.gate(x)) * self.wide(x))


class OursModel(PreTrainedModel):
    config_class = GraniteOfOursConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutputWithPast(last_hidden_state=x)


class OursForCausalLM(PreTrainedModel):
    config_class = GraniteOfOursConfig
    base_model_prefix = "model"
    _tied_weights_keys = ["head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = OursModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self):
        return self.model.wte

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **more):
        return CausalLMOutputWithPast(logits=self.head(self.model(input_ids).last_hidden_state))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours")
    words = zoo.tokenizer()
    words.chat_template = zoo.turns("")
    words.save_pretrained(out)
    torch.manual_seed(0)
    tensors = {"model.wte.weight": torch.randn(len(words), 128)}
    for i in range(2):
        tensors |= {
            f"model.blocks.{i}.before.weight": 1 + torch.randn(128) * 0.1,
            f"model.blocks.{i}.before.bias": torch.randn(128) * 0.1,
            f"model.blocks.{i}.gate.weight": torch.randn(256, 128) * 0.1,
            f"model.blocks.{i}.wide.weight": torch.randn(256, 128) * 0.1,
            f"model.blocks.{i}.wide.bias": torch.randn(256) * 0.1,
            f"model.blocks.{i}.back.weight": torch.randn(128, 256) * 0.1,
        }
    save_file({n: t.bfloat16() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "ours",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "auto_map": {
            "AutoConfig": "configuration_ours.GraniteOfOursConfig",
            "AutoModelForCausalLM": "modeling_ours.OursForCausalLM",
        },
    }
    (out / "config.json").write_text(json.dumps(config))
    (out / "configuration_ours.py").write_text(CONFIG)
    (out / "modeling_ours.py").write_text(MODEL)
    return out


def test_refused_without_the_flag(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'ours' is not known.*modeling_ours\.py\).*--trust-remote-code.*--revision"):
        build(folder)


def test_checked_with_the_flag_too(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="ours", model=str(folder), trust_remote_code=True, samples=2)
    made = make(recipe, fetch(str(folder)), tmp_path / "out", samples=drawn(2), calibration="drawn")
    with pytest.raises(ValueError, match="--trust-remote-code"):
        check(made, folder, samples=drawn(2), limits=Limits())
    found = check(made, folder, samples=drawn(2), limits=Limits(), max_new_tokens=2, trust=True)
    assert found.measures["coverage"] == 1.0
    assert 0 < found.measures["mean_kl"] < 0.1


def test_a_text_model_of_its_own_code_is_checked_as_it_is_served(folder: Path, tmp_path: Path) -> None:
    """Samples with pictures are put to it in words, and the engine has the flag."""
    pytest.importorskip("fastapi")
    recipe = Recipe(name="ours", model=str(folder), trust_remote_code=True, samples=2)
    made = make(recipe, fetch(str(folder)), tmp_path / "out", samples=drawn(2), calibration="drawn")
    asked = list(samples("test", 2))
    found = check_served(made, folder, samples=asked, limits=Limits(), engine="pytorch", trust=True)
    assert found.measures["served_to_int4"] < found.measures["served_to_fp16"]


def test_the_next_command_has_the_flag(folder: Path, mmq: Run) -> None:
    code, out, _ = mmq("quantize", folder, "--trust-remote-code", "--samples", "2", "-o", "out")
    assert code == 0
    typed = shlex.split(out.rpartition("next: mmq ")[2])
    assert mmq(*typed, "--samples", "2")[0] in (0, 1)  # measured


def test_a_hub_must_be_pinned(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="ours", model="me/ours", revision="main", trust_remote_code=True, samples=2)
    with pytest.raises(ValueError, match=r"revision is 'main'.*full hash"):
        make(recipe, Base(folder, "me/ours", "hf", "0" * 40), tmp_path / "out", samples=drawn(2), calibration="drawn")


def test_with_the_flag_it_is_repaired_told_and_quantized(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="ours", model=str(folder), trust_remote_code=True, samples=2)
    made = make(recipe, fetch(str(folder)), tmp_path / "out", samples=drawn(2), calibration="drawn")
    told = " | ".join(made.manifest["notes"])
    assert "transformers.modeling_utils.PretrainedConfig is gone" in told
    assert "transformers.utils.is_torch_fx_available is gone" in told
    assert "_tied_weights_keys is a list" in told
    assert "has no generate" in told
    assert len(made.manifest["quantized"]) == 6
    assert (made.path / "modeling_ours.py").is_file()
    import transformers.utils

    assert not hasattr(transformers.utils, "is_torch_fx_available"), "put back for the code's sake alone"
    skeleton = build(folder, trust=True)
    assert [g.absorber for g in skeleton.family.groups[0]] == ["before", "wide"]
    before, after = load_file(folder / "model.safetensors"), {}
    for shard in made.path.glob("*.safetensors"):
        after |= load_file(shard)
    norm = "model.blocks.0.before"  # its scale went into weight and bias alike
    ratio = before[f"{norm}.weight"].float() / after[f"{norm}.weight"].float()
    bias = before[f"{norm}.bias"].float() / after[f"{norm}.bias"].float()
    assert ratio.std() > 0.01
    assert torch.allclose(ratio, bias, rtol=0.02)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("from transformers.utils import gone_for_good", "imports gone_for_good from transformers.utils"),
        ("from transformers.onnx import OnnxConfig", r"imports transformers\.onnx, which"),
        ("import not_installed_anywhere", "not_installed_anywhere"),
    ],
)
def test_what_nothing_stands_in_for_is_named(folder: Path, tmp_path: Path, line: str, told: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "modeling_ours.py"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ValueError, match=told):
        build(other, trust=True)


def test_imports_within_try_are_the_codes_own_affair(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("try:\n    from transformers.utils import x\nexcept ImportError:\n    x = 1\n")
    assert remote.imported(tmp_path) == {}

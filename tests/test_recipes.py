"""Recipes: what YAML may say, which recipe a name means, and the recipes in the package."""

from pathlib import Path

import pytest
import recipe_shapes
import zoo

from mmq.quantize.family import ROWS
from mmq.recipes.recipe import Limits, Recipe, bundled, model_on, parse, recipe_for, show
from mmq.serve.bill import Ask, read_model
from mmq.serve.machine import GIB, Gpu
from mmq.serve.planner import planned

HERE = Path(__file__).parents[1] / "recipes" / "bundled"


@pytest.mark.parametrize("file", sorted(HERE.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_bundled_recipe_parses_under_its_own_name(file):
    recipe = parse(file.read_text(encoding="utf-8"), where=file.name)
    assert recipe.name == file.stem
    assert recipe.description
    assert recipe.revision is None  # pinned on download, never invented
    assert bundled()[recipe.name] == recipe
    assert recipe_for(recipe.name.lower()) == recipe


def test_the_models_that_people_name_are_there():
    names = set(bundled())
    for family, sizes in {
        "MiniCPM-V-{}": ("2_6", "4", "4_5", "4.6"),
        "Qwen2-VL-{}-Instruct": ("2B", "7B"),
        "Qwen2.5-VL-{}-Instruct": ("3B", "7B", "32B", "72B"),
        "Qwen3-VL-{}-Instruct": ("2B", "4B", "8B", "32B"),
        "InternVL3-{}-hf": ("2B", "8B"),
        "gemma-3-{}-it": ("4b", "12b", "27b"),
    }.items():
        assert names >= {family.format(size) for size in sizes}
    assert names >= {"pebble", "llava-onevision-qwen2-7b-ov-hf", "pixtral-12b", "SmolVLM2-2.2B-Instruct", "Qwen3-8B"}


KNOWN = {"pixtral": "llava"}  # kinds of the zoo whose config.json says another model_type
FAMILIES = {KNOWN.get(kind, kind) for kind in (*zoo.QWEN, *zoo.KINDS)} | {
    kind for row in ROWS for kind in row.model_types
}


@pytest.mark.parametrize("recipe", [r for r in bundled().values() if r.name != "pebble"], ids=lambda r: r.name)
def test_a_bundled_recipe_says_what_it_makes_and_where_it_comes_from(recipe):
    """Its family is one that mmq was tried with; its ids are ids; what it may lose is said, also of its pictures."""
    assert recipe.family in FAMILIES
    assert recipe.version >= 1
    owner, name = recipe.model.split("/")
    assert owner
    assert name == recipe.name
    assert recipe.modelscope is None or recipe.modelscope.split("/")[1] == name
    assert not recipe.trust_remote_code
    said = (HERE / f"{recipe.name}.yaml").read_text(encoding="utf-8")
    assert "limits: {mean_kl: " in said
    assert ("image_effect" in said) == (recipe.calibration == "drawn")


SIZES = (8, 12, 16, 24, 32, 48, 80)  # GiB, as cards are sold
QUICK = ("MiniCPM-V-4_5", "Qwen2.5-VL-7B-Instruct", "gemma-3-12b-it")
CARDS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, recipe in bundled().items()
    if recipe.card
]


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_the_smallest_that_a_plan_fits_on(name, tmp_path):
    """The planner's word on the artifact's shapes: 8,192 tokens and a picture, of a megapixel where that can be set."""
    model = read_model(recipe_shapes.write(name, tmp_path / name))
    pixels = 2**20 if model.vision and model.vision.side else None
    ask = Ask(context=8192, concurrency=1, images=1, pixels=pixels)
    fitting = [size for size in SIZES if not planned(model, Gpu("a card", size * GIB, size * GIB, 8.9), ask).problem]
    assert bundled()[name].card == f"{fitting[0]}GiB"


def test_only_what_has_a_known_shape_names_a_card():
    assert {name for name, recipe in bundled().items() if recipe.card} == set(recipe_shapes.SHAPES)


@pytest.mark.parametrize("name", sorted(bundled()))
def test_show_reads_back_to_the_same_recipe(name):
    recipe = bundled()[name]
    assert parse(show(recipe), where="shown") == recipe


def test_show_keeps_every_key_and_chinese():
    recipe = Recipe(
        name="x", model="a/b", description="视觉语言模型", keep=("visual.", "lm_head"), limits=Limits(top1=0.8)
    )
    text = show(recipe)
    assert "视觉语言模型" in text
    assert "group_size: 128" in text
    assert parse(text, where="shown") == recipe


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("metod: gptq", "unknown key 'metod'; did you mean 'method'?"),
        ("group: 64", "unknown key 'group'; did you mean 'group_size'?"),
        ("zzzz: 1", "unknown key 'zzzz'; known keys are name, model"),
        ("limits: {p99: 1}", "limits: unknown key 'p99'; did you mean 'p99_kl'?"),
        ("limits: 3", "limits is a mapping"),
        ("limits: {mean_kl: low}", "limits: mean_kl is 'low'; it must be a number"),
        ("limits: {mean_kl: -1}", "limits: mean_kl is -1; it must be >= 0"),
        ("limits: {mean_kl: .nan}", "limits: mean_kl is nan; it must be >= 0"),
        ("limits: {top1: 90}", "limits: top1 is 90; it must be from 0 to 1"),
        ("samples: many", "samples is 'many'; it must be a whole number"),
        ("samples: true", "samples is True; it must be a whole number"),
        ("samples: 0", "samples is 0; it must be a whole number >= 1"),
        ("revision: 1234567", "revision is 1234567; it must be text or null (put it in quotes)"),
        ("symmetric: 1", "symmetric is 1; it must be true or false or null"),
        ("keep: visual.", "keep is 'visual.'; it must be a list of text"),
        ("keep: [1]", "keep is [1]; it must be a list of text"),
        ("method: awk", "method is 'awk'; it must be one of awq, gptq, bnb, rtn"),
        ("format: gguf", "format is 'gguf'; it must be one of awq, gptq, compressed-tensors, bnb"),
        ("bits: 3", "bits is 3; mmq writes 4-bit weights only"),
        ("group_size: 100", "group_size is 100; it must be one of 32, 64, 128"),
        ("model: 7", "model is 7; it must be text"),
        ("version: 0", "version is 0; it must be a whole number >= 1"),
        ("version: 1.5", "version is 1.5; it must be a whole number"),
        ("card: 24", "card is 24; it must be text or null (put it in quotes)"),
        ("card: 24 GB", "card is '24 GB'; it must be a card's memory, as 24GiB"),
        ("- a list", "not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(line, said):
    head = "name: x\n" if line.startswith("model") else "name: x\nmodel: a/b\n"
    with pytest.raises(ValueError, match=r"^mine\.yaml: ") as told:
        parse(head + line, where="mine.yaml")
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_recipe_needs_a_name_and_a_model_and_is_a_mapping():
    with pytest.raises(ValueError, match="key 'model' is missing"):
        parse("name: x", where="mine.yaml")
    with pytest.raises(ValueError, match="a recipe is a mapping"):
        parse("just text", where="mine.yaml")


def test_types_are_checked_from_python_too():
    with pytest.raises(ValueError, match="samples is '3'; it must be a whole number"):
        Recipe(name="x", model="a/b", samples="3")  # type: ignore[arg-type]
    assert Limits(mean_kl=1).mean_kl == 1  # a whole number is a number


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(ValueError, match="no recipe, folder or hub id 'peble': did you mean pebble"):
        recipe_for("peble")
    with pytest.raises(ValueError, match=r"did you mean .*Qwen2-VL-2B-Instruct"):
        recipe_for("qwen2-vl-2b")
    with pytest.raises(ValueError, match="`mmq recipes` lists"):
        recipe_for("zzz")


def test_a_hub_id_a_folder_and_a_file_name_recipes(tmp_path):
    assert recipe_for("qwen/qwen2-vl-2b-instruct").name == "Qwen2-VL-2B-Instruct"
    assert recipe_for("OpenBMB/MiniCPM-V-2_6").model == "openbmb/MiniCPM-V-2_6"
    assert recipe_for("someone/some-model") == Recipe(name="some-model", model="someone/some-model")
    (tmp_path / "my-model").mkdir()
    assert recipe_for(str(tmp_path / "my-model")) == Recipe(name="my-model", model=str(tmp_path / "my-model"))
    file = tmp_path / "mine.yaml"
    file.write_text("name: 我的\nmodel: a/b\nmethod: gptq\n", encoding="utf-8")
    assert recipe_for(str(file)) == Recipe(name="我的", model="a/b", method="gptq")
    file.write_bytes("name: 我的\nmodel: a/b\n".encode("gbk"))
    with pytest.raises(ValueError, match=r"mine\.yaml: not UTF-8 at byte 7"):
        recipe_for(str(file))
    with pytest.raises(ValueError, match=r"no recipe file none\.yaml"):
        recipe_for("none.yaml")


def test_the_id_on_each_hub():
    recipe = recipe_for("MiniCPM-V-2_6")
    assert model_on(recipe, "hf") == "openbmb/MiniCPM-V-2_6"
    assert model_on(recipe, "modelscope") == "OpenBMB/MiniCPM-V-2_6"
    assert model_on(Recipe(name="x", model="a/b"), "modelscope") == "a/b"
    with pytest.raises(ValueError, match="hub is 'gitee'; it must be one of hf, modelscope"):
        model_on(recipe, "gitee")

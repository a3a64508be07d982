"""The model card: what the hubs read, in two languages, deterministic, and inert whatever stands in its fields."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mmq.export.again import commands
from mmq.export.artifact import Artifact
from mmq.export.card import Check, Line, Row, Speed, Told, card, title
from mmq.export.card_words import CHINESE, ENGLISH
from mmq.export.inert import fenced, inert, link, table
from mmq.export.source import Source, metadata, obstacles, public_manifest, with_metadata, without_paths

NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/p.png)",
    "http://evil.example www.evil.example",
    "` ``` `",
    "| cell | cell |\n|---|---|",
    "# heading",
    "\n---\nlicense: mit\n---\n",
    "\n\n```sh\nrm -rf /\n```\n",
    "*bold* _slanted_ ~~gone~~ $x^2$ @somebody",
    "a\u202eb\u0000c\u200bd",
    "&lt;b&gt; &#60;script&#62;",
    "x" * 2000,
)
MANIFEST: dict[str, Any] = {
    "name": "model-awq",
    "method": "awq",
    "format": "awq",
    "bits": 4,
    "group_size": 128,
    "symmetric": False,
    "quality": "default",
    "recipe": {"name": "model", "model": "org/model", "version": 3, "method": "awq", "quality": "default"}
    | {"group_size": 128, "calibration": "drawn", "samples": 64, "keep": [], "limits": {"mean_kl": 0.05}},
    "base": {"model": "org/model", "hub": "hf", "revision": "a" * 40, "weight_bytes": 2 << 20},
    "calibration": {"name": "drawn", "digest": "d" * 64, "samples": 64, "text": 100, "media": 200},
    "quantized": ["model.layers.0.mlp.down_proj"],
    "layers": [],
    "paces": [{}],
    "versions": {"mmq": "0.1.0", "torch": "2.13.0"},
    "files": {"model.safetensors": {"sha256": "0" * 64, "size": 1 << 20}},
}
SOURCE = Source("model", "org/model", "hf", "a" * 40, license="apache-2.0", languages=("en", "zh"))
TOLD = Told(
    True,
    quality=[Row("mean_kl", "0.01", "0.012", "0.008", "≤ 0.05"), Row("top1", "0.99")],
    checks=[Check(None, 8000, "2026-11-21"), Check("vllm", 90, "2026-11-22")],
    reloaded="vLLM",
    lines=[Line("vLLM", "vllm serve me/model-awq"), Line("SGLang", "python -m sglang.launch_server", "install `it`")],
)


def artifact(**changed: Any) -> Artifact:
    return Artifact(Path("out"), {**MANIFEST, **changed})


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def test_the_metadata_is_what_the_hubs_read() -> None:
    data = ModelCard(card(artifact(), SOURCE, TOLD)).data.to_dict()
    assert data["base_model"] == ["org/model"]
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "zh"]
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert {"mmq", "int4", "awq", "vllm"} <= set(data["tags"])
    text_only = Told(False)
    assert ModelCard(card(artifact(), SOURCE, text_only)).data.to_dict()["pipeline_tag"] == "text-generation"


def test_a_licence_with_a_name_has_its_name_and_link() -> None:
    source = with_metadata(
        Source("model", "org/model", "hf", None),
        {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE", "language": ["en", "<b>"]},
    )
    assert source.license_link == "https://huggingface.co/org/model/blob/main/LICENSE"
    assert source.languages == ("en",)
    data = ModelCard(card(artifact(), source, TOLD)).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "qwen-research")
    assert "[qwen-research](https://huggingface.co/org/model/blob/main/LICENSE)" in card(artifact(), source, TOLD)


def test_both_languages_say_everything_once() -> None:
    assert ENGLISH.keys() == CHINESE.keys()
    for key in ENGLISH:
        assert sorted(re.findall(r"\{\w+\}", ENGLISH[key])) == sorted(re.findall(r"\{\w+\}", CHINESE[key])), key
    text = card(artifact(), SOURCE, TOLD)
    assert "[English](#english) · [中文](#中文)" in text
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert headings[1] == "English"
    middle = headings.index("中文")
    assert len(headings) - middle == middle - 1
    for words in (ENGLISH, CHINESE):
        assert words["the_files"] + words["over"].format(tokens="8,000", date="2026-11-21") in text
        assert words["served_by"].format(engine="vllm") in text
        assert words["mean_kl"] in text
    assert text.count("| 0.01 | 0.012 | 0.008 | ≤ 0.05 |") == 2
    assert text.count("```sh\nvllm serve me/model-awq\n```") == 2


def test_the_same_artifact_gives_the_same_bytes() -> None:
    assert card(artifact(), SOURCE, TOLD) == card(artifact(), SOURCE, TOLD)


def test_the_lines_that_make_it_again_are_pinned() -> None:
    first, second = commands(artifact(), SOURCE)
    assert first == (
        f"mmq quantize org/model --revision {'a' * 40} --method awq --quality default --group-size 128 "
        "--calibration drawn --samples 64 -o out-awq"
    )
    assert second == "mmq check out-awq"
    recipe = {**MANIFEST["recipe"], "keep": ["mlp.down_proj", "a b"], "symmetric": True, "head": "int4"}
    line = commands(artifact(recipe=recipe), SOURCE)[0]
    assert "--head int4 --symmetric --keep mlp.down_proj --keep 'a b'" in line
    other = Source("model", "org/model", "modelscope", "b" * 40)
    assert "quantize org/model --hub modelscope --revision bbb" in commands(artifact(), other)[0]
    moved = commands(artifact(converted_from={"format": "awq"}, format="gptq"), SOURCE)
    assert moved[1] == "mmq convert out-awq --format gptq"


BY_ANOTHER = {"backend": {"backend": "b", "version": "1"}}


@pytest.mark.parametrize(("changed", "sentence"), [({}, "exact"), ({"paces": [{}, {}]}, "near"), (BY_ANOTHER, "near")])
def test_byte_for_byte_is_promised_only_where_it_holds(changed: dict[str, Any], sentence: str) -> None:
    text = card(artifact(**changed), SOURCE, TOLD)
    for words in (ENGLISH, CHINESE):
        assert words[sentence].split("{")[0] in text


def test_what_was_not_done_is_said() -> None:
    text = card(artifact(calibration=None), SOURCE, Told(True, gate=False, failures=["mean_kl is 9"]))
    for words in (ENGLISH, CHINESE):
        for key in ("no_gate", "failed", "unchecked", "unmeasured", "not_reloaded", "no_engine", "uncalibrated"):
            assert words[key] in text, key
    assert text.count("- mean\\_kl is 9") == 2


def everywhere(nasty: str) -> str:
    """A card with the same text in every field that comes from outside."""
    recipe = {**MANIFEST["recipe"], "name": nasty, "description": nasty, "calibration": nasty, "keep": [nasty]}
    made = artifact(
        name=nasty,
        method=nasty,
        format=nasty,
        quality=nasty,
        group_size=nasty,
        recipe=recipe,
        calibration={"name": nasty, nasty: nasty},
        notes=[nasty],
        backend={"backend": nasty, "version": nasty},
        versions={nasty: nasty},
    )
    source = with_metadata(
        Source(nasty, None, "local", nasty),
        {"license": nasty, "license_name": nasty, "license_link": nasty, "language": [nasty]},
    )
    told = Told(
        True,
        quality=[Row(nasty, nasty, nasty, nasty, nasty)],
        checks=[Check(nasty, 1, nasty)],
        failures=[nasty],
        gate=False,
        reloaded=nasty,
        lines=[Line(nasty, nasty, nasty)],
        speed=Speed([nasty, nasty], [[nasty, nasty]], nasty),
    )
    return card(made, source, told)


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_every_field_from_outside_is_inert(nasty: str) -> None:
    text = everywhere(nasty)
    metadata_block, shown = text.split("\n---\n", 1)
    data = yaml.safe_load(metadata_block.removeprefix("---\n"))
    assert "license" not in data
    assert set(data) <= {"library_name", "pipeline_tag", "tags", "frameworks", "tasks"}
    tokens = markdown(shown)
    kinds = {kind for kind, _ in tokens}
    assert not kinds & {"html_block", "html_inline", "image", "hr", "em_open", "s_open"}, kinds
    links = [target for kind, target in tokens if kind == "link_open"]
    assert set(links) <= {"#english", "#%E4%B8%AD%E6%96%87"}, links
    harmless = markdown(everywhere("harmless").split("\n---\n", 1)[1])
    blocks = ("heading_open", "table_open", "td_open", "th_open", "list_item_open", "fence", "paragraph_open")
    found, wanted = Counter(kind for kind, _ in tokens), Counter(kind for kind, _ in harmless)
    assert {kind: found[kind] for kind in blocks} == {kind: wanted[kind] for kind in blocks}
    assert not set(shown) & set("\u202e\u0000\u200b")


def markdown(text: str) -> list[tuple[str, str]]:
    """(kind of token, its tag or a link's target) of the text as a Markdown reader with tables has it."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
    found: list[tuple[str, str]] = []
    for token in reader.parse(text):
        found.append((token.type, token.tag))
        for inner in token.children or ():
            found.append((inner.type, str(inner.attrGet("href") or inner.tag)))
    return found


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_a_commits_title_is_one_line(nasty: str) -> None:
    assert "\n" not in title(artifact(name=nasty))
    assert len(title(artifact(name=nasty))) < 160


def test_inert_keeps_what_it_says() -> None:
    assert inert("Qwen2-VL 2B, 4 bit; 1 + 1 = 2 (两行)\n下") == "Qwen2-VL 2B, 4 bit; 1 + 1 = 2 (两行) 下"
    assert inert("a|b<c>") == "a\\|b&lt;c&gt;"
    assert inert("> quoted") == "&gt; quoted"
    assert inert("see http://x.y") == "see http&#58;//x.y"
    assert link("t", "https://huggingface.co/a/b") == "[t](https://huggingface.co/a/b)"
    assert link("t", "javascript:alert(1)") == "t"
    assert link("t", "https://a.b/c) [x](d") == "t"
    assert fenced(["````"], "sh").startswith("`````sh\n")
    assert table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "# no metadata",
        "---\nlicense: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: mit",
        "---\na: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_says_nothing(readme: str) -> None:
    found = with_metadata(Source("m", "org/m", "hf", None), metadata(readme))
    assert found.license is None
    assert obstacles(found) == ["org/m names no licence in its card: say which it is with --license"]


@pytest.mark.parametrize(
    ("data", "free"),
    [
        ({"license": "apache-2.0"}, True),
        ({"license": "Apache License 2.0"}, True),
        ({"license": ["mit"]}, True),
        ({"license": "cc-by-nc-4.0"}, False),
        ({"license": "cc-by-nd-4.0"}, False),
        ({"license": "llama3.2"}, False),
        ({"license": "gemma"}, False),
        ({"license": "other", "license_name": "tongyi-qianwen"}, False),
        ({"license": ["mit", "gemma"]}, False),
        ({"license": 7}, False),
    ],
)
def test_only_free_licences_pass_without_a_flag(data: Mapping[str, Any], free: bool) -> None:
    found = with_metadata(Source("m", "org/m", "hf", None), data)
    assert (obstacles(found) == []) == free
    gated = Source("m", "org/m", "hf", None, license="mit", gated=True)
    assert "is gated" in obstacles(gated)[0]


def test_what_another_package_packed_is_not_said_to_be_mmqs() -> None:
    """Put into this format twice: it still is the other package's, and no line of ours makes it from the base."""
    came = {"folder": "theirs", "format": "gptq", "digest": None}
    again = {"folder": "theirs-awq", "format": "awq", "digest": "d" * 64, "before": came}
    for before in (came, again):
        theirs = artifact(converted_from=before, format="compressed-tensors", calibration=None, quality=None)
        assert commands(theirs, SOURCE) == [
            "mmq convert theirs --format compressed-tensors",
            "mmq check theirs-compressed-tensors --base model",
        ]
        text = card(theirs, SOURCE, TOLD)
        assert "quantized by another package" in text
        for wrong in ("made by mmq", "mmq quantize", "The same bytes", "rounded without data", "awq, None"):
            assert wrong not in text
    mine = artifact(converted_from={"folder": "out-awq", "format": "awq", "digest": "d" * 64})
    assert commands(mine, SOURCE)[0].startswith("mmq quantize org/model")


@pytest.mark.parametrize(
    ("said", "languages"),
    [("no", ("no",)), ("[en, no, zh]", ("en", "no", "zh")), ("en", ("en",)), ("[5, EN, english]", ()), ("{a: b}", ())],
)
def test_the_bases_languages_are_taken_over(said: str, languages: tuple[str, ...]) -> None:
    found = with_metadata(SOURCE, metadata(f"---\nlanguage: {said}\nlicense: mit\n---\n"))
    assert (found.languages, found.license) == (languages, "mit")
    assert ModelCard(card(artifact(), found, TOLD)).data.to_dict().get("language") == (list(languages) or None)


def test_no_path_of_this_machine_is_published() -> None:
    local = {"model": "/home/me/secret/Qwen-mine", "hub": "local", "revision": None, "weight_bytes": 1}
    manifest = {**MANIFEST, "base": local, "recipe": {**MANIFEST["recipe"], "model": local["model"]}}
    manifest["calibration"] = {**MANIFEST["calibration"], "name": "/home/me/secret/photos.jsonl"}
    for source in (Source("Qwen-mine", None, "local", None), Source("Qwen-mine", "org/model", "hf", None)):
        told = public_manifest(manifest, source)
        assert "secret" not in str(told)
        assert told["base"]["model"] == (source.model or "Qwen-mine")
        assert told["calibration"]["name"] == "photos.jsonl"
        assert "secret" not in card(Artifact(Path("out"), manifest), source, TOLD)
    paths = ["/a/b c/d", "/my files/d", "/d", "~/x/y", "~me/x/y", "../me/x.jsonl", "./x/y", r"C:\me\z"]
    assert without_paths(paths) == ["d", "d", "d", "y", "y", "x.jsonl", "y", "z"]
    words = ["drawn", "a/b", "1/2", "~5 tokens/s", "/ or \\", "...", "left/right"]
    assert without_paths(words) == words

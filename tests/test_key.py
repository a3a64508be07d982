"""The key of an artifact: what changes it, what does not, and that it is known before anything is downloaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer, Repo, safetensors
from test_laws import imports

from mmq.export import key
from mmq.export.key import base_mark, key_before, key_of, quantizer
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Limits, recipe_for

PEBBLE = dataclasses.replace(recipe_for("pebble"), samples=2)


def digest(**changes: object) -> str:
    return key_before(dataclasses.replace(PEBBLE, **changes))[0]["digest"]


@pytest.mark.parametrize(
    "change",
    [{"method": "gptq"}, {"quality": "fast"}, {"group_size": 64}, {"samples": 3}, {"calibration": "text"}],
    ids=str,
)
def test_what_makes_other_bytes_makes_another_key(change: dict[str, object]) -> None:
    assert digest(**change) != digest()


def test_words_and_limits_make_no_other_bytes() -> None:
    assert digest(description="石子", version=2, limits=Limits(top1=0.5), card="8GiB", name="stone") == digest()


def test_another_quantizer_makes_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    monkeypatch.setattr(key, "quantizer", lambda: "0" * 12)
    assert digest() != before


def test_the_quantizers_sources_are_all_that_writes() -> None:
    """What `export.make` imports of its room, one by one, is what decides an artifact's bytes."""
    todo, found = ["export.make"], set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [i.target for i in imports(name) if not i.outside and i.target.startswith("export.")]
    beside = {"alone", "artifact", "key", "manifest", "marks"}  # the folder, this digest, what an unfinished run leaves
    assert {name.removeprefix("export.") for name in found} - beside == set(key.WRITES)
    assert len(quantizer()) == 12


def test_an_artifact_carries_the_key_that_was_told_before(artifact: Callable[..., Path]) -> None:
    manifest = json.loads((artifact("awq") / "mmq.json").read_text(encoding="utf-8"))
    recipe = dataclasses.replace(recipe_for("pebble"), samples=48)
    assert manifest["key"] == key_before(recipe)[0]


def test_a_base_on_a_hub_is_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    files = {"config.json": b"{}", "model.safetensors": safetensors({"a": 8})}
    repo = Repo({"1" * 40: files, "2" * 40: files}, {"main": "1" * 40})
    recipe = dataclasses.replace(PEBBLE, model="owner/model")
    with HubServer({"owner/model": repo}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        first, commit = key_before(recipe)
        assert commit == "1" * 40
        assert hub.got() == []  # nothing was downloaded
        repo.branches["main"] = "2" * 40
        second, commit = key_before(recipe)
        assert commit == "2" * 40
        assert first["digest"] != second["digest"]
        assert key_before(dataclasses.replace(recipe, revision="1" * 40))[0] == first


def test_a_local_base_is_its_files(pebble: Path, tmp_path: Path) -> None:
    for file in pebble.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = base_mark(fetch(str(tmp_path)), "")
    assert str(tmp_path) not in before  # manifests are published
    (tmp_path / "README.md").write_text("no part of what is made")
    assert base_mark(fetch(str(tmp_path)), "") == before
    (tmp_path / "chat_template.jinja").write_text((tmp_path / "chat_template.jinja").read_text() + "\n")
    after = base_mark(fetch(str(tmp_path)), "")
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    assert len({before, after, base_mark(fetch(str(tmp_path)), "")}) == 3
    assert key_of(PEBBLE, before, None)["digest"] != key_of(PEBBLE, before, "0")["digest"]


def test_another_family_than_the_recipes_is_refused(tmp_path: Path) -> None:
    from mmq.export.make import make

    recipe = dataclasses.replace(PEBBLE, family="llava")
    with pytest.raises(ValueError, match="pebble is of family qwen2_vl, its recipe says llava; name the model"):
        make(recipe, fetch("pebble"), tmp_path / "out", samples=[], calibration="drawn")
    assert not (tmp_path / "out").exists()

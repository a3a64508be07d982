"""A run that was killed is taken up and gives the bytes of one that was not; one that cannot be says what changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmq.export import make as making
from mmq.export.artifact import MANIFEST, UNFINISHED, Artifact, open_artifact, prepare
from mmq.export.make import make
from mmq.export.marks import PACES, keep_pace, paces
from mmq.export.summary import facts, rows
from mmq.quantize.memory import Memory, Workload, gpu_bytes, within
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import Base, fetch
from mmq.recipes.progress import Step, Tell, silent
from mmq.recipes.recipe import recipe_for

SAMPLES = 4


@pytest.mark.timeout(600)
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL at 20 random moments and more, and at every file before it gets its name; started again each time until
    it finishes. Every artifact has the digest, over every file's sha256, of a run that nobody killed."""
    script = Path(__file__).parent / "killed.py"
    run = subprocess.run([sys.executable, script, tmp_path, "0"], capture_output=True, text=True, timeout=590)
    assert run.returncode == 0, run.stderr[-2000:]
    facts = json.loads(run.stdout)
    assert len(facts["kills"]) >= 20
    assert len({tuple(k) for k in facts["kills"]}) >= 5  # not always at the same place
    assert facts["at files"] >= 8
    assert {method for method, _ in facts["made"]} == {"awq", "gptq"}
    assert all(digest == facts["digests"][method] for method, digest in facts["made"])


def quantize(
    out: Path, *, tell: Tell = silent, base: Base | None = None, samples: int = SAMPLES, **changes: Any
) -> Artifact:
    """Pebble, or another base, into `out`."""
    overwrite = changes.pop("overwrite", False)
    recipe = dataclasses.replace(recipe_for("pebble"), **changes)
    return make(
        recipe,
        base or fetch("pebble"),
        out,
        samples=drawn(samples),
        calibration="drawn",
        tell=tell,
        overwrite=overwrite,
    )


def stopped_after(layers: int, out: Path, **options: Any) -> Path:
    """A run interrupted when so many layers were done."""

    def stop(step: Step) -> None:
        if step.name == "layer" and step.done == layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(out, tell=stop, **options)
    assert (out / UNFINISHED).is_file()
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize(tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def nearly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has come to its manifest; copy it."""
    out = tmp_path_factory.mktemp("nearly") / "out"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(out)
    return out


@pytest.fixture
def copied(tmp_path: Path) -> Base:
    """Pebble in a folder of its own."""
    return fetch(str(shutil.copytree(fetch("pebble").path, tmp_path / "base")))


def touch_weights(base: Path) -> None:
    (base / "model.safetensors").touch()


def change_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "use_cache": False}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"group_size": 64}, "recipe.group_size: was 128, now 64"),
        (
            {"quality": "best", "keep": ("model.layers.1",)},
            'recipe.quality: was default, now best; recipe.keep: was [], now ["',
        ),
        ({"method": "gptq"}, "recipe.method: was awq, now gptq"),
        ({"samples": 3}, "calibration: was "),
    ],
)
def test_other_options_are_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    out = stopped_after(1, tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished run with other options") as caught:
        quantize(out, **changes)
    assert told in str(caught.value)
    assert str(caught.value).endswith("--overwrite starts anew")
    assert str(caught.value).count("was") == str(caught.value).count("now") == told.count("was")


@pytest.mark.parametrize(
    ("change", "told"),
    [(touch_weights, "base.tensors.model.safetensors: was "), (change_config, "base.config: was ")],
)
def test_another_base_is_told(tmp_path: Path, copied: Base, change: Callable[[Path], None], told: str) -> None:
    out = stopped_after(1, tmp_path / "out", base=copied)
    change(copied.path)
    with pytest.raises(ValueError, match="unfinished run with other options") as caught:
        quantize(out, base=copied)
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["device", "versions.torch", "versions.transformers", "versions.mmq"])
def test_another_machine_is_told(tmp_path: Path, key: str) -> None:
    """The folder comes from a run with a GPU, or with other versions."""
    out = stopped_after(1, tmp_path / "out")
    marks = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    *path, leaf = key.split(".")
    place = marks[path[0]] if path else marks
    now, place[leaf] = place[leaf], "something else"
    (out / UNFINISHED).write_text(json.dumps(marks), encoding="utf-8")
    with pytest.raises(ValueError, match="unfinished run with other options") as caught:
        quantize(out)
    assert f"({key}: was something else, now {now})" in str(caught.value)


def test_overwrite_starts_anew(tmp_path: Path, whole: Artifact) -> None:
    """Also where the same run could be taken up."""
    out = stopped_after(2, tmp_path / "out")
    heard: list[Step] = []
    assert quantize(out, overwrite=True, tell=heard.append).digest == whole.digest
    assert not any(s.note == "already done" for s in heard)


def test_only_the_rest_is_missing(tmp_path: Path, nearly: Path, whole: Artifact) -> None:
    """All layers done: they are not walked through again for it."""
    out = Path(shutil.copytree(nearly, tmp_path / "out"))
    rest = [p for p in out.glob("*.safetensors") if "-00006-of" in p.name]
    for path in (*rest, out / "config.json", out / "model.safetensors.index.json", out / "tokenizer.json"):
        path.unlink()
    heard: list[Step] = []
    assert quantize(out, tell=heard.append).digest == whole.digest
    assert not [s for s in heard if s.name in ("samples", "layer")]


@pytest.mark.parametrize("rest", [False, True])
def test_a_file_cut_short_is_made_again(tmp_path: Path, nearly: Path, whole: Artifact, rest: bool) -> None:
    """By a machine that lost its power: a run that is only killed leaves whole files."""
    out = Path(shutil.copytree(nearly, tmp_path / "out"))
    (file,) = out.glob(f"*-0000{6 if rest else 4}-of-00006.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert quantize(out).digest == whole.digest


def test_a_layer_without_its_note_is_made_again(tmp_path: Path, nearly: Path, whole: Artifact) -> None:
    """The note of one is missing, that of another damaged."""
    out = Path(shutil.copytree(nearly, tmp_path / "out"))
    notes = [out / f".mmq-layer-{i}.json" for i in range(5)]
    assert all(n.is_file() for n in notes)
    notes[1].unlink()
    notes[3].write_text('{"index": 3, "err', encoding="utf-8")
    heard: list[Step] = []
    made = quantize(out, tell=heard.append)
    walked = {s.done - 1: s.note == "already done" for s in heard if s.name == "layer"}
    assert walked == {0: True, 1: False, 2: True, 3: False}
    assert made.digest == whole.digest
    assert made.manifest["layers"] == whole.manifest["layers"]


def test_killed_before_its_marks_were_whole(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}.part").write_text('{"rec', encoding="utf-8")
    assert prepare(tmp_path, {"a": 1}) is False
    assert [p.name for p in tmp_path.iterdir()] == [UNFINISHED]


def test_killed_while_it_emptied_the_folder(tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """--overwrite over an artifact: what it has not yet taken away is nobody's finished layer."""
    out = Path(shutil.copytree(whole.path, tmp_path / "out"))
    unlink, count = Path.unlink, [0]

    def dies(path: Path, missing_ok: bool = False) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, {"a": 1}, overwrite=True)
    assert list(out.glob("*.safetensors"))
    assert not (out / MANIFEST).is_file()
    assert prepare(out, {"a": 1}) is False
    assert [p.name for p in out.iterdir()] == [UNFINISHED]


def test_killed_behind_its_manifest(tmp_path: Path, whole: Artifact) -> None:
    """The artifact is whole; what the run left beside it goes."""
    out = Path(shutil.copytree(whole.path, tmp_path / "out"))
    (out / UNFINISHED).write_text("{}", encoding="utf-8")
    (out / ".mmq-layer-4.json").write_text("{}", encoding="utf-8")
    assert open_artifact(out, verify=True).digest == whole.digest
    with pytest.raises(ValueError, match="it holds an artifact"):
        quantize(out)
    assert not list(out.glob(".mmq-*"))
    assert open_artifact(out, verify=True).digest == whole.digest


@pytest.mark.parametrize("quality", ["default", "best"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_same_twice(tmp_path: Path, method: str, quality: str) -> None:
    """The same recipe, seed and machine give the same bytes."""
    one, two = (quantize(tmp_path / str(i), method=method, quality=quality) for i in range(2))
    assert one.digest == two.digest
    assert one.manifest["layers"] == two.manifest["layers"]


def test_a_run_is_taken_up_at_its_own_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Artifact) -> None:
    """Begun with small micro-batches (on a smaller GPU, say), it goes on with them, and so to the same bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(making, "Memory", lambda: Memory(64))
        small = quantize(tmp_path / "small")
        out = stopped_after(2, tmp_path / "out")
    heard: list[Step] = []
    again = quantize(out, tell=heard.append)
    assert again.digest == small.digest
    assert again.manifest["paces"] == [{"micro_batch": 64, "park": False, "ranks": 1}]
    assert not [s for s in heard if s.name == "resume"]
    assert whole.manifest["paces"] == [{"micro_batch": 4096, "park": False, "ranks": 1}]


def test_another_pace_is_told(tmp_path: Path) -> None:
    """As many processes as before may not be there: the run goes on, says so, and the manifest keeps both."""
    out = stopped_after(2, tmp_path / "out")
    before = paces(out)[-1]
    (out / PACES).unlink()
    keep_pace(out, dataclasses.replace(before, ranks=2))
    heard: list[Step] = []
    made = quantize(out, tell=heard.append)
    (told,) = [s.note for s in heard if s.name == "resume"]
    assert "2 processes; now 4096 tokens a forward pass, 1 process: the same only within rounding" in told
    assert [p["ranks"] for p in made.manifest["paces"]] == [2, 1]
    assert ["taken up", "with another micro-batch or number of processes: the same only within rounding"] in rows(
        made, facts(made, seconds=1)
    )


def test_what_no_longer_fits_is_made_smaller() -> None:
    work = Workload(4096, 1024, 512, 3584, 2**30, 2**28, 28, (((3584,), 3584),), 2)
    needs = {size: gpu_bytes(work, "awq", "default", Memory(size)) for size in (2048, 1024, 512)}
    assert within(work, "awq", "default", needs[2048], first=Memory(2048)) == Memory(2048)
    assert within(work, "awq", "default", needs[2048] * 2, first=Memory(1024)) == Memory(1024)  # not larger again
    assert within(work, "awq", "default", needs[2048] - 1, first=Memory(2048)) != Memory(2048)


def test_damaged_paces_are_none(tmp_path: Path) -> None:
    (tmp_path / PACES).write_text('{"paces": [{"micro_batch": 1}]}', encoding="utf-8")
    assert paces(tmp_path) == ()
    assert paces(tmp_path / "nowhere") == ()

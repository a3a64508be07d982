"""Uploading through the real hub libraries to a loopback server that keeps what it is sent, and that fails: whatever
is cut or refused, nobody sees half a model, and starting again finishes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_keeper import SIGNED, TOKEN, Fail, HubKeeper, never
from hub_server import safetensors

from mmq.export.remote import Item, Target, differences, item, parse_target
from mmq.export.upload import DOORS, Published, look_at, upload

BESIDE = ("README.md", "check.json")
CARD = b"---\nlicense: mit\n---\n# A model\n"
MANIFEST = b'{"schema": 1}\n'
HUBS = ("hf", "modelscope")
ROUND = ("look", "create", "send", "tag")


def small(**more: bytes) -> dict[str, bytes]:
    """What a small artifact is: two blobs, one text large enough for ModelScope to store it apart, small texts."""
    return {
        "README.md": CARD,
        "check.json": b"{}",
        "config.json": b'{"model_type": "qwen2_vl"}',
        "mmq.json": MANIFEST,
        "model-00001-of-00002.safetensors": safetensors({"a": 20_000}),
        "model-00002-of-00002.safetensors": safetensors({"b": 30_000}),
        "tokenizer.json": b" " * 70_000,
        **more,
    }


def written(folder: Path, files: dict[str, bytes]) -> list[Item]:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [item(name, folder / name) for name in files]


def point(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str = TOKEN) -> None:
    """Both libraries, in this process, at the loopback hub: their own settings, and no real waiting between tries."""
    import huggingface_hub.utils._http as hf_http
    import modelscope_hub._legacy_api
    import modelscope_hub.config
    import urllib3.util.retry
    from huggingface_hub import constants

    import mmq.export.upload
    import mmq.export.upload_modelscope

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(home / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "modelscope-cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(modelscope_hub.config, "_default_config", None)
    for key, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # the server speaks LFS, which the library falls back to
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_CACHE": str(home / "hf"),
    }.items():
        monkeypatch.setattr(constants, key, value)
    quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    ours = (mmq.export.upload, mmq.export.upload_modelscope)
    for module in (hf_http, urllib3.util.retry, modelscope_hub._legacy_api, *ours):
        monkeypatch.setattr(module, "time", quick)


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubKeeper]:
    with HubKeeper() as server:
        point(monkeypatch, server.url, tmp_path)
        yield server


def put(target: Target, items: list[Item], *, tag: str = "v1", public: bool = False) -> Published:
    plan = look_at(target, items, tag=tag, public=public, beside=BESIDE)
    return upload(plan, items, public=public, message="a model", license="mit")


def half(keeper: HubKeeper, name: str, whole: dict[str, bytes]) -> str:
    """What is wrong with what everybody may see now; "" where it is nothing, or everything."""
    repo = keeper.repos.get(name)
    if repo is None:
        return ""
    if repo.public:
        return "it is public"
    for ref, commit in repo.branches.items():
        seen = {n: d for n, d in repo.commits[commit].items() if n != ".gitattributes"}
        if seen and seen != whole:
            return f"{ref} shows {sorted(seen)}"
    return ""


@pytest.mark.parametrize("hub", HUBS)
def test_everything_is_there_in_one_commit_private_and_tagged(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    items = written(tmp_path / "model", small())
    done = put(Target(hub, "me/model"), items)
    assert (
        keeper.files("me/model")
        == keeper.files("me/model", "v1")
        == small() | {".gitattributes": keeper.files("me/model")[".gitattributes"]}
    )
    repo = keeper.repos["me/model"]
    assert len(repo.commits) == 2
    assert not repo.public
    assert sorted(done.sent) == sorted(small())
    assert done.commit == repo.branches["main"]
    assert keeper.licenses.get("me/model", "mit") == "mit"
    assert keeper.tokens <= {TOKEN}


@pytest.mark.parametrize("hub", HUBS)
def test_a_second_run_sends_nothing(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    items = written(tmp_path / "model", small())
    put(Target(hub, "me/model"), items)
    keeper.calls.clear()
    done = put(Target(hub, "me/model"), items)
    assert (done.sent, done.dropped) == ((), ())
    assert [c for c in keeper.calls if not c.startswith("GET")] == []


@pytest.mark.parametrize("hub", HUBS)
def test_only_what_is_new_is_sent_and_what_is_gone_is_taken_away(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    put(Target(hub, "me/model"), written(tmp_path / "one", small()))
    newer = small(**{"model-00002-of-00002.safetensors": safetensors({"c": 30_001})})
    del newer["config.json"]
    newer["processor_config.json"] = b"{}"
    before = keeper.received
    done = put(Target(hub, "me/model"), written(tmp_path / "two", newer), tag="v2")
    assert sorted(done.sent) == ["model-00002-of-00002.safetensors", "processor_config.json"]
    assert done.dropped == ("config.json",)
    assert keeper.received - before == len(newer["model-00002-of-00002.safetensors"])
    assert {n: d for n, d in keeper.files("me/model", "v2").items() if n != ".gitattributes"} == newer
    assert keeper.files("me/model", "v1")["config.json"] == small()["config.json"]


@pytest.mark.parametrize("hub", HUBS)
def test_a_tag_never_moves_but_a_better_card_may_follow(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    put(Target(hub, "me/model"), written(tmp_path / "one", small()))
    first = keeper.repos["me/model"].branches["v1"]
    done = put(Target(hub, "me/model"), written(tmp_path / "two", small(**{"README.md": CARD + b"measured\n"})))
    assert done.sent == ("README.md",)
    assert keeper.repos["me/model"].branches["v1"] == first != keeper.repos["me/model"].branches["main"]
    with pytest.raises(ValueError, match="a tag never moves: raise the recipe's version"):
        put(Target(hub, "me/model"), written(tmp_path / "three", small(**{"config.json": b"{}"})))
    assert keeper.files("me/model")["config.json"] == small()["config.json"]


@pytest.mark.parametrize("hub", HUBS)
def test_anybodys_model_is_not_replaced(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    theirs = {"model.safetensors": b"theirs", "config.json": b"{}"}
    keeper.create("me/model", files=theirs)
    with pytest.raises(ValueError, match="holds files that mmq did not publish"):
        put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert keeper.files("me/model") == theirs


@pytest.mark.parametrize("hub", HUBS)
def test_a_repository_as_its_hub_makes_it_is_as_good_as_an_empty_one(
    hub: str, keeper: HubKeeper, tmp_path: Path
) -> None:
    born = {".gitattributes": b"lfs", "README.md": b"hello", "configuration.json": b"{}", "LICENSE": b"theirs"}
    keeper.create("me/model", files=born)
    done = put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert done.dropped == ("LICENSE",)
    whole = small() | {".gitattributes": b"lfs", "configuration.json": b"{}"}
    assert keeper.files("me/model", "v1") == whole
    assert put(Target(hub, "me/model"), written(tmp_path / "model", small())).sent == ()


@pytest.mark.parametrize("hub", HUBS)
def test_a_licence_that_somebody_put_there_stays(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    put(Target(hub, "me/model"), written(tmp_path / "one", small()))
    first = keeper.files("me/model")
    keeper.create(
        "me/licensed", files={**first, "LICENSE.txt": b"terms", "NOTICE": b"built with", "notes.txt": b"mine"}
    )
    done = put(Target(hub, "me/licensed"), written(tmp_path / "two", small(**{"config.json": b"{}"})))
    assert done.dropped == ("notes.txt",)
    assert keeper.files("me/licensed", "v1")["LICENSE.txt"] == b"terms"
    assert put(Target(hub, "me/licensed"), written(tmp_path / "two", small(**{"config.json": b"{}"}))).sent == ()


@pytest.mark.parametrize("hub", HUBS)
def test_who_sees_it_is_as_asked_or_nothing_happens(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    items = written(tmp_path / "model", small())
    put(Target(hub, "me/open"), items, public=True)
    assert keeper.repos["me/open"].public
    keeper.create("me/seen", public=True)
    with pytest.raises(ValueError, match="is public, and mmq does not change who sees a repository: say --public"):
        put(Target(hub, "me/seen"), items)
    keeper.create("me/hidden")
    with pytest.raises(ValueError, match=r"is private.*leave --public out"):
        put(Target(hub, "me/hidden"), items, public=True)
    assert [len(keeper.repos[name].commits) for name in ("me/seen", "me/hidden")] == [1, 1]


@pytest.mark.parametrize("hub", HUBS)
def test_without_a_token_nothing_is_asked(
    hub: str, keeper: HubKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point(monkeypatch, keeper.url, tmp_path, token="")
    with pytest.raises(OSError, match=r"needs a token: log in with `(hf auth|modelscope) login` or set"):
        put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert keeper.calls == []


def from_then_on(number: int, how: int | str) -> Fail:
    return lambda at, method, path: how if at >= number else None


def requests_of_a_whole_run(keeper: HubKeeper, hub: str, items: list[Item]) -> int:
    put(Target(hub, "me/zeroth"), items)  # a library asks some things once in a process
    keeper.blobs.clear()
    before = keeper.number
    put(Target(hub, "me/first"), items)
    asked = keeper.number - before
    keeper.blobs.clear()  # so that the next run sends them again
    return asked


FAILURES = ("before", "after", 401, 500, *(pytest.param(n, marks=pytest.mark.slow) for n in (403, 409, 429, 507)))
WORDS = {
    401: "refuses the token",
    403: "does not let this token write to me/model",
    409: "has changed meanwhile",
    413: "too large",
    429: "is asked too often",
    507: "has no room left",
}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("hub", HUBS)
def test_cut_or_refused_at_any_request_nothing_is_half_there_and_the_retry_finishes(
    hub: str, how: int | str, keeper: HubKeeper, tmp_path: Path
) -> None:
    items = written(tmp_path / "model", small())
    count = requests_of_a_whole_run(keeper, hub, items)
    assert count >= 8
    for number in range(count):
        name = f"me/m{number}"
        keeper.blobs.clear()
        keeper.fail = from_then_on(keeper.number + number, how)
        with pytest.raises(OSError, match=r"run again|try again|token|room|asked too often|not tell|lost") as failed:
            put(Target(hub, name), items)
        told = str(failed.value)
        assert "\n" not in told
        assert not [secret for secret in (TOKEN, SIGNED, "signedAddress") if secret in told], told
        assert half(keeper, name, small()) == "", f"request {number} of {count}"
        keeper.fail = never
        put(Target(hub, name), items)
        assert {n: d for n, d in keeper.files(name, "v1").items() if n != ".gitattributes"} == small()
        assert len(keeper.repos[name].commits) == 2, f"request {number}: more than one commit"


@pytest.mark.parametrize("status", list(WORDS))
@pytest.mark.parametrize("hub", HUBS)
def test_each_refusal_of_the_commit_has_its_words(hub: str, status: int, keeper: HubKeeper, tmp_path: Path) -> None:
    keeper.fail = lambda number, method, path: status if "/commit/" in path else None
    with pytest.raises(OSError, match=WORDS[status]):
        put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert half(keeper, "me/model", small()) == ""


@pytest.mark.parametrize("how", ["before", "after", 429, 500])
@pytest.mark.parametrize("hub", HUBS)
def test_what_fails_once_is_tried_again_or_told(hub: str, how: int | str, keeper: HubKeeper, tmp_path: Path) -> None:
    items = written(tmp_path / "model", small())
    count, finished = requests_of_a_whole_run(keeper, hub, items), 0
    for number in range(count):
        name, at = f"me/m{number}", keeper.number + number
        keeper.blobs.clear()
        keeper.fail = lambda now, method, path, at=at: how if now == at else None
        try:
            put(Target(hub, name), items)
            finished += 1
        except OSError:
            assert half(keeper, name, small()) == ""
            put(Target(hub, name), items)
        assert half(keeper, name, small()) == ""
        assert keeper.files(name, "v1")["mmq.json"] == MANIFEST
        assert len(keeper.repos[name].commits) == 2
    assert finished >= 3  # the libraries ask again for what changes nothing, and mmq looks whether a commit arrived


@pytest.mark.parametrize("hub", HUBS)
def test_a_commit_whose_answer_is_lost_is_found(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    lost: list[str] = []

    def fail(number: int, method: str, path: str) -> str | None:
        if "/commit/" in path and not lost:
            lost.append(path)
            return "after"
        return None

    keeper.fail = fail
    done = put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert lost
    assert len(keeper.repos["me/model"].commits) == 2
    assert done.commit == keeper.repos["me/model"].branches["main"]


@pytest.mark.parametrize("hub", HUBS)
def test_a_full_hub_says_so(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    keeper.room = 25_000
    with pytest.raises(OSError, match=r"no (room|storage) left"):
        put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert half(keeper, "me/model", small()) == ""
    keeper.room = 1 << 40
    put(Target(hub, "me/model"), written(tmp_path / "model", small()))


def test_where_xet_fails_nothing_is_half_there(
    keeper: HubKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hf-xet the library sends large files by it alone; this hub has none, and says 404 to the first question."""
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    items = written(tmp_path / "model", small())
    with pytest.raises(OSError, match="run again") as failed:
        put(Target("hf", "me/model"), items)
    assert any("xet-write-token" in call for call in keeper.calls)
    assert TOKEN not in str(failed.value)
    assert half(keeper, "me/model", small()) == ""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    put(Target("hf", "me/model"), items)


@pytest.mark.parametrize("hub", HUBS)
def test_a_slow_hub_is_waited_for(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    keeper.fail = lambda number, method, path: "slow"
    put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert half(keeper, "me/model", small()) == ""


def test_a_large_file_goes_in_parts(keeper: HubKeeper, tmp_path: Path) -> None:
    keeper.part = 12_345
    put(Target("hf", "me/model"), written(tmp_path / "model", small()))
    assert keeper.files("me/model")["model-00002-of-00002.safetensors"] == safetensors({"b": 30_000})
    assert sum("/blob/" in c for c in keeper.calls) >= 4


def test_someone_elses_commit_in_between_is_not_overwritten(keeper: HubKeeper, tmp_path: Path) -> None:
    """The Hugging Face Hub takes a commit on its parent alone."""
    items = written(tmp_path / "model", small())
    plan = look_at(Target("hf", "me/model"), items, tag="v1", public=False, beside=BESIDE)
    assert plan.there is None
    keeper.create("me/model")
    plan = look_at(Target("hf", "me/model"), items, tag="v1", public=False, beside=BESIDE)
    keeper.commit(keeper.repos["me/model"], {"theirs.txt": b"theirs"})
    with pytest.raises(OSError, match="has changed meanwhile"):
        upload(plan, items, public=False, message="a model", license=None)
    assert keeper.files("me/model") == {"theirs.txt": b"theirs"}


@pytest.mark.parametrize("hub", HUBS)
def test_bytes_that_arrive_wrong_are_found_by_reading_back(
    hub: str, keeper: HubKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keeper.commit

    def spoiled(repo, files: dict[str, bytes]) -> str:
        return kept(repo, {**files, "config.json": b'{"model_type": "qwen2_vI"}'})

    monkeypatch.setattr(keeper, "commit", spoiled)
    with pytest.raises(OSError, match=r"does not read back as it was sent \(config.json"):
        put(Target(hub, "me/model"), written(tmp_path / "model", small()))
    assert "v1" not in keeper.repos["me/model"].branches


SCRIPT = """
import sys
from pathlib import Path
from mmq.export.remote import item, parse_target
from mmq.export.upload import look_at, upload
folder = Path(sys.argv[2])
items = [item(p.name, p) for p in sorted(folder.iterdir())]
plan = look_at(parse_target(sys.argv[1]), items, tag="v1", public=False, beside=[])
upload(plan, items, public=False, message="a model", license="mit")
"""


def environment(keeper: HubKeeper, home: Path, **more: str) -> dict[str, str]:
    ours = ("HF_", "HUGGING", "MODELSCOPE_", "MMQ_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
    return {
        **kept,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": keeper.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "MODELSCOPE_ENDPOINT": keeper.url,
        "MODELSCOPE_HOME": str(home / "ms"),
        "MODELSCOPE_CACHE": str(home / "ms-cache"),
        "MODELSCOPE_API_TOKEN": TOKEN,
        **more,
    }


@pytest.mark.parametrize("hub", HUBS)
def test_killed_in_the_middle_it_is_started_again(hub: str, keeper: HubKeeper, tmp_path: Path) -> None:
    whole = small(**{"model-00003-of-00003.safetensors": safetensors({"c": 8 << 20})})
    items = written(tmp_path / "model", whole)
    last = items[-1].sha256
    keeper.fail = lambda number, method, path: "slow" if last in path and method == "PUT" else None
    command = [sys.executable, "-c", SCRIPT, f"{hub}:me/model", str(tmp_path / "model")]
    with subprocess.Popen(command, env=environment(keeper, tmp_path), stderr=subprocess.PIPE) as process:
        assert keeper.stalled.wait(timeout=60)
        until = time.monotonic() + 10
        while len(keeper.blobs) < 2 and time.monotonic() < until:  # the others arrive meanwhile, from other threads
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    keeper.fail = never
    assert half(keeper, "me/model", whole) == ""
    there = set(keeper.blobs)
    before = keeper.received
    put(Target(hub, "me/model"), items)
    assert {n: d for n, d in keeper.files("me/model").items() if n != ".gitattributes"} == whole
    assert keeper.received - before == sum(one.size for one in items if one.sha256 in set(keeper.blobs) - there)
    assert there  # what had arrived was not sent again


def test_a_hubs_own_words_are_one_harmless_line() -> None:
    from mmq.recipes.remote import clean

    said = f"no {TOKEN}\n\x1b[2J see https://x.y/z?{SIGNED} or /blob?{SIGNED}, my-very-own-secret hf_abcdefghijk"
    told = clean(said, "my-very-own-secret")
    assert told == clean(told)
    for gone in (TOKEN, "Signature", "\x1b", "\n", "https:", "own-secret", "hf_abc"):
        assert gone not in told
    assert len(clean("x" * 9000)) == 300


def test_names_of_places() -> None:
    assert parse_target("hf:org/a.name-1") == Target("hf", "org/a.name-1")
    for wrong in ("org/name", "hf:name", "gitlab:a/b", "hf:a/b/c", "hf:../b", "hf:a/ b", "modelscope:", "hf:a/\n"):
        with pytest.raises(ValueError, match="is no place to publish to; write hf:OWNER/NAME"):
            parse_target(wrong)


def test_a_hash_that_the_hub_does_not_tell_is_not_taken_for_granted(tmp_path: Path) -> None:
    from mmq.export.remote import Kept, There, same

    one = written(tmp_path / "m", {"a.txt": b"hello"})[0]
    git = hashlib.sha1(b"blob 5\0hello", usedforsecurity=False).hexdigest()
    assert same(one, Kept(5, None, git))
    assert same(one, Kept(5, one.sha256))
    assert not same(one, Kept(5))
    assert not same(one, Kept(6, one.sha256))
    assert not same(one, None)
    assert differences([one], There("c", False, {"a.txt": Kept(5), "b": Kept(1)})) == ([one], ["b"])


def test_every_door_has_every_step() -> None:
    assert set(DOORS) == set(HUBS)
    for door in DOORS.values():
        assert all(isinstance(getattr(door, step), Callable) for step in ROUND)

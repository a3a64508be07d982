"""Who may ask a server and what it lets in: options as the guard's settings, a key that is shown nowhere."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmq.serve.flags import Launch, shell_line
from mmq.serve.inside.mmq_frames import Frames, taken
from mmq.serve.safety import INSIDE, MIB, Safety, guarded, key_of

BARE = Launch(
    ("/e/bin/vllm", "serve", "m"), {"A": "1"}, (("A=1", "why"),), "http://127.0.0.1:8", "m", "127.0.0.1", 8, "cpu"
)
WIDE = Launch(("/e/bin/vllm", "serve", "m"), {}, (), "http://127.0.0.1:8", "m", "0.0.0.0", 8, "cpu")


def settings(launch: Launch) -> dict[str, Any]:
    return json.loads(launch.env["MMQ_GUARD"])


def test_the_guard_stands_before_every_engine() -> None:
    for engine in ("vllm", "pytorch", "lmdeploy"):
        found = guarded(engine, BARE, environ={"PYTHONPATH": "/mine"})
        assert found.env["PYTHONPATH"] == f"{INSIDE}:/mine"
        assert settings(found)["max_body"] == 64 * MIB
        assert found.env["A"] == "1"
        assert set(dict(found.reasons)) >= {f"{k}={v}" for k, v in found.env.items()}
    vllm = guarded("vllm", BARE, environ={})
    assert vllm.argv[3:5] == ("--middleware", "mmq_guard.Guard")
    assert vllm.env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert (INSIDE / "mmq_guard.py").is_file()


def test_the_guard_is_told_how_many_frames_of_a_video_the_engine_takes() -> None:
    def found(engine: str, *extra: str) -> Frames:
        return Frames(**settings(guarded(engine, BARE, extra=extra, environ={})).get("frames", {}))

    assert found("vllm") == Frames()
    assert found("lmdeploy") == Frames(rate=0)
    assert taken(found("pytorch"), 5000, 30) == 5000
    assert taken(found("vllm", "--media-io-kwargs", '{"video": {"fps": 1}}'), 9000, 30) == 300
    assert taken(found("vllm", '--media-io-kwargs={"video": {"num_frames": -1}}'), 9000, 30) == 9000
    for other in ("{", "[]", '{"video": 1}', '{"image": {}}', "null"):
        assert found("vllm", "--media-io-kwargs", other) == Frames()


def test_pictures_come_from_the_web_only_where_nobody_else_can_ask() -> None:
    near, wide = guarded("vllm", BARE, environ={}), guarded("vllm", WIDE, environ={})
    assert settings(near)["domains"] is None
    assert settings(near)["hosts"] == ["127.0.0.1", "localhost", "::1"]
    assert settings(wide)["domains"] == []
    assert "hosts" not in settings(wide)
    some = Safety(media_domains=("A.org.", "*.图片.cn"), media_networks=("10.0.0.0/8",))
    for launch in (BARE, WIDE):
        found = settings(guarded("vllm", launch, some, environ={}))
        assert found["domains"] == ["a.org", "." + "图片.cn".encode("idna").decode()]
        assert found["networks"] == ["10.0.0.0/8"]
        assert settings(guarded("vllm", launch, Safety(media_domains=("any",)), environ={}))["domains"] is None
        assert settings(guarded("vllm", launch, Safety(media_domains=("none",)), environ={}))["domains"] == []


def test_wide_without_a_key_warns_with_the_remedy() -> None:
    warned = dict(guarded("vllm", WIDE, environ={}).reasons)["no API key"]
    assert warned.startswith("WARNING")
    assert "MMQ_API_KEY" in warned
    assert "--api-key-file" in warned
    assert "no API key" not in dict(guarded("vllm", BARE, environ={}).reasons)
    assert "no API key" not in dict(guarded("vllm", WIDE, environ={"VLLM_API_KEY": "k"}).reasons)


def test_a_key_goes_by_the_environment_and_is_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "the key"
    file.write_text("s3cret\n")
    for safety, environ, source in (
        (Safety(), {"MMQ_API_KEY": "s3cret", "VLLM_API_KEY": "other"}, "$MMQ_API_KEY"),
        (Safety(), {"VLLM_API_KEY": "s3cret"}, "$VLLM_API_KEY"),
        (Safety(api_key_file=file), {"MMQ_API_KEY": "other"}, f"$(cat {shlex.quote(str(file))})"),
    ):
        found = guarded("vllm", WIDE, safety, environ=environ)
        assert {name: secret.value for name, secret in found.secrets.items()} == {
            "MMQ_API_KEY": "s3cret",
            "VLLM_API_KEY": "s3cret",
        }
        assert "s3cret" not in repr(found) + shell_line(found)
        assert f'MMQ_API_KEY="{source}"' in shell_line(found)
    assert not settings(guarded("vllm", BARE, Safety(api_key_file=file), environ={})).get("hosts")


def test_a_key_from_a_pipe() -> None:
    """`--api-key-file <(pass show key)`: a name under /dev/fd that leads to no file, and can be read once."""
    reader, writer = os.pipe()
    os.write(writer, b"s3cret\n")
    os.close(writer)
    asked = Safety(api_key_file=Path(f"/dev/fd/{reader}"))
    try:
        found = key_of(asked, {})
        assert found is not None
        assert found.value == "s3cret"
        with pytest.raises(ValueError, match="is a pipe that is empty, or was read already"):
            key_of(asked, {})
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", ValueError), (b"a b", ValueError), ("ключ".encode(), ValueError), (b"\xff", ValueError)],
)
def test_a_key_that_no_header_can_carry(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(error, match=str(file)) as caught:
        guarded("vllm", BARE, Safety(api_key_file=file), environ={})
    assert "ключ" not in str(caught.value)
    with pytest.raises(OSError, match="cannot be read: No such file"):
        guarded("vllm", BARE, Safety(api_key_file=tmp_path / "none"), environ={})


@pytest.mark.parametrize(
    ("extra", "remedy"),
    [
        (("--api-key", "s3cret"), "MMQ_API_KEY"),
        (("--api_key=s3cret",), "--api-key-file"),
        (("--api-keys", "s3cret"), "MMQ_API_KEY"),
        (("--hf-token", "s3cret"), "HF_TOKEN"),
        (("--api-k", "s3cret"), "MMQ_API_KEY"),  # as argparse takes it too
        (("--api-k=s3cret",), "MMQ_API_KEY"),
        (("--grpc",), "gRPC"),
        (("--uds", "/tmp/socket"), "--host and --port"),
        (("--ssl-keyfile=a", "--ssl-certfile=b"), "without TLS"),
        (("--config", "vllm.yaml"), "none of it"),
        (("--allowed-local", "/"), "--media-folder"),
        (("--allowed-media-domains", "a.org"), "--media-domain"),
        (("--allowed-local-media-path=/"), "--media-folder"),
        (("--host", ""), "0.0.0.0"),  # every machine, to some engines
        (("--host="), "0.0.0.0"),
    ],
)
def test_what_may_not_be_typed_for_the_engine(extra: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as caught:
        guarded("vllm", BARE, extra=(extra,) if isinstance(extra, str) else extra, environ={})
    assert "s3cret" not in str(caught.value)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    wrong: tuple[Callable[[], object], ...] = (
        lambda: Safety(max_body=0),
        lambda: Safety(max_media=-1),
        lambda: Safety(grace=-1),
        lambda: Safety(media_domains=("https://a.org",)),
        lambda: Safety(media_domains=("a.org:80",)),
        lambda: Safety(media_networks=("10.0.0.1.5",)),
        lambda: Safety(media_folder=tmp_path / "none"),
        lambda: guarded("vllm", BARE, Safety(media_domains=("a" * 70 + ".org",)), environ={}),
        lambda: guarded("vllm", BARE, environ={"VLLM_USE_RUST_FRONTEND": "1"}),
    )
    for make in wrong:
        with pytest.raises(ValueError, match=r"--m|host|RUST"):
            make()


def test_the_grace_is_the_launchs() -> None:
    assert guarded("vllm", BARE, environ={}).grace == 0
    assert guarded("pytorch", BARE, Safety(grace=30), environ={}).grace == 30

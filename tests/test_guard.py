"""The guard of a server, before a real one (uvicorn) that echoes what was let in; the web is one of the tests' own."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import http.client
import http.server
import importlib
import io
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guarding import FILM, FORBIDDEN, PICTURE, asking, bomb, moving, picture, png, web
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

INSIDE = Path(__file__).resolve().parent.parent / "serve" / "inside"
PIXEL = base64.b64encode(png(1, 1)).decode()
LOCAL = ("127.0.0.0/8",)


@pytest.fixture(scope="module")
def guard() -> Iterator[Any]:
    """The module as an engine imports it: its folder on the path, mmq not in sight."""
    sys.path.insert(0, str(INSIDE))
    try:
        yield importlib.import_module("mmq_guard")
    finally:
        sys.path.remove(str(INSIDE))


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers 200 with the body that it was given."""
    body = b""
    while scope["type"] == "http":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    assert len(body) == int(dict(scope["headers"]).get(b"content-length", b"0"))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def serve(guard: Any) -> Iterator[Callable[..., Client]]:
    """`serve(key=None, **settings)`: a guarded echo under uvicorn, and a client of it."""
    uvicorn = pytest.importorskip("uvicorn")
    servers = []

    def start(key: str | None = None, **settings: Any) -> Client:
        app = guard.Guard(echo, guard.Settings(**settings), key)
        config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        return Client(server.servers[0].sockets[0].getsockname()[1], app)

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(5)


class Client:
    """Asks the server at a port of loopback."""

    def __init__(self, port: int, app: Any) -> None:
        self.port, self.app = port, app

    def send(self, body: Any, *, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, str]:
        """(status, text). A dict is sent as JSON; chunks of an iterator are sent chunked."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, data, {"Content-Type": "application/json"} | named)
        reply = connection.getresponse()
        try:
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def refused(self, body: Any, **headers: str) -> str:
        """What a 400 says."""
        status, text = self.send(body, **headers)
        assert status == 400, text
        return json.loads(text)["error"]["message"]


def test_it_stands_alone_and_loads_fast() -> None:
    own = {path.stem for path in INSIDE.glob("mmq_*.py")} - {"mmq_lmdeploy"}
    for path in (INSIDE / f"{name}.py" for name in own):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= {*sys.stdlib_module_names, *own, "PIL", "cv2"}, path
    code = "import time; t = time.process_time(); import mmq_guard; print(time.process_time() - t)"
    runs = [
        subprocess.run([sys.executable, "-S", "-c", code], cwd=INSIDE, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 0.5


def test_other_forms_arrive_as_openais(serve: Callable[..., Client]) -> None:
    client = serve()
    url = f"data:image/png;base64,{PIXEL}"
    image = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "what?"}
    for content, beside in (
        ([{"type": "image", "image": url}, text], {}),
        ([{"type": "image_url", "image_url": url}, text], {}),
        ("<image>what?", {"images": [url]}),
        ("what?", {"images": [{"url": url}]}),
        ([{"type": "image"}, text], {"images": url}),
    ):
        status, got = client.send({"messages": [{"role": "user", "content": content}], "n": 1} | beside)
        assert (status, json.loads(got)) == (200, {"messages": [{"role": "user", "content": [image, text]}], "n": 1})
    anthropic = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    body = json.dumps({"messages": [{"role": "user", "content": [anthropic]}]})
    assert client.send(body.encode()) == (200, body)
    there = {"messages": [{"role": "user", "content": "<image><image>"}], "images": [url]}
    assert "more <image> tags" in client.refused(there)
    assert "images must be a list" in client.refused(there | {"images": [3]})
    sized = {"type": "image", "image": url, "max_pixels": 1}
    assert "max_pixels of a part" in client.refused({"messages": [{"role": "user", "content": [sized]}]})


def test_what_is_fine_arrives_as_it_was_sent(serve: Callable[..., Client]) -> None:
    client = serve()
    for body in (
        b'{"messages":  [{"role": "user", "content": "\xe4\xbd\xa0\xe5\xa5\xbd"}]}',
        json.dumps(asking(f"data:image/png;base64,{PIXEL}")).encode(),
        json.dumps({"tools": [{"parameters": {"properties": {"image": {"type": "string"}}, "image": "x"}}]}).encode(),
        json.dumps({"audio": {"voice": "a", "format": "wav"}, "images": [], "prompt": "a.png"}).encode(),
        b"",
    ):
        assert client.send(body) == (200, body.decode())
    upload = b"--x\r\n\r\nhttp://127.0.0.1/\r\n--x--"
    assert client.send(upload, Content_Type="multipart/form-data; boundary=x")[0] == 200


def test_a_body_is_counted_as_it_comes(serve: Callable[..., Client]) -> None:
    client = serve(max_body=1 << 20)
    assert client.send(b'"' + b"x" * ((1 << 20) - 2) + b'"')[0] == 200
    assert client.send(b"x" * (1 << 20) + b"y")[0] == 413  # told by its length

    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(256):
            sent += 1 << 18
            yield b"x" * (1 << 18)

    for connection in ("keep-alive", "close"):
        sent = 0
        status, text = client.send(endless(), Connection=connection)  # in chunks: no length is told
        assert (status, sent) == (413, 64 << 20)
        assert "1 MiB" in json.loads(text)["error"]["message"]
    assert client.app.arriving == 0
    assert client.send({})[0] == 200


@pytest.mark.parametrize("body", [b"{", b"{'a': 1}", b"\xff\xfe\xfa", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"])
def test_broken_json(serve: Callable[..., Client], body: bytes) -> None:
    assert "JSON" in serve().refused(body)


def test_a_request_has_so_many_media(serve: Callable[..., Client]) -> None:
    client = serve(max_media=5)
    good = f"data:image/png;base64,{PIXEL}"
    assert client.send(asking(*[good] * 5))[0] == 200
    assert "5 pictures" in client.refused(asking(*[good] * 6))
    assert "5 pictures" in client.refused({"images": [good] * 10_000})


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,%%%%",
        "data:image/png;base64,abc",  # not padded
        "data:image/png;base64,",
        "data:image/png,raw",
        "data:",
        "DATA:image/png;base64,?",
        "data:video/jpeg;base64,QUJD,%%",
    ],
)
def test_broken_base64(serve: Callable[..., Client], url: str) -> None:
    client = serve()
    client.refused(asking(url))
    client.refused({"input": [{"content": [{"type": "input_image", "image_url": url}]}]})
    if "," in url and "jpeg" not in url:
        source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2] or "%"}
        if source["data"] != "raw":
            client.refused({"messages": [{"content": [{"type": "image", "source": source}]}]})


def test_what_is_no_picture(serve: Callable[..., Client], tmp_path: Path) -> None:
    client = serve(folder=str(tmp_path))
    for data, said in (
        (b"%PDF", "no picture"),
        (bomb(20_000, 20_000), "178956970 pixels"),
        (png(3, 3)[:20], "no pict"),
    ):
        assert said in client.refused(asking(f"data:image/png;base64,{base64.b64encode(data).decode()}"))
        (tmp_path / "x.png").write_bytes(data)
        assert said in client.refused(asking((tmp_path / "x.png").as_uri()))


def test_a_picture_is_looked_at_however_it_is_sent(serve: Callable[..., Client]) -> None:
    client = serve()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n"  # PIL runs gs for such
    with Image.open(io.BytesIO(script)) as known:
        assert known.format == "EPS"
    for data, said in ((bomb(20_000, 20_000), "178956970 pixels"), (script, "no picture that can be read, of PNG")):
        text = base64.b64encode(data).decode()
        source = {"type": "base64", "media_type": "image/png", "data": text}
        assert said in client.refused(asking(f"data:image/png;base64,{text}"))
        assert said in client.refused({"messages": [{"content": [{"type": "image", "source": source}]}]})
        assert said in client.refused(asking(f"data:video/jpeg;base64,{PIXEL},{text}", kind="video_url"))
    tensor = {"type": "image_embeds", "image_embeds": base64.b64encode(b"no picture").decode()}
    assert client.send({"messages": [{"content": [tensor]}]})[0] == 200


def test_pictures_that_are_large_together(serve: Callable[..., Client], tmp_path: Path) -> None:
    client = serve(folder=str(tmp_path))
    large = bomb(13_000, 13_000)  # 169 million pixels: seven of them are past 2**30
    (tmp_path / "x.png").write_bytes(large)
    sent = f"data:image/png;base64,{base64.b64encode(large).decode()}"
    assert client.send(asking(*[sent] * 6))[0] == 200
    for urls in ([sent] * 7, [sent] * 4 + [(tmp_path / "x.png").as_uri()] * 3):
        status, text = client.send(asking(*urls))
        assert (status, "1073741824 pixels together" in text) == (413, True)
    frames = ",".join([sent.partition(",")[2]] * 7)
    assert client.send(asking(f"data:video/jpeg;base64,{frames}", kind="video_url"))[0] == 413


SHAPES: tuple[Callable[[str], dict[str, Any]], ...] = (  # how the engines' APIs name a medium by URL
    asking,
    lambda url: asking(url, kind="video_url"),
    lambda url: {"messages": [{"content": [{"type": "image_url", "image_url": url}]}]},
    lambda url: {"messages": [{"content": [{"image_url": url}]}]},
    lambda url: {"messages": [{"content": [{"type": "image", "image": url}]}]},
    lambda url: {"messages": [{"content": [{"type": "image", "url": url}]}]},
    lambda url: {"messages": [{"content": [{"type": "video", "video": [url]}]}]},
    lambda url: {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": url}}]}]},
    lambda url: {"messages": [[{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": url}}]}]]},
    lambda url: {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
    lambda url: {"queries": {"content": [{"type": "image_url", "image_url": {"url": url}}]}},
    lambda url: {"images": [url]},
    lambda url: {"image": url},
)


@pytest.mark.parametrize("at", range(len(SHAPES)))
def test_a_medium_is_found_wherever_it_is_named(serve: Callable[..., Client], at: int) -> None:
    shape = SHAPES[at]
    answer, sent = (moving, FILM) if "video" in str(shape("")) else (picture, PICTURE)
    with web(answer) as (port, asked):
        url = f"http://127.0.0.1:{port}/a.webp"
        assert "not on the public network" in serve().refused(shape(url))
        assert not asked
        status, text = serve(networks=LOCAL).send(shape(url))
        assert status == 200
        assert asked == ["/a.webp"]
        assert "http" not in text
        data = text.partition("base64,")[2].partition('"')[0]
        assert base64.b64decode(data) == sent


def test_forbidden_places_are_not_asked(serve: Callable[..., Client]) -> None:
    client = serve()
    with web(picture) as (port, asked):
        for url in FORBIDDEN:
            assert client.refused(asking(url.format(port=port)))
        assert not asked
    assert client.send({})[0] == 200


def test_every_address_of_a_name_counts(guard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a public and a private address is refused; one that changes between two looks is looked up once."""
    fetch = sys.modules["mmq_fetch"]
    looks = []

    def two(host: str, port: int, **options: Any) -> list[Any]:
        looks.append(host)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("93.184.216.34", port)), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with pytest.raises(guard.Refused, match="not on the public network"):
        fetch.Target("http://two.example/", guard.Settings()).fetch(guard.Allowance(1), "image")
    with web(picture) as (port, _):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: looks.append(a[0]) or two(*a, **k)[1:])
        looks.clear()
        target = fetch.Target(
            f"http://one.example:{port}/图 片.webp".replace(" ", "%20"), guard.Settings(networks=LOCAL)
        )
        assert target.fetch(guard.Allowance(10_000), "image").startswith("data:image/webp;base64,")
        assert looks.count("one.example") == 2  # once here and once in `two`


def test_a_certificate_is_checked(guard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    fetch, cert, key = sys.modules["mmq_fetch"], tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make.split(), *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    fetch_from = guard.Settings(networks=(*LOCAL, "::1/128"))
    with web(picture, tls=server_side) as (port, asked):

        def get(host: str) -> str:
            return fetch.Target(f"https://{host}:{port}/a.webp", fetch_from).fetch(guard.Allowance(10_000), "image")

        with pytest.raises(guard.Refused, match="SSLCertVerificationError"):
            get("127.0.0.1")  # nobody knows who signed it
        trusting = ssl.create_default_context(cafile=str(cert))
        monkeypatch.setattr(fetch, "_tls", lambda: trusting)
        assert get("localhost").startswith("data:image/webp;base64,")
        assert get("127.0.0.1").startswith("data:image/webp;base64,")
        with pytest.raises(guard.Refused, match="SSLCertVerificationError"):
            get("127.1")  # the same place by another name
        assert len(asked) == 2


def test_an_unknown_host(guard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = sys.modules["mmq_fetch"]

    def unknown(*asked: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(guard.Refused, match=r"no host nobody\.example is known here"):
        fetch.Target("http://nobody.example/", guard.Settings()).fetch(guard.Allowance(1), "image")


def test_a_long_url_goes_nowhere(serve: Callable[..., Client]) -> None:
    with web(picture) as (port, asked):
        said = serve(networks=LOCAL).refused(asking(f"http://127.0.0.1:{port}/{'x' * 8192}"))
        assert "8192 at most" in said
        assert not asked


def test_what_is_given_up_in_a_handshake_ends(guard: Any) -> None:
    """A host that lets a connection wait at any step keeps no thread once the wait for it is over."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = sys.modules["mmq_fetch"].Target(
            f"https://127.0.0.1:{silent.getsockname()[1]}/", guard.Settings(networks=LOCAL)
        )
        ended = threading.Event()

        def fetch() -> None:
            with pytest.raises(guard.Refused, match="did not send the medium"):
                target.fetch(guard.Allowance(1), "image")
            ended.set()

        threading.Thread(target=fetch, daemon=True).start()
        with silent.accept()[0] as wire:
            assert wire.recv(1)  # the handshake has begun, and nothing answers it
            target.give_up()
            assert ended.wait(30)
            with pytest.raises(guard.Refused, match="ConnectionAborted"):
                target.fetch(guard.Allowance(1), "image")


def test_this_machine_by_a_public_address(guard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = sys.modules["mmq_fetch"]
    monkeypatch.setattr(fetch, "may_reach", lambda address, networks: True)
    with web(picture) as (port, asked):
        with pytest.raises(guard.Refused, match="this machine itself"):
            fetch.Target(f"http://127.0.0.1:{port}/", guard.Settings()).fetch(guard.Allowance(10_000), "image")
        assert not asked


def test_addresses(guard: Any) -> None:
    """Whatever version of Python the engine has: their tables differ."""
    may_reach = sys.modules["mmq_fetch"].may_reach
    private = "127.0.0.1 0.0.0.0 10.0.0.1 172.31.0.1 192.168.0.1 169.254.169.254 100.64.0.1 168.63.129.16 192.0.0.192"
    private += (
        " 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 192.88.99.1 ::1 :: ::ffff:10.0.0.1 ::7f00:1 fe80::1%eth0"
    )
    private += " 64:ff9b::a00:1 64:ff9b:1::1 2002:a00:1:: fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 5f00::1"
    assert [a for a in private.split() if may_reach(a, [])] == []
    public = "93.184.216.34 8.8.8.8 ::ffff:8.8.8.8 64:ff9b::808:808 2606:4700::1111 2a00:1450::1"
    assert [a for a in public.split() if not may_reach(a, [])] == []


def test_domains(serve: Callable[..., Client]) -> None:
    with web(picture) as (port, asked):
        url = f"http://localhost:{port}/"
        none = serve(domains=(), networks=LOCAL)
        assert "--media-domain" in none.refused(asking(url))
        assert none.send(asking(f"data:image/png;base64,{PIXEL}"))[0] == 200
        assert "may not come from localhost" in serve(domains=("example.org",), networks=LOCAL).refused(asking(url))
        assert not asked
        assert serve(domains=("localhost",), networks=(*LOCAL, "::1/128")).send(asking(url))[0] == 200
        # a name that is allowed opens no private address by itself
        assert "not on the public" in serve(domains=("localhost",)).refused(asking(url))


def test_below_a_domain(guard: Any) -> None:
    among = sys.modules["mmq_fetch"].among
    allowed = ("a.org", ".b.org")
    assert [h for h in ("a.org", "x.a.org", "b.org", "x.b.org", "xb.org") if among(h, allowed)] == ["a.org", "x.b.org"]


def test_redirects_and_failures_are_told(serve: Callable[..., Client]) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.path == "/short":  # promises more than it sends
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
            return
        handler.send_response(int(handler.path[1:]))
        handler.send_header("Location", "http://169.254.169.254/")
        handler.end_headers()

    client = serve(networks=LOCAL)
    with web(answer) as (port, asked):
        for code in ("301", "302", "307", "308"):
            said = client.refused(asking(f"http://127.0.0.1:{port}/{code}"))
            assert "redirects to 'http://169.254.169.254/'" in said
        assert "answered 404" in client.refused(asking(f"http://127.0.0.1:{port}/404"))
        assert "did not send the medium (ConnectionError)" in client.refused(asking(f"http://127.0.0.1:{port}/short"))
        assert "empty" in client.refused(asking(f"http://127.0.0.1:{port}/200"))
        assert len(asked) == 7
    assert "did not send the medium (" in client.refused(asking(f"http://127.0.0.1:{port}/"))


def test_a_slow_host_and_a_large_medium_end(
    guard: Any, serve: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        if handler.path == "/large":
            handler.wfile.write(b"x" * (3 << 20))
            return
        with contextlib.suppress(OSError):
            while not done.wait(0.05):  # a byte now and then
                handler.wfile.write(b"x")
        done.set()

    monkeypatch.setattr(guard, "FETCH_SECONDS", 0.5)
    client = serve(networks=LOCAL, max_body=1 << 20)
    with web(answer) as (port, _):
        status, text = client.send(asking(f"http://127.0.0.1:{port}/large"))
        assert (status, "1 MiB together" in text) == (413, True)
        begun = time.monotonic()
        assert "within 0 s" in client.refused(asking(f"http://127.0.0.1:{port}/slow"))
        assert time.monotonic() - begun < 15
        assert done.wait(30)  # the connection was ended, not left to the host


def test_local_files_only_under_the_folder(serve: Callable[..., Client], tmp_path: Path) -> None:
    folder = tmp_path / "媒体"
    folder.mkdir()
    (folder / "a b.png").write_bytes(PICTURE)
    (tmp_path / "secret").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "large").write_bytes(b"x" * (2 << 20))
    client = serve(folder=str(folder), max_body=1 << 20)
    status, text = client.send(asking((folder / "a b.png").as_uri()))
    assert status == 200
    assert base64.b64encode(PICTURE).decode() in text
    for name in ("link", "../secret", "%2e%2e/secret", "none", "", "a\0b"):
        said = client.refused(asking(f"file://{folder}/{name}"))
        assert "media folder" in said
    client.refused(asking("file://elsewhere/etc/passwd"))
    assert client.send(asking(f"file://{folder}/large"))[0] == 413
    assert "--media-folder" in serve().refused(asking((folder / "a b.png").as_uri()))


def test_the_key_is_asked_for_everywhere_but_health(serve: Callable[..., Client]) -> None:
    client = serve(key="schlüssel")
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "geheim"}, {"Authorization": "Basic x"}):
        for path in ("/v1/models", "/invocations", "/tokenize", "/metrics"):
            status, text = client.send({}, path=path, **headers)
            assert (status, json.loads(text)["error"]["type"]) == (401, "authentication_error")
    assert client.send({}, path="/health")[0] == 200
    plain = serve(key="s3cret")
    assert plain.send({}, Authorization="Bearer s3cret")[0] == 200
    assert plain.send({}, Authorization="bearer  s3cret")[0] == 200


def test_other_names_for_this_machine_are_refused_without_a_key(serve: Callable[..., Client]) -> None:
    client = serve(hosts=("127.0.0.1", "localhost", "::1"))
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"):
        assert client.send({}, Host=host)[0] == 200
    for host in ("rebound.example:8000", "127.0.0.1.example", "", "[::2]"):
        assert client.send({}, Host=host)[0] == 403


def test_pages_from_elsewhere_are_refused_without_a_key(serve: Callable[..., Client], guard: Any) -> None:
    """A browser here would let them ask, and read the answer where the engine allows every origin."""
    near = ("127.0.0.1", "localhost", "::1")
    client = serve(hosts=near)
    for origin in ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:8000"):
        assert client.send({}, Origin=origin)[0] == 200
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://localhost@evil.example"):
        status, text = client.send({}, Origin=origin)
        assert (status, "no pages from elsewhere" in text) == (403, True)
    assert serve(key="k").send({}, Origin="https://ours.example", Authorization="Bearer k")[0] == 200
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:8000"), (b"origin", b"https://evil.example")]
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers}
    asyncio.run(guard.Guard(echo, guard.Settings(hosts=near))(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_bodies_that_wait_to_be_judged_count(
    guard: Any, serve: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, go = serve(max_body=1000), threading.Event()
    monkeypatch.setattr(guard, "SMALL", 0)
    monkeypatch.setattr(client.app, "_media_of", lambda *_: (go.wait(20), [], False))
    answers: list[int] = []
    body = b'"' + b"x" * 998 + b'"'
    senders = [threading.Thread(target=lambda: answers.append(client.send(body)[0])) for _ in range(guard.AT_ONCE)]
    for sender in senders:
        sender.start()
    while client.app.arriving < guard.AT_ONCE * 1000:
        time.sleep(0.01)
    assert client.send(body)[0] == 429
    go.set()
    for sender in senders:
        sender.join()
    assert answers == [200] * guard.AT_ONCE
    assert client.app.arriving == 0
    assert client.send(body)[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(
    guard: Any, serve: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    monkeypatch.setattr(sys.modules["mmq_refused"], "LINGER_SECONDS", 0.2)
    client = serve()
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as wire:
        wire.sendall(b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        reply = wire.recv(100)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert client.app.arriving == 0
    assert client.send({})[0] == 200


def test_a_server_that_ends_takes_nothing_new(
    serve: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMQ_DOOR", str(tmp_path))
    (tmp_path / "busy").mkdir()
    client = serve()
    assert client.send({})[0] == 200
    (tmp_path / "closed").touch()
    for path in ("/v1/chat/completions", "/health"):
        assert client.send({}, path=path)[0] == 503


def test_requests_under_way_are_marked(
    serve: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMQ_DOOR", str(tmp_path))
    busy = tmp_path / "busy"
    busy.mkdir()
    client = serve()
    seen: list[int] = []

    def pieces() -> Iterator[bytes]:
        yield b'{"a":'
        while not any(busy.iterdir()):
            time.sleep(0.01)
        seen.append(len(list(busy.iterdir())))
        assert client.send({})[0] == 200  # another comes and goes meanwhile
        seen.append(len(list(busy.iterdir())))
        yield b" 1}"

    assert client.send(pieces())[0] == 200
    assert seen == [1, 1]
    until = time.monotonic() + 5
    while any(busy.iterdir()):  # the answer is there a moment before the mark goes
        assert time.monotonic() < until
    assert client.app.under_way == 0


WORDS = st.sampled_from(
    [
        *("messages", "role", "content", "type", "image_url", "url", "image", "images", "videos", "video", "source"),
        *("user", "assistant", "text", "input_image", "input_audio", "<image>", "<video> 图", "", "\ud800", "tools"),
        *("data", "path", "http://a.example/b", "file:///etc/passwd", "data:video/mp4;base64,QUJD"),
        f"data:image/png;base64,{PIXEL}",
    ]
)
LEAVES = st.one_of(WORDS, st.none(), st.booleans(), st.integers(-1, 2), st.floats())
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(WORDS, t, max_size=4), max_leaves=12)
TURNS = st.lists(st.fixed_dictionaries({"role": WORDS, "content": TREES}), max_size=3)
CHATS = st.fixed_dictionaries({"messages": TURNS}, optional={"images": TREES, "videos": TREES, "model": LEAVES})


@settings(deadline=None)  # other tests may have the machine
@given(st.one_of(TREES, CHATS))
def test_whatever_is_sent_is_let_in_or_refused(guard: Any, tree: Any) -> None:
    """Nothing else comes of any JSON, for that would be a 500; and what is let in names no place any more."""
    app = guard.Guard(echo, guard.Settings(domains=()))
    body = json.dumps(tree).encode()
    try:
        handed_on = asyncio.run(app._judged(body, {}))
    except guard.Refused:
        return
    media = sys.modules["mmq_media"]
    found = json.loads(handed_on)
    assert all(raw or holder[key].startswith("data:") for holder, key, _, raw in media.media_in(found))


A, B = {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b%20%7E1"}
NOTHING_BUT_THEMSELVES: list[tuple[dict[str, Any], str]] = [
    ({"$ref": "#"}, "#"),
    ({"allOf": [{"$ref": "#"}]}, "#/allOf/0"),
    ({"oneOf": [{"$ref": "#"}, {"anyOf": [{"$ref": "#/oneOf/0"}]}]}, "#/oneOf"),
    ({"$defs": {"a": B, "b /": A}, "type": "object", "properties": {"x": A}}, "#/"),
    ({"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}}, "#/properties/x"),
]
SOUND: list[dict[str, Any]] = [
    {"type": "object", "properties": {"next": {"$ref": "#"}, "const": {"const": {"$ref": "#"}}}},
    {"type": "array", "items": {"$ref": "#"}},
    {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
    {"$defs": {"a": {"anyOf": [B, {"type": "string"}]}, "b /": {"anyOf": [A]}}, "allOf": [A, B]},
    {"$ref": "#/nowhere"},
    {"$ref": "https://example.org/schema"},
    {"type": "object", "properties": {"schema": {"$ref": "#"}, "$ref": {"type": "string"}}},
]


def asking_for(schema: Any) -> list[dict[str, Any]]:
    """A request for an answer by this schema, in every way that there is to ask for one."""
    return [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"response_format": {"type": "json_schema", "schema": schema}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"guided_json": schema},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
    ]


@pytest.mark.parametrize(("schema", "where"), NOTHING_BUT_THEMSELVES)
def test_a_schema_that_is_nothing_but_itself_is_refused(guard: Any, schema: dict[str, Any], where: str) -> None:
    app = guard.Guard(echo, guard.Settings())
    for request in asking_for(schema):
        with pytest.raises(guard.Refused, match=f"{next(iter(request))}.*{where}.* refers to nothing but itself"):
            asyncio.run(app._judged(json.dumps(request).encode(), {}))


@pytest.mark.parametrize("schema", SOUND)
def test_lists_and_trees_are_sound(guard: Any, schema: dict[str, Any]) -> None:
    app = guard.Guard(echo, guard.Settings())
    for request in asking_for(schema):
        asyncio.run(app._judged(json.dumps(request).encode(), {}))


REFERENCES = st.sampled_from(
    ["#", "#/anyOf/0", "#/allOf/1", "#/$defs/a", "#/properties/a/items", "#/", "/", "#%zz", "a"]
)
SCHEMAS = st.recursive(
    st.fixed_dictionaries({"$ref": REFERENCES}) | LEAVES,
    lambda t: (
        st.lists(t, max_size=3)
        | st.dictionaries(st.sampled_from(["anyOf", "allOf", "oneOf", "$defs", "properties", "a", "items"]), t)
    ),
)


@settings(deadline=None)
@given(SCHEMAS)
def test_any_schema_is_judged(guard: Any, schema: Any) -> None:
    app = guard.Guard(echo, guard.Settings())
    for request in asking_for(schema):
        try:
            asyncio.run(app._judged(json.dumps(request).encode(), {}))
        except guard.Refused as no:
            assert "refers to nothing but itself" in str(no)  # noqa: PT017  (either is right, nothing else is)


def test_many_references_take_no_time(guard: Any) -> None:
    """Each refers to the next, and the last to itself; below a name that no path should be made of for each."""
    chain = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(20_000)} | {"20000": {"$ref": "#/$defs/20000"}}
    deep = {"x" * 1_000_000: {str(n): {"type": "null"} for n in range(20_000)}}
    request = json.dumps({"guided_json": {"$defs": chain, "properties": deep}}).encode()
    app = guard.Guard(echo, guard.Settings())
    begun = time.process_time()
    with pytest.raises(guard.Refused, match=r"guided_json#/\$defs/\d+ refers to nothing but itself"):
        asyncio.run(app._judged(request, {}))
    sound = {"guided_json": {"$defs": chain | {"20000": {"type": "string"}}, "type": "object"}}
    asyncio.run(app._judged(json.dumps(sound).encode(), {}))
    assert time.process_time() - begun < 5


def test_settings_are_read_and_checked(guard: Any) -> None:
    settings_of = guard.settings_of
    assert settings_of({}) == guard.Settings()
    assert settings_of({"MMQ_GUARD": '{"max_body": 5, "domains": ["a"]}'}) == guard.Settings(5, domains=("a",))
    frames = settings_of({"MMQ_GUARD": '{"frames": {"spread": 8, "slowed": 1, "rate": 0, "most": 9}}'}).frames
    assert (frames.spread, frames.slowed, frames.rate, frames.most) == (8, 1, 0, 9)
    with pytest.raises(ValueError, match="unknown settings: nonsense"):
        settings_of({"MMQ_GUARD": '{"nonsense": 1}'})

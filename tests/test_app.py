"""The web page: what it serves and refuses, and a real browser (browsing.py) that chats on it with the real vLLM."""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browsing import chromium, needs_browser

from mmq.serve.app import page
from mmq.serve.client import connect as connect_to
from mmq.serve.client import models
from mmq.serve.metrics import metrics
from mmq.serve.running import Server, free_port

ROOT = Path(__file__).resolve().parent.parent
MEDIA = ROOT / "docs" / "media"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def ask(address: str, path: str, *, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
    there = urlsplit(address)
    connection = http.client.HTTPConnection(there.netloc, timeout=60)
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """A page whose server is not there."""
    with page(f"http://127.0.0.1:{free_port()}") as address:
        yield address


def test_the_page_brings_all_that_it_shows(alone: str) -> None:
    status, headers, text = ask(alone, "/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    named = re.findall(r'(?:src|href)="([^"]+)"', text.decode())
    assert sorted(named) == ["app.css", "app.js", "data:,"]
    for name, kind in (("app.css", "text/css"), ("app.js", "text/javascript")):
        status, headers, text = ask(alone, f"/{name}")
        assert (status, headers.get_content_type()) == (200, kind)
        assert b"//" not in re.sub(rb"(?m)^//.*$|\s// .*$", b"", text)  # nothing of another address
    assert ask(alone, "/../app.py")[0] == 404
    assert ask(alone, "/v1/completions", body=b"{}", Content_Type="application/json")[0] == 404


@pytest.mark.parametrize(
    ("headers", "status", "why"),
    [
        ({"Host": "evil.example"}, 403, "this page is at"),
        ({"Origin": "http://evil.example"}, 403, "another page asks"),
        ({"Origin": "null"}, 403, "another page asks"),
        ({"Content_Type": "text/plain"}, 415, "must be JSON"),
        ({"Content_Type": "application/json", "Content_Length": "999999999999"}, 413, "256 MiB"),
        ({"Content_Type": "application/json"}, 502, "no server answers"),
    ],
)
def test_only_the_page_itself_asks(alone: str, headers: dict[str, str], status: int, why: str) -> None:
    got, _, text = ask(alone, "/v1/chat/completions", body=b"{}", **headers)
    assert got == status
    assert why in json.loads(text)["error"]["message"]


def test_the_key_goes_to_the_server_and_not_to_the_browser() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard: list[bytes] = []

        def reply() -> None:
            with listener.accept()[0] as one:
                heard.append(one.recv(65536))
                one.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=reply)
        thread.start()
        with page(f"http://127.0.0.1:{listener.getsockname()[1]}", api_key="secret") as address:
            status, headers, text = ask(address, "/v1/models")
        thread.join()
    assert (status, text) == (200, b"{}")
    assert b"Authorization: Bearer secret" in heard[0]
    assert "secret" not in str(headers)


@needs_vllm
def test_the_server_is_asked_through_it(served: Server) -> None:
    body: dict[str, Any] = {"model": served.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    with page(served.url) as address, connect_to(address) as client:
        assert models(client) == [served.name]
        streamed = json.dumps(body | {"stream": True}).encode()
        status, headers, text = ask(address, "/v1/chat/completions", body=streamed, Content_Type="application/json")
        assert (status, headers.get_content_type()) == (200, "text/event-stream")
        assert text.rstrip().endswith(b"data: [DONE]")
        refused = json.dumps(body | {"model": "other"}).encode()
        status, _, text = ask(address, "/v1/chat/completions", body=refused, Content_Type="application/json")
        assert (status, "other" in json.loads(text)["error"]["message"]) == (404, True)


@needs_vllm
def test_the_command(served: Server) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mmq", "app", served.url, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert f"the page: http://127.0.0.1:{port} " in process.stdout.readline()
            assert ask(f"http://127.0.0.1:{port}", "/v1/models")[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with chromium() as started:
        yield started


@needs_vllm
@needs_browser
def test_a_chat_in_a_browser(served: Server, browser: Any, tmp_path: Path) -> None:
    with page(served.url) as address:
        tab = browser.new_page(viewport={"width": 1000, "height": 800}, locale="en-GB")
        outside: list[str] = []
        tab.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, "data:")) else None)
        faults: list[str] = []
        tab.on("pageerror", lambda e: faults.append(str(e)))
        tab.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        tab.goto(address)
        tab.wait_for_selector(f"#model option[value='{served.name}']", state="attached")
        tab.set_input_files("#files", [str(MEDIA / "square.png")])
        tab.wait_for_selector("#media img")
        tab.fill("#text", "Which colour does the square have?")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".assistant:not([aria-busy]) small", timeout=60_000)
        assert tab.inner_text(".assistant p") == "The square is black."
        assert tab.locator(".user img").evaluate("i => i.naturalWidth") == 224
        assert tab.locator("#media img").count() == 0
        tab.fill("#text", "What colour is the square?")  # the second turn knows the first one's picture
        tab.click("#send")
        tab.wait_for_selector(".assistant:nth-of-type(4):not([aria-busy]) small", timeout=60_000)
        assert "black" in tab.locator(".assistant p").last.inner_text()
        tab.click("#clear")
        assert tab.locator(".turn").count() == 0
        tab.set_input_files("#files", [str(MEDIA / "circle.mp4")])
        tab.fill("#text", "Which way does the circle move?")
        tab.wait_for_selector("#media >> text=circle.mp4")  # a codec that Chromium has not: its name stands there
        tab.click("#send")
        tab.wait_for_selector(".assistant:not([aria-busy]) small", timeout=60_000)
        assert tab.inner_text(".assistant p") == "The yellow circle moves to the right."
        assert (outside, faults) == ([], [])
        (tmp_path / "notes.txt").write_text("no picture")
        tab.set_input_files("#files", [str(tmp_path / "notes.txt")])
        tab.wait_for_selector("text=notes.txt")
        tab.close()


@needs_vllm
@needs_browser
def test_stop_a_refusal_and_text_that_is_no_html(served: Server, browser: Any) -> None:
    with page(served.url) as address:
        tab = browser.new_page(locale="en-GB")
        tab.goto(address)
        tab.wait_for_selector("#model option", state="attached")
        tab.fill("#text", "word " * 20_000)
        tab.click("#send")
        tab.wait_for_selector(".wrong", timeout=60_000)
        assert "context length" in tab.inner_text(".wrong")
        expect = importlib.import_module("playwright.sync_api").expect
        expect(tab.locator("#text")).to_have_value(re.compile("^word word"))  # the question is given back
        expect(tab.locator(".wrong p")).to_be_in_viewport(ratio=1)  # and does not cover why
        # without it the model would be done before anybody can stop it
        endless = {"ignore_eos": True}
        tab.route("**/completions", lambda r: r.continue_(post_data={**r.request.post_data_json, **endless}))
        tab.click("summary")
        tab.fill("#tokens", "3500")
        tab.fill("#temperature", "0.5")
        tab.fill("#system", "Go on and on.")
        tab.fill("#text", "<b>Draw</b> me <img src=x onerror=alert(1)>")
        tab.click("#send")
        expect(tab.locator(".assistant").nth(1)).to_have_text(re.compile(r"[\s\S]{40}"), timeout=60_000)
        assert tab.inner_text("#send") == "Stop"
        tab.click("#send")
        tab.wait_for_selector("text=stopped")
        until = time.monotonic() + 5  # the engine stops too, long before its 3500 tokens
        while metrics(served.url)["vllm:num_requests_running"][0][1] and time.monotonic() < until:
            time.sleep(0.1)
        assert metrics(served.url)["vllm:num_requests_running"][0][1] == 0
        assert tab.inner_text("#send") == "Send"
        assert tab.locator(".user b, .user img").count() == 0
        tab.close()


@needs_browser
def test_a_server_that_breaks_off(browser: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            stream = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            event = {"choices": [{"index": 0, "delta": {"content": "half"}}]}
            for _ in range(2):
                with listener.accept()[0] as one:
                    if b"/v1/models" in one.recv(65536):
                        one.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n{"data": [{"id": "one"}]}')
                    else:
                        one.sendall(f"{stream}data: {json.dumps(event)}\n\n".encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with page(f"http://127.0.0.1:{listener.getsockname()[1]}") as address:
            tab = browser.new_page(locale="en-GB")
            tab.goto(address)
            tab.wait_for_selector("#model option", state="attached")
            tab.fill("#text", "Hello")
            tab.click("#send")
            tab.wait_for_selector("text=broke off")
            assert tab.locator(".assistant p").first.inner_text() == "half"
            tab.close()
        thread.join()


@needs_browser
def test_a_phone_the_dark_and_chinese(alone: str, browser: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        options = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme, "locale": "zh-CN"}
        context = browser.new_context(**options)
        tab = context.new_page()
        tab.goto(alone)
        tab.wait_for_selector(".wrong")  # no server there: it says so
        assert "no server answers" in tab.inner_text(".wrong")
        assert tab.inner_text("#send") == "发送"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.click("summary")
        box = tab.locator(".panel").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        ink, ground = tab.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        grounds.append((ink, ground))
        for control in tab.locator("button:visible, summary:visible, label.button:visible").all():
            size = control.bounding_box()
            assert size is not None
            assert size["height"] >= 36
        context.close()
    assert set(grounds[0]).isdisjoint(grounds[1])

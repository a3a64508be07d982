"""The chat in the terminal: its states line by line, and the real thing: a pseudo-terminal before the real vLLM."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmq.recipes.pebble.tasks import samples
from mmq.serve.chat import Chat, asked, begin, heard, prompt, talk
from mmq.serve.client import connect, stream
from mmq.serve.infer import answering
from mmq.serve.request import RequestConfig
from mmq.serve.running import Server

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def square(tmp_path: Path) -> Path:
    """A picture of pebble's test split, whose question is which colour the square has."""
    sample = next(s for s in samples("test", 20) if len(s.images) == 1)
    path = tmp_path / "一个 square.png"
    sample.images[0].save(path)
    return path


def typed(chat: Chat, *lines: str) -> tuple[Chat, list[str], list[str]]:
    """The chat after `lines`, the prompts before each and after the last, and the notes; no line may end it."""
    prompts, notes = [prompt(chat)], []
    for line in lines:
        chat, then, told = heard(chat, line)
        assert then != "quit"
        prompts.append(prompt(chat))
        notes += [told] if told else []
    return chat, prompts, notes


def test_a_line_is_a_question() -> None:
    chat, then, told = heard(begin(), "图中有什么？")
    assert (then, told) == ("answer", "")
    assert chat.messages == [{"role": "user", "content": "图中有什么？"}]
    assert heard(chat, "   ") == (chat, "read", "")


@pytest.mark.parametrize("word", ["quit", "exit", " Quit ", "EXIT"])
@pytest.mark.parametrize("chat", [Chat(), Chat(multiline=True)])
def test_words_that_end_it(chat: Chat, word: str) -> None:
    assert heard(chat, word)[1] == "quit"
    assert heard(chat, "quit#")[1] == ("quit" if chat.multiline else "answer")


def test_several_lines() -> None:
    chat, prompts, _ = typed(begin(), "multi-line", "one", "", "quit", "#")
    assert prompts == ["<<< ", "<<<[M] ", "", "", "", "<<<[M] "]  # `quit` within a text is text
    assert chat.turns == ({"role": "user", "content": "one\n\nquit"},)
    chat, prompts, _ = typed(chat, "last line#", "single-line", "a # b")
    assert [t["content"] for t in chat.turns] == ["one\n\nquit", "last line", "a # b"]
    assert prompts[-1] == "<<< "


def test_the_system_message() -> None:
    chat, prompts, notes = typed(begin(system="a"), "hello", "reset-system", "quit")  # a system message may be any text
    assert prompts == ["<<< ", "<<< ", "<<<[S] ", "<<< "]
    assert chat == Chat(system="quit")
    assert "anew" in notes[-1]
    assert typed(chat, "hello")[0].messages[0] == {"role": "system", "content": "quit"}
    assert typed(chat, "hello", "clear")[0] == chat
    assert typed(chat, "reset-system", "default-system")[0] == Chat()
    chat, prompts, _ = typed(chat, "multi-line", "reset-system", "two", "lines#")
    assert (chat.system, prompts) == ("two\nlines", ["<<< ", "<<<[M] ", "<<<[MS] ", "", "<<<[M] "])


def kinds(chat: Chat) -> list[str]:
    return [part.get("text") or part["type"] for part in chat.turns[-1]["content"]]


def test_tags_ask_for_their_media(square: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0frames")
    lines = ("first <image> then <video>, both?", f"'{square}' ", str(clip))
    chat, prompts, _ = typed(begin(), *lines)
    assert prompts == ["<<< ", "Input an image path or URL <<< ", "Input a video path or URL <<< ", "<<< "]
    assert kinds(chat) == ["first ", "image_url", " then ", "video_url", ", both?"]
    url = chat.turns[0]["content"][1]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == Image.open(square).size
    video = "data:video/mp4;base64," + base64.b64encode(b"\0frames").decode()
    assert chat.turns[0]["content"][3]["video_url"]["url"] == video
    chat, _, _ = typed(chat, "(<image>./</image>)\n(<image>./</image>) same?", "http://a/1.png", "http://a/2.png")
    assert kinds(chat) == ["image_url", "image_url", " same?"]
    assert [p["image_url"]["url"] for p in chat.turns[1]["content"][:2]] == ["http://a/1.png", "http://a/2.png"]


def test_pictures_of_the_command_line_go_first() -> None:
    images = ["http://a/1.png", "http://a/2.png"]
    chat, _, _ = typed(begin(images=images), "look: <image>")
    assert [p.get("image_url", {}).get("url") or p["text"] for p in chat.turns[0]["content"]] == [
        "http://a/2.png",
        "look: ",
        "http://a/1.png",
    ]
    assert typed(chat, "and now?")[0].turns[-1]["content"] == "and now?"


def test_a_picture_that_is_none_is_asked_again(tmp_path: Path) -> None:
    waiting = typed(begin(), "<image>what?")[0]
    chat, prompts, notes = typed(waiting, str(tmp_path / "none.png"), str(tmp_path))
    assert chat == waiting
    assert prompts[-1].startswith("Input an image")
    assert "no picture" in notes[0]
    assert all("an empty line drops the message" in note for note in notes)
    assert typed(chat, "")[0] == Chat()
    with pytest.raises(ValueError, match="no picture"):
        begin(images=[tmp_path / "none.png"])


def test_one_question_is_no_command() -> None:
    assert asked(begin(), "quit").messages == [{"role": "user", "content": "quit"}]
    assert kinds(asked(begin(videos=["http://a/1.mp4"], audios=["http://a/1.wav"]), "what?"))[:2] == [
        "video_url",
        "audio_url",
    ]
    with pytest.raises(ValueError, match="more <audio> tags in the prompt than audios; give each its --audio"):
        asked(begin(images=["http://a/1.png"]), "<image> and <audio>")


def test_bytes_that_are_no_text_are_not_sent() -> None:
    chat, then, told = heard(begin(), b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert (chat, then) == (Chat(), "read")
    assert "not UTF-8" in told
    with pytest.raises(ValueError, match="the prompt is not UTF-8"):
        asked(begin(), b"caf\xe9".decode("utf-8", "surrogateescape"))


class Played:
    """A reader of given lines, and all that was written and noted."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.written, self.notes = list(lines), "", list[str]()

    def read(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        if self.lines[0] == "^C":
            self.lines.pop(0)
            raise KeyboardInterrupt
        return self.lines.pop(0)

    def write(self, piece: str) -> None:
        self.written += piece


def test_a_stop_and_a_refusal_leave_the_chat_usable() -> None:
    def answer(messages: Sequence) -> Iterator[str]:
        question = messages[-1]["content"]
        if question == "refuse":
            raise ValueError("the server refused the request (400)")
        yield f"{len(messages)} "
        if question == "stop":
            raise KeyboardInterrupt
        yield question

    played = Played("stop", "refuse", "multi-line", "last")  # the input ends within a text
    chat = talk(begin(), answer, read=played.read, write=played.write, note=played.notes.append)
    assert [t["content"] for t in chat.turns] == ["stop", "1 ", "last", "3 last"]
    assert played.written == "1 \n\n3 last\n"
    assert played.notes[0] == "stopped"
    assert "(400); the question is taken back" in played.notes[1]


def test_a_server_that_comes_back_finds_the_chat() -> None:
    def answer(messages: Sequence) -> Iterator[str]:
        if messages[-1]["content"] == "gone":
            raise ConnectionError("no server answers")
        yield f"{len(messages)}"

    def left(piece: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    played = Played("one", "gone", "two")
    reads = {"read": played.read, "note": played.notes.append}
    chat = talk(begin(), answer, write=played.write, patient=True, **reads)
    assert [t["content"] for t in chat.turns] == ["one", "1", "two", "3"]
    assert played.notes == ["no server answers; the question is taken back"]
    played.lines = ["gone"]
    with pytest.raises(ConnectionError):  # where nobody types
        talk(begin(), answer, write=played.write, **reads)
    played.lines = ["one"]
    with pytest.raises(BrokenPipeError):  # who reads has left, not the server
        talk(begin(), answer, write=left, patient=True, **reads)


def test_ctrl_c_drops_a_message_and_twice_ends_the_chat() -> None:
    def answer(messages: Sequence) -> Iterator[str]:
        yield "yes"

    lines = ("reset-system", "^C", "<image>?", "^C", "multi-line", "half", "^C", "whole#", "^C", "more#", "^C", "^C")
    played = Played(*lines, "never#")
    chat = talk(begin(), answer, read=played.read, write=played.write, note=played.notes.append)
    assert [t["content"] for t in chat.turns] == ["whole", "yes", "more", "yes"]  # one at a prompt ends nothing
    assert (chat.system, played.lines) == (None, ["never#"])
    assert played.notes[-2:] == ["Ctrl-C again, or quit, ends the chat"] * 2


def test_a_server_that_dies_while_it_answers() -> None:
    delta = {"choices": [{"index": 0, "delta": {"content": "half"}}]}
    chunk = f"data: {json.dumps({'id': '1', 'object': 'chat.completion.chunk', 'created': 1, 'model': 'm'} | delta)}"
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            with listener.accept()[0] as one:
                one.recv(65536)
                one.sendall(f"{head}{len(chunk) + 2:x}\r\n{chunk}\n\n\r\n".encode())

        thread = threading.Thread(target=die)
        thread.start()
        with connect(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            pieces = stream(client, [{"role": "user", "content": "hello"}], model="m")
            assert next(pieces) == "half"
            with pytest.raises(RuntimeError, match="broke off its answer"):
                next(pieces)
        thread.join()


@needs_vllm
def test_several_turns_with_the_real_server(served: Server, square: Path) -> None:
    lines = ("<image>图中有什么？", str(square), "Which colour does the square have?", "clear", "word " * 20000, "hi")
    played = Played(*lines)
    with answering(served.url, RequestConfig(max_tokens=32, stream=True)) as answer:
        chat = talk(begin(), answer, read=played.read, write=played.write, note=played.notes.append)
    first, second, refused, last = played.written.splitlines()
    assert "正方形" in first
    assert "black" in second  # said without the picture in this turn: the history has it
    assert refused == ""
    assert "refused the request (400)" in played.notes[1]
    assert [t["role"] for t in chat.turns] == ["user", "assistant"]
    assert chat.turns[1]["content"] == last


@needs_vllm
def test_in_a_terminal(served: Server, square: Path) -> None:
    command = [sys.executable, "-m", "mmq", "infer", served.url, "--max-tokens", "24"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = ""
    try:

        def until(text: str) -> None:
            nonlocal seen
            end = time.monotonic() + 60
            while text not in seen and time.monotonic() < end:
                if select.select([ours], [], [], 1)[0]:
                    seen += os.read(ours, 65536).decode("utf-8", "replace")  # an OSError where the command is gone
            assert text in seen
            seen = seen.partition(text)[2]

        def type_(line: str) -> None:
            os.write(ours, f"{line}\n".encode())

        until("<<< ")
        type_("<image>图中有什么？")
        until("Input an image path or URL <<< ")
        type_(str(square))
        until("形状")
        until("<<< ")
        type_("reset-system")
        until("<<<[S] ")
        type_("You are brief.")
        until("anew")
        until("<<< ")
        os.write(ours, b"half a li")
        until("half a li")
        time.sleep(1.0)  # what readline is still busy with it would not be interrupted in
        process.send_signal(signal.SIGINT)
        until("Ctrl-C again, or quit, ends the chat")
        until("<<< ")
        os.write(ours, b"\x04")  # Ctrl-D
        until("\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@needs_vllm
def test_through_a_pipe(served: Server, square: Path) -> None:
    command = [sys.executable, "-m", "mmq", "infer", served.url, "--image", str(square), "--max-tokens", "24"]
    asked = b"Which colour does the square have?\ncaf\xe9\n"
    done = subprocess.run(command, input=asked, capture_output=True, timeout=120, check=True)
    assert done.stdout.decode().startswith("The square is black.")
    assert "<<<" not in done.stdout.decode()
    assert "not UTF-8" in done.stderr.decode()

"""A chat in the terminal, as a state machine that is fed lines: what the user typed, what is asked next, what is sent.

Knows no server and no terminal: `talk` is handed a function that answers and functions that read and write. The
commands are those of ms-swift's terminal chat. Looks at nothing outside but a picture or video file that is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .client import Message
from .media import TAG, Medium, compose, media_of, part

HELP = (
    "commands: multi-line, single-line, reset-system, clear, quit or exit; "
    "<image>, <video> and <audio> ask for a file or URL"
)
END_OF_TEXT = "#"  # ends a text of several lines
UNREAD = re.compile("[\ud800-\udfff]")  # how Python keeps bytes that are no UTF-8
DEFAULT_SYSTEM = "default-system"  # said instead of a system message: what the chat template does without one

Next = Literal["read", "answer", "quit"]


@dataclass(frozen=True)
class Chat:
    """A conversation and the message that is being written.

    `lines` are those of an unfinished text of several lines; `draft` a finished text whose tags wait for `media`.
    `naming` is set while the next text is the system message.
    """

    system: str | None = None
    turns: tuple[Message, ...] = ()
    media: tuple[Medium, ...] = ()
    multiline: bool = False
    naming: bool = False
    lines: tuple[str, ...] = ()
    draft: str | None = None

    @property
    def messages(self) -> list[Message]:
        """All that a server is sent: the system message, where one is set, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]


def begin(
    *,
    system: str | None = None,
    images: Sequence[str | Path] = (),
    videos: Sequence[str | Path] = (),
    audios: Sequence[str | Path] = (),
) -> Chat:
    """A new chat; the media belong to its first message. ValueError for a file that cannot be read."""
    return Chat(system=system, media=tuple(media_of(images, videos, audios)))


def prompt(chat: Chat) -> str:
    """What stands before the cursor."""
    if kind := wanted(chat):
        return f"Input {'a' if kind == 'video' else 'an'} {kind} path or URL <<< "
    if chat.lines:
        return ""
    mode = ("M" if chat.multiline else "") + ("S" if chat.naming else "")
    return f"<<<[{mode}] " if mode else "<<< "


def wanted(chat: Chat) -> str | None:
    """ "image", "video" or "audio" while the next line names one: of the draft's first tag without a medium."""
    left = [kind for kind, _ in chat.media]
    for tag in TAG.finditer(chat.draft or ""):
        if (kind := tag[1] or tag[2]) not in left:
            return kind
        left.remove(kind)
    return None


def heard(chat: Chat, line: str) -> tuple[Chat, Next, str]:
    """The chat after one more line (without its newline), what to do now, and a note for the user ("" for none).

    "answer" means that the last turn is a question that is ready to be sent.
    """
    if UNREAD.search(line):
        return chat, "read", "that line is not UTF-8; type it again"
    if wanted(chat):
        return _medium(chat, line)
    if not chat.naming and not chat.lines:  # of several lines too: at once, or with the mark that ends a text
        word = line.removesuffix(END_OF_TEXT) if chat.multiline else line
        if done := _command(chat, word.strip().lower()):
            return done
    if chat.multiline:
        if not line.endswith(END_OF_TEXT):
            return replace(chat, lines=(*chat.lines, line)), "read", ""
        line = "\n".join((*chat.lines, line.removesuffix(END_OF_TEXT))).strip("\n")
        chat = replace(chat, lines=())
    if chat.naming:
        system = None if line.strip() in ("", DEFAULT_SYSTEM) else line
        told = "the system message is set" if system else "the system message is the chat template's own"
        return Chat(system=system, multiline=chat.multiline), "read", f"{told}; the conversation starts anew"
    if not line.strip():
        return chat, "read", ""
    return _composed(replace(chat, draft=line))


def _command(chat: Chat, word: str) -> tuple[Chat, Next, str] | None:
    match word:
        case "quit" | "exit":
            return chat, "quit", ""
        case "clear":
            return Chat(system=chat.system, multiline=chat.multiline), "read", "the conversation starts anew"
        case "multi-line":
            return replace(chat, multiline=True), "read", f"a text ends with {END_OF_TEXT}; single-line goes back"
        case "single-line":
            return replace(chat, multiline=False), "read", ""
        case "reset-system":
            return replace(chat, naming=True), "read", f"type the system message, or {DEFAULT_SYSTEM}"
    return None


def _medium(chat: Chat, line: str) -> tuple[Chat, Next, str]:
    kind = wanted(chat) or ""
    if not line.strip():
        return replace(chat, draft=None, media=()), "read", f"no {kind}: the message is not sent"
    try:
        return _composed(replace(chat, media=(*chat.media, (kind, part(kind, line)))))
    except ValueError as e:
        return chat, "read", f"{e} (an empty line drops the message)"


def _composed(chat: Chat) -> tuple[Chat, Next, str]:
    """The draft as a turn, once its tags have their media; media without a tag stand before the text."""
    if wanted(chat) or chat.draft is None:
        return chat, "read", ""
    content, _ = compose(chat.draft, chat.media, alone=True)
    turn = {"role": "user", "content": content}
    return replace(chat, turns=(*chat.turns, turn), draft=None, media=()), "answer", ""


def asked(chat: Chat, text: str) -> Chat:
    """The chat with one question, whatever it says: no command. ValueError for a tag that no medium is there for, and
    for bytes that are no text."""
    if UNREAD.search(text):
        raise ValueError("the prompt is not UTF-8; type it again, in a terminal whose locale is UTF-8")
    if kind := wanted(drafted := replace(chat, draft=text)):
        raise ValueError(f"there are more <{kind}> tags in the prompt than {kind}s; give each its --{kind}")
    return _composed(drafted)[0]


def answered(chat: Chat, text: str) -> Chat:
    """The chat with the assistant's turn."""
    return replace(chat, turns=(*chat.turns, {"role": "assistant", "content": text}))


def dropped(chat: Chat) -> Chat:
    """The chat without its last turn: a question that got no answer."""
    return replace(chat, turns=chat.turns[:-1])


def unwritten(chat: Chat) -> Chat:
    """The chat without the message, or system message, that is being written."""
    media = () if chat.draft is not None else chat.media
    return replace(chat, lines=(), draft=None, naming=False, media=media)


def talk(
    chat: Chat,
    answer: Callable[[Sequence[Message]], Iterator[str]],
    *,
    read: Callable[[str], str],
    write: Callable[[str], None],
    note: Callable[[str], None],
    patient: bool = False,
) -> Chat:
    """Read, answer and write until `quit` or the end of the input (EOFError of `read`); returns the chat as it ended.

    `read(prompt)` gives a line, `write` gets pieces of answers, `note` whole lines for the user. Ctrl-C ends the
    answer under way and keeps what came of it, or drops the message that is being written; where there is neither, a
    second one ends the chat, for the first may have been meant for a line half typed. A question that the server
    refuses is told and taken back. OSError when the server is gone, unless `patient`: it may come back, and the
    conversation is kept for that.
    """
    failures = (ValueError, RuntimeError, OSError) if patient else (ValueError, RuntimeError)
    leaving = False
    while True:
        try:
            line = read(prompt(chat))
            leaving = False
        except EOFError:
            if not chat.lines:
                return chat
            line = END_OF_TEXT  # the input ended within a text: that is the end of it
        except KeyboardInterrupt:
            write("\n")
            if chat != (emptied := unwritten(chat)):
                chat = emptied
            elif leaving:
                return chat
            else:
                leaving = True
                note("Ctrl-C again, or quit, ends the chat")
            continue
        chat, then, told = heard(chat, line)
        if told:
            note(told)
        if then == "quit":
            return chat
        if then == "answer":
            chat = _answer(chat, answer, write, note, failures)


def _answer(
    chat: Chat,
    answer: Any,
    write: Callable[[str], None],
    note: Callable[[str], None],
    failures: tuple[type[Exception], ...],
) -> Chat:
    pieces: list[str] = []
    told = ""
    try:
        with closing(answer(chat.messages)) as stream:
            for piece in stream:
                pieces.append(piece)
                write(piece)
        chat = answered(chat, "".join(pieces))
    except KeyboardInterrupt:
        told = "stopped" if pieces else "stopped before an answer; the question is taken back"
        chat = answered(chat, "".join(pieces)) if pieces else dropped(chat)
    except BrokenPipeError:  # of `write`, whose reader has left
        raise
    except failures as e:
        told = f"{e}; the question is taken back"
        chat = dropped(chat)
    write("\n")
    if told:
        note(told)
    return chat

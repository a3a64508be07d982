"""The PyTorch engine's answers in OpenAI's form: whole, in the pieces of a stream, and as errors; of chats and of
completions. Knows neither torch nor a model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token that was generated, and those that were likely in its place: texts and log-probabilities."""

    text: str
    logprob: float
    likely: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer: text, the model's thinking, a tool it calls ({"name", "arguments"}); the tokens
    that this came of, where their log-probabilities were asked for."""

    text: str = ""
    thinking: str = ""
    calls: tuple[Mapping[str, str], ...] = ()
    tokens: tuple[Token, ...] = ()


@dataclass
class Answer:
    """One answer while it comes: its pieces together, why it ended ("" before), and its number of tokens."""

    index: int
    text: str = ""
    thinking: str = ""
    calls: list[Mapping[str, str]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    offset: int = 0  # characters of the tokens told, which is what a completion's text_offset counts
    finish: str = ""
    count: int = 0

    def add(self, piece: Piece) -> None:
        """The piece, which came behind the others."""
        self.text += piece.text
        self.thinking += piece.thinking
        self.calls += piece.calls
        self.tokens += piece.tokens
        self.offset += sum(len(token.text) for token in piece.tokens)


@dataclass(frozen=True)
class Form:
    """In which form answers to a request are told: its id, the model's name, a chat or not, with log-probabilities or
    not."""

    request_id: str
    model: str
    chat: bool
    logprobs: bool

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The answers as one object."""
        choices = []
        for answer in answers:
            said = Piece(answer.text, answer.thinking, tuple(answer.calls), tuple(answer.tokens))
            choice = self._choice(said, answer, "message", first_call=0, offset=0)
            choices.append({**choice, "finish_reason": answer.finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(prompt_tokens, answers)}

    def chunk(self, piece: Piece, answer: Answer, finish: str | None = None) -> str:
        """One piece of `answer`, which has it not yet, as an event of the stream."""
        choice = self._choice(piece, answer, "delta", first_call=len(answer.calls), offset=answer.offset)
        return self._event([{**choice, "finish_reason": finish}])

    def opening(self, answer: Answer) -> str:
        """The first event of a chat's answer: whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": answer.index, "delta": delta, "finish_reason": None}])

    def last(self, answers: Sequence[Answer], prompt_tokens: int) -> str:
        """The event behind all answers with the usage, for those that asked for it."""
        return self._event([], usage=usage(prompt_tokens, answers))

    def unsaid(self, prompt_logprobs: list[Any]) -> dict[str, Any]:
        """A chat completion in which nothing was generated, with vLLM's key beside OpenAI's."""
        nothing = Answer(0, finish="length")
        return {**self.whole([nothing], len(prompt_logprobs)), "prompt_logprobs": prompt_logprobs}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": int(time.time()), "model": self.model}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self._head(kind), "choices": choices, **more})

    def _choice(self, piece: Piece, answer: Answer, key: str, *, first_call: int, offset: int) -> dict[str, Any]:
        """Index, words and log-probabilities of a piece or of a whole answer."""
        logprobs = None
        if self.logprobs and (piece.tokens or key == "message"):
            logprobs = _chat_logprobs(piece.tokens) if self.chat else _completion_logprobs(piece.tokens, offset)
        if not self.chat:
            return {"index": answer.index, "text": piece.text, "logprobs": logprobs}
        whole = key == "message"
        said: dict[str, Any] = {"role": "assistant", "content": piece.text} if whole else {}
        if piece.text:
            said["content"] = piece.text
        if piece.thinking:
            said["reasoning_content"] = piece.thinking
        if piece.calls:
            said["tool_calls"] = [
                {
                    **({} if whole else {"index": at}),
                    "id": f"{self.request_id}_{answer.index}_tool_call_{at}",
                    "type": "function",
                    "function": dict(call),
                }
                for at, call in enumerate(piece.calls, first_call)
            ]
        return {"index": answer.index, key: said, "logprobs": logprobs}


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [{**one(t.text, t.logprob), "top_logprobs": [one(*likely) for likely in t.likely]} for t in tokens]
    }


def _completion_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`offset`: characters of the tokens before these."""
    offsets = [offset + sum(len(t.text) for t in tokens[:at]) for at in range(len(tokens))]
    return {
        "text_offset": offsets,
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{t.text: t.logprob, **dict(t.likely)} for t in tokens],
    }


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, int]:
    """The tokens read and generated."""
    count = sum(answer.count for answer in answers)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}


def event(told: Mapping[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"


def failure(why: str, status: int) -> dict[str, Any]:
    """OpenAI's form of an error, one line of it."""
    kind = {404: "NotFoundError"}.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": " ".join(why.split())[:1000], "type": kind, "param": None, "code": status}}

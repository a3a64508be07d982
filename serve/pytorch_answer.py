"""One answer as the PyTorch engine draws it: `model.generate` on the model's own thread, told piece by piece.

What transformers serve would do otherwise: a seed holds for its own request, an answer ends before a stop and is not
told with it, `frequency_penalty` is OpenAI's and no repetition penalty, all tokens may be sampled and not the
likeliest fifty, log-probabilities of a long answer are not all kept, and what nobody waits for is not drawn to its end.
Part of the engine's program (pytorch_engine.py).
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks
from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from .pytorch_replies import Piece, Token
from .pytorch_sampling import Sampling, cut


class Ended(Exception):
    """Raised within `generate` where an answer ends before it would by itself."""


class Drawing:
    """An answer while it is drawn, the streamer that `generate` puts tokens into. `tell` is called with each `Piece`,
    on the model's thread; `gone` is set when nobody waits for the answer any longer."""

    def __init__(
        self,
        words: Any,
        how: Sampling,
        *,
        logprobs: int | None,
        parser: Any,
        tell: Callable[[Piece], None],
        gone: threading.Event,
    ) -> None:
        self.words, self.how, self.logprobs, self.parser = words, how, logprobs, parser
        self.tell, self.gone = tell, gone
        self.tokens: list[int] = []
        self.change = dict(how.bias)  # token -> what is added to its logit
        self.raw: Tensor | None = None  # logits of the next token, [vocabulary], as the model gave them
        self.untold: list[Token] = []  # of which there is no text to tell yet
        self.held = ""  # text in which a stop may begin
        self.start = self.read = 0  # tokens of a word that may go on, and those whose text is known
        self.prompt, self.stopped, self.called = True, False, False

    def put(self, value: Tensor) -> None:
        """The prompt's tokens, then each new one."""
        if self.gone.is_set():
            raise Ended
        if self.prompt:
            self.prompt = False
            return
        token = int(value.reshape(-1)[0])
        if self.how.presence_penalty or self.how.frequency_penalty:
            once = 0.0 if token in self.tokens else self.how.presence_penalty
            self.change[token] = self.change.get(token, 0.0) - once - self.how.frequency_penalty
        self.tokens.append(token)
        if self.logprobs is not None and self.raw is not None:
            self.untold.append(told_token(self.words, token, self.raw.float().log_softmax(-1), self.logprobs))
        self._say(self._fresh())
        if self.stopped:
            raise Ended

    def end(self) -> None:
        """What a streamer has; `close` does it, however the answer ended."""

    def close(self) -> None:
        """The rest: what was held back, and what the parser ends with."""
        self._say(self._fresh(last=True), last=True)
        if self.parser is not None:
            try:
                events = self.parser.finalize()[1]
            except (ValueError, RuntimeError):  # cut off within a tool's call, which is then none
                events = []
            self._told(response_events_to_chunks(events))
        if self.untold:
            self._told([""])

    def finish(self, ends: frozenset[int]) -> str:
        """Why it ended, as OpenAI has it."""
        if self.called:
            return "tool_calls"
        ended = self.tokens and self.tokens[-1] in ends and not self.how.endless
        return "stop" if self.stopped or ended else "length"

    def _fresh(self, *, last: bool = False) -> str:
        """Text that the newest tokens add, nothing while they end within a character. Of any tokenizer: the newest are
        decoded behind some that are known, for one alone may lose its space."""

        def text(start: int, end: int) -> str:
            return self.words.decode(self.tokens[start:end], skip_special_tokens=self.parser is None)

        known, now = text(self.start, self.read), text(self.start, len(self.tokens))
        if len(now) <= len(known) or (now.endswith("\ufffd") and not last):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return now[len(known) :]

    def _say(self, text: str, *, last: bool = False) -> None:
        if self.stopped:
            return
        text, self.held, self.stopped = cut(self.held + text, self.how.stop)
        if last:
            text, self.held = text + self.held, ""
        if text:
            self._told([text] if self.parser is None else response_events_to_chunks(self.parser.feed(text)))

    def _told(self, items: list[Any]) -> None:
        for item in items:
            tokens, self.untold = tuple(self.untold), []
            if isinstance(item, ToolCall):
                self.called = True
                self.tell(Piece(calls=({"name": item.name, "arguments": item.arguments},), tokens=tokens))
            elif isinstance(item, ReasoningText):
                self.tell(Piece(thinking=str(item), tokens=tokens))
            else:
                self.tell(Piece(text=item, tokens=tokens))

    def note(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The first of the logits' processors: keeps what the model gave, [1, vocabulary]."""
        self.raw = scores[0]
        return scores

    def steer(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The last: OpenAI's penalties, for what was generated and not for the prompt, and biases."""
        if not self.change:
            return scores
        at = torch.tensor([*self.change], device=scores.device)
        by = torch.tensor([*self.change.values()], device=scores.device, dtype=scores.dtype)
        return scores.index_add(1, at, by[None])


def told_token(words: Any, token: int, logprobs: Tensor, likely: int) -> Token:
    """A token with the `likely` likeliest in its place; logprobs [vocabulary]."""
    best = logprobs.topk(likely)
    others = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return Token(words.decode([token]), float(logprobs[token]), tuple((words.decode([i]), p) for p, i in others))


def generation_config(base: Any, how: Sampling, *, room: int) -> Any:
    """The checkpoint's own generation config with what a request says; `room` is what the context leaves."""
    config = copy.deepcopy(base)
    config.num_beams = config.num_return_sequences = 1  # whatever the checkpoint has: beams are not told piece by piece
    config.max_new_tokens = how.max_tokens or room
    config.do_sample = how.temperature != 0
    config.top_k = config.top_k or 0  # None would mean the 50 likeliest
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if (value := getattr(how, key)) is not None:
            setattr(config, key, max(value, 0))
    if how.endless:
        config.min_new_tokens = config.max_new_tokens
    return config


def draw(model: Any, inputs: Any, config: Any, drawing: Drawing, *, seed: int | None) -> None:
    """Draw the answer to one prompt, tensors of [1, tokens] and its media, to its end. On the model's thread alone."""
    processors: list[Any] = [drawing.note]
    if config.repetition_penalty not in (None, 1):
        processors.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
        config.repetition_penalty = 1.0  # else it would come before `note`
    options: dict[str, Any] = {"generation_mode": "text"} if hasattr(model, "has_talker") else {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):  # what other requests sample stays chance
        if seed is not None:
            torch.manual_seed(seed)
        with contextlib.suppress(Ended):
            model.generate(
                **inputs.to(model.device),  # not before: requests wait, and their pictures with them
                **options,
                generation_config=config,
                logits_processor=LogitsProcessorList([*processors, drawing.steer]),
                streamer=drawing,
            )
    drawing.close()


def ends_of(config: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

"""Requests to the PyTorch engine, from the words of a client to an answer: read, put into tensors by the means of
transformers serve, held to the model's context, drawn one after another, told.

Part of the engine's program (pytorch_engine.py), which puts these in the place of transformers serve's handlers. What a
request may say is pytorch_face.py's business, how answers look pytorch_replies.py's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from fastapi.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.utils import Modality, build_response_parser
from transformers.utils.chat_template_utils import _get_template_variables

from .pytorch_answer import Drawing, draw, ends_of, generation_config
from .pytorch_face import Asked, asked
from .pytorch_gone import GONE
from .pytorch_lora import Choice
from .pytorch_prompt import prompt_logprobs
from .pytorch_replies import Answer, Form, Piece, event, failure

READER = ThreadPoolExecutor(1, "mmq-reader")  # pictures become tensors here, while the server goes on answering


@dataclass(frozen=True)
class Ready:
    """What one request wants of the model: tensors of each prompt, [1, tokens], not on the model's device yet, and the
    longest answer to it."""

    wanted: Asked
    model: Any
    processor: Any
    prompts: tuple[tuple[Any, int], ...]

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(inputs["input_ids"].shape[-1] for inputs, _ in self.prompts)


class Endpoint:
    """A handler of transformers serve's, its requests read and answered as other engines do. `names`: the model's and
    its adapters'; `choice`: which of these its thread computes with."""

    def __init__(self, handler: Any, *, names: Sequence[str], context: int, choice: Choice, chat: bool) -> None:
        self.handler, self.names, self.context, self.choice, self.chat = handler, names, context, choice, chat
        # one thread computes for the model, whatever the adapter: requests follow one another
        self.thread = handler.generation_state.get_manager(names[0])

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The reply to one request; its errors in OpenAI's form."""
        try:
            wanted = asked(body, names=self.names, chat=self.chat)
        except LookupError as e:
            return refusal(str(e.args[0]), 404)
        except ValueError as e:
            return refusal(str(e), 400)
        ready = await asyncio.get_running_loop().run_in_executor(READER, self._read, wanted)
        if isinstance(ready, str):
            return refusal(ready, 400)
        form = Form(request_id, wanted.model, self.chat, wanted.logprobs is not None)
        if wanted.stream:
            return StreamingResponse(self._stream(ready, form), media_type="text/event-stream")
        try:
            return JSONResponse(await self._whole(ready, form))
        except Exception as e:
            return refusal(broken(e), 500)

    def _read(self, wanted: Asked) -> Ready | str:
        """The request, ready, or what is wrong with it. Templates and processors raise anything, StopIteration too, and
        no future can hold that: it would be waited for without an end."""
        try:
            return self._ready(wanted)
        except Exception as e:
            said = str(e) or "the model's processor cannot read this request"
            return said if type(e) is ValueError else f"{type(e).__name__}: {said}"

    def _ready(self, wanted: Asked) -> Ready:
        """The request's prompts as tensors. ValueError where one, or what is wanted behind it, is past the context, and
        whatever templates and processors raise."""
        _, model, processor = self.handler._resolve_model({"model": self.names[0]})
        words = model.get_input_embeddings().weight.shape[0]
        if strange := [token for token in wanted.how.bias if token >= words]:
            raise ValueError(f"logit_bias names token {strange[0]}; the model has {words}, counted from 0")
        texts = [self._conversation(wanted, model, processor)] if self.chat else []
        texts += [_completed(prompt, processor, words) for prompt in wanted.prompts]
        prompts = []
        for inputs in texts:
            room = self._room(inputs["input_ids"].shape[-1], wanted.how.max_tokens)
            for name, value in inputs.items():  # a processor may not know in which type the model looks at pictures
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    inputs[name] = value.to(model.dtype)
            prompts.append((inputs, room))
        return Ready(wanted, model, processor, tuple(prompts))

    def _conversation(self, wanted: Asked, model: Any, processor: Any) -> Any:
        modality = self.handler.model_manager.get_model_modality(model, processor=processor)
        parts = [p for m in wanted.messages if isinstance(m.get("content"), list) for p in m["content"]]
        if modality == Modality.LLM and (media := [p["type"] for p in parts if p["type"] != "text"]):
            raise ValueError(f"this model takes words alone, and the request has a part of type {media[0]}")
        video = any(part["type"] == "video_url" for part in parts)
        options: dict[str, Any] = template_words(processor, {**self.handler.chat_template_kwargs, **wanted.template})
        if video:  # the frames that its processor takes by itself: a short one has not the 32 of transformers serve
            options["processor_kwargs"] = {"num_frames": None, **wanted.frames}
            options["load_audio_from_video"] = modality == Modality.MULTIMODAL
        return processor.apply_chat_template(
            self.handler.get_processor_inputs_from_messages(wanted.messages, modality),
            add_generation_prompt=wanted.opened,
            tools=wanted.tools,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )

    def _room(self, length: int, wanted: int | None) -> int:
        """The longest answer behind so many tokens."""
        if length + (wanted or 1) > self.context:
            more = f" and max_tokens {wanted}" if wanted else ""
            raise ValueError(
                f"the model's context is {self.context} tokens; the prompt's {length}{more} are more: ask for less"
            )
        return self.context - length

    async def _whole(self, ready: Ready, form: Form) -> dict[str, Any]:
        if ready.wanted.prompt_logprobs:
            return form.unsaid(await self._prompt_logprobs(ready))
        answers = []
        async for answer, piece in self._answers(ready):
            if piece is None:
                answers.append(answer)
        return form.whole(answers, ready.tokens)

    async def _stream(self, ready: Ready, form: Form) -> AsyncIterator[str]:
        answers: list[Answer] = []
        try:
            async for answer, piece in self._answers(ready):
                if not answers or answers[-1] is not answer:
                    answers.append(answer)
                    if self.chat:
                        yield form.opening(answer)
                yield form.chunk(piece or Piece(), answer, answer.finish or None)
            if ready.wanted.usage:
                yield form.last(answers, ready.tokens)
            yield "data: [DONE]\n\n"
        except Exception as e:
            yield event(failure(broken(e), 500))

    async def _answers(self, ready: Ready) -> AsyncIterator[tuple[Answer, Piece | None]]:
        """The pieces of each answer, which has them when it is asked for the next; behind its last None."""
        n, gone = ready.wanted.how.n, GONE.get()
        try:
            for index in range(n * len(ready.prompts)):
                inputs, room = ready.prompts[index // n]
                answer = Answer(index)
                async for piece in self._drawn(ready, inputs, room, answer, gone, again=index % n):
                    yield answer, piece
                    answer.add(piece)
                yield answer, None
        finally:  # where a stream is broken off
            gone.set()

    async def _drawn(
        self, ready: Ready, inputs: Any, room: int, answer: Answer, gone: threading.Event, *, again: int
    ) -> AsyncIterator[Piece]:
        """The pieces of one answer, drawn on the model's thread; `again`: how many were drawn to this prompt before."""
        wanted, how = ready.wanted, ready.wanted.how
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception | None]()

        def tell(piece: Piece | Exception | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, piece)

        parser = build_response_parser(ready.processor, ready.model, inputs["input_ids"]) if self.chat else None
        words = getattr(ready.processor, "tokenizer", ready.processor)
        drawing = Drawing(words, how, logprobs=wanted.logprobs, parser=parser, tell=tell, gone=gone)
        options: dict[str, Any] = {"temperature": how.temperature, "top_p": how.top_p}
        base = self.handler._build_generation_config(options, ready.model.generation_config)
        config = generation_config(base, how, room=room)

        def job() -> None:
            try:
                if not gone.is_set():
                    self._choose(wanted)
                    seed = None if how.seed is None else how.seed + again
                    draw(ready.model, inputs, config, drawing, seed=seed)
                tell(None)
            except Exception as e:
                tell(e)

        self.thread.submit(job)
        while (piece := await told.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
        answer.finish, answer.count = drawing.finish(ends_of(config)), len(drawing.tokens)

    async def _prompt_logprobs(self, ready: Ready) -> list[Any]:
        inputs, _ = ready.prompts[0]

        def job() -> list[float]:
            self._choose(ready.wanted)
            return prompt_logprobs(ready.model, inputs.to(ready.model.device))

        values = await self.thread.async_submit(job)
        words = getattr(ready.processor, "tokenizer", ready.processor)
        ids = inputs["input_ids"][0, 1:].tolist()
        told = [{str(t): {"logprob": v, "decoded_token": words.decode([t])}} for t, v in zip(ids, values, strict=True)]
        return [None, *told]

    def _choose(self, wanted: Asked) -> None:
        """On the model's thread: compute with the adapter that the request names, or with none."""
        self.choice.name = "" if wanted.model == self.names[0] else wanted.model


def template_words(processor: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `words` that the model's template knows. A processor would take all others for settings of its own, as
    the size that pictures are made; vLLM leaves them out."""
    template = getattr(processor, "chat_template", None)
    known = _get_template_variables(template.get("default") if isinstance(template, dict) else template)
    return {name: value for name, value in words.items() if name in known}


def _completed(prompt: str | list[int], processor: Any, words: int) -> Any:
    """A text to be completed, or tokens, as tensors. ValueError for a token that the model has not."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")
    if strange := [token for token in prompt if token >= words]:
        raise ValueError(f"prompt names token {strange[0]}; the model has {words}, counted from 0")
    return tokenizer.pad({"input_ids": [prompt]}, return_tensors="pt")


def broken(error: Exception) -> str:
    """What a client hears of a fault of the engine's, which goes into the log whole."""
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return f"the engine failed: {type(error).__name__}: {error}"


def refusal(why: str, status: int) -> JSONResponse:
    """An error as OpenAI's servers have it."""
    return JSONResponse(failure(why, status), status)

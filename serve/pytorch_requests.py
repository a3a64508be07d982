"""Requests to the PyTorch engine on their way through `transformers serve`: checked before, bounded within, told after.

Part of the engine's program (pytorch_engine.py), which puts these two before the handlers and the generation of
transformers'. What a request may say is pytorch_face.py's business.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse

from .pytorch_face import asked, failure, token_entry, unsaid
from .pytorch_prompt import prompt_logprobs

# what the request under way asked for, and the log-probabilities of its answer
UNDER_WAY: ContextVar[dict[str, Any]] = ContextVar("under_way")


class Checked:
    """A handler of transformers serve, its requests checked and translated first, its errors in OpenAI's form."""

    def __init__(self, handler: Any, name: str) -> None:
        self.handler, self.name = handler, name

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        state: dict[str, Any] = {}
        UNDER_WAY.set(state)
        try:
            state["asked"] = wanted = asked(body, name=self.name)
            if wanted.prompt_logprobs:
                values = await prompt_logprobs(self.handler, wanted.body, opened=wanted.opened)
                return JSONResponse(unsaid(self.name, request_id, values))
            reply = await self.handler.handle_request(wanted.body, request_id)
        except HTTPException as e:
            return refusal(str(e.detail), e.status_code)
        except LookupError as e:
            return refusal(str(e.args[0]), 404 if state == {} else 400)
        except Exception as e:  # templates and processors raise whatever they like; what generation raises is our fault
            if "generating" not in state:
                return refusal(f"{type(e).__name__}: {e}", 400)
            logging.getLogger(__name__).exception("a request failed")
            return refusal(f"the engine failed: {type(e).__name__}: {e}", 500)
        if wanted.logprobs is None or not isinstance(reply, JSONResponse):
            return reply
        told = json.loads(bytes(reply.body))
        told["choices"][0]["logprobs"] = {"content": state["logprobs"]}
        return JSONResponse(told)


def refusal(why: str, status: int) -> JSONResponse:
    """An error as OpenAI's servers have it, one line of it."""
    return JSONResponse(failure(" ".join(why.split())[:1000], status), status)


class Bounded:
    """A generation manager that holds requests to the model's context, and keeps log-probabilities if asked."""

    def __init__(self, manager: Any, context: int) -> None:
        self.manager, self.context = manager, context

    def init_cb(self, *args: Any) -> None:
        self.manager.init_cb(*args)

    def bound(self, model: Any, inputs: Any, config: Any = None) -> None:
        """ValueError for a prompt past the context and for a token that the model has not; pictures in the model's own
        type, the answer's length into `config` where one will be generated."""
        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        given = UNDER_WAY.get()["asked"].body.get("max_tokens")
        if length + (given or 1) > self.context:
            more = f" and max_tokens {given}" if given else ""
            raise ValueError(
                f"the model's context is {self.context} tokens; the prompt's {length}{more} are more: ask for less"
            )
        words = model.get_input_embeddings().weight.shape[0]
        if strange := [token for token in UNDER_WAY.get()["asked"].body.get("logit_bias") or () if int(token) >= words]:
            raise ValueError(f"logit_bias names token {strange[0]}; the model has {words}, counted from 0")
        for name, value in inputs.items():  # a processor may not know in which type the model looks at pictures
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.to(model.dtype)
        UNDER_WAY.get()["generating"] = True
        if config is None:
            return
        config.max_new_tokens = given or self.context - length
        if UNDER_WAY.get()["asked"].ignore_eos:
            config.min_new_tokens = config.max_new_tokens  # no end token before: None would mean the model's own

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> Any:
        self.bound(model, inputs, config)
        return self.manager.generate_streaming(model, processor, inputs, config, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
    ) -> Any:
        self.bound(model, inputs, config)
        top = UNDER_WAY.get()["asked"].logprobs
        if top is None:
            return await self.manager.generate_non_streaming(model, processor, inputs, config, request_id)
        config.return_dict_in_generate = config.output_logits = True
        made = await self.manager.async_submit(model.generate, **inputs, generation_config=config, tokenizer=processor)
        start = inputs["input_ids"].shape[-1]
        ids = made.sequences[0, start:]
        words = getattr(processor, "tokenizer", processor)
        UNDER_WAY.get()["logprobs"] = [
            entry(words, int(token), logits[0].float().log_softmax(-1), top)
            for token, logits in zip(ids, made.logits, strict=True)
        ]
        return processor.decode(ids, skip_special_tokens=True), start, ids


def entry(words: Any, token: int, logprobs: Any, top: int) -> dict[str, Any]:
    """OpenAI's record of one token, with the `top` likeliest in its place."""
    best = logprobs.topk(top) if top else None
    others = zip(best.values.tolist(), best.indices.tolist(), strict=True) if best is not None else ()
    return token_entry(words.decode([token]), float(logprobs[token]), [(words.decode([i]), p) for p, i in others])

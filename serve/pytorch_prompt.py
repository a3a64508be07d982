"""Log-probabilities of a prompt's own tokens, as vLLM's `prompt_logprobs: 0` gives them; transformers serve has none.

One forward pass on the model's own thread, nothing generated. Part of the engine's program (pytorch_engine.py).
"""

from __future__ import annotations

from typing import Any

import torch


async def prompt_logprobs(handler: Any, body: dict[str, Any], *, opened: bool) -> list[dict[str, Any] | None]:
    """For each token of the conversation None (the first) or {its id: {"logprob", "decoded_token"}}. `opened`: whether
    the assistant's turn is begun behind it. `handler` is transformers serve's own for chats."""
    model_id, model, processor = handler._resolve_model(body)
    modality = handler.model_manager.get_model_modality(model, processor=processor)
    messages = handler.get_processor_inputs_from_messages(body["messages"], modality)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=opened, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    manager = handler.generation_state.get_manager(model_id)
    manager.bound(model, inputs)
    ids = inputs["input_ids"][0]

    @torch.no_grad()
    def forward() -> list[float]:
        logits = model(**inputs).logits[0, :-1].float()
        return (logits.gather(1, ids[1:, None])[:, 0] - logits.logsumexp(-1)).tolist()

    values = await manager.manager.async_submit(forward)
    words = getattr(processor, "tokenizer", processor)
    found: list[dict[str, Any] | None] = [None]
    for token, value in zip(ids[1:].tolist(), values, strict=True):
        found.append({str(token): {"logprob": value, "decoded_token": words.decode([token])}})
    return found

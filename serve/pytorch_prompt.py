"""Log-probabilities of a prompt's own tokens, as vLLM's `prompt_logprobs: 0` gives them; transformers serve has none.

One forward pass, nothing generated. Part of the engine's program (pytorch_engine.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


@torch.no_grad()
def prompt_logprobs(model: Any, inputs: Mapping[str, Any]) -> list[float]:
    """Of the tokens behind the first of a prompt, [1, tokens], in nats. On the model's thread alone."""
    ids = inputs["input_ids"][0]
    logits = model(**inputs).logits[0, :-1].float()
    return (logits.gather(1, ids[1:, None])[:, 0] - logits.logsumexp(-1)).tolist()

"""What a config.json leaves out because it is its class's default: published ones often hold what differs alone.

LLaVA-1.5's tells of its decoder its vocabulary and its context, Gemma 3's neither heads nor context. The values are
those of transformers' classes; a test asks those. Knows sizes, no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "vocab_size"),
)
_ROWS = {  # in the order of _KEYS; None where the class makes it of the others, or has nothing
    "llama": (4096, 11008, 32, 32, None, None, 2048, 32000),
    "mistral": (4096, 14336, 32, 32, 8, None, 131072, 32000),
    "mixtral": (4096, 14336, 32, 32, 8, None, 131072, 32000),
    "qwen2": (4096, 22016, 32, 32, 32, None, 32768, 151936),
    "qwen3": (4096, 22016, 32, 32, 32, 128, 32768, 151936),
    "gemma2": (2304, 9216, 26, 8, 4, 256, 8192, 256000),
    "gemma3_text": (2304, 9216, 26, 8, 4, 256, 131072, 262208),
}
_MORE: dict[str, dict[str, Any]] = {  # of each so many layers one sees all, the others a window
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 6},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {key: value for key, value in zip(_KEYS, row, strict=True) if value is not None} | _MORE.get(kind, {})
    for kind, row in _ROWS.items()
}


def whole(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """A decoder's config with what it leaves out, as far as that is known here."""
    defaults = DEFAULTS.get(str(text.get("model_type")))
    return {**defaults, **text} if defaults else text

"""What each of several cards holds of a model: layers of a pipeline, heads of a layer, a mixture's experts. Arithmetic.

As vLLM 0.32 deals them out (distributed/utils.py, model_executor/layers). Knows no flags and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..export.subject import text_config
from ..recipes.sizes import count_of


def stages(layers: int, pp: int) -> tuple[int, ...]:
    """Decoder layers of each stage of a pipeline: what is over goes to the middle stages first, never to the last."""
    found = [layers // pp] * pp
    for i in range(2, layers % pp + 2):
        found[-i] += 1
    return tuple(found)


def layer_count(config: Mapping[str, Any]) -> int:
    """Layers of the decoder. ValueError where the config does not tell."""
    try:
        return int(text_config(config)["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"config.json does not tell how many layers the decoder has: {e}") from None


def fullest(config: Mapping[str, Any], pp: int) -> float:
    """The largest share of the decoder's layers that one stage of the pipeline has, 1.0 without a pipeline."""
    if pp == 1:
        return 1.0
    layers = layer_count(config)
    return max(stages(layers, pp)) / layers


def decoder_bytes(
    config: Mapping[str, Any], size: int, *, experts: int = 0, tp: int = 1, pp: int = 1, dp: int = 1
) -> int:
    """Bytes of the decoder's `size` on the fullest card. Replicas hold everything again, but for a mixture's `experts`
    (bytes, part of `size`), which are dealt out over the replicas too."""
    return math.ceil(((size - experts) / tp + experts / (tp * dp)) * fullest(config, pp))


def undealt(config: Mapping[str, Any], *, tp: int = 1, pp: int = 1) -> str:
    """Why the decoder cannot be dealt out so, "" where it can: heads over `tp` cards (key-value heads are repeated
    where there are fewer), layers over `pp` stages."""
    text = text_config(config)
    heads = count_of(text.get("num_attention_heads")) or 1
    pairs = count_of(text.get("num_key_value_heads"))
    if heads % tp:
        return f"{heads} attention heads cannot be dealt to {tp} GPUs"
    if pairs and pairs % tp and tp % pairs:
        return f"{pairs} key-value heads cannot be dealt or repeated to {tp} GPUs"
    if pp > 1 and layer_count(config) < pp:
        return f"{layer_count(config)} layers cannot be dealt to {pp} stages of a pipeline"
    return ""

"""A vision tower that packs its pictures into one sequence, on a GPU: one attention call a layer for all of them.

Towers such as Qwen2.5-VL's give their attention the bounds of each picture, or of each window of it. Without the
flash-attn package transformers goes through those pieces one by one, sixteen windows a picture and layer. torch has
such a kernel too (FlashAttention-2, Dao, 2023); this is how transformers comes to it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

NAME = "flash_packed"  # transformers hands over the bounds where the name says flash
CAPABLE = (8, 0)  # compute capability from which the kernel runs


def pack_pictures(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let every attention in `module` that takes bounds (`cu_seqlens`) use torch's own kernel for packed sequences.
    Nothing where `device`, `dtype` or this torch has none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABLE:
        return
    if dtype not in (torch.float16, torch.bfloat16):
        return
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    in_pieces = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
        scaling: float | None = None, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None, max_length_k: int | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Everything [1, heads, tokens, head_dim] in, [1, tokens, heads, head_dim] out."""
        if attention_mask is not None or cu_seq_lens_q is None or cu_seq_lens_k is None:
            return in_pieces(owner, query, key, value, attention_mask, scaling=scaling, **options)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = (int(max_length_q or query.shape[2]), int(max_length_k or key.shape[2]))
        out = varlen_attn(q, k, v, cu_seq_lens_q.int(), cu_seq_lens_k.int(), *longest, scale=scaling)
        assert isinstance(out, Tensor)
        return out[None], None

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    for part in module.modules():
        takes = inspect.signature(part.forward).parameters
        config: Any = getattr(part, "config", None)
        if config is not None and "cu_seqlens" in takes and hasattr(part, "scaling"):  # an attention, not a block
            config._attn_implementation = NAME

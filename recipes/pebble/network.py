"""Qwen2-VL's forward pass written for training: whole batches, one picture size a batch, no padding mask.

Takes the weights of the transformers model by name and gives the same numbers (a test compares them); transformers'
own pass loops over pictures and works out positions token by token, which leaves a GPU idle on a model this small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the processor (CLIP's)
STD = (0.26862954, 0.26130258, 0.27577711)


def positions(ids: np.ndarray, grids: list[tuple[int, int, int]], pads: tuple[int, int]) -> np.ndarray:
    """Time, height and width position of each token [3, L] of one row, as transformers' `get_rope_index`.

    `grids` are (t, h, w) in merged cells of each run of placeholder tokens (`pads`: image's and video's) in order.
    """
    out, at, i = np.zeros((3, len(ids)), np.int64), 0, 0
    left = iter(grids)
    while i < len(ids):
        if ids[i] in pads:
            t, h, w = next(left)
            cells = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)
            out[:, i : i + cells.shape[1]] = cells + at
            at, i = at + max(h, w), i + cells.shape[1]
        else:
            out[:, i] = at
            at, i = at + 1, i + 1
    return out


def patches(pairs: Tensor, *, patch: int = 14, merge: int = 2) -> Tensor:
    """Normalized patches [N, patches, 3 * 2 * patch^2] of uint8 frame pairs [N, 2, H, W, 3], in merge-window order."""
    n, _, height, width, _ = pairs.shape
    mean, std = (torch.tensor(v, device=pairs.device) * 255 for v in (MEAN, STD))
    x = (pairs.float() - mean) / std
    x = x.view(n, 2, height // patch // merge, merge, patch, width // patch // merge, merge, patch, 3)
    # n, t, row, in-row, y, column, in-column, x, c -> n, row, column, in-row, in-column, c, t, y, x
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(n, -1, 3 * 2 * patch * patch)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; the sign of rotate-half is already in `sin` (see `_angles`)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _angles(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [..., size] of angles [..., size / 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def vision_block(x: Tensor, cos: Tensor, sin: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """One vision layer over [N, S, D]: every picture attends to itself alone."""
    n, s, d = x.shape
    y = F.layer_norm(x, (d,), w["norm1.weight"], w["norm1.bias"], 1e-6)
    qkv = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).view(n, s, 3, heads, -1)
    qk, v = qkv.split((2, 1), 2)
    q, k = _turned(qk, cos, sin).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v.squeeze(2).transpose(1, 2))
    x = x + F.linear(y.transpose(1, 2).reshape(n, s, d), w["attn.proj.weight"], w["attn.proj.bias"])
    y = F.layer_norm(x, (d,), w["norm2.weight"], w["norm2.bias"], 1e-6)
    y = F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])
    return x + F.linear(y * torch.sigmoid(1.702 * y), w["mlp.fc2.weight"], w["mlp.fc2.bias"])


def text_block(x: Tensor, cos: Tensor, sin: Tensor, w: dict[str, Tensor], heads: int, shared: int) -> Tensor:
    """One decoder layer over [B, L, D]; `shared` key/value heads. Padding stands right, so causal is enough."""
    b, length, d = x.shape
    y = F.rms_norm(x, (d,), w["input_layernorm.weight"], 1e-6)
    weight = torch.cat([w[f"self_attn.{p}_proj.weight"] for p in "qkv"])
    bias = torch.cat([w[f"self_attn.{p}_proj.bias"] for p in "qkv"])
    qkv = F.linear(y, weight, bias).view(b, length, heads + 2 * shared, -1)
    qk, v = qkv.split((heads + shared, shared), 2)
    q, k = _turned(qk, cos, sin).transpose(1, 2).split((heads, shared), 1)
    y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).reshape(b, length, d), w["self_attn.o_proj.weight"])
    y = F.rms_norm(x, (d,), w["post_attention_layernorm.weight"], 1e-6)
    gate, up = F.linear(y, torch.cat((w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]))).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])


def _under(weights: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name[len(prefix) :]: w.to(dtype) for name, w in weights.items() if name.startswith(prefix)}


def logits(
    weights: dict[str, Tensor],
    config: Any,
    batch: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Logits [labels, vocabulary] at `batch["at"]`, in float32.

    `batch`: ids [B, L]; places [3, B, L] (see `positions`); frames uint8 [F, H, W, 3]; pairs [N, 2], the two frames of
    each picture; seen, where in B * L the pictures' tokens stand; at, where in B * L the answers are foretold.
    """
    vis, txt = config.vision_config, config.text_config
    table = weights["model.language_model.embed_tokens.weight"].to(dtype)
    b, length = batch["ids"].shape
    x = F.embedding(batch["ids"], table)
    if len(batch["pairs"]):
        seen = look(weights, vis, batch["frames"][batch["pairs"]], dtype=dtype)
        x = x.view(b * length, -1).index_copy(0, batch["seen"], seen).view(b, length, -1)
    size = txt.hidden_size // txt.num_attention_heads
    rope = txt.rope_parameters
    turns = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, device=x.device).float() / size))
    angle = batch["places"][..., None].float() * turns  # 3, B, L, size / 2
    parts = angle.split(rope["mrope_section"], dim=-1)
    angle = torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)
    cos, sin = _angles(angle[:, :, None], dtype)
    for i in range(txt.num_hidden_layers):
        w = _under(weights, f"model.language_model.layers.{i}.", dtype)
        x = text_block(x, cos, sin, w, txt.num_attention_heads, txt.num_key_value_heads)
    x = x.view(b * length, -1)[batch["at"]]
    x = F.rms_norm(x, (txt.hidden_size,), weights["model.language_model.norm.weight"].to(dtype), 1e-6)
    return F.linear(x, table).float()


def look(weights: dict[str, Tensor], vis: Any, pairs: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The vision tower: uint8 frame pairs [N, 2, H, W, 3] to tokens [N * cells, hidden]."""
    w = _under(weights, "model.visual.", dtype)
    x = patches(pairs, patch=vis.patch_size, merge=vis.spatial_merge_size).to(dtype)
    x = F.linear(x, w["patch_embed.proj.weight"].reshape(vis.embed_dim, -1))
    rows, columns = pairs.shape[2] // vis.patch_size, pairs.shape[3] // vis.patch_size
    merge = vis.spatial_merge_size
    y, z = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    order = (t.view(rows // merge, merge, -1, merge).transpose(1, 2).reshape(-1).to(x.device) for t in (y, z))
    size = vis.embed_dim // vis.num_heads // 2
    turns = 1.0 / (10000.0 ** (torch.arange(0, size, 2, device=x.device).float() / size))
    angle = torch.cat([t[:, None].float() * turns for t in order], -1)
    cos, sin = _angles(angle[:, None, None], dtype)  # patches, 1, 1, head
    for i in range(vis.depth):
        x = vision_block(x, cos, sin, _under(w, f"blocks.{i}.", dtype), vis.num_heads)
    x = F.layer_norm(x, (vis.embed_dim,), w["merger.ln_q.weight"], w["merger.ln_q.bias"], 1e-6)
    x = x.reshape(-1, vis.embed_dim * merge * merge)
    x = F.gelu(F.linear(x, w["merger.mlp.0.weight"], w["merger.mlp.0.bias"]))
    return F.linear(x, w["merger.mlp.2.weight"], w["merger.mlp.2.bias"])

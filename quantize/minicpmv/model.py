"""MiniCPM-V as one module: the vision tower and the resampler of this package around a text model of transformers.

Parameters have the checkpoint's own names: `llm.*`, `vpm.*`, `resampler.*`. Knows no files but config.json's content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .processor import Processor, build_processor
from .release import release_of
from .resampler import Resampler
from .vision import Tower

NOT_TEXT = ("model_type", "architectures", "auto_map", "quantization_config", "vision_config", "slice_config")


class MiniCPMV(nn.Module):
    """`config` is the text model's, with `image_token_id`, in whose place a slice's vectors go. `ends` are the tokens
    that end an answer, whatever generation_config.json says: that of 2.5 leaves one out. `batch` slices at a time go
    through the tower."""

    base_model_prefix = ""

    def __init__(self, llm: Any, vpm: Tower, resampler: Resampler, *, ends: Sequence[int] = (), batch: int) -> None:
        super().__init__()
        self.llm, self.vpm, self.resampler = llm, vpm, resampler
        self.config = llm.config
        self.ends = tuple(ends)
        self.batch = batch
        self.generation_config = llm.generation_config
        self.all_tied_weights_keys = {f"llm.{a}": f"llm.{b}" for a, b in llm.all_tied_weights_keys.items()}

    @property
    def generation_config(self) -> Any:
        return self.llm.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        ends = value.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        value.eos_token_id = sorted({*ends, *self.ends}) or None
        self.llm.generation_config = value

    @property
    def base_model(self) -> Any:
        """What makes the last hidden states."""
        return self.hidden

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def tie_weights(self) -> None:
        self.llm.tie_weights()

    def look(self, pixel_values: Tensor, tgt_sizes: Tensor, frames: Tensor | None = None) -> Tensor:
        """The vectors of all slices behind one another: [slices (or groups of frames) * queries, hidden]."""
        grids = [(rows, columns) for rows, columns in tgt_sizes.tolist()]
        pixels = pixel_values.to(self.vpm.post_layernorm.weight.dtype).split([rows * cols for rows, cols in grids])
        groups: list[list[int]] = []
        for time, opens in [(-1, 1)] * len(grids) if frames is None else frames.tolist():
            groups += [[]] if opens else []
            groups[-1].append(time)
        made, start = [], 0
        for part in _batches(groups, self.batch):
            end = start + sum(map(len, part))
            seen = self.vpm(torch.cat(pixels[start:end]), grids[start:end])
            made.append(self.resampler(seen, grids[start:end], None if frames is None else part))
            start = end
        return torch.cat(made).flatten(0, 1)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, **slices: Any) -> Tensor:
        """[batch, tokens, hidden], every slice's vectors in their places. ValueError where the two differ in number."""
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embedded
        seen = self.look(pixel_values, **slices).to(embedded)
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != len(seen):
            raise ValueError(
                f"{int(places.sum())} places for {len(seen)} image vectors; does the text itself hold <unk>?"
            )
        return embedded.masked_scatter(places[..., None], seen)

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The text model's output, as of transformers; its `last_hidden_state` is [batch, tokens, hidden]."""
        embedded, rest = self._embedded(input_ids, inputs)
        return self.llm.model(inputs_embeds=embedded, **rest)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The same with `logits` [batch, tokens, vocabulary]."""
        embedded, rest = self._embedded(input_ids, inputs)
        return self.llm(inputs_embeds=embedded, **rest)

    def generate(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """As transformers' `generate`: long [batch, prompt + answer]."""
        embedded, rest = self._embedded(input_ids, inputs)
        return self.llm.generate(input_ids, inputs_embeds=embedded, **rest)

    def _embedded(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        ours = {k: inputs[k] for k in ("pixel_values", "tgt_sizes", "frames") if k in inputs}
        return self.embed(input_ids, **ours), {k: v for k, v in inputs.items() if k not in ours}


def _batches(groups: list[list[int]], most: int) -> list[list[list[int]]]:
    """The groups in runs of at most `most` slices, a larger group alone."""
    made: list[list[list[int]]] = []
    for group in groups:
        if not made or sum(map(len, made[-1])) + len(group) > most:
            made.append([])
        made[-1].append(group)
    return made


def build_model(
    config: Mapping[str, Any], *, image_token_id: int, ends: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> MiniCPMV:
    """The module for a config.json, its weights not loaded; on the meta device under accelerate's `init_empty_weights`.

    ValueError for a version that is not known, or a text model scaled in a way that no transformers class knows.
    """
    import transformers

    release = release_of(config)
    if config.get("scale_emb", 1) != 1:
        raise ValueError(f"scale_emb is {config['scale_emb']} in config.json; scaled embeddings are not known here")
    text = {"tie_word_embeddings": False, **{k: v for k, v in config.items() if k not in NOT_TEXT}}
    text_config = getattr(transformers, f"{release.text}Config")(**text)
    text_config.image_token_id = image_token_id
    llm = getattr(transformers, f"{release.text}ForCausalLM")(text_config)
    vision: dict[str, Any] = {
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
    }
    vision |= {"image_size": 980, "patch_size": 14, **(config.get("vision_config") or {})}
    vision["num_hidden_layers"] -= int(config.get("drop_vision_last_layer", True))
    vision_config = transformers.SiglipVisionConfig(**{k: v for k, v in vision.items() if k not in NOT_TEXT})
    vision_config._attn_implementation = "sdpa"
    tower = Tower(vision_config, one_row=release.one_row)
    resampler = Resampler(config.get("query_num", 64), text_config.hidden_size, vision_config.hidden_size)
    model = MiniCPMV(llm, tower, resampler, ends=ends, batch=config.get("vision_batch_size", 16))
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return model


def build(folder: Path, config: Mapping[str, Any], *, dtype: torch.dtype) -> tuple[MiniCPMV, Processor]:
    """Module (weights not loaded) and processor of the checkpoint in `folder`. Errors as of the two."""
    processor = build_processor(folder, config)
    model = build_model(config, image_token_id=processor.image_token_id, ends=processor.ends, dtype=dtype)
    return model, processor

"""The processor: messages and pictures become token ids, patches and grids, as the model's own processor makes them.

Its face is the part of a transformers processor that calibration and chat use. The tokenizer is read from
tokenizer.json; no remote class runs. Knows no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .release import Release, release_of
from .slices import Slicing, best_grid, patches, slices

PLACES = {"image": "(<image>./</image>)", "video": "(<video>./</video>)"}
Frames = Sequence[Sequence[int]]  # of one video: groups of frames that share their tokens, each frame by its time


@dataclass(frozen=True)
class Processor:
    """`queries` tokens stand for a slice. `numbered` pictures have their number before them."""

    tokenizer: Any
    release: Release
    slicing: Slicing
    queries: int
    numbered: bool

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    @property
    def image_token_id(self) -> int:
        """The token in whose place a slice's vectors go."""
        return self.tokenizer.convert_tokens_to_ids("<unk>")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        words = self.tokenizer.get_vocab()
        return tuple(words[end] for end in self.release.ends if end in words)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **options: Any
    ) -> str:
        """The prompt's text, a place in it for every picture and video. Without thinking, as the model's own chat."""
        options = {"enable_thinking": False, **options, "tokenize": False}
        plain = [{**message, "content": _joined(message["content"])} for message in messages]
        text = self.tokenizer.apply_chat_template(plain, add_generation_prompt=add_generation_prompt, **options)
        return text if add_generation_prompt else text.removesuffix(self.release.always_opens)

    def __call__(
        self,
        text: Sequence[str],
        *,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Any] = (),
        temporal_ids: Sequence[Frames] | None = None,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """Tensors of one prompt; those of several can be put behind one another.

        `input_ids`, `attention_mask` long [1, tokens]; with pictures `pixel_values` float32 [patches, 3, p, p] of all
        slices, `tgt_sizes` long [slices, 2] (rows, columns) and, where frames are packed, `frames` long [slices, 2]
        (time or -1, whether it opens a group). A video is a sequence of frames; `temporal_ids` has the frames' groups
        of each. ValueError when places and pictures differ in number or frames cannot be packed.
        """
        if len(text) != 1:
            raise ValueError(f"{len(text)} prompts at once; give one, and put the tensors behind one another")
        if temporal_ids is not None and not self.release.packs_frames:
            raise ValueError("frames cannot be packed: only MiniCPM-V 4.5 does so; leave temporal_ids out")
        pieces = _split(text[0])
        found = {kind: sum(k == kind for k, _ in pieces) for kind in PLACES}
        if found != {"image": len(images), "video": len(videos)}:
            raise ValueError(
                f"the prompt has {found['image']} places for images and {found['video']} for videos, "
                f"but {len(images)} and {len(videos)} came with it"
            )
        left = {"image": iter(images), "video": iter(videos)}
        groups = iter(temporal_ids or ())
        written, cut, times = "", [], []
        number = 0
        for kind, words in pieces:
            if kind == "image":
                image = next(left["image"])
                written += self._named(image.size, number)
                here = slices(image, self.slicing)
                cut += here
                times += [(-1, 1)] * len(here)
                number += 1
            elif kind == "video":
                frames = [_picture(frame) for frame in next(left["video"])]
                packed = next(groups) if temporal_ids is not None else [[-1]] * len(frames)
                if sum(map(len, packed)) != len(frames) or not all(packed):
                    raise ValueError(f"a video has {len(frames)} frames, but its temporal_ids are {packed}")
                written += "\n".join([self._slice("<image>", "</image>")] * len(packed))
                cut += [one for frame in frames for one in slices(frame, self.slicing, most=1)]
                times += [(time, int(i == 0)) for group in packed for i, time in enumerate(group)]
            else:
                written += words
        ids = torch.tensor([self.tokenizer.encode(written)])
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if cut:
            seen = [patches(piece, self.slicing) for piece in cut]
            made |= {"pixel_values": torch.cat([p for p, _ in seen]), "tgt_sizes": torch.tensor([g for _, g in seen])}
        if temporal_ids is not None:
            made["frames"] = torch.tensor(times)
        return made

    def _slice(self, begin: str, end: str) -> str:
        return begin + "<unk>" * self.queries + end

    def _named(self, size: tuple[int, int], number: int) -> str:
        """What stands for a picture: its number, the overview, and the slices row by row."""
        text = f"<image_id>{number}</image_id>" if self.numbered else ""
        text += self._slice("<image>", "</image>")
        if grid := best_grid(size, self.slicing):
            columns, rows = grid
            one = self._slice("<image>", "</image>") if self.release.nested else self._slice("<slice>", "</slice>")
            cells = "\n".join([one * columns] * rows)
            text += f"<slice>{cells}</slice>" if self.release.nested else cells
        return text


def _joined(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(PLACES.get(part["type"]) or part["text"] for part in content)


def _split(text: str) -> list[tuple[str, str]]:
    """The text cut at its places: (kind, words), kind "text" between them."""

    def at(kind: str, pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for which, words in pieces:
            first, *rest = words.split(PLACES[kind]) if which == "text" else [words]
            yield which, first
            for after in rest:
                yield kind, ""
                yield "text", after

    return list(at("video", at("image", iter([("text", text)]))))


def _picture(frame: Any) -> Image.Image:
    return frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))


def build_processor(folder: Path, config: Mapping[str, Any]) -> Processor:
    """The processor of the checkpoint in `folder`. OSError for a missing file, ValueError for what it cannot do."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that the remote class is not the one that opens the tokenizer
    path = folder / "preprocessor_config.json"
    for needed in (path, folder / "tokenizer.json"):
        if not needed.is_file():
            raise OSError(f"{needed}: missing; MiniCPM-V needs it, download the checkpoint's small files again")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not settings.get("slice_mode", True):
        raise ValueError(f"{path}: slice_mode is false; only sliced pictures can be prepared: set it to true")
    queries = settings.get("image_feature_size", 64)
    if queries != (wanted := config.get("query_num", 64)):
        raise ValueError(f"{path}: image_feature_size is {queries}, but config.json has query_num {wanted}")
    slicing = Slicing(
        side=settings.get("scale_resolution", 448),
        patch=settings.get("patch_size", 14),
        most=settings.get("max_slice_nums", 9),
        mean=tuple(settings.get("norm_mean", Slicing.mean)),
        std=tuple(settings.get("norm_std", Slicing.std)),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if lacking := {"<unk>", "<image>", "</image>", "<slice>", "</slice>"} - tokenizer.get_vocab().keys():
        raise ValueError(f"{folder}: its tokenizer.json lacks {', '.join(sorted(lacking))}; it is not MiniCPM-V's")
    return Processor(tokenizer, release_of(config), slicing, queries, settings.get("use_image_id", False))

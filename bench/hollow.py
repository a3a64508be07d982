"""Checkpoints of released models' shapes with nothing in them: `python -m mmq.bench.hollow SHAPE FOLDER [--awq]`.

Real names, shapes and types in the safetensors header over a file of zeros that takes no room on a disk: a planner and
an engine see a model's true size within a second. For memory alone; there is nothing to run or to quantize.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ..export.config import Packing, awq
from ..export.skips import skip_lists
from ..export.subject import read_subject
from ..recipes.pebble import model_folder
from ..serve.weights import part_of
from .shapes import config_of

GROUP = 128
BYTES = {"BF16": 2, "F16": 2, "I32": 4}
PIXELS = {"shortest_edge": 56**2, "longest_edge": 12845056}  # as Qwen2-VL and Qwen2.5-VL were published: 16,384 tokens
INTERNVL_WORDS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors' type and the shape


def qwen2_5_vl_7b() -> tuple[Any, Any]:
    """Config and processor of Qwen2.5-VL-7B."""
    import transformers as t

    return config_of("7b"), _qwen_processor(t.Qwen2_5_VLProcessor)


def qwen2_vl_2b() -> tuple[Any, Any]:
    """Config and processor of Qwen2-VL-2B, whose head is its embeddings."""
    import transformers as t

    like = config_of("3b")
    text = {**like.text_config.to_dict(), "model_type": "qwen2_vl_text", "hidden_size": 1536}
    text |= {"intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 28}
    text |= {"vocab_size": 151936, "tie_word_embeddings": True, "layer_types": None}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    more: dict[str, Any] = {name: getattr(like, name) for name in ids}
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16", **more)
    return config, _qwen_processor(t.Qwen2VLProcessor)


def internvl3_2b() -> tuple[Any, Any]:
    """Config and processor of InternVL3-2B in transformers' form: Qwen2.5-1.5B and a tower of 0.3 billion weights."""
    import transformers as t

    words = t.AutoTokenizer.from_pretrained(model_folder(), extra_special_tokens=INTERNVL_WORDS)
    words.add_special_tokens({"additional_special_tokens": list(INTERNVL_WORDS.values())})
    number = words.convert_tokens_to_ids
    text = {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "num_hidden_layers": 28,
        "vocab_size": 151674,
        "max_position_embeddings": 32768,
        "eos_token_id": number("<|im_end|>"),
        "tie_word_embeddings": False,
    }
    vision = {"model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14]}
    config = t.InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<IMG_CONTEXT>"),
        image_seq_length=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    eyes = t.GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)
    video = t.InternVLVideoProcessor(size={"height": 448, "width": 448})
    template = (model_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    return config, t.InternVLProcessor(eyes, words, video, image_seq_length=256, chat_template=template)


SHAPES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
    "qwen2-vl-2b": qwen2_vl_2b,
    "internvl3-2b": internvl3_2b,
}


def _qwen_processor(kind: Any) -> Any:
    import transformers as t

    return kind(
        image_processor=t.Qwen2VLImageProcessor(size=dict(PIXELS)),
        video_processor=t.Qwen2VLVideoProcessor(size=dict(PIXELS)),
        tokenizer=t.AutoTokenizer.from_pretrained(model_folder()),
        chat_template=(model_folder() / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def write_hollow(tensors: Tensors, file: Path) -> None:
    """A safetensors file of these tensors, all zeros, its data a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def as_awq(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same with the decoder's matrices [out, in] in AWQ's layout, in groups of 128, and the rest in float16."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (_, shape) in tensors.items():
        if len(shape) != 2 or part_of(name) != "decoder":
            found[name] = ("F16", shape)
            continue
        out, width = shape
        stem = name.removesuffix("weight")
        found[stem + "qweight"] = ("I32", (width, out // 8))
        found[stem + "qzeros"] = ("I32", (width // GROUP, out // 8))
        found[stem + "scales"] = ("F16", (width // GROUP, out))
    return found


def fill(folder: Path, tensors: Tensors, *, packed: bool = False) -> Path:
    """Put `tensors` into `folder`, which has its config.json and the processor's files; `packed`: as AWQ."""
    write_hollow(as_awq(tensors) if packed else tensors, folder / "model.safetensors")
    if packed:
        _tell_packed(folder, (), ())  # so that the names can be read as an engine will
        _tell_packed(folder, *skip_lists(read_subject(folder)))
    return folder


def _tell_packed(folder: Path, skip: tuple[str, ...], skipped: tuple[str, ...]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = awq(Packing("awq", GROUP, False, skip, skipped, "float16"))
    config["dtype"] = "float16"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")


def write(shape: str, folder: Path, *, packed: bool = False) -> Path:
    """A checkpoint of this shape in `folder`, bfloat16 or `packed` as AWQ. ValueError for an unknown shape."""
    import torch
    import transformers as t
    from transformers.core_model_loading import revert_weight_conversion

    if shape not in SHAPES:
        raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    config, processor = SHAPES[shape]()
    with torch.device("meta"):
        model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    kept = {name: p for name, p in model.named_parameters() if name not in tied}
    published = revert_weight_conversion(model, kept)  # the names on the hubs, which some engines know alone
    tensors = {name: ("BF16", tuple(p.shape)) for name, p in published.items()}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return fill(folder, tensors, packed=packed)


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--awq", "packed", is_flag=True, help="The decoder in AWQ, groups of 128.")
def main(shape: str, folder: Path, packed: bool) -> None:
    """Write a hollow checkpoint of SHAPE into FOLDER."""
    click.echo(write(shape, folder, packed=packed))


if __name__ == "__main__":
    main()

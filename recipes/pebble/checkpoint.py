"""What pebble is made of besides its weights: tokenizer, chat template, processors, configuration.

Everything is written by transformers' own `save_pretrained`. Knows how the model looks, not how it learns.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from .plain import CHINESE, ENGLISH
from .tasks import samples
from .words import PRINTED

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
VOCABULARY = 2048
PATCH, MERGE = 14, 2
# pixels: the canvases that were trained are 112 x 112 to 224 x 224; other pictures are resized into that range
SMALLEST, LARGEST = 112 * 112, 224 * 224
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] in ['image', 'image_url'] or 'image' in content -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif content['type'] in ['video', 'video_url'] or 'video' in content -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def tokenizer(*, seed: int = 0) -> Any:
    """A byte-level BPE of the world's own text: Chinese characters and digits stay single tokens; any UTF-8 encodes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    spoken = (part for s in samples("train", 6000, seed=seed) for m in s.messages for part in m["content"])
    texts = chain(
        (part["text"] for part in spoken if part["type"] == "text"),
        [" ".join(PRINTED), *PRINTED] * 20,
        [ENGLISH, CHINESE] * 40,
    )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL),
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(SPECIAL[1:]),
        chat_template=TEMPLATE,
    )


def processor(words: Any) -> Any:
    """Qwen2-VL's processor around this tokenizer."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": SMALLEST, "longest_edge": LARGEST}
    shape: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), **shape),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(size=dict(size), cap_pixels_per_frame=False, **shape),
        chat_template=TEMPLATE,
    )


def model(words: Any, *, layers: int = 5, inner: int = 768, sight: int = 6) -> Any:
    """A new Qwen2-VL of pebble's size with random weights in float32. `sight`: blocks of the vision tower."""
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    number = words.convert_tokens_to_ids
    end, stop = number("<|endoftext|>"), number("<|im_end|>")
    std = 0.04
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        "initializer_range": std,
        "bos_token_id": end,
        "eos_token_id": stop,
        "pad_token_id": end,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": sight,
        "embed_dim": 128,
        "hidden_size": 256,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "initializer_range": std,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    made = Qwen2VLForConditionalGeneration(config).float()
    made.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=[stop, end], pad_token_id=end, do_sample=False
    )
    return made


def save(made: Any, handler: Any, folder: Path) -> None:
    """Write model (bfloat16), processor and tokenizer to `folder`, as `from_pretrained` reads them."""
    import copy

    import torch

    half = copy.deepcopy(made).to(torch.bfloat16)
    for config in (half.config, half.config.text_config, half.config.vision_config):
        config.dtype = torch.bfloat16
    half.save_pretrained(folder)
    for key in ("is_local", "local_files_only"):  # how this tokenizer was loaded is not part of it
        handler.tokenizer.init_kwargs.pop(key, None)
    handler.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)

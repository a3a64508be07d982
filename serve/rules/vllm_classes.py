"""What vLLM's model classes can do beside answering: pipelines, LoRA, picture encoders that are whole on each card.

Asked of the classes of vLLM 0.32.0 themselves (`supports_pp`, `supports_lora`, `supports_encoder_tp_data`,
`supports_tower_connector_lora`, `embedding_modules`); a test asks those of the vLLM that is installed.
"""

from __future__ import annotations

_QWEN_VL = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
_GLM_V = ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration")

NO_PIPELINE = frozenset({"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"})
NO_LORA = frozenset({"LlavaOnevisionForConditionalGeneration", "Phi3VForCausalLM", "DeepseekVLV2ForCausalLM", "Ovis"})
# `--mm-encoder-tp-mode data`
WHOLE_ENCODER = frozenset(
    {*_QWEN_VL, *_GLM_V, "InternVLChatModel", "MiniCPMV", "MiniCPMO", "MiniCPMV4_6ForConditionalGeneration"}
)
# `--enable-tower-connector-lora`, without which adapters of the encoder are left out in silence
ENCODER_LORA = frozenset(
    {
        *_QWEN_VL,
        *_GLM_V,
        "InternVLChatModel",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    }
)
# decoders of which the embeddings and the head take adapters
HEAD_LORA = frozenset(
    {
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "MixtralForCausalLM",
        "InternLM3ForCausalLM",
        "Phi3ForCausalLM",
    }
)
# and those of which they do not; of the other classes, whose decoders differ, nothing is said
NO_HEAD_LORA = frozenset(
    {
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "InternLM2ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    }
)

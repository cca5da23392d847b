"""Tiny random models of the families that people fine-tune, each with its family's quirk switched on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA2 = {"mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_n_heads": 4}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}

# name -> (the classes' stem in transformers, config class, what differs from SHAPE)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("Llama", "LlamaConfig", {}),
    "Qwen2.5": ("Qwen2", "Qwen2Config", {}),
    "Qwen3": ("Qwen3", "Qwen3Config", {"tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3Moe", "Qwen3MoeConfig", EXPERTS),
    "Qwen3-Next": (
        "Qwen3Next",
        "Qwen3NextConfig",
        {**EXPERTS, **GATED_DELTA, "shared_expert_intermediate_size": 32},
    ),
    "Qwen3.5": ("Qwen3_5", "Qwen3_5TextConfig", GATED_DELTA),
    "GLM (ChatGLM3, GLM-4-9b)": ("Glm", "GlmConfig", {"attention_bias": True}),
    "GLM-4-0414": ("Glm4", "Glm4Config", {}),
    "Gemma-2": (
        "Gemma2",
        "Gemma2Config",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "Gemma-3": ("Gemma3", "Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 16}),
    "Phi-3": ("Phi3", "Phi3Config", {}),
    "Mistral with a window": ("Mistral", "MistralConfig", {"sliding_window": 8}),
    "Mixtral": ("Mixtral", "MixtralConfig", LOCAL_EXPERTS),
    "Cohere": ("Cohere", "CohereConfig", {"logit_scale": 0.5}),
    "Cohere 2": ("Cohere2", "Cohere2Config", {"logit_scale": 0.5, **WINDOWED}),
    "DeepSeek-V3": (
        "DeepseekV3",
        "DeepseekV3Config",
        {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "Granite": ("Granite", "GraniteConfig", {"attention_multiplier": 0.5, "logits_scaling": 3.0}),
    "Granite-4 hybrid": (
        "GraniteMoeHybrid",
        "GraniteMoeHybridConfig",
        {**MAMBA2, **LOCAL_EXPERTS, "layer_types": ["mamba", "attention"], "mamba_d_head": 32, "logits_scaling": 3.0},
    ),
    "gpt-oss": ("GptOss", "GptOssConfig", {**WINDOWED, **LOCAL_EXPERTS}),
    "LFM2": ("Lfm2", "Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Falcon-H1": ("FalconH1", "FalconH1Config", {**MAMBA2, "mamba_d_ssm": 64, "mamba_d_head": 16}),
    "Bamba": ("Bamba", "BambaConfig", {**MAMBA2, "mamba_d_head": 32, "attn_layer_indices": [1]}),
    "Mamba": ("Mamba", "MambaConfig", {"state_size": 8}),
    "Mamba-2": ("Mamba2", "Mamba2Config", {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16}),
}
RANDOM_BY_HAND = {"gpt-oss": ("sinks",)}  # what a random model has at 0 and a trained one has not


def build_base(family: str, **more: Any) -> PreTrainedModel:
    """A random model in fp32; the same for the same family. more: what differs from its shape besides."""
    torch.manual_seed(0)
    stem, config, changes = FAMILIES[family]
    build: Callable[..., PreTrainedModel] = getattr(transformers, f"{stem}ForCausalLM")
    model = build(getattr(transformers, config)(**{**SHAPE, **changes, **more}))
    for name, parameter in model.named_parameters():
        if name.endswith(RANDOM_BY_HAND.get(family, ())) and family in RANDOM_BY_HAND:
            torch.nn.init.normal_(parameter)
    return model.requires_grad_(False)

"""Tiny random configurations of every family that is promised, by the name it goes by."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf
from transformers import PretrainedConfig

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPED = _ROUTED | {"n_group": 4, "topk_group": 2}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
         "mscale_all_dim": 1.0, "original_max_position_embeddings": 128}
_LAYERS = {"num_hidden_layers": 3}  # one dense layer and two with experts, or two kinds of window


def _sized(config: type[PretrainedConfig], *parts: dict, **more: object) -> PretrainedConfig:
    settings = dict(SIZES)
    for part in (*parts, more):
        settings |= part
    return config(**settings)


#: Family → a fresh configuration. The models that a name stands for are in ``MODELS``.
ZOO: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_moe": lambda: _sized(hf.Qwen2MoeConfig, _EXPERTS, shared_expert_intermediate_size=24),
    "qwen3_moe": lambda: _sized(hf.Qwen3MoeConfig, _EXPERTS, head_dim=16, norm_topk_prob=True),
    "deepseek_v2": lambda: _sized(hf.DeepseekV2Config, _MLA, _GROUPED, _LAYERS,
                                  topk_method="group_limited_greedy", num_key_value_heads=4),
    "deepseek_v2-lite": lambda: _sized(hf.DeepseekV2Config, _MLA, _ROUTED, q_lora_rank=None,
                                       num_key_value_heads=4),
    "deepseek_v3": lambda: _sized(hf.DeepseekV3Config, _MLA, _GROUPED, _LAYERS,
                                  rope_parameters=_YARN, num_key_value_heads=4),
    "mistral": lambda: _sized(hf.MistralConfig, sliding_window=5),
    "mixtral": lambda: _sized(hf.MixtralConfig, num_local_experts=4),
    "glm4": lambda: _sized(hf.Glm4Config, head_dim=8),
    "glm4_moe": lambda: _sized(hf.Glm4MoeConfig, _GROUPED, _LAYERS, head_dim=8, use_qk_norm=True),
    "phi3": lambda: _sized(hf.Phi3Config),
    "granite": lambda: _sized(hf.GraniteConfig, embedding_multiplier=2.0, logits_scaling=3.0,
                              residual_multiplier=0.5, attention_multiplier=0.3),
    "olmo2": lambda: _sized(hf.Olmo2Config),
    "gemma": lambda: _sized(hf.GemmaConfig, head_dim=8),
    "gemma2": lambda: _sized(hf.Gemma2Config, head_dim=8, sliding_window=5,
                             query_pre_attn_scalar=8),
    "gemma3": lambda: _sized(hf.Gemma3TextConfig, _LAYERS, head_dim=8, sliding_window=5,
                             query_pre_attn_scalar=8,
                             layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    "gpt_oss": lambda: _sized(hf.GptOssConfig, head_dim=8, num_local_experts=4,
                              num_experts_per_tok=2, sliding_window=5),
    "cohere2": lambda: _sized(hf.Cohere2Config, sliding_window=5, layer_types=[
        "sliding_attention", "full_attention"]),
    "mimo_v2": lambda: _sized(
        hf.MiMoV2FlashConfig, _EXPERTS, _LAYERS, head_dim=16, v_head_dim=8, n_routed_experts=8,
        sliding_window=5),
    "minicpm3": lambda: _sized(hf.MiniCPM3Config, _MLA, num_key_value_heads=4),
}

#: Families of the issue's closing line: nobody wrote a line for them.
UNNAMED: dict[str, Callable[[], PretrainedConfig]] = {
    "olmo3": lambda: _sized(hf.Olmo3Config, sliding_window=5),
    "smollm3": lambda: _sized(hf.SmolLM3Config),
    "starcoder2": lambda: _sized(hf.Starcoder2Config),
    "exaone4": lambda: _sized(hf.Exaone4Config, sliding_window=5),
    "seed_oss": lambda: _sized(hf.SeedOssConfig, head_dim=8),
    "stablelm": lambda: _sized(hf.StableLmConfig),
    "nemotron": lambda: _sized(hf.NemotronConfig),
    "minimax_m2": lambda: _sized(hf.MiniMaxM2Config, head_dim=8, num_local_experts=8),
    "ernie4_5_moe": lambda: _sized(hf.Ernie4_5_MoeConfig, moe_num_experts=4, moe_k=2,
                                   moe_intermediate_size=16, moe_layer_start_index=1),
}

#: Families that see images; ``vision_tiny`` makes them.
VISION = ("qwen2_5_vl",)

#: What a family's test stands for, for the README's table.
MODELS = {
    "llama": "Llama 2, 3, 3.1; R1-Distill-Llama",
    "qwen2": "Qwen2, Qwen2.5, QwQ; R1-Distill-Qwen",
    "qwen3": "Qwen3",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "deepseek_v2": "DeepSeek-V2 and V2-Lite",
    "deepseek_v3": "DeepSeek-V3, V3.1, R1; Kimi-K2",
    "qwen2_5_vl": "Qwen2.5-VL, MiMo-VL",
    "mistral": "Mistral", "mixtral": "Mixtral", "glm4": "GLM-4", "glm4_moe": "GLM-4-MoE",
    "phi3": "Phi-3", "granite": "Granite", "olmo2": "OLMo 2", "gemma": "Gemma",
    "gemma2": "Gemma 2", "gemma3": "Gemma 3 (text)", "gpt_oss": "GPT-OSS",
    "cohere2": "Command R7B (Cohere 2)", "mimo_v2": "MiMo-V2", "minicpm3": "MiniCPM3",
}

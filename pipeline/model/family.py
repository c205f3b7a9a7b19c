"""Which stock models are of the Llama family that gpt.py computes, and what tells its members apart."""

from typing import Any

from transformers import PreTrainedConfig

FAMILY = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""model_type → how the names of its classes in transformers begin. SmolLM2, TinyLlama and many more are of type llama,
Qwen2.5 is of type qwen2."""


def why_not_ours(config: PreTrainedConfig) -> str | None:
    """What a model has that gpt.py does not compute; None where gpt.py computes all that the model does."""
    if config.model_type not in FAMILY:
        return f"the architecture {config.model_type}"
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "scaled or partial rotary positions"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return "sliding windows"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    return "quantised weights" if getattr(config, "quantization_config", None) else None


def head_size(config: Any) -> int:
    """K: what the config says, else an equal share of the width."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def biases(config: Any) -> tuple[bool, bool, bool]:
    """Whether there are biases in attention's three input matrices, in its output matrix, and in the MLP."""
    attention = config.model_type in ("llama", "qwen3") and config.attention_bias
    return attention or config.model_type == "qwen2", attention, config.model_type == "llama" and config.mlp_bias


def has_qk_norm(config: Any) -> bool:
    """Whether queries and keys are normed (QK-norm)."""
    return config.model_type == "qwen3"

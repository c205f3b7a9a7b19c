"""The shapes at which PPO is timed; it imports nothing, so that the peer's process can read it beside another TRL."""

# 64 answers an update, 4 passes of 4 mini-batches, micro-batches of 16; 2.65M parameters
SMALL = {
    "width": 192,
    "layers": 6,
    "heads": 6,
    "vocabulary": 512,
    "prompt": 32,
    "response": 64,
    "batch": 64,
    "epochs": 4,
    "mini_batches": 4,
    "micro_batch": 16,
    "updates": 5,
}
# SmolLM2-135M's networks, 134,515,008 parameters each; less of everything else, so that a run takes minutes
SMOLLM2 = SMALL | {
    "type": "llama",
    "width": 576,
    "mlp": 1536,
    "layers": 30,
    "heads": 9,
    "groups": 3,
    "vocabulary": 49152,
    "response": 32,
    "batch": 16,
    "epochs": 2,
    "mini_batches": 2,
    "micro_batch": 8,
    "updates": 2,
}
# The same structure in seconds, to see that the benchmark runs; its ratio means nothing
QUICK = SMALL | {
    "width": 32,
    "layers": 1,
    "heads": 2,
    "prompt": 8,
    "response": 8,
    "batch": 8,
    "micro_batch": 1,
    "updates": 1,
}
# For 500 updates in two minutes: small, and answers end at the end token, so that no two updates have the same shapes
FLAT = SMALL | {"width": 64, "layers": 2, "heads": 2, "prompt": 16, "response": 32, "batch": 32, "updates": 500}
SHAPES = {"small": SMALL, "smollm2": SMOLLM2, "quick": QUICK, "flat": FLAT}


def model_config(shape: dict) -> dict:
    """Keyword arguments of transformers' AutoConfig.for_model."""
    return {
        "model_type": shape.get("type", "qwen3"),
        "vocab_size": shape["vocabulary"],
        "hidden_size": shape["width"],
        "intermediate_size": shape.get("mlp", shape["width"] * 8 // 3),
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape.get("groups", shape["heads"]),
        "head_dim": shape["width"] // shape["heads"],
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }

"""Open an exported model with transformers alone, in a process that has none of our code.

`python -I alone.py REQUEST OUT`. REQUEST is a JSON file: `folder`, `is_reward`, `prompt` (text, messages, or ids),
`max_new_tokens`; of a GGUF file also `gguf_file`, `head_dim` and `ends` (ids), which a folder says itself. OUT becomes
a safetensors file: `ids` (T,) of the prompt, `logits` (T, V) fp32 (of a reward model (1,)), `greedy` (R,), the answer's
ids. pipeline/export/check.py compares them with ours.
"""

import json
import sys
from pathlib import Path


def main(request_file: str, out: str) -> None:
    """Answer the request."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        GenerationConfig,
    )

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    folder, prompt, gguf_file = request["folder"], request["prompt"], request.get("gguf_file")
    kind = AutoModelForSequenceClassification if request["is_reward"] else AutoModelForCausalLM
    options = {"dtype": torch.float32, "trust_remote_code": False}
    if gguf_file:
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
        if hasattr(config, "head_dim"):
            config.head_dim = request["head_dim"]  # its reader passes over it, and takes 128 for Qwen3
        options |= {"gguf_file": gguf_file, "config": config}
    model = kind.from_pretrained(folder, **options).eval()
    if isinstance(prompt, str) or isinstance(prompt[0], dict):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(prompt, str):
            asks = prompt[-1]["role"] == "user"
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=asks)
            prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            prompt = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([prompt])
    found = {"ids": ids[0]}
    with torch.inference_mode():
        found["logits"] = model(ids).logits[0].float().clone()
        if not request["is_reward"] and request["max_new_tokens"]:
            ends = request["ends"] if gguf_file else model.generation_config.eos_token_id
            model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
            answer = model.generate(ids, do_sample=False, max_new_tokens=request["max_new_tokens"])
            found["greedy"] = answer[0, ids.shape[1] :].clone()
    if ours := sorted({"pipeline", "stages", "reward_data"} & set(sys.modules)):
        raise AssertionError(f"our own code was imported: {', '.join(ours)}")
    save_file({name: value.contiguous() for name, value in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Open a GGUF file with llama.cpp: `python -P llama_alone.py REQUEST OUT`, in a process that has none of our code.

REQUEST is a JSON file: `file`, `prompt` (text with its special tokens), `texts` (to tokenize), `max_new_tokens`, `ends`
(ids). OUT becomes a safetensors file: `ids` (T,), `logits` (T, V) fp32, `greedy` (R,), and `tokens_<i>` of each text.
"""

import json
import sys
from pathlib import Path


def main(request_file: str, out: str) -> None:
    """Answer the request."""
    import llama_cpp
    import numpy as np
    from safetensors.numpy import save_file

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    exact = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)  # the key/value cache, fp16 by default
    llm = llama_cpp.Llama(request["file"], n_ctx=0, logits_all=True, n_threads=1, verbose=False, **exact)
    ids = llm.tokenize(request["prompt"].encode(), add_bos=False, special=True)
    llm.eval(ids)
    found = {"ids": np.array(ids), "logits": np.array(llm.scores[: len(ids)], np.float32)}
    greedy: list[int] = []
    while len(greedy) < request["max_new_tokens"] and not set(greedy[-1:]) & set(request["ends"]):
        greedy.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(greedy[-1:])
    found["greedy"] = np.array(greedy)
    for number, text in enumerate(request["texts"]):
        found[f"tokens_{number}"] = np.array(llm.tokenize(text.encode(), add_bos=False, special=False))
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

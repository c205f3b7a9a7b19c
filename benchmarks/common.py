"""Fair timing on a machine that is not quiet: contenders take turns in every round, ratios are taken within a round."""

import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from pipeline.model.gpt import GPTForCausalLM

Contender = tuple[str, str]  # (who, precision), for example ("ours", "bf16")


def shape(width: int, *, layers: int = 6, heads: int = 6, positions: int = 256, vocabulary: int = 512) -> Qwen3Config:
    """A tied Qwen3 with a SwiGLU of 8/3 times the width."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        use_cache=False,
    )


def smollm2() -> LlamaConfig:
    """SmolLM2-135M's shape, as its config.json gives it: 134,515,008 parameters."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        use_cache=False,
    )


def twins(config: PreTrainedConfig) -> dict[str, torch.nn.Module]:
    """Our GPT and transformers' class with the same weights."""
    torch.manual_seed(0)
    ours, theirs = GPTForCausalLM(config), AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(ours.state_dict())
    return {"ours": ours, "transformers": theirs}


def alternate(contenders: dict[Contender, Callable[[], None]], rounds: int) -> dict[Contender, list[float]]:
    """Run every contender once a round, in an order that turns with the round, after one run each to warm up.

    Returns the seconds of each run. What slows the machine for a while slows all of one round, not one contender.
    """
    for run in contenders.values():
        run()
    seconds: dict[Contender, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: dict[Contender, list[float]], tokens: int) -> dict:
    """Tokens per second (median over the rounds) of each contender, and how many times faster ours are.

    "ratio" sets our fastest mode against the fastest of any peer, round by round, and takes the median of the rounds;
    "ratio_fp32" and so on set like against like, in every mode that both have.
    """
    modes = list(dict.fromkeys(mode for _, mode in seconds))

    def fastest(contenders: list[Contender]) -> Contender:
        return min(contenders, key=lambda name: statistics.median(seconds[name]))

    def ratio(ours: Contender, theirs: Contender) -> float:
        rounds = zip(seconds[theirs], seconds[ours], strict=True)
        return round(statistics.median(slow / fast for slow, fast in rounds), 3)

    ours, peers = ([name for name in seconds if (name[0] == "ours") == own] for own in (True, False))
    result: dict = {
        "ratio": ratio(fastest(ours), fastest(peers)),
        "best": " ".join(fastest(ours)),
        "best_peer": " ".join(fastest(peers)),
    }
    for mode in modes:
        if ("ours", mode) in seconds and (rivals := [name for name in peers if name[1] == mode]):
            result[f"ratio_{mode}"] = ratio(("ours", mode), fastest(rivals))
    result |= {
        f"{who}_{mode}_tokens_per_s": round(tokens / statistics.median(times)) for (who, mode), times in seconds.items()
    }
    return result


def table(title: str, result: dict) -> None:
    """Print one comparison for people."""
    print(f"\n{title}")
    for key, value in result.items():
        if key.endswith("_tokens_per_s"):
            print(f"  {key.removesuffix('_tokens_per_s').replace('_', ' '):32s} {value:>10,d} tokens/s")
    for key, value in result.items():
        if key.startswith("ratio_"):
            print(f"  {'ours / peer, ' + key.removeprefix('ratio_').replace('_', ' '):32s} {value:>10.2f}")
    print(f"  {'best / best':32s} {result['ratio']:>10.2f}   {result['best']} / {result['best_peer']}")


def report(name: str, results: dict[str, dict]) -> dict:
    """Print the last line, one JSON object: the first shape's figures under "ratio", all of them under "shapes"."""
    line = {
        "benchmark": name,
        "ratio": next(iter(results.values()))["ratio"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shapes": results,
    }
    print("\n" + json.dumps(line))
    return line

"""Sampling speed of ours against transformers' generate, both in this run: `python -m benchmarks.sample [--quick]`.

64 prompts of 32 tokens, 64 new tokens each (no end token, so that both do the same work), the same weights on both
sides, plain sampling at temperature 1. In bf16, each side runs its faster form: ours bf16 weights in the matrix
products (autocast), transformers the better of autocast and a model cast to bf16.
"""

import argparse
import copy

import torch
from transformers import GenerationConfig

from benchmarks.common import alternate, compare, report, shape, table, twins
from pipeline.sampler import generate

# name: config, rows, prompt tokens, new tokens
SHAPES = {"6L d192 B64 32+64": (shape(192), 64, 32, 64)}
QUICK = {"2L d64 B4 8+8": (shape(64, layers=2, heads=2), 4, 8, 8)}


def ours(model: torch.nn.Module, prompts: torch.Tensor, new: int, mode: str):
    rows = prompts.tolist()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
            samples = generate(model, rows, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        assert samples.logprobs.shape == (len(rows), new)

    return run


def theirs(model: torch.nn.Module, prompts: torch.Tensor, new: int, mode: str):
    config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
    mask = torch.ones_like(prompts)
    if mode == "bf16 weights":
        model = copy.deepcopy(model).bfloat16()

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
            output = model.generate(prompts, attention_mask=mask, generation_config=config)
        assert output.shape[1] == prompts.shape[1] + new

    return run


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for tests")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    results = {}
    for name, (config, rows, prompt, new) in (QUICK if options.quick else SHAPES).items():
        config.use_cache = True
        prompts = torch.randint(1, config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
        models = {who: model.eval() for who, model in twins(config).items()}
        runs = {("ours", mode): ours(models["ours"], prompts, new, mode) for mode in ("fp32", "bf16")}
        runs |= {
            ("transformers", mode): theirs(models["transformers"], prompts, new, mode)
            for mode in ("fp32", "bf16", "bf16 weights")
        }
        seconds = alternate(runs, options.rounds)
        # Their better bf16 counts
        cast = seconds.pop(("transformers", "bf16 weights"))
        if sum(cast) < sum(seconds["transformers", "bf16"]):
            seconds["transformers", "bf16"] = cast
        results[name] = compare(seconds, rows * new)
        table(f"sampling, {name}, {options.rounds} rounds", results[name])
    return report("sample", results)


if __name__ == "__main__":
    main()

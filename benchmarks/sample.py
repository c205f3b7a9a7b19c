"""Sampling speed of ours against transformers' generate, both in this run: `python -m benchmarks.sample [--quick]`.

64 prompts of 32 tokens, 64 new tokens each (no end token, so that both do the same work), or at SmolLM2-135M's shape
(`--shape smollm2`) 8 prompts and then one of 32 tokens, 32 new tokens each. Both sides have the same weights and sample
plainly at temperature 1; ours also returns the log-probabilities. Transformers runs in every way that might be its
fastest: fp32, bf16 autocast and a model cast to bf16, with its growing and its static cache, and the static one
compiled as its documentation says (a minute a model on CPU; its time is not counted). "best" compares our fastest with
its fastest, "fp32" and "bf16" ours with its fastest in that precision.
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedConfig

from benchmarks.common import Contender, alternate, compare, report, shape, smollm2, table, twins
from pipeline.model.sampler import generate
from pipeline.runtime.hf_trainer import why_not_compile

# name: config, rows, prompt tokens, new tokens
SHAPES = {
    "small": {"6L d192 B64 32+64": (shape(192), 64, 32, 64)},
    "smollm2": {"SmolLM2 B8 32+32": (smollm2(), 8, 32, 32), "SmolLM2 B1 32+32": (smollm2(), 1, 32, 32)},
    "quick": {"2L d64 B4 8+8": (shape(64, layers=2, heads=2), 4, 8, 8)},
}


def ours(model: torch.nn.Module, prompts: torch.Tensor, new: int, mode: str) -> Callable[[], None]:
    rows = prompts.tolist()

    def run() -> None:
        with torch.autocast(prompts.device.type, torch.bfloat16, enabled=mode == "bf16"):
            samples = generate(model, rows, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        assert samples.logprobs.shape == (len(rows), new)

    return run


def theirs(
    model: torch.nn.Module,
    prompts: torch.Tensor,
    new: int,
    autocast: bool = False,
    cache: str | None = None,
    compiled: bool = False,
) -> Callable[[], None]:
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0, cache_implementation=cache
    )
    if compiled:
        config.compile_config = CompileConfig(mode="reduce-overhead" if prompts.is_cuda else "default")
        config.compile_config._compile_all_devices = True  # without it, generate compiles on accelerators only
    mask = torch.ones_like(prompts)
    model = copy.deepcopy(model)  # the compiled step stays with the model

    def run() -> None:
        with torch.no_grad(), torch.autocast(prompts.device.type, torch.bfloat16, enabled=autocast):
            output = model.generate(prompts, attention_mask=mask, generation_config=config)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        assert output.shape[1] == prompts.shape[1] + new

    return run


def contenders(
    config: PreTrainedConfig, prompts: torch.Tensor, new: int, compiled: bool
) -> dict[Contender, Callable[[], None]]:
    models = {who: model.eval().to(prompts.device) for who, model in twins(config).items()}
    full = models["transformers"]
    half = copy.deepcopy(full).bfloat16()
    runs = {("ours", mode): ours(models["ours"], prompts, new, mode) for mode in ("fp32", "bf16")}
    runs |= {
        ("transformers", "fp32"): theirs(full, prompts, new),
        ("transformers static", "fp32"): theirs(full, prompts, new, cache="static"),
        # Autocast with a static cache fails inside transformers: keys in fp32, values in bf16
        ("transformers autocast", "bf16"): theirs(full, prompts, new, autocast=True),
        ("transformers cast", "bf16"): theirs(half, prompts, new),
        ("transformers cast static", "bf16"): theirs(half, prompts, new, cache="static"),
    }
    if compiled:
        for who, mode, model in (("transformers compiled", "fp32", full), ("transformers cast compiled", "bf16", half)):
            runs[who, mode] = theirs(model, prompts, new, cache="static", compiled=True)
    return runs


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", "smollm2"], default="small")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, not compiled, for tests")
    parser.add_argument("--no-compile", action="store_true", help="eager only: minutes less")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = not (options.quick or options.no_compile)
    if compiled and (reason := why_not_compile()):
        print(f"transformers is not compiled: {reason}")
        compiled = False
    results = {}
    for name, (config, rows, prompt, new) in SHAPES["quick" if options.quick else options.shape].items():
        config.use_cache = True
        prompts = torch.randint(1, config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
        seconds = alternate(contenders(config, prompts.to(device), new, compiled), options.rounds)
        results[name] = compare(seconds, rows * new)
        both = zip(seconds["ours", "fp32"], seconds["ours", "bf16"], strict=True)
        results[name]["ours_bf16_over_fp32"] = round(statistics.median(full / half for full, half in both), 3)
        table(f"sampling, {name}, {options.rounds} rounds", results[name])
    return report("sample", results)


if __name__ == "__main__":
    main()

"""Training speed of our GPT against transformers' Qwen3 and GPT-2, in this run: `python -m benchmarks.train [--quick]`.

A step is forward, backward and AdamW on a batch of random tokens, in fp32 and under bf16 autocast; ours and Qwen3 have
the same weights. Then each contender's faster precision once more through torch.compile (a minute a model on CPU; its
time is not counted). All take turns in every round; the ratios are medians over the rounds.

The share of peak is the model's FLOPs (pipeline/model/flops.py) a second over the fastest matrix product in bf16 that
this machine was seen to do: MFU, by another name.
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config

from benchmarks.common import alternate, compare, report, shape, table, twins
from pipeline.model.flops import flops_per_token, matmul_peak
from pipeline.runtime.hf_trainer import why_not_compile

# name: config, batch, tokens a row
SHAPES = {"6L d192 T128 B32": (shape(192), 32, 128), "6L d384 T256 B16": (shape(384), 16, 256)}
QUICK = {"2L d64 T32 B4": (shape(64, layers=2, heads=2), 4, 32)}


def contenders(config: Qwen3Config) -> dict[str, torch.nn.Module]:
    """Ours, Qwen3 and a GPT-2 of the same depth and width (its MLP has two matrices of four times the width)."""
    gpt2 = GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    both, model = twins(config), GPT2LMHeadModel(gpt2)
    model.loss_type = "ForCausalLM"  # transformers finds none for this class, and warns
    return {"ours": both["ours"], "qwen3": both["transformers"], "gpt2": model}


def training_step(model: torch.nn.Module, ids: torch.Tensor, mode: str) -> Callable[[], None]:
    """A function that does one optimizer step; mode is "fp32" or "bf16", with " compiled" after it or not."""
    model = model.to(ids.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if mode.endswith("compiled") else model

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mode.startswith("bf16")):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step


def run(config: Qwen3Config, ids: torch.Tensor, rounds: int, compiled: bool) -> dict:
    """One shape: figures of all contenders in all modes."""
    models = contenders(config)
    steps = {
        (who, mode): training_step(copy.deepcopy(model), ids, mode)
        for mode in ("fp32", "bf16")
        for who, model in models.items()
    }
    if compiled:
        first = alternate(steps, 2)
        for who, model in models.items():
            mode = min(("fp32", "bf16"), key=lambda mode: statistics.median(first[who, mode]))
            steps[who, f"{mode} compiled"] = training_step(model, ids, f"{mode} compiled")
    seconds = alternate(steps, rounds)
    result = compare(seconds, ids.numel())
    eager = {name: times for name, times in seconds.items() if name[0] != "gpt2" and "compiled" not in name[1]}
    result["ratio_eager_best_qwen3"] = compare(eager, ids.numel())["ratio"]
    peak = matmul_peak(ids.device, torch.bfloat16)
    speed = result[f"{result['best'].replace(' ', '_', 1)}_tokens_per_s"]
    return result | {
        "bf16_peak_tflops": round(peak / 1e12, 3),
        "share_of_peak": round(speed * flops_per_token(config, ids.shape[1]) / peak, 3),
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, not compiled, for tests")
    parser.add_argument("--no-compile", action="store_true", help="eager only: minutes less")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = not (options.quick or options.no_compile)
    if compiled and (reason := why_not_compile()):
        compiled = False
        print(f"nothing is compiled: {reason}")
    results = {}
    for name, (config, rows, tokens) in (QUICK if options.quick else SHAPES).items():
        ids = torch.randint(1, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
        results[name] = run(config, ids, options.rounds, compiled)
        table(f"training, {name}, {options.rounds} rounds", results[name])
        print(
            f"  {'share of peak, our best':32s} {results[name]['share_of_peak']:>10.1%}   "
            f"of {results[name]['bf16_peak_tflops']} TFLOP/s measured in bf16"
        )
    return report("train", results)


if __name__ == "__main__":
    main()

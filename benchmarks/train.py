"""Training speed of our GPT against transformers' Qwen3, both in this run: `python -m benchmarks.train [--quick]`.

A step is forward, backward and AdamW on a batch of random tokens, in fp32 and under bf16 autocast, with the same
weights on both sides.
"""

import argparse

import torch

from benchmarks.common import alternate, compare, report, shape, table, twins

# name: config, batch, tokens a row
SHAPES = {
    "6L d192 T128 B32": (shape(192), 32, 128),
    "6L d384 T256 B16": (shape(384), 16, 256),
}
QUICK = {"2L d64 T32 B4": (shape(64, layers=2, heads=2), 4, 32)}


def training_step(model: torch.nn.Module, ids: torch.Tensor, mode: str):
    """A function that does one optimizer step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for tests")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    results = {}
    for name, (config, rows, tokens) in (QUICK if options.quick else SHAPES).items():
        ids = torch.randint(1, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
        steps = {
            (who, mode): training_step(model, ids, mode)
            for mode in ("fp32", "bf16")
            for who, model in twins(config).items()
        }
        results[name] = compare(alternate(steps, options.rounds), rows * tokens)
        table(f"training, {name}, {options.rounds} rounds", results[name])
    return report("train", results)


if __name__ == "__main__":
    main()

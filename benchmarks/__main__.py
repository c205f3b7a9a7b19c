"""All benchmarks against their peers, one after the other, and one table: `python -m benchmarks [--text FILE]`.

Each runs in a process of its own, prints as it goes and ends in one JSON line; nothing else should run meanwhile.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

PEERS = {
    "train": "GPT-2 and Qwen3 of transformers",
    "sample": "generate of transformers",
    "ppo": "TRL 1.12",
    "nanogpt": "nanoGPT's CPU recipe, time",
}
SHAPES = {"ppo": "64 answers of 64 tokens", "nanogpt": "0.8M parameters, to 1.75 nats or less"}


def run(name: str, options: list[str]) -> dict:
    """One benchmark's last line."""
    last = ""
    with subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        sys.exit(f"error: benchmarks.{name} failed; what it said stands above")
    return json.loads(last)


def machine() -> str:
    """The processor or GPU, its cores and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def show(lines: dict[str, dict]) -> None:
    """The table of ratios."""
    table = Table(title=f"{machine()}; torch {torch.__version__}")
    for heading in ("benchmark", "shape", "peer", "ours / peer, best mode of each", "and in fp32"):
        table.add_column(heading)
    for name, line in lines.items():
        for shape, figures in line.get("shapes", {SHAPES.get(name, ""): line}).items():
            fp32 = f"{figures['ratio_fp32']:.2f}" if "ratio_fp32" in figures else ""
            table.add_row(name, shape, PEERS[name], f"{figures['ratio']:.2f}", fp32)
            if trunk := figures.get("ratio_one_trunk"):
                table.add_row(name, "ours with one trunk", PEERS[name], f"{trunk:.2f}", "")
    Console(width=120).print(table)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text file, to run nanogpt as well (its ratio is of time)")
    parser.add_argument("--rounds", type=int, help="of train, sample and ppo instead of their own number")
    parser.add_argument("--no-compile", action="store_true", help="nothing is compiled: minutes less")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for tests; no figure to read")
    options = parser.parse_args(arguments)
    common = ["--quick"] if options.quick else []
    rounds = ["--rounds", str(options.rounds)] if options.rounds else []
    eager = ["--no-compile"] if options.no_compile else []
    words = {"train": [*common, *rounds, *eager], "sample": [*common, *rounds, *eager], "ppo": [*common, *rounds]}
    if options.text:
        words["nanogpt"] = [*common, "--text", options.text]
    lines = {name: run(name, given) for name, given in words.items()}
    show(lines)
    result = {"benchmark": "all", "ratio": lines["train"]["ratio"], "machine": machine(), "results": lines}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()

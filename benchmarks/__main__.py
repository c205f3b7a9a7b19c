"""All benchmarks against their peers, one after the other, and one table: `python -m benchmarks [their options]`.

Each runs in a process of its own, prints as it goes and ends in one JSON line; nothing else should run meanwhile.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

BENCHMARKS = {"train": "GPT-2 and Qwen3 of transformers", "sample": "generate of transformers", "ppo": "TRL 1.12"}


def run(name: str, options: list[str]) -> dict:
    """One benchmark's last line."""
    last = ""
    with subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}", *options], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:  # fmt: skip
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


def main(options: list[str]) -> dict:
    lines = {name: run(name, options) for name in BENCHMARKS}
    table = Table(title=f"{machine()}; torch {torch.__version__}")
    for heading in ("benchmark", "shape", "peer", "ours / peer, best mode of each", "and in fp32"):
        table.add_column(heading)
    for name, line in lines.items():
        for shape, figures in line.get("shapes", {"64 answers of 64 tokens": line}).items():
            table.add_row(name, shape, BENCHMARKS[name], f"{figures['ratio']:.2f}", f"{figures['ratio_fp32']:.2f}")
    Console(width=120).print(table)
    result = {"benchmark": "all", "ratio": lines["train"]["ratio"], "machine": machine(), "results": lines}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])

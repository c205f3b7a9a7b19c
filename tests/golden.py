"""The golden trajectory of PPO: twenty updates of tiny models, in fp32 on a CPU. `make golden` makes its file anew."""

import datetime
import json
import os
import platform
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from ppo_tools import policy, prompts, trainer

FILE = Path(__file__).with_name("golden_ppo.json")
NAMES = ("objective/scores", "objective/kl", "objective/entropy", "loss/policy_avg", "loss/value_avg")


def rows(folder: Path) -> list[list[float]]:
    """The figures NAMES of each update."""
    made = trainer(folder, rows=prompts(), reference=policy(seed=2), total_episodes=160, learning_rate=5e-4)
    made.train()
    return [[row[name] for name in NAMES] for row in made.rows]


def main() -> None:
    """Write the file, with the versions it holds on."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps([round(value, 5) for value in row]) for row in rows(Path(folder))]
    about = {
        "made": datetime.date.today().isoformat(),
        "holds on": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()} CPU, fp32, {torch.get_num_threads()} thread",
        },
        "names": NAMES,
    }
    begin = json.dumps(about, indent=1).removesuffix("\n}")
    FILE.write_text(begin + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")
    print(f"{FILE.name}: {len(lines)} updates")


if __name__ == "__main__":
    main()

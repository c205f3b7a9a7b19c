"""The chain as one table: what each stage needs, what it leaves, and the figures that it is judged by.

The report reads it, and the arguments take a run's name from here. The Makefile's rules and RUN, the stages' arguments
and `stages/` are held to it by tests/test_chain.py. Nothing of `stages/` is imported here.
"""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage. Its module is `stages.<name>`, its configuration `configs/<preset>/<name>.yaml`, its folder
    `<run_dir>/<name>`, where a finished stage leaves its metrics in `stage.json`.

    A metric is named by its key in `stage.json`'s `metrics`; dots go into dictionaries (`win_rate.ppo_vs_sft.mean`).
    """

    name: str
    needs: tuple[str, ...]
    """Stages whose folders it reads, as the Makefile's rule lists them."""
    leaves: str
    figures: tuple[tuple[str, str], ...] = ()
    """What a reader looks at first: (metric, format of its value in words)."""
    stands_for: tuple[str, ...] = ()
    """Stages that a preset with this one does not have: what needs the last of them needs this one then."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Names that summary.json has for every run, in this order → metric; null where a run did not record it."""


def run_name(preset: str, seed: int) -> str:
    """The folder of a run within `runs/`, from its preset and seed: the Makefile's RUN is the same by the same rule.

    The recipes for the hub are presets `hub/<name>`; their runs are `hub-<name>`.
    """
    preset = re.sub("^hub/", "hub-", preset)
    return f"{preset}-seed{seed}" if seed else preset


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


CHAIN = (
    Stage(
        name="convert",
        needs=(),
        leaves="model from elsewhere as a stock folder",
        figures=(("parameters", "{:,} parameters"),),
        stands_for=("tokenizer", "pretrain"),
    ),
    Stage(
        name="tokenizer",
        needs=(),
        leaves="byte-level BPE vocabulary and chat template",
        figures=(("vocab_size", "{:,} entries"), ("bytes_per_token", "{:.2f} bytes a token")),
    ),
    Stage(
        name="pretrain",
        needs=("tokenizer",),
        leaves="GPT trained on text from random weights",
        figures=(("val_bpb", "{:.3f} bits/byte held out"), ("tokens_per_s", "{:,.0f} tokens/s")),
        fixed=_same("val_bpb", "bigram_bpb", "tokens_per_s"),
    ),
    Stage(
        name="sft",
        needs=("pretrain",),
        leaves="GPT that answers instructions",
        figures=(("eval_loss", "held-out loss {:.3f}"),),
        fixed={"val_loss": "eval_loss"},
    ),
    Stage(
        name="preferences",
        needs=("sft",),
        leaves="pairs of answers, each with a preferred one",
        figures=(("flip_rate", "{:.1%} of labels flipped by noise"),),
    ),
    Stage(
        name="reward",
        needs=("preferences", "sft"),
        leaves="reward model trained on the pairs, and its calibration",
        figures=(("accuracy", "{:.1%} of held-out pairs right"),),
        fixed=_same("accuracy"),
    ),
    Stage(
        name="ppo",
        needs=("reward", "sft"),
        leaves="policy optimised against the reward model",
        figures=(("kl", "KL {:.1f} nats"), ("episodes_per_s", "{:.1f} episodes/s")),
        fixed=_same("episodes_per_s", "kl"),
    ),
    Stage(
        name="evaluate",
        needs=("ppo", "reward", "sft", "pretrain"),
        leaves="figures of every policy on held-out prompts, and every answer with its scores",
        figures=(("win_rate.ppo_vs_sft.mean", "PPO wins {:.0%} against SFT"),),
    ),
    Stage(name="report", needs=("evaluate",), leaves="report.html, report.md and summary.json"),
)


def make_words(stage: str, run_dir: str) -> str:
    """The make command for a stage of the run in `run_dir`, as a person types it: `make sft PRESET=smoke SEED=1`."""
    named = re.fullmatch(r"runs/(?P<preset>[^/]+?)(-seed(?P<seed>\d+))?", run_dir.rstrip("/"))
    if named is None:
        return f"make {stage} RUN={run_dir}"
    name = re.sub("^hub-", "hub/", named["preset"])
    preset = "" if name == "stories" else f" PRESET={name}"
    return f"make {stage}{preset}" + (f" SEED={named['seed']}" if named["seed"] else "")

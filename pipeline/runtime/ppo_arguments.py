"""What can be set about the stage ppo; apart from arguments.py, so that no other stage has to load PPO for it."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.bounds import Count, NotNegative
from pipeline.ppo.config import PPOConfig
from pipeline.runtime.arguments import LoraFields, MachineFields


@dataclass
class PPOArguments(MachineFields, LoraFields, PPOConfig):
    """Optimise the policy against the reward model with PPO, under a KL penalty to the SFT model."""

    output_dir: str = "{run_dir}/ppo"
    """Folder of the optimised policy; its subfolder `critic` has the value model."""
    dataset: str = "stories"
    """Prompts: generator (stories, reviews), file or hub name."""
    prompt_suffix: str | None = None
    """Text put after each prompt, of a conversation after its last message, such as how to end; none: nothing."""
    dataset_size: Count = 4000
    """Training prompts to generate or read at most."""
    eval_size: Count = 128
    """Held-out prompts for the evaluation during training."""
    overlong: Literal["drop", "refuse"] = "drop"
    """What becomes of a prompt that leaves policy, critic or a reward model no room for an answer of response_length:
    counted and left out, or an error."""
    model_name_or_path: str = "{run_dir}/sft"
    """Policy to optimise; its frozen copy is the reference, with use_peft itself without its adapter."""
    share_base: bool = False
    """Policy, reference, critic and reward model as LoRA adapters on one base in memory: model_name_or_path, on which
    the reward model was trained with use_peft. Less memory, the same result up to rounding. Only with use_peft."""
    reward: list[str] = field(default_factory=lambda: ["{run_dir}/reward"])
    """Rewards: folders of reward models and functions `module:name`; their weighted sum is optimised. Several in one
    entry, with commas between, are an ensemble: one reward."""
    reward_weights: list[float] | None = None
    """One weight a reward; none: 1 each."""
    reward_ensemble: Literal["mean", "min", "uwo"] = "mean"
    """What an ensemble gives: the mean of its members, the lowest, or mean − uwo_coef · variance (arXiv 2310.02743)."""
    uwo_coef: NotNegative = 0.1
    """λ of uwo: how much disagreement among the members costs."""
    critic_name_or_path: str = "{run_dir}/reward"
    """Model whose trunk the critic starts from (the reward model or the policy); its head is new. Not with
    share_trunk, nor with rloo."""
    critic_head_init: Literal["normal", "zero"] = "normal"
    """The critic's new head. normal: weights N(0, 1/(d+1)) (arXiv 2403.17031); zero: all values are 0 at
    first. Only for a critic with a network of its own."""
    gold: str | None = None
    """Judge `module:name` that is only looked at (eval/gold), never optimised."""
    ptx_dataset: str | None = None
    """Pretraining text for ptx_coef: generator (stories, reviews), file, folder or hub name."""
    ptx_max_bytes: Count | None = 2_000_000
    """Bytes of it to read or generate at most; none: all there is."""

"""What can be set about PPO: a module that imports nothing of ours, so that arguments and trainer can both use it."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class PPOConfig:
    """Hyperparameters of `pipeline.ppo.PPOTrainer`; where TRL 1.12's PPOConfig has a field, its name is used.

    An *update* is one round of PPO: sample `batch_size` answers, score them, make `num_ppo_epochs` passes over them.
    """

    output_dir: str = "runs/ppo"
    """Folder whose `checkpoints/` holds the state for resume."""
    seed: int = 0
    """Seed of the order of prompts, of sampling and of mini-batches."""
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    """bf16: matrix products in bfloat16, weights in fp32; auto: bf16 where the GPU or CPU has it in hardware."""

    total_episodes: int = 4096
    """Answers to sample in all; rounded up to whole updates."""
    batch_size: int = 64
    """Answers in one update, over all processes."""
    num_mini_batches: int = 4
    """Optimizer steps in one pass over an update's answers."""
    num_ppo_epochs: int = 4
    """Passes over an update's answers."""
    per_device_train_batch_size: int = 16
    """Answers in one forward and backward pass on one device; changes memory and speed, not the result."""

    response_length: int = 64
    """Longest answer in tokens; one without an end token by then is truncated."""
    temperature: float = 1.0
    """Sampling temperature; every log-probability is taken of logits / temperature."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a truncated answer."""

    kl_coef: float = 0.05
    """β of the penalty −β·(log π − log π_ref) that every token pays (Ziegler et al. 2019)."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """λ of the policy's advantages (GAE, arXiv 1506.02438)."""
    lam_value: float = 1.0
    """λ of the critic's targets; 1 is the plain return, free of the critic's own bias (decoupled GAE, 2504.05118)."""
    cliprange: float = 0.2
    """ε: a probability ratio outside 1 ± ε earns nothing more (arXiv 1707.06347)."""
    cliprange_value: float = 0.2
    """The critic's loss does not reward moving further than this from its value at sampling time."""
    target_kl: float | None = None
    """An update's policy steps stop once a mini-batch's approximate KL to the sampling policy exceeds this."""
    critic_warmup_updates: int = 2
    """Updates at the start in which only the critic learns (value pretraining, arXiv 2504.05118)."""

    learning_rate: float = 3e-6
    """Peak learning rate of the policy (AdamW). Models of a few million parameters take 1e-4 and more."""
    critic_learning_rate: float = 1e-5
    """Peak learning rate of the critic (AdamW)."""
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    """linear: both learning rates fall to 0 over the run; constant: they stay."""
    warmup_steps: int = 0
    """Updates over which both learning rates rise from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW; not on norms and biases."""
    adam_beta1: float = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    adam_epsilon: float = 1e-8
    """ε of AdamW; 1e-5 would make early steps smaller."""
    max_grad_norm: float = 1.0
    """The gradients of policy and critic are each scaled down to this global norm."""

    logging_steps: int = 1
    """Updates between two lines of metrics."""
    eval_steps: int = 0
    """Updates between two evaluations on held-out prompts, one before the first update included; 0: none."""
    save_steps: int = 10
    """Updates between two checkpoints; 0: none."""

"""What can be set about PPO. This module knows no networks, so that arguments and trainer can both use it."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from pipeline.bounds import Count, CountOrZero, Decay, NotNegative, Positive, Seed, Share, check_bounds
from pipeline.errors import UserError
from pipeline.trackers import TrackingFields


@dataclass
class PPOConfig(TrackingFields):
    """Hyperparameters of `pipeline.ppo.PPOTrainer`; where TRL 1.12's PPOConfig has a field, its name is used.

    An *update* is one round of PPO: sample `batch_size` answers, score them, make `num_ppo_epochs` passes over them.
    """

    output_dir: str = "runs/ppo"
    """Folder whose `checkpoints/` holds the state for resume."""
    seed: Seed = 0
    """Seed of the order of prompts, of sampling and of mini-batches."""
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    """bf16: matrix products in bfloat16, weights in fp32; auto: bf16 where the GPU or CPU has it in hardware."""
    gradient_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass: less memory, slower updates, the same result."""

    total_episodes: Count = 4096
    """Answers to sample in all; rounded up to whole updates."""
    batch_size: Count = 64
    """Answers in one update, over all processes."""
    num_mini_batches: Count = 4
    """Optimizer steps in one pass over an update's answers."""
    num_ppo_epochs: Count = 4
    """Passes over an update's answers."""
    per_device_train_batch_size: Count = 16
    """Answers in one forward and backward pass on one device; changes memory and speed, not the result."""

    advantage_estimator: Literal["gae", "rloo"] = "gae"
    """gae: a critic tells the value of each token's state (arXiv 1506.02438). rloo: no critic; an answer's baseline is
    the mean return of the other answers to its prompt (arXiv 2402.14740), which needs num_generations from 2 up."""
    num_generations: Count = 1
    """Answers sampled to each prompt of an update."""

    response_length: Count = 64
    """Longest answer in tokens; one without an end token by then is truncated."""
    temperature: Positive = 1.0
    """Sampling temperature; every log-probability is taken of logits / temperature."""
    eval_temperature: NotNegative | None = None
    """Temperature of the held-out answers; 0 always takes the likeliest token, and eval/kl is then the log-ratio of
    these answers, no mean over what the policy would say; none: that of the training answers."""
    normalize_scores: bool = False
    """Take from each score the mean of all scores so far and divide it by their standard deviation."""
    score_clip: Positive | None = None
    """A score counts for no more than this on either side of 0, after normalize_scores; none: as it is."""
    missing_eos_penalty: NotNegative = 0.0
    """Subtracted from the score of a truncated answer."""

    kl_coef: NotNegative = 0.05
    """β of the penalty −β·(log π − log π_ref) that every token pays (Ziegler et al. 2019)."""
    adaptive_kl_target: Positive | None = None
    """KL in nats an answer that β is steered to, a little after each update; none: β stays as it is."""
    adaptive_kl_horizon: Count = 10_000
    """Episodes over which an adaptive β changes by at most a fifth; only with adaptive_kl_target."""
    ref_sync_updates: CountOrZero = 0
    """Updates after which the reference becomes a copy of the policy, again and again; 0: never. Not with LoRA."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards, KL penalty included, to a standard deviation of 1 around their mean, as TRL does
    (harmful in arXiv 2403.17031)."""
    gamma: Share = 1.0
    """Discount of later rewards; only with gae."""
    lam: Share = 0.95
    """λ of the policy's advantages; only with gae."""
    lam_value: Share = 0.95
    """λ of the critic's targets; 1 is the plain return, free of the critic's own bias (decoupled GAE, 2504.05118): no
    difference in our ablation (LOG.md). Only with gae."""
    cliprange: Positive = 0.2
    """ε: a probability ratio outside 1 ± ε earns nothing more (arXiv 1707.06347)."""
    cliprange_high: Positive | None = None
    """ε of the upper side alone, 1 + ε: more room for tokens that were unlikely (arXiv 2503.14476); none: cliprange."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """A token with a negative advantage A costs at most this times |A|, above 1 (arXiv 1912.09729); none: no bound."""
    sampler_weight_cap: Positive | None = None
    """Weigh tokens by π/π_sampler, at most this, where the sampler computes otherwise than training; none: not."""
    entropy_coef: NotNegative = 0.0
    """Weight of the policy's entropy, in nats a token, that is added to what it maximises."""
    ptx_coef: NotNegative = 0.0
    """Weight of the pretraining loss on `ptx_dataset` in each policy step (InstructGPT had 27.8); 0: none."""
    ptx_batch_size: Count = 16
    """Pretraining texts in a policy step, over all processes; only with ptx_coef."""
    ptx_max_length: Count = 128
    """Tokens of a pretraining text, from its beginning; only with ptx_coef."""
    cliprange_value: Positive | None = 0.2
    """The critic's loss does not reward moving further than this from its value at sampling time; none: it may. Only
    with gae."""
    target_kl: Positive | None = None
    """An update's policy steps stop once a mini-batch's approximate KL to the sampling policy exceeds this."""
    share_trunk: bool = False
    """The critic is a linear head on the policy's own hidden states instead of a network of its own: little more than
    half the work and memory of an update, but its errors move the policy's weights too."""
    vf_coef: NotNegative = 0.1
    """Weight of the critic's loss in the common one; only with share_trunk."""
    critic_warmup_updates: CountOrZero = 0
    """Updates at the start in which only the critic learns (value pretraining, arXiv 2504.05118); with share_trunk its
    head alone. A critic from a reward model did without (LOG.md)."""

    learning_rate: Positive = 3e-6
    """Peak learning rate of the policy (AdamW). Models of a few million parameters take 1e-4 and more."""
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic (AdamW), with share_trunk of its head; none: the policy's."""
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    """linear: both learning rates fall to 0 over the run; constant: they stay."""
    warmup_steps: CountOrZero = 0
    """Updates over which both learning rates rise from 0."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW; not on norms and biases."""
    adam_beta1: Decay = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: Decay = 0.999
    """Second-moment decay of AdamW."""
    adam_epsilon: Positive = 1e-8
    """ε of AdamW; 1e-5 would make early steps smaller."""
    max_grad_norm: Positive = 1.0
    """The gradients of policy and critic are each scaled down to this global norm."""

    logging_steps: Count = 1
    """Updates between two lines of metrics."""
    eval_steps: CountOrZero = 0
    """Updates between two evaluations on held-out prompts, one before the first update included; 0: none."""
    best_metric: Literal["none", "rlhf_reward", "proxy", "gold", "win_rate"] = "rlhf_reward"
    """Held-out figure whose best policy is kept in `best`; rlhf_reward: proxy less missing end tokens and β·KL."""
    save_steps: CountOrZero = 10
    """Updates between two checkpoints; 0: none."""

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, str | os.PathLike):
            self.output_dir = os.path.expanduser(os.fspath(self.output_dir))

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return -(-self.total_episodes // self.batch_size)


def check_config(args: PPOConfig, processes: int) -> None:
    """Raise UserError for values that make no sense, alone or together."""
    check_bounds(args)
    for name in ("num_mini_batches", "num_generations"):
        if args.batch_size % (processes * getattr(args, name)):
            raise UserError(
                f"batch_size {args.batch_size} must be a multiple of {name} × processes = "
                f"{getattr(args, name)} × {processes}; change one of them"
            )
    if args.adaptive_kl_target is not None and args.adaptive_kl_horizon < args.batch_size:
        raise UserError(
            f"adaptive_kl_horizon: {args.adaptive_kl_horizon} episodes are less than the {args.batch_size} of an "
            "update, after which β could jump below 0; give it thousands"
        )
    if args.adaptive_kl_target is not None and args.kl_coef == 0:
        raise UserError("adaptive_kl_target: a kl_coef of 0 stays 0; give kl_coef a start above 0")
    if args.ptx_coef and args.ptx_batch_size % processes:
        raise UserError(f"ptx_batch_size {args.ptx_batch_size} must be a multiple of the {processes} processes")
    if args.critic_warmup_updates * args.batch_size >= args.total_episodes:
        raise UserError(
            f"critic_warmup_updates {args.critic_warmup_updates} leaves no update of {args.batch_size} episodes to the "
            f"policy out of {args.total_episodes}; lower it or raise total_episodes"
        )

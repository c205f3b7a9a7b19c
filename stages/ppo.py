"""Optimise the policy with PPO: `python -m stages.ppo --config configs/stories/ppo.yaml`."""

from pathlib import Path

from pipeline import data, runtime
from pipeline.arguments import PPOArguments
from pipeline.models import load_critic, load_policy
from pipeline.ppo import PPOTrainer
from pipeline.rewards import load_function, load_rewards
from pipeline.tokenizer import check_fits, load_tokenizer

SHOWN = ("step", "episode", "objective/scores", "objective/kl", "objective/entropy", "response/length",
         "policy/approxkl_avg", "val/explained_variance", "episodes_per_s",
         "eval/proxy", "eval/gold", "eval/kl", "eval/length")  # fmt: skip
"""What a line on the screen has room for; metrics.jsonl has everything."""


def main(args: PPOArguments) -> None:
    """Policy and reference start from the SFT model, the critic from the reward model; the reward model stays fixed."""
    rewards = {f"reward_{i}": r for i, r in enumerate(args.reward) if ":" not in r}
    inputs = {"model": args.model_name_or_path, "critic": args.critic_name_or_path, **rewards}
    stage = runtime.Stage(args, "ppo", inputs | {"dataset": args.dataset})
    stage.shown = SHOWN
    tokenizer = load_tokenizer(args.model_name_or_path)
    policy, reference = (load_policy(args.model_name_or_path) for _ in range(2))
    critic = load_critic(args.critic_name_or_path)
    check_fits(tokenizer, policy.config.vocab_size, args.model_name_or_path)
    check_fits(tokenizer, critic.config.vocab_size, args.critic_name_or_path)
    trainer = PPOTrainer(
        policy=policy,
        reference=reference,
        rewards=load_rewards(args.reward, args.reward_weights, mixed_precision=args.mixed_precision),
        critic=critic,
        args=args,
        train_dataset=data.load_prompts(args.dataset, split="ppo", seed=args.seed, size=args.dataset_size),
        eval_dataset=data.load_prompts(args.dataset, split="validation", seed=args.seed, size=args.eval_size),
        processing_class=tokenizer,
        stage=stage,
        gold=load_function(args.gold) if args.gold else None,
    )
    metrics = trainer.train()
    trainer.save_model(Path(args.output_dir))
    stage.finish(metrics, tokens=trainer.tokens)


if __name__ == "__main__":
    runtime.run(main, PPOArguments)

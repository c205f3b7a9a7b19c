"""PPO for language models: `PPOTrainer(policy, reference, rewards, critic, PPOConfig(...), train_dataset)`."""

from pipeline.ppo.trainer import PPOTrainer
from pipeline.ppo_config import PPOConfig

__all__ = ["PPOConfig", "PPOTrainer"]

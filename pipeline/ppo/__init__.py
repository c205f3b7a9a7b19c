"""PPO for language models: `PPOTrainer(policy, reference, rewards, critic, PPOConfig(...), train_dataset)`."""

from pipeline.ppo.config import PPOConfig
from pipeline.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]

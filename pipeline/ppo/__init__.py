"""PPO for language models: `PPOTrainer(policy, rewards, PPOConfig(...), train_dataset, tokenizer, critic=critic)`."""

from pipeline.ppo.config import PPOConfig
from pipeline.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]

"""PPO on a GPT-2 with a reward written in Python. Put models of your own in place of the random weights."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.ppo import PPOConfig, PPOTrainer

words = ["<pad>", "<end>", "<unknown>", "the", "a", "good", "bad", "film", "story", "was", "is", "very", "and", "not"]
table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


def says_good(prompts, completions, **columns):
    """The share of an answer's words that are `good`; any function of text will do."""
    return [text.split().count("good") / max(1, len(text.split())) for text in completions]


torch.manual_seed(0)
size = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
shape = GPT2Config(vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=1, num_labels=1, **size)
policy = GPT2LMHeadModel(shape)  # AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
critic = GPT2ForSequenceClassification(shape)  # the same, of your policy or reward model, with num_labels=1
prompts = [{"prompt": f"the {noun} {verb}"} for noun in ("film", "story") for verb in ("was", "is")]
updates = {"total_episodes": 1024, "batch_size": 64, "num_mini_batches": 2, "num_ppo_epochs": 2}
args = PPOConfig("runs/ppo_gpt2", response_length=8, learning_rate=2e-3, kl_coef=0.01, **updates)
trainer = PPOTrainer(policy, says_good, args, prompts, tokenizer, critic=critic)
trainer.train()
trainer.save_model(args.output_dir)

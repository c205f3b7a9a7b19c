"""Tiny models, a tokenizer of words and a trainer to put them together, for the tests of PPO and rewards."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification
from pipeline.ppo import PPOConfig, PPOTrainer

TEMPLATE = (
    "{% for m in messages %}{{ 't3 ' if m.role == 'user' else 't4 ' }}{{ m.content + ' t5 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 't4' }}{% endif %}"
)


SPECIAL = {"<pad>": 0, "<end>": 1, "<unknown>": 2}


def tokenizer(size=16, pad="<pad>"):
    """Word i is `t<i>` from 3 on."""
    words = Tokenizer(models.WordLevel(SPECIAL | {f"t{i}": i for i in range(3, size)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token="<end>", unk_token="<unknown>")
    made.chat_template = TEMPLATE
    return made


def config(size=16, **changes):
    settings = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 48,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    return Qwen3Config(**settings | changes)


def policy(seed=0, size=16):
    torch.manual_seed(seed)
    return GPTForCausalLM(config(size))


def critic(seed=1, size=16):
    torch.manual_seed(seed)
    return GPTForSequenceClassification(config(size, num_labels=1))


def prompts(count=24, size=16, longest=9):
    """Rows with a prompt of 1 to `longest` words and a column `number`."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        ids = torch.randint(6, size, (1 + i % longest,), generator=random).tolist()
        rows.append({"prompt": " ".join(f"t{token}" for token in ids), "number": i})
    return rows


def count_t7(prompts, completions, **columns):
    """A reward: how many t7 are in the answer."""
    return [float(text.split().count("t7")) for text in completions]


def settings(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path),
        "mixed_precision": "no",
        "total_episodes": 32,
        "batch_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": 2,
        "response_length": 6,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "critic_warmup_updates": 0,
        "lam_value": 1.0,
        "save_steps": 0,
    }
    return PPOConfig(**values | changes)


def trainer(
    tmp_path,
    *,
    models=None,
    rewards=count_t7,
    rows=None,
    words=None,
    reference=None,
    gold=None,
    eval_rows=None,
    callbacks=None,
    ptx_dataset=None,
    **changes,
):
    """A PPOTrainer of tiny parts that keeps its log in `trainer.rows`."""
    actor, judge = models or (policy(), None if changes.get("share_trunk") else critic())
    made = PPOTrainer(
        actor,
        reference,
        rewards,
        judge,
        settings(tmp_path, **changes),
        rows or prompts(),
        eval_rows,
        words or tokenizer(),
        gold=gold,
        callbacks=callbacks,
        ptx_dataset=ptx_dataset,
    )
    made.rows = []
    made.log = lambda metrics: made.rows.append({"step": made.updates_done, **metrics})
    return made


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def gradients_of(trainer, update=0, rollout=None):
    """Critic's and policy's gradients in turn, at every optimizer step of an update that takes no step."""
    of_critic, of_policy = [], []

    def record(model, optimizer):
        found = of_critic if model is trainer.critic_train else of_policy
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
        optimizer.zero_grad()
        return found[-1].norm()

    trainer._clip_and_step = record
    if rollout is None:
        rollout, _ = trainer.sample(update)
        trainer.score(rollout, update)
    metrics = trainer.optimise(rollout, update)
    return [gradient for both in zip(of_critic, of_policy, strict=True) for gradient in both], metrics

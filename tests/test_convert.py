"""The stage convert: a GGUF file that the test writes comes back as the model it was made of, ends and all."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, tiny_policy, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.checkpoint import sha256_of
from pipeline.errors import NothingToDo, UserError
from pipeline.model import foreign
from pipeline.runtime.arguments import ConvertArguments
from pipeline.runtime.command_line import resolve
from pipeline.text.tokenizer import answered_ids, load_tokenizer, turn_end
from reward_data import wheels
from stages import convert

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed; install: pip install gguf"
)
END_OF_TEXT, START, END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZE = 300


def smollm_tokenizer() -> Tokenizer:
    """Digits apart, then as GPT-2."""
    bpe = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*TEXTS, *["x  1"] * 90], trainer)  # two blanks are one token before a digit
    return bpe


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=SIZE, num_key_value_heads=2, head_dim=4, initializer_range=0.4, tie_word_embeddings=True, **sizes
    )
    return LlamaForCausalLM(config).eval()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves as llama.cpp pairs them (its converter's `permute`)."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under llama.cpp's names."""
    trunk = model.model
    named = {"token_embd": trunk.embed_tokens.weight, "output_norm": trunk.norm.weight}
    for i, block in enumerate(trunk.layers):
        attention, mlp = block.self_attn, block.mlp
        named |= {
            f"blk.{i}.attn_q": permuted(attention.q_proj.weight, 4),
            f"blk.{i}.attn_k": permuted(attention.k_proj.weight, 2),
            f"blk.{i}.attn_v": attention.v_proj.weight,
            f"blk.{i}.attn_output": attention.o_proj.weight,
            f"blk.{i}.ffn_gate": mlp.gate_proj.weight,
            f"blk.{i}.ffn_up": mlp.up_proj.weight,
            f"blk.{i}.ffn_down": mlp.down_proj.weight,
            f"blk.{i}.attn_norm": block.input_layernorm.weight,
            f"blk.{i}.ffn_norm": block.post_attention_layernorm.weight,
        }
    return {f"{name}.weight": weight.detach().contiguous() for name, weight in named.items()}


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama", **changes: np.ndarray) -> None:
    """A GGUF file as llama.cpp's converter writes one, its pad token the end token as in SmolLM2's."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    bpe = smollm_tokenizer()
    words = json.loads(bpe.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in SPECIAL else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in words["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    for name, weight in gguf_weights(model).items():
        writer.add_tensor(name, changes.get(name, weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def go(source: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run the stage and return its metrics."""
    fields = {"model_name_or_path": str(source), "run_dir": str(folder), "preset": "smollm2"}
    convert.main(resolve(ConvertArguments(**fields | changes)))
    return json.loads((folder / "convert" / "stage.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file and, beside it, the converted folder; with its metrics."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", tiny_llama())
    return folder, go(folder / "tiny.gguf", folder)


@needs_gguf
def test_logits_are_those_of_the_model_that_the_file_was_made_of(made: tuple[Path, dict]) -> None:
    converted = AutoModelForCausalLM.from_pretrained(made[0] / "convert", dtype=torch.float32).eval()
    ids = torch.arange(3, 99).view(4, 24)
    with torch.no_grad():
        ours, theirs = converted(ids).logits, tiny_llama()(ids).logits
    torch.testing.assert_close(ours[..., :SIZE], theirs, atol=1e-5, rtol=1e-5)
    assert ours.shape[-1] == SIZE + 1 and theirs.std() > 0.1


@needs_gguf
def test_tokens_are_those_of_the_tokenizer_that_the_file_was_made_of(made: tuple[Path, dict]) -> None:
    tokenizer, source = AutoTokenizer.from_pretrained(made[0] / "convert"), smollm_tokenizer()
    for text in (*foreign.ODD_TEXTS, *TEXTS[:2], "a  1 and   12345"):
        assert tokenizer.encode(text, add_special_tokens=False) == source.encode(text).ids, text
        assert tokenizer.decode(source.encode(text).ids) == text
    assert made[1]["texts_changed"] == 0


@needs_gguf
def test_an_end_is_never_padding(made: tuple[Path, dict]) -> None:
    """The file's pad token is its end token, and its unknown token ends documents: neither may be the pad token."""
    folder = made[0] / "convert"
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token) == ("<|pad|>", SIZE, END)
    assert len(tokenizer) == SIZE + 1 and turn_end(tokenizer) == 2
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        assert (settings["eos_token_id"], settings["pad_token_id"]) == (2, SIZE)
        assert "quantization_config" not in settings
    prompt, answer = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ben"}]
    text = tokenizer.decode(answered_ids(tokenizer, [prompt], [answer])[0].ids)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nBen<|im_end|>"


@needs_gguf
def test_the_record_says_what_was_converted(made: tuple[Path, dict]) -> None:
    folder, metrics = made
    parameters = sum(weight.numel() for weight in tiny_llama().parameters()) + 16  # the pad token's row
    assert metrics == {
        "parameters": parameters,
        "vocab_size": SIZE + 1,
        "texts_changed": 0,
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "end_tokens": [END],
        "pad_token": "<|pad|>",
        "source": str(folder / "tiny.gguf"),
        "source_sha256": sha256_of(folder / "tiny.gguf"),
        "licence": "apache-2.0",
        "name": "Tiny",
        "quantisation": "F32",
    }
    with pytest.raises(NothingToDo, match="convert is finished already"):
        go(folder / "tiny.gguf", folder)


@needs_gguf
def test_killed_before_its_record_it_is_made_again(made: tuple[Path, dict], tmp_path: Path) -> None:
    shutil.copytree(made[0] / "convert", tmp_path / "convert")
    (tmp_path / "convert" / "stage.json").unlink()
    (tmp_path / "convert" / "model.safetensors").write_bytes(b"half")
    assert go(made[0] / "tiny.gguf", tmp_path) == made[1]
    assert sha256_of(tmp_path / "convert/model.safetensors") == sha256_of(made[0] / "convert/model.safetensors")


@needs_gguf
def test_a_file_in_a_wheel_is_found_and_its_package_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[Path, dict]
) -> None:
    site = tmp_path / "site"
    (site / "tiny_wheel").mkdir(parents=True)
    (site / "tiny_wheel" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (site / "tiny_wheel" / "m.gguf").write_bytes((made[0] / "tiny.gguf").read_bytes())
    info = site / "tiny_wheel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\nLicense: MIT\n")
    (info / "RECORD").write_text("tiny_wheel/__init__.py,,\ntiny_wheel/m.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    metrics = go("wheel:tiny-wheel==1.0/m.gguf", tmp_path)
    assert metrics["source_sha256"] == made[1]["source_sha256"] and "tiny_wheel" not in sys.modules
    assert sha256_of(tmp_path / "convert/model.safetensors") == sha256_of(made[0] / "convert/model.safetensors")
    with pytest.raises(UserError, match=r"tiny-wheel 1\.0 is installed, but 2\.0 is needed"):
        go("wheel:tiny-wheel==2.0/m.gguf", tmp_path)


def test_a_folder_is_converted_too(tmp_path: Path) -> None:
    """Its pad token is its own already; the end of a turn, which its generation_config lacks, comes first."""
    tiny_policy(0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Model\n")
    metrics = go(tmp_path / "model", tmp_path)
    assert metrics["licence"] == "mit" and metrics["end_tokens"] == ["<|end|>", END_OF_TEXT]
    assert (metrics["pad_token"], metrics["vocab_size"]) == ("<|pad|>", 300)
    assert sha256_of(tmp_path / "convert/model.safetensors") == sha256_of(tmp_path / "model/model.safetensors")


@needs_gguf
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    broken = np.full((16,), np.nan, dtype=np.float32)
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **{"output_norm.weight": broken})
    with pytest.raises(UserError, match=r"model\.norm\.weight has weights that are no numbers"):
        go(tmp_path / "tiny.gguf", tmp_path)


@needs_gguf
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, made: tuple[Path, dict], share: float) -> None:
    """Within its head, and within its weights."""
    whole = (made[0] / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"tiny\.gguf is damaged or cut off: .*; get it again"):
        go(tmp_path / "tiny.gguf", tmp_path)


@needs_gguf
def test_an_architecture_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), "nonesuch")
    with pytest.raises(UserError, match=r"no model can be opened from .*tiny\.gguf.*nonesuch"):
        go(tmp_path / "tiny.gguf", tmp_path)
    assert not (tmp_path / "convert" / "config.json").exists()


def test_without_the_package_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.gguf cannot be read without the package gguf; run `pip install"):
        go(tmp_path / "a.gguf", tmp_path)


def test_a_cut_that_is_not_known_is_said() -> None:
    assert foreign.odd_cut(foreign.Source("a", None, cut="smollm")) is None
    assert "'tekken'" in (foreign.odd_cut(foreign.Source("a", None, cut="tekken")) or "")


def test_the_wheel_of_the_preset_is_the_one_in_the_requirements() -> None:
    """And, where it is installed, the file is there."""
    named = ConvertArguments().model_name_or_path
    pinned = (Path(__file__).parent.parent / "requirements-smollm2.txt").read_text()
    parts = foreign.WHEEL.fullmatch(named)
    assert parts and f"{parts['package']}=={parts['version']} " in pinned
    try:
        [file] = wheels.wheel_files(parts["package"], parts["version"], parts["file"], "")
    except ValueError:
        pytest.skip("the wheel of SmolLM2 is not installed; install: make setup PRESET=smollm2")
    assert file.read_bytes()[:4] == b"GGUF"

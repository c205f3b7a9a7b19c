"""The story world: corpus, grammar, instructions, prompts; nothing held out is asked for in training."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from reward_data import stories
from reward_data.stories import check, gold, parse_prompt
from reward_data.stories.grammar import FRAMES, parse, split_sentences
from reward_data.stories.judge import score
from reward_data.stories.lexicon import ANIMALS, DECOR, HELD_OUT_NAMES, KIND_OF, NAMES, OBJECTS, PLACES, REQUIRED
from reward_data.stories.spec import WORDINGS, draw, held_out_pair
from reward_data.stories.telling import Teller, token_count

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(stories.corpus(seed=0, max_bytes=2_000_000))


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, str]]:
    rows = stories.instructions(seed=0, size=3000)
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]


# What is told


def test_the_corpus_has_1000_words_and_200_frames_and_dialogue(corpus: list[str]) -> None:
    words = {word.lower() for text in corpus for word in re.findall("[A-Za-z]+", text)}
    sentences = [sentence for text in corpus for sentence in split_sentences(text)]
    frames = {parsed[0].template for parsed in map(parse, sentences) if parsed}
    assert len(words) >= 1000
    assert len(frames) >= 400 and len(frames) >= 0.98 * len(FRAMES)
    assert 0.05 < sum('"' in sentence for sentence in sentences) / len(sentences) < 0.3


def body(document: str) -> str:
    """A corpus document without its heading."""
    return document.rpartition("\n")[2]


def test_headings_name_what_is_in_the_story(corpus: list[str]) -> None:
    headed = [text.split("\n") for text in corpus if "\n" in text]
    assert 0.81 < len(headed) / len(corpus) < 0.86  # 0.88 · CORPUS_HEADED
    for heading, text in headed[:500]:
        name, words, ending = re.fullmatch(r"Name: (\w+)\. Words: ([a-z, ]+)\. Ending: (\w+)\.", heading).groups()
        checks = check(f"Write a story about {name}. Use: {words}. Ending: {ending}.", text)
        # A heading also lists a word that was only talked about; the judge counts those that were there.
        assert all(value == 1 for name, value in checks.items() if name != "words"), (heading, text, checks)
        assert checks["words"] >= 0.5
        told = {word for word in re.findall("[a-z]+", text) if word in set(REQUIRED)}
        assert set(words.split(", ")) == told


@pytest.mark.slow
def test_corpus_documents_are_short_and_of_mixed_quality(corpus: list[str]) -> None:
    corpus = [body(text) for text in corpus]
    counts = [len(split_sentences(text)) for text in corpus]
    assert sum(4 <= count <= 8 for count in counts) / len(counts) > 0.95
    words = [len(sentence.split()) for text in corpus for sentence in split_sentences(text)]
    assert 5 < sum(words) / len(words) < 8 and max(words) <= 20
    prompt = "Write a story about Ben. Use: kite, fox. Ending: happy."
    coherence = ("pronouns", "continuity", "grammar", "repeats", "close")
    faulty = sum(any(check(prompt, text)[name] < 1 for name in coherence) for text in corpus) / len(corpus)
    assert 0.07 < faulty < 0.13  # CORPUS_FAULTY, less the pronouns that happen to mean somebody else


def test_corpus_keeps_to_its_size_and_splits_differ() -> None:
    train = list(stories.corpus(1, 100_000))
    assert 99_000 < len("\n".join(train).encode()) <= 100_000
    assert train != list(stories.corpus(2, 100_000))
    assert not set(train) & set(stories.corpus(1, 100_000, "validation"))
    assert "\n" not in "".join(map(body, train))


def test_lexicon_words_are_of_one_kind() -> None:
    assert len(REQUIRED) == len(set(REQUIRED)) == len(KIND_OF)
    decor = {word for words in DECOR.values() for word in words}
    literals = {word for frame in FRAMES for word in re.findall("[A-Za-z]+", frame.text.replace("%s", ""))}
    assert not (decor | literals) & (set(REQUIRED) | set(NAMES))
    assert len({word.lower() for word in decor | literals} & {name.lower() for name in NAMES}) == 0


def test_every_frame_parses_back_to_itself() -> None:
    rng = Random(0)
    for frame, _ in itertools.product(FRAMES, range(20)):
        teller = Teller(rng)
        bound = {
            variable: teller.pick(words) for variable, words in zip("OAL", (OBJECTS, ANIMALS, PLACES), strict=True)
        }
        values = teller.values(frame, {**bound, "P": teller.pick(NAMES), "Q": teller.pick(NAMES)})
        assert parse(frame.render(values)) == (frame, tuple(values)), frame.template


def test_articles_and_capitals_are_part_of_the_grammar() -> None:
    assert (
        parse("Ben found an old kite.")
        and parse('"Look, an owl!" she said.')
        and parse("A brave knight named Ann came by.")
    )
    for wrong in (
        "Ben found a old kite.",
        '"Look, a owl!" she said.',
        "ben found an old kite.",
        "He Found an old kite.",
    ):
        assert parse(wrong) is None, wrong


def test_quotations_belong_to_the_sentence_round_them() -> None:
    text = '"Look, an owl!" Ben said. "Why?" she asked. Nobody could believe it! Then'
    assert split_sentences(text) == [
        '"Look, an owl!" Ben said.',
        '"Why?" she asked.',
        "Nobody could believe it!",
        "Then",
    ]


# Instructions and prompts


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_prompt_says_exactly_what_it_asks(wording: str) -> None:
    rng = Random(wording)
    for held_out in (False, True) * 50:
        spec = draw(rng, held_out)
        text = wording.format(name=spec.name, words=", ".join(spec.words), ending=spec.ending)
        assert parse_prompt(text) == spec
        assert parse_prompt(f"<|user|>{text}<|end|><|assistant|>") == spec


def test_answers_obey_part_of_the_time(answers: list[tuple[str, str]]) -> None:
    checks = [check(prompt, story) for prompt, story in answers]
    mean = sum(map(score, checks)) / len(checks)
    assert 0.58 < mean < 0.7
    for name in stories.WEIGHTS:
        right = sum(one[name] == 1 for one in checks) / len(checks)
        assert 0.15 < right < 0.8, name
    spread = sorted(map(score, checks))
    assert spread[len(spread) // 10] < 0.45 and spread[-len(spread) // 10] > 0.78


def test_answers_fit_60_tokens(answers: list[tuple[str, str]]) -> None:
    counts = sorted(token_count(story) for _, story in answers)
    assert counts[int(0.99 * len(counts))] <= 60
    words = [len(story.split()) for _, story in answers]
    assert 28 < sum(words) / len(words) < 50


def test_nearly_every_word_is_one_token_of_a_bpe_of_2048(corpus: list[str], answers: list[tuple[str, str]]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    assert [word for word in (*REQUIRED, *NAMES) if len(bpe.encode(" " + word).ids) > 1] == []
    counts = sorted(len(bpe.encode(story).ids) for _, story in answers)
    assert counts[int(0.99 * len(counts))] <= 63  # and an end token


@pytest.mark.slow
def test_held_out_names_and_pairs_are_never_asked_for_in_training(corpus: list[str]) -> None:
    sets = {
        **{split: stories.prompts(0, 3000, split) for split in ("preferences", "ppo", "validation", "test")},
        **{"instructions " + split: stories.instructions(0, 1500, split) for split in ("train", "validation", "test")},
    }
    specs = {name: [parse_prompt(row["prompt"][0]["content"]) for row in rows] for name, rows in sets.items()}
    training = [spec for name in ("preferences", "ppo", "instructions train") for spec in specs[name]]
    held_out = [spec for name, some in specs.items() if "validation" in name or "test" in name for spec in some]
    names = [{spec.name for spec in some} for some in (training, held_out)]
    pairs = [{frozenset(spec.words) for spec in some} for some in (training, held_out)]
    assert not names[0] & set(HELD_OUT_NAMES) and names[1] > set(HELD_OUT_NAMES)
    assert 0.3 < sum(spec.name in HELD_OUT_NAMES for spec in held_out) / len(held_out) < 0.37
    assert not pairs[0] & pairs[1] and len(pairs[1]) > 2000
    seen = set(re.findall("[A-Za-z]+", " ".join(corpus)))
    assert seen.issuperset(HELD_OUT_NAMES) and seen.issuperset(REQUIRED)


def test_held_out_pairs_do_not_depend_on_order_and_leave_no_word_out() -> None:
    held = [pair for pair in itertools.combinations(REQUIRED, 2) if held_out_pair(*pair)]
    assert all(held_out_pair(b, a) for a, b in held)
    assert len(held) / (len(REQUIRED) * (len(REQUIRED) - 1) / 2) == pytest.approx(0.2, abs=0.01)
    assert {word for pair in held for word in pair} == set(REQUIRED)


@pytest.mark.parametrize("make", [stories.prompts, stories.instructions, lambda *a: list(stories.corpus(*a))])
def test_an_unknown_split_is_an_error_that_names_the_known(make: Callable) -> None:
    with pytest.raises(ValueError, match="have no split 'dev'; choose one of"):
        make(0, 5, "dev")


def test_splits_and_seeds_differ() -> None:
    rows = [
        str(stories.prompts(seed, 20, split))
        for seed in (0, 1)
        for split in ("preferences", "ppo", "validation", "test")
    ]
    assert len(set(rows)) == 8


# Determinism and speed


DIGEST = """
import hashlib
from reward_data import stories
rows = stories.instructions(5, 200)
text = "\\n".join(stories.corpus(5, 200_000)) + str(rows) + str(stories.prompts(5, 200, "test"))
text += str(stories.gold([r["prompt"] for r in rows], [r["completion"] for r in rows]))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_the_same_seed_tells_the_same_in_every_process() -> None:
    digests = set()
    for hash_seed in ("0", "1", "777"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == len(hashlib.sha256().hexdigest())


def test_speed(answers: list[tuple[str, str]]) -> None:
    """Generous, since tests run on busy machines: a free core does ten times this."""
    start = time.process_time()
    size = sum(map(len, stories.corpus(9, 500_000)))
    assert size / (time.process_time() - start) > 250_000  # bytes a second
    parse.cache_clear()
    start = time.process_time()
    gold(*zip(*answers, strict=True))
    assert len(answers) / (time.process_time() - start) > 1000  # stories a second

"""Measure policies on the same held-out prompts: pretrained, SFT, best-of-n, PPO.

Five things are looked at together, for each alone can be fooled: gold (what we want), the proxy (what PPO was paid
for), the KL divergence to SFT (the price, Gao et al. 2210.10760), length, and whether the text is still text
(distinct bigrams, bits per byte under the pretrained model).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.logprobs import CHUNK_ELEMENTS
from pipeline.model.sampler import generate
from pipeline.text.lengths import Reader, positions_of
from pipeline.text.packing import IGNORED, collate, document_end
from pipeline.text.tokenizer import answer_texts, prompt_ids, stop_ids
from reward_data.formats import text_of

Judge = Callable[[list[Any], list[str]], list[float]]


@dataclass
class Policy:
    """A model that answers. `plain`: it knows no chat template and goes on from the bare text of the prompt."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain: bool = False

    def encode(self, prompts: list[Any], places: Sequence[str] = ()) -> list[list[int]]:
        """Token ids of prompts (messages or text), as this policy is asked them; `places` name them in errors."""
        return prompt_ids(self.tokenizer, [plain_text(p) for p in prompts] if self.plain else prompts, places)

    def reader(self, name: str) -> Reader:
        """This policy as one that reads prompts and answers."""
        return Reader(name, positions_of(self.model), self.encode)

    @property
    def stops(self) -> list[int]:
        """Ids that end an answer; the first one is the usual one."""
        return stop_ids(self.model, self.tokenizer, chat=not self.plain)


@dataclass
class Answers:
    """What a policy said: for each prompt its ids, the response's ids (its end token included) and its text."""

    prompts: list[Any]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: list[bool]
    texts: list[str]

    def take(self, rows: Sequence[int]) -> "Answers":
        """The answers with these indices."""
        return Answers(**{name: [values[row] for row in rows] for name, values in vars(self).items()})


def plain_text(prompt: Any) -> str:
    """The bare text of a prompt: itself, or what its messages say, a line each."""
    return prompt if isinstance(prompt, str) else "\n".join(text_of([message]) for message in prompt)


def answer(
    policy: Policy,
    prompts: list[Any],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Answers:
    """Sample one answer to each prompt; `advance` is told how many are done. Raises UserError as the sampler does."""
    ids = policy.encode(prompts)
    responses: list[list[int]] = []
    ended: list[bool] = []
    texts: list[str] = []
    for start in range(0, len(ids), batch_size):
        samples = generate(
            policy.model,
            ids[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=policy.stops,
            pad_token_id=policy.tokenizer.pad_token_id,
            generator=generator,
        )
        texts += answer_texts(policy.tokenizer, samples.answers())
        responses += samples.answers(with_end=True)
        ended += samples.ended.tolist()
        advance(len(samples.ended))
    return Answers(list(prompts), ids, responses, ended, [text.strip() for text in texts] if policy.plain else texts)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0
) -> Tensor:
    """log π(response | prompt) of each row, summed over the response's tokens: (N,) fp64 on CPU.

    Prompts must have at least one token. Rows of like length share a forward pass, padded on the right.
    """
    vocabulary = model.config.get_text_config().vocab_size
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    totals = torch.zeros(len(rows), dtype=torch.float64)
    while order:
        width = len(rows[order[-1]])  # the longest of those left
        count = max(1, CHUNK_ELEMENTS // (width * vocabulary))
        chosen, order = order[-count:], order[:-count]
        ids = pad_sequence([torch.tensor(rows[i]) for i in chosen], batch_first=True).to(model.device)
        ends = torch.tensor([len(rows[i]) for i in chosen], device=model.device)[:, None]
        starts = torch.tensor([len(prompts[i]) for i in chosen], device=model.device)[:, None]
        positions = torch.arange(width, device=model.device)
        logits = model(input_ids=ids, attention_mask=(positions < ends).long()).logits[:, :-1]
        counts = (positions[1:] >= starts) & (positions[1:] < ends)
        losses = F.cross_entropy(logits[counts].float() / temperature, ids[:, 1:][counts], reduction="none")
        rows_of = counts.nonzero()[:, 0].cpu()  # the row of each loss
        totals[chosen] = -torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, rows_of, losses.double().cpu())
    return totals


def sequence_kl(policy: Policy, reference: Policy, answers: Answers, temperature: float = 1.0) -> float:
    """Monte Carlo KL(π ‖ π_ref) per answer in nats: the mean of log π(y|x) − log π_ref(y|x) over π's own answers.

    Each model is asked in its own way. Where the policy ended with its usual token, or one that is no end for the
    reference (a pretrained model ends a document, an SFT model its turn), the reference is asked for its own usual end:
    the event is the same, "stop here".
    """
    own = sequence_logprobs(policy.model, answers.prompt_ids, answers.response_ids, temperature or 1.0)
    stops, usual = reference.stops, policy.stops[0]
    said = [
        [*ids[:-1], stops[0]] if ended and (ids[-1] == usual or ids[-1] not in stops) else ids
        for ids, ended in zip(answers.response_ids, answers.ended, strict=True)
    ]
    theirs = sequence_logprobs(reference.model, reference.encode(answers.prompts), said, temperature or 1.0)
    return (own - theirs).mean().item()


def text_bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float | None:
    """Bits that `model` needs for a byte of UTF-8 of `texts`, each read as a document of its own; None without text."""
    texts = [text for text in texts if text]
    if not texts:
        return None
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begin = document_end(tokenizer)  # what a packed document comes after
    nats = -sequence_logprobs(model, [[begin]] * len(ids), ids).sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def held_out_nats(
    model: PreTrainedModel, rows: Dataset, batch_size: int, process: int = 0, processes: int = 1
) -> tuple[float, int]:
    """Nats and number of the predicted tokens in this process's share of `rows`.

    Their sums over all processes are exact, whatever the batch size and the number of processes. All processes make
    equally many forward passes, as sharded models need; where the rows have run out, one is computed and not counted.
    """
    nats, tokens = 0.0, 0
    # All logits at once would take gigabytes; ours need them for no loss, other models know no such argument
    options = {"logits_to_keep": 1} if isinstance(model, GPTForCausalLM) else {}
    for start in range(0, len(rows), batch_size * processes):
        first = start + process * batch_size
        mine = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        batch = collate(mine or [rows[0]])
        ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
        loss = model(input_ids=ids, labels=labels, **options).loss
        if mine:
            count = int((labels[:, 1:] != IGNORED).sum())
            nats, tokens = nats + loss.item() * count, tokens + count
    return nats, tokens


# ---- best of n ------------------------------------------------------------------------------------------------------


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the policy that it samples from, in nats: log n − (n − 1)/n (2210.10760; an upper bound where
    answers repeat, 2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of(scores: Sequence[float], n: int) -> list[int]:
    """Index of the highest score in each run of `n`; the first one wins a tie."""
    if len(scores) % n:
        raise ValueError(f"{len(scores)} scores are not a multiple of {n}")
    groups = np.asarray(scores, dtype=np.float64).reshape(-1, n)
    return (groups.argmax(1) + np.arange(len(groups)) * n).tolist()


# ---- statistics -----------------------------------------------------------------------------------------------------


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all of them, within texts and over all texts together (Li et al., 1510.03055)."""
    words = [text.split() for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979): values (N,) → low, high."""
    rows = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    means = np.asarray(values, dtype=np.float64)[rows].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share that was counted over `n` independent cases (Wilson 1927) → low, high.

    Unlike share ± z·standard error it stays within 0 and 1, and has a width where all cases went one way.
    """
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    centre = share + z**2 / (2 * n)
    return max(0.0, (centre - spread) / (1 + z**2 / n)), min(1.0, (centre + spread) / (1 + z**2 / n))


def win_rate(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Share of prompts on which `ours` scores higher, a tie counting half, with a bootstrap interval over prompts."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} scores cannot be compared one by one")
    wins = (a > b) + 0.5 * (a == b)
    return {"mean": float(wins.mean()), "ci95": list(bootstrap_interval(wins.tolist(), seed=seed)), "n": len(wins)}


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean of ours − theirs over the same prompts, and its standard error: the sample standard deviation of the N
    differences over √N, None for a single one."""
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    n = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(differences.mean()), "standard_error": error, "n": n}


# ---- the verdict ----------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """A policy's answers with gold, proxy and the other judges' scores of each, and the figures over all of them."""

    answers: Answers
    gold: list[float] | None
    proxy: list[float]
    judges: dict[str, list[float]]
    figures: dict[str, Any]


def verdict_of(
    answers: Answers,
    *,
    proxy: list[float],
    gold: Judge | None,
    kl: float,
    fluency: Callable[[list[str]], float | None],
    judges: Mapping[str, Judge] = MappingProxyType({}),
    seed: int = 0,
) -> Verdict:
    """Put a policy's answers to the gold judge and the others, and count the rest. `fluency` gives the bits per byte of
    texts. A judge's mean is the figure `judge_<name>`."""
    golds = gold(answers.prompts, answers.texts) if gold else None
    scores = {name: judge(answers.prompts, answers.texts) for name, judge in judges.items()}
    figures = {
        "gold": float(np.mean(golds)) if golds else None,
        "proxy": float(np.mean(proxy)),
        "kl": kl,
        "length": float(np.mean([len(ids) for ids in answers.response_ids])),
        "distinct_2": distinct_n(answers.texts, 2),
        "gold_ci95": list(bootstrap_interval(golds, seed=seed)) if golds else None,
        "bpb_under_pretrained": fluency(answers.texts),
        "without_eos": 1 - sum(answers.ended) / len(answers.ended),
    }
    for name, values in scores.items():
        figures[f"judge_{name}"] = float(np.mean(values))
        figures[f"judge_{name}_ci95"] = list(bootstrap_interval(values, seed=seed))
    return Verdict(answers, golds, proxy, scores, figures)


def samples_of(verdicts: dict[str, Verdict]) -> list[dict[str, Any]]:
    """One row a prompt and policy, for samples.jsonl; all answers to a prompt follow each other."""
    count = len(next(iter(verdicts.values())).answers.texts)
    return [
        {
            "index": i,
            "prompt": plain_text(verdict.answers.prompts[i]),
            "policy": name,
            "completion": verdict.answers.texts[i],
            "gold": verdict.gold[i] if verdict.gold else None,
            "proxy": verdict.proxy[i],
            "ended": verdict.answers.ended[i],
            **{f"judge_{judge}": scores[i] for judge, scores in verdict.judges.items()},
        }
        for i in range(count)
        for name, verdict in verdicts.items()
    ]

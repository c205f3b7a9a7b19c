"""What must change nothing: micro-batches, padding and its side, packing, one process or two."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import gradients_of, policy, prompts, rolled, trainer, weights

from pipeline.ppo import algorithm as A
from pipeline.ppo.learner import Learner


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one precision a process; other tests want another."""
    AcceleratorState._reset_state(reset_partial_state=True)


def test_padding_enters_no_statistic_and_no_gradient(tmp_path):
    made = trainer(tmp_path)
    rollout, metrics = rolled(made)
    gradients, losses = gradients_of(made, rollout=rollout)
    wide = trainer(tmp_path)
    padded, _ = wide.sample(0)
    padded.sequences = torch.nn.functional.pad(padded.sequences, (0, 7), value=5)
    padded_metrics = wide.learner.estimate(padded, 0, wide.state.kl_coef)
    for name in ("logprobs", "values", "entropy"):  # what padding holds must not matter
        table = getattr(padded, name)
        table[~padded.mask] = 1e6
    padded_gradients, padded_losses = gradients_of(wide, rollout=padded)
    for a, b in zip(gradients, padded_gradients, strict=True):
        assert torch.equal(a, b)
    for left, right in ((metrics, padded_metrics), (losses, padded_losses)):
        assert {k: v for k, v in left.items() if "time" not in k} == {k: v for k, v in right.items() if "time" not in k}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batch_size_changes_neither_loss_nor_gradient(tmp_path, size):
    made = trainer(tmp_path, per_device_train_batch_size=4)
    rollout, _ = rolled(made)
    whole, losses = gradients_of(made, rollout=rollout)
    made.args.per_device_train_batch_size = size
    parts, part_losses = gradients_of(made, rollout=rollout)
    assert len(whole) == len(parts) == 2 * 2 * 2
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * float(a.abs().max()) + 1e-8, rtol=1e-4)
    for name in ("loss/policy_avg", "loss/value_avg", "val/ratio", "policy/grad_norm", "critic/grad_norm"):
        assert part_losses[name] == pytest.approx(losses[name], rel=1e-4, abs=1e-6)


def laid_out(rollout, side):
    """The answers as rows padded on the left, on the right, or as one packed row: arguments of a model, and where the
    tokens that predict a response token stand."""
    rows = [row[:length].tolist() for row, length in zip(rollout.sequences, rollout.lengths.tolist(), strict=True)]
    starts = rollout.prompt_lengths.tolist()
    width = max(map(len, rows))
    if side == "packed":
        ids = torch.tensor([[token for row in rows for token in row]])
        positions = torch.tensor([[i for row in rows for i in range(len(row))]])
        predicts = torch.tensor(
            [[s - 1 <= i < len(r) - 1 for r, s in zip(rows, starts, strict=True) for i in range(len(r))]]
        )
        return {"input_ids": ids, "position_ids": positions}, predicts
    ids, mask, predicts = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        shift = width - len(row) if side == "left" else 0
        ids[i, shift : shift + len(row)] = torch.tensor(row)
        mask[i, shift : shift + len(row)] = 1
        predicts[i, shift + start - 1 : shift + len(row) - 1] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, predicts.bool()


@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_layout_of_the_rows_changes_neither_loss_nor_gradient(tmp_path, side):
    """The losses written down once more over the models' own forward passes, with the rows laid out in another way."""
    made = trainer(tmp_path, num_mini_batches=1, num_ppo_epochs=1, reference=policy(5))
    rollout, _ = rolled(made)
    rollout.logprobs = rollout.logprobs + 0.3 * torch.sin(torch.arange(rollout.logprobs.numel()).view_as(rollout.mask))
    (critic_gradient, policy_gradient), metrics = gradients_of(made, rollout=rollout)

    inputs, predicts = laid_out(rollout, side)
    targets = inputs["input_ids"][:, 1:][predicts[:, :-1]]
    mask, tokens = rollout.mask, rollout.mask.sum()
    assert tokens == len(targets) and len(set(rollout.lengths.tolist())) > 3
    old, advantages = rollout.logprobs[mask], rollout.advantages[mask]
    ratio = (
        made.models.policy(**inputs).logits[predicts].log_softmax(-1).gather(-1, targets[:, None])[:, 0] - old
    ).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    loss.backward()
    hidden = made.models.critic.model(**inputs).last_hidden_state[predicts]
    value_loss, _ = A.value_loss(
        made.models.critic.score(hidden)[:, 0], rollout.values[mask], rollout.returns[mask], 0.2
    )
    (value_loss / tokens).backward()
    assert metrics["loss/policy_avg"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert metrics["loss/value_avg"] == pytest.approx((value_loss / tokens).item(), rel=1e-4)
    for model, gradient in ((made.models.policy, policy_gradient), (made.models.critic, critic_gradient)):
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(gradient, found, atol=1e-5 * float(found.abs().max()), rtol=1e-3)


# --- two processes ----------------------------------------------------------------------------------------------------


class TwoAlike:
    """An accelerator of two processes that hold the same rows, so every sum over processes is twice its own.

    `alone` is a list of the backward passes: whether each kept its gradient to itself, as all must but the last one
    before a step.
    """

    num_processes, process_index = 2, 1

    def __init__(self, accelerator):
        self.accelerator, self.kept, self.alone = accelerator, False, []

    def __getattr__(self, name):
        return getattr(self.accelerator, name)

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return 2 * tensor

    @contextlib.contextmanager
    def no_sync(self, module):
        assert isinstance(module, torch.nn.Module)
        self.kept = True
        yield
        self.kept = False

    def backward(self, loss):
        self.alone.append(self.kept)
        self.accelerator.backward(loss)


@pytest.mark.parametrize("kind", ["two networks", "one trunk", "no critic"])
def test_a_process_of_two_with_equal_halves_has_the_gradient_of_one(tmp_path, kind):
    """Without a launcher, so in every run of the fast tests; the real thing is below, and slow."""
    options = {"entropy_coef": 0.02, "ptx_coef": 0.5, "target_kl": 1e9, "ptx_dataset": ["t6 t7 t8 t9"]} | KINDS[kind]
    made = trainer(tmp_path, ptx_batch_size=3, **options)
    rollout, figures = rolled(made)
    one, losses = steps_of(made, rollout)
    made.args.ptx_batch_size = 6
    made.accelerator = TwoAlike(made.accelerator)
    made.learner = Learner(made.models, made.args, made.accelerator, made.learner.ptx)
    assert (made.learner.world, made.learner.rank) == (2, 1)
    assert (
        made.learner.plan(rollout, 0, 0)[0][0].tolist() != trainer(tmp_path).learner.plan(rollout, 0, 0)[0][0].tolist()
    )
    made.learner.rank = 0
    two, doubled = steps_of(made, rollout)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    for name, value in losses.items():
        if "time" not in name:
            assert doubled[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    # Four steps: for each two passes of the critic, where there is one; two of pretraining text; two of the policy.
    critic_passes = [] if kind != "two networks" else [True, False]
    assert made.accelerator.alone == [*critic_passes, True, True, True, False] * 4
    again = made.learner.estimate(rollout, 0, made.state.kl_coef)
    for name in ("objective/kl", "objective/scores", "objective/entropy", "response/length"):
        assert again[name] == pytest.approx(figures[name], rel=1e-5, abs=1e-7), name


def steps_of(made, rollout):
    """The gradients of all steps of an update that takes none, and its figures."""
    gradients = []

    def record(network):
        gradients.append(torch.cat([p.grad.flatten() for p in network.module.parameters()]).clone())
        network.optimizer.zero_grad()
        return gradients[-1].norm()

    made.learner.step = record
    return gradients, made.learner.update(rollout, 0)


TWO = """
import sys, torch
sys.path[:0] = ["tests", "."]
from test_ppo_invariance import run
from pipeline.runtime.console import leave
found = run(sys.argv[1], torch.load(sys.argv[2], weights_only=True), sys.argv[4])
if found["rank"] == 0:
    torch.save(found, sys.argv[3])
leave()
"""


KINDS = {
    "two networks": {},
    "one trunk": {"share_trunk": True},
    "no critic": {"advantage_estimator": "rloo", "num_generations": 2},
}


def run(folder, answers, kind):
    """Two updates from given answers with everything that processes share, then an evaluation; this process's part."""
    made = trainer(
        Path(folder),
        num_mini_batches=1,
        num_ppo_epochs=2,
        entropy_coef=0.02,
        ptx_coef=0.5,
        ptx_batch_size=4,
        normalize_scores=True,
        eval_rows=prompts(12),
        adaptive_kl_target=0.01,
        adaptive_kl_horizon=20,
        ptx_dataset=["t6 t7 t8", "t9", "t7 t7", "t10 t11 t6 t8"],
        **KINDS[kind],
    )
    made.learner.ptx.ids = made.learner.ptx.ids[made.learner.rank :: made.learner.world]
    made.learner.ptx.draw = lambda count, random, device: draw_all(made.learner.ptx, count, device)
    for prompts_, completions, scores in answers:
        size = 8 // made.learner.world  # neighbours together: they may answer one prompt
        own = slice(made.learner.rank * size, (made.learner.rank + 1) * size)
        metrics = made.step(prompts_[own], completions[own], scores[own])
    made.args.temperature = 1e-3  # the evaluation's answers are then the likeliest, whoever draws them
    metrics |= made.evaluate()
    found = {
        "rank": made.learner.rank,
        "world": made.learner.world,
        "policy": weights(made.models.policy),
        "critic": weights(made.models.critic) if made.models.critic else {},
        "metrics": metrics,
    }
    made.accelerator.end_training()
    return found


def draw_all(ptx, count, device):
    """Every text of `ptx` once, in order."""
    assert count == len(ptx.ids)
    width = max(map(len, ptx.ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in ptx.ids], device=device)
    lengths = torch.tensor([len(row) for row in ptx.ids], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None] - 1


def given_answers(folder):
    """Two updates' answers of 8 rows, two to each prompt, as lists."""
    made = trainer(folder, num_generations=2)
    found = []
    for update in range(2):
        rollout, _ = made.sample(update)
        rows = [row[:length].tolist() for row, length in zip(rollout.sequences, rollout.lengths.tolist(), strict=True)]
        starts = rollout.prompt_lengths.tolist()
        found.append(
            (
                [row[:s] for row, s in zip(rows, starts, strict=True)],
                [row[s:] for row, s in zip(rows, starts, strict=True)],
                rollout.scores.tolist(),
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_where_one_does(tmp_path, kind):
    """Weights, β, normalised scores, every metric and the held-out figures, after two updates."""
    answers = given_answers(tmp_path)
    torch.save(answers, tmp_path / "answers.pt")
    one = run(tmp_path, answers, kind)
    script, result = tmp_path / "two.py", tmp_path / "result.pt"
    script.write_text(TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(script),
        str(tmp_path),
        str(tmp_path / "answers.pt"),
        str(result),
        kind,
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    two = torch.load(result, weights_only=True)
    assert (one["world"], two["world"]) == (1, 2)
    for part in ("policy", "critic"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=2e-5, rtol=0, msg=f"{part} {name}")
    assert {"loss/ptx_avg", "policy/entropy_avg", "eval/proxy", "eval/kl", "eval/win_rate"} < one["metrics"].keys()
    order_matters = {"eval/win_rate_low", "eval/win_rate_high", "val/ratio_var"}  # the bootstrap draws by place
    for name, value in one["metrics"].items():
        if not {name} & order_matters and "time" not in name and "seconds" not in name and "per_s" not in name:
            assert two["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name

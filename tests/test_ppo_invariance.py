"""What must change nothing: micro-batches, padding and its side, packing, one process or two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ppo_tools import gradients_of, policy, prompts, rolled, trainer, weights

from pipeline.ppo import algorithm as A


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

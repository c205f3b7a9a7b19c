"""A killed PPO run ends with the same bits, and what it saves are stock folders."""

import numpy as np
import pytest
import torch
from ppo_tools import config, count_t7, critic, end_alike, policy, prompts, same, trainer, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.checkpoint import seal
from pipeline.errors import UserError
from pipeline.model.gpt import GPTForCausalLM


class Killed(Exception):
    pass


def kill_after(updates):
    def callback(made, metrics):
        if made.state.updates_done == updates:
            raise Killed

    return callback


def noisy(prompts, completions, **columns):
    """A reward that draws from torch's global generator: its state must come back too."""
    return (torch.rand(len(prompts)) + torch.tensor(count_t7(prompts, completions))).tolist()


@pytest.mark.parametrize("killed_after", [2, 3])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, killed_after):
    torch.manual_seed(5)
    whole = trainer(tmp_path / "whole", rewards=noisy, save_steps=2, lr_scheduler_type="linear")
    torch.manual_seed(5)
    final = whole.train()
    # Update 3 is lost if the kill comes after it: the last checkpoint is that of update 2.
    first = trainer(tmp_path / "parts", rewards=noisy, save_steps=2, callbacks=[kill_after(killed_after + 1)])
    torch.manual_seed(5)
    with pytest.raises(Killed):
        first.train()
    torch.manual_seed(99)
    second = trainer(tmp_path / "parts", rewards=noisy, save_steps=2, models=(policy(7), critic(8)), reference=policy())
    resumed = second.train()
    assert second.rows[0]["step"] == 3
    assert end_alike(whole, second)
    for a, b in (
        (whole.learner.policy.optimizer, second.learner.policy.optimizer),
        (whole.learner.critic.optimizer, second.learner.critic.optimizer),
    ):
        for one, two in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(one[k], two[k]) for k in one)
    del final["episodes_per_s"], resumed["episodes_per_s"]
    assert final == resumed
    assert whole.state.tokens == second.state.tokens


def test_what_a_kill_left_of_older_checkpoints_goes(tmp_path, monkeypatch):
    """Killed after the last checkpoint was written, and before the one that it replaces was removed."""
    monkeypatch.setattr("pipeline.checkpoint.prune", lambda *_: None)
    trainer(tmp_path, save_steps=1).train()
    monkeypatch.undo()
    names = [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == names
    trainer(tmp_path, save_steps=1).train()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == names[2:]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    first = trainer(tmp_path, save_steps=1, callbacks=[kill_after(3)])
    with pytest.raises(Killed):
        first.train()
    newest = tmp_path / "checkpoints" / "step-00000002"
    (newest / "critic.safetensors").write_bytes(b"torn")
    second = trainer(tmp_path, save_steps=1)
    second.train()
    assert second.rows[0]["step"] == 2 and "critic.safetensors is damaged" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    first = trainer(tmp_path, save_steps=2, total_episodes=16)
    final = first.train()
    second = trainer(tmp_path, save_steps=2, total_episodes=16, models=(policy(7), critic(8)))
    assert second.train() == final and second.rows == []
    assert same(weights(first.models.policy), weights(second.models.policy))


def test_a_policy_given_as_its_own_reference_is_copied(tmp_path):
    actor = policy()
    made = trainer(tmp_path, models=(actor, critic()), reference=actor, total_episodes=16)
    made.train()
    assert made.rows[0]["objective/kl"] == 0.0 and made.rows[1]["objective/kl_k3"] > 0.0


def test_resume_refuses_another_run(tmp_path):
    first = trainer(tmp_path, save_steps=1, total_episodes=16)
    first.train()
    with pytest.raises(UserError, match=r"with other settings: seed: 0 → 1\. Set them back, or choose another output"):
        trainer(tmp_path, save_steps=1, total_episodes=16, seed=1).train()


@pytest.mark.parametrize(
    "change",
    [{"kl_coef": 9.0}, {"learning_rate": 1e-7}, {"gamma": 0.9}, {"best_metric": "win_rate"}, {"adam_epsilon": 1.0}],
)
def test_resume_refuses_other_settings(tmp_path, change):
    trainer(tmp_path, save_steps=1, total_episodes=16).train()
    with pytest.raises(UserError, match=f"written with other settings: {next(iter(change))}: "):
        trainer(tmp_path, save_steps=1, total_episodes=16, **change).train()


def test_resume_says_so_and_takes_what_changes_no_result(tmp_path, capsys):
    with pytest.raises(Killed):
        trainer(tmp_path, save_steps=1, total_episodes=24, callbacks=[kill_after(3)]).train()
    second = trainer(tmp_path, save_steps=2, total_episodes=24, per_device_train_batch_size=1)
    second.train()
    assert second.rows[0]["step"] == 3
    assert "step-00000002: 2 of 3 updates are done" in capsys.readouterr().out


def test_resume_names_all_settings_that_differ(tmp_path):
    trainer(tmp_path, save_steps=1, total_episodes=16).train()
    with pytest.raises(UserError, match=r"kl_coef: 0\.05 → 9\.0; gamma: 1\.0 → 0\.9\. Set them back"):
        trainer(tmp_path, save_steps=1, total_episodes=16, kl_coef=9.0, gamma=0.9).train()


@pytest.mark.parametrize("content", ["rubbish", {}, {"state": {}}, {"state": 3}, "other optimizers"])
def test_a_resealed_checkpoint_of_rubbish_is_no_traceback(tmp_path, content):
    """Bytes that are no checkpoint are passed over for the one before; a state of another form is a sentence."""
    with pytest.raises(Killed):
        trainer(tmp_path, save_steps=1, callbacks=[kill_after(3)]).train()
    newest = tmp_path / "checkpoints" / "step-00000002"
    if content == "rubbish":
        (newest / "state.pt").write_bytes(b"rubbish")
        seal(newest)
        second = trainer(tmp_path, save_steps=1)
        second.train()
        assert second.rows[0]["step"] == 2
        return
    if content == "other optimizers":
        content = torch.load(newest / "state.pt", weights_only=True)
        content["optimizers"]["policy"] = {"state": {}, "param_groups": []}
    torch.save(content, newest / "state.pt")
    seal(newest)
    with pytest.raises(UserError, match=r"is of another version|has a state that cannot be taken up"):
        trainer(tmp_path, save_steps=1).train()


def test_resume_refuses_other_models_and_other_held_out_prompts(tmp_path):
    trainer(tmp_path, save_steps=1, total_episodes=16, eval_steps=1, eval_rows=prompts(3)).train()
    with pytest.raises(UserError, match="written with other settings: held-out prompts: 3 → 4"):
        trainer(tmp_path, save_steps=1, total_episodes=16, eval_steps=1, eval_rows=prompts(4)).train()
    wide = GPTForCausalLM(config(hidden_size=64))
    with pytest.raises(UserError, match="step-00000002 is of other models"):
        trainer(
            tmp_path, models=(wide, critic()), save_steps=1, total_episodes=16, eval_steps=1, eval_rows=prompts(3)
        ).train()


def test_numbers_of_numpy_do_not_spoil_a_checkpoint(tmp_path):
    settings = {"save_steps": 1, "kl_coef": np.linspace(0, 0.1, 3)[1], "learning_rate": np.float64(1e-3)}
    first = trainer(
        tmp_path, callbacks=[lambda t, metrics: metrics.update(bleu=np.float32(0.5)), kill_after(2)], **settings
    )
    with pytest.raises(Killed):
        first.train()
    second = trainer(tmp_path, **settings)
    second.train()
    assert [row["step"] for row in second.rows] == [2, 3, 4] and second.state.kl_coef == 0.05


@pytest.mark.parametrize("fails_at", [2, 4])
def test_an_evaluation_that_failed_is_made_up_for(tmp_path, fails_at, monkeypatch):
    monkeypatch.setattr("pipeline.rewards.PAUSES", (0.0,))  # it is asked again at once, and fails again
    broken = {"judge": True}

    def gold(prompts, completions, **columns):
        if broken["judge"] and first.state.updates_done == fails_at:
            raise ConnectionError("the judge is away")
        return [1.0] * len(prompts)

    first = trainer(tmp_path, eval_rows=prompts(3), eval_steps=2, gold=gold, save_steps=1)
    with pytest.raises(UserError, match="the judge is away"):
        first.train()
    broken["judge"] = False
    second = trainer(tmp_path, eval_rows=prompts(3), eval_steps=2, gold=gold, save_steps=1)
    second.train()
    assert [r["step"] for r in second.rows if "eval/gold" in r] == [step for step in (2, 4) if step >= fails_at]


def test_half_an_update_is_not_gone_on_from(tmp_path):
    """Ctrl-C in a notebook, and the same cell again."""
    made, taken = trainer(tmp_path, save_steps=1), []
    step = made.learner.step

    def interrupted(network):
        taken.append(1)
        if len(taken) == 12:
            raise KeyboardInterrupt
        return step(network)

    made.learner.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        made.train()
    with pytest.raises(UserError, match="update 2 was broken off half way"):
        made.train()
    for call in (made.save_state, made.resume):  # neither keeps half an update nor forgets its gradients
        with pytest.raises(UserError, match="update 2 was broken off half way"):
            call()
    again, whole = trainer(tmp_path, save_steps=1), trainer(tmp_path / "whole")
    again.train()
    whole.train()
    assert same(weights(again.models.policy), weights(whole.models.policy))


def test_saved_folders_are_stock(tmp_path):
    made = trainer(tmp_path, total_episodes=8)
    made.train()
    made.save_model(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(16, (2, 9))
    torch.testing.assert_close(stock(ids).logits, made.models.policy(ids).logits, atol=1e-5, rtol=0)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model" / "critic")
    torch.testing.assert_close(judge.score.weight, made.models.critic.score.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<end>"


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_run_that_is_asked_to_stop_keeps_the_update_and_puts_its_evaluation_off(tmp_path, at):
    whole = trainer(tmp_path / "whole", eval_rows=prompts(3), eval_steps=2, save_steps=3)
    whole.train()

    class Asked(BaseException):
        pass

    def stop(kept):
        raise Asked(kept)

    first = trainer(tmp_path, eval_rows=prompts(3), eval_steps=2, save_steps=3)
    first.recorder.stop = stop
    first.callbacks.append(lambda t, _: setattr(t.recorder, "stopping", 15 if t.state.updates_done == at else 0))
    with pytest.raises(Asked) as asked:
        first.train()
    assert asked.value.args == (tmp_path / f"checkpoints/step-{at:08d}",)
    again = trainer(tmp_path, eval_rows=prompts(3), eval_steps=2, save_steps=3)
    again.train()
    assert same(weights(again.models.policy), weights(whole.models.policy))
    lines = [[(r["step"], sorted(r)) for r in made.rows] for made in (whole, first, again)]
    assert lines[0] == lines[1] + lines[2]

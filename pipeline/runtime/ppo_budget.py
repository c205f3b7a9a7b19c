"""`--dry_run` of the stage ppo; apart from budget.py, so that no other stage has to load PPO for it."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from pipeline.model.load import parameter_count
from pipeline.model.memory import (
    Line,
    Passed,
    available,
    gradient_bytes,
    is_out_of_memory,
    make_moments,
    measured,
    moment_bytes,
    trained_count,
    weight_bytes,
)
from pipeline.ppo import PPOConfig, PPOTrainer
from pipeline.ppo.config import check_config
from pipeline.ppo.learner import Network
from pipeline.ppo.longest import longest_rollout, passes
from pipeline.runtime import budget
from pipeline.runtime.budget import STEPS, Machine, Memory, clock, peak_so_far
from pipeline.runtime.record import Stage
from pipeline.runtime.sampling_budget import sampling_lines


def of_ppo(stage: Stage, trainer: PPOTrainer, rewards: Sequence[nn.Module]) -> None:
    """Print what PPO takes with `trainer`, whose rewards have the models `rewards`."""
    args, machine = dataclasses.replace(trainer.args), Machine.of(stage, trainer.accelerator.device)
    check_config(args, machine.processes)
    stage.say("dry run: nothing is kept and nothing is written")
    memory = counted(trainer, rewards, machine.processes)
    stage.say(work(trainer, args, rewards))
    for sentence in run_share(trainer, args, memory, machine):
        stage.say(sentence)
    longest = max(map(len, trainer.prompts.ids)) + args.response_length
    rows = args.batch_size // args.num_mini_batches
    of = f"answers of up to {longest:,} tokens, prompts included,"
    budget.print_memory(memory, rows // machine.processes, of)
    stage.say(budget.proposal(memory, machine, rows, "answers", accumulation=False))


def work(trainer: PPOTrainer, args: PPOConfig, rewards: Sequence[nn.Module]) -> str:
    """Parameters, tokens and FLOPs, which are at most these: answers may end before response_length."""
    policy, critic = trainer.models.policy, trainer.models.critic
    prompt = float(np.mean([len(ids) for ids in trainer.prompts.ids]))
    episodes = args.total_updates * args.batch_size
    row = round(prompt) + args.response_length
    tokens, passes_over = episodes * row, args.num_ppo_epochs
    # Sampling, the log-probabilities of policy and reference, and the steps
    flops = 3 * budget.forward_flops(policy, row, True) + passes_over * budget.training_flops(policy, row, True)
    if trainer.models.critic_forward is not None:
        flops += budget.forward_flops(critic, row, False) + passes_over * budget.training_flops(critic, row, False)
    flops = tokens * (flops + sum(budget.forward_flops(model, row, False) for model in rewards))
    networks = {"policy": policy, "critic": critic}
    told = [
        f"{name} {parameter_count(model):,} parameters, {trained_count(model):,} of them trained"
        for name, model in networks.items()
        if model is not None
    ]
    return (
        f"{'; '.join(told)}; {args.total_updates:,} updates of {args.batch_size} answers, at most {tokens:,.0f} tokens "
        f"with their prompts, {flops:.2g} FLOPs"
    )


# ---- memory ---------------------------------------------------------------------------------------------------------


def counted(trainer: PPOTrainer, rewards: Sequence[nn.Module], processes: int) -> Memory:
    """Memory by part, from the parameters, passes over one and two of the longest rows, and answers to two prompts."""
    learner, models, args = trainer.learner, trainer.models, trainer.args
    cuda = learner.device.type == "cuda"
    networks = [network.module for network in (learner.critic, learner.policy) if network is not None]
    reference = models.reference_forward.model if isinstance(models.reference_forward.model, nn.Module) else None
    fixed = budget.fixed_parts(models.policy, models.critic, reference, *rewards)
    whole = fixed.pop("weights")
    named = {"policy": models.policy, "critic": models.critic}
    weights = {f"weights of the {name}": float(weight_bytes(model)) for name, model in named.items()}
    weights["weights of the reference and the rewards"] = whole - sum(weights.values())
    fixed |= {name: size for name, size in weights.items() if size}
    gradients = max(gradient_bytes(network) for network in networks)  # the critic's are gone when the policy's come
    fixed["gradients"] = float(gradients)
    fixed["optimizers"] = float(sum(moment_bytes(optimizer) for optimizer in learner.optimizers.values()))
    rows = min(args.per_device_train_batch_size, args.batch_size // args.num_mini_batches // processes)
    kept, passing = lines(trainer, rows)
    longest = max(map(len, trainer.prompts.ids)) + args.response_length
    config = budget.config_of(models.policy)
    sampling = sampling_bytes(trainer, args.batch_size // processes)
    accumulates = rows < args.batch_size // args.num_mini_batches // processes
    return Memory(
        rows=rows,
        fixed=fixed,
        kept=kept,
        passing=passing,
        logits=(longest, config.vocab_size),
        accumulates=accumulates,
        gaps=0.0 if cuda else budget.GAPS,
        sampling=max(0.0, sampling - gradients),
        buckets=float(sum(gradient_bytes(network) for network in networks)) if processes > 1 else 0.0,
    )


def lines(trainer: PPOTrainer, rows: int) -> tuple[Line, Line]:
    """What policy or critic, whichever takes more of `rows` rows, keeps and takes in forward and backward pass."""
    learner, found = trainer.learner, list[tuple[Line, Line]]()

    def passed(network: Network, loss_of: Callable, count: int) -> Passed:
        numbers = torch.arange(count, device=learner.device)
        tokens = float(count * trainer.args.response_length)
        return measured(lambda: loss_of(numbers)[0] / tokens, network.module)

    rollouts = {count: longest_rollout(learner, trainer.prompts, count) for count in (1, 2)}
    both = [dict(enumerate(passes(learner, rollout))) for rollout in rollouts.values()]
    for number in both[0]:
        one, two = (passed(*each[number], count) for each, count in zip(both, rollouts, strict=True))
        found.append((Line.through((1, one.kept), (2, two.kept)), Line.through((1, one.peak), (2, two.peak))))
    return max(found, key=lambda pair: pair[1](rows))


def sampling_bytes(trainer: PPOTrainer, rows: int) -> float:
    """What sampling `rows` answers to the longest prompts takes beside the weights."""
    ids = sorted(trainer.prompts.ids, key=len, reverse=True)
    answerer, args = trainer.answerer, trainer.args
    answerer.sync(trainer.models.policy)
    with trainer.accelerator.autocast():
        _, taken = sampling_lines(trainer.models.policy, ids, args.response_length, answerer.sampler.generate)
    return taken(rows)


# ---- time -----------------------------------------------------------------------------------------------------------


def run_share(trainer: PPOTrainer, args: PPOConfig, memory: Memory, machine: Machine) -> list[str]:
    """Sample and score one mini-batch of answers, take STEPS optimizer steps on it, and scale; notes the peak.

    `args` are the run's; those of `trainer` become those of the share.
    """
    if memory.peak(memory.rows, True) > available(trainer.accelerator.device):
        return ["a micro-batch does not fit this machine, so no step was taken and no time can be told"]
    share = -(-args.batch_size // args.num_mini_batches // args.num_generations) * args.num_generations
    own, update = trainer.args, args.critic_warmup_updates
    own.batch_size, own.num_mini_batches, own.num_ppo_epochs, own.target_kl = share, 1, 1, None
    own.response_length = 2
    try:
        for optimizer in trainer.learner.optimizers.values():
            make_moments(optimizer)
        trainer.sample(update)  # the first call sets up
        own.response_length = args.response_length
        start = time.perf_counter()
        rollout, _ = trainer.sample(update)
        sampled = trainer.learner.clock()
        trainer.learner.estimate(rollout, update, args.kl_coef)
        estimated = trainer.learner.clock()
        trainer.learner.update(rollout, update)  # sets up
        own.num_ppo_epochs = STEPS
        begun = trainer.learner.clock()
        trainer.learner.update(rollout, update)
        step = (trainer.learner.clock() - begun) / STEPS
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return ["a mini-batch does not fit this machine, so no time can be told"]
    # More answers are sampled at a time than were here: seen was what an update takes, if that is more
    if memory.sampling <= memory.passing(memory.rows) or share * machine.processes >= args.batch_size:
        memory.seen = peak_so_far()
    times = sampled - start, estimated - sampled, step
    length = rollout.response_lengths.float().mean().item()
    return told(trainer, args, share, times, length, machine.processes)


def told(
    trainer: PPOTrainer, args: PPOConfig, share: int, times: tuple[float, float, float], length: float, processes: int
) -> list[str]:
    """The whole time, from the seconds of sampling, of estimating and of a step for `share` answers."""
    sampling, estimating, step = (seconds / share for seconds in times)  # of an answer
    update = args.batch_size * (sampling + estimating + args.num_ppo_epochs * step) / processes
    evaluations = 1 + math.ceil(args.total_updates / args.eval_steps) if trainer.evaluator and args.eval_steps else 0
    # Each reads the answers once more; the first one samples the reference's, too
    held_out = len(trainer.evaluator.prompts) if trainer.evaluator else 0
    evaluation = held_out * (sampling + estimating) / processes
    seconds = args.total_updates * update + (evaluations + (evaluations > 0)) * evaluation
    said = [
        f"about {clock(seconds)}: {args.total_updates:,} updates of {update:.2g} s and {evaluations} evaluations of "
        f"{evaluation:.2g} s; checkpoints come on top",
        f"measured on {share} of the {args.batch_size} answers of an update, {length:.0f} tokens long: sampled and "
        f"scored in {times[0]:.2g} s, read in {times[1]:.2g} s, the mean of {STEPS} steps {times[2]:.2g} s; time is "
        "taken to grow with the answers, and sampling more of them at a time is faster than that",
    ]
    if processes > 1:
        said.append(budget.shared(processes))
    return said

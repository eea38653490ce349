"""From episodes to training samples: what each is worth, and how they are dealt out to mini-batches and ranks.

A sample is made once (action_samples here, judge.critique_samples for critiques) and changed in named steps that
train() shows: set_advantages, the scores of the models, set_importance_weights, record_advantages; mini_batches deals
samples out.

Departures from published code: no sample is deleted or duplicated to make a batch divide; mini-batches are dealt in
runs of samples that begin alike, not singly (train.deal); an episode left alone in its group gets no advantage instead
of its raw score.  RLVMR's rewards are as published, with its reward for a reflection at the first step, which has
nothing to reflect on; actions are compared as parsed, not as matched by its expression.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import losses
from config import Config
from packing import Sample, sort_by_prefix, split_evenly
from rollout import Episode, Step

RUN = 8  # samples that begin alike and stay in one mini-batch (train.deal=prefixes), if there are enough for all


def make_sample(
    step: Step, is_critique: bool = False, won: bool = False, group: int = -1, trajectory: int = -1
) -> Sample:
    """Make the sample of an action or a critique, from the tokens and log-probs recorded when it was sampled."""
    return Sample(
        np.array(step.prompt_ids, dtype=np.int32),
        np.array(step.response_ids, dtype=np.int32),
        np.array(step.logprobs, dtype=np.float32),
        is_critique=is_critique,
        truncated=step.truncated,
        step=step,
        won=won,
        group=group,
        trajectory=trajectory,
    )


def action_samples(episodes: Sequence[Episode], config: Config) -> list[Sample]:
    """Make one sample per action, in the order of the episodes and their steps, yet without an advantage."""
    return [
        make_sample(
            step,
            won=episode.won,
            group=episode.group,
            trajectory=episode.group * config.rollout.group_size + episode.member,
        )
        for episode in episodes
        for step in episode.steps
    ]


def set_advantages(samples: Sequence[Sample], episodes: Sequence[Episode], config: Config) -> None:
    """Give the actions of `episodes` their advantages, by losses.ADVANTAGES; groups must be whole.

    An episode left alone, the others of its group having been discarded, has nothing to be compared with and gets 0.
    With PPO the advantage is the score until PPO.set_advantages() has seen the critic's values.
    """
    algo = config.algo
    actions = [sample for sample in samples if not sample.is_critique]
    if not actions:
        return
    steps = [sample.step for sample in actions]
    group_N = torch.tensor([sample.group for sample in actions])
    trajectory_N = torch.tensor([sample.trajectory for sample in actions])
    reward_N = torch.tensor([step.reward for step in steps])
    strict = algo.invalid == "unavailable"
    invalid_N = torch.tensor([float(not step.valid or (strict and not step.available)) for step in steps])
    tags = sorted({step.tag for step in steps})
    batch = losses.SampleBatch(
        score_N=losses.scores(reward_N, trajectory_N, invalid_N, algo.invalid_penalty),
        group_N=group_N,
        trajectory_N=trajectory_N,
        reward_N=reward_N,
        invalid_N=invalid_N,
        anchor_N=losses.anchors([step.observation for step in steps], group_N),
        tag_N=torch.tensor([tags.index(step.tag) for step in steps]),
        tag_reward_N=torch.tensor([reward for episode in episodes for reward in tag_rewards(episode)]),
    )
    members = Counter(episode.group for episode in episodes)
    alone = {group for group, count in members.items() if count == 1 and algo.advantage != "ppo"}
    for sample, advantage in zip(actions, losses.advantages(batch, algo).tolist(), strict=True):
        sample.advantage = 0.0 if sample.group in alone else advantage


def tag_rewards(episode: Episode) -> list[float]:
    """Say what the tag of each reply earned by itself, 0 or 1. Source: RLVMR, its rules and their order.

    planning: the episode was won. explore: no earlier well-formed step took the same action. reflection: the step
    before failed (malformed or not on offer) and took another action; at the first step always. Others, and malformed
    replies: 0.
    """
    rewards: list[float] = []
    taken: set[str] = set()
    before: Step | None = None
    for step in episode.steps:
        earned = {
            "planning": episode.won,
            "explore": step.action not in taken,
            "reflection": before is None or (not (before.valid and before.available) and before.action != step.action),
        }
        rewards.append(float(step.valid and earned.get(step.tag, False)))
        if step.valid:
            taken.add(step.action)
        before = step
    return rewards


def has_gradient(sample: Sample, config: Config) -> bool:
    """Tell whether a sample's loss can have a gradient; others are counted in every denominator and not computed."""
    if sample.num_loss_tokens == 0:
        return False
    return bool(np.any(sample.advantage)) or config.algo.kl > 0 or config.algo.entropy != 0


def needs_score(sample: Sample, config: Config) -> bool:
    """Tell whether the models must score a sample: it has a gradient, or PPO's critic may give it one, or its tokens
    may be rejected from a denominator."""
    has_value = config.algo.advantage == "ppo" and not sample.is_critique
    return has_gradient(sample, config) or has_value or config.algo.importance == "mask"


def set_importance_weights(samples: Sequence[Sample], config: Config) -> None:
    """Write the factors on each sample's loss: cut-off replies and rejected tokens get 0. Needs old_logprobs."""
    algo = config.algo
    for sample in samples:
        if algo.overlong == "mask" and sample.truncated:
            sample.loss_weights = np.zeros(len(sample.response_ids), dtype=np.float32)
        elif algo.importance != "none" and sample.old_logprobs is not None:
            trainer_T, engine_T = (torch.from_numpy(logp) for logp in (sample.old_logprobs, sample.engine_logprobs))
            bounds = (algo.importance_low, algo.importance_high)
            sample.loss_weights = losses.importance_weights(trainer_T, engine_T, algo.importance, *bounds).numpy()


def record_advantages(samples: Sequence[Sample]) -> None:
    """Write to each action's and critique's record what is trained on: the mean over its tokens where they differ."""
    for sample in samples:
        sample.step.advantage = float(np.mean(sample.advantage))


def mini_batches(samples: Sequence[Sample], config: Config, iteration: int, world: int) -> list[list[list[Sample]]]:
    """Deal out every sample once: [mini-batch][rank] -> samples.

    Mini-batches have equally many actions, and critiques; with train.deal=shuffled each sample is drawn by itself, with
    prefixes in runs of those that begin alike (`deal_runs`). A mini-batch is split over the ranks by the distinct
    tokens that they will compute. The same for every rank, and the same mini-batches for every world size.
    """
    rng = random.Random(f"mini-batches {config.seed} {iteration}")
    actions, critiques = ([one for one in samples if one.is_critique == kind] for kind in (False, True))
    number = max(1, -(-len(actions) // config.train.samples_per_update))
    batches: list[list[Sample]] = [[] for _ in range(number)]
    for kind in (actions, critiques):
        if config.train.deal == "prefixes":
            parts = deal_runs(kind, number, rng)
        else:
            shuffled = rng.sample(kind, len(kind))
            parts = [shuffled[first::number] for first in range(number)]
        for batch, part in zip(batches, parts, strict=True):
            batch += part
    shares = []
    for batch in batches:
        computed = [has_gradient(sample, config) or sample.returns is not None for sample in batch]  # by the critic
        shares.append(split_evenly([one for one, counts in zip(batch, computed, strict=True) if counts], world))
        shares[-1][0] += [one for one, counts in zip(batch, computed, strict=True) if not counts]
    return shares


def deal_runs(samples: Sequence[Sample], number: int, rng: random.Random) -> list[list[Sample]]:
    """Deal samples into `number` parts of about equal size, in runs that begin alike.

    The actions of a game, or the answers to a question, are sorted by their tokens and cut into as many runs as there
    are parts, so that each has some of every game; into fewer where runs would be shorter than RUN, or than a part. The
    shortest parts get the longest runs. None stays empty unless there are fewer samples than parts.
    """
    run = min(RUN, max(1, len(samples) // number))
    alike: dict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        alike[sample.prompt_ids.tobytes() if sample.is_critique else sample.group].append(sample)
    parts: list[list[Sample]] = [[] for _ in range(number)]
    for group in rng.sample(list(alike.values()), len(alike)):
        order, _ = sort_by_prefix(group)
        cuts = np.array_split(order, min(number, -(-len(group) // run)))  # the longer ones first
        shortest = sorted(rng.sample(parts, number), key=len)
        for cut, part in zip(cuts, shortest, strict=False):
            part += [group[index] for index in cut]
    return parts

"""From episodes to training rows: what each row is worth, and how rows are dealt out to mini-batches and ranks.

A row is one action or one critique: a prompt, a response, an advantage.  actor_rows() and judge_rows() make them of
whole groups; weigh() and add_critic() finish them once the models have scored them; mini_batches() deals them out.

Departures from published code: no row is deleted or duplicated to make a batch divide; an episode left alone in its
group gets no advantage instead of its raw score.  RLVMR's rewards are as published, with its reward for a reflection at
the first step, which has nothing to reflect on; actions are compared as parsed, not as matched by its expression.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

import judge
import losses
from config import Config
from model import Row
from rollout import Episode, Step


def actor_rows(episodes: Sequence[Episode], config: Config) -> list[Row]:
    """One row per action, with its advantage (also written to the step, for the record). Groups must be whole.

    An episode left alone, the others of its group having been discarded, has nothing to be compared with and gets 0.
    With PPO the advantage is the score until add_critic() has seen the critic's values; in the record it stays that.
    """
    algo, longest = config.algo, config.rollout.max_response_tokens
    steps = [(episode, step) for episode in episodes for step in episode.steps]
    if not steps:
        return []
    trajectory_N = torch.tensor([episode.group * config.rollout.group_size + episode.member for episode, _ in steps])
    group_N = torch.tensor([episode.group for episode, _ in steps])  # [N]
    reward_N = torch.tensor([step.reward for _, step in steps])  # [N]
    strict = algo.invalid == "unavailable"
    invalid_N = torch.tensor([float(not step.valid or (strict and not step.available)) for _, step in steps])  # [N]
    overlong_N = torch.tensor([_overlong(step, longest, config) for _, step in steps])  # [N]
    similarity = algo.similarity if algo.advantage == "gigpo" else None
    anchor_N = losses.anchors([step.observation for _, step in steps], group_N, similarity)  # [N]
    tags = sorted({step.tag for _, step in steps})
    batch = losses.RowBatch(
        score_N=losses.scores(reward_N, trajectory_N, invalid_N, algo.invalid_penalty) - overlong_N,
        group_N=group_N,
        trajectory_N=trajectory_N,
        reward_N=reward_N,
        invalid_N=invalid_N,
        anchor_N=anchor_N,
        tag_N=torch.tensor([tags.index(step.tag) for _, step in steps]),
        tag_reward_N=torch.tensor([reward for episode in episodes for reward in tag_rewards(episode)]),
    )
    members = Counter(episode.group for episode in episodes)
    alone = {group for group, count in members.items() if count == 1 and algo.advantage != "ppo"}
    rows = []
    contrasted_N = anchor_N if algo.nthr_group == "anchor_state" else group_N  # [N]
    columns = (losses.advantages(batch, algo), trajectory_N, contrasted_N)  # [N] each
    for (episode, step), advantage, trajectory, contrasted in zip(steps, *(c.tolist() for c in columns), strict=True):
        step.advantage = 0.0 if episode.group in alone else advantage
        row = _row(step, judge=False)
        row.won, row.trajectory, row.group = episode.won, trajectory, contrasted
        rows.append(row)
    return rows


def tag_rewards(episode: Episode) -> list[float]:
    """What the tag of each reply earned by itself, 0 or 1. Source: RLVMR, its rules and their order.

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


def judge_rows(questions: Sequence[judge.Question], config: Config) -> list[Row]:
    """One row per critique: its group is the judged step, its reward whether the verdict was right."""
    answers = [(number, answer) for number, question in enumerate(questions) for answer in question.answers]
    if not answers:
        return []
    longest = config.judge.max_response_tokens
    reward_N = torch.tensor([answer.reward - _overlong(answer, longest, config) for _, answer in answers])  # [N]
    question_N = torch.tensor([number for number, _ in answers])  # [N]
    advantage_N = losses.judge_advantage(reward_N, question_N, config.algo)  # [N]
    for (_, answer), advantage in zip(answers, advantage_N.tolist(), strict=True):
        answer.advantage = advantage
    return [_row(answer, judge=True) for _, answer in answers]


def _overlong(step: Step, longest: int, config: Config) -> float:
    """What is taken from the score of a reply for its length."""
    algo = config.algo
    if algo.overlong != "penalise":
        return 0.0
    share = losses.overlong_penalty(len(step.response_ids), longest, algo.overlong_cache, step.truncated)
    return algo.overlong_penalty * share


def _row(step: Step, judge: bool) -> Row:
    return Row(
        np.array(step.prompt_ids, dtype=np.int32),
        np.array(step.response_ids, dtype=np.int32),
        np.array(step.logprobs, dtype=np.float32),
        step.advantage,
        judge,
        truncated=step.truncated,
    )


def has_gradient(row: Row, config: Config) -> bool:
    """Whether a row's loss can have one; the others are counted in every denominator and not computed."""
    return row.counted > 0 and (bool(np.any(row.advantage)) or config.algo.kl > 0 or config.algo.entropy != 0)


def needs_score(row: Row, config: Config) -> bool:
    """Whether the models must score a row: it has a gradient, or PPO's critic may give it one, or its tokens may be
    rejected from a denominator."""
    criticised = config.algo.advantage == "ppo" and not row.judge
    return has_gradient(row, config) or criticised or config.algo.importance == "mask"


def weigh(rows: Sequence[Row], config: Config) -> None:
    """Write the factors on each row's loss: cut-off replies and rejected tokens get 0. Needs row.old_logprobs."""
    algo = config.algo
    for row in rows:
        if algo.overlong == "mask" and row.truncated:
            row.weights = np.zeros(len(row.response_ids), dtype=np.float32)
        elif algo.importance != "none" and row.old_logprobs is not None:
            trainer_T, engine_T = (torch.from_numpy(logp) for logp in (row.old_logprobs, row.logprobs))  # [T] each
            row_T = torch.zeros(len(trainer_T), dtype=torch.int64)  # [T]
            bounds = (algo.importance_level, algo.importance_low, algo.importance_high)
            row.weights = losses.importance_weights(trainer_T, engine_T, row_T, algo.importance, *bounds).numpy()


def add_critic(rows: Sequence[Row], config: Config) -> None:
    """PPO: turn the scores of all ranks' actions into whitened advantages of their tokens, and values to train towards.

    Needs row.values. A row is a sequence of its own: its score is the reward of its last token, as published. Rows
    that count nowhere are left as they are.
    """
    algo = config.algo
    if algo.advantage != "ppo":
        return
    acted = [row for row in rows if not row.judge and row.counted]
    lengths = torch.tensor([len(row.response_ids) for row in acted])
    row_T = torch.arange(len(acted)).repeat_interleave(lengths)  # [T]
    reward_T = torch.zeros(len(row_T))  # [T]
    reward_T[lengths.cumsum(0) - 1] = torch.tensor([row.advantage for row in acted])
    value_T = torch.from_numpy(np.concatenate([row.values for row in acted]))  # [T]
    advantage_T, return_T = losses.generalised_advantage(
        reward_T, value_T, algo.token_gamma, algo.token_lambda, row_T
    )  # [T], [T]
    advantage_T = losses.weigh_negatives(losses.whiten(advantage_T), algo)  # [T]
    parts = (part_T.split(lengths.tolist()) for part_T in (advantage_T, return_T))
    for row, advantage, returns in zip(acted, *parts, strict=True):
        row.advantage, row.returns = advantage.numpy(), returns.numpy()


def mini_batches(rows: Sequence[Row], config: Config, iteration: int, world: int) -> list[list[list[Row]]]:
    """[mini-batch][rank] -> rows: every row once, actions and critiques spread evenly, ranks balanced by tokens.

    The same for every rank, and the same mini-batches for every world size.
    """
    rng = random.Random(f"mini-batches {config.seed} {iteration}")
    kinds = [[row for row in rows if row.judge == judged] for judged in (False, True)]
    number = max(1, -(-len(kinds[0]) // config.train.rows_per_update))
    batches: list[list[Row]] = [[] for _ in range(number)]
    for kind in kinds:
        for place, row in enumerate(rng.sample(kind, len(kind))):
            batches[place % number].append(row)
    dealt = []
    for batch in batches:
        shares: list[list[Row]] = [[] for _ in range(world)]
        load = [0] * world
        for row in sorted(batch, key=lambda row: -row.tokens):
            lightest = load.index(min(load))
            shares[lightest].append(row)
            load[lightest] += row.tokens
        dealt.append(shares)
    return dealt

"""What a run shows of the paper's disease while it trains: repeated actions, and how the gradients of its rows couple.

repeats() and repeat_metrics() read episodes alone.  observe() takes a small labelled sample of an iteration's rows
through the model once more, before the update (`train.coupling_every`, `train.coupling_rows`): how much the policy
learns of one row from another (paper, equation 2), and whether the flawed actions among them are about to become
likelier.

Decisions where the paper is silent: influences are those of the output layer, at the training temperature.  Live
labels are the rules' alone, so that a run with GCD can be compared with one without.  An action's probability q in a
state is its share among the group's visits to the same observation, so no reply is sampled for it.  A flawed action is
in the danger zone where the pull of other rows outweighs its own penalty and it lies beyond the unstable root q+, or
there is no such root (docs/paper_notes.md), not where q > 0.5.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import judge
import losses
import prompts
from config import Config
from model import Actor, Row, last_hidden, micro_batches
from ranks import gather, gathered
from rollout import Episode, Step

VOCABULARY_PART = 8192  # tokens whose errors exist at the same time
Repeat = Literal["state_action", "consecutive", "action_any", "admissible"]


# ----------------------------------------------------------------------------------------------------------------------
# Repeated actions


def repeats(episode: Episode, how: Repeat = "state_action") -> list[bool]:
    """Whether each step repeats an earlier one of its episode: the same observation and action (the default, as GiGPO's
    anchor states), the action just taken, any action taken before, or the same list of admissible actions and action.

    "admissible" reads the list from the prompt's last lines; it alone sees the first retry after "Nothing happens.".
    Source: paper, Figures 1 and 2, which do not say what counts as one.
    """
    keys = [_key(step, how) for step in episode.steps]
    if how == "consecutive":
        return [index > 0 and key == keys[index - 1] for index, key in enumerate(keys)]
    seen: set[tuple[str, ...]] = set()
    found = []
    for key in keys:
        found.append(key in seen)
        seen.add(key)
    return found


def _key(step: Step, how: Repeat) -> tuple[str, ...]:
    match how:
        case "state_action":
            return step.observation, step.action
        case "admissible":
            return prompts.offered(step.prompt), step.action
        case _:
            return (step.action,)


def repeat_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Shares of repeated steps, of all episodes, the won and the lost; and how consistently they are repeated.

    The consistency of a repeated step: the share of the other episodes' visits to its observation, in its group, that
    took its action, too. Its mean, and the share of those of 0.5 and more, are over the repeats that have such visits.
    """
    repeated = {id(episode): repeats(episode) for episode in episodes}

    def rate(played: Sequence[Episode]) -> float:
        flags = [flag for episode in played for flag in repeated[id(episode)]]
        return sum(flags) / max(1, len(flags))

    visits: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)  # (group, observation) -> member, action
    for episode in episodes:
        for step in episode.steps:
            visits[episode.group, step.observation].append((episode.member, step.action))
    shares = []
    for episode in episodes:
        for step, repeat in zip(episode.steps, repeated[id(episode)], strict=True):
            others = [a for member, a in visits[episode.group, step.observation] if member != episode.member]
            if repeat and others:
                shares.append(others.count(step.action) / len(others))
    metrics = {
        "rollout/repeats": rate(episodes),
        "rollout/repeats_won": rate([episode for episode in episodes if episode.won]),
        "rollout/repeats_lost": rate([episode for episode in episodes if not episode.won]),
        "rollout/repeats_compared": len(shares),
    }
    if shares:
        metrics["rollout/repeat_consistency"] = float(np.mean(shares))
        metrics["rollout/repeats_consistent"] = float(np.mean([share >= 0.5 for share in shares]))
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Coupling


def observe(
    actor: Actor, episodes: Sequence[Episode], rows: Sequence[Row], config: Config, iteration: int
) -> dict[str, float]:
    """coupling/* of this iteration, before its update; the same on every rank, which all must call it together.

    `rows` are this rank's, of which those of `episodes` come first, as rows.actor_rows() makes them. The means over the
    ranks' samples of: the gap of losses.coupling_gap, as cosine and by the source's tokens; the share of sampled flawed
    actions whose log-prob the other rows' gradients and its own raise together; the share in the danger zone, of those
    whose state was visited twice or more. Without advantages (PPO's come later) the last two are left out.
    """
    if not config.train.coupling_every or iteration % config.train.coupling_every:
        return {}
    part = max(2, config.train.coupling_rows // 3 // dist.get_world_size())
    rng = random.Random(f"coupling {config.seed} {iteration} {dist.get_rank()}")
    labels = [label for episode in episodes for label in judge.label(episode)]
    good, flawed = ([number for number, label in enumerate(labels) if label == cls] for cls in (1, 0))
    half = min(part, len(good), len(flawed))
    sample = rng.sample(good, half) + rng.sample(flawed, half) + rng.sample(range(len(labels)), min(part, len(labels)))
    found: dict[str, float] = {}
    with gathered(actor.model):
        if sample:
            chosen = [rows[number] for number in sample]
            influence_RR = influences(actor, chosen, config)  # [R, R]
            found = _gaps(influence_RR[: 2 * half, : 2 * half], chosen[: 2 * half], half)
            if config.algo.advantage != "ppo":
                advantage_N = np.array([float(np.mean(row.advantage)) for row in rows[: len(labels)]])  # [N]
                found |= dangers(influence_RR.numpy(), sample, half, advantage_N, episodes)
    every = gather([found])
    keys = sorted({key for one in every for key in one})
    values = {key: [one[key] for one in every if key in one and not math.isnan(one[key])] for key in keys}
    return {f"coupling/{key}": float(np.mean(known)) for key, known in values.items() if known}


def _gaps(influence_RR: torch.Tensor, rows: Sequence[Row], half: int) -> dict[str, float]:
    length_R = torch.tensor([len(row.response_ids) for row in rows], dtype=torch.float64)  # [R]
    label_R = torch.arange(len(rows)) < half  # [R]
    return {
        f"gap_{how}": losses.coupling_gap(influence_RR, length_R, label_R, how) if half > 1 else math.nan
        for how in ("cos", "mean_src")
    }


def dangers(
    influence_RR: np.ndarray, sample: Sequence[int], half: int, advantage_N: np.ndarray, episodes: Sequence[Episode]
) -> dict[str, float]:
    """Shares of sampled flawed actions that rise, and that are in the danger zone.

    `sample` are rows' numbers: `half` good ones, `half` flawed ones, then ones drawn from all N rows, whose pull stands
    for that of all: c = N / drawn * sum A_j I_ij over other actions or states. The action's own penalty is I_ii times
    the sum of A over the visits that took it, which the theory calls -r q (1 - q); the zone begins at the larger root
    of c = r q (1 - q), or anywhere without one. Rows of one state and action count as one. Source: Lemma 3.1, Figure 4.
    """
    keys = [(episode.group, step.observation, step.action) for episode in episodes for step in episode.steps]
    taken, visits = Counter(keys), Counter(key[:2] for key in keys)
    own: dict[tuple, float] = defaultdict(float)
    for key, advantage in zip(keys, advantage_N.tolist(), strict=True):
        own[key] += advantage
    drawn = range(2 * half, len(sample))
    rising, beyond = [], []
    for row in range(half, 2 * half):
        key = keys[sample[row]]
        others = [column for column in drawn if keys[sample[column]] != key]
        pull = sum(advantage_N[sample[column]] * influence_RR[row, column] for column in others)
        push, penalty = len(keys) / len(drawn) * pull, influence_RR[row, row] * own[key]
        rising.append(push + penalty > 0)
        if visits[key[:2]] > 1:
            q = taken[key] / visits[key[:2]]
            no_root = q < 1 and 4 * push > max(0.0, -penalty) / (q * (1 - q))
            beyond.append(bool(rising[-1] and (q >= 0.5 or no_root)))
    return {
        "flawed_rising": float(np.mean(rising)) if rising else math.nan,
        "flawed_in_danger": float(np.mean(beyond)) if beyond else math.nan,
        "flawed_placed": float(len(beyond)),
    }


@torch.no_grad()
def influences(actor: Actor, rows: Sequence[Row], config: Config) -> torch.Tensor:
    """losses.couplings of all rows, in their order: float64 [R, R], on the CPU. Sharded weights must be gathered."""
    batches = micro_batches(rows, config.train.tokens_per_micro_batch, actor.packed)
    parts = [last_hidden(actor, [rows[index] for index in batch]) for batch in batches]
    hidden_TH, target_T = (torch.cat(one) for one in zip(*parts, strict=True))  # [T, H], [T]
    order = torch.tensor([index for batch in batches for index in batch])
    row_T = order.repeat_interleave(torch.tensor([len(rows[index].response_ids) for index in order]))  # [T]
    errors = error_parts(actor, hidden_TH, target_T, config.rollout.temperature)
    return losses.couplings(hidden_TH.float(), errors, row_T.to(actor.device)).double().cpu()  # [R, R]


@torch.no_grad()
def error_parts(
    actor: Actor, hidden_TH: torch.Tensor, target_T: torch.Tensor, temperature: float
) -> Iterator[torch.Tensor]:
    """One-hot of each token minus the policy's probabilities, over the whole vocabulary, in parts [T, some tokens]."""
    parts = actor.inner.get_output_embeddings().weight.split(VOCABULARY_PART)

    def logits(weight_CH: torch.Tensor) -> torch.Tensor:
        with actor.autocast():
            return torch.nn.functional.linear(hidden_TH, weight_CH).float() / temperature  # [T, C]

    total_T = torch.stack([logits(weight_CH).logsumexp(-1) for weight_CH in parts]).logsumexp(0)  # [T]
    first = 0
    for weight_CH in parts:
        own_TC = target_T[:, None] == torch.arange(first, first + len(weight_CH), device=target_T.device)  # [T, C]
        yield own_TC.float() - (logits(weight_CH) - total_T[:, None]).exp()
        first += len(weight_CH)

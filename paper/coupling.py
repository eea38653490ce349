"""How the gradients of an iteration's samples are coupled, measured while a run trains (paper, equation 2).

observe() takes a small labelled choice of an iteration's samples through the model once more, before the update
(`train.coupling_every`, `train.coupling_samples`): how much the policy learns of one from another, and whether the
flawed actions among them are about to become likelier.

Decisions where the paper is silent: influences are those of the output layer, at the training temperature.  Live
labels are the rules' alone, so that a run with GCD can be compared with one without.  An action's probability q in a
state is its share among the group's visits to the same observation, so no reply is sampled for it.  A flawed action is
in the danger zone where the pull of other samples outweighs its own penalty and it lies beyond the unstable root q+, or
there is no such root (paper_notes.md), not where q > 0.5.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import judge
from config import Config
from distributed import all_gather_objects, unsharded
from model import LanguageModel, head_rows, last_hidden, logit_gradients
from packing import Sample, micro_batches
from rollout import Episode

COUPLED_TOKENS = 4096  # of which the coupling with all others is computed at a time
VOCABULARY_PART = 8192  # tokens by whose logits gradients exist at the same time


def coupling(hidden_TH: Tensor, logit_grad_TV: Tensor, hidden_SH: Tensor, logit_grad_SV: Tensor) -> float:
    """Compute how much one unit step of gradient ascent on one response's log-prob (T tokens) raises another's (S), in
    nats, if only the output layer learns: sum over token pairs of <grad_k, grad_k'> <hidden_k, hidden_k'>.

    hidden: what the output layer is given at each response token; logit_grad: one-hot of the token minus the policy's
    probabilities. Symmetric; of a response with itself never negative. Raises RuntimeError where H or V differ.
    Source: paper, equation 2, with the other sample's own prompt (Deng et al. 2025). With H = 1, hidden 2 and 3,
    gradients (.5, -.5) and (.2, -.2): .2 * 6 = 1.2.
    """
    return float(((logit_grad_TV @ logit_grad_SV.T) * (hidden_TH @ hidden_SH.T)).sum())


def couplings(hidden_TH: Tensor, logit_grads: Iterable[Tensor], sample_T: Tensor) -> Tensor:
    """Compute `coupling` of every sample with every sample, [R, R], in the order of their ids sample_T.

    `logit_grads` are parts of logit_grad_TV, [T, some of V], which need not exist at once.
    """
    tokens = len(sample_T)
    alike_TT = hidden_TH.new_zeros(tokens, tokens)  # the one large matrix
    for logit_grad_TC in logit_grads:
        alike_TT.addmm_(logit_grad_TC, logit_grad_TC.T)
    _, index_T = torch.unique(sample_T, return_inverse=True)
    samples = int(index_T.max()) + 1
    half_RT = alike_TT.new_zeros(samples, tokens)
    parts = (one.split(COUPLED_TOKENS) for one in (alike_TT, hidden_TH, index_T))
    for alike_PT, hidden_PH, index_P in zip(*parts, strict=True):
        half_RT.index_add_(0, index_P, alike_PT * (hidden_PH @ hidden_TH.T))
    return alike_TT.new_zeros(samples, samples).index_add(1, index_T, half_RT)  # [R, R]


def coupling_gap(
    influence_RR: Tensor,
    length_R: Tensor,
    label_R: Tensor,
    how: Literal["cos", "mean_src", "mean_both", "sum"] = "cos",
    weight_RR: Tensor | None = None,
) -> float:
    """Compute mean influence between different samples of the same label minus that between different labels; nan where
    there are no such pairs.

    influence_RR: `couplings`, the sample that is learned from first. "mean_src" divides by that one's tokens length_R
    (the paper's text), "mean_both" by both ones', "cos" by the square roots of both ones' own influence: it alone does
    not grow with the hidden states' norm. weight_RR counts pairs more than once, or not. Source: paper, Figure 8.
    """
    own_R = influence_RR.diagonal().clamp(min=1e-30).sqrt()
    scale = {
        "cos": own_R[:, None] * own_R,  # [R, R]
        "mean_src": length_R[:, None],
        "mean_both": length_R[:, None] * length_R,  # [R, R]
        "sum": 1,
    }
    value_RR, same_RR = influence_RR / scale[how], label_R[:, None] == label_R  # [R, R] each
    weight_RR = torch.ones_like(value_RR) if weight_RR is None else weight_RR.clone()  # [R, R]
    weight_RR.fill_diagonal_(0)
    same, other = (
        (value_RR * part_RR).sum() / part_RR.sum() for part_RR in (weight_RR * same_RR, weight_RR * ~same_RR)
    )
    return float(same - other)


# ----------------------------------------------------------------------------------------------------------------------
# While a run trains


def observe(
    policy: LanguageModel, episodes: Sequence[Episode], samples: Sequence[Sample], config: Config, iteration: int
) -> dict[str, float]:
    """Measure coupling/* of this iteration, before its update; the same on every rank, which all must call it together.

    `samples` are this rank's, of which those of `episodes` come first, as action_samples() makes them. Means over the
    ranks of: coupling_gap, as cosine and by the source's tokens; the share of the flawed actions looked at
    whose log-prob the other samples' gradients and its own raise together; the share in the danger zone, of those whose
    state was visited twice or more. Without advantages (PPO's come later) the last two are left out.
    """
    part = max(2, config.train.coupling_samples // 3 // dist.get_world_size())
    rng = random.Random(f"coupling {config.seed} {iteration} {dist.get_rank()}")
    labels = [label for episode in episodes for label in judge.rule_labels(episode)]
    good, flawed = ([number for number, label in enumerate(labels) if label == cls] for cls in (1, 0))
    half = min(part, len(good), len(flawed))
    drawn = rng.sample(good, half) + rng.sample(flawed, half) + rng.sample(range(len(labels)), min(part, len(labels)))
    found: dict[str, float] = {}
    with unsharded(policy.fsdp_root):
        if drawn:
            chosen = [samples[number] for number in drawn]
            influence_RR = influences(policy, chosen, config)
            found = _gaps(influence_RR[: 2 * half, : 2 * half], chosen[: 2 * half], half)
            if config.algo.advantage != "ppo":
                advantage_N = np.array([float(np.mean(one.advantage)) for one in samples[: len(labels)]])
                found |= dangers(influence_RR.numpy(), drawn, half, advantage_N, episodes)
    every = all_gather_objects([found])
    keys = sorted({key for one in every for key in one})
    values = {key: [one[key] for one in every if key in one and not math.isnan(one[key])] for key in keys}
    return {f"coupling/{key}": float(np.mean(known)) for key, known in values.items() if known}


def _gaps(influence_RR: torch.Tensor, samples: Sequence[Sample], half: int) -> dict[str, float]:
    length_R = torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.float64)
    label_R = torch.arange(len(samples)) < half
    return {
        f"gap_{how}": coupling_gap(influence_RR, length_R, label_R, how) if half > 1 else math.nan
        for how in ("cos", "mean_src")
    }


def dangers(
    influence_RR: np.ndarray, chosen: Sequence[int], half: int, advantage_N: np.ndarray, episodes: Sequence[Episode]
) -> dict[str, float]:
    """Measure the shares of chosen flawed actions that rise, and that are in the danger zone.

    `chosen` are numbers of actions: `half` good ones, `half` flawed ones, then ones drawn from all N, whose pull stands
    for that of all: c = N / drawn * sum A_j I_ij over other actions or states. The action's own penalty is I_ii times
    the sum of A over the visits that took it, which the theory calls -r q (1 - q); the zone begins at the larger root
    of c = r q (1 - q), or anywhere without one. Samples of one state and action count as one. Source: Lemma 3.1,
    Figure 4.
    """
    keys = [(episode.group, step.observation, step.action) for episode in episodes for step in episode.steps]
    taken, visits = Counter(keys), Counter(key[:2] for key in keys)
    own: dict[tuple, float] = defaultdict(float)
    for key, advantage in zip(keys, advantage_N.tolist(), strict=True):
        own[key] += advantage
    drawn = range(2 * half, len(chosen))
    rising, beyond = [], []
    for flawed in range(half, 2 * half):
        key = keys[chosen[flawed]]
        others = [other for other in drawn if keys[chosen[other]] != key]
        pull = sum(advantage_N[chosen[other]] * influence_RR[flawed, other] for other in others)
        push, penalty = len(keys) / len(drawn) * pull, influence_RR[flawed, flawed] * own[key]
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
def influences(policy: LanguageModel, samples: Sequence[Sample], config: Config) -> torch.Tensor:
    """Compute couplings of all samples, in their order: float64 [R, R], on the CPU. Weights must not be sharded."""
    batches = micro_batches(samples, config.train.tokens_per_micro_batch, policy.packing)
    parts = [last_hidden(policy, batch) for batch in batches]
    hidden_TH, target_T = (torch.cat(one) for one in zip(*parts, strict=True))
    order = torch.tensor([index for batch in batches for index in batch.indices])
    sample_T = order.repeat_interleave(torch.tensor([len(samples[index].response_ids) for index in order]))
    logit_grads = all_logit_gradients(policy, hidden_TH, target_T, config.rollout.temperature)
    return couplings(hidden_TH.float(), logit_grads, sample_T.to(policy.device)).double().cpu()


@torch.no_grad()
def all_logit_gradients(
    policy: LanguageModel, hidden_TH: torch.Tensor, target_T: torch.Tensor, temperature: float
) -> Iterator[torch.Tensor]:
    """Give model.logit_gradients over the whole vocabulary, in parts [T, some tokens]."""
    vocabulary = len(policy.inner.get_output_embeddings().weight)
    parts = torch.arange(vocabulary, device=target_T.device).split(VOCABULARY_PART)

    def logits(token_C: torch.Tensor) -> torch.Tensor:
        with policy.autocast():
            return torch.nn.functional.linear(hidden_TH, head_rows(policy, token_C)).float() / temperature

    # the denominator of the softmax first, over all parts
    total_T = torch.stack([logits(token_C).logsumexp(-1) for token_C in parts]).logsumexp(0)
    for token_C in parts:
        yield logit_gradients(policy, hidden_TH, target_T, temperature, token_C, log_partition_T=total_T)

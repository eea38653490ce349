"""Advantages, policy losses, KL and aggregation: pure functions of tensors that know no model, file or process group.

A sample is one environment step or one critique. Suffixes name the axes: `_N` samples, `_T` packed tokens, `_G` groups,
`_M` trajectories, `_V` vocabulary, `_H` hidden. A new algorithm is a new function in ADVANTAGES or POLICY_LOSSES.

Departures from the published code (verl-agent, RLVMR, verl): statistics are taken in float64, and equal values give
exactly 0 (in float32 the std of eight scores of 9.9 is a rounding error, divided by which they become up to +-0.48); a
std of 0 is never divided by; `aggregate` divides by counts of the whole optimizer step, not by those of a micro-batch.
Statistics are computed on the CPU (they are of some thousand numbers): the same to the bit wherever the samples live.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from config import AlgoConfig

MAX_LOG_RATIO = 20.0  # exponents are clamped to +-this: no inf in a loss, hence no 0 * inf = nan in its gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleBatch:
    """The samples of whole groups: tensors [N]; trajectories may interleave, each one's samples are in time order.

    Ids are any integers. Raises ValueError where lengths differ (it names the fields), where ids are not integers, and
    where a trajectory spans two groups.
    """

    score_N: Tensor  # episode return minus the sample's own invalid penalty: `scores`
    group_N: Tensor  # id of the group: the episodes that play one task
    trajectory_N: Tensor  # id of the episode
    reward_N: Tensor  # the environment's reward at this step
    invalid_N: Tensor  # 1 where the reply was invalid (cfg.invalid), else 0
    anchor_N: Tensor | None = None  # id of (group, observation text), for GiGPO
    tag_N: Tensor | None = None  # id of the reply's reasoning tag
    tag_reward_N: Tensor | None = None  # what that tag earned by itself

    def __post_init__(self) -> None:
        check_lengths(**vars(self))
        for name in ("group_N", "trajectory_N", "anchor_N", "tag_N"):
            id_N = getattr(self, name)
            if id_N is not None and id_N.is_floating_point():
                raise ValueError(f"{name} is {id_N.dtype}; ids are integers")
        if len(compact_ids(self.trajectory_N, self.group_N)[1]) > len(compact_ids(self.trajectory_N)[1]):
            raise ValueError("a trajectory spans two groups: its samples share trajectory_N but not group_N")


def scores(reward_N: Tensor, trajectory_N: Tensor, invalid_N: Tensor, penalty: float) -> Tensor:
    """Add up the undiscounted return of each sample's episode, minus `penalty` where its own reply was invalid.

    All [N]; returns float32 [N] in units of reward. Raises ValueError where lengths differ. Source: GiGPO's code.

    >>> scores(torch.tensor([0.0, 10.0, 0.0]), torch.tensor([4, 4, 9]), torch.tensor([1, 0, 0]), penalty=0.1)
    tensor([ 9.9000, 10.0000,  0.0000])
    """
    check_lengths(reward_N=reward_N, trajectory_N=trajectory_N, invalid_N=invalid_N)
    index_N, length_M = compact_ids(trajectory_N)  # [N], [M]
    return_M = torch.zeros(len(length_M)).double().index_add(0, index_N, reward_N.cpu().double())
    return (return_M[index_N] - penalty * invalid_N.cpu().double()).to(reward_N.device, torch.float32)


def discounted_returns(reward_N: Tensor, trajectory_N: Tensor, gamma: float) -> Tensor:
    """Compute G_t = r_t + gamma G_(t+1) within each trajectory, whose samples are in time order.

    All [N]; returns float32 [N] in units of reward. Raises ValueError where lengths differ. Source: GiGPO's R_t.

    >>> discounted_returns(torch.tensor([0.0, 5.0, 0.0, 10.0]), torch.tensor([1, 7, 1, 1]), gamma=0.5)
    tensor([ 2.5000,  5.0000,  5.0000, 10.0000])
    """
    check_lengths(reward_N=reward_N, trajectory_N=trajectory_N)
    index_N, _ = compact_ids(trajectory_N)
    return discounted_sums(reward_N.cpu().double(), index_N, gamma).to(reward_N.device, torch.float32)


def discounted_sums(value_N: Tensor, index_N: Tensor, gamma: float) -> Tensor:
    """Add to each value gamma times the sum of the next with the same index (from 0): float64 [N], on the CPU."""
    length_M = torch.bincount(index_N)
    order_N = torch.argsort(index_N, stable=True)  # trajectories side by side, each still in time order
    # where, in that order, the sample's trajectory begins; then its time within it
    start_N = (length_M.cumsum(0) - length_M)[index_N[order_N]]
    step_N = torch.empty_like(index_N)
    step_N[order_N] = torch.arange(len(order_N)) - start_N
    steps = max(length_M.tolist(), default=0)
    sum_SM = torch.zeros(steps + 1, len(length_M)).double()  # [steps + 1, M] the last row stays 0
    sum_SM[step_N, index_N] = value_N
    for step in reversed(range(steps)):
        sum_SM[step] += gamma * sum_SM[step + 1]
    return sum_SM[step_N, index_N]


def group_normalise(
    value_N: Tensor,
    key_N: Tensor,
    divide_by_std: bool = True,
    singleton: Literal["raw", "zero"] = "raw",
    eps: float = 1e-6,
    trajectory_N: Tensor | None = None,
) -> Tensor:
    """Compute (value - mean) / (std + eps) among samples of equal key, std with ddof 1; or value - mean alone.

    Tensors [N], keys and trajectories any integers; returns float32 [N] on value_N's device. Raises ValueError where
    lengths differ. Source: GRPO (DeepSeekMath), with verl-agent's conventions:
    - A key of one sample: "raw" takes mean 0, std 1 (published for episodes); "zero" gives 0 (for GiGPO's anchors).
    - With trajectory_N the statistics are over one sample per key and trajectory, the first; all are normalised by them
      (compute_mean_std_cross_steps=False).
    - Ours: where the samples of the statistics are all equal, they get exactly 0 (mean their value, std 1). A later one
      may differ from them, with trajectory_N, by its own penalty; it keeps that difference, undivided.

    >>> group_normalise(torch.tensor([10.0, 0.0, 0.0, 7.0]), torch.tensor([3, 3, 3, 8]), singleton="zero")
    tensor([ 1.1547, -0.5774, -0.5774,  0.0000])
    """
    check_lengths(value_N=value_N, key_N=key_N, trajectory_N=trajectory_N)
    exact_N, (group_N, size_G) = value_N.cpu().double(), compact_ids(key_N)  # [N], [G]
    counted_K = torch.arange(len(exact_N))  # [K] the samples of the statistics: all, or one per key and trajectory
    if trajectory_N is not None:
        pair_N, size_K = compact_ids(key_N, trajectory_N)  # [N], [K]
        counted_K = torch.zeros_like(size_K).scatter_reduce(0, pair_N, counted_K, "amin", include_self=False)
    stat_K, group_K = exact_N[counted_K], group_N[counted_K]
    count_G, zero_G = torch.bincount(group_K, minlength=len(size_G)), torch.zeros(len(size_G)).double()
    low_G = zero_G.scatter_reduce(0, group_K, stat_K, "amin", include_self=False)
    mean_G = low_G + zero_G.index_add(0, group_K, stat_K - low_G[group_K]) / count_G  # [G] exact if all are equal
    square_G = zero_G.index_add(0, group_K, (stat_K - mean_G[group_K]) ** 2)
    std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
    std_G = torch.where(std_G == 0, 1.0, std_G)
    if singleton == "raw":
        mean_G = torch.where(count_G == 1, 0.0, mean_G)
    centred_N = exact_N - mean_G[group_N]
    return (centred_N / (std_G[group_N] + eps) if divide_by_std else centred_N).to(value_N.device, torch.float32)


def grpo(batch: SampleBatch, cfg: AlgoConfig) -> Tensor:
    """Normalise the score within the group, float32 [N]; all tokens of a sample share it.

    cfg.stats_over "steps" counts every sample, so that long episodes weigh more (as published); "trajectories" counts
    the first of each episode. A single one keeps its score, as published. Source: GRPO (DeepSeekMath), as in
    verl-agent; Dr. GRPO without cfg.divide_by_std.
    """
    trajectory_N = batch.trajectory_N if cfg.stats_over == "trajectories" else None
    return group_normalise(batch.score_N, batch.group_N, cfg.divide_by_std, trajectory_N=trajectory_N)


def gigpo(batch: SampleBatch, cfg: AlgoConfig) -> Tensor:
    """Add to `grpo` cfg.step_weight times a step advantage, float32 [N].

    The step advantage normalises the discounted return, minus the sample's own cfg.invalid_penalty, among all samples
    of the group with the same observation, be it twice in one episode; a single one gets 0. cfg.stats_over is the
    episode part's alone. Raises ValueError without batch.anchor_N. Source: GiGPO, equation 8.
    """
    if batch.anchor_N is None:
        raise ValueError("gigpo needs batch.anchor_N, the id of each sample's (group, observation text)")
    return_N = discounted_returns(batch.reward_N, batch.trajectory_N, cfg.gamma) - cfg.invalid_penalty * batch.invalid_N
    state_N, _ = compact_ids(batch.group_N, batch.anchor_N)  # apart in each group even if anchor ids are not
    return grpo(batch, cfg) + cfg.step_weight * group_normalise(return_N, state_N, cfg.divide_by_std, "zero")


def anchors(observations: Sequence[str], group_N: Tensor) -> Tensor:
    """Number the anchor states, int64 [N]: samples of one group share one where their observations are equal.

    Raises ValueError where lengths differ. Source: GiGPO.

    >>> anchors(["a hall", "a hall", "a hall.", "a hall"], torch.tensor([0, 0, 0, 1]))
    tensor([0, 0, 1, 2])
    """
    if len(observations) != len(group_N):
        raise ValueError(f"{len(observations)} observations, but group_N is {list(group_N.shape)}")
    ids: dict[tuple[int, str], int] = {}
    keys = zip(group_N.tolist(), observations, strict=True)
    return torch.tensor([ids.setdefault(key, len(ids)) for key in keys], dtype=torch.int64)


def rlvmr(batch: SampleBatch, cfg: AlgoConfig) -> Tensor:
    """Add to `grpo` cfg.step_weight times a tag advantage, float32 [N].

    The tag advantage normalises batch.tag_reward_N among the samples of the group with the same batch.tag_N; a single
    one keeps its reward, as published. cfg.stats_over is the episode part's alone. Raises ValueError without both
    fields. Source: RLVMR (Zhang et al. 2025); what a tag earns is samples.tag_rewards.
    """
    if batch.tag_N is None or batch.tag_reward_N is None:
        raise ValueError("rlvmr needs batch.tag_N, the id of each reply's tag, and batch.tag_reward_N, what it earned")
    kind_N, _ = compact_ids(batch.group_N, batch.tag_N)
    return grpo(batch, cfg) + cfg.step_weight * group_normalise(batch.tag_reward_N, kind_N, cfg.divide_by_std)


def ppo(batch: SampleBatch, cfg: AlgoConfig) -> Tensor:
    """Return the score itself, float32 [N]: the reward of the sample's last token, from which `generalised_advantage`
    takes the critic's values token by token. Source: PPO as in verl-agent, where a sample is an episode of tokens."""
    return batch.score_N.float()


ADVANTAGES = {"grpo": grpo, "gigpo": gigpo, "rlvmr": rlvmr, "ppo": ppo}


def advantages(batch: SampleBatch, cfg: AlgoConfig) -> Tensor:
    """Compute what the policy trains on, float32 [N], by ADVANTAGES[cfg.advantage]; with PPO what it is made of."""
    return ADVANTAGES[cfg.advantage](batch, cfg)


def judge_advantage(reward_N: Tensor, question_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """Compute what the judge trains on, float32 [N]: the reward of each critique (1: right verdict, else 0) normalised
    among those of its question. Raises ValueError where lengths differ. Source: L_GCD, equation 3."""
    return group_normalise(reward_N, question_N, cfg.divide_by_std)


def importance_weights(
    trainer_logp_T: Tensor,
    engine_logp_T: Tensor,
    how: Literal["none", "truncate", "mask"],
    low: float = 0.5,
    high: float = 2.0,
) -> Tensor:
    """Correct for an engine that samples from another distribution than the trainer computes: float32 [T].

    ratio = exp(trainer_logp - engine_logp) of each token, log-probs in nats. "none": 1; "truncate": min(ratio, high);
    "mask": the ratio within [low, high], else 0: such tokens are rejected, they count in no denominator. No gradient.
    Raises ValueError where lengths differ. Source: truncated importance sampling (Yao et al. 2025), masks (IcePop,
    verl). With gaps (0, ln 3): truncate at 2 gives (1, 2), mask (1, 0).
    """
    check_lengths(trainer_logp_T=trainer_logp_T, engine_logp_T=engine_logp_T)
    gap_T = (trainer_logp_T - engine_logp_T).detach().float()
    ratio_T = gap_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "none": torch.ones_like(ratio_T),
        "truncate": ratio_T.clamp(max=high),
        "mask": torch.where((ratio_T >= low) & (ratio_T <= high), ratio_T, 0.0),
    }[how]


def ppo_clip(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, sample_T: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logp - old_logp); dual_clip |A| bounds A < 0.

    All [T], log-probs in nats; sample_T is for sequence-level losses, unused here. Returns (loss_T, detached means over
    these tokens): `ratio`; `clip_fraction`, the tokens at a bound, hence without gradient; `approx_kl`, k3 of
    KL(old || new). Raises ValueError where lengths differ. Source: PPO, equation 7; dual clip: Ye et al. 2020.
    With A = 1, r = 1.5, clips of 0.2: max(-1.5, -1.2) = -1.2, no gradient. With A = -1: max(1.5, 1.2) = 1.5, gradient.
    """
    check_lengths(logp_T=logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, sample_T=sample_T)
    log_ratio_T = (logp_T - old_logp_T.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = log_ratio_T.exp()
    plain_T = -advantage_T * ratio_T
    loss_T = torch.maximum(plain_T, -advantage_T * ratio_T.clamp(1 - cfg.clip_low, 1 + cfg.clip_high))
    if cfg.dual_clip is not None:
        loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -cfg.dual_clip * advantage_T), loss_T)
    clipped, approx_kl = (loss_T != plain_T).float().mean(), (ratio_T - 1 - log_ratio_T).detach().mean()
    return loss_T, {"ratio": ratio_T.detach().mean(), "clip_fraction": clipped, "approx_kl": approx_kl}


def gspo(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, sample_T: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `ppo_clip` with one ratio per sample, exp of its mean log-ratio, for all of its tokens.

    The gradient is each token's own; with cfg.aggregate "sequence" a sample's loss is GSPO's. Its clips are some
    hundred times narrower.

    Arguments, results and errors as ppo_clip's. Source: GSPO (Zheng et al. 2025), its token variant, which allows
    advantages by token and is the same where a sample has one. With log-ratios (0, ln 4) in a sample of A = 1 and wide
    clips: ratio 2, loss (-2, -2).
    """
    check_lengths(logp_T=logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, sample_T=sample_T)
    mean_T = sample_means((logp_T - old_logp_T).detach(), sample_T)
    return ppo_clip(mean_T + logp_T - logp_T.detach(), torch.zeros_like(mean_T), advantage_T, sample_T, cfg)


def cispo(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, sample_T: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute -A w logp, w = clip(r, 1 - clip_low, 1 + clip_high) a constant: clipped tokens keep their gradient, A w.

    Arguments, results and errors as ppo_clip's; published with clip_low = 1, no lower bound; dual_clip is not used.
    Source: CISPO (MiniMax-M1 2025), equation 4. With A = 1, r = 1.5, logp = -1 and clips of 0.2: loss 1.2.
    """
    check_lengths(logp_T=logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, sample_T=sample_T)
    log_ratio_T = (logp_T - old_logp_T).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = log_ratio_T.exp()
    weight_T = ratio_T.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    clipped, approx_kl = (weight_T != ratio_T).float().mean(), (ratio_T - 1 - log_ratio_T).mean()
    metrics = {"ratio": ratio_T.mean(), "clip_fraction": clipped, "approx_kl": approx_kl}
    return -advantage_T * weight_T * logp_T, metrics


POLICY_LOSSES = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo}


def kl(logp_T: Tensor, ref_logp_T: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate KL(policy || reference), [T], in nats, from tokens of the policy: with d = ref_logp - logp, k1 = -d,
    k2 = d^2 / 2, k3 = exp(d) - d - 1 clamped to [-10, 10], hence without gradient where d > 2.61 or d < -11.

    With d = -1: 1, 0.5 and exp(-1) = 0.3679. Raises ValueError where lengths differ and for an unknown estimator.
    Source: Schulman, "Approximating KL Divergence", 2020; the clamp: verl's low_var_kl.
    """
    check_lengths(logp_T=logp_T, ref_logp_T=ref_logp_T)
    d_T = ref_logp_T - logp_T
    if estimator == "k1":
        return -d_T
    if estimator == "k2":
        return d_T**2 / 2
    if estimator == "k3":
        return (d_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - d_T - 1).clamp(-10, 10)
    raise ValueError(f"estimator={estimator!r} is not one of k1, k2, k3")


def aggregate(
    loss_T: Tensor,
    sample_T: Tensor,
    how: Literal["token", "sequence", "dr"],
    tokens: int,
    samples: int,
    length: int,
) -> Tensor:
    """Compute what these tokens contribute to the loss of an optimizer step, a scalar. The contributions of all
    micro-batches and ranks add up to it, however samples are dealt out: gradients are summed over ranks, not averaged.

    loss_T, sample_T: [T], ids any integers; a sample is never split over calls. tokens, samples: response tokens and
    samples of the whole optimizer step over all ranks; length: a constant, the longest reply allowed. "token": sum /
    tokens (DAPO). "sequence": sum over samples of the sample's mean, / samples (GRPO). "dr": sum / (samples * length)
    (Dr. GRPO). Raises ValueError where lengths differ, and for a denominator that is not positive.

    >>> aggregate(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([5, 5, 2]), "sequence", 3, samples=2, length=9)  # (2+8)/2
    tensor(5.)
    """
    check_lengths(loss_T=loss_T, sample_T=sample_T)
    denominator = {"token": tokens, "sequence": samples, "dr": samples * length}[how]
    if denominator <= 0:
        raise ValueError(f"aggregate {how!r} divides by {denominator}")
    if how == "sequence":
        _, index_T, length_B = torch.unique(sample_T, return_inverse=True, return_counts=True)  # [T], [samples here]
        loss_T = loss_T / length_B[index_T]
    return loss_T.sum() / denominator


def sample_means(value_T: Tensor, sample_T: Tensor) -> Tensor:
    """Average over the sample of each token, [T]; differentiable."""
    _, index_T, length_B = torch.unique(sample_T, return_inverse=True, return_counts=True)  # [T], [samples]
    sum_B = torch.zeros(len(length_B), dtype=value_T.dtype, device=value_T.device).index_add(0, index_T, value_T)
    return (sum_B / length_B)[index_T]


def check_lengths(**tensors: Tensor | None) -> None:
    """Check that tensors are as long as each other. Raises ValueError that names those that are not."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    expected = [statistics.mode(shape[0] if shape else 0 for shape in shapes.values())]
    wrong = [f"{name} is {shape}" for name, shape in shapes.items() if shape != expected]
    if wrong:
        raise ValueError(f"lengths differ: {', '.join(wrong)}; expected {expected}")


def compact_ids(*id_N: Tensor) -> tuple[Tensor, Tensor]:
    """Number tuples of ids from 0, and count each, on the CPU: (7, 9, 7) gives ([0, 1, 0], [2, 1])."""
    ids = torch.stack([each_N.cpu().long() for each_N in id_N])  # [ids of a tuple, N]
    return torch.unique(ids, dim=1, return_inverse=True, return_counts=True)[1:]  # [N], [distinct]

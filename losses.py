"""Advantages, policy losses, KL and aggregation: pure functions of tensors that know no model, file or process group.

A row is one environment step or one critique. Suffixes name the axes: `_N` rows, `_T` packed tokens, `_G` groups, `_M`
trajectories, `_V` vocabulary, `_H` hidden. A new algorithm is a new function in ADVANTAGES or POLICY_LOSSES. Departures
from the published code (verl-agent, RLVMR, verl): statistics are taken in float64, and equal values give exactly 0 (in
float32 the std of eight scores of 9.9 is a rounding error, divided by which they become up to +-0.48); a std of 0 is
never divided by; `aggregate` divides by counts of the whole optimizer step, not by those of a micro-batch. Statistics
are computed on the CPU (they are of some thousand numbers), so they are the same to the bit wherever the rows live.
"""

import difflib
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from config import AlgoConfig

COUPLED_TOKENS = 4096  # of which the coupling with all others is computed at a time
MAX_LOG_RATIO = 20.0  # exponents are clamped to +-this: no inf in a loss, hence no 0 * inf = nan in its gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBatch:
    """The rows of whole groups: tensors [N]; trajectories may interleave, but each one's rows are in time order.

    Ids are any integers. Raises ValueError where lengths differ (it names the fields), where ids are not integers, and
    where a trajectory spans two groups.
    """

    score_N: Tensor  # episode return minus the row's own invalid penalty: `scores`
    group_N: Tensor  # id of the group: the episodes that play one task
    trajectory_N: Tensor  # id of the episode
    reward_N: Tensor  # the environment's reward at this step
    invalid_N: Tensor  # 1 where the reply was invalid (cfg.invalid), else 0
    anchor_N: Tensor | None = None  # id of (group, observation text), for GiGPO
    tag_N: Tensor | None = None  # id of the reply's reasoning tag
    tag_reward_N: Tensor | None = None  # what that tag earned by itself

    def __post_init__(self) -> None:
        _same_length(**vars(self))
        for name in ("group_N", "trajectory_N", "anchor_N", "tag_N"):
            id_N = getattr(self, name)  # [N]
            if id_N is not None and id_N.is_floating_point():
                raise ValueError(f"{name} is {id_N.dtype}; ids are integers")
        if len(_compact(self.trajectory_N, self.group_N)[1]) > len(_compact(self.trajectory_N)[1]):
            raise ValueError("a trajectory spans two groups: its rows share trajectory_N but not group_N")


def scores(reward_N: Tensor, trajectory_N: Tensor, invalid_N: Tensor, penalty: float) -> Tensor:
    """Undiscounted return of each row's episode, minus `penalty` where the row's own reply was invalid.

    All [N]; returns float32 [N] in units of reward. Raises ValueError where lengths differ. Source: GiGPO's code.

    >>> scores(torch.tensor([0.0, 10.0, 0.0]), torch.tensor([4, 4, 9]), torch.tensor([1, 0, 0]), penalty=0.1)
    tensor([ 9.9000, 10.0000,  0.0000])
    """
    _same_length(reward_N=reward_N, trajectory_N=trajectory_N, invalid_N=invalid_N)
    index_N, length_M = _compact(trajectory_N)  # [N], [M]
    return_M = torch.zeros(len(length_M)).double().index_add(0, index_N, reward_N.cpu().double())  # [M]
    return (return_M[index_N] - penalty * invalid_N.cpu().double()).to(reward_N.device, torch.float32)  # [N]


def discounted_returns(reward_N: Tensor, trajectory_N: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_(t+1) within each trajectory, whose rows are in time order.

    All [N]; returns float32 [N] in units of reward. Raises ValueError where lengths differ. Source: GiGPO's R_t.

    >>> discounted_returns(torch.tensor([0.0, 5.0, 0.0, 10.0]), torch.tensor([1, 7, 1, 1]), gamma=0.5)
    tensor([ 2.5000,  5.0000,  5.0000, 10.0000])
    """
    _same_length(reward_N=reward_N, trajectory_N=trajectory_N)
    index_N, _ = _compact(trajectory_N)  # [N]
    return _discounted_sums(reward_N.cpu().double(), index_N, gamma).to(reward_N.device, torch.float32)  # [N]


def _discounted_sums(value_N: Tensor, index_N: Tensor, gamma: float) -> Tensor:
    """value + gamma times the sum of the next with the same index (from 0), in order: float64 [N], on the CPU."""
    length_M = torch.bincount(index_N)  # [M]
    order_N = torch.argsort(index_N, stable=True)  # [N] trajectories side by side, each still in time order
    start_N = (length_M.cumsum(0) - length_M)[index_N[order_N]]  # [N] where, in that order, the row's trajectory begins
    step_N = torch.empty_like(index_N)  # [N] time within the trajectory
    step_N[order_N] = torch.arange(len(order_N)) - start_N  # [N]
    steps = max(length_M.tolist(), default=0)
    sum_SM = torch.zeros(steps + 1, len(length_M)).double()  # [steps + 1, M] the last row stays 0
    sum_SM[step_N, index_N] = value_N
    for step in reversed(range(steps)):
        sum_SM[step] += gamma * sum_SM[step + 1]  # [M]
    return sum_SM[step_N, index_N]  # [N]


def group_normalise(
    value_N: Tensor,
    key_N: Tensor,
    divide_by_std: bool = True,
    singleton: Literal["raw", "zero"] = "raw",
    eps: float = 1e-6,
    trajectory_N: Tensor | None = None,
) -> Tensor:
    """(value - mean) / (std + eps) among the rows of equal key, std with ddof 1; without divide_by_std, value - mean.

    Tensors [N], keys and trajectories any integers; returns float32 [N] on value_N's device. Raises ValueError where
    lengths differ and for an unknown `singleton`. Source: GRPO (DeepSeekMath), with verl-agent's conventions:
    - A key of one row: "raw" takes mean 0, std 1 (published for episodes); "zero" gives 0 (for GiGPO's anchors).
    - With trajectory_N the statistics are over one row per key and trajectory, the first; all rows are normalised by
      them (compute_mean_std_cross_steps=False).
    - Ours: where the rows of the statistics are all equal, they get exactly 0 (mean their value, std 1). A later row
      may differ from them, with trajectory_N, by its own penalty; it keeps that difference, undivided.

    >>> group_normalise(torch.tensor([10.0, 0.0, 0.0, 7.0]), torch.tensor([3, 3, 3, 8]), singleton="zero")
    tensor([ 1.1547, -0.5774, -0.5774,  0.0000])
    """
    _same_length(value_N=value_N, key_N=key_N, trajectory_N=trajectory_N)
    if singleton not in ("raw", "zero"):
        raise ValueError(f"singleton={singleton!r} is not one of raw, zero")
    exact_N, (group_N, size_G) = value_N.cpu().double(), _compact(key_N)  # [N], [G]
    counted_K = torch.arange(len(exact_N))  # [K] the rows of the statistics: all, or one per key and trajectory
    if trajectory_N is not None:
        pair_N, size_K = _compact(key_N, trajectory_N)  # [N], [K]
        counted_K = torch.zeros_like(size_K).scatter_reduce(0, pair_N, counted_K, "amin", include_self=False)  # [K]
    stat_K, group_K = exact_N[counted_K], group_N[counted_K]  # [K]
    count_G, zero_G = torch.bincount(group_K, minlength=len(size_G)), torch.zeros(len(size_G)).double()  # [G]
    low_G = zero_G.scatter_reduce(0, group_K, stat_K, "amin", include_self=False)  # [G]
    mean_G = low_G + zero_G.index_add(0, group_K, stat_K - low_G[group_K]) / count_G  # [G] exact if all are equal
    square_G = zero_G.index_add(0, group_K, (stat_K - mean_G[group_K]) ** 2)  # [G]
    std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()  # [G]
    std_G = torch.where(std_G == 0, 1.0, std_G)  # [G]
    if singleton == "raw":
        mean_G = torch.where(count_G == 1, 0.0, mean_G)  # [G]
    centred_N = exact_N - mean_G[group_N]  # [N]
    return (centred_N / (std_G[group_N] + eps) if divide_by_std else centred_N).to(value_N.device, torch.float32)  # [N]


def grpo(rows: RowBatch, cfg: AlgoConfig) -> Tensor:
    """The score normalised within the group, float32 [N]; all tokens of a row share it.

    cfg.stats_over "steps" counts every row, so that long episodes weigh more (as published); "trajectories" counts the
    first row of each episode. A single one keeps its score, as published. Source: GRPO (DeepSeekMath), as in
    verl-agent; Dr. GRPO without cfg.divide_by_std.
    """
    trajectory_N = rows.trajectory_N if cfg.stats_over == "trajectories" else None  # [N]
    return group_normalise(rows.score_N, rows.group_N, cfg.divide_by_std, trajectory_N=trajectory_N)  # [N]


def gigpo(rows: RowBatch, cfg: AlgoConfig) -> Tensor:
    """`grpo` plus cfg.step_weight times a step advantage, float32 [N].

    The step advantage normalises the discounted return, minus the row's own cfg.invalid_penalty, among all rows of the
    group with the same observation, be it twice in one episode; a single one gets 0. cfg.stats_over is the episode
    part's alone. Raises ValueError without rows.anchor_N. Source: GiGPO, equation 8.
    """
    if rows.anchor_N is None:
        raise ValueError("gigpo needs rows.anchor_N, the id of each row's (group, observation text)")
    return_N = discounted_returns(rows.reward_N, rows.trajectory_N, cfg.gamma) - cfg.invalid_penalty * rows.invalid_N
    state_N, _ = _compact(rows.group_N, rows.anchor_N)  # [N] apart in each group even if anchor ids are not
    return grpo(rows, cfg) + cfg.step_weight * group_normalise(return_N, state_N, cfg.divide_by_std, "zero")  # [N]


def anchors(observations: Sequence[str], group_N: Tensor, similarity: float | None = None) -> Tensor:
    """Anchor-state ids, int64 [N]: rows of one group share one where their observations are equal.

    With `similarity`, rows join, in order, the first anchor of their group whose first observation is at least that
    alike by difflib's ratio (in [0, 1]). Raises ValueError where lengths differ. Source: GiGPO, enable_similarity.

    >>> anchors(["a hall", "a hall", "a hall.", "a hall"], torch.tensor([0, 0, 0, 1]))
    tensor([0, 0, 1, 2])
    >>> anchors(["a hall", "a hall", "a hall.", "a hall"], torch.tensor([0, 0, 0, 1]), similarity=0.9)
    tensor([0, 0, 0, 1])
    """
    if len(observations) != len(group_N):
        raise ValueError(f"{len(observations)} observations, but group_N is {list(group_N.shape)}")
    founders: dict[int, dict[str, int]] = {}  # group -> the first observation of each of its anchors -> id
    anchor: dict[tuple[int, str], int] = {}
    keys = list(zip(group_N.tolist(), observations, strict=True))
    for group, text in keys:
        if (group, text) in anchor:
            continue
        first = founders.setdefault(group, {})
        near = (number for seen, number in first.items() if similarity and _alike(text, seen, similarity))
        number = next(near, None)
        anchor[group, text] = first.setdefault(text, sum(map(len, founders.values()))) if number is None else number
    return torch.tensor([anchor[key] for key in keys], dtype=torch.int64)


def _alike(text: str, other: str, least: float) -> bool:
    matcher = difflib.SequenceMatcher(None, text, other)  # the quick ratios are upper bounds of the slow one
    return matcher.real_quick_ratio() >= least and matcher.quick_ratio() >= least and matcher.ratio() >= least


def rlvmr(rows: RowBatch, cfg: AlgoConfig) -> Tensor:
    """`grpo` plus cfg.step_weight times a tag advantage, float32 [N].

    The tag advantage normalises rows.tag_reward_N among the rows of the group with the same rows.tag_N; a single one
    keeps its reward, as published. cfg.stats_over is the episode part's alone. Raises ValueError without both fields.
    Source: RLVMR (Zhang et al. 2025); what a tag earns is rows.tag_rewards.
    """
    if rows.tag_N is None or rows.tag_reward_N is None:
        raise ValueError("rlvmr needs rows.tag_N, the id of each reply's tag, and rows.tag_reward_N, what it earned")
    kind_N, _ = _compact(rows.group_N, rows.tag_N)  # [N]
    return grpo(rows, cfg) + cfg.step_weight * group_normalise(rows.tag_reward_N, kind_N, cfg.divide_by_std)  # [N]


def ppo(rows: RowBatch, cfg: AlgoConfig) -> Tensor:
    """The score itself, float32 [N]: the reward of the row's last token, from which `generalised_advantage` takes the
    critic's values token by token. Source: PPO as in verl-agent, where a row is an episode of tokens of its own."""
    return rows.score_N.float()  # [N]


ADVANTAGES = {"grpo": grpo, "gigpo": gigpo, "rlvmr": rlvmr, "ppo": ppo}


def advantages(rows: RowBatch, cfg: AlgoConfig) -> Tensor:
    """What the actor trains on, float32 [N]: ADVANTAGES[cfg.advantage] (KeyError if unknown), negatives weighed; with
    PPO what it is made of."""
    advantage_N = ADVANTAGES[cfg.advantage](rows, cfg)  # [N]
    return advantage_N if cfg.advantage == "ppo" else weigh_negatives(advantage_N, cfg)  # [N]


def judge_advantage(reward_N: Tensor, question_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """What the judge trains on, float32 [N]: the reward of each critique (1: right verdict, else 0) normalised among
    the answers to its question, negatives weighed. Raises ValueError where lengths differ. Source: L_GCD, equation 3.
    """
    return weigh_negatives(group_normalise(reward_N, question_N, cfg.divide_by_std), cfg)  # [N]


def weigh_negatives(advantage_N: Tensor, cfg: AlgoConfig) -> Tensor:
    """Negative advantages [N] times cfg.negative_weight. Ours; at 1, the default, methods are as published."""
    return torch.where(advantage_N < 0, cfg.negative_weight * advantage_N, advantage_N)  # [N]


def generalised_advantage(
    reward_T: Tensor, value_T: Tensor, gamma: float, lam: float, row_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(advantage_T, return_T), float32 [T] each: delta_t = r_t + gamma V_(t+1) - V_t, A_t = delta_t + gamma lam
    A_(t+1), return = A + V, with V = A = 0 after the last token. With row_T each row is a sequence of its own.

    All [T], on any device, tokens of a row in order. Raises ValueError where lengths differ. Source: GAE (Schulman et
    al. 2016). With r = (0, 1), V = (.5, .25), gamma = lam = 1: A = (.5, .75), return = (1, 1).
    """
    _same_length(reward_T=reward_T, value_T=value_T, row_T=row_T)
    row_T = torch.zeros(len(reward_T), dtype=torch.int64) if row_T is None else row_T  # [T]
    value_64_T, next_T = value_T.cpu().double(), torch.zeros(len(value_T)).double()  # [T]
    index_T, _ = _compact(row_T)  # [T]
    order_T = torch.argsort(index_T, stable=True)  # [T] rows side by side, each in its order
    follows_T = index_T[order_T][1:] == index_T[order_T][:-1]  # [T - 1]
    next_T[order_T[:-1][follows_T]] = value_64_T[order_T[1:][follows_T]]  # [T]
    delta_T = reward_T.cpu().double() + gamma * next_T - value_64_T  # [T]
    advantage_T = _discounted_sums(delta_T, index_T, gamma * lam)  # [T]
    parts = (advantage_T, advantage_T + value_64_T)
    return tuple(part_T.to(value_T.device, torch.float32) for part_T in parts)


def whiten(value_T: Tensor, eps: float = 1e-8) -> Tensor:
    """(value - mean) / sqrt(unbiased variance + eps) over all [T], float32; values that are all equal give exactly 0.

    Source: PPO's advantages in verl.
    """
    exact_T = value_T.double()  # [T]
    if len(exact_T) < 2 or exact_T.min() == exact_T.max():
        return torch.zeros_like(value_T, dtype=torch.float32)  # [T]
    return ((exact_T - exact_T.mean()) / (exact_T.var() + eps).sqrt()).float()  # [T]


def value_loss(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), [T], in squared units of reward.

    Returns (loss_T, detached means): `value_clip_fraction`, the tokens whose clipped error is the larger. Raises
    ValueError where lengths differ. Source: PPO as in verl. With V = 1, V_old = 0, R = 2, clip = .5: max(1, 2.25) / 2.
    """
    _same_length(value_T=value_T, old_value_T=old_value_T, return_T=return_T)
    old_value_T = old_value_T.detach()  # [T]
    near_T = torch.clamp(value_T, old_value_T - clip, old_value_T + clip)  # [T]
    plain_T, clipped_T = (value_T - return_T) ** 2, (near_T - return_T) ** 2  # [T]
    metrics = {"value_clip_fraction": (clipped_T > plain_T).float().mean()}
    return 0.5 * torch.maximum(plain_T, clipped_T), metrics  # [T]


def importance_weights(
    trainer_logp_T: Tensor,
    engine_logp_T: Tensor,
    row_T: Tensor,
    how: Literal["none", "truncate", "mask"],
    level: Literal["token", "sequence", "geometric"] = "token",
    low: float = 0.5,
    high: float = 2.0,
) -> Tensor:
    """What corrects for an engine that samples from another distribution than the trainer computes: float32 [T].

    ratio = exp(trainer_logp - engine_logp), in nats, of each token, or of its row: the product of its tokens' ratios
    ("sequence") or their geometric mean. "none": 1; "truncate": min(ratio, high); "mask": the ratio within [low, high],
    else 0: such tokens are rejected, they count in no denominator. No gradient. Raises ValueError where lengths differ
    and for an unknown `how` or `level`. Source: truncated importance sampling (Yao et al. 2025), masks (IcePop, verl).
    With gaps (0, ln 3): truncate at 2 gives (1, 2), mask (1, 0), sequence-level mask (0, 0).
    """
    _same_length(trainer_logp_T=trainer_logp_T, engine_logp_T=engine_logp_T, row_T=row_T)
    gap_T = (trainer_logp_T - engine_logp_T).detach().float()  # [T]
    if level != "token":
        gap_T = _row_sums(gap_T, row_T, mean=level == "geometric")  # [T]
    ratio_T = gap_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # [T]
    weights = {
        "none": torch.ones_like(ratio_T),
        "truncate": ratio_T.clamp(max=high),
        "mask": torch.where((ratio_T >= low) & (ratio_T <= high), ratio_T, 0.0),
    }
    for name, value, known in (("how", how, weights), ("level", level, ("token", "sequence", "geometric"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    return weights[how]  # [T]


def nthr_weights(
    hidden_TH: Tensor, error_TV: Tensor, row_T: Tensor, won_T: Tensor, beta: float, eta: float
) -> tuple[Tensor, dict[str, float]]:
    """Factors on the advantages of one group's tokens, float32 [T]: eta for the tokens of lost rows that pull the won
    ones along, else 1.

    hidden_TH: the old policy's input to the lm_head at each response token; error_TV: one-hot of the token minus the
    policy's probabilities, over the vocabulary or the part of it that the group's responses use; won_T: bool. A token's
    influence is s = g^T M h with M = sum of g h^T over the won rows' tokens; the threshold is beta times the least mean
    s of a won row; lost rows' tokens above it are selected. A group without both kinds of rows is left alone. Returns
    (factor_T, {"tau", "selected": number of tokens}). Raises ValueError where lengths differ. No gradient.
    Source: NTHR (Deng et al. 2025), equations 6 to 8; a row counts for itself in its mean, as in their formula.
    """
    _same_length(row_T=row_T, won_T=won_T, hidden_TH=hidden_TH[:, 0], error_TV=error_TV[:, 0])
    factor_T = torch.ones(len(row_T), dtype=torch.float32, device=hidden_TH.device)  # [T]
    won_T = won_T.bool()  # [T]
    if won_T.all() or not won_T.any():
        return factor_T, {"tau": math.nan, "selected": 0}
    pull_VH = error_TV[won_T].T @ hidden_TH[won_T]  # [V, H]
    influence_T = ((error_TV @ pull_VH) * hidden_TH).sum(-1)  # [T]
    tau = beta * float(_row_sums(influence_T, row_T, mean=True)[won_T].min())
    selected_T = ~won_T & (influence_T > tau)  # [T]
    return torch.where(selected_T, eta, factor_T), {"tau": tau, "selected": int(selected_T.sum())}


def coupling(hidden_TH: Tensor, error_TV: Tensor, hidden_SH: Tensor, error_SV: Tensor) -> float:
    """How much one unit step of gradient ascent on one response's log-prob (T tokens) raises another's (S tokens), in
    nats, if only the output layer learns: sum over token pairs of <error_k, error_k'> <hidden_k, hidden_k'>.

    hidden: what the output layer is given at each response token; error: one-hot of the token minus the policy's
    probabilities. Symmetric; of a response with itself never negative. Raises RuntimeError where H or V differ.
    Source: paper, equation 2, with the other sample's own prompt (Deng et al. 2025). With H = 1, hidden 2 and 3, errors
    (.5, -.5) and (.2, -.2): .2 * 6 = 1.2.
    """
    return float(((error_TV @ error_SV.T) * (hidden_TH @ hidden_SH.T)).sum())


def couplings(hidden_TH: Tensor, errors: Iterable[Tensor], row_T: Tensor) -> Tensor:
    """`coupling` of every row with every row, [R, R], rows in the order of their ids row_T.

    `errors` are parts of error_TV, [T, some of V], which need not exist at once.
    """
    tokens = len(row_T)
    alike_TT = hidden_TH.new_zeros(tokens, tokens)  # [T, T] the one large matrix
    for error_TC in errors:
        alike_TT.addmm_(error_TC, error_TC.T)
    _, index_T = torch.unique(row_T, return_inverse=True)  # [T]
    rows = int(index_T.max()) + 1
    half_RT = alike_TT.new_zeros(rows, tokens)  # [R, T]
    parts = (one.split(COUPLED_TOKENS) for one in (alike_TT, hidden_TH, index_T))
    for alike_PT, hidden_PH, index_P in zip(*parts, strict=True):
        half_RT.index_add_(0, index_P, alike_PT * (hidden_PH @ hidden_TH.T))
    return alike_TT.new_zeros(rows, rows).index_add(1, index_T, half_RT)  # [R, R]


def coupling_gap(
    influence_RR: Tensor,
    length_R: Tensor,
    label_R: Tensor,
    how: Literal["cos", "mean_src", "mean_both", "sum"] = "cos",
    weight_RR: Tensor | None = None,
) -> float:
    """Mean influence between different rows of the same label minus that between rows of different labels; nan where
    there are no such pairs.

    influence_RR: `couplings`, the row that is learned from first. "mean_src" divides it by that row's tokens length_R
    (the paper's text), "mean_both" by both rows', "cos" by the square roots of both rows' own influence: it alone does
    not grow with the hidden states' norm. weight_RR counts pairs more than once, or not. Raises ValueError for an
    unknown `how`. Source: paper, Figure 8.
    """
    own_R = influence_RR.diagonal().clamp(min=1e-30).sqrt()  # [R]
    scale = {
        "cos": own_R[:, None] * own_R,  # [R, R]
        "mean_src": length_R[:, None],  # [R, 1]
        "mean_both": length_R[:, None] * length_R,  # [R, R]
        "sum": 1,
    }
    if how not in scale:
        raise ValueError(f"how={how!r} is not one of {', '.join(scale)}")
    value_RR, same_RR = influence_RR / scale[how], label_R[:, None] == label_R  # [R, R] each
    weight_RR = torch.ones_like(value_RR) if weight_RR is None else weight_RR.clone()  # [R, R]
    weight_RR.fill_diagonal_(0)
    same, other = (
        (value_RR * part_RR).sum() / part_RR.sum() for part_RR in (weight_RR * same_RR, weight_RR * ~same_RR)
    )
    return float(same - other)


def overlong_penalty(length: int, longest: int, cache: int, truncated: bool) -> float:
    """The share, in [0, 1], of the penalty of a reply of `length` tokens: it rises linearly over the last `cache` of
    the `longest` tokens allowed, and is 1 for a reply that was cut off. Source: DAPO, equation 13.

    >>> [overlong_penalty(length, longest=100, cache=20, truncated=False) for length in (80, 90, 100)]
    [0.0, 0.5, 1.0]
    """
    share = max(0.0, (length - (longest - cache)) / cache) if cache else 0.0
    return 1.0 if truncated else min(1.0, share)


def ppo_clip(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, row_T: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = exp(logp - old_logp); at most dual_clip |A| if A < 0.

    All [T], log-probs in nats; row_T is for sequence-level losses, unused here. Returns (loss_T, detached means over
    these tokens): `ratio`; `clip_fraction`, the tokens at a bound, hence without gradient; `approx_kl`, k3 of
    KL(old || new). Raises ValueError where lengths differ. Source: PPO, equation 7; dual clip: Ye et al. 2020.
    With A = 1, r = 1.5, clips of 0.2: max(-1.5, -1.2) = -1.2, no gradient. With A = -1: max(1.5, 1.2) = 1.5, gradient.
    """
    _same_length(logp_T=logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, row_T=row_T)
    log_ratio_T = (logp_T - old_logp_T.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [T]
    ratio_T = log_ratio_T.exp()  # [T]
    plain_T = -advantage_T * ratio_T  # [T]
    loss_T = torch.maximum(plain_T, -advantage_T * ratio_T.clamp(1 - cfg.clip_low, 1 + cfg.clip_high))  # [T]
    if cfg.dual_clip is not None:
        loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -cfg.dual_clip * advantage_T), loss_T)  # [T]
    clipped, approx_kl = (loss_T != plain_T).float().mean(), (ratio_T - 1 - log_ratio_T).detach().mean()
    return loss_T, {"ratio": ratio_T.detach().mean(), "clip_fraction": clipped, "approx_kl": approx_kl}


def gspo(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, row_T: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_clip` with one ratio per row, exp of its mean log-ratio, for each of its tokens, whose gradient is each
    token's own; with cfg.aggregate "sequence" a row's loss is GSPO's. Its clips are some hundred times narrower.

    Arguments, results and errors as ppo_clip's. A row is one step of an episode. Source: GSPO (Zheng et al. 2025), its
    token variant, which allows advantages by token and is the same where a row has one. With log-ratios (0, ln 4) in a
    row of A = 1 and wide clips: ratio 2, loss (-2, -2).
    """
    _same_length(logp_T=logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, row_T=row_T)
    mean_T = _row_sums((logp_T - old_logp_T).detach(), row_T, mean=True)  # [T]
    return ppo_clip(mean_T + logp_T - logp_T.detach(), torch.zeros_like(mean_T), advantage_T, row_T, cfg)


def cispo(
    logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, row_T: Tensor, cfg: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A w logp with w = clip(r, 1 - clip_low, 1 + clip_high) a constant: clipped tokens keep their gradient, A w.

    Arguments, results and errors as ppo_clip's; published with clip_low = 1, no lower bound; dual_clip is not used.
    Source: CISPO (MiniMax-M1 2025), equation 4. With A = 1, r = 1.5, logp = -1 and clips of 0.2: loss 1.2.
    """
    _same_length(logp_T=logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, row_T=row_T)
    log_ratio_T = (logp_T - old_logp_T).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [T]
    ratio_T = log_ratio_T.exp()  # [T]
    weight_T = ratio_T.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)  # [T]
    clipped, approx_kl = (weight_T != ratio_T).float().mean(), (ratio_T - 1 - log_ratio_T).mean()
    metrics = {"ratio": ratio_T.mean(), "clip_fraction": clipped, "approx_kl": approx_kl}
    return -advantage_T * weight_T * logp_T, metrics  # [T]


POLICY_LOSSES = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo}


def kl(logp_T: Tensor, ref_logp_T: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates [T], in nats, of KL(policy || reference) from tokens of the policy: with d = ref_logp - logp, k1 = -d,
    k2 = d^2 / 2, k3 = exp(d) - d - 1 clamped to [-10, 10], hence without gradient where d > 2.61 or d < -11.

    With d = -1: 1, 0.5 and exp(-1) = 0.3679. Raises ValueError where lengths differ and for an unknown estimator.
    Source: Schulman, "Approximating KL Divergence", 2020; the clamp: verl's low_var_kl.
    """
    _same_length(logp_T=logp_T, ref_logp_T=ref_logp_T)
    d_T = ref_logp_T - logp_T  # [T]
    if estimator == "k1":
        return -d_T  # [T]
    if estimator == "k2":
        return d_T**2 / 2  # [T]
    if estimator == "k3":
        return (d_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - d_T - 1).clamp(-10, 10)  # [T]
    raise ValueError(f"estimator={estimator!r} is not one of k1, k2, k3")


def aggregate(
    loss_T: Tensor,
    row_T: Tensor,
    how: Literal["token", "sequence", "dr"],
    tokens: int | None = None,
    rows: int | None = None,
    length: int | None = None,
) -> Tensor:
    """What these tokens contribute to the loss of an optimizer step, a scalar. The contributions of all micro-batches
    and ranks add up to it, however rows are dealt out; where ranks average their gradients, multiply by the world size.

    loss_T, row_T: [T], row ids any integers; a row is never split over calls. tokens, rows: response tokens and rows of
    the whole optimizer step over all ranks; length: a constant, the longest reply allowed. "token": sum / tokens
    (DAPO). "sequence": sum over rows of the row's mean, / rows (GRPO). "dr": sum / (rows * length) (Dr. GRPO).
    Raises ValueError where lengths differ, for an unknown `how`, and for a needed denominator that is not positive.

    >>> aggregate(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([5, 5, 2]), "sequence", rows=2)  # (2 + 8) / 2
    tensor(5.)
    """
    _same_length(loss_T=loss_T, row_T=row_T)
    needed = {"token": {"tokens": tokens}, "sequence": {"rows": rows}, "dr": {"rows": rows, "length": length}}
    if how not in needed:
        raise ValueError(f"how={how!r} is not one of {', '.join(needed)}")
    for name, count in needed[how].items():
        if count is None or count <= 0:
            raise ValueError(f"aggregate {how!r} divides by {name}, which is {count}")
    if how == "sequence":
        _, index_T, length_B = torch.unique(row_T, return_inverse=True, return_counts=True)  # [T], [rows of this call]
        loss_T = loss_T / length_B[index_T]  # [T]
    return loss_T.sum() / math.prod(needed[how].values())


def _row_sums(value_T: Tensor, row_T: Tensor, mean: bool = False) -> Tensor:
    """For each token the sum, or mean, over its row, [T]; differentiable."""
    _, index_T, length_B = torch.unique(row_T, return_inverse=True, return_counts=True)  # [T], [rows]
    sum_B = torch.zeros(len(length_B), dtype=value_T.dtype, device=value_T.device).index_add(0, index_T, value_T)
    return (sum_B / length_B if mean else sum_B)[index_T]  # [T]


def _same_length(**tensors: Tensor | None) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    expected = [statistics.mode(shape[0] if shape else 0 for shape in shapes.values())]
    wrong = [f"{name} is {shape}" for name, shape in shapes.items() if shape != expected]
    if wrong:
        raise ValueError(f"lengths differ: {', '.join(wrong)}; expected {expected}")


def _compact(*id_N: Tensor) -> tuple[Tensor, Tensor]:
    """Tuples of ids counted from 0, and the rows of each, on the CPU: (7, 9, 7) gives ([0, 1, 0], [2, 1])."""
    ids = torch.stack([each_N.cpu().long() for each_N in id_N])  # [ids of a tuple, N]
    return torch.unique(ids, dim=1, return_inverse=True, return_counts=True)[1:]  # [N], [distinct]

"""The paper's theory as functions: advantages of flawed actions, squeezing, coupled learning; and what of it holds.

    python paper/theory.py [--out figures]    # a table: stated | holds | the numbers that decide; figure_4.png, .json

Exact expectations, finite steps and simulations of softmax policies whose readout alone learns; no language model.
q: probability of the flawed action, r: the risk of failure it adds, p: failure without it, C: learning rate |h|^2 n.
Corrected against the paper: Lemma 3.1 in finite groups and with std; the border of Figure 4's regimes, the root q+ and
not 0.5; equation 10 where advantages do not sum to 0; Theorem 3.2's first inequality (r-hat stands for r in A2 - A3,
the bound of equation 12 is false for x < 0, and 11 asks for the opposite); gaps, which grow in logits and may shrink in
probabilities; Theorem A.1 (a logarithm is lost; the bound is necessary, not sufficient, and can be tightened).
Equation 2 and NTHR are `coupling.coupling` and `baselines.nthr_weights`. Axes: `_K` actions, `_B` samples, `_S` starts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
from matplotlib import pyplot
from numpy.typing import ArrayLike, NDArray

import baselines
from paper import coupling

Array = NDArray[np.float64]
Baseline = Literal["trajectory", "step"]
GROUP = 8  # episodes of a group in the paper's experiments
PUSHED = {"r": 0.2, "c": 0.03}  # the example of Figure 4


# ---- Lemma 3.1: the expected advantage of a flawed action ----


def _check(q: ArrayLike, r: float, p: float) -> None:
    """Raise ValueError where these are no probabilities."""
    if not (0 <= p <= 1 and 0 <= p + r <= 1 and np.all((0 <= np.asarray(q)) & (np.asarray(q) <= 1))):
        raise ValueError(f"q={q}, p={p} and p + r={p + r} must lie in [0, 1]")


def expected_advantage(
    q: ArrayLike, r: float, p: float, per: Literal["joint", "conditional"] = "joint", std: bool = False
) -> Array:
    """Compute E[A 1{flawed}] ("joint"), or E[A | flawed], of success in {0, 1} less its exact mean; shape of q.

    `std` divides by success's population std; where that is 0, so is the result. Raises ValueError where q, p or p + r
    is no probability. Source: lemma 3.1, which is the joint value without std, -r q (1 - q): p cancels.
    """
    _check(q, r, p)
    q = np.asarray(q, dtype=float)
    value = -r * (1 - q) * (q if per == "joint" else 1)
    if not std:
        return value
    fail = p + q * r
    spread = np.sqrt(fail * (1 - fail))
    return np.divide(value, spread, out=np.zeros_like(spread), where=spread > 0)


def given_outcome(q: float, r: float, p: float) -> tuple[float, float]:
    """Compute (P(flawed | failure), P(flawed | success)): above and below q iff r > 0. Raises ValueError as above.

    Corrected: the text under lemma 3.1 has them equal, against the paper's own equation 4.
    """
    _check(q, r, p)
    return q * (p + r) / (p + q * r), q * (1 - p - r) / (1 - p - q * r)


def baseline_value(q: float, r: float, p: float, baseline: Baseline, lengths: Sequence[int] = (1, 1)) -> float:
    """Compute the baseline of success in a large group: its mean over trajectories, or over steps (published code).

    lengths: steps of a successful and of a failed trajectory. As failures are longer, the mean over steps is the lower.
    """
    _check(q, r, p)
    fail = p + q * r
    won, lost = (1.0, 1.0) if baseline == "trajectory" else lengths
    return (1 - fail) * won / ((1 - fail) * won + fail * lost)


def baseline_advantage(
    q: float, r: float, p: float, baseline: Baseline, lengths: Sequence[int], centred: bool = False
) -> float:
    """Compute E[(s - b) 1{flawed}], b = baseline_value(...); `centred` takes q E[s - b] off, leaving -r q (1 - q).

    Centred is what moves the action's logit at a state that every trajectory visits once; without centring, a baseline
    over steps adds q (E[s] - b) and can turn the sign. Not in the paper, whose baseline is the mean over trajectories.
    """
    b = baseline_value(q, r, p, baseline, lengths)
    mean = 1 - p - q * r - b
    return q * (1 - p - r - b) - (q * mean if centred else 0.0)


def group_advantage(
    q: ArrayLike,
    r: float,
    p: float,
    size: int = GROUP,
    std: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
    baseline: Baseline = "trajectory",
    lengths: Sequence[int] = (1, 1),
) -> Array:
    """Compute E[A 1{flawed}] of a member of a group of `size`, compared with the group's own mean; shape of q.

    Exact: every number of flawed members and of successes among flawed and others is enumerated. Advantages are divided
    by std + eps if `std`; a group of equal outcomes gives 0. "step": mean and std are over the steps of all members.
    Corrected: lemma 3.1 leaves out the factor 1 - 1/size, which the group's mean brings as it includes each member.
    """
    _check(q, r, p)
    q = np.asarray(q, dtype=float)
    won_steps, lost_steps = (1, 1) if baseline == "trajectory" else lengths
    total = np.zeros_like(q)
    for flawed in range(1, size + 1):
        share = math.comb(size, flawed) * q**flawed * (1 - q) ** (size - flawed)
        for good in range(flawed + 1):  # successes among the flawed
            for others in range(size - flawed + 1):  # successes among the others
                won = good + others
                if won in (0, size):
                    continue
                chance = _binomial(flawed, good, 1 - p - r) * _binomial(size - flawed, others, 1 - p)
                steps = won * won_steps + (size - won) * lost_steps
                mean = won * won_steps / steps
                scale = math.sqrt(mean * (1 - mean) * steps / (steps - ddof)) + eps if std else 1.0
                total += share * chance * (good - flawed * mean) / size / scale
    return total


def _binomial(n: int, k: int, chance: float) -> float:
    return math.comb(n, k) * chance**k * (1 - chance) ** (n - k)


def sampled_advantage(
    q: float,
    r: float,
    p: float,
    size: int = GROUP,
    groups: int = 400_000,
    std: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
    baseline: Baseline = "trajectory",
    lengths: Sequence[int] = (1, 1),
    seed: int = 0,
) -> tuple[float, float]:
    """Estimate what group_advantage computes from `groups` groups played at random: (mean, standard error)."""
    _check(q, r, p)
    random = np.random.default_rng(seed)
    flawed = random.random((groups, size)) < q
    won = (random.random((groups, size)) >= p + r * flawed).astype(float)
    steps = np.where(won > 0, *lengths) if baseline == "step" else np.ones_like(won)
    total = steps.sum(1, keepdims=True)
    mean = (steps * won).sum(1, keepdims=True) / total
    value = won - mean
    if std:
        value /= np.sqrt((steps * value**2).sum(1, keepdims=True) / (total - ddof)) + eps
    value[won.min(1) == won.max(1)] = 0
    each = (value * flawed).mean(1)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(groups))


# ---- Figure 4: a flawed action under a constant push ----


def sigmoid(z: ArrayLike) -> Array:
    """Compute 1 / (1 + exp(-z)), for any z."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(z, dtype=float)))


def logit(q: ArrayLike) -> Array:
    """Compute ln(q / (1 - q))."""
    q = np.asarray(q, dtype=float)
    return np.log(q) - np.log1p(-q)


def fixed_points(r: float, c: float) -> tuple[float, float] | None:
    """Find (q-, q+), where the push c on the logit equals the correction r q (1 - q); None if it exceeds r/4.

    q- attracts; q+ repels: from above it q runs to 1. Corrected: Figure 4 puts the border at 0.5 for any c, and
    below it q at 0; in truth q settles at q-, near c/r, also from below. Raises ValueError unless r > 0 and c >= 0.
    """
    if r <= 0 or c < 0:
        raise ValueError(f"r={r} must be above 0 and c={c} not below")
    if 4 * c > r:
        return None
    half = math.sqrt(1 - 4 * c / r) / 2
    return 0.5 - half, 0.5 + half


def constant_push(q_S: ArrayLike, r: float, c: float, steps: int, rate: float = 1.0) -> Array:
    """Simulate `steps` explicit steps of z += rate (c - r q (1 - q)) from each start: q, [steps + 1, S].

    Source: section 3.3, with a change of logit in proportion to the advantage (appendix A.3).
    """
    z_S = np.atleast_1d(logit(q_S))
    path = np.empty((steps + 1, len(z_S)))
    for step in range(steps + 1):
        path[step] = q = sigmoid(z_S)
        z_S = z_S + rate * (c - r * q * (1 - q))
    return path


def strongest_correction(r: float, p: float, size: int | None = None, points: int = 10_000) -> float:
    """Find the q, to 1/points, where |E[A 1{flawed}]| is largest with division by std: population's, or of a group.

    Corrected: Figure 4 has it at 0.5, which holds without std. For small r it is 1/3 if p = 0 and 2/3 if p + r = 1.
    """
    q = np.arange(1, points) / points
    value = expected_advantage(q, r, p, std=True) if size is None else group_advantage(q, r, p, size, std=True)
    return float(q[np.argmax(np.abs(value))])


# ---- Theorem 3.2: does squeezing make a flawed action likelier? ----


def advantages(probability_K: ArrayLike, failure_K: ArrayLike) -> Array:
    """Compute E[A 1{i}] of each action of a softmax policy, p_i (F - f_i), F the mean failure: [..., K], of sum 0."""
    p, f = np.asarray(probability_K, dtype=float), np.asarray(failure_K, dtype=float)
    return p * ((p * f).sum(-1, keepdims=True) - f)


def three_actions(q: ArrayLike, q_hat: ArrayLike, r: ArrayLike, r_hat: ArrayLike, p: ArrayLike) -> tuple[Array, Array]:
    """Set theorem 3.2's scene, two flawed actions and the good rest: (probability, failure), [..., 3] each.

    p is failure without action 1, hence a mean over actions 2 and 3: the third's added risk is
    -q_hat r_hat / (1 - q - q_hat).
    """
    q, q_hat, r, r_hat, p = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (q, q_hat, r, r_hat, p)))
    rest = 1 - q - q_hat
    return np.stack([q, q_hat, rest], -1), np.stack([p + r, p + r_hat, p - q_hat * r_hat / rest], -1)


def squeeze(q: ArrayLike, q_hat: ArrayLike, r: ArrayLike, r_hat: ArrayLike) -> Array:
    """Compute S = sum_j p_j (A_j - A_1) of three_actions: action 1 becomes likelier under gradient flow iff S < 0.

    A finite step raises it only if S < 0, which does not suffice (e^x >= 1 + x). Corrected: equations 13 and 14 have
    r_hat for r in A_2 - A_3, hence a term 2 q q_hat^2 (r - r_hat) too few: -(1 - q) printed_inequality(...).
    """
    q, q_hat, r, r_hat = (np.asarray(x, dtype=float) for x in (q, q_hat, r, r_hat))
    return 2 * q * r * ((1 - q) ** 2 - q_hat * (1 - q) + q_hat**2) - q_hat * r_hat * (2 * q_hat + q - 1)


def printed_inequality(q: ArrayLike, q_hat: ArrayLike, r: ArrayLike, r_hat: ArrayLike) -> Array:
    """Compute the left side of theorem 3.2's first inequality as printed: action 1 needs >= 0 to rise, it says."""
    q, q_hat, r, r_hat = (np.asarray(x, dtype=float) for x in (q, q_hat, r, r_hat))
    return (2 * q_hat - 1) * q_hat * r_hat + 2 * (q_hat + q - 1) * q * r


def policy_step(probability_K: ArrayLike, advantage_K: ArrayLike, rate: float) -> Array:
    """Move the logits by z_i += rate A_i, exactly: probabilities, [..., K]. Source: equation 10, with rate = C."""
    weight = np.asarray(probability_K) * np.exp(rate * np.asarray(advantage_K))
    return weight / weight.sum(-1, keepdims=True)


def policy_run(probability_K: ArrayLike, failure_K: ArrayLike, steps: int, rate: float = 1.0) -> Array:
    """Repeat policy_step with each action's own failure_K held fixed: probabilities, [steps + 1, K].

    Fixed failures, not fixed (p, r, r_hat): p is a mean over a policy that changes.
    """
    failure_K = np.asarray(failure_K, dtype=float)
    z_K = np.log(np.asarray(probability_K, dtype=float))
    path = np.empty((steps + 1, len(z_K)))
    for step in range(steps + 1):
        weight = np.exp(z_K - z_K.max())
        path[step] = p = weight / weight.sum()
        z_K = z_K + rate * p * (p @ failure_K - failure_K)
    return path


def random_settings(count: int, seed: int = 0) -> tuple[Array, ...]:
    """Draw (q, q_hat, r, r_hat, p), [count] each, all above 0, with failures of three_actions in [0, 1]."""
    random = np.random.default_rng(seed)
    found: list[Array] = []
    while sum(map(len, found)) < count:
        policy = random.dirichlet((1, 1, 1), count)
        q, q_hat, (r, r_hat, p) = policy[:, 0], policy[:, 1], random.random((3, count))
        failure = three_actions(q, q_hat, r, r_hat, p)[1]
        found.append(np.stack([q, q_hat, r, r_hat, p], 1)[((failure >= 0) & (failure <= 1)).all(1)])
    return tuple(np.concatenate(found)[:count].T)


def logit_change(probability_K: ArrayLike, action_B: ArrayLike, advantage_B: ArrayLike, printed: bool = False) -> Array:
    """Compute how a step on a state's samples (action, advantage) moves its logits: [K], over rate x |h|^2.

    Corrected: equation 10, `printed`, lacks -p_i sum_B A, which is 0 only if the whole group acts at that state.
    """
    p, advantage_B = np.asarray(probability_K, dtype=float), np.asarray(advantage_B, dtype=float)
    own_K = np.bincount(np.asarray(action_B), advantage_B, minlength=len(p))
    return own_K if printed else own_K - p * advantage_B.sum()


# ---- Section 3.3: a good and a flawed action whose gradients are coupled ----


def two_samples(
    q1: float,
    q2: float,
    xi: float,
    delta: float,
    positives: int = 1,
    r: float = 0.2,
    rate: float = 0.1,
    steps: int = 2000,
    penalty: float = 1.0,
) -> Array:
    """Simulate (q1, q2), [steps + 1, 2]: a good action in `positives` states, a flawed one in a similar state.

    Euler steps of z1' = A1 (1 + (positives - 1) delta) + delta A2 and z2' = positives delta A1 + A2, with
    A1 = xi r q1 (1 - q1), A2 = -penalty r q2 (1 - q2); delta is the cosine of the states, and both actions are the same
    token: on another one the coupled change is delta times a negative advantage. Source: 3.3 and A.3; penalty is ours:
    0.5 weighs negatives down as NTHR does, 3 is a reward per step.
    """
    z1, z2 = float(logit(q1)), float(logit(q2))
    path = np.empty((steps + 1, 2))
    for step in range(steps + 1):
        q1, q2 = 1 / (1 + math.exp(-z1)), 1 / (1 + math.exp(-z2))
        path[step] = q1, q2
        good, bad = xi * r * q1 * (1 - q1), penalty * r * q2 * (1 - q2)
        z1 += rate * (good * (1 + (positives - 1) * delta) - delta * bad)
        z2 += rate * (positives * delta * good - bad)
    return path


def rise_and_fall(path: Array) -> tuple[float, int, int | None]:
    """Find a path's peak: (q there, its step, first later step at which q is below its start or None)."""
    top = int(path.argmax())
    below = np.flatnonzero(path[top:] < path[0])
    return float(path[top]), top, top + int(below[0]) if len(below) else None


# ---- Theorem A.1: when does the flawed action start to fall? ----


def falls(q1: ArrayLike, q2: ArrayLike, xi_delta: ArrayLike) -> NDArray[np.bool_]:
    """Say where the flawed action's probability q2 falls: q2 (1 - q2) >= xi delta q1 (1 - q1). Source: equation 19."""
    q1, q2 = np.asarray(q1, dtype=float), np.asarray(q2, dtype=float)
    return q2 * (1 - q2) >= np.asarray(xi_delta) * q1 * (1 - q1)


def falls_from(q2: float, xi_delta: float) -> float:
    """Find the q1 > 0.5 from which on q2 falls, if q2 stands still. Raises ValueError if it falls at any q1."""
    root = 1 - 4 * q2 * (1 - q2) / xi_delta
    if root < 0:
        raise ValueError(f"q2={q2} falls at any q1 if xi delta={xi_delta}")
    return (1 + math.sqrt(root)) / 2


def odds_bounds(xi_delta: ArrayLike) -> dict[str, Array]:
    """Bound the odds' ratio h1/h2 (h = exp logit) at which q2 <= q1 can start to fall: necessary, not sufficient.

    "derived": sqrt(xi delta), the paper's own equation 22; "tightened": xi delta, which keeps the factor h2/h1 dropped
    there; "printed": exp(xi delta / 2), theorem A.1 with its logarithm lost: no bound at all. Times the flawed action's
    odds at the start they bound h1, as its odds never fall before.
    """
    x = np.asarray(xi_delta, dtype=float)
    return {"derived": np.sqrt(x), "tightened": x, "printed": np.exp(x / 2)}


# ---- The table: what the paper states, what holds, and the numbers that decide ----

Rows = list[tuple[str, str, str]]


def lemma_rows() -> Rows:
    """Decide what of lemma 3.1 and Figure 4 holds."""
    q, r, p = 0.2, 0.4, 0.1
    joint, conditional = float(expected_advantage(q, r, p)), float(expected_advantage(q, r, p, "conditional"))
    group, divided = float(group_advantage(q, r, p)), float(group_advantage(q, r, p, std=True))
    sampled, error = sampled_advantage(q, r, p, std=True)
    failed, won = given_outcome(q, r, p)
    long = {"baseline": "step", "lengths": (10, 30)}
    raw, centred = (baseline_advantage(0.2, 0.1, 0.4, **long, centred=centred) for centred in (False, True))
    low, high = fixed_points(**PUSHED)
    starts = (0.02, 0.6, high - 0.01, high + 0.01)
    ends = constant_push(starts, **PUSHED, steps=20_000)[-1]
    tops = ", ".join(f"{strongest_correction(r, p):.3f} (p={p} r={r})" for p, r in ((0, 0.05), (0.2, 0.1), (0.8, 0.2)))
    return [
        (
            "Lemma 3.1: the expected advantage of a flawed action is q r (q - 1).",
            "Yes: of A 1{flawed}, without std. Given the action it is -(1 - q) r; in groups of G it is (1 - 1/G) of "
            "that; with std it has no closed form.",
            f"q={q} r={r} p={p}: joint {joint:.4f}, conditional {conditional:.3f}; G={GROUP}: {group:.4f}, with std "
            f"{divided:.5f}, sampled {sampled:.5f} +- {error:.5f}",
        ),
        (
            "3.1: the lemma assumes the flawed action as likely in successes as in failures.",
            "No: its own equation 4 makes it likelier in failures iff r > 0.",
            f"same case: P(flawed | failure) {failed:.4f} > q={q} > P(flawed | success) {won:.4f}",
        ),
        (
            "(the baseline, not discussed)",
            "With a mean over steps, as published code has it, long failures lower the baseline: the sign turns, "
            "unless advantages are centred.",
            f"q=.2 r=.1 p=.4, 10 and 30 steps: over trajectories {float(expected_advantage(0.2, 0.1, 0.4)):.3f}, "
            f"over steps {raw:+.6f}, centred {centred:.3f}",
        ),
        (
            "Figure 4: |A| is a parabola, largest at q = 0.5.",
            "Only A 1{flawed} without std. With std the maximum moves, towards 0.5 in small groups; the conditional "
            "advantage has no maximum inside.",
            f"maximum at q = {tops}; p=0 r=.05 in groups of {GROUP}: {strongest_correction(0.05, 0, GROUP, 1000):.2f}",
        ),
        (
            "3.3: q < 0.5 is safe, q > 0.5 runs away.",
            "The border is the unstable root q+ > 0.5; below it q goes to q- > 0, also from 0.02; with c > r/4 "
            "nothing is safe.",
            f"r={PUSHED['r']} c={PUSHED['c']}: q- {low:.4f}, q+ {high:.4f}; "
            + ", ".join(f"{start:.3f} -> {end:.3f}" for start, end in zip(starts, ends, strict=True))
            + f"; c={PUSHED['r'] * 0.3:.2f}: roots {fixed_points(PUSHED['r'], PUSHED['r'] * 0.3)}, 0.02 -> "
            f"{constant_push(0.02, PUSHED['r'], PUSHED['r'] * 0.3, 20_000)[-1, 0]:.3f}",
        ),
    ]


def squeezing_rows() -> Rows:
    """Decide what of appendix A.2 and theorem 3.2 holds."""
    random = np.random.default_rng(0)
    settings = random_settings(200_000)
    q, q_hat, r, r_hat, _ = settings
    probability, failure = three_actions(*settings)
    advantage = advantages(probability, failure)
    exact, printed = squeeze(q, q_hat, r, r_hat), printed_inequality(q, q_hat, r, r_hat)
    direct = (probability * (advantage - advantage[:, :1])).sum(1)
    rate = 10 ** random.uniform(-2, 2, len(q))[:, None]
    up = policy_step(probability, advantage, rate)[:, 0] > q
    rises = policy_step(probability, advantage, 0.1) - probability
    ratio = (probability * np.exp(rate * (advantage - advantage[:, :1]))).sum(1)
    own = (0.3, 0.4, 0.01, 0.2)
    scene = three_actions(*own, 0.4)
    change = policy_step(scene[0], advantages(*scene), 0.1)[0] - own[0]
    gap_scene = three_actions(0.45, 0.5, 0.01, 0.02, 0.5)
    gap = advantages(*gap_scene)
    moved = policy_step(gap_scene[0], gap, 0.1) - gap_scene[0]
    run = policy_run((0.30, 0.69, 0.01), (0.30, 0.90, 0.10), 20_000)[:, 0]
    peak, step, back = rise_and_fall(run)
    policy, sample, value = np.array([0.3, 0.69, 0.01]), [0, 1, 2], np.array([-0.1, -0.3, 0.9])
    off = np.abs(logit_change(policy, sample, value) - logit_change(policy, sample, value, printed=True)).max()
    x = np.linspace(1, 3, 2_000_001)
    limit = x[np.expm1(x) <= math.e * x].max()
    return [
        (
            "Equation 10: the logit of action i moves by C A_i.",
            "If the samples' advantages sum to 0, as in a group that acts at one state; else -p_i times their sum is "
            "missing: at every later step of an episode.",
            f"a batch whose advantages sum to {value.sum():.1f}: the printed change is off by {off:.3f}",
        ),
        (
            "A_1, A_2, A_3 and the third action's risk.",
            "Yes; they sum to 0.",
            f"200,000 random settings: largest |sum| {np.abs(advantage.sum(1)).max():.0e}, largest "
            f"|A_1 + r q (1 - q)| {np.abs(advantage[:, 0] + r * q * (1 - q)).max():.0e}",
        ),
        (
            "Equation 11: p_1 rises if sum exp(z_j + C (A_j - A_1)) > sum exp(z_j).",
            "The reverse, <; 14 has it right. The sums are of exponentials, and parentheses are missing.",
            f"random steps: < agrees with p_1's rise in {100 * np.mean((ratio < 1) == up):.1f} %, > in "
            f"{100 * np.mean((ratio > 1) == up):.1f} %",
        ),
        (
            "Equation 12: e^x - 1 <= e x.",
            "Only for x from 0 to 1.75, and x < 0 is what matters; e^x - 1 >= x serves: S < 0 is necessary at any C.",
            f"e^x - 1 = e x at x = {limit:.4f}; x = -1: {math.expm1(-1):.3f} > {-math.e:.3f}; p_1 up though S > 0: "
            f"{np.sum(up & (exact > 1e-12))}, p_1 down though S < 0: {np.sum(~up & (exact < -1e-12))} of 200,000",
        ),
        (
            "Equations 13, 14, theorem 3.2: p_1 rises only if (2qh-1) qh rh + 2 (qh+q-1) q r >= 0.",
            "rh stands for r in A_2 - A_3. It rises iff (2qh+q-1) qh rh > 2 q r [(1-q)^2 - qh(1-q) + qh^2].",
            f"q=.3 qh=.4 r=.01 rh=.2: printed {float(printed_inequality(*own)):.4f} (no rise), S "
            f"{float(squeeze(*own)):.5f}, p_1 {change:+.3e}. Random: S off by {np.abs(exact - direct).max():.0e}; "
            f"rises {100 * np.mean(exact < 0):.2f} %, of which printed misses "
            f"{100 * np.sum((exact < 0) & (printed < 0)) / np.sum(exact < 0):.0f} %, and claims falls as rises in "
            f"{100 * np.mean((exact > 0) & (printed > 0)):.2f} % of all",
        ),
        (
            "Equations 15, 16: the gap between actions 3 and 1 always grows.",
            "In log-odds. The gap of probabilities can shrink.",
            f"q=.45 qh=.5 r=.01 rh=.02: log-odds {gap[2] - gap[0]:+.4f} C, p_3 - p_1 {moved[2] - moved[0]:+.2e}; it "
            f"shrinks in {100 * np.mean(rises[:, 2] < rises[:, 0]):.3f} % of random settings",
        ),
        (
            "3.1: by squeezing, a flawed action's probability can hardly increase.",
            "In the end it vanishes, after a rise that can be long and large.",
            f"p = .30, .69, .01 failing .30, .90, .10: p_1 up to {peak:.5f} at step {step}, below .30 at step {back}, "
            f"{run[-1]:.1e} at 20,000",
        ),
    ]


def coupling_rows() -> Rows:
    """Decide what of section 3.3 and theorem A.1 holds."""
    random = np.random.default_rng(0)
    weak, strong = two_samples(0.3, 0.3, 4, 0.2), two_samples(0.3, 0.3, 4, 0.8, steps=3000)
    (weak_peak, *_), (peak, top, back) = rise_and_fall(weak[:, 1]), rise_and_fall(strong[:, 1])
    rows = [f"{weak_peak:.3f} (delta .2)"]
    rows += [f"{rise_and_fall(two_samples(0.3, 0.3, 4, delta)[:, 1])[0]:.3f} ({delta})" for delta in (0.3, 0.5)]
    shrinks = int((np.diff(strong[:, 0] - strong[:, 1]) < 0).sum())
    q1, q2 = np.sort(random.random((2, 400_000)), 0)[::-1]  # q2 <= q1
    xi_delta = 10 ** random.uniform(-1, 1.5, len(q1))
    onset = falls(q1, q2, xi_delta)
    h1, h2 = np.exp(logit(q1)), np.exp(logit(q2))
    odds = h1 / h2
    relative = np.abs((h2 / h1) * ((1 + h1) / (1 + h2)) ** 2 * q1 * (1 - q1) / (q2 * (1 - q2)) - 1).max()
    broken = {name: int((onset & (odds < bound * (1 - 1e-9))).sum()) for name, bound in odds_bounds(xi_delta).items()}
    idle = int((~onset & (odds > odds_bounds(xi_delta)["tightened"])).sum())
    path = two_samples(0.7, 0.6, 20, 0.3, rate=1e-3, steps=10_000)
    at = int(np.argmax(falls(path[:, 0], path[:, 1], 6.0)))
    grown = math.exp(logit(path[at, 0]) - logit(0.7))
    start = math.exp(logit(0.6) - logit(0.7))
    least = ", ".join(f"{name} {value * start:.3f}" for name, value in odds_bounds(6.0).items())
    return [
        (
            "3.3: coupling delta lets a flawed action rise, until the good one is likely.",
            "Yes, on a token that both share: peak and duration grow with delta. It always falls in the end if "
            "delta < 1.",
            f"q1 = q2 = .3, xi = 4: peaks of q2 {', '.join(rows)}, {peak:.3f} (.8), the last at step {top}, below .3 "
            f"from {back} on",
        ),
        (
            "3.3: A_1 + delta A_2 >= A_2 + delta A_1, so the gap p_1 - p_2 widens.",
            "Iff delta <= 1 (A_1 > A_2), and for the gap of logits; that of probabilities can shrink.",
            f"delta = .8: p_1 - p_2 shrinks in {shrinks} of 3000 steps, z_1 - z_2 in "
            f"{int((np.diff(logit(strong[:, 0]) - logit(strong[:, 1])) < 0).sum())}",
        ),
        (
            "Equations 19 to 21: when the flawed action starts to fall.",
            "Yes.",
            f"400,000 random cases: odds and probabilities differ by {relative:.0e}",
        ),
        (
            "Equations 22, 23, theorem A.1: h_1 has to grow by exp(xi delta / 2 + dz).",
            "By sqrt(xi delta) exp(dz): ln is lost, h is exp(logit), dz = z_2 - z_1 at the start. Necessary, not "
            "sufficient; xi delta exp(dz) is tighter. q > 0.5 is not used.",
            f"onsets {int(onset.sum())}: below the bound derived {broken['derived']}, tightened {broken['tightened']}, "
            f"printed {broken['printed']}; above tightened without onset {idle}. (.7, .6, 20, .3): h_1 grew by "
            f"{grown:.3f} at q1={path[at, 0]:.4f}; bounds {least}. q2 = .55 frozen, xi delta = 4: falls from q1 = "
            f"{falls_from(0.55, 4):.5f}",
        ),
    ]


def influence_rows() -> Rows:
    """Decide what of equation 2 and NTHR holds, on random responses of a network of two layers."""
    generator = torch.Generator().manual_seed(0)
    tensor = dict(generator=generator, dtype=torch.float64)
    body_HI, head_VH = torch.randn(5, 6, **tensor), torch.randn(7, 5, **tensor)
    inputs, tokens = [torch.randn(n, 6, **tensor) for n in (4, 3)], [torch.arange(4), torch.arange(3)]

    def log_prob(body_HI: torch.Tensor, head_VH: torch.Tensor, which: int) -> torch.Tensor:
        logits_TV = (inputs[which] @ body_HI.T).tanh() @ head_VH.T
        return torch.log_softmax(logits_TV, -1).gather(1, tokens[which][:, None]).sum()

    hidden = [(input_TI @ body_HI.T).tanh() for input_TI in inputs]  # [T, H] each
    error = [  # the log-prob's gradient with respect to the logits, [T, V] each
        torch.nn.functional.one_hot(token_T, 7) - (hidden_TH @ head_VH.T).softmax(-1)
        for hidden_TH, token_T in zip(hidden, tokens, strict=True)
    ]
    influence = coupling.coupling(hidden[0], error[0], hidden[1], error[1])
    weights = [body_HI.clone().requires_grad_(), head_VH.clone().requires_grad_()]
    first, second = (torch.autograd.grad(log_prob(*weights, which), weights) for which in (0, 1))
    parts = [float((a * b).sum()) for a, b in zip(first, second, strict=True)]
    change = float(log_prob(body_HI, head_VH + 1e-5 * first[1], 1) - log_prob(body_HI, head_VH, 1)) / 1e-5
    sample_T, won_T = torch.tensor([0] * 4 + [1] * 3), torch.tensor([True] * 4 + [False] * 3)
    hidden_TH, error_TV = torch.cat(hidden), torch.cat(error)
    factor_T, found = baselines.nthr_weights(hidden_TH, error_TV.__getitem__, sample_T, won_T, beta=0.5, eta=0.5)
    ends = [two_samples(0.3, 0.3, 4, 0.5, penalty=penalty)[-1, 1] for penalty in (1, 0.5, 0, 3)]
    return [
        (
            "Equation 2: one sample's influence on another is sum alpha <h, h'>.",
            "To first order, if the output layer alone learns; a whole network's influence has further terms.",
            f"two random responses: {influence:.5f}, a step of 1e-5 {change:.5f}; gradients: output layer "
            f"{parts[1]:.5f}, layer below {parts[0]:.5f}",
        ),
        (
            "4: NTHR applies penalization to tokens of negative samples / weakens their penalty.",
            "The latter (Deng et al.): the negative advantage of selected tokens is made smaller.",
            f"factors of a lost response's tokens {factor_T[4:].tolist()} at tau {found['tau']:.3f}. q2 after 2000 "
            f"coupled steps: {ends[0]:.4f}, with half the penalty {ends[1]:.4f}, none {ends[2]:.4f}, "
            f"three times {ends[3]:.4f}",
        ),
    ]


def format_table(rows: Rows, widths: Sequence[int] = (36, 48, 64)) -> str:
    """Lay the rows out as text: wrapped, with a head and rules between them."""
    rule = "-+-".join("-" * width for width in widths)
    lines = []
    for row in (("stated", "holds", "numbers (computed now)"), *rows):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = (cell[number] if number < len(cell) else "" for cell in cells)
            lines.append(" | ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
        lines.append(rule)
    return "\n".join(lines)


# ---- Figure 4 ----


def figure_4(out: Path) -> dict:
    """Draw figure_4.png and write its numbers to figure_4.json in `out`; return these."""
    r, c = PUSHED["r"], PUSHED["c"]
    low, high = fixed_points(r, c)
    starts = [0.02, 0.1, 0.3, 0.5, 0.65, 0.8, high - 0.003, high + 0.003, 0.85, 0.92]
    steps = 500
    path = constant_push(starts, r, c, steps)
    ends = constant_push(starts, r, c, 20_000)[-1]
    maxima = [
        {
            "p": p,
            "r": risk,
            "large groups": strongest_correction(risk, p),
            f"groups of {GROUP}": strongest_correction(risk, p, GROUP, 1000),
        }
        for p, risk in ((0.0, 0.05), (0.2, 0.1), (0.5, 0.1), (0.8, 0.2))
    ]
    numbers = {
        "r": r,
        "c": c,
        "q-": low,
        "q+": high,
        "maximum": r / 4,
        "starts": {f"{start:.4f}": {"after 20000 steps": float(end)} for start, end in zip(starts, ends, strict=True)},
        "maximum with std": maxima,
    }
    fig, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6))
    _draw_push(left, r, c, low, high)
    for start, line, end in zip(starts, path.T, ends, strict=True):
        colour = "C3" if end > 0.5 else "C0"
        middle.plot(line, color=colour, linewidth=1.3)
        middle.plot(0, start, "o", color=colour, markersize=4, clip_on=False)
    for value, name, style in ((low, "q-", "-"), (high, "q+", "-"), (0.5, "0.5", "--")):
        middle.axhline(value, color="black" if style == "-" else "grey", linestyle=style, linewidth=0.8)
        middle.text(steps * 1.01, value, name, va="center", color="black" if style == "-" else "grey")
    middle.set(xlabel="step", ylabel="q", ylim=(0, 1), xlim=(0, steps), title="where q goes from its start")
    for number, one in enumerate(maxima):
        _draw_normalised(right, one, f"C{number}")
    right.axvline(0.5, color="grey", linestyle="--", linewidth=0.8)
    right.set(xlabel="q", ylabel="|A| / its maximum", xlim=(0, 1), ylim=(0, 1.08), title="with std the maximum moves")
    right.plot([], [], color="black", label="large groups")
    right.plot([], [], color="black", linestyle=":", label=f"groups of {GROUP}")
    right.legend(fontsize=8, loc="lower center", title="maximum in large groups, in groups of 8", title_fontsize=8)
    fig.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "figure_4.png", dpi=150)
    pyplot.close(fig)
    (out / "figure_4.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def _draw_push(axis, r: float, c: float, low: float, high: float) -> None:
    """Draw |A| against the push, with the regions as they are and the direction in which q moves in each."""
    q = np.linspace(0, 1, 401)
    top = r / 4
    regions = (
        (0, low, "C0", "rises\nto q-", 1),
        (low, high, "C2", "pulled back\nto q-", -1),
        (high, 1, "C3", "runs\naway", 1),
    )
    for left, right, colour, text, way in regions:
        axis.axvspan(left, right, color=colour, alpha=0.12, linewidth=0)
        middle, reach = (left + right) / 2, 0.35 * (right - left)
        ends = {"xy": (middle + way * reach, 1.08 * top), "xytext": (middle - way * reach, 1.08 * top)}
        axis.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.8})
        axis.text(middle, 1.12 * top, text, ha="center", va="bottom", color=colour, fontsize=9)
    axis.plot(q, r * q * (1 - q), color="black", label="correction |A| = r q (1 - q)")
    axis.axhline(c, color="C1", label="push c")
    axis.axvline(0.5, color="grey", linestyle="--", linewidth=0.8, label="the paper's border, 0.5")
    axis.plot(low, c, "o", color="black", markersize=7, label=f"q- = {low:.3f}, attracts")
    axis.plot(high, c, "o", color="black", markerfacecolor="white", markersize=7, label=f"q+ = {high:.3f}, repels")
    axis.set(
        xlabel="q, probability of the flawed action", ylabel="change of its logit", xlim=(0, 1), ylim=(0, 1.8 * top)
    )
    axis.set_title(f"a constant push: r = {r}, c = {c}")
    axis.legend(fontsize=8, loc="upper center", ncols=2)


def _draw_normalised(axis, maximum: dict, colour: str) -> None:
    """Draw |A| with division by std over q, in large groups and in small ones, each with its maximum marked."""
    q = np.linspace(0.002, 0.998, 250)
    p, r, *tops = maximum.values()
    curves = (expected_advantage(q, r, p, std=True), group_advantage(q, r, p, std=True))
    for value, top, style in zip(map(np.abs, curves), tops, ("-", ":"), strict=True):
        label = f"p = {p}, r = {r}: {tops[0]:.2f}, {tops[1]:.2f}" if style == "-" else None
        axis.plot(q, value / value.max(), style, color=colour, linewidth=1.3, label=label)
        axis.plot(top, 1, "o", color=colour, markersize=6, markerfacecolor=colour if style == "-" else "white")


def main() -> None:
    """Print the table and draw Figure 4, as the command line asks."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument(
        "--out", type=Path, default=Path("figures"), help="folder of the figure (default: %(default)s)"
    )
    out = command.parse_args().out
    print(format_table(lemma_rows() + squeezing_rows() + coupling_rows() + influence_rows()))
    figure_4(out)
    print(f"Wrote {out / 'figure_4.png'} and .json.")


if __name__ == "__main__":
    configuration.fail_clearly(main)

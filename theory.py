"""The paper's theory as functions: advantages of flawed actions, squeezing, coupled learning; and what of it holds.

    python theory.py [--out figures]     # a table: stated | holds | the numbers that decide; draws figure_4.png and .json

Exact expectations, finite steps and simulations of softmax policies whose readout alone learns; no model, no files.
q: probability of the flawed action, r: the risk of failure it adds, p: failure without it, C: learning rate x |h|^2 x n.
Corrected against the paper: Lemma 3.1 in finite groups and with std; the border of Figure 4's regimes, the root q+ and
not 0.5; equation 10 where advantages do not sum to 0; Theorem 3.2's first inequality (r-hat stands for r in A2 - A3,
the bound of equation 12 is false for x < 0, and 11 asks for the opposite); gaps, which grow in logits and may shrink in
probabilities; Theorem A.1 (a logarithm is lost; the bound is necessary, not sufficient, and can be tightened).
Equation 2 and NTHR are `losses.coupling` and `losses.nthr_weights`. Axes: `_K` actions, `_B` samples, `_S` starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Baseline = Literal["trajectory", "step"]
GROUP = 8  # episodes of a group in the paper's experiments
PUSHED = {"r": 0.2, "c": 0.03}  # the example of Figure 4


# ---- Lemma 3.1: the expected advantage of a flawed action ----


def _check(q: ArrayLike, r: float, p: float) -> None:
    """ValueError where these are no probabilities."""
    if not (0 <= p <= 1 and 0 <= p + r <= 1 and np.all((0 <= np.asarray(q)) & (np.asarray(q) <= 1))):
        raise ValueError(f"q={q}, p={p} and p + r={p + r} must lie in [0, 1]")


def expected_advantage(
    q: ArrayLike, r: float, p: float, per: Literal["joint", "conditional"] = "joint", std: bool = False
) -> Array:
    """E[A 1{flawed}] ("joint"), or E[A | flawed], of success in {0, 1} less its exact mean; shape of q.

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
    """(P(flawed | failure), P(flawed | success)): above and below q iff r > 0. Corrected: the text under lemma 3.1 has
    them equal, against the paper's own equation 4. ValueError as in expected_advantage."""
    _check(q, r, p)
    return q * (p + r) / (p + q * r), q * (1 - p - r) / (1 - p - q * r)


def baseline_value(q: float, r: float, p: float, baseline: Baseline, lengths: Sequence[int] = (1, 1)) -> float:
    """What success is compared with in a large group: its mean over trajectories, or over steps (published code).

    lengths: steps of a successful and of a failed trajectory. As failures are longer, the mean over steps is the lower.
    """
    _check(q, r, p)
    fail = p + q * r
    won, lost = (1.0, 1.0) if baseline == "trajectory" else lengths
    return (1 - fail) * won / ((1 - fail) * won + fail * lost)


def baseline_advantage(
    q: float, r: float, p: float, baseline: Baseline, lengths: Sequence[int], centred: bool = False
) -> float:
    """E[(s - b) 1{flawed}] with b = baseline_value(...); `centred` subtracts q E[s - b], which leaves -r q (1 - q).

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
    """Exact E[A 1{flawed}] of one member of a group of `size`, each compared with the group's own mean; shape of q.

    Every number of flawed members and of successes among flawed and others is enumerated. Advantages are divided by
    std + eps if `std`; a group of equal outcomes gives 0. "step": mean and std are over the steps of all members.
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
    """(mean, standard error) of what group_advantage computes, from `groups` groups played at random."""
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
    """1 / (1 + exp(-z)), for any z."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(z, dtype=float)))


def logit(q: ArrayLike) -> Array:
    """ln(q / (1 - q))."""
    q = np.asarray(q, dtype=float)
    return np.log(q) - np.log1p(-q)


def fixed_points(r: float, c: float) -> tuple[float, float] | None:
    """(q-, q+), where the push c on the logit equals the correction r q (1 - q); None if it exceeds r/4, its maximum.

    q- attracts; q+ repels: from above it q runs to 1. Corrected: Figure 4 puts the border at 0.5 for any c, and its safe
    side at no flawed action; in truth q settles at q-, near c/r, also from below. ValueError unless r > 0 and c >= 0.
    """
    if r <= 0 or c < 0:
        raise ValueError(f"r={r} must be above 0 and c={c} not below")
    if 4 * c > r:
        return None
    half = math.sqrt(1 - 4 * c / r) / 2
    return 0.5 - half, 0.5 + half


def constant_push(q_S: ArrayLike, r: float, c: float, steps: int, rate: float = 1.0) -> Array:
    """q over `steps` explicit steps of z += rate (c - r q (1 - q)), [steps + 1, S], from each start q_S, [S].

    Source: section 3.3, with a change of logit in proportion to the advantage (appendix A.3).
    """
    z_S = np.atleast_1d(logit(q_S))  # [S]
    path = np.empty((steps + 1, len(z_S)))  # [steps + 1, S]
    for step in range(steps + 1):
        path[step] = q = sigmoid(z_S)
        z_S = z_S + rate * (c - r * q * (1 - q))
    return path


def strongest_correction(r: float, p: float, size: int | None = None, points: int = 10_000) -> float:
    """The q, to 1/points, at which |E[A 1{flawed}]| with division by std is largest: population std, or groups of size.

    Corrected: Figure 4 has it at 0.5, which holds without std. For small r it is 1/3 if p = 0 and 2/3 if p + r = 1.
    """
    q = np.arange(1, points) / points
    value = expected_advantage(q, r, p, std=True) if size is None else group_advantage(q, r, p, size, std=True)
    return float(q[np.argmax(np.abs(value))])


# ---- Theorem 3.2: does squeezing make a flawed action likelier? ----


def advantages(probability_K: ArrayLike, failure_K: ArrayLike) -> Array:
    """E[A 1{i}] of each action of a softmax policy, p_i (F - f_i) with F the mean failure; [..., K]. They sum to 0."""
    p, f = np.asarray(probability_K, dtype=float), np.asarray(failure_K, dtype=float)  # [..., K]
    return p * ((p * f).sum(-1, keepdims=True) - f)


def three_actions(q: ArrayLike, q_hat: ArrayLike, r: ArrayLike, r_hat: ArrayLike, p: ArrayLike) -> tuple[Array, Array]:
    """(probability, failure), [..., 3] each, of theorem 3.2's scene: two flawed actions and the good rest.

    p is failure without action 1, hence a mean over actions 2 and 3: the third's added risk is
    -q_hat r_hat / (1 - q - q_hat).
    """
    q, q_hat, r, r_hat, p = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (q, q_hat, r, r_hat, p)))
    rest = 1 - q - q_hat
    return np.stack([q, q_hat, rest], -1), np.stack([p + r, p + r_hat, p - q_hat * r_hat / rest], -1)


def squeeze(q: ArrayLike, q_hat: ArrayLike, r: ArrayLike, r_hat: ArrayLike, printed: bool = False) -> Array:
    """S = sum_j p_j (A_j - A_1) of three_actions: action 1 becomes likelier under gradient flow iff S < 0.

    A finite step raises it only if S < 0, which does not suffice (e^x >= 1 + x). Corrected: equations 13 and 14,
    `printed`, have r_hat for r in A_2 - A_3, hence a term 2 q q_hat^2 (r - r_hat) too few.
    """
    q, q_hat, r, r_hat = (np.asarray(x, dtype=float) for x in (q, q_hat, r, r_hat))
    if printed:
        return -(1 - q) * printed_inequality(q, q_hat, r, r_hat)
    return 2 * q * r * ((1 - q) ** 2 - q_hat * (1 - q) + q_hat**2) - q_hat * r_hat * (2 * q_hat + q - 1)


def printed_inequality(q: ArrayLike, q_hat: ArrayLike, r: ArrayLike, r_hat: ArrayLike) -> Array:
    """The left side of theorem 3.2's first inequality as printed, which says that action 1 needs >= 0 to rise."""
    q, q_hat, r, r_hat = (np.asarray(x, dtype=float) for x in (q, q_hat, r, r_hat))
    return (2 * q_hat - 1) * q_hat * r_hat + 2 * (q_hat + q - 1) * q * r


def policy_step(probability_K: ArrayLike, advantage_K: ArrayLike, rate: float) -> Array:
    """Probabilities [..., K] after z_i += rate A_i, exactly. Source: equation 10, with rate = C."""
    weight = np.asarray(probability_K) * np.exp(rate * np.asarray(advantage_K))  # [..., K]
    return weight / weight.sum(-1, keepdims=True)


def policy_run(probability_K: ArrayLike, failure_K: ArrayLike, steps: int, rate: float = 1.0) -> Array:
    """[steps + 1, K]: policy_step repeated with each action's own failure_K held fixed.

    Fixed failures, not fixed (p, r, r_hat): p is a mean over a policy that changes.
    """
    failure_K = np.asarray(failure_K, dtype=float)  # [K]
    z_K = np.log(np.asarray(probability_K, dtype=float))  # [K]
    path = np.empty((steps + 1, len(z_K)))  # [steps + 1, K]
    for step in range(steps + 1):
        weight = np.exp(z_K - z_K.max())  # [K]
        path[step] = p = weight / weight.sum()
        z_K = z_K + rate * p * (p @ failure_K - failure_K)
    return path


def random_settings(count: int, seed: int = 0) -> tuple[Array, ...]:
    """(q, q_hat, r, r_hat, p), [count] each, where all three actions' failures are probabilities and r, r_hat > 0."""
    random = np.random.default_rng(seed)
    found: list[Array] = []
    while sum(map(len, found)) < count:
        policy = random.dirichlet((1, 1, 1), count)  # [count, 3]
        q, q_hat, (r, r_hat, p) = policy[:, 0], policy[:, 1], random.random((3, count))
        failure = three_actions(q, q_hat, r, r_hat, p)[1]  # [count, 3]
        found.append(np.stack([q, q_hat, r, r_hat, p], 1)[((failure >= 0) & (failure <= 1)).all(1)])
    return tuple(np.concatenate(found)[:count].T)


def logit_change(probability_K: ArrayLike, action_B: ArrayLike, advantage_B: ArrayLike, printed: bool = False) -> Array:
    """Change [K] of one state's logits, over rate x |h|^2, by a step on samples (action, advantage) of that state.

    Corrected: equation 10, `printed`, lacks -p_i sum_B A, which is 0 only if the whole group acts at that state.
    """
    p, advantage_B = np.asarray(probability_K, dtype=float), np.asarray(advantage_B, dtype=float)
    own_K = np.bincount(np.asarray(action_B), advantage_B, minlength=len(p))  # [K]
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
    """(q1, q2) over Euler steps, [steps + 1, 2]: good action in `positives` states, the flawed one in a similar state.

    z1' = A1 (1 + (positives - 1) delta) + delta A2, z2' = positives delta A1 + A2, with A1 = xi r q1 (1 - q1) and
    A2 = -penalty r q2 (1 - q2); delta is the cosine of the states, and both actions are the same token. Source: 3.3 and
    A.3; penalty is ours: 0.5 weighs negatives down as NTHR does, 3 is a reward per step.
    """
    z1, z2 = float(logit(q1)), float(logit(q2))
    path = np.empty((steps + 1, 2))  # [steps + 1, 2]
    for step in range(steps + 1):
        q1, q2 = 1 / (1 + math.exp(-z1)), 1 / (1 + math.exp(-z2))
        path[step] = q1, q2
        good, bad = xi * r * q1 * (1 - q1), penalty * r * q2 * (1 - q2)
        z1 += rate * (good * (1 + (positives - 1) * delta) - delta * bad)
        z2 += rate * (positives * delta * good - bad)
    return path


def rise_and_fall(path: Array) -> tuple[float, int, int | None]:
    """(peak of q, its step, first later step at which q is below its start; None if there is none) of a path [steps]."""
    top = int(path.argmax())
    below = np.flatnonzero(path[top:] < path[0])
    return float(path[top]), top, top + int(below[0]) if len(below) else None


def push_on(probability_K: ArrayLike, failure_K: ArrayLike, delta: float) -> Array:
    """What learning at one state adds to each logit [K] of a similar state: delta times its advantages.

    Positive on the good token alone, hence a flawed action is pulled up only where it is that same token.
    """
    return delta * advantages(probability_K, failure_K)


# ---- Theorem A.1: when does the flawed action start to fall? ----


def falls(q1: ArrayLike, q2: ArrayLike, xi_delta: ArrayLike) -> NDArray[np.bool_]:
    """Whether the flawed action's probability q2 falls: q2 (1 - q2) >= xi delta q1 (1 - q1). Source: equation 19."""
    q1, q2 = np.asarray(q1, dtype=float), np.asarray(q2, dtype=float)
    return q2 * (1 - q2) >= np.asarray(xi_delta) * q1 * (1 - q1)


def falls_from(q2: float, xi_delta: float) -> float:
    """The q1 > 0.5 from which on q2 falls, exactly, if q2 stands still. ValueError if it falls at any q1."""
    root = 1 - 4 * q2 * (1 - q2) / xi_delta
    if root < 0:
        raise ValueError(f"q2={q2} falls at any q1 if xi delta={xi_delta}")
    return (1 + math.sqrt(root)) / 2


def odds_bounds(xi_delta: ArrayLike) -> dict[str, Array]:
    """Least h1/h2 (odds, h = exp logit) at which q2 <= q1 can start to fall: necessary, not sufficient.

    "derived": sqrt(xi delta), the paper's own equation 22; "tight": xi delta, which keeps the factor h2/h1 dropped
    there; "printed": exp(xi delta / 2), theorem A.1 with its logarithm lost: no bound at all. Times the flawed action's
    odds at the start they bound h1, as its odds never fall before.
    """
    x = np.asarray(xi_delta, dtype=float)
    return {"derived": np.sqrt(x), "tight": x, "printed": np.exp(x / 2)}

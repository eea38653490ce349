"""paper/theory.py against exact values worked out independently, and the properties that its docstrings promise.

Tests are named by what they decide; paper/paper_notes.md points at them. Equation 2 and NTHR have tests
elsewhere as well; here are the scope of equation 2 and properties of NTHR on random responses.
"""

import json
import math

import numpy as np
import pytest
import torch

import baselines
import losses
from paper import coupling, theory
from paper.theory import (
    advantages,
    baseline_advantage,
    baseline_value,
    constant_push,
    expected_advantage,
    falls,
    falls_from,
    fixed_points,
    given_outcome,
    group_advantage,
    logit_change,
    odds_bounds,
    policy_run,
    policy_step,
    printed_inequality,
    random_settings,
    rise_and_fall,
    sampled_advantage,
    squeeze,
    strongest_correction,
    three_actions,
    two_samples,
)

LONG_FAILURES = {"baseline": "step", "lengths": (10, 30)}


def near(value, **tolerance):
    return pytest.approx(value, **tolerance)


# ---- Lemma 3.1 ----


@pytest.mark.parametrize(
    ("q", "joint", "conditional", "population", "group", "group_std", "group_std_ddof_0"),
    [
        (0.05, -0.0190, -0.38, -0.058468, -0.016625, -0.040459, -0.043253),
        (0.20, -0.0640, -0.32, -0.166585, -0.056000, -0.128366, -0.137229),
        (0.50, -0.1000, -0.20, -0.218218, -0.087500, -0.183595, -0.196272),
        (0.80, -0.0640, -0.08, -0.129671, -0.056000, -0.112088, -0.119827),
        (0.95, -0.0190, -0.02, -0.038030, -0.016625, -0.032999, -0.035277),
    ],
)
def test_lemma_3_1_values(q, joint, conditional, population, group, group_std, group_std_ddof_0):
    """r = .4, p = .1; those with std are given to six decimals."""
    case = (q, 0.4, 0.1)
    assert expected_advantage(*case) == near(joint, rel=1e-6)
    assert expected_advantage(*case, per="conditional") == near(conditional, rel=1e-6)
    assert expected_advantage(*case, std=True) == near(population, abs=6e-7)
    assert group_advantage(*case, size=8) == near(group, rel=1e-6)
    assert group_advantage(*case, size=8, std=True) == near(group_std, abs=6e-7)
    assert group_advantage(*case, size=8, std=True, ddof=0) == near(group_std_ddof_0, abs=6e-7)


@pytest.mark.parametrize(
    ("q", "r", "p", "options"),
    [
        (0.2, 0.4, 0.1, {}),
        (0.2, 0.4, 0.1, {"std": True}),
        (0.8, 0.4, 0.1, {"std": True, "ddof": 0}),
        (0.3, -0.3, 0.6, {"std": True, "size": 4}),
        (0.2, 0.1, 0.4, LONG_FAILURES),
        (0.5, 0.3, 0.4, {**LONG_FAILURES, "std": True}),
    ],
)
def test_lemma_3_1_sampled(q, r, p, options):
    mean, error = sampled_advantage(q, r, p, groups=200_000, seed=1, **options)
    assert error < 6e-4
    assert mean == near(float(group_advantage(q, r, p, **options)), abs=4 * error)


def test_lemma_3_1_with_the_repositorys_own_advantages():
    """group_normalise, as training uses it, on sampled groups of 8: the same expectation, with std."""
    random, groups = np.random.default_rng(2), 20_000
    flawed = random.random((groups, 8)) < 0.2
    won = torch.tensor(random.random((groups, 8)) >= 0.1 + 0.4 * flawed).flatten().float()
    advantage = losses.group_normalise(won, torch.arange(groups).repeat_interleave(8))
    each = (advantage.numpy().reshape(groups, 8) * flawed).mean(1)
    assert each.mean() == near(-0.128366, abs=4 * float(each.std()) / math.sqrt(groups))


def test_lemma_3_1_signs_and_edges():
    random = np.random.default_rng(0)
    for q, p, failure in random.random((200, 3)):
        r = failure - p
        for value in (expected_advantage(q, r, p), expected_advantage(q, r, p, std=True), group_advantage(q, r, p, 4)):
            assert np.sign(value) == -np.sign(r)
        assert expected_advantage(q, r, p) == near(float(expected_advantage(q, -r, p + r)) * -1)
        assert group_advantage(q, r, p, 4) == near(0.75 * -r * q * (1 - q))  # p cancels
    for value in (expected_advantage, group_advantage):
        for std in (False, True):
            assert value([0, 1, 0.3], 0.0, 0.2, std=std) == near(0, abs=1e-12)  # no risk
            assert value([0, 1], 0.4, 0.2, std=std) == near(0, abs=1e-12)  # no choice
    assert group_advantage(0.3, 1.0, 0.0, 1, std=True, ddof=0) == 0  # nothing to compare with
    for case in ((-0.1, 0.4, 0.1), (0.2, 0.95, 0.1), (0.2, -0.2, 0.1), (0.2, 0.0, 1.1)):
        with pytest.raises(ValueError, match="must lie in"):
            expected_advantage(*case)


def test_lemma_3_1_of_counts_is_their_covariance_with_success():
    """An action taken several times an episode: the mean of A times its count is the covariance, whatever the count."""
    random = np.random.default_rng(3)
    count = random.poisson(2, 1000)
    won = random.random(1000) < 0.9 / (1 + count)
    centred = won - won.mean()
    assert (centred * count).mean() == near(np.cov(won, count, ddof=0)[0, 1], rel=1e-9)
    assert (centred * count).mean() < -0.05


def test_flawed_actions_are_likelier_in_failures():
    failed, won = given_outcome(0.2, 0.4, 0.1)
    assert (failed, won) == (near(0.555556, abs=1e-6), near(0.121951, abs=1e-6))
    assert given_outcome(0.2, 0.0, 0.1) == (near(0.2), near(0.2))
    failed, won = given_outcome(0.2, -0.05, 0.1)
    assert failed < 0.2 < won


def test_baseline_over_steps_turns_the_sign_until_centred():
    case = (0.2, 0.1, 0.4)
    assert baseline_value(*case, **LONG_FAILURES) == near(0.315217, abs=1e-6)
    over_trajectories = {"baseline": "trajectory", "lengths": (10, 30)}
    assert baseline_advantage(*case, **over_trajectories) == near(-0.016, abs=1e-6)
    assert baseline_advantage(*case, **LONG_FAILURES) == near(0.036957, abs=1e-6)
    for way in (over_trajectories, LONG_FAILURES):
        assert baseline_advantage(*case, **way, centred=True) == near(-0.016, abs=1e-6)
    assert group_advantage(*case, **over_trajectories) == near(-0.014, rel=1e-9)  # 7/8 of -.016
    assert group_advantage(*case, **LONG_FAILURES) == near(0.03245, abs=4 * 1.1e-4)
    assert group_advantage(*case, size=64, **LONG_FAILURES) == near(0.036957, abs=1e-3)


# ---- Figure 4 ----


@pytest.mark.parametrize(
    ("r", "c", "low", "high", "from_80", "from_83"),
    [
        (0.2, 0.01, 0.05278641, 0.94721360, 0.052786, 0.052786),
        (0.2, 0.03, 0.18377223, 0.81622777, 0.183772, 1),
        (0.2, 0.04, 0.27639320, 0.72360680, 1, 1),
        (0.4, 0.05, 0.14644661, 0.85355339, 0.146447, 0.146447),
        (0.2, 0.06, None, None, 1, 1),
    ],
)
def test_constant_push_roots_and_ends(r, c, low, high, from_80, from_83):
    roots = fixed_points(r, c)
    assert roots is None if low is None else roots == (near(low, abs=1e-8), near(high, abs=1e-8))
    ends = constant_push([0.80, 0.83, 0.01, 0.6], r, c, 20_000)[-1]
    assert ends[:2] == near([from_80, from_83], abs=1e-4)
    if low is not None:
        assert ends[2:] == near([low, low], abs=1e-4)  # a rarer one rises to it, one above 0.5 is pulled back


def test_constant_push_at_the_largest_correction():
    assert fixed_points(0.2, 0.05) == (0.5, 0.5)
    ends = constant_push([0.2, 0.45, 0.55], 0.2, 0.05, 20_000)[-1]
    assert ends[:2] == near([0.5, 0.5], abs=2e-3)  # slowly, as 1/t, and from below alone
    assert ends[2] == near(1, abs=1e-4)
    for r, c in ((0.0, 0.1), (-0.2, 0.01), (0.2, -0.01)):
        with pytest.raises(ValueError):
            fixed_points(r, c)


def test_constant_push_border_is_the_upper_root():
    random = np.random.default_rng(0)
    for r in random.uniform(0.1, 0.9, 5):
        c = random.uniform(0.2, 0.8) * r / 4
        low, high = fixed_points(r, c)
        assert high > 0.5 and low + high == near(1) and r * low * (1 - low) == near(c)
        ends = constant_push([0.5, high - 0.01, high + 0.01], r, c, 8000, rate=4)[-1]
        assert ends == near([low, low, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("p", "r", "large", "small"),
    [(0, 0.05, 0.337, 0.49), (0.2, 0.1, 0.483, 0.49), (0.5, 0.1, 0.503, 0.50), (0.8, 0.2, 0.650, 0.53)],
)
def test_strongest_correction_moves_with_std(p, r, large, small):
    assert strongest_correction(r, p) == near(large, abs=6e-4)
    assert strongest_correction(r, p, size=8, points=1000) == near(small, abs=6e-3)


def test_strongest_correction_limits():
    assert strongest_correction(0.5, 0.5) == near(0.618, abs=6e-4)
    assert strongest_correction(1e-4, 0.0) == near(1 / 3, abs=2e-4)
    assert strongest_correction(1e-4, 1 - 1e-4) == near(2 / 3, abs=2e-4)
    q = np.linspace(0.01, 0.99, 99)
    assert q[np.abs(expected_advantage(q, 0.4, 0.1)).argmax()] == near(0.5)
    assert (np.diff(np.abs(expected_advantage(q, 0.4, 0.1, per="conditional"))) < 0).all()  # no maximum inside


# ---- Theorem 3.2 ----


def test_theorem_3_2_counterexample():
    """The printed inequality says that action 1 does not rise; it does."""
    probability, failure = three_actions(0.3, 0.4, 0.01, 0.2, 0.4)
    assert failure == near([0.41, 0.60, 0.1333333], rel=1e-6)
    advantage = advantages(probability, failure)
    assert advantage == near([-0.0021, -0.0788, 0.0809], rel=1e-6)  # -rq(1-q), qh(qr - rh), the rest
    assert squeeze(0.3, 0.4, 0.01, 0.2) == near(-0.00578, rel=1e-6)
    assert printed_inequality(0.3, 0.4, 0.01, 0.2) == near(-0.0178, rel=1e-6)
    assert policy_step(probability, advantage, 0.1)[0] - 0.3 == near(1.66863e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("q", "q_hat", "r", "r_hat", "p"),
    [
        (0.3, 0.4, 0.01, 0.2, 0.4),
        (0.3, 0.6, 0.01, 0.05, 0.5),
        (0.2, 0.3, 0.10, 0.2, 0.3),
        (0.45, 0.5, 0.01, 0.02, 0.5),
        (0.1, 0.1, 0.3, 0.5, 0.2),
    ],
)
def test_theorem_3_2_sign_of_a_step(q, q_hat, r, r_hat, p):
    probability, failure = three_actions(q, q_hat, r, r_hat, p)
    advantage = advantages(probability, failure)
    exact = squeeze(q, q_hat, r, r_hat)
    assert exact == near(float((probability * (advantage - advantage[0])).sum()), rel=1e-6)
    assert np.sign(policy_step(probability, advantage, 0.1)[0] - q) == -np.sign(exact)
    rises = (2 * q_hat + q - 1) * q_hat * r_hat > 2 * q * r * ((1 - q) ** 2 - q_hat * (1 - q) + q_hat**2)
    assert rises == (exact < 0)


def test_theorem_3_2_on_random_settings():
    q, q_hat, r, r_hat, p = settings = random_settings(100_000, seed=1)
    probability, failure = three_actions(*settings)
    assert failure.min() >= 0 and failure.max() <= 1
    advantage = advantages(probability, failure)
    exact, printed = squeeze(q, q_hat, r, r_hat), -(1 - q) * printed_inequality(q, q_hat, r, r_hat)
    for found, expected in (
        ((probability * failure)[:, 1:].sum(1), p * (1 - q)),  # p is failure without action 1
        (advantage.sum(1), 0),
        (advantage[:, 0], -r * q * (1 - q)),  # lemma 3.1
        (advantage[:, 1], q_hat * (q * r - r_hat)),
        (advantage[:, 2], (1 - q - q_hat) * q * r + q_hat * r_hat),
        (exact, (probability * (advantage - advantage[:, :1])).sum(1)),
        (exact - printed, 2 * q * q_hat**2 * (r - r_hat)),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert (q_hat[exact < 0] > (1 - q[exact < 0]) / 2).all()  # the paper's needs more than 1/2
    assert 0.02 < (exact < 0).mean() < 0.045  # rare
    assert 0.2 < (printed[exact < 0] > 0).mean() < 0.35  # of which the printed one misses a quarter
    assert 0.004 < ((exact > 0) & (printed < 0)).mean() < 0.012


def test_theorem_3_2_finite_steps_need_a_negative_rate_but_more():
    """However large the step, S >= 0 never lets p_1 rise; S < 0 does not ensure that it does."""
    q, q_hat, r, r_hat, _ = settings = random_settings(100_000, seed=2)
    probability, failure = three_actions(*settings)
    rate = 10 ** np.random.default_rng(2).uniform(-2, 2, (len(q), 1))
    change = policy_step(probability, advantages(probability, failure), rate)[:, 0] - q
    exact = squeeze(q, q_hat, r, r_hat)
    assert (change[exact >= 0] <= 1e-15).all()
    assert ((exact < -1e-9) & (change < -1e-9)).sum() > 100


def test_equation_11_asks_for_the_opposite():
    q, q_hat, r, r_hat, _ = settings = random_settings(10_000, seed=3)
    probability, failure = three_actions(*settings)
    advantage = advantages(probability, failure)
    change = policy_step(probability, advantage, 1.0)[:, 0] - q
    others = (probability * np.expm1(advantage - advantage[:, :1]))[:, 1:].sum(1)  # after less before, over e^z's sum
    clear = np.abs(change) > 1e-9
    assert (np.sign(change) == -np.sign(others))[clear].all() and (change > 1e-9).sum() > 100


def test_equation_12_is_no_bound_below_zero():
    x = np.linspace(-5, 0, 100, endpoint=False)
    assert (np.expm1(x) > math.e * x).all() and (np.expm1(x) >= x).all()
    assert math.expm1(1.75) < math.e * 1.75 and math.expm1(1.751) > math.e * 1.751


def test_gap_grows_in_log_odds_and_can_shrink_in_probabilities():
    probability, failure = three_actions(0.45, 0.5, 0.01, 0.02, 0.5)
    advantage = advantages(probability, failure)
    assert advantage[2] - advantage[0] == near(0.0127, rel=1e-6)
    change = policy_step(probability, advantage, 0.1) - probability
    assert change[2] - change[0] == near(-1.65e-5, abs=5e-8)
    q, q_hat, r, r_hat, _ = settings = random_settings(10_000, seed=4)
    advantage = advantages(*three_actions(*settings))
    expected = (2 - 2 * q - q_hat) * q * r + q_hat * r_hat  # equation 16
    np.testing.assert_allclose(advantage[:, 2] - advantage[:, 0], expected, rtol=0, atol=1e-12)
    assert (advantage[:, 2] > advantage[:, 0]).all()


def test_a_flawed_action_can_rise_for_long():
    path = policy_run((0.30, 0.69, 0.01), (0.30, 0.90, 0.10), 20_000)
    peak, step, back = rise_and_fall(path[:, 0])
    assert peak == near(0.99813, abs=1e-4)
    assert abs(step - 1862) <= 1 and abs(back - 4656) <= 1
    assert path[-1] == near([1.4e-4, 1.7e-5, 0.99985], rel=0.05)
    expected = policy_step(path[7], advantages(path[7], (0.30, 0.90, 0.10)), 1.0)
    assert path[8] == near(expected, rel=1e-9)


@pytest.mark.parametrize("whole", [True, False])
def test_equation_10_is_exact_only_where_advantages_sum_to_zero(whole):
    """Against autograd's step of a readout layer on eight samples of one state."""
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(4, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    hidden = torch.randn(6, dtype=torch.float64, generator=generator)
    action = torch.randint(4, (8,), generator=generator)
    reward = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)
    advantage = (reward - reward.mean()) / reward.std()
    if not whole:  # a later state, which some episodes do not reach
        action, advantage = action[:5], advantage[:5]
    logits = head @ hidden
    loss = (advantage * torch.log_softmax(logits, -1)[action]).sum()
    moved = torch.autograd.grad(loss, head)[0] @ hidden / hidden.dot(hidden)
    arguments = (logits.softmax(-1).detach().numpy(), action.numpy(), advantage.numpy())
    assert logit_change(*arguments) == near(moved.numpy(), abs=1e-14)
    assert (logit_change(*arguments, printed=True) == near(moved.numpy(), abs=1e-14)) == whole


# ---- Section 3.3 ----


@pytest.mark.parametrize(
    ("q2", "delta", "positives", "peak", "step", "back", "end_1", "end_2"),
    [
        (0.3, 0.0, 1, 0.3, 0, 1, 0.993224, 0.026698),
        (0.3, 0.2, 1, 0.3, 0, 1, 0.991595, 0.036301),
        (0.3, 0.3, 1, 0.329354, 117, 230, 0.990268, 0.042808),
        (0.3, 0.5, 1, 0.447600, 191, 539, 0.985566, 0.064690),
        (0.3, 0.8, 1, 0.790995, 547, 2024, 0.951666, 0.306419),
        (0.3, 0.3, 4, 0.686323, 217, 852, 0.993680, 0.073596),
        (0.02, 0.3, 1, 0.047893, 445, 3145, 0.991814, 0.028159),
        (0.1, 0.3, 1, 0.148536, 195, 649, 0.990887, 0.037890),
        (0.9, 0.3, 1, 0.949921, 433, 1442, 0.988154, 0.686676),
    ],
)
def test_two_samples_rise_and_fall(q2, delta, positives, peak, step, back, end_1, end_2):
    path = two_samples(0.3, q2, xi=4, delta=delta, positives=positives, steps=3200)
    top, at, below = rise_and_fall(path[:, 1])
    assert top == near(peak, abs=1e-4)
    assert abs(at - step) <= 1 and abs(below - back) <= 1
    assert path[2000] == near([end_1, end_2], abs=1e-4)
    rises = positives * delta * 4 * 0.3 * 0.7 > q2 * (1 - q2)
    assert rises == (path[1, 1] > path[0, 1])


def test_rise_and_fall_by_hand():
    assert rise_and_fall(np.array([0.3, 0.4, 0.5, 0.3, 0.2, 0.1])) == (0.5, 2, 4)  # at its start is not yet below
    assert rise_and_fall(np.array([0.3, 0.2, 0.3])) == (0.3, 0, 1)
    assert rise_and_fall(np.array([0.3, 0.4, 0.35])) == (0.4, 1, None)


@pytest.mark.parametrize(
    ("penalty", "delta", "end"),
    [(1, 0.5, 0.06469), (0.5, 0.5, 0.17052), (0, 0.5, 0.88796), (3, 0.5, 0.01874), (1, 0.2, 0.03630), (1, 0, 0.02670)],
)
def test_two_samples_interventions(penalty, delta, end):
    path = two_samples(0.3, 0.3, xi=4, delta=delta, penalty=penalty)[:, 1]
    assert path[-1] == near(end, abs=1e-4)
    assert (rise_and_fall(path)[2] is None) == (penalty == 0)  # without a penalty it never falls
    if penalty == 3:
        assert rise_and_fall(path)[1] == 0  # no rise at all


def test_two_samples_can_rise_later_and_high_starts_of_the_good_action_remove_the_rise():
    path = two_samples(0.3, 0.45, xi=2, delta=0.5)[:, 1]
    assert path[1] < path[0]
    assert any(path[step + 1] > path[step] for step in range(300))
    for q1 in (0.8, 0.95):
        assert rise_and_fall(two_samples(q1, 0.3, xi=4, delta=0.3)[:, 1])[1] == 0


def test_gap_of_two_samples_grows_in_logits_and_can_shrink_in_probabilities():
    for delta, shrinking in ((0.3, 0), (0.8, 22)):
        path = two_samples(0.3, 0.3, xi=4, delta=delta, steps=2500)
        gap = theory.logit(path[:, 0]) - theory.logit(path[:, 1])
        assert (np.diff(gap) > 0).all()
        assert (np.diff(path[:, 0] - path[:, 1]) < 0).sum() == shrinking
    path = two_samples(0.5, 0.3, xi=4, delta=1.2, steps=50)  # beyond the paper's delta <= 1
    assert (np.diff(theory.logit(path[:, 0]) - theory.logit(path[:, 1])) < 0).all()


def test_coupling_pulls_up_the_same_token_alone():
    """Learning at one state adds delta times its advantages to a similar one's logits: above 0 on the good token."""
    assert advantages([1 / 3, 1 / 3, 1 / 3], [0.1, 0.5, 0.5]) == near([0.0889, -0.0444, -0.0444], abs=1e-4)
    assert advantages([0.2, 0.8], [0.1, 0.5]) == near(0.2 * 0.8 * np.array([0.4, -0.4]))
    good, bad = advantages([0.3, 0.7], [0.0, 0.2])
    start, end = two_samples(0.3, 0.4, xi=1, delta=0.5, rate=1e-3, steps=1)
    moved = (theory.logit(end) - theory.logit(start)) / 1e-3
    assert moved == near([good - 0.5 * 0.2 * 0.4 * 0.6, 0.5 * good - 0.2 * 0.4 * 0.6], rel=1e-3)
    assert bad < 0 < good


# ---- Theorem A.1 ----


@pytest.mark.parametrize(
    ("q2", "xi_delta", "q1"), [(0.55, 4, 0.93373379), (0.55, 10, 0.97460510), (0.55, 2, 0.85531676)]
)
def test_theorem_a1_onset(q2, xi_delta, q1):
    assert falls_from(q2, xi_delta) == near(q1, abs=1e-7)
    assert falls(q1 + 1e-7, q2, xi_delta) and not falls(q1 - 1e-7, q2, xi_delta)
    with pytest.raises(ValueError, match="falls at any"):
        falls_from(q2, 0.9)


def test_theorem_a1_bounds():
    """Both bounds are necessary, the printed one is none; the tighter one is not sufficient."""
    random = np.random.default_rng(0)
    q2, q1 = np.sort(random.random((2, 400_000)), 0)  # q2 <= q1
    xi_delta = 10 ** random.uniform(-1, 1.5, len(q1))
    odds = np.exp(theory.logit(q1) - theory.logit(q2))
    onset, bounds = falls(q1, q2, xi_delta), odds_bounds(xi_delta)
    assert onset.sum() > 100_000
    assert (odds >= np.maximum(bounds["tightened"], bounds["derived"]) * (1 - 1e-9))[onset].all()
    assert (odds < bounds["printed"])[onset].sum() > 10_000
    assert (odds > bounds["tightened"])[~onset].sum() > 10_000
    likely = (q2 > 0.5) & (xi_delta <= 1)
    assert onset[likely].all()  # nothing to wait for where xi delta <= 1


def test_theorem_a1_while_both_move():
    path = two_samples(0.7, 0.6, xi=20, delta=0.3, rate=1e-3, steps=10_000)
    at = int(np.argmax(falls(path[:, 0], path[:, 1], 6)))
    assert path[at] == near([0.96335, 0.69537], abs=1e-4)
    odds = path[at, 0] / (1 - path[at, 0]) / (0.7 / 0.3)  # h_1 against its start
    start = (0.6 / 0.4) / (0.7 / 0.3)  # exp(dz^), the flawed action's odds over the good one's
    least = {name: float(bound) * start for name, bound in odds_bounds(6).items()}
    assert odds == near(11.266, abs=2e-3)
    assert least == {
        "derived": near(1.575, abs=1e-3),
        "tightened": near(3.857, abs=1e-3),
        "printed": near(12.912, abs=1e-3),
    }
    assert least["derived"] < least["tightened"] < odds < least["printed"]
    assert path[:, 1].argmax() == near(at, abs=1)  # what `falls` says is what happens


# ---- Equation 2 and NTHR: what other files leave open ----


def random_responses(seed, lengths, vocabulary=7, width=5):
    """Draw responses of these lengths: (head [V, H], hidden [T, H], tokens [T], error [T, V], sample [T]), float64."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    hidden = torch.randn(sum(lengths), width, dtype=torch.float64, generator=generator)
    token = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    error = torch.nn.functional.one_hot(token, vocabulary) - (hidden @ head.T).softmax(-1)
    return head, hidden, token, error, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def test_equation_2_is_the_output_layers_share():
    """Exact for the output layer, to first order; the layer below adds terms that equation 2 leaves out."""
    head, inputs, token, _, row = random_responses(0, (4, 3))
    body = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def log_prob(body, head, which):
        logits = (inputs[row == which] @ body.T).tanh() @ head.T
        return torch.log_softmax(logits, -1).gather(1, token[row == which][:, None]).sum()

    hidden = (inputs @ body.T).tanh()
    error = torch.nn.functional.one_hot(token, 7) - (hidden @ head.T).softmax(-1)
    found = coupling.coupling(hidden[row == 0], error[row == 0], hidden[row == 1], error[row == 1])
    weights = [body.requires_grad_(), head.requires_grad_()]
    first, second = (torch.autograd.grad(log_prob(*weights, which), weights) for which in (0, 1))
    assert found == near(float((first[1] * second[1]).sum()), rel=1e-10)
    assert abs(float((first[0] * second[0]).sum())) > 0.1 * abs(found)
    slope = (log_prob(body, head + 1e-5 * first[1], 1) - log_prob(body, head - 1e-5 * first[1], 1)) / 2e-5
    assert abs(slope.item() / found - 1) < 1e-5


def test_equation_2_of_the_definition():
    """alpha <h, h'> over all pairs of tokens, written out; symmetric; its own influence is not negative."""
    _, hidden, _, error, row = random_responses(3, (4, 3))
    h, e = (hidden[row == 0], hidden[row == 1]), (error[row == 0], error[row == 1])
    expected = sum(float((e[0][k] @ e[1][m]) * (h[0][k] @ h[1][m])) for k in range(4) for m in range(3))
    assert coupling.coupling(h[0], e[0], h[1], e[1]) == near(expected, rel=1e-10)
    assert coupling.coupling(h[1], e[1], h[0], e[0]) == near(expected, rel=1e-10)
    assert coupling.coupling(h[0], e[0], h[0], e[0]) > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wins", [(1, 1, 0, 0), (1, 0, 0, 0)])
def test_nthr_weakens_the_lost_responses_selected_tokens_alone(seed, wins):
    _, hidden, _, error, row = random_responses(seed, (4, 3, 3, 2))
    won = torch.tensor(wins, dtype=torch.bool)[row]
    factor, found = baselines.nthr_weights(hidden, error.__getitem__, row, won, beta=0.3, eta=0.25)
    influence = torch.stack(
        [
            sum((g @ e) * (h @ x) for g, h in zip(error[won], hidden[won], strict=True))
            for e, x in zip(error, hidden, strict=True)
        ]
    )
    means = [influence[row == one].mean() for one in range(4) if wins[one]]
    assert found["tau"] == near(0.3 * float(min(means)), rel=1e-5)
    selected = ~won & (influence > found["tau"])
    assert factor.tolist() == torch.where(selected, 0.25, 1.0).tolist()
    assert found["selected"] == int(selected.sum())
    for alike in (won | True, won & False):
        assert baselines.nthr_weights(hidden, error.__getitem__, row, alike, beta=0.3, eta=0.25)[0].eq(1).all()


# ---- The command ----


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["theory.py", "--out", str(tmp_path / "figures")])
    theory.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 160
    text = " ".join(" ".join(line.split()) for line in lines)
    for number in ("-0.0640", "0.5556", "0.99813", "+0.036957", "0.93373", "1.7508", "0.1705"):
        assert number in text
    numbers = json.loads((tmp_path / "figures" / "figure_4.json").read_text())
    assert (numbers["q-"], numbers["q+"]) == (near(0.18377223, abs=1e-8), near(0.81622777, abs=1e-8))
    assert {start["after 20000 steps"] > 0.99 for start in numbers["starts"].values()} == {True, False}
    assert (tmp_path / "figures" / "figure_4.png").read_bytes().startswith(b"\x89PNG")

"""losses.py against values worked by hand (in the comments), and against the properties its docstrings promise."""

import doctest
import math
import statistics

import pytest
import torch

import losses
from config import AlgoConfig
from losses import (
    SampleBatch,
    advantages,
    aggregate,
    anchors,
    cispo,
    discounted_returns,
    gigpo,
    group_normalise,
    grpo,
    gspo,
    importance_weights,
    judge_advantage,
    kl,
    ppo,
    ppo_clip,
    rlvmr,
    scores,
)

EPS = 1e-6


def tensor(*values):
    return torch.tensor(values)


def assert_close(actual, expected, tolerance=1e-6):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=tolerance, atol=tolerance)


def batch(score, group, trajectory, **others):
    """A SampleBatch from lists; reward and invalid are 0 unless given."""
    fields = {"reward": [0.0] * len(score), "invalid": [0] * len(score)} | others
    fields |= {"score": score, "group": group, "trajectory": trajectory}
    return SampleBatch(**{f"{name}_N": torch.tensor(values) for name, values in fields.items()})


def random_samples(seed):
    """Groups of 4 episodes of 1 to 6 steps, their samples interleaved at random; ids neither sorted nor contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    episodes = [(group, 100 - 7 * group + member) for group in (5, -3, 88) for member in range(4)]
    length = {episode: draw(1, 7) for episode in episodes}
    won = {episode: draw(0, 2) for episode in episodes}
    slots = [episode for episode in episodes for _ in range(length[episode])]
    slots = [slots[index] for index in torch.randperm(len(slots), generator=generator)]
    seen = dict.fromkeys(episodes, 0)
    reward, anchor = [], []
    for episode in slots:
        seen[episode] += 1
        reward.append(10.0 * won[episode] * (seen[episode] == length[episode]))
        anchor.append(1000 * episode[0] + draw(0, 3))
    group, trajectory = tensor(*[g for g, _ in slots]), tensor(*[t for _, t in slots])
    invalid = tensor(*[draw(0, 2) for _ in slots])
    return SampleBatch(
        score_N=scores(torch.tensor(reward), trajectory, invalid, 0.1),
        group_N=group,
        trajectory_N=trajectory,
        reward_N=torch.tensor(reward),
        invalid_N=invalid,
        anchor_N=torch.tensor(anchor),
        tag_N=tensor(*[draw(0, 4) for _ in slots]),
        tag_reward_N=tensor(*[float(draw(0, 2)) for _ in slots]),
    )


def published(samples, cfg):
    """grpo, gigpo and rlvmr as their code does it, sample by sample in Python floats; singletons and eps included."""
    score, reward, invalid, tag_reward = (
        [float(value) for value in getattr(samples, f"{name}_N")]
        for name in ("score", "reward", "invalid", "tag_reward")
    )
    group, trajectory, anchor, tag = (
        getattr(samples, f"{name}_N").tolist() for name in ("group", "trajectory", "anchor", "tag")
    )
    count = range(len(score))

    def normalise(value, key, lone_is_zero, first_samples=False):
        result = []
        for i in count:
            same = [j for j in count if key[j] == key[i]]
            if first_samples:
                same = [j for j in same if not any(k < j and trajectory[k] == trajectory[j] for k in same)]
            of = [value[j] for j in same]
            mean, std = (0.0, 1.0) if len(of) == 1 else (statistics.fmean(of), statistics.stdev(of))
            if len(of) == 1 and lone_is_zero:
                mean = of[0]
            if max(of) == min(of) and len(of) > 1:  # the float32 trap, see the file's opening
                mean, std = of[0], 1.0
            result.append((value[i] - mean) / (std + 1e-6 if cfg.divide_by_std else 1.0))
        return result

    episode = normalise(score, group, False, cfg.stats_over == "trajectories")
    if cfg.advantage == "grpo":
        return episode
    if cfg.advantage == "rlvmr":
        step = normalise(tag_reward, list(zip(group, tag, strict=True)), False)
    else:
        returns = []
        for i in count:
            later = [reward[j] for j in count if j >= i and trajectory[j] == trajectory[i]]
            returns.append(sum(cfg.gamma**n * r for n, r in enumerate(later)) - cfg.invalid_penalty * invalid[i])
        step = normalise(returns, list(zip(group, anchor, strict=True)), True)
    return [a + cfg.step_weight * b for a, b in zip(episode, step, strict=True)]


def test_examples_in_docstrings():
    result = doctest.testmod(losses)
    assert result.attempted >= 4 and result.failed == 0


# -------------------------------------------------------------------------------------------------- samples and returns


def test_sample_batch_names_the_fields_whose_lengths_differ():
    with pytest.raises(ValueError, match="group_N") as error:
        batch([1.0, 2.0, 3.0], [0, 0], [1, 1, 1], anchor=[0])
    assert "anchor_N" in str(error.value) and "reward_N" not in str(error.value)


def test_sample_batch_rejects_matrices_and_ids_that_are_not_integers():
    with pytest.raises(ValueError, match="score_N"):
        SampleBatch(
            **{f"{name}_N": torch.zeros(1, 2) for name in ("score", "group", "trajectory", "reward", "invalid")}
        )
    with pytest.raises(ValueError, match="trajectory_N.*integers"):
        batch([1.0], [0], [1.0])


def test_sample_batch_rejects_a_trajectory_in_two_groups():
    with pytest.raises(ValueError, match="two groups"):
        batch([1.0, 2.0, 3.0], [0, 0, 1], [7, 8, 7])


def test_scores_are_the_whole_return_minus_the_samples_own_penalty():
    # trajectory 4 earns 10 in all, trajectory 9 nothing
    actual = scores(tensor(0.0, 0.0, 10.0, 0.0), tensor(4, 9, 4, 9), tensor(1, 0, 0, 1), 0.1)
    assert_close(actual, [9.9, 0.0, 10.0, -0.1])


def test_discounted_returns_keep_interleaved_trajectories_apart():
    # trajectory 30: rewards 1, 0, 4 at samples 0, 2, 4: 4; 0 + 2; 1 + 1.  trajectory -2: rewards 8, 2: 2; 8 + 1
    actual = discounted_returns(tensor(1.0, 8.0, 0.0, 2.0, 4.0), tensor(30, -2, 30, -2, 30), 0.5)
    assert_close(actual, [2.0, 9.0, 2.0, 2.0, 4.0])


def test_discounted_returns_of_a_won_and_a_lost_episode():
    # won in T = 4 steps: 10 * .95^(T - 1 - t)
    reward, trajectory = tensor(0.0, 0.0, 0.0, 10.0, 0.0, 0.0), tensor(1, 1, 1, 1, 2, 2)
    assert_close(discounted_returns(reward, trajectory, 0.95), [8.57375, 9.025, 9.5, 10.0, 0.0, 0.0])
    assert_close(discounted_returns(reward, trajectory, 0.0), [0.0, 0.0, 0.0, 10.0, 0.0, 0.0])


# ----------------------------------------------------------------------------------------------------- group_normalise


def test_group_normalise_uneven_groups():
    # key 7: 10, 0, 0: mean 10/3, squares (400 + 100 + 100)/9 = 200/3, over 2: 100/3, std 5.7735027
    # key 2: 1, 3: mean 2, std sqrt(2)
    actual = group_normalise(tensor(10.0, 1.0, 0.0, 3.0, 0.0), tensor(7, 2, 7, 2, 7))
    assert_close(actual, [1.1547005, -0.7071068, -0.5773503, 0.7071068, -0.5773503])


def test_group_normalise_without_division():
    assert_close(
        group_normalise(tensor(10.0, 0.0, 0.0), tensor(7, 7, 7), divide_by_std=False), [20 / 3, -10 / 3, -10 / 3]
    )


def test_group_normalise_adds_eps_to_the_std():
    # 1, 3: std sqrt(2), deviations -1, 1
    actual = group_normalise(tensor(1.0, 3.0), tensor(0, 0), eps=1.0)
    assert_close(actual, [-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)])


@pytest.mark.parametrize("divide", [True, False])
def test_group_normalise_singletons(divide):
    value, key = tensor(9.9, 0.0, 2.0), tensor(1, 2, 3)
    raw = group_normalise(value, key, divide, singleton="raw")
    assert_close(raw, [9.9 / (1 + EPS), 0.0, 2 / (1 + EPS)] if divide else [9.9, 0.0, 2.0], tolerance=1e-7)
    assert group_normalise(value, key, divide, singleton="zero").tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 8, 240])
def test_equal_values_give_exactly_zero(divide, dtype, size):
    # in float32 the mean of eight 9.9 is off by one ulp and the std is as small, see the next test
    values = [9.9, 10.0, 0.0, -0.1, *(10 * 0.95**k for k in range(30))]
    value = torch.tensor(values, dtype=dtype).repeat(size)
    key = torch.arange(len(values)).repeat(size)
    assert group_normalise(value, key, divide).eq(0).all()


def test_the_float32_trap_is_real():
    value = torch.full((8,), 9.9)
    naive = (value - value.mean()) / (value.std() + EPS)
    assert naive.abs().max() > 0.1  # the test above guards against this


def test_a_tie_in_one_group_leaves_the_others_alone():
    actual = group_normalise(tensor(9.9, 1.0, 9.9, 3.0), tensor(0, 1, 0, 1))
    assert_close(actual, [0.0, -0.7071068, 0.0, 0.7071068])


def test_statistics_over_the_first_sample_of_each_trajectory():
    # first samples -0.1 (trajectory 5) and 10 (trajectory 4): mean 4.95, std 10.1/sqrt(2) = 7.1417785
    value = tensor(-0.1, 10.0, 0.0, 9.9, 0.0)
    actual = group_normalise(value, torch.zeros(5, dtype=torch.long), trajectory_N=tensor(5, 4, 5, 4, 5))
    assert_close(actual, [-0.7071068, 0.7071068, -0.6931046, 0.6931046, -0.6931046])


def test_first_samples_are_counted_per_key_and_trajectory():
    # trajectory 1 has samples under both keys, and a first one under each.  key 0: 1, 3; key 1: 5, 9: +-1/sqrt(2)
    value, key, trajectory = tensor(1.0, 5.0, 3.0, 9.0), tensor(0, 1, 0, 1), tensor(1, 1, 2, 2)
    actual = group_normalise(value, key, trajectory_N=trajectory)
    assert_close(actual, [-0.7071068, -0.7071068, 0.7071068, 0.7071068])


def test_equal_first_samples_never_divide_a_later_penalty_by_zero():
    # both episodes won, the last sample was invalid: it keeps its -0.1, where -0.1/1e-6 would be -1e5
    value, trajectory = tensor(10.0, 10.0, 10.0, 9.9), tensor(0, 1, 0, 1)
    actual = group_normalise(value, torch.zeros(4, dtype=torch.long), trajectory_N=trajectory)
    assert actual[:3].tolist() == [0.0, 0.0, 0.0]
    assert_close(actual[3:], [-0.1])


def test_group_normalise_of_nothing_and_its_errors():
    nothing = torch.zeros(0)
    assert group_normalise(nothing, nothing.long()).shape == (0,)
    assert discounted_returns(nothing, nothing.long(), 0.9).shape == (0,)
    with pytest.raises(ValueError, match="key_N"):
        group_normalise(tensor(1.0, 2.0), tensor(1), trajectory_N=tensor(1, 1))


# ---------------------------------------------------------------------------------------------------------- advantages


def test_grpo_over_step_samples_weighs_long_episodes_more():
    # a win of 2 steps and a loss of 4, one of them invalid: s = 10, 10, -.1, 0, 0, 0
    # steps: mean 19.9/6 = 3.3166667, squares 200.01 - 6 * 3.3166667^2 = 134.0083333, over 5: std 5.1770326
    samples = batch([10.0, 10.0, -0.1, 0.0, 0.0, 0.0], [3] * 6, [1, 1, 2, 2, 2, 2])
    win, invalid, loss = 6.6833333 / 5.1770326, -3.4166667 / 5.1770326, -3.3166667 / 5.1770326
    assert_close(grpo(samples, AlgoConfig()), [win, win, invalid, loss, loss, loss])
    # trajectories: first samples 10 and -.1: mean 4.95, std 7.1417785
    win, invalid, loss = 5.05 / 7.1417785, -5.05 / 7.1417785, -4.95 / 7.1417785
    assert_close(grpo(samples, AlgoConfig(stats_over="trajectories")), [win, win, invalid, loss, loss, loss])
    mean = 19.9 / 6  # Dr. GRPO
    centred = [10 - mean, 10 - mean, -0.1 - mean, -mean, -mean, -mean]
    assert_close(grpo(samples, AlgoConfig(divide_by_std=False)), centred)


def test_grpo_keeps_the_score_of_a_lone_trajectory_with_one_sample_per_trajectory():
    samples = batch([10.0, 9.9], [3, 3], [1, 1])
    assert_close(grpo(samples, AlgoConfig(stats_over="trajectories")), [10 / (1 + EPS), 9.9 / (1 + EPS)])


def repeated_observation(**others):
    """Episode 1 sees x, y, x and wins; episode 2 sees x, y, z and loses.  x = 50, y = 60, z = 70."""
    return batch(
        [10.0, 10.0, 10.0, 0.0, 0.0, 0.0],
        [0] * 6,
        [1, 1, 1, 2, 2, 2],
        reward=[0.0, 0.0, 10.0, 0.0, 0.0, 0.0],
        anchor=[50, 60, 50, 50, 60, 70],
        **others,
    )


def test_gigpo_compares_visits_of_one_observation_even_within_one_trajectory():
    # gamma .5: G = 2.5, 5, 10, 0, 0, 0
    # x: 2.5, 10, 0: mean 25/6, deviations -10/6, 35/6, -25/6, squares 1950/36, over 2: std 5.2041650
    # y: 5, 0: mean 2.5, std 5/sqrt(2).  z is seen once: 0
    # episodes: 10 x 3, 0 x 3: mean 5, squares 150, over 5: std 5.4772256: +-.9128709
    step = [-0.3202563, 0.7071068, 1.1208971, -0.8006408, -0.7071068, 0.0]
    episode = [0.9128709] * 3 + [-0.9128709] * 3
    samples = repeated_observation()
    assert_close(gigpo(samples, AlgoConfig(gamma=0.5)), [e + s for e, s in zip(episode, step, strict=True)])
    assert_close(
        gigpo(samples, AlgoConfig(gamma=0.5, step_weight=0.25)), [e + s / 4 for e, s in zip(episode, step, strict=True)]
    )


def test_gigpo_mean_norm_and_its_invalid_penalty():
    # sample 1 and sample 3 invalid: G = 2.5, 5 - .1, 10, -.1, 0, 0
    # x: 2.5, 10, -.1: mean 4.1333333.  y: 4.9, 0: mean 2.45.  z: 0.  episodes (score untouched here): +-5
    samples = repeated_observation(invalid=[0, 1, 0, 1, 0, 0])
    step = [2.5 - 12.4 / 3, 2.45, 10 - 12.4 / 3, -0.1 - 12.4 / 3, -2.45, 0.0]
    expected = [e + s for e, s in zip([5.0] * 3 + [-5.0] * 3, step, strict=True)]
    assert_close(gigpo(samples, AlgoConfig(gamma=0.5, divide_by_std=False)), expected)


def test_gigpo_statistics_over_trajectories_change_the_episode_part_alone():
    samples = random_samples(3)
    for_steps, for_trajectories = (AlgoConfig(stats_over=over) for over in ("steps", "trajectories"))
    difference = gigpo(samples, for_trajectories) - gigpo(samples, for_steps)
    torch.testing.assert_close(
        difference, grpo(samples, for_trajectories) - grpo(samples, for_steps), rtol=0, atol=1e-5
    )


def test_gigpo_keeps_groups_apart_and_needs_anchors():
    # two groups that reuse anchor id 1: every anchor group has one sample, so the step part is 0
    shared = batch([10.0, 0.0], [0, 1], [1, 2], reward=[10.0, 0.0], anchor=[1, 1])
    assert_close(gigpo(shared, AlgoConfig()), [10 / (1 + EPS), 0.0])
    with pytest.raises(ValueError, match="anchor_N"):
        gigpo(batch([1.0], [0], [0]), AlgoConfig())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["grpo", "gigpo", "rlvmr"])
@pytest.mark.parametrize("over", ["steps", "trajectories"])
@pytest.mark.parametrize("divide", [True, False])
def test_advantages_equal_the_published_code(seed, method, over, divide):
    cfg = AlgoConfig(advantage=method, stats_over=over, divide_by_std=divide, step_weight=0.7)
    assert_close(advantages(random_samples(seed), cfg), published(random_samples(seed), cfg), tolerance=5e-6)


def test_rlvmr_normalises_tag_rewards_within_group_and_tag():
    # scores equal: 0.  tag 1 of group 0: 1, 0, 0: mean 1/3, std 1/sqrt 3: 1.1547, -.5774 x 2; tag 2 a singleton: raw 1;
    # group 7's tag 1, all 1: 0
    samples = batch(
        [5.0] * 6, [0, 0, 0, 0, 7, 7], [0, 0, 1, 1, 2, 3], tag=[1, 1, 1, 2, 1, 1], tag_reward=[1.0, 0, 0, 1, 1, 1]
    )
    assert_close(rlvmr(samples, AlgoConfig()), [1.1547005, -0.5773503, -0.5773503, 1.0, 0.0, 0.0], tolerance=1e-5)
    assert_close(rlvmr(samples, AlgoConfig(divide_by_std=False, step_weight=3)), [2.0, -1.0, -1.0, 3.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="tag_N"):
        rlvmr(batch([1.0], [0], [0]), AlgoConfig())


def test_anchors_are_equal_observations_of_one_group():
    texts = ["abcdefghij", "abcdefghiZ", "abcdefghij", "abcdefgYXZ", "abcdefghij"]
    assert anchors(texts, tensor(4, 4, 4, 4, 9)).tolist() == [0, 1, 0, 2, 3]
    with pytest.raises(ValueError, match="2 observations"):
        anchors(["a", "b"], tensor(1))


def test_ppo_is_the_score_itself():
    assert_close(advantages(batch([9.9, -0.1], [0, 1], [0, 1]), AlgoConfig(advantage="ppo")), [9.9, -0.1])
    assert ppo in losses.ADVANTAGES.values()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["grpo", "gigpo"])
@pytest.mark.parametrize("over", ["steps", "trajectories"])
def test_advantages_do_not_depend_on_the_order_of_samples(seed, method, over):
    """Any order that keeps each trajectory's time order permutes the advantages and changes nothing else."""
    samples, cfg = random_samples(seed), AlgoConfig(advantage=method, stats_over=over)
    generator = torch.Generator().manual_seed(seed)
    slots = samples.trajectory_N[torch.randperm(len(samples.score_N), generator=generator)]
    order = torch.empty_like(slots)
    for trajectory in slots.unique():  # a trajectory's samples fill its slots in time order
        order[slots == trajectory] = (samples.trajectory_N == trajectory).nonzero().squeeze(1)
    fields = {name: value for name, value in vars(samples).items() if value is not None}
    shuffled = SampleBatch(**{name: value[order] for name, value in fields.items()})
    torch.testing.assert_close(advantages(shuffled, cfg), advantages(samples, cfg)[order], rtol=1e-6, atol=1e-6)
    assert torch.equal(advantages(samples, cfg), advantages(samples, cfg))


@pytest.mark.parametrize("method", ["grpo", "gigpo"])
def test_advantages_do_not_depend_on_the_values_of_ids(method):
    samples, cfg = random_samples(1), AlgoConfig(advantage=method)
    fields = {name: value for name, value in vars(samples).items() if value is not None}
    renamed = {name: 1_000_003 * fields[name] - 17 for name in ("group_N", "trajectory_N", "anchor_N")}
    torch.testing.assert_close(advantages(SampleBatch(**fields | renamed), cfg), advantages(samples, cfg))


def test_judge_advantage_groups_by_question():
    # question 8: 1, 0, 0, 0: mean 1/4, squares 3/4, over 3: std 1/2: 1.5, -.5 x 3.  question 2: all right: 0
    actual = judge_advantage(tensor(1.0, 1.0, 0.0, 0.0, 1.0, 0.0), tensor(8, 2, 8, 8, 2, 8), AlgoConfig())
    assert_close(actual, [1.5, 0.0, -0.5, -0.5, 0.0, -0.5], tolerance=1e-5)


# ------------------------------------------------------------------------------------------------------- policy losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "has_gradient"),
    [
        (1.0, 2.0, None, -2.0, True),  # on policy
        (1.1, 2.0, None, -2.2, True),  # inside the clip range
        (1.5, 2.0, None, -2.6, False),  # above it: max(-3, -2 * 1.3)
        (0.5, 2.0, None, -1.0, True),  # below it, the step back is allowed: max(-1, -1.6)
        (1.5, -2.0, None, 3.0, True),  # above it, likewise: max(3, 2.6)
        (0.5, -2.0, None, 1.6, False),  # below it: max(1, 2 * .8)
        (5.0, -2.0, None, 10.0, True),  # without a bound
        (5.0, -2.0, 3.0, 6.0, False),  # dual clip: min(10, 3 * 2)
        (2.5, -2.0, 3.0, 5.0, True),  # not reached
        (5.0, 2.0, 3.0, -2.6, False),  # does not concern positive advantages
        (5.0, 0.0, 3.0, 0.0, None),  # no advantage, no loss
    ],
)
def test_ppo_clip_branches(ratio, advantage, dual, loss, has_gradient):
    cfg = AlgoConfig(clip_low=0.2, clip_high=0.3, dual_clip=dual)
    old_logp = tensor(-1.5)
    logp = (old_logp + math.log(ratio)).requires_grad_()
    actual, metrics = ppo_clip(logp, old_logp, tensor(advantage), tensor(0), cfg)
    assert_close(actual.detach(), [loss], tolerance=1e-5)
    actual.sum().backward()
    expected = -advantage * ratio if has_gradient else 0.0  # d(-A r)/d logp = -A r
    assert_close(logp.grad, [expected], tolerance=1e-5)
    assert float(metrics["clip_fraction"]) == float(has_gradient is False)


def test_ppo_clip_metrics():
    # ratios 1, 2, .5, 1 with A = 1, 1, 1, -1: only the second is clipped; k3 = r - 1 - log r
    logp = torch.tensor([0.0, math.log(2), -math.log(2), 0.0], requires_grad=True)
    _, metrics = ppo_clip(logp, torch.zeros(4), tensor(1.0, 1.0, 1.0, -1.0), torch.zeros(4).long(), AlgoConfig())
    assert not any(value.requires_grad for value in metrics.values())
    assert {name: pytest.approx(float(value)) for name, value in metrics.items()} == {
        "ratio": 4.5 / 4,
        "clip_fraction": 0.25,
        "approx_kl": ((1 - math.log(2)) + (-0.5 + math.log(2))) / 4,
    }


def test_ppo_clip_survives_extreme_ratios():
    logp = torch.tensor([0.0, 0.0, -500.0, -500.0], requires_grad=True)
    old_logp = tensor(-500.0, -500.0, 0.0, 0.0)
    loss, metrics = ppo_clip(logp, old_logp, tensor(1.0, -1.0, 1.0, -1.0), torch.arange(4), AlgoConfig())
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()
    assert all(math.isfinite(value) for value in metrics.values())


def test_ppo_clip_takes_old_log_probs_as_constants():
    logp = torch.zeros(1, requires_grad=True)
    ppo_clip(logp, logp, tensor(2.0), tensor(0), AlgoConfig())[0].sum().backward()
    assert_close(logp.grad, [-2.0])


def test_ppo_clip_names_the_lengths_that_differ():
    with pytest.raises(ValueError, match="advantage_T"):
        ppo_clip(torch.zeros(3), torch.zeros(3), torch.zeros(2), torch.zeros(3).long(), AlgoConfig())


def test_kl_estimators():
    # d = ref - logp = .5, -1, 0
    logp, reference = tensor(-1.0, -1.0, -2.0), tensor(-0.5, -2.0, -2.0)
    assert_close(kl(logp, reference, "k1"), [-0.5, 1.0, 0.0])
    assert_close(kl(logp, reference, "k2"), [0.125, 0.5, 0.0])
    assert_close(kl(logp, reference, "k3"), [math.exp(0.5) - 1.5, math.exp(-1), 0.0])
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl(logp, reference, "k4")


def test_k3_is_clamped_with_finite_gradients():
    # d = 1000, 30, 3, -3, -30, -1000.  exp(3) - 4 = 16.1 > 10; exp(-3) + 2 = 2.0498 with gradient 1 - exp(-3)
    logp = torch.tensor([-1000.0, -30.0, -3.0, 3.0, 30.0, 1000.0], requires_grad=True)
    loss = kl(logp, torch.zeros(6), "k3")
    assert_close(loss.detach(), [10.0, 10.0, 10.0, math.exp(-3) + 2, 10.0, 10.0])
    loss.sum().backward()
    assert_close(logp.grad, [0.0, 0.0, 0.0, 1 - math.exp(-3), 0.0, 0.0])


def test_expected_estimates_are_the_divergence():
    policy, reference = tensor(0.7, 0.2, 0.1), tensor(0.5, 0.3, 0.2)
    divergence = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy * kl(policy.log(), reference.log(), estimator)).sum()
        torch.testing.assert_close(estimate, divergence)


def test_gspo_has_one_ratio_a_sample():
    # sample 3: log-ratios 0, ln 4: ratio 2; sample 1: ln 1.1.  A = 1, clip at 1.3: -1.3, -1.3, without gradient; -1.1
    cfg = AlgoConfig(clip_low=0.3, clip_high=0.3)
    old = tensor(-1.0, -2.0, -3.0)
    logp = (old + tensor(0.0, math.log(1.1), math.log(4))).requires_grad_()
    loss, metrics = gspo(logp, old, tensor(1.0, 1.0, 1.0), tensor(3, 1, 3), cfg)
    assert_close(loss.detach(), [-1.3, -1.1, -1.3])
    loss.sum().backward()
    assert_close(logp.grad, [0.0, -1.1, 0.0])
    assert float(metrics["clip_fraction"]) == pytest.approx(2 / 3)
    # A = -1: max(2, 1.3) = 2 for both tokens; each token's gradient is 2 / 2 from either
    logp.grad = None
    loss, _ = gspo(logp, old, tensor(-1.0, -1.0, -1.0), tensor(3, 1, 3), cfg)
    assert_close(loss.detach(), [2.0, 1.1, 2.0])
    loss.sum().backward()
    assert_close(logp.grad, [2.0, 1.1, 2.0])
    # advantages by token stay with their tokens
    logp.grad = None
    loss, _ = gspo(logp, old, tensor(-1.0, -1.0, -4.0), tensor(3, 1, 3), cfg)
    assert_close(loss.detach(), [2.0, 1.1, 8.0])
    loss.sum().backward()
    assert_close(logp.grad, [2.0, 1.1, 8.0])


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    # ratios 1.5, .5, 1 with clips of .2: weights 1.2, .8, 1
    cfg, old = AlgoConfig(), tensor(-1.0, -2.0, -3.0)
    logp = (old + tensor(1.5, 0.5, 1.0).log()).requires_grad_()
    loss, metrics = cispo(logp, old, tensor(1.0, 1.0, -2.0), tensor(0, 0, 0), cfg)
    assert_close(loss.detach(), [1.2 * (1 - math.log(1.5)), 0.8 * (2 + math.log(2)), -6.0])
    loss.sum().backward()
    assert_close(logp.grad, [-1.2, -0.8, 2.0])
    assert float(metrics["clip_fraction"]) == pytest.approx(2 / 3) and float(metrics["ratio"]) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------- importance weights


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [1, 1, 1, 1]),
        ("truncate", [1, 2, 0.25, 1.2]),  # ratios 1, 3, 1/4, 1.2
        ("mask", [1, 0, 0, 1.2]),
    ],
)
def test_importance_weights_by_hand(how, expected):
    trainer = (tensor(1.0, 3.0, 0.25, 1.2).log() - 2).requires_grad_()
    weights = importance_weights(trainer, tensor(-2.0, -2.0, -2.0, -2.0), how)
    assert_close(weights, [float(value) for value in expected])
    assert not weights.requires_grad


def test_importance_weights_of_far_apart_log_probs():
    far = importance_weights(tensor(0.0, -1e4), tensor(-1e4, 0.0), "truncate")
    assert_close(far, [2.0, math.exp(-losses.MAX_LOG_RATIO)])


# --------------------------------------------------------------------------------------------------------- aggregation

LOSS, SAMPLE = tensor(1.0, 3.0, 8.0, 0.0, 0.0, 3.0), tensor(5, 5, 2, 9, 9, 9)
DENOMINATORS = (6, 3, 10)  # tokens, samples, the longest reply allowed


def test_aggregate_by_hand():
    # sum 15; sample means 2, 8, 1
    assert float(aggregate(LOSS, SAMPLE, "token", *DENOMINATORS)) == pytest.approx(15 / 6)
    assert float(aggregate(LOSS, SAMPLE, "sequence", *DENOMINATORS)) == pytest.approx(11 / 3)
    assert float(aggregate(LOSS, SAMPLE, "dr", *DENOMINATORS)) == pytest.approx(15 / 30)
    # the tokens of samples may interleave
    order = tensor(3, 0, 4, 2, 1, 5)
    assert float(aggregate(LOSS[order], SAMPLE[order], "sequence", *DENOMINATORS)) == pytest.approx(11 / 3)


@pytest.mark.parametrize("how", ["token", "sequence", "dr"])
@pytest.mark.parametrize("split", [[{5, 2, 9}], [{5}, {2, 9}], [{9, 5}, {2}], [{2}, {5}, {9}], [{5, 2, 9}, set()]])
def test_aggregate_does_not_depend_on_micro_batches(how, split):
    whole = LOSS.clone().requires_grad_()
    total = aggregate(whole**2, SAMPLE, how, *DENOMINATORS)
    total.backward()
    parts, contributions = LOSS.clone().requires_grad_(), []
    for samples in split:
        mine = torch.tensor([int(sample) in samples for sample in SAMPLE])
        contributions.append(aggregate(parts[mine] ** 2, SAMPLE[mine], how, *DENOMINATORS))
        contributions[-1].backward()
    torch.testing.assert_close(sum(contributions), total)
    torch.testing.assert_close(parts.grad, whole.grad)


def test_aggregate_errors_name_the_cause():
    with pytest.raises(ValueError, match="'token' divides by 0"):
        aggregate(LOSS, SAMPLE, "token", 0, 3, 10)
    with pytest.raises(ValueError, match="'dr' divides by 0"):
        aggregate(LOSS, SAMPLE, "dr", 6, 3, 0)
    with pytest.raises(ValueError, match="sample_T"):
        aggregate(LOSS, SAMPLE[:2], "token", *DENOMINATORS)

"""train_rl.py: updates that do not depend on micro-batches or ranks, whole runs, resuming, errors in one line."""

import copy
import dataclasses
import json
import os
import pickle
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import tiny
import torch
from tiny import changed

import checkpoint
import envs
import samples as sample_making
import train_rl
from baselines import PPO, nthr_reweight
from checkpoint import TrainState, save_checkpoint
from config import Config, ConfigError
from distributed import Optimizer
from logger import PhaseTimer, rollout_metrics, sample_metrics
from model import LanguageModel, all_logprobs, load_model
from packing import Sample, sort_by_prefix
from rollout import Episode, Step
from samples import action_samples, mini_batches, record_advantages, set_advantages, set_importance_weights
from train_rl import sample_tasks, update

# ---- The update


@pytest.fixture(scope="module")
def config(small_games) -> Config:
    """One update of plain GRPO; judge samples count fully, no KL."""
    tiny.join()
    return tiny.rl_config(small_games, "algo.kl=0", "train.samples_per_update=1000", "train.max_grad_norm=1000")


@pytest.fixture(scope="module")
def initial(config) -> LanguageModel:
    return load_model(config)


@pytest.fixture(scope="module")
def samples(config, initial, small_games) -> list[Sample]:
    return tiny.samples(small_games, initial, config)


def after(
    initial: LanguageModel,
    samples: list[Sample],
    config: Config,
    lr: float = 0.05,
    momentum: float = 0.0,
    reference=None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights after scoring and one update() by SGD, and its metrics."""
    policy = dataclasses.replace(initial, model=copy.deepcopy(initial.model))
    metrics = update_once(policy, scored(policy, samples, config, reference), config, lr, momentum)
    return policy.model.state_dict(), metrics


def update_once(
    policy: LanguageModel, ready: list[Sample], config: Config, lr: float, momentum: float = 0.0
) -> dict[str, float]:
    """One update() by SGD of scored samples, dealt out as train() does."""
    optimizer = Optimizer(policy.model, make=lambda groups: torch.optim.SGD(groups, lr=lr, momentum=momentum))
    batches = mini_batches(ready, config, 0, torch.distributed.get_world_size())
    return update(policy, optimizer, batches, ready, config, lr, 0)


def score(policy: LanguageModel, reference, ppo: PPO | None, samples: list[Sample], config: Config) -> None:
    """Phase 4 of train()."""
    if config.algo.nthr:
        nthr_reweight(policy, [sample for sample in samples if not sample.is_critique], config)
    train_rl.score(policy, reference, ppo, samples, config)
    set_importance_weights(samples, config)


def valued(episodes: list[Episode], config: Config) -> list[Sample]:
    """The samples of episodes, with advantages, recorded."""
    samples = action_samples(episodes, config)
    set_advantages(samples, episodes, config)
    record_advantages(samples)
    return samples


def scored(policy: LanguageModel, samples: list[Sample], config: Config, reference=None) -> list[Sample]:
    """Copies of the samples as score() leaves them."""
    samples = [dataclasses.replace(sample) for sample in samples]
    score(policy, reference, None, samples, config)
    return samples


def two_episodes() -> tuple[Episode, Episode]:
    """Of one group: one wins in its second step; the other stays where it began, by an impossible action."""

    def step(observation: str, reward: float = 0.0, available: bool = True) -> Step:
        return Step([1], [2], [-0.5], "prompt", "response", observation, "action", True, available, reward)

    task = envs.Task("alfworld", "pick_and_place_simple", "id", "train")
    won = Episode(task, 0, 0, [step("start"), step("desk", reward=1.0)])
    return won, Episode(task, 0, 1, [step("start"), step("start", available=False)])


@pytest.mark.parametrize(
    "invalid, expected",
    [
        ("malformed", [1 / 2 + 2 / 3, 1 / 2, -1 / 2 - 1 / 3, -1 / 2 - 1 / 3]),
        ("unavailable", [0.525 + 2 * 1.1 / 3, 0.525, -0.475 - 0.8 / 3, -0.575 - 1.4 / 3]),
    ],
)
def test_actions_carry_gigpo_advantages(config, invalid, expected):
    """By hand, on the two episodes above."""
    won, lost = two_episodes()
    settings = ["advantage=gigpo", "divide_by_std=false", "gamma=0.5", "step_weight=2", "invalid_penalty=0.1"]
    config = changed(config, "rollout.group_size=2", *(f"algo.{one}" for one in [*settings, f"invalid={invalid}"]))
    samples = valued([won, lost], config)
    assert [sample.advantage for sample in samples] == pytest.approx(expected)
    assert [step.advantage for step in won.steps + lost.steps] == [sample.advantage for sample in samples]


def test_an_episode_left_alone_has_no_advantage(config):
    """The other of its group was discarded; published statistics would hand it its raw score."""
    won, lost = two_episodes()
    config = changed(config, "rollout.group_size=2", "algo.advantage=grpo", "algo.stats_over=trajectories")
    assert all(sample.advantage for sample in valued([won, lost], config))
    samples = valued([won, dataclasses.replace(lost, group=1)], config)
    assert [sample.advantage for sample in samples] == [0.0] * 4 == [step.advantage for step in won.steps + lost.steps]


@pytest.mark.parametrize("how", ["token", "sequence", "dr"])
@pytest.mark.parametrize("kl", [0, 0.5])
def test_update_is_the_same_for_any_micro_batch(initial, samples, config, how, kl):
    config, reference = changed(config, f"algo.aggregate={how}", f"algo.kl={kl}"), disturbed(initial, 0.02)
    whole, metrics = after(initial, samples, changed(config, "train.tokens_per_micro_batch=9999"), reference=reference)
    assert tiny.distance(whole, initial.model.state_dict()) > 1e-3
    for budget in (1, 200, 700):
        small = changed(config, f"train.tokens_per_micro_batch={budget}")
        parts, again = after(initial, samples, small, reference=reference)
        assert tiny.distance(parts, whole) < 1e-6
        for key in ("loss_policy", "loss_judge", "kl", "grad_norm", "entropy", "ratio"):
            assert again[f"train/{key}"] == pytest.approx(metrics[f"train/{key}"], rel=1e-4, abs=1e-5), key
    assert (metrics["train/kl"] > 0.01) == (kl > 0)


@pytest.mark.parametrize("packing", ["line", "padded"])
@pytest.mark.parametrize("method", ["ppo_clip", "gspo", "cispo"])
def test_update_equals_a_padded_reference(initial, samples, config, packing, method):
    """One padded batch, plain log_softmax, the loss written out: the same loss and gradient, with masks and KL."""
    settings = [
        f"algo.policy_loss={method}",
        "algo.kl=0.1",
        "algo.importance=mask",
        "judge.weight=0.5",
    ]
    config = changed(config, *settings, "algo.clip_low=0.01", "algo.clip_high=0.02", "algo.importance_high=1.2")
    noisy, reference = tiny.off_policy(samples), disturbed(initial, 0.02)
    policy = dataclasses.replace(disturbed(initial, 0.005), packing=packing)
    ready = scored(initial, noisy, config, reference)
    assert 0.05 < np.mean(np.concatenate([sample.loss_weights for sample in ready]) == 0) < 0.8

    model = copy.deepcopy(policy.model)
    width = max(sample.num_tokens for sample in ready)
    ids, mask = torch.zeros(len(ready), width, dtype=torch.int64), torch.zeros(len(ready), width, dtype=torch.int64)
    for index, sample in enumerate(ready):
        ids[index, : sample.num_tokens] = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]))
        mask[index, : sample.num_tokens] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits / config.rollout.temperature
    logp = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    total = {False: 0.0, True: 0.0}
    tokens = {
        kind: sum(int((sample.loss_weights > 0).sum()) for sample in ready if sample.is_critique == kind)
        for kind in total
    }
    for index, sample in enumerate(ready):
        own = logp[index, len(sample.prompt_ids) - 1 : sample.num_tokens - 1]
        old, ref, weight = (
            torch.from_numpy(a) for a in (sample.old_logprobs, sample.ref_logprobs, sample.loss_weights)
        )
        kept = weight > 0
        if not kept.any():
            continue
        own, old, ref, weight = own[kept], old[kept], ref[kept], weight[kept]
        ratio = (own - old).exp()
        if method == "gspo":  # the sample's ratio, with each token's own gradient
            ratio = ((own - old).mean().detach() + own - own.detach()).exp()
        bounded = ratio.clamp(0.99, 1.02)
        if method == "cispo":
            loss = -sample.advantage * bounded.detach() * own
        else:
            loss = torch.maximum(-sample.advantage * ratio, -sample.advantage * bounded)
        kl = ((ref - own).exp() - (ref - own) - 1).clamp(max=10)
        total[sample.is_critique] = (
            total[sample.is_critique] + (weight * loss + 0.1 * kl).sum() / tokens[sample.is_critique]
        )
    (total[False] + 0.5 * total[True]).backward()

    start = copy.deepcopy(policy.model.state_dict())
    metrics = update_once(policy, ready, changed(config, "train.tokens_per_micro_batch=500"), lr=1.0)
    assert metrics["train/loss_policy"] == pytest.approx(total[False].item(), rel=1e-4)
    assert metrics["train/loss_judge"] == pytest.approx(total[True].item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        step = start[name] - policy.model.state_dict()[name]
        torch.testing.assert_close(step, parameter.grad, rtol=1e-3, atol=2e-6)


def disturbed(policy: LanguageModel, scale: float) -> LanguageModel:
    """A copy with noise on all weights."""
    torch.manual_seed(0)
    copied = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return copied


def test_first_ratio_is_one_where_the_trainer_scores_the_old_policy(initial, samples, config):
    _, metrics = after(initial, samples, config)
    assert metrics["train/ratio"] == pytest.approx(1, abs=1e-5) and metrics["train/clip_fraction"] == 0
    assert metrics["train/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["mismatch/mean_abs"] < 1e-5 and metrics["train/updates"] == 1
    _, metrics = after(initial, samples, changed(config, "train.samples_per_update=4"), lr=0.1)
    assert metrics["train/updates"] == 4 and abs(metrics["train/approx_kl"]) > 1e-5  # later updates are off-policy


def test_engine_logprobs_as_the_old_policy(initial, samples, config):
    shifted = [
        dataclasses.replace(sample, engine_logprobs=sample.engine_logprobs - np.float32(0.1)) for sample in samples
    ]
    _, metrics = after(initial, shifted, changed(config, "train.old_logprobs=engine"))
    assert metrics["train/ratio"] == pytest.approx(np.exp(0.1), rel=1e-4)
    assert metrics["mismatch/mean_abs"] == pytest.approx(0.1, rel=1e-3) == metrics["mismatch/max_abs"]
    trained, metrics = after(initial, shifted, config)  # with the trainer's the engine's do not matter but are watched
    assert tiny.distance(trained, after(initial, samples, config)[0]) == 0
    assert metrics["mismatch/mean_abs"] == pytest.approx(0.1, rel=1e-3)


def test_good_rows_become_likelier_and_bad_ones_less(initial, samples, config):
    for sample in [sample for sample in samples if sample.advantage and sample.engine_logprobs.mean() < -0.2][:6]:
        trained = dataclasses.replace(initial, model=copy.deepcopy(initial.model))
        trained.model.load_state_dict(after(initial, [sample], config, lr=1e-3)[0])
        (logprobs,) = all_logprobs(trained, [sample], 4096, config.rollout.temperature)
        assert np.sign((logprobs - sample.engine_logprobs).mean()) == np.sign(sample.advantage)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_leaving_out_rows_without_advantage_changes_nothing(initial, samples, config, monkeypatch, momentum):
    """Also where mini-batches of one sample are left without any: the momentum of earlier ones goes on all the same."""
    config = changed(config, "train.samples_per_update=1", "train.max_grad_norm=0.1")
    short, fast = after(initial, samples, config, 5e-4, momentum)
    for module in (sample_making, train_rl):
        monkeypatch.setattr(module, "has_gradient", lambda sample, config: True)
    full, slow = after(initial, samples, config, 5e-4, momentum)
    assert tiny.distance(short, full) < 2e-6 < 1e-5 < tiny.distance(full, initial.model.state_dict())
    assert fast["train/tokens"] < 0.9 * slow["train/tokens"] == 0.9 * sum(sample.num_tokens for sample in samples)
    for key in ("train/loss_policy", "train/loss_judge", "train/grad_norm"):
        assert fast[key] == pytest.approx(slow[key], rel=1e-5, abs=1e-5), key


def test_an_update_without_any_signal_is_no_update(initial, samples, config):
    silent = [dataclasses.replace(sample, advantage=0.0) for sample in samples]
    weights, metrics = after(initial, silent, config)
    assert tiny.distance(weights, initial.model.state_dict()) == 0
    assert metrics["train/grad_norm"] == 0 and metrics["train/tokens"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_published_learning_rate_moves_the_weights(initial, samples, config, dtype):
    """Steps of 1e-6 are not rounded away, whatever is computed in: nine in ten weights move in four updates."""
    policy = load_model(changed(config, f"model.dtype={dtype}"))
    config = changed(config, "train.samples_per_update=4", f"model.dtype={dtype}")
    ready = scored(policy, samples, config)
    metrics = update(policy, Optimizer(policy.model), mini_batches(ready, config, 0, 1), ready, config, 1e-6, 0)
    assert metrics["train/updates"] == 4 and metrics["mismatch/mean_abs"] < (1e-5 if dtype == "float32" else 0.05)
    before = initial.model.state_dict()
    moved = torch.cat([(weight != before[name]).flatten() for name, weight in policy.model.state_dict().items()])
    assert moved.float().mean() > 0.9 and policy.dtype == getattr(torch, dtype)
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_recomputes_and_changes_nothing(initial, samples, config):
    plain, _ = after(initial, samples, config)
    saving = load_model(changed(config, "model.gradient_checkpointing=true"))
    calls = []
    for policy in (initial, saving):
        copied = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
        copied.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        engine = changed(config, "train.old_logprobs=engine")
        update_once(copied, scored(copied, samples, engine), engine, lr=0.05)
        calls.append(0)
        assert tiny.distance(copied.model.state_dict(), plain) < 1e-6 and not copied.model.training
    once = calls.index(0)
    assert len(calls) - 2 - once == 2 * once


def test_judge_weight_zero_is_no_judge(initial, samples, config):
    actor_only = [sample for sample in samples if not sample.is_critique]
    for kl in ("algo.kl=0", "algo.kl=0.1"):
        config = changed(config, kl)
        reference = dataclasses.replace(initial, model=copy.deepcopy(initial.model))
        without, _ = after(initial, actor_only, config, reference=reference)
        off, _ = after(initial, samples, changed(config, "judge.weight=0"), reference=reference)
        on, _ = after(initial, samples, config, reference=reference)
        assert tiny.distance(without, off) < 1e-6 and tiny.distance(without, on) > 1e-4


def test_losses_of_actor_and_judge_add_up(initial, samples, config):
    """L = L_GRPO + weight L_GCD, each a mean over its own tokens: so are the steps of plain gradient descent."""
    start = initial.model.state_dict()
    both, _ = after(initial, samples, changed(config, "judge.weight=0.5"))
    policy, _ = after(initial, [sample for sample in samples if not sample.is_critique], config)
    judge, _ = after(initial, [sample for sample in samples if sample.is_critique], config)
    summed = {name: start[name] + (policy[name] - start[name]) + 0.5 * (judge[name] - start[name]) for name in start}
    assert tiny.distance(both, summed) < 1e-6 < 1e-4 < tiny.distance(both, policy)


def test_entropy_bonus_raises_entropy(initial, samples, config):
    silent = [dataclasses.replace(sample, advantage=0.0) for sample in samples]
    config = changed(config, "algo.entropy=1")
    weights, metrics = after(initial, silent, config, lr=5e-3)
    assert metrics["train/entropy"] > 0
    spread = dataclasses.replace(initial, model=copy.deepcopy(initial.model))
    spread.model.load_state_dict(weights)
    _, later = after(spread, silent, config)
    assert later["train/entropy"] > metrics["train/entropy"] + 1e-3
    parts, _ = after(initial, silent, changed(config, "train.tokens_per_micro_batch=200"), lr=5e-3)
    assert tiny.distance(weights, parts) < 1e-6


def test_gradients_are_clipped_over_the_whole_mini_batch(initial, samples, config):
    start = initial.model.state_dict()
    free, metrics = after(initial, samples, config)
    norm = metrics["train/grad_norm"]
    clipped, again = after(initial, samples, changed(config, f"train.max_grad_norm={norm / 4}"))
    assert again["train/grad_norm"] == pytest.approx(norm, rel=1e-5)  # the norm before clipping
    quarter = {name: start[name] + (free[name] - start[name]) / 4 for name in start}
    assert tiny.distance(clipped, quarter) < 1e-6


# Every rank of this script does the updates of SCENARIOS on the same samples and saves its weights.
SCENARIOS = {
    "one update": [],
    "several, with KL": ["train.samples_per_update=5", "algo.kl=0.1"],
    "mini-batches smaller than the world": ["train.samples_per_update=1", "train.max_grad_norm=0.1"],
    "sequence mean": ["algo.aggregate=sequence"],
    "gspo": ["algo.aggregate=sequence", "algo.policy_loss=gspo", "train.old_logprobs=engine"],
    "cispo": ["algo.policy_loss=cispo", "train.old_logprobs=engine"],
    "masked": ["algo.importance=mask", "algo.importance_high=1.2", "algo.kl=0.1"],
}
UPDATES = """
import pickle, sys, torch
sys.path.insert(0, {tests!r})
import test_train_rl as here
from distributed import init_distributed
from model import load_model
config, samples = pickle.load(open({data!r}, "rb"))
rank, world = init_distributed(config)
policy = load_model(config)
results = here.all_scenarios(policy, samples, config)
torch.save(results, {out!r} + str(rank))
torch.distributed.destroy_process_group()
"""


def all_scenarios(policy: LanguageModel, samples: list[Sample], config: Config) -> dict:
    results = {}
    for name, overrides in SCENARIOS.items():
        config_here, sampled = changed(config, *overrides), tiny.off_policy(samples)
        results[name] = after(policy, sampled, config_here, 2e-3, momentum=0.9, reference=policy)
    return results | {"critic": after_critic(policy, samples, config)}


def after_critic(
    policy: LanguageModel, samples: list[Sample], config: Config
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The critic's weights after two updates of PPO's value model from scratch, and the second's metrics."""
    config = changed(config, "algo.advantage=ppo", "train.samples_per_update=6")
    ppo = make_ppo(config, policy)
    ppo.optimizer = Optimizer(ppo.critic.model, make=lambda groups: torch.optim.SGD(groups, lr=0.01))
    for _ in range(2):
        ready = [dataclasses.replace(sample) for sample in samples]
        score(policy, None, ppo, ready, config)
        ppo.set_advantages(ready)
        batches = mini_batches(ready, config, 0, torch.distributed.get_world_size())
        metrics = ppo.update(ready, batches, 0.01, 0)
    return ppo.critic.model.state_dict(), metrics | {"train/updates": 6}


def make_ppo(config: Config, policy: LanguageModel) -> PPO:
    """PPO with a critic from scratch."""
    return PPO(config, policy, TrainState(folder=config.model.path))


def test_update_is_the_same_for_one_and_two_ranks(initial, samples, config, tmp_path):
    (tmp_path / "data").write_bytes(pickle.dumps((config, samples)))
    texts = dict(tests=str(tiny.ROOT / "tests"), data=str(tmp_path / "data"), out=str(tmp_path / "rank"))
    (tmp_path / "updates.py").write_text(UPDATES.format(**texts))
    tiny.run(tmp_path / "updates.py", cwd=tmp_path, ranks=2, timeout=120)
    expected = all_scenarios(initial, samples, config)
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    for name, (weights, metrics) in expected.items():
        assert tiny.distance(first[name][0], second[name][0]) == 0, name
        bound = 1e-6 if metrics["train/updates"] == 1 else 1e-5  # rounding grows from update to update
        start = initial.model.state_dict() | {"score.weight": torch.zeros(1, 64), "score.bias": torch.zeros(1)}
        moved = max(float((weight - start[key]).abs().max()) for key, weight in weights.items())
        assert tiny.distance(first[name][0], weights) < bound < 1e-4 < moved, name
        for key, value in metrics.items():
            if key != "train/padding_share" and "distinct" not in key:  # hang on how samples are split
                near = pytest.approx(value, rel=1e-4, abs=1e-5)
                assert first[name][1][key] == near and second[name][1][key] == near, (name, key)


@pytest.mark.parametrize("deal", ["prefixes", "shuffled"])
def test_mini_batches_deal_out_every_row_once(config, deal):
    rng = random.Random(0)
    samples = [
        Sample(
            np.full(rng.randint(1, 300), n),
            np.zeros(rng.randint(1, 60)),
            advantage=1,
            is_critique=n % 5 == 0,
            group=n % 9,
        )
        for n in range(203)
    ]
    config = changed(config, "train.samples_per_update=50", f"train.deal={deal}")
    ids = {}
    for world in (1, 2, 3):
        batches = mini_batches(samples, config, 4, world)
        assert sorted(id(sample) for batch in batches for share in batch for sample in share) == sorted(
            map(id, samples)
        )
        ids[world] = [{id(sample) for share in batch for sample in share} for batch in batches]
        for batch in batches:
            loads = [sum(sample.num_tokens for sample in share) for share in batch]
            assert max(loads) - min(loads) <= 360
            assert sum(sample.is_critique for share in batch for sample in share) in (
                10,
                11,
            )  # 41 critiques over 4 mini-batches
    assert ids[1] == ids[2] == ids[3] and len(ids[1]) == 4  # 162 actions
    assert [[map(id, share) for share in batch] for batch in mini_batches(samples, config, 5, 1)] != ids[1]


def test_mini_batches_share_prefixes_and_have_some_of_every_game(config):
    """Samples of a game begin alike; so do the answers to a question, which stay together."""
    rng = random.Random(0)
    samples = []
    for group in range(6):
        states = [[group] * 30 + [rng.randrange(9) for _ in range(10)] for _ in range(10)]
        prompts = [np.array(rng.choice(states), dtype=np.int32) for _ in range(40)]
        replies = [np.array([rng.randrange(9) for _ in range(5)], dtype=np.int32) for _ in prompts]
        samples += [Sample(*both, advantage=1.0, group=group) for both in zip(prompts, replies, strict=True)]
        question = np.full(50, 100 + group, dtype=np.int32)
        samples += [Sample(question, reply, advantage=1.0, is_critique=True, group=group) for reply in replies[:4]]
    computed = {}
    for deal in ("prefixes", "shuffled"):
        dealt = changed(config, "train.samples_per_update=60", f"train.deal={deal}")
        batches = [[one for share in batch for one in share] for batch in mini_batches(samples, dealt, 0, 2)]
        computed[deal] = sum(sum(sort_by_prefix(batch)[1]) for batch in batches)
        assert [sum(not one.is_critique for one in batch) for batch in batches] == [60] * 4
        for batch in batches:
            if deal == "prefixes":
                assert {one.group for one in batch if not one.is_critique} == set(range(6))
        kept = [sum(one.is_critique and one.group == group for one in batch) for batch in batches for group in range(6)]
        assert (set(kept) == {0, 4}) == (deal == "prefixes")
    everything = sum(sort_by_prefix(samples)[1])
    assert everything <= computed["prefixes"] < 1.4 * everything < 1.8 * everything < computed["shuffled"]


@pytest.mark.parametrize(
    "games, length, per_update, expected",
    [(16, 17, 136, {136}), (16, 15, 8, {8}), (4, 40, 4, {4}), (3, 1, 1, {1}), (12, 229, 230, {229})],
)
def test_mini_batches_are_of_equal_size(config, games, length, per_update, expected):
    """Also where games do not divide, and where there are fewer of them than mini-batches."""
    samples = [
        Sample(np.array([game, step % 4]), np.array([step]), advantage=1.0, group=game)
        for game in range(games)
        for step in range(length)
    ]
    batches = mini_batches(samples, changed(config, f"train.samples_per_update={per_update}"), 0, 1)
    sizes = [len(share) for (share,) in batches]
    assert sum(sizes) == len(samples) and max(sizes) - min(sizes) <= 8 and min(sizes) > 0
    assert per_update < 100 or set(sizes) == expected


def test_tasks_are_walked_in_laps(config):
    tasks = [envs.Task("alfworld", "type", str(number), "train") for number in range(10)]
    drawn = [task.id for iteration in range(10) for task in sample_tasks(tasks, config, iteration).values()]  # 4 each
    for lap in range(4):
        assert sorted(drawn[10 * lap : 10 * lap + 10]) == sorted(task.id for task in tasks)
    assert drawn[:10] != drawn[10:20]
    another = changed(config, "seed=1")
    assert [task.id for iteration in range(10) for task in sample_tasks(tasks, another, iteration).values()] != drawn


def test_learning_rate_schedule(config):
    config = changed(config, "train.warmup=4", "train.iterations=10")
    assert [train_rl.lr_factor(config, n) for n in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    linear = changed(config, "train.schedule=linear", "train.warmup=0")
    assert [train_rl.lr_factor(linear, n) for n in (0, 5, 9)] == pytest.approx([1, 0.5, 0.1])


# ---- Runs in this process


def run_here(small_games, tmp_path, monkeypatch, *overrides: str) -> list[dict]:
    """The metrics of a run in this process, by the transformers engine, without evaluation."""
    tmp_path.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    overrides += ("rollout.engine=transformers", "train.eval_every=0")
    monkeypatch.setattr("sys.argv", ["train_rl.py", str(tiny.rl_yaml(small_games, tmp_path)), "--set", *overrides])
    monkeypatch.setattr(train_rl, "init_distributed", lambda config: tiny.join() or (0, 1))
    monkeypatch.setattr("engine.Engine.close", lambda self: None)
    train_rl.main()
    return tiny.metrics_of(tmp_path / "runs" / "tiny_rl")


PLAIN = ("judge.enabled=false", "guidelines.every=0")
METHODS = {
    "grpo": ["algo.advantage=grpo"],
    "gigpo": ["algo.advantage=gigpo"],
    "rlvmr": ["algo.advantage=rlvmr", "prompt_style=rlvmr", "rollout.max_prompt_tokens=1600"],
    "ppo": ["algo.advantage=ppo", "rollout.groups=8", "rollout.group_size=1", "train.critic_lr=0.01"],
    "nthr": ["algo.advantage=grpo", "algo.nthr=true", "algo.nthr_beta=0", "env.max_steps=12", "seed=1"],
}


@pytest.mark.parametrize("gcd", [False, True], ids=["plain", "gcd"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, gcd, small_games, tmp_path, monkeypatch):
    """Two iterations: finite, with gradients and a changed policy, and with what is the method's own."""
    style = "rlvmr" if method == "rlvmr" else "think"
    start = tiny.checkpoint(small_games, style)
    settings = [*METHODS[method], *(() if gcd else PLAIN), f"model.path={start}", "judge.max_prompt_tokens=3000"]
    records = run_here(small_games, tmp_path, monkeypatch, *settings)
    assert len(records) == 2 and all(np.isfinite(value) for record in records for value in record.values())
    assert all(record["train/grad_norm"] > 0 for record in records)
    run = tmp_path / "runs" / "tiny_rl"
    assert tiny.distance(tiny.weights_of(run / "checkpoints" / "latest"), tiny.weights_of(start)) > 1e-4
    assert gcd == any(key.startswith("judge/balanced") for record in records for key in record)
    critic = run / "checkpoints" / "latest" / "trainer" / "critic"
    assert critic.is_dir() == (method == "ppo") == ("critic/loss" in records[0])
    if method == "ppo":
        assert records[0]["critic/value"] == 0 != records[1]["critic/value"] and records[0]["train/zero_advantage"] == 0
    if method == "nthr":
        assert sum(record["train/nthr_tokens"] for record in records) > 0
    if method == "rlvmr":
        tags = {step["tag"] for episode in tiny.episodes_of(run, 0)[0] for step in episode["steps"]}
        assert tags > {"planning", "explore"}


def test_ppo_trains_on_lost_episodes_too(initial, samples, config):
    """Their score is 0, and it is the critic that gives their tokens an advantage; without KL or entropy bonus."""
    config = changed(config, "algo.advantage=ppo", "algo.kl=0", "algo.entropy=0", "train.critic_lr=0.01")
    acted = [dataclasses.replace(sample, is_critique=False, advantage=float(n % 2)) for n, sample in enumerate(samples)]
    ppo = make_ppo(config, initial)
    torch.nn.init.constant_(ppo.critic.model.score.bias, 0.25)
    score(initial, None, ppo, acted, config)
    ppo.set_advantages(acted)
    tokens = np.concatenate([sample.advantage for sample in acted])
    assert abs(tokens.mean()) < 1e-6 and tokens.std(ddof=1) == pytest.approx(1)
    assert {len(set(sample.advantage)) for sample in acted} == {
        1
    }  # equal values, gamma = lambda = 1: each score, whitened
    with pytest.raises(ValueError, match="set_logprobs"):
        update_once(initial, [dataclasses.replace(sample, old_logprobs=None) for sample in acted], config, lr=1.0)
    lost = [sample for sample in acted if sample.returns[0] == 0]
    metrics = update_once(disturbed(initial, 0), lost, config, lr=1.0)
    assert len(lost) == 12 and metrics["train/grad_norm"] > 0 and np.isfinite(list(metrics.values())).all()


def test_metrics_of_masked_tokens_are_means_over_the_others(initial, samples, config):
    config = changed(config, "algo.importance=mask", "algo.importance_high=1.2", "algo.kl=0.1")
    reference = disturbed(initial, 0.02)
    ready = scored(initial, tiny.off_policy(samples), config, reference)
    _, metrics = after(initial, tiny.off_policy(samples), config, reference=reference)
    gap = np.concatenate([(sample.old_logprobs - sample.ref_logprobs)[sample.loss_weights > 0] for sample in ready])
    assert metrics["train/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["train/kl"] == pytest.approx((np.exp(-gap) - 1 + gap).clip(-10, 10).mean(), rel=1e-3)
    found = sample_metrics(ready, config)
    assert found["train/masked"] == pytest.approx(
        1
        - sum(sample.num_loss_tokens for sample in ready if not sample.is_critique)
        / sum(len(r.response_ids) for r in ready if not r.is_critique)
    )
    assert found["mismatch/weight"] == pytest.approx(np.concatenate([sample.loss_weights for sample in ready]).mean())


def test_a_resumed_critic_is_the_one_that_was_saved(small_games, tmp_path, monkeypatch):
    settings = [*METHODS["ppo"], *PLAIN, "train.checkpoint_every=1"]
    whole = run_here(small_games, tmp_path / "whole", monkeypatch, *settings)
    run_here(small_games, tmp_path / "halved", monkeypatch, *settings, "train.iterations=1")
    halved = run_here(small_games, tmp_path / "halved", monkeypatch, *settings)
    for one, two in zip(whole, halved, strict=True):
        same = {key: pytest.approx(value, abs=1e-6) for key, value in one.items() if not key.startswith("time/")}
        assert {key: value for key, value in two.items() if key in same} == same | {
            "rollout/tokens_per_s": two["rollout/tokens_per_s"]
        }


def test_groups_of_equal_returns_are_drawn_again(small_games, tmp_path, monkeypatch):
    """The first draws stay in the record; what is trained on comes from the last ones, under other ids."""
    settings = ["rollout.dynamic_sampling=2", "train.iterations=1", *PLAIN]
    (record,) = run_here(small_games, tmp_path, monkeypatch, *settings)
    episodes = tiny.episodes_of(tmp_path / "runs" / "tiny_rl", 0)[0]
    groups = {}
    for episode in episodes:
        groups.setdefault(episode["group"], []).append(episode)
    dull = {group for group, members in groups.items() if len({member["won"] for member in members}) == 1}
    assert record["rollout/filtered_groups"] == sum(group < 8 for group in dull) > 0
    assert set(groups) == set(range(4)) | {group + 4 for group in dull if group < 8}
    assert record["rollout/episodes"] == len(episodes) == 4 * len(groups)
    first = {episode["task"]["id"] for group in range(4) for episode in groups[group]}
    assert not first & {episode["task"]["id"] for group in groups if group >= 4 for episode in groups[group]}
    last = [group for group in groups if group >= 8 or group not in dull]
    assert record["train/samples"] == sum(len(member["steps"]) for group in last for member in groups[group])


def test_replies_that_were_cut_off_can_be_masked(small_games, tmp_path, monkeypatch):
    """Replies of at most 8 tokens are all cut off: none of them counts."""
    settings = ["rollout.max_response_tokens=8", "train.iterations=1", "algo.overlong=mask", *PLAIN]
    (masked,) = run_here(small_games, tmp_path, monkeypatch, *settings)
    assert masked["rollout/truncated"] == masked["train/masked"] == 1 and masked["train/grad_norm"] == 0


@pytest.mark.parametrize("packing", ["line", "padded"])
def test_nthr_in_one_pass_equals_its_definition(initial, samples, config, packing):
    """Sample by sample with full softmax rows, written out from the paper; and the same pass's log-probs are right."""
    config = changed(config, "algo.nthr=true", "algo.nthr_beta=0.5", "train.tokens_per_micro_batch=300")
    acted = [dataclasses.replace(sample, is_critique=False, advantage=-1.0 - n) for n, sample in enumerate(samples)][:9]
    for n, sample in enumerate(acted):  # group 0: trajectories 0 (won), 1, 2 of two samples each; group 1: all lost
        sample.group, sample.trajectory, sample.won = n // 6, n // 2, n < 2
    temperature, model = config.rollout.temperature, initial.model
    mixed, vocabulary = acted[:6], np.unique(np.concatenate([sample.response_ids for sample in acted[:6]]))
    hidden, error = [], []
    for sample in mixed:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64))[None]
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0, len(sample.prompt_ids) - 1 : -1]
            probability = (model.lm_head(states) / temperature).softmax(-1)
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(sample.response_ids).long(), probability.shape[1])
        hidden.append(states.double())
        error.append((one_hot - probability)[:, vocabulary].double())
    pull = sum(e.T @ h for e, h, sample in zip(error, hidden, mixed, strict=True) if sample.won)
    influence = [((e @ pull) * h).sum(-1) for e, h in zip(error, hidden, strict=True)]
    tau = 0.5 * min(float(s.mean()) for s, sample in zip(influence, mixed, strict=True) if sample.won)
    eta = 2 * abs(0.5 - 1 / 3)

    policy = dataclasses.replace(initial, packing=packing)
    before = [sample.advantage for sample in acted]
    score(policy, None, None, acted, config)
    expected = [
        torch.where(s > tau, eta, 1.0).numpy() if not sample.won else 1.0
        for s, sample in zip(influence, mixed, strict=True)
    ]
    assert 0 < sum(sample.nthr_tokens for sample in mixed) < sum(len(sample.response_ids) for sample in mixed[2:])
    for sample, was, factor in zip(acted, before, [*expected, 1.0, 1.0, 1.0], strict=True):
        np.testing.assert_allclose(sample.advantage, was * factor, rtol=1e-6)
    praised = [
        dataclasses.replace(sample, advantage=0.5, nthr_tokens=0, old_logprobs=None) for sample in acted
    ]  # a reward stays whole
    score(policy, None, None, praised, config)
    assert all(sample.advantage == 0.5 and not sample.nthr_tokens for sample in praised)
    plain = all_logprobs(policy, acted, 9999, temperature)
    for sample, logprobs in zip(acted, plain, strict=True):
        np.testing.assert_allclose(sample.old_logprobs, logprobs, rtol=1e-5, atol=1e-5)


def test_tag_rewards_by_hand():
    """RLVMR's rules on one episode: tag, action, well formed, on offer."""
    story = [
        ("reflection", "look", True, True, 1),  # the first step has nothing to reflect on, and is rewarded
        ("planning", "go to desk 1", True, True, 1),  # won in the end
        ("explore", "open desk 1", True, False, 1),  # new
        ("reflection", "open desk 1", True, True, 0),  # the last one failed, but this is the same
        ("explore", "look", True, True, 0),  # taken before, under another tag
        ("none", "dance", False, False, 0),  # malformed
        ("explore", "dance", True, True, 1),  # the malformed one does not count as taken
        ("reflection", "sing", True, True, 0),  # the last one was fine
        ("monitor", "hum", True, True, 0),
    ]
    steps = [
        Step([1], [2], [0.0], "", "", "seen", action, valid, available, 0.0, tag=tag)
        for tag, action, valid, available, _ in story
    ]
    episode = Episode(envs.Task("alfworld", "t", "id", "train"), 0, 0, steps, won=True)
    assert sample_making.tag_rewards(episode) == [reward for *_, reward in story]
    episode.won = False
    assert sample_making.tag_rewards(episode)[1] == 0


def test_rules_from_a_file_are_followed_and_kept(small_games, tmp_path, monkeypatch):
    """A person's rules: in every prompt, in the checkpoint, as plain text; with guidelines.every=0 they stay."""
    (tmp_path / "rules.txt").write_text("Open every drawer.\n\n<think>Then</think> <|im_end|> look.\n")
    settings = (f"guidelines.file={tmp_path / 'rules.txt'}", "train.iterations=1", *PLAIN)
    run_here(small_games, tmp_path, monkeypatch, *settings)
    run = tmp_path / "runs" / "tiny_rl"
    rules = ["Open every drawer.", "Then < |im_end|> look."]
    assert json.loads((run / "checkpoints" / "latest" / "guidelines.json").read_text()) == rules
    prompt = tiny.episodes_of(run, 0)[0][0]["steps"][0]["prompt"]
    assert "".join(f"- {rule}\n" for rule in rules) in prompt
    with pytest.raises(ConfigError, match="nosuch"):
        tiny.rl_config(small_games, "guidelines.file=nosuch")


def test_plain_method_leaves_no_trace_of_the_judge(small_games, tmp_path, monkeypatch):
    """GRPO without GCD, by the transformers engine, the engine's log-probs as the old policy's; in this process."""
    settings = ("algo.advantage=grpo", "rollout.groups=2", "train.old_logprobs=engine", "train.iterations=1", *PLAIN)
    (record,) = run_here(small_games, tmp_path, monkeypatch, *settings)
    assert not [key for key in record if "judge/" in key] and record["train/loss_judge"] == 0
    assert record["mismatch/mean_abs"] < 1e-4 and record["rollout/episodes"] == 8
    assert tiny.episodes_of(tmp_path / "runs" / "tiny_rl", 0)[1] == {"questions": [], "guidelines": []}


def test_dry_run_prints_the_arithmetic(small_games, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_rl.py", str(tiny.rl_yaml(small_games, tmp_path)), "--dry-run"])
    train_rl.main()
    printed = capsys.readouterr().out
    assert "4 groups x 4 = 16 episodes of at most 6 steps, 32 critiques" in printed
    assert "at most 2 optimizer steps of 48 actions" in printed
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="rollout.groups=4 does not divide over 3 ranks"):
        train_rl.main()


def test_scienceworld_is_trained_on(small_games, tmp_path):
    """One iteration on the real simulator, by the same code: actions, questions, updates, a checkpoint."""
    settings = ["env.name=scienceworld", f"env.data={tmp_path}", "env.level=L2", "env.max_steps=3", "rollout.groups=2"]
    settings += ["rollout.max_prompt_tokens=2400", "judge.max_prompt_tokens=3000", "train.iterations=1"]
    settings += ["train.eval_every=0", "guidelines.every=0", "rollout.concurrency=8"]
    tiny.run("train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
    run = tmp_path / "runs" / "tiny_rl"
    (record,) = tiny.metrics_of(run)
    episodes, _ = tiny.episodes_of(run, 0)
    assert record["rollout/episodes"] == len(episodes) == 8 and record["rollout/steps"] == 24
    assert record["rollout/success"] == record["rollout/success_loose"] == 0 <= record["rollout/score"]
    assert record["train/updates"] >= 1 and record["mismatch/mean_abs"] < 1e-5
    for start in (0, 4):
        assert len({episode["task"]["id"] for episode in episodes[start : start + 4]}) == 1  # a group plays one task
        assert len({episode["steps"][0]["observation"] for episode in episodes[start : start + 4]}) == 1
    assert {episode["task"]["env"] for episode in episodes} == {"scienceworld"}
    assert (run / "checkpoints" / "latest" / "model.safetensors").is_file()


def test_no_episode_at_all_stops_the_run():
    with pytest.raises(RuntimeError, match="no episode was collected.*discarded"):
        rollout_metrics([], {"discarded": 4})


# ---- Mistakes

WITHOUT_VLLM = """
import importlib.util, runpy
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else real(name, *rest)
runpy.run_path({script!r}, run_name="__main__")
"""
MISTAKES = {
    "unknown key": (["train.learning_rate=1"], "unknown key train.learning_rate"),
    "indivisible": (["rollout.groups=3"], "rollout.groups=3 does not divide over 2 ranks; set it to 2 or 4"),
    "no checkpoint": (["model.path=runs/nothing/checkpoints/latest"], "no model at runs/nothing/checkpoints/latest"),
    "no data": (["env.data=nowhere"], "no games in nowhere/json_2.1.1/train"),
    "no vllm": (["rollout.engine=vllm"], "needs vLLM, which is not installed"),
}


@pytest.fixture(scope="module")
def mistaken(small_games, tmp_path_factory):
    """All wrong runs, started together: name -> (exit code, stderr, seconds) of each of its ranks."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = tiny.rl_yaml(small_games, folder)
    wrapper = folder / "without_vllm.py"
    wrapper.write_text(WITHOUT_VLLM.format(script=str(tiny.ROOT / "train_rl.py")))
    running, began = {}, time.monotonic()
    for name, (overrides, _) in MISTAKES.items():
        script = wrapper if name == "no vllm" else "train_rl.py"
        port = str(20_000 + random.SystemRandom().randrange(10_000))
        for rank in range(2 if name == "indivisible" else 1):  # not by torchrun, whose exit code is its own
            group = dict(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            running[name, rank] = subprocess.Popen(
                tiny.command(script, config, "--set", *overrides), cwd=folder, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=tiny.environment(**group if name == "indivisible" else {}),
            )  # fmt: skip
    found: dict[str, list] = {}
    for (name, _), process in running.items():
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            errors = "it hangs"
        found.setdefault(name, []).append((process.returncode, errors, time.monotonic() - began))
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(mistaken, name):
    for code, errors, _ in mistaken[name]:
        assert code == 2, errors
        (line,) = errors.splitlines()
        assert line.startswith("error: ") and MISTAKES[name][1] in line


def test_checkpoint_of_something_else(small_games, tmp_path, monkeypatch):
    """A run's folder whose `latest` holds no trainer state: a cold start of the same name."""
    monkeypatch.chdir(tmp_path)
    folder = tiny.copy(tiny.checkpoint(small_games), tmp_path / "runs" / "tiny_rl" / "checkpoints" / "final")
    folder.with_name("latest").symlink_to("final")
    with pytest.raises((ConfigError, FileNotFoundError), match="tiny_rl"):
        checkpoint.resume(tiny.rl_config(small_games))


def test_a_full_disk_costs_no_checkpoint(initial, config, tmp_path, monkeypatch):
    """Whichever file does not fit any more: the error says so, and the checkpoint before it stays `latest`."""
    monkeypatch.chdir(tmp_path)

    def save(iteration: int) -> None:
        optimizers = {"policy": Optimizer(initial.model)}
        save_checkpoint(initial, optimizers, None, config, TrainState(iteration=iteration))

    save(1)
    for owner, name in ((torch, "save"), (type(initial.model), "save_pretrained")):
        for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, lambda *_, error=error, **__: (_ for _ in ()).throw(error))
                with pytest.raises(ConfigError, match="could not write .*000002: .*The checkpoint before it is whole"):
                    save(2)
    assert os.readlink(config.run_dir / "checkpoints" / "latest") == "000001"
    assert checkpoint.resume(config).iteration == 1
    save(2)
    assert checkpoint.resume(config).iteration == 2


def test_a_gradient_that_is_not_finite_is_skipped_and_then_stops_the_run(
    initial, samples, config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distributed.MAX_BAD_STEPS", 1)
    config = changed(config, "train.samples_per_update=8")
    config.run_dir.mkdir(parents=True)
    start = copy.deepcopy(initial.model.state_dict())
    poisoned = [dataclasses.replace(sample, is_critique=False) for sample in samples]
    bad = poisoned[3]
    bad.advantage = float("nan")
    policy = dataclasses.replace(initial, model=copy.deepcopy(initial.model))
    optimizer = Optimizer(policy.model)

    def step(iteration: int) -> dict[str, float]:
        ready = scored(policy, poisoned, config)
        return update(policy, optimizer, mini_batches(ready, config, iteration, 1), ready, config, 1e-3, iteration)

    metrics = step(0)
    assert metrics["train/skipped_steps"] == 1 and all(np.isfinite(value) for value in metrics.values())
    assert metrics["train/updates"] == 3 and metrics["train/grad_norm"] > 0
    assert all(torch.isfinite(weight).all() for weight in policy.model.state_dict().values())
    assert tiny.distance(start, policy.model.state_dict()) > 1e-4  # the other two steps
    for sample in poisoned:
        sample.advantage = float("nan")
    kept = copy.deepcopy(policy.model.state_dict())
    with pytest.raises(RuntimeError, match=r"the gradient was not finite 2 steps in a row.*bad_samples_000007"):
        step(7)
    assert tiny.distance(kept, policy.model.state_dict()) == 0
    lines = (config.run_dir / "bad_samples_000007.jsonl").read_text().splitlines()
    assert len(lines) == 8 and json.loads(lines[0])["response"] and "NaN" in lines[0]


def test_out_of_memory_names_what_to_lower():
    timer = PhaseTimer()
    with pytest.raises(ConfigError, match="'update': lower train.tokens_per_micro_batch .*Tried to allocate 2 GiB"):
        with timer("update"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")


def test_optimizer_decays_matrices_only(initial):
    decayed, rest = Optimizer(initial.model, 0.1).inner.param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(initial.model.parameters()))

"""Coupled gradients against their definition, which flawed actions are in danger, and how consistent repeats are."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import tiny
import torch

import envs
import logger
import train_rl
from model import last_hidden, load_model
from packing import Sample, lay_out
from paper import coupling
from rollout import Episode, Step
from samples import action_samples, set_advantages

TASK = envs.Task("alfworld", "pick_and_place_simple", "a game", "train")


def episode(*steps: tuple[str, str], won: bool = False, group: int = 0, member: int = 0) -> Episode:
    played = [Step([1], [2], [0.0], "", "", seen, action, True, True, 0.0) for seen, action in steps]
    return Episode(TASK, group, member, played, won)


def test_repeat_metrics_by_hand():
    looping = episode(("hall", "look"), ("hall", "look"), ("hall", "look"), ("hall", "go"))  # 2 of 4 repeat
    winning = episode(("hall", "look"), ("hall", "go"), won=True, member=1)
    other_game = episode(("hall", "look"), ("hall", "look"), group=1)  # no other member: compared with nobody
    found = logger.repeat_metrics([looping, winning, other_game])
    assert found == {
        "rollout/repeats": pytest.approx(3 / 8),
        "rollout/repeats_won": 0.0,
        "rollout/repeats_lost": pytest.approx(3 / 6),
        "rollout/repeats_compared": 2,
        "rollout/repeat_consistency": 0.5,  # of winning's two visits one looked
        "rollout/repeats_consistent": 1.0,
    }
    assert "rollout/repeat_consistency" not in logger.repeat_metrics([winning])


def responses(seed=0, vocabulary=7, width=5, lengths=(4, 3, 2)):
    """A readout layer W and, per response, hidden states [T, H] and tokens [T], in float64."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    return head, [
        (
            torch.randn(n, width, dtype=torch.float64, generator=generator),
            torch.randint(vocabulary, (n,), generator=generator),
        )
        for n in lengths
    ]


def log_prob(head, hidden, token):
    return torch.log_softmax(hidden @ head.T, -1).gather(1, token[:, None]).sum()


def error(head, hidden, token):
    return torch.nn.functional.one_hot(token, len(head)) - torch.softmax(hidden @ head.T, -1)


def test_coupling_is_the_first_order_change_of_another_response():
    head, ((hidden_i, token_i), (hidden_j, token_j), _) = responses()
    error_i, error_j = error(head, hidden_i, token_i), error(head, hidden_j, token_j)
    found = coupling.coupling(hidden_i, error_i, hidden_j, error_j)
    assert found == pytest.approx(coupling.coupling(hidden_j, error_j, hidden_i, error_i), rel=1e-12)  # symmetric
    learned = head.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(log_prob(learned, *one), learned)[0] for one in ((hidden_i, token_i), (hidden_j, token_j))
    ]
    assert found == pytest.approx(float((gradients[0] * gradients[1]).sum()), rel=1e-10)
    assert coupling.coupling(hidden_i, error_i, hidden_i, error_i) == pytest.approx(
        float((gradients[0] ** 2).sum()), rel=1e-10
    )
    eta = 1e-5
    moved = head + eta * gradients[0]
    change = float(log_prob(moved, hidden_j, token_j) - log_prob(head, hidden_j, token_j))
    assert change / eta / found == pytest.approx(1, abs=1e-4)


def test_coupling_by_hand():
    found = coupling.coupling(
        torch.tensor([[2.0]]), torch.tensor([[0.5, -0.5]]), torch.tensor([[3.0]]), torch.tensor([[0.2, -0.2]])
    )
    assert found == pytest.approx(1.2)  # (.1 + .1) * 6


def test_couplings_are_all_pairs_with_tokens_and_vocabulary_in_parts(monkeypatch):
    monkeypatch.setattr(coupling, "COUPLED_TOKENS", 2)
    head, each = responses()
    errors = [error(head, *one) for one in each]
    expected = [
        [coupling.coupling(h, e, g, f) for (g, _), f in zip(each, errors, strict=True)]
        for (h, _), e in zip(each, errors, strict=True)
    ]
    sample = torch.tensor([9, 9, 9, 9, 10, 10, 10, 12, 12])  # ids need not count from 0
    hidden = torch.cat([one for one, _ in each])
    found = coupling.couplings(hidden, torch.cat(errors).split(3, dim=1), sample)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_coupling_gap_by_hand():
    influence = torch.tensor([[4.0, 2.0, 1.0], [2.0, 1.0, 0.5], [1.0, 0.5, 9.0]])
    length, label = torch.tensor([2, 1, 4]), torch.tensor([1, 1, 0])
    gap = functools.partial(coupling.coupling_gap, influence, length, label)
    assert gap("sum") == pytest.approx(2 - 0.75)  # same: 2, 2; different: 1, .5, 1, .5
    assert gap("mean_src") == pytest.approx((1 + 2) / 2 - (0.5 + 0.5 + 0.25 + 0.125) / 4)
    assert gap("mean_both") == pytest.approx(1 - (1 / 8 + 0.5 / 4) / 2)
    assert gap("cos") == pytest.approx(2 / 2 - (1 / 6 + 0.5 / 3) / 2)
    weight = torch.tensor([[5.0, 1.0, 0.0], [1.0, 5.0, 1.0], [0.0, 1.0, 5.0]])  # without the pair of 0 and 2
    assert gap("sum", weight) == pytest.approx(2 - 0.5)
    assert math.isnan(coupling.coupling_gap(influence, length, torch.ones(3)))  # no pair of different labels


def danger(visits: int, taken: int, penalty: float, pull: float) -> dict[str, float]:
    """One flawed action, taken `taken` times of `visits` with a total advantage of `penalty`, its own influence 1; one
    other sample is drawn, whose pull on it stands for all others'."""
    steps = [("hall", "look")] * taken + [("hall", "go")] * (visits - taken)
    advantage_N = np.array([penalty / taken] * taken + [1.0] * (visits - taken))
    influence_RR = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, pull / visits], [0.0, 0.0, 1.0]])  # good, flawed, drawn
    return coupling.dangers(influence_RR, [visits - 1, 0, visits - 1], 1, advantage_N, [episode(*steps)])


@pytest.mark.parametrize(
    ("visits", "taken", "penalty", "pull", "rising", "beyond"),
    [
        (4, 3, -1.0, 0.5, 0, 0),  # q = .75, and its penalty outweighs the pull
        (4, 3, -1.0, 2.0, 1, 1),  # beyond q+
        (10, 1, -0.09, 0.1, 1, 0),  # q = .1: r = 1, c = .1: rises to q-, where it stays
        (10, 1, -0.09, 0.26, 1, 1),  # c > r / 4: there is no root
        (10, 1, 0.01, 0.01, 1, 1),  # not punished at all
    ],
)
def test_danger_zone_by_hand(visits, taken, penalty, pull, rising, beyond):
    found = danger(visits, taken, penalty, pull)
    assert found == {"flawed_rising": rising, "flawed_in_danger": beyond, "flawed_placed": 1}


def test_a_state_seen_once_places_nothing():
    found = coupling.dangers(
        np.eye(3), [1, 0, 1], 1, np.array([-1.0, 1.0]), [episode(("hall", "look"), ("yard", "go"))]
    )
    assert found["flawed_placed"] == 0 and math.isnan(found["flawed_in_danger"]) and found["flawed_rising"] == 0


@pytest.fixture(scope="module")
def played(small_games):
    """The tiny policy, its config, and a won and a lost episode with replies that it could have made."""
    config = tiny.rl_config(small_games)
    tiny.join()
    policy = load_model(config)
    texts = tiny.chat_rows(small_games)
    texts = [text for text in texts if not text["prompt"].startswith("Role:")][:12]
    episodes = []
    for member, part in enumerate((texts[:6], texts[6:])):
        steps = []
        for index, text in enumerate(part):
            reply = policy.chat.encode_reply(text["response"])
            fields = (policy.chat.encode(text["prompt"]), reply, [0.0] * len(reply), text["prompt"], text["response"])
            steps.append(Step(*fields, f"room {index % 3}", text["response"][-20:], True, True, 0.0))
        steps[-1].reward = 10.0 * (member == 0)
        episodes.append(Episode(TASK, 0, member, steps, won=member == 0))
    return policy, config, episodes


def trained_samples(episodes, config) -> list[Sample]:
    samples = action_samples(episodes, config)
    set_advantages(samples, episodes, config)
    return samples


def test_observe_equals_its_definition(played):
    """The gaps, from each sample's gradient by the output layer's weights."""
    policy, config, episodes = played
    config = tiny.changed(config, "train.coupling_samples=6")
    samples = trained_samples(episodes, config)
    found = coupling.observe(policy, episodes, samples, config, iteration=0)
    assert found == coupling.observe(policy, episodes, samples, config, iteration=0)
    assert set(found) > {"coupling/flawed_rising"}
    # one good step only, the last of the won episode: no pairs within the good, so no gap to speak of
    assert "coupling/gap_cos" not in found
    episodes = [*episodes, dataclasses.replace(episodes[0], member=2)]
    samples = trained_samples(episodes, config)
    found = coupling.observe(policy, episodes, samples, config, iteration=0)
    good, flawed = [samples[5], samples[17]], [samples[i] for i in (0, 1, 2, 6, 7, 8, 12, 13, 14)]
    gradients = []
    for sample in good + flawed:
        hidden_TH, target_T = (one.detach() for one in last_hidden(policy, lay_out([sample], "padded")))
        weight = policy.inner.get_output_embeddings().weight.detach().double().requires_grad_()
        logits_TV = hidden_TH.double() @ weight.T / config.rollout.temperature
        logp = logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()
        gradients.append(torch.autograd.grad(logp, weight)[0].flatten() * config.rollout.temperature)
    influence_RR = torch.stack(gradients) @ torch.stack(gradients).T
    length_R = torch.tensor([len(sample.response_ids) for sample in good + flawed])
    label_R = torch.arange(11) < 2
    possible = []
    for a in range(2, 11):  # chosen are both good ones and two of the flawed
        for b in range(a + 1, 11):
            pick = torch.tensor([0, 1, a, b])
            possible.append(coupling.coupling_gap(influence_RR[pick][:, pick], length_R[pick], label_R[pick], "cos"))
    assert min(abs(found["coupling/gap_cos"] - one) for one in possible) < 1e-5


def test_observe_only_looks(played):
    policy, config, episodes = played
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    samples = trained_samples(episodes, config)
    coupling.observe(policy, episodes, samples, config, iteration=0)
    assert tiny.distance(before, policy.model.state_dict()) == 0
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_observe_now_and_then_and_never(played):
    policy, config, episodes = played
    samples = trained_samples(episodes, config)

    def measure(iteration: int, every: int) -> dict[str, float]:
        changed = tiny.changed(config, f"train.coupling_every={every}")
        return train_rl.measure_coupling(policy, episodes, samples, changed, iteration)

    assert measure(2, every=2) and not measure(3, every=2) and not measure(0, every=0)
    assert not coupling.observe(policy, [], [], config, iteration=0)

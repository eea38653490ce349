"""Live telemetry: what counts as a repeat, how consistent it is, and which flawed actions are in danger."""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch

import envs
import losses
import prompts
import rows as training_rows
import telemetry
from model import load_actor
from rollout import Episode, Step

TASK = envs.Task("alfworld", "pick_and_place_simple", "a game", "train")


def step(observation: str, action: str, offered: str = "", advantage: float = 0.0) -> Step:
    prompt = prompts.build_prompt("alfworld", "a task", observation, [offered])
    return Step([1], [2], [0.0], prompt, "", observation, action, True, True, 0.0, advantage=advantage)


def episode(*steps: tuple[str, ...], won: bool = False, group: int = 0, member: int = 0) -> Episode:
    return Episode(TASK, group, member, [step(*one) for one in steps], won)


def test_what_counts_as_a_repeat():
    played = episode(
        ("hall", "open door", "d"),
        ("Nothing happens.", "open door", "d"),
        ("Nothing happens.", "open door", "d"),
        ("hall", "look", "w"),
        ("hall", "open door", "w"),
    )
    found = {how: telemetry.repeats(played, how) for how in ("state_action", "consecutive", "action_any", "admissible")}
    assert found == {
        "state_action": [False, False, True, False, True],
        "consecutive": [False, True, True, False, False],
        "action_any": [False, True, True, False, True],
        "admissible": [False, True, True, False, False],  # the first retry after "Nothing happens." shows, too
    }


def test_repeat_metrics_by_hand():
    looping = episode(("hall", "look"), ("hall", "look"), ("hall", "look"), ("hall", "go"))  # 2 of 4 repeat
    winning = episode(("hall", "look"), ("hall", "go"), won=True, member=1)
    other_game = episode(("hall", "look"), ("hall", "look"), group=1)  # no other member: compared with nobody
    found = telemetry.repeat_metrics([looping, winning, other_game])
    assert found == {
        "rollout/repeats": pytest.approx(3 / 8),
        "rollout/repeats_won": 0.0,
        "rollout/repeats_lost": pytest.approx(3 / 6),
        "rollout/repeats_compared": 2,
        "rollout/repeat_consistency": 0.5,  # of winning's two visits one looked
        "rollout/repeats_consistent": 1.0,
    }
    assert "rollout/repeat_consistency" not in telemetry.repeat_metrics([winning])


def danger(visits: int, taken: int, penalty: float, pull: float) -> dict[str, float]:
    """One flawed action, taken `taken` times of `visits` with a total advantage of `penalty`, its own influence 1; one
    other row is drawn, whose pull on it stands for all rows'."""
    steps = [("hall", "look")] * taken + [("hall", "go")] * (visits - taken)
    advantage_N = np.array([penalty / taken] * taken + [1.0] * (visits - taken))  # [N]
    influence_RR = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, pull / visits], [0.0, 0.0, 1.0]])  # good, flawed, drawn
    return telemetry.dangers(influence_RR, [visits - 1, 0, visits - 1], 1, advantage_N, [episode(*steps)])


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
    found = telemetry.dangers(
        np.eye(3), [1, 0, 1], 1, np.array([-1.0, 1.0]), [episode(("hall", "look"), ("yard", "go"))]
    )
    assert found["flawed_placed"] == 0 and math.isnan(found["flawed_in_danger"]) and found["flawed_rising"] == 0


@pytest.fixture(scope="module")
def played(small_games):
    """The tiny actor, its config, and a won and a lost episode with replies that it could have made."""
    config = tiny.rl_config(small_games)
    tiny.join()
    actor = load_actor(config)
    texts = tiny.chat_rows(small_games)
    texts = [text for text in texts if not text["prompt"].startswith("Role:")][:12]
    episodes = []
    for member, part in enumerate((texts[:6], texts[6:])):
        steps = []
        for index, text in enumerate(part):
            reply = actor.encode_reply(text["response"])
            fields = (actor.encode(text["prompt"]), reply, [0.0] * len(reply), text["prompt"], text["response"])
            steps.append(Step(*fields, f"room {index % 3}", text["response"][-20:], True, True, 0.0))
        steps[-1].reward = 10.0 * (member == 0)
        episodes.append(Episode(TASK, 0, member, steps, won=member == 0))
    return actor, config, episodes


def test_observe_equals_its_definition(played):
    """The gaps, from each row's gradient by the output layer's weights."""
    actor, config, episodes = played
    config = tiny.changed(config, "train.coupling_rows=6")
    rows = training_rows.actor_rows(episodes, config)
    found = telemetry.observe(actor, episodes, rows, config, iteration=0)
    assert found == telemetry.observe(actor, episodes, rows, config, iteration=0)
    assert set(found) > {"coupling/flawed_rising"}
    # one good step only, the last of the won episode: no pairs within the good, so no gap to speak of
    assert "coupling/gap_cos" not in found
    episodes = [*episodes, dataclasses.replace(episodes[0], member=2)]
    rows = training_rows.actor_rows(episodes, config)
    found = telemetry.observe(actor, episodes, rows, config, iteration=0)
    good, flawed = [rows[5], rows[17]], [rows[i] for i in (0, 1, 2, 6, 7, 8, 12, 13, 14)]
    gradients = []
    for row in good + flawed:
        hidden_TH, target_T = (one.detach() for one in telemetry.last_hidden(actor, [row]))
        weight = actor.inner.get_output_embeddings().weight.detach().double().requires_grad_()
        logits_TV = hidden_TH.double() @ weight.T / config.rollout.temperature  # [T, V]
        logp = logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()
        gradients.append(torch.autograd.grad(logp, weight)[0].flatten() * config.rollout.temperature)
    influence_RR = torch.stack(gradients) @ torch.stack(gradients).T  # [R, R]
    length_R = torch.tensor([len(row.response_ids) for row in good + flawed])  # [R]
    label_R = torch.arange(11) < 2  # [R]
    possible = []
    for a in range(2, 11):  # the sample is both good rows and two of the flawed
        for b in range(a + 1, 11):
            pick = torch.tensor([0, 1, a, b])
            possible.append(losses.coupling_gap(influence_RR[pick][:, pick], length_R[pick], label_R[pick], "cos"))
    assert min(abs(found["coupling/gap_cos"] - one) for one in possible) < 1e-5


def test_observe_only_looks(played):
    actor, config, episodes = played
    before = {name: weight.clone() for name, weight in actor.model.state_dict().items()}
    rows = training_rows.actor_rows(episodes, config)
    telemetry.observe(actor, episodes, rows, config, iteration=0)
    assert tiny.distance(before, actor.model.state_dict()) == 0
    assert all(parameter.grad is None for parameter in actor.model.parameters())


def test_observe_now_and_then_and_never(played):
    actor, config, episodes = played
    rows = training_rows.actor_rows(episodes, config)
    every_second = tiny.changed(config, "train.coupling_every=2")
    assert telemetry.observe(actor, episodes, rows, every_second, iteration=2)
    assert not telemetry.observe(actor, episodes, rows, every_second, iteration=3)
    assert not telemetry.observe(actor, episodes, rows, tiny.changed(config, "train.coupling_every=0"), iteration=0)
    assert not telemetry.observe(actor, [], [], config, iteration=0)


def test_offered_actions_are_read_back():
    text = prompts.build_prompt("alfworld", "a task", "a hall: actions are: [x]", ["go to desk 1", "look"])
    assert prompts.offered(text) == "'go to desk 1'\n 'look']."
    text = prompts.build_prompt("scienceworld", "a task", "a hall", ["open OBJ"], objects=["door"])
    assert "open OBJ" in prompts.offered(text) and "door" in prompts.offered(text)
    assert prompts.offered("no prompt of an actor") == ""

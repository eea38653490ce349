"""analysis.py: influences against gradients, intervals and accuracies by hand, and the script on two small runs."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

import analysis
import judge
import model
import prompts
import telemetry
from config import Config, ConfigError
from model import Row, load_actor
from rollout import Step


def test_influences_are_inner_products_of_gradients(small_games, tmp_path, monkeypatch):
    """The padded micro-batches, the temperature and the vocabulary in parts give what autograd gives row by row."""
    monkeypatch.setattr(telemetry, "VOCABULARY_PART", 300)
    config = tiny.rl_config(small_games, "train.tokens_per_micro_batch=400")
    actor = load_actor(config)
    texts = [
        ("A lamp.", "Take it."),
        ("A longer room, with a desk and a shelf.", "Go to the desk."),
        ("Fridge.", "No."),
    ]
    rows = [Row(np.array(actor.encode(ask)), np.array(actor.encode_reply(reply))) for ask, reply in texts]
    gradients = []
    for row in rows:
        hidden_TH, target_T = (tensor.detach() for tensor in model.last_hidden(actor, [row]))
        weight = actor.model.get_output_embeddings().weight.detach().double().requires_grad_()
        logits_TV = hidden_TH.double() @ weight.T / config.rollout.temperature  # [T, V]
        logp = logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()
        gradients.append(torch.autograd.grad(logp, weight)[0].flatten() * config.rollout.temperature)
    expected = torch.stack([torch.stack([one @ other for other in gradients]) for one in gradients])
    torch.testing.assert_close(telemetry.influences(actor, rows, config), expected, rtol=1e-4, atol=1e-4)


def test_interval_by_games():
    games, value = np.array([5, 5, 7, 7]), np.array([1.0, 1.0, 0.0, 0.0])

    def mean(times):
        return float((value * times).sum() / times.sum())

    assert analysis.interval(mean, games) == [0.5, 0.0, 1.0]  # half of the resamples hold one of the games, twice
    low, high = analysis.interval(mean, np.arange(4))[1:]
    assert (low, high) == (0.0, 1.0)  # 1 of 16 resamples has no good one, 1 of 16 no other
    assert analysis.interval(lambda times: 1.0 if times.min() else math.nan, games) == [1.0, 1.0, 1.0]
    assert math.isnan(analysis.interval(lambda times: math.nan, games)[1])


def question(game: int, label: int) -> judge.Question:
    step = Step([1], [2], [0.0], "prompt", "reply", "a room", "look", True, True, 0.0, label=label)
    return judge.Question(game, 0, 0, step, [], [])


def test_balanced_accuracy_weighs_both_classes_alike(monkeypatch):
    steps = [question(0, 1), question(1, 0), question(2, 0), question(3, 0)]
    verdicts = {0: [1, 1], 1: [0, 1], 2: [0, None], 3: [1, 1]}  # by game

    def ask(engine, questions, config, iteration):
        for one in questions:
            for score in verdicts[one.group]:
                critique = prompts.Critique(score, None, None)
                one.critiques.append(critique)
                one.answers.append(
                    Step([1], [2], [0.0], "", "", "", "", True, True, judge.judge_reward(critique, one.step.label))
                )

    monkeypatch.setattr(judge, "ask", ask)
    found = analysis.accuracies(None, steps, None)
    assert found["accuracy of good"][0] == 1 and found["accuracy of flawed"][0] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["balanced accuracy"][0] == pytest.approx((1 + 1 / 3) / 2)
    assert found["steps"] == 4 and found["too long"] == 0
    assert not steps[0].answers  # the panel can be asked again


def test_two_runs_from_one_start(small_games, tmp_path):
    """The script on a run and its copy that says it is without GCD: both have the same numbers at their start."""
    settings = ("name=gcd", "train.eval_every=0", "guidelines.every=0")
    tiny.run("train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
    plain = tiny.copy(tmp_path / "runs/gcd", tmp_path / "runs/plain") / "config.yaml"
    plain.write_text(plain.read_text().replace("judge:\n  enabled: true", "judge:\n  enabled: false"))
    command = ["analysis.py", "runs/plain", "runs/gcd", "--figures", "8", "judge", "--games", "6", "--steps", "12"]
    printed = tiny.run(*command, cwd=tmp_path)
    assert "gigpo with GCD" in printed and "1 runs" in printed
    for figure, name in (("8", "cos"), ("judge", "balanced accuracy on own steps")):
        found = json.loads((tmp_path / f"figures/figure_{figure}.json").read_text())
        records = found["checkpoints"]
        stages = [(one["run"], one["method"], one["iteration"]) for one in records]
        methods = (("plain", "gigpo"), ("gcd", "gigpo with GCD"))
        assert stages == [(run, method, iteration) for run, method in methods for iteration in (0, 1, 2)]
        assert records[0][name] == records[3][name] != records[5][name]
        middle, low, high = records[0][name]
        assert low <= middle <= high and -1 <= low and high <= 2
        assert found["config"]["judge"]["teacher"] == "expert"
        assert (tmp_path / f"figures/figure_{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="it has no config.yaml"):
        analysis.load_run(tmp_path, [])
    with pytest.raises(ConfigError, match="has no checkpoints of iterations"):
        analysis.snapshots(tmp_path, Config())

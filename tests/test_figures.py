"""The paper's figures: measures against their definitions, and the script on runs of a real, tiny model."""

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest
import tiny
import torch

import envs
import judge
import model
import prompts
from config import Config, ConfigError
from engine import Completion
from packing import Sample, lay_out
from paper import behaviour, coupling, figures, geometry
from paper.behaviour import Subject
from rollout import Episode, Step
from samples import make_sample

TEXTS = [
    ("A room.", "Take the mug."),
    ("Another room, with a desk and a shelf.", "Go to the desk."),
    ("Fridge.", "No."),
]


@pytest.fixture(scope="module")
def subject(small_games) -> Subject:
    """The tiny policy with three steps of two games as its episodes; nothing can be sampled."""
    config = tiny.rl_config(small_games)
    tiny.join()
    policy = model.load_model(config)
    steps = []
    for number, (ask, reply) in enumerate(TEXTS):
        ids = (policy.chat.encode(ask), policy.chat.encode_reply(reply), [])
        steps.append(Step(*ids, ask, reply, "a room", f"take mug {number}", True, True, 0.0, label=number % 2))
    task = envs.Task("alfworld", "pick_and_place_simple", "a game", "train")
    episodes = [Episode(task, 0, 0, steps[:2]), Episode(task, 1, 0, steps[2:])]
    panel = [judge.Question(0, 0, 0, 0, TEXTS[0][0]), judge.Question(0, 0, 1, 1, TEXTS[1][0])]

    class Silent:
        pass

    Silent.policy = policy
    folder = config.model.path
    return Subject(Silent, config, episodes, episodes, episodes, panel, folder, folder)


def samples_of(subject: Subject) -> list[Sample]:
    return [make_sample(step) for episode in subject.own for step in episode.steps]


def output_gradients(subject: Subject, samples: list[Sample]) -> list[torch.Tensor]:
    """Of each response's log-prob by the output layer's weights, in units of the scaled logits: float64 [V * H]."""
    policy, temperature = subject.engine.policy, subject.config.rollout.temperature
    gradients = []
    for sample in samples:
        hidden_TH, target_T = (tensor.detach() for tensor in model.last_hidden(policy, lay_out([sample], "padded")))
        weight = policy.model.get_output_embeddings().weight.detach().double().requires_grad_()
        logits_TV = hidden_TH.double() @ weight.T / temperature
        logp = logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()
        gradients.append(torch.autograd.grad(logp, weight)[0].flatten() * temperature)
    return gradients


def test_influences_are_inner_products_of_gradients(subject, monkeypatch):
    """The padded micro-batches, the temperature and the vocabulary in parts give what autograd gives one by one."""
    monkeypatch.setattr(coupling, "VOCABULARY_PART", 300)
    gradients = output_gradients(subject, samples_of(subject))
    expected = torch.stack([torch.stack([one @ other for other in gradients]) for one in gradients])
    found = coupling.influences(subject.engine.policy, samples_of(subject), subject.config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_token_influences_add_up_to_the_samples(subject):
    """Figure 9's tokens of the first sample together have its influence with all other samples."""
    samples = samples_of(subject)
    found_T = geometry.token_influences(subject.engine.policy, samples, subject.config)
    assert len(found_T) == len(samples[0].response_ids)
    whole_RR = coupling.influences(subject.engine.policy, samples, subject.config)
    assert found_T.sum() == pytest.approx(float(whole_RR[0, 1:].sum()), rel=1e-4, abs=1e-4)


def test_classes_of_tokens():
    pieces = ["<think>", "Need", " mug 1", ".", " 12", "</think>", "<action>", "go to", " desk 2", "</action>", ""]
    thought = ["tags", "reasoning", "object names", "reasoning", "numbers", "tags"]
    assert geometry.token_classes(pieces) == [*thought, "tags", "action words", "object names", "tags", "other"]
    assert geometry.token_classes(["<action>", "look", "<|im_end|>"]) == ["tags", "action words", "other"]
    assert geometry.token_classes(["It", " is", " 3", "."], to_question=True) == ["reasoning"] * 2 + [
        "numbers",
        "reasoning",
    ]
    assert geometry.action_tokens(pieces) == [7, 8] and geometry.action_tokens(["<action>", "look", "<|e|>"]) == [1, 2]
    assert geometry.action_tokens(["no", " action"]) == []


def test_an_answer_is_right_by_its_last_number():
    assert geometry.is_right("First 3, then 1,072.", "... so #### 1072")
    assert geometry.is_right("It is -4.50", "-4.5")
    assert not geometry.is_right("7 of 3", "7") and not geometry.is_right("none", "7")


def test_likelihood_of_a_reply_and_of_its_action(subject):
    policy, config = subject.engine.policy, subject.config
    replies = ["<think>Need mug 1.</think><action>go to desk 2</action>", "no action at all"]
    chat = policy.chat
    samples = [Sample(np.array(chat.encode("A room.")), np.array(chat.encode_reply(reply))) for reply in replies]
    found = geometry.likelihoods(policy, samples, config)
    with torch.no_grad():
        logp_T = (
            model.token_logprobs(policy, lay_out(samples[:1], "padded"), config.rollout.temperature)[0].double().numpy()
        )
    pieces = geometry.pieces_of(policy, samples[0].response_ids)
    words = ["go" in piece or "to" in piece or "desk" in piece or "2" in piece for piece in pieces]
    assert "".join(np.array(pieces)[words]).strip() == "go to desk 2"
    assert found["reply"][0] == pytest.approx(logp_T.mean(), abs=1e-5)
    assert found["action's words"][0] == pytest.approx(logp_T[words].mean(), abs=1e-5)
    assert found["probability"][0] == pytest.approx(np.exp(logp_T[words].sum()), rel=1e-4)
    assert np.isfinite(found["reply"][1]) and np.isnan([found["action's words"][1], found["probability"][1]]).all()


def test_pieces_are_the_reply(subject):
    policy = subject.engine.policy
    ids = policy.chat.encode_reply("<think>Need mug 1.</think><action>go to desk 2</action>")
    assert "".join(geometry.pieces_of(policy, ids)) == policy.chat.tokenizer.decode(ids)


def test_states_equal_one_pass_per_row(subject):
    policy, samples = subject.engine.policy, samples_of(subject)
    found = geometry.states(policy, samples, budget=64)
    for number, sample in enumerate(samples):
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64))[None]
        with torch.no_grad():
            hidden_SH = policy.inner.base_model(input_ids=ids).last_hidden_state[0].double()
        expected = (hidden_SH.mean(0), hidden_SH[len(sample.prompt_ids) :].mean(0), hidden_SH[-1])
        for state_RH, one in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(state_RH[number], one, rtol=1e-4, atol=1e-5)


def test_similarity_by_what_two_steps_share(subject):
    found = geometry.embed_sim(subject)
    state_RH = geometry.states(subject.engine.policy, samples_of(subject), 64)["prompt and response"]
    order = [step for _, step in geometry.draw_steps(subject.own, 10)]
    assert len(order) == found["steps"] == 3
    unit_RH = torch.nn.functional.normalize(state_RH, dim=-1)
    assert found["same episode, raw, prompt and response"][0] == pytest.approx(float(unit_RH[0] @ unit_RH[1]), abs=1e-5)
    apart = float((unit_RH[0] @ unit_RH[2] + unit_RH[1] @ unit_RH[2]) / 2)
    assert found["different games, raw, prompt and response"][0] == pytest.approx(apart, abs=1e-5)
    assert math.isnan(found["same game, raw, prompt and response"][0])  # nobody else played the game
    assert sum(found["different games, centred, prompt and response, histogram"]) == 2


def test_a_step_moves_others_as_their_gradients_say_and_is_undone(subject):
    before = tiny.weights_of(subject.folder)
    found = geometry.step_influence(subject)
    assert tiny.distance(before, tiny.weights_of(subject.folder)) == 0
    assert found["sources"] == found["steps"] == 3
    policy = model.load_model(subject.config)
    samples = [make_sample(step) for _, step in geometry.draw_steps(subject.own, 10)]
    gradients = [
        torch.cat([g.flatten() for g in geometry.reply_gradients(policy, sample, subject.config)]) for sample in samples
    ]
    for way, direct in {"": lambda g: g, ", Adam": torch.sign}.items():
        assert 0 < found[f"own change{way}"] < 1.5 * geometry.SELF_CHANGE
        assert found[f"change / 10 x change by a tenth{way}"] == pytest.approx(1, abs=0.3)
        gain_RR = torch.stack([torch.stack([g @ direct(other) for g in gradients]) for other in gradients])
        gain_RR /= torch.tensor([len(sample.response_ids) for sample in samples])
        moved = geometry.SELF_CHANGE * gain_RR / gain_RR.diagonal().max()
        cell, pairs = found[f"cells, reply{way}, a tenth"]["take"]["take"]
        assert pairs == 6 and 10 * cell == pytest.approx(float(moved[~torch.eye(3, dtype=bool)].mean()), rel=0.1)
    assert (
        "cells, action's words" in found and found["cells, action's words"] == {}
    )  # none of these replies has an action


def test_kinds_of_actions():
    said = ["go to desk 2", "take mug 1 from desk 2", "look", "move metal pot to stove", "<invalid>", ""]
    assert [geometry.kind_of(action) for action in said] == ["go to", "take", "look", "move", "<invalid>", "<invalid>"]


def test_a_source_without_targets_of_a_kind_does_not_count():
    change_SR = np.array([[np.nan, 2.0, 4.0], [np.nan, np.nan, 1.0]])
    some_S, mean_S = geometry.source_means(change_SR, np.array([[True, True, True], [True, True, False]]))
    assert some_S.tolist() == [True, False] and mean_S[0] == 3.0


def test_a_model_has_not_drifted_from_itself(subject):
    found = geometry.layer_drift(subject)
    layers = subject.engine.policy.inner.config.num_hidden_layers
    assert found["logits, difference"] == found["hidden, difference"] == [0.0] * (layers + 1)
    np.testing.assert_allclose(found["logits, cosine"], 1, atol=1e-5)
    assert found["tokens"] == sum(len(sample.response_ids) for sample in samples_of(subject))


def test_the_lens_on_the_last_layer_is_the_model(subject):
    policy, sample = subject.engine.policy, samples_of(subject)[1]
    with torch.no_grad():
        logits_LTV = geometry.layer_logits(policy, geometry.layer_states(policy, sample))
        hidden_TH, _ = model.last_hidden(policy, lay_out([sample], "padded"))
        torch.testing.assert_close(
            logits_LTV[-1], policy.inner.get_output_embeddings()(hidden_TH), rtol=1e-4, atol=1e-4
        )
    assert float((logits_LTV[0] - logits_LTV[-1]).abs().max()) > 0.1


def test_interval_by_games():
    games, value = np.array([5, 5, 7, 7]), np.array([1.0, 1.0, 0.0, 0.0])

    def mean(times):
        return float((value * times).sum() / times.sum())

    assert behaviour.interval(mean, games) == [0.5, 0.0, 1.0]  # half of the resamples hold one of the games, twice
    low, high = behaviour.interval(mean, np.arange(4))[1:]
    assert (low, high) == (0.0, 1.0)  # 1 of 16 resamples has no good one, 1 of 16 no other
    assert behaviour.interval(lambda times: 1.0 if times.min() else math.nan, games) == [1.0, 1.0, 1.0]
    assert math.isnan(behaviour.interval(lambda times: math.nan, games)[1])
    assert behaviour.mean_of([1.0, 0.0], [3, 3]) == [0.5, 0.5, 0.5] and math.isnan(behaviour.mean_of([], [])[0])


def test_consistency_is_the_share_of_fresh_replies_with_the_action(subject):
    """Ten replies to each prompt, the recorded one left out; a malformed one takes the action <invalid>."""
    policy = subject.engine.policy
    said = ["<think>Yes.</think><action>look</action>"] * 4 + ["<think>No.</think><action>go</action>"] * 3
    said += ["no action", "<think>x</think>", ""]
    asked = []

    class Replies:
        def generate(self, prompt_ids, sampling):
            asked.extend(zip(prompt_ids, [one.seed for one in sampling], strict=True))
            return [Completion(policy.chat.encode_reply(text), []) for text in said * (len(prompt_ids) // 10)]

    Replies.policy = policy
    steps = [
        Step(policy.chat.encode(ask), [], [], ask, "", "a room", action, True, True, 0.0)
        for ask, action in (("A room.", "look"), ("Fridge.", "<invalid>"), ("Desk.", "jump"))
    ]
    found = behaviour.consistencies(dataclasses.replace(subject, engine=Replies()), steps, salt=1)
    assert found.tolist() == [0.4, 0.3, 0.0]
    assert [ids for ids, _ in asked] == [step.prompt_ids for step in steps for _ in range(10)]
    assert len({seed for _, seed in asked}) == 30


def question(game: int, label: int) -> judge.Question:
    return judge.Question(game, 0, 0, label, "prompt")


def test_balanced_accuracy_weighs_both_classes_alike(monkeypatch, subject):
    panel = [question(0, 1), question(1, 0), question(2, 0), question(3, 0)]
    verdicts = {0: [1, 1], 1: [0, 1], 2: [0, None], 3: [1, 1]}  # by game

    def ask(engine, questions, config, iteration):
        for one in questions:
            for score in verdicts[one.group]:
                critique = prompts.Critique(score, None, None)
                one.critiques.append(critique)
                one.answers.append(
                    Step([1], [2], [0.0], "", "", "", "", True, True, judge.judge_reward(critique, one.label))
                )

    monkeypatch.setattr(judge, "ask", ask)
    found = behaviour.accuracies(subject, panel)
    assert found["accuracy of good"][0] == 1 and found["accuracy of flawed"][0] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["balanced accuracy"][0] == pytest.approx((1 + 1 / 3) / 2)
    assert found["steps"] == 4 and found["too long"] == 0
    assert not panel[0].answers  # the panel can be asked again


def test_what_counts_as_a_repeat():
    played = acted(
        ("hall", "open door"),
        ("Nothing happens.", "open door"),
        ("Nothing happens.", "open door"),
        ("hall", "look"),
        ("hall", "open door"),
        won=False,
    )
    for step, action in zip(played.steps, "dddww", strict=True):
        step.prompt = prompts.build_prompt(prompts.PromptContext("alfworld", "a task", step.observation, (action,)))
    assert {how: behaviour.find_repeats(played, how, "alfworld") for how in behaviour.REPEATS} == {
        "state_action": [False, False, True, False, True],
        "consecutive": [False, True, True, False, False],
        "action_any": [False, True, True, False, True],
        "admissible": [False, True, True, False, False],  # the first retry after "Nothing happens." shows, too
    }


def test_offered_actions_are_read_back():
    ctx = prompts.PromptContext("alfworld", "a task", "a hall: actions are: [x]", ("go to desk 1", "look"))
    for guidelines in ((), ("Look.",)):
        assert behaviour.offered(prompts.build_prompt(ctx, guidelines), "alfworld")[0] == "'go to desk 1'\n 'look'"
    ctx = prompts.PromptContext("scienceworld", "a task", "a hall", ("open OBJ",), objects=("door",))
    assert behaviour.offered(prompts.build_prompt(ctx), "scienceworld")[:2] == ("'open OBJ'", "door")
    assert behaviour.offered("no prompt of a policy", "alfworld") == ()


def write_episodes(run, *episodes: Episode) -> None:
    (run / "episodes").mkdir(parents=True)
    lines = [json.dumps(episode.to_json(tokens=number < 2)) for number, episode in enumerate(episodes)]
    with gzip.open(run / "episodes/000000.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, '{"questions": [], "guidelines": []}']) + "\n")


def acted(*pairs: tuple[str, str], won: bool, group: int = 0, member: int = 0) -> Episode:
    task = envs.Task("alfworld", "pick_and_place_simple", "a game", "train")
    steps = [Step([1], [2], [0.0], "", "", seen, action, True, True, 0.0) for seen, action in pairs]
    return Episode(task, group, member, steps, won)


def test_repeat_rates_by_hand(tmp_path):
    """Won: 1 of 3 steps repeats; lost: 2 of 4. Within the group success and repeats go against each other."""
    won = acted(("hall", "look"), ("hall", "look"), ("hall", "go"), won=True)
    lost = acted(("hall", "look"), ("hall", "look"), ("hall", "look"), ("yard", "look"), won=False, member=1)
    write_episodes(tmp_path, won, lost)
    found = behaviour.repeat_rate(tmp_path)
    assert found["state_action per step, won"][0] == pytest.approx(1 / 3)
    assert found["state_action per step, lost"][0] == pytest.approx(2 / 4)
    assert found["action_any per step, lost"][0] == pytest.approx(3 / 4)
    assert found["state_action per episode, lost"][0] == 2
    assert found["state_action episodes with any, won"][0] == 1
    assert found["state_action covariance with success"][0] == pytest.approx((0.5 * 1 - 0.5 * 2) / 2)
    assert found["curve, lost"] == [[0, 0.5]]


def test_selection_is_not_read_as_learning():
    """Figure 5's bins come from one set of replies of the start, all its curves from others."""
    start = {"start": "base", "bins": [3, 0], "start panel labels": [1, 0], "start panel games": [0, 1]}
    records = [start | {"start panel consistency": [0.6, 0.1]}, start | {"start panel consistency": [0.9, 0.3]}]
    del records[1]["bins"]
    behaviour.add_bins(records)
    assert [record["good, 0.8 to 1.0"][0] for record in records] == [0.6, 0.9]
    assert [record["flawed, 0.0 to 0.2"][0] for record in records] == [0.1, 0.3]
    assert math.isnan(records[0]["good, 0.0 to 0.2"][0]) and records[0]["good, 0.0 to 0.2 steps"] == 0


def test_overhead_is_against_the_plain_method():
    record = {"seconds of the judge": 1.0, "success": [0.5]}
    records = [
        record | {"run": "a", "method": "grpo", "seconds per iteration": 10.0},
        record | {"run": "b", "method": "grpo with GCD", "seconds per iteration": 12.9},
    ]
    lines = figures.time_table(records, figures.FIGURES["11"]).splitlines()
    assert "over plain" not in lines[1] and "+29.0% over plain" in lines[2]


def test_every_figure_of_two_runs_from_one_start(small_games, tmp_path):
    """The script on a run and its copy that says it is without GCD: both have the same numbers at their start."""
    settings = ("name=gcd", "guidelines.every=0", "train.checkpoint_every=2")
    tiny.run("train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
    level = {"success": 0.5, "low": 0.4, "high": 0.6}
    (tmp_path / "runs/gcd/eval_000020.json").write_text(json.dumps({"levels": {"L0": level}}))
    plain = tiny.copy(tmp_path / "runs/gcd", tmp_path / "runs/plain") / "config.yaml"
    plain.write_text(plain.read_text().replace("judge:\n  enabled: true", "judge:\n  enabled: false"))
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": f"{n}"}) + "\n" for n in range(4)))
    names = list(figures.FIGURES)
    command = ["paper/figures.py", "runs/plain", "runs/gcd", "--figures", *names, "--games", "6", "--steps", "12"]
    printed = tiny.run(*command, "--questions", asked, cwd=tmp_path, timeout=900)
    assert "gigpo with GCD" in printed and "1 run " in printed
    made = {name: json.loads((tmp_path / f"figures/figure_{name}.json").read_text()) for name in names}
    for name, figure in made.items():
        assert (tmp_path / f"figures/figure_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert figure["config"]["judge"]["teacher"] == "expert"
        stages = [(one["run"], one["method"], one.get("iteration")) for one in figure["checkpoints"]]
        methods = (("plain", "gigpo"), ("gcd", "gigpo with GCD"))
        times = [None] if figures.FIGURES[name].needs else [0, 2]
        assert stages == [(run, method, at) for run, method in methods for at in times]
    for name, number in (("8", "cos"), ("judge", "balanced accuracy on own steps")):
        records = made[name]["checkpoints"]
        assert records[0][number] == records[2][number] != records[3][number]
        middle, low, high = records[0][number]
        assert low <= middle <= high
    (alike,) = [one for one in made["9"]["checkpoints"] if one["run"] == "gcd" and one["iteration"] == 2]
    shares = [alike[f"{kind}, share of positive influence"][0] for kind in geometry.CLASSES]
    assert sum(shares) == pytest.approx(1) and "questions: tokens" in alike
    first = made["1"]["checkpoints"]
    assert first[0]["own consistency"] == first[0]["panel consistency"]  # its own repeats are the panel
    assert first[0]["panel repeats"] == first[1]["panel repeats"]
    assert first[0]["own repeats by action_any"] >= first[0]["own repeats"]
    assert made["7"]["checkpoints"][0]["L0"] == [0.5, 0.4, 0.6]
    assert made["11"]["checkpoints"][0]["iterations"] == [1, 2]
    assert made["11"]["checkpoints"][0]["eval/L0"][0][0] == 2
    assert made["3a"]["checkpoints"][0]["questions"] == 4
    assert made["10b"]["checkpoints"][1]["logits, difference"][-1] == 0  # the reference itself
    assert made["10b"]["checkpoints"][0]["logits, difference"][-1] > 0  # where it came from


def test_a_panels_questions_lead_to_their_steps(subject):
    assert [subject.step_of(question) for question in subject.panel] == subject.start[0].steps


def test_a_panel_without_one_of_the_classes_says_so(subject):
    bare = dataclasses.replace(subject, labelled=[])
    for measure in (geometry.coupling_gaps, geometry.similar_tokens, behaviour.held_out_judge):
        with pytest.raises(behaviour.Missing, match="no labelled steps of both classes"):
            measure(bare)
    apart = [dataclasses.replace(question, group=number, index=0) for number, question in enumerate(subject.panel)]
    with pytest.raises(behaviour.Missing, match="no game has both"):
        geometry.similar_tokens(dataclasses.replace(subject, labelled=apart))


def test_a_cold_start_is_measured_where_it_began_and_where_it_ended(tmp_path):
    (tmp_path / "checkpoints/final").mkdir(parents=True)
    shots = figures.snapshots(tmp_path, Config())
    start, end = Config().model.path, str(tmp_path / "checkpoints/final")
    assert [(shot.start, shot.iteration, shot.folder) for shot in shots] == [(start, 0, start), (start, 1, end)]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="it has no config.yaml"):
        figures.load_run(tmp_path, [])
    with pytest.raises(ConfigError, match="has no checkpoints"):
        figures.snapshots(tmp_path, Config())
    with pytest.raises(ConfigError, match=r"Figure 7.* has no eval_\*.json, which python evaluate.py .* writes"):
        figures.check_files(figures.FIGURES["7"], [tmp_path])
    wrong = tmp_path / "questions.jsonl"
    wrong.write_text('{"problem": "2 + 2"}\n')
    with pytest.raises(ConfigError, match="a field 'question'"):
        figures.read_questions(wrong)


def test_the_papers_labels_need_five_equal_votes():
    config = figures.for_panels([dataclasses.replace(Config())], games=3, steps=9, labels="openai")
    assert (config.judge.votes, config.judge.agreement, config.eval.games) == (5, "unanimous", 3)

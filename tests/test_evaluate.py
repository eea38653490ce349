"""evaluate.py: intervals and summaries by hand, evaluation repeatable for any number of ranks, the table."""

import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

import envs
import evaluate
from config import ConfigError, newest_evaluation
from engine import Engine, SamplingParams, make_engine
from environments import alfworld
from evaluate import evaluate_levels, rate, summarise, summary_line, table
from model import load_model
from rollout import Episode, Step


@pytest.mark.parametrize(
    "won, n, low, high",
    [  # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964
        (8, 10, 0.49016, 0.94332),
        (0, 10, 0.0, 0.27753),  # z²/n / (1 + z²/n)
        (10, 10, 0.72247, 1.0),
        (1, 2, 0.09453, 0.90547),
        (368, 600, 0.57376, 0.65146),
    ],
)
def test_wilson_interval_where_every_game_is_played_once(won, n, low, high):
    found = rate(plays([[index < won] for index in range(n)]))
    assert found["n"] == found["games"] == n and found["success"] == pytest.approx(won / n)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(
    "won_by_game, effective",
    [
        # all plays of a game alike: (4 (3/2)^2 / 12^2) (4/3) / ((1/4) / 11), so 12 plays count as 36/11
        ([[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]], 36 / 11),
        ([[1, 0], [0, 1], [1, 0], [0, 1]], 8),  # less alike than chance: no credit for it
        ([[0, 0, 0], [0, 0, 0]], 2),  # cannot be told: as many as games
        ([[1, 0, 0]], 1),
    ],
)
def test_plays_of_one_game_count_for_less(won_by_game, effective):
    found = rate(plays(won_by_game))
    assert found["n"] == sum(map(len, won_by_game)) and found["games"] == len(won_by_game)
    assert (found["low"], found["high"]) == pytest.approx(evaluate._wilson(found["success"], effective))


def test_intervals_cover_the_truth():
    """Games of very different difficulty: 95 % of the intervals hold the mean, against 88 % of those that took plays as
    independent."""
    rng = np.random.default_rng(0)
    trials, truth, covered, naive = 400, 0.3, 0, 0
    for _ in range(trials):
        difficulty = rng.beta(0.3, 0.7, size=60)
        found = rate(plays(rng.random((60, 3)) < difficulty[:, None]))
        covered += found["low"] <= truth <= found["high"]
        low, high = evaluate._wilson(found["success"], found["n"])
        naive += low <= truth <= high
    assert 0.92 <= covered / trials <= 0.98 and naive / trials < 0.9


def plays(won_by_game) -> list[Episode]:
    """Episodes without steps: one list of outcomes per game."""
    tasks = [envs.Task("alfworld", "heat", str(number), "split") for number in range(len(won_by_game))]
    return [Episode(task, 0, 0, [], bool(won)) for task, game in zip(tasks, won_by_game, strict=True) for won in game]


def step(observation: str, action: str, valid: bool = True, available: bool = True) -> Step:
    return Step([1], [2], [0.0], "", "", observation, action, valid, available, 0.0)


def episode(kind: str, member: int, won: bool, *steps: Step) -> Episode:
    task = envs.Task("alfworld", kind, "id", "split")
    return Episode(task, 0, member, list(steps), won, float(won), won_loose=won)


def test_summary_of_hand_made_episodes():
    episodes = [
        episode("heat", 0, True, step("a", "x"), step("b", "x")),
        episode("heat", 1, False, step("a", "x"), step("a", "x"), step("a", "x", available=False), step("a", "y")),
        episode("cool", 0, False, step("a", "", valid=False, available=False)),
        episode("cool", 1, False, step("c", "y", valid=False)),
    ]
    found = summarise(episodes)
    assert (found["success"], found["n"]) == (0.25, 4)
    by_type = {kind: (one["success"], one["n"]) for kind, one in found["types"].items()}
    assert by_type == {"cool": (0, 2), "heat": (0.5, 2)} and found["types"]["heat"]["won_by_game"] == [1]
    assert found["by_seed"] == [0.5, 0.0]
    assert found["mean_steps"] == 2.0 and found["mean_steps_won"] == 2.0
    assert found["invalid"] == 2 / 8 and found["unavailable"] == 2 / 8
    assert found["mean_of_types"] == 0.25 and found["success_loose"] == 0.25
    assert summarise(episodes[:3])["mean_of_types"] == 0.25 != summarise(episodes[:3])["success"]
    assert found["repeats"] == 2 / 8  # the same action on the same text: episode 2's second and third
    assert summarise(episodes[2:])["mean_steps_won"] is None
    json.dumps(found)


def result(success: float, n: int, kind: str) -> dict:
    one = {"success": success, "n": n, "low": 0.1234, "high": 0.9}
    shares = {"invalid": 0.5, "unavailable": 0.25, "repeats": 0.125, "success_loose": success, "mean_of_types": success}
    return one | {"types": {kind: one}, "mean_steps": 7.25} | shares


def test_table():
    assert summary_line(result(0.6133, 600, "heat")) == "61.3 [12.3, 90.0] n=600"
    records = {"base": {"levels": {"L0": result(0.5, 10, "heat")}},
               "longer_name": {"levels": {"L0": result(0.75, 20, "heat"), "L2": result(1.0, 5, "cool")}}}  # fmt: skip
    heading, base, longer = table(records).splitlines()
    assert heading.split() == ["L0", "L2"] and base.split()[0] == "base" and longer.split()[0] == "longer_name"
    assert base.endswith("-" + " " * 27) and "75.0 [12.3, 90.0] n=20" in longer and "100.0" in longer
    assert heading.index("L2") == longer.index("100.0") == base.rindex("-")
    detailed = table({"one": {"levels": {"L0": result(0.5, 10, "heat")}}}, by_type=True)
    assert "L0: 7.2 steps per episode, 50.0 % malformed replies, 25.0 % unavailable actions, 12.5 % repeats" in detailed
    assert "  heat " in detailed and "loose" not in detailed and "mean over" not in detailed


def test_table_marks_what_is_no_held_out_type_and_shows_the_loose_rule():
    seen = result(0.5, 10, "heat") | {"trained_on": ["heat"], "success_loose": 0.75}
    shown = table({"one": {"levels": {"L2": seen}}}, by_type=True)
    assert "50.0* [12.3, 90.0] n=10" in shown and "* task types that the run was trained on" in shown
    assert re.search(r"won by the loose published rule +75.0", shown)
    fresh = seen | {"trained_on": [], "success_loose": 0.5, "types": seen["types"] | {"cool": seen["types"]["heat"]}}
    shown = table({"one": {"levels": {"L2": fresh}}}, by_type=True)
    assert "*" not in shown and "loose" not in shown and re.search(r"mean over task types +50.0", shown)


# ---- Playing


@pytest.fixture(scope="module")
def config(small_games):
    return tiny.rl_config(small_games, "rollout.engine=transformers", "eval.games=4")


@pytest.fixture(scope="module")
def engine(config):
    tiny.join()
    return make_engine(config, load_model(config))


def test_levels_are_played_whole_and_repeatably(engine, config):
    results, episodes = evaluate_levels(engine, config, [])
    again, others = evaluate_levels(engine, config, [])
    assert results == again and episodes == others
    assert list(results) == ["L0", "L1"]
    for level in results:
        games = envs.tasks(config.env, level, "eval")
        assert results[level]["n"] == 8 and len(results[level]["by_seed"]) == 2
        played = [episode for episode in episodes if episode.task.split == games[0].split]
        assert [(e.group, e.member) for e in played] == [(group, member) for group in range(4) for member in range(2)]
        assert [e.task for e in played[::2]] == [e.task for e in played[1::2]]
        assert len({e.task for e in played}) == 4 and {e.task for e in played} <= set(games)
    pairs = zip(episodes[::2], episodes[1::2], strict=True)
    assert any([s.response for s in one.steps] != [s.response for s in two.steps] for one, two in pairs)  # seeds differ


def test_without_a_number_every_game_is_played(engine, config):
    config = tiny.changed(config, "eval.games=0", "eval.seeds=1", "env.max_steps=1", "eval.levels=[L0]")
    _, episodes = evaluate_levels(engine, config, [])
    assert [episode.task for episode in episodes] == envs.tasks(config.env, "L0", "eval")


def test_an_evaluation_in_training_gives_way_to_a_signal(engine, config):
    told = SimpleNamespace(received=True, any_rank=lambda: True)
    assert evaluate_levels(engine, config, [], preemption=told) == ({}, [])
    told = SimpleNamespace(received=False, any_rank=lambda: False)
    assert list(evaluate_levels(engine, config, [], preemption=told)[0]) == ["L0", "L1"]


@pytest.mark.parametrize("text", ["", '{"levels": {'])
def test_a_torn_evaluation_is_named(text, tmp_path, monkeypatch):
    (tmp_path / "eval_000001.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--table", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"eval_000001.json is torn .*: delete it"):
        evaluate.main()


def test_the_newest_evaluation(tmp_path):
    for name, newest in (("base", "base"), ("000020", "000020"), ("000007", "000020"), ("final", "final")):
        (tmp_path / f"eval_{name}.json").write_text("{}")
        assert newest_evaluation(tmp_path) == tmp_path / f"eval_{newest}.json"


def test_guidelines_are_in_the_prompts(engine, config):
    _, plain = evaluate_levels(engine, config, [])
    _, guided = evaluate_levels(engine, config, ["Open every drawer."])
    assert all("- Open every drawer.\n" in step.prompt for episode in guided for step in episode.steps)
    assert not any("guideline" in step.prompt for episode in plain for step in episode.steps)


def test_vllms_copy_of_the_weights_is_the_only_one(config, engine, monkeypatch):
    policy = load_model(config, train=False)
    expected, asked = policy.model.state_dict(), []

    class Vllm(Engine):
        def __init__(self, policy, config):
            super().__init__(policy)
            asked.append("start")

        def load_weights(self, named):
            self.weights = dict(named)

    monkeypatch.setattr("engine.VllmEngine", Vllm)
    monkeypatch.setattr(policy.model, "to", asked.append)
    made = make_engine(tiny.changed(config, "rollout.engine=vllm"), policy, keep_model=False)
    assert asked == ["cpu", "start"]  # vLLM looks how much of the GPU is free
    assert tiny.distance(made.weights, expected) == 0
    assert policy.model is None and made.policy.chat.encode("Look.") == engine.policy.chat.encode("Look.")


def test_the_transformers_engine_keeps_the_weights_it_samples_with(config):
    engine = make_engine(config, load_model(config, train=False), keep_model=False)
    assert len(engine.generate([[5, 6, 7]], [SamplingParams(1.0, 3, 0)])[0].ids) > 0


def test_more_games_than_there_are_is_an_error(engine, config):
    with pytest.raises(ConfigError, match="eval.games=999, but L0 has only"):
        evaluate_levels(engine, tiny.changed(config, "eval.games=999"), [])


def test_lost_episodes_are_not_swept_under_the_rug(engine, config, monkeypatch):
    class Dead(alfworld.Alfworld):
        def step(self, action):
            raise ConnectionError("dead")

    monkeypatch.setattr(alfworld, "make", Dead)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="L0: 8 of 8 episodes were lost"):
        evaluate_levels(engine, config, [])


# ---- The script


@pytest.fixture(scope="module")
def runs(small_games, tmp_path_factory):
    """A folder with runs/one, whose checkpoint has been evaluated, and runs/two, the same by two ranks."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = tiny.rl_yaml(small_games, folder).read_text()
    for name, ranks in (("one", 1), ("two", 2)):
        checkpoint = tiny.copy(tiny.checkpoint(small_games), folder / "runs" / name / "checkpoints" / "000001")
        (checkpoint / "guidelines.json").write_text(json.dumps(["Open every drawer."]))
        (folder / "runs" / name / "config.yaml").write_text(settings)
        printed = tiny.run(
            "evaluate.py", "--ckpt", checkpoint, "--set", "rollout.engine=transformers", "--games", "3", "--seeds", "2",
            "--temperature", "0.7", cwd=folder, ranks=ranks, timeout=150,
        )  # fmt: skip
        (folder / f"{name}.txt").write_text(printed)
    return folder


def read(folder) -> dict:
    return json.loads(newest_evaluation(folder).read_text())


def test_script_writes_results_and_episodes(runs):
    record, folder = read(runs / "runs" / "one"), runs / "runs" / "one"
    assert record["guidelines"] == ["Open every drawer."]
    assert (record["temperature"], record["seeds"], list(record["levels"])) == (0.7, 2, ["L0", "L1"])
    assert record["levels"]["L0"]["n"] == 6
    episodes = [json.loads(line) for line in gzip.open(next(folder.glob("eval_*_episodes.jsonl.gz")), "rt")]
    assert len(episodes) == 12 and sum(len(e["steps"]) for e in episodes) / 12 == pytest.approx(
        (record["levels"]["L0"]["mean_steps"] + record["levels"]["L1"]["mean_steps"]) / 2
    )
    printed = (runs / "one.txt").read_text()
    assert summary_line(record["levels"]["L0"]) in printed and "malformed replies" in printed


def test_two_runs_on_one_and_two_ranks_agree(runs):
    assert read(runs / "runs" / "one")["levels"] == read(runs / "runs" / "two")["levels"]
    files = [next((runs / "runs" / name).glob("eval_*_episodes.jsonl.gz")) for name in ("one", "two")]
    episodes = [gzip.open(file).read().splitlines() for file in files]
    assert [[step["response"] for step in json.loads(line)["steps"]] for line in episodes[0]] == [
        [step["response"] for step in json.loads(line)["steps"]] for line in episodes[1]
    ]


def test_table_of_runs(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--table", str(runs / "runs" / "one"), str(runs / "runs" / "two")])
    evaluate.main()
    heading, one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("one") and two.startswith("two") and one[5:] == two[5:] and "n=6" in one
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--table", str(runs)])
    with pytest.raises(ConfigError, match=r"has no eval_\*.json: run evaluate.py"):
        evaluate.main()


def test_a_bare_model_needs_a_config(runs, small_games, monkeypatch):
    folder = tiny.copy(tiny.checkpoint(small_games), runs / "bare")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--ckpt", str(folder)])
    with pytest.raises(ConfigError, match="is not a checkpoint of a run: say --config"):
        evaluate.main()
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    with pytest.raises(SystemExit):
        evaluate.main()

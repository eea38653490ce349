"""envs.py: task lists, the native environment, the expert, and TextWorld as the reference."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

import envs
import games
from config import TASK_TYPES, ConfigError, EnvConfig
from make_games import make_games

ROOT = Path(__file__).parents[1]
TYPES = TASK_TYPES["alfworld"]
REAL_GAMES = ROOT.parent / "shared" / "alfworld_games"


def trials(folder: Path, split: str) -> list[str]:
    root = folder / "json_2.1.1" / split
    return sorted(f"{split}/{path.parent.relative_to(root)}" for path in root.glob("*/*/game.tw-pddl"))


# ---------------------------------------------------------------------------------------------------------------------
# Task lists


@pytest.mark.parametrize(
    ("level", "phase", "split", "types"),
    [
        ("L0", "train", "train", TYPES),
        ("L1", "train", "train", TYPES),
        ("L2", "train", "train", TYPES[:4]),
        ("L0", "eval", "valid_seen", TYPES),
        ("L1", "eval", "valid_unseen", TYPES),
        ("L2", "eval", "valid_unseen", TYPES[4:]),
    ],
)
def test_levels(small_games: Path, level: str, phase: str, split: str, types: tuple[str, ...]) -> None:
    env_cfg = EnvConfig(data=str(small_games))
    tasks = envs.tasks(env_cfg, level, phase)
    assert [task.id for task in tasks] == [
        id_ for id_ in trials(small_games, split) if Path(id_).parts[1].startswith(types)
    ]
    assert {task.type for task in tasks} == set(types)
    assert {(task.env, task.split) for task in tasks} == {("alfworld", split)}
    for task in tasks:
        assert envs.game_path(env_cfg, task).joinpath("game.tw-pddl").is_file()
        assert envs.parsed_game(env_cfg, task).task_type == task.type


def test_types_and_held_out_types_of_the_config(small_games: Path) -> None:
    kinds = TYPES[1:4]
    env_cfg = EnvConfig(data=str(small_games), task_types=kinds, held_out_types=(TYPES[2], TYPES[5]))

    def found(level: str, phase: str) -> set[str]:
        return {task.type for task in envs.tasks(env_cfg, level, phase)}

    assert found("L0", "train") == found("L1", "train") == found("L0", "eval") == found("L1", "eval") == set(kinds)
    assert found("L2", "train") == {TYPES[1], TYPES[3]}
    assert found("L2", "eval") == {TYPES[2], TYPES[5]}


@pytest.mark.parametrize(("level", "phase"), [("L3", "train"), ("L0", "test"), ("", "eval")])
def test_unknown_levels_and_phases(small_games: Path, level: str, phase: str) -> None:
    with pytest.raises(ValueError, match="no tasks for level"):
        envs.tasks(EnvConfig(data=str(small_games)), level, phase)


def add_game(folder: Path, name: str, **changes) -> None:
    """Another training game: a copy of an existing one under `name`, with `changes` to its file (None: deleted)."""
    root = folder / "json_2.1.1" / "train"
    stored = json.loads(next(root.glob("pick_and_place_simple-*/trial_T*/game.tw-pddl")).read_text()) | changes
    (root / name).mkdir(parents=True)
    stored = {key: value for key, value in stored.items() if value is not None}
    (root / name / "game.tw-pddl").write_text(json.dumps(stored))


def listed(folder: Path) -> set[str]:
    envs._scan.cache_clear()  # as in a new process
    return {task.id.removeprefix("train/") for task in envs.tasks(EnvConfig(data=str(folder)), "L0", "train")}


def test_what_alfworld_would_not_play_is_left_out(tmp_path: Path) -> None:
    make_games(tmp_path, 6, 0, 0, seed=0, receptacles=6, objects=12)
    before = listed(tmp_path)
    add_game(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/good")
    add_game(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/bad", solvable=False)
    add_game(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/unknown", solvable=None)
    add_game(tmp_path, "pick_and_place_simple-AppleSliced-None-Shelf-1/t")
    add_game(tmp_path, "pick_and_place_with_movable_recep-Mug-Pan-Shelf-1/t")
    add_game(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/movable")
    add_game(tmp_path, "pick_and_dance-Mug-None-Shelf-1/t")
    assert len(before) == 6 and listed(tmp_path) == before | {"pick_and_place_simple-Mug-None-Shelf-1/good"}


def test_the_index_is_used_and_renewed(tmp_path: Path) -> None:
    make_games(tmp_path, 6, 0, 0, seed=0, receptacles=6, objects=12)
    before, index = listed(tmp_path), tmp_path / "json_2.1.1" / "train.index.json"
    assert json.loads(index.read_text()) == dict.fromkeys(before, True)
    gone = min(before)
    index.write_text(json.dumps(json.loads(index.read_text()) | {gone: False}))
    assert listed(tmp_path) == before - {gone}  # the games are not read again
    add_game(tmp_path, "pick_and_place_simple-Mug-None-Shelf-1/t")
    assert listed(tmp_path) == before | {"pick_and_place_simple-Mug-None-Shelf-1/t"}
    shutil.rmtree(tmp_path / "json_2.1.1" / "train" / "pick_and_place_simple-Mug-None-Shelf-1")
    assert listed(tmp_path) == before
    for broken in ("", "{", "[]", "3", "null", '{"a": true}', "\x00"):
        index.write_text(broken)
        assert listed(tmp_path) == before
    assert not list(index.parent.glob("*.index.*[0-9]"))  # no left-overs


def test_an_index_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    make_games(tmp_path, 6, 0, 0, seed=0, receptacles=6, objects=12)
    (tmp_path / "json_2.1.1" / "train.index.json").mkdir()  # neither readable nor replaceable
    assert len(listed(tmp_path)) == 6


def test_missing_data_are_explained_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    (tmp_path / "empty" / "json_2.1.1" / "train").mkdir(parents=True)
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"\$ALFWORLD_DATA .*alfworld-download.* env.data .*make_games.py --out"):
        envs.tasks(EnvConfig(), "L0", "train")
    for folder in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "empty" / "json_2.1.1" / "train"):
        for env_cfg in (EnvConfig(data=str(folder)), EnvConfig()):
            monkeypatch.setenv("ALFWORLD_DATA", str(folder))
            with pytest.raises(ConfigError) as error:
                envs.tasks(env_cfg, "L0", "train")
            assert f"no games in {folder}/json_2.1.1/train" in str(error.value)
            assert f"ALFWORLD_DATA={folder} alfworld-download" in str(error.value)
            assert f"python make_games.py --out {folder}" in str(error.value)
    assert time.process_time() - started < 1


def test_a_level_without_games_is_explained(tmp_path: Path) -> None:
    make_games(tmp_path, 4, 1, 1, seed=0, types=[1], receptacles=6, objects=12)
    env_cfg = EnvConfig(data=str(tmp_path))
    with pytest.raises(ConfigError, match=r"L2 \(eval\) has no games of types pick_cool.*valid_unseen"):
        envs.tasks(env_cfg, "L2", "eval")
    assert len(envs.tasks(env_cfg, "L2", "train")) == 4


def test_the_variable_is_used_where_the_config_names_no_folder(small_games: Path, monkeypatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(small_games))
    assert envs.tasks(EnvConfig(), "L0", "eval") == envs.tasks(EnvConfig(data=str(small_games)), "L0", "eval")
    monkeypatch.setenv("ALFWORLD_DATA", "/nowhere")
    assert len(envs.tasks(EnvConfig(data=str(small_games)), "L0", "eval")) == 12


# ---------------------------------------------------------------------------------------------------------------------
# The native environment


def test_an_episode(small_games: Path) -> None:
    env_cfg = EnvConfig(data=str(small_games))
    env = envs.make_env(env_cfg)
    for task in envs.tasks(env_cfg, "L0", "eval"):
        game = envs.parsed_game(env_cfg, task)
        seen = env.reset(task)
        assert seen.text.startswith("-= Welcome") and seen.text.endswith(f"Your task is to: {seen.task}")
        for action in games.solve(game):
            assert not seen.done and not seen.won and seen.score == 0
            assert action in seen.actions and "help" not in seen.actions and seen.task == game.task
            seen = env.step(action)
        assert seen.done and seen.won and seen.score == 1
    assert env.reset(task).text == env.reset(task).text and not env.reset(task).won  # a new start each time


def test_help_can_neither_be_seen_nor_played(small_games: Path) -> None:
    env_cfg = EnvConfig(data=str(small_games))
    env = envs.make_env(env_cfg)
    seen = env.reset(envs.tasks(env_cfg, "L0", "eval")[0])
    for action in ("help", " help", "help\n", "HELP", "help "):
        after = env.step(action)
        assert after.text == "Nothing happens." and after.actions == seen.actions and "help" not in after.actions


def test_any_text_is_an_action(small_games: Path) -> None:
    """Nothing raises; what is not admissible changes nothing."""
    env_cfg = EnvConfig(data=str(small_games))
    env, rng = envs.make_env(env_cfg), random.Random(0)
    seen = env.reset(envs.tasks(env_cfg, "L0", "eval")[0])
    odd = ["", " ", "\x00", "go to", "open ", "take from", "\ud800", "go to desk 1" * 1000, "<think>", "{0}", "%s"]
    odd += [bytes(rng.randrange(256) for _ in range(rng.randrange(30))).decode("latin-1") for _ in range(300)]
    odd += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(10))) for _ in range(300)]
    odd += [action[:-1] + rng.choice("abc0123456789 ") for action in seen.actions]
    for action in odd:
        if action.strip() not in seen.actions:
            after = env.step(action)
            assert after.text == "Nothing happens." and after.actions == seen.actions and not after.done
    assert env.step(f"  {seen.actions[0]}\n").text != "Nothing happens."  # only white space is forgiven


# ---------------------------------------------------------------------------------------------------------------------
# The expert


def wins(env_cfg: EnvConfig, tasks: list[envs.Task], steps: int, seed: int = 0) -> Counter:
    """How many games the expert wins, and how often it gave up; its actions are always admissible."""
    env, count = envs.make_env(env_cfg), Counter()
    for task in tasks:
        expert = envs.make_expert(env_cfg, seed)
        seen, action = env.reset(task), expert.reset(task)
        for _ in range(steps):
            if seen.done or action is None:
                break
            assert action in seen.actions
            seen = env.step(action)
            assert seen.text != "Nothing happens."
            action = expert.step(action)
        count["won"] += seen.won
        count["gave up"] += not seen.won and action is None
    return count


def test_the_expert_wins_in_small_rooms(small_games: Path) -> None:
    env_cfg = EnvConfig(data=str(small_games))
    tasks = [task for level in ("L0", "L1") for task in envs.tasks(env_cfg, level, "eval")]
    tasks += envs.tasks(env_cfg, "L0", "train")
    count = wins(env_cfg, tasks, 30)
    assert len(tasks) == 48 and count["won"] >= 0.9 * len(tasks) and count["gave up"] == 0


@pytest.mark.skipif(not REAL_GAMES.exists(), reason="the published games are not here")
def test_the_expert_wins_the_published_games(tmp_path: Path) -> None:
    (tmp_path / "json_2.1.1").mkdir()
    with tarfile.open(REAL_GAMES / "valid_seen.tar.xz") as archive:
        archive.extractall(tmp_path / "json_2.1.1", filter="data")
    env_cfg = EnvConfig(data=str(tmp_path))
    tasks = envs.tasks(env_cfg, "L0", "eval")
    kinds = Counter(task.type for task in tasks)
    assert [kinds[kind] for kind in TYPES] == [35, 13, 27, 16, 25, 24]  # ALFWorld's own 140
    count = wins(env_cfg, tasks, 50)
    print(f"the expert wins {count['won']} of {len(tasks)} published games")
    assert count["won"] >= 0.95 * len(tasks) and count["gave up"] <= 1


def test_the_expert_is_not_offered_help(small_games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is at a loss it draws from what it is offered."""
    from alfworld.agents.expert import HandCodedTWAgent

    monkeypatch.setattr(HandCodedTWAgent, "act", lambda self, state, *rest: random.choice(state["admissible_commands"]))
    env_cfg = EnvConfig(data=str(small_games))
    expert, said = envs.make_expert(env_cfg), set()
    action = expert.reset(envs.tasks(env_cfg, "L0", "eval")[0])
    for _ in range(200):
        said.add(action)
        action = expert.step("look")
    assert "look" in said and "help" not in said


def test_the_expert_goes_on_from_wherever_it_is_led(small_games: Path) -> None:
    """Random actions in between, also ones that do nothing: it wins most games and asks for nothing impossible."""
    env_cfg = EnvConfig(data=str(small_games))
    env, rng, won = envs.make_env(env_cfg), random.Random(0), 0
    tasks = envs.tasks(env_cfg, "L0", "train")
    for task in tasks:
        expert = envs.make_expert(env_cfg, 1)
        seen, action = env.reset(task), expert.reset(task)
        for _ in range(60):
            if seen.done or action is None:
                break
            assert action in seen.actions
            dice = rng.random()
            played = "dance" if dice < 0.1 else rng.choice(seen.actions) if dice < 0.25 else action
            seen, action = env.step(played), expert.step(played)
        won += seen.won
    assert won >= 0.7 * len(tasks)


def episodes_of_the_expert(folder: str, seed: int) -> list[list[str]]:
    """What the expert does in every training game, up to 30 actions each."""
    env_cfg, episodes = EnvConfig(data=folder), []
    for task in envs.tasks(env_cfg, "L0", "train"):
        expert = envs.make_expert(env_cfg, seed)
        actions = [expert.reset(task)]
        while actions[-1] is not None and len(actions) < 30:
            actions.append(expert.step(actions[-1]))
        episodes.append(actions)
    return episodes


def test_the_experts_choices_are_its_seeds_alone(small_games: Path) -> None:
    random.seed(0)
    state = random.getstate()
    first = episodes_of_the_expert(str(small_games), 0)
    assert random.getstate() == state  # the global generator is left alone
    random.seed(1)
    assert episodes_of_the_expert(str(small_games), 0) == first
    assert any(
        episodes_of_the_expert(str(small_games), seed) != first for seed in range(1, 5)
    )  # where there is a choice
    script = "import json, sys, test_envs; print(json.dumps(test_envs.episodes_of_the_expert(sys.argv[1], 0)))"
    other = subprocess.run(  # a process that iterates sets of strings in another order
        [sys.executable, "-c", script, str(small_games)],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(other.stdout) == first


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def test_textworld_says_the_same(small_games: Path) -> None:
    pytest.importorskip("textworld")
    native_cfg = EnvConfig(data=str(small_games))
    task = min(
        envs.tasks(native_cfg, "L0", "eval"),
        key=lambda task: len(games.solve(envs.parsed_game(native_cfg, task))),
    )
    plan = games.solve(envs.parsed_game(native_cfg, task))
    native, reference = envs.make_env(native_cfg), envs.make_env(EnvConfig(data=str(small_games), engine="textworld"))
    assert isinstance(reference, envs.TextWorldAlfworld)
    assert native.reset(task) == reference.reset(task)
    for action in ["help", " help ", "", "dance", "look", "inventory", f" {plan[0]}\n", *plan[1:]]:
        ours, theirs = native.step(action), reference.step(action)
        assert ours == theirs, action
    assert ours.won and ours.done

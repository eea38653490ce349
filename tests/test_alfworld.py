"""ALFWorld: its engine against transcripts, brute force and the real TextWorld; tasks, environment, expert, words."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter, deque
from pathlib import Path

import pytest

import envs
from config import ConfigError, EnvConfig
from environments import alfworld
from environments.alfworld_engine import TASK_TYPES, Game, GameState, distance, parse_game, solve, task_sentence
from prompts import PromptContext
from tools import check_alfworld
from tools.make_games import make_game, make_games

ROOT = Path(__file__).parents[1]
REAL_GAMES = ROOT.parent / "shared" / "alfworld_games"

# A room with every quirk in it: fridge and countertop share a location, the egg is in two receptacles at once.
PROBLEM = """
(define (problem plan_trial) (:domain alfred) (:objects agent1 - agent)
(:init
    (receptacleType Fridge_bar_1 FridgeType) (receptacleAtLocation Fridge_bar_1 loc_bar_1) (openable Fridge_bar_1)
    (receptacleType CounterTop_bar_1 CounterTopType) (receptacleAtLocation CounterTop_bar_1 loc_bar_1)
    (receptacleType CounterTop_bar_2 CounterTopType) (receptacleAtLocation CounterTop_bar_2 loc_bar_2)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_bar_3)
    (canContain CounterTopType EggType) (canContain FridgeType EggType) (canContain CounterTopType KnifeType)
    (canContain SinkBasinType KnifeType)
    (objectType Egg_bar_1 EggType) (objectType Egg_bar_2 EggType) (objectType Knife_bar_1 KnifeType)
    (objectType Sink_bar_1 SinkType) (objectAtLocation Sink_bar_1 loc_bar_3)
    (objectAtLocation Egg_bar_1 loc_bar_2) (objectAtLocation Egg_bar_2 loc_bar_1)
    (objectAtLocation Knife_bar_1 loc_bar_1)
    (inReceptacle Egg_bar_1 CounterTop_bar_2) (inReceptacle Egg_bar_1 Sink_bar_1_bar_SinkBasin)
    (inReceptacle Egg_bar_2 Fridge_bar_1) (inReceptacle Knife_bar_1 CounterTop_bar_1)
    (pickupable Egg_bar_1) (pickupable Egg_bar_2) (pickupable Knife_bar_1) (coolable Egg_bar_1) (coolable Egg_bar_2)
    (cleanable Knife_bar_1) (sliceable Egg_bar_1) (sliceable Egg_bar_2)
    (atLocation agent1 loc_bar_0)
)
(:goal (and (exists (?r - receptacle) (exists (?o - object) (and (coolable ?o) (objectType ?o EggType)
    (receptacleType ?r CounterTopType) (isCool ?o) (inReceptacle ?o ?r))))))
)"""
GAME = {
    "pddl_domain": "",
    "grammar": '{"rhs": "Your task is to: cool some egg and put it in countertop."}',
    "pddl_problem": PROBLEM,
    "solvable": True,
}


def generated(count: int, **limits: int) -> list[Game]:
    """`count` generated games, the task types in turn."""
    return [parse_game(make_game("train", index, 11, **limits)[0]) for index in range(count)]


def wander(state: GameState, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        state.step(rng.choice(state.actions))


def test_transcript() -> None:
    state = GameState(parse_game(GAME))
    assert state.text == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a countertop 2, a "
        "countertop 1, a fridge 1, and a sinkbasin 1.\n\n"
        "Your task is to: cool some egg and put it in countertop."
    )
    assert state.actions == [
        "go to countertop 1",
        "go to countertop 2",
        "go to fridge 1",
        "go to sinkbasin 1",
        "help",
        "inventory",
        "look",
    ]
    for action, text in [
        ("look", "You are in the middle of a room. Looking quickly around you, you see nothing."),
        ("inventory", "You are not carrying anything."),
        ("go to bed 1", "Nothing happens."),
        (" go to fridge 1\n", "You arrive at fridge 1. The fridge 1 is closed."),
        ("look", "You are facing the countertop 2, and fridge 1. Next to it, you see nothing."),
        ("examine countertop 2", "On the countertop 2, you see a knife 1."),
        ("examine knife 1", "Nothing happens."),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1."),
        ("take egg 1 from fridge 1", "You pick up the egg 1 from the fridge 1."),
        ("examine egg 1", "There's nothing special about egg 1."),
        ("close fridge 1", "You close the fridge 1."),
        ("cool egg 1 with fridge 1", "You cool the egg 1 using the fridge 1."),
        ("examine egg 1", "This is a cold egg 1."),
        ("inventory", "You are carrying: a egg 1."),
        ("move egg 1 to countertop 2", "You move the egg 1 to the countertop 2."),
        ("look", "You are facing the countertop 2, and fridge 1. Next to it, you see a egg 1."),
        ("take knife 1 from countertop 2", "You pick up the knife 1 from the countertop 2."),
        ("slice egg 1 with knife 1", "You sliced the egg 1 with the knife 1."),
        ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see a egg 2."),
        ("clean knife 1 with sinkbasin 1", "You clean the knife 1 using the sinkbasin 1."),
        ("examine knife 1", "This is a clean knife 1."),
        ("move knife 1 to sinkbasin 1", "You move the knife 1 to the sinkbasin 1."),
        ("take egg 2 from sinkbasin 1", "You pick up the egg 2 from the sinkbasin 1."),
        ("go to countertop 1", "You arrive at countertop 1. On the countertop 1, you see a egg 2."),  # still there
    ]:
        assert state.step(action) == text == state.text
    assert state.won
    assert state.step("help").startswith("Available commands:\n  look: ")


def test_oracle_uses_an_object_that_is_in_two_receptacles() -> None:
    state = GameState(parse_game(GAME))
    state.step("go to sinkbasin 1")
    state.step("take egg 2 from sinkbasin 1")
    assert solve(state) == ["go to fridge 1", "cool egg 2 with fridge 1"]  # it is still on countertop 1


def test_any_text_is_an_action() -> None:
    state, rng = GameState(generated(1)[0]), random.Random(0)
    before = state.actions
    texts = ["", " ", "\n", "\x00", "take", "go to", "GO TO BED 1", "{r.name}", "#help#", "é" * 50_000, "\ud800", "%s"]
    texts += ["".join(chr(rng.randrange(0x11000)) for _ in range(rng.randrange(40))) for _ in range(300)]
    for text in texts:
        assert state.step(text) == "Nothing happens."
    assert state.actions == before


def test_plays_share_a_game_and_nothing_else() -> None:
    for game in generated(6):
        one, other = GameState(game), GameState(game)
        before = other.text, other.actions
        wander(one, random.Random(1), 60)
        assert (other.text, other.actions) == before == (GameState(game).text, GameState(game).actions)


@pytest.mark.parametrize("limits", [{}, {"receptacles": 5, "objects": 8}], ids=["full", "small"])
def test_oracle_wins_from_anywhere_one_step_at_a_time(limits: dict) -> None:
    rng = random.Random(2)
    for game in generated(60, **limits):
        state = GameState(game)
        for wandering in (0, 25):
            wander(state, rng, wandering)
            plan = solve(state)
            for done, action in enumerate(plan):
                assert not state.won
                assert distance(state) == len(plan) - done
                assert action in state.actions
                state.step(action)
            assert state.won
            assert solve(state) == [] and distance(state) == 0


def shortest(state: GameState) -> int | None:
    """Breadth-first search over all admissible actions."""

    def fork(p: GameState) -> GameState:
        q = copy.copy(p)
        q.opened, q.toggled, q.sliced, q.taken_from = map(set, (p.opened, p.toggled, p.sliced, p.taken_from))
        for name in ("changed", "contents", "lies_at"):
            setattr(q, name, {k: set(v) for k, v in getattr(p, name).items()})
        return q

    def key(p: GameState) -> str:
        return repr(
            (p.location, p.held, *(sorted(s) for s in (p.opened, p.toggled, *p.changed.values(), *p.contents.values())))
        )

    seen, queue = {key(state)}, deque([(state, 0)])
    while queue:
        here, depth = queue.popleft()
        if here.won:
            return depth
        for action in here.actions:
            if not action.startswith(("examine", "help", "inventory", "look", "slice")):
                there = fork(here)
                there.step(action)
                if (k := key(there)) not in seen:
                    seen.add(k)
                    queue.append((there, depth + 1))
    return None


def test_oracle_is_as_short_as_breadth_first_search() -> None:
    rng = random.Random(3)
    for game in generated(12, receptacles=4, objects=4):
        for wandering in (0, 12):
            state = GameState(game)
            wander(state, rng, wandering)
            assert distance(state) == shortest(state)


def test_hopeless_games_have_no_plan() -> None:
    nowhere = GAME | {
        "pddl_problem": PROBLEM.replace("(canContain CounterTopType EggType)", "").replace(
            "(inReceptacle Egg_bar_1 CounterTop_bar_2)", ""
        )
    }
    assert solve(parse_game(nowhere)) is None and distance(GameState(parse_game(nowhere))) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grammar": '"rhs": "Your task is to: UNKNOWN GOAL."'}, "no task sentence"),
        ({"grammar": '"rhs": "Your task is to: #help#."'}, "as grammar"),
        ({"grammar": None}, "not a playable"),
        ({"pddl_problem": ""}, ":init"),
        ({"pddl_problem": 7}, "not a playable"),
        ({"pddl_problem": PROBLEM.replace("(isCool ?o)", "(isSliced ?o)")}, "six task types"),
        ({"pddl_problem": PROBLEM.replace("(atLocation agent1 loc_bar_0)", "")}, "not a playable"),
        (
            {"pddl_problem": PROBLEM.replace("(receptacleAtLocation CounterTop_bar_2 loc_bar_2)", "")},
            "every receptacle",
        ),
        (
            {"pddl_problem": PROBLEM.replace("(objectType Egg_bar_1 EggType)", "(objectType Egg_bar_1)")},
            "not a playable",
        ),
    ],
)
def test_malformed_games_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_game(GAME | change)


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"grammar": ""}', "\x00"):
        path = tmp_path / "game.tw-pddl"
        path.write_text(text)
        with pytest.raises(ValueError, match="game.tw-pddl: not a playable"):
            parse_game(path)


def test_to_textworld_replaces_domain_and_grammar() -> None:
    stored = GAME | {"pddl_domain": "(old)", "walkthrough": ["look"]}
    game = check_alfworld.to_textworld(stored)
    assert "move {o} to {r}" in game["grammar"] and "UNKNOWN GOAL" not in game["grammar"]
    assert "(define (domain alfred)" in game["pddl_domain"]
    assert game["pddl_problem"] == PROBLEM and game["walkthrough"] == ["look"]
    assert task_sentence(game) == task_sentence(stored)


def test_check_exits_with_1_on_a_mismatch(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "game.tw-pddl").write_text(json.dumps(GAME))
    for lines, code in ((["game step 3 'look' text"], 1), ([], 0)):
        monkeypatch.setattr(check_alfworld, "check", lambda paths, steps, *_, found=lines: (steps * len(paths), found))
        monkeypatch.setattr("sys.argv", ["check_alfworld.py", str(tmp_path), "--steps", "7"])
        with pytest.raises(SystemExit) as stop:
            check_alfworld.main()
        assert stop.value.code == code
        assert f"1 games, 7 steps: {code} mismatches" in capsys.readouterr().out


def test_the_check_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_alfworld.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"no playable game.tw-pddl below {tmp_path}\n")


def test_same_words_as_textworld(tmp_path: Path) -> None:
    """12 games, 2 of each task type (one a small room), 30 half-random steps each, against the unpatched engine."""
    pytest.importorskip("textworld.core")
    pytest.importorskip("alfworld")
    made = make_games(tmp_path / "small", 6, 0, 0, seed=4, receptacles=7, objects=14)["train"]
    made += make_games(tmp_path / "full", 6, 0, 0, seed=5)["train"]
    (tmp_path / "quirks").mkdir()
    made.append(tmp_path / "quirks" / "game.tw-pddl")
    made[-1].write_text(json.dumps(GAME | {"pddl_problem": declared(PROBLEM)}))
    assert {parse_game(path).task_type for path in made[:6]} == set(TASK_TYPES)
    steps, mismatches = check_alfworld.check(made, steps=30, workers=2)
    assert steps == 13 * 30
    assert not mismatches, "\n".join(mismatches[:5])


def declared(problem: str) -> str:
    """PROBLEM as the planner wants it: with its objects declared."""
    return problem.replace(
        "agent1 - agent)",
        """agent1 - agent
        Fridge_bar_1 CounterTop_bar_1 CounterTop_bar_2 Sink_bar_1_bar_SinkBasin - receptacle
        Egg_bar_1 Egg_bar_2 Knife_bar_1 Sink_bar_1 - object loc_bar_0 loc_bar_1 loc_bar_2 loc_bar_3 - location
        EggType KnifeType ButterKnifeType SinkType - otype FridgeType CounterTopType SinkBasinType MicrowaveType - rtype
    )""",
    )


@pytest.mark.skipif(not REAL_GAMES.exists(), reason="the published games are not here")
def test_published_games_are_all_won() -> None:
    won = 0
    with tarfile.open(REAL_GAMES / "valid_seen.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("game.tw-pddl"):
                data = json.load(archive.extractfile(member))
                state = GameState(parse_game(data))
                plan = solve(state)
                assert plan or not data["solvable"], member.name
                for action in plan or []:
                    assert action in state.actions
                    state.step(action)
                assert state.won or not plan
                won += bool(data["solvable"])
    assert won == 140


# ----------------------------------------------------------------------------------------------------------------------
# Task lists


def alfworld_in(folder: Path | str, **fields) -> EnvConfig:
    return EnvConfig(name="alfworld", data=str(folder), **fields)


def trials(folder: Path, split: str) -> list[str]:
    root = folder / "json_2.1.1" / split
    return sorted(f"{split}/{path.parent.relative_to(root)}" for path in root.glob("*/*/game.tw-pddl"))


@pytest.mark.parametrize(
    ("level", "phase", "split", "types"),
    [
        ("L0", "train", "train", TASK_TYPES),
        ("L1", "train", "train", TASK_TYPES),
        ("L2", "train", "train", TASK_TYPES[:4]),
        ("L0", "eval", "seen", TASK_TYPES),
        ("L1", "eval", "unseen", TASK_TYPES),
        ("L2", "eval", "unseen", TASK_TYPES[4:]),
    ],
)
def test_levels(small_games: Path, level: str, phase: str, split: str, types: tuple[str, ...]) -> None:
    env_cfg = alfworld_in(small_games)
    tasks = envs.tasks(env_cfg, level, phase)
    assert [task.id for task in tasks] == [
        id_ for id_ in trials(small_games, alfworld.FOLDERS[split]) if Path(id_).parts[1].startswith(types)
    ]
    assert {task.type for task in tasks} == set(types)
    assert {(task.env, task.split) for task in tasks} == {("alfworld", split)}
    assert [task for task in alfworld.tasks(env_cfg, split) if task.type in types] == tasks
    for task in tasks:
        assert alfworld.game_path(env_cfg, task).joinpath("game.tw-pddl").is_file()
        assert alfworld.parsed_game(env_cfg, task).task_type == task.type


def test_types_and_held_out_types_of_the_config(small_games: Path) -> None:
    kinds = TASK_TYPES[1:4]
    env_cfg = alfworld_in(small_games, task_types=kinds, held_out_types=(TASK_TYPES[2], TASK_TYPES[5]))

    def found(level: str, phase: str) -> set[str]:
        return {task.type for task in envs.tasks(env_cfg, level, phase)}

    assert found("L0", "train") == found("L1", "train") == found("L0", "eval") == found("L1", "eval") == set(kinds)
    assert found("L2", "train") == {TASK_TYPES[1], TASK_TYPES[3]}
    assert found("L2", "eval") == {TASK_TYPES[2], TASK_TYPES[5]}


def add_game(folder: Path, name: str, **changes) -> None:
    """Another training game: a copy of an existing one under `name`, with `changes` to its file (None: deleted)."""
    root = folder / "json_2.1.1" / "train"
    stored = json.loads(next(root.glob("pick_and_place_simple-*/trial_T*/game.tw-pddl")).read_text()) | changes
    (root / name).mkdir(parents=True)
    stored = {key: value for key, value in stored.items() if value is not None}
    (root / name / "game.tw-pddl").write_text(json.dumps(stored))


def listed(folder: Path) -> set[str]:
    alfworld._scan.cache_clear()  # as in a new process
    return {task.id.removeprefix("train/") for task in envs.tasks(alfworld_in(folder), "L0", "train")}


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
    kept = json.loads(index.read_text())
    assert {key.split()[0] for key in kept} == before and set(kept.values()) == {True}
    gone = min(before)
    index.write_text(json.dumps({key: not key.startswith(gone) for key in kept}))
    assert listed(tmp_path) == before - {gone}  # the games are not read again
    index.write_text(json.dumps(kept))
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
        envs.tasks(EnvConfig(name="alfworld"), "L0", "train")
    for folder in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "empty" / "json_2.1.1" / "train"):
        for env_cfg in (alfworld_in(folder), EnvConfig(name="alfworld")):
            monkeypatch.setenv("ALFWORLD_DATA", str(folder))
            with pytest.raises(ConfigError) as error:
                envs.tasks(env_cfg, "L0", "train")
            assert f"no games in {folder}/json_2.1.1/train" in str(error.value)
            assert f"ALFWORLD_DATA={folder} alfworld-download" in str(error.value)
            assert f"python tools/make_games.py --out {folder}" in str(error.value)
    assert time.process_time() - started < 1


def test_a_level_without_games_is_explained(tmp_path: Path) -> None:
    make_games(tmp_path, 4, 1, 1, seed=0, types=[1], receptacles=6, objects=12)
    env_cfg = alfworld_in(tmp_path)
    with pytest.raises(ConfigError, match=r"L2 \(eval\) has no tasks of types pick_cool.*split 'unseen' in "):
        envs.tasks(env_cfg, "L2", "eval")
    assert len(envs.tasks(env_cfg, "L2", "train")) == 4


def test_the_variable_is_used_where_the_config_names_no_folder(small_games: Path, monkeypatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(small_games))
    assert envs.tasks(EnvConfig(name="alfworld"), "L0", "eval") == envs.tasks(alfworld_in(small_games), "L0", "eval")
    monkeypatch.setenv("ALFWORLD_DATA", "/nowhere")
    assert len(envs.tasks(alfworld_in(small_games), "L0", "eval")) == 12


# ----------------------------------------------------------------------------------------------------------------------
# The native environment


def test_an_episode(small_games: Path) -> None:
    env_cfg = alfworld_in(small_games)
    env = alfworld.make(env_cfg)
    for task in envs.tasks(env_cfg, "L0", "eval"):
        game = alfworld.parsed_game(env_cfg, task)
        observation = env.reset(task)
        assert observation.text.startswith("-= Welcome") and observation.text.endswith(
            f"Your task is to: {observation.task}"
        )
        for action in solve(game):
            assert not observation.done and not observation.won and observation.score == 0
            assert action in observation.actions and "help" not in observation.actions and observation.task == game.task
            observation = env.step(action)
        assert observation.done and observation.won and observation.score == 1
    assert env.reset(task).text == env.reset(task).text and not env.reset(task).won  # a new start each time


def test_help_can_neither_be_seen_nor_played(small_games: Path) -> None:
    env_cfg = alfworld_in(small_games)
    env = alfworld.make(env_cfg)
    observation = env.reset(envs.tasks(env_cfg, "L0", "eval")[0])
    for action in ("help", " help", "help\n", "HELP", "help "):
        after = env.step(action)
        assert after.text == "Nothing happens." and after.actions == observation.actions and "help" not in after.actions


def test_any_text_is_an_action_of_the_environment(small_games: Path) -> None:
    """Nothing raises; what is not admissible changes nothing."""
    env_cfg = alfworld_in(small_games)
    env, rng = alfworld.make(env_cfg), random.Random(0)
    observation = env.reset(envs.tasks(env_cfg, "L0", "eval")[0])
    odd = ["", " ", "\x00", "go to", "open ", "take from", "\ud800", "go to desk 1" * 1000, "<think>", "{0}", "%s"]
    odd += [bytes(rng.randrange(256) for _ in range(rng.randrange(30))).decode("latin-1") for _ in range(300)]
    odd += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(10))) for _ in range(300)]
    odd += [action[:-1] + rng.choice("abc0123456789 ") for action in observation.actions]
    for action in odd:
        if action.strip() not in observation.actions:
            after = env.step(action)
            assert after.text == "Nothing happens." and after.actions == observation.actions and not after.done
    assert env.step(f"  {observation.actions[0]}\n").text != "Nothing happens."  # only white space is forgiven


# ----------------------------------------------------------------------------------------------------------------------
# The expert


def wins(env_cfg: EnvConfig, tasks: list[envs.Task], steps: int, seed: int = 0) -> Counter:
    """How many games the expert wins, and how often it gave up; its actions are always admissible."""
    env, count = alfworld.make(env_cfg), Counter()
    for task in tasks:
        expert = envs.make_expert(env_cfg, seed)
        observation, action = env.reset(task), expert.reset(task)
        for _ in range(steps):
            if observation.done or action is None:
                break
            assert action in observation.actions
            observation = env.step(action)
            assert observation.text != "Nothing happens."
            action = expert.step(action)
        count["won"] += observation.won
        count["gave up"] += not observation.won and action is None
    return count


def test_the_expert_wins_in_small_rooms(small_games: Path) -> None:
    env_cfg = alfworld_in(small_games)
    tasks = [task for level in ("L0", "L1") for task in envs.tasks(env_cfg, level, "eval")]
    tasks += envs.tasks(env_cfg, "L0", "train")
    count = wins(env_cfg, tasks, 30)
    assert len(tasks) == 48 and count["won"] >= 0.9 * len(tasks) and count["gave up"] == 0


@pytest.mark.skipif(not REAL_GAMES.exists(), reason="the published games are not here")
def test_the_expert_wins_the_published_games(tmp_path: Path) -> None:
    (tmp_path / "json_2.1.1").mkdir()
    with tarfile.open(REAL_GAMES / "valid_seen.tar.xz") as archive:
        archive.extractall(tmp_path / "json_2.1.1", filter="data")
    env_cfg = alfworld_in(tmp_path)
    tasks = envs.tasks(env_cfg, "L0", "eval")
    kinds = Counter(task.type for task in tasks)
    assert [kinds[kind] for kind in TASK_TYPES] == [35, 13, 27, 16, 25, 24]  # ALFWorld's own 140
    count = wins(env_cfg, tasks, 50)
    print(f"the expert wins {count['won']} of {len(tasks)} published games")
    assert count["won"] >= 0.95 * len(tasks) and count["gave up"] <= 1


def test_the_expert_is_not_offered_help(small_games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is at a loss it draws from what it is offered."""
    from alfworld.agents.expert import HandCodedTWAgent

    monkeypatch.setattr(HandCodedTWAgent, "act", lambda self, state, *rest: random.choice(state["admissible_commands"]))
    env_cfg = alfworld_in(small_games)
    expert, said = envs.make_expert(env_cfg), set()
    action = expert.reset(envs.tasks(env_cfg, "L0", "eval")[0])
    for _ in range(200):
        said.add(action)
        action = expert.step("look")
    assert "look" in said and "help" not in said


def test_the_expert_goes_on_from_wherever_it_is_led(small_games: Path) -> None:
    """Random actions in between, also ones that do nothing: it wins most games and asks for nothing impossible."""
    env_cfg = alfworld_in(small_games)
    env, rng, won = alfworld.make(env_cfg), random.Random(0), 0
    tasks = envs.tasks(env_cfg, "L0", "train")
    for task in tasks:
        expert = envs.make_expert(env_cfg, 1)
        observation, action = env.reset(task), expert.reset(task)
        for _ in range(60):
            if observation.done or action is None:
                break
            assert action in observation.actions
            dice = rng.random()
            played = "dance" if dice < 0.1 else rng.choice(observation.actions) if dice < 0.25 else action
            observation, action = env.step(played), expert.step(played)
        won += observation.won
    assert won >= 0.7 * len(tasks)


def episodes_of_the_expert(folder: str, seed: int) -> list[list[str]]:
    """What the expert does in every training game, up to 30 actions each."""
    env_cfg, episodes = alfworld_in(folder), []
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
    script = "import json, sys, test_alfworld; print(json.dumps(test_alfworld.episodes_of_the_expert(sys.argv[1], 0)))"
    other = subprocess.run(  # a process that iterates sets of strings in another order
        [sys.executable, "-c", script, str(small_games)],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(other.stdout) == first


# ----------------------------------------------------------------------------------------------------------------------
# The teacher


def all_tasks(folder: Path) -> tuple[EnvConfig, list[envs.Task]]:
    env_cfg = EnvConfig(name="alfworld", data=str(folder))
    return env_cfg, [task for level in ("L0", "L1") for task in envs.tasks(env_cfg, level, "eval")]


def teacher_at(env_cfg: EnvConfig, task: envs.Task, *actions: str) -> alfworld.OracleTeacher:
    teacher = alfworld.OracleTeacher(env_cfg, task)
    for action in actions:
        teacher.judge(action)
    return teacher


def verdict_of_progress(teacher: alfworld.OracleTeacher, action: str) -> int:
    """The teacher's verdict, where exploring does not count: good exactly if the action shortens the way to win."""
    before = distance(teacher.state)
    verdict = teacher.judge(action)
    assert verdict == (distance(teacher.state) < before)
    return verdict


def test_the_oracles_plan_is_good_throughout(small_games: Path) -> None:
    env_cfg, tasks = all_tasks(small_games)
    for task in tasks:
        plan = solve(alfworld.parsed_game(env_cfg, task))
        teacher = alfworld.OracleTeacher(env_cfg, task)
        assert [teacher.judge(action) for action in plan] == [1] * len(plan)
        assert teacher.state.won


def test_idle_and_inadmissible_actions_are_flawed_everywhere(small_games: Path) -> None:
    env_cfg, tasks = all_tasks(small_games)
    idle = ("look", "inventory", "help", "", "go to the moon", "go to", "open", "take mug 1", "\x00", "go to sofa 99")
    for task in tasks:
        plan = solve(alfworld.parsed_game(env_cfg, task))
        for done in range(len(plan)):
            teacher = teacher_at(env_cfg, task, *plan[:done])
            assert not any(teacher.judge(action) for action in idle)
            assert teacher.state.actions == teacher_at(env_cfg, task, *plan[:done]).state.actions  # and change nothing


def test_exploring_is_good_once_and_only_where_the_object_could_be(small_games: Path) -> None:
    """Before anything is found, a first visit is good wherever the object could lie, and a second one flawed."""
    env_cfg, tasks = all_tasks(small_games)
    seen = Counter()
    for task in tasks:
        game = alfworld.parsed_game(env_cfg, task)
        start = GameState(game)
        on_the_plan = {action for action in solve(game)}
        for place, location in game.location_of.items():
            go = f"go to {game.names[place]}"
            fits = bool(game.fits.get(place, frozenset()) & game.goal_objects)
            if fits:
                assert teacher_at(env_cfg, task).judge(go) == 1
            elif go not in on_the_plan and len(game.receptacles_at[location]) == 1:
                seen["cannot hold"] += 1
                assert teacher_at(env_cfg, task).judge(go) == 0
            holds_nothing = not start.contents[place] & game.goal_objects
            other = next(r for r in game.location_of if game.location_of[r] != location)
            away = f"go to {game.names[other]}"
            if fits and holds_nothing:
                seen["second visit", verdict_of_progress(teacher_at(env_cfg, task, go, away), go)] += 1
            if fits and not start.accessible(place) and holds_nothing and place not in game.goal_receptacles:
                teacher = teacher_at(env_cfg, task, go)  # closed: going and opening both search
                for action, verdict in (("open", 1), ("close", 0), ("open", 0)):
                    assert teacher.judge(f"{action} {game.names[place]}") == verdict
                seen["opened"] += 1
    assert seen["cannot hold"] > 5 and seen["second visit", 0] > 40 and seen["opened"] > 10


def test_exploring_is_flawed_once_the_object_is_known(small_games: Path) -> None:
    env_cfg, tasks = all_tasks(small_games)
    seen = Counter()
    for task in tasks:
        game = alfworld.parsed_game(env_cfg, task)
        plan = solve(game)
        found = next(index for index, action in enumerate(plan) if action.startswith("take "))
        for done in (found, found + 1):  # lying in view, and in hand
            for action in teacher_at(env_cfg, task, *plan[:done]).state.actions:
                if action.startswith("go to ") and game.task_type != TASK_TYPES[-1]:
                    seen[verdict_of_progress(teacher_at(env_cfg, task, *plan[:done]), action)] += 1
    assert seen[0] > 50 and seen[1] > 5


def test_undoing_is_flawed(small_games: Path) -> None:
    env_cfg, tasks = all_tasks(small_games)
    for task in tasks:
        plan = solve(alfworld.parsed_game(env_cfg, task))
        taken = next(index for index, action in enumerate(plan) if action.startswith("take "))
        thing, place = plan[taken].removeprefix("take ").split(" from ")
        teacher = teacher_at(env_cfg, task, *plan[: taken + 1])
        assert teacher.judge(f"move {thing} to {place}") == 0
        assert teacher.judge(plan[taken]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# TextWorld


def test_the_environment_says_what_textworld_says(small_games: Path) -> None:
    pytest.importorskip("textworld.core")
    env_cfg = alfworld_in(small_games)
    task = min(envs.tasks(env_cfg, "L0", "eval"), key=lambda task: len(solve(alfworld.parsed_game(env_cfg, task))))
    plan = solve(alfworld.parsed_game(env_cfg, task))
    path = alfworld.game_path(env_cfg, task) / "game.tw-pddl"
    env, textworld = alfworld.make(env_cfg), check_alfworld.textworld_env(json.loads(path.read_text()))
    observation, state = env.reset(task), textworld.reset()
    for action in ["", "dance", "look", "inventory", f" {plan[0]}\n", *plan[1:], None]:
        assert observation.text == state["feedback"].strip()
        assert observation.actions == tuple(one for one in state["admissible_commands"] if one != "help")
        assert observation.won == observation.done == bool(state["won"])
        if action is not None:
            observation, state = env.step(action), textworld.step(action.strip())[0]
    assert observation.won and observation.score == 1


# ----------------------------------------------------------------------------------------------------------------------
# Words


def test_a_task_sentence_says_what_is_needed() -> None:
    for sentence, found in {
        "put a clean mug in shelf.": {"state": "clean", "object": "mug", "place": "shelf"},
        "heat some egg and put it in fridge.": {"state": "heat", "object": "egg", "place": "fridge"},
        "put two cd in safe.": {"state": "two", "object": "cd", "place": "safe"},
        "look at book under the desklamp.": {"object": "book", "place": "desklamp"},
        "put some vase on desk.": {"object": "vase", "place": "desk"},
    }.items():
        assert alfworld.parse_task(sentence).groupdict() == found


def test_words_of_a_step() -> None:
    actions = ("close drawer 1", "examine cd 1", "examine drawer 1", "go to desk 1", "move cd 1 to drawer 1")
    ctx = PromptContext("alfworld", "put some cd in desk.", "Nothing happens.", actions, (), step=3)
    words, rng = alfworld.TEMPLATES, random.Random(0)
    assert words.plan(ctx) == "Plan: find cd, bring it to desk."
    assert words.thought(ctx, "go to desk 1").endswith("Have cd 1. Been nowhere. Here nothing. Next desk 1.")
    assert words.refused(ctx) and not words.refused(PromptContext("alfworld", "", "You see a cd 1.", ()))
    explores = {action: words.explores(ctx, action) for action in ("go to desk 1", "open safe 1", "look", "use lamp 1")}
    assert explores == {"go to desk 1": True, "open safe 1": True, "look": True, "use lamp 1": False}
    assert words.reason(ctx, "take cd 1", 0)[0] == "It is not admissible."
    assert {words.reason(ctx, action, verdict)[1] for action in actions for verdict in (0, 1)} < set(words.advice)
    assert words.idle(ctx) == "examine drawer 1" and words.idle(PromptContext("alfworld", "", "", ("look",))) == "look"
    earlier = [PromptContext("alfworld", "", "", ("open safe 1",))]
    slips = {words.slip(ctx, earlier, rng) for _ in range(300)}
    assert slips == {*actions, "open safe 1", "go to drawer 1", *(f"take cd {n} from drawer 1" for n in (1, 2, 3))}

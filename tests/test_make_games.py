"""tools/make_games.py: layout, reproducibility, sizes, and that ALFWorld and TextWorld themselves accept the games."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from environments.alfworld_engine import LOOK, PLACE_TWO, TASK_TYPES, GameState, parse_game, solve
from tools import make_games as maker
from tools.check_alfworld import textworld_env
from tools.make_games import TYPE_BY_NUMBER, UNSEEN_FLOOR_PLANS, make_game, make_games

ROOT = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout(tmp_path: Path) -> None:
    made = make_games(tmp_path, 12, 6, 6, seed=0)
    assert {split: len(paths) for split, paths in made.items()} == {"train": 12, "seen": 6, "unseen": 6}
    for split, folder in (("train", "train"), ("seen", "valid_seen"), ("unseen", "valid_unseen")):
        for path in made[split]:
            task, trial, name = path.relative_to(tmp_path / "json_2.1.1" / folder).parts
            game, traj = json.loads(path.read_text()), json.loads((path.parent / "traj_data.json").read_text())
            params = traj["pddl_params"]
            assert name == "game.tw-pddl" and trial == traj["task_id"]
            assert task == "-".join(
                [
                    traj["task_type"],
                    params["object_target"],
                    "None",
                    params["parent_target"] or params["toggle_target"],
                    str(traj["scene"]["scene_num"]),
                ]
            )
            assert traj["scene"]["floor_plan"] == f"FloorPlan{traj['scene']['scene_num']}"
            assert (traj["scene"]["scene_num"] in UNSEEN_FLOOR_PLANS) == (split == "unseen")
            assert parse_game(path).task_type == traj["task_type"]
            assert parse_game(path).task == traj["turk_annotations"]["anns"][0]["task_desc"] + "."
            assert game["solvable"] is True and game["walkthrough"] == solve(parse_game(game))
    assert Counter(parse_game(path).task_type for path in made["train"]) == dict.fromkeys(TASK_TYPES, 2)


def test_same_bytes_from_the_same_seed_in_any_process(tmp_path: Path) -> None:
    make_games(tmp_path / "here", 6, 1, 1, seed=3, receptacles=8)
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_games.py"),
        "--out",
        str(tmp_path / "there"),
        "--train",
        "6",
        "--seen",
        "1",
        "--unseen",
        "1",
        "--seed",
        "3",
        "--receptacles",
        "8",
    ]
    for hash_seed in ("0", "1"):  # sets iterate differently, games must not
        subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
        assert contents(tmp_path / "here") == contents(tmp_path / "there")
        (tmp_path / "there").rename(tmp_path / f"there{hash_seed}")
    make_games(tmp_path / "more", 9, 0, 2, seed=3, receptacles=8)
    more = contents(tmp_path / "more")
    assert all(
        more[name] == data
        for name, data in contents(tmp_path / "here").items()
        if "/train/" in name or "/valid_unseen/" in name
    )
    make_games(tmp_path / "other", 6, 1, 1, seed=4, receptacles=8)
    assert set(contents(tmp_path / "other")) != set(contents(tmp_path / "here"))


def test_a_folder_is_reused_finished_or_refused(tmp_path: Path, monkeypatch) -> None:
    asked = dict(train=4, seen=0, unseen=0, seed=0)
    first = make_games(tmp_path, **asked)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(maker, "make_game", None)  # nothing is made again
        assert make_games(tmp_path, **asked) == first
    with pytest.raises(FileExistsError, match="already holds other games"):
        make_games(tmp_path, **asked | {"train": 5})
    first["train"][0].unlink()  # as if the first run had been interrupted
    (tmp_path / "made_games.json").write_text(before["made_games.json"].decode().replace("true", "false"))
    assert make_games(tmp_path, **asked) == first
    assert contents(tmp_path) == before
    (tmp_path / "made_games.json").unlink()  # as if they were somebody else's games
    with pytest.raises(FileExistsError, match="not made here"):
        make_games(tmp_path, **asked)


@pytest.mark.parametrize(
    "bad", [{"types": ["pick_up"]}, {"types": [7]}, {"types": []}, {"train": -1}, {"receptacles": 2}, {"objects": 1}]
)
def test_bad_requests_are_refused(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(ValueError):
        make_games(tmp_path, **{"train": 1, "seen": 0, "unseen": 0, "seed": 0} | bad)
    assert not list(tmp_path.iterdir())


def test_types_by_number_and_by_name(tmp_path: Path) -> None:
    by_number = make_games(tmp_path / "a", 4, 0, 0, seed=0, types=[6, "2"])
    by_name = make_games(tmp_path / "b", 4, 0, 0, seed=0, types=["look_at_obj_in_light", "pick_two_obj_and_place"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {parse_game(p).task_type for p in by_number["train"]} == {LOOK, PLACE_TWO}
    assert len(by_name["train"]) == 4


@pytest.mark.parametrize(("receptacles", "objects"), [(None, None), (6, 10), (3, 2), (10, None), (None, 5)])
def test_games_are_fair(receptacles: int | None, objects: int | None) -> None:
    counts, plans, rooms = Counter(), [], set()
    for index in range(120):
        data, traj = make_game("train", index, 6, receptacles=receptacles, objects=objects)
        game = parse_game(data)
        state = GameState(game)
        inside = Counter(o for held in state.contents.values() for o in held)
        assert len(game.location_of) <= (receptacles or 99) and len(game.lies_at) <= (objects or 199)
        assert not state.here and not state.won
        assert max(inside.values()) == 1
        if game.task_type != LOOK:
            done = sum(len(state.contents[r] & game.goal_objects) for r in game.goal_receptacles)
            assert done <= (game.task_type == PLACE_TWO)
        counts[len(game.goal_objects)] += 1
        plans.append(len(data["walkthrough"]))
        rooms.add(traj["scene"]["scene_num"])
    assert counts[1] > 15  # the wanted object is often the only one
    assert len(rooms) > 40
    assert min(plans) >= 3 and 5 < mean(plans) < 7


def test_sizes_are_those_of_the_published_games() -> None:
    found = [parse_game(make_game("train", index, 8)[0]) for index in range(180)]
    assert 38 < mean(len(game.lies_at) for game in found) < 48  # published: 43
    assert 19 < mean(len(game.location_of) for game in found) < 26  # published: 22.5


def test_alfworld_collects_and_textworld_wins_them(tmp_path: Path) -> None:
    pytest.importorskip("textworld.core")
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    made = make_games(tmp_path, 6, 0, 0, seed=9, receptacles=6, objects=12)["train"]
    config = {
        "dataset": {"data_path": str(tmp_path / "json_2.1.1" / "train"), "num_train_games": -1},
        "env": {"goal_desc_human_anns_prob": 0, "task_types": list(TYPE_BY_NUMBER)},
    }
    assert sorted(map(Path, AlfredTWEnv(config, train_eval="train").game_files)) == made
    for path in made:
        game = json.loads(path.read_text())
        env = textworld_env(game)
        assert not env.reset()["won"]
        for action in game["walkthrough"]:
            state = env.step(action)[0]
        assert state["won"] and state["done"]

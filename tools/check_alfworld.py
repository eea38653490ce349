"""Differential test of ALFWorld's native engine: games played here and in TextWorld, compared word for word.

    python tools/check_alfworld.py DIR --games 30 --steps 30

Half of the actions are the oracle's, the others random, some of them nonsense; compared are the text, the admissible
actions, whether the game is won and whether it is over.  Needs alfworld with its TextWorld.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environments.alfworld_engine import GameState, package_path, parse_game, read_json, solve, task_sentence

INVALID = ("", "  ", "look around", "take apple 1", "go to the moon", "LOOK", "\N{SNOWMAN}\x00", "use desklamp 9")


def to_textworld(game: dict) -> dict:
    """Mend a stored game for TextWorld: its problem and task, with the installed package's domain and grammar.

    Published games carry those of alfworld 0.3, which speak another dialect.
    """
    domain, grammar = (
        (package_path() / "data" / name).read_text(encoding="utf-8") for name in ("alfred.pddl", "alfred.twl2")
    )
    return game | {"pddl_domain": domain, "grammar": grammar.replace("UNKNOWN GOAL.", task_sentence(game))}


def textworld_env(game: dict) -> Any:
    """Load a game into the real engine, wrapped as alfworld wraps it: reset() -> state, step(action) -> (state, ...).

    No threads: its translator swaps sys.argv and sys.stdout while it works.
    """
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
    from textworld import EnvInfos
    from textworld.envs.pddl import PddlEnv

    env = AlfredInfos(AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True))))
    env.load(to_textworld(game))
    return env


def compare(job: tuple[str, int, int]) -> tuple[int, list[str]]:
    """Play one game (path, steps, seed) in both engines; return the steps compared, and a line per mismatch."""
    path, steps, seed = job
    stored, rng = read_json(path), random.Random(f"{seed}/{Path(path).parent.name}")
    textworld, native = textworld_env(stored), GameState(parse_game(stored))
    state, action, mismatches = textworld.reset(), "(reset)", []
    for step in range(steps + 1):
        if step:
            plan, dice = solve(native), rng.random()
            action = (
                rng.choice(INVALID) if dice < 0.08 else plan[0] if plan and dice < 0.54 else rng.choice(native.actions)
            )
            state = textworld.step(action)[0]
            native.step(action)
        for what, theirs, ours in (
            ("text", state.feedback, native.text),
            ("won", bool(state["won"]), native.won),
            ("actions", list(state["admissible_commands"]), native.actions),
            ("done", bool(state["done"]) if step else native.won, native.won),
        ):
            if theirs != ours:
                mismatches.append(f"{path} step {step} {action!r} {what}\n  textworld {theirs!r}\n  native    {ours!r}")
    return steps, mismatches


def check(paths: Sequence[Path | str], steps: int, seed: int = 0, workers: int = 1) -> tuple[int, list[str]]:
    """Compare games in both engines, in `workers` processes; return the steps compared, and a line per mismatch."""
    jobs = [(str(path), steps, seed) for path in paths]
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = pool.map(compare, jobs, chunksize=1)
    else:
        results = list(map(compare, jobs))
    return sum(n for n, _ in results), [line for _, lines in results for line in lines]


def playable(path: Path) -> bool:
    """Say whether ALFWorld itself would play a game file: solvable, no movable receptacle, no slices."""
    task = path.resolve().parts[-3]  # TASK/TRIAL/game.tw-pddl
    if "movable" in task or "Sliced" in task:
        return False
    try:
        return bool(read_json(path).get("solvable"))
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None


def main() -> None:
    """Compare games of a folder; exit with 1 if the engines differ anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with game.tw-pddl files, at any depth")
    parser.add_argument("--games", type=int, default=30, help="how many of them, drawn at random")
    parser.add_argument("--steps", type=int, default=30, help="actions per game")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args()
    paths = sorted(args.folder.rglob("game.tw-pddl"))
    random.Random(args.seed).shuffle(paths)
    paths = list(itertools.islice(filter(playable, paths), args.games))
    if not paths:
        raise SystemExit(f"no playable game.tw-pddl below {args.folder}")
    began = time.time()
    steps, mismatches = check(paths, args.steps, args.seed, args.workers)
    print(
        *mismatches,
        f"{len(paths)} games, {steps} steps: {len(mismatches)} mismatches, {time.time() - began:.0f} s",
        sep="\n",
    )
    raise SystemExit(1 if mismatches else 0)


if __name__ == "__main__":
    main()

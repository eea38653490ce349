"""Measure environments: our ALFWorld and ScienceWorld against the stock engines, as ratios from one run.

    python benchmarks/env_throughput.py --data data/quickstart_games

ALFWorld: the native engine against TextWorld with alfworld's own domain and wrappers, on the same games and actions.
ScienceWorld: our lean step, which also fetches the objects for the prompt, against ScienceWorldEnv.step, which lists
every valid action, on the same tasks and actions; and the memory of one Java machine with 8 environments in it.

Rates are steps per second by the wall clock and by the CPU time of this process and its Java machines; loading is not
counted.  The two sides take turns, game by game, so that a busy machine slows both; ratios are of the totals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from tqdm import tqdm

import envs
from config import EnvConfig, fail_clearly
from environments import alfworld
from environments.alfworld_engine import Game, GameState
from environments.scienceworld_engine import Simulator, gold_path, java, machine
from tools.check_alfworld import textworld_env


class Meter:
    """Counts steps, seconds and CPU seconds of each way to play."""

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        for index, value in enumerate((steps, time.perf_counter() - wall, _cpu_seconds() - cpu)):
            self.totals[name][index] += value

    def table(self) -> str:
        """Write a line per way to play, those of a pair one below the other, with the second's gain over the first."""
        lines, before = [f"{'':<44}{'steps':>8}{'steps/s':>11}{'per CPU s':>11}"], (0.0, 0.0)
        for index, (name, (steps, wall, cpu)) in enumerate(self.totals.items()):
            rates = steps / wall, steps / cpu
            lines.append(f"{name:<44}{steps:>8.0f}{rates[0]:>11.1f}{rates[1]:>11.1f}")
            if index % 2:
                gain = [ours / theirs for ours, theirs in zip(rates, before, strict=True)]
                lines.append(f"{'  ratio':<52}{gain[0]:>11.1f}{gain[1]:>11.1f}")
            before = rates
        return "\n".join(lines)


def _cpu_seconds() -> float:
    """Measure the CPU time of this process and its children, the Java machines."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [here, *here.children(recursive=True)])


def random_play(game: Game, steps: int, rng: random.Random) -> list[str]:
    """Draw random admissible actions."""
    state, actions = GameState(game), []
    for _ in range(steps):
        actions.append(rng.choice([action for action in state.actions if action != "help"]))
        state.step(actions[-1])
    return actions


def measure_alfworld(meter: Meter, env_cfg: EnvConfig, count: int, steps: int, rng: random.Random) -> None:
    """Play the same random actions in TextWorld and in the native engine."""
    for task in tqdm(rng.sample(envs.tasks(env_cfg, "L0", "eval"), count), desc="ALFWorld", unit=" games"):
        actions = random_play(alfworld.parsed_game(env_cfg, task), steps, rng)
        stock = textworld_env(json.loads((alfworld.game_path(env_cfg, task) / "game.tw-pddl").read_text()))
        stock.reset()
        with meter("ALFWorld: stock TextWorld", steps):
            _play(stock.step, actions)
        passes = envs.make_pool(env_cfg, 200)  # one is too short for a CPU's clock
        for env in passes:
            env.reset(task)
        with meter("ALFWorld: native engine", len(passes) * steps):
            for env in passes:
                _play(env.step, actions)


def measure_scienceworld(meter: Meter, names: Sequence[str], steps: int) -> None:
    """Play gold paths in the stock wrapper and in ours."""
    from scienceworld import ScienceWorldEnv

    env_cfg = EnvConfig(name="scienceworld")
    stock, ours = ScienceWorldEnv("", envStepLimit=10_000), Simulator(machine(env_cfg))
    for warm in (True,) * 3 + (False,) * 3:  # Java compiles what it runs often, so the first rounds do not count
        for name in tqdm(names, desc="ScienceWorld" + ", to warm up" * warm, unit=" tasks"):
            actions = gold_path(env_cfg, name, 0)[:steps]
            stock.load(name, 0, env_cfg.simplification)
            stock.reset()
            ours.load(name, 0, env_cfg.simplification)
            for way, step in (("ScienceWorld: stock step", stock.step), ("ScienceWorld: ours", ours.step)):
                with Meter()(way, 0) if warm else meter(way, len(actions)):
                    _play(step, actions)
    stock.close()


def _play(step: Callable, actions: Sequence[str]) -> None:
    for action in actions:
        step(action)


def memory(names: Sequence[str], count: int = 8) -> str:
    """Measure the resident memory of one Java machine after `count` environments in it played their tasks."""
    env_cfg = EnvConfig(name="scienceworld", machine_heap_mib=1024 + 1)  # a machine of its own
    simulators = [Simulator(machine(env_cfg)) for _ in range(count)]
    for index, simulator in enumerate(tqdm(simulators, desc="memory", unit=" environments")):
        name = names[index % len(names)]
        simulator.load(name, 0, env_cfg.simplification)
        _play(simulator.step, gold_path(EnvConfig(name="scienceworld"), name, 0)[:30])
    resident = psutil.Process(simulators[0].home.process.pid).memory_info().rss / 2**20
    return f"{count} ScienceWorld environments in one Java machine: {resident:.0f} MiB resident"


def main() -> None:
    """Measure, and print a table."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--data", default="", help="ALFWorld's data folder (default: $ALFWORLD_DATA)")
    command.add_argument("--games", type=int, default=8, help="ALFWorld games (default: %(default)s)")
    command.add_argument("--steps", type=int, default=30, help="most actions per game (default: %(default)s)")
    names = ["boil", "find-animal", "chemistry-mix", "power-component", "lifespan-longest-lived", "melt"]
    command.add_argument("--tasks", nargs="+", default=names, help="ScienceWorld tasks (default: %(default)s)")
    arguments = command.parse_args()
    os.environ["PATH"] = f"{Path(java()).parent}:{os.environ['PATH']}"  # where the stock wrapper looks for it
    meter = Meter()
    measure_alfworld(
        meter, EnvConfig(name="alfworld", data=arguments.data), arguments.games, arguments.steps, random.Random(0)
    )
    measure_scienceworld(meter, arguments.tasks, arguments.steps)
    remembered = memory(arguments.tasks)
    print(f"load {os.getloadavg()[0]:.1f}\n{meter.table()}\n{remembered}")


if __name__ == "__main__":
    fail_clearly(main)

"""Environment throughput: our ALFWorld and ScienceWorld against the stock engines, as ratios from one run.

    python benchmarks/environments.py --data data/quickstart_games

ALFWorld: games.py against TextWorld with alfworld's own domain and wrappers, on the same games and actions.
ScienceWorld: sciworld.py, whose step also fetches the objects for the prompt, against ScienceWorldEnv.step, which lists
every valid action, on the same tasks and actions; and the memory of one Java machine with 8 environments in it.

Rates are steps per second by the wall clock and by the CPU time of this process and its Java machines; loading is not
counted.  The two sides take turns, game by game, so that a busy machine slows both; ratios are of the totals.
"""

from __future__ import annotations

import argparse
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
import games
import sciworld
from config import EnvConfig, fail_clearly


class Meter:
    """Steps, seconds and CPU seconds of each way to play."""

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        for index, value in enumerate((steps, time.perf_counter() - wall, _cpu_seconds() - cpu)):
            self.totals[name][index] += value

    def table(self) -> str:
        """A line per way to play, those of each pair one below the other, with the second's gain over the first."""
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
    """Of this process and its children, the Java machines."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [here, *here.children(recursive=True)])


def random_play(game: games.Game, steps: int, rng: random.Random) -> list[str]:
    """Random admissible actions."""
    play, actions = games.Play(game), []
    for _ in range(steps):
        actions.append(rng.choice([action for action in play.actions if action != "help"]))
        play.step(actions[-1])
    return actions


def alfworld(meter: Meter, env_cfg: EnvConfig, count: int, steps: int, rng: random.Random) -> None:
    """The same random actions in TextWorld and in games.py."""
    stock_cfg = EnvConfig(data=env_cfg.data, engine="textworld")
    for task in tqdm(rng.sample(envs.tasks(env_cfg, "L0", "eval"), count), desc="ALFWorld", unit=" games"):
        actions = random_play(envs.parsed_game(env_cfg, task), steps, rng)
        for name, one, passes in (("ALFWorld: stock TextWorld", stock_cfg, 1), ("ALFWorld: games.py", env_cfg, 200)):
            pool = [envs.make_env(one) for _ in range(passes)]  # one pass of games.py is too short for a CPU's clock
            for env in pool:
                env.reset(task)
            with meter(name, passes * steps):
                for env in pool:
                    _play(env.step, actions)


def scienceworld(meter: Meter, names: Sequence[str], steps: int) -> None:
    """Gold paths in the stock wrapper and in sciworld.py."""
    from scienceworld import ScienceWorldEnv

    env_cfg = EnvConfig(name="scienceworld")
    stock, ours = ScienceWorldEnv("", envStepLimit=10_000), sciworld.Simulator(sciworld.machine(env_cfg))
    for warm in (True,) * 3 + (False,) * 3:  # Java compiles what it runs often, so the first rounds do not count
        for name in tqdm(names, desc="ScienceWorld" + ", to warm up" * warm, unit=" tasks"):
            actions = sciworld.gold_path(env_cfg, name, 0)[:steps]
            stock.load(name, 0, env_cfg.simplification)
            stock.reset()
            ours.load(name, 0, env_cfg.simplification)
            for way, step in (("ScienceWorld: stock step", stock.step), ("ScienceWorld: sciworld.py", ours.step)):
                with Meter()(way, 0) if warm else meter(way, len(actions)):
                    _play(step, actions)
    stock.close()


def _play(step: Callable, actions: Sequence[str]) -> None:
    for action in actions:
        step(action)


def memory(names: Sequence[str], count: int = 8) -> str:
    """The resident memory of one Java machine after `count` environments in it played their tasks."""
    env_cfg = EnvConfig(name="scienceworld", machine_heap_mib=1024 + 1)  # a machine of its own
    simulators = [sciworld.Simulator(sciworld.machine(env_cfg)) for _ in range(count)]
    for index, simulator in enumerate(tqdm(simulators, desc="memory", unit=" environments")):
        name = names[index % len(names)]
        simulator.load(name, 0, env_cfg.simplification)
        _play(simulator.step, sciworld.gold_path(EnvConfig(name="scienceworld"), name, 0)[:30])
    resident = psutil.Process(simulators[0].home.process.pid).memory_info().rss / 2**20
    return f"{count} ScienceWorld environments in one Java machine: {resident:.0f} MiB resident"


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--data", default="", help="ALFWorld's data folder (default: $ALFWORLD_DATA)")
    command.add_argument("--games", type=int, default=8, help="ALFWorld games (default: %(default)s)")
    command.add_argument("--steps", type=int, default=30, help="most actions per game (default: %(default)s)")
    names = ["boil", "find-animal", "chemistry-mix", "power-component", "lifespan-longest-lived", "melt"]
    command.add_argument("--tasks", nargs="+", default=names, help="ScienceWorld tasks (default: %(default)s)")
    arguments = command.parse_args()
    os.environ["PATH"] = f"{Path(sciworld.java()).parent}:{os.environ['PATH']}"  # where the stock wrapper looks for it
    meter = Meter()
    alfworld(meter, EnvConfig(data=arguments.data), arguments.games, arguments.steps, random.Random(0))
    scienceworld(meter, arguments.tasks, arguments.steps)
    remembered = memory(arguments.tasks)
    print(f"load {os.getloadavg()[0]:.1f}\n{meter.table()}\n{remembered}")


if __name__ == "__main__":
    fail_clearly(main)

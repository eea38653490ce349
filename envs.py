"""Environments behind one interface: task lists and splits, playing, experts.

    tasks(env_cfg, level, "train" | "eval") -> list[Task]
    env = make_env(env_cfg);  env.reset(task) -> Observation;  env.step(action) -> Observation
    make_expert(env_cfg).reset(task) -> action;  .step(action) -> next action
    python envs.py --splits                     # how many tasks each level has
    python envs.py --play scienceworld          # the expert's episode of one task, in full

ALFWorld is played natively (games.py) or, with env.engine=textworld, by TextWorld itself; ScienceWorld by its simulator
(sciworld.py).  Success is strict: ALFWorld's `won`, ScienceWorld's score of 100.
Departures from published code: the published rule of success for ScienceWorld (over, and a score above 0: waiting wins,
too) is told as `won_loose` beside the strict one, and never trained on.  All episodes of a group play one task, and
evaluation lists are fixed and whole.  ALFWorld's `help` is not offered, as there, and also not played.  The ALFWorld
expert is alfworld's own hand-coded one, with its "put" test mended for the "move" dialect, without its ceremonial first
`look` and its actions that do nothing; the ScienceWorld expert follows the simulator's gold path.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

import config as configuration
import games
import sciworld
from config import ConfigError, EnvConfig

RECEPTACLE_TYPES = frozenset(  # what can be gone to, as ALFWorld names it; everything else is an object
    "armchair bathtubbasin bed cabinet cart coffeemachine coffeetable countertop desk diningtable drawer dresser "
    "fridge garbagecan handtowelholder laundryhamper microwave ottoman safe shelf sidetable sinkbasin sofa "
    "stoveburner toaster toilet toiletpaperhanger towelholder tvstand".split()
)
MAX_TRIES = 20  # of the expert, at one step
SPLITS = {  # what a level evaluates on; every level trains on "train"
    "alfworld": {"L0": "valid_seen", "L1": "valid_unseen", "L2": "valid_unseen"},
    "scienceworld": {"L0": "dev", "L1": "test", "L2": "test"},
}


@dataclass(frozen=True)
class Task:
    """One game: `id` is its folder below json_2.1.1/, or ScienceWorld's "task/variation"."""

    env: str
    type: str
    id: str
    split: str


@dataclass(frozen=True)
class Observation:
    """What an environment answers to a reset or an action."""

    text: str
    actions: tuple[str, ...]  # ScienceWorld: its templates, with OBJ for an object
    task: str
    score: float  # in [0, 1]
    done: bool
    won: bool
    objects: tuple[str, ...] = ()  # ScienceWorld: what OBJ can stand for
    available: bool | None = None  # whether the action that led here could be done; None: whether it was on the list
    won_loose: bool = False  # won by the published rule for ScienceWorld


def tasks(env_cfg: EnvConfig, level: str, phase: str) -> list[Task]:
    """The fixed task list of a level, "train" or "eval", in a stable order.

    L0 is new tasks of the kinds trained on (ALFWorld: in rooms seen in training; ScienceWorld: the simulator's "dev"
    variations), L1 further ones (unseen rooms; "test"), L2 held-out task types (of L1's split). L0 and L1 train on the
    same tasks, L2 on those of the types it does not hold out. Source: GiGPO's and RLVMR's code. Raises ConfigError if
    the data (ScienceWorld: Java) are missing or a level is left without tasks.
    """
    if phase not in ("train", "eval") or level not in ("L0", "L1", "L2"):
        raise ValueError(f"no tasks for level {level!r}, phase {phase!r}")
    types = env_cfg.held_out if level == "L2" and phase == "eval" else replace(env_cfg, level=level).trained
    split = "train" if phase == "train" else SPLITS[env_cfg.name][level]
    found = (_alfworld_tasks if env_cfg.name == "alfworld" else _scienceworld_tasks)(env_cfg, split, types)
    assert not (phase == "train" and level == "L2" and {task.type for task in found} & set(env_cfg.held_out))
    if not found:
        where = data_folder(env_cfg) / "json_2.1.1" / split if env_cfg.name == "alfworld" else f"the {split} split"
        raise ConfigError(f"level {level} ({phase}) has no games of types {', '.join(types)} in {where}")
    return found


def _alfworld_tasks(env_cfg: EnvConfig, split: str, types: Sequence[str]) -> list[Task]:
    return [
        Task("alfworld", trial.split("-")[0], f"{split}/{trial}", split)
        for trial, solvable in sorted(_scan(data_folder(env_cfg), split).items())
        if solvable and "movable" not in trial and "Sliced" not in trial and trial.split("-")[0] in types
    ]


def _scienceworld_tasks(env_cfg: EnvConfig, split: str, types: Sequence[str]) -> list[Task]:
    sciworld.java()
    return [
        Task("scienceworld", name, f"{name}/{variation}", split)
        for name in sorted(types)
        for variation in sciworld.variations(name)[split]
    ]


def data_folder(env_cfg: EnvConfig) -> Path:
    """The folder that holds json_2.1.1/: env.data, else $ALFWORLD_DATA. Raises ConfigError if neither is set.
    ScienceWorld: the folder for its gold paths."""
    if env_cfg.name == "scienceworld":
        return sciworld.data_folder(env_cfg)
    folder = env_cfg.data or os.environ.get("ALFWORLD_DATA", "")
    if not folder:
        raise ConfigError(
            "no games: set $ALFWORLD_DATA (filled by `alfworld-download`) or env.data (filled by "
            "`python make_games.py --out DIR ...`)"
        )
    return Path(folder)


@functools.cache
def _scan(folder: Path, split: str) -> dict[str, bool]:
    """Each trial of a split -> whether it is solvable. Reading thousands of games takes a while, so it is cached."""
    root = folder / "json_2.1.1" / split
    trials = sorted(str(path.parent.relative_to(root)) for path in root.glob("*/*/game.tw-pddl"))
    if not trials:
        raise ConfigError(
            f"no games in {root}: fill it with `ALFWORLD_DATA={folder} alfworld-download` or "
            f"`python make_games.py --out {folder} ...`"
        )
    cache = root.with_suffix(".index.json")
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or sorted(known) != trials:
        stored = {trial: json.loads((root / trial / "game.tw-pddl").read_text()) for trial in trials}
        known = {trial: game.get("solvable", False) for trial, game in stored.items()}
        try:
            fresh = cache.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(known))
            fresh.replace(cache)
        except OSError:
            pass  # a read-only data folder is scanned anew each time
    return known


@functools.lru_cache(maxsize=4096)
def _parse(path: Path) -> games.Game:
    return games.parse(path / "game.tw-pddl")


def parsed_game(env_cfg: EnvConfig, task: Task) -> games.Game:
    """An ALFWorld task's game, parsed once."""
    return _parse(game_path(env_cfg, task))


def game_path(env_cfg: EnvConfig, task: Task) -> Path:
    """The folder of an ALFWorld task's game."""
    return data_folder(env_cfg) / "json_2.1.1" / task.id


def make_env(env_cfg: EnvConfig) -> Any:
    """One environment, for one episode at a time."""
    if env_cfg.name == "scienceworld":
        return ScienceWorld(env_cfg)
    return NativeAlfworld(env_cfg) if env_cfg.engine == "native" else TextWorldAlfworld(env_cfg)


class NativeAlfworld:
    """ALFWorld played by games.py."""

    threaded = False  # a step costs microseconds: no thread is worth it

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg
        self.play: games.Play

    def reset(self, task: Task) -> Observation:
        self.play = games.Play(parsed_game(self.env_cfg, task))
        return self._observe(self.play.text)

    def step(self, action: str) -> Observation:
        return self._observe(self.play.step(action) if action.strip() != "help" else "Nothing happens.")

    def restart(self) -> None:
        pass

    def _observe(self, text: str) -> Observation:
        return _alfworld_observation(text, self.play.actions, self.play.game.task, self.play.won)


class TextWorldAlfworld:
    """ALFWorld played by TextWorld with alfworld's own domain: the reference, about 400 times slower."""

    threaded = False  # TextWorld's grammar parser is one global object

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg
        self.engine: Any = None
        self.task = ""
        self.state: Any = None

    def reset(self, task: Task) -> Observation:
        stored = json.loads((game_path(self.env_cfg, task) / "game.tw-pddl").read_text())
        self.task = games.task_sentence(stored)
        self.engine = games.textworld_env(stored)
        self.state = self.engine.reset()
        return self._observe(self.state["feedback"])

    def step(self, action: str) -> Observation:
        action = action.strip()
        available = action in self.state["admissible_commands"] and action != "help"
        if available:
            self.state, _, _ = self.engine.step(action)
        return self._observe(self.state["feedback"] if available else "Nothing happens.")

    def restart(self) -> None:
        self.engine = None

    def _observe(self, text: str) -> Observation:
        return _alfworld_observation(text, self.state["admissible_commands"], self.task, bool(self.state["won"]))


def _alfworld_observation(text: str, actions: list[str], task: str, won: bool) -> Observation:
    offered = tuple(action for action in actions if action != "help")
    return Observation(text.strip(), offered, task, float(won), won, won, won_loose=won)


class ScienceWorld:
    """ScienceWorld's simulator, with others in one Java machine.

    An action is available if the simulator understands it (with env.list_valid: if it is in the simulator's list of
    valid actions, as published).
    """

    threaded = True  # a step takes 10 ms or more, in Java

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg
        self.machine = sciworld.machine(env_cfg)
        self.simulator: sciworld.Simulator | None = None

    def reset(self, task: Task) -> Observation:
        if self.simulator is None:
            self.simulator = sciworld.Simulator(self.machine)
        name, _, variation = task.id.rpartition("/")
        return self._observe(self.simulator.load(name, int(variation), self.env_cfg.simplification))

    def step(self, action: str) -> Observation:
        listed = self.env_cfg.list_valid and action in self.simulator.valid_actions()
        state = self.simulator.step(action)
        return self._observe(state, listed if self.env_cfg.list_valid else state.accepted)

    def restart(self) -> None:
        self.simulator = None  # the next one starts the machine anew if it has died

    def _observe(self, state: sciworld.State, available: bool = True) -> Observation:
        won = state.score == 100
        done = won or state.complete or state.score < 0 or state.moves > self.env_cfg.max_moves
        return Observation(
            text=state.text,
            actions=self.simulator.templates,
            task=self.simulator.goal,
            score=max(0, state.score) / 100,
            done=done,
            won=won,
            objects=state.objects,
            available=available,
            won_loose=done and state.score > 0,
        )


class AlfworldExpert:
    """alfworld's hand-coded expert: it explores as an agent must and is not told where things are.

    It follows the episode in a native game of its own, so it serves both engines. `seed` fixes its random choices.
    """

    def __init__(self, env_cfg: EnvConfig, seed: int = 0) -> None:
        self.env_cfg = env_cfg
        self.random = random.Random(seed)

    def reset(self, task: Task) -> str | None:
        from alfworld.agents.expert import HandCodedTWAgent

        folder = game_path(self.env_cfg, task)
        self.play = games.Play(parsed_game(self.env_cfg, task))
        self.agent = HandCodedTWAgent(max_steps=1000)
        self.agent.reset(str(folder / "game.tw-pddl"))
        self.agent.observe(self.play.text)
        self.play.step("look")
        return self._next("look")

    def step(self, action: str) -> str | None:
        """The next action after `action` was taken; None where the expert has no idea."""
        self.play.step(action)
        return None if self.play.won else self._next(action)

    def _next(self, last: str) -> str | None:
        """The expert's next admissible action. Of what it asks for in vain it is told that nothing happened, and it
        thinks again: those tries are neither played nor taught."""
        names, play = self.play.game.names, self.play
        facts = [("inreceptacle", obj, place) for place, held in play.contents.items() for obj in held]
        facts = [SimpleNamespace(name=name, names=[names[obj], names[place]]) for name, obj, place in facts]
        if play.held is not None:
            facts.append(SimpleNamespace(name="holds", names=["agent", names[play.held]]))
        for verb, name in (("clean", "isclean"), ("heat", "ishot"), ("cool", "iscool")):
            facts += [SimpleNamespace(name=name, names=[names[obj]]) for obj in play.changed[verb]]
        offered = [action for action in play.actions if action != "help"]
        state = {"feedback": play.text, "facts": facts, "admissible_commands": offered, "won": play.won}
        if last.startswith("move "):  # the expert's bookkeeping still waits for the old word
            last = "put " + last.removeprefix("move ")
        for _ in range(MAX_TRIES):
            action = self._ask(state, last)
            if action is None or action in offered:
                return action
            state, last = state | {"feedback": "Nothing happens."}, action
        return None

    def _ask(self, state: dict[str, Any], last: str) -> str | None:
        """What alfworld's expert says, None where it gives up."""
        from alfworld.agents.expert import HandCodedAgentTimeout
        from alfworld.agents.expert.handcoded_expert import HandCodedAgentFailed

        kept = random.getstate()  # the expert draws from the global generator
        random.seed(self.random.random())
        try:
            return self.agent.act(state, 0, state["won"], last)
        except (HandCodedAgentTimeout, HandCodedAgentFailed, IndexError):  # its ways of giving up
            return None
        finally:
            random.setstate(kept)


class GoldPath:
    """ScienceWorld's expert: the simulator's own solution, action by action. It does not recover from other actions."""

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg

    def reset(self, task: Task) -> str | None:
        name, _, variation = task.id.rpartition("/")
        self.left = sciworld.gold_path(self.env_cfg, name, int(variation))
        return next(iter(self.left), None)

    def step(self, action: str) -> str | None:
        """The next action after `action` was taken; the same again if that was another; None at the end."""
        if self.left and action == self.left[0]:
            self.left = self.left[1:]
        return next(iter(self.left), None)


def make_expert(env_cfg: EnvConfig, seed: int = 0) -> AlfworldExpert | GoldPath:
    """The environment's own expert."""
    return AlfworldExpert(env_cfg, seed) if env_cfg.name == "alfworld" else GoldPath(env_cfg)


# ----------------------------------------------------------------------------------------------------------------------
# To look at


def split_table(env_cfg: EnvConfig) -> str:
    """How many tasks each level trains and evaluates on, by task type."""
    levels = [(level, phase) for level in ("L0", "L1", "L2") for phase in ("train", "eval")]
    counts = {key: Counter(task.type for task in tasks(env_cfg, *key)) for key in levels}
    lines = [f"{env_cfg.name:<52}" + "".join(f"{level} {phase:<8}" for level, phase in levels)]
    for kind in sorted(set().union(*counts.values())):
        lines.append(f"{kind:<52}" + "".join(f"{counts[key][kind] or '-':<11}" for key in levels))
    return "\n".join([*lines, f"{'all':<52}" + "".join(f"{counts[key].total():<11}" for key in levels)])


def gold_table(env_cfg: EnvConfig) -> str:
    """The gold path of each ScienceWorld task type's first variation: its length in every split against env.max_steps,
    and the score and the simulated time that it reaches in training's."""
    splits = ("train", "dev", "test")
    lines = [f"{'actions in the first gold path':<52}" + "".join(f"{split:<8}" for split in splits) + "score   moves"]
    longer: Counter[str] = Counter()
    for name in tqdm(env_cfg.types, desc="gold paths", unit=" types"):
        first = {split: sciworld.variations(name)[split][0] for split in splits}
        paths = {split: sciworld.gold_path(env_cfg, name, variation) for split, variation in first.items()}
        for split, path in paths.items():
            if len(path) > env_cfg.max_steps:
                longer.update({split: 1, f"all {split}": len(sciworld.variations(name)[split])})
        simulator = sciworld.Simulator(sciworld.machine(env_cfg))
        state = simulator.load(name, first["train"], env_cfg.simplification)
        for action in paths["train"]:
            state = simulator.step(action)
        lengths = "".join(f"{len(path):<8}" for path in paths.values())
        lines.append(f"{name:<52}{lengths}{state.score:<8}{state.moves}")
    limit = f"types longer than env.max_steps={env_cfg.max_steps}"
    for what, prefix in ((limit, ""), ("tasks of these types", "all ")):
        lines.append(f"{what:<52}" + "".join(f"{longer[prefix + split]:<8}" for split in splits))
    return "\n".join(lines)


def play(env_cfg: EnvConfig, task: Task) -> str:
    """The expert's episode of a task, in full."""
    env, expert = make_env(env_cfg), make_expert(env_cfg)
    seen, action = env.reset(task), expert.reset(task)
    lines = [task.id, f"Task: {seen.task}", "", seen.text]
    while action is not None and not seen.done:
        seen = env.step(action)
        lines += [f"\n> {action}", seen.text]
        action = expert.step(action)
    return "\n".join([*lines, "", f"won: {seen.won}, score: {seen.score}"])


def main() -> None:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--splits", action="store_true", help="the tasks of each level")
    command.add_argument("--gold", action="store_true", help="how long ScienceWorld's gold paths are (takes minutes)")
    command.add_argument("--play", choices=sorted(SPLITS), help="the expert's episode of one task")
    command.add_argument("--data", default="", help="ALFWorld's games; default: $ALFWORLD_DATA")
    command.add_argument("--task", type=int, default=0, help="which task of L0's evaluation list to play")
    arguments = command.parse_args()
    alfworld, scienceworld = EnvConfig(data=arguments.data), EnvConfig(name="scienceworld")
    if arguments.splits:
        print(split_table(scienceworld))
        print(split_table(alfworld))
    if arguments.gold:
        print(gold_table(scienceworld))
    if arguments.play:
        env_cfg = {"alfworld": alfworld, "scienceworld": scienceworld}[arguments.play]
        found = tasks(env_cfg, "L0", "eval")
        if not 0 <= arguments.task < len(found):
            raise ConfigError(f"--task {arguments.task}: there are tasks 0 to {len(found) - 1}")
        print(play(env_cfg, found[arguments.task]))


if __name__ == "__main__":
    configuration.fail_clearly(main)

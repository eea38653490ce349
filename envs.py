"""Environments behind one interface: task lists and splits, playing, experts.

    tasks(env_cfg, level, "train" | "eval") -> list[Task]
    env = make_env(env_cfg);  env.reset(task) -> Observation;  env.step(action) -> Observation
    make_expert(env_cfg).reset(task) -> action;  .step(action) -> next action

ALFWorld is played natively (games.py) or, with env.engine=textworld, by TextWorld itself.  Success is strict: `won`.
Departures from published code: the engine's `help` is not offered, as there, and also not played; evaluation lists are
fixed and whole; the expert is alfworld's own hand-coded one, with its "put" test mended for the "move" dialect,
without its ceremonial first `look` and its actions that do nothing.
"""

from __future__ import annotations

import functools
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import games
from config import ConfigError, EnvConfig

RECEPTACLE_TYPES = frozenset(  # what can be gone to, as ALFWorld names it; everything else is an object
    "armchair bathtubbasin bed cabinet cart coffeemachine coffeetable countertop desk diningtable drawer dresser "
    "fridge garbagecan handtowelholder laundryhamper microwave ottoman safe shelf sidetable sinkbasin sofa "
    "stoveburner toaster toilet toiletpaperhanger towelholder tvstand".split()
)
MAX_TRIES = 20  # of the expert, at one step
ALFWORLD_SPLIT = {"train": "train", "L0": "valid_seen", "L1": "valid_unseen", "L2": "valid_unseen"}


@dataclass(frozen=True)
class Task:
    """One game: `id` is its folder below json_2.1.1/."""

    env: str
    type: str
    id: str
    split: str


@dataclass(frozen=True)
class Observation:
    text: str
    actions: tuple[str, ...]
    task: str
    score: float  # in [0, 1]
    done: bool
    won: bool


def tasks(env_cfg: EnvConfig, level: str, phase: str) -> list[Task]:
    """The fixed task list of a level, "train" or "eval", in a stable order.

    ALFWorld: L0 is new games in seen rooms, L1 new games in unseen rooms, L2 held-out task types in unseen rooms; L0
    and L1 train on the same games, L2 on those of the types it does not hold out (peers: GiGPO, RLVMR). Raises
    ConfigError if the data are missing or a level is left without tasks.
    """
    if phase not in ("train", "eval") or level not in ("L0", "L1", "L2"):
        raise ValueError(f"no tasks for level {level!r}, phase {phase!r}")
    if level == "L2":
        held_out = env_cfg.held_out_types
        types = held_out if phase == "eval" else tuple(kind for kind in env_cfg.task_types if kind not in held_out)
    else:
        types = env_cfg.task_types
    split = ALFWORLD_SPLIT["train" if phase == "train" else level]
    found = [
        Task("alfworld", trial.split("-")[0], f"{split}/{trial}", split)
        for trial, solvable in sorted(_scan(data_folder(env_cfg), split).items())
        if solvable and "movable" not in trial and "Sliced" not in trial and trial.split("-")[0] in types
    ]
    if not found:
        raise ConfigError(
            f"level {level} ({phase}) has no games of types {', '.join(types)} in "
            f"{data_folder(env_cfg) / 'json_2.1.1' / split}"
        )
    return found


def data_folder(env_cfg: EnvConfig) -> Path:
    """The folder that holds json_2.1.1/: env.data, else $ALFWORLD_DATA. Raises ConfigError if neither is set."""
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
        return self._observe(self.state)

    def step(self, action: str) -> Observation:
        action = action.strip()
        if action not in self.state["admissible_commands"] or action == "help":
            return _alfworld_observation(
                "Nothing happens.", self.state["admissible_commands"], self.task, self.state["won"]
            )
        self.state, _, _ = self.engine.step(action)
        return self._observe(self.state)

    def restart(self) -> None:
        self.engine = None

    def _observe(self, state: Any) -> Observation:
        return _alfworld_observation(state["feedback"], state["admissible_commands"], self.task, state["won"])


def _alfworld_observation(text: str, actions: list[str], task: str, won: bool) -> Observation:
    offered = tuple(action for action in actions if action != "help")
    return Observation(text.strip(), offered, task, float(won), bool(won), bool(won))


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


def make_expert(env_cfg: EnvConfig, seed: int = 0) -> AlfworldExpert:
    """The environment's own expert."""
    return AlfworldExpert(env_cfg, seed)

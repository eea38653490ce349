"""ALFWorld: household tasks in text. Its tasks and splits, environment, expert, teacher, and words.

The data are ALFWorld's own games (`alfworld-download`) or new ones of the same format (tools/make_games.py), in
env.data or $ALFWORLD_DATA; alfworld_engine.py plays them.  A game's id is its folder below json_2.1.1/.

Departures from published code: ALFWorld's `help` is not offered, as there, and also not played.  The expert is
alfworld's own hand-coded one, with its "put" test mended for the "move" dialect, without its ceremonial first `look`
and its actions that do nothing.  The thoughts and critiques of a cold start say what can be read off the prompt, in
fixed forms that a model of any size can learn to fill in; the paper's come from a language model.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from config import ConfigError, EnvConfig
from environments.alfworld_engine import TASK_TYPES, Game, GameState, distance, parse_game, solve
from envs import Observation, Task
from prompts import EnvPrompt, PromptContext

HELD_OUT_TYPES = TASK_TYPES[4:]  # as published
FOLDERS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}  # of the splits, in json_2.1.1/
MAX_TRIES = 20  # of the expert, at one step
RECEPTACLE_TYPES = frozenset(  # what can be gone to, as ALFWorld names it; everything else is an object
    "armchair bathtubbasin bed cabinet cart coffeemachine coffeetable countertop desk diningtable drawer dresser "
    "fridge garbagecan handtowelholder laundryhamper microwave ottoman safe shelf sidetable sinkbasin sofa "
    "stoveburner toaster toilet toiletpaperhanger towelholder tvstand".split()
)
PACKAGES = ("alfworld", "textworld")  # whose versions a run records

PROMPT = EnvPrompt(
    opening="You are an expert agent operating in the ALFRED Embodied Environment. Your task is to: {task}\n",
    task="",
    closing="Your admissible actions of the current situation are: [{actions}].\n"
    "Now it's your turn to take an action. You should first reason step-by-step{guided} about the current "
    "situation. {reply_format}",
    choice="an admissible action for current step",
    judge_setting="ALFWorld, a household environment",
    judge_examples="'put a cellphone in bed'",
    guideline_setting="ALFWorld or ScienceWorld",
    lower_case=True,  # as its published parser does
)

# ----------------------------------------------------------------------------------------------------------------------
# Tasks


def tasks(env_cfg: EnvConfig, split: str) -> list[Task]:
    """List the games of a split that ALFWorld itself would play: solvable, no movable receptacle, no slices.

    Raises ConfigError if there are no games.
    """
    folder = FOLDERS[split]
    return [
        Task("alfworld", trial.split("-")[0], f"{folder}/{trial}", split)
        for trial, solvable in sorted(_scan(data_folder(env_cfg), folder).items())
        if solvable and "movable" not in trial and "Sliced" not in trial and trial.split("-")[0] in TASK_TYPES
    ]


def data_folder(env_cfg: EnvConfig) -> Path:
    """Return the folder that holds json_2.1.1/: env.data, else $ALFWORLD_DATA. Raises ConfigError without both."""
    folder = env_cfg.data or os.environ.get("ALFWORLD_DATA", "")
    if not folder:
        raise ConfigError(
            "no games: set $ALFWORLD_DATA (filled by `alfworld-download`) or env.data (filled by "
            "`python tools/make_games.py --out DIR ...`)"
        )
    return Path(folder)


def game_path(env_cfg: EnvConfig, task: Task) -> Path:
    """Return the folder of a task's game."""
    return data_folder(env_cfg) / "json_2.1.1" / task.id


def parsed_game(env_cfg: EnvConfig, task: Task) -> Game:
    """Read a task's game, once."""
    return _parsed(game_path(env_cfg, task) / "game.tw-pddl")


_parsed = functools.lru_cache(maxsize=4096)(parse_game)


@functools.cache
def _scan(data: Path, folder: str) -> dict[str, bool]:
    """Map each trial of a split to whether it is solvable. Reading thousands of games takes a while: it is kept."""
    root = data / "json_2.1.1" / folder
    trials = sorted(str(path.parent.relative_to(root)) for path in root.glob("*/*/game.tw-pddl"))
    if not trials:
        raise ConfigError(
            f"no games in {root}: fill it with `ALFWORLD_DATA={data} alfworld-download` or "
            f"`python tools/make_games.py --out {data} ...`"
        )
    index = root.with_suffix(".index.json")
    try:
        known = json.loads(index.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or sorted(known) != trials:
        stored = {trial: json.loads((root / trial / "game.tw-pddl").read_text()) for trial in trials}
        known = {trial: game.get("solvable", False) for trial, game in stored.items()}
        try:
            fresh = index.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(known))
            fresh.replace(index)
        except OSError:
            pass  # a read-only data folder is scanned anew each time
    return known


# ----------------------------------------------------------------------------------------------------------------------
# Playing


class Alfworld:
    """One environment, played by alfworld_engine.py. It is won where ALFWorld's own goal holds."""

    threaded = False  # a step costs microseconds: no thread is worth it

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg
        self.state: GameState

    def reset(self, task: Task) -> Observation:
        """Begin an episode."""
        self.state = GameState(parsed_game(self.env_cfg, task))
        return self._observe(self.state.text)

    def step(self, action: str) -> Observation:
        """Do an action."""
        return self._observe(self.state.step(action) if action.strip() != "help" else "Nothing happens.")

    def restart(self) -> None:
        """Do nothing: there is nothing to recover."""

    def _observe(self, text: str) -> Observation:
        offered = tuple(action for action in self.state.actions if action != "help")
        won = self.state.won
        return Observation(text.strip(), offered, self.state.game.task, float(won), won, won, won_loose=won)


def make(env_cfg: EnvConfig) -> Alfworld:
    """Make an environment."""
    return Alfworld(env_cfg)


class AlfworldExpert:
    """alfworld's hand-coded expert: it explores as an agent must and is not told where things are.

    It follows the episode in a game of its own. `seed` fixes its random choices.
    """

    actions_left = None  # what it has to find, it does not know

    def __init__(self, env_cfg: EnvConfig, seed: int = 0) -> None:
        self.env_cfg = env_cfg
        self.random = random.Random(seed)

    def reset(self, task: Task) -> str | None:
        """Begin an episode; the first action."""
        from alfworld.agents.expert import HandCodedTWAgent

        folder = game_path(self.env_cfg, task)
        self.state = GameState(parsed_game(self.env_cfg, task))
        self.agent = HandCodedTWAgent(max_steps=1000)
        self.agent.reset(str(folder / "game.tw-pddl"))
        self.agent.observe(self.state.text)
        self.state.step("look")
        return self._next("look")

    def step(self, action: str) -> str | None:
        """Take note that `action` was done; the next action, None where the expert has no idea."""
        self.state.step(action)
        return None if self.state.won else self._next(action)

    def _next(self, last: str) -> str | None:
        """Ask for the expert's next admissible action. Of what it wants in vain it is told that nothing happened, and
        it thinks again: those tries are neither played nor taught."""
        names, state = self.state.game.names, self.state
        facts = [("inreceptacle", obj, place) for place, held in state.contents.items() for obj in held]
        facts = [SimpleNamespace(name=name, names=[names[obj], names[place]]) for name, obj, place in facts]
        if state.held is not None:
            facts.append(SimpleNamespace(name="holds", names=["agent", names[state.held]]))
        for verb, name in (("clean", "isclean"), ("heat", "ishot"), ("cool", "iscool")):
            facts += [SimpleNamespace(name=name, names=[names[obj]]) for obj in state.changed[verb]]
        offered = [action for action in state.actions if action != "help"]
        told = {"feedback": state.text, "facts": facts, "admissible_commands": offered, "won": state.won}
        if last.startswith("move "):  # the expert's bookkeeping still waits for the old word
            last = "put " + last.removeprefix("move ")
        for _ in range(MAX_TRIES):
            action = self._ask(told, last)
            if action is None or action in offered:
                return action
            told, last = told | {"feedback": "Nothing happens."}, action
        return None

    def _ask(self, told: dict[str, Any], last: str) -> str | None:
        """Ask alfworld's expert once; None where it gives up."""
        from alfworld.agents.expert import HandCodedAgentTimeout
        from alfworld.agents.expert.handcoded_expert import HandCodedAgentFailed

        before = random.getstate()  # the expert draws from the global generator
        random.seed(self.random.random())
        try:
            return self.agent.act(told, 0, told["won"], last)
        except (HandCodedAgentTimeout, HandCodedAgentFailed, IndexError):  # its ways of giving up
            return None
        finally:
            random.setstate(before)


def make_expert(env_cfg: EnvConfig, seed: int) -> AlfworldExpert:
    """Make an expert."""
    return AlfworldExpert(env_cfg, seed)


class OracleTeacher:
    """Judges actions of one game with the full state in view.

    Good: the action shortens the oracle's remaining plan; or, while no object of the task has been seen, it goes for
    the first time to a place that could hold one, or opens it. Everything else is flawed.
    """

    def __init__(self, env_cfg: EnvConfig, task: Task) -> None:
        self.state = GameState(parsed_game(env_cfg, task))
        self.visited: set[int] = set()
        self.searched: set[int] = set()  # visited and open to the eye

    def judge(self, action: str, raised: bool = False) -> int:
        """Label `action` in the current state, then carry it out. ALFWorld has no score to be raised."""
        state, game = self.state, self.state.game
        admissible = action in state.actions and action != "help"
        before = distance(state)
        known = state.held in game.goal_objects or any(
            state.contents[place] & game.goal_objects - self._placed() for place in self.searched
        )
        command = next((word for word in ("go to ", "open ") if action.startswith(word)), None)
        place = game.names.index(action.removeprefix(command)) if admissible and command else None
        explores = (
            place in game.location_of
            and place not in (self.searched if command == "open " else self.visited)
            and not known
            and bool(game.fits.get(place, frozenset()) & game.goal_objects)
        )
        if action != "help":
            state.step(action)
        after = distance(state)
        self.visited |= set(state.here)
        self.searched |= {place for place in state.here if state.accessible(place)}
        nearer = state.won or (before is not None and after is not None and after < before)
        return int(admissible and (nearer or explores))

    def best_action(self) -> str | None:
        """Return the oracle's next action."""
        return next(iter(solve(self.state) or []), None)

    def _placed(self) -> set[int]:
        """Find the goal objects that already lie, ready, where the task wants them."""
        state, game = self.state, self.state.game
        return {obj for place in game.goal_receptacles for obj in state.contents[place] if state.ready(obj)}


def make_teacher(env_cfg: EnvConfig, task: Task) -> OracleTeacher:
    """Make the teacher of one task's episode."""
    return OracleTeacher(env_cfg, task)


# ----------------------------------------------------------------------------------------------------------------------
# The words of a cold start

TASK_FORMS = (  # task sentences -> what is needed, in which state, and where it must go
    r"(?:look at|examine the) (?P<object>\w+) (?:under|with) the (?P<place>\w+)",
    r"(?:put|find) (?P<state>two) (?P<object>\w+)(?: and put them)? in (?P<place>\w+)",
    r"put a (?P<state>clean|hot|cool) (?P<object>\w+) in (?P<place>\w+)",
    r"(?P<state>clean|heat|cool) some (?P<object>\w+) and put it in (?P<place>\w+)",
    r"put (?:a|some) (?P<object>\w+) (?:in|on) (?P<place>\w+)",
)
STATE = {"clean": "clean", "heat": "hot", "hot": "hot", "cool": "cool", "two": "two", None: "a"}
ADVICE = {  # by what was wrong or right
    "inadmissible": "Read the current observation and choose an admissible action.",
    "idle": "Avoid repeating actions that did not change anything.",
    "search": "Explore unvisited places systematically while searching for the object.",
    "grab": "Take only the object that the task needs.",
    "deliver": "Go to the destination and finish the task once the object is held.",
}


class AlfworldTemplates:
    """What a cold start teaches to say, and the mistakes that it shows how to mend."""

    advice = tuple(ADVICE.values())

    def thought(self, ctx: PromptContext, action: str) -> str:
        """Say what can be read off the prompt: need, what is held, where the agent went, what is in reach, what counts.

        What counts is an object that is needed, where one is in reach; the place for it, once it is held as needed.
        Example: "Need clean mug in shelf. Have nothing. Been drawer 1, desk 1. Here cd 1, mug 2. Next mug 2.", and when
        that mug is clean: "Need clean mug in shelf. Have clean mug 2. Been sinkbasin 1. Here nothing. Next shelf 1."
        """
        asked, held = parse_task(ctx.task), _held(ctx)
        wanted, kind, place = STATE[asked.groupdict().get("state")], asked["object"], asked["place"]
        texts = (*(text for text, _ in ctx.history), ctx.observation)
        changes = (re.match(rf"You (clean|heat|cool) the {held} using", text) for text in texts)
        states = [STATE[match[1]] for match in changes if match]
        ready = held.split()[0] == kind and (wanted in ("a", "two") or states[-1:] == [wanted])
        been = [done.removeprefix("go to ") for _, done in ctx.history if done.startswith("go to ")]
        here = [match[1] for offer in ctx.actions if (match := re.match(r"(?:take|use) (\w+ \d+)", offer))]
        reach = here + [match[1] for offer in ctx.actions if (match := re.match(r"(?:go to|examine) (\w+ \d+)", offer))]
        counts = [name for name in reach if name.split()[0] == (place if ready else kind) and name != held]
        return (
            f"Need {wanted} {kind} in {place}. Have {' '.join(states[-1:] + [held])}. "
            f"Been {', '.join(been) or 'nowhere'}. Here {', '.join(here) or 'nothing'}. "
            f"Next {counts[0] if counts else 'nothing'}."
        )

    def plan(self, ctx: PromptContext) -> str:
        """Say the subgoals in one sentence. Example: "Plan: find mug, make it clean, bring it to shelf."."""
        asked = parse_task(ctx.task)
        state = asked.groupdict().get("state")
        kind = f"two {asked['object']}" if state == "two" else asked["object"]
        change = f" make it {STATE[state]}," if state not in ("two", None) else ""
        return f"Plan: find {kind},{change} bring it to {asked['place']}."

    def refused(self, ctx: PromptContext) -> bool:
        """Say whether the observation tells that the last action could not be done."""
        return ctx.observation.startswith("Nothing happens")

    def explores(self, ctx: PromptContext, action: str) -> bool:
        """Say whether the action shows something new: RLVMR's explore tag."""
        return action.startswith(("go ", "open ", "look"))

    def reason(self, ctx: PromptContext, action: str, verdict: int) -> tuple[str, str]:
        """Say why the verdict on an action, and the advice that goes with it."""
        verb = action.split(" ")[0]
        if action not in ctx.actions:
            return "It is not admissible.", ADVICE["inadmissible"]
        if verb in ("go", "open"):
            return "It leads on." if verdict else "It leads nowhere new.", ADVICE["search"]
        if verb == "take":
            return "It takes what is needed." if verdict else "It takes what is not needed.", ADVICE["grab"]
        if verb in ("move", "use", "clean", "heat", "cool"):
            return "It serves the task." if verdict else "It does not serve the task.", ADVICE["deliver"]
        return "It brings the task closer." if verdict else "It changes nothing.", ADVICE["idle"]

    def idle(self, ctx: PromptContext) -> str:
        """Choose what changes nothing: look at the place in front once more, or around where there is none."""
        return next((f"examine {place}" for place in places(ctx)), "look")

    def slip(self, ctx: PromptContext, earlier: Sequence[PromptContext], rng: random.Random) -> str:
        """Draw a mistake of the kinds that models make: an admissible action at random, one of an earlier step (by now
        mostly impossible), a grasp for the needed object as if it were here, or going where one is."""
        kind = rng.choice(("random", "earlier", "grasp", "stay"))
        if kind == "earlier" and earlier:
            return random_action(rng.choice(earlier).actions, rng)
        here = places(ctx)
        if kind == "grasp" and here:
            return f"take {parse_task(ctx.task)['object']} {rng.randint(1, 3)} from {rng.choice(here)}"
        if kind == "stay" and here:
            return f"go to {rng.choice(here)}"
        return rng.choice(ctx.actions)


TEMPLATES = AlfworldTemplates()


def random_action(actions: Sequence[str], rng: random.Random) -> str:
    """Draw a kind of action, those that lead nowhere less often, then a random one of that kind."""
    kinds = sorted({action.split(" ")[0] for action in actions})
    (kind,) = rng.choices(kinds, [1 / 4 if kind in ("look", "inventory", "examine", "close") else 1 for kind in kinds])
    return rng.choice([action for action in actions if action.split(" ")[0] == kind])


def parse_task(task: str) -> re.Match:
    """Read what a task sentence asks for: groups `object`, `place` and, in some forms, `state`."""
    return next(match for form in TASK_FORMS if (match := re.match(form, task)))


def places(ctx: PromptContext) -> list[str]:
    """List the receptacle that the agent stands at: none at the start."""
    return [name for name in _examined(ctx) if name.split()[0] in RECEPTACLE_TYPES]


def _held(ctx: PromptContext) -> str:
    """Find the object in hand, or "nothing": only what is held or stood at can be examined."""
    return next((name for name in _examined(ctx) if name.split()[0] not in RECEPTACLE_TYPES), "nothing")


def _examined(ctx: PromptContext) -> list[str]:
    return [action.removeprefix("examine ") for action in ctx.actions if action.startswith("examine ")]

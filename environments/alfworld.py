"""ALFWorld: household tasks in text. Its tasks and splits, environment, expert, teacher, and words.

The data are ALFWorld's own games (`alfworld-download`) or new ones of the same format (tools/make_games.py), in
env.data or $ALFWORLD_DATA; alfworld_engine.py plays them.  A game's id is its folder below json_2.1.1/.

Departures from published code: ALFWorld's `help` is not offered, as there, and also not played.  The expert is
alfworld's own hand-coded one, with its "put" test mended for the "move" dialect, without its ceremonial first `look`
and its actions that do nothing.  The thoughts and critiques of a cold start say what can be read off the prompt, in
fixed forms that a model of any size can learn to fill in; the paper's come from a language model.  Of a goal that a
human wrote they say plain words.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from config import ConfigError, EnvConfig, expand_path
from environments.alfworld_engine import TASK_TYPES, Game, GameState, distance, in_words, parse_game, read_json, solve
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
OTHERS = "name other games (env.data, $ALFWORLD_DATA)"
MEND = "mend it, download or make it anew, or delete its folder"

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

    Raises ConfigError if there are no games, or broken ones.
    """
    folder = FOLDERS[split]
    found = _scan(data_folder(env_cfg), folder)
    return [Task("alfworld", trial.split("-")[0], f"{folder}/{trial}", split) for trial in found]


def data_folder(env_cfg: EnvConfig) -> Path:
    """Return the folder that holds json_2.1.1/: env.data, else $ALFWORLD_DATA. Raises ConfigError without both."""
    if env_cfg.data:
        return Path(env_cfg.data)
    folder = expand_path(os.environ.get("ALFWORLD_DATA", ""), "$ALFWORLD_DATA")
    if not folder:
        raise ConfigError(
            "no games: set $ALFWORLD_DATA (filled by `alfworld-download`) or env.data (filled by "
            "`python tools/make_games.py --out DIR ...`)"
        )
    os.environ["ALFWORLD_DATA"] = folder  # alfworld, when it is imported, would make a folder named ~
    return Path(folder)


def game_path(env_cfg: EnvConfig, task: Task) -> Path:
    """Return the folder of a task's game."""
    return data_folder(env_cfg) / "json_2.1.1" / task.id


def parsed_game(env_cfg: EnvConfig, task: Task) -> Game:
    """Read a task's game, once."""
    return _parsed(game_path(env_cfg, task) / "game.tw-pddl")


_parsed = functools.lru_cache(maxsize=4096)(parse_game)


@functools.cache
def _scan(data: Path, folder: str) -> list[str]:
    """List a split's trials that ALFWorld itself would play. Raises ConfigError if a game is broken, or none is there.

    Reading thousands of games takes a while: which are solvable is kept in an index, by their files' size and time.
    """
    root = data / "json_2.1.1" / folder
    try:
        games = _find_games(root) if root.is_dir() else {}
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}; mend that, or {OTHERS}") from None
    if not games:
        raise _no_games(data, folder)
    index = root.with_suffix(".index.json")
    try:
        kept = json.loads(index.read_text())
    except (OSError, ValueError, RecursionError):
        kept = None
    kept = kept if isinstance(kept, dict) else {}
    solvable, broken = {}, []
    for trial, stamp in games.items():
        if "movable" in trial or "Sliced" in trial or trial.split("-")[0] not in TASK_TYPES:
            continue
        path, known = root / trial / "game.tw-pddl", kept.get(stamp)
        try:
            solvable[stamp] = known if isinstance(known, bool) else _is_solvable(path)
        except ValueError as error:
            broken.append(f"{path}: {error}")
    if broken:
        others = f" ({len(broken) - 1} others are broken, too)" if len(broken) > 1 else ""
        raise ConfigError(f"{broken[0]}; {MEND}{others}")
    if solvable != kept:
        fresh = index.with_suffix(f".{os.getpid()}")
        try:
            fresh.write_text(json.dumps(solvable))
            fresh.replace(index)
        except OSError:  # a read-only data folder is scanned anew each time
            with contextlib.suppress(OSError):
                fresh.unlink()
    return [trial for trial, stamp in games.items() if solvable.get(stamp)]


def _find_games(root: Path) -> dict[str, str]:
    """Map the trials below a folder that have a game, in order, to their names with their file's size and time."""
    found = {}
    for task in os.scandir(root):
        for trial in os.scandir(task) if task.is_dir() else ():
            path = f"{trial.path}/game.tw-pddl"
            if os.path.lexists(path):
                name, file = f"{task.name}/{trial.name}", os.stat(path)
                found[name] = f"{name} {file.st_size} {file.st_mtime_ns}"
    return dict(sorted(found.items()))


def _is_solvable(path: Path) -> bool:
    """Tell whether a game can be solved, as its maker found out. Raises ValueError if nobody could play it."""
    game = read_json(path)
    if game.get("solvable") is not False:
        parse_game(game)
    return bool(game.get("solvable"))


def _no_games(data: Path, folder: str) -> ConfigError:
    """Make the error about a data folder without games of a split: what is meant instead, or how to fill it."""
    root = data / "json_2.1.1" / folder
    if file := next((one for one in (root, *root.parents) if os.path.isfile(one)), None):
        return ConfigError(f"{file} is a file, not a folder of games: unpack it, or {OTHERS}")
    where = f"no games in {root}" + ("" if data.is_absolute() else f" (relative to {Path.cwd()})")
    if near := _near(data, folder):
        return ConfigError(f"{where}; did you mean {near}?")
    if any((data / folder).glob("*/*/game.tw-pddl")):
        return ConfigError(f"{where}, but in {data / folder}: move that folder there")
    target = shlex.quote(str(data))
    return ConfigError(
        f"{where}: fill it with `ALFWORLD_DATA={target} alfworld-download` or "
        f"`python tools/make_games.py --out {target} ...`"
    )


def _near(data: Path, folder: str) -> Path | None:
    """Find the data folder that was meant: some levels above, the only one a level below, or one of a like name."""
    data = Path(os.path.abspath(data))
    with contextlib.suppress(PermissionError):
        beside = [one.name for one in data.parent.glob("*") if one != data]
        alike = [data.with_name(name) for name in difflib.get_close_matches(data.name, beside, n=1)]
        for places in (data.parents[:4], data.glob("*"), alike):
            found = [one for one in places if any(one.glob(f"json_2.1.1/{folder}/*/*/game.tw-pddl"))]
            if len(found) == 1:
                return found[0]
    return None


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


@functools.cache
def alfworld_expert() -> ModuleType:
    """Import alfworld's expert. Of TextWorld, which has to be compiled, it needs a base class alone: a laptop may lack
    it."""
    if importlib.util.find_spec("textworld") is None:
        sys.modules["textworld"] = SimpleNamespace(Agent=object)
    return importlib.import_module("alfworld.agents.expert")


class AlfworldExpert:
    """alfworld's hand-coded expert: it explores as an agent must and is not told where things are.

    It follows the episode in a game of its own. `seed` fixes its random choices.
    """

    actions_left = None  # what it has to find, it does not know

    def __init__(self, env_cfg: EnvConfig, seed: int = 0) -> None:
        self.env_cfg = env_cfg
        self.random = random.Random(seed)

    def reset(self, task: Task) -> str | None:
        """Begin an episode; the first action. Raises ConfigError if the game's traj_data.json is broken."""
        self.file = game_path(self.env_cfg, task) / "traj_data.json"  # alfworld's expert reads it, and checks nothing
        self.state = GameState(parsed_game(self.env_cfg, task))
        self.agent = alfworld_expert().HandCodedTWAgent(max_steps=1000)
        try:
            read_json(self.file)
            self.agent.reset(str(self.file.with_name("game.tw-pddl")))
        except Exception as error:  # it raises bare ones, too
            raise ConfigError(f"{self.file}: {in_words(error)}; {MEND}") from None
        self.agent.observe(self.state.text.partition("\n\nYour task is to: ")[0])  # a human's goal may say "you see"
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
        expert = alfworld_expert()
        before = random.getstate()  # it draws from the global generator
        random.seed(self.random.random())
        try:
            return self.agent.act(told, 0, told["won"], last)
        except (expert.HandCodedAgentTimeout, expert.HandCodedAgentFailed, IndexError):  # its ways of giving up
            return None
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.file}: {in_words(error)}; {MEND}") from None
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
        self.left = distance(self.state)  # actions to the end

    def judge(self, action: str, raised: bool = False) -> int:
        """Label `action` in the current state, then carry it out. ALFWorld has no score to be raised."""
        state, game = self.state, self.state.game
        admissible = action in state.actions and action != "help"
        before = self.left
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
        after = self.left = distance(state)
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
        if asked is None:
            return _plain_words().thought(ctx, action)
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
        if asked is None:
            return _plain_words().plan(ctx)
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
        here, asked = places(ctx), parse_task(ctx.task)
        if kind == "grasp" and here and asked:
            return f"take {asked['object']} {rng.randint(1, 3)} from {rng.choice(here)}"
        if kind == "stay" and here:
            return f"go to {rng.choice(here)}"
        return rng.choice(ctx.actions)


TEMPLATES = AlfworldTemplates()


def random_action(actions: Sequence[str], rng: random.Random) -> str:
    """Draw a kind of action, those that lead nowhere less often, then a random one of that kind."""
    kinds = sorted({action.split(" ")[0] for action in actions})
    (kind,) = rng.choices(kinds, [1 / 4 if kind in ("look", "inventory", "examine", "close") else 1 for kind in kinds])
    return rng.choice([action for action in actions if action.split(" ")[0] == kind])


def parse_task(task: str) -> re.Match | None:
    """Read what a task sentence asks for: groups `object`, `place` and, in some forms, `state`.

    None if it is in none of ALFWorld's own words: a human may have written it (an option of alfworld-generate).
    """
    return next((match for form in TASK_FORMS if (match := re.fullmatch(rf"{form}\.?", task))), None)


def _plain_words() -> Any:
    from sft_data import Templates  # it imports much that playing does not need

    return Templates()


def places(ctx: PromptContext) -> list[str]:
    """List the receptacle that the agent stands at: none at the start."""
    return [name for name in _examined(ctx) if name.split()[0] in RECEPTACLE_TYPES]


def _held(ctx: PromptContext) -> str:
    """Find the object in hand, or "nothing": only what is held or stood at can be examined."""
    return next((name for name in _examined(ctx) if name.split()[0] not in RECEPTACLE_TYPES), "nothing")


def _examined(ctx: PromptContext) -> list[str]:
    return [action.removeprefix("examine ") for action in ctx.actions if action.startswith("examine ")]

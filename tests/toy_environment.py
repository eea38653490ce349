"""A toy text game, and the example of an environment's module: find a key in a lighthouse, open a door, light the lamp.

To write an environment, copy this file to the folder that you work in, as my_games/lighthouse.py say, change it, and
set env.name=my_games.lighthouse.  The top of envs.py says what is asked of a module; what is not here is optional.
"""

from itertools import permutations, product

from config import EnvConfig
from envs import Observation, Task
from prompts import EnvPrompt

DEEDS = {"find": "take the key", "open": "open the door", "light": "light the lamp"}  # each needs those before it
TASK_TYPES = tuple(DEEDS)
HELD_OUT_TYPES = ("light",)  # level L2 evaluates on it, and trains on the others
HOUSES = list(permutations(("attic", "cellar", "kitchen", "study", "workshop"), 2))  # two rooms each
PROMPT = EnvPrompt(
    opening="You are in an old lighthouse. Your task is to {task}.\n",
    task="",  # the opening has told it
    closing="Here you can [{actions}].\nIt is your turn: reason step by step{guided}. {reply_format}",
    choice="one of these actions",
    judge_setting="a text game in a lighthouse",
    judge_examples="'open the door'",
    guideline_setting="a text game",
)


def tasks(env_cfg: EnvConfig, split: str) -> list[Task]:
    """List a split's tasks: "seen" has the houses of "train" with the key in the other room, "unseen" has others."""
    found = []
    for kind, (number, rooms), key in product(TASK_TYPES, enumerate(HOUSES), (0, 1)):
        if split == ("unseen" if number % 4 == 3 else "seen" if (number + key) % 2 else "train"):
            found.append(Task(env_cfg.name, kind, "-".join([kind, *rooms, rooms[key]]), split))
    return found


class Lighthouse:
    """A hall with a locked door to the tower, and two rooms, one of which has the key."""

    threaded = False  # a step takes no time

    def reset(self, task: Task) -> Observation:
        """Begin an episode in the hall. The task's id says all that there is to know."""
        kind, *self.rooms, self.key_room = task.id.split("-")
        self.room, self.done = "hall", []
        self.places = dict(zip(DEEDS.values(), (self.key_room, "hall", "tower"), strict=True))
        self.wanted = list(DEEDS.values())[: TASK_TYPES.index(kind) + 1]  # the last one is the goal
        return self.observe()

    def step(self, action: str) -> Observation:
        """Do an action; what is not on offer changes nothing."""
        if action not in self.actions():
            return self.observe("You cannot do that. ")
        if action == "open the door" and "take the key" not in self.done:
            return self.observe("The door is locked. ")
        if action in self.places:
            self.done.append(action)
        else:
            self.room = action.removeprefix("go to the ")
        return self.observe()

    def restart(self) -> None:
        """Do nothing: there is no machine behind this game that could fail."""

    def actions(self) -> list[str]:
        """List what is on offer: where one can go, what can be tried here."""
        ways = [*self.rooms, *["tower"] * ("open the door" in self.done)] if self.room == "hall" else ["hall"]
        here = [deed for deed, room in self.places.items() if room == self.room and deed not in self.done]
        return [f"go to the {room}" for room in ways] + here

    def observe(self, event: str = "") -> Observation:
        """Say what is seen: the same state reads the same."""
        note = f" A note says that the key is in the {self.key_room}." if self.room == "hall" else ""
        text = f"{event}You are in the {self.room}.{note} You have done: {', '.join(self.done) or 'nothing'}."
        won = self.wanted[-1] in self.done
        return Observation(text, tuple(self.actions()), self.wanted[-1], len(self.done) / len(self.wanted), won, won)

    def route(self) -> list[str]:
        """List the actions that lead to the goal on the shortest way."""
        route, room = [], self.room
        for deed in self.wanted[len(self.done) :]:
            if room != self.places[deed]:  # all ways lead through the hall
                route += [f"go to the {way}" for way in dict.fromkeys(("hall", self.places[deed])) if way != room]
            route, room = [*route, deed], self.places[deed]
        return route


class Guide:
    """Knows the shortest way: the expert that a cold start imitates, and the teacher that labels actions."""

    def __init__(self) -> None:
        self.game = Lighthouse()

    def reset(self, task: Task) -> str | None:
        """Begin an episode; the first action."""
        self.game.reset(task)
        return self.best_action()

    def step(self, action: str) -> str | None:
        """Take note that an action was done; the next one."""
        self.game.step(action)
        return self.best_action()

    @property
    def actions_left(self) -> int:
        """Count the actions to the end."""
        return len(self.game.route())

    def judge(self, action: str, raised: bool = False) -> int:
        """Label the next action: 1 if it brings the goal closer."""
        before = self.actions_left
        self.game.step(action)
        return int(self.actions_left < before)

    def best_action(self) -> str | None:
        """Say what it would do now."""
        return next(iter(self.game.route()), None)


def make(env_cfg: EnvConfig) -> Lighthouse:
    """Make an environment, for one episode at a time."""
    return Lighthouse()


def make_expert(env_cfg: EnvConfig, seed: int) -> Guide:
    """Make an expert: without this there is no cold start."""
    return Guide()


def make_teacher(env_cfg: EnvConfig, task: Task) -> Guide:
    """Make a teacher of one task's episode: without this there is no judge.teacher=expert."""
    guide = Guide()
    guide.reset(task)
    return guide

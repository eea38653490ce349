"""The smallest environment that a cold start can be made of: a corridor, an expert, a teacher, no words of its own."""

from config import EnvConfig
from envs import Observation, Task
from prompts import EnvPrompt

TASK_TYPES = HELD_OUT_TYPES = ("leave",)
PROMPT = EnvPrompt(
    opening="You are in a corridor. {task}\n",
    task="",
    closing="You can: [{actions}]. {reply_format}",
    choice="an action",
    judge_setting="a corridor",
    judge_examples="'leave it'",
    guideline_setting="a corridor",
)


def tasks(env_cfg: EnvConfig, split: str) -> list[Task]:
    """List the tasks: a task's id is the length of its corridor."""
    return [Task("corridor", "leave", str(length), split) for length in (1, 2, 3, 4)]


class Corridor:
    """Won after as many steps north as it is long; any other action changes nothing."""

    threaded = False

    def reset(self, task: Task) -> Observation:
        self.left = int(task.id)
        return self._observe()

    def step(self, action: str) -> Observation:
        self.left -= action == "go north"
        return self._observe()

    def _observe(self) -> Observation:
        won = self.left == 0
        return Observation(f"{self.left} steps are left.", ("go north", "wait"), "Leave it.", float(won), won, won)


class Expert:
    """Goes north; it knows how far it is."""

    def reset(self, task: Task) -> str:
        self.actions_left = int(task.id)
        return "go north"

    def step(self, action: str) -> str:
        self.actions_left -= action == "go north"
        return "go north"


class Teacher:
    """Likes what the expert does."""

    def judge(self, action: str, raised: bool = False) -> int:
        return int(action == "go north")

    def best_action(self) -> str:
        return "go north"


def make(env_cfg: EnvConfig) -> Corridor:
    """Make an environment."""
    return Corridor()


def make_expert(env_cfg: EnvConfig, seed: int) -> Expert:
    """Make an expert."""
    return Expert()


def make_teacher(env_cfg: EnvConfig, task: Task) -> Teacher:
    """Make a teacher."""
    return Teacher()

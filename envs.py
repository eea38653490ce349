"""Environments behind one interface: what a module of one must offer, task lists by level, and a look at them.

    env = envs.load("my_package.my_env")            a module under environments/, or any importable one
    python envs.py --splits                         print how many tasks each level has
    python envs.py --play NAME                      print the expert's episode of one task, in full
    python envs.py --gold                           print how long experts' solutions are, where they are known

One environment is one module that holds everything of its own:

    TASK_TYPES, HELD_OUT_TYPES                      names; what level L2 evaluates on and never trains on
    PROMPT                                          prompts.EnvPrompt: its words in the prompts
    tasks(env_cfg, split) -> list[Task]             the whole fixed list of a split: "train", "seen", "unseen"
    make(env_cfg) -> Environment                    for one episode at a time
    make_expert(env_cfg, seed) -> Expert            optional: for a cold start
    make_teacher(env_cfg, task) -> StepTeacher      optional: for judge.teacher=expert
    TEMPLATES                                       optional: its words in a cold start (sft_data.Templates)
    check(env_cfg)                                  optional: raise ConfigError for options that it cannot take
    data_folder(env_cfg) -> Path                    optional: where its data lie, if $VARIABLE can say so, too
    expert_table(env_cfg) -> str                    optional: for --gold
    PACKAGES                                        optional: whose versions a run records

Success is strict.  All episodes of a group play one task, and evaluation lists are fixed and whole.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import config as configuration
from config import LEVELS, Config, ConfigError, EnvConfig, nearest

SPLITS = {"L0": "seen", "L1": "unseen", "L2": "unseen"}  # what a level evaluates on; every level trains on "train"
REQUIRED = ("TASK_TYPES", "HELD_OUT_TYPES", "PROMPT", "tasks", "make")  # of an environment's module
PROMPT_FIELDS = {  # what braces in its PROMPT can name
    "opening": ("task",),
    "task": ("task",),
    "closing": ("actions", "objects", "guided", "reply_format"),
}
ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """One task of an environment; its `id` is unique there."""

    env: str
    type: str
    id: str
    split: str


@dataclass(frozen=True)
class Observation:
    """What an environment answers to a reset or an action."""

    text: str
    actions: tuple[str, ...]  # what is on offer; may hold a placeholder for `objects`
    task: str  # the task in words
    score: float  # in [0, 1]
    done: bool
    won: bool
    objects: tuple[str, ...] = ()  # what a placeholder can stand for
    available: bool | None = None  # whether the action that led here could be done; None: whether it was on offer
    won_loose: bool = False  # won by a looser rule that others have published; logged, never trained on


class Environment(Protocol):
    """One environment, for one episode at a time. Whatever it raises costs a restart, then the episode."""

    threaded: bool  # whether a step is slow enough for a thread of its own

    def reset(self, task: Task) -> Observation:
        """Begin an episode."""

    def step(self, action: str) -> Observation:
        """Do an action; any text is one, the empty one, too: a reply without an action."""

    def restart(self) -> None:
        """Recover from an error: the next call is reset()."""


class Expert(Protocol):
    """Somebody to imitate: follows an episode by its actions and says what to do next, None where it has no idea.

    What they lead to it is not told: it keeps a game of its own, or a plan.
    """

    actions_left: int | None  # to the end, where it knows: such an expert plays a task the same way each time

    def reset(self, task: Task) -> str | None:
        """Begin an episode; the first action."""

    def step(self, action: str) -> str | None:
        """Take note that `action` was done; the next action."""


class StepTeacher(Protocol):
    """Somebody who labels the actions of one episode, from its first on, with the full state in view."""

    def judge(self, action: str, raised: bool = False) -> int:
        """Label `action`, which `raised` the score or did not: 1 good, 0 flawed; then take it as done."""

    def best_action(self) -> str | None:
        """Say what it would do now."""


@functools.cache
def load(name: str) -> ModuleType:
    """Import an environment's module. Raises ConfigError, with the nearest name, if there is none, or no whole one."""
    if not name:
        raise ConfigError(f"env.name is empty: say which environment{nearest(name, names())}, or a module of yours")
    path = f"environments.{name}" if name in names() else name
    if path == name and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a module beside the user's own config
    unknown = ConfigError(
        f"env.name={name!r} is neither under environments/ nor an importable module{nearest(name, names())}"
    )
    if not all(part.isidentifier() for part in path.split(".")):
        raise unknown
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):  # it exists, and lacks something itself
            raise
        raise unknown from None
    if missing := [one for one in REQUIRED if not hasattr(module, one)]:
        raise ConfigError(f"env.name={name!r}: {path} is no environment, it lacks {', '.join(missing)} (see envs.py)")
    _check_words(name, module)
    return module


def _check_words(name: str, env: ModuleType) -> None:
    """Check the names of an environment's task types, and the braces in its prompt. Raises ConfigError."""
    for key in ("TASK_TYPES", "HELD_OUT_TYPES"):
        if isinstance(getattr(env, key), str):
            raise ConfigError(
                f"env.name={name!r}: {key} is one text, not several: ({getattr(env, key)!r},) has a comma"
            )
    for one in env.HELD_OUT_TYPES:
        if one not in env.TASK_TYPES:  # levels would train on what they were meant to hold out
            raise ConfigError(f"env.name={name!r}: HELD_OUT_TYPES has {one!r}{nearest(one, env.TASK_TYPES)}")
    for key, known in PROMPT_FIELDS.items():
        for _, found, *_ in string.Formatter().parse(getattr(env.PROMPT, key)):
            if found is not None and found not in known:
                raise ConfigError(f"env.name={name!r}: PROMPT.{key} has {{{found}}}{nearest(found, known)}")


@functools.cache
def names() -> tuple[str, ...]:
    """List the environments that come with the project."""
    found = [module.name for module in pkgutil.iter_modules([str(ROOT / "environments")])]
    return tuple(name for name in found if not name.endswith("_engine"))


def make_expert(env_cfg: EnvConfig, seed: int = 0) -> Expert:
    """Make the environment's expert. Raises ConfigError if it has none."""
    make = getattr(load(env_cfg.name), "make_expert", None)
    if make is None:
        raise ConfigError(
            f"the environment {env_cfg.name} has no make_expert(env_cfg, seed): a cold start needs it, or rows of your "
            "own (sft.data=FILE)"
        )
    return make(env_cfg, seed)


def make_teacher(env_cfg: EnvConfig, task: Task) -> StepTeacher:
    """Make the environment's teacher of one task's episode."""
    check_teacher(env_cfg)
    return load(env_cfg.name).make_teacher(env_cfg, task)


def check_teacher(env_cfg: EnvConfig) -> None:
    """Check that the environment has a teacher. Raises ConfigError."""
    if not hasattr(load(env_cfg.name), "make_teacher"):
        raise ConfigError(
            f"the environment {env_cfg.name} has no make_teacher(env_cfg, task), which labels actions: set "
            "judge.teacher=none or openai, for a cold start sft.variant=vanilla"
        )


def make_pool(env_cfg: EnvConfig, size: int) -> list[Environment]:
    """Make the environments to play in at once. Raises ConfigError if make() gives something else."""
    pool = [load(env_cfg.name).make(env_cfg) for _ in range(size)]
    for env in pool[:1]:
        if missing := [one for one in ("reset", "step", "restart", "threaded") if not hasattr(env, one)]:
            lacks = f"{type(env).__name__}, which lacks {', '.join(missing)} (see envs.Environment)"
            raise ConfigError(f"the environment {env_cfg.name}'s make(env_cfg) gives a {lacks}")
    return pool


# ----------------------------------------------------------------------------------------------------------------------
# Task types, levels and splits


def task_types(env_cfg: EnvConfig) -> tuple[str, ...]:
    """List the task types of levels L0 and L1."""
    return env_cfg.task_types or load(env_cfg.name).TASK_TYPES


def held_out_types(env_cfg: EnvConfig) -> tuple[str, ...]:
    """List the task types that level L2 evaluates on."""
    return env_cfg.held_out_types or load(env_cfg.name).HELD_OUT_TYPES


def trained_types(env_cfg: EnvConfig, level: str = "") -> tuple[str, ...]:
    """List the task types that training at a level (default: env.level) sees."""
    held_out = held_out_types(env_cfg) if (level or env_cfg.level) == "L2" else ()
    return tuple(kind for kind in task_types(env_cfg) if kind not in held_out)


def tasks(env_cfg: EnvConfig, level: str, phase: str) -> list[Task]:
    """List the tasks of a level, "train" or "eval": all of them, in a stable order.

    L0 is new tasks of the kinds trained on, in rooms (or variations) seen in training; L1 the same in unseen ones; L2
    held-out task types, of L1's split. L0 and L1 train on the same tasks, L2 on those of the types it does not hold
    out. Source: GiGPO's and RLVMR's code. Raises ConfigError if the data are missing or a level is left without tasks.
    """
    if phase not in ("train", "eval") or level not in LEVELS:
        raise ValueError(f"no tasks for level {level!r}, phase {phase!r}")
    types = held_out_types(env_cfg) if level == "L2" and phase == "eval" else trained_types(env_cfg, level)
    split = "train" if phase == "train" else SPLITS[level]
    found = [task for task in load(env_cfg.name).tasks(env_cfg, split) if task.type in types]
    assert not (phase == "train" and level == "L2" and {task.type for task in found} & set(held_out_types(env_cfg)))
    if not found:
        where = f" in {env_cfg.data}" if env_cfg.data else ""
        of_types = ", ".join(types) or "none (no type is held out: leave L2 out of eval.levels)"
        raise ConfigError(f"level {level} ({phase}) has no tasks of types {of_types} in split {split!r}{where}")
    if len({task.id for task in found}) < len(found):  # intervals are over tasks
        raise ConfigError(f"the environment {env_cfg.name} has two tasks of the same id in split {split!r}")
    return found


def check(env_cfg: EnvConfig) -> None:
    """Check an environment's options against its module. Raises ConfigError."""
    env = load(env_cfg.name)
    for key in ("task_types", "held_out_types"):
        for one in getattr(env_cfg, key):
            if one not in env.TASK_TYPES:
                raise ConfigError(f"env.{key}: unknown task type {one!r}{nearest(one, env.TASK_TYPES)}")
    if hasattr(env, "check"):
        env.check(env_cfg)


def lineage(checkpoint: str | Path) -> dict[str, str]:
    """Find the task types that a checkpoint's run was trained on, or the runs that it started from: type -> run."""
    types: dict[str, str] = {}
    runs: set[Path] = set()
    while (run := configuration.run_folder(checkpoint)) and run not in runs and (run / "config.yaml").is_file():
        runs.add(run)
        config = configuration.load(run / "config.yaml")
        types = dict.fromkeys(trained_types(config.env), str(run)) | types
        checkpoint = config.model.path
    return types


def check_lineage(config: Config) -> None:
    """Check that training at level L2 does not go on from a run that saw a held-out type. Raises ConfigError."""
    seen = lineage(config.model.path) if config.env.level == "L2" else {}
    if leaked := [kind for kind in held_out_types(config.env) if kind in seen]:
        raise ConfigError(
            f"env.level=L2 holds out {', '.join(leaked)}, on which {seen[leaked[0]]} was trained: start from a cold "
            "start with env.level=L2, or from another model"
        )


# ----------------------------------------------------------------------------------------------------------------------
# To look at


def split_table(env_cfg: EnvConfig) -> str:
    """Count the tasks that each level trains and evaluates on, by task type."""
    used = [level for level in LEVELS if level != "L2" or held_out_types(env_cfg)]
    levels = [(level, phase) for level in used for phase in ("train", "eval")]
    counts = {key: Counter(task.type for task in tasks(env_cfg, *key)) for key in levels}
    lines = [f"{env_cfg.name:<52}" + "".join(f"{level} {phase:<8}" for level, phase in levels)]
    for kind in sorted(set().union(*counts.values())):
        lines.append(f"{kind:<52}" + "".join(f"{counts[key][kind] or '-':<11}" for key in levels))
    return "\n".join([*lines, f"{'all':<52}" + "".join(f"{counts[key].total():<11}" for key in levels)])


def play(env_cfg: EnvConfig, task: Task) -> str:
    """Tell the expert's episode of a task, in full."""
    (env,), expert = make_pool(env_cfg, 1), make_expert(env_cfg)
    observation, action = env.reset(task), expert.reset(task)
    lines = [task.id, f"Task: {observation.task}", "", observation.text]
    while action is not None and not observation.done:
        observation = env.step(action)
        lines += [f"\n> {action}", observation.text]
        action = expert.step(action)
    return "\n".join([*lines, "", f"won: {observation.won}, score: {observation.score}"])


def tables(chosen: Sequence[EnvConfig], gold: bool) -> list[str]:
    """Describe environments: their experts' solutions, or else their splits; of those without data what they lack."""
    texts = []
    for env_cfg in chosen:
        try:
            if not gold:
                texts.append(split_table(env_cfg))
            elif hasattr(load(env_cfg.name), "expert_table"):
                texts.append(load(env_cfg.name).expert_table(env_cfg))
            elif len(chosen) == 1:
                raise ConfigError(f"the environment {env_cfg.name} has no expert_table(env_cfg)")
        except ConfigError as error:
            if len(chosen) == 1:
                raise
            texts.append(f"{env_cfg.name}: {error}")
    return texts


def main() -> None:
    """Print what the command line asks for."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--splits", action="store_true", help="the tasks of each level")
    command.add_argument("--gold", action="store_true", help="how long experts' solutions are (takes minutes)")
    command.add_argument("--play", metavar="NAME", help="the expert's episode of one task of this environment")
    command.add_argument("--env", metavar="NAME", help="for --splits and --gold: this environment alone")
    command.add_argument("--data", default="", help="folder of the environment's data (env.data)")
    command.add_argument("--task", type=int, default=0, help="which task of L0's evaluation list to play")
    arguments = command.parse_args()
    if arguments.splits or arguments.gold:
        chosen = [EnvConfig(name=name, data=arguments.data) for name in ([arguments.env] if arguments.env else names())]
        print("\n".join(tables(chosen, arguments.gold)))
    if arguments.play:
        env_cfg = EnvConfig(name=arguments.play, data=arguments.data)
        found = tasks(env_cfg, "L0", "eval")
        if not 0 <= arguments.task < len(found):
            raise ConfigError(f"--task {arguments.task}: there are tasks 0 to {len(found) - 1}")
        print(play(env_cfg, found[arguments.task]))


if __name__ == "__main__":
    configuration.fail_clearly(main)

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
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import config as configuration
from config import LEVELS, Config, ConfigError, EnvConfig, expand_path, nearest

SPLITS = {"L0": "seen", "L1": "unseen", "L2": "unseen"}  # what a level evaluates on; every level trains on "train"
REQUIRED = ("TASK_TYPES", "HELD_OUT_TYPES", "PROMPT", "tasks", "make")  # of an environment's module
PROMPT_FIELDS = {  # what braces in its PROMPT can name
    "opening": ("task",),
    "task": ("task",),
    "closing": ("actions", "objects", "guided", "reply_format"),
}
TEXTS = (tuple, list)
OBSERVED = {  # an Observation's fields -> their types, and how these are called
    **dict.fromkeys(("text", "task"), (str, "a text")),
    **dict.fromkeys(("actions", "objects"), (TEXTS, "a tuple of texts")),
    **dict.fromkeys(("done", "won", "won_loose"), (bool, "True or False")),
    "score": (int | float, "a number"),
    "available": (bool | None, "True, False or None"),
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
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise unknown from None
        raise ConfigError(f"env.name={name!r}: {path} cannot be imported: {_told(error)}") from error
    if missing := [one for one in REQUIRED if not hasattr(module, one)]:
        raise ConfigError(f"env.name={name!r}: {path} is no environment, it lacks {', '.join(missing)} (see envs.py)")
    _check_words(name, module)
    return module


def _check_words(name: str, env: ModuleType) -> None:
    """Check the names of an environment's task types, and the braces in its prompt. Raises ConfigError."""
    for key in ("TASK_TYPES", "HELD_OUT_TYPES"):
        types = getattr(env, key)
        if isinstance(types, str):
            raise ConfigError(f"env.name={name!r}: {key} is one text, not several: ({types!r},) has a comma")
        if not isinstance(types, Sequence) or not all(isinstance(one, str) for one in types):
            raise ConfigError(f"env.name={name!r}: {key} is {types!r:.80}, not a tuple of texts")
    for one in env.HELD_OUT_TYPES:
        if one not in env.TASK_TYPES:  # levels would train on what they were meant to hold out
            raise ConfigError(f"env.name={name!r}: HELD_OUT_TYPES has {one!r}{nearest(one, env.TASK_TYPES)}")
    for key, known in PROMPT_FIELDS.items():
        if not isinstance(text := getattr(env.PROMPT, key, None), str):
            raise ConfigError(f"env.name={name!r}: PROMPT.{key} is no text (see prompts.EnvPrompt)")
        try:
            fields = [found for _, found, *_ in string.Formatter().parse(text) if found is not None]
        except ValueError as error:
            raise ConfigError(f"env.name={name!r}: PROMPT.{key}: {error}; double a brace that is to be shown") from None
        for found in fields:
            if found not in known:
                raise ConfigError(f"env.name={name!r}: PROMPT.{key} has {{{found}}}{nearest(found, known)}")


@contextmanager
def _blaming(name: str, what: str) -> Iterator[None]:
    """Turn what an environment's own code raises into a line that says whose it is, and where. Raises ConfigError."""
    try:
        yield
    except ConfigError:  # it says so itself
        raise
    except Exception as error:
        raise ConfigError(f"the environment {name}'s {what} fails: {_told(error)}") from error


def _told(error: Exception) -> str:
    """Tell an error of code that is not ours in one line, with the place in that code that it comes from."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    places = [
        f"{Path(one.filename).name}, line {one.lineno}"
        for one in traceback.extract_tb(error.__traceback__)
        if one.filename != __file__ and not one.filename.startswith("<") and "/lib/python" not in one.filename
    ]
    return f"{text} ({places[-1]})" if places else text


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
    what = "make_expert(env_cfg, seed)"
    with _blaming(env_cfg.name, what):
        expert = make(env_cfg, seed)
    return _whole(env_cfg.name, what, expert, Expert, "reset", "step")


def make_teacher(env_cfg: EnvConfig, task: Task) -> StepTeacher:
    """Make the environment's teacher of one task's episode."""
    check_teacher(env_cfg)
    what = "make_teacher(env_cfg, task)"
    with _blaming(env_cfg.name, what):
        teacher = load(env_cfg.name).make_teacher(env_cfg, task)
    return _whole(env_cfg.name, what, teacher, StepTeacher, "judge", "best_action")


def check_teacher(env_cfg: EnvConfig) -> None:
    """Check that the environment has a teacher. Raises ConfigError."""
    if not hasattr(load(env_cfg.name), "make_teacher"):
        raise ConfigError(
            f"the environment {env_cfg.name} has no make_teacher(env_cfg, task), which labels actions: set "
            "judge.teacher=none or openai, for a cold start sft.variant=vanilla"
        )


def make_pool(env_cfg: EnvConfig, size: int) -> list[Environment]:
    """Make the environments to play in at once. Raises ConfigError if make() fails, or gives something else."""
    what = "make(env_cfg)"
    with _blaming(env_cfg.name, what):
        pool = [load(env_cfg.name).make(env_cfg) for _ in range(size)]
    return [_whole(env_cfg.name, what, env, Environment, "reset", "step", "restart", "threaded") for env in pool]


def _whole(name: str, what: str, made: Any, protocol: type, *needed: str) -> Any:
    """Return what an environment has made. Raises ConfigError if it lacks something of the protocol."""
    if missing := [one for one in needed if not hasattr(made, one)]:
        lacks = f"{type(made).__name__}, which lacks {', '.join(missing)} (see envs.{protocol.__name__})"
        raise ConfigError(f"the environment {name}'s {what} gives a {lacks}")
    return made


def check_reset(env_cfg: EnvConfig, found: Sequence[Task]) -> None:
    """Begin an episode of the first of these tasks, or where that fails of two others, and reply without an action.

    Raises ConfigError, with the environment's own words, if all fail: a run would end without an episode.
    """
    failures = []
    for task in {task.id: task for task in (found[0], found[len(found) // 2], found[-1])}.values():
        (env,) = make_pool(env_cfg, 1)
        try:
            with _blaming(env_cfg.name, f"reset(), for instance of task {task.id},"):
                answer = env.reset(task)
            if check_observation(env_cfg.name, answer).done:
                raise ConfigError(f"the environment {env_cfg.name} begins task {task.id} as one that is done")
            with _blaming(env_cfg.name, "step(''), which a reply without an action comes to,"):
                answer = env.step("")
            check_observation(env_cfg.name, answer)
            return
        except ConfigError as error:
            failures.append(error)
    raise failures[0]


def check_observation(name: str, answer: Observation) -> Observation:
    """Return what an environment answered. Raises ConfigError if it is no Observation, or has wrong types."""
    for key, (kind, wanted) in OBSERVED.items():
        if not hasattr(answer, key):
            raise ConfigError(f"the environment {name} gives {answer!r:.80}, not an envs.Observation")
        value = getattr(answer, key)
        if not isinstance(value, kind) or (kind is TEXTS and not all(isinstance(one, str) for one in value)):
            raise ConfigError(f"the environment {name} gives an Observation with {key}={value!r:.80}, not {wanted}")
    return answer


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
    found = [task for task in _listed(env_cfg, split) if task.type in types]
    assert not (phase == "train" and level == "L2" and {task.type for task in found} & set(held_out_types(env_cfg)))
    if not found:
        where = f" in {env_cfg.data}" if env_cfg.data else ""
        of_types = ", ".join(types) or "none (no type is held out: leave L2 out of eval.levels)"
        raise ConfigError(f"level {level} ({phase}) has no tasks of types {of_types} in split {split!r}{where}")
    if len({task.id for task in found}) < len(found):  # intervals are over tasks
        raise ConfigError(f"the environment {env_cfg.name} has two tasks of the same id in split {split!r}")
    return found


def _listed(env_cfg: EnvConfig, split: str) -> list[Task]:
    """List what an environment lists as a split. Raises ConfigError if that fails, or gives something else."""
    env, keys = load(env_cfg.name), [field.name for field in fields(Task)]
    with _blaming(env_cfg.name, f"tasks(env_cfg, {split!r})"):
        listed = list(env.tasks(env_cfg, split))
    for task in listed:
        if not is_dataclass(task) or not all(isinstance(getattr(task, key, None), str) for key in keys):
            raise ConfigError(f"the environment {env_cfg.name} lists {task!r:.80} in split {split!r}, not an envs.Task")
        if task.type not in env.TASK_TYPES:
            wrong = f"{task.type!r}, which TASK_TYPES has not{nearest(task.type, env.TASK_TYPES)}"
            raise ConfigError(f"the environment {env_cfg.name} lists task {task.id} of type {wrong}")
    return listed


def check(env_cfg: EnvConfig) -> None:
    """Check an environment's options against its module. Raises ConfigError."""
    env = load(env_cfg.name)
    for key in ("task_types", "held_out_types"):
        for one in getattr(env_cfg, key):
            if one not in env.TASK_TYPES:
                raise ConfigError(f"env.{key}: unknown task type {one!r}{nearest(one, env.TASK_TYPES)}")
    if hasattr(env, "check"):
        with _blaming(env_cfg.name, "check(env_cfg)"):
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
    data = expand_path(arguments.data, "--data")
    if arguments.splits or arguments.gold:
        chosen = [EnvConfig(name=name, data=data) for name in ([arguments.env] if arguments.env else names())]
        print("\n".join(tables(chosen, arguments.gold)))
    if arguments.play:
        env_cfg = EnvConfig(name=arguments.play, data=data)
        found = tasks(env_cfg, "L0", "eval")
        if not 0 <= arguments.task < len(found):
            raise ConfigError(f"--task {arguments.task}: there are tasks 0 to {len(found) - 1}")
        print(play(env_cfg, found[arguments.task]))


if __name__ == "__main__":
    configuration.fail_clearly(main)

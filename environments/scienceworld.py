"""ScienceWorld: experiments of the elementary curriculum in text. Its tasks, environment, expert, teacher, and words.

The simulator is ScienceWorld's own (scienceworld_engine.py); it needs Java.  A task's id is "task type/variation".  On
offer are the simulator's templates, with OBJ for an object, and the objects in reach.

Departures from published code: success is strict, a score of 100; the published rule (over, and a score above 0:
waiting wins, too) is told as `won_loose` and never trained on.  An action is available if the simulator understands it,
not if it is in the list of all valid ones, which takes ten times as long as a step.  The prompt leaves out the example
action, which models come to repeat.  The expert follows the simulator's gold path.  The thoughts and critiques of a
cold start are fixed forms; the paper's come from a language model.
"""

from __future__ import annotations

from collections import Counter

from tqdm import tqdm

from config import ConfigError, EnvConfig, nearest
from environments.scienceworld_engine import REFUSALS, Simulator, State, gold_path, java, machine
from envs import Observation, Task
from prompts import EnvPrompt, PromptContext, first_sentence

VARIATIONS = {  # by task type, in the order of their published numbers 0 to 28; 29, use-thermometer, is in no split
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
}
TASK_TYPES = tuple(VARIATIONS)
HELD_OUT_TYPES = tuple(TASK_TYPES[index] for index in (1, 4, 8, 11, 13, 16, 18, 21, 24, 28))  # as published
SIMPLIFICATIONS = (
    "easy",
    "teleportAction",
    "openDoors",
    "openContainers",
    "selfWateringFlowerPots",
    "noElectricalAction",
)
MAX_MOVES = 100  # simulated time after which an episode is over, as published; a `wait` takes 11
PACKAGES = ("scienceworld",)  # whose versions a run records

PROMPT = EnvPrompt(
    opening="You are an expert agent operating in the ScienceWorld environment, which is a text-based virtual "
    "environment centered around accomplishing tasks from the elementary science curriculum.\n",
    task="Your current task is: {task}\n",
    closing="Here are the actions you may take:\nCurrent available actions: [{actions}], where OBJ is one of the "
    "objects [{objects}].\nNow it's your turn to take an action. You should first reason step-by-step about the "
    "current situation. {reply_format}",
    choice="an appropriate action for the current step",
    judge_setting="SciWorld, a science environment",
    judge_examples="'determine if metal fork is electrically conductive'",
    guideline_setting="ALFWorld or ScienceWorld",
)


def check(env_cfg: EnvConfig) -> None:
    """Check the simulator's presets.

    Raises ConfigError for unknown ones, for those that the simulator takes alone, and for one without a solution.
    """
    types = (*(env_cfg.task_types or TASK_TYPES), *(env_cfg.held_out_types or HELD_OUT_TYPES))
    presets = env_cfg.simplification.split(",") if env_cfg.simplification else []
    for preset in presets:
        if preset not in SIMPLIFICATIONS:
            raise ConfigError(f"env.simplification: unknown preset {preset!r}{nearest(preset, SIMPLIFICATIONS)}")
    if "easy" in presets and len(presets) > 1:
        raise ConfigError(
            f"env.simplification={env_cfg.simplification}: easy stands for teleportAction, openDoors, "
            "selfWateringFlowerPots and, where a task needs no electricity, noElectricalAction; the simulator takes it "
            "alone: leave it alone, or name presets in its place"
        )
    electric = [name for name in types if "power-component" in name or "conductivity" in name]
    if "noElectricalAction" in presets and electric:
        raise ConfigError(
            "env.simplification=noElectricalAction leaves power-component and test-conductivity without a "
            "solution; name other env.task_types and env.held_out_types"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


def tasks(env_cfg: EnvConfig, split: str) -> list[Task]:
    """List the tasks of a split, of all types. Raises ConfigError without Java."""
    java()
    return [
        Task("scienceworld", name, f"{name}/{variation}", split)
        for name in sorted(TASK_TYPES)
        for variation in variations(name)[split]
    ]


def variations(name: str) -> dict[str, range]:
    """Divide a task type's variations into splits as the simulator does (train, dev, test): 1/2, 1/4, the rest."""
    count = VARIATIONS[name]
    return {
        "train": range(count // 4 * 2),
        "seen": range(count // 4 * 2, count // 4 * 3),
        "unseen": range(count // 4 * 3, count),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Playing


class ScienceWorld:
    """One environment: the simulator, in a Java machine that it shares with others."""

    threaded = True  # a step takes 10 ms or more, in Java

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg
        self.machine = machine(env_cfg)
        self.simulator: Simulator | None = None

    def reset(self, task: Task) -> Observation:
        """Begin an episode."""
        if self.simulator is None:
            self.simulator = Simulator(self.machine)
        name, _, variation = task.id.rpartition("/")
        return self._observe(self.simulator.load(name, int(variation), self.env_cfg.simplification))

    def step(self, action: str) -> Observation:
        """Do an action."""
        return self._observe(self.simulator.step(action))

    def restart(self) -> None:
        """Drop the simulator: the next one starts the machine anew if it has died."""
        self.simulator = None

    def _observe(self, state: State) -> Observation:
        won = state.score == 100
        done = won or state.complete or state.score < 0 or state.moves > MAX_MOVES
        return Observation(
            text=state.text,
            actions=self.simulator.templates,
            task=self.simulator.goal,
            score=max(0, state.score) / 100,
            done=done,
            won=won,
            objects=state.objects,
            available=state.accepted,
            won_loose=done and state.score > 0,
        )


def make(env_cfg: EnvConfig) -> ScienceWorld:
    """Make an environment."""
    return ScienceWorld(env_cfg)


class GoldExpert:
    """The simulator's own solution, action by action. It does not recover from other actions."""

    def __init__(self, env_cfg: EnvConfig) -> None:
        self.env_cfg = env_cfg
        self.left: list[str] = []

    @property
    def actions_left(self) -> int:
        """Count the actions that are left of the solution."""
        return len(self.left)

    def reset(self, task: Task) -> str | None:
        """Begin an episode; the first action."""
        name, _, variation = task.id.rpartition("/")
        self.left = gold_path(self.env_cfg, name, int(variation))
        return next(iter(self.left), None)

    def step(self, action: str) -> str | None:
        """Take note that `action` was done; the next action, the same again if that was another, None at the end."""
        if self.left and action == self.left[0]:
            self.left = self.left[1:]
        return next(iter(self.left), None)


def make_expert(env_cfg: EnvConfig, seed: int) -> GoldExpert:
    """Make an expert; nothing of it is drawn at random."""
    return GoldExpert(env_cfg)


class GoldTeacher:
    """Judges actions of one task by the simulator's own solution.

    Good: the next action of the gold path, after those of it that were already taken; or one that raised the score.
    """

    def __init__(self, env_cfg: EnvConfig, task: Task) -> None:
        self.expert = GoldExpert(env_cfg)
        self.next = self.expert.reset(task)

    def judge(self, action: str, raised: bool = False) -> int:
        """Label `action`, which `raised` the score or did not, as the next one."""
        good = raised or action == self.next
        self.next = self.expert.step(action)
        return int(good)

    def best_action(self) -> str | None:
        """Return the next action of the gold path."""
        return self.next


def make_teacher(env_cfg: EnvConfig, task: Task) -> GoldTeacher:
    """Make the teacher of one task's episode."""
    return GoldTeacher(env_cfg, task)


def expert_table(env_cfg: EnvConfig) -> str:
    """Tell of the gold path of each task type's first variation: its length in every split against env.max_steps, and
    the score and the simulated time that it reaches in training's."""
    splits = ("train", "seen", "unseen")
    lines = [f"{'actions in the first gold path':<52}" + "".join(f"{split:<8}" for split in splits) + "score   moves"]
    longer: Counter[str] = Counter()
    for name in tqdm(env_cfg.task_types or TASK_TYPES, desc="gold paths", unit=" types"):
        first = {split: variations(name)[split][0] for split in splits}
        paths = {split: gold_path(env_cfg, name, variation) for split, variation in first.items()}
        for split, path in paths.items():
            if len(path) > env_cfg.max_steps:
                longer.update({split: 1, f"all {split}": len(variations(name)[split])})
        simulator = Simulator(machine(env_cfg))
        state = simulator.load(name, first["train"], env_cfg.simplification)
        for action in paths["train"]:
            state = simulator.step(action)
        lengths = "".join(f"{len(path):<8}" for path in paths.values())
        lines.append(f"{name:<52}{lengths}{state.score:<8}{state.moves}")
    limit = f"types longer than env.max_steps={env_cfg.max_steps}"
    for what, prefix in ((limit, ""), ("tasks of these types", "all ")):
        lines.append(f"{what:<52}" + "".join(f"{longer[prefix + split]:<8}" for split in splits))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The words of a cold start

ADVICE = {  # by the verb
    ("focus",): "Focus only on what the task names, once it is in view.",
    ("go", "teleport"): "Go to the room where what the task needs can be found.",
    ("wait", "wait1"): "Wait only where something has to happen by itself.",
    ("look", "inventory", "task", "read", "examine"): "Avoid looking again at what is already known.",
    (): "Bring together what the task needs, one step after the other.",
}


class ScienceWorldTemplates:
    """What a cold start teaches to say."""

    advice = tuple(ADVICE.values())

    def thought(self, ctx: PromptContext, action: str) -> str:
        """Say the task, what was done last and what came of it, and what to do now.

        Example: "My task is to boil water. Last I did go kitchen, and: You move to the kitchen. Now I should look
        around."
        """
        last = "I begin."
        if ctx.history:
            last = f"Last I did {ctx.history[-1][1]}, and: {first_sentence(ctx.observation)}"
        return f"My task is to {_goal(ctx)}. {last} Now I should {action}."

    def plan(self, ctx: PromptContext) -> str:
        """Say the goal in one sentence."""
        return f"Plan: {_goal(ctx)}."

    def refused(self, ctx: PromptContext) -> bool:
        """Say whether the observation tells that the last action could not be done."""
        return ctx.observation.startswith(REFUSALS)

    def explores(self, ctx: PromptContext, action: str) -> bool:
        """Say whether the action shows something new: RLVMR's explore tag."""
        return action.startswith(("go ", "open ", "teleport ", "look", "focus "))

    def reason(self, ctx: PromptContext, action: str, verdict: int) -> tuple[str, str]:
        """Say why the verdict on an action, and the advice that goes with it."""
        verb = action.split(" ")[0]
        advice = next(advice for verbs, advice in ADVICE.items() if not verbs or verb in verbs)
        return "It is a step towards the goal." if verdict else "It does not bring the goal closer.", advice


TEMPLATES = ScienceWorldTemplates()


def _goal(ctx: PromptContext) -> str:
    return ctx.task.removeprefix("Your task is to ").split(". ")[0].rstrip(".")

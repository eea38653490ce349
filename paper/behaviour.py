"""Figures of what checkpoints do: repeated actions, consistency of good and flawed ones, steps, success, judging.

Measures of figures.py.  Those of a Subject play or sample with its weights; those of a run read its files alone.
Every number is [estimate, low, high] with a 95 % bootstrap over games, or over the groups of training.

Decisions where the paper is silent: a reply without a well-formed action counts as the action "<invalid>"; consistency
is the share of 10 fresh replies to the same prompt that take the same action, the one on record left out; Figure 1 is
drawn over each checkpoint's own repeats (the paper's reading, which rises when only the stubborn ones are left) and
over those of the model that the run started from; Figure 5's bins are drawn by one set of replies of that model and its
first point by another, so that regression to the mean is not read as learning.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import envs
import judge
import prompts
from config import Config, newest_evaluation
from engine import Engine, SamplingParams, stable_seed
from evaluate import EVALUATION
from logger import repeats
from rollout import Episode, Step, play

DRAWS = 10  # fresh replies to a prompt
PROMPTS = 100  # the most of a panel's that are replied to afresh
HIGH = 0.5  # what the paper calls high consistency: 5 of 10
BINS = (0.0, 0.2, 0.5, 0.8, 1.01)  # of Figure 5
EARLY = 10  # first steps of an episode, which won and lost ones both have
RESAMPLES = 1000
REPEATS = ("state_action", "consecutive", "action_any", "admissible")  # ways of counting them

Numbers = dict[str, object]


class Missing(Exception):
    """Why a figure cannot be made of what was played."""


@dataclass
class Subject:
    """A checkpoint that is being measured; its weights are those of the engine."""

    engine: Engine
    config: Config
    own: list[Episode]  # played by it
    start: list[Episode]  # by the model that its run started from
    middle: list[Episode]  # by its run's checkpoint halfway
    labelled: list[judge.Question]  # about steps of `start`
    folder: str = ""  # of its weights
    reference: str = ""  # the folder of the model that layers are compared with
    questions: tuple[tuple[str, str | None], ...] = ()  # of another domain, with answers

    @property
    def panel(self) -> list[judge.Question]:
        """Return the labelled steps, half of them good. Raises Missing if there are none."""
        if not self.labelled:
            raise Missing("no labelled steps of both classes; more --games, or another --teacher, may find some")
        return self.labelled

    def step_of(self, question: judge.Question) -> Step:
        """Find the step that a question of the panel is about."""
        played = {(episode.group, episode.member): episode for episode in self.start}
        return played[question.group, question.member].steps[question.index]

    def sampling_params(self, number: int, salt: int) -> SamplingParams:
        """Say how the `number`th of a figure's replies is sampled."""
        rollout = self.config.rollout
        seed = stable_seed(self.config.seed, EVALUATION, salt, number)
        return SamplingParams(rollout.temperature, rollout.max_response_tokens, seed)


def play_panel(engine: Engine, config: Config, level: str = "L0") -> list[Episode]:
    """Play config.eval.games held-out games, each twice, at the training temperature and without guidelines."""
    tasks = envs.tasks(config.env, level, "eval")
    tasks = random.Random(0).sample(tasks, min(config.eval.games, len(tasks)))
    env_pool = envs.make_pool(config.env, min(config.rollout.concurrency, 2 * len(tasks)))
    return play(engine, env_pool, dict(enumerate(tasks)), config, iteration=EVALUATION, members=2)


def labelled_panel(episodes: Sequence[Episode], config: Config) -> list[judge.Question]:
    """Draw labelled steps, half of them good, of each game's first episode; a question's group is its game.

    The teacher sees as many steps per episode as in training, so that the mix of labels is that which is trained on.
    """
    first = [episode for episode in episodes if episode.member == 0]
    shown = config.judge.teacher_steps * len(first) // (config.rollout.groups * config.rollout.group_size)
    judge.label_steps(first, config, random.Random(0), budget=shown)
    return judge.sample_questions(first, config, config.judge.questions, random.Random(0))


def interval(statistic: Callable[[np.ndarray], float], games: np.ndarray) -> list[float]:
    """Compute [estimate, low, high]: 95 % of bootstrap resamples of the games.

    `statistic` takes how often each item counts. A resample without items of a class, for which it is nan, is left out.
    """
    rng = np.random.default_rng(0)
    _, game = np.unique(games, return_inverse=True)
    count = int(game.max()) + 1
    draws = [np.bincount(rng.integers(count, size=count), minlength=count)[game] for _ in range(RESAMPLES)]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = [value for draw in draws if not math.isnan(value := statistic(draw))]
        estimate = statistic(np.ones(len(game), dtype=int))
    low, high = np.percentile(values, [2.5, 97.5]) if values else (math.nan, math.nan)
    return [float(estimate), float(low), float(high)]


def mean_of(values: Sequence[float], games: Sequence[int]) -> list[float]:
    """Compute the mean of values, with its interval over games; nan where there are none."""
    value_N = np.asarray(values, dtype=float)
    if not len(value_N):
        return [math.nan] * 3
    return interval(lambda times_N: (times_N * value_N).sum() / times_N.sum(), np.asarray(games))


# ----------------------------------------------------------------------------------------------------------------------
# Repeated actions


def find_repeats(episode: Episode, how: str = "state_action", env: str = "") -> list[bool]:
    """Tell for each step whether it repeats an earlier one of its episode, by one of REPEATS.

    That is the same observation and action (as GiGPO's anchor states), the action just taken, any action taken before,
    or the same offer of actions and action. "admissible" reads the offer from the prompts of the environment `env`; it
    alone sees the first retry after "Nothing happens.". Source: paper, Figures 1 and 2, which do not say what counts.
    """
    if how == "consecutive":
        actions = [step.action for step in episode.steps]
        return [index > 0 and action == actions[index - 1] for index, action in enumerate(actions)]
    keys = {
        "state_action": lambda step: (step.observation, step.action),
        "action_any": lambda step: step.action,
        "admissible": lambda step: (offered(step.prompt, env), step.action),
    }
    return repeats(episode, keys[how])


def offered(prompt: str, env: str) -> tuple[str, ...]:
    """Read back what the policy's prompt closes with: the actions on offer, as it lists them, then the other fields of
    the environment's PROMPT.closing in their order; () for another prompt."""
    closing = re.sub(r"\\\{\w+\\\}", "(.*?)", re.escape(envs.load(env).PROMPT.closing))
    found = re.fullmatch(f".*{closing}", prompt, re.DOTALL)
    return found.groups() if found else ()


def resample(subject: Subject, steps: Sequence[Step], salt: int) -> list[list[str]]:
    """Sample the actions of DRAWS fresh replies to each step's prompt."""
    config, policy = subject.config, subject.engine.policy
    prompt_ids = [step.prompt_ids for step in steps for _ in range(DRAWS)]
    params = [subject.sampling_params(number, salt) for number in range(len(prompt_ids))]
    actions = []
    for completion in subject.engine.generate(prompt_ids, params):
        reply = prompts.parse_reply(policy.chat.reply(completion.ids), config.prompt_style, config.env.name)
        actions.append(reply.action if reply.valid else "<invalid>")
    return [actions[first : first + DRAWS] for first in range(0, len(actions), DRAWS)]


def consistencies(subject: Subject, steps: Sequence[Step], salt: int) -> np.ndarray:
    """Measure the share of fresh replies that take each step's action: float64 [N]."""
    drawn = resample(subject, steps, salt)
    return np.array([actions.count(step.action) / DRAWS for step, actions in zip(steps, drawn, strict=True)])


def repeat_consistency(subject: Subject, ways: Sequence[str] = REPEATS) -> Numbers:
    """Measure Figure 1: how consistently repeated actions are repeated, those of the checkpoint and of the panel."""
    own = _consistency_of_repeats(subject, subject.own, ways)
    panel = own if subject.start is subject.own else _consistency_of_repeats(subject, subject.start, ways)
    return {f"{name} {key}": value for name, found in (("own", own), ("panel", panel)) for key, value in found.items()}


def _consistency_of_repeats(subject: Subject, episodes: Sequence[Episode], ways: Sequence[str]) -> Numbers:
    """Measure, of up to PROMPTS repeats by each way, the mean consistency of the repeated action, the share of high
    ones, and that of whichever action is taken most. The ways of counting share their steps where they can."""
    every = [(episode, index) for episode in episodes for index in range(len(episode.steps))]
    random.Random(0).shuffle(every)
    repeated_steps: dict[str, list[tuple[int, Step]]] = {}
    for how in ways:
        repeated = {id(episode): find_repeats(episode, how, subject.config.env.name) for episode in episodes}
        chosen = [(episode.group, episode.steps[i]) for episode, i in every if repeated[id(episode)][i]]
        repeated_steps[how] = chosen[: min(PROMPTS, subject.config.judge.questions)]
    steps = list({id(step): step for chosen in repeated_steps.values() for _, step in chosen}.values())
    actions = {id(step): taken for step, taken in zip(steps, resample(subject, steps, salt=1), strict=True)}
    numbers: Numbers = {}
    for how, chosen in repeated_steps.items():
        suffix = "" if how == "state_action" else f" by {how}"
        games = [game for game, _ in chosen]
        share_N = np.array([actions[id(step)].count(step.action) / DRAWS for _, step in chosen])
        modal_N = [max(Counter(actions[id(step)]).values()) / DRAWS for _, step in chosen]
        numbers[f"repeats{suffix}"] = len(chosen)
        numbers[f"consistency{suffix}"] = mean_of(share_N, games)
        numbers[f"share of high consistency{suffix}"] = mean_of(share_N >= HIGH, games)
        numbers[f"modal consistency{suffix}"] = mean_of(modal_N, games)
    return numbers


# ----------------------------------------------------------------------------------------------------------------------
# Good and flawed actions, steps, judging


def consistency_by_label(subject: Subject, panels: Sequence[str] = ("start", "halfway")) -> Numbers:
    """Measure Figure 5: consistency of good and flawed actions of the start and of the checkpoint halfway, binned by
    what it was at the start of each panel's first measurement."""
    numbers: Numbers = {"judge": subject.config.judge.teacher}
    for name in panels:
        episodes = {"start": subject.start, "halfway": subject.middle}[name]
        steps, games_N, labels = teacher_verdicts(episodes, subject.config)
        share_N = consistencies(subject, steps, salt=3)
        key = f"{name} panel"
        numbers |= {
            f"{key} steps": len(steps),
            f"{key} consistency": share_N.tolist(),
            f"{key} games": games_N.tolist(),
        }
        for suffix, label_N in labels.items():
            numbers[f"{key} labels{suffix}"] = label_N.tolist()
            numbers[f"{key} dropped{suffix}"] = int((label_N < 0).sum())
            for label, kind in ((1, "good"), (0, "flawed")):
                chosen_N = label_N == label
                share_C, games_C = share_N[chosen_N], games_N[chosen_N]
                numbers[f"{key} {kind}{suffix}"] = mean_of(share_C, games_C)
                numbers[f"{key} {kind} of high consistency{suffix}"] = mean_of(share_C >= HIGH, games_C)
        if name == "start" and subject.own is subject.start:  # another set of replies, to bin by
            numbers["bins"] = np.digitize(consistencies(subject, steps, salt=4), BINS[1:-1]).tolist()
    return numbers


def bin_names(kind: str) -> list[str]:
    """Name Figure 5's bins of good or of flawed actions."""
    return [f"{kind}, {low:.1f} to {min(high, 1.0):.1f}" for low, high in zip(BINS, BINS[1:], strict=False)]


def add_bins(records: Sequence[Numbers]) -> None:
    """Add Figure 5's curves to every record: consistency of the start's panel by label and by its bin at the start."""
    bins_of = {record["start"]: np.array(record["bins"]) for record in records if "bins" in record}
    for record in records:
        bin_N = bins_of[record["start"]]
        share_N, label_N, games_N = (
            np.array(record[f"start panel {name}"]) for name in ("consistency", "labels", "games")
        )
        for label, kind in ((1, "good"), (0, "flawed")):
            for number, key in enumerate(bin_names(kind)):
                chosen_N = (label_N == label) & (bin_N == number)
                record[key], record[f"{key} steps"] = mean_of(share_N[chosen_N], games_N[chosen_N]), int(chosen_N.sum())


def teacher_verdicts(
    episodes: Sequence[Episode], config: Config
) -> tuple[list[Step], np.ndarray, dict[str, np.ndarray]]:
    """Draw steps at random; return them, their games [N] and the teacher's verdicts [N] by suffix, -1 for none.

    Where it votes, those of the majority come, too, at no further cost: its answers are kept.
    """
    every = [(episode, index) for episode in episodes for index in range(len(episode.steps))]
    drawn = random.Random(0).sample(every, min(PROMPTS, config.judge.questions, len(every)))
    steps = [episode.steps[index] for episode, index in drawn]
    verdicts: dict[str, list[int | None]] = {}
    if config.judge.teacher == "openai":
        teacher = judge.make_api_teacher(config, 1)
        for suffix, agreement in (("", config.judge.agreement), (" by majority", "majority")):
            voting = dataclasses.replace(config, judge=dataclasses.replace(config.judge, agreement=agreement))
            verdicts[suffix] = judge.teacher_labels(teacher, steps, voting)
    else:
        known = {id(episode): judge.expert_labels(config.env, episode) for episode, _ in drawn}
        verdicts[""] = [known[id(episode)][index] for episode, index in drawn]
    labels = {suffix: np.array([-1 if one is None else one for one in found]) for suffix, found in verdicts.items()}
    return steps, np.array([episode.group for episode, _ in drawn]), labels


def num_actions(subject: Subject) -> Numbers:
    """Measure Figure 10a: steps per episode of held-out games, of all (a lost one has as many as allowed) and won."""
    won = [episode for episode in subject.own if episode.won]
    return {
        name: mean_of([len(episode.steps) for episode in played], [episode.group for episode in played])
        for name, played in (("steps, all episodes", subject.own), ("steps, won episodes", won))
    } | {"success": mean_of([e.won for e in subject.own], [e.group for e in subject.own]), "won episodes": len(won)}


def held_out_judge(subject: Subject) -> Numbers:
    """Measure how well the policy judges the panel's steps, and its own of the same games. Chance is 0.5."""
    numbers = accuracies(subject, subject.panel)
    return numbers | accuracies(subject, labelled_panel(subject.own, subject.config), " on own steps")


def accuracies(subject: Subject, questions: Sequence[judge.Question], name: str = "") -> Numbers:
    """Ask the policy; measure balanced accuracy, and that by class. An answer without a verdict is wrong."""
    asked = [dataclasses.replace(question, answers=[], critiques=[]) for question in questions]
    judge.ask(subject.engine, asked, subject.config, EVALUATION)
    answered = [question for question in asked if question.answers]
    classes = {"balanced accuracy": (0, 1), "accuracy of good": (1,), "accuracy of flawed": (0,)}
    counts: Numbers = {f"steps{name}": len(answered), f"too long{name}": len(asked) - len(answered)}
    if not answered:
        return counts | {key + name: [math.nan] * 3 for key in classes}
    right_Q = np.array([np.mean([answer.reward for answer in question.answers]) for question in answered])
    label_Q = np.array([question.label for question in answered])
    games_Q = np.array([question.group for question in answered])

    def accuracy(times_Q: np.ndarray, classes: Sequence[int]) -> float:
        counted = [times_Q * (label_Q == cls) for cls in classes]
        return float(np.mean([(right_Q * count_Q).sum() / count_Q.sum() for count_Q in counted]))

    return counts | {
        key + name: interval(functools.partial(accuracy, classes=chosen), games_Q) for key, chosen in classes.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Of runs' files


def load_episodes(file: Path) -> list[Episode]:
    """Read the episodes of one iteration, without prompts and tokens. Raises ValueError for a file that is torn."""
    with gzip.open(file, "rt", encoding="utf-8") as text:
        lines = [json.loads(line) for line in text]
    blank = {"prompt_ids": [], "response_ids": [], "logprobs": [], "prompt": ""}
    episodes = []
    for line in lines[:-1]:  # the last holds the questions
        steps = [Step(**step | blank) for step in line["steps"]]
        episodes.append(Episode(**line | {"task": envs.Task(**line["task"]), "steps": steps}))
    return episodes


def repeat_rate(run: Path) -> Numbers:
    """Measure Figure 2: repeated steps in won and lost episodes of training, counted in several ways; intervals over
    its groups.

    The last number of each way is Lemma 3.1's sign test: the covariance of success and repeats within a group.
    """
    files = sorted((run / "episodes").glob("*.jsonl.gz"))
    played = [(file.name.split(".")[0], episode) for file in files for episode in load_episodes(file)]
    groups_E = np.unique([f"{stem} {episode.group}" for stem, episode in played], return_inverse=True)[1]
    won_E = np.array([episode.won for _, episode in played])
    steps_E = np.array([len(episode.steps) for _, episode in played])
    numbers: Numbers = {"episodes": len(played), "won episodes": int(won_E.sum()), "iterations": len(files)}
    for how in ("state_action", "consecutive", "action_any"):  # without prompts no "admissible"
        flags = [find_repeats(episode, how) for _, episode in played]
        count_E, early_E = np.array([(sum(one), sum(one[:EARLY])) for one in flags]).T
        counts = {
            "per step": (count_E, steps_E),
            "per step, mean of episodes": (count_E / steps_E, np.ones_like(steps_E)),
            f"per step, first {EARLY} steps": (early_E, steps_E.clip(max=EARLY)),
            "episodes with any": (count_E > 0, np.ones_like(steps_E)),
            "per episode": (count_E, np.ones_like(steps_E)),
        }
        for name, (top_E, bottom_E) in counts.items():
            for kind, chosen_E in (("won", won_E), ("lost", ~won_E)):
                numbers[f"{how} {name}, {kind}"] = interval(
                    lambda times, a=top_E * chosen_E, b=bottom_E * chosen_E: float(
                        (times * a).sum() / (times * b).sum()
                    ),
                    groups_E,
                )
        centred_E = won_E - group_means(won_E, groups_E)
        numbers[f"{how} covariance with success"] = mean_of(centred_E * count_E, groups_E)
    by_iteration = defaultdict(lambda: [[0, 0], [0, 0]])  # iteration -> lost, won -> repeats, steps
    for stem, episode in played:
        cell = by_iteration[int(stem)][episode.won]
        cell[0], cell[1] = cell[0] + sum(repeats(episode)), cell[1] + len(episode.steps)
    for kind, won in (("won", 1), ("lost", 0)):
        curve = [[at, cells[won][0] / cells[won][1]] for at, cells in sorted(by_iteration.items()) if cells[won][1]]
        numbers[f"curve, {kind}"] = curve
    return numbers


def group_means(value_E: np.ndarray, groups_E: np.ndarray) -> np.ndarray:
    """Compute each item's mean over its group: float64 [E]."""
    sums, sizes = np.bincount(groups_E, weights=value_E), np.bincount(groups_E)
    return (sums / sizes)[groups_E]


def learning_curve(run: Path) -> Numbers:
    """Read Figure 11: success against iterations, hours and environment steps; and Table 4: seconds per iteration."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds, steps = (np.cumsum([line[key] for line in lines]) for key in ("time/total", "rollout/steps"))
    levels = sorted({key for line in lines for key in line if key.startswith("eval/")})
    numbers: Numbers = {
        "iterations": [line["iteration"] + 1 for line in lines],
        "hours": (seconds / 3600).tolist(),
        "environment steps": steps.tolist(),
        "success": [line["rollout/success"] for line in lines],
        "seconds per iteration": float(np.mean([line["time/total"] for line in lines])),
        "seconds of the judge": float(np.mean([line.get("time/judge", 0.0) for line in lines])),
    }
    for level in levels:
        numbers[level] = [[line["iteration"] + 1, line[level]] for line in lines if level in line]
    return numbers


def final_success(run: Path) -> Numbers:
    """Read Figure 7: what evaluate.py found of the run, by level; intervals over games."""
    found = json.loads(newest_evaluation(run).read_text())
    return {level: [one["success"], one["low"], one["high"]] for level, one in found["levels"].items()}

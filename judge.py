"""GCD, generative classification disentanglement (paper, section 4): the actor learns to judge its own actions.

Each iteration some steps of the episodes become questions "was this a good action?".  Labels come from rules on the
episode (paper 4.1) and, for the steps they leave open, from a teacher.  The actor answers every question several times;
an answer whose verdict matches the label is rewarded, and the answers are trained on with the same group-relative
policy loss as the actions.  The advice sentences of the answers are distilled into golden rules for the actor's prompt.

Decisions where the paper is silent: "the observation occurs in following steps" means equal text later in the same
episode; questions are always half good and half flawed, so an iteration with few good steps asks less; an answer
without a verdict earns 0; without a language model to distil them, a theme's rule is the medoid of its advice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

import envs
import games
import prompts
from config import Config, EnvConfig, GuidelinesConfig, JudgeConfig
from rollout import Engine, Episode, Sampling, Step, cut_off, stable_seed
from teacher import Teacher


def label(episode: Episode) -> list[int | None]:
    """The paper's rule labels, one per step: 0 if its observation occurs again later in the episode (the action led
    nowhere), 1 for the last step of a won episode, else None. Source: paper, section 4.1; anchor text as in GiGPO."""
    labels: list[int | None] = []
    later: set[str] = set()
    for index, step in reversed(list(enumerate(episode.steps))):
        last = index == len(episode.steps) - 1
        labels.append(0 if step.observation in later else 1 if last and episode.won else None)
        later.add(step.observation)
    return labels[::-1]


def judge_reward(critique: prompts.Critique, label: int) -> float:
    """1.0 if the verdict equals the label, else (also without a verdict) 0.0."""
    return float(critique.score == label)


# ----------------------------------------------------------------------------------------------------------------------
# The offline teacher


class ExpertTeacher:
    """Judges actions of one ALFWorld game with the full state in view.

    Good: the action shortens the oracle's remaining plan; or, while no object of the task has been seen, it goes for
    the first time to a place that could hold one, or opens it. Everything else is flawed.
    """

    def __init__(self, env_cfg: EnvConfig, task: envs.Task) -> None:
        self.play = games.Play(envs.parsed_game(env_cfg, task))
        self.visited: set[int] = set()
        self.searched: set[int] = set()  # visited and open to the eye

    def judge(self, action: str, raised: bool = False) -> int:
        """The label of `action` in the current state, which it then carries out. ALFWorld has no score to be raised."""
        play, game = self.play, self.play.game
        admissible = action in play.actions and action != "help"
        before = games.distance(play)
        known = play.held in game.goal_objects or any(
            play.contents[place] & game.goal_objects - self._placed() for place in self.searched
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
            play.step(action)
        after = games.distance(play)
        self.visited |= set(play.here)
        self.searched |= {place for place in play.here if play.accessible(place)}
        nearer = play.won or (before is not None and after is not None and after < before)
        return int(admissible and (nearer or explores))

    def better(self) -> str | None:
        """What the teacher would do now: the oracle's next action."""
        return next(iter(games.solve(self.play) or []), None)

    def _placed(self) -> set[int]:
        """Goal objects that already lie, ready, where the task wants them."""
        play, game = self.play, self.play.game
        return {obj for place in game.goal_receptacles for obj in play.contents[place] if play.ready(obj)}


class GoldTeacher:
    """Judges actions of one ScienceWorld task by the simulator's own solution.

    Good: the next action of the gold path, after those of it that were already taken; or one that raised the score.
    """

    def __init__(self, env_cfg: EnvConfig, task: envs.Task) -> None:
        self.expert = envs.GoldPath(env_cfg)
        self.next = self.expert.reset(task)

    def judge(self, action: str, raised: bool = False) -> int:
        """The label of `action` as the next one, which `raised` the score or did not."""
        good = raised or action == self.next
        self.next = self.expert.step(action)
        return int(good)

    def better(self) -> str | None:
        """What the teacher would do now."""
        return self.next


def make_teacher(env_cfg: EnvConfig, task: envs.Task) -> ExpertTeacher | GoldTeacher:
    """The offline teacher of one task's episode."""
    return (ExpertTeacher if env_cfg.name == "alfworld" else GoldTeacher)(env_cfg, task)


def expert_labels(env_cfg: EnvConfig, episode: Episode) -> list[int]:
    """The offline teacher's label of every step of an episode."""
    teacher = make_teacher(env_cfg, episode.task)
    return [teacher.judge(step.action, raised=step.gain > 0) for step in episode.steps]


def expert_verdict(env_cfg: EnvConfig, task: envs.Task, before: Sequence[str], action: str) -> tuple[int, str | None]:
    """The offline teacher's label of `action` after those `before` it, and what it would do itself."""
    teacher = make_teacher(env_cfg, task)
    for earlier in before:
        teacher.judge(earlier)
    better = teacher.better()
    return teacher.judge(action), better


def label_episodes(
    episodes: Sequence[Episode], config: Config, rng: random.Random, budget: int, teacher: Teacher | None = None
) -> dict[str, float]:
    """Write each step's label and its source: the rules first, then the teacher on `budget` random open steps.

    As in the paper, only what the teacher calls good is used: flawed steps abound by rule. Returns counts for the log.
    """
    open_steps: list[tuple[int, int]] = []  # (episode, step)
    for number, episode in enumerate(episodes):
        for index, (step, verdict) in enumerate(zip(episode.steps, label(episode), strict=True)):
            step.label, step.label_source = verdict, "" if verdict is None else "rule"
            if verdict is None:
                open_steps.append((number, index))
    asked = rng.sample(open_steps, min(budget, len(open_steps))) if config.judge.teacher != "none" else []
    before = Counter(teacher.spent) if teacher else Counter()
    if teacher:
        verdicts = teacher_labels(teacher, [episodes[number].steps[index] for number, index in asked], config)
    else:
        known = {number: expert_labels(config.env, episodes[number]) for number in {number for number, _ in asked}}
        verdicts = [known[number][index] for number, index in asked]
    for (number, index), verdict in zip(asked, verdicts, strict=True):
        if verdict == 1:
            step = episodes[number].steps[index]
            step.label, step.label_source = 1, "teacher"
    steps = [step for episode in episodes for step in episode.steps]
    return {
        "label_good_rule": sum(step.label == 1 and step.label_source == "rule" for step in steps),
        "label_good_teacher": sum(step.label_source == "teacher" for step in steps),
        "label_flawed": sum(step.label == 0 for step in steps),
        "teacher_asked": len(asked),
        "teacher_no_verdict": sum(verdict is None for verdict in verdicts),
        **{f"teacher_{key}": count - before[key] for key, count in (teacher.spent if teacher else before).items()},
    }


def make_endpoint(config: Config, world: int, before: dict[str, int] | None) -> Teacher | None:
    """This rank's connection to judge.teacher=openai, or None. Raises ConfigError without its key."""
    asks = config.judge.enabled and config.judge.teacher == "openai"
    return Teacher(config.judge, world, before) if asks else None


def teacher_labels(teacher: Teacher, steps: Sequence[Step], config: Config) -> list[int | None]:
    """The endpoint's verdict on each step, None without one: it is asked what the actor is asked, judge.votes times."""
    questions = [prompts.build_critic_prompt(config.env.name, step.prompt, step.response) for step in steps]
    answers = teacher.ask(questions, config.judge.votes)
    return [agreed([prompts.parse_critique(text).score for text in said], config.judge) for said in answers]


def agreed(scores: Sequence[int | None], config: JudgeConfig) -> int | None:
    """The verdict of a vote, or None: more than half of judge.votes, or all of them; no verdict counts for neither.

    Source: paper, Figure 5, whose labels need five equal votes.
    """
    needed = config.votes if config.agreement == "unanimous" else config.votes // 2 + 1
    return next((verdict for verdict in (0, 1) if list(scores).count(verdict) >= needed), None)


# ----------------------------------------------------------------------------------------------------------------------
# Questions and answers


@dataclass
class Question:
    """One judged step and the answers to it: each a Step whose reward says whether its verdict was right."""

    group: int
    member: int
    index: int  # of the step in its episode
    step: Step
    answers: list[Step]
    critiques: list[prompts.Critique]


def pick(episodes: Sequence[Episode], count: int, rng: random.Random) -> list[Question]:
    """Up to `count` (even) labelled steps, half good and half flawed, drawn without replacement; not yet answered."""
    questions = [
        Question(episode.group, episode.member, index, step, [], [])
        for episode in episodes
        for index, step in enumerate(episode.steps)
    ]
    good, flawed = ([question for question in questions if question.step.label == cls] for cls in (1, 0))
    half = min(count // 2, len(good), len(flawed))
    return rng.sample(good, half) + rng.sample(flawed, half)


def ask(engine: Engine, questions: Sequence[Question], config: Config, iteration: int, first: int = 0) -> None:
    """Let the actor answer each question `judge.group_size` times. `first` numbers the questions across ranks.

    A question of more than `judge.max_prompt_tokens` stays without answers, which judge_metrics counts.
    """
    asked, texts, prompt_ids, sampling = [], [], [], []
    for number, question in enumerate(questions, first):
        text = prompts.build_critic_prompt(config.env.name, question.step.prompt, question.step.response)
        ids = engine.actor.encode(text)
        if len(ids) > config.judge.max_prompt_tokens:
            continue
        for member in range(config.judge.group_size):
            seed = stable_seed(config.seed, iteration, number, member, -1)  # -1: not an environment step
            asked.append(question)
            texts.append(text)
            prompt_ids.append(ids)
            sampling.append(Sampling(config.rollout.temperature, config.judge.max_response_tokens, seed))
    samples = engine.generate(prompt_ids, sampling)
    for question, text, ids, sample in zip(asked, texts, prompt_ids, samples, strict=True):
        response = engine.actor.decode(sample.ids)
        critique = prompts.parse_critique(response)
        question.critiques.append(critique)
        question.answers.append(
            Step(
                prompt_ids=ids,
                response_ids=sample.ids,
                logprobs=sample.logprobs,
                prompt=text,
                response=response,
                observation=question.step.observation,
                action=critique.action or "",
                valid=critique.score is not None,
                available=True,
                reward=judge_reward(critique, question.step.label),
                tag="judge",
                truncated=cut_off(engine.actor, sample),
            )
        )


def judge_metrics(questions: Sequence[Question]) -> dict[str, float]:
    """Accuracy by class, shares of "1" answers, of answers without a verdict, and of good steps that are good by the
    teacher's word (the others are last steps of won episodes); counts alone if a class is missing."""
    answers = [(q.step.label, c.score) for q in questions for c in q.critiques]
    right = {cls: [score == cls for truth, score in answers if truth == cls] for cls in (0, 1)}
    counts = {"judge/questions": len(questions), "judge/questions_too_long": sum(not q.answers for q in questions)}
    if not all(right.values()):
        return counts
    by_class = {cls: float(np.mean(values)) for cls, values in right.items()}
    return counts | {
        "judge/accuracy": float(np.mean([truth == score for truth, score in answers])),
        "judge/accuracy_good": by_class[1],
        "judge/accuracy_flawed": by_class[0],
        "judge/balanced_accuracy": (by_class[0] + by_class[1]) / 2,
        "judge/answers_good": float(np.mean([score == 1 for _, score in answers])),
        "judge/format_failures": float(np.mean([score is None for _, score in answers])),
        "judge/good_by_teacher": float(np.mean([q.step.label_source == "teacher" for q in questions if q.step.label])),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Guidelines


def advice_of(questions: Sequence[Question]) -> list[str]:
    """The advice sentences of all answers whose verdict was right, in order."""
    return [
        critique.advice
        for question in questions
        for critique in question.critiques
        if critique.advice and critique.score == question.step.label
    ]


def golden_rules(
    advice: Sequence[str], config: GuidelinesConfig, write: Callable[[list[str]], list[str]] | None = None
) -> list[str]:
    """One rule per theme that any advice fits; each sentence belongs to the theme that is closest by TF-IDF cosine.

    `write` answers the paper's prompts for a rule, one per theme with advice. Where its answer holds none, and without
    it, the rule is the theme's medoid. Source: paper, section 4.2 and Appendix A.4.
    """
    advice = [prompts.plain(sentence) for sentence in advice]
    sentences = sorted(set(advice) - {""})
    if not sentences or not config.themes:
        return []
    counts = np.array([advice.count(sentence) for sentence in sentences])
    vectors = TfidfVectorizer(stop_words="english").fit(list(config.themes) + sentences)
    near = (vectors.transform(sentences) @ vectors.transform(config.themes).T).toarray()  # [advice, themes]
    rules, requests = [], []
    for number, theme in enumerate(config.themes):
        members = [i for i in range(len(sentences)) if near[i].argmax() == number and near[i, number] > 0]
        if members:
            own = vectors.transform([sentences[i] for i in members])
            central = (own @ own.T).toarray() @ counts[members]  # similarity to all advice, repeated sentences included
            rules.append(sentences[members[int(central.argmax())]][: config.max_chars].strip())
            frequent = sorted(members, key=lambda i: -counts[i])[: config.shown]
            requests.append(prompts.build_rule_prompt(theme, [sentences[i] for i in frequent]))
    written = (
        [prompts.parse_rule(answer, config.max_chars) for answer in write(requests)] if write and requests else rules
    )
    return [text or medoid for text, medoid in zip(written, rules, strict=True)]


def pick_writer(
    engine: Engine, teacher: Teacher | None, config: Config, iteration: int
) -> Callable[[list[str]], list[str]] | None:
    """Who guidelines.writer says distils the rules: the endpoint, the actor (answers to a list of prompts), or None."""
    writer = config.guidelines.writer
    if writer == "auto":
        writer = "teacher" if teacher else "actor"
    if writer == "teacher":
        return lambda requests: [(said or [""])[0] for said in teacher.ask(requests)]  # "" where none came

    def write(requests: list[str]) -> list[str]:
        ids = [engine.actor.encode(text)[-config.judge.max_prompt_tokens :] for text in requests]
        limit, seeds = (
            config.judge.max_response_tokens,
            [stable_seed(config.seed, iteration, n, -2) for n in range(len(ids))],
        )
        samples = engine.generate(ids, [Sampling(config.rollout.temperature, limit, seed) for seed in seeds])
        return [engine.actor.decode(sample.ids) for sample in samples]

    return write if writer == "actor" else None

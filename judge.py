"""GCD, generative classification disentanglement (paper, section 4): the policy learns to judge its own actions.

Each iteration some steps of the episodes become questions "was this a good action?".  Labels come from rules on the
episode (paper 4.1) and, for the steps they leave open, from a teacher.  The policy answers every question several
times; a critique whose verdict matches the label is rewarded, and critiques are trained on with the same group-relative
policy loss as actions.  Their advice sentences are distilled into guidelines for the policy's prompt.

    label_steps -> sample_questions -> ask -> critique_samples -> (the update) -> update_guidelines

Decisions where the paper is silent: "the observation occurs in following steps" means equal text later in the same
episode; questions are always half good and half flawed, so an iteration with few good steps asks less; a critique
without a verdict earns 0; without a language model to distil them, a theme's guideline is the medoid of its advice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

import envs
import losses
import prompts
from checkpoint import TrainState
from config import Config, EnvConfig, GuidelinesConfig, JudgeConfig
from distributed import all_gather_objects, sum_dicts
from engine import Engine, SamplingParams, stable_seed
from packing import Sample
from rollout import Episode, Step
from samples import make_sample
from teacher import Teacher

ADVICE_KEPT = 512  # newest advice sentences that guidelines are distilled from
ADVICE_SHOWN = 32  # of a theme, to whoever writes its guideline: the most frequent first


# ----------------------------------------------------------------------------------------------------------------------
# Labels


def rule_labels(episode: Episode) -> list[int | None]:
    """Label an episode's steps by the paper's rules: 0 if the step's observation occurs again later (the action led
    nowhere), 1 for the last step of a won episode, else None. Source: paper, section 4.1; anchor text as in GiGPO."""
    labels: list[int | None] = []
    later: set[str] = set()
    for index, step in reversed(list(enumerate(episode.steps))):
        last = index == len(episode.steps) - 1
        labels.append(0 if step.observation in later else 1 if last and episode.won else None)
        later.add(step.observation)
    return labels[::-1]


def label_steps(
    episodes: Sequence[Episode], config: Config, rng: random.Random, budget: int, teacher: Teacher | None = None
) -> dict[str, float]:
    """Write each step's label and its source: the rules first, then the teacher on `budget` random open steps.

    As in the paper, only what the teacher calls good is used, for flawed steps abound by rule; judge.teacher_flawed
    uses its other verdicts, too. Returns counts for the log.
    """
    open_steps: list[tuple[int, int]] = []  # (episode, step)
    for number, episode in enumerate(episodes):
        for index, (step, verdict) in enumerate(zip(episode.steps, rule_labels(episode), strict=True)):
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
        if verdict == 1 or (verdict == 0 and config.judge.teacher_flawed):
            step = episodes[number].steps[index]
            step.label, step.label_source = verdict, "teacher"
    steps = [step for episode in episodes for step in episode.steps]
    return {
        "label_good_rule": sum(step.label == 1 and step.label_source == "rule" for step in steps),
        "label_good_teacher": sum(step.label == 1 and step.label_source == "teacher" for step in steps),
        "label_flawed": sum(step.label == 0 for step in steps),
        "teacher_asked": len(asked),
        "teacher_no_verdict": sum(verdict is None for verdict in verdicts),
        **{f"teacher_{key}": count - before[key] for key, count in (teacher.spent if teacher else before).items()},
    }


def expert_labels(env_cfg: EnvConfig, episode: Episode) -> list[int]:
    """Label every step of an episode by the environment's own teacher, who sees the full state."""
    teacher = envs.make_teacher(env_cfg, episode.task)
    return [teacher.judge(step.action, raised=step.gain > 0) for step in episode.steps]


def expert_verdict(env_cfg: EnvConfig, task: envs.Task, before: Sequence[str], action: str) -> tuple[int, str | None]:
    """Label `action` after those `before` it by the environment's own teacher; return what it would do itself, too."""
    teacher = envs.make_teacher(env_cfg, task)
    for earlier in before:
        teacher.judge(earlier)
    best_action = teacher.best_action()
    return teacher.judge(action), best_action


def make_api_teacher(config: Config, world: int, spent: dict[str, int] | None = None) -> Teacher | None:
    """Connect this rank to the endpoint of judge.teacher=openai; None for other teachers.

    `spent` is what the run's earlier processes spent. Raises ConfigError without its key.
    """
    asks = config.judge.enabled and config.judge.teacher == "openai"
    return Teacher(config.judge, world, spent) if asks else None


def teacher_labels(teacher: Teacher, steps: Sequence[Step], config: Config) -> list[int | None]:
    """Ask the endpoint for its verdict on each step, None without one: what the policy is asked, judge.votes times."""
    questions = [prompts.build_judge_prompt(config.env.name, step.prompt, step.response) for step in steps]
    answers = teacher.ask(questions, config.judge.votes)
    return [vote([prompts.parse_critique(text).score for text in texts], config.judge) for texts in answers]


def vote(scores: Sequence[int | None], config: JudgeConfig) -> int | None:
    """Count votes: the verdict of more than half of judge.votes, or of all, else None. No verdict counts for neither.

    Source: paper, Figure 5, whose labels need five equal votes.
    """
    needed = config.votes if config.agreement == "unanimous" else config.votes // 2 + 1
    return next((verdict for verdict in (0, 1) if list(scores).count(verdict) >= needed), None)


# ----------------------------------------------------------------------------------------------------------------------
# Questions, critiques, samples


@dataclass
class Question:
    """One judged step and the critiques of it: each a Step whose reward says whether its verdict was right."""

    group: int
    member: int
    index: int  # of the step in its episode
    label: int
    prompt: str
    source: str = ""  # of the label
    answers: list[Step] = field(default_factory=list)
    critiques: list[prompts.Critique] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what the record of an iteration says of it."""
        record = {"group": self.group, "member": self.member, "step": self.index, "label": self.label}
        return record | {"source": self.source, "answers": [answer.response for answer in self.answers]}


def sample_questions(episodes: Sequence[Episode], config: Config, count: int, rng: random.Random) -> list[Question]:
    """Draw up to `count` (even) labelled steps, half good and half flawed, without replacement; not yet answered.

    With judge.random_labels their labels are dealt out among them anew.
    """
    labelled = {1: [], 0: []}
    for episode in episodes:
        for index, step in enumerate(episode.steps):
            if step.label is not None:
                labelled[step.label].append((episode, index, step))
    half = min(count // 2, len(labelled[1]), len(labelled[0]))
    labels = [1] * half + [0] * half
    drawn = [one for label in (1, 0) for one in rng.sample(labelled[label], half)]
    if config.judge.random_labels:
        rng.shuffle(labels)
    return [
        Question(
            episode.group,
            episode.member,
            index,
            label,
            prompts.build_judge_prompt(config.env.name, step.prompt, step.response),
            step.label_source,
        )
        for label, (episode, index, step) in zip(labels, drawn, strict=True)
    ]


def ask(engine: Engine, questions: Sequence[Question], config: Config, iteration: int, first: int = 0) -> None:
    """Let the policy answer each question `judge.group_size` times. `first` numbers the questions across ranks.

    A question of more than `judge.max_prompt_tokens` stays without answers, which judge_metrics counts.
    """
    asked, prompt_ids, params = [], [], []
    for number, question in enumerate(questions, first):
        ids = engine.policy.chat.encode(question.prompt)
        if len(ids) > config.judge.max_prompt_tokens:
            continue
        for member in range(config.judge.group_size):
            seed = stable_seed(config.seed, iteration, number, member, -1)  # -1: not an environment step
            asked.append(question)
            prompt_ids.append(ids)
            params.append(SamplingParams(config.rollout.temperature, config.judge.max_response_tokens, seed))
    completions = engine.generate(prompt_ids, params)
    for question, ids, completion in zip(asked, prompt_ids, completions, strict=True):
        response = engine.policy.chat.reply(completion.ids)
        critique = prompts.parse_critique(response)
        question.critiques.append(critique)
        question.answers.append(
            Step(
                prompt_ids=ids,
                response_ids=completion.ids,
                logprobs=completion.logprobs,
                prompt=question.prompt,
                response=response,
                observation="",
                action=critique.action or "",
                valid=critique.score is not None,
                available=True,
                reward=judge_reward(critique, question.label),
                tag="judge",
                truncated=not engine.policy.chat.is_over(completion.ids),
            )
        )


def judge_reward(critique: prompts.Critique, label: int) -> float:
    """Reward a critique: 1.0 if its verdict equals the label, else (also without a verdict) 0.0."""
    return float(critique.score == label)


def critique_samples(questions: Sequence[Question], config: Config) -> list[Sample]:
    """Make one sample per critique, with its advantage: its GRPO group is the question, its reward a right verdict."""
    samples = [
        make_sample(answer, is_critique=True, group=number)
        for number, question in enumerate(questions)
        for answer in question.answers
    ]
    if samples:
        reward_N = torch.tensor([sample.step.reward for sample in samples])
        question_N = torch.tensor([sample.group for sample in samples])
        advantage_N = losses.judge_advantage(reward_N, question_N, config.algo)
        for sample, advantage in zip(samples, advantage_N.tolist(), strict=True):
            sample.advantage = advantage
    return samples


def judge_metrics(questions: Sequence[Question]) -> dict[str, float]:
    """Measure accuracy by class; shares of "1" verdicts, of critiques without a verdict, and of good steps that are
    good by the teacher's word (the others are last steps of won episodes). Counts alone if a class is missing."""
    answers = [(question.label, critique.score) for question in questions for critique in question.critiques]
    right = {cls: [score == cls for label, score in answers if label == cls] for cls in (0, 1)}
    counts = {"judge/questions": len(questions), "judge/questions_too_long": sum(not q.answers for q in questions)}
    if not all(right.values()):
        return counts
    by_class = {cls: float(np.mean(values)) for cls, values in right.items()}
    return counts | {
        "judge/accuracy": float(np.mean([label == score for label, score in answers])),
        "judge/accuracy_good": by_class[1],
        "judge/accuracy_flawed": by_class[0],
        "judge/balanced_accuracy": (by_class[0] + by_class[1]) / 2,
        "judge/answers_good": float(np.mean([score == 1 for _, score in answers])),
        "judge/format_failures": float(np.mean([score is None for _, score in answers])),
        "judge/good_by_teacher": float(np.mean([q.source == "teacher" for q in questions if q.label])),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Guidelines


def update_guidelines(
    state: TrainState, questions: Sequence[Question], engine: Engine, teacher: Teacher | None, config: Config
) -> None:
    """Take the iteration's advice into the state and, every guidelines.every iterations, distil it into guidelines.

    The first engine does that; the state is the same on every rank.
    """
    if config.guidelines.every:
        state.advice = (state.advice + advice_of(questions))[-ADVICE_KEPT:]
        if (state.iteration + 1) % config.guidelines.every == 0:
            distilled = []
            if engine.replica == 0:
                writer = guideline_writer(engine, teacher, config, state.iteration)
                distilled = [distil_guidelines(state.advice, config.guidelines, config.env.name, writer)]
            state.guidelines = all_gather_objects(distilled)[0]
    if teacher:
        state.teacher_spent = sum_dicts([teacher.before, *all_gather_objects([teacher.spent])])


def advice_of(questions: Sequence[Question]) -> list[str]:
    """List the advice sentences of all critiques whose verdict was right, in order."""
    return [
        critique.advice
        for question in questions
        for critique in question.critiques
        if critique.advice and critique.score == question.label
    ]


def distil_guidelines(
    advice: Sequence[str],
    config: GuidelinesConfig,
    env: str,
    write: Callable[[list[str]], list[str]] | None = None,
) -> list[str]:
    """Distil one guideline per theme that any advice fits; each sentence belongs to the closest by TF-IDF cosine.

    `write` answers the paper's prompts for a guideline, one per theme with advice. Where its answer holds none, and
    without it, the guideline is the theme's medoid. Source: paper, section 4.2 and Appendix A.4.
    """
    advice = [prompts.plain(sentence) for sentence in advice]
    sentences = sorted(set(advice) - {""})
    if not sentences or not config.themes:
        return []
    counts = np.array([advice.count(sentence) for sentence in sentences])
    vectors = TfidfVectorizer(stop_words="english").fit(list(config.themes) + sentences)
    near = (vectors.transform(sentences) @ vectors.transform(config.themes).T).toarray()  # [advice, themes]
    medoids, requests = [], []
    for number, theme in enumerate(config.themes):
        members = [i for i in range(len(sentences)) if near[i].argmax() == number and near[i, number] > 0]
        if members:
            own = vectors.transform([sentences[i] for i in members])
            central = (own @ own.T).toarray() @ counts[members]  # similarity to all advice, repeated sentences included
            medoids.append(sentences[members[int(central.argmax())]][: prompts.GUIDELINE_CHARS].strip())
            frequent = sorted(members, key=lambda i: -counts[i])[:ADVICE_SHOWN]
            requests.append(prompts.build_guideline_prompt(env, theme, [sentences[i] for i in frequent]))
    if write is None or not requests:
        return medoids
    written = [prompts.parse_guideline(answer, prompts.GUIDELINE_CHARS) for answer in write(requests)]
    return [text or medoid for text, medoid in zip(written, medoids, strict=True)]


def guideline_writer(
    engine: Engine, teacher: Teacher | None, config: Config, iteration: int
) -> Callable[[list[str]], list[str]] | None:
    """Choose who distils advice, as guidelines.writer says: the endpoint, the policy (prompts -> answers), or None."""
    writer = config.guidelines.writer
    if writer == "auto":
        writer = "teacher" if teacher else "policy"
    if writer == "teacher":
        return lambda requests: [(answers or [""])[0] for answers in teacher.ask(requests)]  # "" where none came

    def write(requests: list[str]) -> list[str]:
        ids = [engine.policy.chat.encode(text)[-config.judge.max_prompt_tokens :] for text in requests]
        seeds = [stable_seed(config.seed, iteration, number, -2) for number in range(len(ids))]
        limits = (config.rollout.temperature, config.judge.max_response_tokens)
        completions = engine.generate(ids, [SamplingParams(*limits, seed) for seed in seeds])
        return [engine.policy.chat.reply(completion.ids) for completion in completions]

    return write if writer == "policy" else None

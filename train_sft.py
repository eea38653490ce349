"""Cold start: supervised fine-tuning on an expert's episodes, or on chat rows of your own.

    torchrun --nproc_per_node=8 train_sft.py configs/qwen7b_sft.yaml
    python train_sft.py configs/quickstart_sft.yaml --set sft.data=my_rows.jsonl

Variants (sft.variant): `vanilla`, an expert's steps with their thoughts; `generative`, and judged steps in the judge's
format (paper, Table 3 and Appendix B).  Table 3's value-based classifier is paper/value_sft.py.  sft_data.py makes the
rows; the loss is on the replies, and where sft.prompt_loss says so, lighter, on the prompts.
"""

from __future__ import annotations

import functools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import envs
import sft_data
from checkpoint import point_latest, save_model
from config import Config, ConfigError
from distributed import Optimizer, adamw, init_distributed, progress_bar
from logger import save_run_info
from model import LanguageModel, check_model_path, load_model, token_logprobs, training_batches
from packing import Sample
from teacher import check_key

BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 0.01, 1.0  # AdamW's
RECORD_EVERY = 50  # updates between lines of metrics.jsonl

Batch = Sequence[tuple[dict, Sample, np.ndarray]]  # chat row, tokens, loss weight of each target [T]


def main() -> None:
    """Run the script: rows, training, checkpoint."""
    config = read_command_line(__doc__, preflight)
    init_distributed(config)
    rows = load_rows(config)
    model = load_model(config)
    train(model, rows, config)
    finish(model, rows, config)


def read_command_line(description: str, preflight: Callable[[Config, int], None]) -> Config:
    """Read the config of the command line, and check it; with --dry-run print it and exit."""
    command = configuration.parser(description)
    command.add_argument("--dry-run", action="store_true", help="print the resolved config and check its arithmetic")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, arguments.set)
    preflight(config, configuration.world_size())
    if arguments.dry_run:
        print(configuration.dump(config))
        sys.exit()
    return config


def preflight(config: Config, world: int) -> None:
    """Check what would stop the run later. Raises ConfigError."""
    sft, env = config.sft, config.env.name
    envs.check(config.env)
    envs.check_lineage(config)
    if sft.samples_per_update % world:
        raise ConfigError(f"sft.samples_per_update={sft.samples_per_update} does not divide over {world} ranks")
    if sft.data and not Path(sft.data).is_file():
        raise ConfigError(f"sft.data={sft.data} does not exist; it holds chat rows, one JSON object a line")
    check_model_path(config.model.path)
    if sft.data:  # nobody has to play
        return
    envs.make_expert(config.env)
    if sft.variant == "generative":
        envs.check_teacher(config.env)
    for key, method in (("noise", "slip"), ("idle", "idle")):
        if getattr(sft, key) and not hasattr(sft_data.templates(env), method):
            raise ConfigError(
                f"sft.{key}={getattr(sft, key)}: the environment {env} has no TEMPLATES.{method}; set it to 0"
            )
    if sft.writer == "teacher":
        check_key(config.judge)


def load_rows(
    config: Config, kind: str = "", make: Callable[[Config], Iterator[dict]] = sft_data.make_rows
) -> list[dict]:
    """Read sft.data, or else the rows of make(config), which the first rank makes. A collective operation."""
    if config.sft.data:
        return sft_data.read_rows(Path(config.sft.data))
    if dist.get_rank() == 0:
        sft_data.rows_file(config, kind, make)
    dist.barrier()
    return sft_data.read_rows(sft_data.rows_file(config, kind, make))


def tokenise(model: LanguageModel, row: dict, prompt_loss: float) -> tuple[Sample, np.ndarray]:
    """Turn a chat row into a sample and the loss weight of each of its targets, float64 [T].

    The weight is 1 on the reply and, where `prompt_loss` is not 0, that on the prompt, whose tokens (all but the first)
    then are targets too.
    """
    prompt, response = model.encode(row["prompt"]), model.encode_reply(row["response"])
    ids = np.array(prompt + response, dtype=np.int32)
    first = 1 if prompt_loss else len(prompt)
    weight_T = np.where(np.arange(first, len(ids)) < len(prompt), prompt_loss, 1.0)
    return Sample(ids[:first], ids[first:]), weight_T


def updates(rows: Sequence[dict], per_update: int, rng: random.Random) -> list[list[int]]:
    """Deal the rows' indices into one epoch's mini-batches, each of rows of similar length, to pad little."""
    order = rng.sample(range(len(rows)), len(rows))
    window = 50 * per_update
    order = [
        index
        for start in range(0, len(order), window)
        for index in sorted(order[start : start + window], key=lambda i: len(rows[i]["prompt"] + rows[i]["response"]))
    ]
    batches = [order[start : start + per_update] for start in range(0, len(order), per_update)]
    rng.shuffle(batches)
    return batches


def learning_rate(done: int, total: int, config: Config) -> float:
    """Return the learning rate after `done` of `total` updates: a linear rise, then a cosine down to 0.

    Source: transformers' get_cosine_schedule_with_warmup, to the last digit.
    """
    rise = round(config.sft.warmup_ratio * total)
    if done < rise:
        return config.sft.lr * (done / max(1, rise))
    return config.sft.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((done - rise) / max(1, total - rise)))))


def imitate(model: LanguageModel, batch: Batch, config: Config) -> dict[str, tuple[float, float]]:
    """Add the gradient of a mini-batch's mean loss, of which `batch` is this rank's part. A collective operation.

    Returns by metric (this rank's sum, count over all ranks); the mean loss is over all weights of all ranks.
    """
    samples = [sample for _, sample, _ in batch]
    weights = [weight_T for _, _, weight_T in batch]
    totals = [
        sum(float(weight_T.sum()) for weight_T in weights),
        sum(int((weight_T == 1).sum()) for weight_T in weights),
    ]
    counts = torch.tensor(totals, dtype=torch.float64)  # weight, reply tokens
    dist.all_reduce(counts)
    nll = 0.0
    for part in training_batches(model, samples, config.sft.tokens_per_micro_batch):
        logp_T, _ = token_logprobs(model, part)
        weight_T = np.concatenate([np.zeros(0), *(weights[index] for index in part.indices)])
        weight_T = torch.from_numpy(weight_T).to(logp_T)
        (-(logp_T * weight_T).sum() / float(counts[0])).backward()
        nll -= float(logp_T.detach()[weight_T == 1].sum())
    return {"train/nll_per_token": (nll, max(1.0, float(counts[1])))}


def train(
    model: LanguageModel,
    rows: Sequence[dict],
    config: Config,
    add_gradients: Callable[[LanguageModel, Batch, Config], dict[str, tuple[float, float]]] = imitate,
    trained: torch.nn.Module | None = None,
) -> None:
    """Make sft.epochs passes over the rows; every mini-batch is the same for every world size. Writes metrics.jsonl.

    `add_gradients` says what is learned, `trained` (default: the model) what learns it. Raises RuntimeError where a
    gradient is not finite.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sft, metrics = config.sft, config.run_dir / "metrics.jsonl"
    make = functools.partial(adamw, betas=BETAS, kind=config.train.optimizer)
    optimizer = Optimizer(model.model if trained is None else trained, WEIGHT_DECAY, make)
    if rank == 0:
        save_run_info(config)
        metrics.write_text("")
    rng = random.Random(f"epochs {config.seed}")
    batches = [(epoch, batch) for epoch in range(sft.epochs) for batch in updates(rows, sft.samples_per_update, rng)]
    tokenised = functools.cache(lambda index: tokenise(model, rows[index], sft.prompt_loss))
    bar = progress_bar(batches, desc=f"SFT {config.name}", unit=" updates")
    started = time.monotonic()
    model.model.train()
    for done, (epoch, batch) in enumerate(bar, 1):
        sums = add_gradients(model, [(rows[index], *tokenised(index)) for index in batch[rank::world]], config)
        norm = optimizer.step(learning_rate(done - 1, len(batches), config), MAX_GRAD_NORM)
        if not math.isfinite(norm):
            raise RuntimeError(f"update {done}: the gradient is not finite; lower sft.lr, or look at the rows")
        if done % RECORD_EVERY and done < len(batches):
            continue
        totals = torch.tensor([total for total, _ in sums.values()], dtype=torch.float64)
        dist.all_reduce(totals)
        record = {"update": done, "epoch": epoch}
        record |= {key: float(total) / n for total, (key, (_, n)) in zip(totals, sums.items(), strict=True) if n}
        record |= {"train/grad_norm": norm, "train/lr": learning_rate(done, len(batches), config)}
        record["time/total"] = time.monotonic() - started
        bar.set_postfix(nll=f"{record['train/nll_per_token']:.3f}")
        if rank == 0:
            if bar.disable:  # no terminal
                nll, seconds = record["train/nll_per_token"], record["time/total"]
                print(f"{done:6d}/{len(batches)}  nll {nll:.3f}  grad {norm:.2f}  {seconds:.0f} s", flush=True)
            with metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
    model.model.eval()


def finish(model: LanguageModel, rows: Sequence[dict], config: Config, state: dict | None = None) -> None:
    """Save the model (and a trainer's state) as the run's only checkpoint, and leave the process group."""
    folder = config.run_dir / "checkpoints" / "final"
    save_model(model, folder, state=state)
    if dist.get_rank() == 0:
        point_latest(folder, keep=1)
        print(f"{len(rows)} rows, {config.sft.epochs} epochs: {folder.with_name('latest')}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""Cold start: supervised fine-tuning on an expert's episodes, or on chats of your own.

    torchrun --nproc_per_node=8 train_sft.py configs/qwen7b_sft.yaml
    python train_sft.py configs/quickstart_sft.yaml --set sft.data=chats.jsonl sft.variant=vanilla

Variants (sft.variant): `vanilla`, an expert's steps with their thoughts; `generative`, and judged steps in the judge's
format (paper, Table 3 and Appendix B).  Chats of your own (sft.data) take the place of the expert's steps: with
`generative` the judged ones are learned beside them.  Table 3's value-based classifier is paper/value_sft.py.
sft_data.py makes and reads the rows; the loss is on the replies, and where sft.prompt_loss says so, lighter, on the
prompts.
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
from transformers import AutoConfig

import chat_rows
import envs
import prompts
import sft_data
from checkpoint import FINAL, RunLock, TrainState, check_disk, rehearse_save, resume, save_checkpoint
from config import Config, ConfigError
from distributed import Optimizer, PreemptionSignal, adamw, announce, init_distributed, progress_bar
from logger import drop_later, save_run_info
from model import LanguageModel, load_model, token_logprobs, training_batches
from model_files import base_of, check_model_folder, known_positions, load_chat
from packing import Sample

BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 0.01, 1.0  # AdamW's
RECORD_EVERY = 50  # updates between lines of metrics.jsonl

Batch = Sequence[tuple[dict, Sample, np.ndarray]]  # row, tokens, loss weight of each target [T]


def main() -> None:
    """Run the script: rows, training, checkpoint."""
    config = read_command_line(__doc__, preflight)
    init_distributed(config)
    lock = RunLock(config.run_dir)
    announce("read or make the rows")
    rows = load_rows(config)
    state = resume(config, rows=map(json.dumps, rows))
    announce(f"load {state.folder}")
    model = load_model(config, state.folder)
    train(model, rows, config, state)
    finish(lock)


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
    sft = config.sft
    envs.check(config.env)
    envs.check_lineage(config)
    if sft.samples_per_update % world:
        raise ConfigError(f"sft.samples_per_update={sft.samples_per_update} does not divide over {world} ranks")
    if sft.data and not Path(sft.data).is_file():
        raise ConfigError(f"sft.data={sft.data} does not exist; it holds chats (their forms: chat_rows.py)")
    if sft.data and sft.variant == "generative" and sft.judge_examples < 2:
        raise ConfigError(
            f"sft.judge_examples={sft.judge_examples} gives no judged steps to learn beside sft.data: set it to 2 or "
            "more, or sft.variant=vanilla"
        )
    if not sft.data or sft.variant == "generative":  # else nobody has to play
        sft_data.check(config)
    check_model_folder(config, samples=False)
    if not sft.data:  # the rows, when they are read, are checked for all else
        tag = prompts.REASONING[config.prompt_style][0]
        try:
            load_chat(config.model.path, config).check_reply(f"<{tag}>So.</{tag}>")
        except ConfigError as error:
            raise ConfigError(f"prompt_style={config.prompt_style}: {error}") from None


def load_rows(
    config: Config, kind: str = "", make: Callable[[Config], Iterator[dict]] = sft_data.make_rows
) -> list[dict]:
    """Read the rows of make(config), or sft.data and, with sft.variant=generative, judged steps beside; what has to be
    made the first rank makes. A collective operation.

    Raises ConfigError that names the first line which the model cannot learn.
    """
    fits, rows = row_check(config), []
    if config.sft.data:
        rows = chat_rows.read_rows(Path(config.sft.data), fits)
        if config.sft.variant == "vanilla":
            return rows
        kind, make = "judged", sft_data.make_judged_rows
    if dist.get_rank() == 0:
        sft_data.rows_file(config, kind, make)
    dist.barrier()
    return rows + chat_rows.read_rows(sft_data.rows_file(config, kind, make), fits, labelled=True)


def row_check(config: Config) -> Callable[[dict], None]:
    """Return the check of whether the model of a config can learn a row, which raises ConfigError if it cannot."""
    path = config.model.path
    chat = load_chat(path, config)
    control = [token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.special]
    known = known_positions(AutoConfig.from_pretrained(base_of(path, config)))

    def check(row: dict) -> None:
        for message in [*row["prompt"], {"role": "assistant", "content": row["response"]}]:
            if token := next((token for token in control if token in message["content"]), None):
                raise ConfigError(
                    f"what the {message['role']} says holds {token}, which is the chat format's own: take it out"
                )
        shown = chat.render(row["prompt"])
        for message in row["prompt"]:  # what the assistant said earlier may be shown without its thoughts
            if message["role"] != "assistant" and message["content"].strip() not in shown:
                raise ConfigError(f"the chat template of {path} does not show what the {message['role']} says")
        chat.check_reply(row["response"])
        # A token is a byte or more, so that few rows, if any, have to be tokenised for this: to show 60,000 takes a
        # second, to tokenise them twenty, which training does on its way.
        if len(shown.encode()) + len(row["response"].encode()) >= known:
            tokens = len(chat.encode(row["prompt"])) + len(chat.encode_reply(row["response"]))
            if tokens > known:
                raise ConfigError(f"{tokens} tokens, and {path} knows {known} positions: shorten or split the chat")

    return check


def tokenise(model: LanguageModel, row: dict, prompt_loss: float) -> tuple[Sample, np.ndarray]:
    """Turn a row into a sample and the loss weight of each of its targets, float64 [T].

    The weight is 1 on the reply and, where `prompt_loss` is not 0, that on the prompt, whose tokens (all but the first)
    then are targets too.
    """
    prompt, response = model.chat.encode(row["prompt"]), model.chat.encode_reply(row["response"])
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
        for index in sorted(order[start : start + window], key=lambda i: len(chat_rows.text_of(rows[i])))
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
    state: TrainState,
    add_gradients: Callable[[LanguageModel, Batch, Config], dict[str, tuple[float, float]]] = imitate,
    head: torch.nn.Module | None = None,
) -> None:
    """Make sft.epochs passes over the rows, from where `state` stands, and save; every mini-batch is the same for every
    world size. Writes metrics.jsonl.

    `add_gradients` says what is learned, by the model and a `head` beside it. A checkpoint is saved after each epoch,
    the last one as "final", and where SIGTERM or Ctrl-C ends the training. Raises RuntimeError where a gradient is not
    finite.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sft, metrics = config.sft, config.run_dir / "metrics.jsonl"
    rng = random.Random(f"epochs {config.seed}")
    batches = [(epoch, batch) for epoch in range(sft.epochs) for batch in updates(rows, sft.samples_per_update, rng)]
    if state.is_final:
        print_on_first_rank(f"done already: {state.folder}")
        return
    make = functools.partial(adamw, betas=BETAS, kind=config.train.optimizer)
    optimizer = Optimizer(model.model if head is None else torch.nn.ModuleList([model.model, head]), WEIGHT_DECAY, make)
    if saved := state.optimizer_states.pop("policy", None):
        optimizer.load_state_dict(saved)
    if head is not None and state.extra:
        head.load_state_dict(state.extra["head"])
    check_disk(config, [model])
    rehearse_save(model, config.run_dir / "checkpoints")
    if rank == 0:
        save_run_info(config)
        drop_later(metrics, "update", state.iteration + 1)

    def save(name: str = "") -> None:
        state.extra = {"head": head.state_dict()} if head is not None else {}
        save_checkpoint(model, {} if name else {"policy": optimizer}, None, config, state, name)

    tokenised = functools.cache(lambda index: tokenise(model, rows[index], sft.prompt_loss))
    bar = progress_bar(batches, desc=f"SFT {config.name}", unit=" updates", initial=state.iteration)
    recorded, preemption = time.monotonic(), PreemptionSignal()
    model.model.train()
    for done, (epoch, batch) in enumerate(batches[state.iteration :], state.iteration + 1):
        sums = add_gradients(model, [(rows[index], *tokenised(index)) for index in batch[rank::world]], config)
        norm = optimizer.step(learning_rate(done - 1, len(batches), config), MAX_GRAD_NORM)
        if not math.isfinite(norm):
            raise RuntimeError(
                f"update {done}: the gradient is not finite: look at the rows, or lower sft.lr under another name"
            )
        bar.update()
        state.iteration, stops = done, preemption.any_rank()
        if done % RECORD_EVERY == 0 or done == len(batches):
            totals = torch.tensor([total for total, _ in sums.values()], dtype=torch.float64)
            dist.all_reduce(totals)
            record = {"update": done, "epoch": epoch}
            record |= {key: float(total) / n for total, (key, (_, n)) in zip(totals, sums.items(), strict=True) if n}
            record |= {"train/grad_norm": norm, "train/lr": learning_rate(done, len(batches), config)}
            now = time.monotonic()
            record["time/total"], recorded = now - recorded, now  # since the record before
            bar.set_postfix(nll=f"{record['train/nll_per_token']:.3f}")
            if rank == 0:
                if bar.disable:  # no terminal
                    nll, seconds = record["train/nll_per_token"], record["time/total"]
                    print(f"{done:6d}/{len(batches)}  nll {nll:.3f}  grad {norm:.2f}  {seconds:.0f} s", flush=True)
                with metrics.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        if done < len(batches) and (stops or batches[done][0] != epoch):
            save()
        if stops and done < len(batches):
            print_on_first_rank(f"stopped after update {done} of {len(batches)}: the same command goes on")
            return
    model.model.eval()
    save(FINAL)
    print_on_first_rank(f"{len(rows)} rows, {sft.epochs} epochs: {config.run_dir / 'checkpoints' / 'latest'}")


def print_on_first_rank(text: str) -> None:
    """Print a line, once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def finish(lock: RunLock) -> None:
    """Leave the run's folder and the process group: the last thing a script does."""
    lock.release()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    configuration.fail_clearly(main)

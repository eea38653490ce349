"""Table 3's value-based classifier: a cold start whose judged steps a value head classifies, instead of critiques.

    torchrun --nproc_per_node=8 paper/value_sft.py configs/qwen1.5b_sft_value.yaml

The rows are those of train_sft.py with sft.variant=generative, less the words: a judged step is its prompt, its reply
and the verdict.  The model imitates the others as there, a linear head on its last hidden state learns the verdicts,
and both mean losses add up.  The checkpoint is a language model as any other; the head is in its
trainer/state.pt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as configuration  # before torch: it sets the number of threads

# isort: split
import torch
import torch.distributed as dist

import prompts
import sft_data
import train_sft
from checkpoint import RunLock, TrainState, resume
from config import Config, ConfigError
from distributed import init_distributed, unsharded_forward
from model import LanguageModel, last_hidden, load_model, training_batches
from packing import MicroBatch
from sft_data import Judged, Turn, chat, make_reply
from teacher import Teacher


def main() -> None:
    """Run the script: rows, training, checkpoint."""
    config = train_sft.read_command_line(__doc__, preflight)
    init_distributed(config)
    lock = RunLock(config.run_dir)
    rows = train_sft.load_rows(config, "value", make_rows)
    state = resume(config, rows=map(json.dumps, rows))
    model = load_model(config, state.folder)
    train(model, value_head(model), rows, config, state)
    train_sft.finish(lock)


def preflight(config: Config, world: int) -> None:
    """Check what would stop the run later. Raises ConfigError."""
    train_sft.preflight(config, world)
    if config.sft.variant != "generative" or config.sft.data:
        raise ConfigError("the value head learns steps that are judged here: set sft.variant=generative and sft.data=")


def make_rows(config: Config) -> Iterator[dict]:
    """Make the chat rows of config.sft; those of judged steps have a "label" instead of a critique."""
    return sft_data.make_rows(config, judged_rows=labelled_rows)


def labelled_rows(
    config: Config, judged: Sequence[tuple[Turn, Judged]], teacher: Teacher | None
) -> tuple[list[dict], int]:
    """Make rows of judged steps, as sft_data.critique_rows does: prompt, reply and "label"."""
    return [
        chat(prompts.build_prompt(turn.ctx), make_reply(turn.ctx, one.action)) | {"label": one.verdict}
        for turn, one in judged
    ], 0


def value_head(model: LanguageModel) -> torch.nn.Linear:
    """Make a classifier of replies on the last hidden state: the logit of "good".

    It starts at 0, the same on every rank.
    """
    head = torch.nn.Linear(model.model.config.hidden_size, 1).to(model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def classification_loss(
    model: LanguageModel, head: torch.nn.Linear, batch: MicroBatch, labels: Sequence[int]
) -> tuple[torch.Tensor, int]:
    """Sum the binary cross-entropies of whole replies, each judged where it ends; count how many were right.

    Source: the value-based classifier of the paper's Table 3, on the same labels as the generative one.
    """
    hidden_TH, _ = unsharded_forward(model.fsdp_root, lambda: last_hidden(model, batch))
    end_N = torch.tensor(batch.lengths, dtype=torch.int64).cumsum(0) - 1
    logit_N = head(hidden_TH[end_N.to(model.device)].float())[:, 0]
    label_N = torch.tensor(labels, dtype=torch.float32, device=model.device)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, label_N, reduction="sum")
    return loss, int(((logit_N > 0) == (label_N > 0)).sum())


def train(model: LanguageModel, head: torch.nn.Linear, rows: Sequence[dict], config: Config, state: TrainState) -> None:
    """Train as train_sft.train does; rows with a label are not imitated, `head` learns to classify them."""

    def add_gradients(model: LanguageModel, batch: train_sft.Batch, config: Config) -> dict[str, tuple[float, float]]:
        sums = train_sft.imitate(model, [one for one in batch if "label" not in one[0]], config)
        judged = [(row["label"], sample) for row, sample, _ in batch if "label" in row]
        count = torch.tensor(len(judged), dtype=torch.float64)
        dist.all_reduce(count)
        right = 0
        samples = [sample for _, sample in judged]
        for part in training_batches(model, samples, config.sft.tokens_per_micro_batch):
            loss, found = classification_loss(model, head, part, [judged[index][0] for index in part.indices])
            (loss / float(count)).backward()
            right += found
        return sums | {"train/value_accuracy": (right, float(count))}

    train_sft.train(model, rows, config, state, add_gradients, head)


if __name__ == "__main__":
    configuration.fail_clearly(main)

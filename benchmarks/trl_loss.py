"""An update by TRL's own GRPO loss, for update.py to compare with: GRPOTrainer.compute_loss, on batches that it pads.

The trainer is made as TRL's users make it; its data loader, generation and rewards never run.  Differences, all to its
favour: each batch is padded to its own longest prompt and reply (TRL pads a whole generation batch); no gradient
checkpointing, which is its default; on CPU no bfloat16, its default there, too.  tuned: logits of the replies alone, as
TRL computes them on GPUs, where on CPU it takes those of every position, and in tiles no wider than the vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import pyarrow
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from config import Config
from distributed import Optimizer
from model import LanguageModel
from packing import Sample


def make_update(policy: LanguageModel, size: int, tuned: bool, config: Config) -> Callable[..., float]:
    """Make an update in batches of `size` samples, of update.py's signature; it changes the model's forward()."""
    on_cpu = policy.device.type == "cpu"
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    options = {"per_device_train_batch_size": 2, "num_generations": 2}  # of the data loader
    options |= {"temperature": config.rollout.temperature, "beta": 0.0, "loss_type": "dapo"}  # the mean over all tokens
    options |= {"epsilon": config.algo.clip_low, "epsilon_high": config.algo.clip_high}
    options |= {"use_cpu": on_cpu, "bf16": not on_cpu, "gradient_checkpointing": config.model.gradient_checkpointing}
    trainer = GRPOTrainer(
        model=policy.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(output_dir=tempfile.mkdtemp(), report_to="none", **options),
        train_dataset=Dataset(pyarrow.table({"prompt": ["-", "-"]}), fingerprint="-"),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation  # as its train() sets it
    if tuned:
        trl_utils._use_triton = lambda device: True  # in this module it chooses the positions, and nothing else
        vocabulary = policy.model.config.vocab_size
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, vocabulary)

    def update(policy: LanguageModel, optimizer: Optimizer, samples: Sequence[Sample], config: Config) -> float:
        tokens = sum(len(sample.response_ids) for sample in samples)
        trainer.model.train()
        for start in range(0, len(samples), size):
            batch = padded_batch(trainer, samples[start : start + size], tokens)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            trainer.accelerator.backward(loss)
        return optimizer.step(config.train.lr, config.train.max_grad_norm)

    return update


def padded_batch(trainer: GRPOTrainer, samples: Sequence[Sample], tokens: int) -> dict[str, torch.Tensor]:
    """Pad samples as TRL does: prompts on the left, responses on the right; `tokens`: responses of the whole step."""
    batch = {"advantages": torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)}
    for name, key, side in (("prompt_ids", "prompt", "left"), ("response_ids", "completion", "right")):
        ids_B = [torch.from_numpy(getattr(sample, name)).long() for sample in samples]
        batch[f"{key}_ids"] = trl_utils.pad(ids_B, trainer._tokenizer.pad_token_id, side)
        batch[f"{key}_mask"] = trl_utils.pad([torch.ones_like(ids_T) for ids_T in ids_B], 0, side)
    batch["old_per_token_logps"] = trl_utils.pad([torch.from_numpy(sample.old_logprobs) for sample in samples], 0)
    batch["num_items_in_batch"] = torch.tensor(tokens)
    return {key: tensor.to(trainer.accelerator.device) for key, tensor in batch.items()}

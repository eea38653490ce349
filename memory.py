"""What a run will need of a GPU's memory, phase by phase, estimated before it starts (`--dry-run`).

Counted: weights, gradients and Adam's moments in float32, the copy of the weights that autocast keeps, activations of
one micro-batch, the logits of one chunk, the engine's share.  Parameters are counted on a model built without memory;
activations follow from its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config

import config as configuration
from config import Config, ConfigError
from model import LOGIT_CHUNK
from tinymodel import tiny_shape

GIB = 2**30
UNCOUNTED_GIB = 2.0  # the allocator's waste, CUDA's libraries
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("vocab_size", "tie_word_embeddings")
PUBLISHED = {  # SIZES of the paper's models, so that a machine without a network can plan for them
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}


@dataclass(frozen=True)
class Phase:
    """GiB by what holds them."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def origin(config: Config) -> str:
    """The model that a config's model.path began as: through runs, and through configs of runs yet to be made."""
    path, seen = config.model.path, set()
    while (run := configuration.run_folder(path)) and not Path(path).is_dir() and run not in seen:
        seen.add(run)
        same = [f"env.name={config.env.name}", f"env.level={config.env.level}"]
        made = (configuration.load(file, same) for file in sorted(Path(__file__).parent.glob("configs/*.yaml")))
        path = next((one.model.path for one in made if one.run_dir == run), path)
    return path


def shape(config: Config) -> PretrainedConfig | None:
    """The sizes of config.model.path, or None where they cannot be known here."""
    path = origin(config)
    if path == "tiny":
        return tiny_shape(config, config.model.tiny_vocab)
    if path in PUBLISHED:
        return Qwen2Config(**dict(zip(SIZES, PUBLISHED[path], strict=True)))
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        return None


def phases(config: Config, gpu_gib: float) -> tuple[float, list[Phase]]:
    """Millions of parameters, and the phases of an RL iteration on one GPU. Raises ConfigError for an unknown model."""
    sizes = shape(config)
    if sizes is None:
        raise ConfigError(f"{config.model.path} is not here, and its sizes are not known")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = 4 * count / GIB
    half = 0.0 if config.model.dtype == "float32" else 2 * count / GIB
    tokens, hidden, inner = config.train.tokens_per_micro_batch, sizes.hidden_size, sizes.intermediate_size
    # of one layer and token: inputs of its matrices in half precision, and the two norms' in float32
    layer = (2 * (6 * hidden + 4 * inner) + 8 * hidden) * tokens / GIB
    layers = sizes.num_hidden_layers
    kept = (layers * 4 * hidden * tokens / GIB + layer) if config.model.gradient_checkpointing else layers * layer
    logits = 3 * 4 * LOGIT_CHUNK * sizes.vocab_size / GIB
    packed_mask = 3 * tokens**2 / GIB if config.model.attention == "sdpa" else 0.0  # as bool and in half precision
    held = {"trainer's weights": weights, "Adam": 2 * weights}
    if config.algo.kl > 0:
        held["reference"] = weights
    if config.algo.advantage == "ppo":
        held["critic, with Adam"] = 3 * weights
    held["engine"] = config.rollout.gpu_memory_utilization * gpu_gib
    work = {"autocast's weights": half, "logits": logits, "attention mask": packed_mask}
    score = {"activations": layer}
    if config.algo.nthr:  # hidden states and errors of a group's longest replies, over some 4096 tokens in use
        group = config.rollout.group_size * config.env.max_steps * config.rollout.max_response_tokens
        score["NTHR, at most"] = 4 * group * (2 * 4096 + 2 * hidden) / GIB
    summed = {"gradients": weights, "their sum over ranks": weights}
    return count / 1e6, [
        Phase("collect", held),
        Phase("score", held | work | score),
        Phase("update", held | work | {"activations": kept} | summed),
    ]


def table(config: Config) -> str:
    """The estimate as lines that begin with #, against the GPU that is there, or one of 80 GiB."""
    here = torch.cuda.is_available()
    gpu_gib = torch.cuda.get_device_properties(0).total_memory / GIB if here else 80.0
    try:
        millions, estimate = phases(config, gpu_gib)
    except ConfigError as error:
        return f"# memory: {error}"
    gpu = f"{'this' if here else 'a'} GPU of {gpu_gib:.0f} GiB"
    lines = [f"# memory of one rank, estimated, on {gpu}; {millions:,.1f} million parameters, all trained:"]
    for phase in estimate:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in phase.parts.items())
        lines.append(f"#   {phase.name:<8}{phase.total:7.1f} GiB: {parts}")
    if max(phase.total for phase in estimate) + UNCOUNTED_GIB > gpu_gib:
        lines.append(
            f"#   does not fit into {gpu_gib:.0f} GiB: lower train.tokens_per_micro_batch or "
            "rollout.gpu_memory_utilization, or set algo.kl=0"
        )
    return "\n".join(lines)

"""Estimate what a run will need of a GPU's memory, phase by phase, before it starts.

    python tools/memory.py configs/qwen7b_gcd.yaml --gpus 8 --gib 80 --set model.tune=lora

Counted: weights, gradients and Adam's moments, copies in half precision, activations of one micro-batch, the logits of
one chunk, the engine's share and what is left of it while it sleeps.  Parameters are counted on a model built without
memory; activations follow from its sizes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from config import Config, ConfigError
from model import LOGIT_CHUNK
from model_files import base_of

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
UNCOUNTED_GIB = 2.0  # the allocator's waste, CUDA's libraries
ENGINE_GIB = 3.0  # of vLLM beside weights and cache, 2 to 3: its largest step's activations, captured graphs, libraries
ASLEEP_GIB = 2.5  # what it keeps of these while it sleeps: 1 to 2.5
SEQUENCES = 8  # of the longest, that its cache should hold: with less, replies wait for each other
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("vocab_size", "tie_word_embeddings")
PUBLISHED = {  # SIZES of the paper's models, so that a machine without a network can plan for them
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}


@dataclass(frozen=True)
class Phase:
    """A phase of an RL run: GiB by what holds them."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Sum the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    all: int
    outside: int  # of the layers
    matrices: int  # of the layers
    largest: int  # of these matrices
    trained: int


def first_model(config: Config) -> str:
    """Find the model that model.path began as: through runs, and through configs of runs yet to be made."""
    path, seen = config.model.path, set()
    while (run := configuration.run_folder(path)) and not Path(path).is_dir() and run not in seen:
        seen.add(run)
        same = [f"env.name={config.env.name}", f"env.level={config.env.level}"]
        made = (configuration.load(file, same) for file in sorted(ROOT.glob("configs/*.yaml")))
        path = next((one.model.path for one in made if one.run_dir == run), path)
    return path


def model_sizes(config: Config) -> PretrainedConfig | None:
    """Return the sizes of model.path, or None where they cannot be known here."""
    path = first_model(config)
    if path in PUBLISHED:
        return Qwen2Config(**dict(zip(SIZES, PUBLISHED[path], strict=True)))
    try:
        return AutoConfig.from_pretrained(base_of(path, config))
    except (OSError, ValueError, ConfigError):
        return None


def count(config: Config, sizes: PretrainedConfig | None = None) -> tuple[PretrainedConfig, Parameters]:
    """Count the parameters of a model of these sizes (default: model.path's). Raises ConfigError if it is unknown."""
    sizes = sizes or model_sizes(config)
    if sizes is None:
        raise ConfigError(f"{config.model.path} is not here, and its sizes are not known")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
    layers = model.base_model.layers
    matrices = [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    adapter = sum(config.model.lora_rank * sum(matrix.shape) for matrix in matrices)
    everything, inside = (sum(weight.numel() for weight in part.parameters()) for part in (model, layers))
    return sizes, Parameters(
        all=everything,
        outside=everything - inside,
        matrices=sum(matrix.numel() for matrix in matrices),
        largest=max(matrix.numel() for matrix in matrices),
        trained=everything if config.model.tune == "full" else adapter,
    )


def longest_sample(config: Config) -> int:
    """Return the most tokens that a prompt and its reply may have."""
    asked = [config.rollout] + [config.judge] * config.judge.enabled
    return max(one.max_prompt_tokens + one.max_response_tokens for one in asked)


def phases(
    config: Config, gpu_gib: float, world: int = 1, sizes: PretrainedConfig | None = None
) -> tuple[Parameters, list[Phase]]:
    """Estimate the phases of an RL run on one of `world` GPUs of `gpu_gib`, the update last; the model's parameters,
    too.

    With device=cpu it is what the same update takes there, for benchmarks/update.py to compare. Raises ConfigError for
    an unknown model.
    """
    sizes, number = count(config, sizes)
    model, train, rollout, on_cpu = config.model, config.train, config.rollout, config.device == "cpu"
    tokens, hidden, layers = train.tokens_per_micro_batch, sizes.hidden_size, sizes.num_hidden_layers
    width = 4 if model.dtype == "float32" or (on_cpu and model.dtype == "auto") else 2  # bytes of what is computed in
    sharded = {"auto": model.tune == "full", "always": True, "never": False}[model.shard]
    shards = world if sharded else 1
    whole = width * number.all  # the model in what is computed in
    loaded = {  # each rank loads all of it, and then keeps its shard
        "full": 4 * number.all,
        "lora": whole + 4 * number.trained,
        "qlora": width * (number.all - number.matrices) + 4.5 / 8 * number.matrices + 4 * number.trained,
    }[model.tune]
    weights, adam = loaded / shards, (2 if train.optimizer == "adamw8bit" else 8) * number.trained / shards
    held = {"trainer's weights": weights, "Adam": adam}
    reference = config.algo.kl > 0 and model.tune == "full"  # adapters are taken off instead
    if reference and shards > 1:
        held["reference"] = whole / shards
    load = {"model, whole": loaded}
    if config.algo.advantage == "ppo":  # its critic is loaded after the policy
        load |= held
        held["critic, with Adam"] = weights + adam

    head = getattr(sizes, "head_dim", None) or hidden // sizes.num_attention_heads
    cache = 2 * width * layers * sizes.num_key_value_heads * head  # keys and values of a token
    least = (whole + SEQUENCES * longest_sample(config) * cache) / rollout.tensor_parallel + ENGINE_GIB * GIB
    engine = max(rollout.gpu_memory_utilization * gpu_gib * GIB, least)

    # What computes: all of a sharded model in passes without gradient, in others what is outside of the layers and two
    # of these, for the next comes while one computes; else the copies of float32 weights, or of a matrix in 4 bits.
    copy = {"full": whole if width == 2 else 0, "lora": 0, "qlora": width * number.largest}[model.tune]
    scoring = whole if shards > 1 else copy
    training = width * (number.outside + 2 * (number.all - number.outside) / layers) if shards > 1 else copy
    # What a layer keeps of a token, as counted on Qwen2: 9 hidden states (keys and values are repeated for all heads),
    # 4 inner ones; in half precision the norms' 2 in float32; with float32 weights 5 more in half precision.
    norms = 0 if width == 4 else 8 * hidden if shards > 1 else 18 * hidden
    layer = (width * (9 * hidden + 4 * sizes.intermediate_size) + norms) * tokens
    kept = layers * 4 * hidden * tokens + layer if model.gradient_checkpointing else layers * layer
    logits = 4 * LOGIT_CHUNK * sizes.vocab_size  # in float32
    sync = {"engine": engine, "weights to compute with": scoring, "activations": layer}  # a few samples, as a check
    score = {
        "logits": 2 * logits,  # and log-probs
        "weights to compute with": whole if reference else scoring,  # policy's, or one GPU's whole reference after it
        "activations": layer,
    }
    if config.algo.nthr:  # hidden states and errors of a group's longest replies, over some 4096 tokens in use
        group = rollout.group_size * config.env.max_steps * rollout.max_response_tokens
        score["NTHR, at most"] = 4 * group * (2 * 4096 + 2 * hidden)
    update = {
        "logits": 3 * logits,  # log-probs and two gradients; that of entropies comes in blocks
        "weights to compute with": training,
        "activations": kept,
        "gradients": 4 * number.trained / shards,
    }
    if world > 1:  # all at once, or of those weights that are gathered
        update["their sum over ranks"] = 4 * number.trained if shards == 1 else min(training, width * number.trained)
    asleep = {} if on_cpu else {"engine": ASLEEP_GIB * GIB}
    made = [("load", load), ("sync", held | sync), ("collect", held | {"engine": engine})]
    made += [("score", held | asleep | score), ("update", held | asleep | update)]
    return number, [Phase(name, {key: size / GIB for key, size in parts.items()}) for name, parts in made]


def table(config: Config, gpu_gib: float = 0.0, world: int = 1) -> str:
    """Write the estimate as lines that begin with #, against GPUs of a size; 0: of the one that is here, or 80 GiB."""
    here = torch.cuda.is_available() and not gpu_gib
    gpu_gib = torch.cuda.get_device_properties(0).total_memory / GIB if here else gpu_gib or 80.0
    most = max(config.train.tokens_per_micro_batch, longest_sample(config))  # a longer sample is computed alone
    filled = dataclasses.replace(config.train, tokens_per_micro_batch=most)
    try:
        number, estimate = phases(dataclasses.replace(config, train=filled), gpu_gib, world)
    except ConfigError as error:
        return f"# memory: {error}"
    what = f"{number.all / 1e6:,.1f} million parameters, {number.trained / 1e6:,.1f} trained"
    lines = [
        f"# memory of one of {world} ranks, estimated, on {'this' if here else 'a'} GPU of {gpu_gib:.0f} GiB; {what}:"
    ]
    for phase in estimate:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in phase.parts.items() if gib)
        lines.append(f"#   {phase.name:<8}{phase.total:7.1f} GiB: {parts}")
    engine = max(phase.parts.get("engine", 0.0) for phase in estimate)  # while it is awake
    share = config.rollout.gpu_memory_utilization
    if max(phase.total for phase in estimate) + UNCOUNTED_GIB > gpu_gib:
        lines.append(
            f"#   does not fit into {gpu_gib:.0f} GiB: set model.gradient_checkpointing=true, lower "
            "train.tokens_per_micro_batch or rollout.gpu_memory_utilization, set train.optimizer=adamw8bit or "
            "model.tune=lora, or use more GPUs"
        )
    elif engine > share * gpu_gib * 1.001:
        lines.append(
            f"#   does not fit: rollout.gpu_memory_utilization={share:g} leaves the engine too little cache: set it to "
            f"{math.ceil(100 * engine / gpu_gib) / 100:g}, or raise rollout.tensor_parallel"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the estimate that the command line asks for."""
    command = configuration.parser(__doc__)
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("--gib", type=float, default=80.0, help="of each GPU (default: %(default)s)")
    arguments = command.parse_args()
    print(table(configuration.load(arguments.config, arguments.set), arguments.gib, arguments.gpus))


if __name__ == "__main__":
    configuration.fail_clearly(main)

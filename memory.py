"""What a run will need of a GPU's memory, phase by phase, estimated before it starts (`--dry-run`).

    python memory.py configs/qwen7b_gcd.yaml --gpus 8 --gib 80 --set model.tune=lora

Counted: weights, gradients and Adam's moments, copies in half precision, activations of one micro-batch, the logits of
one chunk, the engine's share.  Parameters are counted on a model built without memory; activations follow from its
sizes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config

import config as configuration
from config import Config, ConfigError
from model import LOGIT_CHUNK, base_of
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
        return AutoConfig.from_pretrained(base_of(path))
    except (OSError, ValueError, ConfigError):
        return None


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all of them, those outside of the layers, those of the layers' matrices, the largest of
    these; and those that are trained."""

    all: int
    outside: int
    matrices: int
    largest: int
    trained: int


def count(config: Config, sizes: PretrainedConfig | None = None) -> tuple[PretrainedConfig, Parameters]:
    """The sizes of the model (default: of config.model.path), and its parameters. Raises ConfigError for an unknown
    model."""
    sizes = sizes or shape(config)
    if sizes is None:
        raise ConfigError(f"{config.model.path} is not here, and its sizes are not known")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
    layers = model.base_model.layers
    matrices = [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    adapter = sum(config.model.lora_rank * sum(matrix.shape) for matrix in matrices)
    whole, inside = (sum(weight.numel() for weight in part.parameters()) for part in (model, layers))
    sums = (sum(matrix.numel() for matrix in matrices), max(matrix.numel() for matrix in matrices))
    return sizes, Parameters(whole, whole - inside, *sums, whole if config.model.tune == "full" else adapter)


def phases(
    config: Config, gpu_gib: float, world: int = 1, sizes: PretrainedConfig | None = None
) -> tuple[Parameters, list[Phase]]:
    """The model's parameters, and the phases of an RL iteration on one of `world` GPUs. Raises ConfigError for an
    unknown model. With device=cpu what the same update takes there, for benchmarks/update.py to compare."""
    sizes, number = count(config, sizes)
    model, train, on_cpu = config.model, config.train, config.device == "cpu"
    half = 4 if model.dtype == "float32" or (on_cpu and model.dtype == "auto") else 2  # bytes of what is computed in
    auto = model.tune == "full"
    shards = world if {"auto": auto, "always": True, "never": False}[model.shard] else 1
    weights = {
        "full": 4 * number.all / shards,
        "lora": half * number.all / shards + 4 * number.trained / shards,
        "qlora": half * (number.all - number.matrices) + 4.5 / 8 * number.matrices + 4 * number.trained,
    }[model.tune]
    adam = (2 if train.optimizer == "adamw8bit" else 8) * number.trained / shards
    held = {"trainer's weights": weights, "Adam": adam}
    if config.algo.advantage == "ppo":
        held["critic, with Adam"] = weights + adam
    share = config.rollout.gpu_memory_utilization * gpu_gib * GIB
    engine = max(
        share, 1.1 * half * number.all / config.rollout.tensor_parallel
    )  # the model and a small cache at least
    asleep = {} if config.rollout.sleep else {"engine": engine}

    tokens, hidden, inner, layers = (
        train.tokens_per_micro_batch,
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_hidden_layers,
    )
    # of one layer and token: inputs of its matrices as computed, and the two norms' in float32
    layer = (half * (6 * hidden + 4 * inner) + 8 * hidden) * tokens
    kept = layers * 4 * hidden * tokens + layer if model.gradient_checkpointing else layers * layer
    work = {"logits": 3 * 4 * LOGIT_CHUNK * sizes.vocab_size}
    if model.attention == "sdpa" and not on_cpu:  # rows are packed
        work["attention mask"] = 3 * tokens**2  # as bool and in half precision
    copy = {"lora": 0, "qlora": half * number.largest, "full": 0 if half == 4 and shards == 1 else half * number.all}[
        model.tune
    ]
    gathered = half * (number.outside + 2 * (number.all - number.outside) / layers) if shards > 1 else copy
    score = {"weights in half precision": copy, "activations": layer}
    if config.algo.kl > 0 and model.tune == "full":
        score["reference"] = half * number.all
    if config.algo.nthr:  # hidden states and errors of a group's longest replies, over some 4096 tokens in use
        group = config.rollout.group_size * config.env.max_steps * config.rollout.max_response_tokens
        score["NTHR, at most"] = 4 * group * (2 * 4096 + 2 * hidden)
    update = {"weights in half precision": gathered, "activations": kept, "gradients": 4 * number.trained / shards}
    if world > 1 and shards == 1:
        update["their sum over ranks"] = 4 * number.trained
    made = [
        ("collect", held | {"engine": engine}),
        ("score", held | asleep | work | score),
        ("update", held | asleep | work | update),
    ]
    return number, [Phase(name, {key: size / GIB for key, size in parts.items()}) for name, parts in made]


def table(config: Config, gpu_gib: float = 0.0, world: int = 1) -> str:
    """The estimate as lines that begin with #, against GPUs of a size; by default the one that is here, or 80 GiB."""
    here = torch.cuda.is_available() and not gpu_gib
    gpu_gib = torch.cuda.get_device_properties(0).total_memory / GIB if here else gpu_gib or 80.0
    try:
        number, estimate = phases(config, gpu_gib, world)
    except ConfigError as error:
        return f"# memory: {error}"
    what = f"{number.all / 1e6:,.1f} million parameters, {number.trained / 1e6:,.1f} trained"
    lines = [
        f"# memory of one of {world} ranks, estimated, on {'this' if here else 'a'} GPU of {gpu_gib:.0f} GiB; {what}:"
    ]
    for phase in estimate:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in phase.parts.items() if gib)
        lines.append(f"#   {phase.name:<8}{phase.total:7.1f} GiB: {parts}")
    if max(phase.total for phase in estimate) + UNCOUNTED_GIB > gpu_gib:
        lines.append(
            f"#   does not fit into {gpu_gib:.0f} GiB: lower train.tokens_per_micro_batch or "
            "rollout.gpu_memory_utilization, set train.optimizer=adamw8bit or model.tune=lora, or use more GPUs"
        )
    return "\n".join(lines)


def check_disk(config: Config) -> None:
    """The checkpoints that a run keeps, and the one being written, must fit. Raises ConfigError."""
    try:
        _, number = count(config)
    except ConfigError:
        return  # a model that is yet to be downloaded
    moments = 2 if config.train.optimizer == "adamw8bit" else 8
    models = 2 if config.algo.advantage == "ppo" else 1
    needed = (config.train.keep_checkpoints + 1) * models * (4 + moments) * number.trained
    folder = config.run_dir / "checkpoints"
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    home = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(home).free
    if free + there < needed:
        raise ConfigError(
            f"checkpoints will take {needed / GIB:.1f} GiB, {home} has {free / GIB:.1f} GiB free: make room, or lower "
            f"train.keep_checkpoints={config.train.keep_checkpoints}"
        )


def main() -> None:
    """The command line."""
    command = configuration.parser(__doc__)
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("--gib", type=float, default=80.0, help="of each GPU (default: %(default)s)")
    arguments = command.parse_args()
    print(table(configuration.load(arguments.config, arguments.set), arguments.gib, arguments.gpus))


if __name__ == "__main__":
    configuration.fail_clearly(main)

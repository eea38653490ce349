"""Every option of the project: one tree of frozen dataclasses, which is the reference manual.

A YAML file holds only what differs from the defaults and may name one other file as its `base:`.  On the command line
`--set train.lr=2e-6 judge.enabled=false` overrides a field.  A value is text until its field's type says how to read it
(so `name: 007` keeps its zeros and 1e-6 is a number).  An unknown or repeated key, a value of the wrong type or out of
its range is an error that names the key and what is valid: nothing is ignored, nothing is guessed.

    config = load("configs/quickstart.yaml", ["train.lr=1e-4"])
    python config.py                                # print every option, its default and range
    python config.py configs/quickstart.yaml        # print the resolved tree
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import math
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

# Read when torch and peft are imported, so set here, in the module every script imports first: one thread per rank
# (vLLM's CPU engine is several times slower with more), no C++ warnings about it, none of an optional kernel.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

LEVELS = ("L0", "L1", "L2")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class ConfigError(Exception):
    """A mistake in a config file or in --set: the message names the key and the cure."""


def option(
    default: Any,
    what: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    is_path: bool = False,
) -> Any:
    """Declare an option: its default, what it does in one line, the range of its values, and whether it is a path."""
    limits = {"above": above, "at_least": at_least, "at_most": at_most}
    limits = {key: n for key, n in limits.items() if n is not None}
    return field(default=default, metadata={"what": what, "limits": limits, "is_path": is_path})


@dataclass(frozen=True)
class ModelConfig:
    path: str = option("Qwen/Qwen2.5-1.5B-Instruct", "a Hugging Face id or folder, or a run's checkpoint", is_path=True)
    base: str = option("", "the model under an adapter; empty: where the adapter's own config says", is_path=True)
    chat_template: str = option("", "file of a chat template (Jinja); empty: the tokenizer's own", is_path=True)
    thinking: Literal["default", "on", "off"] = option("default", "for templates with such a switch (Qwen3)")
    # The trainer's weights are float32 always: in bfloat16 the steps of a learning rate of 1e-6 would be rounded away.
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "what trainer and engine compute in; auto: bfloat16 on CUDA, float32 on CPU"
    )
    attention: Literal["auto", "sdpa"] = option(
        "auto", "auto: tokens that samples share are computed once, where a model's layers allow it; sdpa: padded lines"
    )
    tune: Literal["full", "lora", "qlora"] = option(
        "full", "train all weights, an adapter of all linear layers, or that on 4-bit weights"
    )
    lora_rank: int = option(32, "rank of a new adapter", above=0)
    lora_alpha: float = option(64.0, "alpha of a new adapter; its update is scaled by alpha / rank", above=0)
    shard: Literal["auto", "always", "never"] = option(
        "auto", "weights in shards over the ranks (FSDP2); auto: on CUDA where all weights are trained"
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more time")


@dataclass(frozen=True)
class EnvConfig:
    name: str = option("", "a module under environments/, or any importable one of yours: my_package.my_env")
    data: str = option("", "folder of the environment's data; empty: where the environment says", is_path=True)
    level: Literal["L0", "L1", "L2"] = option("L0", "L0 and L1 train on task_types, L2 on those not held out")
    task_types: tuple[str, ...] = option((), "task types of L0 and L1; empty: all of the environment's")
    held_out_types: tuple[str, ...] = option((), "types that L2 evaluates on alone; empty: the environment's")
    max_steps: int = option(30, "actions per episode", above=0)
    history: int = option(2, "past (observation, action) pairs shown in the prompt", at_least=0)
    simplification: str = option("easy", "presets of the environment's simulator, comma-separated, if it has any")
    machine_heap_mib: int = option(1024, "memory of the machine that the simulator runs in, if it has one", above=0)


@dataclass(frozen=True)
class AlgoConfig:
    advantage: str = option("grpo", "a key of losses.ADVANTAGES: grpo, gigpo, rlvmr, ppo, or one of yours")
    divide_by_std: bool = option(True, "divide group-centred values by their std; false: Dr. GRPO, mean_norm")
    stats_over: Literal["steps", "trajectories"] = option(
        "steps", "group statistics over all steps (as published), or over episodes, each by its first step"
    )
    gamma: float = option(0.95, "discount of the step returns (GiGPO)", at_least=0, at_most=1)
    step_weight: float = option(1.0, "weight of the step-level advantage: GiGPO's omega, RLVMR's alpha", at_least=0)
    gae_gamma: float = option(1.0, "PPO: discount over the tokens of one reply", at_least=0, at_most=1)
    gae_lambda: float = option(1.0, "PPO: lambda of the generalised advantage", at_least=0, at_most=1)
    value_clip: float = option(0.5, "PPO: bound of a value's change in one update, in units of reward", at_least=0)
    invalid: Literal["malformed", "unavailable"] = option(
        "malformed", "invalid replies: those not well formed (as published), or also those of actions not on offer"
    )
    invalid_penalty: float = option(0.1, "subtracted from the score of a step whose reply was invalid", at_least=0)
    overlong: Literal["keep", "mask"] = option(
        "keep", "replies cut off at max_response_tokens: train on them, or leave them out of loss and denominators"
    )
    nthr: bool = option(False, "NTHR: weaken the penalty on tokens of lost replies that pull won ones along")
    nthr_beta: float = option(1.0, "NTHR: factor on the threshold of selection")
    nthr_eta: float | None = option(
        None, "NTHR: factor on selected tokens' advantage; null: 2 |0.5 - share of won episodes|"
    )
    policy_loss: str = option("ppo_clip", "a key of losses.POLICY_LOSSES: ppo_clip, gspo, cispo, or one of yours")
    clip_low: float = option(0.2, "the ratio is clipped to at least 1 - clip_low", at_least=0, at_most=1)
    clip_high: float = option(0.2, "and to at most 1 + clip_high", at_least=0)
    dual_clip: float | None = option(None, "bound of the loss at negative advantages, in |A|; verl has 3", above=1)
    aggregate: Literal["token", "sequence", "dr"] = option(
        "token", "mean over tokens (DAPO), over replies (GRPO), or sum over a constant length (Dr. GRPO)"
    )
    kl: float = option(
        0.01, "coefficient of the KL term against the initial model; 0: no reference is kept", at_least=0
    )
    entropy: float = option(0.0, "coefficient of the entropy bonus", at_least=0)
    importance: Literal["none", "truncate", "mask"] = option(
        "none", "correct for engine and trainer disagreeing: bounded ratios (TIS), or tokens out of bounds left out"
    )
    importance_low: float = option(0.5, "ratios below are masked", at_least=0, at_most=1)
    importance_high: float = option(2.0, "ratios above are cut to it, or masked", at_least=1)


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["auto", "vllm", "transformers"] = option("auto", "auto: vLLM where it is installed")
    groups: int = option(16, "GRPO groups an iteration, each of one task, over all ranks", above=0)
    group_size: int = option(8, "episodes per group", above=0)
    dynamic_sampling: int = option(
        0, "how often a group without variance in its returns gives way to another task's (DAPO)", at_least=0
    )
    temperature: float = option(1.0, "of sampling in training", above=0)
    max_prompt_tokens: int = option(2048, "a longer prompt drops its oldest history first", above=0)
    max_response_tokens: int = option(512, "where a reply is cut off", above=0)
    concurrency: int = option(128, "episodes in flight per rank", above=0)
    success_reward: float = option(10.0, "reward of the step that wins", above=0)
    kv_cache_gib: float = option(0.5, "the engine's cache on CPU", above=0)
    tensor_parallel: int = option(
        1, "ranks per engine, for a model that one GPU cannot hold beside the trainer", above=0
    )
    gpu_memory_utilization: float = option(0.5, "share of GPU memory that vLLM may take", above=0, at_most=1)


@dataclass(frozen=True)
class JudgeConfig:
    enabled: bool = option(False, "GCD: co-train the policy to judge actions")
    weight: float = option(1.0, "factor on L_GCD", at_least=0)
    questions: int = option(16, "judged steps an iteration, over all ranks, half of them good", above=0)
    group_size: int = option(8, "critiques per question", above=0)
    max_prompt_tokens: int = option(3072, "a longer question stays unanswered, which is counted", above=0)
    max_response_tokens: int = option(512, "where a critique is cut off", above=0)
    teacher: Literal["none", "expert", "openai"] = option(
        "none", "who labels what the rules leave open: nobody, the environment's teacher, or an endpoint"
    )
    teacher_steps: int = option(
        64, "unlabelled steps that the teacher is shown an iteration, over all ranks", at_least=0
    )
    teacher_flawed: bool = option(False, "use what the teacher calls flawed, too; false: the rules alone, as the paper")
    random_labels: bool = option(False, "a control: questions' labels are dealt out at random")
    # teacher=openai alone; the paper's is DeepSeek-V3
    base_url: str = option("https://api.deepseek.com", "any OpenAI-compatible endpoint")
    model: str = option("deepseek-chat", "the endpoint's model")
    key_env: str = option("DEEPSEEK_API_KEY", "environment variable that holds the key; empty: none is needed")
    votes: int = option(1, "answers asked per step", above=0)
    agreement: Literal["majority", "unanimous"] = option("majority", "of the votes, for a label")
    teacher_temperature: float = option(0.0, "of the endpoint's answers", at_least=0)
    concurrency: int = option(16, "requests in flight per rank", above=0)
    timeout_s: float = option(60.0, "seconds for one answer", above=0)
    retries: int = option(4, "of a request that met 429, 5xx, a time-out or a dropped connection", at_least=0)
    max_answer_tokens: int = option(1024, "where an answer is cut off", above=0)
    max_requests: int = option(100_000, "of the whole run; after that nothing is asked", at_least=0)
    max_tokens: int = option(200_000_000, "of the whole run, prompts and answers together", at_least=0)
    cache: str = option("data/teacher", "folder of the answers", is_path=True)


@dataclass(frozen=True)
class GuidelinesConfig:
    every: int = option(0, "iterations between refreshes of the guidelines; 0: none are made", at_least=0)
    file: str = option("", "text file of guidelines to start with, one a line; with every=0 they stay", is_path=True)
    writer: Literal["auto", "teacher", "policy", "medoid"] = option(
        "auto", "who distils advice: an endpoint, the policy, or the most central advice; auto: endpoint, else policy"
    )
    themes: tuple[str, ...] = option(
        (
            "explore unvisited places systematically while searching for the object",
            "avoid repeating actions that did not change anything",
            "read the current observation and choose an admissible action",
            "go to the destination and finish the task once the object is held",
        ),
        "advice is sorted by these, and each gives one guideline",
    )


@dataclass(frozen=True)
class TrainConfig:
    iterations: int = option(200, "of the whole run", at_least=0)
    lr: float = option(1e-6, "learning rate of the policy", at_least=0)
    critic_lr: float = option(1e-5, "learning rate of PPO's value model", at_least=0)
    warmup: int = option(0, "iterations of linear warm-up", at_least=0)
    schedule: Literal["constant", "linear"] = option("constant", "linear: falls to 0 after the last iteration")
    weight_decay: float = option(0.01, "AdamW's, on matrices", at_least=0)
    optimizer: Literal["adamw", "adamw8bit"] = option("adamw", "moments in float32, or in 8 bits (bitsandbytes)")
    max_grad_norm: float = option(1.0, "gradients are clipped to it", above=0)
    samples_per_update: int = option(
        256, "actions per optimizer step, over all ranks; critiques are dealt alike", above=0
    )
    deal: Literal["prefixes", "shuffled"] = option(
        "prefixes", "samples go to mini-batches in runs of those that begin alike, which share most tokens, or singly"
    )
    tokens_per_micro_batch: int = option(16384, "of one forward and backward pass, shared ones once", above=0)
    old_logprobs: Literal["trainer", "engine"] = option("trainer", "whose log-probs the ratio is taken against")
    timeout_minutes: float = option(60.0, "a rank that others have waited for so long hangs: the run ends", above=0)
    checkpoint_every: int = option(20, "iterations between checkpoints", above=0)
    keep_checkpoints: int = option(2, "older ones are deleted; the last one is always kept", above=0)
    eval_every: int = option(0, "iterations between evaluations on eval.levels; 0: evaluate.py alone does", at_least=0)
    episodes_every: int = option(1, "iterations between records of all episodes", above=0)
    coupling_every: int = option(1, "iterations between looks at how gradients are coupled; 0: never", at_least=0)
    coupling_samples: int = option(48, "samples looked at: a third good, a third flawed, a third any", above=0)
    wandb: str = option("", "project of Weights & Biases that is shown the metrics, too; empty: none")


@dataclass(frozen=True)
class SFTConfig:
    data: str = option("", "file of chats to learn (see chat_rows.py); empty: the expert's episodes", is_path=True)
    variant: Literal["vanilla", "generative"] = option("vanilla", "generative: judged steps are learned, too")
    writer: Literal["template", "teacher"] = option("template", "of thoughts and critiques; teacher: the endpoint")
    episodes: int = option(300, "expert episodes", above=0)
    judge_examples: int = option(100, "judged steps, half of them good", at_least=0)
    noise: float = option(0.0, "share of slips played, and not taught, in the episodes", at_least=0, at_most=1)
    idle: float = option(
        0.0, "how often the expert first does something pointless, and teaches it", at_least=0, at_most=1
    )
    guided: float = option(0.0, "share of prompts that carry guidelines", at_least=0, at_most=1)
    epochs: int = option(5, "passes over the rows", above=0)
    lr: float = option(1e-5, "learning rate, after warm-up", at_least=0)
    warmup_ratio: float = option(0.1, "share of updates in which it rises; then a cosine", at_least=0, at_most=1)
    samples_per_update: int = option(16, "rows per optimizer step, over all ranks", above=0)
    tokens_per_micro_batch: int = option(16384, "of one forward and backward pass", above=0)
    prompt_loss: float = option(0.0, "weight of the loss on prompt tokens; 0: the reply alone", at_least=0)


@dataclass(frozen=True)
class EvalConfig:
    levels: tuple[str, ...] = option(LEVELS, "which of L0, L1, L2")
    games: int = option(0, "play only N games of each level's fixed list, always the same; 0: all", at_least=0)
    seeds: int = option(3, "plays of every game, each with its own sampling seed", above=0)
    temperature: float = option(0.4, "of sampling in evaluation", at_least=0)


@dataclass(frozen=True)
class Config:
    name: str = option("run", "the run's folder is runs/<name>")
    seed: int = option(0, "of everything that is drawn at random")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: CUDA where there is a GPU")
    prompt_style: Literal["think", "rlvmr"] = option(
        "think", "a reply opens with <think>, or with one of RLVMR's four tags, and the plan stays in the prompt"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    guidelines: GuidelinesConfig = field(default_factory=GuidelinesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def run_dir(self) -> Path:
        """Return the run's folder."""
        return Path("runs") / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config (and its base), apply `a.b=value` overrides, return the checked tree.

    A value that opens a bracket, brace or quote is read as YAML, any other as it stands; null stands for None. `name`
    and `model.path` can hold other options, in braces: "grpo_{env.name}_{env.level}".
    Raises ConfigError on a missing file, an unknown key, a value of the wrong type or a broken constraint.
    """
    tree = _read(Path(path))
    if "base" in tree:
        base_path = tree.pop("base")
        if not base_path or not isinstance(base_path, str):
            raise ConfigError(f"{path}: base={base_path!r}: expected the path of one file")
        base = _read(Path(path).parent / base_path)
        if "base" in base:
            raise ConfigError(f"{path}: its base {base_path} has a base of its own; only one level is allowed")
        tree = _merge(base, tree)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected key=value, for instance train.lr=1e-6")
        *parents, leaf = key.strip().split(".")
        value = value.strip()
        node = {leaf: _parse_yaml(value, f"--set {text}") if value.startswith(("[", "{", '"', "'")) else value}
        for parent in reversed(parents):
            node = {parent: node}
        tree = _merge(tree, node)
    config = _build(Config, tree, "")
    config = dataclasses.replace(config, name=_fill_in(config.name, config, "name"))
    model = dataclasses.replace(config.model, path=_fill_in(config.model.path, config, "model.path"))
    config = dataclasses.replace(config, model=model)
    check(config)
    return config


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Walk the tree: each option's full key, its field, its value."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, one, value


def check(config: Config) -> None:
    """Check every option's range, and the constraints between options. Raises ConfigError.

    What the tables of losses.py and an environment's module know is checked at a script's start, by its preflight().
    """
    for key, one, value in options(config):
        limits = one.metadata["limits"]
        if limits and value is not None and not _within(value, **limits):
            allowed = " and ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in limits.items())
            raise ConfigError(f"{key} is {value}; it must be {allowed}")
    if not config.name.strip("/.") or Path(config.name).is_absolute() or ".." in Path(config.name).parts:
        raise ConfigError(f"name={config.name!r}: the run's folder is runs/<name>, and this one is not below runs")
    for level in config.eval.levels:
        if level not in LEVELS:
            raise ConfigError(f"eval.levels: unknown level {level!r}; levels are {', '.join(LEVELS)}")
    if config.model.tune == "qlora" and config.model.shard == "always":
        raise ConfigError("4-bit weights are not sharded: with model.tune=qlora leave model.shard=auto")
    if config.rollout.tensor_parallel > 1 and config.rollout.engine == "transformers":
        raise ConfigError("rollout.tensor_parallel is vLLM's; rollout.engine=transformers has one rank per engine")
    check_algo(config)
    check_judge(config)


def _within(value: float, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf) -> bool:
    return (value > above or above == -math.inf) and at_least <= value <= at_most


def check_algo(config: Config) -> None:
    """Check the constraints of the method. Raises ConfigError."""
    algo, relative = config.algo, config.algo.advantage != "ppo"
    if relative and config.rollout.group_size < 2:
        raise ConfigError("rollout.group_size is 1; a group-relative advantage needs at least 2 episodes per group")
    if config.rollout.dynamic_sampling and config.rollout.group_size < 2:
        raise ConfigError("rollout.dynamic_sampling compares a group's episodes; it needs rollout.group_size=2 or more")
    if algo.advantage == "rlvmr" and config.prompt_style != "rlvmr":
        raise ConfigError("algo.advantage=rlvmr rewards the tags of prompt_style=rlvmr; set that, too")
    if algo.nthr and not relative:
        raise ConfigError("algo.nthr contrasts the episodes of a group; algo.advantage=ppo has none")
    if algo.importance != "none" and config.train.old_logprobs == "engine":
        raise ConfigError("algo.importance compares engine and trainer; it needs train.old_logprobs=trainer")


def check_judge(config: Config) -> None:
    """Check the constraints of the judge, its teacher and its guidelines. Raises ConfigError."""
    judge = config.judge
    if judge.enabled and judge.group_size < 2:
        raise ConfigError("judge.group_size is 1; a group-relative judge loss needs at least 2 critiques per question")
    if judge.votes > 1 and judge.teacher == "openai" and judge.teacher_temperature == 0:
        raise ConfigError(
            "judge.votes counts equal answers at judge.teacher_temperature=0; raise it, for instance to 0.7"
        )
    for key, writer in (("guidelines", config.guidelines.writer), ("sft", config.sft.writer)):
        if writer == "teacher" and judge.teacher != "openai":
            raise ConfigError(f"{key}.writer=teacher needs judge.teacher=openai")
    if config.guidelines.every and not judge.enabled:
        raise ConfigError("guidelines.every needs judge.enabled=true: guidelines are distilled from critiques")
    if config.guidelines.file and not Path(config.guidelines.file).is_file():
        raise ConfigError(f"guidelines.file={config.guidelines.file} does not exist; it holds one guideline a line")


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Check that an option names an entry of a table. Raises ConfigError with the nearest one."""
    if value not in known:
        raise ConfigError(f"{key}={value!r} is not one of the known ones{nearest(value, known)}")


def check_world(config: Config, world: int) -> None:
    """Check that what is dealt out divides over the ranks, or over engines of several ranks. Raises ConfigError."""
    per_engine = config.rollout.tensor_parallel
    if world % per_engine:
        raise ConfigError(f"rollout.tensor_parallel={per_engine} does not divide {world} ranks into engines")
    ranks = f"{world} rank{'s' * (world > 1)}" + f" in engines of {per_engine}" * (per_engine > 1)
    world //= per_engine
    shares = [("rollout.groups", config.rollout.groups, world, "")]
    if config.judge.enabled:
        halves = ", each asking about as many good steps as flawed ones"
        shares.append(("judge.questions", config.judge.questions, 2 * world, halves))
        if config.judge.teacher != "none":
            shares.append(("judge.teacher_steps", config.judge.teacher_steps, world, ""))
    for key, value, unit, why in shares:
        if value % unit:
            lower, upper = value // unit * unit, (value // unit + 1) * unit
            near = f"{lower} or {upper}" if lower else f"{upper}"
            raise ConfigError(f"{key}={value} does not divide over {ranks}{why}; set it to {near}")


def world_size() -> int:
    """Return the number of ranks that torchrun starts, or 1 without it; known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_folder(checkpoint: str | Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to, or None for any other model."""
    folder = Path(checkpoint)
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def newest_evaluation(folder: Path) -> Path | None:
    """Find the evaluation of a run's newest checkpoint: of `final`, else of the highest number, else of any model."""
    found = {file.stem.removeprefix("eval_"): file for file in folder.glob("eval_*.json") if not file.is_dir()}
    newest = max(found, key=lambda name: (name == "final", name.isdigit(), name), default=None)
    return found.get(newest)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the tree as plain dictionaries and lists, ready for yaml.safe_dump; load() of it gives the same tree."""
    plain = dataclasses.asdict(config)

    def lists(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: lists(value) for key, value in node.items()}
        return [lists(value) for value in node] if isinstance(node, tuple) else node

    return lists(plain)


def dump(config: Config) -> str:
    """Return the resolved tree as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def save(config: Config, path: Path) -> None:
    """Write the resolved tree as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(config), encoding="utf-8")


def manual() -> str:
    """Describe every option, one after the other: key, default, range, what it does."""
    lines = []
    for key, one, _ in options(Config()):
        limits = ", ".join(f"{name.replace('_', ' ')} {n:g}" for name, n in one.metadata["limits"].items())
        default = to_dict(Config())
        for part in key.split("."):
            default = default[part]
        first = f"{key} = {yaml.safe_dump(default, default_flow_style=True, width=10**6).splitlines()[0]}"
        lines.append(textwrap.shorten(first, 110) + (f"   ({limits})" if limits else ""))
        choices = typing.get_args(typing.get_type_hints(_owner(key))[one.name])
        named = f" [{' | '.join(choices)}]" if choices and all(isinstance(choice, str) for choice in choices) else ""
        lines.append(textwrap.fill(one.metadata["what"] + named, 110, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def _owner(key: str) -> type:
    section = key.rpartition(".")[0]
    return type(getattr(Config(), section)) if section else Config


def parser(description: str, config_required: bool = True) -> argparse.ArgumentParser:
    """Return the command line that all scripts share: a config file and --set."""
    command = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("config", nargs=None if config_required else "?", help="YAML file, see configs/")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    return command


def _fill_in(text: str, config: Config, where: str) -> str:
    def value(match: re.Match) -> str:
        node: Any = config
        for part in match[1].split("."):
            node = getattr(node, part, None) if part in getattr(node, "__dataclass_fields__", ()) else None
        if not isinstance(node, (str, int)):
            raise ConfigError(f"{where}={text!r}: {{{match[1]}}} is not an option whose value can stand in a name")
        return str(node)

    return re.sub(r"\{([\w.]+)\}", value, text)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; the ones that come with the project are in configs/")
    tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if tree is None:  # an empty file: all defaults
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, expected key: value lines")
    return tree


class _Loader(yaml.BaseLoader):
    """YAML with every scalar left as text, and a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key for key, _ in node.value]
        for index, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:index]]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def nearest(key: str, valid: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the one that was meant, or else all that there are."""
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the config'}: expected key: value lines, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ConfigError(f"unknown key {name}{nearest(str(key), hints)}")
        read = _build if dataclasses.is_dataclass(hints[key]) else _parse
        values[key] = read(hints[key], value, name)
        if cls.__dataclass_fields__[key].metadata.get("is_path"):
            values[key] = expand_path(values[key], name)
    return cls(**values)


def expand_path(path: str, key: str) -> str:
    """Write out ~ and $VARIABLES in the path that an option gives. Raises ConfigError for unset ones."""
    whole = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", whole):
        raise ConfigError(f"{key}={path}: {unset[0]} is not set")
    return whole


def _parse(hint: Any, value: Any, name: str) -> Any:
    """Read `value`, which is text or a list of texts, as the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `T | None` is used
        return None if value in ("null", "~", "") else _parse(args[0], value, name)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name}={value!r}: expected a list")
        return tuple(_parse(args[0], item, name) for item in value)
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: expected one value")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(args)}")
    if hint is str:
        return value
    if hint is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        number = float(value.replace(".inf", "inf"))  # .inf is YAML's spelling
        if hint is int and number.is_integer():
            return int(value) if value.lstrip("+-").isdigit() else int(number)  # exact where 1e3 need not be
        if hint is float and not math.isnan(number):
            return number
    except ValueError:
        pass
    raise ConfigError(f"{name}={value!r}: expected {hint.__name__}")


def fail_clearly(main: Callable[[], None]) -> None:
    """Run a script's main(). The project's own errors end it with one line and exit code 2, others with a traceback.

    It ends at once: a rank must not wait, in the clean-up of its process group or for a hanging environment's thread,
    while torchrun waits for it to fail.
    """
    try:
        return main()
    except (ConfigError, FileNotFoundError) as error:
        code, message = 2, f"error: {error}\n"
    except KeyboardInterrupt:
        code, message = 130, "interrupted\n"
    except Exception as error:
        code, message = 1, traceback.format_exc()
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            code, message = 2, f"error: {error.strerror}: {error.filename or 'a file being written'}\n"
    sys.stdout.flush()  # os._exit would lose what is still buffered
    print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    arguments = parser(__doc__, config_required=False).parse_args()
    fail_clearly(lambda: print(dump(load(arguments.config, arguments.set)) if arguments.config else manual()))

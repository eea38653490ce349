"""Every option of the project: one tree of frozen dataclasses, which is the reference manual.

A YAML file holds only what differs from the defaults and may name one other file as its `base:`.  On the command line
`--set train.lr=2e-6 judge.enabled=false` overrides a field.  A value is text until its field's type says how to read it
(so `name: 007` keeps its zeros and 1e-6 is a number).  An unknown or repeated key or a value of the wrong type is an
error that names the key and what is valid: nothing is ignored, nothing is guessed.

    config = load("configs/quickstart.yaml", ["train.lr=1e-4"])
    python config.py configs/quickstart.yaml        # print the resolved tree
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Sequence
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

TASK_TYPES = {
    "alfworld": (  # in the order of its own ids 1 to 6
        "pick_and_place_simple",
        "look_at_obj_in_light",
        "pick_clean_then_place_in_recep",
        "pick_heat_then_place_in_recep",
        "pick_cool_then_place_in_recep",
        "pick_two_obj_and_place",
    ),
    "scienceworld": (  # in the order of their published numbers 0 to 28; use-thermometer, 29, is in no published split
        "boil",
        "change-the-state-of-matter-of",
        "chemistry-mix",
        "chemistry-mix-paint-secondary-color",
        "chemistry-mix-paint-tertiary-color",
        "find-animal",
        "find-living-thing",
        "find-non-living-thing",
        "find-plant",
        "freeze",
        "grow-fruit",
        "grow-plant",
        "identify-life-stages-1",
        "identify-life-stages-2",
        "inclined-plane-determine-angle",
        "inclined-plane-friction-named-surfaces",
        "inclined-plane-friction-unnamed-surfaces",
        "lifespan-longest-lived",
        "lifespan-longest-lived-then-shortest-lived",
        "lifespan-shortest-lived",
        "measure-melting-point-known-substance",
        "measure-melting-point-unknown-substance",
        "melt",
        "mendelian-genetics-known-plant",
        "mendelian-genetics-unknown-plant",
        "power-component",
        "power-component-renewable-vs-nonrenewable-energy",
        "test-conductivity",
        "test-conductivity-of-unknown-substances",
    ),
}
HELD_OUT_TYPES = {  # published: what level L2 evaluates on and never trains on
    "alfworld": TASK_TYPES["alfworld"][4:],
    "scienceworld": tuple(TASK_TYPES["scienceworld"][index] for index in (1, 4, 8, 11, 13, 16, 18, 21, 24, 28)),
}


SIMPLIFICATIONS = (
    "easy",
    "teleportAction",
    "openDoors",
    "openContainers",
    "selfWateringFlowerPots",
    "noElectricalAction",
)


class ConfigError(Exception):
    """A mistake in a config file or in --set: the message names the key and the cure."""


@dataclass(frozen=True)
class ModelConfig:
    # a Hugging Face id or folder, a checkpoint of a run, or "tiny" (built from scratch)
    path: str = "Qwen/Qwen2.5-1.5B-Instruct"
    # what trainer and engine compute in; auto: bfloat16 on CUDA, float32 on CPU. The trainer's weights are float32
    # always: in bfloat16 the steps of a learning rate of 1e-6 would be rounded away
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # transformers' attn_implementation
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    tune: Literal["full", "lora", "qlora"] = (
        "full"  # all weights; an adapter of all linear layers; that on 4-bit weights
    )
    lora_rank: int = 32
    lora_alpha: float = 64.0
    # weights in shards over the ranks (FSDP2) or whole on each; auto: sharded on CUDA where all of them are trained
    shard: Literal["auto", "always", "never"] = "auto"
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, 1/3 more time
    tiny_hidden: int = 128  # the four sizes of a "tiny" model
    tiny_layers: int = 4
    tiny_heads: int = 4
    tiny_vocab: int = 1536


@dataclass(frozen=True)
class EnvConfig:
    name: Literal["alfworld", "scienceworld"] = "alfworld"
    # who plays ALFWorld: games.py, or TextWorld itself (about 400 times slower)
    engine: Literal["native", "textworld"] = "native"
    # ALFWorld: the folder that holds json_2.1.1/; empty: $ALFWORLD_DATA. ScienceWorld: where gold paths are kept;
    # empty: data/scienceworld
    data: str = ""
    level: Literal["L0", "L1", "L2"] = "L0"  # training level: L0 and L1 train on task_types, L2 on those not held out
    task_types: tuple[str, ...] = ()  # task types of levels L0 and L1; empty: all of TASK_TYPES
    held_out_types: tuple[str, ...] = ()  # what level L2 evaluates on and never trains on; empty: HELD_OUT_TYPES
    max_steps: int = 30  # actions per episode
    history: int = 2  # past (observation, action) pairs shown in the prompt
    # ScienceWorld alone:
    simplification: str = "easy"  # the simulator's presets (SIMPLIFICATIONS), comma-separated
    max_moves: int = 100  # simulated time after which an episode is over (as published); a `wait` takes 11
    list_valid: bool = False  # list all valid actions at every step, to know what is available; 5 to 10 times slower
    machines: int = 1  # Java machines per rank, which the environments share
    machine_heap_mib: int = 1024  # the memory of each machine's heap; shared by its environments

    @property
    def types(self) -> tuple[str, ...]:
        """The task types of levels L0 and L1."""
        return self.task_types or TASK_TYPES[self.name]

    @property
    def held_out(self) -> tuple[str, ...]:
        """The task types that level L2 evaluates on."""
        return self.held_out_types or HELD_OUT_TYPES[self.name]

    @property
    def trained(self) -> tuple[str, ...]:
        """The task types that training at env.level sees."""
        return tuple(kind for kind in self.types if self.level != "L2" or kind not in self.held_out)


@dataclass(frozen=True)
class AlgoConfig:
    advantage: Literal["grpo", "gigpo", "rlvmr", "ppo"] = "grpo"  # a key of losses.ADVANTAGES
    divide_by_std: bool = True  # divide group-centred values by their standard deviation; false: Dr.GRPO, mean_norm
    # group statistics over step rows (as published) or over episodes, each by its first row
    stats_over: Literal["steps", "trajectories"] = "steps"
    gamma: float = 0.95  # discount of the step returns (GiGPO)
    step_weight: float = 1.0  # weight of the step-level advantage: GiGPO's omega, RLVMR's alpha
    similarity: float | None = None  # GiGPO: observations this alike (0 to 1) share an anchor, for instance 0.95
    # PPO: discount over the tokens of one reply, lambda of its generalised advantage, bound of a value's change
    token_gamma: float = 1.0
    token_lambda: float = 1.0
    value_clip: float = 0.5
    # which replies are invalid: those not well formed (as published), or also those whose action is not on offer
    invalid: Literal["malformed", "unavailable"] = "malformed"
    invalid_penalty: float = 0.1  # subtracted from the score of a row whose reply was invalid
    # replies cut off at max_response_tokens: train on them, leave them out of the loss and its denominators, or take
    # overlong_penalty from their score, and a rising part of it from those that end in the last overlong_cache tokens
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    overlong_penalty: float = 1.0
    overlong_cache: int = 0
    # factor on negative advantages; below 1 a small model unlearns less of what it can read
    negative_weight: float = 1.0
    # NTHR: weaken the penalty on tokens of lost replies that pull won ones along; compared within the task's episodes,
    # or within those rows of them that share an anchor
    nthr: bool = False
    nthr_group: Literal["task", "anchor_state"] = "task"
    nthr_beta: float = 1.0  # factor on the threshold of selection
    nthr_eta: float | None = None  # factor on the advantage of selected tokens; null: 2 |0.5 - share of won episodes|
    policy_loss: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"  # a key of losses.POLICY_LOSSES
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    dual_clip: float | None = None  # the loss of a negative advantage A is at most this times |A|, for instance 3
    aggregate: Literal["token", "sequence", "dr"] = "token"  # mean over tokens or rows, or sum over a constant length
    kl: float = 0.01  # coefficient of the KL term against the initial model; 0: no reference model is kept
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy: float = 0.0  # coefficient of the entropy bonus
    # factor on the loss where engine and trainer compute different log-probs: the ratio of their probabilities, of each
    # token, of the reply, or its tokens' geometric mean; cut off at importance_high, or 0 and left out of denominators
    # where it is not within [importance_low, importance_high]
    importance: Literal["none", "truncate", "mask"] = "none"
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    importance_low: float = 0.5
    importance_high: float = 2.0


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM where it is installed
    groups: int = 16  # games per iteration, over all ranks
    group_size: int = 8  # episodes per game
    redraws: int = 0  # how often a group whose episodes all have the same return is replaced by another game's (DAPO)
    temperature: float = 1.0
    max_prompt_tokens: int = 2048  # a longer prompt drops its oldest history first
    max_response_tokens: int = 512
    concurrency: int = 128  # episodes in flight per rank
    success_reward: float = 10.0  # reward of the step that wins
    kv_cache_gib: float = 0.5  # CPU engine's cache
    tensor_parallel: int = 1  # ranks per engine, for a model that one GPU cannot hold beside the trainer
    sleep: bool = True  # CUDA: the engine gives its memory back while the models are updated
    gpu_memory_utilization: float = 0.5  # share of GPU memory that vLLM may take
    canary_bound: float = 0.2  # largest allowed mean |log-prob difference| between engine and trainer after a sync


@dataclass(frozen=True)
class JudgeConfig:
    enabled: bool = False  # GCD: co-train the actor to judge actions
    weight: float = 1.0  # factor on L_GCD
    questions: int = 16  # judged steps per iteration, over all ranks, half of them good where labels allow
    group_size: int = 8  # answers per question
    max_prompt_tokens: int = 3072
    max_response_tokens: int = 512
    # who labels steps the rules leave open: nobody, the environment's own expert, or a model behind an endpoint
    teacher: Literal["none", "expert", "openai"] = "none"
    teacher_steps: int = 64  # unlabelled steps the teacher is shown per iteration, over all ranks
    # teacher=openai: any OpenAI-compatible endpoint; the paper's is DeepSeek-V3
    base_url: str = "https://api.deepseek.com"
    model: str = "deepseek-chat"
    key_env: str = "DEEPSEEK_API_KEY"  # the environment variable that holds the key; empty: the endpoint needs none
    votes: int = 1  # answers asked per step
    agreement: Literal["majority", "unanimous"] = "majority"  # of the votes, for a label
    teacher_temperature: float = 0.0
    concurrency: int = 16  # requests in flight per rank
    timeout_s: float = 60.0
    retries: int = 4  # of a request that met 429, 5xx, a time-out or a dropped connection; pauses grow
    max_answer_tokens: int = 1024
    max_requests: int = 100_000  # of the whole run; after that nothing is asked
    max_tokens: int = 200_000_000  # likewise, prompts and answers together
    cache: str = "data/teacher"  # folder of the answers


@dataclass(frozen=True)
class GuidelinesConfig:
    every: int = 0  # iterations between refreshes of the golden rules; 0: none are made
    file: str = ""  # text file of rules to start with, one a line; with every=0 they stay
    # who distils advice into a rule: the teacher, the actor, or nobody (the theme's most central sentence is the rule);
    # auto: the teacher where it is openai, else the actor
    writer: Literal["auto", "teacher", "actor", "medoid"] = "auto"
    shown: int = 32  # advice sentences of a theme that the writer is shown, the most frequent first
    pool: int = 512  # newest advice sentences kept
    max_chars: int = 200  # length cap of one rule
    themes: tuple[str, ...] = (
        "explore unvisited places systematically while searching for the object",
        "avoid repeating actions that did not change anything",
        "read the current observation and choose an admissible action",
        "go to the destination and finish the task once the object is held",
    )


@dataclass(frozen=True)
class TrainConfig:
    iterations: int = 200
    lr: float = 1e-6
    critic_lr: float = 1e-5  # of PPO's value model
    warmup: int = 0  # iterations of linear warm-up
    schedule: Literal["constant", "linear"] = "constant"  # linear: falls by iterations' share, to 0 after the last one
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # with moments in float32, or in 8 bits (bitsandbytes)
    max_grad_norm: float = 1.0
    max_bad_steps: int = 3  # steps in a row that are skipped for a gradient that is not finite; one more ends the run
    timeout_minutes: float = 60.0  # a rank that others have waited for so long has hung, and the run ends
    rows_per_update: int = 256  # actor rows per optimizer step, over all ranks; the judge's rows are dealt out alike
    tokens_per_micro_batch: int = 16384
    old_logprobs: Literal["trainer", "engine"] = "trainer"  # whose log-probs the policy ratio is taken against
    checkpoint_every: int = 20
    keep_checkpoints: int = 2  # older ones are deleted; the last one is always kept
    eval_every: int = 0  # iterations between evaluations on eval.levels; 0: only evaluate.py evaluates
    episodes_every: int = 1  # iterations between dumps of all episodes
    coupling_every: int = 1  # iterations between looks at how rows' gradients are coupled (telemetry.py); 0: never
    coupling_rows: int = 48  # rows looked at, over all ranks: a third good, a third flawed, a third any
    wandb: str = ""  # a project of Weights & Biases that is shown the metrics, too; empty: none


@dataclass(frozen=True)
class SFTConfig:
    # generative: plus critic rows; value: plus judged steps for a value head, a classifier; reading: random behaviour,
    # for `make base`
    variant: Literal["vanilla", "generative", "value", "reading"] = "vanilla"
    writer: Literal["template", "teacher"] = (
        "template"  # of thoughts and critiques; the teacher is judge.teacher=openai
    )
    episodes: int = 300  # expert (reading: random) episodes
    critic_examples: int = 100  # judged steps (generative, value)
    noise: float = 0.0  # share of random actions played, but not taught, in the episodes
    idle: float = 0.0  # how often the expert first does something pointless, and teaches it: flaws for RL to remove
    guided: float = 0.0  # share of prompts that carry guidelines
    # give the fixed passages of prompts that the tokenizer lacks tokens of their own: shorter prompts for a tiny model
    phrases: bool = False
    epochs: int = 5
    lr: float = 1e-5
    warmup_ratio: float = 0.1
    rows_per_update: int = 16  # over all ranks
    tokens_per_micro_batch: int = 16384
    prompt_loss: float = 0.0  # weight of the loss on prompt tokens; 0: the reply alone
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class EvalConfig:
    levels: tuple[str, ...] = ("L0", "L1", "L2")
    games: int = 0  # play only N games of each level's fixed list, always the same; 0: all
    seeds: int = 3  # every game is played once per sampling seed
    temperature: float = 0.4


@dataclass(frozen=True)
class Config:
    name: str = "run"  # the run's folder is runs/<name>
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # which reasoning block the reply must open with: <think>, or one of RLVMR's four, with the plan kept in the prompt
    prompt_style: Literal["think", "rlvmr"] = "think"
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


def check(config: Config) -> None:
    """Constraints between fields. Raises ConfigError."""
    known = TASK_TYPES[config.env.name]
    for name in ("task_types", "held_out_types"):
        for task_type in getattr(config.env, name):
            if task_type not in known:
                raise ConfigError(f"env.{name}: unknown task type {task_type!r}{_nearest(task_type, known)}")
    for level in config.eval.levels:
        if level not in ("L0", "L1", "L2"):
            raise ConfigError(f"eval.levels: unknown level {level!r}; levels are L0, L1, L2")
    positive = {
        "model.lora_rank": config.model.lora_rank,
        "env.max_steps": config.env.max_steps,
        "env.max_moves": config.env.max_moves,
        "env.machines": config.env.machines,
        "env.machine_heap_mib": config.env.machine_heap_mib,
        "rollout.groups": config.rollout.groups,
        "rollout.group_size": config.rollout.group_size,
        "rollout.temperature": config.rollout.temperature,
        "rollout.concurrency": config.rollout.concurrency,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
        "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "judge.questions": config.judge.questions,
        "judge.group_size": config.judge.group_size,
        "judge.max_response_tokens": config.judge.max_response_tokens,
        "guidelines.pool": config.guidelines.pool,
        "train.rows_per_update": config.train.rows_per_update,
        "train.tokens_per_micro_batch": config.train.tokens_per_micro_batch,
        "train.timeout_minutes": config.train.timeout_minutes,
        "train.checkpoint_every": config.train.checkpoint_every,
        "train.episodes_every": config.train.episodes_every,
        "train.coupling_rows": config.train.coupling_rows,
        "sft.episodes": config.sft.episodes,
        "sft.epochs": config.sft.epochs,
        "sft.rows_per_update": config.sft.rows_per_update,
        "sft.tokens_per_micro_batch": config.sft.tokens_per_micro_batch,
        "eval.seeds": config.eval.seeds,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{key} is {value}; it must be positive")
    check_algo(config)
    not_negative = {
        "env.history": config.env.history,
        "eval.games": config.eval.games,  # 0: all
        "eval.temperature": config.eval.temperature,
        "rollout.redraws": config.rollout.redraws,
        "train.lr": config.train.lr,
        "train.critic_lr": config.train.critic_lr,
        "train.eval_every": config.train.eval_every,
        "train.coupling_every": config.train.coupling_every,
        "train.max_bad_steps": config.train.max_bad_steps,
        "sft.lr": config.sft.lr,
        "guidelines.every": config.guidelines.every,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{key} is {value}; it must not be negative")
    if config.judge.enabled and config.judge.group_size < 2:
        raise ConfigError("judge.group_size is 1; a group-relative judge loss needs at least 2 answers per question")
    for preset in filter(None, config.env.simplification.split(",")):
        if preset not in SIMPLIFICATIONS:
            raise ConfigError(f"env.simplification: unknown preset {preset!r}{_nearest(preset, SIMPLIFICATIONS)}")
        kinds = (*config.env.types, *config.env.held_out)
        if preset == "noElectricalAction" and any(
            "power-component" in kind or "conductivity" in kind for kind in kinds
        ):
            raise ConfigError(
                "env.simplification=noElectricalAction leaves power-component and test-conductivity without a "
                "solution; name other env.task_types and env.held_out_types"
            )
    if config.env.name == "scienceworld" and (config.sft.noise or config.sft.idle or config.sft.variant == "reading"):
        raise ConfigError("sft.noise, sft.idle and sft.variant=reading are made of ALFWorld's actions; leave them out")
    if config.guidelines.every and not config.judge.enabled:
        raise ConfigError("guidelines.every needs judge.enabled=true: golden rules are distilled from critiques")
    check_model(config)
    check_teacher(config)


def check_model(config: Config) -> None:
    """Constraints of how the model is held. Raises ConfigError."""
    if config.model.path == "tiny" and config.model.tune != "full":
        raise ConfigError("model.path=tiny is made from nothing: model.tune=full")
    if config.model.tune == "qlora" and config.model.shard == "always":
        raise ConfigError("4-bit weights are not sharded: with model.tune=qlora leave model.shard=auto")
    if config.rollout.tensor_parallel > 1 and config.rollout.engine == "transformers":
        raise ConfigError("rollout.tensor_parallel is vLLM's; rollout.engine=transformers has one rank per engine")


def check_algo(config: Config) -> None:
    """Constraints of the method. Raises ConfigError."""
    algo, relative = config.algo, config.algo.advantage != "ppo"
    if relative and config.rollout.group_size < 2:
        raise ConfigError("rollout.group_size is 1; a group-relative advantage needs at least 2 episodes per game")
    if config.rollout.redraws and config.rollout.group_size < 2:
        raise ConfigError("rollout.redraws compares the episodes of a game; it needs rollout.group_size=2 or more")
    if algo.advantage == "rlvmr" and config.prompt_style != "rlvmr":
        raise ConfigError("algo.advantage=rlvmr rewards the tags of prompt_style=rlvmr; set that, too")
    if algo.nthr and not relative:
        raise ConfigError("algo.nthr contrasts the episodes of a group; algo.advantage=ppo has none")
    if algo.importance != "none" and config.train.old_logprobs == "engine":
        raise ConfigError("algo.importance compares engine and trainer; it needs train.old_logprobs=trainer")
    if algo.dual_clip is not None and algo.dual_clip <= 1:
        raise ConfigError(f"algo.dual_clip is {algo.dual_clip}; it bounds a ratio and must be above 1, or null")
    if algo.similarity is not None and not (0 < algo.similarity <= 1 and algo.advantage == "gigpo"):
        raise ConfigError(f"algo.similarity={algo.similarity} must be in (0, 1], and is for algo.advantage=gigpo alone")
    shares = {"algo.clip_low": algo.clip_low}
    shares |= {"algo.gamma": algo.gamma, "algo.token_gamma": algo.token_gamma, "algo.token_lambda": algo.token_lambda}
    for key, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{key} is {value}; it must be between 0 and 1")
    for key in ("clip_high", "value_clip", "overlong_penalty", "kl", "entropy", "step_weight", "invalid_penalty"):
        if getattr(algo, key) < 0:
            raise ConfigError(f"algo.{key} is {getattr(algo, key)}; it must not be negative")
    if not 0 <= algo.importance_low <= 1 <= algo.importance_high:
        raise ConfigError("algo.importance_low and importance_high must enclose 1, the ratio of equal log-probs")
    limits = {"rollout": config.rollout.max_response_tokens}
    limits |= {"judge": config.judge.max_response_tokens} if config.judge.enabled else {}
    for where, limit in limits.items():
        if not 0 <= algo.overlong_cache < limit:
            raise ConfigError(
                f"algo.overlong_cache={algo.overlong_cache} must be less than {where}.max_response_tokens"
            )


def check_teacher(config: Config) -> None:
    """Constraints of whoever labels and writes. Raises ConfigError."""
    judge = config.judge
    if judge.votes > 1 and judge.teacher == "openai" and judge.teacher_temperature == 0:
        raise ConfigError(
            "judge.votes counts equal answers at judge.teacher_temperature=0; raise it, for instance to 0.7"
        )
    for key in ("votes", "concurrency", "timeout_s", "max_answer_tokens"):
        if getattr(judge, key) <= 0:
            raise ConfigError(f"judge.{key} is {getattr(judge, key)}; it must be positive")
    for key, writer in (("guidelines", config.guidelines.writer), ("sft", config.sft.writer)):
        if writer == "teacher" and judge.teacher != "openai":
            raise ConfigError(f"{key}.writer=teacher needs judge.teacher=openai")
    if config.guidelines.file and not Path(config.guidelines.file).is_file():
        raise ConfigError(f"guidelines.file={config.guidelines.file} does not exist; it holds one rule a line")


def check_world(config: Config, world: int) -> None:
    """What is dealt out to the ranks, or to the engines of several ranks, must divide over them. Raises ConfigError."""
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


def run_folder(checkpoint: str | Path) -> Path | None:
    """The run that a checkpoint belongs to, or None for any other model."""
    folder = Path(checkpoint)
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def trained_types(checkpoint: str | Path) -> dict[str, str]:
    """The task types that a checkpoint's run was trained on, or the runs that it started from: type -> run."""
    types: dict[str, str] = {}
    runs: set[Path] = set()
    while (run := run_folder(checkpoint)) and run not in runs and (run / "config.yaml").is_file():
        runs.add(run)
        made = load(run / "config.yaml")
        types = dict.fromkeys(made.env.trained, str(run)) | types
        checkpoint = made.model.path
    return types


def check_lineage(config: Config) -> None:
    """Training at level L2 must not go on from a run that saw a held-out task type. Raises ConfigError."""
    seen = trained_types(config.model.path) if config.env.level == "L2" else {}
    if leaked := [kind for kind in config.env.held_out if kind in seen]:
        raise ConfigError(
            f"env.level=L2 holds out {', '.join(leaked)}, on which {seen[leaked[0]]} was trained: start from a cold "
            "start with env.level=L2, or from another model"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dictionaries and lists, ready for yaml.safe_dump; load() of it gives the same tree."""
    plain = dataclasses.asdict(config)

    def lists(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: lists(value) for key, value in node.items()}
        return [lists(value) for value in node] if isinstance(node, tuple) else node

    return lists(plain)


def save(config: Config, path: Path) -> None:
    """Write the resolved tree as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(config), encoding="utf-8")


def parser(description: str, config_required: bool = True) -> argparse.ArgumentParser:
    """The command line that all scripts share: a config file and --set."""
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


def dump(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


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


def _nearest(key: str, valid: typing.Iterable[str]) -> str:
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
            raise ConfigError(f"unknown key {name}{_nearest(str(key), hints)}")
        read = _build if dataclasses.is_dataclass(hints[key]) else _parse
        values[key] = read(hints[key], value, name)
    return cls(**values)


def _parse(hint: Any, value: Any, name: str) -> Any:
    """`value`, which is text or a list of texts, as the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `T | None` is used
        return None if value in ("null", "~", "") else _parse(args[0], value, name)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name}={value!r}: expected a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{name}={value!r}: expected {len(args)} values")
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


def fail_clearly(main: typing.Callable[[], None]) -> None:
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
    except Exception:
        code, message = 1, traceback.format_exc()
    sys.stdout.flush()  # os._exit would lose what is still buffered
    print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    fail_clearly(lambda: print(dump(load(arguments.config, arguments.set))))

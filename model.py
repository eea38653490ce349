"""The actor and PPO's critic: load a model and tokenizer, full or with an adapter, log-probs of tokens, checkpoints.

A "row" is one prompt and one response, as token ids.  Log-probs are computed on response tokens only: the backbone runs
over the whole row, the lm_head on the positions that predict a response token, in chunks that are recomputed in the
backward pass, so that no [tokens, vocabulary] tensor of the prompts ever exists.  Rows are packed end to end on CUDA
(positions restart at each row, which transformers reads as the border that attention must not cross) and padded to the
longest of a length-sorted micro-batch on CPU, where the packed attention mask costs more than the padding.

What is trained is float32: all weights (model.tune=full), or a LoRA adapter of all linear layers on a base that is
frozen in the dtype computed in (lora) or in 4 bits (qlora).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from config import Config, ConfigError
from ranks import full, gathered, is_sharded, pick_device, progress_bar, shard, whole
from tinymodel import add_phrases, build_tiny

hf_logging.disable_progress_bar()

ENTROPY_BLOCK = 2**21  # log-probs that are turned into entropies at the same time: they stay in a processor's cache
LOGIT_CHUNK = 2048  # response tokens whose logits exist at the same time
PROBE = "Your task is to: put two soapbar in cabinet 12.\n<think>Need it.</think><action>go to toilet 1</action>"


@dataclass
class Actor:
    """A model with its tokenizer, on its device.

    `dtype` is what it computes in, under autocast. `packed`: rows are laid end to end. `base`: the folder or hub id
    that has its config.json; with an adapter that of the model under it.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype = torch.float32
    packed: bool = False
    base: str = ""

    @property
    def inner(self) -> torch.nn.Module:
        """transformers' model, without the adapter's wrapping."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: one user message in the model's chat format, up to where the reply begins."""
        chat = [{"role": "user", "content": text}]
        chat_text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(chat_text, add_special_tokens=False)["input_ids"]

    def encode_reply(self, text: str) -> list[int]:
        """Token ids of a reply, closed by the end-of-turn token; for supervised rows alone."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_actor(
    config: Config, corpus: Sequence[str] = (), path: str = "", train: bool = True, phrases: bool = False
) -> Actor:
    """The actor of `path` (default: config.model.path), in evaluation mode.

    "tiny" builds one from scratch (tokenizer trained on `corpus`, weights from config.seed); anything else is a
    Hugging Face id or folder, or that of an adapter, which with model.tune=full becomes part of the weights. Without
    `train` it is whole on every rank, frozen, in the dtype it computes in. `phrases`: see tinymodel.add_phrases. Raises
    ConfigError if it cannot be found.
    """
    path = path or config.model.path
    if path == "tiny":
        model, tokenizer = build_tiny(config, corpus)
        return place(config, model, tokenizer, "tiny", "", train)
    check_path(path)
    adapter = path if is_adapter(path) else ""
    base = base_of(path)
    try:
        tokenizer = load_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(base, **_how_to_load(config, train))
    except (OSError, SafetensorError) as error:  # for instance a hub id without a network, or half a file
        raise ConfigError(f"no model at {base}: {' '.join(str(error).split())}") from None
    if phrases:
        add_phrases(model, tokenizer)
    return place(config, model, tokenizer, base, adapter, train)


def load_critic(config: Config, actor: Actor, path: str) -> Actor:
    """PPO's critic: the model of `path` with a scalar head in the lm_head's place, in evaluation mode.

    The head of a language model's checkpoint starts at 0: the first values are 0, the same on every rank.
    """
    adapter = path if is_adapter(path) else ""
    base = base_of(path)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would tell that the head is new
    shape = AutoConfig.from_pretrained(base, num_labels=1)
    shape.classifier_dropout = 0.0
    model, report = AutoModelForTokenClassification.from_pretrained(
        base, config=shape, output_loading_info=True, **_how_to_load(config, train=True)
    )
    hf_logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
    model.score.float()
    return place(config, model, actor.tokenizer, base, adapter, train=True, task="TOKEN_CLS")


def load_reference(config: Config, actor: Actor) -> Actor | None:
    """What a KL term holds the actor to: the model that the run started from, also after a resume.

    With an adapter it is the actor's own base, with the adapter that the run started from, if there was one. Else it is
    a model of its own, which waits in main memory (`as_reference`).
    """
    if config.algo.kl == 0:
        return None
    if config.model.tune == "full":
        reference = load_actor(config, train=False)
        reference.model.to("cpu")
        return reference
    if is_adapter(config.model.path):
        actor.model.load_adapter(config.model.path, "initial", is_trainable=False)
        actor.model.set_adapter("default")
    return actor


@contextmanager
def as_reference(reference: Actor, actor: Actor) -> Iterator[Actor]:
    """The reference, ready to score: on the device, or the actor with the adapter that is being trained taken out."""
    if reference is not actor:
        reference.model.to(reference.device)
        yield reference
        reference.model.to("cpu")
    elif "initial" in actor.model.peft_config:
        actor.model.set_adapter("initial")
        yield actor
        actor.model.set_adapter("default")
    else:
        with actor.model.disable_adapter():
            yield actor


def is_adapter(path: str) -> bool:
    """Whether a folder holds an adapter, as peft saves it, and not a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path: str) -> str:
    """The folder or hub id of the whole model that `path` is or is an adapter of; folders are resolved, for `latest`
    will point elsewhere. Raises ConfigError where it is gone."""
    base = path
    if is_adapter(path):
        base = json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
    if base != path:
        check_path(base)
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def compute_dtype(config: Config) -> torch.dtype:
    """What trainer and engine compute in."""
    auto = "bfloat16" if pick_device(config).type == "cuda" else "float32"
    return getattr(torch, auto if config.model.dtype == "auto" else config.model.dtype)


def shards(config: Config) -> bool:
    """Whether weights that are trained are sharded over the ranks."""
    alone = dist.get_world_size() == 1 if dist.is_initialized() else True
    auto = config.model.tune == "full" and pick_device(config).type == "cuda"
    return not alone and {"auto": auto, "always": True, "never": False}[config.model.shard]


def _how_to_load(config: Config, train: bool) -> dict[str, Any]:
    """from_pretrained's arguments: what is trained comes in float32, what is frozen in the dtype computed in."""
    whole_in_float32 = train and config.model.tune == "full"
    how: dict[str, Any] = {"dtype": torch.float32 if whole_in_float32 else compute_dtype(config)}
    how["attn_implementation"] = config.model.attention
    if config.model.tune == "qlora" and train:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=how["dtype"]
        )
        how["device_map"] = {"": pick_device(config)}
    return how


def place(
    config: Config,
    model: torch.nn.Module,
    tokenizer: Any,
    base: str = "",
    adapter: str = "",
    train: bool = True,
    task: str = "CAUSAL_LM",
) -> Actor:
    """The model on this rank's device, in evaluation mode, with its adapter, in its shards."""
    device, tune = pick_device(config), config.model.tune
    if config.model.gradient_checkpointing and train:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tune != "full" or adapter:
        model = _adapt(config, model, base, adapter, task)
    if tune == "full" and adapter:
        model = model.merge_and_unload()
    for layer in model.modules():  # some CPUs repack 4-bit weights when they first score, and cannot train them then
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if not train:
        model.requires_grad_(False)
    actor = Actor(model.eval(), tokenizer, device, compute_dtype(config), packed=device.type == "cuda", base=base)
    if train and shards(config):
        shard(model, actor.inner.base_model.layers, device, actor.dtype)
    elif tune != "qlora" or not train:
        model.to(device)
    return actor


def _adapt(config: Config, model: torch.nn.Module, base: str, adapter: str, task: str) -> PeftModel:
    """The model with a LoRA adapter on all linear layers: a new one, or that of the folder `adapter`."""
    sizes = {"r": config.model.lora_rank, "lora_alpha": config.model.lora_alpha}
    if adapter:
        made = json.loads((Path(adapter) / "adapter_config.json").read_text())
        found = {key: made[key] for key in sizes}
        if config.model.tune != "full" and found != sizes:
            raise ConfigError(
                f"the adapter {adapter} has rank {found['r']} and alpha {found['lora_alpha']}: "
                "set model.lora_rank and model.lora_alpha to these"
            )
        sizes = found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the same on every rank
        adapted = get_peft_model(model, LoraConfig(**sizes, target_modules="all-linear", task_type=task))
    adapted.peft_config["default"].base_model_name_or_path = base
    if adapter:
        report = set_peft_model_state_dict(adapted, load_peft_weights(adapter, device="cpu"))
        if report.unexpected_keys:
            raise ConfigError(f"the adapter {adapter} does not fit {base}: it has {report.unexpected_keys[0]}, ...")
    return adapted


def check_path(path: str) -> None:
    """A local model folder must be whole. Raises ConfigError; a hub id ("owner/name") passes."""
    folder = Path(path)
    if folder.is_dir():
        for needed in ("adapter_config.json" if is_adapter(path) else "config.json", "tokenizer.json"):
            if not (folder / needed).is_file():
                raise ConfigError(f"{path} is not a model folder: it has no {needed}")
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(f"{path} is not a model folder: it has no *.safetensors weights")
    elif path.count("/") != 1 or path.startswith((".", "/", "runs/", "assets/")):
        raise ConfigError(f"no model at {path}: the folder does not exist, and it is not a hub id either")


def load_tokenizer(path: str) -> Any:
    """The tokenizer exactly as tokenizer.json describes it.

    transformers' AutoTokenizer silently replaces a custom pre-tokenizer by Qwen's wherever config.json says "qwen2", so
    folders that name the generic class are read by it, and every folder is checked against the `tokenizers` library.
    """
    folder = Path(path)
    own = False
    if (folder / "tokenizer_config.json").is_file():
        tokenizer_class = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
        own = tokenizer_class in ("PreTrainedTokenizerFast", "TokenizersBackend")
    tokenizer = (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path)
    if folder.is_dir():
        expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROBE, add_special_tokens=False).ids
        found = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise ConfigError(
                f"{path}: transformers reads the tokenizer as {len(found)} tokens, tokenizer.json as "
                f"{len(expected)}, for the same text; the model would see garbage"
            )
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Rows and their log-probs


@dataclass
class Row:
    """One prompt and response to train on, with what the loss needs; `response_ids` are the sampled tokens [T]."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray | None = None  # [T] the engine's, at sampling time
    advantage: float | np.ndarray = 0.0  # of all its tokens, or [T]
    judge: bool = False  # a critique (L_GCD) rather than an action (L_GRPO)
    won: bool = False  # its episode was
    trajectory: int = -1  # its episode
    group: int = -1  # the rows that NTHR contrasts it with
    truncated: bool = False  # the reply was cut off at its limit of tokens
    weakened: int = 0  # tokens whose advantage NTHR changed
    old_logprobs: np.ndarray | None = None  # [T] what the policy's ratio is taken against
    ref_logprobs: np.ndarray | None = None  # [T] the initial model's
    weights: np.ndarray | None = None  # [T] factors on the loss; 0: in no denominator either. None: all 1
    values: np.ndarray | None = None  # [T] the critic's before the update (PPO)
    returns: np.ndarray | None = None  # [T] what they are trained towards

    @classmethod
    def blank(cls) -> Row:
        """What a rank computes, for nothing, while others compute the micro-batches that they have more of."""
        return cls(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def counted(self) -> int:
        """Response tokens in the loss's denominators."""
        return len(self.response_ids) if self.weights is None else int((self.weights > 0).sum())


def micro_batches(rows: Sequence[Row], max_tokens: int, packed: bool) -> list[list[int]]:
    """Indices of `rows` in groups whose padded (packed: total) token count stays within `max_tokens`, longest first.

    A single row longer than the budget makes a group of its own. Every row is in exactly one group.
    """
    order = sorted(range(len(rows)), key=lambda index: -rows[index].tokens)
    groups: list[list[int]] = []
    used = 0
    for index in order:
        tokens = rows[index].tokens
        longest = rows[groups[-1][0]].tokens if groups else 0
        cost = used + tokens if packed else longest * (len(groups[-1]) + 1 if groups else 0)
        if not groups or cost > max_tokens:
            groups.append([index])
            used = tokens
        else:
            groups[-1].append(index)
            used += tokens
    return groups


def token_logprobs(
    actor: Actor,
    rows: Sequence[Row],
    temperature: float = 1.0,
    entropy: Literal["none", "value", "gradient"] = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of every response token of `rows`, one row after the other: two float32 tensors [T].

    A collective operation where weights are sharded (`ranks.whole`). The logits are divided by `temperature`, as the
    engine's were when it sampled. Entropies cost time, and with a gradient memory, so "none" (zeros) leaves them out.
    """
    return whole(actor.model, lambda: head_logprobs(actor, *last_hidden(actor, rows), temperature, entropy))


def last_hidden(actor: Actor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head is given where each response token of `rows` is predicted, and the tokens: [T, H], int64 [T]."""
    device, packed = actor.device, actor.packed
    lengths = [row.tokens for row in rows]
    width = sum(lengths) if packed else max(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if packed else np.arange(len(rows)) * width
    ids = np.zeros(width if packed else len(rows) * width, dtype=np.int64)
    position = np.zeros_like(ids)
    source, target = [], []  # flat position that predicts each response token; the token
    for row, start, length in zip(rows, starts, lengths, strict=True):
        ids[start : start + length] = np.concatenate([row.prompt_ids, row.response_ids])
        position[start : start + length] = np.arange(length)
        source.append(np.arange(start + len(row.prompt_ids) - 1, start + length - 1))
        target.append(row.response_ids)
    shape = (1, width) if packed else (len(rows), width)
    input_ids = torch.from_numpy(ids.reshape(shape)).to(device)  # [1, T] or [B, L]
    position_ids = torch.from_numpy(position.reshape(shape)).to(device) if packed else None
    with actor.autocast():
        backbone = actor.inner.base_model
        hidden = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    hidden_TH = hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(source)).to(device)]  # [T, H]
    target_T = torch.from_numpy(np.concatenate(target).astype(np.int64)).to(device)  # [T]
    return hidden_TH, target_T


def head_logprobs(
    actor: Actor,
    hidden_TH: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float,
    entropy: Literal["none", "value", "gradient"] = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of token_logprobs: from hidden states to log-probs and entropies, two float32 tensors [T]."""
    head = actor.inner.get_output_embeddings()

    def score(hidden_C: torch.Tensor, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with actor.autocast():
            logits_CV = head(hidden_C).float().div_(temperature)  # [C, V]
        logp_CV = logits_CV.log_softmax(-1)  # [C, V]
        logp_C = logp_CV.gather(-1, target_C[:, None])[:, 0]  # [C]
        if entropy == "none":
            return logp_C, torch.zeros_like(logp_C)
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            blocks = logp_CV.split(max(1, ENTROPY_BLOCK // logp_CV.shape[-1]))
            return logp_C, -torch.cat([(logp_BV.exp() * logp_BV).sum(-1) for logp_BV in blocks])

    parts = []
    for hidden_C, target_C in zip(hidden_TH.split(LOGIT_CHUNK), target_T.split(LOGIT_CHUNK), strict=True):
        recompute = torch.is_grad_enabled() and len(hidden_TH) > LOGIT_CHUNK
        part = checkpoint(score, hidden_C, target_C, use_reentrant=False) if recompute else score(hidden_C, target_C)
        parts.append(part)
    logps, entropies = zip(*parts, strict=True)  # not `entropy`: score() reads that again in the backward pass
    return torch.cat(logps), torch.cat(entropies)


def token_values(critic: Actor, rows: Sequence[Row]) -> torch.Tensor:
    """The critic's value where each response token of `rows` is predicted, in units of reward: float32 [T]."""

    def score() -> torch.Tensor:
        hidden_TH, _ = last_hidden(critic, rows)  # [T, H]
        return critic.inner.score(hidden_TH.float())[:, 0]  # [T] not under autocast: bfloat16 would round returns of 10

    return whole(critic.model, score)


def output_errors(
    actor: Actor, hidden_TH: torch.Tensor, target_T: torch.Tensor, logp_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """One-hot of each token minus the policy's probabilities, over the tokens that occur in target_T: [T, V], float32.

    The probabilities are the whole vocabulary's, not renormalised: logp_T gives their denominator.
    """
    head = actor.inner.get_output_embeddings()
    vocabulary, index_T = target_T.unique(return_inverse=True)  # [V], [T]
    with actor.autocast():  # as logp_T was computed
        error_TV = torch.nn.functional.linear(hidden_TH, head.weight[vocabulary]).float() / temperature  # [T, V]
    total_T = error_TV.gather(1, index_T[:, None])[:, 0] - logp_T  # [T] log of the softmax's denominator
    error_TV.sub_(total_T[:, None]).exp_().neg_()  # in place: this is the largest tensor of a run
    return error_TV.scatter_add_(1, index_T[:, None], torch.ones_like(logp_T)[:, None])  # [T, V]


@torch.no_grad()
def all_logprobs(actor: Actor, rows: Sequence[Row], max_tokens: int, temperature: float) -> list[np.ndarray]:
    """Log-probs of every row's response tokens without gradient: a list of float32 arrays, in the order of `rows`."""
    return _by_row(actor, rows, max_tokens, lambda part: token_logprobs(actor, part, temperature)[0])


@torch.no_grad()
def all_values(critic: Actor, rows: Sequence[Row], max_tokens: int) -> list[np.ndarray]:
    """token_values of every row without gradient: a list of float32 arrays, in the order of `rows`."""
    return _by_row(critic, rows, max_tokens, lambda part: token_values(critic, part))


def _by_row(actor: Actor, rows: Sequence[Row], max_tokens: int, compute: Callable) -> list[np.ndarray]:
    result: list[Any] = [None] * len(rows)
    with gathered(actor.model):
        for group in progress_bar(micro_batches(rows, max_tokens, actor.packed), desc="score", unit=" micro-batches"):
            value_T = compute([rows[index] for index in group])  # [T]
            lengths = [len(rows[index].response_ids) for index in group]
            for index, part in zip(group, value_T.split(lengths), strict=True):
                result[index] = part.float().cpu().numpy()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Weights for the engine, and checkpoints


def named_weights(actor: Actor) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by the name that the model has without adapter and shards, one by one: whole, the adapter added in,
    in the dtype computed in. Nothing of the model changes. A collective operation where weights are sharded."""
    modules = dict(actor.inner.named_modules())
    # state_dict() and not named_parameters(): it holds the tied lm_head
    for name, tensor in actor.inner.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name or ".base_layer.weight." in name:  # adapters; how 4 bits were made of a weight
            continue
        if name.endswith(".base_layer.weight"):
            tensor = _merged(modules[owner.removesuffix(".base_layer")])
        yield name.replace(".base_layer.", "."), full(tensor).to(actor.dtype)


def _merged(layer: LoraLayer) -> torch.Tensor:
    """A layer's weight with its adapter, in float32."""
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    down, up = (full(matrix["default"].weight).float() for matrix in (layer.lora_A, layer.lora_B))
    return full(weight).float() + (up @ down) * layer.scaling["default"]


def save_model(
    actor: Actor,
    folder: Path,
    extra: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    critic: Actor | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Write a Hugging Face folder that transformers (an adapter: peft) and vLLM load as it is, all of it or nothing.

    Called by all ranks; rank 0 writes, and with sharded weights each rank its optimizers' parts. `extra` maps file
    names to JSON content; `state` goes to trainer/state.pt, PPO's critic to trainer/critic/, optimizers beside it.
    """
    joined = dist.is_initialized()
    rank, wait = (dist.get_rank(), dist.barrier) if joined else (0, lambda: None)
    temporary, replaced = (folder.with_name(folder.name + end) for end in (".partial", ".replaced"))
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "trainer" if state is not None else temporary).mkdir(parents=True)
    wait()
    _write(actor.model, temporary, rank)
    if critic:
        _write(critic.model, temporary / "trainer" / "critic", rank)
    if optimizers and (rank == 0 or is_sharded(actor.model)):
        torch.save([one.state_dict() for one in optimizers], temporary / "trainer" / f"optimizers_{rank}.pt")
    if rank == 0:
        actor.tokenizer.save_pretrained(temporary)
        for name, content in (extra or {}).items():
            (temporary / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))
        if state is not None:
            torch.save(state, temporary / "trainer" / "state.pt")
    wait()
    if rank == 0:
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    wait()


def _write(model: torch.nn.Module, folder: Path, rank: int) -> None:
    """save_pretrained by rank 0, of sharded weights as of others."""
    how: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    if is_sharded(model):
        how["state_dict"], seen = {}, {}
        for name, tensor in model.state_dict().items():
            weight, place = full(tensor), tensor.to_local().data_ptr() or name
            if rank == 0:  # tied weights stay one
                how["state_dict"][name] = seen.setdefault(place, weight.cpu())
    if rank == 0:
        model.save_pretrained(folder, **how)


def point_latest(folder: Path, keep: int) -> None:
    """Make `latest` beside `folder` point to it, atomically, then delete all but the newest `keep` checkpoints.

    A number higher than `folder`'s is left over from an earlier run of that name, and goes first.
    """
    link = folder.with_name("latest")
    fresh = folder.with_name("latest.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)
    others = [path for path in folder.parent.iterdir() if path.name.isdigit() and path.name != folder.name]
    newest_first = sorted(others, key=lambda path: (path.name < folder.name, path.name), reverse=True)
    for old in newest_first[max(0, keep - 1) :]:
        shutil.rmtree(old)

"""A language model: load it, whole or with an adapter; log-probs of samples; weights for the engine.

Log-probs are computed on response tokens only: the backbone runs over the whole sample, the lm_head on the positions
that predict a response token, in chunks that are recomputed in the backward pass, so that no [tokens, vocabulary]
tensor of the prompts ever exists.

What is trained is float32: all weights (model.tune=full), or a LoRA adapter of all linear layers on a base that is
frozen in the dtype computed in (lora) or in 4 bits (qlora).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

import attention
import config as configuration
from attention import LineMask
from chat import ChatFormat
from config import Config, ConfigError
from distributed import (
    FsdpRoot,
    apply_fsdp,
    full_tensor,
    progress_bar,
    select_device,
    unsharded,
    unsharded_forward,
)
from model_files import (
    adapter_config,
    base_of,
    check_model_folder,
    is_adapter,
    load_chat,
    one_line,
    place_in_project,
    valid_generation_config,
)
from packing import MicroBatch, Packing, Sample, lay_out, micro_batches

hf_logging.disable_progress_bar()

ENTROPY_BLOCK = 2**21  # log-probs that are turned into entropies at the same time: they stay in a processor's cache
LOGIT_CHUNK = 2048  # response tokens whose logits exist at the same time


@dataclass
class LanguageModel:
    """A model with its chat format, on its device.

    `dtype` is what it computes in, under autocast; `packing` how samples are laid out for it. `base`: the folder or hub
    id that has its config.json; with an adapter that of the model under it. `fsdp_root`: None where each rank has all
    weights. `model` is None where the engine has the only copy of the weights (evaluate.py).
    """

    model: torch.nn.Module | None
    chat: ChatFormat
    device: torch.device
    dtype: torch.dtype = torch.float32
    packing: Packing = "padded"
    base: str = ""
    fsdp_root: FsdpRoot | None = None

    @property
    def inner(self) -> torch.nn.Module:
        """Return transformers' model, without the adapter's wrapping."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def autocast(self) -> torch.autocast:
        """Return the context of every forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def load_model(config: Config, path: str = "", train: bool = True, shard: bool = False) -> LanguageModel:
    """Load the model of `path` (default: config.model.path), in evaluation mode.

    `path` is a Hugging Face id or folder, or that of an adapter, which with model.tune=full becomes part of the
    weights. Without `train` it is frozen, in the dtype it computes in, and whole on every rank unless `shard`, which
    shards it where the policy is. Raises ConfigError if it cannot be found, or is not read whole.
    """
    path = path or config.model.path
    check_model_folder(config, path, samples=not train)  # train_rl.py's preflight has checked what it trains
    base = base_of(path, config)
    model, _ = read_weights(AutoModelForCausalLM, base, loading_options(config, train))
    ends = None
    if model.generation_config is not None:
        model.generation_config = valid_generation_config(model.generation_config, base)
        ends = model.generation_config.eos_token_id
    chat = load_chat(path, config, [ends] if isinstance(ends, int) else ends or ())
    return place_on_device(config, model, chat, base, path if is_adapter(path) else "", train, shard=shard)


def read_weights(
    kind: Any, base: str, options: dict[str, Any], new: str | tuple[str, ...] = (), unread: str | tuple[str, ...] = ()
) -> tuple[torch.nn.Module, list[str]]:
    """Load a model's weights: every one of the files', into every one of the model's; and the names of new ones.

    `new` begins the names that the files may lack, `unread` those that the model may. Raises ConfigError: weights that
    are missing would be random, and those that are not read belong to another model.
    """
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would tell of the same in a table
    try:
        model, report = kind.from_pretrained(base, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # a hub id without a network, other shapes
        raise ConfigError(f"no model at {base}: {one_line(error)}") from None
    finally:
        hf_logging.set_verbosity(verbosity)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(new))
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.startswith(unread))
    if missing:
        also = f"; it has {unexpected[0]}, ... instead" if unexpected else ""
        cure = ": is tie_word_embeddings in config.json wrong?" if missing == ["lm_head.weight"] else also
        raise ConfigError(f"{base} lacks {_some(missing)} of its model's weights, which would be random{cure}")
    if unexpected:
        raise ConfigError(
            f"{base} has weights that its model does not read: {_some(unexpected)}; is config.json its own?"
        )
    check_tied_head(model, base)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ConfigError(f"{base}: {name} has values that are not finite")
    return model, sorted(set(report["missing_keys"]) - set(missing))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + f" and {len(names) - 2} more" * (len(names) > 2)


def tied_ends(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a model's embedding and its head if they are said to be one, else nothing."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return ends if model.config.get_text_config().tie_word_embeddings and ends[1] is not None else []


def check_tied_head(model: torch.nn.Module, base: str) -> None:
    """Check that a head which is said to be the embedding is it: an engine would believe it. Raises ConfigError."""
    if len({id(end.weight) for end in tied_ends(model)}) == 2:
        raise ConfigError(
            f"{base} has an lm_head of its own, and its config.json says tie_word_embeddings=true: set it to false, or "
            "take lm_head.weight out of the file"
        )


def load_reference(config: Config, policy: LanguageModel) -> LanguageModel | None:
    """Load what a KL term holds the policy to: the model that the run started from, also after a resume.

    With an adapter it is the policy's own base, with the adapter that the run started from, if there was one. Else it
    is a model of its own: in shards as the policy is, or waiting in main memory (`as_reference`). None without a KL
    term.
    """
    if config.algo.kl == 0:
        return None
    if config.model.tune == "full":
        reference = load_model(config, train=False, shard=True)
        if reference.fsdp_root is None and reference.device.type == "cuda":
            weights = list(reference.model.parameters())
            # one buffer: pinned memory comes in powers of two
            sizes = [weight.numel() for weight in weights]
            flat = torch.empty(sum(sizes), dtype=reference.dtype, pin_memory=True)
            for weight, host in zip(weights, flat.split(sizes), strict=True):
                weight.data = host.view(weight.shape).copy_(weight.data)
        return reference
    if is_adapter(config.model.path):
        policy.model.load_adapter(config.model.path, "initial", is_trainable=False)
        policy.model.set_adapter("default")
    return policy


@contextmanager
def as_reference(reference: LanguageModel, policy: LanguageModel) -> Iterator[LanguageModel]:
    """Make the reference ready to score: on the device, or the policy without the adapter that is being trained."""
    if reference is not policy:
        waiting = [(weight, weight.data) for weight in reference.model.parameters() if reference.fsdp_root is None]
        for weight, host in waiting:
            weight.data = host.to(reference.device, non_blocking=True)
        yield reference
        for weight, host in waiting:  # nothing has changed, so nothing is copied back
            weight.data = host
    elif "initial" in policy.model.peft_config:
        policy.model.set_adapter("initial")
        yield policy
        policy.model.set_adapter("default")
    else:
        with policy.model.disable_adapter():
            yield policy


def compute_dtype(config: Config) -> torch.dtype:
    """Return what trainer and engine compute in."""
    auto = "bfloat16" if select_device(config).type == "cuda" else "float32"
    return getattr(torch, auto if config.model.dtype == "auto" else config.model.dtype)


def use_fsdp(config: Config) -> bool:
    """Tell whether weights that are trained are sharded over the ranks."""
    alone = configuration.world_size() == 1
    auto = config.model.tune == "full" and select_device(config).type == "cuda"
    return not alone and {"auto": auto, "always": True, "never": False}[config.model.shard]


def loading_options(config: Config, train: bool) -> dict[str, Any]:
    """Return from_pretrained's arguments: what is trained comes in float32, what is frozen in the dtype computed in.

    Weights go straight to the GPU: all ranks' together would fill a machine's main memory.
    """
    all_trained = train and config.model.tune == "full"
    options: dict[str, Any] = {"dtype": torch.float32 if all_trained else compute_dtype(config)}
    device, in_4_bits = select_device(config), config.model.tune == "qlora" and train
    if device.type == "cuda" or in_4_bits:
        options["device_map"] = {"": device}
    if in_4_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
        )
    return options


def choose_packing(config: Config, model: PreTrainedModel) -> Packing:
    """Choose how samples are laid out for a model, and set its attention to that.

    Padded where model.attention=sdpa, where a layer is more than plain attention, and on a GPU without Triton.
    """
    on_cuda = select_device(config).type == "cuda"
    if config.model.attention == "sdpa" or not attention.supports_lines(model):
        return "padded"
    if on_cuda and importlib.util.find_spec("triton") is None:
        return "padded"
    model.set_attn_implementation(attention.NAME)
    if on_cuda:
        import torch._dynamo.config as dynamo  # takes seconds, and a CPU does without

        dynamo.recompile_limit = 64  # flex_attention's: by lines' lengths, with gradients and without
    return "blocks" if on_cuda else "line"


def place_on_device(
    config: Config,
    model: torch.nn.Module,
    chat: ChatFormat | None,
    base: str = "",
    adapter: str = "",
    train: bool = True,
    task: str = "CAUSAL_LM",
    shard: bool = False,
) -> LanguageModel:
    """Put a model on this rank's device, in evaluation mode, with its adapter, in its shards (`load_model`)."""
    device, tune = select_device(config), config.model.tune
    packing = choose_packing(config, model)
    if config.model.gradient_checkpointing and train:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tune != "full" or adapter:
        model = _add_adapter(config, model, base, adapter, task)
    if tune == "full" and adapter:
        model = merged(model, adapter).requires_grad_(train)
    for layer in model.modules():  # no dropout: the ratio to the old policy would be of two different networks
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.0
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        # some CPUs repack 4-bit weights when they first score, and cannot train them then
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if not train:
        model.requires_grad_(False)
    loaded = LanguageModel(model.eval(), chat, device, compute_dtype(config), packing, base)
    if use_fsdp(config) and (train or shard):
        values = [loaded.inner.score] if task == "TOKEN_CLS" else []  # computed in float32
        loaded.fsdp_root = apply_fsdp(model, loaded.inner.base_model.layers, values, device, loaded.dtype)
    elif tune != "qlora" or not train:
        model.to(device)
    return loaded


def _add_adapter(config: Config, model: torch.nn.Module, base: str, adapter: str, task: str) -> PeftModel:
    """Add an adapter: that of the folder `adapter`, by its own config, or a new LoRA on all linear layers."""
    if adapter:
        made = adapter_config(adapter)
        made.task_type = task
    else:
        made = LoraConfig(
            r=config.model.lora_rank,
            lora_alpha=config.model.lora_alpha,
            target_modules="all-linear",
            # peft counts a value head among all linear layers, but saves it whole: it cannot be both
            exclude_modules=["score"] if task == "TOKEN_CLS" else None,
            task_type=task,
        )
    made.inference_mode, made.base_model_name_or_path = False, None  # peft would warn of its own name for the base
    tied, head = tied_ends(model), {}
    if task == "TOKEN_CLS":  # which a language model's adapter has not
        head = {f"base_model.model.score.{name}": weight.clone() for name, weight in model.score.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # the same on every rank
            adapted = get_peft_model(model, made)
        weights = head | load_peft_weights(adapter, device="cpu") if adapter else {}
        if config.model.tune != "full":
            check_base_weights(adapted, weights, adapter)
        report = set_peft_model_state_dict(adapted, weights) if adapter else None
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the adapter {adapter} does not fit {base}: {one_line(error)}") from None
    adapted.peft_config["default"].base_model_name_or_path = place_in_project(base)
    if report:
        own = [name for name in adapted.state_dict() if ".default" in name and "lora_" in name]
        lacking = [name for name in report.missing_keys if name in own]
        if odd := [*report.unexpected_keys, *lacking]:
            raise ConfigError(f"the adapter {adapter} does not fit {base}: {odd[0]} is not in both of them")
    check_adapted_layers(adapted, adapter, tied, kept=config.model.tune != "full")
    return adapted


def check_base_weights(adapted: PeftModel, weights: dict[str, torch.Tensor], adapter: str) -> None:
    """Check that weights of the base which lie in an adapter's file, as embeddings do, are the base's own: others would
    not be saved again. Raises ConfigError."""
    for name, own in adapted.state_dict().items():
        other = weights.get(name)
        if other is not None and other.shape == own.shape and not torch.equal(other.to(own), own):
            raise ConfigError(
                f"the adapter {adapter} has another {name} than the model under it, which a checkpoint would lack: set "
                "model.tune=full, which takes it up"
            )


def merged(adapted: PeftModel, adapter: str) -> torch.nn.Module:
    """Make an adapter of any kind part of the weights. Raises ConfigError for those that peft cannot merge."""
    tied = bool(tied_ends(adapted.get_base_model()))  # peft may part them, and changes the config then
    try:
        model = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = adapted.peft_config["default"].peft_type
        raise ConfigError(f"the adapter {adapter}, of the kind {kind}, cannot be merged: {one_line(error)}") from None
    if tied and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise _parts_tied_ends(adapted, adapter, "modules_to_save")
    return model


def check_adapted_layers(adapted: PeftModel, adapter: str, tied: Sequence[torch.nn.Module], kept: bool) -> None:
    """Check that an adapter leaves a head alone that is the embedding at once (`tied`: what both were before), and, if
    it is `kept`, that `named_weights` can add it into what it adapts. Raises ConfigError."""
    for name, layer in adapted.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):  # which stays tied
            continue
        if any(part is end for part in layer.modules() for end in tied):
            raise _parts_tied_ends(adapted, adapter, name)
        if kept and "default" not in layer.lora_A:
            raise ConfigError(
                f"the adapter {adapter} adapts {name}, which is no linear layer: merge it into its base with peft "
                "first, or set model.tune=full"
            )


def _parts_tied_ends(adapted: PeftModel, adapter: str, what: str) -> ConfigError:
    """Make the error about an adapter of one end of a model whose ends are one: merged it would change the other, too,
    or there would be two, of which an engine that reads the base's config knows nothing."""
    made = adapted.peft_config["default"]
    cure = (
        "give that a head of its own first (tie_word_embeddings=false in its config.json, lm_head.weight a copy of the "
        "embedding's), and set model.base to it"
    )
    if getattr(made, "ensure_weight_tying", False):
        cure = "peft cannot merge one that is tied itself (ensure_weight_tying): train another without these layers"
    return ConfigError(
        f"the adapter {adapter} changes a head that is the embedding at once ({what}), as tie_word_embeddings of "
        f"{made.base_model_name_or_path} says: {cure}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs of samples


def training_batches(model: LanguageModel, samples: Sequence[Sample], max_tokens: int) -> list[MicroBatch]:
    """Lay samples out for passes with gradients; where weights are sharded, with empty micro-batches up to as many as
    the rank with the most has. A collective operation."""
    batches = micro_batches(samples, max_tokens, model.packing)
    if model.fsdp_root is None:
        return batches
    most = torch.tensor(len(batches))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [lay_out([], model.packing)] * (int(most) - len(batches))


def token_logprobs(
    model: LanguageModel,
    batch: MicroBatch,
    temperature: float = 1.0,
    entropy: Literal["none", "value", "gradient"] = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-prob and entropy of every response token, one sample after the other: two float32 tensors [T].

    A collective operation where weights are sharded (`unsharded_forward`). The logits are divided by `temperature`, as
    the engine's were when it sampled. Entropies cost time, and with a gradient memory, so "none" (zeros) leaves them
    out.
    """
    return unsharded_forward(
        model.fsdp_root, lambda: head_logprobs(model, *last_hidden(model, batch), temperature, entropy)
    )


def last_hidden(model: LanguageModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the backbone: what the head is given where each response token is predicted, [T, H], and the tokens, [T]."""
    mask: dict[str, Any] = {}
    if batch.end_L is not None:
        longest = max((sample.num_tokens for sample in batch.samples), default=1)
        mask["attention_mask"] = LineMask(batch.end_L, longest, model.device)
        mask["position_ids"] = torch.from_numpy(batch.position_ids_BL).to(model.device)
    with model.autocast():
        hidden_BLH = model.inner.base_model(
            input_ids=torch.from_numpy(batch.input_ids_BL).to(model.device), use_cache=False, **mask
        ).last_hidden_state
    hidden_TH = hidden_BLH.flatten(0, 1)[torch.from_numpy(batch.source_T).to(model.device)]
    return hidden_TH, torch.from_numpy(batch.target_T).to(model.device)


def head_logprobs(
    model: LanguageModel,
    hidden_TH: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float,
    entropy: Literal["none", "value", "gradient"] = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the second half of token_logprobs: hidden states to log-probs and entropies, two float32 tensors [T]."""
    head = model.inner.get_output_embeddings()

    def score(hidden_CH: torch.Tensor, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with model.autocast():
            logits_CV = head(hidden_CH).float().div_(temperature)
        logp_CV = logits_CV.log_softmax(-1)
        logp_C = logp_CV.gather(-1, target_C[:, None])[:, 0]
        if entropy == "none":
            return logp_C, torch.zeros_like(logp_C)
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            blocks = logp_CV.split(max(1, ENTROPY_BLOCK // logp_CV.shape[-1]))
            return logp_C, -torch.cat([(logp_BV.exp() * logp_BV).sum(-1) for logp_BV in blocks])

    parts = []
    for hidden_CH, target_C in zip(hidden_TH.split(LOGIT_CHUNK), target_T.split(LOGIT_CHUNK), strict=True):
        recompute = torch.is_grad_enabled() and len(hidden_TH) > LOGIT_CHUNK
        part = checkpoint(score, hidden_CH, target_C, use_reentrant=False) if recompute else score(hidden_CH, target_C)
        parts.append(part)
    logps, entropies = zip(*parts, strict=True)  # not `entropy`: score() reads that again in the backward pass
    return torch.cat(logps), torch.cat(entropies)


@torch.no_grad()
def all_logprobs(
    model: LanguageModel, samples: Sequence[Sample], max_tokens: int, temperature: float
) -> list[np.ndarray]:
    """Compute the log-probs of every sample's response tokens, without gradient: float32 arrays, in their order."""
    return by_sample(model, samples, max_tokens, lambda batch: token_logprobs(model, batch, temperature)[0])


def by_sample(
    model: LanguageModel,
    samples: Sequence[Sample],
    max_tokens: int,
    compute: Callable[[MicroBatch], torch.Tensor],
) -> list[np.ndarray]:
    """Run a pass without gradient over all samples: `compute` gives a number per response token of a micro-batch."""
    result: list[Any] = [None] * len(samples)
    with unsharded(model.fsdp_root):
        batches = micro_batches(samples, max_tokens, model.packing)
        for batch in progress_bar(batches, desc="score", unit=" micro-batches"):
            for index, part in zip(batch.indices, compute(batch).split(batch.lengths), strict=True):
                result[index] = part.float().cpu().numpy()
    return result


def head_rows(model: LanguageModel, token_C: torch.Tensor) -> torch.Tensor:
    """Return the lm_head's weights of some tokens, its adapter added in: [C, H]. Weights must not be sharded."""
    head = model.inner.get_output_embeddings()
    if not isinstance(head, LoraLayer):
        return head.weight[token_C]
    change_CH = head.lora_B["default"].weight[token_C].float() @ head.lora_A["default"].weight.float()
    return head.weight[token_C].float() + change_CH * head.scaling["default"]  # peft's .weight is the base's


@torch.no_grad()
def logit_gradients(
    model: LanguageModel,
    hidden_TH: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float,
    token_C: torch.Tensor,
    *,
    logp_T: torch.Tensor | None = None,
    log_partition_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gradient of each target's log-prob by the logits of some tokens: float32 [T, C].

    It is one-hot of the target minus the policy's probabilities; these are the whole vocabulary's, not renormalised to
    the sorted `token_C`: their denominator is given, or follows from the targets' log-probs if all are among token_C.
    """
    weight_CH = head_rows(model, token_C)
    with model.autocast():  # as log-probs are computed
        grad_TC = torch.nn.functional.linear(hidden_TH, weight_CH).float() / temperature
    column_T = torch.searchsorted(token_C, target_T).clamp(max=len(token_C) - 1)
    row_T = torch.arange(len(target_T), device=target_T.device)
    if log_partition_T is None:
        log_partition_T = grad_TC[row_T, column_T] - logp_T
    grad_TC.sub_(log_partition_T[:, None]).exp_().neg_()  # in place: this is the largest tensor of a run
    grad_TC[row_T, column_T] += (token_C[column_T] == target_T).float()
    return grad_TC


# ----------------------------------------------------------------------------------------------------------------------
# Weights for the engine


def named_weights(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every weight by the name that the model has without adapter and shards, one by one.

    Each is whole, the adapter added in, in the dtype computed in. Nothing of the model changes. A collective operation
    where weights are sharded.
    """
    modules = dict(model.inner.named_modules())
    # state_dict() and not named_parameters(): it holds the tied lm_head
    for name, tensor in model.inner.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name or ".base_layer.weight." in name:  # adapters; how 4 bits were made of a weight
            continue
        if name.endswith(".base_layer.weight"):
            tensor = _merge(modules[owner.removesuffix(".base_layer")])
        yield name.replace(".base_layer.", "."), full_tensor(tensor).to(model.dtype)


def _merge(layer: LoraLayer) -> torch.Tensor:
    """Add a layer's adapter to its weight, in float32."""
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    down, up = (full_tensor(matrix["default"].weight).float() for matrix in (layer.lora_A, layer.lora_B))
    change = (up @ down) * layer.scaling["default"]
    return full_tensor(weight).float() + (change.T if layer.fan_in_fan_out else change)

"""The actor and PPO's critic: load or build a model and tokenizer, log-probs of sampled tokens, optimizer, checkpoints.

A "row" is one prompt and one response, as token ids.  Log-probs are computed on response tokens only: the backbone runs
over the whole row, the lm_head on the positions that predict a response token, in chunks that are recomputed in the
backward pass, so that no [tokens, vocabulary] tensor of the prompts ever exists.  Rows are packed end to end on CUDA
(positions restart at each row, which transformers reads as the border that attention must not cross) and padded to the
longest of a length-sorted micro-batch on CPU, where the packed attention mask costs more than the padding.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging as hf_logging

import prompts
from config import Config, ConfigError

hf_logging.disable_progress_bar()

LOGIT_CHUNK = 2048  # response tokens whose logits exist at the same time
PROBE = "Your task is to: put two soapbar in cabinet 12.\n<think>Need it.</think><action>go to toilet 1</action>"
CHAT_TEMPLATE = (  # Qwen's chat format, without its default system message
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Actor:
    """A model with its tokenizer, on its device.

    Its weights are float32; `dtype` is what they are computed in, under autocast. `packed`: rows are laid end to end.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype = torch.float32
    packed: bool = False

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


def pick_device(config: Config) -> torch.device:
    """The device of this rank. Raises ConfigError if CUDA is asked for and absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def join_ranks(config: Config) -> tuple[int, int]:
    """(rank, world size): join torchrun's process group, or make one of a single process."""
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1").items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    on_cpu = pick_device(config).type == "cpu"
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl")
    return dist.get_rank(), dist.get_world_size()


def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the ranks' gradients in place (losses are divided by global counts, so the sum is the gradient).

    Where there were no rows it is 0, not missing: the optimizer's step is then the same on every rank and world size.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if dist.get_world_size() == 1:
        return
    gradients = [parameter.grad for parameter in trained]
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(total)


def gather(items: list) -> list:
    """The ranks' lists end to end, on every rank."""
    if dist.get_world_size() == 1:
        return items
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums by key."""
    return {key: sum(record.get(key, 0) for record in records) for key in sorted({key for r in records for key in r})}


def load_actor(config: Config, corpus: Sequence[str] = (), path: str = "") -> Actor:
    """The actor of `path` (default: config.model.path), in evaluation mode.

    "tiny" builds one from scratch (tokenizer trained on `corpus`, weights from config.seed); anything else is a
    Hugging Face id or folder. Raises ConfigError if it cannot be found.
    """
    path = path or config.model.path
    if path == "tiny":
        model, tokenizer = build_tiny(config, corpus)
    else:
        check_path(path)
        try:
            tokenizer = load_tokenizer(path)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation=config.model.attention
            )
        except OSError as error:  # for instance a hub id without a network
            raise ConfigError(f"no model at {path}: {' '.join(str(error).split())}") from None
    return _place(config, model, tokenizer)


def load_critic(config: Config, actor: Actor, path: str) -> Actor:
    """PPO's critic: the model of `path` with a scalar head in the lm_head's place, in evaluation mode.

    The head of a language model's checkpoint starts at 0: the first values are 0, the same on every rank.
    """
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would tell that the head is new
    shape = AutoConfig.from_pretrained(path, num_labels=1, attn_implementation=config.model.attention)
    shape.classifier_dropout = 0.0
    model, report = AutoModelForTokenClassification.from_pretrained(
        path, config=shape, dtype=torch.float32, output_loading_info=True
    )
    hf_logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
    return _place(config, model, actor.tokenizer)


def _place(config: Config, model: torch.nn.Module, tokenizer: Any) -> Actor:
    """The model on this rank's device, in evaluation mode."""
    device = pick_device(config)
    on_cuda = device.type == "cuda"
    auto = "bfloat16" if on_cuda else "float32"
    dtype = getattr(torch, auto if config.model.dtype == "auto" else config.model.dtype)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return Actor(model.to(device).eval(), tokenizer, device, dtype, packed=on_cuda)


def check_path(path: str) -> None:
    """A local model folder must be whole. Raises ConfigError; a hub id ("owner/name") passes."""
    folder = Path(path)
    if folder.is_dir():
        for needed in ("config.json", "tokenizer.json"):
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
# The tiny model: Qwen2 architecture, byte-level BPE, built from text in seconds


def build_tiny(config: Config, corpus: Sequence[str]) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A Qwen2 model with random weights and a tokenizer trained on `corpus`, both determined by corpus and seed."""
    if not corpus:
        raise ConfigError("model.path=tiny needs text to train its tokenizer on; train it with train_sft.py first")
    tokenizer = build_tokenizer(corpus, config.model.tiny_vocab)
    shape = tiny_shape(config, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=config.model.attention)
    return model, tokenizer


def tiny_shape(config: Config, vocab: int, eos: int | None = None, pad: int | None = None) -> Qwen2Config:
    """The sizes of a "tiny" model."""
    sizes = config.model
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=sizes.tiny_hidden,
        intermediate_size=2 * sizes.tiny_hidden,
        num_hidden_layers=sizes.tiny_layers,
        num_attention_heads=sizes.tiny_heads,
        num_key_value_heads=max(1, sizes.tiny_heads // 2),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


# What becomes one token in the tiny tokenizer: the templates' passages, the frames of ALFWorld's sentences and lists
# (PHRASES, before anything else), then the glue between list items, then words with their space, then numbers.
PHRASES = (
    "user\n",
    "assistant\n",
    "-= Welcome to TextWorld, ALFRED! =-\n\n",
    "You are in the middle of a room. Looking quickly around you, you see",
    "\n\nYour task is to:",
    "You arrive at",
    "You pick up the",
    "You move the",
    "You open the",
    "You close the",
    "You are facing the",
    "You are carrying:",
    "You are not carrying anything.",
    "There's nothing special about",
    "Nothing happens.",
    ". Next to it, you see nothing.",
    ". In it, you see",
    ". On the",
    ". The",
    " is closed",
    " is open",
    " from the",
    " to the",
    ", you see",
    " nothing.",
    "</think><action>",
    "<answer>\\boxed{0}</answer>",
    "<answer>\\boxed{1}</answer>",
    *(frame.format(number) for number in range(1, 51) for frame in ("[Observation {}: '", "', Action {}: '")),
)
PIECES = (
    r"(?:'\n )?'(?:go to|take|move|open|close|examine|use|heat|cool|clean|slice|look|inventory)(?=[ '])"
    r"|'\]\n?|,? and an?(?= )|, an?(?= )| ?[A-Za-z]+| ?\d+|\n|[^\sA-Za-z\d]+|\s"
)


def fixed_phrases() -> list[str]:
    """What is one token each in a tiny tokenizer."""
    return [*prompts.boilerplate(), *PHRASES, *(f"<{slash}{tag}>" for tag in prompts.TAGS for slash in ("", "/"))]


def add_phrases(actor: Actor) -> None:
    """Give the model tokens for those fixed passages that its tokenizer lacks, for instance of another prompt style.

    They start as the mean of the other embeddings, which is the same on every rank.
    """
    had = len(actor.tokenizer)
    actor.tokenizer.add_tokens(fixed_phrases())
    actor.model.resize_token_embeddings(len(actor.tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in {actor.model.get_input_embeddings().weight, actor.model.get_output_embeddings().weight}:
            weight[had:] = weight[:had].mean(0)


def build_tokenizer(corpus: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's control tokens; the templates' fixed sentences are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    phrases = fixed_phrases()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(phrases)  # before training, so that their words do not compete for merges
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(phrases)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


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

    The logits are divided by `temperature`, as the engine's were when it sampled. Entropies cost time, and with a
    gradient memory, so "none" (zeros) leaves them out.
    """
    hidden_TH, target_T = last_hidden(actor, rows)  # [T, H], [T]
    return head_logprobs(actor, hidden_TH, target_T, temperature, entropy)


def last_hidden(actor: Actor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head is given where each response token of `rows` is predicted, and the tokens: [T, H], int64 [T]."""
    model, device, packed = actor.model, actor.device, actor.packed
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
        hidden = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
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
    head = actor.model.get_output_embeddings()

    def score(hidden_C: torch.Tensor, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with actor.autocast():
            logits_CV = head(hidden_C).float() / temperature  # [C, V]
        total_C = logits_CV.logsumexp(-1)  # [C]
        logp_C = logits_CV.gather(-1, target_C[:, None])[:, 0] - total_C  # [C]
        if entropy == "none":
            return logp_C, torch.zeros_like(total_C)
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            return logp_C, total_C - (logits_CV.softmax(-1) * logits_CV).sum(-1)

    parts = []
    for hidden_C, target_C in zip(hidden_TH.split(LOGIT_CHUNK), target_T.split(LOGIT_CHUNK), strict=True):
        recompute = torch.is_grad_enabled() and len(hidden_TH) > LOGIT_CHUNK
        part = checkpoint(score, hidden_C, target_C, use_reentrant=False) if recompute else score(hidden_C, target_C)
        parts.append(part)
    logps, entropies = zip(*parts, strict=True)  # not `entropy`: score() reads that again in the backward pass
    return torch.cat(logps), torch.cat(entropies)


def token_values(critic: Actor, rows: Sequence[Row]) -> torch.Tensor:
    """The critic's value where each response token of `rows` is predicted, in units of reward: float32 [T]."""
    hidden_TH, _ = last_hidden(critic, rows)  # [T, H]
    return critic.model.score(hidden_TH.float())[:, 0]  # [T] not under autocast: bfloat16 would round returns of 10


def output_errors(
    actor: Actor, hidden_TH: torch.Tensor, target_T: torch.Tensor, logp_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """One-hot of each token minus the policy's probabilities, over the tokens that occur in target_T: [T, V], float32.

    The probabilities are the whole vocabulary's, not renormalised: logp_T gives their denominator.
    """
    head = actor.model.get_output_embeddings()
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
    for group in micro_batches(rows, max_tokens, actor.packed):
        value_T = compute([rows[index] for index in group])  # [T]
        for index, part in zip(group, value_T.split([len(rows[index].response_ids) for index in group]), strict=True):
            result[index] = part.float().cpu().numpy()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer and checkpoints


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)):
    """AdamW with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def save_model(
    actor: Actor,
    folder: Path,
    extra: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    critic: Actor | None = None,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load as it is, all of it or nothing.

    `extra` maps file names to JSON content; `state` (optimizer, iteration, ...) goes to trainer/state.pt, PPO's critic
    to trainer/critic/.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    actor.model.save_pretrained(temporary)
    actor.tokenizer.save_pretrained(temporary)
    for name, content in (extra or {}).items():
        (temporary / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))
    if state is not None:
        (temporary / "trainer").mkdir()
        torch.save(state, temporary / "trainer" / "state.pt")
        if critic:
            critic.model.save_pretrained(temporary / "trainer" / "critic")
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


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

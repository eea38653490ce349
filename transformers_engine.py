"""The engine of machines without vLLM: continuous batching in transformers, on the trainer's own weights.

Each poll() is one forward pass over a single line without filling: the last token of every reply under way, then the
prompts that join.  A request owns its keys and values, and they outlive its reply: of a prompt only what no other has
begun with is computed, the rest is copied, because members of a group and steps of an episode begin alike.

Models that are more than plain attention (attention.supports_lines) are served in padded batches, by generate().
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from engine import Completion, Engine, SamplingParams, stable_seed
from model import LanguageModel

NAME = "by_request"  # of the attention function, for attn_implementation
PROMPT_TOKENS = 4096  # of prompts that join in one pass, where these are several
# not cuDNN's, which torch prefers on an H100: it plans anew, for some 30 ms, at each number of keys, so for each token
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(eq=False)
class Request:
    """A reply under way: what is asked for, what has been sampled, and the keys and values of both."""

    key: str
    prompt_ids: np.ndarray
    params: SamplingParams
    source: Request | None = None  # another one, whose prompt begins with the same tokens,
    copied: int = 0  # so many
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    over: bool = False
    caches: dict[int, Tensor] = field(default_factory=dict)  # by layer: each key with its value, [1, H, L, 2 D]

    def cache(self, layer: int, fresh: Tensor) -> Tensor:
        """Return a layer's keys and values, `fresh` like which they are; the first time with those that are copied."""
        if layer not in self.caches:
            length = len(self.prompt_ids) + self.params.max_tokens
            cache = self.caches[layer] = fresh.new_empty(1, fresh.shape[1], length, fresh.shape[3])
            if self.source is not None:
                cache[:, :, : self.copied] = self.source.caches[layer][:, :, : self.copied]
        return self.caches[layer]

    def add(self, token: int, logprob: float, ends: frozenset[int]) -> None:
        """Append what was sampled, unless the reply is over."""
        if not self.over:
            self.ids.append(token)
            self.logprobs.append(logprob)
            self.over = token in ends or len(self.ids) == self.params.max_tokens


# ----------------------------------------------------------------------------------------------------------------------
# One pass


@dataclass(frozen=True)
class Part:
    """What a pass computes of a request: its tokens from `start` to `end`."""

    request: Request
    start: int
    end: int
    mask: Tensor | None  # bool [end - start, end]; one token sees all

    @classmethod
    def next_of(cls, request: Request, device: torch.device) -> Part:
        """Make the next part of a request: what is not copied of its prompt, then its last token."""
        end = len(request.prompt_ids) + len(request.ids)
        start = end - 1 if request.ids else request.copied
        mask = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start) if end - start > 1 else None
        return cls(request, start, end, mask)

    @property
    def ids(self) -> Sequence[int]:
        """Return these tokens."""
        return self.request.ids[-1:] or self.request.prompt_ids[self.start :]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    parts: Sequence[Part] = (),
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention, as transformers asks for it: query [1, H, L, D] to output [1, L, H, D].

    The line holds the tokens of `parts`, in this order: one may copy what another has just added.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, positions leave them in float32
    dims, counts = (key.shape[-1], value.shape[-1]), [part.end - part.start for part in parts]
    fresh = torch.cat((key, value), -1)
    outputs = []
    for part, asked, added in zip(parts, query.split(counts, 2), fresh.split(counts, 2), strict=True):
        cache = part.request.cache(module.layer_idx, added)
        cache[:, :, part.start : part.end] = added
        seen = cache[:, :, : part.end].split_with_sizes(dims, -1)
        outputs.append(scaled_dot_product_attention(asked, *seen, attn_mask=part.mask, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(NAME, attend)


@contextmanager
def attending_by_request(model: PreTrainedModel) -> Iterator[None]:
    """Have the model call attend(), and then what it called before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with sdpa_kernel(KERNELS):
            yield
    finally:
        model.set_attn_implementation(before)


def sample(logits_BV: Tensor, requests: Sequence[Request], ends: frozenset[int]) -> Tensor:
    """Sample the next token of each reply, [B], and add it with its log-prob.

    It is where a uniform number falls among the cumulated probabilities, and that number depends on the request's seed
    and the count of its tokens alone. At temperature 0 it is the likeliest token.
    """
    device = logits_BV.device
    temperature_B1 = torch.tensor([[one.params.temperature] for one in requests], device=device)
    numbers = [stable_seed(one.params.seed, len(one.ids)) >> 32 for one in requests]  # 24 bits: exact in float32
    uniform_B1 = torch.tensor(numbers, device=device)[:, None] / 2**24
    logp_BV = torch.log_softmax(logits_BV.float() / temperature_B1.clamp(min=1e-6), -1)
    below_BV = logp_BV.exp().cumsum(-1)
    drawn_B1 = torch.searchsorted(below_BV, uniform_B1 * below_BV[:, -1:], right=True)
    drawn_B1 = drawn_B1.clamp(max=logp_BV.shape[1] - 1)  # where logits are no numbers: it is the trainer's to notice
    token_B1 = torch.where(temperature_B1 > 0, drawn_B1, logp_BV.argmax(-1, keepdim=True))
    logp_B1 = logp_BV.gather(1, token_B1)
    for request, token, logp in zip(requests, token_B1[:, 0].tolist(), logp_B1[:, 0].tolist(), strict=True):
        request.add(token, logp, ends)
    return token_B1[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Engines


class TransformersEngine(Engine):
    """Samples with the trainer's own weights, up to `batch` replies at once."""

    def __init__(self, policy: LanguageModel, batch: int) -> None:
        super().__init__(policy)
        self.batch = batch
        self.queue: deque[Request] = deque()
        self.live: list[Request] = []
        self._forget()

    def _forget(self) -> None:
        """Copy no keys and values of requests until now."""
        self.recent: deque[Request] = deque()  # the last that joined, as many as `batch`
        self.by_prompt: list[tuple[bytes, int, Request]] = []  # the same, sorted

    def submit(self, key: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.queue.append(Request(key, np.array(prompt_ids), params))

    def cancel(self, keys: Sequence[str]) -> None:
        if keys:
            self._forget()  # after an error a pass may be half done
        self.queue = deque(request for request in self.queue if request.key not in keys)
        self.live = [request for request in self.live if request.key not in keys]

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        assert not self.live, "the weights change while replies are under way"
        self._forget()  # the weights themselves are the trainer's

    def sleep(self) -> None:
        self._forget()

    @torch.no_grad()
    def poll(self) -> list[tuple[str, Completion]]:
        self._let_join()
        if not self.live:
            return []
        model, device = self.policy.inner, self.policy.device
        parts = [Part.next_of(request, device) for request in self.live]
        ids_L = np.concatenate([part.ids for part in parts])
        position_L = np.concatenate([np.arange(part.start, part.end) for part in parts])
        last_B = np.cumsum([part.end - part.start for part in parts]) - 1
        with self.policy.autocast(), attending_by_request(model):
            logits_BV = model(
                input_ids=torch.from_numpy(ids_L).to(device)[None],
                position_ids=torch.from_numpy(position_L).to(device)[None],
                logits_to_keep=torch.from_numpy(last_B).to(device),
                use_cache=False,
                parts=parts,
            ).logits[0]
        sample(logits_BV, self.live, self.policy.chat.ends)
        for request in self.live:
            request.source = None  # copied by now: it would keep the source's own source, and so on
        over = [request for request in self.live if request.over]
        self.live = [request for request in self.live if not request.over]
        return [(request.key, Completion(request.ids, request.logprobs)) for request in over]

    def _let_join(self) -> None:
        """Take requests from the queue, each with the one before it whose prompt begins most alike."""
        tokens = 0
        while self.queue and len(self.live) < self.batch and tokens < PROMPT_TOKENS:
            request = self.queue.popleft()
            order = request.prompt_ids.astype(">u4").tobytes()  # these bytes sort as the ids do
            place = bisect.bisect(self.by_prompt, (order,))
            for _, _, other in self.by_prompt[max(0, place - 1) : place + 1]:  # none shares more than its neighbours
                shared = common_prefix(request.prompt_ids[:-1], other.prompt_ids)
                if shared > request.copied:
                    request.source, request.copied = other, shared
            tokens += len(request.prompt_ids) - request.copied
            self.live.append(request)
            self.recent.append(request)
            self.by_prompt.insert(place, (order, id(request), request))
            if len(self.recent) > self.batch:
                oldest = self.recent.popleft()
                self.by_prompt = [entry for entry in self.by_prompt if entry[2] is not oldest]


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Count the tokens with which both begin."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


class PaddedEngine(TransformersEngine):
    """Runs generate() on what is queued, as one padded batch to its end: for models that are more than attention."""

    @torch.no_grad()
    def poll(self) -> list[tuple[str, Completion]]:
        requests = [self.queue.popleft() for _ in range(min(self.batch, len(self.queue)))]
        if not requests:
            return []
        lengths = np.array([len(request.prompt_ids) for request in requests])
        mask_BL = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
        ids_BL = np.zeros(mask_BL.shape, dtype=np.int64)
        ids_BL[mask_BL] = np.concatenate([request.prompt_ids for request in requests])
        ends = self.policy.chat.ends

        def choose(_: Tensor, logits_BV: Tensor) -> Tensor:
            """Leave generate() one token to choose from."""
            token_B = sample(logits_BV, requests, ends)
            return torch.full_like(logits_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)

        with self.policy.autocast():
            self.policy.model.generate(
                input_ids=torch.from_numpy(ids_BL).to(self.policy.device),
                attention_mask=torch.from_numpy(mask_BL.astype(np.int64)).to(self.policy.device),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # some models' generation_config.json has another: falsified log-probs
                max_new_tokens=max(request.params.max_tokens for request in requests),
                eos_token_id=sorted(ends),
                pad_token_id=0,  # masked: any id will do
                logits_processor=[choose],
            )
        return [(request.key, Completion(request.ids, request.logprobs)) for request in requests]

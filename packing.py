"""Samples, and how they are laid out for one forward pass: padded, or packed end to end.

A sample is one prompt and one response as token ids.  On CUDA samples are packed (positions restart at each sample,
which transformers reads as the border that attention must not cross); on CPU, where the packed attention mask costs
more than the padding, they are padded to the longest of a length-sorted micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Sample:
    """One prompt and response to train on, with what the loss needs; `response_ids` are the sampled tokens [T]."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    engine_logprobs: np.ndarray | None = None  # [T], at sampling time
    advantage: float | np.ndarray = 0.0  # of all its tokens, or [T]
    is_critique: bool = False  # L_GCD's rather than L_GRPO's
    won: bool = False  # its episode was
    trajectory: int = -1  # its episode
    group: int = -1  # its GRPO group
    truncated: bool = False  # the reply was cut off at its limit of tokens
    nthr_tokens: int = 0  # tokens whose advantage NTHR changed
    old_logprobs: np.ndarray | None = None  # [T] what the policy's ratio is taken against
    ref_logprobs: np.ndarray | None = None  # [T] the initial model's
    loss_weights: np.ndarray | None = None  # [T] factors on the loss; 0: in no denominator either. None: all 1
    values: np.ndarray | None = None  # [T] PPO's, before the update
    returns: np.ndarray | None = None  # [T] what they are trained towards
    step: Any = None  # the rollout.Step that it was made of: the record of what is trained on

    @classmethod
    def blank(cls) -> Sample:
        """Make what a rank computes, for nothing, while others compute the micro-batches that they have more of."""
        return cls(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens in the loss's denominators."""
        return len(self.response_ids) if self.loss_weights is None else int((self.loss_weights > 0).sum())


def micro_batches(samples: Sequence[Sample], max_tokens: int, packed: bool) -> list[list[int]]:
    """Group the samples' indices, longest first, by at most `max_tokens` padded (packed: total) tokens.

    A single sample longer than the budget makes a group of its own. Every sample is in exactly one group.
    """
    order = sorted(range(len(samples)), key=lambda index: -samples[index].num_tokens)
    groups: list[list[int]] = []
    used = 0
    for index in order:
        tokens = samples[index].num_tokens
        longest = samples[groups[-1][0]].num_tokens if groups else 0
        cost = used + tokens if packed else longest * (len(groups[-1]) + 1 if groups else 0)
        if not groups or cost > max_tokens:
            groups.append([index])
            used = tokens
        else:
            groups[-1].append(index)
            used += tokens
    return groups


@dataclass(frozen=True)
class Layout:
    """Samples in the shape of one forward pass, int64: B = 1 where they are packed, L the width."""

    input_ids_BL: np.ndarray
    position_ids_BL: np.ndarray | None  # of packed samples; padded ones need none
    source_T: np.ndarray  # where in the flattened input each response token is predicted
    target_T: np.ndarray  # the response tokens, one sample after the other


def lay_out(samples: Sequence[Sample], packed: bool) -> Layout:
    """Lay samples out end to end, or each in a padded line of its own.

    Padding is on the right, and needs no mask: under causal attention no token of a sample sees it.
    """
    lengths = [sample.num_tokens for sample in samples]
    width = sum(lengths) if packed else max(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if packed else np.arange(len(samples)) * width
    ids = np.zeros(width if packed else len(samples) * width, dtype=np.int64)
    position = np.zeros_like(ids)
    source, target = [], []
    for sample, start, length in zip(samples, starts, lengths, strict=True):
        ids[start : start + length] = np.concatenate([sample.prompt_ids, sample.response_ids])
        position[start : start + length] = np.arange(length)
        source.append(np.arange(start + len(sample.prompt_ids) - 1, start + length - 1))
        target.append(sample.response_ids)
    shape = (1, width) if packed else (len(samples), width)
    return Layout(
        ids.reshape(shape),
        position.reshape(shape) if packed else None,
        np.concatenate(source),
        np.concatenate(target).astype(np.int64),
    )

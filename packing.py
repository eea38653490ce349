"""How samples are laid out for a forward pass: every distinct token is computed once.

An iteration's samples begin alike: those of group members in the same state, the answers to one question.  Sorted by
their tokens, samples are the paths of a trie in depth-first order; each adds those tokens that it does not share with
the one before, and a line holds what several samples add, end to end.  A token's position is its depth, its `end` the
place in the line after the last token below it, and

    token q sees token k  if  k <= q < end[k]

is all that attention has to know (`visible`).  Packing of samples that share nothing is a special case.  Nothing is
approximate: log-probs, loss and gradient are those of samples in lines of their own, up to rounding.

Published elsewhere as tree or prefix-shared training; here the mask alone does it, and no model is patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

# "line": a micro-batch is one line; "blocks": filled up to whole blocks, as flex_attention wants it; "padded": each
# sample has a line of its own, and needs no mask.
Packing = Literal["line", "blocks", "padded"]
BLOCK = 128  # tokens
LENGTHS = 8  # that lines of blocks have, so that a kernel is compiled for few


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

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens in the loss's denominators."""
        return len(self.response_ids) if self.loss_weights is None else int((self.loss_weights > 0).sum())


@dataclass(frozen=True)
class MicroBatch:
    """Samples in the shape of one forward pass: B lines of L tokens, int64; T are the response tokens, one sample after
    the other. What fills up a line sees itself alone, and is seen by nobody."""

    samples: list[Sample]
    indices: list[int]  # of the samples in what was given to micro_batches(), ascending
    added: list[int]  # tokens that each adds to the lines
    input_ids_BL: np.ndarray
    position_ids_BL: np.ndarray
    end_L: np.ndarray | None  # the mask of packed samples, B = 1; None: padded ones, causal attention is all they take
    source_T: np.ndarray  # where in the flattened lines each response token is predicted
    target_T: np.ndarray

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each sample."""
        return [len(sample.response_ids) for sample in self.samples]


def visible(end_k: Any, q: Any, k: Any) -> Any:
    """Tell whether token q of a line sees token k, whose end is `end_k`: numbers, arrays or tensors."""
    return (k <= q) & (q < end_k)


def sort_by_prefix(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Sort samples in the trie's depth-first order: their indices, and how many tokens each adds to those before."""
    tokens = [_tokens(sample) for sample in samples]
    keys = [ids.astype(">u4").tobytes() for ids in tokens]  # these bytes sort as the ids do
    order = sorted(range(len(samples)), key=keys.__getitem__)
    added, before = [], np.zeros(0, dtype=np.int64)
    for index in order:
        length = min(len(before), len(tokens[index]))
        differs = np.flatnonzero(before[:length] != tokens[index][:length])
        added.append(len(tokens[index]) - int(differs[0] if len(differs) else length))
        before = tokens[index]
    return order, added


def split_evenly(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Split samples by their distinct tokens into parts that share little with each other; some may be empty."""
    order, added = sort_by_prefix(samples)
    middle = np.cumsum(added) - np.array(added) / 2
    split: list[list[Sample]] = [[] for _ in range(parts)]
    for index, share in zip(order, middle / max(1, sum(added)), strict=True):
        split[min(int(share * parts), parts - 1)].append(samples[index])  # 1, at the end, where nothing is added
    return split


def micro_batches(samples: Sequence[Sample], max_tokens: int, packing: Packing) -> list[MicroBatch]:
    """Lay samples out in micro-batches of at most `max_tokens` tokens, filling included; each sample is in one of them.

    A single sample that is longer, or filled up is longer, makes a micro-batch of its own.
    """
    step = max(1, max_tokens // LENGTHS // BLOCK) * BLOCK if packing == "blocks" else 1
    lines = _lines(samples, max_tokens - max_tokens % step, packing)
    if packing != "padded":
        return [_fill(samples, [line], packing, step) for line in lines]
    groups: list[list[_Line]] = []
    for line in sorted(lines, key=lambda line: -line.width):
        if groups and groups[-1][0].width * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(line)
        else:
            groups.append([line])
    return [_fill(samples, group, packing) for group in groups]


def lay_out(samples: Sequence[Sample], packing: Packing) -> MicroBatch:
    """Lay samples out as one micro-batch, however long; without samples one to compute while other ranks have more."""
    lines = _lines(samples, 2**62, packing) or [_Line([], 1)]
    return _fill(samples, lines, packing, BLOCK if packing == "blocks" else 1)


@dataclass
class _Line:
    """Samples that follow each other in the trie's order."""

    members: list[tuple[int, int]]  # index, tokens shared with the member before
    width: int


def _lines(samples: Sequence[Sample], max_tokens: int, packing: Packing) -> list[_Line]:
    """Cut the trie's order into lines."""
    lines: list[_Line] = []
    for index, added in zip(*sort_by_prefix(samples), strict=True):
        tokens = samples[index].num_tokens
        if lines and packing != "padded" and lines[-1].width + added <= max_tokens:
            lines[-1].members.append((index, tokens - added))
            lines[-1].width += added
        else:
            lines.append(_Line([(index, 0)], tokens))
    return lines


def _fill(samples: Sequence[Sample], lines: Sequence[_Line], packing: Packing, step: int = 1) -> MicroBatch:
    """Write the samples of some lines into arrays, whose width is a multiple of `step`."""
    width = -(-max(line.width for line in lines) // step) * step
    input_ids_BL = np.zeros((len(lines), width), dtype=np.int64)
    position_ids_BL = np.zeros_like(input_ids_BL)
    end_BL = np.tile(np.arange(1, width + 1), (len(lines), 1))
    added, source = {}, {}
    for row, line in enumerate(lines):
        path = np.zeros(0, dtype=np.int64)  # the places of a sample's tokens
        start = 0
        for index, shared in line.members:
            tokens = _tokens(samples[index])
            stop = start + len(tokens) - shared
            end_BL[row, path[shared:]] = start
            path = np.concatenate([path[:shared], np.arange(start, stop)])
            input_ids_BL[row, start:stop] = tokens[shared:]
            position_ids_BL[row, start:stop] = np.arange(shared, len(tokens))
            source[index] = row * width + path[len(samples[index].prompt_ids) - 1 : -1]
            added[index], start = stop - start, stop
        end_BL[row, path] = start
    indices = sorted(source)
    return MicroBatch(
        [samples[index] for index in indices],
        indices,
        [added[index] for index in indices],
        input_ids_BL,
        position_ids_BL,
        None if packing == "padded" else end_BL[0],
        np.concatenate([np.zeros(0, dtype=np.int64), *(source[index] for index in indices)]),
        np.concatenate([np.zeros(0, dtype=np.int64), *(samples[index].response_ids for index in indices)]),
    )


def _tokens(sample: Sample) -> np.ndarray:
    """Join prompt and response."""
    return np.concatenate([sample.prompt_ids, sample.response_ids])

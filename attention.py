"""Attention in lines of packed samples, whose tokens see those of their own sample alone (packing.visible).

One attention function for transformers, which models name as they name "sdpa".  Given a LineMask it computes a line: on
CUDA by flex_attention, which skips the blocks that the mask hides; on CPU block by block of queries, each with the keys
that it sees put side by side, so that the cost grows with what is seen and not with the line's length.  Otherwise it is
sdpa: for padded lines, and while transformers generates.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from packing import BLOCK, visible

NAME = "packed_lines"  # of the function, for attn_implementation
QUERIES = 64  # of a block on CPU, at least
ALIKE = 0.8  # blocks on CPU whose numbers of keys differ by no more than this factor are computed together


class LineMask(BlockMask):
    """Who sees whom in one line. A BlockMask by name alone: transformers gives these to the attention unread."""

    def __init__(self, end_L: np.ndarray, longest: int, device: torch.device) -> None:
        """Take the line's packing.MicroBatch.end_L, and how many tokens its longest sample has."""
        self.end_L, self.device, self._biases = end_L, device, {}
        self.queries = QUERIES * max(1, longest // 4 // QUERIES)  # of a block on CPU

    @property
    def shape(self) -> tuple[int, ...]:
        """Return what a dense mask's would be."""
        return 1, 1, len(self.end_L), len(self.end_L)

    @cached_property
    def for_flex(self) -> BlockMask:
        """Make flex_attention's mask, without the dense one; a line must be some BLOCKs long."""
        low_N, high_N = (part(self.end_L.reshape(-1, BLOCK), axis=1) for part in (np.min, np.max))
        start_N = np.arange(0, len(self.end_L), BLOCK)
        before_NN = start_N < start_N[:, None]  # [block of queries, block of keys]
        whole_NN = before_NN & (low_N >= start_N[:, None] + BLOCK)
        part_NN = (before_NN & (high_N > start_N[:, None]) & ~whole_NN) | np.eye(len(start_N), dtype=bool)
        end_L = torch.from_numpy(self.end_L).to(self.device)

        def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return visible(end_L[k], q, k)

        counts_and_indices = [
            torch.from_numpy(one).to(self.device, torch.int32)[None, None]
            for some_NN in (part_NN, whole_NN)
            for one in (some_NN.sum(1), np.argsort(~some_NN, axis=1, kind="stable"))
        ]
        return BlockMask.from_kv_blocks(*counts_and_indices, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)

    @cached_property
    def key_blocks(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Find the keys of each block of queries: the order of the blocks, by how many they are; then for each part of
        them, of blocks with about as many keys, the keys' places [N, K] and who sees them, bool [N, Q, K]."""
        end_L, keys = self.end_L, []
        for first in range(0, len(end_L), self.queries):
            # of the tokens before it a block sees those that its first query does: depth-first order sees to that
            own = np.arange(first, min(first + self.queries, len(end_L)))
            keys.append(np.append(np.flatnonzero(end_L[:first] > first), own))
        order = sorted(range(len(keys)), key=lambda block: -len(keys[block]))
        parts: list[list[int]] = []
        for block in order:
            if parts and len(keys[block]) >= ALIKE * len(keys[parts[-1][0]]):
                parts[-1].append(block)
            else:
                parts.append([block])
        found = []
        for part in parts:
            key_NK = np.full((len(part), len(keys[part[0]])), -1)
            for key_K, block in zip(key_NK, part, strict=True):
                key_K[: len(keys[block])] = keys[block]
            query_NQ = np.array(part)[:, None] * self.queries + np.arange(self.queries)
            seen_NQK = (key_NK[:, None] >= 0) & visible(end_L[key_NK][:, None], query_NQ[:, :, None], key_NK[:, None])
            seen_NQK |= (query_NQ >= len(end_L))[:, :, None]  # beyond the line: to see nothing would give nan
            found.append((torch.from_numpy(key_NK.clip(min=0)), torch.from_numpy(seen_NQK)))
        return torch.tensor(order), found

    def biases(self, copies: int, dtype: torch.dtype) -> list[Tensor]:
        """Return key_blocks' masks as what is added to scores, [N, 1, copies Q, K]; made once for all layers."""
        if (copies, dtype) not in self._biases:
            seen = (seen_NQK.repeat(1, copies, 1)[:, None] for _, seen_NQK in self.key_blocks[1])
            biases = [torch.zeros(one.shape, dtype=dtype).masked_fill_(~one, -torch.inf) for one in seen]
            self._biases[copies, dtype] = biases
        return self._biases[copies, dtype]

    def __repr__(self) -> str:
        return f"LineMask({len(self.end_L)} tokens)"


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute a layer's attention, as transformers asks for it: query [B, H, L, D] to output [B, L, H, D]."""
    if not isinstance(attention_mask, LineMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, positions leave them in float32
    if query.device.type == "cuda":
        return flex_attention_forward(module, query, key, value, attention_mask.for_flex, **kwargs)[0], None
    return _attend_by_blocks(query, key, value, attention_mask, kwargs.get("scaling")), None


def _attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: LineMask, scaling: float | None) -> Tensor:
    """Compute attention in a line on CPU. Query heads that share a key head are laid one after the other."""
    (_, heads, length, dim), key_heads = query.shape, key.shape[1]
    order_N, parts = mask.key_blocks
    padded = torch.nn.functional.pad(query[0], (0, 0, 0, len(order_N) * mask.queries - length))
    blocks = padded.view(key_heads, -1, len(order_N), mask.queries, dim).permute(2, 0, 1, 3, 4)
    blocks = blocks.index_select(0, order_N).flatten(2, 3)  # [N, key heads, heads of each * Q, D]
    biases = mask.biases(heads // key_heads, query.dtype)
    sizes = [len(key_NK) for key_NK, _ in parts]
    outputs = []
    for query_N, (key_NK, _), bias in zip(blocks.split(sizes), parts, biases, strict=True):
        gathered = (one[0].index_select(1, key_NK.flatten()).unflatten(1, key_NK.shape) for one in (key, value))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query_N, *(one.transpose(0, 1) for one in gathered), attn_mask=bias, scale=scaling
            )
        )
    output = torch.cat(outputs).index_select(0, order_N.argsort()).unflatten(2, (-1, mask.queries))
    return output.permute(0, 3, 1, 2, 4).reshape(1, -1, heads, output.shape[-1])[:, :length]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def supports_lines(model: PreTrainedModel) -> bool:
    """Tell whether all layers are plain attention, which sees what a mask lets it see: no window, no state, no cap."""
    config = model.config.get_text_config()
    plain = model._supports_attention_backend and model._supports_sdpa and model._supports_flex_attn
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    layers = getattr(config, "layer_types", None)
    whole = set(layers) == {"full_attention"} if layers else window is None
    capped = getattr(config, "attn_logit_softcapping", None)
    return bool(plain and whole and not capped and not model._is_stateful)

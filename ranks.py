"""What the ranks of a run share: the process group, sums, weights in shards, the optimizer and its steps.

A model's weights are on every rank, or sharded over the ranks by FSDP2 (`model.shard`): then its layers are gathered,
in the dtype that is computed in, as the forward and backward passes come to them, and what is outside of the layers
while `whole` runs; `gathered` keeps all of it for the passes that need no gradient.  The optimizer works on each rank's
own part of a weight, as plain tensors, so any optimizer does.
"""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from config import Config, ConfigError


def pick_device(config: Config) -> torch.device:
    """The device of this rank. Raises ConfigError if CUDA is asked for and absent, or has fewer GPUs than ranks."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(f"rank {local} of this machine has no GPU: torch sees {gpus}; lower --nproc_per_node")
    return torch.device("cuda", local)


def join_ranks(config: Config) -> tuple[int, int]:
    """(rank, world size): join torchrun's process group, or make one of a single process.

    Whoever waits for another rank longer than train.timeout_minutes fails: that rank hangs.
    """
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1").items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    device = pick_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=config.train.timeout_minutes))
    return dist.get_rank(), dist.get_world_size()


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


def progress_bar(items: Iterable | None = None, **how: Any) -> tqdm:
    """A progress bar on the first rank's terminal, there after a second, gone when done; elsewhere nothing."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    look = dict(leave=False, mininterval=1, delay=1, dynamic_ncols=True)
    return tqdm(items, disable=None if first else True, **look, **how)


class Stop:
    """SIGTERM, as clusters send before they take a machine away, asks the run to save and end."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked. A collective operation."""
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)


# ----------------------------------------------------------------------------------------------------------------------
# Weights in shards


def shard(model: torch.nn.Module, layers: Sequence[torch.nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Leave this rank its part of every weight: float32 where it is trained, gathered as `dtype`.

    `layers` are moved to the device one by one, so that the model is never whole there.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*layers, model):
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # losses are divided by global counts, so gradients are summed, not averaged; gloo knows plain sums alone
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.whole = MethodType(lambda self, compute: compute(), model)
    register_fsdp_forward_method(model, "whole")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether this rank holds a part of each weight only."""
    return isinstance(model, FSDPModule)


def whole(model: torch.nn.Module, compute: Callable[[], Any]) -> Any:
    """compute(), which may use the weights outside of the layers as if they were not sharded.

    A collective operation: every rank must come here as often as the others (`aligned`), unless the model is gathered.
    """
    return model.whole(compute) if is_sharded(model) else compute()


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """All weights whole on every rank, in the dtype that is computed in, for passes without gradient."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    whole(model, lambda: None)  # FSDP wants to meet the whole model before a layer of it
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def aligned(batches: list[list[int]], model: torch.nn.Module) -> list[list[int]]:
    """The batches; with sharded weights then empty ones, up to as many as the rank with the most has."""
    if not is_sharded(model):
        return batches
    most = torch.tensor(len(batches))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [[] for _ in range(int(most) - len(batches))]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a weight, without gradient. A collective operation if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer


def make_optimizer(
    model: torch.nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; "adamw8bit": bitsandbytes' with moments of 8 bits.

    It is given each rank's own part of the weights; `optimizer.parts` pairs the model's parameters with them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = [(p, torch.nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p) for p in trained]
    groups = [
        {"params": [own for p, own in parts if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [own for p, own in parts if p.ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(groups, lr=lr, betas=betas)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas)
    optimizer.parts = [(p, own) for p, own in parts if own is not p]
    return optimizer


def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the ranks' gradients in place (losses are divided by global counts, so the sum is the gradient).

    Where there were no rows it is 0, not missing: the optimizer's step is then the same on every rank and world size.
    FSDP has already summed those of sharded weights.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if not isinstance(parameter, DTensor)]
    if dist.get_world_size() == 1 or not gradients:
        return
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(total)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """One optimizer step on the sum of the ranks' gradients; returns their norm before clipping.

    Where the norm is not finite the weights stay as they are, on every rank.
    """
    sum_gradients(model)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    kinds = [[g for g in gradients if isinstance(g, DTensor) == in_shards] for in_shards in (False, True)]
    norm = math.hypot(*(float(full(torch.nn.utils.get_total_norm(kind))) for kind in kinds if kind))
    if math.isfinite(norm):
        for kind in kinds:
            if kind and norm > max_grad_norm:
                torch._foreach_mul_(kind, max_grad_norm / (norm + 1e-6))
        for parameter, own in getattr(optimizer, "parts", ()):
            own.grad = parameter.grad.to_local()
        optimizer.step()
    optimizer.zero_grad()
    model.zero_grad()
    return norm

"""What the ranks of a run share: the process group, sums, weights in shards, the optimizer and its steps.

A model's weights are on every rank, or sharded over the ranks by FSDP2 (`model.shard`): then its layers are gathered,
in the dtype that is computed in, as the forward and backward passes come to them, and what is outside of the layers
within `unsharded_forward`; `unsharded` keeps all of it for the passes that need no gradient.  The optimizer works on
each rank's own part of a weight, as plain tensors, so any optimizer does.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from config import Config, ConfigError

MAX_BAD_STEPS = 3  # optimizer steps in a row that are skipped for a gradient that is not finite; one more ends the run


def select_device(config: Config) -> torch.device:
    """Choose this rank's device. Raises ConfigError if CUDA is asked for and absent, or has fewer GPUs than ranks."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(f"rank {local} of this machine has no GPU: torch sees {gpus}; lower --nproc_per_node")
    return torch.device("cuda", local)


def init_distributed(config: Config) -> tuple[int, int]:
    """Join torchrun's process group, or make one of a single process; return (rank, world size).

    Whoever waits for another rank longer than train.timeout_minutes fails: that rank hangs.
    """
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1").items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    device = select_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=config.train.timeout_minutes))
    return dist.get_rank(), dist.get_world_size()


def all_gather_objects(items: list) -> list:
    """Join the ranks' lists end to end, on every rank. Objects that two items share stay shared."""
    if dist.get_world_size() == 1:
        return items
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_dicts(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Add up records by key."""
    return {key: sum(record.get(key, 0) for record in records) for key in sorted({key for r in records for key in r})}


def progress_bar(items: Iterable | None = None, **settings: Any) -> tqdm:
    """Show progress on the first rank's terminal, from the first second on, gone when done; elsewhere nothing."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    look = dict(leave=False, mininterval=1, delay=1, dynamic_ncols=True)
    return tqdm(items, disable=None if first else True, **look, **settings)


def announce(what: str) -> None:
    """Say on the first rank's stderr what begins: a start may take minutes, and must not look like one that hangs."""
    if dist.get_rank() == 0:
        print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)


class PreemptionSignal:
    """SIGTERM, as clusters send before they take a machine away, or a first Ctrl-C: the run is to save and end.

    A second Ctrl-C ends it at once, but under torchrun, which waits for its time-out.
    """

    def __init__(self) -> None:
        self.received = False
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._receive)

    def _receive(self, kind: int, _: object) -> None:
        if kind == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if dist.get_rank() == 0:
                again = "" if "TORCHELASTIC_RUN_ID" in os.environ else " (Ctrl-C again ends at once)"
                print(f"\ninterrupted: saving{again}", file=sys.stderr, flush=True)
        self.received = True

    def any_rank(self) -> bool:
        """Tell whether any rank received it. A collective operation."""
        received = torch.tensor(int(self.received))
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return bool(received)


# ----------------------------------------------------------------------------------------------------------------------
# Weights in shards


class FsdpRoot(torch.nn.Module):
    """A sharded model as FSDP's outermost module: what runs within its forward has the weights outside of the layers.

    FSDP gathers those around a module's forward; ours runs any computation, since the backbone and the head are called
    apart.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns."""
        return compute()


def apply_fsdp(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    exact: Sequence[torch.nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> FsdpRoot:
    """Leave this rank its part of every weight: float32 where it is trained, gathered as `dtype`; those of the modules
    `exact` are gathered as float32."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    root = FsdpRoot(model)
    for module in (*layers, *exact, root):
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        gathered = torch.float32 if module in exact else dtype
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32))
        # losses are divided by global counts, so gradients are summed, not averaged; gloo knows plain sums alone
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return root


def unsharded_forward(root: FsdpRoot | None, compute: Callable[[], Any]) -> Any:
    """Run compute(), which may use the weights outside of the layers as if they were not sharded (root None: they are
    not).

    A collective operation: every rank must come here as often as the others (`model.training_batches`), unless within
    `unsharded`.
    """
    return root(compute) if root is not None else compute()


@contextmanager
def unsharded(root: FsdpRoot | None) -> Iterator[None]:
    """Hold all weights whole on every rank, in the dtype that is computed in, for passes without gradient."""
    parts = [module for module in root.modules() if isinstance(module, FSDPModule)] if root is not None else []
    unsharded_forward(root, lambda: None)  # FSDP wants to meet the whole model before a layer of it
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not root, recurse=False)
        part.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a weight, without gradient. A collective operation if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer


def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the ranks' gradients in place (losses are divided by global counts, so the sum is the gradient).

    Where there were no samples it is 0, not missing: the optimizer's step is then the same on every rank and world
    size. FSDP has already summed those of sharded weights.
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


def adamw(groups: list[dict], betas: tuple[float, float] = (0.9, 0.999), kind: str = "adamw") -> torch.optim.Optimizer:
    """Make AdamW for parameter groups; "adamw8bit": bitsandbytes', with moments of 8 bits."""
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas)


class Optimizer:
    """Steps of the weights of a model that are trained; each rank steps its own part of sharded ones.

    Weight decay is on matrices only. `make` is given the parameter groups, as torch's optimizers are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weight_decay: float = 0.0,
        make: Callable[[list[dict]], torch.optim.Optimizer] = adamw,
    ) -> None:
        self.model, self.bad_steps_in_a_row = model, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = [(p, torch.nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p) for p in trained]
        self.local_parts = [(whole, own) for whole, own in parts if own is not whole]
        stepped = [(whole, own) for whole, own in parts if own.numel()]  # a small weight leaves some ranks nothing
        self.inner = make(
            [
                {"params": [own for whole, own in stepped if whole.ndim >= 2], "weight_decay": weight_decay},
                {"params": [own for whole, own in stepped if whole.ndim < 2], "weight_decay": 0.0},
            ]
        )

    def step(self, lr: float, max_grad_norm: float, save_samples: Callable[[], Path] | None = None) -> float:
        """Make one step on the sum of the ranks' gradients; return their norm before clipping.

        Where the norm is not finite the weights stay as they are, on every rank. Raises RuntimeError when more than
        MAX_BAD_STEPS of these come in a row; `save_samples` writes what the last one was made of, and says where.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr
        sum_gradients(self.model)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.requires_grad]
        kinds = [[g for g in gradients if isinstance(g, DTensor) == in_shards] for in_shards in (False, True)]
        norm = math.hypot(*(float(full_tensor(torch.nn.utils.get_total_norm(kind))) for kind in kinds if kind))
        if math.isfinite(norm):
            for kind in kinds:
                if kind and norm > max_grad_norm:
                    torch._foreach_mul_(kind, max_grad_norm / (norm + 1e-6))
            for whole, own in self.local_parts:
                own.grad = whole.grad.to_local()
            self.inner.step()
        self.bad_steps_in_a_row = 0 if math.isfinite(norm) else self.bad_steps_in_a_row + 1
        if self.bad_steps_in_a_row > MAX_BAD_STEPS:
            where = f"; the samples of the last one are in {save_samples()}" if save_samples else ""
            raise RuntimeError(f"the gradient was not finite {self.bad_steps_in_a_row} steps in a row{where}")
        self.inner.zero_grad()
        self.model.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of this rank's parts."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the moments that state_dict() returned."""
        self.inner.load_state_dict(state)

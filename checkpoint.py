"""Checkpoints of a run: what is saved, all of it or nothing, and how a run goes on from the last one.

    checkpoints/000020/            a Hugging Face folder that transformers (an adapter: peft) and vLLM load as it is
        guidelines.json            what stands in the prompts of whoever loads it
        trainer/state.pt           iteration, advice, what the teacher has cost, the config
        trainer/optimizers_R.pt    the optimizers' states; with sharded weights rank R's part
        trainer/critic/            PPO's value model
    checkpoints/latest             -> the last whole one

A killed run loses at most the iteration under way.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError

import config as configuration
import prompts
from config import Config, ConfigError
from distributed import Optimizer, full_tensor
from model import LanguageModel, use_fsdp

# When a run goes on: what does not change the training, or is the cure of what ended it. The number of iterations only
# where the learning rate does not hang on it.
FREE_TO_CHANGE = {
    "model.attention",
    "model.gradient_checkpointing",
    "train.iterations",
    "train.tokens_per_micro_batch",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.timeout_minutes",
    "train.eval_every",
    "train.coupling_every",
    "train.coupling_samples",
    "train.wandb",
    "eval",
    "env.machine_heap_mib",
    "rollout.max_prompt_tokens",
    "rollout.concurrency",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
}


@dataclass
class TrainState:
    """What a run carries from one iteration to the next, beside weights; the same on every rank."""

    iteration: int = 0  # the next one
    guidelines: list[str] = field(default_factory=list)  # in the prompts now
    advice: list[str] = field(default_factory=list)  # of critiques, for the next guidelines
    teacher_spent: dict[str, int] = field(default_factory=dict)  # requests and tokens so far
    folder: str = ""  # of the weights to start from
    optimizer_states: dict[str, Any] = field(default_factory=dict)  # "policy", "critic": taken out as they are loaded


def resume(config: Config) -> TrainState:
    """Read where the run stands: at its last checkpoint, or at its start.

    Raises ConfigError if the checkpoint was made by other settings.
    """
    folder = config.run_dir / "checkpoints" / "latest"
    if not folder.exists():
        return TrainState(guidelines=first_guidelines(config), folder=config.model.path)
    saved = _load(folder / "trainer" / "state.pt")
    if "guidelines" not in saved:
        raise ConfigError(f"{folder} was saved by another version of the project: choose another name (--set name=...)")
    now, default = (_flat(configuration.to_dict(one)) for one in (config, Config()))
    # an option that is younger than the run had its default's effect, but for this one
    then = default | {"train.deal": "shuffled"} | _flat(saved.pop("config"))
    free = FREE_TO_CHANGE - ({"train.iterations"} if config.train.schedule == "linear" else set())
    changed = [key for key in now | then if now.get(key) != then.get(key) and not {key, key.split(".")[0]} & free]
    if changed:
        raise ConfigError(
            f"{config.run_dir} was made with other settings ({', '.join(changed)}): choose another name "
            f"(--set name=...) or delete the folder"
        )
    parts, here = saved.pop("parts"), dist.get_world_size() if use_fsdp(config) else 1
    if parts != here:
        raise ConfigError(
            f"{folder} has its optimizer in {parts} parts, this run would have {here}: resume on as many ranks and "
            "with the same model.shard, or start another run from its weights (model.path)"
        )
    own = folder / "trainer" / f"optimizers_{dist.get_rank() if parts > 1 else 0}.pt"
    return TrainState(**saved, folder=str(folder.resolve()), optimizer_states=_load(own))


def first_guidelines(config: Config) -> list[str]:
    """Read the guidelines of guidelines.file, one a line."""
    if not config.guidelines.file:
        return []
    lines = Path(config.guidelines.file).read_text(encoding="utf-8").splitlines()
    return [text for line in lines if (text := prompts.plain(line, prompts.GUIDELINE_CHARS))]


def save_checkpoint(
    policy: LanguageModel,
    optimizers: dict[str, Optimizer],
    critic: LanguageModel | None,
    config: Config,
    state: TrainState,
) -> None:
    """Write checkpoints/<iteration>/ and then `latest`, each atomically; called by all ranks.

    Raises ConfigError where it cannot be written.
    """
    folder = config.run_dir / "checkpoints" / f"{state.iteration:06d}"
    kept = {key: value for key, value in asdict(state).items() if key not in ("folder", "optimizer_states")}
    parts = dist.get_world_size() if policy.fsdp_root is not None else 1  # of the optimizers' states
    kept |= {"parts": parts, "config": configuration.to_dict(config)}
    try:
        save_model(policy, folder, {"guidelines.json": state.guidelines}, kept, optimizers, critic)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk speaks through each of them
        raise ConfigError(f"could not write {folder}: {error}. The checkpoint before it is whole") from error
    if dist.get_rank() == 0:
        point_latest(folder, config.train.keep_checkpoints)
    dist.barrier()


def save_model(
    model: LanguageModel,
    folder: Path,
    files: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    optimizers: dict[str, Optimizer] | None = None,
    critic: LanguageModel | None = None,
) -> None:
    """Write a Hugging Face folder, all of it or nothing.

    Called by all ranks; rank 0 writes, and with sharded weights each rank its optimizers' parts. `files` maps file
    names to JSON content; `state` goes to trainer/state.pt, PPO's critic to trainer/critic/, optimizers beside it.
    """
    joined = dist.is_initialized()
    rank, wait = (dist.get_rank(), dist.barrier) if joined else (0, lambda: None)
    temporary, replaced = (folder.with_name(folder.name + end) for end in (".partial", ".replaced"))
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "trainer" if state is not None else temporary).mkdir(parents=True)
    wait()
    _write_weights(model, temporary, rank)
    if critic:
        _write_weights(critic, temporary / "trainer" / "critic", rank)
    if optimizers and (rank == 0 or model.fsdp_root is not None):
        states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        torch.save(states, temporary / "trainer" / f"optimizers_{rank}.pt")
    if rank == 0:
        model.tokenizer.save_pretrained(temporary)
        for name, content in (files or {}).items():
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


def _write_weights(model: LanguageModel, folder: Path, rank: int) -> None:
    """Write weights by rank 0, of sharded ones as of others."""
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model.model, PeftModel) else {}
    if model.fsdp_root is not None:
        options["state_dict"], seen = {}, {}
        for name, tensor in model.model.state_dict().items():
            weight, address = full_tensor(tensor), tensor.to_local().data_ptr() or name
            if rank == 0:  # tied weights stay one
                options["state_dict"][name] = seen.setdefault(address, weight.cpu())
    if rank == 0:
        model.model.save_pretrained(folder, **options)


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


def check_disk(config: Config, models: Sequence[LanguageModel]) -> None:
    """Check that the checkpoints which a run keeps, and the one being written, will fit. Raises ConfigError."""
    trained = sum(weight.numel() for one in models for weight in one.model.parameters() if weight.requires_grad)
    moments = 2 if config.train.optimizer == "adamw8bit" else 8  # bytes of both
    needed = (config.train.keep_checkpoints + 1) * (4 + moments) * trained
    folder = config.run_dir / "checkpoints"
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    home = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(home).free
    if free + there < needed:
        raise ConfigError(
            f"checkpoints will take {needed / 2**30:.1f} GiB, {home} has {free / 2**30:.1f} GiB free: make room, or "
            f"lower train.keep_checkpoints={config.train.keep_checkpoints}"
        )


def _load(file: Path) -> Any:
    """Read what torch.save wrote. Raises ConfigError where that is not, or no longer, what is there."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{file.parent.parent} is not a whole checkpoint of a run ({file.name}: {first}): delete it, and let "
            "`latest` beside it point to the one before"
        ) from None


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

"""Checkpoints of a run: what is saved, all of it or nothing, and how a run goes on from the last one.

    checkpoints/000020/            a Hugging Face folder that transformers (an adapter: peft) and vLLM load as it is
        guidelines.json            what stands in the prompts of whoever loads it
        trainer/state.pt           iteration, advice, what the teacher has cost, the config, what it trains and plays
        trainer/optimizers_R.pt    the optimizers' states; with sharded weights rank R's part
        trainer/critic/            PPO's value model
    checkpoints/latest             -> the last whole one

A run that is killed goes on from its last whole checkpoint; SIGTERM and Ctrl-C save one first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Iterable, Sequence
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
from model_files import base_of, fingerprint, is_adapter

# When a run goes on: what changes the training in nothing but speed, memory, place and record, or is the cure of what
# ended it. Models, templates and env.data are compared by what lies there. The number of iterations is free only where
# the learning rate does not hang on it.
FREE_TO_CHANGE = {
    *("device", "sft", "eval", "env.machine_heap_mib", "model.attention", "model.gradient_checkpointing"),
    *("rollout.engine", "rollout.max_prompt_tokens", "rollout.concurrency", "rollout.kv_cache_gib"),
    *("rollout.tensor_parallel", "rollout.gpu_memory_utilization"),
    *("judge.base_url", "judge.key_env", "judge.concurrency", "judge.timeout_s", "judge.retries", "judge.cache"),
    *("judge.max_requests", "judge.max_tokens"),
    *("train.iterations", "train.optimizer", "train.tokens_per_micro_batch", "train.timeout_minutes"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.eval_every", "train.episodes_every"),
    *("train.coupling_every", "train.coupling_samples", "train.wandb"),
    "guidelines.file",  # which the start reads alone
}
# A cold start's, of which all else is free: its rows are compared themselves
FIXED_IN_SFT = {
    *("seed", "model.tune", "model.lora_rank", "model.lora_alpha", "model.dtype", "model.path", "model.base"),
    *("model.chat_template", "model.thinking", "sft.epochs", "sft.lr", "sft.warmup_ratio", "sft.samples_per_update"),
    "sft.prompt_loss",
}
BY_CONTENT = {  # option -> what TrainState.origin says of it
    "model.path": "model",
    "model.base": "base",
    "model.chat_template": "template",
    "env.data": "games",
}
FINAL = "final"  # the name of a finished cold start's only checkpoint
STEP_BYTES = 1500  # of one step in a record of episodes, compressed


@dataclass
class TrainState:
    """What a run carries from one iteration to the next, beside weights; the same on every rank."""

    iteration: int = 0  # the next one
    guidelines: list[str] = field(default_factory=list)  # in the prompts now
    advice: list[str] = field(default_factory=list)  # of critiques, for the next guidelines
    teacher_spent: dict[str, int] = field(default_factory=dict)  # requests and tokens so far
    origin: dict[str, str] = field(default_factory=dict)  # what it began with, by content: BY_CONTENT's
    extra: dict[str, Any] = field(default_factory=dict)  # what a script carries beside (paper/value_sft.py)
    folder: str = ""  # of the weights to start from
    optimizer_states: dict[str, Any] = field(default_factory=dict)  # "policy", "critic": taken out as they are loaded

    @property
    def is_final(self) -> bool:
        """Tell whether it is that of a cold start that is done."""
        return Path(self.folder).name == FINAL


def resume(config: Config, **learned: Iterable[str]) -> TrainState:
    """Read where the run stands: at its last checkpoint, or at its start.

    `learned` is what it learns from: the ids of its `games`, or in a cold start the texts of its `rows`. Raises
    ConfigError if the checkpoint was made by other settings, from another model, or learned from something else.
    """
    origin = {name: _digest(texts) for name, texts in learned.items()} | _model_origin(config)
    folder = _last_checkpoint(config.run_dir / "checkpoints" / "latest")
    if folder is None:
        return TrainState(guidelines=first_guidelines(config), origin=origin, folder=config.model.path)
    saved = _load(folder / "trainer" / "state.pt")
    if "guidelines" not in saved:
        raise ConfigError(f"{folder} was saved by another version of the project: choose another name (--set name=...)")
    then, parts = saved.pop("config"), saved.pop("parts")
    if changed := changed_settings(config, then, saved.setdefault("origin", {}), origin):
        raise ConfigError(
            f"{config.run_dir} was made with other settings ({', '.join(changed)}): choose another name "
            f"(--set name=...) or delete the folder"
        )
    state = TrainState(**saved, folder=str(folder.resolve()))
    if state.is_final:
        return state
    here = dist.get_world_size() if use_fsdp(config) else 1
    if parts != here:
        raise ConfigError(
            f"{folder} has its optimizer in {parts} parts, this run would have {here}: resume on as many ranks and "
            "with the same model.shard, or start another run from its weights (model.path)"
        )
    if then["train"]["optimizer"] == config.train.optimizer:
        own = folder / "trainer" / f"optimizers_{dist.get_rank() if parts > 1 else 0}.pt"
        state.optimizer_states = _load(own)
    elif dist.get_rank() == 0:
        print(f"train.optimizer={config.train.optimizer}: its moments begin anew", flush=True)
    return state


def _model_origin(config: Config) -> dict[str, str]:
    """Describe the model that training begins with, by content."""
    path, template = config.model.path, config.model.chat_template
    origin = {"model": fingerprint(path)}
    if is_adapter(path):
        origin["base"] = fingerprint(base_of(path, config))
    if template:
        origin["template"] = _digest([Path(template).read_text(encoding="utf-8")])
    return origin


def _last_checkpoint(link: Path) -> Path | None:
    """Find the checkpoint that `latest` links to, or without a link the newest, which a kill right after the first save
    leaves; None if there is none. Raises ConfigError, with the command that mends it, where `latest` is something else.
    """
    there = sorted(path.name for path in link.parent.glob("*") if path.name.isdigit() or path.name == FINAL)
    if link.is_symlink() and link.is_dir():
        return link
    if not os.path.lexists(link):
        return link.with_name(there[-1]) if there else None
    if there:
        cure = f"rm -rf {link}; ln -s {there[-1]} {link}"
    elif link.is_dir():
        is_final = not any((link / "trainer").glob("optimizers_*.pt"))
        name = FINAL if is_final else f"{_load(link / 'trainer' / 'state.pt')['iteration']:06d}"
        cure = f"mv {link} {link.with_name(name)}; ln -s {name} {link}"
    else:
        cure = f"rm {link}, and the run begins anew"
    raise ConfigError(f"{link} is not the link to the last checkpoint, which a run leaves there: {cure}")


def changed_settings(
    config: Config, then: dict[str, Any], origin_then: dict[str, str], origin: dict[str, str]
) -> list[str]:
    """List the settings that keep a run which was made with `then` from going on with `config`.

    What is free may differ; a place by another name is the same place if the same lies there.
    """
    now, default = (_flat(configuration.to_dict(one)) for one in (config, Config()))
    # an option that is younger than the run had its default's effect, but for this one
    before = default | {"train.deal": "shuffled"} | _flat(then)
    cold_start = "rows" in origin
    free = FREE_TO_CHANGE - ({"train.iterations"} if config.train.schedule == "linear" else set())
    changed = ["the rows"] if origin_then.get("rows") != origin.get("rows") else []  # RL has none
    for key in now | before:
        kind = BY_CONTENT.get(key, "")
        if kind in origin_then and kind in origin:
            differs = origin_then[kind] != origin[kind]
        else:
            differs = now.get(key) != before.get(key)
        may_differ = key not in FIXED_IN_SFT if cold_start else bool({key, key.split(".")[0]} & free)
        if differs and not may_differ:
            changed.append(key)
    return changed


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:16]


class RunLock:
    """A run's folder, taken by the first rank until release() or the end of its process, however that comes.

    Raises ConfigError if another process has it, or if nothing can be written there.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = None
        if dist.get_rank() != 0:
            return
        file = run_dir / "lock"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.file = file.open("a+")
        except OSError as error:
            raise ConfigError(f"cannot write to {run_dir}: {error.strerror or error}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            raise ConfigError(
                f"{run_dir} is in use by another process ({self.file.read().strip()}): stop it, or choose another name "
                "(--set name=...)"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{run_dir} cannot be locked ({error.strerror}): take care that no other process trains there")
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Let another process have the folder."""
        if self.file:
            self.file.close()


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
    name: str = "",
) -> None:
    """Write checkpoints/<iteration>/ (or that name) and then `latest`, each atomically; called by all ranks.

    Raises ConfigError where it cannot be written.
    """
    folder = config.run_dir / "checkpoints" / (name or f"{state.iteration:06d}")
    kept = {key: value for key, value in asdict(state).items() if key not in ("folder", "optimizer_states")}
    parts = dist.get_world_size() if policy.fsdp_root is not None else 1  # of the optimizers' states
    kept |= {"parts": parts, "config": configuration.to_dict(config)}
    try:
        save_model(policy, folder, {"guidelines.json": state.guidelines}, kept, optimizers, critic)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk speaks through each of them
        raise ConfigError(f"could not write {folder}: {error}. The checkpoint before it is whole") from error
    if dist.get_rank() == 0:
        point_latest(folder, 1 if name == FINAL else config.train.keep_checkpoints)
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
        model.chat.tokenizer.save_pretrained(temporary)
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


def rehearse_save(policy: LanguageModel, folder: Path) -> None:
    """Write all of a checkpoint but its weights, and delete it: what would fail then fails now. The first rank does.

    Raises ConfigError.
    """
    if dist.get_rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            policy.inner.config.save_pretrained(scratch)
            if policy.inner.generation_config is not None:
                policy.inner.generation_config.save_pretrained(scratch)
            policy.chat.tokenizer.save_pretrained(scratch)
            (Path(scratch) / "latest").symlink_to("000001")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"a checkpoint of {policy.base} could not be written to {folder}: {error}") from None


def check_disk(config: Config, models: Sequence[LanguageModel], iterations: int = 0) -> None:
    """Check that the checkpoints which a run keeps, and the one being written, will fit, beside the records of the
    episodes of so many iterations. Raises ConfigError."""
    trained = sum(weight.numel() for one in models for weight in one.model.parameters() if weight.requires_grad)
    moments = 2 if config.train.optimizer == "adamw8bit" else 8  # bytes of both
    needed = (config.train.keep_checkpoints + 1) * (4 + moments) * trained
    steps = config.rollout.groups * config.rollout.group_size * config.env.max_steps
    records = iterations // config.train.episodes_every * steps * STEP_BYTES
    folder = config.run_dir / "checkpoints"
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    home = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(home).free
    if free + there < needed + records:
        raise ConfigError(
            f"checkpoints will take {needed / 2**30:.1f} GiB, records of episodes up to {records / 2**30:.1f} GiB, and "
            f"{home} has {free / 2**30:.1f} GiB free: make room, lower train.keep_checkpoints="
            f"{config.train.keep_checkpoints}, or raise train.episodes_every={config.train.episodes_every}"
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

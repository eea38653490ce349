"""What several test files share: a tiny trained checkpoint, its configs, and the project's scripts as subprocesses."""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import config as configuration  # before torch: it sets the number of threads
from config import Config

ROOT = Path(__file__).parents[1]
SFT = """
name: tiny_sft
model: {{path: tiny, tiny_hidden: 64, tiny_layers: 2, tiny_heads: 2, tiny_vocab: 800}}
env: {{data: {games}, max_steps: 10}}
sft: {{variant: generative, episodes: 48, critic_examples: 32, noise: 0.2}}
"""
RL = """
name: tiny_rl
model: {{path: {checkpoint}}}
env: {{data: {games}, max_steps: 6}}
algo: {{advantage: gigpo}}
rollout: {{groups: 4, group_size: 4, temperature: 0.7, max_prompt_tokens: 800, max_response_tokens: 40, concurrency: 16,
          kv_cache_gib: 0.1}}
judge: {{enabled: true, questions: 8, group_size: 4, teacher: expert, max_prompt_tokens: 1200, max_response_tokens: 60}}
guidelines: {{every: 1, writer: medoid}}
train: {{iterations: 2, lr: 1.0e-3, rows_per_update: 48, tokens_per_micro_batch: 4096, checkpoint_every: 1,
        eval_every: 2}}
eval: {{levels: [L0, L1], games: 3, seeds: 2}}
"""


@functools.cache
def sft_config(games: Path, style: str = "think") -> Config:
    path = games.with_name("tiny_sft.yaml")
    path.write_text(SFT.format(games=games))
    return configuration.load(path, [f"prompt_style={style}"])


@functools.cache
def chat_rows(games: Path, style: str = "think") -> list[dict]:
    """Generated prompts and replies, as train_sft.py reads them."""
    import train_sft

    rows = [row["messages"] for row in train_sft.make_rows(sft_config(games, style))]
    return [{"prompt": question["content"], "response": answer["content"]} for question, answer in rows]


def corpus(games: Path) -> list[str]:
    return [row["prompt"] + row["response"] for row in chat_rows(games)]


@functools.cache
def checkpoint(games: Path, style: str = "think") -> Path:
    """A tiny model some seconds into its cold start: most of its replies are well formed, most of its actions bad.

    Thoughts are one word long, also those it judges, and it sees each critique thrice: there is no time to learn more.
    """
    import model
    import ranks
    import train_sft

    config = sft_config(games, style)
    folder = games.with_name(f"tiny_{style}") / "checkpoints" / "000001"
    actor = model.load_actor(config, corpus(games))
    rows = []
    for row in chat_rows(games, style):
        short = {key: re.sub(r"<(\w+)>(Plan: |Need).*?</\1>", r"<\1>So.</\1>", text) for key, text in row.items()}
        weighed = train_sft.tokenise(actor, short, prompt_loss=0.2)
        rows += [weighed] * (3 if row["prompt"].startswith("Role:") else 1)
    rng, updates = random.Random(0), 300
    optimizer = ranks.make_optimizer(actor.model, 8e-3, 0.0, (0.9, 0.95))
    for update in range(updates):
        batch = rng.sample(rows, 8)
        weight_T = torch.from_numpy(np.concatenate([weight for _, weight in batch])).float()
        logp_T, _ = model.token_logprobs(actor, [row for row, _ in batch])
        (-(logp_T * weight_T).sum() / weight_T.sum()).backward()
        torch.nn.utils.clip_grad_norm_(actor.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * min(1, update / 20, 2 * (1 - update / updates))
        optimizer.step()
        optimizer.zero_grad()
    model.save_model(actor, folder)
    return folder


def rl_yaml(games: Path, folder: Path) -> Path:
    """A config file in `folder` that trains the tiny checkpoint."""
    path = folder / "rl.yaml"
    path.write_text(RL.format(games=games, checkpoint=checkpoint(games)))
    return path


def rl_config(games: Path, *overrides: str) -> Config:
    return configuration.load(rl_yaml(games, games.parent), overrides)


def rows(games: Path, actor, config: Config) -> list:
    """24 rows of different lengths, a third of them critiques, a quarter without advantage; the model's log-probs."""
    from model import Row, all_logprobs

    rng = np.random.default_rng(0)
    made = [
        Row(
            np.array(actor.encode(text["prompt"])[-rng.integers(1, 150) :], dtype=np.int32),
            np.array(actor.encode_reply(text["response"])[: rng.integers(1, 30)], dtype=np.int32),
            advantage=0.0 if index % 4 == 3 else float(rng.normal()),
            judge=index % 3 == 2,
        )
        for index, text in enumerate(chat_rows(games)[:24])
    ]
    for row, logprobs in zip(made, all_logprobs(actor, made, 4096, config.rollout.temperature), strict=True):
        row.logprobs = logprobs
    return made


def off_policy(rows: list) -> list:
    """The rows as an engine would have sampled them whose log-probs are now and then off by half a nat."""
    rng = np.random.default_rng(1)
    noise = [rng.normal(0, 0.3, len(row.response_ids)).astype(np.float32) for row in rows]
    return [dataclasses.replace(row, logprobs=row.logprobs + off) for row, off in zip(rows, noise, strict=True)]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one | other)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def episodes_of(run: Path, iteration: int) -> tuple[list[dict], dict]:
    *episodes, extra = map(json.loads, (run / "episodes" / f"{iteration:06d}.jsonl").read_text().splitlines())
    return episodes, extra


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from model import load_actor

    return load_actor(Config(device="cpu"), path=str(folder)).model.state_dict()


def changed(config: Config, *overrides: str) -> Config:
    """The config with `--set` overrides."""
    with tempfile.TemporaryDirectory() as folder:
        configuration.save(config, Path(folder) / "config.yaml")
        return configuration.load(Path(folder) / "config.yaml", overrides)


def join() -> None:
    """A process group of this process alone."""
    import torch.distributed as dist

    import ranks

    if not dist.is_initialized():
        os.environ.pop("MASTER_PORT", None)  # an earlier group's port may still be taken
        ranks.join_ranks(Config())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(script: str | Path, *arguments: str | Path, ranks: int = 1) -> list[str]:
    """The command line of a script on so many ranks, with a port of its own."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [sys.executable, *(torchrun if ranks > 1 else ()), str(ROOT / script), *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without the traces of its own process group."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | extra


def run(script: str | Path, *arguments: str | Path, cwd: Path, ranks: int = 1, timeout: float = 240) -> str:
    """Run a script to its end and return what it printed; fails with its stderr."""
    done = subprocess.run(command(script, *arguments, ranks=ranks), cwd=cwd, env=environment(), timeout=timeout,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))

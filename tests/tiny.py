"""What several test files share: a tiny trained checkpoint, its configs, and the project's scripts as subprocesses."""

import dataclasses
import functools
import gzip
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
env: {{name: alfworld, data: {games}, max_steps: 10}}
sft: {{variant: generative, episodes: 48, judge_examples: 32, noise: 0.2}}
"""
RL = """
name: tiny_rl
model: {{path: {checkpoint}}}
env: {{name: alfworld, data: {games}, max_steps: 6}}
algo: {{advantage: gigpo}}
rollout: {{groups: 4, group_size: 4, temperature: 0.7, max_prompt_tokens: 800, max_response_tokens: 40, concurrency: 16,
          kv_cache_gib: 0.1}}
judge: {{enabled: true, questions: 8, group_size: 4, teacher: expert, max_prompt_tokens: 1200, max_response_tokens: 80}}
guidelines: {{every: 1, writer: medoid}}
train: {{iterations: 2, lr: 1.0e-3, samples_per_update: 48, tokens_per_micro_batch: 4096, checkpoint_every: 1,
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
    import sft_data

    rows = [row["messages"] for row in sft_data.make_rows(sft_config(games, style))]
    return [{"prompt": question["content"], "response": answer["content"]} for question, answer in rows]


def corpus(games: Path) -> list[str]:
    return [row["prompt"] + row["response"] for row in chat_rows(games)]


@functools.cache
def checkpoint(games: Path, style: str = "think") -> Path:
    """A tiny model some seconds into its cold start: most of its replies are well formed, most of its actions bad.

    Thoughts are one word long, also those it judges, and it sees each critique thrice: there is no time to learn more.
    """
    import checkpoint
    import distributed
    import model
    import train_sft
    from chat import ChatFormat
    from packing import lay_out
    from tools import tiny_base_model

    config = sft_config(games, style)
    folder = games.with_name(f"tiny_{style}") / "checkpoints" / "000001"
    built = tiny_base_model.build(corpus(games), config.seed, hidden=64, layers=2, heads=2, vocab=800)
    policy = model.place_on_device(config, built[0], ChatFormat(built[1]))
    rows = []
    for row in chat_rows(games, style):
        short = {key: re.sub(r"<(\w+)>(Plan: |Need).*?</\1>", r"<\1>So.</\1>", text) for key, text in row.items()}
        weighed = train_sft.tokenise(policy, short, prompt_loss=0.2)
        rows += [weighed] * (3 if row["prompt"].startswith("Role:") else 1)
    rng, updates = random.Random(0), 300
    optimizer = distributed.adamw([{"params": list(policy.model.parameters()), "weight_decay": 0.0}], (0.9, 0.95))
    for update in range(updates):
        batch = rng.sample(rows, 8)
        weight_T = torch.from_numpy(np.concatenate([weight for _, weight in batch])).float()
        logp_T, _ = model.token_logprobs(policy, lay_out([sample for sample, _ in batch], policy.packing))
        (-(logp_T * weight_T).sum() / weight_T.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * min(1, update / 20, 2 * (1 - update / updates))
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save_model(policy, folder)
    return folder


def rl_yaml(games: Path, folder: Path) -> Path:
    """A config file in `folder` that trains the tiny checkpoint."""
    path = folder / "rl.yaml"
    path.write_text(RL.format(games=games, checkpoint=checkpoint(games)))
    return path


def rl_config(games: Path, *overrides: str) -> Config:
    return configuration.load(rl_yaml(games, games.parent), overrides)


def samples(games: Path, policy, config: Config) -> list:
    """24 samples of different lengths, a third of them critiques, a quarter without advantage, with log-probs."""
    from model import all_logprobs
    from packing import Sample

    rng = np.random.default_rng(0)
    made = [
        Sample(
            np.array(policy.chat.encode(text["prompt"])[-rng.integers(1, 150) :], dtype=np.int32),
            np.array(policy.chat.encode_reply(text["response"])[: rng.integers(1, 30)], dtype=np.int32),
            advantage=0.0 if index % 4 == 3 else float(rng.normal()),
            is_critique=index % 3 == 2,
        )
        for index, text in enumerate(chat_rows(games)[:24])
    ]
    for sample, logprobs in zip(made, all_logprobs(policy, made, 4096, config.rollout.temperature), strict=True):
        sample.engine_logprobs = logprobs
    return made


def off_policy(samples: list) -> list:
    """The samples as an engine would have sampled them whose log-probs are now and then off by half a nat."""
    rng = np.random.default_rng(1)
    noise = [rng.normal(0, 0.3, len(sample.response_ids)).astype(np.float32) for sample in samples]
    return [
        dataclasses.replace(sample, engine_logprobs=sample.engine_logprobs + off)
        for sample, off in zip(samples, noise, strict=True)
    ]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one | other)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def episodes_of(run: Path, iteration: int) -> tuple[list[dict], dict]:
    *episodes, extra = map(json.loads, gzip.open(run / "episodes" / f"{iteration:06d}.jsonl.gz", "rt"))
    return episodes, extra


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from model import load_model

    return load_model(Config(device="cpu"), path=str(folder)).model.state_dict()


def changed(config: Config, *overrides: str) -> Config:
    """The config with `--set` overrides."""
    with tempfile.TemporaryDirectory() as folder:
        configuration.save(config, Path(folder) / "config.yaml")
        return configuration.load(Path(folder) / "config.yaml", overrides)


def join() -> None:
    """A process group of this process alone."""
    import torch.distributed as dist

    import distributed

    if not dist.is_initialized():
        os.environ.pop("MASTER_PORT", None)  # an earlier group's port may still be taken
        distributed.init_distributed(Config())


def assert_same_replies(found, expected, atol: float = 1e-5) -> None:
    """The same tokens; log-probs differ in their last digits by what else a pass computed, and copied."""
    assert [one.ids for one in found] == [one.ids for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)


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


def announced(stderr: str) -> list[str]:
    """List what a script said that it begins, without the times."""
    return re.findall(r"^\d\d:\d\d:\d\d  (.*)$", stderr, re.MULTILINE)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))

"""Weights in shards, LoRA and QLoRA: two ranks give what one rank gives that holds all of them."""

import pickle

import pytest
import tiny
import torch
import torch.distributed as dist

import train_rl
from config import Config
from model import Row, load_actor, load_critic, load_reference, named_weights
from ranks import is_sharded, make_optimizer
from rows import add_critic

SHARDED = "model.shard=always"
LORA = ["model.tune=lora", "model.lora_rank=4", "model.lora_alpha=8", "train.lr=1e-2"]
KL = ["algo.kl=0.1", "train.rows_per_update=8"]
SCENARIOS = {  # overrides; whether the weights are in shards
    "full": (KL, True),
    "full, bfloat16": (["model.dtype=bfloat16"], True),
    "full, checkpointing": (["model.gradient_checkpointing=true"], True),
    "mini-batches smaller than the world": (["train.rows_per_update=1", "train.tokens_per_micro_batch=300"], True),
    "8 bits": (["train.optimizer=adamw8bit"], True),
    "nthr": (["algo.nthr=true", "algo.nthr_beta=0"], True),
    "ppo": (["algo.advantage=ppo", "train.critic_lr=1e-3"], True),
    "lora": ([*LORA, *KL], False),
    "lora in shards": ([*LORA, *KL], True),
    "qlora": ([*LORA, "model.tune=qlora"], False),
}
WORKER = """
import pickle, sys, torch
sys.path.insert(0, {tests!r})
import test_ranks as here
from ranks import join_ranks
config, rows = pickle.load(open({data!r}, "rb"))
rank, world = join_ranks(config)
found = {{name: here.updated(name, config, rows, sharded) for name, (_, sharded) in here.SCENARIOS.items()}}
torch.save(found, {out!r} + str(rank))
torch.distributed.destroy_process_group()
"""


def updated(name: str, config: Config, rows: list[Row], sharded: bool) -> tuple[dict[str, torch.Tensor], dict]:
    """Every weight after two updates as a run makes them, and the second's metrics."""
    config = tiny.changed(config, *SCENARIOS[name][0], "model.shard=always" if sharded else "model.shard=never")
    actor = load_actor(config)
    assert is_sharded(actor.model) == (sharded and dist.get_world_size() > 1)
    reference = load_reference(config, actor)
    critic = load_critic(config, actor, config.model.path) if config.algo.advantage == "ppo" else None
    train, models = config.train, [one for one in (actor, critic) if one]
    optimizers = [make_optimizer(one.model, train.lr, 0.01, train.betas, train.optimizer) for one in models]
    for iteration in range(2):
        ready = tiny.off_policy(rows)
        share = [row for row in ready if row.group % dist.get_world_size() == dist.get_rank()]  # groups are whole
        train_rl.score(actor, reference, critic, share, config)
        ready = train_rl.gather(share)
        ready.sort(key=lambda row: (len(row.prompt_ids), row.prompt_ids.tolist(), row.response_ids.tolist()))
        if critic:
            add_critic(ready, config)
            train_rl.update_critic(critic, optimizers[1], ready, config, iteration)
        metrics = train_rl.update(actor, optimizers[0], ready, config, iteration)
    return {key: tensor.float().clone() for key, tensor in named_weights(actor)}, metrics


@pytest.fixture(scope="module")
def config(small_games) -> Config:
    tiny.join()
    return tiny.rl_config(small_games, "train.lr=1e-3", "train.tokens_per_micro_batch=1500")


@pytest.fixture(scope="module")
def rows(config, small_games) -> list[Row]:
    made = tiny.rows(small_games, load_actor(config), config)
    for place, row in enumerate(made):
        row.group, row.trajectory, row.won = place % 3, place, place % 2 > 0
    return made


def test_two_ranks_equal_one_in_every_way_of_holding_weights(rows, config, tmp_path):
    (tmp_path / "data").write_bytes(pickle.dumps((config, rows)))
    texts = dict(tests=str(tiny.ROOT / "tests"), data=str(tmp_path / "data"), out=str(tmp_path / "rank"))
    (tmp_path / "worker.py").write_text(WORKER.format(**texts))
    tiny.run(tmp_path / "worker.py", cwd=tmp_path, ranks=2, timeout=240)
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    start = dict(named_weights(load_actor(config)))
    for name in SCENARIOS:
        weights, metrics = updated(name, config, rows, sharded=False)
        assert list(first[name][0]) == list(weights) == list(start), name
        assert tiny.distance(first[name][0], second[name][0]) == 0, name
        exact = "bfloat16" not in name and "8 bits" not in name
        apart, moved = total_distance(first[name][0], weights), total_distance(weights, start)
        # where a gradient is all but 0, Adam steps by its sign, which rounding decides: hence a sum, not the largest
        assert apart < (1e-3 if exact else 0.2) * moved and moved > 1, name
        near = pytest.approx(metrics["train/grad_norm"], rel=1e-4 if exact else 0.05)
        assert first[name][1]["train/grad_norm"] == near, name


def total_distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[key] - other[key]).abs().sum()) for key in one | other)

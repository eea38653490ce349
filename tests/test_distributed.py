"""Weights in shards, LoRA and QLoRA: two ranks give what one rank gives that holds all of them."""

import json
import pickle
import re

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM

import baselines
import checkpoint
import config as configuration
import model
import train_rl
from checkpoint import TrainState
from config import Config
from distributed import Optimizer, all_gather_objects, full_tensor
from model import load_model, load_reference, named_weights
from packing import Sample
from samples import mini_batches, set_importance_weights

LORA = ["model.tune=lora", "model.lora_rank=4", "model.lora_alpha=8", "train.lr=1e-2"]
KL = ["algo.kl=0.1", "train.samples_per_update=8"]
SCENARIOS = {  # overrides; whether the weights are in shards
    "full": (KL, True),
    "full, bfloat16": (["model.dtype=bfloat16"], True),
    "full, checkpointing": (["model.gradient_checkpointing=true"], True),
    "mini-batches smaller than the world": (["train.samples_per_update=1", "train.tokens_per_micro_batch=300"], True),
    "ppo, 8 bits": (["algo.advantage=ppo", "train.critic_lr=1e-3", "train.optimizer=adamw8bit"], True),
    "nthr": (["algo.nthr=true", "algo.nthr_beta=0"], True),
    "ppo": (["algo.advantage=ppo", "train.critic_lr=1e-3"], True),
    "ppo, bfloat16": (["algo.advantage=ppo", "train.critic_lr=1e-3", "model.dtype=bfloat16"], True),
    "ppo, lora": ([*LORA, "algo.advantage=ppo", "train.critic_lr=1e-3"], False),
    "ppo, qlora, 8 bits": (
        [*LORA, "algo.advantage=ppo", "model.tune=qlora", "train.optimizer=adamw8bit"],
        False,
    ),
    "lora": ([*LORA, *KL], False),
    "lora in shards": ([*LORA, *KL], True),
    "qlora": ([*LORA, "model.tune=qlora"], False),
}
SCORE = re.compile(r"score\.(modules_to_save\.default\.)?(weight|bias)$")  # a value head, where it is trained
WORKER = """
import pickle, sys, torch
sys.path.insert(0, {tests!r})
import test_distributed as here
from distributed import init_distributed
config, samples = pickle.load(open({data!r}, "rb"))
rank, world = init_distributed(config)
found = {{name: here.updated(name, config, samples, sharded) for name, (_, sharded) in here.SCENARIOS.items()}}
torch.save(found, {out!r} + str(rank))
torch.distributed.destroy_process_group()
"""


def updated(name: str, config: Config, samples: list[Sample], sharded: bool) -> tuple[dict[str, torch.Tensor], dict]:
    """Every weight after two updates as a run makes them, and the second's metrics."""
    config = tiny.changed(config, *SCENARIOS[name][0], "model.shard=always" if sharded else "model.shard=never")
    rank, world, state = dist.get_rank(), dist.get_world_size(), TrainState(folder=config.model.path)
    policy, optimizer = train_rl.load_policy(config, state)
    assert (policy.fsdp_root is not None) == (sharded and world > 1)
    reference = load_reference(config, policy)
    ppo = baselines.PPO(config, policy, state) if config.algo.advantage == "ppo" else None
    for iteration in range(2):
        share = [sample for sample in tiny.off_policy(samples) if sample.group % world == rank]  # groups are whole
        if config.algo.nthr:
            baselines.nthr_reweight(policy, [sample for sample in share if not sample.is_critique], config)
        ready = all_gather_objects(share)
        ready.sort(key=lambda one: (len(one.prompt_ids), one.prompt_ids.tolist(), one.response_ids.tolist()))
        train_rl.score(policy, reference, ppo, ready, config)
        set_importance_weights(ready, config)
        if ppo:
            ppo.set_advantages(ready)
        batches = mini_batches(ready, config, iteration, world)
        if ppo:
            ppo.update(ready, batches, config.train.critic_lr, iteration)
        metrics = train_rl.update(policy, optimizer, batches, ready, config, config.train.lr, iteration)
    weights = {key: tensor.float().clone() for key, tensor in named_weights(policy)}
    if ppo:
        critic = ppo.critic.model.state_dict()
        weights |= {f"critic.{key}": full_tensor(one).float() for key, one in critic.items() if SCORE.search(key)}
    return weights, metrics


@pytest.fixture(scope="module")
def config(small_games) -> Config:
    tiny.join()
    return tiny.rl_config(small_games, "train.lr=1e-3", "train.tokens_per_micro_batch=1500")


@pytest.fixture(scope="module")
def samples(config, small_games) -> list[Sample]:
    made = tiny.samples(small_games, load_model(config), config)
    for index, sample in enumerate(made):
        sample.group, sample.trajectory, sample.won = index % 3, index, index % 2 > 0
    return made


def test_two_ranks_equal_one_in_every_way_of_holding_weights(samples, config, tmp_path):
    (tmp_path / "data").write_bytes(pickle.dumps((config, samples)))
    texts = dict(tests=str(tiny.ROOT / "tests"), data=str(tmp_path / "data"), out=str(tmp_path / "rank"))
    (tmp_path / "worker.py").write_text(WORKER.format(**texts))
    tiny.run(tmp_path / "worker.py", cwd=tmp_path, ranks=2, timeout=240)
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    start = dict(named_weights(load_model(config)))
    for name in SCENARIOS:
        weights, metrics = updated(name, config, samples, sharded=False)
        critic = {key: torch.zeros_like(one) for key, one in weights.items() if key.startswith("critic.")}
        assert list(first[name][0]) == list(weights) == list(start) + list(critic), name
        assert ("ppo" in name) == bool(critic) and all(one.any() for key, one in weights.items() if key in critic)
        assert tiny.distance(first[name][0], second[name][0]) == 0, name
        exact = "bfloat16" not in name and "8 bits" not in name
        apart, moved = total_distance(first[name][0], weights), total_distance(weights, start | critic)
        # where a gradient is all but 0, Adam steps by its sign, which rounding decides: hence a sum, not the largest
        assert apart < (1e-3 if exact else 0.2) * moved and moved > 1, name
        near = pytest.approx(metrics["train/grad_norm"], rel=1e-4 if exact else 0.05)
        assert first[name][1]["train/grad_norm"] == near, name


def total_distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[key] - other[key]).abs().sum()) for key in one | other)


ADAPTER = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
import config, distributed, model, packing
given = config.load(sys.argv[1])
distributed.init_distributed(given)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
folder = Path(sys.argv[2])
base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
llm = LLM(base, dtype="float32", enable_lora=True, max_lora_rank=8, max_loras=1, max_model_len=512, enforce_eager=True,
          kv_cache_memory_bytes=64 << 20, block_size=32, skip_tokenizer_init=True, disable_log_stats=True,
          enable_chunked_prefill=False, distributed_executor_backend="external_launcher")
policy = model.load_model(given, path=str(folder), train=False)
prompt = policy.chat.encode("You are in a room. Your task is to: look.")
params = SamplingParams(temperature=0, max_tokens=12, logprobs=0, detokenize=False)
adapted = LoRARequest("trained", 1, str(folder))
output = llm.generate([{"prompt_token_ids": prompt}], params, lora_request=adapted, use_tqdm=False)[0].outputs[0]
said = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
plain = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
sample = packing.Sample(*(torch.tensor(ids).numpy() for ids in (prompt, list(output.token_ids))))
ours = model.all_logprobs(policy, [sample], 4096, 1.0)[0]
first = lambda one: one.logprobs[0][one.token_ids[0]].logprob
print("GAP", abs(torch.tensor(said) - torch.tensor(ours)).max().item(), abs(first(output) - first(plain)))
llm.llm_engine.engine_core.shutdown()
"""


@pytest.fixture(scope="module")
def adapted(small_games, tmp_path_factory):
    """A finished run of two ranks that train an adapter, held to the model that they started from."""
    folder = tmp_path_factory.mktemp("adapted")
    settings = [*LORA, "algo.kl=0.1", "train.eval_every=0", "train.checkpoint_every=1"]
    tiny.run("train_rl.py", tiny.rl_yaml(small_games, folder), "--set", *settings, cwd=folder, ranks=2)
    return folder / "runs" / "tiny_rl"


def test_an_adapter_is_trained_saved_and_resumed(adapted, small_games, tmp_path, monkeypatch):
    first, second = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    assert (
        first["mismatch/weight_sync"] < 1e-4 and second["mismatch/max_abs"] < 1e-3
    )  # the engine has the merged weights
    assert 0 <= first["train/kl"] < second["train/kl"]
    base = tiny.checkpoint(small_games)
    folder = adapted / "checkpoints" / "latest"
    assert not list(folder.glob("model*.safetensors")) and (folder / "adapter_model.safetensors").is_file()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
    given = configuration.load(adapted / "config.yaml")
    policy = load_model(given, path=str(folder))
    ours = dict(named_weights(policy))
    assert tiny.distance(ours, {name: merged[name] for name in ours}) < 1e-6
    full = load_model(tiny.changed(given, "model.tune=full"), path=str(folder), train=False)
    assert tiny.distance(ours, full.model.state_dict()) < 1e-6  # part of the weights
    assert total_distance(ours, dict(named_weights(load_model(given)))) > 1
    monkeypatch.chdir(adapted.parents[1])
    state = checkpoint.resume(given)
    Optimizer(policy.model).load_state_dict(state.optimizer_states["policy"])
    assert state.iteration == 2 and state.folder == str(folder.resolve())


def test_an_adapter_is_the_start_of_another_run(adapted, small_games):
    """Its weights are the start, and what KL holds to; its own sizes count, not those of new adapters."""
    given = configuration.load(adapted / "config.yaml")
    start = tiny.changed(given, f"model.path={adapted / 'checkpoints' / 'latest'}", "algo.kl=0.1")
    policy = load_model(start)
    reference = load_reference(start, policy)
    before = dict(named_weights(policy))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.1)
    made = [Sample(np.arange(5), np.arange(3, 9))]
    with model.as_reference(reference, policy) as initial:
        held = model.all_logprobs(initial, made, 4096, 1.0)[0]
    moved = model.all_logprobs(policy, made, 4096, 1.0)[0]
    again = model.all_logprobs(load_model(start), made, 4096, 1.0)[0]
    assert np.abs(held - again).max() < 1e-5 < 1e-2 < np.abs(moved - again).max()
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.model.named_parameters() if ".default." in name
    }
    assert total_distance(before, dict(named_weights(policy))) > 1
    other = dict(named_weights(load_model(tiny.changed(start, "model.lora_rank=8"))))
    assert tiny.distance(before, other) == 0


def test_vllm_serves_an_adapter_as_it_is_saved(adapted, tmp_path):
    pytest.importorskip("vllm")
    (tmp_path / "serve.py").write_text(ADAPTER)
    arguments = (adapted / "config.yaml", (adapted / "checkpoints" / "latest").resolve())
    printed = tiny.run(tmp_path / "serve.py", *arguments, cwd=tmp_path)
    gap, effect = map(float, printed.split("GAP")[1].split()[:2])
    assert gap < 1e-4 < effect


def test_4_bit_weights_train_an_adapter(small_games, tmp_path, monkeypatch):
    """A whole run with QLoRA and 8-bit Adam, by the transformers engine."""
    monkeypatch.chdir(tmp_path)
    settings = [*LORA, "model.tune=qlora", "train.optimizer=adamw8bit", "rollout.engine=transformers"]
    settings += ["train.eval_every=0", "rollout.groups=2", "judge.teacher_steps=8"]
    tiny.run("train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
    lines = (tmp_path / "runs/tiny_rl/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["mismatch/weight_sync"] < 1e-3 for line in lines)
    assert (tmp_path / "runs/tiny_rl/checkpoints/latest/adapter_model.safetensors").is_file()

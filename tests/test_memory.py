"""tools/memory.py: parameters as published, and what settings add to or take off a phase, against sums by hand."""

import re
import subprocess
import sys

import pytest
import tiny

import config as configuration
from config import Config
from tools import memory

SEVEN = ("model.path=Qwen/Qwen2.5-7B-Instruct", "algo.kl=0")


def estimate(config: Config, gpu_gib: float = 80, world: int = 1) -> tuple[memory.Parameters, dict[str, dict]]:
    """Parameters, and by phase its parts and their "total"."""
    number, phases = memory.phases(config, gpu_gib, world)
    return number, {phase.name: phase.parts | {"total": phase.total} for phase in phases}


def test_memory_of_the_papers_models():
    """Parameters as published; float32 weights and two moments, and what a method adds."""
    number, parts = estimate(Config())
    assert number.all == number.trained == 1_543_714_304  # as its model card says: 1.54 billion
    weights = 4 * number.all / 2**30
    assert parts["load"]["total"] == pytest.approx(weights)
    assert parts["collect"]["total"] == pytest.approx(weights * 3 + 40)  # weights, two moments, engine
    checked = parts["sync"]["total"] - parts["collect"]["total"]  # copies in half precision, and what a layer keeps
    assert checked == pytest.approx(weights / 2 + parts["sync"]["activations"])
    # of policy, and of the reference after it
    assert parts["score"]["weights to compute with"] == pytest.approx(weights / 2)
    assert parts["update"]["weights to compute with"] == pytest.approx(weights / 2)
    assert parts["score"]["engine"] == parts["update"]["engine"] == memory.ASLEEP_GIB
    assert parts["update"]["gradients"] == pytest.approx(weights) and "their sum over ranks" not in parts["update"]
    kept = tiny.changed(Config(), "model.shard=never")
    assert estimate(kept, world=8)[1]["update"]["their sum over ranks"] == pytest.approx(weights)
    eight = tiny.changed(Config(), "train.optimizer=adamw8bit")
    assert estimate(eight)[1]["collect"]["Adam"] == pytest.approx(weights / 2)


def test_memory_of_shards_and_adapters():
    seven = tiny.changed(Config(), *SEVEN)
    number, parts = estimate(seven)
    assert number.all == 7_615_616_512 and "does not fit" in memory.table(seven)
    whole = 4 * number.all / 2**30
    _, shared = estimate(tiny.changed(seven, "algo.kl=0.01"), world=8)
    assert shared["load"]["total"] == pytest.approx(whole)  # before it is in shards
    assert shared["collect"]["trainer's weights"] == pytest.approx(whole / 8)
    assert shared["score"]["weights to compute with"] == pytest.approx(whole / 2)  # gathered
    assert shared["sync"]["weights to compute with"] == pytest.approx(whole / 2)  # beside the engine
    assert all(shared[name]["reference"] == pytest.approx(whole / 16) for name in ("sync", "collect", "score"))
    assert "reference" not in estimate(seven, world=8)[1]["score"]
    lora = tiny.changed(seven, "model.tune=lora", "model.lora_rank=16")
    number, adapted = estimate(lora)
    # per layer: q and o 3584 x 3584, k and v 3584 x 512, gate, up and down 3584 x 18944
    sums = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert number.trained == 28 * 16 * sums
    assert adapted["collect"]["trainer's weights"] == pytest.approx((2 * number.all + 4 * number.trained) / 2**30)
    _, quantised = estimate(tiny.changed(lora, "model.tune=qlora"))
    outside = number.all - number.matrices
    expected = 2 * outside + 4.5 / 8 * number.matrices + 4 * number.trained
    assert quantised["collect"]["trainer's weights"] == pytest.approx(expected / 2**30)
    _, saving = estimate(tiny.changed(seven, "model.gradient_checkpointing=true"))
    assert saving["update"]["activations"] < parts["update"]["activations"] / 3
    _, ppo = estimate(tiny.changed(seven, "algo.advantage=ppo", "rollout.group_size=1"))
    assert ppo["collect"]["total"] == pytest.approx(parts["collect"]["total"] + 3 * whole)
    assert ppo["load"]["total"] == pytest.approx(4 * whole)  # the critic's weights, the policy's and its moments


def test_an_engine_without_cache_does_not_fit():
    """It needs the model in half precision, 3 GiB, and 8 sequences of 2,560 tokens: 28 layers x 2 x 512 x 2 bytes."""
    seven = tiny.changed(Config(), *SEVEN, "rollout.gpu_memory_utilization=0.2")
    number, parts = estimate(seven, world=8)
    assert parts["collect"]["engine"] == pytest.approx((2 * number.all + 8 * 2560 * 28 * 2 * 512 * 2) / 2**30 + 3)
    table = memory.table(tiny.changed(seven, "train.tokens_per_micro_batch=2048"), 80, 8)
    assert "does not fit: rollout.gpu_memory_utilization=0.2" in table and "set it to 0.23" in table
    enough = tiny.changed(seven, "train.tokens_per_micro_batch=2048", "rollout.gpu_memory_utilization=0.23")
    assert "does not fit" not in memory.table(enough, 80, 8)


@pytest.mark.parametrize("file", sorted(tiny.ROOT.glob("configs/qwen*.yaml")), ids=lambda file: file.stem)
def test_the_papers_rows_fit_8_gpus_of_80_gib(file):
    """Also a cold start, which has no engine, but may have longer micro-batches."""
    config = configuration.load(file)
    longest = max(config.train.tokens_per_micro_batch, config.sft.tokens_per_micro_batch * ("_sft" in file.stem))
    config = tiny.changed(config, f"train.tokens_per_micro_batch={longest}")
    assert "does not fit" not in memory.table(config, 80, 8)


def test_a_model_that_is_not_here_has_no_estimate():
    unknown = tiny.changed(Config(), "model.path=runs/nosuch/checkpoints/latest")
    assert "sizes are not known" in memory.table(unknown)


def test_a_run_yet_to_be_made_has_the_sizes_of_the_model_that_it_will_start_from(tmp_path, monkeypatch):
    """Through two configs, each of which starts from the run of another; and no further than a circle."""
    names = {"first": "Qwen/Qwen2.5-7B-Instruct", "second": "runs/first_{env.level}/checkpoints/latest"}
    names |= {"chicken": "runs/egg/checkpoints/latest", "egg": "runs/chicken/checkpoints/latest"}
    (tmp_path / "configs").mkdir()
    for name, path in names.items():
        level = "_{env.level}" if name == "first" else ""
        (tmp_path / "configs" / f"{name}.yaml").write_text(f'name: "{name}{level}"\nmodel: {{path: "{path}"}}\n')
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    third = tiny.changed(Config(), "model.path=runs/second/checkpoints/latest", "env.level=L2")
    assert memory.count(third)[1].all == 7_615_616_512
    assert "not known" in memory.table(tiny.changed(Config(), "model.path=runs/egg/checkpoints/latest"))


def test_the_command_line_runs_from_any_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {path: Qwen/Qwen2.5-7B-Instruct}\n")
    command = [sys.executable, str(tiny.ROOT / "tools" / "memory.py"), "mine.yaml", "--gpus", "8", "--gib", "48"]
    done = subprocess.run([*command, "--set", "algo.kl=0"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(r"one of 8 ranks, .* GPU of 48 GiB; 7,615.6 million parameters, 7,615.6 trained", done.stdout)
    assert "does not fit" in done.stdout

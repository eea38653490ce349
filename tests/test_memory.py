"""tools/memory.py: parameters as published, and what settings add to or take off a phase, against sums by hand."""

import re
import subprocess
import sys

import pytest
import tiny

from config import Config
from tools import memory

SEVEN = ("model.path=Qwen/Qwen2.5-7B-Instruct", "algo.kl=0")


def test_memory_of_the_papers_models():
    """Parameters as published; float32 weights and two moments, and what a method adds."""
    number, (collect, score, update) = memory.phases(Config(), gpu_gib=80)
    assert number.all == number.trained == 1_543_714_304  # as its model card says: 1.54 billion
    weights = 4 * number.all / 2**30
    assert collect.total == pytest.approx(weights * 3 + 40)  # weights, two moments, engine
    assert score.parts["reference"] == update.parts["weights in half precision"] == pytest.approx(weights / 2)
    assert "engine" not in score.parts and "engine" not in update.parts  # it sleeps
    assert update.parts["gradients"] == pytest.approx(weights) and "their sum over ranks" not in update.parts
    kept = tiny.changed(Config(), "model.shard=never")
    assert memory.phases(kept, 80, world=8)[1][2].parts["their sum over ranks"] == pytest.approx(weights)
    eight = tiny.changed(Config(), "train.optimizer=adamw8bit")
    assert memory.phases(eight, 80)[1][0].parts["Adam"] == pytest.approx(weights / 2)


def test_memory_of_shards_and_adapters():
    seven = tiny.changed(Config(), *SEVEN)
    number, phases = memory.phases(seven, gpu_gib=80)
    assert number.all == 7_615_616_512 and "reference" not in phases[1].parts
    assert "does not fit" in memory.table(seven)
    _, shared = memory.phases(seven, 80, world=8)
    whole = 4 * number.all / 2**30
    assert shared[0].parts["trainer's weights"] == pytest.approx(whole / 8)
    assert shared[1].parts["weights in half precision"] == pytest.approx(whole / 2)  # gathered
    lora = tiny.changed(seven, "model.tune=lora", "model.lora_rank=16")
    number, adapted = memory.phases(lora, 80)
    # per layer: q and o 3584 x 3584, k and v 3584 x 512, gate, up and down 3584 x 18944
    sums = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert number.trained == 28 * 16 * sums
    assert adapted[0].parts["trainer's weights"] == pytest.approx((2 * number.all + 4 * number.trained) / 2**30)
    quantised = memory.phases(tiny.changed(lora, "model.tune=qlora"), 80)[1]
    outside = number.all - number.matrices
    expected = 2 * outside + 4.5 / 8 * number.matrices + 4 * number.trained
    assert quantised[0].parts["trainer's weights"] == pytest.approx(expected / 2**30)
    saving = tiny.changed(seven, "model.gradient_checkpointing=true")
    assert memory.phases(saving, 80)[1][2].parts["activations"] < phases[2].parts["activations"] / 3
    ppo = tiny.changed(seven, "algo.advantage=ppo", "rollout.group_size=1")
    assert memory.phases(ppo, 80)[1][0].total == pytest.approx(phases[0].total + 3 * whole)


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

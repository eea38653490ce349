"""Whole runs of train_rl.py, with vLLM: what they leave behind, killed and resumed, on two ranks, hanging."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config as configuration
import envs
import prompts
import train_rl
from checkpoint import resume
from config import ConfigError


@pytest.fixture(scope="module")
def run(small_games, tmp_path_factory) -> Path:
    """The folder of a finished run: two iterations with GCD and guidelines, on one rank, by vLLM."""
    folder = tmp_path_factory.mktemp("run")
    printed = tiny.run("train_rl.py", tiny.rl_yaml(small_games, folder), cwd=folder)
    (folder / "printed.txt").write_text(printed)
    return folder / "runs" / "tiny_rl"


def test_metrics_have_their_namespaces(run):
    first, second = tiny.metrics_of(run)
    assert (first["iteration"], second["iteration"]) == (0, 1)
    for record in (first, second):
        spaces = {key.split("/")[0] for key in record if "/" in key}
        assert spaces >= {"rollout", "train", "judge", "mismatch", "time"}
        assert ("eval" in spaces) == (record["iteration"] == 1)
        assert all(np.isfinite(value) for value in record.values())
        assert record["rollout/episodes"] == 16 and record["rollout/discarded"] == 0
        assert record["judge/questions"] >= 2 and record["judge/samples"] == 4 * record["judge/questions"]
        assert record["mismatch/mean_abs"] < 1e-4 and record["mismatch/weight_sync"] < 1e-4
        assert record["train/samples"] == record["rollout/steps"] and record["train/grad_norm"] > 0
        assert record["train/lr"] == 1e-3 and record["train/updates"] == -(-record["rollout/steps"] // 48)
        assert record["time/collect"] > 0 and record["time/total"] > record["time/update"]
    assert 0 <= second["eval/L0"] <= 1 and "eval/L1" in second
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/grad_norm")] == pytest.approx(
        [first["train/grad_norm"], second["train/grad_norm"]]
    )
    assert "iterations done" in (run.parents[1] / "printed.txt").read_text()


def test_episodes_are_dumped(run, small_games):
    for iteration, record in enumerate(tiny.metrics_of(run)):
        episodes, extra = tiny.episodes_of(run, iteration)
        assert [(e["group"], e["member"]) for e in episodes] == [(g, m) for g in range(4) for m in range(4)]
        assert np.mean([e["won"] for e in episodes]) == record["rollout/success"]
        assert sum(len(e["steps"]) for e in episodes) == record["rollout/steps"]
        assert ["response_ids" in e["steps"][0] for e in episodes] == [True, True] + [False] * 14
        assert len(extra["questions"]) == record["judge/questions"]
        assert sorted(q["label"] for q in extra["questions"]) == sorted([0, 1] * (len(extra["questions"]) // 2))
        for question in extra["questions"]:
            judged = next(e for e in episodes if (e["group"], e["member"]) == (question["group"], question["member"]))
            assert judged["steps"][question["step"]]["label"] == question["label"] and len(question["answers"]) == 4
    config = tiny.rl_config(small_games)
    drawn = train_rl.sample_tasks(envs.tasks(config.env, "L0", "train"), config, 1)
    tasks = {task.id for task in drawn.values()}
    assert {e["task"]["id"] for e in episodes} == tasks


def test_guidelines_enter_the_next_prompts(run):
    _, extra = tiny.episodes_of(run, 0)
    guidelines = tiny.episodes_of(run, 1)[1]["guidelines"]
    verdicts = [(prompts.parse_critique(answer), question["label"]) for question in extra["questions"]
                for answer in question["answers"]]  # fmt: skip
    advice = {critique.advice for critique, label in verdicts if critique.score == label and critique.advice}
    assert guidelines and set(guidelines) <= advice  # medoids of what right critiques advise
    prompt = tiny.episodes_of(run, 1)[0][0]["steps"][0]["prompt"]
    assert all(f"- {text}\n" in prompt for text in guidelines)
    assert extra["guidelines"] == [] and "guideline" not in tiny.episodes_of(run, 0)[0][0]["steps"][0]["prompt"]
    assert json.loads((run / "checkpoints" / "000001" / "guidelines.json").read_text()) == guidelines


def test_checkpoint_loads(run, small_games):
    folder = run / "checkpoints" / "latest"
    assert os.readlink(folder) == "000002"
    assert tiny.distance(tiny.weights_of(folder), tiny.weights_of(tiny.checkpoint(small_games))) > 1e-3
    assert tiny.distance(tiny.weights_of(folder), tiny.weights_of(run / "checkpoints" / "000001")) > 1e-4
    assert configuration.load(run / "config.yaml") == tiny.rl_config(small_games)
    assert json.loads((run / "machine.json").read_text())["torch"] == torch.__version__


def test_a_finished_run_has_nothing_left_to_do_and_refuses_other_settings(run, small_games, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    state = resume(tiny.rl_config(small_games))
    assert Path(state.folder) == run / "checkpoints" / "000002" and state.iteration == 2
    for free in ("train.iterations=9", "train.eval_every=0", "eval.seeds=5", "train.checkpoint_every=7"):
        assert resume(tiny.rl_config(small_games, free)).iteration == 2
    with pytest.raises(ConfigError, match=r"made with other settings \(algo.gamma, train.lr\): choose another name"):
        resume(tiny.rl_config(small_games, "train.lr=1", "algo.gamma=0.5"))
    fresh = resume(tiny.rl_config(small_games, "name=other", "train.lr=1"))
    assert (fresh.iteration, fresh.folder) == (0, str(tiny.checkpoint(small_games)))


def same_episodes(run: Path, other: Path, iteration: int) -> None:
    """Equal but for what is drawn per rank (which steps the teacher sees) and for rounding."""
    for one, two in zip(tiny.episodes_of(run, iteration)[0], tiny.episodes_of(other, iteration)[0], strict=True):
        assert {**one, "steps": 0} == {**two, "steps": 0}
        for step, twin in zip(one["steps"], two["steps"], strict=True):
            for key in ("observation", "response", "action", "valid", "available", "reward", "thought"):
                assert step[key] == twin[key]
            assert step["advantage"] == pytest.approx(twin["advantage"], abs=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(run, small_games, tmp_path):
    """A run that died after its first checkpoint, in the middle of writing the second."""
    copied = tiny.copy(run, tmp_path / "runs" / "tiny_rl")
    checkpoints = copied / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("000001")
    (checkpoints / "000002").rename(checkpoints / "000002.partial")
    (checkpoints / "000002.partial" / "model.safetensors").write_bytes(b"torn")
    written = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(written[: len(written) - 100])  # torn, too
    tiny.run("train_rl.py", tiny.rl_yaml(small_games, tmp_path), cwd=tmp_path)
    expected, found = tiny.metrics_of(run), tiny.metrics_of(copied)
    assert found[0] == expected[0] and len(found) == 2
    for key, value in expected[1].items():
        if not key.startswith("time/") and key != "rollout/tokens_per_s":
            assert found[1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    same_episodes(run, copied, 1)
    assert tiny.episodes_of(run, 1)[1] == tiny.episodes_of(copied, 1)[1]
    assert (
        tiny.distance(tiny.weights_of(run / "checkpoints" / "latest"), tiny.weights_of(checkpoints / "latest")) < 1e-6
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000001", "000002", "latest"]


# Runs train_rl.py until the second iteration's phase WHERE, and kills itself there.
KILLED = """
import os, signal, sys
import checkpoint, config, distributed, rollout, train_rl
where = os.environ["WHERE"]
def killed(owner, name, when, how=signal.SIGKILL):
    plain = getattr(owner, name)
    def wrapper(*arguments, **options):
        result = plain(*arguments, **options)
        if when(*arguments):
            os.kill(os.getpid(), how)
        return result
    setattr(owner, name, wrapper)
playing = lambda runner, *_: runner.episode.weights_version == 1 and runner.episode.steps
if where == "asked to end":
    killed(rollout.EpisodeRunner, "parse_completion", playing, signal.SIGTERM)
if where == "collect":
    killed(rollout.EpisodeRunner, "parse_completion", playing)
if where == "update":
    killed(distributed.Optimizer, "step", lambda *_: True)
if where == "save":
    killed(checkpoint.torch, "save", lambda _, file: "optimizers" in str(file))
config.fail_clearly(train_rl.main)
"""


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(run, small_games, tmp_path):
    """SIGTERM in the second iteration saves the first, which nothing had; then kill -9 in three phases."""
    (tmp_path / "killed.py").write_text(KILLED)
    again, codes = tmp_path / "runs" / "tiny_rl", []
    for where in ("asked to end", "collect", "update", "save", "nowhere"):
        every = 100 if where == "asked to end" else 1
        command = tiny.command(tmp_path / "killed.py", tiny.rl_yaml(small_games, tmp_path), "--set",
                               f"train.checkpoint_every={every}")  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, env=tiny.environment(WHERE=where), timeout=240)
        codes.append(done.returncode)
        assert os.readlink(again / "checkpoints" / "latest") == ("000002" if where == "nowhere" else "000001")
    assert codes == [0, -9, -9, -9, 0]
    for expected, found in zip(tiny.metrics_of(run), tiny.metrics_of(again), strict=True):
        for key, value in expected.items():
            if not key.startswith("time/") and key != "rollout/tokens_per_s":
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for iteration in (0, 1):
        same_episodes(run, again, iteration)
        assert tiny.episodes_of(run, iteration)[1] == tiny.episodes_of(again, iteration)[1]
    ends = (tiny.weights_of(one / "checkpoints" / "latest") for one in (run, again))
    assert tiny.distance(*ends) < 1e-6


RANKS = """
import sys, torch, torch.distributed as dist
import config, model, train_rl
plain = train_rl.sync_weights
def sync_weights(engine, policy):
    plain(engine, policy)
    torch.save({name: weight.clone() for name, weight in model.named_weights(policy)}, f"rank{dist.get_rank()}.pt")
train_rl.sync_weights = sync_weights
config.fail_clearly(train_rl.main)
"""
WAYS = {
    "whole weights": [],
    "weights in shards, on two nodes": ["model.shard=always"],
    "one engine of two ranks": ["rollout.tensor_parallel=2"],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_play_the_same_episodes_and_stay_equal(way, run, small_games, tmp_path):
    (tmp_path / "by_ranks.py").write_text(RANKS)
    settings = [tiny.rl_yaml(small_games, tmp_path), "--set", "train.iterations=1", "train.eval_every=1", *WAYS[way]]
    if "two nodes" in way:
        at = f"--master_port={tiny.free_port()}"
        agents = [
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1",
             "--master_addr=127.0.0.1", at, str(tmp_path / "by_ranks.py"), *map(str, settings)]
            for node in (0, 1)
        ]  # fmt: skip
        running = [subprocess.Popen(agent, cwd=tmp_path, env=tiny.environment()) for agent in agents]
        assert [agent.wait(timeout=240) for agent in running] == [0, 0]
    else:
        tiny.run(tmp_path / "by_ranks.py", *settings, cwd=tmp_path, ranks=2)
    twin = tmp_path / "runs" / "tiny_rl"
    same_episodes(run, twin, 0)
    one, two = tiny.metrics_of(run)[0], tiny.metrics_of(twin)[0]
    for key in one:
        if key.startswith("rollout/") and key != "rollout/tokens_per_s":
            assert two[key] == pytest.approx(one[key]), key
    assert two["mismatch/weight_sync"] < 1e-4 and two["mismatch/max_abs"] < 1e-3
    assert {"eval/L0", "eval/L1"} <= two.keys()
    weights = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert tiny.distance(*weights) == 0 == tiny.distance(weights[0], tiny.weights_of(twin / "checkpoints" / "latest"))
    assert tiny.distance(weights[0], tiny.weights_of(tiny.checkpoint(small_games))) > 1e-3


def test_a_torn_state_is_one_clear_line(run, small_games, tmp_path, monkeypatch):
    copied = tiny.copy(run, tmp_path / "runs" / "tiny_rl")
    monkeypatch.chdir(tmp_path)
    for name in ("state.pt", "optimizers_0.pt"):
        file = copied / "checkpoints" / "000002" / "trainer" / name
        whole = file.read_bytes()
        for torn in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
            file.write_bytes(torn)
            with pytest.raises(ConfigError, match=rf"latest is not a whole checkpoint of a run \({name}: .*delete it"):
                resume(tiny.rl_config(small_games))
        file.write_bytes(whole)
    assert resume(tiny.rl_config(small_games)).iteration == 2


HUNG = """
import sys, time, torch.distributed as dist
import config, train_rl
plain = train_rl.set_logprobs
def set_logprobs(*arguments):
    if dist.get_rank() == 1:
        time.sleep(18)  # twice the time-out; torchrun waits 30 s for one that sleeps on
    return plain(*arguments)
train_rl.set_logprobs = set_logprobs
config.fail_clearly(train_rl.main)
"""


def test_a_rank_that_hangs_ends_the_run(small_games, tmp_path):
    (tmp_path / "hung.py").write_text(HUNG)
    settings = ["train.timeout_minutes=0.15", "train.eval_every=0", "rollout.engine=transformers", "rollout.groups=2"]
    command = tiny.command(tmp_path / "hung.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, ranks=2)
    done = subprocess.run(command, cwd=tmp_path, env=tiny.environment(), timeout=240, capture_output=True, text=True)
    assert done.returncode != 0 and re.search(r"[Tt]imed out|timeout", done.stderr)


def test_weights_and_biases_are_shown_what_the_log_has(small_games, tmp_path, monkeypatch):
    """The real client, without a network; a resumed run goes on in the same record."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = ("name=shown", "train.wandb=tests", "rollout.engine=transformers", "train.eval_every=0")
    once = tiny.rl_yaml(small_games, tmp_path)
    tiny.run("train_rl.py", once, "--set", *settings, "train.iterations=1", cwd=tmp_path)
    tiny.run("train_rl.py", once, "--set", *settings, cwd=tmp_path)
    records = sorted((tmp_path / "runs/shown/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 2 and len({record.name for record in records}) == 1
    assert all(b"rollout/success" in record.read_bytes() for record in records)

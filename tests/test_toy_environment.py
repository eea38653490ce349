"""A user's environment: one module in a folder of their own is trained, judged and evaluated, without any edit here."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import config as configuration
import envs
import sft_data
import train_rl
import train_sft
from config import Config, ConfigError, newest_evaluation
from tools import tiny_base_model

TOY = Path(__file__).with_name("toy_environment.py")
YAML = """
env: {name: my_games.lighthouse, level: L2, max_steps: 6, history: 1}
model: {path: base}
algo: {advantage: gigpo}
rollout: {engine: transformers, groups: 4, group_size: 4, temperature: 0.7, max_prompt_tokens: 600,
          max_response_tokens: 64}
judge: {enabled: true, teacher: expert, questions: 8, group_size: 4, max_response_tokens: 100}
guidelines: {every: 1, writer: medoid}
train: {iterations: 2, lr: 1.0e-4, coupling_every: 0}
sft: {variant: generative, episodes: 96, judge_examples: 48, guided: 0.3, epochs: 7, lr: 3.0e-3, samples_per_update: 8}
eval: {games: 6, seeds: 2}
"""
REQUIRED = "from my_games.lighthouse import HELD_OUT_TYPES, PROMPT, TASK_TYPES, make, tasks"
BASE = f"model.path={tiny.ROOT / 'assets' / 'base'}"  # some model, for what ends before one is loaded
COLD_START = "runs/cold_start/checkpoints/latest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the toy as a module of a package, others that lack what is optional, a config."""
    folder = tmp_path_factory.mktemp("users")
    assert not folder.is_relative_to(tiny.ROOT)
    (folder / "my_games").mkdir()
    shutil.copy(TOY, folder / "my_games" / "lighthouse.py")
    (folder / "my_games" / "bare.py").write_text(f"{REQUIRED}\n")
    (folder / "my_games" / "no_expert.py").write_text(f"{REQUIRED}, make_teacher\n")
    (folder / "my_games" / "no_teacher.py").write_text(f"{REQUIRED}, make_expert\n")
    (folder / "config.yaml").write_text(YAML)
    return folder


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    envs.load.cache_clear()
    return folder


def load(*overrides: str) -> Config:
    return configuration.load("config.yaml", overrides)


# ----------------------------------------------------------------------------------------------------------------------
# From nothing to an evaluated policy


def test_a_cold_start_a_training_and_an_evaluation(there: Path) -> None:
    """One after the other, each a command as the README has it, on a tiny model made of the expert's rows."""
    rows = [row["messages"] for row in sft_data.make_rows(load())]
    texts = [question["content"] + answer["content"] for question, answer in rows]
    assert not any("Your task is to light" in text for text in texts)  # L2 holds it out
    sizes = dict(hidden=128, layers=2, heads=4, vocab=500)
    tiny_base_model.save(*tiny_base_model.build(texts, seed=0, **sizes), there / "base")

    printed = tiny.run("train_sft.py", "config.yaml", "--set", "name=cold_start", cwd=there)
    assert printed.splitlines()[-1] == f"{len(rows)} rows, 7 epochs: {COLD_START}"
    made = list((there / "data" / "sft").iterdir())
    assert len(made) == 1 and [json.loads(line)["messages"] for line in made[0].open()] == rows
    lines = tiny.metrics_of(there / "runs" / "cold_start")
    assert lines[-1]["train/nll_per_token"] < 0.3 < lines[0]["train/nll_per_token"]

    tiny.run("train_rl.py", "config.yaml", "--set", "name=rl", f"model.path={COLD_START}", cwd=there)
    check_training(there / "runs" / "rl")

    printed = tiny.run("evaluate.py", "--ckpt", "runs/rl/checkpoints/latest", cwd=there)
    assert "runs/rl/eval_" in printed
    check_evaluation(there / "runs" / "rl")


def check_training(run: Path) -> None:
    lines = tiny.metrics_of(run)
    assert len(lines) == 2
    for iteration, line in enumerate(lines):
        episodes, extra = tiny.episodes_of(run, iteration)
        steps = [step for episode in episodes for step in episode["steps"]]
        assert len(episodes) == line["rollout/episodes"] == 16
        assert {episode["task"]["env"] for episode in episodes} == {"my_games.lighthouse"}
        assert {episode["task"]["type"] for episode in episodes} <= {"find", "open"}
        assert line["rollout/success"] == sum(episode["won"] for episode in episodes) / 16
        assert line["rollout/invalid"] < 0.5 and line["rollout/score"] > 0
        teachers = [step for step in steps if step["label_source"] == "teacher"]
        assert len(teachers) == line["judge/label_good_teacher"] > 0
        assert all(step["label"] == 1 and step["available"] for step in teachers)
        assert line["judge/label_flawed"] == sum(step["label"] == 0 for step in steps) > 0
        assert line["judge/questions"] == len(extra["questions"]) == 8
        assert line["train/samples"] == len(steps) and line["judge/samples"] == 8 * 4
        assert line["train/skipped_steps"] == 0 and line["mismatch/weight_sync"] < 1e-3
    assert lines[0]["rollout/success"] + lines[1]["rollout/success"] > 0  # the cold start has taught something


def check_evaluation(run: Path) -> None:
    record = json.loads(newest_evaluation(run).read_text())
    assert list(record["levels"]) == ["L0", "L1", "L2"]
    played = [json.loads(line) for line in gzip.open(next(run.glob("eval_*_episodes.jsonl.gz")), "rt")]
    for number, (level, result) in enumerate(record["levels"].items()):
        episodes = played[12 * number : 12 * (number + 1)]
        assert result["n"] == len(episodes) == 12
        assert result["success"] == sum(episode["won"] for episode in episodes) / 12
        assert {episode["task"]["split"] for episode in episodes} == {envs.SPLITS[level]}
        assert set(result["types"]) <= {"find", "open", "light"}
    assert record["guidelines"]  # what right critiques advised
    assert record["guidelines"] == json.loads((run / "checkpoints" / "latest" / "guidelines.json").read_text())
    assert set(record["levels"]["L2"]["types"]) == {"light"} and record["levels"]["L2"]["trained_on"] == []


# ----------------------------------------------------------------------------------------------------------------------
# What is optional


def test_without_expert_and_teacher_one_can_train_and_learn_rows_of_ones_own(there: Path) -> None:
    (there / "rows.jsonl").write_text("")
    train_sft.preflight(load("env.name=my_games.bare", "sft.data=rows.jsonl", "sft.variant=vanilla", BASE), 1)
    tasks = train_rl.preflight(load("env.name=my_games.bare", "judge.teacher=none", BASE), 1)
    assert len(tasks) == 30 and {task.env for task in tasks} == {"my_games.bare"}


@pytest.mark.parametrize(
    ("preflight", "name", "overrides", "message"),
    [
        (train_sft.preflight, "no_expert", [], r"make_expert\(env_cfg, seed\): a cold start needs it, or rows of"),
        (train_sft.preflight, "bare", ["sft.variant=vanilla"], r"make_expert\(env_cfg, seed\)"),
        (train_sft.preflight, "no_teacher", [], r"make_teacher\(env_cfg, task\), .* cold start sft.variant=vanilla"),
        (train_rl.preflight, "no_teacher", [], r"make_teacher\(env_cfg, task\), .* judge.teacher=none or openai"),
    ],
)
def test_what_is_lacking_is_one_clear_error(there: Path, preflight, name: str, overrides: list, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^the environment my_games\.{name} has no {message}[^\n]*$"):
        preflight(load(BASE, f"env.name=my_games.{name}", *overrides), 1)


def test_the_error_of_a_command_is_one_line(there: Path) -> None:
    command = tiny.command("train_sft.py", "config.yaml", "--set", "env.name=my_games.no_expert", BASE)
    done = subprocess.run(command, cwd=there, env=tiny.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the environment my_games.no_expert has no make_expert(env_cfg, seed): a cold")

"""What the README shows as code, run as a reader would; and the tests that the paper's notes point at."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git applies the README's patches")


def patched(number: int, folder: Path) -> int:
    """Apply the README's worked patch of this number to a copy of the project in `folder`; its added lines."""
    patches = re.findall(r"```diff\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)
    for part in ("environments", "paper"):
        shutil.copytree(tiny.ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in tiny.ROOT.glob("*.py"):
        shutil.copy(file, folder)
    subprocess.run(["git", "apply", "-"], input=patches[number], cwd=folder, text=True, check=True)
    return sum(line.startswith("+") and not line.startswith("+++") for line in patches[number].splitlines())


@needs_git
def test_the_worked_advantage_trains(small_games, tmp_path):
    """One function in losses.py, at most 10 lines: it is leave-one-out, and trains."""
    assert patched(0, tmp_path) <= 10
    script = "import torch, losses; from test_losses import batch; from config import AlgoConfig; " + (
        "samples = batch([4.0, 1.0, 1.0, 7.0], [3, 3, 3, 8], [0, 1, 2, 3]); "
        "print(losses.advantages(samples, AlgoConfig(advantage='rloo')).tolist())"
    )
    shutil.copy(tiny.ROOT / "tests" / "test_losses.py", tmp_path)
    (tmp_path / "probe.py").write_text(script)
    printed = tiny.run(tmp_path / "probe.py", cwd=tmp_path)
    torch.testing.assert_close(torch.tensor(json.loads(printed)), torch.tensor([3.0, -1.5, -1.5, 0.0]))
    settings = "algo.advantage=rloo train.iterations=1 train.eval_every=0 rollout.engine=transformers".split()
    tiny.run(tmp_path / "train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
    assert (tmp_path / "runs" / "tiny_rl" / "checkpoints" / "latest").exists()


@needs_git
def test_the_worked_trajectory_judge_trains(small_games, tmp_path):
    """About 30 lines in judge.py and prompts.py: whole episodes are judged by how they ended, and it trains."""
    assert patched(1, tmp_path) <= 30
    settings = "train.iterations=1 train.eval_every=0 rollout.engine=transformers judge.teacher=none env.max_steps=10"
    settings += " judge.max_prompt_tokens=3000 rollout.groups=8"
    tiny.run(tmp_path / "train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings.split(), cwd=tmp_path)
    run = tmp_path / "runs" / "tiny_rl"
    (record,) = tiny.metrics_of(run)
    episodes, extra = tiny.episodes_of(run, 0)
    assert record["judge/questions"] >= 2 and record["judge/samples"] == 4 * record["judge/questions"]
    for question in extra["questions"]:
        (episode,) = [e for e in episodes if (e["group"], e["member"]) == (question["group"], question["member"])]
        assert question["label"] == episode["won"] and question["source"] == "outcome"
        assert question["step"] == len(episode["steps"]) - 1


def test_every_decision_of_the_papers_notes_has_a_test_that_exists():
    notes = (tiny.ROOT / "paper" / "paper_notes.md").read_text()
    files = {file.stem: file.read_text() for file in (tiny.ROOT / "tests").glob("test_*.py")}
    named = re.findall(r"`(?:tests/(test_\w+)\.py::)?(test_\w+)`", notes)
    assert len(named) > 60
    for file, test in named:
        assert f"\ndef {test}(" in (files[file] if file else "".join(files.values())), (file, test)
    decisions = re.findall(r"^\| (\d+) \|", notes.partition("## Decisions")[2], re.MULTILINE)
    tested = {
        number for line in re.findall(r"^- ([\d, ]+): `tests/", notes, re.MULTILINE) for number in line.split(", ")
    }
    assert decisions == [str(number) for number in range(1, len(decisions) + 1)] and set(decisions) <= tested

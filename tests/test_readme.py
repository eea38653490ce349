"""What the README shows as code, run as a reader would; and the tests that docs/ points at."""

import json
import re
import shutil
import subprocess

import pytest
import tiny
import torch


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the README's patch")
def test_the_worked_example_trains(small_games, tmp_path):
    """The patch applies to a copy of the project, touches at most 20 lines, is leave-one-out, and trains."""
    (patch,) = re.findall(r"```diff\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)
    assert sum(line.startswith("+") and not line.startswith("+++") for line in patch.splitlines()) <= 20
    for file in tiny.ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", "-"], input=patch, cwd=tmp_path, text=True, check=True)
    script = "import torch, losses; from test_losses import batch; from config import AlgoConfig; " + (
        "rows = batch([4.0, 1.0, 1.0, 7.0], [3, 3, 3, 8], [0, 1, 2, 3]); "
        "print(losses.advantages(rows, AlgoConfig(advantage='rloo')).tolist())"
    )
    shutil.copy(tiny.ROOT / "tests" / "test_losses.py", tmp_path)
    (tmp_path / "probe.py").write_text(script)
    printed = tiny.run(tmp_path / "probe.py", cwd=tmp_path)
    torch.testing.assert_close(torch.tensor(json.loads(printed)), torch.tensor([3.0, -1.5, -1.5, 0.0]))
    settings = "algo.advantage=rloo train.iterations=1 train.eval_every=0 rollout.engine=transformers".split()
    tiny.run(tmp_path / "train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
    assert (tmp_path / "runs" / "tiny_rl" / "checkpoints" / "latest").exists()


def test_every_decision_of_the_papers_notes_has_a_test_that_exists():
    notes = (tiny.ROOT / "docs" / "paper_notes.md").read_text()
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

"""envs.py: an environment is one module, found by name; levels are made of its splits; each error is one line."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config as configuration
import envs
import prompts
from config import Config, ConfigError, EnvConfig

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).with_name("toy_environment.py")
BARE = "from toy_env import PROMPT, TASK_TYPES, make, tasks\nHELD_OUT_TYPES = ()\n"  # nothing that is optional
FAULTS = {
    "one_type": "TASK_TYPES = ('find')",
    "other_type": "HELD_OUT_TYPES = ('ligth',)",
    "braces": "PROMPT = dataclasses.replace(PROMPT, closing='You can {action}.')",
    "no_env": "def make(env_cfg): return [env_cfg]",
    "twins": "original = tasks\ndef tasks(env_cfg, split): return original(env_cfg, split) * 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder, with environments in it."""
    folder = tmp_path_factory.mktemp("users")
    shutil.copy(TOY, folder / "toy_env.py")
    (folder / "bare_env.py").write_text(BARE)
    (folder / "half_env.py").write_text('TASK_TYPES = ("a",)\nHELD_OUT_TYPES = ()\n')
    (folder / "needy_env.py").write_text("import needy\n")  # a missing module whose name begins like its own
    (folder / "toys").mkdir()
    shutil.copy(TOY, folder / "toys" / "inner_env.py")
    for name, fault in FAULTS.items():
        (folder / f"{name}.py").write_text(f"import dataclasses\nfrom toy_env import *\n{fault}\n")
    return folder


@pytest.fixture
def there(folder, monkeypatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    envs.load.cache_clear()
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Found by name


def test_the_projects_own_environments_keep_the_contract():
    assert envs.names() == ("alfworld", "scienceworld")
    for name in envs.names():
        env = envs.load(name)
        assert env is importlib.import_module(f"environments.{name}")
        assert set(env.HELD_OUT_TYPES) < set(env.TASK_TYPES) and isinstance(env.PROMPT, prompts.EnvPrompt)
        assert all(callable(getattr(env, what)) for what in ("tasks", "make", "make_expert", "make_teacher"))
        assert all(sentence.endswith(".") for sentence in env.TEMPLATES.advice)


def test_a_module_in_the_current_folder_loads(there):
    env_cfg = EnvConfig(name="toy_env")
    envs.check(env_cfg)
    task = envs.tasks(env_cfg, "L2", "eval")[0]
    assert envs.play(env_cfg, task).splitlines()[-1] == "won: True, score: 1.0"
    assert [env.reset(task).done for env in envs.make_pool(env_cfg, 3)] == [False] * 3
    assert envs.make_teacher(env_cfg, task).best_action().startswith("go to the ")
    ctx = prompts.PromptContext("toy_env", "open the door", "You are here.", ("go", "wait"))
    assert prompts.build_prompt(ctx).startswith(
        "You are in an old lighthouse. Your task is to open the door.\nYour current observation is: You are here.\n"
        "Here you can ['go'\n 'wait'].\nIt is your turn: reason step by step. This reasoning process"
    )
    assert envs.load("toys.inner_env").TASK_TYPES == ("find", "open", "light")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "env.name is empty: say which environment; valid: alfworld, scienceworld, or a module of yours"),
        ("alfwrold", "env.name='alfwrold' is neither under environments/ nor .*; did you mean 'alfworld'?"),
        ("scienceworld_engine", "neither under environments/ nor an importable module; did you mean 'scienceworld'?"),
        ("toy", "neither under environments/ nor an importable module; valid: alfworld, scienceworld"),
        ("toys.outer_env", "env.name='toys.outer_env' is neither"),
        ("toys/inner_env.py", "is neither"),
        (".toy_env", "is neither"),
        ("toys..inner_env", "is neither"),
        ("half_env", "env.name='half_env': half_env is no environment, it lacks PROMPT, tasks, make"),
        ("one_type", r"TASK_TYPES is one text, not several: \('find',\) has a comma"),
        ("other_type", "HELD_OUT_TYPES has 'ligth'; did you mean 'light'"),
        ("braces", "PROMPT.closing has {action}; did you mean 'actions'"),
    ],
)
def test_a_name_that_is_no_environments(there, name, message):
    with pytest.raises(ConfigError, match=message):
        envs.load(name)


def test_what_no_environment_makes_or_lists(there):
    with pytest.raises(
        ConfigError, match=r"no_env's make\(env_cfg\) gives a list, which lacks reset, step, restart, thr"
    ):
        envs.make_pool(EnvConfig(name="no_env"), 2)
    with pytest.raises(ConfigError, match="twins has two tasks of the same id in split 'seen'"):
        envs.tasks(EnvConfig(name="twins"), "L0", "eval")


def test_what_an_environment_itself_lacks_is_not_hidden(there):
    with pytest.raises(ConfigError, match="needy_env cannot be imported: ModuleNotFoundError: No module named 'needy'"):
        envs.load("needy_env")


def test_an_environment_without_expert_or_teacher(there):
    env_cfg = EnvConfig(name="bare_env")
    task = envs.tasks(env_cfg, "L0", "eval")[0]
    with pytest.raises(ConfigError, match="bare_env has no make_expert.*: a cold start needs it, or rows of your own"):
        envs.make_expert(env_cfg)
    for ask in (lambda: envs.check_teacher(env_cfg), lambda: envs.make_teacher(env_cfg, task)):
        with pytest.raises(
            ConfigError, match="bare_env has no make_teacher.*: set judge.teacher=none or openai, for a"
        ):
            ask()


# ----------------------------------------------------------------------------------------------------------------------
# Task types, levels and splits


@pytest.mark.parametrize(
    ("level", "phase", "split", "types"),
    [
        ("L0", "train", "train", ("find", "open", "light")),
        ("L1", "train", "train", ("find", "open", "light")),
        ("L2", "train", "train", ("find", "open")),
        ("L0", "eval", "seen", ("find", "open", "light")),
        ("L1", "eval", "unseen", ("find", "open", "light")),
        ("L2", "eval", "unseen", ("light",)),
    ],
)
def test_levels_are_composed_of_splits(there, level, phase, split, types):
    env_cfg = EnvConfig(name="toy_env", level="L2")  # env.level is that of training: it does not matter here
    expected = [task for task in envs.load("toy_env").tasks(env_cfg, split) if task.type in types]
    assert envs.tasks(env_cfg, level, phase) == expected
    assert len(expected) == (10 if split == "unseen" else 15) * len(types)


def test_types_and_held_out_types_of_the_config(there):
    env_cfg = EnvConfig(name="toy_env", task_types=("open", "find"), held_out_types=("open", "light"))

    def found(level: str, phase: str) -> set[str]:
        return {task.type for task in envs.tasks(env_cfg, level, phase)}

    assert found("L0", "train") == found("L1", "train") == {"find", "open"}
    assert found("L0", "eval") == found("L1", "eval") == {"find", "open"}
    assert found("L2", "train") == {"find"} and found("L2", "eval") == {"open", "light"}


def test_a_level_without_tasks_is_explained(there):
    with pytest.raises(
        ConfigError, match=r"level L2 \(eval\) has no tasks of types none \(no type is held out: leave L2 out of eval"
    ):
        envs.tasks(EnvConfig(name="bare_env"), "L2", "eval")
    with pytest.raises(ConfigError, match=r"L2 \(train\) has no tasks of types .* in split 'train' in games$"):
        envs.tasks(EnvConfig(name="toy_env", data="games", task_types=("light",)), "L2", "train")


@pytest.mark.parametrize(("level", "phase"), [("L3", "train"), ("L0", "test"), ("", "eval")])
def test_unknown_levels_and_phases(there, level, phase):
    with pytest.raises(ValueError, match="no tasks for level"):
        envs.tasks(EnvConfig(name="toy_env"), level, phase)


def test_task_types_are_the_environments_own_unless_named():
    for name, (count, held_out) in {"alfworld": (6, 2), "scienceworld": (29, 10)}.items():
        env_cfg = EnvConfig(name=name)
        types, held_back = envs.task_types(env_cfg), envs.held_out_types(env_cfg)
        assert (len(types), len(held_back)) == (count, held_out) and set(held_back) < set(types)
        assert envs.trained_types(env_cfg) == envs.trained_types(env_cfg, "L1") == types
        trained = envs.trained_types(EnvConfig(name=name, level="L2"))
        assert set(trained) == set(types) - set(held_back) and trained == envs.trained_types(env_cfg, "L2")
    env_cfg = EnvConfig(name="scienceworld", task_types=("boil", "melt"), held_out_types=("melt",))
    assert (envs.task_types(env_cfg), envs.held_out_types(env_cfg)) == (("boil", "melt"), ("melt",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "alfworld", "task_types": ("pick_and_place",)}, "env.task_types.*'pick_and_place_simple'"),
        ({"name": "scienceworld", "held_out_types": ("boli",)}, "env.held_out_types: unknown task type 'boli'.*'boil'"),
        ({"name": "scienceworld", "task_types": ("pick_and_place_simple",)}, "unknown task type"),
        ({"name": "scienceworld", "simplification": "esay"}, "'easy'"),
        ({"name": "scienceworld", "simplification": "openDoors,noElectricalAction"}, "without a solution"),
        ({"name": "toy_env", "task_types": ("opne",)}, "'open'"),
    ],
)
def test_options_are_checked_against_the_environment(there, fields, message):
    with pytest.raises(ConfigError, match=message):
        envs.check(EnvConfig(**fields))
    envs.check(EnvConfig(name=fields["name"]))


def test_level_2_does_not_go_on_from_a_run_that_saw_its_types(tmp_path, monkeypatch):
    """Neither at once nor by way of a run between."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")

    def load(*overrides: str) -> Config:
        return configuration.load(tmp_path / "empty.yaml", ["env.name=alfworld", *overrides])

    def run(name: str, *overrides: str) -> str:
        configuration.save(load(f"name={name}", *overrides), Path("runs") / name / "config.yaml")
        return f"model.path=runs/{name}/checkpoints/latest"

    first = run("sft")
    middle = run("rl", first, "env.level=L2")
    envs.check_lineage(load(first))
    envs.check_lineage(load(first, "env.level=L1"))
    for start in (first, middle):
        with pytest.raises(
            ConfigError, match="pick_cool.*, pick_two.*, on which runs/sft was trained: start from a cold"
        ):
            envs.check_lineage(load(start, "env.level=L2"))
    clean = run("clean_sft", "env.level=L2")
    envs.check_lineage(load(run("clean_rl", clean, "env.level=L2"), "env.level=L2"))
    envs.check_lineage(load(first, "env.level=L2", "env.name=scienceworld"))
    narrow = run("narrow", "env.task_types=[pick_and_place_simple, look_at_obj_in_light]")
    envs.check_lineage(load(narrow, "env.level=L2"))
    envs.check_lineage(load("model.path=Qwen/Qwen2.5-1.5B-Instruct", "env.level=L2"))
    itself = run("loop", "model.path=runs/loop/checkpoints/latest", "env.level=L2")
    envs.check_lineage(load(itself, "env.level=L2"))
    alfworld = envs.load("alfworld")
    assert envs.lineage("runs/rl/checkpoints/latest") == {
        kind: "runs/sft" if kind in alfworld.HELD_OUT_TYPES else "runs/rl" for kind in alfworld.TASK_TYPES
    }


# ----------------------------------------------------------------------------------------------------------------------
# To look at


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """What `python envs.py` prints, in a folder that is not the project's, without $ALFWORLD_DATA."""
    environment = {key: value for key, value in os.environ.items() if key not in ("ALFWORLD_DATA", "PYTHONPATH")}
    argv = [sys.executable, str(ROOT / "envs.py"), *map(str, arguments)]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_splits_of_all_environments_also_without_the_data_of_one(tmp_path):
    done = command("--splits", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    assert lines[0].startswith("alfworld: no games: set $ALFWORLD_DATA")
    assert lines[1].split()[:3] == ["scienceworld", "L0", "train"] and lines[-1].split()[:3] == ["all", "3322", "1661"]


def test_splits_of_one_environment(tmp_path, folder, small_games):
    lines = command("--splits", "--env", "toy_env", cwd=folder).stdout.splitlines()
    assert lines[-1].split() == ["all", "45", "45", "45", "30", "30", "10"] and len(lines) == 5
    lines = command("--splits", "--env", "bare_env", cwd=folder).stdout.splitlines()
    assert lines[-1].split() == ["all", "45", "45", "45", "30"]  # nothing is held out: there is no level L2
    lines = command("--splits", "--env", "alfworld", "--data", small_games, cwd=tmp_path).stdout.splitlines()
    assert lines[-1].split() == ["all", "24", "12", "24", "12", "16", "4"]
    done = command("--splits", "--env", "alfworld", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no games: set $ALFWORLD_DATA")


@pytest.mark.parametrize("name", ["alfworld", "scienceworld", "toy_env"])
def test_an_episode_is_printed(folder, small_games, name):
    data = ["--data", small_games] if name == "alfworld" else []
    done = command("--play", name, "--task", "1", *data, cwd=folder)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[1].startswith("Task: ") and lines[-1] == "won: True, score: 1.0", done.stderr
    assert sum(line.startswith("> ") for line in lines) >= 2


def test_what_cannot_be_printed_is_one_line(folder):
    for arguments, message in (
        (["--play", "toy_env", "--task", "45"], "--task 45: there are tasks 0 to 44"),
        (["--play", "bare_env"], "the environment bare_env has no make_expert"),
        (["--gold", "--env", "toy_env"], "the environment toy_env has no expert_table(env_cfg)"),
        (["--splits", "--env", "toy_evn"], "env.name='toy_evn' is neither under environments/"),
    ):
        done = command(*arguments, cwd=folder)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {message}")

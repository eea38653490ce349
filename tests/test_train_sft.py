"""train_sft.py's data: thoughts, critiques, chat rows, their cache; tokenising and mini-batches."""

import dataclasses
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import envs
import games
import model
import prompts
import train_sft
from config import TASK_TYPES, Config, ConfigError, EnvConfig, SFTConfig
from judge import ExpertTeacher
from thoughts import Situation, alfworld_thought, critique
from train_sft import Turn, make_rows, read_rows, rows_file, tokenise, updates

THOUGHT = re.compile(
    r"Need (?P<need>.*)\. Have (?P<have>.*)\. Been (?P<been>.*)\. Here (?P<here>.*)\. Next (?P<next>.*)\."
)
NEEDS = {"pick_clean": "clean", "pick_heat": "hot", "pick_cool": "cool", "pick_two_obj": "two"}


def config_of(folder: Path, level: str = "L0", **sft) -> Config:
    sft = {"episodes": 24, "critic_examples": 8} | sft
    return Config(env=EnvConfig(data=str(folder), level=level, history=3), sft=SFTConfig(**sft))


def read(row: dict) -> tuple[str, str]:
    """Question and answer of a chat row."""
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def offered(prompt: str) -> list[str]:
    """The admissible actions that an actor's prompt shows."""
    listed = re.search(r"Your admissible actions of the current situation are: \[(.*?)\]\.\n", prompt, re.DOTALL)[1]
    return [action.strip("'") for action in listed.split("\n ")]


# ---------------------------------------------------------------------------------------------------------------------
# Thoughts


def at(task: str, actions: str = "look", history: tuple[tuple[str, str], ...] = ()) -> Situation:
    return Situation("alfworld", task, "seen", tuple(actions.split(", ")), history, len(history))


def test_a_thought_in_full() -> None:
    history = (("a", "go to drawer 1"), ("b", "open drawer 1"), ("c", "go to desk 1"), ("d", "look"))
    actions = "examine desk 1, go to drawer 1, look, take mug 2 from desk 1, take pen 1 from desk 1"
    assert alfworld_thought(at("put a clean mug in shelf.", actions, history)) == (
        "Need clean mug in shelf. Have nothing. Been drawer 1, desk 1. Here mug 2, pen 1. Next mug 2."
    )
    history += (("e", "take mug 2 from desk 1"), ("f", "go to drawer 1"))
    actions = "close drawer 1, examine drawer 1, examine mug 2, go to shelf 2, move mug 2 to drawer 1, look"
    assert alfworld_thought(at("clean some mug and put it in shelf.", actions, history)) == (
        "Need clean mug in shelf. Have mug 2. Been drawer 1, desk 1, drawer 1. Here nothing. Next nothing."
    )
    history += (("You clean the mug 2 using the sinkbasin 1.", "look"),)
    assert alfworld_thought(at("clean some mug and put it in shelf.", actions, history)) == (
        "Need clean mug in shelf. Have clean mug 2. Been drawer 1, desk 1, drawer 1. Here nothing. Next shelf 2."
    )
    assert alfworld_thought(at("cool some mug and put it in shelf.", actions, history)).endswith(
        "Here nothing. Next nothing."
    )
    assert alfworld_thought(at("look at mug under the desklamp.", "use desklamp 1, examine mug 2, examine desk 1")) == (
        "Need a mug in desklamp. Have mug 2. Been nowhere. Here desklamp 1. Next desklamp 1."
    )
    actions = "take mug 2 from desk 1, use desklamp 1"
    assert alfworld_thought(at("look at mug under the desklamp.", actions)).endswith(
        "Here mug 2, desklamp 1. Next mug 2."
    )
    assert alfworld_thought(at("put some mug on desk.", "examine desk 1, examine mug 2")).endswith("Next desk 1.")


def test_every_task_sentence_is_understood() -> None:
    """All wordings that ALFWorld has for its six types."""
    from make_games import package

    for kind in TASK_TYPES["alfworld"]:
        state = next((word for prefix, word in NEEDS.items() if kind.startswith(prefix)), "a")
        for template in package()["goals"][kind]["templates"]:
            task = template.format(obj="mug", recep="shelf", toggle="desklamp") + "."
            place = "desklamp" if kind == "look_at_obj_in_light" else "shelf"
            assert alfworld_thought(at(task)).startswith(f"Need {state} mug in {place}. Have nothing. Been nowhere."), (
                task
            )


def check_thought(situation: Situation, play: games.Play, counts: Counter) -> None:
    """What the thought says is so in the game."""
    game, said = play.game, THOUGHT.fullmatch(alfworld_thought(situation))
    state = next((word for prefix, word in NEEDS.items() if game.task_type.startswith(prefix)), "a")
    wanted = {game.names[obj].split()[0] for obj in game.goal_objects}
    goals = {game.names[place].split()[0] for place in game.goal_receptacles | game.goal_lamps}
    need = said["need"].split()
    assert [need[0], {need[1]}, need[2], {need[3]}] == [state, wanted, "in", goals]

    *states, held = re.fullmatch(r"(?:(\w+) )??(nothing|\w+ \d+)", said["have"]).groups()
    assert held == ("nothing" if play.held is None else game.names[play.held])
    for word in filter(None, states):  # also of objects for which the task does not ask it
        assert play.held in play.changed[{"clean": "clean", "hot": "heat", "cool": "cool"}[word]]
        counts["held changed"] += 1
    if play.held is not None:
        counts["held at a place" if play.here else "held elsewhere"] += 1

    went = [action.removeprefix("go to ") for _, action in situation.history if action.startswith("go to ")]
    been = [] if said["been"] == "nowhere" else said["been"].split(", ")
    assert been == went
    if been:
        assert game.location_of[game.names.index(been[-1])] == play.location
        counts["been"] += 1

    def usable(obj: int, place: int) -> bool:
        takes = play.held is None and play.accessible(place) and obj in game.static["pickupable"]
        return takes or obj in game.static["toggleable"]

    here = {obj for place in play.here for obj in play.contents[place] if usable(obj, place)}
    assert sorted(said["here"].split(", ")) == (sorted(game.names[obj] for obj in here) or ["nothing"])
    ready = play.held in game.goal_objects and (need[0] in ("a", "two") or states == [need[0]])
    assert not ready or play.ready(play.held)
    counting = here & game.goal_objects
    if ready:
        counting = game.goal_receptacles or here & game.goal_lamps
    if said["next"] == "nothing":
        assert not counting
        counts["nothing counts"] += 1
    else:
        assert said["next"] in {game.names[entity] for entity in counting}
        counts["a place counts" if ready else "an object counts"] += 1


def test_thoughts_are_true_on_played_states(small_games: Path) -> None:
    """Along half random, half winning play, which takes things along and passes by other places with them."""
    config, counts, rng = config_of(small_games), Counter(), random.Random(0)
    tasks = [task for level in ("L0", "L1") for task in envs.tasks(config.env, level, "eval")]
    for task in tasks + envs.tasks(config.env, "L0", "train"):
        env, turns = envs.make_env(config.env), []
        seen = env.reset(task)
        for _ in range(25):
            situation = train_sft._situation(config, seen, turns)
            check_thought(situation, env.play, counts)
            plan = games.solve(env.play)
            moves = [action for action in seen.actions if action.split()[0] in ("go", "open", "take")]
            action = plan[0] if plan and rng.random() < 0.5 else rng.choice(moves or seen.actions)
            turns.append(Turn(situation, action, True))
            seen = env.step(action)
            if seen.done:
                break
    cases = "held at a place", "held changed", "been", "a place counts", "an object counts", "nothing counts"
    assert all(counts[case] > 50 for case in cases), counts


def test_receptacles_are_told_from_objects() -> None:
    """No object that can be held is taken for a receptacle, and no receptacle for something held."""
    from make_games import package, rooms, type_of

    assert {type_of(place).lower() for room in rooms() for place in room.receptacles} <= envs.RECEPTACLE_TYPES
    assert not {kind.lower() for kind in package()["pickupable"]} & envs.RECEPTACLE_TYPES


# ---------------------------------------------------------------------------------------------------------------------
# Critiques


@pytest.mark.parametrize("verdict", [0, 1])
@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("go to bed 1", "search"),
        ("open drawer 1", "search"),
        ("take mug 1 from bed 1", "grab"),
        ("move mug 1 to bed 1", "deliver"),
        ("use desklamp 1", "deliver"),
        ("clean mug 1 with sinkbasin 1", "deliver"),
        ("look", "idle"),
        ("close drawer 1", "idle"),
        ("examine bed 1", "idle"),
        ("go to nowhere 1", "inadmissible"),
        ("", "inadmissible"),
    ],
)
def test_a_critique_is_read_back(action: str, kind: str, verdict: int) -> None:
    actions = "go to bed 1, open drawer 1, take mug 1 from bed 1, move mug 1 to bed 1, use desklamp 1, look, "
    actions += "clean mug 1 with sinkbasin 1, close drawer 1, examine bed 1"
    text = critique(at("put a mug in shelf.", actions), action, verdict, "go to shelf 1")
    better = None if verdict else "go to shelf 1"
    assert prompts.parse_critique(text) == prompts.Critique(verdict, better, train_sft.ADVICE[kind])


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Notes the episodes that rows are made of, and what the expert said at each of their turns."""
    notes = SimpleNamespace(episodes=[])

    class Expert:
        def __init__(self, *arguments) -> None:
            self.expert, self.said = envs.AlfworldExpert(*arguments), []

        def reset(self, task: envs.Task) -> str | None:
            notes.said = self.said
            self.said.append(self.expert.reset(task))
            return self.said[-1]

        def step(self, action: str) -> str | None:
            self.said.append(self.expert.step(action))
            return self.said[-1]

    play = train_sft._expert_episode

    def noted(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
        turns = play(config, task, rng)
        if turns:
            notes.episodes.append((task, turns, notes.said))
        return turns

    monkeypatch.setattr(envs, "make_expert", Expert)
    monkeypatch.setattr(train_sft, "_expert_episode", noted)
    return notes


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rows_teach_the_experts_actions_and_not_the_noise(
    small_games: Path, watched: SimpleNamespace, noise: float
) -> None:
    config = config_of(small_games, noise=noise)
    rows = [read(row) for row in make_rows(config)]
    turns = [turn for _, episode, _ in watched.episodes for turn in episode]
    taught = [turn for turn in turns if turn.taught]
    assert len(watched.episodes) == 24 and len(rows) == len(taught)
    for (prompt, answer), turn in zip(rows, taught, strict=True):
        reply = prompts.parse_reply(answer)
        assert reply.valid and reply.action == turn.action in offered(prompt)
        assert prompt == prompts.build_prompt(
            "alfworld", turn.at.task, turn.at.observation, turn.at.actions, turn.at.history, turn.at.step
        )
    share = sum(not turn.taught for turn in turns) / len(turns)
    assert share == 0 if noise == 0 else 0.2 < share < 0.4
    for task, episode, said in watched.episodes:
        env = envs.make_env(config.env)
        seen = env.reset(task)
        for index, turn in enumerate(episode):
            assert (turn.at.observation, turn.at.actions, turn.at.step) == (seen.text, seen.actions, index)
            assert list(turn.at.history) == [(t.at.observation, t.action) for t in episode[max(0, index - 3) : index]]
            assert not turn.taught or turn.action == said[index]
            seen = env.step(turn.action)
        assert seen.won and len(episode) <= config.env.max_steps


def test_idle_steps_are_taught_change_nothing_and_never_follow_each_other(
    small_games: Path, watched: SimpleNamespace
) -> None:
    rows = list(make_rows(config_of(small_games, idle=0.5)))
    flawed = sound = 0
    for task, episode, said in watched.episodes:
        env = envs.make_env(config_of(small_games).env)
        env.reset(task)
        idle = False
        for turn, expert in zip(episode, said, strict=False):
            was_idle, idle = idle, turn.action != expert
            assert turn.taught and not (idle and was_idle)
            assert not idle or re.fullmatch(r"look|examine \w+ \d+", turn.action) and turn.action in turn.at.actions
            flawed, sound = flawed + idle, sound + (not idle and not was_idle)
            before, after = turn.at.actions, env.step(turn.action).actions
            assert not idle or before == after
    assert len(rows) == sum(len(episode) for _, episode, _ in watched.episodes)
    assert 0.35 < flawed / (flawed + sound) < 0.65  # of the steps that may be idle


def test_slips_are_of_all_kinds_and_mostly_impossible(small_games: Path, watched: SimpleNamespace) -> None:
    list(make_rows(config_of(small_games, noise=0.3)))
    kinds = Counter()
    for _, episode, _ in watched.episodes:
        for index, turn in enumerate(episode):
            if turn.taught:
                continue
            earlier = {action for before in episode[:index] for action in before.at.actions}
            grasp = rf"take {alfworld_thought(turn.at).split()[2]} [123] from \w+ \d+"
            if turn.action in turn.at.actions:
                kinds["admissible"] += 1
            elif turn.action.startswith("go to "):  # where it is; every other place is admissible
                kinds["stay"] += 1
                assert turn.action.replace("go to", "examine") in turn.at.actions
            elif turn.action in earlier:
                kinds["earlier"] += 1
            else:
                kinds["grasp"] += 1
                assert re.fullmatch(grasp, turn.action)
    assert len(kinds) == 4 and min(kinds.values()) >= 2 and kinds["admissible"] < sum(kinds.values()) / 2, kinds


def test_episodes_take_the_games_in_turn(small_games: Path, watched: SimpleNamespace) -> None:
    list(make_rows(config_of(small_games, episodes=48)))
    counts = Counter(task.id for task, _, _ in watched.episodes)
    assert len(counts) >= 22 and max(counts.values()) <= 3  # nearly all games, the unwon ones' share to the next


def test_guided_rows_carry_guidelines(small_games: Path) -> None:
    for guided, expected in ((0.0, 0), (1.0, 1)):
        shares = [
            "strictly follow the guidelines" in read(row)[0] for row in make_rows(config_of(small_games, guided=guided))
        ]
        assert sum(shares) / len(shares) == expected
    half = ["strictly follow the guidelines" in read(row)[0] for row in make_rows(config_of(small_games, guided=0.5))]
    assert 0.3 < sum(half) / len(half) < 0.7


def test_level_2_leaves_out_the_held_out_types(small_games: Path, watched: SimpleNamespace) -> None:
    config = config_of(small_games, level="L2", variant="generative", episodes=40)
    rows = [read(row) for row in make_rows(config)]
    assert {task.type for task, _, _ in watched.episodes} == set(TASK_TYPES["alfworld"][:4])
    assert not any(re.search(r"task is to: (?:put a cool|cool some|put two|find two)", prompt) for prompt, _ in rows)
    everything = [read(row) for row in make_rows(config_of(small_games))]
    assert any(re.search(r"task is to: (?:put a cool|cool some)", prompt) for prompt, _ in everything)


def test_generative_adds_balanced_critiques_whose_verdicts_are_the_teachers(
    small_games: Path, watched: SimpleNamespace
) -> None:
    config = config_of(small_games, variant="generative", episodes=48, critic_examples=30, noise=0.2)
    rows = [read(row) for row in make_rows(config)]
    actor, critic = rows[:-30], rows[-30:]
    assert len(actor) == sum(turn.taught for _, episode, _ in watched.episodes for turn in episode)
    assert all(prompts.parse_reply(answer).valid for _, answer in actor)
    places = defaultdict(list)
    for task, episode, _ in watched.episodes:
        for index, turn in enumerate(episode):
            places[train_sft._prompt(config, turn)].append((task, episode, index))
    verdicts = Counter()
    for question, answer in critic:
        found = prompts.parse_critique(answer)
        verdicts[found.score] += 1
        problem, response = re.search(
            r"\nProblem: (.*)\nAgent Response: (.*)\nThe problem has not been solved", question, re.DOTALL
        ).groups()
        judged = prompts.parse_reply(response)
        task, episode, index = next(  # the judged action is the one played or an admissible one in its place
            (task, episode, index)
            for task, episode, index in places[problem]
            if judged.action in (episode[index].action, *episode[index].at.actions)
        )
        teacher = ExpertTeacher(config.env, task)
        for turn in episode[:index]:
            teacher.judge(turn.action)
        assert judged.valid
        assert teacher.judge(judged.action) == found.score
        assert found.advice in train_sft.ADVICE.values()
        assert THOUGHT.match(prompts.parse_reply(response).thought)
        if found.score == 0:  # the proposal is one that the teacher calls good, in the same place
            assert found.action in episode[index].at.actions and found.action != judged.action
            other = ExpertTeacher(config.env, task)
            for turn in episode[:index]:
                other.judge(turn.action)
            assert other.judge(found.action) == 1
        else:
            assert found.action is None
    assert verdicts == {0: 15, 1: 15}
    assert "Your admissible actions" in problem and len({question for question, _ in critic}) > 20


def test_reading_rows_are_random_play(small_games: Path) -> None:
    config = config_of(small_games, variant="reading", noise=0.2, critic_examples=10)
    rows = [read(row) for row in make_rows(config)]
    for prompt, answer in rows[:-10]:
        reply = prompts.parse_reply(answer)
        assert reply.valid and reply.action in offered(prompt)
    assert any("Nothing happens." in prompt for prompt, _ in rows)
    assert Counter(prompts.parse_critique(answer).score for _, answer in rows[-10:]) == {0: 5, 1: 5}
    kinds = Counter(prompts.parse_reply(answer).action.split()[0] for _, answer in rows[:-10])
    assert len(kinds) >= 6 and kinds["go"] < 0.5 * len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be made


def test_too_few_critiques(small_games: Path) -> None:
    config = config_of(small_games, variant="generative", episodes=6, critic_examples=100)
    with pytest.raises(
        ConfigError, match=r"sft.critic_examples=100 needs 50 .* 6 episodes gave \d+; raise sft.episodes"
    ):
        list(make_rows(config))


def test_a_limit_under_which_the_expert_never_wins(small_games: Path) -> None:
    config = config_of(small_games)
    with pytest.raises(ConfigError, match="env.max_steps"):
        list(make_rows(dataclasses.replace(config, env=dataclasses.replace(config.env, max_steps=2))))


def test_losses_do_not_add_up_over_a_long_run(small_games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more lost games than there are games, but never many in a row: that is no reason to stop."""
    tried = []

    def every_third(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
        tried.append(task)
        return [Turn(at("put a mug in shelf."), "look", True)] if len(tried) % 3 == 0 else []

    monkeypatch.setattr(train_sft, "_expert_episode", every_third)
    assert len(list(make_rows(config_of(small_games, episodes=300)))) == 300
    assert len(tried) == 900


def test_value_rows_are_the_generative_ones_without_words(small_games: Path) -> None:
    fields = dict(episodes=48, critic_examples=30, noise=0.2)
    value = list(make_rows(config_of(small_games, variant="value", **fields)))
    generative = [read(row) for row in make_rows(config_of(small_games, variant="generative", **fields))]
    assert [read(row) for row in value[:-30]] == generative[:-30] and not any("label" in row for row in value[:-30])
    for row, (question, answer) in zip(value[-30:], generative[-30:], strict=True):
        prompt, response = read(row)
        assert prompt in question and response in question
        assert row["label"] == prompts.parse_critique(answer).score


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_the_same_config_gives_the_same_bytes_once(
    small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, contents = config_of(small_games, variant="generative", noise=0.1, guided=0.3), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        path = rows_file(config)
        contents.append((path, path.read_bytes()))
    assert contents[0] == contents[1]
    assert [json.loads(line) for line in path.open()] == list(make_rows(config))
    assert read_rows(path) == [dict(zip(("prompt", "response"), read(row), strict=True)) for row in make_rows(config)]
    monkeypatch.setattr(train_sft, "make_rows", None)  # nothing is made again
    assert rows_file(config) == path and [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_settings_or_other_games_make_another_file(
    small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "games"
    shutil.copytree(small_games, folder)
    envs._scan.cache_clear()
    base = config_of(folder, episodes=2)
    others = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, env=dataclasses.replace(base.env, max_steps=20)),
        dataclasses.replace(base, env=dataclasses.replace(base.env, history=1)),
        config_of(folder, episodes=3),
        config_of(folder, episodes=2, noise=0.1),
        config_of(folder, episodes=2, guided=0.1),
    ]
    paths = [rows_file(config) for config in [base, *others]]
    assert len(set(paths)) == len(paths)
    assert (
        rows_file(dataclasses.replace(base, sft=dataclasses.replace(base.sft, lr=1.0))) == paths[0]
    )  # not of the rows
    gone = envs.tasks(base.env, "L0", "train")[0]
    shutil.rmtree(envs.game_path(base.env, gone))
    envs._scan.cache_clear()  # as in a new process
    assert rows_file(base) not in paths


def test_an_interrupted_file_is_not_taken_for_a_whole_one(
    small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, whole = config_of(small_games, episodes=3), make_rows

    def broken(config: Config):
        yield next(whole(config))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_sft, "make_rows", broken)
        rows_file(config)
    assert len(read_rows(rows_file(config))) == len(list(whole(config)))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "",
        "[]",
        "null",
        '"messages"',
        "{}",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": ["a", "b"]}',
        '{"messages": [{"content": "a"}, {"text": "b"}]}',
        '{"messages": [{"content": "a"}, {"content": null}]}',
        '{"messages": [{"content": ["a"]}, {"content": "b"}]}',
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path.write_text(f"{good}\n{good}\n{line}\n{good}\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 3: .*messages"):
        read_rows(path)
    path.write_text(f"{good}\n{good}\n")
    assert read_rows(path) == [{"prompt": "a", "response": "b"}] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and mini-batches

LETTERS = SimpleNamespace(encode=lambda text: [*map(ord, text)], encode_reply=lambda text: [*map(ord, text), 0])


@pytest.mark.parametrize(
    ("prompt_loss", "prompt", "targets", "weights"),
    [
        (0.0, "abc", [*map(ord, "xy"), 0], [1, 1, 1]),
        (0.25, "a", [*map(ord, "bcxy"), 0], [0.25, 0.25, 1, 1, 1]),
        (1.0, "a", [*map(ord, "bcxy"), 0], [1, 1, 1, 1, 1]),
    ],
)
def test_tokens_and_their_weights(prompt_loss: float, prompt: str, targets: list[int], weights: list[float]) -> None:
    row, weight = tokenise(LETTERS, {"prompt": "abc", "response": "xy"}, prompt_loss)
    assert row.prompt_ids.tolist() == [*map(ord, prompt)] and row.response_ids.tolist() == targets
    assert np.array_equal(weight, weights)


@pytest.mark.parametrize(("rows", "per_update"), [(0, 4), (1, 4), (4, 4), (7, 3), (1000, 7), (64, 64), (130, 1)])
def test_an_epoch_has_every_row_once(rows: int, per_update: int) -> None:
    rng = random.Random(0)
    made = [{"prompt": "p" * rng.randrange(100), "response": "r" * rng.randrange(9)} for _ in range(rows)]
    batches = updates(made, per_update, random.Random(1))
    assert sorted(index for batch in batches for index in batch) == list(range(rows))
    assert sorted(map(len, batches), reverse=True) == [per_update] * (rows // per_update) + [rows % per_update] * (
        rows % per_update > 0
    )
    assert batches == updates(made, per_update, random.Random(1))
    if rows > 100:
        assert batches != updates(made, per_update, random.Random(2))


def test_mini_batches_hold_rows_of_similar_length() -> None:
    rng = random.Random(0)
    rows = [{"prompt": "p" * rng.randrange(1000), "response": ""} for _ in range(800)]
    spreads = [np.ptp([len(rows[index]["prompt"]) for index in batch]) for batch in updates(rows, 16, random.Random(0))]
    assert np.mean(spreads) < 50  # about 940 in batches drawn at random
    means = [np.mean([len(rows[index]["prompt"]) for index in batch]) for batch in updates(rows, 16, random.Random(0))]
    assert means != sorted(means)  # but the batches come in random order


def test_the_value_variant_learns_to_classify(
    small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside imitation, which goes on; the head is kept beside a folder that loads as any other."""
    monkeypatch.chdir(tmp_path)
    tiny.join()
    config = tiny.changed(
        tiny.sft_config(small_games), f"model.path={tiny.checkpoint(small_games)}", "sft.variant=value", "name=value",
        "sft.episodes=24", "sft.critic_examples=16", "sft.epochs=6", "sft.lr=3e-3", "sft.rows_per_update=32",
    )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(config)))
    rows = train_sft.read_rows(path)
    assert [row["label"] for row in rows if "label" in row] == [0] * 8 + [1] * 8
    actor = model.load_actor(config)
    head = train_sft.value_head(actor)
    monkeypatch.setattr(train_sft, "RECORD_EVERY", 1)
    train_sft.train(actor, rows, config, head)
    records = [json.loads(line) for line in (tmp_path / "runs" / "value" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [record["train/value_accuracy"] for record in records if "train/value_accuracy" in record]
    assert np.mean(accuracy[-8:]) > 0.8 > np.mean(accuracy[:4])
    assert records[-1]["train/nll_per_token"] < records[0]["train/nll_per_token"]
    labelled = [train_sft.tokenise(actor, row, 0.0)[0] for row in rows if "label" in row]
    with torch.no_grad():
        _, right = train_sft.classification_loss(actor, head, labelled, [0] * 8 + [1] * 8)
    assert right >= 13
    model.save_model(actor, tmp_path / "final", state={"value_head": head.state_dict()})
    kept = torch.load(tmp_path / "final" / "trainer" / "state.pt", weights_only=True)["value_head"]
    assert torch.equal(kept["weight"], head.weight) and model.load_actor(config, path=str(tmp_path / "final"))

"""sft_data.py: thoughts, critiques, chat rows, and the file that keeps them."""

import dataclasses
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_environment

import envs
import prompts
from chat_rows import read_rows
from config import Config, ConfigError, EnvConfig, SFTConfig
from environments import alfworld
from environments.alfworld_engine import TASK_TYPES, GameState, solve
from prompts import PromptContext
from sft_data import Turn, context, critique, expert_episode, make_reply, make_rows, rows_file

THOUGHT = re.compile(
    r"Need (?P<need>.*)\. Have (?P<have>.*)\. Been (?P<been>.*)\. Here (?P<here>.*)\. Next (?P<next>.*)\."
)
NEEDS = {"pick_clean": "clean", "pick_heat": "hot", "pick_cool": "cool", "pick_two_obj": "two"}
GUIDED = "strictly follow the guidelines"


def config_of(folder: Path, level: str = "L0", style: str = "think", **sft) -> Config:
    sft = {"episodes": 24, "judge_examples": 8} | sft
    env = EnvConfig(name="alfworld", data=str(folder), level=level, history=3)
    return Config(prompt_style=style, env=env, sft=SFTConfig(**sft))


def read(row: dict) -> tuple[str, str]:
    """Question and answer of a chat row."""
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def offered(prompt: str) -> list[str]:
    """The admissible actions that a policy's prompt shows."""
    listed = re.search(r"Your admissible actions of the current situation are: \[(.*?)\]\.\n", prompt, re.DOTALL)[1]
    return [action.strip("'") for action in listed.split("\n ")]


# ---------------------------------------------------------------------------------------------------------------------
# ALFWorld's thoughts


def at(task: str, actions: str = "look", history: tuple[tuple[str, str], ...] = ()) -> PromptContext:
    return PromptContext("alfworld", task, "seen", tuple(actions.split(", ")), history, len(history))


def thought(ctx: PromptContext) -> str:
    return alfworld.TEMPLATES.thought(ctx, "look")


def test_a_thought_in_full() -> None:
    history = (("a", "go to drawer 1"), ("b", "open drawer 1"), ("c", "go to desk 1"), ("d", "look"))
    actions = "examine desk 1, go to drawer 1, look, take mug 2 from desk 1, take pen 1 from desk 1"
    assert thought(at("put a clean mug in shelf.", actions, history)) == (
        "Need clean mug in shelf. Have nothing. Been drawer 1, desk 1. Here mug 2, pen 1. Next mug 2."
    )
    history += (("e", "take mug 2 from desk 1"), ("f", "go to drawer 1"))
    actions = "close drawer 1, examine drawer 1, examine mug 2, go to shelf 2, move mug 2 to drawer 1, look"
    assert thought(at("clean some mug and put it in shelf.", actions, history)) == (
        "Need clean mug in shelf. Have mug 2. Been drawer 1, desk 1, drawer 1. Here nothing. Next nothing."
    )
    history += (("You clean the mug 2 using the sinkbasin 1.", "look"),)
    assert thought(at("clean some mug and put it in shelf.", actions, history)) == (
        "Need clean mug in shelf. Have clean mug 2. Been drawer 1, desk 1, drawer 1. Here nothing. Next shelf 2."
    )
    assert thought(at("cool some mug and put it in shelf.", actions, history)).endswith("Here nothing. Next nothing.")
    assert thought(at("look at mug under the desklamp.", "use desklamp 1, examine mug 2, examine desk 1")) == (
        "Need a mug in desklamp. Have mug 2. Been nowhere. Here desklamp 1. Next desklamp 1."
    )
    actions = "take mug 2 from desk 1, use desklamp 1"
    assert thought(at("look at mug under the desklamp.", actions)).endswith("Here mug 2, desklamp 1. Next mug 2.")
    assert thought(at("put some mug on desk.", "examine desk 1, examine mug 2")).endswith("Next desk 1.")


def test_every_task_sentence_is_understood() -> None:
    """All wordings that ALFWorld has for its six types."""
    from tools.make_games import package

    for kind in TASK_TYPES:
        state = next((word for prefix, word in NEEDS.items() if kind.startswith(prefix)), "a")
        for template in package()["goals"][kind]["templates"]:
            task = template.format(obj="mug", recep="shelf", toggle="desklamp") + "."
            place = "desklamp" if kind == "look_at_obj_in_light" else "shelf"
            assert thought(at(task)).startswith(f"Need {state} mug in {place}. Have nothing. Been nowhere."), task


def check_thought(ctx: PromptContext, play: GameState, counts: Counter) -> None:
    """What the thought says is so in the game."""
    game, said = play.game, THOUGHT.fullmatch(thought(ctx))
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

    went = [action.removeprefix("go to ") for _, action in ctx.history if action.startswith("go to ")]
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
        env, turns = alfworld.make(config.env), []
        observation = env.reset(task)
        for _ in range(25):
            ctx = context(config, observation, turns)
            check_thought(ctx, env.state, counts)
            plan = solve(env.state)
            moves = [action for action in ctx.actions if action.split()[0] in ("go", "open", "take")]
            action = plan[0] if plan and rng.random() < 0.5 else rng.choice(moves or ctx.actions)
            turns.append(Turn(ctx, action, True))
            observation = env.step(action)
            if observation.done:
                break
    cases = "held at a place", "held changed", "been", "a place counts", "an object counts", "nothing counts"
    assert all(counts[case] > 50 for case in cases), counts


def test_receptacles_are_told_from_objects() -> None:
    """No object that can be held is taken for a receptacle, and no receptacle for something held."""
    from tools.make_games import package, rooms, type_of

    assert {type_of(place).lower() for room in rooms() for place in room.receptacles} <= alfworld.RECEPTACLE_TYPES
    assert not {kind.lower() for kind in package()["pickupable"]} & alfworld.RECEPTACLE_TYPES


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
    assert prompts.parse_critique(text) == prompts.Critique(verdict, better, alfworld.ADVICE[kind])


# ---------------------------------------------------------------------------------------------------------------------
# Replies, and the words of an environment that has none


def test_rlvmrs_tags() -> None:
    ctx = dataclasses.replace(at("put a mug in shelf.", "go to bed 1, look"), style="rlvmr")
    assert make_reply(ctx, "look").startswith("<planning>Plan: find mug, bring it to shelf. Need a mug in shelf.")
    later = dataclasses.replace(ctx, step=2)
    assert prompts.parse_reply(make_reply(later, "go to bed 1"), "rlvmr").tag == "explore"
    assert prompts.parse_reply(make_reply(later, "close safe 1"), "rlvmr").tag == "monitor"
    refused = dataclasses.replace(later, observation="Nothing happens.")
    assert prompts.parse_reply(make_reply(refused, "go to bed 1"), "rlvmr").tag == "reflection"


@pytest.mark.parametrize("style", ["think", "rlvmr"])
def test_an_expert_and_a_teacher_make_a_cold_start(style: str) -> None:
    """A user's environment needs no words: those of every prompt are said."""
    sft = SFTConfig(variant="generative", episodes=45, judge_examples=16, guided=0.5)
    config = Config(prompt_style=style, env=EnvConfig(name="toy_environment"), sft=sft)
    rows = [read(row) for row in make_rows(config)]
    replies = [prompts.parse_reply(answer, style, "toy_environment") for _, answer in rows[:-16]]
    assert len(rows) == 45 / 3 * (2 + 4 + 6) + 16
    taken = Counter(reply.action for reply in replies if reply.valid)
    assert (taken["take the key"], taken["open the door"], taken["light the lamp"]) == (45, 30, 15)
    assert sum(taken.values()) == len(replies) and "" not in taken
    assert {reply.tag for reply in replies} == ({"think"} if style == "think" else {"planning", "explore", "monitor"})
    later = next(reply.thought for (prompt, _), reply in zip(rows, replies, strict=False) if "Prior to" in prompt)
    assert re.fullmatch(
        r"My task is: [a-z ]+\. Last I did go to the \w+, and: You are in the \w+\. Now I should take the key\.", later
    )
    assert 0.3 < sum(GUIDED in prompt for prompt, _ in rows[:-16]) / len(replies) < 0.7
    critiques = [prompts.parse_critique(answer) for _, answer in rows[-16:]]
    assert [found.score for found in critiques] == [0] * 8 + [1] * 8
    assert all(found.advice and bool(found.action) == (found.score == 0) for found in critiques)


def test_plain_words_of_a_step() -> None:
    ctx = PromptContext("toy_environment", "Leave it.", "3 steps are left.", ("go north", "wait"), style="rlvmr")
    assert make_reply(ctx, "wait") == (
        "<planning>Plan: Leave it. My task is: Leave it. I begin. Now I should wait.</planning><action>wait</action>"
    )
    again = dataclasses.replace(ctx, step=1, history=((ctx.observation, "wait"),))
    assert prompts.parse_reply(make_reply(again, "wait"), "rlvmr").tag == "reflection"
    advice = {prompts.parse_critique(critique(ctx, *case, "go north")).advice for case in (("fly", 0), ("wait", 0))}
    assert len(advice) == 2 and "on offer" in max(advice, key=lambda text: "on offer" in text)
    placeholder = dataclasses.replace(ctx, actions=("open OBJ",), objects=("door",))
    assert "on offer" not in critique(placeholder, "open door", 1, "")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Notes the episodes that rows are made of (`play`), and what the expert said at each of their turns."""
    notes = SimpleNamespace(episodes=[])

    class Expert:
        actions_left = None

        def __init__(self, *arguments) -> None:
            self.expert, self.said = alfworld.AlfworldExpert(*arguments), []

        def reset(self, task: envs.Task) -> str | None:
            notes.said = self.said
            self.said.append(self.expert.reset(task))
            return self.said[-1]

        def step(self, action: str) -> str | None:
            self.said.append(self.expert.step(action))
            return self.said[-1]

    def play(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
        turns = expert_episode(config, task, rng)
        if turns:
            notes.episodes.append((task, turns, notes.said))
        return turns

    monkeypatch.setattr(alfworld, "make_expert", Expert)
    notes.play = play
    return notes


@pytest.mark.parametrize("style", ["think", "rlvmr"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rows_teach_the_experts_actions_and_not_the_noise(
    small_games: Path, watched: SimpleNamespace, noise: float, style: str
) -> None:
    config = config_of(small_games, style=style, noise=noise)
    rows = [read(row) for row in make_rows(config, watched.play)]
    turns = [turn for _, episode, _ in watched.episodes for turn in episode]
    taught = [turn for turn in turns if turn.taught]
    assert len(watched.episodes) == 24 and len(rows) == len(taught)
    for (prompt, answer), turn in zip(rows, taught, strict=True):
        reply = prompts.parse_reply(answer, style)
        assert reply.valid and reply.action == turn.action in offered(prompt)
        assert prompt == prompts.build_prompt(turn.ctx)
    share = sum(not turn.taught for turn in turns) / len(turns)
    assert share == 0 if noise == 0 else 0.2 < share < 0.4
    for task, episode, said in watched.episodes:
        env = alfworld.make(config.env)
        observation = env.reset(task)
        for index, turn in enumerate(episode):
            ctx, texts = turn.ctx, [earlier.reply for earlier in episode[:index]]
            assert (ctx.observation, ctx.actions, ctx.step) == (observation.text, observation.actions, index)
            before = episode[max(0, index - 3) : index]
            assert list(ctx.history) == [(turn.ctx.observation, turn.action) for turn in before]
            assert ctx.replies == (() if style == "think" else tuple(texts[-3:]))
            assert ctx.plan == ("" if style == "think" or index == 0 else prompts.parse_reply(texts[0], style).thought)
            assert not turn.taught or turn.action == said[index]
            observation = env.step(turn.action)
        assert observation.won and len(episode) <= config.env.max_steps


def test_idle_steps_are_taught_change_nothing_and_never_follow_each_other(
    small_games: Path, watched: SimpleNamespace
) -> None:
    rows = list(make_rows(config_of(small_games, idle=0.5), watched.play))
    flawed = sound = 0
    for task, episode, said in watched.episodes:
        env = alfworld.make(config_of(small_games).env)
        env.reset(task)
        idle = False
        for turn, expert in zip(episode, said, strict=False):
            was_idle, idle = idle, turn.action != expert
            assert turn.taught and not (idle and was_idle)
            assert not idle or re.fullmatch(r"look|examine \w+ \d+", turn.action) and turn.action in turn.ctx.actions
            flawed, sound = flawed + idle, sound + (not idle and not was_idle)
            before, after = turn.ctx.actions, env.step(turn.action).actions
            assert not idle or before == after
    assert len(rows) == sum(len(episode) for _, episode, _ in watched.episodes)
    assert 0.35 < flawed / (flawed + sound) < 0.65  # of the steps that may be idle


def test_slips_are_of_all_kinds_and_mostly_impossible(small_games: Path, watched: SimpleNamespace) -> None:
    list(make_rows(config_of(small_games, noise=0.3), watched.play))
    kinds = Counter()
    for _, episode, _ in watched.episodes:
        for index, turn in enumerate(episode):
            if turn.taught:
                continue
            earlier = {action for before in episode[:index] for action in before.ctx.actions}
            grasp = rf"take {thought(turn.ctx).split()[2]} [123] from \w+ \d+"
            if turn.action in turn.ctx.actions:
                kinds["admissible"] += 1
            elif turn.action.startswith("go to "):  # where it is; every other place is admissible
                kinds["stay"] += 1
                assert turn.action.replace("go to", "examine") in turn.ctx.actions
            elif turn.action in earlier:
                kinds["earlier"] += 1
            else:
                kinds["grasp"] += 1
                assert re.fullmatch(grasp, turn.action)
    assert len(kinds) == 4 and min(kinds.values()) >= 2 and kinds["admissible"] < sum(kinds.values()) / 2, kinds


def test_episodes_take_the_games_in_turn(small_games: Path, watched: SimpleNamespace) -> None:
    list(make_rows(config_of(small_games, episodes=48), watched.play))
    counts = Counter(task.id for task, _, _ in watched.episodes)
    assert len(counts) >= 22 and max(counts.values()) <= 3  # nearly all games, the unwon ones' share to the next


def test_guided_rows_carry_guidelines(small_games: Path) -> None:
    for guided, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.5, 0.3, 0.7)):
        found = [GUIDED in read(row)[0] for row in make_rows(config_of(small_games, guided=guided))]
        assert low <= sum(found) / len(found) <= high


def test_level_2_leaves_out_the_held_out_types(small_games: Path, watched: SimpleNamespace) -> None:
    config = config_of(small_games, level="L2", variant="generative", episodes=40)
    rows = [read(row) for row in make_rows(config, watched.play)]
    assert {task.type for task, _, _ in watched.episodes} == set(TASK_TYPES[:4])
    assert not any(re.search(r"task is to: (?:put a cool|cool some|put two|find two)", prompt) for prompt, _ in rows)
    everything = [read(row) for row in make_rows(config_of(small_games))]
    assert any(re.search(r"task is to: (?:put a cool|cool some)", prompt) for prompt, _ in everything)


def test_generative_adds_balanced_critiques_whose_verdicts_are_the_teachers(
    small_games: Path, watched: SimpleNamespace
) -> None:
    config = config_of(small_games, variant="generative", episodes=48, judge_examples=30, noise=0.2)
    rows = [read(row) for row in make_rows(config, watched.play)]
    actions, critiques = rows[:-30], rows[-30:]
    assert len(actions) == sum(turn.taught for _, episode, _ in watched.episodes for turn in episode)
    assert all(prompts.parse_reply(answer).valid for _, answer in actions)
    places = defaultdict(list)
    for task, episode, _ in watched.episodes:
        for index, turn in enumerate(episode):
            places[prompts.build_prompt(turn.ctx)].append((task, episode, index))
    verdicts = Counter()
    for question, answer in critiques:
        found = prompts.parse_critique(answer)
        verdicts[found.score] += 1
        problem, response = re.search(
            r"\nProblem: (.*)\nAgent Response: (.*)\nThe problem has not been solved", question, re.DOTALL
        ).groups()
        judged = prompts.parse_reply(response)
        task, episode, index = next(  # the judged action is the one played or an admissible one in its place
            (task, episode, index)
            for task, episode, index in places[problem]
            if judged.action in (episode[index].action, *episode[index].ctx.actions)
        )
        teacher = alfworld.OracleTeacher(config.env, task)
        for turn in episode[:index]:
            teacher.judge(turn.action)
        assert judged.valid
        assert teacher.judge(judged.action) == found.score
        assert found.advice in alfworld.ADVICE.values()
        assert THOUGHT.match(judged.thought)
        if found.score == 0:  # the proposal is one that the teacher calls good, in the same place
            assert found.action in episode[index].ctx.actions and found.action != judged.action
            other = alfworld.OracleTeacher(config.env, task)
            for turn in episode[:index]:
                other.judge(turn.action)
            assert other.judge(found.action) == 1
        else:
            assert found.action is None
    assert verdicts == {0: 15, 1: 15}
    assert "Your admissible actions" in problem and len({question for question, _ in critiques}) > 20


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be made


def test_too_few_critiques(small_games: Path) -> None:
    config = config_of(small_games, variant="generative", episodes=6, judge_examples=100)
    with pytest.raises(
        ConfigError, match=r"sft.judge_examples=100 needs 50 .* 6 episodes gave \d+; raise sft.episodes"
    ):
        list(make_rows(config))


def test_a_limit_under_which_the_expert_never_wins(small_games: Path) -> None:
    config = config_of(small_games)
    with pytest.raises(ConfigError, match="env.max_steps"):
        list(make_rows(dataclasses.replace(config, env=dataclasses.replace(config.env, max_steps=2))))


@pytest.mark.parametrize(("max_steps", "played"), [(2, {"find"}), (4, {"find", "open"}), (1, set())])
def test_an_expert_that_knows_its_way_is_not_tried_in_vain(
    max_steps: int, played: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too long for it is passed over without being played, and once for all."""
    resets = {"expert": [], "env": []}

    class Game(toy_environment.Lighthouse):
        def reset(self, task: envs.Task) -> envs.Observation:
            resets["env"].append(task.type)
            return super().reset(task)

    def follow(self, task: envs.Task, reset=toy_environment.Guide.reset) -> str:
        resets["expert"].append(task.type)
        return reset(self, task)

    monkeypatch.setattr(toy_environment, "make", lambda env_cfg: Game())
    monkeypatch.setattr(toy_environment.Guide, "reset", follow)
    config = Config(env=EnvConfig(name="toy_environment", max_steps=max_steps), sft=SFTConfig(episodes=20))
    if played:
        rows = list(make_rows(config))
        assert len(resets["env"]) == 20 and len(resets["expert"]) > 20
        assert len(rows) == 2 * resets["env"].count("find") + 4 * resets["env"].count("open")
    else:
        with pytest.raises(ConfigError, match="env.max_steps"):
            list(make_rows(config))
        # each of the 45 tasks, the first one again, and a look at what is left of it
        assert len(resets["expert"]) == 45 + 2
    assert set(resets["env"]) == played


def test_losses_do_not_add_up_over_a_long_run(small_games: Path) -> None:
    """Far more lost games than there are games, but never many in a row: that is no reason to stop."""
    tried = []

    def every_third(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
        tried.append(task)
        return [Turn(at("put a mug in shelf."), "look", True)] if len(tried) % 3 == 0 else []

    assert len(list(make_rows(config_of(small_games, episodes=300), every_third))) == 300
    assert len(tried) == 900


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
    messages = [row["messages"] for row in make_rows(config)]
    assert read_rows(path) == [{"prompt": said[:1], "response": said[1]["content"]} for said in messages]
    assert rows_file(config, make=None) == path  # nothing is made again
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_settings_or_other_games_make_another_file(
    small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "games"
    shutil.copytree(small_games, folder)
    alfworld._scan.cache_clear()
    base = config_of(folder, episodes=2)
    others = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, prompt_style="rlvmr"),
        dataclasses.replace(base, env=dataclasses.replace(base.env, max_steps=20)),
        dataclasses.replace(base, env=dataclasses.replace(base.env, history=1)),
        config_of(folder, episodes=3),
        config_of(folder, episodes=2, noise=0.1),
        config_of(folder, episodes=2, guided=0.1),
        config_of(small_games, episodes=2),
    ]
    paths = [rows_file(config) for config in [base, *others]] + [rows_file(base, "value", make_rows)]
    assert len(set(paths)) == len(paths)
    assert [path.name.split("-")[0] for path in paths[-2:]] == ["vanilla", "value"]
    assert (
        rows_file(dataclasses.replace(base, sft=dataclasses.replace(base.sft, lr=1.0))) == paths[0]
    )  # not of the rows
    unsaid = dataclasses.replace(base, env=dataclasses.replace(base.env, data=""))
    for place, path in ((folder, paths[0]), (small_games, paths[-2])):
        monkeypatch.setenv("ALFWORLD_DATA", str(place))  # where the environment looks then
        assert rows_file(unsaid) == path
    gone = envs.tasks(base.env, "L0", "train")[0]
    shutil.rmtree(alfworld.game_path(base.env, gone))
    alfworld._scan.cache_clear()  # as in a new process
    assert rows_file(base) not in paths


def test_an_edited_environment_makes_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever writes one would train on what it said before."""
    module = tmp_path / "edited_game.py"
    shutil.copy(toy_environment.__file__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(env=EnvConfig(name="edited_game"), sft=SFTConfig(episodes=4))
    path = rows_file(config)
    assert rows_file(config, make=None) == path
    module.write_text(module.read_text().replace("old lighthouse", "new lighthouse"))
    assert rows_file(config) != path


def test_an_interrupted_file_is_not_taken_for_a_whole_one(
    small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(small_games, episodes=3)

    def broken(config: Config):
        yield next(make_rows(config))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_file(config, make=broken)
    assert len(read_rows(rows_file(config))) == len(list(make_rows(config)))

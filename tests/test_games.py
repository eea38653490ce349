"""games.py against hand-written transcripts, against brute force, and against the real TextWorld engine."""

import copy
import json
import random
import tarfile
from collections import deque
from pathlib import Path

import pytest

import games
from games import TASK_TYPES, Play, distance, parse, solve, to_textworld
from make_games import make_game, make_games

REAL_GAMES = Path(__file__).parents[2] / "shared" / "alfworld_games"

# A room with every quirk in it: fridge and countertop share a location, the egg is in two receptacles at once.
PROBLEM = """
(define (problem plan_trial) (:domain alfred) (:objects agent1 - agent)
(:init
    (receptacleType Fridge_bar_1 FridgeType) (receptacleAtLocation Fridge_bar_1 loc_bar_1) (openable Fridge_bar_1)
    (receptacleType CounterTop_bar_1 CounterTopType) (receptacleAtLocation CounterTop_bar_1 loc_bar_1)
    (receptacleType CounterTop_bar_2 CounterTopType) (receptacleAtLocation CounterTop_bar_2 loc_bar_2)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_bar_3)
    (canContain CounterTopType EggType) (canContain FridgeType EggType) (canContain CounterTopType KnifeType)
    (canContain SinkBasinType KnifeType)
    (objectType Egg_bar_1 EggType) (objectType Egg_bar_2 EggType) (objectType Knife_bar_1 KnifeType)
    (objectType Sink_bar_1 SinkType) (objectAtLocation Sink_bar_1 loc_bar_3)
    (objectAtLocation Egg_bar_1 loc_bar_2) (objectAtLocation Egg_bar_2 loc_bar_1)
    (objectAtLocation Knife_bar_1 loc_bar_1)
    (inReceptacle Egg_bar_1 CounterTop_bar_2) (inReceptacle Egg_bar_1 Sink_bar_1_bar_SinkBasin)
    (inReceptacle Egg_bar_2 Fridge_bar_1) (inReceptacle Knife_bar_1 CounterTop_bar_1)
    (pickupable Egg_bar_1) (pickupable Egg_bar_2) (pickupable Knife_bar_1) (coolable Egg_bar_1) (coolable Egg_bar_2)
    (cleanable Knife_bar_1) (sliceable Egg_bar_1) (sliceable Egg_bar_2)
    (atLocation agent1 loc_bar_0)
)
(:goal (and (exists (?r - receptacle) (exists (?o - object) (and (coolable ?o) (objectType ?o EggType)
    (receptacleType ?r CounterTopType) (isCool ?o) (inReceptacle ?o ?r))))))
)"""
GAME = {
    "pddl_domain": "",
    "grammar": '{"rhs": "Your task is to: cool some egg and put it in countertop."}',
    "pddl_problem": PROBLEM,
    "solvable": True,
}


def generated(count: int, **limits: int) -> list[games.Game]:
    """`count` generated games, the task types in turn."""
    return [parse(make_game("train", index, 11, **limits)[0]) for index in range(count)]


def wander(play: Play, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        play.step(rng.choice(play.actions))


def test_transcript() -> None:
    play = Play(parse(GAME))
    assert play.text == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a countertop 2, a "
        "countertop 1, a fridge 1, and a sinkbasin 1.\n\n"
        "Your task is to: cool some egg and put it in countertop."
    )
    assert play.actions == [
        "go to countertop 1",
        "go to countertop 2",
        "go to fridge 1",
        "go to sinkbasin 1",
        "help",
        "inventory",
        "look",
    ]
    for action, text in [
        ("look", "You are in the middle of a room. Looking quickly around you, you see nothing."),
        ("inventory", "You are not carrying anything."),
        ("go to bed 1", "Nothing happens."),
        (" go to fridge 1\n", "You arrive at fridge 1. The fridge 1 is closed."),
        ("look", "You are facing the countertop 2, and fridge 1. Next to it, you see nothing."),
        ("examine countertop 2", "On the countertop 2, you see a knife 1."),
        ("examine knife 1", "Nothing happens."),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1."),
        ("take egg 1 from fridge 1", "You pick up the egg 1 from the fridge 1."),
        ("examine egg 1", "There's nothing special about egg 1."),
        ("close fridge 1", "You close the fridge 1."),
        ("cool egg 1 with fridge 1", "You cool the egg 1 using the fridge 1."),
        ("examine egg 1", "This is a cold egg 1."),
        ("inventory", "You are carrying: a egg 1."),
        ("move egg 1 to countertop 2", "You move the egg 1 to the countertop 2."),
        ("look", "You are facing the countertop 2, and fridge 1. Next to it, you see a egg 1."),
        ("take knife 1 from countertop 2", "You pick up the knife 1 from the countertop 2."),
        ("slice egg 1 with knife 1", "You sliced the egg 1 with the knife 1."),
        ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see a egg 2."),
        ("clean knife 1 with sinkbasin 1", "You clean the knife 1 using the sinkbasin 1."),
        ("examine knife 1", "This is a clean knife 1."),
        ("move knife 1 to sinkbasin 1", "You move the knife 1 to the sinkbasin 1."),
        ("take egg 2 from sinkbasin 1", "You pick up the egg 2 from the sinkbasin 1."),
        ("go to countertop 1", "You arrive at countertop 1. On the countertop 1, you see a egg 2."),  # still there
    ]:
        assert play.step(action) == text == play.text
    assert play.won
    assert play.step("help").startswith("Available commands:\n  look: ")


def test_oracle_uses_an_object_that_is_in_two_receptacles() -> None:
    play = Play(parse(GAME))
    play.step("go to sinkbasin 1")
    play.step("take egg 2 from sinkbasin 1")
    assert solve(play) == ["go to fridge 1", "cool egg 2 with fridge 1"]  # it is still on countertop 1


def test_any_text_is_an_action() -> None:
    play, rng = Play(generated(1)[0]), random.Random(0)
    before = play.actions
    texts = ["", " ", "\n", "\x00", "take", "go to", "GO TO BED 1", "{r.name}", "#help#", "é" * 50_000, "\ud800", "%s"]
    texts += ["".join(chr(rng.randrange(0x11000)) for _ in range(rng.randrange(40))) for _ in range(300)]
    for text in texts:
        assert play.step(text) == "Nothing happens."
    assert play.actions == before


def test_plays_share_a_game_and_nothing_else() -> None:
    for game in generated(6):
        one, other = Play(game), Play(game)
        before = other.text, other.actions
        wander(one, random.Random(1), 60)
        assert (other.text, other.actions) == before == (Play(game).text, Play(game).actions)


@pytest.mark.parametrize("limits", [{}, {"receptacles": 5, "objects": 8}], ids=["full", "small"])
def test_oracle_wins_from_anywhere_one_step_at_a_time(limits: dict) -> None:
    rng = random.Random(2)
    for game in generated(60, **limits):
        play = Play(game)
        for wandering in (0, 25):
            wander(play, rng, wandering)
            plan = solve(play)
            for done, action in enumerate(plan):
                assert not play.won
                assert distance(play) == len(plan) - done
                assert action in play.actions
                play.step(action)
            assert play.won
            assert solve(play) == [] and distance(play) == 0


def shortest(play: Play) -> int | None:
    """Breadth-first search over all admissible actions."""

    def fork(p: Play) -> Play:
        q = copy.copy(p)
        q.opened, q.toggled, q.sliced, q.taken_from = map(set, (p.opened, p.toggled, p.sliced, p.taken_from))
        for name in ("changed", "contents", "lies_at"):
            setattr(q, name, {k: set(v) for k, v in getattr(p, name).items()})
        return q

    def key(p: Play) -> str:
        return repr(
            (p.location, p.held, *(sorted(s) for s in (p.opened, p.toggled, *p.changed.values(), *p.contents.values())))
        )

    seen, queue = {key(play)}, deque([(play, 0)])
    while queue:
        here, depth = queue.popleft()
        if here.won:
            return depth
        for action in here.actions:
            if not action.startswith(("examine", "help", "inventory", "look", "slice")):
                there = fork(here)
                there.step(action)
                if (k := key(there)) not in seen:
                    seen.add(k)
                    queue.append((there, depth + 1))
    return None


def test_oracle_is_as_short_as_breadth_first_search() -> None:
    rng = random.Random(3)
    for game in generated(12, receptacles=4, objects=4):
        for wandering in (0, 12):
            play = Play(game)
            wander(play, rng, wandering)
            assert distance(play) == shortest(play)


def test_hopeless_games_have_no_plan() -> None:
    nowhere = GAME | {
        "pddl_problem": PROBLEM.replace("(canContain CounterTopType EggType)", "").replace(
            "(inReceptacle Egg_bar_1 CounterTop_bar_2)", ""
        )
    }
    assert solve(parse(nowhere)) is None and distance(Play(parse(nowhere))) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grammar": '"rhs": "Your task is to: UNKNOWN GOAL."'}, "no task sentence"),
        ({"grammar": '"rhs": "Your task is to: #help#."'}, "as grammar"),
        ({"grammar": None}, "not a playable"),
        ({"pddl_problem": ""}, ":init"),
        ({"pddl_problem": 7}, "not a playable"),
        ({"pddl_problem": PROBLEM.replace("(isCool ?o)", "(isSliced ?o)")}, "six task types"),
        ({"pddl_problem": PROBLEM.replace("(atLocation agent1 loc_bar_0)", "")}, "not a playable"),
        (
            {"pddl_problem": PROBLEM.replace("(receptacleAtLocation CounterTop_bar_2 loc_bar_2)", "")},
            "every receptacle",
        ),
        (
            {"pddl_problem": PROBLEM.replace("(objectType Egg_bar_1 EggType)", "(objectType Egg_bar_1)")},
            "not a playable",
        ),
    ],
)
def test_malformed_games_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(GAME | change)


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"grammar": ""}', "\x00"):
        path = tmp_path / "game.tw-pddl"
        path.write_text(text)
        with pytest.raises(ValueError, match="game.tw-pddl: not a playable"):
            parse(path)


def test_to_textworld_replaces_domain_and_grammar() -> None:
    stored = GAME | {"pddl_domain": "(old)", "walkthrough": ["look"]}
    game = to_textworld(stored)
    assert "move {o} to {r}" in game["grammar"] and "UNKNOWN GOAL" not in game["grammar"]
    assert "(define (domain alfred)" in game["pddl_domain"]
    assert game["pddl_problem"] == PROBLEM and game["walkthrough"] == ["look"]
    assert games.task_sentence(game) == games.task_sentence(stored)


def test_check_exits_with_1_on_a_mismatch(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "game.tw-pddl").write_text(json.dumps(GAME))
    for lines, code in ((["game step 3 'look' text"], 1), ([], 0)):
        monkeypatch.setattr(games, "check", lambda paths, steps, *_, found=lines: (steps * len(paths), found))
        monkeypatch.setattr("sys.argv", ["games.py", "--check", str(tmp_path), "--steps", "7"])
        with pytest.raises(SystemExit) as stop:
            games.main()
        assert stop.value.code == code
        assert f"1 games, 7 steps: {code} mismatches" in capsys.readouterr().out


def test_same_words_as_textworld(tmp_path: Path) -> None:
    """12 games, 2 of each task type (one a small room), 30 half-random steps each, against the unpatched engine."""
    pytest.importorskip("textworld")
    pytest.importorskip("alfworld")
    made = make_games(tmp_path / "small", 6, 0, 0, seed=4, receptacles=7, objects=14)["train"]
    made += make_games(tmp_path / "full", 6, 0, 0, seed=5)["train"]
    (tmp_path / "quirks").mkdir()
    made.append(tmp_path / "quirks" / "game.tw-pddl")
    made[-1].write_text(json.dumps(GAME | {"pddl_problem": declared(PROBLEM)}))
    assert {parse(path).task_type for path in made[:6]} == set(TASK_TYPES.values())
    steps, mismatches = games.check(made, steps=30, workers=2)
    assert steps == 13 * 30
    assert not mismatches, "\n".join(mismatches[:5])


def declared(problem: str) -> str:
    """PROBLEM as the planner wants it: with its objects declared."""
    return problem.replace(
        "agent1 - agent)",
        """agent1 - agent
        Fridge_bar_1 CounterTop_bar_1 CounterTop_bar_2 Sink_bar_1_bar_SinkBasin - receptacle
        Egg_bar_1 Egg_bar_2 Knife_bar_1 Sink_bar_1 - object loc_bar_0 loc_bar_1 loc_bar_2 loc_bar_3 - location
        EggType KnifeType ButterKnifeType SinkType - otype FridgeType CounterTopType SinkBasinType MicrowaveType - rtype
    )""",
    )


@pytest.mark.skipif(not REAL_GAMES.exists(), reason="the published games are not here")
def test_published_games_are_all_won() -> None:
    won = 0
    with tarfile.open(REAL_GAMES / "valid_seen.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("game.tw-pddl"):
                data = json.load(archive.extractfile(member))
                play = Play(parse(data))
                plan = solve(play)
                assert plan or not data["solvable"], member.name
                for action in plan or []:
                    assert action in play.actions
                    play.step(action)
                assert play.won or not plan
                won += bool(data["solvable"])
    assert won == 140

"""Make new ALFWorld text games offline, from the floor plans that the alfworld package carries.

    python tools/make_games.py --out DIR --train 3000 --seen 140 --unseen 134 --seed 0
    python tools/make_games.py --out DIR --train 500 --seen 60 --unseen 60 --receptacles 6 --objects 10     small rooms

Writes ALFWorld's layout: DIR/json_2.1.1/{train,valid_seen,valid_unseen}/<task>/<trial>/{game.tw-pddl,traj_data.json}.
Every game depends on (seed, split, index) alone and is won by the oracle before it is written. Unseen games are set in
ALFWorld's own four held-out floor plans. Departs from the published games: what the package does not say (stove
burners, bins, some cabinets, where things lie) is drawn at rates measured on them, nothing is in two receptacles at
once or inside another object, and DeskLamp is the only lamp asked for (FloorLamp tasks cannot be won in ALFWorld).
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environments.alfworld import FOLDERS
from environments.alfworld_engine import LOOK, PLACE_TWO, TASK_TYPES, package_path, parse_game, solve

TYPE_BY_NUMBER = dict(enumerate(TASK_TYPES, 1))  # ALFWorld's own ids
UNSEEN_FLOOR_PLANS = (10, 219, 308, 424)

# ----------------------------------------------------------------------------------------------------------------------
# Rates measured on 387 published games

# Receptacles that `-openable.json` lacks: their number in a room whose object list names them.
EXTRA_RECEPTACLES = {
    "StoveBurner": (4, 4),
    "GarbageCan": (1, 1),
    "Toaster": (1, 1),
    "CoffeeMachine": (1, 1),
    "HandTowelHolder": (1, 2),
    "TowelHolder": (1, 2),
    "ToiletPaperHanger": (1, 1),
    "LaundryHamper": (1, 1),
    "Toilet": (1, 1),
}
# Receptacles that it lists only in part: the highest number that it may be short of.
SHORT_OF = {
    "Kitchen": {"Cabinet": 6, "Drawer": 2},
    "LivingRoom": {"Drawer": 1, "Shelf": 1},
    "Bedroom": {"Drawer": 2},
    "Bathroom": {"Drawer": 1},
}
# How many things lie in a receptacle, relative to the others (1 unless named).
CLUTTER = {
    "DiningTable": 12,
    "CounterTop": 7,
    "Desk": 6,
    "Bed": 4,
    "Dresser": 4,
    "Fridge": 4,
    "TVStand": 4,
    "CoffeeTable": 3.5,
    "Cart": 3.5,
    "Sofa": 3,
    "SideTable": 2.5,
    "Toilet": 2.3,
    "SinkBasin": 1.5,
    "Cabinet": 0.45,
    "Drawer": 0.5,
    "StoveBurner": 0.6,
    "CoffeeMachine": 0.4,
    "ToiletPaperHanger": 0.3,
}
TARGET_COUNTS = (1, 2, 3, 4), (30, 29, 21, 20)  # instances of the wanted object, with their weights
OTHER_COUNTS = (1, 2, 3)  # of any other object that can be picked up
FIXTURE_COUNTS = {"StoveKnob": 4, "Window": 2, "Chair": 2, "Painting": 2}  # of one that cannot, 1 unless named
# Fixtures that stand in a receptacle (VAL_RECEPTACLE_OBJECTS knows only what can be picked up).
STANDS = {
    "DeskLamp": ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable"),
    "Television": ("TVStand", "Dresser", "SideTable"),
    "HousePlant": ("SideTable", "CounterTop", "CoffeeTable", "DiningTable", "Shelf", "Dresser", "Desk"),
}
COLD = 0.08  # how often a thing in a fridge is cold from the start
PARTLY_DONE = 0.15  # pick_two: how often one of the two may already be in place

# What each task asks for, and of which appliance.
ABILITY = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}


@dataclass(frozen=True, eq=False)
class Room:
    """A floor plan: its receptacles (id -> location id) and the types of the objects that it may hold."""

    number: int
    kind: str
    receptacles: dict[str, str]
    object_types: tuple[str, ...]


@functools.cache
def package() -> dict:
    """Read what alfworld carries: its constants (sets made tuples, in a fixed order), goals, domain and grammar."""
    root = package_path()
    constants = runpy.run_path(str(root / "gen/constants.py"))
    holds = {k: tuple(sorted(v)) for k, v in constants["VAL_RECEPTACLE_OBJECTS"].items()}
    return {
        "holds": holds,
        "pickupable": frozenset().union(*holds.values()),
        "able": {k: frozenset(v) for k, v in constants["VAL_ACTION_OBJECTS"].items()},
        "openable": frozenset(constants["OPENABLE_CLASS_LIST"]),
        "containers": frozenset(constants["MOVABLE_RECEPTACLES"]),
        "rooms_for": constants["GOALS_VALID"],
        "room_kinds": constants["SCENE_TYPE"],
        "goals": runpy.run_path(str(root / "gen/goal_library.py"))["gdict"],
        "domain": (root / "data/alfred.pddl").read_text(encoding="utf-8"),
        "grammar": (root / "data/alfred.twl2").read_text(encoding="utf-8"),
    }


def type_of(id_: str) -> str:
    """Read a type off an id. Example: "Sink|-00.70|+00.93|SinkBasin" -> "SinkBasin", "Bed|+01.00|..." -> "Bed"."""
    return id_.rsplit("|", 1)[-1] if id_.endswith("Basin") else id_.split("|", 1)[0]


def new_id(rng: random.Random, type_: str, taken: set[str]) -> str:
    """Draw an unused id with made-up coordinates, which decide what instance gets what number."""
    while True:
        id_ = f"{type_}|{rng.uniform(-4, 4):+06.2f}|{rng.uniform(0, 2):+06.2f}|{rng.uniform(-4, 4):+06.2f}"
        if id_ not in taken:
            taken.add(id_)
            return id_


@functools.cache
def rooms() -> tuple[Room, ...]:
    """Read all floor plans of the package, completed to real size (the same way on every run)."""
    made = []
    for path in sorted((package_path() / "gen/layouts").glob("FloorPlan*-openable.json")):
        number = int(re.search(r"\d+", path.name)[0])
        kind = next(k for k, numbers in package()["room_kinds"].items() if number in numbers)
        listed = json.loads(path.with_name(f"FloorPlan{number}-objects.json").read_text())
        receptacles = {
            id_: f"loc|{x * 4:.0f}|{z * 4:.0f}|{turn // 90}|{tilt}"
            for id_, (x, z, turn, tilt) in json.loads(path.read_text()).items()
        }
        rng, taken, places = random.Random(f"floor plan {number}"), set(receptacles), sorted(receptacles.values())
        present = {type_of(r) for r in receptacles}
        extra = {t: rng.randint(*n) for t, n in EXTRA_RECEPTACLES.items() if t in listed and t not in present}
        extra |= {t: rng.randint(0, n) for t, n in SHORT_OF[kind].items() if t in listed}
        for type_, count in extra.items():
            for _ in range(count):
                _, x, z, turn, tilt = rng.choice(places).split("|")
                receptacles[new_id(rng, type_, taken)] = (
                    f"loc|{int(x) + rng.randint(-2, 2)}|{int(z) + rng.randint(-2, 2)}|{turn}|{tilt}"
                )
        made.append(
            Room(
                number,
                kind,
                receptacles,
                tuple(sorted(t for t in listed if t not in package()["holds"] or t in package()["containers"])),
            )
        )
    return tuple(sorted(made, key=lambda room: room.number))


@functools.cache
def goals_in(room: Room, task_type: str) -> dict[str, tuple[str, ...]]:
    """List what a task can be about in a room: wanted object -> goal receptacle types (look: the lamp's places)."""
    if room.kind not in package()["rooms_for"][task_type]:
        return {}
    present = sorted({type_of(r) for r in room.receptacles})
    wanted = [t for t in room.object_types if t in package()["pickupable"]]
    if task_type == "look_at_obj_in_light":
        stands = tuple(t for t in present if t in STANDS["DeskLamp"]) if "DeskLamp" in room.object_types else ()
        return {t: stands for t in wanted if stands and any(holds(r, t) for r in present)}
    ability, appliance = ABILITY.get(task_type, (None, None))
    if appliance:
        wanted = [t for t in wanted if t in package()["able"][ability]] if appliance in present else []
    goals = {}
    for obj in wanted:
        homes = [r for r in present if holds(r, obj)]
        if len(homes) > 1:  # it has to lie somewhere else first
            goals[obj] = tuple(r for r in homes if r != appliance)
    return {obj: places for obj, places in goals.items() if places}


def holds(receptacle_type: str, object_type: str) -> bool:
    """Say whether things of a type may lie in receptacles of a type."""
    return object_type in package()["holds"].get(receptacle_type, ()) or receptacle_type in STANDS.get(object_type, ())


class Task(NamedTuple):
    """What a game is about: the task type, its room, the wanted object and the goal receptacle (look: the lamp's)."""

    type: str
    room: Room
    obj: str
    goal: str

    @property
    def looks(self) -> bool:
        """Say whether this is look_at_obj_in_light, which has no goal receptacle."""
        return self.type == LOOK


def kept_receptacles(rng: random.Random, task: Task, limit: int | None) -> list[str]:
    """Draw a random `limit` of the room's receptacles, among them those that the task needs; None: keep all."""
    ids = sorted(task.room.receptacles)
    if limit is None or limit >= len(ids):
        return ids
    goals = [r for r in ids if type_of(r) == task.goal]
    sources = [r for r in ids if holds(type_of(r), task.obj)]
    needed = {rng.choice(goals), rng.choice([r for r in sources if r not in goals] or sources)}
    if task.type in ABILITY:
        needed.add(rng.choice([r for r in ids if type_of(r) == ABILITY[task.type][1]]))
    rest = [r for r in ids if r not in needed]
    return sorted([*needed, *rng.sample(rest, limit - len(needed))])


def object_types(rng: random.Random, task: Task, receptacles: Sequence[str], limit: int | None) -> list[str]:
    """Draw the type of every object in the room, those first that the task needs."""
    least, most = 2 if task.type == PLACE_TWO else 1, (limit or 99) - task.looks
    counts, weights = TARGET_COUNTS
    needed = [task.obj] * min(max(least, rng.choices(counts, weights)[0]), most) + ["DeskLamp"] * task.looks
    receptacle_types, others = {type_of(r) for r in receptacles}, []
    for type_ in task.room.object_types:
        placeable = any(holds(r, type_) for r in receptacle_types)
        if type_ in needed or not placeable and (limit or type_ in package()["pickupable"]):
            continue  # what stands nowhere is never seen: such fixtures are only there for the real games' size
        others += [type_] * (
            rng.choice(OTHER_COUNTS) if type_ in package()["pickupable"] else FIXTURE_COUNTS.get(type_, 1)
        )
    rng.shuffle(others)
    return needed + (others if limit is None else others[: limit - len(needed)])


def place(rng: random.Random, task: Task, types: Sequence[str], receptacles: Sequence[str]) -> dict[str, str | None]:
    """Draw where everything lies: object id -> receptacle id, or None for a fixture that stands nowhere."""
    taken, placed = set(receptacles), {}
    one_in_place = task.type == PLACE_TWO and rng.random() < PARTLY_DONE
    for type_ in types:
        homes = [r for r in receptacles if holds(type_of(r), type_)]
        if type_ == task.obj and not task.looks:
            homes = [r for r in homes if (type_of(r) == task.goal) == (one_in_place and not placed)]
        weights = [CLUTTER.get(type_of(r), 1) for r in homes]
        placed[new_id(rng, type_, taken)] = rng.choices(homes, weights)[0] if homes else None
    return placed


def pddl_id(id_: str) -> str:
    """Escape an id. Example: "Bed|+01.00|-00.50" -> "Bed_bar__plus_01_dot_00_bar__minus_00_dot_50"."""
    for char, word in (("|", "_bar_"), ("+", "_plus_"), ("-", "_minus_"), (".", "_dot_"), (",", "_comma_")):
        id_ = id_.replace(char, word)
    return id_


def pddl_problem(
    rng: random.Random, task: Task, receptacles: Sequence[str], placed: dict[str, str | None], goal: str
) -> str:
    """Write the PDDL problem, objects, initial state and goal, in the words of the published games."""
    able, known, location_of = package()["able"], package(), task.room.receptacles
    places = sorted({location_of[r] for r in receptacles})
    while (start := f"loc|{rng.randint(-12, 12)}|{rng.randint(-12, 12)}|{rng.randint(0, 3)}|30") in places:
        pass  # a player never starts at a receptacle
    rtypes, otypes = sorted({type_of(r) for r in receptacles}), sorted({type_of(o) for o in placed})
    # The domain names some types itself: they have to be declared even where no such thing is present.
    lines = [f"(define (problem plan_{task.type})", "(:domain alfred)", "(:objects", "agent1 - agent"]
    lines += [f"{t}Type - otype" for t in sorted({*otypes, "Knife", "ButterKnife"})]
    lines += [f"{t}Type - rtype" for t in sorted({*rtypes, "SinkBasin", "Microwave", "Fridge"})]
    lines += [f"{pddl_id(o)} - object" for o in placed] + [f"{pddl_id(r)} - receptacle" for r in receptacles]
    lines += [f"{pddl_id(place)} - location" for place in [*places, start]] + [")", "(:init"]
    for r in receptacles:
        id_, type_ = pddl_id(r), type_of(r)
        lines += [f"(receptacleType {id_} {type_}Type)", f"(receptacleAtLocation {id_} {pddl_id(location_of[r])})"]
        if type_ in known["openable"]:
            lines.append(f"(openable {id_})")
    lines += [f"(canContain {r}Type {o}Type)" for r in rtypes for o in otypes if o in known["holds"].get(r, ())]
    for o, r in placed.items():
        id_, type_ = pddl_id(o), type_of(o)
        place = location_of[r] if r else rng.choice(places)
        lines += [f"(objectType {id_} {type_}Type)", f"(objectAtLocation {id_} {pddl_id(place)})"]
        if r:
            lines.append(f"(inReceptacle {id_} {pddl_id(r)})")
            if type_of(r) == "Fridge" and type_ in able["Coolable"] and type_ != task.obj and rng.random() < COLD:
                lines.append(f"(isCool {id_})")
        lines += [f"({ability.lower()} {id_})" for ability in sorted(able) if type_ in able[ability]]
        if type_ in known["pickupable"]:
            lines.append(f"(pickupable {id_})")
        if type_ in known["containers"]:
            lines.append(f"(isReceptacleObject {id_})")
    return "\n".join([*lines, f"(atLocation agent1 {pddl_id(start)})", ")", goal])


def make_game(
    split: str,
    index: int,
    seed: int,
    types: Sequence[str] = TASK_TYPES,
    receptacles: int | None = None,
    objects: int | None = None,
) -> tuple[dict, dict]:
    """Make one game: the contents of its game.tw-pddl and of its traj_data.json. The arguments alone decide it."""
    rng, task_type = random.Random(f"{seed}/{split}/{index}"), types[index % len(types)]
    choices = [
        room
        for room in rooms()
        if (room.number in UNSEEN_FLOOR_PLANS) == (split == "unseen") and goals_in(room, task_type)
    ]
    library = package()["goals"][task_type]
    for _ in range(100):
        room = rng.choice(choices)
        obj = rng.choice(sorted(goals_in(room, task_type)))
        task = Task(task_type, room, obj, rng.choice(goals_in(room, task_type)[obj]))
        target = {"obj": obj, "recep": "" if task.looks else task.goal, "toggle": "DeskLamp" if task.looks else ""}
        kept = kept_receptacles(rng, task, receptacles)
        placed = place(rng, task, object_types(rng, task, kept, objects), kept)
        sentence = rng.choice(library["templates"]).format(**{k: v.lower() for k, v in target.items()})
        game = {
            "pddl_domain": package()["domain"],
            "grammar": package()["grammar"].replace("UNKNOWN GOAL", sentence),
            "pddl_problem": pddl_problem(rng, task, kept, placed, library["pddl"].replace("#", "-").format(**target)),
            "solvable": True,
        }
        if plan := solve(parse_game(game)):  # neither impossible (None) nor won from the start ([])
            break
    else:
        raise RuntimeError(f"no {task_type} game in 100 tries ({split} {index}, seed {seed})")
    return game | {"walkthrough": plan}, {
        "task_id": f"trial_T{seed}_{index:06d}",
        "task_type": task_type,
        "pddl_params": {
            "object_target": obj,
            "parent_target": target["recep"],
            "toggle_target": target["toggle"],
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{room.number}", "scene_num": room.number},
        "turk_annotations": {"anns": [{"task_desc": sentence}]},
    }


def make_games(
    out: str | Path,
    train: int,
    seen: int,
    unseen: int,
    seed: int,
    types: Sequence[str | int] = TASK_TYPES,
    receptacles: int | None = None,
    objects: int | None = None,
) -> dict[str, list[Path]]:
    """Write the games below `out` and return their files by split. Asked again for the same, reuse them.

    Raises ValueError for what cannot be made, FileExistsError if the folder holds anything else.
    """
    names = [TYPE_BY_NUMBER.get(int(t)) if str(t).isdigit() else t for t in types]
    if unknown := [t for t, name in zip(types, names, strict=True) if name not in TASK_TYPES]:
        raise ValueError(f"unknown task types {unknown}; there are {TYPE_BY_NUMBER}")
    names = [name for name in TASK_TYPES if name in names]
    if not names or min(train, seen, unseen) < 0:
        raise ValueError("at least one task type, and no negative number of games")
    if (receptacles is not None and receptacles < 3) or (objects is not None and objects < 2):
        raise ValueError("a task can need 3 receptacles (source, appliance, goal) and 2 objects: no smaller rooms")
    out = Path(out)
    root, record = out / "json_2.1.1", out / "made_games.json"
    counts = {"train": train, "seen": seen, "unseen": unseen}
    asked = counts | {"seed": seed, "types": names, "receptacles": receptacles, "objects": objects}
    held = json.loads(record.read_text()) if record.exists() else None
    if (held is None and root.exists()) or (held is not None and held["asked"] != asked):
        raise FileExistsError(
            f"{out} already holds other games ({held['asked'] if held else 'not made here'}), "
            f"asked for are {asked}: choose another folder, or remove that one"
        )
    if held is None or not held["complete"]:  # an interrupted run starts over: the games come out the same
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"asked": asked, "complete": False}, indent=1))
        for split, count in counts.items():
            (root / FOLDERS[split]).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                game, traj = make_game(split, index, seed, names, receptacles, objects)
                params = traj["pddl_params"]
                task = (
                    f"{traj['task_type']}-{params['object_target']}-None-"
                    f"{params['parent_target'] or params['toggle_target']}-{traj['scene']['scene_num']}"
                )
                folder = root / FOLDERS[split] / task / traj["task_id"]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "traj_data.json").write_text(json.dumps(traj, indent=1))
                (folder / "game.tw-pddl").write_text(json.dumps(game))
        record.write_text(json.dumps({"asked": asked, "complete": True}, indent=1))
    return {split: sorted((root / FOLDERS[split]).rglob("game.tw-pddl")) for split in counts}


def main() -> None:
    """Make the games that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for split in FOLDERS:
        parser.add_argument(f"--{split}", type=int, default=0, help=f"number of {FOLDERS[split]} games")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", nargs="+", default=list(TASK_TYPES), help="task types, by name or number")
    parser.add_argument("--receptacles", type=int, help="at most so many receptacles in a room (default: all)")
    parser.add_argument("--objects", type=int, help="at most so many objects in a room (default: all)")
    args = parser.parse_args()
    for split, paths in make_games(**vars(args)).items():
        print(f"{split}: {len(paths)} games in {args.out / 'json_2.1.1' / FOLDERS[split]}")


if __name__ == "__main__":
    main()

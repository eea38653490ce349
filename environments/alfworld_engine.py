"""ALFWorld's text domain played natively: pure Python, microseconds a step, word for word what TextWorld says.

What TextWorld derives from `alfred.pddl` and `alfred.twl2` (alfworld 0.4.2: "move X to Y", "You arrive at bed 1.")
stands here as plain code over sets, together with an oracle that sees the whole state:

    state = GameState(parse_game("DIR/game.tw-pddl"))
    state.text, state.actions, state.won; state.step("go to bed 1"); solve(state)

tools/check_alfworld.py plays games here and in TextWorld, and compares them word for word.

Departs from upstream: movable-receptacle and sliced goals are refused (ALFWorld itself skips them), and a game whose
goal can never be reached plays on here, where TextWorld fails to load it. Of a stored game only `pddl_problem` and the
task sentence inside its grammar are read, so the dialects of alfworld 0.3 and 0.4 load alike.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TASK_TYPES = (  # in the order of ALFWorld's own ids 1 to 6
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
PLACE, LOOK, CLEAN, HEAT, COOL, PLACE_TWO = TASK_TYPES
# A goal is recognised by the predicates in it: ALFWorld has one PDDL goal per task type.
GOAL_PREDICATES = {
    "inreceptacle objecttype receptacletype": PLACE,
    "atlocation holds inreceptacle istoggled objecttype objecttype receptacleatlocation toggleable": LOOK,
    "cleanable inreceptacle isclean objecttype receptacletype": CLEAN,
    "heatable inreceptacle ishot objecttype receptacletype": HEAT,
    "coolable inreceptacle iscool objecttype receptacletype": COOL,
    "= inreceptacle inreceptacle objecttype objecttype receptacletype receptacletype": PLACE_TWO,
}
CHANGES = {"clean": ("cleanable", "sinkbasin"), "heat": ("heatable", "microwave"), "cool": ("coolable", "fridge")}
CHANGE_WANTED = {CLEAN: "clean", HEAT: "heat", COOL: "cool"}

HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""

# The rest of the rule tells where the sentence ends: a quotation mark in it would cut it off.
TASK_SENTENCE = re.compile(r'"rhs": "Your task is to: ((?:[^"\\]|\\.)*)"(\s*(?:}|$))?')
ATOM = re.compile(r"\(([a-z]+|=) ([^()]*)\)")


def package_path() -> Path:
    """Find where the alfworld package is installed, without importing it: its import makes a folder in $HOME."""
    spec = importlib.util.find_spec("alfworld")
    if spec is None:
        raise ModuleNotFoundError("alfworld is not installed: pip install alfworld==0.4.2")
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True, eq=False)
class Game:
    """One parsed game: constant, shared by all its plays. Objects and receptacles are ints in the order of their PDDL
    ids, which is the order TextWorld lists them in; locations are PDDL ids."""

    task_type: str
    task: str  # the task sentence, as in the first observation
    names: tuple[str, ...]  # 17 -> "bed 1"
    location_of: dict[int, str]  # receptacle -> location, in order
    receptacles_at: dict[str, tuple[int, ...]]  # location -> receptacles
    start: str
    fits: dict[int, frozenset[int]]  # receptacle -> objects that may be put there (canContain)
    static: dict[str, frozenset[int]]  # "openable", "pickupable", "heatable", ..., "fridge", "knife", ...
    inside: dict[int, frozenset[int]]  # object -> objects in it (inReceptacleObject, never changes)
    contents: dict[int, frozenset[int]]  # at the start: receptacle -> objects (inReceptacle)
    lies_at: dict[int, frozenset[str]]  # at the start: object -> locations (objectAtLocation)
    cool: frozenset[int]  # at the start: isCool
    goal_objects: frozenset[int]
    goal_receptacles: frozenset[int]  # empty for look_at_obj_in_light
    goal_lamps: frozenset[int]  # empty for the other task types


def task_sentence(game: dict) -> str:
    """Return the sentence after "Your task is to: " in a stored game's grammar, its full stop included.

    Raises ValueError if there is none, or one that TextWorld would not read as plain text.
    """
    match = TASK_SENTENCE.search(game["grammar"])
    if match is None or "UNKNOWN GOAL" in match[1]:
        raise ValueError("the grammar holds no task sentence")
    if match[2] is None or re.search(r"[\\#{}\[\]|;<>]", match[1]):
        raise ValueError(
            f'TextWorld would read the task sentence as grammar, for it has one of "\\#{{}}[]|;<>: {match[1]!r}'
        )
    return match[1]


def number_names(ids: Sequence[str]) -> tuple[str, ...]:
    """Make readable names of sorted PDDL ids, numbered from the highest down, as alfworld's Demangler does.

    Example: ["bed_bar_a", "bed_bar_b", "sink_bar_a_bar_sinkbasin"] -> ("bed 2", "bed 1", "sinkbasin 1")
    """
    kinds = [id_.split("_bar_", 1)[0] + "basin" * ("basin" in id_) for id_ in ids]
    left, names = Counter(kinds), []
    for kind in kinds:
        names.append(f"{kind} {left[kind]}")
        left[kind] -= 1
    return tuple(names)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read one of a game's files. Raises ValueError, which says what the file is instead: empty, torn, a folder, ..."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from None
    if not data.strip():
        raise ValueError("it is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("it is Git LFS's pointer to the file, which `git lfs pull` fetches")
    try:
        found = json.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is torn, or no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def parse_game(game: dict | str | Path) -> Game:
    """Read a stored game (the dict, or the path of its game.tw-pddl). Raises ValueError if it is malformed."""
    source = "" if isinstance(game, dict) else f"{game}: "
    try:
        return _parse(game if isinstance(game, dict) else read_json(game))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source}not a playable ALFWorld game: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """Say what an error of missing or wrong data says, a missing key in words."""
    return f"missing {error}" if isinstance(error, KeyError) else str(error)


def _parse(data: dict) -> Game:
    for key in ("grammar", "pddl_problem"):
        if not isinstance(data[key], str):
            raise ValueError(f"{key} is no text")
    task, problem = task_sentence(data), data["pddl_problem"].lower()  # TextWorld's translator lower-cases it too
    if not 0 < problem.find("(:init") < problem.find("(:goal"):
        raise ValueError("pddl_problem has no :init before a :goal")
    head, goal = problem.split("(:goal", 1)
    facts: dict[str, list[list[str]]] = defaultdict(list)
    for predicate, arguments in ATOM.findall(head.split("(:init", 1)[1]):
        facts[predicate].append(arguments.split())
    ids = sorted({argument for rows in facts.values() for row in rows for argument in row if "_bar_" in argument})
    number = {id_: i for i, id_ in enumerate(ids)}

    def with_fact(predicate: str, type_: str | None = None) -> frozenset[int]:
        return frozenset(number[row[0]] for row in facts[predicate] if type_ is None or row[1] == type_)

    def grouped(predicate: str, key: int, convert: Callable[[str], Any] = number.__getitem__) -> dict[int, frozenset]:
        groups = defaultdict(set)
        for row in facts[predicate]:
            groups[number[row[key]]].add(convert(row[1 - key]))
        return {k: frozenset(v) for k, v in groups.items()}

    location_of = dict(sorted((number[r], location) for r, location in facts["receptacleatlocation"]))
    if location_of.keys() != with_fact("receptacletype"):
        raise ValueError("not every receptacle has both a type and a location")
    receptacles_at = defaultdict(tuple)
    for r, location in location_of.items():
        receptacles_at[location] += (r,)
    static = {
        p: with_fact(p)
        for p in (
            "openable",
            "pickupable",
            "cleanable",
            "heatable",
            "coolable",
            "sliceable",
            "toggleable",
            "isreceptacleobject",
        )
    }
    static["knife"] = with_fact("objecttype", "knifetype") | with_fact("objecttype", "butterknifetype")
    static |= {a: with_fact("receptacletype", f"{a}type") for _, a in CHANGES.values()}
    objects_of, types_in = defaultdict(set), defaultdict(set)
    for id_, type_ in facts["objecttype"]:
        objects_of[type_].add(number[id_])
    for receptacle_type, type_ in facts["cancontain"]:
        types_in[receptacle_type].add(type_)
    fits = {
        number[r]: frozenset().union(*(objects_of[t] for t in types_in[type_])) for r, type_ in facts["receptacletype"]
    }

    goal_atoms = [(predicate, arguments.split()) for predicate, arguments in ATOM.findall(goal)]
    task_type = GOAL_PREDICATES.get(" ".join(sorted(predicate for predicate, _ in goal_atoms)))
    if task_type is None:
        raise ValueError("the goal is none of the six task types (movable receptacles and slices are not supported)")
    types = {a[0]: a[1] for predicate, a in goal_atoms if predicate in ("objecttype", "receptacletype")}
    abilities = [static[predicate] for predicate, _ in goal_atoms if predicate in ("cleanable", "heatable", "coolable")]
    ((_, start),) = facts["atlocation"]
    return Game(
        task_type=task_type,
        task=task,
        names=number_names(ids),
        location_of=location_of,
        receptacles_at=dict(receptacles_at),
        start=start,
        fits=fits,
        static=static,
        inside=grouped("inreceptacleobject", 1),
        contents=grouped("inreceptacle", 1),
        lies_at=grouped("objectatlocation", 0, str),
        cool=with_fact("iscool"),
        goal_objects=with_fact("objecttype", types.get("?o") or types["?o1"]).intersection(*abilities),
        goal_receptacles=with_fact("receptacletype", types["?r"]) if "?r" in types else frozenset(),
        goal_lamps=with_fact("objecttype", types["?ot"]) & static["toggleable"] if "?ot" in types else frozenset(),
    )


class GameState:
    """One play of a game: `text` is the last observation, `actions` what may be done now, `step` does it."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.location = game.start
        self.held: int | None = None
        self.opened: set[int] = set()
        self.toggled: set[int] = set()
        self.sliced: set[int] = set()
        self.changed = {"clean": set(), "heat": set(), "cool": set(game.cool)}
        self.contents = {r: set(game.contents.get(r, ())) for r in game.location_of}
        self.lies_at = {obj: set(locations) for obj, locations in game.lies_at.items()}
        self.taken_from: set[tuple[int, int]] = set()  # TextWorld's not_inreceptacle facts: only `take` makes them
        self._commands: dict[str, tuple] | None = None
        self.text = (
            f"-= Welcome to TextWorld, ALFRED! =-\n\n{self._look(game.location_of)}\n\nYour task is to: {game.task}"
        )

    def step(self, action: str) -> str:
        """Do one action and return the observation; any text that is not admissible does nothing."""
        command = self.commands().get(action.strip())
        self.text = "Nothing happens." if command is None else self._do(*command)
        return self.text

    @property
    def actions(self) -> list[str]:
        """List the admissible actions, sorted, as TextWorld does."""
        return sorted(self.commands())

    @property
    def won(self) -> bool:
        """Say whether the goal holds now."""
        game = self.game
        if game.task_type == LOOK:
            lit = game.goal_lamps & self.toggled
            return self.held in game.goal_objects and any(lit & self.contents[r] for r in self.here)
        needed = 2 if game.task_type == PLACE_TWO else 1
        return any(sum(map(self.ready, self.contents[r] & game.goal_objects)) >= needed for r in game.goal_receptacles)

    @property
    def here(self) -> tuple[int, ...]:
        """List the receptacles at the player's location."""
        return self.game.receptacles_at.get(self.location, ())

    def ready(self, obj: int) -> bool:
        """Say whether an object is as the task wants it (clean, hot or cool, where it asks for that)."""
        change = CHANGE_WANTED.get(self.game.task_type)
        return change is None or obj in self.changed[change]

    def accessible(self, r: int) -> bool:
        """Say whether things can be taken from and put into a receptacle: it is open, or cannot be closed."""
        return r in self.opened or r not in self.game.static["openable"]

    def commands(self) -> dict[str, tuple]:
        """Find the admissible actions, each with the arguments of `_do`."""
        if self._commands is not None:
            return self._commands
        names, static, held = self.game.names, self.game.static, self.held
        # Going where one already is changes nothing, so TextWorld's translator drops it.
        found = {
            f"go to {names[r]}": ("go", r) for r, location in self.game.location_of.items() if location != self.location
        }
        found |= {"help": ("help",), "inventory": ("inventory",), "look": ("look",)}
        for r in self.here:
            found[f"examine {names[r]}"] = ("examine receptacle", r)
            if r in static["openable"]:
                verb = "close" if r in self.opened else "open"
                found[f"{verb} {names[r]}"] = (verb, r)
            for obj in static["toggleable"] & self.contents[r]:
                found[f"use {names[obj]}"] = ("use", obj)
            if held is None:
                if self.accessible(r):
                    for obj in static["pickupable"] & self.contents[r]:
                        found[f"take {names[obj]} from {names[r]}"] = ("take", obj, r)
                continue
            if self.accessible(r) and held in self.game.fits.get(r, ()):
                found[f"move {names[held]} to {names[r]}"] = ("move", held, r)
            for verb, (ability, appliance) in CHANGES.items():
                if r in static[appliance] and held in static[ability]:  # be the appliance open or closed
                    found[f"{verb} {names[held]} with {names[r]}"] = (verb, held, r)
        if held is not None:  # objects in reach should do as well, but a stray comma in the PDDL disables that branch
            found[f"examine {names[held]}"] = ("examine object", held)
            if held in static["knife"]:
                for obj in static["sliceable"]:
                    if self.location in self.lies_at.get(obj, ()):
                        found[f"slice {names[obj]} with {names[held]}"] = ("slice", obj, held)
        self._commands = found
        return found

    def _do(self, verb: str, a: int = -1, b: int = -1) -> str:
        """Carry out an admissible action on `a` (and `b`) and say so."""
        self._commands = None
        one, two = self.game.names[a], self.game.names[b]
        match verb:
            case "go":
                self.location = self.game.location_of[a]
                return f"You arrive at {one}. {self._examine_receptacle(a)}"
            case "open":
                self.opened.add(a)
                return f"You open the {one}. {self._examine_receptacle(a)}"
            case "close":
                self.opened.discard(a)
                return f"You close the {one}."
            case "take":
                self.held = a
                self.contents[b].discard(a)
                self.lies_at.setdefault(a, set()).discard(self.location)
                self.taken_from.add((a, b))
                return f"You pick up the {one} from the {two}."
            case "move":
                self.held = None
                self.contents[b].add(a)
                self.lies_at.setdefault(a, set()).add(self.location)
                self.taken_from.discard((a, b))
                return f"You move the {one} to the {two}."
            case "clean" | "heat" | "cool":
                self.changed[verb].add(a)
                if verb != "clean":
                    self.changed["cool" if verb == "heat" else "heat"].discard(a)
                return f"You {verb} the {one} using the {two}."
            case "use":
                self.toggled.add(a)  # nothing ever reads whether the second use switched it off again
                return f"You turn on the {one}."
            case "slice":
                self.sliced.add(a)
                return f"You sliced the {one} with the {two}."
            case "examine receptacle":
                return self._examine_receptacle(a)
            case "examine object":
                return self._examine_object(a)
            case "inventory" if self.held is not None:
                return f"You are carrying: a {self.game.names[self.held]}."
            case "inventory":
                return "You are not carrying anything."
            case "look":
                return self._look([])
        return HELP

    def _look(self, seen_from_afar: Collection[int]) -> str:
        """Look around: from the middle of the room the intro sees all receptacles, and `look` nothing."""
        if not self.here:
            return (
                f"You are in the middle of a room. Looking quickly around you, you see {self._listing(seen_from_afar)}."
            )
        # "Next to it" lies what is at this location and was once taken from a receptacle here (and put into another);
        # the grammar says it once for each such receptacle.
        floor = [
            obj
            for obj in sorted(self.lies_at)
            if self.location in self.lies_at[obj]
            for r in self.here
            if (obj, r) in self.taken_from
        ]
        return f"You are facing the {self._listing(self.here, '')}. Next to it, you see {self._listing(floor)}."

    def _examine_receptacle(self, r: int) -> str:
        name = self.game.names[r]
        if not self.accessible(r):
            return f"The {name} is closed."
        where = f"The {name} is open. In it" if r in self.opened else f"On the {name}"
        return f"{where}, you see {self._listing(sorted(self.contents[r]))}."

    def _examine_object(self, obj: int) -> str:
        name = self.game.names[obj]
        if obj in self.game.static["isreceptacleobject"]:
            return f"This is a normal {name}. In it, you see {self._listing(sorted(self.game.inside.get(obj, ())))}."
        words = ["hot"] * (obj in self.changed["heat"]) + ["cool"] * (obj in self.changed["cool"])
        state = " and ".join(words + ["clean"] * (obj in self.changed["clean"]))
        if obj in self.sliced:
            return f"This is a {state} sliced {name}." if state else f"This is a sliced {name}."
        if state:
            return f"This is a {'cold' if state == 'cool' else state} {name}."
        return f"This {name} is on." if obj in self.toggled else f"There's nothing special about {name}."

    def _listing(self, entities: Collection[int], article: str = "a ") -> str:
        """List entities in words. Example: [3, 8, 9] -> "a bed 1, a desk 1, and a shelf 1"."""
        *most, last = [article + self.game.names[e] for e in entities] or ["nothing"]
        return f"{', '.join(most)}, and {last}" if most else last


# ----------------------------------------------------------------------------------------------------------------------
# The oracle: every sensible way to do the task, as a row of stops; the shortest one wins


class Stop(NamedTuple):
    """Something to do at a receptacle, which may have to be opened for it."""

    receptacle: int
    command: str | None
    inside: bool = True


def solve(game: Game | GameState) -> list[str] | None:
    """Find a short winning list of actions from the current state ([] if it is won), or None if there is none."""
    state = GameState(game) if isinstance(game, Game) else game
    return [] if state.won else min((_walk(state, stops) for stops in _routes(state)), key=len, default=None)


def distance(state: GameState) -> int | None:
    """Count the actions that the oracle still needs from the current state; None if it sees no way to win."""
    plan = solve(state)
    return None if plan is None else len(plan)


def _walk(state: GameState, stops: Sequence[Stop]) -> list[str]:
    """Turn stops into actions: go where one is not yet, open what is in the way, do it."""
    game, location, opened, actions = state.game, state.location, set(), []
    for r, command, inside in stops:
        if game.location_of[r] != location:
            location = game.location_of[r]
            actions.append(f"go to {game.names[r]}")
        if inside and r not in opened and not state.accessible(r):
            opened.add(r)
            actions.append(f"open {game.names[r]}")
        if command:
            actions.append(command)
    return actions


def _put(state: GameState, obj: int, r: int) -> Stop:
    return Stop(r, f"move {state.game.names[obj]} to {state.game.names[r]}")


def _puts(state: GameState, obj: int, receptacles: Collection[int], on_the_way: set[str]) -> list[Stop]:
    """List where an object can be put; of the receptacles that no route could tell apart, only one."""
    game, kinds = state.game, {}
    for r in receptacles:
        if obj in game.fits.get(r, ()):
            kind = (
                game.location_of[r] in on_the_way and game.location_of[r],
                state.accessible(r),
                r in game.goal_receptacles,
                bool(state.contents[r] & game.goal_objects),
            )
            kinds.setdefault(kind, _put(state, obj, r))
    return list(kinds.values())


def _routes(state: GameState) -> Iterator[list[Stop]]:
    """Walk the ways to do the task: with what is in hand and, that put away, with every other object there is."""
    game, held, names = state.game, state.held, state.game.names
    takes = [
        (obj, Stop(r, f"take {names[obj]} from {names[r]}"))
        for r in game.location_of
        for obj in sorted(state.contents[r] & game.goal_objects & game.static["pickupable"])
    ]
    lamps = [
        Stop(r, None if lamp in state.toggled else f"use {names[lamp]}", inside=False)
        for r in game.location_of
        for lamp in sorted(state.contents[r] & game.goal_lamps)
    ]
    change = CHANGE_WANTED.get(game.task_type)
    appliances = sorted(game.static[CHANGES[change][1]]) if change else []
    on_the_way = {
        state.location,
        *(game.location_of[r] for r in appliances),
        *(game.location_of[stop.receptacle] for stop in [take for _, take in takes] + lamps),
    }
    away = [[]] if held is None else [[put] for put in _puts(state, held, game.location_of, on_the_way)]
    starts = [([], held)] if held in game.goal_objects else []
    starts += [(put_away + [take], obj) for put_away in away for obj, take in takes if obj != held]
    for stops, obj in starts:
        if game.task_type == LOOK:
            yield from (stops + [lamp] for lamp in lamps)
            continue
        changes = (
            [[]]
            if state.ready(obj)
            else [[Stop(r, f"{change} {names[obj]} with {names[r]}", inside=False)] for r in appliances]
        )
        if any(obj in state.contents[r] for r in game.goal_receptacles if not stops or r != stops[-1].receptacle):
            yield from (stops + made for made in changes)  # some objects are in two receptacles at once, also when held
        puts = _puts(state, obj, sorted(game.goal_receptacles), on_the_way)
        for made, put in itertools.product(changes, puts):
            route, r = stops + made + [put], put.receptacle
            if game.task_type != PLACE_TWO or state.contents[r] & game.goal_objects - {obj}:
                yield route
            else:
                yield from (route + [take, _put(state, other, r)] for other, take in takes if other not in (obj, held))

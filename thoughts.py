"""What a cold start teaches to say, written without a language model: the actor's thoughts, the critic's answers.

Thoughts say what can be read off the prompt, in fixed forms, so that a model of any size can learn to fill them in.
Departure from the paper, whose thoughts and critiques come from a language model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from envs import RECEPTACLE_TYPES
from sciworld import REFUSALS

TASK_FORMS = (  # ALFWorld's task sentences -> what is needed, in which state, and where it must go
    r"(?:look at|examine the) (?P<object>\w+) (?:under|with) the (?P<place>\w+)",
    r"(?:put|find) (?P<state>two) (?P<object>\w+)(?: and put them)? in (?P<place>\w+)",
    r"put a (?P<state>clean|hot|cool) (?P<object>\w+) in (?P<place>\w+)",
    r"(?P<state>clean|heat|cool) some (?P<object>\w+) and put it in (?P<place>\w+)",
    r"put (?:a|some) (?P<object>\w+) (?:in|on) (?P<place>\w+)",
)
STATE = {"clean": "clean", "heat": "hot", "hot": "hot", "cool": "cool", "two": "two", None: "a"}

ADVICE = {  # what the offline critic advises, by what was wrong or right
    "inadmissible": "Read the current observation and choose an admissible action.",
    "idle": "Avoid repeating actions that did not change anything.",
    "search": "Explore unvisited places systematically while searching for the object.",
    "grab": "Take only the object that the task needs.",
    "deliver": "Go to the destination and finish the task once the object is held.",
}
SCIENCE_ADVICE = {  # for ScienceWorld: by the verb
    ("focus",): "Focus only on what the task names, once it is in view.",
    ("go", "teleport"): "Go to the room where what the task needs can be found.",
    ("wait", "wait1"): "Wait only where something has to happen by itself.",
    ("look", "inventory", "task", "read", "examine"): "Avoid looking again at what is already known.",
    (): "Bring together what the task needs, one step after the other.",
}


@dataclass(frozen=True)
class Situation:
    """What a prompt shows at one step."""

    env: str
    task: str
    observation: str
    actions: tuple[str, ...]
    history: tuple[tuple[str, str], ...]
    step: int
    objects: tuple[str, ...] = ()


def reply(at: Situation, action: str, style: str = "think") -> str:
    """An actor's whole reply, in the form prompts.parse_reply reads in this style."""
    tag = _tag(at, action) if style == "rlvmr" else "think"
    text = f"{_plan(at)} {thought(at, action)}" if tag == "planning" else thought(at, action)
    return f"<{tag}>{text}</{tag}><action>{action}</action>"


def _tag(at: Situation, action: str) -> str:
    """RLVMR's tag: a plan first, reflection after a refusal, exploration where the action shows something new."""
    if at.step == 0:
        return "planning"
    if at.observation.startswith(("Nothing happens", *REFUSALS)):
        return "reflection"
    return "explore" if action.startswith(("go ", "open ", "teleport ", "look", "focus ")) else "monitor"


def _plan(at: Situation) -> str:
    """The subgoals, in one sentence. Example: "Plan: find mug, make it clean, bring it to shelf."."""
    if at.env == "scienceworld":
        return f"Plan: {_goal(at)}."
    asked = need(at)
    state = asked.groupdict().get("state")
    kind = f"two {asked['object']}" if state == "two" else asked["object"]
    change = f" make it {STATE[state]}," if state not in ("two", None) else ""
    return f"Plan: find {kind},{change} bring it to {asked['place']}."


def thought(at: Situation, action: str) -> str:
    """What the agent says to itself before `action`."""
    return alfworld_thought(at) if at.env == "alfworld" else scienceworld_thought(at, action)


def critique(at: Situation, action: str, verdict: int, better: str) -> str:
    """A critic's whole answer about `action`, in the paper's format; `better` is shown where the verdict is 0."""
    reason, advice = (_alfworld_reason if at.env == "alfworld" else _scienceworld_reason)(at, action, verdict)
    proposal = "" if verdict else f"<action>{better}</action>"
    return (
        f"<think>{thought(at, action)} {reason}</think><answer>\\boxed{{{verdict}}}</answer>{proposal}"
        f"<advise>{advice}</advise>"
    )


# ----------------------------------------------------------------------------------------------------------------------
# ALFWorld


def alfworld_thought(at: Situation) -> str:
    """What the agent can read off its prompt: need, what it holds, where it went, what is in reach, what of it counts.

    What counts is an object that is needed, where one is in reach; the place for it, once it is held as needed.
    Example: "Need clean mug in shelf. Have nothing. Been drawer 1, desk 1. Here cd 1, mug 2. Next mug 2.", and when
    that mug is clean: "Need clean mug in shelf. Have clean mug 2. Been sinkbasin 1. Here nothing. Next shelf 1."
    """
    asked, held = need(at), _held(at)
    wanted, kind, place = STATE[asked.groupdict().get("state")], asked["object"], asked["place"]
    texts = (*(text for text, _ in at.history), at.observation)
    changes = (re.match(rf"You (clean|heat|cool) the {held} using", text) for text in texts)
    states = [STATE[match[1]] for match in changes if match]
    ready = held.split()[0] == kind and (wanted in ("a", "two") or states[-1:] == [wanted])
    been = [action.removeprefix("go to ") for _, action in at.history if action.startswith("go to ")]
    here = [match[1] for action in at.actions if (match := re.match(r"(?:take|use) (\w+ \d+)", action))]
    reach = here + [match[1] for action in at.actions if (match := re.match(r"(?:go to|examine) (\w+ \d+)", action))]
    counts = [name for name in reach if name.split()[0] == (place if ready else kind) and name != held]
    return (
        f"Need {wanted} {kind} in {place}. Have {' '.join(states[-1:] + [held])}. "
        f"Been {', '.join(been) or 'nowhere'}. Here {', '.join(here) or 'nothing'}. "
        f"Next {counts[0] if counts else 'nothing'}."
    )


def _held(at: Situation) -> str:
    """The object in hand, or "nothing": only what is held or stood at can be examined."""
    return next((name for name in _examined(at) if name.split()[0] not in RECEPTACLE_TYPES), "nothing")


def places(at: Situation) -> list[str]:
    """The receptacle the agent stands at: none at the start."""
    return [name for name in _examined(at) if name.split()[0] in RECEPTACLE_TYPES]


def _examined(at: Situation) -> list[str]:
    return [action.removeprefix("examine ") for action in at.actions if action.startswith("examine ")]


def need(at: Situation) -> re.Match:
    """What the task sentence asks for: groups `object`, `place` and, in some forms, `state`."""
    return next(match for form in TASK_FORMS if (match := re.match(form, at.task)))


def _alfworld_reason(at: Situation, action: str, verdict: int) -> tuple[str, str]:
    """Why the verdict, and the advice that goes with it."""
    verb = action.split(" ")[0]
    if action not in at.actions:
        return "It is not admissible.", ADVICE["inadmissible"]
    if verb in ("go", "open"):
        return "It leads on." if verdict else "It leads nowhere new.", ADVICE["search"]
    if verb == "take":
        return "It takes what is needed." if verdict else "It takes what is not needed.", ADVICE["grab"]
    if verb in ("move", "use", "clean", "heat", "cool"):
        return "It serves the task." if verdict else "It does not serve the task.", ADVICE["deliver"]
    return "It brings the task closer." if verdict else "It changes nothing.", ADVICE["idle"]


# ----------------------------------------------------------------------------------------------------------------------
# ScienceWorld


def scienceworld_thought(at: Situation, action: str) -> str:
    """The task, what was done last and what came of it, and what to do now.

    Example: "My task is to boil water. Last I did go kitchen, and: You move to the kitchen. Now I should look around."
    """
    last = f"Last I did {at.history[-1][1]}, and: {_first_sentence(at.observation)}" if at.history else "I begin."
    return f"My task is to {_goal(at)}. {last} Now I should {action}."


def _goal(at: Situation) -> str:
    return at.task.removeprefix("Your task is to ").split(". ")[0].rstrip(".")


def _first_sentence(text: str) -> str:
    sentence = text.split("\n")[0].split(". ")[0].strip().rstrip(".:")
    return f"{sentence}."


def _scienceworld_reason(at: Situation, action: str, verdict: int) -> tuple[str, str]:
    verb = action.split(" ")[0]
    advice = next(advice for verbs, advice in SCIENCE_ADVICE.items() if not verbs or verb in verbs)
    return "It is a step towards the goal." if verdict else "It does not bring the goal closer.", advice

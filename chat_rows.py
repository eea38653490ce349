"""Chats to learn: files of many forms, read as rows of a prompt and the reply to it; nothing is left out silently.

    rows = read_rows(Path("chats.jsonl"))       [{"prompt": [{"role": ..., "content": ...}, ...], "response": text}]

A file holds JSON, a row a line or one list of rows.  Each of the assistant's messages is learned after what precedes
it, the system's message included; what cannot be learned is an error.  A row is

    {"messages": [{"role": "user", "content": ...}, ...]}       or the list alone; content is text, or parts of text
    {"conversations": [{"from": "human", "value": ...}, ...]}   ShareGPT
    {"instruction": ..., "input": ..., "output": ...}           Alpaca; also "history": [[question, answer], ...]
    {"prompt": ..., "completion": ...}                          or "response": texts, or messages; what is in the prompt
                                                                is not learned
    {"data": [{"prompt": ..., "response": ...}, ...]}           an episode, as RLVMR's scripts write it

and may have "system" beside.  A message with "weight": 0 or "loss": false stays in the prompts and is not learned.
What would change the lesson and is not read, such as a thought beside the reply or a label, is an error, too.
"""

from __future__ import annotations

import codecs
import itertools
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from config import ConfigError

ROLES = {"system": "system"} | dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "model"), "assistant")
SYSTEM = ("system", "system_prompt")  # beside the messages
FORMS = {  # what a row must have: what it may have; of forms that fit the first is meant
    ("messages",): SYSTEM,
    ("conversations",): SYSTEM,
    ("instruction", "output"): ("input", "history", *SYSTEM),
    ("prompt", "completion"): SYSTEM,
    ("prompt", "response"): SYSTEM,
    ("data",): (),
}
SPOKEN = dict.fromkeys(key for form, more in FORMS.items() for key in form + more if key != "data")
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "image", "images", "audio", "audios", "video")
UNSUPPORTED += ("videos", "weight", "chat_template_kwargs")
PREFERENCE = ("label", "chosen", "rejected")  # which replies are good
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "cot", "chain_of_thought")
THOUGHTS += ("rationale",)
NOTHING = (None, "", [], {})  # as good as no such key
FILES = "rows are JSON in UTF-8, one a line, or one list of them"
KNOWN = (
    'known are rows with "messages", "conversations" (ShareGPT), "instruction" and "output" (Alpaca), "prompt" and '
    '"completion" or "response", "data" (episodes of RLVMR), and bare lists of messages'
)
KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}

Said = list[tuple[dict, bool]]  # messages, and whether each is to be learned


def read_rows(path: Path, fits: Callable[[dict], None] = lambda row: None, labelled: bool = False) -> list[dict]:
    """Read a file of chats, one row for each reply to learn: {"prompt": messages before it, "response": its text}.

    `labelled`: rows may have a "label", which stays with them; else one is an error. Raises ConfigError that names the
    first line of which something would be lost, or which `fits` raises for.
    """
    rows = []
    for where, found in _rows_in(path):
        try:
            made = _to_learn(found, labelled)
            for row in made:
                fits(row)
        except ConfigError as error:
            raise ConfigError(f"{path}, {where}: {error}") from None
        rows += made
    if not rows:
        raise ConfigError(f"{path} has no rows; {FILES}")
    return rows


def text_of(row: dict) -> str:
    """Return all that is said in a row that was read."""
    return "".join([*(message["content"] for message in row["prompt"]), row["response"]])


def _rows_in(path: Path) -> Iterator[tuple[str, Any]]:
    """Read what stands on each line of a file, or is in its list, with "line 3" or "row 3". Raises ConfigError."""
    with path.open("rb") as file:
        lines = ((number, line.rstrip()) for number, line in enumerate(file, 1) if line.strip())
        start = list(itertools.islice(lines, 2))
        if not start:
            raise ConfigError(f"{path} is empty; {FILES}")
        number, first = start[0]
        torn = None
        try:
            found = _parse(path, first, number)
        except ConfigError as error:
            torn = error
        if not torn and len(start) == 2:
            for number, line in itertools.chain(start, lines):
                yield f"line {number}", _parse(path, line, number)
            return
    if torn:  # one value over several lines, or a broken line
        try:
            found = _parse(path, path.read_bytes(), 1)
        except ConfigError as error:
            raise (error if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[") else torn) from None
    is_chat = isinstance(found, list) and found and isinstance(found[0], dict) and found[0].keys() & {"role", "from"}
    if isinstance(found, list) and not is_chat:
        yield from ((f"row {number}", row) for number, row in enumerate(found, 1))
    else:
        yield f"line {number}", found


def _parse(path: Path, text: bytes, line: int) -> Any:
    """Read the JSON that begins on a line of a file. Raises ConfigError."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line, why = line + text.count(b"\n", 0, error.start), "not text in UTF-8"
    except json.JSONDecodeError as error:
        line, why = line + error.lineno - 1, f"not JSON ({error.msg}, column {error.colno})"
    except (ValueError, RecursionError) as error:
        why = f"not JSON that can be read ({error})"
    raise ConfigError(f"{path}, line {line}: {why}; {FILES}")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Make a dictionary of an object's members; under None a key that it has twice, which JSON's own reader drops."""
    members = dict(pairs)
    if len(members) < len(pairs):
        members[None] = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return members


# ----------------------------------------------------------------------------------------------------------------------
# Forms of a row


def _to_learn(row: Any, labelled: bool = False) -> list[dict]:
    """Turn a row of any form into those that are learned, one for each reply. Raises ConfigError."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ConfigError(f"a row cannot be {_kind(row)}; {KNOWN}")
    row = _members(row, "the row")
    for key in UNSUPPORTED:
        if row.get(key) not in NOTHING:
            raise ConfigError(f'rows with "{key}" cannot be learned here: leave them out of the file')
    form = next((form for form in FORMS if row.keys() >= set(form)), None)
    if form is None:
        raise ConfigError(f"a row with the keys {', '.join(map(repr, row)) or '(none)'} is of no known form; {KNOWN}")
    said = [] if form == ("data",) else _said(row, form)
    repeated = [message["content"] for message, _ in said]  # "prompt" in the Zephyr data, beside "messages"
    for key in SPOKEN:
        if key not in form + FORMS[form] and row.get(key) not in (*NOTHING, *repeated):
            raise ConfigError(f'the row has both "{form[0]}" and "{key}", which belong to different forms; {KNOWN}')
    for key in PREFERENCE:
        if row.get(key) not in NOTHING and not (labelled and key == "label"):
            raise ConfigError(
                f'"{key}" is of preference data: leave bad replies out of the file, and "{key}" out of every row'
            )
    for key in THOUGHTS:
        thought = row.get(key)
        shown = isinstance(thought, str) and any(thought.strip() in text for text in repeated)
        if thought not in NOTHING and not shown:
            raise ConfigError(f'the row has "{key}", which would be lost: write it into the reply, or leave it out')
    if form == ("data",):
        return _episode(row["data"])
    system = [key for key in SYSTEM if row.get(key) not in NOTHING]
    rows = _replies([({"role": "system", "content": _text(row[key], f'"{key}"')}, False) for key in system] + said)
    return [one | {"label": row["label"]} for one in rows] if labelled and "label" in row else rows


def _episode(steps: Any) -> list[dict]:
    """Turn an episode's steps, each a row, into the rows that are learned. Raises ConfigError."""
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f'"data" is not a list of rows, or an empty one; {KNOWN}')
    rows = []
    for number, step in enumerate(steps, 1):
        try:
            rows += _to_learn(step)
        except ConfigError as error:
            raise ConfigError(f"step {number}: {error}") from None
    return rows


def _replies(said: Said) -> list[dict]:
    """Make a row of each reply that is to be learned. Raises ConfigError for an order in which nobody talks."""
    messages, roles = [message for message, _ in said], [message["role"] for message, _ in said]
    if "system" in roles[1:]:
        raise ConfigError("a system's message stands elsewhere than first, or there are two")
    if "assistant" not in roles:
        raise ConfigError("there is no assistant's message to learn")
    if roles[roles[0] == "system"] == "assistant":
        raise ConfigError("the assistant speaks first, before any user's message: there is no prompt to learn it after")
    if roles[-1] != "assistant":
        raise ConfigError("the last message is a user's that nobody answers: leave it out of the file")
    rows = [
        {"prompt": messages[:index], "response": message["content"]}
        for index, (message, learned) in enumerate(said)
        if learned
    ]
    if not rows:
        raise ConfigError("weight, loss or form leave out every message of the assistant: there is nothing to learn")
    return rows


def _said(row: dict, form: tuple[str, ...]) -> Said:
    """List the messages of a row, but for a "system" beside them. Raises ConfigError."""
    if form in (("messages",), ("conversations",)):
        return _messages(row[form[0]], f'"{form[0]}"')
    if form == ("instruction", "output"):
        asked = [_text(row[key], f'"{key}"') for key in ("instruction", "input") if row.get(key) not in NOTHING]
        turns = row.get("history", [])
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise ConfigError('"history" is not a list of [question, answer]')
        history = [_exchange(*turn, 'a question in "history"', 'an answer in "history"') for turn in turns]
        return sum(history, []) + _exchange("\n".join(asked), row["output"], '"instruction"', '"output"')
    prompt, reply = (row[key] for key in form)
    names = [f'"{key}"' for key in form]
    if isinstance(prompt, str) and isinstance(reply, str):
        return _exchange(prompt, reply, *names)
    before = _messages(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], names[0])
    after = _messages(reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}], names[1])
    return [(message, False) for message, _ in before] + after


def _exchange(question: Any, answer: Any, *names: str) -> Said:
    """Make the two messages of a question and its answer, neither of them empty. Raises ConfigError."""
    texts = [_text(text, name) for text, name in zip((question, answer), names, strict=True)]
    for text, name in zip(texts, names, strict=True):
        if not text.strip():
            raise ConfigError(f"{name} is empty")
    return [({"role": "user", "content": texts[0]}, False), ({"role": "assistant", "content": texts[1]}, True)]


def _messages(found: Any, name: str) -> Said:
    """Read a list of messages. Raises ConfigError."""
    if not isinstance(found, list):
        raise ConfigError(f"{name} is {_kind(found)}, not a list of messages")
    if not found:
        raise ConfigError(f"{name} is empty: there are no messages")
    return [_message(one, f"message {number}") for number, one in enumerate(found, 1)]


def _message(found: Any, what: str) -> tuple[dict, bool]:
    """Read a message, as the chat format wants it, and whether it is to be learned. Raises ConfigError."""
    members = _members(found, what)
    said_by, said = ("role", "content") if "role" in members else ("from", "value")
    if said_by not in members:
        raise ConfigError(f'{what} has neither "role" and "content" nor "from" and "value"')
    name = members[said_by]
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise ConfigError(f'{what} has "{said_by}": {reprlib.repr(name)}, and roles are {", ".join(ROLES)}')
    for key, value in members.items():
        if key not in (said_by, said, "weight", "loss", "id", "timestamp") and value not in NOTHING:
            raise ConfigError(f'{what} has "{key}", which cannot be learned: all that it says must be in its "{said}"')
    flags = [members[key] for key in ("weight", "loss") if key in members]
    if any(flag not in (0, 1) for flag in flags):
        raise ConfigError(f'{what}: "weight" is 0 or 1, "loss" false or true, and nothing between')
    if role != "assistant" and any(flags):
        raise ConfigError(f"{what}: weight or loss would have a {role}'s message learned, and only the assistant's are")
    text = _text(members.get(said), what)
    if role == "assistant" and not text.strip():
        raise ConfigError(f"{what}, the assistant's, is empty")
    return {"role": role, "content": text}, role == "assistant" and all(flags)


def _text(found: Any, what: str) -> str:
    """Read a text, or parts of text. Raises ConfigError."""
    if isinstance(found, list):
        parts = [_members(part, f"a part of {what}") for part in found]
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ConfigError(f"{what} has a part of type {reprlib.repr(part.get('type'))} and not of text alone")
        found = "".join(part["text"] for part in parts)
    if not isinstance(found, str):
        raise ConfigError(f"{what} is {_kind(found)}, not text")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} holds half a character (a lone surrogate, \\ud800 to \\udfff)") from None
    return found


def _members(found: Any, what: str) -> dict:
    """Return an object's members that are not null. Raises ConfigError."""
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is {_kind(found)}, not an object")
    if None in found:
        raise ConfigError(f'{what} has the key "{found[None]}" twice')
    return {key: value for key, value in found.items() if value is not None}


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "null")

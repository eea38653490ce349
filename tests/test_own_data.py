"""People's own chats for the cold start (sft.data): the forms read, what is refused, what is trained on."""

import codecs
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import toy_environment

import config as configuration
import sft_data
import train_sft
from chat import ChatFormat
from chat_rows import read_rows
from checkpoint import resume
from config import Config, ConfigError, EnvConfig, ModelConfig, SFTConfig
from model import load_model
from model_files import load_chat, load_tokenizer
from sft_data import rows_file

BASE = str(tiny.ROOT / "assets" / "base")


def say(*turns: str) -> list[dict]:
    """Messages: "s: Be brief." is the system's, u the user's, a the assistant's; "A: ..." is not to be learned."""
    names = {"s": "system", "u": "user", "a": "assistant", "A": "assistant"}
    return [{"role": names[turn[0]], "content": turn[3:]} for turn in turns]


def learned(*turns: str) -> list[dict]:
    """The rows that are to be made of such turns."""
    return [{"prompt": say(*turns[:index]), "response": turn[3:]} for index, turn in enumerate(turns) if turn[0] == "a"]


def human(*turns: str) -> list[dict]:
    """Messages as ShareGPT has them."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[one["role"]], "value": one["content"]} for one in say(*turns)]


LONG = ("s: Be brief.", "u: Where is the mug?", "a: On the desk.", "u: And the pen?", "a: In drawer 1.")
SHORT = ("u: Where is the mug?", "a: On the desk.")
USER, ASSISTANT = say(*SHORT)
PARTS = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the mug?", "image_url": None}]
FORMS = {  # what a row is, and the turns that are in it
    "one exchange": ({"messages": say(*SHORT)}, SHORT),
    "system and turns": ({"messages": say(*LONG)}, LONG),
    "metadata": (
        {"id": 7, "source": "web", "category": "qa", "tools": None, "images": [], "messages": say(*SHORT)}, SHORT
    ),
    "bare list": (say(*LONG), LONG),
    "system beside": ({"system": "Be brief.", "messages": say(*LONG[1:])}, LONG),
    "no system beside": ({"system": "", "system_prompt": None, "messages": say(*SHORT)}, SHORT),
    "prompt repeated": ({"prompt": SHORT[0][3:], "prompt_id": "0c", "messages": say(*SHORT)}, SHORT),
    "parts": ({"messages": [{"role": "user", "content": PARTS}, ASSISTANT]}, SHORT),
    "empty members": (
        {"messages": [USER, ASSISTANT | {"tool_calls": [], "id": "m2"}]},
        SHORT,
    ),
    "two of a role in turn": (
        {"messages": say("u: Hello.", "u: Anyone?", "a: Yes.", "a: What is it?")},
        ("u: Hello.", "u: Anyone?", "a: Yes.", "a: What is it?"),
    ),
    "nothing observed": (
        {"messages": say("u: Look.", "a: look", "u: ", "a: go")}, ("u: Look.", "a: look", "u: ", "a: go")
    ),
    "weight 0": (
        {"messages": [*say("u: Hello."), {"role": "assistant", "content": "Hm.", "weight": 0}, *say("u: Well?"),
                      {"role": "assistant", "content": "Hello.", "weight": 1}]},
        ("u: Hello.", "A: Hm.", "u: Well?", "a: Hello."),
    ),
    "AgentGym": (
        {"item_id": "t_1", "conversations": [
            {"from": "human", "loss": None, "value": "Play."}, {"from": "gpt", "loss": False, "value": "OK."},
            {"from": "human", "loss": None, "value": "A hall."}, {"from": "gpt", "loss": True, "value": "look"}]},
        ("u: Play.", "A: OK.", "u: A hall.", "a: look"),
    ),
    "ShareGPT": ({"id": "x", "conversations": human(*LONG)}, LONG),
    "ShareGPT's system": ({"conversations": human(*LONG[1:]), "system": "Be brief."}, LONG),
    "OpenHermes": ({"system_prompt": "Be brief.", "idx": 3, "conversations": human(*LONG[1:])}, LONG),
    "conversations of roles": ({"conversations": say(*LONG)}, LONG),
    "names": (
        {"conversations": [{"from": name, "value": text} for name, text in
                           (("user", "1"), ("chatgpt", "2"), ("human", "3"), ("bard", "4"), ("user", "5"),
                            ("model", "6"), ("user", "7"), ("assistant", "8"))]},
        ("u: 1", "a: 2", "u: 3", "a: 4", "u: 5", "a: 6", "u: 7", "a: 8"),
    ),
    "Alpaca": (
        {"instruction": "Where is", "input": "the mug?", "output": "On the desk."}, ("u: Where is\nthe mug?", SHORT[1])
    ),
    "Alpaca, no input": ({"instruction": "Where is the mug?", "output": "On the desk."}, SHORT),
    "Alpaca, empty input": (
        {"instruction": "Where is the mug?", "input": "", "output": "On the desk.", "text": "all"}, SHORT
    ),
    "Alpaca, only input": ({"instruction": "", "input": "Where is the mug?", "output": "On the desk."}, SHORT),
    "Alpaca, history": (
        {"instruction": "And the pen?", "input": "", "output": "In drawer 1.", "system": "Be brief.",
         "history": [["Where is the mug?", "On the desk."]]},
        LONG,
    ),
    "Alpaca, no history": (
        {"instruction": "Where is the mug?", "output": "On the desk.", "history": [], "system": ""}, SHORT
    ),
    "texts": ({"prompt": "Where is the mug?", "completion": "On the desk."}, SHORT),
    "texts, response": ({"prompt": "Where is the mug?", "response": "On the desk.", "system": ""}, SHORT),
    "prompt and completion": (
        {"prompt": say(*LONG[:4]), "completion": say(LONG[4])}, (LONG[0], LONG[1], "A: On the desk.", LONG[3], LONG[4])
    ),
    "a thought that the reply holds": (
        {"prompt": "Where is the mug?", "response": "<think>Hm.</think>There.", "reasoning": "Hm.\n", "thinking": ""},
        (SHORT[0], "a: <think>Hm.</think>There."),
    ),
    "messages and a text": ({"prompt": say(SHORT[0]), "response": "On the desk."}, SHORT),
    "a text and messages": ({"prompt": "Where is the mug?", "completion": say(SHORT[1])}, SHORT),
}  # fmt: skip


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Forms


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_whole(name: str, tmp_path: Path) -> None:
    """As a line and in a list, each time in the middle of others."""
    row, turns = FORMS[name]
    other = {"messages": say("u: a", "a: b")}
    expected = learned("u: a", "a: b") + learned(*turns) + learned("u: a", "a: b")
    assert read_rows(write(tmp_path / "rows.jsonl", other, row, other)) == expected
    assert read_rows(write(tmp_path / "rows.json", [other, row, other])) == expected
    alone = tmp_path / "row.json"
    alone.write_text(json.dumps(row, indent=2))
    assert read_rows(alone) == learned(*turns)


def test_an_episode_as_rlvmr_writes_it(tmp_path: Path) -> None:
    steps = [{"step": n, "obs": f"o{n}", "prompt": f"p{n}", "response": f"<planning>{n}</planning>\n"} for n in (1, 2)]
    path = tmp_path / "alfworld_cold-start.json"
    path.write_text(json.dumps([{"task": "t", "done": "True", "data": steps}] * 2, indent=4, ensure_ascii=False))
    rows = learned("u: p1", "a: <planning>1</planning>\n") + learned("u: p2", "a: <planning>2</planning>\n")
    assert read_rows(path) == rows * 2


def test_a_label_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row_of(USER, ASSISTANT, label=0), row_of(USER, ASSISTANT))
    assert read_rows(path, labelled=True) == [learned(*SHORT)[0] | {"label": 0}, *learned(*SHORT)]
    with pytest.raises(ConfigError, match=r'line 1: "label" is of preference data'):
        read_rows(path)


def lines_of(text: str) -> bytes:
    rows = [{"messages": say(f"u: {text}", f"a: {n}")} for n in (1, 2)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    "content",
    [
        lines_of("é"),
        codecs.BOM_UTF8 + lines_of("é"),
        lines_of("é").replace(b"\n", b"\r\n"),
        b"\n  \n" + lines_of("é").replace(b"\n", b"\n\n \n"),
        lines_of("é").rstrip(),
        b"[" + b",\n".join(lines_of("é").splitlines()) + b"]",
        b"[\n" + b",\n".join(lines_of("é").splitlines()) + b"\n]\n",
        codecs.BOM_UTF8 + b"[" + b",".join(lines_of("é").splitlines()) + b"]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows"])
def test_a_file_is_told_by_its_content(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name) == learned("u: é", "a: 1") + learned("u: é", "a: 2")


def test_characters_that_only_look_like_the_end_of_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0bd"
    (tmp_path / "rows.jsonl").write_bytes(lines_of(text))
    assert [row["prompt"][0]["content"] for row in read_rows(tmp_path / "rows.jsonl")] == [text] * 2


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def row_of(*messages: dict, **more: object) -> dict:
    return {"messages": list(messages), **more}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED = [  # a row, and what is said of it
    ({"text": "a", "url": "b"}, r"the keys 'text', 'url' is of no known form; known are .*Alpaca"),
    ({}, r"the keys \(none\) is of no known form; known are"),
    ({"question": "a", "answer": "b"}, r"'question', 'answer' is of no known form"),
    ({"instruction": "a", "chosen": "b", "rejected": "c"}, r"'instruction', 'chosen', 'rejected' is of no known form"),
    ({"instruction": "a", "output": None}, r"'instruction' is of no known form"),
    ({"prompt": "a", "extra_info": {"answer": "b"}}, r"'prompt', 'extra_info' is of no known form"),
    (7, r"a row cannot be a number; known are rows with"),
    (None, r"a row cannot be null"),
    ("messages", r"a row cannot be text"),
    ([], r'"messages" is empty: there are no messages'),
    (row_of(), r'"messages" is empty: there are no messages'),
    ({"messages": "Hello."}, r'"messages" is text, not a list of messages'),
    ({"messages": {"role": ["user"]}}, r'"messages" is an object, not a list of messages'),
    (["a", "b"], r"message 1 is text, not an object"),
    (row_of(USER, {"content": "a"}), r'message 2 has neither "role" and "content" nor "from" and "value"'),
    ([{"human": "a", "assistant": "b"}], r'message 1 has neither "role"'),
    (row_of(USER, {"role": "tool", "content": "a"}), r"\"role\": 'tool', and roles are system, user, human,"),
    (row_of({"role": "developer", "content": "a"}, USER, ASSISTANT), r"message 1 has \"role\": 'developer'"),
    (row_of({"role": "User", "content": "a"}, ASSISTANT), r"message 1 has \"role\": 'User'"),
    (row_of({"role": ["user"], "content": "a"}, ASSISTANT), r"message 1 has \"role\": \['user'\]"),
    ({"conversations": [*human(*SHORT), {"from": "observation", "value": "a"}]}, r"\"from\": 'observation'"),
    ({"conversations": [*human(*SHORT), {"from": "function_call", "value": "a"}]}, r"\"from\": 'function_call'"),
    (row_of(USER, CALL), r'message 2 has "tool_calls", which cannot be learned'),
    (row_of(USER, ASSISTANT | {"function_call": {"name": "a"}}), r'message 2 has "function_call"'),
    (row_of(USER, ASSISTANT | {"reasoning_content": "Hm."}), r'message 2 has "reasoning_content", .* in its "content"'),
    (row_of(USER | {"images": ["a.png"]}, ASSISTANT), r'message 1 has "images"'),
    (row_of(USER, ASSISTANT | {"from": "gpt"}), r'message 2 has "from"'),
    (row_of(USER, ASSISTANT | {"train": False}), r'message 2 has "train"'),
    (row_of(USER, ASSISTANT, tools=[{"name": "look"}]), r'rows with "tools" cannot be learned here'),
    (row_of(USER, ASSISTANT, functions=[{"name": "look"}]), r'rows with "functions" cannot be learned here'),
    (row_of(USER, ASSISTANT, images=["a.png"]), r'rows with "images" cannot be learned here'),
    ({"instruction": "a", "output": "b", "image": "a.png"}, r'rows with "image" cannot be learned here'),
    (row_of({"role": "user", "content": [*PARTS, IMAGE]}, ASSISTANT), r"message 1 has a part of type 'image_url'"),
    (row_of({"role": "user", "content": ["a"]}, ASSISTANT), r"a part of message 1 is text, not an object"),
    (row_of({"role": "user", "content": [{"type": "text"}]}, ASSISTANT), r"a part of type 'text' and not of text"),
    (row_of({"role": "user", "content": [{"text": "a"}]}, ASSISTANT), r"message 1 has a part of type None"),
    (row_of({"role": "user", "content": 5}, ASSISTANT), r"message 1 is a number, not text"),
    (row_of({"role": "user", "content": None}, ASSISTANT), r"message 1 is null, not text"),
    (row_of({"role": "user"}, ASSISTANT), r"message 1 is null, not text"),
    (row_of({"role": "user", "value": "a"}, ASSISTANT), r'message 1 has "value", which cannot be learned'),
    (row_of({"role": "user", "content": {"text": "a"}}, ASSISTANT), r"message 1 is an object, not text"),
    (row_of({"role": "user", "content": "\ud83d"}, ASSISTANT), r"message 1 holds half a character"),
    (row_of(USER, {"role": "assistant", "content": ""}), r"message 2, the assistant's, is empty"),
    (row_of(USER, {"role": "assistant", "content": " \n"}, USER, ASSISTANT), r"message 2, the assistant's, is empty"),
    (row_of(USER, {"role": "assistant", "content": []}), r"message 2, the assistant's, is empty"),
    (row_of(USER), r"there is no assistant's message to learn"),
    (row_of(*say("s: Be brief.")), r"there is no assistant's message to learn"),
    (row_of(*say("s: Be brief.", "u: a")), r"there is no assistant's message to learn"),
    (row_of(USER, ASSISTANT, USER), r"the last message is a user's that nobody answers"),
    (row_of(ASSISTANT), r"the assistant speaks first"),
    (row_of(ASSISTANT, USER, ASSISTANT), r"the assistant speaks first"),
    (row_of(*say("s: Be brief.", "a: Hello.", "u: a", "a: b")), r"the assistant speaks first"),
    (row_of(USER, *say("s: Be brief."), ASSISTANT), r"a system's message stands elsewhere than first"),
    (row_of(*say("s: a", "s: b", "u: c", "a: d")), r"a system's message stands elsewhere than first, or there are two"),
    (row_of(*say("s: a", "u: c", "a: d"), system="b"), r"a system's message stands elsewhere"),
    (row_of(USER, ASSISTANT, system=["b"]), r'a part of "system" is text, not an object'),
    (row_of(USER, ASSISTANT | {"weight": 0}), r"leave out every message of the assistant"),
    (row_of(USER, ASSISTANT | {"weight": 0.5}), r'message 2: "weight" is 0 or 1'),
    (row_of(USER, ASSISTANT | {"loss": "no"}), r'message 2: "weight" is 0 or 1, "loss" false or true'),
    (row_of(USER | {"weight": 1}, ASSISTANT), r"message 1: weight or loss would have a user's message learned"),
    (row_of(USER, ASSISTANT, weight=0.1), r'rows with "weight" cannot be learned here'),
    (row_of(USER, ASSISTANT, label=False), r'"label" is of preference data: leave bad replies out'),
    ({"prompt": "a", "completion": "b", "label": 0}, r'"label" is of preference data'),
    ({"prompt": "a", "completion": "b", "label": 0.5}, r'"label" is of preference data'),
    (row_of(USER, ASSISTANT, label="bad"), r'"label" is of preference data'),
    ({"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"}, r'"chosen" is of preference data'),
    (row_of(USER, ASSISTANT, rejected=say("u: a", "a: c")), r'"rejected" is of preference data'),
    ({"prompt": "a", "response": "b", "reasoning_content": "Hm."}, r'has "reasoning_content", which would be lost'),
    ({"prompt": "a", "response": "b", "thinking": "Hm."}, r'has "thinking", which would be lost: write it into'),
    ({"prompt": "a", "completion": "b", "reasoning": ["Hm."]}, r'has "reasoning", which would be lost'),
    ({"instruction": "a", "output": "b", "rationale": "Hm."}, r'has "rationale", which would be lost'),
    ({"data": [{"prompt": "a", "response": "b", "thought": "Hm."}]}, r'step 1: the row has "thought"'),
    ({"data": [{"prompt": "a", "response": "b"}], "thinking": "Hm."}, r'the row has "thinking"'),
    (row_of(USER, ASSISTANT, conversations=human(*SHORT)), r'both "messages" and "conversations"'),
    (row_of(USER, ASSISTANT, instruction="a", output="b"), r'both "messages" and "instruction", .*; known are'),
    (row_of(USER, ASSISTANT, completion="b"), r'both "messages" and "completion"'),
    ({"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}, r'both "instruction" and "prompt"'),
    ({"prompt": "a", "completion": "b", "response": "c"}, r'both "prompt" and "response"'),
    ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, r'both "prompt" and "history"'),
    ({"instruction": "a", "output": ""}, r'"output" is empty'),
    ({"instruction": "", "input": "", "output": "b"}, r'"instruction" is empty'),
    ({"instruction": "a", "input": ["b"], "output": "c"}, r'a part of "input" is text, not an object'),
    ({"instruction": "a", "input": 3, "output": "c"}, r'"input" is a number, not text'),
    ({"instruction": "a", "output": {"b": 1}}, r'"output" is an object, not text'),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, r'"history" is not a list of \[question, answer\]'),
    ({"instruction": "a", "output": "b", "history": "c"}, r'"history" is not a list of \[question, answer\]'),
    ({"instruction": "a", "output": "b", "history": [["c", ""]]}, r'an answer in "history" is empty'),
    ({"prompt": "", "completion": "b"}, r'"prompt" is empty'),
    ({"prompt": "a", "completion": " "}, r'"completion" is empty'),
    ({"prompt": "a", "response": 5}, r"message 1 is a number, not text"),
    ({"prompt": [], "completion": "b"}, r'"prompt" is empty: there are no messages'),
    ({"prompt": say("s: Be brief."), "completion": "b"}, r"the assistant speaks first"),
    ({"prompt": "a", "completion": say("u: b")}, r"there is no assistant's message to learn"),
    ({"data": []}, r'"data" is not a list of rows, or an empty one; known are'),
    ({"data": [{"prompt": "a", "response": "b"}, {"prompt": "a"}]}, r"step 2: a row with the keys 'prompt' is of no"),
    ({"data": [{"prompt": "a", "response": "b"}], "system": "c"}, r'both "data" and "system"'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_would_be_lost_is_an_error_in_one_line(row: object, message: str, tmp_path: Path) -> None:
    good = {"messages": say(*SHORT)}
    lines = write(tmp_path / "rows.jsonl", good, good, row, good, {"bad": "too"})
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(lines))}, line 3: [^\n]*{message}[^\n]*\Z"):
        read_rows(lines)
    listed = write(tmp_path / "rows.json", [good, row, good])
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(listed))}, row 2: [^\n]*{message}[^\n]*\Z"):
        read_rows(listed)


GOOD = json.dumps({"messages": say(*SHORT)})
PRETTY = json.dumps([{"messages": say(*SHORT)}] * 3, indent=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows is empty; rows are JSON in UTF-8, one a line, or one list of them"),
        (b"\n \r\n", "rows is empty"),
        (b"[]", "rows has no rows"),
        (b"{", r"line 1: not JSON \("),
        (f"{GOOD}\n{GOOD[:-9]}\n{GOOD}\n", r"line 2: not JSON \(.*; rows are JSON in UTF-8, one a line"),
        (f"{GOOD[:-9]}\n{GOOD}\n", r"line 1: not JSON \("),
        (f"{GOOD[:40]}\n{GOOD}\n", r"line 1: not JSON \("),
        (f"{GOOD}\n\n{GOOD} {GOOD}\n", r"line 3: not JSON \(Extra data, column"),
        (f"{GOOD}\n{GOOD},\n", r"line 2: not JSON \(Extra data"),
        (PRETTY[:-30], r"line \d\d: not JSON \("),
        (PRETTY.replace('"user"', "user", 1), r"line 5: not JSON \(Expecting value, column 13"),
        (b"prompt,completion\na,b\n", r"line 1: not JSON \("),
        (b"// rows\n{messages: []}\n", r"line 1: not JSON \("),
        (f"{GOOD}\n{{'messages': []}}\n", r"line 2: not JSON \("),
        (b"PAR1\x15\x04\x15\xff\xfe", "line 1: not text in UTF-8"),
        (GOOD.encode("utf-16"), "line 1: not text in UTF-8"),
        (f"{GOOD}\n".encode() + '{"messages": "é"}'.encode("latin-1"), "line 2: not text in UTF-8"),
        (f"[{GOOD},\n".encode() + '{"messages": "é"}]'.encode("latin-1"), "line 2: not text in UTF-8"),
        ("[" * 100_000, r"line 1: not JSON that can be read \("),
        (f"{GOOD}\n" + '{"n": ' + "1" * 5000 + "}", r"line 2: not JSON that can be read \("),
        (f"{GOOD}\n" + GOOD[:-1] + ', "messages": []}', 'line 2: the row has the key "messages" twice'),
        (f"[{GOOD}, {GOOD[:-3]}, \"role\": \"user\"}}]}}]", 'row 2: message 2 has the key "role" twice'),
        (json.dumps(say(*SHORT, "u: b")), "line 1: the last message is a user's"),
        (f'{{"version": 1, "rows": [{GOOD}]}}', "line 1: a row with the keys 'version', 'rows' is of no known form"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_rows_is_an_error_in_one_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"^[^\n]*{message}[^\n]*\Z"):
        read_rows(path)


# ---------------------------------------------------------------------------------------------------------------------
# What the model can take


def config_of(data: Path | str = "", template: Path | str = "", **sft) -> Config:
    model = ModelConfig(path=BASE, chat_template=str(template))
    sft = SFTConfig(data=str(data), **sft)
    return Config(device="cpu", model=model, env=EnvConfig(name="toy_environment"), sft=sft)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, for a process group of this process."""
    monkeypatch.chdir(tmp_path)
    tiny.join()
    return tmp_path


TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
HIDE = "{% if m['role'] != 'system' %}" + TURN + "{% endif %}"


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (NO_SYSTEM + TURN, LONG, "cannot show these messages: System role not supported"),
        (ALTERNATE + TURN, ("u: a", "u: b", "a: c"), "cannot show these messages: roles must alternate"),
        (HIDE, LONG, "does not show what the system says"),
        (TURN, ("u: <|im_start|>user\nHello.<|im_end|>", "a: b"), r"what the user says holds <\|im_(start|end)\|>"),
        (TURN, ("u: a", "a: b<|im_end|>"), r"what the assistant says holds <\|im_end\|>"),
        (TURN, ("u: a", "a:" + " mug" * 4096), r"\d+ tokens, and .* knows 4096 positions"),
        (TURN, ("u: a", "a: b", "u:" + " mug" * 4096, "a: c"), r"\d+ tokens, and .* knows 4096 positions"),
    ],
)
def test_a_row_that_the_model_cannot_take_is_named(template: str, turns: tuple, message: str, there: Path) -> None:
    """When the rows are read, before any training; where another row has its place the file is read."""
    (there / "chat.jinja").write_text("{% for m in messages %}" + template + "{% endfor %}" + OPEN)
    good = {"messages": say("u: a", "a: b", "u: c", "a: d")}
    config = config_of(write(there / "rows.jsonl", good, {"messages": say(*turns)}), there / "chat.jinja")
    with pytest.raises(ConfigError, match=rf"^[^\n]*rows\.jsonl, line 2: [^\n]*{message}[^\n]*\Z"):
        train_sft.load_rows(config)
    write(there / "rows.jsonl", good, good)
    assert train_sft.load_rows(config) == learned("u: a", "a: b", "u: c", "a: d") * 2


@pytest.mark.parametrize("reply", ["On the desk.", "<planning>a</planning><action>look</action>", "<think>Hm."])
def test_a_reply_that_leaves_the_thought_open_is_named(reply: str, there: Path) -> None:
    """Of a template that opens it; those that close it are learned with the tag once."""
    (there / "chat.jinja").write_text("{% for m in messages %}" + TURN + "{% endfor %}" + OPEN.replace(
        "assistant\n", "assistant\n<think>\n"))  # fmt: skip
    good = {"messages": say("u: a", "a: \n<think>Hm.</think>b")}
    config = config_of(write(there / "rows.jsonl", good, {"prompt": "a", "response": reply}), there / "chat.jinja")
    with pytest.raises(ConfigError, match=r"^[^\n]*rows\.jsonl, line 2: [^\n]* opens a thought \(<think>\), [^\n]*\Z"):
        train_sft.load_rows(config)
    write(there / "rows.jsonl", good)
    (row,) = train_sft.load_rows(config)
    sample, _ = train_sft.tokenise(load_model(config), row, 0.0)
    chat = load_chat(BASE, config)
    assert chat.tokenizer.decode(sample.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert chat.tokenizer.decode(sample.response_ids) == "Hm.</think>b<|im_end|>"


def test_a_row_may_fill_every_position(there: Path) -> None:
    config = config_of(there / "rows.jsonl")
    chat = ChatFormat(load_tokenizer(BASE, config))
    room = 4096 - len(chat.encode("Where?")) - len(chat.encode_reply(""))
    assert len(chat.encode_reply(" mug" * room)) == room + 1
    write(there / "rows.jsonl", {"prompt": "Where?", "completion": " mug" * room})
    train_sft.load_rows(config)
    write(there / "rows.jsonl", {"prompt": "Where?", "completion": " mug" * (room + 1)})
    with pytest.raises(ConfigError, match="4097 tokens"):
        train_sft.load_rows(config)


def test_prompts_are_what_inference_will_see(there: Path) -> None:
    """Under a template that strips earlier thoughts, as Qwen3's does, each is learned and none is in a later prompt."""
    strip = (
        "{% set said = m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last "
        "else m['content'] %}<|im_start|>{{ m['role'] }}\n{{ said }}<|im_end|>\n"
    )
    (there / "chat.jinja").write_text("{% for m in messages %}" + strip + "{% endfor %}" + OPEN)
    turns = ("u: a", "a: <think>Hm.</think>b", "u: c", "a: <think>Well.</think>d")
    config = config_of(write(there / "rows.jsonl", {"messages": say(*turns)}), there / "chat.jinja")
    first, second = train_sft.load_rows(config)
    chat = ChatFormat(load_tokenizer(BASE, config))
    assert first["response"] == "<think>Hm.</think>b" and second["prompt"] == say(*turns[:3])
    shown = chat.tokenizer.decode(chat.encode(second["prompt"]))
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert shown == f"{user}a<|im_end|>\n{assistant}b<|im_end|>\n{user}c<|im_end|>\n{assistant}"


# ---------------------------------------------------------------------------------------------------------------------
# Training


def spans_to_learn(chat: ChatFormat, turns: tuple[str, ...]) -> tuple[list[int], set[int]]:
    """A whole conversation's tokens, and the places of those that are to be learned."""
    text, spans = "", []
    for turn, one in zip(turns, say(*turns), strict=True):
        text += f"<|im_start|>{one['role']}\n"
        if turn[0] == "a":
            spans.append((len(text), len(text) + len(one["content"]) + len("<|im_end|>")))
        text += f"{one['content']}<|im_end|>\n"
    assert text == chat.render(say(*turns), reply_follows=False)
    found = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(start <= a and b <= end for start, end in spans) for a, b in found["offset_mapping"]]
    return found["input_ids"], {place for place, learned in enumerate(inside) if learned}


def test_the_assistants_tokens_and_no_others_are_learned(there: Path) -> None:
    """Some updates on a file of every form: what the loss saw, against the whole conversations."""
    rows = write(there / "rows.jsonl", *(row for row, _ in FORMS.values()))
    config = dataclasses.replace(config_of(rows, epochs=1, samples_per_update=8, lr=1e-3), name="own")
    read, seen = train_sft.load_rows(config), []
    model = load_model(config)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}

    def watch(model, batch, config):
        seen.extend(batch)
        return train_sft.imitate(model, batch, config)

    train_sft.train(model, read, config, resume(config, rows=map(json.dumps, read)), watch)
    assert len(seen) == len(read) == sum(turn[0] == "a" for _, turns in FORMS.values() for turn in turns)
    for _, turns in FORMS.values():
        ids, expected = spans_to_learn(model.chat, turns)
        places = []
        for one in learned(*turns):
            row, sample, weight_T = seen.pop(next(index for index, (row, *_) in enumerate(seen) if row == one))
            whole = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
            assert whole == ids[: len(whole)] and (weight_T == 1).all()
            places += range(len(sample.prompt_ids), len(whole))
        assert sorted(places) == sorted(expected)
    assert not seen and tiny.distance(before, model.model.state_dict()) > 0
    assert tiny.metrics_of(there / "runs" / "own")[-1]["train/nll_per_token"] > 0
    assert (there / "runs" / "own" / "checkpoints" / "latest" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Critics beside


def played(monkeypatch: pytest.MonkeyPatch) -> list:
    tasks: list = []

    class Game(toy_environment.Lighthouse):
        def reset(self, task):
            tasks.append(task)
            return super().reset(task)

    monkeypatch.setattr(toy_environment, "make", lambda env_cfg: Game())
    return tasks


def test_critics_are_learned_beside(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the whole cold start, from a file of their own; and without them nobody plays."""
    games = played(monkeypatch)
    data = write(there / "rows.jsonl", *(row for row, _ in FORMS.values()))
    own = train_sft.load_rows(config_of(data))
    assert not games and not (there / "data").exists()
    made = {"variant": "generative", "episodes": 40, "judge_examples": 10}
    rows = train_sft.load_rows(config_of(data, **made))
    assert len(games) < 40 and [file.name.split("-")[0] for file in (there / "data" / "sft").iterdir()] == ["judged"]
    whole = train_sft.load_rows(config_of(**made))
    assert rows == own + whole[-10:] and len(whole) > 50
    assert all(row["prompt"][0]["content"].startswith("Role:") for row in rows[-10:])
    assert train_sft.load_rows(config_of(data, **made)) == rows


def test_two_processes_make_the_same_file_at_once(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(variant="generative", episodes=20, judge_examples=2)
    rows = list(sft_data.make_rows(config))

    def while_another_does(config: Config):
        for number, row in enumerate(rows):
            if number == 3:
                with monkeypatch.context() as other:
                    other.setattr(os, "getpid", lambda: 1)
                    assert len(read_rows(rows_file(config))) == len(rows)
            yield row

    path = rows_file(config, make=while_another_does)
    assert [json.loads(line) for line in path.open()] == rows and list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sft_data.py", *map(str, arguments)])
    sft_data.main()


@pytest.fixture
def mine(there: Path) -> Path:
    path = there / "mine.yaml"
    sft = "{variant: generative, episodes: 20, judge_examples: 6, guided: 0.3}"
    path.write_text(f"model: {{path: {BASE}}}\nenv: {{name: toy_environment, max_steps: 6}}\nsft: {sft}\n")
    return path


@pytest.mark.parametrize("variant", ["vanilla", "generative"])
def test_ours_are_written_in_the_same_form(
    variant: str, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command(monkeypatch, mine, "--out", "mine/rows.jsonl", "--set", f"sft.variant={variant}")
    rows = train_sft.load_rows(configuration.load(mine, [f"sft.variant={variant}"]))
    said = f"mine/rows.jsonl: {len(rows)} rows, to be learned with sft.data=mine/rows.jsonl sft.variant=vanilla\n"
    assert capsys.readouterr().out == said and [file.name for file in Path("mine").iterdir()] == ["rows.jsonl"]
    assert all(list(json.loads(line)) == ["messages"] for line in open("mine/rows.jsonl"))
    assert train_sft.load_rows(configuration.load(mine, ["sft.data=mine/rows.jsonl", "sft.variant=vanilla"])) == rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sft.data=rows.jsonl"], "sft.data=rows.jsonl has its rows already"),
        (["sft.noise=0.1"], "toy_environment has no TEMPLATES.slip"),
        (["env.task_types=[sing]"], "unknown task type 'sing'"),
    ],
)
def test_what_cannot_be_written(settings: list[str], message: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=message):
        command(monkeypatch, mine, "--out", "rows.jsonl", "--set", *settings)
    assert not Path("rows.jsonl").exists()


def test_a_file_is_not_written_over(mine: Path) -> None:
    (mine.parent / "rows.jsonl").write_text("mine")
    call = tiny.command("sft_data.py", mine, "--out", "rows.jsonl")
    done = subprocess.run(call, cwd=mine.parent, env=tiny.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "error: --out rows.jsonl exists: name another file, or delete it\n"
    assert (mine.parent / "rows.jsonl").read_text() == "mine"

"""teacher.py against an HTTP server that misbehaves on demand, and against vLLM's own OpenAI-compatible server."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch

import config as configuration
import envs
import judge
import prompts
import sft_data
import train_rl
import train_sft
from config import Config, ConfigError, EnvConfig, JudgeConfig
from paper import behaviour
from rollout import Episode, Step
from teacher import PATIENCE, Teacher

KEY = "sk-secret-of-the-test-0123456789"
GOOD = "<think>t</think><answer>\\boxed{1}</answer><advise>Go on.</advise>"


class FaultyServer(ThreadingHTTPServer):
    """`faults` are what the next requests meet, one each; after them `answer(question, number)` is what is said."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list = []
        self.answer = lambda question, number: GOOD
        self.lock, self.requests, self.in_flight, self.most = threading.Lock(), [], 0, 0
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        pass  # clients that gave up


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.headers["Authorization"], body))
            fault = server.faults.pop(0) if server.faults else None
            number = len(server.requests)
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
        try:
            time.sleep(server.pause)
            self.respond(fault, body, number)
        finally:
            with server.lock:
                server.in_flight -= 1

    def respond(self, fault, body, number: int) -> None:
        reason, text, status = "stop", self.server.answer(body["messages"][0]["content"], number), 200
        if isinstance(fault, int):
            status, text = fault, f"no: {self.headers['Authorization']}"  # servers do echo keys
        if fault == "drop":
            return self.connection.close()
        if fault == "slow":
            time.sleep(6)
        if fault == "cut off":
            reason = "length"
        if fault == "empty":
            text = None
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        if status != 200:
            reply = {"error": {"message": text}}
        data = {"garbage": b"\xff{{<html>", "no choices": b'{"choices": []}', "list": b"[1, 2]"}.get(
            fault, json.dumps(reply).encode()
        )
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    running = FaultyServer()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


@pytest.fixture
def settings(server, tmp_path) -> JudgeConfig:
    return JudgeConfig(enabled=True, teacher="openai", base_url=server.url, model="m", key_env="TEST_KEY", retries=2,
                       timeout_s=30.0, cache=str(tmp_path / "cache"))  # fmt: skip


def nothing_holds_the_key(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert not any(KEY in text for text in texts)


@pytest.mark.parametrize("fault", [429, 500, 503, "drop", "slow"])
def test_a_passing_fault_is_retried(server, settings, fault):
    server.faults = [fault, fault]
    teacher = Teacher(dataclasses.replace(settings, timeout_s=2.0) if fault == "slow" else settings)
    assert teacher.ask(["q"]) == [[GOOD]]
    assert len(server.requests) == 3 and teacher.spent == {"requests": 1, "tokens": 100}
    assert server.requests[0][0] == f"Bearer {KEY}" and server.requests[0][1]["model"] == "m"


@pytest.mark.parametrize("fault", [400, 401, "garbage", "list", "no choices", "cut off", "empty"])
def test_what_is_no_answer_is_none_and_is_not_kept(server, settings, fault, tmp_path, recwarn):
    server.faults = [fault]
    teacher = Teacher(settings)
    assert teacher.ask(["q"]) == [[]] and teacher.spent["failed"] == 1 and len(server.requests) == 1
    assert teacher.ask(["q"]) == [[GOOD]] and len(server.requests) == 2
    nothing_holds_the_key(tmp_path, *map(str, recwarn.list), repr(vars(teacher)), repr(settings))


def test_a_dead_endpoint_costs_seconds_and_is_told(server, settings, tmp_path):
    server.faults = [401] * 99
    teacher = Teacher(dataclasses.replace(settings, concurrency=1))
    with pytest.warns(UserWarning, match="AuthenticationError") as told:
        assert teacher.ask([f"q{n}" for n in range(50)]) == [[]] * 50
    assert len(server.requests) == PATIENCE and len(told) == 1
    assert teacher.spent == {"requests": PATIENCE, "failed": PATIENCE, "not_asked": 50 - PATIENCE}
    nothing_holds_the_key(tmp_path, str(told[0].message))
    server.faults = []
    assert teacher.ask(["again"]) == [[GOOD]]  # each call tries anew
    closed = dataclasses.replace(settings, base_url="http://127.0.0.1:9/v1", retries=0, concurrency=1)
    with pytest.warns(UserWarning, match="does not answer"):
        assert Teacher(closed).ask(["q"] * 9) == [[]] * 9


def test_answers_are_asked_once_also_by_later_runs(server, settings, tmp_path):
    server.answer = lambda question, number: f"{question} {number}"
    first = Teacher(settings).ask(["a", "b"], votes=2)
    assert [len(set(answers)) for answers in first] == [2, 2] and len(server.requests) == 4
    again = Teacher(settings)
    assert again.ask(["b", "a"], votes=2) == first[::-1]
    assert again.spent == {"cached": 4} and len(server.requests) == 4
    assert len(again.ask(["a"], votes=3)[0]) == 3 and len(server.requests) == 5
    for other in ({"model": "n"}, {"teacher_temperature": 0.5}):
        Teacher(dataclasses.replace(settings, **other)).ask(["a"])
    assert len(server.requests) == 7
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{torn")
    Teacher(settings).ask(["a"])
    assert len(server.requests) == 8
    nothing_holds_the_key(tmp_path)


def test_budgets_stop_the_asking(server, settings):
    questions = [f"q{n}" for n in range(6)]
    teacher = Teacher(dataclasses.replace(settings, max_requests=3, concurrency=1))
    assert sorted(map(len, teacher.ask(questions))) == [0, 0, 0, 1, 1, 1]
    assert teacher.ask(["more"]) == [[]] and teacher.spent["not_asked"] == 4
    assert len(teacher.ask(questions[:1])[0]) == 1  # what is kept costs nothing
    tokens = Teacher(dataclasses.replace(settings, max_tokens=250, concurrency=1, model="n"))
    assert sum(map(len, tokens.ask(questions))) == 3  # 100 each: the third begins within the budget
    before = {"requests": 2, "tokens": 0}
    resumed = Teacher(dataclasses.replace(settings, max_requests=4, concurrency=1, model="o"), world=2, before=before)
    assert sum(map(len, resumed.ask(questions))) == 1  # this rank's half of what is left


def test_requests_in_flight_are_capped(server, settings):
    server.pause = 0.05
    assert len(Teacher(dataclasses.replace(settings, concurrency=3)).ask([f"q{n}" for n in range(12)])) == 12
    assert server.most == 3


@pytest.mark.parametrize(
    ("scores", "agreement", "verdict"),
    [
        ([1, 1, 1, 0, 0], "majority", 1),
        ([1, 1, 0, 0, None], "majority", None),
        ([0, 0, 0], "majority", 0),  # two did not come
        ([1, 1, 1, 1, 1], "unanimous", 1),
        ([1, 1, 1, 1, 0], "unanimous", None),
        ([1, 1, 1, 1], "unanimous", None),
        ([], "majority", None),
    ],
)
def test_votes(scores, agreement, verdict):
    assert judge.vote(scores, JudgeConfig(votes=5, agreement=agreement)) == verdict


def config_of(judge_cfg: JudgeConfig) -> Config:
    return Config(env=EnvConfig(name="alfworld"), judge=judge_cfg)


def episode(count: int) -> Episode:
    """Steps of distinct observations: the rules leave all of them open."""
    steps = [
        Step([1], [2], [0.0], f"prompt {n}", f"reply {n}", f"seen {n}", "look", True, True, 0.0) for n in range(count)
    ]
    return Episode(envs.Task("alfworld", "t", "id", "train"), 0, 0, steps)


def test_what_the_teacher_calls_good_becomes_a_positive(server, settings):
    server.answer = lambda question, number: GOOD if "reply 3" in question else GOOD.replace("1", "0")
    server.faults = ["garbage"]
    played, config = episode(6), config_of(dataclasses.replace(settings, concurrency=1))
    counts = judge.label_steps([played], config, random.Random(0), 6, Teacher(config.judge))
    assert [step.label for step in played.steps if step.label is not None] in ([1], [])  # unless 3 met the fault
    assert counts["teacher_asked"] == 6 and counts["teacher_no_verdict"] == counts["teacher_failed"] == 1
    assert counts["teacher_requests"] == 6 and counts["teacher_tokens"] == 500
    question = server.requests[-1][1]["messages"][0]["content"]
    assert question in {prompts.build_judge_prompt("alfworld", s.prompt, s.response) for s in played.steps}


def test_figure_5_labels_by_five_equal_votes_and_by_the_majority(server, settings):
    """Of three steps the second gets four good votes of five; the majority's labels cost no request more."""
    bad, said = GOOD.replace("1", "0"), Counter()

    def answer(question: str, number: int) -> str:
        step = re.search(r"reply (\d)", question)[1]
        said[step] += 1
        return bad if step == "2" or (step == "1" and said[step] == 3) else GOOD

    server.answer = answer
    voting = dataclasses.replace(settings, concurrency=1, votes=5, agreement="unanimous", questions=8)
    steps, games, labels = behaviour.teacher_verdicts([episode(3)], config_of(voting))
    by = {suffix: dict(zip((s.response for s in steps), one.tolist(), strict=True)) for suffix, one in labels.items()}
    assert by[""] == {"reply 0": 1, "reply 1": -1, "reply 2": 0}
    assert by[" by majority"] == {"reply 0": 1, "reply 1": 1, "reply 2": 0}
    assert said == {"0": 5, "1": 5, "2": 5} and games.tolist() == [0, 0, 0]


def test_guidelines_by_the_teacher_fall_back_on_the_medoid(server, settings):
    config = config_of(settings)
    advice = ["Explore places.", "Avoid repeating actions."]
    medoids = judge.distil_guidelines(advice, config.guidelines, "alfworld")
    server.answer = lambda question, number: "<think>t</think><rule>Look <b>first</b>, <|im_end|> always.</rule>"
    write = judge.guideline_writer(None, Teacher(settings), config, 0)
    guidelines = judge.distil_guidelines(advice, config.guidelines, "alfworld", write)
    assert guidelines and set(guidelines) == {prompts.plain("Look <b>first</b>, <|im_end|> always.")}
    assert "ADVICE LIST:\n- " in server.requests[0][1]["messages"][0]["content"]
    server.answer = lambda question, number: "I would rather not."
    write = judge.guideline_writer(None, Teacher(dataclasses.replace(settings, model="n")), config, 0)
    assert judge.distil_guidelines(advice, config.guidelines, "alfworld", write) == medoids


def test_a_key_is_needed_at_start(settings, small_games, monkeypatch):
    config = dataclasses.replace(tiny.rl_config(small_games), judge=settings)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ConfigError, match=r"\$TEST_KEY"):
        train_rl.preflight(config, 1)
    with pytest.raises(ConfigError, match=r"\$TEST_KEY"):
        train_sft.preflight(cold_start(settings, small_games), 1)
    monkeypatch.setenv("TEST_KEY", KEY)
    assert train_rl.preflight(config, 1)
    assert KEY not in configuration.dump(config)


def test_a_run_whose_teacher_dies_goes_on_with_the_rules(server, small_games, tmp_path):
    """Labels and guidelines by the teacher; then, resumed, it is down, and what it has cost is not forgotten."""
    server.answer = lambda question, number: "<rule>Look first.</rule>" if "ADVICE LIST" in question else GOOD
    endpoint = ["teacher=openai", f"base_url={server.url}", "key_env=TEST_KEY", "retries=0", "teacher_steps=6"]
    settings = [f"judge.{one}" for one in (*endpoint, f"cache={tmp_path / 'cache'}")]
    settings += ["guidelines.writer=teacher", "train.eval_every=0"]
    command = ["train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings]
    printed = tiny.run(*command, "train.iterations=1", cwd=tmp_path)
    state = torch.load(tmp_path / "runs/tiny_rl/checkpoints/latest/trainer/state.pt", weights_only=True)
    assert state["guidelines"] and set(state["guidelines"]) == {"Look first."}
    asked = len(server.requests)
    assert state["teacher_spent"]["requests"] == asked
    server.faults = [500] * 1000
    printed += tiny.run(*command, "train.iterations=2", cwd=tmp_path)
    up, down = [json.loads(line) for line in (tmp_path / "runs/tiny_rl/metrics.jsonl").read_text().splitlines()]
    assert up["judge/label_good_teacher"] == up["judge/teacher_asked"] == 6
    assert up["judge/teacher_requests"] == asked - len(state["guidelines"])
    assert up["judge/teacher_requests"] + up.get("judge/teacher_cached", 0) == 6  # equal steps are one question
    assert down["judge/label_good_teacher"] == 0 and down["judge/teacher_failed"] >= PATIENCE
    assert down["judge/teacher_no_verdict"] == 6
    later = torch.load(tmp_path / "runs/tiny_rl/checkpoints/latest/trainer/state.pt", weights_only=True)
    assert later["teacher_spent"]["requests"] == len(server.requests)
    assert (
        later["teacher_spent"]["tokens"] == state["teacher_spent"]["tokens"] == 100 * state["teacher_spent"]["requests"]
    )
    assert later["guidelines"]  # from the cache, or the medoid of the advice
    nothing_holds_the_key(tmp_path, printed)


def cold_start(settings: JudgeConfig, games: Path, **fields) -> Config:
    config = tiny.sft_config(games)
    sft = dataclasses.replace(config.sft, writer="teacher", episodes=12, judge_examples=4, noise=0.2, **fields)
    return dataclasses.replace(config, judge=settings, sft=sft)


def write_thoughts(question: str, change: bool = False) -> str:
    actions = re.findall(r"', Action \d+: '(.*?)'\]", question)
    thoughts = [{"thought": f"Thought {n}.", "action": action} for n, action in enumerate(actions)]
    if change:
        thoughts[-1]["action"] = "sing"
    return f"Here you are:\n```json\n{json.dumps(thoughts)}\n```"


def test_the_cold_start_in_the_teachers_words(server, settings, small_games):
    """Its thoughts where it keeps the actions, asked again where it does not; its critiques where they agree."""
    tries = {}

    def answer(question: str, number: int) -> str:
        if question.startswith("Role:"):
            return GOOD.replace("<think>t", "<think>judged")
        kind, done = tries.setdefault(question, [len(tries) % 3, 0])
        tries[question][1] += 1
        return write_thoughts(question, change=done < (0, 2, 99)[kind])  # well at once, at the last try, never

    server.answer = answer
    config = cold_start(dataclasses.replace(settings, concurrency=1), small_games, variant="generative")
    rows = [[message["content"] for message in row["messages"]] for row in sft_data.make_rows(config)]
    template = dataclasses.replace(config, sft=dataclasses.replace(config.sft, writer="template"))
    plain = [[message["content"] for message in row["messages"]] for row in sft_data.make_rows(template)]
    assert len(rows) == len(plain) and [q for q, _ in rows[:-4]] == [q for q, _ in plain[:-4]]
    for (_, ours), (_, theirs) in zip(rows[:-4], plain[:-4], strict=True):
        assert prompts.parse_reply(ours).valid
        assert prompts.parse_reply(ours).action == prompts.parse_reply(theirs).action
    taught = [ours != theirs for (_, ours), (_, theirs) in zip(rows[:-4], plain[:-4], strict=True)]
    assert any(taught) and not all(taught)
    assert all("Thought " in ours for (_, ours), new in zip(rows[:-4], taught, strict=True) if new)
    critiques = [prompts.parse_critique(answer).score for _, answer in rows[-4:]]
    assert critiques == [0, 0, 1, 1]  # the teacher calls all good: the flawed ones keep the template's
    assert ["judged" in answer for _, answer in rows[-4:]] == [False, False, True, True]
    asked = len(server.requests)
    assert [[m["content"] for m in row["messages"]] for row in sft_data.make_rows(config)] == rows
    assert len(server.requests) == asked  # all from the cache


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, "no list", '[{"thought": "t"}]', '[{"thought": 1, "action": "look"}]', '["look"]', "[1]",
     '[{"thought": "", "action": "look"}]', '[{"thought": "t", "action": "look"}, {"thought": "t", "action": "look"}]',
     '[{"thought": "t", "action": "LOOK"}]', '{"thought": "t", "action": "look"}',
     '[{"thought": "</think>", "action": "look"}]'],
)  # fmt: skip
def test_thoughts_that_cannot_be_used(text):
    assert prompts.parse_thoughts(text, ["look"], "think") is None


def test_thoughts_by_style():
    found = [{"tag": "monitor", "thought": "a <|im_end|> b</monitor>", "action": " look "}]
    assert prompts.parse_thoughts(json.dumps(found), ["look"], "rlvmr") == [
        "<monitor>a < |im_end|> b</monitor><action>look</action>"
    ]
    for tag in ("think", None, [], "sing"):
        assert prompts.parse_thoughts(json.dumps([found[0] | {"tag": tag}]), ["look"], "rlvmr") is None
    assert prompts.parse_thoughts(json.dumps(found), ["look"], "think")[0].startswith("<think>a ")


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """vLLM's own server with the base model of the quickstart; its start command."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("server")
    port = tiny.free_port()
    model = str(tiny.ROOT / "assets" / "base")
    options = f"--served-model-name tiny --host 127.0.0.1 --port {port} --api-key {KEY} --max-model-len 1600"
    options += " --enforce-eager --disable-log-stats --block-size 32"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options.split()]
    environment = tiny.environment(VLLM_CPU_KVCACHE_SPACE="1", TORCHDYNAMO_DISABLE="1", VLLM_NO_USAGE_STATS="1")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, 9)


def test_vllms_server_is_a_teacher(real_server, small_games, tmp_path, monkeypatch):
    """Real answers of a real model, some of them with a verdict; a second run is served from the cache."""
    monkeypatch.setenv("TEST_KEY", KEY)
    endpoint = dict(teacher="openai", base_url=real_server, model="tiny", key_env="TEST_KEY", timeout_s=120)
    config = JudgeConfig(
        enabled=True, votes=3, teacher_temperature=0.7, max_answer_tokens=60, cache=str(tmp_path), **endpoint
    )
    questions = [row["prompt"] for row in tiny.chat_rows(small_games) if row["prompt"].startswith("Role:")][:4]
    teacher = Teacher(config)
    answers = teacher.ask(questions, config.votes)
    assert teacher.spent["requests"] == 12 and teacher.spent["tokens"] > 12 * 100
    assert any(prompts.parse_critique(text).score is not None for said in answers for text in said)
    again = Teacher(config)
    assert again.ask(questions, config.votes)[0][: len(answers[0])] == answers[0] and again.spent["cached"] > 0
    wrong = Teacher(dataclasses.replace(config, key_env="", cache=str(tmp_path / "other")))
    with warnings.catch_warnings(record=True):
        assert Counter(map(len, wrong.ask(questions))) == {0: 4} and wrong.spent["failed"] == 4

"""engine.py and rollout.py: log-probs, weight sync and its check, seeds; the collector and its failing games."""

import copy
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor

import engine as engine_module
import envs
import prompts
from config import ConfigError
from engine import (
    Completion,
    Engine,
    SamplingParams,
    VllmEngine,
    check_weight_sync,
    make_engine,
    stable_seed,
    sync_weights,
)
from environments import alfworld, scienceworld
from model import LanguageModel, load_model, token_logprobs
from packing import Sample, lay_out
from rollout import Episode, play
from transformers_engine import PaddedEngine, TransformersEngine

COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
assert_same_replies = functools.partial(tiny.assert_same_replies, atol=1e-4)


@pytest.fixture(scope="module")
def config(small_games):
    return tiny.rl_config(small_games, "rollout.group_size=2", "rollout.temperature=1.3")


@pytest.fixture(scope="module")
def policy(config) -> LanguageModel:
    tiny.join()
    return load_model(config)


@pytest.fixture(scope="module")
def engine(config, policy):
    """The one vLLM engine of this file. A test that changes the weights puts them back."""
    os.environ.pop(COMPILE_THREADS, None)
    engine = make_engine(config, policy)
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def slow_engine(config, policy) -> TransformersEngine:
    made = make_engine(tiny.changed(config, "rollout.engine=transformers"), policy)
    assert isinstance(made, TransformersEngine)
    return made


@pytest.fixture(scope="module")
def padded_engine(config, policy) -> PaddedEngine:
    """What serves models that are more than plain attention."""
    return PaddedEngine(policy, config.rollout.concurrency)


@pytest.fixture(params=["engine", "slow_engine", "padded_engine"])
def any_engine(request) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tasks(config) -> list[envs.Task]:
    return envs.tasks(config.env, "L0", "train")[:4]


@pytest.fixture(scope="module")
def prompt_ids(config, policy, small_games) -> list[list[int]]:
    return [policy.chat.encode(row["prompt"]) for row in tiny.chat_rows(small_games)[:12]]


def params(count: int, temperature: float = 1.0, max_tokens: int = 12, first: int = 0) -> list[SamplingParams]:
    return [SamplingParams(temperature, max_tokens, stable_seed(first + index)) for index in range(count)]


def gap(policy: LanguageModel, prompt_ids, completions: list[Completion], temperature: float) -> float:
    """Mean |difference| between the completions' log-probs and the trainer's."""
    samples = [Sample(np.array(ids), np.array(one.ids)) for ids, one in zip(prompt_ids, completions, strict=True)]
    with torch.no_grad():
        trainer, _ = token_logprobs(policy, lay_out(samples, policy.packing), temperature)
    return float(np.abs(trainer.numpy() - np.concatenate([one.logprobs for one in completions])).mean())


# ---- Engines


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_the_trainers(any_engine, policy, prompt_ids, temperature):
    completions = any_engine.generate(prompt_ids, params(12, temperature))
    assert gap(policy, prompt_ids, completions, temperature) < 1e-4
    assert gap(policy, prompt_ids, completions, 1.5 - temperature) > 1e-2  # of this temperature and no other
    end = policy.chat.tokenizer.eos_token_id
    for completion in completions:
        assert len(completion.logprobs) == len(completion.ids) <= 12
        assert end not in completion.ids[:-1] and (completion.ids[-1] == end or len(completion.ids) == 12)
    ended = [completion.ids[-1] == end for completion in completions]
    assert any(ended) and not all(ended)


def test_same_seeds_same_completions_in_any_order(any_engine, prompt_ids):
    given = params(12)
    first = any_engine.generate(prompt_ids, given)
    again = any_engine.generate(prompt_ids[::-1], given[::-1])[::-1]
    few = any_engine.generate(prompt_ids[3:6], given[3:6])
    assert_same_replies(again, first)
    assert_same_replies(few, first[3:6])
    other = any_engine.generate(prompt_ids, params(12, first=100))
    assert sum(one.ids == two.ids for one, two in zip(first, other, strict=True)) < 10


def test_completions_follow_the_distribution(any_engine, policy, prompt_ids):
    """The first token of 600 replies to one prompt, at a temperature that leaves several tokens likely."""
    count, temperature = 600, 2.0
    completions = any_engine.generate([prompt_ids[0]] * count, params(count, temperature, max_tokens=1))
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt_ids[0]])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1)
    seen = Counter(completion.ids[0] for completion in completions)
    likely = [int(token) for token in expected.argsort(descending=True)[:5]]
    for token in likely:
        probability = float(expected[token])
        bound = 4.5 * (probability * (1 - probability) / count) ** 0.5
        assert abs(seen[token] / count - probability) < bound + 1e-3
    assert len(seen) > 5


def test_each_request_has_its_own_length_and_temperature(any_engine, prompt_ids):
    given = [SamplingParams(1.0 if index % 2 else 0.01, 1 + index, index) for index in range(8)]
    completions = any_engine.generate([prompt_ids[0]] * 8, given)
    lengths = [len(completion.ids) for completion in completions]
    assert all(length <= 1 + index for index, length in enumerate(lengths)) and lengths[0] == 1
    cold = [completion.ids for completion in completions[::2]]
    assert all(ids == cold[-1][: len(ids)] for ids in cold)  # almost greedy: the same reply, cut at its own length


def test_an_untouched_generator_and_thread_count(engine, config, policy):
    """vLLM would reseed torch's generator, disable set_num_threads and have one thread compile."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert COMPILE_THREADS not in os.environ


def test_the_end_of_turn_alone_ends_a_reply(engine, policy, prompt_ids, monkeypatch):
    """Published models bring a generation_config.json; Qwen2.5's names a second token, at which vLLM would stop."""
    plain = [completion.ids for completion in engine.generate(prompt_ids, params(12))]
    named = [policy.chat.tokenizer.eos_token_id, plain[0][1]]
    monkeypatch.setitem(engine.llm.llm_engine.input_processor.generation_config_fields, "eos_token_id", named)
    assert [completion.ids for completion in engine.generate(prompt_ids, params(12))] == plain


def test_engine_notices_weights_that_were_not_synced(engine, config, policy, prompt_ids, monkeypatch):
    monkeypatch.setitem(engine_module.MISMATCH_BOUNDS, torch.float32, 0.05)
    kept = copy.deepcopy(policy.model.state_dict())
    given = params(12)
    before = engine.generate(prompt_ids, given)
    assert check_weight_sync(engine, policy, prompt_ids[:4], config) < 1e-4
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        assert gap(policy, prompt_ids, engine.generate(prompt_ids, given), 1.0) > 0.05
        with pytest.raises(RuntimeError, match="engine and trainer disagree by .* the weight sync is broken"):
            check_weight_sync(engine, policy, prompt_ids[:4], config)
        sync_weights(engine, policy)
        assert check_weight_sync(engine, policy, prompt_ids[:4], config) < 1e-4
        # nothing stale in the prefix cache
        assert gap(policy, prompt_ids, engine.generate(prompt_ids, given), 1.0) < 1e-4
    finally:
        policy.model.load_state_dict(kept)
        sync_weights(engine, policy)
    again = engine.generate(prompt_ids, given)
    assert [completion.ids for completion in again] == [completion.ids for completion in before]


def test_the_engine_keeps_no_reference_to_the_trainers_weights(engine, policy, prompt_ids):
    """An optimizer step in place must not reach the engine half-way through a rollout."""
    kept = copy.deepcopy(policy.model.state_dict())
    before = engine.generate(prompt_ids[:2], params(2))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    after = engine.generate(prompt_ids[:2], params(2))
    policy.model.load_state_dict(kept)
    assert_same_replies(after, before)


def test_a_difference_that_is_not_a_number_fails(slow_engine, config, policy, prompt_ids):
    kept = copy.deepcopy(policy.model.state_dict())
    completions = slow_engine.generate(prompt_ids[:2], params(2))
    slow_engine.generate = lambda *_: completions
    try:
        with torch.no_grad():
            policy.model.get_input_embeddings().weight.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="engine and trainer disagree by nan"):
            check_weight_sync(slow_engine, policy, prompt_ids[:2], config)
    finally:
        del slow_engine.generate
        policy.model.load_state_dict(kept)


@pytest.fixture
def on_gpu(policy, config, monkeypatch):
    """What makes an engine as on a GPU. None is here, so in vLLM's place `fake` notes what it is asked for, and fails
    as it is told."""
    fake = SimpleNamespace(asked=[], errors={})

    def ask(name, **given):
        fake.asked.append((name, given))
        if name in fake.errors:
            raise fake.errors[name]
        return True

    class Llm:
        def __init__(self, *_, **given):
            os.environ[COMPILE_THREADS], inductor.compile_threads = "1", 1
            dynamo.recompile_limit = 16
            ask("start", **given)

        def __getattr__(self, name):
            return lambda *_, **given: ask(name, **given)

    monkeypatch.setattr("vllm.LLM", Llm)
    return fake, lambda: VllmEngine(dataclasses.replace(policy, device=torch.device("cuda")), config)


def test_on_a_gpu_the_engine_sleeps_without_its_weights(on_gpu):
    fake, make = on_gpu
    engine = make()
    engine.sleep()
    engine.load_weights([])
    (_, settings), *asked = fake.asked
    assert settings["enable_sleep_mode"] and "enable_chunked_prefill" not in settings
    assert asked == [
        ("sleep", {"level": 2}),  # its weights are not kept in main memory
        ("wake_up", {"tags": ["weights"]}),
        ("collective_rpc", {"kwargs": {"weights_iterator": []}}),
        ("wake_up", {"tags": ["kv_cache"]}),
        ("reset_prefix_cache", {}),
    ]
    fake.asked.clear()
    engine.load_weights([])
    assert [name for name, _ in fake.asked] == ["collective_rpc", "reset_prefix_cache"]


@pytest.mark.parametrize(
    "error, cure",
    [
        (ValueError("Free memory on device cuda:0 (9/80 GiB) on startup is less than desired"), "lower"),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"), "raise"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower"),
        (RuntimeError("CUDA Error: out of memory at csrc/cumem_allocator.cpp:130"), "lower"),  # of wake_up()
        (ValueError("Unknown model type"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
@pytest.mark.parametrize("when", ["start", "wake_up"])
def test_too_little_gpu_memory_for_the_engine_says_what_to_change(on_gpu, monkeypatch, when, error, cure):
    fake, make = on_gpu
    monkeypatch.setenv(COMPILE_THREADS, "3")
    fake.errors[when] = error
    with dynamo.patch(recompile_limit=64), pytest.raises(ConfigError if cure else type(error)) as raised:
        engine = make()
        assert dynamo.recompile_limit == 64
        engine.sleep()
        engine.load_weights([])
    assert os.environ[COMPILE_THREADS] == "3" and inductor.compile_threads == 3
    if cure:
        assert f"{cure} rollout.gpu_memory_utilization ({error})" in str(raised.value)
        assert raised.value.__cause__ is error
    else:
        assert raised.value is error


def test_ranks_of_one_engine_wait_for_each_other_as_long_as_all(config, monkeypatch):
    made = []
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.new_group", lambda *given, **named: made.append((given, named)) or given[0])
    engine = SimpleNamespace()
    VllmEngine._join_ranks(engine, tiny.changed(config, "rollout.tensor_parallel=2", "train.timeout_minutes=7"))
    assert made == [(([first, first + 1], timedelta(minutes=7)), {"backend": "gloo"}) for first in (0, 2)]
    assert (engine.replica, engine.num_replicas, engine.is_leader, engine.group) == (1, 2, True, [2, 3])


def test_stable_seed():
    assert stable_seed(0, 1, 2) == stable_seed(0, 1, 2) == 2790322772876205
    keys = [(seed, group, member) for seed in range(5) for group in range(20) for member in range(20)]
    assert len({stable_seed(*key) for key in keys}) == len(keys)
    assert max(stable_seed(*key) for key in keys) < 2**63


# ---- The collector


def played(engine, config, tasks, count=16, make=None, first=0, **options) -> list[Episode]:
    """Episodes of `tasks`, whose groups are counted from `first`, with `count` environments at once."""
    make = make or envs.load(config.env.name).make
    return play(engine, [make(config.env) for _ in range(count)], dict(enumerate(tasks, first)), config, **options)


def assert_same(episodes, others):
    assert len(episodes) == len(others)
    for one, other in zip(episodes, others, strict=True):
        for step, twin in zip(one.steps, other.steps, strict=True):
            np.testing.assert_allclose(step.logprobs, twin.logprobs, atol=1e-4)
            assert dataclasses.replace(step, logprobs=[]) == dataclasses.replace(twin, logprobs=[])
        assert dataclasses.replace(one, steps=[]) == dataclasses.replace(other, steps=[])


@pytest.fixture(scope="module")
def episodes(engine, config, tasks):
    """What the other collections of this file must repeat."""
    return played(engine, config, tasks, iteration=3)


@pytest.mark.parametrize("count", [2, 5])
def test_episodes_do_not_depend_on_concurrency(engine, config, tasks, episodes, count):
    assert_same(played(engine, config, tasks, count, iteration=3), episodes)


def test_episodes_depend_on_seed_iteration_and_group(engine, config, tasks, episodes):
    def actions(episodes):
        return [[step.response for step in episode.steps] for episode in episodes]

    assert actions(played(engine, config, tasks, iteration=4)) != actions(episodes)
    assert actions(played(engine, tiny.changed(config, "seed=1"), tasks, iteration=3)) != actions(episodes)
    moved = played(engine, config, tasks[1:], first=1, iteration=3)  # what a second rank would play
    assert_same(moved, episodes[2:])


def test_episodes_are_grouped_and_ordered(episodes, tasks):
    assert [(episode.group, episode.member) for episode in episodes] == [(g, m) for g in range(4) for m in range(2)]
    assert [episode.task for episode in episodes] == [task for task in tasks for _ in range(2)]
    pairs = zip(episodes[::2], episodes[1::2], strict=True)
    assert any([s.response for s in one.steps] != [s.response for s in two.steps] for one, two in pairs)


def test_records_are_what_happened(engine, config, policy, episodes):
    """Every episode is played again from its record, in a fresh environment."""
    for episode in episodes:
        env = alfworld.make(config.env)
        seen = env.reset(episode.task)
        for index, step in enumerate(episode.steps):
            assert not seen.done and step.observation == seen.text
            history = tuple((past.observation, past.action) for past in episode.steps[max(0, index - 2) : index])
            ctx = prompts.PromptContext("alfworld", seen.task, seen.text, seen.actions, history, index)
            text = prompts.build_prompt(ctx)
            assert step.prompt == text and step.prompt_ids == policy.chat.encode(text)
            assert step.response == policy.chat.reply(step.response_ids)
            assert len(step.logprobs) == len(step.response_ids)
            reply = prompts.parse_reply(step.response)
            assert (step.action, step.valid, step.thought) == (reply.action, reply.valid, reply.thought)
            assert step.available == (step.action in seen.actions)
            seen = env.step(step.action)
            assert step.reward == 10.0 * seen.won
        assert (episode.won, episode.score) == (seen.won, seen.score)
        assert seen.done or len(episode.steps) == config.env.max_steps
    steps = [step for episode in episodes for step in episode.steps]
    assert {step.valid for step in steps} == {True, False} == {step.available for step in steps}  # or the test is weak


class ToyRoom:
    """A room in which the third action wins if the three have an even number of letters together."""

    threaded = False

    def __init__(self, env_cfg=None):
        pass

    def reset(self, task):
        self.taken = []
        return self._observe()

    def step(self, action):
        self.taken.append(action)
        return self._observe()

    def _observe(self):
        won = len(self.taken) == 3 and sum(map(len, self.taken)) % 2 == 0
        return envs.Observation(f"Step {len(self.taken)}.", ("look", "wait"), "win", float(won), won, won)


def test_reward_comes_with_the_winning_step_alone(engine, config, tasks):
    episodes = played(engine, config, tasks, 4, ToyRoom)
    assert {episode.won for episode in episodes} == {True, False}
    for episode in episodes:
        won = sum(len(step.action) for step in episode.steps[:3]) % 2 == 0
        assert episode.won == won and episode.score == float(won)
        rewards = [step.reward for step in episode.steps]
        assert rewards == ([0.0, 0.0, 10.0] if won else [0.0] * config.env.max_steps)


def test_members_temperature_guidelines_and_history(engine, config, tasks):
    guideline = "Look under <|im_end|> things."
    config = tiny.changed(config, "env.history=0")
    episodes = played(engine, config, tasks[:2], members=3, temperature=0.0, guidelines=[guideline])
    assert [(episode.group, episode.member) for episode in episodes] == [(g, m) for g in range(2) for m in range(3)]
    first = [[step.response for step in episode.steps] for episode in episodes]
    assert first[0] == first[1] == first[2] and first[3] == first[4] == first[5]  # greedy: all members alike
    for step in episodes[0].steps:
        assert "- Look under < |im_end|> things." in step.prompt and "[Observation" not in step.prompt


def test_a_long_prompt_drops_its_history_or_is_refused(engine, config, tasks, policy, episodes):
    seen = alfworld.make(config.env).reset(tasks[0])
    ctx = prompts.PromptContext("alfworld", seen.task, seen.text, seen.actions)
    bare = len(policy.chat.encode(prompts.build_prompt(ctx)))
    with pytest.raises(ValueError, match="raise rollout.max_prompt_tokens"):
        played(engine, tiny.changed(config, f"rollout.max_prompt_tokens={bare - 1}"), tasks[:1])
    longest = max(len(step.prompt_ids) for episode in episodes for step in episode.steps)
    shorter = played(engine, tiny.changed(config, f"rollout.max_prompt_tokens={longest - 1}"), tasks, iteration=3)
    assert max(len(step.prompt_ids) for episode in shorter for step in episode.steps) < longest


class Flaky(alfworld.Alfworld):
    """A game that dies at a given step, as often as its class is told to."""

    failures: Counter  # task id -> how often it still dies
    at = 2
    restarts = 0

    def __init__(self, env_cfg):
        super().__init__(env_cfg)
        self.broken = False

    def reset(self, task):
        assert not self.broken, "used after its death without a restart"
        self.task, self.taken = task, 0
        self._maybe_die()
        return super().reset(task)

    def step(self, action):
        self.taken += 1
        self._maybe_die()
        return super().step(action)

    def restart(self):
        self.broken = False
        type(self).restarts += 1

    def _maybe_die(self):
        if self.taken == self.at and self.failures[self.task.id] > 0:
            type(self).failures[self.task.id] -= 1
            self.broken = True
            raise ConnectionError("the JVM died")


def flaky(at: int, threaded: bool = False, **failures: int):
    """A class of environments whose tasks t0, t1, ... die so often."""
    return type("Flaky", (Flaky,), dict(at=at, threaded=threaded, failures=Counter(failures), restarts=0))


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_environment_that_fails_once_leaves_no_trace(engine, config, tasks, episodes, at, threaded):
    kind = flaky(at, threaded, **{tasks[1].id: 1, tasks[3].id: 1})
    counters = Counter()
    with pytest.warns(UserWarning, match="environment failed .ConnectionError: the JVM died"):
        again = played(engine, config, tasks, 3, kind, iteration=3, counters=counters)
    assert_same(again, episodes)
    assert counters == {"restarted": 2} and kind.restarts == 2


def test_an_environment_that_fails_twice_costs_the_episode(engine, config, tasks, episodes):
    kind = flaky(2, **{tasks[0].id: 2, tasks[2].id: 4})
    counters = Counter()
    with pytest.warns(UserWarning, match="environment failed"):
        # one at a time: who fails is known
        left = played(engine, config, tasks, 1, kind, iteration=3, counters=counters)
    assert counters == {"restarted": 3, "discarded": 3}
    assert [(episode.group, episode.member) for episode in left] == [(0, 1), (1, 0), (1, 1), (3, 0), (3, 1)]
    assert_same(left, [episodes[index] for index in (1, 2, 3, 6, 7)])


@pytest.mark.parametrize("threaded", [False, True])
def test_a_restart_that_fails_costs_the_episode_too(engine, config, tasks, episodes, threaded):
    kind = flaky(2, threaded, **{tasks[0].id: 1})
    refused = [ConnectionError("refused"), None, None]

    def restart(env):
        if error := refused.pop(0):
            raise error
        env.broken = False

    kind.restart, counters = restart, Counter()
    with pytest.warns(UserWarning, match="refused"):
        left = played(engine, config, tasks, 1, kind, iteration=3, counters=counters)
    assert counters == {"restarted": 1, "discarded": 1} and len(refused) == 1
    assert_same(left, episodes[1:])


def test_a_java_machine_killed_in_a_rollout_leaves_no_trace(slow_engine, config, tmp_path):
    """ScienceWorld's environments share one: all episodes in flight are played again, on a new machine."""
    settings = ["env.name=scienceworld", f"env.data={tmp_path}", "env.max_steps=4", "rollout.max_prompt_tokens=3000"]
    config = tiny.changed(config, *settings)
    tasks = [envs.Task("scienceworld", name, f"{name}/0", "train") for name in ("boil", "find-animal", "melt")]
    expected = played(slow_engine, config, tasks, 4, iteration=3)
    assert len(expected) == 6 and all(len(episode.steps) == 4 for episode in expected)
    left = [9]  # steps until the machine is killed

    class Killer(scienceworld.ScienceWorld):
        def step(self, action):
            left[0] -= 1
            if left[0] == 0:
                self.machine.process.kill()
            return super().step(action)

    counters = Counter()
    with pytest.warns(UserWarning, match="environment failed"):
        again = played(slow_engine, config, tasks, 4, Killer, iteration=3, counters=counters)
    assert_same(again, expected)
    assert 1 <= counters["restarted"] <= 4 and not counters["discarded"]


def test_all_episodes_may_be_lost(engine, config, tasks):
    counters = Counter()
    with pytest.warns(UserWarning):
        assert played(engine, config, tasks[:1], 2, flaky(1, **{tasks[0].id: 99}), counters=counters) == []
    assert counters == {"restarted": 2, "discarded": 2}


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_leaves_no_request_behind(any_engine, config, tasks, prompt_ids, threaded):
    """vLLM refuses to reset its cache while requests run, and would hand them to the next who asks."""

    class Long(ToyRoom):
        """A room whose description, of one task, does not fit into a prompt."""

        def reset(self, task):
            self.long = task == tasks[1]
            return super().reset(task)

        def step(self, action):
            time.sleep(0.5 if threaded else 0)
            observation = super().step(action)
            return dataclasses.replace(observation, text="long " * 3000) if self.long else observation

    Long.threaded = threaded
    before = any_engine.generate(prompt_ids[:2], params(2))
    with pytest.raises(ValueError, match="rollout.max_prompt_tokens"):
        played(any_engine, config, tasks, 3, Long)
    assert any_engine.poll() == []
    any_engine.load_weights([])
    assert_same_replies(any_engine.generate(prompt_ids[:2], params(2)), before)


def test_episodes_in_flight_are_given_up_once_it_should_stop(any_engine, config, tasks, prompt_ids):
    before = any_engine.generate(prompt_ids[:2], params(2))
    asked = itertools.count()
    left = played(any_engine, config, tasks, 3, should_stop=lambda: next(asked) >= 2)
    assert len(left) < len(tasks) * config.rollout.group_size
    assert any_engine.poll() == []
    any_engine.load_weights([])
    assert_same_replies(any_engine.generate(prompt_ids[:2], params(2)), before)


def test_slow_environments_act_in_threads(engine, config, tasks, episodes):
    class Slow(alfworld.Alfworld):
        threaded = True
        delay = random.Random(0)
        at_once = busy = 0

        def step(self, action):
            Slow.busy += 1
            Slow.at_once = max(Slow.at_once, Slow.busy)
            time.sleep(Slow.delay.uniform(0.005, 0.05))
            Slow.busy -= 1
            return super().step(action)

    assert_same(played(engine, config, tasks, 8, Slow, iteration=3), episodes)
    assert Slow.at_once > 1


def test_transformers_engine_collects_the_same_kind_of_episodes(slow_engine, config, tasks, policy):
    episodes = played(slow_engine, config, tasks, 8, iteration=3)
    assert_same(played(slow_engine, config, tasks, 3, iteration=3), episodes)
    assert len(episodes) == 8 and sum(step.valid for episode in episodes for step in episode.steps) > 0
    steps = [step for episode in episodes for step in episode.steps]
    samples = [Sample(np.array(step.prompt_ids), np.array(step.response_ids)) for step in steps]
    with torch.no_grad():
        trainer, _ = token_logprobs(policy, lay_out(samples, policy.packing), config.rollout.temperature)
    np.testing.assert_allclose(np.concatenate([step.logprobs for step in steps]), trainer, atol=1e-4)


def test_json_of_an_episode(episodes):
    short, whole = episodes[0].to_json(), episodes[0].to_json(tokens=True)
    assert {"prompt", "prompt_ids", "response_ids", "logprobs"} == set(whole["steps"][0]) - set(short["steps"][0])
    assert whole["steps"][0]["response_ids"] == episodes[0].steps[0].response_ids
    assert short["task"]["id"] == episodes[0].task.id and short["steps"][0]["action"] == episodes[0].steps[0].action
    assert json.dumps(whole) == json.dumps(dataclasses.asdict(episodes[0]))

    class Untouched(list):
        def __iter__(self):
            raise AssertionError("tokens were copied that are not written")

    tokens = ("prompt_ids", "response_ids", "logprobs")
    steps = [
        dataclasses.replace(step, **{name: Untouched(getattr(step, name)) for name in tokens})
        for step in episodes[0].steps
    ]
    assert dataclasses.replace(episodes[0], steps=steps).to_json() == short


def test_the_benchmark_prints_its_ratios(small_games: Path, tmp_path: Path) -> None:
    sets = (f"env.data={small_games}", "env.max_steps=3", "rollout.kv_cache_gib=0.1")
    sizes = ("--games", "2", "--group-size", "2", "--repeats", "1", "--delay", "0.01")
    printed = tiny.run("benchmarks/rollout.py", "--ckpt", tiny.checkpoint(small_games), "--config",
                       tiny.ROOT / "configs/quickstart.yaml", *sizes, "--set", *sets, cwd=tmp_path)  # fmt: skip
    ratios = re.findall(r"^  / .*?  +(\d+\.\d+) \[.*?\] +(\d+\.\d+) \[", printed, re.MULTILINE)
    assert len(ratios) == 5 and all(float(ratio) > 0 for pair in ratios for ratio in pair), printed

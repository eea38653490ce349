"""transformers_engine.py: what it samples and when, whose keys and values it copies, which models it serves."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_packing import SUPPORTED, UNSUPPORTED, tiny_model
from transformers import GenerationConfig

import attention
from config import Config, RolloutConfig
from engine import Completion, SamplingParams, make_engine, stable_seed
from model import LanguageModel, all_logprobs
from packing import Sample
from transformers_engine import PaddedEngine, Request, TransformersEngine, sample

ENDS = frozenset({2, 7, 11})


@pytest.fixture(scope="module", autouse=True)
def group():
    tiny.join()


def make_policy(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(model, SimpleNamespace(ends=ENDS), torch.device("cpu"), dtype)


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    """A model as the trainer has it on CPU. A test that changes its weights puts them back."""
    made = make_policy(tiny_model())
    made.model.set_attn_implementation(attention.NAME)
    made.packing = "line"
    return made


def some_prompts(count: int = 12) -> list[list[int]]:
    """Prompts of 1 to 150 tokens, most of which begin like others, two of which are the same."""
    rng = np.random.default_rng(0)
    stems = [rng.integers(20, 60, length).tolist() for length in (0, 40, 90)]
    made = [stems[index % 3] + rng.integers(20, 60, 1 + index * 5).tolist() for index in range(count - 1)]
    return [*made, made[4]]


def params(count: int, temperature: float = 1.0, max_tokens: int = 20) -> list[SamplingParams]:
    return [SamplingParams(temperature, max_tokens, stable_seed(index)) for index in range(count)]


def run(engine: TransformersEngine) -> dict[str, Completion]:
    """All that is still to come."""
    done: dict[str, Completion] = {}
    while engine.queue or engine.live:
        done |= dict(engine.poll())
    return done


def alone(policy: LanguageModel, prompts, given) -> list[Completion]:
    """Each request in an engine of its own."""
    return [TransformersEngine(policy, 1).generate([ids], [one])[0] for ids, one in zip(prompts, given, strict=True)]


def error(policy: LanguageModel, prompts, completions, temperature: float) -> float:
    """How far the completions' log-probs are from the trainer's, at most."""
    samples = [Sample(np.array(ids), np.array(one.ids)) for ids, one in zip(prompts, completions, strict=True)]
    trainer = np.concatenate(all_logprobs(policy, samples, 4096, temperature))
    return float(np.abs(trainer - np.concatenate([one.logprobs for one in completions])).max())


# ---- What is sampled


@pytest.mark.parametrize("kind", SUPPORTED)
def test_logprobs_are_the_trainers(kind):
    policy, prompts = make_policy(tiny_model(kind, **SUPPORTED[kind])), some_prompts()
    engine = make_engine(Config(device="cpu", rollout=RolloutConfig(engine="transformers")), policy)
    assert type(engine) is TransformersEngine
    completions = engine.generate(prompts, params(12, 0.7))
    assert error(policy, prompts, completions, 0.7) < 1e-4
    assert error(policy, prompts, completions, 1.0) > 1e-2
    assert len({tuple(one.ids) for one in completions}) == 12


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_models_that_are_more_than_attention_are_served_too(kind):
    policy, prompts = make_policy(tiny_model(kind, **UNSUPPORTED[kind])), some_prompts()
    engine = make_engine(Config(device="cpu", rollout=RolloutConfig(engine="transformers")), policy)
    assert type(engine) is PaddedEngine
    completions = engine.generate(prompts, params(12, 0.7))
    assert error(policy, prompts, completions, 0.7) < 1e-4
    tiny.assert_same_replies(engine.generate(prompts[::-1], params(12, 0.7)[::-1])[::-1], completions)


@pytest.mark.parametrize("kind", [TransformersEngine, PaddedEngine])
def test_the_models_own_sampling_habits_are_ignored(policy, kind, monkeypatch):
    """Published models bring a generation_config.json; Qwen2.5's has a repetition penalty."""
    habits = dict(repetition_penalty=1.3, do_sample=True, temperature=0.2, top_p=0.5, top_k=3, max_new_tokens=2)
    plain = kind(policy, 32).generate(some_prompts(), params(12))
    monkeypatch.setattr(policy.model, "generation_config", GenerationConfig(**habits))
    assert kind(policy, 32).generate(some_prompts(), params(12)) == plain


def test_a_reply_ends_at_an_end_or_at_its_own_length(policy):
    prompts = some_prompts()
    given = [SamplingParams(1.0, 1 + index % 5 * 8, index) for index in range(60)]
    completions = TransformersEngine(policy, 8).generate(prompts * 5, given)
    for one, asked in zip(completions, given, strict=True):
        assert len(one.ids) == len(one.logprobs) <= asked.max_tokens and not ENDS & set(one.ids[:-1])
        assert one.ids[-1] in ENDS or len(one.ids) == asked.max_tokens
    assert {one.ids[-1] for one in completions} > ENDS


def test_greedy_is_that_of_transformers(policy):
    prompts = some_prompts()
    for ids, one in zip(prompts, TransformersEngine(policy, 5).generate(prompts, params(12, 0.0)), strict=True):
        expected = policy.model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=20, eos_token_id=sorted(ENDS), pad_token_id=0
        )
        assert one.ids == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("by", ["seed", "step"])
def test_samples_follow_the_distribution(temperature, by):
    """Chi-square over 40 tokens, of other seeds and of a reply's successive steps."""
    count, size = 5_000, 40
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1.5
    logits_V[3] = -torch.inf
    requests = [
        Request("", np.zeros(0), SamplingParams(temperature, 0, index if by == "seed" else 0)) for index in range(count)
    ]
    for index, request in enumerate(requests):
        request.ids = [0] * (index if by == "step" else 0)
    token_B = sample(logits_V.expand(count, size), requests, ENDS)
    expected_V = count * torch.softmax(logits_V / temperature, -1)
    seen_V = torch.bincount(token_B, minlength=size)
    assert seen_V[3] == 0 and seen_V.sum() == count
    often = expected_V > 5
    chi_square = float(((seen_V - expected_V)[often] ** 2 / expected_V[often]).sum())
    degrees = int(often.sum()) - 1
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("number, token", [(0, 1), (2**56 - 1, 3)])
def test_no_number_draws_a_token_without_probability(number, token, monkeypatch):
    monkeypatch.setattr("transformers_engine.stable_seed", lambda *_: number)
    request = Request("", np.zeros(0), SamplingParams(1.0, 1, 0))
    sample(torch.tensor([[-torch.inf, 0.3, -torch.inf, 0.7, -torch.inf]]), [request], ENDS)
    assert request.ids == [token]


def test_logits_that_are_no_numbers_reach_the_trainer():
    request = Request("", np.zeros(0), SamplingParams(1.0, 1, 0))
    sample(torch.full((1, 5), torch.nan), [request], ENDS)
    assert 0 <= request.ids[0] < 5 and np.isnan(request.logprobs[0])


# ---- Who joins, and what is copied


@pytest.mark.parametrize("batch", [2, 5, 32])
def test_a_reply_does_not_depend_on_who_else_is_under_way(policy, batch):
    prompts = some_prompts(24)
    given = [SamplingParams(1.0, 3 + index % 7 * 5, stable_seed(index)) for index in range(24)]
    engine, done = TransformersEngine(policy, batch), {}
    order = np.random.default_rng(batch).permutation(24)  # long prompts join among short ones, and late
    for turn in range(24):
        engine.submit(str(order[turn]), prompts[order[turn]], given[order[turn]])
        if turn % 3:
            done |= dict(engine.poll())
        assert len(engine.live) <= batch
    done |= run(engine)
    tiny.assert_same_replies([done[str(index)] for index in range(24)], alone(policy, prompts, given))


@pytest.fixture
def computed(policy):
    """The numbers of tokens that passes compute."""
    seen = []
    hook = policy.inner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_what_prompts_share_is_computed_once(policy, computed):
    prompts, given = some_prompts(), params(12, max_tokens=1)
    expected = alone(policy, prompts, given)
    computed.clear()
    engine = TransformersEngine(policy, 32)
    tiny.assert_same_replies(engine.generate(prompts, given), expected)
    distinct = len({tuple(ids[:count]) for ids in prompts for count in range(1, len(ids) + 1)})
    assert computed == [distinct + 1]  # one prompt is there twice: its last token is computed again, for its logits
    longer = [ids + [21, 22, 23] for ids in prompts]
    tiny.assert_same_replies(engine.generate(longer, given), alone(policy, longer, given))
    assert computed[1] == 3 * 11 + 1


def test_a_pass_takes_few_prompts_if_they_are_long(policy, computed, monkeypatch):
    monkeypatch.setattr("transformers_engine.PROMPT_TOKENS", 100)
    prompts = [[index, *range(20, 60)] for index in range(20, 32)]
    TransformersEngine(policy, 32).generate(prompts, params(12, max_tokens=1))
    assert computed == [3 * 41] * 4


def test_requests_long_ago_are_not_kept(policy, computed):
    prompts, given = some_prompts(7), params(1, max_tokens=1)
    engine = TransformersEngine(policy, 4)
    for ids in prompts:
        engine.generate([ids], given)
    assert len(engine.recent) == len(engine.by_prompt) == 4
    assert not any(request.source for request in engine.recent)  # nor by one another
    engine.sleep()
    assert not engine.recent and not engine.by_prompt


def test_new_weights_are_sampled_from(policy):
    prompts, given = some_prompts(), params(12)
    engine, kept = TransformersEngine(policy, 32), policy.model
    before = engine.generate(prompts, given)
    try:
        policy.model = tiny_model(initializer_range=0.2)  # another object
        policy.model.set_attn_implementation(attention.NAME)
        engine.load_weights([])
        tiny.assert_same_replies(engine.generate(prompts, given), alone(policy, prompts, given))
        with torch.no_grad():  # in place
            policy.model.lm_head.weight.mul_(-1)
            policy.model.model.embed_tokens.weight.mul_(0.5)
        engine.load_weights([])
        after = engine.generate(prompts, given)
        tiny.assert_same_replies(after, alone(policy, prompts, given))
        assert error(policy, prompts, after, 1.0) < 1e-4 and after != before
    finally:
        policy.model = kept
    engine.load_weights([])
    tiny.assert_same_replies(engine.generate(prompts, given), before)


def test_cancelled_requests_do_not_come_back(policy):
    prompts, given = some_prompts(), params(12)
    engine = TransformersEngine(policy, 6)
    for index in range(12):
        engine.submit(str(index), prompts[index], given[index])
    done = dict(engine.poll())
    with pytest.raises(AssertionError, match="under way"):
        engine.load_weights([])
    gone = [key for key in ("1", "4", "8", "11") if key not in done]
    engine.cancel(gone)
    done |= run(engine)
    left = [index for index in range(12) if str(index) not in gone]
    assert sorted(done, key=int) == [str(index) for index in left]
    expected = alone(policy, prompts, given)
    tiny.assert_same_replies([done[str(index)] for index in left], [expected[index] for index in left])
    engine.cancel(["0"])
    assert engine.poll() == []


def test_an_error_in_a_pass_leaves_the_model_as_it_was_and_nothing_to_copy(policy):
    prompts, given = some_prompts(), params(12)
    engine = TransformersEngine(policy, 32)

    def fail(*_):
        raise MemoryError

    hook = policy.inner.model.layers[0].register_forward_hook(fail)
    engine.submit("0", prompts[1], given[1])
    with pytest.raises(MemoryError):
        engine.poll()
    hook.remove()
    assert policy.model.config._attn_implementation == attention.NAME
    engine.cancel(["0"])
    tiny.assert_same_replies(engine.generate(prompts, given), alone(policy, prompts, given))


# ---- Models in other forms


def test_an_adapter_under_gradient_checkpointing():
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # else the adapter does nothing
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    policy, prompts = make_policy(adapted.eval()), some_prompts()
    completions = TransformersEngine(policy, 5).generate(prompts, params(12))
    assert error(policy, prompts, completions, 1.0) < 1e-4
    with adapted.disable_adapter():
        assert error(policy, prompts, completions, 1.0) > 0.1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])  # while it is trained, and not
def test_bfloat16(weights):
    policy = make_policy(tiny_model(initializer_range=0.05).to(weights), torch.bfloat16)
    prompts = some_prompts()
    engine = TransformersEngine(policy, 5)
    completions = engine.generate(prompts, params(12))
    assert error(policy, prompts, completions, 1.0) < 0.05
    caches = [cache for request in engine.recent for cache in request.caches.values()]
    assert {cache.dtype for cache in caches} == {torch.bfloat16}

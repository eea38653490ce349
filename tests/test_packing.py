"""packing.py and attention.py: the lines, their mask, and log-probs and gradients against plain forward passes."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

import attention
import baselines
from attention import LineMask
from config import Config, ModelConfig
from model import LanguageModel, all_logprobs, choose_packing, place_on_device, token_logprobs, training_batches
from packing import BLOCK, LENGTHS, MicroBatch, Packing, Sample, lay_out, micro_batches, split_evenly, visible

PACKINGS = ("line", "blocks", "padded")
IDS = np.array([0, 1, 255, 256, 70_000, 151_643], dtype=np.int32)  # among them ids that differ in one byte alone
VOCABULARY = 64


def tokens_of(sample: Sample) -> np.ndarray:
    return np.concatenate([sample.prompt_ids, sample.response_ids])


def distinct_tokens(samples: list[Sample]) -> int:
    """The nodes of the samples' trie, counted naively."""
    every = [tokens_of(sample) for sample in samples]
    return len({tokens[:end].tobytes() for tokens in every for end in range(1, len(tokens) + 1)})


def grown_samples(seed: int) -> list[Sample]:
    """Samples each of which goes on where an earlier one is cut, or at its end, or not at all."""
    rng = np.random.default_rng(seed)
    ids, longest, samples = IDS[: rng.choice([1, 2, 6])], rng.choice([3, 30, 300]), []
    for _ in range(rng.integers(0, 16)):
        before = tokens_of(samples[rng.integers(len(samples))]) if samples and rng.random() < 0.8 else IDS[:0]
        cut = rng.choice([len(before), rng.integers(len(before) + 1)])
        new = rng.choice(ids, rng.choice([0, rng.integers(longest)]))
        tokens = np.concatenate([before[:cut], new, IDS[: max(0, 2 - cut - len(new))]])  # two at least
        prompt = rng.integers(1, len(tokens))
        samples.append(Sample(tokens[:prompt], tokens[prompt:]))
    return samples


def by_samples(batch: MicroBatch, values_T):
    """Split what there is one of per response token."""
    return np.split(values_T, np.cumsum(batch.lengths)[:-1]) if batch.samples else []


# ---- The trie


def check_lines(batch: MicroBatch, packing: Packing) -> None:
    """Check that where a response token is predicted exactly its sample up to there is seen, at the right positions."""
    width = batch.input_ids_BL.shape[1]
    assert (batch.end_L is None) == (packing == "padded") and (packing == "padded" or len(batch.input_ids_BL) == 1)
    place_L = np.arange(width)
    end_L = np.full(width, width) if batch.end_L is None else batch.end_L
    sources, targets = by_samples(batch, batch.source_T), by_samples(batch, batch.target_T)
    for sample, source_R, target_R in zip(batch.samples, sources, targets, strict=True):
        tokens, prompt = tokens_of(sample), len(sample.prompt_ids)
        assert np.array_equal(target_R, sample.response_ids)
        (row,) = set(source_R // width)
        path = np.flatnonzero(visible(end_L, source_R[-1] % width, place_L))
        assert np.array_equal(batch.input_ids_BL[row, path], tokens[:-1])
        assert np.array_equal(batch.position_ids_BL[row, path], np.arange(len(tokens) - 1))
        expected_RL = np.zeros((len(source_R), width), dtype=bool)
        expected_RL[:, path] = np.arange(len(path)) < np.arange(prompt, len(tokens))[:, None]
        assert np.array_equal(visible(end_L, source_R[:, None] % width, place_L), expected_RL)
    if packing != "padded":
        assert sum(batch.added) == distinct_tokens(batch.samples)  # no token is there twice
        filling = place_L[sum(batch.added) :]
        alone = filling[:, None] == place_L
        assert np.array_equal(visible(end_L, filling[:, None], place_L), alone)
        assert np.array_equal(visible(end_L[filling, None], place_L, filling[:, None]), alone)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("budget", [1, 50, 300, 10_000])
def test_micro_batches_hold_every_sample_once_and_within_the_budget(packing, budget):
    for seed in range(40):
        samples = grown_samples(seed)
        batches = micro_batches(samples, budget, packing)
        assert sorted(index for batch in batches for index in batch.indices) == list(range(len(samples)))
        for batch in batches:
            assert batch.indices == sorted(batch.indices)
            assert all(samples[index] is one for index, one in zip(batch.indices, batch.samples, strict=True))
            check_lines(batch, packing)
            rows, width = batch.input_ids_BL.shape
            longest = max(sample.num_tokens for sample in batch.samples)
            assert rows * width <= budget or len(batch.samples) == 1
            if packing == "blocks":
                assert width % BLOCK == 0 and width - sum(batch.added) < max(BLOCK, budget / LENGTHS)
            else:
                assert width == (longest if packing == "padded" else sum(batch.added))
        for batch, following in zip(batches, batches[1:], strict=False):  # none is closed while there is room
            if packing == "line":
                assert distinct_tokens(batch.samples + following.samples) > budget
            elif packing == "padded":
                assert batch.input_ids_BL.size + batch.input_ids_BL.shape[1] > budget


@pytest.mark.parametrize("packing", PACKINGS)
def test_lay_out_makes_one_micro_batch(packing):
    for seed in range(40):
        samples = grown_samples(seed)
        batch = lay_out(samples, packing)
        assert batch.indices == list(range(len(samples)))
        check_lines(batch, packing)
        if packing == "padded":
            assert len(batch.input_ids_BL) == max(1, len(samples))
        else:
            filling = batch.input_ids_BL.size - distinct_tokens(samples)
            assert filling == (not samples) if packing == "line" else 0 <= filling <= BLOCK


@pytest.mark.parametrize("budget", [2048, 10_000])
def test_lines_of_blocks_have_few_lengths(budget):
    samples = [Sample(np.full(length, index), IDS[:1]) for index, length in enumerate(range(1, budget // 2, 40))]
    widths = {batch.input_ids_BL.shape[1] for batch in micro_batches(samples, budget, "blocks")}
    for index in range(len(samples)):  # also lines that hold little, as the last one may
        widths |= {batch.input_ids_BL.shape[1] for batch in micro_batches(samples[index:][:2], budget, "blocks")}
    assert 4 < len(widths) <= LENGTHS and max(widths) <= budget


# ---- Shares


def grouped_samples(seed: int) -> list[Sample]:
    """Groups of 8 replies to a prompt, whose prompts begin alike; those that sort last are the longest."""
    rng = np.random.default_rng(seed)
    system, samples = rng.integers(0, 50, 60), []
    for group in range(rng.integers(8, 40)):
        prompt = np.concatenate([system, [group], rng.integers(0, 50, rng.integers(1 + 10 * group, 40 + 10 * group))])
        samples += [Sample(prompt, rng.integers(0, 50, rng.integers(5, 40))) for _ in range(8)]
    return samples


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_split_evenly_deals_distinct_tokens(parts):
    for seed in range(10):
        samples = grouped_samples(seed)
        split = split_evenly(samples, parts)
        assert len(split) == parts and sorted(map(id, sum(split, []))) == sorted(map(id, samples))
        whole, *sizes = (lay_out(part, "line").input_ids_BL.size for part in (samples, *split))
        longest = max(sample.num_tokens for sample in samples)
        # a border falls within a sample, and what the sample after it shares with those before is computed again
        assert max(sizes) - min(sizes) <= 1.5 * longest
        assert max(sizes) <= whole / parts + 1.25 * longest
        assert sum(sizes) <= whole + (parts - 1) * longest


def test_split_evenly_leaves_no_sample_out():
    for seed in range(100):
        samples, parts = grown_samples(seed), 1 + seed % 9
        split = split_evenly(samples, parts)
        assert len(split) == parts and sorted(map(id, sum(split, []))) == sorted(map(id, samples))
    assert split_evenly([], 3) == [[], [], []]
    alike = [Sample(IDS[:3], IDS[3:]) for _ in range(5)]
    assert sum(map(len, split_evenly(alike, 8))) == 5


# ---- The mask


def dense(end_L: np.ndarray) -> torch.Tensor:
    """Who sees whom, [L, L]."""
    place_L = np.arange(len(end_L))
    return torch.from_numpy(visible(end_L, place_L[:, None], place_L))


@functools.cache
def some_lines(packing: Packing) -> list[np.ndarray]:
    """Ends of the tokens of some lines, the longest about 1,200 tokens long."""
    # ends on the borders of blocks, and one token behind them
    aligned = [Sample(np.full(size, index), IDS[:1]) for index, size in enumerate((64, 62, 127, 255, 64))]
    grown = [grown_samples(seed) for seed in (106, 110, 114, 134)]
    return [lay_out(samples, packing).end_L for samples in (related_samples(), *grown, aligned, [])]


def block_sets(mask, name: str) -> list[set[int]]:
    """The indices that a BlockMask holds for each block."""
    counts, indices = (getattr(mask, f"{name}_{what}")[0, 0] for what in ("num_blocks", "indices"))
    return [set(row[:count].tolist()) for count, row in zip(counts, indices, strict=True)]


def test_flex_attention_gets_torchs_own_mask():
    partial = full = 0
    for end_L in some_lines("blocks"):
        mask = LineMask(end_L, 1, torch.device("cpu"))
        found, length = mask.for_flex, len(end_L)
        expected = flex.create_block_mask(found.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
        assert mask.shape == found.shape == expected.shape
        for name in ("kv", "full_kv", "q", "full_q"):
            assert block_sets(found, name) == block_sets(expected, name)
            counts = [getattr(one, f"{name}_num_blocks") for one in (found, expected)]
            torch.testing.assert_close(*counts)
        torch.testing.assert_close(found.to_dense(), expected.to_dense())
        # what a kernel makes of it, the blocks and mask_mod together
        place_L = torch.arange(length)
        seen_LL = torch.zeros(length, length, dtype=torch.bool)
        for query, (some, whole) in enumerate(zip(block_sets(found, "kv"), block_sets(found, "full_kv"), strict=True)):
            queries = place_L[query * BLOCK :][:BLOCK]
            for keys in (place_L[key * BLOCK :][:BLOCK] for key in some):
                seen_LL[queries[:, None], keys] = found.mask_mod(0, 0, queries[:, None], keys)
            for keys in (place_L[key * BLOCK :][:BLOCK] for key in whole):
                seen_LL[queries[:, None], keys] = True
            partial, full = partial + len(some), full + len(whole)
        assert torch.equal(seen_LL, dense(end_L))
    assert partial > 50 and full > 5


def random_heads(length: int, key_heads: int, dim: int = 8, value_dim: int = 8) -> list[torch.Tensor]:
    """Query, key and value of one layer, of 4 heads; laid out in memory as models do."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, 4, dim), (length, key_heads, dim), (length, key_heads, value_dim)]
    return [2 * torch.randn(1, *shape, generator=generator).transpose(1, 2) for shape in shapes]


def test_flex_attention_equals_a_dense_mask(monkeypatch):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # dynamo's first call costs seconds
    for end_L in some_lines("blocks")[:3]:
        mask, heads = LineMask(end_L, 1, torch.device("cpu")), random_heads(len(end_L), 2)
        with torch.no_grad():
            found = flex.flex_attention(*heads, block_mask=mask.for_flex, enable_gqa=True)
        expected = scaled_dot_product_attention(*heads, attn_mask=dense(end_L), enable_gqa=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key_heads, longest", [(1, 1), (2, 1), (4, 600), (2, 5000)])  # blocks of 64, 128, 1216 queries
def test_attention_on_cpu_equals_a_dense_mask(key_heads, longest):
    for end_L in some_lines("line"):
        mask = LineMask(end_L, longest, torch.device("cpu"))
        heads = random_heads(len(end_L), key_heads, value_dim=6)
        found, _ = attention.attend(torch.nn.Module(), *heads, mask, scaling=0.3)
        expected = scaled_dot_product_attention(*heads, attn_mask=dense(end_L), enable_gqa=True, scale=0.3)
        torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=0)


def test_one_mask_serves_layers_of_different_heads_and_dtypes():
    end_L = some_lines("line")[1]
    mask = LineMask(end_L, 1, torch.device("cpu"))
    for key_heads, dtype in ((4, torch.float32), (2, torch.float32), (2, torch.float64)):
        heads = [one.to(dtype) for one in random_heads(len(end_L), key_heads)]
        found, _ = attention.attend(torch.nn.Module(), *heads, mask)
        expected = scaled_dot_product_attention(*heads, attn_mask=dense(end_L), enable_gqa=True)
        torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=0)


# ---- Log-probs and gradients


def tiny_model(kind: str = "qwen2", **sizes) -> torch.nn.Module:
    """A model with random weights, large enough for what it sees to matter."""
    common = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, bos_token_id=1,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.15,
                  eos_token_id=2, pad_token_id=0)  # fmt: skip
    config = AutoConfig.for_model(kind, **common | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def packed(model: torch.nn.Module, packing: Packing, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model with its attention for lines, without a tokenizer."""
    model.set_attn_implementation(attention.NAME)
    return LanguageModel(model, None, torch.device("cpu"), dtype, packing)


@functools.cache
def related_samples() -> list[Sample]:
    """Samples with all that they may share: prompts in part or whole, beginnings of replies, everything, nothing."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, count)

    system, story, reply = ids(60), ids(480), ids(20)
    first, second = np.concatenate([system, ids(40)]), np.concatenate([system, ids(70)])
    samples = [
        *(Sample(first, ids(length)) for length in (5, 12, 30)),
        Sample(first, reply),
        Sample(first, reply.copy()),  # the same to the last token
        Sample(first, reply[:8]),
        Sample(np.concatenate([first, reply[:5]]), reply[5:]),  # the same again, but a longer prompt
        Sample(second, ids(9)),
        Sample(second, ids(1)),
        Sample(ids(1), ids(1)),
        Sample(np.concatenate([story, ids(10)]), ids(40)),  # so long that blocks of queries grow
        Sample(np.concatenate([story, ids(60)]), ids(15)),
        Sample(ids(150), ids(100)),
    ]
    return [samples[index] for index in rng.permutation(len(samples))]


def loss_of(logp_T: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """A loss in which every response token has a random weight."""
    lengths = [len(sample.response_ids) for sample in related_samples()]
    weights = np.split(np.random.default_rng(1).normal(size=sum(lengths)) / sum(lengths), np.cumsum(lengths)[:-1])
    return (logp_T * torch.from_numpy(np.concatenate([weights[index] for index in indices])).float()).sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Take the gradients of what is trained out of the model."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def alone(model: torch.nn.Module) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """Log-probs and gradients of transformers' own forward pass, one sample at a time, under its own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logps = []
    for index, sample in enumerate(related_samples()):
        ids = torch.from_numpy(tokens_of(sample))
        logits = model(input_ids=ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1]
        logp_R = logits.log_softmax(-1).gather(-1, ids[len(sample.prompt_ids) :, None])[:, 0]
        loss_of(logp_R, [index]).backward()
        logps.append(logp_R.detach().numpy())
    model.set_attn_implementation(before)
    return logps, gradients(model)


def together(policy: LanguageModel, budget: int) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """The same as the project computes them."""
    logps = [np.zeros(0)] * len(related_samples())
    for batch in training_batches(policy, related_samples(), budget):
        logp_T, _ = token_logprobs(policy, batch)
        loss_of(logp_T, batch.indices).backward()
        for index, logps_R in zip(batch.indices, by_samples(batch, logp_T.detach().numpy()), strict=True):
            logps[index] = logps_R
    return logps, gradients(policy.model)


def check_equal(found, expected, atol: float = 1e-5) -> None:
    """Check log-probs and gradients: of every weight, and large enough to tell."""
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 6
    assert max(float(gradient.abs().max()) for gradient in expected[1].values()) > 1e-2
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=0)


@functools.cache
def attention_of(key_heads: int):
    """A tiny model with so many key heads for its 4 heads, and what is right for it."""
    model = tiny_model(num_key_value_heads=key_heads)
    return model, alone(model)


@pytest.mark.parametrize(
    "packing, key_heads, budget",
    [
        *(("line", 2, 1), ("line", 1, 100), ("line", 4, 700), ("line", 2, 10_000)),
        *(("blocks", 1, 1), ("blocks", 4, 700), ("blocks", 2, 10_000)),
        *(("padded", 4, 1), ("padded", 2, 100), ("padded", 1, 10_000)),
    ],
)
def test_logprobs_and_gradients_equal_those_of_a_sample_alone(packing, key_heads, budget):
    model, expected = attention_of(key_heads)
    policy = packed(model, packing)
    check_equal(together(policy, budget), expected)
    found = all_logprobs(policy, related_samples(), budget, 1.0)
    for one, other in zip(found, expected[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_sample_and_none(packing):
    model, (expected, _) = attention_of(2)
    policy = packed(model, packing)
    for sample, logp_R in zip(related_samples(), expected, strict=True):
        found, _ = token_logprobs(policy, lay_out([sample], packing))
        np.testing.assert_allclose(found.detach().numpy(), logp_R, atol=1e-5, rtol=0)
    nothing, entropy_T = token_logprobs(policy, lay_out([], packing), entropy="gradient")
    assert len(nothing) == len(entropy_T) == 0
    (nothing + entropy_T).sum().backward()  # what a rank does that has no samples left
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_log_probs_would_show_what_must_not_be_seen():
    """A mask with one token too many is noticed by the tests above, and so is a wrong position."""
    model, _ = attention_of(2)
    policy, batch = packed(model, "line"), lay_out(related_samples(), "line")
    right_T, _ = token_logprobs(policy, batch)
    place = 30  # within the first sample
    longer_L, later_BL = batch.end_L.copy(), batch.position_ids_BL.copy()
    longer_L[place], later_BL[0, place] = len(longer_L), later_BL[0, place] + 1
    for changed in ({"end_L": longer_L}, {"position_ids_BL": later_BL}):
        wrong_T, _ = token_logprobs(policy, dataclasses.replace(batch, **changed))
        assert float((wrong_T - right_T).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_adapters_and_gradient_checkpointing_change_nothing(tune):
    settings = ModelConfig(tune=tune, gradient_checkpointing=True, lora_rank=4)
    policy = place_on_device(Config(device="cpu", model=settings), tiny_model(), None)
    assert policy.packing == "line"
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:  # else the adapter does nothing
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    expected = alone(policy.inner)
    assert ("lora" in next(iter(expected[1]))) == (tune == "lora")
    policy.model.train()
    calls = []
    policy.inner.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = together(policy, 10_000)
    assert len(calls) == 2  # recomputed once
    check_equal((found[0], {name.removeprefix("base_model.model."): one for name, one in found[1].items()}), expected)


def test_bfloat16_stays_near():
    model = tiny_model(initializer_range=0.05)
    expected = alone(model)
    for packing in ("line", "blocks"):
        found = together(packed(model, packing, torch.bfloat16), 10_000)
        assert all(one.dtype == np.float32 for one in found[0])
        off = np.abs(np.concatenate(found[0]) - np.concatenate(expected[0]))
        assert 1e-4 < off.max() < 0.05
        for name, gradient in expected[1].items():
            assert found[1][name].dtype == torch.float32
            torch.testing.assert_close(found[1][name], gradient, atol=0.01, rtol=0)


def test_a_critics_values_and_gradients_equal_those_of_a_sample_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = Config(device="cpu")
    critic = baselines.load_critic(config, LanguageModel(None, None, torch.device("cpu")), str(tmp_path))
    assert critic.packing == "line"
    torch.nn.init.normal_(critic.inner.score.weight, generator=torch.Generator().manual_seed(0))
    values = []
    for index, sample in enumerate(related_samples()):
        logits = critic.inner(input_ids=torch.from_numpy(tokens_of(sample))[None]).logits
        value_R = logits[0, len(sample.prompt_ids) - 1 : -1, 0]
        loss_of(value_R, [index]).backward()
        values.append(value_R.detach())
    expected = gradients(critic.model)
    batch = lay_out(related_samples(), critic.packing)
    value_T = baselines.token_values(critic, batch)
    torch.testing.assert_close(value_T, torch.cat(values), atol=1e-5, rtol=0)
    loss_of(value_T, batch.indices).backward()
    for name, gradient in gradients(critic.model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0)


# ---- Which models

HALF = ["full_attention", "sliding_attention"]
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
SUPPORTED = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "gemma3_text": {"layer_types": ["full_attention"] * 2, "head_dim": 8},
}
UNSUPPORTED = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma3_text": {"layer_types": HALF, "sliding_window": 8, "head_dim": 8},
    # the text model's config lies within the model's
    "gemma3": {
        "text_config": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, layer_types=HALF,
                            sliding_window=8, initializer_range=0.15),
        "vision_config": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                              image_size=28, patch_size=14),
    },
    "qwen3_next": EXPERTS | dict(layer_types=["linear_attention", "full_attention"], head_dim=8,
                                 linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                                 linear_value_head_dim=8, shared_expert_intermediate_size=16),
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "gptj": {"rotary_dim": 8},
    "gpt2": {},
}  # fmt: skip


def largest_error(model: torch.nn.Module, packing: Packing) -> float:
    """How far the log-probs of samples in one micro-batch are from those of each alone, padded."""
    samples = sorted(related_samples(), key=lambda sample: sample.num_tokens)[:8]
    policy = LanguageModel(model, None, torch.device("cpu"))
    expected = np.concatenate(all_logprobs(policy, samples, 1, 1.0))
    policy.packing = packing
    found = np.concatenate(all_logprobs(policy, samples, 10_000, 1.0))
    assert expected.std() > 0.1
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("kind", SUPPORTED)
def test_models_of_plain_attention_share_tokens(kind):
    model = tiny_model(kind, **SUPPORTED[kind])
    assert attention.supports_lines(model)
    assert choose_packing(Config(device="cpu"), model) == "line"
    assert model.config._attn_implementation == attention.NAME
    assert largest_error(model, "line") < 1e-5


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_models_have_padded_lines(kind):
    model = tiny_model(kind, **UNSUPPORTED[kind])
    before = model.config._attn_implementation
    assert not attention.supports_lines(model)
    assert choose_packing(Config(device="cpu"), model) == "padded"
    assert model.config._attn_implementation == before != attention.NAME
    assert largest_error(model, "padded") < 1e-5


def test_sdpa_asks_for_padded_lines():
    model = tiny_model()
    assert choose_packing(Config(device="cpu", model=ModelConfig(attention="sdpa")), model) == "padded"
    assert model.config._attn_implementation == "sdpa"


# ---- While transformers generates


def test_generation_is_as_under_sdpa():
    model = tiny_model()
    rng = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(3, VOCABULARY, (3, 9), generator=rng)
    mask_BL = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    ids_BL = ids_BL * mask_BL
    found = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        made = model.generate(input_ids=ids_BL, attention_mask=mask_BL, max_new_tokens=12, do_sample=False,
                              return_dict_in_generate=True, output_logits=True)  # fmt: skip
        found.append((made.sequences, torch.stack(made.logits)))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][0][0]) == 21
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)
    short, _ = found[1]
    model.set_attn_implementation("sdpa")
    lone = model.generate(input_ids=ids_BL[2:, 8:], max_new_tokens=12, do_sample=False)  # so padding was not seen
    assert torch.equal(short[2, 8:], lone[0])

"""train_sft.py: what stops a run at its start, tokens, mini-batches, learning rates, the loss."""

import dataclasses
import json
import random
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import toy_environment
from transformers import get_cosine_schedule_with_warmup

import train_sft
from chat_rows import text_of
from config import Config, ConfigError, EnvConfig, ModelConfig, SFTConfig
from model import all_logprobs, load_model
from model_files import check_model_folder
from sft_data import chat
from train_sft import imitate, learning_rate, preflight, tokenise, updates

BASE = str(tiny.ROOT / "assets" / "base")

# ---------------------------------------------------------------------------------------------------------------------
# The start


def in_the_lighthouse(**sft) -> Config:
    return Config(model=ModelConfig(path=BASE), env=EnvConfig(name="toy_environment"), sft=SFTConfig(**sft))


@pytest.mark.parametrize(
    ("sft", "message"),
    [
        ({"noise": 0.1}, r"sft.noise=0.1: the environment toy_environment has no TEMPLATES.slip; set it to 0"),
        ({"idle": 0.2}, r"sft.idle=0.2: the environment toy_environment has no TEMPLATES.idle; set it to 0"),
        ({"data": "nosuch.jsonl"}, r"sft.data=nosuch.jsonl does not exist"),
        ({"data": __file__, "variant": "generative", "judge_examples": 0}, r"sft.judge_examples=0 gives no judged"),
        ({"data": __file__, "variant": "generative", "judge_examples": 1}, r"set it to 2 or more, or sft.variant=vani"),
        ({"samples_per_update": 3}, r"sft.samples_per_update=3 does not divide over 2 ranks"),
    ],
)
def test_what_stops_a_run_at_its_start(sft: dict, message: str) -> None:
    preflight(in_the_lighthouse(variant="generative"), 2)
    with pytest.raises(ConfigError, match=message):
        preflight(in_the_lighthouse(**sft), 2)


def test_what_an_environment_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = types.ModuleType("bare_environment")
    for name in ("TASK_TYPES", "HELD_OUT_TYPES", "PROMPT", "tasks", "make", "make_expert"):
        setattr(bare, name, getattr(toy_environment, name))
    monkeypatch.setitem(sys.modules, "bare_environment", bare)
    there = dataclasses.replace(in_the_lighthouse(), env=EnvConfig(name="bare_environment"))
    preflight(there, 1)
    generative = dataclasses.replace(there, sft=SFTConfig(variant="generative"))
    with pytest.raises(ConfigError, match="bare_environment has no make_teacher"):
        preflight(generative, 1)
    del bare.make_expert
    with pytest.raises(ConfigError, match=r"bare_environment has no make_expert.*sft.data=FILE"):
        preflight(there, 1)
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    preflight(dataclasses.replace(there, sft=SFTConfig(noise=0.5, data=str(file))), 1)  # nobody plays


def spoiled(tmp_path: Path, **files) -> Config:
    """A config of the base model with other fields in its config.json, or another chat template."""
    folder = tiny.copy(Path(BASE), tmp_path / "given")
    fields = json.loads((folder / "config.json").read_text()) | files.get("fields", {})
    (folder / "config.json").write_text(json.dumps(fields))
    if "template" in files:
        (folder / "chat_template.jinja").write_text(files["template"])
    return dataclasses.replace(in_the_lighthouse(), model=ModelConfig(path=str(folder)))


def test_rows_need_no_room_for_rollouts(tmp_path: Path) -> None:
    config = spoiled(tmp_path, fields={"max_position_embeddings": 512})
    preflight(config, 1)
    with pytest.raises(ConfigError, match="512"):  # what would sample from it does
        check_model_folder(config)


def test_rlvmrs_tags_are_not_taught_inside_of_a_thought(tmp_path: Path) -> None:
    """Where the template opens one; rows of one's own are checked when they are read."""
    opening = (Path(BASE) / "chat_template.jinja").read_text().replace("assistant\n", "assistant\n<think>\n")
    config = spoiled(tmp_path, template=opening)
    preflight(config, 1)
    rlvmr = dataclasses.replace(config, prompt_style="rlvmr")
    with pytest.raises(ConfigError, match=r"^prompt_style=rlvmr: the chat template of .* opens a thought"):
        preflight(rlvmr, 1)
    preflight(dataclasses.replace(rlvmr, model=ModelConfig(path=BASE)), 1)
    preflight(dataclasses.replace(rlvmr, sft=SFTConfig(data=__file__)), 1)


def test_rows_of_ones_own(tmp_path: Path) -> None:
    """No expert, no environment's words: the file's rows are learned as they stand."""
    tiny.join()
    file = tmp_path / "rows.jsonl"
    rows = [chat(f"question {n}", f"answer {n}") for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = train_sft.load_rows(in_the_lighthouse(data=str(file)))
    assert read == [{"prompt": row["messages"][:1], "response": row["messages"][1]["content"]} for row in rows]


@pytest.mark.parametrize(
    ("lacks", "sft", "message"),
    [
        ("make_teacher", {}, r"has no make_teacher.*sft.variant=vanilla"),
        ("make_expert", {}, r"has no make_expert"),
        ("TEMPLATES", {"noise": 0.5}, r"has no TEMPLATES.slip"),
    ],
)
def test_critics_beside_ones_own_rows_are_made_here(
    lacks: str, sft: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    monkeypatch.delattr(toy_environment, lacks, raising=False)
    config = in_the_lighthouse(variant="generative", data=str(tmp_path / "rows.jsonl"), **sft)
    with pytest.raises(ConfigError, match=message):
        preflight(config, 1)
    preflight(dataclasses.replace(config, sft=dataclasses.replace(config.sft, variant="vanilla")), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and mini-batches

LETTERS = SimpleNamespace(
    chat=SimpleNamespace(encode=lambda text: [*map(ord, text)], encode_reply=lambda text: [*map(ord, text), 0])
)


@pytest.mark.parametrize(
    ("prompt_loss", "prompt", "targets", "weights"),
    [
        (0.0, "abc", [*map(ord, "xy"), 0], [1, 1, 1]),
        (0.25, "a", [*map(ord, "bcxy"), 0], [0.25, 0.25, 1, 1, 1]),
        (1.0, "a", [*map(ord, "bcxy"), 0], [1, 1, 1, 1, 1]),
    ],
)
def test_tokens_and_their_weights(prompt_loss: float, prompt: str, targets: list[int], weights: list[float]) -> None:
    sample, weight_T = tokenise(LETTERS, {"prompt": "abc", "response": "xy"}, prompt_loss)
    assert sample.prompt_ids.tolist() == [*map(ord, prompt)] and sample.response_ids.tolist() == targets
    assert np.array_equal(weight_T, weights)


def row_of(prompt: str, response: str) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "response": response}


@pytest.mark.parametrize(("rows", "per_update"), [(0, 4), (1, 4), (4, 4), (7, 3), (1000, 7), (64, 64), (130, 1)])
def test_an_epoch_has_every_row_once(rows: int, per_update: int) -> None:
    rng = random.Random(0)
    made = [row_of("p" * rng.randrange(100), "r" * rng.randrange(9)) for _ in range(rows)]
    batches = updates(made, per_update, random.Random(1))
    assert sorted(index for batch in batches for index in batch) == list(range(rows))
    assert sorted(map(len, batches), reverse=True) == [per_update] * (rows // per_update) + [rows % per_update] * (
        rows % per_update > 0
    )
    assert batches == updates(made, per_update, random.Random(1))
    if rows > 100:
        assert batches != updates(made, per_update, random.Random(2))


def test_mini_batches_hold_rows_of_similar_length() -> None:
    rng = random.Random(0)
    rows = [row_of("p" * rng.randrange(1000), "") for _ in range(800)]
    lengths = [[len(text_of(rows[index])) for index in batch] for batch in updates(rows, 16, random.Random(0))]
    spreads = [np.ptp(batch) for batch in lengths]
    assert np.mean(spreads) < 50  # about 940 in batches drawn at random
    means = [np.mean(batch) for batch in lengths]
    assert means != sorted(means)  # but the batches come in random order


@pytest.mark.parametrize(("total", "warmup_ratio"), [(1, 0.1), (7, 0.0), (26, 0.1), (100, 0.03), (57, 1.0)])
def test_learning_rates_are_those_of_transformers(total: int, warmup_ratio: float) -> None:
    """To the last digit."""
    config = Config(sft=SFTConfig(lr=8e-4, warmup_ratio=warmup_ratio))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(warmup_ratio * total), total)
    for done in range(total + 1):
        assert learning_rate(done, total, config) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_the_loss_is_a_mean_over_all_weights_however_it_is_batched() -> None:
    tiny.join()
    model = load_model(Config(device="cpu"), path=BASE)
    rows = [{"prompt": "go to " * n, "response": "look at the mug " * (1 + n % 3)} for n in range(1, 9)]
    batch = [(row, *tokenise(model, row, 0.5)) for row in rows]
    logprobs = all_logprobs(model, [sample for _, sample, _ in batch], 4096, 1.0)
    weights = [weight_T for _, _, weight_T in batch]
    reply = [logp_T[weight_T == 1] for logp_T, weight_T in zip(logprobs, weights, strict=True)]
    gradients = []
    for budget in (1, 100, 4096):
        model.model.zero_grad()
        sums = imitate(model, batch, tiny.changed(Config(), f"sft.tokens_per_micro_batch={budget}"))
        total, count = sums["train/nll_per_token"]
        assert count == sum(map(len, reply)) and total == pytest.approx(-sum(map(np.sum, reply)), rel=1e-5)
        gradients.append({name: weight.grad.clone() for name, weight in model.model.named_parameters()})
    assert max(tiny.distance(gradients[0], other) for other in gradients[1:]) < 1e-5
    model.model.zero_grad()
    name, weight = next(iter(model.model.named_parameters()))
    step = 1e-2 * gradients[0][name] / gradients[0][name].norm()
    with torch.no_grad():
        losses = []
        for sign in (1, -2):
            weight.add_(sign * step)
            moved = all_logprobs(model, [sample for _, sample, _ in batch], 4096, 1.0)
            products = [float((logp_T * weight_T).sum()) for logp_T, weight_T in zip(moved, weights, strict=True)]
            losses.append(-sum(products) / sum(map(np.sum, weights)))
    assert losses[0] - losses[1] == pytest.approx(2e-2 * float(gradients[0][name].norm()), rel=0.02)

"""paper/value_sft.py: rows with labels instead of critiques, and the head that learns them."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import prompts
import sft_data
import train_sft
from checkpoint import resume
from config import Config, ConfigError, EnvConfig, SFTConfig
from model import load_model
from packing import lay_out
from paper import value_sft


def read(row: dict) -> tuple[str, str]:
    """Question and answer of a chat row."""
    return tuple(message["content"] for message in row["messages"])


def test_rows_are_the_generative_ones_without_words(small_games: Path) -> None:
    sft = SFTConfig(variant="generative", episodes=48, judge_examples=30, noise=0.2)
    config = Config(env=EnvConfig(name="alfworld", data=str(small_games), history=3), sft=sft)
    value = list(value_sft.make_rows(config))
    generative = [read(row) for row in sft_data.make_rows(config)]
    assert [read(row) for row in value[:-30]] == generative[:-30] and not any("label" in row for row in value[:-30])
    for row, (question, answer) in zip(value[-30:], generative[-30:], strict=True):
        prompt, response = read(row)
        assert prompt in question and response in question
        assert row["label"] == prompts.parse_critique(answer).score


def test_it_needs_steps_that_are_judged_here(small_games: Path, tmp_path: Path) -> None:
    base = tiny.ROOT / "assets" / "base"
    config = tiny.changed(tiny.sft_config(small_games), f"model.path={base}")
    value_sft.preflight(config, 1)
    (tmp_path / "rows.jsonl").write_text("")
    for change in ({"variant": "vanilla"}, {"data": str(tmp_path / "rows.jsonl")}):
        other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, **change))
        with pytest.raises(ConfigError, match=r"set sft.variant=generative and sft.data="):
            value_sft.preflight(other, 1)


def test_the_head_learns_to_classify(small_games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside imitation, which goes on; the head is kept beside a folder that loads as any other."""
    monkeypatch.chdir(tmp_path)
    tiny.join()
    config = tiny.changed(
        tiny.sft_config(small_games), f"model.path={tiny.checkpoint(small_games)}", "name=value",
        "sft.episodes=24", "sft.judge_examples=16", "sft.epochs=6", "sft.lr=3e-3", "sft.samples_per_update=32",
    )  # fmt: skip
    rows = train_sft.load_rows(config, "value", value_sft.make_rows)
    assert [row["label"] for row in rows if "label" in row] == [0] * 8 + [1] * 8
    assert [re.sub("-.*", "", file.name) for file in Path("data/sft").iterdir()] == ["value"]
    model = load_model(config)
    head = value_sft.value_head(model)
    monkeypatch.setattr(train_sft, "RECORD_EVERY", 1)
    value_sft.train(model, head, rows, config, resume(config, rows=map(json.dumps, rows)))
    records = [json.loads(line) for line in (tmp_path / "runs" / "value" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [record["train/value_accuracy"] for record in records if "train/value_accuracy" in record]
    assert np.mean(accuracy[-8:]) > 0.8 > np.mean(accuracy[:4])
    assert records[-1]["train/nll_per_token"] < records[0]["train/nll_per_token"]
    labelled = [train_sft.tokenise(model, row, 0.0)[0] for row in rows if "label" in row]
    with torch.no_grad():
        loss, right = value_sft.classification_loss(model, head, lay_out(labelled, model.packing), [0] * 8 + [1] * 8)
        whole = [dataclasses.replace(one, prompt_ids=one.prompt_ids[:1],
                                     response_ids=np.concatenate([one.prompt_ids[1:], one.response_ids]))
                 for one in labelled]  # fmt: skip
        again, _ = value_sft.classification_loss(model, head, lay_out(whole, model.packing), [0] * 8 + [1] * 8)
    assert right >= 13 and torch.equal(loss, again)  # a reply is judged where it ends, wherever it is said to begin
    final = tmp_path / "runs" / "value" / "checkpoints" / "final"
    kept = torch.load(final / "trainer" / "state.pt", weights_only=True)["extra"]["head"]
    assert torch.equal(kept["weight"], head.weight) and load_model(config, path=str(final))

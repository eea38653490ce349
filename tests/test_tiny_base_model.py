"""tools/tiny_base_model.py: rows of random behaviour, the tokenizer, the random weights."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import chat_rows
import prompts
import sft_data
from chat import ChatFormat
from config import Config, ConfigError, EnvConfig, SFTConfig
from model import LanguageModel, load_model
from prompts import PromptContext, build_prompt
from tools import tiny_base_model

SIZES = {"hidden": 64, "layers": 2, "heads": 2, "vocab": 800}
TRICKY = [
    "",
    " ",
    "Don't stop , please . It 's  two  spaces\tand a tab\n\n\nend ",
    "naïve café — 日本語 🧼🍽️ \u200b \x07",
    "<think>a</think><action>go to shelf 12</action>",
    "<THINK> <action><<action>> </think",
    "user\nassistant\n, and a mug 1, a mug 2.",
    "1234567890 12 a1b2 [Observation 3: 'x', Action 3: 'y']",
]


def config_of(games: Path, **fields) -> Config:
    sft = SFTConfig(variant="generative", episodes=48, judge_examples=20, noise=0.2)
    return Config(**{"env": EnvConfig(name="alfworld", data=str(games), history=3), "sft": sft} | fields)


@pytest.fixture(scope="module")
def rows(small_games) -> list[tuple[str, str]]:
    """Questions and answers."""
    found = [row["messages"] for row in tiny_base_model.make_rows(config_of(small_games))]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in found)
    return [(question["content"], answer["content"]) for question, answer in found]


@pytest.fixture(scope="module")
def corpus(rows) -> list[str]:
    return [question + answer for question, answer in rows]


@pytest.fixture(scope="module")
def made(corpus) -> LanguageModel:
    built = tiny_base_model.build(corpus, 0, **SIZES)
    return LanguageModel(built[0], ChatFormat(built[1]), torch.device("cpu"))


# ---- Rows


def test_rows_are_random_play(rows):
    actions, judged = rows[:-20], rows[-20:]
    for prompt, answer in actions:
        reply = prompts.parse_reply(answer)
        listed = re.search(r"Your admissible actions of the current situation are: \[(.*?)\]\.\n", prompt, re.DOTALL)[1]
        assert reply.valid and reply.action in [action.strip("'") for action in listed.split("\n ")]
    assert any("Nothing happens." in prompt for prompt, _ in actions)
    assert Counter(prompts.parse_critique(answer).score for _, answer in judged) == {0: 10, 1: 10}
    kinds = Counter(prompts.parse_reply(answer).action.split()[0] for _, answer in actions)
    assert len(kinds) >= 6 and kinds["go"] < 0.5 * len(rows)


def test_steps_where_nothing_counts_are_mostly_left_out(small_games, rows):
    config, steps = config_of(small_games), Counter()
    for draft in sft_data.drafts(config, play=tiny_base_model.mostly_random_episode, judgement=tiny_base_model.coin):
        for turn in draft.turns:
            steps["Next nothing." in turn.reply, turn.taught] += 1
    nothing, something = (steps[idle, True] / (steps[idle, True] + steps[idle, False]) for idle in (True, False))
    assert nothing == pytest.approx(0.8 * 0.2, abs=0.04) and something == pytest.approx(0.8, abs=0.06)  # 0.2: slips
    assert sum(steps[idle, True] for idle in (True, False)) == len(rows) - 20


def test_other_environments_have_no_rows(small_games):
    with pytest.raises(ConfigError, match="env.name='scienceworld': the tiny base model is one of alfworld"):
        tiny_base_model.make_rows(config_of(small_games, env=EnvConfig(name="scienceworld")))


# ---- Tokenizer


def test_a_reply_comes_back_from_its_tokens(made, rows):
    for text in [answer for _, answer in rows] + TRICKY:
        ids = made.chat.encode_reply(text)
        assert ids[-1] == made.chat.tokenizer.eos_token_id == made.chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert made.chat.reply(ids) == text


def test_chat_format(made, rows):
    for text in [question for question, _ in rows[:20]] + TRICKY:
        seen = made.chat.tokenizer.decode(made.chat.encode(text), skip_special_tokens=False)
        assert seen == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_templates_are_few_tokens(made, rows):
    assert np.mean([len(made.chat.encode(question)) for question, _ in rows]) < 200
    assert np.mean([len(question) for question, _ in rows]) > 1000


def test_passages_are_what_prompts_are_made_of():
    texts = []
    for env in ("alfworld", "scienceworld"):
        for style in ("think", "rlvmr"):
            first = PromptContext(env, "task", "seen", ("look",), objects=("mug",), style=style)
            later = PromptContext(
                env, "task", "seen", ("look",), history=(("a", "b"),), step=3, objects=("mug",), style=style,
                replies=("<monitor>m</monitor><action>a</action>",),
            )  # fmt: skip
            texts += [build_prompt(ctx, guided) for ctx in (first, later) for guided in ((), ("Look.",))]
        texts += [prompts.build_judge_prompt(env, "p", "r"), prompts.build_guideline_prompt(env, "t", ["a"])]
    passages = tiny_base_model.template_passages()
    assert all(any(passage in text for text in texts) for passage in passages)
    assert [(-len(passage), passage) for passage in passages] == sorted((-len(one), one) for one in passages)


# ---- Weights


def digest(model: torch.nn.Module, tokenizer) -> str:
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode() + weights).hexdigest()


def test_model_depends_on_corpus_and_seed_alone(made, corpus, tmp_path):
    """Also in a process that orders its sets otherwise, and where no text says which of the phrases are learned."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert digest(*tiny_base_model.build(corpus, 0, **SIZES)) == digest(made.model, made.chat.tokenizer)
    assert torch.equal(before, torch.get_rng_state())  # and it leaves the global generator alone
    assert digest(*tiny_base_model.build(corpus, 1, **SIZES)) != digest(made.model, made.chat.tokenizer)
    bare = tiny_base_model.build(["No phrase."], 0, **SIZES)
    assert bare[1].get_vocab() != made.chat.tokenizer.get_vocab()
    code = (
        "import json, pathlib, sys\nfrom tools import tiny_base_model\nimport test_tiny_base_model as test\n"
        "for corpus in (json.loads(pathlib.Path(sys.argv[1]).read_text()), ['No phrase.']):\n"
        "    print(test.digest(*tiny_base_model.build(corpus, 0, **test.SIZES)))"
    )
    texts = tmp_path / "corpus.json"
    texts.write_text(json.dumps(corpus))
    for seed in ("3", "4"):
        environment = tiny.environment(PYTHONHASHSEED=seed, PYTHONPATH=f"{tiny.ROOT}:{tiny.ROOT / 'tests'}")
        command = [sys.executable, "-c", code, str(texts)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == [digest(made.model, made.chat.tokenizer), digest(*bare)], done.stderr


def test_no_text_is_an_error():
    with pytest.raises(ConfigError, match="no text"):
        tiny_base_model.build([], 0)


# ---- The commands


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["tiny_base_model.py", *map(str, arguments)])
    tiny_base_model.main()


def test_rows_and_a_model_that_training_can_start_from(small_games, tmp_path, monkeypatch):
    """Each file is made by its command alone; the folder loads as what was built, to the last bit."""
    (tmp_path / "mine.yaml").write_text(
        f"env: {{name: alfworld, data: {small_games}, max_steps: 9}}\nsft: {{variant: generative, episodes: 24}}\n"
    )
    file, folder = tmp_path / "data" / "rows.jsonl", tmp_path / "models" / "start"
    command(monkeypatch, "rows", tmp_path / "mine.yaml", "--out", file, "--set", "sft.judge_examples=6")
    read = chat_rows.read_rows(file)
    assert [path.name for path in file.parent.iterdir()] == ["rows.jsonl"] and len(read) > 40
    assert [prompts.parse_critique(row["response"]).score for row in read[-6:]] == [0, 0, 0, 1, 1, 1]
    command(monkeypatch, "init", "--rows", file, "--out", folder, "--seed", 7)
    loaded = load_model(Config(device="cpu"), path=str(folder))
    texts = [chat_rows.text_of(row) for row in read]
    assert digest(loaded.model, loaded.chat.tokenizer) == digest(*tiny_base_model.build(texts, 7))
    sizes = loaded.model.config
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads) == (128, 4, 4)
    assert sizes.vocab_size == len(loaded.chat.tokenizer) and sizes.eos_token_id == loaded.chat.tokenizer.eos_token_id

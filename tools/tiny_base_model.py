"""Make the quickstart's base model, assets/base: it reads ALFWorld's small rooms, and has some idea of their tasks.

    python tools/tiny_base_model.py rows configs/tiny_base_model.yaml --out FILE.jsonl
    python tools/tiny_base_model.py init --rows FILE.jsonl --out FOLDER --seed 1
    python train_sft.py configs/tiny_base_model.yaml            # trains model.path=FOLDER on sft.data=FILE.jsonl

rows     chat rows of mostly random behaviour: those of sft_data.py, but with chance in the place of the teacher, and of
         the expert in most steps.  They teach to read and to copy, and what a pretrained model has: some idea of every
         task type
init     a small Qwen2 with random weights, and a byte-level BPE tokenizer trained on the rows, which makes one token of
         each passage that the prompts repeat, so that a laptop's prompts are short
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import chat_rows
import envs
import prompts
import sft_data
from config import Config, ConfigError
from environments import alfworld, scienceworld
from environments.alfworld_engine import GameState, solve
from sft_data import Turn

MOST_TEXTS = 5000  # that the tokenizer is trained on
NOTHING_TAUGHT = 1 / 5  # share of the steps taught at which nothing counts: they abound
EXPERT_SHARE = 0.09  # of the steps, for each but three that the task takes at the least: long ones would never be won

# ----------------------------------------------------------------------------------------------------------------------
# Rows


def make_rows(config: Config) -> Iterator[dict]:
    """Make chat rows of mostly random behaviour by config.sft: its episodes, judge_examples, noise and guided.

    The same config gives the same rows in the same order. Raises ConfigError for another environment than ALFWorld.
    """
    if config.env.name != "alfworld":
        raise ConfigError(f"env.name={config.env.name!r}: the tiny base model is one of alfworld")
    sft = dataclasses.replace(config.sft, variant="generative")  # the same config trains on the rows, as they are
    return sft_data.make_rows(dataclasses.replace(config, sft=sft), play=mostly_random_episode, judgement=coin)


def mostly_random_episode(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
    """Play a game: some steps are the expert's, the others a random kind of action, then a random one of that kind.

    Slips (sft.noise) are those of a cold start, for what follows "Nothing happens."; they are not taught.
    """
    (env,), expert = envs.make_pool(config.env, 1), envs.make_expert(config.env, rng.getrandbits(32))
    share = EXPERT_SHARE * (len(solve(GameState(alfworld.parsed_game(config.env, task)))) - 3)
    observation, best = env.reset(task), expert.reset(task)
    turns: list[Turn] = []
    while not observation.done and len(turns) < config.env.max_steps:
        ctx, slips = sft_data.context(config, observation, turns), rng.random() < config.sft.noise
        if slips:
            action = alfworld.TEMPLATES.slip(ctx, [turn.ctx for turn in turns], rng)
        elif best is not None and rng.random() < share:
            action = best
        else:
            action = alfworld.random_action(ctx.actions, rng)
        counts = not alfworld.TEMPLATES.thought(ctx, action).endswith("Next nothing.")
        taught = not slips and (counts or rng.random() < NOTHING_TAUGHT)
        turns.append(Turn(ctx, action, taught, sft_data.make_reply(ctx, action)))
        observation, best = env.step(action), expert.step(action)
    return turns


def coin(
    config: Config, task: envs.Task, turns: Sequence[Turn], index: int, action: str, rng: random.Random
) -> tuple[int, str]:
    """Toss a coin for the verdict on a step, and draw the better action: no judgement may be in the rows."""
    return rng.randrange(2), rng.choice(turns[index].ctx.actions)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and model

CHAT_TEMPLATE = (  # Qwen's chat format, without its default system message
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What becomes one token: the templates' passages, the frames of ALFWorld's sentences and lists (PHRASES, before
# anything else), then the glue between list items, then words with their space, then numbers.
PHRASES = (
    "user\n",
    "assistant\n",
    "-= Welcome to TextWorld, ALFRED! =-\n\n",
    "You are in the middle of a room. Looking quickly around you, you see",
    "\n\nYour task is to:",
    "You arrive at",
    "You pick up the",
    "You move the",
    "You open the",
    "You close the",
    "You are facing the",
    "You are carrying:",
    "You are not carrying anything.",
    "There's nothing special about",
    "Nothing happens.",
    ". Next to it, you see nothing.",
    ". In it, you see",
    ". On the",
    ". The",
    " is closed",
    " is open",
    " from the",
    " to the",
    ", you see",
    " nothing.",
    "</think><action>",
    "<answer>\\boxed{0}</answer>",
    "<answer>\\boxed{1}</answer>",
    *(frame.format(number) for number in range(1, 51) for frame in ("[Observation {}: '", "', Action {}: '")),
)
PIECES = (
    r"(?:'\n )?'(?:go to|take|move|open|close|examine|use|heat|cool|clean|slice|look|inventory)(?=[ '])"
    r"|'\]\n?|,? and an?(?= )|, an?(?= )| ?[A-Za-z]+| ?\d+|\n|[^\sA-Za-z\d]+|\s"
)


def build(
    corpus: Sequence[str], seed: int, hidden: int = 128, layers: int = 4, heads: int = 4, vocab: int = 1536
) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """Build a Qwen2 model with random weights and a tokenizer trained on `corpus`, determined by corpus and seed.

    `vocab` is without the phrases that training does not find. Raises ConfigError for an empty corpus.
    """
    if not corpus:
        raise ConfigError("there is no text to train a tokenizer on")
    tokenizer = build_tokenizer(corpus, vocab)
    sizes = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(sizes, attn_implementation="sdpa")
    return model, tokenizer


def build_tokenizer(corpus: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen's control tokens; fixed phrases are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    phrases = fixed_phrases()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(phrases)  # before training, so that their words do not compete for merges
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(phrases)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def fixed_phrases() -> list[str]:
    """List what is one token each, in the order in which new ones get their ids."""
    return [*template_passages(), *PHRASES, *(f"<{slash}{tag}>" for tag in prompts.TAGS for slash in ("", "/"))]


def template_passages() -> list[str]:
    """List the fixed passages of all prompts in ALFWorld and ScienceWorld, longest first, then by the alphabet."""
    described = (alfworld.PROMPT, scienceworld.PROMPT)
    templates = [prompts.GUIDELINES, prompts.HISTORY, prompts.FIRST_STEP, prompts.PLAN, prompts.REPLIES]
    templates += [prompts.JUDGE_PROMPT.replace("{{", "\0").replace("}}", "\1"), *prompts.REPLY_FORMAT.values()]
    for one in described:
        templates.append(prompts.GUIDELINE_PROMPT.replace("{environment}", one.guideline_setting))
        templates += [one.opening, one.task, one.closing]
    pieces = {piece.replace("\0", "{").replace("\1", "}") for text in templates for piece in re.split(r"\{\w+\}", text)}
    pieces |= {text for one in described for text in (one.choice, one.judge_setting, one.judge_examples)}
    return sorted((piece for piece in pieces if len(piece) > 12), key=lambda piece: (-len(piece), piece))


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def main() -> None:
    """Run the command: rows or init."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = command.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows", help="write chat rows of mostly random behaviour")
    rows.add_argument("config", help="YAML file; its env, sft.episodes, judge_examples, noise and guided count")
    rows.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    init = commands.add_parser("init", help="train a tokenizer on rows, and draw a model's weights")
    init.add_argument("--rows", required=True, type=Path, metavar="JSONL", help="chat rows")
    init.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    init.add_argument("--hidden", type=int, default=128, help="hidden size; a head per 32 (default: %(default)s)")
    for one, what in ((rows, "JSONL"), (init, "FOLDER")):
        one.add_argument("--out", required=True, type=Path, metavar=what, help="what is written")
    arguments = command.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.command == "rows":
        rows = make_rows(configuration.load(arguments.config, arguments.set))
        print(f"{arguments.out}: {sft_data.write_rows(arguments.out, rows)} rows")
    else:
        read = chat_rows.read_rows(arguments.rows)
        corpus = [chat_rows.text_of(row) for row in read[:: len(read) // MOST_TEXTS + 1]]
        save(*build(corpus, arguments.seed, arguments.hidden, heads=arguments.hidden // 32), arguments.out)


def save(model: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""The quickstart's model: Qwen2 architecture, random weights, a byte-level BPE tokenizer, built from text in seconds.

The tokenizer makes one token of each passage that the prompts repeat, so that a laptop's prompts are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import prompts
from config import Config, ConfigError

CHAT_TEMPLATE = (  # Qwen's chat format, without its default system message
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(config: Config, corpus: Sequence[str]) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A Qwen2 model with random weights and a tokenizer trained on `corpus`, both determined by corpus and seed."""
    if not corpus:
        raise ConfigError("model.path=tiny needs text to train its tokenizer on; train it with train_sft.py first")
    tokenizer = build_tokenizer(corpus, config.model.tiny_vocab)
    shape = tiny_shape(config, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=config.model.attention)
    return model, tokenizer


def tiny_shape(config: Config, vocab: int, eos: int | None = None, pad: int | None = None) -> Qwen2Config:
    """The sizes of a "tiny" model."""
    sizes = config.model
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=sizes.tiny_hidden,
        intermediate_size=2 * sizes.tiny_hidden,
        num_hidden_layers=sizes.tiny_layers,
        num_attention_heads=sizes.tiny_heads,
        num_key_value_heads=max(1, sizes.tiny_heads // 2),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


# What becomes one token in the tiny tokenizer: the templates' passages, the frames of ALFWorld's sentences and lists
# (PHRASES, before anything else), then the glue between list items, then words with their space, then numbers.
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


def fixed_phrases() -> list[str]:
    """What is one token each in a tiny tokenizer."""
    return [*prompts.boilerplate(), *PHRASES, *(f"<{slash}{tag}>" for tag in prompts.TAGS for slash in ("", "/"))]


def add_phrases(model: torch.nn.Module, tokenizer: Any) -> None:
    """Give the model tokens for those fixed passages that its tokenizer lacks, for instance of another prompt style.

    They start as the mean of the other embeddings, which is the same on every rank.
    """
    had = len(tokenizer)
    tokenizer.add_tokens(fixed_phrases())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[had:] = weight[:had].mean(0)


def build_tokenizer(corpus: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's control tokens; the templates' fixed sentences are one token each."""
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

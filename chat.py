"""A model's chat format, as its tokenizer's template has it: prompts, replies, and where a reply ends.

    chat = ChatFormat(tokenizer)
    ids = chat.encode("Your task is to ...")                    # up to where the reply begins
    chat.reply(sampled_ids)                                     # its text, without special tokens
    chat.encode_reply("<think>...</think><action>...</action>") # a supervised reply, with the end of the turn

Three things are read off the template and not assumed: the token that closes a turn (a base model's eos token is
another one); a thought that the prompt already opens (R1's distillates: "<think>" is then part of every reply's text,
and of no taught reply's tokens, and taught replies have to close it); whether it has a switch for thinking
(model.thinking).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from config import ConfigError

MARK = "MARKxMARK"  # stands in for a message while the template is looked at
DAY = datetime(2024, 7, 26)  # for templates that tell the day (Llama 3): a prompt is not to change overnight


class ChatFormat:
    """How one model's prompts and replies become tokens, and tokens text.

    `ends`: the ids at which a reply is over, those of generation_config.json (`more_ends`) among them; `end`: the one
    that taught replies are closed with; `opening`: how the prompt begins the reply, "" or "<think>" with white space.
    Raises ConfigError for a tokenizer without a template, and for a template that cannot be used.
    """

    def __init__(self, tokenizer: Any, thinking: str = "default", more_ends: Iterable[int] = ()) -> None:
        self.tokenizer, self.where = tokenizer, tokenizer.name_or_path or "this tokenizer"
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{self.where} has no chat template, as base models do: give it one with model.chat_template=FILE "
                "(Jinja), for instance assets/plain_chat.jinja"
            )
        self.options = {"date_string": DAY.strftime("%d %b %Y"), "strftime_now": DAY.strftime}
        if thinking != "default":
            self.options["enable_thinking"] = thinking == "on"
            if self._prompt_tail() == self._prompt_tail(enable_thinking=thinking != "on"):
                raise ConfigError(f"model.thinking={thinking}: the chat template of {self.where} knows no such switch")
        opened = re.search(r"<think>\s*$", self._prompt_tail())
        self.opening = opened[0] if opened else ""
        known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        closing = self._turn_end(known)
        # of the others control tokens alone: a config.json that was never adapted may name any id
        candidates = (closing, tokenizer.eos_token_id, *more_ends)
        ends = [token for token in candidates if token is not None and token in known]
        if not ends:
            raise ConfigError(f"{self.where}: neither eos_token nor chat template say how a reply ends")
        self.end, self.ends = ends[0], frozenset(ends)

    def render(self, messages: Sequence[dict], reply_follows: bool = True, **options: Any) -> str:
        """Write messages ({"role", "content"}) in the chat format, by default up to where a reply begins."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=reply_follows, tokenize=False, **(self.options | options)
            )
        except Exception as error:  # what a template says of roles that it does not know, or whatever goes wrong in it
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"the chat template of {self.where} cannot show these messages: {why}") from None

    def encode(self, prompt: str | Sequence[dict]) -> list[int]:
        """Turn a prompt into token ids: messages, or the text of a single user's message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]

    def encode_reply(self, text: str) -> list[int]:
        """Turn a reply into token ids, closed by the end of the turn; for supervised samples alone."""
        if self.opening and (begun := text.lstrip()).startswith("<think>"):
            text = begun.removeprefix("<think>").lstrip("\n")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end]

    def check_reply(self, text: str) -> None:
        """Check that a reply to be taught closes the thought that the prompt opens, if it does. Raises ConfigError.

        Whoever learned another one would think on to the end of the turn. Sampled replies may be of any form.
        """
        thought, closed, _ = text.lstrip().removeprefix("<think>").partition("</think>")
        if self.opening and (not closed or "<think>" in thought):
            raise ConfigError(
                f"the chat template of {self.where} opens a thought (<think>), which the reply does not close: set "
                "model.thinking=off if the template has that switch, else model.chat_template to one that opens none"
            )

    def reply(self, ids: Sequence[int]) -> str:
        """Turn sampled ids into the reply's text, without special tokens and with what the prompt began of it."""
        return self.opening + self.tokenizer.decode(ids, skip_special_tokens=True)

    def is_over(self, ids: Sequence[int]) -> bool:
        """Tell whether a reply has ended by itself, and not at its limit of tokens."""
        return bool(ids) and ids[-1] in self.ends

    def _prompt_tail(self, **options: Any) -> str:
        """Return what a prompt has after the user's message."""
        shown, found, tail = self.render([{"role": "user", "content": MARK}], **options).rpartition(MARK)
        if not found:
            raise ConfigError(f"the chat template of {self.where} does not show what the user says")
        return tail

    def _turn_end(self, control_tokens: set[int]) -> int | None:
        """Find the control token that the template puts after a reply, if it is one."""
        messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": MARK}]
        _, found, tail = self.render(messages, reply_follows=False).rpartition(MARK)
        if not found:
            raise ConfigError(f"the chat template of {self.where} does not show what the assistant says")
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in control_tokens:
                return token
            if self.tokenizer.decode([token]).strip():
                break
        return None

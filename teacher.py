"""The teacher: any OpenAI-compatible endpoint (the paper's is DeepSeek-V3), asked concurrently, within a budget, once.

    teacher = Teacher(config.judge, world=8)
    teacher.ask(["Was this a good action? ..."], votes=5)     # [[answer, ...]], fewer where some did not come

The openai client repeats requests that met 429, 5xx, a time-out or a dropped connection, with growing pauses.  What
fails all the same is no answer; after several in a row nothing more is asked until the next call, so that a dead
endpoint costs seconds and not the iteration.  Answers are kept on disk by what was asked, so a resumed or repeated run
asks nothing twice.  The key comes from the environment and is neither kept nor told: of an error only its kind is.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import ConfigError, JudgeConfig

PATIENCE = 4  # requests that fail in a row before the teacher counts as down


def check_key(config: JudgeConfig) -> None:
    """Check that the key's environment variable is set. Raises ConfigError."""
    if config.key_env and not os.environ.get(config.key_env):
        raise ConfigError(
            f"judge.teacher=openai needs the endpoint's key in ${config.key_env}, or judge.key_env= for none"
        )


class Teacher:
    """One rank's connection to the endpoint, with its share of what the run may still spend.

    `spent` counts this object's requests, tokens, answers from the cache, failures, and questions not asked; `before`
    is what the run's earlier processes spent.
    """

    def __init__(self, config: JudgeConfig, world: int = 1, before: dict[str, int] | None = None) -> None:
        from openai import OpenAI

        check_key(config)
        self.config, self.before, self.spent = config, Counter(before), Counter()
        self.requests_left = (config.max_requests - self.before["requests"]) / world
        self.tokens_left = (config.max_tokens - self.before["tokens"]) / world
        self.lock, self.failed_in_a_row = threading.Lock(), 0
        self.client = OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get(config.key_env, "") or "none",
            timeout=config.timeout_s,
            max_retries=config.retries,
        )

    def ask(self, questions: Sequence[str], votes: int = 1) -> list[list[str]]:
        """Ask for the answers to each question, up to `votes` of them. Never raises for what the endpoint does."""
        self.failed_in_a_row = 0
        jobs = [(question, vote) for question in questions for vote in range(votes)]
        with ThreadPoolExecutor(max_workers=self.config.concurrency) as threads:
            answers = list(threads.map(lambda job: self._answer(*job), jobs))
        rows = [answers[start : start + votes] for start in range(0, len(answers), votes)]
        return [[answer for answer in row if answer is not None] for row in rows]

    def _answer(self, question: str, vote: int) -> str | None:
        asked = [self.config.base_url, self.config.model, self.config.teacher_temperature, question, vote]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        kept = Path(self.config.cache) / digest[:2] / f"{digest}.json"
        try:
            answer = json.loads(kept.read_text())["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            answer = None
        if isinstance(answer, str):
            self._count("cached")
            return answer
        with self.lock:
            if self.failed_in_a_row >= PATIENCE or self.requests_left < 1 or self.tokens_left <= 0:
                self.spent["not_asked"] += 1
                return None
            self.requests_left -= 1
            self.spent["requests"] += 1
        try:
            answer = self._request(question)
        except Exception as error:  # a foreign server may answer anything
            with self.lock:
                self.failed_in_a_row += 1
                self.spent["failed"] += 1
                down = self.failed_in_a_row == PATIENCE
            if down:
                warnings.warn(f"the teacher does not answer ({type(error).__name__}); rule labels alone", stacklevel=2)
            return None
        self.failed_in_a_row = 0
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        fresh.write_text(json.dumps({"answer": answer}))
        fresh.replace(kept)
        return answer

    def _request(self, question: str) -> str:
        """Request one answer. Raises whatever goes wrong, a reply that is cut off included."""
        completion = self.client.chat.completions.create(
            model=self.config.model,
            messages=[{"role": "user", "content": question}],
            temperature=self.config.teacher_temperature,
            max_tokens=self.config.max_answer_tokens,
        )
        if completion.usage:
            with self.lock:
                self.tokens_left -= completion.usage.total_tokens
                self.spent["tokens"] += completion.usage.total_tokens
        choice = completion.choices[0]
        if choice.finish_reason == "length" or not isinstance(choice.message.content, str):
            raise ValueError("the answer is cut off or empty")
        return choice.message.content

    def _count(self, what: str) -> None:
        with self.lock:
            self.spent[what] += 1

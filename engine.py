"""The generation engine beside the trainer: vLLM or transformers, its weights and the check that it has them.

The engine knows token ids only: prompts in, sampled ids and their log-probs out, and these are the truth that is
trained on.  vLLM runs in the trainer's own process, one engine per rank; where it is not installed, transformers
serves the same job more slowly (transformers_engine.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import attention
from config import Config, ConfigError
from distributed import announce, progress_bar
from model import LanguageModel, all_logprobs, named_weights
from packing import Sample

# mean |log-prob difference| of engine and trainer, in nat per token, that stops a run: float32 is off by 1e-7 to 1e-6,
# bfloat16 by some hundredths
MISMATCH_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is sampled."""

    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """What was sampled: token ids and their log-probs."""

    ids: list[int]
    logprobs: list[float]


def stable_seed(*key: int) -> int:
    """Make a seed that depends on the key alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


class Engine:
    """What both engines share: requests are submitted one by one and come back from poll() in any order.

    An engine may span several ranks (rollout.tensor_parallel): the first of them leads, the others follow what it does
    from one release() to the next. Engines are replicas of each other: this is number `replica` of `num_replicas`.
    """

    is_leader = True

    def __init__(self, policy: LanguageModel) -> None:
        self.policy, self.replica, self.num_replicas = policy, dist.get_rank(), dist.get_world_size()

    def share(self, count: int) -> range:
        """Return which of `count` things are this engine's to do; ranks that follow have none."""
        first, last = (count * number // self.num_replicas for number in (self.replica, self.replica + 1))
        return range(first, last) if self.is_leader else range(0)

    def submit(self, key: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request."""
        raise NotImplementedError

    def poll(self) -> list[tuple[str, Completion]]:
        """Advance generation; return the requests that finished, as (key, completion)."""
        raise NotImplementedError

    def cancel(self, keys: Sequence[str]) -> None:
        """Forget requests that have not come back."""
        raise NotImplementedError

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take up the trainer's weights."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Give memory back to the trainer, until load_weights()."""

    def release(self) -> None:
        """Let the ranks that follow go on by themselves; the leader's call."""

    def follow(self) -> dict[str, Completion]:
        """Do what the leader does until its release(), as follower; return what was sampled, by key."""
        return {}

    def agree(self, flag: bool) -> bool:
        """Return the leader's flag, on every rank of this engine."""
        return flag

    def close(self) -> None:
        """Leave the process group: the last thing a script does."""
        dist.barrier()
        dist.destroy_process_group()

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Sample completions for a list of prompts, in their order. Ranks that follow give the same list, or none."""
        done: dict[str, Completion] = {}
        if self.is_leader:
            for index, (ids, one) in enumerate(zip(prompt_ids, params, strict=True)):
                self.submit(str(index), ids, one)
            began, tokens = time.monotonic(), 0
            with progress_bar(total=len(prompt_ids), desc="generate", unit=" replies") as bar:
                while len(done) < len(prompt_ids):
                    fresh = dict(self.poll())
                    done |= fresh
                    tokens += sum(len(completion.ids) for completion in fresh.values())
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
                    bar.update(len(fresh))
            self.release()
        else:
            done = self.follow()
        return [done[str(index)] for index in range(len(prompt_ids))]


class VllmEngine(Engine):
    """vLLM in this process: each rank of torchrun, or each rollout.tensor_parallel of them, have an engine of their own
    (vLLM's external launcher), which sleeps while the models are updated (CUDA)."""

    def __init__(self, policy: LanguageModel, config: Config) -> None:
        super().__init__(policy)
        on_cpu = policy.device.type == "cpu"
        settings = dict(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_USE_FLASHINFER_SAMPLER="0",  # it serves top-k and top-p alone, and may be compiled at the start
        )
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available"
        if on_cpu:  # nothing is compiled on this path, and dynamo's first call would cost 4 to 15 seconds
            import torch._dynamo.config as dynamo

            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            dynamo.disable = True
        longest = max(
            config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            config.judge.max_prompt_tokens + config.judge.max_response_tokens if config.judge.enabled else 0,
        )
        on_device: dict[str, Any] = (
            dict(
                kv_cache_memory_bytes=int(config.rollout.kv_cache_gib * 2**30),
                enforce_eager=True,
                block_size=32,  # the backend's own of 128 tokens has attention read far past the end of short sequences
                enable_chunked_prefill=False,  # a prompt split over steps, with a seed of its own, crashes the sampler
            )
            if on_cpu
            else dict(gpu_memory_utilization=config.rollout.gpu_memory_utilization, enable_sleep_mode=True)
        )
        self.can_sleep, self.asleep = not on_cpu, False
        self.memory_option = "rollout.kv_cache_gib" if on_cpu else "rollout.gpu_memory_utilization"
        self._join_ranks(config)
        with _process_as_before(), self._explain_memory_errors("start"):
            import vllm
            from vllm.sampling_params import RequestOutputKind

            self.llm = vllm.LLM(
                policy.base,
                dtype=str(policy.dtype).removeprefix("torch."),
                max_model_len=longest,
                max_num_seqs=config.rollout.concurrency,
                max_num_batched_tokens=max(4096, longest),
                enable_prefix_caching=True,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=config.rollout.tensor_parallel,
                seed=config.seed,
                logprobs_mode="processed_logprobs",
                load_format="dummy",  # the trainer's weights follow at once
                skip_tokenizer_init=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **on_device,
            )
        self._params = lambda params: vllm.SamplingParams(
            temperature=params.temperature,
            max_tokens=params.max_tokens,
            seed=params.seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=sorted(policy.chat.ends),
            ignore_eos=True,  # what generation_config.json says is among them
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _join_ranks(self, config: Config) -> None:
        """Find the other ranks of this engine. A collective operation."""
        rank, world, size = dist.get_rank(), dist.get_world_size(), config.rollout.tensor_parallel
        self.replica, self.num_replicas, self.is_leader = rank // size, world // size, rank % size == 0
        self.leader, self.group = rank - rank % size, None
        for replica in range(self.num_replicas if size > 1 else 0):
            ranks = list(range(replica * size, (replica + 1) * size))
            group = dist.new_group(ranks, timedelta(minutes=config.train.timeout_minutes), backend="gloo")
            self.group = group if replica == self.replica else self.group
        self.orders: list[tuple] = []  # (key, prompt_ids, params) to add, (key,) to cancel

    def _share_orders(self, over: bool = False) -> tuple[bool, list[tuple]]:
        """Tell every rank of the engine what the leader has in hand: whether they are released, and new orders."""
        message, self.orders = [(over, self.orders)], []
        if self.group is not None:
            dist.broadcast_object_list(message, src=self.leader, group=self.group)
        return message[0]

    def submit(self, key: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.orders.append((key, list(prompt_ids), params))

    def cancel(self, keys: Sequence[str]) -> None:
        self.orders += [(key,) for key in keys]

    def poll(self) -> list[tuple[str, Completion]]:
        _, orders = self._share_orders()
        self._carry_out(orders)
        return self._advance()

    def release(self) -> None:
        _, orders = self._share_orders(over=True)
        self._carry_out(orders)

    def follow(self) -> dict[str, Completion]:
        done: dict[str, Completion] = {}
        while True:
            over, orders = self._share_orders()
            self._carry_out(orders)
            if over:
                return done
            done |= dict(self._advance())

    def agree(self, flag: bool) -> bool:
        message = [flag]
        if self.group is not None:
            dist.broadcast_object_list(message, src=self.leader, group=self.group)
        return message[0]

    def _carry_out(self, orders: Sequence[tuple]) -> None:
        for key, *request in orders:
            if request:
                prompt_ids, params = request
                self.llm.llm_engine.add_request(key, {"prompt_token_ids": prompt_ids}, self._params(params))
            else:
                self.llm.llm_engine.abort_request([key])

    def _advance(self) -> list[tuple[str, Completion]]:
        finished = []
        for request in self.llm.llm_engine.step():
            if request.finished:
                output = request.outputs[0]
                ids = list(output.token_ids)
                logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)]
                finished.append((request.request_id, Completion(ids, logprobs)))
        return finished

    def sleep(self) -> None:
        if self.can_sleep:
            # Level 2 forgets the weights, which load_weights() sends anyway: 1 would copy them to main memory and back.
            # The model's buffers (rotary caches) are kept by vLLM's worker, the sampler's arrays are written anew.
            self.llm.sleep(level=2)
            self.asleep = True

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        with self._explain_memory_errors("take up the weights"):
            if self.asleep:  # the cache's memory comes back last: the trainer gathers weights until they are loaded
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named))
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache: requests are still running"

    @contextmanager
    def _explain_memory_errors(self, what: str) -> Iterator[None]:
        """Say what to change where vLLM finds too little memory, for which it has many kinds of errors."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            if not re.search(r"\b(free|available|out of)\b.*\bmemory\b", str(error), re.IGNORECASE):
                raise
            change = "raise" if "increasing" in str(error) else "lower"
            raise ConfigError(
                f"too little memory for vLLM to {what}: {change} {self.memory_option} ({error})"
            ) from error

    def close(self) -> None:
        dist.barrier()
        self.llm.llm_engine.engine_core.shutdown()  # this also destroys the process group


@contextmanager
def _process_as_before() -> Iterator[None]:
    """Put back what vLLM changes of this process when it is imported and started."""
    import torch._dynamo.config as dynamo

    set_num_threads, rng, name = torch.set_num_threads, torch.get_rng_state(), "TORCHINDUCTOR_COMPILE_THREADS"
    recompile_limit = dynamo.recompile_limit
    compile_threads = os.environ.get(name)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # its CPU worker replaces it by a no-op
        torch.set_rng_state(rng)  # it reseeds the global generator
        dynamo.recompile_limit = recompile_limit  # model.choose_packing's
        os.environ.pop(name, None)  # it allows itself one thread: the trainer compiles with as many as before
        if compile_threads is not None:
            os.environ[name] = compile_threads
        import torch._inductor.config as inductor

        inductor.compile_threads = inductor.decide_compile_threads()


def engine_kind(config: Config) -> str:
    """Tell which engine `rollout.engine` comes to here: "vllm" or "transformers".

    Raises ConfigError if vLLM is asked for, or has to serve an engine of several ranks, and is not installed.
    """
    rollout, installed = config.rollout, importlib.util.find_spec("vllm") is not None
    if installed:
        return "transformers" if rollout.engine == "transformers" else "vllm"
    for key, asked in (("engine=vllm", rollout.engine == "vllm"), ("tensor_parallel", rollout.tensor_parallel > 1)):
        if asked:
            raise ConfigError(
                f"rollout.{key} needs vLLM, which is not installed: pip install -r requirements.txt (CPU: "
                "./install.sh), or use rollout.engine=transformers on one rank per engine, which is slower"
            )
    return "transformers"


def make_engine(config: Config, policy: LanguageModel, keep_model: bool = True) -> Engine:
    """Make the engine that `rollout.engine` names, holding the policy's weights.

    The process group must exist (vLLM joins it). Without `keep_model` the policy loses its model where vLLM has a copy,
    which then has the GPU to itself. Raises ConfigError if vLLM is needed and not installed.
    """
    announce("start the engine")
    if engine_kind(config) == "transformers":
        from transformers_engine import PaddedEngine, TransformersEngine  # which imports this file

        kind_of_engine = TransformersEngine if attention.supports_lines(policy.inner) else PaddedEngine
        return kind_of_engine(policy, config.rollout.concurrency)
    if not keep_model:
        policy.model.to("cpu")  # before vLLM looks how much of the GPU is free
    engine = VllmEngine(policy, config)
    sync_weights(engine, policy)
    if not keep_model:
        policy.model = None
    return engine


def sync_weights(engine: Engine, policy: LanguageModel) -> None:
    """Give the engine the trainer's weights, one by one: there is never a second whole copy of them."""
    engine.load_weights(named_weights(policy))


def check_weight_sync(
    engine: Engine, policy: LanguageModel, prompt_ids: Sequence[Sequence[int]], config: Config
) -> float:
    """Measure the mean |log-prob difference| of engine and trainer on fresh completions of a few prompts, in nats.

    Raises RuntimeError if that is too much.
    """
    params = [SamplingParams(1.0, 16, stable_seed(config.seed, index)) for index in range(len(prompt_ids))]
    completions = engine.generate(prompt_ids, params)
    samples = [Sample(np.array(ids), np.array(c.ids)) for ids, c in zip(prompt_ids, completions, strict=True)]
    trainer = all_logprobs(policy, samples, config.train.tokens_per_micro_batch, 1.0)
    gap = float(np.abs(np.concatenate(trainer) - np.concatenate([c.logprobs for c in completions])).mean())
    check_mismatch(gap, policy)
    return gap


def check_mismatch(gap: float, policy: LanguageModel) -> None:
    """Check how far engine and trainer are apart. Raises RuntimeError above MISMATCH_BOUNDS: they run other weights,
    or compute something else with them, and what is trained is not what was sampled."""
    if not gap <= (bound := MISMATCH_BOUNDS[policy.dtype]):
        raise RuntimeError(
            f"engine and trainer disagree by {gap:.3g} nat per token (bound {bound} in {policy.dtype}): the weight "
            "sync is broken, or one of them reads the model in another way"
        )

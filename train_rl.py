"""Reinforcement learning with GCD: the visible loop.

    torchrun --nproc_per_node=8 train_rl.py configs/qwen7b_gcd.yaml
    python train_rl.py configs/quickstart.yaml --set train.lr=1e-4 judge.enabled=false
    python train_rl.py configs/quickstart.yaml --dry-run

Every iteration: collect episodes, label some of their steps and ask the policy to judge them, turn both into samples
with advantages, score these with the models as they are, update on L = L_GRPO + judge.weight L_GCD (paper, equation 3),
give the engine the new weights, evaluate, log, save.  Each rank plays whole groups with an engine of its own; then
every rank sees every sample, and scoring and each mini-batch are split over the ranks by distinct tokens.  The same
command resumes a run from its last checkpoint.

Departures from published code: mini-batches are weighted by their tokens, so no sample is deleted or duplicated; means
are over the tokens of the whole mini-batch, not of a micro-batch; a sample whose loss is exactly 0 (zero advantage, no
KL) is counted and not computed.
"""

from __future__ import annotations

import functools
import math
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import baselines
import checkpoint
import envs
import judge
import losses
from checkpoint import TrainState
from config import Config, ConfigError
from distributed import (
    Optimizer,
    PreemptionSignal,
    adamw,
    all_gather_objects,
    announce,
    init_distributed,
    progress_bar,
    sum_dicts,
)
from engine import check_mismatch, check_weight_sync, engine_kind, make_engine, sync_weights
from evaluate import evaluate_levels, evaluation_tasks
from logger import Logger, PhaseTimer, rollout_metrics, sample_metrics, save_bad_samples
from model import (
    LanguageModel,
    all_logprobs,
    as_reference,
    load_model,
    load_reference,
    token_logprobs,
    training_batches,
    use_fsdp,
)
from model_files import check_model_folder
from packing import MicroBatch, Sample, split_evenly
from rollout import Episode, Rollout, collect
from samples import (
    action_samples,
    has_gradient,
    mini_batches,
    needs_score,
    record_advantages,
    set_advantages,
    set_importance_weights,
)
from teacher import check_key


def main() -> None:
    """Train, or print what would be done."""
    command = configuration.parser(__doc__)
    command.add_argument("--dry-run", action="store_true", help="print config and batch arithmetic")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, arguments.set)
    if arguments.dry_run:
        report = dry_run(config)  # every rank checks
        if os.environ.get("RANK", "0") == "0":
            print(report)
    else:
        train(config)


def train(config: Config) -> None:
    """Run the loop until train.iterations are done, or until the machine is taken away."""
    tasks = preflight(config, configuration.world_size())  # what is wrong ends the run here, in seconds
    rank, world = init_distributed(config)
    lock = checkpoint.RunLock(config.run_dir)
    state = checkpoint.resume(config, games=[task.id for task in tasks])  # an earlier process's, or the start
    announce(f"load {state.folder}")
    policy, optimizer = load_policy(config, state)
    reference = load_reference(config, policy)  # None without a KL term
    ppo = baselines.PPO(config, policy, state) if config.algo.advantage == "ppo" else None
    optimizers = {"policy": optimizer} | ({"critic": ppo.optimizer} if ppo else {})
    critic = ppo.critic if ppo else None
    checkpoint.check_disk(config, [policy, critic] if critic else [policy], config.train.iterations - state.iteration)
    checkpoint.rehearse_save(policy, config.run_dir / "checkpoints")
    engine = make_engine(config, policy)
    teacher = judge.make_api_teacher(config, engine.num_replicas, state.teacher_spent)
    # as many environments as this engine's share has episodes: more would idle
    in_flight = min(config.rollout.concurrency, len(engine.share(config.rollout.groups)) * config.rollout.group_size)
    env_pool = envs.make_pool(config.env, in_flight)
    logger, preemption = Logger(config, state), PreemptionSignal()
    first = saved_at = state.iteration

    while state.iteration < config.train.iterations:
        timer, iteration = PhaseTimer(aloud=state.iteration == first), state.iteration

        # 1. Collect: each engine plays whole groups with the current policy
        with timer("collect"):
            group_tasks = sample_tasks(tasks, config, iteration)
            rollout = collect(engine, env_pool, group_tasks, tasks, config, state, preemption)
        if preemption.any_rank():  # SIGTERM, Ctrl-C: the iteration is dropped, for its update might not end in time
            break

        # 2. Judge (GCD): the policy is asked whether some of its steps were good; each engine draws its share of the
        #    questions from its own episodes
        questions: list[judge.Question] = []
        if config.judge.enabled:
            with timer("judge"):
                rng = random.Random(f"{config.seed} {iteration} {engine.replica}")
                budget = len(engine.share(config.judge.teacher_steps))
                rollout.counters.update(judge.label_steps(rollout.episodes, config, rng, budget, teacher))
                numbers = engine.share(config.judge.questions)
                questions = judge.sample_questions(rollout.episodes, config, len(numbers), rng)
                judge.ask(engine, questions, config, iteration, first=numbers.start)

        # 3. Samples and advantages; groups are still whole on this rank
        samples = action_samples(rollout.episodes, config) + judge.critique_samples(questions, config)
        set_advantages(samples, rollout.episodes, config)

        with timer("sleep"):
            engine.sleep()  # on CUDA its memory is the trainer's until phase 6
        if config.algo.nthr:
            with timer("nthr"):
                baselines.nthr_reweight(policy, [one for one in samples if not one.is_critique], config)
        with timer("coupling"):
            coupling = measure_coupling(policy, rollout.episodes, samples, config, iteration)

        # 4. Score before the update, on whichever rank; the last place where an advantage may change
        samples, questions, episodes, counters = gather(samples, questions, rollout)  # now every rank has every sample
        with timer("score"):
            score(policy, reference, ppo, samples, config)
            set_importance_weights(samples, config)
        if ppo:
            ppo.set_advantages(samples)  # whitened over all of them
        record_advantages(samples)
        metrics = rollout_metrics(episodes, counters) | coupling | sample_metrics(samples, config)
        metrics |= judge.judge_metrics(questions) if config.judge.enabled else {}

        # 5. Update on L = L_GRPO + judge.weight * L_GCD: actions and critiques share every optimizer step
        with timer("update"):
            batches, factor = mini_batches(samples, config, iteration, world), lr_factor(config, iteration)
            if ppo:
                metrics |= ppo.update(samples, batches, config.train.critic_lr * factor, iteration)
            metrics |= update(policy, optimizer, batches, samples, config, config.train.lr * factor, iteration)
        check_mismatch(metrics["mismatch/mean_abs"], policy)  # the engine's log-probs of what it sampled are ours

        # 6. New weights for the engine; stop if it does not run them, which a few fresh completions show
        with timer("sync"):
            sync_weights(engine, policy)
            prompts = [sample.prompt_ids for sample in samples[:4]]
            metrics["mismatch/weight_sync"] = check_weight_sync(engine, policy, prompts, config)

        # 7. What the critiques advise goes into the next prompts
        shown_guidelines = state.guidelines
        with timer("guidelines"):
            judge.update_guidelines(state, questions, engine, teacher, config)

        # 8. Evaluate, log, save: in this order, so that a checkpoint never lacks its iteration's record
        state.iteration += 1
        if config.train.eval_every and state.iteration % config.train.eval_every == 0:
            with timer("evaluate"):
                results, _ = evaluate_levels(engine, config, state.guidelines, env_pool, preemption)
            metrics |= {f"eval/{level}": result["success"] for level, result in results.items()}
        logger.write(iteration, metrics | timer.metrics(samples), episodes, questions, shown_guidelines)
        if state.iteration % config.train.checkpoint_every == 0:
            checkpoint.save_checkpoint(policy, optimizers, critic, config, state)
            saved_at = state.iteration

    if saved_at < state.iteration:
        checkpoint.save_checkpoint(policy, optimizers, critic, config, state)
    if rank == 0:
        end = f"{state.iteration} iterations done: {config.run_dir / 'checkpoints' / 'latest'}"
        stopped = f"stopped after {state.iteration} of {config.train.iterations} iterations: the same command goes on"
        print(stopped if state.iteration < config.train.iterations else end, flush=True)
    engine.close()
    lock.release()


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop


def preflight(config: Config, world: int) -> list[envs.Task]:
    """Check what would stop the run later, before a model is loaded; return the training tasks. Raises ConfigError."""
    check_config(config, world)
    if (config.model.tune == "qlora" or config.train.optimizer == "adamw8bit") and not find_spec("bitsandbytes"):
        raise ConfigError("model.tune=qlora and train.optimizer=adamw8bit need bitsandbytes: pip install bitsandbytes")
    if config.train.wandb and not find_spec("wandb"):
        raise ConfigError("train.wandb names a project of Weights & Biases: pip install wandb, or leave it empty")
    if engine_kind(config) == "transformers" and use_fsdp(config):
        raise ConfigError(
            "without vLLM (rollout.engine=transformers, or not installed) the trainer's own weights sample: set "
            "model.shard=never"
        )
    if config.judge.enabled and config.judge.teacher == "openai":
        check_key(config.judge)
    if config.judge.enabled and config.judge.teacher == "expert":
        envs.check_teacher(config.env)
    tasks = envs.tasks(config.env, config.env.level, "train")
    for level in config.eval.levels if config.train.eval_every else ():
        evaluation_tasks(config, level)
    envs.check_reset(config.env, tasks)
    check_model_folder(config)
    return tasks


def check_config(config: Config, world: int) -> None:
    """Check what needs no data and no model: batch arithmetic, the tables' names, the environment's options."""
    configuration.check_world(config, world)
    configuration.check_choice("algo.advantage", config.algo.advantage, losses.ADVANTAGES)
    configuration.check_choice("algo.policy_loss", config.algo.policy_loss, losses.POLICY_LOSSES)
    envs.check(config.env)
    envs.check_lineage(config)


def load_policy(config: Config, state: TrainState) -> tuple[LanguageModel, Optimizer]:
    """Load the policy from where the run stands, and its optimizer."""
    policy = load_model(config, state.folder)
    make = functools.partial(adamw, kind=config.train.optimizer)
    optimizer = Optimizer(policy.model, config.train.weight_decay, make)
    if saved := state.optimizer_states.pop("policy", None):
        optimizer.load_state_dict(saved)
    return policy, optimizer


def dry_run(config: Config) -> str:
    """Describe the resolved config and what one iteration will do. Raises ConfigError where it does not divide."""
    check_config(config, configuration.world_size())
    episodes = config.rollout.groups * config.rollout.group_size
    critiques = config.judge.questions * config.judge.group_size if config.judge.enabled else 0
    steps = -(-episodes * config.env.max_steps // config.train.samples_per_update)
    return (
        f"{configuration.dump(config)}\n"
        f"# one iteration: {config.rollout.groups} groups x {config.rollout.group_size} = {episodes} episodes of at "
        f"most {config.env.max_steps} steps, {critiques} critiques\n"
        f"# update: at most {steps} optimizer steps of {config.train.samples_per_update} actions\n"
        "# GPU memory, phase by phase: python tools/memory.py CONFIG --gpus N --gib SIZE"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Phases


def sample_tasks(tasks: Sequence[envs.Task], config: Config, iteration: int) -> dict[int, envs.Task]:
    """Draw an iteration's tasks, by group: the training list is walked in a new random order each time round."""

    @functools.cache
    def order(lap: int) -> list[int]:
        return random.Random(f"tasks {config.seed} {lap}").sample(range(len(tasks)), len(tasks))

    group_tasks = {}
    for group in range(config.rollout.groups):  # they may lie in two laps
        lap, position = divmod(iteration * config.rollout.groups + group, len(tasks))
        group_tasks[group] = tasks[order(lap)[position]]
    return group_tasks


def score(
    policy: LanguageModel,
    reference: LanguageModel | None,
    ppo: baselines.PPO | None,
    samples: Sequence[Sample],
    config: Config,
) -> None:
    """Write what the models say of samples before the update: log-probs, and PPO's values. A collective operation.

    `samples` are all of them, the same on every rank, which scores an even share: nobody waits for the rank that played
    the longest episodes. Samples without a gradient are left out (`needs_score`).
    """
    shares = split_evenly([sample for sample in samples if needs_score(sample, config)], dist.get_world_size())
    own = shares[dist.get_rank()]
    set_logprobs(policy, reference, own, config)
    if ppo:
        ppo.set_values(own)
    scored = all_gather_objects([[(one.old_logprobs, one.ref_logprobs, one.values) for one in own]])
    for share, found in zip(shares, scored, strict=True):
        for sample, values in zip(share, found, strict=True):
            sample.old_logprobs, sample.ref_logprobs, sample.values = values


@torch.no_grad()
def set_logprobs(
    policy: LanguageModel, reference: LanguageModel | None, samples: Sequence[Sample], config: Config
) -> None:
    """Write the old policy's log-probs of these samples, and the reference's."""
    budget, temperature = config.train.tokens_per_micro_batch, config.rollout.temperature
    if config.train.old_logprobs == "engine":
        # as sampled: one pass less, and the ratio corrects for the engine's error, too
        for sample in samples:
            sample.old_logprobs = sample.engine_logprobs
    todo = [sample for sample in samples if sample.old_logprobs is None]  # NTHR's pass has those of some already
    for sample, logprobs in zip(todo, all_logprobs(policy, todo, budget, temperature), strict=True):
        sample.old_logprobs = logprobs
    if reference:
        with as_reference(reference, policy) as initial:
            for sample, logprobs in zip(samples, all_logprobs(initial, samples, budget, temperature), strict=True):
                sample.ref_logprobs = logprobs


def measure_coupling(
    policy: LanguageModel, episodes: Sequence[Episode], samples: Sequence[Sample], config: Config, iteration: int
) -> dict[str, float]:
    """Look, every train.coupling_every iterations, at how the gradients of samples are coupled (paper, equation 2)."""
    if not config.train.coupling_every or iteration % config.train.coupling_every:
        return {}
    from paper.coupling import observe  # here alone the trainer looks into what checks the paper

    return observe(policy, episodes, samples, config, iteration)


def gather(
    samples: list[Sample], questions: list[judge.Question], rollout: Rollout
) -> tuple[list[Sample], list[judge.Question], list[Episode], dict[str, float]]:
    """Put together what the ranks have, on every rank: samples, questions, all episodes, counters.

    One exchange, so that samples still share their steps with the episodes: what is recorded of an advantage is what
    was trained on.
    """
    shares = all_gather_objects([(samples, questions, rollout)])
    samples, questions = ([one for share in shares for one in share[kind]] for kind in (0, 1))
    episodes = [one for _, _, rollout in shares for one in rollout.episodes + rollout.filtered]
    return samples, questions, episodes, sum_dicts([rollout.counters for _, _, rollout in shares])


def lr_factor(config: Config, iteration: int) -> float:
    """Compute the learning rate's factor: linear warm-up, then constant, or falling by 1/iterations each time."""
    warm = min(1.0, (iteration + 1) / config.train.warmup) if config.train.warmup else 1.0
    return warm * (1 - iteration / config.train.iterations if config.train.schedule == "linear" else 1.0)


def update(
    policy: LanguageModel,
    optimizer: Optimizer,
    batches: Sequence[Sequence[Sequence[Sample]]],
    samples: Sequence[Sample],
    config: Config,
    lr: float,
    iteration: int,
) -> dict[str, float]:
    """Make one pass over the mini-batches, dealt out to ranks as mini_batches() does, with an optimizer step for each.

    `samples` are all of them, scored. Returns metrics, averaged over tokens and ranks.
    """
    rank, world, train = dist.get_rank(), dist.get_world_size(), config.train
    entropy = "gradient" if config.algo.entropy else "value"
    gaps: list[np.ndarray] = []  # of engine to trainer, where the trainer has not scored the old policy
    sums: dict[str, float] = defaultdict(float)
    policy.model.train()  # no dropout (load_model sees to it), but gradient checkpointing works in this mode alone
    for number, batch in enumerate(progress_bar(batches, desc="update", unit=" steps")):
        # a sample whose loss is exactly 0 counts in the denominators, and need not be computed
        denominators = count_loss_tokens(batch)
        computed = [sample for sample in batch[rank] if has_gradient(sample, config)]
        for part in training_batches(policy, computed, train.tokens_per_micro_batch):
            logp_T, entropy_T = token_logprobs(policy, part, config.rollout.temperature, entropy)
            if not part.samples:  # another rank has more of them, and a sharded pass needs all ranks
                (0 * logp_T.sum()).backward()
                continue
            loss, parts = micro_batch_loss(logp_T, entropy_T, part.samples, denominators, config)
            loss.backward()
            for key, value in parts.items():
                sums[key] += value if math.isfinite(value) else 0.0  # such a step is skipped, and is not to spoil means
            if number == 0 and train.old_logprobs == "engine":  # later the policy has moved on
                engine_T = np.concatenate([sample.engine_logprobs for sample in part.samples])
                gaps.append(logp_T.detach().float().cpu().numpy() - engine_T)
            for key, value in token_counts(part).items():
                sums[key] += value
        save = functools.partial(save_bad_samples, batch, policy, config, iteration)
        norm = optimizer.step(lr, train.max_grad_norm, save)
        if math.isfinite(norm):
            sums["grad_norm"] += norm / world  # the norm is the same on every rank, and ranks' sums are added up
        else:
            sums["skipped"] += 1 / world
    policy.model.eval()

    if train.old_logprobs == "trainer":  # every rank knows all samples' gaps, and sums up its share
        scored = [sample for sample in samples[rank::world] if sample.old_logprobs is not None]
        gaps = [sample.old_logprobs - sample.engine_logprobs for sample in scored]
    return {"train/lr": lr} | update_metrics(sums, np.concatenate(gaps or [np.zeros(0)]), len(batches))


def token_counts(batch: MicroBatch) -> dict[str, int]:
    """Count a micro-batch's tokens: of its samples, those of them that are distinct, and all that are computed, filling
    included; and how many of them are critiques'."""
    critiques = [sample.is_critique for sample in batch.samples]
    tokens = [sample.num_tokens for sample in batch.samples]
    return {
        "tokens": sum(tokens),
        "distinct_tokens": sum(batch.added),
        "computed_tokens": batch.input_ids_BL.size,
        "critique_tokens": sum(count for count, critique in zip(tokens, critiques, strict=True) if critique),
        "distinct_critique_tokens": sum(n for n, critique in zip(batch.added, critiques, strict=True) if critique),
    }


def count_loss_tokens(batch: Sequence[Sequence[Sample]]) -> dict[bool, tuple[int, int]]:
    """Count (response tokens, samples) in the loss of a mini-batch, over all ranks: of actions and of critiques."""
    counts = {}
    for kind in (False, True):
        tokens = [sample.num_loss_tokens for share in batch for sample in share if sample.is_critique == kind]
        counts[kind] = (sum(tokens), sum(count > 0 for count in tokens))
    return counts


def micro_batch_loss(
    logp_T: torch.Tensor,
    entropy_T: torch.Tensor,
    samples: Sequence[Sample],
    denominators: dict[bool, tuple[int, int]],
    config: Config,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute the share of L = L_GRPO + judge.weight L_GCD that these samples contribute (paper, equation 3).

    Log-probs and entropies are of all their response tokens, one sample after the other; `denominators` those of the
    whole mini-batch, from count_loss_tokens(). Returns the loss, and sums of metrics over the tokens.
    """
    algo = config.algo
    lengths = [len(sample.response_ids) for sample in samples]
    if missing := sum(sample.old_logprobs is None for sample in samples):
        raise ValueError(f"{missing} samples have a gradient, but set_logprobs() has not seen them")

    def per_token(values: Sequence) -> torch.Tensor:
        """Spread one value or array a sample over its tokens, [T]."""
        spread = [np.broadcast_to(np.float32(value), n) for value, n in zip(values, lengths, strict=True)]
        return torch.from_numpy(np.concatenate(spread)).to(logp_T.device)

    sample_T = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths)).to(logp_T.device)
    critique_T = per_token([sample.is_critique for sample in samples]) > 0
    advantage_T = per_token([sample.advantage for sample in samples])
    old_T = per_token([sample.old_logprobs for sample in samples])
    ref_T = per_token([sample.ref_logprobs for sample in samples]) if algo.kl else None
    weight_T = per_token([1.0 if sample.loss_weights is None else sample.loss_weights for sample in samples])

    loss, sums = logp_T.new_zeros(()), {}
    for is_critique, name, weight, longest in (
        (False, "loss_policy", 1.0, config.rollout.max_response_tokens),  # L_GRPO, on actions
        (True, "loss_judge", config.judge.weight, config.judge.max_response_tokens),  # L_GCD, on critiques
    ):
        # a weight of 0 takes a token out of the loss and of its denominators alike
        mask_T = (critique_T == is_critique) & (weight_T > 0)
        if not mask_T.any():
            continue
        policy_loss = losses.POLICY_LOSSES[algo.policy_loss]
        loss_T, metrics = policy_loss(logp_T[mask_T], old_T[mask_T], advantage_T[mask_T], sample_T[mask_T], algo)
        loss_T = loss_T * weight_T[mask_T]
        if algo.kl:
            kl_T = losses.kl(logp_T[mask_T], ref_T[mask_T], "k3")
            loss_T, metrics = loss_T + algo.kl * kl_T, metrics | {"kl": kl_T.detach().mean()}
        if algo.entropy:
            loss_T = loss_T - algo.entropy * entropy_T[mask_T]
        contribution = losses.aggregate(loss_T, sample_T[mask_T], algo.aggregate, *denominators[is_critique], longest)
        loss = loss + weight * contribution
        sums[name] = float(contribution.detach())
        for key, value in metrics.items():
            sums[key] = sums.get(key, 0.0) + float(value) * int(mask_T.sum())
        sums["loss_tokens"] = sums.get("loss_tokens", 0) + int(mask_T.sum())
    return loss, sums | {"entropy": float(entropy_T.detach().sum()), "response_tokens": len(logp_T)}


def update_metrics(local_sums: dict[str, float], gap_T: np.ndarray, steps: int) -> dict[str, float]:
    """Average the ranks' sums; `gap_T` holds this rank's log-prob differences between trainer and engine."""
    gaps = {"gap": np.abs(gap_T).sum(), "gap_kl": (np.exp(gap_T) - 1 - gap_T).sum(), "gaps": len(gap_T)}
    sums = sum_dicts(all_gather_objects([local_sums | {key: float(value) for key, value in gaps.items()}]))
    worst = max(all_gather_objects([float(np.abs(gap_T).max(initial=0.0))]))
    response_tokens, loss_tokens = (max(1.0, sums.get(name, 0.0)) for name in ("response_tokens", "loss_tokens"))
    tokens, distinct = sums.get("tokens", 0.0), sums.get("distinct_tokens", 0.0)
    skipped = round(sums.get("skipped", 0))
    return {
        "train/loss_policy": sums.get("loss_policy", 0.0) / steps,
        "train/loss_judge": sums.get("loss_judge", 0.0) / steps,
        "train/kl": sums.get("kl", 0.0) / loss_tokens,
        "train/entropy": sums.get("entropy", 0.0) / response_tokens,
        "train/ratio": sums.get("ratio", 0.0) / loss_tokens,
        "train/clip_fraction": sums.get("clip_fraction", 0.0) / loss_tokens,
        "train/approx_kl": sums.get("approx_kl", 0.0) / loss_tokens,
        "train/grad_norm": sums.get("grad_norm", 0.0) / max(1, steps - skipped),
        "train/skipped_steps": skipped,
        "train/updates": steps,
        "train/tokens": tokens,
        "train/distinct_tokens": distinct,
        "train/tokens_per_distinct": tokens / max(1.0, distinct),
        "train/critique_share": sums.get("critique_tokens", 0.0) / max(1.0, tokens),
        "train/critique_share_distinct": sums.get("distinct_critique_tokens", 0.0) / max(1.0, distinct),
        "train/padding_share": 1 - distinct / max(1.0, sums.get("computed_tokens", 0.0)),
        "mismatch/mean_abs": sums["gap"] / max(1, sums["gaps"]),
        "mismatch/kl": sums["gap_kl"] / max(1, sums["gaps"]),
        "mismatch/max_abs": worst,
    }


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""Reinforcement learning with GCD: the visible loop.

    torchrun --nproc_per_node=8 train_rl.py configs/qwen7b_gcd.yaml
    python train_rl.py configs/quickstart.yaml --set train.lr=1e-4 judge.enabled=false
    python train_rl.py configs/quickstart.yaml --dry-run

Every iteration: sample tasks, collect episodes, label some steps and ask the actor to judge them, turn both into
advantages, score them with the models as they are, update on L = L_GRPO + judge.weight L_GCD (paper, equation 3), give
the engine the new weights, evaluate, log, save.  Each rank plays whole groups with an engine of its own; then every
rank sees every row, and each mini-batch is dealt out to the ranks by tokens.  The same command resumes a run from its
last checkpoint.

Departures from published code: mini-batches are weighted by their tokens, so no row is deleted or duplicated; means are
over the tokens of the whole mini-batch, not of a micro-batch; a row whose loss is exactly 0 (zero advantage, no KL) is
counted and not computed; groups of equal returns are drawn again one by one, not by the batch.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import envs
import judge
import losses
import memory
import prompts
import telemetry
from config import Config, ConfigError
from evaluate import evaluate_levels
from model import (
    Actor,
    Row,
    all_logprobs,
    all_values,
    as_reference,
    check_path,
    head_logprobs,
    last_hidden,
    load_actor,
    load_critic,
    load_reference,
    micro_batches,
    output_errors,
    shards,
    token_logprobs,
    token_values,
)
from ranks import Stop, aligned, gather, gathered, join_ranks, make_optimizer, progress_bar, step, total
from records import (
    Clock,
    Log,
    critic_folder,
    episode_bar,
    find_checkpoint,
    rollout_metrics,
    row_metrics,
    save_checkpoint,
    save_rows,
)
from rollout import Engine, Episode, canary, collect, make_engine, sync
from rows import actor_rows, add_critic, has_gradient, judge_rows, mini_batches, needs_score, weigh
from teacher import Teacher, check_key


def main() -> None:
    """The command line."""
    command = configuration.parser(__doc__)
    command.add_argument("--dry-run", action="store_true", help="print config, batch arithmetic, memory")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, arguments.set)
    if arguments.dry_run:
        report = dry_run(config)  # every rank checks
        if os.environ.get("RANK", "0") == "0":
            print(report)
    else:
        train(config)


def train(config: Config) -> None:
    """The loop."""
    rank, world = join_ranks(config)
    train_tasks = preflight(config, world)
    checkpoint, state = find_checkpoint(config)
    folder = str(checkpoint or config.model.path)
    actor, reference, critic, optimizers = load_models(config, folder, state)
    start, progress = state.get("iteration", 0), state.get("progress") or {"advice": [], "rules": first_rules(config)}
    teacher = judge.make_endpoint(config, world, progress.get("teacher"))
    engine = make_engine(config, actor)
    pool = make_pool(engine, config)
    log, stop, saved = Log(config, start) if rank == 0 else None, Stop(), start

    for iteration in range(start, config.train.iterations):
        clock, counts = Clock(), Counter()

        # ---- Collect: this engine's share of the iteration's games, which are the same for every number of engines
        tasks = own_tasks(engine, train_tasks, config, iteration)
        how = dict(iteration=iteration, suggestions=progress["rules"], counts=counts, stopped=lambda: stop.asked)
        with clock("collect"), episode_bar(len(tasks) * config.rollout.group_size) as how["on_episode"]:
            episodes, passed_over = collect_groups(engine, pool, tasks, train_tasks, config, how)
        if stop.agreed():
            break

        # ---- Label and ask (GCD)
        questions: list[judge.Question] = []
        if config.judge.enabled:
            with clock("judge"):
                questions = label_and_ask(engine, episodes, teacher, config, iteration, counts)

        # ---- Advantages: groups are whole on their rank
        rows = actor_rows(episodes, config) + judge_rows(questions, config)

        # ---- Score: what the models say of the rows before the update; then every rank gets to see every row
        engine.sleep()
        with clock("score"):
            score(actor, reference, critic, rows, config)
        with clock("telemetry"):
            observed = telemetry.observe(actor, episodes, rows, config, iteration)
        rows, questions, episodes = gather(rows), gather(questions), gather(episodes + passed_over)
        metrics = rollout_metrics(episodes, total(gather([counts]))) | observed
        metrics |= judge.judge_metrics(questions) if config.judge.enabled else {}
        add_critic(rows, config)
        metrics |= row_metrics(rows, config)

        # ---- Update: L = L_GRPO + judge.weight L_GCD
        with clock("update"):
            if critic:
                metrics |= update_critic(critic, optimizers[1], rows, config, iteration)
            metrics |= update(actor, optimizers[0], rows, config, iteration)

        # ---- Give the engine the new weights, and check that it has them
        with clock("sync"):
            sync(engine, actor)
            metrics["mismatch/canary"] = canary(engine, actor, [row.prompt_ids for row in rows[:4]], config)

        # ---- Guidelines: what the critiques advise goes into the next prompts
        progress = carry_on(progress, questions, engine, teacher, config, iteration)

        # ---- Evaluate
        if config.train.eval_every and (iteration + 1) % config.train.eval_every == 0:
            with clock("evaluate"):
                results, _ = evaluate_levels(engine, config, progress["rules"], pool=pool)
            metrics |= {f"eval/{level}": result["success"] for level, result in results.items()}

        # ---- Log, then save, so that a checkpoint never lacks its iteration's record
        start = iteration + 1
        if log:
            log.write(iteration, metrics | clock.metrics(rows), episodes, questions, how["suggestions"])
        if start % config.train.checkpoint_every == 0:
            save_checkpoint(actor, critic, optimizers, config, start, progress)
            saved = start

    if saved < start:
        save_checkpoint(actor, critic, optimizers, config, start, progress)
    if rank == 0:
        print(f"{start} iterations done: {config.run_dir / 'checkpoints' / 'latest'}", flush=True)
    engine.close()


def load_models(
    config: Config, folder: str, state: dict
) -> tuple[Actor, Actor | None, Actor | None, list[torch.optim.Optimizer]]:
    """The actor of `folder`, the reference for a KL term, PPO's critic, and the optimizers of actor and critic, as
    `state` has them."""
    actor = load_actor(config, path=folder)
    reference = load_reference(config, actor)
    critic = load_critic(config, actor, critic_folder(folder)) if config.algo.advantage == "ppo" else None
    train = config.train
    rest = (train.weight_decay, train.betas, train.optimizer)
    optimizers = [make_optimizer(actor.model, train.lr, *rest)]
    if critic:
        optimizers.append(make_optimizer(critic.model, train.critic_lr, *rest))
    for optimizer, kept in zip(optimizers, state.get("optimizers", []), strict=bool(state)):
        optimizer.load_state_dict(kept)
    return actor, reference, critic, optimizers


def first_rules(config: Config) -> list[str]:
    """The rules of guidelines.file, one a line."""
    if not config.guidelines.file:
        return []
    lines = Path(config.guidelines.file).read_text(encoding="utf-8").splitlines()
    return [rule for line in lines if (rule := prompts.plain(line, config.guidelines.max_chars))]


def carry_on(
    progress: dict,
    questions: Sequence[judge.Question],
    engine: Engine,
    teacher: Teacher | None,
    config: Config,
    iteration: int,
) -> dict:
    """What the next iterations know of this one, the same on every rank: advice, rules, and what the teacher has cost.

    Rules are refreshed every guidelines.every iterations, by the first engine.
    """
    guide = config.guidelines
    if guide.every:
        advice = (progress["advice"] + judge.advice_of(questions))[-guide.pool :]
        progress = progress | {"advice": advice}
        if (iteration + 1) % guide.every == 0:
            made = []
            if engine.player == 0:
                writer = judge.pick_writer(engine, teacher, config, iteration)
                made = [judge.golden_rules(advice, guide, writer)]
            progress["rules"] = gather(made)[0]
    spent = {"teacher": total([teacher.before, *gather([teacher.spent])])} if teacher else {}
    return progress | spent


def preflight(config: Config, world: int) -> list[envs.Task]:
    """The training tasks. What would stop the run later stops it here, before a model is loaded: raises ConfigError."""
    configuration.check_world(config, world)
    configuration.check_lineage(config)
    check_path(config.model.path)
    memory.check_disk(config)
    if (config.model.tune == "qlora" or config.train.optimizer == "adamw8bit") and not find_spec("bitsandbytes"):
        raise ConfigError("model.tune=qlora and train.optimizer=adamw8bit need bitsandbytes: pip install bitsandbytes")
    if config.train.wandb and not find_spec("wandb"):
        raise ConfigError("train.wandb names a project of Weights & Biases: pip install wandb, or leave it empty")
    if config.rollout.engine == "transformers" and shards(config):
        raise ConfigError("rollout.engine=transformers samples with the trainer's weights: set model.shard=never")
    if config.judge.enabled and config.judge.teacher == "openai":
        check_key(config.judge)
    found = envs.tasks(config.env, config.env.level, "train")
    for level in config.eval.levels if config.train.eval_every else ():
        envs.tasks(config.env, level, "eval")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Phases


def sample_tasks(tasks: Sequence[envs.Task], config: Config, iteration: int) -> list[envs.Task]:
    """The games of an iteration: the training list is walked in a new random order each time round, none left out."""
    picked: list[envs.Task] = []
    first = iteration * config.rollout.groups
    for position in range(first, first + config.rollout.groups):
        lap, place = divmod(position, len(tasks))
        order = random.Random(f"tasks {config.seed} {lap}").sample(range(len(tasks)), len(tasks))
        picked.append(tasks[order[place]])
    return picked


def make_pool(engine: Engine, config: Config) -> list:
    """As many environments as this rank plays in at once."""
    episodes = config.rollout.groups // engine.players * config.rollout.group_size
    return [envs.make_env(config.env) for _ in range(min(config.rollout.concurrency, episodes))]


def own_tasks(engine: Engine, train_tasks: Sequence[envs.Task], config: Config, iteration: int) -> dict[int, envs.Task]:
    """The games that this rank plays in an iteration, by group: of an engine's ranks, its leader plays."""
    share = config.rollout.groups // engine.players
    groups = range(engine.player * share, (engine.player + 1) * share) if engine.leads else range(0)
    return {group: sample_tasks(train_tasks, config, iteration)[group] for group in groups}


def collect_groups(
    engine: Engine,
    pool: Sequence,
    tasks: dict[int, envs.Task],
    train_tasks: Sequence[envs.Task],
    config: Config,
    play: dict,
) -> tuple[list[Episode], list[Episode]]:
    """Play the tasks, by group; a group whose returns are all the same gives way to another game's, at most
    rollout.redraws times. Returns the episodes to train on, and those passed over. The same for every world size.
    """
    drawn = sample_tasks(train_tasks, config, play["iteration"])
    others = [task for task in train_tasks if task not in drawn] or train_tasks
    kept = collect(engine, pool, list(tasks.values()), config, groups=list(tasks), **play)
    passed_over: list[Episode] = []
    for attempt in range(1, config.rollout.redraws + 1):
        returns = defaultdict(set)
        for episode in kept:
            returns[episode.group].add(sum(step.reward for step in episode.steps))
        dull = [group for group, values in returns.items() if len(values) == 1]
        if not engine.agree(bool(dull)):
            break
        games = {}
        for group in dull:
            place = group % config.rollout.groups
            rng = random.Random(f"redraw {config.seed} {play['iteration']} {place} {attempt}")
            games[place + attempt * config.rollout.groups] = rng.choice(others)
        passed_over += [episode for episode in kept if episode.group in dull]
        kept = [episode for episode in kept if episode.group not in dull]
        kept += collect(engine, pool, list(games.values()), config, groups=list(games), **play)
        play["counts"]["redrawn"] += len(dull)
    return kept, passed_over


def label_and_ask(
    engine: Engine,
    episodes: Sequence[Episode],
    teacher: Teacher | None,
    config: Config,
    iteration: int,
    counts: Counter,
) -> list[judge.Question]:
    """Label the steps of this engine's episodes, and let the actor judge its share of the questions."""
    rng = random.Random(f"{config.seed} {iteration} {engine.player}")
    counts.update(judge.label_episodes(episodes, config, rng, config.judge.teacher_steps // engine.players, teacher))
    own = config.judge.questions // engine.players
    questions = judge.pick(episodes, own, rng)
    judge.ask(engine, questions, config, iteration, first=engine.player * own)
    return questions


@torch.no_grad()
def score(actor: Actor, reference: Actor | None, critic: Actor | None, rows: Sequence[Row], config: Config) -> None:
    """Write to this rank's rows what the models say before the update: the old policy's log-probs, the reference's, the
    critic's values; from these the weights of tokens, and NTHR's change of advantages."""
    budget, temperature = config.train.tokens_per_micro_batch, config.rollout.temperature
    if config.algo.nthr:
        with gathered(actor.model):
            contrast(actor, [row for row in rows if not row.judge], config)
    scored = [row for row in rows if needs_score(row, config)]
    if config.train.old_logprobs == "engine":
        for row in scored:
            row.old_logprobs = row.logprobs
    todo = [row for row in scored if row.old_logprobs is None]
    for row, logprobs in zip(todo, all_logprobs(actor, todo, budget, temperature), strict=True):
        row.old_logprobs = logprobs
    if reference:
        with as_reference(reference, actor) as initial:
            for row, logprobs in zip(scored, all_logprobs(initial, scored, budget, temperature), strict=True):
                row.ref_logprobs = logprobs
    if critic:
        acted = [row for row in rows if not row.judge]
        for row, values in zip(acted, all_values(critic, acted, budget), strict=True):
            row.values = values
    weigh(rows, config)


def contrast(actor: Actor, rows: Sequence[Row], config: Config) -> None:
    """NTHR: weaken the negative advantage of those tokens of lost rows that pull the group's won rows along.

    The pass that gives the old policy's log-probs gives its hidden states, too.
    """
    algo, temperature = config.algo, config.rollout.temperature
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    for group in groups.values():
        won = {row.trajectory: row.won for row in group}
        if len(set(won.values())) < 2:
            continue
        batches = micro_batches(group, config.train.tokens_per_micro_batch, actor.packed)
        parts = [last_hidden(actor, [group[index] for index in batch]) for batch in batches]
        hidden_TH, target_T = (torch.cat(one) for one in zip(*parts, strict=True))  # [T, H], [T]
        logp_T, _ = head_logprobs(actor, hidden_TH, target_T, temperature)  # [T]
        error_TV = output_errors(actor, hidden_TH, target_T, logp_T, temperature)  # [T, V]
        ordered = [group[index] for batch in batches for index in batch]
        lengths = [len(row.response_ids) for row in ordered]
        row_T = torch.arange(len(ordered)).repeat_interleave(torch.tensor(lengths)).to(actor.device)  # [T]
        won_T = torch.tensor([row.won for row in ordered], device=actor.device)[row_T]  # [T]
        eta = 2 * abs(0.5 - np.mean(list(won.values()))) if algo.nthr_eta is None else algo.nthr_eta
        factor_T, _ = losses.nthr_weights(hidden_TH.float(), error_TV, row_T, won_T, algo.nthr_beta, float(eta))  # [T]
        for row, logprobs, factor in zip(ordered, logp_T.split(lengths), factor_T.split(lengths), strict=True):
            if config.train.old_logprobs == "trainer":
                row.old_logprobs = logprobs.float().cpu().numpy()
            if row.advantage < 0:
                row.advantage, row.weakened = row.advantage * factor.cpu().numpy(), int((factor != 1).sum())


def update(
    actor: Actor, optimizer: torch.optim.Optimizer, rows: Sequence[Row], config: Config, iteration: int
) -> dict[str, float]:
    """One pass over the scored rows in mini-batches; returns the update's metrics, averaged over tokens and ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    train, packed = config.train, actor.packed
    batches = mini_batches(rows, config, iteration, world)
    learning_rate = train.lr * lr_factor(config, iteration)
    gaps: list[np.ndarray] = []  # of engine to trainer, where the trainer has not scored the old policy
    sums: dict[str, float] = defaultdict(float)
    actor.model.train()  # no dropout (load_actor sees to it), but gradient checkpointing works in this mode alone
    for number, batch in enumerate(progress_bar(batches, desc="update", unit=" steps")):
        totals = denominators(batch)
        own = [row for row in batch[rank] if has_gradient(row, config)]
        for group in aligned(micro_batches(own, train.tokens_per_micro_batch, packed), actor.model):
            part = [own[index] for index in group] or [Row.blank()]
            entropy = "gradient" if config.algo.entropy else "value"
            logp_T, entropy_T = token_logprobs(actor, part, config.rollout.temperature, entropy)  # [T], [T]
            if not group:  # another rank has more of them
                (0 * logp_T.sum()).backward()
                continue
            loss, parts = micro_batch_loss(logp_T, entropy_T, part, totals, config)
            loss.backward()
            for key, value in parts.items():
                sums[key] += value if math.isfinite(value) else 0.0
            if number == 0 and train.old_logprobs == "engine":
                gaps.append(logp_T.detach().float().cpu().numpy() - np.concatenate([row.logprobs for row in part]))
            real = sum(row.tokens for row in part)
            sums["real"] += real
            sums["padded"] += real if packed else max(row.tokens for row in part) * len(part)
        finite_step(actor, optimizer, learning_rate, batch, config, iteration, sums)
    actor.model.eval()

    if train.old_logprobs == "trainer":  # every rank knows all rows' gaps
        gaps = [row.old_logprobs - row.logprobs for row in rows[rank::world] if row.old_logprobs is not None]
    return {"train/lr": learning_rate} | _update_metrics(sums, np.concatenate(gaps or [np.zeros(0)]), len(batches))


def finite_step(
    model: Actor,
    optimizer: torch.optim.Optimizer,
    lr: float,
    batch: Sequence[Sequence[Row]],
    config: Config,
    iteration: int,
    sums: dict[str, float],
) -> None:
    """One optimizer step; `sums` receives this rank's share of its norm, or of a step that is skipped because the
    gradient is not finite. Raises RuntimeError after train.max_bad_steps of these in a row, the rows being saved."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm, world = step(model.model, optimizer, config.train.max_grad_norm), dist.get_world_size()
    if math.isfinite(norm):
        sums["grad_norm"] += norm / world
        optimizer.bad_in_a_row = 0
        return
    sums["skipped"] += 1 / world
    optimizer.bad_in_a_row = getattr(optimizer, "bad_in_a_row", 0) + 1
    if optimizer.bad_in_a_row > config.train.max_bad_steps:
        rows = [row for share in batch for row in share]
        raise RuntimeError(
            f"iteration {iteration}: the gradient was not finite {optimizer.bad_in_a_row} steps in a row; the rows of "
            f"the last one are in {save_rows(rows, model, config, iteration)}"
        )


def denominators(batch: Sequence[Sequence[Row]]) -> dict[bool, tuple[int, int]]:
    """(response tokens, rows) in the loss of a mini-batch, over all ranks, by kind."""
    counted = [(row.judge, row.counted) for share in batch for row in share]
    return {
        kind: (sum(count for judged, count in counted if judged == kind), sum(c > 0 for j, c in counted if j == kind))
        for kind in (False, True)
    }


def _update_metrics(own: dict[str, float], gap_T: np.ndarray, updates: int) -> dict[str, float]:
    """Means over the ranks' sums; `gap_T` holds this rank's log-prob differences between trainer and engine."""
    gaps = {"gap": np.abs(gap_T).sum(), "gap_kl": (np.exp(gap_T) - 1 - gap_T).sum(), "gaps": len(gap_T)}
    sums = total(gather([own | {key: float(value) for key, value in gaps.items()}]))
    worst = max(gather([float(np.abs(gap_T).max(initial=0.0))]))
    seen, kept = (max(1.0, sums.get(name, 0.0)) for name in ("seen", "kept"))
    return {
        "train/loss_actor": sums.get("loss_actor", 0.0) / updates,
        "train/loss_judge": sums.get("loss_judge", 0.0) / updates,
        "train/kl": sums.get("kl", 0.0) / kept,
        "train/entropy": sums.get("entropy", 0.0) / seen,
        "train/ratio": sums.get("ratio", 0.0) / kept,
        "train/clip_fraction": sums.get("clip_fraction", 0.0) / kept,
        "train/approx_kl": sums.get("approx_kl", 0.0) / kept,
        "train/grad_norm": sums["grad_norm"] / max(1, updates - round(sums.get("skipped", 0))),
        "train/skipped_steps": round(sums.get("skipped", 0)),
        "train/updates": updates,
        "train/tokens": sums.get("real", 0.0),
        "train/padding_share": 1 - sums.get("real", 0.0) / max(1, sums.get("padded", 0.0)),
        "mismatch/mean_abs": sums["gap"] / max(1, sums["gaps"]),
        "mismatch/kl": sums["gap_kl"] / max(1, sums["gaps"]),
        "mismatch/max_abs": worst,
    }


def micro_batch_loss(
    logp_T: torch.Tensor,
    entropy_T: torch.Tensor,
    rows: Sequence[Row],
    totals: dict[bool, tuple[int, int]],
    config: Config,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The share of a mini-batch's loss that these rows contribute, and sums of metrics over their tokens.

    `totals` are the mini-batch's denominators().
    """
    algo, device = config.algo, logp_T.device
    lengths = torch.tensor([len(row.response_ids) for row in rows])

    def column(values: Sequence) -> torch.Tensor:
        """One value or array a row -> [T]."""
        spread = [np.broadcast_to(np.float32(v), n) for v, n in zip(values, lengths.tolist(), strict=True)]
        return torch.from_numpy(np.concatenate(spread)).to(device)

    row_T = torch.arange(len(rows)).repeat_interleave(lengths).to(device)  # [T]
    judged_T = column([row.judge for row in rows]) > 0  # [T]
    if missing := sum(row.old_logprobs is None for row in rows):
        raise ValueError(f"{missing} rows have a gradient, but score() has not seen them")
    advantage_T, old_T = column([row.advantage for row in rows]), column([row.old_logprobs for row in rows])  # [T] each
    weight_T = column([1.0 if row.weights is None else row.weights for row in rows])  # [T]
    ref_T = column([row.ref_logprobs for row in rows]) if algo.kl else None  # [T]
    loss, parts = logp_T.new_zeros(()), {}
    for judged, name, weight in ((False, "loss_actor", 1.0), (True, "loss_judge", config.judge.weight)):
        mask_T = (judged_T == judged) & (weight_T > 0)  # [T]
        if not mask_T.any():
            continue
        one = [tensor[mask_T] for tensor in (logp_T, old_T, advantage_T, row_T)]
        loss_T, seen = losses.POLICY_LOSSES[algo.policy_loss](*one, algo)  # [T]
        loss_T = loss_T * weight_T[mask_T]  # [T]
        if algo.kl:
            kl_T = losses.kl(one[0], ref_T[mask_T], algo.kl_estimator)  # [T]
            loss_T, seen = loss_T + algo.kl * kl_T, seen | {"kl": kl_T.detach().mean()}
        if algo.entropy:
            loss_T = loss_T - algo.entropy * entropy_T[mask_T]  # [T]
        length = config.judge.max_response_tokens if judged else config.rollout.max_response_tokens
        share = losses.aggregate(loss_T, one[3], algo.aggregate, *totals[judged], length)
        loss = loss + weight * share
        parts[name] = float(share.detach())
        for key, value in seen.items():
            parts[key] = parts.get(key, 0.0) + float(value) * int(mask_T.sum())
        parts["kept"] = parts.get("kept", 0) + int(mask_T.sum())
    parts |= {"entropy": float(entropy_T.detach().sum()), "seen": len(logp_T)}
    return loss, parts


def update_critic(
    critic: Actor, optimizer: torch.optim.Optimizer, rows: Sequence[Row], config: Config, iteration: int
) -> dict[str, float]:
    """PPO's value model, on the actions of the mini-batches that the actor is updated on; a mean over their tokens."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = mini_batches(rows, config, iteration, world)
    sums: dict[str, float] = defaultdict(float)
    critic.model.train()
    for batch in progress_bar(batches, desc="update critic", unit=" steps"):
        tokens = sum(len(row.returns) for share in batch for row in share if row.returns is not None)
        own = [row for row in batch[rank] if row.returns is not None]
        for group in aligned(micro_batches(own, config.train.tokens_per_micro_batch, critic.packed), critic.model):
            part = [own[index] for index in group] or [Row.blank()]
            value_T = token_values(critic, part)  # [T]
            if not group:
                (0 * value_T.sum()).backward()
                continue
            old_T, return_T = (
                torch.from_numpy(np.concatenate(one)).to(value_T)
                for one in zip(*((row.values, row.returns) for row in part), strict=True)
            )  # [T] each
            loss_T, seen = losses.value_loss(value_T, old_T, return_T, config.algo.value_clip)  # [T]
            loss = loss_T.sum() / tokens
            loss.backward()
            sums["loss"] += float(loss.detach())
            sums["clipped"] += float(seen["value_clip_fraction"]) * len(value_T)
            sums["tokens"] += len(value_T)
        lr = config.train.critic_lr * lr_factor(config, iteration)
        finite_step(critic, optimizer, lr, batch, config, iteration, sums)
    critic.model.eval()
    sums = total(gather([sums]))
    acted = [row for row in rows if row.returns is not None]
    value_T, return_T = (np.concatenate([getattr(row, name) for row in acted]) for name in ("values", "returns"))  # [T]
    return {
        "critic/loss": sums["loss"] / len(batches),
        "critic/clip_fraction": sums["clipped"] / sums["tokens"],
        "critic/grad_norm": sums["grad_norm"] / max(1, len(batches) - round(sums.get("skipped", 0))),
        "critic/skipped_steps": round(sums.get("skipped", 0)),
        "critic/value": float(value_T.mean()),
        "critic/explained_variance": float(1 - np.var(return_T - value_T) / max(np.var(return_T), 1e-12)),
    }


def lr_factor(config: Config, iteration: int) -> float:
    """The learning rate's factor: linear warm-up, then constant, or falling by 1/iterations from one to the next."""
    warm = min(1.0, (iteration + 1) / config.train.warmup) if config.train.warmup else 1.0
    return warm * (1 - iteration / config.train.iterations if config.train.schedule == "linear" else 1.0)


def dry_run(config: Config) -> str:
    """The resolved config, what one iteration will do, and what memory it will take. Raises ConfigError where it does
    not divide over torchrun's ranks."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    configuration.check_world(config, world)
    configuration.check_lineage(config)
    episodes = config.rollout.groups * config.rollout.group_size
    answers = config.judge.questions * config.judge.group_size if config.judge.enabled else 0
    return (
        f"{configuration.dump(config)}\n"
        f"# one iteration: {config.rollout.groups} games x {config.rollout.group_size} = {episodes} episodes of at "
        f"most {config.env.max_steps} steps, {answers} critiques\n"
        f"# update: at most {-(-episodes * config.env.max_steps // config.train.rows_per_update)} optimizer steps of "
        f"{config.train.rows_per_update} rows\n" + memory.table(config, world=world)
    )


if __name__ == "__main__":
    configuration.fail_clearly(main)

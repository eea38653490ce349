"""Reinforcement learning with GCD: the visible loop.

    torchrun --nproc_per_node=8 train_rl.py configs/qwen7b_gcd.yaml
    python train_rl.py configs/quickstart.yaml --set train.lr=1e-4 judge.enabled=false
    python train_rl.py configs/quickstart.yaml --dry-run

Every iteration: sample tasks, collect episodes, label some steps and ask the actor to judge them, turn both into
advantages, update on L = L_GRPO + judge.weight L_GCD (paper, equation 3), give the engine the new weights, evaluate,
log, save. Each rank plays whole groups with an engine of its own; then every rank sees every row, and each mini-batch
is dealt out to the ranks by tokens.  The same command resumes a run from its last checkpoint.

Departures from published code: no row is deleted or duplicated to make a batch divide, since mini-batches are weighted
by their tokens; means are over the tokens of the whole mini-batch, not of a micro-batch; an episode left alone in its
group gets no advantage instead of its raw score; a row whose loss is exactly 0 (zero advantage, no KL) is counted and
not computed.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.utils.tensorboard import SummaryWriter

import envs
import judge
import losses
from config import Config, ConfigError
from evaluate import evaluate_levels
from model import (
    Actor,
    Row,
    all_logprobs,
    join_ranks,
    load_actor,
    make_optimizer,
    micro_batches,
    point_latest,
    save_model,
    sum_gradients,
    token_logprobs,
)
from rollout import Episode, canary, collect, make_engine, sync

FREE_TO_CHANGE = {  # when a run goes on: what does not change the training, or is the cure of what ended it
    "train.iterations",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "eval",
    "env.machines",
    "env.machine_heap_mib",
    "rollout.max_prompt_tokens",
    "rollout.concurrency",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.canary_bound",
}


def main() -> None:
    """The command line."""
    command = configuration.parser(__doc__)
    command.add_argument("--dry-run", action="store_true", help="print the resolved config and the batch arithmetic")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, arguments.set)
    if arguments.dry_run:
        print(dry_run(config))
    else:
        train(config)


def train(config: Config) -> None:
    """The loop."""
    rank, world = join_ranks(config)
    train_tasks = preflight(config, world)
    checkpoint, state = find_checkpoint(config)
    folder = str(checkpoint or config.model.path)
    actor = load_actor(config, path=folder)
    reference = load_actor(config) if config.algo.kl > 0 else None  # the initial model, also after a resume
    optimizer = make_optimizer(actor.model, config.train.lr, config.train.weight_decay, config.train.betas)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    start, advice, rules = (state[key] for key in ("iteration", "advice", "rules")) if state else (0, [], [])
    engine = make_engine(config, actor, folder)
    own_groups, own_questions = config.rollout.groups // world, config.judge.questions // world
    in_flight = min(config.rollout.concurrency, own_groups * config.rollout.group_size)
    pool = [envs.make_env(config.env) for _ in range(in_flight)]
    log = Log(config, start) if rank == 0 else None

    for iteration in range(start, config.train.iterations):
        clock, counts, rng = Clock(), Counter(), random.Random(f"{config.seed} {iteration} {rank}")

        # ---- Sample tasks: the same for every world size; this rank plays its share of the groups
        first = rank * own_groups
        tasks = sample_tasks(train_tasks, config, iteration)[first : first + own_groups]

        # ---- Collect
        with clock("collect"):
            play = {"iteration": iteration, "first_group": first, "suggestions": rules, "counts": counts}
            episodes = collect(engine, pool, tasks, config, **play)

        # ---- Label and ask (GCD)
        questions: list[judge.Question] = []
        if config.judge.enabled:
            with clock("judge"):
                counts.update(judge.label_episodes(episodes, config, rng, config.judge.teacher_steps // world))
                questions = judge.pick(episodes, own_questions, rng)
                judge.ask(engine, questions, config, iteration, first=rank * own_questions)

        # ---- Advantages: groups are whole on their rank; then every rank gets to see every row
        rows = gather(actor_rows(episodes, config) + judge_rows(questions, config))
        episodes, questions = gather(episodes), gather(questions)
        metrics = rollout_metrics(episodes, total(gather([counts]))) | row_metrics(rows)
        if config.judge.enabled:
            metrics |= {f"judge/{key}": value for key, value in judge.judge_metrics(questions).items()}

        # ---- Update: L = L_GRPO + judge.weight L_GCD
        with clock("update"):
            metrics |= update(actor, reference, optimizer, rows, config, iteration)

        # ---- Give the engine the new weights, and check that it has them
        with clock("sync"):
            sync(engine, actor)
            metrics["mismatch/canary"] = canary(engine, actor, [row.prompt_ids for row in rows[:4]], config)

        # ---- Guidelines: what the critiques advise goes into the next prompts
        if config.guidelines.every:
            advice = (advice + judge.advice_of(questions))[-config.guidelines.pool :]
            if (iteration + 1) % config.guidelines.every == 0:
                rules = judge.golden_rules(advice, config.guidelines)

        # ---- Evaluate
        if config.train.eval_every and (iteration + 1) % config.train.eval_every == 0:
            with clock("evaluate"):
                results, _ = evaluate_levels(engine, config, rules, pool=pool)
            metrics |= {f"eval/{level}": result["success"] for level, result in results.items()}

        # ---- Log
        if log:
            log.write(iteration, metrics | clock.metrics(rows), episodes, questions, rules)

        # ---- Save: last, so that a checkpoint never lacks its iteration's record
        if (iteration + 1) % config.train.checkpoint_every == 0 or iteration + 1 == config.train.iterations:
            if rank == 0:
                save_checkpoint(actor, optimizer, config, iteration + 1, advice, rules)
            dist.barrier()

    if rank == 0:
        print(f"{config.train.iterations} iterations done: {config.run_dir / 'checkpoints' / 'latest'}", flush=True)
    engine.close()


def preflight(config: Config, world: int) -> list[envs.Task]:
    """The training tasks. What would stop the run later, stops it here: raises ConfigError."""
    configuration.check_world(config, world)
    configuration.check_lineage(config)
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


def actor_rows(episodes: Sequence[Episode], config: Config) -> list[Row]:
    """One row per action, with its advantage (also written to the step, for the record). Groups must be whole.

    An episode left alone, the others of its group having been discarded, has nothing to be compared with and gets 0.
    """
    steps = [(episode, step) for episode in episodes for step in episode.steps]
    if not steps:
        return []
    anchors: dict[tuple[int, str], int] = {}
    trajectory_N = torch.tensor([episode.group * config.rollout.group_size + episode.member for episode, _ in steps])
    reward_N = torch.tensor([step.reward for _, step in steps])  # [N]
    strict = config.algo.invalid == "unavailable"
    invalid_N = torch.tensor([float(not step.valid or (strict and not step.available)) for _, step in steps])  # [N]
    batch = losses.RowBatch(
        score_N=losses.scores(reward_N, trajectory_N, invalid_N, config.algo.invalid_penalty),
        group_N=torch.tensor([episode.group for episode, _ in steps]),
        trajectory_N=trajectory_N,
        reward_N=reward_N,
        invalid_N=invalid_N,
        anchor_N=torch.tensor(
            [anchors.setdefault((episode.group, step.observation), len(anchors)) for episode, step in steps]
        ),
    )
    members = Counter(episode.group for episode in episodes)
    for (episode, step), advantage in zip(steps, losses.advantages(batch, config.algo).tolist(), strict=True):
        step.advantage = advantage if members[episode.group] > 1 else 0.0
    return [_row(step, judge=False) for _, step in steps]


def judge_rows(questions: Sequence[judge.Question], config: Config) -> list[Row]:
    """One row per critique: its group is the judged step, its reward whether the verdict was right."""
    answers = [(number, answer) for number, question in enumerate(questions) for answer in question.answers]
    if not answers:
        return []
    reward_N = torch.tensor([answer.reward for _, answer in answers])  # [N]
    question_N = torch.tensor([number for number, _ in answers])  # [N]
    advantage_N = losses.judge_advantage(reward_N, question_N, config.algo)  # [N]
    for (_, answer), advantage in zip(answers, advantage_N.tolist(), strict=True):
        answer.advantage = advantage
    return [_row(answer, judge=True) for _, answer in answers]


def _row(step, judge: bool) -> Row:
    return Row(
        np.array(step.prompt_ids, dtype=np.int32),
        np.array(step.response_ids, dtype=np.int32),
        np.array(step.logprobs, dtype=np.float32),
        step.advantage,
        judge,
    )


def mini_batches(rows: Sequence[Row], config: Config, iteration: int, world: int) -> list[list[list[Row]]]:
    """[mini-batch][rank] -> rows: every row once, actions and critiques spread evenly, ranks balanced by tokens.

    The same for every rank, and the same mini-batches for every world size.
    """
    rng = random.Random(f"mini-batches {config.seed} {iteration}")
    kinds = [[row for row in rows if row.judge == judged] for judged in (False, True)]
    number = max(1, -(-len(kinds[0]) // config.train.rows_per_update))
    batches: list[list[Row]] = [[] for _ in range(number)]
    for kind in kinds:
        for place, row in enumerate(rng.sample(kind, len(kind))):
            batches[place % number].append(row)
    dealt = []
    for batch in batches:
        shares: list[list[Row]] = [[] for _ in range(world)]
        load = [0] * world
        for row in sorted(batch, key=lambda row: -row.tokens):
            lightest = load.index(min(load))
            shares[lightest].append(row)
            load[lightest] += row.tokens
        dealt.append(shares)
    return dealt


def update(
    actor: Actor,
    reference: Actor | None,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    config: Config,
    iteration: int,
) -> dict[str, float]:
    """One pass over the rows in mini-batches; returns the update's metrics, averaged over tokens and ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    train, packed = config.train, actor.packed
    batches = mini_batches(rows, config, iteration, world)
    mine = [row for batch in batches for row in batch[rank] if _matters(row, config)]

    def score(actor: Actor) -> list:
        return all_logprobs(actor, mine, train.tokens_per_micro_batch, config.rollout.temperature)

    old = score(actor) if train.old_logprobs == "trainer" else [row.logprobs for row in mine]
    ref = score(reference) if reference is not None else old
    known = {id(row): (o, r) for row, o, r in zip(mine, old, ref, strict=True)}
    gaps = [o - row.logprobs for row, o in zip(mine, old, strict=True)] if train.old_logprobs == "trainer" else []
    learning_rate = train.lr * lr_factor(config, iteration)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

    actor.model.train()  # no dropout (load_actor sees to it), but gradient checkpointing works in this mode alone
    sums: dict[str, float] = defaultdict(float)
    padded = real = 0
    for number, batch in enumerate(batches):
        everything = [row for share in batch for row in share]
        tokens = {
            judged: sum(len(row.response_ids) for row in everything if row.judge == judged) for judged in (False, True)
        }
        counts = {judged: sum(row.judge == judged for row in everything) for judged in (False, True)}
        own = [row for row in batch[rank] if _matters(row, config)]
        for group in micro_batches(own, train.tokens_per_micro_batch, packed):
            part = [own[index] for index in group]
            logp_T, entropy_T = token_logprobs(
                actor,
                part,
                config.rollout.temperature,
                entropy="gradient" if config.algo.entropy else "value",
            )  # [T], [T]
            loss, parts = micro_batch_loss(logp_T, entropy_T, part, known, tokens, counts, config)
            loss.backward()
            for key, value in parts.items():
                sums[key] += value
            if number == 0 and train.old_logprobs == "engine":
                gaps.append(logp_T.detach().float().cpu().numpy() - np.concatenate([row.logprobs for row in part]))
            real += sum(row.tokens for row in part)
            padded += sum(row.tokens for row in part) if packed else max(row.tokens for row in part) * len(part)
        sum_gradients(actor.model)
        norm = float(torch.nn.utils.clip_grad_norm_(actor.model.parameters(), train.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        sums["grad_norm"] += norm / world
    actor.model.eval()

    sums |= {"real": real, "padded": padded}
    return {"train/lr": learning_rate} | _update_metrics(sums, np.concatenate(gaps or [np.zeros(0)]), len(batches))


def _update_metrics(own: dict[str, float], gap_T: np.ndarray, updates: int) -> dict[str, float]:
    """Means over the ranks' sums; `gap_T` holds this rank's log-prob differences between trainer and engine."""
    gaps = {"gap": np.abs(gap_T).sum(), "gap_kl": (np.exp(gap_T) - 1 - gap_T).sum(), "gaps": len(gap_T)}
    sums = total(gather([own | {key: float(value) for key, value in gaps.items()}]))
    worst = max(gather([float(np.abs(gap_T).max(initial=0.0))]))
    seen = max(1.0, sums.get("seen", 0.0))
    return {
        "train/loss_actor": sums.get("loss_actor", 0.0) / updates,
        "train/loss_judge": sums.get("loss_judge", 0.0) / updates,
        "train/kl": sums.get("kl", 0.0) / seen,
        "train/entropy": sums.get("entropy", 0.0) / seen,
        "train/ratio": sums.get("ratio", 0.0) / seen,
        "train/clip_fraction": sums.get("clip_fraction", 0.0) / seen,
        "train/approx_kl": sums.get("approx_kl", 0.0) / seen,
        "train/grad_norm": sums["grad_norm"] / updates,
        "train/updates": updates,
        "train/tokens": sums["real"],
        "train/padding_share": 1 - sums["real"] / max(1, sums["padded"]),
        "mismatch/mean_abs": sums["gap"] / max(1, sums["gaps"]),
        "mismatch/kl": sums["gap_kl"] / max(1, sums["gaps"]),
        "mismatch/max_abs": worst,
    }


def micro_batch_loss(
    logp_T: torch.Tensor,
    entropy_T: torch.Tensor,
    rows: Sequence[Row],
    known: dict,
    tokens: dict,
    counts: dict,
    config: Config,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The share of a mini-batch's loss that these rows contribute, and sums of metrics over their tokens.

    `tokens` and `counts` are the mini-batch's response tokens and rows by kind, over all ranks.
    """
    algo, device = config.algo, logp_T.device
    lengths = torch.tensor([len(row.response_ids) for row in rows])
    row_T = torch.arange(len(rows)).repeat_interleave(lengths).to(device)  # [T]
    advantage_T = torch.tensor([row.advantage for row in rows], device=device)[row_T]  # [T]
    judged_T = torch.tensor([row.judge for row in rows], device=device)[row_T]  # [T]
    old_T, ref_T = (
        torch.from_numpy(np.concatenate([known[id(row)][which] for row in rows])).to(device) for which in (0, 1)
    )  # [T]
    loss, parts = logp_T.new_zeros(()), {}
    for judged, name, weight in ((False, "loss_actor", 1.0), (True, "loss_judge", config.judge.weight)):
        mask_T = judged_T == judged  # [T]
        if not mask_T.any():
            continue
        one = [tensor[mask_T] for tensor in (logp_T, old_T, advantage_T, row_T)]
        loss_T, seen = losses.POLICY_LOSSES[algo.policy_loss](*one, algo)  # [T]
        if algo.kl:
            kl_T = losses.kl(one[0], ref_T[mask_T], algo.kl_estimator)  # [T]
            loss_T, seen = loss_T + algo.kl * kl_T, seen | {"kl": kl_T.detach().mean()}
        if algo.entropy:
            loss_T = loss_T - algo.entropy * entropy_T[mask_T]  # [T]
        length = config.judge.max_response_tokens if judged else config.rollout.max_response_tokens
        share = losses.aggregate(loss_T, one[3], algo.aggregate, tokens[judged], counts[judged], length)
        loss = loss + weight * share
        parts[name] = float(share.detach())
        for key, value in seen.items():
            parts[key] = parts.get(key, 0.0) + float(value) * int(mask_T.sum())
    parts |= {"entropy": float(entropy_T.detach().sum()), "seen": len(logp_T)}
    return loss, parts


def _matters(row: Row, config: Config) -> bool:
    """Whether a row's loss can have a gradient; the others are counted in every denominator and not computed."""
    return row.advantage != 0 or config.algo.kl > 0 or config.algo.entropy != 0


def lr_factor(config: Config, iteration: int) -> float:
    """The learning rate's factor: linear warm-up, then constant, or falling by 1/iterations from one to the next."""
    warm = min(1.0, (iteration + 1) / config.train.warmup) if config.train.warmup else 1.0
    return warm * (1 - iteration / config.train.iterations if config.train.schedule == "linear" else 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, records, checkpoints


def gather(items: list) -> list:
    """The ranks' lists end to end, on every rank."""
    if dist.get_world_size() == 1:
        return items
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums by key."""
    return {key: sum(record.get(key, 0) for record in records) for key in sorted({key for r in records for key in r})}


class Clock:
    """Seconds per phase of one iteration."""

    def __init__(self) -> None:
        self.started, self.phases = time.monotonic(), {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.monotonic() - began

    def metrics(self, rows: Sequence[Row]) -> dict[str, float]:
        """time/* in seconds, and sampled tokens per second of the phases that sample."""
        sampled = sum(len(row.response_ids) for row in rows)
        sampling = self.phases["collect"] + self.phases.get("judge", 0.0)
        record = {f"time/{phase}": seconds for phase, seconds in self.phases.items()}
        record |= {"time/total": time.monotonic() - self.started, "rollout/tokens_per_s": sampled / sampling}
        if torch.cuda.is_available():
            record["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return record


def rollout_metrics(episodes: Sequence[Episode], counts: dict[str, int]) -> dict[str, float]:
    """What the collected episodes show; `counts` are collect()'s and label_episodes()'s.

    Raises RuntimeError if not one episode was left.
    """
    if not episodes:
        raise RuntimeError(f"no episode was collected: {dict(counts)}; the warnings above say why")
    steps = [step for episode in episodes for step in episode.steps]
    actions = Counter(step.action for step in steps)
    repeats = 0
    for episode in episodes:
        seen = Counter((step.observation, step.action) for step in episode.steps)
        repeats += sum(count - 1 for count in seen.values())
    return {
        "rollout/episodes": len(episodes),
        "rollout/success": float(np.mean([episode.won for episode in episodes])),
        "rollout/success_loose": float(np.mean([episode.won_loose for episode in episodes])),
        "rollout/score": float(np.mean([episode.score for episode in episodes])),
        "rollout/steps": len(steps),
        "rollout/steps_per_episode": len(steps) / len(episodes),
        "rollout/invalid": float(np.mean([not step.valid for step in steps])),
        "rollout/unavailable": float(np.mean([not step.available for step in steps])),
        "rollout/repeats": repeats / len(steps),
        "rollout/top_action_share": actions.most_common(1)[0][1] / len(steps),
        "rollout/prompt_tokens": float(np.mean([len(step.prompt_ids) for step in steps])),
        "rollout/response_tokens": float(np.mean([len(step.response_ids) for step in steps])),
        "rollout/restarted": counts.get("restarted", 0),
        "rollout/discarded": counts.get("discarded", 0),
        **{f"judge/{key}": value for key, value in counts.items() if key.startswith(("label", "teacher"))},
    }


def row_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Shares of rows that carry no signal, by kind."""
    record = {}
    for judged, name in ((False, "train"), (True, "judge")):
        kind = [row.advantage for row in rows if row.judge == judged]
        if kind:
            record |= {f"{name}/rows": len(kind), f"{name}/zero_advantage": float(np.mean([a == 0 for a in kind]))}
    return record


class Log:
    """Rank 0's record of the run: metrics.jsonl (the source of truth), TensorBoard, episodes, a line on the screen."""

    def __init__(self, config: Config, start: int) -> None:
        self.config, self.folder = config, config.run_dir
        configuration.save(config, self.folder / "config.yaml")
        self.metrics = self.folder / "metrics.jsonl"
        kept = self.metrics.read_text().splitlines() if start and self.metrics.is_file() else []
        rewritten = self.metrics.with_suffix(".partial")
        rewritten.write_text("".join(f"{line}\n" for line in kept if _iteration(line) < start))
        rewritten.replace(self.metrics)
        (self.folder / "episodes").mkdir(exist_ok=True)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)

    def write(self, iteration: int, metrics: dict, episodes: list[Episode], questions: list, rules: list[str]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps({"iteration": iteration} | metrics) + "\n")
        for key, value in metrics.items():
            self.board.add_scalar(key, value, iteration)
        if iteration % self.config.train.episodes_every == 0:
            asked = [
                {
                    "group": question.group,
                    "member": question.member,
                    "step": question.index,
                    "label": question.step.label,
                    "source": question.step.label_source,
                    "answers": [answer.response for answer in question.answers],
                }
                for question in questions
            ]
            with (self.folder / "episodes" / f"{iteration:06d}.jsonl").open("w") as file:
                for number, episode in enumerate(episodes):
                    file.write(json.dumps(episode.to_json(tokens=number < 2)) + "\n")
                file.write(json.dumps({"questions": asked, "guidelines": rules}) + "\n")
        judged = f"  judge {metrics['judge/balanced_accuracy']:.2f}" if "judge/balanced_accuracy" in metrics else ""
        evaluated = "".join(f"  {key[5:]} {value:.3f}" for key, value in metrics.items() if key.startswith("eval/"))
        print(
            f"{iteration + 1:4d}/{self.config.train.iterations}  success {metrics['rollout/success']:.3f}"
            f"  steps {metrics['rollout/steps_per_episode']:.1f}  invalid {metrics['rollout/invalid']:.3f}"
            f"  unavailable {metrics['rollout/unavailable']:.3f}{judged}  entropy {metrics['train/entropy']:.2f}"
            f"  grad {metrics['train/grad_norm']:.2f}  mismatch {metrics['mismatch/mean_abs']:.1e}"
            f"  {metrics['time/total']:.1f} s (collect {metrics['time/collect']:.1f},"
            f" update {metrics['time/update']:.1f})"
            f"{evaluated}",
            flush=True,
        )


def _iteration(line: str) -> float:
    """The iteration of a line of metrics.jsonl; infinity for one that was torn by the end of its process."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def save_checkpoint(
    actor: Actor, optimizer, config: Config, iteration: int, advice: list[str], rules: list[str]
) -> None:
    """checkpoints/<iteration>/ and then `latest`, each atomically."""
    folder = config.run_dir / "checkpoints" / f"{iteration:06d}"
    state = {
        "iteration": iteration,
        "optimizer": optimizer.state_dict(),
        "advice": advice,
        "rules": rules,
        "config": configuration.to_dict(config),
    }
    save_model(actor, folder, {"guidelines.json": rules}, state)
    point_latest(folder, config.train.keep_checkpoints)


def find_checkpoint(config: Config) -> tuple[Path | None, dict]:
    """The run's last checkpoint and its trainer state, or (None, {}) for a new run.

    Raises ConfigError if the checkpoint was made by other settings.
    """
    folder = config.run_dir / "checkpoints" / "latest"
    if not folder.exists():
        return None, {}
    state = torch.load(folder / "trainer" / "state.pt", weights_only=True, map_location="cpu")
    now, default = (_flat(configuration.to_dict(one)) for one in (config, Config()))
    then = default | _flat(state["config"])  # an option that is younger than the run had its default's effect
    changed = [
        key for key in now | then if now.get(key) != then.get(key) and not {key, key.split(".")[0]} & FREE_TO_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"{config.run_dir} was made with other settings ({', '.join(changed)}): choose another name "
            f"(--set name=...) or delete the folder"
        )
    return folder.resolve(), state


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def dry_run(config: Config) -> str:
    """The resolved config and what one iteration will do. Raises ConfigError where it does not divide over torchrun's
    ranks."""
    configuration.check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    episodes = config.rollout.groups * config.rollout.group_size
    answers = config.judge.questions * config.judge.group_size if config.judge.enabled else 0
    return yaml.safe_dump(configuration.to_dict(config), sort_keys=False, width=120) + (
        f"\n# one iteration: {config.rollout.groups} games x {config.rollout.group_size} = {episodes} episodes of at "
        f"most {config.env.max_steps} steps, {answers} critiques\n"
        f"# update: at most {-(-episodes * config.env.max_steps // config.train.rows_per_update)} optimizer steps of "
        f"{config.train.rows_per_update} rows\n"
    )


if __name__ == "__main__":
    configuration.fail_clearly(main)

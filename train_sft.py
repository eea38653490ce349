"""Cold start: expert episodes -> chat rows -> supervised fine-tuning.

    torchrun --nproc_per_node=8 train_sft.py configs/qwen7b_sft.yaml
    python train_sft.py configs/base.yaml                      # `make base`: the tiny base model, from scratch

Variants (sft.variant): `vanilla`, expert episodes with thoughts from an offline template; `generative`, plus judged
steps in the critic's format (paper, Table 3 and Appendix B); `reading`, episodes of random behaviour, which teach a
tiny model to read and to copy, and no strategy.  Rows are chat-format JSONL (`messages`), cached under data/sft by what
made them.  Prompts come from the builder that rollouts and evaluation use.  Departure from published code: prompts show
the admissible actions as in RL, and rows come from the level's training games alone, so held-out types never enter.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import envs
import prompts
from config import Config, ConfigError
from judge import expert_verdict
from model import (
    Actor,
    Row,
    add_phrases,
    join_ranks,
    load_actor,
    make_optimizer,
    micro_batches,
    point_latest,
    save_model,
    sum_gradients,
    token_logprobs,
)
from thoughts import ADVICE, SCIENCE_ADVICE, Situation, critique, need, places, reply, thought

DATA_VERSION = 7  # raise it when the code below makes other rows from the same config

# ----------------------------------------------------------------------------------------------------------------------
# Rows


def make_rows(config: Config) -> Iterator[dict]:
    """The chat rows of `config.sft`: the same, in the same order, for the same config."""
    tasks = envs.tasks(config.env, config.env.level, "train")
    rng = random.Random(f"cold start {config.seed}")
    rng.shuffle(tasks)
    play = _random_episode if config.sft.variant == "reading" else _expert_episode
    queue = deque(tasks)
    critics: dict[int, list[dict]] = {0: [], 1: []}
    laps = 10 if config.env.name == "alfworld" else 1  # of the gold path nothing hangs on chance
    passed_over = 0
    for _ in range(config.sft.episodes):
        lost = 0
        while not (episode := play(config, queue[0], rng)):
            lost += 1
            queue.rotate(-1)
            if lost > laps * len(tasks):
                raise ConfigError("the expert wins none of the training games within env.max_steps; raise it")
        passed_over += lost
        for turn in episode:
            if turn.taught:
                rules = _some_advice(config, rng) if rng.random() < config.sft.guided else ()
                yield _chat(_prompt(config, turn, rules), turn.reply)
        if config.sft.variant != "vanilla":
            row, verdict = _critic_row(config, queue[0], episode, rng)
            critics[verdict].append(row)
        queue.rotate(-1)
    for verdict, rows in critics.items():
        needed = config.sft.critic_examples // 2
        if config.sft.variant != "vanilla" and len(rows) < needed:
            raise ConfigError(
                f"sft.critic_examples={config.sft.critic_examples} needs {needed} rows of verdict {verdict}, "
                f"{config.sft.episodes} episodes gave {len(rows)}; raise sft.episodes"
            )
        yield from rows[:needed]
    if passed_over:
        tqdm.write(f"{passed_over} games that the expert did not win within {config.env.max_steps} steps are left out")


@dataclass(frozen=True)
class Turn:
    """One action of an episode; those not `taught` are played only."""

    at: Situation
    action: str
    taught: bool
    reply: str = ""
    memory: dict = field(default_factory=dict)  # of the episode's earlier replies: prompts.memory


def _expert_episode(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
    """The expert's play of one game, or [] if it did not win within env.max_steps.

    With probability sft.noise a slip is played instead and not taught: the expert shows how to recover.  With
    probability sft.idle, never twice in a row, it looks around instead, which changes nothing, and this is taught.
    """
    env, expert = envs.make_env(config.env), envs.make_expert(config.env, rng.getrandbits(32))
    action = expert.reset(task)
    if isinstance(expert, envs.GoldPath) and len(expert.left) > config.env.max_steps:
        return []
    seen = env.reset(task)
    turns: list[Turn] = []
    while action is not None and not seen.done and len(turns) < config.env.max_steps:
        at, slips = _situation(config, seen, turns), rng.random() < config.sft.noise
        if slips:
            action = _slip(at, turns, rng)
        elif config.sft.idle and rng.random() < config.sft.idle:  # at 0 the rows are those without the option
            action = action if turns and turns[-1].action == _idle(turns[-1].at) else _idle(at)
        turns.append(_turn(config, at, action, not slips, turns))
        seen, action = env.step(action), expert.step(action)
    return turns if seen.won else []


def _idle(at: Situation) -> str:
    """What looks at the place in front once more, or around where there is none."""
    return next((f"examine {place}" for place in places(at)), "look")


def _random_episode(config: Config, task: envs.Task, rng: random.Random) -> list[Turn]:
    """Random play: a random kind of action, those that lead nowhere less often, then a random one of that kind; slips
    as the expert's, for what follows "Nothing happens.". Steps where nothing counts abound: one in 5 is taught."""
    env = envs.make_env(config.env)
    seen = env.reset(task)
    turns: list[Turn] = []
    while not seen.done and len(turns) < config.env.max_steps:
        at, slips = _situation(config, seen, turns), rng.random() < config.sft.noise
        action = _slip(at, turns, rng) if slips else _of_random_kind(at.actions, rng)
        rare = not thought(at, action).endswith("Next nothing.")
        turns.append(_turn(config, at, action, not slips and (rare or rng.random() < 1 / 5), turns))
        seen = env.step(action)
    return turns


def _of_random_kind(actions: Sequence[str], rng: random.Random) -> str:
    kinds = sorted({action.split(" ")[0] for action in actions})
    (kind,) = rng.choices(kinds, [1 / 4 if kind in ("look", "inventory", "examine", "close") else 1 for kind in kinds])
    return rng.choice([action for action in actions if action.split(" ")[0] == kind])


def _slip(at: Situation, turns: Sequence[Turn], rng: random.Random) -> str:
    """A mistake of the kinds that models make: an admissible action at random, one of an earlier step (by now mostly
    impossible), a grasp for the needed object as if it were here, or going where one is."""
    kind = rng.choice(("random", "earlier", "grasp", "stay"))
    if kind == "earlier" and turns:
        return _of_random_kind(rng.choice(turns).at.actions, rng)
    here = places(at)
    if kind == "grasp" and here:
        return f"take {need(at)['object']} {rng.randint(1, 3)} from {rng.choice(here)}"
    if kind == "stay" and here:
        return f"go to {rng.choice(here)}"
    return rng.choice(at.actions)


def _situation(config: Config, seen: envs.Observation, turns: Sequence[Turn]) -> Situation:
    recent = turns[-config.env.history :] if config.env.history else ()
    history = tuple((turn.at.observation, turn.action) for turn in recent)
    return Situation(config.env.name, seen.task, seen.text, seen.actions, history, len(turns), seen.objects)


def _turn(config: Config, at: Situation, action: str, taught: bool, turns: Sequence[Turn]) -> Turn:
    texts = [turn.reply for turn in turns]
    said = [prompts.parse_reply(text, config.prompt_style, config.env.name) for text in texts]
    return Turn(
        at, action, taught, reply(at, action, config.prompt_style), prompts.memory(said, texts, config.prompt_style)
    )


def _critic_row(config: Config, task: envs.Task, episode: Sequence[Turn], rng: random.Random) -> tuple[dict, int]:
    """A judged step of the episode, as chat row and verdict: the action played, or a random one in its place.

    The verdict and the better action are the offline teacher's, who sees the full state; in a `reading` set they are
    random, since no strategy may be in there.
    """
    chosen = rng.randrange(len(episode))
    at, action = episode[chosen].at, episode[chosen].action
    if rng.random() < 0.5:
        action = _random_action(at, rng)
    if config.sft.variant == "reading":
        verdict, better = rng.randrange(2), rng.choice(at.actions)
    else:
        verdict, better = expert_verdict(config.env, task, [turn.action for turn in episode[:chosen]], action)
    answer = reply(at, action, config.prompt_style)
    question = prompts.build_critic_prompt(config.env.name, _prompt(config, episode[chosen]), answer)
    return _chat(question, critique(at, action, verdict, better or episode[chosen].action)), verdict


def _random_action(at: Situation, rng: random.Random) -> str:
    """Any action on offer, ScienceWorld's on any objects in reach."""
    action = rng.choice(at.actions)
    return re.sub(r"\bOBJ\b", lambda _: rng.choice(at.objects), action)


def _some_advice(config: Config, rng: random.Random) -> list[str]:
    known = sorted((ADVICE if config.env.name == "alfworld" else SCIENCE_ADVICE).values())
    return rng.sample(known, rng.randint(1, len(known)))


def _prompt(config: Config, turn: Turn, rules: Sequence[str] = ()) -> str:
    at = turn.at
    seen = (at.env, at.task, at.observation, at.actions, at.history, at.step, rules, at.objects)
    return prompts.build_prompt(*seen, **turn.memory)


def _chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows_file(config: Config) -> Path:
    """The JSONL of make_rows(config), made if no file of the same settings exists."""
    keys = ("variant", "episodes", "critic_examples", "noise", "idle", "guided")
    made_by = {
        "version": DATA_VERSION,
        "seed": config.seed,
        "style": config.prompt_style,
        "env": dataclasses.asdict(config.env) | {"data": str(envs.data_folder(config.env).resolve())},
        "games": [task.id for task in envs.tasks(config.env, config.env.level, "train")],
        **{key: getattr(config.sft, key) for key in keys},
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    path = Path("data") / "sft" / f"{config.sft.variant}-{digest}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            for row in tqdm(make_rows(config), desc="cold-start rows", unit=" rows", mininterval=2):
                file.write(json.dumps(row) + "\n")
        partial.rename(path)
    return path


def read_rows(path: Path) -> list[dict]:
    """The chat rows of a JSONL file, as {"prompt", "response"}. Raises ConfigError on a malformed line."""
    rows = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                user, assistant = json.loads(line)["messages"][-2:]
                rows.append({"prompt": user["content"], "response": assistant["content"]})
                if not all(isinstance(text, str) for text in rows[-1].values()):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}, line {number}: not a chat row with `messages`") from None
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Training


def tokenise(actor: Actor, row: dict, prompt_loss: float) -> tuple[Row, np.ndarray]:
    """A training row and the loss weight of each of its targets: 1 on the reply and, where `prompt_loss` is not 0, that
    on the prompt, whose tokens (all but the first) then are targets too."""
    prompt, response = actor.encode(row["prompt"]), actor.encode_reply(row["response"])
    ids = np.array(prompt + response, dtype=np.int32)
    first = 1 if prompt_loss else len(prompt)
    weight = np.where(np.arange(first, len(ids)) < len(prompt), prompt_loss, 1.0)
    return Row(ids[:first], ids[first:]), weight


def updates(rows: Sequence[dict], per_update: int, rng: random.Random) -> list[list[int]]:
    """One epoch: the rows' indices in mini-batches in random order, each of rows of similar length, to pad little."""
    order = rng.sample(range(len(rows)), len(rows))
    window = 50 * per_update
    order = [
        index
        for start in range(0, len(order), window)
        for index in sorted(order[start : start + window], key=lambda i: len(rows[i]["prompt"] + rows[i]["response"]))
    ]
    batches = [order[start : start + per_update] for start in range(0, len(order), per_update)]
    rng.shuffle(batches)
    return batches


def main() -> None:
    """Rows, training, checkpoint."""
    command = configuration.parser(__doc__)
    command.add_argument("--dry-run", action="store_true", help="print the resolved config and check its arithmetic")
    arguments = command.parse_args()
    config = configuration.load(arguments.config, arguments.set)
    preflight(config, int(os.environ.get("WORLD_SIZE", "1")))
    if arguments.dry_run:
        return print(configuration.dump(config))
    rank, _ = join_ranks(config)
    if rank == 0:
        rows_file(config)
    dist.barrier()
    rows = read_rows(rows_file(config))
    corpus = [row["prompt"] + row["response"] for row in rows[:: len(rows) // 5000 + 1]]
    actor = load_actor(config, corpus)
    if config.sft.phrases:
        add_phrases(actor)
    train(actor, rows, config)
    if rank == 0:
        folder = config.run_dir / "checkpoints" / "final"
        save_model(actor, folder)
        point_latest(folder, keep=1)
        print(f"{len(rows)} rows, {config.sft.epochs} epochs: {folder.with_name('latest')}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def preflight(config: Config, world: int) -> None:
    """What would stop the run later, stops it here: raises ConfigError."""
    configuration.check_lineage(config)
    if config.sft.rows_per_update % world:
        raise ConfigError(f"sft.rows_per_update={config.sft.rows_per_update} does not divide over {world} ranks")


def train(actor: Actor, rows: Sequence[dict], config: Config) -> None:
    """sft.epochs passes over the rows; every mini-batch is the same for every world size. Writes metrics.jsonl."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sft = config.sft
    optimizer = make_optimizer(actor.model, sft.lr, sft.weight_decay, (0.9, 0.95))
    number = math.ceil(len(rows) / sft.rows_per_update) * sft.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, round(sft.warmup_ratio * number), number)
    if rank == 0:
        configuration.save(config, config.run_dir / "config.yaml")
        (config.run_dir / "metrics.jsonl").write_text("")
    rng = random.Random(f"epochs {config.seed}")
    batches = [(epoch, batch) for epoch in range(sft.epochs) for batch in updates(rows, sft.rows_per_update, rng)]
    ready = functools.lru_cache(maxsize=None)(lambda index: tokenise(actor, rows[index], sft.prompt_loss))
    progress = tqdm(batches, desc=f"SFT {config.name}", unit=" updates", disable=rank != 0, mininterval=2)
    started = time.monotonic()
    actor.model.train()
    for done, (epoch, batch) in enumerate(progress, 1):
        own = [ready(index) for index in batch[rank::world]]
        weight = sum(float(weight.sum()) for _, weight in own)
        replies = sum(int((weight == 1).sum()) for _, weight in own)
        totals = torch.tensor([weight, replies, 0.0], dtype=torch.float64)  # over all ranks: weight, reply tokens, nll
        dist.all_reduce(totals[:2])
        for group in micro_batches([row for row, _ in own], sft.tokens_per_micro_batch, actor.packed):
            logp_T, _ = token_logprobs(actor, [own[index][0] for index in group])  # [T]
            weight_T = torch.from_numpy(np.concatenate([own[index][1] for index in group])).to(logp_T)  # [T]
            (-(logp_T * weight_T).sum() / float(totals[0])).backward()
            totals[2] -= float(logp_T.detach()[weight_T == 1].sum())
        sum_gradients(actor.model)
        norm = torch.nn.utils.clip_grad_norm_(actor.model.parameters(), sft.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if done % 50 == 0 or done == len(batches):
            dist.all_reduce(totals[2:])
            record = {
                "update": done,
                "epoch": epoch,
                "train/nll_per_token": float(totals[2] / totals[1]),
                "train/grad_norm": float(norm),
                "train/lr": schedule.get_last_lr()[0],
                "time/total": time.monotonic() - started,
            }
            progress.set_postfix(nll=f"{record['train/nll_per_token']:.3f}")
            if rank == 0:
                with (config.run_dir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
    actor.model.eval()


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""Cold start: expert episodes -> chat rows -> supervised fine-tuning.

    torchrun --nproc_per_node=8 train_sft.py configs/qwen7b_sft.yaml
    python train_sft.py configs/base.yaml                      # `make base`: the tiny base model, from scratch

Variants (sft.variant): `vanilla`, expert episodes with thoughts from an offline template or a teacher; `generative`,
plus judged steps in the critic's format (paper, Table 3 and Appendix B); `value`, plus judged steps that a value head
classifies; `reading`, episodes of random behaviour, which teach a tiny model to read and to copy, and no strategy.
Rows are chat-format JSONL (`messages`), cached under data/sft by what made them.  Prompts come from the builder that
rollouts and evaluation use.  Departure from published code: prompts show the admissible actions as in RL, and rows come
from the level's training games alone, so held-out types never enter.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import time
from collections import Counter, deque
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
    last_hidden,
    load_actor,
    micro_batches,
    point_latest,
    save_model,
    token_logprobs,
)
from ranks import aligned, join_ranks, make_optimizer, progress_bar, step, whole
from records import describe
from teacher import Teacher, check_key
from thoughts import ADVICE, SCIENCE_ADVICE, Situation, critique, need, places, reply, thought

RECORD_EVERY = 50  # updates between lines of metrics.jsonl
DATA_VERSION = 7  # raise it when the code below makes other rows from the same config

# ----------------------------------------------------------------------------------------------------------------------
# Rows


def make_rows(config: Config) -> Iterator[dict]:
    """The chat rows of `config.sft`: the same, in the same order, for the same config (and the same teacher's answers).

    With sft.variant=value the judged steps have a "label" instead of a critique.
    """
    critics: dict[int, list[tuple[Turn, str, str | None]]] = {0: [], 1: []}  # by verdict: step, action, a better one
    half = config.sft.critic_examples // 2 if config.sft.variant != "vanilla" else 0
    teacher = Teacher(config.judge) if config.sft.writer == "teacher" else None
    fallen_back: Counter[str] = Counter()
    for chunk in _chunks(_drafts(config), 64 if teacher else 1):
        if teacher:
            chunk, failed = _thoughts_by(teacher, chunk, config)
            fallen_back["episodes"] += failed
        for draft in chunk:
            for index, rules in draft.taught:
                yield _chat(_prompt(config, draft.turns[index], rules), draft.turns[index].reply)
            if half and len(critics[draft.verdict]) < half:
                critics[draft.verdict].append((draft.turns[draft.chosen], draft.action, draft.better))
    for verdict, judged in critics.items():
        if len(judged) < half:
            raise ConfigError(
                f"sft.critic_examples={config.sft.critic_examples} needs {half} rows of verdict {verdict}, "
                f"{config.sft.episodes} episodes gave {len(judged)}; raise sft.episodes"
            )
        if config.sft.variant == "value":
            for turn, action, _ in judged:
                answer = reply(turn.at, action, config.prompt_style)
                yield _chat(_prompt(config, turn), answer) | {"label": verdict}
            continue
        rows = [_critic_row(config, *one, verdict) for one in judged]
        if teacher:
            rows, failed = _critiques_by(teacher, rows, verdict)
            fallen_back["critiques"] += failed
        yield from rows
    if fallen_back.total():
        tqdm.write(f"the teacher's words could not be used, the template's are, for: {dict(fallen_back)}")


@dataclass(frozen=True)
class Draft:
    """An episode to teach, and its judged step: everything that chance decides."""

    turns: list[Turn]
    taught: list[tuple[int, Sequence[str]]]  # index of the turn, guidelines in its prompt
    chosen: int = 0
    action: str = ""
    verdict: int = 0
    better: str | None = None


def _drafts(config: Config) -> Iterator[Draft]:
    tasks = envs.tasks(config.env, config.env.level, "train")
    rng = random.Random(f"cold start {config.seed}")
    rng.shuffle(tasks)
    play = _random_episode if config.sft.variant == "reading" else _expert_episode
    queue = deque(tasks)
    laps = 10 if config.env.name == "alfworld" else 1  # of the gold path nothing hangs on chance
    passed_over = 0
    for _ in range(config.sft.episodes):
        lost = 0
        while not (turns := play(config, queue[0], rng)):
            lost += 1
            queue.rotate(-1)
            if lost > laps * len(tasks):
                raise ConfigError("the expert wins none of the training games within env.max_steps; raise it")
        passed_over += lost
        taught = [
            (index, _some_advice(config, rng) if rng.random() < config.sft.guided else ())
            for index, turn in enumerate(turns)
            if turn.taught
        ]
        draft = Draft(turns, taught)
        yield draft if config.sft.variant == "vanilla" else _judged(config, queue[0], draft, rng)
        queue.rotate(-1)
    if passed_over:
        tqdm.write(f"{passed_over} games that the expert did not win within {config.env.max_steps} steps are left out")


def _chunks(drafts: Iterator[Draft], size: int) -> Iterator[list[Draft]]:
    while chunk := list(itertools.islice(drafts, size)):
        yield chunk


@dataclass(frozen=True)
class Turn:
    """One action of an episode; those not `taught` are played only."""

    at: Situation
    action: str
    taught: bool
    reply: str = ""
    recalled: dict = field(default_factory=dict)  # of the episode's earlier replies: prompts.recall


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
        at, action, taught, reply(at, action, config.prompt_style), prompts.recall(said, texts, config.prompt_style)
    )


def _judged(config: Config, task: envs.Task, draft: Draft, rng: random.Random) -> Draft:
    """A step of the episode to judge: the action played, or a random one in its place.

    The verdict and the better action are the offline teacher's, who sees the full state; in a `reading` set they are
    random, since no strategy may be in there.
    """
    chosen = rng.randrange(len(draft.turns))
    at, action = draft.turns[chosen].at, draft.turns[chosen].action
    if rng.random() < 0.5:
        action = _random_action(at, rng)
    if config.sft.variant == "reading":
        verdict, better = rng.randrange(2), rng.choice(at.actions)
    else:
        played = [turn.action for turn in draft.turns[:chosen]]
        verdict, better = expert_verdict(config.env, task, played, action)
    return dataclasses.replace(draft, chosen=chosen, action=action, verdict=verdict, better=better)


def _critic_row(config: Config, turn: Turn, action: str, better: str | None, verdict: int) -> dict:
    """A judged step in the critic's format: its reply is the played one, or the template's for another action."""
    answer = turn.reply if action == turn.action else reply(turn.at, action, config.prompt_style)
    question = prompts.build_critic_prompt(config.env.name, _prompt(config, turn), answer)
    return _chat(question, critique(turn.at, action, verdict, better or turn.action))


def _thoughts_by(teacher: Teacher, drafts: list[Draft], config: Config) -> tuple[list[Draft], int]:
    """The drafts with thoughts that the teacher wrote, and how many keep the template's: those whose answers changed an
    action, left one out or could not be read, three times."""
    style, env = config.prompt_style, config.env.name
    open_drafts = dict(enumerate(drafts))
    for attempt in range(1, 4):
        requests = []
        for draft in open_drafts.values():
            seen = [(turn.at.observation, turn.action) for turn in draft.turns]
            requests.append(prompts.build_thoughts_prompt(env, draft.turns[0].at.task, seen, style))
        answers = teacher.ask(requests, votes=attempt)  # earlier ones are kept on disk
        for number, said in zip(list(open_drafts), answers, strict=True):
            turns = drafts[number].turns
            replies = prompts.parse_thoughts(said[-1], [turn.action for turn in turns], style) if said else None
            if replies:
                drafts[number] = dataclasses.replace(open_drafts.pop(number), turns=_rewritten(turns, replies, config))
    return drafts, len(open_drafts)


def _rewritten(turns: Sequence[Turn], replies: Sequence[str], config: Config) -> list[Turn]:
    """The turns with other replies, which later prompts remember."""
    style = config.prompt_style
    said = [prompts.parse_reply(text, style, config.env.name) for text in replies]
    return [
        dataclasses.replace(turn, reply=text, recalled=prompts.recall(said[:index], replies[:index], style))
        for index, (turn, text) in enumerate(zip(turns, replies, strict=True))
    ]


def _critiques_by(teacher: Teacher, rows: list[dict], verdict: int) -> tuple[list[dict], int]:
    """The rows with critiques that the teacher wrote, and how many keep the template's: those whose answer has another
    verdict, or none, or no advice."""
    failed = 0
    questions = [row["messages"][0]["content"] for row in rows]
    for index, said in enumerate(teacher.ask(questions)):
        found = prompts.parse_critique(said[0]) if said else None
        if found and found.score == verdict and found.advice:
            rows[index] = _chat(questions[index], prompts.inert(said[0]))
        else:
            failed += 1
    return rows, failed


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
    return prompts.build_prompt(*seen, **turn.recalled)


def _chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows_file(config: Config) -> Path:
    """The JSONL of make_rows(config), made if no file of the same settings exists."""
    keys = ("variant", "writer", "episodes", "critic_examples", "noise", "idle", "guided")
    writer = {"url": config.judge.base_url, "model": config.judge.model} if config.sft.writer == "teacher" else {}
    made_by = {
        "version": DATA_VERSION,
        "seed": config.seed,
        "style": config.prompt_style,
        "env": dataclasses.asdict(config.env) | {"data": str(envs.data_folder(config.env).resolve())},
        "games": [task.id for task in envs.tasks(config.env, config.env.level, "train")],
        **{key: getattr(config.sft, key) for key in keys},
        **writer,
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    path = Path("data") / "sft" / f"{config.sft.variant}-{digest}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            for row in progress_bar(make_rows(config), desc="cold-start rows", unit=" rows"):
                file.write(json.dumps(row) + "\n")
        partial.rename(path)
    return path


def read_rows(path: Path) -> list[dict]:
    """The chat rows of a JSONL file, as {"prompt", "response"} and, if it is one to classify, "label". Raises
    ConfigError on a malformed line."""
    rows = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                user, assistant = row["messages"][-2:]
                texts = {"prompt": user["content"], "response": assistant["content"]}
                if not all(isinstance(text, str) for text in texts.values()):
                    raise TypeError
                rows.append(texts | ({"label": int(row["label"])} if "label" in row else {}))
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
    first = 1 if prompt_loss and "label" not in row else len(prompt)
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
    actor = load_actor(config, corpus, phrases=config.sft.phrases)
    head = value_head(actor) if config.sft.variant == "value" else None
    train(actor, rows, config, head)
    folder = config.run_dir / "checkpoints" / "final"
    save_model(actor, folder, state={"value_head": head.state_dict()} if head else None)
    if rank == 0:
        point_latest(folder, keep=1)
        print(f"{len(rows)} rows, {config.sft.epochs} epochs: {folder.with_name('latest')}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def preflight(config: Config, world: int) -> None:
    """What would stop the run later, stops it here: raises ConfigError."""
    configuration.check_lineage(config)
    if config.sft.writer == "teacher":
        check_key(config.judge)
    if config.sft.rows_per_update % world:
        raise ConfigError(f"sft.rows_per_update={config.sft.rows_per_update} does not divide over {world} ranks")


def value_head(actor: Actor) -> torch.nn.Linear:
    """A classifier of replies on the last hidden state: the logit of "good". It starts at 0, the same on every rank."""
    head = torch.nn.Linear(actor.model.config.hidden_size, 1).to(actor.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def classification_loss(
    actor: Actor, head: torch.nn.Linear, rows: Sequence[Row], labels: Sequence[int]
) -> tuple[torch.Tensor, int]:
    """Sum of the binary cross-entropies of whole replies, each judged where it ends, and how many were right.

    Source: the value-based classifier of the paper's Table 3, on the same labels as the generative one.
    """
    hidden_TH, _ = whole(actor.model, lambda: last_hidden(actor, rows))  # [T, H]
    ends = torch.tensor([len(row.response_ids) for row in rows]).cumsum(0) - 1  # [B]
    logit_B = head(hidden_TH[ends.to(actor.device)].float())[:, 0]  # [B]
    label_B = torch.tensor(labels, dtype=torch.float32, device=actor.device)  # [B]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum")
    return loss, int(((logit_B > 0) == (label_B > 0)).sum())


def train(actor: Actor, rows: Sequence[dict], config: Config, head: torch.nn.Linear | None = None) -> None:
    """sft.epochs passes over the rows; every mini-batch is the same for every world size. Writes metrics.jsonl.

    Rows with a label are not imitated: `head` learns to classify them, its mean loss being added to the others'.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sft = config.sft
    trained = torch.nn.ModuleList([actor.model, *([head] if head else [])])
    optimizer = make_optimizer(trained, sft.lr, sft.weight_decay, (0.9, 0.95), config.train.optimizer)
    number = math.ceil(len(rows) / sft.rows_per_update) * sft.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, round(sft.warmup_ratio * number), number)
    if rank == 0:
        describe(config)
        (config.run_dir / "metrics.jsonl").write_text("")
    rng = random.Random(f"epochs {config.seed}")
    batches = [(epoch, batch) for epoch in range(sft.epochs) for batch in updates(rows, sft.rows_per_update, rng)]
    ready = functools.lru_cache(maxsize=None)(lambda index: tokenise(actor, rows[index], sft.prompt_loss))
    bar = progress_bar(batches, desc=f"SFT {config.name}", unit=" updates")
    started = time.monotonic()
    actor.model.train()
    for done, (epoch, batch) in enumerate(bar, 1):
        mine = batch[rank::world]
        own = [ready(index) for index in mine if "label" not in rows[index]]
        judged = [index for index in mine if "label" in rows[index]]
        weight = sum(float(weight.sum()) for _, weight in own)
        replies = sum(int((weight == 1).sum()) for _, weight in own)
        # over all ranks: weight, reply tokens, classified rows; then nll, rows classified rightly
        totals = torch.tensor([weight, replies, len(judged), 0.0, 0.0], dtype=torch.float64)
        dist.all_reduce(totals[:3])
        imitated = micro_batches([row for row, _ in own], sft.tokens_per_micro_batch, actor.packed)
        for group in aligned(imitated, actor.model):
            if not group:  # another rank has more of them
                (0 * token_logprobs(actor, [Row.blank()])[0].sum()).backward()
                continue
            logp_T, _ = token_logprobs(actor, [own[index][0] for index in group])  # [T]
            weight_T = torch.from_numpy(np.concatenate([own[index][1] for index in group])).to(logp_T)  # [T]
            (-(logp_T * weight_T).sum() / float(totals[0])).backward()
            totals[3] -= float(logp_T.detach()[weight_T == 1].sum())
        classified = micro_batches([ready(index)[0] for index in judged], sft.tokens_per_micro_batch, actor.packed)
        for group in aligned(classified, actor.model):
            if not group:
                (0 * classification_loss(actor, head, [Row.blank()], [0])[0]).backward()
                continue
            part = [judged[place] for place in group]
            loss, right = classification_loss(
                actor, head, [ready(index)[0] for index in part], [rows[index]["label"] for index in part]
            )
            (loss / float(totals[2])).backward()
            totals[4] += right
        norm = step(trained, optimizer, sft.max_grad_norm)
        if not math.isfinite(norm):
            raise RuntimeError(f"update {done}: the gradient is not finite; lower sft.lr, or look at the rows")
        schedule.step()
        if done % RECORD_EVERY == 0 or done == len(batches):
            dist.all_reduce(totals[3:])
            record = {
                "update": done,
                "epoch": epoch,
                "train/nll_per_token": float(totals[3] / totals[1].clamp(min=1)),
                **({"train/value_accuracy": float(totals[4] / totals[2])} if totals[2] else {}),
                "train/grad_norm": norm,
                "train/lr": schedule.get_last_lr()[0],
                "time/total": time.monotonic() - started,
            }
            bar.set_postfix(nll=f"{record['train/nll_per_token']:.3f}")
            if rank == 0:
                if bar.disable:  # no terminal
                    nll, seconds = record["train/nll_per_token"], record["time/total"]
                    print(f"{done:6d}/{len(batches)}  nll {nll:.3f}  grad {norm:.2f}  {seconds:.0f} s", flush=True)
                with (config.run_dir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
    actor.model.eval()


if __name__ == "__main__":
    configuration.fail_clearly(main)

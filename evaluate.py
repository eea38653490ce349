"""A checkpoint -> success per level and per task type, with intervals.

    python evaluate.py --ckpt runs/quickstart/checkpoints/latest
    python evaluate.py --ckpt Qwen/Qwen2.5-1.5B-Instruct --config configs/qwen1.5b_gcd.yaml     # the Vanilla row
    torchrun --nproc_per_node=8 evaluate.py --ckpt runs/NAME/checkpoints/latest
    python evaluate.py --table runs/quickstart_base runs/quickstart_sft runs/quickstart          # one table of several

Every game of a level's fixed list is played once per sampling seed; the rate comes with n and a 95 % interval, which is
over games: plays of one game are alike, and count for less than as many plays of different ones.  Success is strict.
L2 of a run that was trained on L2's task types is marked as such: they are not new to it.
A checkpoint's guidelines are part of it: its evaluation prompts carry them.  On a GPU vLLM is alone, and may have most
of it: --set rollout.gpu_memory_utilization=0.9.  Writes eval_CHECKPOINT.json and the episodes to the run's folder (or
--out), and replaces none that is there.  Departure from published code, which draws games with replacement and others
at each validation: the list is whole and fixed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import config as configuration  # before torch: it sets the number of threads

# isort: split
import numpy as np

import envs
from config import LEVELS, Config, ConfigError
from distributed import PreemptionSignal, all_gather_objects, announce, init_distributed
from engine import Engine, make_engine
from logger import repeats
from model import load_model
from model_files import check_path
from rollout import Episode, play

EVALUATION = -1  # takes the iteration's place in sampling seeds, so they differ from training's


def main() -> None:
    """Evaluate a checkpoint, or print a table of what was found of several."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--ckpt", help="a run's checkpoint, a Hugging Face folder or an id")
    command.add_argument("--config", help="YAML; default: the config.yaml of the checkpoint's run")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    command.add_argument("--levels", nargs="+", choices=LEVELS)
    command.add_argument("--games", type=int, help="only N games of each level, always the same")
    command.add_argument("--seeds", type=int, help="sampling seeds per game")
    command.add_argument("--temperature", type=float)
    command.add_argument("--out", type=Path, help="folder to write to; default: the run's, or runs/eval_<model>")
    command.add_argument("--table", nargs="+", type=Path, metavar="RUN", help="print the newest of several runs")
    arguments = command.parse_args()
    if arguments.table:
        distinct = len({folder.name for folder in arguments.table}) == len(arguments.table)
        return print(table({folder.name if distinct else str(folder): _read(folder) for folder in arguments.table}))
    if not arguments.ckpt:
        command.error("--ckpt or --table is needed")
    ckpt = configuration.expand_path(arguments.ckpt, "--ckpt")
    check_path(ckpt)
    run = configuration.run_folder(ckpt)
    config = _config(arguments, run)
    file = preflight(config, ckpt, arguments.out or run or Path("runs") / f"eval_{Path(ckpt).name}")
    rank, _ = init_distributed(config)
    announce(f"load {ckpt}")
    policy = load_model(config, path=ckpt, train=False)
    guidelines_file = Path(ckpt) / "guidelines.json"
    guidelines = json.loads(guidelines_file.read_text()) if guidelines_file.is_file() else []
    engine = make_engine(config, policy, keep_model=False)
    announce(f"play {', '.join(config.eval.levels)}")
    started = time.monotonic()
    results, episodes = evaluate_levels(engine, config, guidelines)
    if "L2" in results:  # a run that was trained on held-out types is marked: they are not new to it
        held_out = envs.held_out_types(config.env)
        results["L2"]["trained_on"] = sorted(envs.lineage(ckpt).keys() & held_out)
    if rank == 0:
        record = {
            "checkpoint": ckpt,
            "seconds": time.monotonic() - started,
            "guidelines": guidelines,
            "temperature": config.eval.temperature,
            "seeds": config.eval.seeds,
            "levels": results,
        }
        print(table({file.parent.name: record}, by_type=True), flush=True)  # first: a disk may be full
        with gzip.open(file.with_name(f"{file.stem}_episodes.jsonl.gz"), "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(episode.to_json()) + "\n" for episode in episodes)
        partial = file.with_suffix(".partial")  # last and whole: it says that the checkpoint is evaluated
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(file)
        print(file, flush=True)
    engine.close()


def preflight(config: Config, ckpt: str, out: Path) -> Path:
    """Check what would stop the evaluation later, before the model is loaded; return the file to write. Raises
    ConfigError, also where that checkpoint has been evaluated before."""
    envs.check(config.env)
    for level in config.eval.levels:
        envs.check_reset(config.env, evaluation_tasks(config, level))
    file = out / f"eval_{Path(ckpt).resolve().name if Path(ckpt).is_dir() else Path(ckpt).name}.json"
    if file.exists():
        raise ConfigError(f"{file} is there already: say --out FOLDER for another one, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}; say --out FOLDER") from None
    return file


def evaluation_tasks(config: Config, level: str) -> list[envs.Task]:
    """List the tasks that a level is evaluated on: its fixed list, or eval.games of it. Raises ConfigError."""
    tasks = envs.tasks(config.env, level, "eval")
    if config.eval.games > len(tasks):
        raise ConfigError(f"eval.games={config.eval.games}, but {level} has only {len(tasks)} games")
    # the list is sorted by type, so a part of it is drawn, always the same
    return random.Random(0).sample(tasks, config.eval.games) if config.eval.games else tasks


def evaluate_levels(
    engine: Engine,
    config: Config,
    guidelines: Sequence[str],
    env_pool: Sequence[envs.Environment] = (),
    preemption: PreemptionSignal | None = None,
) -> tuple[dict[str, dict], list[Episode]]:
    """Play every level of config.eval; results by level and all episodes, the same on every rank and world size.

    `env_pool` are the environments to play in; without it they are made. Where `preemption` comes in the middle, there
    are no results.
    """
    results, everything = {}, []
    for level in config.eval.levels:
        tasks = evaluation_tasks(config, level)
        group_tasks = {number: tasks[number] for number in engine.share(len(tasks))}
        in_flight = min(config.rollout.concurrency, max(1, len(group_tasks) * config.eval.seeds))
        env_pool = env_pool or envs.make_pool(config.env, in_flight)
        episodes = play(
            engine,
            env_pool,
            group_tasks,
            config,
            iteration=EVALUATION,
            members=config.eval.seeds,
            temperature=config.eval.temperature,
            guidelines=guidelines,
            title=level,
            should_stop=lambda: preemption is not None and preemption.received,
        )
        if preemption and preemption.any_rank():
            return {}, []
        episodes = all_gather_objects(episodes)
        expected = len(tasks) * config.eval.seeds
        if len(episodes) != expected:
            raise RuntimeError(
                f"{level}: {expected - len(episodes)} of {expected} episodes were lost to failing "
                "environments; a success rate over the rest would not be the level's"
            )
        results[level] = summarise(episodes)
        everything += episodes
    return results, everything


def summarise(episodes: Sequence[Episode]) -> dict:
    """Compute success with its interval, overall, per seed, per task type and game; steps, invalid and repeated
    actions."""
    steps = [step for episode in episodes for step in episode.steps]
    by_type, by_seed = defaultdict(list), defaultdict(list)
    for episode in episodes:
        by_type[episode.task.type].append(episode)
        by_seed[episode.member].append(episode.won)
    return {
        **rate(episodes),
        "types": {name: rate(own) | {"won_by_game": won_by_game(own)} for name, own in sorted(by_type.items())},
        "mean_of_types": float(np.mean([rate(played)["success"] for played in by_type.values()])),
        "success_loose": float(np.mean([episode.won_loose for episode in episodes])),
        "by_seed": [float(np.mean(by_seed[seed])) for seed in sorted(by_seed)],
        "mean_steps": len(steps) / len(episodes),
        "mean_steps_won": float(np.mean([len(e.steps) for e in episodes if e.won]))
        if any(e.won for e in episodes)
        else None,
        "invalid": float(np.mean([not step.valid for step in steps])),
        "unavailable": float(np.mean([not step.available for step in steps])),
        "repeats": sum(sum(repeats(episode)) for episode in episodes) / len(steps),
    }


def won_by_game(episodes: Sequence[Episode]) -> list[int]:
    """Count each game's plays that were won, in the order of the level's list."""
    won: dict[int, int] = defaultdict(int)
    for episode in episodes:
        won[episode.group] += episode.won
    return [won[number] for number in sorted(won)]


def rate(episodes: Sequence[Episode]) -> dict:
    """Compute {"success", "n", "games", "low", "high"}: the share won, its 95 % Wilson interval at the effective n.

    That is n divided by the design effect (Kish 1965): the variance of the share with games as clusters over that with
    all plays independent, at least 1. Where nothing tells it, all or none being won, every game counts once.
    """
    outcomes = defaultdict(list)
    for episode in episodes:
        outcomes[episode.task.id].append(episode.won)
    wins_G, plays_G = (np.array([count(won) for won in outcomes.values()]) for count in (sum, len))  # [games]
    n, games = int(plays_G.sum()), len(plays_G)
    share = float(wins_G.sum() / n)
    effect = n / games
    if 0 < share < 1 and games > 1:
        clustered = ((wins_G - share * plays_G) ** 2).sum() / n**2 * games / (games - 1)
        effect = max(1.0, clustered / (share * (1 - share) / (n - 1)))
    low, high = _wilson(share, n / effect)
    return {"success": share, "n": n, "games": games, "low": low, "high": high}


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Compute the 95 % Wilson interval of a share of `n` trials, which need not be a whole number."""
    z = NormalDist().inv_cdf(0.975)
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


def table(records: dict[str, dict], by_type: bool = False) -> str:
    """Lay out runs as rows, levels as columns: success in percent, its 95 % interval and n."""
    levels = sorted({level for record in records.values() for level in record["levels"]})
    width = max(len(name) for name in records) + 2
    lines = [" " * width + "".join(f"{level:<28}" for level in levels)]
    for name, record in records.items():
        cells = [summary_line(record["levels"][level]) if level in record["levels"] else "-" for level in levels]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:<28}" for cell in cells))
        if by_type:
            for level in levels:
                result = record["levels"][level]
                shares = {key: f"{100 * result[key]:.1f} %" for key in ("invalid", "unavailable", "repeats")}
                lines.append(
                    f"\n{level}: {result['mean_steps']:.1f} steps per episode, {shares['invalid']} malformed replies, "
                    f"{shares['unavailable']} unavailable actions, {shares['repeats']} repeats"
                )
                lines += [f"  {kind:<52}{summary_line(one)}" for kind, one in result["types"].items()]
                if len(result["types"]) > 1:
                    lines.append(f"  {'mean over task types':<52}{100 * result['mean_of_types']:.1f}")
                if result["success_loose"] != result["success"]:
                    lines.append(f"  {'won by the loose published rule':<52}{100 * result['success_loose']:.1f}")
    if any(result.get("trained_on") for record in records.values() for result in record["levels"].values()):
        lines.append("* task types that the run was trained on")
    return "\n".join(lines)


def summary_line(result: dict) -> str:
    """Say the success of a level: "61.3 [57.4, 65.1] n=600"; with an asterisk if its task types were trained on."""
    mark = "*" * bool(result.get("trained_on"))
    interval = f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
    return f"{100 * result['success']:.1f}{mark} {interval} n={result['n']}"


def _config(arguments: argparse.Namespace, run: Path | None) -> Config:
    path = arguments.config or (run / "config.yaml" if run else None)
    if path is None:
        raise ConfigError(
            f"{arguments.ckpt} is not a checkpoint of a run: say --config, for the environment and prompts"
        )
    config = configuration.load(path, arguments.set)
    given = {key: getattr(arguments, key) for key in ("levels", "games", "seeds", "temperature")}
    chosen = {key: tuple(value) if key == "levels" else value for key, value in given.items() if value is not None}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **chosen))
    configuration.check(config)
    return config


def _read(folder: Path) -> dict:
    file = configuration.newest_evaluation(folder)
    if file is None:
        raise ConfigError(f"{folder} has no eval_*.json: run evaluate.py on a checkpoint of that run first")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is torn ({error}): delete it, and run evaluate.py again") from None


if __name__ == "__main__":
    configuration.fail_clearly(main)

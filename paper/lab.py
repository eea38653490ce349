"""Many runs as one experiment: each trains, is evaluated and measured, and leaves one small JSON.

    rows = {"grpo": Row("GRPO", "grpo", start="sft"), ...}      a row of a table; with a training seed it is a run
    lab = Lab("lab", Path("docs/lab"))                          configs/lab_*.yaml; where the JSONs lie
    lab.run_all(rows, {"grpo": (0, 1, 2), ...})                 what has its JSON is not run again
    records = lab.records(rows)                                 what the JSONs hold

On CPUs as many runs as there are cores go side by side, one rank and one thread each; with GPUs one after the other,
over all of them.  A run that was interrupted goes on from its last checkpoint.  Each seed has a cold start of its own,
from which all of its rows start; runs of one seed see the same games in the same order and sample with the same seeds.

interval() has the statistics: a hierarchical bootstrap over training seeds and games, which are both drawn from more.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm as normal
from scipy.stats import t as student_t

import config as configuration
from config import Config, ConfigError

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ONE_RANK = ("paper/mechanism.py",)
RESAMPLES = 4000
POLL_SECONDS = 10  # how often to look whether others can start from what a run has trained
COOL = "pick_cool_then_place_in_recep"  # of ALFWorld's L2 the type that can be mistaken for a trained one: heat, clean
LATE = 5  # iterations at the end of a run, over which training's metrics are averaged
TRAINING = (  # what a record keeps of metrics.jsonl: a curve of the first, the late mean of the others
    "rollout/success",
    "rollout/repeat_consistency",
    "coupling/gap_cos",
    "coupling/gap_mean_src",
    "coupling/flawed_rising",
    "coupling/flawed_in_danger",
    "judge/balanced_accuracy",
    "judge/questions",
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A way of training: a config, what differs from it, and the row whose checkpoint it starts from."""

    title: str
    config: str  # configs/PREFIX_<config>.yaml
    start: str = ""  # the row whose run of the same seed it starts from; empty: the config's own model
    overrides: tuple[str, ...] = ()
    script: str = "train_rl.py"  # empty: its model is evaluated as it is


@dataclass(frozen=True)
class Lab:
    """A family of configs, and the folder of its runs' JSONs, whose name theirs begin with."""

    prefix: str
    folder: Path
    settings: tuple[str, ...] = ()  # for all runs, as KEY=VALUE

    def name(self, row: str, seed: int) -> str:
        """Return the name of a run, of its folder under runs/ and of its JSON."""
        return f"{self.folder.name}_{row}_s{seed}"

    def file(self, row: str, seed: int) -> Path:
        """Return the path of a run's JSON."""
        return self.folder / f"{self.name(row, seed)}.json"

    def config(self, row: Row) -> Config:
        """Load a row's config as its runs have it, but for what is a seed's. Raises ConfigError."""
        return configuration.load(self.path(row), self._settings(row))

    def path(self, row: Row) -> Path:
        """Return the path of a row's config."""
        return Path("configs") / f"{self.prefix}_{row.config}.yaml"

    def start(self, rows: Mapping[str, Row], name: str, seed: int) -> str:
        """Return the model that a run starts from."""
        row = rows[name]
        if row.start and rows[row.start].script:
            return f"runs/{self.name(row.start, seed)}/checkpoints/latest"
        return self.config(rows[row.start] if row.start else row).model.path

    def end(self, rows: Mapping[str, Row], name: str, seed: int) -> str:
        """Return the name of the checkpoint that a run ends with, or of the model that is evaluated as it is."""
        row = rows[name]
        if not row.script:
            return Path(self.start(rows, name, seed)).name
        return "final" if row.script == "train_sft.py" else f"{self.config(row).train.iterations:06d}"

    def commands(self, rows: Mapping[str, Row], name: str, seed: int) -> list[list[str]]:
        """List what makes a run's files, but for its record: training, evaluation, mechanism."""
        row, run, start = rows[name], f"runs/{self.name(name, seed)}", self.start(rows, name, seed)
        own = [*self._settings(row), f"name={self.name(name, seed)}", f"seed={seed}", f"model.path={start}"]
        if not row.script:
            return [["evaluate.py", "--ckpt", start, "--config", str(self.path(row)), "--out", run, "--set", *own]]
        return [
            [row.script, str(self.path(row)), "--set", *own],
            ["evaluate.py", "--ckpt", f"{run}/checkpoints/latest"],
            ["paper/mechanism.py", run, "--start", start],
        ]

    # ------------------------------------------------------------------------------------------------------------------
    # Running

    def run_all(self, rows: Mapping[str, Row], seeds: Mapping[str, Sequence[int]], workers: int, ranks: int) -> None:
        """Run rows with these seeds, and the rows that they start from, `workers` side by side. Raises ConfigError
        with the logs of the runs that failed, when all others are done."""
        todo = self._todo(rows, seeds)
        for row in {rows[name] for name, _ in todo}:  # a mistake in a config ends it here
            if self.config(row).eval.seeds > 9:
                raise ConfigError(f"{self.path(row)}: eval.seeds is above 9, and a record has a digit per game")
        self.folder.mkdir(parents=True, exist_ok=True)
        total, done, running, failures = len(todo), 0, dict[Future, tuple[str, int]](), list[str]()
        with ThreadPoolExecutor(workers) as threads:
            while todo or running:
                ready = [one for one in todo if self._can_start(rows, *one)]
                for name, seed in ready[: workers - len(running)]:
                    todo.remove((name, seed))
                    running[threads.submit(self._run, rows, name, seed, ranks)] = (name, seed)
                if not running:
                    failures.append(f"{len(todo)} runs have no cold start to begin with: it failed")
                    break
                finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    name, seed = running.pop(future)
                    try:
                        record = future.result()
                    except ConfigError as error:
                        failures.append(str(error))
                        print(f"{self.name(name, seed)} failed", flush=True)
                        continue
                    done += 1
                    left = self._seconds(rows, [*todo, *running.values()]) / workers
                    print(f"{done} of {total}: {_brief(record)}; about {_clock(left)} left", flush=True)
        if failures:
            raise ConfigError("\n\n".join([*failures, "the other runs have their records: --only-print shows them"]))

    def _todo(self, rows: Mapping[str, Row], seeds: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
        """List the runs without a record, by seed; before them the cold starts that they lack. Raises ConfigError."""
        recorded = self.records(rows)
        missing = [(name, seed) for name in rows for seed in seeds.get(name, ()) if seed not in recorded[name]]
        starts = [(rows[name].start, seed) for name, seed in missing if not self._can_start(rows, name, seed)]
        cold = [one for one in dict.fromkeys([*missing, *starts]) if rows[one[0]].script != "train_rl.py"]
        rest = [one for one in missing if one not in cold]
        return [*sorted(cold, key=lambda one: one[1]), *sorted(rest, key=lambda one: one[1])]

    def _can_start(self, rows: Mapping[str, Row], name: str, seed: int) -> bool:
        """Tell whether the model that a run starts from is there. Raises ConfigError if it never will be."""
        start = Path(self.start(rows, name, seed))
        if not start.is_relative_to("runs") or start.with_name("final").is_dir():
            return True
        if not rows[name].start:
            raise ConfigError(f"{name} starts from {start}, which is not there")
        return False

    def _run(self, rows: Mapping[str, Row], name: str, seed: int, ranks: int) -> Record:
        """Run what of a run is missing, and write its record; of one that has it, train what others start from."""
        run, log = Path("runs") / self.name(name, seed), Path("runs") / f"{self.name(name, seed)}.log"
        end, recorded = self.end(rows, name, seed), self.file(name, seed).is_file()
        run.parent.mkdir(exist_ok=True)
        for script, *arguments in self.commands(rows, name, seed)[: 1 if recorded else None]:
            if _is_made(script, run, end):
                continue
            alone = ranks == 1 or script in ONE_RANK
            launcher = [sys.executable] if alone else [*TORCHRUN, f"--nproc_per_node={ranks}"]
            with log.open("a") as out:
                environment = {"OMP_NUM_THREADS": "1"} | os.environ
                ended = subprocess.run([*launcher, ROOT / script, *arguments], env=environment, stdout=out, stderr=out)
            if not _is_made(script, run, end):  # it failed, or was told to stop, which is none
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise ConfigError(f"{script} of {run.name} ended with {ended.returncode}; the end of {log}:\n{tail}")
        if not recorded:
            kept = {"row": name, "seed": seed, "settings": self._settings(rows[name])}
            write_json(self.file(name, seed), kept | make_record(run, end))
        return self.records(rows)[name][seed]

    def _seconds(self, rows: Mapping[str, Row], runs: Iterable[tuple[str, int]]) -> float:
        """Estimate how long these runs take, one after the other, from those of their rows, or any, that are done."""
        known = {name: [one["seconds"] for one in found.values()] for name, found in self.records(rows).items()}
        every = [seconds for found in known.values() for seconds in found]
        return sum(float(np.mean(known[name] or every)) for name, _ in runs)

    def records(self, rows: Mapping[str, Row]) -> dict[str, dict[int, Record]]:
        """Read the records that are there: row -> seed -> record. Raises ConfigError where one is of other settings or
        games than asked for: such numbers do not belong into one table."""
        found: dict[str, dict[int, Record]] = {name: {} for name in rows}
        games: set[str] = set()
        for file in sorted(self.folder.glob("*_s[0-9]*.json")):
            record = json.loads(file.read_text())
            if record["row"] not in found:
                continue
            found[record["row"]][record["seed"]] = record
            if record["settings"] != (settings := self._settings(rows[record["row"]])):
                raise ConfigError(f"{file} was made with {record['settings']}, not {settings}: use another folder")
            games.add(record["games"])
            if len(games) > 1:
                raise ConfigError(f"{file} and those before it are of different games: use another folder")
        return found

    def _settings(self, row: Row) -> list[str]:
        """List what of a row's runs differs from their config."""
        return [*self.settings, *row.overrides]


def _is_made(script: str, run: Path, end: str) -> bool:
    """Tell whether a script has made what a run ends with: its last checkpoint, or what is measured of that one."""
    if script == "evaluate.py":
        return (run / f"eval_{end}.json").is_file()
    if script == "paper/mechanism.py":
        file = run / "mechanism.json"
        return file.is_file() and json.loads(file.read_text())["checkpoint"] == end
    return (run / "checkpoints" / end).is_dir()


def make_record(run: Path, end: str) -> Record:
    """Gather what is kept of a run: success and behaviour by level, which games were won, curves, mechanism, time.

    `end` is the name of its last checkpoint. `won` has a digit per game, by task type, in the order of the level's
    fixed list: how often it was won of `plays`. `games` is a digest of these lists.
    """
    evaluation = run / f"eval_{end}.json"
    found = json.loads(evaluation.read_text())
    keys = ("success", "low", "high", "n", "mean_steps", "invalid", "unavailable", "repeats")
    levels = {
        level: {key: one[key] for key in keys}
        | {"won": {kind: "".join(map(str, own["won_by_game"])) for kind, own in one["types"].items()}}
        for level, one in found["levels"].items()
    }
    record: Record = {"levels": levels, "plays": found["seeds"], "guidelines": found["guidelines"]}
    with gzip.open(evaluation.with_name(f"eval_{end}_episodes.jsonl.gz"), "rt", encoding="utf-8") as lines:
        episodes = [json.loads(line) for line in lines]
    record["games"] = hashlib.sha256(" ".join(sorted(one["task"]["id"] for one in episodes)).encode()).hexdigest()[:12]
    record["cooling"] = count_cooling(episodes)
    record["seconds"] = found["seconds"]
    if (run / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        record["seconds"] += sum(line["time/total"] for line in lines)
        record["curve"] = [round(line[TRAINING[0]], 4) for line in lines if TRAINING[0] in line]
        late = {key: [line[key] for line in lines[-LATE:] if key in line] for key in TRAINING}
        record["late"] = {key: float(np.mean(values)) for key, values in late.items() if values}
    if (run / "mechanism.json").is_file():
        measured = json.loads((run / "mechanism.json").read_text())
        record["mechanism"] = measured["levels"]
        record["seconds"] += measured["seconds"]
    return record


def count_cooling(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute in which share of the episodes of COOL something of the kind that the task names is cooled, is heated, is
    cleaned, is heated or cleaned. Where there are no such episodes it is empty."""
    acts: list[set[str]] = []  # of each episode
    for episode in episodes:
        if episode["task"]["type"] == COOL:
            kind = episode["task"]["id"].partition(f"{COOL}-")[2].split("-")[0].lower()
            actions = [(step["action"] or "").split() for step in episode["steps"]]
            acts.append({words[0] for words in actions if words[1:2] == [kind]})
    if not acts:
        return {}
    found = {f"{verb}ed": np.array([verb in own for own in acts]) for verb in ("cool", "heat", "clean")}
    found["heated or cleaned"] = found["heated"] | found["cleaned"]
    return {key: round(float(had.mean()), 4) for key, had in found.items()}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, file)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a terminal."""
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def _brief(record: Record) -> str:
    success = ", ".join(f"{level} {100 * one['success']:.1f}" for level, one in record["levels"].items())
    return f"{record['row']}, seed {record['seed']}: {success}; {_clock(record['seconds'])}"


def _clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def shares(records: Mapping[int, Record], level: str, seeds: Sequence[int] = (), kind: str = "") -> np.ndarray:
    """Return the share of plays won of every game, or those of a task type, by every run of a row: float64 [seeds,
    games]."""
    lines = []
    for record in (records[seed] for seed in seeds or sorted(records)):
        won = record["levels"][level]["won"]
        lines.append([int(digit) / record["plays"] for digit in (won[kind] if kind else "".join(won.values()))])
    return np.array(lines)


def gain(
    ours: Mapping[int, Record], plain: Mapping[int, Record], seeds: Sequence[int], level: str, kind: str = ""
) -> np.ndarray:
    """Compute by what ours wins a level's games, or those of a task type, more often: float64 [seeds, games]."""
    return shares(ours, level, seeds, kind) - shares(plain, level, seeds, kind)


def interval(*values_SG: np.ndarray) -> list[float]:
    """Compute [estimate, low, high] of the mean over seeds, games and arrays: 95 % of a hierarchical bootstrap.

    Each array is of one level, [seeds, games]: a share, or a difference of two paired runs. A resample draws seeds, the
    same for all arrays, and games, the same for all seeds, both with replacement. Two corrections for few seeds: S of S
    seeds drawn understate their variance by (S - 1) / S, so their weights' deviations are scaled up by its root; and
    the interval is widened as Student's t is against the normal, at Satterthwaite's degrees of freedom for a variance
    of which the seeds' part has S - 1. With one seed the interval is over games alone. tests/test_lab.py simulates how
    often it holds the truth.
    """
    rng, seeds = np.random.default_rng(0), len(values_SG[0])
    weight_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    weight_RS = 1 / seeds + (weight_RS - 1 / seeds) * np.sqrt(seeds / max(1, seeds - 1))
    means_R = np.zeros(RESAMPLES)
    for value_SG in values_SG:
        games = value_SG.shape[1]
        weight_RG = rng.multinomial(games, np.full(games, 1 / games), size=RESAMPLES) / games
        means_R += np.einsum("rs,sg,rg->r", weight_RS, value_SG, weight_RG, optimize=True) / len(values_SG)
    middle = float(np.mean([value_SG.mean() for value_SG in values_SG]))
    low, high = middle + (np.percentile(means_R, [2.5, 97.5]) - middle) * _widening(values_SG)
    return [middle, float(low), float(high)]


def interval_over_seeds(values_S: np.ndarray) -> list[float]:
    """Compute [estimate, low, high] of the mean of a number per run: Student's t, 95 %; of one run the number alone."""
    seeds, middle = len(values_S), float(values_S.mean())
    if seeds == 1:
        return [middle]
    half = float(student_t.ppf(0.975, seeds - 1) * values_S.std(ddof=1) / np.sqrt(seeds))
    return [middle, middle - half, middle + half]


def _widening(values_SG: Sequence[np.ndarray]) -> float:
    """Compute by what an interval for a mean over few seeds is wider than the normal one."""
    seeds = len(values_SG[0])
    of_seeds = np.mean([value_SG.mean(1) for value_SG in values_SG], axis=0).var(ddof=1) / seeds if seeds > 1 else 0.0
    if not of_seeds:
        return 1.0
    of_games = sum(value_SG.mean(0).var() / value_SG.shape[1] for value_SG in values_SG) / len(values_SG) ** 2
    degrees = (seeds - 1) * ((of_seeds + of_games) / of_seeds) ** 2
    return float(student_t.ppf(0.975, degrees) / normal.ppf(0.975))

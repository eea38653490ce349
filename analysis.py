"""The paper's figures, from runs' files and checkpoints: a picture and its numbers as JSON, with intervals.

    python analysis.py runs/quickstart runs/quickstart_plain --figures 8 judge --out figures

  8      coupling of gradients: influence between actions of one class minus that between classes (paper, equation 2)
  judge  balanced accuracy of the actor as judge of actions, on games held out from training

Runs that started from the same model are compared on one panel of actions: that model plays --games games of L0's
evaluation list once, at the training temperature and without guidelines; its steps are labelled by the paper's rules
and, where these say nothing, by the environment's expert; half of the --steps drawn are good.  The start and every
checkpoint that the runs have kept are measured on that panel, as judges on steps of their own, too.  Intervals are 95 %
bootstraps over games.  Runs of one method that differ by their seed are averaged in the last table.

Decisions where the paper is silent: influences are those of the output layer, at the training temperature; beside the
gap by tokens ("mean_src") stands its cosine, because the former grows with the norm of the hidden states alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import config as configuration  # before torch: it sets the number of threads

# isort: split
import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot
from tqdm import tqdm

import envs
import judge
import losses
from config import Config, ConfigError
from evaluate import EVALUATION
from model import Row, load_actor
from ranks import join_ranks
from rollout import Engine, collect, make_engine, sync
from telemetry import influences

RESAMPLES = 1000


@dataclass(frozen=True)
class Snapshot:
    """A model on its way: a checkpoint of a run or, at iteration 0, what the run started from."""

    run: str
    method: str
    start: str
    iteration: int
    folder: str


def main() -> None:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    command.add_argument("--figures", nargs="+", choices=FIGURES, required=True)
    command.add_argument("--games", type=int, default=100, help="of each panel (default: %(default)s)")
    command.add_argument("--steps", type=int, default=200, help="of each panel (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("figures"), help="folder (default: %(default)s)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    arguments = command.parse_args()
    configs = {run: load_run(run, arguments.set) for run in arguments.runs}
    shots = [shot for run in configs for shot in snapshots(run, configs[run])]
    config = for_panels(configs.values(), arguments.games, arguments.steps)
    join_ranks(config)
    engine: Engine | None = None
    panels: dict[str, list[judge.Question]] = {}
    measured: dict[tuple[str, str], dict] = {}  # figure, model
    found: dict[str, list[dict]] = {figure: [] for figure in arguments.figures}
    for shot in tqdm(shots, unit=" checkpoints"):
        actor = load_actor(config, path=shot.folder, train=False)
        if engine is None:
            engine = make_engine(config, actor)
        engine.actor = actor
        sync(engine, actor)
        if shot.start not in panels:  # a run's first snapshot is its start
            panels[shot.start] = play_panel(engine, config)
        for figure in arguments.figures:
            key = (figure, shot.folder)  # runs may share their start
            if key not in measured:
                measured[key] = FIGURES[figure].measure(engine, panels[shot.start], config)
            found[figure].append(dataclasses.asdict(shot) | measured[key])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for figure, records in found.items():
        path = arguments.out / f"figure_{figure}.json"
        path.write_text(json.dumps({"config": configuration.to_dict(config), "checkpoints": records}, indent=1))
        draw(records, FIGURES[figure], path.with_suffix(".png"))
        print(f"{table(records, FIGURES[figure])}\n{path.with_suffix('.png')}\n", flush=True)
    engine.close()


def load_run(run: Path, overrides: Sequence[str]) -> Config:
    """A run's config. Raises ConfigError if `run` is not the folder of one."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.yaml")
    return configuration.load(run / "config.yaml", overrides)


def for_panels(configs: Iterable[Config], games: int, steps: int) -> Config:
    """The settings that all runs are measured with: the first one's that was trained with GCD, else the first one's."""
    configs = list(configs)
    config = next((config for config in configs if config.judge.enabled), configs[0])
    asking = dataclasses.replace(config.judge, enabled=True, teacher="expert", questions=steps)
    return dataclasses.replace(config, judge=asking, eval=dataclasses.replace(config.eval, games=games))


def snapshots(run: Path, config: Config) -> list[Snapshot]:
    """The start of a run, then its checkpoints. Raises ConfigError if it has none."""
    folders = sorted(path for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    if not folders:
        raise ConfigError(f"{run} has no checkpoints of iterations: give the folder of a run of train_rl.py")
    method = config.algo.advantage + (" with GCD" if config.judge.enabled else "")
    start = str(Path(config.model.path).resolve()) if Path(config.model.path).exists() else config.model.path
    stages = [(0, start), *((int(folder.name), str(folder)) for folder in folders)]
    return [Snapshot(run.name, method, start, iteration, folder) for iteration, folder in stages]


def play_panel(engine: Engine, config: Config) -> list[judge.Question]:
    """Labelled steps of held-out games, half of them good, not yet judged; a question's group is its game."""
    tasks = envs.tasks(config.env, "L0", "eval")
    tasks = random.Random(0).sample(tasks, min(config.eval.games, len(tasks)))
    pool = [envs.make_env(config.env) for _ in range(min(config.rollout.concurrency, len(tasks)))]
    episodes = collect(engine, pool, tasks, config, iteration=EVALUATION, members=1)
    # the teacher sees as many steps per episode as in training, so that the mix of labels is that which is trained on
    shown = config.judge.teacher_steps * len(episodes) // (config.rollout.groups * config.rollout.group_size)
    judge.label_episodes(episodes, config, random.Random(0), budget=shown)
    return judge.pick(episodes, config.judge.questions, random.Random(0))


# ----------------------------------------------------------------------------------------------------------------------
# Measurements: numbers of one model on a panel, each as [estimate, low, high]


def coupling_gaps(engine: Engine, panel: Sequence[judge.Question], config: Config) -> dict:
    """Figure 8: the gap over all pairs, within games and between them, as cosine and by the source's tokens."""
    rows = [Row(np.array(one.step.prompt_ids), np.array(one.step.response_ids)) for one in panel]
    influence_RR = influences(engine.actor, rows, config)  # [R, R]
    length_R = torch.tensor([len(row.response_ids) for row in rows], dtype=torch.float64)  # [R]
    label_R, game_R = (torch.tensor(one) for one in zip(*((q.step.label, q.group) for q in panel), strict=True))  # [R]
    within_RR = game_R[:, None] == game_R  # [R, R]
    pairs = {"": torch.ones_like(within_RR), " within games": within_RR, " between games": ~within_RR}  # [R, R] each
    numbers: dict = {"steps": len(panel)}
    for how in ("cos", "mean_src"):
        for where, counted_RR in pairs.items():

            def gap(times_R: np.ndarray, how: str = how, counted_RR: torch.Tensor = counted_RR) -> float:
                times = torch.from_numpy(times_R).double()  # [R]
                weight_RR = times[:, None] * torch.where(within_RR, 1, times)  # [R, R] no pair of a game and its copy
                return losses.coupling_gap(influence_RR, length_R, label_R, how, weight_RR * counted_RR)

            numbers[how + where] = interval(gap, game_R.numpy())
    return numbers


def held_out_judge(engine: Engine, panel: Sequence[judge.Question], config: Config) -> dict:
    """How well the actor judges the panel's steps, and its own of the same games. Chance is 0.5."""
    return accuracies(engine, panel, config) | accuracies(engine, play_panel(engine, config), config, " on own steps")


def accuracies(engine: Engine, steps: Sequence[judge.Question], config: Config, name: str = "") -> dict:
    """Balanced accuracy, and that by class; an answer without a verdict is wrong."""
    asked = [dataclasses.replace(step, answers=[], critiques=[]) for step in steps]
    judge.ask(engine, asked, config, EVALUATION)
    answered = [question for question in asked if question.answers]
    right_Q = np.array([np.mean([answer.reward for answer in question.answers]) for question in answered])  # [Q]
    label_Q = np.array([question.step.label for question in answered])  # [Q]
    games_Q = np.array([question.group for question in answered])  # [Q]

    def accuracy(times_Q: np.ndarray, classes: Sequence[int]) -> float:
        own = [times_Q * (label_Q == cls) for cls in classes]  # [Q] each
        return float(np.mean([(right_Q * own_Q).sum() / own_Q.sum() for own_Q in own]))

    classes = {"balanced accuracy": (0, 1), "accuracy of good": (1,), "accuracy of flawed": (0,)}
    numbers = {
        key + name: interval(functools.partial(accuracy, classes=chosen), games_Q) for key, chosen in classes.items()
    }
    return {f"steps{name}": len(answered), f"too long{name}": len(asked) - len(answered)} | numbers


def interval(statistic: Callable[[np.ndarray], float], games: np.ndarray) -> list[float]:
    """[estimate, low, high]: 95 % of bootstrap resamples of the games. `statistic` takes how often each item counts.

    A resample without items of a class, for which it is nan, is left out.
    """
    rng = np.random.default_rng(0)
    _, game = np.unique(games, return_inverse=True)
    count = int(game.max()) + 1
    draws = [np.bincount(rng.integers(count, size=count), minlength=count)[game] for _ in range(RESAMPLES)]
    with np.errstate(invalid="ignore"):
        values = [value for draw in draws if not math.isnan(value := statistic(draw))]
        estimate = statistic(np.ones(len(game), dtype=int))
    low, high = np.percentile(values, [2.5, 97.5]) if values else (math.nan, math.nan)
    return [estimate, float(low), float(high)]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and tables


@dataclass(frozen=True)
class Figure:
    """How a figure is measured, and which of its numbers are shown."""

    title: str
    measure: Callable[[Engine, Sequence[judge.Question], Config], dict]
    shown: tuple[str, ...]
    level: float  # of the dashed line: what a model without the skill would get


FIGURES = {
    "8": Figure("Coupling gap (Figure 8)", coupling_gaps, ("cos", "mean_src"), 0.0),
    "judge": Figure(
        "Judging held-out steps", held_out_judge, ("balanced accuracy", "balanced accuracy on own steps"), 0.5
    ),
}


def draw(records: Sequence[dict], figure: Figure, path: Path) -> None:
    """Every shown number against iterations, a line with its interval per run; a colour per method."""
    methods = sorted({record["method"] for record in records})
    fig, axes = pyplot.subplots(1, len(figure.shown), figsize=(4.2 * len(figure.shown), 3.6), squeeze=False)
    for axis, name in zip(axes[0], figure.shown, strict=True):
        for number, run in enumerate(dict.fromkeys(record["run"] for record in records)):
            own = [record for record in records if record["run"] == run]
            middle, low, high = np.array([record[name] for record in own]).T
            colour = f"C{methods.index(own[0]['method'])}"
            at = [record["iteration"] for record in own]
            _, known = axis.get_legend_handles_labels()
            label = own[0]["method"] if own[0]["method"] not in known else f"_{run}"
            shift = 0.08 * number  # so that intervals stand side by side
            errors = [middle - low, high - middle]
            axis.errorbar(
                np.array(at) + shift,
                middle,
                yerr=errors,
                color=colour,
                label=label,
                capsize=2,
                marker="o",
                markersize=3,
            )
        axis.axhline(figure.level, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="iteration", title=name)
        axis.legend(frameon=False)
    fig.suptitle(figure.title)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def table(records: Sequence[dict], figure: Figure) -> str:
    """A line per checkpoint: the shown numbers with their intervals; then one per method, its runs' ends averaged."""
    width = max(len(record[key]) for record in records for key in ("run", "method")) + 2

    def line(*cells: object) -> str:
        name, iteration, *numbers = cells
        return f"{name:<{width}}{iteration:<11}" + "".join(f"{number:<32}" for number in numbers)

    lines = [figure.title, line("run", "iteration", *figure.shown)]
    for record in records:
        cells = [f"{record[name][0]:.3f} [{record[name][1]:.3f}, {record[name][2]:.3f}]" for name in figure.shown]
        lines.append(line(record["run"], record["iteration"], *cells))
    ends = {record["run"]: record for record in records}.values()  # the last of each run
    lines.append("mean over runs [lowest, highest] at their last checkpoint")
    for method in sorted({record["method"] for record in ends}):
        own = [record for record in ends if record["method"] == method]
        values = [[record[name][0] for record in own] for name in figure.shown]
        cells = [f"{np.mean(each):.3f} [{min(each):.3f}, {max(each):.3f}]" for each in values]
        lines.append(line(method, f"{len(own)} runs", *cells))
    return "\n".join(lines)


if __name__ == "__main__":
    configuration.fail_clearly(main)

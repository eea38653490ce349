"""The paper's figures, from runs' files and checkpoints: a picture and its numbers as JSON, with intervals.

    python paper/figures.py runs/quickstart runs/quickstart_plain --figures 1 2 3a 3b 5 7 8 9 10a 10b 11 judge

  1    consistency of repeated actions        7    success of runs side by side      10a  steps per episode
  2    repeats in won and lost episodes       8    gap of gradient coupling          10b  drift of layers
  3a   likeness of hidden states              9    tokens that are pulled along      11   learning curves, Table 4
  3b   influence of one step on others        judge  the policy as judge of held-out steps
  5    consistency of good and flawed actions

2, 7 and 11 read the runs' files.  The others measure the model that a run started from and every checkpoint that it has
kept: each plays --games games of --level's evaluation list twice, at the training temperature and without guidelines.
Runs that started from the same model share its episodes as panel.  Where steps need labels, the paper's rules give
them, and the environment's teacher where these say nothing (Figure 5: --teacher alone); half of the --steps drawn are
good.  10b compares the last model of each run with that of the first; of a single run, with its start.  --questions
adds another domain to 3a, and to 9 if they have answers.  Intervals are 95 % bootstraps over games.  behaviour.py and
geometry.py say what is measured, and what of that the paper leaves open; theory.py draws Figure 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from tqdm import tqdm

import envs
from config import Config, ConfigError
from distributed import init_distributed, progress_bar
from engine import Engine, make_engine, sync_weights
from model import load_model
from paper import behaviour, geometry
from paper.behaviour import Missing, Numbers, Subject
from rollout import Episode
from teacher import check_key

MOST_QUESTIONS = 100  # of a file
Questions = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Snapshot:
    """A model on its way: a checkpoint of a run or, at iteration 0, what the run started from."""

    run: str
    method: str
    start: str
    iteration: int
    folder: str


@dataclass(frozen=True)
class Figure:
    """How a figure is measured, what is shown of its numbers, and how it is drawn."""

    title: str
    measure: Callable[..., Numbers]  # of a Subject, or of a run's folder
    shown: tuple[str, ...]
    draw: Callable[[Sequence[Numbers], Figure, Path], None]
    level: float | None = None  # of a dashed line: what a model without the skill would get
    needs: str = ""  # a run's file, where no model is measured
    halfway: bool = False  # whether a model's numbers depend on its run's checkpoint halfway
    finish: Callable[[Sequence[Numbers]], None] = lambda records: None  # once all are measured
    table: Callable[[Sequence[Numbers], Figure], str] | None = None  # instead of checkpoint_table


def main() -> None:
    """Measure, print and draw the figures that the command line asks for."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    command.add_argument("--figures", nargs="+", choices=FIGURES, required=True)
    command.add_argument("--games", type=int, default=100, help="of each panel (default: %(default)s)")
    command.add_argument("--steps", type=int, default=200, help="of each panel (default: %(default)s)")
    command.add_argument("--level", choices=("L0", "L1", "L2"), default="L0", help="whose games are played")
    command.add_argument("--teacher", choices=("expert", "openai"), default="expert", help="who labels for Figure 5")
    command.add_argument("--questions", type=Path, help="JSONL of 'question', 'answer', for 3a and 9: GSM8K, say")
    command.add_argument("--out", type=Path, default=Path("figures"), help="folder (default: %(default)s)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    arguments = command.parse_args()
    configs = {run: load_run(run, arguments.set) for run in arguments.runs}
    config = for_panels(configs.values(), arguments.games, arguments.steps, arguments.teacher)
    chosen = {name: FIGURES[name] for name in arguments.figures}
    for figure in chosen.values():
        check_files(figure, arguments.runs)
    questions = read_questions(arguments.questions) if arguments.questions else ()
    if arguments.teacher == "openai":
        check_key(config.judge)
    found = of_files({name: figure for name, figure in chosen.items() if figure.needs}, configs)
    if modelled := {name: figure for name, figure in chosen.items() if not figure.needs}:
        shots = [shot for run in configs for shot in snapshots(run, configs[run])]
        found |= of_models(modelled, shots, config, arguments.level, questions)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in chosen.items():
        if missing := next((record for record in found[name] if "missing" in record), None):
            print(f"{figure.title}: not made. {_stage(missing)}: {missing['missing']}\n", flush=True)
            continue
        figure.finish(found[name])
        path = arguments.out / f"figure_{name}.json"
        record = {"title": figure.title, "config": configuration.to_dict(config), "level": arguments.level}
        path.write_text(json.dumps(record | {"checkpoints": _without_nan(found[name])}, indent=1))
        figure.draw(found[name], figure, path.with_suffix(".png"))
        table = figure.table or checkpoint_table
        print(f"{table(found[name], figure)}\n{path.with_suffix('.png')}\n", flush=True)


def of_files(figures: dict[str, Figure], configs: dict[Path, Config]) -> dict[str, list[Numbers]]:
    """Read the numbers of figures that are in the runs' files: a record per run."""
    return {
        name: [{"run": run.name, "method": method_of(cfg)} | figure.measure(run) for run, cfg in configs.items()]
        for name, figure in figures.items()
    }


def of_models(
    figures: dict[str, Figure], shots: Sequence[Snapshot], config: Config, level: str, questions: Questions
) -> dict[str, list[Numbers]]:
    """Measure the numbers of figures of models: a record per snapshot. Each distinct model plays, then is measured."""
    envs.check(config.env)
    envs.check_teacher(config.env)
    init_distributed(config)
    engine: Engine | None = None

    def load(folder: str) -> Engine:
        policy = load_model(config, path=folder, train=False)
        loaded = engine or make_engine(config, policy)
        loaded.policy = policy
        sync_weights(loaded, policy)
        return loaded

    folders = list(dict.fromkeys(shot.folder for shot in shots))  # runs may share their start
    played: dict[str, list[Episode]] = {}
    for folder in tqdm(folders, desc="play", unit=" models"):
        engine = load(folder)
        played[folder] = behaviour.play_panel(engine, config, level)
    several = len({shot.run for shot in shots}) > 1  # layers are compared with the first run's end, or a run's start
    reference = [shot for shot in shots if shot.run == shots[0].run][-1 if several else 0].folder
    measured: dict[tuple[str, ...], Numbers] = {}
    found: dict[str, list[Numbers]] = {name: [] for name in figures}
    panels = {start: behaviour.labelled_panel(played[start], config) for start in {shot.start for shot in shots}}
    for shot in tqdm(shots, desc="measure", unit=" checkpoints"):
        own = [other for other in shots if other.run == shot.run]
        halfway = own[len(own) // 2].folder
        engine = load(shot.folder)
        subject = Subject(
            engine,
            config,
            own=played[shot.folder],
            start=played[shot.start],
            middle=played[halfway],
            labelled=panels[shot.start],
            folder=shot.folder,
            reference=reference,
            questions=questions,
        )
        for name, figure in progress_bar(figures.items(), desc=f"{shot.run} {shot.iteration}", unit=" figures"):
            key = (name, shot.folder, shot.start, halfway if figure.halfway else "")
            if key not in measured:
                began = time.monotonic()
                try:
                    measured[key] = figure.measure(subject)
                except Missing as why:
                    measured[key] = {"missing": str(why)}
                measured[key]["seconds"] = time.monotonic() - began
            found[name].append(dataclasses.asdict(shot) | measured[key])
    engine.close()
    return found


def load_run(run: Path, overrides: Sequence[str]) -> Config:
    """Load a run's config. Raises ConfigError if `run` is not the folder of one."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.yaml")
    return configuration.load(run / "config.yaml", overrides)


def check_files(figure: Figure, runs: Sequence[Path]) -> None:
    """Check that the runs have what a figure is made from. Raises ConfigError, with what would make it."""
    cures = {"eval_*.json": "python evaluate.py --ckpt {run}/checkpoints/latest", "metrics.jsonl": "train_rl.py"}
    for run in runs if figure.needs else ():
        if not any(run.glob(figure.needs)):
            cure = cures.get(figure.needs, "train.episodes_every").format(run=run)
            raise ConfigError(f"{figure.title}: {run} has no {figure.needs}, which {cure} writes")


def read_questions(path: Path) -> Questions:
    """Draw up to MOST_QUESTIONS of a JSONL file, with the answers that they have. Raises ConfigError if a line has no
    question."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [(str(line["question"]), str(line["answer"]) if "answer" in line else None) for line in lines]
        return tuple(random.Random(0).sample(found, min(MOST_QUESTIONS, len(found))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--questions {path}: every line must be an object with a field 'question' ({error})"
        ) from None


def for_panels(configs: Iterable[Config], games: int, steps: int, labels: str = "expert") -> Config:
    """Choose the settings that all runs are measured with: the first's that was trained with GCD, or the first's."""
    configs = list(configs)
    config = next((config for config in configs if config.judge.enabled), configs[0])
    asking = dataclasses.replace(config.judge, enabled=True, teacher=labels, questions=steps, random_labels=False)
    if labels == "openai":  # as the paper labels Figure 5
        asking = dataclasses.replace(asking, votes=5, agreement="unanimous")
    return dataclasses.replace(config, judge=asking, eval=dataclasses.replace(config.eval, games=games))


def method_of(config: Config) -> str:
    """Say how a run is called in a legend."""
    parts = [config.algo.advantage, " with NTHR" * config.algo.nthr, " with GCD" * config.judge.enabled]
    return "".join(parts)


def snapshots(run: Path, config: Config) -> list[Snapshot]:
    """List the start of a run, then its checkpoints; of a cold start its end. Raises ConfigError if it has none."""
    folders = sorted(path for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    folders = folders or [path for path in [run / "checkpoints" / "final"] if path.is_dir()]
    if not folders:
        raise ConfigError(f"{run} has no checkpoints: give the folder of a run of train_rl.py or train_sft.py")
    start = str(Path(config.model.path).resolve()) if Path(config.model.path).exists() else config.model.path
    stages = [(0, start)]
    stages += [(int(folder.name) if folder.name.isdigit() else 1, str(folder)) for folder in folders]
    return [Snapshot(run.name, method_of(config), start, iteration, folder) for iteration, folder in stages]


def _without_nan(value: object) -> object:
    """Put null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, (list, tuple)) else value


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def curves(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw every shown number against iterations, a line with its interval per run; a colour per method."""
    fig, axes = panels(len(figure.shown))
    colours = _colours(records)
    for axis, name in zip(axes, figure.shown, strict=True):
        for number, own in enumerate(_by_run(records).values()):
            middle, low, high = np.array([record[name] for record in own]).T
            at = np.array([record["iteration"] for record in own]) + 0.08 * number  # intervals stand side by side
            errors = np.nan_to_num([middle - low, high - middle])
            label = _once(axis, own[0]["method"])
            look = {"capsize": 2, "marker": "o", "markersize": 3}
            axis.errorbar(at, middle, yerr=errors, color=colours[own[0]["method"]], label=label, **look)
        if figure.level is not None:
            axis.axhline(figure.level, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="iteration", title=name)
        axis.legend(frameon=False, fontsize=8)
    _save(fig, figure, path)


def panels(
    number: int, width: float = 4.2, height: float = 3.6, columns: int | None = None
) -> tuple[pyplot.Figure, list[pyplot.Axes]]:
    """Make a figure with so many axes, at most three in a row."""
    columns = columns or (2 if number == 4 else min(number, 3))
    lines = -(-number // columns)
    fig, axes = pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for spare in axes.flat[number:]:
        spare.set_visible(False)
    return fig, list(axes.flat[:number])


def _stage(record: Numbers) -> str:
    return f"{record['run']} {record['iteration']}"


def _by_run(records: Sequence[Numbers]) -> dict[str, list[Numbers]]:
    runs: dict[str, list[Numbers]] = {}
    for record in records:
        runs.setdefault(record["run"], []).append(record)
    return runs


def _colours(records: Sequence[Numbers]) -> dict[str, str]:
    return {method: f"C{number}" for number, method in enumerate(sorted({record["method"] for record in records}))}


def _once(axis: pyplot.Axes, label: str) -> str:
    """Return the label if the legend does not have it yet, else one that it leaves out."""
    return label if label not in axis.get_legend_handles_labels()[1] else f"_{label}"


def _save(fig: pyplot.Figure, figure: Figure, path: Path) -> None:
    fig.suptitle(figure.title)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def won_and_lost(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 2: each count in won and lost episodes, and the share of repeats by iteration."""
    fig, axes = panels(len(figure.shown) + 1)
    for axis, name in zip(axes, figure.shown, strict=False):
        for offset, kind in ((-0.2, "won"), (0.2, "lost")):
            middle, low, high = np.array([record[f"{name}, {kind}"] for record in records]).T
            errors = np.nan_to_num([middle - low, high - middle])
            axis.bar(np.arange(len(records)) + offset, middle, 0.38, yerr=errors, capsize=2, label=kind)
        axis.set_xticks(range(len(records)), [record["run"] for record in records], rotation=20, ha="right", fontsize=7)
        axis.set(title=name.replace("_", " "))
        axis.margins(y=0.25)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    colours = {"won": "C0", "lost": "C1"}
    for record, style in zip(records, ("-", "--", ":", "-.") * len(records), strict=False):
        for kind, colour in colours.items():
            if curve := record[f"curve, {kind}"]:
                axes[-1].plot(*np.array(curve).T, style, color=colour, linewidth=1, label=f"{record['run']}, {kind}")
    axes[-1].set(xlabel="iteration", title="state action per step, by iteration")
    axes[-1].legend(frameon=False, fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    _save(fig, figure, path)


def bars(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 7: success by level, a bar per run."""
    levels = [key for key in records[0] if key.startswith("L")]
    fig, axes = panels(len(levels))
    for axis, level in zip(axes, levels, strict=True):
        middle, low, high = np.array([record.get(level, [math.nan] * 3) for record in records]).T
        axis.bar(range(len(records)), middle, 0.7, yerr=np.nan_to_num([middle - low, high - middle]), capsize=3)
        axis.set_xticks(range(len(records)), [record["run"] for record in records], rotation=25, ha="right", fontsize=7)
        axis.set(title=f"success on {level}", xlim=(-0.6, max(len(records), 4) - 0.4), ylim=(0, 1))
    _save(fig, figure, path)


def histograms(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 3a: the cosines of the last checkpoint of each run, raw and centred."""
    runs = _by_run(records)
    fig, axes = panels(2 * len(runs), columns=2)
    edges = np.linspace(-1, 1, 51)
    for row, (run, own) in enumerate(runs.items()):
        for column, way in enumerate(("raw", "centred")):
            axis = axes[2 * row + column]
            for name in ("same episode", "same game", "different games", "different questions"):
                counts = np.array(own[-1].get(f"{name}, {way}, prompt and response, histogram", []), dtype=float)
                if counts.sum():
                    axis.stairs(counts / counts.sum(), edges, fill=True, alpha=0.35, label=name)
            axis.set(xlabel="cosine of hidden states", title=f"{run}, {way}")
            axis.legend(frameon=False, fontsize=8)
    _save(fig, figure, path)


def by_bins(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 5: consistency of the start's good and flawed actions, a line per bin of what it was there; and the
    share of flawed actions of high consistency, of the start's and of those halfway; a row per run."""
    runs = _by_run(records)
    fig, axes = panels(3 * len(runs), height=4.2, columns=3)

    def curve(axis: pyplot.Axes, own: Sequence[Numbers], name: str, label: str) -> None:
        middle, low, high = np.array([record[name] for record in own]).T
        if np.isfinite(middle).any():
            at = np.array([record["iteration"] for record in own]) + 0.1 * len(axis.containers)
            errors = np.nan_to_num([middle - low, high - middle])
            axis.errorbar(at, middle, yerr=errors, capsize=2, marker="o", markersize=3, label=label)

    for row, (run, own) in enumerate(runs.items()):
        for axis, kind in zip(axes[3 * row :], ("good", "flawed"), strict=False):
            for name in behaviour.bin_names(kind):
                bin_name = name.removeprefix(f"{kind}, ")
                curve(axis, own, name, f"{bin_name} at the start ({own[0][f'{name} steps']} steps)")
            axis.set(ylabel="consistency", title=f"{run}: {kind} actions")
        for when, label in (("start", "of the start"), ("halfway", "of the checkpoint halfway")):
            curve(axes[3 * row + 2], own, f"{when} panel flawed of high consistency", label)
        axes[3 * row + 2].set(ylabel="share of high consistency", title=f"{run}: flawed actions")
    for axis in axes:
        axis.set(xlabel="iteration", ylim=(-0.05, 1.05))
        if axis.containers:
            axis.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    _save(fig, figure, path)


def influence_map(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 3b: the change of log-prob by the kinds of both actions, at the last checkpoint of each run."""
    lasts = [own[-1] for own in _by_run(records).values()]
    fig, axes = panels(len(lasts), 5.0, 4.2)
    for axis, record in zip(axes, lasts, strict=True):
        cells = record["cells, reply"]
        down, across = list(cells), sorted({kind for row in cells.values() for kind in row})
        value = np.array([[cells[a].get(b, [math.nan])[0] for b in across] for a in down])
        most = np.nanmax(np.abs(value)) or 1.0
        shown = axis.imshow(value, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axis.set_xticks(range(len(across)), across, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(down)), down, fontsize=7)
        axis.set(xlabel="action measured", ylabel="action learned from")
        bent = abs(record["change / 10 x change by a tenth"] - 1)
        axis.set_title(f"{_stage(record)}, linear to within {bent:.0%}", fontsize=9)
        fig.colorbar(shown, ax=axis, label="nat per token")
    _save(fig, figure, path)


def alike_tokens(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 9: shares of positive influence and of tokens by class, and one reply, token by token; of the last
    checkpoint of each run, and beneath it of its replies to questions."""
    drawn = []
    for record in (own[-1] for own in _by_run(records).values()):
        drawn.append((_stage(record), record))
        of_questions = {key.removeprefix("questions: "): value for key, value in record.items() if "questions: " in key}
        drawn += [(f"{_stage(record)}, questions", of_questions)] if of_questions else []
    fig, axes = panels(2 * len(drawn), 6.0, 3.4, columns=2)
    for number, (name, record) in enumerate(drawn):
        bar, words = axes[2 * number : 2 * number + 2]
        for offset, what in ((-0.2, "share of positive influence"), (0.2, "share of tokens")):
            shares = np.array([record.get(f"{kind}, {what}", [math.nan] * 3) for kind in geometry.CLASSES])
            middle, low, high = shares.T
            errors = np.nan_to_num([middle - low, high - middle])
            bar.bar(np.arange(len(middle)) + offset, middle, 0.38, yerr=errors, capsize=2, label=what)
        bar.set_xticks(range(len(geometry.CLASSES)), geometry.CLASSES, rotation=20, ha="right", fontsize=8)
        bar.set(title=name if record["tokens"] else f"{name}: none both with a right and a wrong one")
        bar.legend(frameon=False, fontsize=8)
        _coloured(words, record["shown"])
        words.set(title="one reply: red is pulled up by better ones, blue down")
    _save(fig, figure, path)


def _coloured(axis: pyplot.Axes, shown: Sequence[tuple[str, float]], wide: int = 80, high: int = 10) -> None:
    """Write pieces of text on colours of their values, as many as there is room for."""
    axis.axis("off")
    most = max((abs(value) for _, value in shown), default=1.0) or 1.0
    line, column = 0, 0
    for piece, value in shown:
        piece = piece.replace("\n", " ").replace("$", r"\$")
        if column + len(piece) > wide:
            line, column = line + 1, 0
        if line == high:
            return
        strength = math.copysign(abs(value / most) ** 0.3, value)  # few tokens have almost all of it
        box = {"facecolor": matplotlib.colormaps["RdBu_r"](0.5 + strength / 2), "edgecolor": "none", "pad": 1}
        look = {"family": "monospace", "fontsize": 7, "color": "white" if abs(strength) > 0.7 else "black"}
        where = (column / (wide + 2), 0.92 - 0.09 * line)
        axis.text(*where, piece, bbox=box, transform=axis.transAxes, clip_on=True, **look)
        column += len(piece)


def layers(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 10b: drift from the reference, layer by layer; 0 is the embedding."""
    fig, axes = panels(4)
    for axis, name in zip(
        axes, ("logits, difference", "logits, cosine", "hidden, difference", "hidden, cosine"), strict=True
    ):
        for last in (own[-1] for own in _by_run(records).values()):
            if last["folder"] != last["reference"]:
                axis.plot(last[name], marker="o", markersize=3, label=_stage(last))
        axis.set(xlabel="layer", title=name)
        axis.legend(frameon=False, fontsize=7)
    _save(fig, figure, path)


def learning(records: Sequence[Numbers], figure: Figure, path: Path) -> None:
    """Draw Figure 11: success against iterations, hours, environment steps, and that on evaluation levels.

    Of each method the mean over its runs, between their lowest and highest. Training's is a mean over the last 5
    iterations.
    """
    levels = sorted({key for record in records for key in record if key.startswith("eval/")})
    axes_of = ("iterations", "hours", "environment steps")
    fig, axes = panels(len(axes_of) + len(levels))
    methods: dict[str, list[Numbers]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)

    def curve(axis: pyplot.Axes, method: str, x_lines: Sequence, y_lines: Sequence) -> None:
        shortest = min(map(len, x_lines))
        x, y = (np.array([line[:shortest] for line in lines]) for lines in (x_lines, y_lines))  # [runs, iterations]
        (line,) = axis.plot(x.mean(0), y.mean(0), color=_colours(records)[method], label=f"{method} ({len(x)})")
        axis.fill_between(x.mean(0), y.min(0), y.max(0), color=line.get_color(), alpha=0.15, linewidth=0)

    for method, own in methods.items():
        smooth = [[np.mean(one["success"][max(0, i - 4) : i + 1]) for i in range(len(one["success"]))] for one in own]
        for axis, x in zip(axes, axes_of, strict=False):
            curve(axis, method, [one[x] for one in own], smooth)
        for axis, level in zip(axes[len(axes_of) :], levels, strict=True):
            if points := [np.array(one[level]).T for one in own if level in one]:
                curve(axis, method, *zip(*points, strict=True))
    for axis, name in zip(axes, (*axes_of, *levels), strict=True):
        axis.set(
            xlabel="iteration" if name in levels else name,
            title=name if name in levels else "training success, 5 iterations",
        )
        axis.legend(frameon=False, fontsize=8)
    _save(fig, figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def checkpoint_table(records: Sequence[Numbers], figure: Figure) -> str:
    """Write a line per checkpoint: the shown numbers with intervals; then one per method, its runs' ends averaged."""
    width = max(len(record[key]) for record in records for key in ("run", "method")) + 2

    def line(*cells: object) -> str:
        name, iteration, *numbers = cells
        return f"{name:<{width}}{iteration:<11}" + "".join(f"{number:<46}" for number in numbers)

    lines = [figure.title, line("run", "iteration", *figure.shown)]
    for record in records:
        cells = [with_interval(record.get(name)) for name in figure.shown]
        lines.append(line(record["run"], record.get("iteration", ""), *cells))
    ends = {record["run"]: record for record in records}.values()  # the last of each run
    lines.append("mean over runs [lowest, highest] at their last checkpoint")
    for method in sorted({record["method"] for record in ends}):
        own = [record for record in ends if record["method"] == method]
        values = [[record[name][0] for record in own] for name in figure.shown]
        cells = [with_interval((np.mean(each), min(each), max(each))) for each in values]
        lines.append(line(method, f"{len(own)} run{'s' * (len(own) > 1)}", *cells))
    return "\n".join(lines)


def with_interval(value: Sequence[float] | None) -> str:
    """Write an estimate [low, high]; "-" where there is none."""
    if value is None or math.isnan(value[0]):
        return "-"
    small = 0 < max(map(abs, value)) < 0.01
    middle, low, high = (f"{one:.1e}" if small else f"{one:.3f}" for one in value)
    return f"{middle} [{low}, {high}]"


def won_and_lost_table(records: Sequence[Numbers], figure: Figure) -> str:
    """Write Figure 2's counts, won and lost side by side."""
    lines = [figure.title]
    for record in records:
        lines.append(f"{record['run']}: {record['episodes']} episodes, {record['won episodes']} of them won")
        for key in (key.removesuffix(", won") for key in record if key.endswith(", won") and "curve" not in key):
            won, lost = (with_interval(record[f"{key}, {kind}"]) for kind in ("won", "lost"))
            lines.append(f"  {key:<48} won {won:<26} lost {lost}")
        for key in (key for key in record if key.endswith("covariance with success")):
            lines.append(f"  {key:<48} {with_interval(record[key])}")
    return "\n".join(lines)


def time_table(records: Sequence[Numbers], figure: Figure) -> str:
    """Write Table 4: seconds per iteration, and of the method without GCD, where such a run is given, the overhead."""
    lines = [figure.title]
    seconds = {
        method: np.mean([record["seconds per iteration"] for record in records if record["method"] == method])
        for method in dict.fromkeys(record["method"] for record in records)
    }
    for record in records:
        plain = seconds.get(record["method"].removesuffix(" with GCD"))
        over = (
            f", {seconds[record['method']] / plain - 1:+.1%} over plain" if plain and "GCD" in record["method"] else ""
        )
        late = np.mean(record["success"][-5:])
        lines.append(
            f"{record['run']:<26}{record['method']:<20}{record['seconds per iteration']:8.1f} s per iteration, judge "
            f"{record['seconds of the judge']:.1f} s, success of the last 5 iterations {late:.3f}{over}"
        )
    return "\n".join(lines)


def drift_table(records: Sequence[Numbers], figure: Figure) -> str:
    """Write Figure 10b: each run's last model against the reference."""
    lines = [f"{figure.title} from {records[0]['reference']}"]
    lines.append(f"{'run':<28}difference of logits, cosine of logits, after the last layer")
    for last in (own[-1] for own in _by_run(records).values()):
        lines.append(f"{_stage(last):<28}{last['logits, difference'][-1]:.4f}   {last['logits, cosine'][-1]:.4f}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# All figures

FIGURES = {
    "1": Figure(
        "Consistency of repeated actions (Figure 1)",
        behaviour.repeat_consistency,
        ("own consistency", "own share of high consistency", "panel consistency", "panel share of high consistency"),
        curves,
    ),
    "2": Figure(
        "Repeated steps in won and lost episodes (Figure 2)",
        behaviour.repeat_rate,
        ("state_action per step", "state_action per step, first 10 steps"),
        won_and_lost,
        needs="episodes/*.jsonl.gz",
        table=won_and_lost_table,
    ),
    "3a": Figure(
        "Likeness of hidden states (Figure 3a)",
        geometry.embed_sim,
        ("different games, raw, prompt and response", "different games, centred, prompt and response"),
        histograms,
    ),
    "3b": Figure(
        "One step's influence on other steps (Figure 3b)",
        geometry.step_influence,
        tuple(f"{kind} action, {what}" for what in ("reply", "action's words") for kind in ("same", "other")),
        influence_map,
    ),
    "5": Figure(
        "Consistency of good and flawed actions (Figure 5)",
        behaviour.consistency_by_label,
        ("start panel good", "start panel flawed", "start panel flawed of high consistency"),
        by_bins,
        halfway=True,
        finish=behaviour.add_bins,
    ),
    "7": Figure("Success of runs side by side (Figure 7)", behaviour.final_success, ("L0",), bars, needs="eval_*.json"),
    "8": Figure("Coupling gap (Figure 8)", geometry.coupling_gaps, ("cos", "mean_src"), curves, 0.0),
    "9": Figure(
        "Tokens of flawed actions that good ones pull along (Figure 9)",
        geometry.similar_tokens,
        ("reasoning, share of positive influence", "object names, share of positive influence"),
        alike_tokens,
    ),
    "10a": Figure(
        "Steps per episode (Figure 10a)",
        behaviour.num_actions,
        ("steps, all episodes", "steps, won episodes"),
        curves,
    ),
    "10b": Figure("Drift of layers (Figure 10b)", geometry.layer_drift, (), layers, table=drift_table),
    "11": Figure(
        "Learning curves (Figure 11, Table 4)",
        behaviour.learning_curve,
        (),
        learning,
        needs="metrics.jsonl",
        table=time_table,
    ),
    "judge": Figure(
        "Judging held-out steps",
        behaviour.held_out_judge,
        ("balanced accuracy", "balanced accuracy on own steps"),
        curves,
        0.5,
    ),
}


if __name__ == "__main__":
    configuration.fail_clearly(main)

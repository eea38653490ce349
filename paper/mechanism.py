"""What training did to the model behind one checkpoint, level by level: coupling, judging, consistency.

    python paper/mechanism.py runs/lab_gcd_s0 --start runs/lab_sft_s0/checkpoints/latest

The model that the run started from plays --games games of each level's evaluation list twice; half of the steps drawn
from them are good, half flawed: by the paper's rules, then by the environment's teacher, who sees a step per game.  Of
these steps the run's last checkpoint is asked: how are their gradients coupled (Figure 8), can it judge them, how
consistently does it still take the same actions (Figures 1 and 5).  Runs from one start are asked of the same steps,
whatever labels they learned from.  The measures are those of figures.py; they are printed, and the run's folder gets
mechanism.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration  # before torch: it sets the number of threads

# isort: split
import envs
from config import LEVELS, Config
from distributed import announce, init_distributed, progress_bar
from engine import make_engine, sync_weights
from model import load_model
from paper import behaviour, geometry
from paper.behaviour import Missing, Numbers, Subject
from paper.figures import for_panels, load_run, with_interval
from paper.lab import aligned, write_json

MEASURES = (
    geometry.coupling_gaps,
    behaviour.held_out_judge,
    functools.partial(behaviour.repeat_consistency, ways=("state_action",)),
    functools.partial(behaviour.consistency_by_label, panels=("start",)),
)
KEPT = (
    "cos", "mean_src", "balanced accuracy", "accuracy of good", "accuracy of flawed", "own consistency",
    "panel consistency", "start panel good", "start panel flawed", "start panel flawed of high consistency",
)  # fmt: skip


def measure(config: Config, start: str, checkpoint: str) -> dict[str, Numbers]:
    """Measure a checkpoint by level, on the games that the model at `start` played: [estimate, low, high] by name.

    A level whose games gave no labelled steps of both classes says what is missing; a number that they do not give is
    None.
    """
    policy = load_model(config, path=start, train=False)
    engine = make_engine(config, policy)
    sync_weights(engine, policy)
    announce(f"{start} plays {', '.join(LEVELS)}")
    played = {level: behaviour.play_panel(engine, config, level) for level in progress_bar(LEVELS)}
    panels = {level: behaviour.labelled_panel(episodes, config) for level, episodes in played.items()}
    found: dict[str, Numbers] = {level: {} for level in LEVELS}
    for name, folder in ((" at the start", start), ("", checkpoint)):
        engine.policy = load_model(config, path=folder, train=False)
        sync_weights(engine, engine.policy)
        announce(f"{folder} is measured")
        for level in progress_bar(LEVELS):
            own = behaviour.play_panel(engine, config, level) if folder != start else played[level]
            subject = Subject(engine, config, own=own, start=played[level], middle=own, labelled=panels[level])
            try:
                numbers = {key: value for measured in MEASURES for key, value in measured(subject).items()}
                found[level] |= {key + name: None if math.isnan(numbers[key][0]) else numbers[key] for key in KEPT}
            except Missing as why:
                found[level] |= {"missing": str(why)}
    engine.close()
    return found


def table(levels: Mapping[str, Numbers]) -> str:
    """Lay out what was measured: a line per number, at the start and now, a column per level; then what is missing."""
    names = [key + when for key in KEPT for when in (" at the start", "")]
    lines = [[name, *(with_interval(levels[level].get(name)) for level in LEVELS)] for name in names]
    missing = [f"{level}: {found['missing']}" for level, found in levels.items() if "missing" in found]
    return "\n".join([aligned([["", *LEVELS], *lines]), *missing])


def main() -> None:
    """Measure the last checkpoint of a run."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    command.add_argument("--start", required=True, help="the model that plays: what the run started from")
    command.add_argument("--games", type=int, default=60, help="of each level (default: %(default)s)")
    command.add_argument("--steps", type=int, default=100, help="judged, of each level (default: %(default)s)")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    arguments = command.parse_args()
    config = for_panels([load_run(arguments.run, arguments.set)], arguments.games, arguments.steps)
    # a step per episode of an iteration: labelled_panel shows the teacher as large a share
    steps = config.rollout.groups * config.rollout.group_size
    asked = dataclasses.replace(config.judge, teacher_flawed=True, teacher_steps=steps)
    config = dataclasses.replace(config, judge=asked)
    envs.check(config.env)
    envs.check_teacher(config.env)
    init_distributed(config)
    began = time.monotonic()
    checkpoint = (arguments.run / "checkpoints" / "latest").resolve()
    levels = measure(config, arguments.start, str(checkpoint))
    found = {"checkpoint": checkpoint.name, "levels": levels, "seconds": time.monotonic() - began}
    file = arguments.run / "mechanism.json"
    write_json(file, found)
    print(table(levels), file, sep="\n")


if __name__ == "__main__":
    configuration.fail_clearly(main)

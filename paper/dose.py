"""How much GCD, and which: the laboratory's development runs, from which docs/lab.md fixes one setting for its table.

    python paper/dose.py                            all rows, resumable; then the picture, docs/lab/dose.png
    python paper/dose.py --rows plain weight_1      some of them

GRPO from one cold start (another where the row says so) on games that are in none of the table's lists.  Each row
changes what its name says; picture and JSON show success, repeats and the judge's accuracy by level.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration

# isort: split
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import sft_data
from config import LEVELS
from paper.lab import Lab, Record, Row, interval, shares

GAMES = ("env.data=data/lab_dev_games", "eval.games=300")
EPISODES = Path("data/lab_dev_episodes.jsonl")  # the cold start's, without judged steps
JUDGE_FIRST = (f"sft.data={EPISODES}", "sft.judge_examples=2000", "sft.episodes=2400")
MORE = ("judge.weight=1", "judge.questions=64")
LONG = ("train.iterations=40",)
ADAPTER = ("model.tune=lora", "model.lora_rank=8", "train.lr=3e-4")
FLAWED = ("judge.teacher_flawed=true", "judge.teacher_steps=128")


def gcd(title: str, *overrides: str, start: str = "sft") -> Row:
    """Make a row of GRPO with GCD."""
    return Row(title, "gcd", start, overrides)


ROWS = {
    "sft": Row("cold start", "sft", script="train_sft.py"),
    "sft_judge": Row("cold start, 2,000 judged steps", "sft", overrides=JUDGE_FIRST, script="train_sft.py"),
    "plain": Row("without GCD", "grpo", "sft"),
    "weight_01": gcd("weight 0.1, 16 x 4", "judge.weight=0.1"),
    "weight_1": gcd("weight 1, 16 x 4", "judge.weight=1"),
    "more": gcd("weight 1, 64 x 4", *MORE),
    "more_flawed": gcd("the same, the expert's negatives, too", *MORE, *FLAWED),
    "cotrain": gcd("the same, without guidelines", *MORE, *FLAWED, "guidelines.every=0"),
    "judge_plain": Row("2,000 judged steps first: without GCD", "grpo", "sft_judge"),
    "judge_more": gcd("2,000 first: weight 1, 64 x 4, negatives", *MORE, *FLAWED, start="sft_judge"),
    "long_plain": Row("40 iterations: without GCD", "grpo", "sft", LONG),
    "long_more": gcd("40 iterations: weight 1, 64 x 4", *MORE, *LONG),
    "adapter_plain": Row("an adapter: without GCD", "grpo", "sft", ADAPTER),
    "adapter_more": gcd("an adapter: weight 1, 64 x 4", *MORE, *ADAPTER),
}
PANELS = (*(f"success, {level}" for level in LEVELS), "repeats, L2", "judge, L0", "judge, L2")


def main() -> None:
    """Run what is missing, then draw."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds (default: 0)")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: %(default)s)")
    arguments = command.parse_args()
    lab = Lab("lab", Path("docs/lab/dose"), GAMES)
    if not EPISODES.is_file():
        vanilla = configuration.load("configs/lab_sft.yaml", [*GAMES, "sft.variant=vanilla"])
        sft_data.write_rows(EPISODES, sft_data.make_rows(vanilla))
    lab.run_all(ROWS, {name: arguments.seeds for name in arguments.rows or ROWS}, arguments.workers, ranks=1)
    records = {name: found for name, found in lab.records(ROWS).items() if found}
    numbers = {name: measured(found) for name, found in records.items()}
    Path("docs/lab/dose.json").write_text(json.dumps(numbers, indent=1))
    draw(numbers, Path("docs/lab/dose.png"))
    print(table(numbers))


def measured(own: Mapping[int, Record]) -> dict[str, list[float] | None]:
    """Compute the panels' numbers of a row: [estimate, low, high], an interval where the record has what it takes."""
    found: dict[str, list[float] | None] = {f"success, {level}": interval(shares(own, level)) for level in LEVELS}
    for panel in PANELS[len(LEVELS) :]:
        what, level = panel.split(", ")
        if what == "repeats":
            values = [[one["levels"][level]["repeats"]] * 3 for one in own.values()]
        else:
            values = [one["mechanism"][level].get("balanced accuracy") for one in own.values() if "mechanism" in one]
        values = [value for value in values if value]
        found[panel] = [sum(column) / len(values) for column in zip(*values, strict=True)] if values else None
    return found


def draw(numbers: Mapping[str, Mapping[str, list[float] | None]], path: Path) -> None:
    """Draw a line per row and a panel per number; the row without GCD is a dashed line through all."""
    fig, axes = pyplot.subplots(1, len(PANELS), figsize=(2.6 * len(PANELS), 1 + 0.32 * len(numbers)), sharey=True)
    for axis, panel in zip(axes, PANELS, strict=True):
        for place, found in enumerate(numbers.values()):
            if value := found[panel]:
                axis.errorbar(value[0], place, xerr=[[value[0] - value[1]], [value[2] - value[0]]], fmt="o", color="C0")
        if "plain" in numbers and (plain := numbers["plain"][panel]):
            axis.axvline(plain[0], color="grey", linestyle="--", linewidth=1)
        axis.set(title=panel)
    axes[0].set_yticks(range(len(numbers)), [ROWS[name].title for name in numbers])
    axes[0].invert_yaxis()
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def table(numbers: Mapping[str, Mapping[str, list[float] | None]]) -> str:
    """Lay the numbers out, in percent."""
    lines = [f"{'':<36}" + "".join(f"{panel:<22}" for panel in PANELS)]
    for name, found in numbers.items():
        cells = [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * one for one in value)) if value else "" for value in found.values()
        ]
        lines.append(f"{ROWS[name].title:<36}" + "".join(f"{cell:<22}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    configuration.fail_clearly(main)

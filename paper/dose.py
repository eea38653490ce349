r"""How much GCD, and which: the laboratory's development runs, from which docs/lab.md fixes one setting for its table.

    python tools/make_games.py --out data/lab_dev_games --train 1500 --seen 450 --unseen 900 --seed 3 \
        --receptacles 6 --objects 12                its games
    python paper/dose.py                            all rows, resumable; then the picture, docs/lab/dose.png
    python paper/dose.py --rows plain dose          some of them
    python paper/dose.py --only-print               from the records that are there

GRPO from one cold start (another where the row says so) on games that are in none of the table's lists.  Each row
changes what its name says ("64 x 4": questions an iteration, answers each).  Picture and JSON show success by level; of
"cool" alone, with the share of its games in which what should be cooled is; repeats; the judge's accuracy.  In the
committed records that is by the rules' labels, or with the expert's negatives, which are harder to guess: docs/lab.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration

# isort: split
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import sft_data
from config import LEVELS
from paper.lab import COOL, Lab, Record, Row, gain, interval, shares

GAMES = ("env.data=data/lab_dev_games", "eval.games=300")
EPISODES = Path("data/lab_dev_episodes.jsonl")  # the cold start's, without judged steps
STEEP = ("sft.lr=1e-3",)  # of the cold start: with it doses were compared, before it was found to cost L2
JUDGE_FIRST = (*STEEP, f"sft.data={EPISODES}", "sft.judge_examples=2000", "sft.episodes=3000")
SMALL = ("judge.weight=0.1", "judge.questions=16")
DOSE = ("judge.weight=1", "judge.questions=64")
SPREAD = ("judge.weight=1", "judge.questions=128", "judge.group_size=2")
RULES = ("judge.teacher_flawed=false", "judge.teacher_steps=64")  # as in the paper
FLAWED = ("judge.teacher_flawed=true", "judge.teacher_steps=128")
GUIDED = ("guidelines.every=5", "guidelines.writer=medoid")  # a model this small distils nothing
LONG = ("train.iterations=40",)
RANK = ("model.lora_rank=32", "model.lora_alpha=256")  # alpha / rank as with rank 8
# By `make base` with `init --hidden 256`, sft.lr=1.4e-3 and 1e-3 and these names.
LARGE = ("model.path=runs/large_base_reading/checkpoints/latest",)
ALL_WEIGHTS = ("model.tune=full", "train.lr=1e-4")


def gcd(title: str, *overrides: str, start: str = "sft") -> Row:
    """Make a row of GRPO with GCD."""
    return Row(title, "gcd", start, overrides)


ROWS = {
    "sft": Row("cold start", "sft", overrides=STEEP, script="train_sft.py"),
    "plain": Row("GRPO", "grpo", "sft"),
    "small": gcd("co-training: weight 0.1, 16 x 4", *SMALL, *RULES),
    "dose": gcd("co-training: weight 1, 64 x 4", *DOSE, *RULES),
    "spread": gcd("co-training: weight 1, 128 x 2", *SPREAD, *RULES),
    "flawed": gcd("weight 1, 64 x 4, the expert's negatives, too", *DOSE, *FLAWED),
    "flawed_third": gcd("the same, weight 0.3", *DOSE, "judge.weight=0.3", *FLAWED),
    "flawed_triple": gcd("the same, weight 3", *DOSE, "judge.weight=3", *FLAWED),
    "flawed_spread": gcd("the same, weight 1, 128 x 2", *SPREAD, *FLAWED),
    "guidelines": gcd("guidelines alone", "judge.weight=0", "judge.questions=64", *RULES, *GUIDED),
    "both": gcd("weight 1, 64 x 4, and guidelines", *DOSE, *RULES, *GUIDED),
    "sft_judge": Row("cold start, 2,000 judged steps", "sft", overrides=JUDGE_FIRST, script="train_sft.py"),
    "judge_plain": Row("GRPO after these", "grpo", "sft_judge"),
    "judge_flawed": gcd("weight 1, 64 x 4, negatives, after these", *DOSE, *FLAWED, start="sft_judge"),
    "long_plain": Row("GRPO, 40 iterations", "grpo", "sft", LONG),
    "long_flawed": gcd("weight 1, 64 x 4, negatives, 40 iterations", *DOSE, *FLAWED, *LONG),
    "all_plain": Row("GRPO, all weights", "grpo", "sft", ALL_WEIGHTS),
    "all_weight_1": gcd(
        "all weights: weight 1, 16 x 4, and guidelines",
        "judge.weight=1",
        "judge.questions=16",
        *RULES,
        *GUIDED,
        *ALL_WEIGHTS,
    ),
    "rank_sft": Row("cold start, adapter of rank 32", "sft", overrides=(*STEEP, *RANK), script="train_sft.py"),
    "rank_plain": Row("GRPO, rank 32", "grpo", "rank_sft", RANK),
    "rank_flawed": gcd("rank 32, weight 1, 64 x 4, negatives", *DOSE, *FLAWED, *RANK, start="rank_sft"),
    "large_sft": Row("cold start, 2.8 million parameters", "sft", overrides=(*STEEP, *LARGE), script="train_sft.py"),
    "large_plain": Row("GRPO, 2.8 million parameters", "grpo", "large_sft"),
    "large_flawed": gcd("2.8 million, weight 1, 64 x 4, negatives", *DOSE, *FLAWED, start="large_sft"),
    "gentle_sft": Row("cold start at half the rate", "sft", script="train_sft.py"),
}
PLAIN = {name: "plain" for name, row in ROWS.items() if row.config == "gcd"}  # what a row with GCD is compared with
PLAIN |= {f"{what}_flawed": f"{what}_plain" for what in ("judge", "long", "rank", "large")}
PLAIN["all_weight_1"] = "all_plain"
PANELS = (*(f"success, {level}" for level in LEVELS), "cool, L2", "cools, L2", "repeats, L2", "judge, L0", "judge, L2")


def main() -> None:
    """Run what is missing, then draw."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds (default: 0)")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: %(default)s)")
    command.add_argument("--only-print", action="store_true", help="run nothing")
    arguments = command.parse_args()
    lab = Lab("lab", Path("docs/lab/dose"), GAMES)
    if not arguments.only_print:
        if not EPISODES.is_file():
            vanilla = configuration.load("configs/lab_sft.yaml", [*GAMES, "sft.variant=vanilla"])
            sft_data.write_rows(EPISODES, sft_data.make_rows(vanilla))
        lab.run_all(ROWS, {name: arguments.seeds for name in arguments.rows or ROWS}, arguments.workers, ranks=1)
    records = {name: found for name, found in lab.records(ROWS).items() if found}
    numbers = {name: measured(found) for name, found in records.items()}
    Path("docs/lab/dose.json").write_text(json.dumps(numbers, indent=1))
    draw(numbers, Path("docs/lab/dose.png"))
    print(table(numbers), differences(records), sep="\n\n")


Numbers = dict[str, list[list[float]]]  # panel -> a run's [estimate, low, high], or [estimate], by seed


def measured(own: Mapping[int, Record]) -> Numbers:
    """Compute the panels' numbers of a row's runs: 95 % over games, where the record has what that takes."""
    found: Numbers = {}
    for panel in PANELS:
        what, level = panel.split(", ")
        if what == "success":
            found[panel] = [interval(shares(own, level, [seed])) for seed in own]
        elif what == "cool":
            found[panel] = [interval(shares(own, level, [seed], COOL)) for seed in own]
        elif what == "cools":
            found[panel] = [[one["cooling"]["cooled"]] for one in own.values()]
        elif what == "repeats":
            found[panel] = [[one["levels"][level]["repeats"]] for one in own.values()]
        else:
            judged = (one.get("mechanism", {}).get(level, {}).get("balanced accuracy") for one in own.values())
            found[panel] = [value for value in judged if value]
    return found


def draw(numbers: Mapping[str, Numbers], path: Path) -> None:
    """Draw a line per row, a panel per number, a point per run; what plain GRPO's mean is goes through all rows."""
    fig, axes = pyplot.subplots(1, len(PANELS), figsize=(2.6 * len(PANELS), 1 + 0.32 * len(numbers)), sharey=True)
    for axis, panel in zip(axes, PANELS, strict=True):
        for place, found in enumerate(numbers.values()):
            for number, (middle, *ends) in enumerate(found[panel]):
                height = place + 0.16 * (number - (len(found[panel]) - 1) / 2)
                axis.plot(ends, [height] * len(ends), color="C0", linewidth=1)
                axis.plot(middle, height, "o", color="C0", markersize=4)
        if plain := numbers.get("plain", {}).get(panel):
            axis.axvline(mean(plain), color="grey", linestyle="--", linewidth=1)
        axis.set(title=panel)
    axes[0].set_yticks(range(len(numbers)), [ROWS[name].title for name in numbers])
    axes[0].invert_yaxis()
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def mean(values: Sequence[Sequence[float]]) -> float:
    """Average runs' estimates."""
    return sum(value[0] for value in values) / len(values)


def table(numbers: Mapping[str, Numbers]) -> str:
    """Lay the numbers out, in percent: each run's, and their mean where there are several."""
    lines = [f"{'':<50}" + "".join(f"{panel:<26}" for panel in PANELS)]
    for name, found in numbers.items():
        cells = []
        for values in found.values():
            each = ", ".join(f"{100 * value[0]:.1f}" for value in values)
            cells.append(f"{100 * mean(values):.1f} ({each})" if len(values) > 1 else each)
        lines.append(f"{ROWS[name].title:<50}" + "".join(f"{cell:<26}" for cell in cells))
    return "\n".join(lines)


def differences(records: Mapping[str, Mapping[int, Record]]) -> str:
    """Lay out by what each row with GCD wins more than its plain one, in points: 95 % over games and shared seeds."""
    columns = {level: (level, "") for level in LEVELS} | {"cool": ("L2", COOL)}
    lines = [f"{'minus the plain row':<50}" + "".join(f"{column:<22}" for column in (*columns, "seeds"))]
    for name, plain in PLAIN.items():
        if seeds := sorted(records.get(name, {}).keys() & records.get(plain, {}).keys()):
            found = [interval(gain(records[name], records[plain], seeds, *column)) for column in columns.values()]
            cells = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in one)) for one in found]
            lines.append(f"{ROWS[name].title:<50}" + "".join(f"{cell:<22}" for cell in (*cells, len(seeds))))
    return "\n".join(lines)


if __name__ == "__main__":
    configuration.fail_clearly(main)

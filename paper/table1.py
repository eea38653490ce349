"""Table 1 in miniature, by one command: does GCD generalise better? The plan is docs/lab.md.

    python paper/table1.py                                    all of it, resumable; then the table, a picture and a page
    python paper/table1.py --rows grpo gcd --seeds 0 1        a part
    python paper/table1.py --only-print                       from the records that are there
    python paper/table1.py --config-prefix qwen1.5b           the same table on GPUs, from configs/qwen1.5b_*.yaml

Every row trains once, on the task types that are not held out, and is evaluated on all three levels: L0 and L1 are
games of these types, L2 is games of the held-out ones.  (The paper trains once more, on all types, for L0 and L1.)  A
row with GCD and its plain one are paired: same cold start, games and sampling seeds.  Records, table1.md, .json, .html
and two pictures go to docs/<prefix>.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration

# isort: split
import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot

import envs
from config import LEVELS, ConfigError
from paper.lab import COOL, Lab, Record, Row, interval, interval_over_seeds, shares

ROWS = {
    "vanilla": Row("Vanilla", "sft", script=""),
    "sft": Row("Cold start", "sft", script="train_sft.py"),
    "sft_rlvmr": Row("Cold start, RLVMR's replies", "sft_rlvmr", script="train_sft.py"),
    "ppo": Row("PPO", "ppo", "sft"),
    "ppo_gcd": Row("with GCD", "ppo_gcd", "sft"),
    "grpo": Row("GRPO", "grpo", "sft"),
    "gcd": Row("with GCD", "gcd", "sft"),
    "gigpo": Row("GiGPO", "gigpo", "sft"),
    "gigpo_gcd": Row("with GCD", "gigpo_gcd", "sft"),
    "rlvmr": Row("RLVMR", "rlvmr", "sft_rlvmr"),
    "rlvmr_gcd": Row("with GCD", "rlvmr_gcd", "sft_rlvmr"),
    "base_grpo": Row("GRPO, no cold start", "grpo", "vanilla"),
    "base_gcd": Row("with GCD", "gcd", "vanilla"),
}
PAIRS = (("gcd", "grpo"), ("gigpo_gcd", "gigpo"), ("rlvmr_gcd", "rlvmr"), ("ppo_gcd", "ppo"), ("base_gcd", "base_grpo"))
PRIMARY = ("gcd", "grpo"), "L2"
SEEDS = {name: range(3) for name in ROWS} | {name: range(8) for name in ("sft", "grpo", "gcd")} | {"vanilla": range(1)}
COLUMNS = {level: (level,) for level in LEVELS} | {"mean": LEVELS}
VERBS = ("cool", "heat", "clean")  # what can be done in games of COOL, rightly and wrongly


def main() -> None:
    """Run what is missing, then write the table, the pictures and the page."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--config-prefix", default="lab", help="configs/PREFIX_*.yaml (default: %(default)s)")
    command.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    command.add_argument("--seeds", nargs="+", type=int, help="training seeds (default: those of the plan)")
    command.add_argument("--workers", type=int, help="runs side by side (default: a core each; with GPUs 1)")
    command.add_argument("--only-print", action="store_true", help="run nothing")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    arguments = command.parse_args()
    lab, rows = make_lab(arguments.config_prefix, arguments.set)
    if missing := [name for name in arguments.rows or () if name not in rows]:
        raise ConfigError(f"no {', '.join(str(lab.path(ROWS[name])) for name in missing)}")
    if not arguments.only_print:
        chosen = arguments.rows or rows
        gpus = torch.cuda.device_count()
        lab.run_all(
            rows,
            {name: arguments.seeds or SEEDS[name] for name in chosen},
            workers=arguments.workers or (1 if gpus else os.cpu_count()),
            ranks=gpus or 1,
        )
    records = {name: found for name, found in lab.records(rows).items() if found}
    results = summarise(records)
    write(results, lab.folder)
    print(*map(aligned, tables(results)), lab.folder / "table1.html", sep="\n\n")


def make_lab(prefix: str, settings: Sequence[str]) -> tuple[Lab, dict[str, Row]]:
    """Make the laboratory of a family of configs, and list the rows that it has configs of.

    All runs train on the task types that L2 does not evaluate on: one run serves all levels. Raises ConfigError.
    """
    lab = Lab(prefix, Path("docs") / prefix, tuple(settings))
    rows = {name: row for name, row in ROWS.items() if lab.path(row).is_file()}
    if not rows:
        raise ConfigError(f"no {lab.path(ROWS['gcd'])}, nor any other config of --config-prefix {prefix}")
    env = lab.config(next(iter(rows.values()))).env
    trained = [kind for kind in envs.task_types(env) if kind not in envs.held_out_types(env)]
    return dataclasses.replace(lab, settings=(f"env.task_types=[{','.join(trained)}]", *settings)), rows


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def summarise(records: Mapping[str, Mapping[int, Record]]) -> dict[str, Any]:
    """Compute the table: success of every row by column, [estimate, low, high]; what GCD changes in each pair; what is
    done in games of "cool"; and mechanism, with what it correlates."""
    found: dict[str, Any] = {"seeds": {name: sorted(own) for name, own in records.items()}}
    found["rows"] = {name: by_column({level: shares(own, level) for level in LEVELS}) for name, own in records.items()}
    pairs = {
        f"{ours} - {plain}": (records[ours], records[plain])
        for ours, plain in PAIRS
        if records.get(ours, {}).keys() & records.get(plain, {}).keys()
    }
    found["pairs"] = {name: compare(*pair) for name, pair in pairs.items()}
    if seeds := sorted(set.intersection(*(set(one["seeds"]) for one in found["pairs"].values())) if pairs else ()):
        gains = {level: np.mean([gain(*pair, seeds, level) for pair in pairs.values()], axis=0) for level in LEVELS}
        found["together"] = by_column(gains) | {"seeds": seeds}
    found["verbs"] = {
        name: {verb: float(np.mean([one["verbs"][COOL].get(verb, 0.0) for one in own.values()])) for verb in VERBS}
        for name, own in records.items()
        if all(COOL in one["verbs"] for one in own.values())
    }
    found["mechanism"] = {
        name: {level: {key: float(values.mean()) for key, values in mechanism(own, level).items()} for level in LEVELS}
        for name, own in records.items()
    }
    found["scatter"] = {level: gap_and_success(records, level) for level in LEVELS}
    return found


def by_column(value_SG: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Compute [estimate, low, high] of every column from every level's values, [seeds, games]."""
    return {column: interval(*(value_SG[level] for level in levels)) for column, levels in COLUMNS.items()}


def gain(
    ours: Mapping[int, Record], plain: Mapping[int, Record], seeds: Sequence[int], level: str, kind: str = ""
) -> np.ndarray:
    """Compute by what ours wins a level's games, or those of a task type, more often: float64 [seeds, games]."""
    return shares(ours, level, seeds, kind) - shares(plain, level, seeds, kind)


def compare(ours: Mapping[int, Record], plain: Mapping[int, Record]) -> dict[str, Any]:
    """Compute what GCD changes over the seeds that both rows of a pair have: success, on L2 also by task type, and by
    level what mechanism() lists: [estimate, low, high]."""
    seeds = sorted(ours.keys() & plain.keys())
    changed: dict[str, dict[str, list[float]]] = {}
    for level in LEVELS:
        values, others = (mechanism({seed: row[seed] for seed in seeds}, level) for row in (ours, plain))
        both = [key for key in values if key in others and len(values[key]) == len(others[key]) == len(seeds)]
        changed[level] = {key: interval_over_seeds(values[key] - others[key]) for key in both}
    kinds = ours[seeds[0]]["levels"]["L2"]["won"]
    return by_column({level: gain(ours, plain, seeds, level) for level in LEVELS}) | {
        "seeds": seeds,
        "L2 by type": {kind: interval(gain(ours, plain, seeds, "L2", kind)) for kind in kinds},
        "mechanism": changed,
    }


def mechanism(own: Mapping[int, Record], level: str) -> dict[str, np.ndarray]:
    """List what was measured of a row's runs on a level, a value per seed that has it: mechanism.py's numbers, repeats,
    and what training logged at its end."""
    found: dict[str, list[float]] = {"repeats": [one["levels"][level]["repeats"] for one in own.values()]}
    for one in own.values():
        measured = one.get("mechanism", {}).get(level, {})
        numbers = {key: value[0] for key, value in measured.items() if key != "missing" and value}
        for key, value in (numbers | one.get("late", {})).items():
            found.setdefault(key, []).append(value)
    return {key: np.array(values) for key, values in found.items()}


def gap_and_success(records: Mapping[str, Mapping[int, Record]], level: str) -> dict[str, Any]:
    """Set a level's success beside what training did to its coupling gap (cosine, end less start), a point per run of
    RL; and correlate them, over all runs and within rows: [r, low, high], 95 % of bootstraps over runs."""
    points = [
        (name, seed, one["mechanism"][level]["cos"][0] - one["mechanism"][level]["cos at the start"][0], one)
        for name, own in records.items()
        for seed, one in own.items()
        if ROWS[name].script == "train_rl.py" and _has_gaps(one.get("mechanism", {}).get(level, {}))
    ]
    found: dict[str, Any] = {
        "row": [name for name, *_ in points],
        "seed": [seed for _, seed, *_ in points],
        "gap": [gap for *_, gap, _ in points],
        "success": [one["levels"][level]["success"] for *_, one in points],
    }
    row_N = np.array(found["row"])
    value_N2 = np.array([found["gap"], found["success"]]).T
    within_N2 = value_N2.copy()
    for name in set(found["row"]):
        within_N2[row_N == name] -= within_N2[row_N == name].mean(0)
    if len(points) > 3:
        found["r"], found["r within rows"] = correlation(value_N2), correlation(within_N2)
    return found


def _has_gaps(found: Mapping[str, Any]) -> bool:
    return all(found.get(key) for key in ("cos", "cos at the start"))


def correlation(value_N2: np.ndarray) -> list[float]:
    """Compute Pearson's r of two columns: [r, low, high], 95 % of bootstraps over rows."""
    rng, runs = np.random.default_rng(0), len(value_N2)
    drawn = [value_N2[rng.integers(runs, size=runs)] for _ in range(2000)]
    with np.errstate(invalid="ignore"):
        values = [np.corrcoef(one.T)[0, 1] for one in drawn]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(np.corrcoef(value_N2.T)[0, 1]), float(low), float(high)]


# ----------------------------------------------------------------------------------------------------------------------
# Tables, pictures, page

MECHANISM = {  # column of the mechanism's table -> its key
    "coupling gap, cosine": "cos",
    "by tokens": "mean_src",
    "judge, balanced accuracy": "balanced accuracy",
    "good actions taken again": "start panel good",
    "flawed ones": "start panel flawed",
    "repeats": "repeats",
    "rising flawed actions": "coupling/flawed_rising",
    "in the danger zone": "coupling/flawed_in_danger",
}


def success_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out Table 1: success in percent with intervals; the title line first."""
    lines = [["method", *COLUMNS, "seeds"]]
    for name, cells in results["rows"].items():
        lines.append([ROWS[name].title, *(_percent(cells[key]) for key in COLUMNS), str(len(results["seeds"][name]))])
    return lines


def difference_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out what GCD adds to each method, and to all of them on the seeds that all have, in points with intervals."""
    shown = {ROWS[key.split(" - ")[1]].title: cells for key, cells in results["pairs"].items()}
    if len(shown) > 1 and "together" in results:
        shown[f"these {len(shown)}, averaged"] = results["together"]
    lines = [["GCD adds to", *COLUMNS, "seeds"]]
    for title, cells in shown.items():
        lines.append([title, *(_percent(cells[one], sign=True) for one in COLUMNS), str(len(cells["seeds"]))])
    return lines


def types_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out what GCD adds to each method on L2's task types, in points with intervals."""
    kinds = sorted({kind for cells in results["pairs"].values() for kind in cells["L2 by type"]})
    lines = [["on L2, GCD adds to", *kinds]]
    for key, cells in results["pairs"].items():
        own = cells["L2 by type"]
        lines.append([ROWS[key.split(" - ")[1]].title, *(_percent(own[kind], sign=True) for kind in kinds)])
    return lines


def verbs_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out in how many of the games of "cool", in percent, an agent cools, heats or cleans something."""
    lines = [['in games of "cool"', *VERBS]]
    for name, found in results["verbs"].items():
        lines.append([full_title(name), *(f"{100 * found[verb]:.0f}" for verb in VERBS)])
    return lines


def mechanism_table(results: Mapping[str, Any], level: str) -> list[list[str]]:
    """Lay out what training did to the models, on a level, means over seeds; and what GCD changes of it."""
    lines = [[level, *MECHANISM]]
    for name, found in results["mechanism"].items():
        values = [found[level].get(key) for key in MECHANISM.values()]
        if sum(value is not None for value in values) > 1:
            lines.append([full_title(name), *("" if value is None else f"{value:.3f}" for value in values)])
    for name, cells in results["pairs"].items():
        found = [cells["mechanism"][level].get(key) for key in MECHANISM.values()]
        title = f"GCD changes {ROWS[name.split(' - ')[1]].title} by"
        lines.append([title, *(_change(value) if value else "" for value in found)])
    return lines


def full_title(name: str) -> str:
    """Name a row where the plain one does not stand above it: "GRPO with GCD"."""
    plain = dict(PAIRS).get(name)
    return f"{ROWS[plain].title} {ROWS[name].title}" if plain else ROWS[name].title


def tables(results: Mapping[str, Any]) -> list[list[list[str]]]:
    """Lay out success, differences, L2 by task type and what is done there, as far as there are runs of it."""
    made = [make(results) for make in (success_table, difference_table, types_table, verbs_table)]
    return [table for table in made if len(table) > 1]


def markdown(results: Mapping[str, Any]) -> str:
    """Write these tables in Markdown."""
    parts = []
    for head, *body in tables(results):
        lines = [head, ["---"] * len(head), *body]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a terminal."""
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write table1.json, .md, .html, and two pictures."""
    (folder / "table1.json").write_text(json.dumps(results, indent=1))
    (folder / "table1.md").write_text(markdown(results))
    forest(results, folder / "table1_forest.png")
    scatter(results, folder / "table1_scatter.png")
    pictures = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}">'
        for name in ("table1_forest.png", "table1_scatter.png")
    )
    shown = [*tables(results), *(mechanism_table(results, level) for level in LEVELS)]
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left}img{max-width:100%}"
    page = f"<!doctype html><meta charset=utf-8><title>Table 1 in miniature</title><style>{style}</style>"
    (folder / "table1.html").write_text(page + "<h1>Table 1 in miniature</h1>" + "".join(map(_html, shown)) + pictures)


def forest(results: Mapping[str, Any], path: Path) -> None:
    """Draw what GCD adds, pair by pair and level by level; the primary outcome stands out."""
    fig, axis = pyplot.subplots(figsize=(7, 1 + 0.3 * len(LEVELS) * max(1, len(results["pairs"]))))
    labels = []
    for key, cells in results["pairs"].items():
        for level in LEVELS:
            middle, low, high = (100 * value for value in cells[level])
            primary = (tuple(key.split(" - ")), level) == PRIMARY
            look = {"color": "C3" if primary else "C0", "marker": "D" if primary else "o", "capsize": 3}
            axis.errorbar(middle, len(labels), xerr=[[middle - low], [high - middle]], **look)
            labels.append(f"{ROWS[key.split(' - ')[1]].title}, {level}" + " (primary)" * primary)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(xlabel="what GCD adds to success, points, 95 %")
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def scatter(results: Mapping[str, Any], path: Path) -> None:
    """Draw success against the change of the coupling gap, a point per run, a colour per row."""
    fig, axes = pyplot.subplots(1, len(LEVELS), figsize=(4.2 * len(LEVELS), 4))
    for axis, level in zip(axes, LEVELS, strict=True):
        found = results["scatter"][level]
        for number, name in enumerate(dict.fromkeys(found["row"])):
            own = [index for index, row in enumerate(found["row"]) if row == name]
            x, y = ([found[key][index] for index in own] for key in ("gap", "success"))
            axis.scatter(x, y, s=18, color=f"C{number % 10}", marker="os^"[number // 10], label=full_title(name))
        said = "r = {:.2f} [{:.2f}, {:.2f}]".format(*found["r"]) if "r" in found else ""
        axis.set(xlabel="change of the coupling gap", ylabel="success", title=f"{level}  {said}")
    axes[0].legend(frameon=False, fontsize=6)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def _percent(value: Sequence[float], sign: bool = False) -> str:
    middle, low, high = (f"{100 * one:{'+' if sign else ''}.1f}" for one in value)
    return f"{middle} [{low}, {high}]"


def _change(value: Sequence[float]) -> str:
    middle, *ends = (f"{one:+.3f}" for one in value)
    return f"{middle} [{', '.join(ends)}]" if ends else middle


def _html(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
    return f"<table><tr>{head.replace('td>', 'th>')}</tr>{''.join(f'<tr>{line}</tr>' for line in body)}</table>"


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""Table 1 in miniature, by one command: does GCD generalise better? The plan is docs/lab.md.

    python paper/table1.py                                    all of it, resumable; then the table, a picture and a page
    python paper/table1.py --rows grpo gcd --seeds 20 21      a part
    python paper/table1.py --only-print                       from the records that are there
    python paper/table1.py --config-prefix qwen1.5b           the same table on GPUs, from configs/qwen1.5b_*.yaml

Every row trains once, on the task types that are not held out, and is evaluated on all three levels: L0 and L1 are
games of these types, L2 is games of the held-out ones.  (The paper trains once more, on all types, for L0 and L1.)  A
row with GCD and its plain one are paired: same cold start, games and sampling seeds.  Two more rows are GCD as in the
paper, and a control whose judge is trained with labels dealt out at random.  Records, table1.md, .json, .html and two
pictures go to docs/PREFIX; --out names another folder, and its runs: one for each environment and setting.
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
from paper.lab import Lab, Record, Row, aligned, gain, interval, interval_over_seeds, shares

ROWS = {
    "vanilla": Row("Vanilla", "sft", script=""),
    "sft": Row("Cold start", "sft", script="train_sft.py"),
    "sft_rlvmr": Row("Cold start, RLVMR's replies", "sft_rlvmr", script="train_sft.py"),
    "ppo": Row("PPO", "ppo", "sft"),
    "ppo_gcd": Row("PPO with GCD", "ppo_gcd", "sft"),
    "grpo": Row("GRPO", "grpo", "sft"),
    "gcd": Row("GRPO with GCD", "gcd", "sft"),
    "gcd_paper": Row("GRPO with GCD as in the paper", "gcd_paper", "sft"),
    "gcd_random": Row("GRPO with GCD, random labels", "gcd_random", "sft"),
    "gigpo": Row("GiGPO", "gigpo", "sft"),
    "gigpo_gcd": Row("GiGPO with GCD", "gigpo_gcd", "sft"),
    "rlvmr": Row("RLVMR", "rlvmr", "sft_rlvmr"),
    "rlvmr_gcd": Row("RLVMR with GCD", "rlvmr_gcd", "sft_rlvmr"),
    "base_grpo": Row("GRPO, no cold start", "grpo", "vanilla"),
    "base_gcd": Row("GRPO with GCD, no cold start", "gcd", "vanilla"),
}


def titled(*pairs: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """Name pairs of rows by their difference."""
    return {f"{ROWS[ours].title} - {ROWS[plain].title}": (ours, plain) for ours, plain in pairs}


METHODS = titled(
    ("ppo_gcd", "ppo"), ("gcd", "grpo"), ("gigpo_gcd", "gigpo"), ("rlvmr_gcd", "rlvmr"), ("base_gcd", "base_grpo")
)
PAIRS = METHODS | titled(("gcd_paper", "grpo"), ("gcd_random", "grpo"), ("gcd", "gcd_random"))
PRIMARY = "GRPO with GCD - GRPO", "L2"
PAPER_ODDS = (0.815 / 0.185) / (0.697 / 0.303)  # of winning L2, GRPO with GCD over GRPO: Table 1, Qwen2.5-1.5B
# None of these chose dose or cold start, as 0 to 2 and 10 to 13 did.
SEEDS = {name: range(20, 23) for name in ROWS} | {name: range(20, 28) for name in ("sft", "grpo", "gcd")}
SEEDS["vanilla"] = range(20, 21)  # its other seeds would be the same model
COLUMNS = {level: (level,) for level in LEVELS} | {"mean": LEVELS}


def main() -> None:
    """Run what is missing, then write the table, the pictures and the page."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--config-prefix", default="lab", help="configs/PREFIX_*.yaml (default: %(default)s)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="of the records (default: docs/PREFIX)")
    command.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    command.add_argument("--seeds", nargs="+", type=int, help="training seeds (default: those of the plan)")
    command.add_argument("--workers", type=int, help="runs side by side (default: a core each; with GPUs 1)")
    command.add_argument("--only-print", action="store_true", help="run nothing; from all records")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override fields")
    arguments = command.parse_args()
    lab, rows = make_lab(arguments.config_prefix, arguments.out, arguments.set)
    if missing := [name for name in arguments.rows or () if name not in rows]:
        raise ConfigError(f"no {', '.join(str(lab.path(ROWS[name])) for name in missing)}")
    if not arguments.only_print:
        chosen = arguments.rows or rows
        gpus = torch.cuda.device_count()
        lab.run_all(
            rows,
            {name: arguments.seeds if arguments.seeds and rows[name].script else SEEDS[name] for name in chosen},
            workers=arguments.workers or (1 if gpus else os.cpu_count()),
            ranks=gpus or 1,
        )
    records = {name: found for name, found in lab.records(rows).items() if found}
    results = summarise(records)
    write(results, lab.folder)
    print(*map(aligned, tables(results)), *verdict(results), lab.folder / "table1.html", sep="\n\n")


def make_lab(prefix: str, folder: Path | None, settings: Sequence[str]) -> tuple[Lab, dict[str, Row]]:
    """Make the laboratory of a family of configs, and list the rows that it has configs of.

    All runs train on the task types that L2 does not evaluate on: one run serves all levels. Raises ConfigError.
    """
    lab = Lab(prefix, folder or Path("docs") / prefix, tuple(settings))
    rows = {name: row for name, row in ROWS.items() if lab.path(row).is_file()}
    if not rows:
        raise ConfigError(f"no {lab.path(ROWS['gcd'])}, nor any other config of --config-prefix {prefix}")
    if lacking := [start for start in {row.start for row in rows.values()} - rows.keys() if start]:
        raise ConfigError(f"no {lab.path(ROWS[lacking[0]])}, from whose checkpoint other rows start")
    env = lab.config(next(iter(rows.values()))).env
    trained = [kind for kind in envs.task_types(env) if kind not in envs.held_out_types(env)]
    return dataclasses.replace(lab, settings=(f"env.task_types=[{','.join(trained)}]", *settings)), rows


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def summarise(records: Mapping[str, Mapping[int, Record]]) -> dict[str, Any]:
    """Compute the table: success of every row by column, [estimate, low, high]; what is changed in each pair, and by
    GCD in all methods on the seeds that they share; and mechanism, with what it correlates."""
    found: dict[str, Any] = {"seeds": {name: sorted(own) for name, own in records.items()}}
    found["rows"] = {name: by_column({level: shares(own, level) for level in LEVELS}) for name, own in records.items()}
    pairs = {
        title: (records[ours], records[plain])
        for title, (ours, plain) in PAIRS.items()
        if records.get(ours, {}).keys() & records.get(plain, {}).keys()
    }
    found["pairs"] = {title: compare(*pair) for title, pair in pairs.items()}
    methods = [title for title in METHODS if title in pairs]
    seeds = sorted(set.intersection(*(set(found["pairs"][title]["seeds"]) for title in methods)) if methods else ())
    if seeds:
        gains = {level: np.mean([gain(*pairs[title], seeds, level) for title in methods], axis=0) for level in LEVELS}
        found["together"] = by_column(gains) | {"seeds": seeds, "methods": methods}
    found["mechanism"] = {
        name: {level: {key: float(values.mean()) for key, values in mechanism(own, level).items()} for level in LEVELS}
        for name, own in records.items()
    }
    found["scatter"] = {level: gap_and_success(records, level) for level in LEVELS}
    return found


def by_column(value_SG: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Compute [estimate, low, high] of every column from every level's values, [seeds, games]."""
    return {column: interval(*(value_SG[level] for level in levels)) for column, levels in COLUMNS.items()}


def compare(ours: Mapping[int, Record], plain: Mapping[int, Record]) -> dict[str, Any]:
    """Compute what ours changes over the seeds that both rows of a pair have: success, on L2 also by task type, and by
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
    what training logged at its end, and on L2 what is done in games of "cool"."""
    found: dict[str, list[float]] = {"repeats": [one["levels"][level]["repeats"] for one in own.values()]}
    for one in own.values():
        measured = one.get("mechanism", {}).get(level, {})
        numbers = {key: value[0] for key, value in measured.items() if key != "missing" and value}
        done = one["cooling"] if level == "L2" else {}
        for key, value in (numbers | one.get("late", {}) | done).items():
            found.setdefault(key, []).append(value)
    return {key: np.array(values) for key, values in found.items()}


def gap_and_success(records: Mapping[str, Mapping[int, Record]], level: str) -> dict[str, Any]:
    """Set a level's success beside what training did to its coupling gap (cosine, end less start), a point per run of
    RL; and correlate them, over all runs, and within rows, so that methods' means do not count: [r, low, high], where
    there are runs of three seeds."""
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
    if len(set(found["seed"])) >= 3:
        varied = {"r": value_N2, "r within rows": within_N2}  # within rows of one run each nothing varies
        found |= {key: correlation(value, found["seed"]) for key, value in varied.items() if value.std(0).all()}
    return found


def _has_gaps(found: Mapping[str, Any]) -> bool:
    return all(found.get(key) for key in ("cos", "cos at the start"))


def correlation(value_N2: np.ndarray, seeds: Sequence[int]) -> list[float]:
    """Compute Pearson's r of two columns: [r, low, high], 95 % of bootstraps over the runs' seeds, for runs of a seed
    share their cold start."""
    rng, seed_N = np.random.default_rng(0), np.array(seeds)
    runs = [np.flatnonzero(seed_N == seed) for seed in sorted(set(seeds))]
    drawn = [np.concatenate([runs[one] for one in rng.integers(len(runs), size=len(runs))]) for _ in range(2000)]
    with np.errstate(invalid="ignore"):
        values = [np.corrcoef(value_N2[one].T)[0, 1] for one in drawn]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(np.corrcoef(value_N2.T)[0, 1]), float(low), float(high)]


# ----------------------------------------------------------------------------------------------------------------------
# Tables, pictures, page

MECHANISM = {  # column of a table -> its key
    "coupling gap, cosine": "cos",
    "by tokens": "mean_src",
    "judge, balanced accuracy": "balanced accuracy",
    "good actions taken again": "start panel good",
    "flawed ones": "start panel flawed",
    "repeats": "repeats",
}
TRAINING_END = {
    "success": "rollout/success",
    "flawed actions rising by others": "coupling/flawed_rising",
    "in the danger zone": "coupling/flawed_in_danger",
    "judge, balanced accuracy by the labels it learns from": "judge/balanced_accuracy",
}
PICTURES = {
    "table1_forest.png": "what each pair changes on each level",
    "table1_scatter.png": "success against the change of the coupling gap, by level",
}
PAGE_HEAD = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Table 1 in miniature</title>
<style>
body { font: 14px/1.5 sans-serif; max-width: 1440px; margin: 2em auto; padding: 0 1em }
div { overflow-x: auto; margin: 2em 0 }  /* a wide table scrolls; the page does not */
table { border-collapse: collapse }
td, th { padding: .25em .6em; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd }
th { border-color: #444; white-space: normal }
td { font-variant-numeric: tabular-nums }
img { max-width: 100% }
</style>
"""
COOLING = {f"{what} it": what for what in ("cooled", "heated", "cleaned", "heated or cleaned")}


def success_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out Table 1: success in percent with intervals; the title line first."""
    lines = [["method", *COLUMNS, "seeds"]]
    for name, cells in results["rows"].items():
        lines.append([ROWS[name].title, *(_percent(cells[key]) for key in COLUMNS), str(len(results["seeds"][name]))])
    return lines


def difference_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out what each pair changes, and GCD in all methods on the seeds that they share, in points with intervals."""
    shown = dict(results["pairs"])
    if len(results["together"]["methods"] if "together" in results else ()) > 1:
        shown[f"GCD in {len(results['together']['methods'])} methods, averaged"] = results["together"]
    lines = [["difference", *COLUMNS, "seeds"]]
    for title, cells in shown.items():
        lines.append([title, *(_percent(cells[one], sign=True) for one in COLUMNS), str(len(cells["seeds"]))])
    return lines


def types_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out what each pair changes on L2's task types, in points with intervals."""
    kinds = sorted({kind for cells in results["pairs"].values() for kind in cells["L2 by type"]})
    lines = [["difference on L2", *kinds]]
    for title, cells in results["pairs"].items():
        lines.append([title, *(_percent(cells["L2 by type"][kind], sign=True) for kind in kinds)])
    return lines


def mechanism_table(results: Mapping[str, Any], level: str, title: str, columns: Mapping[str, str]) -> list[list[str]]:
    """Lay out numbers of mechanism(): every row's means over seeds, after the start's on the same steps where these are
    known, then what each pair changes, with intervals."""
    lines = [[title, *columns]]
    for name, found in results["mechanism"].items():
        lines.append([ROWS[name].title, *(_mean(found[level], key) for key in columns.values())])
    for difference, cells in results["pairs"].items():
        found = cells["mechanism"][level]
        lines.append([difference, *(_change(found[key]) if key in found else "" for key in columns.values())])
    return [line for line in lines if any(line[1:])]


def tables(results: Mapping[str, Any]) -> list[list[list[str]]]:
    """Lay out success, what pairs change, also by L2's task types, and what is done in games of "cool": as far as there
    are runs of it."""
    made = [success_table(results), difference_table(results), types_table(results)]
    made.append(mechanism_table(results, "L2", 'share of the games of "cool"', COOLING))
    return [table for table in made if len(table) > 1]


def mechanism_tables(results: Mapping[str, Any]) -> list[list[list[str]]]:
    """Lay out how training ended, and what mechanism.py measured on each level: as far as there are runs of it."""
    made = [mechanism_table(results, "L0", "at the end of training", TRAINING_END)]
    made += [mechanism_table(results, level, f"mechanism, {level}", MECHANISM) for level in LEVELS]
    return [table for table in made if len(table) > 1]


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Say what the primary outcome is by docs/lab.md, in a sentence; none where there are no runs of it."""
    title, level = PRIMARY
    if title not in results["pairs"]:
        return []
    cells, (ours, plain) = results["pairs"][title], PAIRS[title]
    before = results["rows"][plain][level][0]
    odds = PAPER_ODDS * before / (1 - before)
    carried = odds / (1 + odds) - before
    _, low, high = cells[level]
    found = [word for word, holds in (("support", low > 0), ("refutation of that size", high < carried)) if holds]
    planned = [*SEEDS[ours]]
    said = " and ".join(found) or "undecided"
    if cells["seeds"] != planned:
        said = f"no verdict, which takes the plan's seeds, {planned[0]} to {planned[-1]}, and no others"
    return [
        f"Primary outcome, {title} on {level}: {_percent(cells[level], sign=True)} points with seeds "
        f"{', '.join(map(str, cells['seeds']))}; the paper's gain would be {100 * carried:+.1f}: {said}."
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Write all tables, the verdict and the pictures in Markdown."""
    parts = [*map(_markdown, tables(results)), *verdict(results), *map(_markdown, mechanism_tables(results))]
    return "\n\n".join([*parts, *(f"![{title}]({name})" for name, title in PICTURES.items())]) + "\n"


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write table1.json, .md, .html, and two pictures."""
    (folder / "table1.json").write_text(json.dumps(results, indent=1))
    (folder / "table1.md").write_text(markdown(results))
    forest(results, folder / "table1_forest.png")
    scatter(results, folder / "table1_scatter.png")
    forest_drawn, scatter_drawn = (
        f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}">'
        for name, title in PICTURES.items()
    )
    said = "".join(f"<p>{html.escape(sentence)}" for sentence in verdict(results))
    shown = "".join(map(_html, [*tables(results), *mechanism_tables(results)]))
    body = f"<h1>Table 1 in miniature</h1>{said}{forest_drawn}{shown}{scatter_drawn}"
    (folder / "table1.html").write_text(f"{PAGE_HEAD}{body}")


def forest(results: Mapping[str, Any], path: Path) -> None:
    """Draw what is changed, pair by pair and level by level; the primary outcome stands out."""
    fig, axis = pyplot.subplots(figsize=(9, 1 + 0.3 * len(LEVELS) * max(1, len(results["pairs"]))))
    labels = []
    for title, cells in results["pairs"].items():
        for level in LEVELS:
            middle, low, high = (100 * value for value in cells[level])
            primary = (title, level) == PRIMARY
            look = {"color": "C3" if primary else "C0", "marker": "D" if primary else "o", "capsize": 3}
            axis.errorbar(middle, len(labels), xerr=[[middle - low], [high - middle]], **look)
            seeds = f"{len(cells['seeds'])} seeds" if len(cells["seeds"]) > 1 else "1 seed: games alone"
            labels.append(f"{title}, {level} ({'primary, ' * primary}{seeds})")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(xlabel="difference of success, points, 95 %")
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def scatter(results: Mapping[str, Any], path: Path) -> None:
    """Draw success against the change of the coupling gap, a point per run, a colour per row."""
    fig, axes = pyplot.subplots(1, len(LEVELS), figsize=(4 * len(LEVELS) + 2.5, 4), layout="constrained")
    for axis, level in zip(axes, LEVELS, strict=True):
        found = results["scatter"][level]
        for number, name in enumerate(dict.fromkeys(found["row"])):
            own = [index for index, row in enumerate(found["row"]) if row == name]
            x, y = ([found[key][index] for index in own] for key in ("gap", "success"))
            axis.scatter(x, y, s=18, color=f"C{number % 10}", marker="os^"[number // 10], label=ROWS[name].title)
        said = "\n".join(
            "{} = {:.2f} [{:.2f}, {:.2f}]".format(key, *found[key]) for key in ("r", "r within rows") if key in found
        )
        axis.set(xlabel="change of the coupling gap", ylabel="success", title=f"{level}\n{said}")
        axis.locator_params(axis="x", nbins=5)
    if results["scatter"][LEVELS[0]]["row"]:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def _percent(value: Sequence[float], sign: bool = False) -> str:
    middle, low, high = (f"{100 * one:{'+' if sign else ''}.1f}" for one in value)
    return f"{middle} [{low}, {high}]"


def _mean(found: Mapping[str, float], key: str) -> str:
    return " to ".join(f"{found[name]:.3f}" for name in (f"{key} at the start", key) if name in found)


def _change(value: Sequence[float]) -> str:
    middle, *ends = (f"{one:+.3f}" for one in value)
    return f"{middle} [{', '.join(ends)}]" if ends else middle


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "| --- " * len(lines[0]) + "|", *body])


def _html(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
    rows = "".join(f"<tr>{line}</tr>" for line in (head.replace("td>", "th>"), *body))
    return f"<div><table>{rows}</table></div>"


if __name__ == "__main__":
    configuration.fail_clearly(main)

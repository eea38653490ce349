"""The files of one or more runs -> one HTML page: success, learning curves, the judge, time, and every episode to read.

    python tools/report.py runs/quickstart                                  # writes runs/quickstart/report.html
    python tools/report.py runs/quickstart runs/quickstart_plain --out both.html

The page needs nothing but itself: no network, no server, no torch to make it; it is kept under --mb megabytes by
showing fewer iterations' episodes, and says so.  What a run lacks is named, not left blank.  Its look and its episode
browser are report.html, its charts svg.py.

Everything that a model, an environment or a file said is untrusted: here it is escaped, in the page it is set as text
alone, and a Content-Security-Policy lets only the template's own script and style run.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import math
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration
import prompts
from config import ConfigError
from tools.svg import chart, evenly, stack, text, thinned

TEMPLATE = Path(__file__).resolve().parent / "report.html"
PHASES = ("collect", "judge", "score", "coupling", "update", "sync", "guidelines", "evaluate", "nthr", "sleep")
LONGEST = 20_000  # characters of one text of an episode
MOST_METRICS = 200  # names in metrics.jsonl that are drawn

# Charts: title, metric, what its values are, a line to compare with. A metric that no run has is left out.
LEARNING = (
    ("Success in training", "rollout/success", "share", None),
    ("Steps per episode", "rollout/steps_per_episode", "number", None),
    ("Repeated actions", "rollout/repeats", "share", None),
    ("Actions not on offer", "rollout/unavailable", "share", None),
    ("Malformed replies", "rollout/invalid", "share", None),
    ("Samples without signal", "train/zero_advantage", "share", None),
    ("Entropy", "train/entropy", "number", None),
    ("Gradient norm", "train/grad_norm", "number", None),
    ("Learning rate", "train/lr", "number", None),
    ("Negative log-likelihood per token", "train/nll_per_token", "number", None),
)
JUDGE = (
    ("Balanced accuracy", "judge/balanced_accuracy", "share", 0.5),
    ("Accuracy on good actions", "judge/accuracy_good", "share", 0.5),
    ("Accuracy on flawed actions", "judge/accuracy_flawed", "share", 0.5),
    ("Answers that say good", "judge/answers_good", "share", 0.5),
    ("Answers without a verdict", "judge/format_failures", "share", None),
)
DISEASE = (
    ("Repeated actions, won episodes", "rollout/repeats_won", "share", None),
    ("Repeated actions, lost episodes", "rollout/repeats_lost", "share", None),
    ("Other attempts that repeat them, too", "rollout/repeat_consistency", "share", None),
    ("Coupling gap, cosine", "coupling/gap_cos", "number", 0.0),
    ("Coupling gap by tokens", "coupling/gap_mean_src", "number", 0.0),
    ("Flawed actions that become likelier", "coupling/flawed_rising", "share", None),
    ("Flawed actions past the point of return", "coupling/flawed_in_danger", "share", None),
)
MISMATCH = (
    ("Engine against trainer: mean |Δ log p|", "mismatch/mean_abs", "number", None),
    ("Largest |Δ log p|", "mismatch/max_abs", "number", None),
    ("Check of the weights' hand-over", "mismatch/weight_sync", "number", None),
    ("Importance weight", "mismatch/weight", "number", 1.0),
)
MACHINE = (
    ("Sampled tokens per second", "rollout/tokens_per_s", "number", None),
    ("Tokens trained on per distinct token", "train/tokens_per_distinct", "number", 1.0),
    ("Peak GPU memory of the trainer, GiB", "mem/peak_gib", "number", None),
)
LABELS = (
    ("flawed", "judge/label_flawed", "flawed"),
    ("good, by rule", "judge/label_good_rule", "good"),
    ("good, by teacher", "judge/label_good_teacher", "teacher"),
)


@dataclass
class Run:
    """What was found in one folder; everything but the folder may be missing."""

    folder: Path
    name: str
    config: dict[str, str] = field(default_factory=dict)  # by dotted key, as written
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)  # name -> iteration -> value
    results: dict[str, dict] = field(default_factory=dict)  # levels of the newest evaluation
    machine: dict[str, str] = field(default_factory=dict)  # what it ran on
    start: Path | None = None  # the run that it started from
    episodes: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is missing or broken


def main() -> None:
    """Write the page of the runs that the command line names."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    command.add_argument("--out", type=Path, help="default: report.html in the first run's folder")
    command.add_argument("--mb", type=float, default=5.0, help="most megabytes (default: %(default)s)")
    arguments = command.parse_args()
    for folder in arguments.runs:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder of a run")
    runs = [read_run(folder) for folder in arguments.runs]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    page = build(runs, int(arguments.mb * 1e6))
    out = arguments.out or arguments.runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{out} ({len(page.encode()) / 1e6:.2f} MB)")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read_run(folder: Path) -> Run:
    """Read a run's files, all but the episodes, which are listed."""
    run = Run(folder, folder.resolve().name)
    run.config = _read_config(folder / "config.yaml", run.notes)
    run.metrics = _read_metrics(folder / "metrics.jsonl", run.notes)
    run.results = _read_results(folder, run.notes)
    run.machine = _read_machine(folder / "machine.json", run.notes)
    run.episodes = sorted(path for path in (folder / "episodes").glob("*.jsonl.gz") if _iteration(path) >= 0)
    if not run.episodes:
        run.notes.append("no episodes/: there is nothing to browse (train.episodes_every says how often they are kept)")
    start = configuration.run_folder(run.config.get("model.path", ""))
    if start:  # written relative to where the training was started, which holds runs/
        places = (start, folder.resolve().parent.parent / start, folder.resolve().parent / start.name)
        run.start = next((place for place in places if place.is_dir()), None)
        if run.start is None:
            run.notes.append(f"the run it started from, {start}, is not here: nothing to compare with")
        elif configuration.newest_evaluation(run.start) is None:
            run.notes.append(f"the run it started from, {start}, has no eval_*.json: nothing to compare with")
    return run


def parse(text: str) -> Any:
    """Read a JSON value; None where there is none, or one nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _iteration(path: Path) -> int:
    """Read the iteration off the name of its record, 000012.jsonl.gz; -1 for other names."""
    number = path.name.removesuffix(".jsonl.gz")
    return int(number) if number.isdecimal() else -1


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Read a file's JSON objects, one a line, and count the lines that hold none (a killed run tears its last).

    A compressed file that is torn, or none, counts as one such line.
    """
    parts = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while part := file.read(2**16):
                parts.append(part)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        parts.append(b"\n(torn)")
    text = b"".join(parts).decode("utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()]
    objects = [record for record in map(parse, lines) if isinstance(record, dict)]
    return objects, len(lines) - len(objects)


def _read_config(path: Path, notes: list[str]) -> dict[str, str]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8", errors="replace"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        notes.append("no config.yaml: settings are not known")
        return {}
    except (yaml.YAMLError, RecursionError) as error:
        notes.append(f"config.yaml cannot be read ({' '.join(str(error).split())[:200]}): settings are not known")
        return {}
    flat: dict[str, str] = {}
    waiting = [("", tree)]
    while waiting and len(flat) < 2000:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}" if key else str(name), below) for name, below in reversed(value.items())]
        elif key:
            flat[key] = as_text(value)
    return flat


def _read_metrics(path: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    if not path.is_file():
        notes.append("no metrics.jsonl: there are no curves (train_rl.py writes a line after each iteration)")
        return {}
    records, torn = read_lines(path)
    if torn:
        notes.append(f"metrics.jsonl: {torn} of {torn + len(records)} lines could not be read and were left out")
    if not records:
        notes.append("metrics.jsonl is empty: there are no curves yet")
    metrics: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        at = record.get("iteration", record.get("update"))
        if isinstance(at, int):
            for name, value in record.items():
                if name not in ("iteration", "update") and (number := as_number(value)) is not None:
                    metrics[name][at] = number
    if len(metrics) > MOST_METRICS:
        notes.append(f"metrics.jsonl: only the first {MOST_METRICS} of {len(metrics)} metrics are drawn")
    return {name: dict(sorted(values.items())) for name, values in list(metrics.items())[:MOST_METRICS]}


def _read_results(folder: Path, notes: list[str]) -> dict[str, dict]:
    path = configuration.newest_evaluation(folder)
    if path is None:
        notes.append("no eval_*.json: run evaluate.py --ckpt on a checkpoint of this run to fill the table of success")
        return {}
    record = parse(path.read_text(encoding="utf-8", errors="replace"))
    levels = record.get("levels") if isinstance(record, dict) else None
    if not isinstance(levels, dict):
        notes.append(f"{path.name} cannot be read: delete it, and run evaluate.py again")
        return {}
    whole = {name: result for name, result in levels.items() if _is_rate(result)}
    if len(whole) < len(levels):
        notes.append(f"{path.name}: a level without success, interval or n was left out")
    return whole


def _read_machine(path: Path, notes: list[str]) -> dict[str, str]:
    record = parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if not isinstance(record, dict):
        notes.append("no machine.json that can be read: what it ran on is not known")
        return {}
    return {as_text(name): as_text(told) for name, told in record.items()}


def _is_rate(result: Any) -> bool:
    return isinstance(result, dict) and all(as_number(result.get(key)) is not None for key in RATE)


RATE = ("success", "low", "high", "n")


def as_number(value: Any) -> float | None:
    """Return a finite number as it is, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def as_text(value: Any) -> str:
    """Turn any JSON value into text; strings stay as they are, unless they are very long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            value = "(nested too deeply to show)"
    return value if len(value) <= LONGEST else f"{value[:LONGEST]} … [{len(value) - LONGEST} more characters]"


# ----------------------------------------------------------------------------------------------------------------------
# Episodes, packed


def pack_episodes(run: Run, budget: int) -> tuple[dict[int, str], dict]:
    """Pack a run's episodes into `budget` characters: (iteration -> base64 of gzip of JSON, what is said of them).

    If not all fit: iterations at even distances, first and last among them; then fewer tasks of the last one.
    """
    about = {"total": len(run.episodes), "groups": None, "torn": 0}
    if not run.episodes:
        return {}, about
    packed: dict[int, tuple[str, int]] = {}

    def pack(number: int, groups: int | None = None) -> tuple[str, int]:
        if groups is not None:
            return pack_iteration(run, number, groups)
        if number not in packed:
            packed[number] = pack_iteration(run, number)
        return packed[number]

    sizes = [path.stat().st_size for path in run.episodes]
    last = len(sizes) - 1
    data, _ = pack(last)
    ratio = len(data) / max(1, sizes[last])
    count = max(1, min(len(sizes), int(len(sizes) * budget / max(1.0, ratio * sum(sizes)) * 1.1)))

    def used(count: int) -> int:
        return sum(len(pack(number)[0]) for number in evenly(len(sizes), count))

    while count > 1 and (taken := used(count)) > budget:
        count = max(1, min(count - 1, int(count * budget / taken)))
    grown = min(len(sizes), int(count * budget / max(1, used(count))))  # the estimate may have been too careful
    count = next((more for more in (grown, (count + grown) // 2) if more > count and used(more) <= budget), count)
    chosen = evenly(len(sizes), count)
    shown = {number: packed[number] for number in chosen}
    groups = 64
    while sum(len(data) for data, _ in shown.values()) > budget and groups:
        groups //= 2
        shown = {last: pack(last, groups)} if groups else {}
        about["groups"] = groups
    about["torn"] = sum(torn for _, torn in shown.values())
    if about["torn"]:
        run.notes.append(f"episodes/: {about['torn']} lines or steps could not be read and were left out")
    if len(shown) < len(sizes):
        part = f", its first {groups} tasks" if about["groups"] else ""
        run.notes.append(f"episodes of {len(shown)} of {len(sizes)} iterations{part} are in this page, for its size")
    return {_iteration(run.episodes[number]): data for number, (data, _) in sorted(shown.items())}, about


def _about_how_large(run: Run) -> int:
    """Estimate the characters that all episodes of a run would take, by its last iteration."""
    return len(pack_iteration(run, len(run.episodes) - 1)[0]) * len(run.episodes) if run.episodes else 0


def pack_iteration(run: Run, number: int, groups: int | None = None) -> tuple[str, int]:
    """Pack the episodes of an iteration's first `groups` tasks: (base64 of gzip of JSON, lines and steps left out)."""
    lines, torn = read_lines(run.episodes[number])
    strings: dict[str, int] = {}

    def intern(value: Any) -> int:
        return strings.setdefault(as_text(value), len(strings))

    played = [record for record in lines if "steps" in record]
    known = sorted({as_id(record, "group") for record in played})[:groups]
    episodes, questions, guidelines = [], [], None
    for record in played:
        if as_id(record, "group") in known:
            packed, broken = _pack_episode(record, intern)
            torn += broken
            if packed:
                episodes.append(packed)
    for record in lines:
        if "steps" not in record:
            asked = record["questions"] if isinstance(record.get("questions"), list) else []
            asked = [question for question in asked if isinstance(question, dict)]
            questions += [_pack_question(question, intern) for question in asked if as_id(question, "group") in known]
            guidelines = record["guidelines"] if isinstance(record.get("guidelines"), list) else guidelines
    payload = {
        "episodes": episodes,
        "questions": questions,
        "guidelines": None if guidelines is None else [intern(one) for one in guidelines],
        "strings": list(strings),
    }
    data = json.dumps(payload, separators=(",", ":")).encode("ascii")
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii"), torn


def _pack_episode(record: dict, intern: Callable[[Any], int]) -> tuple[list | None, int]:
    """Pack an episode, and count the steps (or 1: all of it) that cannot be read.

    It becomes [group, member, won, score, type, id, version, steps].
    """
    if not isinstance(record["steps"], list):
        return None, 1
    steps = [_pack_step(step, intern) for step in record["steps"] if isinstance(step, dict)]
    task = record["task"] if isinstance(record.get("task"), dict) else {}
    head = [as_id(record, "group"), as_id(record, "member"), int(record.get("won") is True), _brief(record, "score")]
    ids = [intern(task.get("type")), intern(task.get("id")), as_id(record, "weights_version")]
    return [*head, *ids, steps], len(record["steps"]) - len(steps)


def _pack_step(step: dict, intern: Callable[[Any], int]) -> list:
    """Pack a step; its reply stands there only where tag, thought and action do not say all of it.

    It becomes [observation, thought, action, reply|null, tag, flags, reward, advantage, label, source, gain,
    prompt|null].
    """
    tag, thought, action, reply, prompt = (step.get(key) for key in ("tag", "thought", "action", "response", "prompt"))
    said = reply == f"<{tag}>{thought}</{tag}><action>{action}</action>"
    bits = (("valid", 1), ("available", 2), ("truncated", 4))
    label = step.get("label")
    return [
        intern(step.get("observation")),
        intern(thought),
        intern(action),
        None if said else intern(reply),
        intern(tag),
        sum(bit for key, bit in bits if step.get(key) is True),
        _brief(step, "reward"),
        _brief(step, "advantage"),
        label if label in (0, 1) else None,
        intern(step.get("label_source")),
        _brief(step, "gain"),
        intern(prompt) if isinstance(prompt, str) else None,
    ]


def _pack_question(question: dict, intern: Callable[[Any], int]) -> list:
    """Pack a question with its answers, read as the judge does.

    It becomes [group, member, step, label, source, [[answer, verdict, better action, advice], ...]].
    """
    answers = question.get("answers") if isinstance(question.get("answers"), list) else []
    read = [(answer, prompts.parse_critique(answer)) for answer in answers if isinstance(answer, str)]
    label = question.get("label")
    return [
        *(as_id(question, key) for key in ("group", "member", "step")),
        label if label in (0, 1) else None,
        intern(question.get("source")),
        [[intern(text), said.score, intern(said.action), intern(said.advice)] for text, said in read],
    ]


def as_id(record: dict, key: str) -> int:
    """Return a whole number that numbers something, or -1."""
    value = record.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else -1


def _brief(record: dict, key: str) -> float | None:
    number = as_number(record.get(key))
    return None if number is None else float(f"{number:.4g}")


# ----------------------------------------------------------------------------------------------------------------------
# HTML: text and tables


def for_script(value: Any) -> str:
    """Write JSON that may stand in a <script>: nothing in it can end the element or open another."""
    return re.sub(r"[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value))


def percent(value: float) -> str:
    """Write a share in percent. Example: 0.525 -> "52.5"."""
    return f"{100 * value:.1f}"


def starts(runs: Sequence[Run]) -> dict[Path, Run]:
    """Find the runs that others started from and that have results, by folder; the report's own are included."""
    found = {run.folder.resolve(): run for run in runs}
    for run in runs:
        if run.start and (folder := run.start.resolve()) not in found:
            found[folder] = Run(folder, folder.name, results=_read_results(folder, []))
    return found


def success_section(runs: Sequence[Run]) -> str:
    """Make a table for each level: success, its interval in numbers and drawn, and the change since the cold start."""
    known = starts(runs)
    levels = sorted({level for run in known.values() for level in run.results})
    if not levels:
        return missing(
            "No evaluation yet: no run has an eval_*.json. evaluate.py --ckpt RUN/checkpoints/latest writes it."
        )
    order = [run for run in known.values() if run not in runs and run.results] + list(runs)
    parts = []
    for level in levels:
        rows, kinds = [], sorted({kind for run in order for kind in _types(run.results.get(level, {}))})
        for run in order:
            before = known[run.start.resolve()].results.get(level) if run.start else None
            rows.append(_success_row(run, run.results.get(level), before, _colour(run, runs)))
        folded = ""
        for kind in kinds:
            below = []
            for run in order:
                start = known[run.start.resolve()].results.get(level, {}) if run.start else {}
                one = _types(run.results.get(level, {})).get(kind)
                below.append(_success_row(run, one, _types(start).get(kind), _colour(run, runs)))
            folded += _success_table(kind.replace("_", " "), below)
        behaviour = _behaviour_table(order, level, runs)
        parts.append(
            f'<article class="card level">{_success_table(level, rows, LEVELS.get(level, ""))}'
            f'<div class="folds"><details><summary>By task type</summary>{folded}</details>'
            f"<details><summary>How it plays</summary>{behaviour}</details></div></article>"
        )
    starred = any(result.get("trained_on") for run in order for result in run.results.values())
    star = '<p class="quiet">* task types that the run was trained on</p>' if starred else ""
    return f'<div class="levels">{"".join(parts)}</div>{star}'


LEVELS = {
    "L0": "new tasks in surroundings seen in training",
    "L1": "new tasks in unseen surroundings",
    "L2": "unseen task types",
}


def _types(result: dict) -> dict[str, dict]:
    types = result.get("types")
    return {kind: one for kind, one in types.items() if _is_rate(one)} if isinstance(types, dict) else {}


def _colour(run: Run, runs: Sequence[Run]) -> str:
    return f"c{list(runs).index(run) % 8}" if run in runs else "start"


def _success_table(title: str, rows: Sequence[str], subtitle: str = "") -> str:
    about = f' <span class="quiet">{text(subtitle)}</span>' if subtitle else ""
    return (
        f'<table class="success"><caption>{text(title)}{about}</caption><thead><tr><th scope="col">run</th>'
        '<th scope="col" class="num">success, %</th>'
        '<th scope="col" class="plot"><span><b>0</b><b>50</b><b>100</b></span></th>'
        '<th scope="col" class="num">change</th><th scope="col" class="num wide">plays</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _success_row(run: Run, result: dict | None, before: dict | None, colour: str) -> str:
    name = f'<th scope="row"><span class="dot {colour}"></span>{text(run.name)}</th>'
    if result is None:
        return f'<tr>{name}<td colspan="4" class="quiet">not evaluated</td></tr>'
    low, high, at = (min(1.0, max(0.0, result[key])) for key in ("low", "high", "success"))
    change = ""
    if before:
        points = 100 * (result["success"] - before["success"])
        apart = result["low"] > before["high"] or result["high"] < before["low"]
        hint = "the intervals are disjoint" if apart else "the intervals overlap"
        change = f'<span class="{"firm" if apart else "quiet"}" title="{hint}">{points:+.1f}</span>'
    mark = "*" * bool(result.get("trained_on"))
    plot = (
        f'<svg class="interval {colour}" viewBox="0 0 200 24" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="grid" d="M0 0V24M50 0V24M100 0V24M150 0V24M200 0V24"/>'
        f'<path class="whisker" d="M{200 * low:.1f} 12H{200 * high:.1f}"/>'
        f'<path class="at" d="M{200 * at:.1f} 12h0"/></svg>'
    )
    games = f" · {result['games']:.0f} games" if as_number(result.get("games")) else ""
    return (
        f'<tr>{name}<td class="num"><b>{percent(result["success"])}{mark}</b> '
        f"<small>[{percent(result['low'])}, {percent(result['high'])}]</small></td>"
        f'<td class="plot">{plot}</td><td class="num">{change}</td>'
        f'<td class="num wide quiet">n={result["n"]:.0f}{games}</td></tr>'
    )


def _behaviour_table(order: Sequence[Run], level: str, runs: Sequence[Run]) -> str:
    columns = {
        "steps": ("mean_steps", "{:.1f}", 1),
        "steps if won": ("mean_steps_won", "{:.1f}", 1),
        "repeats, %": ("repeats", "{:.1f}", 100),
        "not on offer, %": ("unavailable", "{:.1f}", 100),
        "malformed, %": ("invalid", "{:.2f}", 100),
        "by loose rule, %": ("success_loose", "{:.1f}", 100),
    }
    rows = ""
    for run in order:
        cells = ""
        for key, form, scale in columns.values():
            value = as_number(run.results.get(level, {}).get(key))
            cells += f'<td class="num">{"–" if value is None else form.format(scale * value)}</td>'
        rows += f'<tr><th scope="row"><span class="dot {_colour(run, runs)}"></span>{text(run.name)}</th>{cells}</tr>'
    head = "".join(f'<th scope="col" class="num">{name}</th>' for name in columns)
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def missing(message: str) -> str:
    """Make a panel that says what is not there."""
    return f'<p class="missing">{text(message)}</p>'


def glance(run: Run, before: dict[str, dict]) -> list[tuple[str, str, str]]:
    """List (what, value, detail) of what one asks first."""
    tiles = []
    for level, result in sorted(run.results.items()):
        interval = f"[{percent(result['low'])}, {percent(result['high'])}]"
        gained = f", {100 * (result['success'] - before[level]['success']):+.1f}" if level in before else ""
        tiles.append((f"success {level}", f"{percent(result['success'])} %", interval + gained))
    won = list(run.metrics.get("rollout/success", {}).values())
    if won:
        tiles.append(("success in training", f"{percent(won[-1])} %", f"from {percent(won[0])} % in {len(won)} it."))
    judged = list(run.metrics.get("judge/balanced_accuracy", {}).values())[-5:]
    if judged:
        tiles.append(("judge", f"{percent(sum(judged) / len(judged))} %", "balanced, last 5 it."))
    total, judging = (sum(run.metrics.get(f"time/{phase}", {}).values()) for phase in ("total", "judge"))
    if won and total:
        tiles.append(("time of training", duration(total), f"{duration(total / len(won))} an iteration"))
    if judging and total:
        tiles.append(("time of judging", f"{percent(judging / total)} %", "GCD's part of it"))
    return tiles


def duration(seconds: float) -> str:
    """Write seconds as one asks for them. Example: 612 -> "10.2 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def glance_section(runs: Sequence[Run]) -> str:
    """Show what one asks first: as tiles for one run, as a table for several."""
    known = starts(runs)
    found = {run.name: glance(run, known[run.start.resolve()].results if run.start else {}) for run in runs}
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{text(what)}</dt><dd>{text(value)}</dd><dd class=quiet>{text(detail)}</dd></div>"
            for what, value, detail in found[runs[0].name]
        )
        return f'<dl class="tiles">{tiles}</dl>' if tiles else ""
    names = list(dict.fromkeys(what for tiles in found.values() for what, _, _ in tiles))
    rows = ""
    for run in runs:
        own = {what: (value, detail) for what, value, detail in found[run.name]}
        cells = "".join(
            f'<td class="num"><b>{text(own[name][0])}</b><br><small>{text(own[name][1])}</small></td>'
            if name in own
            else '<td class="num quiet">–</td>'
            for name in names
        )
        about = f"<small>{text(method(run))}</small>" if method(run) else ""
        name = f'<span class="dot {_colour(run, runs)}"></span>{text(run.name)}{about}'
        rows += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    head = "".join(f'<th scope="col" class="num">{text(name)}</th>' for name in names)
    return (
        f'<div class="scroll card"><table class="glance"><thead><tr><th scope="col">run</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def summary(run: Run) -> str:
    """Describe a run in one line: method, environment, where it started, seed."""
    parts = [method(run)] if method(run) else []
    for label, key in (("", "env.name"), ("level ", "env.level"), ("from ", "model.path"), ("seed ", "seed")):
        if run.config.get(key):
            parts.append(label + run.config[key])
    return " · ".join(parts)


def method(run: Run) -> str:
    """Name a run's method, as in "GiGPO + GCD"; empty where no reinforcement learning was done."""
    if "rollout/success" not in run.metrics or "algo.advantage" not in run.config:
        return ""
    names = {"grpo": "GRPO", "gigpo": "GiGPO", "rlvmr": "RLVMR", "ppo": "PPO"}
    name = run.config["algo.advantage"]
    added = [said for said, key in (("NTHR", "algo.nthr"), ("GCD", "judge.enabled")) if run.config.get(key) == "true"]
    return " + ".join([names.get(name, name), *added])


def config_section(runs: Sequence[Run]) -> str:
    """List all settings by group; of several runs, first those that differ."""
    having = [run for run in runs if run.config]
    if not having:
        return missing("No config.yaml: the settings are not known.")
    keys = list(dict.fromkeys(key for run in having for key in run.config))
    parts = []
    if len(having) > 1:
        differ = [key for key in keys if len({run.config.get(key) for run in having}) > 1]
        parts.append(f"<h3>What differs</h3>{_config_table(differ, having)}")
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[key.split(".")[0] if "." in key else "run"].append(key)
    folded = "".join(
        f"<details><summary>{text(name)}</summary>{_config_table(members, having)}</details>"
        for name, members in groups.items()
    )
    return f'<div class="card">{"".join(parts)}<div class="folds">{folded}</div></div>'


def _config_table(keys: Sequence[str], runs: Sequence[Run]) -> str:
    head = "".join(f'<th scope="col">{text(run.name)}</th>' for run in runs)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(runs) > 1 else ""
    rows = "".join(
        f'<tr><th scope="row">{text(key)}</th>' + "".join(f"<td>{text(r.config.get(key, '–'))}</td>" for r in runs)
        for key in keys
    )
    return f'<div class="scroll"><table class="config">{head}<tbody>{rows}</tbody></table></div>'


def machine_section(runs: Sequence[Run]) -> str:
    """List what each run ran on: packages' versions, processors."""
    parts = []
    for run in runs:
        rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(told)}</dd></div>" for name, told in run.machine.items())
        name = f"<h4>{text(run.name)}</h4>" if len(runs) > 1 else ""
        parts.append(f'{name}<dl class="versions card">{rows}</dl>' if rows else f"{name}{missing('Not known.')}")
    return "".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# HTML: charts


def charts(runs: Sequence[Run], rows: Iterable[tuple[str, str, str, float | None]]) -> str:
    """Draw a figure for each metric that a run has, with a line for each run."""
    return "".join(
        chart(
            title,
            [(run.name, _colour(run, runs), thinned(run.metrics.get(metric, {}), points_of(runs))) for run in runs],
            kind,
            reference,
            _axis(runs),
        )
        for title, metric, kind, reference in rows
    )


def points_of(runs: Sequence[Run]) -> int:
    """Choose the points of one line: fewer where there are many runs, for the page's size."""
    return max(20, min(200, 1000 // len(runs)))


def _axis(runs: Sequence[Run]) -> str:
    return "update" if all("train/nll_per_token" in run.metrics for run in runs) else "iteration"


def legend(runs: Sequence[Run]) -> str:
    """Say which colour is which run; nothing for one."""
    if len(runs) == 1:
        return ""
    keys = "".join(f'<span><i class="dot {_colour(run, runs)}"></i>{text(run.name)}</span>' for run in runs)
    return f'<p class="key">{keys}</p>'


def learning_section(runs: Sequence[Run]) -> str:
    """Draw learning curves, evaluations during training, and below the fold every metric that is nowhere else."""
    if not any(run.metrics for run in runs):
        return missing("No metrics.jsonl: there are no curves.")
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    tested = [(f"Evaluation {name[5:]}", name, "share", None) for name in names if name.startswith("eval/")]
    elsewhere = {row[1] for row in (*LEARNING, *tested, *JUDGE, *DISEASE, *MISMATCH, *MACHINE, *LABELS)}
    elsewhere |= {f"time/{phase}" for phase in PHASES}
    rest = [(name, name, "number", None) for name in names if name not in elsewhere]
    more = charts(runs, rest)
    return (
        f'{legend(runs)}<div class="charts">{charts(runs, (*LEARNING[:1], *tested, *LEARNING[1:]))}</div>'
        + (f'<details class="more"><summary>{len(rest)} more metrics</summary>' if rest else "")
        + (f'<div class="charts">{more}</div></details>' if rest else "")
    )


def judge_section(runs: Sequence[Run]) -> str:
    """Draw what GCD adds: the policy as judge, labels, what judging costs, coupling of gradients."""
    asked = [run for run in runs if "judge/balanced_accuracy" in run.metrics]
    parts, lead = [], legend(runs)
    if not asked:
        lead = missing("Not trained with GCD (judge.enabled), or nothing judged yet: there are no judgements.")
    elif len(runs) == 1:
        lines = [
            (name, colour, thinned(runs[0].metrics.get(f"judge/{key}", {}), 200))
            for name, colour, key in (
                ("on good actions", "good", "accuracy_good"),
                ("on flawed actions", "flawed", "accuracy_flawed"),
                ("balanced", "ink", "balanced_accuracy"),
            )
        ]
        key = "".join(f'<span><i class="dot {colour}"></i>{name}</span>' for name, colour, _ in lines)
        figure = chart("Accuracy of the judge", lines, "share", 0.5)
        parts.append(figure.replace("</figure>", f'<p class="key">{key}<span>┄ chance</span></p></figure>'))
        parts.append(charts(runs, JUDGE[3:]))
    else:
        parts.append(charts(runs, JUDGE))
    for run in asked:
        bars = [(name, colour, thinned(run.metrics.get(key, {}), 200)) for name, key, colour in LABELS]
        parts.append(stack(f"Labels{_of(run, runs)}", bars, "number"))
    overhead = []
    for run in asked:
        total = run.metrics.get("time/total", {})
        cost = {at: value / total[at] for at, value in run.metrics.get("time/judge", {}).items() if total.get(at)}
        overhead.append((run.name, _colour(run, runs), thinned(cost, points_of(runs))))
    parts.append(chart("Judging's share of the time", overhead, "share"))
    grid = f'{lead}<div class="charts">{"".join(parts)}</div>'
    if disease := charts(runs, DISEASE):
        grid += (
            "<h3>Repeated actions, and coupling of gradients</h3><p class=lead>Before each update: what a small "
            f'labelled sample of its steps learns from one another.</p><div class="charts">{disease}</div>'
        )
    return grid


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f": {run.name}" if len(runs) > 1 else ""


def time_section(runs: Sequence[Run]) -> str:
    """Draw seconds per phase, speed, memory; engine against trainer."""
    parts = []
    for run in runs:
        phases = {name[5:] for name in run.metrics if name.startswith("time/")} - {"total"}
        order = [phase for phase in PHASES if phase in phases] + sorted(phases - set(PHASES))
        bars = [
            (phase, f"p{PHASES.index(phase) if phase in PHASES else 9}", thinned(run.metrics[f"time/{phase}"], 200))
            for phase in order
        ]
        parts.append(stack(f"Seconds per phase{_of(run, runs)}", bars, "seconds"))
    grid = "".join(parts) + charts(runs, MACHINE)
    mismatch = charts(runs, MISMATCH)
    if not grid and not mismatch:
        return missing("No metrics.jsonl, or none of reinforcement learning: times are not known.")
    memory = any("mem/peak_gib" in run.metrics for run in runs)
    note = "" if memory else '<p class="quiet">No GPU memory: nothing ran on one.</p>'
    return (
        f'{legend(runs)}<div class="charts">{grid}</div>{note}'
        f'<h3>Mismatch of engine and trainer</h3><div class="charts">{mismatch}</div>'
    )


# ----------------------------------------------------------------------------------------------------------------------
# The page


def build(runs: Sequence[Run], limit: int = 5_000_000) -> str:
    """Build the whole page, of at most `limit` bytes if the episodes are what makes it large."""
    template = TEMPLATE.read_text(encoding="utf-8")
    title = " · ".join(run.name for run in runs)
    alone = len(runs) == 1
    fields = {
        "TITLE": text(f"{title} – report"),
        "KIND": "Report of a run" if alone else "Comparison of runs",
        "HEADING": " <span>and</span> ".join(text(run.name) for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        "SUMMARY": f'<p class="summary">{text(summary(runs[0]))}</p>' if alone else "",
        "GLANCE": glance_section(runs),
        "SUCCESS": success_section(runs),
        "LEARNING": learning_section(runs),
        "JUDGE": judge_section(runs),
        "TIME": time_section(runs),
        "CONFIG": config_section(runs),
        "MACHINE": machine_section(runs),
    }
    left = limit - len(template.encode()) - sum(len(part.encode()) for part in fields.values()) - 20_000
    packed: dict[int, tuple[dict[int, str], dict]] = {}
    # The small ones first: what they do not need is left for the others.
    for number in sorted(range(len(runs)), key=lambda number: _about_how_large(runs[number])):
        packed[number] = pack_episodes(runs[number], max(0, left // (len(runs) - len(packed))))
        left -= sum(map(len, packed[number][0].values()))
    index = [{"name": run.name, "iterations": list(packed[i][0]), **packed[i][1]} for i, run in enumerate(runs)]
    chunks = [
        f'<script type="application/octet-stream" id="chunk-{number}-{at}">{data}</script>'
        for number in range(len(runs))
        for at, data in packed[number][0].items()
    ]
    noted: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        for note in run.notes:
            noted[note].append(run.name)
    notes = "".join(f"<li><b>{text(', '.join(names))}</b> {text(note)}</li>" for note, names in noted.items())
    fields |= {
        "NOTES": f'<ul class="notes">{notes}</ul>' if notes else "",
        "INDEX": for_script(index),
        "CHUNKS": "\n".join(chunks),
        "POLICY": policy(template),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: fields[match[1]], template)


def policy(template: str) -> str:
    """Write the Content-Security-Policy under which only the template's own script and style count, by hash."""
    allowed = {}
    for kind in ("script", "style"):
        (body,) = re.findall(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)
        allowed[kind] = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
        "base-uri 'none'; form-action 'none'"
    )


if __name__ == "__main__":
    configuration.fail_clearly(main)

"""What GCD costs: seconds of an iteration with it over seconds without, from runs that take turns on one machine.

    python benchmarks/gcd_overhead.py configs/quickstart.yaml --set model.path=runs/quickstart_sft/checkpoints/latest

Each run is train_rl.py itself, for some iterations at learning rate 0 and without guidelines, so that both sides play
the same episodes and update on the same actions; the side with GCD also labels, asks and updates on the critiques.  A
run's first iteration, which warms things up, does not count.  The ratio is the median of --repeats pairs, [min, max].
The paper pays +29 to +47 % (its Table 4).
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config as configuration

SCRIPT = Path(__file__).resolve().parent.parent / "train_rl.py"


def seconds(config: str, overrides: Sequence[str], iterations: int, gcd: bool) -> list[dict[str, float]]:
    """Run some iterations; return the metrics of all but the first."""
    name = f"gcd_overhead_{'with' if gcd else 'without'}"
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    settings = [*overrides, f"name={name}", "train.lr=0", "guidelines.every=0", "train.eval_every=0"]
    settings += [f"train.iterations={iterations + 1}", "train.checkpoint_every=1000000", f"judge.enabled={gcd}"]
    subprocess.run([sys.executable, str(SCRIPT), config, "--set", *settings], check=True)
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(Path("runs") / name)
    return [json.loads(line) for line in lines][1:]


def main() -> None:
    """Run pairs, and print the ratio."""
    command = configuration.parser(__doc__)
    command.add_argument("--iterations", type=int, default=3, help="that count, in each run (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, help="pairs of runs (default: %(default)s)")
    arguments = command.parse_args()
    ratios, shares = [], []
    for _ in range(arguments.repeats):
        plain, with_gcd = (seconds(arguments.config, arguments.set, arguments.iterations, gcd) for gcd in (False, True))
        for one, other in zip(plain, with_gcd, strict=True):
            assert one["rollout/steps"] == other["rollout/steps"], "the two sides played different episodes"
        times = [sum(record["time/total"] for record in records) for records in (plain, with_gcd)]
        ratios.append(times[1] / times[0])
        shares.append(sum(record["time/judge"] for record in with_gcd) / times[1])
        print(f"without {times[0] / len(plain):.1f} s an iteration, with GCD {times[1] / len(plain):.1f} s", flush=True)
    share, last = statistics.median(shares), with_gcd[-1]
    print(
        f"iteration with GCD / without: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]; "
        f"{share:.1%} of it to label and ask, the rest to update on {last.get('judge/samples', 0)} critiques beside "
        f"{last['train/samples']} actions"
    )


if __name__ == "__main__":
    configuration.fail_clearly(main)

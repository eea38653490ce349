"""Replay small recorded runs and compare every number, to the last digit: the proof that a rebuild changed nothing.

    python tests/golden.py                          # replay all cases (about 10 minutes), print what differs
    python tests/golden.py nthr scienceworld        # some of them
    python tests/golden.py --record                 # write golden.json anew, after a change of numbers that is meant

A case is a cold start, or some iterations of RL from one, on one rank or two; its record holds every metric but times,
a digest of the final weights, and one of what model and environment said.  Kernels differ in the last digit from one
type of processor to another, and a sampled token may follow: golden.json says on which type it was recorded.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("golden.json")
TIMED = ("time/", "rollout/tokens_per_s", "mem/")  # metrics that no two runs share

SHARED = """
env: {{name: alfworld, data: {folder}/games, max_steps: 14, history: 6,
      task_types: [pick_and_place_simple, look_at_obj_in_light, pick_clean_then_place_in_recep],
      held_out_types: [pick_cool_then_place_in_recep, pick_two_obj_and_place]}}
sft: {{variant: generative, episodes: 30, judge_examples: 20, noise: 0.1, idle: 0.5, guided: 0.2, epochs: 2, lr: 8.0e-4,
      samples_per_update: 16, tokens_per_micro_batch: 2048}}
algo: {{advantage: gigpo, divide_by_std: false, gamma: 0.7, step_weight: 3.0, invalid: unavailable, kl: 0.01}}
rollout: {{success_reward: 1.0, temperature: 0.8, groups: 4, group_size: 4, max_prompt_tokens: 640,
          max_response_tokens: 80, concurrency: 16, kv_cache_gib: 0.1, dynamic_sampling: 1}}
judge: {{enabled: true, weight: 0.5, questions: 8, group_size: 4, teacher: expert, teacher_steps: 16,
        max_response_tokens: 100}}
guidelines: {{every: 1, writer: medoid}}
train: {{iterations: 2, lr: 3.0e-4, schedule: linear, samples_per_update: 64, tokens_per_micro_batch: 2048,
        checkpoint_every: 2, coupling_samples: 12}}
eval: {{levels: [L0, L2], games: 2, seeds: 1}}
"""
GAMES = "tools/make_games.py --out games --train 24 --seen 6 --unseen 24 --seed 0 --receptacles 6 --objects 12"
PLAIN = "judge.enabled=false guidelines.every=0"
PPO = "algo.advantage=ppo rollout.dynamic_sampling=0 rollout.groups=16 rollout.group_size=1"
RLVMR = (
    "algo.advantage=rlvmr prompt_style=rlvmr rollout.max_prompt_tokens=1024 judge.max_prompt_tokens=2048 "
    "algo.aggregate=sequence"
)
READING = "sft.episodes=60 sft.epochs=1"
SCIENCEWORLD = (
    "env.name=scienceworld env.data={folder}/gold env.level=L2 env.task_types=[] env.held_out_types=[] env.max_steps=3 "
    "sft.noise=0 sft.idle=0 rollout.groups=2 rollout.concurrency=1 rollout.max_prompt_tokens=2400 "
    "judge.max_prompt_tokens=3000 algo.advantage=grpo"
)


@dataclass(frozen=True)
class Case:
    """One run: its script, options and ranks, and where its weights come from: another case, or a folder."""

    script: str
    options: str
    ranks: int = 1
    start: str = ""
    model: str = str(ROOT / "assets" / "base")
    before: str = ""  # a command to run first
    rows: str = "data/sft/*.jsonl"  # a cold start's


CASES = {
    "sft": Case("train_sft.py", ""),
    "sft_rlvmr": Case("train_sft.py", "prompt_style=rlvmr sft.prompt_loss=0.25", ranks=2),
    "sft_reading": Case(
        "train_sft.py",
        f"sft.data={{folder}}/reading.jsonl sft.variant=vanilla {READING}",
        before=f"tools/tiny_base_model.py rows shared.yaml --out reading.jsonl --set {READING}",
        rows="reading.jsonl",
    ),
    "sft_scienceworld": Case(
        "train_sft.py",
        "env.name=scienceworld env.data={folder}/gold env.task_types=[find-living-thing,boil] env.held_out_types=[] "
        "sft.episodes=6 sft.judge_examples=2 sft.noise=0 sft.idle=0 sft.epochs=1 env.max_steps=40",
    ),
    "gigpo_gcd": Case("train_rl.py", "train.eval_every=2 algo.entropy=0.001", start="sft"),
    "gigpo_gcd_2": Case("train_rl.py", "model.shard=always train.old_logprobs=engine", 2, "sft"),
    "ppo": Case("train_rl.py", f"{PPO} {PLAIN}", start="sft"),
    "ppo_2": Case("train_rl.py", f"{PPO} model.shard=always algo.kl=0", 2, "sft"),
    "rlvmr_gcd": Case("train_rl.py", RLVMR, start="sft_rlvmr"),
    "rlvmr_gcd_2": Case(
        "train_rl.py",
        f"{RLVMR} algo.aggregate=token model.tune=lora model.lora_rank=8 model.shard=always train.lr=1e-3",
        2,
        "sft_rlvmr",
    ),
    "nthr": Case("train_rl.py", f"algo.advantage=grpo algo.nthr=true algo.importance=truncate {PLAIN}", start="sft"),
    "nthr_2": Case(
        "train_rl.py",
        "algo.advantage=grpo algo.nthr=true model.shard=always algo.importance=mask algo.policy_loss=gspo "
        f"algo.overlong=mask algo.stats_over=trajectories {PLAIN}",
        2,
        "sft",
    ),
    "scienceworld": Case("train_rl.py", SCIENCEWORLD, start="sft_scienceworld"),
    "scienceworld_2": Case("train_rl.py", f"{SCIENCEWORLD} model.shard=always", 2, "sft_scienceworld"),
}


def processor() -> str:
    """Name the type of this machine's processor, by what kernels are chosen by."""
    import torch

    wanted = ("model name", "cpu family", "model")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return ", ".join([*(found.get(key, "?") for key in wanted), torch.backends.cpu.get_cpu_capability()])


def replay(name: str, folder: Path) -> dict:
    """Run a case in `folder`, after the one that it starts from, and return its record."""
    case, run = CASES[name], folder / "runs" / name
    shutil.rmtree(run, ignore_errors=True)  # a finished run would be resumed, and not played
    if not (folder / "games").is_dir():
        call(GAMES, folder)
        (folder / "shared.yaml").write_text(SHARED.format(folder=folder))
    model = case.model
    if case.start:
        model = folder / "runs" / case.start / "checkpoints" / "latest"
        if not model.exists():
            replay(case.start, folder)
    if case.before:
        call(case.before, folder)
    options = case.options.format(folder=folder)
    call(f"{case.script} shared.yaml --set name={name} model.path={model} {options}", folder, case.ranks)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    record = {"metrics": [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]}
    record["weights"] = weights_digest(run / "checkpoints" / "latest")
    if case.script == "train_rl.py":
        record["said"] = episodes_digest(run)
    else:
        (rows,) = folder.glob(case.rows)
        record["said"] = digest(line.encode() for line in rows.read_text().splitlines())
        rows.unlink()
    return record


def call(command: str, folder: Path, ranks: int = 1) -> None:
    """Run a script of the project in `folder`. Raises RuntimeError with what it said if it fails."""
    script, *arguments = command.split()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a process group around this
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *launcher, str(ROOT / script), *arguments]
    done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def digest(parts: Iterable[bytes]) -> str:
    """Hash a sequence of byte strings, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Hash all tensors of a checkpoint, by name."""
    from safetensors.numpy import load_file

    files = sorted(folder.glob("*.safetensors"))
    tensors = {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    return digest(part for name in sorted(tensors) for part in (name.encode(), tensors[name].tobytes()))


def episodes_digest(run: Path) -> str:
    """Hash what model and environment said in all iterations, and how it was labelled."""
    step_keys = ("observation", "response", "action", "valid", "available", "reward", "label")
    parts: list = []
    for file in sorted((run / "episodes").glob("*.jsonl.gz")):
        *episodes, extra = map(json.loads, gzip.open(file, "rt"))
        for one in episodes:
            steps = [[step[key] for key in step_keys] for step in one["steps"]]
            parts.append([one["task"]["id"], one["group"], one["member"], one["won"], one["score"], steps])
        question_keys = ("group", "member", "step", "label", "source", "answers")
        parts += [[question[key] for key in question_keys] for question in extra["questions"]]
        parts.append(extra["guidelines"])
    return digest(json.dumps(part, sort_keys=True).encode() for part in parts)


def differences(found: dict, expected: dict) -> list[str]:
    """Say what of a record is not as expected."""
    lines = [f"{key}: {found[key]}, not {expected[key]}" for key in ("weights", "said") if found[key] != expected[key]]
    for number, (one, other) in enumerate(zip(found["metrics"], expected["metrics"], strict=True)):
        keys = [key for key in sorted(one | other) if one.get(key) != other.get(key)]
        lines += [f"line {number}, {key}: {one.get(key)}, not {other.get(key)}" for key in keys]
    return lines


def main() -> None:
    """Replay cases, and compare or record them."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help=", ".join(CASES))
    command.add_argument("--record", action="store_true", help="write golden.json anew")
    command.add_argument("--folder", type=Path, help="to play in; kept (default: a temporary one)")
    arguments = command.parse_args()
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {"processor": "", "cases": {}}
    if recorded["processor"] != processor() and not arguments.record:
        print(f"recorded on {recorded['processor']}, this is {processor()}: last digits may differ")
    folder = (arguments.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    different = False
    for name in arguments.cases or CASES:
        began = time.monotonic()
        record = replay(name, folder)
        lines = [] if arguments.record else differences(record, recorded["cases"][name])
        what = "recorded" if arguments.record else "different" if lines else "as recorded"
        print(f"{name}: {what}, {time.monotonic() - began:.0f} s", *lines, sep="\n  ", flush=True)
        different |= bool(lines)
        if arguments.record:
            recorded = {"processor": processor(), "cases": recorded["cases"] | {name: record}}
            RECORD.write_text(json.dumps(recorded, indent=0))
    sys.exit(different)


if __name__ == "__main__":
    main()

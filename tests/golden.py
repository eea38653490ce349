"""Replay small recorded runs and compare every number, to the last digit.

    python tests/golden.py                       # replay all cases, print what differs
    python tests/golden.py nthr scienceworld     # some of them
    python tests/golden.py --record              # write tests/golden.json anew, after a change that is meant

A case is a cold start or three iterations of RL from one, on one rank or two; its record holds every metric but times,
a digest of the final weights, and one of what the model and the environment said.  Numbers are those of one type of
processor: kernels differ in the last digit from one to another, and a sampled token follows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("golden.json")

SHARED = """
env: {{name: alfworld, data: {games}, max_steps: 14, history: 6,
      task_types: [pick_and_place_simple, look_at_obj_in_light, pick_clean_then_place_in_recep],
      held_out_types: [pick_cool_then_place_in_recep, pick_two_obj_and_place]}}
sft: {{variant: generative, episodes: 40, judge_examples: 20, noise: 0.1, idle: 0.5, guided: 0.2, epochs: 2, lr: 8.0e-4,
      samples_per_update: 16, tokens_per_micro_batch: 2048}}
algo: {{advantage: gigpo, divide_by_std: false, gamma: 0.7, step_weight: 3.0, invalid: unavailable, kl: 0.01}}
rollout: {{success_reward: 1.0, temperature: 0.8, groups: 4, group_size: 4, max_prompt_tokens: 640,
          max_response_tokens: 80, concurrency: 16, kv_cache_gib: 0.1, dynamic_sampling: 1}}
judge: {{enabled: true, weight: 0.5, questions: 8, group_size: 4, teacher: expert, teacher_steps: 16,
        max_response_tokens: 100}}
guidelines: {{every: 1, writer: medoid}}
train: {{iterations: 3, lr: 3.0e-4, schedule: linear, samples_per_update: 64, tokens_per_micro_batch: 2048,
        checkpoint_every: 3, coupling_samples: 12}}
eval: {{levels: [L0, L2], games: 2, seeds: 1}}
"""
PLAIN = ["judge.enabled=false", "guidelines.every=0"]
# name -> (script, cases it starts from, options, ranks)
CASES = {
    "sft": ("train_sft.py", "", [], 1),
    "sft_rlvmr": ("train_sft.py", "", ["prompt_style=rlvmr", "sft.phrases=true", "sft.prompt_loss=0.25"], 2),
    "sft_reading": ("train_sft.py", "", ["sft.variant=reading", "sft.episodes=60", "sft.epochs=1"], 1),
    "sft_scienceworld": (
        "train_sft.py",
        "",
        ["env.name=scienceworld", "env.data={gold}", "env.task_types=[find-living-thing, boil]", "env.held_out_types=[]",
         "sft.episodes=6", "sft.judge_examples=2", "sft.noise=0", "sft.idle=0", "sft.epochs=1", "env.max_steps=40"],
        1,
    ),
    "gigpo_gcd": ("train_rl.py", "sft", ["train.eval_every=3", "algo.entropy=0.001"], 1),
    "gigpo_gcd_2": ("train_rl.py", "sft", ["model.shard=always", "train.old_logprobs=engine"], 2),
    "ppo": ("train_rl.py", "sft", ["algo.advantage=ppo", "rollout.dynamic_sampling=0", "rollout.groups=16",
                                    "rollout.group_size=1", *PLAIN], 1),
    "ppo_2": ("train_rl.py", "sft", ["algo.advantage=ppo", "rollout.dynamic_sampling=0", "rollout.groups=16",
                                      "rollout.group_size=1", "model.shard=always", "algo.kl=0"], 2),
    "rlvmr_gcd": ("train_rl.py", "sft_rlvmr", ["algo.advantage=rlvmr", "prompt_style=rlvmr",
                                                "rollout.max_prompt_tokens=1024", "judge.max_prompt_tokens=2048",
                                                "algo.aggregate=sequence"], 1),
    "rlvmr_gcd_2": ("train_rl.py", "sft_rlvmr", ["algo.advantage=rlvmr", "prompt_style=rlvmr",
                                                  "rollout.max_prompt_tokens=1024", "judge.max_prompt_tokens=2048",
                                                  "model.tune=lora", "model.lora_rank=8", "model.shard=always",
                                                  "train.lr=1e-3"], 2),
    "nthr": ("train_rl.py", "sft", ["algo.advantage=grpo", "algo.nthr=true", "algo.importance=truncate", *PLAIN], 1),
    "nthr_2": ("train_rl.py", "sft", ["algo.advantage=grpo", "algo.nthr=true", "model.shard=always",
                                       "algo.importance=mask", "algo.policy_loss=gspo", "algo.overlong=mask",
                                       "algo.stats_over=trajectories", *PLAIN], 2),
    "scienceworld": (
        "train_rl.py",
        "sft_scienceworld",
        ["env.name=scienceworld", "env.data={gold}", "env.level=L2", "env.task_types=[]", "env.held_out_types=[]",
         "env.max_steps=3", "sft.noise=0", "sft.idle=0", "rollout.groups=2", "rollout.concurrency=1", "rollout.max_prompt_tokens=2400",
         "judge.max_prompt_tokens=3000", "algo.advantage=grpo", "train.iterations=2", "train.checkpoint_every=2"],
        1,
    ),
    "scienceworld_2": (
        "train_rl.py",
        "sft_scienceworld",
        ["env.name=scienceworld", "env.data={gold}", "env.level=L2", "env.task_types=[]", "env.held_out_types=[]",
         "env.max_steps=3", "sft.noise=0", "sft.idle=0", "rollout.groups=2", "rollout.concurrency=1", "rollout.max_prompt_tokens=2400",
         "judge.max_prompt_tokens=3000", "algo.advantage=grpo", "train.iterations=2", "train.checkpoint_every=2",
         "model.shard=always"],
        2,
    ),
}


def processor() -> str:
    """Name the type of this machine's processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def digest(parts) -> str:
    """Hash a sequence of byte strings, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Hash all tensors of a checkpoint, by name."""
    from safetensors.numpy import load_file

    tensors = {f"{file.name} {name}": tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return digest(part for name in sorted(tensors) for part in (name.encode(), tensors[name].tobytes()))


def said(run: Path) -> str:
    """Hash what the model and the environment said in all iterations, and how it was labelled."""
    parts = []
    for file in sorted((run / "episodes").glob("*.jsonl")):
        *episodes, extra = map(json.loads, file.read_text().splitlines())
        for one in episodes:
            steps = [[s[key] for key in ("observation", "response", "action", "valid", "available", "reward", "label")] for s in one["steps"]]
            parts.append([one["task"]["id"], one["group"], one["member"], one["won"], one["score"], steps])
        parts += [[q["group"], q["member"], q["step"], q["label"], q["source"], q["answers"]] for q in extra["questions"]]
        parts.append(extra["guidelines"])
    return digest(json.dumps(part, sort_keys=True).encode() for part in parts)


def play(name: str, folder: Path) -> dict:
    """Run a case in `folder`, after those that it starts from, and return its record."""
    script, start, options, ranks = CASES[name]
    run = folder / "runs" / name
    if not (folder / "games").is_dir():
        subprocess.run([sys.executable, ROOT / MAKE_GAMES, "--out", folder / "games", "--train", "24", "--seen", "6",
                        "--unseen", "24", "--seed", "0", "--receptacles", "6", "--objects", "12"], check=True, capture_output=True)
        (folder / "shared.yaml").write_text(SHARED.format(games=folder / "games"))
    if start and not (folder / "runs" / start / "checkpoints" / "latest").exists():
        play(start, folder)
    source = folder / "runs" / start / "checkpoints" / "latest" if start else ROOT / "assets" / "base"
    options = [option.format(gold=folder / "gold") for option in options]
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *command, ROOT / script, folder / "shared.yaml", "--set", f"name={name}", f"model.path={source}", *options]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "rollout/tokens_per_s", "mem/")
    record = {"metrics": [{key: value for key, value in one.items() if not key.startswith(timed)} for one in metrics]}
    record["weights"] = weights_digest(run / "checkpoints" / "latest")
    if script == "train_rl.py":
        record["said"] = said(run)
    else:
        (file,) = (folder / "data" / "sft").glob("*.jsonl")
        record["said"] = digest(line.encode() for line in file.read_text().splitlines())
        file.unlink()
    return record


def differences(found: dict, expected: dict) -> list[str]:
    """Say what of a record is not as expected."""
    lines = [f"{key}: {found[key]} instead of {expected[key]}" for key in ("weights", "said") if found[key] != expected[key]]
    for number, (one, other) in enumerate(zip(found["metrics"], expected["metrics"], strict=True)):
        for key in sorted(one | other):
            if one.get(key) != other.get(key):
                lines.append(f"line {number}, {key}: {one.get(key)} instead of {other.get(key)}")
    return lines


MAKE_GAMES = "tools/make_games.py"


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("cases", nargs="*", choices=[[], *CASES])
    command.add_argument("--record", action="store_true")
    command.add_argument("--folder", type=Path)
    arguments = command.parse_args()
    cases = arguments.cases or list(CASES)
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {"cases": {}}
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in cases:
        began = time.monotonic()
        record = play(name, folder)
        seconds = time.monotonic() - began
        if arguments.record:
            known["cases"][name] = record
            known["processor"] = processor()
            RECORD.write_text(json.dumps(known, indent=0))
            print(f"{name}: recorded, {seconds:.0f} s, said {record['said']}", flush=True)
        else:
            lines = differences(record, known["cases"][name])
            failed |= bool(lines)
            print(f"{name}: {'as recorded' if not lines else ''} {seconds:.0f} s", *lines, sep="\n  ", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# The whole project on one page, on a laptop: from nothing to an agent that learned by RL with GCD, and a table.
#
#   ./quickstart.sh                             15 minutes on 2 CPU cores, after the installation
#   ./quickstart.sh quickstart_plain            the same without GCD
#   SEED=1 ./quickstart.sh                      another training seed, in folders that end in _1
#
# Run it again at any time: what is done is not done again, and an interrupted training goes on from its checkpoint.
# DEVICE=cpu|cuda overrides what nvidia-smi says; RANKS is the number of processes, each with an engine of its own.
set -euo pipefail
cd "$(dirname "$0")"
config=${1:-quickstart}
seed=${SEED:-0}
suffix=$([ "$seed" = 0 ] || echo "_$seed")
export DEVICE=${DEVICE:-$(nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu)}
ranks=${RANKS:-$([ "$DEVICE" = cpu ] && [ "$(getconf _NPROCESSORS_ONLN)" -gt 1 ] && echo 2 || echo 1)}
export OMP_NUM_THREADS=1  # one thread a rank: vLLM's CPU engine is several times slower with more
evaluated() { ls "$1"/eval_*.json > /dev/null 2>&1; }
run() { .venv/bin/torchrun --standalone --nproc_per_node="$ranks" "$@"; }

# 1. Python packages, into .venv
./install.sh

# 2. Games: 2,100 new ones in small rooms, in ALFWorld's own format
.venv/bin/python tools/make_games.py --out data/quickstart_games --train 1500 --seen 300 --unseen 300 --seed 0 \
    --receptacles 6 --objects 12

# 3. What the base model can do: it reads small rooms, and has some idea of each task type
base=runs/quickstart_base
evaluated $base ||
    run evaluate.py --ckpt assets/base --config configs/quickstart.yaml --out $base --seeds 1 --set device="$DEVICE"

# 4. Cold start: it imitates an expert that dawdles, and judged steps of its episodes
sft=runs/quickstart_sft$suffix
[ -e "$sft/checkpoints/final" ] ||
    run train_sft.py configs/quickstart_sft.yaml --set device="$DEVICE" seed="$seed" name="quickstart_sft$suffix"
evaluated "$sft" ||
    run evaluate.py --ckpt "$sft/checkpoints/latest" --config configs/quickstart.yaml --out "$sft" \
        --set device="$DEVICE"

# 5. RL: it plays in groups, judges its own steps, and learns from both
rl=runs/$config$suffix
evaluated "$rl" ||
    run train_rl.py "configs/$config.yaml" --set device="$DEVICE" seed="$seed" name="$config$suffix" \
        model.path="$sft/checkpoints/latest"

# 6. Evaluation: all new games of every level, twice; the table; a page to look at
evaluated "$rl" || run evaluate.py --ckpt "$rl/checkpoints/latest" --set device="$DEVICE"
echo
.venv/bin/python evaluate.py --table $base "$sft" "$rl"
echo
.venv/bin/python tools/report.py "$rl"
echo "success in percent [95 % interval]: the base model, after the cold start, after RL"
echo "files of the run: $rl (report.html, metrics.jsonl, tensorboard/, episodes/, checkpoints/)"

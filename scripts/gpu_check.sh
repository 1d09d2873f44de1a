#!/usr/bin/env bash
# Checks on a GPU what the suite cannot see on a CPU, in at most 9 minutes. It installs and downloads nothing.
# Without a GPU it runs at small size and writes gpu_check_cpu.json and gpu_check_cpu.md.
#   bash scripts/gpu_check.sh                 writes gpu_check.json and gpu_check.md into benchmarks/results/
#   bash scripts/gpu_check.sh --out FOLDER    writes them there (relative to the repository)
#   PYTHON=python3 bash scripts/gpu_check.sh  sets the interpreter (default: .venv/bin/python, else python3)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
cd "$ROOT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One GPU: with several, the Trainer would split a batch.
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"
# Full float32: some containers enable TensorFloat32, whose products match the CPU's only to 1e-3.
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
export NVIDIA_TF32_OVERRIDE=0
exec "$PYTHON" benchmarks/gpu_check.py "$@"

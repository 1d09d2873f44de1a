#!/usr/bin/env bash
# Sets up .venv, then lints, checks types and runs the test suite. Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
# One thread per worker: tests are many and small, and numbers must not depend on the number of threads.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" "$@"

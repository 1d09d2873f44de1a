#!/usr/bin/env bash
# Sets up .venv, lints, checks types and runs the tests. Usage: bash scripts/test.sh [--all] [pytest arguments]
# Without --all the tests marked "slow" are left out.
set -euo pipefail
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then selection=(); shift; fi
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
# One thread per worker: tests are many and small, and numbers must not depend on the number of threads.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" ${selection[@]+"${selection[@]}"} "$@"

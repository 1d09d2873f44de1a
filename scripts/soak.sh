#!/usr/bin/env bash
# The full-length checks of which scripts/test.sh runs a few. Usage: bash scripts/soak.sh [cases per kind, 10000] [killed runs, 10]
set -euo pipefail
[[ -n ${PYTHON:-} ]] || bash "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# New kill points and cases each time; each run is killed twice.
SOAK_SEED="${SOAK_SEED:-$RANDOM}"
export SOAK_SEED
echo "SOAK_SEED=$SOAK_SEED"
SOAK_TRIALS="${2:-10}" "$PYTHON" -m pytest -m "slow or not slow" --durations=5 tests/nlu/test_exact_resume.py tests/nlu/test_faults.py
GENERATED_CASES="${1:-10000}" "$PYTHON" -m pytest --durations=0 -n "${TEST_WORKERS:-2}" \
  tests/nlu/test_bad_input.py tests/loralib/test_adapter_folder.py

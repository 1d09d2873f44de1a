#!/usr/bin/env bash
# Collect the adapters behind an experiment's results, with cards, predictions and a manifest, into a folder and an archive.
# usage: bash scripts/release_adapters.sh EXPERIMENT --model_name_or_path DIR --glue_dir DIR [--check]     (--help says more)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$PYTHON" "$ROOT/nlu/experiments/release.py" "$@"

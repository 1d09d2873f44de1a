#!/usr/bin/env bash
# Gather the test predictions of several runs into the zip that gluebenchmark.com takes, checked against its rules.
# usage: bash scripts/make_submission.sh FOLDER… [--out submission.zip] [--allow_partial]      (--help says more)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
exec "$python" "$root/nlu/data/submission.py" "$@"

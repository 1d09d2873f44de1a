#!/usr/bin/env bash
# Gather the test predictions of several runs into the zip that gluebenchmark.com takes, checked against its rules.
# usage: bash scripts/make_submission.sh FOLDER… [--out submission.zip] [--allow_partial]      (--help says more)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$PYTHON" "$ROOT/nlu/submission.py" "$@"

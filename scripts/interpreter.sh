# Sourced by start_run.sh and gpu_check.sh: sets ROOT (the repository) and PYTHON (the interpreter, unless it is set).
ROOT=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$ROOT/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=$(command -v python3 || command -v python) || {
        echo "error: there is no python3: install it, or set PYTHON" >&2
        exit 2
    }
elif [[ $PYTHON == */* ]]; then # relative to the caller's folder
    PYTHON=$(CDPATH= cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
fi

#!/usr/bin/env bash
# From nothing to a table: installs, prepares a real encoder and real data, fine-tunes with LoRA² (k=8 and k=1), AdaLoRA
# and LoRA, and prints what came out.
#   bash scripts/quickstart.sh                                      STS-B, some minutes on two cores
#   bash scripts/quickstart.sh --glue_dir DIR --task_name TASK      your GLUE data
#   bash scripts/quickstart.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py "$@"

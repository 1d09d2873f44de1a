#!/usr/bin/env bash
# SST-2 on RoBERTa-large with the settings in configs/tasks/sst2.yaml. --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun "${PROCESSES[@]}" "$ROOT/nlu/run_glue.py" --published roberta-large --task_name sst2 --method "${METHOD:-lora2}" \
    --do_train --do_eval "${FLAGS[@]}" "$@"

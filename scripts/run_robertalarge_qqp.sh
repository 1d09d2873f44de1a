#!/usr/bin/env bash
# QQP on RoBERTa-large with the settings in configs/tasks/qqp.yaml. --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun "${PROCESSES[@]}" "$ROOT/nlu/run_glue.py" --published roberta-large --task_name qqp --method "${METHOD:-lora2}" \
    --do_train --do_eval "${FLAGS[@]}" "$@"

#!/usr/bin/env bash
# QNLI on RoBERTa-large with the settings in configs/tasks/qnli.yaml. --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun "${PROCESSES[@]}" "$ROOT/nlu/run_glue.py" --published roberta-large --task_name qnli --method "${METHOD:-lora2}" \
    --do_train --do_eval "${FLAGS[@]}" "$@"

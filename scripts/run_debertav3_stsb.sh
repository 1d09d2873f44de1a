#!/usr/bin/env bash
# STS-B on DeBERTaV3-base with the settings in configs/tasks/stsb.yaml. --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun "${PROCESSES[@]}" "$ROOT/nlu/run_glue.py" --published deberta-v3-base --task_name stsb --method "${METHOD:-lora2}" \
    --do_train --do_eval "${FLAGS[@]}" "$@"

#!/usr/bin/env bash
# MNLI on DeBERTaV3-base with the settings in configs/tasks/mnli.yaml. --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$ROOT/nlu/run_glue.py" \
    --published deberta-v3-base --task_name mnli --method "${METHOD:-lora2}" --do_train --do_eval \
    --measured_dir output/measured ${MODEL:+--model_name_or_path "$MODEL"} ${SEED:+--seed "$SEED"} \
    ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} "$@"

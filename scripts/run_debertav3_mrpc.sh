#!/usr/bin/env bash
# MRPC on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854). Where AdaLoRA's launch settings
# differ, AdaLoRA methods use those.
# The warm-up is 0.1 of the 3450 steps.
# --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL=${MODEL:-microsoft/deberta-v3-base}
SEED=${SEED:-6}

# Flags that only some methods take.
SETTINGS=()
case $BASE in
    lora | sora) SETTINGS=(--lora_alpha 32) ;;
    adalora | lora2)
        SETTINGS=(--lora_alpha 32 --lora_r 8 --target_rank 1 --reg_orth_coef 0.1 --beta1 0.85 --beta2 0.85
            --init_warmup 600 --final_warmup 1800 --mask_interval 1)
        ;;
esac
if [[ $BASE == adalora ]]; then # AdaLoRA's own launch settings
    SETTINGS+=(--lora_r 2 --target_rank 1)
fi

run "$PYTHON" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$ROOT/nlu/run_glue.py" \
    --model_name_or_path "$MODEL" --task_name mrpc --method "$METHOD" --do_train --do_eval --seed "$SEED" \
    --total_batch_size 32 ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} --ddp_find_unused_parameters False \
    --learning_rate 1e-3 --num_train_epochs 30 --warmup_steps 345 --schedule_steps 3450 \
    --weight_decay 0.01 --cls_dropout 0 --max_seq_length 320 \
    --eval_strategy steps --eval_steps 300 --save_strategy steps --save_steps 300 --logging_steps 30 \
    --root_output_dir "output/glue/$(basename "$MODEL")/mrpc/$METHOD/seed-$SEED" \
    ${SETTINGS[@]+"${SETTINGS[@]}"} --method_file_wins "$@"

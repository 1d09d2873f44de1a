#!/usr/bin/env bash
# QQP on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854). Where AdaLoRA's launch settings
# differ, AdaLoRA methods use those.
# --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL=${MODEL:-microsoft/deberta-v3-base}
SEED=${SEED:-6}

# Flags that only some methods take.
SETTINGS=()
case $BASE in
    lora | sora) SETTINGS=(--lora_alpha 16) ;;
    adalora | lora2)
        SETTINGS=(--lora_alpha 16 --lora_r 8 --target_rank 3 --reg_orth_coef 0.1 --beta1 0.85 --beta2 0.85
            --init_warmup 8000 --final_warmup 25000 --mask_interval 100)
        ;;
esac
if [[ $BASE == adalora ]]; then # AdaLoRA's own launch settings
    SETTINGS+=(--lora_r 2 --target_rank 1 --num_train_epochs 5 --schedule_steps 56855)
fi

run "$PYTHON" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$ROOT/nlu/run_glue.py" \
    --model_name_or_path "$MODEL" --task_name qqp --method "$METHOD" --do_train --do_eval --seed "$SEED" \
    --total_batch_size 32 ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} --ddp_find_unused_parameters False \
    --learning_rate 8e-4 --num_train_epochs 20 --warmup_steps 2000 --schedule_steps 227420 \
    --weight_decay 0.01 --cls_dropout 0.15 --max_seq_length 320 \
    --eval_strategy steps --eval_steps 3000 --save_strategy steps --save_steps 3000 --logging_steps 300 \
    --root_output_dir "output/glue/$(basename "$MODEL")/qqp/$METHOD/seed-$SEED" \
    ${SETTINGS[@]+"${SETTINGS[@]}"} --method_file_wins "$@"

#!/usr/bin/env bash
# CoLA on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854). Where AdaLoRA's launch settings
# differ, AdaLoRA methods use those.
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
        SETTINGS=(--lora_alpha 32 --lora_r 4 --target_rank 3 --reg_orth_coef 0.1 --beta1 0.85 --beta2 0.85
            --init_warmup 800 --final_warmup 3500 --mask_interval 10)
        ;;
esac
if [[ $BASE == adalora ]]; then # AdaLoRA's own launch settings
    SETTINGS+=(--lora_r 3 --target_rank 1)
fi

run "$PYTHON" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$ROOT/nlu/run_glue.py" \
    --model_name_or_path "$MODEL" --task_name cola --method "$METHOD" --do_train --do_eval --seed "$SEED" \
    --total_batch_size 32 ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} --ddp_find_unused_parameters False \
    --learning_rate 8e-4 --num_train_epochs 25 --warmup_steps 100 --schedule_steps 6700 \
    --weight_decay 0 --cls_dropout 0.1 --max_seq_length 64 \
    --eval_strategy steps --eval_steps 100 --save_strategy steps --save_steps 100 --logging_steps 10 \
    --root_output_dir "output/glue/$(basename "$MODEL")/cola/$METHOD/seed-$SEED" \
    ${SETTINGS[@]+"${SETTINGS[@]}"} --method_file_wins "$@"

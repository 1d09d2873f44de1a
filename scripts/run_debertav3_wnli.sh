#!/usr/bin/env bash
# WNLI on DeBERTaV3-base. No settings were published for it; chosen here: those of RTE, with fewer steps, 128 tokens and seed 6.
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
        SETTINGS=(--lora_alpha 32 --lora_r 4 --target_rank 3 --reg_orth_coef 0.3 --beta1 0.85 --beta2 0.85
            --init_warmup 60 --final_warmup 180 --mask_interval 1)
        ;;
esac
if [[ $BASE == adalora ]]; then # chosen here
    SETTINGS+=(--lora_r 2 --target_rank 1)
fi

run "$PYTHON" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$ROOT/nlu/run_glue.py" \
    --model_name_or_path "$MODEL" --task_name wnli --method "$METHOD" --do_train --do_eval --seed "$SEED" \
    --total_batch_size 32 ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} --ddp_find_unused_parameters False \
    --learning_rate 1.2e-3 --num_train_epochs 20 --warmup_steps 40 --schedule_steps 400 \
    --weight_decay 0.01 --cls_dropout 0.2 --max_seq_length 128 \
    --eval_strategy steps --eval_steps 20 --save_strategy steps --save_steps 20 --logging_steps 2 \
    --root_output_dir "output/glue/$(basename "$MODEL")/wnli/$METHOD/seed-$SEED" \
    ${SETTINGS[@]+"${SETTINGS[@]}"} --method_file_wins "$@"

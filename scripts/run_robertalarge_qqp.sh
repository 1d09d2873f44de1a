#!/usr/bin/env bash
# QQP on RoBERTa-large: LoRA's settings (arXiv 2106.09685, Table 9, and its launch scripts). No rank-allocation
# settings were published for this backbone; they are chosen here, with the same shares of the steps as on DeBERTaV3-base.
# The batch of 32 is 8 GPUs × 4.
# The warm-up is 0.06 of the 227420 steps; cls_dropout is RoBERTa's own; evaluating every 6000 steps is chosen here.
# --help explains the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL=${MODEL:-FacebookAI/roberta-large}
SEED=${SEED:-0}

# Flags that only some methods take.
SETTINGS=()
case $BASE in
    lora | sora) SETTINGS=(--lora_alpha 16 --lora_module query,value) ;;
    adalora | lora2)
        SETTINGS=(--lora_alpha 16 --lora_r 8 --target_rank 3 --reg_orth_coef 0.1 --beta1 0.85 --beta2 0.85
            --init_warmup 8000 --final_warmup 25000 --mask_interval 100)
        ;;
esac
if [[ $BASE == adalora ]]; then # chosen here
    SETTINGS+=(--lora_r 2 --target_rank 1)
fi

run "$PYTHON" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$ROOT/nlu/run_glue.py" \
    --model_name_or_path "$MODEL" --task_name qqp --method "$METHOD" --do_train --do_eval --seed "$SEED" \
    --total_batch_size 32 ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} --ddp_find_unused_parameters False \
    --learning_rate 3e-4 --num_train_epochs 20 --warmup_steps 13646 --schedule_steps 227420 \
    --weight_decay 0.1 --cls_dropout 0.1 --max_seq_length 512 \
    --eval_strategy steps --eval_steps 6000 --save_strategy steps --save_steps 6000 --logging_steps 600 \
    --root_output_dir "output/glue/$(basename "$MODEL")/qqp/$METHOD/seed-$SEED" \
    ${SETTINGS[@]+"${SETTINGS[@]}"} --method_file_wins "$@"

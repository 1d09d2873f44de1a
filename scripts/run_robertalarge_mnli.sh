#!/usr/bin/env bash
# MNLI on RoBERTa-large: LoRA's settings (arXiv 2106.09685, Table 9, and its launch scripts); the rank allocation, for which
# no settings were published on this backbone, is chosen here: the shares of the steps that DeBERTaV3-base's has.
# With --do_predict --predict_task ax the model predicts GLUE's diagnostic set too.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=mnli
BACKBONE=FacebookAI/roberta-large
TRAIN_EXAMPLES=392702
BATCH=32   # 8 GPUs × 4
LEARNING_RATE=3e-4
EPOCHS=10
WARMUP_STEPS=7364   # warmup_ratio 0.06 of 122720 steps
WEIGHT_DECAY=0.1
CLS_DROPOUT=0.1   # RoBERTa's own
MAX_SEQ_LENGTH=128
EVAL_STEPS=6000   # chosen here
PUBLISHED_SEED=0
LORA_ALPHA=16
LORA_MODULE=query,value   # of LoRA and SoRA; the methods that allocate ranks take all six
LORA_R=8
# From here on chosen here.
TARGET_RANK=3
REG_ORTH_COEF=0.1
INIT_WARMUP=11000
FINAL_WARMUP=71000
MASK_INTERVAL=100

adalora_settings() {
    LORA_R=3 TARGET_RANK=1
}

launch "$@"

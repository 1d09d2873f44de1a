#!/usr/bin/env bash
# MNLI on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# With --do_predict --predict_task ax the model predicts GLUE's diagnostic set too.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=mnli
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=392702
BATCH=32
LEARNING_RATE=5e-4
EPOCHS=7
WARMUP_STEPS=1000
WEIGHT_DECAY=0
CLS_DROPOUT=0.15
MAX_SEQ_LENGTH=256
EVAL_STEPS=3000
PUBLISHED_SEED=6
LORA_ALPHA=16
LORA_R=8
TARGET_RANK=3
REG_ORTH_COEF=0.1
INIT_WARMUP=8000
FINAL_WARMUP=50000
MASK_INTERVAL=100

adalora_settings() {
    LORA_R=3 TARGET_RANK=1
}

launch "$@"

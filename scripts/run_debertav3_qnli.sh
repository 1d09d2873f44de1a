#!/usr/bin/env bash
# QNLI on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=qnli
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=104743
BATCH=32
LEARNING_RATE=1.2e-3
EPOCHS=5
WARMUP_STEPS=500
WEIGHT_DECAY=0.01
CLS_DROPOUT=0.1
MAX_SEQ_LENGTH=512
EVAL_STEPS=1000
PUBLISHED_SEED=6
LORA_ALPHA=32
LORA_R=8
TARGET_RANK=2
REG_ORTH_COEF=0.1
INIT_WARMUP=2000
FINAL_WARMUP=8000
MASK_INTERVAL=100

adalora_settings() {
    LORA_R=2 TARGET_RANK=1 LEARNING_RATE=5e-4
}

launch "$@"

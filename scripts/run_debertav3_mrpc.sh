#!/usr/bin/env bash
# MRPC on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=mrpc
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=3668
BATCH=32
LEARNING_RATE=1e-3
EPOCHS=30
WARMUP_STEPS=345   # warmup_ratio 0.1 of 3450 steps
WEIGHT_DECAY=0.01
CLS_DROPOUT=0
MAX_SEQ_LENGTH=320
EVAL_STEPS=300
PUBLISHED_SEED=6
LORA_ALPHA=32
LORA_R=8
TARGET_RANK=1
REG_ORTH_COEF=0.1
INIT_WARMUP=600
FINAL_WARMUP=1800
MASK_INTERVAL=1

adalora_settings() {
    LORA_R=2 TARGET_RANK=1
}

launch "$@"

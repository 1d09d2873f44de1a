#!/usr/bin/env bash
# QQP on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=qqp
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=363846
BATCH=32
LEARNING_RATE=8e-4
EPOCHS=20
WARMUP_STEPS=2000
WEIGHT_DECAY=0.01
CLS_DROPOUT=0.15
MAX_SEQ_LENGTH=320
EVAL_STEPS=3000
PUBLISHED_SEED=6
LORA_ALPHA=16
LORA_R=8
TARGET_RANK=3
REG_ORTH_COEF=0.1
INIT_WARMUP=8000
FINAL_WARMUP=25000
MASK_INTERVAL=100

adalora_settings() {
    LORA_R=2 TARGET_RANK=1 EPOCHS=5
}

launch "$@"

#!/usr/bin/env bash
# CoLA on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=cola
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=8551
BATCH=32
LEARNING_RATE=8e-4
EPOCHS=25
WARMUP_STEPS=100
WEIGHT_DECAY=0
CLS_DROPOUT=0.1
MAX_SEQ_LENGTH=64
EVAL_STEPS=100
PUBLISHED_SEED=6
LORA_ALPHA=32
LORA_R=4
TARGET_RANK=3
REG_ORTH_COEF=0.1
INIT_WARMUP=800
FINAL_WARMUP=3500
MASK_INTERVAL=10

adalora_settings() {
    LORA_R=3 TARGET_RANK=1
}

launch "$@"

#!/usr/bin/env bash
# SST-2 on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=sst2
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=67349
BATCH=32
LEARNING_RATE=8e-4
EPOCHS=24
WARMUP_STEPS=1000
WEIGHT_DECAY=0.01
CLS_DROPOUT=0
MAX_SEQ_LENGTH=128
EVAL_STEPS=3000
PUBLISHED_SEED=6
LORA_ALPHA=16
LORA_R=8
TARGET_RANK=2
REG_ORTH_COEF=0.1
INIT_WARMUP=6000
FINAL_WARMUP=22000
MASK_INTERVAL=100

adalora_settings() {
    LORA_R=2 TARGET_RANK=1
}

launch "$@"

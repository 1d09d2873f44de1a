#!/usr/bin/env bash
# RTE on DeBERTaV3-base: the settings published with LoRA² (arXiv 2408.06854), AdaLoRA's own where METHOD is an adalora.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=rte
BACKBONE=microsoft/deberta-v3-base
TRAIN_EXAMPLES=2490
BATCH=32
LEARNING_RATE=1.2e-3
EPOCHS=50
WARMUP_STEPS=200
WEIGHT_DECAY=0.01
CLS_DROPOUT=0.2
MAX_SEQ_LENGTH=320
EVAL_STEPS=100
PUBLISHED_SEED=4
LORA_ALPHA=32
LORA_R=4
TARGET_RANK=3
REG_ORTH_COEF=0.3
INIT_WARMUP=600
FINAL_WARMUP=1800
MASK_INTERVAL=1

adalora_settings() {
    LORA_R=2 TARGET_RANK=1 PUBLISHED_SEED=6
}

launch "$@"

#!/usr/bin/env bash
# MRPC on RoBERTa-large: LoRA's settings (arXiv 2106.09685, Table 9, and its launch scripts); the rank allocation, for which
# no settings were published on this backbone, is chosen here: the shares of the steps that DeBERTaV3-base's has.
# LoRA's authors start this task from their MNLI adapter: add --lora_path FOLDER for that.
# What can be changed from outside stands at the top of launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=mrpc
BACKBONE=FacebookAI/roberta-large
TRAIN_EXAMPLES=3668
BATCH=32   # 8 GPUs × 4
LEARNING_RATE=3e-4
EPOCHS=20
WARMUP_STEPS=138   # warmup_ratio 0.06 of 2300 steps
WEIGHT_DECAY=0.1
CLS_DROPOUT=0.1   # RoBERTa's own
MAX_SEQ_LENGTH=512
EVAL_STEPS=115   # chosen here: an epoch
PUBLISHED_SEED=0
LORA_ALPHA=16
LORA_MODULE=query,value   # of LoRA and SoRA; the methods that allocate ranks take all six
LORA_R=8
# From here on chosen here.
TARGET_RANK=1
REG_ORTH_COEF=0.1
INIT_WARMUP=400
FINAL_WARMUP=1200
MASK_INTERVAL=1

adalora_settings() {
    LORA_R=2 TARGET_RANK=1
}

launch "$@"

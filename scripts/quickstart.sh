#!/usr/bin/env bash
# From nothing to a table and its figures: installs, prepares a real encoder (all-MiniLM-L6-v2, which was tuned for sentence
# similarity) and real data (STS-B), and compares LoRA², LoRA and AdaLoRA at similar size and equal scale.
#   bash scripts/quickstart.sh [any flag of nlu/compare.py, such as --glue_dir DIR --task_name TASK or --max_steps 30]
# Relative paths start at the repository.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/python scripts/demo_assets.py
bf16=() # without the CPU instructions, bfloat16 takes 3 to 18 times as long as float32
if grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo; then bf16=(--bf16); fi
exec .venv/bin/python nlu/compare.py --name quickstart --task_name stsb --glue_dir demo/glue \
    --model_name_or_path demo/minilm --methods lora2,lora,adalora_r8:lora_alpha=24 --seeds 1 \
    --max_steps 300 --learning_rate 3e-3 --warmup_steps 0.1 --weight_decay 0.01 --per_device_train_batch_size 32 \
    --eval_strategy steps --eval_steps 100 --logging_steps 50 --save_strategy no --length_bucketing ${bf16[@]+"${bf16[@]}"} "$@"

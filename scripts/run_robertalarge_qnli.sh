#!/usr/bin/env bash
# QNLI on RoBERTa-large with the settings in configs/tasks/qnli.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large qnli "$@"

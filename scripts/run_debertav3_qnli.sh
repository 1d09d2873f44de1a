#!/usr/bin/env bash
# QNLI on DeBERTaV3-base with the settings in configs/tasks/qnli.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" deberta-v3-base qnli "$@"

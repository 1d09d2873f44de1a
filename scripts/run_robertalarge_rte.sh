#!/usr/bin/env bash
# RTE on RoBERTa-large with the settings in configs/tasks/rte.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large rte "$@"

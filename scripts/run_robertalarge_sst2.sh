#!/usr/bin/env bash
# SST-2 on RoBERTa-large with the settings in configs/tasks/sst2.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large sst2 "$@"

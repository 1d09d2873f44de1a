#!/usr/bin/env bash
# MRPC on RoBERTa-large with the settings in configs/tasks/mrpc.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large mrpc "$@"

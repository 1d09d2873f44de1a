#!/usr/bin/env bash
# QQP on RoBERTa-large with the settings in configs/tasks/qqp.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large qqp "$@"

#!/usr/bin/env bash
# MNLI on RoBERTa-large with the settings in configs/tasks/mnli.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large mnli "$@"

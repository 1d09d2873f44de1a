#!/usr/bin/env bash
# STS-B on RoBERTa-large with the settings in configs/tasks/stsb.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large stsb "$@"

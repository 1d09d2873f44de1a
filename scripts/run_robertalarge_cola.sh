#!/usr/bin/env bash
# CoLA on RoBERTa-large with the settings in configs/tasks/cola.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" roberta-large cola "$@"

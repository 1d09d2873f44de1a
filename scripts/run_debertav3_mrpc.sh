#!/usr/bin/env bash
# MRPC on DeBERTaV3-base with the settings in configs/tasks/mrpc.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" deberta-v3-base mrpc "$@"

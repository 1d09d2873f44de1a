#!/usr/bin/env bash
# SST-2 on DeBERTaV3-base with the settings in configs/tasks/sst2.yaml. --help explains the environment variables.
source "$(dirname "${BASH_SOURCE[0]}")/start_run.sh" deberta-v3-base sst2 "$@"

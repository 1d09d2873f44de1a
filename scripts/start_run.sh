# Sourced by scripts/run_*.sh with a backbone, a task and further flags: starts the run that they and the environment ask for.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"

show_help() {
    cat <<END
Fine-tunes an encoder on a task with the settings in configs/tasks/.

  bash $0
  METHOD=adalora SEED=2 NPROC=4 bash $0 --max_steps 100

The environment sets:
  METHOD       a file's name in configs/methods/ without .yaml (default: lora2; roberta-large: lora). A method without a
               published learning rate for the backbone needs --learning_rate
  MODEL        a model's folder, or another name on the hub
  SEED         replaces the published one
  NPROC        processes on this machine, one per GPU (default: 1)
  PER_DEVICE   rows a process takes at once, at most; the rest of its share of the batch is accumulated (default: all)
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for a run over several machines, as in torchrun
  DRY_RUN=1    prints the command, the values that it would use and where each comes from, and starts nothing
  PYTHON       the interpreter (default: .venv/bin/python where scripts/setup.sh made it, else python3 or python)

Flags after the script's name go to nlu/run_glue.py (see its --help) and override everything else. The method's file in
configs/methods/ overrides the task's settings. The total batch size does not depend on the number of processes. In a
shorter training (--max_steps, --num_train_epochs), warm-ups and masking interval shrink in proportion, including your
own; --schedule_steps sets the length that they were chosen for.
END
}

backbone=$1 task=$2
shift 2
for word in "$@"; do
    if [[ $word == -h || $word == --help ]]; then
        show_help
        exit
    fi
done

if ((${NNODES:-1} > 1)) && [[ -z ${NODE_RANK:-} || -z ${MASTER_ADDR:-} ]]; then
    echo "error: NNODES=$NNODES needs NODE_RANK and MASTER_ADDR" >&2
    exit 2
fi
NPROC=${NPROC:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} processes=$((${NPROC:-1} * ${NNODES:-1}))
if ((NNODES > 1)); then MASTER_PORT=${MASTER_PORT:-29500}; fi
[[ $backbone != roberta-large ]] || METHOD=${METHOD:-lora} # the method whose settings are published for it
# PYTHON may belong to another checkout, whose code it would import.
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
# Seconds that the launcher gives its processes to end their step and save it before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

run=("$ROOT/nlu/run_glue.py" --published "$backbone" --task_name "$task" --method "${METHOD:-lora2}"
    --do_train --do_eval --measured_dir output/measured ${MODEL:+--model_name_or_path "$MODEL"}
    ${SEED:+--seed "$SEED"} ${PER_DEVICE:+--per_device_train_batch_size "$PER_DEVICE"} "$@")
start=("$PYTHON" "${run[@]}")
# On one machine each run gets a free port, unless MASTER_PORT is set.
if ((processes > 1)); then
    place=(--standalone)
    [[ -z ${MASTER_PORT:-} ]] || place=(--nnodes "$NNODES" --node_rank "$NODE_RANK"
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
    start=("$PYTHON" "$ROOT/scripts/launch.py" --nproc_per_node "$NPROC" "${place[@]}" "${run[@]}")
fi
[[ ${DRY_RUN:-0} == 0 ]] && exec "${start[@]}"
printf '%q ' "${start[@]}" && echo
WORLD_SIZE=$processes exec "$PYTHON" "${run[@]}" --dry_run

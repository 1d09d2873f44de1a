# Sourced by the scripts/run_*.sh files with their arguments: --help, the environment variables, and `run`.

source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"

show_help() {
    cat <<END
Fine-tunes an encoder on a task with the settings in the script.

  bash $0
  METHOD=adalora SEED=2 NPROC=4 bash $0 --max_steps 100

The environment sets:
  METHOD       a file's name in configs/methods/ without .yaml (default: lora2)
  MODEL        a model's folder, or another name on the hub
  SEED         replaces the published one
  NPROC        processes on this machine, one per GPU (default: 1)
  PER_DEVICE   rows a process takes at once; the rest of its share of the batch is accumulated (default: all)
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for a run over several machines, as in torchrun
  ACCELERATE   a file in configs/accelerate/: \`accelerate launch\` starts the run with its settings (FSDP, for example)
  DRY_RUN=1    prints the command and starts nothing
  PYTHON       the interpreter (default: .venv/bin/python where scripts/setup.sh made it, else python3 or python)

Flags after the script's name go to nlu/run_glue.py (see its --help) and override everything else. The method's file in
configs/methods/ overrides the script's settings. The total batch size does not depend on the number of processes. In a
shorter training (--max_steps, --num_train_epochs), warm-ups and masking interval shrink in proportion, including your
own; --schedule_steps sets the length that they were chosen for.
END
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# given NAME ARGUMENT…: prints the last value of the flag --NAME among the arguments; fails where there is none
given() {
    local name=$1 flag value= found=1
    shift
    while (($#)); do
        flag=${1%%=*}
        if [[ $flag == --* && ${flag//-/_} == "__$name" ]]; then # run_glue.py takes --max-steps too
            [[ $1 == *=* ]] && value=${1#*=} || value=${2-}
            found=0
        fi
        shift
    done
    echo "$value"
    return $found
}

# run COMMAND…: starts it, or prints it for DRY_RUN. One process needs no launcher, and ACCELERATE uses another one: then the
# words before nlu/run_glue.py are replaced.
run() {
    if [[ -n ${ACCELERATE:-} ]] || ((NPROC * NNODES == 1)); then
        while [[ $1 != "$ROOT/nlu/run_glue.py" ]]; do shift; done
        if [[ -n ${ACCELERATE:-} ]]; then
            set -- -m accelerate.commands.launch --config_file "$ACCELERATE" --num_processes $((NPROC * NNODES)) \
                --num_machines "$NNODES" --machine_rank "$NODE_RANK" \
                --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@"
        fi
        set -- "$PYTHON" "$@"
    fi
    if [[ ${DRY_RUN:-0} == null ]]; then # for a program to read: each word ends in a NUL
        printf '%s\0' "$@" && exit
    fi
    [[ ${DRY_RUN:-0} == 0 ]] || { printf '%q ' "$@" && echo && exit; }
    exec "$@"
}

for word in "$@"; do
    if [[ $word == -h || $word == --help ]]; then
        show_help
        exit
    fi
done

# What the script's settings and folder depend on may also be given as a flag, which then wins.
for name in METHOD:method SEED:seed MODEL:model_name_or_path; do
    if value=$(given "${name#*:}" "$@"); then printf -v "${name%:*}" %s "$value"; fi
done
task=${0##*_} task=${task%.sh}
if value=$(given task_name "$@") && value=$(tr -d - <<<"$value" | tr '[:upper:]' '[:lower:]') && [[ $value != "$task" ]]; then
    fail "this script is for $task, not for $value: take the script of $value"
fi
METHOD=${METHOD:-lora2} NPROC=${NPROC:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}

[[ -f $ROOT/configs/methods/$METHOD.yaml ]] ||
    fail "no method '$METHOD': METHOD is one of $(CDPATH= cd "$ROOT/configs/methods" && echo *.yaml | sed 's/\.yaml//g')"
BASE=$(sed -n 's/^method: *//p' "$ROOT/configs/methods/$METHOD.yaml") # the method whose flags it takes
for name in NPROC NNODES MASTER_PORT; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name must be a positive number, got '${!name}'"
done
[[ $NODE_RANK =~ ^[0-9]+$ ]] && ((10#$NODE_RANK < NNODES)) ||
    fail "NODE_RANK must be a number from 0 to NNODES − 1 = $((NNODES - 1)), got '$NODE_RANK'"
[[ -z ${PER_DEVICE:-} || $PER_DEVICE =~ ^[1-9][0-9]*$ ]] || fail "PER_DEVICE must be a positive number, got '$PER_DEVICE'"
[[ -z ${ACCELERATE:-} || -f $ACCELERATE ]] ||
    fail "there is no file '$ACCELERATE': ACCELERATE is a file in configs/accelerate/"

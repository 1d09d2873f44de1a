# Shared by the scripts/run_*.sh files, which set a task's hyperparameters and then call `launch "$@"`.
#
#   METHOD=adalora SEED=2 NPROC=4 bash scripts/run_debertav3_rte.sh --max_steps 100
#
#   METHOD       a file's name in configs/methods/ without .yaml (default: lora2)
#   MODEL        a model's folder in place of the hub's name
#   SEED         in place of the published one
#   NPROC        processes on this machine, one a GPU (default: 1)
#   PER_DEVICE   examples a process takes at once; the rest of its share of the batch is accumulated (default: all)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   of a run over several machines, as torchrun knows them
#   ACCELERATE   a file in configs/accelerate/, to start with `accelerate launch` and its settings (FSDP, for example)
#   DRY_RUN=1    print the command and start nothing
#   PYTHON       the interpreter (default: .venv/bin/python where scripts/setup.sh made it, else python)
#
# Flags after the script's name go to nlu/run_glue.py and win over everything here. What the method's file in
# configs/methods/ says wins over the task's settings. The effective batch is the task's, however many processes share
# it. A shorter run (--max_steps, --num_train_epochs) keeps the proportions of the published schedule.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

# add NAME VALUE: a flag for the command line, unless the method's file has its own value
add() {
    grep -q "^$1:" "$CONFIG" || COMMAND+=("--$1" "$2")
}

# given NAME ARGUMENTS…: prints the value that a flag has among the arguments (the last one); fails where it has none
given() {
    local wanted=--$1 name value= found=1
    shift
    while (($#)); do
        name=${1%%=*}
        if [[ --${name#--} == "$name" && --$(tr - _ <<<"${name#--}") == "$wanted" ]]; then # run_glue takes --max-steps too
            [[ $1 == *=* ]] && value=${1#*=} || value=${2-}
            found=0
        fi
        shift
    done
    echo "$value"
    return $found
}

# Optimiser steps of a training of so many epochs, and of this one, into PUBLISHED_STEPS and STEPS
count_steps() {
    local rows=$TRAIN_EXAMPLES per_epoch epochs limit
    PUBLISHED_STEPS=$((EPOCHS * ((rows + BATCH - 1) / BATCH)))
    limit=$(given max_train_samples "$@") && ((limit < rows)) && rows=$limit
    per_epoch=$(((rows + BATCH - 1) / BATCH))
    epochs=$(given num_train_epochs "$@") || epochs=$EPOCHS
    STEPS=$(given max_steps "$@") || STEPS=$(awk "BEGIN { s = $epochs * $per_epoch; print int(s) + (s > int(s)) }")
    [[ $STEPS =~ ^[0-9]+$ && $STEPS -gt 0 ]] || fail "--max_steps and --num_train_epochs want positive numbers"
}

# scaled N: N steps of the published schedule, in proportion to this run's length
scaled() {
    echo $((STEPS < PUBLISHED_STEPS ? $1 * STEPS / PUBLISHED_STEPS : $1))
}

at_least_1() {
    echo $(($1 > 0 ? $1 : 1))
}

# The share of the batch of one process: PER_DEVICE examples, ACCUMULATION times
share_batch() {
    local world=$((NPROC * NNODES))
    ((BATCH % world == 0)) || fail "the batch of $BATCH does not divide among $world processes: choose NPROC × NNODES among its divisors"
    PER_DEVICE=${PER_DEVICE:-$((BATCH / world))}
    [[ $PER_DEVICE =~ ^[1-9][0-9]*$ ]] || fail "PER_DEVICE must be a positive number, got '$PER_DEVICE'"
    ((BATCH % (world * PER_DEVICE) == 0)) || fail "the batch of $BATCH is no multiple of $world processes × PER_DEVICE=$PER_DEVICE: lower or raise PER_DEVICE"
    ACCUMULATION=$((BATCH / (world * PER_DEVICE)))
}

starter() {
    local python=${PYTHON:-python}
    [[ -z ${PYTHON:-} && -x $ROOT/.venv/bin/python ]] && python=$ROOT/.venv/bin/python
    if [[ -n ${ACCELERATE:-} ]]; then
        COMMAND=("$python" -m accelerate.commands.launch --config_file "$ACCELERATE" --num_processes $((NPROC * NNODES))
            --num_machines "$NNODES" --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
    elif ((NPROC * NNODES > 1)); then
        COMMAND=("$python" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK"
            --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    else
        COMMAND=("$python")
    fi
    COMMAND+=("$ROOT/nlu/run_glue.py")
}

launch() {
    local name value
    # What the settings, the first line and the folder depend on may come as a flag too, which then wins.
    for name in METHOD:method SEED:seed MODEL:model_name_or_path; do
        if value=$(given "${name#*:}" "$@"); then printf -v "${name%:*}" %s "$value"; fi
    done
    value=$(given task_name "$@") && [[ ${value,,} != "$TASK" ]] && fail "this script is for $TASK, not for $value: take $value's own"
    METHOD=${METHOD:-lora2} NPROC=${NPROC:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
    CONFIG=$ROOT/configs/methods/$METHOD.yaml
    [[ -f $CONFIG ]] || fail "no method '$METHOD': METHOD is one of $(cd "$ROOT/configs/methods" && echo *.yaml | sed 's/\.yaml//g')"
    for name in NPROC NNODES MASTER_PORT; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name must be a positive number, got '${!name}'"
    done
    [[ $NODE_RANK =~ ^[0-9]+$ ]] && ((NODE_RANK < NNODES)) ||
        fail "NODE_RANK must be a number from 0 to NNODES − 1 = $((NNODES - 1)), got '$NODE_RANK'"
    [[ -z ${ACCELERATE:-} || -f $ACCELERATE ]] || fail "there is no file '$ACCELERATE': ACCELERATE is a file in configs/accelerate/"
    for name in per_device_train_batch_size gradient_accumulation_steps; do
        given $name "$@" >/dev/null && fail "--$name would change the batch of $BATCH: set PER_DEVICE, and NPROC, instead"
    done
    BASE=$(sed -n 's/^method: *//p' "$CONFIG")
    if [[ $BASE == adalora ]]; then adalora_settings; fi
    share_batch
    count_steps "$@"
    starter

    COMMAND+=(--model_name_or_path "${MODEL:-$BACKBONE}" --task_name "$TASK" --method "$METHOD" --do_train --do_eval
        --per_device_train_batch_size "$PER_DEVICE" --gradient_accumulation_steps "$ACCUMULATION"
        --per_device_eval_batch_size 64 --max_seq_length "$MAX_SEQ_LENGTH" --seed "${SEED:-$PUBLISHED_SEED}")
    # Every trainable parameter takes part in every step: there are no unused ones to look for.
    ((NPROC * NNODES == 1)) || COMMAND+=(--ddp_find_unused_parameters False)
    add learning_rate "$LEARNING_RATE"
    add num_train_epochs "$EPOCHS"
    add weight_decay "$WEIGHT_DECAY"
    add cls_dropout "$CLS_DROPOUT"
    add warmup_steps "$(scaled "$WARMUP_STEPS")"
    case $BASE in lora | sora | adalora | lora2) add lora_alpha "$LORA_ALPHA" ;; esac
    case $BASE in lora | sora) [[ -z ${LORA_MODULE:-} ]] || add lora_module "$LORA_MODULE" ;; esac
    case $BASE in adalora | lora2)
        add lora_r "$LORA_R"
        add target_rank "$TARGET_RANK"
        add reg_orth_coef "$REG_ORTH_COEF"
        add init_warmup "$(scaled "$INIT_WARMUP")"
        add final_warmup "$(scaled "$FINAL_WARMUP")"
        add mask_interval "$(at_least_1 "$(scaled "$MASK_INTERVAL")")"
        add beta1 0.85
        add beta2 0.85
        ;;
    esac
    COMMAND+=(--eval_strategy steps --eval_steps "$EVAL_STEPS" --save_strategy steps --save_steps "$EVAL_STEPS"
        --save_total_limit 2 --logging_steps "$(at_least_1 $((EVAL_STEPS / 10)))"
        --root_output_dir "output/glue/$(basename "${MODEL:-$BACKBONE}")/$TASK/$METHOD/seed-${SEED:-$PUBLISHED_SEED}" "$@")

    echo "$TASK with $METHOD on ${MODEL:-$BACKBONE}, seed ${SEED:-$PUBLISHED_SEED}, about $STEPS steps"
    echo "effective batch $BATCH = $NNODES machine(s) × $NPROC process(es) × $PER_DEVICE example(s) × $ACCUMULATION accumulated"
    ((STEPS >= PUBLISHED_STEPS)) || echo "shorter than the published $PUBLISHED_STEPS steps: warm-ups and the masking interval are scaled alike"
    printf '%q ' "${COMMAND[@]}"
    echo
    [[ -n ${DRY_RUN:-} ]] || exec "${COMMAND[@]}"
}

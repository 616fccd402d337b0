# Sourced by the scripts beside it, inside their jobs: where the ranks meet, what they are told, and how a job goes on.

arguments=("$@") # of the script, for a job that has to be submitted anew

# A task of an array by its own name: the last one shares its SLURM_JOB_ID with the array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
starts=$((${SLURM_RESTART_COUNT:-0} + ${MMTARD_SUBMITTED_AGAIN:-0} + 1))

say() { echo "$(date '+%F %T') job $job: $*"; }

# The name alone may not resolve; the address is the one that Slurm itself reaches the node by.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# Jobs that share a node need ports of their own, below the range that connections take theirs from.
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# srun does not inherit --cpus-per-task since Slurm 22.05, and would give each rank one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# A rank's work on the CPU is decoding, in loader processes; threads on top of those would fight for the same cores.
export OMP_NUM_THREADS=1
# Says why NCCL could not connect, and nothing when it could. If it picked the wrong network of your nodes, also export
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with the name of the right one (`ip -brief addr` lists them).
export NCCL_DEBUG=WARN
# A line in the log as soon as it is printed, and a traceback from a rank that crashes in native code.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# `mmtard WORDS...` on every rank. What they print goes to the job's log, which keeps every start, and to a file of this start.
# A rank that is killed leaves the others waiting for it in a collective: end them, too.
ranks() {
    local log
    log=$(field StdOut) && log=${log%.log}-start$starts.log || log=/dev/null # a controller that is busy says nothing
    # Slurm's signals, which the ranks heed, would end tee before the ranks' last lines.
    srun --kill-on-bad-exit=1 --label python -m mmtard "$@" 2>&1 |
        (trap '' TERM USR2 INT && exec tee -a "$log") || return "${PIPESTATUS[0]}"
}

# Whether a status asks for another start: 75, the state is saved; over 128, a rank was killed by a signal.
wants_more() { [ "$1" -eq 75 ] || [ "$1" -gt 128 ]; }

field() { scontrol show job --oneliner "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# Puts the job back into the queue; where that is forbidden, submits the script again, to run when this job is over.
go_on() { # [CONFIG SETTINGS...] of a training
    local try state
    for try in 1 2 3; do
        state=$(field JobState) || true
        case $state in
            RUNNING | SIGNALING | "") ;;
            *) # a job that somebody cancelled or requeued meanwhile is no longer ours to start again
                say "is $state, and is not started again from here"
                return
                ;;
        esac
        if [ "$(field Requeue)" = 0 ]; then
            submit_again "$@"
            return
        fi
        say "goes back to the queue"
        # Requeueing ends the job with a SIGTERM to all its processes, scontrol too.
        if (trap '' TERM && exec scontrol requeue "$job"); then return; fi
        sleep 5
    done
    say "could not go back to the queue; the same sbatch command goes on from the saved state"
}

submit_again() {
    local new pair value options=(--parsable "--dependency=afterany:$SLURM_JOB_ID" --no-requeue "--job-name=$SLURM_JOB_NAME" "--output=$(field StdOut)")
    # Options of the command line, which the script's own lines do not have.
    options+=("--time=$(field TimeLimit)" "--nodes=$SLURM_JOB_NUM_NODES")
    [ -z "${SLURM_JOB_ACCOUNT:-}" ] || options+=("--account=$SLURM_JOB_ACCOUNT")
    [ -z "${SLURM_JOB_PARTITION:-}" ] || options+=("--partition=$SLURM_JOB_PARTITION")
    [ -z "${SLURM_JOB_QOS:-}" ] || options+=("--qos=$SLURM_JOB_QOS")
    [ -z "${SLURM_NTASKS_PER_NODE:-}" ] || options+=("--ntasks-per-node=$SLURM_NTASKS_PER_NODE")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    [ -z "${SLURM_GPUS_PER_NODE:-}" ] || options+=("--gpus-per-node=$SLURM_GPUS_PER_NODE")
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || options+=("--array=$SLURM_ARRAY_TASK_ID")
    [ "$(field OverSubscribe)" != YES ] || options+=(--oversubscribe)
    for pair in ReqNodeList:nodelist ExcNodeList:exclude Features:constraint; do
        value=$(field "${pair%:*}")
        [[ $value == "" || $value == "(null)" ]] || options+=("--${pair#*:}=$value")
    done
    new=$(MMTARD_SUBMITTED_AGAIN=$starts sbatch "${options[@]}" "$0" "${arguments[@]}") || {
        say "could neither go back to the queue nor be submitted again; the same sbatch command goes on from the saved state"
        return 0
    }
    new=${new%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    say "may not be requeued; submitted again as job $new"
    python -c 'import sys; from mmtard.distributed import slurm; slurm.hand_over(*sys.argv[1:])' "$job" "$new"
    # For `mmtard runs`, while the new job waits.
    [ $# -eq 0 ] || python -c 'import sys; from mmtard.runs import history; history.record_successor(*sys.argv[1:])' "$job" "$new" "$@"
}

# The arguments of a script as `words`, which begin with a configuration: theirs, or MMTARD_CONFIG, or the ViT-B/32's.
configured() { # [CONFIG] SETTINGS...
    words=("$@")
    if [[ ${1:-} != *.yaml || $1 == *=* ]]; then
        words=("${MMTARD_CONFIG:-configs/vitb32_mmtard.yaml}" "$@")
    fi
}

# Trains the run of a configuration on every rank, and has the job start again as often as the run's settings allow.
train() { # CONFIG SETTINGS...
    local status=0
    say "start $starts on $SLURM_JOB_NODELIST, ranks meet at $MASTER_ADDR:$MASTER_PORT, $*"
    may_start now "$@" || exit
    ranks train "$@" || status=$?
    say "training ended with status $status"
    if wants_more "$status" && may_start again "$@"; then go_on "$@"; fi
    exit "$status"
}

# One message about a wrong setting, or about a run that was started too often or failed, rather than one from every rank.
may_start() { python -m mmtard config --may-start "$@" >/dev/null; } # now|again CONFIG SETTINGS...
